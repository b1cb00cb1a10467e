"""Communication of the Boolean signal and of flips. Phases and ownership: see ``mbdist.optim.boolean``."""

"""Ranks that would not do the same computation stop at the start, with a message that says what differs."""

from __future__ import annotations

from mbdist.comm.communicator import Communicator
from mbdist.errors import UserError


def agree(
    communicator: Communicator,
    facts: dict[str, str],  # by name; values short enough to print, digests of what is longer
) -> None:
    """Raises UserError, on every rank, where a fact is not the same on all of them."""
    of_ranks = communicator.all_gather_objects(facts, "agreement")
    differing = []
    for name in sorted(set().union(*of_ranks)):
        values = [known.get(name, "(absent)") for known in of_ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differing.append(f"{name} is {values[0]} on worker 0, but {values[other]} on worker {other}")
    if differing:
        raise UserError(
            "the workers do not agree:\n  "
            + "\n  ".join(differing)
            + "\nStart all of them with the same config, versions and model."
        )

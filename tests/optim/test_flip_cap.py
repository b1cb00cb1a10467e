import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist.optim.flip_cap import add_lottery, cut_by_level
from mbdist_kernels import LEVELS, THRESHOLD

COUNTS = st.lists(st.integers(0, 50), min_size=LEVELS, max_size=LEVELS)


@settings(max_examples=200, deadline=None)
@given(COUNTS, st.integers(0, 2000), st.lists(st.integers(0, 30), min_size=64, max_size=64))
def test_cut_holds_the_cap_and_wastes_no_whole_level(counts, cap, ticket_counts):
    histogram = torch.tensor(counts)
    cut, lottery = cut_by_level(histogram, cap)
    above = int(histogram[max(0, cut.level - THRESHOLD) :].sum())
    assert cut.flips == above <= cap
    if cut.level > THRESHOLD:
        assert above + counts[cut.level - 1 - THRESHOLD] > cap
    assert lottery == (cut.level > THRESHOLD and above < cap)
    if lottery:
        filled = add_lottery(cut, torch.tensor(ticket_counts), cap)
        won = sum(ticket_counts[: filled.tickets])
        assert filled.flips == cut.flips + won <= cap
        assert filled.tickets == 64 or won + ticket_counts[filled.tickets] > cap - cut.flips


def test_worked_example():
    histogram = torch.zeros(LEVELS, dtype=torch.int64)
    histogram[127 - THRESHOLD], histogram[100 - THRESHOLD] = 3, 10
    cut, lottery = cut_by_level(histogram, 8)
    assert (cut.level, cut.flips, lottery) == (101, 3, True)
    tickets = torch.zeros(64, dtype=torch.int64)
    tickets[0], tickets[1] = 4, 6
    cut = add_lottery(cut, tickets, 8)
    assert (cut.tickets, cut.flips) == (1, 7)

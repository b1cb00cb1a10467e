import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist.optim.flip_cap import add_lottery, cut_by_rank
from mbdist_kernels import THRESHOLD, TOP_RANK

RANKS = TOP_RANK + 1 - THRESHOLD

COUNTS = st.lists(st.integers(0, 50), min_size=RANKS, max_size=RANKS)


@settings(max_examples=200, deadline=None)
@given(COUNTS, st.integers(0, 2000), st.lists(st.integers(0, 30), min_size=64, max_size=64))
def test_cut_holds_the_cap_and_wastes_no_whole_rank(counts, cap, ticket_counts):
    histogram = torch.tensor(counts)
    cut, lottery = cut_by_rank(histogram, cap)
    above = int(histogram[max(0, cut.rank - THRESHOLD) :].sum())
    assert cut.flips == above <= cap
    if cut.rank > THRESHOLD:
        assert above + counts[cut.rank - 1 - THRESHOLD] > cap
    assert lottery == (cut.rank > THRESHOLD and above < cap)
    if lottery:
        filled = add_lottery(cut, torch.tensor(ticket_counts), cap)
        won = sum(ticket_counts[: filled.tickets])
        assert filled.flips == cut.flips + won <= cap
        assert filled.tickets == 64 or won + ticket_counts[filled.tickets] > cap - cut.flips


def test_worked_example():
    histogram = torch.zeros(RANKS, dtype=torch.int64)
    histogram[127 - THRESHOLD], histogram[100 - THRESHOLD] = 3, 10
    cut, lottery = cut_by_rank(histogram, 8)
    assert (cut.rank, cut.flips, lottery) == (101, 3, True)
    tickets = torch.zeros(64, dtype=torch.int64)
    tickets[0], tickets[1] = 4, 6
    cut = add_lottery(cut, tickets, 8)
    assert (cut.tickets, cut.flips) == (1, 7)

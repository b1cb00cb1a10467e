"""Ranks that would not do the same computation stop at the start, with a message that says what differs; what they can
take over from rank 0 they take over."""

from __future__ import annotations

import logging

from mbdist.comm.communicator import Communicator
from mbdist.errors import UserError
from mbdist_kernels import launch

_log = logging.getLogger(__name__)


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


def share_launch_settings(communicator: Communicator) -> None:
    """Every rank launches its kernels as rank 0's table says: other block sizes may add up in another order, and a node
    may lack the file, or have an older one. All ranks call it together."""
    if communicator.world_size == 1:
        return
    own = launch.table()
    of_rank_0 = communicator.all_gather_objects(own, "agreement")[0]
    if own != of_rank_0:
        _log.warning(
            "mbdist: worker %d has another table of launch settings than worker 0, whose table is used",
            communicator.rank,
        )
    launch.use_table(of_rank_0)

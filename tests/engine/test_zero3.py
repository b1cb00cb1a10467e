"""Planes as ZeRO-3 leaves them."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from mbdist.comm.communicator import Communicator
from mbdist.comm.partition import WordPartition
from mbdist.engine.zero3 import PartitionedPlanes


def partitioned(words, status):
    """A plane of one rank, as DeepSpeed leaves it."""
    plane = torch.nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
    plane.ds_tensor, plane.ds_status = torch.zeros(words, dtype=torch.int32), status
    return plane


@pytest.mark.parametrize("gathered", [ZeroParamStatus.AVAILABLE, ZeroParamStatus.INFLIGHT])
def test_no_plane_flips_while_a_gathered_copy_would_not(gathered):
    planes = [[partitioned(4, ZeroParamStatus.NOT_AVAILABLE)], [partitioned(4, gathered)]]
    store = PartitionedPlanes(planes, [WordPartition(4, 1)] * 2, Communicator(alone=True), 1 << 20)
    masks = {(matrix, 0): torch.full((4,), 5, dtype=torch.int32) for matrix in (0, 1)}
    with pytest.raises(RuntimeError, match="still gathered"):
        store.apply(masks)
    assert all(int(store.owned_words(matrix, 0).sum()) == 0 for matrix in (0, 1)), "none, or all of them"
    planes[1][0].ds_status = ZeroParamStatus.NOT_AVAILABLE
    store.apply(masks)
    assert all(int(store.owned_words(matrix, 0).sum()) == 20 for matrix in (0, 1))

"""Bytes on paper, in cases that can be counted by hand. Real runs are held to them in tests/train/test_sharding.py."""

import pytest

from mbdist.comm.step_bytes import (
    GatheredFloats,
    TrainedMatrix,
    TrainedModel,
    dense_step_bytes,
    llama_matrices,
    step_bytes,
)
from mbdist.config.comm import CommConfig

MODEL = TrainedModel([TrainedMatrix(64, 64, planes=2)])  # 128 words a plane, 256 floats
LLAMA_70B = TrainedModel(llama_matrices(80, 8192, 28672, 1024, planes=2))


def test_of_one_matrix_on_two_ranks():
    found = step_bytes(MODEL, 2, 3, CommConfig(codec="sign", keep_gathered_gb=0))
    assert found["signal"] == 4 * (64 + 33), "half the words and the scales of 32 rows, and of one that might be cut"
    assert found["statistics"] == 8 * 128
    assert found["planes"] == 2 * 2 * 512 // 2
    assert found["float gradients"] == found["floats"] == 4 * 256 // 2
    assert "flips" not in found


def test_resident_planes_are_not_gathered():
    planes = [step_bytes(MODEL, 2, 3, CommConfig(resident_planes=kind))["planes"] for kind in ("none", "frozen", "all")]
    assert planes == [512, 256, 0]


def test_what_fits_is_gathered_once_a_micro_batch():
    """1,024 bytes of planes, and floats of which forward and backward together make three uses."""
    model = TrainedModel(
        MODEL.matrices, other_floats=1000, frozen=GatheredFloats(100, 300), large=GatheredFloats(200, 600)
    )
    for gb, times in ((1324 / 2**30, 1), (1323 / 2**30, 3)):
        found = step_bytes(model, 2, 3, CommConfig(keep_gathered_gb=gb), micro_batches=2)
        assert found["planes"] == 2 * min(times, 2) * 1024 // 2
        assert found["frozen floats"] == 2 * times * 100 // 2
        assert found["floats"] == (4 * (256 + 1000) - 200 + 2 * times * 200) // 2


def test_what_trains_decides_what_travels():
    """One accumulator of both planes (levels): no plane is at rest. One of each (all): twice the signal too."""
    codec = CommConfig(codec="sign", resident_planes="frozen")
    last = step_bytes(MODEL, 2, 3, codec)
    levels = step_bytes(TrainedModel([TrainedMatrix(64, 64, 2, signals=1, trained_planes=2)]), 2, 3, codec)
    both = step_bytes(TrainedModel([TrainedMatrix(64, 64, 2, signals=2, trained_planes=2)]), 2, 3, codec)
    assert levels["planes"] == both["planes"] == 2 * last["planes"] == 512
    assert levels["signal"] == last["signal"] and both["signal"] == 2 * last["signal"]
    assert levels["flip_counts"] == last["flip_counts"] and both["flip_counts"] == 2 * last["flip_counts"]


def test_matrices_that_take_turns_share_the_signal_and_not_the_statistics():
    found = step_bytes(TrainedModel(MODEL.matrices, turns=4), 2, 2, CommConfig(codec="sign"), flip_rate=1.0)
    whole = step_bytes(MODEL, 2, 2, CommConfig(codec="sign"), flip_rate=1.0)
    for phase in ("signal", "flips", "flip_counts"):
        assert found[phase] == whole[phase] / 4
    assert found["statistics"] == whole["statistics"] and found["floats"] == whole["floats"]


@pytest.mark.parametrize(("stage", "reductions"), [(0, 2), (1, 2), (2, 6), (3, 3)])
def test_gradients_of_floats_are_reduced_in_every_micro_batch_where_they_are_cut(stage, reductions):
    """Once or three times; an all-reduce sends twice what a reduce-scatter does."""
    assert step_bytes(MODEL, 2, stage, CommConfig(), micro_batches=3)["float gradients"] == reductions * 4 * 256 // 2


def test_few_flips_cost_two_bytes_and_many_a_bit_a_weight():
    few, all_of_them = (step_bytes(MODEL, 2, 2, CommConfig(), flip_rate=rate)["flips"] for rate in (1 / 256, 1.0))
    assert few == 2 * 16 // 2 and all_of_them == 512 // 2


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_nodes_divide_what_crosses_slow_links(ranks):
    flat = step_bytes(LLAMA_70B, ranks, 3, CommConfig(codec="sign"))
    nodes = step_bytes(LLAMA_70B, ranks, 3, CommConfig(codec="sign", node_size=4))
    assert nodes["signal"] == pytest.approx(flat["signal"] / 4 * (ranks / 4 - 1) / (ranks / 4 - 1 / 4))


@pytest.mark.parametrize(("stage", "ratio"), [(2, 40), (3, 9.4)])
def test_70b_against_dense(stage, ratio):
    """48 bits a weight, all-reduced and gathered, or gathered twice and scattered, against 1 (and 2 x 2 for planes)."""
    ours = sum(step_bytes(LLAMA_70B, 64, stage, CommConfig(codec="sign"), flip_rate=1e-4).values())
    assert dense_step_bytes(LLAMA_70B, 64, stage) / ours > ratio

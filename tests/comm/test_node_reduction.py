"""Sums inside nodes, then one message a node: what an owner gets, and what crosses the slow links."""

import pytest
import torch
from ranks import run_on_ranks

from mbdist.comm.codecs import CODECS, Segments, SplitColumns
from mbdist.comm.communicator import Communicator
from mbdist.comm.partition import WordPartition
from mbdist.comm.signal_reduction import FlatReduction, NodeReduction

RANKS, NODE_SIZE = 4, 2
SHAPES = ((5, 70), (1, 3), (33, 64))  # rows cut between owners; fewer words than ranks; whole rows


def values_of(rank, shape):
    m, n = shape
    values = torch.zeros(m, -(-n // 32) * 32)
    values[:, :n] = torch.randn(m, n, generator=torch.Generator().manual_seed(100 * rank + m))
    return values


def _main():
    communicator = Communicator(60)
    rank = communicator.rank
    found = {}
    for codec in ("fp32", "sign", "int4"):
        for bucket in (1, 1 << 20):
            got = {}
            reduction = NodeReduction(
                communicator,
                NODE_SIZE,
                CODECS[codec],
                bucket,
                2,
                lambda item, parts, got=got: got.update({item: [part.clone() for part in parts]}),
            )
            for shape in SHAPES:
                segments = Segments(*shape, WordPartition(shape[0] * -(-shape[1] // 32), communicator.world_size))
                signal = reduction.wanted(segments, torch.ones(shape[0]), torch.ones(shape[1]))
                signal.values.copy_(values_of(rank, shape))
                reduction.send(shape, signal, segments, SplitColumns.of(torch.ones(shape[1]), None).owners, rank)
            reduction.finish()
            found[codec, bucket] = got, dict(communicator.bytes_sent)
            communicator.bytes_sent.clear()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_on_ranks(RANKS, tmp_path_factory.mktemp("nodes"), _main)


def sums_of_nodes(shape):
    return [sum(values_of(node * NODE_SIZE + i, shape) for i in range(NODE_SIZE)) for node in range(RANKS // NODE_SIZE)]


@pytest.mark.parametrize("bucket", [1, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_owners_get_one_sum_a_node(found, shape, bucket):
    for node, expected in enumerate(sums_of_nodes(shape)):
        for codec in ("fp32", "sign", "int4"):
            parts = [found[rank][codec, bucket][0][shape][node] for rank in range(RANKS)]
            got = torch.cat(parts)[: expected.numel()].view_as(expected)
            columns = shape[1]
            if codec == "fp32":
                assert torch.equal(got, expected)
            elif codec == "sign":
                assert torch.equal(got[:, :columns] < 0, expected[:, :columns] < 0)
                assert not got[:, columns:].any()
            else:
                assert ((got - expected).abs() <= expected.abs().amax(1, keepdim=True) / 14 * 1.001).all()


def test_magnitudes_are_of_what_the_owner_has_of_a_row(found):
    shape = (5, 70)  # rows of 3 words, owners of 4: the first row's weights end in the first owner's part
    for node, expected in enumerate(sums_of_nodes(shape)):
        first_owner = found[0]["sign", 1][0][shape][node]
        torch.testing.assert_close(first_owner[0].abs(), expected[0, :70].abs().mean())
        torch.testing.assert_close(first_owner[96].abs(), expected[1, :32].abs().mean())


def test_one_packed_message_a_node_crosses(found):
    words = sum(-(-m * -(-n // 32) // RANKS) for m, n in SHAPES)
    for rank in range(RANKS):
        sent = found[rank]["sign", 1 << 20][1]
        segments = [Segments(m, n, WordPartition(m * -(-n // 32), RANKS)) for m, n in SHAPES]
        assert sent["signal"] == sum(4 * CODECS["sign"].message_words(of) for of in segments), "to one other node"
        assert sent["signal_in_node"] == 32 * 4 * words * 2, "to one mate, for the owners on two nodes"


def test_flat_and_nodes_of_one_are_the_same_messages():
    """A node of one rank has nothing to add up."""
    shape = (5, 70)
    segments = Segments(*shape, WordPartition(15, 1))
    got = {}
    alone = Communicator(alone=True)
    flat = FlatReduction(
        alone, CODECS["int8"], 1, 1, lambda item, parts: got.update({item: [part.clone() for part in parts]})
    )
    signal = flat.wanted(segments, torch.ones(5), torch.ones(70))
    signal.values.copy_(values_of(0, shape))
    columns = SplitColumns.of(torch.ones(70), None).owners
    flat.send("whole", signal, segments, columns, 0)
    message = CODECS["int8"].encode_segment(values_of(0, shape).flatten(), segments, 0, 0)
    assert torch.equal(got["whole"][0], CODECS["int8"].decode(message, segments, 0, columns))

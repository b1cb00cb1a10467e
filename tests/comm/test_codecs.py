"""Codecs of the signal and of flips: what comes out is what the formulas say, whoever owns it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist.comm.codecs import CODECS, Segments, SplitColumns
from mbdist.comm.partition import WordPartition
from mbdist_kernels import fold_key, signal_encode, words_per_row

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 140))
RANKS = st.integers(1, 8)


def signal_of(shape, seed=0):
    """(m, 32 W), rows of very different size."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(m, words_per_row(n) * 32)
    values[:, :n] = torch.randn(m, n, generator=generator) * 10 ** torch.randn(m, 1, generator=generator)
    return values


def through(codec_name, values, shape, world_size, columns=None, key=5):
    """Encode on one rank, decode on every owner, put together: (m, 32 W)."""
    codec = CODECS[codec_name]
    m, n = shape
    segments = Segments(m, n, WordPartition(m * words_per_row(n), world_size))
    signal = codec.wanted(segments, torch.ones(m), torch.ones(n))
    if signal.values is not None:
        signal.values.copy_(values)
    else:
        words, magnitudes = signal_encode(values[:, :n])
        signal.words.copy_(words)
        signal.magnitudes.copy_(magnitudes)
    messages = codec.encode(signal, segments, key)
    assert messages.shape == (world_size, codec.message_words(segments)) and messages.dtype == torch.int32
    if columns is None:
        columns = SplitColumns.of(torch.ones(n), None).owners
    parts = [codec.decode(message, segments, rank, columns).clone() for rank, message in enumerate(messages)]
    assert all(len(part) == segments.partition.elements_per_rank for part in parts)
    whole = torch.cat(parts)
    assert not whole[values.numel() :].any(), "padding after the last row carries nothing"
    return whole[: values.numel()].view_as(values)


@pytest.mark.parametrize("codec", CODECS)
@given(shape=SHAPES, world_size=RANKS, seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_owners_read_the_same_whatever_the_sharding(codec, shape, world_size, seed):
    values = signal_of(shape, seed)
    assert torch.equal(through(codec, values, shape, world_size), through(codec, values, shape, 1))


@pytest.mark.parametrize("codec", CODECS)
@given(shape=SHAPES, world_size=RANKS)
@settings(max_examples=20, deadline=None)
def test_decoded_values_are_those_of_the_formulas(codec, shape, world_size):
    n = shape[1]
    values = signal_of(shape)
    largest, mean = values.abs().amax(1, keepdim=True), values.abs().sum(1, keepdim=True) / n
    found = through(codec, values, shape, world_size)
    assert not found[:, n:].any(), "padding columns carry nothing"
    error = (found - values).abs()
    if codec == "fp32":
        assert torch.equal(found, values)
    elif codec == "bf16":
        assert torch.equal(found, values.bfloat16().float())
    elif codec in ("int8", "int4"):
        half_a_step = largest / (254 if codec == "int8" else 14)
        assert (error <= half_a_step * 1.0001).all()
    else:
        size = mean if codec == "sign" else largest
        torch.testing.assert_close(found[:, :n].abs(), size.expand(-1, n))
        if codec == "sign":
            assert torch.equal(found[:, :n] < 0, values[:, :n] < 0)


def test_unbiased_signs_have_the_mean_of_the_signal():
    draws, values = 100_000, torch.tensor([0.7, -0.3, 0.0, 1.0, -0.99])
    rows = torch.zeros(draws // 100, 32 * 100)
    rows[:, : 5 * 100] = values.repeat(100)
    found = through("sign_unbiased", rows, rows.shape, 1, key=fold_key(1, 2))[:, :500].reshape(-1, 5)
    variance = 1 - values.double() ** 2  # of draws of +-1; the row's largest is 1
    bound = 5 * (variance / draws).sqrt() + 2**-15
    assert ((found.double().mean(0) - values).abs() <= bound).all()


def test_unbiased_signs_differ_by_key():
    values = signal_of((4, 64))
    first, again, other = (through("sign_unbiased", values, (4, 64), 2, key=key) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("codec", ["int8", "int4", "sign"])
def test_columns_sent_at_like_magnitudes_lose_less(codec):
    """G of rank-1 magnitude: the owner's part of the column factor brings the columns' magnitudes back."""
    m, n = 16, 64
    sizes = 10 ** torch.randn(n, generator=torch.Generator().manual_seed(3))
    gradient = signal_of((m, n)) * sizes
    factor = torch.linspace(-2, 3, n)
    wanted = gradient * factor
    errors = []
    for split in (None, sizes):
        columns = SplitColumns.of(factor, split)
        found = through(codec, gradient * columns.sent, (m, n), 3, columns.owners)
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    assert errors[1] < errors[0] * (0.8 if codec == "sign" else 1.0)
    assert errors[1] < {"int8": 0.02, "int4": 0.25, "sign": 0.7}[codec]


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_that_is_not_finite_stays_with_itself(codec):
    values = signal_of((6, 40))
    broken = values.clone()
    broken[2, 5] = torch.nan
    broken[4, 7] = torch.inf
    found, clean = (through(codec, v, (6, 40), 4) for v in (broken, values))
    for row in (0, 1, 3, 5):
        assert torch.equal(found[row], clean[row])


def test_wire_bytes_of_a_large_matrix():
    """The bits a weight that the table of codecs promises; scales of rows come on top."""
    m, n, ranks = 1024, 4096, 4
    segments = Segments(m, n, WordPartition(m * n // 32, ranks))
    bits = {name: 32 * ranks * codec.message_words(segments) / (m * n) for name, codec in CODECS.items()}
    assert bits["fp32"] == 32 and bits["bf16"] == 16
    for name, code in (("int8", 8), ("int4", 4), ("sign", 1), ("sign_unbiased", 1)):
        assert code < bits[name] < code + 0.01

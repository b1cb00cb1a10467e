"""Operations on words: majority, XOR, the codecs of signals and flips. Exact on every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist_kernels import (
    flip_apply_sparse,
    flip_counts,
    flip_encode_sparse,
    flip_mask,
    pack_signs,
    popcount,
    popcount_by_block,
    signal_accumulate,
    signal_encode,
    unpack_bits,
    unpack_signs,
    vote,
    xor_apply,
)
from mbdist_kernels.pack import pack_signs_reference
from mbdist_kernels.popcount import popcount_reference
from mbdist_kernels.signal_codec import accumulate_reference, encode_reference
from mbdist_kernels.unpack import unpack_bits_reference, unpack_signs_reference
from mbdist_kernels.vote import vote_reference


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(torch.int32)


@pytest.mark.parametrize("ranks", range(1, 18))
def test_vote_is_the_majority_and_rank_0_decides_ties(implementation, ranks):
    words = random_words(ranks, 37, seed=ranks)
    assert torch.equal(vote(words), vote_reference(words))
    counts = unpack_bits(words).sum(0)
    bits = unpack_bits(vote(words)[None])[0]
    assert torch.equal(bits, torch.where(2 * counts == ranks, unpack_bits(words[:1])[0], 2 * counts > ranks))


@pytest.mark.parametrize("ranks", [2, 3])
def test_vote_over_several_chunks(ranks):
    words = random_words(ranks, (1 << 17) + 5)
    assert torch.equal(vote(words), vote_reference(words))
    assert vote(words[:, :0]).shape == (0,)


def test_vote_of_more_ranks_than_counters_hold(implementation):
    words = random_words(40, 5)
    assert torch.equal(vote(words), vote_reference(words))


@pytest.mark.parametrize("num_words", [1, 31, 4097])
def test_xor_apply_takes_the_first_words_of_a_padded_mask(implementation, num_words):
    words, mask = random_words(num_words), random_words(num_words + 3, seed=1)
    expected = words ^ mask[:num_words]
    before = words.clone()
    xor_apply(words, mask)
    assert torch.equal(words, expected)
    xor_apply(words, mask)
    assert torch.equal(words, before)


def test_words_in_other_memory_and_short_masks_are_refused():
    words = random_words(4, 4)
    for change in (lambda: xor_apply(words[:, :2], words), lambda: xor_apply(words, words[:2])):
        with pytest.raises(ValueError, match="contiguous words"):
            change()
    assert torch.equal(words, random_words(4, 4))


@pytest.mark.parametrize("num_words", [1, 5])
def test_every_version_equals_the_plain_one(implementation, num_words):
    words, values = random_words(3, num_words), torch.randn(3, 32 * num_words - 7)
    assert torch.equal(pack_signs(values), pack_signs_reference(values))
    assert torch.equal(unpack_bits(words), unpack_bits_reference(words))
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        columns = values.shape[1]
        assert torch.equal(unpack_signs(words, columns, dtype), unpack_signs_reference(words, columns, dtype))
    assert torch.equal(popcount_by_block(words, 4), popcount_reference(words, 4))
    totals = [values.clone(), values.clone()]
    magnitudes = torch.rand(2, 3)
    signal_accumulate(totals[0], torch.stack([words, ~words]), magnitudes)
    accumulate_reference(totals[1], torch.stack([words, ~words]), magnitudes)
    assert torch.equal(*totals)


def test_popcount(implementation):
    assert popcount(torch.tensor([70, -1, 0, -(2**31)], dtype=torch.int32)) == 3 + 32 + 0 + 1
    words = random_words(3, 1500)
    assert popcount(words) == int(unpack_bits(words).sum())
    by_block = popcount_by_block(torch.tensor([70, -1, 1], dtype=torch.int32), 2)
    assert by_block.tolist() == [35, 1] and by_block.dtype == torch.int32
    assert popcount_by_block(words, 1024).tolist() == [popcount(part) for part in words.view(-1).split(1024)]
    assert popcount(words[:0]) == 0 and len(popcount_by_block(words[:0], 32)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (9, 64)])
def test_signals_cross_as_signs_and_magnitudes(implementation, shape):
    signals = [torch.randn(shape) for _ in range(3)]
    sent = [signal_encode(signal) for signal in signals]
    weights = torch.tensor([0.5, 1.0, 2.0])
    total = torch.randn(shape)
    expected = total.clone()
    for (words, magnitudes), weight in zip(sent, weights, strict=True):
        expected += unpack_signs(words, shape[1]) * (weight * magnitudes)[:, None]
    words, magnitudes = torch.stack([w for w, _ in sent]), torch.stack([s for _, s in sent]) * weights[:, None]
    signal_accumulate(total, words, magnitudes)
    assert torch.equal(total, expected)
    # Of all multiples of the signs, the mean magnitude is the nearest: the error is orthogonal to the signs.
    decoded = torch.zeros(shape)
    signal_accumulate(decoded, words[:1], magnitudes[:1] / 0.5)
    signs = unpack_signs(words[0], shape[1])
    assert ((signals[0] - decoded) * signs).sum(1).abs().max() < 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_a_signal_that_is_not_finite_stays_alone(implementation, value):
    signal = torch.randn(4, 70)
    signal[2, 3] = value
    words, magnitudes = signal_encode(signal)
    assert torch.equal(words, pack_signs_reference(signal)), "the signs of an infinite row are those of its values"
    total = torch.zeros(4, 70)
    signal_accumulate(total, words[None], magnitudes[None])
    assert total[[0, 1, 3]].isfinite().all() and not total[2].isfinite().any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (9, 1100)])
def test_a_magnitude_is_the_mean_over_the_values_that_are_there(implementation, shape):
    signal = torch.randn(shape)
    words, sums = encode_reference(signal)
    counts = torch.arange(1, shape[0] + 1)
    for count in (None, counts):
        found, magnitudes = signal_encode(signal, count)
        assert torch.equal(found, words)
        torch.testing.assert_close(magnitudes, sums / (shape[1] if count is None else count))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 4000), st.integers(0, 2**31))
def test_sparse_flips_decode_to_their_mask(num_words, count, seed):
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randperm(num_words * 32, generator=generator)[:count].int()
    mask = flip_mask(elements, num_words)
    counts = flip_counts(mask)
    positions = flip_encode_sparse(mask, counts)
    assert len(positions) == int(counts.sum()) == len(elements) and len(counts) == -(-num_words // 2048)
    words = random_words(num_words)
    expected = words ^ mask
    flip_apply_sparse(words, positions, counts)
    assert torch.equal(words, expected)


def test_sparse_flips_on_every_implementation(implementation):
    elements = torch.tensor([3, 70_000, 70_001, 65_535, 65_536, 199_999])
    mask = flip_mask(elements.int(), 6250)
    counts = flip_counts(mask)
    positions = flip_encode_sparse(mask, counts)
    assert positions.tolist() == [3, 65_535, 0, 4464, 4465, 3391] and counts.tolist() == [2, 3, 0, 1]
    words = torch.zeros(6250, dtype=torch.int32)
    flip_apply_sparse(words, positions, counts)
    assert torch.equal(words, mask)
    empty = torch.zeros(6250, dtype=torch.int32)
    counts = flip_counts(empty)
    flip_apply_sparse(words, flip_encode_sparse(empty, counts), counts)
    assert torch.equal(words, mask)

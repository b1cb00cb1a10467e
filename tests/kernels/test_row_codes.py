"""Codes of 8, 4 and 1 bits beside one size a row: the same words and values from every implementation."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbdist_kernels import decode_rows, draw_signs, encode_rows, fold_key, pack_signs, unpack_signs
from mbdist_kernels.row_codes import decode_reference, draw_reference, encode_reference

ON_EVERY_IMPLEMENTATION = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70).map(lambda words: 32 * words))


def rows_of(shape, seed):
    """Rows of very different size; one of zeros, one that is not a number, one not finite where there are so many."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** (3 * torch.randn(shape[0], 1, generator=generator))
    for row, value in zip(values[1:4], (0.0, torch.nan, torch.inf), strict=False):
        row[:: 1 if value == 0 else 7] = value
    return values


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_of_the_worked_example(implementation):
    values = torch.zeros(1, 32)
    values[0, :4] = torch.tensor([7.0, -3.4, 0.0, 1.0])
    words, sizes = encode_rows(values, 4)
    assert words[0, 0] == 0x10D7 and sizes[0] == pytest.approx(1)
    assert decode_rows(words, sizes, torch.ones(32))[0, :4].tolist() == pytest.approx([7, -3, 0, 1])
    drawn = [draw_signs(values, fold_key(i)) for i in range(200)]
    assert all(size == 7 for _, size in drawn)
    often = sum(int(words[0, 0]) & 2 == 0 for words, _ in drawn) / 200
    assert abs(often - 0.257) < 5 * (0.257 * 0.743 / 200) ** 0.5


@ON_EVERY_IMPLEMENTATION
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_all_implementations_write_and_read_the_same(implementation, shape, seed):
    values = rows_of(shape, seed)
    columns = torch.randn(shape[1])
    key = seed + 2**31
    coded = [encode_rows(values, 8), encode_rows(values, 4), draw_signs(values, key)]
    expected = [encode_reference(values, 8), encode_reference(values, 4), draw_reference(values, key)]
    for (words, sizes), (same_words, same_sizes) in zip(coded, expected, strict=True):
        assert torch.equal(words, same_words)
        assert_same_bits(sizes, same_sizes)
        read = torch.empty(shape)
        decode_reference(words, sizes, columns, read)
        assert_same_bits(decode_rows(words, sizes, columns), read)


@ON_EVERY_IMPLEMENTATION
@given(shape=SHAPES, seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]))
def test_a_value_is_half_a_step_off_at_most(implementation, shape, seed, bits):
    values = rows_of(shape, seed)
    words, sizes = encode_rows(values, bits)
    finite = values.isfinite().all(1)
    assert torch.equal(sizes.isfinite(), finite)
    error = (decode_rows(words, sizes, torch.ones(shape[1])) - values)[finite]
    assert (error.abs() <= 0.50001 * sizes[finite, None]).all()


def test_decoded_signs_have_the_size_of_row_and_column(implementation):
    words = pack_signs(torch.randn(5, 96))
    sizes, columns = torch.rand(5), torch.randn(96)
    expected = unpack_signs(words, 96) * (sizes[:, None] * columns)
    assert torch.equal(decode_rows(words, sizes, columns), expected)


def test_drawn_signs_have_the_mean_of_the_values(implementation):
    draws, values = 1 << 17, torch.tensor([0.7, -0.3, 0.0, 1.0, -0.99, 0.02, 0.5, -1.0])
    words, sizes = draw_signs(values.repeat(8, draws // 64), fold_key(4))
    signs = decode_rows(words, sizes, torch.ones(draws // 8)).double().reshape(-1, 8)
    bound = 5 * ((1 - values.double() ** 2) / len(signs)).sqrt() + 2**-15
    assert ((signs.mean(0) - values).abs() <= bound).all()

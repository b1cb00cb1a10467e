import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbdist_kernels import pack_signs, popcount, unpack_bits, unpack_signs, words_per_row

SHAPES = [(1, 1), (1, 32), (3, 31), (2, 33), (5, 64), (7, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bit_layout_is_little_endian_and_one_means_minus(implementation, shape):
    values = torch.randn(shape)
    words = pack_signs(values)
    assert words.dtype == torch.int32 and words.shape == (shape[0], words_per_row(shape[1]))
    for i in range(shape[0]):
        for j in range(shape[1]):
            bit = (int(words[i, j // 32]) >> (j % 32)) & 1
            assert bit == int(values[i, j] < 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpack_inverts_pack(implementation, shape, dtype):
    signs = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    assert torch.equal(unpack_signs(pack_signs(signs), shape[1], dtype), signs.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_what_is_less_than_zero_packs_as_minus(implementation, dtype):
    values = torch.tensor([[0.0, -0.0, -1.0, torch.nan, -torch.inf, torch.inf, -1e-30]]).to(dtype)
    values = torch.cat([values, -values[:, 3:4]], 1)  # a NaN with the other sign
    assert unpack_signs(pack_signs(values), 8).tolist() == [[1, 1, -1, 1, -1, 1, -1, 1]]


def test_padding_bits_are_zero(implementation):
    bits = unpack_bits(pack_signs(-torch.ones(4, 37)))
    assert bits[:, :37].all() and not bits[:, 37:].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_words_equal_numpy_packbits(rows, columns, seed):
    negative = np.random.default_rng(seed).random((rows, columns)) < 0.5
    padded = np.pad(negative, ((0, 0), (0, -columns % 32)))
    expected = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    words = pack_signs(torch.from_numpy(np.where(negative, -1.0, 1.0)))
    assert np.array_equal(words.numpy(), expected)
    assert popcount(words) == negative.sum()

"""The packed plane: one sign a bit, one format in memory, on the wire and on disk.

A plane of an m x n matrix is ``int32[m, W]`` with ``W = ceil(n / 32)``. Bit b of word w in a row is column ``32*w +
b``; **bit 1 means -1** (the IEEE sign bit), so a flip is XOR and ``(bit << 31) ^ bits(x)`` is ``B * x``. Padding bits
past column n are 0 and stay 0. It equals ``numpy.packbits(signbit, axis=1, bitorder="little")`` viewed as int32.

Worked example, 8 columns shown::

    signs   +1 -1 -1 +1 +1 +1 -1 +1
    bits     0  1  1  0  0  0  1  0     (column 0 first)
    word     0b01000110 = 70
"""

from __future__ import annotations

import functools

import numpy as np
import torch

WORD_BITS = 32


def words_per_row(num_columns: int) -> int:
    """Number of int32 words that hold one row of ``num_columns`` signs."""
    return -(-num_columns // WORD_BITS)


def pack_signs(
    values: torch.Tensor,  # (m, n) any real dtype; only the sign is read, and 0 (of either sign) packs as +1
) -> torch.Tensor:
    """Pack the signs of ``values`` into words: int32 (m, W) on the same device."""
    m, n = values.shape
    negative = values < 0
    if values.device.type == "cpu":
        padded = np.zeros((m, words_per_row(n) * WORD_BITS), dtype=bool)
        padded[:, :n] = negative.numpy()
        return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    bits = torch.zeros(m, words_per_row(n) * WORD_BITS, dtype=torch.int32, device=values.device)
    bits[:, :n] = negative
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=values.device)
    # Disjoint bits: a wrapping sum is an or, and bit 31 lands in the sign of the int32 as it must.
    return (bits.view(m, -1, WORD_BITS) << shifts).sum(-1, dtype=torch.int32)


def unpack_bits(
    words: torch.Tensor,  # (..., W) int32
) -> torch.Tensor:
    """The bits of every word in column order: bool (..., 32 W), True where the sign is -1; padding included."""
    if words.device.type == "cpu":
        as_bytes = np.ascontiguousarray(words.detach().numpy()).view(np.uint8)
        return torch.from_numpy(np.unpackbits(as_bytes, axis=-1, bitorder="little").view(bool))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()


@functools.cache
def _byte_to_signs(dtype: torch.dtype) -> torch.Tensor:
    """Table (256, 8): row b holds the eight signs packed in byte b."""
    signbits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1.0 - 2.0 * signbits).to(dtype)


def unpack_signs(
    words: torch.Tensor,  # (m, W) int32
    num_columns: int,  # n
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Unpack words to +1 / -1 of ``dtype``: (m, n)."""
    m = words.shape[0]
    if words.device.type == "cpu":
        # One table row a byte: several times faster on a CPU than shifting out single bits.
        as_bytes = torch.from_numpy(np.ascontiguousarray(words.detach().numpy()).view(np.uint8))
        signs = torch.nn.functional.embedding(as_bytes.int(), _byte_to_signs(dtype))
        return signs.view(m, -1)[:, :num_columns]
    return (1 - 2 * unpack_bits(words)[:, :num_columns].to(torch.int8)).to(dtype)


def popcount(words: torch.Tensor) -> int:
    """Number of bits set in all words (int32, any shape)."""
    if words.device.type == "cpu":
        return int(np.bitwise_count(words.numpy().view(np.uint32)).sum())
    return int(unpack_bits(words.reshape(1, -1)).sum())

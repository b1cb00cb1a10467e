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

WORD_BITS = 32


def words_per_row(num_columns: int) -> int:
    """Number of int32 words that hold one row of ``num_columns`` signs."""
    return -(-num_columns // WORD_BITS)

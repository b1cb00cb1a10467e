"""Triton helpers on the bits of numbers, the same in the interpreter and on a GPU.

The interpreter computes bf16 on its raw 16 bits and truncates when it rounds to bf16, silently. So kernels take bf16 as
int16 and go through these: every float operation in them is on fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def float_of_bits(bits):
    """fp32 whose upper half are these 16 bits (a bf16's), or whose bits these 32 are."""
    if bits.dtype == tl.int16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # Triton compiles the branch that is taken, and no other
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of_float(values, SIXTEEN: tl.constexpr):
    """int16 of the nearest bf16 (ties to even, a NaN stays one), or the int32 bits themselves, of fp32 ``values``."""
    bits = values.to(tl.int32, bitcast=True)
    if SIXTEEN and INTERPRETED:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)
    elif SIXTEEN:
        return values.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        return bits


@triton.jit
def product(signs, inputs, sums):
    """``sums`` + ``signs`` @ ``inputs``: a bf16 matrix given as int16 (from registers) by one of bf16."""
    if INTERPRETED:
        return tl.dot(float_of_bits(signs), inputs.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(signs.to(tl.bfloat16, bitcast=True), inputs, sums)


@triton.jit
def ones_with_signs(pairs):
    """Two bf16 +-1 in each int32, whose signs are its bits 15 and 31."""
    if INTERPRETED:
        return (pairs & -2147450880) | 0x3F803F80
    else:  # the same in one instruction; of the line above the assembler makes two, a constant loaded for each
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, 0x3F803F80, 0xEA;", "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def signed(values, words, shift):
    """B * ``values`` (fp32), B the signs at bit ``shift`` of ``words`` (int32); shapes broadcast."""
    flipped = values.to(tl.int32, bitcast=True) ^ ((words << (31 - shift)) & -2147483648)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def block_of(row_words, BLOCK_WORDS: tl.constexpr):
    """(number of the block of rows, of the block of words, blocks of words in a row) of this program."""
    across = tl.cdiv(row_words, BLOCK_WORDS)
    program = tl.program_id(0)
    return program // across, program % across, across


@triton.jit
def words_at(row, word, num_rows, row_words):
    """Of rows (R,) and words (W,) of a plane: (columns (W, 32), which rows exist, offsets of the words (R, W), which
    words exist)."""
    column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    in_rows = row < num_rows
    in_words = in_rows[:, None] & (word < row_words)[None, :]
    return column, in_rows, row[:, None] * row_words + word[None, :], in_words


@triton.jit
def block_of_plane(num_rows, row_words, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """This program's block of a plane: (rows (R,), columns (W, 32), which rows exist, offsets of the words (R, W),
    which words exist)."""
    row_block, word_block, _ = block_of(row_words, BLOCK_WORDS)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = word_block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    column, in_rows, word_at, in_words = words_at(row, word, num_rows, row_words)
    return row, column, in_rows, word_at, in_words


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as int16 (bf16) or int32 (fp32). Raises KeyError for another dtype."""
    return tensor.view({torch.bfloat16: torch.int16, torch.float32: torch.int32}[tensor.dtype])

"""A signal as codes of 8, 4 or 1 bits a weight, beside one size a row: what crosses a link, and what it says.

    8 and 4 bits    size_i = max_j |v_ij| / (2^(bits - 1) - 1),  code_ij = rint(v_ij / size_i): half a size off at most
    1 bit, drawn    size_i = max_j |v_ij|,                       code_ij = +1 with probability (1 + v_ij / size_i) / 2
    decoded         code_ij * size_i * column_j                  with factors of columns that both sides know

A plain sign is 1 bit that ``pack_signs`` writes, or the backward pass itself. Codes stand in int32 words, the first
lowest; one of 1 bit is a bit of a plane, so 1 means -1. Rounding and comparisons are of fp32 without fused
multiply-add: the accelerator, the torch version and the kernels give the same words.

Worked example, 4 bits: the row (7, -3.4, 0, 1 ...) has the size 1 and the codes (7, -3, 0, 1), its first word is
0x...10D7. With 1 bit its size is 7, and -3.4 is drawn as +7 about once in four times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mbdist_kernels import native
from mbdist_kernels.bits import block_of
from mbdist_kernels.launch import grid, settings
from mbdist_kernels.layout import WORD_BITS
from mbdist_kernels.pack import pack_signs
from mbdist_kernels.random import RANDOM_BITS, random_bits, random_bits_of_pairs
from mbdist_kernels.registration import operation
from mbdist_kernels.unpack import unpack_signs_reference

_HALF = float(1 << (RANDOM_BITS - 1))  # of the draws


def encode_rows(
    values: torch.Tensor,  # (m, 32 W) fp32
    bits: int,  # 8 or 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(words (m, W bits) int32, sizes (m,) fp32). A row that is not finite has such a size, others do not."""
    return _encode_rows(values, bits)


def draw_signs(
    values: torch.Tensor,  # (m, 32 W) fp32
    key: int,  # of ``fold_key``
) -> tuple[torch.Tensor, torch.Tensor]:
    """(words (m, W) int32, sizes (m,) fp32) whose mean over keys is ``values``, to a resolution of 2^-15."""
    return _draw_signs(values, key)


def decode_rows(
    words: torch.Tensor,  # (m, W bits) int32
    sizes: torch.Tensor,  # (m,) fp32
    columns: torch.Tensor,  # (32 W,) fp32; 0 where there are no columns
    out: torch.Tensor | None = None,  # (m, 32 W) fp32, contiguous
) -> torch.Tensor:
    """code_ij * size_i * column_j in ``out``, or a new tensor. The width of the codes follows from the shapes. Raises
    ValueError where ``out`` is not contiguous."""
    torch._check_value(out is None or out.is_contiguous(), lambda: "decode_rows writes to contiguous memory")
    if out is None:
        out = torch.empty(len(words), len(columns), device=words.device)
    _decode_rows(words, sizes, columns, out)
    return out


def _sizes_and_inverse(values: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(max_j |v_ij| / most, not a number where one is; 1 / that, or 0 where it is no positive number), (m,) each. A
    product with 1 / most: devices differ in division by a constant."""
    sizes = torch.linalg.vector_norm(values, ord=torch.inf, dim=1) * (1.0 / most)
    return sizes, torch.where(sizes > 0, 1.0 / sizes, 0.0)


def _most(bits: int) -> float:
    """The largest code."""
    return float(2 ** (bits - 1) - 1)


def _width(words: torch.Tensor, columns: torch.Tensor) -> int:
    """Bits of a code."""
    return words.shape[1] * WORD_BITS // len(columns) if len(columns) else 1


def _words_and_sizes(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for them."""
    shape = (values.shape[0], values.shape[1] * bits // WORD_BITS)
    return values.new_empty(shape, dtype=torch.int32), values.new_empty(values.shape[0])


# Codes of values.


def encode_reference(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch."""
    most = _most(bits)
    sizes, inverse = _sizes_and_inverse(values, most)
    codes = (values * inverse[:, None]).nan_to_num_(0.0).clamp_(-most, most).round_().to(torch.int8)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32), sizes


def encode_cpu(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By the accelerator where there is one: a row is in the cache when it is read again."""
    if native.serves(values):
        return native.encode_rows(values.contiguous(), bits, 1.0 / _most(bits))
    return encode_reference(values, bits)


def encode_triton(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On a GPU."""
    sizes, inverse = _sizes_and_inverse(values, _most(bits))
    m, width = len(values), values.shape[1] * bits // WORD_BITS
    words = torch.empty(m, width, dtype=torch.int32, device=values.device)
    chosen = settings("row_codes")
    if words.numel():
        _encode_kernel[grid(m, width, chosen)](
            values.contiguous(), inverse, words, m, width, BITS=bits, enable_fp_fusion=False, **chosen
        )
    return words, sizes


@triton.jit
def _block_of_codes(num_rows, row_words, BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """This program's block: (rows (R,), offsets of the words (R, W), which exist, columns (W, C) of C codes a word)."""
    row_block, word_block, _ = block_of(row_words, BLOCK_WORDS)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = word_block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = (row < num_rows)[:, None] & (word < row_words)[None, :]
    column = word[:, None] * (32 // BITS) + tl.arange(0, 32 // BITS)[None, :]
    return row, row[:, None] * row_words + word[None, :], inside, column


@triton.jit
def _encode_kernel(
    values,  # (m, 32 W)
    inverse,  # (m,)
    words,  # (m, W bits)
    num_rows,
    row_words,  # W bits
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    CODES: tl.constexpr = 32 // BITS
    MOST: tl.constexpr = (1 << (BITS - 1)) - 1
    row, word_at, inside, column = _block_of_codes(num_rows, row_words, BITS, BLOCK_ROWS, BLOCK_WORDS)
    at = row[:, None, None] * (row_words * CODES) + column[None]
    value = tl.load(values + at, mask=inside[:, :, None], other=0.0)
    scaled = value * tl.load(inverse + row, mask=row < num_rows, other=0.0)[:, None, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
    code = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)  # to nearest even, by 1.5 * 2^23
    in_place = (code & ((1 << BITS) - 1)) << (tl.arange(0, CODES) * BITS)[None, None, :]
    tl.store(words + word_at, tl.sum(in_place, 2), mask=inside)  # disjoint bits: the sum is an or


_encode_rows = operation(
    "encode_rows(Tensor values, int bits) -> (Tensor, Tensor)",
    cpu=encode_cpu,
    cuda=encode_triton,
    fake=lambda values, bits: _words_and_sizes(values, bits),
)


# Signs by chance.


def draw_reference(values: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch: -1 where the element's draw of 2^15 lies above the share of +1."""
    sizes, inverse = _sizes_and_inverse(values, 1.0)
    share = values * inverse[:, None] * _HALF + (_HALF - 0.5)
    draws = random_bits(key, torch.arange(values.numel(), device=values.device)).view_as(values)
    return pack_signs(share - draws), sizes


def draw_cpu(values: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By the accelerator where there is one."""
    return native.draw_signs(values.contiguous(), key) if native.serves(values) else draw_reference(values, key)


def draw_triton(values: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On a GPU."""
    sizes, inverse = _sizes_and_inverse(values, 1.0)
    m, width = len(values), values.shape[1] // WORD_BITS
    words = torch.empty(m, width, dtype=torch.int32, device=values.device)
    chosen = settings("row_codes")
    if words.numel():
        signed_key = key - (1 << 32) * (key >> 31)  # one type of argument for all keys
        _draw_kernel[grid(m, width, chosen)](
            values.contiguous(), inverse, words, signed_key, m, width, enable_fp_fusion=False, **chosen
        )
    return words, sizes


@triton.jit(do_not_specialize=["key"])
def _draw_kernel(
    values,  # (m, 32 W)
    inverse,  # (m,)
    words,  # (m, W)
    key,
    num_rows,
    row_words,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row, word_at, inside, column = _block_of_codes(num_rows, row_words, 1, BLOCK_ROWS, BLOCK_WORDS)
    value = tl.load(values + row[:, None, None] * (row_words * 32) + column[None], mask=inside[:, :, None], other=0.0)
    share = value * tl.load(inverse + row, mask=row < num_rows, other=0.0)[:, None, None] * 16384.0 + 16383.5
    pair = word_at[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    draw = random_bits_of_pairs(key.to(tl.uint32), pair).reshape(BLOCK_ROWS, BLOCK_WORDS, 32)
    negative = (share < draw.to(tl.float32)).to(tl.int32)
    tl.store(words + word_at, tl.sum(negative << tl.arange(0, 32)[None, None, :], 2), mask=inside)


_draw_signs = operation(
    "draw_signs(Tensor values, int key) -> (Tensor, Tensor)",
    cpu=draw_cpu,
    cuda=draw_triton,
    fake=lambda values, key: _words_and_sizes(values, 1),
)


# Values of codes.


def decode_reference(words: torch.Tensor, sizes: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """In plain torch."""
    match _width(words, columns):
        case 1:
            codes = unpack_signs_reference(words, len(columns), sizes.dtype)
        case 4:
            pairs = words.contiguous().view(torch.int8)
            codes = torch.stack([(pairs << 4) >> 4, pairs >> 4], dim=2).flatten(1)
        case _:
            codes = words.contiguous().view(torch.int8)
    torch.mul(codes, sizes[:, None], out=out).mul_(columns)


def decode_cpu(words: torch.Tensor, sizes: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """By the accelerator where there is one."""
    if native.serves(sizes, columns, out):
        native.decode_rows(words.contiguous(), sizes, columns, _width(words, columns), out)
    else:
        decode_reference(words, sizes, columns, out)


def decode_triton(words: torch.Tensor, sizes: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """On a GPU."""
    m, width = words.shape
    chosen = settings("row_codes")
    if out.numel():
        _decode_kernel[grid(m, width, chosen)](
            words.contiguous(),
            sizes.contiguous(),
            columns.contiguous(),
            out,
            m,
            width,
            BITS=_width(words, columns),
            enable_fp_fusion=False,
            **chosen,
        )


@triton.jit
def _decode_kernel(
    words,  # (m, W bits)
    sizes,  # (m,)
    columns,  # (32 W,)
    values,  # (m, 32 W)
    num_rows,
    row_words,  # W bits
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    CODES: tl.constexpr = 32 // BITS
    row, word_at, inside, column = _block_of_codes(num_rows, row_words, BITS, BLOCK_ROWS, BLOCK_WORDS)
    packed = tl.load(words + word_at, mask=inside, other=0)
    highest = packed[:, :, None] << (32 - BITS - tl.arange(0, CODES) * BITS)[None, None, :]
    code = highest >> (32 - BITS)  # with its sign
    if BITS == 1:
        code = 2 * code + 1
    size = tl.load(sizes + row, mask=row < num_rows, other=0.0)
    of_column = tl.load(columns + column, mask=column < row_words * CODES, other=0.0)
    value = code.to(tl.float32) * size[:, None, None] * of_column[None]
    tl.store(values + row[:, None, None] * (row_words * CODES) + column[None], value, mask=inside[:, :, None])


_decode_rows = operation(
    "decode_rows(Tensor words, Tensor sizes, Tensor columns, Tensor(a!) out) -> ()",
    cpu=decode_cpu,
    cuda=decode_triton,
    fake=lambda words, sizes, columns, out: None,
)

"""Operations on packed Boolean planes. Knows tensors, not models; needs torch alone."""

from mbdist_kernels.dequantize import dequantize, reused_scratch
from mbdist_kernels.flip_update import (
    FIXED_ONE,
    LEVELS,
    LOTTERY_TICKETS,
    THRESHOLD,
    accumulate_signal,
    count_candidates,
    draw_tickets,
    find_candidates,
    select_flips,
)
from mbdist_kernels.layout import WORD_BITS, pack_signs, popcount, unpack_bits, unpack_signs, words_per_row
from mbdist_kernels.linear_backward import column_square_sums, scale_gradients_and_signal
from mbdist_kernels.random import fold_key, random_bits

__all__ = [
    "FIXED_ONE",
    "LEVELS",
    "LOTTERY_TICKETS",
    "THRESHOLD",
    "WORD_BITS",
    "accumulate_signal",
    "column_square_sums",
    "count_candidates",
    "dequantize",
    "draw_tickets",
    "find_candidates",
    "fold_key",
    "pack_signs",
    "popcount",
    "random_bits",
    "reused_scratch",
    "scale_gradients_and_signal",
    "select_flips",
    "unpack_bits",
    "unpack_signs",
    "words_per_row",
]

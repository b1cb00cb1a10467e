"""Operations on packed Boolean planes. Knows tensors, not models; needs torch alone."""

from mbdist_kernels.dequantize import dequantize, reused_scratch
from mbdist_kernels.error_feedback import feed_errors_forward
from mbdist_kernels.flip_update import (
    ACCUMULATOR_FORMATS,
    FIXED_ONE,
    LOTTERY_TICKETS,
    THRESHOLD,
    TOP_RANK,
    AccumulatorFormat,
    accumulate_signal,
    draw_tickets,
    find_candidates,
    flip_mask,
)
from mbdist_kernels.layout import WORD_BITS, pack_signs, popcount, unpack_bits, unpack_signs, words_per_row
from mbdist_kernels.linear_backward import column_square_sums, scale_gradients_and_signals
from mbdist_kernels.nearest_levels import nearest_levels, signs_of_codes
from mbdist_kernels.random import fold_key, random_bits

__all__ = [
    "ACCUMULATOR_FORMATS",
    "FIXED_ONE",
    "LOTTERY_TICKETS",
    "THRESHOLD",
    "TOP_RANK",
    "WORD_BITS",
    "AccumulatorFormat",
    "accumulate_signal",
    "column_square_sums",
    "dequantize",
    "draw_tickets",
    "feed_errors_forward",
    "find_candidates",
    "flip_mask",
    "fold_key",
    "nearest_levels",
    "pack_signs",
    "popcount",
    "random_bits",
    "reused_scratch",
    "scale_gradients_and_signals",
    "signs_of_codes",
    "unpack_bits",
    "unpack_signs",
    "words_per_row",
]

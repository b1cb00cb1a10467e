"""Operations on packed Boolean planes. Knows tensors, not models; needs torch and triton alone.

An operation a file, or one and its inverse: the kernel, the version for the CPU, and the plain torch version that both
are held to. (What conversion alone uses, ``nearest_levels`` and ``error_feedback``, has no kernel.)

No phase of training needs ``vote`` and ``signal_accumulate``: they are for methods whose ranks agree on a majority, or
add up whole signals instead of segments.
"""

from mbdist_kernels.accumulator import (
    ACCUMULATOR_FORMATS,
    AccumulatorFormat,
    accumulated_at,
    accumulated_values,
    set_accumulated,
)
from mbdist_kernels.column_square_sums import column_square_sums
from mbdist_kernels.dequantize import dequantize
from mbdist_kernels.error_feedback import feed_errors_forward
from mbdist_kernels.flip_codec import flip_apply_sparse, flip_counts, flip_encode_sparse
from mbdist_kernels.flip_mask import flip_mask
from mbdist_kernels.flip_update import (
    FIXED_ONE,
    LOTTERY_TICKETS,
    THRESHOLD,
    TOP_RANK,
    accumulate_signal,
    draw_tickets,
    find_candidates,
)
from mbdist_kernels.layout import WORD_BITS, words_per_row
from mbdist_kernels.linear_backward import (
    Signal,
    linear_backward_input,
    linear_backward_weight,
    scale_gradients_and_signals,
)
from mbdist_kernels.linear_decode import linear_decode, linear_decode_together
from mbdist_kernels.linear_forward import decodes, linear_forward
from mbdist_kernels.nearest_levels import nearest_levels, signs_of_codes
from mbdist_kernels.pack import pack_signs
from mbdist_kernels.popcount import popcount, popcount_by_block
from mbdist_kernels.random import fold_key, random_bits
from mbdist_kernels.row_codes import decode_rows, draw_signs, encode_rows
from mbdist_kernels.scratch import reused_scratch
from mbdist_kernels.signal_codec import signal_accumulate, signal_encode
from mbdist_kernels.unpack import bits_at, unpack_bits, unpack_signs
from mbdist_kernels.vote import vote
from mbdist_kernels.xor_apply import xor_apply

__all__ = [
    "ACCUMULATOR_FORMATS",
    "FIXED_ONE",
    "LOTTERY_TICKETS",
    "THRESHOLD",
    "TOP_RANK",
    "WORD_BITS",
    "AccumulatorFormat",
    "Signal",
    "accumulate_signal",
    "accumulated_at",
    "accumulated_values",
    "bits_at",
    "column_square_sums",
    "decode_rows",
    "decodes",
    "dequantize",
    "draw_signs",
    "draw_tickets",
    "encode_rows",
    "feed_errors_forward",
    "find_candidates",
    "flip_apply_sparse",
    "flip_counts",
    "flip_encode_sparse",
    "flip_mask",
    "fold_key",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_decode",
    "linear_decode_together",
    "linear_forward",
    "nearest_levels",
    "pack_signs",
    "popcount",
    "popcount_by_block",
    "random_bits",
    "reused_scratch",
    "scale_gradients_and_signals",
    "set_accumulated",
    "signal_accumulate",
    "signal_encode",
    "signs_of_codes",
    "unpack_bits",
    "unpack_signs",
    "vote",
    "words_per_row",
    "xor_apply",
]

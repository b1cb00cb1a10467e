"""How a matrix's Boolean signal is written for the wire, one message a rank, and read again by the owners.

A message is int32 words: the codes of the rank's segment of the signal, and the scales of the rows that the segment
touches. Scales belong to whole rows, whoever owns them: what an owner reads does not depend on the sharding.

    codec    bits a weight   code                                            scale of a row
    fp32     32              the signal itself, the reference                none
    bf16     16              rounded to nearest                              none
    int8, 4  8, 4            whole multiples of the scale                    its largest absolute value / 127, / 7
    sign     1               the sign                                        its mean absolute value
    sign_unbiased  1         +-1 by chance, so that the mean is the signal   its largest absolute value

What is sent is G * outer(row factor, what ``SplitColumns`` leaves of the column factor); the owner multiplies the rest
in, which both know, so magnitudes of rank 1 cost no more bytes than magnitudes of rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from mbdist.comm.partition import WordPartition
from mbdist_kernels import (
    WORD_BITS,
    Signal,
    decode_rows,
    draw_signs,
    encode_rows,
    reused_scratch,
    signal_encode,
    words_per_row,
)


@dataclass(frozen=True)
class Segments:
    """A matrix of m x n weights cut flat, by words of its packed rows, into one segment a rank."""

    rows: int  # m
    columns: int  # n
    partition: WordPartition

    @property
    def row_words(self) -> int:
        """W: words of a packed row."""
        return words_per_row(self.columns)

    @property
    def rows_touched(self) -> int:
        """Rows that a segment touches at most, cut ones counted whole."""
        return (self.partition.words_per_rank + self.row_words - 2) // self.row_words + 1

    def first_row(self, rank: int) -> int:
        return self.partition.first_word(rank) // self.row_words

    def scales_by_owner(
        self,
        scales: torch.Tensor,  # (m,) fp32
    ) -> torch.Tensor:
        """What every rank needs of one value a row: (R, rows touched), 0 past the last row."""
        padded = torch.cat([scales, scales.new_zeros(1)])
        return padded[self._rows_of_owners.to(scales.device)]

    @functools.cached_property
    def _rows_of_owners(self) -> torch.Tensor:
        """(R, rows touched): m past the last row."""
        firsts = torch.tensor([self.first_row(rank) for rank in range(self.partition.world_size)])
        return (firsts[:, None] + torch.arange(self.rows_touched)).clamp(max=self.rows)

    def in_whole_rows(
        self,
        codes: torch.Tensor,  # (P c,) the rank's segment, c codes words a word of the plane
        rank: int,
    ) -> torch.Tensor:
        """(rows touched, W c): the segment where it stands in its rows, 0 around it."""
        width = self.row_words * codes.numel() // self.partition.words_per_rank
        before = self._offset(rank) * codes.numel() // self.partition.words_per_rank
        after = self.rows_touched * width - before - codes.numel()
        return torch.nn.functional.pad(codes, (before, after)).view(self.rows_touched, width)

    def out_of_whole_rows(
        self,
        values: torch.Tensor,  # (rows touched, W c)
        rank: int,
    ) -> torch.Tensor:
        """The rank's segment again: (P c,), a view."""
        share = values.shape[1] // self.row_words
        first = self._offset(rank) * share
        return values.view(-1)[first : first + self.partition.words_per_rank * share]

    def columns_present(self, rank: int) -> torch.Tensor:
        """How many of a touched row's weights are in the rank's segment: (rows touched,)."""
        first = self._offset(rank) * WORD_BITS
        row_starts = torch.arange(self.rows_touched) * self.row_words * WORD_BITS
        ends = (row_starts + self.columns).clamp(max=first + self.partition.elements_per_rank)
        return (ends - row_starts.clamp(min=first)).clamp(min=0)

    def _offset(self, rank: int) -> int:
        return self.partition.first_word(rank) % self.row_words


class SignalCodec(Protocol):
    """One message a rank, and back."""

    splits_columns: bool  # whether coarse codes profit from columns of like magnitude
    deviation: float  # standard deviation of what is decoded, of a normal signal with standard deviation 1

    def message_words(self, segments: Segments) -> int:
        """Words of one rank's message."""

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        """Memory for the signal in the form that ``encode`` takes; its device is that of the factors."""

    def encode(self, signal: Signal, segments: Segments, key: int) -> torch.Tensor:
        """(R, message words) int32, row r for rank r. ``key``: of random bits, another for every signal."""

    def encode_segment(self, values: torch.Tensor, segments: Segments, rank: int, key: int) -> torch.Tensor:
        """The message to one owner from its segment alone, fp32 (32 P,): scales are of what it has of a row."""

    def decode(
        self,
        message: torch.Tensor,  # (message words,) int32
        segments: Segments,
        rank: int,  # of the owner
        columns: torch.Tensor,  # (32 W,) fp32: multiplied in; 0 for padding
    ) -> torch.Tensor:
        """The rank's segment of the signal: fp32 (32 P,), valid until the next call in this thread."""


def _dense(segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
    """A signal as values."""
    values = torch.empty(segments.rows, segments.row_words * WORD_BITS, device=row_factor.device)
    return Signal(row_factor, column_factor, values=values)


def _values(signal: Signal) -> torch.Tensor:
    if signal.values is None:
        raise ValueError("this codec writes signals that come as values")
    return signal.values


def _segments_of(rows: torch.Tensor, segments: Segments) -> torch.Tensor:
    """(m, W c) -> (R, P c), the last segments padded with 0."""
    share = rows.shape[1] // segments.row_words * segments.partition.words_per_rank
    missing = share * segments.partition.world_size - rows.numel()
    flat = torch.nn.functional.pad(rows.reshape(-1), (0, missing)) if missing else rows.reshape(-1)
    return flat.view(-1, share)


@dataclass(frozen=True)
class CastCodec:
    """The signal in a float type."""

    dtype: torch.dtype
    splits_columns = False
    deviation = 1.0

    def message_words(self, segments: Segments) -> int:
        return segments.partition.elements_per_rank * self.dtype.itemsize // 4

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        return _dense(segments, row_factor, column_factor)

    def encode(self, signal: Signal, segments: Segments, key: int) -> torch.Tensor:
        return _segments_of(_values(signal).to(self.dtype), segments).view(torch.int32)

    def encode_segment(self, values: torch.Tensor, segments: Segments, rank: int, key: int) -> torch.Tensor:
        return values.to(self.dtype).view(torch.int32)

    def decode(self, message: torch.Tensor, segments: Segments, rank: int, columns: torch.Tensor) -> torch.Tensor:
        return message.view(self.dtype).float()


class _RowCodec:
    """Codes beside one scale a row."""

    splits_columns = True
    deviation = 1.0
    bits: int  # a weight

    def message_words(self, segments: Segments) -> int:
        return segments.partition.words_per_rank * self.bits + segments.rows_touched

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        return _dense(segments, row_factor, column_factor)

    def _codes(
        self,
        values: torch.Tensor,  # (rows, 32 W)
        key: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (rows, W bits) int32, scales (rows,))."""
        raise NotImplementedError

    def encode(self, signal: Signal, segments: Segments, key: int) -> torch.Tensor:
        return self._message(*self._codes(_values(signal), key), segments)

    def encode_segment(self, values: torch.Tensor, segments: Segments, rank: int, key: int) -> torch.Tensor:
        codes, scales = self._codes(segments.in_whole_rows(values, rank), key)
        return self._segment_message(codes, scales, segments, rank)

    def _message(self, codes: torch.Tensor, scales: torch.Tensor, segments: Segments) -> torch.Tensor:
        of_rows = segments.scales_by_owner(scales).view(torch.int32)
        return torch.cat([_segments_of(codes, segments), of_rows], dim=1)

    def _segment_message(
        self, codes: torch.Tensor, scales: torch.Tensor, segments: Segments, rank: int
    ) -> torch.Tensor:
        return torch.cat([segments.out_of_whole_rows(codes, rank), scales.view(torch.int32)])

    def decode(self, message: torch.Tensor, segments: Segments, rank: int, columns: torch.Tensor) -> torch.Tensor:
        codes, scales = message.split([message.numel() - segments.rows_touched, segments.rows_touched])
        shape = (segments.rows_touched, len(columns))
        out = reused_scratch(math.prod(shape), torch.float32, message.device).view(shape)
        values = decode_rows(segments.in_whole_rows(codes, rank), scales.view(torch.float32), columns, out)
        return segments.out_of_whole_rows(values, rank)


@dataclass(frozen=True)
class IntegerCodec(_RowCodec):
    """8 or 4 bits a weight."""

    bits: int

    def _codes(self, values: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_rows(values, self.bits)


class SignCodec(_RowCodec):
    """The backward pass writes the words itself: no value of the signal is ever in memory."""

    bits = 1
    deviation = math.sqrt(2 / math.pi)  # all values at their mean magnitude

    def wanted(self, segments: Segments, row_factor: torch.Tensor, column_factor: torch.Tensor) -> Signal:
        words = torch.empty(segments.rows, segments.row_words, dtype=torch.int32, device=row_factor.device)
        return Signal(row_factor, column_factor, words=words, magnitudes=torch.empty_like(row_factor))

    def encode(self, signal: Signal, segments: Segments, key: int) -> torch.Tensor:
        if signal.words is None or signal.magnitudes is None:
            raise ValueError("this codec writes signals that come as words")
        return self._message(signal.words, signal.magnitudes, segments)

    def encode_segment(self, values: torch.Tensor, segments: Segments, rank: int, key: int) -> torch.Tensor:
        present = segments.columns_present(rank).clamp(min=1).to(values.device)
        words, magnitudes = signal_encode(segments.in_whole_rows(values, rank), present)
        return self._segment_message(words, magnitudes, segments, rank)


class UnbiasedSignCodec(_RowCodec):
    """Right in the mean, and noisier."""

    bits = 1

    def _codes(self, values: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_signs(values, key)


CODECS: dict[str, SignalCodec] = {
    "fp32": CastCodec(torch.float32),
    "bf16": CastCodec(torch.bfloat16),
    "int8": IntegerCodec(8),
    "int4": IntegerCodec(4),
    "sign": SignCodec(),
    "sign_unbiased": UnbiasedSignCodec(),
}


@dataclass(frozen=True)
class SplitColumns:
    """A column factor as (what the sender multiplies in) * (what the owner multiplies in)."""

    sent: torch.Tensor  # (n,)
    owners: torch.Tensor  # (32 W,), 0 for padding

    @classmethod
    def of(
        cls,
        factor: torch.Tensor,  # (n,)
        sizes: torch.Tensor | None,  # (n,) > 0: relative magnitudes of G's columns; None to send all of the factor
    ) -> SplitColumns:
        """With ``sizes`` columns are sent at like magnitudes and the owner gives them theirs back."""
        sent = factor if sizes is None else torch.where(factor < 0, -1.0, 1.0) / sizes
        owners = torch.ones_like(factor) if sizes is None else factor.abs() * sizes
        padding = words_per_row(len(factor)) * WORD_BITS - len(factor)
        return cls(sent, torch.nn.functional.pad(owners, (0, padding)))

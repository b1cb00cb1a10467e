"""Who owns which words of a plane: flat, contiguous, equal parts, the last ones padded. DeepSpeed's ZeRO-3 cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbdist_kernels import WORD_BITS


@dataclass(frozen=True)
class WordPartition:
    """``num_words`` words cut into ``world_size`` parts of ``words_per_rank``; rank r owns [r P, (r + 1) P)."""

    num_words: int
    world_size: int

    @property
    def words_per_rank(self) -> int:
        return -(-self.num_words // self.world_size)

    @property
    def elements_per_rank(self) -> int:
        return self.words_per_rank * WORD_BITS

    def first_word(self, rank: int) -> int:
        return rank * self.words_per_rank

    def words_owned(self, rank: int) -> int:
        """Words of the rank's part that really exist."""
        return max(0, min(self.words_per_rank, self.num_words - self.first_word(rank)))

    def owned(
        self,
        words: torch.Tensor,  # any shape of num_words elements, contiguous
        rank: int,
    ) -> torch.Tensor:
        """The rank's words, (P,); a view where the part is whole, else a copy padded with 0."""
        part = words.reshape(-1)[self.first_word(rank) : self.first_word(rank) + self.words_owned(rank)]
        if part.numel() == self.words_per_rank:
            return part
        return torch.nn.functional.pad(part, (0, self.words_per_rank - part.numel()))

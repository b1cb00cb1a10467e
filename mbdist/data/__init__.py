"""Text and chats to token windows in a deterministic global order."""

from mbdist.data.batches import Batch, Batches
from mbdist.data.windows import Corpus, digest_of_windows, load_corpus

__all__ = ["Batch", "Batches", "Corpus", "digest_of_windows", "load_corpus"]

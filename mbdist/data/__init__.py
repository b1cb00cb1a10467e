"""Text and chats to token windows in a deterministic global order."""

from mbdist.data.batches import Batches
from mbdist.data.windows import Corpus, load_corpus

__all__ = ["Batches", "Corpus", "load_corpus"]

"""Memory that nobody refers to any more goes back to the system.

glibc keeps what was freed, and after a few tensors of 10 MB it no longer maps such tensors by themselves but keeps them
on its heap, which fragments: a process that frees one block of a model after the other would grow all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def give_back() -> None:
    """To be called between pieces of work, not inside of them: it takes milliseconds."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def giving_back_at_once() -> Iterator[None]:
    """While memory that stays is made among memory that does not: within, all but small blocks are pages of their own;
    afterwards those above 32 MiB are, where glibc's own rule ends too."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # of glibc alone
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)

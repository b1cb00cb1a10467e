"""Memory that nobody refers to any more goes back to the system.

glibc keeps what was freed, and after a few tensors of 10 MB it no longer maps such tensors by themselves but keeps them
on its heap, which fragments: a process that frees one block of a model after the other would grow all the same.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """To be called between pieces of work, not inside of them: it takes milliseconds."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)

"""Asks the C library to keep the memory that is freed, for loops that free and take large blocks all the time."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees.

    glibc gives a block of megabytes back to the kernel when it is freed, and pays a page fault for every 4 KiB when the
    next one is taken: a third of the processor's time where logits come and go. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    library.mallopt(_M_MMAP_MAX, 0)

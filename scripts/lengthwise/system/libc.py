"""Functions of the C library that Python does not have, as far as this system's has them."""

import ctypes
from typing import Any


def libc_function(name: str) -> Any:
    """A function of the C library; None where it lacks it (macOS, musl) or Python cannot reach it (Windows).

    After a call `ctypes.get_errno` has its errno.
    """
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):  # Windows has no library of the whole process
        return None

"""XXH3-128, with which `convert` says in conversion_report.json what it wrote.

From the library that the program itself is linked with, so that no Python package is needed.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache
from typing import cast


class _Hash128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


@cache
def _function() -> Callable[[bytes, int], _Hash128]:
    library = ctypes.CDLL(ctypes.util.find_library("xxhash") or "libxxhash.so.0")
    function = library.XXH3_128bits
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    function.restype = _Hash128
    return cast(Callable[[bytes, int], _Hash128], function)


def checksum(data: bytes) -> str:
    """As the program writes it: 32 hexadecimal digits."""
    found = _function()(data, len(data))
    return f"{found.high:016x}{found.low:016x}"

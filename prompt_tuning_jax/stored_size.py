"""How much of a file or folder is really stored, against what it claims to hold."""

import os
from pathlib import Path

from prompt_tuning_jax.errors import UserError

# What trained numbers never are compressed by, and what may be claimed by anything.
_MOST_RATIO = 100
_ALWAYS = 2**28  # bytes
# Those of zarr's formats, which TensorStore reads whole.
_HEADERS = (".zarray", ".zattrs", ".zgroup", "zarr.json")
_LONGEST_HEADER = 2**24


def stored_bytes(path: Path) -> int:
    """Bytes on the disk of a file, or of all files below a folder; holes of a file count nothing.

    Links are followed, for a cache may keep its files elsewhere.
    """
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            continue
        if file.is_file():
            total += min(found.st_size, getattr(found, "st_blocks", found.st_size) * 512)
    return total


def require_stored(claimed: int, stored: int, *, of: str) -> None:
    """UserError where far more bytes are claimed than the compression of arrays can explain."""
    if claimed > max(_ALWAYS, _MOST_RATIO * stored):
        raise UserError(
            f"{of} claims {claimed} bytes, and {stored} are stored: the copy is incomplete or "
            "damaged"
        )


def require_whole(path: Path) -> None:
    """UserError for a file that is nearly all holes, as a copy that has not arrived is.

    Of a folder for any of its files, and for a header that is far too long for one.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            size = file.stat().st_size
        except OSError:
            continue  # whoever opens it says what is wrong
        if size > _ALWAYS:
            require_stored(size, stored_bytes(file), of=str(file))
        if size > _LONGEST_HEADER and file.name in _HEADERS:
            raise UserError(f"{file} has {size} bytes, and a header has at most {_LONGEST_HEADER}")

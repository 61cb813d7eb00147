"""Where prunelab keeps files, and how it writes them so that nothing is ever left half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private; caches and results are meant to be shared
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a full disk names no file
        raise


@contextmanager
def writing_cache() -> Iterator[None]:
    """Say in the error of a cache that cannot be written how to choose another folder for it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the file system's
            raise
        mend = "the cache cannot be written: name another folder in PRUNELAB_CACHE"
        raise OSError(error.errno, f"{error.strerror}; {mend}", error.filename) from error


def cache_folder() -> Path:
    """Return the folder for decoded data and trained weights: `PRUNELAB_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("PRUNELAB_CACHE") or platformdirs.user_cache_path("prunelab"))

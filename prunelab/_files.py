"""Where prunelab keeps files, and how it writes them so that nothing is ever left half-written."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from safetensors import safe_open

if TYPE_CHECKING:  # the command line starts without PyTorch
    from torch import Tensor


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, then rename it into place.

    A link stays one: what it leads to is replaced.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a full disk names no file
        raise


def read_tensors(path: str | os.PathLike[str], key: str) -> tuple[Any, dict[str, Tensor]]:
    """Read a safetensors file: what its metadata hold as JSON under a key, and its tensors on the CPU.

    Raises:
        SafetensorError, KeyError, ValueError: the file is damaged, or another's.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[key])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


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

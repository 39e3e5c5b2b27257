"""Names of files, and writing them whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"
"""What the names of unfinished files begin with."""

_TAIL = 16
"""Of a name, kept in its unfinished file's: the suffix, but nothing that makes it too long."""
_UNFINISHED = re.compile(re.escape(PART) + "[0-9a-f]{32}-")

ITK_FORMATS = {".mha": "MetaImageIO", ".nrrd": "NrrdImageIO", ".png": "PNGImageIO"}
"""ITK's readers and writers by suffix; left to itself, ITK does not know some suffixes in capitals."""


def suffix_of(path: str | os.PathLike[str], known: Sequence[str], function: str) -> str:
    """The suffix of a file name in lower case, ``.nii.gz`` being one.

    Raises:
        ValueError: none of the known ones.
    """
    name = Path(path).name.lower()
    for suffix in sorted(known, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    raise ValueError(f"{function}: the file must end in one of {tuple(known)}, got {os.fspath(path)!r}.")


def stem_of(path: str | os.PathLike[str]) -> str:
    """The file name without its suffix, ``.nii.gz`` being one."""
    path = Path(path)
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let ``write`` make a file beside ``path`` and move it there when it is whole.

    Args:
        path: where the file goes; what is there is replaced.
        write: makes a file of the name it is given, which has the suffix of ``path``.

    Raises:
        OSError: what writing raised; nothing is left behind, and what was at ``path`` stays.
    """
    path = Path(path)
    part = path.with_name(f"{PART}{uuid.uuid4().hex}-{path.name[-_TAIL:]}".lower())
    try:
        write(str(part))
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # SimpleITK's word for a failed write
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[-1]}") from error
    finally:
        part.unlink(missing_ok=True)


def is_taken(path: Path) -> bool:
    """Whether there is a file at a path, or a folder that holds something other than what ``atomically`` writes at."""
    return path.exists() and (not path.is_dir() or not all(_UNFINISHED.match(one.name) for one in path.iterdir()))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go when the process ends, however it ends.

    Args:
        folder: to be locked.
        shared: let others in that share it, but none that wants it alone.

    Raises:
        FileExistsError: another run is at it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FileExistsError(f"another run is writing to {folder}. Wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        os.close(handle)

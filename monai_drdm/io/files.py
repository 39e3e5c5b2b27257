"""File names, and writing files completely or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"
"""Prefix of the names of unfinished files."""

_TAIL = 16
"""Number of last characters of a file name that the name of its unfinished file keeps; the suffix is among them."""
_UNFINISHED = re.compile(re.escape(PART) + "[0-9a-f]{32}-")

ITK_FORMATS = {".mha": "MetaImageIO", ".nrrd": "NrrdImageIO", ".png": "PNGImageIO"}
"""ITK's reader and writer for each suffix. ITK does not recognise some suffixes in capitals, so they are named."""


def suffix_of(path: str | os.PathLike[str], known: Sequence[str], function: str) -> str:
    """The suffix of a file name in lower case; ``.nii.gz`` counts as one suffix.

    Raises:
        ValueError: not one of the known suffixes, or a path that is not UTF-8.
    """
    check_utf8(path)
    name = Path(path).name.lower()
    for suffix in sorted(known, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    raise ValueError(f"{function}: the file must end in one of {tuple(known)}, got {os.fspath(path)!r}.")


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a path is UTF-8, unlike some old names. ITK takes no other, and would end the process."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` for a path that is not UTF-8."""
    if not is_utf8(path):
        raise ValueError(f"{os.fspath(path)!r}: ITK reads only paths in UTF-8. Rename the file or folder.")


def stem_of(path: str | os.PathLike[str]) -> str:
    """The file name without its suffix; ``.nii.gz`` counts as one suffix."""
    path = Path(path)
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def atomically(path: str | os.PathLike[str], write: Callable[[str], object], *, replace: bool = True) -> None:
    """Write a file under another name in the same folder, and rename it to ``path`` when it is complete.

    Args:
        path: the file to write.
        write: is called with a file name that has the suffix of ``path``, and writes that file.
        replace: an existing file is replaced; False: it stays as it is, also if another process writes it just now.

    Raises:
        OSError: the file cannot be written. No unfinished file is left, and an existing file at ``path`` stays.
    """
    path = Path(path)
    part = path.with_name(f"{PART}{uuid.uuid4().hex}-{path.name[-_TAIL:]}".lower())
    try:
        write(str(part))
        (os.replace if replace else _put_if_free)(part, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # raised by SimpleITK when writing fails
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[-1]}") from error
    finally:
        part.unlink(missing_ok=True)


def _put_if_free(part: Path, path: Path) -> None:
    """Give a file a name that no other file has; if one has it, do nothing."""
    try:
        os.link(part, path)  # fails where a file is, unlike a rename
    except FileExistsError:
        return
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(part, path)


def is_taken(path: Path) -> bool:
    """Whether a path is a file, or a folder that holds anything except unfinished files of ``atomically``."""
    return path.exists() and (not path.is_dir() or not all(_UNFINISHED.match(one.name) for one in path.iterdir()))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder. The operating system releases the lock when the process ends, also by a kill.

    Args:
        folder: the folder to lock.
        shared: admit other runs that lock the folder with ``shared=True``, but no run that locks it alone.

    Raises:
        FileExistsError: another run holds the lock.
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

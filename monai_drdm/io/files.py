"""File names, and writing files completely or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, ExitStack, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PART = ".part-"
"""Prefix of the names of unfinished files."""

_TAIL = 16
"""Number of last characters of a file name that the name of its unfinished file keeps; the suffix is among them."""
_LOCK, _LOCK_TIMEOUT_S = ".lock", 30
_NOT_CONTENT = re.compile(rf"{re.escape(PART)}[0-9a-f]{{32}}-|{re.escape(_LOCK)}(-whole|-part-[0-9a-f]{{32}})?$")
"""Names of unfinished files and of locks, which a killed run leaves behind."""

ITK_FORMATS = {
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
    ".nrrd": "NrrdImageIO",
    ".png": "PNGImageIO",
    **dict.fromkeys((".tif", ".tiff"), "TIFFImageIO"),
    **dict.fromkeys((".dcm", ".ima"), "GDCMImageIO"),
}
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
    """Whether a path is a file, or a folder that holds anything except unfinished files and locks."""
    return path.exists() and (not path.is_dir() or not all(_NOT_CONTENT.match(one.name) for one in path.iterdir()))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder.

    The lock is a file in the folder, which is removed at the end. What keeps others out is not that it is there, but
    that the operating system has locked it, which ends with the process, also by a kill.

    Args:
        folder: the folder to lock.
        shared: admit other runs that lock the folder with ``shared=True``, but no run that locks it alone.

    Raises:
        FileExistsError: another run holds the lock.
    """
    name = f"{_LOCK}-part-{uuid.uuid4().hex}" if shared else f"{_LOCK}-whole"
    with ExitStack() as held:
        with _lock(folder / _LOCK, _LOCK_TIMEOUT_S):  # which every run holds only while it looks at the others
            others = {folder / f"{_LOCK}-whole"} if shared else set(folder.glob(f"{_LOCK}-part-*"))
            for other in (one for one in others if one.exists()):
                with _lock(other):
                    pass  # nobody holds it: it was left by a run that was killed
            held.enter_context(_lock(folder / name))
        yield


@contextmanager
def _lock(path: Path, timeout: float = 0) -> Iterator[None]:
    """Hold a file locked, and remove it then.

    Raises:
        FileExistsError: another process holds it.
    """
    lock = FileLock(path, timeout=timeout, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another run is writing to {path.parent}. Wait for it, or choose another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove files that are open
            path.unlink()  # before the release: who waits for the removed file finds that out, and takes a new one
        lock.release()

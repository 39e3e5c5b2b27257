"""Where the fields of a bank are kept: in memory, or in a folder that any number of processes share."""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai_drdm.bank.entry import BankEntry, EntryFile, file_name
from monai_drdm.bank.settings import BankSettings
from monai_drdm.io.files import atomically, is_taken

_SETTINGS = "bank.json"
_OPEN_FILES = 256


class MemoryStore:
    """Entries in memory. Forked workers share them; to other workers they are sent as tensors."""

    path: Path | None = None

    def __init__(self) -> None:
        self._entries: OrderedDict[str, BankEntry] = OrderedDict()

    def settings(self) -> BankSettings | None:
        """None: no other process can have fixed settings for a bank in memory."""
        return None

    def settle(self, settings: BankSettings) -> BankSettings:
        """The settings themselves: no other process uses this bank."""
        return settings

    def find(self, identity: str, settings: BankSettings | None, mend: bool) -> BankEntry | None:
        """The entry of an image; None if there is none."""
        if identity in self._entries:
            self._entries.move_to_end(identity)
        return self._entries.get(identity)

    def keep(self, entry: BankEntry) -> None:
        """Add an entry."""
        self._entries[entry.identity] = entry

    def shrink(self, limit: int, newest: str) -> None:
        """Drop what was not asked for the longest until the rest is within ``limit`` bytes."""
        while self.nbytes > limit and len(self._entries) > 1:
            self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the fields take."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


class FolderStore:
    """One file for each image, and one for the settings that all of them share."""

    def __init__(self, path: Path, *, track_use: bool = False) -> None:
        self.path = path
        self.track_use = track_use
        self._files: OrderedDict[str, EntryFile] = OrderedDict()

    def settings(self) -> BankSettings | None:
        """The settings of the bank in the folder; None if there is no bank.

        Raises:
            ValueError: they cannot be read.
        """
        try:
            return BankSettings.read(self.path / _SETTINGS)
        except FileNotFoundError:
            return None

    def make(self) -> None:
        """Make the folder, unless it holds a bank already.

        Raises:
            FileExistsError: the folder holds something else.
        """
        if is_taken(self.path) and (not self.path.is_dir() or self.settings() is None):
            raise FileExistsError(f"{self.path} holds something else than a bank. Choose another folder.")
        self.path.mkdir(parents=True, exist_ok=True)

    def settle(self, settings: BankSettings) -> BankSettings:
        """Write the settings, or compare them with those of the bank in the folder.

        Returns:
            Those in the folder. They are equal, but a number may be written there as a whole one, and so hashed.

        Raises:
            FileExistsError: the bank in the folder has other settings.
        """
        if (
            self.settings() is None
        ):  # another process may be writing its settings too, so an existing file is kept and compared
            text = settings.to_json() + "\n"
            path = self.path / _SETTINGS
            atomically(path, lambda part: Path(part).write_text(text, encoding="utf-8"), replace=False)
        there = self.settings()
        if there is not None and there != settings:
            raise FileExistsError(
                f"{self.path} is a deformation bank with other settings: {'; '.join(settings.differences(there))}. "
                "Choose another folder, or repeat those settings."
            )
        return settings if there is None else there

    def find(self, identity: str, settings: BankSettings | None, mend: bool) -> EntryFile | None:
        """The entry of an image; None if there is none, or, with ``mend``, if it is damaged.

        Raises:
            ValueError: it is damaged, or of another bank.
        """
        if identity in self._files:
            self._files.move_to_end(identity)
            self._used(self._files[identity].path)
            return self._files[identity]
        path = self.path / file_name(identity)
        try:
            found = EntryFile(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if not mend:
                raise
            warnings.warn(f"{error} It is drawn again.", stacklevel=4)
            return None
        settings = settings or self.settings()
        if found.identity != identity or settings is None or found.settings != settings.digest:
            raise ValueError(f"{path} belongs to another deformation bank. Remove it, or build in another folder.")
        self._files[identity] = found
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        self._used(path)
        return found

    def is_whole(self, identity: str) -> bool:
        """Whether all fields of an entry match their checksums. If not, the entry is dropped and drawn again."""
        entry = self._files[identity]
        try:
            for index in range(len(entry)):
                entry.field(index)
        except ValueError as error:
            warnings.warn(f"{error} It is drawn again.", stacklevel=5)
            del self._files[identity]
            return False
        return True

    def keep(self, entry: BankEntry) -> None:
        """Write an entry.

        Raises:
            OSError: it cannot be written.
        """
        try:
            entry.save(self.path / file_name(entry.identity))
        except OSError as error:
            raise OSError(f"{error}. What is finished stays; the same call goes on from it.") from error

    def shrink(self, limit: int, newest: str) -> None:
        """Drop what was not asked for the longest until the rest is within ``limit`` bytes."""
        known = self._known()
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= limit:
                return
            if path.name != file_name(newest):
                path.unlink(missing_ok=True)
                total -= size
                self._files = OrderedDict((k, v) for k, v in self._files.items() if v.path != path)

    @property
    def nbytes(self) -> int:
        """Bytes that the files take."""
        return sum(size for _, size, _ in self._known())

    def __len__(self) -> int:
        return sum(1 for _ in self._paths())

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files."""
        return {**self.__dict__, "_files": OrderedDict()}

    def _paths(self) -> Iterator[Path]:
        return (path for path in self.path.glob("*.safetensors") if not path.name.startswith("."))

    def _known(self) -> list[tuple[int, int, Path]]:
        """For each file: the time of its last use, its size and its path."""
        known = []
        for path in self._paths():
            with suppress(FileNotFoundError):  # dropped by another process
                status = path.stat()
                known.append((status.st_mtime_ns, status.st_size, path))
        return known

    def _used(self, path: Path) -> None:
        if self.track_use:
            with suppress(FileNotFoundError):  # dropped by another process; what is open stays readable
                os.utime(path, ns=(time.time_ns(),) * 2)  # without explicit times, the system would use a coarser clock

"""``DeformationBank``: K fields for every image, drawn once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from monai.config import NdarrayOrTensor
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm.bank.building import draw_entry, item_identity, Job, Maker
from monai_drdm.bank.entry import BankEntry, EntryFile, fingerprint_of, identity_of, same_fingerprint
from monai_drdm.bank.settings import BankSettings, check_count
from monai_drdm.bank.stores import FolderStore, MemoryStore
from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.options import choose, DrawOptions, NetworkLike, PixdimOptions, with_options
from monai_drdm.executors import check_shard, run_jobs, WorkerLostError
from monai_drdm.progress import LateBar
from monai_drdm.samples import apply_pending, as_tensor, checked_pixdim, spacing_of


class BankDrawOptions(DrawOptions, PixdimOptions, total=False):
    """Settings of the fields of a bank."""


class DeformationBank:
    """Fields drawn ahead of training, a number for each image: in memory, or in a folder that any process may read.

    ``build`` draws them for all images; ``on_demand`` when an image is first asked for; the constructor opens what was
    built. Fields are kept on the grid they were drawn on, in 16 bits, each with its checksum and the record that
    replays it. An image is known by its identity; that it is the image the fields were drawn on is checked by shape,
    spacing and a fingerprint of its values.

    Args:
        path: folder of a bank that was built.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no bank.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        store = FolderStore(Path(path))
        if not store.path.is_dir():
            raise FileNotFoundError(f"no deformation bank {store.path}. Build it first (DeformationBank.build).")
        self._begin(store, None, None)
        if self.settings is None:
            raise ValueError(f"{store.path} holds no deformation bank (bank.json is missing).")

    def _begin(self, store: FolderStore | MemoryStore, maker: Maker | None, max_bytes: int | None) -> None:
        self.settings: BankSettings | None = None if maker is not None else store.settings()
        self.max_bytes = max_bytes
        self.failed: dict[str, str] = {}
        """Why images were left out, by identity, where ``build`` was asked to go on."""
        self._store, self._maker = store, maker
        self._lock = threading.RLock()

    @classmethod
    @with_options(BankDrawOptions)
    def on_demand(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        network: NetworkLike = "auto",
        fields_per_image: int = 16,
        seed: int = 0,
        max_bytes: int | None = None,
        **options: Unpack[BankDrawOptions],
    ) -> DeformationBank:
        """A bank that draws the fields of an image when it is first asked for.

        Args:
            path: folder for the fields, new or of a bank with the same settings; None: in memory, in every process
                its own.
            network: as in ``RandDRDMDeform``.
            fields_per_image: how many fields each image gets.
            seed: with the identity it fixes an image's fields.
            max_bytes: drop the fields of the images that were not asked for the longest to stay below; they are drawn
                again when they are.
            options: those of ``BankDrawOptions``.

        Raises:
            FileExistsError: the folder holds a bank with other settings, or something else.
            TypeError: arguments of a wrong type.
            ValueError: arguments out of range.
        """
        drawer = FieldDrawer(network, **choose(DrawOptions, options))
        if max_bytes is not None:
            check_count(max_bytes, "max_bytes")
        maker = Maker(
            drawer, check_count(fields_per_image, "fields_per_image"), checked_pixdim(options["pixdim"]), int(seed)
        )
        store = MemoryStore() if path is None else FolderStore(Path(path), track_use=max_bytes is not None)
        if isinstance(store, FolderStore):
            store.make()
        bank = cls.__new__(cls)
        bank._begin(store, maker, max_bytes)
        return bank

    @classmethod
    def build(
        cls,
        items: Iterable[Mapping[Any, Any]],
        *,
        image_key: Hashable = "image",
        id_key: Hashable | None = None,
        path: str | os.PathLike[str] | None = None,
        executor: Executor | None = None,
        shard: tuple[int, int] | None = None,
        skip_failed: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> DeformationBank:
        """Draw the fields of all images; those that are there already, from an earlier call, are kept.

        Args:
            items: samples such as those of a dataset, with images ``(C, *S)`` as the training pipeline has them where
                the fields will be applied.
            image_key: of the image.
            id_key: key of an image's own name: a string, path or whole number. None: the file name that ``LoadImaged``
                keeps in its metadata (``filename_or_obj``).
            path: folder for the fields; None: in memory.
            executor: any ``concurrent.futures.Executor``: processes, threads, or those of Dask and the like. The
                fields are the same with any, and without, but for threads' rounding.
            shard: ``(I, N)``: only part I of N (from 0), for array jobs that fill one folder.
            skip_failed: go on where an image cannot be used; ``failed`` then says why.
            progress: show a progress bar.
            options: those of ``on_demand``. With ``max_bytes``, a bank that would grow larger is an error.

        Returns:
            The bank. It draws nothing further: an image that it does not know is an error.

        Raises:
            FileExistsError: the folder holds a bank with other settings, or something else.
            OSError: the folder cannot be written; what is finished stays, and the same call goes on from it.
            ValueError: an image does not fit, two images of one identity, or more than ``max_bytes``.
        """
        part, parts = check_shard(shard)
        bank = cls.on_demand(path, **options)
        total = len(range(part, len(items), parts)) if isinstance(items, Sized) else None
        with LateBar(total, "image", "bank", shown=progress) as bar:
            begun: dict[str, Tensor] = {}

            def jobs() -> Iterator[Job]:
                for number, item in _part_of(items, part, parts):
                    before = len(bank.failed)
                    job = bank._job_of(item, image_key, id_key, number, skip_failed)
                    if job is not None and job.identity in begun:  # an executor may still be at it
                        bank._refuse_twins(job, begun[job.identity], skip_failed)
                        job = None
                    if job is not None:
                        begun[job.identity] = fingerprint_of(job.image)
                        yield job
                    elif len(bank.failed) > before:
                        bar.skipped()
                    else:
                        bar.done()

            for job, entry in run_jobs(draw_entry, jobs(), executor):
                if bank._take(job.identity, entry, skip_failed):
                    bar.done()
                else:
                    bar.skipped()
        bank._maker = None
        return bank

    def entry(self, identity: str, image: NdarrayOrTensor) -> BankEntry | EntryFile:
        """The fields of an image.

        Args:
            identity: its name.
            image: ``(C, *S)``, to be checked and, if it is not known yet, drawn for.

        Raises:
            FileNotFoundError: the bank's folder is gone.
            KeyError: an image that is not in the bank, and the bank draws nothing.
            ValueError: the fields were drawn on another image, their file is damaged, or the image does not fit.
        """
        with self._lock:
            tensor, spacing = as_tensor(image, identity), self._spacing(image, identity)
            self._settle(tensor)
            found = self._find(identity)
            if found is not None:
                self._check(found, tensor, spacing)
                return found
            if self.path is not None and not self.path.is_dir():
                raise FileNotFoundError(f"the deformation bank {self.path} is no longer there.")
            if self._maker is None:
                raise KeyError(
                    f"{identity!r} is not in the deformation bank {self.path or 'in memory'}. Build it with this "
                    "image, or let it draw on demand (DeformationBank.on_demand)."
                )
            drawn = draw_entry(*self._job(identity, tensor, spacing))
            self._keep(drawn)
            return drawn

    @property
    def path(self) -> Path | None:
        """Its folder."""
        return self._store.path

    @property
    def nbytes(self) -> int:
        """Bytes that the fields take."""
        return self._store.nbytes

    def __contains__(self, identity: object) -> bool:
        return self._find(identity_of(identity)) is not None

    def __len__(self) -> int:
        """How many images it holds."""
        return len(self._store)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which is this process's own."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.RLock()}

    def _find(self, identity: str) -> BankEntry | EntryFile | None:
        return self._store.find(identity, self.settings, mend=self._maker is not None)

    def _check(self, entry: BankEntry | EntryFile, image: Tensor, spacing: tuple[float, ...]) -> None:
        """That fields were drawn on this image."""
        shape = tuple(image.shape[1:])
        close = len(entry.spacing) == len(spacing) and all(
            abs(a - b) <= 1e-3 * b for a, b in zip(entry.spacing, spacing)
        )
        if entry.shape != shape or not close or not same_fingerprint(entry.fingerprint, fingerprint_of(image)):
            raise ValueError(
                f"the deformation bank's fields of {entry.identity!r} were drawn on another image: of shape "
                f"{entry.shape} and spacing {entry.spacing}, this one has {shape} and {spacing}"
                + (", and other values" if entry.shape == shape and close else "")
                + ". Use the bank before any random transform, build it with the pipeline up to there, and give every "
                "image its own identity."
            )

    def _spacing(self, image: NdarrayOrTensor, identity: str) -> tuple[float, ...]:
        known = self.settings or self._maker
        return spacing_of(image, None if known is None else known.pixdim, identity)

    def _job_of(
        self,
        fetch: Callable[[], Mapping[Any, Any]],
        image_key: Hashable,
        id_key: Hashable | None,
        number: int,
        skip_failed: bool,
    ) -> Job | None:
        """What is to be drawn for an item; None where its fields are there."""
        identity = f"item {number}"
        try:
            item = fetch()
            if image_key not in item:
                raise ValueError(f"item {number} has no {image_key!r}: {sorted(map(str, item))}.")
            image = apply_pending(item[image_key])
            identity = item_identity(item, image, image_key, id_key)
            tensor, spacing = as_tensor(image, identity), self._spacing(image, identity)
            self._settle(tensor)
            if (found := self._find(identity)) is not None:
                self._check(found, tensor, spacing)
                if not isinstance(self._store, FolderStore) or self._store.is_whole(identity):
                    return None
            return self._job(identity, tensor, spacing)
        except (TypeError, ValueError) as error:
            if not skip_failed:
                raise
            self.failed[identity] = str(error)
            return None

    def _job(self, identity: str, image: Tensor, spacing: tuple[float, ...]) -> Job:
        assert self._maker is not None
        assert self.settings is not None
        return Job(self._maker.drawer, self.settings, identity, image, spacing)

    def _refuse_twins(self, job: Job, begun: Tensor, skip_failed: bool) -> None:
        """That an image whose name came before is the same image."""
        if not same_fingerprint(begun, fingerprint_of(job.image)):
            message = f"two images of one identity: {job.identity!r}. Give every image its own."
            if not skip_failed:
                raise ValueError(message)
            self.failed[job.identity] = message

    def _settle(self, image: Tensor) -> None:
        """Fix the settings at the first image."""
        if self.settings is None and self._maker is not None:
            settings = self._maker.settings(image)
            self._store.settle(settings)
            self.settings = settings

    def _take(self, identity: str, entry: BankEntry | Exception, skip_failed: bool) -> bool:
        """Keep what was drawn while building; False if the image was left out."""
        if isinstance(entry, Exception):
            if not skip_failed or not isinstance(entry, (TypeError, ValueError, WorkerLostError)):
                raise WorkerLostError(f"{identity}: {entry}") if isinstance(entry, WorkerLostError) else entry
            self.failed[identity] = str(entry)
            return False
        if self.max_bytes is not None and self.nbytes + entry.nbytes > self.max_bytes:
            raise ValueError(
                f"the fields of {len(self)} images fill max_bytes={self.max_bytes}. Allow more, or draw fewer fields "
                "for each image."
            )
        self._keep(entry)
        return True

    def _keep(self, entry: BankEntry) -> None:
        self._store.keep(entry)
        if self.max_bytes is not None:
            self._store.shrink(self.max_bytes, entry.identity)


def _part_of(
    items: Iterable[Mapping[Any, Any]], part: int, parts: int
) -> Iterator[tuple[int, Callable[[], Mapping[Any, Any]]]]:
    """Numbers of items, and how to get them: where they can be asked for by number, those of other parts are not."""
    if isinstance(items, Sized) and hasattr(items, "__getitem__"):
        yield from ((number, partial(items.__getitem__, number)) for number in range(part, len(items), parts))
        return
    for number, item in enumerate(items):
        if number % parts == part:
            yield number, partial(_itself, item)


def _itself(item: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return item

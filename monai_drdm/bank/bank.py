"""``DeformationBank``: several fields for every image, which are drawn once."""

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
    """Several fields for every image, drawn ahead of training, in memory or in a folder that any process may read.

    ``build`` draws the fields of all images. ``on_demand`` draws them when an image is first asked for. The constructor
    opens a folder that was built before. Fields are kept on the grid they were drawn on, in 16 bits, each with a
    checksum and the record that replays it. An image is found by its identity, which is its name. Whether it is the
    image that the fields were drawn on is checked by its shape, its spacing and a fingerprint of its values.

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
        self._ndim: int | None = None  # of the images, where fields are drawn
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
            path: folder for the fields, which is new or holds a bank with the same settings. None: the bank is in
                memory, and every process has its own.
            network: as in ``RandDRDMDeform``.
            fields_per_image: how many fields each image gets.
            seed: seed and identity together fix the fields of an image.
            max_bytes: to stay below this size, fields of the images that were not used for the longest time are
                dropped. They are drawn again when they are needed.
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
        """Draw the fields of all images. Fields that an earlier call has drawn are kept.

        Args:
            items: samples, such as a dataset. Their images ``(C, *S)`` must be as they are at the place in the training
                pipeline where the fields will be applied.
            image_key: key of the image.
            id_key: key of an image's own name: a string, path or whole number. None: the file name that ``LoadImaged``
                keeps in its metadata (``filename_or_obj``).
            path: folder for the fields; None: in memory.
            executor: any ``concurrent.futures.Executor``, such as a process pool or that of Dask. The fields are the
                same with and without one, up to rounding if the number of threads differs.
            shard: ``(I, N)``: only part I of N (from 0), for array jobs that fill one folder.
            skip_failed: skip an image that cannot be used and go on; ``failed`` then holds the reason.
            progress: show a progress bar.
            options: those of ``on_demand``. With ``max_bytes``, a bank that would grow larger is an error.

        Returns:
            The bank. It draws no more fields: an image that it does not know is an error.

        Raises:
            FileExistsError: the folder holds a bank with other settings, or something else.
            OSError: the folder cannot be written. Finished fields stay, and the same call continues from there.
            ValueError: an item cannot be loaded, an image does not fit, two images of one identity, images of different
                dimensions, or more than ``max_bytes``.
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
                    if job is not None and job.identity in begun:  # an executor may still be drawing its fields
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
            image: ``(C, *S)``. It is compared with the image that the fields were drawn on. If the bank draws on demand
                and does not know it yet, its fields are drawn.

        Raises:
            FileNotFoundError: the bank's folder is gone.
            KeyError: the image is not in the bank, and the bank does not draw on demand.
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
        """The folder of the bank; None for a bank in memory."""
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
        """The state without the lock, which belongs to this process."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.RLock()}

    def _find(self, identity: str) -> BankEntry | EntryFile | None:
        return self._store.find(identity, self.settings, mend=self._maker is not None)

    def _check(self, entry: BankEntry | EntryFile, image: Tensor, spacing: tuple[float, ...]) -> None:
        """Raise ``ValueError`` unless the fields were drawn on this image."""
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
        """The job that draws the fields of an item. None if they exist already, or if the item failed."""
        identity = f"item {number}"
        try:
            item = _loaded(fetch, number)
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
        """Raise ``ValueError`` if two different images have the same name."""
        if not same_fingerprint(begun, fingerprint_of(job.image)):
            message = f"two images of one identity: {job.identity!r}. Give every image its own."
            if not skip_failed:
                raise ValueError(message)
            self.failed[job.identity] = message

    def _settle(self, image: Tensor) -> None:
        """Fix the settings of the bank when the first image is known."""
        if self.settings is None and self._maker is not None:
            self.settings, self._ndim = self._store.settle(self._maker.settings(image)), image.ndim
        if self._ndim not in (None, image.ndim):
            raise ValueError(
                f"a deformation bank holds fields of one network, so images of one number of dimensions, got "
                f"{image.ndim - 1} spatial axes after {self._ndim - 1}. Build a bank for each."
            )

    def _take(self, identity: str, entry: BankEntry | Exception, skip_failed: bool) -> bool:
        """Keep the fields that were drawn for an image. False if the image was left out."""
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
        if self.max_bytes is not None and entry.nbytes > self.max_bytes:
            raise ValueError(
                f"the fields of {entry.identity!r} alone take {entry.nbytes} bytes, more than max_bytes="
                f"{self.max_bytes}. Allow more, or draw fewer fields for each image."
            )
        self._store.keep(entry)
        if self.max_bytes is not None:
            self._store.shrink(self.max_bytes, entry.identity)


def _part_of(
    items: Iterable[Mapping[Any, Any]], part: int, parts: int
) -> Iterator[tuple[int, Callable[[], Mapping[Any, Any]]]]:
    """The number of each item of a part, and a function that loads it. Other items are not loaded, if possible."""
    if isinstance(items, Sized) and hasattr(items, "__getitem__"):
        yield from ((number, partial(items.__getitem__, number)) for number in range(part, len(items), parts))
        return
    for number, item in enumerate(items):
        if number % parts == part:
            yield number, partial(_itself, item)


def _itself(item: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return item


def _loaded(fetch: Callable[[], Mapping[Any, Any]], number: int) -> Mapping[Any, Any]:
    """An item of a dataset, whose transforms raise exceptions of any type for files that cannot be read.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return fetch()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"item {number} cannot be loaded: {cause}") from error

"""Finding images and labels: in folders and in MONAI datalists."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai_drdm.documents import Document
from monai_drdm.io.files import stem_of
from monai_drdm.io.images import IMAGE_SUFFIXES

DATALIST = Document(
    "a MONAI datalist", 'It must be JSON such as {"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}.'
)


class Case(NamedTuple):
    """An image file, and the file of its label map if there is one."""

    name: str
    image: Path
    label: Path | None
    others: tuple[Path, ...] = ()
    """Further images on the same grid, such as those of other MR sequences."""


def find_cases(images: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None) -> list[Case]:
    """Find the images of a folder, each with the label map of the same file name in another folder.

    Raises:
        FileNotFoundError: a folder is missing, or holds no image of a known format.
        ValueError: an empty text, which would be the current folder.
    """
    if not os.fspath(images):
        raise ValueError("images must name a folder, got an empty text.")
    folders = [Path(images), *([] if labels is None else [Path(labels)])]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}.")
    paths = [p for p in sorted(folders[0].iterdir()) if p.name.lower().endswith(IMAGE_SUFFIXES) and p.name[0] != "."]
    if not paths:
        raise FileNotFoundError(f"{images} holds no image; known formats are {', '.join(IMAGE_SUFFIXES)}.")
    return _named([(path, None if labels is None else Path(labels) / path.name) for path in paths])


def read_cases(
    datalist: str | os.PathLike[str], section: str = "training", *, several_images: bool = False
) -> list[Case]:
    """Read the cases of a MONAI datalist.

    It is a JSON file with a list of ``{"image": …, "label": …}`` under the name of a section.

    Args:
        datalist: the file.
        section: name of the section.
        several_images: an entry may list several images of one grid, as MONAI's ``LoadImaged`` takes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a datalist, no such section, or an entry that does not name files.
    """
    files = []
    for entry, where in read_entries(datalist, section):
        label = entry.get("label")
        images = listed_images(datalist, entry, where, several=several_images)
        files.append((images, None if label is None else listed_path(datalist, label, f"{where}, label")))
    cases = _named([(images[0], label) for images, label in files])
    return [case._replace(others=tuple(images[1:])) for case, (images, _) in zip(cases, files)]


def read_entries(datalist: str | os.PathLike[str], section: str) -> list[tuple[dict[str, Any], str]]:
    """The entries of a section of a MONAI datalist as they are written, each with what to call it in an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a datalist, no such section, or an empty one.
    """
    path = Path(datalist)
    with DATALIST.reading(path):
        content = DATALIST.read_json(path)
        if section not in content:
            raise ValueError(f"it has no section {section!r}, but {sorted(content)}")
        entries = content[section]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: section {section!r} must be a list of entries, got {type(entries).__name__}.")
    if not entries:
        raise ValueError(f"{path}: section {section!r} is empty.")
    entries = [{"image": entry} if isinstance(entry, str) else entry for entry in entries]  # as the Decathlon's tests
    named = [(entry, f"{path}: entry {number} of {section!r}") for number, entry in enumerate(entries)]
    for entry, where in named:
        if not isinstance(entry, dict):
            raise ValueError(f'{where} must be an object such as {{"image": …, "label": …}}, got {entry!r}.')
    return named


def listed_images(
    datalist: str | os.PathLike[str],
    entry: Mapping[str, Any],
    where: str,
    *,
    several: bool = False,
    folders: bool = False,
) -> list[Path]:
    """The files of an entry's image: one or, where ``several`` are allowed, one or more.

    Raises:
        ValueError: more than one, or what ``listed_path`` refuses.
    """
    image = entry.get("image")
    images = image if isinstance(image, list) and image else [image]
    if len(images) > 1 and not several:
        raise ValueError(
            f"{where} must name one image, got the list {image}. Only monai-drdm augment takes several; elsewhere, "
            "give every one an entry of its own, or make one file of them."
        )
    return [listed_path(datalist, one, f"{where}, image", folders=folders) for one in images]


def listed_path(datalist: str | os.PathLike[str], value: object, where: str, *, folders: bool = False) -> Path:
    """The file that an entry of a datalist names, relative to the folder of the datalist as in MONAI.

    Args:
        datalist: the file.
        value: what the entry says.
        where: what to call it in an error.
        folders: the entry may name a folder.

    Raises:
        ValueError: it names no file: it is no text or an empty one, what no path can be, or a folder.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must name a file, got {value!r}.")
    try:
        valid = "\0" not in os.fsdecode(os.fsencode(value))
    except UnicodeEncodeError:  # half of a pair of code units
        valid = False
    if not valid:
        raise ValueError(f"{where} must name a file, got {value!r}, which no path can be.")
    path = Path(os.path.normpath(os.path.join(Path(datalist).parent, value)))
    if not folders and os.path.isdir(path):
        raise ValueError(f"{where} must name a file, got {value!r}, which is a folder.")
    return path


def _named(pairs: Sequence[tuple[Path, Path | None]]) -> list[Case]:
    """Name each case by its file; if file names repeat, by the path below the common folder.

    An image with several labels, such as those of several raters, gives one case for each label. It is named by both
    files.
    """
    names = [stem_of(image) for image, _ in pairs]
    if len(set(names)) < len(names):
        common = os.path.commonpath([image.absolute().parent for image, _ in pairs])
        names = ["_".join((*image.absolute().parent.relative_to(common).parts, stem_of(image))) for image, _ in pairs]
    given = Counter(image for image, _ in pairs)
    names = [
        f"{name}_{stem_of(label)}" if label is not None and given[image] > 1 else name
        for name, (image, label) in zip(names, pairs)
    ]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several images would be called alike: {repeated[:5]}. Give their files different names, and list every "
            "file once."
        )
    return [Case(name, image, label) for name, (image, label) in zip(names, pairs)]

"""Finding images and labels: in folders and in MONAI datalists."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
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


def find_cases(images: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None) -> list[Case]:
    """Find the images of a folder, each with the label map of the same file name in another folder.

    Raises:
        FileNotFoundError: a folder is missing, or holds no image of a known format.
    """
    folders = [Path(images), *([] if labels is None else [Path(labels)])]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}.")
    paths = [p for p in sorted(folders[0].iterdir()) if p.name.lower().endswith(IMAGE_SUFFIXES) and p.name[0] != "."]
    if not paths:
        raise FileNotFoundError(f"{images} holds no image; known formats are {', '.join(IMAGE_SUFFIXES)}.")
    return _named([(path, None if labels is None else Path(labels) / path.name) for path in paths])


def read_cases(datalist: str | os.PathLike[str], section: str = "training") -> list[Case]:
    """Read the cases of a MONAI datalist.

    It is a JSON file with a list of ``{"image": …, "label": …}`` under the name of a section.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a datalist, no such section, or entries without one image.
    """
    path = Path(datalist)
    pairs = []
    with DATALIST.reading(path):
        for number, entry in enumerate(read_section(path, section)):
            image, label = entry.get("image"), entry.get("label")
            if not isinstance(image, str) or not isinstance(label, (str, type(None))):
                raise ValueError(f"entry {number} of {section!r} must name one image and at most one label: {entry}")
            pairs.append((path_beside(path, image), None if label is None else path_beside(path, label)))
    if not pairs:
        raise ValueError(f"{path}: section {section!r} is empty.")
    return _named(pairs)


def read_section(datalist: Path, section: str) -> list[dict[str, Any]]:
    """The entries of one section of a datalist; one that is a text only names the image."""
    with DATALIST.reading(datalist):
        content = DATALIST.read_json(datalist)
        if section not in content:
            raise ValueError(f"it has no section {section!r}, but {sorted(content)}")
        entries = [{"image": one} if isinstance(one, str) else one for one in content[section]]
        for number, one in enumerate(entries):
            if not isinstance(one, dict):
                raise TypeError(f"entry {number} of {section!r} must be a mapping with an image, got {one!r}")
        return entries


def path_beside(datalist: Path, name: str) -> Path:
    """The file that a datalist names: paths that are relative begin in its folder."""
    return Path(os.path.normpath(os.path.join(datalist.parent, name)))


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
        raise ValueError(f"several images would be called alike: {repeated[:5]}. Give their files different names.")
    return [Case(name, image, label) for name, (image, label) in zip(names, pairs)]

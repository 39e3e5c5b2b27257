"""The headers of MetaImage and NRRD files: where their values are and how many.

A header is refused unless all that ITK computes with has the form and range that it should have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

_Chosen = TypeVar("_Chosen")

_MAX_LINES, _MAX_LINE, _MAX_FIELD, _MAX_TEXT = 10_000, 1 << 14, 800, 250
_MAX_AXES, _MAX_CHANNELS, _MAX_SIZE = 10, 1 << 16, (1 << 31) - 1
_MAX_NUMBER = 1e30
"""The squares of larger numbers overflow; ITK decomposes a matrix of infinite numbers without end."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Values(NamedTuple):
    """Where the values of an image are, and what they take."""

    file: Path
    start: int
    """Position of the first byte in the file, or of the text before it."""
    number: int
    """How many values."""
    width: int
    """Bytes of each."""
    encoding: str
    """``raw``, ``text``, ``hex``, ``zlib``, ``gzip`` or ``bzip2``."""
    stored: int | None = None
    """Bytes in the file, if the header says; None: all up to its end."""
    exact: bool = True
    """Whether nothing may follow them."""


# MetaImage

_META_BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_LONG", "MET_ULONG", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
_META_NUMBERS: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("FileFormatVersion", "NDims", "ID", "ParentID", "CompressedDataSize"), lambda axes: 1),
    **dict.fromkeys(("HeaderSize", "ElementMin", "ElementMax", "ElementNumberOfChannels"), lambda axes: 1),
    **dict.fromkeys(("ElementNBits",), lambda axes: 1),
    **dict.fromkeys(("ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset"), lambda axes: 1),
    **dict.fromkeys(("DimSize", "SequenceID", "Position", "Origin", "Offset", "ImagePosition"), lambda axes: axes),
    **dict.fromkeys(("CenterOfRotation", "ElementOrigin", "ElementSize", "ElementSpacing"), lambda axes: axes),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation", "ElementDirection"), lambda axes: axes**2),
    "Color": lambda axes: 4,
}
"""Entries of numbers, and how many there are for a number of axes. MetaIO reads on in the next line for what misses."""
_META_OF_AXES = {name for name, how_many in _META_NUMBERS.items() if how_many(2) != how_many(3)}
_META_LINE = re.compile(r"\s*([^\s=:][^=:]{0,199}?)\s*([=:].*)")
_META_TEXTS = {
    *("ObjectType", "ObjectSubType", "Comment", "Name", "AcquisitionDate", "DistanceUnits", "AnatomicalOrientation"),
    *("BinaryData", "CompressedData", "ElementByteOrderMSB", "BinaryDataByteOrderMSB", "Modality", "ElementType"),
    "ElementDataFile",
}
"""Entries of text, for which MetaIO has little room."""


def metaimage_values(path: Path) -> Values:
    """Read the header of a MetaImage file.

    Raises:
        ValueError: ITK must not read the file; the message does not name it.
    """
    with path.open("rb") as file:
        entries = _metaimage_entries(file)
        end = file.tell()
    axes = _whole(entries, "NDims", 1, _MAX_AXES)
    for name in _META_NUMBERS.keys() & entries.keys():
        _numbers(entries[name], name, _META_NUMBERS[name](axes))
    count = _whole(entries, "ElementNumberOfChannels", 1, _MAX_CHANNELS, "1")
    for size in _wholes(entries.get("DimSize", ""), "DimSize", axes, 1, _MAX_SIZE):
        count *= size
    width = _chosen(entries.get("ElementType", ""), "ElementType", _META_BYTES)
    binary = _is_true(entries.get("BinaryData", "True"))
    encoding = "text" if not binary else "zlib" if _is_true(entries.get("CompressedData", "False")) else "raw"
    _whole(entries, "FileFormatVersion", 0, 1, "0")
    skipped = _whole(entries, "HeaderSize", -1, _MAX_SIZE, "0")
    stored = _whole(entries, "CompressedDataSize", 0, 1 << 62, "0") if encoding == "zlib" else 0
    data = entries["ElementDataFile"]
    local = data.lower() == "local"
    if encoding == "zlib" and local and not stored:  # ITK would begin to decompress at the header, and go on
        raise ValueError("CompressedDataSize is missing in its header")
    if skipped and encoding != "raw":
        raise ValueError("HeaderSize in its header goes with raw values only")
    values = path if local else _one_file(path, data, "ElementDataFile")
    start = max(skipped, 0) or (end if local else 0)
    return Values(
        values, start, count, width, encoding, stored or None, exact=encoding != "raw" or (local and not skipped)
    )


def _metaimage_entries(file: IO[bytes]) -> dict[str, str]:
    """The entries of a header, up to the last one, after which the values may begin."""
    entries: dict[str, str] = {}
    for line in _lines(file):
        if not line.strip():
            continue
        match = _META_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"its header has a line that is not NAME = VALUE: {line[:80]!r}")
        name, value = match[1], match[2].lstrip("=: \t").strip()
        known = name in _META_NUMBERS or name in _META_TEXTS
        if name in entries and known:
            raise ValueError(f"{name} is in its header twice")
        if known and len(value) > (_MAX_TEXT if name in _META_TEXTS else _MAX_LINE):
            raise ValueError(f"{name} in its header must be a text of at most {_MAX_TEXT} letters")
        if name in _META_OF_AXES and "NDims" not in entries:
            raise ValueError(f"NDims must come before {name} in its header")
        entries[name] = value
        if name == "ElementDataFile":
            return entries
    raise ValueError("its header has no ElementDataFile")


# NRRD

_NRRD_BYTES = {
    **dict.fromkeys(("signedchar", "int8", "int8_t", "uchar", "unsignedchar", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "shortint", "signedshort", "signedshortint", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsignedshort", "unsignedshortint", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signedint", "int32", "int32_t", "uint", "unsignedint", "uint32", "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "longlongint", "signedlonglong", "signedlonglongint", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsignedlonglong", "unsignedlonglongint", "uint64", "uint64_t", "double"), 8),
}
_NRRD_ENCODINGS = {
    "raw": "raw",
    **dict.fromkeys(("txt", "text", "ascii"), "text"),
    "hex": "hex",
    **dict.fromkeys(("gz", "gzip"), "gzip"),
    **dict.fromkeys(("bz2", "bzip2"), "bzip2"),
}
_NRRD_OF_AXES = {"sizes", "spacings", "thicknesses", "axismins", "axismaxs", "spacedirections", "kinds", "labels"}
_NRRD_FREE = {"content", "labels"}
"""Fields for whose text ITK has any room; others go into a message of limited size if they are wrong."""
_NRRD_LINE = re.compile(r"([A-Za-z ]{1,40}): (.*)")
_NRRD_KEY = re.compile(r"[^:=]+:=.*")
_NRRD_VECTOR = re.compile(r"none|\([^()]*\)")


def nrrd_values(path: Path) -> Values:
    """Read the header of an NRRD file.

    Raises:
        ValueError: ITK must not read the file; the message does not name it.
    """
    with path.open("rb") as file:
        entries = _nrrd_entries(file)
        end = file.tell()
    axes = _whole(entries, "dimension", 1, _MAX_AXES)
    count = 1
    for size in _wholes(entries.get("sizes", ""), "sizes", axes, 1, _MAX_SIZE):
        count *= size
    for name in entries.keys() & {"spacings", "thicknesses", "axismins", "axismaxs"}:
        _numbers(entries[name], name, axes, or_nan=True)
    for name in entries.keys() & {"min", "max", "oldmin", "oldmax"}:
        _numbers(entries[name], name, 1, or_nan=True)
    for name in entries.keys() & {"spacedirections", "spaceorigin", "measurementframe"}:
        _check_vectors(entries[name], name, axes if name == "spacedirections" else None)
    width = _chosen("".join(entries.get("type", "").lower().split()), "type", _NRRD_BYTES)
    encoding = _chosen(entries.get("encoding", "").lower(), "encoding", _NRRD_ENCODINGS)
    lines, skipped = _whole(entries, "lineskip", 0, _MAX_SIZE, "0"), _whole(entries, "byteskip", -1, _MAX_SIZE, "0")
    if (lines or skipped) and encoding != "raw":
        raise ValueError("line skip and byte skip in its header go with raw values only")
    attached = "datafile" not in entries
    values = path if attached else _one_file(path, entries["datafile"], "data file")
    start = max(skipped, 0) + (end if attached else 0)
    exact = encoding != "raw" or (attached and not lines and not skipped)
    return Values(values, start, count, width, encoding, None, exact)


def _nrrd_entries(file: IO[bytes]) -> dict[str, str]:
    """The fields of a header by their names without spaces; keys that users may add are left out."""
    entries: dict[str, str] = {}
    lines = _lines(file)
    if not re.fullmatch(r"NRRD000[1-9]", next(lines, "")):
        raise ValueError("it does not begin with NRRD and the number of a known version")
    for line in lines:
        if not line:
            return entries
        if line.startswith("#") or _NRRD_KEY.fullmatch(line):
            continue
        match = _NRRD_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"its header has a line that is not NAME: VALUE: {line[:80]!r}")
        name = "".join(match[1].lower().split())
        if len(line) > _MAX_FIELD and name not in _NRRD_FREE:
            raise ValueError(f"{match[1]} in its header must have at most {_MAX_FIELD} letters, got {len(line)}")
        if name in entries:
            raise ValueError(f"{match[1]} is in its header twice")
        if name in _NRRD_OF_AXES and "dimension" not in entries:
            raise ValueError(f"dimension must come before {match[1]} in its header")
        entries[name] = match[2].strip()
    if "datafile" not in entries:
        raise ValueError("its header does not end with an empty line")
    return entries


def _check_vectors(text: str, name: str, count: int | None) -> None:
    """Raise ``ValueError`` unless a text is a number of vectors such as ``(1,0,0)``, or ``none``."""
    vectors = _NRRD_VECTOR.findall(text)
    if "".join(vectors).replace(" ", "") != "".join(text.split()) or (count or len(vectors)) != len(vectors):
        raise ValueError(f"{name} in its header must be vectors for all axes, got {text[:80]!r}")
    for vector in vectors:
        if vector != "none":
            words = vector[1:-1].split(",")
            _numbers(" ".join(words), name, len(words))


# what both have in common


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a header without their ends; the file is then at the line after."""
    for _ in range(_MAX_LINES):
        line = file.readline(_MAX_LINE + 1)
        if not line:
            return
        text = line.decode("latin-1").rstrip("\r\n")
        if len(line) > _MAX_LINE or any(c < " " and c != "\t" for c in text):
            raise ValueError("its header has lines that are no text, or longer than any that ITK knows")
        yield text
    raise ValueError("its header does not end")


def _numbers(text: str, name: str, count: int, *, or_nan: bool = False) -> list[float]:
    """The numbers of an entry, of which none is infinite."""
    words = text.split()
    good = all(_NUMBER.fullmatch(word) or (or_nan and word.lower() == "nan") for word in words)
    if len(words) != count or not good or any(abs(float(word)) > _MAX_NUMBER for word in words):
        raise ValueError(f"{name} in its header must be {count} finite number{'s' * (count > 1)}, got {text[:80]!r}")
    return [float(word) for word in words]


def _wholes(text: str, name: str, count: int, low: int, high: int) -> list[int]:
    """The whole numbers of an entry."""
    numbers = _numbers(text, name, count)
    if not all(number == int(number) and low <= number <= high for number in numbers):
        raise ValueError(f"{name} in its header must be whole numbers from {low} to {high}, got {text[:80]!r}")
    return [int(number) for number in numbers]


def _whole(entries: Mapping[str, str], name: str, low: int, high: int, default: str = "") -> int:
    return _wholes(entries.get(name, default), name, 1, low, high)[0]


def _chosen(word: str, name: str, known: Mapping[str, _Chosen]) -> _Chosen:
    if word not in known:
        raise ValueError(f"{name} in its header must be one of {', '.join(known)}, got {word[:80]!r}")
    return known[word]


def _is_true(word: str) -> bool:
    return word[:1] in ("T", "t", "1")


def _one_file(path: Path, name: str, entry: str) -> Path:
    """The file with the values that a header names."""
    if not name or name.startswith("LIST") or "%" in name:
        raise ValueError(f"{entry} in its header must be one file, got {name[:80]!r}; write the image as one file")
    return path.parent / name

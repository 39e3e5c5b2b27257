"""Reading files with ITK, after checking what ITK takes on trust.

ITK believes the header of a MetaImage or NRRD file: some numbers in it end the whole process, or make it compute
without end. Nor does it compare the checksums of compressed values. Both are looked at here, before ITK reads the file.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO

import SimpleITK

from monai_drdm.io.compressed import decoder, read_to_end
from monai_drdm.io.files import ITK_FORMATS
from monai_drdm.io.itk_headers import metaimage_values, nrrd_values, Values

_HEADERS = {"MetaImageIO": metaimage_values, "NrrdImageIO": nrrd_values}
_COMPRESSED = ("zlib", "gzip", "bzip2")
_TIFF_COMPRESSION, _TIFF_ZLIB = 259, (8, 32946)
_TIFF_PARTS = ((273, 279), (324, 325))
"""Tags of the positions and of the sizes of strips, and of tiles."""


def read_with_itk(path: str | os.PathLike[str]) -> tuple[SimpleITK.Image, bool]:
    """Read an image with the reader of its suffix; the second result is whether its values are compressed.

    Files without a known suffix are read as DICOM, whose files often have none.

    Raises:
        ValueError: it cannot be read, or is damaged; the message names the file.
    """
    reader = ITK_FORMATS.get(Path(path).suffix.lower(), ITK_FORMATS[".dcm"])
    try:
        compressed = _check_file(Path(path), reader)
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error}.") from None
    try:
        return SimpleITK.ReadImage(os.fspath(path), imageIO=reader), compressed
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {str(error).strip().splitlines()[-1]}") from None


def _check_file(path: Path, reader: str) -> bool:
    """Check the header of a file, and that its values are all there, with their checksum if they have one.

    Returns:
        Whether the values are compressed.

    Raises:
        ValueError: the file is damaged; the message does not name it.
    """
    if reader == "TIFFImageIO":
        return _check_tiff(path)
    if reader not in _HEADERS:
        return False  # PNG files have checksums that ITK compares, DICOM files have none
    values = _HEADERS[reader](path)
    with values.file.open("rb") as file:
        _check_values(file, values)
    return values.encoding in _COMPRESSED


def _check_values(file: IO[bytes], values: Values) -> None:
    """Raise ``ValueError`` unless a file holds as many values as its header says."""
    here = max(os.fstat(file.fileno()).st_size - values.start, 0)
    file.seek(values.start)
    expected = values.number * values.width
    if values.encoding == "text":
        expected, got = values.number, len(file.read().split()) if 2 * values.number - 1 <= here else 0
    elif values.encoding == "hex":
        expected, got = 2 * expected, len(b"".join(file.read().split())) if 2 * expected <= here else 0
    elif values.encoding == "raw":
        got = here
    else:
        stored = here if values.stored is None else values.stored
        if stored > here:
            raise ValueError(f"its header says {stored} bytes of compressed values, there are {here}")
        got = read_to_end(decoder(values.encoding, file, stored), expected)
    if got < expected or (got > expected and values.exact):
        unit = "values" if values.encoding == "text" else "bytes of values"
        more = "more" if values.encoding in _COMPRESSED and got > expected else str(got)
        raise ValueError(f"its header says {expected} {unit}, there are {more}")


def _check_tiff(path: Path) -> bool:
    """Check that the pages of a TIFF file are all there, with their checksums if zlib has compressed them.

    Other kinds have none. Without the sizes of strips ITK may compute without end.
    """
    from PIL.TiffImagePlugin import ImageFileDirectory_v2  # an extra that only training needs

    compressed, length = False, path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        try:
            pages = ImageFileDirectory_v2(head + (file.read(8) if 43 in head[2:4] else b""))
            seen = set()
            while pages.next and pages.next not in seen:
                seen.add(pages.next)
                file.seek(pages.next)
                pages.load(file)
                parts = [part for tags in _TIFF_PARTS for part in zip(*(pages.get(tag, ()) for tag in tags))]
                if not parts or any(place + size > length for place, size in parts):
                    raise ValueError("its pages do not say where their values are, or these are cut off")
                if pages.get(_TIFF_COMPRESSION) in _TIFF_ZLIB:
                    compressed = True
                    for place, size in parts:
                        file.seek(place)
                        read_to_end(decoder("zlib", file, size))
        except (ArithmeticError, LookupError, MemoryError, SyntaxError, TypeError, struct.error) as error:
            raise ValueError(f"its pages cannot be found ({error})") from None
    return compressed

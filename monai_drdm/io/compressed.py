"""Reading compressed streams to their end, where the checksum is: without that, damaged values pass as whole ones."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable
from typing import IO, Protocol

_CHUNK = 1 << 20


class Stream(Protocol):
    """What decodes a file."""

    def read(self, size: int, /) -> bytes:
        """The next bytes; none at the end."""


def read_to_end(stream: Stream, most: int | None = None) -> int:
    """Read the rest of a stream, at whose end decoders compare the checksum, and return its number of bytes.

    Args:
        stream: decodes a file.
        most: stop when there are more bytes than this; None: there may be any number.

    Raises:
        ValueError: the stream is damaged or cut off.
    """
    total = 0
    try:
        while (most is None or total <= most) and (chunk := stream.read(_CHUNK)):
            total += len(chunk)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it is the disk that cannot be read
        raise ValueError(f"its compressed values are damaged ({error})") from None
    return total


def decoder(encoding: str, file: IO[bytes], size: int) -> Stream:
    """A stream that decodes the next bytes of a file.

    Args:
        encoding: ``zlib``, ``gzip`` or ``bzip2``.
        file: is at the first of the bytes.
        size: number of bytes.
    """
    return _DECODERS[encoding](_Part(file, size))


class _Part(io.RawIOBase):
    """The next bytes of a file, as a file of their own."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data


class _Zlib:
    """What a zlib stream holds, or a gzip stream, which ITK takes in its place."""

    def __init__(self, packed: _Part) -> None:
        self.packed, self.decompressor = packed, zlib.decompressobj(zlib.MAX_WBITS + 32)

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end, where zlib has compared the checksum."""
        data = b""
        while not data and not self.decompressor.eof:
            packed = self.decompressor.unconsumed_tail or self.packed.read(_CHUNK)
            if not packed:
                raise EOFError("they are cut off")
            data = self.decompressor.decompress(packed, size)
        return data


_DECODERS: dict[str, Callable[[_Part], Stream]] = {
    "zlib": _Zlib,
    "gzip": lambda packed: gzip.GzipFile(fileobj=packed),
    "bzip2": lambda packed: bz2.BZ2File(packed),
}

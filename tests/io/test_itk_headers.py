"""No header makes ITK end the process, compute without end or take more memory than the file justifies."""

import os
import random
import re
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from monai_drdm.io import load_ddf, load_image
from monai_drdm.io.dicom import load_with_itk

resource = pytest.importorskip("resource", reason="memory is limited as on POSIX")

NUMBERS = "0 -1 1 2 4 9 10 11 99 255 65536 2147483647 2147483648 4294967296 99999999999999999999 1e9 1e308 nan inf x"
MEMORY, SECONDS = 1 << 30, 60


def write(path, *, compressed=False, vector=False, dims=3):
    shape = (6, 7, 8)[:dims]
    values = np.arange(np.prod(shape) * (dims if vector else 1), dtype=np.float32)
    image = SimpleITK.GetImageFromArray(values.reshape((*shape, dims) if vector else shape), isVector=vector)
    image.SetSpacing((1.5, 0.5, 2.0)[:dims])
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return path.read_bytes()


def parts(data, suffix):
    end = b"LOCAL\n" if suffix == ".mha" else b"\n\n"
    cut = data.index(end) + len(end)
    return data[:cut], data[cut:]


def read_all(path):
    """By every reader; whether one of them has taken it."""
    taken = 0
    for read in (load_image, load_ddf, lambda one: load_with_itk([str(one)])):
        try:
            read(path)
            taken += 1
        except ValueError as error:
            said = str(error)
        else:
            continue
        assert path.name in said, said
    return taken


def edited(data, suffix, draw):
    """A file with one or two edits of its header: numbers, lines, bytes."""
    head, values = parts(data, suffix)
    for _ in range(draw.choice((1, 1, 2))):
        kind, lines = draw.random(), head.split(b"\n")
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        number = draw.choice(NUMBERS.split()).encode()
        if kind < 0.5:
            found = draw.choice(list(re.finditer(rb"-?\d+(\.\d+)?", head)) or [re.match(b"", head)])
            head = head[: found.start()] + number + head[found.end() :]
        elif kind < 0.6:
            lines[at], lines[other] = lines[other], lines[at]
            head = b"\n".join(lines)
        elif kind < 0.7:
            head = b"\n".join([*lines[:at], *lines[at + draw.choice((0, 1)) :], *lines[at : at + 1]])
        elif kind < 0.8:
            lines[at] += b" " + b" ".join([number] * draw.choice((1, 3, 20, 2000)))
            head = b"\n".join(lines)
        else:
            one = draw.randrange(len(head))
            head = head[:one] + bytes([draw.choice((head[one] ^ 1 << draw.randrange(8), 0, 255))]) + head[one + 1 :]
    return head + values


def read_edited(folder, bases, seed, count):
    """Read many edited files; prints the number of those that were taken."""
    taken_before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken_before + MEMORY, resource.RLIM_INFINITY))
    signal.alarm(SECONDS if count < 1000 else 20 * SECONDS)  # ends a reader that computes without end
    draw, taken = random.Random(seed), 0
    for number in range(count):
        suffix, data = draw.choice(bases)
        path = folder / f"{number}{suffix}"
        path.write_bytes(edited(data, suffix, draw))
        print(path)
        taken += read_all(path) > 0
        path.unlink()
    print("taken", taken)


def check_edited(fork, tmp_path, seed, count):
    bases = [
        (suffix, write(tmp_path / f"base{suffix}", compressed=compressed, vector=vector, dims=dims))
        for suffix in (".mha", ".nrrd")
        for compressed in (False, True)
        for vector in (False, True)
        for dims in (2, 3)
    ]
    child = fork(lambda: read_edited(tmp_path, bases, seed, count))
    said, errors = child.communicate()
    assert child.returncode == 0, (said.splitlines()[-1:], errors[-500:])
    assert 0.1 * count < int(said.split()[-1]) < 0.8 * count


@pytest.mark.parametrize("seed", [0, 1])
def test_edited_headers_are_read_or_refused(fork, tmp_path, seed):
    check_edited(fork, tmp_path, seed, 200)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_edited_headers_are_read_or_refused(fork, tmp_path, seed):
    check_edited(fork, tmp_path, seed, 5000)


def edits(names, numbers):
    return [(re.compile(rf"(?m)^({name}[:=]? ?[:=] ?).*$"), number) for name in names for number in numbers]


WHAT_ENDED_PROCESSES = {
    ".mha": [
        *edits(["NDims"], ["99", "100000", "-1", "0", "2147483647", "1e308", "nan", ""]),
        *edits(["DimSize"], ["8 7 2147483647", "8 7 -6", "8 7", "2147483647 2147483647 2147483647", "0 7 6"]),
        *edits(["ElementSpacing"], ["1e308 0.5 2", "nan 1 1", "inf 1 1", "1 1"]),
        *edits(["TransformMatrix"], ["1 0 0 1e308 1 0 0 0 1", "1 0 0 0 1 0 0 0", "nan " * 9]),
        *edits(["ElementType"], ["MET_OTHER", "MET_STRING", "", "MET_FLOAT_MATRIX"]),
        *edits(["Offset"], ["0 0 " + "9" * 400, "0 0 x"]),
        *edits(["ElementDataFile"], ["LIST", "a%03d.raw 1 6 1", "none.raw", "."]),
        *edits(["CompressedData"], ["True\nCompressedDataSize = 99999999999", "True"]),
        *edits(["AnatomicalOrientation"], ["R" * 5000, "RAI\nElementNumberOfChannels = 2147483647"]),
        *edits(["BinaryData"], ["False", "True\nHeaderSize = 2147483647", "True\nHeaderSize = -2"]),
    ],
    ".nrrd": [
        *edits(["dimension"], ["99", "-1", "0", "2147483647", "nan"]),
        *edits(["sizes"], ["8 7 2147483647", "8 7 -6", "8 7", "2147483647 2147483647 2147483647", "0 7 6"]),
        *edits(["space directions"], ["(1e308,0,0) (0,1,0) (0,0,1)", "(nan,0,0) (0,1,0) (0,0,1)", "(1,0,0) (0,1,0)"]),
        *edits(["space origin"], ["(0,0,1e308)", "0 0 0"]),
        *edits(["type"], ["block", "long double", ""]),
        *edits(["encoding"], ["zrl", "hex", "text", "raw\nbyte skip: 2147483647", "raw\ndata file: LIST", "gzip"]),
        *edits(["endian"], ["little\n x x 2 inf 9999", "little\n" + "x" * 20000 + ": 1", "little " * 300]),
        *edits(["kinds"], ["domain " * 300, 'domain domain domain\nunits: "' + "m" * 2000 + '" "" ""']),
    ],
}


@pytest.mark.parametrize("suffix", WHAT_ENDED_PROCESSES)
def test_headers_that_itk_must_not_see_are_refused(fork, tmp_path, suffix):
    """In a process of its own: some of them end it."""
    path = tmp_path / f"a{suffix}"
    head, values = parts(write(path), suffix)

    def read():
        signal.alarm(SECONDS)
        for pattern, number in WHAT_ENDED_PROCESSES[suffix]:
            text, changes = pattern.subn(lambda match, number=number: match[1] + number, head.decode())
            assert changes == 1, pattern
            path.write_bytes(text.encode() + values)
            print(pattern.pattern, number[:40])
            assert read_all(path) == 0

    child = fork(read)
    said, errors = child.communicate()
    assert child.returncode == 0, (said.splitlines()[-1:], errors[-500:])
    assert len(said.splitlines()) >= len(WHAT_ENDED_PROCESSES[suffix])


HONEST = {
    ".mha": [
        (r"ObjectType = Image\n", ""),
        (r"NDims = 3", "NDims: 3"),
        (r"\n", "\r\n"),
        (r"Offset = 0 0 0", "Position = -1.5e1 +2. .5"),
        (r"BinaryData = True", "Comment = of a patient: \xe5 = b\nBinaryData = True"),
        (r"DimSize", "My own key of any kind = 1 2 : 3\n\nDimSize"),
        (r"ElementDataFile", "HeaderSize = -1\nElementDataFile"),
        (r"ElementDataFile", "ElementToIntensityFunctionSlope = 1\nElementNBits = 32\nElementDataFile"),
    ],
    ".nrrd": [
        (r"NRRD0004", "NRRD0005"),
        (r"endian", "# a comment: of mine\nmy key:=sizes: 3 4\nendian"),
        (r"(?s)space: .*?(sizes: .*?)space directions: .*?\n(.*?)space origin: .*?\n", r"\1spacings: 1.5 nan 2\n\2"),
        (r"(?s)space: .*?(sizes: .*?)space directions: .*?\n(.*?)space origin: .*?\n", r"\1axis mins: 0 1 2\n\2"),
        (r"space directions: .*", "space directions: (1.5, 0, 0) (0,.5,0)  (0,0,2e0)"),
        (r"kinds: .*\n", 'content: a: b\nlabels: "x" "y" "z"\nold min: nan\n'),
        (r"type: float", "type: FLOAT"),
        (
            r"endian",
            "# " + "a" * 9000 + "\nk" + "e" * 3000 + ":=" + "v" * 9000 + "\ncontent: " + "c" * 9000 + "\nendian",
        ),
    ],
}


@pytest.mark.parametrize(("suffix", "old", "new"), [(suffix, *pair) for suffix in HONEST for pair in HONEST[suffix]])
def test_headers_of_other_programs_are_read(tmp_path, suffix, old, new):
    path = tmp_path / f"a{suffix}"
    head, values = parts(write(path), suffix)
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    text, changes = re.subn(old, new, head.decode("latin-1"))
    assert changes
    path.write_bytes(text.encode("latin-1") + values)
    assert np.array_equal(load_image(path).data.numpy()[0], expected.T)
    assert np.array_equal(load_with_itk([str(path)]).numpy()[0], expected.T)


@pytest.mark.parametrize(("binary", "encoding"), [("BinaryData = False", "encoding: ascii"), (None, "encoding: hex")])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_values_as_text_are_read_and_counted(tmp_path, suffix, binary, encoding):
    path = tmp_path / f"a{suffix}"
    head, values = parts(write(path), suffix)
    expected = np.frombuffer(values, np.float32)
    if suffix == ".mha":
        if binary is None:
            return
        head = head.replace(b"BinaryData = True", binary.encode())
    else:
        head = head.replace(b"encoding: raw", encoding.encode())
    words = values.hex() if encoding.endswith("hex") and suffix == ".nrrd" else " ".join(map(str, expected)) + "\n"
    path.write_bytes(head + words.encode())
    assert np.array_equal(load_image(path).data.numpy().ravel(order="F"), expected)
    path.write_bytes(head + words[:-10].encode())
    with pytest.raises(ValueError, match="its header says"):
        load_image(path)


def test_values_in_another_file(tmp_path):
    """MetaImage and NRRD may keep their values beside the header."""
    write(tmp_path / "a.mhd")
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.mhd")))
    head, values = parts(write(tmp_path / "a.nrrd"), ".nrrd")
    (tmp_path / "a.nrrd").write_bytes(head.replace(b"\n\n", b"\ndata file: b.raw\n"))
    (tmp_path / "b.raw").write_bytes(values)
    for name, other in (("a.mhd", "a.raw"), ("a.nrrd", "b.raw")):
        assert np.array_equal(load_with_itk([str(tmp_path / name)]).numpy()[0], expected.T)
        (tmp_path / other).write_bytes(values[:-1])
        with pytest.raises(ValueError, match="there are 1343"):
            load_with_itk([str(tmp_path / name)])
        (tmp_path / other).unlink()
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{other}"):
            load_with_itk([str(tmp_path / name)])


@pytest.mark.skipif(os.name != "posix", reason="sparse files are those of POSIX")
def test_the_checks_take_no_memory_for_what_is_not_there(tmp_path):
    """A stream of zeros is a thousand times smaller than what it stands for."""
    path = tmp_path / "a.mha"
    head, _ = parts(write(path, compressed=True), ".mha")
    packed = zlib.compress(bytes(8 << 20))
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(packed), head) + packed)
    with pytest.raises(ValueError, match="1344 bytes of values, there are more"):
        load_image(path)

"""Damaged files of images and fields never pass as whole ones.

``python tests/io/test_damage.py`` prints how many of 1,000 files of each kind, each with one bit flipped in its
compressed part, were refused, gave the values of the whole file, or gave others.
"""

import gzip
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

from monai_drdm.io import load_ddf, load_image, save_ddf
from monai_drdm.io.dicom import load_with_itk
from monai_drdm.train.data import load_bank, Scan

SHAPE = (12, 14, 10)
MANY = 1000


def volume():
    return np.random.default_rng(0).normal(0, 60, SHAPE).cumsum(0).astype(np.int16)


def nifti(path):
    nib.save(nib.Nifti1Image(volume(), np.diag([1.5, 0.8, 2, 1])), path)


def field(path):
    save_ddf(torch.from_numpy(volume()[None].repeat(3, 0) / 100), np.eye(4), path)


def itk(path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume()), str(path), useCompression=True)


def itk_field(path):
    vectors = np.stack([volume()] * 3, -1).astype(np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(vectors, isVector=True), str(path), useCompression=True)


def gzipped_metaimage(path):
    """MetaIO inflates gzip streams too."""
    itk(path)
    packed = gzip.compress(volume().tobytes())
    head = re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(packed), body(path)[0])
    path.write_bytes(head + packed)


def picture(path):
    values = (volume()[0] % 256).astype(np.uint8)
    Image.fromarray(values).save(path)


def tiff(path):
    Image.fromarray(volume()[0].astype(np.float32)).save(path, compression="tiff_adobe_deflate")


def body(path):
    """What comes before the compressed part of a file, that part, and what comes after it."""
    data = path.read_bytes()
    if path.suffix == ".tif":
        with Image.open(path) as pages:
            [start], [size] = pages.tag_v2[273], pages.tag_v2[279]
        return data[:start], data[start : start + size], data[start + size :]
    ends = {".mha": b"LOCAL\n", ".nrrd": b"\n\n"}
    cut = data.index(ends[path.suffix]) + len(ends[path.suffix]) if path.suffix in ends else 0
    return data[:cut], data[cut:], b""


def image_values(path):
    return load_image(path).data.numpy()


def ddf_values(path):
    return load_ddf(path).numpy()


def itk_values(path):
    return load_with_itk([str(path)]).numpy()


def trained_on(path):
    return load_bank([Scan(path)], spatial_dims=3, working_size=9).images.numpy()


KINDS = {
    "image .nii.gz": ("a.nii.gz", nifti, image_values),
    "image .mha": ("a.mha", itk, image_values),
    "image .mha of gzip": ("a.mha", gzipped_metaimage, image_values),
    "image .nrrd": ("a.nrrd", itk, image_values),
    "image .png": ("a.png", picture, image_values),
    "field .nii.gz": ("a.nii.gz", field, ddf_values),
    "field .mha": ("a.mha", itk_field, ddf_values),
    "field .nrrd": ("a.nrrd", itk_field, ddf_values),
    "scan .nii.gz": ("a.nii.gz", nifti, trained_on),
    "scan .mha": ("a.mha", itk, itk_values),
    "scan .mhd": ("a.mhd", itk, itk_values),
    "scan .nrrd": ("a.nrrd", itk, itk_values),
    "scan .tif": ("a.tif", tiff, itk_values),
}
"""For each kind of file a name, a writer and a reader."""


def flipped(kind, folder, count, seed=0):
    """Of files with one bit flipped in their compressed part: how many were refused, the same, or other."""
    name, write, read = KINDS[kind]
    whole = folder / name
    write(whole)
    expected = read(whole)
    packed = whole.with_suffix(".zraw") if name.endswith(".mhd") else whole
    head, data, tail = body(packed)
    draw, counts = random.Random(seed), Counter()
    for _ in range(count):
        bits = bytearray(data)
        bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
        packed.write_bytes(head + bits + tail)
        counts[outcome(read, whole, expected)] += 1
    return counts


def outcome(read, path, expected):
    try:
        values = read(path)
    except ValueError as error:
        return "refused" if path.name in str(error) else "unnamed"
    return "same" if values.shape == expected.shape and np.array_equal(values, expected) else "other"


def check(counts):
    assert counts["other"] == counts["unnamed"] == 0
    assert counts["refused"] > 0.8 * counts.total()  # bits that say when or where a file was packed change nothing


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_gives_other_values(kind, tmp_path):
    check(flipped(kind, tmp_path, {"image .nii.gz": 100, "scan .nii.gz": 15}.get(kind, 25)))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_none_of_a_thousand_flipped_bits_gives_other_values(kind, tmp_path):
    check(flipped(kind, tmp_path, MANY, seed=1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.split(".")[1] not in ("mhd", "tif")])
@pytest.mark.parametrize("missing", [1, 4, 8, 100])
def test_cut_files_are_refused(kind, tmp_path, missing):
    name, write, read = KINDS[kind]
    write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-missing])
    with pytest.raises(ValueError, match=re.escape(name)):
        read(tmp_path / name)


@pytest.mark.parametrize("line", [b"", b"compressedDataSize = 99\n", b"CompressedDataSize = 0\n"])
def test_compressed_values_of_no_known_size_are_refused(tmp_path, line):
    """ITK takes them from the beginning of the file, header and all, and returns what that gives."""
    itk(tmp_path / "a.mha")
    data = (tmp_path / "a.mha").read_bytes()
    start = data.index(b"CompressedDataSize")
    (tmp_path / "a.mha").write_bytes(data[:start] + line + data[data.index(b"\n", start) + 1 :])
    with pytest.raises(ValueError, match=r"a\.mha cannot be read: CompressedDataSize is missing"):
        load_image(tmp_path / "a.mha")


def test_pages_without_the_sizes_of_their_strips_are_refused(tmp_path):
    """ITK guesses them, and does not come to an end with some."""
    tiff(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    sizes = re.search(rb"\x17\x01[\x03\x04]\x00\x01\x00\x00\x00", data)  # the tag 279
    (tmp_path / "a.tif").write_bytes(data[: sizes.start()] + b"\x18" + data[sizes.start() + 1 :])
    with pytest.raises(ValueError, match=r"a\.tif cannot be read: its pages do not say where their values are"):
        itk_values(tmp_path / "a.tif")


def test_pictures_cut_at_any_byte_are_named(tmp_path):
    picture(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for size in range(60):
        (tmp_path / "a.png").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"a\.png"):
            load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["image .mha", "image .nrrd", "field .mha"])
def test_compressed_values_of_another_number_are_refused(kind, tmp_path):
    """A whole stream with a right checksum, but of more or fewer values than the header says."""
    name, write, read = KINDS[kind]
    write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for old, new in ((b"10 14 12", b"10 14 11"), (b"10 14 12", b"10 14 13")):
        for order in (old, b" ".join(old.split()[::-1])):
            edited = data.replace(order, new if order == old else b" ".join(new.split()[::-1]))
            if edited != data:
                (tmp_path / name).write_bytes(edited)
                with pytest.raises(ValueError, match="its header says"):
                    read(tmp_path / name)


def test_several_streams_and_plain_values_are_read_as_before(tmp_path):
    """Gzip files may be of several streams, as of pigz and bgzip."""
    nifti(tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]) + bytes(64))
    assert np.array_equal(image_values(tmp_path / "b.nii.gz")[0], volume())
    broken = bytearray((tmp_path / "b.nii.gz").read_bytes())
    broken[-64 - 5] ^= 1  # the checksum of the last one
    (tmp_path / "b.nii.gz").write_bytes(broken)
    with pytest.raises(ValueError, match=r"b\.nii\.gz.*damaged"):
        image_values(tmp_path / "b.nii.gz")


if __name__ == "__main__":
    print(f"{'kind':22} refused  same  other, of {MANY}")
    for one in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as place:
            found = flipped(one, Path(place), MANY)
        print(f"{one:22} {found['refused']:7} {found['same']:5} {found['other']:6}")

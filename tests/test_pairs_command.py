from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import load_decathlon_datalist

from monai_drdm.cli import main
from monai_drdm.io import load_ddf
from monai_drdm.networks import save_network, VelocityUNet
from monai_drdm.transforms import PairParams, RandDRDMPaird

LEVEL = ("--synthesis-level", "0.2", "0.3")
TURN = np.array([[-0.8, 0.6, 0.0], [0.36, 0.48, 0.8], [-0.48, -0.64, 0.6]])
OBLIQUE = np.eye(4)
OBLIQUE[:3] = np.column_stack([TURN * [1.1, 1.2, 1.4], [5.0, -7.0, 11.0]])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two volumes of different size and their labels, on an oblique grid; a network that leaves fields as they are."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, shape in enumerate([(26, 30, 24), (24, 22, 28)]):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = np.sqrt(sum(axis**2 for axis in axes))
        image = (500 * np.exp(-2 * radius**2) + 60 * np.sin(5 * axes[0])).astype(np.float32)
        nib.save(nib.Nifti1Image(image, OBLIQUE), folder / "images" / f"case{number}.nii.gz")
        label = ((radius < 0.9) + 2 * (radius < 0.5)).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, OBLIQUE), folder / "labels" / f"case{number}.nii.gz")
    network = VelocityUNet(3, channels=(4, 6))
    network.card = replace(network.card, working_size=17, steps=1)
    save_network(network, folder / "net.safetensors")
    return folder


@pytest.fixture(scope="module")
def command(inputs):
    """The arguments of a run into a folder."""

    def build(out, *more):
        given = {"--images": inputs / "images", "--labels": inputs / "labels", "--network": inputs / "net.safetensors"}
        flat = [str(one) for pair in given.items() for one in pair]
        return ["pairs", *flat, "--out", str(out), "--pairs", "2", *LEVEL, *more]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """What a run writes that nothing happens to: its folder, and what it says."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with redirect_stdout(io.StringIO()) as said:
        assert main(command(folder)) == 0
    return folder, said.getvalue()


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_itk_warps_moving_images_onto_fixed_ones_by_the_written_fields(whole):
    out, said = whole
    assert "4 written, 0 already there, 0 cases skipped" in said
    listed = load_decathlon_datalist(out / "datalist.json", is_segmentation=True)
    assert len(listed) == 4
    raw = json.loads((out / "datalist.json").read_text())["training"]
    assert all(set(one) == {"moving", "fixed", "moving_label", "fixed_label", "ddf", "inverse_ddf"} for one in raw)
    for one in raw:
        paths = {key: str(out / name) for key, name in one.items()}
        moving, fixed = (SimpleITK.ReadImage(paths[key], SimpleITK.sitkFloat64) for key in ("moving", "fixed"))
        field = SimpleITK.ReadImage(paths["ddf"], SimpleITK.sitkVectorFloat64)
        transform = SimpleITK.DisplacementFieldTransform(field)
        warped = SimpleITK.Resample(moving, fixed, transform, SimpleITK.sitkLinear, float("nan"))
        warped, target = SimpleITK.GetArrayFromImage(warped), SimpleITK.GetArrayFromImage(fixed)
        there = np.isfinite(warped)
        assert there.mean() > 0.7
        apart = np.abs(warped - target)[there]
        assert apart.mean() < 0.03 * target.std()
        assert np.abs(SimpleITK.GetArrayFromImage(moving) - target)[there].mean() > 2 * apart.mean()
        assert nib.load(paths["fixed_label"]).get_data_dtype() == np.uint8
        np.testing.assert_allclose(nib.load(paths["fixed"]).affine, OBLIQUE, atol=1e-5)


def in_nifti(shape, *, sform=OBLIQUE, qform=OBLIQUE, codes=(1, 1), unit="mm"):
    def write(path, values):
        file = nib.Nifti1Image(values.reshape(shape), sform)
        file.set_sform(sform, code=codes[0])
        file.set_qform(qform, code=codes[1])
        file.header.set_xyzt_units(unit)
        nib.save(file, path.with_suffix(".nii.gz"))

    return write


def in_itk(suffix, dtype=np.float32, **place):
    def write(path, values):
        image = SimpleITK.GetImageFromArray(values.T.astype(dtype))
        image.SetSpacing(place.get("spacing", (1.0, 1.0)))
        image.SetOrigin(place.get("origin", (0.0, 0.0)))
        SimpleITK.WriteImage(image, str(path.with_suffix(suffix)))

    return write


CORONAL = np.eye(4)[[0, 2, 1, 3]] * np.array([[2.0], [1.5], [1.0], [1.0]])


@pytest.mark.parametrize(
    ("dims", "write"),
    [
        (3, in_nifti((22, 24, 20), qform=np.diag([2.0, 1.0, 1.5, 1]), codes=(4, 1))),
        (3, in_nifti((22, 24, 20), codes=(0, 0))),
        (3, in_nifti((22, 24, 20), unit="micron")),
        (2, in_nifti((22, 24), sform=np.diag([-2.0, 1.5, 1, 1]), qform=np.diag([-2.0, 1.5, 1, 1]))),
        (2, in_nifti((22, 24, 1))),
        (2, in_nifti((22, 24, 1), sform=CORONAL, qform=CORONAL)),
        (2, in_itk(".png", np.uint8)),
        (2, in_itk(".mha", spacing=(0.5, 2.0), origin=(3.0, -4.0))),
        (2, in_itk(".nrrd", spacing=(0.5, 2.0), origin=(3.0, -4.0))),
    ],
    ids=["qform", "no form", "micron", "2D nifti", "slice", "coronal", "png", "2D mha", "2D nrrd"],
)
def test_itk_warps_wherever_it_places_an_image(tmp_path, dims, write):
    """Fields lie where ITK sees the image, which with some headers is not where NIfTI's sform says."""
    network = VelocityUNet(dims, channels=(4, 6))
    network.card = replace(network.card, working_size=24, steps=1)
    save_network(network, tmp_path / "net.safetensors")
    (tmp_path / "images").mkdir()
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (22, 24, 20)[:dims]), indexing="ij")
    wave = 100 + 60 * np.sin(4 * axes[0] + 1) + 60 * np.cos(5 * axes[1])
    write(tmp_path / "images" / "case", wave.astype(np.float32))
    folders = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    options = ["--network", str(tmp_path / "net.safetensors"), "--no-augmentation", "--synthesis-level", "0.3", "0.4"]
    assert main(["pairs", *folders, *options]) == 0
    [one] = json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]
    paths = {key: str(tmp_path / "out" / name) for key, name in one.items()}
    moving, fixed = (SimpleITK.ReadImage(paths[key], SimpleITK.sitkFloat64) for key in ("moving", "fixed"))
    transform = SimpleITK.DisplacementFieldTransform(SimpleITK.ReadImage(paths["ddf"], SimpleITK.sitkVectorFloat64))
    warped = SimpleITK.Resample(moving, fixed, transform, SimpleITK.sitkLinear, float("nan"))
    warped, target, given = (SimpleITK.GetArrayFromImage(image) for image in (warped, fixed, moving))
    there = np.isfinite(warped)
    assert there.mean() > 0.6
    assert np.abs(warped - target)[there].mean() < 0.1 * np.abs(given - target)[there].mean()
    assert load_ddf(paths["ddf"]).shape == (dims, *wave.shape)


def test_records_replay_the_written_pairs(inputs, whole):
    out, _ = whole
    record = json.loads((out / "records" / "case0_pair1.json").read_text())
    params = PairParams.from_json(json.dumps(record["params"]))
    image = torch.from_numpy(np.asarray(nib.load(inputs / "images" / "case0.nii.gz").dataobj))[None]
    spacing = np.linalg.norm(OBLIQUE[:3, :3], axis=0).tolist()
    network = str(inputs / "net.safetensors")
    again = RandDRDMPaird("image", network, pixdim=spacing)({"image": image}, params=params)
    written = load_ddf(out / record["files"]["ddf"]).as_tensor()
    assert (again["ddf"] - written).abs().max() < 1e-3
    assert record["statistics"]["inverse_residual_vox"] == pytest.approx(float(again["inverse_residual"]), abs=1e-3)
    np.testing.assert_allclose(nib.load(out / record["files"]["fixed"]).dataobj, again["fixed"][0], atol=0.5)


def test_runs_go_on_and_shards_give_the_same_files(command, whole, tmp_path):
    parts, expected = tmp_path / "parts", hashes(whole[0])
    for part in ("0/2", "1/2"):
        assert main(command(parts, "--shard", part)) == 0
    assert hashes(parts) == expected
    (parts / "records" / "case1_pair0.json").unlink()
    (parts / "fixed" / "case0_pair1.nii.gz").unlink()
    assert main(command(parts)) == 0
    assert hashes(parts) == expected


def test_moving_images_may_be_the_given_ones(command, inputs, tmp_path):
    assert main(command(tmp_path / "out", "--no-augmentation", "--figure")) == 0
    for path in (tmp_path / "out" / "moving").iterdir():
        source = nib.load(inputs / "images" / f"{path.name[:5]}.nii.gz")
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(source.dataobj))
    assert (tmp_path / "out" / "overview.png").stat().st_size > 10_000


def test_an_augmented_folder_is_not_one_of_pairs(command, whole, capsys):
    before = hashes(whole[0])
    assert main(["augment", *command(whole[0])[1 : -2 - len(LEVEL)]]) == 1
    assert "was made with other settings" in capsys.readouterr().err
    assert hashes(whole[0]) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [(("--pairs", "0"), "pairs must be 1 or more"), (("--synthesis-level", "0.9", "0.3"), "deformation_level")],
)
def test_wrong_calls_are_explained_before_anything_is_made(command, tmp_path, more, says, capsys):
    assert main(command(tmp_path / "out", *more)) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

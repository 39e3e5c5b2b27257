from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import affine_transform, uniform_filter

from monai_drdm.augment import make_pairs, PairSettings
from monai_drdm.io import find_cases
from monai_drdm.networks import save_network
from monai_drdm.registration import (
    evaluate_registration,
    load_registration,
    register,
    RegistrationNetwork,
    save_registration,
)
from monai_drdm.registration.config import KINDS, RegistrationConfig
from monai_drdm.registration.data import ImageBank, load_images, load_pairs, RegistrationBatch
from monai_drdm.registration.networks import kinds, Structure
from monai_drdm.registration.task import fit, RegistrationTask
from monai_drdm.registration.train import main
from monai_drdm.training.settings import read_config


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Six small images of an ellipse in another, of two sizes, and their labels."""
    folder = tmp_path_factory.mktemp("scans")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        shape = (40, 44) if number % 2 else (44, 40)
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = np.hypot(axes[0] / rng.uniform(0.6, 0.9), axes[1] / rng.uniform(0.6, 0.9))
        label = (radius < 1).astype(np.uint8) + (radius < 0.5)
        image = 100 * label + 10 * np.sin(6 * axes[0]) + rng.normal(size=shape)
        for kind, values in (("images", image.astype(np.float32)), ("labels", label.astype(np.uint8))):
            nib.save(nib.Nifti1Image(values[..., None], np.eye(4)), folder / kind / f"case{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def pairs(scans):
    """Four pairs of each, small fields."""
    settings = PairSettings(synthesis_level=(0.2, 0.3), augmentation_level=None, pairs=4, steps=2)
    cases = find_cases(scans / "images", scans / "labels")
    make_pairs(cases, scans / "pairs", settings)
    return scans / "pairs"


SMALL = ["channels=8", "depth=2", "spatial_dims=2", "batch_size=4", "bfloat16=false", "warmup_steps=10"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(out, *more, steps=40, epochs=1):
    settings = [*SMALL, f"epoch_length={steps}", f"max_epochs={epochs}"]
    return ["--out", str(out), *(word for one in settings for word in ("--set", one)), *map(str, more)]


def test_pairs_are_read_as_they_were_made(pairs):
    bank = load_pairs(pairs, spatial_dims=2)
    assert len(bank) == 24
    first = bank.pairs
    assert first.fixed.shape == (24, 1, 44, 44)
    assert first.inside.float().mean() == pytest.approx(40 / 44)
    assert float(first.fixed.min()) >= 0
    assert float(first.fixed.max()) <= 1
    drawn = bank.draw(3, torch.Generator().manual_seed(0))
    again = Warp("bilinear", "border")(drawn.moving, drawn.ddf)
    apart, doing_nothing = ((one - drawn.fixed).abs()[drawn.inside].mean() for one in (again, drawn.moving))
    assert apart < 0.3 * doing_nothing
    training, validation = bank.split(0.3)
    assert (len(training), len(validation)) == (16, 8)
    cases = [{Path(name).name[:5] for name in part.names} for part in (training, validation)]
    assert not cases[0] & cases[1]


def test_images_are_paired_with_others(scans):
    bank = load_images(scans / "images", scans / "labels", spatial_dims=2)
    batch = bank.draw(64, torch.Generator().manual_seed(0))
    same = (batch.moving == batch.fixed).flatten(1).all(dim=1)
    assert not same.any()
    assert batch.moving_label is not None
    assert set(batch.moving_label.unique().tolist()) == {0, 1, 2}


@pytest.fixture
def two_kinds(tmp_path):
    """A datalist of three wide and five tall images, of other voxel sizes, in turn."""
    entries = []
    for number in range(8):
        wide = number in (0, 3, 6)
        image = np.zeros((20, 12, 1) if wide else (10, 24, 1), np.float32)
        image[2:8, 3 : 4 + number] = 1
        path = tmp_path / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(image, np.diag([1.0, 1, 1, 1] if wide else [3.0, 2, 1, 1])), path)
        entries.append({"image": path.name, "group": "wide" if wide else "tall"})

    def write(**changes):
        new = [{**entry, **changes.get(f"case{number}", {})} for number, entry in enumerate(entries)]
        (tmp_path / "list.json").write_text(json.dumps({"training": new}))
        return tmp_path / "list.json"

    return write


def test_images_are_paired_within_their_group(two_kinds):
    bank = load_images(two_kinds(), spatial_dims=2)
    assert bank.names == tuple("03612457")
    assert bank.images.shape == (8, 1, 20, 24)
    seen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(400):
        pair = bank.draw(1, generator)
        sides = (pair.moving, pair.fixed)
        moving, fixed = ([i for i in range(8) if torch.equal(bank.images[i].float(), one[0])] for one in sides)
        assert len(moving) == len(fixed) == 1
        assert moving != fixed
        assert (moving[0] < 3) == (fixed[0] < 3)
        seen.append(fixed[0] < 3)
    assert 0.4 < np.mean(seen) < 0.6
    training, validation = bank.split(0.1)
    assert (training.names, validation.names) == (tuple("03612457"),) * 2  # of three, no two can be left out twice


def test_every_group_is_validated(scans, tmp_path):
    names = [str(path) for path in sorted((scans / "images").iterdir())]
    copies = [str(tmp_path / Path(name).name.replace("case", "copy")) for name in names]
    for name, copy in zip(names, copies):
        Path(copy).write_bytes(Path(name).read_bytes())
    entries = [{"image": name} for name in names] + [{"image": name, "group": "b"} for name in copies]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    training, validation = load_images(tmp_path / "list.json", spatial_dims=2).split(0.1)
    assert validation.names == ("case4", "case5", "copy4", "copy5")
    assert set(training.names) == {f"{kind}{i}" for kind in ("case", "copy") for i in range(4)}
    assert validation.group.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"case0": {"group": "other"}}, "must hold two images of group 'other' or more .* got 1"),
        ({"case0": {"group": ""}}, "must hold two images without a group or more .* got 1"),
        ({"case0": {"group": 3}}, "entry 0 of 'training': group must be a text, got 3"),
        ({"case0": {"group": "tall"}}, "1.nii.gz must have voxels of the size of .*0.nii.gz"),
    ],
)
def test_groups_that_make_no_pairs_are_refused(two_kinds, change, says):
    with pytest.raises(ValueError, match=says):
        load_images(two_kinds(**change), spatial_dims=2)


def test_known_fields_are_learned(pairs, tmp_path, capsys):
    more = ["--pairs", pairs, "--set", "learning_rate=3e-3", "--set", "validation_share=0.3", "--set", "pose=0"]
    assert main(command(tmp_path / "run", *more, steps=300)) == 0
    network = load_registration(capsys.readouterr().out.strip())
    bank = load_pairs(pairs, spatial_dims=2)
    _, held_out = bank.split(0.3)
    errors = {"network": [], "nothing": []}
    for number in range(len(held_out)):
        one = held_out.at(torch.tensor([number])).to(torch.device("cpu"))
        for name, method in (
            ("network", lambda a, b: register(network, a, b)),
            ("nothing", lambda a, b: torch.zeros(1, 2, *a.shape[2:])),
        ):
            score = evaluate_registration(method, one.moving, one.fixed, ddf=one.ddf, inside=one.inside)
            errors[name].append(score.error_vox)
    assert np.mean(errors["network"]) < 0.9 * np.mean(errors["nothing"])
    assert len([row for row in metrics(tmp_path / "run") if "loss" in row]) == 300
    assert list((tmp_path / "run" / "sheets").glob("*.png"))


def test_unsupervised_goes_on_from_supervised(scans, pairs, tmp_path, capsys):
    assert main(command(tmp_path / "first", "--pairs", pairs, steps=30)) == 0
    first = capsys.readouterr().out.strip()
    more = ["--images", scans / "images", "--labels", scans / "labels", "--init", first, "--set", "label_weight=0.5"]
    assert main(command(tmp_path / "second", *more, steps=60)) == 0
    out, said = capsys.readouterr()
    network = load_registration(out.strip())
    gates = json.loads((tmp_path / "second" / "network.json").read_text())["gates"]
    assert gates["dice"] > gates["dice_of_doing_nothing"] > 0.3
    assert f"dice {gates['dice']:.2f} ({gates['dice_of_doing_nothing']:.3g} is doing nothing)" in said
    assert [row["dice"] for row in metrics(tmp_path / "second") if "dice" in row][-1] == gates["dice"]
    bank = load_images(scans / "images", scans / "labels", spatial_dims=2)
    batch = bank.pairs(torch.tensor([0, 1]), torch.tensor([2, 3])).to(torch.device("cpu"))
    dice = []
    for method in (lambda a, b: register(network, a, b), lambda a, b: torch.zeros(1, 2, *a.shape[2:])):
        for i in range(2):
            images, labels = (
                (one[i : i + 1] for one in two)
                for two in ((batch.moving, batch.fixed), (batch.moving_label, batch.fixed_label))
            )
            moving_label, fixed_label = labels
            score = evaluate_registration(
                method, *images, moving_label=moving_label, fixed_label=fixed_label, structures=(1, 2)
            )
            dice.append(np.mean(score.dice))
    assert np.mean(dice[:2]) > np.mean(dice[2:])


def test_a_run_that_has_learned_nothing_says_so_and_shows_it(scans, tmp_path, capsys):
    """Stopped by the time within its first epoch, at a learning rate of zero."""
    settings = ["--images", scans / "images", "--max-minutes", "1e-5", "--set", "learning_rate=0"]
    assert main(command(tmp_path / "run", *settings)) == 0
    said = capsys.readouterr().err
    assert "This network is no better than doing nothing" in said
    written = json.loads((tmp_path / "run" / "network.json").read_text())
    assert written["source"].endswith("no better than doing nothing on its validation data")
    assert written["gates"]["validation_loss"] == written["gates"]["validation_loss_of_doing_nothing"]
    assert "dice" not in written["gates"]  # there are no labels
    step = metrics(tmp_path / "run")[-1]["step"]
    assert step < 40
    assert (tmp_path / "run" / "sheets" / f"step_{step}.png").stat().st_size > 10_000


def test_dice_of_the_validation():
    """Squares, moved onto each other by a field that is a whole number of voxels; the second one is missing."""
    task = RegistrationTask(RegistrationConfig(images="unread", spatial_dims=2))
    fixed = torch.zeros(2, 1, 20, 20, dtype=torch.uint8)
    fixed[0, 0, 4:10, 4:10], fixed[0, 0, 12:18, 4:10] = 1, 7
    fixed[1, 0, 4:10, 4:10] = 1
    moving = fixed.roll(3, dims=-1)
    image, ddf = torch.zeros(2, 1, 20, 20), torch.zeros(2, 2, 20, 20)
    batch = RegistrationBatch(image, image, image.bool(), None, moving, fixed)
    overlap = 2 * ((moving == 1) & (fixed == 1)).sum() / ((moving == 1).sum() + (fixed == 1).sum())
    assert task.measures(ddf, batch) == {"dice": pytest.approx(float(overlap))}  # the same for all three squares
    ddf[:, 1] = 3
    assert task.measures(ddf, batch) == {"dice": 1.0}
    empty = RegistrationBatch(image, image, image.bool(), None, fixed * 0, fixed * 0)
    assert task.measures(ddf, empty) == {}
    assert task.measures(ddf, RegistrationBatch(image, image, image.bool())) == {}


@pytest.mark.parametrize(("window", "scales"), [(9, (1,)), (5, (1, 2)), (7, (4,))])
def test_images_are_compared_where_the_fixed_image_is_and_not_in_its_padding(window, scales):
    """The expected mean is that of local correlation by SciPy. Its windows see zeros beyond the grid, as MONAI's do."""
    config = RegistrationConfig(images="unread", spatial_dims=2, similarity_window=window, similarity_scales=scales)
    rng = np.random.default_rng(0)
    moving, fixed = rng.uniform(size=(2, 2, 1, 28, 36))
    inside = np.zeros(fixed.shape, dtype=bool)
    inside[0, 0, 5:20, 3:23], inside[1, 0, :, 8:] = True, True

    def unlike(weight, scale):
        """Mean over the weight of all voxels, which are blocks of the images."""
        a, b, weight = (
            one.reshape(2, 1, 28 // scale, scale, -1, scale).mean((3, 5)) for one in (moving, fixed, weight)
        )

        def mean(values):
            return uniform_filter(values, (0, 0, window, window), mode="constant")

        together = mean(a * b) - mean(a) * mean(b)
        spread = [mean(one**2) - mean(one) ** 2 for one in (a, b)]
        return 1 - (weight * together**2 / (spread[0] * spread[1])).sum() / weight.sum()

    images = [torch.from_numpy(one).float() for one in (moving, fixed)]
    still = torch.zeros(2, 2, 28, 36)
    found = RegistrationTask(config).error(still, RegistrationBatch(*images, torch.from_numpy(inside)))
    expected, whole = (np.mean([unlike(one, scale) for scale in scales]) for one in (inside, np.ones_like(moving)))
    assert float(found) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - whole) > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"similarity_window": 4}, "similarity_window must be odd, got 4"),
        ({"similarity_window": 1}, "similarity_window"),
        ({"similarity_scales": ()}, "similarity_scales must name a grid"),
        ({"similarity_scales": (0,)}, "similarity_scales"),
    ],
)
def test_how_images_are_compared_is_checked(settings, says):
    with pytest.raises(ValueError, match=says):
        RegistrationConfig(images="unread", **settings)


@pytest.mark.parametrize(
    ("shape", "scales", "says"),
    [
        ((12, 12, 2), (1,), r"3 voxels or more along each axis .* got \(12, 12, 2\)\. For single slices"),
        ((12, 12, 3), (1, 6), r"similarity_scales must leave 3 voxels .* got 6 for images of \(12, 12, 3\)"),
        ((13, 12, 3), (6, 1), None),
    ],
)
def test_images_too_small_to_learn_from_are_refused_before_training(tmp_path, shape, scales, says):
    for number in range(4):
        volume = np.random.default_rng(number).random(shape).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{number}.nii.gz")
    task = RegistrationTask(RegistrationConfig(images=str(tmp_path), similarity_scales=scales))
    with nullcontext() if says is None else pytest.raises(ValueError, match=says):
        task.prepare(False)


def test_pairs_are_drawn_anew_in_every_step(scans):
    config = RegistrationConfig(images=str(scans / "images"), spatial_dims=2, drawn_level=0.6, relative_error=True)
    task, generator = RegistrationTask(config), torch.Generator().manual_seed(0)
    task.prepare(False)
    (_, first, _), (_, second, _) = (task.batch(None, generator) for _ in range(2))
    assert not torch.allclose(first.ddf, second.ddf, atol=0.1)
    nothing = torch.zeros_like(first.ddf)
    assert float(task.error(nothing, first)) > 0.3
    assert float(task.loss(nothing, first)) == pytest.approx(1, abs=1e-5)
    assert float(task.loss(first.ddf, first)) < 0.2  # what is left are penalties


def test_images_are_aligned_before_they_are_registered(scans):
    """Ellipses of different sizes overlap more, and moving labels still belong to their images."""
    found = {}
    for affine in (False, True):
        folders = {"images": str(scans / "images"), "labels": str(scans / "labels")}
        task = RegistrationTask(RegistrationConfig(**folders, spatial_dims=2, affine=affine, batch_size=8))
        task.prepare(False)
        found[affine] = task.batch(None, torch.Generator().manual_seed(0), validate=True).target

    def dice(a, b):
        return float(2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum()))

    before, after = (dice(found[affine].moving_label, found[affine].fixed_label) for affine in (False, True))
    assert after > before + 0.03
    assert after > 0.95
    torch.testing.assert_close(found[True].fixed, found[False].fixed, rtol=0, atol=0)
    bright = found[True].moving > 0.25  # labels have brightness 0, 100 and 200
    assert dice(bright, found[True].moving_label) > 0.95


def test_affine_maps_between_any_two_images():
    """Turned, stretched and shifted copies by SciPy: each comes into the pose of each other, not of the first alone."""
    generator, shape = torch.Generator().manual_seed(0), (40, 36)
    points = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij"))
    texture = 1 + 0.6 * torch.sin(5 * points[0] + 3 * points[1])
    blob = torch.exp(-6 * points[0] ** 2 - 4 * points[1] ** 2) * texture
    images = [blob]
    for _ in range(3):
        linear = torch.eye(2) + 0.2 * torch.randn(2, 2, generator=generator)
        middle = torch.tensor([(n - 1) / 2 for n in shape])
        shift = middle - linear @ middle + 3 * torch.randn(2, generator=generator)
        images.append(torch.from_numpy(affine_transform(blob.numpy(), linear.numpy(), shift.numpy(), order=1)))
    stacked = (torch.stack(images)[:, None] / 1.6).half()
    bank = ImageBank(stacked, torch.ones_like(stacked, dtype=torch.bool), None, tuple("abcd"), torch.zeros(4).long())
    numbers = torch.tensor([(i, k) for i in range(4) for k in range(4) if i != k]).T
    before, after = (one.pairs(numbers[0], numbers[1]) for one in (bank, bank.aligned()))
    apart = [(one.moving.float() - one.fixed.float()).abs().flatten(1).mean(1) for one in (before, after)]
    assert bool((apart[1] < 0.2 * apart[0]).all())


def test_runs_go_on(pairs, tmp_path):
    settings = [*SMALL, "epoch_length=6", "max_epochs=2"]
    config, steps = read_config(RegistrationConfig, None, settings, pairs=str(pairs)), iter(range(100))
    assert fit(config, tmp_path / "whole") is not None
    assert fit(config, tmp_path / "parts", should_stop=lambda: next(steps) >= 7) is None
    assert fit(config, tmp_path / "parts", resume=True) is not None
    a, b = (load_registration(tmp_path / name / "network.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "set either pairs"),
        (("--pairs", "a", "--images", "b"), "set either pairs"),
        (("--pairs", "nowhere"), "no folder of pairs"),
        (("--images", "nowhere"), "nowhere"),
        (("--pairs", "a", "--labels", "b"), "labels goes with images"),
        (("--pairs", "a", "--set", "drawn_level=0.5"), "drawn_level goes with images"),
        (("--pairs", "a", "--set", "affine=true"), "affine goes with images"),
        (("--images", "a", "--set", "affine=true", "--set", "drawn_level=0.5"), "affine goes with images"),
        (("--images", "a", "--set", "network=other"), "network must be one of"),
    ],
)
def test_wrong_calls_are_explained(tmp_path, more, says, capsys):
    assert main(command(tmp_path / "run", *more)) == 1
    assert says in capsys.readouterr().err


def test_settings_know_all_kinds_of_networks():
    assert sorted(KINDS) == sorted(kinds())


def test_datalists_without_pairs_are_refused(tmp_path, scans):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz"}]}))
    with pytest.raises(ValueError, match="must list pairs with moving, fixed and ddf"):
        load_pairs(tmp_path / "list.json", spatial_dims=2)
    with pytest.raises(ValueError, match="must be a 3D image of one channel"):
        load_images(scans / "images", spatial_dims=3)


def test_a_network_of_other_dimensions_is_refused(tmp_path, scans, small_network, capsys):
    path = tmp_path / "net.safetensors"
    save_network(small_network(2), path)
    assert main(command(tmp_path / "run", "--images", scans / "images", "--init", path)) == 1
    assert "net.safetensors cannot be read as a registration network" in capsys.readouterr().err


@pytest.fixture
def bad(tmp_path):
    """A folder of four images and labels, of which one is spoilt as a test asks."""

    def make(image=None, label=None, affine=None, label_affine=None):
        for kind in ("images", "labels"):
            (tmp_path / "bad" / kind).mkdir(parents=True)
        for number in range(4):
            values = {"images": np.random.default_rng(number).random((24, 20)).astype(np.float32)}
            values["labels"] = (values["images"] > 0.5).astype(np.uint8)
            matrix = np.eye(4)
            if number == 2:
                values["images"] = values["images"] if image is None else image(values["images"])
                values["labels"] = values["labels"] if label is None else label(values["labels"])
                matrix = matrix if affine is None else affine
            for kind, array in values.items():
                placed = label_affine if kind == "labels" and label_affine is not None else matrix
                nib.save(
                    nib.Nifti1Image(array[..., None], placed, dtype=array.dtype),
                    tmp_path / "bad" / kind / f"{number}.nii.gz",
                )
        return tmp_path / "bad"

    return make


def with_nan(image):
    image[3, 3] = np.nan
    return image


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        ({"image": with_nan}, "2.nii.gz must hold finite numbers"),
        ({"label": lambda label: label[:20, :18]}, "labels/2.nii.gz must have the spatial shape of"),
        ({"affine": np.diag([-1.0, 1, 1, 1])}, r"2.nii.gz must have its axes along .* got world axes \(-1, 2, 3\)"),
        (
            {"affine": np.diag([2.0, 2, 2, 1])},
            r"2.nii.gz must have voxels of the size of .* got \[2.0, 2.0\] and \[1.0",
        ),
        ({"label_affine": np.diag([-1.0, 1, 1, 1])}, "labels/0.nii.gz must have the affine of its image"),
        ({"label": lambda label: np.stack([label] * 2, -1)[:, :, None]}, "label ids from 0 to 255 in one channel"),
    ],
)
def test_images_that_make_no_pairs_are_refused(bad, spoilt, says):
    folder = bad(**spoilt)
    with pytest.raises(ValueError, match=says):
        load_images(folder / "images", folder / "labels", spatial_dims=2)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int16", "int64", "float32", "float64"])
def test_labels_of_any_type(bad, dtype):
    folder = bad(label=lambda label: (label * 200).astype(dtype))
    labels = load_images(folder / "images", folder / "labels", spatial_dims=2).labels
    assert labels[2].unique().tolist() == [0, 200]


def test_an_image_is_not_paired_with_itself(scans, tmp_path):
    """Two raters of one image make no second image."""
    entries = [
        {"image": str(scans / "images" / f"case{i}.nii.gz"), "label": str(scans / "labels" / f"case{k}.nii.gz")}
        for i, k in ((0, 0), (0, 2), (1, 1), (3, 3))
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    with pytest.raises(ValueError, match="must list every image once"):
        load_images(tmp_path / "list.json", spatial_dims=2)


def test_pairs_in_folders_of_their_own_and_other_entries(pairs, tmp_path):
    """Files that are called alike are not one image; what is no file of a pair is left alone."""
    entries = json.loads((pairs / "datalist.json").read_text())["training"][::4]
    files = []
    for number, entry in enumerate(entries):
        (tmp_path / str(number)).mkdir()
        for key in ("moving", "fixed"):
            (tmp_path / str(number) / f"{key}.nii.gz").write_bytes((pairs / entry[key]).read_bytes())
        own = {key: f"{number}/{key}.nii.gz" for key in ("moving", "fixed")}
        files.append(own | {"ddf": str(pairs / entry["ddf"]), "fold": number})
    (tmp_path / "list.json").write_text(json.dumps({"training": files}))
    training, validation = load_pairs(tmp_path / "list.json", spatial_dims=2).split(0.3)
    assert (len(training), len(validation)) == (4, 2)
    assert not set(training.names) & set(validation.names)


def test_no_validation_share_trains_on_everything(scans, pairs):
    for bank in (load_images(scans / "images", spatial_dims=2), load_pairs(pairs, spatial_dims=2)):
        assert all(part is bank for part in bank.split(0))


@pytest.mark.parametrize("ids", [(1,), (3,), (255,), (7, 255)])
def test_label_loss_does_not_hang_on_the_ids(ids):
    """1 where structures do not meet at all, 0 where they lie on each other, 0 of none."""
    task = RegistrationTask(RegistrationConfig(images="unread", spatial_dims=2, label_weight=1.0))
    fixed = torch.zeros(1, 1, 12, 12, dtype=torch.uint8)
    moving = fixed.clone()
    for number, value in enumerate(ids):
        fixed[..., 2 + 3 * number : 4 + 3 * number, 1:4], moving[..., 2 + 3 * number : 4 + 3 * number, 7:10] = (
            value,
            value,
        )
    still, image = torch.zeros(1, 2, 12, 12), torch.zeros(1, 1, 12, 12)
    for one, expected in ((moving, 1.0), (fixed, 0.0), (torch.zeros_like(fixed), 1.0)):
        batch = RegistrationBatch(image, image, image.bool(), None, one, fixed)
        assert float(task._overlap(still, batch)) == pytest.approx(expected, abs=1e-4)
    empty = RegistrationBatch(image, image, image.bool(), None, torch.zeros_like(fixed), torch.zeros_like(fixed))
    assert float(task._overlap(still, empty)) == 0


def test_the_structure_of_init_is_written_down(pairs, tmp_path):
    """Settings that init overrules are not recorded as if they had been used."""
    first = RegistrationNetwork(Structure("regunet", 2, 6, 2, False, 1, False))
    save_registration(first, tmp_path / "init.safetensors")
    config = RegistrationConfig(
        pairs=str(pairs), spatial_dims=2, init=str(tmp_path / "init.safetensors"), epoch_length=1, max_epochs=1
    )
    weights = fit(config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["network"], written["channels"], written["diffeomorphic"]) == ("regunet", 6, False)
    assert load_registration(weights).structure == first.structure


def test_images_some_of_which_have_labels_are_refused(scans, tmp_path):
    entries = [{"image": str(path)} for path in sorted((scans / "images").iterdir())]
    entries[0]["label"] = str(scans / "labels" / "case0.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    with pytest.raises(ValueError, match="all images or none must have labels, got 1 of 6"):
        load_images(tmp_path / "list.json", spatial_dims=2)
    with pytest.raises(ValueError, match="labels must be None with the datalist"):
        load_images(tmp_path / "list.json", scans / "labels", spatial_dims=2)


def test_pairs_whose_files_do_not_fit_are_refused(pairs, tmp_path):
    entries = json.loads((pairs / "datalist.json").read_text())["training"][:2]
    files = [{key: str(pairs / name) for key, name in entry.items()} for entry in entries]
    other = tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((12, 14, 1), np.uint8), np.eye(4)), other)
    files[1]["moving_label"] = str(other)
    (tmp_path / "list.json").write_text(json.dumps({"training": files}))
    with pytest.raises(ValueError, match=r"other.nii.gz must have the spatial shape of .* got \(12, 14\)"):
        load_pairs(tmp_path / "list.json", spatial_dims=2)


def test_a_label_weight_without_labels_is_refused_before_training(scans, tmp_path, capsys):
    settings = ["--images", scans / "images", "--set", "label_weight=0.5"]
    assert main(command(tmp_path / "run", *settings)) == 1
    assert "label_weight needs labels of all images, got none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["regunet", "localnet"])
def test_validation_leaves_networks_that_normalise_as_they_are(pairs, tmp_path, kind, monkeypatch):
    """What batches teach them about grey values comes from training images alone."""
    runs = {}
    for batches in (1, 4):
        monkeypatch.setattr("monai_drdm.training.loop._VALIDATION_BATCHES", batches)
        settings = ["--pairs", pairs, "--set", f"network={kind}", "--set", "channels=4"]
        assert main(command(tmp_path / str(batches), *settings, steps=3, epochs=2)) == 0
        runs[batches] = load_registration(tmp_path / str(batches) / "network.safetensors").state_dict()
    assert any("running_mean" in name for name in runs[1])
    assert all(torch.equal(value, runs[4][name]) for name, value in runs[1].items())

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import get_track_meta, set_track_meta
from PIL import Image
from safetensors.torch import load_file

from monai_drdm import BatchRandDRDMBankd, DeformationBank
from monai_drdm.networks import save_network, VelocityUNet

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.fixture
def small_network(tmp_path):
    """A file of a network that changes fields little and quickly."""

    def save(dims):
        network = VelocityUNet(dims, channels=(4, 6))
        network.card = dataclasses.replace(network.card, working_size=17, steps=2)
        path = tmp_path / f"network{dims}.safetensors"
        save_network(network, path)
        return str(path)

    return save


def test_segmentation_pipeline_trains(tmp_path):
    example = load_example("segmentation_pipeline")
    for key in ("images", "labels"):
        (tmp_path / key).mkdir()
    axes = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 36), np.linspace(-1, 1, 3), indexing="ij")
    disc = axes[0] ** 2 + axes[1] ** 2 < 0.3
    for case in "ab":
        nib.save(nib.Nifti1Image(disc * 100.0, np.eye(4)), tmp_path / "images" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(disc.astype(np.uint8), np.eye(4)), tmp_path / "labels" / f"{case}.nii.gz")
    network = VelocityUNet(2, channels=(4, 6))
    network.card = dataclasses.replace(network.card, working_size=33, steps=1)
    save_network(network, tmp_path / "n.safetensors")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    options = ["--classes", "2", "--size", "32", "--prob", "1", "--network", str(tmp_path / "n.safetensors")]
    first = example.main([*folders, *options, "--epochs", "1"])
    last = example.main([*folders, *options, "--epochs", "8"])
    assert last < 0.7 * first  # a bright disc is learned under augmentation


@pytest.fixture
def few_labels(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = load_example("few_labels")
    tracks = get_track_meta()
    yield example
    set_track_meta(tracks)  # the example works on plain tensors


def hearts(folder, count, labelled, size=(40, 36, 3), seed=1):
    """Volumes of drawn hearts, rotated in space, some of them with labels; the datalist and the unlabelled folder."""
    import drawn_hearts

    generator = np.random.default_rng(seed)
    affine = np.array([[0, -1.5, 0, 10], [1.5, 0, 0, -20], [0, 0, 8, 5], [0, 0, 0, 1.0]])
    entries = []
    for number in range(count):
        slices = [drawn_hearts.draw_heart(generator, size[0]) for _ in range(size[2])]
        for key, arrays in zip(("image", "label"), zip(*slices)):
            if key == "label" and number >= labelled:
                continue
            path = folder / (f"labelled_{key}s" if number < labelled else "unlabelled") / f"{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.stack(arrays, -1)[:, : size[1]]
            values = values if key == "label" else (1000 * values).astype(np.int16)  # as scanners write
            nib.save(nib.Nifti1Image(values, affine), path)
        if number < labelled:
            entries.append({key: f"labelled_{key}s/{number}.nii.gz" for key in ("image", "label")})
    (folder / "list.json").write_text(json.dumps({"training": entries[:-1], "validation": entries[-1:]}))
    return ["--labelled", str(folder / "list.json"), "--unlabelled", str(folder / "unlabelled")], affine


@pytest.mark.parametrize(("size", "deform"), [(["32", "24"], "1"), (["24", "16", "8"], "0")])
def test_few_labels_trains_and_labels_a_folder(tmp_path, few_labels, size, deform):
    """On own volumes, by slices under DRDM fields and as a whole: what it writes has the grid of its image."""
    data, affine = hearts(tmp_path, 4, 3, size=(40, 36, 3 if len(size) == 2 else 9))
    run = tmp_path / "run"
    short = ["--iterations", "8", "--batch", "2", "2", "--deform", deform]
    if deform == "1":
        save_network(VelocityUNet(2, channels=(4, 4, 4)), tmp_path / "own.safetensors")
        short += ["--network", str(tmp_path / "own.safetensors")]
    last = few_labels.main(["train", "--out", str(run), *data, "--size", *size, *short])
    assert last["step"] == 8
    assert 0 <= last["dice"] <= 1
    story = json.loads((run / "story.json").read_text(encoding="utf-8"))
    assert [one["step"] for one in story] == list(range(1, 9))
    for picture in ("curves.png", "overlays.png"):
        assert np.asarray(Image.open(run / picture)).std() > 1
    with pytest.raises(SystemExit, match="not empty"):
        few_labels.main(["train", "--out", str(run), *data])
    few_labels.main(["predict", str(run), str(tmp_path / "unlabelled"), "--out", str(tmp_path / "found")])
    for image in (tmp_path / "unlabelled").iterdir():
        found = nib.load(tmp_path / "found" / image.name)
        assert (found.shape, found.get_data_dtype()) == (nib.load(image).shape, np.uint8)
        np.testing.assert_allclose(found.affine, affine)


def drawn_samples(seed, counts, size=32):
    """Groups of drawn hearts as the example's training takes them."""
    import drawn_hearts

    generator = np.random.default_rng(seed)
    groups = []
    for group, count in enumerate(counts):
        groups.append([])
        spread = 0.3 if group else 0.0
        for number in range(count):
            image, label = drawn_hearts.draw_heart(generator, size)
            image = (image ** np.exp(generator.uniform(-spread, spread))).astype(np.float32)
            sample = {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]}
            groups[-1].append(sample | {"name": f"{group}-{number}"})
    return groups


def test_few_labels_follows_its_seed(few_labels):
    few, many = drawn_samples(0, (2, 3), 16)
    settings = {"size": (16, 16), "classes": 4, "iterations": 3, "batch": (2, 3), "device": "cpu"}
    first, again, other = (
        few_labels.train(few, many, [], **settings, bank=None, deform=0.0, weight=1.0, seed=seed)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_few_labels_reads_datalists_as_windows_writes_them_and_names_what_lacks_a_label(tmp_path, few_labels):
    data, _ = hearts(tmp_path, 3, 2, size=(16, 16, 2))
    datalist = Path(data[1])
    datalist.write_bytes(b"\xef\xbb\xbf" + datalist.read_bytes())
    assert [len(group) for group in few_labels.find_groups(datalist, data[3])] == [1, 1, 1]
    datalist.write_text('{"training": [{"image": "labelled_images/0.nii.gz"}]}')
    with pytest.raises(ValueError, match="0/0 has no label"):
        few_labels.main(["train", "--out", str(tmp_path / "run"), *data, "--size", "16", "16"])


def test_deformed_strong_views_follow_the_seed_and_leave_metadata_as_they_were(few_labels, monkeypatch):
    few, many = drawn_samples(0, (2, 3), 16)
    bank = DeformationBank.build(many, id_key="name", fields_per_image=2, steps=1, progress=False)
    settings = {"size": (16, 16), "classes": 4, "iterations": 2, "batch": (2, 3), "device": "cpu", "weight": 1.0}
    set_track_meta(True)
    found = []
    for _ in range(2):
        # the state that MONAI's transforms share is another one in each process
        monkeypatch.setattr(BatchRandDRDMBankd, "R", np.random.RandomState(len(found)), raising=False)
        found.append(few_labels.train(few, many, [], **settings, bank=bank, deform=0.9, seed=0)[0].state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert get_track_meta()


def test_few_labels_keeps_to_the_poses_that_it_is_told(tmp_path, few_labels):
    data, _ = hearts(tmp_path, 4, 3, size=(16, 16, 2))
    weights = {}
    for name, pose in {"plain": [], "chosen": ["--flips", "1", "--rotate", "20"]}.items():
        short = ["--iterations", "2", "--batch", "2", "2", "--size", "16", "16", "--device", "cpu"]
        few_labels.main(["train", "--out", str(tmp_path / name), *data, *short, *pose])
        weights[name] = load_file(tmp_path / name / "network.safetensors")
    loaded = [few_labels.load_cases(group, (16, 16)) for group in few_labels.find_groups(data[1], data[3])]
    settings = {"size": [16, 16], "classes": 4, "iterations": 2, "batch": (2, 2), "device": "cpu", "weight": 1.0}
    pose = {"flips": [1], "rotate": np.radians(20)}
    network, _ = few_labels.train(*loaded, **settings, bank=None, deform=0.0, seed=0, pose=pose)
    assert all(torch.equal(value, weights["chosen"][key]) for key, value in network.state_dict().items())
    assert not all(torch.equal(value, weights["plain"][key]) for key, value in network.state_dict().items())
    with pytest.raises(SystemExit, match="--flips must be axes from 0 to 1, got \\[2\\]"):
        few_labels.main(["train", "--out", str(tmp_path / "none"), *data, "--size", "16", "16", "--flips", "2"])
    with pytest.raises(SystemExit, match="--network says which network deforms, so it needs --deform"):
        few_labels.main(
            ["train", "--out", str(tmp_path / "none"), *data, "--size", "16", "16", "--network", "anatomy-2d"]
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_slices_are_flipped_unless_told_otherwise_and_volumes_are_not(few_labels, size):
    image = torch.arange(16.0).view(1, 16, *(1,) * (len(size) - 1)).expand(1, *size) / 15
    sample = {"image": image, "label": (image > 0.4).byte()}
    for asked, expected in {None: len(size) == 2, (0,): True, (): False}.items():
        view = few_labels.light_view(size, flips=asked, rotate=0.0, scale=0.0, shift=0.0).set_random_state(0)
        falling = [view(dict(sample))["label"][0].flatten()[0].item() == 1 for _ in range(20)]
        assert any(falling) == expected, asked
        assert not all(falling), asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (16, 12)}, "multiples of 8, got \\[16, 12\\]"),
        ({"classes": 3}, "0-0 has the label 3, but with classes=3"),
        ({"label": None}, "0-0 has no label"),
    ],
)
def test_few_labels_refuses_what_it_cannot_learn_from(few_labels, change, message):
    (few,) = drawn_samples(0, (1,), 16)
    if "label" in change:
        del few[0]["label"]
    settings = {"size": (16, 16), "classes": 4, **change}
    with pytest.raises(ValueError, match=message):
        few_labels.train(few, few, [], **settings, iterations=1)


@pytest.mark.parametrize(
    ("image", "label", "size", "message"),
    [
        ((16, 16), 0.5, (16, 16), r"label.nii.gz must hold whole numbers from 0 to 255, got values such as \[0.5"),
        ((16, 16), 256, (16, 16), "label.nii.gz must hold whole numbers"),
        ((16, 16), -1, (16, 16), "label.nii.gz must hold whole numbers"),
        ((16, 8), 1, (16, 16), r"label.nii.gz has the shape \(16, 16\), but .*image.nii.gz has \(16, 8\)"),
        ((16, 16), 1, (16, 16, 16), "image.nii.gz has 2 axes, but size=.* asks for volumes"),
        ((16, 16), 1, 16, "size must be two numbers for slices"),
    ],
)
def test_few_labels_names_files_that_do_not_fit(few_labels, tmp_path, image, label, size, message):
    files = [tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"]
    for path, values in zip(files, (np.zeros(image), np.full((16, 16), label))):
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
    case = few_labels.find_cases(tmp_path)[0]._replace(label=files[1])
    with pytest.raises(ValueError, match=message):
        few_labels.load_cases([case], size)


def test_few_labels_writes_over_no_image(few_labels, tmp_path):
    image = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "one.nii.gz")
    before = (tmp_path / "one.nii.gz").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        few_labels.label_folder(few_labels.build_network(2, 2), (16, 16), tmp_path, tmp_path)
    assert (tmp_path / "one.nii.gz").read_bytes() == before


@pytest.mark.long
def test_few_labels_learns_from_unlabelled_images(few_labels):
    """Two labelled images, sixty without labels: these add some points of Dice in every one of two draws."""
    gains = []
    for seed in (0, 1):
        few, many, validation = drawn_samples(seed, (2, 60, 40))
        unlabelled = [{key: one[key] for key in ("image", "name")} for one in many]
        settings = {"size": (32, 32), "classes": 4, "iterations": 2000, "batch": (4, 8), "device": "cpu", "seed": seed}
        found = []
        for weight in (0.0, 1.0):
            run = {"bank": None, "deform": 0.0, "weight": weight}
            _, story = few_labels.train(few, unlabelled, validation, **settings, **run)
            found.append(story[-1]["dice"])
        gains.append(found[1] - found[0])
    assert min(gains) > 0.01
    assert np.mean(gains) > 0.02


def run_notebook(name, monkeypatch, settings, pictures=4):
    """All cells of a notebook, with other settings than its first cell's; it must be small, and have been run."""
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 2**20
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert all(output["output_type"] != "error" for output in outputs)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        exec(compile(settings if source.startswith("DATA =") else source, "notebook", "exec"), names)
    return names


def test_registration_learns_from_pairs(tmp_path, monkeypatch):
    """The short form: scans that were not seen come nearer to each other, on drawn hearts and volumes of one's own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = load_example("registration")
    short = ["--judged", "3", "--pairs", "1"]
    result = example.main(["--out", str(tmp_path / "drawn"), *short, "--size", "32", "--scans", "6", "--steps", "30"])
    assert result["difference"] < result["difference_before"]
    assert result["folds_percent"] < 0.1
    assert json.loads((tmp_path / "drawn" / "result.json").read_text(encoding="utf-8")) == result
    for picture in ("registered.png", "separability.png", "pairs/overview.png"):
        assert np.asarray(Image.open(tmp_path / "drawn" / picture)).std() > 1
    learned = {path.name for path in (tmp_path / "drawn" / "learned" / "images").iterdir()}
    judged = {path.name for path in (tmp_path / "drawn" / "judged" / "images").iterdir()}
    assert (len(learned), len(judged), learned & judged) == (3, 3, set())
    with pytest.raises(SystemExit, match="not empty"):
        example.main(["--out", str(tmp_path / "drawn")])
    (tmp_path / "own" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        volume = generator.random((16, 18, 20)).astype(np.float32)
        nib.save(
            nib.Nifti1Image(volume, np.diag([6.0, 1.0, 1.0, 1.0])), tmp_path / "own" / "images" / f"{number}.nii.gz"
        )
    options = ["--judged", "2", "--pairs", "1", "--steps", "2"]
    own = example.main(["--out", str(tmp_path / "run"), "--data", str(tmp_path / "own"), *options])
    assert "dice" not in own  # no labels, no overlap
    with pytest.raises(SystemExit, match="need 12 scans or more"):
        example.main(["--out", str(tmp_path / "few"), "--data", str(tmp_path / "own")])


def test_registration_notebook_runs_and_was_run(monkeypatch):
    settings = "DATA, JUDGED, PAIRS, STEPS, SCANS, SIZE = None, 3, 1, 6, 5, 32"
    names = run_notebook("registration", monkeypatch, settings)
    assert len(names["found"]) == 3
    assert all(one["score"].fold_fraction < 1e-3 for one in names["found"])


@pytest.fixture
def volumes(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return load_example("volumes")


def test_volumes_trains_a_segmenter(tmp_path, volumes, small_network):
    """On volumes of one's own: what it writes, and that it learns."""
    volumes.draw_volumes(tmp_path / "own", 5, 16)
    options = ["--data", str(tmp_path / "own"), "--learned", "3", "--judged", "2", "--fields", "2"]
    options += ["--network", small_network(3), "--iterations", "25"]
    result = volumes.main(["--out", str(tmp_path / "run"), *options])
    assert len(result["dice"]) == 2
    assert max(result["dice"]) > 0.3  # nothing found is 0
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8")) == result
    for picture in ("samples.png", "found.png", "recovery.gif"):
        assert np.asarray(Image.open(tmp_path / "run" / picture)).std() > 1
    with pytest.raises(SystemExit, match="not empty"):
        volumes.main(["--out", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit, match="need 9 volumes, got 5"):
        volumes.main(["--out", str(tmp_path / "other"), *options[:2], "--learned", "7", "--judged", "2"])


def test_volumes_notebook_runs_and_was_run(tmp_path, monkeypatch, volumes, small_network):
    volumes.draw_volumes(tmp_path / "own", 5, 16)
    settings = f"DATA, LEARNED, JUDGED, LEVEL = {str(tmp_path / 'own')!r}, 3, 2, (0.3, 0.7)\n"
    names = run_notebook(
        "volumes", monkeypatch, settings + f"FIELDS, ITERATIONS, NETWORK = 1, 3, {small_network(3)!r}", pictures=5
    )
    assert [len(one) for one in (names["found"], names["dice"], names["losses"])] == [2, 2, 3]
    assert names["found"][0].shape == (1, 16, 16, 16)
    assert (names["work"] / "recovery.gif").stat().st_size > 1000


def test_few_labels_notebook_runs_and_was_run(monkeypatch, few_labels, small_network):
    settings = "DATA, LABELLED, UNLABELLED, JUDGED, SIZE = None, 2, 4, 3, (32, 24)\n"
    settings += f"ITERATIONS, DEFORM, FIELDS, LEVEL, NETWORK = 3, 0.5, 1, (0.2, 0.5), {small_network(2)!r}"
    names = run_notebook("few_labels", monkeypatch, settings, pictures=3)
    assert not any("label" in one for one in names["unlabelled"])
    assert (len(names["found"]), names["story"][-1]["step"]) == (3, 3)
    # the view moves an image's label with it: blood stays bright, muscle dark
    image, label = names["images"], names["labels"]
    assert image[label == 3].mean() > image[label == 2].mean()

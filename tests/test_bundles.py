"""The MONAI bundles: what MONAI's own commands say of them, and what they write."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import fire  # noqa: F401  # here, as the handlers and tensorboard below, and not again in every fork
import monai.handlers  # noqa: F401
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.utils.tensorboard
from ignite.engine import Engine
from monai.bundle import verify_metadata, verify_net_in_out
from monai.bundle.workflows import ConfigWorkflow
from monai.data import get_track_meta, set_track_meta

from monai_drdm import DeformationBank
from monai_drdm.networks import load_network, save_network, VelocityUNet

SOURCES = Path(__file__).parents[1] / "bundles"
EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMA = Path(__file__).parent / "bundle_metadata.schema.json"
NAMES = ("anatomy_2d", "anatomy_3d", "hippocampus_segmentation", "few_label_segmentation")
AFFINE = np.array([[0, -1.5, 0, 10], [1.5, 0, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def assemble():
    spec = importlib.util.spec_from_file_location("make_bundles", SOURCES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_bundles


@pytest.fixture(scope="module")
def compiler():
    """What torch imports with the first optimizer, and would import again in every fork that trains."""
    return importlib.import_module("torch._dynamo")


@pytest.fixture
def bundles(assemble, tmp_path):
    assert [path.name for path in assemble(tmp_path / "bundles")] == list(NAMES)
    return tmp_path / "bundles"


def command(*words):
    """``python -m monai.bundle WORDS``, for a fork."""

    def call():
        sys.argv = ["monai.bundle", *map(str, words)]
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)

    return call


def enter(bundle):
    """What ``python -m`` does in the folder of a bundle: modules are looked for there."""
    os.chdir(bundle)
    sys.path.insert(0, str(bundle))


def run(fork, bundle, configs, **settings):
    out, errors, code = outcome(fork, bundle, configs, **settings)
    assert code == 0, errors
    return out


def outcome(fork, bundle, configs, **settings):
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    words = ["--config_file", repr(files) if len(files) > 1 else files[0]]
    for name, value in {"bundle_root": bundle, "meta_file": bundle / "configs" / "metadata.json", **settings}.items():
        words += [f"--{name}", value]
    process = fork(command("run", *words), lambda: enter(bundle))
    return *process.communicate(), process.returncode


def draw_cases(folder, count, shape, suffixes=("images", "labels"), dtype=np.float64):
    """Binary discs: the image is the label, so that both must go the same way."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    for number in range(count):
        disc = (np.linalg.norm(axes * (1 + 0.1 * number), axis=0) < 0.7).astype(np.uint8)
        for suffix, array in zip(suffixes, ((100 * disc).astype(dtype), disc)):
            (folder / suffix).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), folder / suffix / f"case{number}.nii.gz")
    return [folder / suffix for suffix in suffixes]


def draw_few_and_many(folder, shape, validation=False):
    """Discs, three of them with labels, as the bundle for few labels takes them."""
    draw_cases(folder, 3, shape, ("known", "truth"), np.int16)
    draw_cases(folder, 5, shape, ("unlabelled", "judged"), np.uint8)
    entries = [{"image": f"known/case{n}.nii.gz", "label": f"truth/case{n}.nii.gz"} for n in range(3)]
    sections = {"training": entries[:2], "validation": entries[2:]} if validation else {"training": entries}
    (folder / "datalist.json").write_text(json.dumps(sections), encoding="utf-8")


def read(path):
    file = nib.load(path)
    return np.asarray(file.dataobj), file.affine


@pytest.mark.parametrize("name", NAMES)
def test_metadata_are_what_the_specification_asks_for(bundles, name):
    """MONAI's check, with a schema that is here, where MONAI would download one."""
    bundle = bundles / name
    path = bundle / "configs" / "metadata.json"
    verify_metadata(meta_file=str(path), filepath=str(SCHEMA))
    metadata = json.loads(path.read_text(encoding="utf-8"))
    assert metadata["version"] in metadata["changelog"]
    for direction in ("inputs", "outputs"):
        (tensor,) = metadata["network_data_format"][direction].values()
        assert [int(key) for key in tensor["channel_def"]] == list(range(tensor["num_channels"]))
    del metadata["network_data_format"]["outputs"]["pred"]["dtype"]
    path.write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(path), filepath=str(SCHEMA))
    names = {str(one.relative_to(bundle)) for one in bundle.rglob("*") if one.is_file()}
    assert names >= {"LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"}
    assert all("{{" not in one.read_text(encoding="utf-8") for one in (bundle / "docs").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_network_takes_and_gives_what_the_metadata_say(bundles, name):
    configs = bundles / name / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    settings = {"net_id": "network_def", "any": 9, "device": "cpu", "steps": 1}
    verify_net_in_out(**files, **settings)
    if name == "anatomy_2d":
        wrong = {"_meta_::network_data_format::outputs::pred::num_channels": 7}
        with pytest.raises(ValueError, match="output channel number"):
            verify_net_in_out(**files, **settings, **wrong)


@pytest.mark.parametrize(("name", "kind"), [*((n, "infer") for n in NAMES), *((n, "train") for n in NAMES[2:])])
def test_programs_that_know_bundles_find_all_parts(bundles, compiler, tmp_path, fork, name, kind):
    draw_cases(tmp_path, 2, (6, 6, 6), ("imagesTr", "labelsTr"))
    draw_few_and_many(tmp_path, (6, 6, 6), validation=True)

    def look():
        workflow = ConfigWorkflow(
            workflow_type=kind,
            config_file=str(bundles / name / "configs" / f"{'train' if kind == 'train' else 'inference'}.json"),
            meta_file=str(bundles / name / "configs" / "metadata.json"),
            logging_file=False,
            init_id="nothing" if kind == "infer" else None,  # there are no weights of a segmenter yet
            bundle_root=str(bundles / name),
            dataset_dir=str(tmp_path if kind == "train" else tmp_path / "imagesTr"),
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        assert isinstance(workflow.trainer if kind == "train" else workflow.evaluator, Engine)

    process = fork(look, lambda: enter(bundles / name))
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_weights_are_those_of_the_package(bundles):
    for name in ("anatomy-2d", "anatomy-3d"):
        saved = torch.load(bundles / name.replace("-", "_") / "models" / "model.pt", weights_only=True)
        for key, value in load_network(name).state_dict().items():
            assert torch.equal(saved[key], value)


@pytest.mark.parametrize(("name", "shape"), [("anatomy_2d", (40, 36)), ("anatomy_3d", (6, 32, 8))])
def test_images_and_labels_are_deformed_together(bundles, tmp_path, fork, name, shape):
    images, labels = draw_cases(tmp_path / "data", 2, shape)
    settings = {"dataset_dir": images, "label_dir": labels, "deformation_level": 0.8, "steps": 2}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)) if name == "anatomy_2d" else (("a", 0),):
        run(fork, bundles / name, ["inference"], output_dir=tmp_path / out, seed=seed, **settings)
    for case in ("case0", "case1"):
        image, affine = read(tmp_path / "a" / "images" / f"{case}_deformed.nii.gz")
        label, _ = read(tmp_path / "a" / "labels" / f"{case}_deformed.nii.gz")
        original, _ = read(labels / f"{case}.nii.gz")
        assert image.shape == label.shape == original.shape
        np.testing.assert_allclose(affine, AFFINE)
        assert set(np.unique(label)) == {0, 1}
        assert 0.01 < (label != original).mean() < 0.5
        assert ((image > 50) != label).mean() < 0.02  # linear and nearest interpolation differ at corners only
        if name == "anatomy_2d":
            again, other = (read(tmp_path / one / "images" / f"{case}_deformed.nii.gz")[0] for one in "bc")
            np.testing.assert_array_equal(image, again)
            assert abs(image - other).max() > 10


def test_images_without_labels_and_slices_of_a_volume(bundles, tmp_path, fork):
    images, _ = draw_cases(tmp_path / "data", 1, (24, 20, 4))
    run(
        fork,
        bundles / "anatomy_2d",
        ["inference"],
        dataset_dir=images,
        output_dir=tmp_path / "out",
        slice_axis=2,
        steps=2,
    )
    moved, _ = read(tmp_path / "out" / "images" / "case0_deformed.nii.gz")
    assert moved.shape == (24, 20, 4)
    assert not (tmp_path / "out" / "labels").exists()


def save_recovery(path, dims):
    """A recovery network that takes no time."""
    network = VelocityUNet(dims, channels=(4, 6))
    network.card = dataclasses.replace(network.card, working_size=17, steps=1)
    save_network(network, path)
    return str(path)


@pytest.fixture
def small(tmp_path, compiler):
    """Settings of a training that takes a second."""
    recovery = save_recovery(tmp_path / "n.safetensors", 3)
    draw_cases(tmp_path, 4, (12, 16, 10), ("imagesTr", "labelsTr"))
    size = {"train::deterministic_transforms::4::spatial_size": [16, 16, 16]}
    channels = {"network_def::channels": [4, 8], "network_def::strides": [2], "network_def::num_res_units": 0}
    drdm = {"drdm_network": recovery, "drdm_prob": 1.0}
    short = {"workers": 0, "epochs": 2, "val_interval": 2, "val_fraction": 0.5, "optimizer::lr": 0.03}
    return {"dataset_dir": tmp_path, **short, **size, **channels, **drdm}


def test_the_segmenter_is_trained_judged_and_used(bundles, tmp_path, fork, small):
    bundle = bundles / "hippocampus_segmentation"
    small["epochs"] = 16
    out = run(fork, bundle, ["train"], logging_file=bundle / "configs" / "logging.conf", **small)
    assert "SupervisedTrainer - INFO" in out
    assert list((bundle / "eval").glob("events.*"))
    run(fork, bundle, ["train", "evaluate"], **small)
    name, dice = (bundle / "eval" / "metrics.csv").read_text(encoding="utf-8").split(",")
    assert name == "val_mean_dice"
    assert float(dice) > 0.8
    settings = {key: value for key, value in small.items() if key.startswith("network_def")}
    settings["preprocessing::transforms::4::spatial_size"] = [16, 16, 16]
    run(fork, bundle, ["inference"], dataset_dir=tmp_path / "imagesTr", output_dir=tmp_path / "out", **settings)
    found, affine = read(tmp_path / "out" / "case3_seg.nii.gz")
    label, _ = read(tmp_path / "labelsTr" / "case3.nii.gz")
    assert (found.shape, found.dtype) == ((12, 16, 10), np.uint8)  # its own grid again, after turning and padding
    assert 2 * (found * label == 1).sum() / ((found == 1).sum() + label.sum()) > 0.8  # the disc is learned
    np.testing.assert_allclose(affine, AFFINE)


def test_the_segmenter_is_trained_by_several_processes(bundles, tmp_path, fork, small):
    bundle = bundles / "hippocampus_segmentation"
    port = 20000 + os.getpid() % 20000

    def process(rank):
        files = [str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
        words = ["--config_file", repr(files), "--bundle_root", bundle]
        words += [part for name, value in small.items() for part in (f"--{name}", value)]
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

        def before():
            enter(bundle)
            os.environ.update({key: str(value) for key, value in environment.items()})

        return fork(command("run", *words), before)

    processes = [process(0), process(1)]
    for one in processes:
        _, errors = one.communicate()
        assert one.returncode == 0, errors
    assert (bundle / "models" / "model.pt").is_file()


@pytest.fixture
def example(monkeypatch, compiler):
    """``examples/few_labels.py``."""
    monkeypatch.syspath_prepend(EXAMPLES)
    tracks = get_track_meta()
    yield importlib.import_module("few_labels")
    set_track_meta(tracks)  # the example works on plain tensors


def train_as_the_example_does(example, folder, settings, recovery):
    """The teacher of the example's own loop, with the settings of the bundle."""
    groups = example.find_groups(folder / "datalist.json", folder / "unlabelled")
    few, many, judged = (example.load_cases(group, settings["size"]) for group in groups)
    bank = None
    if settings["drdm_prob"]:
        options = {"fields_per_image": 1, "deformation_level": (0.2, 0.5), "network": recovery, "progress": False}
        bank = DeformationBank.build(many, id_key="name", **options)
    ours = {name: settings[name] for name in ("size", "classes", "confidence", "pose", "seed", "device")}
    ours |= {"deform": settings["drdm_prob"], "weight": settings["unlabelled_weight"], "bank": bank}
    return example.train(few, many, judged, iterations=8, batch=(2, 3), **ours)[0]


@pytest.mark.parametrize(
    ("size", "prob", "pose"), [([16, 24], 1.0, {}), ([16, 16, 8], 0.0, {"flips": [2], "scale": 0})]
)
def test_the_bundle_for_few_labels_trains_and_finds_what_the_example_does(
    bundles, tmp_path, fork, example, size, prob, pose
):
    """The same weights as the example's loop in plain PyTorch, and the same labels as it writes with them."""
    bundle, recovery = bundles / "few_label_segmentation", save_recovery(tmp_path / "n.safetensors", 2)
    draw_few_and_many(tmp_path, (20, 26, 3 if len(size) == 2 else 9), validation=prob == 0)
    settings = {"size": size, "classes": 2, "confidence": 0.55, "unlabelled_weight": 0.5, "seed": 3, "device": "cpu"}
    settings |= {"drdm_prob": prob, "pose": {"flips": None, "rotate": None, "scale": 0.3, "shift": 0.1, **pose}}
    short = {"epochs": 2, "epoch_length": 4, "log_interval": 3, "labelled_batch": 2, "unlabelled_batch": 3}
    options = {"drdm_network": recovery, "fields_per_image": 1, "logging_file": bundle / "configs" / "logging.conf"}
    out = run(fork, bundle, ["train"], dataset_dir=tmp_path, **settings, **short, **options)
    assert "Epoch: 2/2, Iter: 2/4 -- loss:" in out
    assert ("val_mean_dice" in out) == (prob == 0)
    assert list((bundle / "eval").glob("events.*"))
    run(fork, bundle, ["inference"], dataset_dir=tmp_path / "unlabelled", output_dir=tmp_path / "out", size=size)
    teacher = train_as_the_example_does(example, tmp_path, settings, recovery)
    trained = torch.load(bundle / "models" / "model.pt", weights_only=True)
    torch.testing.assert_close(trained, dict(teacher.state_dict()))
    example.label_folder(teacher, size, tmp_path / "unlabelled", tmp_path / "expected")
    for number in range(5):
        found, affine = read(tmp_path / "out" / f"case{number}_seg.nii.gz")
        expected, _ = read(tmp_path / "expected" / f"case{number}.nii.gz")
        image, _ = read(tmp_path / "unlabelled" / f"case{number}.nii.gz")
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        np.testing.assert_allclose(affine, AFFINE)
        assert 0.02 < (found == 1).mean() < 0.98
        assert (found != expected).mean() < 1e-3  # a voxel between both labels may round to the other one


@pytest.mark.parametrize("name", ["few_label_segmentation", "hippocampus_segmentation"])
def test_training_writes_over_no_network(bundles, fork, name):
    bundle = bundles / name
    (bundle / "models" / "model.pt").write_bytes(b"trained")
    _, errors, code = outcome(fork, bundle, ["train"])
    assert code != 0
    assert "model.pt exists. Move it away" in errors
    assert (bundle / "models" / "model.pt").read_bytes() == b"trained"


@pytest.mark.parametrize("configs", [["inference"], ["train", "evaluate"]])
def test_the_segmenter_says_that_it_is_not_trained(bundles, fork, small, configs):
    settings = {"dataset_dir": small["dataset_dir"] / "imagesTr"} if configs == ["inference"] else small
    _, errors, code = outcome(fork, bundles / "hippocampus_segmentation", configs, **settings)
    assert code != 0
    assert "model.pt. Train first" in errors


def test_the_bundle_for_few_labels_says_what_is_missing_before_it_labels(bundles, fork, tmp_path):
    bundle, (images, _) = bundles / "few_label_segmentation", draw_cases(tmp_path, 1, (16, 16))
    for size, message in (("[48,48]", "model.pt. Train first"), ("[50,50]", "multiples of 8, got [50, 50]")):
        _, errors, code = outcome(fork, bundle, ["inference"], dataset_dir=images, size=size)
        assert code != 0
        assert message in errors
        (bundle / "models" / "model.pt").write_bytes(b"trained")


def test_a_bundle_that_is_there_is_left_alone(assemble, tmp_path):
    (tmp_path / "anatomy_3d").mkdir()
    with pytest.raises(FileExistsError, match="Move it away"):
        assemble(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["anatomy_3d"]

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import main as torchrun

from monai_drdm import load_network, RandDRDMDeformd
from monai_drdm.io.files import locked
from monai_drdm.networks import save_network, VelocityUNet
from monai_drdm.train import build_config, fit
from monai_drdm.train.__main__ import main

SMALL = ["channels=[8, 16]", "working_size=33", "batch_size=2", "epoch_length=3", "max_epochs=2", "warmup_steps=2"]


def small(*more, **known):
    return build_config(settings=[*SMALL, *more], **known)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(count):
    calls = iter(range(1, 10**6))
    return lambda: next(calls) == count


def same_weights(a, b):
    first, second = (load_network(folder / "network.safetensors").state_dict() for folder in (a, b))
    return all(torch.equal(first[key], second[key]) for key in first)


def close_weights(a, b):
    first, second = (load_network(folder / "network.safetensors").state_dict() for folder in (a, b))
    return all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


@pytest.fixture
def scans(tmp_path):
    """Three volumes."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 12 + number)), indexing="ij")
        image = np.exp(-3 * sum((axis - 0.1 * number) ** 2 for axis in axes)) + 0.2 * np.sin(9 * axes[0])
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(small(), folder)
    return folder


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_run_leaves_a_network_that_deforms(tmp_path, scans, spatial_dims):
    config = small(f"spatial_dims={spatial_dims}", "working_size=25", data=str(scans))
    weights = fit(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*.safetensors")] == ["network.safetensors"]
    network = load_network(weights)
    assert (network.spatial_dims, network.card.working_size, network.card.name) == (spatial_dims, 25, "run")
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(scans)
    transform = RandDRDMDeformd(["image", "label"], network=weights, prob=1.0, mode=["bilinear", "nearest"])
    image = torch.rand(1, *((30, 28) if spatial_dims == 2 else (20, 24, 18)))
    out = transform({"image": image, "label": (image > 0.5).byte()})
    assert torch.isfinite(out["image"]).all()
    assert transform.last.params.sampler == "velocity"


def test_training_beats_doing_nothing(tmp_path):
    """Rings, deformed: a loss of 1 is that of a network that says nothing."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x, y)
    (tmp_path / "rings").mkdir()
    rings = (127 + 120 * np.sin(14 * radius) * np.exp(-radius)).astype(np.uint8)
    Image.fromarray(rings).save(tmp_path / "rings" / "rings.png")
    pose, look = ("flip", "permute", "rotation_deg", "scale", "shift_frac"), ("noise", "gamma", "contrast", "bias")
    still = [f"{name}=0" for name in (*pose, *look, "blur_vox", "roll_out")]
    config = build_config(
        settings=[*SMALL, *still, "channels=[16, 32]", "batch_size=8", "learning_rate=1e-3"],
        data=str(tmp_path / "rings"),
        level_low=0.1,
        level_high=0.3,
        epoch_length=140,
        max_epochs=1,
    )
    fit(config, tmp_path / "run")
    validations = [row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row]
    assert validations[-1] < 0.85


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_runs_take_the_same_steps(tmp_path, whole, stop):
    assert fit(small(), tmp_path / "parts", should_stop=stop_after(stop)) is None
    assert not (tmp_path / "parts" / "network.safetensors").exists()
    assert fit(small(), tmp_path / "parts", resume=True).exists()
    assert rows(tmp_path / "parts") == rows(whole)
    assert same_weights(tmp_path / "parts", whole)


def stays_as_it_is(config, folder):
    """A finished run that is resumed."""
    before, metrics = (folder / "network.safetensors").read_bytes(), rows(folder)
    weights = fit(config, folder, resume=True)
    return weights == folder / "network.safetensors" and weights.read_bytes() == before and rows(folder) == metrics


def test_a_finished_run_stays_as_it_is(tmp_path, whole):
    assert stays_as_it_is(small(), shutil.copytree(whole, tmp_path / "run"))


def test_time_is_a_limit(tmp_path, monkeypatch):
    """A step takes a second here: seven and a half are spent with the eighth, an interruption not counted."""
    config, clock = small("max_epochs=100000", "max_minutes=0.125"), [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def step(last=None):
        clock[0] += 1
        return clock[0] == last

    assert fit(config, tmp_path / "run", should_stop=lambda: step(last=3)) is None
    clock[0] += 30
    assert fit(config, tmp_path / "run", resume=True, should_stop=step).exists()
    assert rows(tmp_path / "run")[-1]["step"] == 8
    assert "validation_loss" in rows(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "sheets" / "step_8.png").stat().st_size > 10_000
    assert stays_as_it_is(config, tmp_path / "run")


def test_without_a_checkpoint_the_run_starts_again(tmp_path, whole):
    fit(small(), tmp_path / "run", should_stop=stop_after(2))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    fit(small(), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(whole)


def test_another_seed_is_another_run(tmp_path):
    for seed in (0, 1):
        fit(small("max_epochs=1", seed=seed), tmp_path / str(seed))
    first, second = (rows(tmp_path / str(seed)) for seed in (0, 1))
    assert [row.get("loss") for row in first] != [row.get("loss") for row in second]


def test_a_torn_checkpoint_costs_one_interval(tmp_path, whole, capsys):
    fit(small(), tmp_path / "run", should_stop=stop_after(5))
    torn = tmp_path / "run" / "checkpoints" / "checkpoint_5.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    fit(small(), tmp_path / "run", resume=True)
    assert "checkpoint_5.pt is damaged" in capsys.readouterr().err
    assert rows(tmp_path / "run") == rows(whole)
    assert same_weights(tmp_path / "run", whole)


def test_patience(tmp_path):
    config = small("epoch_length=1", "max_epochs=50", "patience=2", "learning_rate=0", "weight_decay=0")
    fit(config, tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["step"] <= 5


def test_a_loss_that_is_not_finite_names_its_batch(tmp_path):
    with pytest.raises(FloatingPointError, match=r"batch \d+ \(seed 0\)"):
        fit(small("learning_rate=1", "clip_norm=1e30", "epoch_length=1000", "warmup_steps=0"), tmp_path / "run")


def test_no_limit_on_gradients(tmp_path):
    """A ``clip_norm`` of 0 is none at all, as a very large one."""
    for name, limit in (("none", "0"), ("large", "1e9")):
        fit(small("max_epochs=1", f"clip_norm={limit}"), tmp_path / name)
    assert same_weights(tmp_path / "none", tmp_path / "large")


def test_a_run_goes_on_with_the_same_data_only(tmp_path, scans):
    config = small("max_epochs=1", data=str(scans))
    assert fit(config, tmp_path / "run", should_stop=stop_after(2)) is None
    (scans / "new.nii.gz").write_bytes((scans / "0.nii.gz").read_bytes())
    with pytest.raises(ValueError, match="the data have changed since the run was begun"):
        fit(config, tmp_path / "run", resume=True)
    (scans / "new.nii.gz").unlink()
    assert fit(config, tmp_path / "run", resume=True) is not None


def test_a_run_among_its_scans(tmp_path, scans, monkeypatch):
    """``--data . --out run``: its pictures are no scans, and it goes on; its card knows the folder's name."""
    monkeypatch.chdir(scans)
    config = small(data=".")
    assert fit(config, "run", should_stop=stop_after(4)) is None
    assert list((scans / "run" / "sheets").iterdir())
    assert load_network(fit(config, "run", resume=True)).card.training_data == "scans"


def test_an_empty_folder_of_ones_own_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "none", "--out", "."]) == 1
    assert "no folder or datalist none" in capsys.readouterr().err
    assert tmp_path.is_dir()


def test_init_of_another_range_is_refused(tmp_path):
    network = VelocityUNet(2, channels=(8, 16))
    network.card = dataclasses.replace(network.card, input_range=(-1.0, 1.0))
    save_network(network, tmp_path / "init.safetensors")
    with pytest.raises(ValueError, match=r"init must take images in \[0, 1\]"):
        fit(
            small("max_epochs=1", "channels=[16, 32, 48, 64]", init=str(tmp_path / "init.safetensors")),
            tmp_path / "run",
        )


def test_start_from_another_network(tmp_path):
    first = fit(small("max_epochs=1"), tmp_path / "first")
    fit(small("max_epochs=1", "learning_rate=0", "weight_decay=0", init=str(first)), tmp_path / "second")
    assert close_weights(tmp_path / "first", tmp_path / "second")
    with pytest.raises(ValueError, match="init must be a 3D network"):
        fit(small("spatial_dims=3", init=str(first)), tmp_path / "third")


def test_folders_are_respected(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        fit(small(), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        fit(small(), tmp_path / "none", resume=True)
    fit(small(), tmp_path / "a", should_stop=stop_after(2))
    with pytest.raises(ValueError, match="batch_size: 2 before, 3 now"):
        fit(small("batch_size=3"), tmp_path / "a", resume=True)
    with locked(tmp_path / "a"), pytest.raises(FileExistsError, match="another run"):
        fit(small(), tmp_path / "a", resume=True)


def test_a_run_of_a_version_without_the_choice_of_optimizer_goes_on(tmp_path):
    """Such versions had AdamW only."""
    config, folder = small("optimizer=adamw"), tmp_path / "run"
    whole = fit(config, tmp_path / "whole")
    fit(config, folder, should_stop=stop_after(4))
    saved = json.loads((folder / "config.json").read_text())
    del saved["optimizer"]
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="optimizer: 'adamw' before, 'muon' now"):
        fit(small(), folder, resume=True)
    assert main(["--out", str(folder), "--resume"]) == 0
    assert same_weights(whole.parent, folder)


THRICE = """
import faulthandler, os, runpy, sys
from pathlib import Path
import torch.distributed as dist
from monai_drdm.train import build_config, fit
def note(when):
    names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]
    Path(folder, when + os.environ['RANK']).write_text(''.join(names))
faulthandler.dump_traceback_later(600, exit=True)  # whoever waits for one that has failed
folder, *settings = sys.argv[1:]
dist.init_process_group('gloo', f'file://{folder}/met', rank=int(os.environ['RANK']), world_size=2)
config = build_config(settings=settings, data='synthetic')
fit(config, Path(folder, 'first'))
dist.destroy_process_group()  # it is still there
fit(config, Path(folder, 'second'), should_stop=lambda: bool(note('during')))
note('after')
settings = [part for one in settings for part in ('--set', one)]
sys.argv[1:] = ['--data', 'synthetic', '--out', str(Path(folder, 'third')), *settings]
runpy.run_module('monai_drdm.train', run_name='__main__')
"""


def test_two_processes_train_one_network(tmp_path, fork):
    """Both see data of their own: the gradients are those of twice the batch, and the run is the same every time.

    The first run is in a group that the script has made, the others in those that torchrun offers.
    """
    (tmp_path / "script.py").write_text(THRICE)
    script = [str(tmp_path / "script.py"), str(tmp_path), *SMALL, "max_epochs=1", "device=cpu"]
    launcher = fork(lambda: torchrun(["--standalone", "--nproc_per_node=2", *script]))
    _, said = launcher.communicate()
    assert launcher.returncode == 0, said
    assert rows(tmp_path / "first") == rows(tmp_path / "second") == rows(tmp_path / "third")
    assert [row["step"] for row in rows(tmp_path / "first") if "loss" in row] == list(range(1, 4))
    fit(small("max_epochs=1", "device=cpu"), tmp_path / "alone")
    alone, together = (load_network(tmp_path / name / "network.safetensors") for name in ("alone", "first"))
    assert not torch.equal(alone.stem.weight, together.stem.weight)
    # a thread that lives on while the interpreter ends aborts the process, once in some dozens of runs
    for rank in "01" if Path("/proc/self/task").exists() else "":
        assert "gloo" in (tmp_path / f"during{rank}").read_text()
        assert "gloo" not in (tmp_path / f"after{rank}").read_text()


def test_wrong_calls_are_explained(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "run"), "--set", "nonsense=1"]) == 1
    assert "unknown settings ['nonsense']" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "run"), "--data", str(tmp_path / "none")]) == 1
    assert "no folder or datalist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from monai_drdm import load_network, RandDRDMDeformd
from monai_drdm.networks import RecResACNet, save_network, VelocityUNet
from monai_drdm.train import build_config, fit
from monai_drdm.train.published import PublishedTarget
from monai_drdm.train.trainer import choose_task

SMALL = ["working_size=17", "batch_size=2", "epoch_length=2", "max_epochs=2", "warmup_steps=1", "level_high=0.2"]
PUBLISHED = ["network=recresacnet", *SMALL]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(count):
    calls = iter(range(1, 10**6))
    return lambda: next(calls) == count


def weights_of(folder):
    return load_network(folder / "network.safetensors").state_dict()


@pytest.fixture
def published(tmp_path, small_network):
    """A RecResACNet's file."""
    path = tmp_path / "published.safetensors"
    save_network(small_network(2, working_size=17), path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(build_config(settings=PUBLISHED), folder)
    return folder


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_run_leaves_a_network_that_deforms(tmp_path, whole, monkeypatch, spatial_dims):
    if spatial_dims == 2:
        shutil.copytree(whole, tmp_path / "run")
    else:
        monkeypatch.setattr("monai_drdm.training.loop._VALIDATION_BATCHES", 1)
        shorter = ["spatial_dims=3", "max_epochs=1", "epoch_length=1", "batch_size=1", "level_high=0.05"]
        fit(build_config(settings=[*PUBLISHED, *shorter]), tmp_path / "run")
    weights = tmp_path / "run" / "network.safetensors"
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)
    assert list((tmp_path / "run" / "sheets").glob("*.png"))
    card = load_network(weights).card
    assert (card.name, card.kind, card.spatial_dims, card.working_size) == ("run", "recresacnet", spatial_dims, 17)
    assert (card.sampler, card.steps, card.training_data) == ("fast", 12, "synthetic")
    assert card.source.split("; ")[0] == "trained with monai_drdm.train"
    transform = RandDRDMDeformd(
        ["image", "label"], network=weights, prob=1.0, mode=["bilinear", "nearest"], steps={2: None, 3: 2}[spatial_dims]
    )
    image = torch.rand(1, *((30, 28) if spatial_dims == 2 else (16, 18, 14)))
    out = transform({"image": image, "label": (image > 0.5).byte()})
    assert torch.isfinite(out["image"]).all()
    assert transform.last.params.sampler == "fast"


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_runs_take_the_same_steps(tmp_path, whole, stop):
    config = build_config(settings=PUBLISHED)
    assert fit(config, tmp_path / "parts", should_stop=stop_after(stop)) is None
    fit(config, tmp_path / "parts", resume=True)
    assert rows(tmp_path / "parts") == rows(whole)
    expected, got = weights_of(whole), weights_of(tmp_path / "parts")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_training_beats_doing_nothing(tmp_path):
    """Rings, deformed: a loss of 1 is that of a network that says nothing."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x, y)
    (tmp_path / "rings").mkdir()
    rings = (127 + 120 * np.sin(14 * radius) * np.exp(-radius)).astype(np.uint8)
    Image.fromarray(rings).save(tmp_path / "rings" / "rings.png")
    still = ("flip", "rotation_deg", "scale", "shift_frac", "noise", "gamma", "bias", "blur_vox", "contrast")
    config = build_config(
        settings=[*PUBLISHED, *(f"{name}=0" for name in (*still, "permute")), "batch_size=4"],
        data=str(tmp_path / "rings"),
        level_low=0.1,
        level_high=0.3,
        learning_rate=1e-3,
        epoch_length=30,
        max_epochs=1,
    )
    fit(config, tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["validation_loss"] < 0.93


def test_fine_tuning_starts_from_the_given_weights(tmp_path, published):
    config = build_config(
        settings=[*SMALL, "working_size=0", "max_epochs=1", "learning_rate=0", "weight_decay=0"], init=str(published)
    )
    fit(config, tmp_path / "run")
    start = load_network(published)
    for name, tensor in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(tensor, start.state_dict()[name], rtol=0, atol=1e-6)
    card = load_network(tmp_path / "run" / "network.safetensors").card
    assert (card.kind, card.sampler, card.steps) == ("recresacnet", start.card.sampler, start.card.steps)
    assert card.working_size == 17
    assert card.source.split("; ")[0] == f"fine-tuned from {start.card.name} with monai_drdm.train"
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["network"], saved["working_size"], saved["learning_rate"]) == ("recresacnet", 17, 0)


def test_training_changes_all_weights_but_the_time_table(tmp_path, published):
    fit(build_config(settings=[*SMALL, "max_epochs=1"], init=str(published)), tmp_path / "run")
    start = load_network(published).state_dict()
    kept = {name for name, tensor in weights_of(tmp_path / "run").items() if torch.equal(tensor, start[name])}
    assert "time_embed.weight" in kept
    assert not {"conv_out.weight", "b1.0.conv0.weight", "te1.0.weight"} & kept


def test_published_weights_can_be_fine_tuned_by_name(tmp_path, published_weights):
    settings = ["working_size=24", "batch_size=1", "epoch_length=1", "max_epochs=1"]
    fit(build_config(settings=settings, init="zheng2026-cmr-2d"), tmp_path / "run")
    card = load_network(tmp_path / "run" / "network.safetensors").card
    assert (card.sampler, card.steps, card.working_size) == ("fast", 12, 24)
    assert card.source.startswith(
        "fine-tuned from zheng2026-cmr-2d with monai_drdm.train; no better than doing nothing"
    )
    assert card.gates["validation_loss"] > card.gates["validation_loss_of_doing_nothing"]  # on a grid of 24


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("spatial_dims=3", "init must be a 3D network for images of one channel, got 'untrained-2d': 2D recresacnet"),
        ("network=velocity_unet", "init must be a 2D velocity_unet"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, published, setting, message):
    with pytest.raises(ValueError, match=message):
        fit(build_config(settings=[*SMALL, "working_size=25", setting], init=str(published)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_with_more_channels_is_refused(tmp_path):
    save_network(RecResACNet(2, in_channels=2), tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="one channel"):
        fit(build_config(settings=SMALL, init=str(tmp_path / "two.safetensors")), tmp_path / "run")


def test_an_even_size_is_for_recresacnet_only(tmp_path):
    network = VelocityUNet(2, 1, (8, 16))
    network.card = dataclasses.replace(network.card, working_size=25)
    save_network(network, tmp_path / "velocity.safetensors")
    config = build_config(settings=[*SMALL, "working_size=24"], init=str(tmp_path / "velocity.safetensors"))
    with pytest.raises(ValueError, match="working_size must be odd for velocity_unet, got 24"):
        fit(config, tmp_path / "run")


def test_the_folding_penalty_is_added_in_its_weight():
    """A mirrored axis turns every cell inside out: determinants of -1, 1.1 below the margin."""
    task = choose_task(build_config(settings=[*PUBLISHED, "folding_weight=3", "distance_weight=0"]))
    still = torch.zeros(1, 2, 12, 12)
    target = PublishedTarget(still, still)
    mirrored = torch.stack((torch.arange(12.0).view(12, 1).expand(12, 12) / -6, still[0, 0]))[None]
    penalty = task.loss(mirrored, target) - task.error(mirrored, target)
    assert penalty.item() == pytest.approx(3 * 1.1, rel=1e-3)


def test_features_are_those_of_init():
    assert choose_task(build_config(init="anatomy-2d")).config.channels == (16, 32, 64, 96)
    assert choose_task(build_config(init="anatomy-2d", channels=(16, 32, 64, 96))).config.network == "velocity_unet"
    with pytest.raises(ValueError, match=r"channels are those of init 'anatomy-2d', \(16, 32, 64, 96\), got \(8, 16\)"):
        choose_task(build_config(init="anatomy-2d", channels=(8, 16)))

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from monai_drdm.train.__main__ import main
from monai_drdm.train.config import build_config, TrainConfig
from monai_drdm.training.settings import describe_settings


def test_later_sources_win(tmp_path):
    (tmp_path / "run.yaml").write_text("batch_size: 4\nlearning_rate: 1e-3\nchannels: [8, 16]\nmax_minutes: 5\n")
    config = build_config(tmp_path / "run.yaml", ["batch_size=8", "slice_axis=1"], seed=3, device=None)
    assert (config.batch_size, config.channels, config.slice_axis, config.seed) == (8, (8, 16), 1, 3)
    assert config.max_minutes == 5.0
    assert isinstance(config.max_minutes, float)


def test_json_round_trip(tmp_path):
    config = build_config(settings=["noise=0.1", "data=scans"])
    (tmp_path / "config.json").write_text(config.to_json())
    assert build_config(tmp_path / "config.json") == config
    assert config.max_minutes == math.inf
    assert json.loads(config.to_json())["noise"] == 0.1


def test_settings_reach_pose_and_appearance():
    config = build_config(settings=["rotation_deg=0", "gamma=0.1"])
    assert config.pose.rotation_deg == 0.0
    assert config.appearance.gamma == 0.1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["batchsize=8"], ValueError, "unknown settings \\['batchsize'\\]; did you mean batch_size\\? Known are"),
        (["epochs=8"], ValueError, "unknown settings \\['epochs'\\]; did you mean max_epochs\\? Known are"),
        (["Max-Minutes=8", "xyz=1"], ValueError, "\\['Max-Minutes', 'xyz'\\]; did you mean max_minutes\\?"),
        (["xyz=8"], ValueError, "unknown settings \\['xyz'\\]. Known are angle_weight, .*, working_size.$"),
        (["batch_size"], ValueError, "key=value"),
        (["batch_size=0"], ValueError, "batch_size must be in"),
        (["batch_size=2.5"], TypeError, "batch_size must be int"),
        (["batch_size=true"], TypeError, "batch_size must be int"),
        (["bfloat16=1"], TypeError, "bfloat16 must be bool"),
        (["learning_rate=fast"], TypeError, "learning_rate must be float"),
        (["learning_rate=.nan"], TypeError, "learning_rate must be float"),
        (["spatial_dims=4"], ValueError, "spatial_dims must be one of"),
        (["channels=16"], TypeError, "channels must be a list"),
        (["channels=[16]"], ValueError, "two or more"),
        (["channels=[16, 1]"], ValueError, "channels must be in"),
        (["working_size=160"], ValueError, "odd"),
        (["working_size=9"], ValueError, "working_size must be 17 or more"),
        (["network=unet"], ValueError, "network must be one of"),
        (["level_low=0.9", "level_high=0.5"], ValueError, "level_low"),
        (["spatial_dims=3", "slice_axis=0"], ValueError, "slice_axis"),
        (["optimizer=sgd"], ValueError, r"optimizer must be one of \('muon', 'adamw'\), got 'sgd'"),
        (["network=none"], ValueError, "network must be one of"),
        (["seed=[1"], ValueError, "cannot be read"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        build_config(settings=settings)


def test_none_numpy_and_paths():
    config = build_config(settings=["slice_axis=None", "learning_rate=none", "image_channel=null"])
    assert (config.slice_axis, config.learning_rate, config.image_channel) == (None, 5e-3, None)
    given = TrainConfig(batch_size=np.int64(4), scale=np.float32(0.5), channels=(np.int32(4), 8), data=Path("some"))
    assert (given.batch_size, given.scale, given.channels, given.data) == (4, 0.5, (4, 8), "some")
    assert json.loads(given.to_json())["batch_size"] == 4
    with pytest.raises(TypeError, match="batch_size must be int, got True"):
        TrainConfig(batch_size=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ("velocity_unet", 161, 5e-3, "muon")),
        (["spatial_dims=3"], ("velocity_unet", 81, 5e-3, "muon")),
        (["network=recresacnet"], ("recresacnet", 256, 1e-4, "adamw")),
        (["network=recresacnet", "spatial_dims=3"], ("recresacnet", 128, 1e-4, "adamw")),
        (["network=recresacnet", "working_size=160", "learning_rate=1e-3"], ("recresacnet", 160, 1e-3, "adamw")),
        (["init=some.safetensors"], ("", 0, None, None)),
        (["init=some.safetensors", "network=recresacnet"], ("recresacnet", 0, 1e-4, "adamw")),
        (["optimizer=adamw"], ("velocity_unet", 161, 2e-3, "adamw")),
        (["optimizer=muon", "network=recresacnet"], ("recresacnet", 256, 1e-4, "muon")),
    ],
)
def test_what_depends_on_the_network_is_filled_in(settings, expected):
    config = build_config(settings=settings)
    assert (config.network, config.working_size, config.learning_rate, config.optimizer) == expected


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*expected settings"):
        build_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        build_config(tmp_path / "list.yaml")
    (tmp_path / "object.yaml").write_text("seed: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="cannot be read"):
        build_config(tmp_path / "object.yaml")


def test_unknown_flags_and_keys_that_are_no_words(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "run"), "--batch-size", "4"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --batch-size 4; did you mean --set batch_size=VALUE?" in capsys.readouterr().err
    (tmp_path / "keys.yaml").write_text("3: 4\nepochs: 2\n")
    with pytest.raises(ValueError, match=r"unknown settings \['3', 'epochs'\]; did you mean max_epochs\?"):
        build_config(tmp_path / "keys.yaml")


def test_every_setting_has_a_line_of_help():
    lines = describe_settings(TrainConfig).splitlines()
    names = [one.name for one in dataclasses.fields(TrainConfig)]
    assert [line.split(" = ")[0].strip() for line in lines] == names
    assert all(len(line.split(": ", 1)[1]) > 5 for line in lines)


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for one in dataclasses.fields(TrainConfig):
        assert f"  {one.name} = {one.default!r}: {one.metadata['help']}\n" in said

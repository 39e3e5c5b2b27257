from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from matplotlib.figure import Figure
from monai.data import load_decathlon_datalist
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from monai_drdm import __version__, ApplyDDFd
from monai_drdm.augment import augment, AugmentSettings
from monai_drdm.cli import main
from monai_drdm.io import find_cases
from monai_drdm.io.datalists import read_cases
from monai_drdm.io.files import locked
from monai_drdm.networks import save_network, VelocityUNet

LEVELS = ("0.3", "0.6")
OBLIQUE = np.array([[-0.9, 0.2, 0.0, 5.0], [0.15, 1.2, -0.3, -7.0], [0.1, 0.3, 2.9, 11.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three volumes of different size and their labels, as an unscaled int16 and a uint8 NIfTI, and a small network."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, shape in enumerate([(30, 34, 5), (28, 28, 4), (26, 36, 6)]):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = np.sqrt(sum(axis**2 for axis in axes))
        image = nib.Nifti1Image((900 * np.exp(-2 * radius**2) + 100 * axes[0]).astype(np.int16), OBLIQUE)
        label = nib.Nifti1Image(((radius < 0.9) + 2 * (radius < 0.5)).astype(np.uint8), OBLIQUE)
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, folder / "images" / f"case{number}.nii.gz")
        nib.save(label, folder / "labels" / f"case{number}.nii.gz")
    save_network(untrained(), folder / "net.safetensors")
    return folder


def untrained(seed=0):
    """A network on a small working grid that changes fields a little."""
    torch.manual_seed(seed)
    network = VelocityUNet(2, channels=(4, 6))
    torch.nn.init.normal_(network.out.weight, std=0.01)
    network.card = replace(network.card, working_size=33, steps=2)
    return network


@pytest.fixture
def folders(inputs, tmp_path):
    """A copy of the inputs, to be changed, in a folder for all else."""
    return shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def network_file(folders):
    return folders / "net.safetensors"


@pytest.fixture
def command(folders, network_file):
    """The arguments of a run into a folder of a given name."""

    def build(out="out", **changed):
        options = {
            "--images": folders / "images",
            "--labels": folders / "labels",
            "--out": folders / out,
            "--network": network_file,
            "--slice-axis": 2,
            **{f"--{key}": value for key, value in changed.items()},
        }
        flat = [str(one) for pair in options.items() if pair[1] is not None for one in pair]
        return ["augment", *flat, "--levels", *LEVELS]

    return build


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def outputs(folder, kind="images"):
    return sorted((folder / kind).iterdir())


def test_every_case_level_and_draw_is_written_like_its_source(command, folders, capsys):
    assert main(command(draws=2)) == 0
    assert "12 written, 0 already there, 0 cases skipped" in capsys.readouterr().out
    out = folders / "out"
    listed = load_decathlon_datalist(out / "datalist.json", is_segmentation=True)
    assert len(listed) == len(outputs(out)) == len(outputs(out, "fields")) == len(outputs(out, "records")) == 12
    for entry in listed:
        for key in ("image", "label"):
            made = nib.load(entry[key])
            case = os.path.basename(entry[key])[:5]
            source = nib.load(folders / f"{key}s" / f"{case}.nii.gz")
            assert made.shape == source.shape
            assert made.get_data_dtype() == source.get_data_dtype()
            np.testing.assert_array_equal(made.affine, source.affine)
            assert made.header.get_xyzt_units() == source.header.get_xyzt_units()
            assert int(made.header["sform_code"]) == int(source.header["sform_code"])
            assert not np.array_equal(made.dataobj, source.dataobj)
            if key == "label":
                assert set(np.unique(made.dataobj)) <= set(np.unique(source.dataobj))
    names = {path.name for path in outputs(out)}
    assert len({hashlib.sha256((out / "images" / n).read_bytes()).hexdigest() for n in names}) == 12


def test_image_label_and_field_belong_together(command, folders):
    """The written field, read back and applied to the source in a MONAI pipeline, gives the written files."""
    assert main(command()) == 0
    out = folders / "out"
    read = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])
    for path in outputs(out):
        case = path.name[:5] + ".nii.gz"
        source = read({"image": str(folders / "images" / case), "label": str(folders / "labels" / case)})
        again = ApplyDDFd(["image", "label"], out / "fields" / path.name, mode=["bilinear", "nearest"])(source)
        image = np.asarray(nib.load(path).dataobj, dtype=float)
        label = np.asarray(nib.load(out / "labels" / path.name).dataobj)
        assert np.abs(again["image"][0].numpy() - image).max() <= 1.0  # rounded to integers
        assert (again["label"][0].numpy() != label).mean() < 1e-3


def test_records_say_what_was_done(command, folders):
    assert main(command(seed=5, **{"max-displacement-mm": 3.0})) == 0
    levels = set()
    for path in outputs(folders / "out", "records"):
        record = json.loads(path.read_text())
        levels.add(record["params"]["deformation_level"])
        assert record["statistics"]["max_displacement_mm"] <= 3.0
        assert record["params"]["slice_axis"] == 2
        assert record["source"]["image"].endswith(f"{path.name[:5]}.nii.gz")
    assert levels == {0.3, 0.6}


def test_runs_go_on_and_end_alike(command, folders, capsys):
    assert main(command("whole")) == 0
    assert main(command("parts")) == 0
    parts = folders / "parts"
    for path in (outputs(parts, "records")[1], outputs(parts, "images")[3], outputs(parts, "fields")[4]):
        path.unlink()
    kept = outputs(parts)[0]
    (parts / "images" / ".part-1-junk.nii.gz").write_bytes(b"unfinished")
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert main(command("parts")) == 0
    assert "3 written, 3 already there" in capsys.readouterr().out
    assert hashes(parts) == hashes(folders / "whole")
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_runs_go_on(command, folders, fork, kill):
    """At any moment after the first draw; the disk takes five minutes for the last image, so the run does not end."""
    assert main(command("whole")) == 0
    read = Path.read_bytes

    def slow_disk():
        signal.alarm(300)
        Path.read_bytes = lambda path: time.sleep(300) if path.name == "case2.nii.gz" else read(path)

    process = fork(lambda: main(command("killed")), before=slow_disk)
    records = folders / "killed" / "records"
    while not (records.is_dir() and any(records.iterdir())) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(kill)
    _, errors = process.communicate()
    assert process.returncode == (130 if kill == signal.SIGINT else -kill)
    assert ("interrupted" in errors) == (kill == signal.SIGINT)
    assert main(command("killed")) == 0
    assert hashes(folders / "killed") == hashes(folders / "whole")


def test_nothing_is_overwritten_without_force(command, folders, capsys):
    taken = folders / "out"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    assert main(command()) == 1
    assert "--force" in capsys.readouterr().err
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    assert main([*command(), "--force"]) == 0
    assert (taken / "mine.txt").read_text() == "precious"
    first = hashes(taken)
    assert main(command(seed=1)) == 1
    assert "other settings" in capsys.readouterr().err
    assert hashes(taken) == first
    assert main([*command(seed=1), "--force"]) == 0
    second = hashes(taken)
    images = [name for name in first if name.startswith("images")]
    assert all(first[name] != second[name] for name in images)


def test_bad_cases_are_skipped_and_reported(command, folders, capsys):
    whole = (folders / "images" / "case0.nii.gz").read_bytes()
    (folders / "images" / "case0.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folders / "labels" / "case1.nii.gz").unlink()
    nan = nib.Nifti1Image(np.full((20, 20, 3), np.nan, np.float32), np.eye(4))
    nib.save(nan, folders / "images" / "nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 3), np.uint8), np.eye(4)), folders / "labels" / "nan.nii")
    assert main(command()) == 3
    out, errors = capsys.readouterr()
    assert "2 written, 0 already there, 3 cases skipped" in out
    for name, reason in (("case0", "cannot be read"), ("case1", "no file"), ("nan", "NaN")):
        (line,) = [one for one in errors.replace("\r", "\n").splitlines() if f"skipped {name}:" in one]
        assert reason in line
    listed = load_decathlon_datalist(folders / "out" / "datalist.json", is_segmentation=True)
    assert {os.path.basename(entry["image"])[:5] for entry in listed} == {"case2"}
    (folders / "images" / "case0.nii.gz").write_bytes(whole)  # once mended, the case is added
    assert main(command()) == 3
    assert "2 written, 2 already there, 2 cases skipped" in capsys.readouterr().out


def allow_9000_bytes():
    """The operating system refuses larger files, as it does when the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))


def test_a_full_disk_stops_cleanly(command, folders, fork):
    done = fork(lambda: main(command()), before=allow_9000_bytes)
    _, errors = done.communicate()
    assert done.returncode == 1
    message = errors.strip().splitlines()[-1]
    assert "cannot be written" in message
    assert "goes on" in message
    assert "Traceback" not in errors
    out = folders / "out"
    assert not [path for path in out.rglob("*") if path.name.startswith(".part")]
    assert main(command()) == 0
    assert main(command("whole")) == 0
    assert hashes(out) == hashes(folders / "whole")


def test_datalists_and_other_formats(command, folders, network_file):
    """A datalist of 2D files in two formats, one without a label, with file names that repeat."""
    for name in ("a", "b"):
        (folders / name).mkdir()
    pixels = (np.random.RandomState(0).rand(24, 30) * 200).astype(np.uint8)
    png = SimpleITK.GetImageFromArray(pixels)
    SimpleITK.WriteImage(png, str(folders / "a" / "x.png"))
    mha = SimpleITK.GetImageFromArray(pixels.astype(np.float32))
    mha.SetSpacing((0.5, 2.0))
    mha.SetOrigin((3.0, -4.0))
    SimpleITK.WriteImage(mha, str(folders / "b" / "x.mha"))
    SimpleITK.WriteImage(png > 100, str(folders / "b" / "y.png"))
    entries = [{"image": "a/x.png"}, {"image": "b/x.mha", "label": "b/x_label.mha"}]
    label = mha > 100
    SimpleITK.WriteImage(label, str(folders / "b" / "x_label.mha"))
    (folders / "list.json").write_text(json.dumps({"fold0": entries}))
    arguments = ["--datalist", str(folders / "list.json"), "--section", "fold0", "--out", str(folders / "out")]
    assert main(["augment", *arguments, "--network", str(network_file), "--levels", "0.4"]) == 0
    made = SimpleITK.ReadImage(str(folders / "out" / "images" / "b_x_level0.4_draw0.mha"))
    assert made.GetSpacing() == mha.GetSpacing()
    assert made.GetOrigin() == mha.GetOrigin()
    assert made.GetPixelID() == mha.GetPixelID()
    assert (
        SimpleITK.ReadImage(str(folders / "out" / "images" / "a_x_level0.4_draw0.png")).GetPixelID() == png.GetPixelID()
    )
    listed = json.loads((folders / "out" / "datalist.json").read_text())["training"]
    assert [sorted(entry) for entry in listed] == [["image"], ["image", "label"]]


def test_two_raters_of_an_image(folders, tmp_path):
    """A case for each label; the same entry twice is still a mistake."""
    entries = [{"image": "images/case0.nii.gz", "label": f"labels/case{n}.nii.gz"} for n in (0, 1)]
    entries.append({"image": "images/case2.nii.gz", "label": "labels/case2.nii.gz"})
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    assert [case.name for case in read_cases(tmp_path / "list.json")] == ["case0_case0", "case0_case1", "case2"]
    (tmp_path / "list.json").write_text(json.dumps({"training": [*entries, entries[0]]}))
    with pytest.raises(ValueError, match="called alike: \\['case0_case0'\\]"):
        read_cases(tmp_path / "list.json")


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


@pytest.mark.parametrize("labelled", [True, False])
def test_figure_has_one_row_a_case(command, folders, figures, labelled):
    """Its original once, the first draw of each level, and a grid; the slice is the middle one of the label."""
    if not labelled:
        shutil.rmtree(folders / "labels")
    labels = {} if labelled else {"labels": None}
    assert main([*command(draws=2, **labels), "--figure"]) == 0
    assert (folders / "out" / "overview.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = figures
    assert [text.get_text() for text in figure.texts] == ["case0", "case1", "case2"]
    assert [axis.get_title() for axis in figure.axes] == [
        "original",
        "level 0.3",
        "level 0.6",
        "field of level 0.6",
    ] * 3
    for number, size in enumerate((5, 4, 6)):
        paths = [f"images/case{number}.nii.gz"]
        paths += [f"out/images/case{number}_level{level}_draw0.nii.gz" for level in LEVELS]
        middle = {5: 2, 4: 1 if labelled else 2, 6: 2 if labelled else 3}[size]  # four and six have two middle slices
        for axis, path in zip(figure.axes[4 * number :], paths):
            # the first axis of these files points to the left side, the second one to the front
            expected = np.asarray(nib.load(folders / path).dataobj)[:, :, middle]
            np.testing.assert_array_equal(axis.images[0].get_array(), expected.T)
            outlined = [one for one in axis.collections if len(one.get_paths())]
            assert len(outlined) == (2 if labelled else 0)
            assert axis.get_aspect() == pytest.approx(np.linalg.norm(OBLIQUE[:3, 1]) / np.linalg.norm(OBLIQUE[:3, 0]))


def test_figure_of_a_colour_image(command, folders, figures):
    """As it was, not its first channel upside down."""
    shutil.rmtree(folders / "images")
    (folders / "images").mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(colours).save(folders / "images" / "cells.png")
    arguments = [one for one in command(labels=None) if one not in ("--slice-axis", "2")]
    assert main([*arguments, "--figure"]) == 0
    shown = np.asarray(figures[0].axes[0].images[0].get_array())
    top = np.percentile(colours, 99.8)
    np.testing.assert_allclose(shown[::-1], (colours / top).clip(0, 1), atol=0.01)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": "no/such/folder"}, "no folder"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"network": "nonsense"}, "nonsense"),
        ({"network": "missing.safetensors"}, "missing.safetensors"),
        ({"slice-axis": 3}, "slice_axis"),
    ],
)
def test_wrong_calls_are_explained_before_anything_is_made(command, folders, changed, message, capsys):
    assert main(command(**changed)) == 1
    assert message in capsys.readouterr().err
    assert not (folders / "out").exists()


@pytest.mark.parametrize("name", ["images", "labels"])
def test_an_empty_path_is_not_the_current_folder(command, name, capsys):
    """As of a shell variable that is not set."""
    with pytest.raises(SystemExit) as exit_:
        main(command(**{name: ""}))
    assert exit_.value.code == 2
    assert "expected a path, got an empty text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="images must name a folder"):
        find_cases("")


def test_wrong_levels_and_datalists(command, folders, capsys):
    assert main([*command()[:-2], "1.5"]) == 1
    assert "deformation_level" in capsys.readouterr().err
    for text in ("nothing", "{}", '{"training": [{"label": "a"}]}', '{"training": []}'):
        (folders / "list.json").write_text(text)
        code = main(["augment", "--datalist", str(folders / "list.json"), "--out", str(folders / "out")])
        assert code == 1
        assert "list.json" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_hippocampus_volumes_interrupted_and_resumed(data, inputs, tmp_path, fork):
    """Five real volumes: a run stopped after some draws and called again ends like one that was not."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for path in sorted((data / "hippocampus" / kind).iterdir())[:5]:
            (tmp_path / kind / path.name).symlink_to(path)
    arguments = ["augment", "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    arguments += ["--network", str(inputs / "net.safetensors"), "--slice-axis", "2", "--levels", "0.5", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    process = fork(lambda: main([*arguments, str(tmp_path / "resumed")]))
    records = tmp_path / "resumed" / "records"
    while process.poll() is None and not (records.is_dir() and len(list(records.iterdir())) >= 2):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert len(list(records.iterdir())) >= 2
    assert main([*arguments, str(tmp_path / "resumed")]) == 0
    assert len(outputs(tmp_path / "resumed")) == 5
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")
    assert len(hashes(tmp_path / "whole")) == 22


def test_draws_from_other_files_are_not_taken_for_these(command, folders, capsys):
    """Another image, or a label that was not there before, under the same name."""
    without = command(labels=None)
    assert main(without) == 0
    before = hashes(folders / "out")
    assert main(command()) == 1
    assert "made from other files" in capsys.readouterr().err
    source = nib.load(folders / "images" / "case0.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj) + np.int16(1), OBLIQUE), folders / "images" / "case0.nii.gz")
    assert main(without) == 1
    assert "case0_level0.3_draw0" in capsys.readouterr().err
    assert hashes(folders / "out") == before
    assert main([*command(), "--force"]) == 0
    listed = json.loads((folders / "out" / "datalist.json").read_text())["training"]
    assert len(listed) == 6
    assert all("label" in entry for entry in listed)


def test_forced_runs_that_are_interrupted_go_on(command, folders, fork):
    """What was there before a forced run is not taken for its work."""
    assert main(command()) == 0
    (folders / "out" / "images" / "case0_level0.3_draw0.nii.gz").write_bytes(b"edited")
    process = fork(lambda: main([*command(), "--force"]), before=allow_9000_bytes)
    process.communicate()
    assert process.returncode == 1
    assert main(command()) == 0
    assert main(command("whole")) == 0
    assert hashes(folders / "out") == hashes(folders / "whole")


def test_folders_of_version_1_0_are_continued_without_symmetry(command, folders, capsys):
    """That version did not keep it, and its settings do not name it."""
    assert main(command(symmetry=0)) == 0
    settings, records = folders / "out" / "settings.json", sorted((folders / "out" / "records").iterdir())
    ours = settings.read_text()
    assert "symmetry" not in json.loads(ours)
    text = ours.replace(json.dumps(__version__), '"1.0.0rc1"')
    settings.write_text(text)
    for path in records:
        sha256 = [hashlib.sha256(one.encode()).hexdigest() for one in (ours, text)]
        path.write_text(path.read_text().replace(*sha256))
    records[0].unlink()
    capsys.readouterr()
    assert main(command(symmetry=0)) == 0
    assert "1 written, 5 already there" in capsys.readouterr().out
    assert settings.read_text() == text
    assert main(command(symmetry=0)) == 0
    assert "0 written, 6 already there" in capsys.readouterr().out
    assert main(command()) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["augment", "pairs"])
def test_figure_of_a_volume_of_one_slice(command, folders, what):
    for name in ("images", "labels"):
        for path in (folders / name).iterdir():
            image = nib.load(path)
            nib.save(image.slicer[:, :, :1], path)
    _, *rest = command()
    rest = rest if what == "augment" else rest[: rest.index("--levels")]
    assert main([what, *rest, "--figure"]) == 0
    assert (folders / "out" / "overview.png").stat().st_size > 10_000


def test_force_does_not_replace_a_datalist_of_others(command, folders, capsys):
    (folders / "images").rename(folders / "imagesTr")
    text = json.dumps({"training": [{"image": "imagesTr/case0.nii.gz", "fold": 0}]})
    (folders / "datalist.json").write_text(text)
    arguments = command(out=".", images=None, labels=None, datalist=folders / "datalist.json")
    assert main([*arguments, "--force"]) == 1
    assert "datalist.json is not of a run" in capsys.readouterr().err
    assert (folders / "datalist.json").read_text() == text


def test_levels_of_any_kind_of_number_are_one_setting():
    settings = [AugmentSettings(levels=levels) for levels in ((1,), (1.0,), (np.float32(1),))]
    assert len({one.to_json() for one in settings}) == 1
    with pytest.raises(ValueError, match="cases must be one or more"):
        augment([], "nowhere", settings[0])
    assert not Path("nowhere").exists()


def test_weights_are_known_by_what_they_hold(command, folders, network_file, capsys):
    assert main(command()) == 0
    moved = folders / "renamed.safetensors"
    moved.write_bytes(network_file.read_bytes())
    assert main(command(network=moved)) == 0
    assert "0 written, 6 already there" in capsys.readouterr().out
    moved.unlink()
    save_network(untrained(seed=1), moved)
    assert main(command(network=moved)) == 1
    assert "other settings" in capsys.readouterr().err


def test_one_run_at_a_time(command, folders, capsys):
    (folders / "out").mkdir()
    with locked(folders / "out"):
        assert main(command()) == 1
        assert main(command(shard="0/2")) == 1
        assert capsys.readouterr().err.count("another run") == 2
        assert [path.name for path in (folders / "out").iterdir()] == [".lock-whole"]
    assert main(command()) == 0
    assert main(command()) == 0


def test_fewer_cases_leave_the_others_listed(command, folders):
    assert main(command()) == 0
    for name in ("images", "labels"):
        (folders / name / "case2.nii.gz").unlink()
    assert main(command()) == 0
    listed = json.loads((folders / "out" / "datalist.json").read_text())["training"]
    assert len(listed) == 6


def test_a_folder_made_by_hand_or_by_a_run_killed_at_once(command, folders):
    (folders / "out").mkdir()
    (folders / "out" / ".part-0-settings.json").write_text("{")
    assert main(command()) == 1  # not ours to say what this is
    (folders / "out" / ".part-0-settings.json").unlink()
    assert main(command()) == 0


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_devices_that_are_not_there(command, folders, device, capsys):
    assert main(command(device=device)) == 1
    assert device in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_levels_that_look_alike(command, folders, capsys):
    assert main([*command()[:-2], "0.5", "0.5000001"]) == 1
    assert "levels" in capsys.readouterr().err


def test_masks_that_would_lose_their_classes_are_skipped(folders, network_file, capsys):
    """A PNG of 1 bit, which readers turn into 0 and 255."""
    from PIL import Image

    for name in ("p", "q"):
        (folders / name).mkdir()
    grey = np.linspace(0, 255, 30 * 24).reshape(30, 24).astype(np.uint8)
    for number, mask in enumerate((Image.fromarray(grey > 100), Image.fromarray(grey // 100).convert("P"))):
        Image.fromarray(grey).save(folders / "p" / f"{number}.png")
        mask.save(folders / "q" / f"{number}.png")
    arguments = ["--images", str(folders / "p"), "--labels", str(folders / "q"), "--out", str(folders / "out")]
    assert main(["augment", *arguments, "--network", str(network_file), "--levels", "0.4"]) == 1
    assert capsys.readouterr().err.count("Convert palettes and 1-bit masks") == 2


def test_a_field_of_a_png_lies_on_it_as_monai_loads_it(folders, network_file):
    (folders / "p").mkdir()
    pixels = (np.random.RandomState(0).rand(24, 30) * 200).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels), str(folders / "p" / "x.png"))
    arguments = ["--images", str(folders / "p"), "--out", str(folders / "out"), "--levels", "0.4"]
    assert main(["augment", *arguments, "--network", str(network_file)]) == 0
    name = "x_level0.4_draw0"
    field = folders / "out" / "fields" / f"{name}.nii.gz"
    read = Compose([LoadImaged("image", ensure_channel_first=True), ApplyDDFd("image", field)])
    ours = read({"image": str(folders / "p" / "x.png")})["image"][0].numpy()
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders / "out" / "images" / f"{name}.png"))).T
    assert np.abs(ours - theirs).max() <= 0.51


def with_forms(sform, qform, codes, unit="mm"):
    """A NIfTI header whose two forms may say different places."""
    file = nib.Nifti1Image(np.zeros((22, 24, 20), np.float32), np.eye(4))
    file.set_sform(sform, code=codes[0])
    file.set_qform(qform, code=codes[1])
    file.header.set_xyzt_units(unit)
    return file.header


TURNED = np.array([[0.0, -1.5, 0, 9], [2, 0, 0, -4], [0, 0, 1.8, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize("command_name", ["augment", "pairs"])
@pytest.mark.parametrize(
    "header",
    [
        with_forms(OBLIQUE, TURNED, (2, 1)),
        with_forms(OBLIQUE, TURNED, (1, 2)),
        with_forms(OBLIQUE, TURNED, (0, 1)),
        with_forms(OBLIQUE, TURNED, (0, 0)),
        with_forms(OBLIQUE, OBLIQUE, (1, 1), "micron"),
        with_forms(np.array([[2, 0.8, 0, 0], [0, 1.5, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), OBLIQUE, (4, 1)),
    ],
    ids=["qform", "sform", "qform alone", "no form", "micron", "sheared sform"],
)
def test_a_field_lies_where_itk_and_where_monai_place_the_image(folders, network_file, header, command_name):
    """Images whose sform and qform disagree: SimpleITK and ApplyDDFd both warp by the file what was written."""
    (folders / "n").mkdir()
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (22, 24, 20)), indexing="ij")
    wave = (100 + 60 * np.sin(4 * axes[0] + 1) + 60 * np.cos(5 * axes[1])).astype(np.float32)
    given = str(folders / "n" / "x.nii.gz")
    nib.save(nib.Nifti1Image(wave, None, header), given)
    out, network = folders / "out", ["--network", str(network_file), "--slice-axis", "2"]
    how = ["--levels", "0.4"] if command_name == "augment" else ["--no-augmentation", "--synthesis-level", "0.3", "0.4"]
    assert main([command_name, "--images", str(folders / "n"), "--out", str(out), *network, *how]) == 0
    [fixed] = map(str, (out / ("images" if command_name == "augment" else "fixed")).iterdir())
    [field] = map(str, (out / "fields").iterdir())

    moving, target = (SimpleITK.ReadImage(path, SimpleITK.sitkFloat64) for path in (given, fixed))
    transform = SimpleITK.DisplacementFieldTransform(SimpleITK.ReadImage(field, SimpleITK.sitkVectorFloat64))
    warped = SimpleITK.Resample(moving, target, transform, SimpleITK.sitkLinear, float("nan"))
    warped, target, moving = (SimpleITK.GetArrayFromImage(image) for image in (warped, target, moving))
    there = np.isfinite(warped)
    assert there.mean() > 0.6
    assert np.abs(warped - target)[there].mean() < 0.05 * np.abs(moving - target)[there].mean()

    read = Compose([LoadImaged("image", ensure_channel_first=True), ApplyDDFd("image", field)])
    ours = read({"image": given})["image"][0].numpy()
    assert np.abs(ours - target.T).max() < 0.02 * np.abs(moving - target).max()


def test_files_are_the_same_whatever_the_split(command, folders):
    """Shards, one of them in a worker of its own, which is a new interpreter."""
    assert main(command(out="whole")) == 0
    for part in (1, 2):
        assert main(command(out="shards", shard=f"{part}/3")) == 0
    assert main(command(out="shards", shard="0/3", workers=2)) == 0  # one image, so only one worker is started
    assert hashes(folders / "shards") == hashes(folders / "whole")


def test_workers_share_the_work_and_skip_bad_cases_too(command, folders, network_file, capsys):
    """In forks, which are there at once; they write what one process writes."""
    nib.save(nib.Nifti1Image(np.full((8, 8, 2), np.nan, np.float32), OBLIQUE), folders / "images" / "case1.nii.gz")
    assert main(command(out="one")) == 3
    assert "4 written, 0 already there, 1 cases skipped" in capsys.readouterr().out
    settings = AugmentSettings(levels=tuple(map(float, LEVELS)), network=str(network_file), slice_axis=2)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), signal.alarm, (300,)) as executor:
        cases = find_cases(folders / "images", folders / "labels")
        report = augment(cases, folders / "workers", settings, executor=executor)
    assert (report.written, report.kept, list(report.failed)) == (4, 0, ["case1"])
    assert hashes(folders / "workers") == hashes(folders / "one")


def test_shards_run_side_by_side_but_not_beside_a_whole_run(command, folders, capsys):
    assert main(command(shard="0/2")) == 0
    with locked(folders / "out", shared=True):
        assert main(command(shard="1/2")) == 0
        assert main(command()) == 1
        assert "another run is writing" in capsys.readouterr().err
    assert main([*command(shard="0/2"), "--force"]) == 1
    assert "force and shard do not go together" in capsys.readouterr().err


def test_cases_that_get_other_names_are_listed_once(folders, network_file):
    """A second case of the same file name puts folders before both."""
    for part, number in (("p1", 0), ("p2", 1)):
        (folders / part).mkdir()
        (folders / "images" / f"case{number}.nii.gz").rename(folders / part / "t1.nii.gz")
    run = ["augment", "--datalist", str(folders / "list.json"), "--out", str(folders / "out"), "--levels", "0.5"]
    for parts in (["p1"], ["p1", "p2"]):
        entries = [{"image": f"{part}/t1.nii.gz"} for part in parts]
        (folders / "list.json").write_text(json.dumps({"training": entries}), encoding="utf-8")
        assert main([*run, "--network", str(network_file), "--slice-axis", "2"]) == 0
        listed = json.loads((folders / "out" / "datalist.json").read_text(encoding="utf-8"))["training"]
        assert len(listed) == len(parts)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_results_do_not_go_among_the_inputs(command, folders, capsys, force):
    before = hashes(folders)
    assert main([*command(out="."), *force]) == 1
    assert "where inputs are" in capsys.readouterr().err
    assert hashes(folders) == before


def test_a_name_that_is_too_long_is_one_bad_case(command, folders, capsys):
    for kind in ("images", "labels"):
        (folders / kind / "case0.nii.gz").rename(folders / kind / f"{'x' * 246}.nii.gz")
        (folders / kind / "case1.nii.gz").rename(folders / kind / f"{'y' * 200}.nii.gz")
    assert main(command()) == 3
    assert "4 written, 0 already there, 1 cases skipped" in capsys.readouterr().out


def test_figure_of_a_run_whose_sources_moved(command, folders, capsys):
    assert main(command()) == 0
    for kind in ("images", "labels"):
        (folders / kind).rename(folders / f"moved_{kind}")
    moved = {"images": folders / "moved_images", "labels": folders / "moved_labels"}
    for kind in ("images", "labels"):  # one of three comes back
        (folders / kind).mkdir()
        (folders / kind / "case2.nii.gz").write_bytes((moved[kind] / "case2.nii.gz").read_bytes())
    assert main([*command(**moved), "--figure"]) == 0
    assert (folders / "out" / "overview.png").stat().st_size > 1000

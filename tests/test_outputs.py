"""Folders that ``augment`` and ``pairs`` wrote and something happened to: what is not whole does not count as done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged
from scipy.ndimage import map_coordinates

from monai_drdm.augment import augment, AugmentSettings, make_pairs, PairSettings
from monai_drdm.augment.draw_record import DrawRecord
from monai_drdm.cli import main
from monai_drdm.io import Case, find_cases, load_ddf
from monai_drdm.networks import save_network, VelocityUNet

HERE = os.getpid()
LEVEL = 0.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three small pictures, their labels, and a network that changes fields a little."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, shape in enumerate([(26, 30), (28, 22), (24, 24)]):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = np.sqrt(sum(axis**2 for axis in axes))
        image = (900 * np.exp(-2 * radius**2) + 100 * axes[0]).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"case{number}.nii.gz")
        label = ((radius < 0.9) + 2 * (radius < 0.5)).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"case{number}.nii.gz")
    torch.manual_seed(0)
    network = VelocityUNet(2, channels=(4, 6))
    torch.nn.init.normal_(network.out.weight, std=0.01)
    network.card = replace(network.card, working_size=33, steps=2)
    save_network(network, folder / "net.safetensors")
    return folder


@pytest.fixture(scope="module", params=["augment", "pairs"])
def run(request, inputs):
    """A run of either command into a folder; its exit code."""

    def call(out, *more):
        given = ["--images", inputs / "images", "--labels", inputs / "labels", "--network", inputs / "net.safetensors"]
        level = ["--levels", LEVEL] if request.param == "augment" else ["--synthesis-level", LEVEL, LEVEL]
        return main([request.param, *map(str, [*given, "--out", out, *level, *more])])

    call.command = request.param
    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run(folder) == 0
    return folder


@pytest.fixture
def out(whole, tmp_path):
    """A copy of a finished folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def outputs_of(folder, case):
    record = json.loads(next((folder / "records").glob(f"{case}_*")).read_text())
    return [folder / file for file in record["files"].values()]


def listed(folder):
    return (folder / "datalist.json").read_text()


def halved(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize(("damage", "number"), [(halved, 0), (flipped, 1), (lambda data: b"", -1)])
def test_outputs_that_are_not_what_was_written_are_named_and_left_alone(run, out, whole, capsys, damage, number):
    path = outputs_of(out, "case1")[number]
    path.write_bytes(damage(path.read_bytes()))
    before = hashes(out)
    assert run(out) == 3
    said = capsys.readouterr()
    assert "0 written, 2 already there, 1 cases skipped" in said.out
    assert f"skipped case1: {path.relative_to(out)} in {out}: not what was written" in said.err
    assert "case1" not in listed(out)
    assert "case0" in listed(out)
    assert {**hashes(out), "datalist.json": ""} == {**before, "datalist.json": ""}
    path.unlink()
    assert run(out) == 0
    assert hashes(out) == hashes(whole)


def test_an_edited_label_is_not_replaced_because_another_file_is_gone(run, out, capsys):
    image, label = outputs_of(out, "case1")[slice(0, 2) if run.command == "augment" else slice(1, 3)]
    image.unlink()
    nib.save(nib.Nifti1Image(np.zeros((28, 22), np.uint8), np.eye(4)), label)
    mine = label.read_bytes()
    assert run(out) == 3
    assert label.name in capsys.readouterr().err
    assert label.read_bytes() == mine
    assert run(out, "--force") == 0
    assert label.read_bytes() != mine


def test_every_output_changed_is_an_error_and_none_is_listed(run, out, capsys):
    for case in ("case0", "case1", "case2"):
        path = outputs_of(out, case)[0]
        path.write_bytes(halved(path.read_bytes()))
    assert run(out) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("monai-drdm: none of 3 cases can be used")
    assert json.loads(listed(out)) == {"training": []}


def test_records_of_before_there_were_hashes_are_records(run, out, whole, capsys):
    for path in (out / "records").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: one for key, one in record.items() if key not in ("outputs", "format")}))
    capsys.readouterr()
    assert run(out) == 0
    assert "0 written, 3 already there" in capsys.readouterr().out
    assert listed(out) == listed(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("files"),
        lambda record: record["files"].update(image="../../../secret.nii"),
        lambda record: record["files"].update(image="/etc/hostname"),
    ],
)
def test_edited_records_are_none_and_lead_nowhere(run, out, whole, change):
    path = next((out / "records").glob("case1_*"))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=f"{path.name} cannot be read as the record of a draw"):
        assert run(out) == 0
    assert hashes(out) == hashes(whole)
    foreign = path.with_name("case7_level0.5_draw0.json")  # of a case that is not in this run
    foreign.write_text(json.dumps({**record, "name": foreign.stem}))
    with pytest.warns(UserWarning, match=f"{foreign.name} cannot be read as the record of a draw"):
        assert run(out) == 0
    assert listed(out) == listed(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "case9"},
        {"name": None},
        {"files": [1]},
        {"files": {"image": 1}},
        {"source": None},
        {"inputs_sha256": {"image": 1}},
        {"outputs": {"image": 3}},
        {"outputs": {"image": {"bytes": 3}}},
        {"format": 9},
        {"extra": 1},
        *(
            {"files": {"image": file}}
            for file in (
                "images/../../case1_draw0.nii",
                "records/case1_draw0.json",
                "images/case2_draw0.nii",
                "images",
                "",
                "./images/../case1_draw0.nii",
                "/images/case1_draw0.nii",
                "images/sub/case1_draw0.nii",
            )
        ),
    ],
)
def test_what_is_no_record_of_a_draw(change):
    names = {"source", "inputs_sha256", "params", "statistics"}
    record = {**{name: {} for name in names}, "files": {"image": "images/case1_draw0.nii"}, "settings_sha256": "ab"}
    record["name"] = "case1_draw0"
    assert DrawRecord.of(record, "case1_draw0", ["images"]).outputs == {}
    with pytest.raises((TypeError, ValueError)):
        DrawRecord.of({**record, **change}, "case1_draw0", ["images"])


@pytest.mark.parametrize(("kind", "force"), [(0, []), (-1, ["--force"]), ("records", [])])
def test_outputs_do_not_follow_links_out_of_the_folder(run, whole, tmp_path, capsys, kind, force):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    name = kind if kind == "records" else outputs_of(whole, "case0")[kind].parent.name
    elsewhere.mkdir()
    (elsewhere / ".part-mine").write_text("precious")
    out.mkdir()
    (out / name).symlink_to(elsewhere)
    assert run(out, "--force") == 1
    assert f"{out / name} is a link to {elsewhere}" in capsys.readouterr().err
    (out / name).unlink()
    shutil.copytree(whole, out, dirs_exist_ok=True)
    shutil.rmtree(out / name)
    (out / name).symlink_to(elsewhere)
    assert run(out, *force) == 1
    assert [path.name for path in elsewhere.iterdir()] == [".part-mine"]
    linked = tmp_path / "linked"
    linked.symlink_to(elsewhere)
    assert run(linked / "out") == 0  # what the user names may lie behind links


def test_a_run_in_which_every_case_fails_for_one_reason_says_it_once_and_last(run, inputs, tmp_path, capsys):
    network = VelocityUNet(3, channels=(4, 6))
    save_network(network, tmp_path / "net3.safetensors")
    assert run(tmp_path / "out", "--network", tmp_path / "net3.safetensors") == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()  # no bar, no case for itself
    assert line.startswith("monai-drdm: none of 3 cases can be used, all for one reason, here that of case0: ")
    assert "deforms 3D images" in line
    assert not (tmp_path / "out" / "datalist.json").exists()
    code = main(
        [
            "bank",
            "build",
            "--images",
            str(inputs / "images"),
            "--out",
            str(tmp_path / "bank"),
            "--network",
            str(tmp_path / "net3.safetensors"),
        ]
    )
    assert code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "none of 3 cases can be used, all for one reason" in line


def test_a_bar_comes_with_the_first_case_that_is_done(inputs, tmp_path, capsys):
    """And with it the lines of those that were skipped before."""
    for kind in ("images", "labels"):
        shutil.copytree(inputs / kind, tmp_path / kind)
    (tmp_path / "images" / "case0.nii.gz").write_bytes(b"")
    arguments = ["--images", tmp_path / "images", "--out", tmp_path / "out", "--levels", LEVEL]
    assert main(["augment", *map(str, arguments), "--network", str(inputs / "net.safetensors")]) == 3
    errors = capsys.readouterr().err
    assert errors.index("skipped case0") < errors.index("%|")
    assert "3/3" in errors


def test_several_images_of_a_case_are_moved_by_one_field(inputs, tmp_path):
    """As MONAI's ``LoadImaged`` reads them before and after; the field is that of the chosen one."""
    rng = np.random.default_rng(0)
    for name in ("t1", "t2"):
        nib.save(nib.Nifti1Image(rng.normal(size=(30, 26)).astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    shutil.copy(tmp_path / "t2.nii.gz", tmp_path / "twin.nii.gz")
    nib.save(nib.Nifti1Image((rng.random((30, 26)) > 0.5).astype(np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    common = ["--network", str(inputs / "net.safetensors"), "--levels", str(LEVEL), "--figure"]
    fields = {}
    for number in (0, 1, 2):
        images = ["t1.nii.gz", "t2.nii.gz", "twin.nii.gz"]
        (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": images, "label": "label.nii.gz"}]}))
        out = tmp_path / f"out{number}"
        arguments = ["--datalist", str(tmp_path / "list.json"), "--out", str(out), "--image-number", str(number)]
        assert main(["augment", *arguments, *common]) == 0
        (entry,) = load_decathlon_datalist(out / "datalist.json", is_segmentation=True)
        moved = LoadImaged(["image", "label"])(entry)
        assert moved["image"].shape == (3, 30, 26)
        assert torch.equal(moved["image"][1], moved["image"][2])
        fields[number] = load_ddf(next((out / "fields").iterdir())).as_tensor()
        grid = np.stack(np.meshgrid(np.arange(30), np.arange(26), indexing="ij")) + fields[number].numpy()
        for one, name in zip(moved["image"], ("t1", "t2")):
            expected = map_coordinates(nib.load(tmp_path / f"{name}.nii.gz").get_fdata(), grid, order=1, mode="nearest")
            np.testing.assert_allclose(one, expected, atol=2e-3)
        assert (out / "overview.png").stat().st_size > 1000
    assert torch.equal(fields[1], fields[2])
    assert (fields[0] - fields[1]).abs().max() > 0.05
    assert main(["augment", *arguments[:-1], "3", *common, "--force"]) == 1
    assert main(["pairs", *arguments[:4], *common[:2]]) == 1


def test_images_on_other_grids_are_one_bad_case(inputs, tmp_path, capsys):
    images = [str(inputs / "images" / f"case{number}.nii.gz") for number in (0, 1)]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": images}]}))
    arguments = ["--datalist", str(tmp_path / "list.json"), "--out", str(tmp_path / "out")]
    assert main(["augment", *arguments, "--network", str(inputs / "net.safetensors")]) == 1
    assert "must have one spatial shape" in capsys.readouterr().err


class _Deadly(type(Path())):
    """A file that kills the process that looks at it, unless that is the one that runs the tests."""

    def __fspath__(self):
        if os.getpid() != HERE:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__fspath__()


@pytest.mark.parametrize("function", [augment, make_pairs])
def test_a_case_that_kills_its_workers_is_skipped_with_its_name(inputs, tmp_path, function):
    network = str(inputs / "net.safetensors")
    settings = AugmentSettings(network=network, levels=(LEVEL,)) if function is augment else PairSettings(network)
    cases = find_cases(inputs / "images", inputs / "labels")
    cases[1] = Case("deadly", _Deadly(cases[1].image), None)
    executor = ProcessPoolExecutor(2, multiprocessing.get_context("fork"), signal.alarm, (120,))
    with executor, pytest.warns(UserWarning, match="a worker was lost"):
        report = function(cases, tmp_path / "out", settings, executor=executor)
    # the pool may break after a case is written and before it is reported; its repetition then finds it there
    assert report.written + report.kept == 2
    assert set(report.failed) == {"deadly"}
    assert "died, and so did the next one" in report.failed["deadly"]


def test_two_runs_into_one_folder_at_once(run, whole, tmp_path, fork):
    """One of them is told that there is another, or finds all done."""
    out = tmp_path / "out"
    processes = [fork(lambda: run(out), before=lambda: signal.alarm(120)) for _ in range(2)]
    ends = [(one.communicate()[1], one.returncode) for one in processes]
    assert 0 in {code for _, code in ends}
    assert all(code == 0 or "another run is writing" in said for said, code in ends)
    assert hashes(out) == hashes(whole)


def test_two_shards_at_once_killed_at_once(run, whole, tmp_path, fork):
    out = tmp_path / "out"
    for kill in (True, False):
        shards = [
            fork(lambda part=part: run(out, "--shard", f"{part}/2"), before=lambda: signal.alarm(120))
            for part in (0, 1)
        ]
        while kill and shards[0].poll() is None and not any((out / "records").glob("*")):
            time.sleep(0.002)
        for shard in shards:
            if kill:
                shard.kill()
            shard.communicate()
        assert kill or [shard.returncode for shard in shards] == [0, 0]
    assert run(out) == 0
    assert hashes(out) == hashes(whole)


def test_a_folder_that_vanishes_during_a_run(run, whole, tmp_path, fork):
    """The run stops with one line; once the folder is back, the same call goes on."""
    out = tmp_path / "out"
    process = fork(lambda: run(out), before=lambda: signal.alarm(120))
    while process.poll() is None and not any((out / "records").glob("*")):
        time.sleep(0.001)
    out.rename(tmp_path / "away")
    _, said = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert str(out) in said.strip().splitlines()[-1]
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "away").rename(out)
    assert run(out) == 0
    assert hashes(out) == hashes(whole)


def test_records_say_what_their_folder_holds(whole):
    for path in (whole / "records").iterdir():
        record = DrawRecord.of(json.loads(path.read_text()), path.stem, [one.name for one in whole.iterdir()])
        for kind, file in record.files.items():
            data = (whole / file).read_bytes()
            assert record.outputs[kind] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("change", [{"params": {}}, {"params": {"synthesis": 1, "slice_axis": 1}, "source": {}}])
def test_a_figure_names_the_record_that_it_cannot_use(run, out, capsys, change):
    record = next((out / "records").glob("case0_*"))
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    assert run(out, "--figure") == 1
    assert f"{record} cannot be read as the record of a draw" in capsys.readouterr().err


def test_inputs_that_are_no_files_are_skipped(run, inputs, tmp_path, capsys):
    """Reading a pipe that nobody writes to would not end, nor would reading a device."""
    for name in ("images", "labels"):
        shutil.copytree(inputs / name, tmp_path / name)
    (tmp_path / "images" / "case1.nii.gz").unlink()
    os.mkfifo(tmp_path / "images" / "case1.nii.gz")
    (tmp_path / "labels" / "case2.nii.gz").unlink()
    (tmp_path / "labels" / "case2.nii.gz").symlink_to("/dev/zero")
    signal.alarm(60)
    code = run(tmp_path / "out", "--images", tmp_path / "images", "--labels", tmp_path / "labels")
    signal.alarm(0)
    assert code == 3
    said = capsys.readouterr().err
    assert f"{tmp_path / 'images' / 'case1.nii.gz'} is not a file" in said
    assert f"{tmp_path / 'labels' / 'case2.nii.gz'} is not a file" in said


def test_a_run_that_wrote_nothing_leaves_its_folder_free(run, tmp_path, capsys):
    assert run(tmp_path / "out", "--sampler", "reference") == 1  # which this network does not have
    assert "none of 3 cases can be used" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".lock")] == []
    assert run(tmp_path / "out") == 0


def test_a_run_that_wrote_nothing_leaves_what_was_there(run, out, inputs, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "other.nii.gz").write_bytes(b"no image")
    before = hashes(out)
    assert run(out, "--force", "--images", tmp_path / "images") == 1
    assert {name: one for name, one in hashes(out).items() if name != "datalist.json"} == {
        name: one for name, one in before.items() if name != "datalist.json"
    }

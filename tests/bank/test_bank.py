from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensity
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset

from monai_drdm import DeformationBank, RandDRDMBankd, RandDRDMDeform
from monai_drdm.deformation.record import DeformationParams
from monai_drdm.executors import WorkerLostError
from monai_drdm.networks import save_network

FIELDS = 3


def scan(number, shape=(40, 36)):
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 1, *(6 for _ in shape), generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    image = torch.nn.functional.interpolate(coarse, shape, mode=mode, align_corners=True)[0]
    return {"image": image, "label": (image > 0.5).to(torch.uint8), "name": f"ward/{number}"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As forked processes have: bits are promised for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def items():
    return [scan(number) for number in range(5)]


@pytest.fixture(scope="module")
def network(small_network, tmp_path_factory):
    """A file, as processes that draw would load it."""
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    save_network(small_network(2), path)
    return path


@pytest.fixture(scope="module")
def build(network):
    """``DeformationBank.build`` with small settings."""

    def built(items, **options):
        settings = {"id_key": "name", "network": network, "fields_per_image": FIELDS, "progress": False}
        return DeformationBank.build(items, **settings | options)

    return built


@pytest.fixture(scope="module")
def whole(build, items, tmp_path_factory):
    """The folder of a bank of all images, which nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert len(build(items, path=folder)) == len(items)
    return folder


def forked(number):
    """Processes that are there at once; a new interpreter takes seconds to start."""
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork"), _begin)


def _begin():
    signal.alarm(300)  # nothing hangs for ever
    torch.set_num_threads(1)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fields_are_those_of_their_records(build, items, network):
    """Every field is what ``RandDRDMDeform`` makes of the record beside it."""
    bank = build(items[:2])
    transform = RandDRDMDeform(network, prob=1.0)
    for item in items[:2]:
        entry = bank.entry(item["name"], item["image"])
        assert len(entry) == FIELDS
        levels = set()
        for index in range(FIELDS):
            record = DeformationParams.from_json(entry.params[index])
            transform(item["image"], params=record)
            assert (transform.last.ddf - entry.field(index).ddf()).abs().max() < 1e-3
            levels.add(record.deformation_level)
        assert len(levels) == FIELDS


@pytest.mark.filterwarnings("error:a worker was lost")
@pytest.mark.parametrize("split", ["shards", "threads", "processes", "interrupted"])
def test_files_are_the_same_whatever_the_split(build, items, whole, tmp_path, split):
    folder = tmp_path / "split"
    if split == "shards":
        for part in (2, 0, 1):
            build(items, path=folder, shard=(part, 3))
    elif split == "threads":
        with ThreadPoolExecutor(3) as executor:
            build(items, path=folder, executor=executor)
    elif split == "processes":
        broken = {"image": items[0]["image"] * torch.nan, "name": "broken"}
        with forked(2) as executor:
            bank = build([broken, *items], path=folder, executor=executor, skip_failed=True)
        assert set(bank.failed) == {"broken"}
    else:
        with pytest.raises(ZeroDivisionError):
            build((item if item["name"] != "ward/3" else 1 / 0 for item in items), path=folder)
        assert 0 < len(DeformationBank(folder)) < len(items)
        build(items, path=folder)
    assert contents(folder) == contents(whole)


def test_memory_and_folder_hold_the_same(build, items, whole):
    memory, folder, opened = build(items), build(items, path=whole), DeformationBank(whole)
    assert len(memory) == len(folder) == len(opened) == len(items)
    assert opened.settings == memory.settings
    for item in items:
        assert item["name"] in opened
        for index in range(FIELDS):
            fields = [bank.entry(item["name"], item["image"]).field(index).ddf() for bank in (memory, opened)]
            assert torch.equal(*fields)


class _Dies:
    """An image whose worker is killed the first time."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return _die_once, (str(self.mark),)


def _die_once(mark):
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_lost_worker_costs_nothing(build, items, whole, tmp_path):
    """A worker is killed while it draws: its images, and those it never got, are drawn all the same."""
    executor = forked(1)
    executor.submit(pickle.dumps, 0).result()  # it runs
    executor.submit(int, _Dies(tmp_path / "mark"))
    with pytest.warns(UserWarning, match="worker was lost"), executor:
        build(items, path=tmp_path / "bank", executor=executor)
    assert contents(tmp_path / "bank") == contents(whole)


HERE = os.getpid()


def _die_of_narrow_images(module, arguments):
    """A network that crashes the process on some images, as a library may; never the one that runs the tests."""
    if os.getpid() != HERE and arguments[0].shape[-1] < arguments[0].shape[-2]:
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_image_that_kills_its_workers_is_left_out_with_its_name(build, items, small_network, tmp_path):
    deadly = small_network(2)
    deadly.register_forward_pre_hook(_die_of_narrow_images)
    narrow = {"image": torch.rand(1, 40, 20), "name": "narrow"}
    square = [{"image": torch.rand(1, 30, 30), "name": str(number)} for number in range(2)]
    with forked(2) as executor, pytest.warns(UserWarning, match="worker was lost"):
        bank = build([*square, narrow], network=deadly, executor=executor, skip_failed=True, path=tmp_path / "bank")
    assert set(bank.failed) == {"narrow"}
    assert "died, and so did the next one" in bank.failed["narrow"]
    assert len(DeformationBank(tmp_path / "bank")) == 2
    with (
        forked(1) as executor,
        pytest.warns(UserWarning, match="worker was lost"),
        pytest.raises(WorkerLostError, match=r"^narrow: "),
    ):
        build([narrow], network=deadly, executor=executor)


def test_two_processes_build_one_bank_at_once(build, items, whole, tmp_path, fork):
    """They do the work twice, and leave what one leaves; with other settings one of them is refused."""
    folder = tmp_path / "bank"
    processes = [fork(lambda: build(items[:2], path=folder) and 0, before=_begin) for _ in range(2)]
    for one in processes:
        _, said = one.communicate()
        assert (one.returncode, said) == (0, "")
    assert len(contents(folder)) == 3
    assert contents(folder).items() <= contents(whole).items()
    other = tmp_path / "other"
    processes = [fork(lambda k=k: build(items[:2], path=other, seed=k) and 0, before=_begin) for k in (0, 1)]
    ends = [(one.communicate()[1], one.returncode) for one in processes]
    (refused,) = [said for said, code in ends if code != 0]
    assert "is a deformation bank with other settings: seed" in refused
    assert len(DeformationBank(other)) == 2


def test_a_bank_whose_folder_vanishes(build, items, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "bank"))
    bank = DeformationBank(folder)
    kept = bank.entry("ward/0", items[0]["image"])
    folder.rename(tmp_path / "away")
    assert torch.equal(kept.field(0).values, bank.entry("ward/0", items[0]["image"]).field(0).values)  # still open
    with pytest.raises(FileNotFoundError, match="is no longer there"):
        bank.entry("ward/1", items[1]["image"])

    def vanishing():
        yield items[0]
        shutil.rmtree(tmp_path / "third")
        yield items[1]

    with pytest.raises(OSError, match="the same call goes on from it"):
        build(vanishing(), path=tmp_path / "third")


@pytest.mark.parametrize("damage", ["torn", "flipped", "emptied", "foreign"])
def test_damage_is_noticed_and_mended(build, items, whole, tmp_path, damage):
    """A damaged file is an error for who reads it, and drawn again by who builds."""
    folder = shutil.copytree(whole, tmp_path / "bank")
    path = next(path for path in sorted(folder.iterdir()) if path.name.startswith("ward_2"))
    data = path.read_bytes()
    if damage == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        build(items[2:3], path=tmp_path / "other", seed=1)
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    transform = RandDRDMBankd("image", bank=DeformationBank(folder), id_key="name", prob=1.0)
    expected = "another deformation bank" if damage == "foreign" else "cannot be read as a whole file"
    with pytest.raises(ValueError, match=expected):
        list(map(transform, [items[2]] * 4 * FIELDS))  # the flipped bit is in one field
    assert transform(items[1])["image"].shape == items[1]["image"].shape
    if damage == "foreign":
        with pytest.raises(ValueError, match=expected):
            build(items, path=folder)
        return
    with pytest.warns(UserWarning, match="drawn again"):
        build(items, path=folder)
    assert contents(folder) == contents(whole)


def test_other_images_and_strangers(build, items, whole):
    bank = build(items, path=whole)
    image = items[0]["image"]
    for other, message in ((image.flip(1), "other values"), (image[:, 1:], "of shape"), (image + 0.1, "other values")):
        with pytest.raises(ValueError, match=message):
            bank.entry("ward/0", other)
    affine = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="spacing"):
        bank.entry("ward/0", MetaTensor(image, affine=affine))
    with pytest.raises(KeyError, match="not in the deformation bank"):
        bank.entry("ward/9", image)
    with pytest.raises(ValueError, match="drawn on another image"):
        build([*items, {**items[1], "name": "ward/0"}], path=whole)


def test_two_images_of_one_name_are_noticed_while_they_are_drawn(build, items):
    twins = [items[0], {**items[1], "name": items[0]["name"]}]
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="two images of one identity"):
        build(twins, executor=executor)
    with ThreadPoolExecutor(2) as executor:
        assert len(build([items[0]] * 3, executor=executor)) == 1


def test_folders_that_are_no_bank_are_left_alone(build, items, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="something else"):
        build(items, path=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    with pytest.raises(ValueError, match="holds no deformation bank"):
        DeformationBank(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no deformation bank"):
        DeformationBank(tmp_path / "nowhere")
    build(items[:1], path=tmp_path / "bank")
    with pytest.raises(FileExistsError, match=r"other settings: fields_per_image 4 against 3"):
        build(items, path=tmp_path / "bank", fields_per_image=4)
    settings = json.loads((tmp_path / "bank" / "bank.json").read_text())
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(settings | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        DeformationBank(tmp_path / "bank")


def test_items_that_cannot_be_used(build, items, tmp_path):
    broken = [items[0], {**items[1], "image": items[1]["image"] * torch.nan}, items[2], {"label": 0, "name": "x"}]
    with pytest.raises(ValueError, match="NaN"):
        build(broken, path=tmp_path / "bank")
    bank = build(broken, path=tmp_path / "bank", skip_failed=True)
    assert len(bank) == 2
    assert set(bank.failed) == {"ward/1", "item 3"}
    with pytest.raises(ValueError, match="id_key 'age' is missing"):
        build(items, id_key="age")
    with pytest.raises(ValueError, match=r"two ways: .*filename_or_obj.* id_key="):
        build(items, id_key=None)
    with pytest.raises(TypeError, match="identity of an image"):
        build([{**items[0], "name": 1.5}])
    with pytest.raises(ValueError, match="shard must be"):
        build(items, shard=(3, 3))
    with pytest.raises(ValueError, match="fields_per_image"):
        build(items, fields_per_image=0)


def test_files_that_monai_cannot_read_are_named_and_may_be_skipped(build, network, tmp_path):
    """MONAI's ``Compose`` makes a ``RuntimeError`` of whatever a reader raises."""
    for number in range(3):
        image = nib.Nifti1Image(np.random.default_rng(number).random((12, 10)).astype(np.float32), np.eye(4))
        nib.save(image, tmp_path / f"{number}.nii.gz")
    (tmp_path / "1.nii.gz").write_bytes(b"damaged")
    files = [{"image": str(tmp_path / f"{number}.nii.gz"), "name": str(number)} for number in range(4)]
    dataset = Dataset(files, Compose([LoadImaged("image"), EnsureChannelFirstd("image")]))
    with pytest.raises(ValueError, match="item 1 cannot be loaded: "):
        build(dataset)
    bank = build(dataset, skip_failed=True)
    assert set(bank.failed) == {"item 1", "item 3"}
    assert len(bank) == 2


def test_a_bank_is_of_one_network(tmp_path):
    """``auto`` would take another one for images of other dimensions."""
    generator = torch.Generator().manual_seed(0)
    flat, volume = (torch.rand(1, *(12,) * dims, generator=generator) for dims in (2, 3))
    items = [{"image": flat, "name": "flat"}, {"image": volume, "name": "volume"}]
    options = {"id_key": "name", "fields_per_image": 1, "steps": 1, "progress": False}
    with pytest.raises(ValueError, match="one number of dimensions, got 3 spatial axes after 2"):
        DeformationBank.build(items, **options)
    bank = DeformationBank.build(items, **options, skip_failed=True)
    assert set(bank.failed) == {"volume"}


def test_a_limit_may_be_written_as_a_whole_number_or_not(build, items, tmp_path):
    """Also in a folder whose settings an earlier version wrote as they were given."""
    for first, second in ((3, 3.0), (3.0, 3)):
        folder = tmp_path / str(first)
        build(items[:1], path=folder, max_displacement_mm=first, max_fold_fraction=first / 3)
        assert len(build(items[:2], path=folder, max_displacement_mm=second, max_fold_fraction=second / 3)) == 2
    settings = replace(DeformationBank(folder).settings, max_displacement_mm=3)
    old = tmp_path / "old"
    old.mkdir()
    (old / "bank.json").write_text(settings.to_json())
    build(items[:1], path=old, max_displacement_mm=3.0, max_fold_fraction=1.0)
    assert len(build(items[:2], path=old, max_displacement_mm=3, max_fold_fraction=1.0)) == 2
    assert DeformationBank(old).entry(items[0]["name"], items[0]["image"])


def test_limit_of_size(build, items, network, tmp_path):
    """Built banks refuse to grow beyond it; those that draw on demand drop what was not asked for the longest."""
    size = build(items[:1], path=tmp_path / "one").nbytes
    with pytest.raises(ValueError, match="fill max_bytes"):
        build(items, path=tmp_path / "two", max_bytes=int(2.5 * size))
    assert len(DeformationBank(tmp_path / "two")) == 2
    for path in (None, tmp_path / "three"):
        bank = DeformationBank.on_demand(path, network=network, fields_per_image=FIELDS, max_bytes=int(2.5 * size))
        for number in (0, 1, 0, 2):
            bank.entry(items[number]["name"], items[number]["image"])
        assert [f"ward/{number}" in bank for number in range(3)] == [True, False, True]
        assert bank.nbytes <= 2.5 * size
        bank = DeformationBank.on_demand(None, network=network, fields_per_image=FIELDS, max_bytes=size // 2)
        with pytest.raises(ValueError, match=rf"alone take \d+ bytes, more than max_bytes={size // 2}"):
            bank.entry(items[0]["name"], items[0]["image"])


def test_the_disk_is_full(build, items, tmp_path, monkeypatch):
    """What was written stays, nothing half is left, and the same call goes on."""
    write, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 3:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*the same call goes on"):
        build(items, path=tmp_path / "bank")
    monkeypatch.undo()
    assert len(DeformationBank(tmp_path / "bank")) == 2
    assert not list((tmp_path / "bank").glob(".part*"))
    assert len(build(items, path=tmp_path / "bank")) == len(items)


def test_names_of_any_kind_get_files_of_their_own(build, items, tmp_path):
    names = ["a/b", "a_b", "ä", "x" * 300, "..", "", 7, "A/B"]
    bank = build([{**items[0], "name": name} for name in names], path=tmp_path / "bank")
    assert len(bank) == len(names)
    assert all(name in bank for name in names)
    first = next((tmp_path / "bank").glob("*.safetensors"))
    assert load_file(first)["values"].dtype == torch.int16


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_it(build, items, whole, network, tmp_path, context, workers):
    """Any number of worker processes give what one process gives, in memory, from a folder, and drawn on demand."""

    def on_demand():
        return DeformationBank.on_demand(tmp_path / "bank", network=network, fields_per_image=FIELDS)

    transforms = [
        RandDRDMBankd(
            ["image", "label"], bank=bank, id_key="name", prob=1.0, seed_key="name", mode=["bilinear", "nearest"]
        )
        for bank in (build(items), build(items, path=whole), on_demand())
    ]
    expected = [transform(item)["image"] for transform in transforms for item in items]
    for path in (tmp_path / "bank").glob("ward*"):
        path.unlink()
    transforms[-1].bank = on_demand()
    loader = DataLoader(
        ConcatDataset([Dataset(items, transform) for transform in transforms]),
        batch_size=1,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(expected)
        for batch, image in zip(batches, expected):
            torch.testing.assert_close(batch["image"][0].as_tensor(), image.as_tensor(), atol=1e-4, rtol=0)
    for folder in (whole, tmp_path / "bank"):
        assert len(DeformationBank(folder)) == len(items)


def test_rounding_of_sums_is_no_other_image(build, small_network):
    """Another number of threads adds in another order, so ``NormalizeIntensity`` differs in its last digits."""
    generator = torch.Generator().manual_seed(0)
    image = 1000 * torch.rand(1, 64, 64, 32, generator=generator) + 100 * torch.randn(
        1, 64, 64, 32, generator=generator
    )
    threads, normalised = torch.get_num_threads(), []
    try:
        for number in (2, 1):
            torch.set_num_threads(number)
            normalised.append(NormalizeIntensity()(image.clone()))
    finally:
        torch.set_num_threads(threads)
    first, other = normalised[0], normalised[1] + 2e-7  # where both agree by luck
    assert not torch.equal(first, other)
    bank = build([{"image": first, "name": "a"}], network=small_network(3, working_size=16), fields_per_image=1)
    assert len(bank.entry("a", other)) == 1
    for changed in (first + 1e-2 * torch.randn(first.shape, generator=generator), first.flip(1), 2 * first):
        with pytest.raises(ValueError, match="drawn on another image"):
            bank.entry("a", changed)


def test_files_may_be_read_by_whom_the_umask_lets(build, items, tmp_path):
    before = os.umask(0o022)
    try:
        build(items[:1], path=tmp_path / "bank")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bank").iterdir()} == {0o644}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(build, items, tmp_path):
    bank = build(items[:1], path=tmp_path / "bank")
    next(path for path in (tmp_path / "bank").iterdir() if path.suffix == ".safetensors").chmod(0)
    with pytest.raises(PermissionError, match="cannot be read"):
        DeformationBank(bank.path).entry("ward/0", items[0]["image"])


def test_images_are_called_as_their_files_without_a_key(build, items, tmp_path):
    """By the names that MONAI's ``LoadImaged`` keeps, with metadata in the image or beside it."""
    path = str(tmp_path / "one.nii.gz")
    nib.save(nib.Nifti1Image(items[0]["image"][0].numpy(), np.eye(4)), path)
    loaded = LoadImaged("image", ensure_channel_first=True, image_only=False)({"image": path})
    plain = {**loaded, "image": loaded["image"].as_tensor()}
    for item in (loaded, plain):
        bank = build([item], id_key=None)
        assert path in bank
        moved = RandDRDMBankd("image", bank=bank, prob=1.0)
        moved(item)
        assert moved.last.banked.identity == path
    for nameless in ({"filename_or_obj": ""}, {"filename_or_obj": [path]}, {}):
        with pytest.raises(ValueError, match="two ways"):
            build([{"image": MetaTensor(items[0]["image"], meta=nameless)}], id_key=None)


def test_numbers_of_numpy_are_numbers(build, items):
    numbered = [{"image": item["image"], "name": np.int64(number)} for number, item in enumerate(items[:2])]
    bank = build(numbered, fields_per_image=np.int64(2))
    assert len(bank.entry("1", items[1]["image"])) == 2
    DeformationBank.on_demand(recovery=np.float32(0.5))
    assert np.int64(1) in bank

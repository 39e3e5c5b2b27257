"""Worker processes and threads, caches, pickles, memory: the transform where training runs it."""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    decollate_batch,
    MetaTensor,
    partition_dataset,
    PersistentDataset,
    SmartCacheDataset,
    ThreadDataLoader,
)
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from monai.transforms import Compose, Invertd, ScaleIntensityd
from monai.utils import set_determinism
from torch.utils.data import ConcatDataset

from monai_drdm import ApplyDDFd, RandDRDMDeform, RandDRDMDeformd
from monai_drdm.networks import save_network
from monai_drdm.transforms import DeformationParams

SIZE = 64
COUNT = 4
KEYS = ("image", "label")
PLACES = {
    "main process": (DataLoader, {"num_workers": 0}),
    "fork": (DataLoader, {"num_workers": 2, "multiprocessing_context": "fork"}),
    "forkserver": (DataLoader, {"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}),
    "fork, persistent": (
        DataLoader,
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "shuffle": True},
    ),
    "one thread": (ThreadDataLoader, {"num_workers": 0, "buffer_size": 2}),
    "two threads": (ThreadDataLoader, {"num_workers": 2, "use_thread_workers": True}),
}


@pytest.fixture(scope="module")
def weights(small_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(small_network(2), path)
    return str(path)


@pytest.fixture(autouse=True)
def _leave_global_random_states():
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def cases(count=COUNT, size=SIZE):
    """Smooth scans that differ, their labels well inside."""
    out = []
    for i in range(count):
        y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
        radius = ((y - 0.05 * i) ** 2 + (1 + 0.1 * i) * x**2).sqrt()
        image = torch.exp(-3 * radius**2) + 0.1 * torch.sin((9 + i) * y)
        label = (radius < 0.6).to(torch.uint8) + (radius < 0.35).to(torch.uint8)
        out.append({"image": MetaTensor(image[None]), "label": MetaTensor(label[None]), "id": f"case {i}"})
    return out


def deform(network, **options):
    options = {"prob": 1.0, "mode": ("bilinear", "nearest"), "deformation_level": 0.25, **options}
    return RandDRDMDeformd(KEYS, network=network, **options)


def pipeline(network, **options):
    return Compose([ScaleIntensityd("image"), deform(network, **options)])


def samples_of(loader):
    """One epoch as single samples."""
    return [sample for batch in loader for sample in decollate_batch(batch)]


def images(samples):
    return torch.stack([sample["image"].as_tensor() for sample in samples])


def by_id(samples):
    return {sample["id"]: sample for sample in samples}


def plain(data):
    """What the deformation gets to see."""
    return {sample["id"]: ScaleIntensityd("image")(sample) for sample in data}


def params_of(sample):
    return DeformationParams.from_json(sample["image"].applied_operations[-1]["extra_info"]["params"])


def mean_dice(a, b):
    one, other = (one_hot(x.as_tensor().long()[None], 3) for x in (a, b))
    return float(DiceMetric(include_background=False)(one, other).mean())


def check_epoch(samples, transform, data):
    """Deformed, all keys by one field, and taken back in this process by what the samples carry."""
    originals, labels = plain(data), {one["id"]: one["label"] for one in data}
    assert sorted(sample["id"] for sample in samples) == sorted(originals)
    before, after = [], []
    for sample in samples:
        source = originals[sample["id"]]
        assert sample["image"].shape == sample["label"].shape == source["image"].shape
        assert sample["label"].dtype == torch.uint8
        assert (sample["image"].as_tensor() - source["image"].as_tensor()).abs().max() > 0.05
        record = params_of(sample)
        assert params_of({"image": sample["label"]}) == record
        # the record replays here what was done there
        replay = copy.deepcopy(transform.transforms[-1])
        again = replay(source, params=record)
        torch.testing.assert_close(again["image"].as_tensor(), sample["image"].as_tensor(), atol=1e-3, rtol=0)
        assert (again["label"].as_tensor() != sample["label"].as_tensor()).float().mean() < 2e-3
        back = transform.inverse({key: sample[key] for key in KEYS})
        assert back["label"].shape == labels[sample["id"]].shape
        assert back["image"].applied_operations == []
        alone = Invertd("label", transform, orig_keys="image", nearest_interp=False)({**sample})
        assert mean_dice(alone["label"], labels[sample["id"]]) >= 0.8
        before.append(mean_dice(sample["label"], labels[sample["id"]]))
        after.append(mean_dice(back["label"], labels[sample["id"]]))
    assert np.mean(after) >= 0.9
    assert np.mean(after) > np.mean(before) + 0.05


def in_a_fork(function, *arguments):
    """What a function returns in a fork of this process: what it does to its process ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _limited) as executor:
        return executor.submit(function, *arguments).result()


def _limited(seconds=300):
    signal.alarm(seconds)  # nothing hangs for ever
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- workers of every kind


@pytest.fixture(scope="module")
def expected(weights):
    """What ``seed_key`` must give wherever it runs: one transform, one sample after the other."""
    transform = pipeline(weights, seed_key="id").set_random_state(99)
    return by_id([transform(sample) for sample in cases()])


@pytest.mark.parametrize("place", PLACES)
def test_two_epochs_wherever_they_run(weights, expected, place):
    kind, options = PLACES[place]
    transform, data = pipeline(weights, seed_key="id"), cases()
    loader = kind(Dataset(data, transform), batch_size=2, **options)
    check_two_epochs(samples_of(loader), samples_of(loader), transform, data, expected)


def check_two_epochs(first, second, transform, data, expected):
    check_epoch(first, transform, data)
    assert len(second) == COUNT
    for sample in (*first, *second):  # the same whatever the worker, the order or the epoch
        want = expected[sample["id"]]
        assert params_of(sample) == params_of(want)
        torch.testing.assert_close(sample["image"].as_tensor(), want["image"].as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(sample["label"].as_tensor(), want["label"].as_tensor(), rtol=0, atol=0)


def test_a_spawned_worker(weights, expected, tmp_path):
    """A new interpreter takes seconds to start, so one does everything: two epochs, a cache on disk, and CUDA."""
    transform, data = pipeline(weights, seed_key="id"), cases()
    cached, samples_of_cache = given_field_on_disk(tmp_path)
    cuda = Dataset(cases(2), deform(weights, device="cuda"))
    parts = {"pipeline": Dataset(data, transform), "cache": cached, "cuda": cuda}
    batches = []  # of the next epoch
    loader = DataLoader(
        ConcatDataset(parts.values()),
        batch_sampler=batches,
        num_workers=1,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )

    def epoch(name):
        before = sum(len(part) for part in list(parts.values())[: list(parts).index(name)])
        batches[:] = [[before + i, before + i + 1] for i in range(0, len(parts[name]), 2)]
        return samples_of(loader)

    check_two_epochs(epoch("pipeline"), epoch("pipeline"), transform, data, expected)
    check_given_field_on_disk(samples_of_cache, epoch("cache"), cached)
    check_cuda(lambda: epoch("cuda"))


@pytest.mark.parametrize("place", ["main process", "fork", "fork, persistent", "one thread"])
def test_same_seed_and_workers_same_batches_without_seed_key(weights, place):
    kind, options = PLACES[place]
    runs = []
    for _ in range(2):
        set_determinism(7)
        dataset = Dataset(cases(), pipeline(weights).set_random_state(7))
        loader = kind(dataset, batch_size=1, **options)
        runs.append([samples_of(loader), samples_of(loader)])
        set_determinism(None)
    for one, other in zip(*runs):
        assert [sample["id"] for sample in one] == [sample["id"] for sample in other]
        assert torch.equal(images(one), images(other))
    epochs = runs[-1]
    seeds = [params_of(sample).seed for epoch in epochs for sample in epoch]
    assert len(set(seeds)) == 2 * COUNT  # no worker repeats another, no epoch the one before
    check_epoch(epochs[1], dataset.transform, cases())


class Unhurried(RandDRDMDeformd):
    """A user's subclass that gives other threads a chance between the draw of the seed and its use."""

    def randomize(self, data=None):
        super().randomize(data)
        time.sleep(0.005)


@pytest.mark.parametrize("form", [RandDRDMDeformd, Unhurried])
def test_threads_share_a_transform(weights, form):
    """``ThreadDataLoader(use_thread_workers=True)`` and users' own pools call one object from many threads."""
    shapes = [(1, 24 + 8 * (i % 3), 40) for i in range(24)]
    generator = torch.Generator().manual_seed(0)
    data = [
        {"image": torch.rand(s, generator=generator), "label": torch.ones(s), "id": i} for i, s in enumerate(shapes)
    ]
    transform = form(KEYS, network=weights, seed_key="id", steps=1, sampler="fast", prob=0.7)
    want = [transform(sample)["image"].as_tensor() for sample in data]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda sample: transform(sample)["image"].as_tensor(), data))
    finally:
        sys.setswitchinterval(interval)
    wrong = [i for i, (a, b) in enumerate(zip(got, want)) if a.shape != b.shape or not torch.equal(a, b)]
    assert wrong == []


class UnhurriedDDFd(ApplyDDFd):
    """As above, between the keeping of the field and its use."""

    @property
    def last(self):
        return self.kept

    @last.setter
    def last(self, deformation):
        self.kept = deformation
        time.sleep(0.005)


@pytest.mark.parametrize("form", [ApplyDDFd, UnhurriedDDFd])
def test_threads_share_a_deterministic_transform(form):
    """``CacheDataset`` fills its cache by many threads, and copies no transform that is not random."""
    ramp, data = torch.arange(9.0), []
    for i in range(40):
        field = torch.zeros(2, 8, 9)
        field[1] = i % 5
        data.append({"image": ramp.expand(1, 8, 9).contiguous(), "ddf": field})
    dataset = CacheDataset(data, Compose([form("image", ddf_key="ddf")]), num_workers=8, progress=False)
    moved = [float(dataset[i]["image"][0, 0, 0]) for i in range(40)]
    assert moved == [pytest.approx(i % 5, abs=1e-4) for i in range(40)]


# -------------------------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["cache", "persistent", "smart"])
def test_after_a_cache(weights, tmp_path, kind, workers):
    transform, data = pipeline(weights).set_random_state(0), cases(COUNT + 1)
    if kind != "smart":
        data = data[:COUNT]
    if kind == "cache":
        dataset = CacheDataset(data, transform, num_workers=2, progress=False)
    elif kind == "persistent":
        dataset = PersistentDataset(data, transform, tmp_path / "cache", track_meta=True, weights_only=True)
    else:
        dataset = SmartCacheDataset(
            data, transform, replace_rate=0.5, cache_num=COUNT, num_init_workers=2, num_replace_workers=1,
            shuffle=False, progress=False,
        )  # fmt: skip
        dataset.start()
    options = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, **options)
    epochs = []
    try:
        for _ in range(2):
            epochs.append(samples_of(loader))
    finally:
        if kind == "smart":
            dataset.shutdown()
    for epoch in epochs:
        check_epoch(epoch, transform, data[:COUNT])
    if kind == "smart" and workers:
        return  # MONAI seeds a SmartCacheDataset in a worker, but not the transforms in it
    seeds = [params_of(sample).seed for epoch in epochs for sample in epoch]
    assert len(set(seeds)) == 2 * COUNT  # drawn anew for every sample and epoch, not cached


def test_smart_cache_replaces(weights):
    transform, data = pipeline(weights, seed_key="id"), cases(6)
    dataset = SmartCacheDataset(
        data, transform, replace_rate=0.5, cache_num=4, shuffle=False, num_init_workers=1, num_replace_workers=1,
        progress=False,
    )  # fmt: skip
    dataset.start()
    try:
        first = samples_of(DataLoader(dataset, batch_size=1))
        dataset.update_cache()
        second = samples_of(DataLoader(dataset, batch_size=1))
    finally:
        dataset.shutdown()
    assert by_id(first).keys() != by_id(second).keys()
    for name in by_id(first).keys() & by_id(second).keys():
        assert torch.equal(by_id(first)[name]["image"].as_tensor(), by_id(second)[name]["image"].as_tensor())
    check_epoch(second, transform, [case for case in data if case["id"] in by_id(second)])


def smooth_field(scale=4.0):
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    envelope = (1 - y**2) * (1 - x**2)
    return scale * torch.stack((envelope * torch.cos(2 * x), envelope * torch.sin(2 * y)))


def given_field_on_disk(folder):
    """A dataset that finds the entries of an earlier one in its cache, and the samples of that one."""
    # arrays, which MONAI's hash of an entry knows again in another process
    arrays = [{"id": case["id"], **{key: case[key].numpy() for key in KEYS}} for case in cases()]

    def dataset(field):
        steps = Compose([ScaleIntensityd("image"), ApplyDDFd(KEYS, field, mode=("bilinear", "nearest"))])
        return PersistentDataset(arrays, steps, folder / "cache", track_meta=True, weights_only=True)

    first = samples_of(DataLoader(dataset(smooth_field()), batch_size=2))
    assert len(list((folder / "cache").iterdir())) == COUNT
    # a transform of its own, as after a restart; cached fields count
    return dataset(torch.zeros(2, SIZE, SIZE)), first


def check_given_field_on_disk(first, second, again):
    data = cases()
    assert torch.equal(images(first), images(second))
    for sample, case in zip(second, data):
        assert (sample["image"].as_tensor() - plain(data)[case["id"]]["image"].as_tensor()).abs().max() > 0.05
        assert mean_dice(sample["label"], case["label"]) < 0.93
        back = again.transform.transforms[-1].inverse({key: sample[key] for key in KEYS})
        assert mean_dice(back["label"], case["label"]) >= 0.95
        assert "ApplyDDFd" not in [one["class"] for one in back["image"].applied_operations]


@pytest.mark.parametrize("start", [None, "fork"])
def test_given_field_inside_a_cache_on_disk(tmp_path, start):
    """The second pass reads records, with the fields in them, back from disk under ``weights_only=True``."""
    again, first = given_field_on_disk(tmp_path)
    options = {"num_workers": 1, "multiprocessing_context": start} if start else {}
    check_given_field_on_disk(first, samples_of(DataLoader(again, batch_size=2, **options)), again)


def test_given_field_inside_a_cache_below_a_random_one(weights, tmp_path):
    """Both kinds of record on one sample come off in order."""
    data = cases()
    steps = Compose([ApplyDDFd(KEYS, smooth_field(2.0), mode=("bilinear", "nearest")), deform(weights)])
    steps.set_random_state(3)
    for _ in range(2):
        dataset = PersistentDataset(data, steps, tmp_path / "cache", track_meta=True, weights_only=True)
        samples = samples_of(DataLoader(dataset, batch_size=2))
        scores = []
        for sample, case in zip(samples, data):
            names = [one["class"] for one in sample["image"].applied_operations]
            assert names == ["ApplyDDFd", "RandDRDMDeformd"]
            scores.append(mean_dice(steps.inverse({key: sample[key] for key in KEYS})["label"], case["label"]))
        assert np.mean(scores) >= 0.9


def test_partitions_of_a_dataset_share_no_randomness(weights):
    """As in distributed training with one seed per rank."""
    parts = partition_dataset(cases(), num_partitions=2)
    seeds = []
    for rank, part in enumerate(parts):
        loader = DataLoader(Dataset(part, pipeline(weights).set_random_state(rank)), batch_size=1)
        loader.dataset.transform.set_random_state(rank)
        seeds += [params_of(sample).seed for sample in samples_of(loader)]
    assert len(set(seeds)) == COUNT


# -------------------------------------------------------------------------------------------- pickles and copies


@pytest.mark.parametrize("source", ["auto", "zheng2026-cmr-2d", "path"])
def test_pickle_is_small(weights, source):
    transform = deform(weights if source == "path" else source)
    assert len(pickle.dumps(transform)) < 20_000
    if source == "path":
        out = transform(cases(1, 256)[0])
        out["ddf"], out["statistics"] = transform.last.ddf, transform.last.statistics
        assert len(pickle.dumps(transform)) < 200_000
        again = pickle.loads(pickle.dumps(transform))
        assert again.last is None
        assert transform.last is not None
        back = again.inverse({key: out[key] for key in KEYS})  # the copy knows the records of the original
        assert torch.equal(back["label"], transform.inverse({key: out[key] for key in KEYS})["label"])


def test_pickle_of_the_array_form_and_of_a_given_field_drops_last(weights):
    image = cases(1)[0]["image"]
    array = RandDRDMDeform(weights, prob=1.0)
    array(image)
    given = ApplyDDFd("image", ddf_key="ddf")
    given({"image": image, "ddf": smooth_field()})
    for transform in (array, given):
        assert transform.last is not None
        assert len(pickle.dumps(transform)) < 20_000
        assert pickle.loads(pickle.dumps(transform)).last is None


def test_a_pickled_transform_goes_on_as_the_original(weights):
    transform, case = deform(weights).set_random_state(5), cases(1)[0]
    transform(case)
    travelled = pickle.loads(pickle.dumps(transform))
    assert torch.equal(transform(case)["image"], travelled(case)["image"])


def test_copies_of_a_dataset_share_nothing_that_changes(weights):
    dataset = Dataset(cases(), pipeline(weights).set_random_state(5))
    dataset[0]
    mine = dataset.transform.transforms[-1]
    last, field, state = mine.last, mine.last.ddf.clone(), mine.R.get_state()[1].copy()
    for duplicate in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        other = duplicate.transform.transforms[-1]
        assert other.last is None
        assert other.R is not mine.R
        duplicate[1]
        other.last.ddf.add_(1)
        other.last.stored.values.add_(1)
        duplicate.transform.set_random_state(1)
        assert mine.last is last
        assert torch.equal(mine.last.ddf, field)
        np.testing.assert_array_equal(mine.R.get_state()[1], state)
    # two calls share nothing either
    dataset[0]
    assert mine.last is not last
    mine.last.ddf.add_(1)
    assert torch.equal(last.ddf, field)


def test_last_and_output_do_not_alias(weights):
    """Editing the reported field must not change what was recorded on the data."""
    transform, case = deform(weights).set_random_state(5), cases(1)[0]
    out = transform(case)
    want = transform.inverse(out)["label"].as_tensor().clone()
    transform.last.ddf.zero_()
    assert torch.equal(transform.inverse(out)["label"].as_tensor(), want)


@pytest.mark.parametrize("seed_key", [None, "id"])
def test_global_random_states_are_untouched(weights, seed_key):
    case = cases(1)[0]

    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()

    before = states()
    for policy in ("rescale", "resample"):
        options = {"on_fold": policy, "max_fold_fraction": 0.0}
        transform = deform(weights, seed_key=seed_key, **options).set_random_state(0)
        out = transform(case)
        transform(case, randomize=False)
        transform.inverse(out)
        transform.last.statistics, transform.last.inverse_ddf, pickle.dumps(transform)
    after = states()
    assert torch.equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_global_random_states_do_not_matter(weights):
    fields = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        transform = deform(weights).set_random_state(4)
        transform(cases(1)[0])
        fields.append(transform.last.ddf)
    assert torch.equal(*fields)


# ------------------------------------------------------------------------------------------------ CUDA in workers


def test_cuda_in_a_forked_worker_says_what_to_change(weights):
    transform = deform(weights, device="cuda")
    loader = DataLoader(Dataset(cases(2), transform), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="forked worker") as caught:
        samples_of(loader)
    for word in ("multiprocessing_context='spawn'", "num_workers=0", "device='cpu'"):
        assert word in str(caught.value)


def test_cuda_elsewhere_is_not_blamed_on_forking(weights):
    check_cuda(lambda: samples_of(DataLoader(Dataset(cases(2), deform(weights, device="cuda")))))


def check_cuda(epoch):
    if torch.cuda.is_available():
        assert len(epoch()) == 2
        return
    with pytest.raises(RuntimeError) as caught:
        epoch()
    said = "".join(traceback.format_exception(caught.value))  # MONAI wraps what a transform raises
    assert "CUDA" in said or "NVIDIA" in said  # a build of torch without it, or one without a driver
    assert "forked worker" not in said


# ----------------------------------------------------------------------------------------------- one load a process

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def own_weights(weights, tmp_path):
    """A file that a test may delete."""
    return str(shutil.copy(weights, tmp_path / "own.safetensors"))


def tiny_draw(transform):
    transform(torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)))
    return transform.last.ddf


def quick(weights):
    return RandDRDMDeform(weights, prob=1.0, sampler="fast", steps=1)


def watch(weights, opened):
    """Call something whenever this process opens a file. There is no way back."""
    sys.addaudithook(lambda event, arguments: opened() if event == "open" and str(arguments[0]) == weights else None)


def _times_loaded(weights):
    opened = []
    watch(weights, lambda: opened.append(os.getpid()))
    transforms = [pickle.loads(pickle.dumps(quick(weights))) for _ in range(8)]
    assert not opened, "loaded before the first call"
    barrier = threading.Barrier(8)

    def fire(transform):
        barrier.wait()
        return tiny_draw(transform)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(fire, transforms))) == 8
    os.remove(weights)
    tiny_draw(quick(weights))
    tiny_draw(pickle.loads(pickle.dumps(transforms[0])))
    return len(opened)


@needs_fork
def test_loaded_once_by_many_threads_and_never_again(own_weights):
    assert in_a_fork(_times_loaded, own_weights) == 1


def _exit_of_a_child_forked_while_loading(weights):
    parent, loading, forked = os.getpid(), threading.Event(), threading.Event()

    def opened():
        if os.getpid() == parent:
            loading.set()
            forked.wait()

    watch(weights, opened)
    thread = threading.Thread(target=tiny_draw, args=(quick(weights),))
    thread.start()
    loading.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _limited(200)  # a fork does not inherit the alarm
            tiny_draw(quick(weights))
            status = 7
        finally:
            os._exit(status)
    forked.set()
    thread.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
def test_fork_while_a_thread_loads(own_weights):
    """A lock that another thread holds at the fork must not stop the child for ever."""
    assert in_a_fork(_exit_of_a_child_forked_while_loading, own_weights) == 7


def test_forked_workers_inherit_a_loaded_network(own_weights):
    transform, data = deform(own_weights), cases(2)
    transform(data[0])
    Path(own_weights).unlink()
    loader = DataLoader(Dataset(data, transform), num_workers=2, multiprocessing_context="fork")
    assert len(samples_of(loader)) == 2


# ---------------------------------------------------------------------------------------------------------- memory


class Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def allocated():
    """Bytes that were allocated and not freed, to the byte; 0 where the C library does not tell."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = Mallinfo
    told = library.mallinfo2()
    return told.uordblks + told.hblkhd


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_memory_is_flat_over_many_calls(small_network):
    sample = {"image": torch.rand(1, 64, 64), "label": torch.ones(1, 64, 64, dtype=torch.uint8)}
    transform = deform(small_network(2, working_size=8), sampler="fast", steps=1)
    before = allocated()
    kept = torch.ones(2**18)
    exact = allocated() - before >= kept.nbytes
    calls = 40 if exact else 1800  # what is resident is a coarse measure

    def rise(number):
        gc.collect()
        before = allocated(), resident()
        for _ in range(number):
            transform(sample)
            assert transform.last.ddf.shape == (2, 64, 64)
            assert transform.last.statistics
        gc.collect()
        return allocated() - before[0], resident() - before[1]

    rise(calls // 2)  # caches fill
    bytes_allocated, bytes_resident = rise(calls)
    assert bytes_resident < 8 * 2**20
    assert bytes_allocated < 1024 * calls  # the label of a sample takes four times that

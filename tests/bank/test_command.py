from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from monai_drdm import DeformationBank, RandDRDMBankd
from monai_drdm.cli import main
from monai_drdm.networks import save_network


@pytest.fixture
def command(small_network, tmp_path):
    """The arguments of a build from three images and one that cannot be used."""
    save_network(small_network(2), tmp_path / "net.safetensors")
    (tmp_path / "images").mkdir()
    for number in range(4):
        image = np.random.default_rng(number).normal(size=(30, 28 + number)).astype(np.float32)
        if number == 3:
            image[4, 4] = np.nan
        nib.save(nib.Nifti1Image(image, np.diag([1.5, 1.5, 1, 1])), tmp_path / "images" / f"case{number}.nii.gz")

    def build(out, *more):
        options = ["--images", tmp_path / "images", "--network", tmp_path / "net.safetensors", "--fields", 2]
        return [str(one) for one in ("bank", "build", *options, "--out", tmp_path / out, *more)]

    return build


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_built_banks_fit_the_pipeline_that_loads_the_files(command, tmp_path, capsys):
    assert main(command("bank")) == 3
    out = capsys.readouterr()
    assert "3 images, 1 skipped" in out.out
    assert "NaN" in out.err
    transform = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image", channel_dim="no_channel"),
            RandDRDMBankd("image", bank=DeformationBank(tmp_path / "bank"), id_key="name", prob=1.0),
        ]
    )
    moved = transform({"image": tmp_path / "images" / "case1.nii.gz", "name": "case1"})
    assert moved["image"].shape == (1, 30, 29)
    assert transform.transforms[-1].last.statistics.max_displacement_vox > 0.1
    assert main(["bank", "info", str(tmp_path / "bank")]) == 0
    told = capsys.readouterr().out
    assert "3 images" in told
    assert "fields_per_image: 2" in told


def test_workers_and_shards_give_the_same_files(command, tmp_path, capsys):
    assert main(command("whole")) == 3
    for part in (1, 0):
        assert main(command("shards", "--shard", f"{part}/2")) in (0, 3)
    # a worker takes seconds to start, and is started only for an image that no other is free for: so one image is left
    assert main(command("workers", "--shard", "0/2")) == 0
    (tmp_path / "images" / "case3.nii.gz").unlink()
    assert main(command("workers", "--workers", 2)) == 0
    assert contents(tmp_path / "workers") == contents(tmp_path / "shards") == contents(tmp_path / "whole")
    assert main(command("whole", "--seed", 1)) == 1
    assert "other settings: seed 1 against 0" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b"])
def test_shards_that_are_none(command, shard, capsys):
    with pytest.raises(SystemExit):
        main(command("bank", f"--shard={shard}"))
    assert "is not I/N" in capsys.readouterr().err


def test_on_a_dask_cluster(small_network, tmp_path):
    """Dask's workers draw what this process would, from what reached them over the network."""
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'monai-drdm[dask]'")
    save_network(small_network(2), tmp_path / "net.safetensors")
    items = [{"image": torch.rand(1, 24, 20 + k), "name": k} for k in range(3)]
    options = {"id_key": "name", "network": tmp_path / "net.safetensors", "fields_per_image": 2, "progress": False}
    DeformationBank.build(items, path=tmp_path / "here", **options)
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        DeformationBank.build(items, path=tmp_path / "there", executor=client.get_executor(), **options)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")

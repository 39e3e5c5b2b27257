import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_safetensors

from monai_drdm.networks import (
    list_networks,
    load_network,
    network_card,
    network_sha256,
    save_network,
    VelocityUNet,
    weights,
    weights_folder,
)

CARDIAC = "zheng2026-cmr-2d"


def header(path):
    data = Path(path).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write(path, tensors, metadata):
    path.write_bytes(to_safetensors({k: v.contiguous() for k, v in tensors.items()}, metadata))
    return path


def card_of(network):
    return {"monai_drdm": network.card.to_json()}


@pytest.mark.parametrize(("dims", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_round_trip(filled_network, tmp_path, dims, channels):
    network = filled_network(dims, channels)
    network.card = replace(network.card, name="mine", working_size=96, input_range=(-1.0, 1.0), gates={"folds": 0.1})
    digest = save_network(network, tmp_path / "mine.safetensors")
    loaded = load_network(tmp_path / "mine.safetensors")
    assert loaded.card == replace(network.card, sha256=digest)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), network.state_dict().values()))


@pytest.mark.parametrize(
    ("dims", "channels", "features"), [(2, 1, (16, 32, 48, 64)), (2, 3, (4, 8)), (3, 1, (5, 6, 7))]
)
def test_round_trip_of_a_velocity_network(tmp_path, dims, channels, features):
    network = VelocityUNet(dims, channels, features)
    torch.nn.init.normal_(network.out.weight)
    network.card = replace(network.card, name="mine", working_size=65, gates={"folds": 0.1})
    digest = save_network(network, tmp_path / "mine.safetensors")
    loaded = load_network(tmp_path / "mine.safetensors")
    assert isinstance(loaded, VelocityUNet)
    assert loaded.card == replace(network.card, sha256=digest)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), network.state_dict().values()))
    save_network(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mine.safetensors").read_bytes()


def test_loaded_for_inference(filled_network, tmp_path):
    network = filled_network(2).train().requires_grad_(True)
    save_network(network, tmp_path / "mine.safetensors")
    loaded = load_network(str(tmp_path / "mine.safetensors"), device="cpu")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_same_network_same_hash(filled_network, tmp_path):
    digests = {save_network(filled_network(2), tmp_path / f"{i}.safetensors") for i in range(3)}
    files = {hashlib.sha256((tmp_path / f"{i}.safetensors").read_bytes()).hexdigest() for i in range(3)}
    assert digests == files
    assert len(digests) == 1
    save_network(load_network(tmp_path / "0.safetensors"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "0.safetensors").read_bytes()


def test_exactly_one_metadata_key(filled_network, tmp_path):
    save_network(filled_network(2), tmp_path / "mine.safetensors")
    metadata = header(tmp_path / "mine.safetensors")["__metadata__"]
    assert list(metadata) == ["monai_drdm"]
    assert json.loads(metadata["monai_drdm"])["kind"] == "recresacnet"


def test_sha256_of_a_network_in_memory_is_that_of_its_file(filled_network, tmp_path):
    network = filled_network(2)
    digest = save_network(network, tmp_path / "mine.safetensors")
    assert network_sha256(network) == digest
    assert network_sha256(load_network(tmp_path / "mine.safetensors")) == digest
    network.conv_out.bias += 1
    assert network_sha256(network) != digest


def test_a_header_whose_length_looks_like_a_pickle_is_read(filled_network, tmp_path):
    network = filled_network(2)
    for length in range(40):  # among these one gives a header length whose low byte is 0x80, as in a pickle
        network.card = replace(network.card, source="x" * (8 * length))
        path = tmp_path / f"{length}.safetensors"
        save_network(network, path)
        if path.read_bytes()[0] == 0x80:
            load_network(path)
            return
    raise AssertionError("no such header among the lengths tried")


def test_readable_by_whom_the_umask_lets(filled_network, tmp_path):
    save_network(filled_network(2), tmp_path / "n.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "n.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_never_overwrites(filled_network, tmp_path):
    path = tmp_path / "mine.safetensors"
    network = filled_network(2)
    digest = save_network(network, path)
    before = path.stat()
    assert save_network(network, path) == digest
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    network.conv_out.bias += 1
    with pytest.raises(FileExistsError, match="exists with other content"):
        save_network(network, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_a_failed_write_leaves_nothing(filled_network, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_network(filled_network(2), tmp_path / "new" / "mine.safetensors")
    assert list((tmp_path / "new").iterdir()) == []


def test_save_refuses_another_suffix(filled_network, tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        save_network(filled_network(2), tmp_path / "mine.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 9, 1000, -4, -1])
def test_truncated(filled_network, tmp_path, keep):
    path = tmp_path / "mine.safetensors"
    save_network(filled_network(2), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be read as an intact safetensors file|must be a safetensors file"):
        load_network(path)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(tmp_path, seed):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(bytes(torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(seed)).tolist()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_network(path)


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pth"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled(filled_network, tmp_path, name, how):
    path, state = tmp_path / name, filled_network(2).state_dict()
    if how == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}))
    with pytest.raises(ValueError, match=r"is a pickle, expected safetensors.*weights convert"):
        load_network(path)


def test_foreign_and_missing_tensors(filled_network, tmp_path):
    network = filled_network(2)
    state = dict(network.state_dict())
    state["head.weight"] = state.pop("conv_out.weight")
    path = write(tmp_path / "mine.safetensors", state, card_of(network))
    with pytest.raises(ValueError, match=r"1 missing \['conv_out.weight'\], 1 foreign \['head.weight'\]"):
        load_network(path)


def test_weights_of_the_wrong_dimension(filled_network, tmp_path):
    path = write(tmp_path / "mine.safetensors", filled_network(3).state_dict(), card_of(filled_network(2)))
    with pytest.raises(ValueError, match=r"must be torch.float32"):
        load_network(path)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.double, torch.Tensor.half, lambda w: w[:, :5], lambda w: w.transpose(0, 1), lambda w: w[None]],
    ids=["float64", "float16", "cropped", "transposed", "extra axis"],
)
def test_wrong_dtype_or_shape(filled_network, tmp_path, change):
    network = filled_network(2)
    state = {**network.state_dict(), "conv_out.weight": change(network.conv_out.weight.detach())}
    path = write(tmp_path / "mine.safetensors", state, card_of(network))
    with pytest.raises(ValueError, match=r"'conv_out.weight' must be torch.float32 \(2, 10, 3, 3\)"):
        load_network(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(filled_network, tmp_path, value):
    network = filled_network(2)
    network.conv_out.bias[1] = value
    path = write(tmp_path / "mine.safetensors", network.state_dict(), card_of(network))
    with pytest.raises(ValueError, match=r"'conv_out\.bias' holds NaN or infinity"):
        load_network(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "single metadata key 'monai_drdm'"),
        ({"format": "pt"}, "single metadata key 'monai_drdm'"),
        ({"monai_drdm": "{}", "format": "pt"}, "single metadata key 'monai_drdm'"),
        ({"monai_drdm": "{}"}, "cannot be read as a network card"),
        ({"monai_drdm": "not json"}, "cannot be read as a network card"),
        (
            {"monai_drdm": '{"name":"a","kind":"unet","spatial_dims":2,"working_size":8}'},
            r"kind must be one of \['recresacnet', 'velocity_unet'\], got 'unet'",
        ),
        (
            {"monai_drdm": '{"name":"a","kind":"recresacnet","spatial_dims":5,"working_size":8}'},
            "spatial_dims must be an integer from 1 to 3",
        ),
    ],
)
def test_wrong_metadata(filled_network, tmp_path, metadata, message):
    path = write(tmp_path / "mine.safetensors", filled_network(2).state_dict(), metadata)
    with pytest.raises(ValueError, match=message):
        load_network(path)


def test_unknown_name_lists_the_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(", ".join(list_networks()))):
        load_network("resnet50")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*mine\.safetensors"):
        load_network(tmp_path / "mine.safetensors")


def test_weights_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path / "chosen"))
    assert weights_folder() == tmp_path / "chosen"
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights_folder() == tmp_path / "cache" / "monai_drdm"
    monkeypatch.delenv("MONAI_DRDM_WEIGHTS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".cache" / "monai_drdm"


def test_hash_is_checked_before_anything_is_parsed(filled_network, tmp_path, monkeypatch):
    def refuse(_):
        raise AssertionError("parsed before the hash was checked")

    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    save_network(filled_network(2), tmp_path / f"{CARDIAC}.safetensors")  # intact, but not the published weights
    monkeypatch.setattr(weights, "parse_safetensors", refuse)
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, expected {network_card(CARDIAC).sha256}"):
        load_network(CARDIAC)


def test_no_verified_hash_no_loading_by_name(filled_network, tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    save_network(filled_network(3), tmp_path / "zheng2026-lct-3d.safetensors")
    with pytest.raises(ValueError, match=r"no verified hash of 'zheng2026-lct-3d'.*weights convert"):
        load_network("zheng2026-lct-3d")


def test_known_name(published_weights):
    network = load_network(CARDIAC)
    assert network.card == network_card(CARDIAC)
    assert network_sha256(network) == network_card(CARDIAC).sha256
    by_path = load_network(published_weights / f"{CARDIAC}.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), by_path.state_dict().values()))


@pytest.mark.parametrize("position", [3, 100, 40_000, -1])
def test_one_byte_tampered(published_weights, tmp_path, monkeypatch, position):
    data = bytearray((published_weights / f"{CARDIAC}.safetensors").read_bytes())
    data[position] ^= 1
    (tmp_path / f"{CARDIAC}.safetensors").write_bytes(data)
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match="sha256"):
        load_network(CARDIAC)


def test_a_file_that_is_called_like_a_known_network(small_network, tmp_path, monkeypatch):
    """Its hash is not pinned, so it is not what a name stands for."""
    save_network(small_network(2), tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename(tmp_path / "anatomy-2d")
    monkeypatch.chdir(tmp_path)
    assert load_network("anatomy-2d").card.name == "anatomy-2d"
    assert load_network(tmp_path / "anatomy-2d").card.name == "untrained-2d"


def test_half_precision_is_not_saved(tmp_path):
    """What could not be read again."""
    with pytest.raises(ValueError, match=r"must be float32, got torch.float16. Save network.float\(\)"):
        save_network(VelocityUNet(2, channels=(4, 6)).half(), tmp_path / "half.safetensors")
    assert not list(tmp_path.iterdir())

import hashlib
import json
import re
from pathlib import Path

import pytest

from monai_drdm.networks import auto_network, list_networks, load_network, network_card
from monai_drdm.networks.registry import list_published, published_file, shipped_file
from monai_drdm.networks.weights import read_network


def test_names_are_sorted_and_known():
    names = list_networks()
    assert list(names) == sorted(names)
    assert {"zheng2026-cmr-2d", "zheng2026-lct-3d"} <= set(names)


@pytest.mark.parametrize("name", list_networks())
def test_cards_make_sense(name):
    card = network_card(name)
    card.check()
    assert card.name == name
    assert card.source
    assert card.licence
    assert card.training_data
    assert card.sha256 == "" or re.fullmatch("[0-9a-f]{64}", card.sha256)
    assert 0 < card.level[0] <= card.level[1] <= 1


def test_published_cards():
    cardiac, lung = network_card("zheng2026-cmr-2d"), network_card("zheng2026-lct-3d")
    assert (cardiac.spatial_dims, cardiac.working_size) == (2, 256)
    assert (lung.spatial_dims, lung.working_size) == (3, 128)
    assert lung.sha256 == ""  # nobody has verified one


@pytest.mark.parametrize("name", ["zheng2026-cmr-2d", "zheng2026-lct-3d"])
def test_published_files_are_pinned(name):
    published = published_file(name)
    assert "/1c70370f0e0159161daae726d96d6cf975cac5ef/" in published.url
    assert published.url.startswith("https://")
    assert re.fullmatch("[0-9a-f]{64}", published.sha256) or re.fullmatch("[0-9a-f]{40}", published.git_blob)


def test_every_network_is_published_or_shipped():
    shipped = set(list_networks()) - set(list_published())
    assert shipped == {"anatomy-2d", "anatomy-3d"}
    for name in shipped:
        path = shipped_file(name)
        assert path.stat().st_size <= 4_000_000
        assert hashlib.sha256(path.read_bytes()).hexdigest() == network_card(name).sha256
        with pytest.raises(ValueError, match="comes with this package"):
            published_file(name)
    assert all(shipped_file(name) is None for name in list_published())


@pytest.mark.parametrize("name", ["anatomy-2d", "anatomy-3d"])
def test_shipped_files_say_what_the_registry_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    card, inside = network_card(name), read_network(shipped_file(name)).card
    assert load_network(name).card == card
    for entry in ("name", "kind", "spatial_dims", "working_size", "channels", "sampler", "steps", "level", "licence"):
        assert getattr(inside, entry) == getattr(card, entry)
    assert inside.training_data == card.training_data
    (tmp_path / f"{name}.safetensors").write_bytes(b"another file in the folder that is searched first")
    with pytest.raises(ValueError, match="expected " + card.sha256):
        load_network(name)


@pytest.mark.parametrize("name", ["anatomy-2d", "anatomy-3d"])
def test_gates_are_those_that_were_measured(name):
    card = network_card(name)
    lines = (Path(__file__).parents[2] / "benchmarks" / "plausibility" / "gates_test.jsonl").read_text().splitlines()
    every = [json.loads(line) for line in lines]
    rows = [row for row in every if (row["sha256"], row["steps"], row["level"]) == (card.sha256, card.steps, 0.6)]
    columns = {
        "px_without_affine_256": "displacement_no_affine_256",
        "log_jacobian_std": "log_jacobian_std",
        "diversity": "diversity",
        "fold_fraction": "folds_corner",
    }
    domains = {row["domain"] for row in rows}
    assert set(card.gates) == {f"{domain}_{gate}" for domain in domains for gate in columns}
    for domain in domains:
        for gate, column in columns.items():
            values = [row[column] for row in rows if row["domain"] == domain]
            assert len(values) >= 20
            assert card.gates[f"{domain}_{gate}"] == pytest.approx(sum(values) / len(values), abs=0.005)


@pytest.mark.parametrize("function", [network_card, published_file])
def test_unknown_name_lists_the_known(function):
    with pytest.raises(ValueError, match=r"zheng2026-cmr-2d, zheng2026-lct-3d.*got 'resnet'"):
        function("resnet")


def test_auto_network_fits_its_dimensions():
    assert [network_card(auto_network(dims)).spatial_dims for dims in (2, 3)] == [2, 3]


@pytest.mark.parametrize("dims", [1, 4])
def test_no_auto_network(dims):
    with pytest.raises(ValueError, match=f"no default network for {dims}D"):
        auto_network(dims)


def test_auto_is_for_what_knows_the_image():
    with pytest.raises(ValueError, match=r"'auto' depends on the image\. Name anatomy-2d for 2D or anatomy-3d for 3D"):
        load_network("auto")

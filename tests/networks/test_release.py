import hashlib
import io
import pickle
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from monai_drdm.networks import convert_published, load_network, network_card, pull_network, registry

CARDIAC, LUNG = "zheng2026-cmr-2d", "zheng2026-lct-3d"


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@contextmanager
def serve(content, status=200):
    """The address of a local server that answers every request with ``content``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        finally:
            server.shutdown()
            thread.join()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/weights.pth"


@pytest.fixture(autouse=True)
def direct_connection(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def pretend(monkeypatch):
    """Make the registry take given bytes for the published file of a name."""

    def register(name, data, url="", by="sha256"):
        identity = {"sha256": hashlib.sha256(data).hexdigest()}
        if by == "git_blob":
            identity = {"git_blob": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        monkeypatch.setitem(registry._PUBLISHED, name, registry.PublishedFile(url, **identity))

    return register


def pth(network, **changes):
    buffer = io.BytesIO()
    torch.save({**network.state_dict(), **changes}, buffer)
    return buffer.getvalue()


def test_conversion_gives_the_pinned_hash(reference, tmp_path):
    path = convert_published(reference / "000000_cmr_recresacnet.pth", tmp_path)
    assert path == tmp_path / f"{CARDIAC}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == network_card(CARDIAC).sha256
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_conversion_keeps_every_number(reference, published_weights):
    published = torch.load(reference / "000000_cmr_recresacnet.pth", map_location="cpu", weights_only=True)
    converted = load_network(published_weights / f"{CARDIAC}.safetensors").state_dict()
    assert converted.keys() == published.keys()
    assert all(torch.equal(converted[name], published[name]) for name in published)


def test_conversion_into_the_weights_folder(filled_network, pretend, tmp_path, monkeypatch):
    network = filled_network(2)
    pretend(CARDIAC, pth(network))
    (tmp_path / "any name").write_bytes(pth(network))
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path / "new" / "folder"))
    path = convert_published(tmp_path / "any name")
    assert path == tmp_path / "new" / "folder" / f"{CARDIAC}.safetensors"
    loaded = load_network(path)
    assert torch.equal(loaded.conv_out.weight, network.conv_out.weight)
    assert (loaded.card.name, loaded.card.working_size) == (CARDIAC, 256)


def test_conversion_recognises_a_git_blob(filled_network, pretend, tmp_path):
    data = pth(filled_network(3))
    pretend(LUNG, data, by="git_blob")
    (tmp_path / "lung.pth").write_bytes(data)
    path = convert_published(tmp_path / "lung.pth", tmp_path)
    assert path.name == f"{LUNG}.safetensors"
    assert load_network(path).card.spatial_dims == 3


def test_conversion_twice_is_the_same(filled_network, pretend, tmp_path):
    data = pth(filled_network(2))
    pretend(CARDIAC, data)
    (tmp_path / "cardiac.pth").write_bytes(data)
    path = convert_published(tmp_path / "cardiac.pth", tmp_path)
    before = path.stat().st_mtime_ns
    assert convert_published(tmp_path / "cardiac.pth", tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_conversion_never_overwrites(filled_network, pretend, tmp_path):
    data = pth(filled_network(2))
    pretend(CARDIAC, data)
    (tmp_path / "cardiac.pth").write_bytes(data)
    target = tmp_path / f"{CARDIAC}.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists with other content"):
        convert_published(tmp_path / "cardiac.pth", tmp_path)
    assert target.read_bytes() == b"mine"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth"):
        convert_published(tmp_path / "none.pth", tmp_path)


def test_unknown_file_is_never_unpickled(tmp_path):
    victim, path = tmp_path / "created", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(ValueError, match="is none of the published files"):
        convert_published(path, tmp_path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())
    assert victim.exists()  # the pickle was a real one


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_even_a_recognised_file_runs_no_code(pretend, tmp_path, how):
    victim, path = tmp_path / "created", tmp_path / "evil.pth"
    if how == "torch":
        torch.save({"conv_out.bias": Malicious(victim)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    pretend(CARDIAC, path.read_bytes())
    with pytest.raises(ValueError, match="weights_only=True"):
        convert_published(path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": torch.zeros(1)}, "foreign"),
        ({"conv_out.bias": torch.zeros(3)}, "'conv_out.bias' must be"),
        ({"conv_out.bias": torch.zeros(2).double()}, "'conv_out.bias' must be"),
        ({"conv_out.bias": torch.tensor([0.0, float("nan")])}, "NaN or infinity"),
    ],
)
def test_recognised_file_with_wrong_tensors(filled_network, pretend, tmp_path, change, message):
    path = tmp_path / "cardiac.pth"
    path.write_bytes(pth(filled_network(2), **change))
    pretend(CARDIAC, path.read_bytes())
    with pytest.raises(ValueError, match=message):
        convert_published(path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["cardiac.pth"]


def test_pull_of_the_published_file(reference, tmp_path):
    with serve((reference / "000000_cmr_recresacnet.pth").read_bytes()) as url:
        path = pull_network(CARDIAC, tmp_path, url=url)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == network_card(CARDIAC).sha256


def test_pull(filled_network, pretend, tmp_path):
    network = filled_network(2)
    with serve(pth(network)) as url:
        pretend(CARDIAC, pth(network), url)
        path = pull_network(CARDIAC, tmp_path)
    assert torch.equal(load_network(path).conv_out.weight, network.conv_out.weight)


def test_loading_by_name_pulls_what_is_missing(filled_network, pretend, tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    data = pth(filled_network(2))
    with serve(data) as url:
        pretend(CARDIAC, data, url)
        with pytest.raises(ValueError, match=f"expected {network_card(CARDIAC).sha256}"):
            load_network(CARDIAC)  # it was pulled, and its conversion is then held against the registry
    assert (tmp_path / f"{CARDIAC}.safetensors").is_file()


@pytest.mark.parametrize("content", [b"", b"<html>log in first</html>", bytes(4096)])
def test_pull_of_wrong_content_keeps_nothing(tmp_path, content):
    digest = hashlib.sha256(content).hexdigest()
    with serve(content) as url, pytest.raises(ValueError, match=f"sha256 {digest}, expected .* Nothing was kept"):
        pull_network(CARDIAC, tmp_path / "folder", url=url)
    assert list(tmp_path.iterdir()) == []


def test_pull_of_a_malicious_pickle_runs_no_code(tmp_path):
    with serve(pickle.dumps(Malicious(tmp_path / "created"))) as url, pytest.raises(ValueError, match="sha256"):
        pull_network(CARDIAC, tmp_path, url=url)
    assert list(tmp_path.iterdir()) == []


def unreachable_message():
    return rf"(?s)monai-drdm weights pull {CARDIAC}.*weights convert FILE\.pth.*MONAI_DRDM_WEIGHTS"


def test_unreachable(tmp_path):
    with pytest.raises(FileNotFoundError, match=unreachable_message()):
        pull_network(CARDIAC, tmp_path, url=closed_port())
    assert list(tmp_path.iterdir()) == []


def test_unreachable_when_loading_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path))
    published = registry.PublishedFile(closed_port(), registry.published_file(CARDIAC).sha256)
    monkeypatch.setitem(registry._PUBLISHED, CARDIAC, published)
    with pytest.raises(FileNotFoundError, match=unreachable_message()) as caught:
        load_network(CARDIAC)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("status", [404, 500])
def test_server_that_refuses(tmp_path, status):
    with serve(b"", status) as url, pytest.raises(FileNotFoundError, match=unreachable_message()):
        pull_network(CARDIAC, tmp_path, url=url)


def test_no_verified_hash_no_download(tmp_path):
    asked = closed_port()
    with pytest.raises(ValueError, match=f"no verified sha256 of {re.escape(repr(LUNG))}"):
        pull_network(LUNG, tmp_path, url=asked)


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=f"{CARDIAC}, {LUNG}"):
        pull_network("resnet", tmp_path)

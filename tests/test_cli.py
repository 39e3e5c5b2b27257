import argparse
import dataclasses
import hashlib
import io
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from monai_drdm import __version__
from monai_drdm.cli import _parser, main
from monai_drdm.diffusion.trial import check_draws
from monai_drdm.interrupts import ends_at_once
from monai_drdm.networks import list_networks, network_card, registry, save_network, VelocityUNet
from monai_drdm.networks.kinds import SAMPLERS
from monai_drdm.registration import RegistrationNetwork, save_registration
from monai_drdm.registration.config import RegistrationConfig
from monai_drdm.registration.networks import Structure
from monai_drdm.train.config import TrainConfig
from monai_drdm.training.command import TrainingCommand
from monai_drdm.training.task import Validation

CARDIAC, LUNG = "zheng2026-cmr-2d", "zheng2026-lct-3d"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty weights folder."""
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "weights"


@pytest.fixture
def published(filled_network, tmp_path, monkeypatch):
    """A file that the registry takes for the published cardiac one, and a server that has it."""
    buffer = io.BytesIO()
    torch.save(filled_network(2).state_dict(), buffer)
    data = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    path = tmp_path / "published.pth"
    path.write_bytes(data)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/published.pth"
        file = registry.PublishedFile(url, hashlib.sha256(data).hexdigest())
        monkeypatch.setitem(registry._PUBLISHED, CARDIAC, file)
        yield path
        server.shutdown()
        thread.join()


def test_list(capsys, folder):
    assert main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    for name in list_networks():
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert f"{network_card(name).spatial_dims}D" in line
        assert ("[in the package]" if name.startswith("anatomy") else "[not here]") in line
    assert not folder.exists()  # looking makes nothing


def test_list_finds_what_is_here(capsys, filled_network, folder):
    save_network(filled_network(2), folder / f"{CARDIAC}.safetensors")
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("[here]") for line in lines if line.startswith("zheng")] == [True, False]


@pytest.mark.parametrize("chosen", [False, True])
def test_convert(capsys, published, folder, tmp_path, chosen):
    target = tmp_path / "chosen" if chosen else folder
    assert main(["weights", "convert", str(published), *(["--folder", str(target)] if chosen else [])]) == 0
    (path,) = target.iterdir()
    assert path.name == f"{CARDIAC}.safetensors"
    assert f"{path}  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in capsys.readouterr().out


def test_convert_of_the_published_file(capsys, reference, folder):
    assert main(["weights", "convert", str(reference / "000000_cmr_recresacnet.pth")]) == 0
    assert network_card(CARDIAC).sha256 in capsys.readouterr().out
    assert main(["weights", "verify", CARDIAC]) == 0
    assert f"{CARDIAC}  ok  recresacnet 2D  sha256 {network_card(CARDIAC).sha256}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
def test_convert_refuses(capsys, folder, tmp_path, content):
    path = tmp_path / "other.pth"
    if content is not None:
        path.write_bytes(content)
    assert main(["weights", "convert", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("monai-drdm: ")
    assert str(path) in err
    assert not folder.exists()


@pytest.mark.parametrize("chosen", [False, True])
def test_pull(capsys, published, folder, tmp_path, chosen):
    target = tmp_path / "chosen" if chosen else folder
    assert main(["weights", "pull", CARDIAC, *(["--folder", str(target)] if chosen else [])]) == 0
    (path,) = target.iterdir()
    assert capsys.readouterr().out.strip() == str(path)
    assert main(["weights", "convert", str(published), "--folder", str(target)]) == 0  # the same file: nothing to do


def test_pull_without_a_verified_hash(capsys, folder):
    assert main(["weights", "pull", LUNG]) == 1
    assert "no verified sha256" in capsys.readouterr().err
    assert not folder.exists()


def test_pull_of_an_unknown_name(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["weights", "pull", "resnet"])
    assert exit_.value.code == 2
    assert all(name in capsys.readouterr().err for name in (CARDIAC,))


def a_network(dims=2, **card):
    """A network of few features that changes fields a little."""
    torch.manual_seed(0)
    network = VelocityUNet(dims, channels=(4, 6))
    torch.nn.init.normal_(network.out.weight, std=0.01)
    network.card = replace(network.card, **card)
    return network


def test_verify_of_own_files(capsys, small_network, tmp_path):
    networks = [small_network(2), a_network(2), a_network(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    digests = [save_network(network, path) for network, path in zip(networks, paths)]
    assert main(["weights", "verify", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = ["recresacnet 2D", "velocity_unet 2D", "velocity_unet 3D"]
    assert lines == [f"{path}  ok  {kind}  sha256 {one}" for path, kind, one in zip(paths, kinds, digests)]


@pytest.mark.parametrize(("loss", "warns"), [(0.99, True), (1.2, True), (0.9, False)])
def test_verify_warns_of_a_network_that_is_no_better_than_doing_nothing(capsys, tmp_path, loss, warns):
    """The card is written by the validation of a training run."""
    validation = Validation({"validation_loss": loss}, {"validation_loss": 1.0})
    source, path = "; ".join(filter(None, ["trained", validation.doubt])), tmp_path / "mine.safetensors"
    save_network(a_network(source=source, gates=validation.gates()), path)
    assert main(["weights", "verify", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"{path}  ok" in out
    assert ("no better than doing nothing" in err, str(loss) in err) == (warns, warns)


@pytest.mark.parametrize("name", ["anatomy-2d", "anatomy-3d"])
def test_the_networks_in_the_package_draw(capsys, name):
    assert main(["weights", "verify", name]) == 0
    assert f"{name}  ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factor", "card", "reason"),
    [
        (0, {}, "all that it predicts is 0"),
        (1e3, {}, "NaN or infinite|moves"),
        (1e30, {}, "NaN or infinite|moves"),
        (float("nan"), {}, "NaN or infinity"),
        (float("inf"), {}, "NaN or infinity"),
        (1, {"working_size": 1}, "working_size must be from 16 to 1025 in 2D, got 1"),
        (1, {"working_size": 4096}, "working_size must be from 16 to 1025 in 2D, got 4096"),
        (1, {"sampler": "magic"}, "sampler must be one of"),
        (1, {"sampler": "reference"}, "sampler must be one of"),
    ],
)
def test_verify_of_what_draws_nothing_sensible(capsys, tmp_path, factor, card, reason):
    network, path = a_network(**card), tmp_path / "mine.safetensors"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    save_network(network, path)
    begun = time.monotonic()
    assert main(["weights", "verify", str(path)]) == 1
    assert time.monotonic() - begun < 60
    out, err = capsys.readouterr()
    assert "ok" not in out
    assert str(path) in err
    assert re.search(reason, err)


def test_verify_takes_seconds_whatever_the_card_says(capsys, tmp_path):
    """Of large images and many steps it draws a small one in few steps, and leaves the network as it is."""
    network = a_network(working_size=1025, steps=1000)
    save_network(network, tmp_path / "mine.safetensors")
    begun = time.monotonic()
    assert main(["weights", "verify", str(tmp_path / "mine.safetensors")]) == 0
    assert time.monotonic() - begun < 60
    check_draws(network)
    assert (network.card.working_size, network.card.steps) == (1025, 1000)
    assert not network._forward_hooks


def test_verify_of_a_known_name_checks_its_hash(capsys, filled_network, folder):
    save_network(filled_network(2), folder / f"{CARDIAC}.safetensors")
    assert main(["weights", "verify", CARDIAC]) == 1
    out, err = capsys.readouterr()
    assert "ok" not in out
    assert f"expected {network_card(CARDIAC).sha256}" in err


def test_verify_of_what_is_missing(capsys):
    assert main(["weights", "verify", CARDIAC]) == 1
    assert "no file" in capsys.readouterr().err


def test_verify_of_a_registration_network_in_a_file(capsys, tmp_path):
    path = tmp_path / "network.safetensors"
    save_registration(RegistrationNetwork(Structure("voxelmorph", 2, channels=3, depth=2)), path)
    assert main(["weights", "verify", str(path)]) == 0
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{path}  ok  registration 2D  sha256 {sha256}" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["weights", "verify", str(path)]) == 1
    assert "ok" not in capsys.readouterr().out


def test_verify_of_a_damaged_file(capsys, filled_network, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_network(filled_network(2), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["weights", "verify", str(path)]) == 1
    assert "cannot be read as an intact safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["weights"], ["weights", "burn"], ["weights", "verify"], ["nonsense"]])
def test_wrong_call(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["weights", "--help"], ["weights", "convert", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "usage: monai-drdm" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_module_runs(capsys, monkeypatch):
    """As ``python -m monai_drdm.cli`` runs it, in this process."""
    monkeypatch.delitem(sys.modules, "monai_drdm.cli")
    monkeypatch.setattr(sys, "argv", ["cli.py", "weights", "list"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("monai_drdm.cli", run_name="__main__", alter_sys=True)
    assert exit_.value.code == 0
    assert CARDIAC in capsys.readouterr().out


NO_TORCH = """
import contextlib, io, sys
from monai_drdm.cli import main
for arguments in (["--help"], ["weights", "list"], ["augment", "--help"], ["train", "--help"], ["register", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(arguments)
    assert said.getvalue()
print(sorted({'torch', 'monai', 'numpy'} & set(sys.modules)))
"""


def test_what_needs_no_torch_starts_without_it():
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


STARTS = [
    ["-c", "import sys; from monai_drdm.cli import main; sys.exit(main(['demo', '--out', sys.argv[1]]))"],
    ["-m", "monai_drdm.train", "--out"],
    ["-m", "monai_drdm.registration.train", "--pairs", "none", "--out"],
]


@pytest.mark.skipif(sys.platform == "win32", reason="no process can send Ctrl-C to another here")
def test_an_interrupt_while_a_command_starts(tmp_path):
    """All at once, for each takes seconds to import what it needs; -v tells when that has begun."""

    def heeding():  # the tests may have been started in the background, where Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heeding}
    begun = [subprocess.Popen([sys.executable, "-v", *words, str(tmp_path / "out")], **options) for words in STARTS]
    for process in begun:
        for line in process.stderr:
            if line.startswith("import 'torch") or ("code object from" in line and "torch/__init__" in line):
                break
        process.send_signal(signal.SIGINT)
    for process, name in zip(begun, ("monai-drdm", "monai_drdm.train", "monai_drdm.registration.train")):
        _, said = process.communicate()
        assert process.returncode == 130
        assert f"{name}: interrupted" in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def options_of(parser):
    """All options of a parser and of its commands, each with the words that lead there."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        elif action.option_strings:
            yield parser.prog, action


def test_help_says_choices_and_defaults():
    """Of every option that takes a value and may be left out, and every setting of a training run."""
    options = list(options_of(_parser()))
    for config_class in (TrainConfig, RegistrationConfig):
        command = TrainingCommand("name", "", config_class, {}, lambda: None)
        options += list(options_of(command._parser("name")))
        for one in dataclasses.fields(config_class):
            assert all(str(choice) in one.metadata["help"] for choice in one.metadata["choices"]), one.name
    assert {"--levels", "--sampler", "--recovery", "--config"} <= {one.option_strings[0] for _, one in options}
    for program, one in options:
        if one.nargs != 0 and not one.required and one.option_strings[0] not in ("--images", "--datalist"):
            assert "default: " in one.help, (program, one.option_strings)
            if isinstance(one.default, (int, float)):
                assert f"default: {one.default:g}" in one.help, (program, one.option_strings)
    (sampler, *_) = [one.help for _, one in options if "--sampler" in one.option_strings]
    assert all(name in sampler for samplers in SAMPLERS.values() for name in samplers)
    (steps, *_) = [one.help for _, one in options if "--steps" in one.option_strings]
    assert {network_card(name).steps for name in list_networks() if name.startswith("anatomy")} == {12}
    assert "12 for" in steps


@pytest.mark.parametrize("command", ["train", "register"])
def test_training_commands_hand_over_all_arguments(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: monai-drdm {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main([command, "--max-minutes", "1"])
    assert exit_.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "register"])
def test_an_extra_that_is_missing_is_named(fork, tmp_path, command):
    def call():
        for name in [name for name in sys.modules if name.startswith(("monai_drdm.train", "monai_drdm.registration"))]:
            del sys.modules[name]
        sys.modules["ignite"] = None
        sys.exit(main([command, "--set", "seed=1", "--out", str(tmp_path / "run")]))

    child = fork(call)
    said = child.communicate()
    assert child.returncode == 1
    assert "pip install 'monai-drdm[train]'" in said[1]
    assert "Traceback" not in said[1]


@pytest.mark.parametrize("words", [["weights", "list"], ["register", "--help"], ["augment", "--help"]])
def test_other_commands_need_no_extra(fork, words):
    def call():
        for name in [name for name in sys.modules if name.startswith(("monai_drdm.", "ignite", "matplotlib"))]:
            del sys.modules[name]
        sys.modules |= dict.fromkeys(("ignite", "matplotlib", "tensorboard", "yaml"))
        sys.exit(main(words))

    child = fork(call)
    said = child.communicate()
    assert child.returncode == 0, said[1]


EMPTY = [
    ["demo", "--out"],
    ["demo", "--image"],
    ["demo", "--label"],
    ["bank", "info"],
    ["weights", "convert"],
    ["weights", "pull", "zheng2026-cmr-2d", "--folder"],
    *([command, "--out", "run", flag] for command in ("train", "register") for flag in ("--init", "--config")),
    ["train", "--out"],
    ["train", "--out", "run", "--data"],
    ["register", "--out", "run", "--images", "images", "--labels"],
]


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_path_is_no_default(words, tmp_path, monkeypatch, capsys):
    """As of a shell variable that is not set: it is neither the current folder nor the same as no path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*words, ""])
    assert stopped.value.code == 2
    assert "got an empty text" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no process can send Ctrl-C to another here")
def test_who_ignores_interrupts_goes_on_to_ignore_them(fork):
    """As a command does that a script has started in the background."""

    def ignoring():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ends_at_once("monai-drdm"):
            signal.raise_signal(signal.SIGINT)
        return 0

    process = fork(ignoring)
    process.communicate()
    assert process.returncode == 0

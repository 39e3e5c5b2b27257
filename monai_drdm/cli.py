"""The command ``monai-drdm``, also ``python -m monai_drdm.cli``."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TYPE_CHECKING

from monai_drdm._version import __version__
from monai_drdm.networks import convert_published, list_networks, network_card, pull_network, weights_folder
from monai_drdm.networks.registry import known_file, list_published
from monai_drdm.networks.weights import read_network

if TYPE_CHECKING:
    from monai_drdm.augment import AugmentReport

_SKIPPED = 3
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done, 1 an error that is explained, 2 a wrong call, 3 done but for some cases, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"monai-drdm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("monai-drdm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="monai-drdm", description="Plausible random anatomy by deformation recovery.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="deform one real scan and draw what happened")
    demo.add_argument("--image", type=Path, help="NIfTI image, 2D or 3D; default: the MR volume in nibabel's test data")
    demo.add_argument("--label", type=Path, help="NIfTI label map of the image; default: a threshold foreground")
    demo.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="new or empty folder (default: demo_output)"
    )
    demo.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    demo.add_argument("--level", type=float, default=0.6, help="deformation level in (0, 1] (default: 0.6)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.set_defaults(run=_demo)

    _add_augment(commands.add_parser("augment", help="deform a data set on disk", description=_AUGMENT, epilog=_CODES))

    _add_pairs(commands.add_parser("pairs", help="make registration pairs", description=_PAIRS, epilog=_CODES))

    _add_bank(commands.add_parser("bank", help="draw fields ahead of training"))

    weights = commands.add_parser("weights", help="list, pull, convert and verify network weights")
    actions = weights.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="known networks and where their weights are").set_defaults(run=_list)
    pull = actions.add_parser("pull", help="download published weights at a pinned commit, hash checked")
    pull.add_argument("name", choices=list_published())
    pull.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    pull.set_defaults(run=_pull)
    convert = actions.add_parser("convert", help="convert a published .pth, recognised by its hash")
    convert.add_argument("file", type=Path)
    convert.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    convert.set_defaults(run=_convert)
    verify = actions.add_parser("verify", help="check hash and content of weights")
    verify.add_argument("network", nargs="+", help="network name or .safetensors file")
    verify.set_defaults(run=_verify)
    return parser


_AUGMENT = (
    "Draw fields for every case and level and write deformed images and labels, the fields, records that replay them, "
    "and a MONAI datalist. Affines, orientation and data types are kept. An interrupted run goes on when it is called "
    "again."
)
_PAIRS = (
    "Make synthetic registration pairs of every image (paper, Algorithm 4): a moving image, a fixed one, the exact "
    "field between them and its inverse as ITK displacement fields, labels, records and a MONAI datalist. An "
    "interrupted run goes on when it is called again."
)
_CODES = (
    "Exit codes: 0 all written, 1 an error that is explained, 2 a wrong call, 3 some cases skipped, 130 interrupted."
)


def _add_augment(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.5, 0.8], help="deformation levels in (0, 1]")
    parser.add_argument("--draws", type=int, default=1, help="fields per case and level (default: 1)")
    parser.set_defaults(run=_augment)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    parser.add_argument("--pairs", type=int, default=1, help="pairs of every image (default: 1)")
    for name, text in (("augmentation", "that makes the moving image"), ("synthesis", "between the images")):
        parser.add_argument(
            f"--{name}-level",
            type=float,
            nargs=2,
            default=(0.3, 0.8),
            metavar=("LOW", "HIGH"),
            help=f"range of levels of the field {text} (default: 0.3 0.8)",
        )
    parser.add_argument("--no-augmentation", action="store_true", help="the moving images are the given ones")
    parser.set_defaults(run=_pairs)


def _add_cases(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of images (NIfTI, .mha, .nrrd, .png)")
    source.add_argument("--datalist", type=Path, help="MONAI datalist (JSON) instead of folders")
    parser.add_argument("--labels", type=Path, help="folder of label maps with the file names of the images")
    parser.add_argument("--section", default="training", help="section of the datalist (default: training)")
    parser.add_argument("--out", type=Path, required=True, help="new folder, or one to go on in")
    parser.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--sampler", default="auto", help="sampler (default: the network's)")
    parser.add_argument("--steps", type=int, help="recovery steps (default: the network's)")
    parser.add_argument("--recovery", type=float, default=1.0, help="factor on recovery steps in [0, 1] (default: 1)")
    parser.add_argument(
        "--slice-axis", type=int, help="deform volumes by one in-plane field across this axis (0, 1, 2)"
    )
    parser.add_argument("--max-displacement-mm", type=float, help="scale fields down to this")
    parser.add_argument(
        "--label-mode", choices=("nearest", "label"), default="nearest", help="how labels are resampled"
    )
    parser.add_argument("--device", help="where the network runs (default: cpu)")
    _add_split(parser)
    parser.add_argument("--figure", action="store_true", help="draw the first cases before and after: overview.png")
    parser.add_argument("--force", action="store_true", help="draw everything again; replaces files of the same name")


def _augment(options: argparse.Namespace) -> int:
    from monai_drdm.augment import augment, AugmentSettings

    settings = AugmentSettings(levels=tuple(options.levels), draws=options.draws, **_settings_of(options))
    return _fill(options, augment, settings)


def _pairs(options: argparse.Namespace) -> int:
    from monai_drdm.augment import make_pairs, PairSettings

    settings = PairSettings(
        augmentation_level=None if options.no_augmentation else tuple(options.augmentation_level),
        synthesis_level=tuple(options.synthesis_level),
        pairs=options.pairs,
        **_settings_of(options),
    )
    return _fill(options, make_pairs, settings)


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("network", "sampler", "steps", "recovery", "slice_axis", "max_displacement_mm", "label_mode", "seed")
    return {name: getattr(options, name) for name in names}


def _fill(options: argparse.Namespace, function: Callable[..., AugmentReport], settings: object) -> int:
    from monai_drdm.augment import draw_overview
    from monai_drdm.executors import workers
    from monai_drdm.io import find_cases, read_cases

    if options.figure:
        _require_matplotlib("--figure")
    if options.datalist is not None and options.labels is not None:
        raise ValueError("--labels goes with --images; a datalist names its labels itself.")
    cases = (
        read_cases(options.datalist, options.section)
        if options.datalist
        else find_cases(options.images, options.labels)
    )
    with workers(options.workers) as executor:
        report = function(
            cases,
            options.out,
            settings,
            force=options.force,
            device=options.device,
            progress=True,
            executor=executor,
            shard=options.shard,
        )
    print(f"{report.written} written, {report.kept} already there, {len(report.failed)} cases skipped")
    print(report.datalist)
    if options.figure and report.written + report.kept:
        print(draw_overview(report))
    return _SKIPPED if report.failed else 0


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work (default: 1)")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only part I of N, counted from 0: for array jobs into one folder"
    )


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return int(part), int(parts)


_BANK = (
    "Draw fields for every image ahead of training, as RandDRDMBankd takes them. Images are known by their file names "
    "without suffix or, where those repeat, by their paths below the common folder, joined by '_': give RandDRDMBankd "
    "the same as id_key, and apply it to images as they are on disk, before anything changes their grid or their "
    "values. A volume of one slice is a 2D image here, unless --slice-axis is given: drop its axis in the pipeline too "
    "(SqueezeDimd). An interrupted build goes on when it is called again."
)


def _add_bank(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser(
        "build", help="draw the fields of a folder or datalist", description=_BANK, epilog=_CODES
    )
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of images (NIfTI, .mha, .nrrd, .png)")
    source.add_argument("--datalist", type=Path, help="MONAI datalist (JSON) instead of a folder")
    build.add_argument("--section", default="training", help="section of the datalist (default: training)")
    build.add_argument("--out", type=Path, required=True, help="new folder, or one to go on in")
    build.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    build.add_argument("--fields", type=int, default=16, help="fields for each image (default: 16)")
    build.add_argument(
        "--level", type=float, nargs=2, default=(0.3, 0.8), metavar=("LOW", "HIGH"), help="range of deformation levels"
    )
    build.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    build.add_argument("--sampler", default="auto", help="sampler (default: the network's)")
    build.add_argument("--steps", type=int, help="recovery steps (default: the network's)")
    build.add_argument("--recovery", type=float, default=1.0, help="factor on recovery steps in [0, 1] (default: 1)")
    build.add_argument("--slice-axis", type=int, help="one in-plane field across this axis of volumes (0, 1, 2)")
    build.add_argument("--max-displacement-mm", type=float, help="scale fields down to this")
    build.add_argument("--max-bytes", type=int, help="stop with an error before the bank grows larger")
    build.add_argument("--device", help="where the network runs (default: cpu)")
    _add_split(build)
    build.set_defaults(run=_bank_build)
    info = actions.add_parser("info", help="what a bank holds")
    info.add_argument("folder", type=Path)
    info.set_defaults(run=_bank_info)


def _bank_build(options: argparse.Namespace) -> int:
    from monai_drdm.bank import DeformationBank
    from monai_drdm.bank.files import CaseImages
    from monai_drdm.executors import workers
    from monai_drdm.io import find_cases, read_cases

    cases = read_cases(options.datalist, options.section) if options.datalist else find_cases(options.images)
    with workers(options.workers) as executor:
        bank = DeformationBank.build(
            CaseImages(cases, keep_slice=options.slice_axis is not None),
            id_key="name",
            path=options.out,
            executor=executor,
            shard=options.shard,
            skip_failed=True,
            network=options.network,
            fields_per_image=options.fields,
            deformation_level=tuple(options.level),
            sampler=options.sampler,
            steps=options.steps,
            recovery=options.recovery,
            slice_axis=options.slice_axis,
            max_displacement_mm=options.max_displacement_mm,
            seed=options.seed,
            device=options.device,
            max_bytes=options.max_bytes,
        )
    for name, why in bank.failed.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    print(f"{len(bank)} images, {len(bank.failed)} skipped, {bank.nbytes / 1e6:.1f} MB in {options.out}")
    return _SKIPPED if bank.failed else 0


def _bank_info(options: argparse.Namespace) -> int:
    from monai_drdm.bank import DeformationBank

    bank = DeformationBank(options.folder)
    assert bank.settings is not None
    print(f"{len(bank)} images, {bank.nbytes / 1e6:.1f} MB")
    print("\n".join(f"{name}: {value}" for name, value in asdict(bank.settings).items()))
    return 0


def _require_matplotlib(what: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib: pip install 'monai-drdm[viz]'.")


def _demo(options: argparse.Namespace) -> int:
    from monai_drdm.demo import run_demo

    _require_matplotlib("demo")

    for path in run_demo(options.image, options.label, options.out, options.network, options.level, options.seed):
        print(path)
    return 0


def _list(_: argparse.Namespace) -> int:
    folder = weights_folder()
    print(f"weights folder: {folder}")
    for name in list_networks():
        card = network_card(name)
        path = known_file(name)
        state = "not here" if not path.is_file() else "here" if path.parent == folder else "in the package"
        print(f"{name}  {card.spatial_dims}D  {card.kind}  working size {card.working_size}  {card.licence}  [{state}]")
    return 0


def _pull(options: argparse.Namespace) -> int:
    print(pull_network(options.name, options.folder))
    return 0


def _convert(options: argparse.Namespace) -> int:
    path = convert_published(options.file, options.folder)
    print(f"{path}  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    for name in options.network:
        known = name in list_networks()
        path = known_file(name) if known else Path(name)
        expected = network_card(name).sha256 if known else ""
        card = read_network(path, expected or None).card
        print(f"{name}  ok  {card.kind} {card.spatial_dims}D  sha256 {card.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One definition of the settings of a draw, spelled out wherever they are taken."""

from __future__ import annotations

import inspect

import pytest

from monai_drdm import (
    ApplyDDFd,
    BatchRandDRDMDeformd,
    DeformationBank,
    RandDRDMBankd,
    RandDRDMDeform,
    RandDRDMDeformd,
    RandDRDMPaird,
)
from monai_drdm.deformation import FieldDrawer
from monai_drdm.deformation.options import AllDrawOptions, choose, DrawOptions, options_of

CONTRACT = {
    "network": "auto",
    "deformation_level": (0.3, 0.8),
    "sampler": "auto",
    "steps": None,
    "recovery": 1.0,
    "symmetry": 1.0,
    "image_channel": None,
    "max_displacement_mm": None,
    "on_fold": "rescale",
    "max_fold_fraction": 1e-4,
    "slice_axis": None,
    "device": None,
}
KEYED = {
    "mode": "bilinear",
    "padding_mode": "border",
    "point_keys": (),
    "point_space": "voxel",
    "invertible": True,
    "allow_missing_keys": False,
}
SOURCE = {"image_key": None, "seed_key": None}
BOXES = {"box_keys": (), "box_mode": "standard"}
DEFAULTS = [
    (RandDRDMDeform, {**CONTRACT, "prob": 0.1, "mode": "bilinear", "pixdim": None}),
    (RandDRDMDeformd, {**CONTRACT, **KEYED, **SOURCE, **BOXES, "prob": 0.1, "pixdim": None}),
    (BatchRandDRDMDeformd, {**CONTRACT, **KEYED, **SOURCE, "precision": "float32", "compiled": False}),
    (RandDRDMPaird, {**KEYED, **SOURCE, "prob": 1.0, "augmentation_level": (0.3, 0.8), "inverse": True}),
    (RandDRDMBankd, {**KEYED, **SOURCE, **BOXES, "prob": 0.1, "displacement_scale": (1.0, 1.0)}),
    (ApplyDDFd, {**KEYED, **BOXES, "ddf_key": None}),
    (DeformationBank.on_demand, {**CONTRACT, "fields_per_image": 16, "pixdim": None, "seed": 0}),
    (FieldDrawer, {**CONTRACT, "precision": "float32", "compiled": False}),
]


def names(pair):
    return getattr(pair, "__qualname__", "")


@pytest.mark.parametrize(("taker", "defaults"), DEFAULTS, ids=names)
def test_signatures_spell_out_names_and_defaults(taker, defaults):
    parameters = inspect.signature(taker).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


@pytest.mark.parametrize(("taker", "defaults"), DEFAULTS, ids=names)
def test_every_argument_is_documented_once(taker, defaults):
    documented = [line.strip().split(":")[0] for line in inspect.getdoc(taker).splitlines() if ": " in line]
    for name in inspect.signature(taker).parameters:
        assert documented.count(name) == 1, name


@pytest.mark.parametrize(("taker", "defaults"), DEFAULTS, ids=names)
def test_a_name_that_is_no_argument_is_refused(taker, defaults):
    required = {"keys": "image", "bank": None, "ddf_key": "ddf"}
    given = {name: value for name, value in required.items() if name in inspect.signature(taker).parameters}
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'levels'"):
        taker(**given, levels=0.5)


def test_settings_are_chosen_by_their_definition():
    given = {"sampler": "fast", "precision": "bfloat16", "mode": "nearest"}
    assert choose(DrawOptions, given) == {"sampler": "fast"}
    assert choose(AllDrawOptions, given) == {"sampler": "fast", "precision": "bfloat16"}
    assert set(options_of(AllDrawOptions)) == set(CONTRACT) - {"network"} | {"precision", "compiled"}


def test_a_subclass_may_add_arguments():
    class Mine(RandDRDMDeformd):
        def __init__(self, keys, *, strength, **options):
            super().__init__(keys, deformation_level=strength, **options)

    mine = Mine("image", strength=0.4, on_fold="keep")
    assert mine.drawer.levels == (0.4, 0.4)
    assert mine.drawer.on_fold == "keep"

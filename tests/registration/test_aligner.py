from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp

from monai_drdm.fields import compose
from monai_drdm.registration import (
    load_registration,
    register,
    RegistrationNetwork,
    ResidualAlignerNet,
    save_registration,
    separability_bound,
    SEPARABLE_STRUCTURES,
)
from monai_drdm.registration.data import load_pairs
from monai_drdm.registration.networks import Structure
from monai_drdm.registration.train import main


@pytest.mark.parametrize("q", SEPARABLE_STRUCTURES)
@pytest.mark.parametrize("shape", [(19, 26), (5, 10, 7), (1, 1)])
def test_any_size_and_every_weight_matters(filled, q, shape):
    network = filled(ResidualAlignerNet(len(shape), *SEPARABLE_STRUCTURES[q], channels=4))
    ddf = network(torch.rand(2, 2, *shape))
    assert ddf.shape == (2, len(shape), *shape)
    ddf.square().sum().backward()
    idle = [name for name, one in network.named_parameters() if one.grad is None or not one.grad.abs().max() > 0]
    assert not idle


def test_structures_have_as_many_weights():
    counts = {
        q: sum(one.numel() for one in ResidualAlignerNet(3, *levels).parameters())
        for q, levels in SEPARABLE_STRUCTURES.items()
    }
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("levels", [((3, 3, 1), (1, 2, 1)), ((6, 2), (1, 4)), ((1,) * 6, (5, 4, 3, 2, 1, 1))])
def test_levels_of_ones_own(filled, levels):
    network = RegistrationNetwork(Structure("aligner", 2, 4, 2, False, 1, True, *levels))
    images = torch.rand(1, 1, 19, 26), torch.rand(1, 1, 19, 26)
    assert float(register(network, *images).abs().max()) == 0
    assert register(filled(network), *images).shape == (1, 2, 19, 26)


def test_one_image_of_a_batch_does_not_depend_on_the_others(filled):
    network = filled(ResidualAlignerNet(2, channels=4)).eval()
    images = torch.rand(3, 2, 20, 24)
    alone = torch.cat([network(one[None]) for one in images])
    torch.testing.assert_close(network(images), alone, atol=1e-4, rtol=1e-4)


def test_swapped_images_swap_the_directions(filled):
    """Both directions are registered by the same weights; what belongs to the pair changes its sign."""
    network = filled(ResidualAlignerNet(2, channels=4, pair_channels=3)).eval()
    seen = []
    network.levels[-1].register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[1]))
    moving, fixed, pair = torch.rand(1, 1, 16, 24), torch.rand(1, 1, 16, 24), torch.rand(1, 3, 16, 24)
    network(torch.cat([moving, fixed, pair], dim=1))
    network(torch.cat([fixed, moving, -pair], dim=1))
    apart = (seen[0][0] - seen[0][1]).abs().max()
    assert float((seen[1] - seen[0].flip(0)).abs().max()) < 1e-2 * float(apart)


@pytest.mark.parametrize(
    "levels", [*SEPARABLE_STRUCTURES.values(), ((4, 2, 1), (1, 1, 2)), ((3, 1), (2, 5))], ids=lambda one: str(one[0])
)
def test_the_bound_is_that_of_the_convolutions(levels):
    """How far each level really looks, and a search through all distances and levels."""
    pools, dilations = levels
    network, far = ResidualAlignerNet(2, pools, dilations, channels=2, depth=1), []
    with torch.no_grad():
        for level in network.levels:
            x = torch.zeros(1, level.matching.wide[0].in_channels, 1 + 2 * 40, 3)
            x[:, :, 40] = 1
            for convolution in level.matching.wide:
                convolution.weight.fill_(1)
                convolution.bias.fill_(0)
                x = convolution(x)
            far.append(int(x[0, 0, :, 1].nonzero().max()) - 40)
    reach = [pool * one for pool, one in zip(pools, far)]
    bound = separability_bound(pools, dilations=dilations)
    for p in range(sum(reach) + max(pools) + 5):
        found = [2 * sum(reach[k:]) for k, pool in enumerate(pools) if p >= pool + sum(reach[k + 1 :])]
        assert bound.at(p) == max(found, default=0), p


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """Pairs of two blocks, of which one has slid along the other by a whole number of voxels."""
    folder, rng, entries = tmp_path_factory.mktemp("sliding"), np.random.default_rng(0), []
    for number in range(6):
        step = int(rng.integers(1, 4)) * (1 if number % 2 else -1)
        moving = np.kron(rng.random((6, 6)), np.ones((4, 4)))
        ddf = np.zeros((2, 24, 24))
        ddf[0, :, 12:] = step
        fixed = Warp("bilinear", "border")(
            torch.from_numpy(moving)[None, None].float(), torch.from_numpy(ddf)[None].float()
        )[0, 0].numpy()
        vectors = np.zeros((24, 24, 1, 1, 3), np.float32)
        vectors[:, :, 0, 0, :2] = np.moveaxis(ddf, 0, -1)
        field = nib.Nifti1Image(vectors, np.eye(4))
        field.header.set_intent(1006, name="ddf 2D")
        files = {"moving": moving[..., None], "fixed": fixed[..., None]}
        for kind, values in files.items():
            nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{kind}{number}.nii.gz")
        nib.save(field, folder / f"ddf{number}.nii.gz")
        entries.append({kind: f"{kind}{number}.nii.gz" for kind in ("moving", "fixed", "ddf")})
    (folder / "datalist.json").write_text(json.dumps({"training": entries}))
    return folder


def train(pairs, out, steps):
    """Train a small aligner by the command; the code it returns."""
    settings = {
        "network": "aligner",
        "pool_sizes": "[2,1]",
        "dilations": "[2,1]",
        "channels": 4,
        "depth": 1,
        "stride": 1,
        "diffeomorphic": "false",
        "spatial_dims": 2,
        "batch_size": 2,
        "epoch_length": steps,
        "max_epochs": 1,
        "warmup_steps": 5,
        "learning_rate": 1e-2,
        "bfloat16": "false",
        "smoothness_weight": 0,
        "validation_share": 0,
        "pose": 0,
        "repaint": 0,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return main(["--pairs", str(pairs), "--out", str(out), *words])


def test_it_is_trained_and_written_like_the_others(sliding, tmp_path, capsys):
    assert train(sliding, tmp_path / "run", 20) == 0
    network = load_registration(capsys.readouterr().out.strip())
    assert network.structure.pool_sizes == (2, 1)
    gates = json.loads((tmp_path / "run" / "network.json").read_text())["gates"]
    assert gates["validation_loss"] < 0.9 * gates["validation_loss_of_doing_nothing"]


def test_there_and_back_on_what_slides(sliding, tmp_path, capsys):
    """Blocks slide along the line between them, so the inverse of their field is its negative."""
    assert train(sliding, tmp_path / "run", 100) == 0
    network, pairs = load_registration(capsys.readouterr().out.strip()), load_pairs(sliding, spatial_dims=2).pairs
    moving, fixed, known = pairs.moving.float(), pairs.fixed.float(), pairs.ddf.float()
    there, back = register(network, moving, fixed), register(network, fixed, moving)
    errors = [float(one.norm(dim=1).mean()) for one in (there - known, back + known, compose(there, back))]
    nothing = float(known.norm(dim=1).mean())
    assert max(errors) < 0.6 * nothing


def test_files_from_before_there_were_levels_are_read(tmp_path):
    network = RegistrationNetwork(Structure("voxelmorph", 2, channels=3, depth=2))
    save_registration(network, tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    structure = json.loads(header["__metadata__"]["monai_drdm_registration"])
    del structure["pool_sizes"], structure["dilations"]
    header["__metadata__"]["monai_drdm_registration"] = json.dumps(structure)
    text = json.dumps(header).encode().ljust(size)
    (tmp_path / "old.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert load_registration(tmp_path / "old.safetensors").structure == network.structure


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        (((2, 1), (1,)), "as many numbers of 1 or more"),
        (((), ()), "as many numbers of 1 or more"),
        (((2, 0), (1, 1)), "as many numbers of 1 or more"),
        (((3, 2), (1, 1)), "each a multiple of the next"),
        (((1, 2), (1, 1)), "each a multiple of the next"),
    ],
)
def test_levels_are_checked(levels, says):
    with pytest.raises(ValueError, match=says):
        ResidualAlignerNet(2, *levels)
    with pytest.raises(ValueError, match=says):
        Structure("aligner", 2, pool_sizes=levels[0], dilations=levels[1])

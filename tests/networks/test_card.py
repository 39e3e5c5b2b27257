import json
from dataclasses import FrozenInstanceError, replace

import pytest

from monai_drdm.networks import NetworkCard

CARD = NetworkCard(
    name="mine",
    kind="recresacnet",
    spatial_dims=3,
    working_size=96,
    in_channels=2,
    input_range=(-1.0, 1.0),
    sampler="reference",
    steps=5,
    level=(0.2, 0.4),
    source="here",
    licence="MIT",
    training_data="phantoms",
    gates={"folds": 0.01},
)


def test_json_round_trip():
    assert NetworkCard.from_json(CARD.to_json()) == CARD


def test_json_leaves_out_the_hash_and_what_is_empty():
    card = NetworkCard(name="mine", kind="recresacnet", spatial_dims=2, working_size=64, sha256="ab" * 32)
    values = json.loads(card.to_json())
    assert "sha256" not in values
    assert not {"source", "licence", "training_data", "gates"} & set(values)
    assert NetworkCard.from_json(card.to_json(), "ab" * 32) == card


def test_json_is_canonical():
    text = CARD.to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert text == replace(CARD, sha256="cd" * 32).to_json()


def test_ranges_come_back_as_tuples_of_floats():
    card = NetworkCard.from_json(
        '{"name":"a","kind":"recresacnet","spatial_dims":2,"working_size":8,"input_range":[-1,1],"level":[1,1]}'
    )
    assert card.input_range == (-1.0, 1.0)
    assert card.level == (1.0, 1.0)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        CARD.name = "other"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"card"', "null", '{"name":"a"}', '{"nonsense":1}'])
def test_not_a_card(text):
    with pytest.raises(ValueError, match="cannot be read as a network card"):
        NetworkCard.from_json(text)


def test_unknown_entries_are_named():
    with pytest.raises(ValueError, match="nonsense"):
        NetworkCard.from_json(json.dumps({**json.loads(CARD.to_json()), "nonsense": 1}))


@pytest.mark.parametrize("change", [{"spatial_dims": 1}, {"working_size": 0}, {"in_channels": 0}, {"steps": 0}])
def test_senseless_numbers(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        replace(CARD, **change).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("working_size", "64"),
        ("working_size", 64.5),
        ("steps", None),
        ("kind", []),
        ("in_channels", 10**9),
        ("spatial_dims", True),
        ("level", [5, -1]),
        ("input_range", [0, float("nan")]),
        ("gates", 3),
    ],
)
def test_entries_of_a_wrong_type_or_size(name, value):
    with pytest.raises(ValueError, match=name):
        NetworkCard.from_json(json.dumps({**json.loads(CARD.to_json()), name: value}))


@pytest.mark.parametrize("input_range", [(1.0, 0.0), (1.0, 1.0)])
def test_senseless_input_range(input_range):
    with pytest.raises(ValueError, match="input_range must"):
        replace(CARD, input_range=input_range).check()


# channels, of architectures that leave the choice

CHOSEN = replace(CARD, kind="velocity_unet", sampler="velocity", channels=(16, 32, 48))


def test_channels_round_trip():
    back = NetworkCard.from_json(CHOSEN.to_json())
    assert back == CHOSEN
    assert back.channels == (16, 32, 48)
    assert hash(back.channels) == hash(CHOSEN.channels)
    assert json.loads(CHOSEN.to_json())["channels"] == [16, 32, 48]


def test_cards_without_channels_read_and_write_as_before():
    assert "channels" not in json.loads(CARD.to_json())
    assert NetworkCard.from_json(CARD.to_json()).channels == ()


@pytest.mark.parametrize(
    "value",
    [16, None, True, "16,32", {"16": 32}, [16, 0], [16, -1], [16, 32.0], [16, True], [[16]], [16, 4097], [None]],
)
def test_damaged_channels(value):
    with pytest.raises(ValueError, match=r"channels must|cannot be read as a network card"):
        NetworkCard.from_json(json.dumps({**json.loads(CHOSEN.to_json()), "channels": value}))


@pytest.mark.parametrize("channels", [(0,), (16, -2), (16.0,), ("16",), (16, 5000), (True,)])
def test_senseless_channels(channels):
    with pytest.raises(ValueError, match="channels must be"):
        replace(CHOSEN, channels=channels).check()

"""Configs: the published sizes, and that text from a file cannot make a harmful one."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from common import TINY

from sd.config import MODELS, SD1, SD2, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from sd.models.build import build


@pytest.mark.parametrize(
    "name, unet, text",
    [
        ("sd1", 859_520_964, 123_060_480),
        ("sd1-inpaint", 859_535_364, 123_060_480),
        ("sd2", 865_910_724, None),  # one of OpenCLIP's 24 layers is never run, so it is not built
        ("sd2-v", 865_910_724, None),
        ("sd2-inpaint", 865_925_124, None),
    ],
)
def test_published_parameter_counts(name, unet, text):
    networks = build(MODELS[name])
    counts = {key: sum(p.numel() for p in network.parameters()) for key, network in networks.items()}
    assert counts["unet"] == unet and counts["vae"] == 83_653_863
    assert text is None or counts["text_encoder"] == text


@pytest.mark.parametrize("config", [*MODELS.values(), TINY], ids=lambda config: config.name)
def test_json_round_trip(config):
    assert Config.from_json(config.to_json()) == config
    assert "\n" not in config.to_json()


def test_configs_of_version_0_1():
    """They have one text encoder, and a flag for each level that has attention."""
    for known in (SD1, SD2):
        raw = json.loads(known.to_json())
        for name in ("depth", "middle_depth", "vector", "linear_projections"):
            del raw["unet"][name]
        raw["unet"]["attention"] = [True, True, True, False]
        (text,) = raw["text"]
        old = ("width", "layers", "heads", "activation", "pad", "vocab", "length")
        raw["text"] = {name: text[name] for name in old}
        assert Config.from_json(json.dumps(raw)) == known


def test_factor_follows_the_levels():
    assert SD1.vae.factor == 8 and VAEConfig(channels=(32, 64)).factor == 2


def test_configs_are_values():
    with pytest.raises(FrozenInstanceError):
        SD1.size = 768
    assert replace(SD1, size=768) != SD1 and hash(SD1) == hash(Config())


def altered(path: str, value: object) -> str:
    raw = json.loads(SD1.to_json())
    *parents, last = path.split(".")
    part = raw
    for name in parents:
        part = part[int(name) if name.isdecimal() else name]
    part[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "not a model config"),
        ("[]", "not a model config"),
        ("[" * 100_000, "not a model config"),
        ('{"unet": 3}', "not a model config"),
        ('{"colour": "red"}', "not a model config"),
        (altered("text.0.layers", 10**9), "layers"),
        (altered("text.0.layers", "12"), "layers"),
        (altered("text.0.heads", 7), "heads"),
        (altered("text.0.activation", "relu"), "activation"),
        (altered("text.0.pad", -1), "pad"),
        (altered("text.0.names", "bert"), "names"),
        (altered("text.0.hidden_layer", 0), "hidden_layer"),
        (altered("text.0.hidden_layer", -13), "hidden_layer"),
        (altered("text.0.hidden_norm", 1), "hidden_norm"),
        (altered("text.0.projection", 768), "pooled"),
        (altered("text", []), "expected one to four"),
        (altered("text", [3]), "not a model config"),
        (altered("text", 3), "not a model config"),
        (altered("unet.channels", [320] * 50), "UNetConfig"),
        (altered("unet.channels", [321, 640, 1280, 1280]), "multiples of 32"),
        (altered("unet.channels", []), "channels"),
        (altered("unet.heads", [3, 3, 3, 3]), "do not divide"),
        (altered("unet.context", 1024), "wide"),
        (altered("vae.blocks", 1000), "blocks"),
        (altered("vae.scale", float("nan")), "scale"),
        (altered("schedule.beta_end", 2.0), "betas"),
        (altered("schedule.prediction", "x0"), "prediction"),
        (altered("schedule.steps", True), "steps"),
        (altered("name", 5), "name"),
        (altered("name", "\x1b[31mred"), "name"),
        (altered("unet.attention", {"a": 1}), "attention"),
        (altered("unet.attention", "abcd"), "attention"),
        (altered("unet.depth", [1, 1]), "depths"),
        (altered("unet.depth", [1, 1, -1, 0]), "depth"),
        (altered("unet.depth", [1, 1, 10**6, 0]), "depth"),
        (altered("unet.depth", [32] * 4), "641 transformer blocks"),
        (altered("unet.middle_depth", -1), "middle_depth"),
        (altered("unet.vector", 0), "vector"),
        (altered("unet.vector", [127, 255]), "vector"),
        (altered("unet.context", [2, 3]), "context"),
        (altered("unet.linear_projections", 1), "linear_projections"),
        (altered("text.0.vocab", 100), "vocab"),
        (altered("text.0.length", 2), "length"),
        (altered("vae.image_channels", 1), "image_channels"),
        (altered("unet.out_channels", 3), "channels"),
        (altered("schedule.beta_start", 1e-300), "betas"),
        (altered("unet.channels", [321] * 200_000), "UNetConfig"),
    ],
)
def test_refusals(text, word):
    with pytest.raises(ValueError, match=word) as caught:
        Config.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("make", [TextConfig, VAEConfig, UNetConfig, ScheduleConfig, Config])
def test_defaults_are_stable_diffusion_1(make):
    assert make() in (SD1, *SD1.text, SD1.vae, SD1.unet, SD1.schedule)

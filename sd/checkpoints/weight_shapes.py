"""The name and shape of every weight of a model, from its config alone.

A list of what the networks of text_encoder.py, vae.py and unet.py are made of, for whoever wants to know without
building them: what a file must hold is checked against it, in no time and without torch. tests/test_networks.py holds
the two to one another.

>>> from sd.config import SD1
>>> weight_shapes(SD1)["unet"]["conv_in.weight"]
(320, 4, 3, 3)
"""

from __future__ import annotations

from itertools import pairwise

from ..config import Config, TextConfig, UNetConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(config: Config) -> dict[str, Shapes]:
    """{"text_encoder", "vae", "unet"}: our names of their weights and the shapes, in the order of the networks."""
    return {"text_encoder": _text(config.text), "vae": _vae(config.vae), "unet": _unet(config.unet)}


def _inside(name: str, *parts: Shapes) -> Shapes:
    """The weights of a block, behind its name."""
    return {f"{name}.{key}": shape for part in parts for key, shape in part.items()}


def _linear(name: str, width: int, out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def _conv(name: str, channels: int, out: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, channels, side, side), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _attention(name: str, width: int, context: int | None = None, qkv_bias: bool = True) -> Shapes:
    of = context or width
    q, k, v = _linear("q", width, width, qkv_bias), _linear("k", of, width, qkv_bias), _linear("v", of, width, qkv_bias)
    return _inside(name, q, k, v, _linear("out", width, width))


def _res(name: str, channels: int, out: int, time: int | None = None) -> Shapes:
    parts = [_norm("norm1", channels), _conv("conv1", channels, out)]
    parts += [_linear("time", time, out)] if time else []
    parts += [_norm("norm2", out), _conv("conv2", out, out)]
    parts += [_conv("skip", channels, out, 1)] if channels != out else []
    return _inside(name, *parts)


def _text(config: TextConfig) -> Shapes:
    D = config.width
    block = _norm("norm1", D) | _attention("attn", D) | _norm("norm2", D)
    block |= _linear("fc1", D, 4 * D) | _linear("fc2", 4 * D, D)
    shapes: Shapes = {"token.weight": (config.vocab, D), "position.weight": (config.length, D)}
    for i in range(config.layers):
        shapes |= _inside(f"blocks.{i}", block)
    return shapes | _norm("norm", D)


def _vae(config: VAEConfig) -> Shapes:
    C, first, last = config.latent_channels, config.channels[0], config.channels[-1]

    def middle(channels: int) -> Shapes:
        attn = _inside("attn", _norm("norm", channels), _attention("attn", channels))
        return _inside("mid", _res("res.0", channels, channels), _res("res.1", channels, channels), attn)

    def stage(name: str, widths: list[int], step: str | None) -> Shapes:
        blocks = [_res(f"res.{i}", a, b) for i, (a, b) in enumerate(pairwise(widths))]
        return _inside(name, *blocks, _conv(f"{step}.conv", widths[-1], widths[-1]) if step else {})

    encoder = _conv("conv_in", config.image_channels, first)
    for i, (before, width) in enumerate(pairwise((first, *config.channels))):
        step = "down" if i < len(config.channels) - 1 else None
        encoder |= stage(f"down.{i}", [before, *[width] * config.blocks], step)
    encoder |= middle(last) | _norm("norm_out", last) | _conv("conv_out", last, 2 * C)

    decoder = _conv("conv_in", C, last) | middle(last)
    for i, (width, before) in enumerate(pairwise((*config.channels, last))):
        decoder |= stage(f"up.{i}", [before, *[width] * (config.blocks + 1)], "up" if i > 0 else None)
    decoder |= _norm("norm_out", first) | _conv("conv_out", first, config.image_channels)

    both = _inside("encoder", encoder) | _inside("decoder", decoder)
    return both | _conv("quant", 2 * C, 2 * C, 1) | _conv("post_quant", C, C, 1)


def _transformer(name: str, channels: int, context: int, depth: int) -> Shapes:
    block = _norm("norm1", channels) | _attention("attn1", channels, qkv_bias=False)
    block |= _norm("norm2", channels) | _attention("attn2", channels, context, qkv_bias=False)
    block |= _norm("norm3", channels)
    block |= _inside("ff", _linear("proj", channels, 8 * channels), _linear("out", 4 * channels, channels))
    proj_in, proj_out = _linear("proj_in", channels, channels), _linear("proj_out", channels, channels)
    blocks = [_inside(f"blocks.{i}", block) for i in range(depth)]
    return _inside(name, _norm("norm", channels), proj_in, *blocks, proj_out)


def _unet(config: UNetConfig) -> Shapes:
    first, last, T = config.channels[0], config.channels[-1], 4 * config.channels[0]
    shapes = _linear("time.0", first, T) | _linear("time.2", T, T)
    if config.vector is not None:
        shapes |= _linear("vector.0", config.vector, T) | _linear("vector.2", T, T)
    shapes |= _conv("conv_in", config.in_channels, first)

    def stage(name: str, widths: list[int], level: int) -> Shapes:
        channels = config.channels[level]
        parts = [_res(f"res.{i}", width, channels, T) for i, width in enumerate(widths)]
        if depth := config.depth[level]:
            parts += [_transformer(f"attn.{i}", channels, config.context, depth) for i in range(len(widths))]
        return _inside(name, *parts)

    skips = [first]
    for level, channels in enumerate(config.channels):
        shapes |= stage(f"down.{level}", [skips[-1], *[channels] * (config.blocks - 1)], level)
        skips += [channels] * config.blocks
        if level < len(config.channels) - 1:
            shapes |= _conv(f"down.{level}.down", channels, channels)
            skips.append(channels)
    shapes |= _inside("mid", _res("res.0", last, last, T), _res("res.1", last, last, T))
    shapes |= _transformer("mid.attn", last, config.context, config.middle_depth)
    below = last
    for level in reversed(range(len(config.channels))):
        channels = config.channels[level]
        widths = [width + skips.pop() for width in [below, *[channels] * config.blocks]]
        shapes |= stage(f"up.{level}", widths, level)
        if level > 0:
            shapes |= _conv(f"up.{level}.up.conv", channels, channels)
        below = channels
    return shapes | _norm("norm_out", first) | _conv("conv_out", first, config.out_channels)

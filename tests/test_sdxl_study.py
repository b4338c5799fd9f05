"""The studies on SDXL in small: two text encoders, a vector, deep transformers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import TINY, TINY_XL, error, tiny_state
from conftest import loaded
from PIL import Image
from safetensors.torch import save_file

from scripts import study
from sd import StableDiffusion
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.config import REFINER_SIZES, SD1, SDXL, SDXL_REFINER, Config, UNetConfig
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.params import SamplingParams, TextToImage
from sd.size_conditioning import size_embedding
from sd.study import (
    attention,
    attention_figures,
    consistency,
    convergence,
    denoising,
    editing,
    guidance,
    influence,
    mixing,
    network,
    runs,
    steering,
    text,
)

FEW = replace(runs.SETTINGS, steps=3, guidance=3.0)
PROMPT = "a red house on a meadow"


@pytest.fixture(scope="module")
def xl() -> StableDiffusion:
    config = replace(TINY_XL, size=64)
    return StableDiffusion(config, **loaded(tiny_state("tiny-sdxl"), config))


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_run_is_that_of_the_pipeline(xl, negative):
    """The same latents as a request with the same settings: both encoders, sizes, and zeros for no negative prompt."""
    settings = SamplingParams(**{**FEW.__dict__, "height": 64, "width": 64})
    ours = runs.last(runs.run(xl, xl.conditioning([PROMPT]), FEW, negative=negative))
    run = xl.prepare(TextToImage(PROMPT, settings, negative=negative))
    for _ in run:
        pass
    assert error(ours, run.x) < 1e-5


def test_a_refiner():
    """One text encoder and aesthetic scores, another one for the negative prompt; the studies that need one work."""
    config = replace(
        TINY_XL, name="tiny refiner", size=64, text=TINY_XL.text[1:], sizes=REFINER_SIZES, zero_empty=False,
        unet=replace(TINY_XL.unet, context=96, vector=96 + 5 * 256),
    )  # fmt: skip
    torch.manual_seed(0)
    parts = TextEncoder(config.text[0]), VAE(config.vae), UNet(config.unet)
    model = StableDiffusion(config, *(part.requires_grad_(False).eval() for part in parts))
    cond, uncond = model.conditioning([""]), runs.unconditional(model)
    assert torch.equal(cond.context, uncond.context) and torch.equal(cond.vector[:, :-256], uncond.vector[:, :-256])
    scores = [sizes[:, -256:] for sizes in (cond.vector, uncond.vector)]
    assert torch.equal(torch.cat(scores), size_embedding(torch.tensor([[6.0], [2.5]])))
    assert attention.word_maps(model, PROMPT, FEW).maps.network == "tiny refiner"


def test_a_context_alone_is_refused_in_one_line(xl):
    with pytest.raises(ValueError, match=r"^tiny sdxl needs a vector .*model.conditioning\(prompts\) has both$"):
        runs.run(xl, xl.encode_prompt([PROMPT]), FEW)
    with pytest.raises(
        ValueError, match=r"^expected contexts \(B, M, D\) of encode_prompt, or a conditioning, got str$"
    ):
        runs.run(xl, "a house", FEW)


def test_a_context_is_enough_for_one_encoder():
    model = StableDiffusion(replace(TINY, size=64), **loaded(tiny_state(), TINY))
    x = [runs.last(runs.run(model, c, FEW)) for c in (model.encode_prompt([PROMPT]), model.conditioning([PROMPT]))]
    assert torch.equal(*x)


@pytest.mark.exhaustive
def test_studies_run(xl):
    """Each study that generates: finite results that depend on the prompt."""
    assert denoising.trajectory(xl, PROMPT, FEW).x.isfinite().all()
    first, *_ = guidance.predictions(xl, PROMPT, FEW)
    zeros = xl.denoiser(runs.unconditional(xl), None, 1.0)(runs.noise(xl, FEW), first.level)
    assert error(first.uncond, zeros) < 1e-6 and error(first.cond, first.uncond) > 1e-3
    assert len(guidance.sweep(xl, PROMPT, (0.0, 3.0), FEW)) == 2
    seen = influence.influence(xl, "red house", FEW)
    assert all(float(each.max()) > 0 for each in seen.maps)
    steered = steering.steering(xl, PROMPT, steering.colour_loss(-1.0, -1.0, 1.0), (0.0, 30.0), FEW)
    assert steered.losses[1][-1] < steered.losses[0][-1]
    few = consistency.consistency(xl, xl, PROMPT, FEW, points=2)
    assert few.teacher.isfinite().all()
    (ddim,) = convergence.convergence(xl, PROMPT, replace(FEW, steps=16), samplers=["ddim"], steps=[2, 8], n=1)
    assert ddim.errors[0] > ddim.errors[1]


def test_editing_without_a_change_is_the_source(xl):
    same = editing.prompt_to_prompt(xl, PROMPT, PROMPT, FEW)
    near = np.abs(np.asarray(same.source, int) - np.asarray(same.edited, int))
    assert near.max() <= 2
    other = editing.prompt_to_prompt(xl, PROMPT, "a blue house on a meadow", FEW)
    assert other.edited != other.alone


def test_mixing_interpolates_context_and_pooled_text(xl):
    a, b = xl.conditioning(["a red house"]), xl.conditioning(["a blue boat"])
    half = mixing.between_prompts(a, b, 0.5, 96)
    assert error(half.context, (a.context + b.context) / 2) < 1e-6
    assert error(half.vector[:, :96], (a.vector[:, :96] + b.vector[:, :96]) / 2) < 1e-6
    arc = mixing.between_prompts(a, b, 0.5, 96, mixing.slerp)
    assert torch.equal(arc.vector[:, 96:], a.vector[:, 96:])  # the sizes are not on the arc
    assert error(arc.vector[:, :96], half.vector[:, :96]) > 1e-3
    images = mixing.mix_prompts(xl, "a red house", "a blue boat", 3, FEW)
    ends = runs.generate(xl, ["a red house"], FEW), runs.generate(xl, ["a blue boat"], FEW)
    for image, (end,) in zip((images[0], images[-1]), ends, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(end, int)).max() <= 2


# -------------------------------------------------------------------------------------------------------- attention


def test_sites_have_blocks(xl):
    """Every block of every transformer, in the order in which they run; none shares its name, block and kind."""
    found = [site for site, _ in attention.sites(xl.unet)]
    assert Counter((site.part, site.level) for site in found if site.kind == "cross") == {
        ("down", 1): 2, ("down", 2): 4, ("mid", 2): 2, ("up", 2): 6, ("up", 1): 3,
    }  # fmt: skip
    assert len({(site.name, site.block, site.kind) for site in found}) == len(found)
    order = []
    with attention.watching(xl.unet, lambda call: order.append(call.site)):
        runs.last(runs.run(xl, xl.conditioning([PROMPT]), replace(FEW, steps=1, guidance=1.0)))
    assert order == found


def test_maps_of_a_block(xl):
    seen = attention.word_maps(xl, PROMPT, FEW)
    assert seen.maps.network == "tiny sdxl"
    whole = seen.maps.mean(levels=[2])
    first, second = (seen.maps.mean(levels=[2], blocks=[block]) for block in (0, 1))
    assert error((first + second) / 2, whole) < 1e-5 and error(first, second) > 1e-3
    with pytest.raises(ValueError, match="no recorded attention matches"):
        seen.maps.mean(blocks=[2])


def test_a_figure_of_a_word_shows_the_blocks(xl):
    """Taller by a strip of three rows than that of the same maps with one block per transformer."""
    seen = attention.word_maps(xl, PROMPT, FEW)
    image = attention_figures.draw_breakdown(seen, 2, width=40)
    flat = attention.AttentionMaps("tiny sdxl")
    flat.size = seen.maps.size
    flat.records = [r._replace(site=r.site._replace(block=0)) for r in seen.maps.records if r.site.block == 0]
    other = attention_figures.draw_breakdown(seen._replace(maps=flat), 2, width=40)
    assert image.height - other.height > 3 * 40


# ------------------------------------------------------------------------------------------------------- the network


def traced(config: UNetConfig, side: int) -> tuple[list[network.Part], UNet]:
    with torch.device("meta"):
        unet = UNet(config)
    return network.trace(unet, side, side), unet


@pytest.mark.parametrize(
    ("config", "parameters"), [(SDXL, 2_567_463_684), (SDXL_REFINER, 2_259_526_660)], ids=["base", "refiner"]
)
def test_trace_counts_everything(config: Config, parameters: int):
    parts, unet = traced(config.unet, 128)
    assert sum(part.parameters for part in parts) == parameters
    assert {part.depth for part in parts if part.kind == "SpatialTransformer"} == {
        depth for depth in (*config.unet.depth, config.unet.middle_depth) if depth
    }
    lines = network.rows(parts, len(config.unet.channels))
    assert ["SpatialTransformer, 10 blocks" in line for line in lines].count(True) == (6 if config is SDXL else 0)
    assert network.draw_network(parts, unet, config.name).width > 600


def test_trace_knows_the_formula_of_attention():
    """FLOPs of SDXL's deepest transformer by hand: ten blocks of projections, attention and feed-forward."""
    parts, _ = traced(SDXL.unet, 128)
    (middle,) = (part for part in parts if part.name == "mid.attn")
    N, D, M, context = 32 * 32, 1280, 77, 2048
    own = 4 * 2 * N * D * D + 4 * N * N * D
    cross = 2 * 2 * N * D * D + 2 * 2 * M * context * D + 4 * N * M * D
    feed_forward = 2 * N * D * 8 * D + 2 * N * 4 * D * D
    assert middle.flops == 10 * (own + cross + feed_forward) + 2 * 2 * N * D * D


@pytest.mark.parametrize("middle", [0, None])
def test_drawing_of_smaller_u_nets(middle):
    """SSD-1B has a middle block without a transformer; KOALA-700M has none."""
    up = ((0, 0, 0), (2, 1, 1), (4, 4, 10))
    parts, unet = traced(replace(SDXL.unet, depth=(0, 2, 4), up_depth=up, middle_depth=middle), 32)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in unet.parameters())
    assert [part.depth for part in parts if part.name.startswith("up.2.attn")] == [4, 4, 10]
    assert network.draw_network(parts, unet).width > 600


@pytest.mark.exhaustive
def test_two_networks_below_each_other():
    seen = {config.name: traced(config.unet, 16) for config in (SD1, SDXL)}
    both = network.draw_networks(seen)
    assert both.height > sum(network.draw_u(*each).height for each in seen.values())


# -------------------------------------------------------------------------------------------------------------- text


def test_distance_of_each_encoder(xl):
    """Word order changes both parts of the context, from the first different word on."""
    one, other = "a red house and a blue tree", "a blue house and a red tree"
    order = text.word_order(xl, one, other, FEW)
    assert len(order.each) == 2
    for distances in order.each:
        assert max(distances[:2]) < 1e-5 < 1e-2 < distances[2]
    a, b = xl.encode_prompt([one, other])
    assert math.isclose(order.each[0][2], float((a - b)[2, :64].norm() / a[2, :64].norm()), rel_tol=1e-4)
    assert math.isclose(order.each[1][2], float((a - b)[2, 64:].norm() / a[2, 64:].norm()), rel_tol=1e-4)
    single = order._replace(each=order.each[:1])
    assert text.draw_word_order(order).height > text.draw_word_order(single).height


# ------------------------------------------------------------------------------------------------------------ script


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.safetensors"
    config = replace(TINY_XL, size=64)
    networks = {name: net.state_dict() for name, net in loaded(tiny_state("tiny-sdxl"), config).items()}
    save_file({key: x.contiguous() for key, x in to_own(networks).items()}, path, {CONFIG_KEY: config.to_json()})
    return path


@pytest.mark.parametrize(
    ("figure", "files"),
    [
        ("tokens", {"tokens.webp", "tokens-2.webp"}),
        ("embeddings", {"embeddings.webp", "embeddings-2.webp"}),
        ("unet", {"unet.png", "unet-parts.png"}),
        ("attention", {"attention.webp", "attention-word.webp"}),
        ("self-attention", {"self-attention.webp"}),
        ("grid", {"grid.webp"}),
    ],
)
@pytest.mark.sampled(4)
def test_figures_of_the_script(figure, files, tiny_file, tmp_path):
    grid = ["--x", "steps=1,2", "--y", "sampler=ddim,euler"] if figure == "grid" else []
    arguments = [figure, "--ckpt", str(tiny_file), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert study.main([*arguments, *grid]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for file in files:
        with Image.open(tmp_path / "out" / file) as image:
            assert image.width > 300


def test_figures_that_need_another_file_are_refused_in_one_line(tiny_file, tmp_path, capsys):
    arguments = ["few-steps", "--ckpt", str(tiny_file), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert study.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: few-steps: give a few-step LoRA for this checkpoint")

"""The study toolkit: what it shows is what happens, and looking changes nothing."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import TINY, error, gaussian_denoiser
from PIL import Image
from torch import Tensor

from scripts.toy_world import Thing, box
from sd.conditioning import Conditioning
from sd.config import SD1
from sd.few_step import LCM
from sd.imaging.tensors import to_tensor
from sd.models.layers import Attention
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.noise import draw, generators
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.runtime import blockwise_attention, packing
from sd.runtime.cuda_graphs import Recorded
from sd.runtime.device import best_dtype
from sd.runtime.kernel_choice import prefer
from sd.runtime.optimize import optimize
from sd.schedule import Schedule
from sd.study import (
    attention,
    attention_figures,
    consistency,
    convergence,
    denoising,
    editing,
    grids,
    guidance,
    influence,
    latent,
    mixing,
    network,
    noising,
    runs,
    steering,
    text,
)

FEW = replace(runs.SETTINGS, steps=3, guidance=3.0)
PROMPT = "a red house on a meadow"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@pytest.fixture(scope="module")
def tiny_sd(tiny) -> StableDiffusion:
    """The tiny model with small images."""
    return StableDiffusion(replace(TINY, size=64), **tiny)


@pytest.fixture(scope="module")
def embedded() -> StableDiffusion:
    """The model that comes with the project."""
    return StableDiffusion.load(device="cpu", dtype="float32")


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    """x, t and conditioning for a batch of two."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=rng)
    return x, torch.tensor([500.0, 20.0]), Conditioning(torch.randn(2, 77, 64, generator=rng))


def hooks(network: torch.nn.Module) -> int:
    return sum(len(getattr(module, name)) for module in network.modules() for name in HOOKS)


def alike(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for the last of 256 steps: sums in another order are rounded otherwise."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) <= 1


# ------------------------------------------------------------------------------------- attention


def test_looking_changes_nothing(tiny, inputs):
    """Bit-identical inside of the block, after it, and after a block that failed; no hook stays."""
    unet = tiny["unet"]
    before, others = unet(*inputs), hooks(unet)  # other tests may have left theirs
    for kind in attention.KINDS:
        with attention.recording(unet, kind) as maps:
            assert torch.equal(unet(*inputs), before)
        assert torch.equal(unet(*inputs), before)
        assert len(maps.records) == len(maps.sites) > 0
    with pytest.raises(KeyError), attention.recording(unet):
        raise KeyError
    assert torch.equal(unet(*inputs), before)
    assert hooks(unet) == others


PATHS = {  # name: precision, the kernels that are forced
    "plain": (torch.float32, "plain"),
    "fast": (torch.float32, "fast"),
    "fast, bfloat16": (torch.bfloat16, "fast"),
    "measured": (torch.float32, None),
    "with gradients": (torch.float32, "fast"),
    "not optimized": (torch.float32, "fast"),
    "autocast": (torch.float32, "fast"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_attention(tiny, path, monkeypatch):
    """The weights by the formula give what the network's kernels give, whichever it uses; none of them is disturbed."""
    dtype, choice = PATHS[path]
    rows = []
    blockwise = blockwise_attention.blockwise
    monkeypatch.setattr(blockwise_attention, "blockwise", lambda *args: rows.append(1) or blockwise(*args))
    unet = build_like(tiny["unet"]).to(dtype).requires_grad_(path == "with gradients")
    if path != "not optimized":
        with prefer(choice):
            optimize(unet)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 24, 24, generator=rng).to(dtype)
    given = x, torch.tensor([300.0]), Conditioning(torch.randn(1, 77, 64, generator=rng).to(dtype))
    errors = []

    def see(call: attention.Call) -> None:
        weights = call.weights()
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        real = call.layer.forward(call.x, call.context)
        errors.append(error(call.output(weights).detach().float(), real.detach().float()))

    gradients, half = path == "with gradients", path == "autocast"
    with prefer(choice), torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=half):
        before = unet(*given)
        for _ in range(2):
            with attention.watching(unet, see):
                assert torch.equal(unet(*given), before)
            with attention.recording(unet, "self"):
                assert torch.equal(unet(*given), before)
            assert torch.equal(unet(*given), before)
    if choice is not None:
        # within autocast, queries are in bfloat16, which has a fast path only where the processor multiplies it
        within = torch.bfloat16 if half else dtype
        fast = choice == "fast" and path not in ("with gradients", "not optimized")
        assert bool(rows) == (fast and within in packing.onednn_dtypes())
    assert len(errors) == 2 * len(attention.sites(unet))
    assert max(errors) < (1e-5 if dtype == torch.float32 and path != "autocast" else 0.02)


def test_steps_that_are_recorded(tiny, inputs, monkeypatch):
    """Where steps are played back, hooks are seen all the same; before and after it is the same recording."""
    monkeypatch.setattr(packing, "onednn_dtypes", frozenset)  # as on a GPU
    runs: list[int] = []

    def record(run, device):  # stands in for a CUDA graph
        out = run()
        return lambda: runs.append(1) or out.copy_(run()), out

    unet = build_like(tiny["unet"])
    steps = Recorded(unet, record)
    before = steps(*inputs)
    assert len(runs) == 1
    for kind in attention.KINDS:
        with attention.recording(unet, kind) as maps:
            assert torch.equal(steps(*inputs), before)
        assert maps.calls == 1
        assert len(maps.records) == len(maps.sites) > 0
    assert len(runs) == 1  # the network itself was called
    assert torch.equal(steps(*inputs), before)
    assert len(runs) == 2
    with pytest.raises(ValueError, match=r"expected a U-Net .*, got Recorded"), attention.recording(steps):
        pass


@pytest.mark.exhaustive
def test_offloaded_networks(embedded, monkeypatch):
    """With low memory the U-Net comes and goes within a study; its maps and its image are the same to the bit."""
    saving = StableDiffusion.load(device="cpu", dtype="float32", low_memory=True)
    for model in (embedded, saving):
        monkeypatch.setattr(model, "config", replace(model.config, size=64))
    others = hooks(saving.unet)
    seen, same = (attention.word_maps(model, PROMPT, FEW) for model in (embedded, saving))
    assert seen.image == same.image
    for one, other in zip(seen.maps.records, same.maps.records, strict=True):
        assert one[:3] == other[:3]
        assert torch.equal(one.maps, other.maps)
    assert hooks(saving.unet) == others
    edits = [editing.prompt_to_prompt(model, PROMPT, "a red tree on a meadow", FEW) for model in (embedded, saving)]
    assert edits[0] == edits[1]
    loss = steering.colour_loss(-1.0, -1.0, 1.0)
    steered = [steering.steering(model, PROMPT, loss, (10.0,), FEW) for model in (embedded, saving)]
    assert steered[0].losses[0] == pytest.approx(steered[1].losses[0], rel=1e-3)  # weights come in another layout
    traced = [network.trace(model.unet, 16, 16) for model in (embedded, saving)]
    assert traced[0] == traced[1]


def build_like(unet: UNet) -> UNet:
    """A copy, so that the shared one keeps its precision."""
    copy = UNet(unet.config)
    copy.load_state_dict(unet.state_dict())
    return copy.to(memory_format=torch.channels_last)


def test_weights_are_those_of_the_fused_kernel(tiny, inputs):
    """With the identity for v, attention gives its weights away."""

    def see(call: attention.Call) -> None:
        q, k = call._heads(call.layer.q(call.x)), call._heads(call.layer.k(call.context))
        identity = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        kernel = F.scaled_dot_product_attention(q, k, identity)
        assert error(call.weights(), kernel) < 1e-5
        assert error(call.weights([3, 1]), kernel[:, :, [3, 1]]) < 1e-5

    with attention.watching(tiny["unet"], see):
        tiny["unet"](*inputs)


def test_what_see_returns_takes_the_place_of_the_output(tiny, inputs):
    unet = tiny["unet"]
    before = unet(*inputs)
    with attention.watching(unet, lambda call: torch.zeros_like(call.x), ("cross",)):
        changed = unet(*inputs)
    assert error(changed, before) > 1e-3
    flipped = Conditioning(inputs[2].context.flip(0))
    other = unet(inputs[0], inputs[1], flipped)
    with attention.watching(unet, lambda call: torch.zeros_like(call.x), ("cross",)):
        assert torch.equal(unet(inputs[0], inputs[1], flipped), changed)  # deaf to the context
    assert error(other, before) > 1e-3
    assert torch.equal(unet(*inputs), before)


def test_a_compiled_network_is_refused():
    unet = UNet(TINY.unet)
    inside = UNet(TINY.unet)
    inside.compile()
    part = UNet(TINY.unet)
    part.mid.compile()
    method = UNet(TINY.unet)
    method.forward = torch.compile(method.forward)
    wrapped = UNet(TINY.unet)
    wrapped.mid = torch.compile(wrapped.mid)
    for network_ in (torch.compile(unet), inside, part, method, wrapped):
        with (
            pytest.raises(ValueError, match=r"^the U-Net is compiled and .*before torch\.compile$"),
            attention.recording(network_),
        ):
            pass
    with pytest.raises(ValueError, match="got function"), attention.recording(lambda x, t, context: x):
        pass
    assert hooks(unet) == 0


def test_sites_are_all_attention_layers(tiny):
    found = attention.sites(tiny["unet"])
    layers = [module for module in tiny["unet"].modules() if isinstance(module, Attention)]
    assert len(found) == len(layers) == len({id(layer) for _, layer in found})
    order: list[str] = []
    with attention.watching(tiny["unet"], lambda call: order.append((call.site.name, call.site.kind))):
        tiny["unet"](torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning(torch.zeros(1, 77, 64)))
    assert order == [(site.name, site.kind) for site, _ in found]  # the order of the forward pass


def test_recording_follows_the_image_with_the_prompt(tiny_sd):
    """Under guidance the batch is [uncond, cond]: what is kept is what a run without guidance shows at its start."""
    context = tiny_sd.encode_prompt([PROMPT])
    kept = []
    for scale in (1.0, 5.0):
        with attention.recording(tiny_sd.unet, tokens=[2, 3]) as maps:
            runs.last(runs.run(tiny_sd, context, replace(FEW, guidance=scale)))
        assert maps.calls == FEW.steps
        kept.append(maps.mean(calls=[0]))
    assert kept[0].shape == (2, *maps.size)
    assert error(kept[1], kept[0]) < 1e-4
    assert error(maps.mean(calls=[2]), kept[1]) > 1e-4  # other steps differ


def test_mean_takes_apart_what_was_recorded(tiny, inputs):
    with attention.recording(tiny["unet"]) as maps:
        tiny["unet"](*inputs)
    whole = maps.mean()
    assert whole.shape == (77, 16, 16)
    assert torch.allclose(whole.sum(0), torch.ones(16, 16), atol=1e-4)  # each place gives all its attention away
    levels = {site.level for site in maps.sites}
    weights = [sum(site.level == level for site in maps.sites) for level in levels]
    parts = sum(n * maps.mean(levels=[level]) for n, level in zip(weights, levels, strict=True))
    assert error(parts / sum(weights), whole) < 1e-5
    heads = maps.sites[0].heads
    each = sum(maps.mean(heads=[head]) for head in range(heads)) / heads
    assert error(each, whole) < 1e-5
    with pytest.raises(ValueError, match="no recorded attention matches"):
        maps.mean(calls=[7])
    for heads_asked in ([], [99]):
        with pytest.raises(ValueError, match=r"^the matching layers have heads 0 to \d, got "):
            maps.mean(heads=heads_asked)


def test_runs_are_of_contexts(tiny_sd):
    """One prompt's context alone would be taken for as many prompts as it has tokens."""
    context = tiny_sd.encode_prompt("a")
    for wrong, got in ((context[0], r"\(77, "), ("a", "str")):
        with pytest.raises(ValueError, match=rf"^expected contexts \(B, M, D\) .* got {got}"):
            runs.run(tiny_sd, wrong)


def test_self_attention_of_a_place(tiny, inputs):
    """The row of the place: it adds up to 1, and another place has another."""
    with attention.recording(tiny["unet"], "self", points=[(0.0, 0.0), (0.99, 0.99)], item=0) as maps:
        tiny["unet"](*inputs)
    for record in maps.records:
        heads, points, h, w = record.maps.shape
        assert (points, h, w) == (2, *(-(-16 // 2**record.site.level),) * 2)
        assert torch.allclose(record.maps.sum((-1, -2)), torch.ones(heads, 2), atol=1e-4)
    first, second = maps.records[0].maps[:, 0], maps.records[0].maps[:, 1]
    assert error(first, second) > 0.01
    with pytest.raises(ValueError, match="unknown kind of attention 'both'"), attention.recording(tiny["unet"], "both"):
        pass


def test_mass_inside():
    rng = random.Random(0)
    for _ in range(50):
        left, right = sorted((rng.random(), rng.random()))
        top, bottom = sorted((rng.random(), rng.random()))
        area = (right - left) * (bottom - top)
        assert attention.mass_inside(torch.ones(7, 5), (left, top, right, bottom)) == pytest.approx(area, abs=1e-9)
    corner = torch.zeros(4, 4)
    corner[0, 3] = 2.0
    assert attention.mass_inside(corner, (0.75, 0.0, 1.0, 0.25)) == pytest.approx(1.0)
    assert attention.mass_inside(corner, (0.0, 0.0, 0.75, 1.0)) == 0.0


@pytest.mark.exhaustive
def test_a_colour_word_acts_where_its_thing_is(embedded):
    """The numbers of the figures: the mass of the maps of a colour and its thing inside of the thing's box."""
    prompt = "a big red house in the middle on a meadow"
    inside = box(Thing("house", "red", "big", "middle"))
    area = attention.mass_inside(torch.ones(64, 64), inside)
    settings = replace(runs.SETTINGS, steps=8)
    seen = attention.word_maps(embedded, prompt, settings)
    acts = influence.influence(embedded, prompt, settings)
    words = {word.text: i for i, word in enumerate(seen.words)}
    house = attention.mass_inside(seen.of(words["house"]), inside)
    red = attention.mass_inside(acts.maps[words["red"]], inside)
    assert house > 1.7 * area, (house, area)
    assert red > 1.5 * area, (red, area)


# ------------------------------------------------------------------------------------- prompts


def test_tokens_and_words():
    tokenizer = StableDiffusion.load(device="cpu").tokenizer
    row = text.tokens(tokenizer, "a triceratops!")
    assert [token.role for token in row] == ["start", *["text"] * 6, "end", *["padding"] * 69]
    assert [token.id for token in row] == tokenizer("a triceratops!")[0].tolist()
    assert [token.id for token in row[2:6]] == [9511, 517, 527, 3054]
    assert text.find_word(tokenizer, "a red cat and a red hat", "red", 1) == [6]
    with pytest.raises(ValueError, match="no word 'dog': its words are a, cat"):
        text.find_word(tokenizer, "a cat", "dog")
    long = text.words(tokenizer, "house " * 100)
    assert [word.positions for word in long] == [[i] for i in range(1, 76)]


def test_word_order_starts_where_the_words_differ(tiny_sd):
    order = text.word_order(tiny_sd, "a red house and a tree", "a red tree and a house", FEW)
    assert order.distances[:3] == [0.0, 0.0, 0.0]  # start, a, red: a causal encoder cannot see what follows
    assert all(distance > 0 for distance in order.distances[3:])


def test_similarities(tiny):
    names = ["red", "blue", "house"]
    similar = text.token_similarity(tiny["text_encoder"], text.Tokenizer(), names)
    positions = text.position_similarity(tiny["text_encoder"])
    for matrix in (similar, positions):
        assert torch.allclose(matrix.diagonal(), torch.ones(len(matrix)), atol=1e-5)
        assert torch.allclose(matrix, matrix.T, atol=1e-5)
        assert float(matrix.abs().max()) <= 1 + 1e-5


# ------------------------------------------------------------------------------------- the forward process


def test_forward_process_is_the_closed_form(tiny_sd):
    image = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    noised = noising.forward_process(tiny_sd, image, (-1, 0, 400, 999), seed=5)
    z = tiny_sd.encode(image).mode()
    noise = draw(generators(5, 1), z.shape[1:], z.device)
    for level, x in zip(noised.levels, noised.latents, strict=True):
        alpha_bar = math.prod(1 - beta for beta in tiny_sd.schedule.betas[: int(level.t) + 1])
        assert error(x[None], math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * noise) < 1e-6
    assert torch.equal(noised.latents[0], z[0])


def test_many_small_steps_are_one_large_one():
    """Ho et al. 2020, eq. 2 step by step: signal and variance after t steps are those of the curves."""
    schedule = Schedule()
    curves = noising.curves(schedule)
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas):
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        assert curves.alpha[t] == pytest.approx(signal, rel=1e-9)
        assert curves.sigma[t] ** 2 == pytest.approx(variance, rel=1e-9)
        level = schedule.level(t)
        assert (curves.alpha[t], curves.sigma[t]) == pytest.approx((level.alpha, level.sigma))
        assert curves.snr[t] == pytest.approx(level.ratio**-2)


# ------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_runs_give_the_images_of_the_pipeline(tiny_sd, sampler):
    """The same seed gives the same image as txt2img, with a sampler that draws noise as well."""
    settings = SamplingParams(steps=3, sampler=sampler, spacing="trailing", guidance=3.0, seed=4)
    ours = runs.generate(tiny_sd, [PROMPT, PROMPT], settings)
    theirs = tiny_sd.txt2img(PROMPT, steps=3, sampler=sampler, spacing="trailing", guidance=3.0, seed=4)[0]
    for image in ours:
        assert alike(image, theirs)


def test_trajectory(tiny_sd):
    run = denoising.trajectory(tiny_sd, PROMPT, FEW)
    assert (len(run.levels), len(run.x), len(run.x0)) == (4, 4, 3)
    assert torch.equal(run.x[:1], runs.noise(tiny_sd, FEW))
    assert torch.equal(run.x[-1], run.x0[-1])  # the last level is clean
    context, uncond = tiny_sd.encode_prompt([PROMPT]), tiny_sd.encode_prompt([""])
    x0 = tiny_sd.denoiser(context, uncond, FEW.guidance)(run.x[1:2], run.levels[1])
    assert error(run.x0[1:2], x0) < 1e-5
    assert len(denoising.frames(tiny_sd, run)) == 4
    assert denoising.spread(20, 4) == [0, 6, 13, 19]
    assert denoising.spread(3, 8) == [0, 1, 2]


def test_predictions_are_what_guidance_is_made_of(tiny_sd):
    seen = guidance.predictions(tiny_sd, PROMPT, FEW)
    run = denoising.trajectory(tiny_sd, PROMPT, FEW)
    for i, each in enumerate(seen):
        assert error(each.guided, run.x0[i : i + 1]) < 1e-4
        assert error(each.guided, each.uncond + FEW.guidance * (each.cond - each.uncond)) < 1e-6
    plain = tiny_sd.txt2img(PROMPT, steps=3, sampler="ddim", spacing="trailing", guidance=1.0, seed=FEW.seed)[0]
    swept = guidance.sweep(tiny_sd, PROMPT, (1.0, 4.0), FEW)
    assert swept[0] == plain
    assert swept[1] != plain


class GaussianModel:
    """As much of a model as a run needs, of data with a standard deviation of 0.5, whose denoiser is known."""

    schedule, device, dtype, is_inpainting = Schedule(), torch.device("cpu"), torch.float32, False
    config = defaults = SD1
    sample = StableDiffusion.sample

    def conditioning(self, texts: list[str], sizes: Sequence[float] | None = None) -> Conditioning:
        return Conditioning(torch.zeros(len(texts), 1, 1))

    def latent_shape(self) -> tuple[int, int, int]:
        return 4, 8, 8

    def denoiser(self, *_: object):
        return lambda x, level: gaussian_denoiser(0.5)(x.double(), level)


class GaussianStudent(GaussianModel):
    """The consistency function of the same data: curves keep their place in units of the standard deviation."""

    def denoiser(self, *_: object):
        return lambda x, level: 0.5 * x.double() / (0.25 * level.alpha**2 + level.sigma**2) ** 0.5


def test_a_consistency_function_knows_the_end_of_the_curve():
    """Exact functions: the student's is the end but for the steps of the curve, the teacher's is far while noisy."""
    settings = replace(consistency.CURVE, steps=200, guidance=1.0)
    seen = consistency.consistency(GaussianModel(), GaussianStudent(), "", settings, points=8)
    teacher, student = seen.distances(seen.teacher), seen.distances(seen.student)
    assert [level.t for level in seen.levels] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert max(student) < 0.02 and min(teacher[:3]) > 0.3 and teacher == sorted(teacher, reverse=True)
    assert seen.x.shape == (8, 4, 8, 8) and seen.end.shape == (1, 4, 8, 8)
    wrong = consistency.consistency(GaussianModel(), GaussianModel(), "", settings, points=8)
    assert wrong.distances(wrong.student) == wrong.distances(wrong.teacher) == teacher


def test_images_in_few_steps_are_plain_images(tiny, tiny_sd):
    """Of the teacher with the given settings, of the student with its own."""
    student = StableDiffusion(LCM.applied(tiny_sd.config), **tiny)
    seen = consistency.few_steps(tiny_sd, student, PROMPT, FEW, steps=(1, 2), many=3)
    two, three = (
        tiny_sd.txt2img(PROMPT, steps=n, sampler="ddim", spacing="trailing", guidance=3.0, seed=FEW.seed)[0]
        for n in (2, 3)
    )
    assert (seen.teacher[1], seen.many) == (two, three) and two != three
    own = student.txt2img(PROMPT, steps=2, sampler="lcm", spacing="lcm", guidance=1.0, seed=FEW.seed)[0]
    assert seen.student[1] == own != two
    assert (seen.steps, seen.most, len(seen.teacher), len(seen.student)) == ((1, 2), 3, 2, 2)


def test_convergence_counts_and_converges():
    """With the exact denoiser of Gaussian data: errors fall by the method's order, and every evaluation is counted."""
    steps = (20, 40)
    results = convergence.convergence(
        GaussianModel(), "", replace(convergence.REFERENCE, sampler="heun"), samplers=("ddim", "heun"), steps=steps
    )
    first, second = results
    assert (first.evaluations, second.evaluations) == ([20, 40], [39, 79])
    assert 1.6 < first.errors[0] / first.errors[1] < 2.6
    assert 3.0 < second.errors[0] / second.errors[1] < 5.5
    with pytest.raises(ValueError, match="euler_a: a stochastic sampler does not converge to one solution"):
        convergence.convergence(GaussianModel(), "", samplers=("ddim", "euler_a"))


@pytest.mark.exhaustive
def test_grid_is_made_of_plain_images(tiny_sd):
    sheet = grids.grid(tiny_sd, PROMPT, grids.Axis("steps", (2, 3)), grids.Axis.of("sampler=ddim,heun"), FEW)
    plain = tiny_sd.txt2img(PROMPT, steps=3, sampler="heun", spacing="trailing", guidance=3.0, seed=FEW.seed)[0]
    assert sheet.images[1][1] == plain
    named = grids.grid(
        tiny_sd, PROMPT, grids.Axis.of("sampler=DPM++ 2M,DPM++ 2M Karras"), grids.Axis("seed", (1,)), FEW
    )
    other, same = (
        tiny_sd.txt2img(PROMPT, steps=3, sampler="dpmpp_2m", spacing=spacing, guidance=3.0, seed=1)[0]
        for spacing in ("trailing", "karras")
    )
    assert named.images == [[other, same]]
    assert other != same
    image = Image.new("RGB", (128, 128), "red")
    kept = grids.grid(tiny_sd, PROMPT, grids.Axis.of("strength=0,1"), grids.Axis.of("seed=1"), FEW, image)
    plain = tiny_sd.txt2img(PROMPT, steps=3, sampler="ddim", spacing="trailing", guidance=3.0, seed=1)[0]
    assert kept.images[0][1] == plain


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ("steps=2", "steps=3", "two different axes"),
        ("strength=0.5", "seed=1", "needs an image to start from"),
        ("steps=2,0", "seed=1", "steps must be at least 1, got 0"),
        ("seed=1", "sampler=ddim,eulr", "unknown sampler 'eulr'"),
    ],
)
def test_grids_that_cannot_be(tiny_sd, x, y, message, monkeypatch):
    generated = []
    monkeypatch.setattr(StableDiffusion, "txt2img", lambda *args, **values: generated.append(values))
    with pytest.raises(ValueError, match=message):
        grids.grid(tiny_sd, PROMPT, grids.Axis.of(x), grids.Axis.of(y), FEW)
    assert generated == []  # it is not said after minutes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=3", "unknown axis 'size'"),
        ("steps=3,1.5", "the values of steps are whole numbers, got '3,1.5'"),
        ("guidance=3,x", "are numbers"),
        ("steps", "NAME=VALUE"),
        ("seed=1,,2", "NAME="),
    ],
)
def test_axes_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        grids.Axis.of(text)
    assert grids.Axis.of("prompt=a, b|c").values == ("a, b", "c")


# ------------------------------------------------------------------------------------- mixing, editing, steering


def test_interpolation_ends_at_its_ends():
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 5, 6, generator=rng), torch.randn(2, 5, 6, generator=rng)
    for how in (mixing.lerp, mixing.slerp):
        assert torch.equal(how(a, b, 0.0), a)
        assert torch.equal(how(a, b, 1.0), b)
    unit_a, unit_b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    middle = mixing.slerp(unit_a, unit_b, 0.5)
    assert torch.allclose(middle.norm(dim=-1), torch.ones(2, 5), atol=1e-6)
    assert torch.allclose((middle * unit_a).sum(-1), (middle * unit_b).sum(-1), atol=1e-6)  # halfway
    third = mixing.slerp(unit_a, unit_b, 1 / 3)
    angle = (unit_a * unit_b).sum(-1).acos()
    assert torch.allclose((third * unit_a).sum(-1).acos(), angle / 3, atol=1e-4)
    assert error(mixing.slerp(a, 2 * a, 0.25), 1.25 * a) < 1e-6  # parallel: a line
    assert error(mixing.slerp(a, a, 0.5), a) < 1e-6


def test_arc_between_noises_keeps_their_length():
    a, b = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    arc, line = mixing.between_noises(a, b, 5), mixing.between_noises(a, b, 5, mixing.lerp)
    assert torch.equal(arc[:1], a)
    assert torch.equal(arc[-1:], b)
    assert 0.97 < float(arc[2].std()) < 1.03
    assert 0.65 < float(line[2].std()) < 0.77


def test_mixed_images_end_at_the_plain_ones(tiny_sd):
    mixed = mixing.mixing(tiny_sd, "a red house", "a tree", 2, FEW, seed=9)
    first, second = runs.generate(tiny_sd, ["a red house", "a tree"], FEW)
    assert len(runs.generate(tiny_sd, "a tree", FEW)) == 1  # one text, not its letters
    third = runs.generate(tiny_sd, ["a tree"], replace(FEW, seed=9))[0]
    for name, row in mixed.rows.items():
        ends = (first, second) if name.startswith("prompts") else (second, third)
        for mine, plain in zip((row[0], row[-1]), ends, strict=True):
            assert alike(mine, plain), name


def test_editing_nothing_changes_nothing(tiny_sd):
    others = hooks(tiny_sd.unet)
    edit = editing.prompt_to_prompt(tiny_sd, PROMPT, "a red tree on a meadow", FEW, cross=0.0, own=0.0)
    assert edit.edited == edit.alone
    assert hooks(tiny_sd.unet) == others
    same = editing.prompt_to_prompt(tiny_sd, PROMPT, PROMPT, FEW, cross=1.0, own=1.0)
    assert alike(same.edited, same.source)


def test_editing_takes_attention_over(tiny, inputs, tiny_sd):
    """All the way and in both kinds, attention is the source's; a factor 0 silences a word."""
    target = "a red tree on a meadow"
    weights: list[Tensor] = []
    original = attention.Call.output

    def spy(call: attention.Call, given: Tensor) -> Tensor:
        weights.append(given)
        return original(call, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Call, "output", spy)
        editing.prompt_to_prompt(tiny_sd, PROMPT, target, FEW, cross=1.0, own=1.0, factors={"red": 0.0})
    crossing = [w for w in weights if w.shape[-1] == 77]
    assert len(crossing) == FEW.steps * len(attention.sites(tiny_sd.unet)) / 2
    for w in crossing:
        assert float(w[-1][..., 2].abs().max()) == 0.0  # "red" of the target
        others = [j for j in range(77) if j != 2]
        assert torch.equal(w[-1][..., others], w[-2][..., others])
    assert all(torch.equal(w[-1], w[-2]) for w in weights if w.shape[-1] != 77)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        editing.prompt_to_prompt(tiny_sd, PROMPT, target, FEW, cross=2)
    with pytest.raises(ValueError, match="no word 'dog'"):
        editing.prompt_to_prompt(tiny_sd, PROMPT, target, FEW, factors={"dog": 2.0})


@pytest.mark.exhaustive
def test_editing_keeps_what_the_prompt_alone_changes(embedded):
    """The figure's claim: a duck in the place of the boat, under the same sky."""
    settings = replace(runs.SETTINGS, seed=11)
    edit = editing.prompt_to_prompt(embedded, "a boat on the sea", "a duck on the sea", settings)
    source, alone, edited = (np.asarray(image, float) for image in edit)
    assert 5 < np.abs(edited - source).mean() < 0.5 * np.abs(alone - source).mean()


def test_new_words_keep_their_own_attention():
    weights = torch.rand(2, 3, 5, 4)
    mine = editing.replace_weights(weights, [0, None, 1, 2])
    assert torch.equal(mine[..., 1], weights[1, ..., 1])
    assert torch.equal(mine[..., [0, 2, 3]], weights[0][..., [0, 1, 2]])


def test_steering_is_the_formula():
    """With x0 = c x and loss |x0|² / 2 the gradient is known: c² x."""
    level = Schedule().level(600)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    c = 0.3
    losses: list[Tensor] = []
    denoise = steering.steered(lambda x, level: c * x, lambda x0: x0.square().sum((1, 2, 3)) / 2, 2.0, each=losses)
    expected = c * x - 2.0 * level.sigma**2 / level.alpha * c**2 * x
    assert error(denoise(x, level), expected) < 1e-6
    assert torch.allclose(losses[0], (c * x).square().sum((1, 2, 3)) / 2)
    assert not denoise(x, level).requires_grad
    with pytest.raises(ValueError, match=r"expected one loss per image, \(2,\), got \(\)"):
        steering.steered(lambda x, level: x, lambda x0: x0.mean(), 1.0)(x, level)


@pytest.mark.exhaustive
def test_steering_lowers_its_loss(embedded, monkeypatch):
    """ "Make it blue", through the decoder and the U-Net."""
    monkeypatch.setattr(embedded, "config", replace(embedded.config, size=64))
    loss = steering.colour_loss(-1.0, -1.0, 1.0)
    settings = replace(runs.SETTINGS, steps=6, guidance=3.0)
    result = steering.steering(embedded, PROMPT, loss, (0.0, 100.0), settings)
    plain, steered = (float(loss(to_tensor(image))) for image in result.images)
    assert steered < 0.9 * plain
    assert result.losses[1][-1] < 0.9 * result.losses[0][-1]
    # scale 0 changes nothing; with gradients other kernels are used, which round otherwise
    assert alike(result.images[0], runs.generate(embedded, [PROMPT], settings)[0])
    assert all(parameter.grad is None for parameter in embedded.unet.parameters())


def test_steering_where_weights_are_moved_between_turns(tiny):
    """On a GPU with low memory the U-Net goes when the decoder comes, and has to be back for its own gradient.

    Another precision stands in for the other memory: neither can be computed with.
    """

    class Moving(dict):
        """Networks by name; only the one that was asked for last can be used."""

        def __getitem__(self, name: str) -> torch.nn.Module:
            for other, net in self.items():
                for weight in net.parameters():
                    weight.data = weight.data.to(torch.float32 if other == name else torch.float64)
            return super().__getitem__(name)

    networks = {name: copy.deepcopy(net) for name, net in tiny.items()}
    model = StableDiffusion(replace(TINY, size=64), **networks)
    loss = steering.colour_loss(-1.0, -1.0, 1.0)
    expected = steering.steering(model, PROMPT, loss, (10.0,), FEW)
    model._networks = Moving(networks)
    assert steering.steering(model, PROMPT, loss, (10.0,), FEW) == expected


def test_influence_of_a_word(tiny_sd):
    result = influence.influence(tiny_sd, "a red house", FEW)
    assert [word.text for word in result.words] == ["a", "red", "house"]
    run = denoising.trajectory(tiny_sd, "a red house", FEW)
    plain = tiny_sd.denoiser(tiny_sd.encode_prompt(["a red house"]), guidance=1.0)
    less = tiny_sd.denoiser(tiny_sd.encode_prompt(["a house"]), guidance=1.0)
    expected = [
        (plain(x[None], level) - less(x[None], level)).norm(dim=1)
        for x, level in zip(run.x[:-1], run.levels[:-1], strict=True)
    ]
    assert error(result.maps[1], torch.cat(expected).mean(0)) < 1e-3


# ------------------------------------------------------------------------------------- the latent, the network


def test_round_trip(tiny_sd):
    image = Image.new("RGB", (128, 64), (200, 30, 90))
    trip = latent.round_trip(tiny_sd, image)
    assert trip.latent.shape == (4, 8, 16)
    assert trip.factor == 48
    assert latent.psnr(image, image) == math.inf
    assert latent.psnr(Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 255)) == pytest.approx(0.0)
    assert latent.psnr(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (5, 5, 5))) == pytest.approx(34.15, abs=0.01)
    with pytest.raises(ValueError, match="two images of the same size"):
        latent.psnr(image, image.resize((8, 8)))


@pytest.mark.parametrize(("config", "parameters"), [(TINY, None), (SD1, 859_520_964)])
def test_network_is_counted_whole(config, parameters):
    """Every parameter once, and as many operations as PyTorch's own counter finds."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):  # shapes without numbers
        unet = UNet(config.unet)
    side = 64 if config is SD1 else 24
    with FlopCounterMode(display=False) as counter:
        parts = network.trace(unet, side, side)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in unet.parameters())
    assert parameters is None or sum(part.parameters for part in parts) == parameters
    assert sum(part.flops for part in parts) == counter.get_total_flops()
    assert parts[-1].shape == (1, 4, side, side)
    assert [part.name for part in parts] == network.blocks(unet)
    assert hooks(unet) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_is_counted_as_ever_once_it_has_run(tiny, inputs, dtype):
    unet = build_like(tiny["unet"]).to(dtype).requires_grad_(False)
    with torch.device("meta"):
        expected = network.trace(UNet(TINY.unet), 24, 24)
    given = [inputs[0].to(dtype), inputs[1], inputs[2].to(dtype=dtype)]
    with prefer("fast"):
        optimize(unet)
        before = unet(*given)
        assert network.trace(unet, 24, 24) == expected
        assert torch.equal(unet(*given), before)


# ------------------------------------------------------------------------------------- full size


@pytest.mark.full
def test_full_size():
    """The same functions on Stable Diffusion 1.x, with weights by lot and small images."""
    config = replace(SD1, size=64)
    torch.manual_seed(0)
    dtype = best_dtype(torch.device("cpu"))
    networks = {}
    for name, kind in (("text_encoder", TextEncoder), ("vae", VAE), ("unet", UNet)):
        with torch.device("meta"):
            net = kind(config.text[0] if name == "text_encoder" else getattr(config, name))
        net = net.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
        for parameter in net.parameters():
            parameter.normal_(std=0.02)
        for module in net.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.fill_(1)
        networks[name] = net
    model = StableDiffusion(config, **networks)
    settings = replace(FEW, steps=2)
    seen = attention.word_maps(model, PROMPT, settings)
    assert {(site.part, site.level) for site in seen.maps.sites} == {
        *(("down", level) for level in (0, 1, 2)), ("mid", 3), *(("up", level) for level in (0, 1, 2)),
    }  # fmt: skip
    assert len(seen.maps.sites) == 16
    attention_figures.draw_breakdown(seen, 2)
    run = denoising.trajectory(model, PROMPT, settings)
    denoising.draw_trajectory(model, run)
    image = Image.new("RGB", (64, 64), "red")
    latent.draw_round_trip(latent.round_trip(model, image))
    noising.draw_forward(noising.forward_process(model, image))
    guidance.draw_predictions(model, guidance.predictions(model, PROMPT, settings))
    mixing.draw_mixing(mixing.mixing(model, PROMPT, "a tree", 2, settings), PROMPT, "a tree")
    editing.draw_edits({"edit": editing.prompt_to_prompt(model, PROMPT, "a red tree on a meadow", settings)})
    steering.steering(model, PROMPT, steering.colour_loss(-1, -1, 1), (1.0,), settings)
    influence.draw_influence(influence.influence(model, "a house", settings), "a house")
    network.draw_network(network.trace(model.unet, 8, 8), model.unet, config.name)
    network.draw_table(network.trace(model.unet, 8, 8), 4)
    places = [(0.5, 0.5)]
    attention_figures.draw_self_maps(*attention.self_maps(model, PROMPT, places, settings), places)
    text.draw_word_order(text.word_order(model, PROMPT, "a red meadow on a house", settings))
    similar = text.token_similarity(model.text_encoder, model.tokenizer, ["red", "blue"])
    text.draw_embeddings(similar, ["red", "blue"], text.position_similarity(model.text_encoder))
    guidance.draw_sweep(guidance.sweep(model, PROMPT, (1.0, 4.0), settings), (1.0, 4.0), PROMPT)
    grids.draw_grid(grids.grid(model, PROMPT, grids.Axis("steps", (1, 2)), grids.Axis("seed", (1,)), settings))
    reference = replace(convergence.REFERENCE, steps=3)
    convergence.convergence(model, PROMPT, reference, samplers=("ddim",), steps=(1, 2), n=1)
    seen = consistency.consistency(model, model, PROMPT, settings, points=2)
    consistency.draw_consistency(model, seen)
    consistency.draw_distances([seen])

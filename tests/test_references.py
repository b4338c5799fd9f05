"""diffusers and transformers as independent references: the same weights and noise give the same numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, error, manifest, tiny_state
from conftest import loaded

pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

from diffusers.utils.torch_utils import randn_tensor

from scripts.benchmark.references import LAYOUTS, peers, pipeline, scheduler
from sd.checkpoints.key_maps import diffusers_sources
from sd.conditioning import Conditioning
from sd.config import MODELS, SD1, SD2, SD2_V
from sd.denoiser import Denoiser
from sd.models.build import build
from sd.models.text_encoder import TextEncoder
from sd.noise import draw, generators
from sd.samplers import ddim, ddpm, posterior
from sd.schedule import CLEAN, Schedule

schedule = Schedule()


@pytest.fixture(scope="module")
def theirs(tiny):
    return peers(tiny, TINY, torch.float32)


@pytest.fixture(scope="module")
def full():
    """The networks of Stable Diffusion 1.x with the reference weights, and their peers."""
    networks = loaded(reference.make_state_dict(manifest("sd-v1")), SD1)
    return networks, peers(networks, SD1, torch.float32)


def compare_unets(networks, theirs, config, h, w):
    x = reference.normal("x", (2, config.unet.in_channels, h, w))
    context = Conditioning(reference.normal("context", (2, 77, config.unet.context)))
    t = torch.tensor([981.0, 17.0])
    assert error(networks["unet"](x, t, context), theirs["unet"](x, t, context)) < 2e-5


def compare_vaes(networks, theirs, h, w):
    image = reference.normal("image", (1, 3, 8 * h, 8 * w)).clamp(-1, 1)
    for ours, other in zip(networks["vae"].moments(image), theirs["vae"].moments(image), strict=True):
        assert error(ours, other) < 1e-5
    z = reference.normal("z", (1, 4, h, w))
    assert error(networks["vae"].decode(z), theirs["vae"].decode(z)) < 1e-5


def compare_text_encoders(networks, theirs, config):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.text[0].vocab, (2, 77), generator=rng)
    ids[1, 5:] = config.text[0].pad  # padding is attended to
    assert error(networks["text_encoder"](ids).hidden, theirs["text_encoder"](ids)) < 1e-5


@pytest.mark.parametrize("h, w", [(16, 16), (8, 24)])
def test_unet(tiny, theirs, h, w):
    compare_unets(tiny, theirs, TINY, h, w)


@pytest.mark.parametrize("h, w", [(8, 8), (5, 9)])
def test_vae(tiny, theirs, h, w):
    compare_vaes(tiny, theirs, h, w)


def test_text_encoder(tiny, theirs):
    compare_text_encoders(tiny, theirs, TINY)


@pytest.mark.full
def test_full_unet(full):
    compare_unets(*full, SD1, 64, 64)


@pytest.mark.full
def test_full_vae(full):
    compare_vaes(*full, 32, 40)


@pytest.mark.full
def test_full_text_encoder(full):
    compare_text_encoders(*full, SD1)


def test_exact_gelu():
    """Stable Diffusion 2.x: transformers' "gelu" is OpenCLIP's."""
    text = replace(TINY.text[0], activation="gelu", pad=0)
    config = replace(TINY, text=(text,))
    torch.manual_seed(0)
    networks = {name: network.to_empty(device="cpu") for name, network in build(config).items()}
    networks["text_encoder"] = TextEncoder(text).eval()
    compare_text_encoders(networks, peers(networks, config, torch.float32), config)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_peers_is_one_of_ours(name):
    """On the meta device: strict loading refuses whatever is missing, superfluous or misshapen."""
    networks = build(MODELS[name])
    sources = diffusers_sources(MODELS[name], {name: network.state_dict() for name, network in networks.items()})
    for network, table in sources.items():
        assert len({source.key for source in table.values()}) == len(networks[network].state_dict())
    built = peers(networks, MODELS[name], torch.float32)
    assert all(len(built[n].state_dict()) == len(networks[n].state_dict()) for n in networks)


# where two layers of one shape could be swapped unseen, written down from diffusers' modules
@pytest.mark.parametrize(
    "config, network, ours, key",
    [
        (SD1, "unet", "up.0.res.2.conv1.weight", "up_blocks.3.resnets.2.conv1.weight"),
        (SD1, "unet", "up.3.up.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
        (SD1, "unet", "down.2.down.bias", "down_blocks.2.downsamplers.0.conv.bias"),
        (
            SD1,
            "unet",
            "mid.attn.blocks.0.attn1.k.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight",
        ),
        (SD1, "unet", "down.0.res.0.time.bias", "down_blocks.0.resnets.0.time_emb_proj.bias"),
        (SD1, "unet", "down.0.res.0.conv1.bias", "down_blocks.0.resnets.0.conv1.bias"),
        (SD1, "vae", "decoder.mid.attn.attn.k.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        (SD1, "vae", "decoder.up.1.up.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        (SD1, "text_encoder", "blocks.11.attn.k.bias", "encoder.layers.11.self_attn.k_proj.bias"),
    ],
)
def test_places(config, network, ours, key):
    assert diffusers_sources(config, {n: [ours] if n == network else [] for n in build(config)})[network][ours] == (
        (key, None, 0, False)
    )


def test_pointwise_convolutions():
    """SD 1.x projects with 1x1 convolutions into and out of a transformer, 2.x with linear layers."""
    for config, ones in ((SD1, 2), (SD2, 0)):
        keys = {"unet": ["mid.attn.proj_in.weight", "mid.attn.proj_in.bias"], "vae": [], "text_encoder": []}
        sources = diffusers_sources(config, keys)["unet"]
        assert [source.ones for source in sources.values()] == [ones, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peers_share_the_weights_of_our_networks(layout):
    """Where ours come as theirs are wanted. (Used, ours may be laid out for a CPU: they are then copied.)"""
    tiny = loaded(tiny_state(), TINY)
    built = peers(tiny, TINY, torch.float32, layout)
    kernel = built["unet"].model.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=LAYOUTS[layout])
    own = tiny["unet"].down[0].res[0].conv1.weight
    assert (kernel.data_ptr() == own.data_ptr()) == own.is_contiguous(memory_format=LAYOUTS[layout])
    linear = built["text_encoder"].model.state_dict()
    assert tiny["text_encoder"].norm.weight.data_ptr() in {tensor.data_ptr() for tensor in linear.values()}


def network(x, t):
    """Something smooth that depends on everything a network may depend on, of unit size."""
    return torch.sin(3 * x + t / 100) + 0.3 * torch.roll(x, 1, dims=-1)


def draws(seed):
    """Unit normal numbers, the same for both sides."""
    rng = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=rng, dtype=like.dtype)


def in_float64(other):
    """A scheduler of theirs with its table in float64: 1 - alpha-bar in float32 has few digits where t is small."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    exact = torch.cumprod(1 - betas, dim=0)
    assert error(exact, other.alphas_cumprod) < 1e-6
    other.alphas_cumprod = exact
    if hasattr(other, "final_alpha_cumprod"):
        assert other.final_alpha_cumprod != 1
        other.final_alpha_cumprod = exact[0]
    return other


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [n for n in range(1, 1000) if 1000 % n == 0])
def test_ddim(n, eta, prediction):
    config = SD1 if prediction == "eps" else SD2_V
    own = Schedule(config.schedule)
    other = in_float64(scheduler(config, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading"))
    other.set_timesteps(n)
    levels = own.levels(n, "leading")
    assert [level.t for level in levels[:-1]] == other.timesteps.tolist()

    x = reference.normal("x_T", (1, 4, 8, 8)).double()
    denoise = Denoiser(lambda x, t, _: network(x, float(t[0])), own, Conditioning(torch.zeros(1, 77, 8, dtype=x.dtype)))
    noise, their_noise = draws(n), draws(n)
    for step, t in zip(ddim(denoise, x.clone(), levels, eta=eta, noise=noise), other.timesteps, strict=True):
        fresh = their_noise(x) if eta else None
        out = other.step(network(x, float(t)), int(t), x, eta=eta, variance_noise=fresh)
        x = out.prev_sample
        assert error(step.x, x) < 1e-9 and error(step.x0, out.pred_original_sample) < 1e-9, int(t)


def test_ddpm_posterior_at_every_timestep():
    other = in_float64(scheduler(SD1, "DDPMScheduler"))
    x, eps = reference.normal("x", (4, 4)).double(), reference.normal("eps", (4, 4)).double()
    levels = schedule.levels(1000, "leading")
    assert [level.t for level in levels[:-1]] == other.timesteps.tolist() and levels[-1] == CLEAN
    for a, b in pairwise(levels):
        of_x0, of_x, std = posterior(a, b)
        out = other.step(eps, int(a.t), x, generator=torch.Generator().manual_seed(int(a.t)))
        noise = draws(int(a.t))(x)
        assert error(of_x0 * schedule.to_x0(eps, x, a) + of_x * x + std * noise, out.prev_sample) < 1e-9, a


@pytest.mark.parametrize("first, n", [(999, 10), (500, 10), (9, 10)])
def test_ddpm(first, n):
    """Runs of several steps, at both ends of the schedule and amid."""
    other = in_float64(scheduler(SD1, "DDPMScheduler"))
    levels = [schedule.level(first - i) for i in range(n + 1)]
    x = reference.normal("x_T", (1, 4, 8, 8)).double()
    rng = torch.Generator().manual_seed(5)
    for step in ddpm(lambda x, a: schedule.to_x0(network(x, a.t), x, a), x.clone(), levels, noise=draws(5)):
        t = int(levels[step.i].t)
        x = other.step(network(x, t), t, x, generator=rng).prev_sample
        assert error(step.x, x) < 1e-9, t


def test_initial_noise():
    """A seed means the picture that it means in diffusers, alone and in a batch of one generator each."""
    for seed in (0, 1234567, 2**63 + 5):
        ours = draw(generators(seed, 1), (4, 9, 7), torch.device("cpu"))
        assert torch.equal(ours, torch.randn((1, 4, 9, 7), generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(ours, randn_tensor((1, 4, 9, 7), generator=torch.Generator().manual_seed(seed)))
    each = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    ours = draw(generators(7, 3), (4, 8, 8), torch.device("cpu"))
    assert torch.equal(ours, randn_tensor((3, 4, 8, 8), generator=each))


def test_picture(tiny_sd, theirs):
    """From seed and prompts to pixels, through guidance, sampler and decoder."""
    pipe = pipeline(theirs, TINY)
    ids = tiny_sd.tokenizer(["a red house", "rain"])
    context, uncond = (theirs["text_encoder"](row[None]) for row in ids)
    (other,) = pipe(
        prompt_embeds=context, negative_prompt_embeds=uncond, num_inference_steps=5, guidance_scale=4.0,
        height=64, width=96, generator=torch.Generator().manual_seed(11),
    ).images  # fmt: skip
    (ours,) = tiny_sd.txt2img(
        "a red house", "rain", steps=5, guidance=4.0, height=64, width=96, seed=11, sampler="ddim"
    )
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(other, dtype=int))
    assert ours.size == other.size == (96, 64) and difference.max() <= 1 and difference.mean() < 0.01
    assert np.asarray(ours).std() > 20  # there is something in the picture to differ


@pytest.mark.parametrize("kind, gamma", [("LCM", None), ("TCD", 0.3), ("TCD", 0.0)])
def test_picture_in_few_steps(tiny_sd, theirs, kind, gamma):
    """The noise of their steps, too, comes from the generator of the initial noise."""
    pipe = pipeline(theirs, TINY)
    pipe.scheduler = scheduler(TINY, f"{kind}Scheduler")
    ids = tiny_sd.tokenizer(["a red house", ""])
    context, uncond = (theirs["text_encoder"](row[None]) for row in ids)
    (other,) = pipe(
        prompt_embeds=context, negative_prompt_embeds=uncond, num_inference_steps=4, guidance_scale=2.0,
        height=64, width=96, generator=torch.Generator().manual_seed(11), eta=gamma or 0.0,
    ).images  # fmt: skip
    options = {} if gamma is None else {"gamma": gamma}
    (ours,) = tiny_sd.txt2img("a red house", guidance=2.0, height=64, width=96, seed=11, sampler=kind, **options)
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(other, dtype=int))
    assert difference.max() <= 1 and difference.mean() < 0.01
    assert np.asarray(ours).std() > 20

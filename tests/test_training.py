"""Training: losses against their closed forms, how networks start, EMA, masks, prompt dropout, a run that learns."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from scripts.training.state import load_state, save_state
from sd.conditioning import Conditioning
from sd.config import POCKET, ScheduleConfig, UNetConfig
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.schedule import Schedule
from sd.training import (
    EMA,
    Muon,
    checkpoint_activations,
    contrastive_loss,
    diffusion_loss,
    drop_prompts,
    initialise_text_encoder,
    initialise_unet,
    initialise_vae,
    learning_rate,
    level_batch,
    min_snr_weight,
    orthogonal,
    random_masks,
    vae_loss,
    velocity_weight,
    widen_input,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_is_its_closed_form(prediction):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise = (torch.randn(3, 4, 2, 5, generator=rng(i)) for i in (1, 2))
    context = Conditioning(torch.randn(3, 7, 6, generator=rng(3)))
    t = torch.tensor([0, 500, 999])
    calls = []

    def network(x, t, context):
        calls.append((x, t, context))
        return 0.5 * x + 0.1

    loss = diffusion_loss(network, schedule, x0, context, t, noise)

    expected = 0.0
    for i, step in enumerate(t.tolist()):  # sample by sample, with the scalar arithmetic of the schedule
        alpha_bar = float(np.prod(1 - schedule.betas[: step + 1]))
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x = alpha * x0[i] + sigma * noise[i]
        target = noise[i] if prediction == "eps" else alpha * noise[i] - sigma * x0[i]
        expected += (0.5 * x + 0.1 - target).square().mean().item() / 3
        torch.testing.assert_close(calls[0][0][i], x)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert calls[0][1] is t and calls[0][2] is context


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusion_loss_of_the_truth_is_zero(prediction):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise = (torch.randn(2, 4, 3, 3, generator=rng(i)) for i in (1, 2))
    t = torch.tensor([3, 700])
    truth = schedule.target(x0, noise, level_batch(schedule, t))
    assert diffusion_loss(lambda *_: truth, schedule, x0, Conditioning(torch.zeros(2, 1, 1)), t, noise).item() == 0


def test_level_batch_agrees_with_level():
    schedule = Schedule()
    batch = level_batch(schedule, torch.tensor([0, 17, 999]))
    assert batch.alpha.shape == batch.sigma.shape == (3, 1, 1, 1)
    for i, t in enumerate((0, 17, 999)):
        level = schedule.level(t)
        assert batch.alpha[i].item() == pytest.approx(level.alpha, rel=1e-6)
        assert batch.sigma[i].item() == pytest.approx(level.sigma, rel=1e-6)


def test_vae_loss_is_its_closed_form():
    image, decoded = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    mean, logvar = torch.full((2, 4, 1, 1), 2.0), torch.full((2, 4, 1, 1), math.log(0.25))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(2.0, 0.5), torch.distributions.Normal(0.0, 1.0))
    assert vae_loss(image, decoded, mean, logvar, 0.1).item() == pytest.approx(0.25 + 0.1 * kl.item(), rel=1e-6)
    assert vae_loss(image, image, torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), 1.0).item() == 0


def test_perceptual_and_adversarial_terms_are_injected():
    image, decoded = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    mean = logvar = torch.zeros(2, 4, 1, 1)
    given = []

    def perceptual(a, b):
        given.append((a, b))
        return 10 * (a - b).abs().mean((1, 2, 3))

    plain = vae_loss(image, decoded, mean, logvar, 0.0)
    assert vae_loss(image, decoded, mean, logvar, 0.0, perceptual=perceptual).item() == pytest.approx(plain.item() + 5)
    assert given[0][0] is image and given[0][1] is decoded
    judged = vae_loss(image, decoded, mean, logvar, 0.0, perceptual, lambda image: -3 * image.mean())
    assert judged.item() == pytest.approx(plain.item() + 5 - 1.5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_makes_the_error_of_x0_count_at_most_gamma(prediction):
    """The same guess of x0, said as eps or as v: its squared error counts min(SNR, gamma)."""
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    x0, noise, guess = (torch.randn(4, 4, 2, 2, generator=rng(i)) for i in (1, 2, 3))
    t, context = torch.tensor([0, 200, 600, 990]), Conditioning(torch.zeros(4, 1, 1))
    alpha, sigma = level_batch(schedule, t)[1:]

    def says(x, *_):
        return (x - alpha * guess) / sigma if prediction == "eps" else (alpha * x - guess) / sigma

    snr = (alpha / sigma).square().flatten()
    assert snr[0] > 1000 and snr[3] < 0.01
    for gamma in (1.0, 5.0):
        expected = (snr.clamp(max=gamma) * (guess - x0).square().mean((1, 2, 3))).mean()
        loss = diffusion_loss(says, schedule, x0, context, t, noise, min_snr_weight(schedule, t, gamma))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_contrastive_loss_is_its_closed_form():
    """Written out for each image and each text, with cosines and logarithms of softmax (symmetric InfoNCE)."""
    images, texts = torch.randn(5, 7, generator=rng(1)), torch.randn(5, 7, generator=rng(2))

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    expected = 0.0
    for i in range(5):
        by_picture = [math.exp(3.0 * cosine(images[i], text)) for text in texts]
        by_text = [math.exp(3.0 * cosine(image, texts[i])) for image in images]
        expected -= (math.log(by_picture[i] / sum(by_picture)) + math.log(by_text[i] / sum(by_text))) / 10
    assert contrastive_loss(images, texts, 3.0).item() == pytest.approx(expected, rel=1e-5)
    assert contrastive_loss(images, 5 * images, 100.0).item() < 0.01  # length does not count
    assert contrastive_loss(images, images.flip(0), 100.0).item() > 10
    with pytest.raises(ValueError, match=r"the same shape \(B, D\), got \(5, 7\) and \(5, 6\)"):
        contrastive_loss(images, texts[:, :6], 1.0)


def test_contrastive_loss_learns_which_belong_together():
    with torch.enable_grad():
        seen, read = torch.randn(16, 12, generator=rng(1)), torch.randn(16, 9, generator=rng(2))
        torch.manual_seed(0)
        towers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(9, 8)])
        log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        optimizer = torch.optim.Adam([*towers.parameters(), log_scale], 0.05)
        for _ in range(150):
            loss = contrastive_loss(towers[0](seen), towers[1](read), log_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.5 < math.log(16)


def test_ema_follows_its_formula():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.5)
    expected = 0.0
    for n, value in enumerate((1.0, 4.0, -2.0, 3.0, 3.0, 8.0, 1.0, 1.0, 1.0), start=1):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 1.0  # the weights themselves stay as they are

    twin = nn.Linear(1, 1, bias=False)
    nn.init.ones_(twin.weight)
    other = EMA(twin, decay=0.5)
    other.load_state_dict(ema.state_dict())
    ema.update(), other.update()
    assert other.average["weight"].item() == ema.average["weight"].item()
    with pytest.raises(ValueError, match="decay"):
        EMA(module, decay=1.0)


def test_ema_is_of_what_is_trained():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert set(EMA(module).average) == {"1.weight", "1.bias"}


def test_prompts_are_dropped_at_the_given_rate():
    ids, empty = torch.arange(1, 5001)[:, None].expand(-1, 3), torch.zeros(3, dtype=torch.long)
    kept = drop_prompts(ids, empty, 0.1, rng())
    dropped = (kept == 0).all(dim=1)
    assert 400 < dropped.sum() < 600
    assert torch.equal(kept[~dropped], ids[~dropped])
    assert torch.equal(drop_prompts(ids, empty, 0.0, rng()), ids)
    assert not drop_prompts(ids, empty, 1.0, rng()).any()


def test_random_masks_hide_anything_from_little_to_all():
    masks = random_masks(400, 24, 40, rng())
    assert masks.shape == (400, 1, 24, 40) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0 and 0.2 < (share == 1).float().mean() < 0.3
    some = share[share < 1]
    assert some.quantile(0.1) < 0.12 and some.quantile(0.9) > 0.35
    often = masks[share < 1].mean((0, 1))
    assert often.min() > 0.03 and often.max() < 0.6  # no part of the image is spared, or always hidden
    assert torch.equal(random_masks(400, 24, 40, rng()), masks)
    assert random_masks(50, 24, 40, rng(), whole=0.0).mean((1, 2, 3)).max() < 1


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_weighted_loss_of_eps_is_the_loss_of_v():
    """The same guess of x0, said as eps and as v: with the weight both losses are equal."""
    eps, v = Schedule(ScheduleConfig(prediction="eps")), Schedule(ScheduleConfig(prediction="v"))
    x0, noise, guess = (torch.randn(3, 4, 2, 2, generator=rng(i)) for i in (1, 2, 3))
    t, context = torch.tensor([300, 600, 990]), Conditioning(torch.zeros(3, 1, 1))
    alpha, sigma = level_batch(eps, t)[1:]

    def says_eps(x, *_):
        return (x - alpha * guess) / sigma

    def says_v(x, *_):
        return (alpha * x - guess) / sigma

    weighted = diffusion_loss(says_eps, eps, x0, context, t, noise, velocity_weight(eps, t))
    expected = diffusion_loss(says_v, v, x0, context, t, noise)
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-3)
    assert weighted.item() != pytest.approx(diffusion_loss(says_eps, eps, x0, context, t, noise).item(), rel=0.1)
    assert torch.equal(velocity_weight(v, t), torch.ones(3))


def test_a_new_unet_predicts_zero():
    torch.manual_seed(0)
    unet = UNet(replace(POCKET.unet, context=8))
    initialise_unet(unet)
    assert unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), Conditioning(torch.randn(1, 3, 8))).abs().max() == 0


def test_a_widened_unet_predicts_as_before():
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 1), blocks=1, context=8)
    unet = UNet(config)
    wider = widen_input(unet, replace(config, in_channels=9))
    x, concat, context = (torch.randn(1, n, 8, 8, generator=rng(n)) for n in (4, 5, 1))
    t, context = torch.tensor([500]), context.view(1, 8, 8)
    masked = wider(x, t, Conditioning(context, concat=concat))
    torch.testing.assert_close(masked, unet(x, t, Conditioning(context)))
    with pytest.raises(ValueError, match="9 input channels to 4"):
        widen_input(wider, config)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 1), blocks=1, context=8))
    x, context = torch.randn(2, 4, 8, 8, generator=rng(1)), Conditioning(torch.randn(2, 3, 8, generator=rng(2)))
    names = unet.state_dict().keys()
    saved: list[list[int]] = []
    found = []
    for again in (False, True):
        if again:
            checkpoint_activations(unet)
        unet.zero_grad()
        saved.append([])
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: (saved[-1].append(tensor.numel()), tensor)[1], lambda tensor: tensor
            ),
        ):
            loss = unet(x, torch.tensor([3, 700]), context).square().mean()
        loss.backward()
        found.append([p.grad.clone() for p in unet.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    assert sum(saved[1]) < 0.5 * sum(saved[0])  # that much less is kept
    assert unet.state_dict().keys() == names


def test_a_new_text_encoder_tells_prompts_apart():
    """The words must be as loud as the positions from the start, or the U-Net learns to ignore them."""
    torch.manual_seed(0)
    text_encoder = TextEncoder(POCKET.text[0])
    initialise_text_encoder(text_encoder)
    ids = torch.full((2, POCKET.text[0].length), POCKET.text[0].pad)
    ids[0, 1:6], ids[1, 1:6] = torch.arange(100, 105), torch.arange(200, 205)
    first, second = text_encoder(ids).hidden
    assert (first[1:6] - second[1:6]).square().mean() > 0.5
    assert (first[-1] - second[-1]).square().mean() > 0.01  # the end knows what came before it


@pytest.mark.exhaustive
@torch.enable_grad()
def test_training_learns():
    """A tiny U-Net learns four latents by heart: the loss falls to a fraction."""
    torch.manual_seed(0)
    schedule = Schedule()
    config = UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 1), blocks=1, context=8)
    unet = UNet(config)
    initialise_unet(unet)
    x0, context = torch.randn(4, 4, 8, 8, generator=rng(1)), Conditioning(torch.randn(4, 3, 8, generator=rng(2)))
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3, weight_decay=0.0)
    random = rng(3)
    losses = []
    for _ in range(80):
        t = torch.randint(200, 1000, (4,), generator=random)
        loss = diffusion_loss(unet, schedule, x0, context, t, torch.randn(x0.shape, generator=random))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # it begins with predicting zero, and noise has variance 1
    assert sum(losses[-10:]) / 10 < 0.35


def test_state_survives_being_written(tmp_path):
    path = tmp_path / "state.pt"
    for step in (1, 2):
        save_state({"step": step, "weights": {"a": torch.arange(3.0)}}, path)
    state = load_state(path)
    assert state["step"] == 2 and torch.equal(state["weights"]["a"], torch.arange(3.0))
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"state\.pt: not a training state"):
        load_state(path)


def test_orthogonal_matrices_have_singular_values_near_one():
    """The directions stay: only the singular values change, whatever they were; wide, tall and square."""
    for shape in ((3, 8, 40), (3, 40, 8), (2, 16, 16)):
        x = torch.randn(shape, generator=rng(), dtype=torch.float32)
        x[0] *= 1e-4  # scale does not count
        y = orthogonal(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert torch.linalg.svdvals(y).min() > 0.6 and torch.linalg.svdvals(y).max() < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        turned = u.mT @ y @ v.mT  # diagonal in the same bases, up to bfloat16
        assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 0.1
    assert orthogonal(torch.zeros(1, 4, 6)).abs().max() == 0


def test_muon_steps_have_the_size_of_adams():
    """A first step of rate 1 moves a matrix by 0.2 in the root mean square (Liu et al. 2025, section 2.2)."""
    for shape in ((32, 64), (32, 16, 3, 3)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=rng(1))
        Muon([weight], lr=1.0).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
        assert (weight * weight.grad).sum() < 0  # downhill


def test_muon_learns_what_the_gradient_hardly_shows_and_decays_weights():
    """Directions whose inputs are a hundred times smaller: gradient descent would leave them where they started."""
    scales = torch.logspace(-2, 0, 8)
    x, target = torch.randn(256, 8, generator=rng(2)) * scales, torch.randn(4, 8, generator=rng(3))
    left = {}
    for name, kind in (("muon", Muon), ("descent", torch.optim.SGD)):
        weight = torch.nn.Parameter(torch.zeros(4, 8))
        optimizer = kind([weight], lr=0.05)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 400, 0.05 if kind is Muon else 0.5, 0)
            with torch.enable_grad():
                (x @ weight.T - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        left[name] = ((weight - target).square().mean(0) / target.square().mean(0)).sqrt()  # by input
    assert (left["muon"][:6] < 0.85 * left["descent"][:6]).all() and left["muon"][2:].max() < 0.4, left
    assert left["descent"][2] > 0.8, left
    decayed = torch.nn.Parameter(torch.ones(4, 8))
    decayed.grad = torch.zeros(4, 8)
    Muon([decayed], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 8), 0.95))


def test_a_new_vae_is_near_its_skip_connections():
    vae = VAE(replace(POCKET.vae, channels=(32, 32), blocks=1))
    before = {name: p.clone() for name, p in vae.named_parameters()}
    initialise_vae(vae)
    changed = {name for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "conv2" in name}
    for name in changed:
        torch.testing.assert_close(vae.get_parameter(name), before[name] * (0.1 if "weight" in name else 0))

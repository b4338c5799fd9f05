"""Training: the losses, how networks start, what is left out or hidden, the average of the weights, the learning rate.

    diffusion    L = E w_t || network(alpha_t x0 + sigma_t eps, t, c) - target ||²  Ho et al. 2020, eq. 14
                 target: eps, or the velocity v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, appendix D)
                 w_t: 1, or min-SNR's (Hang et al. 2023), or that of the velocity
    VAE          (x - decoded)² + weight KL(N(mean, exp(logvar)) || N(0, 1)) + what is injected
                                                         Kingma and Welling 2013; Rombach et al. 2022, appendix G
    CLIP         cross-entropy of the similarities of n pictures and n texts, along the rows and along the columns
                                                         (symmetric InfoNCE) Radford et al. 2021, figure 3
    guidance     some prompts are left out, so that one network learns both predictions     Ho and Salimans 2022
    inpainting   a random part is hidden, and the network is told which   Rombach et al. 2022, section 4.5
    EMA          average = decay average + (1 - decay) weights                              Ho et al. 2020, section 4
    Muon         weight -= rate · the nearest orthogonal matrix of the gradients' average   Jordan et al. 2024

Nothing that paints imports this file.

>>> schedule, noise = Schedule(), torch.randn(2, 4, 8, 8)
>>> t, context = torch.tensor([10, 900]), torch.zeros(2, 77, 16)
>>> cond = Conditioning(context)
>>> float(diffusion_loss(lambda x, t, cond: noise, schedule, torch.randn(2, 4, 8, 8), cond, t, noise))
0.0
>>> [round(learning_rate(step, 100, 1.0, warmup=10), 2) for step in (0, 9, 55, 100)]
[0.1, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conditioning import Conditioning
from .config import UNetConfig
from .denoiser import Network
from .models.layers import ResBlock
from .models.text_encoder import TextBlock, TextEncoder
from .models.unet import SpatialTransformer, UNet
from .models.vae import VAE
from .schedule import Level, Schedule


@lru_cache(maxsize=16)
def _level_table(schedule: Schedule, device: torch.device) -> Tensor:
    """alpha and sigma of all timesteps, (2, steps): on the device once, so that no step of training waits for it."""
    alpha_bar = torch.from_numpy(schedule.alpha_bar)
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]).to(device, torch.float32)


def level_batch(schedule: Schedule, t: Tensor) -> Level:
    """The levels of whole timesteps t (B,) as one: its alpha and sigma are (B, 1, 1, 1), float32, on t's device.

    `Schedule.add_noise` and `Schedule.target` take it like any other level, and broadcast.
    """
    alpha, sigma = _level_table(schedule, t.device)[:, t, None, None, None]
    return Level(t, alpha, sigma)


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    x0: Tensor,
    conditioning: Conditioning,
    t: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the network's prediction, eps or v as the schedule says (Ho et al. 2020, eq. 14).

    x0 (B, C, h, w) clean latents, t (B,) whole timesteps, noise like x0 -> a scalar, in float32.
    `weight` (B,) says how much each sample counts; all the same if not given.
    """
    level = level_batch(schedule, t)
    out = network(schedule.add_noise(x0, noise, level), t, conditioning)
    error = (out.float() - schedule.target(x0, noise, level)).square().mean((1, 2, 3))
    return error.mean() if weight is None else (weight * error).mean()


def velocity_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Weights (B,) with which the error of eps counts as that of v would: 1 / alpha² (Salimans and Ho 2022, table 1).

    At strong noise eps is nearly all there is to see, so its error says little there; but that is where the picture
    is laid out and the prompt decides. With this weight a short training learns to listen to it.
    """
    if schedule.config.prediction == "v":
        return torch.ones(t.shape, device=t.device)
    return level_batch(schedule, t).alpha.flatten() ** -2


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights (B,) by which the error of x0 counts min(SNR, gamma), SNR = alpha² / sigma² (Hang et al. 2023, eq. 8).

    Nearly clean data asks for little but would count most: its error is held back, and all timesteps pull alike. Of
    x0's error, that of eps is 1 / SNR and that of v 1 / (SNR + 1).
    """
    _, alpha, sigma = level_batch(schedule, t)
    snr = (alpha / sigma).square().flatten()
    return snr.clamp(max=gamma) / (snr + 1 if schedule.config.prediction == "v" else snr)


def vae_loss(
    image: Tensor,
    decoded: Tensor,
    mean: Tensor,
    logvar: Tensor,
    kl_weight: float,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    adversarial: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Squared error per pixel value, and the KL divergence per latent from a unit normal distribution.

    image and decoded (B, 3, H, W), mean and logvar (B, C, h, w) -> a scalar, in float32. With a small weight the KL
    term does not make the latents normal; it keeps their size within bounds and nearby latents alike.

    perceptual   (image, decoded) -> how different they look, for example LPIPS (Zhang et al. 2018)
    adversarial  decoded -> how little a discriminator takes it for a photograph (Esser et al. 2021)

    Each brings its own weight; the mean of what it gives is added.
    """
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    loss = F.mse_loss(decoded.float(), image) + kl_weight * kl.mean()
    if perceptual is not None:
        loss = loss + perceptual(image, decoded).mean()
    if adversarial is not None:
        loss = loss + adversarial(decoded).mean()
    return loss


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's: which text belongs to which picture, and which picture to which text (Radford et al. 2021, figure 3).

    image_features and text_features (B, D), of which row i belongs to row i -> a scalar, in float32. `scale` is
    1 / temperature, in CLIP exp of a learned number that starts at ln(1 / 0.07) and is kept below ln(100).
    """
    if image_features.shape != text_features.shape or image_features.dim() != 2:
        raise ValueError(
            f"expected pictures' and texts' features of one shape (B, D), got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}"
        )
    with torch.autocast(image_features.device.type, enabled=False):  # scaled by 100, half precision is too coarse
        image_features, text_features = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
        similarity = scale * image_features @ text_features.T  # (B, B)
    own = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def drop_prompts(ids: Tensor, empty: Tensor, rate: float, rng: torch.Generator) -> Tensor:
    """The prompts' ids (B, M), each with probability `rate` replaced by those of the empty prompt, (M,).

    Ho and Salimans 2022, algorithm 1. `rng` is on the ids' device.
    """
    dropped = torch.rand(len(ids), generator=rng, device=ids.device) < rate
    return torch.where(dropped[:, None], empty, ids)


def random_masks(n: int, height: int, width: int, rng: torch.Generator, whole: float = 0.25) -> Tensor:
    """n masks (n, 1, height, width), 0 or 1: what a model of 9 channels is asked to paint anew (1).

    One to four rectangles and strokes of a thick brush, of any place and size (after Suvorov et al. 2022, "LaMa",
    section 2.3); with probability `whole` all of the picture, so that the model still paints from nothing (the
    inpainting checkpoints' card: "in 25% mask everything"). On the generator's device.
    """
    shapes = 4

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, shapes, 1, 1, generator=rng, device=rng.device)

    y = (torch.arange(height, device=rng.device).view(1, 1, -1, 1) + 0.5) / height
    x = (torch.arange(width, device=rng.device).view(1, 1, 1, -1) + 0.5) / width
    rectangle = ((x - uniform(0, 1)).abs() < uniform(0.05, 0.3)) & ((y - uniform(0, 1)).abs() < uniform(0.05, 0.3))
    # a stroke: all that is near the line from (x0, y0) to (x1, y1)
    x0, y0, x1, y1 = uniform(0, 1), uniform(0, 1), uniform(0, 1), uniform(0, 1)
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6)).clamp(0, 1)
    stroke = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2 < uniform(0.03, 0.12) ** 2
    index = torch.arange(shapes, device=rng.device).view(1, -1, 1, 1)
    used = index <= uniform(0, shapes)[:, :1]  # the first always
    masks = (torch.where(uniform(0, 1) < 0.5, rectangle, stroke) & used).any(dim=1, keepdim=True)
    everything = torch.rand(n, 1, 1, 1, generator=rng, device=rng.device) < whole
    return (masks | everything).float()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at `steps` (Loshchilov and Hutter 2016)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def initialise_text_encoder(text_encoder: TextEncoder) -> None:
    """CLIP's start (Radford et al. 2021, `initialize_parameters` of model.py): normal weights, biases zero.

    What a layer puts out keeps about the size of what goes in; what is added to the residual stream is smaller, the
    more layers there are. In a narrow encoder, one small deviation for all layers would hide the words.
    """
    config = text_encoder.config
    nn.init.normal_(text_encoder.token.weight, std=0.02)
    nn.init.normal_(text_encoder.position.weight, std=0.01)
    width = config.width**-0.5
    added = width * (2 * config.layers) ** -0.5
    for block in text_encoder.blocks:
        layers = {block.attn.q: width, block.attn.k: width, block.attn.v: width, block.attn.out: added}
        for layer, std in (layers | {block.fc1: width * 2**-0.5, block.fc2: added}).items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def initialise_unet(unet: UNet) -> None:
    """Every residual branch starts at zero, and so does the output (Ho et al. 2020; Dhariwal and Nichol 2021).

    All other layers keep PyTorch's start.
    """
    last = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            last.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def initialise_vae(vae: VAE, branch: float = 0.1) -> None:
    """Residual branches start small, so that a deep network begins near a shallow one (Zhang et al. 2019, "Fixup").

    At zero, as in the U-Net, they would take longer to wake up. All other layers keep PyTorch's start.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            with torch.no_grad():
                module.conv2.weight.mul_(branch)
            nn.init.zeros_(module.conv2.bias)


def widen_input(unet: UNet, config: UNetConfig) -> UNet:
    """The U-Net with more input channels, which it does not listen to yet: their kernels are zero.

    So an inpainting model begins as the model that it is made of (Rombach et al.'s inpainting checkpoints began so).
    """
    known = unet.conv_in.weight
    if config.in_channels < known.shape[1]:
        raise ValueError(f"a U-Net of {known.shape[1]} input channels cannot be given {config.in_channels}")
    with torch.device("meta"):
        wider = UNet(config)
    state = unet.state_dict()
    state["conv_in.weight"] = F.pad(known, (0, 0, 0, 0, 0, config.in_channels - known.shape[1]))
    wider.load_state_dict(state, assign=True)
    return wider


def checkpoint_activations(network: nn.Module) -> None:
    """Let residual blocks and transformers forget what they computed and compute it again on the way back.

    Chen et al. 2016, "Training deep nets with sublinear memory cost": about a third more work for a fraction of the
    memory, and the same gradients. The classes stay as they are; the blocks of this network are wrapped.
    """
    for module in network.modules():
        if isinstance(module, (ResBlock, SpatialTransformer, TextBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


class EMA:
    """Exponential moving average of the parameters that a module trains: decay average + (1 - decay) parameter.

    In the first updates the decay is (1 + n) / (10 + n), so that the start is soon forgotten (as in the original's
    LitEma).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs to go on."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state."""
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by orthogonal ones nearby, so that rare directions learn, too.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; steps have about the size of Adam's
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so learning rates carry over. It is for weights
    of two and more dimensions between a network's ends; a kernel (out, in, 3, 3) counts as a matrix (out, in · 9).
    Small networks learn in half the steps or fewer that AdamW needs.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change the weights by their gradients. Matrices of one shape go together, which a GPU needs to be busy."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, weights in by_shape.items():
                updates = []
                for p in weights:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov's look ahead
                matrices = orthogonal(torch.stack(updates))
                size = 0.2 * max(matrices.shape[1:]) ** 0.5  # an orthogonal matrix' root mean square -> Adam's, 0.2
                for p, matrix in zip(weights, matrices, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(matrix.view(shape), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with their singular values brought to about 1, from 0.7 to 1.2; the same dtype.

    Five turns of a Newton-Schulz iteration, whose coefficients Jordan et al. chose for speed; bfloat16 does for it.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)

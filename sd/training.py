"""Training: the losses, how networks start, the average of the weights, prompt dropout and the learning rate.

    diffusion    L = E || network(alpha_t x0 + sigma_t eps, t, context) - target ||²      Ho et al. 2020, eq. 14
                 target: eps, or the velocity v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, appendix D)
    VAE          |x - decoded| + (x - decoded)² + weight KL(N(mean, exp(logvar)) || N(0, 1))
                                                         Kingma and Welling 2013; Rombach et al. 2022, appendix G
    guidance     some prompts are left out, so that one network learns both predictions     Ho and Salimans 2022
    EMA          average = decay average + (1 - decay) weights                              Ho et al. 2020, section 4

Nothing that paints imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import Tensor, nn

from .denoiser import Network
from .layers import ResBlock
from .schedule import Level, Schedule
from .text_encoder import TextEncoder
from .unet import SpatialTransformer, UNet


def level_batch(schedule: Schedule, t: Tensor) -> Level:
    """The levels of whole timesteps t (B,) as one: its alpha and sigma are (B, 1, 1, 1), float32, on t's device.

    `Schedule.add_noise` and `Schedule.target` take it like any other level, and broadcast.
    """
    alpha_bar = torch.from_numpy(schedule.alpha_bar)[t.cpu(), None, None, None]
    alpha, sigma = (x.to(t.device, torch.float32) for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return Level(t, alpha, sigma)


def diffusion_loss(
    network: Network,
    schedule: Schedule,
    x0: Tensor,
    context: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the network's prediction, eps or v as the schedule says (Ho et al. 2020, eq. 14).

    x0 (B, C, h, w) clean latents, context (B, M, D), t (B,) whole timesteps, noise like x0 -> a scalar, in float32.
    `weight` (B,) says how much each sample counts; all the same if not given.
    """
    level = level_batch(schedule, t)
    out = network(schedule.add_noise(x0, noise, level), t, context)
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


def vae_loss(image: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float) -> Tensor:
    """Absolute and squared error per pixel value, and the KL divergence per latent from a unit normal distribution.

    image and decoded (B, 3, H, W), mean and logvar (B, C, h, w) -> a scalar, in float32. With a small weight the KL
    term does not make the latents normal; it keeps their size within bounds and nearby latents alike.
    """
    error = decoded.float() - image
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return error.abs().mean() + error.square().mean() + kl_weight * kl.mean()


def drop_prompts(prompts: Sequence[str], rate: float, rng: Random) -> list[str]:
    """The prompts, each with probability `rate` replaced by the empty one (Ho and Salimans 2022, algorithm 1)."""
    return ["" if rng.random() < rate else prompt for prompt in prompts]


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


class EMA:
    """Exponential moving average of a module's parameters: average = decay average + (1 - decay) parameter.

    In the first updates the decay is (1 + n) / (10 + n), so that the start is soon forgotten (as in the original's
    LitEma).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            self.average[name].lerp_(p, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs to go on."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state."""
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)

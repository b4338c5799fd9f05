"""Train the U-Net and the text encoder of the embedded model. Step 2 of 2; step 1 is train_vae.py.

python scripts/train.py --vae outputs/vae/vae.pt --out outputs/pocket --export outputs/pocket.safetensors

Scenes are drawn and encoded once; every epoch says them in other words. The text encoder starts from nothing and
learns with the U-Net.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from sd.config import POCKET, Config
from sd.convert import CONFIG_KEY, to_own
from sd.device import best_dtype
from sd.image import grid
from sd.pipeline import StableDiffusion
from sd.schedule import Schedule
from sd.text_encoder import TextEncoder
from sd.tokenizer import Tokenizer
from sd.training import (
    EMA,
    diffusion_loss,
    drop_prompts,
    initialise_text_encoder,
    initialise_unet,
    learning_rate,
    velocity_weight,
)
from sd.unet import UNet
from sd.vae import VAE

if __package__:
    from . import cli
    from .train_vae import load_state, pictures, save_state, to_floats
    from .world import Scene, caption, random_scene
else:
    from scripts import cli
    from scripts.train_vae import load_state, pictures, save_state, to_floats
    from scripts.world import Scene, caption, random_scene

CHUNK = 500  # scenes that are drawn before they are encoded
SAMPLE_PROMPTS = (
    "a red circle in the snow",
    "a big red balloon over the sea",
    "a blue star and a yellow heart at night",
    "a small white house on a green meadow",
    "a purple boat at sea",
    "a yellow tree in the desert",
    "a green triangle on the beach",
    "an orange square at night",
    "a pink heart on the left in the snow",
    "a blue house and a red tree on the grass",
    "a small yellow star at the top on the beach",
    "a meadow",
)


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vae", type=Path, default=Path("outputs/vae/vae.pt"), help="what train_vae.py wrote (default: %(default)s)")
    add("--out", type=Path, default=Path("outputs/pocket"), help="folder for state and samples (default: %(default)s)")
    add("--export", type=Path, help="the finished model in float16; OUT/pocket.safetensors if not given")
    add("--unet", type=Path, metavar="STATE", help="begin with the averaged U-Net of another run's state")
    add("--resume", action="store_true", help="go on from the state in --out")
    add("--scenes", type=int, default=12000, help="different scenes (default: %(default)s)")
    add("--steps", type=int, default=5500, help="optimisation steps (default: %(default)s)")
    add("--batch", type=int, default=32, help="scenes a step (default: %(default)s)")
    add("--lr", type=float, default=8e-4, help="highest learning rate (default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="share of prompts left out, for guidance (default: %(default)s)")
    add("--ema", type=float, default=0.995, help="decay of the averaged weights (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to PyTorch")
    add("--save-every", type=int, default=500, metavar="STEPS", help="default: %(default)s")
    return parser


@torch.no_grad()
def encode_scenes(vae: VAE, n: int, low: bool) -> dict[str, Tensor]:
    """Mean and standard deviation of the latents of scenes 0 .. n - 1, each (n, 4, 16, 16), in float16."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in tqdm(range(0, n, CHUNK), "encoding scenes"):
        for part in pictures(start, min(CHUNK, n - start)).split(16):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                found.append(tuple(x.half() for x in vae.encode(to_floats(part))))
    mean, std = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {"mean": mean, "std": std}


def order(n: int, batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Batches of scene numbers, every epoch in a new order, from step `start` on."""
    per_epoch = n // batch
    epoch = -1
    shuffled: list[int] = []
    step = start
    while True:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            shuffled = Random(seed * 1_000_003 + epoch).sample(range(n), n)
        at = step % per_epoch * batch
        yield shuffled[at : at + batch]
        step += 1


@torch.no_grad()
def forget_unused(text_encoder: TextEncoder, tokenizer: Tokenizer, scenes: list[Scene]) -> None:
    """Set the vectors of all tokens to zero that no caption has, so that unknown words mean nothing, not anything.

    They get no gradient and stay so.
    """
    captions = {caption(scene, Random(i)) for i, scene in enumerate(scenes)}
    used = tokenizer(sorted(captions)).unique()
    weight = text_encoder.token.weight
    kept = weight[used].clone()
    weight.zero_()
    weight[used] = kept


def averaged(config: Config, ema: EMA, vae: VAE) -> StableDiffusion:
    """The pipeline with the averaged weights."""
    networks = nn.ModuleDict({"text_encoder": TextEncoder(config.text), "unet": UNet(config.unet)})
    networks.load_state_dict(ema.average)
    networks.requires_grad_(False).eval()
    return StableDiffusion(config, networks["text_encoder"], vae, networks["unet"])


def export(model: StableDiffusion, path: Path) -> None:
    """Write a model in our layout, in float16, with its config in the metadata; whole or not at all."""
    networks = {"text_encoder": model.text_encoder, "vae": model.vae, "unet": model.unet}
    tensors = to_own({name: network.state_dict() for name, network in networks.items()})
    partial = path.with_name(f".{path.name}.part")
    try:
        halves = {key: tensor.to(torch.float16).contiguous() for key, tensor in tensors.items()}
        save_file(halves, partial, {CONFIG_KEY: model.config.to_json(), "format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    first = load_state(args.vae)
    config = replace(POCKET, vae=replace(POCKET.vae, scale=first["scale"]))
    vae = VAE(config.vae)
    vae.load_state_dict(first["vae"])
    vae.requires_grad_(False).eval()
    schedule = Schedule(config.schedule)
    tokenizer = Tokenizer(length=config.text.length, pad=config.text.pad)
    networks = nn.ModuleDict({"text_encoder": TextEncoder(config.text), "unet": UNet(config.unet)})
    initialise_text_encoder(networks["text_encoder"])
    initialise_unet(networks["unet"])
    if args.unet:
        average = load_state(args.unet)["ema"]["average"]
        networks["unet"].load_state_dict(
            {key.removeprefix("unet."): value for key, value in average.items() if key.startswith("unet.")}
        )
    # no weight decay: the run is short, and the rows of words it never meets shall stay as they are
    optimizer = torch.optim.AdamW(networks.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMA(networks, args.ema)
    start = 0
    if args.resume:
        state = load_state(args.out / "state.pt")
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start = state["step"]

    low = best_dtype(torch.device("cpu")) == torch.bfloat16
    cache = args.out / "latents.pt"
    latents = (
        load_state(cache) if (args.resume or args.unet) and cache.exists() else encode_scenes(vae, args.scenes, low)
    )
    save_state(latents, cache)
    scenes = [random_scene(Random(i)) for i in range(len(latents["mean"]))]  # `example`'s scenes without the pictures

    if start == 0:
        forget_unused(networks["text_encoder"], tokenizer, scenes)

    began, losses = time.monotonic(), []
    batches = order(len(scenes), args.batch, args.seed, start)
    bar = tqdm(range(start, args.steps), "training", initial=start, total=args.steps)
    for step in bar:
        # seeded by the step: a run that goes on draws what an unbroken one would
        choice, rng = Random(args.seed * 1_000_003 + step), torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = next(batches)
        mean, std = latents["mean"][chosen].float(), latents["std"][chosen].float()
        x0 = mean + std * torch.randn(mean.shape, generator=rng)
        noise = torch.randn(mean.shape, generator=rng)
        t = torch.randint(0, schedule.steps, (len(chosen),), generator=rng)
        ids = tokenizer(drop_prompts([caption(scenes[i], choice) for i in chosen], args.dropout, choice))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup=100)
        # the fused attention's way back is slow on CPUs; with 64 positions the plain one needs little memory
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                context = networks["text_encoder"](ids)
                weight = velocity_weight(schedule, t)
                loss = diffusion_loss(networks["unet"], schedule, x0, context, t, noise, weight)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        ema.update(networks)
        losses.append(loss.item())

        done, last = step + 1, step + 1 == args.steps
        if done % 50 == 0 or last:
            mean_loss, minutes = sum(losses) / len(losses), (time.monotonic() - began) / 60
            losses.clear()
            tqdm.write(f"step {done}: loss {mean_loss:.4f}, {minutes:.1f} min")
            if not math.isfinite(mean_loss):
                raise ArithmeticError("training went to NaN: try a lower --lr")
        if done % args.save_every == 0 or last:
            state = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state | {"ema": ema.state_dict(), "step": done}, args.out / "state.pt")
            model = averaged(config, ema, vae)
            pictures_ = model.txt2img(SAMPLE_PROMPTS, steps=25, guidance=4.0, seed=1)
            grid(pictures_, columns=4).save(args.out / f"samples-{done:06d}.png")
            export(model, args.export or args.out / "pocket.safetensors")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())

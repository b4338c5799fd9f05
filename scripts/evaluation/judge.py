"""The judge: a classifier that recognises the scene in an image of the toy world.

    judge = find(Path("outputs/judge.safetensors"), device)     trained now if the file is missing
    scenes = judge.look(images)

It is a small convolutional network, trained on renderings of all combinations (none is unseen for the judge). Half of
them are JPEG-compressed, and all are blurred, noisy and tinted to some degree, so that it tolerates the artefacts of
decoded latents. It shares neither weights nor training with the models that it judges.

An image has six slots for a thing: on the ground and in the sky, each at the left, in the middle and at the right. For
each slot the network predicts kind (or none), colour and size; for the whole image style, time and ground. `labels` and
`scene_of` convert between these answers and a `Scene`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from sd.imaging.tensors import resize
from sd.runtime.device import best_dtype
from sd.training import channels_last

from ..toy_world import SIZE, Scene, Thing, draw, random_scene
from ..toy_world.scenes import COLOURS, COLUMNS, FLOATING, GROUNDS, SIZES, STANDING, STYLES, TIMES, scene_with
from ..training.state import save_tensors

Questions = tuple[tuple[str, ...], ...]  # the classes of each prediction

SLOTS = tuple((kinds, column) for kinds in (STANDING, FLOATING) for column in COLUMNS)  # positions of things
UNASKED = -100  # label of the colour and size of an empty slot; cross_entropy ignores it

TRAINING_IMAGES, TRAINING_STEPS, BATCH = 30_000, 4_500, 64
BLUR, RUN, TRACE, TINT, NOISE = 2.0, 0.6, 0.25, 0.08, 0.14  # maximum of each in `worn`; BLUR is in pixels
JPEG_QUALITY = (30, 95)
WITH_EXTRA = 0.25  # share of scenes with an extra kind, if the judge is to know it


def questions(extra: str = "") -> Questions:
    """The classes of each prediction: style, time, ground, and for each slot kind, colour and size; "" is no thing.

    extra   one of toy_world.scenes.EXTRA, which the judge is to know, too
    """
    found: Questions = (STYLES, TIMES, GROUNDS)
    for kinds, _ in SLOTS:
        more = (extra,) if extra and kinds is STANDING else ()
        found += (("", *kinds, *more), COLOURS, SIZES)
    return found


QUESTIONS = questions()


def labels(scene: Scene, extra: str = "") -> list[int]:
    """The index of the right class for each of `questions(extra)`, or UNASKED."""
    answers = [STYLES.index(scene.style), TIMES.index(scene.time), GROUNDS.index(scene.ground)]
    for (_, column), kinds in zip(SLOTS, questions(extra)[3::3], strict=True):
        here = [thing for thing in scene.things if thing.column == column and thing.kind in kinds]
        if here:
            answers += [kinds.index(here[0].kind), COLOURS.index(here[0].colour), SIZES.index(here[0].size)]
        else:
            answers += [0, UNASKED, UNASKED]
    return answers


def scene_of(answers: Sequence[int], extra: str = "") -> Scene:
    """The scene with these labels. An image of poor quality may have more things than a valid scene."""
    words = [choices[answer] for choices, answer in zip(questions(extra), answers, strict=True)]
    style, time, ground, *rest = words
    triples = zip(rest[::3], rest[1::3], rest[2::3], SLOTS, strict=True)
    seen = [Thing(kind, colour, size, column) for kind, colour, size, (_, column) in triples if kind]
    seen.sort(key=lambda thing: COLUMNS.index(thing.column))  # stable: what stands stays before what floats
    return Scene(style, time, ground, tuple(seen))


class Judge(nn.Module):
    """Strided convolutions down to an 8 x 8 map, a fully connected layer, and one linear head per question.

    extra   a kind of toy_world.scenes.EXTRA that it recognises beside those of the world
    """

    def __init__(self, extra: str = "") -> None:
        super().__init__()
        self.extra = extra

        def block(inner: int, outer: int, kernel: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
            return [convolution, nn.BatchNorm2d(outer), nn.ReLU()]

        self.body = nn.Sequential(
            *block(3, 32, 5, 2),
            *block(32, 64, 3, 2),
            *block(64, 96, 3, 2),
            *block(96, 96, 3, 1),
            *block(96, 128, 3, 2),
            *block(128, 128, 3, 1),
            *(nn.Conv2d(128, 48, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)),
            *(nn.Linear(48 * (SIZE // 16) ** 2, 384), nn.ReLU()),
        )
        self.heads = nn.ModuleList(nn.Linear(384, len(choices)) for choices in questions(extra))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, SIZE, SIZE) in [-1, 1] -> logits (B, classes) for each question."""
        features = self.body(x)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image] | Tensor, batch: int = 250) -> list[Scene]:
        """The scenes in images of any size, or in a tensor (N, 3, SIZE, SIZE) in [-1, 1]."""
        x = images if isinstance(images, Tensor) else to_tensor([resize(each, SIZE, SIZE) for each in images])
        device = next(self.parameters()).device
        self.eval()
        answers = [torch.stack([head.argmax(1) for head in self(part.to(device))], 1) for part in x.split(batch)]
        return [scene_of(row, self.extra) for part in answers for row in part.tolist()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of the same size -> (N, 3, H, W) in [-1, 1]."""
    return to_floats(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W) in [-1, 1]."""
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after JPEG compression, quality 1 to 95."""
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Images (B, C, H, W), each convolved with a Gaussian of standard deviation sigma (B,), in pixels."""
    B, C, H, W = x.shape
    reach = torch.arange(-4, 5, device=x.device)
    kernel = torch.exp(-(reach**2) / (2 * sigma[:, None].clamp(min=1e-3) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None]  # (B C, 1, 9)
    x = F.pad(x, (4, 4, 4, 4), mode="replicate").reshape(1, B * C, H + 8, W + 8)
    x = F.conv2d(F.conv2d(x, kernel[..., None], groups=B * C), kernel[..., None, :], groups=B * C)
    return x.reshape(B, C, H, W)


def worn(x: Tensor, rng: torch.Generator) -> Tensor:
    """Training images (B, 3, H, W) with random degradations like those of an autoencoder and a sampler.

    Blur, colour bleeding, a trace of another image, a tint, and noise from coarse to fine.
    """
    B, _, H, W = x.shape

    def lot(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng).to(x.device)

    x = blurred(x, BLUR * lot(B) ** 2)
    grey = x.mean(1, keepdim=True)
    runny = F.interpolate(F.avg_pool2d(x - grey, 8), size=(H, W), mode="bilinear")
    x = grey + torch.lerp(x - grey, runny, RUN * lot(B, 1, 1, 1) ** 2)
    x = torch.lerp(x, x.roll(1, 0), TRACE * lot(B, 1, 1, 1) ** 2)
    x = x * (1 + TINT * (2 * lot(B, 1, 1, 1) - 1)) + TINT * (2 * lot(B, 3, 1, 1) - 1)
    for size, channels in ((1, 1), (2, 3), (8, 3), (32, 3)):
        noise = torch.randn(B, channels, H // size, W // size, generator=rng).to(x.device)
        x = x + NOISE * lot(B, 1, 1, 1) ** 2 * F.interpolate(noise, size=(H, W), mode="bilinear")
    return x


def renderings(n: int, seed: str, compressed: bool = False, extra: str = "") -> tuple[Tensor, list[Scene]]:
    """n scenes of all combinations as uint8 images (n, SIZE, SIZE, 3); if `compressed`, half of them through JPEG.

    With `extra`, a quarter of them has a thing of this kind.
    """
    rng = Random(seed)
    pixels, scenes = torch.empty(n, SIZE, SIZE, 3, dtype=torch.uint8), []
    for i in tqdm(range(n), "rendering", disable=None, leave=False):
        has_extra = extra and rng.random() < WITH_EXTRA
        scenes.append(scene_with(extra, rng) if has_extra else random_scene(rng, "all"))
        image = draw(scenes[-1], rng)
        if compressed and rng.random() < 0.5:
            image = jpeg(image, rng.randint(*JPEG_QUALITY))
        pixels[i] = torch.from_numpy(np.array(image))
    return pixels, scenes


def train(
    device: torch.device,
    images: int = TRAINING_IMAGES,
    steps: int = TRAINING_STEPS,
    batch: int = BATCH,
    extra: str = "",
) -> Judge:
    """Train a judge. This takes about 20 minutes on two CPU cores, including one or two for the renderings."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    pixels, scenes = renderings(images, "judge: training", compressed=True, extra=extra)
    targets = torch.tensor([labels(each, extra) for each in scenes])
    judge = channels_last(Judge(extra), device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=min(0.1, 100 / steps))
    bar = tqdm(range(steps), "training the judge", disable=None)
    with torch.enable_grad():
        for _ in bar:
            chosen = torch.randint(images, (batch,), generator=rng)
            x = worn(to_floats(pixels[chosen]).to(device), rng).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == torch.bfloat16):
                outputs = judge(x)
            losses = [
                F.cross_entropy(output.float(), target, ignore_index=UNASKED, reduction="sum")
                / (target != UNASKED).sum().clamp(min=1)
                for output, target in zip(outputs, targets[chosen].T.to(device), strict=True)
            ]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval()


def fingerprint(extra: str = "") -> str:
    """A digest of everything that a trained judge depends on: sample renderings, questions, and network shapes."""
    digest = hashlib.sha256(repr(questions(extra)).encode())
    digest.update(repr([(name, tuple(weight.shape)) for name, weight in Judge(extra).state_dict().items()]).encode())
    digest.update(renderings(100, "judge: fingerprint", extra=extra)[0].numpy().tobytes())
    return digest.hexdigest()


def find(path: Path, device: torch.device, extra: str = "") -> Judge:
    """Load the judge from a file; if it is missing or of another world, train a judge and save it there.

    extra   a kind of toy_world.scenes.EXTRA that the judge knows, too: for a file of its own

    Raises ValueError for a file that is not a judge.
    """
    current = fingerprint(extra)
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("fingerprint")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a judge ({error}): remove it to train a new one") from None
        if found is None:
            raise ValueError(f"{path} is not a judge: give --judge another name")
        if found == current:
            judge = Judge(extra)
            judge.load_state_dict(load_file(path))
            return judge.to(device).eval()
        tqdm.write(f"{path} was trained on another world: training a new judge")
    path.parent.mkdir(parents=True, exist_ok=True)
    judge = train(device, extra=extra)
    save_tensors({name: weight.cpu() for name, weight in judge.state_dict().items()}, path, {"fingerprint": current})
    return judge

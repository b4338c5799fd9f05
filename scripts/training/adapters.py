"""train.py --lora and --train-word: adapters are trained, and the model itself stays unchanged.

--lora R            low-rank changes of layers of the U-Net, with --train-text of the text encoders too (Hu et al. 2021)
--train-word WORD   vectors of a new word of the prompt (textual inversion, Gal et al. 2022)
both                a LoRA whose file also contains the vectors of the word ("pivotal tuning")

Without --ckpt the model is the embedded one. Its weights are in the precision of the computation, those that are
trained in float32. Writes OUT/lora.safetensors or OUT/WORD.safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.pipeline import StableDiffusion
from sd.resources import EMBEDDED, resource
from sd.runtime.device import find_dtype
from sd.training import (
    LoraParams,
    TrainableLora,
    TrainableWord,
    bundled_tensors,
    embedding_pickle,
    embedding_tensors,
    lora_hash,
    lora_layers,
    lora_metadata,
    lora_tensors,
)
from sd.training.lora import LAYERS
from sd.training.lora_files import NAMINGS

from ..common.cli import Parser
from .captions import text_encoders
from .data import Source
from .dataset import TrainingData
from .folders import Joined
from .models import load_plain, with_vae
from .recipe import Recipe, defaults_help, find_precision
from .state import save_pickle, save_tensors
from .word_captions import OBJECT, STYLE, WithWord

# for the embedded model, and for a checkpoint
LORA = Recipe(steps=300, batch=8, lr=2e-3, weight_decay=0.0, warmup=20, ema=0.0, save_every=100)
LORA_OF_CHECKPOINT = Recipe(steps=1500, batch=1, lr=1e-4, ema=0.0, save_every=250)
WORD = Recipe(steps=1500, batch=8, lr=3e-2, weight_decay=0.0, beta2=0.99, warmup=20, ema=0.0, save_every=500)
WORD_OF_CHECKPOINT = Recipe(steps=3000, batch=1, lr=5e-3, weight_decay=0.0, ema=0.0, save_every=500)
FORBIDDEN = '<>:"/\\|?*'  # in names of files on some systems
TAKEN, LONGEST = ("lora", "state"), 50  # names of other files of a run, and letters of the name of a file
# options that go with --lora or --train-word, with their values where they are not given
OF_LORA = {
    "lora_alpha": None, "lora_layers": "transformer", "conv_rank": None, "conv_alpha": None, "lora_dropout": 0.0,
    "dora": False, "lora_names": NAMINGS[0],
}  # fmt: skip
MOST_TAGS = 200
OF_WORD = {"vectors": 1, "init_word": None, "word_style": False, "word_lr": None, "word_format": "safetensors"}
# options for whole models
OTHERS = {"text": None, "inpaint": False, "prediction": None, "zero_snr": False, "shard": False}


def add_adapter_arguments(parser: Parser) -> None:
    """Add --lora, --train-word and their related options."""
    add = parser.add_argument_group("LoRA").add_argument
    add(
        "--lora",
        type=int,
        metavar="RANK",
        help="train a LoRA of this rank; the model itself stays unchanged. " + defaults_help(LORA, LORA_OF_CHECKPOINT),
    )
    add("--lora-alpha", type=float, metavar="A", help="the LoRA is scaled by A / RANK (default: RANK)")
    add(
        "--lora-layers", choices=tuple(LAYERS), default="transformer",
        help="which layers get a LoRA: attention, the whole transformers, or all with convolutions "
        "(default: %(default)s)",
    )  # fmt: skip
    add("--conv-rank", type=int, metavar="R", help="rank of 3x3 convolutions, for --lora-layers all (default: RANK)")
    add("--conv-alpha", type=float, metavar="A", help="alpha of 3x3 convolutions (default: in proportion)")
    add("--lora-dropout", type=float, default=0.0, metavar="P", help="dropout of the LoRA's inputs (default: 0)")
    add("--dora", action="store_true", help="train a DoRA: the lengths of the weights' rows are learned, too")
    add(
        "--lora-names",
        choices=NAMINGS,
        default=NAMINGS[0],
        help="naming of the layers in the file: kohya's, or that of PEFT and diffusers (default: %(default)s)",
    )
    add = parser.add_argument_group("new word").add_argument
    add(
        "--train-word",
        metavar="WORD",
        help='train the vectors of a new word, such as "<cat-toy>" (textual inversion). '
        + defaults_help(WORD, WORD_OF_CHECKPOINT),
    )
    add("--vectors", type=int, default=1, metavar="N", help="number of vectors of the word (default: %(default)s)")
    add("--init-word", metavar="WORD", help="known word or words to start from (default: those in the new word itself)")
    add("--word-style", action="store_true", help="the word is a style, not a thing: for images without captions")
    add("--word-lr", type=float, metavar="LR", help="learning rate of the vectors with --lora (default: --lr)")
    add(
        "--word-format",
        choices=("safetensors", "pt"),
        default="safetensors",
        help="format of the word's file (default: %(default)s)",
    )
    add("--keep", action="store_true", help="keep the file of each save (NAME-STEP), of a LoRA or word")


def wanted(args: argparse.Namespace) -> bool:
    """Whether the options ask for a LoRA or a word."""
    return args.lora is not None or args.train_word is not None


def recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """The defaults for the embedded model and for a checkpoint."""
    return (LORA, LORA_OF_CHECKPOINT) if args.lora is not None else (WORD, WORD_OF_CHECKPOINT)


def check_unused(args: argparse.Namespace) -> None:
    """Raise ValueError for options without the one that they go with."""
    for needed, options in (("lora", OF_LORA), ("train_word", OF_WORD)):
        if getattr(args, needed) is None:
            for name, usual in options.items():
                if getattr(args, name) != usual:
                    raise ValueError(f"{_option(name)} goes with {_option(needed)}")
    if args.keep and not wanted(args):
        raise ValueError("--keep goes with --lora or --train-word")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    which = "--lora" if args.lora is not None else "--train-word"
    for name, usual in OTHERS.items():
        if getattr(args, name) != usual:
            raise ValueError(f"{_option(name)} does not go with {which}, which leaves the model as it is")
    if args.data is None and not args.estimate_memory:
        raise ValueError(f"{which} needs --data: a folder with images, such as data/hut, or world for drawn scenes")
    if args.train_text and args.lora is None:
        raise ValueError("--train-text does not go with --train-word alone, which trains the vectors of a word only")
    if (args.conv_rank or args.conv_alpha) and args.lora_layers != "all":
        raise ValueError(
            "--conv-rank and --conv-alpha go with --lora-layers all: other layers have no 3x3 convolutions"
        )
    if args.word_lr is not None and args.lora is None:
        raise ValueError("--word-lr goes with --lora: of a word alone the learning rate is --lr")
    if args.word_lr is not None and not 0 < args.word_lr < math.inf:
        raise ValueError(f"--word-lr must be above 0, got {args.word_lr}")
    if args.optimizer == "muon":
        raise ValueError(f"--optimizer muon does not go with {which}: its matrices are too thin for it")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Adapters:
    """The LoRAs and the word that the options ask for, and their files.

    modules   for `Objective`: "lora" with a LoRA for each network, and "word"
    """

    def __init__(self, args: argparse.Namespace, model: StableDiffusion, recipe: Recipe) -> None:
        """The word is in the prompts of the model from now on; nothing is attached yet."""
        self.args, self.model, self.config, self.recipe = args, model, model.config, recipe
        self.began, self.facts = time.time(), dict[str, object]()
        self.is_random = args.lora is not None and args.lora_dropout > 0
        self.trains_text: bool = args.train_text or args.train_word is not None
        self.caption: str | None = None if args.train_word is None else ""
        self.networks: dict[str, nn.Module] = {"unet": model.unet}
        if args.train_text:
            self.networks |= text_encoders(model)
        self.loras: dict[str, TrainableLora] = {}
        if args.lora is not None:
            params = LoraParams(
                args.lora, args.lora_alpha, args.conv_rank, args.conv_alpha, args.lora_dropout, args.dora
            )
            for number, (name, network) in enumerate(self.networks.items()):
                layers = lora_layers(network, args.lora_layers)
                self.loras[name] = TrainableLora(network, layers, params, recipe.seed + number)
        self.word = None
        if args.train_word is not None:
            self.word = TrainableWord(model, args.train_word, args.vectors, init_words(args))
        self.modules = nn.ModuleDict()
        if self.loras:
            self.modules["lora"] = nn.ModuleDict(self.loras)
        if self.word is not None:
            self.modules["word"] = self.word

    def told(self, source: Source) -> Source:
        """The source, with the word in every caption of what is to be learned."""
        if self.word is None:
            return source
        templates = STYLE if self.args.word_style else OBJECT
        if isinstance(source, Joined):
            return Joined(WithWord(source.first, self.word.word, templates), source.second)
        return WithWord(source, self.word.word, templates)

    def set_trainable(self) -> None:
        """Freeze the model."""
        for name in ("unet", *self.config.text_names):
            getattr(self.model, name).requires_grad_(False)

    def attach(self) -> None:
        """Let the networks of the model compute with what is trained."""
        for name, lora in self.loras.items():
            lora.attach(self.networks[name])
        if self.word is not None:
            self.word.attach()

    def prepare(self, data: TrainingData) -> None:
        """Keep what the files will say of the training; name layers that are smaller than the rank."""
        if limited := self.limited():
            warnings.warn(limited, stacklevel=1)
        self.facts = facts(self.args, self.recipe, data)
        if not self.args.resume:  # a resumed run does not know when it started
            self.facts["training_started_at"] = self.began

    def rates(self, lr: float) -> dict[str, float]:
        """The learning rates of parts that have their own, relative to `lr`, by the beginning of parameters' names."""
        found: dict[str, float] = {}
        if self.args.text_lr is not None:
            found |= {f"lora.{name}.": self.args.text_lr / lr for name in self.loras if name != "unet"}
        if self.args.word_lr is not None and self.word is not None:
            found["word."] = self.args.word_lr / lr
        return found

    def describe(self) -> str:
        """What is trained, for the line about the run."""
        parts = []
        if self.loras:
            params = next(iter(self.loras.values())).params
            names = " and ".join("U-Net" if name == "unet" else name.replace("_", " ") for name in self.loras)
            parts.append(f"{'DoRA' if params.dora else 'LoRA'} of rank {params.rank} ({names})")
        if self.word is not None:
            n = len(self.word.vectors[0])
            parts.append(f"the word {self.word.word} ({n} vector{'s' * (n > 1)})")
        return f"{' and '.join(parts)} for {self.config.name}"

    def limited(self) -> str:
        """A line on layers that are smaller than the rank; "" if there are none."""
        count = sum(lora.limited for lora in self.loras.values())
        of = sum(len(lora.names) for lora in self.loras.values())
        return f"--lora {self.args.lora}: {count} of {of} layers are smaller, and have the largest rank they can" * (
            count > 0
        )

    @contextlib.contextmanager
    def sampling(self, weights: Mapping[str, Tensor]) -> Iterator[StableDiffusion]:
        """The model, in which what is trained has these weights, without dropout."""
        with self._weighted(weights):
            yield self.model

    @contextlib.contextmanager
    def _weighted(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: value.detach().clone() for name, value in self.modules.state_dict().items()}
        self.modules.eval()
        self.modules.load_state_dict({name: weights[name] for name in own})
        try:
            yield
        finally:
            self.modules.load_state_dict(own)
            self.modules.train()

    @property
    def stem(self) -> str:
        """The name of the file, without its ending."""
        if self.loras:
            return "lora"
        assert self.word is not None
        allowed = "".join(letter for letter in self.word.word if letter not in FORBIDDEN)
        name = allowed[:LONGEST].strip(" .") or "word"
        return f"{name}-word" if name.lower() in TAKEN else name

    def paths(self) -> list[Path]:
        """The files that `write` writes: a LoRA in the names of diffusers cannot have a word in it."""
        out: Path = self.args.out
        ending = "safetensors" if self.loras else self.args.word_format
        paths = [out / f"{self.stem}.{ending}"]
        if self.loras and self.word is not None and self.args.lora_names != "kohya":
            paths.append(out / f"word.{self.args.word_format}")
        return paths

    def write(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the files. Raises ArithmeticError if weights are not finite."""
        with self._weighted(weights):
            if not all(bool(p.isfinite().all()) for p in self.modules.parameters()):
                raise ArithmeticError(f"{self.paths()[0]}: not written, because weights are not finite: lower --lr")
            for path in self.paths():
                stems = [path.stem, f"{path.stem}-{step:06d}"] if self.args.keep else [path.stem]
                for stem in stems:
                    target = path.with_name(f"{stem}{path.suffix}")
                    if path.stem == "lora":
                        self._write_lora(target, step)
                    else:
                        self._write_word(target, step)

    def written(self) -> str:
        """What was written and how to use it, in a line."""
        lines = []
        for path in self.paths():
            option = "--lora" if path.stem == "lora" else "--embedding"
            lines.append(f"{path}: for {option} of every program")
        return "\n".join(lines)

    def _write_lora(self, path: Path, step: int) -> None:
        naming = self.args.lora_names
        tensors = lora_tensors(self.loras, self.config, find_dtype(self.args.export_dtype), naming)
        if self.word is not None and naming == "kohya":
            tensors |= bundled_tensors({self.word.word: list(self.word.vectors)}, self.config)
        title = f"{self.args.out.name} LoRA"
        known = self.facts | {"steps": step, "training_finished_at": time.time()}
        metadata = lora_metadata(self.loras, self.config, title, known if naming == "kohya" else None, naming)
        save_tensors(tensors, path, metadata | (lora_hash(tensors) if naming == "kohya" else {}))

    def _write_word(self, path: Path, step: int) -> None:
        assert self.word is not None
        vectors = list(self.word.vectors)
        if path.suffix == ".safetensors":
            tensors = embedding_tensors(self.word.word, vectors, self.config)
            save_tensors(tensors, path, {"format": "pt", "name": self.word.word, "step": str(step)})
            return
        save_pickle(embedding_pickle(self.word.word, vectors, self.config, step), path)


def facts(args: argparse.Namespace, recipe: Recipe, data: TrainingData) -> dict[str, object]:
    """What is known of a training, by kohya's names for it: see `lora_metadata`."""
    learned = [i for i, regular in enumerate(data.regular.tolist()) if not regular]
    tags = Counter(tag.strip() for i in learned for text in data.captions(i) for tag in text.split(","))
    return {
        "output_name": "lora",
        "sd_model_name": Path(args.ckpt or EMBEDDED).name,
        "learning_rate": recipe.lr,
        "unet_lr": recipe.lr,
        "text_encoder_lr": (args.text_lr or recipe.lr) if args.train_text else None,
        "lr_scheduler": recipe.schedule,
        "lr_warmup_steps": min(recipe.warmup, recipe.steps // 10),
        "optimizer": recipe.optimizer,
        "max_train_steps": recipe.steps,
        "batch_size_per_device": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_checkpointing": args.checkpointing,
        "max_grad_norm": recipe.clip,
        "num_train_images": int(data.repeats[learned].sum()),
        "num_reg_images": int(data.regular.sum()),
        "prior_loss_weight": args.prior_weight,
        "caption_dropout_rate": args.drop,
        "shuffle_caption": args.shuffle_tags,
        "keep_tokens": args.keep_tags or 0,
        "flip_aug": args.flip,
        "enable_bucket": not args.square,
        "min_snr_gamma": args.min_snr_gamma if args.weighting == "min-snr" else None,
        "debiased_estimation": True if args.weighting == "debiased" else None,
        "noise_offset": args.noise_offset,
        "multires_noise_discount": args.pyramid_noise,
        "loss_type": "huber" if args.huber else "l2",
        "huber_c": args.huber,
        "seed": recipe.seed,
        # what other programs show as the words to use: how often each part of the captions, between commas, occurs
        "tag_frequency": {Path(args.data or "world").name: dict(tags.most_common(MOST_TAGS))},
    }


def init_words(args: argparse.Namespace) -> str:
    """The words that a new word starts from: by default what is readable of itself, "cat toy" of "<cat-toy>"."""
    if args.init_word:
        return str(args.init_word)
    found = " ".join("".join(letter if letter.isalpha() else " " for letter in args.train_word).split())
    if not found and args.train_word.strip():
        raise ValueError(f"--train-word {args.train_word} has no letters: give a word to start from (--init-word)")
    return found


def find_model(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """The model of --ckpt or the embedded one, in the precision of the computation; its VAE in float32."""
    precision = find_precision(args.precision, device)
    model = load_plain(args, device, precision or torch.float32)
    if model.config.unet.guidance is not None:
        name = model.config.name
        raise ValueError(f"{name} was distilled and is told its guidance: train adapters on its ordinary model")
    if model.is_inpainting:
        name = model.config.name
        raise ValueError(f"{name} is an inpainting model: train adapters on the ordinary model; they also fit this one")
    if args.vae or precision is not None:
        model = with_vae(model, args.vae or args.ckpt or resource(EMBEDDED))
    return model

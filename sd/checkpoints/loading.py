"""From opened files to networks: which file each network comes from, and its weights, strictly.

>>> from sd.models.build import build
>>> from sd.resources import resource
>>> with ModelFiles(resource("weights/pocket.safetensors"), LoadOptions()) as files:
...     vae = build(files.config)["vae"]  # without memory
...     files.read("vae", vae, torch.device("cpu"), torch.float32, lambda count: None, own=False)
>>> vae.encoder.conv_in.weight.shape
torch.Size([64, 3, 3, 3])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import END, Config, TextConfig, TinyVAEConfig, VAEConfig
from ..files import user_path
from ..messages import printable
from ..runtime.optimize import optimize
from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, naming, shapes
from .convert import FLAGS, StateDict, convert, describe_weights
from .detect import CONFIG_KEY, Identity, damaged_position_ids, identify, with_autoencoder, with_form, with_vocabulary
from .diffusers_config import check_text_encoder, vae_from_diffusers
from .few_step_files import notes_on_scheduler
from .finite import FiniteCheck
from .formats.mmap import fresh
from .layouts import SECOND, alone_as, find_layouts, token_width
from .matching import NAMES, TEXTS, match_layouts, shape_text
from .other_models import refuse_alone, refuse_control, refuse_others, refuse_part
from .prediction import predicting, probe
from .supported_settings import ignored_settings
from .tiny_vae import describe_tiny, notes_on_tiny
from .tokenizer_files import describe_words
from .vae_files import notes_on_vae, overflows, refuse_other_vae
from .xl_models import describe_empty, usual_vae

PATHS = ("vae", "text_encoder", "text_encoder_2", "cache")  # options that are paths
Report = Callable[[int], object]  # called with the number of elements of each weight that was read


def with_part(config: Config, network: str, tensors: Checkpoint) -> Config:
    """The config of a model whose VAE or text encoder comes from another file.

    Raises CheckpointError for a file without that network, or with one that does not fit the model.
    """
    found = shapes(tensors)
    refuse_control(found)
    own_layouts = find_layouts(tensors)
    layouts = alone_as(network, own_layouts, found, config)
    if network not in layouts:
        refuse_others(found)
        if not layouts:
            refuse_alone(found)
        raise CheckpointError(f"the file has no {NAMES[network]}: give another one with {FLAGS[network]}")
    refuse_part(network, found)
    written = tensors.metadata.get(CONFIG_KEY)
    if network in config.text_names:
        number = config.text_names.index(network)
        text = config.text[number]
        _check_width(token_width(layouts[network], found, config), network, config)
        # its name in that file, where a second text encoder alone is called the first
        there = next(name for name, layout in own_layouts.items() if layout.prefix == layouts[network].prefix)
        if (folder := tensors.configs.get(there)) is not None:
            check_text_encoder(folder, text)
        words_there = "words_2" if there == SECOND else "words"
        words, pad = tuple(tensors.configs.get(words_there, {}).get("words", ())), min(text.pad, END)
        if written is not None:
            others = Config.from_json(written).text
            own = others[min(int(there == SECOND), len(others) - 1)]
            words, pad = own.words, own.pad if own.pad > END else pad
        text = replace(text, vocab=max([TextConfig().vocab, pad + 1]), words=words, pad=pad)
        plain = replace(config, text=(*config.text[:number], text, *config.text[number + 1 :]))
        layouts = alone_as(network, match_layouts(found, plain), found, plain)
        layouts = {name: layout for name, layout in layouts.items() if name == network}
        return with_form(with_vocabulary(plain, found, layouts), found, layouts)
    refuse_other_vae(tensors, config)
    if written is not None:
        config = replace(config, vae=Config.from_json(written).vae)
    elif (folder := tensors.configs.get(network)) is not None:
        vae = vae_from_diffusers(folder)
        if isinstance(vae, VAEConfig) and "scaling_factor" not in folder:
            own_scale = config.vae.scale if isinstance(config.vae, VAEConfig) else usual_vae(config).scale
            vae = replace(vae, scale=own_scale)
        if vae.latent_channels != config.unet.out_channels:
            raise CheckpointError(
                f"an autoencoder of another family ({vae.latent_channels} latent channels; this model has "
                f"{config.unet.out_channels}): give another one with --vae"
            )
        config = replace(config, vae=vae)
    return with_autoencoder(config, found, match_layouts(found, config))


def _check_width(width: int, network: str, config: Config) -> None:
    """Raise CheckpointError for a text encoder of another width than the model's; 0 is unknown."""
    expected = config.text[config.text_names.index(network)].width
    if width in (0, expected):
        return
    there, here = (f"{TEXTS[size]} ({size} wide)" if size in TEXTS else f"{size} wide" for size in (width, expected))
    fits = [name for name, text in zip(config.text_names, config.text, strict=True) if text.width == width]
    do = f"give it with {FLAGS[fits[0]]}" if fits else f"give another one with {FLAGS[network]}"
    raise CheckpointError(
        f"a text encoder that does not fit: it is {there}, the {NAMES[network]} of {config.name} {here}: {do}"
    )


def like(known: Config, config: Config) -> Config:
    """The config with the name, native size and schedule of `known`."""
    return replace(config, name=known.name, size=known.size, schedule=known.schedule)


def probed(found: Identity, unet: nn.Module) -> Identity:
    """The identity with the prediction that the U-Net itself shows when it is run once."""
    answer = probe(unet, found.config, next(unet.parameters()))
    if answer is None:
        return replace(found, reason=f"{found.reason}, and when run once, it gave NaN; set it with --prediction")
    config = predicting(found.config, answer)
    reason = f"{found.reason}; run once, its U-Net behaves like such a model (--prediction overrides)"
    return replace(found, config=config, decided=True, reason=reason)


def describe(
    tensors: Checkpoint, found: Identity, weights: str, config: Config, vae: Checkpoint | None = None
) -> list[str]:
    """What was found out about a file and chosen, as lines of text.

    config   includes parts from other files
    vae      the file that the VAE comes from; by default this one
    """
    lines = [f"predicts {found.config.schedule.prediction}: {found.reason}"] if found.reason else []
    if taken := describe_weights(tensors, weights):
        lines.append(taken)
    lines += [found.few_step] if found.few_step else []
    if damaged := damaged_position_ids(tensors):
        lines.append(
            f"{damaged} is damaged, as happens in merging; it is not used here, but other programs may misread prompts"
        )
    lines += [*ignored_settings(tensors.configs), *notes_on_scheduler(tensors.configs)]
    scale, usual = config.vae.scale, found.config.vae.scale
    if isinstance(config.vae, TinyVAEConfig):
        lines.append(f"VAE: {describe_tiny(config.vae)}")
        lines += notes_on_tiny(found.config.vae, [file.path for file in (vae or tensors).files], bool(config.sizes))
    elif scale != usual:
        lines.append(f"the VAE that is given has the scale {scale:g}, the model's own {usual:g}: it may not fit")
    if vae is not None and vae is not tensors:
        lines += notes_on_vae(vae, config)
    if config.sizes:
        lines.append(describe_empty(config, tensors.configs))
    lines += dict.fromkeys(line for text in config.text for line in describe_words(text))  # of both encoders, once
    return list(map(printable, lines))


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda numbers: None,
    own: bool = False,
) -> nn.Module:
    """Fill a network on the meta device with weights, which are read and converted one by one: none is held twice.

    Convolution kernels get the channels-last layout, in which convolutions run fastest on CPU and GPU and a
    transformer's tokens are a view of the feature map. `progress` is called with the number of elements of each weight.
    A weight that needs no conversion is not copied, unless memory of the network's `own` is asked for.

    Raises CheckpointError, before the network is changed, for weights of other shapes or that are not finite.
    """
    shapes = {key: meta.shape for key, meta in module.state_dict().items()}
    origin = state.origin if isinstance(state, StateDict) else str
    check = FiniteCheck(dtype)

    def ready(key: str) -> Tensor:
        tensor = state[key]
        if tensor.shape != shapes[key]:
            raise CheckpointError(
                f"{origin(key)} is {shape_text(tuple(tensor.shape))}, expected {shape_text(tuple(shapes[key]))}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{origin(key)} holds whole numbers ({tensor.dtype}): a quantised file, which is not supported"
            )
        check.look(origin(key), tensor)
        if device.type == "cpu":
            return as_used(tensor, dtype, own)
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return tensor.to(dtype).contiguous(memory_format=layout)

    # Two threads, because reading and touching fresh memory leave a core idle (more gain nothing). The largest weights
    # first, so that the memory they were read into is reused. Only this thread talks to the device.
    weights = {}
    order = sorted(shapes, key=lambda key: -shapes[key].numel())
    with ThreadPoolExecutor(2) as pool:
        for key, weight in zip(order, pool.map(ready, order), strict=True):
            weights[key] = weight.to(device)
            progress(weight.numel())
    check.finish()
    module.load_state_dict(weights, strict=True, assign=True)
    return optimize(module.requires_grad_(False).eval(), device)


def as_used(tensor: Tensor, dtype: torch.dtype, own: bool = False) -> Tensor:
    """A weight on the CPU in the precision and layout that `load_weights` gives it there."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return _in_pages(tensor, dtype, layout, own)


def _in_pages(tensor: Tensor, dtype: torch.dtype, layout: torch.memory_format, own: bool) -> Tensor:
    """The tensor itself if it needs no conversion and may be shared, or a copy in memory pages of its own."""
    if not own and tensor.dtype == dtype and tensor.is_contiguous(memory_format=layout):
        # Kernels of 1x1 are contiguous in both layouts. PyTorch goes by the strides, so they have to be the usual ones.
        return tensor.as_strided(tensor.shape, _channels_last(tensor.shape)) if tensor.dim() == 4 else tensor
    copy = fresh(tensor.numel(), dtype)
    if layout == torch.channels_last:
        out, width, *kernel = tensor.shape
        copy = copy.view(out, *kernel, width).permute(0, 3, 1, 2)
    return copy.view(tensor.shape).copy_(tensor)


def _channels_last(shape: torch.Size) -> tuple[int, ...]:
    _, C, H, W = shape
    return C * H * W, 1, W * C, C


@dataclass(frozen=True)
class LoadOptions:
    """How to read a checkpoint, and what to take from other files; whatever is None is detected."""

    config: Config | None = None  # the model
    weights: str = "auto"  # "auto", "raw" or "ema": which of a training checkpoint's two U-Nets
    prediction: str | None = None  # "eps" or "v": what the U-Net predicts
    vae: str | os.PathLike[str] | None = None  # another file or folder to take the VAE from, alone or whole
    text_encoder: str | os.PathLike[str] | None = None  # the same for the text encoder
    text_encoder_2: str | os.PathLike[str] | None = None  # the same for SDXL's second text encoder
    variant: str | None = None  # of a diffusers folder: "fp16", ..., which files to read
    cache: str | os.PathLike[str] | None = None  # folder for converted and packed weights: weights_cache.py
    # whether text encoders are on a GPU only while prompts are encoded; None: if it is too small for all networks
    offload_text_encoders: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config | None):
            raise ValueError(f"config must be a Config, such as sd.MODELS['sd1'], got {self.config!r:.60}")
        if not isinstance(self.offload_text_encoders, bool | None):
            raise ValueError(
                f"offload_text_encoders must be True, False or None, got {self.offload_text_encoders!r:.60}"
            )
        if not isinstance(self.variant, str | None):
            raise ValueError(f"variant must be a string such as 'fp16', got {self.variant!r:.60}")

    @classmethod
    def of(cls, options: Mapping[str, Any], beside: Sequence[str] = ()) -> LoadOptions:
        """Options by their names, with "~" expanded in paths. TypeError for an unknown one; `beside` are others."""
        if unknown := sorted(options.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join((*beside, *cls.__dataclass_fields__))
            raise TypeError(f"load has no option {unknown[0]!r}; it has {known}")
        paths = {name: user_path(options[name]) for name in PATHS if options.get(name) is not None}
        return cls(**{**options, **paths})

    @property
    def others(self) -> dict[str, str | os.PathLike[str]]:
        """Networks that come from other files: name -> path."""
        given = {"vae": self.vae, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: path for name, path in given.items() if path is not None}


class ModelFiles:
    """The open files of one model: its config, and the weights of each network. Close it, or use it in a `with`.

    states   network -> its weights, each read when it is accessed
    files    the model's own file first, then those of the parts in `LoadOptions.others`
    """

    def __init__(self, path: str | os.PathLike[str], options: LoadOptions) -> None:
        """Open the files and match every weight. Raises CheckpointError if they are not a model."""
        self.path, self.options, self._stack = path, options, ExitStack()
        with ExitStack() as files:
            self._main = files.enter_context(load_checkpoint(path, options.variant, mapped=True))
            parts = {
                name: files.enter_context(load_checkpoint(other, options.variant, mapped=True))
                for name, other in options.others.items()
            }
            with naming(path):
                self._found = identify(self._main, options.config, options.prediction, parts)
                networks = self._found.config.networks
                if extra := sorted(parts.keys() - set(networks)):
                    name, what = self._found.config.name, NAMES[extra[0]]
                    raise CheckpointError(f"{name} has no {what}: leave out {FLAGS[extra[0]]}")
                missing = [name for name in networks if name not in parts]
                self.states = convert(self._main, self._found.config, options.weights, missing)
            self.config = self._found.config
            for name, file in parts.items():
                with naming(options.others[name]):
                    self.config = with_part(self.config, name, file)
                    self.states |= convert(file, self.config, parts=[name])
            self._parts, self.files = parts, [self._main, *parts.values()]
            self._stack = files.pop_all()

    def read(
        self, name: str, network: nn.Module, device: torch.device, dtype: torch.dtype, report: Report, own: bool
    ) -> None:
        """Fill a network on the meta device with its weights (see `load_weights`)."""
        for file in self.files:
            file.check_unchanged()
        with naming(self.options.others.get(name, self.path)):
            load_weights(network, self.states[name], device, dtype, report, own=own)

    def check_finite(self, name: str, dtype: torch.dtype) -> None:
        """Read a network's weights once, to see that they are finite in this precision. Raises CheckpointError."""
        check, state = FiniteCheck(dtype), self.states[name]
        for key in state:
            check.look(state.origin(key), state[key])
        with naming(self.options.others.get(name, self.path)):
            check.finish()

    @property
    def overflows(self) -> str:
        """How it is known that the VAE overflows in float16; empty if it is not."""
        return overflows(self._parts.get("vae", self._main), self.config)

    @property
    def decided(self) -> bool:
        """Whether it is known what the U-Net predicts."""
        return self._found.decided

    def probe(self, unet: nn.Module) -> None:
        """Run the U-Net once to find out what it predicts."""
        self._found = probed(self._found, unet)
        self.config = like(self._found.config, self.config)

    def about(self) -> tuple[str, ...]:
        """What was found out and chosen, as lines of text."""
        notes = {path: file.notes for path, file in zip(self.options.others.values(), self.files[1:], strict=True)}
        return (
            *self._main.notes,
            *(printable(f"{path}: {note}") for path, given in notes.items() for note in given),
            *describe(self._main, self._found, self.options.weights, self.config, self._parts.get("vae")),
            *(printable(note) for state in self.states.values() for note in state.notes),
        )

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

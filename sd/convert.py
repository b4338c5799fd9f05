"""Which model a file holds, its weights under our names and back, and strict, counted loading.

`keys.py` says where each weight lies; here it is looked up. Everything that a network needs must be there in the
right shape, and everything that is there must be used or be on the short list of what is known to be superfluous:
anything else is an error that names it. A 1x1 convolution and a linear layer hold the same numbers, so shapes are
compared without trailing ones. A file of ours carries its config in the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checkpoint import CheckpointError, shapes
from .config import MODELS, SD1, SD1_INPAINT, SD2_INPAINT, Config
from .keys import CLIP, CLIP_OLD, EMA, OPENCLIP, UNET, Source, ema_key, original_sources, own_sources
from .text_encoder import TextEncoder
from .unet import UNet
from .vae import VAE

TOKENS = "token.weight"  # the text encoder's table of tokens
CONFIG_KEY = "sd.config"  # where the metadata of a file of ours holds the config
WEIGHTS = ("auto", "raw", "ema")  # which of the two sets of U-Net weights a training checkpoint may hold

# What a checkpoint may hold besides the weights of the three networks. Anything else is an error.
IGNORED_PREFIXES = (EMA, "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.", "embedding_manager.")
IGNORED_SUFFIXES = (".position_ids", ".logit_scale", ".text_projection", ".attn_mask")
IGNORED_KEYS = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "lvlb_weights", "scale_factor"),
    }
)


class _SkipInit(TorchFunctionMode):
    """Leaves out the initialisers of `torch.nn.init`: the weights come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(config: Config) -> dict[str, nn.Module]:
    """The three networks of a config on the meta device: shapes without memory, nothing initialised."""
    with torch.device("meta"), _SkipInit():
        return {"text_encoder": TextEncoder(config.text), "vae": VAE(config.vae), "unet": UNet(config.unet)}


def detect(tensors: Mapping[str, Tensor]) -> Config:
    """Which model a checkpoint holds, from its metadata or the names and shapes of its weights.

    Raises CheckpointError for models that this project does not run, by name, and for SD 2.x U-Nets with 4 channels:
    base (which predicts eps) and 768-v have the same shapes, so it must be said which one it is.
    """
    written = getattr(tensors, "metadata", {}).get(CONFIG_KEY)
    if written is not None:
        try:
            return Config.from_json(written)
        except ValueError as error:
            raise CheckpointError(f"the file's own model config is damaged: {error}") from None
    found = shapes(tensors)
    if any(key.startswith("conditioner.embedders.1.") for key in found):
        raise CheckpointError("this is an SDXL checkpoint, which is not supported: Stable Diffusion 1.x and 2.x are")
    if "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight" in found or any(
        "double_blocks.0." in key for key in found
    ):
        raise CheckpointError(
            "this is an SD3 or Flux checkpoint, which is not supported: Stable Diffusion 1.x and 2.x are"
        )
    if any("lora_" in key or ".lora" in key for key in found):
        raise CheckpointError("this is a LoRA file: an addition to a checkpoint, not a checkpoint")
    first = found.get(UNET + "input_blocks.0.0.weight")
    widths = {shape[1] for key, shape in found.items() if key.endswith(".attn2.to_k.weight") and len(shape) == 2}
    if first is None and any(key.startswith(("down_blocks.", "unet.down_blocks.")) for key in found):
        raise CheckpointError(
            "a U-Net in the layout of diffusers, which is not supported yet: give the single-file checkpoint"
        )
    if first is None or len(first) != 4 or len(widths) != 1:
        some = ", ".join(list(found)[:3])
        raise CheckpointError(
            f"no Stable Diffusion U-Net in the original layout ({UNET}...) among its {len(found)} tensors ({some}, ...)"
        )
    channels, context = first[1], widths.pop()
    others = {5: "a depth-to-image", 7: "an upscaling", 8: "an instruct-pix2pix"}
    if channels in others:
        raise CheckpointError(f"this is {others[channels]} model ({channels} input channels), which is not supported")
    if context == 2048:
        raise CheckpointError("this is an SDXL checkpoint, which is not supported: Stable Diffusion 1.x and 2.x are")
    if (channels, context) == (4, 1024):
        raise CheckpointError(
            "an SD 2.x checkpoint: base and 768-v cannot be told apart by their keys, so say which it is "
            "(config=SD2 or SD2_V, --model sd2 or sd2-v)"
        )
    known = {(4, 768): SD1, (9, 768): SD1_INPAINT, (9, 1024): SD2_INPAINT}
    if (channels, context) not in known or first[0] != SD1.unet.channels[0]:
        raise CheckpointError(
            f"a U-Net of an unknown kind ({first[0]} wide, {channels} input channels, context {context}): "
            f"if it is one of {', '.join(MODELS)}, say so (--model)"
        )
    return known[channels, context]


class StateDict(Mapping[str, Tensor]):
    """One network's weights under our names, read from `tensors` one at a time, when asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._tensors, self._sources, self._shapes = tensors, sources, shapes

    def __getitem__(self, key: str) -> Tensor:
        source = self._sources[key]
        tensor = self._tensors[source.key]
        if source.third is not None:
            tensor = tensor.chunk(3)[source.third].clone()  # a view would keep all three in memory
        elif key == TOKENS:
            tensor = tensor[: self._shapes[key][0]]
        return tensor.reshape(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def convert(tensors: Mapping[str, Tensor], config: Config | None = None, weights: str = "auto") -> dict[str, StateDict]:
    """Checkpoint -> {"text_encoder", "vae", "unet"}: state dicts under our names, complete and of the right shapes.

    tensors   a `Checkpoint` (nothing is read until a weight is asked for) or any mapping of names to tensors, in the
              original layout or ours
    config    what the file holds; found out by `detect` if not given
    weights   a training checkpoint may hold the U-Net twice: as trained ("raw") and as moving average ("ema").
              "auto" takes raw, as the original's inference and other tools do, and ema where there is no raw U-Net

    Raises CheckpointError that names what is missing, superfluous or misshapen, and how many.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}, expected one of {', '.join(WEIGHTS)}")
    config = config or detect(tensors)
    found = shapes(tensors)
    expected = {network: shapes(module.state_dict()) for network, module in build(config).items()}
    if "unet.conv_in.weight" in found:
        sources = own_sources(expected)
    else:
        old = CLIP_OLD + "embeddings.token_embedding.weight" in found
        sources = original_sources(config, expected, CLIP_OLD if old else CLIP)
    used = {source.key for table in sources.values() for source in table.values()}
    ema = {key: Source(ema_key(source.key)) for key, source in sources["unet"].items()}
    has_ema = all(source.key in found for source in ema.values())
    if weights == "ema" and not has_ema:
        raise CheckpointError("no moving average (EMA) of the U-Net in this file: use weights auto or raw (--weights)")
    if weights == "ema" or (weights == "auto" and has_ema and sources["unet"]["conv_out.weight"].key not in found):
        sources["unet"] = ema
    _check_complete(found, sources, expected)
    extra = [key for key in found if key not in used and not _ignored(key, config)]
    if extra:
        raise CheckpointError(f"{_count(extra)} in the file that {config.name} does not have: {_listed(extra)}")
    return {network: StateDict(tensors, sources[network], expected[network]) for network in sources}


def _check_complete(
    found: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Mapping[str, Source]],
    expected: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> None:
    missing, misshapen = [], []
    for network, table in sources.items():
        gone = [source.key for source in table.values() if source.key not in found]
        if len(gone) == len(table):
            raise CheckpointError(
                f"the file has no {network.replace('_', ' ')}: none of its {len(gone)} weights is there"
            )
        missing += gone
        for key, source in table.items():
            want, have = expected[network][key], found.get(source.key)
            if source.third is not None:
                want = (3 * want[0], *want[1:])
            if key == TOKENS and have is not None and len(have) == 2 and have[0] > want[0]:
                have = (want[0], have[1])  # fine-tuning added words behind CLIP's own, which nothing here types
            if have is not None and _squeezed(have) != _squeezed(want):
                misshapen.append(f"{source.key} is {_shape(have)}, expected {_shape(want)}")
    if missing:
        total = sum(map(len, sources.values()))
        raise CheckpointError(f"{_count(missing)} of {total} missing from the file: {_listed(missing)}")
    if misshapen:
        raise CheckpointError(f"{_count(misshapen)} of the wrong shape: {_listed(misshapen, '; ')}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _ignored(key: str, config: Config) -> bool:
    if key in IGNORED_KEYS or key.startswith(IGNORED_PREFIXES) or key.endswith(IGNORED_SUFFIXES):
        return True
    # layers of the text encoder behind the last one that is run
    for prefix in (CLIP + "encoder.layers.", CLIP_OLD + "encoder.layers.", OPENCLIP + "transformer.resblocks."):
        number = key.removeprefix(prefix).partition(".")[0]
        if key.startswith(prefix) and number.isdecimal() and int(number) >= config.text.layers:
            return True
    return False


def _count(keys: list[str]) -> str:
    return f"{len(keys)} weight{'s' if len(keys) > 1 else ''}"


def _listed(keys: list[str], separator: str = ", ") -> str:
    return separator.join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def to_original(states: Mapping[str, Mapping[str, Tensor]], config: Config) -> dict[str, Tensor]:
    """The way back: per-network state dicts under our names -> one state dict in the original layout.

    Weights are bit-identical; Stable Diffusion 1.x gets the `position_ids` that old tools insist on.
    """
    out: dict[str, Tensor] = {}
    for network, table in original_sources(config, states).items():
        fused: dict[str, list[Tensor]] = {}
        for key, source in table.items():
            tensor = states[network][key]
            if source.third is None:
                out[source.key] = tensor.reshape(tensor.shape + (1,) * source.ones)
            else:
                fused.setdefault(source.key, []).append(tensor)  # q, k, v in this order in the network
        out |= {key: torch.cat(parts) for key, parts in fused.items()}
    if config.text.activation == "quick_gelu":
        out[CLIP + "embeddings.position_ids"] = torch.arange(config.text.length).unsqueeze(0)
    return out


def to_own(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Per-network state dicts -> one flat state dict in our layout."""
    return {f"{network}.{key}": tensor for network, state in states.items() for key, tensor in state.items()}


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda numbers: None,
) -> nn.Module:
    """Give a network on the meta device its weights; each is read, converted and dropped, so nothing is held twice.

    Convolution kernels are laid out channels-last, the layout in which convolutions run fastest on CPU and GPU and in
    which a transformer's tokens are a view of the feature map. `progress` is told how many numbers each weight has.
    A weight that already is as wanted is taken as it is, not copied.
    """
    shapes = {key: meta.shape for key, meta in module.state_dict().items()}

    def ready(key: str) -> Tensor:
        tensor = state[key]
        if tensor.shape != shapes[key]:
            raise CheckpointError(f"{key} is {_shape(tuple(tensor.shape))}, expected {_shape(tuple(shapes[key]))}")
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{key} holds whole numbers ({tensor.dtype}): a quantised file, which is not supported"
            )
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        weight = tensor.to(dtype).contiguous(memory_format=layout)
        if dtype == torch.float16 and tensor.dtype != torch.float16 and not weight.isfinite().all():
            raise CheckpointError(f"{key} has numbers beyond float16: use bfloat16 or float32 (--dtype)")
        return weight

    # Two threads, as reading and touching fresh memory leave a core waiting (more gain nothing); the largest first, so
    # that the memory a weight was read into serves for all that follow. Only this thread talks to the device.
    weights = {}
    order = sorted(shapes, key=lambda key: -shapes[key].numel())
    with ThreadPoolExecutor(2) as pool:
        for key, weight in zip(order, pool.map(ready, order), strict=True):
            weights[key] = weight.to(device)
            progress(weight.numel())
    module.load_state_dict(weights, strict=True, assign=True)
    return module.requires_grad_(False).eval()

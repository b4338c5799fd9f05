"""What a U-Net predicts, noise (eps) or velocity (v), and its noise schedule.

Stable Diffusion 2.x base and 768-v have weights of the same names and shapes, and confusing them gives brown noise. The
sources of this information, in order of precedence; the result comes with the reason:

    the caller                                                                  --model, --prediction
    a file beside it of the same name, .yaml or .json                           parameterization: "v"
    (for a diffusers folder's U-Net given alone, the folder's scheduler_config.json)
    the folder's scheduler_config.json, the file's metadata or marker keys      prediction_type, v_pred, alphas_cumprod
    the U-Net itself, run once (`probe`)                                        SD 2.x with 4 channels only
    the name of an SDXL model's file, in the metadata or on disk                "vpred", "v-pred"
    eps                                                                         everything else
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import END, SD2, SD2_V, SMALL, Config, ScheduleConfig
from ..few_step import TITLES
from ..schedule import Schedule
from .checkpoint import Checkpoint, CheckpointError
from .diffusers_config import schedule_from_diffusers
from .folders import model_name
from .formats.dtypes import TYPES, NumberType

if TYPE_CHECKING:
    from torch import Tensor

    from ..conditioning import Conditioning

PREDICTION_KEY = "modelspec.prediction_type"  # https://github.com/Stability-AI/ModelSpec
PREDICTIONS = {
    "v": "v", "velocity": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v", "v_pred": "v",
    "eps": "eps", "epsilon": "eps", "noise": "eps",
}  # fmt: skip
OTHER_PREDICTIONS = ("x0", "sample", "edm", "flow", "flow_prediction", "rectified_flow")
# "model_vpred", "modelVPred", "vPredV1"; a capital letter begins a word
CALLED_V = re.compile(r"(?<![A-Za-z])[vV][ _-]?(?i:pred(iction)?)(?![a-z])|(?<=[a-z])V[ _-]?[Pp]red(iction)?(?![a-z])")
MAX_SIDECAR = 1 << 20  # bytes
MAX_TABLE = 100_000  # numbers
SAY_PREDICTION = ("parameterization", "prediction_type", PREDICTION_KEY, "v_parameterization")  # entries of sidecars
SAY_ZERO_SNR = ("rescale_betas_zero_snr", "zero_terminal_snr", "zsnr", "ztsnr")
# an entry at the beginning of a line or inside {...}: its name, and the first word of its value
YAML_ENTRY = re.compile(r"""(?:^[ \t-]*|[{,][ \t]*)["']?([\w.]+)["']?[ \t]*[:=][ \t]*["']?([\w-]+)""", re.MULTILINE)


def predicting(config: Config, prediction: str | None) -> Config:
    """The config with this prediction, and the name and native size of the known model that it thereby becomes."""
    if prediction is None or prediction == config.schedule.prediction:
        return config
    usual = SD2.text[0]
    plain = tuple(
        replace(text, vocab=usual.vocab, names=usual.names, words=(), pad=min(text.pad, END)) for text in config.text
    )
    unet = replace(config.unet, linear_projections=SD2.unet.linear_projections, guidance=None)
    small = SMALL if config.name.endswith(SMALL) and unet.is_part_of(SD2.unet) else ""
    full = replace(config, name=config.name.removesuffix(small), unet=SD2.unet if small else unet, text=plain)
    full = replace(full, guidance=SD2.guidance, sampler=SD2.sampler, steps=None, spacing=None)
    named = {SD2: SD2_V, SD2_V: SD2}.get(full)
    size, name = (named.size, named.name + small) if named else (config.size, config.name)
    try:
        schedule = replace(config.schedule, prediction=prediction)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return replace(config, name=name, size=size, schedule=schedule)


def decide(
    tensors: Mapping[str, Tensor], config: Config, prediction: str | None, by_folder: bool
) -> tuple[Config, bool, str]:
    """The config of a foreign file with its noise schedule and prediction; whether the latter is known; and the reason.

    If it is not known, `probe` should find out. `by_folder`: the config is that of a diffusers folder, with schedule.
    """
    beside, why_beside, zero_beside = read_beside(tensors)
    inside, why_inside = _inside(tensors)
    configs = getattr(tensors, "configs", {})
    schedule = config.schedule
    if not by_folder and "scheduler" in configs:
        schedule = schedule_from_diffusers(configs["scheduler"])
    table, why_table = stored_schedule(tensors, schedule)
    marked = table.get("zero_snr") or zero_beside or "ztsnr" in tensors or schedule.zero_snr
    # kohya's trainer writes it for eps as well, which cannot start from pure noise
    zero = marked or (inside != "eps" and _says_zero_snr(getattr(tensors, "metadata", {})))
    to_noise = zero or table.get("alpha_bar", (1.0,))[-1] < 1e-7
    if "scheduler" in configs and not inside:
        inside, why_inside = schedule.prediction, "scheduler_config.json says so"
    found = [
        (prediction, "as given"),
        (beside, why_beside),
        (inside, why_inside),
        ("v" if to_noise else None, "its noise schedule ends in noise alone (zero terminal SNR)"),
        _called(tensors) if config.sizes else (None, ""),
    ]
    said, reason = next(((said, why) for said, why in found if said), (None, ""))
    decided = said is not None or config.unet.context != SD2.unet.context or config.unet.in_channels != 4
    if said is None:
        said = "eps"
        kind = "SDXL does" if config.sizes else "Stable Diffusion 1.x does"
        kind = "inpainting models do" if config.is_inpainting else kind
        reason = f"as {kind}, and nothing about this one says otherwise" if decided else "nothing says what it predicts"
    try:
        # in one call, because zero terminal SNR is only valid with v
        schedule = replace(schedule, prediction=said, **(table or ({"zero_snr": True} if zero else {})))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if said != config.schedule.prediction:
        plain = replace(config, schedule=replace(config.schedule, zero_snr=False, alpha_bar=None))
        config = predicting(plain, said)
    reason += f"; {why_table}" if why_table else ""
    return replace(config, schedule=schedule), decided, reason


def read_beside(tensors: Mapping[str, Tensor]) -> tuple[str | None, str, bool]:
    """What a file beside the checkpoint says: the prediction, which file, and whether terminal SNR is zero."""
    path = getattr(tensors, "path", None)
    if path is None or "scheduler" in getattr(tensors, "configs", {}):
        return None, "", False
    sidecars = (
        [] if path.is_dir() else [path.with_name(model_name(path) + ending) for ending in (".yaml", ".yml", ".json")]
    )
    part = path if path.is_dir() else path.parent
    if (part / "config.json").is_file():  # a part of a diffusers folder, given alone
        sidecars.append(part.parent / "scheduler" / "scheduler_config.json")
    for sidecar in sidecars:
        if sidecar != path and sidecar.is_file():
            prediction, zero = read_sidecar(sidecar)
            if prediction or zero:
                return prediction, f"{sidecar.name} beside it says so", zero
    return None, "", False


def read_sidecar(path: Path) -> tuple[str | None, bool]:
    """The prediction ("eps", "v" or None) and whether terminal SNR is zero, from a .yaml or .json beside a checkpoint.

    Only entries count, not free text: other programs keep a model's description in such a file. YAML is not parsed but
    searched line by line. In an original YAML, no `parameterization` means eps, the default of the original classes.
    Raises CheckpointError for "x0".
    """
    with open(path, "rb") as file:
        text = file.read(MAX_SIDECAR).decode("utf-8", "replace")
    if path.suffix == ".json":
        try:
            entries = list(_entries(json.loads(text.removeprefix("\ufeff"))))
        except (ValueError, RecursionError):  # not meant for us
            entries = []
    else:
        text = re.sub(r"#.*", "", text)
        entries = [(match[1], match[2].lower()) for match in YAML_ENTRY.finditer(text)]
    said = next((word for name, word in entries if name in SAY_PREDICTION and word not in ("", "null", "none")), None)
    is_zero = next((word == "true" for name, word in entries if name in SAY_ZERO_SNR), False)
    if said is None:
        return ("eps" if re.search(r"target:\s*ldm\.[\w.]{1,100}Diffusion\b", text) else None), is_zero
    word = {"true": "v", "false": "eps"}.get(said, said)
    if word not in PREDICTIONS:
        raise CheckpointError(f"{path.name} beside it says that it predicts {word!r:.50}: only eps and v are supported")
    return PREDICTIONS[word], is_zero


def _entries(content: object) -> Iterator[tuple[str, str]]:
    """The plain values in a JSON document, those of inner objects included, as name and lower-case text."""
    if isinstance(content, list):
        for item in content:
            yield from _entries(item)
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, (dict, list)):
            yield from _entries(value)
        else:
            yield name, json.dumps(value).strip('"').lower()


def _inside(tensors: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """The prediction according to the file's metadata or marker keys, and which of them."""
    metadata = getattr(tensors, "metadata", {})
    for name in (PREDICTION_KEY, "prediction_type", "ss_prediction_type", "parameterization"):
        word = str(metadata.get(name, "")).lower()
        if word in PREDICTIONS:
            return PREDICTIONS[word], f"its metadata says so ({name})"
        if word in OTHER_PREDICTIONS:
            raise CheckpointError(f"its metadata ({name}) says that it predicts {word!r}: only eps and v are supported")
    flag = str(metadata.get("ss_v_parameterization", "")).lower()
    if flag in ("true", "false"):
        return "v" if flag == "true" else "eps", "its metadata says so (ss_v_parameterization)"
    if "v_pred" in tensors:
        return "v", 'it has the key "v_pred"'
    return None, ""


def _says_zero_snr(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata says that terminal SNR is zero, as kohya's trainer writes it."""
    names = (*SAY_ZERO_SNR, *(f"ss_{name}" for name in SAY_ZERO_SNR))
    return any(str(metadata.get(name, "")).lower() == "true" for name in names)


def _called(tensors: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """The prediction that a name states, as those of SDXL's fine-tunes for v do, and where this name was found."""
    metadata, path = getattr(tensors, "metadata", {}), getattr(tensors, "path", None)
    places = [(f"its metadata ({title})", str(metadata.get(title, ""))) for title in TITLES]
    places += [("its name", model_name(path))] if path is not None else []
    place = next((place for place, name in places if CALLED_V.search(name)), None)
    return ("v", f"{place} says so (--prediction overrides)") if place else (None, "")


def stored_schedule(tensors: Mapping[str, Tensor], schedule: ScheduleConfig) -> tuple[dict[str, Any], str]:
    """The fields of a `ScheduleConfig` to be replaced by the noise schedule in the file, and a note about it.

    A table that is no schedule is ignored: a model can do without it.
    """
    if "alphas_cumprod" not in tensors:
        return {}, ""
    found = read_table(tensors, "alphas_cumprod")
    if found is None:
        return {}, ""
    theirs, kind = found[0].ravel(), found[1]
    if kind.name.startswith("float8"):
        return {}, f"the file's noise schedule (alphas_cumprod) is in {kind.name}, which is too coarse, and is ignored"
    if theirs.size != schedule.steps or not kind.eps:
        what = f"is not a list of {schedule.steps} numbers with a fraction"
        return {}, f"the file's noise schedule (alphas_cumprod) {what} and is ignored"
    # a table rounded to half precision is the same schedule
    rtol, atol = max(4 * _precision(theirs, kind), 1e-4), 1e-6

    def same(other: ScheduleConfig) -> bool:
        return np.allclose(theirs, Schedule(other).alpha_bar, rtol=rtol, atol=atol)

    if same(schedule):
        return {}, ""
    usual = not schedule.zero_snr and schedule.alpha_bar is None
    if usual and same(replace(schedule, zero_snr=True, prediction="v")):
        return {"zero_snr": True}, "the file's noise schedule is used: zero terminal SNR"
    table = tuple(theirs.tolist())
    try:
        replace(schedule, alpha_bar=table, zero_snr=False, prediction="v")
    except ValueError:
        what = "is damaged: it does not fall from below 1 towards 0"
        return {}, f"the file's noise schedule (alphas_cumprod) {what}; it is ignored"
    return {"alpha_bar": table, "zero_snr": False}, "the file's own noise schedule is used"


def _precision(table: np.ndarray, kind: NumberType) -> float:
    """The relative precision of numbers, which may have been rounded to fewer digits than their type has."""
    with np.errstate(over="ignore", invalid="ignore"):
        single, half = table.astype(np.float32), table.astype(np.float16)
    if np.array_equal(single, table) and not (single.view(np.uint32) & 0xFFFF).any():
        return max(kind.eps, TYPES["bfloat16"].eps)
    return max(kind.eps, TYPES["float16"].eps if np.array_equal(half, table) else 0.0)


def read_table(tensors: Mapping[str, Tensor], key: str) -> tuple[np.ndarray, NumberType] | None:
    """A small tensor as float64, and its type; None on the meta device. Empty for one that is large or unreadable."""
    kind: NumberType | None
    if isinstance(tensors, Checkpoint):
        has, kind = tensors.shape(key), tensors.number_type(key)
    else:
        has, kind = tuple(tensors[key].shape), TYPES.get(str(tensors[key].dtype).removeprefix("torch."))
    if kind is None or math.prod(has) > MAX_TABLE or kind.name[:6] == "float8":
        return np.empty((0,)), kind or TYPES["bool"]
    if isinstance(tensors, Checkpoint):
        try:
            return tensors.table(key), kind
        except CheckpointError:
            return np.empty((0,)), kind
    return None if tensors[key].is_meta else (tensors[key].double().cpu().numpy(), kind)


def probe(unet: Callable[[Tensor, Tensor, Conditioning], Tensor], config: Config, like: Tensor) -> str | None:
    """Whether a U-Net predicts "eps" or "v", by running it once on noise; None if the output is not finite.

    At the last timestep x_t = alpha x0 + sigma eps is nearly pure noise: sigma / alpha is 14.6. A network that predicts
    eps returns about x, so the projection of its output on x is 1. One that predicts v = alpha eps - sigma x0 returns
    an image, and the projection is near 0. Measured on small models of this project: 0.99, and 0.01 to 0.03. For an
    untrained network it is near 0, too.

    AUTOMATIC1111's webui and stable-diffusion.cpp also run the network once, on a constant 0.5, and test whether the
    output's mean is lower by more than 1: v-models measured here lie on both sides of that, at 0.96 to 1.02.

    `like` is any tensor with the network's device and precision.
    """
    import torch

    from ..conditioning import Conditioning

    rng = torch.Generator("cpu").manual_seed(0)
    x = torch.randn((1, config.unet.in_channels, 16, 16), generator=rng).to(like)
    context = torch.full((1, 2, config.unet.context), 0.5).to(like)
    t = torch.full((1,), config.schedule.steps - 1.0, device=like.device)
    vector = None if config.unet.vector is None else torch.zeros((1, config.unet.vector)).to(like)
    with torch.no_grad():
        told = None if config.unet.guidance is None else torch.full((1,), config.guidance, device=like.device)
        out = unet(x, t, Conditioning(context, vector, guidance=told)).double()
    noise = x[:, : config.unet.out_channels].double()
    share = float((out * noise).sum() / (noise * noise).sum())
    if not np.isfinite(share):
        return None
    return "v" if share < 0.5 else "eps"

"""Which model it is and what it predicts: the order of what decides, its reasons, and other models by their names."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import TINY_V2, manifest, tiny_state
from safetensors.torch import save_file

from sd import StableDiffusion
from sd.checkpoints import detect as identity
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.detect import CONFIG_KEY, detect, identify
from sd.checkpoints.key_maps import UNET
from sd.checkpoints.prediction import predicting, probe, read_sidecar
from sd.config import SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_V, ScheduleConfig
from sd.schedule import MIN_ALPHA_BAR, Schedule, to_zero_snr

ALPHA_BAR = torch.from_numpy(Schedule().alpha_bar).float()
ZERO_SNR = torch.from_numpy(to_zero_snr(Schedule().alpha_bar)).float()


class Said(dict):
    """Tensors of a manifest without numbers, with what a `Checkpoint` says about itself."""

    def __init__(self, name: str = "sd-v2-768-v", path=None, metadata=None, configs=None, **more: torch.Tensor):
        keys = manifest(name).items()
        super().__init__({k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in keys})
        self.update(more)
        self.metadata, self.configs, self.path = metadata or {}, configs or {}, path


@pytest.mark.parametrize(
    "name, config",
    [
        ("sd-v1", SD1),
        ("sd-v1-full-ema", SD1),
        ("sd-v1-inpainting", SD1_INPAINT),
        ("sd-v2-inpainting", SD2_INPAINT),
        ("sd-v2-base", SD2),
        ("sd-v2-768-v", SD2),
    ],
)
def test_family(name, config):
    found = identify(Said(name))
    assert found.config == config
    assert found.decided == (name not in ("sd-v2-base", "sd-v2-768-v"))
    if found.decided:
        assert found.reason.startswith("as ") and detect(Said(name)) == config
    else:
        with pytest.raises(CheckpointError, match="sd2-v"):
            detect(Said(name))


# ------------------------------------------------------------------------------------------------- eps or v, in order


@pytest.fixture
def beside(tmp_path):
    """A path with a sidecar of this name and text."""

    def write(name: str, text: str):
        (tmp_path / name).write_text(text)
        return tmp_path / "model.safetensors"

    return write


YAML_V = (
    'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v" # velocity\n'
)
YAML_EPS = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    # parameterization: v\n"


def test_what_decides_in_its_order(beside):
    path = beside("model.yaml", YAML_V)
    marks = {"metadata": {"modelspec.prediction_type": "epsilon"}}
    found = identify(Said(path=path, **marks), prediction="eps")
    assert found.config == SD2 and found.reason == "as given"
    found = identify(Said(path=path, **marks))
    assert found.config == SD2_V and found.reason == "model.yaml beside it says so"
    found = identify(Said(path=path, **marks), config=SD2)
    assert found.config == SD2 and found.reason == "as given"
    path.with_suffix(".yaml").unlink()
    found = identify(Said(path=path, **marks))
    assert found.config == SD2 and found.decided and "modelspec.prediction_type" in found.reason
    assert not identify(Said(path=path)).decided


@pytest.mark.parametrize(
    "said, prediction, word",
    [
        ({"metadata": {"modelspec.prediction_type": "v"}}, "v", "metadata"),
        ({"metadata": {"prediction_type": "v_prediction"}}, "v", "metadata"),
        ({"metadata": {"ss_v_parameterization": "True"}}, "v", "metadata"),
        ({"metadata": {"ss_v_parameterization": "False"}}, "eps", "metadata"),
        ({"v_pred": torch.empty(0)}, "v", "v_pred"),
        ({"alphas_cumprod": ZERO_SNR}, "v", "zero terminal SNR"),
        ({"ztsnr": torch.empty(0)}, "v", "zero terminal SNR"),
        ({"configs": {"scheduler": {"prediction_type": "v_prediction"}}}, "v", "scheduler_config.json"),
        ({"configs": {"scheduler": {"prediction_type": "epsilon"}}}, "eps", "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("name", ["sd-v1", "sd-v2-768-v"])
def test_what_a_file_says(name, said, prediction, word):
    """Also of Stable Diffusion 1.x, of which there are fine-tunes that predict v."""
    found = identify(Said(name, **said))
    assert found.decided and found.config.schedule.prediction == prediction and word in found.reason
    if name == "sd-v2-768-v":
        assert found.config.size == (768 if prediction == "v" else 512)
        assert found.config.name == (SD2_V if prediction == "v" else SD2).name


@pytest.mark.parametrize(
    "name, text, prediction, zero",
    [
        ("a.yaml", YAML_V, "v", False),
        ("a.yaml", YAML_EPS, "eps", False),
        ("a.yaml", "prediction_type: v_prediction\nzsnr: true", "v", True),
        ("a.yaml", "learning_rate: 1.0e-4", None, False),
        ("a.json", json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}), "v", True),
        ("a.json", json.dumps({"v_parameterization": True}), "v", False),
        ("a.json", json.dumps({"description": "a prediction", "sd version": "SD 2"}), None, False),
        ("a.json", "not json", None, False),
        # what is said to people, or of nothing
        ("a.json", json.dumps({"notes": "prediction_type: see below, zsnr: true\nprediction_type: v"}), None, False),
        ("a.yaml", "description: its parameterization: v, they say", None, False),
        ("a.json", json.dumps({"prediction_type": None, "inner": [{"parameterization": "V"}]}), "v", False),
        ("a.yaml", f"parameterization: null\n{YAML_V}", "v", False),
        ("a.yaml", "model: {params: {x: 1, 'parameterization': 'v'}}", "v", False),
        ("a.json", json.dumps({"modelspec.prediction_type": "epsilon"}), "eps", False),
        ("a.json", "[" * 100_000, None, False),
    ],
)
def test_sidecars(tmp_path, name, text, prediction, zero):
    (tmp_path / name).write_text(text)
    assert read_sidecar(tmp_path / name) == (prediction, zero)


def test_a_prediction_of_x0_is_refused(beside):
    path = beside("model.json", '{"prediction_type": "sample"}')
    with pytest.raises(CheckpointError, match="'sample': only eps and v"):
        identify(Said(path=path))
    with pytest.raises(ValueError, match="expected eps or v"):
        identify(Said(), prediction="x0")


def test_a_file_of_ours_says_it_and_can_be_overruled(beside):
    ours = {CONFIG_KEY: SD2_V.to_json()}
    assert identify(Said(metadata=ours)).config == SD2_V
    assert identify(Said(metadata=ours)).reason == ""
    assert identify(Said(metadata=ours), prediction="eps").config == SD2
    path = beside("model.yaml", YAML_EPS)
    assert identify(Said(metadata=ours, path=path)).config == SD2


def test_predicting_keeps_the_rest():
    mine = replace(SD2, name="mine", size=640)
    assert predicting(mine, "v") == replace(mine, schedule=SD2_V.schedule)
    assert predicting(SD2, "v") == SD2_V and predicting(SD2_V, "eps") == SD2 and predicting(SD2, None) == SD2


def exact(prediction: str, std: float = 0.9, mean: float = 0.0):
    """The U-Net that is right about data of this mean and standard deviation, about those of real latents."""
    own = Schedule(ScheduleConfig(prediction=prediction))

    def unet(x, t, conditioning):
        level = own.level(float(t[0]))
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        x0 = mean + gain * (x - level.alpha * mean)
        eps = (x - level.alpha * x0) / level.sigma
        return eps if prediction == "eps" else level.alpha * eps - level.sigma * x0

    return unet


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("std, mean", [(0.5, 0.0), (0.9, 0.0), (0.9, 0.8), (1.2, -0.8), (3.0, 0.0)])
def test_probe(prediction, std, mean):
    assert probe(exact(prediction, std, mean), SD2, torch.zeros(1)) == prediction


def test_probe_of_a_trained_network():
    """The embedded model, which was trained to predict eps or v as its config says."""
    model = StableDiffusion.load(device="cpu", dtype="float32")
    assert probe(model.unet, model.config, torch.zeros(1)) == model.config.schedule.prediction


def test_what_the_probe_asks():
    asked = []
    answer = probe(lambda x, t, c: asked.append((x, t, c.context)) or x, SD2, torch.zeros(1, dtype=torch.bfloat16))
    ((x, t, context),) = asked
    assert (answer, x.shape, t.tolist(), context.shape) == ("eps", (1, 4, 16, 16), [999.0], (1, 2, 1024))
    assert x.dtype == context.dtype == torch.bfloat16 and 0.9 < float(x.float().std()) < 1.1
    assert probe(lambda x, t, conditioning: x * float("nan"), SD2, torch.zeros(1)) is None


@pytest.mark.parametrize("prediction, answer", [("v", 0.4), ("eps", float("nan"))])
def test_a_model_that_says_nothing_is_run_to_see(tmp_path, monkeypatch, prediction, answer):
    """Through `load`: the answer is that of the loaded U-Net, and the reason says so."""
    from sd.checkpoints import prediction as predictions

    monkeypatch.setattr(identity, "_by_shapes", lambda found, layouts: replace(TINY_V2, schedule=ScheduleConfig()))
    monkeypatch.setattr(predictions, "SD2", replace(SD2, unet=replace(SD2.unet, context=96), text=TINY_V2.text))
    state = dict(tiny_state("tiny-v2-v"))
    weight = state[f"{UNET}out.2.weight"]
    state[f"{UNET}out.2.weight"] = torch.full_like(weight, 3e38) if np.isnan(answer) else torch.zeros_like(weight)
    state[f"{UNET}out.2.bias"] = torch.full((4,), 0.0 if np.isnan(answer) else answer)
    save_file(state, tmp_path / "a.safetensors")
    model = StableDiffusion.load(tmp_path / "a.safetensors", device="cpu", dtype="float32")
    assert model.config.schedule.prediction == prediction == model.schedule.config.prediction
    assert model.about[0].startswith(f"predicts {prediction}: nothing says what it predicts")
    assert ("NaN" if np.isnan(answer) else "run once") in model.about[0]
    given = StableDiffusion.load(tmp_path / "a.safetensors", device="cpu", dtype="float32", prediction="v")
    assert given.config.schedule.prediction == "v" and given.about == ("predicts v: as given",)


# ------------------------------------------------------------------------------------------------------ noise schedules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["sd-v1", "sd-v2-inpainting"])
def test_the_usual_schedule_is_recognised_in_any_precision(name, dtype):
    assert identify(Said(name, alphas_cumprod=ALPHA_BAR.to(dtype))).config in (SD1, SD2_INPAINT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_terminal_snr_is_recognised_and_used(dtype):
    found = identify(Said("sd-v1", alphas_cumprod=ZERO_SNR.to(dtype)))
    assert found.config.schedule == ScheduleConfig(prediction="v", zero_snr=True)
    assert "noise schedule is used" in found.reason
    own = Schedule(found.config.schedule)
    assert own.alpha_bar[-1] == MIN_ALPHA_BAR and np.allclose(own.alpha_bar, ZERO_SNR, atol=1e-6)
    with pytest.raises(CheckpointError, match="prediction must be v"):
        identify(Said("sd-v1", alphas_cumprod=ZERO_SNR.to(dtype)), prediction="eps")


def test_any_other_schedule_is_used():
    table = torch.from_numpy(np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))).float()
    found = identify(Said("sd-v1", alphas_cumprod=table))
    assert found.config.schedule.prediction == "eps"
    assert np.array_equal(Schedule(found.config.schedule).alpha_bar.astype(np.float32), table.numpy())
    given = identify(Said(alphas_cumprod=table), config=SD2_V)
    assert given.config.schedule.alpha_bar == tuple(table.tolist()) and given.config.schedule.prediction == "v"
    assert type(given.config).from_json(given.config.to_json()) == given.config


def test_a_schedule_that_is_given_is_taken_as_it_is():
    given = replace(SD1, schedule=ScheduleConfig(prediction="v", zero_snr=True))
    for table in (ALPHA_BAR, ZERO_SNR):
        assert identify(Said("sd-v1", alphas_cumprod=table), config=given).config == given
    usual = identify(Said("sd-v1", alphas_cumprod=ALPHA_BAR), config=SD1, prediction="v")
    assert usual.config == replace(SD1, schedule=ScheduleConfig(prediction="v"))


@pytest.mark.parametrize(
    "table, words",
    [
        (torch.linspace(0, 1, 1000), "damaged: it does not fall"),
        (torch.full((1000,), 0.5), "damaged"),
        (torch.full((1000,), float("nan")), "damaged"),
        (torch.where(torch.arange(1000) == 5, float("nan"), ALPHA_BAR), "damaged"),
        (ALPHA_BAR[:500], "not a list of 1000 numbers"),
        (ALPHA_BAR.long(), "not a list of 1000 numbers"),
        (ALPHA_BAR > 0.5, "not a list of 1000 numbers"),
        (ALPHA_BAR.to(torch.float8_e4m3fn), "in float8_e4m3fn, which is too coarse"),
        (ALPHA_BAR.to(torch.complex64), "not a list of 1000 numbers"),
        (torch.tensor(0.5), "not a list of 1000 numbers"),
        (torch.zeros(200_000), "not a list of 1000 numbers"),
    ],
)
def test_what_is_no_schedule_is_ignored_and_said(table, words):
    for config in (None, SD1):
        found = identify(Said("sd-v1", alphas_cumprod=table), config=config)
        assert found.config == SD1 and words in found.reason and "ignored" in found.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_a_schedule_that_was_once_rounded_is_the_same(dtype, zero):
    """A program that converted all of a file to half precision and back; the shape does not matter either."""
    table = (ZERO_SNR if zero else ALPHA_BAR).to(dtype)
    for again in (table.float(), table.double()[None], table.float()[:, None]):
        found = identify(Said("sd-v1", alphas_cumprod=again))
        assert found.config.schedule == ScheduleConfig(prediction="v" if zero else "eps", zero_snr=zero)


@pytest.mark.exhaustive
def test_a_model_with_zero_terminal_snr_paints(tmp_path):
    """Every grid, noise alone at its beginning: nothing overflows on the way."""
    state = {**tiny_state("tiny-v2-v"), "alphas_cumprod": ZERO_SNR}
    save_file(state, tmp_path / "a.safetensors")
    model = StableDiffusion.load(tmp_path / "a.safetensors", config=TINY_V2, device="cpu", dtype="float32")
    assert model.config.schedule.zero_snr
    assert any("zero terminal SNR" in line for line in model.about)
    for sampler, spacing in (("ddim", "trailing"), ("euler", "karras"), ("heun", "linspace")):
        (image,) = model.txt2img("a", steps=3, sampler=sampler, spacing=spacing, height=64, width=64)
        assert np.asarray(image).std() > 1, sampler


def test_zero_snr_is_that_of_the_paper():
    """Lin et al. 2024, algorithm 1, in its own words: on the square roots, shifted and scaled."""
    alpha = np.sqrt(Schedule().alpha_bar)
    new = np.sqrt(to_zero_snr(Schedule().alpha_bar))
    assert new[-1] == 0 and np.isclose(new[0], alpha[0], rtol=1e-12)
    slope = (new[0] - new[500]) / (alpha[0] - alpha[500])
    assert np.allclose(new[0] - new, slope * (alpha[0] - alpha), atol=1e-12)


# --------------------------------------------------------------------------------------------------------- other models


def keys(*names: str, shape: tuple[int, ...] = (4,)) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name in names}


def inputs(name: str, n: int) -> dict[str, torch.Tensor]:
    return {**Said(name), f"{UNET}input_blocks.0.0.weight": torch.empty(320, n, 3, 3, device="meta")}


OTHERS = {
    "SD3": keys("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    "Flux": keys("double_blocks.0.img_attn.norm.query_norm.scale"),
    "depth": inputs("sd-v2-base", 5),
    "depth, whole": {**inputs("sd-v2-base", 5), **keys("depth_model.model.pretrained.x")},
    "upscaling": inputs("sd-v2-base", 7),
    "upscaling, whole": {**inputs("sd-v2-base", 7), **keys("low_scale_model.betas")},
    "pix2pix": inputs("sd-v1", 8),
    "unCLIP": {**Said("sd-v2-768-v"), **keys("embedder.model.visual.proj", "noise_augmentor.betas")},
    "unCLIP, its U-Net": {**Said("sd-v2-768-v"), **keys(f"{UNET}label_emb.0.0.weight")},
    "LDM text2img-large": {**Said("sd-v1"), **keys("cond_stage_model.transformer.token_emb.weight")},
    "AltDiffusion": {**Said("sd-v1"), **keys("cond_stage_model.roberta.embeddings.word_embeddings.weight")},
    "LoRA": keys("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_x.alpha"),
    "LoRA of diffusers": keys("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"),
    "LoRA of old diffusers": keys("mid_block.attentions.0.attn1.processor.to_q_lora.down.weight"),
    "LoRA, LoHa": keys("lycoris_unet_x.hada_w1_a"),
    "textual inversion": keys("emb_params", shape=(2, 768)),
    "textual inversion, .bin": keys("<cat>", shape=(1024,)),
    "textual inversion, SDXL": keys("clip_l", "clip_g", shape=(1, 768)),
    "ControlNet": keys("control_model.input_blocks.0.0.weight"),
    "ControlNet of diffusers": keys("controlnet_cond_embedding.conv_in.weight"),
    "IP-Adapter": keys("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "AnimateDiff": keys("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    "quantised": {**Said("sd-v1"), **keys(f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4")},
    "ESRGAN": keys("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=name.partition(",")[0].partition("'")[0].partition(" of ")[0]) as caught:
        identify(OTHERS[name])
    assert str(caught.value).startswith("this ") and "\n" not in str(caught.value)
    if "LoRA" in name:
        assert "--lora" in str(caught.value)
    if "inversion" in name:
        assert "--embedding" in str(caught.value)


def test_no_model_that_is_supported_looks_like_another():
    for name in ("sd-v1", "sd-v1-full-ema", "sd-v1-inpainting", "sd-v2-base", "sd-v2-inpainting"):
        identify(Said(name))


def test_an_embedding_as_it_is_saved(tmp_path):
    torch.save(
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match=r"textual inversion embedding, .*--embedding$"):
        identify(load_checkpoint(tmp_path / "a.pt"))

"""SDXL in small against the original's recorded outputs: its parts, prompts to images, and what the sizes do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import GOLDENS, TINY_XL, Golden, error, manifest, tiny_state
from conftest import loaded
from safetensors.torch import save_file

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import to_diffusers_configs
from sd.checkpoints.export import to_original
from sd.conditioning import Conditioning
from sd.config import BASE_SIZES, MODELS, REFINER_SIZES, SDXL, SDXL_INPAINT, SDXL_REFINER
from sd.models.build import weight_shapes
from sd.params import SamplingParams, TextToImage
from sd.prompts import TextBatch
from sd.schedule import Schedule
from sd.size_conditioning import size_embedding


def numbers(case: dict, names: Sequence[str] = BASE_SIZES) -> list[float]:
    """The size conditioning of a golden's case in our order."""
    pairs = {"original": case["original_size"], "crop": case["crop_top_left"], "target": case.get("target_size")}
    return [pairs[name.partition("_")[0]][name.endswith(("width", "left"))] for name in names if "score" not in name]


@pytest.fixture(scope="module")
def tiny_xl() -> StableDiffusion:
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


def test_size_embedding():
    golden = Golden("sdxl_size_conditioning")
    sizes = [numbers(each) for each in golden.case["sizes"]]
    assert error(size_embedding(torch.tensor(sizes)), golden["vector"]) < 1e-5
    refiner = [
        [*numbers(each, REFINER_SIZES), score]
        for each, score in zip(golden.case["sizes"], golden.case["aesthetic_score"], strict=True)
    ]
    assert error(size_embedding(torch.tensor(refiner)), golden["vector_refiner"]) < 1e-5


def test_schedules():
    """The timesteps and noise levels of generative-models for several numbers of steps."""
    grids = json.loads((GOLDENS / "sdxl_schedules.json").read_text())["grids"]
    assert len(grids) > 5
    for n, grid in grids.items():
        levels = Schedule(SDXL.schedule).levels(int(n), "sgm")
        assert [level.t for level in levels[:-1]] == grid["timesteps"]
        assert np.allclose([level.ratio for level in levels], grid["sigmas"], rtol=1e-6)


def test_parts(tiny_xl):
    golden = Golden("tiny_sdxl_components")
    case = golden.case
    ids = [tokenizer(case["prompts"]) for tokenizer in tiny_xl.tokenizers]
    assert torch.equal(ids[0], golden["ids_l"].long()) and torch.equal(ids[1], golden["ids_g"].long())
    text = tiny_xl.encode_texts(case["prompts"])
    assert error(text.hidden[..., :64], golden["clip_hidden"]) < 1e-5
    assert error(text.hidden[..., 64:], golden["penultimate"]) < 1e-5
    assert error(text.pooled, golden["pooled"]) < 1e-5
    each = [tiny_xl.conditioning(p, numbers(s)) for p, s in zip(case["prompts"], case["sizes"], strict=True)]
    cond = Conditioning.joined(each)
    assert error(cond.vector, golden["vector"]) < 1e-5
    out = tiny_xl.unet(golden["unet_x"], torch.tensor(case["t"]), cond)
    assert error(out, golden["unet_out"]) < 2e-5
    decoded = tiny_xl.vae.decode(golden["latent"])
    assert error(decoded, golden["decoded"]) < 2e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["tiny_sdxl_txt2img_euler_s12", "tiny_sdxl_txt2img_euler_s12_negative"])
def test_prompt_to_image(tiny_xl, name, monkeypatch):
    """From the request to latents and pixels, with zeros for an empty negative prompt, and with another one."""
    golden = Golden(name)
    case = golden.case
    B, _, h, w = golden["x_T"].shape
    sizes = dict(zip(BASE_SIZES, numbers(case["sizes"]), strict=True))
    settings = SamplingParams(
        sampler="euler", spacing="sgm", steps=12, guidance=case["scale"], height=8 * h, width=8 * w, **sizes
    )
    run = tiny_xl.prepare(TextToImage(case["prompts"], settings, negative=case["negative"]))
    guide = run.guides[0]
    assert error(guide.cond.context, golden["crossattn"]) < 1e-5 and error(guide.cond.vector, golden["vector"]) < 1e-5
    assert error(guide.uncond.vector.expand(B, -1), golden["uc_vector"]) < 1e-5
    if case["negative"] is None:
        assert not guide.uncond.context.any()
    else:
        assert error(guide.uncond.context.expand(B, -1, -1), golden["uc_crossattn"]) < 1e-5
    assert [level.t for level in run.levels[:-1]] == case["t_calls"]
    run.begin(run.start._replace(x=golden["x_T"].clone()))
    for step in run:
        if (middle := golden.tensors.get(f"mid.after_step_{step.i + 1}")) is not None:
            level = run.levels[step.i + 1]
            assert error(step.x / level.alpha, middle) < 1e-4
    assert error(run.x, golden["out"]) < 1e-4
    if "image_u8" in golden.tensors:
        ours = np.stack([np.asarray(image) for image in run.result().images]).astype(int).transpose(0, 3, 1, 2)
        theirs = golden["image_u8"].numpy().astype(int)
        assert (ours - theirs >= 0).mean() > 0.999 and np.abs(ours - theirs).max() <= 1  # we round, it truncates


def test_ancestral_steps_of_the_original(tiny_xl):
    golden = Golden("tiny_sdxl_euler_ancestral_s10")
    case = golden.case
    cond = Conditioning(golden["crossattn"], golden["vector"])
    uncond = Conditioning(torch.zeros_like(golden["crossattn"]), golden["uc_vector"])
    levels = tiny_xl.schedule.levels(10, "sgm")
    denoise = tiny_xl.denoiser(cond, uncond, case["scale"])
    *_, last = tiny_xl.sample(denoise, golden["x_T"], levels, "euler_a", noise=golden.noise())
    assert error(last.x, golden["out"]) < 1e-4


# ------------------------------------------------------------------------------------------------------------- files


def headers(name: str, **changed: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The names and shapes of a full-size file, without memory."""
    shapes = {key: shape for key, (shape, _) in manifest(name).items()} | changed
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "changed", "config"),
    [
        ("sdxl-base", {}, SDXL),
        ("sdxl-refiner", {}, SDXL_REFINER),
        ("sdxl-base", {FIRST: (320, 9, 3, 3)}, SDXL_INPAINT),
        ("sdxl-base", {"denoiser.sigmas": (1000,)}, SDXL),
    ],
)
def test_a_file_is_recognised_by_its_shapes(name, changed, config):
    state = headers(name, **changed)
    found = identify(state)
    assert found.config == config and found.decided
    assert {name: len(weights) for name, weights in convert(state, found.config).items()} == {
        name: len(weights) for name, weights in weight_shapes(config).items()
    }


def smaller(depth: tuple[int, ...], up: tuple[tuple[int, ...], ...] | None, middle: int | None, blocks: int = 2):
    """The header of an SDXL file whose U-Net has fewer transformers, and its config."""
    unet = replace(SDXL.unet, depth=depth, up_depth=up, middle_depth=middle, blocks=blocks)
    config = replace(SDXL, name="SDXL base, small U-Net", unet=unet)
    state = {
        name: {key: torch.empty(shape, device="meta") for key, shape in weights.items()}
        for name, weights in weight_shapes(config).items()
    }
    return to_original(state, config), config


SMALLER = {
    "SSD-1B": ((0, 2, 4), ((0, 0, 0), (2, 1, 1), (4, 4, 10)), 0),
    "Vega": ((0, 1, 2), None, 0),
    "KOALA-1B": ((0, 2, 6), None, 6, 1),
    "KOALA-700M": ((0, 2, 5), None, None, 1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SMALLER)
def test_smaller_u_nets_are_counted(name):
    state, config = smaller(*SMALLER[name])
    assert identify(state).config == config
    assert convert(state, config).keys() == set(config.networks)
    folder = {path.partition("/")[0]: raw for path, raw in to_diffusers_configs(config).items() if "config" in path}
    raw = {"unet": folder["unet"], "vae": folder["vae"], "index": {"force_zeros_for_empty_prompt": True}}
    texts = {"text_encoder": folder["text_encoder"], "text_encoder_2": folder["text_encoder_2"]}
    assert from_diffusers(raw | texts) == replace(config, schedule=SDXL.schedule)


def test_a_missing_transformer_is_not_a_smaller_u_net():
    state = headers("sdxl-base")
    gone = [key for key in state if key.startswith("model.diffusion_model.input_blocks.5.1.transformer_blocks.1.")]
    for key in gone:
        del state[key]
    with pytest.raises(CheckpointError, match=rf"^{len(gone)} weights of \d+ missing"):
        convert(state, identify(state).config)


@pytest.mark.exhaustive
def test_diffusers_reads_what_we_write(tiny_xl, tmp_path):
    """StableDiffusionXLPipeline of a folder of ours: the same contexts, vectors, and images, with both negatives."""
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path / "tiny.safetensors"
    save_file(tiny_state("tiny-sdxl"), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny-sdxl", TINY_XL)
        arguments = (path, tmp_path / "folder", "--layout", "diffusers", "--model", "tiny-sdxl")
        assert convert_script.main([*map(str, arguments)]) == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    loaded_back = StableDiffusion.load(tmp_path / "folder", device="cpu", dtype="float32")
    assert replace(loaded_back.config, name="tiny sdxl", sampler=SDXL.sampler, guidance=5.0) == TINY_XL
    prompt = "a photograph of an astronaut riding a horse"
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for negative in ("", "blurry"):
        settings = SamplingParams(sampler="ddim", spacing="trailing", steps=5, guidance=5.0, height=128, width=128)
        run = loaded_back.prepare(TextToImage(prompt, settings, negative=negative))
        theirs = pipe.encode_prompt(prompt, device="cpu", negative_prompt=negative or None)
        ours = run.guides[0].cond, run.guides[0].uncond
        for cond, context, pooled in zip(ours, theirs[:2], theirs[2:], strict=True):
            assert error(cond.context + 1, context + 1) < 1e-5
            assert error(cond.vector[:, :96] + 1, pooled + 1) < 1e-5
        run.begin(run.start._replace(x=noise.clone()))
        for _ in run:
            pass
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.scheduler.register_to_config(set_alpha_to_one=True)
        pipe.scheduler.final_alpha_cumprod = torch.tensor(1.0)
        latents = pipe(
            prompt, negative_prompt=negative or None, height=128, width=128, num_inference_steps=5, latents=noise,
            output_type="latent",
        ).images  # fmt: skip
        assert error(run.x, latents) < 1e-4


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        pytest.param(["a cat", "a dog"], {"negative": "blue"}, id="negative"),
        pytest.param(["a cat", "a dog"], {"negative": ["blue", ""], "exact": True}, id="one by one"),
        pytest.param("a [cat:dog:1] [x|y]", {"negative": "[a:b:1]", "web_ui_prompts": True}, id="prompt editing"),
        pytest.param("a cat AND " + "a dog " * 50, {"negative": "blue", "web_ui_prompts": True}, id="AND"),
    ],
)
def test_each_text_encoder_has_one_turn(tiny_xl, prompt, settings, monkeypatch):
    """However many texts a run has: with low memory, each turn reads the encoder's weights again."""
    turns, use = [], tiny_xl._use
    monkeypatch.setattr(tiny_xl, "_use", lambda name: turns.append(name) or use(name))
    params = SamplingParams(steps=4, height=64, width=64, exact=settings.get("exact", False))
    own = {name: value for name, value in settings.items() if name != "exact"}
    tiny_xl.prepare(TextToImage(prompt, params, **own))
    assert turns == ["text_encoder", "text_encoder_2"]


def test_batches_are_encoded_as_if_alone(tiny_xl):
    """Several batches at once, padded to the length of the longest with the empty text."""
    texts = [["a (cat:1.3)", "a dog"], ["word " * 80]]
    both = tiny_xl.encode_batches([TextBatch(each) for each in texts], weighted=True)
    alone = [tiny_xl.encode_weighted(each) for each in texts]
    assert [text.hidden.shape[1] for text in alone] == [77, 154]
    for found, expected in zip(both, tiny_xl.same_length(*(text.hidden for text in alone)), strict=True):
        assert error(found.hidden, expected) < 1e-5
    for found, text in zip(both, alone, strict=True):
        assert error(found.pooled, text.pooled) < 1e-5
    assert tiny_xl.encode_batches([]) == []

"""There and back: original, ours and diffusers' layout, bit for bit; and what diffusers itself reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_INPAINT, TINY_V2, TINY_XL, Golden, error, manifest, tiny_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts import convert
from sd import StableDiffusion
from sd.checkpoints.checkpoint import load_checkpoint
from sd.checkpoints.detect import CONFIG_KEY, identify
from sd.checkpoints.export import diffusers_texts, has_own_schedule, metadata, to_original
from sd.checkpoints.key_maps import EMA, OPENCLIP, UNET
from sd.conditioning import Conditioning
from sd.config import MODELS, SD1, SD2, Config
from sd.models.build import build
from sd.resources import resource
from sd.runtime.device import find_dtype
from sd.schedule import Schedule, to_zero_snr
from sd.text.tokenizer import Tokenizer

FAMILIES = {
    "tiny-v1": TINY, "tiny-v1-full-ema": TINY, "tiny-v1-inpainting": TINY_INPAINT, "tiny-v2-v": TINY_V2,
    "tiny-sdxl": TINY_XL,
}  # fmt: skip
ZERO_SNR = torch.from_numpy(to_zero_snr(Schedule().alpha_bar)).float()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The tiny models, as if they had names of their own."""
    for name, config in FAMILIES.items():
        monkeypatch.setitem(MODELS, name, config)


def run(*args: object, status: int = 0) -> None:
    assert convert.main([str(arg) for arg in args]) == status


def original(path: Path, name: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """An original file; what of it a way there and back must keep."""
    state = {**tiny_state(name), **more}
    save_file(state, path)
    gone = set(reference.SCHEDULE) - set(more)
    if "full-ema" not in name:
        gone |= {key for key in state if key.startswith(EMA)}
    return {key: tensor for key, tensor in state.items() if key not in gone}


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (
            found[key].dtype == tensor.dtype and found[key].shape == tensor.shape and torch.equal(found[key], tensor)
        ), key


WAYS = (("sd",), ("diffusers",), ("sd", "diffusers"), ("diffusers", "sd"), ("original",))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name}-{' '.join(way)}", marks=() if usual else pytest.mark.exhaustive)
        for name in FAMILIES
        for way in WAYS
        for usual in [name == "tiny-v1" or way == ("sd", "diffusers")]
    ],
)
@pytest.mark.sampled(3)
def test_original_there_and_back(tmp_path, name, way):
    """Every key and every bit, whichever layouts lie between: OpenCLIP's unused layer and the average, too."""
    expected = original(tmp_path / "a.safetensors", name)
    both = ("--keep-ema",) if "full-ema" in name else ()
    path = tmp_path / "a.safetensors"
    for i, layout in enumerate((*way, "original")):
        written = tmp_path / (f"{i}" if layout == "diffusers" else f"{i}.safetensors")
        run(path, written, "--layout", layout, *both, *(("--model", name) if i == 0 else ()))
        path = written
    assert_same(path, expected)


@pytest.mark.parametrize("way", WAYS[:3], ids=" ".join)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.sampled(3)
def test_a_precision_is_kept_on_the_way(tmp_path, way, dtype):
    state = tiny_state("tiny-v2-v")
    kept = {k: t.to(getattr(torch, dtype)) for k, t in state.items() if k not in reference.SCHEDULE}
    save_file(kept, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for i, layout in enumerate((*way, "original")):
        written = tmp_path / (f"{i}" if layout == "diffusers" else f"{i}.safetensors")
        run(path, written, "--layout", layout, *(("--model", "tiny-v2-v") if i == 0 else ()))
        path = written
    assert_same(path, kept)


@pytest.mark.parametrize("layout", ["sd", "original", "diffusers"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bf16"])
def test_another_precision(tmp_path, layout, dtype):
    original(tmp_path / "a.safetensors", "tiny-v1")
    written = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    run(tmp_path / "a.safetensors", written, "--layout", layout, "--dtype", dtype, "--model", "tiny-v1")
    with load_checkpoint(written) as checkpoint:
        kinds = {checkpoint.dtype(key) for key in checkpoint if not key.endswith("position_ids")}
    assert kinds == {find_dtype(dtype)}


def test_the_average_is_kept_or_dropped(tmp_path):
    state = original(tmp_path / "a.safetensors", "tiny-v1-full-ema")
    first = "input_blocks.0.0.weight"
    average = state[f"{EMA}diffusion_modelinput_blocks00weight"]
    for options, unet in (((), state[UNET + first]), (("--weights", "ema"), average)):
        out = tmp_path / f"{len(options)}.safetensors"
        run(tmp_path / "a.safetensors", out, "--layout", "original", "--model", "tiny-v1", *options)
        found = load_file(out)
        assert torch.equal(found[UNET + first], unet)
        assert not any(key.startswith(EMA) for key in found)
    run(tmp_path / "a.safetensors", tmp_path / "both.safetensors", "--keep-ema", "--model", "tiny-v1")
    for weights, unet in (("raw", state[UNET + first]), ("ema", average)):
        model = StableDiffusion.load(tmp_path / "both.safetensors", weights=weights, device="cpu", dtype="float32")
        assert torch.equal(model.unet.conv_in.weight, unet)


def test_keeping_an_average_that_is_not_there(tmp_path, capsys):
    original(tmp_path / "a.safetensors", "tiny-v1")
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--keep-ema", "--model", "tiny-v1", status=1)
    assert "leave out --keep-ema" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["sd", "original", "diffusers"])
def test_a_schedule_and_a_prediction_are_kept(tmp_path, layout):
    """Zero terminal SNR and v, told by the schedule alone, through every layout."""
    expected = original(tmp_path / "a.safetensors", "tiny-v2-v", alphas_cumprod=ZERO_SNR)
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    run(tmp_path / "a.safetensors", out, "--layout", layout, "--model", "tiny-v2-v")
    model = StableDiffusion.load(out, device="cpu", dtype="float32")
    assert model.config.schedule.zero_snr and model.config.schedule.prediction == "v"
    run(out, tmp_path / "back.safetensors", "--layout", "original")
    assert_same(tmp_path / "back.safetensors", expected)


def test_the_embedded_model_stays_itself_in_every_layout(tmp_path):
    """With its name, default sampler and guidance: the scale of its latents is its own, and tells no kind of model."""
    embedded = resource("weights/pocket.safetensors")
    with load_checkpoint(embedded) as checkpoint:
        config = identify(checkpoint).config
    for layout in ("original", "diffusers"):
        out = tmp_path / (layout if layout == "diffusers" else f"{layout}.safetensors")
        run(embedded, out, "--layout", layout)
        with load_checkpoint(out) as checkpoint:
            assert identify(checkpoint).config == config


def test_what_other_programs_look_for(tmp_path):
    original(tmp_path / "a.safetensors", "tiny-v2-v")
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--layout", "original", "--model", "tiny-v2-v")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        found = file.metadata()
    assert found["modelspec.prediction_type"] == "v" and found["format"] == "pt"
    assert Config.from_json(found[CONFIG_KEY]) == TINY_V2
    assert metadata(SD1)["modelspec.prediction_type"] == "epsilon"
    assert not has_own_schedule(SD2)


def test_a_layer_that_is_missing_is_made_up_and_said(tmp_path, capsys):
    """diffusers' folders lack the last layer of OpenCLIP, which is never run and which other programs insist on."""
    state = {k: t for k, t in tiny_state("tiny-v2-v").items() if "resblocks.3." not in k and "text_projection" not in k}
    save_file(state, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--layout", "original", "--model", "tiny-v2-v")
    assert "a copy of the one before" in capsys.readouterr().err
    found, stem = load_file(tmp_path / "b.safetensors"), f"{OPENCLIP}transformer.resblocks."
    assert found.keys() == tiny_state("tiny-v2-v").keys() - set(reference.SCHEDULE)
    assert torch.equal(found[f"{stem}3.attn.in_proj_weight"], state[f"{stem}2.attn.in_proj_weight"])
    assert torch.equal(found[f"{OPENCLIP}text_projection"], torch.eye(96))
    for key in set(found) & set(state):
        assert torch.equal(found[key], state[key])


@pytest.mark.parametrize("name", ["sd-v1", "sd-v1-inpainting", "sd-v2-base", "sd-v2-inpainting"])
def test_names_of_the_full_models(name):
    """On the meta device: every key of the original, in its shape, but for the schedule."""
    keys = {k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in manifest(name).items()}
    config = identify(keys).config
    states = {network: module.state_dict() for network, module in build(config).items()}
    written = to_original(states, config)
    unused = (f"{OPENCLIP}transformer.resblocks.23.", f"{OPENCLIP}text_projection", f"{OPENCLIP}logit_scale")
    expected = {k: tuple(t.shape) for k, t in keys.items() if k not in reference.SCHEDULE and not k.startswith(unused)}
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == expected


def test_networks_from_other_files(tmp_path):
    state = tiny_state()
    parts = {"vae": "first_stage_model.", "text": "cond_stage_model.", "unet": UNET}
    for name, prefix in parts.items():
        save_file(
            {key: tensor for key, tensor in state.items() if key.startswith(prefix)}, tmp_path / f"{name}.safetensors"
        )
    given = ("--vae", tmp_path / "vae.safetensors", "--text-encoder", tmp_path / "text.safetensors")
    run(tmp_path / "unet.safetensors", tmp_path / "a.safetensors", *given, "--layout", "original", "--model", "tiny-v1")
    assert_same(tmp_path / "a.safetensors", {k: t for k, t in state.items() if k not in reference.SCHEDULE})


def test_what_cannot_be_written(tmp_path, capsys):
    original(tmp_path / "a.safetensors", "tiny-v1")
    (tmp_path / "taken").mkdir()
    for args, words in (
        (("taken", "--layout", "diffusers"), "already"),
        (("b.safetensors", "--layout", "diffusers"), "writes a folder"),
        (("folder",), "only .safetensors"),
        ((), "give the name of the file to write"),
        (("b.safetensors", "--info"), "--info writes nothing"),
        (("b.safetensors", "--sha256"), "--sha256 goes with --info"),
        (("no/folder", "--layout", "diffusers"), "no such folder"),
    ):
        out = [tmp_path / args[0], *args[1:]] if args else []
        run(tmp_path / "a.safetensors", *out, "--model", "tiny-v1", status=1)
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and words in err[0], err
    run(tmp_path / "a.safetensors", "--info", "--vae", "gone", "--keep-ema", "--dtype", "float16", status=1)
    assert "as it is: leave out --dtype, --keep-ema, --vae" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "taken"]


def test_the_tokenizer_of_a_folder_is_ours(tmp_path):
    texts = diffusers_texts(SD1)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text(texts[f"tokenizer/{name}"], encoding="utf-8")
    assert Tokenizer(merges=tmp_path).vocab == Tokenizer().vocab
    assert json.loads(texts["tokenizer/tokenizer_config.json"])["pad_token"] == "<|endoftext|>"


# ----------------------------------------------------------------------------------------------------- diffusers itself


@pytest.fixture
def diffusers():
    pytest.importorskip("transformers", reason="compares with diffusers, which is not installed")
    return pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")


def compare(model: StableDiffusion, pipe, tolerance: float = 1e-5) -> None:
    """U-Net, VAE and text encoder give the same; so do tokenizer and schedule."""
    config = model.config
    prompts = ["a red house", "", "don't stop: 12 cats (in a ROW)"]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, model.tokenizer(prompts))
    context = model.text_encoder(ids).hidden
    assert error(context, pipe.text_encoder(ids).last_hidden_state) < tolerance
    x = reference.normal("x", (2, config.unet.in_channels, 16, 24))
    t = torch.tensor([981.0, 17.0])
    assert error(model.unet(x, t, Conditioning(context[:2])), pipe.unet(x, t, context[:2]).sample) < 2 * tolerance
    image = reference.normal("image", (1, 3, 64, 96)).clamp(-1, 1)
    assert error(model.vae.moments(image)[0], pipe.vae.encode(image).latent_dist.mean) < 2 * tolerance
    z = reference.normal("z", (1, 4, 8, 12))
    assert error(model.vae.decode(z), pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample) < 2 * tolerance
    expected = {"eps": "epsilon", "v": "v_prediction"}[config.schedule.prediction]
    assert pipe.scheduler.config.prediction_type == expected
    assert error(torch.from_numpy(model.schedule.alpha_bar), pipe.scheduler.alphas_cumprod) < 1e-5


@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v1-inpainting", "tiny-v2-v"])
@pytest.mark.sampled(4)
def test_diffusers_reads_what_we_write(tmp_path, diffusers, name):
    original(tmp_path / "a.safetensors", name)
    run(tmp_path / "a.safetensors", tmp_path / "folder", "--layout", "diffusers", "--model", name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    kind = "StableDiffusionInpaintPipeline" if "inpainting" in name else "StableDiffusionPipeline"
    assert type(pipe).__name__ == kind
    compare(
        StableDiffusion.load(tmp_path / "a.safetensors", config=FAMILIES[name], device="cpu", dtype="float32"), pipe
    )


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "5MB"}])
@pytest.mark.parametrize("name", ["tiny-v1", pytest.param("tiny-v2-v", marks=pytest.mark.exhaustive)])
@pytest.mark.sampled(6)
def test_we_read_what_diffusers_writes(tmp_path, diffusers, name, options):
    original(tmp_path / "a.safetensors", name)
    run(tmp_path / "a.safetensors", tmp_path / "ours", "--layout", "diffusers", "--model", name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    if options.get("safe_serialization") is False:  # transformers 5 writes no pickles any more
        pipe.unet.save_pretrained(tmp_path / "theirs" / "unet", safe_serialization=False)
        pipe.save_pretrained(tmp_path / "theirs")
        (tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    else:
        pipe.save_pretrained(tmp_path / "theirs", **options)
    names = {path.name for path in (tmp_path / "theirs" / "unet").iterdir()}
    assert any(word in " ".join(names) for word in ("fp16", ".bin", "index", "diffusion_pytorch_model.safetensors"))
    if "max_shard_size" in options:
        assert "diffusion_pytorch_model.safetensors.index.json" in names
    model = StableDiffusion.load(tmp_path / "theirs", device="cpu", dtype="float32")
    compare(model, pipe)


@pytest.mark.exhaustive
def test_a_picture_is_that_of_diffusers(tmp_path, diffusers):
    """From a prompt to pixels, each with its own tokenizer, through the exported folder."""
    original(tmp_path / "a.safetensors", "tiny-v2-v")
    run(tmp_path / "a.safetensors", tmp_path / "folder", "--layout", "diffusers", "--model", "tiny-v2-v")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    model = StableDiffusion.load(tmp_path / "folder", device="cpu", dtype="float32")
    (ours,) = model.txt2img("a red house", "rain", steps=5, guidance=4.0, height=64, width=96, seed=11, sampler="ddim")
    (theirs,) = pipe(
        "a red house", negative_prompt="rain", num_inference_steps=5, guidance_scale=4.0, height=64, width=96,
        generator=torch.Generator().manual_seed(11),
    ).images  # fmt: skip
    difference = (torch.tensor(list(ours.tobytes())).int() - torch.tensor(list(theirs.tobytes())).int()).abs()
    assert difference.max() <= 1


@pytest.mark.exhaustive
def test_old_attention_names_are_those_that_diffusers_still_reads(tmp_path, diffusers):
    """Its own conversion of old names gives the same VAE as ours."""
    original(tmp_path / "a.safetensors", "tiny-v1")
    run(tmp_path / "a.safetensors", tmp_path / "folder", "--layout", "diffusers", "--model", "tiny-v1")
    file = tmp_path / "folder/vae/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in names.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for key, tensor in state.items()}
    assert sum("query" in key for key in state) == 4
    save_file(state, file)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    compare(StableDiffusion.load(tmp_path / "folder", device="cpu", dtype="float32"), pipe)


@pytest.mark.exhaustive
def test_golden_through_every_layout(tmp_path):
    """The original's own output, after two conversions."""
    original(tmp_path / "a.safetensors", "tiny-v2-v")
    run(tmp_path / "a.safetensors", tmp_path / "folder", "--layout", "diffusers", "--model", "tiny-v2-v")
    run(tmp_path / "folder", tmp_path / "b.safetensors")
    model = StableDiffusion.load(tmp_path / "b.safetensors", device="cpu", dtype="float32")
    golden = Golden("tiny_v2_components")
    assert error(model.text_encoder(golden["ids"].long()).hidden, golden["context"]) < 1e-5
    assert (
        error(model.unet(golden["unet_x"], golden["unet_t"], Conditioning(golden["context"])), golden["unet_out"])
        < 2e-5
    )
    assert error(model.vae.decode(golden["latent"]), golden["decoded"]) < 2e-5

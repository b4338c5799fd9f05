"""Diffusers folders and split files: which files are read, and what is refused about them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY, TINY_INPAINT, TINY_V2, tiny_state
from safetensors.torch import load_file, save_file

from sd import StableDiffusion
from sd.adapters.adapter_files import lora_name
from sd.adapters.textual_inversion import read_embedding
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers, schedule_from_diffusers
from sd.checkpoints.diffusers_export import to_diffusers_configs
from sd.checkpoints.export import diffusers_texts, to_diffusers, to_own
from sd.checkpoints.folders import model_name
from sd.checkpoints.prediction import decide, read_beside
from sd.config import MODELS, SD1, SD2_V, Config, ScheduleConfig

UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
NETWORKS = ("text_encoder", "vae", "unet", "unet_ema")


def write_folder(path: Path, state, config: Config, parts=NETWORKS[:3]) -> Path:
    for name, text in diffusers_texts(config).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    for name, tensors in to_diffusers(convert(state, config, "raw", parts), config).items():
        save_file(tensors, path / name)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model", tiny_state(), TINY)


def edit(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def weights(path: Path, variant: str | None = None, which: str = "auto") -> dict[str, torch.Tensor]:
    with load_checkpoint(path, variant) as checkpoint:
        return dict(to_own(convert(checkpoint, identify(checkpoint).config, which)))


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def split(
    path: Path, parts: int = 3, name: str = "{stem}-{i:05d}-of-{n:05d}.safetensors", index: str | None = None
) -> Path:
    """A file as several and their index."""
    tensors = load_file(path)
    stem, keys = path.name.removesuffix(".safetensors"), list(tensors)
    weight_map = {}
    for i in range(parts):
        file = name.format(stem=stem, i=i + 1, n=parts)
        save_file({key: tensors[key] for key in keys[i::parts]}, path.parent / file)
        weight_map |= dict.fromkeys(keys[i::parts], file)
    path.unlink()
    written = path.with_name(index or f"{path.name}.index.json")
    written.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return written


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    "name, config", [("tiny-v1", TINY), ("tiny-v1-inpainting", TINY_INPAINT), ("tiny-v2-v", TINY_V2)]
)
def test_a_folder_is_the_model(tmp_path, name, config):
    path = write_folder(tmp_path / "model", tiny_state(name), config)
    with load_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "diffusers folder" and len(checkpoint.files) == 3
        assert replace(identify(checkpoint).config, name=config.name) == config
        assert (
            "unet.conv_in.weight" in checkpoint
            and checkpoint.shape("unet.conv_in.weight")[1] == config.unet.in_channels
        )
    assert_same(weights(path), to_own(convert(tiny_state(name), config)))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_configs_there_and_back(config):
    files = to_diffusers_configs(config)
    names = {name: f"{name}/config.json" for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    configs = {name: json.loads(json.dumps(files[file])) for name, file in names.items() if file in files}
    if "text_encoder" not in configs:  # the refiner's only one, which find_parts renames
        configs["text_encoder"] = configs.pop("text_encoder_2")
    configs["scheduler"] = files["scheduler/scheduler_config.json"]
    assert replace(from_diffusers(configs), name=config.name) == config
    assert from_diffusers(configs).name == config.name


@pytest.mark.parametrize("model", ["sd1", "pocket"])
def test_a_fine_tuned_folder_is_called_as_its_file_is(model):
    """One that predicts the other way, or has words of its own, is no other model: it has its name and guidance."""
    known = MODELS[model]
    other = {"v": "eps", "eps": "v"}[known.schedule.prediction]
    text, schedule = (replace(known.text[0], vocab=49410),), replace(known.schedule, prediction=other)
    files = to_diffusers_configs(replace(known, text=text, schedule=schedule))
    configs = {name: files[f"{name}/config.json"] for name in ("unet", "vae", "text_encoder")}
    config = from_diffusers({**configs, "scheduler": files["scheduler/scheduler_config.json"]})
    assert config == replace(known, text=text, schedule=schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(prediction="v", zero_snr=True),
        ScheduleConfig(beta_start=0.001, beta_end=0.02),
        ScheduleConfig(steps=4, alpha_bar=(0.9, 0.5, 0.2, 0.1)),
    ],
)
def test_schedules_there_and_back(schedule):
    raw = to_diffusers_configs(replace(SD1, schedule=schedule))["scheduler/scheduler_config.json"]
    back = schedule_from_diffusers(json.loads(json.dumps(raw)))
    if schedule.alpha_bar is None:
        assert back == schedule
    else:
        assert back.alpha_bar == pytest.approx(schedule.alpha_bar, rel=1e-12)


def test_a_linear_schedule():
    table = schedule_from_diffusers(
        {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
    )
    assert table.alpha_bar == pytest.approx((0.9, 0.72, 0.504))
    for raw in ({"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "sample"}, {"trained_betas": "x"}):
        with pytest.raises(CheckpointError):
            schedule_from_diffusers(raw)


def test_variants(folder):
    plain = load_file(folder / UNET_FILE)
    half = {key: tensor.half() for key, tensor in plain.items()}
    save_file(half, folder / UNET_FILE.replace(".safetensors", ".fp16.safetensors"))
    assert weights(folder)["unet.conv_in.weight"].dtype == torch.float32
    assert weights(folder, "fp16")["unet.conv_in.weight"].dtype == torch.float16
    assert weights(folder, "fp16")["vae.quant.weight"].dtype == torch.float32, "which has no such variant"
    (folder / UNET_FILE).unlink()
    with load_checkpoint(folder) as checkpoint:
        assert checkpoint.notes == ("the fp16 files are read, as there are no others",)
    assert weights(folder)["unet.conv_in.weight"].dtype == torch.float16
    with pytest.raises(CheckpointError, match="no files of the variant 'bf16' in it; its variants: fp16"):
        load_checkpoint(folder, "bf16")


def test_several_variants_and_none_without_a_name(folder):
    for name in ("bf16", "q8"):
        shutil.copy(folder / UNET_FILE, folder / UNET_FILE.replace(".safetensors", f".{name}.safetensors"))
    (folder / UNET_FILE).unlink()
    with pytest.raises(CheckpointError, match="has the variants bf16, q8; say which"):
        load_checkpoint(folder)
    assert weights(folder, "q8")["unet.conv_in.weight"].dtype == torch.float32


def test_pickles_are_read_where_there_is_nothing_else(folder):
    expected = weights(folder)
    for file, name in ((UNET_FILE, "diffusion_pytorch_model.bin"), (TEXT_FILE, "pytorch_model.bin")):
        torch.save(load_file(folder / file), (folder / file).with_name(name))
        (folder / file).unlink()
    assert_same(weights(folder), expected)
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"never opened: there is a safetensors file")
    assert_same(weights(folder), expected)


@pytest.mark.parametrize(
    "name, index",
    [
        ("{stem}-{i:05d}-of-{n:05d}.safetensors", None),
        ("{stem}.fp16-{i:05d}-of-{n:05d}.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("part{i}.safetensors", None),
    ],
)
def test_split_files(folder, name, index):
    expected = weights(folder)
    written = split(folder / UNET_FILE, name=name, index=index)
    assert_same(weights(folder), expected)
    with load_checkpoint(written) as checkpoint:
        assert checkpoint.kind == "index" and len(checkpoint.files) == 3
        assert set(checkpoint) == {
            key.removeprefix("unet.") for key in load_checkpoint(folder) if key.startswith("unet.")
        }


def test_a_split_checkpoint(tmp_path):
    """Not a folder of diffusers: one large file in three."""
    save_file(tiny_state(), tmp_path / "model.safetensors")
    index = split(tmp_path / "model.safetensors")
    for path in (index, tmp_path):
        model = StableDiffusion.load(path, config=TINY, device="cpu", dtype="float32")
        assert torch.equal(model.unet.conv_in.weight, tiny_state()["model.diffusion_model.input_blocks.0.0.weight"])


def test_the_moving_average_is_the_main_file(tmp_path):
    """As in published folders; diffusers reads it, so `auto` does, too."""
    state = tiny_state("tiny-v1-full-ema")
    path = write_folder(tmp_path / "model", state, TINY, NETWORKS)
    names = {file.name for file in (path / "unet").iterdir()}
    assert names == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
    }
    key = "unet.conv_in.weight"
    raw, ema = (to_own(convert(state, TINY, which))[key] for which in ("raw", "ema"))
    assert torch.equal(weights(path)[key], ema) and torch.equal(weights(path, which="ema")[key], ema)
    assert torch.equal(weights(path, which="raw")[key], raw) and not torch.equal(raw, ema)
    assert torch.equal(weights(path, "non_ema")[key], raw)
    model = StableDiffusion.load(path, device="cpu", dtype="float32")
    assert "U-Net: its moving average (EMA); --weights raw takes it as trained" in model.about


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_one_part_of_a_folder_or_all_of_it_gives_a_network(folder, tmp_path, part):
    save_file(tiny_state(), tmp_path / "model.safetensors")
    files = [folder / part, folder, folder / (VAE_FILE if part == "vae" else TEXT_FILE)]
    for file in files:
        given = {part: file}
        model = StableDiffusion.load(
            tmp_path / "model.safetensors", config=TINY, device="cpu", dtype="float32", **given
        )
        assert all(p.isfinite().all() for p in model.vae.parameters())


@pytest.mark.parametrize("given", ["unet", UNET_FILE])
def test_a_u_net_given_alone_predicts_what_its_folder_says(tmp_path, given):
    path = write_folder(tmp_path / "model", tiny_state("tiny-v2-v"), TINY_V2)
    eps = replace(TINY_V2, schedule=ScheduleConfig())
    with load_checkpoint(path / given) as checkpoint:
        assert identify(checkpoint, eps).config.schedule.prediction == "eps"
        config, decided, reason = decide(checkpoint, eps, None, by_folder=False)
    assert decided and config.schedule.prediction == "v" and reason == "scheduler_config.json beside it says so"
    # a checkpoint that someone keeps in a folder of its own in there is another model
    (path / "others").mkdir()
    shutil.copy(path / UNET_FILE, path / "others")
    with load_checkpoint(path / "others" / Path(UNET_FILE).name) as checkpoint:
        assert "beside" not in decide(checkpoint, eps, None, by_folder=False)[2]


def test_the_scale_of_a_vae_folder_is_used(folder, tmp_path):
    edit(folder / "vae/config.json", scaling_factor=0.13025)
    assert weights(folder)["vae.quant.weight"] is not None
    assert identify(load_checkpoint(folder)).config.vae.scale == 0.13025
    save_file(tiny_state(), tmp_path / "a.safetensors")
    model = StableDiffusion.load(
        tmp_path / "a.safetensors", config=TINY, device="cpu", dtype="float32", vae=folder / "vae"
    )
    assert model.vae.config.scale == model.config.vae.scale == 0.13025


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"num_attention_heads": 2}])
def test_a_text_encoder_that_computes_something_else_is_refused(folder, tmp_path, change):
    save_file(tiny_state(), tmp_path / "a.safetensors")
    options = {"config": TINY, "device": "cpu", "dtype": "float32", "text_encoder": folder / "text_encoder"}
    StableDiffusion.load(tmp_path / "a.safetensors", **options)
    edit(folder / "text_encoder/config.json", **change)
    with pytest.raises(CheckpointError, match=rf"text_encoder: text_encoder/config.json has {next(iter(change))}"):
        StableDiffusion.load(tmp_path / "a.safetensors", **options)


def test_a_whole_clip_is_a_text_encoder_wherever_it_stands(folder, tmp_path):
    """As its authors publish it: with the part for images, and with the sizes in an inner entry of config.json."""
    expected = weights(folder)
    tensors = load_file(folder / TEXT_FILE) | {
        "vision_model.embeddings.class_embedding": torch.zeros(8), "visual_projection.weight": torch.zeros(8, 8),
        "text_projection.weight": torch.zeros(64, 64), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip
    save_file(tensors, folder / TEXT_FILE)
    assert_same(weights(folder), expected)
    path = folder / "text_encoder/config.json"
    inner = json.loads(path.read_text())
    path.write_text(json.dumps({"architectures": ["CLIPModel"], "text_config": inner, "vision_config": {"width": 1}}))
    assert_same(weights(folder), expected)
    save_file(tiny_state(), tmp_path / "a.safetensors")
    options = {"config": TINY, "device": "cpu", "dtype": "float32"}
    for given in (folder / "text_encoder", folder / TEXT_FILE, folder):
        model = StableDiffusion.load(tmp_path / "a.safetensors", text_encoder=given, **options)
        assert torch.equal(model.text_encoder.norm.bias, expected["text_encoder.norm.bias"])
    # its settings are looked at in each of the places
    path.write_text(json.dumps({"architectures": ["CLIPModel"], "text_config": {**inner, "hidden_act": "gelu"}}))
    for given in (folder / "text_encoder", folder / TEXT_FILE, folder):
        with pytest.raises(CheckpointError, match="hidden_act"):
            StableDiffusion.load(tmp_path / "a.safetensors", text_encoder=given, **options)


def test_a_file_of_a_part_has_the_settings_beside_it(folder, tmp_path):
    """Like the folder of the part: a VAE's scale. Under another name, it is not known whose settings these are."""
    save_file(tiny_state(), tmp_path / "a.safetensors")
    edit(folder / "vae/config.json", scaling_factor=0.13025)
    shutil.copy(folder / VAE_FILE, folder / "vae/mine.safetensors")
    for name, scale in ((VAE_FILE, 0.13025), ("vae", 0.13025), ("vae/mine.safetensors", 0.18215)):
        options = {"config": TINY, "device": "cpu", "dtype": "float32", "vae": folder / name}
        model = StableDiffusion.load(tmp_path / "a.safetensors", **options)
        assert model.vae.config.scale == scale
    for text in ("{", "[]", '{"_class_name": "Other"}'):  # that of another program
        (folder / "vae/config.json").write_text(text)
        with load_checkpoint(folder / VAE_FILE) as file:
            assert file.configs == {}


def test_notes_about_the_files_of_a_folder_are_said(folder, tmp_path):
    """What lies behind the end, and a table that nobody needs: in the model's files and in those given beside."""
    tensors = {**load_file(folder / UNET_FILE), "betas": torch.ones(3, dtype=torch.complex64)}
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET_FILE).unlink()
    torch.save(load_file(folder / VAE_FILE), tmp_path / "vae.pt")
    with open(tmp_path / "vae.pt", "ab") as file:
        file.write(bytes(77))
    model = StableDiffusion.load(folder, device="cpu", dtype="float32", vae=tmp_path / "vae.pt")
    assert any(line.startswith("diffusion_pytorch_model.bin: left out, as it is not needed") for line in model.about)
    assert f"{tmp_path / 'vae.pt'}: the last 77 bytes of the file belong to nothing and are ignored" in model.about


def test_what_a_json_leaves_out_is_customary(folder):
    edit(folder / "text_encoder/config.json", hidden_act=..., max_position_embeddings=..., vocab_size=...)
    edit(folder / "unet/config.json", in_channels=..., use_linear_projection=...)
    (folder / "scheduler/scheduler_config.json").unlink()
    (folder / "tokenizer/tokenizer_config.json").unlink()
    assert replace(identify(load_checkpoint(folder)).config, name=TINY.name) == TINY


# --------------------------------------------------------------------------------------------------- what is refused


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, load_checkpoint(path) as checkpoint:
        identify(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("KolorsPipeline", "Kolors"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("StableDiffusionDepth2ImgPipeline", "depth-to-image"),
        ("StableDiffusionUpscalePipeline", "upscaling"),
        ("StableDiffusionInstructPix2PixPipeline", "instruct-pix2pix"),
        ("StableUnCLIPPipeline", "unCLIP"),
        ("LDMTextToImagePipeline", "LDM text2img-large"),
    ],
)
def test_other_pipelines_are_refused_by_name(folder, name, words):
    edit(folder / "model_index.json", _class_name=name)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("PixArtAlphaPipeline", "PixArtAlpha"),
    ],
)
def test_other_pipelines_have_no_u_net(folder, name, words):
    """What denoises in them is a transformer/; what is left in the folder are a VAE and a text encoder, or nothing."""
    edit(folder / "model_index.json", _class_name=name)
    (folder / "unet").rename(folder / "transformer")
    assert words in refusal(folder)
    with load_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=words):
        identify(checkpoint, TINY)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    assert words in refusal(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "no weights at all" in refusal(folder)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("unet/config.json", {"in_channels": 5}, "depth-to-image"),
        ("unet/config.json", {"in_channels": 7, "num_class_embeds": 1000}, "upscaling"),
        ("unet/config.json", {"in_channels": 8}, "instruct-pix2pix"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "Kandinsky"),
        ("unet/config.json", {"transformer_layers_per_block": [[1, 2], [1], [1]]}, "transformer_layers_per_block"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"]}, "has 'AttnDownBlock2D' in down_block_types"),
        ("unet/config.json", {"block_out_channels": "many"}, "no model that is known"),
        ("unet/config.json", {"block_out_channels": [10**9] * 3}, "no model that is known"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "relu"),
        ("text_encoder/config.json", {"intermediate_size": 7}, "intermediate_size"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "no model that is known"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "no model that is known"),
        ("vae/config.json", {"block_out_channels": 5}, "no model that is known"),
        ("vae/config.json", {"scaling_factor": "large"}, "no model that is known"),
        ("unet/config.json", {"sample_size": 10**9}, "no model that is known"),
        ("unet/config.json", {"attention_head_dim": [1]}, "no model that is known"),
    ],
)
def test_what_is_not_known_is_refused_by_name(folder, file, changes, words):
    edit(folder / file, **changes)
    assert words in refusal(folder)


def test_a_version_in_a_name_is_no_ending(tmp_path):
    """A folder keeps its whole name, and a file all but a known ending: of LoRAs, of words and of sidecars, too."""
    for name in ("dreamlike-photoreal-2.0", "v1.5"):
        (tmp_path / name).mkdir()
        assert model_name(tmp_path / name) == name
        assert [model_name(Path(name + end)) for end in (".safetensors", ".CKPT", ".bin", "")] == [name] * 4
    assert model_name(tmp_path / "v1.5" / "..") == tmp_path.name
    file = tmp_path / "v1.5" / "pretty-2.0"
    save_file({"<*>": torch.ones(1, 64)}, file)
    assert list(read_embedding(file, 64, 75)) == [lora_name(file)] == ["pretty-2.0"]
    assert lora_name(file.with_name("pytorch_lora_weights.bin")) == "v1.5"
    file.with_name("pretty-2.0.yaml").write_text("parameterization: v")
    with load_checkpoint(file) as checkpoint:
        assert read_beside(checkpoint)[0] == "v"


def test_folders_without_a_model(tmp_path):
    assert "a folder that is not a diffusers model (no model_index.json" in refusal(tmp_path)
    (tmp_path / "b.ckpt").touch()
    (tmp_path / "a.safetensors").touch()
    assert "give the checkpoint file inside it (a.safetensors, b.ckpt)" in refusal(tmp_path)


def test_a_part_that_is_missing_is_said(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="no vae: give it with --vae"):
        StableDiffusion.load(folder, device="cpu", dtype="float32")
    shutil.rmtree(folder / "unet")
    assert "a text encoder alone" in refusal(folder)


def test_broken_json(folder):
    for text in ("{", "[]", "\x00", "[" * 100_000):
        (folder / "unet/config.json").write_text(text)
        assert "config.json in it is not valid JSON" in refusal(folder)
    (folder / "unet/config.json").write_text("{" + " " * (1 << 20) + "}")
    assert "more than 1 MB, the limit" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "C:x", "a\\b", 5]
)
def test_an_index_names_files_beside_it_only(folder, name):
    (folder / UNET_FILE).unlink()
    (folder / f"{UNET_FILE}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    assert "which is no file beside it" in refusal(folder)


def test_indexes_that_do_not_fit(folder):
    index = split(folder / UNET_FILE)
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    for changes, words in (
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {**good["weight_map"], "new.weight": good["weight_map"][first]}}, "'new.weight' is not in it"),
        ({"weight_map": {k: v for k, v in good["weight_map"].items() if k != first}}, "in it, but not in the index"),
        ({"weight_map": {**good["weight_map"], first: "gone.safetensors"}}, "no such file"),
    ):
        index.write_text(json.dumps(changes))
        assert words in refusal(folder), words
    index.write_text(json.dumps(good))
    assert "one of 3 parts of a model; give the .index.json" in refusal(
        folder / f"{UNET_FILE[:-12]}-00001-of-00003.safetensors"
    )


def test_files_of_a_folder_are_read_as_carefully_as_any(folder):
    (folder / UNET_FILE).write_bytes(b"<html>log in</html>")
    assert "a web page" in refusal(folder)


def test_sd2_has_its_pad_by_its_tokenizer_or_its_activation(tmp_path):
    path = write_folder(tmp_path / "model", tiny_state("tiny-v2-v"), TINY_V2)
    config = json.loads((path / "tokenizer/tokenizer_config.json").read_text())
    assert config["pad_token"] == "!" and identify(load_checkpoint(path)).config.text[0].pad == 0
    edit(path / "tokenizer/tokenizer_config.json", pad_token={"content": "<|endoftext|>", "lstrip": False})
    assert identify(load_checkpoint(path)).config.text[0].pad == 49407
    (path / "tokenizer/tokenizer_config.json").unlink()
    assert identify(load_checkpoint(path)).config.text[0].pad == 0
    assert SD2_V.text[0].pad == 0


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"]
)
@pytest.mark.sampled(4)
def test_nonsense_in_a_json_is_one_clear_error(folder, file):
    """Each entry in turn replaced by things of other kinds: it loads, or is refused in one line."""
    good = (folder / file).read_text()
    for key in json.loads(good):
        for value in (None, -1, 1e300, "x", [], {}, [[1]], True):
            (folder / file).write_text(json.dumps({**json.loads(good), key: value}))
            try:
                with load_checkpoint(folder) as checkpoint:
                    identify(checkpoint)
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_nonsense_in_a_part_given_alone(folder):
    for name in ("vae", "unet", "text_encoder"):
        edit(folder / name / "config.json", architectures=5, _class_name=["x"])
        with load_checkpoint(folder / name) as checkpoint:
            assert checkpoint.configs == {}

"""Control networks in files: every form, against the original's outputs and diffusers; what is refused; conversion."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import TINY, TINY_INPAINT, TINY_V2, TINY_XL, Golden, error, manifest, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from test_folders import edit, write_folder
from test_inspect import info, sparse_file

from scripts import convert
from sd import SD1, SD1_INPAINT, SD2_V, SDXL, SDXL_REFINER, StableDiffusion
from sd.adapters.lora_formats import read_lora
from sd.adapters.textual_inversion import read_embedding
from sd.checkpoints import supported_settings
from sd.checkpoints.checkpoint import CheckpointError, OpenFile, load_checkpoint
from sd.checkpoints.control_detect import CONTROL_KEY, check_fits, control_name, family, identify_control
from sd.checkpoints.control_export import check_control_writable, control_files, control_to_diffusers
from sd.checkpoints.control_files import load_control
from sd.checkpoints.control_maps import ControlLayout
from sd.checkpoints.detect import identify
from sd.checkpoints.key_maps import UNET
from sd.checkpoints.loading import LoadOptions, ModelFiles
from sd.conditioning import Conditioning
from sd.config import MODELS, Config
from sd.control import SOFT, with_control
from sd.control_config import ControlConfig
from sd.models.build import build_control, control_shapes
from sd.models.controlnet import ControlNet
from sd.runtime.kernel_choice import prefer
from sd.runtime.optimize import optimize

State = dict[str, torch.Tensor]
CPU = torch.device("cpu")
PREFIX = "control_model."
MODEL = {"v1": TINY, "v2": TINY_V2}
BASE = {"v1": "tiny-v1", "v2": "tiny-v2-v"}
CONTEXTS = {"v1": "contexts_tiny_v1", "v2": "contexts_tiny_v2_v"}
# The arguments of diffusers' ControlNetModel, written down by hand from the originals' YAML files
THEIRS = {
    "v1": {
        "block_out_channels": [64, 128, 128], "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    },
    "v2": {
        "block_out_channels": [64, 128, 192], "layers_per_block": 2, "cross_attention_dim": 96,
        "attention_head_dim": [2, 4, 6], "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    },
}  # fmt: skip
XL = {
    "block_out_channels": [64, 128, 192], "layers_per_block": 2, "cross_attention_dim": 160,
    "attention_head_dim": [2, 4, 6], "use_linear_projection": True, "transformer_layers_per_block": [1, 1, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1632,
}  # fmt: skip
PLAIN = {"down_block_types": ["DownBlock2D"] * 3}
XL_KINDS = {
    "whole": {},
    "mid": {
        "transformer_layers_per_block": [0, 0, 1],
        "down_block_types": ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"],
    },
    "small": PLAIN | {"transformer_layers_per_block": [0, 0, 0]},  # whose middle has a transformer without blocks
    "bare": {"transformer_layers_per_block": [0, 0, 0]},  # and whose levels have such ones as well
    "plain": PLAIN | {"mid_block_type": "UNetMidBlock2D"},
    "other hint": {"conditioning_embedding_out_channels": [16, 32, 64, 128]},
}


def original(n: str) -> State:
    """The tiny control network in the original's names, control_model.*."""
    return reference.make_state_dict(manifest(f"tiny-control-{n}"))


def stripped(state: State) -> State:
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def half(state: State) -> State:
    return {key: tensor.half() for key, tensor in state.items()}


@lru_cache
def networks(n: str) -> dict[str, torch.nn.Module]:
    return loaded(tiny_state(BASE[n]), MODEL[n])


def load(path: Path, base: Config = TINY, **options) -> ControlNet:
    return load_control(path, base, CPU, torch.float32, **options)[0]


def refusal(path: Path, base: Config = TINY, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_control(path, base, CPU, torch.float32, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def saved(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    return path


def same(control: ControlNet, expected: ControlNet) -> bool:
    ours, theirs = control.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def random_weights(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights at which every part of a network does something, zero convolutions included."""
    rng = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        norm = weight.dim() == 1 and name.endswith("weight")
        weight.copy_(0.1 * noise + norm if weight.dim() == 1 else noise / weight[0].numel() ** 0.5)
    return network.eval()


def controlnet(arguments: dict) -> torch.nn.Module:
    """diffusers' network."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.ControlNetModel(**arguments)


def written(layout: str, control: ControlNet) -> State:
    """Its weights in a layout."""
    tensors, _ = control_files(layout, control.state_dict(), control.control_config)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def tiny_control(tmp_path_factory) -> dict[str, ControlNet]:
    root = tmp_path_factory.mktemp("tiny")
    return {n: load(saved(root / f"{n}.safetensors", original(n)), MODEL[n]) for n in MODEL}


# ------------------------------------------------------------------------------------------------------- the original


@pytest.mark.parametrize("n", MODEL)
def test_the_original_s_outputs(tiny_control, n):
    """Hint block, every residual, and what the controlled U-Net predicts, in each way of using them."""
    golden, control, unet = Golden(f"tiny_control_{n}_components"), tiny_control[n], networks(n)["unet"]
    x, t, context = golden["x"], torch.tensor(golden.case["t"]), Golden(CONTEXTS[n])["cond"]
    sides = 8 * x.shape[2], 8 * x.shape[3]
    hint = (256 * reference.uniform(f"{golden.name}/hint", (2, 3, *sides))).floor() / 255
    features = control.embed(hint)
    assert error(features, golden["guided_hint"]) < 1e-5
    assert error(control.embed(hint.flip(1)), golden["guided_hint"]) > 1e-2  # blue first shows
    down, middle = control(x, t, Conditioning(context), features)
    for i, residual in enumerate((*down, middle)):
        assert error(residual, golden[f"control.{i}"]) < 1e-5, i
    for scale, name in ((1.0, "eps"), (0.6, "eps_strength_06"), (0.0, "eps_plain")):
        assert error(with_control(unet, control, hint, scale)(x, t, Conditioning(context)), golden[name]) < 2e-5, name
    assert error(unet(x, t, Conditioning(context), middle=middle), golden["eps_mid"]) < 2e-5
    scales = [SOFT ** (len(down) - i) for i in range(len(down) + 1)]
    assert scales == pytest.approx(golden.case["guess_scales"])
    soft = [residual * scale for residual, scale in zip(down, scales, strict=False)]
    assert error(unet(x, t, Conditioning(context), soft, middle), golden["eps_guess"]) < 2e-5


@pytest.mark.parametrize("n", MODEL)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_names_are_one_to_one(n, layout):
    config = ControlConfig.of(MODEL[n].unet)
    keys = control_shapes(config)
    table = ControlLayout(layout, "").sources(config, keys)
    theirs = [source.key for source in table.values()]
    assert len(set(theirs)) == len(theirs) == len(keys) == len(original(n))
    expected = stripped(original(n)) if layout == "original" else controlnet(THEIRS[n]).state_dict()
    assert set(theirs) == set(expected)


COUNTS = {"controlnet-sd15": (SD1, 361_279_120), "controlnet-sd21": (SD2_V, 364_228_240)}


@pytest.mark.parametrize("name", COUNTS)
def test_full_size(tmp_path, name):
    """Recognised by its shapes alone; all of its 340 tensors are accounted for."""
    model, numbers = COUNTS[name]
    config = ControlConfig.of(model.unet, name=name)
    with load_checkpoint(sparse_file(tmp_path / f"{name}.safetensors", name, half=True)) as file:
        found = identify_control(file)
    assert (found.config, found.layout, found.notes) == (config, ControlLayout("original", PREFIX), ())
    shapes = control_shapes(config)
    assert len(shapes) == 340 and sum(torch.Size(shape).numel() for shape in shapes.values()) == numbers
    for layout, prefix in (("original", PREFIX), ("diffusers", "")):
        table = ControlLayout(layout, prefix).sources(config, shapes)
        if layout == "original":
            assert {source.key for source in table.values()} == set(manifest(name))
        else:
            with torch.device("meta"):
                theirs = controlnet(control_to_diffusers(config)).state_dict()
            shaped = {s.key: (*shapes[key], *(1,) * s.ones) for key, s in table.items()}
            assert shaped == {key: tuple(weight.shape) for key, weight in theirs.items()}


# ---------------------------------------------------------------------------------------------------- forms of files


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_control) -> dict[str, Path]:
    """The control network of tiny v1 in every form: name -> file or folder."""
    root = tmp_path_factory.mktemp("controls")
    state, control = original("v1"), tiny_control["v1"]
    whole = tiny_state() | {"logvar": torch.zeros(1000)} | state
    torch.save({"epoch": 1, "state_dict": whole}, root / "control_sd15_canny.pth")
    torch.save({"state_dict": {"state_dict": stripped(state)}}, root / "nested.pth")
    torch.save(state, root / "legacy.ckpt", _use_new_zipfile_serialization=False)
    saved(root / "pruned.safetensors", stripped(state))
    saved(root / "prefixed.safetensors", state)
    saved(root / "wrapped.safetensors", prefixed("module.", state))
    saved(root / "own.safetensors", *control_files("sd", control.state_dict(), control.control_config))
    theirs = written("diffusers", control)
    saved(root / "single.safetensors", theirs)
    saved(root / "inner.safetensors", prefixed("controlnet.", theirs))
    for folder in ("folder", "halves", "pipeline/controlnet", "pipeline/unet"):
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel", **THEIRS["v1"]}))
        save_file(theirs, root / folder / "diffusion_pytorch_model.safetensors")
    save_file(half(theirs), root / "halves/diffusion_pytorch_model.fp16.safetensors")
    torch.save(theirs, root / "folder/diffusion_pytorch_model.bin")
    saved(root / "half.safetensors", half(stripped(state)))
    return {path.name: path for path in root.iterdir()}


FORMS = (
    "control_sd15_canny.pth", "nested.pth", "legacy.ckpt", "pruned.safetensors", "prefixed.safetensors",
    "wrapped.safetensors", "own.safetensors", "single.safetensors", "inner.safetensors", "folder", "halves", "pipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file(files, tiny_control, name):
    control, notes = load_control(files[name], TINY, CPU, torch.float32)
    assert same(control, tiny_control["v1"])
    config = control.control_config
    assert replace(config, name="x") == ControlConfig.of(TINY.unet, name="x")
    expected = {
        "control_sd15_canny.pth": "a whole checkpoint: only its control network is read, not the other ",
        "pipeline": "the folder of a whole model: its controlnet/ is read",
    }
    if name == "pipeline":  # the folder inside, given itself, is no whole model
        assert load_control(files[name] / "controlnet", TINY, CPU, torch.float32)[1] == ()
    assert len(notes) == (name in expected) and all(note.startswith(expected[name]) for note in notes)
    assert not any(weight.requires_grad for weight in control.parameters()) and not control.training


def test_the_name_is_that_of_the_file_or_its_folder(files, tmp_path):
    assert load(files["folder"]).control_config.name == "folder"
    assert load(files["folder"] / "diffusion_pytorch_model.safetensors").control_config.name == "folder"
    assert load(files["nested.pth"]).control_config.name == "nested"
    snapshot = tmp_path / "models--someone--control-canny/snapshots/abc"
    snapshot.mkdir(parents=True)
    saved(snapshot / "diffusion_pytorch_model.safetensors", stripped(original("v1")))
    for path in (snapshot / "diffusion_pytorch_model.safetensors", snapshot, snapshot.parents[1]):
        assert load(path).control_config.name == "control-canny"
    (snapshot / "depth").mkdir()
    for path in (snapshot / "depth/diffusion_pytorch_model.safetensors", snapshot / "depth.safetensors"):
        assert load(saved(path, stripped(original("v1")))).control_config.name == "depth"


def test_the_default_name_in_a_model(files, tmp_path):
    """That of the file or folder, whose ".0" is no ending; where tools call every file the same, of its folder."""
    state, model = stripped(original("v1")), StableDiffusion(TINY, **networks("v1"))
    (tmp_path / "canny-sdxl-1.0").mkdir()
    shutil.copy(files["folder"] / "config.json", tmp_path / "canny-sdxl-1.0")
    saved(tmp_path / "canny-sdxl-1.0/diffusion_pytorch_model.safetensors", state)
    saved(tmp_path / "v1.5 canny.safetensors", state)
    for path, name in (
        ("canny-sdxl-1.0", "canny-sdxl-1.0"),
        ("canny-sdxl-1.0/diffusion_pytorch_model.safetensors", "canny-sdxl-1.0"),
        ("v1.5 canny.safetensors", "v1.5 canny"),
    ):
        assert control_name(tmp_path / path) == name
        model.add_control(tmp_path / path, note=lambda line: None)
        assert [*model.controls] == [name]
        model.remove_control(name)


def test_half_precision(files, tiny_control):
    full = tiny_control["v1"].state_dict()
    for path, variant in ((files["half.safetensors"], None), (files["halves"], "fp16")):
        control = load_control(path, TINY, CPU, torch.float16, variant=variant)[0]
        assert all(torch.equal(weight, full[key].half()) for key, weight in control.state_dict().items())


def test_only_the_control_network_is_read(files, monkeypatch):
    read, tensor = [], OpenFile.tensor
    monkeypatch.setattr(OpenFile, "tensor", lambda self, view: read.append(view) or tensor(self, view))
    counted: list[int] = []
    control = load(files["control_sd15_canny.pth"], progress=counted.append)
    assert len(read) == len(counted) == 170
    assert sum(counted) == sum(weight.numel() for weight in control.parameters())


@pytest.mark.parametrize("kind", XL_KINDS)
def test_diffusers_networks_of_sdxl(tmp_path, kind):
    """Random networks: whole, with fewer transformers, without any. Outputs agree, and the way back loads strictly."""
    arguments = XL | XL_KINDS[kind]
    theirs = random_weights(controlnet(arguments))
    path = saved(tmp_path / "a.safetensors", theirs.state_dict())
    control = load(path, TINY_XL)
    config = control.control_config
    assert config.fits(TINY_XL.unet) and config.unet.vector == 1632
    assert config.attends == (kind in ("whole", "mid", "other hint"))
    assert config.bare == {"small": (3,), "bare": (1, 2, 3)}.get(kind, ())
    assert ControlConfig.from_json(config.to_json()) == config
    compare(control, theirs)
    again = controlnet(control_to_diffusers(config))
    again.load_state_dict(written("diffusers", control), strict=True)
    compare(control, again)
    assert same(load(saved(tmp_path / "b.safetensors", written("original", control)), TINY_XL), control)
    own = saved(tmp_path / "c.safetensors", *control_files("sd", control.state_dict(), config))
    assert same(load(own, TINY_XL), control) and load(own, TINY_XL).control_config == config


@pytest.mark.parametrize("n", MODEL)
def test_diffusers_has_the_same_network(tiny_control, n):
    """A converted file loads strictly there, and gives the same residuals."""
    control = tiny_control[n]
    theirs = controlnet(THEIRS[n])
    theirs.load_state_dict(written("diffusers", control), strict=True)
    compare(control, theirs)
    config, ours = json.loads(json.dumps(dict(theirs.config))), control_to_diffusers(control.control_config)
    assert {key: config[key] for key in ours} == ours


def compare(control: ControlNet, theirs: torch.nn.Module) -> None:
    """Residuals of ours and of diffusers' network agree; the first of the network's inputs is a batch of two."""
    unet = control.control_config.unet
    x, hint = reference.normal("x", (2, 4, 8, 12)), reference.uniform("hint", (2, 3, 64, 96))
    context, t = reference.normal("context", (2, 7, unet.context)), torch.tensor([21, 601])
    vector, more = None, {}
    if unet.vector is not None:
        sizes = torch.tensor([[128.0, 96.0, 0.0, 0.0, 128.0, 96.0]] * 2)
        pooled = reference.normal("pooled", (2, unet.vector - 6 * 256))
        vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=1)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    theirs.eval()
    down, middle = theirs(x, t, context, hint, return_dict=False, **more)
    ours = control(x, t, Conditioning(context, vector), control.embed(hint))
    assert len(ours.down) == len(down)
    for a, b in zip((*ours.down, ours.middle), (*down, middle), strict=True):
        assert error(a, b) < 1e-5


def test_what_only_a_folder_says(files, tmp_path, tiny_control):
    """Order of the hint's colours, averaged residuals, and heads."""
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(load_file(files["single.safetensors"]), folder / "diffusion_pytorch_model.safetensors")

    def loaded_with(**settings) -> ControlNet:
        (folder / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel", **THEIRS["v1"], **settings}))
        return load(folder)

    control, hint = loaded_with(controlnet_conditioning_channel_order="bgr"), reference.uniform("h", (1, 3, 16, 24))
    assert control.control_config.bgr and torch.equal(control.embed(hint.flip(1)), tiny_control["v1"].embed(hint))
    control = loaded_with(global_pool_conditions=True)
    residuals = control(torch.zeros(1, 4, 2, 3), torch.tensor([5]), torch.zeros(1, 7, 64), control.embed(hint))
    assert control.control_config.pooled and residuals.middle.shape[-2:] == (1, 1)
    assert loaded_with(attention_head_dim=[2, 4, 2]).control_config.unet.heads == (2, 4, 2)
    assert loaded_with(num_attention_heads=2).control_config.unet.heads == (2, 2, 2)
    for setting, value in (
        ("norm_eps", 1e-6), ("conditioning_channels", 4), ("class_embed_type", "timestep"),
        ("controlnet_conditioning_channel_order", "gbr"), ("act_fn", "relu"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"config\.json has {setting} .*, which is not supported: expected"):
            loaded_with(**{setting: value})


def test_every_setting_of_diffusers_is_known(files, tmp_path):
    """It is a size that shows in the weights, or has one of the values supported here; others get a note."""
    diffusers = pytest.importorskip("diffusers")
    arguments = set(inspect.signature(diffusers.ControlNetModel.__init__).parameters) - {"self"}
    assert arguments <= {*supported_settings.CONTROL, *supported_settings.FREE["control"].split()}
    folder = tmp_path / "folder"
    shutil.copytree(files["folder"], folder)
    content = json.loads((folder / "config.json").read_text()) | {"later": 3}
    (folder / "config.json").write_text(json.dumps(content))
    assert load_control(folder, TINY, CPU, torch.float32)[1] == (
        "config.json has later 3, which is unknown and ignored",
    )


def test_a_pipeline_with_a_control_network_is_a_model_and_a_control_network(files, tmp_path, tiny_control):
    folder = write_folder(tmp_path / "model", tiny_state(), TINY)
    shutil.copytree(files["folder"], folder / "controlnet")
    edit(folder / "model_index.json", _class_name="StableDiffusionControlNetPipeline")
    with ModelFiles(folder, LoadOptions()) as model:
        assert model.config.unet == TINY.unet and "in the folder, but not used: controlnet/" in model.about()
    assert same(load(folder), tiny_control["v1"])


def test_a_network_for_colours_is_known_by_its_name(tmp_path):
    for name in ("control_v11e_sd15_shuffle.safetensors", "control_v11p_sd15_canny.safetensors"):
        control, notes = load_control(saved(tmp_path / name, stripped(original("v1"))), TINY, CPU, torch.float32)
        averaged = "shuffle" in name
        assert control.control_config.pooled == averaged == bool(notes)
    assert not averaged


def test_a_network_for_inpainting_is_doubtful(tmp_path):
    path = saved(tmp_path / "control_v11p_sd15_inpaint.safetensors", stripped(original("v1")))
    (note,) = load_control(path, TINY, CPU, torch.float32)[1]
    assert "expect -1 in the hint where the mask is, which an image cannot contain" in note
    depth = saved(tmp_path / "control_sd15_inpaint_depth_hand_fp16.safetensors", stripped(original("v1")))
    assert load_control(depth, TINY, CPU, torch.float32)[1] == ()  # its hints are depth maps


def test_heads_are_those_of_the_model(tmp_path):
    """They are in no original file. Without a model, they are those of the family, or one for 64 channels."""
    path = saved(tmp_path / "a.safetensors", original("v1"))
    assert load(path).control_config.unet.heads == (4, 4, 4)
    with load_checkpoint(path) as file:
        found = identify_control(file)
    assert found.config.unet.heads == (1, 2, 2)
    assert found.notes == (
        "how many attention heads it has is not in the file: taken to be 1, 2, 2 (one for 64 channels)",
    )


# ------------------------------------------------------------------------------------------------------- differences


def differences(state: State, unet: State) -> State:
    """As other programs make them: the U-Net is subtracted from the weights that it has as well."""
    base = {key.replace(UNET, PREFIX): tensor for key, tensor in unet.items()}
    return {key: tensor - base[key] if key in base else tensor for key, tensor in state.items()}


@pytest.fixture(scope="module")
def difference(tmp_path_factory) -> Path:
    state = differences(original("v1"), tiny_state()) | {"difference": torch.tensor(1.0)}
    return saved(tmp_path_factory.mktemp("difference") / "diff_canny.safetensors", state)


def test_differences_are_added_to_the_model_s_own_weights(difference, tiny_control):
    """Also where they are packed in memory: those are read in plain form, and packed again afterwards."""
    with prefer("packed"):
        unet = optimize(loaded(tiny_state(), TINY)["unet"])
        x, t, context = torch.zeros(1, 4, 8, 8), torch.tensor([5.0]), torch.zeros(1, 7, 64)
        before = unet(x, t, context)
        control, notes = load_control(difference, TINY, CPU, torch.float32, unet.state_dict)
        assert torch.equal(unet(x, t, context), before)
    expected = tiny_control["v1"].state_dict()
    assert all(error(weight, expected[key]) < 1e-6 for key, weight in control.state_dict().items())
    assert notes == ("its weights are differences from those of a U-Net: they are added to the model's own",)
    changed = {key: 2 * weight for key, weight in unet.state_dict().items()}  # as with another model, or a LoRA in it
    other = load_control(difference, TINY, CPU, torch.float32, lambda: prefixed("_orig_mod.", changed))[0].state_dict()
    assert error(other["down.0.res.0.conv1.weight"], expected["down.0.res.0.conv1.weight"]) > 0.1
    assert torch.equal(other["zero.0.weight"], expected["zero.0.weight"])


def test_differences_for_an_inpainting_model(difference):
    """Its first convolution takes a mask, too: the channels of the latents are those of an ordinary model."""
    unet = loaded(tiny_state("tiny-v1-inpainting"), TINY_INPAINT)["unet"].state_dict()
    control = load_control(difference, TINY_INPAINT, CPU, torch.float32, lambda: unet)[0]
    first = "input_blocks.0.0.weight"
    expected = original("v1")[PREFIX + first] - tiny_state()[UNET + first] + unet["conv_in.weight"][:, :4]
    assert error(control.conv_in.weight, expected) < 1e-6


def test_differences_of_zero_may_be_left_out(difference, tmp_path, tiny_control, capsys):
    """As other programs do for weights that training did not change: those are the model's own. Hint and zero
    convolutions are no differences, so they have to be there."""
    state, unet = load_file(difference), loaded(tiny_state("tiny-v1-inpainting"), TINY_INPAINT)["unet"].state_dict()
    gone = {"time_embed.0.bias": "time.0.bias", "input_blocks.1.0.out_layers.3.weight": "down.0.res.0.conv2.weight"}
    for key in gone:
        del state[PREFIX + key]
    path = saved(tmp_path / "diff.safetensors", state)
    control, notes = load_control(path, TINY_INPAINT, CPU, torch.float32, lambda: unet)
    expected = tiny_control["v1"].state_dict()
    for key, weight in control.state_dict().items():
        if key in gone.values():
            assert torch.equal(weight, unet[key])
        elif key.startswith(("hint.", "zero")):
            assert torch.equal(weight, expected[key])
    assert notes == (
        "its weights are differences from those of a U-Net: they are added to the model's own",
        "without a difference, so the model's own: 2 weights of 170",
    )
    said = info(path, capsys=capsys)
    assert said["missing"] == "nothing" and said["control"].startswith("168 weights, ")
    less = {key: weight for key, weight in unet.items() if key != "time.0.bias"}
    assert refusal(path, TINY_INPAINT, unet=lambda: less) == (
        "differences from another U-Net: the model has no time.0.bias"
    )
    for key in ("zero_convs.3.0.bias", "input_hint_block.4.bias", "middle_block_out.0.bias"):
        kept = {name: tensor for name, tensor in state.items() if name != PREFIX + key}
        path = saved(tmp_path / "damaged.safetensors", kept)
        assert refusal(path, TINY_INPAINT, unet=lambda: unet) == (
            f"1 weight of 170 of the control network missing from the file: {PREFIX}{key}; download it again"
        )
        assert info(path, capsys=capsys)["missing"] == f"1 of 170 weights: 1: {PREFIX}{key}"


def test_differences_without_a_model(difference):
    assert refusal(difference) == "its weights are differences from those of a U-Net: load it into a model"
    wrong = {"down.0.res.0.conv1.weight": torch.zeros(64, 32, 3, 3)}
    assert refusal(difference, unet=lambda: wrong) == (
        "differences from another U-Net: down.0.res.0.conv1.weight is 64x32x3x3 in the model, expected 64x64x3x3"
    )


# -------------------------------------------------------------------------------------------------- another family


def test_a_network_of_another_family_is_refused():
    """In one line that names both."""

    def said(own: Config, model: Config) -> str:
        with pytest.raises(CheckpointError) as caught:
            check_fits(ControlConfig.of(own.unet), model.unet, model.name)
        return str(caught.value)

    assert said(SD2_V, SD1) == (
        "a control network for Stable Diffusion 2.x; the model is Stable Diffusion 1.x: give one that was made for it"
    )
    assert "for Stable Diffusion 1.x; the model is Stable Diffusion 2.x:" in said(SD1, SD2_V)
    assert "for SDXL; the model is Stable Diffusion 1.x:" in said(SDXL, SD1)
    assert "for SDXL; the model is SDXL refiner:" in said(SDXL, SDXL_REFINER)
    assert "for pocket; the model is SDXL:" in said(MODELS["pocket"], SDXL)
    small = replace(SD1, unet=replace(SD1.unet, blocks=1))
    assert "for Stable Diffusion 1.x; the model is Stable Diffusion 1.x, small U-Net:" in said(SD1, small)
    sizes = "64, 128, 128 channels, 1 block a level, 4 input channels, context 64, no vector"
    assert f"for another model ({sizes}); the model is Stable Diffusion 1.x:" in said(TINY, SD1)
    assert "the model is tiny v2 (64, 128, 192 channels, 2 blocks a level, " in said(TINY, TINY_V2)
    for model in (SD1, SD1_INPAINT):
        check_fits(ControlConfig.of(SD1.unet), model.unet, model.name)
    plain = ControlConfig(replace(SDXL.unet, depth=(0, 0, 0), middle_depth=0), bare=(3,))
    assert plain.fits(SDXL.unet) and family(plain.unet, plain.attends) == "SDXL"


def test_a_file_of_another_family_is_refused(tmp_path):
    path = sparse_file(tmp_path / "a.safetensors", "controlnet-sd21", half=True)
    assert refusal(path, SD1).startswith(
        "a control network for Stable Diffusion 2.x; the model is Stable Diffusion 1.x"
    )
    assert "the model is tiny v1 (64, 128, 128 channels" in refusal(path)


# ------------------------------------------------------------------------------------------------------ other kinds

OTHERS = {
    "Control-LoRA": ({"lora_controlnet": (), "input_hint_block.0.weight": (16, 3, 3, 3)}, "this is a Control-LoRA"),
    "LLLite": ({"lllite_unet_input_blocks_1_1_x.down.0.weight": (4, 320)}, "this is a ControlNet-LLLite"),
    "XS of diffusers": (
        {"down_blocks.0.base_to_ctrl.0.weight": (4, 320), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
        "this is a ControlNet-XS",
    ),
    "XS": (
        {"control_model.enc_zero_convs_out.0.weight": (4, 4), "control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
        "this is a ControlNet-XS",
    ),
    "union": (
        {"task_embedding": (6, 320), "controlnet_down_blocks.0.weight": (320, 320, 1, 1)},
        "this is a union ControlNet (one network for several kinds of hints, also called ProMax), an addition",
    ),
    "ProMax": (
        {"control_add_embedding.linear_1.weight": (1280, 2048), "controlnet_mid_block.weight": (1280, 1280, 1, 1)},
        "this is a union ControlNet",
    ),
    "T2I-Adapter of styles": (
        {
            "style_embedding": (1, 8, 1024), "proj": (1024, 768), "ln_pre.weight": (1024,),
            "transformer_layes.0.attn.in_proj_weight": (3072, 1024),
        },
        "this is a T2I-Adapter",
    ),
    "T2I-Adapter": ({"body.0.block1.weight": (320, 320, 3, 3)}, "this is a T2I-Adapter"),
    "T2I-Adapter of diffusers": ({"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "this is a T2I-Adapter"),
    "IP-Adapter": ({"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}, "this is an IP-Adapter"),
    "SD3": (
        {"controlnet_blocks.0.weight": (1536, 1536), "transformer_blocks.0.attn.to_q.weight": (1536, 1536)},
        "this is a ControlNet for SD3, Flux or another diffusion transformer, which is not supported (only",
    ),
    "Flux": (
        {"controlnet_x_embedder.weight": (3072, 64), "single_transformer_blocks.0.attn.to_q.weight": (8, 8)},
        "this is a ControlNet for SD3, Flux or another",
    ),
    "Flux of XLabs": (
        {"controlnet_blocks.0.weight": (3072, 3072), "input_hint_block.0.weight": (16, 3, 3, 3)},
        "this is a ControlNet for SD3, Flux or another",
    ),
    "BrushNet": ({"brushnet_down_blocks.0.weight": (320, 320, 1, 1)}, "this is a BrushNet"),
    "quantised": (
        {"control_model.zero_convs.0.0.weight": (8, 8), "control_model.time_embed.0.weight.absmax": (4,)},
        "this file is quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_control_are_refused_by_name(tmp_path, name):
    """With --control, and as a checkpoint, a VAE or a LoRA."""
    shapes, words = OTHERS[name]
    path = saved(tmp_path / "a.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()})
    assert refusal(path).startswith(words)
    with load_checkpoint(path) as file, pytest.raises(CheckpointError) as caught:
        identify(file)
    assert str(caught.value).startswith(words)


def test_files_of_something_else_are_refused_by_name(tmp_path):
    vae, text = "first_stage_model.", "cond_stage_model."

    def said(name: str, state: State, **more) -> str:
        return refusal(saved(tmp_path / f"{name}.safetensors", state), **more)

    def part(prefix: str) -> State:
        return {key: tensor for key, tensor in tiny_state().items() if key.startswith(prefix)}

    path = sparse_file(tmp_path / "sd.safetensors", "sd-v1", half=True)
    assert refusal(path) == "no control network in it: this is a checkpoint (Stable Diffusion 1.x); give it with --ckpt"
    assert said("model", tiny_state()) == "no control network in it: this is a checkpoint; give it with --ckpt"
    assert "this is a VAE alone: give it with --vae" in said("vae", part(vae))
    assert "this is a text encoder alone: give it with --text-encoder" in said("text", part(text))
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}
    assert said("lora", lora) == "this is a LoRA, an addition to a checkpoint, not a checkpoint: give it with --lora"
    assert "give it with --embedding" in said("embedding", {"emb_params": torch.zeros(2, 768)})
    assert said("nothing", {"a.weight": torch.zeros(3, 3)}) == (
        "no control network among its 1 tensor (a.weight): give a ControlNet"
    )
    assert "an image upscaler (ESRGAN)" in said("esrgan", {"conv_first.weight": torch.zeros(64, 3, 3, 3)})
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    assert "a web page" in refusal(tmp_path / "page.pth")


GIVEN = "this is a ControlNet, an addition to a checkpoint, not a checkpoint: give it with --control"


@pytest.mark.parametrize("name", FORMS[:-1])
def test_a_control_file_in_place_of_another(files, name, tmp_path, tiny):
    """As a checkpoint, a VAE, a text encoder, a LoRA, an embedding: it says how to give it."""
    path = files[name]
    with pytest.raises(CheckpointError) as caught:
        StableDiffusion.load(path, device="cpu", dtype="float32")
    assert str(caught.value) == f"{path}: {GIVEN}"
    model = saved(tmp_path / "model.safetensors", tiny_state())
    for option in ("vae", "text_encoder"):
        with pytest.raises(CheckpointError) as caught:
            ModelFiles(model, LoadOptions(config=TINY, **{option: path}))
        assert str(caught.value) == f"{path}: {GIVEN}"
    file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
    for read in (lambda: read_lora(file, TINY, tiny), lambda: read_embedding(file, 64, 75)):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert str(caught.value).endswith(f": {GIVEN}")


# --------------------------------------------------------------------------------------------------------- damaged


def test_damaged_files(tmp_path, files):
    state = original("v1")

    def said(name: str, changed: State, *dropped: str, metadata=None) -> str:
        kept = {key: tensor for key, tensor in (state | changed).items() if not key.startswith(dropped or ("?",))}
        return refusal(saved(tmp_path / f"{name}.safetensors", kept, metadata))

    first, middle = f"{PREFIX}input_blocks.1.0.in_layers.2.weight", f"{PREFIX}middle_block."
    q = f"{middle}1.transformer_blocks.0.attn1.to_q."
    assert said("missing", {}, q) == (
        f"1 weight of 170 of the control network missing from the file: {q}weight; download it again"
    )
    gone = "46 weights of 170 of the control network missing from the file: "
    assert said("no middle", {}, middle).startswith(gone + middle)
    assert said("no hint", {}, f"{PREFIX}input_hint_block.0").startswith(
        "a control network without control_model.input"
    )
    lost = (f"{PREFIX}input_hint_block.", f"{PREFIX}zero_convs.0.", f"{PREFIX}middle_block_out.")
    assert said("most", {}, *lost) == "a control network with most of its weights missing: download it again"
    assert said("more", {f"{PREFIX}extra.weight": torch.zeros(2)}) == (
        f"1 weight in the file that a control network does not have: {PREFIX}extra.weight"
    )
    assert "1 weight in the file that a control network does not have: else.weight" in said(
        "beside", {"else.weight": torch.zeros(2)}
    )
    assert said("shape", {f"{PREFIX}zero_convs.2.0.weight": torch.zeros(64, 32, 1, 1)}) == (
        f"1 weight of the wrong shape: {PREFIX}zero_convs.2.0.weight is 64x32x1x1, expected 64x64x1x1"
    )
    assert "no control network of a known kind: UNetConfig.channels: got (60," in said(
        "width", {first: torch.zeros(60, 64, 3, 3)}
    )
    assert "its hints have 4 channels, which is not supported: expected 3 (RGB)" in said(
        "hint", {f"{PREFIX}input_hint_block.0.weight": torch.zeros(16, 4, 3, 3)}
    )
    assert said("nan", {first: torch.full((64, 64, 3, 3), torch.nan)}).startswith(
        f"1 weight with NaN or infinite numbers: {first} (36864 of 36864); the file is damaged"
    )
    assert "holds whole numbers" in said("int", {first: torch.zeros(64, 64, 3, 3, dtype=torch.int8)})
    assert said("two", prefixed("second.", stripped(half(state)))).startswith("several control networks in one")
    own = load_file(files["own.safetensors"])
    path = saved(tmp_path / "own.safetensors", own, {CONTROL_KEY: '{"unet": {"channels": 3}}'})
    assert refusal(path) == "the file's own config is damaged: UNetConfig: expected lists per level"
    saved(path, own, {CONTROL_KEY: "{}"})
    assert refusal(path).startswith("the file's own config is damaged: not the config of a control network")
    saved(path, own, {CONTROL_KEY: ControlConfig.of(TINY_V2.unet).to_json()})
    assert "the model is tiny v1" in refusal(path)
    assert "of 260 of the control network missing from the file" in refusal(path, TINY_V2)
    bare = saved(tmp_path / "bare.safetensors", own)  # without its metadata, by its shapes
    assert same(load(bare), load(files["own.safetensors"]))


# ---------------------------------------------------------------------------------------------------------- convert


def run(*arguments: object) -> int:
    return convert.main([*map(str, arguments)])


@pytest.fixture
def tiny_model(monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setitem(MODELS, "tiny-2", TINY_V2)


@pytest.mark.parametrize("n, model", [("v1", "tiny"), ("v2", "tiny-2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.sampled(3)
def test_conversion_there_and_back(tmp_path, tiny_model, capsys, n, model, dtype):
    """Between all layouts, bit for bit: each one from each other."""
    state = {key: tensor.to(dtype) for key, tensor in original(n).items()}
    saved(tmp_path / "start.safetensors", stripped(state))
    steps = ["sd", "diffusers", "original", "diffusers", "sd", "original"]
    path = tmp_path / "start.safetensors"
    for number, layout in enumerate(steps):
        out = tmp_path / f"{number}{'' if layout == 'diffusers' else '.safetensors'}"
        assert run(path, out, "--layout", layout, "--model", model) == 0, capsys.readouterr().err
        path = out
    back = load_file(path)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) and back[key].dtype == dtype for key, tensor in state.items())
    assert f"{path}: control network for a model of unknown sizes, {len(state)} weights" in capsys.readouterr().out
    theirs = controlnet({k: v for k, v in json.loads((tmp_path / "1/config.json").read_text()).items() if k[0] != "_"})
    theirs.load_state_dict(load_file(tmp_path / "1/diffusion_pytorch_model.safetensors"), strict=True)
    with load_checkpoint(tmp_path / "0.safetensors") as file:
        assert identify_control(file).config == ControlConfig.of(MODEL[n].unet, name="start")


def test_diffusers_loads_a_converted_folder(files, tmp_path, tiny_model, tiny_control):
    diffusers = pytest.importorskip("diffusers")
    assert run(files["control_sd15_canny.pth"], tmp_path / "out", "--layout", "diffusers", "--model", "tiny") == 0
    compare(tiny_control["v1"], diffusers.ControlNetModel.from_pretrained(tmp_path / "out"))


def test_precision_is_changed_on_request(files, tmp_path):
    assert run(files["own.safetensors"], tmp_path / "a.safetensors", "--dtype", "fp16", "--layout", "original") == 0
    expected, got = original("v1"), load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(got[key], tensor.half()) for key, tensor in expected.items())


def test_what_conversion_refuses(files, tmp_path, difference, capsys, tiny_model):
    path, out = files["own.safetensors"], tmp_path / "out.safetensors"

    def said(*arguments: object) -> str:
        assert run(*arguments) == 1 and not out.exists()
        return capsys.readouterr().err

    assert "is a control network (ControlNet), not a model: leave out --keep-ema, --vae" in said(
        path, out, "--keep-ema", "--vae", path
    )
    assert "leave out --weights" in said(path, out, "--weights", "raw")
    assert "the model is tiny v2" in said(path, out, "--model", "tiny-2")
    assert "its weights are only differences from those of a U-Net" in said(difference, out)
    assert "give a name without .safetensors" in said(path, out, "--layout", "diffusers")
    (tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:-100])
    assert "bad.safetensors" in said(tmp_path / "bad.safetensors", out)
    found = replace(identify_of(path), config=ControlConfig.of(TINY.unet, bgr=True))
    with pytest.raises(ValueError, match="an original file cannot say that hints have blue first"):
        check_control_writable(found, "original", "shuffle.safetensors")
    averaged = replace(found, config=ControlConfig.of(TINY.unet, pooled=True))
    with pytest.raises(ValueError, match="by its name alone that residuals are averaged: put 'shuffle' in its name"):
        check_control_writable(averaged, "original", "colours.safetensors")
    check_control_writable(averaged, "original", "control_shuffle.safetensors")
    for unet, words in (
        (replace(TINY.unet, depth=(1, 1, 2)), "whose middle is deeper"),
        (replace(TINY.unet, middle_depth=None), "whose middle is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            check_control_writable(replace(found, config=ControlConfig.of(unet)), "diffusers", "folder")


def identify_of(path: Path):
    with load_checkpoint(path) as file:
        return identify_control(file)


def test_info(files, tmp_path, capsys, difference):
    path = sparse_file(tmp_path / "control.safetensors", "controlnet-sd15", half=True)
    said = info(path, capsys=capsys)
    assert said["model"] == "a ControlNet for Stable Diffusion 1.x: give it with --control"
    assert said["control"] == "340 weights, 361.3 M, float16, original names with the prefix 'control_model.'"
    assert said["missing"] == said["unknown"] == "nothing" and "EMA" not in said and "predicts" not in said
    said = info(sparse_file(tmp_path / "b.safetensors", "controlnet-sd21"), capsys=capsys)
    assert said["model"] == "a ControlNet for Stable Diffusion 2.x: give it with --control"
    said = info(files["control_sd15_canny.pth"], capsys=capsys)
    assert said["model"].startswith("a ControlNet for another model (64, 128, 128 channels, context 64)")
    assert said["unknown"] == "nothing" and said["control"].startswith("170 weights, 3.0 M, float32, original")
    assert info(files["own.safetensors"], capsys=capsys)["control"] == "170 weights, 3.0 M, float32"
    assert "as differences from a U-Net" in info(difference, capsys=capsys)["model"]
    state = {key: x for key, x in original("v1").items() if "zero_convs.3" not in key} | {"b.c": torch.zeros(2)}
    said = info(saved(tmp_path / "c.safetensors", state), capsys=capsys)
    assert said["missing"].startswith("2 of 170 weights: 2: control_model.zero_convs.3.0.")
    assert said["unknown"] == "1: b.c"
    union = saved(tmp_path / "u.safetensors", {"task_embedding": torch.zeros(6, 8)} | {
        "controlnet_mid_block.weight": torch.zeros(8, 8)
    })  # fmt: skip
    assert info(union, capsys=capsys)["model"].startswith("this is a union ControlNet")


def test_levels_with_bare_transformers_are_checked():
    with pytest.raises(ValueError, match=r"ControlConfig\.bare: got \(1,\), expected levels of depth 0, each once"):
        ControlConfig.of(TINY.unet, bare=(1,))
    for bare in ([2], (2, 2), (4,), (True,), ("2",)):
        with pytest.raises(ValueError, match=r"ControlConfig\.bare: got"):
            ControlConfig.of(TINY.unet, bare=bare)
    assert ControlConfig.of(TINY.unet, bare=(2,)).bare == (2,)


def test_the_embedded_model_s_numbering():
    """One block a level: the original's zero convolutions are numbered as its input blocks are."""
    config = ControlConfig.of(MODELS["pocket"].unet)
    table = ControlLayout("original", PREFIX).sources(config, control_shapes(config))
    assert len(config.unet.channels) * 2 == sum(key.startswith("zero.") for key in table) // 2 == 4
    assert table["zero.2.weight"].key == f"{PREFIX}zero_convs.2.0.weight"
    assert table["down.0.down.weight"].key == f"{PREFIX}input_blocks.2.0.op.weight"
    assert build_control(config).zero_mid.weight.is_meta

"""Adapters as tools write them: folders, settings of PEFT, numbers that are no tensors, files for other models."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from test_lora import GOOD, NAME, PATH, TINY_PLACES, saved, weights

from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion

PLACE = ("unet", "mid.attn.blocks.0.attn1.q.weight")  # GOOD adds 4 to each of its numbers
PEFT = {f"base_model.model.{PATH}.lora_A.weight": torch.ones(4, 128),
        f"base_model.model.{PATH}.lora_B.weight": torch.ones(128, 4)}  # fmt: skip


@pytest.fixture
def model(adaptable) -> Iterator[StableDiffusion]:
    """One for all tests, which leave nothing behind."""
    yield adaptable
    adaptable.remove_lora()
    adaptable.remove_embedding()


def change(model, path, place=PLACE) -> torch.Tensor:
    """What a LoRA file adds to a weight."""
    before = weights(model)
    model.add_lora(path)
    return weights(model)[place].double() - before[place]


def all_are(numbers: torch.Tensor, value: float) -> bool:
    return torch.allclose(numbers, torch.full_like(numbers, value), atol=1e-5)


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"])
def test_a_folder_of_a_lora(name, model, tmp_path):
    """Given as `save_pretrained` leaves it: named after the folder, with the settings beside the file."""
    folder = tmp_path / "toy"
    folder.mkdir()
    saved(folder, PEFT, name)
    (folder / "optimizer.pt").write_bytes(b"never opened")
    (folder / "adapter_config.json").write_text("\ufeff" + json.dumps({"r": 4, "lora_alpha": 8}), encoding="utf-8")
    assert all_are(change(model, folder), 8 if name.startswith("adapter") else 4) and set(model.loras) == {"toy"}


def test_a_repository_in_the_cache(model, tmp_path):
    folder = tmp_path / "models--someone--inks" / "snapshots" / "0a"
    folder.mkdir(parents=True)
    saved(folder, GOOD, "inks-v2.safetensors")
    assert all_are(change(model, folder.parent.parent), 4) and set(model.loras) == {"inks-v2"}
    save_file({"<toy>": torch.ones(1, 64)}, folder / "learned_embeds.safetensors")
    assert model.add_embedding(folder.parent.parent) == ["<toy>"]


def test_folders_in_which_it_is_not_clear_which_file_it_is(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight file in this folder .* give the adapter's file"):
        model.add_lora(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        saved(tmp_path, GOOD, name)
    for add in (model.add_lora, model.add_embedding):
        with pytest.raises(CheckpointError, match=r"a folder with 2 weight files; give one of them \(a.safe.*, b.sa"):
            add(tmp_path)


# ------------------------------------------------------------------------------------------------ alpha


@pytest.mark.parametrize("alpha", [2, 2.0, "2.0"])
def test_an_alpha_that_is_no_tensor(alpha, model, tmp_path):
    """Pickles hold plain numbers as well: a layer's, or that of the whole file."""
    assert all_are(change(model, saved(tmp_path, GOOD | {f"{NAME}.alpha": alpha}, "a.pt")), 2)
    model.remove_lora()
    torch.save({"state_dict": GOOD | {f"{NAME}.alpha": alpha}}, tmp_path / "b.pt")
    assert all_are(change(model, tmp_path / "b.pt"), 2)
    model.remove_lora()
    inner = {key.removeprefix("base_model.model."): x for key, x in PEFT.items()}
    torch.save({"unet": inner | {f"{PATH}.alpha": alpha}, "text_encoder": {}}, tmp_path / "d.pt")
    assert all_are(change(model, tmp_path / "d.pt"), 2)
    model.remove_lora()
    torch.save({"lora_weights": GOOD, "step": alpha}, tmp_path / "e.pt")  # a name of the tool's own
    assert all_are(change(model, tmp_path / "e.pt"), 4)
    model.remove_lora()
    assert all_are(change(model, saved(tmp_path, GOOD | {"alpha": alpha}, "c.pt")), 2)
    model.remove_lora()
    assert all_are(change(model, saved(tmp_path, GOOD, metadata={f"{NAME}.alpha": str(alpha)})), 2)


def test_alphas_that_are_no_numbers(model, tmp_path):
    for key in (f"{NAME}.alpha", "alpha"):
        with pytest.raises(CheckpointError, match=rf"{key} is 'rank', expected one number"):
            model.add_lora(saved(tmp_path, GOOD | {key: "rank"}, "a.pt"))
    with pytest.raises(CheckpointError, match="alpha is 0, expected one number"):
        model.add_lora(saved(tmp_path, GOOD | {f"{NAME}.alpha": torch.empty(0)}))


@pytest.mark.parametrize("key", [f"unet.{PATH}.lora_A.alpha", f"unet.{PATH}.lora.alpha", f"{NAME}.lora_down.alpha"])
def test_an_alpha_behind_the_name_of_a_matrix(key, model, tmp_path):
    assert all_are(change(model, saved(tmp_path, GOOD | {key: torch.tensor(2.0)})), 2)


def test_an_alpha_of_a_counted_layer(model, tmp_path):
    tensors = {"unet:0:up": torch.ones(64, 4), "unet:0:down": torch.ones(4, 64), "unet:0:alpha": torch.tensor(2.0)}
    place = ("unet", "down.0.attn.0.blocks.0.attn1.q.weight")
    before = model.unet.get_parameter(place[1]).data.double()
    model.add_lora(saved(tmp_path, tensors))
    assert all_are(model.unet.get_parameter(place[1]).data - before, 2)


@pytest.mark.parametrize(
    "pattern, added",
    [
        (f"^{PATH}", 2),
        (f"^{PATH}$", 2),
        ("attn1.to_q", 2),
        (r"attn1\.to_q", 2),
        (".*to_q", 2),
        ("o_q", 8),
        ("^to_q", 8),
    ],
)
def test_patterns_of_peft(pattern, added, model, tmp_path):
    """With "^" the whole name, without it the name or its end at a point."""
    settings = json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {pattern: 2}})
    assert all_are(change(model, saved(tmp_path, PEFT, metadata={"lora_adapter_metadata": settings})), added)


def test_a_lokr_of_peft_has_a_scale_where_lycoris_has_none(model, tmp_path):
    """Both factors are whole: alpha / r of the settings there, 1 in LyCORIS's files, whatever alpha is."""
    factors = {"lokr_w1": torch.ones(8, 8), "lokr_w2": torch.ones(16, 16)}
    file = {f"base_model.model.{PATH}.{part}": x for part, x in factors.items()}
    settings = {"peft_type": "LOKR", "r": 100, "alpha": 50, "rank_pattern": {"to_q": 200}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    assert all_are(change(model, saved(tmp_path, file, metadata=metadata)), 0.25)
    model.remove_lora()
    assert all_are(change(model, saved(tmp_path, {f"{NAME}.{part}": x for part, x in factors.items()})), 1)


@pytest.mark.parametrize("name", ["init_lora_weights", "unet.init_lora_weights"])
def test_settings_that_change_the_model_too(name, model, tmp_path):
    settings = {"lora_adapter_metadata": json.dumps({name: "pissa_niter_4", "r": 4, "lora_alpha": 4})}
    with pytest.raises(CheckpointError, match=r"init_lora_weights 'pissa_niter_4', which changes the model's weights"):
        model.add_lora(saved(tmp_path, PEFT, metadata=settings))


# ------------------------------------------------------------------------------------------------ what is not applied

FOR_OTHERS = {
    "transformer.transformer_blocks.0.attn.to_q": "SD 3 or Flux, or another diffusion transformer",
    "diffusion_model.joint_blocks.0.x_block.attn.proj": "SD 3 or Flux,",
    "diffusion_model.double_blocks.0.img_attn.proj": "Flux or HunyuanVideo",
    "diffusion_model.blocks.0.self_attn.q": r"a diffusion transformer \(Wan",
    "lora_unet_blocks_0_cross_attn_k": r"a diffusion transformer \(Wan",
    "transformer_blocks.0.attn.to_q": "a diffusion transformer",
    "diffusion_model.layers.0.attention.qkv": "a diffusion transformer",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    "down_blocks.0.motion_modules.0.temporal_transformer.proj_in": "the motion module of AnimateDiff",
}


@pytest.mark.parametrize("name, model_name", FOR_OTHERS.items())
def test_loras_for_other_models_are_named(name, model_name, model, tmp_path):
    pair = {f"{name}.lora_A.weight": torch.ones(4, 30), f"{name}.lora_B.weight": torch.ones(30, 4)}
    with pytest.raises(CheckpointError, match=f"a LoRA for {model_name}"):
        model.add_lora(saved(tmp_path, pair))


def test_layers_of_other_models_beside_good_ones_are_left_out(model, tmp_path):
    more = {f"lora_unet_down_blocks_0_motion_modules_0_{end}": torch.ones(1) for end in ("alpha", "lora_up.weight")}
    with pytest.warns(UserWarning, match="2 of layers that this model does not have"):
        assert all_are(change(model, saved(tmp_path, GOOD | more)), 4)


@pytest.mark.parametrize("end", ["set_weight", "reshape_weight", "base_layer.weight", "weight", "lora_a.weight"])
def test_a_part_that_is_not_known_is_not_a_layer_that_is_not_there(end, model, tmp_path):
    more = {f"unet.{PATH}.{end}": torch.ones(128, 128)}
    with pytest.warns(UserWarning, match=rf"1 of no known kind of adapter \(unet.{PATH}.{end}\)"):
        model.add_lora(saved(tmp_path, GOOD | more))
    if "lora" in end:
        with pytest.raises(CheckpointError, match="1 of 1 keys are of no known kind of adapter"):
            model.add_lora(saved(tmp_path, more), name="again")


@pytest.mark.parametrize(
    "tensors, message",
    [
        (PEFT | {f"base_model.model.{PATH}.lora_E": torch.ones(4, 1)}, "an AdaLoRA of PEFT .*lora_E.*not supported"),
        ({"x.attn2.processor.to_k_custom_diffusion.weight": torch.ones(9, 9)}, "a Custom Diffusion file"),
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(9, 9)}, "an IP-Adapter"),
        ({"unet:900:up": torch.ones(64, 4), "unet:900:down": torch.ones(4, 64)}, "2 of 2 keys match no layer"),
        (GOOD | {f"{NAME}.lora_up.weight": torch.ones(128, 5)}, r"match neither each .* \(down 4x128, up 128x5\)"),
        (
            GOOD | {f"{NAME}.lora_up.weight": torch.ones(128, 4).int()},
            r"holds whole numbers \(int32\), not weights",
        ),
        (
            GOOD | {f"{NAME}.lora_up.weight": torch.ones(128, 4) / 0},
            "holds numbers that are not finite",
        ),
    ],
)
def test_the_reason_is_the_true_one(tensors, message, model, tmp_path):
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        model.add_lora(saved(tmp_path, tensors))
    assert all(torch.equal(weights(model)[place], before[place]) for place in TINY_PLACES)


# ------------------------------------------------------------------------------------------------ words

VECTORS = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors", "style.safetensors"])
def test_a_folder_of_an_embedding(name, model, tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    saved(folder, {"<dog>": VECTORS}, name)
    assert model.add_embedding(folder) == ["<dog>", "style"][: 2 if "style" in name else 1]
    model.remove_embedding()
    saved(folder, {"emb_params": VECTORS}, name)
    assert model.add_embedding(folder) == ["style" if "style" in name else "toy"]


@pytest.mark.parametrize(
    "key", ["params", "emb_params_clip_l", "cond_stage_model.embedding", "0", "text_encoder.weight", "data", "embs"]
)
def test_names_of_tensors_are_no_words(key, model, tmp_path):
    assert model.add_embedding(saved(tmp_path, {key: VECTORS}, "dog.safetensors")) == ["dog"]


def test_what_is_beside_a_word(model, tmp_path):
    with pytest.warns(UserWarning, match="^dog.safetensors: tensors with a single number are not used: step"):
        model.add_embedding(saved(tmp_path, {"emb_params": VECTORS, "step": torch.tensor(3)}, "dog.safetensors"))
    assert model.words == {"dog": 2}
    torch.save({"string_to_param": {"*": VECTORS, "cat": VECTORS}}, tmp_path / "toy.pt")
    assert model.add_embedding(tmp_path / "toy.pt") == ["toy", "cat"]
    two = saved(tmp_path, {"emb_params": VECTORS, "data": VECTORS.clone()}, "two.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 unnamed embeddings \(data, emb_params\)"):
        model.add_embedding(two)
    counted = saved(tmp_path, {"unet:0:up": torch.ones(64, 4), "<s1>": VECTORS}, "counted.safetensors")
    with pytest.raises(CheckpointError, match=r"not an embedding .* a LoRA file with --lora"):
        model.add_embedding(counted)


def test_paths_that_cannot_be_looked_at(model, tmp_path):
    for add in (model.add_lora, model.add_embedding):
        with pytest.raises(CheckpointError, match="File name too long"):
            add(tmp_path / ("x" * 300))


def test_a_word_that_only_contains_lora(model, tmp_path):
    save_file({"<flora>": torch.ones(1, 64)}, tmp_path / "a.safetensors")
    assert model.add_embedding(tmp_path / "a.safetensors")[0] == "<flora>"


def test_usual_names_in_any_case(model, tmp_path):
    (tmp_path / "cat-toy").mkdir()
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "cat-toy" / "Learned_Embeds.safetensors")
    assert model.add_embedding(tmp_path / "cat-toy" / "Learned_Embeds.safetensors") == ["cat-toy"]


def test_an_alpha_of_0_that_is_a_plain_number_is_named(model, tmp_path):
    with pytest.warns(UserWarning, match="1 layer has alpha 0"):
        model.add_lora(saved(tmp_path, GOOD | {f"{NAME}.alpha": 0}, "a.pt"))


def test_a_name_that_is_no_text(model, tmp_path):
    with pytest.raises(ValueError, match=r"\['x'\] is not a name for a LoRA"):
        model.add_lora(saved(tmp_path, GOOD), name=["x"])

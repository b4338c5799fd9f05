"""LoRA files as people have them: names of files and layers, entries that are not understood, words, removal."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import TINY
from test_lora import GOOD, NAME, PATH, TINY_PLACES, factors, kohya, saved, text_width, unchanged, weights

from sd.adapters.adapter_files import lora_name
from sd.adapters.added import LoraFile
from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion

PLACE = ("unet", "mid.attn.blocks.0.attn1.q.weight")
TEXT = ("text_encoder", "blocks.1.fc1.weight")


@pytest.fixture
def model(adaptable) -> Iterator[StableDiffusion]:
    """One for all tests, which leave nothing behind."""
    yield adaptable
    adaptable.remove_lora()
    assert not adaptable.loras and not adaptable.words


@pytest.fixture
def own(tiny) -> StableDiffusion:
    """A model whose weights a test may change."""
    copies = {name: copy.deepcopy(tiny[name]) for name in ("unet", "text_encoder")}
    return StableDiffusion(TINY, vae=tiny["vae"], **copies)


@pytest.fixture(autouse=True)
def no_warnings():
    """Notes are expected where a test says so, and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ------------------------------------------------------------------------------------------------ names of layers

# A weight, and its name in files, with the end of the key; "~" stands for "down" or "up".
NAMED = [
    (PLACE, "lora_unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_~.weight"),
    (PLACE, "lora_unet.middle_block.1.transformer_blocks.0.attn1.to_q.lora_~.weight"),
    (PLACE, "unet.middle_block.1.transformer_blocks.0.attn1.to_q.lora_~.weight"),
    (PLACE, "unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_~.weight"),
    (PLACE, "lora_unet_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q_lora_~.weight"),
    (PLACE, "lora_unet_unet_mid_block_attentions_0_transformer_blocks_0_attn1_processor_to_q_lora_~.weight"),
    (PLACE, "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_~.weight"),
    (PLACE, "lycoris_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_~.weight"),
    (PLACE, "unet._orig_mod.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.~.weight"),
    (PLACE, "_orig_mod.mid_block.attentions.0._orig_mod.transformer_blocks.0.attn1.to_q.lora_~.weight"),
    (PLACE, "lora_unet__orig_mod_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_~.weight"),
    (PLACE, "base_model.model.unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_~.weight"),
    (PLACE, "lycoris_model_diffusion_model_middle_block_1_transformer_blocks_0_attn1_to_q.lora_~.weight"),
    (("unet", "mid.attn.blocks.0.attn1.out.weight"),
     "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.~.weight"),
    (TEXT, "lora_te_encoder_layers_1_mlp_fc1.lora_~.weight"),
    (TEXT, "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_~.weight"),
    (TEXT, "lora_te.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "lora_te1.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "te.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "te1.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "clip_l.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "clip.transformer.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "text_encoders.clip_l.text_model.encoder.layers.1.mlp.fc1.lora_~.weight"),
    (TEXT, "text_encoder._orig_mod.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.~.weight"),
    (TEXT, "lycoris_text_model_encoder_layers_1_mlp_fc1.lora_~.weight"),
    (("text_encoder", "blocks.1.attn.q.weight"), "text_encoder:6:~"),
    (PLACE, "unet:54:~"),
]  # fmt: skip


@pytest.mark.parametrize("place, key", NAMED)
def test_names_of_layers(place, key, model, tmp_path):
    down, up, _, delta = factors(place, TINY_PLACES[place], None)
    before = weights(model)
    tensors = {key.replace("~", "down"): down, key.replace("~", "up"): up}
    if key.startswith("unet:"):  # counted by shape: a layer of another width shows the order
        tensors |= {"unet:4:down": torch.zeros(1, 64), "unet:4:up": torch.zeros(512, 1)}
    model.add_lora(saved(tmp_path, tensors))
    after = weights(model)
    assert torch.allclose(after[place].double(), before[place].double() + delta, atol=2e-6)
    changed = {at for at in before if not torch.equal(after[at], before[at])}
    assert changed == {place}


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_text_model_encoder_layers_1_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_down.weight",
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_A.weight",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.lora_A.weight",
        "te2.text_model.encoder.layers.1.mlp.fc1.lora_A.weight",
        "lora_unet_unet_unet_text_model.lora_down.weight",
    ],
)
def test_names_of_other_networks(key, model, tmp_path):
    with pytest.raises(CheckpointError, match=r"keys match no layer of this model|a LoRA for SDXL"):
        model.add_lora(saved(tmp_path, {key: torch.ones(4, 64)}))


def numbered(order: tuple[str, ...]) -> list[tuple[str, str]]:
    """The linear layers of attentions in the order in which the first trainer counts them, written down for TINY."""
    places = ["down.0.attn.0", "down.1.attn.0", "up.1.attn.0", "up.1.attn.1", "up.0.attn.0", "up.0.attn.1", "mid.attn"]
    leaves = {"attn1": [f"attn1.{n}" for n in ("q", "k", "v", "out")], "ff": ["ff.proj"]}
    leaves["attn2"] = [name.replace("attn1", "attn2") for name in leaves["attn1"]]
    return [("unet", f"{place}.blocks.0.{leaf}.weight") for place in places for part in order for leaf in leaves[part]]


COUNTED_TEXT = [("text_encoder", f"blocks.{i}.attn.{n}.weight") for i in range(3) for n in ("k", "v", "q", "out")]
IN_2022 = ("attn1", "ff", "attn2")


@pytest.mark.parametrize("order", [IN_2022, ("attn1", "attn2", "ff")])
def test_layers_that_are_counted(order, model, tmp_path):
    """cloneofsimo's files: every layer moves by w up down, and words come along."""
    tensors, deltas = {}, {}
    metadata = {"unet": json.dumps(["CrossAttention", "GEGLU"]), "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    for network, counted in (("unet", numbered(order)), ("text_encoder", COUNTED_TEXT)):
        for i, place in enumerate(counted):
            down, up, _, deltas[place] = factors(place, TINY_PLACES[place], None)
            tensors |= {f"{network}:{i}:down": down, f"{network}:{i}:up": up}
    word = torch.randn(64, generator=torch.Generator().manual_seed(1))
    before = weights(model)
    assert len(deltas) == 7 * 9 + 12
    model.add_lora(saved(tmp_path, tensors | {"<s1>": word}, metadata=metadata), 0.5)
    after = weights(model)
    for place in before:
        expected = before[place].double() + 0.5 * deltas.get(place, torch.zeros(1))
        assert torch.allclose(after[place].double(), expected, atol=2e-6), place
    assert model.words == {"<s1>": 1}
    model.remove_lora()
    assert unchanged(model, before) and not model.words


@pytest.mark.parametrize("places", [numbered(IN_2022), COUNTED_TEXT])
def test_a_list_of_matrices(places, model, tmp_path):
    """The first files of all: up, down, up, down, ... of one network, in a pickle."""
    pairs = [factors(place, TINY_PLACES[place], None) for place in places]
    torch.save([x for down, up, _, _ in pairs for x in (up, down)], tmp_path / "first.pt")
    before = weights(model)
    assert model.add_lora(tmp_path / "first.pt", 0.5) == "first"
    after = weights(model)
    for place, (_, _, _, delta) in zip(places, pairs, strict=True):
        assert torch.allclose(after[place].double(), before[place].double() + 0.5 * delta, atol=2e-6)
    with pytest.raises(CheckpointError, match=r"a list of tensors without names, .* give it with --lora"):
        StableDiffusion.load(tmp_path / "first.pt")


# ------------------------------------------------------------------------------------------------ names of files


def cached(root: Path, repository: str, name: str = "pytorch_lora_weights", tensors=GOOD) -> Path:
    """A file as the hub's cache has it: a link in a snapshot to a file named by its hash."""
    home = root / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    blob = saved(blobs, tensors, "hash.safetensors").rename(blobs / f"{len(repository):064x}")
    (snapshot / f"{name}.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / f"{name}.safetensors"


def test_files_in_the_cache_of_the_hub(model, tmp_path):
    first, second = cached(tmp_path, "someone/pixel-art"), cached(tmp_path, "someone-else/pixel-art")
    assert model.add_loras([(first, 1.0), (second, 0.5)]) == ["pixel-art", "pixel-art-2"]
    assert model.add_lora(cached(tmp_path, "someone/inks", "inks-v2.0")) == "inks-v2.0"
    assert model.loras == {"pixel-art": 1.0, "pixel-art-2": 0.5, "inks-v2.0": 1.0}
    assert lora_name(first.resolve()) == "pixel-art"
    assert lora_name(first.parent / "style" / first.name) == "style"
    assert lora_name(Path("/hub/models--gpt2-like/snapshots/a0/lora.safetensors")) == "gpt2-like"


@pytest.mark.parametrize(
    "path, name",
    [
        ("/a/toy/pytorch_lora_weights.safetensors", "toy"),
        ("/a/toy/adapter_model.bin", "toy"),
        ("/a/toy/lora.safetensors", "lora"),
        ("/a/toy/../cat/adapter_model.bin", "cat"),
        ("/pytorch_lora_weights.safetensors", "pytorch_lora_weights"),
        ("/a/blobs/style.safetensors", "style"),
    ],
)
def test_names_from_paths(path, name):
    assert lora_name(Path(path)) == name


def test_a_link_has_its_own_name(model, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(saved(tmp_path, GOOD))
    assert model.add_lora(tmp_path / "link.safetensors") == "link"
    with pytest.raises(ValueError, match=r"style.safetensors: 'link' is merged already: remove it, or give"):
        model.add_lora(tmp_path / "style.safetensors")
    assert model.add_lora(tmp_path / "style.safetensors", name="again") == "again"


def test_names_that_are_given(model, tmp_path):
    file = saved(tmp_path, GOOD)
    (tmp_path / "b").mkdir()
    other = saved(tmp_path / "b", GOOD)
    assert model.add_loras([LoraFile(file, 0.5, "mine"), (other, 1)]) == ["mine", "style"]
    for name, message in (("mine", "'mine' is merged already"), ("", "not a name"), ("a\nb", "not a name")):
        with pytest.raises(ValueError, match=message):
            model.add_lora(file, name=name)
    model.remove_lora("mine")
    assert model.add_loras([(file, 1.0)]) == ["style-2"]


# ------------------------------------------------------------------------------------------------ what is not applied

ALONE = "without the other parts of its adapter"
MORE = {
    "alpha without matrices": ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, f"1 of 3 tensors .* 1 {ALONE}"),
    "half a pair": ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}, f"1 {ALONE} .lora_unet_conv_in"),
    "rank 0": (
        {"lora_unet_conv_out.lora_down.weight": torch.ones(0, 64, 3, 3),
         "lora_unet_conv_out.lora_up.weight": torch.ones(4, 0, 1, 1), "lora_unet_conv_out.alpha": torch.tensor(1.0)},
        "3 of 5 tensors have no effect: 3 of rank 0",
    ),
    "a layer that is not there": ({"lora_unet_nowhere.alpha": torch.tensor(1.0)}, "1 of layers that this model does"),
    "another kind": ({f"{kohya(TEXT)}.oft_diag": torch.ones(2, 2)}, "1 of no known kind of adapter .*oft_diag"),
    "layers that are not run": (
        {key.replace("0_self", "20_self"): x for key, x in text_width(64).items()},
        "2 of text encoder layers after the last one that is run",
    ),
    "the same under another name": (
        {f"unet.{PATH}.lora_A.weight": torch.ones(4, 128), f"unet.{PATH}.lora_B.weight": torch.ones(128, 4)},
        "2 the same as others under another name",
    ),
    "words of another width": ({"bundle_emb.toy.string_to_param.*": torch.ones(2, 768)}, "1 of words for another text"),
    "half a LoHa beside": ({f"{kohya(TEXT)}.hada_w1_a": torch.ones(256, 2)}, f"1 {ALONE}"),
    "letters of control codes": ({"lora_unet_\x1b[2J.alpha": torch.tensor(1.0)}, r"\(lora_unet_\\x1b\[2J\.alpha\)"),
}  # fmt: skip


@pytest.mark.parametrize("more, message", MORE.values(), ids=MORE)
def test_what_is_not_understood_is_named(more, message, model, tmp_path):
    """And what stands beside it is applied."""
    before = weights(model)
    with pytest.warns(UserWarning, match=rf"^style.safetensors: .*{message}"):
        model.add_lora(saved(tmp_path, GOOD | more))
    assert torch.allclose(weights(model)[PLACE], before[PLACE] + 4, atol=1e-6)
    model.remove_lora()
    assert unchanged(model, before)


def test_notes_go_where_they_are_asked_for(model, tmp_path):
    notes: list[str] = []
    model.add_lora(saved(tmp_path, GOOD | {"x.alpha": torch.ones(1)}), note=notes.append)
    model.remove_lora()
    model.add_loras([(tmp_path / "style.safetensors", 0.0)], note=notes.append)
    assert len(notes) == 3 and "1 of 3 tensors have no effect" in notes[0] and "style changes nothing" in notes[2]


def test_a_lora_that_changes_nothing(model, tmp_path):
    zero = saved(tmp_path, GOOD | {f"{NAME}.lora_up.weight": torch.zeros(128, 4)}, "zero.safetensors")
    with pytest.warns(UserWarning, match="the LoRA zero changes nothing"):
        model.add_lora(zero)
    with pytest.warns(UserWarning, match="the LoRA style changes nothing: its weight is 0"):
        model.add_loras([(saved(tmp_path, GOOD), 0)], removable=False)


def test_words_in_a_file(model, tmp_path):
    """They are words of the model until the LoRA is removed; one that is taken is named."""
    rng = torch.Generator().manual_seed(2)
    words = {
        "bundle_emb.Bad.Hands.string_to_param.*": torch.randn(2, 64, generator=rng),
        "bundle_emb.toy.emb_params": torch.randn(1, 64, generator=rng),
    }
    file = saved(tmp_path, GOOD | words)
    model.add_lora(file)
    assert model.words == {"bad.hands": 2, "toy": 1}
    assert torch.equal(model.text_encoder.token(torch.tensor(model.tokenizer.encode("toy")))[0], words[
        "bundle_emb.toy.emb_params"][0])  # fmt: skip
    other = saved(tmp_path, {"bundle_emb.toy.clip_l": torch.ones(64)}, "other.safetensors")
    with pytest.warns(UserWarning, match="the LoRA other has an embedding that is not added: the word 'toy' is taken"):
        model.add_lora(other)
    model.remove_lora("other")
    assert model.words == {"bad.hands": 2, "toy": 1}
    model.remove_lora()
    assert not model.words
    with pytest.raises(ValueError, match="numbers beyond"):  # and nothing stays of it
        model.add_lora(file, 1e38)
    assert not model.words and not model.loras


# ------------------------------------------------------------------------------------------------ removal

CHANGES = {
    "in place": lambda unet: unet.mid.attn.blocks[0].attn1.q.weight.data.mul_(1.5),
    "loaded": lambda unet: unet.load_state_dict({key: x + 1 for key, x in unet.state_dict().items()}),
    "half precision": lambda unet: unet.bfloat16(),
    "double precision": lambda unet: unet.double(),
    "another parameter": lambda unet: setattr(
        unet.mid.attn.blocks[0].attn1.q, "weight", torch.nn.Parameter(torch.ones(128, 128))
    ),
    "another shape": lambda unet: setattr(
        unet.mid.attn.blocks[0].attn1.q, "weight", torch.nn.Parameter(torch.ones(128, 64))
    ),
    "another layer": lambda unet: setattr(unet.mid.attn.blocks[0].attn1, "q", torch.nn.Identity()),
}
# where the file still fits the weights, so that adding to them is refused for the same reason
REFUSED_ALWAYS = [CHANGES[name] for name in ("in place", "loaded", "half precision", "double precision")]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_were_changed_since_are_not_overwritten(change, own, tmp_path):
    """The first weights would come back, or two precisions stand side by side."""
    file, text = saved(tmp_path, GOOD), saved(tmp_path, text_width(64) | GOOD, "text.safetensors")
    own.add_lora(file)
    if change is CHANGES["in place"]:
        own.txt2img("a cat", height=64, width=64, steps=1, seed=1)  # weights are packed by it
    change(own.unet)
    now, text_now = ({n: x.clone() for n, x in net.state_dict().items()} for net in (own.unet, own.text_encoder))
    tries = [own.remove_lora, lambda: own.add_lora(text), lambda: own.add_loras([(text, 1)], removable=False)]
    for attempt in tries[: 3 if change in REFUSED_ALWAYS else 1]:
        with pytest.raises(ValueError, match=r"unet\.mid.*q\.weight was changed after a LoRA .* forget_loras\(\)"):
            attempt()
    assert all(torch.equal(x, now[name]) for name, x in own.unet.state_dict().items())
    assert all(torch.equal(x, text_now[name]) for name, x in own.text_encoder.state_dict().items())
    assert own.loras == {"style": 1.0}
    own.forget_loras()
    assert own.loras == {}
    assert all(torch.equal(x, now[name]) for name, x in own.unet.state_dict().items())


def test_the_same_numbers_elsewhere_are_the_same_weights(own, tmp_path):
    """Copied, moved to another memory layout, or packed in between: all can be removed."""
    before = {place: x.clone() for place, x in weights(own).items()}
    own.add_lora(saved(tmp_path, GOOD))
    own.unet.load_state_dict({key: x.clone() for key, x in own.unet.state_dict().items()}, assign=True)
    own.txt2img("a cat", height=64, width=64, steps=1, seed=1)
    own.remove_lora()
    assert unchanged(own, before)

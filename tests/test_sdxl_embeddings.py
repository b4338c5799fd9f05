"""Textual inversion on SDXL: vectors for both text encoders, words of a model's own folder, equal chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from sdxl_common import (
    FC1,
    TINY_REFINER,
    cleared,
    pipeline,
    tiny_xl,
    two,
    vectors,
    write_models,
)
from test_lora import saved
from test_sdxl_lora_names import lora_file

from scripts import convert as convert_script
from sd import StableDiffusion
from sd.adapters.textual_inversion import read_embedding, widths_of
from sd.adapters.words import WordTable
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.config import Word
from sd.models.build import build


@pytest.fixture(scope="module")
def shared() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture
def model(shared) -> Iterator[StableDiffusion]:
    yield from cleared(shared)


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny-sdxl"), shared)


@pytest.fixture
def pipe(folder):
    return pipeline(folder / "folder")


EMBEDDINGS = {
    "two tensors": (lambda folder, n: save_file(two(n), folder / "style.safetensors"), "style.safetensors"),
    "with outputs": (
        lambda folder, n: save_file(
            two(n) | {"clip_l_out": torch.ones(n, 64), "clip_g_out": torch.ones(n, 96)}, folder / "style.safetensors"
        ),
        "style.safetensors",
    ),
    "a pickle": (lambda folder, n: torch.save(two(n), folder / "style.pt"), "style.pt"),
    "a pickle of the web UI's form": (
        lambda folder, n: torch.save({"string_to_param": two(n), "name": "x"}, folder / "style.pt"),
        "style.pt",
    ),
    "diffusers' names": (
        lambda folder, n: save_file(two(n, ("text_encoders_0", "text_encoders_1")), folder / "style.safetensors"),
        "style.safetensors",
    ),
}


@pytest.mark.filterwarnings("ignore:.*output vectors are not used")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", EMBEDDINGS)
def test_embeddings_of_two_tensors(form, n, model, tmp_path):
    write, name = EMBEDDINGS[form]
    write(tmp_path, n)
    before = [encoder.token for encoder in (model.text_encoder, model.text_encoder_2)]
    assert model.add_embedding(tmp_path / name) == ["style"] and model.words == {"style": n}
    ids = [tokenizer.encode("a Style, cat") for tokenizer in model.tokenizers]
    assert ids[0] == ids[1] == [320, *range(49408, 49408 + n), 267, 2368]
    for encoder, width in ((model.text_encoder, 64), (model.text_encoder_2, 96)):
        assert torch.equal(encoder.token(torch.arange(49408, 49408 + n)), vectors(n, width))
    model.remove_embedding("style")
    assert [encoder.token for encoder in (model.text_encoder, model.text_encoder_2)] == before
    assert not any(isinstance(token, WordTable) for token in before)


def test_what_is_beside_the_vectors(model, tmp_path):
    """Said if it has no effect; and the word of a file is checked as for other models."""
    save_file(two(1) | {"name": torch.zeros(3, 9)}, tmp_path / "style.safetensors")
    with pytest.warns(UserWarning, match="style.safetensors: tensors that belong to no text encoder .*: name"):
        assert model.add_embedding(tmp_path / "style.safetensors") == ["style"]
    save_file(two(1), tmp_path / "style.safetensors")
    for word in ("a\nb", "a" * 201):
        with pytest.raises(CheckpointError, match="is not a word; give one"):
            model.add_embedding(tmp_path / "style.safetensors", word)


def test_a_pair_of_files(model, tmp_path):
    """As diffusers' training script for SDXL writes them."""
    for name, width in (("learned_embeds", 64), ("learned_embeds_2", 96)):
        save_file({"<toy>": vectors(2, width)}, tmp_path / f"{name}.safetensors")
    assert model.add_embedding(tmp_path) == ["<toy>"] and model.words == {"<toy>": 2}
    assert torch.equal(model.text_encoder_2.token(torch.tensor([49408, 49409])), vectors(2, 96))
    model.remove_embedding()
    assert model.add_embedding(tmp_path / "learned_embeds.safetensors", "Mine") == ["mine"]
    save_file({"<other>": vectors(2, 96)}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(CheckpointError, match=r"learned_embeds_2.*: has other words, .* than learned_embeds"):
        model.add_embedding(tmp_path)


@pytest.mark.exhaustive
def test_contexts_as_in_diffusers(model, pipe, tmp_path):
    """`load_textual_inversion` for each text encoder: the same contexts and pooled output."""
    save_file(two(3), tmp_path / "style.safetensors")
    model.add_embedding(tmp_path / "style.safetensors", "<style>")
    state = load_file(tmp_path / "style.safetensors")
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion({"<style>": state[key]}, token="<style>", text_encoder=encoder, tokenizer=tokenizer)
    prompt = "a house in the manner of <style>, by night"
    theirs = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    text = model.encode_texts(prompt)
    plain = model.encode_texts(prompt.replace("<style>", "x"))
    assert error(text.hidden, theirs[0]) < 1e-5 and error(text.pooled, theirs[2]) < 1e-5
    assert error(text.hidden, plain.hidden) > 1e-2 and error(text.pooled, plain.pooled) > 1e-2


@pytest.mark.parametrize(
    "content, message",
    [
        ({"emb_params": torch.zeros(1, 768)}, r"an embedding for Stable Diffusion 1.x: its vectors are 768 wide, and "
         r"one for this model has clip_l \(64 wide\) and clip_g \(96 wide\)"),
        ({"<a>": torch.zeros(1024)}, "an embedding for Stable Diffusion 2.x: its vectors are 1024 wide, and one for"),
        ({"emb_params": torch.zeros(1, 64)}, "an embedding for another model: its vectors are 64 wide"),
        ({"clip_l": torch.zeros(1, 64)}, r"has no vectors for clip_g: an embedding for this model has clip_l"),
        ({"clip_g": torch.zeros(1, 96)}, r"has no vectors for clip_l: "),
        ({"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(3, 96)}, "holds 2 for clip_l and 3 for clip_g: a word"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 1280)}, "for SDXL: its vectors of clip_g are 1280"),
        ({"clip_l": torch.zeros(76, 64), "clip_g": torch.zeros(76, 96)}, "'style' has 76 vectors, but a prompt has"),
        ({**two(1), "clip_g": torch.full((1, 96), torch.nan)}, "not finite"),
        ({**two(1), "t5xxl": torch.zeros(1, 9)}, r"an embedding for Flux or .*\(only .* 1.x, 2.x and XL\)"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit(content, message, model, tmp_path):
    save_file(content, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=message) as refused:
        model.add_embedding(tmp_path / "style.safetensors")
    assert "\n" not in str(refused.value) and model.words == {}


def test_other_models_and_embeddings_of_sdxl(tmp_path, tiny_sd):
    """SD 1.x refuses them; the refiner takes the vectors of its encoder, also of a file that has no others."""
    save_file(two(2), tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="an embedding for SDXL, which has other text encoders: take one for"):
        tiny_sd.add_embedding(tmp_path / "style.safetensors")
    for content in (two(2), {"clip_g": vectors(2, 96)}, {"emb_params": vectors(2, 96)}):
        save_file(content, tmp_path / "style.safetensors")
        found = read_embedding(tmp_path / "style.safetensors", widths_of(TINY_REFINER), 75)
        assert torch.equal(found["style"], vectors(2, 96))
    save_file({"clip_l": vectors(2, 64)}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"has no vectors for clip_g: an embedding for this model has clip_g"):
        read_embedding(tmp_path / "style.safetensors", widths_of(TINY_REFINER), 75)


def test_a_word_is_added_to_both_or_none(model, tmp_path):
    save_file(two(1), tmp_path / "style.safetensors")
    model.tokenizers[1].add("style", [50000])
    try:
        with pytest.raises(ValueError, match="the word 'style' is taken"):
            model.add_embedding(tmp_path / "style.safetensors")
        assert model.words == {} and "style" not in model.tokenizers[0].added
    finally:
        model.tokenizers[1].remove("style")


def test_words_of_lora_files(model, tmp_path):
    """OneTrainer's bundles have a tensor for each text encoder."""
    name = f"lora_te2_text_model_{FC1}"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 96), f"{name}.lora_up.weight": torch.ones(384, 1)}
    bundled = {f"bundle_emb.toy.{key}": x for key, x in two(2).items()}
    half = {"bundle_emb.half.clip_l": vectors(2, 64)}
    notes: list[str] = []
    model.add_lora(saved(tmp_path, tensors | bundled | half), note=notes.append)
    assert model.words == {"toy": 2}
    assert torch.equal(model.text_encoder_2.token(torch.tensor([49408])), vectors(2, 96)[:1])
    assert len(notes) == 1 and "1 of words for another text encoder (bundle_emb.half.clip_l)" in notes[0]
    model.remove_lora()
    assert model.words == {}


def test_weighted_prompts_have_the_same_chunks(model, tmp_path):
    """A word that crosses the end of a chunk is moved to the next, in both text encoders."""
    save_file(two(4), tmp_path / "toy.safetensors")
    model.add_embedding(tmp_path / "toy.safetensors")
    text = "cat " * 73 + "(toy:1.3), dog"
    both = model.encode_weighted([text])
    assert both.hidden.shape == (1, 2 * 77, 160) and both.pooled.shape == (1, 96)
    with pytest.warns(UserWarning, match="prompt is 79 tokens long, 75 fit") as warned:
        model.encode_texts(text.replace("(toy:1.3)", "toy"))
    assert len(warned) == 1


def test_a_word_of_one_tokenizer_only(model):
    """A word that a model's second tokenizer does not know is several tokens there, and may need one more chunk."""
    prompt = "cat " * 74 + "<some-toy>"
    usual = model.encode_weighted([prompt, "cat"])
    assert usual.hidden.shape == (2, 2 * 77, 160)
    config = replace(TINY_XL, text=(replace(TINY_XL.text[0], vocab=49409, words=(Word("<some-toy>", 49408),)),
                                    TINY_XL.text[1]))  # fmt: skip
    networks = {name: network.to_empty(device="cpu") for name, network in build(config).items()}
    for parameter in (p for network in networks.values() for p in network.parameters()):
        parameter.data.fill_(0.01)
    other = StableDiffusion(config, **networks)
    lengths = [len(tokenizer.encode(prompt)) for tokenizer in other.tokenizers]
    assert lengths[0] == 75 < lengths[1]
    text = other.encode_weighted([prompt, "cat"])
    assert text.hidden.shape == (2, 2 * 77, 160) and text.pooled.shape == (2, 96)


@pytest.fixture
def with_word(tmp_path) -> Path:
    """A folder of diffusers whose two tokenizers have a word, with a vector for it in both tables."""
    word = (Word("<own-toy>", 49408, exact=True),)
    config = replace(TINY_XL, text=tuple(replace(text, vocab=49409, words=word) for text in TINY_XL.text))
    networks = {name: network.state_dict() for name, network in loaded(tiny_state("tiny-sdxl"), TINY_XL).items()}
    for name, width in (("text_encoder", 64), ("text_encoder_2", 96)):
        networks[name]["token.weight"] = torch.cat([networks[name]["token.weight"], vectors(1, width)])
    own = {key: x.contiguous() for key, x in to_own(networks).items()}
    save_file(own, tmp_path / "own.safetensors", {CONFIG_KEY: config.to_json()})
    arguments = (tmp_path / "own.safetensors", tmp_path / "with word", "--layout", "diffusers")
    assert convert_script.main([*map(str, arguments)]) == 0
    return tmp_path / "with word"


@pytest.mark.exhaustive
def test_words_of_a_models_own_folder(with_word, folder):
    """Each text encoder has its tokenizer's, as in diffusers; further words come after them."""
    model = StableDiffusion.load(with_word, device="cpu", dtype="float32")
    assert [tokenizer.encode("a <own-toy>") for tokenizer in model.tokenizers] == [[320, 49408]] * 2
    pipe = pipeline(with_word)
    theirs = pipe.encode_prompt("a <own-toy>", device="cpu", do_classifier_free_guidance=False)
    text = model.encode_texts("a <own-toy>")
    assert error(text.hidden, theirs[0]) < 1e-5 and error(text.pooled, theirs[2]) < 1e-5
    save_file(two(2), with_word / "style.safetensors")
    model.add_embedding(with_word / "style.safetensors")
    assert [tokenizer.encode("style") for tokenizer in model.tokenizers] == [[49409, 49410]] * 2
    # the second text encoder alone, from that folder: its own tokenizer's words
    (with_word / "tokenizer" / "added_tokens.json").unlink()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (with_word / "tokenizer" / name).unlink(missing_ok=True)
    mixed = StableDiffusion.load(folder / "tiny.safetensors", text_encoder_2=with_word, device="cpu", dtype="float32")
    assert [len(tokenizer.encode("<own-toy>")) for tokenizer in mixed.tokenizers] == [5, 1]


def test_with_low_memory(folder, tmp_path):
    """Networks that are read again at each turn keep their words and LoRAs."""
    save_file(two(2), tmp_path / "toy.safetensors")
    tensors, _ = lora_file(
        "kohya", [("text_encoder_2", "blocks.1.fc1.weight"), ("text_encoder", "blocks.1.fc1.weight")]
    )
    lora = saved(tmp_path, tensors)
    found = []
    for low_memory in (False, True):
        model = StableDiffusion.load(folder / "tiny.safetensors", device="cpu", dtype="float32", low_memory=low_memory)
        model.add_embedding(tmp_path / "toy.safetensors")
        model.add_lora(lora, 0.1)
        found += [model.encode_texts("a toy") for _ in range(2)]
    assert all(torch.equal(text.hidden, found[0].hidden) for text in found)
    assert all(torch.equal(text.pooled, found[0].pooled) for text in found)


def test_a_model_says_which_text_encoder_is_missing(shared):
    networks = {name: getattr(shared, name) for name in ("text_encoder", "vae", "unet")}
    with pytest.raises(ValueError, match="tiny sdxl has 2 text encoders: give text_encoder_2 as well"):
        StableDiffusion(TINY_XL, **networks)

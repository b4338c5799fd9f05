"""The tokenizer folder of a diffusers model: words of its own, with the ids of transformers' tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from common import TINY, tiny_state
from safetensors.torch import load_file, save_file
from test_folders import TEXT_FILE, edit, write_folder

from sd.adapters.textual_inversion import tokenizer_for
from sd.checkpoints.checkpoint import load_checkpoint
from sd.checkpoints.detect import identify
from sd.checkpoints.inspect import inspect
from sd.config import Config, TextConfig, Word
from sd.pipeline import StableDiffusion
from sd.text.tokenizer import Tokenizer

FIRST = 49408
CAT, CAT_1, STYLE, MINE = "<cat-toy>", "<cat-toy>_1", "zzstyle", "My Word"
TEXTS = [
    "a photo of <cat-toy> on a beach", "<Cat-Toy>", "x<cat-toy>y", "(<cat-toy>), <cat-toy>!", "<cat-toy>_1",
    "a <cat-toy> <cat-toy>_1 <cat-toy>", "<cat-toy><cat-toy>_1", "zzstyles my ZZSTYLE rezzstyle zzstyle2 zzstyle",
    "My Word", " a  my   word b", "my words", "nothing of it, 's", "<cat-toy", "",
]  # fmt: skip


def token(text: str, **flags: bool) -> dict[str, Any]:
    usual = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
    return {"content": text, **usual, "normalized": True, **flags}


WORDS = [token(CAT), token(CAT_1), token(STYLE), token(MINE)]
FORMS = ["added_tokens.json", "added_tokens_decoder", "additional_special_tokens"]


def add_words(folder: Path, form: str, tokens: list[dict[str, Any]]) -> None:
    """Write words into a folder's tokenizer as versions of transformers do."""
    place, names = folder / "tokenizer", [token["content"] for token in tokens]
    if form == "added_tokens.json":
        (place / form).write_text(json.dumps({name: FIRST + i for i, name in enumerate(names)}))
    elif form == "added_tokens_decoder":
        edit(place / "tokenizer_config.json", added_tokens_decoder={str(FIRST + i): t for i, t in enumerate(tokens)})
    else:
        edit(place / "tokenizer_config.json", additional_special_tokens=names)


def enlarge(folder: Path, more: int) -> torch.Tensor:
    """Add rows to the table of a folder's text encoder."""
    tensors = load_file(folder / TEXT_FILE)
    key = next(key for key in tensors if key.endswith("token_embedding.weight"))
    rows = torch.randn(more, 64, generator=torch.Generator().manual_seed(3)) * 3
    tensors[key] = torch.cat([tensors[key], rows])
    save_file(tensors, folder / TEXT_FILE)
    edit(folder / "text_encoder/config.json", vocab_size=len(tensors[key]))
    return tensors[key]


@pytest.fixture(scope="module")
def state():
    return tiny_state()


@pytest.fixture
def folder(tmp_path, state) -> Path:
    return write_folder(tmp_path / "model", state, TINY)


def tokenizer_of(folder: Path) -> Tokenizer:
    with load_checkpoint(folder) as checkpoint:
        return tokenizer_for(identify(checkpoint).config.text[0])


def notes_of(folder: Path) -> tuple[str, ...]:
    with load_checkpoint(folder) as checkpoint:
        return tuple(checkpoint.notes)


def ids_of_transformers(folder: Path) -> list[list[int]]:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return [theirs(text)["input_ids"][1:-1] for text in TEXTS]


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_transformers(form, folder):
    add_words(folder, form, WORDS)
    enlarge(folder, len(WORDS))
    tokenizer = tokenizer_of(folder)
    assert len(tokenizer.added) == len(WORDS)
    assert [tokenizer.encode(text) for text in TEXTS] == ids_of_transformers(folder)
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    "flags",
    [{"normalized": False}, {"single_word": True}, {"lstrip": True, "rstrip": True},
     {"special": True, "single_word": True, "normalized": False}],
    ids=str,
)  # fmt: skip
def test_flags_are_those_of_transformers(flags, folder):
    add_words(folder, "added_tokens_decoder", [word | flags for word in WORDS])
    enlarge(folder, len(WORDS))
    tokenizer = tokenizer_of(folder)
    assert [tokenizer.encode(text) for text in TEXTS] == ids_of_transformers(folder)


def test_a_folder_of_transformers_5(folder):
    """It has tokenizer.json, and neither a vocabulary nor merges beside it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    theirs.add_tokens([word["content"] for word in WORDS[:3]])
    theirs.add_special_tokens({"additional_special_tokens": [MINE]})
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    theirs.save_pretrained(folder / "tokenizer")
    if not (folder / "tokenizer/tokenizer.json").is_file():
        pytest.skip("an older transformers")
    enlarge(folder, len(WORDS))
    assert notes_of(folder) == ()
    tokenizer = tokenizer_of(folder)
    assert [tokenizer.encode(text) for text in TEXTS] == [theirs(text)["input_ids"][1:-1] for text in TEXTS]
    written = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    written["model"]["merges"] = written["model"]["merges"][1:]
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(written))
    assert len(notes_of(folder)) == 1 and "its tokenizer.json is not CLIP's" in notes_of(folder)[0]


def test_special_words_that_are_objects(folder):
    edit(
        folder / "tokenizer/special_tokens_map.json", additional_special_tokens=[token(CAT, special=True), {"x": 1}, 5]
    )
    enlarge(folder, 1)
    assert tokenizer_of(folder).encode("<Cat-Toy>") == [FIRST]


def test_a_word_has_its_row_of_the_table(folder):
    """In context, in `about`, beside an embedding that is added, and in copies of the model."""
    add_words(folder, "added_tokens_decoder", [token(CAT), token(CAT_1)])
    table = enlarge(folder, 2)
    model = StableDiffusion.load(folder, device="cpu", dtype="float32")
    assert "extra words for prompts: <cat-toy> <cat-toy>_1" in model.about
    text, ids = "a <cat-toy>_1, <CAT-TOY>", [49406, 320, 49409, 267, 49408, *[49407] * 72]
    assert model.tokenizer(text)[0].tolist() == ids
    plain = copy.deepcopy(model.text_encoder)
    plain.token = torch.nn.Embedding.from_pretrained(table)
    expected = plain(torch.tensor([ids])).hidden
    assert torch.allclose(model.encode_prompt(text), expected, atol=1e-6)
    save_file({"emb_params": torch.ones(2, 64)}, folder / "mine.safetensors")
    with pytest.raises(ValueError, match="'<cat-toy>' is taken"):
        model.add_embedding(folder / "mine.safetensors", CAT)
    model.add_embedding(folder / "mine.safetensors")
    assert model.tokenizer.encode("mine <cat-toy>") == [49410, 49411, 49408] and model.words == {"mine": 2}
    model.remove_embedding()
    assert torch.allclose(copy.deepcopy(model).encode_prompt(text), expected, atol=1e-6)


def test_the_words_of_another_text_encoder_are_taken_with_it(folder, tmp_path, state):
    add_words(folder, "added_tokens.json", [token(CAT)])
    enlarge(folder, 1)
    save_file(dict(state), tmp_path / "plain.safetensors")
    model = StableDiffusion.load(tmp_path / "plain.safetensors", config=TINY, text_encoder=folder, device="cpu")
    assert model.tokenizer.encode(CAT) == [FIRST]
    model = StableDiffusion.load(folder, text_encoder=tmp_path / "plain.safetensors", device="cpu")
    assert model.tokenizer.encode(CAT) == Tokenizer().encode(CAT) and not any("words" in line for line in model.about)


def test_words_without_rows_and_rows_without_words(folder):
    add_words(folder, "added_tokens.json", [token(CAT), token("<two>"), token("<three>")])
    enlarge(folder, 1)
    model = StableDiffusion.load(folder, device="cpu")
    said = (
        "extra words for prompts: <cat-toy>",
        "words of its tokenizer that have no vector, and are read as plain text: <two> <three>",
    )
    assert model.about[-2:] == said
    with load_checkpoint(folder) as checkpoint:
        assert set(said) <= set(inspect(checkpoint).notes)
    assert model.tokenizer.encode("<two>") == Tokenizer().encode("<two>")
    (folder / "tokenizer/added_tokens.json").unlink()
    assert StableDiffusion.load(folder, device="cpu").about[-1] == (
        "1 vectors of the text encoder have no word: kept, but no prompt can ask for them"
    )


@pytest.mark.parametrize(
    "file, changes, said",
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "its tokenizer is a BertTokenizer, which"),
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case false, which is not used"),
        ("tokenizer_config.json", {"model_max_length": 64}, "model_max_length 64, which is not used"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, r"pads with '\[PAD\]', which is not used"),
        ("vocab.json", {"cat</w>": 1}, "its vocab.json is not CLIP's, and is not used"),
        ("vocab.json", {"more</w>": 49408}, "its vocab.json is not CLIP's, and is not used"),
        ("added_tokens.json", {"a\nb": 49408}, "1 words of its tokenizer cannot be used"),
        ("added_tokens.json", {"a": 49408, "b": 49408}, "1 words of its tokenizer cannot be used"),
    ],
)  # fmt: skip
def test_what_changes_prompts_and_is_not_used_is_said(file, changes, said, folder):
    assert notes_of(folder) == ()
    place = folder / "tokenizer" / file
    if not place.exists():
        place.write_text("{}")
    edit(place, **changes)
    (note,) = notes_of(folder)
    assert re.search(said, note)


def test_other_merges_are_said(folder):
    lines = (folder / "tokenizer/merges.txt").read_text().splitlines()
    (folder / "tokenizer/merges.txt").write_text("\r\n".join(lines))  # as git on Windows leaves it
    assert notes_of(folder) == ()
    (folder / "tokenizer/merges.txt").write_text("\n".join(lines[:-1]))
    (note,) = notes_of(folder)
    assert "its merges.txt is not CLIP's, and is not used" in note


def test_a_word_to_pad_with(folder):
    add_words(folder, "added_tokens.json", [token("[PAD]")])
    edit(folder / "tokenizer/tokenizer_config.json", pad_token="[PAD]")
    enlarge(folder, 1)
    made = tokenizer_of(folder)
    for tokenizer in (made, pickle.loads(pickle.dumps(made))):
        assert tokenizer("a")[0].tolist() == [49406, 320, 49407, *[FIRST] * 74]


@pytest.mark.parametrize("layout", ["sd", "original", "diffusers"])
def test_words_survive_conversion(layout, folder, tmp_path, capsys):
    from scripts.convert import main

    words = [token(CAT), token(MINE, normalized=False), token(STYLE, single_word=True)]
    add_words(folder, "added_tokens_decoder", words)
    enlarge(folder, 3)
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    assert main([str(folder), str(out), "--layout", layout]) == 0
    assert "extra words for prompts: <cat-toy> My Word zzstyle" in capsys.readouterr().out
    before, after = (StableDiffusion.load(path, device="cpu", dtype="float32") for path in (folder, out))
    assert before.config.text == after.config.text and len(after.tokenizer.added) == 3
    assert before.encode_prompt(TEXTS).equal(after.encode_prompt(TEXTS))


def test_a_config_without_words_is_read_by_versions_that_know_none():
    assert "words" not in Config().to_json()
    config = Config(text=(TextConfig(words=(Word("<a>", FIRST), Word("B", 49500, exact=True, alone=True))),))
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "words",
    [[["<a>", 5, False, False]], [["<a>", 49408, 0, False]], [["<a>"]], [3], "ab", [["", 49408, False, False]],
     [["a\nb", 49408, False, False]], [["a", 49408, False, False], ["a", 49409, False, False]],
     [["a", 49408, False, False], ["b", 49408, False, False]], [["a" * 201, 49408, False, False]]],
)  # fmt: skip
def test_wrong_words_in_a_config_are_refused(words):
    raw = json.loads(Config().to_json())
    raw["text"][0]["words"] = words
    with pytest.raises(ValueError, match=r"TextConfig.words"):
        Config.from_json(json.dumps(raw))


def test_thousands_of_words():
    """All are found, the longest match first."""
    words = tuple(Word(f"<word-{i}>" if i % 2 else f"Wort{i}", FIRST + i) for i in range(3000))
    tokenizer = tokenizer_for(TextConfig(vocab=FIRST + 3000, words=words))
    found = tokenizer.encode("<word-1> <WORD-2999>, wort10 wort1998")
    assert found == [FIRST + 1, FIRST + 2999, 267, FIRST + 10, FIRST + 1998]

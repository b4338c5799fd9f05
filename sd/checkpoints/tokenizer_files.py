"""The tokenizer folder of a diffusers model: words that were added to CLIP's, and settings that are not used here.

A textual inversion that is saved with its whole pipeline has its word in this folder, and the word's vector in the text
encoder's table, after the 49,408 of CLIP. Versions of transformers write the words in different files:

    added_tokens.json          {word: id}; before 4.34
    tokenizer_config.json      added_tokens_decoder: {id: {"content": word, "normalized": ..., ...}}; 4.34 to 4.x
    tokenizer.json             added_tokens: [{"id": id, "content": word, ...}]; 5.x, and "fast" tokenizers before
    special_tokens_map.json    additional_special_tokens: [word or {"content": word, ...}], here or in the config;
                               those that are in none of the others get the ids that follow

CLIP's tokenizer drops spaces, so `lstrip` and `rstrip` change nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..text.vocabulary import MERGES, MERGES_CRC32, SPECIAL
from ..text_config import END, MAX_WORD, MAX_WORDS, TextConfig, Word

MAX_TOKENIZER = 1 << 24  # bytes of tokenizer.json, which has 3.6 MB with CLIP's tables
VOCAB_CRC32 = 0xCF5F2F3E  # of CLIP's tokens in the order of their ids, joined by "\n"
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
NO_LIMIT = 10**6  # tokens: a larger `model_max_length` means that there is none
NAMED = 10  # words in a line; of hundreds, the first ones
FIRST = END + 1  # id of the first word that is not CLIP's

ReadJson = Callable[[Path, int], dict[str, Any]]


def read_tokenizer(folder: Path, config: Mapping[str, Any], read_json: ReadJson) -> tuple[dict[str, Any], list[str]]:
    """The words of a tokenizer folder, as `Word`s by their text, and notes on what in it is not used.

    config     its tokenizer_config.json
    read_json  reads a file of at most so many bytes

    Raises what `read_json` raises.
    """
    whole: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json", MAX_TOKENIZER)
    small = {
        name: read_json(folder / name, 1 << 20) if (folder / name).is_file() else {}
        for name in ("added_tokens.json", "special_tokens_map.json")
    }
    words: dict[str, Word] = {}
    unusable = 0
    taken: set[int] = set()
    for token, number in _tokens(whole, config, small):
        text = token.get("content")
        number = max([END, *taken]) + 1 if number is None and text not in words else number
        if type(number) is not int or number < FIRST or text in words:
            continue  # one of CLIP's own, or listed before
        if not isinstance(text, str) or not _usable(text) or number in taken or len(words) == MAX_WORDS:
            unusable += 1
            continue
        exact = token.get("normalized", not token.get("special", False)) is False
        words[text] = Word(text, number, exact=exact, alone=token.get("single_word") is True)
        taken.add(number)
    notes = [*_unused(config, words), *_other_tables(folder, whole)]
    if unusable:
        notes.append(f"{unusable} words of its tokenizer cannot be used: no printable text, or an id that is taken")
    return {"words": list(words.values())}, notes


def usable_words(text: TextConfig) -> list[Word]:
    """The words of a text encoder's tokenizer for which its table of vectors has rows."""
    return [word for word in text.words if word.id < text.vocab]


def describe_words(text: TextConfig) -> list[str]:
    """Lines on words and rows of the token table beyond CLIP's own; none if there are none."""
    usable, lines = usable_words(text), []
    if usable:
        named = " ".join(word.text for word in usable[:NAMED]) + (" ..." if len(usable) > NAMED else "")
        lines.append(f"extra words for prompts: {named}" + (f" ({len(usable)})" if len(usable) > NAMED else ""))
    if without := [word.text for word in text.words if word.id >= text.vocab]:
        lines.append(
            f"words of its tokenizer that have no vector, and are read as plain text: {' '.join(without[:NAMED])}"
        )
    if rows := text.vocab - FIRST - len(usable):
        lines.append(f"{rows} vectors of the text encoder have no word: kept, but no prompt can ask for them")
    return lines


def words_to_diffusers(words: Sequence[Word]) -> dict[str, dict[str, Any]]:
    """Words -> the `added_tokens_decoder` of a tokenizer_config.json."""
    return {
        str(word.id): {
            "content": word.text, "lstrip": False, "rstrip": False, "normalized": not word.exact,
            "single_word": word.alone, "special": False,
        }
        for word in words
    }  # fmt: skip


def _usable(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) <= MAX_WORD and text not in SPECIAL


def _tokens(
    whole: Mapping[str, Any], config: Mapping[str, Any], small: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], int | None]]:
    """The added tokens with their ids; None for one that gets the next free one."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for key, token in decoder.items():
            if isinstance(token, Mapping) and str(key).isdecimal() and len(str(key)) < 10:
                yield token, int(key)
    listed = whole.get("added_tokens")
    for token in listed if isinstance(listed, list) else []:
        if isinstance(token, Mapping):
            yield token, token.get("id")
    for content, number in small["added_tokens.json"].items():
        yield {"content": content}, number
    for source in (config, small["special_tokens_map.json"]):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = source.get(name)
            for token in more if isinstance(more, list) else []:
                given = {"content": token} if isinstance(token, str) else token
                if isinstance(given, Mapping):
                    yield {"special": True, **given}, None


def _unused(config: Mapping[str, Any], words: Mapping[str, Word]) -> Iterator[str]:
    """Notes on settings that would change what a prompt means."""
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in CLASSES:
        yield f"its tokenizer is a {kind!s:.50}, which is not used: prompts are read with CLIP's tokenizer"
    if config.get("do_lower_case") is False:
        yield "its tokenizer has do_lower_case false, which is not used: prompts are read in lower case, as CLIP does"
    length = config.get("model_max_length")
    if type(length) is int and length < NO_LIMIT and length != 77:
        yield f"its tokenizer has model_max_length {length}, which is not used: prompts have 77 tokens here"
    pad = pad_token(config)
    if pad is not None and pad not in ("!", SPECIAL[1]) and pad not in words:
        yield f"its tokenizer pads with {pad!r:.50}, which is not used: prompts are padded as the model usually is"


def pad_token(config: Mapping[str, Any]) -> str | None:
    """The text of the token with which prompts are padded, if a tokenizer_config.json has one."""
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    return pad if isinstance(pad, str) else None


def _other_tables(folder: Path, whole: Mapping[str, Any]) -> Iterator[str]:
    """A note if the vocabulary or the merges are not CLIP's."""
    model = whole.get("model")
    vocab: object = model.get("vocab") if isinstance(model, Mapping) else None
    merges: object = model.get("merges") if isinstance(model, Mapping) else None
    for name, table in (("vocab.json", vocab), ("merges.txt", merges)):
        path = folder / name
        if table is None and not path.is_file():
            continue
        try:
            if path.is_file():
                same = path.stat().st_size <= MAX_TOKENIZER and _is_table(name, path.read_bytes())
            else:
                same = _is_vocab(table) if name == "vocab.json" else _are_merges(table)
        except (OSError, ValueError, RecursionError, TypeError):
            same = False
        if not same:
            where = name if path.is_file() else "tokenizer.json"
            yield f"its {where} is not CLIP's, and is not used: prompts are read with CLIP's {MERGES:,} merges"


@lru_cache(maxsize=4)  # the same in all models
def _is_table(name: str, raw: bytes) -> bool:
    """Whether this is CLIP's vocab.json or merges.txt."""
    return _is_vocab(json.loads(raw)) if name == "vocab.json" else _are_merges(raw.splitlines())


def _is_vocab(table: object) -> bool:
    if not isinstance(table, Mapping):
        return False
    tokens = sorted(table, key=table.__getitem__)[:FIRST]
    ids = [table[token] for token in tokens]
    return ids == list(range(FIRST)) and zlib.crc32("\n".join(tokens).encode()) == VOCAB_CRC32


def _are_merges(lines: object) -> bool:
    if not isinstance(lines, list):
        return False
    if lines and isinstance(lines[0], bytes):  # merges.txt, after its first line
        return zlib.crc32(b"\n".join(lines[1 : 1 + MERGES])) == MERGES_CRC32
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in lines]
    return zlib.crc32("\n".join(pairs).encode()) == MERGES_CRC32

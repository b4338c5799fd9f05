"""The tokenizer against recorded ids of the original, a textbook byte-pair encoding, and its own promises."""

from __future__ import annotations

import ast
import copy
import gzip
import json
import pickle
import random
import string
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import sd.text.tokenizer
from sd.resources import resource
from sd.text.tokenizer import PIECE, Tokenizer, clean, merge

GOLDENS = Path(__file__).parent / "goldens"
TEXTS = json.loads((GOLDENS / "tokens.json").read_text(encoding="utf-8"))["prompts"]
CAT = 2368
TOKENIZER = Tokenizer()
PLAIN = Tokenizer(allow_special=False)
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def merges_lines() -> list[str]:
    text = gzip.decompress(resource("data/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    return text.split("\n")[1 : 49152 - 256 - 2 + 1]


RANKS = {tuple(line.split()): rank for rank, line in enumerate(merges_lines())}


def textbook(symbols: tuple, ranks: dict) -> tuple:
    """Byte-pair encoding as it is defined: the best pair of the word, all of it from left to right, again."""
    while True:
        pairs = [pair for pair in pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        best = min(pairs, key=ranks.get)
        joined, i = [], 0
        while i < len(symbols):
            if symbols[i : i + 2] == best:
                joined.append(best[0] + best[1])
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        symbols = tuple(joined)


def as_symbols(word: str) -> tuple[str, ...]:
    """The bytes of a word as the table writes them: printable Latin-1 as it is, the n-th other byte as U+0100 + n."""
    printable = set(range(ord("!"), ord("~") + 1)) | set(range(ord("¡"), ord("ÿ") + 1)) - {0xAD}
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(b) if b in printable else chr(256 + others.index(b)) for b in word.encode("utf-8")]
    return (*symbols[:-1], symbols[-1] + "</w>")


def write_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(dict(TOKENIZER.vocab), ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *merges_lines()]) + "\n"
    (folder / "merges.txt").write_bytes(merges.encode("utf-8"))
    return folder


# Recorded ids


def test_texts_of_the_original():
    assert len(TEXTS) == 176
    wrong = {text["text"]: ids for text in TEXTS if (ids := TOKENIZER.encode(text["text"])) != text["openai"]}
    assert wrong == {}


def test_without_html_unescape_as_the_tokenizer_of_sd_1():
    tokenizer, column = Tokenizer(html_unescape=False), "hf_slow_4.19.2_ftfy"
    assert sum(column in text for text in TEXTS) == 4
    wrong = [text for text in TEXTS if tokenizer.encode(text["text"]) != text.get(column, text["openai"])]
    assert wrong == []


def test_model_input_of_sd_1_and_2():
    with safe_open(GOLDENS / "clip_l.safetensors", "pt") as file:
        ids, case = file.get_tensor("ids"), json.loads(file.metadata()["case"])
    assert case["pad"] == 49407 == TOKENIZER.pad
    rows = TOKENIZER(case["prompts"])
    assert rows.shape == (4, 77) and rows.dtype == torch.int64
    assert torch.equal(rows, ids.long())

    padded = ids.long().clone()  # SD 2: the same with zeros after the first end
    for row in padded:
        row[row.tolist().index(49407) + 1 :] = 0
    assert torch.equal(Tokenizer(pad=0)(case["prompts"]), padded)


def test_model_input_of_the_sampler_runs():
    with safe_open(GOLDENS / "contexts_tiny_v1.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        assert torch.equal(TOKENIZER(case["prompts"]), file.get_tensor("ids").long())
        assert torch.equal(TOKENIZER([case["negative"]] * 2), file.get_tensor("ids_uncond").long())


# Byte-pair encoding


def test_vocabulary():
    vocab = TOKENIZER.vocab
    assert len(vocab) == 49408 and list(vocab.values()) == list(range(49408))
    assert (vocab["!"], vocab["!</w>"], vocab["in"], vocab["cat</w>"]) == (0, 256, 512, CAT)
    assert vocab["<|startoftext|>"] == TOKENIZER.start == 49406
    assert vocab["<|endoftext|>"] == TOKENIZER.end == 49407
    with pytest.raises(TypeError):
        vocab["cat"] = 0


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="aehinort", min_size=1, max_size=60)
    | st.text(alphabet="ab", min_size=1, max_size=60)
    | st.text(alphabet=string.punctuation, min_size=1, max_size=60)
    | st.text(alphabet="é東京😂のㅋ한", min_size=1, max_size=30)
)
@example("aaaaaaaaaaa")
@example("antidisestablishmentarianism")
def test_a_word_is_encoded_as_the_textbook_does(word):
    tokens = textbook(as_symbols(word), RANKS)
    assert list(TOKENIZER._encode_word(word)) == [TOKENIZER.vocab[token] for token in tokens]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_merge_equals_the_textbook_for_any_table(data):
    """Also for tables that no training gives, in which a merge can make a pair of a lower rank than its own."""
    tokens = ["a", "b", "c"]
    for _ in range(data.draw(st.integers(0, 12))):
        joined = data.draw(st.sampled_from(tokens)) + data.draw(st.sampled_from(tokens))
        if joined not in tokens and len(joined) < 8:
            tokens.append(joined)
    splits = {}  # one pair makes one token; the ranks are in any order
    for token in tokens[3:]:
        pairs = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in tokens and token[k:] in tokens]
        splits[data.draw(st.sampled_from(pairs))] = token
    order = data.draw(st.permutations(list(splits)))
    ranks = {pair: rank for rank, pair in enumerate(order)}
    ids = {"a": 0, "b": 1, "c": 2} | {splits[pair]: 3 + rank for pair, rank in ranks.items()}
    merges = {ids[a] << 16 | ids[b]: ids[a + b] for a, b in ranks}

    word = data.draw(st.text("abc", min_size=1, max_size=40))
    assert merge([ids[letter] for letter in word], merges) == [ids[token] for token in textbook(tuple(word), ranks)]


@pytest.mark.parametrize(
    "word", ["a" * 20_000, "ab" * 10_000, "".join(random.Random(0).choices("etaoinshr", k=20_000))]
)
def test_the_work_grows_with_the_length_only(word):
    """At most 6 look-ups per byte (1 at first, 3 to check places, 2 after a merge); the textbook takes thousands."""

    class Counting(dict):
        count = 0

        def get(self, key):
            self.count += 1
            return super().get(key)

    merges = Counting(TOKENIZER._merges)
    symbols = [TOKENIZER.vocab[letter] for letter in word]
    ids = merge(symbols, merges)
    assert "".join(TOKENIZER.decode([i]) for i in ids) == word
    assert len(word) <= merges.count <= 6 * len(word)


def test_long_texts():
    assert TOKENIZER.encode("cat " * 250_000) == [CAT] * 250_000  # a million characters
    ids = TOKENIZER.encode("a" * 100_000)
    assert TOKENIZER.decode(ids) == "a" * 100_000
    assert len(ids) < 20_000


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("&" * 100_000, "&" * 100_000),
        ("\x01" * 100_000, ""),
        ("\x1b[" * 50_000, "[" * 50_000),
        ("<|" * 50_000, "<|" * 50_000),
        ("'s" * 50_000, "'s " * 49_999 + "'s"),
        (" " * 100_000, ""),
        ("&#" + "9" * 100_000 + ";", "\ufffd"),  # a number that int() refuses to read
        ("&#" + "0" * 100_000 + "65;", "a"),
        ("\ud800" * 10_000, "\ufffd" * 10_000),
    ],
    ids=["ampersands", "controls", "escapes", "angles", "contractions", "spaces", "number", "zeros", "surrogates"],
)
def test_long_odd_texts(text, decoded):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == decoded


def test_lines_are_repaired_in_pieces(monkeypatch):
    """ftfy can take the square of a line's length, so it must not see a whole long line."""
    import ftfy

    seen = []
    original = ftfy.fix_and_explain
    monkeypatch.setattr(ftfy, "fix_and_explain", lambda text, *rest: seen.append(len(text)) or original(text, *rest))
    clean("x" * 10 * PIECE)
    assert sum(seen) == 10 * PIECE and max(seen) == PIECE
    assert 75 * max(len(TOKENIZER.decode([i])) for i in range(TOKENIZER.start)) < PIECE


def test_the_cache_is_bounded():
    tokenizer = Tokenizer()
    tokenizer.encode("a" * 1000 + " cat")
    assert tokenizer._cached.cache_info().currsize == 1  # not the long word
    assert tokenizer._cached.cache_info().maxsize is not None


# Cleaning


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\r\n\tCAT \u3000 ", "a cat"),
        ("donâ€™t “cafÃ©” \uff21\uff22\uff23 ﬁne", 'don\'t "café" abc fine'),
        ("&lt;b&gt; &amp;amp;", "<b> &"),
        ("<b> &amp;lt; &amp;amp;lt;", "<b> < &lt;"),  # ftfy leaves these to the two rounds that follow
        ("İ", "i\u0307"),  # one character becomes two
        ("ΣΣ", "σς"),  # the final sigma, as Python lowers it
        ("\ud83d\ude00 \ud83d \ude00", "😀 \ufffd \ufffd"),  # a pair of surrogates, and two alone
        ("&#0000000065;&#x41;&#xD800;&#55296;&amp;#66;", "aa\ufffd\ufffdb"),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_clean_without_html_unescape():
    assert clean("&amp;amp; &copy 1", html_unescape=False) == "& &copy 1"
    assert clean("<b> &lt;", html_unescape=False) == "<b> &lt;"


def test_split_removes_what_the_pattern_calls_space():
    """The original replaces regex's white space; the four characters that only Python counts never survive ftfy."""
    characters = [chr(i) for i in range(0x110000)]
    spaces = {c for c in characters if c.isspace()}
    assert spaces - set(regex.findall(r"\s", "".join(characters))) == {"\x1c", "\x1d", "\x1e", "\x1f"}
    assert len(spaces) == 29
    assert clean("a\x1cb&#28;&#29;&#30;&#31;&amp;#28;") == "ab"


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(), max_size=60))
def test_every_string_has_ids(text):
    assert all(0 <= i <= TOKENIZER.end for i in TOKENIZER.encode(text))
    assert all(0 <= i < TOKENIZER.start for i in PLAIN.encode(text))


# Special tokens


def test_special_tokens_in_a_text():
    assert TOKENIZER.encode("a<|ENDOFTEXT|>cat <|startoftext|>") == [320, 49407, CAT, 49406]
    for text in ("a<|endoftext|>cat", "<|startoftext|>", "<|EndOfText|>"):
        ids = PLAIN.encode(text)
        assert max(ids) < 49406
        assert PLAIN.decode(ids).replace(" ", "") == text.lower()
    words = PLAIN.encode("<|") + PLAIN.encode("endoftext") + PLAIN.encode("|>")
    assert PLAIN.encode("<|endoftext|>") == words
    assert PLAIN.encode("a cat, 3 birds") == TOKENIZER.encode("a cat, 3 birds")
    assert TOKENIZER("a <|endoftext|>")[0, :4].tolist() == [49406, 320, 49407, 49407]


# Rows of the model


@pytest.mark.parametrize("text", ["", "   ", "\t\r\n", "\u00a0\u2003"])
@pytest.mark.parametrize("pad", [49407, 0])
def test_empty_text(text, pad):
    tokenizer = Tokenizer(pad=pad)
    assert tokenizer.encode(text) == []
    assert tokenizer(text).tolist() == [[49406, 49407] + [pad] * 75]
    assert tokenizer.cut(text) == (0, "")


@pytest.mark.parametrize("pad", [49407, 0])
@pytest.mark.parametrize("tokens", [74, 75])
def test_texts_that_fit(tokens, pad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = Tokenizer(pad=pad)("cat " * tokens)
    assert rows.tolist() == [[49406] + [CAT] * tokens + [49407] + [pad] * (75 - tokens)]


@pytest.mark.parametrize("tokens", [76, 77, 400])
def test_texts_that_do_not_fit(tokens):
    text = "cat " * 75 + "dog " * (tokens - 75)
    verb = "is" if tokens == 76 else "are"
    message = rf"prompt is {tokens} tokens long, 75 fit: the last {tokens - 75} {verb} ignored, from \"dog"
    with pytest.warns(UserWarning, match=message) as caught:
        rows = Tokenizer(pad=0)(text)
    assert rows.tolist() == [[49406] + [CAT] * 75 + [49407]]
    assert TOKENIZER.cut(text) == (tokens - 75, ("dog " * (tokens - 75)).strip())
    assert len(caught) == 1 and len(str(caught[0].message)) < 200
    assert caught[0].filename == __file__


def test_one_warning_per_text():
    texts = ["cat " * 76, "cat", "cat " * 75 + "a Red bird"]
    with pytest.warns(UserWarning) as caught:
        rows = TOKENIZER(texts)
    assert rows.shape == (3, 77)
    assert ['"cat" on' in str(w.message) for w in caught] == [True, False]
    assert "the last 3 are ignored" in str(caught[1].message) and '"a red bird" on' in str(caught[1].message)


def test_another_length_and_no_texts():
    short = Tokenizer(length=5, pad=0)
    assert short("a cat").tolist() == [[49406, 320, CAT, 49407, 0]]
    assert short.cut("a cat a cat") == (1, "cat")
    assert short([]).shape == (0, 5)


@pytest.mark.parametrize("arguments", [{"length": 2}, {"pad": -1}, {"pad": 49408}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=str(*arguments.values())):
        Tokenizer(**arguments)


@pytest.mark.parametrize("texts", [[None], ["a", 3], [b"cat"]])
def test_not_a_text(texts):
    with pytest.raises(TypeError, match="a text must be a str, got"):
        TOKENIZER(texts)


# Decoding


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(), max_size=60))
@example("cat</w>")
@example("it'\u017fx")  # the long s: 's, then x
@example("Í\x85")
@example("it's 1024x768, (really:1.2) &amp;lt; 東京 😀")
def test_decode_gives_the_words(text):
    words = PATTERN.findall(clean(text))
    assert PLAIN.decode(PLAIN.encode(text)) == " ".join(words)
    # U+0345 is no letter, but its upper case is one: under IGNORECASE, CLIP's pattern has no word for it
    assert "".join(words) == clean(text).replace(" ", "").replace("\u0345", "")


@settings(deadline=None, max_examples=300)
@given(st.text("".join(set(string.printable) - set("&")), max_size=60))
def test_decoded_ascii_has_the_same_ids(text):
    """Without entities: `& lt;` is none, but `&lt;` gives `<`."""
    ids = PLAIN.encode(text)
    assert PLAIN.encode(PLAIN.decode(ids)) == ids


@settings(deadline=None)
@given(st.lists(st.integers(0, 49407), max_size=40))
def test_any_ids_can_be_decoded(ids):
    text = TOKENIZER.decode(ids)
    assert isinstance(text, str)
    assert TOKENIZER.decode(iter(ids)) == TOKENIZER.decode(torch.tensor(ids, dtype=torch.long)) == text


@pytest.mark.parametrize("pad", [49407, 0])
def test_decode_of_a_row(pad):
    row = Tokenizer(pad=pad)("A cat, on a mat!")[0]
    assert TOKENIZER.decode(row) == "a cat , on a mat !"
    assert TOKENIZER.decode([49406, 320, 49407, CAT]) == "a"  # what follows the end is not read
    assert TOKENIZER.decode([320, 49407, CAT, 49407]) == "a cat"  # no row of the model
    assert TOKENIZER.decode([49406, 320, CAT]) == "a cat"
    assert TOKENIZER.decode([]) == TOKENIZER.decode([49406]) == ""


def test_decode_of_half_a_character():
    ids = [TOKENIZER.vocab[symbol] for symbol in as_symbols("😀")]
    assert TOKENIZER.decode(ids) == "😀"
    assert TOKENIZER.decode(ids[:2]) == "\ufffd"


def test_decode_refuses_what_is_no_id():
    for i in (-1, 49408):
        with pytest.raises(ValueError, match=f"got {i}"):
            TOKENIZER.decode([320, i])
    with pytest.raises(ValueError, match=r"got \(1, 77\)"):
        TOKENIZER.decode(TOKENIZER("a cat"))


# Tables from elsewhere


def test_folder_of_a_diffusers_model(tmp_path):
    folder = write_folder(tmp_path / "tokenizer")
    for source in (folder, str(folder), folder / "merges.txt"):
        tokenizer = Tokenizer(merges=source)
        assert tokenizer.vocab == TOKENIZER.vocab and tokenizer._merges == TOKENIZER._merges
    assert tokenizer.encode("a photograph of an astronaut") == TOKENIZER.encode("a photograph of an astronaut")


def test_other_forms_of_the_merges(tmp_path):
    bundled = gzip.decompress(resource("data/bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = "\n".join(["#version: 0.2", *merges_lines()]).encode()
    forms = {"plain.txt": bundled, "no_newline.txt": merges, "crlf.txt": merges.replace(b"\n", b"\r\n")}
    for name, data in (forms | {"zipped": gzip.compress(merges, 1)}).items():
        (tmp_path / name).write_bytes(data)
        assert Tokenizer(merges=tmp_path / name)._merges == TOKENIZER._merges, name


def refused(path: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        Tokenizer(merges=path)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ | (caught.value.__context__ is None)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_other_merges_are_refused(tmp_path):
    lines, path = ["#version: 0.2", *merges_lines()], tmp_path / "merges.txt"
    cases = {
        "holds 48,893 merges": lines[:-1],
        "holds 0 merges": [],
        "other merges": [lines[0], lines[2], lines[1], *lines[3:]],
        "holds other": [*lines[1:], "x y", "y z"],
    }
    for words, wrong in cases.items():
        path.write_text("\n".join(wrong), encoding="utf-8")
        assert words in refused(path, ValueError)
    path.write_bytes(bytes(range(256)) * 5000)
    refused(path, ValueError)
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 1)[:100_000])
    assert "cannot read" in refused(path, ValueError)
    path.write_bytes(b"\x1f\x8b no gzip")
    assert "cannot read" in refused(path, ValueError)


def test_other_folders_are_refused(tmp_path):
    folder = write_folder(tmp_path / "tokenizer")
    vocab = dict(TOKENIZER.vocab)
    swapped = vocab | {"cat</w>": vocab["dog</w>"], "dog</w>": vocab["cat</w>"]}
    cases = {
        "token 'dog</w>' has id 2368, expected 1929": swapped,
        "token '!' has id None": {"?!?": 0} | {token: i for token, i in vocab.items() if i},
        "holds 49,409 entries, expected 49,408": vocab | {"<my-token>": 49408},
        "holds no table": ["cat"],
    }
    for words, wrong in cases.items():
        (folder / "vocab.json").write_text(json.dumps(wrong))
        assert words in refused(folder, ValueError)
    for wrong in (b"{", b"", b"\xff\xfe\x00", b"[" * 100_000):
        (folder / "vocab.json").write_bytes(wrong)
        assert "cannot be read as JSON" in refused(folder, ValueError)


def test_missing_files(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "tokenizer")
    (folder / "vocab.json").unlink()
    assert "vocab.json" in refused(folder, FileNotFoundError)
    assert "merges.txt" in refused(tmp_path, FileNotFoundError)
    assert "data/README.md" in refused(tmp_path / "none.txt.gz", FileNotFoundError)
    monkeypatch.setattr(sd.text.tokenizer, "resource", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no merges file at .*bpe_simple_vocab_16e6.txt.gz"):
        Tokenizer()


def test_tokenizers_share_the_table_and_not_their_words():
    """The table is read once, and nobody can change it; a word that is added belongs to one tokenizer."""
    one, other = Tokenizer(), Tokenizer(pad=0)
    assert one._merges is other._merges and one._tokens is other._tokens
    one.add("<toy>", [TOKENIZER.end + 1])
    assert one.encode("<toy>") == [TOKENIZER.end + 1]
    assert other.encode("<toy>") == TOKENIZER.encode("<toy>") != one.encode("<toy>")
    with pytest.raises(TypeError):
        one.vocab["cat</w>"] = 0
    vocab, merges = one.tables()
    vocab.clear()
    merges.clear()
    assert one.tables() == other.tables() and len(other.tables()[0]) == 49408


def test_copies_for_other_processes():
    tokenizer = Tokenizer(length=12, pad=0, allow_special=False, html_unescape=False)
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert twin("a <|endoftext|> &lt").tolist() == tokenizer("a <|endoftext|> &lt").tolist()
        assert twin.length == 12


def test_slow_imports_wait_for_a_tokenizer():
    tree = ast.parse(Path(sd.text.tokenizer.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "torch" in names and not names & {"ftfy", "regex"}


def test_against_transformers(tmp_path):
    """Plain ASCII, on which it agrees with the original; it knows neither ftfy nor entities."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = write_folder(tmp_path / "tokenizer")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours, rng = Tokenizer(merges=folder), random.Random(0)
    texts = ["a photograph of an astronaut riding a horse", "IT'S 1024x768, isn't it?!", "snake_case (a:1.2) [b]", ""]
    letters = string.ascii_letters + string.digits + "   ,.;:!?'\"()[]{}#@%_-+/*=|~^$"
    texts += ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(200)]
    for text in texts:
        assert theirs(text)["input_ids"] == [49406, *ours.encode(text), 49407], text

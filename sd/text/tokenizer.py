"""Text -> token ids: the byte-pair encoding of CLIP, which Stable Diffusion 1 and 2 use for their prompts.

Byte-pair encoding (Sennrich et al. 2016, "Neural machine translation of rare words with subword units",
arXiv:1508.07909) is a vocabulary between letters and words. It is trained once: start from single symbols, merge the
most frequent pair of neighbours in a large text, record the pair, repeat. The list of pairs in this order, the
*merges*, is the whole tokenizer. To encode a word, apply them in the same order: of all neighbouring pairs, merge the
one that comes first in the list, at all its positions from left to right, until no pair is in the list.

    t r i c e r a t o p s.      letters; s. is an s at the end of the word
    t r i c er a t o p s.       "e r" is merge 5 (counted from 0), the first in the list among all pairs here
    t r i c er at o p s.        "a t" is merge 15
    t r ic er at o p s.         "i c" is merge 23; then come "t r" 123, "o p" 164, "op s." 2542 and "tr ic" 8999
    tric er at ops.             four tokens: 9511, 517, 527, 3054

Frequent words become one token, rare words a few, and no text is out of vocabulary: the symbols are not characters but
the 256 bytes of UTF-8 (GPT-2, Radford et al. 2019). CLIP (Radford et al. 2021, arXiv:2103.00020) lowercases everything,
drops spaces, and marks the last symbol of a word with `</w>` instead. Its 49,408 tokens are those of vocabulary.py.

    text -> clean -> words -> bytes -> merges -> ids -> start, ids, end, padding: (B, 77)

start, end   the two special ids; CLIP's summary of a text (the pooled output) is its output at the first end
pad          49407 in SD 1 (as in Hugging Face's CLIP) and 0 in SD 2 (as in OpenAI's own and OpenCLIP), as in training
word         a match of the pattern below: letters, one digit, a run of punctuation, 's 't 're 've 'm 'll 'd

>>> tokenizer = Tokenizer()
>>> tokenizer.encode("triceratops")
[9511, 517, 527, 3054]
>>> tokenizer("a red house").shape
torch.Size([1, 77])
"""

from __future__ import annotations

import html
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Flag, auto
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..resources import resource
from .vocabulary import (
    BYTE_IDS,
    BYTE_OF_SYMBOL,
    END_OF_WORD,
    MERGES,
    SPECIAL,
    bundled_tables,
    read_tables,
)

# Needs the `regex` package for \p{L} (letters of any script) and \p{N} (digits). As in CLIP, case is ignored: after
# lower() that matters for one letter only, U+017F, which counts as an s in 's.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# ftfy repeats its fixes until nothing changes, which takes time quadratic in the length of some lines ("Ã" followed by
# 100,000 "ƒ": many minutes). Longer lines are therefore fixed in pieces. A piece is longer than a model's 75 tokens can
# be, since a token has at most 24 characters.
PIECE = 2000
MAX_CACHED = 64  # characters; longer words are rare and not cached, which bounds the memory of the cache

Split = Callable[[str], list[str]]  # a text -> the pieces between words, and the words at odd places


class Rule(Flag):
    """Where a word that was added is found in a text."""

    USUAL = 0  # in upper or lower case; not where a letter or digit beside it makes it part of a longer word
    EXACT = auto()  # only as it is written
    ANYWHERE = auto()  # within longer words as well
    ALONE = auto()  # with no letter or digit beside it, even if it begins or ends with neither


Note = Callable[[str], object]  # receives one line for each thing that was cut, chosen or retried


def warn(message: str) -> None:
    """The default `Note`: a UserWarning."""
    warnings.warn(message, stacklevel=4)


def clean(text: str, *, html_unescape: bool = True) -> str:
    """Normalise text as CLIP did in training: encoding errors repaired, single spaces, lower case.

    `ftfy` repairs text that was decoded wrongly (`cafÃ©` -> `café`), straightens quotes, narrows full-width letters,
    drops control characters and replaces lone surrogates by U+FFFD. HTML entities such as `&lt;` are then unescaped
    twice, since web text is often escaped twice. `html_unescape=False` skips that, as did the tokenizer that SD 1 was
    trained with (ftfy also unescapes well-formed entities, unless there is a `<` before or beside them).

    Equal to OpenAI's `basic_clean` and `whitespace_clean` for lines of up to 2,000 characters; longer lines are
    repaired in pieces of that size.
    """
    import ftfy  # slow to import, and not needed before the first text

    text = ftfy.fix_text(text, max_decode_length=PIECE)
    for _ in range(2 if html_unescape else 0):
        # Python refuses to parse integers of more than 4,300 digits; 8 digits are already beyond Unicode
        text = html.unescape(re.sub(r"&#0*([0-9]{1,8})[0-9]*", r"&#\1", text))
    return " ".join(text.split()).lower()


def merge(symbols: list[int], merges: Mapping[int, int]) -> list[int]:
    """Byte-pair encoding of one word: repeatedly merge the pair of the lowest rank, at all its positions.

    symbols: the ids of the word's bytes. merges: `left << 16 | right` -> the id of the merged pair, which is its rank.

    The textbook algorithm searches the whole word for the best pair once per merge, which is quadratic. Here a linked
    list holds the word, a heap the ranks that occur, and `places` their positions. A merge changes only the neighbours
    of the pair, so a word of N bytes takes O(N) steps, plus O(log N) in the heap for each distinct merge.
    """
    ids = [*symbols, -1]  # a sentinel in no pair: it is after the end and, as index -1, also before the start
    left = list(range(-1, len(ids) - 1))
    right = list(range(1, len(ids) + 1))
    places = defaultdict(list)
    for i, (a, b) in enumerate(pairwise(ids)):
        rank = merges.get(a << 16 | b)
        if rank is not None:
            places[rank].append(i)
    ranks = list(places)
    heapify(ranks)

    while ranks:
        merged = heappop(ranks)
        # from left to right; no position is added to this list, since new pairs contain the new token
        for i in places.pop(merged):
            j = right[i]
            if merges.get(ids[i] << 16 | ids[j]) != merged:
                continue  # an earlier merge consumed one of the two
            ids[i], ids[j] = merged, -1
            right[i] = right[j]
            left[right[j]] = i
            for a, b in ((left[i], i), (i, right[i])):
                rank = merges.get(ids[a] << 16 | ids[b])
                if rank is not None:
                    if rank not in places:
                        heappush(ranks, rank)
                    places[rank].append(a)
    return [i for i in ids if i >= 0]


class Tokenizer:
    """CLIP's tokenizer. `tokenizer(texts)` returns the input of the text encoder.

    length           ids per text, including start and end
    pad              the id after the end, 49407 for SD 1 and 0 for SD 2
    merges           a merges file (OpenAI's or Hugging Face's, plain or .gz), or the tokenizer/ folder of a diffusers
                     model with vocab.json and merges.txt; None reads the file in data/. Only CLIP's table is accepted
    allow_special    `<|startoftext|>` and `<|endoftext|>` in a text become 49406 and 49407, as in OpenAI's tokenizer,
                     so a prompt can end early; if False they are read as punctuation and letters
    html_unescape    see `clean`

    `add` and `remove` register words for ids beyond the table (textual inversion). `added` has their ids.

    Raises FileNotFoundError if there is no table, ValueError for another table or arguments out of range.
    """

    start: int = 512 + MERGES
    end: int = 512 + MERGES + 1
    vocab: Mapping[str, int]  # token as written in the table -> id, in the order of the ids; 49,408 entries

    def __init__(
        self,
        *,
        length: int = 77,
        pad: int = 49407,
        merges: Path | str | None = None,
        allow_special: bool = True,
        html_unescape: bool = True,
    ) -> None:
        import regex  # slow to import, as ftfy

        if length < 3:
            raise ValueError(f"length must be at least 3 (start, one token, end), got {length}")
        if not 0 <= pad <= self.end:
            raise ValueError(f"pad must be a token id, 0 to {self.end}, got {pad}")
        self.length, self.pad, self.html_unescape = length, pad, html_unescape
        self.special = dict(zip(SPECIAL, (self.start, self.end), strict=True)) if allow_special else {}
        words = "|".join([*map(regex.escape, self.special), WORDS])
        self._words = regex.compile(words, regex.IGNORECASE)

        path = resource("data/bpe_simple_vocab_16e6.txt.gz") if merges is None else Path(merges)
        self._again = partial(  # for `__reduce__`
            type(self), length=length, pad=pad, merges=merges, allow_special=allow_special, html_unescape=html_unescape
        )
        # all tokenizers share the tables of the file in data/, and none changes them: reading them takes longest
        found = bundled_tables(path) if merges is None else read_tables(path)
        self._tokens, self._merges, self.vocab = found.tokens, found.merges, MappingProxyType(found.vocab)
        self._cached = lru_cache(maxsize=1 << 14)(self._encode_word)
        self.added: dict[str, tuple[int, ...]] = {}  # registered words, cleaned unless they are exact -> ids
        self._rules: dict[str, Rule] = {}  # by word, where they are not the usual ones
        self._splits: tuple[Split, Split] | None = None  # split a text as it is, and a cleaned one; made when needed

    def __call__(self, texts: str | Sequence[str], note: Note = warn) -> torch.Tensor:
        """Token ids (B, length), int64: start, the text's tokens, end, padding. One text gives B = 1.

        Tokens that do not fit are dropped before the end token; `note` receives what each such text lost.
        """
        fitting = []
        for text in [texts] if isinstance(texts, str) else texts:  # no comprehension: `warn` counts stack frames
            fitting.append(self.fitting(self.encode(text), note))
        return self.rows(fitting)

    def fitting(self, ids: list[int], note: Note = warn) -> list[int]:
        """The ids of a text that fit between start and end; `note` receives what is lost."""
        room = self.length - 2
        if len(ids) > room:
            lost, tail = len(ids) - room, self.decode(ids[room:])
            tail = tail if len(tail) <= 100 else tail[:97] + "..."
            note(
                f"prompt is {len(ids)} tokens long, {room} fit: "
                f'the last {lost} {"are" if lost > 1 else "is"} ignored, from "{tail}" on'
            )
        return ids[:room]

    def rows(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Ids of texts that fit -> the input of the text encoder (B, length): start, the ids, end, padding."""
        rows = torch.full((len(texts), self.length), self.pad, device="cpu")
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids) + 2] = torch.tensor([self.start, *ids, self.end], device="cpu")
        return rows

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end. Raises TypeError if it is not a str."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, got {type(text).__name__}: {text!r:.80}")
        at_exact_words, at_words = self._splits = self._splits or self._find_added()
        ids: list[int] = []
        for i, piece in enumerate(at_exact_words(text)):
            if i % 2:
                ids.extend(self.added[piece])
                continue
            for j, part in enumerate(at_words(clean(piece, html_unescape=self.html_unescape))):
                if j % 2:
                    ids.extend(self.added[part])
                    continue
                for word in self._words.findall(part):
                    if word in self.special:
                        ids.append(self.special[word])
                    else:
                        ids.extend(self._cached(word) if len(word) <= MAX_CACHED else self._encode_word(word))
        return ids

    def add(self, word: str, ids: Iterable[int], rule: Rule = Rule.USUAL) -> str:
        """Register a word for ids beyond the table, `end` + 1 and above; returns it as `clean` leaves it.

        It is recognised anywhere in a text, in upper or lower case, unless it is part of a longer word; `rule` changes
        that. If several registered words match, the longest wins, and exact ones come before all others. Raises
        ValueError for a word that is empty or taken.
        """
        exact = Rule.EXACT in rule
        cleaned, ids = word if exact else clean(word, html_unescape=self.html_unescape), tuple(ids)
        if not cleaned or cleaned in SPECIAL:
            raise ValueError(f"{word!r} cannot be a word of its own: choose another one")
        if cleaned in self.added:
            raise ValueError(f"the word {cleaned!r} is taken: choose another one")
        if not ids or min(ids) <= self.end:
            raise ValueError(f"the ids of {word!r} must be beyond {self.end}, got {ids}")
        self._rules = {**self._rules, cleaned: rule}
        self.added, self._splits = {**self.added, cleaned: ids}, None
        return cleaned

    def remove(self, word: str) -> None:
        """Remove a registered word; it is plain text again. Raises KeyError if it was not registered."""
        added = dict(self.added)
        del added[word]
        self.added, self._splits = added, None

    def _find_added(self) -> tuple[Split, Split]:
        """The functions that split a text at exact words, and a cleaned text at all others."""
        import regex

        def pattern(word: str) -> str:
            rule = self._rules.get(word, Rule.USUAL)
            whole = [
                Rule.ALONE in rule or (Rule.ANYWHERE not in rule and regex.match(r"\w", x)) for x in (word[0], word[-1])
            ]
            return r"(?<!\w)" * bool(whole[0]) + regex.escape(word) + r"(?!\w)" * bool(whole[1])

        def split(exact: bool) -> Split:
            words = [word for word in self.added if (Rule.EXACT in self._rules.get(word, Rule.USUAL)) == exact]
            words.sort(key=len, reverse=True)
            return regex.compile(f"({'|'.join(map(pattern, words))})").split if words else lambda text: [text]

        return split(exact=True), split(exact=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: the output of `encode`, or a row of the model's input; a list, or a tensor (N,).

        Case and spacing are lost: for a text without special tokens, `decode(encode(text))` is its words, as the
        pattern finds them in the cleaned text, separated by single spaces. Bytes that are not UTF-8 (half a character)
        become U+FFFD. Ids that begin with start are a row of the model's input: they end at the first end, and the
        rest is padding. Start and end have no text. Raises ValueError for an id that does not exist.
        """
        if isinstance(ids, torch.Tensor) and ids.ndim != 1:
            raise ValueError(f"decode takes one text, ids of shape (N,), got {tuple(ids.shape)}")
        ids = [int(i) for i in ids]
        own = {i: "" for word in self.added.values() for i in word}
        own |= {i: f"{word} " for word, (i, *_) in self.added.items()}
        for i in ids:
            if not 0 <= i <= self.end and i not in own:
                raise ValueError(f"token ids are 0 to {self.end}, got {i}")
        if ids[:1] == [self.start] and self.end in ids:
            ids = ids[: ids.index(self.end)]
        text = bytearray()
        for i in ids:
            if i < self.start:
                symbols = self._tokens[i].removesuffix(END_OF_WORD)
                text += bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)
                text += b" " * (symbols != self._tokens[i])
            elif i > self.end:
                text += own[i].encode()
        return text.decode("utf-8", errors="replace").rstrip(" ")

    def tables(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The vocabulary and the merges in their order, in the form that other tokenizers take."""
        merges = [(self._tokens[pair >> 16], self._tokens[pair & 0xFFFF]) for pair in self._merges]
        return dict(self.vocab), merges

    def cut(self, text: str) -> tuple[int, str]:
        """The part of a text that does not fit: (number of tokens, their text), or (0, "")."""
        tail = self.encode(text)[self.length - 2 :]
        return len(tail), self.decode(tail)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = list(word.encode().translate(BYTE_IDS))
        symbols[-1] += 256  # the same byte, at the end of a word
        return tuple(merge(symbols, self._merges))

    def __reduce__(self) -> tuple[Callable[[], Tokenizer], tuple[()], dict[str, Any]]:
        # the cache cannot be pickled, so a copy (in the worker process of a data loader) is built from the arguments
        return self._again, (), {"added": self.added, "_rules": self._rules, "pad": self.pad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

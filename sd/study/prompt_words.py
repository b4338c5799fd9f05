"""The words of a request's prompt: where their tokens are in the context, in each step of its run.

    prompt -> prompts between ANDs -> the text of a step -> chunks of 75 tokens -> words and their positions

Without the web UI's syntax there is one text and one chunk. The context of k chunks has 77 k positions: in each chunk
start, the tokens, end and padding. See text/prompt_syntax.py.

>>> from sd import StableDiffusion, TextToImage
>>> run = StableDiffusion.load().prepare(TextToImage.of("a red [house:tree:1]", steps=4, web_ui_prompts=True))
>>> found = PromptWords(run)
>>> [word.text for word in found.words], found.present(0), found.present(3)
(['a', 'red', 'house', 'tree'], [0, 1, 2], [0, 1, 3])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..hires import HighResRun
from ..request_texts import prompt_texts
from ..run import Run
from ..text.prompt_editing import Stage, text_at
from ..text.prompt_syntax import Subprompt, chunks, read_prompt
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import END_OF_WORD
from .text import Word

SPECIAL = ("start", "end", "padding")  # what else there is in a context


class PromptWord(NamedTuple):
    """A word of a prompt."""

    text: str
    part: int  # of the prompts joined by AND, counted from 0
    tokens: int


class PromptWords:
    """The words of the prompt of a run of one image, and their positions in each step.

    words     all words that the prompt has in any step: a word twice in a text is two of them
    weights   of the prompts joined by AND; (1.0,) for any other

    Raises ValueError for a run of several prompts, or of contexts.
    """

    def __init__(self, run: Run) -> None:
        prompt = run.request.prompt
        if isinstance(prompt, Tensor) or len(prompt) != 1:
            raise ValueError("only a run of one prompt, as text, has words")
        self._tokenizer = run.model.tokenizer
        self._symbols = list(self._tokenizer.vocab)
        self._web_ui = run.request.web_ui_prompts
        text = prompt_texts(prompt)[0]
        if isinstance(run, HighResRun):
            first = run.first.params.steps
            self._passes = [
                (0, self._read(text, first)),
                (len(run.first), self._read(text, run.second.params.steps, first)),
            ]
        else:
            self._passes = [(0, self._read(text, run.params.steps))]
        self.weights = tuple(part.weight for part in self._passes[0][1])
        self._found: dict[str, list[Word]] = {}  # by text
        self._index: dict[tuple[int, str, int], int] = {}  # (part, word, occurrence) -> index
        self.words: list[PromptWord] = []
        for step in range(max(len(run), 1)):
            for part, text in enumerate(self.texts(step)):
                self._add(part, text)

    def _read(self, text: str, steps: int, first_pass: int = 0) -> list[Subprompt]:
        if self._web_ui:
            return read_prompt(text, steps, first_pass, note=lambda message: None)
        return [Subprompt([Stage(steps, text)], 1.0)]

    def _add(self, part: int, text: str) -> None:
        for key, word in zip(self._keys(part, text), self._words(text), strict=True):
            if key not in self._index:
                self._index[key] = len(self.words)
                self.words.append(PromptWord(word.text, part, len(word.positions)))

    def _keys(self, part: int, text: str) -> list[tuple[int, str, int]]:
        seen: Counter[str] = Counter()
        keys = []
        for word in self._words(text):
            keys.append((part, word.text, seen[word.text]))
            seen[word.text] += 1
        return keys

    def _words(self, text: str) -> list[Word]:
        if text not in self._found:
            self._found[text] = words_of(self._tokenizer, self._ids(text), self._symbols)
        return self._found[text]

    def _ids(self, text: str) -> list[list[int]]:
        """The tokens of each chunk of a text."""
        if self._web_ui:
            return [chunk.ids for chunk in chunks(self._tokenizer, text)]
        return [self._tokenizer.encode(text)[: self._tokenizer.length - 2]]

    def texts(self, step: int) -> list[str]:
        """The texts between ANDs in a step, counted from 0."""
        first, parts = [each for each in self._passes if each[0] <= step][-1]
        return [text_at(part.stages, step - first) for part in parts]

    def present(self, step: int) -> list[int]:
        """The indices of the words that the prompt has in a step."""
        return [self._index[key] for part, text in enumerate(self.texts(step)) for key in self._keys(part, text)]

    def groups(self, step: int, length: int) -> list[Tensor]:
        """For each prompt between ANDs, what its positions belong to in a step: (length, K + 3), of zeros and ones.

        length   of the context: with longer negative prompts, there are chunks after those of the prompt

        Columns: the K `words`, then `SPECIAL`. Each row has a single one.
        """
        found = []
        for part, text in enumerate(self.texts(step)):
            table = torch.zeros(length, len(self.words) + len(SPECIAL), device="cpu")
            room, own = self._tokenizer.length, self._ids(text)
            for chunk in range(-(-length // room)):
                begin = chunk * room
                end = begin + 1 + (len(own[chunk]) if chunk < len(own) else 0)
                table[begin, -3] = table[begin + 1 : end + 1, -2] = table[end + 1 : begin + room, -1] = 1
            for key, word in zip(self._keys(part, text), self._words(text), strict=True):
                table[word.positions] = 0
                table[word.positions, self._index[key]] = 1
            found.append(table)
        return found


def words_of(tokenizer: Tokenizer, ids: Sequence[Sequence[int]], symbols: Sequence[str] = ()) -> list[Word]:
    """The words that the tokens of each chunk make, and their positions in the context.

    symbols   the tokens of the vocabulary by id, if they are at hand

    >>> tokenizer = Tokenizer()
    >>> words_of(tokenizer, [tokenizer.encode("a red triceratops")])[-1]
    Word(text='triceratops', positions=[3, 4, 5, 6])
    """
    symbols = symbols or list(tokenizer.vocab)
    names = {first: (word, len(rest)) for word, (first, *rest) in tokenizer.added.items()}  # textual inversion
    found: list[Word] = []
    for number, chunk in enumerate(ids):
        pieces: list[int] = []  # tokens of the word that has begun
        more = 0  # further vectors of a word that was added
        for position, id in enumerate(chunk, start=number * tokenizer.length + 1):
            if more:
                found[-1].positions.append(position)
                more -= 1
            elif id in names:
                name, more = names[id]
                found.append(Word(name, [position]))
            elif id < tokenizer.start:
                pieces.append(id)
                if symbols[id].endswith(END_OF_WORD):
                    found.append(Word(tokenizer.decode(pieces), [*range(position - len(pieces) + 1, position + 1)]))
                    pieces = []
        if pieces:  # the rest of the word is in the next chunk, or was cut
            last = number * tokenizer.length + len(chunk)
            found.append(Word(tokenizer.decode(pieces), [*range(last - len(pieces) + 1, last + 1)]))
    return found

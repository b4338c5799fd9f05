"""The text that AUTOMATIC1111's web UI, Forge, SD.Next and many others write; and ours, which has the same form.

    a prompt, of any number of lines
    Negative prompt: also of any number of lines
    Steps: 20, Sampler: Euler a, CFG scale: 7, Model: "with, comma", ...

The last line that begins with "Steps:" starts the settings. They are pairs "key: value", separated by commas; a value
with a comma, colon or line break is a JSON string. What people have is less regular: pairs continue in the next line,
some values are JSON objects or lists without quotes, extensions append lines ("Template: ..."), and there may be no
settings at all. All of this is read in linear time.

If a prompt would be read back differently, because it looks like settings itself or begins with a blank, the writer
repeats it as the value of the key "Prompt" (or "Negative"), a JSON string, which then counts. Tags of the LoRAs that
were merged come after the prompt; if it ends in such a text itself, "Lora tags" says how many of them are tags.

>>> parsed = parse("a house\\nNegative prompt: a tree\\nSteps: 20, Sampler: Euler a, Model: \\"b, c\\"")
>>> parsed.prompt, parsed.negative, parsed.pairs
('a house', 'a tree', {'Steps': '20', 'Sampler': 'Euler a', 'Model': 'b, c'})
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..imaging.files import parameters
from .recipe import Addon, clean, file_name

MAX_PAIRS = 2000
MAX_JSON = 16  # values that look like JSON and are not, before no more are tried
NEGATIVE = "Negative prompt:"
STEPS = re.compile(r"[ \t]*Steps: *\d")
MORE = re.compile(r"[ \t]*Steps: *\d+ *,.*\b(Sampler|Seed|Size|CFG scale): ")
OTHER_START = re.compile(r"[ \t]*(Sampler|CFG scale|Seed|Size|Model|Model hash|Schedule type|Clip skip): ")
INLINE = re.compile(r"(?:^|[\s,.])(Steps: \d+, (?:Sampler|Size|Seed|CFG scale): )")  # a text in one line
TEMPLATE = re.compile(r"(Template|Negative Template): ?")
USED = re.compile(r"^(Used embeddings):([^\"\n]+)$", re.MULTILINE)  # a line of the web UI of 2022
BETWEEN = re.compile(r"[\s,]*")
KEY = re.compile(r"([^:,\n\"]{1,100}):[ \t]*")
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(?=\s*(?:,|\Z|\n))', re.DOTALL)
END = re.compile(r"[,\n]")
PLAIN = re.compile(r"[^,\n]*")
TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]{0,200})((?::[^:<>]{0,300}){0,8})>")
OWN_TAG = re.compile(r" <lora:[^:<>]{1,200}:[^:<>]{0,50}>")
OWN_LENGTH = 260  # characters of the longest


class Parsed(NamedTuple):
    """The parts of a text; `pairs` in the order of the text."""

    prompt: str
    negative: str
    pairs: dict[str, str]


def parse(text: str) -> Parsed:
    """Prompt, negative prompt and settings of a text; a key that occurs twice has its last value."""
    prompts, settings = _split(clean(text))
    negative: list[str] | None = None
    prompt: list[str] = []
    for line in prompts:
        if line.lstrip().startswith(NEGATIVE):
            rest = line.lstrip()[len(NEGATIVE) :].removeprefix(" ")
            negative = [*(negative or []), rest]
        elif negative is not None:
            negative.append(line)
        else:
            prompt.append(line)
    pairs = dict(_pairs(settings))
    ours = pairs.get("Version", "").startswith("sd ")
    joined = "\n".join(prompt), "\n".join(negative or [])
    first, second = joined if ours else (joined[0].strip(), joined[1].strip())
    if ours:
        first, second = pairs.pop("Prompt", first), pairs.pop("Negative", second)
    return Parsed(first, second, pairs)


def written(prompt: str, negative: str, pairs: Mapping[str, object], tags: Sequence[str] = ()) -> str:
    """The text of an image of ours; `pairs` has a "Version" that begins with "sd ".

    tags   "<lora:NAME:WEIGHT>" of the LoRAs that were merged, which are no part of the prompt
    """
    prompt = " ".join([prompt.rstrip() if tags else prompt, *tags])
    if len(_own_tags(clean(prompt))) != len(tags):  # the prompt ends in texts like these
        pairs = {**pairs, "Lora tags": len(tags)}
    text = parameters(prompt, negative, pairs)
    found = parse(text)
    repeated = {
        name: value
        for name, value, read in (("Prompt", prompt, found.prompt), ("Negative", negative, found.negative))
        if read != clean(value)
    }
    # if one of them is misread, the other may be, too, once it is repeated: both are then safe
    return parameters(prompt, negative, {**pairs, **repeated}) if repeated else text


def _split(text: str) -> tuple[list[str], str]:
    """The lines of the prompts, and the settings, without the lines that extensions add."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if STEPS.match(line)]
    # a line with more than steps, if there is one: the others may be from a prompt or a template
    first = next((i for i in reversed(starts) if MORE.match(lines[i])), starts[-1] if starts else None)
    if first is None:
        last = max((i for i, line in enumerate(lines) if line.strip()), default=0)
        if OTHER_START.match(lines[last]) and len(list(_pairs(lines[last]))) >= 3:
            return lines[:last], lines[last]
        if inline := list(INLINE.finditer(lines[last]))[-1:]:
            at = inline[0].start(1)
            prompts = "\n".join([*lines[:last], lines[last][:at].rstrip()])
            if not any(line.lstrip().startswith(NEGATIVE) for line in prompts.split("\n")):
                head, mark, tail = prompts.partition(f" {NEGATIVE}")  # line breaks are lost in all of the text
                prompts = f"{head}\n{NEGATIVE}{tail}" if mark else prompts
            return prompts.split("\n"), lines[last][at:]
        if len(list(_pairs(lines[last]))) >= 3 and not lines[last].lstrip().startswith(NEGATIVE):
            return lines[:last], lines[last]
        return lines, ""
    end = next((i for i in range(first, len(lines)) if TEMPLATE.match(lines[i])), len(lines))
    settings = "\n".join(lines[first:end])
    return lines[:first], USED.sub(lambda found: f"{found[1]}: {json.dumps(found[2].strip())}", settings)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    at, failures = 0, 0
    for _ in range(MAX_PAIRS):
        between = BETWEEN.match(text, at)
        assert between is not None  # like `PLAIN` below, it matches the empty text
        found = KEY.match(text, at := between.end())
        if found is None:  # a word without a colon
            following = END.search(text, at)
            if following is None:
                return
            at = following.end()
            continue
        name, at = found[1].strip(), found.end()
        value = None
        if text[at : at + 1] == '"' and (string := STRING.match(text, at)):
            value, at = _unquoted(string[0]), string.end()
        elif text[at : at + 1] in ("{", "[") and failures < MAX_JSON:
            try:
                _, end = json.JSONDecoder().raw_decode(text, at)
                value, at = text[at:end], end
            except (ValueError, RecursionError):
                failures += 1
        if value is None:
            plain = PLAIN.match(text, at)
            assert plain is not None
            value, at = plain[0].strip(), plain.end()
        yield name, value


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        value = text[1:-1]
    return clean(value) if isinstance(value, str) else text


def _own_tags(prompt: str, most: int | None = None) -> list[int]:
    """Where the tags at the end of a prompt begin, each with the blank before it; the last one first."""
    starts, end = list[int](), len(prompt)
    while most is None or len(starts) < most:
        start = prompt.rfind(" <lora:", max(0, end - OWN_LENGTH), end)
        if start < 0 or OWN_TAG.fullmatch(prompt, start, end) is None:
            break
        starts.append(start)
        end = start
    return starts


def loras_in(prompt: str, ours: bool, most: int | None = None) -> tuple[str, list[Addon], list[str]]:
    """The prompt without the tags of its LoRAs, these LoRAs, and notes.

    ours   the tags at the end were added by us, each after a blank; all others are text
    most   how many were added by us, if it is known
    """
    loras, notes = dict[str, Addon](), list[str]()
    start = min(_own_tags(prompt, most), default=len(prompt)) if ours else 0
    for kind, name, rest in TAG.findall(prompt, start):
        numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", rest) if rest else ["1"]
        weight = float(numbers[0]) if numbers else 1.0
        if not name.strip():
            notes.append(f"a <{kind}:...> tag without a name is left out")
            continue
        if kind == "hypernet":
            notes.append(f"hypernetwork {file_name(name)}: not available")
            continue
        if not numbers:
            notes.append(f"LoRA {file_name(name)} has the weight {rest[1:51]!r}, which is not a number: 1 is used")
        if any(float(other) != weight for other in numbers[1:]):
            notes.append(f"LoRA {file_name(name)} has several weights ({rest[1:]}): {weight:g} is used for all")
        if abs(weight) <= 1000:
            before = loras.get(file_name(name), Addon("", 0.0))
            loras[file_name(name)] = Addon(file_name(name), before.weight + weight)
        else:
            notes.append(f"LoRA {file_name(name)} is left out: its weight is {weight:g}")
    text = prompt[:start] if ours else TAG.sub("", prompt).strip()
    return text, list(loras.values()), notes


def digests(text: str) -> dict[str, str]:
    """The value of "Lora hashes" or "TI hashes": name -> digits.

    >>> digests("ukiyo-e: b2c1a4d0aa11, more details: 3b8aa1d351ef")
    {'ukiyo-e': 'b2c1a4d0aa11', 'more details': '3b8aa1d351ef'}
    """
    pairs = (part.rpartition(":") for part in text[:20_000].split(","))
    return {name.strip(): digits.strip().lower() for name, _, digits in pairs if name.strip()}

"""Read the recipes of very many damaged images and texts, and say what happened.

    python tests/fuzz_recipes.py --count 200000      # a few minutes of one core; the tests read 2000
    python tests/fuzz_recipes.py --only 1234         # one input again

Two things may happen: a recipe whose request is valid and whose notes are printable lines, or an ImageFileError of one
printable line. Everything else is a failure: another exception, more than SECONDS of the processor, anything executed,
imported or written. What is made, as a function of seed and number:

    text     the web UI's, put together of parts that mean something to its reader, with bytes changed
    graph    ComfyUI's, with nodes, links and values exchanged
    json     of Fooocus and InvokeAI, with values exchanged; Dream commands
    program  of the programs in fuzz_recipe_programs.py, with values exchanged
    exif     a JPEG or WebP file with a comment in any encoding, with bytes changed
    chunks   a PNG file with text chunks of each kind, with bytes changed, cut or doubled
    bomb     something small that asks for much: depth, length, numbers of many digits, compressed zeros
"""

from __future__ import annotations

import argparse
import codecs
import copy
import io
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from fuzz_recipe_programs import CLASSES, DREAM, FOOOCUS, GRAPH, INVOKE, NODES, OLD, PARTS, TEXTS, VALUES
from PIL import Image

from sd import request_json  # noqa: F401 (imported late, which would look like harm)
from sd.imaging.files import ImageFileError
from sd.params import from_dict
from sd.recipes import read_request

SECONDS = 3.0  # of the processor, which may be slow
FORBIDDEN = ("exec", "compile", "subprocess", "os.system", "os.exec", "socket", "shutil", "os.remove", "os.rename")

PICTURE = Image.new("RGB", (2, 2))


@dataclass
class Input:
    """A file to read."""

    how: str
    name: str
    data: bytes


@dataclass
class Report:
    """What came of all inputs."""

    count: int = 0
    results: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    faults: list[tuple[int, str]] = field(default_factory=list)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))
    return b"".join([head, *chunks, chunk(b"IDAT", zlib.compress(b"\0\0")), chunk(b"IEND", b"")])


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.choice((1, 2, 8, 100))]
            case 2:
                out[at:at] = out[at : at + rng.choice((1, 8, 50))]
            case 3:
                out[at:at] = rng.choice((b"\0", b"\xff", b",", b":", b"\n", b'"', b"\x7f\xff\xff\xff", b"\xff\xfe"))
            case _:
                out[at : at + 4] = struct.pack(">I", rng.choice((0, 1, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)))
    return bytes(out)


def text(rng: random.Random) -> str:
    parts = [rng.choice(PARTS) for _ in range(rng.randrange(1, 30))]
    body = "".join(part + rng.choice(("", ", ", ", ", "\n", " ")) for part in parts)
    return rng.choice(("", "a cat\n")) + rng.choice(("", "Steps: 20, Sampler: DDIM, Seed: 1, ")) + body


def from_text(rng: random.Random) -> Input:
    data = text(rng).encode("utf-8", "replace")
    return Input("text", "a.txt", damaged(rng, data) if rng.random() < 0.3 else data)


def exchanged(rng: random.Random, value: Any) -> Any:
    """A JSON value with some of its parts replaced or left out."""
    if rng.random() < 0.06:
        return copy.deepcopy(rng.choice(VALUES))
    if isinstance(value, dict):
        return {
            key if rng.random() > 0.02 else str(rng.choice(VALUES)): exchanged(rng, part)
            for key, part in value.items() if rng.random() > 0.03
        }  # fmt: skip
    if isinstance(value, int) and rng.random() < 0.05:
        return -1 - value  # also of indexes
    return [exchanged(rng, part) for part in value] if isinstance(value, list) else value


def from_graph(rng: random.Random) -> Input:
    graph: dict[str, Any] = exchanged(rng, GRAPH)
    graph = graph if isinstance(graph, dict) else dict(GRAPH)
    for _ in range(rng.randrange(6)):  # more nodes, linked in any way
        names = [*graph, "3", "99"]
        keys = (
            "model",
            "clip",
            "samples",
            "latent_image",
            "positive",
            "text",
            "noise",
            "sigmas",
            "samples_to",
            "width",
        )
        inputs = {
            rng.choice(keys): rng.choice(([rng.choice(names), 0], copy.deepcopy(rng.choice(VALUES)))) for _ in range(4)
        }
        graph[rng.choice([*names, "20", "21"])] = {"class_type": rng.choice(CLASSES), "inputs": inputs}
    for _ in range(rng.choice((0, 0, 1, 3))):  # nodes of extensions, in the place of others
        kind, values = rng.choice(NODES)
        node = {"class_type": kind, "inputs": exchanged(rng, values)}
        graph[rng.choice((*graph, "20", "21"))] = node
    return Input("graph", "a.json", json.dumps(graph).encode("utf-8", "replace"))


def from_program(rng: random.Random) -> Input:
    keyword, values, write = rng.choice(TEXTS)
    body = write(exchanged(rng, values)).encode("utf-8", "replace")
    body = damaged(rng, body) if rng.random() < 0.1 else body
    if keyword == "a.json":
        return Input("program", "a.json", body)
    chunks = [chunk(b"tEXt", keyword.encode() + b"\0" + body)]
    if keyword == "Comment":
        chunks += [chunk(b"tEXt", b"Software\0NovelAI"), chunk(b"tEXt", b"Description\0{a} " + body[:50])]
    return Input("program", "a.png", png(*chunks))


def from_json(rng: random.Random) -> Input:
    if rng.random() < 0.25:
        dream = damaged(rng, DREAM.encode()) if rng.random() < 0.8 else DREAM.encode()
        return Input("json", "a.png", png(chunk(b"tEXt", b"Dream\0" + dream)))
    key, value = rng.choice(((b"parameters", FOOOCUS), (b"invokeai_metadata", INVOKE), (b"sd-metadata", OLD)))
    body = json.dumps(exchanged(rng, value)).encode()
    return Input(
        "json", "a.png", png(chunk(b"tEXt", key + b"\0" + (damaged(rng, body) if rng.random() < 0.1 else body)))
    )


def from_exif(rng: random.Random) -> Input:
    words = text(rng)
    comment = rng.choice((b"UNICODE\0", b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8, b"JIS\0\0\0\0\0", b"")) + words.encode(
        rng.choice(("utf-16-be", "utf-16-le", "utf-16", "utf-8")), "replace"
    )
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    if rng.random() < 0.3:
        exif[rng.choice((0x010E, 0x010F, 0x0110))] = "prompt:" + json.dumps(GRAPH)
    file = io.BytesIO()
    PICTURE.save(file, rng.choice(("JPEG", "WEBP")), exif=exif)
    return Input("exif", "a.jpg", damaged(rng, file.getvalue()) if rng.random() < 0.7 else file.getvalue())


def from_chunks(rng: random.Random) -> Input:
    keys = (b"parameters", b"prompt", b"workflow", b"Dream", b"invokeai_metadata", b"Software", b"", b"x" * 100)
    parts = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        body = rng.choice((text(rng).encode("utf-8", "replace"), json.dumps(GRAPH).encode(), b"{", b"NovelAI"))
        key = rng.choice(keys[:1] * 3 + keys) + b"\0"
        made = (
            chunk(b"tEXt", key + body),
            chunk(b"zTXt", key + b"\0" + zlib.compress(body)),
            chunk(b"iTXt", key + b"\0\0en\0x\0" + body),
            chunk(b"iTXt", key + b"\1\0\0\0" + zlib.compress(body)),
        )
        parts.append(rng.choice(made))
    data = png(*parts)
    return Input("chunks", "a.png", damaged(rng, data) if rng.random() < 0.7 else data)


def from_bomb(rng: random.Random) -> Input:
    n = rng.choice((1_000, 100_000, 1_000_000))
    graph = {
        str(i): {"class_type": "LoraLoader", "inputs": {"model": [str(i + 1), 0], "lora_name": "a"}}
        for i in range(min(n, 6000))
    }
    parts = (
        "[",
        '{"a":',
        '"',
        "\\",
        "\n",
        " ",
        ",",
        ":",
        "Steps: 1,",
        "<lora:a:1>",
        "a:[",
        "a: b,",
        "(",
        "\n\n",
        "Seed: 1\n",
    )
    repeated = rng.choice(parts) * n
    texts: tuple[Callable[[], str], ...] = (
        lambda: repeated,
        lambda: "Steps: 20, a: " + repeated,
        lambda: "Steps: " + "9" * n + ", Seed: " + "9" * n,
        lambda: '{"class_type": ' + "9" * n + "}",
        lambda: '{"1": {"class_type": "KSampler", "inputs": {"seed": ' + "9" * min(n, 5000) + "}}}",
        lambda: json.dumps(graph | {"s": {"class_type": "SaveImage", "inputs": {"images": ["0", 0]}}}),
    )
    data = rng.choice(texts)().encode()
    match rng.randrange(3):
        case 0:
            return Input("bomb", rng.choice(("a.txt", "a.json")), data[: 1 << 20])
        case 1:
            return Input(
                "bomb", "a.png", png(chunk(b"tEXt", rng.choice((b"prompt", b"parameters", b"Dream")) + b"\0" + data))
            )
        case _:
            return Input(
                "bomb",
                "a.png",
                png(*[chunk(b"zTXt", b"parameters\0\0" + zlib.compress(data * 5))] * rng.choice((1, 20))),
            )


KINDS = ((from_text, 28), (from_graph, 25), (from_json, 10), (from_exif, 10), (from_chunks, 15), (from_program, 12))
BOMBS = 300  # one input in so many is a bomb: each takes as long as hundreds of others


def make(seed: int, number: int) -> Input:
    """Input number `number` of those with this seed."""
    rng = random.Random(f"{seed}/{number}")
    if rng.randrange(BOMBS) == 0:
        return from_bomb(rng)
    kinds, weights = zip(*KINDS, strict=True)
    return rng.choices(kinds, weights)[0](rng)


class Watch:
    """Python's audit events while a file is read."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(args)[:200]}")


def fault_of(path: Path) -> tuple[str, str | Exception]:
    """The result of reading a file, and what is wrong with it, "" if nothing is."""
    try:
        recipe = read_request(path)
    except ImageFileError as error:
        message = str(error)
        return "refused", "" if message.isprintable() and message.startswith(str(path)) else f"its message: {message!r}"
    except Exception as error:
        return "failure", error
    shown = (*recipe.notes, recipe.program, recipe.model.name, *recipe.info, *(addon.name for addon in recipe.loras))
    if bad := [line for line in shown if not line.isprintable() or len(line) > 500]:
        return "failure", f"not one printable line: {bad[0]!r}"
    if from_dict(json.loads(json.dumps(recipe.request.to_dict()))) != recipe.request:
        return "failure", "the request is another one after serialisation"
    image = Image.new("L", (8, 8))
    recipe.with_image(image), recipe.with_image(image, image)
    return "recipe", ""


def fuzz(count: int, seed: int = 0, first: int = 0, tell: Callable[[Report], Any] = lambda report: None) -> Report:
    """Read `count` inputs."""
    report, watch = Report(), Watch()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        for name in ("a.txt", "a.json", "a.png", "a.jpg"):  # nothing is imported later
            Path(folder, name).write_bytes(b"{}" if name != "a.png" else png())
            fault_of(Path(folder, name))
        for kind in ("JPEG", "WEBP"):
            PICTURE.save(Path(folder, "a.jpg"), kind)
            fault_of(Path(folder, "a.jpg"))
        for codec in ("utf-16", "utf-16-be", "utf-16-le", "latin-1", "unicode_escape"):
            codecs.lookup(codec)
        for number in range(first, first + count):
            made = make(seed, number)
            path = Path(folder, made.name)
            path.write_bytes(made.data)
            start, watch.on = time.process_time(), True
            result, fault = fault_of(path)
            watch.on, seconds = False, time.process_time() - start
            if isinstance(fault, Exception):
                fault = "".join(traceback.format_exception(fault))
            if seconds > SECONDS:
                fault += f" took {seconds:.1f} s"
            if watch.seen:
                fault += f" did {watch.seen}"
                watch.seen.clear()
            report.count += 1
            report.results[result] += 1
            report.kinds[made.how] += 1
            report.slowest = max(report.slowest, (seconds, number))
            if fault:
                report.faults.append((number, f"{made.how}: {fault}"))
            tell(report)
    return report


def main() -> int:
    """Entry point; the exit status is 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="read this one, and show it")
    args = parser.parse_args()
    if args.only is not None:
        print(make(args.seed, args.only))
        args.first, args.count = args.only, 1
    start = time.monotonic()

    def tell(report: Report) -> None:
        if report.faults and report.faults[-1][0] == args.first + report.count - 1:
            print(f"input {report.faults[-1][0]}, {report.faults[-1][1]}", flush=True)
        if report.count % 10_000 == 0:
            print(f"{report.count} read, {len(report.faults)} failures, {time.monotonic() - start:.0f} s", flush=True)

    report = fuzz(args.count, args.seed, args.first, tell)
    print(f"{report.count} inputs in {time.monotonic() - start:.0f} s: {len(report.faults)} failures")
    print("kinds: " + ", ".join(f"{how} {count}" for how, count in sorted(report.kinds.items())))
    print("results: " + ", ".join(f"{result} {count}" for result, count in report.results.most_common()))
    print(f"slowest: input {report.slowest[1]}, {report.slowest[0]:.2f} s")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Inputs for fuzz_checkpoints.py: files that people have, damaged in every way that their formats allow, and bombs.

`make(seed, number)` is a function of its arguments, so a number is enough to see an input again. What is made:

    bytes      any real file with bytes flipped, overwritten by telling numbers, cut, doubled, spliced with another
    pickle     the opcodes of a real pickle deleted, doubled, exchanged, replaced, in a sound zip or legacy file
    objects    random objects, pickled with protocols 0 to 5
    zip        the members and headers of an archive: doubled, deflated, other case, other offsets and sizes, zip64
    header     the JSON of a safetensors header, and the config in its metadata
    folder     the JSON files, indexes, weights and sidecars of a diffusers folder
    addon      LoRA and embedding files: names, shapes, types of numbers
    names      checkpoints whose networks are named in several ways, wrapped, doubled, incomplete; odd optional tensors
    bomb       small files that ask for much: time, memory, depth
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import pickle
import pickletools
import random
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from sd.checkpoints.export import diffusers_texts, metadata, to_diffusers, to_original, to_own
from sd.config import Config, TextConfig, UNetConfig, VAEConfig
from sd.models.build import weight_shapes

# the smallest model there is: 32 groups, 49,408 words
MICRO = Config(
    name="micro",
    size=64,
    text=(TextConfig(width=2, layers=1, heads=1),),
    vae=VAEConfig(channels=(32,), blocks=1),
    unet=UNetConfig(channels=(32,), heads=(1,), depth=(1,), blocks=1, context=2),
)
MAGIC = 0x1950A86A20F9469CFC6C
EXTREME = (0, 1, 2, 3, 7, 8, 16, 17, 127, 128, 255, 256, 32767, 65535, 65536, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62)
EXTREME = (*EXTREME, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200, -1, -2, -128, -(1 << 31), -(1 << 63))
WORDS = ("", "a", "__metadata__", "weight_map", "F32", "BF16", "F64", "X", "..", "/etc/passwd", "\0", "é", "a" * 3000)
WORDS = (*WORDS, "v_prediction", "nan", "model.safetensors", "../a", "UNet2DConditionModel", "1e999", "\ud800"[:0])
# functions that run something, that make tensors, and that mean nothing
SYMBOLS = (
    "os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "builtins getattr", "nt system",
    "__builtin__ eval", "torch load", "runpy run_path", "importlib import_module", "shutil rmtree", "webbrowser open",
    "operator attrgetter", "functools partial", "builtins print", "types CodeType", "torch.hub load", "pickle loads",
    "numpy.core.multiarray _reconstruct", "numpy dtype", "_codecs encode", "collections OrderedDict",
    "collections defaultdict", "torch.nn.modules.container ParameterDict", "torch Size", "torch float16",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor",
    "torch._tensor _rebuild_from_type_v2", "torch.nn.modules.linear Linear", "torch FloatStorage", "torch HalfStorage",
    "torch ByteStorage", "torch QInt8Storage", "torch.storage UntypedStorage", "torch.storage _load_from_bytes",
    "argparse Namespace", "pytorch_lightning.callbacks ModelCheckpoint", "datetime datetime",
)  # fmt: skip


@dataclass
class Input:
    """One thing to read: files by their paths, which of them is opened, and as what.

    `what` is "checkpoint", "lora" or "embedding"; `base` is the folder of `FOLDERS` that the files are put into.
    """

    how: str
    files: dict[str, bytes]
    path: str
    what: str = "checkpoint"
    base: str = ""

    @property
    def size(self) -> int:
        """The bytes of all files, those of the base included."""
        return sum(map(len, (FOLDERS.get(self.base, {}) | self.files).values()))


# --------------------------------------------------------------------------------------------- the files people have


class Storage:
    """The numbers of a tensor, as torch's pickles refer to them."""

    def __init__(self, kind: str, key: str, numel: int) -> None:
        self.kind, self.key, self.numel = kind, key, numel


class View:
    """Pickles as the call that makes a tensor, in any protocol."""

    def __init__(self, storage: Storage, shape: tuple, stride: tuple, offset: int = 0) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Pickler(pickle.Pickler):
    """Knows storages as what lies outside of the pickle."""

    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, Storage):
            return "storage", getattr(torch, value.kind), value.key, "cpu", value.numel
        return None


def pickled(value: object, protocol: int) -> bytes:
    """The pickle of a value in which `View`s stand for tensors. Protocol 0 has no way to say where numbers lie."""
    file = io.BytesIO()
    (Pickler if protocol else pickle.Pickler)(file, protocol).dump(value)
    return file.getvalue()


def member(name: bytes, data: bytes, local: dict[str, int] | None = None, entry: dict[str, int] | None = None) -> tuple:
    """A member of a zip archive, with fields of its local header and of its directory entry that are to be wrong."""
    return name, data, local or {}, entry or {}


def zipped(
    members: Iterable[tuple], end: dict[str, int] | None = None, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A zip archive, to the byte as it is asked for."""
    out, directory = bytearray(before), bytearray()
    count = 0
    for name, data, local, entry in members:
        fields = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data)}
        fields |= {"name": len(name), "extra": 0, "start": len(out)}
        a, b = ({key: value & 0xFFFFFFFF for key, value in (fields | more).items()} for more in (local, entry))
        extra = b"\1\0\x18\0" + struct.pack("<3Q", 1 << 62, 1 << 62, 1 << 62) if "zip64" in entry else b""
        out += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, a["flags"] & 0xFFFF, a["method"] & 0xFFFF, 0, 33, a["crc"], a["packed"],
            a["size"], a["name"] & 0xFFFF, a["extra"] & 0xFFFF,
        ) + name + data  # fmt: skip
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, b["flags"] & 0xFFFF, b["method"] & 0xFFFF, 0, 33, b["crc"], b["packed"],
            b["size"], b["name"] & 0xFFFF, len(extra), 0, 0, 0, 0, b["start"],
        ) + name + extra  # fmt: skip
        count += 1
    fields = {"count": count & 0xFFFF, "size": len(directory), "start": len(out)} | (end or {})
    last = [fields[key] & limit for key, limit in (("count", 0xFFFF), ("size", 0xFFFFFFFF), ("start", 0xFFFFFFFF))]
    if end and "zip64" in end:
        out, directory = out, directory + struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end["zip64"] & (1 << 64) - 1, len(out)
        ) + struct.pack("<4sIQI", b"PK\6\7", 0, len(out) + len(directory), 1)  # fmt: skip
    directory += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, last[0], *last, len(after) & 0xFFFF)
    return bytes(out + directory) + after


def archive(data: bytes, storages: dict[str, bytes]) -> list[tuple]:
    """The members of what torch.save writes."""
    numbers = [member(f"archive/data/{key}".encode(), value) for key, value in storages.items()]
    return [member(b"archive/data.pkl", data), member(b"archive/byteorder", b"little"), *numbers]


def legacy(data: bytes, storages: dict[str, bytes], protocol: int, item: int = 4) -> bytes:
    """What torch.save wrote before the zip format."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, protocol) for part in (MAGIC, 1001, machine)]
    numbers = b"".join(struct.pack("<q", len(value) // item) + value for value in storages.values())
    return b"".join(head) + data + pickle.dumps(list(storages), protocol) + numbers


STORAGES = {"0": struct.pack("<12f", *range(12)), "1": struct.pack("<4f", *range(4))}


def small_content(style: int, tensor: Callable[..., object]) -> object:
    """What a .ckpt may hold, in small."""
    a, b = tensor("0", 12, (3, 4), (4, 1)), tensor("1", 4, (2, 2), (1, 2))
    state = OrderedDict({"model.diffusion_model.out.2.weight": a, "b": b, "betas": tensor("0", 12, (2,), (1,), 5)})
    return [
        state,
        {"state_dict": state, "epoch": 3, "global_step": 470000, "optimizer_states": [{"state": {0: {"exp_avg": b}}}]},
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": tensor("1", 4, (2, 2), (2, 1))},
            "name": "x",
            "step": 9,
        },
        {"<cat-toy>": tensor("1", 4, (2,), (1,))},
        {"model": {"module.a": a, "module.b": b}, "args": [1.5, None, True, "x", (1, 2), {3}, b"raw"]},
    ][style]


@functools.cache
def states() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the micro model, in float16."""
    rng = torch.Generator().manual_seed(0)
    return {
        network: {key: torch.randn(shape, generator=rng).mul(0.05).half() for key, shape in shapes.items()}
        for network, shapes in weight_shapes(MICRO).items()
    }


def torch_bytes(content: object, new: bool = True) -> bytes:
    """What torch.save writes, itself."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


@functools.cache
def files() -> dict[str, tuple[str, bytes]]:
    """Real files of every container: name -> (what it is, its bytes)."""
    own, original = to_own(states()), to_original(states(), MICRO)
    return {
        "own.safetensors": ("checkpoint", safetensors_bytes(own, metadata(MICRO))),
        "original.safetensors": ("checkpoint", safetensors_bytes(original, {"modelspec.prediction_type": "v"})),
        "original.ckpt": ("checkpoint", torch_bytes({"state_dict": original, "global_step": 1})),
        "old.ckpt": ("checkpoint", torch_bytes(original, new=False)),
        "embedding.safetensors": ("embedding", safetensors_bytes({"emb_params": torch.ones(2, 2)})),
        "embedding.bin": ("embedding", torch_bytes({"<cat-toy>": torch.ones(2)})),
        "embedding.pt": ("embedding", torch_bytes({"string_to_param": {"*": torch.ones(2, 2)}, "name": "x"})),
        "lora.safetensors": ("lora", safetensors_bytes(lora(), {"ss_network_alpha": "4"})),
        "lora.ckpt": ("lora", torch_bytes(lora())),
    }


def lora() -> dict[str, torch.Tensor]:
    """A LoRA for the micro model, in kohya's names, with a convolution of each kind."""
    out: dict[str, torch.Tensor] = {}
    for name, down, up, mid in (
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1, 2), (32, 1), None),
        ("lora_unet_mid_block_resnets_0_conv1", (1, 32, 3, 3), (32, 1, 1, 1), None),
        ("lora_unet_mid_block_resnets_0_conv2", (1, 32, 1, 1), (32, 1, 1, 1), (1, 1, 3, 3)),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (1, 2), (8, 1), None),
    ):
        out |= {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}
        out |= {f"{name}.alpha": torch.tensor(1.0)}
        out |= {f"{name}.lora_mid.weight": torch.ones(mid)} if mid else {}
    return out


def folder() -> dict[str, bytes]:
    """A diffusers folder of the micro model, its U-Net split into two files."""
    out = {name: text.encode() for name, text in diffusers_texts(MICRO).items() if "tokenizer/" not in name}
    out["tokenizer/tokenizer_config.json"] = b'{"pad_token": "!"}'
    for name, tensors in to_diffusers(states(), MICRO).items():
        out[name] = safetensors_bytes(tensors, {"format": "pt"})
        if name.startswith("unet/"):
            weight_map = {}
            for i, keys in enumerate((list(tensors)[::2], list(tensors)[1::2])):
                part = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
                out[f"unet/{part}"] = safetensors_bytes({key: tensors[key] for key in keys})
                weight_map |= dict.fromkeys(keys, part)
            del out[name]
            out[f"{name}.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return out


def sidecars() -> dict[str, bytes]:
    """A file with the things that may lie beside it."""
    return {
        "model.safetensors": files()["original.safetensors"][1],
        "model.yaml": b"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n"
        b"  params:\n    parameterization: v\n",
        "adapter_model.safetensors": files()["lora.safetensors"][1],
        "adapter_config.json": b'{"r": 1, "lora_alpha": 2, "alpha_pattern": {"to_k": 4}, "use_rslora": true}',
    }


FOLDERS: dict[str, dict[str, bytes]] = {}  # filled once, by `prepare`


def prepare() -> None:
    """Make all real files."""
    FOLDERS.update({"folder": folder(), "beside": sidecars()})
    files()


# ------------------------------------------------------------------------------------------------------- how to damage


def number(rng: random.Random) -> int:
    """One that programs trip over, often near another one."""
    return rng.choice(EXTREME) + rng.choice((0, 0, 0, 1, -1)) if rng.random() < 0.8 else rng.getrandbits(64)


def damaged(rng: random.Random, data: bytes, others: Callable[[], bytes] = lambda: b"") -> bytes:
    """A few faults, each at a place of its own, often in the first or last kilobytes, where sizes stand."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        span = min(len(out), rng.choice((16, 300, 4000, len(out))))
        at = rng.randrange(span) if rng.random() < 0.6 else len(out) - 1 - rng.randrange(span)
        length = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
        match rng.randrange(9):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + length] = rng.randbytes(length)
            case 2:
                wide = rng.choice((1, 2, 4, 8))
                value = number(rng) & ((1 << 8 * wide) - 1)
                out[at : at + wide] = value.to_bytes(wide, rng.choice(("little", "big")))
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                del out[at:]
            case 6:
                other = others() or bytes(8)
                start = rng.randrange(len(other))
                out[at : at + length] = other[start : start + length]
            case 7:
                out[at:at] = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
            case 8:
                to = rng.randrange(len(out))
                out[at : at + length], out[to : to + length] = out[to : to + length], out[at : at + length]
    return bytes(out)


def integer(value: int) -> bytes:
    """An opcode that pushes a whole number."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def opcode(rng: random.Random) -> bytes:
    """One opcode with its argument, or a few that belong together."""
    symbol = "c{}\n{}\n".format(*rng.choice(SYMBOLS).split()).encode()
    text = rng.choice(WORDS).encode()
    short = text[:255]
    return rng.choice(
        (
            b"(", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"\x89", b"0", b"1", b"2", b"t", b"l", b"d", b"a", b"e",
            b"s", b"u", b"\x90", b"\x91", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"\x92", b"b", b"o", b"Q",
            b"\x94", b".", b"\x93", b"\x97", b"\x98", b"\x80" + bytes([rng.randrange(8)]),
            b"\x95" + struct.pack("<Q", rng.choice((0, 9, 1 << 63))), b"i" + symbol[1:],
            symbol, symbol + b")R", symbol + b"(tR", symbol + b"X\4\0\0\0true\x85R", symbol + b"N\x85R",
            b"(" + symbol + b"No", b"\x8c" + bytes([len(short)]) + short, b"X" + struct.pack("<I", len(text)) + text,
            b"X" + struct.pack("<I", number(rng) & 0xFFFFFFFF), b"\x8d" + struct.pack("<Q", number(rng) & 2**64 - 1),
            b"\x8e" + struct.pack("<Q", number(rng) & 2**64 - 1), b"\x96" + struct.pack("<Q", number(rng) & 2**64 - 1),
            b"T" + struct.pack("<i", -5), b"B" + struct.pack("<I", 1 << 31), b"U\3abc", b"C\2ab",
            integer(number(rng)), integer(number(rng)), integer(number(rng)), b"J" + rng.randbytes(4),
            b"M" + rng.randbytes(2), b"I%d\n" % number(rng), b"L%dL\n" % number(rng), b"I01\n",
            b"F1e999\n", b"Fnan\n", b"G" + rng.randbytes(8),
            b"\x8b" + struct.pack("<i", rng.choice((-1, 1 << 30))), b"I" + b"9" * 5000 + b"\n",
            b"q" + rng.randbytes(1), b"h" + rng.randbytes(1), b"r" + rng.randbytes(4), b"j" + rng.randbytes(4),
            b"p-1\n", b"g0\n", b"Pstorage\n", b"S'a\\x41'\n", b"Va\\u1234\n", b"S'a\n", b"\x82\1",
            b"\x84" + rng.randbytes(4),
            b"\x8c\7storage" + symbol + b"\x8c\x010\x8c\3cpu" + integer(number(rng)) + b"tQ",
        )
    )  # fmt: skip


def recoded(rng: random.Random, data: bytes) -> bytes:
    """A pickle with some of its opcodes deleted, doubled, exchanged, replaced, or with other numbers in them."""
    places = [(op, at) for op, _, at in pickletools.genops(data)]
    ends = [at for _, at in places[1:]] + [len(data)]
    pieces = [(op.name, data[at:end]) for (op, at), end in zip(places, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        i = rng.randrange(len(pieces))
        match rng.randrange(7):
            case 0:
                del pieces[i]
            case 1:
                pieces.insert(i, pieces[rng.randrange(len(pieces))])
            case 2:
                j = rng.randrange(len(pieces))
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case 3:
                pieces[i] = ("", opcode(rng))
            case 4:
                pieces.insert(i, ("", opcode(rng)))
            case 5:
                numbers = [k for k, (name, _) in enumerate(pieces) if "INT" in name or "LONG" in name]
                if numbers:
                    pieces[rng.choice(numbers)] = ("", integer(number(rng)))
            case 6:
                texts = [k for k, (name, _) in enumerate(pieces) if "UNICODE" in name or name in ("GLOBAL", "STOP")]
                if texts:
                    pieces[rng.choice(texts)] = ("", opcode(rng))
        if not pieces:
            break
    return b"".join(piece for _, piece in pieces)


def random_object(rng: random.Random, depth: int = 0) -> Any:
    """Plain data, classes and functions, nested."""
    kinds = 9 if depth > 4 else 15
    match rng.randrange(kinds):
        case 0:
            return number(rng)
        case 1:
            return rng.choice(WORDS)
        case 2:
            return rng.choice((None, True, False, 1.5, float("nan"), float("inf"), 1j, Ellipsis))
        case 3:
            return rng.randbytes(rng.randrange(20))
        case 4:
            return bytearray(b"abc")
        case 5:
            return rng.choice(
                (OrderedDict, torch.float16, torch.Size((2, 3)), print, torch.nn.Linear, random.Random(1))
            )
        case 6 | 7 | 8:
            sizes = tuple(rng.choice((0, 1, 2, 3, abs(number(rng)) >> 1)) for _ in range(rng.randrange(4)))
            strides = tuple(rng.choice((0, 1, 2, number(rng))) for _ in sizes)
            kind = rng.choice(("FloatStorage", "HalfStorage", "LongStorage", "ByteStorage", "BFloat16Storage"))
            count = rng.choice((4, 12, number(rng)))
            return View(
                Storage(kind, rng.choice(("0", "1", "7", "../0")), count), sizes, strides, rng.choice((0, 1, 9))
            )
        case 9:
            return [random_object(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 10:
            return tuple(random_object(rng, depth + 1) for _ in range(rng.randrange(4)))
        case 11:
            return {rng.choice((*WORDS, 1, None)) for _ in range(3)}
        case _:
            keys = (*WORDS, "state_dict", "state_dict", "model", "string_to_param", "lora_te_x.alpha", 5, None, (1, 2))
            return {rng.choice(keys): random_object(rng, depth + 1) for _ in range(rng.randrange(6))}


def other_json(rng: random.Random, tree: Any) -> Any:
    """The JSON value `tree`, which is changed: with some of its parts replaced, removed, doubled or renamed."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, (dict, list)):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                nodes.append((node, key))
                walk(node[key])

    walk(tree)
    if not nodes:
        return json_value(rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, key = rng.choice(nodes)
        present = key in node if isinstance(node, dict) else key < len(node)
        if not present:
            continue
        match rng.randrange(6):
            case 0 | 1 | 2:
                node[key] = json_value(rng)
            case 3:
                del node[key]
            case 4 if isinstance(node, dict):
                node[rng.choice((*WORDS, key + "x"))] = node.pop(key)
            case 4 | 5:
                other, where = rng.choice(nodes)
                inside = where in other if isinstance(other, dict) else where < len(other)
                node[key] = copy.deepcopy(other[where]) if inside else None
    return tree


def json_value(rng: random.Random) -> Any:
    """Something that is not expected."""
    return rng.choice(
        (
            None, True, [], {}, "", 1.5, -0.0, 1e308, float("nan"), float("inf"), number(rng), number(rng), number(rng),
            str(number(rng)), rng.choice(WORDS), [number(rng)], [1] * 40, [[[[1]]]], {"a": {"b": 1}}, [0.1, 0.2],
            "None", [number(rng), number(rng)], ["CrossAttnDownBlock2D"], "CrossAttnDownBlock2D", "linear", "sample",
        )
    )  # fmt: skip


def json_bytes(rng: random.Random, tree: Any) -> bytes:
    """As a file has it; at times not quite JSON."""
    data = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged(rng, data) if rng.random() < 0.15 else data


# ---------------------------------------------------------------------------------------------------- kinds of inputs


def from_bytes(rng: random.Random) -> Input:
    name = rng.choice(list(files()))
    what, data = files()[name]

    def other() -> bytes:
        return files()[rng.choice(list(files()))][1][:20000]

    return Input("bytes", {name: damaged(rng, data, other)}, name, what)


def contained(rng: random.Random, how: str, data: bytes, protocol: int, what: str = "checkpoint") -> Input:
    """A pickle in one of the two containers of torch."""
    old = rng.random() < 0.3
    out = legacy(data, STORAGES, max(protocol, 1)) if old else zipped(archive(data, STORAGES))
    return Input(how, {"a.ckpt": out}, "a.ckpt", what)


def from_pickle(rng: random.Random) -> Input:
    protocol = rng.randrange(1, 6)
    style = rng.randrange(5)

    def tensor(key: str, numel: int, shape: tuple, stride: tuple, offset: int = 0) -> View:
        return View(Storage("FloatStorage", key, numel), shape, stride, offset)

    data = recoded(rng, pickled(small_content(style, tensor), protocol))
    return contained(rng, "pickle", data, protocol, "embedding" if style in (2, 3) else "checkpoint")


def from_objects(rng: random.Random) -> Input:
    protocol = rng.randrange(6)
    value = {rng.choice(WORDS[:9]): random_object(rng) for _ in range(rng.randrange(1, 5))}
    if rng.random() < 0.5:
        value = {"state_dict": value, "epoch": random_object(rng)}
    try:
        data = pickled(value, protocol)
    except (pickle.PicklingError, TypeError, ValueError, AttributeError, struct.error, OverflowError):
        data = pickle.dumps({"a": 1}, protocol)
    return contained(rng, "objects", data, protocol, rng.choice(("checkpoint", "embedding")))


def from_zip(rng: random.Random) -> Input:
    data = pickled({"a": View(Storage("FloatStorage", "0", 12), (3, 4), (4, 1))}, 2)
    members = archive(data, STORAGES)
    fields = ("flags", "method", "crc", "packed", "size", "name", "extra", "start")
    end: dict[str, int] = {}
    before = after = b""
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(members))
        name, content, local, entry = members[i]
        match rng.randrange(11):
            case 0:
                members.insert(rng.randrange(len(members)), members[i])
            case 1:
                members[i] = member(
                    rng.choice((name.upper(), name.title(), name + b"\0x", b"../" + name)), content, local
                )
            case 2:
                packed = zlib.compress(content)[2:-4]
                said = {"method": 8, "packed": len(packed), "size": len(content)}
                members[i] = member(name, packed, said, said)
            case 3:
                members[i] = member(name, content, local, entry | {rng.choice(fields): number(rng)})
            case 4:
                members[i] = member(name, content, local | {rng.choice(fields): number(rng)}, entry)
            case 5:
                members[i] = member(
                    name, content, local, entry | {"zip64": 1, "size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
                )
            case 6:
                end[rng.choice(("count", "size", "start", "zip64"))] = number(rng)
            case 7:
                before = rng.choice((b"x", b"#!/bin/sh\n", zipped(archive(data, {}))))
            case 8:
                after = rng.choice((b"x", bytes(70000), b"PK\5\6" + bytes(18)))
            case 9:
                del members[i]
            case 10:
                rng.shuffle(members)
        if not members:
            break
    out = zipped(members, end, before, after)
    return Input("zip", {"a.ckpt": damaged(rng, out) if rng.random() < 0.2 else out}, "a.ckpt")


def from_header(rng: random.Random) -> Input:
    name = rng.choice(("own.safetensors", "original.safetensors", "embedding.safetensors", "lora.safetensors"))
    what, data = files()[name]
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    said = header.get("__metadata__", {})
    if "sd.config" in said and rng.random() < 0.5:
        said["sd.config"] = json.dumps(other_json(rng, json.loads(said["sd.config"])))
    elif rng.random() < 0.1:
        header.setdefault("__metadata__", {})[rng.choice(("prediction_type", "ss_v_parameterization", "a"))] = "v"
    elif rng.random() < 0.1:
        text = json.dumps(other_json(rng, {"r": 1, "lora_alpha": 2, "alpha_pattern": {"to_k": 4}}))
        header.setdefault("__metadata__", {})["lora_adapter_metadata"] = text
    else:
        header = other_json(rng, header)
    text = json_bytes(rng, header)
    if rng.random() < 0.3:
        numbers = damaged(rng, numbers)
    size = len(text) if rng.random() < 0.95 else number(rng) & 2**64 - 1
    return Input("header", {name: struct.pack("<Q", size) + text + numbers}, name, what)


def from_folder(rng: random.Random) -> Input:
    base = rng.choice(("folder", "folder", "folder", "beside"))
    inside = FOLDERS[base]
    changed = {}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(inside))
        data = inside[name]
        if name.endswith(".json") and rng.random() < 0.85:
            changed[name] = json_bytes(rng, other_json(rng, json.loads(data)))
        else:
            changed[name] = damaged(rng, data)
    if base == "beside":
        path, what = rng.choice((("model.safetensors", "checkpoint"), ("adapter_model.safetensors", "lora")))
    else:
        index = "unet/diffusion_pytorch_model.safetensors.index.json"
        path, what = rng.choice((".", ".", ".", "unet", "vae", "text_encoder", index)), "checkpoint"
    return Input("folder", changed, path, what, base)


ENDS = (
    ".lora_A.weight", ".alpha", ".lora_mid.weight", ".hada_w1_a", ".dora_scale", ".weight", "x", "." * 90, ".diff",
    ".lokr_w1", ".oft_blocks", ".on_input", ".a1.weight", ".w_norm", ".lora_B.bias", ".scalar",
)  # fmt: skip


def from_addon(rng: random.Random) -> Input:
    what = rng.choice(("lora", "embedding"))
    tensors = dict(lora()) if what == "lora" else {"emb_params": torch.ones(2, 2), "<s1>": torch.ones(2)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not tensors:
            break
        key = rng.choice(list(tensors))
        tensor = tensors.pop(key)
        if rng.random() < 0.5:
            shape = tuple(rng.choice((0, 1, 2, 3, 4, 32, 768)) for _ in range(rng.randrange(5)))
            kinds = (torch.float32, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64)
            tensor = torch.zeros(shape[:1] if math.prod(shape) > 1_000_000 else shape, dtype=rng.choice(kinds))
        if rng.random() < 0.2:
            tensor = tensor.to(torch.float32) * rng.choice((float("nan"), float("inf"), 1e38))
        if rng.random() < 0.4:
            key = key.rsplit(".", 2)[0] + rng.choice(ENDS)
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            tensors[key] = tensor.clone()
            key = "lora_unet_" + key
    if rng.random() < 0.6:
        return Input("addon", {"a.safetensors": safetensors_bytes(tensors)}, "a.safetensors", what)
    return Input("addon", {"a.pt": torch_bytes(tensors, rng.random() < 0.5)}, "a.pt", what)


STEMS = (
    "model.diffusion_model.", "unet.", "first_stage_model.", "vae.", "cond_stage_model.model.", "model.", "text_model.",
    "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_encoder.", "", "te.",
)  # fmt: skip
LAYER_NAMES = (".q.", ".to_q.", ".query.", ".norm.", ".group_norm.", ".norm1.", ".in_layers.0.", ".attn_1.", ".mid.")
OPTIONAL = ("alphas_cumprod", "betas", "cond_stage_model.model.logit_scale", "text_model.embeddings.position_ids")


def from_names(rng: random.Random) -> Input:
    tensors = dict(to_original(states(), MICRO)) if rng.random() < 0.7 else dict(to_own(states()))
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        keys = list(tensors)
        stem = rng.choice([stem for stem in STEMS if any(key.startswith(stem) for key in keys)])
        these = [key for key in keys if key.startswith(stem)]
        match rng.randrange(6):
            case 0:  # twice
                other = rng.choice(STEMS)
                tensors |= {other + key.removeprefix(stem): tensors[key].clone() for key in these}
            case 1:  # another prefix, or wrapped
                other = rng.choice((*STEMS, "_orig_mod." + stem, stem + "module.", stem + "_orig_mod."))
                for key in these:
                    tensors[other + key.removeprefix(stem)] = tensors.pop(key)
            case 2:
                for key in rng.sample(these, min(len(these), rng.choice((1, 1, 5, 100)))):
                    del tensors[key]
            case 3:
                old, new = rng.sample(LAYER_NAMES, 2)
                tensors = {key.replace(old, new) if key in these else key: tensors[key] for key in keys}
            case 4:
                kinds = (torch.float16, torch.float64, torch.int64, torch.bool, torch.uint64, torch.float8_e5m2)
                size = rng.choice(((1000,), (999,), (1, 1000), (77,), ()))
                tensors[rng.choice(OPTIONAL)] = torch.rand(size, generator=_generator(rng)).to(rng.choice(kinds))
            case _:
                key = rng.choice(these)
                tensors[key] = tensors[key].float() * rng.choice((float("nan"), float("inf"), 1e30))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()} or {"a": torch.ones(1)}
    if rng.random() < 0.5:
        return Input("names", {"a.safetensors": safetensors_bytes(tensors)}, "a.safetensors")
    content = {"state_dict": tensors} if rng.random() < 0.5 else {"unet": tensors, "vae": dict(tensors)}
    return Input("names", {"a.pt": torch_bytes(content, rng.random() < 0.5)}, "a.pt")


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(1000))


def pickle_bombs(n: int) -> list[bytes]:
    """Pickles, after their first two bytes, of `n` times the same."""
    few, many = min(n, 100_000), min(n, 300_000)
    dots = b"a." * 240
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\nq\0ctorch\nFloatStorage\nq\1"
    stored = b"h\0((\x8c\7storageh\1\x8c\0010\x8c\3cpuK\ftQK\0K\2\x85K\1\x85\x89}tR"
    views = b"".join(b"X\6\0\0\0%06d" % i + stored for i in range(min(n, 30_000)))
    colliding = b"".join(b"\x8a\x08" + struct.pack("<q", i * (2**61 - 1) % 2**62) + b"N" for i in range(few))
    return [
        b"\x8f" * n + b"}.",  # empty sets
        b"}" * n + b".",  # empty objects
        b"]\x94" * n + b".",  # lists, remembered
        b"N0" * n + b".",  # work that leaves nothing
        b"(" * n + b".",  # marks
        b"(" * n + b"l" * n + b".",  # lists in lists
        b"X"
        + struct.pack("<I", len(dots))
        + dots
        + b"q\0\x8c\1mq\1"
        + b"h\1h\0\x93" * many
        + b".",  # names of many parts
        b"".join(b"ca\nb%d\n" % i for i in range(few)) + b".",  # different names
        b"\x8c\2ab" * n + b".",  # texts
        b"X" + struct.pack("<I", n + 4) + b"a" * n + "\N{GRINNING FACE}".encode() + b".",  # wide text
        tensor + b"}(" + views + b"u.",  # views of the same numbers
        b"}q\0" + b"X\n\0\0\0state_dict}s" * few + b".",  # the same key again
        b"I" + b"9" * n + b"\n.",  # digits
        b"\x8b" + struct.pack("<i", n) + bytes(n),  # bytes of a number
        b"}(" + colliding + b"u.",  # keys of one hash
        b"]q\0" + b"h\0a" * n + b".",  # a list that holds itself
        b"Nq\0" + b"\x86q\0h\0h\0" * (n // 4) + b"\x86}h\0Ns.",  # a key whose hash visits each node of a tree
        b"(" + b"h\0" * 5 + b"Nq\0" + b"h\0" * n + b"\x91.",  # members of a set
    ]


def text_bombs(n: int, open_: str, close: str) -> list[str]:
    """JSON of `n` times the same."""
    few, many = min(n, 100_000), min(n, 300_000)
    nothing = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    lists = "[" + "[]," * min(n, 1_000_000) + "1]"
    return [
        open_ * few + "1" + close * few,  # depth
        "[" + "[]," * min(n, 400_000) + "1]",
        "{" + ",".join(f'"{i}":[]' for i in range(many)) + "}",
        '{"a":{"dtype":"F32","shape":[' + "1," * n + '1],"data_offsets":[0,4]}}',
        '{"a":' + "9" * n + "}",
        "{" + ",".join(f'"{i}":{nothing}' for i in range(few)) + "}",
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(many)) + "}}",
        '{"__metadata__":{"sd.config":"' + "[" * min(n, 1_000_000) + '"}}',
        '{"__metadata__":{"sd.config":"' + lists + '"}}',
        '{"__metadata__":{"lora_adapter_metadata":"' + lists + '"},'
        '"a.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ]


def from_bomb(rng: random.Random) -> Input:
    """Something small that asks for much. 10,000 to 1,500,000 times the same."""
    n = rng.choice((10_000, 100_000, 400_000, 1_500_000))
    texts = text_bombs(n, *rng.choice((("[", "]"), ('{"a":', "}"))))
    match rng.randrange(6):
        case 0 | 1:
            return contained(
                rng, "bomb", b"\x80\2" + rng.choice(pickle_bombs(n)), 2, rng.choice(("checkpoint", "embedding"))
            )
        case 2:
            text = rng.choice(texts).encode()
            file = struct.pack("<Q", len(text)) + text + bytes(4) * (b'"data_offsets":[0,4]' in text)
            return Input("bomb", {"a.safetensors": file}, "a.safetensors", rng.choice(("checkpoint", "lora")))
        case 3:
            name = rng.choice([name for name in FOLDERS["folder"] if name.endswith(".json")])
            return Input("bomb", {name: rng.choice(texts).encode()}, ".", base="folder")
        case 4:
            names = [member(b"a/data/%d" % i, b"") for i in range(min(n, 120_000))]
            if rng.random() < 0.5:
                names = [member(b"%d" % i, b"", entry={"start": 0}) for i in range(min(n, 120_000))]
            end = {"size": 0, "zip64": 47 * len(names)} if rng.random() < 0.3 else {}
            return Input("bomb", {"a.ckpt": zipped([*archive(b"}.", {}), *names], end)}, "a.ckpt")
        case _:
            yaml = rng.choice(
                (b" " * n, b"parameterization" * (n // 16), b"target: ldm." + b"a" * n, b"#" * n, b"{" * n, b"\n" * n)
            )
            return Input("bomb", {"model.yaml": yaml}, "model.safetensors", base="beside")


KINDS = (
    (from_bytes, 14), (from_pickle, 30), (from_objects, 12), (from_zip, 12), (from_header, 12), (from_folder, 10),
    (from_addon, 10), (from_names, 8),
)  # fmt: skip
BOMBS = 500  # one input in so many is a bomb: each takes as long as hundreds of others


def make(seed: int, which: int) -> Input:
    """Input number `which` of those with this seed."""
    rng = random.Random(f"{seed}/{which}")
    if rng.randrange(BOMBS) == 0:
        return from_bomb(rng)
    kinds, weights = zip(*KINDS, strict=True)
    (kind,) = rng.choices(kinds, weights)
    made = kind(rng)
    # a file may be given as anything
    return replace(made, what=rng.choice(("checkpoint", "lora", "embedding"))) if rng.random() < 0.1 else made

"""Files that are no checkpoint, broken, or made to harm: each is refused in one line, and nothing in it is run."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint

# ------------------------------------------------------------------------------- writing what torch would not write


class Name(str):
    """A symbol of a pickle, "module name"."""


class Call:
    def __init__(self, name: str, *arguments: object) -> None:
        self.name, self.arguments = Name(name), arguments


class Stored:
    """A persistent id."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


def assemble(value: object) -> bytes:
    """The opcodes for a value, to write what no honest program would."""
    if isinstance(value, bytes):  # opcodes as they are
        return value
    if isinstance(value, Name):
        return "c{}\n{}\n".format(*value.split()).encode()
    if isinstance(value, Call):
        return assemble(value.name) + assemble(value.arguments) + b"R"
    if isinstance(value, Stored):
        return assemble(value.parts) + b"Q"
    if isinstance(value, dict):
        return b"}(" + b"".join(assemble(part) for pair in value.items() for part in pair) + b"u"
    if isinstance(value, (tuple, list)):
        return b"(" + b"".join(map(assemble, value)) + (b"t" if isinstance(value, tuple) else b"l")
    return pickle.dumps(value, 2)[2:-1]


def tensor(shape=(2,), stride=(1,), offset=0, numel=4, key="0", storage="torch FloatStorage") -> Call:
    stored = Stored("storage", Name(storage), key, "cpu", numel)
    hooks = Call("collections OrderedDict")
    return Call("torch._utils _rebuild_tensor_v2", stored, offset, shape, stride, False, hooks)


DATA = struct.pack("<4f", 0, 1, 2, 3)  # the storage "0" of the files below


def archive(content: object, *more: tuple[str, bytes], data: bytes | None = None, **options) -> bytes:
    """A zip archive like those of torch: the pickle of `content`, one storage and further members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as zipped:
        zipped.writestr("x/data.pkl", b"\x80\x02" + assemble(content) + b"." if data is None else data)
        zipped.writestr("x/byteorder", b"little")
        zipped.writestr("x/data/0", DATA)
        for name, text in more:
            zipped.writestr(name, text)
    return file.getvalue()


MACHINE = {"protocol_version": 1001, "little_endian": True}


def legacy(content: object, keys=("0",), numel=4, magic=0x1950A86A20F9469CFC6C, protocol=1001, machine=None) -> bytes:
    parts = [magic, protocol, machine or MACHINE, content, list(keys)]
    head = b"".join(b"\x80\x02" + assemble(part) + b"." for part in parts)
    return head + struct.pack("<q", numel) + DATA


def safe(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: int, end: int, shape: object = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def saved(content: object, kind: str = "zip pickle", protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip pickle")
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def patched(data: bytes, old: bytes, new: bytes, which: int = 0) -> bytes:
    """`data` with one of the places of `old` overwritten."""
    at = -1
    for _ in range(which + 1):
        at = data.index(old, at + 1)
    return data[:at] + new + data[at + len(new) :]


def sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (3,), check_invariants=True)


class Labelled(torch.Tensor):
    """Any subclass."""


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


GOOD = {"a": tensor()}
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def plain_zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name in names:
            zipped.writestr(name, b"x")
    return file.getvalue()


def field(data: bytes, header: bytes, which: int, offset: int, value: bytes) -> bytes:
    """`data` with a field of one of its zip headers overwritten."""
    at = -1
    for _ in range(which + 1):
        at = data.index(header, at + 1)
    return data[: at + offset] + value + data[at + offset + len(value) :]


# id -> (bytes of the file, or what makes them where that takes long, words of the message)
REFUSED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    # other kinds of files
    "empty": (b"", "empty file"),
    "web page": (b"<!DOCTYPE html><html>login</html>", "web page"),
    "web page after a byte order mark": (b"\xef\xbb\xbf\r\n <html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF"),
    "gzip": (gzip.compress(b"x" * 100), "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "7z"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(40), "rar"),
    "tar": (tarred("model.ckpt"), "tar archive; unpack"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG"),
    "yaml": (b"model:\n  base_learning_rate: 1.0e-04\n", "text file, starting 'model:"),
    "json": (b'{"abcd":{"error": "not found"}}', "text file"),
    "json list": (b"[1, 2, 3, 4, 5, 6, 7, 8]", "text file"),
    "zeros": (bytes(3000), "zeros"),
    "noise": (b"\x9c\x01\xfe\x00" * 50, "not a checkpoint, starting 9c 01 fe 00"),
    "one byte": (b"a", "not a checkpoint"),
    "plain zip": (plain_zip("model.ckpt", "README.txt"), "unpack it"),
    "empty zip": (plain_zip(), "empty zip"),
    # safetensors
    "cut safetensors": (safetensors_bytes({"a": torch.ones(100)})[:-10], "bytes, the file has 4"),
    "cut safetensors header": (safe({"a": f32(0, 8)})[:20], "announce a header of"),
    "longer safetensors": (safe({"a": f32(0, 8)}) + b"x", "longer than its header says: 78 bytes, not 77. The format"),
    "padded safetensors": (safe({"a": f32(0, 8)}) + bytes(99), "not 77, of zeros. The format allows nothing after"),
    "safetensors header of a petabyte": (safe({"a": f32(0, 8)}, length=1 << 50), "1125899906842624 bytes"),
    "safetensors header of 2^64 bytes": (b"\xff" * 8 + b"{" + bytes(40), "18446744073709551615 bytes"),
    "safetensors header of 200 MB": (safe(b"{}", length=200_000_000), "200000000 bytes"),
    "safetensors header of 9 MB of nothing": (lambda: safe(b"{" + b" " * 9_000_000 + b"}"), "file not fully covered"),
    "safetensors header of half a million texts": (
        lambda: safe({"__metadata__": {f"{i:x}": "" for i in range(250_000)}, "a": f32(0, 8)}),
        "has 500006 texts, more than the limit of 400000",
    ),
    "safetensors header of 5 MB of lists": (
        lambda: safe(b"{" + b'"a":[],' * 800_000 + b'"b":1}'),
        "not valid as safetensors",
    ),
    "safetensors of 20,001 tensors": (lambda: safe({str(i): f32(0, 0) for i in range(20_001)}, b""), "20001 tensors"),
    "safetensors header no JSON": (safe(b"{not json}"), "JSON"),
    "safetensors header no text": (safe(b'{"\xff\xfe": 1}'), "JSON"),
    "safetensors header deep": (safe(b'{"a":' + b"[" * 200_000), "JSON"),
    "safetensors entry no dict": (safe({"a": 5}), "JSON"),
    "safetensors entry without offsets": (safe({"a": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
    "safetensors names twice": (safe(b'{"a":%b,"a":%b}' % ((json.dumps(f32(0, 8)).encode(),) * 2)), "twice"),
    "safetensors overlap": (safe({"a": f32(0, 8), "b": f32(4, 8)}), "not valid as safetensors"),
    "safetensors hole": (safe({"a": f32(0, 4), "b": f32(8, 12)}, bytes(12)), "not valid as safetensors"),
    "safetensors shape and size differ": (safe({"a": f32(0, 8, [3])}), "not valid as safetensors"),
    "safetensors negative shape": (safe({"a": f32(0, 8, [-2])}), "not valid as safetensors"),
    "safetensors backwards": (safe({"a": f32(8, 0), "b": f32(0, 8)}), "not valid as safetensors"),
    "safetensors odd metadata": (safe({"__metadata__": {"a": 1}, "b": f32(0, 8)}), "not valid as safetensors"),
    "safetensors unknown type": (safe({"a": f32(0, 8, [2], "X99")}), "X99"),
    "safetensors complex": (safe({"a": f32(0, 8, [1], "C64")}), "C64, expected one of F64"),
    "safetensors of 17 dimensions": (safe({"a": f32(0, 4, [1] * 17)}, bytes(4)), "17 dimensions"),
    "safetensors of a million dimensions": (lambda: safe({"a": f32(0, 4, [1] * 10**6)}, bytes(4)), "1000000 dim"),
    "safetensors of nothing": (safe({}, b""), "0 tensors"),
    "safetensors of metadata": (safe({"__metadata__": {"a": "b"}}, b""), "0 tensors"),
    # pickles that want to run something
    "os.system as a plain pickle": (b"cos\nsystem\n(S'touch MARKER'\ntR.", "text file"),
    "os.system, protocol 2": (b"\x80\x02cos\nsystem\nX\x0c\0\0\0touch MARKER\x85R.", "wants to run os.system"),
    "os.system, protocol 4": (pickle.dumps(Shell("touch MARKER"), 4), "wants to run"),
    "os.system in a zip": (saved({"a": torch.ones(2), "b": Shell("touch MARKER")}), "wants to run"),
    "os.system in a zip, protocol 4": (saved({"a": torch.ones(2), "b": Shell("touch MARKER")}, protocol=4), "wants to"),
    "os.system in a legacy file": (saved({"a": torch.ones(2), "b": Shell("touch MARKER")}, "legacy"), "wants to run"),
    "os.system before a broken end": (archive({}, data=b"\x80\x02cos\nsystem\nX\1\0\0\0a\x85R\xff"), "os.system"),
    "builtins.eval": (archive({**GOOD, "b": Call("builtins eval", "1")}), "wants to run builtins.eval"),
    "eval of Python 2": (archive({**GOOD, "b": Call("__builtin__ eval", "1")}), "wants to run __builtin__.eval"),
    "getattr": (archive({**GOOD, "b": Call("builtins getattr", Name("torch hub"), "load")}), "builtins.getattr"),
    "torch.load": (archive({**GOOD, "b": Call("torch load", "x", Name("pickle Unpickler"))}), "torch.load"),
    "os.system by INST": (archive({**GOOD, "b": b"(X\1\0\0\0aios\nsystem\n"}), "wants to run os.system"),
    "os.system through torch": (archive({**GOOD, "b": b"\x8c\5torch\x8c\x17serialization.os.system\x93"}), "wants to"),
    "os.system in place of a storage": (archive({"a": tensor(storage="os system")}), "wants to run os.system"),
    "os.system never called": (archive({**GOOD, "b": Name("os system")}), "wants to run os.system"),
    # broken pickles
    "plain pickle": (pickle.dumps({"a": [1, 2]}, 4), "not one that torch.save wrote"),
    "cut pickle in a zip": (archive({}, data=b"\x80\x02}X\x05\0\0\0ab"), "broken pickle at byte"),
    "pickle of protocol 9": (archive({}, data=b"\x80\x09}."), "protocol 9"),
    "no pickle in the zip": (archive({}, data=b"hello"), "broken pickle"),
    "empty pickle in the zip": (archive({}, data=b""), "broken pickle"),
    "a million steps": (archive({}, data=b"N0" * 500_001 + b"}."), "1,000,000 steps"),
    "a quarter of a million sets": (archive({}, data=b"\x8f" * 250_001 + b"}."), "1,000,000 steps"),
    "10,001 names": (
        lambda: archive({}, data=b"".join(b"ca\nb%d\n" % i for i in range(10_001)) + b"}."),
        "than 10,000 names",
    ),
    "a name of 11 parts": (archive({**GOOD, "b": Name("a b" + ".b" * 10)}), "a name of 11 parts"),
    "a text of 5 MB": (lambda: archive({**GOOD, "b": "x" * 5_000_000}), "a piece of 5000000 bytes"),
    "unknown persistent id": (archive({"a": Stored("what", 1, 2, 3, 4)}), "reference to unknown data"),
    "text as persistent id": (archive({"a": b"Pstorage\n"}), "reference to unknown data"),
    "storage of size -1": (archive({"a": tensor(numel=-1)}), "reference to unknown data"),
    "storage in two ways": (archive({**GOOD, "b": tensor(storage="torch HalfStorage")}), "described in two ways"),
    # tensors that reach out of their storage
    "more than the storage": (archive({"a": tensor((5,))}), "beyond the 16 bytes of its storage"),
    "offset beyond the storage": (archive({"a": tensor(offset=3)}), "beyond the 16 bytes"),
    "offset of 2^62": (archive({"a": tensor(offset=1 << 62)}), "beyond the 16 bytes"),
    "stride beyond the storage": (archive({"a": tensor((2, 2), (3, 1))}), "beyond the 16 bytes"),
    "stride of 2^62": (archive({"a": tensor((2, 2), (1 << 62, 1))}), "beyond the 16 bytes"),
    "expanded to more than the storage": (archive({"a": tensor((5,), (0,))}), "beyond the 16 bytes"),
    "expanded to a petabyte": (archive({"a": tensor((1 << 50,), (0,))}), "beyond the 16 bytes"),
    "a sum beyond 2^64": (archive({"a": tensor((1 << 62,) * 4, (1 << 62,) * 4)}), "beyond the 16 bytes"),
    "pickle says more than the storage has": (archive({"a": tensor((8,), numel=8)}), "beyond the 16 bytes"),
    "negative stride": (archive({"a": tensor((2,), (-1,), 1)}), "impossible shape"),
    "negative shape": (archive({"a": tensor((-2,))}), "impossible shape"),
    "negative offset": (archive({"a": tensor(offset=-1)}), "impossible shape"),
    "shape of 2^63": (archive({"a": tensor((1 << 63,))}), "impossible shape"),
    "shape of a float": (archive({"a": tensor((2.0,))}), "impossible shape"),
    "shape of True": (archive({"a": tensor((True,))}), "impossible shape"),
    "shape and stride of different length": (archive({"a": tensor((2, 2), (1,))}), "impossible shape"),
    "20,001 tensors": (lambda: archive({str(i): tensor() for i in range(20_001)}), "20001 tensors, expected 1 to"),
    "many views of the same numbers": (
        archive({str(i): tensor((30_000,), numel=30_000, key="1") for i in range(20)}, ("x/data/1", bytes(120_000))),
        "its tensors have 2400000 bytes, the numbers that they are views of only 120000",
    ),
    "shape of 17 dimensions": (archive({"a": tensor((1,) * 17, (1,) * 17)}), "a tensor of impossible shape"),
    "empty tensor without bounds": (archive({"a": tensor((0, 1 << 62, 4), (1, 1, 1))}), "impossible shape"),
    "storage of a missing member": (archive({"a": tensor(key="1")}), "storage '1' are missing"),
    "storage named ../data/0": (archive({"a": tensor(key="../data/0")}), "are missing"),
    # tensors of other kinds
    "sparse tensor": (saved({"a": sparse()}), "torch._utils._rebuild_sparse_tensor"),
    "quantised tensor": (archive({"a": Call("torch._utils _rebuild_qtensor", 1)}), "torch._utils._rebuild_qtensor"),
    "subclass of tensor": (saved({"a": torch.ones(2).as_subclass(Labelled)}), "as the tensor class test_checkpoint_r"),
    "complex numbers": (saved({"a": torch.ones(2, dtype=torch.complex64)}), "torch.ComplexFloatStorage"),
    "negated view": (saved({"a": torch.ones(2, dtype=torch.complex64).conj().imag}), "conjugate or negated"),
    "a new kind of tensor": (archive({"a": Call("torch._utils _rebuild_tensor_v9", 1)}), "_rebuild_tensor_v9"),
    # what holds no state dict
    "no tensors": (saved({"epoch": 1, "b\n\x1b[31m": 2}), "holds no named tensors (but epoch"),
    "a single tensor": (saved(torch.ones(2)), "holds no named tensors"),
    "a list of tensors": (saved([torch.ones(2)]), "holds no named tensors"),
    "a whole model": (saved(torch.nn.Linear(2, 2)), "a whole torch.nn.modules.linear.Linear object"),
    "a whole model, legacy": (saved(torch.nn.Linear(2, 2), "legacy"), "a whole torch.nn.modules.linear.Linear object"),
    "a state dict of itself": (archive({}, data=b"\x80\x02}q\0X\x0a\0\0\0state_dicth\0s."), "no named tensors"),
    # zip archives that two readers may read in two ways
    "cut zip": (saved({"a": torch.ones(100)})[:-200], "truncated or damaged"),
    "start of a zip": (saved({"a": torch.ones(100)})[:300], "no zip directory at the end of its 300 bytes"),
    "zip directory cut": (archive(GOOD)[:-10], "truncated or damaged"),
    "deflated": (archive(GOOD, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "deflated by the local header": (field(archive(GOOD), LOCAL, 0, 8, b"\x08\0"), "not what the zip directory says"),
    "encrypted": (field(archive(GOOD), CENTRAL, 0, 8, b"\1\0"), "is encrypted"),
    "encrypted by the local header": (field(archive(GOOD), LOCAL, 2, 6, b"\1\0"), "not what the zip directory says"),
    "two pickles": (archive(GOOD, ("y/data.pkl", b"N.")), "2 files that could be its data.pkl"),
    "two pickles, one deeper": (archive(GOOD, ("x/y/data.pkl", b"N.")), "2 files"),
    "two pickles but for case": (archive(GOOD, ("x/DATA.pkl", b"N.")), "2 files"),
    "one pickle of another case": (archive(GOOD).replace(b"x/data.pkl", b"x/Data.pkl"), "could be its data.pkl"),
    "a name twice but for case": (archive(GOOD, ("x/DATA/0", DATA)), "two members of one name"),
    "a zip directory of 3 MB": (
        lambda: archive(GOOD, *((f"{i:060000}", b"") for i in range(50))),
        "than the limit of 2 MB",
    ),
    "zip with 70 KB of zeros behind": (archive(GOOD) + bytes(70_000), "ends with nothing but zeros"),
    "a path upwards": (archive(GOOD, ("x/../../etc/passwd", b"")), "out of the archive"),
    "an absolute path": (archive(GOOD, ("/etc/passwd", b"")), "out of the archive"),
    "a path of Windows": (archive(GOOD, ("x\\data\\1", b"")), "out of the archive"),
    "a drive of Windows": (archive(GOOD, ("c:data", b"")), "out of the archive"),
    "a name with a zero": (archive(GOOD, ("x/data/1z", b"")).replace(b"data/1z", b"data/1\0"), "out of the archive"),
    "TorchScript": (archive(GOOD, ("x/code/__torch__.py", b"")), "TorchScript"),
    "TorchScript constants": (archive(GOOD, ("x/constants.pkl", b"")), "TorchScript"),
    "big endian": (patched(archive(GOOD), b"little", b"big   "), "big-endian"),
    "other local name": (patched(archive(GOOD), b"x/data/0", b"x/data/1"), "not what the zip directory says"),
    "other local name of the pickle": (patched(archive(GOOD), b"x/data.pkl", b"x/data.pkx"), "not what the zip"),
    "no local header": (field(archive(GOOD), LOCAL, 2, 0, b"PK\x07\x08"), "not what the zip directory says"),
    "long local extra field": (field(archive(GOOD), LOCAL, 2, 28, b"\xff\xff"), "not what the zip directory says"),
    "two members in one place": (field(archive(GOOD, ("x/data/1", DATA)), CENTRAL, 3, 42, bytes(4)), "overlaps"),
    "a member longer than its place": (field(archive(GOOD), CENTRAL, 2, 20, struct.pack("<II", 99, 99)), "overlaps"),
    "a member of 4 GB": (field(archive(GOOD), CENTRAL, 2, 20, b"\xfe\xff\xff\xff" * 2), "overlaps"),
    "a member beyond the end": (field(archive(GOOD), CENTRAL, 2, 42, b"\xff\xff\xff\x7f"), "overlaps"),
    # legacy files
    "legacy: cut": (legacy(GOOD)[:-4], "truncated"),
    "legacy: cut before the storages": (legacy(GOOD)[:-20], "truncated"),
    "legacy: cut pickle": (legacy(GOOD)[:150], "broken pickle"),
    "legacy: other magic": (legacy(GOOD, magic=5), "not one that torch.save wrote"),
    "legacy: other protocol": (legacy(GOOD, protocol=1002), "unknown version"),
    "legacy: big endian": (legacy(GOOD, machine={"little_endian": False}), "byte order"),
    "legacy: storage of another size": (legacy(GOOD, numel=5), "5 numbers, expected 4"),
    "legacy: storage of size -1": (legacy(GOOD, numel=-1), "-1 numbers, expected 4"),
    "legacy: no storages": (legacy(GOOD, keys=()), "not those of its tensors"),
    "legacy: other storages": (legacy(GOOD, keys=("1",)), "not those of its tensors"),
    "legacy: keys that are no text": (legacy(GOOD, keys=([],)), "not those of its tensors"),
    "legacy: a storage twice": (legacy(GOOD, keys=("0", "0")) + struct.pack("<q", 4) + DATA, "storage '0' of 4"),
    "legacy: storage of 2^62 numbers": (legacy({"a": tensor(numel=1 << 62)}, numel=1 << 62), "truncated"),
    "legacy: reaches out": (legacy({"a": tensor((5,))}), "beyond the 16 bytes"),
    "legacy: quantised storage": (legacy({"a": tensor(storage="torch QInt8Storage")}), "torch.QInt8Storage"),
    "legacy: view of torch 0.3": (
        legacy({"a": Stored("storage", Name("torch FloatStorage"), "0", "cpu", 4, ("1", 0, 2))}),
        "before 0.4",
    ),
    # names that a terminal or a log would obey
    "escape codes in a key": (archive({"a\x1b[31m\r\nfake line": tensor((9,))}), "'a\\x1b[31m\\r\\nfake line'"),
    "an endless key": (archive({"a" * 100_000: tensor((9,))}), "'aaa"),
    "a key of 501 characters": (archive({"a" * 501: tensor()}), "longer than the limit of 500"),
    "escape codes in a member": (archive(GOOD, ("../\x1b[31m\n", b"")), "out of the archive"),
}  # fmt: skip


def refusal(path: Path) -> str:
    """The message for a file that must not be opened; its form is the same for all."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable(), "one line, and nothing that a terminal would obey"
    assert len(text) < len(str(path)) + 600
    return text.removeprefix(f"{path}: ")


def test_the_assembled_files_are_good_without_their_fault(tmp_path):
    """Otherwise the faults below might be refused for something else."""
    for data in (archive(GOOD), legacy(GOOD), safe({"a": f32(0, 8)}, DATA[:8])):
        (tmp_path / "a").write_bytes(data)
        with load_checkpoint(tmp_path / "a") as found:
            assert {key: found[key].tolist() for key in found} == {"a": [0, 1]}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, words = REFUSED[name]
    path = tmp_path / "model.ckpt"
    path.write_bytes(data() if callable(data) else data)
    start = time.process_time()
    assert words in refusal(path)
    assert time.process_time() - start < 10
    assert os.listdir(tmp_path) == ["model.ckpt"], "nothing was executed, nothing was written"


def test_a_name_twice_in_the_zip_directory(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = archive(GOOD, ("x/data/0", DATA))
    (tmp_path / "a").write_bytes(data)
    assert "two members of one name" in refusal(tmp_path / "a")
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = archive(GOOD, ("x/data.pkl", b"N."))
    (tmp_path / "a").write_bytes(data)
    assert "2 files that could be its data.pkl" in refusal(tmp_path / "a")


def test_a_hostile_pickle_is_really_one(tmp_path, monkeypatch):
    """The same bytes that are refused above do run a command where pickles are obeyed."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(REFUSED["os.system, protocol 4"][0])
    assert os.listdir(tmp_path) == ["MARKER"]


def test_paths_that_are_no_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.ckpt")
    assert "no such file" in refusal(tmp_path / "zero\0byte".replace("\0", "-"))
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "no such file" in refusal(tmp_path / "link")
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint("zero\0byte")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "two\nlines")
    assert "\\nlines: no such file" in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not an ordinary file" in refusal(tmp_path / "pipe")


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(archive(GOOD))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("end", [4.0, 4.5, "4", None, [4]])
def test_an_offset_that_is_no_whole_number(tmp_path, end):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, end]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="no valid JSON in its safetensors header"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_the_limit_of_a_header_is_said_as_a_limit(tmp_path):
    with open(tmp_path / "a", "wb") as file:  # a file with a hole
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_100)
    text = refusal(tmp_path / "a")
    assert "a header" not in text and "has 100000001 bytes, more than the limit of 100000000" in text
    assert "damaged" not in text and "download" not in text


def test_other_tensors_may_be_of_any_kind_outside_of_the_state_dict(tmp_path):
    content = {"state_dict": {"a": torch.ones(2)}, "optimizer": {"b": sparse(), "c": torch.ones(2, dtype=torch.cfloat)}}
    (tmp_path / "a").write_bytes(saved(content))
    with load_checkpoint(tmp_path / "a") as found:
        assert list(found) == ["a"]


# ------------------------------------------------------------------------------------------------------------- chance

SEEDS = {
    "zip": saved({"state_dict": {"a": torch.ones(3), "b": torch.ones(2, 2).half().t()}, "epoch": 1}),
    "zip, protocol 4": saved({"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones(2, 2)}, protocol=4),
    "assembled zip": archive({"a": tensor(), "b": tensor((2, 2), (1, 2))}),
    "legacy": saved({"a": torch.ones(3), "b": torch.ones(2, 2).half().t()}, "legacy"),
    "safetensors": safetensors_bytes({"a": torch.ones(3), "b": torch.ones(2, 2).half()}, {"format": "pt"}),
}


def read_or_refuse(path: Path, data: bytes) -> None:
    """Any bytes give tensors of the shapes promised, or a CheckpointError; and no tensor larger than the file."""
    path.write_bytes(data)
    try:
        with load_checkpoint(path) as found:
            for key in found:
                value = found[key]
                assert tuple(value.shape) == found.shape(key)
                assert value.numel() * value.itemsize <= len(data)
                assert value.untyped_storage().nbytes() <= len(data)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable()


FAULTS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=6)), max_size=4)
CHANCE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\3\4", b"\x80\2", bytes([8, 0, 0, 0, 0, 0, 0, 0]) + b"{"]))
@CHANCE
def test_random_files(tmp_path, data, start):
    read_or_refuse(tmp_path / "a", start + data)


@pytest.mark.parametrize("seed", SEEDS)
@given(changes=FAULTS, cut=st.floats(0, 2))
@CHANCE
def test_files_with_random_faults(tmp_path, seed, changes, cut):
    data = bytearray(SEEDS[seed])
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new
    read_or_refuse(tmp_path / "a", bytes(data[: int(len(data) * cut)] if cut < 1 else data))


@given(changes=FAULTS)
@CHANCE
def test_pickles_with_random_faults_in_a_sound_archive(tmp_path, changes):
    data = bytearray(b"\x80\x02" + assemble({"a": tensor(), "b": tensor((2, 2), (1, 2))}) + b".")
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new
    read_or_refuse(tmp_path / "a", archive({}, data=bytes(data)))


NUMBERS = st.integers(-1, 5) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63)])


@given(shape=st.lists(NUMBERS, max_size=4), stride=st.lists(NUMBERS, max_size=4), offset=NUMBERS, numel=NUMBERS)
@CHANCE
def test_views_of_random_numbers(tmp_path, shape, stride, offset, numel):
    view = tensor(tuple(shape), tuple((stride + [1] * 4)[: len(shape)]), offset, numel)
    read_or_refuse(tmp_path / "a", archive({"a": view}))
    read_or_refuse(tmp_path / "a", legacy({"a": view}, numel=max(min(numel, 2**62), -1)))

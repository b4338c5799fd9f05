"""The pickle machine: it reads data as Python does, runs nothing, and ends for any input."""

from __future__ import annotations

import ast
import collections
import io
import os
import pickle
import pickletools
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.checkpoints import checkpoint, folders
from sd.checkpoints.formats import pickles, safetensors_files, torch_files
from sd.checkpoints.formats.pickles import LITERALS, MAX_BYTES, Opaque, Placeholder, RefusedFile, Symbol, read_pickle

PROTOCOLS = range(6)


def read(data: bytes, stored=lambda key: ("stored", key)) -> object:
    """What the machine makes of `data`; every call gives a Placeholder."""
    return read_pickle(io.BytesIO(data), lambda function, arguments: Placeholder(function), stored)


def refused(data: bytes) -> str:
    with pytest.raises(RefusedFile) as error:
        read(data)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ plain data

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.none() | st.booleans() | st.integers(-(2**59), 2**59) | st.floats(allow_nan=False) | st.text()


def structures(leaves: st.SearchStrategy) -> st.SearchStrategy:
    def grow(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner)

    return st.recursive(leaves, grow, max_leaves=30)


def same(a: object, b: object) -> bool:
    """Equality that tells 1 from True and from 1.0, as `==` does not."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return a == b


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(structures(SCALARS))
@settings(max_examples=60, deadline=None)
def test_plain_data_are_read_as_python_reads_them(protocol, value):
    assert same(read(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize(
    ("first_protocol", "value"),
    [(3, b"\x00\xff"), (3, b"x" * 300), (4, {1, "a", None}), (4, frozenset({b"x"})), (5, bytearray(b"abc"))],
)
def test_newer_kinds_of_data(first_protocol, value):
    for protocol in range(first_protocol, 6):
        assert same(read(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_recursive_objects_stay_one_object(protocol):
    loop: list = [1]
    loop.append(loop)
    twice = {"a": [], "loop": loop}
    twice["b"] = twice["a"]
    found = read(pickle.dumps(twice, protocol))
    assert found["a"] is found["b"]
    assert found["loop"][1] is found["loop"]


def test_several_pickles_in_one_stream_are_read_one_by_one():
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("two", 4) + b"rest")
    values = [read_pickle(stream, Placeholder, Placeholder) for _ in range(2)]
    assert values == [[1], "two"]
    assert stream.read() == b"rest"


def test_python_2_strings_are_text():
    assert read(b"U\x03abc.") == "abc"
    assert read(b"T\x02\x00\x00\x00\xe9\xff.") == "\xe9\xff"
    assert read(b"S'abc'\n.") == "abc"


def test_every_opcode_is_known():
    """Each opcode runs on a stack that suits it; only those that need data from outside of the file are refused."""
    arguments = {
        None: b"", "uint1": b"\0", "uint2": b"\0\0", "int4": bytes(4), "uint4": bytes(4), "uint8": bytes(8),
        "decimalnl_short": b"0\n", "decimalnl_long": b"0L\n", "floatnl": b"0.5\n", "float8": bytes(8), "long1": b"\0",
        "long4": bytes(4), "stringnl": b"'x'\n", "stringnl_noescape": b"x\n", "stringnl_noescape_pair": b"m\nn\n",
        "unicodestringnl": b"x\n", "string1": b"\0", "string4": bytes(4), "bytes1": b"\0", "bytes4": bytes(4),
        "bytes8": bytes(8), "unicodestring1": b"\0", "unicodestring4": bytes(4), "unicodestring8": bytes(8),
        "bytearray8": bytes(8),
    }  # fmt: skip
    before = {
        "APPEND": b"]N", "APPENDS": b"](N", "SETITEM": b"}NN", "SETITEMS": b"}(NN", "ADDITEMS": b"\x8f(N",
        "STACK_GLOBAL": b"\x8c\1m\x8c\1n", "REDUCE": b"cm\nn\n)", "NEWOBJ": b"cm\nn\n)", "NEWOBJ_EX": b"cm\nn\n)}",
        "OBJ": b"(cm\nn\nN", "INST": b"(N", "BUILD": b"]N", "GET": b"Np0\n", "BINGET": b"Np0\n",
        "LONG_BINGET": b"Np0\n", "TUPLE1": b"N", "TUPLE2": b"NN", "TUPLE3": b"NNN", "DICT": b"(NN",
    }  # fmt: skip
    unknown = set()
    for op in pickletools.opcodes:
        if op.stack_before and pickletools.markobject in op.stack_before:
            stack = before.get(op.name, b"(N")
        else:
            stack = before.get(op.name, b"N" * len(op.stack_before) or b"N")
        form = op.arg.name if op.arg else None
        try:
            read(stack + op.code.encode("latin-1") + arguments[form] + (b"" if op.name == "STOP" else b"N."))
        except RefusedFile as error:
            unknown.add(op.name)
            assert "data from outside of the file" in str(error), op.name
    assert unknown == {"NEXT_BUFFER", "READONLY_BUFFER"}
    assert len(LITERALS) == 20


# ------------------------------------------------------------------------------------------------ nothing is executed


class Payload:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    data = pickle.dumps({"weights": Payload(os.system, f"touch '{marker}'")}, protocol)
    text = refused(data)
    assert f"{os.system.__module__}.system" in text
    assert "not executed" in text
    assert not marker.exists()

    # The same through a function that is on no list: it becomes a placeholder, and again nothing happens.
    data = pickle.dumps({"weights": Payload(Path.touch, marker)}, protocol)
    if protocol < 4:  # written as an attribute that builtins.getattr fetches
        assert "getattr" in refused(data)
    else:
        assert read(data)["weights"].symbol == Symbol("pathlib", "Path.touch")
    assert not marker.exists()

    pickle.loads(data)  # proof that the payload is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    "symbol",
    [
        "os system", "posix system", "nt system", "os.path join", "subprocess Popen", "sys exit", "runpy run_path",
        "shutil rmtree", "socket socket", "importlib import_module", "importlib.util find_spec", "pty spawn",
        "ctypes CDLL", "code InteractiveInterpreter", "webbrowser open", "pickle loads", "_pickle loads",
        "builtins eval", "builtins exec", "builtins compile", "builtins open", "builtins __import__",
        "builtins getattr", "__builtin__ eval", "__builtin__ apply", "__builtin__ execfile", "io open", "_io FileIO",
        "operator attrgetter", "types FunctionType", "torch load", "torch.serialization load", "torch.hub load",
        "torch hub.load", "torch.jit load", "torch.utils.cpp_extension load_inline", "numpy load", "timeit timeit",
        "numpy.testing._private.utils runstring", "torch.serialization os.system", "collections abc.sys.exit",
    ],
)  # fmt: skip
def test_symbols_that_run_code_are_refused_by_name(symbol):
    module, name = symbol.split()
    framed = b"\x8c%c%b\x8c%c%b\x93." % (len(module), module.encode(), len(name), name.encode())
    for data in (f"c{module}\n{name}\n.".encode(), f"(i{module}\n{name}\n.".encode(), framed):
        assert f"wants to run {module}.{name} " in refused(data)


@pytest.mark.parametrize(
    "symbol",
    [
        "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", "argparse Namespace", "pathlib PosixPath",
        "numpy.core.multiarray scalar", "numpy dtype", "functools partial", "builtins object", "ostrich system",
        "ldm.models.os Thing", "system os", "torch float16", "code.models Callback",
    ],
)  # fmt: skip
def test_other_symbols_stay_symbols(symbol):
    module, name = symbol.split()
    assert read(f"c{module}\n{name}\n.".encode()) == Symbol(module, name)


def test_calls_give_what_the_owner_says_and_states_are_dropped():
    calls = []

    def call(function: Symbol, arguments: tuple) -> object:
        calls.append((str(function), arguments))
        return Placeholder(function)

    for data in (b"cm\nC\nK\1\x85R}b.", b"cm\nC\nK\1\x85\x81}b.", b"cm\nC\nK\1\x85}\x92}b.", b"(K\1im\nC\n}b."):
        assert read_pickle(io.BytesIO(data), call, None).symbol == Symbol("m", "C")
    assert read_pickle(io.BytesIO(b"(cm\nC\nK\1o."), call, None).symbol == Symbol("m", "C")
    assert calls == [("m.C", (1,))] * 5
    # An object of an unknown class takes items without keeping them, and its methods are unknown functions.
    assert isinstance(read(b"cm\nC\n)RK\1aK\1K\2s(K\1K\2u(K\3e)R."), Placeholder)


def test_persistent_ids_are_asked_for():
    assert read(b"X\1\0\0\0kQ.") == ("stored", "k")
    assert read(b"Pk\n.") == ("stored", "k")


def test_an_ordered_dict_is_not_rebuilt_by_the_machine():
    assert read(pickle.dumps(collections.OrderedDict(a=1), 2)).symbol == Symbol("collections", "OrderedDict")


@pytest.mark.parametrize("module", [pickles, torch_files, safetensors_files, folders, checkpoint])
def test_the_readers_contain_no_way_to_run_anything(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "_pickle", "importlib", "runpy", "subprocess", "ctypes", "marshal", "shelve"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "getattr", "setattr", "globals", "vars"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"load", "Unpickler", "import_module", "system", "from_file", "set_"}


# -------------------------------------------------------------------------------------------------- broken and hostile


@pytest.mark.parametrize(
    ("data", "word"),
    [
        pytest.param(b"", "ends too early", id="nothing"),
        pytest.param(b"N", "ends too early", id="no STOP"),
        pytest.param(b".", "pop from empty list", id="empty stack"),
        pytest.param(b"\xff.", "unknown opcode", id="no opcode"),
        pytest.param(b"\x80\x09N.", "protocol 9", id="protocol of the future"),
        pytest.param(b"h\x05.", "5", id="empty memo"),
        pytest.param(b"Np-1\n.", "memo", id="negative memo number"),
        pytest.param(b"Np%d\n." % 2**70, "memo", id="huge memo number"),
        pytest.param(b"t.", "pop from empty list", id="no mark"),
        pytest.param(b"N\x86.", "stack is empty", id="pair of one"),
        pytest.param(b"}(NNNu.", "shorter", id="key without value"),
        pytest.param(b"NNa.", "items for a NoneType", id="append to nothing"),
        pytest.param(b"]NNs.", "keys for a list", id="set item of a list"),
        pytest.param(b"N)R.", "call of a NoneType", id="call of nothing"),
        pytest.param(b"cm\nn\nNR.", "call of a Symbol", id="arguments that are no tuple"),
        pytest.param(b"NN\x93.", "not text", id="symbol of no text"),
        pytest.param(b"c" + b"m" * 600 + b"\nn\n.", "500 characters", id="endless name"),
        pytest.param(b"cm\nn", "within a name", id="cut name"),
        pytest.param(b"cm\n\xff\n.", "utf-8", id="name that is no text"),
        pytest.param(b"X\x10\0\0\0abc.", "remain", id="cut string"),
        pytest.param(b"\x8d" + struct.pack("<Q", 2**62) + b"abc.", "far more than any", id="string of 2^62 bytes"),
        pytest.param(b"\x8e" + struct.pack("<Q", 2**40) + b"abc.", "far more than any", id="bytes of a terabyte"),
        pytest.param(b"\x8b" + struct.pack("<i", -1) + b".", "byte", id="number of negative length"),
        pytest.param(b"I12x\n.", "invalid literal", id="number that is none"),
        pytest.param(b"\x97.", "outside of the file", id="out-of-band buffer"),
    ],
)
def test_broken_pickles(data, word):
    assert word in refused(data)


def test_bounds_on_size_and_steps(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    assert read(b"N0" * 400 + b"N.") is None
    assert "1,000 steps" in refused(b"N0" * 600 + b"N.")
    monkeypatch.setattr(pickles, "MAX_BYTES", 1000)
    assert read(b"X\xe0\x03\0\0" + b"x" * 992 + b"0N.") is None
    assert "more than" in refused(b"X\xe1\x03\0\0" + b"x" * 993 + b"0N.")
    assert MAX_BYTES == 1 << 26


def test_deep_nesting_is_read_without_recursion():
    depth = 200_000
    value = read(b"]" * depth + b"a" * (depth - 1) + b".")
    for _ in range(depth - 1):
        (value,) = value
    assert value == []
    assert isinstance(read(b"cm\nn\n" + b")\x81" + b"\x85" * depth + b"."), tuple)


def test_keys_that_take_for_ever_to_hash():
    start = time.process_time()
    bomb = b"N" + b"2\x86" * 200  # a pair of twice a pair of twice a pair ...: 2^200 leaves
    found = read(b"}(" + bomb + b"Nu.")
    assert [type(key) for key in found] == [Opaque]
    assert len(read(b"\x8f(" + bomb + b"\x90.")) == 1
    assert len(read(b"(" + bomb + b"\x91.")) == 1

    prime = 2**61 - 1  # Python hashes integers modulo this
    numbers = b"".join(pickle.LONG1 + b"\x10" + (i * prime).to_bytes(16, "little") + b"N" for i in range(1, 40_000))
    assert len(read(b"}(" + numbers + b"u.")) == 39_999
    assert time.process_time() - start < 5


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_read_or_refused(data):
    try:
        read(data)
    except RefusedFile as error:
        assert str(error)


OPCODE = st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes if op.name != "STOP"])
PIECE = OPCODE | st.sampled_from(
    [b"N", b"(", b"]", b"}", b")", b"K\1", b"\x94", b"h\0", b"q\0", b"cm\nn\n", b"X\1\0\0\0a"]
)


@given(st.lists(PIECE, max_size=60))
@settings(max_examples=200, deadline=None)
def test_random_programs_are_run_or_refused(pieces):
    try:
        read(b"".join(pieces) + b".")
    except RefusedFile as error:
        assert str(error)

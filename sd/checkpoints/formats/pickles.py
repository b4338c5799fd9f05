"""Pickles read as data: an interpreter of the pickle opcodes that executes nothing.

A pickle is a program for a machine with a stack, a list of marks and a memo. Most opcodes push a number or a string, or
collect items of the stack in a list, a dict or a tuple. Three kinds of opcodes are dangerous:

    GLOBAL, STACK_GLOBAL, INST   import a module and fetch a name from it
    REDUCE, NEWOBJ, OBJ          call what was fetched
    BUILD                        pass a state to `__setstate__` of an object

Python's `pickle` obeys them, so opening a stranger's file runs the stranger's code. Here they are only recorded:
GLOBAL yields a `Symbol` (two strings); a call is passed to the caller (torch_files.py), which knows a dozen symbols
and returns a `Placeholder` for all others; BUILD drops the state, unless the object is a `Stateful`. The opcodes and
the encoding of their arguments come from the standard library's `pickletools`, protocols 0 to 5.

A file that names a symbol for running code (`os.system`, `builtins.eval`, ...) is refused altogether. That list
protects the *other* programs with which the file may be opened; this one is safe without it.

Bounds: a pickle has at most `MAX_BYTES` and `MAX_OPCODES`. An opcode adds at most one item to the stack, the marks and
the memo, so these are bounded, too: by 100 MB and about a second. Nothing recurses into the result, so it may be nested
to any depth.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_BYTES = 1 << 26  # 64 MB; the pickle of a full training checkpoint has 1 to 10 MB
MAX_PIECE = 4 << 20  # bytes of one string or number; in memory, text may take four times as much
MAX_OPCODES = 1_000_000  # about 38 for each tensor: 70,000 for the 1,831 tensors of a full Stable Diffusion 1 file
MAX_SYMBOLS = 10_000  # distinct ones; real files have less than 100
MAX_PARTS = 10  # of a symbol's name, between dots
SET = 4  # opcodes that EMPTY_SET counts as: an empty set takes four times the memory of other empty containers

# Modules and single functions that exist to run code, to load it or to reach the system.
RUNS_CODE = re.compile(
    r"(os|posix|nt|subprocess|sys|runpy|shutil|socket|importlib|imp|pty|ctypes|codeop|webbrowser|_?pickle|cPickle|dill"
    r"|cloudpickle|marshal|commands|popen2|pdb|bdb|cProfile|timeit|pip|pydoc|multiprocessing|asyncio|zipimport|pkgutil"
    r"|urllib|urllib2|requests|httplib|http|distutils|threading|_thread|_posixsubprocess|_winapi|profile|trace|doctest"
    r"|unittest|ensurepip|venv|numpy\.(testing|f2py|distutils)|lib2to3\.pgen2|torch\.(hub|jit|package|ops"
    r"|classes|_inductor|_dynamo|utils\.cpp_extension|utils\.collect_env|utils\._config_module))\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|__import__|getattr|setattr|delattr|globals|locals"
    r"|vars|breakpoint|input|apply|reload)"
    r"|_?io\.(open|FileIO)|_?operator\.(attrgetter|methodcaller)|types\.(CodeType|FunctionType|MethodType)"
    r"|code\.(interact|InteractiveInterpreter|InteractiveConsole)|(numpy|joblib|torch|torch\.serialization)\.load"
    r"|torch\.compile|torch\.storage\._load_from_bytes|pandas\.read_pickle|platform\.popen",
    re.DOTALL,
)

OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
# The opcodes that push their own argument; those that look something up push "any object" in pickletools' terms.
LITERALS = {op.name for op in pickletools.opcodes if op.arg and op.stack_after not in ([], [pickletools.anyobject])}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class RefusedFile(ValueError):
    """The file is broken, too large, or not to be trusted; the text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name that a pickle wanted to import: two strings, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Stands for an object of `symbol`, an unknown class or function."""

    symbol: Symbol


@dataclass(slots=True, eq=False)
class Stateful:
    """Stands for an object whose state, plain data, is kept."""

    state: object = None


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Stands for a dict key or set member that is not a plain scalar; it equals only itself.

    Hashing foreign data can take for ever: a tuple of twice the same tuple of twice the same tuple ... takes two to the
    power of its depth, and large integers can be chosen to share one hash.
    """

    value: object


def read_pickle(
    stream: BinaryIO, call: Callable[[Symbol, tuple], object], stored: Callable[[object], object]
) -> object:
    """Interpret one pickle at the current position of `stream`, and leave the stream after its last byte.

    `call(symbol, arguments)` returns the result of calling something imported, `stored(id)` an object that is kept
    outside the pickle (a "persistent id"). They must not trust their arguments, nor recurse into them, which may never
    end; a ValueError of theirs counts as a broken pickle.

    Returns plain Python data, with `Symbol`, `Opaque` and the results of `call` and `stored` in between. Raises
    RefusedFile.
    """
    source = _Source(stream)
    try:
        return _run(source, call, stored)
    except RefusedFile:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        raise RefusedFile(f"broken pickle at byte {source.count} ({error!s:.200}); download the file again") from None


class _Source:
    """The bytes of one pickle, counted and bounded: lengths are checked before anything is allocated."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.count = stream, 0

    def read(self, size: int) -> bytes:
        if size > MAX_PIECE:
            raise RefusedFile(f"a pickle with a piece of {size} bytes, far more than any checkpoint has")
        if size > MAX_BYTES - self.count:
            raise RefusedFile(f"a pickle of more than {MAX_BYTES >> 20} MB, far more than any checkpoint has")
        self.count += size
        return self.stream.read(size)

    def readline(self) -> bytes:
        line = self.stream.readline(min(MAX_PIECE, MAX_BYTES - self.count))
        self.count += len(line)
        return line

    def symbol(self) -> Symbol:
        """Two lines of text, the argument of GLOBAL and INST."""
        module, name = self.readline(), self.readline()
        if not name.endswith(b"\n"):
            raise ValueError("it ends within a name")
        return Symbol(module[:-1].decode(), name[:-1].decode())


def _run(source: _Source, call: Callable[[Symbol, tuple], object], stored: Callable[[object], object]) -> object:
    """The machine: executes one opcode after the other until STOP."""
    stack: list = []
    marks: list[int] = []  # for every open MARK, how many items lay on the stack
    memo: dict[int, object] = {}
    symbols: set[Symbol] = set()
    steps = 0

    def top(count: int) -> list:
        """Take the last `count` items."""
        if len(stack) < count:
            raise ValueError("the stack is empty")
        taken = stack[-count:]
        del stack[-count:]
        return taken

    def marked() -> list:
        """Take everything above the last mark."""
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        return taken

    while (steps := steps + 1) <= MAX_OPCODES:
        code = source.read(1)
        if code not in OPCODES:
            raise ValueError(f"unknown opcode {code!r}" if code else "it ends too early")
        name, form = OPCODES[code].name, OPCODES[code].arg
        # pickletools would join the two lines of a symbol and lose the boundary
        argument: Any = None
        if name in ("GLOBAL", "INST"):
            argument = source.symbol()
        elif form is not None:
            argument = form.reader(source)  # type: ignore[arg-type]  # it reads and reads lines, no more

        match name:
            # the memo: an item is kept under a number and fetched again
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                if not 0 <= argument < 1 << 32:
                    raise ValueError("memo number out of range")
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            # plain values
            case _ if name in LITERALS:
                stack.append(argument)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            # containers
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(top(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(marked())
            case "APPEND":
                _extend(top(1), stack[-1])
            case "APPENDS":
                _extend(marked(), stack[-1])
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = marked()
                stack.append({})
                _update(items, stack[-1])
            case "SETITEM":
                _update(top(2), stack[-1])
            case "SETITEMS":
                _update(marked(), stack[-1])
            case "EMPTY_SET":
                stack.append(set())
                steps += SET - 1
            case "ADDITEMS":
                _extend(marked(), stack[-1])
            case "FROZENSET":
                stack.append(frozenset(map(_key, marked())))
            # names, calls and states: recorded, not executed
            case "GLOBAL":
                stack.append(_inert(argument, symbols))
            case "STACK_GLOBAL":
                stack.append(_inert(Symbol(*top(2)), symbols))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Symbol("copyreg", f"extension_{argument}"))
            case "REDUCE" | "NEWOBJ":
                stack.append(_called(call, *top(2)))
            case "NEWOBJ_EX":
                stack.append(_called(call, *top(3)[:2]))
            case "INST":
                stack.append(_called(call, _inert(argument, symbols), tuple(marked())))
            case "OBJ":
                function, *arguments = marked()
                stack.append(_called(call, function, tuple(arguments)))
            case "BUILD":
                (state,) = top(1)
                if isinstance(stack[-1], Stateful):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(stored(stack.pop()))
            case "PERSID":
                stack.append(stored(argument))
            # housekeeping
            case "PROTO":
                if argument > 5:
                    raise ValueError(f"protocol {argument}, the newest known is 5")
            case "FRAME":
                pass
            case "DUP":
                stack.append(stack[-1])
            case "POP":
                (marks if marks and marks[-1] == len(stack) else stack).pop()
            case "POP_MARK":
                marked()
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"{name} needs data from outside of the file")
    raise RefusedFile(f"a pickle of more than {MAX_OPCODES:,} steps, far more than any checkpoint has")


def _key(value: object) -> object:
    """A dict key or set member that is hashed quickly, see `Opaque`."""
    if isinstance(value, int):
        return value if value.bit_length() <= 60 else Opaque(value)
    return value if value is None or isinstance(value, (str, bytes, float, Symbol)) else Opaque(value)


def _extend(items: list, target: object) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_key, items))
    elif not isinstance(target, Placeholder):
        raise ValueError(f"items for a {type(target).__name__}")


def _update(items: list, target: object) -> None:
    """Add alternating keys and values; those of a class derived from dict are dropped with its state."""
    if isinstance(target, dict):
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif not isinstance(target, Placeholder):
        raise ValueError(f"keys for a {type(target).__name__}")


def _inert(symbol: Symbol, seen: set[Symbol]) -> Symbol:
    """The symbol itself. Raises RefusedFile if it names something that runs code; those in `seen` were checked."""
    if not isinstance(symbol.module, str) or not isinstance(symbol.name, str):
        raise ValueError("a name that is not text")
    if len(symbol.module) + len(symbol.name) > 500:
        raise ValueError("a name of more than 500 characters")
    if symbol in seen:
        return symbol
    # A name with dots walks through attributes: `serialization.os.system` of `torch` is os.system.
    parts = symbol.name.split(".")
    if len(seen) == MAX_SYMBOLS or len(parts) > MAX_PARTS:
        what = f"a name of {len(parts)} parts" if len(parts) > MAX_PARTS else f"more than {MAX_SYMBOLS:,} names"
        raise RefusedFile(f"a pickle with {what}, far more than any checkpoint has")
    ways = [str(symbol), *(".".join(parts[i:]) for i in range(len(parts) - 1))]
    if any(map(RUNS_CODE.fullmatch, ways)):
        raise RefusedFile(
            f"wants to run {symbol} when opened by other programs: it was not executed; do not use this file"
        )
    seen.add(symbol)
    return symbol


def _called(call: Callable[[Symbol, tuple], object], function: object, arguments: object) -> object:
    if isinstance(function, Placeholder):
        return function
    if not isinstance(function, Symbol) or not isinstance(arguments, tuple):
        raise ValueError(f"a call of a {type(function).__name__}")
    return call(function, arguments)

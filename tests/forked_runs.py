"""Training programs that start at once: forked from a process that has imported everything, to be killed at any moment.

The process reads orders, lines of JSON, and answers each with one. Its children have one thread, and write to files.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from scripts.common.streams import stop

HERE = Path(__file__).resolve().parent


class Child:
    """A run of a program; `output` is the file with what it prints."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output

    def wait(self) -> int:
        """The exit status, negative for a signal that ended it."""
        return int(self.server.ask({"wait": self.pid}))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def printed(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class Server:
    """The process that forks."""

    def __init__(self, process: subprocess.Popen, folder: Path) -> None:
        self.process, self.folder, self.numbers = process, folder, itertools.count()

    def ask(self, order: Mapping[str, object]) -> str:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(
        self, program: str, *argv: object, env: Mapping[str, str] | None = None, end: str = "", at: int = 0
    ) -> Child:
        """Start a program of scripts/. `end` is how it kills itself, the `at`-th time it gets there: see `_traps`."""
        output = self.folder / f"{next(self.numbers)}.txt"
        order = {"program": program, "argv": [*map(str, argv)], "env": dict(env or {}), "output": str(output)}
        return Child(self, int(self.ask({**order, "end": end, "at": at})), output)

    def pair(self, program: str, *argv: object, port: int, restart: int | None = None) -> list[Child]:
        """Start two processes that work together, as torchrun does it; `restart` counts how often it has before."""
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"TORCHELASTIC_RUN_ID": "none"}
        env |= {} if restart is None else {"TORCHELASTIC_RESTART_COUNT": str(restart)}
        return [
            self.start(program, *argv, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
        ]


@contextmanager
def forking(folder: Path) -> Iterator[Server]:
    """The process that forks, as long as the `with` block lasts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
    process = subprocess.Popen(
        [sys.executable, __file__], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Server(process, folder)
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def _serve() -> None:
    """Import what runs import late, and answer orders."""
    import torch.distributed.fsdp
    import torch.distributed.tensor

    from scripts import train, train_vae
    from scripts.training.log import curve
    from sd.text.tokenizer import Tokenizer

    curve([(1, 1.0), (2, 1.0)])  # matplotlib
    torch.optim.AdamW([torch.zeros(1)])  # torch.compile
    Tokenizer()(["words"])
    programs = {"train": train.main, "train_vae": train_vae.main}
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(_child(programs[order["program"]], order))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _child(program, order: Mapping[str, object]) -> int:
    torch.set_num_threads(1)
    os.environ.update(order["env"])
    output = os.open(order["output"], os.O_CREAT | os.O_WRONLY)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(target, number)
    signal.signal(signal.SIGINT, stop)  # as where a program is run as a file
    if order["end"]:
        _traps(order["end"], order["at"])
    try:
        status = program(order["argv"])
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _traps(end: str, at: int) -> None:
    """End the process by SIGKILL the `at`-th time that it

    before   is about to give a file that is written its name
    after    has just done so
    half     is in the middle of writing a state
    """
    count = itertools.count()
    replace, save = os.replace, torch.save

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def replaced(*paths: object) -> None:
        now = next(count) if end != "half" else -1
        if end == "before" and now == at:
            die()
        replace(*paths)
        if end == "after" and now == at:
            die()

    def saved(state: object, file: io.BufferedWriter) -> None:
        if end == "half" and next(count) == at:
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        save(state, file)

    os.replace = replaced
    torch.save = saved


def loads(folder: Path) -> None:
    """Read every file of a run, but for those with temporary names: none may be half-written."""
    from PIL import Image
    from safetensors.torch import load_file

    for path in folder.rglob("[!.]*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    _serve()

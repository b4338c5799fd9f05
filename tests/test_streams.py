"""Programs without a console, with a reader that leaves, with Ctrl-C at any moment; arguments as people type them."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from scripts import train, txt2img
from scripts.common import cli, spellings, streams
from sd.params import OPTIONS, REQUESTS, SamplingParams
from sd.spellings import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    "txt2img",
    "img2img",
    "inpaint",
    "convert",
    "train",
    "train_text",
    "train_vae",
    "distill",
    "evaluate",
    "bench",
    "study",
    "serve",
)
POSIX = pytest.mark.skipif(os.name != "posix", reason="shells and signals of POSIX")


def listening() -> None:
    """Undo the ignoring of Ctrl-C, which programs in the background of a shell inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(code: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program made of a `work` function, with redirections of the shell."""
    program = f"import sys, scripts.common.cli as cli\n{code}\nsys.exit(cli.run(work, cli.Parser(), []))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = f'{sys.executable} -c "$PROGRAM" {shell}'
    return subprocess.run(
        ["sh", "-c", command],
        env={**env, "PROGRAM": program},
        preexec_fn=listening if os.name == "posix" else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


@POSIX
def test_closed_streams(tmp_path):
    """The file that is opened next does not become the standard error, and what is printed is dropped."""
    code = (
        f"path = {str(tmp_path / 'file')!r}\n"
        "def work(args):\n    import os, warnings\n    from tqdm import tqdm\n"
        "    with open(path, 'w') as file:\n"
        "        print('out'); warnings.warn('told'); list(tqdm([1, 2], file=sys.stderr)); os.write(2, b'from C')\n"
        "        file.write('whole')\n    raise ValueError('the end')\n"
    )
    done = python(code, ">&- 2>&- <&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (tmp_path / "file").read_text() == "whole"


@POSIX
def test_a_reader_that_leaves(tmp_path):
    """The work goes on, silently; a full disk under the output is said once."""
    code = (
        "def work(args):\n    import time\n    for i in range(5):\n        print(i, flush=True); time.sleep(0.1)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    done = python(code, f"| head -1; test -e {tmp_path / 'done'}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert python(code, f"2>&1 | head -1 >{os.devnull}; test -e {tmp_path / 'done'}").stderr == ""
    if Path("/dev/full").exists():
        done = python(code, "> /dev/full")
        assert done.returncode == 0
        assert done.stderr == (
            "warning: the standard output cannot be written (No space left on device): the work goes on\n"
        )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:strict"])
def test_narrow_encodings(encoding):
    done = python("def work(args):\n    print('日本 é'); raise ValueError('猫')", PYTHONIOENCODING=encoding)
    assert done.returncode == 1 and done.stdout.startswith(r"\u65e5\u672c ") and done.stderr == "error: \\u732b\n"


def test_streams_of_a_caller_stay(monkeypatch, capsys):
    """In a process without a console, and in one that has one."""
    seen = []
    for stream in (None, sys.stderr):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.run(lambda args: seen.append(sys.stderr), cli.Parser(), []) == 0
        assert sys.stderr is stream
        assert cli.run(lambda args: 1 / 0, cli.Parser(), []) == 1
    assert None not in seen and capsys.readouterr().err == "error: division by zero\n"
    monkeypatch.undo()
    assert not isinstance(sys.stdout, streams.SafeStream)


@POSIX
@pytest.mark.parametrize("program", ["txt2img", "convert"])
def test_control_c_during_imports(tmp_path, program):
    """A module that the program imports is replaced by one that says so and waits."""
    wait = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / ("torch.py" if program == "txt2img" else "tqdm.py")).write_text(wait)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "scripts" / f"{program}.py"), "a"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, preexec_fn=listening, **pipes) as running:
        assert running.stdout is not None and running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=30) == ("", "stopped\n")
    assert running.returncode == 130


@POSIX
@pytest.mark.parametrize("moment", ["work", "exit", "twice"])
def test_control_c_later(moment):
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    code = (
        "import atexit, os, signal, time\nfrom scripts.common import streams\nstreams.start()\n"
        f"def work(args):\n    if {moment!r} != 'exit': {kill}\n"
        "    time.sleep(0.1)\n"
        f"if {moment!r} != 'work': atexit.register(lambda: ({kill}, time.sleep(9)))\n"
    )
    done = python(code)
    assert done.returncode == 130 and set(done.stderr.splitlines()) == {"stopped"}


@POSIX
def test_without_any_stream_an_image_is_made(tmp_path):
    """The real program; standard input is closed, too."""
    program = f"{sys.executable} {ROOT / 'scripts' / 'txt2img.py'}"
    given = f"--steps 1 --seed 0 --out={tmp_path / 'made'}"
    done = subprocess.run(["sh", "-c", f"{program} 'a red house' {given} >&- 2>&- <&-"], check=False, timeout=100)
    assert done.returncode == 0 and [path.name for path in (tmp_path / "made").iterdir()] == ["00001.png"]


def test_closed_input_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    assert txt2img.main(["--from-file", "-", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: --from-file -: the standard input is closed: give the name of a file\n"


# --- arguments ---


def parser(program: str) -> cli.Parser:
    found: cli.Parser = importlib.import_module(f"scripts.{program}").parser()
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_home_folders_in_all_paths(program, monkeypatch):
    """`--out=~/a` reaches a program as it is written. Every argument that is a path expands it."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    found = 0
    for action in parser(program)._actions:
        if str(action.metavar).startswith(("FILE", "FOLDER", "PATH")) or isinstance(action.default, Path):
            assert action.type is not None and str(action.type("~/a.b")) == str(Path("/home/me/a.b")), action  # type: ignore[operator]
            found += 1
    assert found >= 1
    assert cli.home("~/a.safetensors:0.5") == os.path.join("/home/me", "a.safetensors:0.5").replace("\\", "/")
    assert cli.home("style=~/a:1") == "style=/home/me/a:1" and cli.home("a/b=~/c") == "a/b=~/c"


def test_home_folders_in_python(monkeypatch, tmp_path):
    from sd import CheckpointError, StableDiffusion

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for given in ({"path": "~/no.safetensors"}, {"vae": "~/no.safetensors"}):
        with pytest.raises(CheckpointError, match=str(tmp_path / "no.safetensors")):
            StableDiffusion.load(**given)


@pytest.mark.parametrize(
    "given, name, value",
    [
        (["--negative", "-blurry"], "negative", "-blurry"),
        (["--negative", "-hands"], "negative", "-hands"),
        (["--negative-prompt", "-1girl", "--steps", "3"], "negative", "-1girl"),
        (["--prompt", "-a=b"], "prompt", "-a=b"),
        (["--negative", "-blurry, ugly"], "negative", "-blurry, ugly"),
        (["--negative=-x"], "negative", "-x"),
        (["--", "-blurry"], "words", ["-blurry"]),
        (["--", "--negative", "-x"], "words", ["--negative", "-x"]),
    ],
)
def test_texts_that_begin_with_a_dash(given, name, value):
    assert getattr(parser("txt2img").parse_words(given), name) == value


@pytest.mark.parametrize(
    "given, words",
    [
        (["-blurry"], 'for a prompt that begins with "-": --prompt="-blurry"'),
        (["-hands"], 'for a prompt that begins with "-": --prompt="-hands"'),
        (["a", "--negative", "--blurry"], 'for a value that begins with "-": --negative="--blurry"'),
        (["a", "--out", "-x"], 'for a value that begins with "-": --out="-x"'),
        (["a", "--negative", "--steps", "3"], "argument --negative/--negative-prompt: expected one argument (see"),
        (["a", "--sede", "3"], "did you mean --seed?"),
        (["a", "--sampling-steps", "20"], "--sampling-steps 20: use --steps ("),
        (["a", "--hr_scale", "2"], ": use --hires ("),
        (["a", "--subseed=3"], ": use --variation SEED:STRENGTH ("),
        (["a", "--medvram"], ": use --low-memory ("),
        (["a", "--bf16"], ": use --dtype bfloat16 ("),
        (["a", "--scheduler", "karras"], ": use --sampler or --spacing ("),
        (["a", "--no_half_vae"], ": leave it out: an image that is not finite"),
        (["a", "--threads", "4"], "unrecognized arguments: --threads 4 ("),
        (["a", "--ti", "b.pt"], "--ti b.pt: use --embedding ("),
        (["a", "-W", "64"], "-W 64: use --width ("),
        (["a", "--strength", "0.5"], ": it is an option of img2img and inpaint ("),
        (["a", "--denoise", "0.5"], ": it is an option of img2img and inpaint, where it is called --strength ("),
        (["a", "--xformers"], ": leave it out"),
    ],
)
def test_other_dashes_are_explained(given, words, capsys):
    with pytest.raises(SystemExit):
        parser("txt2img").parse_words(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "program, option, words",
    [
        ("train", "--num_inference_steps", "use --sample-steps ("), ("train", "--resolution", "use --size ("),
        ("train", "--half", "use --precision ("), ("train", "--learning_rate", "use --lr ("),
        ("train", "--train_batch_size", "use --batch ("), ("train_vae", "--sampling-steps", "--sampling-steps=1 (see"),
        ("study", "--width", "use --size ("), ("study", "--init_image", "use --image ("),
        ("convert", "--checkpoint", "give the file on its own"), ("convert", "--num-images", "--num-images=1 (see"),
    ],
)  # fmt: skip
def test_options_of_other_programs_in_each_of_ours(program, option, words, capsys):
    with pytest.raises(SystemExit):
        parser(program).parse_words([f"{option}=1", *({"study": ["all"], "convert": ["a"]}.get(program, []))])
    assert words in capsys.readouterr().err


def test_underscores_are_dashes():
    args = parser("txt2img").parse_words(["a", "--cfg_scale=3", "--clip_skip", "2", "--negative_prompt", "-b_c"])
    assert (args.guidance, args.clip_skip, args.negative, args.words) == (3, 2, "-b_c", ["a"])


def test_options_that_messages_name_are_there():
    names = {name for program in ("txt2img", "img2img", "inpaint") for name in parser(program)._option_string_actions}
    training = train.parser()._option_string_actions
    assert {here.split()[0] for here in spellings.HERE.values()} <= {*names, *training}
    assert {here.split()[0] for here in spellings.SHORT.values()} <= names
    kinds = (SamplingParams, *REQUESTS.values())
    assert SETTINGS.keys() <= {f.name for kind in kinds for f in fields(kind)} | OPTIONS.keys()


def test_installed_commands_are_the_programs():
    from scripts import installed

    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for program in PROGRAMS:
        assert f'"sd-{program.replace("_", "-")} = sd.scripts.installed:{program}"' in text
        assert callable(getattr(installed, program))
    with pytest.raises(AttributeError):
        installed.nothing  # noqa: B018
    assert set(installed.PROGRAMS) == set(PROGRAMS) and isinstance(parser("convert"), argparse.ArgumentParser)

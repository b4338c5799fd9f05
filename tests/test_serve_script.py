"""The program that serves: where settings come from, what it says, and how it stops."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
from server_process import read, request, running

from scripts import serve
from scripts.common import serving
from scripts.common.server_options import read_settings
from sd.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {  # a value of each kind, as in an argument, in the environment and in a file
    "port": ("80", "80", 80, 80),
    "host": ("::1", "::1", "::1", "::1"),
    "api_key": ("12345678", "12345678", "12345678", "12345678"),
    "hosts": ("a, b", "a,b", ["a", "b"], ("a", "b")),
    "grace": ("0.5", "0.5", 0.5, 0.5),
    "low_memory": ("", "yes", True, True),
    "dtype": ("float16", "float16", "float16", "float16"),
}


@pytest.fixture(autouse=True)
def loggers():
    """The program sets them up for its process."""
    found = [logging.getLogger(name) for name in ("sd.server", "uvicorn", "asyncio")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in found]
    yield
    for logger, (handlers, propagate, level) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def settings(*argv, defaults=None, **environment):
    variables = {f"SD_SERVER_{name.upper()}": text for name, text in environment.items()}
    return read_settings(serve.parser().parse_words(argv), variables, defaults or {})


def test_nothing_given_is_the_default():
    assert settings() == ServerSettings()


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_source_gives_the_same_value(name, tmp_path):
    text, variable, value, expected = EXAMPLES[name]
    option = f"--{name.replace('_', '-')}"
    file = tmp_path / "a.json"
    file.write_text(json.dumps({name: value}))
    found = [
        settings(*([option, text] if text else [option])),
        settings(**{name: variable}),
        settings("--settings", str(file)),
    ]
    assert [getattr(each, name) for each in found] == [expected] * 3


def test_every_setting_is_an_option():
    args = serve.parser().parse_words([])
    assert {f.name for f in fields(ServerSettings)} <= set(vars(args))


def test_argument_before_environment_before_file_before_default(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"port": 1, "queue": 1, "together": 1, "insecure": true}')
    found = settings(
        *("--settings", str(file), "--port", "3", "--no-insecure"),
        port="2",
        queue="2",
        max_steps="",
        defaults={"queue": 9, "together": 9, "resident": 9},
    )
    assert (found.port, found.queue, found.together, found.resident) == (3, 2, 1, 9)
    assert settings(settings=str(file)).queue == 1
    assert not found.insecure and found.max_steps == ServerSettings.max_steps


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml_and_paths_that_start_at_the_file(tmp_path):
    (tmp_path / "a.toml").write_text('models = "here"\nmax-steps = 7\nlog_prompts = true\n')
    found = settings("--settings", str(tmp_path / "a.toml"))
    assert (found.models, found.max_steps, found.log_prompts) == (tmp_path / "here", 7, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prot": 1}', "'prot' is no setting of the server: did you mean port?"),
        ('{"port": "7860"}', "port must be a whole number, got '7860'"),
        ('{"port": 99999}', "port must be in [0, 65535]"),
        ('{"host": 5}', "expected a text, got int"),
        ('{"hosts": 5}', "hosts"),
        ('{"low_memory": "yes"}', "must be True or False"),
        ("[1]", "expected an object of settings"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_wrong_files_are_one_line_with_their_name(content, words, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(content)
    assert serve.main(["--settings", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ") and words in line


@pytest.mark.parametrize(
    ("argv", "variables", "words"),
    [
        (["--host", "0.0.0.0"], {}, "give a key with --api-key, or --insecure"),
        (["--api-key", "short"], {}, "at least 8 printable characters"),
        (["--api-key", " a long key"], {}, "no blanks around them"),
        (["--origins", "*"], {}, "--origins: origins must be like https://example.org, without a path or *, got '*'"),
        (["--origins", "https://a.org,b.org"], {}, "got 'b.org'"),
        (["--hosts", "http://box.lan"], {}, "--hosts: hosts must be names, such as box.example.org"),
        (["--port", "70000"], {}, "--port: port must be in [0, 65535], got 70000"),
        (["--dtype", "float8"], {}, "--dtype: unknown dtype 'float8', expected one of float32"),
        (["--models", "/nowhere"], {}, "models /nowhere: no such folder"),
        (["--device", "gpu"], {}, "device 'gpu' is not available here"),
        (["--settings", "/nowhere.json"], {}, "/nowhere.json: No such file or directory"),
        (["--host", "no.such.name.invalid", "--insecure"], {}, "not a name or address of this machine"),
        (["--host", "192.0.2.1", "--insecure"], {}, "host 192.0.2.1: not an address of this machine"),
        ([], {"SD_SERVER_PORT": "tcp://10.0.0.1:80"}, "SD_SERVER_PORT: expected a whole number"),
        ([], {"SD_SERVER_INSECURE": "maybe"}, "SD_SERVER_INSECURE: expected true or false"),
    ],
)
def test_wrong_values_are_one_line(argv, variables, words, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert serve.main([*argv] if "--port" in argv else [*argv, *([] if variables else ["--port", "0"])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("argv", ["--port x", "--queue 1.5", "--prot 1", "--grace", "--low-memory=1"])
def test_what_is_no_option_or_value_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.main(argv.split())
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_variables_that_are_no_settings_are_named(capsys):
    assert settings(prot="1", service_host="10.0.0.1") == ServerSettings()
    assert "SD_SERVER_PROT is no setting of the server: did you mean SD_SERVER_PORT?" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    missing = {"uvicorn", "python_multipart"}
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in missing else object())
    assert serve.main(["--port", "0"]) == 1
    line = 'error: the server needs uvicorn, python-multipart: pip install "sd-from-scratch[server]"\n'
    assert capsys.readouterr().err == line


def test_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"port {port} is taken" in line and "--port" in line


def test_all_addresses_of_a_name_have_the_same_port():
    opened = serving.listen("localhost", 0)
    assert len({each.getsockname()[1] for each in opened}) == 1
    assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):\d+", serving.address_of(opened[0]))
    for each in opened:
        each.close()


def test_model_that_cannot_be_loaded(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"no model")
    assert serve.main(["--ckpt", str(tmp_path / "a.safetensors"), "--port", "0"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("listening on http://127.0.0.1:")
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a.safetensors" in errors[0]


def generate(steps, **more):
    params = {"steps": steps, "sampler": "ddim", "seed": 1}
    return {"request": {"kind": "txt2img", "prompt": "a secret house", "params": params}, **more}


def test_serving_and_stopping_under_load():
    """Lines, log, metrics; then a signal while jobs run, wait, are streamed, and while a body is on its way."""
    variables = {"SD_SERVER_TOGETHER": "2", "SD_SERVER_MAX_BATCH": "3"}
    with running("--grace", "0.5", **variables) as server:
        assert re.fullmatch(r"the model pocket is loaded \(\d+\.\d s\)", server.wait_for("the model"))
        assert server.ask("GET", "/healthz").json == {"status": "ready"}
        assert server.ask("POST", "/api/generate", generate(2)).status == 200
        assert "at most 3" in server.ask("POST", "/api/generate", {"request": {"params": {"n": 4}}}).json["message"]
        assert server.metric('sd_jobs_ended_total{state="done"}') == 1 and server.metric("sd_images_total") == 1
        assert server.metric("sd_steps_total") == 2 and server.metric("sd_ready") == 1
        replies = {}

        def client(name, data):
            replies[name] = server.send(data)

        works = {number: request("POST", "/api/generate", generate(150)) for number in range(12)}
        works["stream"] = request("POST", "/api/generate", generate(150), accept="text/event-stream")
        threads = [threading.Thread(target=client, args=item) for item in works.items()]
        late, idle = server.connect(), server.connect()
        body = request("POST", "/api/generate", generate(2))
        late.sendall(body[:-10])
        idle.sendall(request("GET", "/healthz", connection="keep-alive"))
        assert read(idle).status == 200
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        while server.metric("sd_jobs_accepted_total") < 14 and time.monotonic() < until:
            time.sleep(0.02)
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        late.sendall(body[-10:])  # its job is refused
        refused = read(late)
        assert refused.status == 503 and "stopping" in refused.json["message"] and int(refused.headers["retry-after"])
        assert idle.recv(1) == b""  # closed
        for thread in threads:
            thread.join()
        assert server.end() == 0
    stream = replies.pop("stream")
    assert stream.status == 200 and (b"event: error" in stream.body or b"event: done" in stream.body)
    assert {reply.status for reply in replies.values()} <= {200, 503} and len(replies) == 12
    failed = [reply for reply in replies.values() if reply.status == 503]
    assert failed and all("send it again" in reply.json["message"] for reply in failed)
    lines = [json.loads(line) for line in server.logged]
    assert not any("secret" in line for line in server.logged)
    requests = [line for line in lines if line["event"] == "request" and line.get("jobs")]
    first = requests[0]
    assert {"method": "POST", "path": "/api/generate", "status": 200, "images": 1}.items() <= first.items()
    assert first["ms"] > 0 and first["client"] == "127.0.0.1" and first["time"].endswith("Z")
    jobs = {line["job"]: line for line in lines if line["event"] == "job"}
    assert jobs[first["jobs"][0]]["state"] == "done" and len(jobs) == 14
    with pytest.raises(OSError):
        server.connect()


@pytest.mark.exhaustive
def test_second_signal_ends_the_grace_and_ctrl_c_is_a_signal_too():
    with running("--grace", "600", "--log-prompts") as server:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.ask("POST", "/api/generate", generate(150))))
        thread.start()
        while server.metric('sd_jobs{state="running"}') < 1:
            time.sleep(0.02)
        server.popen.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.popen.poll() is None
        server.popen.send_signal(signal.SIGINT)
        thread.join()
        assert server.end() == 0 and replies[0].status in (200, 503)
    assert any('"prompt": "a secret house"' in line for line in server.logged)


def option_table():
    """The table that docs/server.md must hold."""
    rows = ["| option | meaning |", "| --- | --- |"]
    for action in serve.parser()._actions:
        if action.dest not in ("help", "settings", "no_cache"):
            option = action.option_strings[0] + (f" {action.metavar}" if action.metavar else "")
            rows.append(f"| `{option}` | {action.help} |")
    return "\n".join(rows)


def test_every_option_is_documented():
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert option_table() in page, f"put this into docs/server.md:\n{option_table()}"
    assert all(f"`{option}`" in page for option in ("--settings FILE", "--no-cache"))


def test_every_metric_is_documented():
    from sd.server.app import create_app

    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    app = create_app(ServerSettings(port=0))
    layer = app.user_middleware[0]
    names = {found.name for found in layer.kwargs["metrics"].registry.collect() if found.name.startswith("sd_")}
    assert names and all(f"`{name}" in page for name in names), names


def test_the_image_has_what_it_is_made_of():
    """Files that the Dockerfile copies are there and not ignored; its variables are settings."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    kept = re.findall(r"^!([^/\n]+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(copied) >= 9 and all((ROOT / name).exists() and name in kept for name in copied)
    variables = dict(re.findall(r"(SD_SERVER_\w+)=([^ \\\n]+)", text[text.index("ENV XDG") :]))
    with pytest.raises(ValueError, match="give a key with --api-key"):
        read_settings(serve.parser().parse_words([]), variables, {})
    found = read_settings(serve.parser().parse_words([]), {**variables, "SD_SERVER_API_KEY": "a long key"}, {})
    assert found.host == "0.0.0.0" and found.grace < 10 and found.models == Path("/models")

"""Hostile requests against the real server on a socket: each gets one clear error, and the server is as it was before.

What is refused by the HTTP parser (h11) is answered with 400 as text; everything else in the form of the protocol.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
from common import share_kernels
from hostile_requests import (
    ASKS,
    BEARER,
    BODIES,
    ELSEWHERE,
    FEW,
    FRIEND,
    KEY,
    MOST,
    OTHER,
    PATHS,
    SETTINGS,
    body,
    bomb_text,
    png,
)
from PIL import Image
from server_process import read, request, running

from sd import StableDiffusion
from sd.params import TextToImage

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def expected():
    """The image of a good request."""
    image = StableDiffusion.load().prepare(TextToImage.of("a house", **FEW)).result().images[0]
    share_kernels()
    return image.tobytes()


@pytest.fixture(scope="module")
def server(expected, tmp_path_factory):
    file = tmp_path_factory.mktemp("server") / "settings.json"
    file.write_text(json.dumps(SETTINGS))
    with running("--settings", str(file)) as found:
        yield found


def good(server):
    """A good request: whether its image is right."""
    reply = server.ask("POST", "/api/generate", body(), authorization=BEARER)
    assert reply.status == 200, reply
    return Image.open(io.BytesIO(base64.b64decode(reply.json["images"][0]))).convert("RGB").tobytes()


def at_rest(server, seconds=40):
    """Wait until no job is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = server.ask("GET", "/metrics", authorization=BEARER).body.decode()
        jobs = [float(value) for value in re.findall(r"^sd_jobs\{.*?\} (\S+)$", text, re.MULTILINE)]
        opened = float(re.search(r"^sd_requests_open (\S+)$", text, re.MULTILINE)[1])
        if jobs == [0, 0] and opened == 1:  # the one that asks
            return True
        time.sleep(0.05)
    return False


def check_form(path, reply):
    """An error is one line, in the form of the protocol of its path, and shows nothing of this machine."""
    if path.startswith("/page/") and "text/plain" in reply.headers["content-type"]:
        return
    found = reply.json
    if path.startswith("/sdapi"):
        message = found["detail"]
        assert set(found) >= {"error", "detail", "body", "errors"}
    elif path.startswith("/v1"):
        message = found["error"]["message"]
        assert set(found["error"]) >= {"message", "type", "param", "code"}
    elif path.startswith("/api"):
        message = found["message"]
        assert found["status"] == reply.status
    else:
        message = found["error"]["message"]
    assert isinstance(message, str) and message and "\n" not in message and len(message) <= 1000
    assert not any(word in reply.body.decode() for word in ("Traceback", str(ROOT), "site-packages"))


# ----------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("case", ASKS)
def test_who_may_ask(server, case):
    headers, status = ASKS[case]
    reply = server.ask("GET", "/api/jobs", **{"authorization": BEARER, **headers})
    assert reply.status == status
    assert ("access-control-allow-origin" in reply.headers) == (headers.get("origin") == FRIEND)
    if status != 200:
        check_form("/api", reply)
    if status == 401:
        assert reply.headers["www-authenticate"].startswith("Basic")
        by_script = server.ask("GET", "/api/jobs", **headers, sec_fetch_mode="cors")
        assert by_script.headers["www-authenticate"] == "Bearer"  # no dialog of the browser


def test_what_needs_no_key(server):
    assert server.ask("GET", "/healthz").status == 200
    assert server.ask("HEAD", "/healthz").body == b""
    assert server.ask("GET", "/healthz", host="evil.example").status == 421
    assert server.ask("GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status in (200, 404)
    assert server.ask("GET", "/page/nothing.js").status == server.ask("GET", "/docs/nothing.js").status == 404
    assert server.ask("GET", "/docs").status == 200  # asks for the key itself
    for path in ("/metrics", "/openapi.json", "/api/models", "/v1/models", "/sdapi/v1/options", "/none"):
        assert server.ask("GET", path).status == 401, path
    assert server.ask("POST", "/", {}).status == 401


def test_other_pages_get_answers_only_if_they_are_listed(server):
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, x-stainless-os"}
    answer = server.ask("OPTIONS", "/api/generate", origin=FRIEND, **asked)
    assert answer.status == 204 and answer.headers["access-control-allow-origin"] == FRIEND
    assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert answer.headers["vary"] == "Origin" and "POST" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in answer.headers
    refused = server.ask("OPTIONS", "/api/generate", origin="https://evil.example", **asked)
    assert refused.status == 403 and "access-control-allow-origin" not in refused.headers
    injected = server.ask("OPTIONS", "/", origin=FRIEND, **{**asked, "access_control_request_headers": "a, b\x01"})
    assert injected.status in (204, 400) and "\x01" not in injected.headers.get("access-control-allow-headers", "")


def test_every_answer_has_the_security_headers(server):
    for path in ("/healthz", "/api/jobs", "/none", "/"):
        headers = server.ask("GET", path, authorization=BEARER).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers


# ----------------------------------------------------------------------------- what they ask


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_refused(server, case):
    content = BODIES[case]
    reply = server.ask("POST", "/api/generate", content, authorization=BEARER)
    assert reply.status in (400, 413, 422), (reply, server.logged[-3:])
    check_form("/api", reply)


@pytest.mark.parametrize("case", ELSEWHERE)
def test_bodies_that_are_refused_by_other_routes(server, case):
    path, content, *headers = ELSEWHERE[case]
    reply = server.ask("POST", path, content, authorization=BEARER, **(headers[0] if headers else {}))
    assert 400 <= reply.status < 500, (reply, server.logged[-3:])
    check_form(path, reply)


def test_a_compressed_text_of_100_mb_is_not_read(server):
    image = base64.b64encode(png(64, 64, b"", bomb_text())).decode()
    reply = server.ask("POST", "/sdapi/v1/png-info", {"image": image}, authorization=BEARER)
    assert reply.status == 200 and reply.json["info"] == ""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths_lead_nowhere(server, path):
    for method in ("GET", "POST"):
        reply = server.ask(method, path, b"{}" if method == "POST" else None, authorization=BEARER)
        assert reply.status in (401, 404, 405, 422) and b"root:" not in reply.body and b"import" not in reply.body
        check_form(path, reply)


@pytest.mark.parametrize("case", OTHER)
def test_other_bytes(server, case):
    data, status = OTHER[case]
    reply = server.send(data)
    statuses = {status, 422, 404} if case.startswith("multipart") else {status}
    if case == "header of 1 MB":
        statuses.add(0)  # the client was still sending
    assert reply.status in statuses, reply
    if reply.status >= 400 and "json" in reply.headers.get("content-type", ""):
        check_form("/v1" if "multipart" in case else data.split(b" ")[1].decode(), reply)
    elif reply.status >= 400:
        assert b"Invalid HTTP request received." in reply.body


# ----------------------------------------------------------------------------- how they send it


def head(length=None):
    framing = {"transfer_encoding": "chunked"} if length is None else {"content_length": str(length)}
    return request("POST", "/api/generate", b"", **{"content_length": None, **framing}, authorization=BEARER)


def test_bodies_that_are_too_large(server):
    stated = server.send(head(MOST + 1) + bytes(MOST + 1))
    counted = server.send(head() + (b"10000\r\n" + bytes(65536) + b"\r\n") * 6)
    for reply in (stated, counted):
        assert reply.status == 413 and f"{MOST:,}" in reply.json["message"] and reply.headers["connection"] == "close"
        check_form("/api", reply)


@pytest.mark.parametrize("length", [100, None], ids=["length", "chunks"])
def test_bodies_that_are_slow(server, length):
    begun = time.monotonic()
    with server.connect() as connection:
        connection.sendall(head(length))
        for _ in range(100):
            with suppress(OSError):
                connection.sendall(b"a" if length else b"1\r\na\r\n")
            connection.settimeout(0.05)
            with suppress(TimeoutError):
                if connection.recv(1, 2):  # MSG_PEEK
                    break
        connection.settimeout(10)
        reply = read(connection)
    assert reply.status == 408 and "0.6 s" in reply.json["message"] and 0.5 < time.monotonic() - begun < 3
    check_form("/api", reply)


@pytest.mark.parametrize("first", [b"", b"G", request("GET", "/healthz", connection="keep-alive") + b"GET / HTTP/1"])
def test_headers_that_are_slow(server, first):
    begun = time.monotonic()
    with server.connect() as connection:
        connection.sendall(first)
        if len(first) > 1:
            assert read(connection).status == 200
            connection.sendall(b".1")
        connection.settimeout(0.1)
        while True:
            with suppress(TimeoutError, BrokenPipeError):
                connection.sendall(b"a" * bool(first))
                if not connection.recv(100):
                    break
            assert time.monotonic() - begun < 5


def test_bodies_that_end_early(server):
    for data in (head(100)[:40], head(100), head(100) + b'{"request":', head(), head() + b"5\r\nabc"):
        with server.connect() as connection:
            connection.sendall(data)
            connection.shutdown(1)  # SHUT_WR
    assert at_rest(server) and server.ask("GET", "/healthz").status == 200


def test_all_bodies_in_memory_are_bounded(server):
    """Sixteen clients send the largest body but for its end: the later ones are refused."""
    opened = [server.connect() for _ in range(16)]
    for connection in opened:
        connection.sendall(head(MOST) + bytes(MOST - 1))
    replies = [read(connection) for connection in opened]
    for connection in opened:
        connection.close()
    assert {reply.status for reply in replies} == {408, 503}
    assert all("retry-after" in reply.headers for reply in replies if reply.status == 503)
    assert at_rest(server)


@pytest.mark.exhaustive
def test_clients_that_do_not_read(server):
    """They are cut off; what was meant for them is not kept."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        asks = request("GET", "/openapi.json", connection="keep-alive", authorization=BEARER) * 200
        connection.settimeout(3)
        with suppress(OSError):
            connection.sendall(asks)
        time.sleep(3)
        assert at_rest(server)
        got = b""
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                got += part
    assert got.count(b"HTTP/1.1 200") < 150


@pytest.mark.sampled(3)
@pytest.mark.parametrize("events", [0, 1, 2, 3, 5])
def test_clients_that_leave_after_some_events(server, events):
    params = {"steps": 150, "sampler": "ddim"}
    data = {**body(params=params), "previews": 1}
    before = server.metric('sd_jobs_ended_total{state="cancelled"}', authorization=BEARER)
    with server.connect() as connection:
        connection.sendall(request("POST", "/api/generate", data, authorization=BEARER, accept="text/event-stream"))
        got = b""
        while got.count(b"event: ") < events:
            got += connection.recv(65536)
    if events == 0:
        time.sleep(0.1)
    assert at_rest(server)
    assert server.metric('sd_jobs_ended_total{state="cancelled"}', authorization=BEARER) - before in (
        (0, 1) if events == 0 else (1,)
    )


LONG = {"prompt": "a house", "steps": 150}
LEFT = {  # path, body, what has come when the client leaves
    "OpenAI's stream": ("/v1/images/generations", {**LONG, "stream": True, "partial_images": 2}, b"data: "),
    "OpenAI's answer": ("/v1/images/generations", LONG, b""),
    "the web UI's answer": ("/sdapi/v1/txt2img", {**LONG, "n_iter": 3}, b""),
}


@pytest.mark.parametrize("case", LEFT)
def test_clients_of_other_protocols_that_leave(server, case):
    path, content, first = LEFT[case]
    name = 'sd_jobs_ended_total{state="cancelled"}'
    before = server.metric(name, authorization=BEARER)
    with server.connect() as connection:
        connection.sendall(request("POST", path, content, authorization=BEARER))
        got = b""
        while first not in got:
            got += connection.recv(65536)
        until = time.monotonic() + 30
        while server.metric('sd_jobs{state="running"}', authorization=BEARER) < 1 and time.monotonic() < until:
            time.sleep(0.02)
    assert at_rest(server)
    assert server.metric(name, authorization=BEARER) - before == content.get("n_iter", 1)


@pytest.mark.exhaustive
def test_clients_that_leave_while_they_wait(server):
    data = request("POST", "/api/generate", body(params={"steps": 150}), authorization=BEARER)
    opened = [server.connect() for _ in range(10)]
    for connection in opened:
        connection.sendall(data)
    time.sleep(0.3)
    for connection in opened:
        connection.close()
    assert at_rest(server)


def test_clients_that_ask_for_too_much_at_once(server):
    data = request("POST", "/api/generate", body(params={"steps": 150}), authorization=BEARER)
    opened = [server.connect() for _ in range(30)]
    for connection in opened:
        connection.sendall(data)
        time.sleep(0.005)
    time.sleep(0.5)
    statuses = []
    for connection in opened:
        connection.settimeout(0.01)
        with suppress(TimeoutError):
            statuses.append(read(connection))
        connection.close()
    refused = [reply for reply in statuses if reply.status]
    assert refused and {reply.status for reply in refused} <= {429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert at_rest(server)


# ----------------------------------------------------------------------------- and afterwards


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")
def test_afterwards_the_server_is_as_before(server, expected):
    """After one round of everything that is large, another takes no more memory; no thread or job is left."""
    large = [BODIES[name] for name in BODIES if "image" in name or "MB" in name or "deep" in name or "long" in name]

    def everything():
        for content in large * 3:
            server.ask("POST", "/api/generate", content, authorization=BEARER)
        for _ in range(3):
            test_bodies_that_are_too_large(server)
            test_clients_that_leave_while_they_wait(server)
        assert good(server) == expected

    everything()
    threads, memory = server.threads, server.metric("process_resident_memory_bytes", authorization=BEARER)
    everything()
    assert at_rest(server)
    assert server.metric("process_resident_memory_bytes", authorization=BEARER) - memory < 40e6
    assert server.threads <= threads + 1
    assert server.popen.poll() is None and good(server) == expected
    lines = [json.loads(line) for line in server.logged]
    assert not [line for line in lines if line.get("status", 0) >= 500 and line["status"] != 503]
    assert not [line for line in lines if line["level"] == "error"]
    assert KEY not in " ".join(server.logged)

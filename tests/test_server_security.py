"""Hostile requests against the real server on a socket: each gets one clear error, and the server is as it was before.

What is refused by the HTTP parser (h11) is answered with 400 as text; everything else in the form of the protocol.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import socket
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from common import share_kernels
from PIL import Image
from server_process import read, request, running

from sd import StableDiffusion
from sd.params import TextToImage

ROOT = Path(__file__).resolve().parents[1]
KEY = "a long key, with ü"
BEARER = f"Bearer {KEY}".encode().decode("latin-1")  # the bytes of UTF-8
FRIEND = "https://friend.example"
MOST = 300_000  # bytes of a body
FEW = {"steps": 2, "sampler": "ddim", "seed": 4}
SETTINGS = {
    "api_key": KEY, "max_body": MOST, "body_seconds": 0.6, "origins": [FRIEND], "hosts": ["box.lan"], "queue": 12,
    "max_image_pixels": 1_000_000, "grace": 1,
}  # fmt: skip


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


def body(**more):
    return {"request": {"kind": "txt2img", "prompt": "a house", "params": FEW, **more}}


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

ASKS = {  # headers -> status of GET /api/jobs
    "right key": ({}, 200),
    "bearer in capitals": ({"authorization": BEARER.replace("Bearer", "BEARER")}, 200),
    "X-API-Key": ({"authorization": None, "x_api_key": BEARER[7:]}, 200),
    "basic": ({"authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}, 200),
    "no key": ({"authorization": None}, 401),
    "empty key": ({"authorization": "Bearer "}, 401),
    "wrong key": ({"authorization": "Bearer wrong"}, 401),
    "key and more": ({"authorization": BEARER + "x"}, 401),
    "part of the key": ({"authorization": BEARER[:-1]}, 401),
    "long key": ({"authorization": "Bearer " + "a" * 20_000}, 401),
    "other scheme": ({"authorization": "Digest " + BEARER[7:]}, 401),
    "not base64": ({"authorization": "Basic !!!"}, 401),
    "no colon": ({"authorization": "Basic " + base64.b64encode(KEY.encode()).decode()}, 401),
    "key as user": ({"authorization": "Basic " + base64.b64encode(f"{KEY}:x".encode()).decode()}, 401),
    "bytes as key": ({"authorization": "Bearer \xff\xfe\x80"}, 401),
    "address": ({"host": "127.0.0.1:7860"}, 200),
    "other address": ({"host": "10.1.2.3"}, 200),
    "IPv6": ({"host": "[::1]:7860"}, 200),
    "name of the settings": ({"host": "BOX.lan:80"}, 200),
    "rebinding": ({"host": "evil.example"}, 421),
    "rebinding with our port": ({"host": "evil.example:7860"}, 421),
    "address in a name": ({"host": "127.0.0.1.evil.example"}, 421),
    "name of ours in a name": ({"host": "localhost.evil.example"}, 421),
    "user in the host": ({"host": "localhost@evil.example"}, 421),
    "path in the host": ({"host": "localhost/evil"}, 421),
    "number as host": ({"host": "2130706433"}, 421),
    "empty host": ({"host": ""}, 421),
    "long host": ({"host": "a" * 5000}, 421),
    "host in other letters": ({"host": "l\xf6calhost"}, 421),
    "our own page": ({"origin": "http://localhost", "sec_fetch_site": "same-origin"}, 200),
    "our page behind TLS": ({"host": "box.lan", "origin": "https://box.lan"}, 200),
    "another page": ({"origin": "https://evil.example"}, 403),
    "a page at another port": ({"origin": "http://localhost:3000"}, 403),
    "a page without an origin": ({"origin": "null"}, 403),
    "a page as an image": ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
    "a page of the same site": ({"sec_fetch_site": "same-site"}, 403),
    "a link to the interface": ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
    "a friend": ({"origin": FRIEND, "sec_fetch_site": "cross-site"}, 200),
    "nearly a friend": ({"origin": FRIEND + ".evil.example"}, 403),
    "a friend over http": ({"origin": FRIEND.replace("https", "http")}, 403),
}


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


def png(width, height, data=b"", chunks=b""):
    """The bytes of a PNG file of any size, with any data."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb_text():
    content = b"parameters\0\1\0\0\0" + zlib.compress(bytes(100_000_000), 9)
    return struct.pack(">I", len(content)) + b"iTXt" + content + struct.pack(">I", zlib.crc32(b"iTXt" + content))


def img2img(data, **more):
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    return body(**{"kind": "img2img", "image": text, "strength": 0.5, **more})


def nested(depth):
    return b'{"request":' + b"[" * depth + b"]" * depth + b"}"


def with_params(**params):
    return body(params={**FEW, **params})


def raw(text):
    return text.encode() if isinstance(text, str) else text


TINY = b'{"request": {"kind": "txt2img", "prompt": "a", "params": {"steps": 1, "seed": %s}}}'
BODIES = {  # for POST /api/generate
    "no JSON": b"steps=1",
    "empty": b"",
    "a number": b"5",
    "null": b"null",
    "a list": b"[]",
    "half an object": b'{"request": {',
    "not UTF-8": b'{"request": {"prompt": "\xff\xfe"}}',
    "half a surrogate": b'{"request": {"kind": "txt2img", "prompt": "\\ud800", "params": {"steps": 1}, "x": 1}}',
    "NUL in a name": b'{"request": {"\\u0000": 1}}',
    "deep": nested(100_000),
    "deep in a text field": b'{"request": {"kind": "txt2img", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}}",
    "NaN": with_params(guidance=float("nan")),
    "infinity": with_params(guidance=float("inf")),
    "1e999": TINY.replace(b'"steps": 1', b'"steps": 1, "guidance": 1e999') % b"1",
    "seed of 5,000 digits": TINY % (b"9" * 5000),
    "seed of 400 digits": TINY % (b"9" * 400),
    "seed as a number with a point": TINY % b"1.5",
    "negative steps": with_params(steps=-1),
    "too many steps": with_params(steps=10**9),
    "no steps": with_params(steps=None, sampler="none"),
    "steps as text": with_params(steps="many"),
    "steps as an object": with_params(steps={"a": 1}),
    "too large": with_params(width=65536, height=65536),
    "no size": with_params(width=0),
    "not a multiple of 8": with_params(width=129),
    "too many images": with_params(n=1000),
    "a batch of none": with_params(n=0),
    "unknown setting": with_params(stepps=3),
    "unknown kind": body(kind="video"),
    "no kind": {"request": {"prompt": 1}},
    "long prompt": body(prompt="a " * 50_000),
    "many prompts": body(prompt=["a", "b"]),
    "path as model": {**body(), "model": "../../../../etc/passwd"},
    "path as LoRA": {**body(), "loras": [{"name": "/etc/passwd", "weight": 1}]},
    "path as VAE": {**body(), "vae": "file:///etc/passwd"},
    "path as control": body(controls=[{"name": "../weights/pocket", "image": "aaaa"}]),
    "NUL in the model": {**body(), "model": "pocket\0.safetensors"},
    "weight that is not finite": {**body(), "loras": [{"name": "pocket-lcm", "weight": float("inf")}]},
    "a thousand LoRAs": {**body(), "loras": [{"name": "pocket-lcm", "weight": 1}] * 1000},
    "previews below zero": {**body(), "previews": -5},
    "address as image": img2img("http://169.254.169.254/latest/meta-data"),
    "file as image": img2img("file:///etc/passwd"),
    "not base64": img2img("!!!!"),
    "no image": img2img(b"GIF89a, or not"),
    "image of 30,000 x 30,000 pixels": img2img(png(30_000, 30_000, zlib.compress(bytes(10_000_000), 9))),
    "image of 2^31 pixels a side": img2img(png(2**31 - 1, 2**31 - 1)),
    "image beyond the limit of the settings": img2img(png(2000, 2000)),
    "half an image": img2img(png(64, 64, zlib.compress(bytes(64 * 193))[:20])),
    "image without pixels": img2img(png(0, 64)),
    "compressed text of 100 MB": img2img(png(64, 64, b"", bomb_text())),
    "SVG": img2img(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "PDF": img2img(b"%PDF-1.4\n1 0 obj\n"),
    "EPS, which Pillow has Ghostscript read": img2img(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "BMP of a negative size": img2img(b"BM" + struct.pack("<IIIIiiHHIIiiII", 90, 0, 54, 40, -9, -9, 1, 24, *[0] * 6)),
    "strength above 1": img2img(png(8, 8), strength=5),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_refused(server, case):
    content = BODIES[case]
    reply = server.ask("POST", "/api/generate", content, authorization=BEARER)
    assert reply.status in (400, 413, 422), (reply, server.logged[-3:])
    check_form("/api", reply)


def text_of(data):
    return base64.b64encode(data).decode()


def form(boundary="x", **parts):
    """A multipart body and the header of its type: bytes are files."""
    data = b""
    for name, value in parts.items():
        file = b'; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else b""
        data += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode() + file + b"\r\n\r\n"
        data += raw(value) + b"\r\n"
    return data + f"--{boundary}--\r\n".encode(), {"content_type": f"multipart/form-data; boundary={boundary}"}


BOMB = png(30_000, 30_000, zlib.compress(bytes(10_000_000), 9))
ELSEWHERE = {  # path, body, headers: for the other protocols
    "sdapi: no JSON": ("/sdapi/v1/txt2img", b"{"),
    "sdapi: a list": ("/sdapi/v1/txt2img", []),
    "sdapi: steps as an object": ("/sdapi/v1/txt2img", {"steps": {}}),
    "sdapi: too many steps": ("/sdapi/v1/txt2img", {"steps": 10**9}),
    "sdapi: too many images": ("/sdapi/v1/txt2img", {"n_iter": 10**9, "batch_size": 2}),
    "sdapi: too large": ("/sdapi/v1/txt2img", {"width": 10**6, "height": 10**6}),
    "sdapi: NaN": ("/sdapi/v1/txt2img", {"cfg_scale": float("nan")}),
    "sdapi: huge seed": ("/sdapi/v1/txt2img", b'{"seed": ' + b"9" * 5000 + b"}"),
    "sdapi: path as model": (
        "/sdapi/v1/txt2img",
        {"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}},
    ),
    "sdapi: path as LoRA": ("/sdapi/v1/txt2img", {"prompt": "<lora:../../etc/passwd:1>"}),
    "sdapi: path as option": ("/sdapi/v1/options", {"sd_model_checkpoint": "/etc/passwd"}),
    "sdapi: bomb": ("/sdapi/v1/img2img", {"init_images": [text_of(BOMB)]}),
    "sdapi: bomb as mask": ("/sdapi/v1/img2img", {"init_images": [text_of(png(8, 8))], "mask": text_of(BOMB)}),
    "sdapi: no image": ("/sdapi/v1/img2img", {"init_images": []}),
    "sdapi: address": ("/sdapi/v1/img2img", {"init_images": ["http://169.254.169.254/"]}),
    "sdapi: enlarge too much": (
        "/sdapi/v1/extra-single-image",
        {"image": text_of(png(8, 8, zlib.compress(bytes(200)))), "upscaling_resize": 10**6, "upscaler_1": "Lanczos"},
    ),
    "sdapi: deep": ("/sdapi/v1/txt2img", nested(100_000)),
    "v1: no JSON": ("/v1/images/generations", b"{"),
    "v1: no prompt": ("/v1/images/generations", {}),
    "v1: prompt of another type": ("/v1/images/generations", {"prompt": ["a"]}),
    "v1: n": ("/v1/images/generations", {"prompt": "a", "n": 10**9}),
    "v1: size": ("/v1/images/generations", {"prompt": "a", "size": "999999x999999"}),
    "v1: size as text": ("/v1/images/generations", {"prompt": "a", "size": "٣x٣"}),
    "v1: path as model": ("/v1/images/generations", {"prompt": "a", "model": "../../etc/passwd"}),
    "v1: unknown": ("/v1/images/generations", {"prompt": "a", "stepps": 3}),
    "v1: huge seed": ("/v1/images/generations", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
    "v1: deep": ("/v1/images/generations", nested(100_000)),
    "v1: bomb": ("/v1/images/edits", *form(prompt="a", image=BOMB)),
    "v1: bomb as mask": ("/v1/images/edits", *form(prompt="a", image=png(8, 8), mask=BOMB)),
    "v1: text as image": ("/v1/images/edits", *form(prompt="a", image="/etc/passwd")),
    "v1: no image": ("/v1/images/variations", *form(n="1")),
    "api: recipe of a bomb": ("/api/recipe", BOMB),
    "api: recipe of text": ("/api/recipe", b"no image"),
    "api: model": ("/api/models/select", {"name": "../../etc/passwd"}),
    "api: long text": ("/api/tokens", {"text": "a" * 100_000}),
}


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


PATHS = [
    "/page/../../etc/passwd", "/page/..%2f..%2fetc/passwd", "/page/%2e%2e/%2e%2e/etc/passwd", "/page//etc/passwd",
    "/page/%00", "/page/..\\..\\setup.py", "/page/__init__.py", "/page/%c0%ae%c0%ae/etc/passwd", "/../etc/passwd",
    "//evil.example/", "/page/" + "a/" * 3000, "/%ff%fe", "/api/jobs/%2e%2e%2f/interrupt", "/api/none", "/v1/none",
    "/v1/models/..%2f..%2fetc%2fpasswd", "/sdapi/v1/none", "/sdapi/v1/../../etc/passwd", "/docs/../setup.py",
    "/;/?x=%00",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths_lead_nowhere(server, path):
    for method in ("GET", "POST"):
        reply = server.ask(method, path, b"{}" if method == "POST" else None, authorization=BEARER)
        assert reply.status in (401, 404, 405, 422) and b"root:" not in reply.body and b"import" not in reply.body
        check_form(path, reply)


OTHER = {  # bytes -> status; 0: closed without an answer
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "HTTP/1.0 without a Host": (b"GET /healthz HTTP/1.0\r\n\r\n", 421),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    "two lengths": (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
    "negative length": (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
    "length of 40 digits": (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 400),
    "no chunk": (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "other encoding": (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
    "header with a line break": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\n\rc: d\r\n\r\n", 400),
    "NUL in a header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
    "header of 1 MB": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n", 400),
    "TRACE": (request("TRACE", "/", b"abc"), 405),
    "CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "unknown method": (request("BREW", "/"), 405),
    "whole address": (request("GET", "http://evil.example/healthz", authorization=BEARER), 404),
    "WebSocket": (request("GET", "/api/jobs", connection="Upgrade", upgrade="websocket", authorization=BEARER), 200),
    "body too large by its length": (request("POST", "/api/generate", b"a" * 9, content_length="99999999"), 401),
    "type of the body": (request("POST", "/api/generate", b"<a/>", content_type="text/xml", authorization=BEARER), 422),
    "compressed body": (
        request("POST", "/api/generate", gzip.compress(b"{}"), content_encoding="gzip", authorization=BEARER),
        400,
    ),
    "multipart without an end": (
        request(
            *("POST", "/v1/images/edits", b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc'),
            content_type="multipart/form-data; boundary=x", authorization=BEARER,
        ),
        400,
    ),
    "multipart without a boundary": (
        request("POST", "/v1/images/edits", b"abc", content_type="multipart/form-data", authorization=BEARER),
        400,
    ),
    "multipart of a thousand parts": (
        request(
            *("POST", "/v1/images/edits", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 2000),
            content_type="multipart/form-data; boundary=x", authorization=BEARER,
        ),
        400,
    ),
}  # fmt: skip


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

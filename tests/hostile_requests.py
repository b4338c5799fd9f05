"""Hostile requests, and what the server answers: for test_server_security.py."""

from __future__ import annotations

import base64
import gzip
import struct
import zlib

from server_process import request

KEY = "a long key, with ü"
BEARER = f"Bearer {KEY}".encode().decode("latin-1")  # the bytes of UTF-8
FRIEND = "https://friend.example"
MOST = 300_000  # bytes of a body
FEW = {"steps": 2, "sampler": "ddim", "seed": 4}
SETTINGS = {
    "api_key": KEY, "max_body": MOST, "body_seconds": 0.6, "origins": [FRIEND], "hosts": ["box.lan"], "queue": 12,
    "max_image_pixels": 1_000_000, "grace": 1,
}  # fmt: skip


def body(**more):
    return {"request": {"kind": "txt2img", "prompt": "a house", "params": FEW, **more}}


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
    "no colon": ({"authorization": "Basic " + base64.b64encode(KEY.encode()).decode()}, 200),
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


PATHS = [
    "/page/../../etc/passwd", "/page/..%2f..%2fetc/passwd", "/page/%2e%2e/%2e%2e/etc/passwd", "/page//etc/passwd",
    "/page/%00", "/page/..\\..\\setup.py", "/page/__init__.py", "/page/%c0%ae%c0%ae/etc/passwd", "/../etc/passwd",
    "//evil.example/", "/page/" + "a/" * 3000, "/%ff%fe", "/api/jobs/%2e%2e%2f/interrupt", "/api/none", "/v1/none",
    "/v1/models/..%2f..%2fetc%2fpasswd", "/sdapi/v1/none", "/sdapi/v1/../../etc/passwd", "/docs/../setup.py",
    "/;/?x=%00",
]  # fmt: skip


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

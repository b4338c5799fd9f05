"""A running server and a page in a real browser, for the tests of the page.

    @pytest.mark.browser
    def test_x(page, server):        # page: playwright's Page, opened at server (its address); sync API
        page.click("#generate")

A test fails on any error in the console, uncaught error of the page, or request to another host. Tests are skipped,
with the reason, where playwright or Chromium is missing. While the browser of a module is open, its tests cannot use
asyncio.run: playwright's sync API has the loop of the thread.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str | None:
    """Why there is no browser for the tests; None if there is one."""
    try:
        import fastapi  # noqa: F401
        import playwright.sync_api  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        return f"needs {error.name}: pip install -r tests/requirements.txt"
    return None if executable() else "needs Chromium on the PATH"


def executable() -> str | None:
    """The path of Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def serving(settings):
    """Run a server with these settings in a thread; gives its address."""
    import uvicorn

    from sd.server.app import create_app

    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until_loaded(address, key=None):
    """Wait until the server has loaded its model: before, it answers some requests with 503."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    while True:
        try:
            request = urllib.request.Request(f"{address}/api/models", headers=headers)
            return urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError as error:
            assert error.code == 503, error
            time.sleep(0.1)


@pytest.fixture(scope="session")
def server():
    """The address of a server with the embedded model."""
    if reason := missing():
        pytest.skip(reason)
    from sd.server.settings import ServerSettings

    with serving(ServerSettings(port=0)) as address:
        wait_until_loaded(address)
        yield address


@pytest.fixture(scope="module")
def browser():
    """Chromium."""
    if reason := missing():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser, address, **options):
    """A page of its own storage at an address. Raises AssertionError at the end for what a page must not do.

    options   of playwright's new_context, such as viewport, color_scheme, has_touch
    """
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: message.type == "error" and wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    own = (address, "data:", "blob:", "about:")
    page.on("request", lambda request: request.url.startswith(own) or wrong.append(f"other host: {request.url}"))
    page.expected_errors = []  # parts of messages in the console that a test causes on purpose
    try:
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        yield page
    finally:
        context.close()
    unexpected = [text for text in wrong if not any(part in text for part in page.expected_errors)]
    assert not unexpected, "; ".join(unexpected)


@pytest.fixture
def page(browser, server):
    """The page at 1280x900, light, with an empty storage."""
    with opened(browser, server, viewport={"width": 1280, "height": 900}, color_scheme="light") as found:
        yield found


@pytest.fixture
def ready(page):
    """The page, once it knows what the server has."""
    page.wait_for_selector("body[data-models]")
    return page


@pytest.fixture(scope="session")
def few_steps():
    """The library's model as the page uses it first: with its few-step LoRA."""
    from sd import StableDiffusion
    from sd.resources import EMBEDDED_LORA, resource

    found = StableDiffusion.load()
    found.add_lora(resource(EMBEDDED_LORA), note=lambda text: None)
    return found

"""Options and shared fixtures. `pytest` runs the default suite; `pytest --full` the exhaustive and full-size tests too.

`pytest -n auto` runs it in a process for each core (pytest-xdist), with one thread of torch each.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter

import pytest
import torch
from common import TINY, TINY_INPAINT, tiny_state
from editor_common import edit_view, mount_editor  # noqa: F401 (fixtures)
from server_browser import browser, few_steps, missing, page, ready, server  # noqa: F401 (fixtures)

from sd.checkpoints.convert import convert
from sd.checkpoints.loading import load_weights
from sd.models.build import build
from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice
from sd.runtime.kernel_choice import prefer


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="also run the exhaustive tests (minutes) and the full-size ones (12 GB of memory, minutes)",
    )
    parser.addoption(
        "--kernels",
        metavar="NAME",
        help="use these kernels wherever they exist, instead of measuring (kernel_choice.py): plain, fast, packed, ...",
    )


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="sd-tests-cache-")  # programs keep weights there, not in the user's
    os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = folder.name
    config.add_cleanup(folder.cleanup)
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes that each use all cores wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start


@pytest.hookimpl(tryfirst=True)  # before those of -m are chosen
def pytest_collection_modifyitems(config, items):
    cases = Counter()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % sampled.args[0]:
                item.add_marker(pytest.mark.exhaustive)
            cases[name] += 1
    full = config.getoption("--full")
    skips = {
        "full": None if full else "full size: needs --full, 12 GB of memory and minutes",
        "exhaustive": None if full else "every combination: needs --full and minutes",
    }
    skips["gpu"] = None if torch.cuda.is_available() else "needs a CUDA device"
    skips["browser"] = missing() if any(item.get_closest_marker("browser") for item in items) else None
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_grad():
    """Networks are tested as they are used for painting; what needs gradients enables them."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="session")
def forced_kernels(request):
    """The kernels of --kernels; without it, they are measured, though briefly: here any of them may be chosen."""
    with prefer(request.config.getoption("--kernels")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "SECONDS", 0.001)
        yield


@pytest.fixture(scope="session")
def tiny() -> dict[str, torch.nn.Module]:
    """The three networks of tiny-v1 with the reference weights, through our converter."""
    return loaded(tiny_state(), TINY)


@pytest.fixture(scope="session")
def tiny_sd(tiny) -> StableDiffusion:
    """The tiny model as a whole; its pictures have factor 8, like the large one's."""
    return StableDiffusion(TINY, **tiny)


@pytest.fixture(scope="module")
def adaptable(tiny) -> StableDiffusion:
    """A tiny model for the adapters that the tests of a module add, and remove again."""
    return StableDiffusion(TINY, **{**tiny, **{name: copy.deepcopy(tiny[name]) for name in ("unet", "text_encoder")}})


@pytest.fixture(scope="session")
def tiny_inpaint() -> StableDiffusion:
    """The tiny inpainting model, whose U-Net takes 9 channels."""
    return StableDiffusion(TINY_INPAINT, **loaded(tiny_state("tiny-v1-inpainting"), TINY_INPAINT))


def loaded(state, config, dtype=torch.float32):
    """Networks of an original-layout state dict."""
    states, networks = convert(state, config), build(config)
    return {name: load_weights(net, states[name], torch.device("cpu"), dtype) for name, net in networks.items()}

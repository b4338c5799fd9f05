"""Options and shared fixtures. `pytest` runs the default suite; `pytest --full` the full-size networks as well."""

from __future__ import annotations

import pytest
import torch
from common import TINY, TINY_INPAINT, tiny_state

from sd.checkpoints.convert import convert
from sd.checkpoints.loading import build, load_weights
from sd.pipeline import StableDiffusion


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the full-size tests (12 GB of memory, minutes)")


def pytest_collection_modifyitems(config, items):
    skips = {"full": None if config.getoption("--full") else "full size: needs --full, 12 GB of memory and minutes"}
    skips["gpu"] = None if torch.cuda.is_available() else "needs a CUDA device"
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_grad():
    """Networks are tested as they are used for painting; what needs gradients enables them."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny() -> dict[str, torch.nn.Module]:
    """The three networks of tiny-v1 with the reference weights, through our converter."""
    return loaded(tiny_state(), TINY)


@pytest.fixture(scope="session")
def tiny_sd(tiny) -> StableDiffusion:
    """The tiny model as a whole; its pictures have factor 8, like the large one's."""
    return StableDiffusion(TINY, **tiny)


@pytest.fixture(scope="session")
def tiny_inpaint() -> StableDiffusion:
    """The tiny inpainting model, whose U-Net takes 9 channels."""
    return StableDiffusion(TINY_INPAINT, **loaded(tiny_state("tiny-v1-inpainting"), TINY_INPAINT))


def loaded(state, config, dtype=torch.float32):
    """Networks of an original-layout state dict."""
    states, networks = convert(state, config), build(config)
    return {name: load_weights(net, states[name], torch.device("cpu"), dtype) for name, net in networks.items()}

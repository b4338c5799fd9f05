"""--low-memory: one network at a time holds its weights, and the pictures are the same to the bit."""

from __future__ import annotations

import copy
import sys
import threading
from contextlib import suppress

import pytest
import torch
from common import TINY, TINY_INPAINT, tiny_state
from PIL import Image
from safetensors.torch import save_file
from test_lora import SCHEMES, lora_file, saved
from torch import nn

from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion
from sd.runtime import kernel_choice
from sd.runtime.offload import Offload, fingerprint
from sd.runtime.packing import PackedWeight, onednn_dtypes

SETTINGS = {"height": 64, "width": 64, "steps": 2, "seed": 3}
NAMES = ("text_encoder", "vae", "unet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of the tiny model and of the tiny inpainting model."""
    folder = tmp_path_factory.mktemp("turns")
    for name in ("tiny-v1", "tiny-v1-inpainting"):
        save_file(tiny_state(name), folder / f"{name}.safetensors")
    return folder


def both(path, config=TINY, dtype="float32"):
    """The model as ever, and with low memory."""
    return [
        StableDiffusion.load(path, config=config, device="cpu", dtype=dtype, low_memory=low) for low in (False, True)
    ]


def holders(sd) -> set[str]:
    """The networks that hold weights, without asking for any."""
    found = {name: {p.is_meta for p in sd._networks._networks[name].parameters()} for name in NAMES}
    assert all(len(kinds) == 1 for kinds in found.values()), "half of a network"
    return {name for name, kinds in found.items() if kinds == {False}}


def watched(sd) -> list[str]:
    """A list that fills with the network that holds weights whenever a layer is used, in the order of the turns."""
    turns = []

    def hook(*_):
        (name,) = holders(sd)
        if turns[-1:] != [name]:
            turns.append(name)

    for name in NAMES:
        for place, layer in sd._networks._networks[name].named_modules():
            if not place.endswith("up.conv"):  # an upsampling with a hook inside takes the plain kernel
                layer.register_forward_pre_hook(hook)
    return turns


def pictures(sd, task: str) -> list[bytes]:
    photo = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 40, 48))
    made = {
        "txt2img": lambda: sd.txt2img("a cat", "blue", n=2, **SETTINGS),
        "img2img": lambda: sd.img2img("a cat", photo, strength=0.7, **SETTINGS),
        "inpaint": lambda: sd.inpaint("a cat", photo, mask, strength=0.7, **SETTINGS),
    }[task]()
    return [image.tobytes() for image in made]


ORDER = {
    "txt2img": ["text_encoder", "unet", "vae"],
    "img2img": ["text_encoder", "vae", "unet", "vae"],
    "inpaint": ["text_encoder", "vae", "unet", "vae"],
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "task", ["inpaint", *(pytest.param(task, marks=pytest.mark.exhaustive) for task in ORDER if task != "inpaint")]
)
def test_the_same_pictures_by_turns(files, task, dtype):
    plain, low = both(files / "tiny-v1.safetensors", dtype=dtype)
    assert holders(low) == set() and (low.device, low.dtype) == (plain.device, plain.dtype)
    turns = watched(low)
    assert pictures(low, task) == pictures(plain, task)
    assert turns == ORDER[task]
    assert pictures(low, task) == pictures(plain, task)  # and from then on


@pytest.mark.exhaustive
def test_models_that_see_masks(files):
    plain, low = both(files / "tiny-v1-inpainting.safetensors", TINY_INPAINT)
    turns = watched(low)
    assert pictures(low, "inpaint") == pictures(plain, "inpaint")
    assert pictures(low, "txt2img") == pictures(plain, "txt2img")
    assert turns == 2 * ["text_encoder", "vae", "unet", "vae"]


def test_steps_may_be_looked_at(files):
    """The VAE's turn comes between two of the U-Net's steps."""
    plain, low = both(files / "tiny-v1.safetensors")
    turns = watched(low)

    def run(sd):
        seen = []

        def look(steps):
            for step in steps:
                seen.append(sd.decode(step.x0)[0].tobytes())
                yield step

        return [image.tobytes() for image in sd.txt2img("a", progress=look, **SETTINGS)] + seen

    assert run(low) == run(plain)
    assert turns == ["text_encoder", "unet", "vae", "unet", "vae"]


def test_networks_can_be_asked_for(files):
    plain, low = both(files / "tiny-v1.safetensors")
    for name in (*NAMES, *NAMES):
        network = getattr(low, name)
        assert holders(low) == {name} and network is low._networks._networks[name]
        expected = getattr(plain, name).state_dict()
        assert all(torch.equal(weight, expected[key]) for key, weight in network.state_dict().items())


def test_what_is_changed_stays(files, tmp_path):
    """LoRAs and words are not in the checkpoint."""
    plain, low = both(files / "tiny-v1.safetensors")
    assert not low.loras and not low.words and holders(low) == set()  # asking for them is no change
    lora = saved(tmp_path, lora_file(next(iter(SCHEMES)))[0])
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "word.safetensors")
    before = pictures(plain, "txt2img")
    for sd in (plain, low):
        sd.add_embedding(tmp_path / "word.safetensors", "cat")
    assert holders(low) == {"text_encoder"}
    words = pictures(plain, "txt2img")
    assert pictures(low, "txt2img") == words != before
    for sd in (plain, low):
        sd.add_lora(lora, 0.1)
    changed = pictures(plain, "txt2img")
    assert pictures(low, "txt2img") == changed != words
    assert holders(low) == set(NAMES)
    assert pictures(low, "img2img") == pictures(plain, "img2img")
    low.remove_lora()
    low.remove_embedding()
    assert pictures(low, "txt2img") == before


def test_a_file_that_is_no_addon_changes_nothing(files, tmp_path):
    _, low = both(files / "tiny-v1.safetensors")
    save_file({"x": torch.ones(3, 3, 3)}, tmp_path / "no.safetensors")
    for add in (low.add_lora, low.add_embedding):
        with pytest.raises(CheckpointError):
            add(tmp_path / "no.safetensors")
    assert holders(low) == set()


def test_a_copy_takes_turns_of_its_own(files):
    low = StableDiffusion.load(files / "tiny-v1.safetensors", config=TINY, device="cpu", low_memory=True)
    expected = pictures(low, "txt2img")
    other = copy.deepcopy(low)
    assert pictures(other, "img2img") == pictures(low, "img2img") and pictures(other, "txt2img") == expected
    assert holders(low) == holders(other) == {"vae"}


@pytest.fixture
def copied(files, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((files / "tiny-v1.safetensors").read_bytes())
    return path


def test_a_file_that_was_written_to_is_said(copied):
    low = StableDiffusion.load(copied, config=TINY, device="cpu", dtype="float32", low_memory=True)
    low.encode_prompt(["a"])
    with open(copied, "rb+") as stream:
        stream.truncate(copied.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"^{copied}: has changed since it was opened; load it again$"):
        pictures(low, "txt2img")
    assert holders(low) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_file_that_was_removed_or_replaced_is_still_read(copied, files):
    low = StableDiffusion.load(copied, config=TINY, device="cpu", dtype="float32", low_memory=True)
    expected = pictures(low, "txt2img")
    copied.unlink()
    copied.write_bytes((files / "tiny-v1-inpainting.safetensors").read_bytes())
    assert pictures(low, "txt2img") == expected


def test_weights_that_are_no_good_are_said_when_they_are_read(tmp_path):
    state = dict(tiny_state())
    key = "model.diffusion_model.time_embed.0.weight"
    save_file(state | {key: state[key] * 1e6}, tmp_path / "large.safetensors")
    low = StableDiffusion.load(
        tmp_path / "large.safetensors", config=TINY, device="cpu", dtype="float16", low_memory=True
    )
    with pytest.raises(CheckpointError, match=r"large\.safetensors: .* too large for float16"):
        _ = low.unet
    assert low.encode_prompt(["a"]).isfinite().all()


class Counted(Offload):
    """The CPU stands in for a GPU; copies are counted, in numbers."""

    there = back = 0

    def _to_device(self, tensor):
        self.there += tensor.numel()
        return tensor.clone()

    def _from_device(self, tensor):
        self.back += tensor.numel()
        return tensor.clone()


def test_on_a_gpu_only_what_was_changed_is_copied_back():
    networks = {name: torch.nn.Linear(3, 2).requires_grad_(False) for name in NAMES}
    weight = networks["unet"].weight.clone()
    offload = Counted(networks, torch.device("cpu"))
    assert list(offload) == list(NAMES) and len(offload) == 3 and offload.there == 0
    for name in ("text_encoder", "unet", "unet", "vae"):
        assert offload[name] is networks[name]
    assert (offload.there, offload.back) == (3 * 8, 0)
    changes = (lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: setattr(w, "data", 2 * w.data))
    for i, change in enumerate(changes, start=1):
        with torch.no_grad():
            change(offload["unet"].weight)
        _ = offload["vae"]
        assert offload.back == i * 6  # not the bias
        assert torch.equal(offload["unet"].weight, 2**i * weight)


def test_two_models_take_turns():
    """The network of one leaves when one of the other is asked for, with its changes; copies are apart again."""
    first, second = (
        Counted({name: torch.nn.Linear(3, 2).requires_grad_(False) for name in NAMES}, torch.device("cpu"))
        for _ in range(2)
    )
    first.take_turns_with(second)
    second.take_turns_with(first)  # already do
    weight = first["unet"].weight.clone()
    first["unet"].weight.mul_(2)
    assert (first._here, second._here, first.back) == ("unet", None, 0)
    assert second["vae"] is second._networks["vae"]
    assert (first._here, second._here, first.back) == (None, "vae", 6)
    assert torch.equal(first["unet"].weight, 2 * weight) and second._here is None
    assert first._lock is second._lock
    other = copy.deepcopy(first)
    assert other["vae"] is not None and first._here == "unet"


class Waiting:
    """A lock that one thread gets only after an event: as if another thread had been before it."""

    def __init__(self, name: str) -> None:
        self._lock, self._name = threading.RLock(), name
        self.waits, self.free = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread().name == self._name:
            self.waits.set()
            assert self.free.wait(10)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_a_thread_that_waits_while_two_models_are_joined():
    """It waits for the lock that both have then: the other model must not drop the weights it uses."""
    with torch.device("meta"):
        layers = [{"unet": nn.Linear(4, 4)} for _ in range(2)]
    read = lambda name, network: network.to_empty(device="cpu")  # noqa: E731
    one, other = (Offload(networks, torch.device("cpu"), read) for networks in layers)
    other._lock = lock = Waiting("user")
    inside, done, seen = threading.Event(), threading.Event(), []

    def use() -> None:
        with other.use("unet") as network:
            inside.set()
            done.wait(10)
            seen.append(network.weight.is_meta)

    def take() -> None:
        with one.use("unet"):
            seen.append("the turn of the other")

    user, taker = threading.Thread(target=use, name="user"), threading.Thread(target=take)
    user.start()
    assert lock.waits.wait(10)
    one.take_turns_with(other)
    lock.free.set()
    assert inside.wait(10)
    taker.start()
    taker.join(0.2)
    done.set()
    user.join(10)
    taker.join(10)
    assert seen == [False, "the turn of the other"]


@pytest.mark.parametrize("read", [True, False], ids=["read again", "moved"])
@pytest.mark.parametrize("when", range(4))
def test_a_move_that_is_interrupted_is_undone(read, when):
    """At each tensor, in both directions: the next request gives a whole network, with the same weights."""

    class Device(Offload):
        """Whose "device" is float64, so that it can be told from the CPU's memory."""

        left = when

        def _to_device(self, tensor):
            self.count()
            return tensor.double()

        def _from_device(self, tensor):
            self.count()
            return tensor.float()

        def count(self):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt

    device = torch.device("cpu")
    networks = {name: torch.nn.Linear(3, 3).requires_grad_(False) for name in ("unet", "vae")}
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    if read:

        def fill(name, network):
            for key in before[name]:
                offload.count()
                layer = torch.nn.Parameter(before[name][key].double(), requires_grad=False)
                network.register_parameter(key, layer)

        networks = {name: network.to("meta") for name, network in networks.items()}
        offload = Device(networks, device, fill)
    else:
        offload = Device(networks, device)
    for name in ("unet", "vae", "unet", "vae", "unet"):
        with suppress(KeyboardInterrupt):
            offload[name]
        for _ in range(2):
            state = offload[name].state_dict()
            assert all(
                state[key].dtype == torch.float64 and state[key].equal(x.double()) for key, x in before[name].items()
            )
        other = networks["vae" if name == "unet" else "unet"]
        assert all(x.is_meta if read else x.dtype == torch.float32 for x in other.parameters())
    assert offload.left < -1


def test_changes_of_order_are_seen():
    """A kernel that is mirrored in place keeps its sums by row."""
    kernel = torch.randn(4, 4, 3, 3)
    for dims in ((-1,), (-2,), (0,), (1,), (-1, -2)):
        assert not fingerprint(kernel).equal(fingerprint(kernel.flip(dims)))


@pytest.mark.skipif(not onednn_dtypes(), reason="no packed weights on this processor")
def test_weights_that_are_put_away_are_not_unpacked_first(files, monkeypatch):
    """Unpacking a U-Net of Stable Diffusion takes a third of a second, and the memory for it."""
    with kernel_choice.prefer("fast"):
        model = both(files / "tiny-v1.safetensors")[1]
        picture = model.txt2img("a house", **SETTINGS)[0]
        monkeypatch.setattr(PackedWeight, "restored", lambda packed: pytest.fail("unpacked"))
        assert model.txt2img("a house", **SETTINGS)[0] == picture


def test_a_network_in_use_is_not_moved_away():
    offload = Counted({name: torch.nn.Linear(1, 1) for name in NAMES}, torch.device("cpu"))
    other = threading.Thread(target=lambda: offload["vae"])
    with offload.use("unet"), offload.use("unet"):
        other.start()
        other.join(0.2)
        assert other.is_alive() and offload._here == "unet"
    other.join(5)
    assert offload._here == "vae"

"""The cache of weights: the same images to the bit, and never the weights of anything else."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY, tiny_state
from safetensors.torch import save_file
from test_changed_weights import WAYS, layers, network

from scripts import txt2img
from scripts.common.user_cache import user_cache
from sd.checkpoints import weights_cache, weights_file
from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion
from sd.runtime import cpu_kernels, kernel_choice, packed_memory, packing

pytestmark = pytest.mark.skipif(not packed_memory.available(), reason="needs an x86 CPU and a torch that has oneDNN")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists what is mapped into memory")
posix = pytest.mark.skipif(os.name != "posix", reason="elsewhere, weights are read instead of mapped")

SETTINGS = {"height": 64, "width": 64, "steps": 1, "seed": 3}
DTYPES = [dtype for dtype in ("float32", "bfloat16") if getattr(torch, dtype) in packing.onednn_dtypes()]
# in the other precisions, only the layouts of packed weights differ
EACH = [pytest.param(name, marks=pytest.mark.exhaustive if name != DTYPES[0] else ()) for name in DTYPES]


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    monkeypatch.setattr(weights_cache, "SMALLEST", 0)
    monkeypatch.setattr(weights_cache, "FREE", 0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # waiting for a disk is all it would do here
    with kernel_choice.prefer("fast"):
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file({key: tensor.half() for key, tensor in tiny_state().items()}, path)
    return path


@pytest.fixture
def file(original, tmp_path) -> Path:
    """A model's file that a test may change."""
    return Path(shutil.copy(original, tmp_path / "tiny.safetensors"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def load(file: Path, folder: Path | None, dtype: str = "float32", **options) -> StableDiffusion:
    return StableDiffusion.load(file, config=TINY, device="cpu", dtype=dtype, cache=folder, **options)


def image(model: StableDiffusion) -> bytes:
    return np.asarray(model.txt2img("a cat", **SETTINGS)[0]).tobytes()


def kept(file: Path, folder: Path, dtype: str = "float32") -> Path:
    """Write a model's weights to the folder; returns their file."""
    model = load(file, folder, dtype)
    image(model)
    assert not model._cache.used and model.save_cache() == model.cache_file.stat().st_size
    return model.cache_file


@pytest.fixture(scope="module")
def made(original, tmp_path_factory) -> dict[str, tuple[bytes, str, bytes]]:
    """By precision: the bytes of a cache file of `original`, its name, and the image of the model without a cache."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, kernel_choice.prefer("fast"), torch.no_grad():
        patch.setattr(weights_cache, "SMALLEST", 0)
        patch.setattr(weights_cache, "FREE", 0)
        for dtype in DTYPES:
            path = kept(original, tmp_path_factory.mktemp("kept"), dtype)
            found[dtype] = path.read_bytes(), path.name, image(load(original, None, dtype))
    return found


@pytest.fixture
def filled(made, folder):
    """Fills the folder with the file of `original` in a precision; returns its path."""

    def fill(dtype: str = "float32") -> Path:
        folder.mkdir()
        raw, name, _ = made[dtype]
        (folder / name).write_bytes(raw)
        return folder / name

    return fill


def is_used(model: StableDiffusion) -> bool:
    return model._cache is not None and model._cache.used


def no_packing(monkeypatch) -> None:
    """From now on packing a weight is an error."""

    def pack(*args):
        raise AssertionError("a weight is packed")

    for name in ("pack_linear", "pack_kernel"):
        monkeypatch.setattr(cpu_kernels, name, pack)


def packed_layers(model: StableDiffusion) -> list[torch.nn.Module]:
    nets = model.text_encoder, model.vae, model.unet
    return [layer for net in nets for layer in net.modules() if "_packed" in layer.__dict__]


# ------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_are_equal_to_the_bit_and_nothing_is_packed_again(dtype, file, folder, monkeypatch):
    expected = image(load(file, None, dtype))
    first = load(file, folder, dtype)
    assert image(first) == expected and first.save_cache() > 0 and first.save_cache() == 0
    assert image(first) == expected
    again = load(file, folder, dtype)
    no_packing(monkeypatch)
    monkeypatch.setattr(kernel_choice, "prefer", None)
    assert is_used(again) and image(again) == expected and again.save_cache() == 0
    for name in ("text_encoder", "vae", "unet"):  # the choice of kernels too, layer by layer
        ours, theirs = ([type(m) for m in getattr(model, name).modules()] for model in (again, first))
        assert ours == theirs
    assert not any(p.requires_grad for p in again.unet.parameters()) and not again.unet.training


@pytest.mark.parametrize("dtype", EACH)
def test_the_weights_are_the_files(dtype, original, folder, filled):
    filled(dtype)
    plain, cached = load(original, None, dtype), load(original, folder, dtype)
    assert is_used(cached)
    for name in ("text_encoder", "vae", "unet"):
        expected, found = (getattr(model, name).state_dict() for model in (plain, cached))
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert (
                found[key].equal(tensor) and found[key].stride() == tensor.stride() and found[key].dtype == named(dtype)
            )


def named(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)


def test_it_can_be_written_before_the_first_image(original, folder, made):
    model = load(original, folder)
    assert model.save_cache() > 0
    assert is_used(again := load(original, folder)) and image(again) == made["float32"][2]


def test_no_weight_is_held_twice(original, folder, filled):
    filled()
    model = load(original, folder)
    assert len(packed_layers(model)) > 100
    for layer in packed_layers(model):
        packed = layer.__dict__["_packed"]
        assert layer.__dict__["_parameters"]["weight"] is None and packed.memory is not None
        assert (packed.plain is None) != isinstance(layer, cpu_kernels.UpsampleConv2d)


def test_what_does_not_fit_the_packed_weights_is_packed_again(original, folder, filled):
    filled()
    other = SETTINGS | {"height": 128}
    found, expected = (model.txt2img("a", **other)[0] for model in (load(original, folder), load(original, None)))
    assert found.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------- weights that are changed


def rehomed(net: torch.nn.Module) -> None:
    """Put each packed weight on memory that it does not own, as one of a file is."""
    for layer in layers(net):
        packed = layer.__dict__["_packed"]
        data = packed_memory.numbers(packed.weight).clone()
        shape, dtype = packed.weight.shape, packed.weight.dtype
        made = packed_memory.on_memory(data, packed_memory.layout(packed.weight), shape, dtype)
        layer.adopt(packed._replace(weight=made, memory=data))


# all of them for packed weights in general are in test_changed_weights.py
OFTEN = "mul_", "zero_", "copy_", "state_dict", "load_state_dict", "optimizer", "there and back", "another layer"


@pytest.mark.parametrize(
    "way", [way if way in OFTEN else pytest.param(way, marks=pytest.mark.exhaustive) for way in WAYS]
)
@pytest.mark.parametrize("dtype", EACH)
def test_all_changes_of_weights_take_effect(way, dtype):
    x = torch.linspace(-1, 1, 4 * 8 * 16, dtype=named(dtype)).view(1, 4, 8, 16)
    usual, used = network(named(dtype)), network(named(dtype))
    assert used(x).equal(usual(x))
    rehomed(used)
    assert used(x).equal(usual(x))
    for net in (usual, used):
        WAYS[way](net)
    assert used(x).equal(usual(x))


@posix
def test_a_change_does_not_reach_the_file(original, folder, filled):
    path = filled()
    before = path.read_bytes()
    model = load(original, folder)
    image(model)
    for net in (model.text_encoder, model.vae, model.unet):
        for parameter in net.parameters():
            parameter.mul_(0.5)
    image(model)
    assert path.read_bytes() == before and is_used(load(original, folder))


def lora(tmp_path: Path) -> Path:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2) / 9}
    tensors |= {f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize("dtype", EACH)
def test_a_lora_on_a_cached_model(dtype, original, folder, filled, tmp_path):
    filled(dtype)
    plain, cached = load(original, None, dtype), load(original, folder, dtype)
    without = image(plain)
    assert image(cached) == without
    for model in (plain, cached):
        model.add_lora(lora(tmp_path), 0.7)
    assert image(cached) == image(plain) != without
    cached.remove_lora()
    assert image(cached) == without


def test_what_is_written_has_no_lora_and_no_change(original, folder, made, tmp_path):
    expected, model = made["float32"][2], load(original, folder)
    model.add_lora(lora(tmp_path), 0.7)
    model.vae.decoder.conv_out.weight.mul_(0.5)
    model.text_encoder.norm.weight.mul_(0.5)
    changed = image(model)
    assert changed != expected and model.save_cache() > 0 and image(model) == changed
    again = load(original, folder)
    assert is_used(again) and image(again) == expected


def test_what_is_written_has_no_added_words(original, folder, made, tmp_path):
    expected, model = made["float32"][2], load(original, folder)
    save_file({"<cat>": torch.ones(1, 64)}, tmp_path / "cat.safetensors")
    model.add_embedding(tmp_path / "cat.safetensors")
    assert model.save_cache() > 0 and image(load(original, folder)) == expected


@pytest.mark.parametrize("change", ["another network", "other layers"])
def test_a_network_that_was_replaced_is_not_written(change, original, folder, made):
    expected, model = made["float32"][2], load(original, folder)
    if change == "another network":
        model.unet = torch.nn.Identity()
    else:
        model.unet.conv_in = torch.nn.Conv2d(4, 64, 1)
        model.unet.conv_out.padding_mode = "circular"
        del model.vae.encoder
    assert model.save_cache() > 0 and is_used(again := load(original, folder)) and image(again) == expected


# ------------------------------------------------------------------------------------- what a file is for


def rewritten(file: Path, all_numbers: bool) -> None:
    """Change one number or all of the file, with the size and the time of last change as before."""
    raw, status = np.fromfile(file, np.uint8), file.stat()
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    raw[start if all_numbers else len(raw) // 2 :][: None if all_numbers else 1] ^= 1
    file.write_bytes(raw.tobytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("time_of_inode", [pytest.param(True, marks=posix), False])
@pytest.mark.sampled(2)
def test_another_file_of_the_same_size_and_time(time_of_inode, file, folder, monkeypatch):
    """One changed number is known by the time of the inode; where there is none, new weights by their samples."""
    if not time_of_inode:
        monkeypatch.setattr(weights_cache, "INODE_TIMES", False)
    kept(file, folder)
    assert is_used(load(file, folder))
    rewritten(file, all_numbers=not time_of_inode)
    changed = load(file, folder)
    assert not is_used(changed) and image(changed) == image(load(file, None))


def test_a_file_that_changes_before_the_weights_are_written(file, folder):
    model = load(file, folder)
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))
    with pytest.warns(UserWarning, match="tiny.safetensors: has changed since it was loaded; load it again$"):
        assert model.save_cache() == 0
    assert not list(folder.iterdir())


OTHERS = {
    "precision": {"dtype": DTYPES[-1]},
    "prediction": {"prediction": "v"},
    "vae": {"vae": True},
    "threads": {"threads": 7},
    "processor": {"machine": ("processor", lambda: "another")},
    "torch": {"machine": ("torch.__version__", "2.99.0")},
    "sd": {"machine": ("__version__", "99.0")},
    "kernels": {"kernels": "plain"},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.sampled(2)
def test_what_was_made_for_something_else_is_not_used(what, original, folder, filled, monkeypatch):
    filled()
    options = dict(OTHERS[what])
    machine = weights_cache.machine()
    if "machine" in options:
        with monkeypatch.context() as other:
            name, value = options["machine"]
            other.setattr(f"sd.runtime.kernel_choice.{name}", value)
            options["machine"] = kernel_choice.machine()
        assert options["machine"] != machine["machine"]
    if options.keys() & machine.keys():
        changed, options = machine | options, {}
        monkeypatch.setattr(weights_cache, "machine", lambda: changed)
    if what == "vae":
        options = {"vae": original}
    if what != "precision" or len(DTYPES) > 1:
        assert not is_used(load(original, folder, **options))
    monkeypatch.setattr(weights_cache, "machine", lambda: machine)
    assert is_used(load(original, folder))


def test_kernels_that_were_asked_for_are_used(original, folder, filled):
    filled()
    with kernel_choice.prefer("plain"):
        model = load(original, folder)
        assert not is_used(model) and not any(isinstance(layer, packing.PackedLayer) for layer in model.unet.modules())


def test_where_it_has_no_effect(original, folder, monkeypatch):
    for options, reason in (
        ({"dtype": "float16"}, "weights in float16 are not packed"),
        ({"low_memory": True}, "with low memory, networks are read from the model's own files"),
    ):
        model = load(original, folder, **options)
        assert model.about[-1] == f"the cache folder has no effect: {reason}"
        assert model.save_cache() == 0 and model.cache_file is None
    monkeypatch.setattr(weights_cache, "SMALLEST", 200_000_000)
    model = load(original, folder)
    assert "cache" not in str(model.about) and model.save_cache() == 0 and load(original, None).save_cache() == 0
    assert not folder.exists()


# ------------------------------------------------------------------------------------- damaged files


def with_header(raw: bytes, change) -> bytes:
    """The file with a changed header, and its checksum right."""
    start = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[start:])
    header = change(header) or header
    written = json.dumps(header).encode()
    return raw[:16] + hashlib.sha256(written).digest() + raw[48:start] + written


def flipped(at: int):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :] if at >= 0 else flipped(len(raw) + at)(raw)


def entry(**values):
    """Change what the header says of the last tensor; a function gets the old value."""

    def change(header):
        place = list(header["tensors"].values())[-1]["place"]
        place |= {name: value(place[name]) if callable(value) else value for name, value in values.items()}

    return lambda raw: with_header(raw, change)


def first_packed(**values):
    def change(header):
        next(e for e in header["tensors"].values() if e["packed_for"])["place"].update(values)

    return lambda raw: with_header(raw, change)


DAMAGE = {
    "magic": flipped(2),
    "version": lambda raw: b"sdlaid00" + raw[8:],
    "place of the header": flipped(9),
    "place of the header, far": flipped(14),
    "checksum": flipped(20),
    "header": flipped(-200),
    "end of the header": flipped(-1),
    "valid header, old checksum": lambda raw: raw.replace(b'{"a": 1}', b'{"a": 2}'),
    "empty": lambda raw: b"",
    "a few bytes": lambda raw: raw[:30],
    "truncated": lambda raw: raw[: len(raw) // 2],
    "one byte less": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b" ",
    "zeros": lambda raw: bytes(len(raw)),
    "a model": lambda raw: b"\x10" + bytes(7) + b'{"a": {}}       ',
    "out of range": entry(start=lambda start: start + 64),
    "far out of range": entry(start=2**50),
    "negative": entry(start=-64),
    "unaligned": entry(start=lambda start: start - 4),
    "overlap": entry(start=64),
    "over the first bytes": entry(start=0),
    "too large": entry(nbytes=2**40),
    "nothing": entry(nbytes=0),
    "another shape": entry(shape=[1]),
    "another type": entry(dtype="float16"),
    "no type": entry(dtype="int7"),
    "strides": entry(stride=[2**40]),
    "no number": entry(nbytes="many"),
    "true": entry(nbytes=True),
    "base64": first_packed(layout="%"),
    "no layout": first_packed(layout=""),
    "a short layout": first_packed(layout="AAAA"),
    "packed shape": first_packed(shape=[3, 3]),
    "no tensors": lambda raw: with_header(raw, lambda header: header.pop("tensors") and None),
    "no object": lambda raw: with_header(raw, lambda header: [1]),
}  # fmt: skip


@pytest.fixture
def small_file(tmp_path) -> Path:
    """Weights of each kind: packed, packed with the plain one kept, plain in pages of the file, plain and small."""
    linear, up = cpu_kernels.Linear(32, 48), torch.nn.Conv2d(16, 16, 3, padding=1)
    up.__class__ = cpu_kernels.UpsampleConv2d
    weights = {
        "linear": linear.pack(torch.ones(48, 32), packing.ANY_SIZE),
        "up": up.pack(torch.ones(16, 16, 3, 3).to(memory_format=torch.channels_last), (2, 8, 8)),
        "large": torch.arange(300 * 200.0).view(300, 200),
        "small": torch.arange(5.0),
    }
    weights_file.write(tmp_path / "a.weights", {"a": 1}, {"net": {"": "Linear"}}, weights.items())
    return tmp_path / "a.weights"


def taken(path: Path) -> dict[str, torch.Tensor]:
    """All that can be taken from a file, plain."""
    with weights_file.WeightsFile(path) as file:
        weights = {name: file.tensor(name) for name in file.entries}
        return {name: w if isinstance(w, torch.Tensor) else w.restored() for name, w in weights.items()}


def test_what_is_written_is_read(small_file):
    found = taken(small_file)
    assert found["linear"].equal(torch.ones(48, 32)) and found["up"].equal(torch.ones(16, 16, 3, 3))
    assert found["large"].equal(torch.arange(300 * 200.0).view(300, 200)) and found["small"].equal(torch.arange(5.0))
    assert found["up"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage, small_file):
    small_file.write_bytes(DAMAGE[damage](small_file.read_bytes()))
    with pytest.raises(weights_file.BadFile):
        taken(small_file)


CLASSES: dict[str, Callable[[dict], object]] = {
    "another layer": lambda classes: classes["vae"].update({"decoder.conv_in": "Attention"}),
    "a layer less": lambda classes: classes["unet"].clear(),
    "unknown layer": lambda classes: classes["unet"].update({"conv_in": "Magic"}),
    "no network": lambda classes: classes.pop("unet"),
    "no classes": lambda classes: classes.update(unet=None),
}
MODEL_DAMAGE = {
    name: lambda header, change=change: change(header["classes"]) and None for name, change in CLASSES.items()
}
MODEL_DAMAGE |= {
    "other facts": lambda header: header["facts"].update(torch="1.0"),
    "a tensor less": lambda header: header["tensors"].popitem() and None,
    "truncated": None,
}


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
@pytest.mark.sampled(3)
def test_a_damaged_file_is_as_none(damage, original, folder, filled):
    path = filled()
    raw, change = path.read_bytes(), MODEL_DAMAGE[damage]
    path.write_bytes(with_header(raw, change) if change else raw[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(original, folder)
    assert not is_used(model) and model.unet.conv_in.weight.isfinite().all()
    assert type(model.unet.conv_in) is cpu_kernels.Conv2d  # as `optimize` makes it


def test_a_damaged_file_is_replaced(original, folder, filled, made):
    path, expected = filled(), made["float32"][2]
    path.write_bytes(path.read_bytes()[:-5])
    model = load(original, folder)
    assert image(model) == expected and model.save_cache() > 0
    assert is_used(again := load(original, folder)) and image(again) == expected


@posix
def test_a_pipe_is_as_none(original, folder, filled, made):
    """It would wait for its writer forever."""
    path, expected = filled(), made["float32"][2]
    path.unlink()
    os.mkfifo(path)
    model = load(original, folder)
    assert not is_used(model) and image(model) == expected and model.save_cache() > 0
    assert path.is_file() and is_used(load(original, folder))


def test_a_folder_in_its_place_is_said_before_anything_is_written(original, folder, filled, monkeypatch):
    path = filled()
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(weights_cache, "write", lambda *args: pytest.fail("written"))
    with pytest.warns(UserWarning, match=f"there is a folder of the name {path.name}: remove it"):
        assert load(original, folder).save_cache() == 0


def test_verify_finds_damaged_numbers(small_file):
    raw = small_file.read_bytes()
    assert weights_file.verify(small_file) == []
    header = json.loads(raw[int.from_bytes(raw[8:16], "little") :])
    for name, found in header["tensors"].items():
        for place in [found["place"], found["kept"]][: 2 if found["kept"] else 1]:
            small_file.write_bytes(flipped(place["start"] + place["nbytes"] - 1)(raw))
            assert weights_file.verify(small_file) == [name]


@posix
def test_the_file_of_another_user_is_not_read(original, folder, filled, monkeypatch):
    filled()
    monkeypatch.setattr(weights_file.os, "getuid", lambda: os.stat(folder).st_uid + 1)
    assert not is_used(load(original, folder))


# ------------------------------------------------------------------------------------- files and memory


@posix
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_goes_while_it_is_used(how, original, folder, filled, made):
    path = filled()
    model = load(original, folder)
    if how == "removed":
        path.unlink()
    else:
        (folder / "new").write_bytes(bytes(path.stat().st_size))
        os.replace(folder / "new", path)
    assert image(model) == made["float32"][2]


def mapped(path: Path) -> int:
    """Bytes of a file that are mapped into memory."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = line.split()[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


@linux
def test_memory_is_released_with_the_model(original, folder, filled):
    path = filled()
    raw = path.read_bytes()
    model = load(original, folder)
    assert 0 < mapped(path) < 1.01 * len(raw)  # once
    weight = next(layer for layer in packed_layers(model) if layer.__dict__["_packed"].memory.numel() > 2**17).weight
    plain = weight.clone()
    image(model)
    del model
    gc.collect()
    assert mapped(path) == 0
    assert weight.equal(plain)  # a weight that was restored has its own memory


def test_two_at_once(original, folder):
    models = [load(original, folder) for _ in range(2)]
    written: list[int] = []

    def save(model: StableDiffusion) -> None:
        with torch.no_grad():
            written.append(model.save_cache(note=lambda text: written.append(text)))

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = folder.iterdir()
    assert written == [path.stat().st_size] * 2 and weights_file.verify(path) == [] and is_used(load(original, folder))


def test_a_full_disk_leaves_nothing_behind(original, folder, monkeypatch):
    model = load(original, folder)
    expected, write, count = image(model), weights_file._write_bytes, [0]

    def full(*args):
        count[0] += 1
        if count[0] > 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(weights_file, "_write_bytes", full)
    with pytest.warns(
        UserWarning, match=f"^the weights are not kept in the cache folder {folder}: No space left on de"
    ):
        assert model.save_cache() == 0
    assert count[0] > 50 and not list(folder.iterdir()) and image(model) == expected
    monkeypatch.undo()
    monkeypatch.setattr(weights_cache, "SMALLEST", 0)
    disk = shutil.disk_usage(folder)
    for free, total in ((20e6, 1e9), (disk.total * 0.09, disk.total)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free, t=total: type(disk)(int(t), 0, int(f)))
        with pytest.warns(UserWarning, match="the disk would be too full with another 0.1 GB$"):
            assert model.save_cache() == 0
    assert not list(folder.iterdir())


def test_memory_that_is_full_leaves_nothing_behind(original, folder, monkeypatch):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more lines")

    model = load(original, folder)
    monkeypatch.setattr(weights_file, "_write_bytes", full)
    with pytest.warns(UserWarning, match="^the weights are not kept .*: DefaultCPUAllocator: can't allocate memory$"):
        assert model.save_cache() == 0
    assert not list(folder.iterdir())


@posix
def test_a_folder_that_cannot_be_written_to(original, tmp_path):
    (tmp_path / "a file").write_text("")
    model = load(original, tmp_path / "a file")
    with pytest.warns(UserWarning, match="^the weights are not kept in the cache folder .*a file: File exists$"):
        assert model.save_cache() == 0


def test_what_was_not_used_for_longest_is_removed(tmp_path):
    for name, size, age in (("a", 30, 4), ("b", 30, 3), ("c", 30, 2), ("d", 30, 1)):
        (tmp_path / f"{name}.weights").write_bytes(bytes(size))
        os.utime(tmp_path / f"{name}.weights", (10**9 - age, 10**9 - age))
    for name, age in ((".a.weights.01234567.part", 10**9), (".b.weights.01234567.part", None)):
        (tmp_path / name).write_bytes(bytes(10))  # of programs that were killed, or are writing
        os.utime(tmp_path / name, age and (age, age))
    (tmp_path / "another").write_bytes(bytes(999))

    def names() -> str:
        return " ".join(sorted(path.name.removesuffix(".weights") for path in tmp_path.iterdir()))

    with pytest.raises(OSError, match="more than the limit"):
        weights_cache.make_room(tmp_path / "e.weights", 101, 100)
    weights_cache.make_room(tmp_path / "d.weights", 40, 140)  # which it will replace
    assert names() == ".b.weights.01234567.part a another b c d"
    weights_cache.make_room(tmp_path / "d.weights", 40, 139)
    assert names() == ".b.weights.01234567.part another b c d"
    weights_cache.make_room(tmp_path / "e.weights", 100, 140)
    assert names() == ".b.weights.01234567.part another d"


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are those of POSIX")
def test_only_the_owner_may_read_a_file(original, folder):
    """As the model's own file may be private, and the folder an open one."""
    model = load(original, folder)
    assert model.save_cache() > 0 and model.cache_file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_used_is_the_newest(original, folder, filled):
    path = filled()
    os.utime(path, (1, 1))
    load(original, folder)
    assert path.stat().st_mtime > 10**9


# ------------------------------------------------------------------------------------- programs


def program(file: Path, out: Path, capsys, *options: str) -> tuple[str, bytes]:
    args = ["a cat", "--ckpt", str(file), "--height", "64", "--width", "64", "--steps", "1", "--seed", "3"]
    assert (
        txt2img.main([*args, "--model", "auto", "--device", "cpu", "--dtype", "float32", "--out", str(out), *options])
        == 0
    )
    return capsys.readouterr().err, sorted(out.iterdir())[-1].read_bytes()


@pytest.fixture
def ours(tiny, tmp_path) -> Path:
    """The tiny model in our layout, which carries its config."""
    from sd.checkpoints.detect import CONFIG_KEY
    from sd.checkpoints.export import to_own

    state = to_own({name: net.state_dict() for name, net in tiny.items()})
    save_file(
        {key: t.contiguous() for key, t in state.items()}, tmp_path / "m.safetensors", {CONFIG_KEY: TINY.to_json()}
    )
    return tmp_path / "m.safetensors"


def test_programs_use_the_users_cache(ours, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("scripts.common.user_cache.sys.platform", "linux")
    place = tmp_path / "home" / "sd-from-scratch"
    said, plain = program(ours, tmp_path / "out", capsys, "--no-cache")
    assert said == "" and not place.exists()
    said, first = program(ours, tmp_path / "out", capsys)
    (path,) = place.iterdir()
    assert said == (
        f"for a faster start the next time, 0.1 GB were written to {path}: remove it at any time; "
        "--no-cache turns this off\n"
    )
    if os.name == "posix":
        assert place.stat().st_mode & 0o777 == 0o700
    no_packing(monkeypatch)
    said, second = program(ours, tmp_path / "out", capsys)
    assert said == "" and first == plain == second


def test_a_program_without_a_place_for_the_cache(ours, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(ours))  # a file
    said, _ = program(ours, tmp_path / "out", capsys)
    assert said.count("\n") == 1 and said.startswith("warning: the weights are not kept in the cache folder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    said, _ = program(ours, tmp_path / "out", capsys)
    assert said == ""


def test_the_users_cache_folder(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", os.path.abspath("/home/me")))
    home = Path(os.path.abspath("/home/me"))
    place = Path(os.path.abspath("/home/me/elsewhere"))
    assert user_cache({"XDG_CACHE_HOME": str(place)}, "linux") == place / "sd-from-scratch"
    assert user_cache({"XDG_CACHE_HOME": "relative"}, "linux") == home / ".cache" / "sd-from-scratch"
    assert user_cache({}, "darwin") == home / "Library" / "Caches" / "sd-from-scratch"
    assert user_cache({"LOCALAPPDATA": str(place)}, "win32") == place / "sd-from-scratch"
    assert user_cache({}, "win32") == home / "AppData" / "Local" / "sd-from-scratch"


def test_a_file_that_changed_raises_when_it_is_written(file, folder):
    model = load(file, folder)
    rewritten(file, all_numbers=True)
    with pytest.raises(CheckpointError):
        model._cache.write(model._networks, 10**9)

"""Weights in pages of their own, and in the file's: nothing is copied, nobody else sees what is written."""

from __future__ import annotations

import mmap
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference_weights as reference
import torch
from common import TINY, tiny_state
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.formats import mmap as pages
from sd.pipeline import StableDiffusion

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says how much memory is used for what")


def resident(kind: str) -> int:
    """Bytes of the process in memory: "RssAnon" is its own, "RssFile" the pages of files."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A large one of each precision, a small one, a scalar and an empty one."""
    large = {
        str(dtype): reference.normal(str(dtype), (300, 200)).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    }
    return large | {"small": torch.arange(5.0), "one": torch.tensor(3.0), "none": torch.zeros(0, 4)}


@pytest.fixture
def file(tensors, tmp_path) -> Path:
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def misaligned(file: Path) -> Path:
    """The file with one more space behind its header, which the format allows: no number lies at its multiple."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    other = file.with_name("misaligned.safetensors")
    other.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    return other


@pytest.mark.parametrize("change", [lambda file: file, misaligned], ids=["aligned", "misaligned"])
def test_what_is_mapped_is_what_is_read(file, tensors, change):
    with load_checkpoint(change(file), mapped=True) as checkpoint:
        found = {key: checkpoint[key] for key in checkpoint}
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) and found[key].is_contiguous()


@pytest.mark.skipif(sys.platform == "win32", reason="files are read there")
def test_large_tensors_lie_in_the_file_and_only_they(file, monkeypatch):
    lent = []
    lend = pages.FilePages.lend
    monkeypatch.setattr(pages.FilePages, "lend", lambda *args: lent.append(lend(*args)) or lent[-1])
    with load_checkpoint(file, mapped=True) as checkpoint:
        tensor, small = checkpoint["torch.float32"], checkpoint["small"]
        assert lent[0].data_ptr() == tensor.data_ptr() and lent[1] is None
        del small
    with load_checkpoint(file) as checkpoint:
        assert checkpoint["torch.float32"].data_ptr() != tensor.data_ptr()
    assert len(lent) == 2


def test_what_is_written_is_the_owner_s_alone(file, tensors):
    raw = file.read_bytes()
    with load_checkpoint(file, mapped=True) as checkpoint:
        first = checkpoint["torch.bfloat16"]
        first.zero_()
        second = checkpoint["torch.bfloat16"]  # while the first is still there
        assert torch.equal(second, tensors["torch.bfloat16"]) and not first.any()
        second.fill_(1)
        assert not first.any()
        part = first[7]
        del first, second
        again = checkpoint["torch.bfloat16"]  # a part of the first is still there
        assert torch.equal(again, tensors["torch.bfloat16"]) and not part.any()
        del part, again
        assert torch.equal(checkpoint["torch.bfloat16"], tensors["torch.bfloat16"])
    assert file.read_bytes() == raw


def test_neighbours_keep_what_was_written_to_them(tmp_path):
    """Pages go back with a tensor, but not those that it shares with the next one."""
    many = {f"{i:02d}": torch.full((17_001,), float(i)) for i in range(20)}  # no multiple of any page
    save_file(many, tmp_path / "many.safetensors")
    with load_checkpoint(tmp_path / "many.safetensors", mapped=True) as checkpoint:
        found = {key: checkpoint[key].add_(100) for key in checkpoint}
        for i in range(0, 20, 2):
            del found[f"{i:02d}"]
        assert all(torch.equal(tensor, many[key] + 100) for key, tensor in found.items())
        assert all(torch.equal(checkpoint[key], many[key]) for key in many if key not in found)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_tensors_outlive_the_checkpoint_and_the_file(file, tensors):
    with load_checkpoint(file, mapped=True) as checkpoint:
        tensor = checkpoint["torch.float16"]
        file.rename(file.with_name("other"))
    file.with_name("other").unlink()
    assert torch.equal(tensor, tensors["torch.float16"])
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint["torch.float32"]


def test_a_file_that_became_shorter_is_said_not_touched(file):
    with load_checkpoint(file, mapped=True) as checkpoint:
        raw = file.read_bytes()
        with open(file, "rb+") as stream:
            stream.truncate(len(raw) - 100_000)
        with pytest.raises(CheckpointError, match="shorter since"):
            for key in checkpoint:
                checkpoint[key].sum()


def test_where_files_cannot_be_mapped_they_are_read(file, tensors, monkeypatch):
    def refused(*args, **options):
        raise OSError(19, "No such device")

    monkeypatch.setattr(pages.mmap, "mmap", refused)
    with open(file, "rb") as stream:
        assert pages.FilePages(stream).lend(0, 100_000, torch.uint8) is None
    with load_checkpoint(file, mapped=True) as checkpoint:
        assert all(torch.equal(checkpoint[key], tensor) for key, tensor in tensors.items())


def test_on_windows_files_are_read(file, tensors, monkeypatch):
    """There, a file that is mapped cannot be replaced."""
    monkeypatch.setattr(pages, "POSIX", False)
    monkeypatch.setattr(pages.mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
    with load_checkpoint(file, mapped=True) as checkpoint:
        assert all(torch.equal(checkpoint[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("page", [mmap.PAGESIZE, 2**18], ids=["pages", "large pages"])
def test_advice_that_is_not_wanted_is_not_given(file, tensors, monkeypatch, page):
    """Some file systems refuse it, and where pages are large, a tensor may have none of its own."""

    class Map(mmap.mmap):
        def madvise(self, advice, start, length):
            assert length > 0 and start + length <= len(self)
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages.mmap, "mmap", Map)
    monkeypatch.setattr(pages.mmap, "PAGESIZE", page)
    with load_checkpoint(file, mapped=True) as checkpoint:
        for _ in range(2):
            assert all(torch.equal(checkpoint[key], tensor) for key, tensor in tensors.items())


def test_threads_may_read_the_same(file, tensors):
    """What one writes is not seen by another, though both have the same place of the file."""
    with load_checkpoint(file, mapped=True) as checkpoint, ThreadPoolExecutor(4) as pool:
        keys = [key for key in tensors if "torch" in key] * 10
        found = list(pool.map(lambda key: checkpoint[key].mul_(2), keys))
        assert all(torch.equal(tensor, 2 * tensors[key]) for key, tensor in zip(keys, found, strict=True))


@linux
def test_memory_is_the_file_s_and_goes_back(tmp_path):
    size = 64 << 20
    save_file({"a": torch.ones(size // 4), "b": torch.ones(size // 4)}, tmp_path / "large.safetensors")
    own, of_files = resident("RssAnon"), resident("RssFile")
    with load_checkpoint(tmp_path / "large.safetensors", mapped=True) as checkpoint:
        a = checkpoint["a"]
        assert a.sum() == size // 4
        assert resident("RssFile") - of_files > 0.9 * size and resident("RssAnon") - own < 0.2 * size
        del a
        assert resident("RssFile") - of_files < 0.2 * size
        b = checkpoint["b"].add_(1)  # what is written is copied
        assert resident("RssAnon") - own > 0.9 * size
        del b
        assert resident("RssAnon") - own < 0.2 * size
    memory = pages.fresh(size // 2, torch.bfloat16).zero_()
    assert memory.dtype == torch.bfloat16 and resident("RssAnon") - own > 0.9 * size
    del memory
    assert resident("RssAnon") - own < 0.2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_model_are_the_file_s(tmp_path, dtype):
    """What is in its precision is taken as it is; the rest is converted, into pages too."""
    state = {key: tensor for key, tensor in tiny_state().items() if tensor.is_floating_point()}
    save_file(state, tmp_path / "tiny.safetensors")
    sd = StableDiffusion.load(tmp_path / "tiny.safetensors", config=TINY, device="cpu", dtype=dtype)
    name, ours = "model.diffusion_model.time_embed.2.weight", sd.unet.time[2].weight
    assert torch.equal(ours, state[name].to(dtype))
    raw = (tmp_path / "tiny.safetensors").read_bytes()
    ours.zero_()
    assert (tmp_path / "tiny.safetensors").read_bytes() == raw

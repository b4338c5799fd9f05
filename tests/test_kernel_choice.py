"""Which kernel is used: the fastest that is right, measured once, kept in a file. Times are given, not measured."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from common import TINY, Golden, error, tiny_state
from conftest import loaded

from sd.conditioning import Conditioning
from sd.runtime import blockwise_attention, cpu_kernels, kernel_choice, packing
from sd.runtime.kernel_choice import fastest
from sd.runtime.optimize import optimize

KERNELS = ("plain", "one", "another")
FORCED = ("plain", "fast", "packed", *blockwise_attention.KERNELS[torch.bfloat16])  # those of float32 are among them


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(kernel_choice, "_measured", {})
    with kernel_choice.prefer(None):
        yield


@pytest.fixture
def takes(monkeypatch):
    """Sets the seconds that a kernel takes, by its name; returns a list of the names that were timed."""
    timed = []

    def set_times(**seconds):
        def look_up(run, name, device):
            timed.append(name)
            return seconds.get(name.replace(" ", "_"), 1.0)

        monkeypatch.setattr(kernel_choice, "_seconds", look_up)
        return timed

    return set_times


def example(**wrong):
    """An example whose kernels return ones, or what is given; exceptions are raised."""

    def run(name):
        out = wrong.get(name, torch.ones(4))
        if isinstance(out, Exception):
            raise out
        return out

    return lambda: run


@pytest.mark.parametrize(
    "seconds, chosen",
    [
        ({"plain": 1.0, "one": 2.0, "another": 3.0}, "plain"),
        ({"plain": 3.0, "one": 2.0, "another": 1.0}, "another"),
        ({"plain": 3.0, "one": 1.0, "another": 0.99}, "one"),  # as good as equal
        ({"plain": 1.0, "one": 0.98, "another": 0.99}, "plain"),
    ],
)
def test_the_fastest_is_used(takes, seconds, chosen):
    takes(**seconds)
    assert fastest(("a kind", 1), KERNELS, example()) == chosen


def test_each_kind_is_measured_once(takes):
    timed = takes(one=0.5)
    for _ in range(3):
        fastest(("a kind", 1), KERNELS, example())
    assert timed.count("one") == timed.count("plain") == kernel_choice.LEAST_CALLS
    fastest(("a kind", 2), KERNELS, example())
    assert timed.count("one") == 2 * kernel_choice.LEAST_CALLS
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        fastest(("a kind", 1), KERNELS, example())
    finally:
        torch.set_num_threads(threads)
    assert timed.count("one") == 3 * kernel_choice.LEAST_CALLS


def test_short_calls_are_repeated(takes):
    timed = takes(plain=1e-6, one=1e-6, another=1e-6)
    fastest(("a kind", 1), KERNELS, example())
    assert timed.count("one") == kernel_choice.MOST_CALLS


@pytest.mark.parametrize(
    "result, reason",
    [
        (RuntimeError("no such primitive\nand more"), "RuntimeError: no such primitive"),
        (torch.full((4,), 1.01), "differs from PyTorch's by 0.01"),
        (torch.full((4,), float("nan")), "differs from PyTorch's by nan"),
        (torch.ones(5), "it returns (5,)"),
        (torch.ones(4).half(), "torch.float16"),
    ],
)
def test_a_kernel_that_is_wrong_is_left_out(takes, result, reason):
    """However fast it is, and it is said."""
    takes(one=0.1, another=0.5)
    with pytest.warns(UserWarning, match="the kernel 'one' is not used for a kind 1"):
        assert fastest(("a kind", 1), KERNELS, example(one=result)) == "another"
    (measured,) = kernel_choice.table().values()
    assert reason in measured.left_out["one"] and "one" not in measured.milliseconds
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert fastest(("a kind", 1), KERNELS, example(one=result)) == "another"


def test_a_result_of_zeros_is_right(takes):
    takes(one=0.5)
    assert fastest(("a kind", 1), KERNELS[:2], example(plain=torch.zeros(4), one=torch.zeros(4))) == "one"


def test_what_overflows_is_not_judged(takes):
    """As in the decoder in float16, which is then run in float32: the next image may fit."""
    takes(one=0.5)
    inf = torch.full((4,), torch.inf)
    assert fastest(("a kind", 1), KERNELS[:2], example(plain=inf, one=inf)) == "plain" and kernel_choice.table() == {}
    assert fastest(("a kind", 1), KERNELS[:2], example()) == "one"


def test_where_plain_kernels_are_the_fastest_no_other_runs(takes, tiny, monkeypatch):
    """Counted in whole networks: on a processor where PyTorch's own win, they alone are called."""
    takes(plain=0.1)
    calls = []
    for module, name in (
        (cpu_kernels, "linear"),
        (cpu_kernels, "convolution"),
        (blockwise_attention, "blockwise"),
        (cpu_kernels, "_group_norm_in_float32"),
    ):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, kernel=kernel: calls.append(1) or kernel(*given))
    states = tiny_state()
    for dtype in (torch.float32, torch.bfloat16):
        networks = loaded(states, TINY, dtype)
        x, z = torch.randn(2, 4, 16, 16).to(dtype), torch.randn(1, 4, 8, 8).to(dtype)
        conditioning = Conditioning(torch.randn(2, 77, 64).to(dtype))
        for _ in range(2):  # the first time measures
            calls.clear()
            networks["unet"](x, torch.ones(2), conditioning)
            networks["text_encoder"](torch.zeros(1, 77, dtype=torch.long))
            networks["vae"].decode(z)
        assert calls == []


@pytest.mark.parametrize("name", FORCED)
def test_goldens_with_every_kernel(name):
    """The original's outputs, whichever kernels are forced."""
    golden = Golden("tiny_v1_components")
    with kernel_choice.prefer(name):
        networks = loaded(tiny_state(), TINY)
        assert error(networks["text_encoder"](golden["ids"].long()).hidden, golden["context"]) < 1e-5
        out = networks["unet"](golden["unet_x"], golden["unet_t"], Conditioning(golden["context"]))
        assert error(out, golden["unet_out"]) < 2e-5
        assert error(networks["vae"].decode(golden["latent"]), golden["decoded"]) < 2e-5
        low = loaded(tiny_state(), TINY, torch.bfloat16)["unet"]
        out = low(golden["unet_x"].bfloat16(), golden["unet_t"], Conditioning(golden["context"].bfloat16()))
        assert error(out, golden["unet_out"]) < 3e-2


def test_forced_kernels_are_used(monkeypatch):
    """Without measuring; a kind that does not have the kernel uses the plain one."""
    for choice, chosen in (("plain", "plain"), ("fast", "one"), ("another", "another"), ("a third", "plain")):
        with kernel_choice.prefer(choice):
            assert fastest(("a kind", 1), KERNELS, lambda: pytest.fail("measured")) == chosen
    assert kernel_choice.table() == {}


# ------------------------------------------------------------------------------------- kept in a file


def test_choices_come_back(takes, tmp_path):
    takes(plain=1.0, one=0.5)
    fastest(("a kind", 1, "bfloat16"), KERNELS, example())
    found = kernel_choice.table()
    with pytest.warns(UserWarning):
        fastest(("a kind", 2, "bfloat16"), KERNELS, example(another=torch.zeros(4)))
    kernel_choice.save(tmp_path / "kernels.json")
    kernel_choice._measured.clear()
    timed = takes(plain=0.1)  # on another day
    assert kernel_choice.load(tmp_path / "kernels.json")
    assert kernel_choice.table() == found  # what failed once is tried again
    timed.clear()
    assert fastest(("a kind", 1, "bfloat16"), KERNELS, example()) == "one" and timed == []
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


def test_a_kernel_that_is_gone_is_measured_again(takes, tmp_path):
    takes(one=0.5)
    fastest(("a kind", 1), KERNELS, example())
    kernel_choice.save(tmp_path / "kernels.json")
    kernel_choice._measured.clear()
    takes(another=0.5)
    kernel_choice.load(tmp_path / "kernels.json")
    assert fastest(("a kind", 1), ("plain", "another"), example()) == "another"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(machine="another processor, torch 1.0"),
        lambda content: content.update(format=0),
        lambda content: content.pop("kernels"),
        lambda content: content.update(kernels=[["a kind"]]),
        lambda content: content.update(kernels=[[["a kind", 1], 2, 5, {}, {}]]),
        lambda content: content.update(kernels=[[[["a"], 1], 2, "one", {}, {}]]),
        lambda content: content.update(kernels=7),
    ],
)
def test_a_table_that_does_not_fit_is_not_used(takes, tmp_path, change):
    file = tmp_path / "kernels.json"
    takes(one=0.5)
    fastest(("a kind", 1), KERNELS, example())
    kernel_choice.save(file)
    kernel_choice._measured.clear()
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert not kernel_choice.load(file) and kernel_choice.table() == {}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_table_is_not_used(tmp_path, content):
    file = tmp_path / "kernels.json"
    if content is not None:
        file.write_bytes(content)
    assert not kernel_choice.load(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_what_is_not_a_file_is_not_read(tmp_path):
    """A pipe would wait for its writer forever, a device might never end."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "device.json"):
        assert not kernel_choice.load(tmp_path / name)


def test_a_table_that_is_too_long_is_not_used(takes, tmp_path, monkeypatch):
    takes(one=0.5)
    fastest(("a kind", 1), KERNELS, example())
    kernel_choice.save(tmp_path / "table.json")
    assert kernel_choice.load(tmp_path / "table.json")
    monkeypatch.setattr(kernel_choice, "MOST_TEXT", 100)
    assert not kernel_choice.load(tmp_path / "table.json")


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        kernel_choice.save(tmp_path / "no folder" / "kernels.json")
    (tmp_path / "kernels.json").mkdir()
    with pytest.raises(OSError):
        kernel_choice.save(tmp_path / "kernels.json")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


@pytest.mark.skipif(not packing.onednn_dtypes(), reason="no packed kernels on this processor")
def test_attention_of_another_size_is_another_kind(takes):
    takes(blocks=0.5, packed_blocks=0.5)
    names = {blockwise_attention.kernel_for(16, N, M, 40, torch.float32) for N, M in ((4096, 4096), (4096, 77))}
    assert names == {"plain", "packed blocks"}  # 77 keys are not worth packing
    kinds = {blockwise_attention.kind_of(heads, 4096, 4096, 40, torch.float32) for heads in (2, 8, 16)}
    assert len(kinds) == 1  # of a large call, a part is measured


@pytest.mark.skipif(not packing.onednn_dtypes(), reason="no packed kernels on this processor")
@pytest.mark.parametrize("order", [(512, 300, 512), (300, 512)])
def test_the_choice_does_not_depend_on_earlier_calls(takes, order):
    """Calls of one kind have the same kernels to choose from."""
    takes(packed_blocks=0.5)
    taken = {blockwise_attention.kernel_for(16, 1024, M, 40, torch.float32) for M in order}
    assert taken == {"packed blocks"} and len(kernel_choice.table()) == 1


@pytest.mark.skipif(not packing.onednn_dtypes(), reason="no packed kernels on this processor")
def test_examples_are_made_on_the_cpu():
    """Whatever the default device of the program is."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3)).requires_grad_(False)
    with torch.device("meta"):
        optimize(network)
        blockwise_attention.kernel_for(2, 16, 512, 8, torch.float32)
        cpu_kernels.group_norm_kernel(32, 64)
    assert len(kernel_choice.table()) == 4

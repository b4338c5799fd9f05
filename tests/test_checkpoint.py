"""Files -> named tensors: every format and layout people have is read right (test_checkpoint_refused.py: the rest)."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import struct
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from common import tiny_state
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference_weights import save
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint, shapes

ZIP_PROTOCOLS, LEGACY_PROTOCOLS = (2, 3, 4, 5), (1, 2, 3, 4)
WRITERS = [("zip pickle", p) for p in ZIP_PROTOCOLS] + [("legacy pickle", p) for p in LEGACY_PROTOCOLS]


def write(path: Path, content: object, kind: str = "zip pickle", protocol: int = 2) -> Path:
    """`content` as torch writes it."""
    zipped = kind == "zip pickle"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and every bit; and the tensors are plain, contiguous and the caller's own."""
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    for key, tensor in expected.items():
        assert found.shape(key) == tuple(tensor.shape)
        assert found.dtype(key) == tensor.dtype
        value = found[key]
        assert type(value) is torch.Tensor
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert value.stride() == torch.empty(value.shape).stride(), "also where a size is 1"
        assert not value.requires_grad
        assert bits(value) == bits(tensor)


def bits(tensor: torch.Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def tensors() -> dict[str, torch.Tensor]:
    """One of each kind: types, shapes, strides, shared storages."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "float32": base,
        "float64": base.double() / 3,
        "float16": torch.linspace(-2, 2, 7).half(),
        "bfloat16": torch.linspace(-2, 2, 7).bfloat16(),
        "int64": torch.tensor([-(2**62), 0, 2**62]),
        "int32": torch.tensor([-1, 5], dtype=torch.int32),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "bool": torch.tensor([[True], [False]]),
        "float8": torch.linspace(-2, 2, 5).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(0.9999),
        "empty": torch.empty(0, 3),
        "tail of another": base[2:],
        "columns of another": base[:, 1:4],
        "every second": base.flatten()[1::2],
        "transposed": base.t(),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "position_ids": torch.arange(77).expand((1, -1)),
        "one of many": torch.arange(5.0).expand(1, 1, 5),
        "tied": base,
    }


# ------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(("kind", "protocol"), WRITERS)
def test_all_kinds_of_tensors(tmp_path, kind, protocol):
    expected = tensors()
    if kind == "legacy pickle":
        expected.pop("float8")  # its storage has no name in that format
    with load_checkpoint(write(tmp_path / "model.anything", expected, kind, protocol)) as found:
        assert found.kind == kind
        assert_same(found, expected)


def test_all_kinds_of_tensors_in_safetensors(tmp_path):
    expected = {key: tensor.clone().contiguous() for key, tensor in tensors().items()}
    metadata = {"format": "pt", "modelspec.title": "ü"}
    save_file(expected, tmp_path / "model.ckpt", metadata)  # the name of a file says nothing
    with load_checkpoint(tmp_path / "model.ckpt") as found:
        assert found.kind == "safetensors"
        assert found.metadata == metadata
        assert_same(found, expected)


def test_the_three_formats_give_the_same_tensors(tmp_path):
    state = tiny_state()
    save(tmp_path / "a.ckpt", state)
    save(tmp_path / "b.safetensors", state)
    write(tmp_path / "c.bin", state, "legacy pickle")
    for name in ("a.ckpt", "b.safetensors", "c.bin"):
        with load_checkpoint(tmp_path / name) as found:
            assert_same(found, state)


@pytest.mark.parametrize("kind", ["zip pickle", "legacy pickle", "safetensors"])
def test_small_tables_without_torch(tmp_path, kind):
    """The same numbers, whatever their type and strides; floats of 8 bits excepted."""
    expected = tensors()
    float8 = expected.pop("float8")
    if kind == "safetensors":
        save_file({key: tensor.clone().contiguous() for key, tensor in expected.items()}, tmp_path / "a")
    else:
        write(tmp_path / "a", expected, kind)
    with load_checkpoint(tmp_path / "a") as found:
        for key, tensor in expected.items():
            assert found.number_type(key).torch == tensor.dtype
            table = found.table(key)
            assert table.dtype == np.float64 and np.array_equal(table, tensor.detach().double().numpy()), key
            if tensor.is_floating_point():
                assert found.number_type(key).eps == torch.finfo(tensor.dtype).eps
    save_file({"a": float8}, tmp_path / "b")
    with load_checkpoint(tmp_path / "b") as found, pytest.raises(ValueError, match="float8"):
        found.table("a")


def test_a_small_table_may_not_be_scattered_over_a_large_one(tmp_path):
    write(
        tmp_path / "a",
        {"a": torch.zeros(1_000_002)[::500_001][:2], "b": torch.zeros(1_100_000)[::1_000_001]},
        "zip pickle",
    )
    with load_checkpoint(tmp_path / "a") as found:
        assert found.table("a").tolist() == [0, 0]
        with pytest.raises(CheckpointError, match="'b' is scattered over 1000002 numbers"):
            found.table("b")


@pytest.mark.parametrize("name", ["sd:v1.5 (ü) 模型.ckpt", "..ckpt", "data.pkl", "a" * 200])
def test_any_file_name(tmp_path, name):
    """torch names the members of its archive after the file."""
    state = {"a": torch.ones(2)}
    with load_checkpoint(write(tmp_path / name, state)) as found:
        assert_same(found, state)


@st.composite
def state_dicts(draw) -> dict[str, torch.Tensor]:
    """Random views on random storages."""
    state = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
        tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        state[draw(st.text(max_size=8))] = tensor
        if shape:
            tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
            step, start = draw(st.integers(1, 3)), draw(st.integers(0, 2))
            state[draw(st.text(max_size=8))] = tensor[start::step]
    return state


@given(state_dicts(), st.sampled_from(WRITERS))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_torch_reads_is_read_equal(tmp_path, state, writer):
    assume(not all(key.startswith("module.") for key in state) and "state_dict" not in state)
    path = write(tmp_path / "state.pt", state, *writer)
    expected = torch.load(path, weights_only=True) if writer[1] == 2 else state
    with load_checkpoint(path) as found:
        assert_same(found, expected)


@pytest.mark.parametrize(("kind", "protocol"), WRITERS)
def test_modules_and_parameters(tmp_path, kind, protocol):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = layer.state_dict()  # an OrderedDict with the attribute _metadata
    assert state._metadata
    with load_checkpoint(write(tmp_path / "a", state, kind, protocol)) as found:
        assert_same(found, state)

    named = dict(layer.named_parameters())  # nn.Parameter, requires_grad
    named["0.bias"].note = "an attribute of its own"
    extra = torch.ones(2)
    extra.note = "also here"
    with load_checkpoint(write(tmp_path / "b", {**named, "extra": extra}, kind, protocol)) as found:
        assert_same(found, {**named, "extra": extra})


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="flat"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="Lightning"),
        pytest.param(lambda state: {"state_dict": {"state_dict": state}}, id="nested twice"),
        pytest.param(lambda state: {"model": state, "optimizer": {"lr": 0.1}}, id="model"),
        pytest.param(lambda state: {"rng_state": torch.zeros(9), "model": state, "ema": state}, id="rng_state beside"),
        pytest.param(lambda state: {"ema": state, "step": 5}, id="ema"),
        pytest.param(lambda state: {f"module.{key}": tensor for key, tensor in state.items()}, id="DDP"),
        pytest.param(lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}, id="DDP, Lightning"),
        pytest.param(lambda state: {**state, "step": 7, "config": {"a": [1]}, 5: torch.ones(1)}, id="other things"),
        pytest.param(lambda state: collections.defaultdict(list, state), id="defaultdict"),
    ],
)
@pytest.mark.parametrize("kind", ["zip pickle", "legacy pickle"])
def test_where_the_state_dict_is(tmp_path, wrap, kind):
    state = {"a.weight": torch.ones(2, 2), "b.bias": torch.zeros(3, dtype=torch.float16)}
    with load_checkpoint(write(tmp_path / "a", wrap(state), kind)) as found:
        assert_same(found, state)


@pytest.mark.parametrize("kind", ["zip pickle", "legacy pickle"])
def test_names_are_without_wrappers(tmp_path, kind):
    """Of DDP, torch.compile and others, around the whole or a part; not where that would make two names one."""
    names = {
        "module._orig_mod.a.weight": "a.weight",
        "b._orig_mod.conv.module.weight": "b.conv.weight",
        "_forward_module.b.bias": "b.bias",
        "model_ema.diffusion_model_orig_modout2bias": "model_ema.diffusion_modelout2bias",
        "submodule.weight": "submodule.weight",
        "module": "module",
        "c.weight": "c.weight",
        "module.c.weight": "module.c.weight",
    }
    state = {key: torch.full((3,), float(i)) for i, key in enumerate(names)}
    with load_checkpoint(write(tmp_path / "a", state, kind)) as found:
        assert_same(found, {names[key]: tensor for key, tensor in state.items()})


def test_state_dicts_of_several_networks_are_one(tmp_path):
    content = {"unet": {"a": torch.ones(1), "b": torch.ones(2)}, "vae": {"state_dict": {"a": torch.ones(3)}}, "step": 5}
    with load_checkpoint(write(tmp_path / "a", content)) as found:
        assert_same(found, {"unet.a": torch.ones(1), "unet.b": torch.ones(2), "vae.a": torch.ones(3)})


def test_what_lies_behind_the_end_is_said(tmp_path):
    """torch reads such files, too; the safetensors library does not (test_checkpoint_refused.py)."""
    state = {"a": torch.ones(3)}
    for kind in ("zip pickle", "legacy pickle"):
        path = write(tmp_path / "a", state, kind)
        with load_checkpoint(path) as found:
            assert found.notes == ()
        path.write_bytes(path.read_bytes() + bytes(1000))
        with load_checkpoint(path) as found:
            assert_same(found, state)
            assert found.notes == ("the last 1000 bytes of the file belong to nothing and are ignored",)
        assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]


def test_a_tensor_that_nobody_needs_may_be_of_any_kind(tmp_path):
    odd = {"position_ids": torch.ones(2, dtype=torch.complex64), "betas": torch.eye(2).to_sparse()}
    with load_checkpoint(write(tmp_path / "a", {"a": torch.ones(1), **odd})) as found:
        assert list(found) == ["a"] and len(found.notes) == 2
        assert found.notes[0].startswith("left out, as it is not needed: tensor 'position_ids' is stored with")
    save_file({"a": torch.ones(1), "x.position_ids": torch.ones(2, dtype=torch.uint64)}, tmp_path / "b")
    with load_checkpoint(tmp_path / "b") as found:
        assert list(found) == ["a"] and "'x.position_ids' has type U64" in found.notes[0]
    save_file({"a": torch.ones(1), "b": torch.ones(2, dtype=torch.uint64)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="'b' has type U64"):
        load_checkpoint(tmp_path / "c")


def test_a_header_of_many_megabytes(tmp_path):
    """LoRA trainers write the tags of their data set into it."""
    tags = json.dumps({"set": {f"a tag of some words {i:06d}": 1 for i in range(300_000)}})
    save_file({"a": torch.ones(2)}, tmp_path / "a", {"ss_tag_frequency": tags})
    with load_checkpoint(tmp_path / "a") as found:
        assert found["a"].tolist() == [1, 1] and found.metadata == {"ss_tag_frequency": tags} and len(tags) > 9e6


@pytest.mark.parametrize(("kind", "protocol"), WRITERS)
def test_training_leftovers_are_passed_over(tmp_path, monkeypatch, kind, protocol):
    """sd-v1-4.ckpt has callbacks keyed by a class of Lightning, others numpy scalars and a Namespace."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = callback
    instance = callback()
    instance.best = torch.ones(5)

    layer = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters())
    with torch.enable_grad():
        layer(torch.ones(1, 3)).sum().backward()
    adam.step()
    content = {
        "epoch": 0,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "lr": 1e-4,
        "resumed": True,
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "self": instance}},
        "optimizer_states": [adam.state_dict()],
        "hyper_parameters": argparse.Namespace(path=Path("x"), scale=np.float64(1.5), table=np.arange(4)),
        "state_dict": layer.state_dict(),
        "loss": np.float32(2.5),
    }
    path = write(tmp_path / "last.ckpt", content, kind, protocol)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with load_checkpoint(path) as found:
        assert_same(found, layer.state_dict())
        assert found.metadata == {
            "epoch": "0",
            "global_step": "470000",
            "pytorch-lightning_version": "1.4.2",
            "lr": "0.0001",
            "resumed": "True",
        }


def test_metadata_of_a_pickle_are_short_and_plain(tmp_path):
    content = {"a": torch.ones(1), "note": "x" * 5000, "big": 10**5000, "list": [1], "nested": {"b": 1}}
    with load_checkpoint(write(tmp_path / "a", content)) as found:
        assert found.metadata == {"note": "x" * 1000}


def test_safetensors_of_another_type_and_without_metadata(tmp_path):
    state = {"a": torch.ones(2).to(torch.float8_e5m2), "b": torch.ones(2, dtype=torch.int16)}
    save_file(state, tmp_path / "a")
    with load_checkpoint(str(tmp_path / "a")) as found:
        assert_same(found, state)
        assert found.metadata == {}
        assert found.path == tmp_path / "a"


# ------------------------------------------------------------------------------------------------------------ mapping


class Counted:
    """A stream that remembers what was read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream, self.reads = stream, []

    def seek(self, *place: int) -> int:
        return self.stream.seek(*place)

    def readinto(self, buffer: memoryview) -> int:
        self.reads.append((self.stream.tell(), len(buffer)))
        return self.stream.readinto(buffer)

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("kind", ["zip pickle", "legacy pickle", "safetensors"])
def test_only_what_is_asked_for_is_read(tmp_path, kind):
    state = {f"layer.{i}": torch.full((100, 10 + i), float(i)) for i in range(10)}
    if kind == "safetensors":
        save_file(state, tmp_path / "a")
    else:
        write(tmp_path / "a", {"state_dict": {**state, "part": state["layer.5"][10:12]}}, kind)
    with load_checkpoint(tmp_path / "a") as found:
        (file,) = found.files
        file.stream = counted = Counted(file.stream)
        assert "layer.3" in found
        assert "layer.x" not in found
        assert shapes(found)["layer.3"] == (100, 13)
        assert found.dtype("layer.3") == torch.float32
        assert counted.reads == [], "names, shapes and types need no data"
        assert torch.equal(found["layer.3"], state["layer.3"])
        assert [count for _, count in counted.reads] == [100 * 13 * 4]
        if "part" in found:
            assert torch.equal(found["part"], state["layer.5"][10:12])
            assert counted.reads[-1][1] == 2 * 15 * 4, "of a view no more than itself"
        counted.reads.clear()
        assert all(found[key].shape for key in found)
        places = [place for place, _ in counted.reads]
        assert places == sorted(places), "in the order of the file"


def test_a_huge_file_costs_nothing_to_open(tmp_path):
    """A safetensors file of 8 GB, nearly all of it a hole in the file system."""
    huge = 8 << 30
    header = json.dumps(
        {
            "huge": {"dtype": "F16", "shape": [huge // 2], "data_offsets": [0, huge]},
            "small": {"dtype": "F16", "shape": [2], "data_offsets": [huge, huge + 4]},
        }
    ).encode()
    with open(tmp_path / "a", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(huge, os.SEEK_CUR)
        file.write(bits(torch.tensor([1.5, 2.5], dtype=torch.float16)))
    start = time.process_time()
    with load_checkpoint(tmp_path / "a") as found:
        assert found.shape("huge") == (huge // 2,)
        assert found["small"].tolist() == [1.5, 2.5]
    assert time.process_time() - start < 1


def test_a_tensor_belongs_to_the_caller(tmp_path):
    path = write(tmp_path / "a", {"a": torch.zeros(4), "b": torch.zeros(4)})
    before = path.read_bytes()
    found = load_checkpoint(path)
    found["a"].fill_(7)
    assert found["a"].tolist() == [0, 0, 0, 0]
    kept = found["b"]
    found.close()
    path.unlink()
    assert kept.tolist() == [0, 0, 0, 0]
    path.write_bytes(before)
    with pytest.raises(CheckpointError, match="read any more"):
        found["a"]
    assert found.shape("a") == (4,)


def test_mapping(tmp_path):
    with load_checkpoint(write(tmp_path / "a", {"a": torch.zeros(4), "b": torch.ones(2, 3)})) as found:
        assert list(found) == ["a", "b"]
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == shapes(found)
        assert shapes(dict(found)) == {"a": (4,), "b": (2, 3)}
        assert "2 tensors" in repr(found)
        for ask in (found.__getitem__, found.shape, found.dtype):
            with pytest.raises(KeyError):
                ask("c")
    found.close()


def test_threads_read_one_file(tmp_path):
    state = {str(i): torch.full((1000 + i,), float(i)) for i in range(40)}
    wrong = []
    with load_checkpoint(write(tmp_path / "a", state)) as found:

        def read_all() -> None:
            wrong.extend(key for key in state if not torch.equal(found[key], state[key]))

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_file_cut_after_opening(tmp_path):
    path = write(tmp_path / "a", {"a": torch.zeros(5000)})
    with load_checkpoint(path) as found:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="shorter since"):
            found["a"]

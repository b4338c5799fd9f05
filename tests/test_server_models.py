"""The files that requests may name, and the models that are kept in memory."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import shutil
import time
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd import StableDiffusion
from sd.params import TextToImage
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource
from sd.server import loaded as loading
from sd.server import worker
from sd.server.catalogue import Catalogue, UnknownName
from sd.server.engine import Engine
from sd.server.jobs import Work
from sd.server.settings import ServerSettings

REQUEST = TextToImage.of("a red house", steps=2, seed=3, sampler="ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Another model, whose images are darker; a LoRA, an embedding, and files that fit nothing."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("models", "models/more", "loras", "embeddings"):
        (folder / name).mkdir(exist_ok=True)
    state = load_file(resource(EMBEDDED))
    (bias,) = [name for name in state if name.endswith("decoder.conv_out.bias")]
    state[bias] = state[bias] - 0.5
    with safe_open(resource(EMBEDDED), "pt") as file:
        metadata = file.metadata()
    save_file(state, folder / "models" / "dark.safetensors", metadata)
    shutil.copy(folder / "models" / "dark.safetensors", folder / "models" / "more" / "dark.safetensors")
    (folder / "models" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    shutil.copy(resource(EMBEDDED_LORA), folder / "loras" / "Style, of mine.safetensors")
    save_file({"emb_params": torch.randn(2, 64)}, folder / "embeddings" / "zorb.safetensors")
    save_file({"emb_params": torch.randn(2, 768)}, folder / "embeddings" / "wide.safetensors")
    return folder


def settings(folder, **more):
    names = ("models", "loras", "embeddings")
    return ServerSettings(**{name: folder / name for name in names}, **more)


def finished(engine, *works):
    async def wait():
        return [await job.end() for job in await engine.submit(works, "a")]

    return asyncio.run(wait())


def test_names_titles_and_hashes(folder):
    catalogue = Catalogue(settings(folder))
    names = [entry.name for entry in catalogue.entries("model")]
    assert names == ["pocket", "broken", "dark", "more/dark"] and catalogue.default.name == "pocket"
    dark = catalogue.find("model", "dark")
    assert dark.path == folder / "models" / "dark.safetensors" and dark.title == "dark.safetensors"
    digits = hashlib.sha256(dark.path.read_bytes()).hexdigest()
    with pytest.raises(UnknownName, match="being computed"):
        catalogue.find("model", digits[:10])
    until = time.monotonic() + 60
    while not all(entry.hash for entry in catalogue.entries("model")) and time.monotonic() < until:
        time.sleep(0.01)
    assert catalogue.find("model", digits) is dark and catalogue.find("model", digits[:10]) is dark
    assert dark.title == f"dark.safetensors [{digits[:10]}]" and dark.hash == digits[:10]
    for name in ("DARK", "dark.safetensors", dark.title, " dark "):
        assert catalogue.find("model", name) is dark
    assert catalogue.find("lora", "style, of MINE").path.parent == folder / "loras"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../models/dark", "/etc/passwd", "dark.ckpt", "models/dark", "dark\0", "a" * 10_000, "0" * 10],
)
def test_a_name_is_never_a_path(folder, name):
    with pytest.raises(UnknownName) as caught:
        Catalogue(settings(folder)).find("model", name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and str(folder) not in str(caught.value)


def test_new_files_are_found_by_refresh(folder, tmp_path):
    shutil.copytree(folder / "models", tmp_path / "models")
    catalogue = Catalogue(ServerSettings(models=tmp_path / "models"))
    before = catalogue.find("model", "dark")
    before.sha256()
    (tmp_path / "models" / "new.ckpt").write_bytes(b"")
    (tmp_path / "models" / "broken.safetensors").unlink()
    catalogue.refresh()
    assert {entry.name for entry in catalogue.entries("model")} == {"pocket", "dark", "more/dark", "new"}
    assert catalogue.find("model", "dark") is before and before.hash
    with open(before.path, "ab") as file:  # another file of the same name
        file.write(b"more")
    catalogue.refresh()
    assert catalogue.find("model", "dark") is not before and not catalogue.find("model", "dark").hash


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"loras .*gone: no such folder"):
        Catalogue(ServerSettings(loras=tmp_path / "gone"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="not a folder"):
        Catalogue(ServerSettings(models=tmp_path / "file"))


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    (tmp_path / "m.ckpt").write_bytes(b"")
    names = [entry.name for entry in Catalogue(ServerSettings(models=tmp_path)).entries("model")]
    assert names == ["pocket", "m"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("resident", [1, 2])
def test_models_are_switched_and_the_one_used_least_recently_goes(folder, resident, monkeypatch):
    engine = Engine(settings(folder, resident=resident))
    engine.start()
    try:
        (first,) = finished(engine, Work(REQUEST))
        (loaded,) = engine.workers[0].models
        gone = weakref.ref(loaded.model)
        del loaded
        alive = []
        plain = loading.load
        monkeypatch.setattr(worker, "load", lambda *args: (alive.append(gone() is not None), plain(*args))[1])
        (dark,) = finished(engine, Work(REQUEST, model="dark"))
        assert alive == [resident == 2]  # it made room before the other one was loaded
        assert dark.finished.model.startswith("dark.safetensors [")
        light, darker = first.finished.images[0], dark.finished.images[0]
        expected = StableDiffusion.load(folder / "models" / "dark.safetensors").prepare(REQUEST).result().images[0]
        assert darker.tobytes() == expected.tobytes() != light.tobytes()
        gc.collect()
        assert [model.entry.name for model in engine.workers[0].models] == ["pocket", "dark"][-resident:]
        assert (gone() is None) == (resident == 1)
        (again,) = finished(engine, Work(REQUEST))  # the current one is still the first
        assert again.finished.images[0].tobytes() == light.tobytes()
    finally:
        engine.close(0)


def test_files_that_fail_are_the_clients_error_and_the_server_goes_on(folder):
    engine = Engine(settings(folder))
    engine.start()
    try:
        (job,) = finished(engine, Work(REQUEST, model="broken"))
        assert (
            (job.state, job.fault) == ("failed", "invalid") and str(folder) not in job.error and "broken" in job.error
        )
        assert finished(engine, Work(REQUEST))[0].state == "done"
    finally:
        engine.close(0)


def test_embeddings_of_the_folder_are_words_in_prompts(folder):
    engine = Engine(settings(folder))
    engine.start()
    try:
        with_word, plain = finished(
            engine, Work(TextToImage.of("a zorb", steps=2, seed=3)), Work(TextToImage.of("a house", steps=2, seed=3))
        )
        (loaded,) = engine.workers[0].models
        assert {entry.name: words for entry, words in loaded.words.items()} == {"zorb": ["zorb"]}  # not the wide one
        library = StableDiffusion.load()
        library.add_embedding(folder / "embeddings" / "zorb.safetensors")
        expected = library.prepare(TextToImage.of("a zorb", steps=2, seed=3)).result().images[0]
        assert with_word.finished.images[0].tobytes() == expected.tobytes()
        assert "TI hashes: " in with_word.finished.texts[0] and "TI hashes" not in plain.finished.texts[0]
    finally:
        engine.close(0)


@pytest.mark.exhaustive
def test_a_model_that_cannot_be_loaded_at_the_start_is_said(folder):
    engine = Engine(settings(folder, ckpt=folder / "models" / "broken.safetensors"))
    engine.start()
    try:
        (job,) = finished(engine, Work(REQUEST))
        assert job.state == "failed" and not engine.is_ready and engine.workers[0].failure
        assert finished(engine, Work(REQUEST, model="pocket"))[0].state == "done"
    finally:
        engine.close(0)

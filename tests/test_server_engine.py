"""The queue and its workers: every accepted job ends, once, with the library's images."""

from __future__ import annotations

import asyncio
import threading

import pytest
from PIL import Image

from sd import StableDiffusion, read_request
from sd.params import ImageToImage, TextToImage
from sd.resources import EMBEDDED_LORA, resource
from sd.server.engine import Busy, Engine
from sd.server.jobs import Job, Work
from sd.server.settings import ServerSettings


@pytest.fixture(scope="module")
def library():
    return StableDiffusion.load()


@pytest.fixture(scope="module")
def engine():
    found = Engine(ServerSettings(queue=40, queue_per_client=30))
    found.start()
    yield found
    found.close(0)


def finished(engine, *works, client="a"):
    async def wait():
        jobs = await engine.submit(works, client)
        return [await job.end() for job in jobs]

    return asyncio.run(wait())


def request(seed=1, **settings):
    return TextToImage.of("a red house", **{"steps": 3, "seed": seed, "sampler": "ddim", **settings})


def test_images_are_the_librarys(engine, library):
    works = [Work(request(i)) for i in range(6)] + [Work(request(9, n=2)), Work(request(10, guidance=1))]
    for work, job in zip(works, finished(engine, *works), strict=True):
        expected = library.prepare(work.request).result()
        assert job.state == "done" and job.finished.seeds == expected.seeds
        assert [i.tobytes() for i in job.finished.images] == [i.tobytes() for i in expected.images]


def test_texts_are_read_back_as_the_request(engine, tmp_path):
    (job,) = finished(engine, Work(TextToImage.of("a (red:1.2) house", "fog", steps=3, seed=5, web_ui_prompts=True)))
    file = tmp_path / "a.txt"
    file.write_text(job.finished.texts[0])
    recipe = read_request(file)
    assert recipe.request.prompt == ("a (red:1.2) house",) and recipe.request.negative == "fog"
    assert recipe.request.params.seed == 5 and recipe.model.name == "pocket"


@pytest.mark.parametrize("as_tag", [True, False], ids=["tag", "listed"])
def test_loras_are_merged_and_removed_again(engine, library, as_tag):
    before = finished(engine, Work(request()))[0].finished.images[0]
    own = TextToImage.of("a red house", steps=4, seed=1)
    if as_tag:
        work = Work(TextToImage.of("a red house<lora:pocket-lcm:1>", steps=4, seed=1, web_ui_prompts=True))
    else:
        work = Work(own, loras=(("Pocket-LCM", 1.0),))
    (job,) = finished(engine, work)
    name = library.add_lora(resource(EMBEDDED_LORA))
    try:
        expected = library.prepare(own).result().images[0]
    finally:
        library.remove_lora(name)
    assert job.finished.images[0].tobytes() == expected.tobytes()
    assert "<lora:pocket-lcm:1>" in job.finished.texts[0] and "Lora hashes" in job.finished.texts[0]
    assert finished(engine, Work(request()))[0].finished.images[0].tobytes() == before.tobytes()


def test_events_tell_each_step_and_previews(engine):
    async def follow():
        (job,) = await engine.submit([Work(request(steps=5, n=2), previews=2)], "a")
        return [event async for event in job.events()]

    events = asyncio.run(follow())
    steps = [event.step for event in events]
    assert steps == sorted(steps) and events[-1].state == "done" and {1, 2, 3, 4, 5} <= set(steps)
    shown = {event.step: event.previews for event in events if event.previews}
    assert set(shown) == {2, 4} and all(len(images) == 2 for images in shown.values())
    assert all(image.size == (128, 128) for images in shown.values() for image in images)


@pytest.mark.parametrize(
    "work",
    [
        Work(request(steps=999)),
        Work(request(n=9)),
        Work(request(width=8192, height=8192)),
        Work(TextToImage(("a", "b"))),
        Work(TextToImage("a" * 30_000)),
        Work(request(), model="../../etc/passwd"),
        Work(request(), loras=(("/etc/passwd", 1.0),)),
        Work(request(), vae="none"),
        Work(TextToImage("<lora:gone:1>", web_ui_prompts=True)),
        Work(ImageToImage(prompt="a", image=Image.new("L", (5000, 5000)))),
    ],
    ids=range(10),
)
def test_work_beyond_the_limits_is_refused_at_once(engine, work):
    with pytest.raises(ValueError) as caught:
        finished(engine, work)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_only_the_model_can_refuse_fails_as_invalid(engine):
    (job,) = finished(engine, Work(request(width=130)))
    assert (job.state, job.fault) == ("failed", "invalid") and "multiple" in job.error


def test_cancelled_and_interrupted_jobs(engine):
    async def run():
        jobs = await engine.submit([Work(request(i, steps=100)) for i in range(12)], "a")
        async for event in jobs[0].events():
            if event.step >= 2:
                break
        engine.cancel(jobs[1:2] + jobs[-1:])
        jobs[0].interrupt()
        await jobs[0].end()
        engine.cancel(jobs)
        return [await job.end() for job in jobs]

    jobs = asyncio.run(run())
    assert jobs[0].state == "done" and jobs[0].finished.interrupted and len(jobs[0].finished.images) == 1
    assert {job.state for job in jobs[1:]} == {"cancelled"}
    assert finished(engine, Work(request()))[0].state == "done"  # goes on


def test_queue_is_bounded_for_one_client_and_for_all(engine):
    async def run():
        with pytest.raises(Busy) as caught:
            await engine.submit([Work(request())] * 31, "a")
        assert caught.value.retry_after >= 1
        jobs = await engine.submit([Work(request(steps=50))] * 30, "a")
        with pytest.raises(Busy):
            await engine.submit([Work(request())] * 30, "a")
        jobs += await engine.submit([Work(request(steps=50))] * 10, "b")
        with pytest.raises(Busy):
            await engine.submit([Work(request())] * 12, "c")
        engine.cancel(jobs)
        assert {(await job.end()).state for job in jobs} <= {"cancelled"}

    asyncio.run(run())


def test_closing_finishes_or_reports_every_job():
    engine = Engine(ServerSettings(together=2))
    engine.start()

    async def run(grace, steps):
        jobs = await engine.submit([Work(request(i, steps=steps)) for i in range(6)], "a")
        closing = threading.Thread(target=engine.close, args=(grace,))
        closing.start()
        with pytest.raises(Busy):
            while True:  # until it has begun to close
                jobs += await engine.submit([Work(request(7, steps=steps))], "a")
        ended = [await job.end() for job in jobs]
        closing.join()
        return ended

    jobs = asyncio.run(run(0.2, 150))
    assert {job.state for job in jobs} <= {"done", "failed"} and "failed" in {job.state for job in jobs}
    assert all(job.fault == "stopping" and "again" in job.error for job in jobs if job.state == "failed")
    engine = Engine(ServerSettings())
    engine.start()
    assert {job.state for job in asyncio.run(run(60, 2))} == {"done"}


def test_a_worker_survives_whatever_fails(monkeypatch):
    """Its job gets an answer, and the next ones their images."""
    engine = Engine(ServerSettings())
    engine.start()
    try:
        expected = finished(engine, Work(request()))[0].finished.images[0].tobytes()
        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
            (job,) = asyncio.run(ended_without_threads(engine))
        assert (job.state, job.fault) == ("failed", "internal")
        with monkeypatch.context() as patch:
            patch.setattr("sd.lockstep.Lockstep.advance", lambda lockstep: 1 / 0)
            (job,) = finished(engine, Work(request()))
        assert (job.state, job.fault) == ("failed", "internal")
        (job,) = finished(engine, Work(request()))
        assert engine.is_ready and job.finished.images[0].tobytes() == expected
    finally:
        engine.close(0)


async def ended_without_threads(engine):
    """A job that is submitted where no thread can be started: this does what `Engine.submit` does in one."""
    job = Job(*[Work(request()), "a"])
    with engine._changed:
        engine._waiting.append((job, engine._checked(job.work)[1]))
        engine._changed.notify_all()
    return [await job.end()]


def test_a_lora_that_could_not_be_removed_spoils_no_image(monkeypatch):
    engine = Engine(ServerSettings())
    engine.start()
    try:
        with_lora = Work(TextToImage.of("a red house", steps=4, seed=1), loras=(("pocket-lcm", 1.0),))
        expected = [finished(engine, work)[0].finished.images[0].tobytes() for work in (with_lora, Work(request()))]
        assert finished(engine, with_lora)[0].state == "done"
        with monkeypatch.context() as patch:
            patch.setattr(StableDiffusion, "remove_lora", lambda *args: (_ for _ in ()).throw(MemoryError()))
            (job,) = finished(engine, Work(request()))
        assert (job.state, job.fault) == ("failed", "memory")
        again = [finished(engine, work)[0].finished.images[0].tobytes() for work in (with_lora, Work(request()))]
        assert again == expected
    finally:
        engine.close(0)


def test_clients_take_turns():
    engine = Engine(ServerSettings(together=1))  # not started: nothing is taken

    async def order():
        for client, count in (("a", 3), ("b", 2), ("c", 1)):
            await engine.submit([Work(request(i)) for i in range(count)], client)
        return [job.client for job in engine.jobs()]

    assert asyncio.run(order()) == ["a", "b", "c", "a", "b", "a"]
    first, second = engine.take(None, 1, wait=False), engine.take(None, 1, wait=False)
    assert [first[0][0].client, second[0][0].client] == ["a", "b"]
    assert [job.client for job in engine.jobs()] == ["a", "b", "c", "a", "b", "a"]


def test_images_of_the_jobs_that_wait_are_bounded():
    image = Image.new("L", (1000, 1000))
    engine = Engine(ServerSettings(max_waiting_pixels=4_000_000))

    async def submit(client, *images):
        await engine.submit([Work(ImageToImage(prompt="a", image=each)) for each in images], client)

    asyncio.run(submit("a", image.copy()))
    asyncio.run(submit("a", *[image] * 1))
    with pytest.raises(Busy, match="too large together"):
        asyncio.run(submit("a", image.copy()))
    asyncio.run(submit("b", *[image.copy()] * 20))  # the same for all
    with pytest.raises(Busy):
        asyncio.run(submit("c", image.copy(), image.copy()))


@pytest.mark.exhaustive
def test_who_reads_slowly_misses_steps_but_not_the_end(engine):
    async def follow():
        (job,) = await engine.submit([Work(request(steps=40), previews=1)], "a")
        seen = []
        async for event in job.events():
            seen.append(event)
            if len(seen) == 1:
                while not job.has_ended:
                    await asyncio.sleep(0.01)
        return seen

    seen = asyncio.run(follow())
    assert len(seen) <= 8 and seen[-1].state == "done"


@pytest.mark.parametrize("settings", [{"cache_interval": 2}, {"tileable": True}], ids=str)
def test_jobs_that_run_alone_leave_others_their_turns(engine, settings):
    async def follow():
        slow, quick = await engine.submit([Work(request(steps=60, **settings)), Work(request(steps=2))], "a")
        await quick.end()
        step = slow.step
        engine.cancel([slow])
        await slow.end()
        return quick.state, step

    state, step = asyncio.run(follow())
    assert state == "done" and step < 30


def test_numbers_that_are_not_finite_do_not_end_batches(engine):
    """A job that overflows fails alone, and those that come after are computed together again."""
    bad = Work(request(2, guidance=1000.0, steps=6))
    jobs = finished(engine, *[Work(request(i, steps=6)) for i in range(3)], bad)
    assert {job.state for job in jobs[:3]} == {"done"}
    with pytest.raises(ValueError, match="guidance 1e\\+38 is too large"):
        finished(engine, Work(request(guidance=1e38)))

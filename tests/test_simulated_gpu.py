"""Everything that a GPU would refuse, found without one: whole runs on the simulated device of simulated_device.py.

Text to image, image to image and inpainting with all samplers: nothing in the steps waits for the device, at most one
copy of noise goes there in a step, no step keeps more latents than its sampler declares, and the memory of each phase
stays within its bounds. Steps are recorded within the rules of PyTorch's documentation, which are listed here.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from common import TINY, TINY_INPAINT, TINY_V2
from PIL import Image
from simulated_device import Graph, SimulatedGpu, Waited
from test_lora import SCHEMES, lora_file, saved
from torch import Tensor, nn

from sd.conditioning import Conditioning
from sd.config import SD1, Config
from sd.imaging.previews import LinearDecoder
from sd.models.build import build
from sd.noise import to_device
from sd.params import HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.pipeline import StableDiffusion
from sd.run import Run
from sd.runtime import cuda_graphs
from sd.runtime.cuda_graphs import WARM_UP, Recorded, tensors
from sd.runtime.offload import Offload
from sd.runtime.optimize import optimize
from sd.samplers import SAMPLERS

HEIGHT, WIDTH = 72, 40
# Latents that a sampler holds between two steps besides x and x0: what it needs of earlier steps, and the variables of
# the last one.
HELD = {
    "plms": 6,  # eps of this and three earlier steps, their sum; the end of the first step
    "lms": 5,  # eps of this and three earlier steps, and y
    "heun": 1,  # the mean slope
    "dpm2": 0,
    "dpmpp_2s_a": 1,  # x0 in the middle
    "dpmpp_sde": 3,  # the two noises and x in the middle
    "dpmpp_2m": 0,
    "unipc": 4,  # of the previous step: x0, what it moved with, x0 of the one before
}
DRAWS = {"dpmpp_sde": 2}  # draws of noise in a step, where it is not 1


@pytest.fixture(scope="module")
def device() -> SimulatedGpu:
    gc.collect()  # what other modules have left: its end would be a warning or a count here
    return SimulatedGpu()


@pytest.fixture
def gpu(device) -> Iterator[SimulatedGpu]:
    """The device of this module, as it is after a start of the program: its models stay on it."""
    device.waits.clear()
    device.log.clear()
    device.peak = device.reserved
    with device, warnings.catch_warnings():
        warnings.simplefilter("error")  # such as "cannot be recorded"
        yield device


def networks(config: Config, dtype: torch.dtype = torch.float16, device: str = "cuda") -> dict[str, nn.Module]:
    """Networks as they are loaded, with weights on the simulated device."""
    made = build(config)
    for network in made.values():
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                weight = torch.empty(parameter.shape, dtype=dtype, device=device, memory_format=layout)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
        optimize(network.eval(), torch.device("cuda", 0))
    return made


@pytest.fixture(scope="module")
def models(device) -> dict[str, StableDiffusion]:
    """Small models, not recorded: so every operation of every step is looked at."""
    with device:
        found = {config.name: StableDiffusion(config, **networks(config)) for config in (TINY, TINY_INPAINT, TINY_V2)}
    for model in found.values():
        assert model.device.type == "cuda" and isinstance(model._fast_unet, Recorded)
        model._fast_unet = None
    return found


@pytest.fixture
def sd(gpu, models) -> StableDiffusion:
    return models[TINY.name]


@pytest.fixture(scope="module")
def full_size(device) -> StableDiffusion:
    """Stable Diffusion 1 in half precision."""
    with device:
        return StableDiffusion(SD1, **networks(SD1))


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"height": HEIGHT, "width": WIDTH, "steps": 3, "seed": 3, **changes})


def check(gpu: SimulatedGpu, run: Run, waiting: int = -1) -> None:
    """Take the steps of a run: none waits, copies more noise than it draws, or keeps more latents than it must.

    waiting   a step that may wait: between two passes, an image is decoded and encoded
    """
    sampler, shape = run.params.sampler, tuple(run.x.shape)
    draws = DRAWS.get(sampler, 1) if SAMPLERS[sampler].draws(run.params.options) else 0
    before, counts = gpu.count(shape), []  # the initial noise, and what the models hold
    for i in range(len(run)):
        uploads = gpu.uploads
        if i == waiting:
            next(run)
            counts = None
            continue
        with gpu.no_waiting():
            next(run)
        assert gpu.uploads - uploads <= draws, f"step {i} copies to the device {gpu.uploads - uploads} times"
        if counts is not None:
            counts.append(gpu.count(shape) - before)
    if counts is not None:
        assert max(counts) <= 2 + HELD.get(sampler, 0), f"{counts} latents after each step"
        assert len(set(counts[4:])) <= 1 or counts[-1] < counts[-2], f"{counts} latents after each step"


def picture(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


# ----------------------------------------------------------------------------------------------------- all tasks


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_sampler_waits(gpu, sd, sampler):
    steps = 6 if SAMPLERS[sampler].order > 2 else 3  # until its history is full
    run = sd.prepare(TextToImage(["a house", "a cat"], params(sampler=sampler, steps=steps)))
    check(gpu, run)
    assert gpu.waits == ["copy to the device: (2, 77)", "copy to the device: (1, 77)"]  # tokens of the prompts
    (first, _) = run.result().images
    assert first.size == (WIDTH, HEIGHT)
    # for each image: is it finite, in half precision and as it is; then its pixels
    each = ["aten._local_scalar_dense: ()"] * 2 + [f"copy to the CPU: (1, {HEIGHT}, {WIDTH}, 3)"]
    assert gpu.waits[2:] == each * 2 and gpu.scalars == 0


REQUESTS = {
    "eta": lambda: TextToImage("a", params(sampler="ddim", options={"eta": 1.0})),
    "rescale": lambda: TextToImage("a", params(guidance_rescale=0.7)),
    "no guidance": lambda: TextToImage("a", params(guidance=1.0)),
    "exact": lambda: TextToImage("a", params(n=2, exact=True)),
    "variation": lambda: TextToImage("a", params(variation_strength=0.3, variation_seed=5)),
    "rng nv": lambda: TextToImage("a", params(rng="nv", sampler="euler_a")),
    "rng comfy": lambda: TextToImage("a", params(rng="comfy", sampler="euler_a", n=2)),
    "tileable": lambda: TextToImage("a", params(tileable=True, height=64, width=64)),
    "AND": lambda: TextToImage("a AND b :0.5", params(), web_ui_prompts=True),
    "editing": lambda: TextToImage("a [cat:dog:0.5] (b:1.2)", params(), web_ui_prompts=True),
    "enlarged": lambda: HighRes("a", params(steps=3), hires=1.5),
    "enlarged latents": lambda: HighRes("a", params(steps=3), hires=1.5, hires_upscaler="latent"),
    "image": lambda: ImageToImage("a", params(), image=picture(), strength=0.8),
    "image, mode": lambda: ImageToImage("a", params(n=2), image=picture(), strength=0.8, posterior="mode"),
    "image, all": lambda: ImageToImage("a", params(), image=picture(), strength=1.0),
    "image, padded": lambda: ImageToImage("a", params(sampler="dpmpp_sde"), image=picture(50, 70), fit="pad"),
    "mask": lambda: Inpaint("a", params(), image=picture(), mask=a_mask()),
    "mask, fill": lambda: Inpaint("a", params(), image=picture(), mask=a_mask(), strength=0.7, content="fill"),
    "mask, noise": lambda: Inpaint("a", params(), image=picture(), mask=a_mask(), strength=0.7, content="noise"),
    "mask, margin": lambda: Inpaint("a", params(n=2), image=picture(), mask=a_mask(), margin=8),
}


def a_mask() -> Image.Image:
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (8, 8, 30, 50))
    return mask


OF_THE_USUAL_MODEL = [pytest.param(TINY, name, id=name) for name in REQUESTS]
OF_THE_OTHERS = [
    pytest.param(config, name, id=f"{config.name}, {name}", marks=() if usual else pytest.mark.exhaustive)
    for config in (TINY_INPAINT, TINY_V2)
    for name in REQUESTS
    for usual in [config is TINY_INPAINT and name in ("tileable", "exact", "mask", "mask, noise")]
]


@pytest.mark.parametrize("config, name", OF_THE_USUAL_MODEL + OF_THE_OTHERS)
def test_no_step_of_a_request_waits(gpu, models, config, name):
    request = REQUESTS[name]()
    run = models[config.name].prepare(request)
    check(gpu, run, waiting=request.params.steps if isinstance(request, HighRes) else -1)
    assert run.result().images and gpu.scalars == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions(gpu, dtype):
    model = StableDiffusion(TINY, **networks(TINY, dtype))
    model._fast_unet = None
    run = model.prepare(ImageToImage("a", params(steps=3), image=picture(), strength=0.9))
    check(gpu, run)
    assert run.result().images


def test_previews_and_images_that_are_not_finite(gpu, sd):
    run = sd.prepare(TextToImage("a", params(steps=3)))
    preview = LinearDecoder.fit(next(run).x0, run.preview(run.x))
    with gpu.no_waiting():
        step = next(run)
    assert preview(step.x0)[0].size == run.preview(step.x0)[0].size == (WIDTH, HEIGHT)
    answers = iter([False, True])  # not finite in half precision, but in float32
    gpu.answer = lambda: next(answers)
    try:
        assert [note for note in run.result().notes if "computing it again in float32" in note]
    finally:
        gpu.answer = lambda: True


def test_a_model_is_loaded_and_adapted_on_the_device(gpu, tmp_path, sd):
    loaded = StableDiffusion.load(device="cuda")
    assert str(loaded.device) == "cuda:0" and loaded.dtype == torch.float16
    assert {str(weight.device) for weight in loaded.unet.parameters()} == {"cuda:0"}
    check(gpu, loaded.prepare(TextToImage("a house", params(steps=2))))
    sd.add_lora(saved(tmp_path, lora_file(next(iter(SCHEMES)))[0]), 0.5)
    check(gpu, sd.prepare(TextToImage("a house", params(steps=2))))
    sd.remove_lora()
    assert {str(weight.device) for weight in sd.unet.parameters()} == {"cuda:0"}


# ---------------------------------------------------------------------------------------------------- planted faults


def planted(sd: StableDiffusion, fault) -> Run:
    """A run with a network around the U-Net."""
    run = sd.prepare(TextToImage("a", params(steps=4)))
    denoise = sd.denoiser(sd.encode_prompt(["a"]), sd.encode_prompt([""]), 5.0, network=fault(sd.predict))
    return run.begin(run.start._replace(denoise=denoise))


def mixing(network):
    """Adds a tensor of the CPU."""
    shift = torch.zeros(1, 4, 1, 1, dtype=torch.float16)
    return lambda x, t, conditioning: network(x, t, conditioning) + shift


def rounding(network):
    """Works in another precision, without a cast."""
    weight = torch.empty(WIDTH // 8, WIDTH // 8, device="cuda")
    return lambda x, t, conditioning: network(x, t, conditioning) @ weight


def asking(network):
    """Looks at the timestep."""
    return lambda x, t, conditioning: network(x, t if t[0].item() >= 0 else -t, conditioning)


def clamping(network):
    """Looks whether there is something to do."""

    def run(x, t, conditioning):
        out = network(x, t, conditioning)
        return out.clamp(-9, 9) if (out.abs() > 9).any() else out

    return run


def copying(network):
    """Brings its shift along in each step."""
    shift = torch.zeros(1, 4, 1, 1, dtype=torch.float16)
    return lambda x, t, conditioning: network(x, t, conditioning) + shift.to(x.device)


def keeping(network):
    """Keeps the latents of all steps."""
    kept = []

    def run(x, t, conditioning):
        kept.append(x[:1].float())
        return network(x, t, conditioning)

    return run


def drawing(network):
    """Draws noise for itself, which nothing waits for."""
    return lambda x, t, conditioning: network(x + to_device(torch.randn(x.shape).half(), x.device), t, conditioning)


def test_a_run_without_a_fault_passes(gpu, sd):
    """So what is refused below is the fault."""
    check(gpu, planted(sd, lambda network: network))


@pytest.mark.parametrize(
    "fault, refused, words",
    [
        (mixing, RuntimeError, "same device"),
        (rounding, RuntimeError, "one precision"),
        (asking, Waited, "_local_scalar_dense"),
        (clamping, Waited, "_local_scalar_dense"),
        (copying, Waited, "copy to the device"),
        (keeping, AssertionError, "latents after each step"),
        (drawing, AssertionError, "copies to the device"),
    ],
)
def test_planted_faults_are_found(gpu, sd, fault, refused, words):
    gc.collect()  # what earlier tests have left would be freed during the run, and be missing in its counts
    with pytest.raises(refused, match=words):
        check(gpu, planted(sd, fault))


def test_planted_extra_copies_of_a_step_are_found(gpu, sd, monkeypatch):
    """The sampler keeps what it no longer needs: constant, and still too much."""
    plain = SAMPLERS["ddim"].run

    def hoarding(denoise, x, levels, **options):
        for step in plain(denoise, x, levels, **options):
            copy = step.x.clone()
            yield step
            del copy

    monkeypatch.setitem(SAMPLERS, "ddim", SAMPLERS["ddim"]._replace(run=hoarding))
    gc.collect()  # latents of earlier runs, whose end would hide the copy
    with pytest.raises(AssertionError, match="latents after each step"):
        check(gpu, sd.prepare(TextToImage("a", params(sampler="ddim"))))


# ---------------------------------------------------------------------------------------------------- memory


def phases(gpu: SimulatedGpu, model: StableDiffusion, request: TextToImage) -> dict[str, float]:
    """The peaks of a run in GB."""
    found = {}
    with gpu.phase() as peak:
        run = model.prepare(request)
    found["prompts"] = peak() / 1e9
    for i in range(len(run)):
        with gpu.phase() as peak:
            next(run)
        found[f"step {i + 1}"] = peak() / 1e9
    with gpu.phase() as peak:
        run.result()
    return found | {"images": peak() / 1e9}


@pytest.fixture
def alone(gpu, full_size, models, device):
    """The full-size model recorded anew; what other models of this module hold, in GB, which is not its own."""
    full_size._fast_unet = Recorded(full_size.unet)
    weights = sum(rounded_size(weight) for net in full_size._networks.values() for weight in net.parameters())
    return full_size, (gpu.reserved - weights) / 1e9, weights / 1e9


def rounded_size(x: Tensor) -> int:
    return -(-x.numel() * x.element_size() // 512) * 512


def test_memory_of_an_image(gpu, alone, record_property):
    """float16, 512x512, guidance: at most 2.6 GB, with the memory that the recording of a step keeps."""
    model, others, weights = alone
    found = {name: peak - others for name, peak in phases(gpu, model, TextToImage("a", params(**SQUARE))).items()}
    record_property("peaks", found)
    assert weights == pytest.approx(2.1326, abs=1e-3)
    assert found["prompts"] < weights + 0.01
    assert found["step 1"] < weights + 0.13 and found["step 2"] - found["step 1"] < 1e-3
    assert max(found.values()) == found["images"] < 2.6
    # and the other tasks not more
    for request in (
        ImageToImage("a", params(**SQUARE), image=picture(512, 512), strength=0.99),
        Inpaint("a", params(**SQUARE), image=picture(512, 512), mask=Image.new("L", (512, 512), 255)),
    ):
        assert max(phases(gpu, model, request).values()) - others < 2.6


SQUARE = {"height": 512, "width": 512, "steps": 2}


def test_memory_of_four_images(gpu, alone):
    """A step needs four times as much beyond the weights; they are decoded one by one."""
    model, others, weights = alone
    one = phases(gpu, model, TextToImage("a", params(**SQUARE)))
    model._fast_unet = Recorded(model.unet)
    four = phases(gpu, model, TextToImage("a", params(n=4, **SQUARE)))
    step = {n: found["step 2"] - others - weights for n, found in ((1, one), (4, four))}
    assert 3.5 * step[1] < step[4] < 4.1 * step[1]
    assert four["images"] - one["images"] < 1.02 * (step[4] - step[1])


def test_low_memory_needs_that_of_one_network(gpu, alone):
    model, others, weights = alone
    model._fast_unet = None
    kept = max(phases(gpu, model, TextToImage("a", params(**SQUARE))).values()) - others - weights
    home = {}
    for name, network in build(SD1).items():
        for module in network.modules():
            for key, weight in list(module.named_parameters(recurse=False)):  # takes no memory
                number = torch.zeros(1, dtype=torch.float16, device="cpu").expand(weight.shape)
                setattr(module, key, nn.Parameter(number, requires_grad=False))
        home[name] = optimize(network.eval(), torch.device("cuda", 0))
    before = gpu.live
    small = StableDiffusion(SD1, **home)
    small.__dict__.update(_networks=Offload(home, torch.device("cuda", 0)), device=torch.device("cuda", 0))
    small._fast_unet = None
    request = TextToImage("a", params(**SQUARE))
    found = {name: peak - before / 1e9 for name, peak in phases(gpu, small, request).items()}
    unet = sum(map(rounded_size, model.unet.parameters())) / 1e9
    assert found["step 2"] < unet + 0.13 and found["prompts"] < 0.3 and found["images"] < unet + 0.1
    assert max(found.values()) < weights + kept - 0.3
    for name in ("text_encoder", "unet"):  # back in the memory of the CPU, pinned, so that they are copied fast
        assert all(weight.device.type == "cpu" and weight.is_pinned() for weight in home[name].parameters())


# ---------------------------------------------------------------------------------------------------- recordings


def inputs(size: int = 8, B: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    x, t = torch.empty(B, 4, size, size, device="cuda").half(), torch.full((B,), 500.0, device="cuda")
    return x, t, Conditioning(torch.empty(B, 77, 64, device="cuda").half())


def graphs(gpu: SimulatedGpu) -> list[Graph]:
    return [graph for reference in gpu.recorded if (graph := reference()) is not None]


class TestRules:
    """The constraints of CUDA graphs, one by one, in the words of PyTorch's documentation (notes/cuda, "Constraints").

    Of a U-Net as `Recorded` records it; that the simulated device refuses what breaks them is shown in
    test_simulated_device.py.
    """

    @pytest.fixture
    def recorded(self, gpu, sd) -> Recorded:
        del gpu.recorded[:]
        return Recorded(sd.unet)

    def test_capture_must_occur_on_a_non_default_stream(self, gpu, recorded):
        recorded(*inputs())
        (line,) = [line for line in gpu.log if "recording" in line]
        assert line.startswith("recording on stream ")

    def test_ops_that_synchronize_the_cpu_with_the_gpu_are_prohibited(self, gpu, recorded):
        with gpu.no_waiting():
            for _ in range(3):
                recorded(*inputs())
        assert not recorded._failed and len(graphs(gpu)) == 1 and gpu.waits == []

    @pytest.mark.parametrize("ask", [lambda t: t[0].item(), lambda t: bool((t > 0).all()), lambda t: t.cpu()])
    def test_a_network_that_synchronizes_is_not_recorded(self, gpu, sd, ask):
        class Asking(nn.Module):
            def forward(self, x, t, conditioning):
                ask(t)
                return sd.unet(x, t, conditioning)

        steps = Recorded(Asking())
        with pytest.warns(UserWarning, match="cannot be recorded.*not permitted when stream is capturing"):
            steps(*inputs())
        assert steps._failed

    def test_rng_operations_need_registered_generators(self, gpu, recorded):
        """There are none."""
        recorded(*inputs())
        assert graphs(gpu)[0].random == 0

    def test_within_a_process_only_one_capture_may_be_underway(self, gpu, sd):
        """One lock for all recordings of all models."""
        held = []

        def record(run, device):
            held.append(cuda_graphs._one_at_a_time.locked())
            return cuda_graphs.cuda_graph(run, device)

        for _ in range(2):
            Recorded(sd.unet, record)(*inputs())
        assert held == [True, True] and not cuda_graphs._one_at_a_time.locked()

    def test_no_non_captured_work_may_run_while_capture_is_underway(self, gpu, recorded):
        """Here, all of it is captured: the warm-up ends before. Errors of other threads are their own."""
        before = gpu.operations
        recorded(*inputs())
        (graph,) = graphs(gpu)
        whole = sum(not line.startswith("attention") for line in graph.operations)
        beside = gpu.operations - before - (WARM_UP + 1) * whole
        assert 0 < beside < 100  # copies of inputs and output
        assert gpu.log[-1] != "recording" and any("thread_local" in line for line in gpu.log)

    def test_cpu_work_is_not_captured(self, gpu, sd):
        class Counting(nn.Module):
            def forward(self, x, t, conditioning):
                return sd.unet(x, t, conditioning) * torch.ones(1).sum()

        with pytest.warns(UserWarning, match="cannot be recorded.*CPU"):
            Recorded(Counting())(*inputs())

    def test_every_replay_reads_from_and_writes_to_the_same_addresses(self, gpu, recorded):
        """Inputs are copied to where the recording reads, the output is a copy, weights are compared."""
        x, t, conditioning = inputs()
        first = recorded(x, t, conditioning)
        (recording,) = recorded._recordings.values()
        own = tensors(recording.inputs)
        written = [x._version for x in own]
        assert not {x.data_ptr(), t.data_ptr(), conditioning.context.data_ptr()} & {x.data_ptr() for x in own}
        places = [x.data_ptr() for x in (*own, recording.out)]
        (graph,) = graphs(gpu)
        for _ in range(2):
            out = recorded(*inputs())
            assert out.data_ptr() not in places and out.data_ptr() != first.data_ptr()
        own = tensors(recording.inputs)
        assert [x.data_ptr() for x in (*own, recording.out)] == places
        assert [x._version for x in own] == [count + 2 for count in written]
        assert gpu.replays >= 3 and graphs(gpu) == [graph]
        weights = {x.untyped_storage()._cdata for x in recorded._network.parameters()}
        given = {x.untyped_storage()._cdata for x in own}
        assert set(graph.outside) == weights | given  # nothing else is read that could be freed

    def test_weights_elsewhere_are_recorded_anew(self, gpu, sd, monkeypatch):
        recorded = Recorded(sd.unet)
        recorded(*inputs())
        old = sd.unet.conv_out.weight.data
        try:
            sd.unet.conv_out.weight.data = old.clone()
            recorded(*inputs())
            assert recorded._weights and len(graphs(gpu)) >= 1 and not recorded._failed
            # without the look at the addresses, freed memory is read
            monkeypatch.setattr(cuda_graphs, "_look", lambda network: (False, recorded._weights))
            sd.unet.conv_out.weight.data = old
            with pytest.raises(RuntimeError, match="illegal memory access"):
                recorded(*inputs())
        finally:
            sd.unet.conv_out.weight.data = old

    def test_dynamic_control_flow_is_prohibited(self, gpu, sd):
        """The same operations whatever x and t are."""
        found = []
        for t in (0.0, 999.0):
            del gpu.recorded[:]
            x, _, conditioning = inputs()
            steps = Recorded(sd.unet)
            steps(x, torch.full((2,), t, device="cuda"), conditioning)
            found.append(graphs(gpu)[-1].operations)
        assert found[0] == found[1] and len(found[0]) > 200

    def test_dynamic_shapes_are_prohibited(self, gpu, recorded):
        """Another shape is another recording."""
        for size in (8, 9, 8, 9):
            assert recorded(*inputs(size)).shape[-1] == size
        assert len(graphs(gpu)) == 2
        recorded(*inputs(10))
        gc.collect()
        assert len(graphs(gpu)) == 2 == len(recorded._recordings)

    def test_using_multiple_streams_has_restrictions(self, gpu, recorded):
        """One, which waits for what came before, and is waited for; the next replay waits for the last one."""
        recorded(*inputs())
        recorded(*inputs())
        side = gpu.log[0].partition(" waits")[0]
        assert gpu.log == [
            f"{side} waits for default",
            f"default waits for {side}",
            f"recording on {side}, thread_local",
            "default waits for an event of default",
        ]

    def test_memory_of_a_graph_is_its_own_as_long_as_it_lives(self, gpu, recorded):
        before = gpu.live
        recorded(*inputs())
        (graph,) = graphs(gpu)
        (recording,) = recorded._recordings.values()
        assert recording.out.untyped_storage()._cdata in graph.own and gpu.pools >= graph.pool > 0
        assert 0 < gpu.live - before < 100_000  # the inputs
        del graph, recording
        recorded._recordings.clear()
        gc.collect()
        assert graphs(gpu) == [] and gpu.live == before

    def test_nothing_is_recorded_for_gradients(self, gpu, recorded):
        grads = []

        def record(run, device):
            grads.append(torch.is_grad_enabled())
            return cuda_graphs.cuda_graph(run, device)

        Recorded(recorded._network, record)(*inputs())
        assert grads == [False]
        with torch.enable_grad():
            recorded(*inputs())
        assert not recorded._recordings

    def test_a_graph_may_be_replayed_on_any_stream(self, gpu, recorded):
        recorded(*inputs())
        with torch.cuda.stream(torch.cuda.Stream()):
            recorded(*inputs())
        assert len(graphs(gpu)) == 1 and gpu.log[-1].endswith("waits for an event of default")


@pytest.mark.parametrize("config", [TINY, TINY_INPAINT], ids=lambda config: config.name)
def test_whole_runs_are_recorded(gpu, models, config):
    model = models[config.name]
    model._fast_unet = Recorded(model.unet)
    try:
        for request in (
            TextToImage(["a", "b"], params(sampler="heun")),
            Inpaint("a", params(), image=picture(), mask=a_mask(), strength=0.9),
        ):
            before = gpu.replays
            check(gpu, model.prepare(replace(request)))
            assert gpu.replays - before >= len(model.prepare(request))
        assert not model._fast_unet._failed
    finally:
        model._fast_unet = None

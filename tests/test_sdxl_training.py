"""Training SDXL in small: captions for both text encoders, LoRAs, checkpointing, and the programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from test_train_scripts import QUICK, SMALL, photos, start  # noqa: F401

from scripts import convert, distill, train, train_text
from scripts.training.batches import Batch
from scripts.training.captions import Captions, padded
from scripts.training.models import write_model
from scripts.training.state import load_state, save_tensors
from sd import StableDiffusion
from sd.checkpoints.detect import CONFIG_KEY
from sd.conditioning import Conditioning
from sd.config import BASE_SIZES, MODELS, SDXL, Config, TextConfig, UNetConfig
from sd.models.build import build
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.schedule import Schedule
from sd.training import (
    LoraParams,
    TrainableLora,
    checkpoint_activations,
    consistency_loss,
    diffusion_loss,
    guided,
    lora_layers,
    lora_tensors,
    solver_step,
)

# SDXL in even smaller: the training programs run in a second
SMALL_XL = replace(
    SMALL,
    name="small xl",
    guidance=3.0,
    text=(
        TextConfig(width=32, layers=1, heads=2, hidden_norm=False),
        TextConfig(32, 2, 2, "gelu", pad=0, names="openclip", hidden_layer=-2, hidden_norm=False, pooled=True,
                   projection=16),
    ),
    unet=UNetConfig(channels=(32, 64), heads=(1, 2), depth=(0, 2), middle_depth=2, blocks=1, context=64,
                    vector=16 + 6 * 256, linear_projections=True),
    sizes=BASE_SIZES,
    zero_empty=True,
)  # fmt: skip


def xl() -> StableDiffusion:
    """SDXL in small, whose weights a test may change."""
    return StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captioned(ids: torch.Tensor, size: int = 128) -> Batch:
    """A batch of captions for images of this size."""
    nothing = torch.zeros(len(ids))
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(len(ids), -1)
    return Batch(nothing, nothing, nothing, nothing, ids, sizes=sizes)


def batch(model: StableDiffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, timesteps, noise, and what two captions say."""
    x0, noise = torch.randn(2, 2, 4, 16, 16, generator=rng(0))
    ids = model.tokenizer(["a red house on a meadow", "a boat"])
    return x0, torch.tensor([900, 300]), noise, Captions(model)(captioned(ids))


def test_captions_are_encoded_as_prompts():
    """Both encoders with their own padding, the sizes, and zeros for a dropped prompt, as guidance has them."""
    model = xl()
    texts = ["a red house on a meadow", "a boat"]
    assert torch.equal(padded(model.tokenizers[0](texts), 0), model.tokenizers[1](texts))
    found, expected = Captions(model)(captioned(model.tokenizer(texts))), model.conditioning(texts)
    assert error(found.context, expected.context) < 1e-6 and error(found.vector, expected.vector) < 1e-6
    other = Captions(model)(captioned(model.tokenizer(texts), 64)).vector
    assert torch.equal(other[:, :96], found.vector[:, :96]) and not torch.equal(other[:, 96:], found.vector[:, 96:])
    dropped = Captions(model)(captioned(model.tokenizer(["a boat", ""])))
    assert dropped.context[0].any() and not dropped.context[1].any() and not dropped.vector[1, :96].any()
    assert error(dropped.vector[1], model.zeroed(model.conditioning([""]), [True]).vector[0]) < 1e-6
    concat = torch.ones(2, 5, 8, 8)
    assert Captions(model)(captioned(model.tokenizer(texts))._replace(concat=concat)).concat is concat
    without = Captions(model).without(captioned(model.tokenizer(texts), 64))
    assert without.batch == 2 and not without.context.any() and torch.equal(without.vector[:, 96:], other[:, 96:])


def test_one_encoder_is_as_before(tiny_sd):
    ids = tiny_sd.tokenizer(["a boat", ""])
    told = Captions(tiny_sd)(captioned(ids)._replace(sizes=None))
    assert told.vector is None and torch.equal(told.context, tiny_sd.text_encoder(ids).hidden)


def test_a_lora_learns():
    """Its steps lower the loss of a batch; only A and B have gradients, and the vector is part of what it learns from.

    The file has kohya's names of all its layers, with the place of each block in its transformer.
    """
    model = xl()
    model.unet.requires_grad_(False)
    x0, t, noise, cond = batch(model)
    lora = TrainableLora(model.unet, lora_layers(model.unet), LoraParams(4))
    lora.attach(model.unet)
    optimizer = torch.optim.Adam(lora.parameters(), 2e-3)
    losses = []
    with torch.enable_grad():
        for _ in range(4):
            loss = diffusion_loss(model.unet, model.schedule, x0, cond, t, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in model.unet.parameters())
    assert all(layer.up.grad is not None and layer.up.grad.any() for layer in lora.layers)
    moved = cond._replace(vector=cond.vector.roll(1, 0))
    assert abs(float(diffusion_loss(model.unet, model.schedule, x0, moved, t, noise)) - losses[-1]) > 1e-4
    tensors = lora_tensors({"unet": lora}, model.config)
    assert len(tensors) == 3 * len(lora.names)
    deep = "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k.lora_down.weight"
    assert tensors[deep].shape == (4, 160)


@pytest.mark.exhaustive
def test_diffusers_reads_the_lora(tmp_path, monkeypatch):
    """Its U-Net with the trained LoRA predicts what ours does: the names are found, those of the second blocks too."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    pytest.importorskip("peft")
    model = xl()
    lora = TrainableLora(model.unet, lora_layers(model.unet), LoraParams(2))
    with torch.no_grad():
        for layer in lora.layers:
            layer.up.copy_(0.2 * torch.randn(layer.up.shape, generator=rng(1)))
    save_tensors(lora_tensors({"unet": lora}, model.config), tmp_path / "lora.safetensors", {"format": "pt"})
    save_file(tiny_state("tiny-sdxl"), tmp_path / "tiny.safetensors")
    monkeypatch.setitem(MODELS, "tiny-sdxl", TINY_XL)
    arguments = (tmp_path / "tiny.safetensors", tmp_path / "folder", "--layout", "diffusers", "--model", "tiny-sdxl")
    assert convert.main([*map(str, arguments)]) == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", add_watermarker=False)
    _, t, noise, cond = batch(model)
    added = {"text_embeds": cond.vector[:, :96], "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)}

    def theirs() -> torch.Tensor:
        return pipe.unet(noise, t, cond.context, added_cond_kwargs=added).sample

    plain = model.unet(noise, t, cond)
    assert error(theirs(), plain) < 1e-5
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    lora.attach(model.unet)
    found = model.unet(noise, t, cond)
    assert error(theirs(), found) < 1e-5 and error(found, plain) > 0.1


def test_distillation_has_the_vector():
    """A guided step of the teacher and the student's loss take it with and without the prompt."""
    model = xl()
    x0, t, noise, cond = batch(model)
    uncond = Captions(model)(captioned(model.tokenizer([""])))
    scale = torch.tensor([3.0, 3.0])
    teacher = guided(model.unet, uncond, scale)
    expected = model.denoiser(cond, uncond, 3.0)
    level = model.schedule.level(900)
    x_t = model.schedule.add_noise(x0, noise, level)
    x0_of_teacher = model.schedule.to_x0(teacher(x_t, torch.tensor([900, 900]), cond), x_t, level)
    assert error(x0_of_teacher, expected(x_t, level)) < 1e-5
    points = solver_step(teacher, model.schedule, x_t, torch.tensor([900, 900]), t - 100, cond)
    loss = consistency_loss(model.unet, model.unet, model.schedule, points, cond)
    assert loss.isfinite() and loss > 0


def test_checkpointing_recomputes_block_by_block():
    """The same loss and gradients; less is kept for the backward pass, and less at once of a transformer of ten."""

    def measured(network: UNet) -> tuple[float, torch.Tensor, int]:
        kept = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        x, noise = torch.randn(2, 2, 4, 16, 16, generator=rng(1))
        t = torch.tensor([10, 900])
        cond = Conditioning(torch.randn(2, 7, 64, generator=rng(3)), torch.randn(2, 24, generator=rng(4)))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = diffusion_loss(network, Schedule(), x, cond, t, noise)
            loss.backward()
        return float(loss.detach()), network.down[1].attn[0].blocks[0].attn1.q.weight.grad.clone(), kept

    config = UNetConfig(
        channels=(32, 64), heads=(1, 2), depth=(0, 10), middle_depth=10, blocks=1, context=64, vector=24
    )
    torch.manual_seed(0)
    plain = UNet(config)
    torch.manual_seed(0)
    saving = UNet(config)
    checkpoint_activations(saving)
    loss, gradient, kept = measured(plain)
    again, same, fewer = measured(saving)
    assert again == loss and torch.equal(gradient, same)
    assert fewer < kept
    wrapped = [name for name, module in saving.named_modules() if "forward" in vars(module)]
    assert sum(name.startswith("mid.attn.blocks.") for name in wrapped) == 10 and "mid.attn" not in wrapped


# ---------------------------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of SDXL in even smaller, in our layout."""
    path = tmp_path_factory.mktemp("xl") / "small-xl.safetensors"
    write_model(random_model(SMALL_XL), path, torch.float32)
    return path


def random_model(config: Config) -> StableDiffusion:
    torch.manual_seed(0)
    networks = {name: network.to_empty(device="cpu") for name, network in build(config).items()}
    for network in networks.values():
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.05)
    return StableDiffusion(config, **{name: net.requires_grad_(False).eval() for name, net in networks.items()})


def changed(before: Path, after: Path) -> set[str]:
    """The networks of which weights differ."""
    one, other = load_file(before), load_file(after)
    assert one.keys() == other.keys()
    return {key.partition(".")[0] for key in one if not torch.equal(one[key], other[key])}


OPTIONS = (*QUICK, "--steps", 2, "--lr", 1e-3, "--export-dtype", "float32", "--sample-steps", 1)


@pytest.mark.parametrize(
    ("more", "networks"),
    [
        ((), {"unet"}),
        (("--train-text", "--checkpointing"), {"unet", "text_encoder", "text_encoder_2"}),
        (("--inpaint",), None),
    ],
)
def test_fine_tuning(more, networks, checkpoint, photos, start, tmp_path):  # noqa: F811
    """train.py writes a model that loads; what is not trained stays, the second text encoder included."""
    given = ["--ckpt", checkpoint, "--data", photos, *OPTIONS, "--samples", 1, *more]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    written = tmp_path / "model.safetensors"
    model = StableDiffusion.load(written, device="cpu", dtype="float32")
    if networks is None:
        assert model.config.unet.in_channels == 9 and model.config.sizes == BASE_SIZES
    else:
        assert model.config == SMALL_XL and changed(checkpoint, written) == networks
        # a layer without a gradient must not be among the trained ones: DistributedDataParallel refuses that
        kept = load_state(tmp_path / "state.pt")["networks"]
        assert "text_encoder.norm.weight" not in kept
        assert ("text_encoder_2.norm.weight" in kept) == ("text_encoder_2" in networks)
    assert (tmp_path / "samples-000002.png").exists()


@pytest.mark.parametrize(("rank", "method"), [(None, "lcm"), (2, "tcd")])
def test_distilling(rank, method, checkpoint, photos, start, tmp_path):  # noqa: F811
    given = ["--ckpt", checkpoint, "--data", photos, *OPTIONS, "--samples", 1, "--method", method]
    given += [] if rank is None else ["--lora-rank", rank]
    status, _, err = start(distill, *given, "--out", tmp_path)
    assert status == 0, err
    if rank is None:
        assert changed(checkpoint, tmp_path / "model.safetensors") == {"unet"}
    else:
        found = load_file(tmp_path / "lora.safetensors")
        assert all(key.startswith("lora_unet_") for key in found)
        assert any(value.any() for key, value in found.items() if key.endswith("lora_up.weight"))
    assert (tmp_path / "samples-000002.png").exists()


@pytest.mark.parametrize("program", [train, train_text])
def test_a_new_model_has_one_text_encoder(program, photos, start, tmp_path):  # noqa: F811
    (tmp_path / "xl.json").write_text(SMALL_XL.to_json())
    state = {f"vae.{key}": value for key, value in VAE(SMALL_XL.vae).state_dict().items()}
    save_tensors(state, tmp_path / "vae.safetensors", {CONFIG_KEY: SMALL_XL.to_json()})
    given = ["--model", tmp_path / "xl.json", "--vae", tmp_path / "vae.safetensors", "--data", photos, *QUICK]
    status, _, err = start(program, *given, "--steps", 1, "--out", tmp_path / "out")
    assert status == 1
    assert err[-1] == (
        "error: small xl has 2 text encoders, and a new model can have one: fine-tune a checkpoint with train.py --ckpt"
    )


def test_size_of_a_lora():
    """Rank 16, all transformers: gradients and the state of the optimizer are of 43 M numbers, not of 2,567 M."""
    with torch.device("meta"):
        unet = UNet(SDXL.unet)
    names = lora_layers(unet, "transformer")
    layers = [unet.get_submodule(name) for name in names]
    trained = 16 * sum(layer.in_features + layer.out_features for layer in layers)
    assert (len(names), trained) == (722, 42_557_440)  # 10 layers of each of 70 blocks, and 2 around each of 11
    lora = TrainableLora(unet, names, LoraParams(16))
    assert sum(p.numel() for p in lora.parameters()) == trained and lora.limited == 0
    rows = sum(layer.out_features for layer in layers)
    dora = TrainableLora(unet, names, LoraParams(16, dora=True))
    assert sum(p.numel() for p in dora.parameters()) == trained + rows

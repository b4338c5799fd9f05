"""Add-ons as a user of the programs meets them: images, what their metadata say, and one line for what is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from common import TINY
from PIL import Image
from safetensors.torch import save_file

from scripts import img2img, inpaint, txt2img
from scripts.common.adapter_args import split_embedding, split_lora, split_name
from scripts.common.prompt_loras import PromptLoras
from sd.checkpoints.detect import CONFIG_KEY
from sd.checkpoints.export import to_own
from sd.params import TextToImage
from sd.resources import resource

NAME = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> Path:
    """A folder with the tiny model, a LoRA file and an embedding."""
    folder = tmp_path_factory.mktemp("files")
    own = to_own({name: network.state_dict() for name, network in tiny.items()})
    save_file({k: x.contiguous() for k, x in own.items()}, folder / "tiny.safetensors", {CONFIG_KEY: TINY.to_json()})
    lora = {f"{NAME}.lora_down.weight": torch.ones(2, 64), f"{NAME}.lora_up.weight": torch.ones(256, 2)}
    save_file(lora, folder / "style.safetensors", {"note": "not hashed"})
    (folder / "mine").mkdir()
    save_file(lora, folder / "mine" / "pytorch_lora_weights.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(3, 64)}, "name": "x"}, folder / "toy.pt")
    return folder


@pytest.fixture
def generate(files, tmp_path, capsys, monkeypatch):
    """Runs a program beside those files; gives status, lines of stdout and stderr, and the metadata of the image."""
    monkeypatch.chdir(files)

    def run(*args: str, program=txt2img):
        size = ["--height", "64", "--width", "64", "--steps", "2", "--seed", "1", "--dtype", "float32"]
        out = ["--device", "cpu", "--out", str(tmp_path / "out")]
        model = [] if "--ckpt" in args else ["--ckpt", "tiny.safetensors"]
        status = program.main([*args, *size, *out, *model])
        printed = capsys.readouterr()
        made = sorted((tmp_path / "out").glob("*.png")) if (tmp_path / "out").is_dir() else []
        text = Image.open(made[-1]).text["parameters"] if made else ""
        return status, printed.out.splitlines(), printed.err.splitlines(), text

    return run


def pixels(tmp_path: Path, number: int) -> bytes:
    return Image.open(tmp_path / "out" / f"{number:05d}.png").tobytes()


def test_lora(generate, files, tmp_path):
    generate("a cat")
    status, out, err, text = generate(
        "a cat", "--lora", "style.safetensors:0.5", "--lora", "mine/pytorch_lora_weights.safetensors"
    )
    assert (status, err) == (0, []) and out[1:3] == ["LoRA style, weight 0.5", "LoRA mine, weight 1"]
    raw = (files / "style.safetensors").read_bytes()
    digits = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:12]
    assert text.startswith("a cat <lora:style:0.5> <lora:mine:1>\nSteps: 2")
    assert f', Lora hashes: "style: {digits}, mine: {digits}", Precision: float32' in text
    assert pixels(tmp_path, 1) != pixels(tmp_path, 2)


def test_folders_of_adapters(generate, files):
    """As PEFT and diffusers write them, with the hashes of the files in them."""
    (files / "cat").mkdir()
    save_file({"<toy>": torch.ones(1, 64)}, files / "cat" / "learned_embeds.safetensors")
    status, out, err, text = generate("a <toy>", "--lora", "mine:0.5", "--embedding", "cat")
    assert (status, err) == (0, []) and out[1:3] == ["LoRA mine, weight 0.5", "embedding <toy>, vectors: 1"]
    assert 'Lora hashes: "mine: ' in text


def test_an_embedding_that_no_prompt_uses_is_said(generate):
    _, _, err, _ = generate("a cat", "--embedding", "toy.pt:<mine>")
    assert any("embedding toy added, but no prompt uses it: write <mine>" in line for line in err)
    for used in (["a (<mine>:1.2)", "--web-ui-prompts"], ["a cat", "--negative", "<MINE>"]):
        _, _, err, _ = generate(*used, "--embedding", "toy.pt:<mine>")
        assert not any("no prompt uses it" in line for line in err)


def test_embedding(generate, files, tmp_path):
    status, out, err, text = generate("a toy", "--embedding", "toy.pt", "--negative", "blue")
    assert (status, err) == (0, []) and out[1] == "embedding toy, vectors: 3"
    digits = hashlib.sha256((files / "toy.pt").read_bytes()).hexdigest()[:12]
    assert f', TI hashes: "toy: {digits}", Precision' in text
    _, out, _, text = generate("a cat", "--embedding", "toy.pt:<Bad>", "--negative", "<bad>")
    assert out[1] == "embedding <bad>, vectors: 3" and f'TI hashes: "<bad>: {digits}"' in text
    _, _, _, text = generate("a cat", "--embedding", "toy.pt:<Bad>", "--guidance", "1", "--negative", "<bad>")
    assert "TI hashes" not in text  # not used
    assert len({pixels(tmp_path, number) for number in (1, 2, 3)}) == 3


def test_weighted_and_long_prompts(generate, tmp_path):
    for i, args in enumerate(([], ["--web-ui-prompts"]), start=1):
        status, _, err, text = generate("a (cat:1.5)", *args)
        assert (status, err) == (0, []) and f", Emphasis: {'Original' if args else 'None'}, " in text
        assert (", Pad conds: True, " in text) == bool(args) and text.startswith("a (cat:1.5)\n")
        assert pixels(tmp_path, 1) != pixels(tmp_path, i) or i == 1
    prompt = "cat " * 80
    _, _, err, _ = generate(prompt)
    assert len(err) == 1 and "the last 5 are ignored" in err[0]
    status, _, err, text = generate(prompt, "--web-ui-prompts")
    assert (status, err) == (0, []) and ", Emphasis: Original, Pad conds: True, " in text
    assert pixels(tmp_path, 3) != pixels(tmp_path, 4)


def test_loras_that_prompts_name(generate, files, tmp_path):
    """Each prompt has its own, in any case of letters; the next prompt's image is that of the plain weights."""
    prompts = tmp_path / "prompts.txt"
    for first in ("a cat", "a <lora:STYLE:0.2><lyco:Style:0.3>cat"):
        prompts.write_text(f"{first}\na cat")
        status, out, err, text = generate("--from-file", str(prompts), "--web-ui-prompts", "--lora-dir", ".")
        assert (status, err) == (0, []) and text.startswith("a cat\nSteps: 2")
    assert [line for line in out if line.startswith("LoRA")] == ["LoRA STYLE, weight 0.5"]
    generate("a cat", "--lora", "style.safetensors:0.5")
    assert pixels(tmp_path, 2) == pixels(tmp_path, 4)
    assert pixels(tmp_path, 1) != pixels(tmp_path, 3) == pixels(tmp_path, 5)
    named = ["a cat <lora:mine>", "--negative", "x<lora:style:1>", "--web-ui-prompts", "--lora-dir", "."]
    _, _, err, text = generate(*named)
    assert text.startswith("a cat <lora:mine:1>\n") and 'Lora hashes: "mine: ' in text
    assert len(err) == 1 and "<lora:style:1> in the negative prompt is left out" in err[0]


def test_names_of_loras_are_looked_up_in_the_folder(tmp_path):
    def named(prompt: str, negative: str = "") -> list[tuple[str, float]]:
        request = TextToImage(prompt, negative=negative, web_ui_prompts=True)
        loras = PromptLoras(tmp_path / "loras")
        loras.look_up(request)
        return [(lora.path.relative_to(tmp_path).as_posix(), lora.weight) for lora in loras.of(request)]

    for name in (
        "Ink.safetensors",
        "a,b.pt",
        "a/ink v2.pt",
        "a/b/Twice.ckpt",
        "twice.safetensors",
        "notes.txt",
        "../outside.pt",
    ):
        (tmp_path / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loras" / name).touch()
    (tmp_path / "loras" / "a" / "circle").symlink_to(tmp_path / "loras", target_is_directory=True)
    assert named("<lora:ink:2> <lora:INK V2>") == [("loras/Ink.safetensors", 2), ("loras/a/ink v2.pt", 1)]
    assert named("<lora:a,b:1> <lora:a/b/twice:2>") == [("loras/a,b.pt", 1), ("loras/a/b/Twice.ckpt", 2)]
    for name, message in (
        (
            "twice",
            r"2 files in .*loras are named twice: twice.safetensors, a/b/Twice.ckpt; .*<lora:a/b/Twice:1>",
        ),
        (":1", "<lora::1> in the prompt: the name of the LoRA file is missing"),
        ("inc", r"no LoRA file named 'inc' is in .*loras: did you mean Ink\?"),
        ("../outside", "no LoRA file named '../outside'"),
        ("/etc/passwd", "no LoRA file named '/etc/passwd'"),
        ("notes", "no LoRA file named 'notes'"),
        ("a\x1b[2J", "no LoRA file named"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            named(f"<lora:{name}>")
        assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="not a folder"):
        PromptLoras(tmp_path / "outside.pt").look_up(TextToImage("<lora:x>", web_ui_prompts=True))
    with pytest.raises(ValueError, match="no such folder"):
        PromptLoras(tmp_path / "gone").look_up(TextToImage("<lora:x>", web_ui_prompts=True))


def test_the_folder_is_checked_even_if_no_prompt_names_a_file(generate):
    status, _, err, _ = generate("a cat", "--web-ui-prompts", "--lora-dir", "gone")
    assert status == 1 and err == ["error: --lora-dir gone: no such folder"]


def test_earlier_names_of_the_option(generate, capsys):
    for name in ("--weighted-prompts", "--long-prompts"):
        with pytest.raises(SystemExit) as stopped:
            generate("a cat", name)
        assert stopped.value.code == 2
        assert f"error: {name} is now --web-ui-prompts" in capsys.readouterr().err


def test_nothing_is_recorded_if_nothing_was_added(generate):
    _, _, _, text = generate("a cat")
    assert not {"Emphasis", "Long", "Lora", "TI", "Pad"} & set(text.replace(":", " ").split())


@pytest.mark.parametrize("program", [img2img, inpaint])
def test_other_programs(generate, program):
    pictures = ["--init-img", str(resource("data/sample.png"))]
    pictures += ["--mask", str(resource("data/sample-mask.png"))] if program is inpaint else []
    addons = ["--lora", "style.safetensors:0.5", "--embedding", "toy.pt", "--web-ui-prompts", "--clip-skip", "2"]
    status, _, err, text = generate("a (toy:1.5) BREAK cat", *pictures, *addons, program=program)
    assert (status, err) == (0, [])
    assert text.startswith("a (toy:1.5) BREAK cat <lora:style:0.5>\n")
    assert all(name in text for name in ("Lora hashes", "TI hashes", "Emphasis: Original", "Clip skip: 2"))


def test_words_that_the_embedded_model_does_not_know(generate):
    """Weights are no words."""
    embedded = ["--ckpt", str(resource("weights/pocket.safetensors"))]
    prompt = "a (red:1.2) [house:tree:0.5] BREAK snow AND a [meadow|tree] :0.5 <x:y>"
    status, _, err, _ = generate(prompt, "--web-ui-prompts", *embedded)
    assert status == 0 and err == ["warning: <x:y> is left out: tags of the kind 'x' are not known"]
    status, _, err, _ = generate("a house [tree:volcano:0.5]", "--web-ui-prompts", *embedded)
    assert status == 0 and "volcano" in err[0] and "does not know" in err[0]
    assert generate("a house volcano", *embedded)[2][0].startswith(
        "warning: this model does not know these words: volcano"
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--lora", "gone.safetensors:0.5"], "gone.safetensors: no such file"),
        (["--lora", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--lora", "style.safetensors:much"], "the weight 'much' is not a number"),
        (["--lora", "style.safetensors:nan"], "the weight 'nan' is not a number"),
        (["--lora", "style.safetensors", "--lora", "style.safetensors"], "'style' is merged already"),
        (["--lora", "toy.pt"], "an embedding with --embedding"),
        (["--lora", "tiny.safetensors"], "a checkpoint is given with --ckpt"),
        (["--embedding", "gone.pt"], "gone.pt: no such file"),
        (["--embedding", "toy.pt:"], "no word after the colon"),
        (["--embedding", "toy.pt", "--embedding", "toy.pt"], "'toy' is taken"),
        (["--embedding", "style.safetensors"], "a LoRA file with --lora"),
        (["--embedding", "tiny.safetensors"], "a checkpoint is given with --ckpt"),
        (["--negative", "# <lora:style:0.8>"], "--lora style.safetensors:0.8"),
        (["--web-ui-prompts", "--negative", "(a:1.2.3)"], "is not a number"),
        (["--web-ui-prompts", "--prompt", "a <lora:style>"], "give the folder of the file with --lora-dir"),
        (["--web-ui-prompts", "--prompt", " AND ".join("a" * 40)], "40 prompts are joined by AND"),
        (["--lora-dir", "mine"], "--lora-dir has no effect here"),
        (["--clip-skip", "0"], "clip_skip must be at least 1"),
        (["--clip-skip", "4"], "clip_skip must be from 1 (the last layer) to 3"),
    ],
)
def test_errors_are_one_line(generate, args, message):
    status, _, err, _ = generate(*([] if "--prompt" in args else ["a cat"]), *args)
    assert status == 1 and len(err) == 1 and err[0].startswith("error: ") and message in err[0]


def test_names_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b"):
        Path(name).touch()
    assert split_lora("a:0.5") == (Path("a:0.5"), 1.0) and split_lora("a:0.5:2") == (Path("a:0.5"), 2.0)
    assert split_lora("b:-.5") == (Path("b"), -0.5) and split_lora("b") == (Path("b"), 1.0)
    assert split_embedding("b:word") == (Path("b"), "word") and split_embedding("c:word") == (Path("c:word"), None)
    assert split_embedding("a:0.5") == (Path("a:0.5"), None)


def test_names_of_loras(generate, files, tmp_path):
    """NAME=FILE:WEIGHT; two files of one name; what has no effect is said, and the words that come along."""
    (files / "b").mkdir()
    lora = {f"{NAME}.lora_down.weight": torch.ones(2, 64), f"{NAME}.lora_up.weight": torch.ones(256, 2)}
    word = {"bundle_emb.toy2.string_to_param.*": torch.ones(2, 64)}
    save_file(lora | word | {"x.alpha": torch.ones(1)}, files / "b" / "style.safetensors")
    args = ["style.safetensors:0.5", "b/style.safetensors", "again=style.safetensors:-0.5"]
    status, out, err, text = generate("a toy2", *(x for arg in args for x in ("--lora", arg)))
    assert status == 0 and out[1:5] == [
        "LoRA style, weight 0.5", "LoRA style-2, weight 1", "LoRA again, weight -0.5", "embedding toy2, vectors: 2",
    ]  # fmt: skip
    assert len(err) == 1 and "style.safetensors: 1 of 4 tensors have no effect" in err[0]
    assert text.startswith("a toy2 <lora:style:0.5> <lora:style-2:1> <lora:again:-0.5>\n")


def test_names_before_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").touch()
    (tmp_path / "a=c:1").touch()
    assert split_name("a=b") == (None, "a=b") and split_name("a=b:0.5") == (None, "a=b:0.5")
    assert split_name("a=c:1") == (None, "a=c:1") and split_lora("a=c:1") == (Path("a=c:1"), 1.0)
    assert split_name("a=d:0.5") == ("a", "d:0.5") and split_name("x=a=b:2") == ("x", "a=b:2")
    assert split_name(r"style=C:\loras\x.safetensors:0.8") == ("style", r"C:\loras\x.safetensors:0.8")
    assert split_lora(r"C:\loras\x.safetensors:0.8") == (Path(r"C:\loras\x.safetensors"), 0.8)
    assert split_lora(r"C:\loras\x.safetensors") == (Path(r"C:\loras\x.safetensors"), 1.0)
    assert split_name(r"C:\a=b\x.safetensors") == (None, r"C:\a=b\x.safetensors")
    for text in ("=d", "a=", " =d"):
        with pytest.raises(ValueError, match="expected NAME=FILE"):
            split_name(text)

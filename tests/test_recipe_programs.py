"""Recipes of other programs, in the forms that people have: each with what it means there."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from sd import read_request
from sd.params import SamplingParams
from sd.recipes import read_parameters
from sd.recipes.comfyui import read_graph
from sd.recipes.comfyui_workflow import to_graph


def facts(recipe):
    """Everything that a recipe says, by name."""
    request = recipe.request
    found = {f.name: getattr(request, f.name) for f in fields(request)}
    found |= {f.name: getattr(request.params, f.name) for f in fields(SamplingParams)}
    found |= dict(recipe.task) | {"kind": recipe.kind, "model": recipe.model.name, "program": recipe.program}
    found |= {"loras": [tuple(lora) for lora in recipe.loras], "embeddings": [e.name for e in recipe.embeddings]}
    return found | {"prompt": request.prompt[0]}


def check(recipe, wanted, note):
    """The recipe has these values; and this word in its notes, or none if it is empty."""
    found = facts(recipe)
    assert {name: found.get(name) for name in wanted} == wanted
    notes = " ".join(recipe.notes)
    assert note in notes if note else notes == ""
    assert all(line.isprintable() for line in recipe.notes)


# ------------------------------------------------------------------------------------------------ the web UI's text

SIZE = "CFG scale: 7, Seed: 5, Size: 512x768"


def web(sampler="Euler a", more="", prompt="a cat"):
    return f"{prompt}\nNegative prompt: dog\nSteps: 20, Sampler: {sampler}, {SIZE}{more}"


RESOURCES = (
    ', Civitai resources: [{"type":"checkpoint","modelVersionId":1,"modelName":"Shaper"},'
    '{"type":"lora","weight":0.7,"modelVersionId":2,"modelName":"More, detail"},'
    '{"type":"embed","modelVersionId":3,"modelName":"easy"}], Civitai metadata: {}'
)
FIRST = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Denoising strength: 0.7, Size: "
SDNEXT = "a (cat)\nSteps: 20, Seed: 5, CFG scale: 6, Size: 64x64, App: SD.Next, Version: 9c8c2e4, Operations: txt2img"
# fmt: off
TEXTS = {
    "grids in the names of ComfyUI": (web("euler_simple"), {"sampler": "euler", "spacing": "trailing"}, ""),
    "a grid in another case": (web("Euler Simple"), {"sampler": "euler", "spacing": "trailing"}, ""),
    "any grid after a name": (web("euler_ddim"), {"sampler": "euler", "spacing": "leading"}, ""),
    "a grid that is not here": (web("euler_beta"), {"sampler": "euler"}, "grid beta is not available"),
    "a grid of two words": (web("dpmpp_2m_sgm_uniform"), {"sampler": "dpmpp_2m", "spacing": "sgm"}, "close"),
    "gpu and grid": (web("dpmpp_2m_sde_gpu_karras"), {"sampler": "dpmpp_2m_sde", "spacing": "karras"}, "Brownian"),
    "names of SD.Next": (web("KDPM2 a"), {"sampler": "dpm2_a"}, ""),
    "another name of SD.Next": (web("DPM2++ 2M"), {"sampler": "dpmpp_2m"}, ""),
    "DDIM has its own grid": (web("DDIM", ", Schedule type: Karras, Version: v1.10.1"), {"spacing": "leading"}, ""),
    "UniPC, too": (web("UniPC", ", Schedule type: Karras, Version: f2.0.1v1.10.1"), {"spacing": "linspace"}, ""),
    "but not in ComfyUI": (web("ddim", ", Schedule type: karras, Version: ComfyUI"), {"spacing": "karras"}, ""),
    "LCM in the web UI": (web("LCM"), {"sampler": "lcm", "spacing": "linspace"}, "linspace is close"),
    "and with a grid": (
        web("LCM", ", Schedule type: SGM Uniform, Version: v1.10.1"), {"sampler": "lcm", "spacing": "sgm"},
        "grid SGM Uniform: sgm is close",
    ),
    "LCM with a grid in its name": (web("LCM Karras"), {"sampler": "lcm", "spacing": "karras"}, ""),
    "LCM in SD.Next": (web("LCM", ", App: SD.Next"), {"sampler": "lcm"}, "SD.Next writes no RNG"),
    "TCD in SD.Next": (web("TCD", ", App: SD.Next"), {"sampler": "tcd"}, "SD.Next writes no RNG"),
    "LCM in stable-diffusion.cpp": (
        web("lcm", ", Version: stable-diffusion.cpp"), {"sampler": "lcm", "spacing": None}, "",
    ),
    "LCM in Fooocus": (
        web("lcm", ", Scheduler: lcm, Version: Fooocus v2.5.0"), {"sampler": "lcm", "spacing": "lcm"},
        "grid lcm: lcm is close, but not the same",
    ),
    "the API's strength": (web(more=", Denoising strength: 0"), {"kind": "txt2img"}, ""),
    "a strength of 0": (web(more=", Init image hash: a, Denoising strength: 0"), {"kind": "img2img"}, ""),
    "first pass": (f"{FIRST}1280x896, First pass size: 640x448", {"width": 640, "height": 448, "hires": 2.0}, ""),
    "chosen first pass": (f"{FIRST}1024x1024, First pass size: 0x0", {"width": 512, "height": 512, "hires": 2.0}, ""),
    "chosen, another shape": (f"{FIRST}1024x768, First pass size: 0x0", {"width": 640, "height": 448}, "another shape"),
    "one side of hires": (
        web(more=", Denoising strength: 0.5, Hires resize: 1024x0, Hires upscaler: Lanczos"), {"hires": 2.0}, "",
    ),
    "hires with the same settings": (
        web(more=", Denoising strength: 0.5, Hires upscale: 2, Hires CFG Scale: 7, Hires sampler: Euler a"),
        {"hires": 2.0}, "",
    ),
    "hires with its own": (
        web(more=', Denoising strength: 0.5, Hires upscale: 2, Hires CFG Scale: 5, Hires prompt: "a, b: c"'),
        {"hires": 2.0}, "hires cfg scale, hires prompt",
    ),
    "clip skip of others": (web(more=", Clip skip: -1"), {"clip_skip": None}, ""),
    "hashes": (
        web(more=', Hashes: {"model": "abcdef0123", "lora:a": "123456789abc"}', prompt="a cat <lora:a:0.8>"),
        {"loras": [("a", 0.8, "123456789abc")]}, "",
    ),
    "hashes under a path": (
        web(more=', Lora hashes: "styles/ink: abcdef012345"', prompt="a cat <lora:styles/ink:1>"),
        {"loras": [("ink", 1.0, "abcdef012345")]}, "",
    ),
    "JSON hashes under a path": (
        web(more=', Hashes: {"lora:styles/ink": "abcdef012345", "embed:b/c": "abcdef"}, TI: c', prompt="<lora:ink>"),
        {"loras": [("ink", 1.0, "abcdef012345")], "embeddings": ["c"]}, "",
    ),
    "many resources": (
        web(more=f", Civitai resources: {json.dumps([{'type': 'lora', 'modelName': f'{i}'} for i in range(120)])}"),
        {"model": ""}, "only the first 100 of its 120 Civitai resources",
    ),
    "resources": (
        web(more=RESOURCES), {"loras": [("More, detail", 0.7, "")], "model": "Shaper", "embeddings": ["easy"]}, "",
    ),
    "resources and tags": (web(more=RESOURCES, prompt="a <lora:x:0.5>"), {"loras": [("x", 0.5, "")]}, ""),
    "used embeddings": (
        web(more="\nUsed embeddings: bad-5 [abcd], easy [1234]"), {"embeddings": ["bad-5", "easy"]}, "",
    ),
    "one LoRA twice": (web(prompt="<lora:x:0.5> <lora:x:0.25>"), {"loras": [("x", 0.75, "")], "prompt": ""}, ""),
    "LoRAs of Fooocus": (
        web("DPM++ 2M", ', Scheduler: karras, Lora hashes: "x: 48526861", Lora weights: "x: 0.1", Styles: "[]", '
            'Version: Fooocus v2.5.0'),
        {"loras": [("x", 0.1, "48526861")], "spacing": "karras", "rng": "comfy"}, "",
    ),
    "LoRAs without a tag": (web(more=', Lora hashes: "x: 48526861"'), {"loras": []}, "the LoRAs x, which no tag"),
    "a grid of sd.cpp": (web("euler_a discrete", ", RNG: cuda"), {"sampler": "euler_a", "spacing": "linspace"}, ""),
    "no name": (web(prompt="a <lora::1> cat"), {"loras": [], "prompt": "a  cat"}, "without a name"),
    "block weights": (
        web(prompt=f"a cat <lora:x:1:lbw={'0.25,' * 16}1>"), {"loras": [("x", 1.0, "")], "prompt": "a cat"}, "several",
    ),
    "no weight": (web(prompt="a <lora:x:high>"), {"loras": [("x", 1.0, "")]}, "not a number"),
    "a size in other signs": (web().replace("512x768", "512 × 768"), {"width": 512, "height": 768}, ""),
    "another order": (
        "a cat\nNegative prompt: dog\nCFG scale: 7, Seed: 5, Sampler: Euler a, Steps: 20, Size: 512x768",
        {"negative": "dog", "steps": 20, "guidance": 7.0, "seed": 5}, "",
    ),
    "a template of lines": (
        web(more="\nTemplate: a {cat|dog}\nb, Seed: 99\nNegative Template: x\nSteps: 3"),
        {"negative": "dog", "seed": 5, "steps": 20}, "",
    ),
    "in one line": (web().replace("\n", " "), {"prompt": "a cat", "negative": "dog", "steps": 20}, ""),
    "a sampler's own spacing": (f"{SDNEXT}, Sampler: Euler, Sampler spacing: trailing", {"spacing": "trailing"}, "RNG"),
    "brackets as text": (f"{SDNEXT}, Sampler: Euler, Parser: Fixed attention", {"web_ui_prompts": False}, "RNG"),
    "another parser": (f"{SDNEXT}, Sampler: Euler, Parser: Compel parser", {}, "Compel"),
}
# fmt: on


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_the_web_ui_and_its_kin(name):
    text, wanted, note = TEXTS[name]
    check(read_parameters(text), wanted, note)


# ---------------------------------------------------------------------------------------------------------- ComfyUI


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


SAMPLING = {"seed": 7, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
GRAPH = {
    "3": node("KSampler", **SAMPLING, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
    "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.ckpt"),
    "5": node("EmptyLatentImage", width=512, height=640, batch_size=1),
    "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="dog", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", images=["8", 0]),
}


def graph(**changed):
    """The graph with other nodes (n4=node(...)), without some (n4=None), or with other inputs (n3={...})."""
    nodes = {key: {**found, "inputs": dict(found["inputs"])} for key, found in GRAPH.items()}
    for key, change in changed.items():
        if change is None:
            del nodes[key[1:]]
        elif "class_type" in change:
            nodes[key[1:]] = change
        else:
            nodes[key[1:]]["inputs"] |= change
    return nodes


WEIGHTS = {"lora_name": "None", "lora_model_strength": 0.7, "lora_clip_strength": 0.7}
LOADER = {"ckpt_name": "v1-5.ckpt", **WEIGHTS, "positive": "a bird", "negative": "ugly", "clip_skip": -2}
LOADER |= {"empty_latent_width": 512, "empty_latent_height": 768, "batch_size": 1}


def efficient(**inputs):
    links = {"model": ["4", 0], "positive": ["4", 1], "negative": ["4", 2], "latent_image": ["4", 3]}
    return graph(
        n3=node("KSampler (Efficient)", **SAMPLING, **links), n4=node("Efficient Loader", **LOADER | inputs),
        n5=None, n6=None, n7=None, n8=None, n9={"images": ["3", 5]},
    )  # fmt: skip


def with_model(**nodes):
    """The graph with a node 30 between checkpoint and sampler."""
    return graph(n3={"model": ["30", 0]}, n6={"clip": ["30", 1]}, n7={"clip": ["30", 1]}, **nodes)


def with_text(text, **nodes):
    return graph(n6={"text": text}, **nodes)


POWER = {"lora_1": {"on": True, "lora": "a\\ink.pt", "strength": 0.8}, "lora_2": {"on": False, "lora": "b"}}
STACK = {"input_mode": "simple", "lora_count": 1, "lora_name_1": "a.pt", "lora_wt_1": 0.5, "lora_name_2": "b.pt"}
CR = {"switch_1": "On", "lora_name_1": "a.pt", "model_weight_1": 0.5, "switch_2": "Off", "lora_name_2": "b.pt"}
SECOND = SAMPLING | {"seed": 9, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}
CONTROL = {"positive": ["6", 0], "negative": ["7", 0], "control_net": ["41", 0], "image": ["42", 0]}
CUSTOM = {"noise_seed": 3, "cfg": 5, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}
CUSTOM |= {"sampler": ["60", 0], "sigmas": ["61", 0], "latent_image": ["5", 0]}
BOTH = {"prompt": "a cat", "negative": "dog"}
# fmt: off
GRAPHS = {
    "efficient": (
        efficient(), {"prompt": "a bird", "negative": "ugly", "height": 768, "clip_skip": 2, "loras": []}, "",
    ),
    "efficient with a LoRA": (efficient(lora_name="ink.pt"), {"loras": [("ink", 0.7, "")], "model": "v1-5"}, ""),
    "efficient with a stack": (
        efficient(lora_stack=["31", 0]) | {"31": node("LoRA Stacker", **STACK)}, {"loras": [("a", 0.5, "")]}, "",
    ),
    "power loader": (
        with_model(n30=node("Power Lora Loader (rgthree)", **POWER, model=["4", 0], clip=["4", 1])),
        {"loras": [("ink", 0.8, "")], "model": "v1-5"}, "",
    ),
    "rows": (
        with_model(n30=node("Lora Loader Stack (rgthree)", lora_01="a.pt", strength_01=0.5, model=["4", 0])),
        {"loras": [("a", 0.5, "")]}, "",
    ),
    "a stack with switches": (
        with_model(
            n30=node("CR Apply LoRA Stack", model=["4", 0], clip=["4", 1], lora_stack=["31", 0]),
            n31=node("CR LoRA Stack", **CR),
        ),
        {"loras": [("a", 0.5, "")]}, "",
    ),
    "wrapped names": (graph(n4=node("CheckpointLoader|pysssss", ckpt_name={"content": "m.pt"})), {"model": "m"}, ""),
    "only the U-Net": (
        graph(
            n3={"model": ["30", 0]},
            n30=node("LoraLoaderModelOnly", lora_name="a.pt", strength_model=0.5, model=["4", 0]),
        ),
        {"loras": [("a", 0.5, "")]}, "weight 0.0 for the text encoder",
    ),
    "only the text encoder": (
        graph(n6={"clip": ["30", 1]}, n30=node("LoraLoader", lora_name="a.pt", strength_model=1, clip=["4", 1])),
        {"loras": []}, "LoRA a changes only the text encoder",
    ),
    "a text and its side": (
        graph(
            n6={"text": ["40", 0]}, n7={"text": ["40", 1]},
            n40=node("SDXLPromptStyler", text_positive="a bird", text_negative="ugly", style="base"),
        ),
        {"prompt": "a bird", "negative": "ugly"}, "",
    ),
    "texts put together": (
        with_text(
            ["40", 0], n40=node("StringConcatenate", string_a="a bird", string_b=["41", 0], delimiter="\\n"),
            n41=node("CR Prompt Text", prompt="a tree"),
        ),
        {"prompt": "a bird\na tree"}, "",
    ),
    "a wildcard": (
        with_text(["40", 0], n40=node("ImpactWildcardProcessor", wildcard_text="{x|y}", populated_text="y", seed=1)),
        {"prompt": "y"}, "",
    ),
    "tags that are read": (
        graph(
            n3={"positive": ["40", 2]},
            n40=node("ImpactWildcardEncode", populated_text="a <lora:ink:0.7>", model=["4", 0], clip=["4", 1]),
        ),
        {"prompt": "a", "loras": [("ink", 0.7, "")]}, "",
    ),
    "tags that are text": (with_text("a cat <lora:ink:0.5>"), {"prompt": "a cat", "loras": []}, "are text in ComfyUI"),
    "other syntax": (with_text("salt AND pepper"), {"prompt": "salt AND pepper"}, "AND"),
    "a control network": (
        graph(n3={"positive": ["40", 0], "negative": ["40", 1]}, n40=node("ControlNetApplyAdvanced", **CONTROL)),
        BOTH, "ControlNetApplyAdvanced",
    ),
    "a detailer": (
        graph(n9={"images": ["60", 0]}, n60=node("FaceDetailer", image=["8", 0], **SECOND)),
        {"seed": 7, "kind": "txt2img"}, "a later pass is not reproduced",
    ),
    "an enlarged image": (
        graph(n9={"images": ["60", 0]}, n60=node("ImageUpscaleWithModel", image=["8", 0])),
        BOTH, "the nodes ImageUpscaleWithModel",
    ),
    "a mask": (
        graph(
            n3={"latent_image": ["52", 0]}, n52=node("SetLatentNoiseMask", samples=["50", 0]),
            n50=node("VAEEncode", pixels=["51", 0]), n51=node("LoadImage", image="a.png"), n5=None,
        ),
        {"kind": "inpaint"}, "",
    ),
    "zeros beside a text": (
        graph(
            n3={"positive": ["40", 0]}, n41=node("ConditioningZeroOut", conditioning=["7", 0]),
            n40=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["41", 0]),
        ),
        BOTH, "the positive prompt has a part of zeros",
    ),
    "zeros": (graph(n3={"negative": ["41", 0]}, n41=node("ConditioningZeroOut", conditioning=["6", 0])),
        {"prompt": "a cat", "negative": ""}, ""),
    "layers of two prompts": (
        graph(
            n6={"clip": ["40", 0]}, n40=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["30", 1]),
            n7={"clip": ["41", 0]}, n41=node("CLIPSetLastLayer", stop_at_clip_layer=-3, clip=["31", 1]),
            n30=node("LoraLoader", lora_name="a.pt", strength_model=1, clip=["4", 1]),
            n31=node("LoraLoader", lora_name="b.pt", strength_model=1, clip=["4", 1]),
        ),
        {"clip_skip": 2, "loras": []}, "LoRA b changes only the text encoder",
    ),
    "many LoRAs": (
        with_model(n30=node("X", **{f"lora_{i}": "a" for i in range(1, 121)}, model=["4", 0], clip=["4", 1])),
        {"model": "v1-5"}, "only the first 100 of its 120 LoRAs",
    ),
    "another grid": (
        graph(
            n3=node("SamplerCustom", **CUSTOM), n60=node("SamplerEulerAncestral", eta=1.0),
            n61=node("AlignYourStepsScheduler", steps=10),
        ),
        {"sampler": "euler_a", "steps": 10, "seed": 3}, "grid AlignYourStepsScheduler is not available",
    ),
    "LCM": (
        graph(
            n3={"model": ["30", 0], "sampler_name": "lcm", "scheduler": "simple", "steps": 4},
            n30=node("ModelSamplingDiscrete", sampling="lcm", zsnr=False, model=["4", 0]),
        ),
        {"sampler": "lcm", "spacing": "lcm", "steps": 4}, "",
    ),
    "LCM with another grid": (
        graph(
            n3={"model": ["30", 0], "sampler_name": "lcm", "scheduler": "sgm_uniform"},
            n30=node("ModelSamplingDiscrete", sampling="lcm", zsnr=False, model=["4", 0]),
        ),
        {"sampler": "lcm", "spacing": "lcm"}, "grid sgm_uniform: lcm is close, but not the same",
    ),
    "other timesteps": (
        graph(
            n3={"model": ["30", 0], "sampler_name": "lcm", "scheduler": "sgm_uniform"},
            n30=node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=False, model=["4", 0]),
        ),
        {"sampler": "lcm", "spacing": "sgm"}, "not reproduced: the nodes ModelSamplingDiscrete",
    ),
    "TCD": (
        graph(
            n3=node("SamplerCustom", **CUSTOM | {"model": ["60", 0], "sampler": ["60", 1], "sigmas": ["60", 2]}),
            n60=node("TCDModelSamplingDiscrete", steps=4, scheduler="simple", denoise=1.0, eta=0.8, model=["4", 0]),
        ),
        {"sampler": "tcd", "spacing": "lcm", "steps": 4, "options": {"gamma": 0.8}, "model": "v1-5"}, "",
    ),
    "saved by another node": (graph(n9=node("Image Save", images=["8", 0])), BOTH, ""),
    "two samplers of one image": (
        graph(n10=node("SaveImage", images=["8", 0]), n11=node("PreviewImage", images=["8", 0])), {"seed": 7}, "",
    ),
}
# fmt: on


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name):
    nodes, wanted, note = GRAPHS[name]
    check(read_graph(nodes), wanted, note)


def item(key, kind, inputs=(), outputs=(), values=(), mode=0):
    slots = [{"name": name, "type": kind_, "link": link} for name, kind_, link in inputs]
    return {
        "id": key, "type": kind, "mode": mode, "inputs": slots, "outputs": [{"type": name} for name in outputs],
        "widgets_values": list(values),
    }  # fmt: skip


def test_a_workflow_of_the_editor(tmp_path):
    """A reroute, values from other nodes, a bypassed LoRA, a muted node, and links in both forms."""
    lora = ("MODEL", "CLIP")
    nodes = [
        item(4, "CheckpointLoaderSimple", (), ("MODEL", "CLIP", "VAE"), ["v1-5.ckpt"]),
        item(10, "LoraLoader", (("model", "MODEL", 1), ("clip", "CLIP", 2)), lora, ["ink.pt", 0.5, 0.5], mode=4),
        item(11, "LoraLoader", (("model", "MODEL", 3), ("clip", "CLIP", 4)), lora, ["oil.pt", 0.25, 0.25]),
        item(12, "CLIPSetLastLayer", (("clip", "CLIP", 5),), ("CLIP",), [-2]),
        item(13, "Reroute", (("", "*", 6),), ("CLIP",)),
        item(6, "CLIPTextEncode", (("clip", "CLIP", 7),), ("C",), ["a cat"]),
        item(7, "CLIPTextEncode", (("clip", "CLIP", 7), ("text", "STRING", 16)), ("C",), ["an old text"]),
        item(5, "EmptyLatentImage", (), ("LATENT",), [512, 640, 1]),
        item(
            3, "KSampler",
            (("model", "MODEL", 8), ("positive", "C", 9), ("negative", "C", 10), ("latent_image", "L", 11),
             ("seed", "INT", 17)),
            ("LATENT",), [7, "randomize", 20, 8.0, "euler", "karras", 1.0],
        ),
        item(8, "VAEDecode", (("samples", "LATENT", 12), ("vae", "VAE", 13)), ("IMAGE",)),
        item(9, "SaveImage", (("images", "IMAGE", 14),), (), ["x"]),
        item(20, "SaveImage", (("images", "IMAGE", 14),), (), ["y"], mode=2),
        item(21, "PrimitiveNode", (), ("STRING",), ["dog"]),
        item(22, "PrimitiveNode", (), ("INT",), [77, "fixed"]),
    ]  # fmt: skip
    sources = {1: (4, 0), 2: (4, 1), 3: (10, 0), 4: (10, 1), 5: (11, 1), 6: (12, 0), 7: (13, 0), 8: (11, 0), 9: (6, 0)}
    sources |= {10: (7, 0), 11: (5, 0), 12: (3, 0), 13: (4, 2), 14: (8, 0), 16: (21, 0), 17: (22, 0)}
    lists = [[key, *source, 0, 0, "X"] for key, source in sources.items()]
    objects = [{"id": key, "origin_id": a, "origin_slot": b} for key, (a, b) in sources.items()]
    wanted = BOTH | {"seed": 77, "steps": 20, "spacing": "karras", "height": 640, "clip_skip": 2, "model": "v1-5"}
    for links in (lists, objects):
        check(read_graph(to_graph({"nodes": nodes, "links": links})), wanted | {"loras": [("oil", 0.25, "")]}, "")
    (tmp_path / "a.json").write_text(json.dumps({"nodes": nodes, "links": lists}))
    (tmp_path / "b.json").write_text(json.dumps({"prompt": GRAPH, "client_id": "x"}))  # as it is sent to ComfyUI
    assert [read_request(tmp_path / name).request.params.seed for name in ("a.json", "b.json")] == [77, 7]
    with pytest.raises(ValueError, match="nodes"):
        to_graph({"nodes": [item(i, "A") for i in range(6000)]})


@pytest.mark.parametrize(("negative", "output", "wanted"), [(2, 1, "dog"), (None, 1, ""), (2, -5, "")])
def test_a_bypassed_node_passes_each_input_on_to_its_own_output(negative, output, wanted):
    """Both inputs of a ControlNetApplyAdvanced are of one type, as are its outputs."""
    slots = (("positive", "CONDITIONING", 1), ("negative", "CONDITIONING", negative), ("control_net", "C", None))
    nodes = [
        item(6, "CLIPTextEncode", (), ("CONDITIONING",), ["a cat"]),
        item(7, "CLIPTextEncode", (), ("CONDITIONING",), ["dog"]),
        item(8, "ControlNetApplyAdvanced", slots, ("CONDITIONING",) * 2, [1.0], mode=4),
        item(
            3, "KSampler", (("positive", "CONDITIONING", 3), ("negative", "CONDITIONING", 4)), ("LATENT",),
            [7, "fixed", 20, 8.0, "euler", "karras", 1.0],
        ),
        item(9, "SaveImage", (("images", "IMAGE", 5),)),
    ]  # fmt: skip
    links = [[1, 6, 0, 8, 0, "C"], [2, 7, 0, 8, 1, "C"], [3, 8, 0, 3, 0, "C"], [4, 8, output, 3, 1, "C"]]
    recipe = read_graph(to_graph({"nodes": nodes, "links": [*links, [5, 3, 0, 9, 0, "I"]]}))
    assert (recipe.request.prompt, recipe.request.negative) == (("a cat",), wanted)


def test_texts_that_contain_each_other_take_no_time():
    """Each node has the next one twice: 2 ** 60 texts; and one has itself in all places."""
    chain = {
        str(100 + i): node("StringConcatenate", string_a=[str(101 + i), 0], string_b=[str(101 + i), 0], delimiter="")
        for i in range(60)
    }
    itself = node("Join", **{key: ["160", 0] for key in ("text_a", "text_b", "delimiter", "value")})
    recipe = read_graph(with_text(["100", 0]) | chain | {"160": itself})
    assert (recipe.request.prompt, recipe.request.params.seed) == (("",), 7)

"""What fuzz_recipes.py puts together and damages: parts of texts, and valid settings of the programs."""

from __future__ import annotations

import html
import json
from typing import Any

PARTS = (
    "a cat", "Negative prompt:", "Negative prompt: b", "\n", "\n", ", ", ": ", '"', "\\", "{", "}", "[", "]",
    "Steps: 20",
    "Sampler: Euler a", "Sampler: DPM++ 2M Karras", "Schedule type: Karras", "CFG scale: 7", "Seed: 5", "Size: 512x768",
    "Size: 1x1", "Model: m", "Model hash: 45dee52b", "Clip skip: 2", "ENSD: 31337", "RNG: CPU", "RNG: NV", "Eta: 0.5",
    "Hires upscale: 2", "Hires resize: 0x0", "Denoising strength: 0.5", "First pass size: 0x0", "Tiling: True",
    "Variation seed: 1", "Variation seed strength: 0.5", "Version: sd 1", "Version: v1.9", "App: SD.Next",
    "Batch size: 4",
    "Batch pos: 3", 'Lora hashes: "a: b, c: d"', 'Hashes: {"model": "ab"}', "Template: x", "<lora:a:0.5>",
    "<lora:a:1e99>",
    "Mask blur: 4", "Masked content: original", "Inpaint area: Only masked", "Masked area padding: -1", "1e999", "nan",
    "-1", "99999999999999999999", "0", "\0", "\x1b[31m", "é", "東京", "\u202e", 'Prompt: "x"',
    "Generated size: 8xauto",
    "Emphasis: None", "Web UI prompts: True", "Long prompts: on", "TI: x, y", "Steps: ", "Hires upscaler: Latent",
    'ControlNet 0: "Module: canny, Model: a [0123abcd], Weight: 1, Control Mode: 2, Threshold A: 300"',
    'ControlNet 12: "preprocessor: x, model: b, starting/ending: (0.5, 0.2)"', "ControlNet Model: c",
    "ControlNet Weight: nan", "ControlNet-3 Model: d(12345678)", 'Control hints: "a [12], ] [b], c"',
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**64, 10**300, 1.5, -0.0, 1e308, "", "a", "1", "x" * 300, "\x1b[2J\n", [], {}, [1],
    ["3", 0],
    ["4", 1], ["9", 0], [["1", 2], 3], {"a": 1}, "karras", "euler", "../a.safetensors", "(768, 1280)", float("nan"),
    "\ud800",
)  # fmt: skip
CLASSES = (
    "KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "CLIPTextEncode", "CLIPSetLastLayer", "LoraLoader",
    "VAEDecode",
    "EmptyLatentImage", "LatentUpscale", "LatentComposite", "SaveImage", "VAEEncode", "CheckpointLoaderSimple",
    "RandomNoise",
    "BasicScheduler", "CFGGuider", "KSamplerSelect", "ConditioningCombine", "ConditioningZeroOut", "X", "RescaleCFG",
)  # fmt: skip
GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7, "steps": 20, "cfg": 8.0, "sampler_name": "euler_ancestral", "scheduler": "normal",
    "denoise": 1.0,
            "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (cat:1.2)", "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "a", "strength_model": 0.5, "strength_clip": 1.0,
    "model": ["4", 0]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["4", 1]}},
}  # fmt: skip
FOOOCUS = {
    "prompt": "a", "negative_prompt": "b", "steps": 30, "guidance_scale": 4, "sampler": "dpmpp_2m_sde_gpu",
    "clip_skip": 2,
    "scheduler": "karras", "seed": "6952411511246973023", "resolution": "(768, 1280)", "loras": [["ink", 0.1, "ab"]],
    "base_model": "m", "base_model_hash": "ae", "version": "Fooocus v2", "styles": "[]", "refiner_model": "None",
}  # fmt: skip
INVOKE = {
    "app_version": "3.0", "positive_prompt": "a", "negative_prompt": "b", "scheduler": "dpmpp_2m_k", "seed": 3,
    "steps": 9,
    "cfg_scale": 6.5, "width": 64, "height": 128, "rand_device": "cpu", "clip_skip": 1, "seamless_x": True,
    "model": {"model_name": "m", "hash": "sha256:ab"}, "loras": [{"lora": {"model_name": "ink"}, "weight": 0.8}],
    "generation_mode": "img2img", "strength": 0.5,
}  # fmt: skip
OLD = {
    "app_version": "2",
    "image": {"prompt": [{"prompt": "a [b]", "weight": 1}], "steps": 5, "sampler": "ddim", "width": 64},
}
DREAM = '"a [b] c" -s 50 -S 29 -W 512 -H 768 -C 5 -A k_lms -G 0.9 -U 4 0.95 --seamless'
LINKS = {"model": ["4", 0], "clip": ["4", 1], "positive": ["6", 0], "negative": ["7", 0], "image": ["8", 0]}
SAMPLING = {"seed": 7, "steps": 20, "cfg": 8.0, "sampler_name": "euler_simple", "scheduler": "beta", "denoise": 0.5}
LOADER = {
    "ckpt_name": "a.pt", "clip_skip": -2, "lora_name": "b", "lora_model_strength": 0.5, "positive": "a (b)",
    "negative": ["20", 0], "empty_latent_width": 512, "empty_latent_height": 512, "batch_size": 2,
    "lora_stack": ["21", 0],
}  # fmt: skip
NODES: list[tuple[str, dict[str, Any]]] = [
    ("Efficient Loader", LOADER),
    ("KSampler (Efficient)", {**SAMPLING, "model": ["20", 0], "positive": ["20", 1], "pipe": ["21", 0]}),
    ("FaceDetailer", SAMPLING | LINKS),
    ("ControlNetApplyAdvanced", LINKS),
    ("Power Lora Loader (rgthree)", LINKS | {"lora_1": {"on": True, "lora": "a", "strength": 0.5, "strengthTwo": 1}}),
    ("LoRA Stacker", {"input_mode": "simple", "lora_count": 3, "lora_name_1": "a", "lora_wt_1": 0.5, "lora_02": "b"}),
    ("LoraManager", LINKS | {"loras": {"__value__": [{"name": "a", "strength": "0.5", "active": True}]}}),
    ("Text Concatenate", {"text_a": ["20", 0], "text_b": "b", "delimiter": ["21", 0]}),
    ("StringConcatenate", {"string_a": "a", "string_b": ["21", 0], "delimiter": "\\n"}),
    ("ImpactWildcardEncode", LINKS | {"populated_text": "a <lora:x:0.5> <lora::1>", "wildcard_text": ["20", 0]}),
    ("SDXLPromptStyler", {"text_positive": "a", "text_negative": ["21", 0], "style": "x"}),
    ("SamplerEulerAncestral", {"eta": 0.5}),
    ("SDXLEmptyLatentSizePicker+", {"resolution": "512x512 (1.0)", "batch_size": 1}),
]
WORKFLOW = {
    "nodes": [
        {"id": 3, "type": "KSampler", "mode": 0, "widgets_values": [7, "fixed", 20, 8.0, "euler", "karras", 1.0],
         "inputs": [{"name": "positive", "type": "C", "link": 1}, {"name": "model", "type": "MODEL", "link": 2},
                    {"name": "latent_image", "type": "L", "link": 3}]},
        {"id": 6, "type": "CLIPTextEncode", "mode": 0, "widgets_values": ["a cat"],
         "inputs": [{"name": "text", "link": 4, "widget": {"name": "text"}}]},
        {"id": 4, "type": "LoraLoader", "mode": 4, "inputs": [{"name": "model", "type": "MODEL", "link": 5}],
         "outputs": [{"type": "MODEL"}], "widgets_values": ["a", 0.5, 0.5]},
        {"id": 2, "type": "CheckpointLoaderSimple", "mode": 0, "outputs": [{"type": "MODEL"}], "widgets_values": ["m"]},
        {"id": 5, "type": "EmptyLatentImage", "mode": 0, "widgets_values": [512, 512, 1]},
        {"id": 8, "type": "PrimitiveNode", "mode": 0, "widgets_values": ["a dog"]},
        {"id": 10, "type": "GetNode", "widgets_values": ["x"]},
        {"id": 11, "type": "SetNode", "widgets_values": ["x"], "inputs": [{"name": "*", "link": 2}]},
        {"id": 9, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "type": "I", "link": 6}]},
        {"id": 12, "type": "Power Lora Loader (rgthree)", "widgets_values": [{}, {"on": True, "lora": "a"}]},
        {"id": 13, "type": "Other", "inputs": [{"name": "seed", "widget": {"name": "seed"}}], "widgets_values": [1]},
    ],
    "links": [[1, 6, 0, 3, 0, "C"], [2, 4, 0, 3, 0, "MODEL"], [3, 5, 0, 3, 0, "L"], [4, 8, 0, 6, 0, "S"],
              [5, 2, 0, 4, 0, "MODEL"], {"id": 6, "origin_id": 3, "origin_slot": 0}],
}  # fmt: skip
NOVEL = {"steps": 28, "sampler": "k_euler", "seed": 5, "scale": 11.0, "uc": "b", "noise_schedule": "karras"}
NOVEL |= {"width": 64, "height": 64, "request_type": "Img2ImgRequest", "strength": 0.5, "sm": True, "cfg_rescale": 0.1}
EASY = {"prompt": "a", "negative_prompt": "b", "seed": 5, "num_inference_steps": 25, "guidance_scale": 7.5, "width": 64}
EASY |= {"use_lora_model": ["a", "b"], "lora_alpha": [0.5, 1], "clip_skip": True, "tiling": "xy", "init_image": "x"}
DRAW = {
    "c": "a",
    "uc": "b",
    "seed": 5,
    "steps": 25,
    "scale": 7,
    "sampler": "DDIM Trailing",
    "size": "64x64",
    "lora": [],
}
DRAW |= {"strength": 0.5, "seed_mode": "Scale Alike", "v2": {"clipSkip": 2, "loras": [{"file": "a", "weight": 1}]}}
SWARM = {"prompt": "a", "negativeprompt": "b", "seed": 5, "steps": 9, "cfgscale": 7, "width": 64, "height": 64}
SWARM |= {"loras": ["a"], "loraweights": ["1"], "clipstopatlayer": "-2", "initimagecreativity": 0.5, "sampler": "ddim"}
RESOURCES = [{"type": "lora", "modelName": "a", "weight": 0.5}, {"type": "checkpoint", "modelVersionId": 1}]


def xmp(body: str) -> str:
    """The packet that Draw Things writes."""
    return f'<exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{html.escape(body)}</rdf:li></rdf:Alt>'


# keyword of a PNG text, or the name of a file -> values, and how they are written there
TEXTS: list[tuple[str, Any, Any]] = [
    ("workflow", WORKFLOW, json.dumps),
    ("a.json", WORKFLOW, json.dumps),
    ("a.json", EASY, json.dumps),
    ("Comment", NOVEL, json.dumps),
    ("parameters", DRAW, json.dumps),
    ("XML:com.adobe.xmp", DRAW, lambda values: xmp(json.dumps(values))),
    ("parameters", {"sui_image_params": SWARM}, json.dumps),
    ("parameters", RESOURCES, lambda values: f"a\nSteps: 1, Seed: 2, Civitai resources: {json.dumps(values)}, A: 1"),
]

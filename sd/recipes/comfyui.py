"""ComfyUI's graph of an image: the "prompt" of its file, node -> class and inputs, where [node, output] is a link.

The walk goes from the node that saves the image up through links, first to its sampler and from there to the noise,
the model and the two prompts:

    SaveImage <- VAEDecode <- KSampler <- latent_image  EmptyLatentImage, VAEEncode, or another sampler
                                       <- model         LoraLoader <- ... <- CheckpointLoaderSimple
                                       <- positive      CLIPTextEncode <- clip  CLIPSetLastLayer

If several samplers follow each other, the recipe is that of the first, and the others are notes: they refine or enlarge
its image. So are nodes on the way that are unknown here. Every walk visits a node once, so a graph may have cycles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..messages import one_line
from ..schedule import ALL_STEPS
from .comfyui_nodes import DRAWN, MAX_NODES, PIPES, TEXTS, Entry, Node, is_link, lora_entries, plain, reads_tags
from .comfyui_xl import EMPTY_NEGATIVE, ENCODERS, SECOND, continued_at, read_encoder, read_refiner, read_texts
from .containers import MAX_TEXT
from .infotext import loras_in
from .recipe import WEIGHTED, Addon, Draft, Recipe, file_name, short_list

MAX_TEXTS = 5000  # links to follow for all texts
MAX_WALK = 500_000  # nodes to visit on the ways from all saved images to their samplers
MAX_HOPS = 20  # links to follow for one value, such as a seed from another node
SAVES = ("SaveImage", "PreviewImage", "SaveImageWebsocket")
VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text", "Value", "Text", "Number")
SIGMAS = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "PolyexponentialScheduler": "exponential"}
# nodes that change nothing by themselves: they are read, or only pass something on
KNOWN = {
    *SAVES, *DRAWN, *SIGMAS, "VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAEEncodeForInpaint", "VAELoader",
    "EmptyLatentImage", "LoraLoader", "LoraLoaderModelOnly", "CheckpointLoaderSimple", "CheckpointLoader",
    "CLIPTextEncode", *ENCODERS,
    "CLIPSetLastLayer", "BasicScheduler", "KSamplerSelect", "RandomNoise", "CFGGuider", "BasicGuider", "RescaleCFG",
    "LoadImage", "Reroute", "PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "Note", "UNETLoader",
    "CLIPLoader", "ConditioningZeroOut", "PrimitiveStringMultiline", "unCLIPCheckpointLoader",
}  # fmt: skip
SAMPLER_NODES = {  # nodes that are one sampler
    "SamplerEulerAncestral": "euler_a", "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde", "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerLMS": "lms", "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_a", "TCDModelSamplingDiscrete": "tcd",
}  # fmt: skip
TCD, DISCRETE = "TCDModelSamplingDiscrete", "ModelSamplingDiscrete"
MASKS = ("VAEEncodeForInpaint", "SetLatentNoiseMask", "InpaintModelConditioning")
# what the web UI's syntax and ComfyUI's read differently
READ_DIFFERENTLY = re.compile(r"[(\[#]|\bAND\b|\bBREAK\b|:\s*[\d.]+\s*\Z")


def is_graph(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is such a graph."""
    return any(isinstance(node, dict) and "class_type" in node for node in values.values())


def read_graph(values: Mapping[str, Any]) -> Recipe:
    """The recipe in a graph. Raises ValueError if it is too large or has no sampler."""
    if len(values) > MAX_NODES:
        raise ValueError(f"its graph has {len(values)} nodes, more than {MAX_NODES}")
    nodes: dict[str, Node] = {}
    for name, node in values.items():
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict):
            nodes[name] = Node(name, node["class_type"], node["inputs"])
    return Graph(nodes).recipe()


class Graph:
    """The nodes of a graph by their names, and the walks."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.encoder_loras: set[str] = set()  # names of the LoRAs that the text encoder has
        self.encoders: set[str] = set()  # nodes that were looked at for those
        self.walked = 0  # nodes visited on the ways to samplers
        self.texts = 0  # links followed for texts
        self.passed: dict[str, None] = {}  # classes of the nodes that walks went through, in order

    def upstream(
        self, starts: list[str], follow: Callable[[Node], list[str]] = Node.links, seen: set[str] | None = None
    ) -> Iterator[Node]:
        """The nodes above, nearest first, each once; without those in `seen`, to which they are added."""
        queue, seen = list(starts), set() if seen is None else seen
        for name in queue:  # grows while it is read
            if name in seen or name not in self.nodes:
                continue
            seen.add(name)
            yield self.nodes[name]
            queue += follow(self.nodes[name])

    def value(self, node: Node, *names: str) -> Any:
        """A text or number among the inputs, also one that another node provides; None if there is none."""
        for name in names:
            found, at = node.inputs.get(name), node
            for _ in range(MAX_HOPS):
                if not is_link(found) or str(found[0]) not in self.nodes:
                    break
                at = self.nodes[str(found[0])]
                found = next((at.inputs[key] for key in (name, *VALUES) if key in at.inputs), None)
            found = plain(found)
            if isinstance(found, str | int | float) and not isinstance(found, bool):
                return found
        return None

    def text(self, value: object, side: str, name: str = "", depth: int = 0) -> str | None:
        """A text among the inputs, or one that other nodes provide or put together; None if there is none.

        Nodes may put texts together in each other, so the number of all that are read is limited.
        """
        if not is_link(value):
            return value if isinstance(value, str) else None
        at = self.nodes.get(str(value[0]))
        self.texts += 1
        if at is None or depth > MAX_HOPS or self.texts > MAX_TEXTS:
            return None
        if re.search(r"concat|join", at.kind, re.IGNORECASE):
            names = sorted(key for key in at.inputs if re.match(r"(text|string)", key, re.IGNORECASE))
            parts = [self.text(at.inputs[key], side, key, depth + 1) for key in names[:MAX_HOPS]]
            by = next((at.inputs[key] for key in ("delimiter", "separator") if key in at.inputs), "")
            between = (self.text(by, side, "", depth + 1) or "")[:100].replace("\\n", "\n")
            return between.join(part for part in parts if part)[:MAX_TEXT]
        for key in dict.fromkeys((f"text_{side}", side, name, *TEXTS)):
            if (found := self.text(at.inputs.get(key), side, key, depth + 1)) is not None:
                return found
        return None

    def _passing(self, node: Node) -> None:
        """Remember a node that a walk goes through, unless it is read, or only passes something on."""
        names = ("ckpt_name", "vae_name", "lora_stack", "populated_text")
        if not (node.kind.startswith("Reroute") or lora_entries(node) or any(name in node.inputs for name in names)):
            self.passed[node.kind] = None

    def first(self, node: Node, inputs: tuple[str, ...], *kinds: str) -> Node | None:
        """The nearest node of these classes above some inputs."""
        return next((found for found in self.upstream(node.links(*inputs)) if found.kind in kinds), None)

    def nearest(self, node: Node, inputs: tuple[str, ...], name: str) -> Node | None:
        """The nearest node above some inputs that has an input of this name."""
        return next((found for found in self.upstream(node.links(*inputs)) if name in found.inputs), None)

    def chain(self) -> tuple[list[Node], int]:
        """The samplers of the image, the first one first; and how many images the graph saves."""
        saves = [node for node in self.nodes.values() if node.kind in SAVES]
        saves = [node for node in saves if node.kind == "SaveImage"] or saves
        if not saves:  # by a node of another name: one that no other node needs
            used = {key for node in self.nodes.values() for key in node.links()}
            saves = [node for node in self.nodes.values() if node.key not in used and node.links("images", "image")]
        chains = [(self._above(node.links("images", "image") or node.links()), node) for node in saves[:50]]
        if not any(chain for chain, _ in chains):
            chains = [(self._above([node.key]), node) for node in list(self.nodes.values())[:200] if node.samples]
        chain, end = max(chains, key=lambda found: len(found[0]), default=([], None))
        if chain and end is not None and not end.samples:  # what changes the image after the last sampler
            for node in self.upstream(end.links("images", "image") or end.links(), Node.above):
                if not node.samples:
                    self._passing(node)
        same = {tuple(node.key for node in found) for found, _ in chains if found}
        return chain, len(same)

    def _above(self, starts: list[str]) -> list[Node]:
        """The samplers above, the first one first. Raises ValueError if the ways to them are too long."""
        chain: list[Node] = []
        for _ in range(MAX_HOPS):
            found = None
            for node in self.upstream(starts, Node.above):
                self.walked += 1
                if node.samples and node not in chain:
                    found = node
                    break
            if self.walked > MAX_WALK:
                raise ValueError("its ComfyUI graph has too many samplers and saved images to follow all their links")
            if found is None:
                break
            chain.insert(0, found)
            starts = found.before()
        return chain

    def recipe(self) -> Recipe:
        """The recipe of the first sampler."""
        chain, images = self.chain()
        if not chain:
            raise ValueError("its ComfyUI graph has no sampler that leads to a saved image")
        node, draft = chain[0], Draft("ComfyUI")
        draft.settings |= {"rng": "comfy", **WEIGHTED}
        if images > 1:
            draft.note(f"the graph saves {images} images: these are the settings of the one with most samplers")
        at = continued_at(self, chain)
        self._sampling(draft, node, whole=at is not None)
        self._start(draft, node, chain)
        texts = [self._prompt(draft, node, name) for name in ("positive", "negative")]
        self._model(draft, node)
        if at is not None:
            read_refiner(draft, self, chain, texts)
        for later in chain[1 if at is None else 2 :]:
            draft.note(self._pass(later))
        left = [kind for kind in self.passed if kind not in KNOWN]
        if left:
            draft.note(f"not reproduced: the nodes {short_list(left)}")
        if any(READ_DIFFERENTLY.search(text) for text in texts):
            draft.note(
                "ComfyUI weights words differently, and [ ], AND, BREAK and # are text there: the image will differ"
            )
        return draft.recipe(*texts)

    def _sampling(self, draft: Draft, node: Node, whole: bool) -> None:
        """Steps, guidance, seed, sampler and grid, from the sampler or the nodes above it; `whole` if all are run."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        sigmas = self.nearest(node, ("sigmas",), "steps") or node
        noise = self.first(node, ("noise",), "RandomNoise") or node
        chosen = self.first(node, ("sampler",), "KSamplerSelect", *SAMPLER_NODES) or node
        for name, at, keys in (
            ("steps", sigmas, ("steps",)),
            ("guidance", guider, ("cfg",)),
            ("seed", noise, ("noise_seed", "seed")),
        ):
            if (value := self.value(at, *keys)) is not None:
                draft.put(name, value)
        if name := SAMPLER_NODES.get(chosen.kind) or self.value(chosen, "sampler_name"):
            draft.sampler(name)
        if chosen.kind == TCD:
            draft.put("gamma", self.value(chosen, "eta"), "eta")
        elif chosen.kind in SAMPLER_NODES and self.value(chosen, "eta") not in (None, 1):
            draft.note(f"eta {one_line(self.value(chosen, 'eta'))} is not available: 1 is used")
        grid = SIGMAS.get(sigmas.kind) or self.value(sigmas, "scheduler") or (sigmas.kind if sigmas != node else "")
        if grid:
            of_lcm = any(map(self._of_lcm, self.upstream(guider.links("model") + node.links("sigmas"))))
            draft.grid(grid, draft.settings.get("steps"), of_lcm)
        start, end = self.value(node, "start_at_step"), self.value(node, "end_at_step")
        steps = draft.settings.get("steps", 0)
        if (isinstance(start, int) and start > 0) or (isinstance(end, int) and end < steps and not whole):
            draft.note(f"the sampler runs only steps {start} to {end} of {steps}: here all of them are run")
        if node.inputs.get("add_noise") in ("disable", False):
            draft.note("the sampler adds no noise at its start, which is not reproduced")
        denoise = self.value(sigmas, "denoise")
        if isinstance(denoise, int | float) and denoise < 1:
            draft.put("strength", denoise, "denoise")
        if isinstance(denoise, int | float) and denoise < 1 and draft.settings.get("spacing") not in ALL_STEPS:
            draft.note(
                f"ComfyUI runs all {steps} steps at denoise {denoise:g}, here only that share of them is run: "
                f"--steps {round(steps / max(denoise, 0.01))} comes closest"
            )

    def _of_lcm(self, node: Node) -> bool:
        """Whether a node gives the model the timesteps of LCMs, and so to all its grids."""
        return node.kind == TCD or (node.kind == DISCRETE and self.value(node, "sampling") == "lcm")

    def _start(self, draft: Draft, node: Node, chain: list[Node]) -> None:
        """Where the latents come from: empty ones, or an image."""
        for above in self.upstream(node.before(), Node.above):
            if (sides := self._empty(above)) is not None:
                draft.size(*sides)
                batch = self.value(above, "batch_size")
                if isinstance(batch, int) and batch > 1:
                    draft.put("n", batch, "batch_size")
                    draft.note(
                        f"the image is one of a batch of {batch}, which share their random numbers: all are generated"
                    )
                break
            if above.kind in MASKS:
                draft.kind = "inpaint"
                break
            if above.kind.startswith("VAEEncode") or above.kind == "LoadImage":
                draft.kind = "img2img"
                break
            self._passing(above)
        if draft.kind == "txt2img":
            draft.settings.pop("strength", None)

    def _empty(self, node: Node) -> tuple[Any, Any] | None:
        """Width and height of a node that provides an empty latent, None for others."""
        for name in ("empty_latent_", ""):
            if f"{name}width" in node.inputs and (node.kind.startswith("Empty") or "batch_size" in node.inputs):
                return self.value(node, f"{name}width"), self.value(node, f"{name}height")
        text = node.inputs.get("resolution") or node.inputs.get("dimensions")
        found = re.search(r"(\d{2,5}) ?x ?(\d{2,5})", text, re.ASCII) if isinstance(text, str) else None
        return (found[1], found[2]) if found and "batch_size" in node.inputs else None

    def _prompt(self, draft: Draft, node: Node, name: str) -> str:
        """The text of "positive" or "negative"; also notes the layer of the text encoder, and embeddings."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        starts = guider.links(name) or (guider.links("conditioning") if name == "positive" else [])
        texts: list[str] = []
        tagged = dict.fromkeys(draft.loras)
        zeros = False

        def passed_on(node: Node) -> list[str]:
            return [] if node.kind == "ConditioningZeroOut" or node.encodes(name) else node.conditioning(name)

        for above in self.upstream(starts or guider.links(*PIPES), passed_on):
            if above.kind == "ConditioningZeroOut":  # whatever its text is
                zeros = True
                continue
            if not above.encodes(name):
                self._passing(above)
                continue
            read_encoder(draft, self, above, name)
            keys = (name, "populated_text", "text", "text_g", "text_l", "prompt")
            found = [self.text(above.inputs.get(key), name, key) for key in keys]
            of_both = read_texts(draft, above, name, dict(zip(keys, found, strict=True)).get)
            found = [of_both, *found]
            text, loras, notes = loras_in(next((text for text in found if text is not None), ""), False)
            texts.append(text)
            if reads_tags(above):
                tagged |= dict.fromkeys(loras)
            elif loras:
                names = short_list(lora.name for lora in loras)
                notes = [f"the tags of the LoRAs {names} are text in ComfyUI and change nothing there: left out"]
            for note in notes:
                draft.note(note)
            self._encoder(draft, above)
        draft.loras = [*tagged]
        if zeros and texts:
            draft.note(f"the {name} prompt has a part of zeros, ConditioningZeroOut, which is left out")
        if len(texts) > 1:
            draft.settings.pop(SECOND[name], None)
            draft.note(f"the {name} prompt consists of {len(texts)} parts, which are joined here")
        joined = ", ".join(text.strip() for text in texts if text.strip())
        if name == "negative" and texts and not (joined or zeros):
            draft.info[EMPTY_NEGATIVE] = "encoded"  # which matters for SDXL
        words = dict.fromkeys(found.name for found in draft.embeddings)
        words |= dict.fromkeys(map(file_name, re.findall(r"embedding:([^\s,()\[\]:]{1,200})", joined)))
        draft.embeddings = [Addon(word) for word in words]
        return joined

    def _encoder(self, draft: Draft, node: Node) -> None:
        """The layer of the text encoder that a prompt is encoded with, and the LoRAs in it.

        Prompts share most of what is above them: all of them together look at a node once.
        """
        above = self.upstream(node.links("clip"), lambda n: n.links("clip", *PIPES) or n.links(), seen=self.encoders)
        for layer in (node, *above):
            number = self.value(layer, "stop_at_clip_layer", "clip_skip")
            if isinstance(number, int) and number < 0 and "clip_skip" not in draft.settings:
                draft.put("clip_skip", -number, "stop_at_clip_layer")
            self.encoder_loras.update(file_name(name) for name, _, _ in lora_entries(layer))

    def _model(self, draft: Draft, node: Node) -> None:
        """Checkpoint, LoRAs, VAE, and nodes that change the model."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        stacks = ("lora_stack", "optional_lora_stack")
        walk = self.upstream(
            guider.links("model") or guider.links(*PIPES), lambda n: n.links("model", *stacks, *PIPES) or n.links()
        )
        in_unet: set[str] = set()
        for above in walk:
            entries = draft.limited(lora_entries(above))
            for entry in reversed(entries):
                in_unet.add(file_name(entry[0]))
                self._lora(draft, above, entry)
            name = self.value(above, "ckpt_name", "unet_name")
            if isinstance(name, str) and not draft.model.name:
                draft.model = Addon(file_name(name))
            elif not entries and above.kind == "RescaleCFG":
                draft.put("guidance_rescale", self.value(above, "multiplier") or 0.0)
            elif not entries and not isinstance(name, str) and not self._of_lcm(above):
                self._passing(above)
        for name in sorted(self.encoder_loras - in_unet):
            draft.note(f"LoRA {name} changes only the text encoder in this graph: it is left out")
        draft.loras.reverse()  # the walk meets the last one first
        decode = next((n for n in self.nodes.values() if n.kind.startswith("VAEDecode")), None)
        if decode and (vae := self.first(decode, ("vae",), "VAELoader")):
            draft.info["VAE"] = file_name(self.value(vae, "vae_name"))

    def _lora(self, draft: Draft, node: Node, entry: Entry) -> None:
        name, clip = file_name(entry[0]), entry[2]
        found = self.value(Node(node.key, node.kind, {"strength": entry[1]}), "strength")
        weight = draft.number(1.0 if found is None else found, f"the weight of LoRA {name}")
        if weight is None or (weight == 0 and clip in (None, 0)):
            return
        if node.kind == "LoraLoaderModelOnly":
            clip = 0.0
        draft.loras.append(Addon(name, weight))
        if clip is not None and not is_link(clip) and clip != entry[1]:
            draft.note(f"LoRA {name} has weight {one_line(clip)} for the text encoder: {weight:g} is used for both")

    def _pass(self, node: Node) -> str:
        """The note on a later sampler."""
        inputs = {
            "sampler": ("sampler_name",),
            "steps": ("steps",),
            "denoise": ("denoise",),
            "seed": ("seed", "noise_seed"),
        }
        values = {name: self.value(node, *names) for name, names in inputs.items()}
        parts = [f"{name} {one_line(value)}" for name, value in values.items() if value is not None]
        for scale in self.upstream(node.before(), Node.above):
            if "upscale" in scale.kind.lower() or "composite" in scale.kind.lower():
                size = [self.value(scale, name) for name in ("width", "height")]
                by = self.value(scale, "scale_by")
                how = "" if by is None else f" by {one_line(by)}"
                how = f" to {size[0]}x{size[1]}" if None not in size else how
                parts.append(one_line(scale.kind + how))
        return f"a later pass is not reproduced: {', '.join(parts) or node.kind}"

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
from typing import TYPE_CHECKING, Any

from .recipe import WEIGHTED, Addon, Draft, Recipe, file_name, listed, shown

if TYPE_CHECKING:
    from typing import TypeGuard

MAX_NODES = 5000
MAX_HOPS = 20  # links to follow for one value, such as a seed from another node
SAVES = ("SaveImage", "PreviewImage", "SaveImageWebsocket")
VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "string", "text", "Value", "Text")
DRAWN = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
SIGMAS = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "PolyexponentialScheduler": "exponential"}
# nodes that change nothing by themselves: they are read, or only pass something on
KNOWN = {
    *SAVES, *DRAWN, *SIGMAS, "VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAEEncodeForInpaint", "VAELoader",
    "EmptyLatentImage", "LoraLoader", "LoraLoaderModelOnly", "CheckpointLoaderSimple", "CheckpointLoader",
    "CLIPTextEncode",
    "CLIPSetLastLayer", "BasicScheduler", "KSamplerSelect", "RandomNoise", "CFGGuider", "BasicGuider", "RescaleCFG",
    "LoadImage", "Reroute", "PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "Note", "UNETLoader",
    "CLIPLoader", "ConditioningZeroOut", "PrimitiveStringMultiline", "unCLIPCheckpointLoader",
}  # fmt: skip
LATENTS = ("latent_image", "latent", "samples")  # inputs of a sampler


class Node:
    """A node of the graph: its class and inputs."""

    def __init__(self, key: str, kind: str, inputs: dict[str, Any]) -> None:
        self.key, self.kind, self.inputs = key, kind, inputs

    def links(self, *names: str) -> list[str]:
        """The nodes that these inputs are linked to, or all inputs if there are no names."""
        values = [self.inputs.get(name) for name in names] if names else list(self.inputs.values())
        return [str(value[0]) for value in values if _is_link(value)]

    def above(self) -> list[str]:
        """The nodes that its picture comes from: none of a sampler, of a composition what lies underneath."""
        under = self.links("samples_to", "destination")
        return [] if self.samples else under or self.links()

    @property
    def samples(self) -> bool:
        """Whether it is a sampler, of ComfyUI or with the same inputs."""
        return self.kind in DRAWN or {"steps", "cfg", "sampler_name"} <= self.inputs.keys()


def _is_link(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int)


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
        self.passed: dict[str, None] = {}  # classes of the nodes that walks went through, in order

    def upstream(self, starts: list[str], follow: Callable[[Node], list[str]] = Node.links) -> Iterator[Node]:
        """The nodes above, nearest first, each once."""
        queue, seen = list(starts), set[str]()
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
                if not _is_link(found) or str(found[0]) not in self.nodes:
                    break
                at = self.nodes[str(found[0])]
                found = next((at.inputs[key] for key in (name, *VALUES) if key in at.inputs), None)
            if isinstance(found, str | int | float) and not isinstance(found, bool):
                return found
        return None

    def first(self, node: Node, inputs: tuple[str, ...], *kinds: str) -> Node | None:
        """The nearest node of these classes above some inputs."""
        return next((found for found in self.upstream(node.links(*inputs)) if found.kind in kinds), None)

    def chain(self) -> tuple[list[Node], int]:
        """The samplers of the image, the first one first; and how many images the graph saves."""
        saves = [node for node in self.nodes.values() if node.kind in SAVES]
        saves = [node for node in saves if node.kind == "SaveImage"] or saves
        ends = saves[:50] or list(self.nodes.values())[:1]
        chains = [self._above(node.links()) for node in ends]
        if not any(chains):  # saved by a node of another name
            chains = [self._above([node.key]) for node in list(self.nodes.values())[:200] if node.samples]
        return max(chains, key=len, default=[]), sum(map(bool, chains)) if saves else 1

    def _above(self, starts: list[str]) -> list[Node]:
        chain: list[Node] = []
        for _ in range(MAX_HOPS):
            above = self.upstream(starts, Node.above)
            found = next((node for node in above if node.samples and node not in chain), None)
            if found is None:
                break
            chain.insert(0, found)
            starts = found.links(*LATENTS)
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
        self._sampling(draft, node)
        self._start(draft, node, chain)
        texts = [self._prompt(draft, node, name) for name in ("positive", "negative")]
        self._model(draft, node)
        for later in chain[1:]:
            draft.note(self._pass(later))
        left = [kind for kind in self.passed if kind not in KNOWN]
        if left:
            draft.note(f"not reproduced: the nodes {listed(left)}")
        if any(re.search(r"[(\[]", text) for text in texts):
            draft.note("ComfyUI weights words differently, and [ ] are text there: the image will differ")
        return draft.recipe(*texts)

    def _sampling(self, draft: Draft, node: Node) -> None:
        """Steps, guidance, seed, sampler and grid, from the sampler or the nodes above it."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        sigmas = self.first(node, ("sigmas",), "BasicScheduler", *SIGMAS) or node
        noise = self.first(node, ("noise",), "RandomNoise") or node
        chosen = self.first(node, ("sampler",), "KSamplerSelect") or node
        for name, at, keys in (
            ("steps", sigmas, ("steps",)),
            ("guidance", guider, ("cfg",)),
            ("seed", noise, ("noise_seed", "seed")),
        ):
            if (value := self.value(at, *keys)) is not None:
                draft.put(name, value)
        if name := self.value(chosen, "sampler_name"):
            draft.sampler(name)
        grid = SIGMAS.get(sigmas.kind) or self.value(sigmas, "scheduler")
        if grid:
            draft.grid(grid, draft.settings.get("steps"))
        start, end = self.value(node, "start_at_step"), self.value(node, "end_at_step")
        steps = draft.settings.get("steps", 0)
        if (isinstance(start, int) and start > 0) or (isinstance(end, int) and end < steps):
            draft.note(f"the sampler runs only steps {start} to {end} of {steps}: here all of them are run")
        denoise = self.value(sigmas, "denoise")
        if isinstance(denoise, int | float) and denoise < 1:
            draft.put("strength", denoise, "denoise")
            draft.note(
                f"ComfyUI runs all {steps} steps at denoise {denoise:g}, here only that share of them is run: "
                f"--steps {round(steps / max(denoise, 0.01))} comes closest"
            )

    def _start(self, draft: Draft, node: Node, chain: list[Node]) -> None:
        """Where the latents come from: empty ones, or an image."""
        for above in self.upstream(node.links(*LATENTS), Node.above):
            if above.kind.startswith("Empty") and "width" in above.inputs:
                draft.size(self.value(above, "width"), self.value(above, "height"))
                batch = self.value(above, "batch_size")
                if isinstance(batch, int) and batch > 1:
                    draft.put("n", batch, "batch_size")
                    draft.note(
                        f"the image is one of a batch of {batch}, which share their random numbers: all are generated"
                    )
                break
            if above.kind in ("VAEEncode", "VAEEncodeForInpaint", "LoadImage"):
                draft.kind = "img2img" if above.kind != "VAEEncodeForInpaint" else "inpaint"
                break
            self.passed[above.kind] = None
        if draft.kind == "txt2img":
            draft.settings.pop("strength", None)

    def _prompt(self, draft: Draft, node: Node, name: str) -> str:
        """The text of "positive" or "negative"; also notes the layer of the text encoder, and embeddings."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        inputs = (name, "conditioning") if name == "positive" else (name,)
        texts: list[str] = []
        for above in self.upstream(guider.links(*inputs), lambda n: [] if _encodes(n) else n.links()):
            if above.kind == "ConditioningZeroOut":
                return ""
            if not _encodes(above):
                self.passed[above.kind] = None
                continue
            text = self.value(above, "text", "text_g", "text_l", "prompt", "positive", "negative")
            texts.append(str(text) if text is not None else "")
            for layer in self.upstream(above.links("clip")):
                if layer.kind == "CLIPSetLastLayer":
                    number = self.value(layer, "stop_at_clip_layer")
                    if isinstance(number, int) and number < 0 and "clip_skip" not in draft.settings:
                        draft.put("clip_skip", -number, "stop_at_clip_layer")
                    break
        if len(texts) > 1:
            draft.note(f"the {name} prompt consists of {len(texts)} parts, which are joined here")
        joined = ", ".join(text.strip() for text in texts if text.strip())
        for word in re.findall(r"embedding:([^\s,()\[\]:]{1,200})", joined):
            if file_name(word) not in [found.name for found in draft.embeddings]:
                draft.embeddings.append(Addon(file_name(word)))
        return joined

    def _model(self, draft: Draft, node: Node) -> None:
        """Checkpoint, LoRAs, VAE, and nodes that change the model."""
        guider = self.first(node, ("guider",), "CFGGuider", "BasicGuider") or node
        for above in self.upstream(guider.links("model"), lambda n: n.links("model") or n.links()):
            name = self.value(above, "ckpt_name", "unet_name")
            if isinstance(name, str):
                draft.model = Addon(file_name(name))
                break
            lora = self.value(above, "lora_name")
            if isinstance(lora, str):
                self._lora(draft, above, file_name(lora))
            elif above.kind == "RescaleCFG":
                draft.put("guidance_rescale", self.value(above, "multiplier") or 0.0)
            else:
                self.passed[above.kind] = None
        draft.loras.reverse()  # the walk meets the last one first
        decode = next((n for n in self.nodes.values() if n.kind.startswith("VAEDecode")), None)
        if decode and (vae := self.first(decode, ("vae",), "VAELoader")):
            draft.info["VAE"] = file_name(self.value(vae, "vae_name"))

    def _lora(self, draft: Draft, node: Node, name: str) -> None:
        given = self.value(node, "strength_model", "strength")
        weight = draft.number(1.0 if given is None else given, f"the weight of LoRA {name}")
        other = self.value(node, "strength_clip")
        if weight is None:
            return
        draft.loras.append(Addon(name, weight))
        if other is not None and other != given:
            draft.note(f"LoRA {name} has weight {shown(other)} for the text encoder: {weight:g} is used for both")

    def _pass(self, node: Node) -> str:
        """The note on a later sampler."""
        inputs = {
            "sampler": ("sampler_name",),
            "steps": ("steps",),
            "denoise": ("denoise",),
            "seed": ("seed", "noise_seed"),
        }
        values = {name: self.value(node, *names) for name, names in inputs.items()}
        parts = [f"{name} {shown(value)}" for name, value in values.items() if value is not None]
        for scale in self.upstream(node.links(*LATENTS), Node.above):
            if "upscale" in scale.kind.lower() or "composite" in scale.kind.lower():
                size = [self.value(scale, name) for name in ("width", "height")]
                by = self.value(scale, "scale_by")
                how = f" to {size[0]}x{size[1]}" if None not in size else f" by {shown(by)}" if by is not None else ""
                parts.append(shown(scale.kind + how))
        return f"a later pass is not reproduced: {', '.join(parts) or node.kind}"


def _encodes(node: Node) -> bool:
    return node.kind.startswith("CLIPTextEncode") or (
        "clip" in node.inputs and any(k in node.inputs for k in ("text", "prompt"))
    )

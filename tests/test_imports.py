"""Imports flow one way, and the package stays quiet: no prints, no argv, no environment, no global random numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each layer may import of the package: a layer is a module or a folder of sd/, named by its path. A module that
# is new in a folder needs no line here; a new layer does.
ALLOWED = {
    "conditioning": set(),
    "config": {"text_config", "vae_config"},
    "few_step": {"config"},
    "files": set(),
    "hints": set(),
    "messages": set(),
    "resources": set(),
    "schedule": {"config"},
    "settings": set(),
    "spellings": set(),
    "text_config": {"vae_config"},
    "vae_config": set(),
    "samplers": {"schedule"},
    "control": {"conditioning", "denoiser", "models"},
    "control_config": {"config"},
    "control_params": {"settings"},
    "controls": {
        "checkpoints", "config", "control", "control_config", "control_params", "files", "imaging", "models",
        "resources", "runtime", "text",
    },
    "denoiser": {"conditioning", "samplers", "schedule"},
    "prompt_checks": {"messages"},
    "params": {"config", "control_params", "prompt_checks", "request_json", "samplers", "schedule", "settings"},
    "request_json": {"control_params", "params", "spellings"},
    "runtime": {"__version__", "conditioning", "config", "files", "messages", "models"},
    "models": {"conditioning", "config", "control_config"},
    "text": {"messages", "resources"},
    "imaging": {"files", "messages"},
    "checkpoints": {
        "conditioning", "config", "control_config", "few_step", "files", "messages", "models", "runtime", "schedule",
        "text", "text_config", "vae_config",
    },
    "adapters": {"checkpoints", "config", "few_step", "files", "messages", "models", "runtime", "settings", "text"},
    "training": {
        "adapters", "checkpoints", "conditioning", "config", "denoiser", "models", "samplers", "schedule", "text",
    },
    "latents": {"config", "imaging", "models", "runtime", "settings", "text"},
    "changing_prompts": {"conditioning", "params", "text"},
    "prompts": {
        "adapters", "changing_prompts", "conditioning", "config", "models", "params", "prompt_checks", "second_prompts",
        "size_conditioning", "text",
    },
    "second_prompts": {"config", "params", "text"},
    "size_conditioning": {"conditioning", "config", "messages", "models", "params"},
    "noise": {"params"},
    "recipes": {"control_params", "imaging", "messages", "params", "samplers", "schedule", "text"},
    "run": {
        "changing_prompts", "conditioning", "control", "controls", "denoiser", "few_step", "latents", "messages",
        "models", "noise", "params", "prompt_checks", "prompts", "runtime", "samplers", "schedule",
    },
    "image_starts": {"controls", "denoiser", "imaging", "latents", "models", "params", "run"},
    "hires": {"config", "imaging", "latents", "params", "run", "samplers", "schedule"},
    "refiner": {
        "config", "denoiser", "hires", "messages", "params", "run", "runtime", "schedule", "second_prompts",
        "size_conditioning",
    },
    "pipeline": {
        "adapters", "checkpoints", "conditioning", "config", "controls", "denoiser", "files", "hints", "hires",
        "image_starts", "imaging", "latents", "models", "params", "prompts", "refiner", "resources", "run", "runtime",
        "samplers", "schedule", "size_conditioning", "text",
    },
    "request_texts": {"params", "text"},
    "lockstep": {"conditioning", "pipeline", "runtime"},
    "study": None,  # stands on top of everything: only the server may import it
    "server": None,  # the same, and nothing may import it
}  # fmt: skip
# imported under TYPE_CHECKING only: a run is one of a model
ANNOTATED = {name: {"pipeline"} for name in ("changing_prompts", "prompts", "run", "image_starts", "hires", "refiner")}
ANNOTATED["recipes"] = {"run"}
FILES = sorted(path for path in (ROOT / "sd").rglob("*.py") if path != ROOT / "sd" / "__init__.py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT / "sd").as_posix()


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "sd").with_suffix("").parts[0]


def imported_layers(path: Path) -> set[str]:
    """The layers of the package that a file imports, but for the annotations in `ANNOTATED`."""
    package = ["sd", *path.relative_to(ROOT / "sd").parts[:-1]]
    found, annotated = set(), ANNOTATED.get(layer(path), set())
    module = tree(path)
    typing = [node for node in module.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    only = {id(node) for block in typing for node in ast.walk(block)}
    for node in ast.walk(module):
        if id(node) in only and isinstance(node, ast.ImportFrom) and node.module in annotated:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            modules = [*base, *(node.module or "").split(".")] if node.module else base
            if modules[:1] == ["sd"]:
                found |= {modules[1]} if len(modules) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in {"sd", "scripts"} for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_flow_one_way(path):
    own = layer(path)
    assert own in ALLOWED, f"{own} is a new layer: say what it may import"
    allowed = ALLOWED[own] if ALLOWED[own] is not None else {"__version__", *ALLOWED} - ({"server"} - {own})
    assert imported_layers(path) <= {own, *allowed}
    assert "scripts" not in imported_layers(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_package_is_quiet(path):
    nodes = list(ast.walk(tree(path)))
    left = [node.func for node in nodes if isinstance(node, ast.Call) and "False" in map(ast.unparse, node.args)]
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "input", "eval", "exec", "__import__"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            forbidden = {
                "sys.argv", "os.environ", "os.getenv", "torch.manual_seed", "torch.load", "torch.inference_mode",
                "pickle.load", "pickle.loads", "np.random", "random.random",
            }  # fmt: skip
            leaves = called == "torch.inference_mode" and node in left  # torch.inference_mode(False)
            assert called not in forbidden or leaves, f"line {node.lineno}: {called}"


def test_import_is_light():
    """`import sd` brings in nothing beyond the run-time dependencies, and not torch before it is needed."""
    for module, heavy in (
        ("sd", "('diffusers', 'transformers', 'scipy', 'matplotlib', 'torch', 'PIL', 'ftfy')"),
        ("sd.pipeline", "('diffusers', 'transformers', 'scipy', 'matplotlib', 'triton')"),
        ("scripts.convert", "('torch',)"),
    ):
        code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


def test_the_public_names_are_what_they_are_called():
    """Functions and classes, also after modules of nearly the same names were imported."""
    code = (
        "import sd, sd.pipeline, sd.models.vae, sd.models.unet, sd.schedule, sd.checkpoints.convert;"
        "from types import ModuleType;"
        "from sd import *; assert not [n for n in sd.__all__ if isinstance(getattr(sd, n), ModuleType)];"
        "assert callable(convert) and set(sd.__all__) <= set(dir(sd)); import pytest;"
        "pytest.raises(AttributeError, getattr, sd, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

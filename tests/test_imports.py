"""Imports flow one way, and the package stays quiet: no prints, no argv, no environment, no global random numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# what each module of the package may import from it; a module that is new here needs a line
ALLOWED = {
    "files": set(),
    "resources": set(),
    "config": set(),
    "kernels": set(),
    "layers": {"config", "kernels"},
    "text_encoder": {"config", "kernels", "layers"},
    "vae": {"config", "kernels", "layers"},
    "strips": {"kernels", "layers", "vae"},
    "unet": {"config", "kernels", "layers"},
    "schedule": {"config"},
    "samplers": {"schedule"},
    "denoiser": {"samplers", "schedule"},
    "settings": {"samplers", "schedule"},
    "device": set(),
    "tokenizer": {"resources"},
    "prompts": {"tokenizer"},
    "lora": {"kernels"},
    "lora_files": {"checkpoints.checkpoint", "checkpoints.keys", "config", "lora"},
    "embeddings": {"checkpoints.checkpoint", "tokenizer"},
    "image": set(),
    "image_files": {"files"},
    "inpainting": {"image", "image_files", "samplers", "schedule"},
    "preview": {"image"},
    "training": {"config", "denoiser", "layers", "schedule", "text_encoder", "unet", "vae"},
    "loading": {
        "checkpoints.checkpoint", "checkpoints.convert", "checkpoints.diffusers_config", "checkpoints.identity",
        "checkpoints.layouts", "checkpoints.other_models", "checkpoints.pages", "checkpoints.prediction", "config",
        "kernels", "text_encoder", "unet", "vae",
    },
    "model": {
        "capture", "checkpoints.checkpoint", "checkpoints.convert", "checkpoints.identity", "checkpoints.layouts",
        "config", "denoiser", "device", "embeddings", "image", "inpainting", "loading", "lora", "lora_files", "prompts",
        "resources", "samplers", "schedule", "settings", "strips", "text_encoder", "tokenizer", "turns", "unet", "vae",
    },
    "turns": set(),
    "capture": {"kernels"},
    "pipeline": {
        "denoiser", "image", "image_files", "inpainting", "model", "samplers", "schedule", "settings",
    },
}  # fmt: skip
# the same within sd.checkpoints; from outside of it (..) nothing of the networks
CHECKPOINTS = {
    "pickles": set(),
    "numbers": set(),
    "torch_files": {"numbers", "pickles"},
    "folders": {"pickles"},
    "safetensors_files": {"numbers", "pickles", "torch_files"},
    "pages": set(),
    "checkpoint": {"folders", "numbers", "pages", "pickles", "safetensors_files", "torch_files"},
    "weight_shapes": {"..config"},
    "keys": {"..config"},
    "layouts": {"..config", "keys"},
    "other_models": {"checkpoint"},
    "diffusers_config": {"..config", "checkpoint", "keys"},
    "prediction": {"..config", "..schedule", "checkpoint", "diffusers_config", "numbers"},
    "identity": {"..config", "checkpoint", "diffusers_config", "layouts", "other_models", "prediction"},
    "convert": {"..config", "checkpoint", "identity", "keys", "layouts", "weight_shapes"},
    "export": {
        "..config", "..schedule", "..tokenizer", "diffusers_config", "folders", "identity", "keys", "layouts",
        "prediction",
    },
    "census": {"..config", "checkpoint", "convert", "identity", "layouts", "weight_shapes"},
}  # fmt: skip
MODULES = ALLOWED | {f"checkpoints.{name}": allowed for name, allowed in CHECKPOINTS.items()}
STUDY = sorted(f"study.{path.stem}" for path in (ROOT / "sd" / "study").glob("*.py") if path.stem != "__init__")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "sd" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))


def test_every_module_has_its_line():
    found = {file.relative_to(ROOT / "sd") for file in (ROOT / "sd").rglob("*.py") if file.stem != "__init__"}
    assert {".".join(file.with_suffix("").parts) for file in found} == {*MODULES, *STUDY}


@pytest.mark.parametrize("name", MODULES)
def test_imports_flow_one_way(name):
    imports = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.module for node in imports), "import names from modules, not modules from the package"
    imported = {(".." if node.level == 2 else "") + node.module for node in imports}
    assert imported <= MODULES[name], f"{name} must not import {imported - MODULES[name]}"


@pytest.mark.parametrize("name", STUDY)
def test_study_stands_on_top(name):
    """It may look at everything in the package; `test_imports_flow_one_way` lets nothing there look back."""
    modules = {node.module for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.level == 2}
    assert modules <= set(MODULES)
    others = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not any(node.module.split(".")[0] in {"scripts", "sd"} for node in others)


@pytest.mark.parametrize("name", [*MODULES, *STUDY])
def test_package_is_quiet(name):
    nodes = list(ast.walk(tree(name)))
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
        ("sd.pipeline", "('diffusers', 'transformers', 'scipy', 'matplotlib')"),
        ("scripts.convert", "('torch',)"),
    ):
        code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


def test_the_public_names_are_what_they_are_called():
    """Functions and classes, also after modules of nearly the same names were imported."""
    code = (
        "import sd, sd.pipeline, sd.vae, sd.unet, sd.schedule, sd.checkpoints.convert; from types import ModuleType;"
        "from sd import *; assert not [n for n in sd.__all__ if isinstance(getattr(sd, n), ModuleType)];"
        "assert callable(convert) and set(sd.__all__) <= set(dir(sd)); import pytest;"
        "pytest.raises(AttributeError, getattr, sd, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

"""Packaging: `pip install .` installs the package `sd` with its data, and the scripts as commands `sd-txt2img`, ..."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "sd" / "__init__.py").read_text(), re.MULTILINE).group(1)

for name in ("pocket", "pocket-lcm", "pocket-edges"):
    if not (ROOT / "weights" / f"{name}.safetensors").is_file():
        raise SystemExit(f"weights/{name}.safetensors is missing: it belongs to the embedded model")

REFERENCES = ["diffusers>=0.30", "transformers>=4.40", "accelerate", "peft>=0.13", "openvino>=2024.6"]
STUDY = ["matplotlib>=3.8"]
CONTROL = ["scikit-image>=0.22"]
LOW_MEMORY = ["bitsandbytes>=0.45"]
SERVER = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "python-multipart>=0.0.9"]
CLIENTS = ["webuiapi>=0.9", "openai>=1.50", "schemathesis>=4", "playwright>=1.45", "httpx2>=2"]  # of the server
TESTS = [
    *("pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.5", "mypy>=1.11"),
    *(*STUDY, *CONTROL, *SERVER, *CLIENTS, *REFERENCES),
]

PACKAGES = ["sd", *(f"sd.{name}" for name in find_packages("sd"))]
SCRIPTS = ["sd.scripts", *(f"sd.scripts.{name}" for name in find_packages("scripts"))]

setup(
    name="sd-from-scratch",
    version=VERSION,
    description="Stable Diffusion from scratch in PyTorch: to run, and to read",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # data/ and weights/ stand beside the package in a checkout, and inside of it in a wheel (sd/resources.py)
    packages=[*PACKAGES, "sd.data", "sd.weights", *SCRIPTS],
    package_dir={"sd": "sd", "sd.data": "data", "sd.weights": "weights", "sd.scripts": "scripts"},
    package_data={
        "sd.data": ["*.gz", "*.md", "sample*.png"],
        "sd.server.native": ["files/*"],
        "sd.server.page": ["*.html", "*.css", "*.js", "*.svg", "*/*.css", "*/*.js"],
        "sd.weights": ["pocket.safetensors", "pocket-lcm.safetensors", "pocket-edges.safetensors", "README.md"],
    },
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4.3",
        "tqdm>=4.60",
        "regex>=2023.0",
        "ftfy>=6.1",
    ],
    extras_require={
        "study": STUDY,
        "control": CONTROL,
        "low-memory": LOW_MEMORY,
        "server": SERVER,
        "references": REFERENCES,
        "test": TESTS,
    },
    entry_points={
        "console_scripts": [
            "sd-txt2img = sd.scripts.installed:txt2img",
            "sd-img2img = sd.scripts.installed:img2img",
            "sd-inpaint = sd.scripts.installed:inpaint",
            "sd-convert = sd.scripts.installed:convert",
            "sd-train = sd.scripts.installed:train",
            "sd-train-text = sd.scripts.installed:train_text",
            "sd-train-vae = sd.scripts.installed:train_vae",
            "sd-distill = sd.scripts.installed:distill",
            "sd-evaluate = sd.scripts.installed:evaluate",
            "sd-bench = sd.scripts.installed:bench",
            "sd-study = sd.scripts.installed:study",
            "sd-serve = sd.scripts.installed:serve",
        ]
    },
)

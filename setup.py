"""Packaging. `pip install .` installs the library, its programs (`python -m diffusion.train`) and the configs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "diffusion" / "__init__.py").read_text())[1]

setup(
    name="jax-fast-diffusion",
    version=VERSION,
    description="Fast sampling of diffusion models in JAX: every sampler is a table, run by one compiled scan",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The authors of jax-fast-diffusion",
    license="Apache-2.0",
    keywords=["diffusion models", "sampling", "ddim", "ddpm", "dpm-solver", "unipc", "jax", "flax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    # The configs go into the package: a top-level `configs` in site-packages would meet those of other projects.
    packages=[*find_packages(include=["diffusion", "diffusion.*"]), "diffusion.configs"],
    package_dir={"diffusion.configs": "configs"},
    package_data={"diffusion": ["py.typed"], "diffusion.pretrained": ["*.safetensors", "*/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint~=0.12.8",  # the v1 interface is new and still moves
        "absl-py>=2.3",
        "matplotlib>=3.9",  # figures of results
        "ml-collections>=1.1",
        "grain>=0.2.18,<0.3",  # worker processes that read images ahead, in order; 0.x still moves
        "jaxtyping>=0.3",  # array shapes in annotations
        "numpy>=2.0",
        "pillow>=10.1",  # reading and writing images
        "pooch[progress]>=1.8",  # downloads with a hash and no half file
        "safetensors>=0.5",  # one file for the weights of a trained model
        "scikit-learn>=1.6,<1.11",  # the embedded digits
        "scipy>=1.13",  # DOP853, for exact solutions of the probability flow
        "tensorboardX>=2.6.2",  # TensorBoard events without TensorFlow
        "tqdm>=4.66",  # progress with rate and time left
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            "huggingface_hub>=1.0,<3",
            "setuptools>=68",  # a test builds what pip installs; Python 3.12 and later bring none
            "tokenizers>=0.21,<0.24",
        ],
        "text": [
            "tokenizers>=0.21,<0.24",  # makes the tokens of prompts; 0.x still moves
        ],
        "hub": [
            "huggingface_hub>=1.0,<3",  # fetches models by their ids
        ],
        "dev": [
            "ruff>=0.14",
            "import-linter>=2.17",  # checks the layers that pyproject.toml lists
            "pre-commit>=4.0",
        ],
        "docs": [
            "sphinx>=8.2,<10",  # the site and the reference from docstrings
            "furo>=2025.12.19",  # its theme
            "myst-nb>=1.4,<2",  # pages in Markdown, notebooks as pages
            "latex2mathml>=3.78,<4",  # formulas as MathML while building, so that no script is loaded from elsewhere
        ],
        "notebooks": [
            "jupytext>=1.17",  # notebooks as Python files
            "nbmake>=1.5.5",  # runs them under pytest
            "ipykernel>=6.29",  # what runs a notebook
            "ipywidgets>=8.1",  # tqdm in a notebook
            "pytest>=8.0",
        ],
        # The live comparison in tests/agreement; install torch alone and first, a CPU build is enough, then
        # torchvision, pytorch-fid and k-diffusion, of which one module is read, with --no-deps (see the Makefile).
        "reference": [
            "torch>=2.13,<2.14",
            "torchvision>=0.28,<0.29",  # pytorch-fid builds its network from it
            "pytorch-fid>=0.3,<0.4",
            "diffusers>=0.42,<0.43",
            "transformers>=5.24,<6",  # text encoders, and their tokenizers
            "tokenizers>=0.21,<0.24",
        ],
    },
)

"""Packaging of axolotl-medusa: `pip install -e .` beside an installed axolotl."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

AXOLOTL = "axolotl>=0.19"
ONNX = ["onnx>=1.17", "onnxruntime>=1.22", "onnxscript>=0.5", "tokenizers", "jinja2", "numpy"]
ROOT = Path(__file__).parent


def version() -> str:
    """The package's `__version__`, read without importing it."""
    package = ast.parse((ROOT / "src" / "axolotl_medusa" / "__init__.py").read_text(encoding="utf-8"))
    assigned = (node for node in package.body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "__version__")


setup(
    name="axolotl-medusa",
    version=version(),
    description="An Axolotl plugin that trains Medusa decoding heads for any Hugging Face causal LM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="axolotl-medusa contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["axolotl", "medusa", "speculative decoding", "large language models"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"axolotl_medusa": ["py.typed"]},
    entry_points={
        "console_scripts": ["axolotl-medusa = axolotl_medusa.cli:main"],
        # From axolotl 0.18 `axolotl medusa ...`, from 0.21 YAMLs with a `medusa_*` key without the line `plugins:`.
        "axolotl.cli_commands": ["medusa = axolotl_medusa.cli:axolotl_command"],
        "axolotl.plugins": ["medusa = axolotl_medusa.training.installed:InstalledPlugin"],
    },
    python_requires=">=3.11",
    install_requires=["pydantic>=2", "safetensors", "torch>=2.6", "transformers>=5"],
    extras_require={
        # Training needs axolotl; decoding and exporting work without it.
        "train": [AXOLOTL],
        "gpu": [AXOLOTL, "flash-attn", "deepspeed"],
        # generate.py needs the first three; the others read .json, .zst, parquet and named datasets.
        "data": ["aiohttp", "jinja2", "tqdm", "ijson", "zstandard", "pyarrow", "datasets"],
        # `axolotl-medusa evaluate --plots` and models in 8-bit or 4-bit.
        "plots": ["matplotlib"],
        "quantized": ["accelerate", "bitsandbytes"],
        # `axolotl-medusa export --to onnx`, and decoding what it wrote.
        "onnx": ONNX,
        "dev": [
            *ONNX,
            "build",
            "hypothesis",
            "mypy==2.4.1",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "deepspeed",
            "matplotlib",
            "ruff==0.17.6",
            "setuptools>=77.0.3",
            "types-PyYAML",
        ],
    },
)

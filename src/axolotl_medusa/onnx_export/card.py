"""The README.md of an ONNX directory, and the lines that show how to run it.

Contract: pure text.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from axolotl_medusa.onnx_decoding.directory import About


def try_it(directory: str | Path) -> str:
    """A command that generates text, for whoever has just exported."""
    return f"axolotl-medusa generate {shlex.quote(str(directory))} --prompt 'What is the capital of France?'"


def onnx_card(about: About, heads_precision: str, base_model: str | None) -> str:
    """What an ONNX directory holds and how to run it."""
    return f"""# Medusa heads and their model for ONNX Runtime

Base model: {base_model or "not named"}. Precision of its matrices: {about.precision}; of the heads' output layers:
{heads_precision}. {about.num_heads} heads. A context of {about.context or "any"} tokens.

| file | what it is |
|---|---|
| `model.onnx`, `model.onnx.data` | one decoding step of the model |
| `medusa_head_0.onnx`, ... | the heads |
| `medusa_onnx.json` | sizes, files and their SHA-256 |
| `tokenizer.json`, ... | the tokenizer and its chat template |

Needs onnxruntime, tokenizers, numpy and jinja2, and neither torch nor transformers:

    pip install 'axolotl-medusa[onnx]'
    {try_it("DIR")}

Inputs and outputs of the graphs are described in `axolotl_medusa.onnx_decoding.graph_names`.
"""

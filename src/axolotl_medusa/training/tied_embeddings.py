"""An adapter that changes one of two tied embeddings: `axolotl merge-lora` then changes both, and the logits are others.

Contract: looks at a model, or at the two JSON files that say the same; changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from axolotl_medusa.model.anatomy import causal_lm, frozen_output_embedding, output_embedding
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.training.named_files import is_file, named_path

_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer")
"""Names that peft has for them in an adapter's configuration."""


def parts_tied_embeddings(model: nn.Module) -> bool:
    """Whether the embeddings are one matrix on disk and an adapter changes what only one of them computes."""
    output, tokens = output_embedding(model), causal_lm(model).get_input_embeddings()
    own_output, own_tokens = frozen_output_embedding(output), frozen_output_embedding(tokens)
    is_tied = own_output.weight is own_tokens.weight
    return is_tied and (own_output is not output) is not (own_tokens is not tokens)


def merge_would_part(cfg: Mapping[str, Any]) -> bool:
    """Whether `axolotl merge-lora` with this YAML would merge such an adapter.

    Args:
        cfg: The YAML before validation.
    """
    from transformers import AutoConfig

    file = named_path(cfg.get("lora_model_dir") or cfg.get("output_dir") or "") / ADAPTER_CONFIG_FILE
    try:
        adapter = read_json(file) if is_file(file) else {}
        is_tied = bool(adapter) and AutoConfig.from_pretrained(cfg["base_model"]).get_text_config().tie_word_embeddings
    except (OSError, ValueError, KeyError):
        return False  # axolotl says what is wrong with them
    names = [str(name) for key in ("target_modules", "modules_to_save") for name in adapter.get(key) or []]
    return bool(is_tied) and any(name.split(".")[-1] in _OUTPUT_EMBEDDINGS for name in names)


def merge_advice(output_dir: object) -> str:
    """How such an adapter is merged."""
    return (
        "the adapter changes lm_head, which base_model ties to its embeddings: `axolotl merge-lora` changes both, and its model "
        f"has other logits; use `axolotl-medusa export {output_dir} --to vllm --out DIR --model merged`, which writes the heads "
        "and the merged model"
    )

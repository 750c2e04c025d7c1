"""An adapter that trains tied embeddings apart: `axolotl merge-lora` leaves one matrix for both, and the logits are others.

Contract: looks at a model, or at the two JSON files that say the same; changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from axolotl_medusa.model.anatomy import causal_lm, frozen_output_embedding, output_embedding, stored_text_config
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.training.named_files import is_file, named_path

_EMBEDDINGS = ("lm_head", "embed_out", "output_layer", "embed_tokens", "embed_in", "wte", "word_embeddings")
"""Names that peft has for them in an adapter's configuration."""


def parts_tied_embeddings(model: nn.Module) -> bool:
    """Whether the embeddings are one matrix on disk and an adapter trains them apart, or only one of them."""
    layers = (output_embedding(model), causal_lm(model).get_input_embeddings())
    output, tokens = map(frozen_output_embedding, layers)
    kept_together = any(
        getattr(config, "ensure_weight_tying", False) for config in getattr(model, "peft_config", {}).values()
    )
    is_changed = any(
        layer is not own and not hasattr(layer, "token_adapter")  # single rows, which peft keeps together
        for layer, own in zip(layers, (output, tokens), strict=True)
    )
    return output.weight is tokens.weight and is_changed and not kept_together


def merge_would_part(cfg: Mapping[str, Any]) -> bool:
    """Whether `axolotl merge-lora` with this YAML would merge such an adapter.

    Args:
        cfg: The YAML before validation.
    """
    file = named_path(cfg.get("lora_model_dir") or cfg.get("output_dir") or "") / ADAPTER_CONFIG_FILE
    try:
        adapter = read_json(file) if is_file(file) else {}
        is_tied = bool(adapter) and stored_text_config(cfg["base_model"]).tie_word_embeddings
    except (OSError, ValueError, KeyError):
        return False  # axolotl says what is wrong with them
    lists = [adapter.get(key) for key in ("target_modules", "modules_to_save")]
    names = [str(name) for each in lists if isinstance(each, list) for name in each]
    return (
        bool(is_tied)
        and not adapter.get("ensure_weight_tying")
        and any(name.split(".")[-1] in _EMBEDDINGS for name in names)
    )


def merge_advice(output_dir: object) -> str:
    """How such an adapter is merged."""
    return (
        "the adapter trains lm_head apart from the embeddings, to which base_model ties it: `axolotl merge-lora` leaves one matrix "
        f"for both, and its model has other logits; use `axolotl-medusa export {output_dir} --to vllm --out DIR --model merged`, "
        "which writes the heads and the merged model"
    )

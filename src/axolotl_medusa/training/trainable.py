"""Which parameters train and in which type, and the check that they are those that the recipe means.

Contract: knows the model, its heads and the YAML; changes nothing but `requires_grad`.
"""

from __future__ import annotations

import torch
from axolotl.utils.dict import DictDefault
from torch import nn

from axolotl_medusa.model.anatomy import backbone, causal_lm, decoder_layers
from axolotl_medusa.model.heads import HEADS_NAME, attached_heads


def set_trainable(model: nn.Module, cfg: DictDefault) -> None:
    """Chooses what trains: the heads always; of the backbone nothing, the last layers, or what axolotl chose.

    Args:
        model: The model with heads attached, possibly wrapped by peft.
        cfg: The validated YAML.
    """
    if cfg.medusa_only_heads:
        model.requires_grad_(False)
    elif cfg.medusa_num_unfreeze_layers:
        layers, parent = decoder_layers(model)
        if cfg.medusa_num_unfreeze_layers > len(layers):
            raise ValueError(
                f"medusa_num_unfreeze_layers is {cfg.medusa_num_unfreeze_layers} but the model has {len(layers)} decoder layers"
            )
        model.requires_grad_(False)
        for layer in list(layers)[-cfg.medusa_num_unfreeze_layers :]:
            layer.requires_grad_(True)
        for norm in _final_norms(layers, parent):
            norm.requires_grad_(True)
    attached_heads(model).requires_grad_(True)


def _final_norms(layers: nn.ModuleList, parent: nn.Module) -> list[nn.Module]:
    """The first module after the layers that has only vectors, else (OPT) those before them; never the norm of embeddings.

    Others that follow belong to inputs of the layers, as Gemma-3n's `per_layer_projection_norm`.
    """
    is_after_layers = False
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for name, child in parent.named_children():
        is_after_layers |= child is layers
        is_of_embeddings = name == "layernorm_embedding" or ("emb" in name and not is_after_layers)
        parameters = list(child.parameters())
        if child is not layers and parameters and not is_of_embeddings and all(p.dim() == 1 for p in parameters):
            (after if is_after_layers else before).append(child)
    return after[:1] or before


def check_trainable(model: nn.Module, cfg: DictDefault) -> dict[str, int]:
    """Counts the trainable parameters and refuses a set that the recipe does not mean.

    Returns:
        Parameters per part: `heads`, `adapter`, `backbone`.

    Raises:
        RuntimeError: Heads are frozen, a frozen backbone is trainable, or Medusa-2 would train no backbone.
    """
    counts = {"heads": 0, "adapter": 0, "backbone": 0}
    frozen_heads = []
    for name, parameter in model.named_parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        if HEADS_NAME in name.split("."):
            counts["heads"] += size
            if not parameter.requires_grad:
                frozen_heads.append(name)
        elif parameter.requires_grad:
            is_adapter = any(mark in name for mark in ("lora_", "modules_to_save", "trainable_tokens"))
            counts["adapter" if is_adapter else "backbone"] += size
    if frozen_heads:
        raise RuntimeError(
            f"{len(frozen_heads)} tensors of the heads are frozen, e.g. {frozen_heads[0]}: nothing would train them"
        )
    if cfg.medusa_only_heads and counts["adapter"] + counts["backbone"]:
        raise RuntimeError(f"medusa_only_heads is true but parameters beside the heads are trainable: {counts}")
    if not cfg.medusa_only_heads and not counts["adapter"] + counts["backbone"]:
        raise RuntimeError(
            "Medusa-2 trains the backbone, but none of it is trainable: set medusa_only_heads: true for Medusa-1"
        )
    if cfg.adapter and counts["backbone"]:
        raise RuntimeError(
            f"with adapter: {cfg.adapter} only the adapter and the heads train, but so would the backbone: {counts}"
        )
    return counts


def heads_dtype(model: nn.Module, cfg: DictDefault) -> torch.dtype:
    """Type of the heads' parameters: what the YAML says, else the backbone's, but fp32 under autocast or beside an adapter.

    Where the backbone has several it is fp32 too. Heads take small steps from a start at zero, which bf16 parameters would round away.
    """
    if cfg.medusa_heads_dtype in ("float32", "bfloat16"):
        return torch.float32 if cfg.medusa_heads_dtype == "float32" else torch.bfloat16
    if cfg.bf16 or cfg.bfloat16 or cfg.fp16 or cfg.adapter:
        return torch.float32
    dtypes = {parameter.dtype for parameter in backbone(causal_lm(model)).parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32

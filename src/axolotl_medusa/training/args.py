"""The YAML keys `medusa_*`: defaults, bounds and meaning.

Contract: imports nothing of ours and neither axolotl nor torch. Defaults come from the recipes of the Medusa paper
(arXiv 2401.10774) as its first public trainer shipped them, unless a key says otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator


class MedusaArgs(BaseModel):
    """The `medusa_*` keys of an axolotl YAML."""

    medusa_num_heads: int = Field(
        ge=1,
        le=16,
        description="Number of heads N, 1 to 16; head i predicts the token i + 2 ahead. No default: the paper trains 5, a chain of "
        "draft tokens needs 3.",
    )
    medusa_num_layers: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Residual blocks per head, 1 to 8, independent of each other. Default 1: the paper's (section 2.1.1).",
    )
    medusa_only_heads: bool = Field(
        default=False,
        description="true: Medusa-1, the backbone is frozen. false: Medusa-2, heads and backbone together. Default false, ours: a "
        "frozen backbone is asked for.",
    )
    medusa_heads_coefficient: float = Field(
        allow_inf_nan=False,
        default=0.2,
        gt=0.0,
        description="λ0, weight of the heads' losses, above 0. Default 0.2: the paper's for Medusa-2 (section 2.2.2).",
    )
    medusa_decay_coefficient: float = Field(
        allow_inf_nan=False,
        default=0.8,
        gt=0.0,
        le=1.0,
        description="Head i (from 0) is weighted λ0 · decay^(i + 1); above 0, at most 1. Default 0.8: the paper's (section 2.2.1).",
    )
    medusa_scheduler: str = Field(
        default="constant",
        description="Factor on λ0 over training: constant, linear, sine, or sine_R (sine up to the fraction R, then 1; 0 < R ≤ 1). "
        "Default constant: λ0 as the paper writes it (section 2.2.2).",
    )
    medusa_lr_multiplier: float = Field(
        allow_inf_nan=False,
        default=1.0,
        gt=0.0,
        description="Learning rate of the heads relative to the backbone's, above 0. Default 1.0: one rate for all, ours; the paper's "
        "recipes use 4.",
    )
    medusa_num_unfreeze_layers: int = Field(
        default=0,
        ge=0,
        description="Train only the last n decoder layers and the final norm with the heads; n from 0 to the model's layers. Default "
        "0: all layers, as in the paper.",
    )
    medusa_checkpoint_layers: int = Field(
        default=0,
        ge=0,
        description="Medusa-2: recompute activations of the first n decoder layers in the backward, n from 0 to the model's layers; "
        "gradient_checkpointing does all. Default 0: none, ours.",
    )
    medusa_self_distillation: bool = Field(
        default=False,
        description="Adds KL(frozen self ‖ trained self) to the base loss; the teacher is the model with adapters off. Default false: "
        "the paper's where training data is at hand (section 2.3.2).",
    )
    medusa_lm_coefficient: float | None = Field(
        allow_inf_nan=False,
        default=None,
        ge=0.0,
        description="Weight of the base model's own CE, at least 0. Default 1.0, or 0.0 with self-distillation: the paper's (sections "
        "2.2.2 and 2.3.2).",
    )
    medusa_kl_coefficient: float | None = Field(
        allow_inf_nan=False,
        default=None,
        ge=0.0,
        description="Weight of the self-distillation KL, at least 0. Default 0.0, or 1.0 with self-distillation: the paper's (section "
        "2.3.2).",
    )
    medusa_distillation_regularization: float = Field(
        allow_inf_nan=False,
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="α: base targets are α · own softmax + (1 - α) · one-hot; at least 0, below 1. Its gradient is exactly that of "
        "medusa_lm_coefficient times (1 - α), which says the same more plainly; only the logged loss differs. Default 0.0: plain "
        "CE, as in the paper.",
    )
    medusa_logging: bool = Field(
        default=True,
        description="Log accuracies per head and the acceptance length beside the losses. Default true, ours.",
    )
    medusa_logging_topk: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Accuracies logged: top 1 to k, k from 1 to 100. Default 5, ours.",
    )
    medusa_plots: bool = Field(
        default=False,
        description="Draw losses, accuracies, schedule and acceptance length into output_dir at the end of training; needs matplotlib. "
        "Default false, ours: `axolotl-medusa plot` draws them later.",
    )
    medusa_lm_head: Literal["separate", "shared", "trained"] = Field(
        default="separate",
        description="separate: each head owns an output layer started from lm_head (v1). shared: heads reuse lm_head (v2). trained: "
        "one output layer is trained for all heads, started from lm_head. Default separate: the paper's (section 2.1.1).",
    )
    medusa_draft_vocab: int | None = Field(
        default=None,
        ge=128,
        description="Heads choose among this many tokens, those that the training data's answers have most often; at least 128. Their "
        "output layer costs as much less, in training and in decoding. A target outside teaches a head nothing and counts as a "
        "miss. Default none: the whole vocabulary, as in the paper.",
    )
    medusa_heads_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type of the heads' parameters, whatever the base model's. bfloat16 halves their memory, but rounds small steps "
        "away. Default auto, ours: float32 with bf16, fp16 or an adapter, else the base model's.",
    )
    medusa_init_from: str | None = Field(
        default=None,
        description="Heads directory, or an output_dir that has one, whose heads training starts from: stage 2 after stage 1 (paper, "
        "section 2.2.2). Default none: heads start at zero.",
    )
    medusa_head_loss: Literal["ce", "kl", "tv", "lk"] = Field(
        default="ce",
        description="ce: heads learn the tokens of the data. The others: they learn the base model's own distribution p (the frozen "
        "self's in self-distillation) at the position that they predict. kl: KL(p ‖ q). tv: 1 - Σ min(p, q), what rejection "
        "sampling refuses; its gradient is small at the start. lk: λ · kl + (1 - λ) · tv with λ = exp(-10 · Σ min(p, q)) "
        "(arXiv 2602.23881). Default ce: the paper's (section 2.2.1).",
    )
    medusa_head_weighting: Literal["decay", "chain"] = Field(
        default="decay",
        description="decay: head i's losses are weighted by medusa_decay_coefficient^(i + 1). chain: each row of head j by "
        "Σ_{m ≥ j} Π_{i ≤ m} q_i, the gradient of the expected number of tokens accepted in a row, with q_i what head i gives its "
        "target at that position, and the sum divided by the number of positions; a position where a head has no target ends "
        "the chain (D-PACE, arXiv 2605.18810). Default decay: the paper's (section 2.2.1).",
    )
    medusa_chain_smoothing: float = Field(
        allow_inf_nan=False,
        default=0.5,
        ge=0.0,
        le=1.0,
        description="α of medusa_head_weighting: chain, which takes (1 - α) · q + α for q, 0 to 1. At 0 the weights are the exact "
        "gradient, and heads that are wrong are hardly taught. Default 0.5: that of arXiv 2605.18810. With it the weights of three "
        "heads add up to 1.4 where none is right and to 6 where all are certain; with decay they are 1.95.",
    )
    medusa_hidden_cache: str | None = Field(
        default=None,
        description="Directory where Medusa-1 keeps the backbone's hidden states, so that later epochs and runs skip it. Default none, "
        "ours.",
    )
    medusa_hidden_cache_limit_gb: float = Field(
        allow_inf_nan=False,
        default=100.0,
        gt=0.0,
        description="Largest cache that is begun, in 10^9 bytes (counted rows · hidden size · 2), above 0. Default 100, ours: a tenth "
        "of a 1 TB disk.",
    )

    medusa_skip_bad_rows: bool = Field(
        default=False,
        description="Leave out conversations that the chat template cannot render, and count them. Default false, ours: the run stops "
        "before anything is loaded and names them.",
    )

    @field_validator(
        "medusa_num_heads",
        "medusa_num_layers",
        "medusa_num_unfreeze_layers",
        "medusa_checkpoint_layers",
        "medusa_logging_topk",
        "medusa_draft_vocab",
        mode="before",
    )
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected a whole number")
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        problems = unknown_key_problems(data) if isinstance(data, Mapping) else []
        if problems:
            raise ValueError("; ".join(problems))
        if isinstance(data, Mapping):  # `key:` without a value means the default
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return data

    @model_validator(mode="after")
    def _fill_dependent_defaults(self) -> MedusaArgs:
        if self.medusa_lm_coefficient is None:
            self.medusa_lm_coefficient = 0.0 if self.medusa_self_distillation else 1.0
        if self.medusa_kl_coefficient is None:
            self.medusa_kl_coefficient = 1.0 if self.medusa_self_distillation else 0.0
        return self


PATH_KEYS = {"medusa_init_from_dir": "medusa_init_from", "medusa_hidden_cache_dir": "medusa_hidden_cache"}
"""Other names of the keys that hold paths. Axolotl's telemetry leaves the values of keys with `dir` in their name out, and it
sends the YAML before any plugin is loaded."""


def take_path_keys(cfg: MutableMapping[str, Any]) -> list[str]:
    """Moves what stands under another name of a key to the key.

    Args:
        cfg: The YAML before validation; changed in place.

    Returns:
        A line for each key that the YAML has under both names.
    """
    problems = []
    for name, key in PATH_KEYS.items():
        if name in cfg:
            value = cfg.pop(name)
            if value is not None and cfg.get(key) is not None:
                problems.append(f"{name} and {key} are two names of one key: remove one of the two")
            cfg[key] = cfg.get(key) if value is None else value
    return problems


def unknown_key_problems(cfg: Mapping[str, Any]) -> list[str]:
    """One line for each `medusa_*` key that does not exist, with the nearest one that does."""
    problems = []
    for key in sorted(str(key) for key in cfg if str(key).startswith("medusa")):
        if key not in MedusaArgs.model_fields and key not in PATH_KEYS:
            names = [name.removeprefix("medusa_") for name in MedusaArgs.model_fields]
            stem = key.removeprefix("medusa").lstrip("_")
            nearest = difflib.get_close_matches(stem, names, n=1, cutoff=0.5)
            nearest = nearest or [name for name in names if stem and name.startswith(stem)]
            hint = (
                f"did you mean medusa_{nearest[0]}?" if nearest else f"known keys: {', '.join(MedusaArgs.model_fields)}"
            )
            problems.append(f"{key} is not a key of axolotl-medusa: {hint}")
    return problems

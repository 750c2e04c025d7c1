"""The models and batches of a case of `benchmarks.train_step`, and one optimizer step of ours and of the reference.

Contract: builds and steps; nothing here measures. Both sides of a case get the same backbone, heads, types, optimizer
and batch, so that their losses agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.train_step.cases import LORA_RANK, WIDE_HIDDEN, WIDE_VOCAB, Case, Side
from benchmarks.train_step.plain_trainer import PlainTrainer, column_targets
from benchmarks.train_step.roofline import Shape
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_medusa.losses.targets import IGNORE_INDEX
from axolotl_medusa.model.anatomy import backbone, output_embedding, recompute_layers
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import Objective, install_objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
COEFFICIENT = 0.2
LEARNING_RATE = 1e-5
COUNTED_SHARE = 0.6
TURN_TOKENS = 96
"""Mean length of a counted answer, in short samples an eighth; prompts between them are as long as the share wants."""

RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "vicuna-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "wide": {
        "model_type": "llama",
        "vocab_size": WIDE_VOCAB,
        "hidden_size": WIDE_HIDDEN,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""Shapes with random weights; `wide` is SmolLM2's, with an output layer of its own."""


def autocast(case: Case) -> bool:
    """Whether the case's steps run under autocast."""
    return case.precision == "bf16" and case.heads_dtype == "float32"


def trained_dtype(case: Case) -> torch.dtype:
    """Type of the case's heads and adapters."""
    return torch.float32 if case.heads_dtype == "float32" else DTYPES[case.precision]


def load_model(case: Case) -> Any:
    """The case's causal LM in its precision on its device, frozen."""
    dtype = DTYPES[case.precision]
    if case.model in RANDOM_MODELS:
        options = dict(RANDOM_MODELS[case.model], num_hidden_layers=case.layers, max_position_embeddings=4096)
        options["vocab_size"] = case.vocab or options["vocab_size"]
        if case.liger:
            use_liger(options["model_type"])
        torch.manual_seed(0)
        config = AutoConfig.for_model(options.pop("model_type"), tie_word_embeddings=False, **options)
        with torch.device(case.device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(case.directory), attn_implementation="sdpa", dtype=dtype)
    return model.requires_grad_(False).to(case.device)


def use_liger(model_type: str) -> None:
    """Makes models that are built from now on use Liger's kernels for all but the loss."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)


def with_shared_weights(model: Any) -> Any:
    """A copy of a frozen model that has its modules to itself and its tensors in common."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def make_heads(case: Case, model: Any) -> MedusaHeads:
    """Fresh heads: zero blocks, output layers that start from lm_head."""
    vocab_size, hidden_size = output_embedding(model).weight.shape
    heads = MedusaHeads(
        hidden_size, vocab_size, case.heads, form=case.form, dtype=trained_dtype(case), device=case.device
    )
    heads.start_output_layers_from(output_embedding(model).weight)
    return heads


def lora_config(case: Case) -> Any:
    """Adapters on every matrix and on the output layer."""
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=16,
        lora_dropout=case.lora_dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def make_batch(case: Case, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens whose labels are masked as in conversations: prompts of random lengths between counted answers."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, vocab_size, (case.batch, case.seq), generator=generator)
    labels = input_ids.clone()
    turn = min(TURN_TOKENS, case.seq / 8)
    means = (turn * (1 - COUNTED_SHARE) / COUNTED_SHARE, turn)
    for row in labels:
        start, counted = 0, False
        while start < case.seq:
            spread = 0.5 + torch.rand((), generator=generator).item()
            end = start + max(1, round(means[counted] * spread))
            if not counted:
                row[start:end] = IGNORE_INDEX
            start, counted = end, not counted
    return {"input_ids": input_ids, "labels": labels}


def counted_rows(labels: Tensor, num_heads: int) -> list[int]:
    """Counted rows of the base model and of each head, `[N + 1]`."""
    return [int((column_targets(labels, column) != IGNORE_INDEX).sum()) for column in range(num_heads + 1)]


def our_model(case: Case, lm: Any, heads: MedusaHeads) -> Any:
    """The model as axolotl-medusa trains it."""
    model, only_heads = lm, case.stage == "medusa-1"
    if not only_heads:
        model = get_peft_model(lm, lora_config(case), autocast_adapter_dtype=trained_dtype(case) == torch.float32)
    if case.recompute_layers:
        recompute_layers(lm, min(case.recompute_layers, lm.config.num_hidden_layers))
    attach_heads(model, heads)
    distilled = Objective(lm_coefficient=0.0, kl_coefficient=1.0)
    install_objective(model, Objective(only_heads=True) if only_heads else distilled)
    return model


def reference_model(case: Case, lm: Any, heads: MedusaHeads) -> PlainTrainer:
    """The model as the reference trains it."""
    lora = None if case.stage == "medusa-1" else lora_config(case)
    return PlainTrainer(lm, heads, lora, coefficient=COEFFICIENT)


class Step:
    """One side of a case: a model, its optimizer, and what is done with a batch.

    Args:
        case: What is trained.
        side: Ours or the reference.
        lm: The case's causal LM; it is changed in place.
        batch: `input_ids` and `labels`.
    """

    def __init__(self, case: Case, side: Side, lm: Any, batch: dict[str, Tensor]) -> None:
        self.case = case
        self.batch = {name: tensor.to(case.device) for name, tensor in batch.items()}
        self.shape = Shape.of(lm.config)
        self.lm = lm
        heads = make_heads(case, lm)
        torch.manual_seed(2)
        build: Callable[[Case, Any, MedusaHeads], nn.Module] = our_model if side == "ours" else reference_model
        self.model = build(case, lm, heads).train()
        self.side = side
        self.optimizer = make_optimizer(case, [p for p in self.model.parameters() if p.requires_grad])

    def loss(self) -> Tensor:
        """The loss of the batch, scalar."""
        with torch.autocast(self.case.device, dtype=torch.bfloat16, enabled=autocast(self.case)):
            if self.side == "reference":
                loss: Tensor = self.model(**self.batch)
            else:
                loss = self.model(**self.batch, medusa_coefficient=COEFFICIENT).loss
        return loss

    def __call__(self) -> float:
        """One optimizer step; returns the loss before it."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def backbone_forward(self) -> None:
        """The backbone alone over the batch, adapters included."""
        with torch.autocast(self.case.device, dtype=torch.bfloat16, enabled=autocast(self.case)):
            backbone(self.lm)(input_ids=self.batch["input_ids"], use_cache=False)


def make_optimizer(case: Case, parameters: list[nn.Parameter]) -> Any:
    """The optimizer of both sides."""
    if case.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=LEARNING_RATE)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

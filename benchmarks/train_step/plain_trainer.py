"""The reference of `benchmarks.train_step`: a Medusa training step with the structure of the first public Medusa trainer.

Written to be plain, not slow: logits of the base model and of every head are computed at all positions and stacked,
`[N + 1, batch, seq, vocab]`; each column is shifted, made contiguous and goes through cross-entropy with an ignored
index; nine top-k passes a column give the accuracies; heads are held twice, as peft's `modules_to_save` holds them; in
self-distillation a second forward with the adapters off gives the teacher's logits at all positions. Loss and gradients
equal those of `axolotl_medusa.training.objective` for the same weights (tests/benchmarks/test_train_step.py).

Contract: for models whose logits are `lm_head(last hidden state)`, batches without padding and packing.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from axolotl_medusa.losses.targets import IGNORE_INDEX
from axolotl_medusa.model.heads import MedusaHeads

TOP_K = 9
HEADS = "plain_heads"
"""Name of the heads inside the causal LM, for peft's `modules_to_save`."""


def column_targets(labels: Tensor, column: int) -> Tensor:
    """Targets of the base model (column 0) or of head `column - 1`, `[batch, seq - 1 - column]`; -100 where ignored.

    Args:
        labels: Token ids or -100, `[batch, seq]`.
        column: Row t of a column predicts `labels[t + 1 + column]`, if the base model's own target is not ignored.
    """
    base = labels[:, 1 : labels.shape[1] - column]
    return labels[:, 1 + column :].masked_fill(base == IGNORE_INDEX, IGNORE_INDEX)


class PlainHeads(nn.Module):
    """Heads that return logits at all positions.

    Args:
        heads: The weights.
    """

    def __init__(self, heads: MedusaHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, hidden: Tensor, lm_head: nn.Module) -> list[Tensor]:
        """Logits of each head, `[batch, seq, vocab]`, from hidden states `[batch, seq, hidden]`.

        Args:
            hidden: Last hidden states after the final norm.
            lm_head: The model's output layer, for heads that reuse it.
        """
        logits = []
        for head in range(self.heads.num_heads):
            own = self.heads.output_layer(head)
            features = self.heads.hidden(head, hidden)
            logits.append(lm_head(features.to(hidden.dtype)) if own is None else own(features))
        return logits


class PlainTrainer(nn.Module):
    """A causal LM with heads whose forward is the training loss.

    Args:
        lm: The causal LM; it is changed in place.
        heads: The heads; held twice.
        lora: Peft's configuration of the adapters (Medusa-2), or None for Medusa-1: a frozen backbone.
        coefficient: Weight of the heads' losses.
        decay: Head i (from 0) is weighted `coefficient · decay^(i + 1)`.

    Attributes:
        metrics: Loss and accuracies of each column at the last step.
    """

    def __init__(
        self, lm: Any, heads: MedusaHeads, lora: Any = None, coefficient: float = 0.2, decay: float = 0.8
    ) -> None:
        super().__init__()
        self.only_heads = lora is None
        self.coefficient = coefficient
        self.decay = decay
        self.metrics: dict[str, float] = {}
        lm.requires_grad_(False)
        lm.add_module(HEADS, PlainHeads(heads))
        self.model = lm
        if self.only_heads:
            setattr(lm, HEADS, ModulesToSaveWrapper(getattr(lm, HEADS), "default"))
        else:
            lora.modules_to_save = [HEADS]
            self.model = get_peft_model(lm, lora, autocast_adapter_dtype=heads.dtype == torch.float32)
        self.lm = [lm]  # in a list: not a second submodule

    @property
    def heads(self) -> MedusaHeads:
        """The trained copy of the heads."""
        trained: MedusaHeads = getattr(self.lm[0], HEADS).modules_to_save["default"].heads
        return trained

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss, scalar, of tokens `[batch, seq]` with labels `[batch, seq]`; Medusa-2 distils the model itself."""
        return self.loss(self.stacked_logits(input_ids), labels, self.teacher_logits(input_ids))

    def stacked_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the base model and of every head, `[N + 1, batch, seq, vocab]`."""
        lm = self.lm[0]
        with torch.no_grad() if self.only_heads else contextlib.nullcontext():
            hidden = lm.model(input_ids=input_ids, use_cache=False)[0]
            logits = [lm.lm_head(hidden)]
        logits += getattr(lm, HEADS)(hidden, lm.lm_head)
        return torch.stack(logits)

    def teacher_logits(self, input_ids: Tensor) -> Tensor | None:
        """Logits of the model with its adapters off, `[batch, seq, vocab]`; None in Medusa-1."""
        if self.only_heads:
            return None
        with torch.no_grad(), self.model.disable_adapter():
            logits: Tensor = self.lm[0](input_ids=input_ids, use_cache=False).logits
        return logits

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """The weighted sum of the columns' losses; keeps their metrics.

        Args:
            logits: `[N + 1, batch, seq, vocab]`.
            labels: `[batch, seq]`.
            teacher_logits: `[batch, seq, vocab]`, for the divergence in place of the base model's cross-entropy.
        """
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for column in range(logits.shape[0]):
            shifted = logits[column, :, : -(1 + column)].contiguous().flatten(0, 1)
            targets = column_targets(labels, column).flatten()
            if column == 0 and teacher_logits is not None:
                part = divergence(shifted, teacher_logits[:, :-1].flatten(0, 1), targets)
            else:
                part = cross_entropy(shifted, targets)
            if column:
                total = total + self.coefficient * self.decay**column * part
            elif not self.only_heads:
                total = total + part
            self._keep_metrics(column, part, shifted, targets)
        return total

    def _keep_metrics(self, column: int, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        counted = targets != IGNORE_INDEX
        self.metrics[f"loss{column}"] = loss.item()
        for k in range(1, TOP_K + 1):
            found = logits.topk(k, dim=-1).indices[counted] == targets[counted, None]
            self.metrics[f"top{k}_{column}"] = found.any(dim=-1).float().mean().item()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, from `[rows, vocab]` and `[rows]`, as CUDA's autocast has it: in fp32 under autocast only."""
    if torch.is_autocast_enabled(logits.device.type):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


def divergence(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over the counted rows, scalar, from `[rows, vocab]` twice and targets `[rows]`."""
    counted = targets != IGNORE_INDEX
    log_q = F.log_softmax(logits[counted].float(), dim=-1)
    p = F.softmax(teacher_logits[counted].float(), dim=-1)
    return F.kl_div(log_q, p, reduction="sum") / counted.sum()

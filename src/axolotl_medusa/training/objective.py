"""The training objective of a causal LM with heads, computed inside the model's own forward.

Contract: knows the model, its heads and the losses; nothing about axolotl, optimizers or files. The loss is computed in
the forward of the wrapped model because that is where DDP, FSDP and ZeRO-3 gather parameters and hook gradients.

A batch's way from the YAML to an optimizer step (modules are those of this folder, unless a room stands before them):

1. The YAML. `args.MedusaArgs` has every `medusa_*` key with its default and bounds. `plugin.MedusaPlugin.register` stops
   with all contradictions that `yaml_problems.config_problems` finds, before anything is loaded.
2. The data. axolotl masks, tokenises and packs it. `MedusaPlugin.load_datasets` only stops at files without an answer to
   learn from and at rows that the chat template cannot render. axolotl's collator makes the batches: `input_ids`, `labels`
   that are -100 where nothing is learnt, and `position_ids` that start again at each packed sample.
3. The model. axolotl loads it and puts adapters around it. Then `MedusaPlugin.post_lora_load` calls `plugin.attach`:
   it makes the heads (`model.heads.MedusaHeads`), attaches them to the causal LM, and calls `install_objective` below.
   A later hook of the plugin checks the logits: here LoRA's kernels are not yet bound to the layers.
4. The trainer. `trainer.MedusaTrainer.setup_medusa` chooses what trains (`trainable.set_trainable`).
5. An optimizer step begins in `MedusaTrainer.get_batch_samples`. It takes the step's micro-batches and counts the targets of
   the base model and of each head over all of them and over all ranks (`losses.targets.target_counts`). Losses are
   divided by these counts, so that micro-batches of any size add up to the same step.
6. `MedusaTrainer.compute_loss` runs for each micro-batch. It hands the forward the counts (`num_items_in_batch`) and the
   heads' weight at this step (`medusa_coefficient`): `medusa_heads_coefficient` times `schedule.scheduler_factor`.
7. The model's forward is `_MicroBatch` below:
   - targets: which token each row predicts (`losses.targets.medusa_targets`); rows without a base target do not count, and
     targets outside a draft vocabulary teach a head nothing (`_within_draft_vocab`)
   - backbone: its forward without lm_head, of which only the counted rows are kept
   - teacher: whose distribution is learnt, where the loss has a divergence (`_teacher`)
   - predictions: hidden rows, targets and weight of each head (`_head_prediction`) and of the base model (`_base_prediction`)
   - chain: which rows of the heads stand at the same position, where they are weighted by it (`_chain`, `losses.chain`)
   - loss: `losses.chunked.chunked_loss` goes through all rows chunk by chunk. It computes a chunk's gradient while the
     chunk's logits are at hand (`losses.closed_form`), so the forward ends with gradients of the output layers and of
     their inputs. (Where an output layer is divided among ranks, each chunk gathers it, and its backward computes it anew.)
     `losses.cross_entropy_and_kl.reference_loss` is the same in plain PyTorch.
   - metrics: sums that `MedusaTrainer.log` averages over a logging interval
8. The backward hands those gradients on: to the output layers, through the heads' residual blocks, into the backbone.
9. The optimizer steps after the last micro-batch. It is axolotl's; `MedusaTrainer.create_optimizer` gives the heads
   groups of their own where their learning rate, `medusa_lr_multiplier` times the backbone's, is another.
10. Checkpoints and the end: `saving.HeadsSaver` writes the heads into `medusa_heads`.

Where the two recipes part:

|               | Medusa-1 (`only_heads`)                           | Medusa-2                                               |
|---------------|---------------------------------------------------|--------------------------------------------------------|
| backbone (7)  | frozen, without a graph or dropout; not run where | trained: with a graph                                  |
|               | `hidden_cache` has its rows (`hidden_rows`)       |                                                        |
| base loss (7) | only watched, on every 16th row (`_watched_base`) | a prediction like the heads' (`_base_prediction`)      |
| teacher (7)   | the model itself, for heads that learn from it     | the same, or with self-distillation the model with its |
|               |                                                   | adapters off (a second forward of the backbone)        |
| backward (8)  | ends at the heads                                 | goes through the backbone                              |
| files (10)    | the heads                                         | the heads, and the adapter or the model                |
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from axolotl_medusa.losses.chain import Chain
from axolotl_medusa.losses.chunked import chunked_loss
from axolotl_medusa.losses.cross_entropy_and_kl import LossSums, LossWeights
from axolotl_medusa.losses.prediction import Accuracies, Prediction, Teacher
from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets
from axolotl_medusa.model.anatomy import (
    backbone,
    causal_lm,
    frozen_output_embedding,
    output_embedding,
)
from axolotl_medusa.model.heads import MedusaHeads, attached_heads
from axolotl_medusa.training.output_layers import OutputLayers, evaluating

BASE_LOSS_SAMPLE = 16
"""In Medusa-1 training the base loss is only watched: every 16th row of each batch keeps that below 1% of a step."""

TOP_K_SAMPLE = 16
"""In training, accuracies beyond top 1 come from every 16th row: a top-k pass costs half of a head's cross-entropy."""

_OF_LM_HEAD = ("return_dict", "logits_to_keep", "skip_logits")
"""Arguments that speak of the logits; the backbone does not take them."""

HeadLoss = Literal["ce", "kl", "tv", "lk"]

_HEAD_LOSSES: dict[HeadLoss, LossWeights] = {
    "ce": LossWeights(),
    "kl": LossWeights(0.0, kl=1.0),
    "tv": LossWeights(0.0, tv=1.0),
    "lk": LossWeights(0.0, lk=1.0),
}

_Metric = tuple[Tensor, Tensor]
"""A sum and what it is divided by, scalars."""


@dataclass(frozen=True)
class Objective:
    """What is trained and how it is weighted; the YAML key of each field is `medusa_` + its name.

    Attributes:
        only_heads: Medusa-1: no gradient for the backbone and no base loss.
        decay_coefficient: Head i is weighted `coefficient · decay^(i + 1)`.
        lm_coefficient: Weight of the base model's own cross-entropy.
        kl_coefficient: Weight of the base model's KL(teacher ‖ student); the teacher is the model with its adapters off.
        distillation_regularization: Share α of the model's own softmax in the base targets.
        head_loss: `ce`, or the distance from the teacher's distribution at the position that a head predicts: `kl`, `tv` or
            `lk` (`LossWeights`). Without `kl_coefficient` the teacher is the model itself.
        head_weighting: `decay`, or `chain`: each row weighted by what it adds to the expected length of the heads' chain
            (`losses.chain`), in place of `decay^(i + 1)`.
        chain_smoothing: α of that chain.
        logging: Whether accuracies are computed and the acceptance length.
        logging_topk: Accuracies top 1 to k.
    """

    only_heads: bool = False
    decay_coefficient: float = 0.8
    lm_coefficient: float = 1.0
    kl_coefficient: float = 0.0
    distillation_regularization: float = 0.0
    head_loss: HeadLoss = "ce"
    head_weighting: Literal["decay", "chain"] = "decay"
    chain_smoothing: float = 0.5
    logging: bool = True
    logging_topk: int = 5


@dataclass
class MedusaOutput(ModelOutput):  # type: ignore[misc]
    """What the patched forward returns when it is given labels.

    Attributes:
        loss: The weighted sum of the base loss (Medusa-2) and the heads' losses, scalar.
        metric_sums: Sums in the order of `metric_names`, `[metrics, 2]`: numerators and denominators, detached, fp64.
        hidden_rows: With `return_hidden_rows`, hidden states of the counted rows, `[counted rows, hidden]`, detached.
    """

    loss: Tensor | None = None
    metric_sums: Tensor | None = None
    hidden_rows: Tensor | None = None


def metric_names(num_heads: int, objective: Objective) -> list[str]:
    """Names of the metrics in the order of `MedusaOutput.metric_sums`."""
    names = ["base_loss"]
    if objective.kl_coefficient:
        names += ["base_ce", "base_kl"]
    for head in range(num_heads):
        names.append(f"medusa{head}_loss")
        names += [f"medusa{head}_top{k}" for k in range(1, objective.logging_topk + 1)] if objective.logging else []
    return names + (["medusa_acceptance_length"] if objective.logging else [])


def install_objective(model: nn.Module, objective: Objective) -> None:
    """Makes the causal LM inside `model` return the Medusa loss when it is given labels.

    The new forward takes, beside the model's own arguments, `num_items_in_batch` (targets of the base model and of each
    head in the whole optimizer step, `[num_heads + 1]`; without, those of this batch) and `medusa_coefficient` (λ, the
    heads' weight at this step, default 1). Calls without labels reach the model's own forward unchanged.

    In Medusa-1 it also takes `hidden_rows`, hidden states after the final norm of the counted rows in the order of the
    flattened batch, `[counted rows, hidden]`: the backbone is then not run. With `return_hidden_rows` it returns those
    rows and a loss of zero, and computes nothing else.

    Args:
        model: A model that `heads.attach_heads` was called on, possibly wrapped by peft.
        objective: What to train.
    """
    lm = causal_lm(model)
    attached_heads(model)
    own_forward = lm.forward
    disable_adapter = getattr(model, "disable_adapter", None)

    def forward(
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        medusa_coefficient: float = 1.0,
        hidden_rows: Tensor | None = None,
        return_hidden_rows: bool = False,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return own_forward(input_ids=input_ids, **kwargs)
        if (hidden_rows is not None or return_hidden_rows) and not objective.only_heads:
            raise ValueError("hidden_rows belong to a frozen backbone, and Medusa-2 trains it: expected only_heads")
        for name in _OF_LM_HEAD:
            kwargs.pop(name, None)
        micro_batch = _MicroBatch(
            lm, objective, disable_adapter, {"input_ids": input_ids, **kwargs, "use_cache": False}
        )
        if return_hidden_rows:
            return micro_batch.counted_rows(labels)
        return micro_batch.forward(labels, num_items_in_batch, medusa_coefficient, hidden_rows)

    forward.__signature__ = _joined_signature(own_forward, forward)  # type: ignore[attr-defined]
    lm.forward = forward


def _joined_signature(own: Callable[..., Any], ours: Callable[..., Any]) -> inspect.Signature:
    """The parameters of both: the Trainer drops every column of the data that the forward does not name."""
    named = {**inspect.signature(ours).parameters, **inspect.signature(own).parameters}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=parameter.default)
        for name, parameter in named.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    return inspect.Signature([*parameters, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])


class _MicroBatch:
    """One micro-batch on its way through the model: step 7 above."""

    def __init__(
        self,
        lm: Any,
        objective: Objective,
        disable_adapter: Callable[[], contextlib.AbstractContextManager[None]] | None,
        inputs: dict[str, Any],
    ) -> None:
        self.lm = lm
        self.objective = objective
        self.disable_adapter = disable_adapter or contextlib.nullcontext
        self.inputs = inputs
        self.heads: MedusaHeads = attached_heads(lm)
        self.lm_head = output_embedding(lm)
        self.layers = OutputLayers(lm, self.heads)

    def counted_rows(self, labels: Tensor) -> MedusaOutput:
        """The hidden states of the counted rows alone."""
        targets = medusa_targets(labels, 0, self.inputs.get("position_ids"))
        all_hidden = self._last_hidden(teacher=False)
        return MedusaOutput(
            loss=all_hidden.new_zeros(()),
            hidden_rows=all_hidden[(targets[..., 0] != IGNORE_INDEX).to(all_hidden.device)],
        )

    def forward(
        self, labels: Tensor, counts: Tensor | None, coefficient: float, hidden_rows: Tensor | None = None
    ) -> MedusaOutput:
        """The loss and the metrics; arguments as for the forward of `install_objective`."""
        objective, heads = self.objective, self.heads
        targets = medusa_targets(labels, heads.num_heads, self.inputs.get("position_ids"))
        targets = targets.to(self.lm.get_input_embeddings().weight.device).flatten(0, 1)
        if counts is None:
            counts = (targets != IGNORE_INDEX).sum(dim=0)
        rows = (targets[:, 0] != IGNORE_INDEX).nonzero().squeeze(1)
        hidden = hidden_rows
        if hidden is None:
            all_hidden = self._last_hidden(teacher=False).flatten(0, 1)
            hidden = all_hidden[rows.to(all_hidden.device)]
        rows, targets = rows.to(hidden.device), targets.to(hidden.device)
        targets, counts = targets[rows], counts.to(hidden.device).clamp(min=1)
        counted = [targets[:, head + 1] != IGNORE_INDEX for head in range(heads.num_heads)]
        targets, learnt = self._within_draft_vocab(targets, counted)
        scales = self._head_scales(coefficient, counts)
        predictions = [
            self._head_prediction(head, hidden, rows, targets, learnt[head], scales[head])
            for head in range(heads.num_heads)
        ]
        base = [] if objective.only_heads else [self._base_prediction(hidden, targets, 1.0 / counts[0])]
        teacher, chain = self._teacher(hidden, rows), self._chain(learnt)
        if heads.token_map is None:
            loss, sums = chunked_loss([*predictions, *base], teacher, chain=chain)
        else:  # heads learn from a teacher that chooses among their tokens, the base model from one of all tokens
            of_heads = None if teacher is None else Teacher(teacher.hidden, self.layers.of_draft_vocab(teacher.layer))
            loss, sums = chunked_loss(predictions, of_heads, chain=chain)
            if base:
                base_loss, base_sums = chunked_loss(base, teacher)
                loss, sums = loss + base_loss, sums + base_sums
        metrics = self._watched_base(hidden, targets) if objective.only_heads else self._base_metrics(sums.pop(), rows)
        metrics += self._head_metrics(sums, counted, learnt, rows)
        stacked = torch.stack([torch.stack([part.double() for part in metric]) for metric in metrics])
        return MedusaOutput(loss=loss, metric_sums=stacked)

    def _within_draft_vocab(self, targets: Tensor, counted: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The heads' targets as places in their draft vocabulary, and which of them have one there; without one, all as they are."""
        tokens = self.heads.token_map
        if tokens is None:
            return targets, list(counted)
        places = torch.full((self.heads.vocab_size,), IGNORE_INDEX, device=targets.device)
        places[tokens.to(targets.device)] = torch.arange(len(tokens), device=targets.device)
        of_heads = torch.where(targets[:, 1:] == IGNORE_INDEX, IGNORE_INDEX, places[targets[:, 1:].clamp(min=0)])
        learnt = [of_heads[:, head] != IGNORE_INDEX for head in range(self.heads.num_heads)]
        return torch.cat([targets[:, :1], of_heads], dim=1), learnt

    def _head_scales(self, coefficient: float, counts: Tensor) -> list[Tensor]:
        """The factor of each head's losses: its decay over its targets, or for all heads 1 over the chains, where head 0 has one."""
        objective, heads = self.objective, range(self.heads.num_heads)
        if objective.head_weighting == "chain":
            return [coefficient / counts[1] for _ in heads]
        return [coefficient * objective.decay_coefficient ** (head + 1) / counts[head + 1] for head in heads]

    def _chain(self, counted: Sequence[Tensor]) -> Chain | None:
        """The heads as a chain at every counted row, where their rows are weighted so."""
        if self.objective.head_weighting == "decay":
            return None
        positions = [of_head.nonzero().squeeze(1) for of_head in counted]
        return Chain(positions, counted[0].shape[0], self.objective.chain_smoothing)

    def _last_hidden(self, *, teacher: bool) -> Tensor:
        """Last hidden states after the final norm, `[batch, seq, hidden]`, with a gradient only where one is needed."""
        decoder = backbone(self.lm)
        if not teacher and not self.objective.only_heads:
            return cast(Tensor, decoder(**self.inputs)[0])
        with torch.no_grad(), evaluating(decoder):
            return cast(Tensor, decoder(**self.inputs)[0])

    def _teacher(self, hidden: Tensor, rows: Tensor) -> Teacher | None:
        """Whose distribution is learnt, at all counted rows: with self-distillation the frozen model's, else the model's own."""
        if self.objective.kl_coefficient:
            with self.disable_adapter():
                hidden = self._last_hidden(teacher=True).flatten(0, 1)[rows]
            return Teacher(hidden, self.layers.of(frozen_output_embedding(self.lm_head)))
        if _HEAD_LOSSES[self.objective.head_loss].needs_teacher:
            return Teacher(hidden.detach(), self.layers.of(self.lm_head, frozen=True))
        return None

    def _base_prediction(self, hidden: Tensor, targets: Tensor, scale: Tensor) -> Prediction:
        objective = self.objective
        weights = LossWeights(objective.lm_coefficient, objective.kl_coefficient, objective.distillation_regularization)
        every_row = torch.arange(hidden.shape[0], device=hidden.device) if objective.kl_coefficient else None
        return Prediction(hidden, targets[:, 0], self.layers.of(self.lm_head), weights, scale, every_row)

    def _head_prediction(
        self, head: int, hidden: Tensor, rows: Tensor, targets: Tensor, counted: Tensor, scale: Tensor
    ) -> Prediction:
        """A head's rows; the model predicts the same token 1 + head rows later, which is a counted row too."""
        own_rows = self.heads.hidden(head, hidden[counted])
        layer = self.layers.of_head(head)
        own_targets = targets[counted, head + 1]
        weights, same_token = _HEAD_LOSSES[self.objective.head_loss], None
        if weights.needs_teacher:
            same_token = torch.searchsorted(rows, rows[counted] + 1 + head)
        return Prediction(own_rows, own_targets, layer, weights, scale, same_token, self._accuracies)

    def _watched_base(self, hidden: Tensor, targets: Tensor) -> list[_Metric]:
        """The loss of a frozen base model, which is only watched."""
        watched = slice(None, None, BASE_LOSS_SAMPLE if self.lm.training else 1)
        rows = hidden[watched]
        with torch.no_grad():
            _, (sums,) = chunked_loss([Prediction(rows, targets[watched, 0], self.layers.of(self.lm_head))])
        return [(sums.cross_entropy, _count(rows))]

    def _base_metrics(self, sums: LossSums, rows: Tensor) -> list[_Metric]:
        """The loss of a trained base model, and its terms where it has two."""
        metrics = [(sums.loss, _count(rows))]
        if self.objective.kl_coefficient:
            metrics += [(sums.cross_entropy, _count(rows)), (sums.kl, _count(rows))]
        return metrics

    def _head_metrics(
        self, sums: Sequence[LossSums], counted: Sequence[Tensor], learnt: Sequence[Tensor], rows: Tensor
    ) -> list[_Metric]:
        """Each head's loss and accuracies, and the acceptance length: heads that are right in a row, and the base token.

        Targets that a head cannot choose are in no loss, and misses in what it gets right.
        """
        metrics = []
        correct = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        accepted = _count(rows).double()
        for of_head, has_target, chosen in zip(sums, counted, learnt, strict=True):
            metrics.append((of_head.loss, chosen.sum()))
            if of_head.correct is not None and of_head.topk_hits is not None:
                metrics.append((of_head.correct.sum(), has_target.sum()))
                sampled = torch.tensor(of_head.topk_rows, device=rows.device)
                if self.heads.token_map is not None:  # a sample of what it can choose stands for all that it is asked
                    sampled = sampled * has_target.sum() / chosen.sum().clamp(min=1)
                metrics += [(hits, sampled) for hits in of_head.topk_hits[1:]]
                correct &= torch.zeros_like(correct).masked_scatter(chosen, of_head.correct)
                accepted += correct.sum()
        return [*metrics, (accepted, _count(rows))] if self.objective.logging else metrics

    @property
    def _accuracies(self) -> Accuracies | None:
        if not self.objective.logging:
            return None
        return Accuracies(self.objective.logging_topk, TOP_K_SAMPLE if self.lm.training else 1)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(rows.shape[0], device=rows.device)

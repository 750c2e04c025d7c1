"""Bytes that one GPU sends over the network in an optimizer step: the formulas.

Contract: numbers in, bytes out. Collectives are counted as rings run them: an all-gather or a reduce-scatter of B bytes
sends B (n - 1) / n from each of n GPUs, an all-reduce twice that. What is not counted is small: losses, counts, norms.

Per optimizer step of A micro-batches, with P bytes of the base model's weights and G of the gradients of all that trains:

- DDP: an all-reduce of G, once
- ZeRO-1: the same, once, in the type that is computed in, and an all-gather of the new values
- ZeRO-2: a reduce-scatter of G in every micro-batch, and an all-gather of the new values
- ZeRO-3: an all-gather of P for every pass over the layers (forward, teacher, backward, recomputation) and of an output
  layer for every chunk of the losses, forward and backward, in every micro-batch; a reduce-scatter of G in every micro-batch.
  That is the most: DeepSpeed keeps an output layer from one chunk to the next where its trace of the step foresees that
- FSDP2: an all-gather of P for every forward and once for the backward, which recomputes while the layer is there; a
  reduce-scatter of G, once
"""

from __future__ import annotations

from axolotl_medusa.estimating.memory import base_weights
from axolotl_medusa.estimating.plan import Plan
from axolotl_medusa.losses.chunk_plan import ACCELERATOR_CHUNK_LOGITS, COPIES


def sent_per_step(plan: Plan) -> float:
    """Bytes that each GPU sends in an optimizer step."""
    if plan.gpus == 1:
        return 0.0
    value = 2 if plan.half else 4
    new_values = value * plan.trained
    if plan.engine == "ddp":
        head, base = plan.head_bits // 8, plan.weight_bits // 8 or 1
        sent = 2.0 * (head * (plan.trained - plan.trained_base) + base * plan.trained_base)
    elif plan.engine == "zero-1":
        sent = 2.0 * new_values + new_values
    elif plan.engine == "zero-2":
        sent = plan.accumulation * new_values + new_values
    elif plan.engine == "zero-3":
        sent = plan.accumulation * (_gathered_by_zero_3(plan) + new_values)
    else:
        sent = plan.accumulation * _gathered_by_fsdp2(plan) + new_values
    return sent * (plan.gpus - 1) / plan.gpus


def _forwards(plan: Plan) -> int:
    return 2 if plan.self_distillation else 1


def _gathered_by_zero_3(plan: Plan) -> float:
    """Of a micro-batch."""
    sizes, value = plan.sizes, 2 if plan.half else 4
    passes = _forwards(plan)
    if not plan.only_heads:
        passes += 2 if plan.recomputed else 1
    layers = base_weights(plan) * sizes.decoder / sizes.parameters + value * plan.adapter
    blocks = value * (plan.head_parameters - plan.own_outputs)
    small = plan.adapts_output and not plan.only_heads  # chunks of an output layer with an adapter
    of_heads = plan.heads * _chunks(plan, small and (plan.shared or plan.teacher))
    of_base = 0 if plan.only_heads else _chunks(plan, small)
    of_teacher = _chunks(plan, small) if plan.teacher else 0
    outputs = value * sizes.output * (2 * of_heads + 2 * of_base + of_teacher)
    embedding = value * sizes.output * _forwards(plan)
    return passes * layers + 2 * blocks + outputs + embedding


def _chunks(plan: Plan, small: bool) -> int:
    """Chunks in which an output layer's logits of a micro-batch are computed."""
    rows = max(1, ACCELERATOR_CHUNK_LOGITS // (COPIES if small else 1) // plan.sizes.vocab)
    return -(-plan.tokens // rows)


def _gathered_by_fsdp2(plan: Plan) -> float:
    """Of a micro-batch; embeddings, output layers and heads are gathered together, for forward and backward."""
    sizes, value = plan.sizes, 2 if plan.half else 4
    passes = _forwards(plan) + (0 if plan.only_heads else 1)
    layers = base_weights(plan) * sizes.decoder / sizes.parameters + value * plan.adapter
    return passes * layers + value * (sizes.embeddings + sizes.others + plan.head_parameters)

"""Memory of one GPU at the peak of a training step, part by part: the formulas.

Contract: numbers in, bytes out; reads nothing. What PyTorch keeps for the backward is counted operation by operation, as
transformers' Llama-like layers, peft's LoRA and our losses run them. `benchmarks/results` has what was measured, and
`tests/estimating` compares.

With T tokens of a micro-batch, hidden size H, inner size I, vocabulary V, L layers, N heads, n GPUs, and a the bytes of an
activation (2 in half precision, else 4):

- weights: 4, 2 or 1 bytes a parameter, or 0.516 for a matrix in NF4 with double quantization
- what trains: its value, its gradient, the optimizer's state, a second gradient of heads' own output layers while
  micro-batches are added up, and DDP's bucket, which is a second copy of all gradients
- a layer's activations that the backward needs, a token: its norms' fp32 copies, keys and queries, the MLP's three inner
  tensors, and the input of every matrix that trains or has an adapter (with dropout also the mask)
- recomputed layers keep a H bytes a token each, and one of them everything while it is recomputed
- heads: the rows gathered, before and behind each block, and their gradient
- losses: the logits of one chunk, in place; copies in fp32 where a teacher's distribution is learnt

Engines share out: ZeRO-1 the optimizer's state and the fp32 values; ZeRO-2 gradients too; ZeRO-3 and FSDP2 weights too, and
gather them for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from axolotl_medusa.estimating.plan import Plan
from axolotl_medusa.losses.chunk_plan import ACCELERATOR_CHUNK_LOGITS, CHUNK_LOGITS, COPIES

GIB = 2**30

NF4 = 0.516
"""Bytes of a parameter in NF4: half a byte and 8 bits for 64 of them, themselves quantized (bitsandbytes' double quantization)."""

RUNTIME = {"gpu": 3.0 * GIB, "cpu": 0.6 * GIB}
"""CUDA's context, the libraries' kernels and what the allocator cannot use again; on a CPU Python and the libraries alone
(616 MiB in benchmarks/results/train_step.json)."""

HOLES = 1.4
"""On a CPU malloc leaves holes between the activations that Medusa-2 keeps: steps of SmolLM2 took 1.2 to 1.9 times what is
counted (benchmarks/results/train_step.json, train_step_avx2_medusa2.json, train_step_amx_smollm2.json)."""

ZERO_3_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered (DeepSpeed's `stage3_max_live_parameters` and `stage3_max_reuse_distance`)."""

_BLOCK = 2**26
"""Elements of the block of logits of which fp32 copies are made on a GPU (`losses.closed_form`); a CPU's are a sixteenth."""

STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_apex_fused": 8.0,
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "adamw_torch_8bit": 2.0,
    "adamw_torch_4bit": 1.0,
    "ao_adamw_fp8": 2.0,
    "adafactor": 0.0,
    "muon": 4.0,
    "lion_32bit": 4.0,
    "lion_pytorch": 4.0,
    "lion_8bit": 1.0,
    "sgd": 0.0,
}
"""Bytes of state for a parameter in fp32. Adafactor's rows and columns and the scales of 8-bit states are left out: below 2%."""

_STATE_OF_OTHERS = 8.0
"""Two moments, as AdamW has them: for optimizers that are not in the table."""

_COPY_AT_STEP = ("adamw_torch", "adafactor")
"""Optimizers that hold a copy of the parameters in fp32 while they step; their step comes when activations are gone."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step.

    Attributes:
        weights: The base model's.
        heads: Values of heads and adapter, with fp32 copies that an engine keeps.
        optimizer: The optimizer's state.
        gradients: Of all that trains, with the engine's buckets.
        gathered: Weights of other GPUs that are here for a moment.
        activations: What the backward needs, of the backbone and of the heads.
        losses: Buffers of the losses.
        runtime: CUDA or Python themselves.
    """

    weights: float
    heads: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    losses: float
    runtime: float

    @property
    def peak(self) -> float:
        """All of it."""
        return self.tensors + self.runtime

    @property
    def tensors(self) -> float:
        """All but the runtime: what an allocator of tensors counts."""
        parts = (self.weights, self.heads, self.optimizer, self.gradients, self.gathered, self.activations, self.losses)
        return sum(parts)


def memory_of(plan: Plan) -> Memory:
    """The memory of one GPU."""
    weights, heads, optimizer, gradients, gathered = _states(plan)
    activations, losses = activations_of(plan), losses_of(plan)
    momentary = max(
        momentary_of(plan), losses
    )  # the backbone's are gone when the losses begin, and the losses' in the backward
    if plan.optimizer in _COPY_AT_STEP and plan.device == "gpu":
        momentary = max(momentary, _copy_at_step(plan) - activations)
    return Memory(
        weights, heads, optimizer, gradients, gathered, activations + momentary - losses, losses, RUNTIME[plan.device]
    )


def state_bytes(optimizer: str) -> float:
    """Bytes of an optimizer's state for a parameter in fp32."""
    return STATE_BYTES.get(optimizer, _STATE_OF_OTHERS)


def base_weights(plan: Plan) -> float:
    """Bytes of the whole base model as it is loaded."""
    sizes, value = plan.sizes, 2 if plan.half else 4
    matrices = sum(matrix.parameters for matrix in sizes.matrices)
    if plan.weight_bits in (4, 8):
        return (NF4 if plan.weight_bits == 4 else 1) * matrices + value * (sizes.parameters - matrices)
    return plan.weight_bits // 8 * sizes.parameters


def _states(plan: Plan) -> tuple[float, float, float, float, float]:
    """Weights, heads and adapter, optimizer, gradients, gathered."""
    if plan.engine == "ddp":
        return _unshared(plan)
    if plan.engine == "fsdp2":
        return _fsdp2(plan)
    return _zero(plan)


def _unshared(plan: Plan) -> tuple[float, float, float, float, float]:
    head, base = plan.head_bits // 8, plan.weight_bits // 8 or 1
    ours = plan.head_parameters + plan.trained_adapter
    state = state_bytes(plan.optimizer)
    gradients: float = head * ours + base * plan.trained_base
    buckets = gradients if plan.gpus > 1 else 0
    return (
        base_weights(plan),
        head * (plan.head_parameters + plan.adapter),
        _scaled(state, head) * ours + _scaled(state, base) * plan.trained_base,
        gradients + buckets + _second_gradient(plan, head),
        0,
    )


def _scaled(state: float, value: int) -> float:
    """Bytes of state for a parameter of so many bytes: 8-bit states stay, others have the parameter's type."""
    return state * value / 4 if state >= 4 else state


def _second_gradient(plan: Plan, value: float) -> float:
    """A micro-batch's own gradients of output layers, which the losses compute before they are added to the first one's."""
    return value * plan.own_outputs if plan.accumulation > 1 else 0


def _zero(plan: Plan) -> tuple[float, float, float, float, float]:
    """DeepSpeed holds all values in the type that is computed in, and an fp32 copy of what trains, in parts."""
    value, n = 2 if plan.half else 4, plan.gpus
    weights, ours = base_weights(plan), plan.head_parameters + plan.adapter
    copies = 4 * plan.trained / n
    optimizer = state_bytes(plan.optimizer) * plan.trained / n
    at_step = 4 * plan.trained / n  # gradients in fp32, when the optimizer steps
    if plan.engine == "zero-3":
        gathered = min(plan.sizes.parameters, max(ZERO_3_LIVE, plan.sizes.output + plan.sizes.layer)) * value * (n > 1)
        gradients = value * plan.trained / n + at_step + value * plan.bucket
        return weights / n, value * ours / n + copies, optimizer, gradients, gathered
    buckets = value * plan.bucket * (2 if plan.overlap else 1)
    if plan.engine == "zero-1":
        gradients = value * plan.trained + at_step + buckets + _second_gradient(plan, value)
    else:  # a micro-batch's gradients of output layers are all there before the first is handed on
        gradients = value * plan.trained / n + at_step + buckets + value * plan.own_outputs
    return weights, value * ours + copies, optimizer, gradients, 0


def _fsdp2(plan: Plan) -> tuple[float, float, float, float, float]:
    """Parts of every tensor in the type that it was loaded in; layers are gathered one by one, the rest at once and for long."""
    value, n, head = 2 if plan.half else 4, plan.gpus, plan.head_bits // 8
    base = plan.weight_bits // 8 or 1
    ours = plan.head_parameters + plan.trained_adapter
    root = plan.sizes.embeddings + plan.sizes.others + plan.head_parameters
    layer = base_weights(plan) / plan.sizes.parameters * plan.sizes.layer
    state = state_bytes(plan.optimizer)
    gradients = (head * ours + base * plan.trained_base) / n
    kept = plan.trained if plan.accumulation > 1 else plan.own_outputs
    return (
        base_weights(plan) / n,
        head * (plan.head_parameters + plan.adapter) / n,
        (_scaled(state, head) * ours + _scaled(state, base) * plan.trained_base) / n,
        gradients + value * kept * (n > 1),
        (value * root + 2 * layer) * (n > 1),
    )


def layer_bytes(plan: Plan) -> float:
    """What the backward needs of one decoder layer, for one token."""
    sizes, a = plan.sizes, 2 if plan.half else 4
    kept = 4.0 * sizes.normed
    kept += a * (2 * sizes.queries + 2 * sizes.keys) + 4 * sizes.attention_heads
    kept += 3 * a * sizes.intermediate
    if plan.masked:
        kept += a * (2 * sizes.queries - 2 * sizes.keys)  # keys and values are repeated for every query head
    if plan.eager:
        kept += plan.sequence * sizes.attention_heads * (4 + 2 * a)
    inputs = sum(matrix.inputs for matrix in sizes.matrices) / sizes.layers
    if plan.rank:
        mask = (1 if plan.device == "gpu" else a) if plan.dropout else 0
        kept += (a + mask) * inputs + 2 * a * plan.rank * len(sizes.matrices) / sizes.layers
    elif plan.trained_layers:
        kept += a * (inputs + sizes.normed)
    return kept


def activations_of(plan: Plan) -> float:
    """Bytes of activations that are kept while the losses are computed, the heads' included."""
    sizes, a, tokens = plan.sizes, 2 if plan.half else 4, plan.tokens
    rows = _head_rows(plan)
    if plan.masked:
        rows += plan.micro_batch * plan.sequence**2
    if plan.only_heads:
        return rows
    layers = _differentiated_layers(plan)
    kept = layers * a * sizes.hidden + (layers - _recomputed_layers(plan)) * layer_bytes(plan)
    if plan.self_distillation:
        kept += a * sizes.hidden
    return rows + tokens * kept * (HOLES if plan.device == "cpu" else 1)


def momentary_of(plan: Plan) -> float:
    """Bytes of one layer's activations: while a frozen one computes, or one that is recomputed."""
    sizes, a = plan.sizes, 2 if plan.half else 4
    if plan.only_heads:
        return a * plan.tokens * (4 * sizes.hidden + 3 * sizes.intermediate) - _head_rows(plan)
    return plan.tokens * layer_bytes(plan) if _recomputed_layers(plan) else 0


def _differentiated_layers(plan: Plan) -> int:
    return plan.sizes.layers if plan.rank or plan.trains_embeddings else plan.trained_layers


def _recomputed_layers(plan: Plan) -> int:
    return min(plan.recomputed, _differentiated_layers(plan))


def _head_rows(plan: Plan) -> float:
    """What the heads keep of all tokens: rows gathered, before and behind each block, their gradient."""
    value = plan.head_bits // 8 if plan.engine in ("ddp", "fsdp2") else (2 if plan.half else 4)
    return plan.heads * plan.tokens * plan.sizes.hidden * value * (2 + 2 * plan.blocks)


def losses_of(plan: Plan) -> float:
    """Bytes of the losses' buffers: a chunk's logits and their copies."""
    a, vocab = 2 if plan.half else 4, plan.sizes.vocab
    limit = ACCELERATOR_CHUNK_LOGITS if plan.device == "gpu" else CHUNK_LOGITS
    block = _BLOCK if plan.device == "gpu" else _BLOCK // 16
    uses_adapter = plan.adapts_output and not plan.only_heads
    sharded = plan.engine in ("zero-3",) and plan.gpus > 1
    logits = min(limit // (COPIES if uses_adapter else 1), plan.tokens * vocab)
    bytes_ = float(a * logits)
    if uses_adapter:
        bytes_ += 3 * a * logits
    if plan.teacher:
        bytes_ += 4 * logits + 3 * 4 * min(logits, block)
    if sharded:
        bytes_ += 12 * logits  # every chunk is differentiated by autograd, which keeps copies
    if plan.half and plan.head_bits == 32 and plan.engine == "ddp" and not plan.shared:
        layers = plan.own_output_layers if plan.chain else 1  # whose gradients wait for each other
        bytes_ += a * plan.one_own_output * layers  # output layers in the type that is multiplied in
    return bytes_


def _copy_at_step(plan: Plan) -> float:
    if plan.engine == "ddp":
        return 4.0 * plan.trained
    return 4.0 * plan.trained / plan.gpus

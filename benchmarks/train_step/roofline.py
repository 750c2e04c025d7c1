"""What a training step costs at least: its FLOPs on paper, and the rate of this machine's matmuls.

Contract: knows shapes and times matmuls; nothing of models, losses or optimizers. A multiplication and an addition are
two FLOPs; only matmuls count. What a step need not do is not counted: no gradient of frozen weights, no activation
gradient of a frozen backbone or below its first layer, no logits of masked positions, half of the attention's square.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SQUARE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matmul whose rate stands for the machine's."""

PEAK_BF16 = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
"""Dense bf16 FLOP/s by the GPU's name, from NVIDIA's data sheets: what model FLOPs utilisation (MFU) refers to."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and a gated MLP.

    Attributes:
        hidden: Size H of the hidden state.
        vocab: Size V of the vocabulary.
        layers: Decoder layers.
        intermediate: Inner size of the MLP.
        queries: Query heads times their size.
        keys: Key heads times their size; values have the same.
    """

    hidden: int
    vocab: int
    layers: int
    intermediate: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes of a Llama-like model from its Hugging Face configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            layers=config.num_hidden_layers,
            intermediate=config.intermediate_size,
            queries=config.num_attention_heads * size,
            keys=config.num_key_value_heads * size,
        )

    @property
    def first(self) -> list[tuple[int, int]]:
        """`(in, out)` of the matrices that read a layer's input: queries, keys, values."""
        return [(self.hidden, self.queries), (self.hidden, self.keys), (self.hidden, self.keys)]

    @property
    def layer(self) -> list[tuple[int, int]]:
        """`(in, out)` of all matrices of a layer."""
        mlp = [(self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)]
        return [*self.first, (self.queries, self.hidden), *mlp]


def causal_pairs(seq: int) -> int:
    """Pairs of a query and a key that it sees, in one sample."""
    return seq * (seq + 1) // 2


def backbone_forward(shape: Shape, batch: int, seq: int, rank: int = 0, pairs: int | None = None) -> int:
    """FLOPs of the backbone's forward.

    Args:
        shape: The model.
        batch: Samples.
        seq: Tokens of each.
        rank: Rank of the adapters on every matrix; 0: none.
        pairs: Pairs of query and key in a sample; without, `causal_pairs`.
    """
    pairs = causal_pairs(seq) if pairs is None else pairs
    matrices = 2 * batch * seq * sum(i * o + rank * (i + o) for i, o in shape.layer)
    attention = 2 * (2 * batch * pairs * shape.queries)  # q kᵀ and p v
    return shape.layers * (matrices + attention)


def backbone_backward(shape: Shape, batch: int, seq: int, rank: int, pairs: int | None = None) -> int:
    """FLOPs of the backward through a frozen backbone with adapters on every matrix; arguments as for the forward.

    The gradients of activations cost as much as the forward; so do those of the adapters' matrices; the attention costs
    twice its forward. The first layer's input needs no gradient.
    """
    pairs = causal_pairs(seq) if pairs is None else pairs
    tokens = batch * seq
    matrices = 2 * tokens * sum(i * o + 2 * rank * (i + o) for i, o in shape.layer)
    attention = 4 * (2 * batch * pairs * shape.queries)
    input_gradient = 2 * tokens * sum(i * o + rank * i for i, o in shape.first)
    return shape.layers * (matrices + attention) - input_gradient


def heads_blocks(shape: Shape, rows: Sequence[int], *, hidden_trains: bool, layers: int = 1) -> int:
    """FLOPs of all heads' residual blocks, forward and backward.

    Args:
        shape: The model.
        rows: Counted rows of each head.
        hidden_trains: Whether the hidden states need a gradient (Medusa-2).
        layers: Residual blocks of each head.
    """
    matmuls = 3 * layers - (0 if hidden_trains else 1)
    return 2 * sum(rows) * shape.hidden**2 * matmuls


def vocabulary(shape: Shape, rows: int, *, matmuls: int, rank: int = 0) -> int:
    """FLOPs of an output layer over counted rows.

    Args:
        shape: The model.
        rows: Counted rows.
        matmuls: 1: logits only; 2: and the gradient of the rows (a frozen layer); 3: and that of the weight.
        rank: Rank of the adapter on the layer; its three times two matmuls are added.
    """
    return 2 * rows * (matmuls * shape.hidden * shape.vocab + 3 * rank * (shape.hidden + shape.vocab))


def step(shape: Shape, batch: int, seq: int, rows: Sequence[int], *, shared: bool, rank: int) -> dict[str, int]:
    """FLOPs of one training step by part.

    Args:
        shape: The model.
        batch: Samples.
        seq: Tokens of each.
        rows: Counted rows of the base model and of each head, `[N + 1]`.
        shared: Whether heads reuse the model's output layer.
        rank: Rank of the adapters: Medusa-2 with self-distillation; 0: Medusa-1.
    """
    heads = rows[1:]
    parts = {
        "backbone": backbone_forward(shape, batch, seq, rank),
        "blocks": heads_blocks(shape, heads, hidden_trains=rank > 0),
        "heads' vocabulary": vocabulary(shape, sum(heads), matmuls=2 if shared else 3, rank=rank if shared else 0),
    }
    if rank:
        parts["backbone's backward"] = backbone_backward(shape, batch, seq, rank)
        parts["teacher"] = backbone_forward(shape, batch, seq)
        parts["base vocabulary"] = vocabulary(shape, rows[0], matmuls=2, rank=rank)
        parts["teacher's vocabulary"] = vocabulary(shape, rows[0], matmuls=1)
    return parts


def seconds(work: Callable[[], object]) -> float:
    """How long something takes, what it gave a GPU to do included."""
    _wait_for_gpu()
    started = time.perf_counter()
    work()
    _wait_for_gpu()
    return time.perf_counter() - started


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def fastest(work: Callable[[], object], at_least_s: float = 0.5) -> float:
    """The shortest time of something, repeated for a while after a warm-up: what the machine can do undisturbed."""
    work()
    times: list[float] = []
    while sum(times) < at_least_s or len(times) < 2:
        times.append(seconds(work))
    return min(times)


def matmul_flops_per_s(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Rate of `[rows, inner] · [columns, inner]ᵀ` into a tensor that is there already."""
    left, right = (torch.randn(count, inner, dtype=dtype, device=device) for count in (rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return 2 * rows * inner * columns / fastest(lambda: torch.mm(left, right.T, out=out))


class VocabularyMatmuls:
    """The matmuls that an output layer's loss is made of, alone: logits, `dh = dL W` and `dW += dLᵀ h`.

    Args:
        rows: Counted rows.
        shape: The model.
        dtype: Type of all operands.
        device: Where they are.
        frozen: Whether the layer is frozen: no dW.
    """

    def __init__(self, rows: int, shape: Shape, dtype: torch.dtype, device: str = "cpu", *, frozen: bool) -> None:
        self.hidden = torch.randn(rows, shape.hidden, dtype=dtype, device=device)
        self.weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)
        self.hidden_gradient = torch.empty_like(self.hidden)
        self.weight_gradient = None if frozen else torch.zeros_like(self.weight)
        self.flops = vocabulary(shape, rows, matmuls=2 if frozen else 3)
        self.logits: Tensor = torch.empty(0)
        self.logits_gradient: Tensor = torch.empty(0)

    def choose_chunk(self, candidates: Sequence[int]) -> int:
        """Tries chunks of so many rows, and all rows at once; leaves buffers for the fastest, which it returns."""
        rows = self.hidden.shape[0]
        times = {}
        for chunk in {*(size for size in candidates if size < rows), rows}:
            self.allocate(chunk)
            times[chunk] = fastest(self)
        best = min(times, key=lambda chunk: times[chunk])
        self.allocate(best)
        return best

    def allocate(self, chunk: int) -> None:
        """Makes buffers for chunks of so many rows."""
        size = (chunk, self.weight.shape[0])
        self.logits = self.weight.new_empty(size)
        self.logits_gradient = self.weight.new_empty(size).normal_(std=1e-3)

    def __call__(self) -> None:
        """Does them once over all rows."""
        chunk = self.logits.shape[0]
        for start in range(0, self.hidden.shape[0], chunk):
            hidden = self.hidden[start : start + chunk]
            gradient = self.logits_gradient[: hidden.shape[0]]
            torch.mm(hidden, self.weight.T, out=self.logits[: hidden.shape[0]])
            torch.mm(gradient, self.weight, out=self.hidden_gradient[start : start + chunk])
            if self.weight_gradient is not None:
                self.weight_gradient.addmm_(gradient.T, hidden)

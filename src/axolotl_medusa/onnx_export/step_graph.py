"""The graph of one decoding step: a causal LM of transformers whose cache is memory that the caller keeps.

Contract: torch modules to be exported; no files. No modelling code of a family is here: the model's own forward runs, with an
attention and a cache that transformers lets others bring. Keys and values are written into given columns of the caller's
buffers (`ScatterND`, which copies nothing where input and output are bound to the same memory), and attention goes over all
columns, with a bias that hides those that a token must not see. So a tree, a prompt and a batch are the same graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from axolotl_medusa.model.anatomy import backbone, causal_lm, logit_transform, output_embedding

ATTENTION = "medusa_onnx"
"""Name of our attention among transformers'."""

OPSET = 20


class StepGraph(nn.Module):
    """A causal LM as the graph that `onnx_decoding.graph_names` describes.

    Args:
        model: The causal LM, without an adapter; its attention is replaced by ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        lm = causal_lm(model)
        AttentionInterface.register(ATTENTION, grouped_attention)
        lm.config.get_text_config()._attn_implementation = ATTENTION
        self.backbone, self.lm_head = backbone(model), output_embedding(model)
        self._transform = logit_transform(lm.config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_bias: Tensor,
        sliding_bias: Tensor | None,
        columns: Tensor,
        asked: Tensor,
        logits_of: Tensor,
        cache: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """One step; see `graph_names` for the shapes."""
        layers = [_Written(keys, values, columns) for keys, values in zip(cache[::2], cache[1::2], strict=True)]
        mask: Any = attention_bias[:, None]
        if sliding_bias is not None:
            mask = {"full_attention": mask, "sliding_attention": sliding_bias[:, None]}
        hidden = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
        )[0]
        hidden = hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self._transform(self.lm_head(hidden))
        return (
            logits.argmax(-1),
            hidden,
            logits.index_select(1, logits_of),
            *(states for layer in layers for states in (layer.keys, layer.values)),
        )


class HeadGraph(nn.Module):
    """One head: its best next tokens after a hidden state.

    Args:
        blocks: Its residual blocks.
        output_layer: What follows them, `[vocabulary, H]`.
        token_map: The tokens that the rows of the output layer stand for; None where they are the whole vocabulary.
    """

    def __init__(self, blocks: nn.Module, output_layer: nn.Linear, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.blocks, self.output_layer, self.token_map = blocks, output_layer, token_map

    def forward(self, hidden: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
        """Best tokens first, `[B, top_k]`, and the logarithms of their probabilities; `hidden` is `[B, H]`."""
        logits = self.output_layer(self.blocks(hidden[:, None])).squeeze(
            1
        )  # of two axes it would be a Gemm, which stays fp32
        shape = (logits.shape[0], 2)
        best, tokens = torch.onnx.ops.symbolic_multi_out(
            "TopK",
            (logits, top_k),
            {"axis": -1, "largest": 1, "sorted": 1},
            dtypes=(logits.dtype, torch.int64),
            shapes=(shape, shape),
            version=OPSET,
        )
        tokens = tokens if self.token_map is None else self.token_map[tokens]
        return tokens, best - logits.logsumexp(-1, keepdim=True)


class _Written(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in the caller's buffers."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._columns = keys, values, columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the new columns; returns all."""
        self.keys = _write(self.keys, key_states, self._columns)
        self.values = _write(self.values, value_states, self._columns)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Not known here: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used: the mask is given."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


def _write(buffer: Tensor, states: Tensor, columns: Tensor) -> Tensor:
    """`buffer[b, h, columns[b, n]] = states[b, h, n]` for all rows b, heads h and new tokens n."""
    batch, heads, new = states.shape[:3]
    rows = torch.arange(batch)[:, None, None].expand(batch, heads, new)
    which = torch.arange(heads)[None, :, None].expand(batch, heads, new)
    places = torch.stack([rows, which, columns[:, None, :].expand(batch, heads, new)], -1)
    return torch.onnx.ops.symbolic(
        "ScatterND", (buffer, places, states), dtype=buffer.dtype, shape=buffer.shape, version=OPSET
    )


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`softmax(q kᵀ · scaling + bias) v`, in which the query heads of a group go together and no key is repeated.

    Args:
        module: The attention layer; not used.
        query: `[B, heads, n, size]`.
        key: `[B, kv heads, C, size]`.
        value: As `key`.
        attention_mask: The bias, `[B, 1, n, C]`.
        scaling: Of the scores, `size ** -0.5` by default.
        dropout: Must be 0.
        softcap: Soft-cap of the scores (Gemma 2), None for none.
        s_aux: Attention sinks; must be None.

    Returns:
        `[B, n, heads, size]`, and no weights.

    Raises:
        ValueError: The layer has attention sinks.
    """
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, expected none")
    batch, heads, new, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    rows = (query * scale).reshape(batch, groups, heads // groups * new, size)
    scores = rows @ key.transpose(2, 3)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    biased = scores.reshape(batch, groups, heads // groups, new, -1) + attention_mask[:, None]
    weights = torch.softmax(biased, -1).reshape(batch, groups, heads // groups * new, -1)
    found = (weights @ value).reshape(batch, heads, new, size)
    return found.transpose(1, 2).contiguous(), None

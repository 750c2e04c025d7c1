"""Names that the exporter writes into the graphs and the decoder asks for, and files of an ONNX directory.

Contract: constants and functions of numbers; imports nothing.

The graph of the model takes, with B rows, n new tokens, C columns of the cache, M asked positions and D logits:

| input | shape | meaning |
|---|---|---|
| `input_ids` | `[B, n]` | the new tokens |
| `position_ids` | `[B, n]` | their positions in the text |
| `attention_bias` | `[B, n, C]` | 0 where a token sees a column, `HIDDEN` where not |
| `sliding_bias` | `[B, n, C]` | the same for sliding layers, only where the model mixes them with full ones |
| `columns` | `[B, n]` | where each token's keys and values go |
| `asked` | `[B, M]` | new tokens whose next tokens are wanted |
| `logits_of` | `[D]` | which of the M are wanted with all their logits; none for greedy decoding |
| `keys_i`, `values_i` | `[B, kv heads, C, head size]` | the cache of layer i |

and gives `best [B, M]` (the likeliest next tokens), `hidden [B, M, H]` (states after the final norm, which the heads take),
`logits [B, D, V]`, and the cache again, bound to the same memory, in which only the new columns were written.
A head's graph takes `hidden [B, H]` and `top_k [1]` and gives `tokens [B, top_k]` and `log_probabilities [B, top_k]`.
"""

from __future__ import annotations

MODEL_FILE = "model.onnx"
MODEL_DATA_FILE = "model.onnx.data"
ABOUT_FILE = "medusa_onnx.json"
"""Sizes, files with their digests, and what the export was made of. It is written last."""

FORMAT = 1
"""Of `ABOUT_FILE`."""

INPUT_IDS, POSITION_IDS, COLUMNS = "input_ids", "position_ids", "columns"
ATTENTION_BIAS, SLIDING_BIAS = "attention_bias", "sliding_bias"
ASKED, LOGITS_OF = "asked", "logits_of"
BEST, HIDDEN_STATES, LOGITS = "best", "hidden", "logits"
TOP_K, TOKENS, LOG_PROBABILITIES = "top_k", "tokens", "log_probabilities"

HIDDEN = -1e9
"""Bias of a column that is not seen: its weight after the softmax is exactly 0 in fp32."""


def head_file(index: int) -> str:
    """The graph of head `index`."""
    return f"medusa_head_{index}.onnx"


def cache_names(layers: int) -> list[str]:
    """Inputs of the cache, layer by layer."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("keys", "values")]


def written(name: str) -> str:
    """The output that is an input's memory after the step."""
    return f"written_{name}"

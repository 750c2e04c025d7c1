"""What evaluation asks of an ONNX directory: timed decodings, and ranks of its own text among the heads' best.

Contract: needs no torch. Plain decoding is the decoder's own without a tree: ONNX Runtime has no other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from axolotl_medusa.decoding.running_rows import GenerationStats
from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa


def decode_onnx(
    model: OnnxMedusa, prompt: Sequence[int], tree: Tree | None, max_new_tokens: int, steps: int | None
) -> tuple[list[int], float, GenerationStats]:
    """Decodes a prompt greedily, plainly where `tree` is None; `steps` ends it early.

    Returns:
        New tokens, seconds, and what it took.
    """
    decoding = model.decoding([prompt], tree or Tree(), max_new_tokens, model.eos_token_ids)
    begin = time.perf_counter()
    while decoding.rows and decoding.stats.batch_forwards != steps:
        decoding.step()
    return decoding.tokens[0], time.perf_counter() - begin, decoding.stats


def onnx_head_ranks(
    model: OnnxMedusa, prompt: Sequence[int], continuation: Sequence[int], top_k: int = DEFAULT_TOP_K
) -> list[list[int]]:
    """Ranks of a continuation's tokens, as `calibration.head_ranks` gives them: -1 past the text."""
    positions, heads = len(continuation) - 1, model.heads.num_heads
    if positions < 1:
        return []
    text = [*prompt, *continuation[:-1]]
    hidden = model.hidden(text)[len(prompt) - 1 : -1]
    own = np.array([*continuation[1:], *[-1] * (heads - 1)])
    wanted = np.stack([own[head : head + positions] for head in range(heads)], 1)
    matches = [model.heads.best(head, hidden, top_k)[0] == wanted[:, head, None] for head in range(heads)]
    ranks = np.stack([np.where(match.any(-1), match.argmax(-1), top_k) for match in matches], 1)
    found: list[list[int]] = np.where(wanted < 0, -1, ranks).tolist()
    return found

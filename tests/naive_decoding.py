"""Medusa decoding written to be read: no cache, one plain forward per candidate path, Python loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from axolotl_medusa.model.anatomy import backbone, logit_transform, output_embedding
from axolotl_medusa.model.heads import MedusaHeads

Accepts = Callable[[Tensor, int], bool]
"""Whether a draft token is accepted, given the target's logits before it."""


def greedy(logits: Tensor, token: int) -> bool:
    return int(logits.argmax()) == token


def typical(epsilon: float, delta: float, temperature: float) -> Accepts:
    def accepts(logits: Tensor, token: int) -> bool:
        p = torch.softmax(logits / temperature, -1).tolist()
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        return p[token] > min(epsilon, delta * math.exp(-entropy))

    return accepts


def plain_hidden(model, text: list[int]) -> Tensor:
    """Last hidden states of every token, `[seq, hidden]`."""
    return backbone(model)(input_ids=torch.tensor([text]), use_cache=False)[0][0]


def plain_logits(model, hidden: Tensor) -> Tensor:
    return logit_transform(model.config)(output_embedding(model)(hidden))


def head_tokens(model, heads: MedusaHeads, hidden: Tensor, top_k: int) -> list[list[int]]:
    """Best tokens first of every head."""
    rows = []
    for index in range(heads.num_heads):
        layer = heads.output_layer(index) or output_embedding(model)
        rows.append(layer(heads.hidden(index, hidden)).topk(top_k).indices.tolist())
    return rows


@torch.no_grad()
def naive_decode(model, heads, prompt, choices, max_new_tokens, accepts=greedy, eos=()) -> tuple[list[int], list[int]]:
    """New tokens, and how many of them each step after the prompt's emitted; own tokens are argmaxes."""
    hidden = plain_hidden(model, prompt)[-1]
    new, lengths = [int(plain_logits(model, hidden).argmax())], []
    while len(new) < max_new_tokens and new[-1] not in eos:
        best_tokens = head_tokens(model, heads, hidden, 1 + max(max(choice) for choice in choices))
        found: list[tuple[int, float, list[int], Tensor]] = []
        for choice in [(), *choices]:
            path = [best_tokens[head][rank] for head, rank in enumerate(choice)]
            states = plain_hidden(model, prompt + new + path)[len(prompt) + len(new) - 1 :]
            logits = plain_logits(model, states)
            if all(accepts(logits[i], token) for i, token in enumerate(path)):
                likelihood = sum(float(torch.log_softmax(logits[i], -1)[token]) for i, token in enumerate(path))
                found.append((len(path), likelihood, path, states[-1]))
        _, _, path, hidden = max(found, key=lambda item: item[:2])
        step = [*path, int(plain_logits(model, hidden).argmax())][: max_new_tokens - len(new)]
        ends = [i for i, token in enumerate(step, 1) if token in eos]
        step = step[: ends[0]] if ends else step
        new += step
        lengths.append(len(step))
    return new, lengths

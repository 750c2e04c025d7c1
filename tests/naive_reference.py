"""The loss as DESIGN.md states it, written to be read: stacked logits, Python loops, plain cross-entropy."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def naive_targets(labels: Tensor, num_heads: int, position_ids: Tensor | None) -> Tensor:
    """`[batch, seq, N + 1]`, by looping over every row."""
    batch, seq = labels.shape
    targets = torch.full((batch, seq, num_heads + 1), IGNORE)
    for b in range(batch):
        sample = 0
        samples = [0]
        for t in range(1, seq):
            if position_ids is not None and position_ids[b, t] != position_ids[b, t - 1] + 1:
                sample += 1
            samples.append(sample)
        for t in range(seq):
            for column in range(num_heads + 1):
                ahead = t + 1 + column
                if ahead < seq and samples[ahead] == samples[t]:
                    targets[b, t, column] = labels[b, ahead]
            if targets[b, t, 0] == IGNORE:
                targets[b, t] = IGNORE
    return targets


def mean_over_counted(losses: list[Tensor], total: int | None = None) -> Tensor:
    return torch.stack(losses).sum() / (total or len(losses)) if losses else torch.zeros(())


def naive_chain_weight(logits: Tensor, targets: Tensor, head: int, smoothing: float) -> float:
    """What head `head`'s log-probability adds to the expected length: the sum over all m >= head of the product up to m."""
    weight = 0.0
    for last in range(head, len(targets)):
        product = 1.0
        for i in range(last + 1):
            if targets[i] == IGNORE:
                product = 0.0
                break
            product *= (1 - smoothing) * torch.softmax(logits[i].detach().float(), -1)[targets[i]].item() + smoothing
        weight += product
    return weight


def naive_loss(
    model,
    heads,
    cap: float | None,
    labels: Tensor,
    inputs: dict,
    *,
    only_heads=False,
    coefficient=0.2,
    decay=0.8,
    lm_coefficient=1.0,
    kl_coefficient=0.0,
    regularization=0.0,
    head_loss="ce",
    chain_smoothing=None,
    draft_tokens=None,
    teacher=None,
    scale: float = 1.0,
) -> Tensor:
    """The whole loss of one batch; `model` returns logits and hidden states, `teacher` is a separate frozen copy."""
    num_heads = heads.num_heads
    output_layer = model.get_output_embeddings()
    with torch.no_grad() if only_heads else contextlib.nullcontext():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        hidden, base_logits = out.hidden_states[-1], out.logits
    all_logits = [base_logits]
    for index, head in enumerate(heads):
        x = hidden
        for block in list(head)[: heads.num_layers]:
            x = x + F.silu(F.linear(x, block.linear.weight, block.linear.bias))
        logits = (output_layer if heads.form == "shared" else heads[index if heads.form == "separate" else 0][-1])(x)
        logits = logits * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        if draft_tokens is not None:
            own = logits if logits.shape[-1] == len(draft_tokens) else logits[..., draft_tokens]
            logits = torch.full_like(base_logits, -torch.inf).index_copy(-1, draft_tokens, own.to(base_logits.dtype))
        all_logits.append(logits)
    stacked = torch.stack(all_logits)
    targets = naive_targets(labels, num_heads, inputs.get("position_ids"))
    teacher_logits = None
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = teacher(**inputs, use_cache=False).logits
    losses: list[list[Tensor]] = [[] for _ in range(num_heads + 1)]
    numbers = [int((targets[..., column] != IGNORE).sum()) for column in range(num_heads + 1)]
    if draft_tokens is not None:
        targets[..., 1:][~torch.isin(targets[..., 1:], draft_tokens)] = IGNORE
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            for column in range(num_heads + 1):
                target = targets[b, t, column]
                if target == IGNORE:
                    continue
                row, chosen = stacked[column, b, t], slice(None)
                if column and draft_tokens is not None:
                    row, chosen = row[draft_tokens], draft_tokens
                    target = (draft_tokens == target).nonzero().squeeze()
                one_hot = F.one_hot(target, row.shape[0]).float()
                if column == 0:
                    own = torch.softmax(row.detach(), -1)
                    loss = lm_coefficient * F.cross_entropy(row, regularization * own + (1 - regularization) * one_hot)
                    if teacher_logits is not None:
                        p = torch.softmax(teacher_logits[b, t], -1)
                        loss = loss + kl_coefficient * (p * (p.log() - torch.log_softmax(row, -1))).sum()
                elif head_loss == "ce":
                    loss = F.cross_entropy(row, one_hot)
                else:
                    taught_by = base_logits if teacher_logits is None else teacher_logits
                    p, q = torch.softmax(taught_by[b, t + column].detach()[chosen], -1), torch.softmax(row, -1)
                    kl, accepted = (p * (p.log() - torch.log_softmax(row, -1))).sum(), torch.where(q < p, q, p).sum()
                    share = {"kl": 1.0, "tv": 0.0, "lk": math.exp(-10 * accepted.item())}[head_loss]
                    loss = share * kl + (1 - share) * (1 - accepted)
                if column and chain_smoothing is not None:
                    loss = loss * naive_chain_weight(stacked[1:, b, t], targets[b, t, 1:], column - 1, chain_smoothing)
                losses[column].append(loss)
    total = torch.zeros(()) if only_heads else mean_over_counted(losses[0])
    for i in range(num_heads):
        if chain_smoothing is not None:
            total = total + coefficient * mean_over_counted(losses[i + 1], numbers[1])
            continue
        total = total + coefficient * decay ** (i + 1) * mean_over_counted(losses[i + 1], numbers[i + 1])
    return total


def naive_acceptance_length(model, heads, labels: Tensor, inputs: dict) -> float:
    """Mean over the counted base rows of 1 + the number of heads that are right before the first wrong one."""
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        targets = naive_targets(labels, heads.num_heads, inputs.get("position_ids"))
        lengths = []
        for b in range(labels.shape[0]):
            for t in range(labels.shape[1]):
                if targets[b, t, 0] == IGNORE:
                    continue
                length = 1
                for i in range(heads.num_heads):
                    x = heads.hidden(i, hidden[b, t])
                    layer = heads.output_layer(i) or model.get_output_embeddings()
                    if layer(x).argmax() != targets[b, t, i + 1]:
                        break
                    length += 1
                lengths.append(length)
    return sum(lengths) / len(lengths)

"""How good the heads are on the model's own greedy text: ranks of its tokens among the heads' best.

Contract: reads continuations and counts; decides nothing. Head i at position t predicts the token t + 2 + i, i from 0; it
is asked at the prompt's last token and at every token after, where decoding may ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import DEFAULT_TOP_K
from axolotl_medusa.measuring.tree_search import JointRanks
from axolotl_medusa.model.anatomy import backbone, causal_lm

TOP_K = 5
"""Top-1 to top-5 accuracies are reported."""

_LOGITS_AT_ONCE = 1 << 25
"""Elements of the heads' logits that are held at a time."""


@dataclass
class HeadRanks:
    """Ranks of the true tokens over positions.

    Attributes:
        num_heads: Heads N.
        top_k: Ranks per head that were looked at.
        counts: Per head, how often the true token had rank 0, 1, ..., and last how often it was not among them.
        joint: The same of all heads together. A position whose later tokens the token limit cut off is not in it; after
            an end-of-text token nothing can be accepted.
    """

    num_heads: int
    top_k: int = DEFAULT_TOP_K
    counts: list[list[int]] = field(init=False)
    joint: JointRanks = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [[0] * (self.top_k + 1) for _ in range(self.num_heads)]
        self.joint = JointRanks(self.top_k)

    def add(self, ranks: Sequence[Sequence[int]], *, ended: bool) -> None:
        """Counts one continuation.

        Args:
            ranks: `[positions][heads]`, -1 where the text has no such token, `top_k` where it is not among the best.
            ended: Whether the text ends there by itself, rather than at a token limit.
        """
        for row in ranks:
            for head, rank in enumerate(row):
                if rank >= 0:
                    self.counts[head][rank] += 1
        self.joint.add(row for row in ranks if ended or -1 not in row)

    def positions(self, head: int) -> int:
        """Positions at which a head had a true token."""
        return sum(self.counts[head])

    def accuracy(self, head: int, top: int) -> float | None:
        """Share of positions whose true token is among the head's `top` best, None without positions."""
        return sum(self.counts[head][:top]) / self.positions(head) if self.positions(head) else None


@torch.no_grad()
def head_ranks(
    model: MedusaModel, prompt: Sequence[int], continuation: Sequence[int], top_k: int = DEFAULT_TOP_K
) -> list[list[int]]:
    """Ranks of a continuation's tokens in one forward.

    Args:
        model: The model with its heads.
        prompt: Tokens that the model was given.
        continuation: Tokens that it wrote.
        top_k: Ranks to look at.

    Returns:
        `[positions][heads]`: at the prompt's last token and at every later one that has a token two further on, the rank
        of token t + 2 + i among head i's best; `top_k` where it is not among them, -1 past the text.
    """
    positions = len(continuation) - 1
    if positions < 1:
        return []
    num_heads = model.heads.num_heads
    device = causal_lm(model.base_model).get_input_embeddings().weight.device
    text = torch.tensor([*prompt, *continuation], device=device)
    hidden = backbone(model.base_model)(input_ids=text[None, :-1], use_cache=False)[0][0, len(prompt) - 1 : -1]
    own = torch.nn.functional.pad(text[len(prompt) + 1 :], (0, num_heads - 1), value=-1)
    targets = own.unfold(0, num_heads, 1)  # [positions, heads]
    rows: list[list[int]] = []
    chunk = max(1, _LOGITS_AT_ONCE // (num_heads * model.heads.vocab_size))
    for states, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        best = model.draft_logits(states, num_heads).topk(top_k, -1).indices.to(wanted.device)
        match = best == wanted[..., None]
        rank = torch.where(match.any(-1), match.int().argmax(-1), top_k)
        rows += rank.masked_fill(wanted < 0, -1).tolist()
    return rows

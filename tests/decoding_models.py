"""Models and heads whose drafts are right always, never or sometimes."""

from __future__ import annotations

import torch
from conftest import HIDDEN, VOCAB, make_model, randomize
from torch import Tensor

from axolotl_medusa.model.anatomy import backbone
from axolotl_medusa.model.heads import MedusaHeads

RAGGED = (0, 3, 8, 5)
"""Left padding of the four prompts of `prompts`."""

CYCLE = 16
"""Vocabulary of the model that counts."""


def varied_model(family: str = "llama", **changes):
    """A random model whose greedy text does not repeat itself: attention decides, not the embedding or biases."""
    model = make_model(family, **changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" in name:
                parameter.mul_(0.1)
            elif parameter.dim() > 1 and "attn" in name:
                parameter.mul_(4.0)
        model.get_input_embeddings().weight.mul_(0.05)
    return model


def prompts(batch: int = 4, length: int = 9, vocab: int = VOCAB, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random prompts padded on the left, and their mask."""
    torch.manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, length))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(RAGGED[:batch]):
        mask[row, :padding] = 0
    return ids * mask, mask


def random_heads(num_heads: int = 5, vocab: int = VOCAB, hidden: int = HIDDEN, **options) -> MedusaHeads:
    return randomize(MedusaHeads(hidden, vocab, num_heads, 1, **options))


@torch.no_grad()
def fitted_heads(
    model, ids: Tensor, mask: Tensor, num_heads: int = 5, tokens: int = 30, bias_scale: float = 1.0
) -> MedusaHeads:
    """Heads fitted by least squares to the model's greedy continuations: often right, and often not."""
    heads = random_heads(num_heads, vocab=model.config.vocab_size, hidden=model.config.hidden_size)
    for name, parameter in heads.named_parameters():
        if name.endswith("bias"):
            parameter.mul_(bias_scale)
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens + num_heads, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    whole = torch.cat([mask, torch.ones(len(ids), tokens + num_heads, dtype=mask.dtype)], -1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    hidden = backbone(model)(input_ids=text, attention_mask=whole, position_ids=positions, use_cache=False)[0]
    first = ids.shape[1] - 1
    for index in range(num_heads):
        states = heads.hidden(index, hidden[:, first : first + tokens].reshape(-1, hidden.shape[-1]))
        targets = text[:, first + 2 + index : first + 2 + index + tokens].reshape(-1)
        one_hot = torch.nn.functional.one_hot(targets, heads.vocab_size).float()
        heads.output_layer(index).weight.copy_(torch.linalg.lstsq(states, one_hot).solution.T)
    return heads


@torch.no_grad()
def counting_model():
    """A Llama with fixed logits: after token t comes t + 1 (mod 16), whatever stood before."""
    model = make_model("llama", vocab_size=CYCLE, eos_token_id=None).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(CYCLE, HIDDEN))
    model.lm_head.weight.copy_(torch.eye(CYCLE).roll(1, 0) @ torch.eye(CYCLE, HIDDEN))
    return model


@torch.no_grad()
def counting_heads(right: list[bool]) -> MedusaHeads:
    """Heads with fixed logits for `counting_model`: head i is right about t + 2 + i, or one off."""
    heads = MedusaHeads(HIDDEN, CYCLE, len(right), 1)
    for index, is_right in enumerate(right):
        ahead = index + 2 + (not is_right)
        heads.output_layer(index).weight.copy_(torch.eye(CYCLE).roll(ahead, 0) @ torch.eye(CYCLE, HIDDEN))
    return heads

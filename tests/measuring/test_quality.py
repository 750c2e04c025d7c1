"""Perplexity and KL of a trained backbone, beside the plain formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import add_lora, make_model
from decoding_models import prompts

from axolotl_medusa.measuring.quality import compare_models

ROUNDING = 1e-4
"""Relative; sums of a few dozen fp32 terms in another order."""


def naive(model, original, texts):
    """exp of mean losses, and mean of Σ p (log p - log q), token by token."""
    losses, before, kl = [], [], []
    with torch.no_grad():
        for text in texts:
            log_q = torch.log_softmax(model(torch.tensor([text])).logits[0].double(), -1)
            log_p = torch.log_softmax(original(torch.tensor([text])).logits[0].double(), -1)
            for t, target in enumerate(text[1:]):
                losses.append(-log_q[t, target])
                before.append(-log_p[t, target])
                kl.append((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
    mean = [torch.stack(values).mean() for values in (losses, before, kl)]
    return len(losses), mean[0].exp().item(), mean[1].exp().item(), mean[2].item()


@pytest.mark.parametrize("at_once", [256, 3])
def test_two_models_are_compared_as_the_formulas_say(at_once, monkeypatch):
    monkeypatch.setattr("axolotl_medusa.measuring.quality._ROWS_AT_ONCE", at_once)
    model, original = make_model(seed=0).eval(), make_model(seed=1).eval()
    texts = [prompts()[0][0].tolist(), [5, 6, 7], [9], []]
    tokens, perplexity, before, kl = naive(model, original, texts[:2])
    found = compare_models(model, original, texts)
    assert found.tokens == tokens == 10
    assert found.perplexity == pytest.approx(perplexity, rel=ROUNDING)
    assert found.original_perplexity == pytest.approx(before, rel=ROUNDING)
    assert found.kl == pytest.approx(kl, rel=ROUNDING)
    assert before != pytest.approx(perplexity, rel=0.1)


def test_adapters_are_switched_off_for_the_original():
    model = add_lora(make_model()).eval()
    original = make_model().eval()
    texts = [prompts()[0][0].tolist()]
    found, expected = compare_models(model, None, texts), compare_models(model, original, texts)
    assert found == expected
    assert found.kl > 0.01


def test_an_unchanged_model_has_no_kl():
    found = compare_models(make_model().eval(), make_model().eval(), [[3, 4, 5]])
    assert found.kl == 0
    assert found.perplexity == found.original_perplexity


def test_text_and_original_must_be_there():
    with pytest.raises(ValueError, match="held-out text has 0 tokens to predict"):
        compare_models(make_model(), make_model(), [[3], []])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to switch off: name the original model"):
        compare_models(make_model(), None, [[3, 4]])

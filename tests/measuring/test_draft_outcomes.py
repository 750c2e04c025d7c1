"""What becomes of drafts on a text, against heads that are walked through one after the other."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from decoding_models import counting_heads, counting_model, random_heads

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.measuring.draft_outcomes import draft_outcomes, outcomes_of
from axolotl_medusa.measuring.evaluate import PromptTokens
from axolotl_medusa.model.anatomy import logit_transform

TEXT = [3, 4, 5, 6, 7, 8, 9]


def counting(right):
    return MedusaModel(counting_model(), counting_heads(right))


def accepted(outcomes):
    return [[good for _, good in own] for own in outcomes]


def test_right_heads_are_accepted_as_far_as_the_text_goes():
    assert accepted(draft_outcomes(counting([True, True]), TEXT[:2], TEXT[2:])) == [[True] * 4, [True] * 3]


def test_head_after_a_wrong_one_is_not_looked_at():
    assert accepted(draft_outcomes(counting([False, True]), TEXT[:2], TEXT[2:])) == [[False] * 4, []]
    assert accepted(draft_outcomes(counting([True, False]), TEXT[:2], TEXT[2:])) == [[True] * 4, [False] * 3]


def test_one_token_says_nothing():
    assert draft_outcomes(counting([True]), [3], [4]) == [[]]


def test_own_answers_to_prompts_are_looked_at():
    found = outcomes_of(counting([True, True]), [PromptTokens("a", [1, 2]), PromptTokens("b", [5])], 6)
    assert accepted(found) == [[True] * 10, [True] * 8]


@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "granite-logits-scaling"])
@pytest.mark.parametrize("form", ["shared", "separate"])
@torch.no_grad()
def test_probabilities_are_those_of_a_server(family, form):
    """Shared heads go through what the model does to its logits, as in `compute_logits`; their own layers' logits are plain."""
    model = make_model(family).eval()
    heads = random_heads(3, form=form)
    text = torch.randint(3, 100, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    outcomes = draft_outcomes(MedusaModel(model, heads), text[:4], text[4:])
    hidden = model.base_model(input_ids=torch.tensor([text[:-1]]))[0][0, 3:-1]
    for head, own in enumerate(outcomes[:1]):
        for row, (probability, _) in zip(hidden, own, strict=True):
            state = heads.hidden(head, row)
            if form == "shared":
                chances = logit_transform(model.config)(model.lm_head(state)).softmax(-1)
            else:
                chances = heads.output_layer(head)(state).softmax(-1)
            assert probability == pytest.approx(float(chances.max()), rel=1e-4)

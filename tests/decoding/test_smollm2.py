"""A real model with heads that were trained, if only for seconds: greedy text is the model's own, token for token."""

from __future__ import annotations

import pytest
import torch
from demo import __main__ as demo
from demo.smollm2 import unpacked
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import chain, default_tree
from axolotl_medusa.model.anatomy import embedding_shape, output_embedding
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import Objective, install_objective

NEW = 32
STEPS = 10
QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers.",
    "Write one sentence about a cat that likes rain and old books.",
    "2 + 2?",
)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct in fp32, the same as the demo's, and four chat prompts padded on the left, with their mask."""
    directory = unpacked(demo.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, rows["input_ids"], rows["attention_mask"]


@torch.no_grad()
def own_text(model, ids, mask):
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)


@pytest.fixture(scope="module")
def medusa(smollm2):
    """Three heads after `STEPS` steps of the plugin's own training forward on the model's own answers."""
    model, ids, mask = smollm2
    vocab_size, hidden_size = embedding_shape(output_embedding(model))
    heads = MedusaHeads(hidden_size, vocab_size, 3, form="shared")
    model.requires_grad_(False)
    attach_heads(model, heads)
    text = own_text(model, ids, mask)
    whole = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    labels = text.masked_fill(torch.arange(text.shape[1]) < ids.shape[1], -100)
    labels = labels.masked_fill(text == model.config.pad_token_id, -100)
    install_objective(model, Objective(only_heads=True, logging=False))
    optimizer = torch.optim.Adam(heads.parameters(), lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=text, attention_mask=whole, labels=labels).loss.backward()
        optimizer.step()
    return MedusaModel(model, heads)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", [chain(3), default_tree(3)], ids=["chain", "64 nodes"])
def test_greedy_text_of_smollm2_is_its_own(medusa, smollm2, batch, tree):
    _, ids, mask = smollm2
    if batch == 1:
        ids, mask = ids[2:3], mask[2:3]  # the longest, without padding
    expected = own_text(medusa.base_model, ids, mask)
    tokens, stats = medusa.generate(ids, mask, NEW, tree=tree, return_stats=True)
    assert torch.equal(tokens, expected)
    assert stats.acceptance_length > 1
    assert len(mask.sum(-1).unique()) > 1 or batch == 1, "prompts must differ in length in this test"

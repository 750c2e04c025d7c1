"""The study of heads at equal training time, on a tiny model: same step as in training, same acceptance length as its definition."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from benchmarks.head_study import Combination, Study, adam, read_conversations, shuffled, started_result
from example_tokenizers import ZEPHYR, make_tokenizer
from naive_reference import naive_acceptance_length

from axolotl_medusa.losses.targets import IGNORE_INDEX

VOCAB = 270
SHARED = Combination("shared", "kl", 3)


@pytest.fixture
def args(tmp_path, model_factory) -> argparse.Namespace:
    torch.manual_seed(0)
    model_factory("llama", vocab_size=VOCAB, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = ZEPHYR + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = []
    for number in range(12):
        messages = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "abcde" * (1 + number)}]
        rows.append({"messages": messages, "finish_reasons": ["stop" if number % 2 else "length"]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"limit": None, "hidden": tmp_path / "hidden.pt", "precision": "fp32", "json": tmp_path / "result.json"}
    return argparse.Namespace(model=tmp_path / "model", train=path, heldout=path, **shared)


def test_labels_are_answers_and_their_end_of_turn_unless_the_answer_was_cut(args):
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = ZEPHYR + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    cut, finished = read_conversations(args.train, tokenizer)[:2]
    for conversation, answer in ((cut, "abcde"), (finished, "abcdeabcde</s>")):
        counted = [label for label in conversation.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(counted) == answer
        assert conversation.input_ids[-len(counted) :] == counted
    assert tokenizer.decode(finished.input_ids) == "<|user|>\nq1</s>\n<|assistant|>\nabcdeabcde</s>"


def test_step_from_stored_hidden_states_trains_as_the_step_with_the_backbone(args):
    study = Study(args)
    assert any((batch.position_ids[0, 1:] == 0).any() for batch in study.train), "nothing is packed"
    after = []
    for backbone in (study.backbone, study.stored):
        study.model.model = backbone
        heads = study.fresh(SHARED)
        optimizer = torch.optim.SGD(heads.parameters(), 1.0)  # unlike Adam's, its step is as large as the gradient
        study.step(study.train[0], heads, optimizer)
        after.append(torch.cat([parameter.flatten() for parameter in heads.parameters()]))
    assert after[0].abs().max() > 0
    # stored states are bf16: 8 bits of mantissa
    torch.testing.assert_close(after[0], after[1], atol=0.02 * float(after[0].abs().max()), rtol=0)


def test_acceptance_length_is_that_of_its_definition(args):
    study = Study(args)
    heads = study.fresh(Combination("separate", "ce", 3))
    optimizer = adam(heads, 0.01)
    study.model.model = study.stored
    for batch in shuffled(study.train, 20, seed=0):
        study.step(batch, heads, optimizer)
    torch.nn.init.normal_(heads.output_layer(1).weight)  # a head in the middle that is wrong while the last is right
    found = study.reached(heads)
    study.model.model, study.model.forward = study.backbone, study.own_forward
    expected, rows = 0.0, 0
    for batch in study.heldout:
        own_rows = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        expected += own_rows * naive_acceptance_length(study.model, heads, batch.labels, inputs)
        rows += own_rows
    assert found["acceptance_length"] > 1.2
    assert found["acceptance_length"] == pytest.approx(expected / rows, abs=0.02)  # stored states are bf16
    assert found["acceptance_length"] == found["acceptance_length_by_heads_used"][-1]
    assert found["top1"][1] < 0.1 < 0.2 < found["top1"][2]


def test_every_batch_comes_once_an_epoch_in_a_new_order():
    seen = list(shuffled(range(10), 25, seed=1))
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert len(set(seen[20:])) == 5


def test_study_goes_on_from_its_own_result_and_hidden_states_only(args):
    study = Study(args)
    result = started_result(args, study)
    args.json.write_text(json.dumps({**result, "runs": [{"steps": 3}]}))
    again = Study(args)
    assert torch.equal(again.train[0].hidden, study.train[0].hidden)
    assert started_result(args, again)["runs"] == [{"steps": 3}]
    args.precision = "bf16"
    with pytest.raises(ValueError, match="another study"):
        started_result(args, again)
    args.limit = 3
    with pytest.raises(ValueError, match="other conversations"):
        Study(args)

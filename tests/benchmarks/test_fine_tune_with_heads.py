"""The fine-tune with heads on a tiny model: the same fine-tune where the heads weigh nothing, resumable, honest sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import fine_tune_data as data
from benchmarks import fine_tune_with_heads as bench
from benchmarks.fine_tune_with_heads import AFTERWARDS, PLAIN, WITH_HEADS, FineTune
from example_tokenizers import ZEPHYR, make_tokenizer
from naive_reference import naive_acceptance_length

VOCAB = 270


@pytest.fixture
def model_dir(tmp_path: Path, model_factory) -> Path:
    torch.manual_seed(0)
    model_factory("llama", vocab_size=VOCAB, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = ZEPHYR + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def batches(model_dir: Path, count: int = 6, seed: int = 0) -> list[data.Batch]:
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = ZEPHYR + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    return data.batches_of(data.orders(count, seed), tokenizer, 2)


def test_orders_are_the_same_for_a_seed_and_answered_rightly():
    made = data.orders(30, seed=3)
    assert made == data.orders(30, seed=3) != data.orders(30, seed=4)
    for question, answer in made:
        fields = json.loads(answer["content"])
        (line,) = fields["lines"]
        assert fields["total_eur"] == line["quantity"] * line["unit_price_eur"]
        for value in (fields["customer"], fields["ship_to"]["town"], line["article"], str(line["quantity"])):
            assert value in question["content"]


def test_labels_are_the_answer_and_padding_has_none(model_dir):
    tokenizer = make_tokenizer("zephyr")
    (_, answer), (_, other) = data.orders(2, seed=5)
    (batch,) = batches(model_dir, 2, seed=5)
    for row, text in zip(batch.labels, (answer["content"], other["content"]), strict=True):
        assert tokenizer.decode(row[row != -100]) == text + "</s>"
    assert int(batch.attention_mask.sum()) < batch.attention_mask.numel()
    assert (batch.labels[batch.attention_mask == 0] == -100).all()


def test_heads_that_weigh_nothing_leave_the_fine_tune_as_it_is(model_dir):
    """The package's loss of the base model is transformers' own; what is left are fp32's roundings after four steps."""
    losses = []
    for weight in (None, 1e-12, 30.0):
        run = FineTune(model_dir, 0, 4, weight)
        before = run.reached(batches(model_dir, seed=1))["heldout_loss"]
        for batch in data.shuffled(batches(model_dir), 4, seed=0):
            run.step(batch)
        losses.append(run.reached(batches(model_dir, seed=1))["heldout_loss"])
        assert before - losses[-1] > 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert losses[0] != pytest.approx(losses[2], abs=2e-5)


def test_heads_afterwards_train_alone(model_dir):
    run = FineTune(model_dir, 0, 4, None)
    run.step(batches(model_dir)[0])
    run.heads_only(4)
    kept = {name: tensor.clone() for name, tensor in run.model.named_parameters() if "medusa" not in name}
    run.step(batches(model_dir)[0])
    run.step(batches(model_dir)[1])
    now = dict(run.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())
    assert run.heads is not None and all(parameter.abs().max() > 0 for parameter in run.heads.parameters())


def test_acceptance_length_is_that_of_its_definition(model_dir):
    run = FineTune(model_dir, 0, 30, 1.0)
    for batch in data.shuffled(batches(model_dir, 12), 30, seed=0):
        run.step(batch)
    heldout = batches(model_dir, seed=0)
    found = run.reached(heldout)
    expected = rows = 0.0
    run.model.eval()
    for batch in heldout:
        own = int((batch.labels[:, 1:] != -100).sum())
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        expected += own * naive_acceptance_length(run.model, run.heads, batch.labels, inputs)
        rows += own
    assert found["acceptance_length"] > 1.02
    assert found["acceptance_length"] == pytest.approx(expected / rows, abs=1e-3)


def test_benchmark_goes_on_where_it_was_cut_off(model_dir, tmp_path, capsys):
    file = tmp_path / "result.json"
    given = [
        "--model",
        str(model_dir),
        "--steps",
        "4",
        "--rounds",
        "1",
        "--seeds",
        "0",
        "1",
        "--coefficients",
        "0.2",
        "2",
    ]
    cut = bench.main([*given, "--json", str(file), "--minutes", "0"])
    assert cut["runs"] == [] and cut["step_seconds"] and "run it again" in capsys.readouterr().out
    first = bench.main([*given[:-5], "0", "--coefficients", "0.2", "2", "--json", str(file)])
    whole = bench.main([*given, "--json", str(file)])
    assert whole["runs"][: len(first["runs"])] == first["runs"]
    assert [(run["kind"], run["coefficient"], run["seed"]) for run in whole["runs"]] == [
        (kind, weight, seed)
        for seed in (0, 1)
        for kind, weight in ((PLAIN, None), (AFTERWARDS, 1.0), (WITH_HEADS, 0.2), (WITH_HEADS, 2.0))
    ]
    assert json.loads(file.read_text()) == whole
    assert bench.main([*given, "--json", str(file)])["runs"] == whole["runs"]
    with pytest.raises(ValueError, match="another run"):
        bench.main([*given, "--json", str(file), "--batch", "3"])


def test_summary_compares_each_seed_with_itself():
    def run(kind, weight, seed, loss, length=None):
        return {"kind": kind, "coefficient": weight, "seed": seed, "heldout_loss": loss, "acceptance_length": length}

    runs = [run(PLAIN, None, seed, loss) for seed, loss in ((0, 1.0), (1, 2.0))]
    runs += [run(AFTERWARDS, 1.0, seed, 1.0, 1.2) for seed in (0, 1)]
    runs += [run(WITH_HEADS, 0.2, seed, loss, 1.5) for seed, loss in ((0, 1.3), (1, 2.5))]
    runs += [run(WITH_HEADS, 1.0, 0, 2.5, 1.7)]
    found = bench.summary(runs)
    assert found["noise"] == pytest.approx(0.70711, abs=1e-5)
    assert found["with_heads"]["0.2"] == {
        "seeds": 2, "loss_difference": 0.4, "within_noise": True, "acceptance_length": 1.5,
    }  # fmt: skip
    assert found["with_heads"]["1"]["loss_difference"] == 1.5 and not found["with_heads"]["1"]["within_noise"]
    assert found["afterwards_acceptance_length"] == 1.2


def test_own_conversations_must_end_with_an_answer(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"prompt": "c"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 2 has no 'messages'"):
        data.read_conversations(tmp_path / "own.jsonl")

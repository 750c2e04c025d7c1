"""Where heads and their model disagree is found from their files, and heads that fit are found to fit."""

from __future__ import annotations

import json

import pytest
from conftest import add_lora, make_model
from training_outputs import save_base, write_run

from axolotl_medusa.doctor.heads_and_model import examine

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def run(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    return write_run(tmp_path / "run", make_model(), "medusa-1", base)


def problems(findings):
    return [finding.text for finding in findings if finding.kind == "problem"]


def test_heads_that_fit_have_no_problem(run):
    kinds = [finding.kind for finding in examine(run)]
    assert kinds == ["ok", "ok", "ok"]
    texts = [finding.text for finding in examine(run)]
    assert "holds 3 whole shared heads, trained by medusa-1" in texts[0]
    assert "is the one that the heads were trained with (131 x 32)" in texts[1]
    assert texts[2] == "tokens and chat template of heads and model are the same"


def test_run_with_an_adapter_fits_its_base(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    run = write_run(tmp_path / "run", add_lora(make_model()), "medusa-2", base)
    assert problems(examine(run)) == []


def test_merged_model_whose_hash_says_nothing_is_a_note(tmp_path):
    """Heads of Medusa-2 alone, with a model given: a merged adapter may have changed its output embedding, rightly so."""
    base = save_base(tmp_path / "base", make_model())
    run = write_run(tmp_path / "run", add_lora(make_model()), "medusa-2", base)
    alone = (run / "medusa_heads").rename(tmp_path / "alone")
    merged = save_base(tmp_path / "merged", make_model(seed=3))
    findings = examine(alone, str(merged))
    assert problems(findings) == []
    assert any(f.kind == "note" and f.text.startswith("cannot tell whether") for f in findings)


def test_other_model_of_the_same_shape_is_told_by_its_hash(run, tmp_path):
    other = save_base(tmp_path / "other", make_model(seed=3))
    (problem,) = problems(examine(run, str(other)))
    assert f"the output embedding of {other} is another than the one that" in problem


def test_other_vocabulary_is_told(run, tmp_path):
    other = save_base(tmp_path / "other", make_model(vocab_size=140))
    (problem,) = problems(examine(run, str(other)))
    assert "is [140, 32], but the heads were trained with one of [131, 32]" in problem


@pytest.mark.parametrize(("text", "words"), [("{{ other }}", "brings another"), (None, "brings none")])
def test_other_chat_template_is_told(text, words, run, tmp_path):
    file = tmp_path / "base" / "chat_template.jinja"
    file.unlink()
    if text:
        file.write_text(text)
    (problem,) = problems(examine(run))
    assert words in problem and "--chat-template" in problem


def test_other_token_ids_are_told(run, tmp_path):
    for directory, ids in ((run / "medusa_heads", {"a": 0, "b": 1}), (tmp_path / "base", {"a": 1, "b": 0})):
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    (problem,) = problems(examine(run))
    assert "does not number tokens as the one in" in problem


def test_damaged_tokenizer_is_told(run, tmp_path):
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    (problem,) = problems(examine(run))
    assert problem.startswith("the tokenizers' files cannot be compared: ") and "is not JSON" in problem


def test_heads_without_a_hash_are_compared_by_their_sizes(run):
    file = run / "medusa_heads" / "medusa_meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "lm_head_sha256": None, "versions": {"torch": "1.0.0", "python": "3.0"}}))
    notes = [finding.text for finding in examine(run) if finding.kind == "note"]
    assert notes[0].startswith("trained with torch 1.0.0, here is ")
    assert any("has the heads' sizes (131 x 32); no hash says more" in note for note in notes)


def test_what_is_not_here_is_a_problem(run, tmp_path):
    assert "is not a directory" in problems(examine(tmp_path / "none"))[0]
    assert "neither a directory nor in the Hub's cache" in problems(examine(run, "org/none"))[0]
    (run / "medusa_heads" / "medusa_lm_head.safetensors").write_bytes(b"damaged")
    assert len(problems(examine(run))) == 1


def test_model_in_the_hubs_cache_is_compared(run, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "snapshots").mkdir(parents=True)
    (tmp_path / "base").rename(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    findings = examine(run, "org/model")
    assert [finding.kind for finding in findings] == ["ok", "ok", "ok"]

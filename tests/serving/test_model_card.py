"""The model card: only what is known, names that the Hub accepts, and commands that a shell takes apart as meant."""

from __future__ import annotations

import json
import os
import shlex
import shutil

import pytest
import yaml
from training_outputs import EVAL_METRICS

from axolotl_medusa.serving.format_rules import SERVED_BY, TARGETS
from axolotl_medusa.serving.model_card import measured_in_training, model_card, serve_command

CONFIG = {"medusa_num_heads": 3, "medusa_num_layers": 1, "original_lm_head": True}
META = {
    "recipe": "medusa-2",
    "git_commit": "0c8d76d",
    "versions": {"axolotl": "0.19.0", "torch": "2.13.0", "peft": None},
    "yaml": {"datasets": [{"path": "org/data"}, {"path": "./data/train.jsonl"}, {"type": "chat_template"}]},
}
CHAIN = "[[0], [0, 0], [0, 0, 0]]"


def card(**changes):
    facts = {
        "target": "vllm",
        "config": CONFIG,
        "meta": META,
        "base_model": "org/model-7b",
        "model": "adapter",
        "serve": "vllm serve x",
        **changes,
    }
    return model_card(**facts)


def front_matter(text):
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_card_says_what_is_known_of_the_training():
    metadata, body = front_matter(card())
    assert metadata == {
        "tags": ["medusa", "speculative-decoding", "axolotl"],
        "base_model": "org/model-7b",
        "datasets": ["org/data"],
    }
    assert body.startswith("\n# Medusa heads for model-7b\n")
    for row in (
        "| base model | `org/model-7b` |",
        "| recipe | Medusa-2: the heads were trained together with the model |",
        "| served with | the base model with the LoRA adapter that was trained with the heads |",
        "| heads | 3, each of 1 residual block, with the served model's output layer |",
        "| trained on | `org/data`, `./data/train.jsonl` |",
        "| trained with | axolotl 0.19.0, torch 2.13.0 |",
        "| commit of axolotl-medusa | `0c8d76d` |",
    ):
        assert f"{row}\n" in body
    assert "```sh\nvllm serve x\n```" in body


def test_card_for_vllm_gives_our_command_and_the_plain_one_with_its_versions():
    body = card(directory="/out/it's")
    own, plain = (
        body.index("""```sh\naxolotl-medusa serve '/out/it'"'"'s'\n```"""),
        body.index("```sh\nvllm serve x\n```"),
    )
    assert body.index("vLLM 0.32 or newer") < own < body.index("`vllm<0.33`") < plain
    assert "axolotl-medusa serve DIR\n" in card()


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"vllm"}))
def test_card_for_other_servers_says_which_versions_load_it_and_what_became_of_them(target):
    body = card(target=target)
    versions, state = SERVED_BY[target]
    assert f"With {versions} ({state}):\n\n```sh\n" in body and "axolotl-medusa serve" not in body


def test_every_target_says_what_loads_it():
    assert set(SERVED_BY) == set(TARGETS)


def test_card_of_heads_of_unknown_origin_claims_nothing():
    metadata, body = front_matter(card(meta={}, base_model=None, model="base"))
    assert set(metadata) == {"tags"}
    assert "# Medusa heads for a language model\n" in body
    assert body.count("| unknown |") == 3
    assert "Nothing was measured before this export." in body and "trained with |" not in body


@pytest.mark.parametrize("base_model", ["./models/own", "/models/own", "models/own/checkpoint-4", "own"])
def test_local_base_model_is_no_name_for_the_hub(base_model):
    metadata, body = front_matter(card(base_model=base_model))
    assert "base_model" not in metadata and f"`{base_model}`" in body


def test_directory_that_looks_like_a_hub_name_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "base_model" in front_matter(card())[0]
    (tmp_path / "org" / "model-7b").mkdir(parents=True)
    assert "base_model" not in front_matter(card())[0]


def test_card_of_separate_heads_and_each_model():
    text = card(config={**CONFIG, "medusa_num_layers": 2, "original_lm_head": False}, model="full")
    assert "| heads | 3, each of 2 residual blocks, with an output layer of their own |" in text
    assert "| served with | the model that was trained with the heads, all of its weights |" in text
    assert "| served with | the base model as it is |" in card(model="base")
    assert "| recipe | Medusa-1: " in card(meta={"recipe": "medusa-1"})


def test_card_has_the_measured_figures():
    text = card(
        measured={"medusa0_top1": 0.6249, "medusa1_top1": 0.41, "medusa_acceptance_length": 1.874, "step": 120.0}
    )
    assert "in training's evaluation at step 120:\n" in text
    assert "| 2 ahead (head 0) | 62.5% |\n| 3 ahead (head 1) | 41.0% |\n" in text
    assert "while all before it are right: 1.87\n" in text
    assert "Nothing was measured" not in text


def test_card_with_a_length_alone_has_no_empty_table():
    text = card(measured={"medusa_acceptance_length": 1.5})
    assert "1.50" in text and "first guess |" not in text and "at step" not in text


def write_state(directory, *entries, age=0):
    directory.mkdir(parents=True)
    file = directory / "trainer_state.json"
    file.write_text(json.dumps({"log_history": list(entries)}))
    os.utime(file, (1e9 - age, 1e9 - age))


def test_measured_figures_are_the_last_evaluation_of_the_last_checkpoint(tmp_path):
    old = {**EVAL_METRICS, "eval_medusa0_top1": 0.1, "step": 2}
    last = {**EVAL_METRICS, "eval_loss": 2.5, "step": 10}
    write_state(tmp_path / "checkpoint-10", old, last, {"train_loss": 3.0, "medusa0_top1": 0.9, "step": 11})
    write_state(tmp_path / "checkpoint-9", old, age=60)
    expected = {"medusa0_top1": 0.62, "medusa1_top1": 0.41, "medusa_acceptance_length": 1.87, "step": 10}
    assert measured_in_training(tmp_path) == expected
    assert measured_in_training(tmp_path / "checkpoint-10") == expected
    assert measured_in_training(tmp_path / "checkpoint-9")["medusa0_top1"] == 0.1


def evaluation(step):
    return {"eval_medusa0_top1": step / 100, "eval_loss": 1.0, "step": step}


def write_run(output_dir, best=None, heads_of=None):
    """Evaluations at steps 20, 40, ..., 100 and a checkpoint at each; the later ones were written earlier."""
    for step in range(20, 101, 20):
        directory = output_dir / f"checkpoint-{step}"
        write_state(directory, *(evaluation(earlier) for earlier in range(20, step + 1, 20)), age=step)
        state = json.loads((directory / "trainer_state.json").read_text())
        state["best_model_checkpoint"] = best and f"/elsewhere/{output_dir.name}/checkpoint-{best}"
        (directory / "trainer_state.json").write_text(json.dumps(state))
        os.utime(directory / "trainer_state.json", (1e9 - step, 1e9 - step))
        write_heads_of(directory, step)
    write_heads_of(output_dir, heads_of or 100)
    return output_dir


def write_heads_of(directory, step):
    (directory / "medusa_heads").mkdir()
    (directory / "medusa_heads" / "medusa_lm_head.safetensors").write_text(f"heads of step {step:3}")


@pytest.mark.parametrize(
    ("best", "heads_of", "step"),
    [(None, 100, 100), (40, 40, 40), (40, 100, 100), (100, 100, 100), (60, 61, 100)],
    ids=["no best", "the best", "the last beside a best", "the last is the best", "neither"],
)
def test_measured_figures_are_of_the_heads_that_are_exported(best, heads_of, step, tmp_path):
    """A Trainer knows its best step wherever it has a metric for it; it loads it at the end only if it is told to."""
    run = write_run(tmp_path / "out", best, heads_of)
    assert measured_in_training(run) == {"medusa0_top1": step / 100, "step": step}


@pytest.mark.parametrize("best", [None, 20, 100])
def test_measured_figures_of_a_checkpoint_are_its_own(best, tmp_path):
    run = write_run(tmp_path / "out", best)
    for step in (20, 60, 100):
        assert measured_in_training(run / f"checkpoint-{step}")["step"] == step


def test_best_checkpoint_that_is_gone_is_no_evidence(tmp_path):
    run = write_run(tmp_path / "out", 40, 40)
    shutil.rmtree(run / "checkpoint-40")
    assert measured_in_training(run) == {}, "which heads these are cannot be told"


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    write_state(tmp_path / "checkpoint-5", {"eval_medusa0_top1": "much", "eval_medusa1_top1": 0.5, "step": 5})
    assert measured_in_training(tmp_path) == {"medusa1_top1": 0.5, "step": 5}


@pytest.mark.parametrize("content", ["{", "[]", '{"log_history": 5}', '{"log_history": [5]}'])
def test_damaged_state_of_the_trainer_is_named_in_one_line(content, tmp_path):
    write_state(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json is not what a Trainer writes") as error:
        measured_in_training(tmp_path)
    assert "\n" not in str(error.value)


def test_runs_that_evaluated_nothing_have_no_figures(tmp_path):
    assert measured_in_training(None) == measured_in_training(tmp_path) == {}
    write_state(tmp_path / "checkpoint-1", {"loss": 3.0, "medusa0_top1": 0.5}, {"eval_loss": 1.0})
    assert measured_in_training(tmp_path) == {}


def test_vllm_command_gives_both_models_and_the_number_of_heads():
    words = shlex.split(serve_command("vllm", "/out dir/it's", "org/model", 3))
    assert words[:4] == ["vllm", "serve", "org/model", "--speculative-config"]
    assert json.loads(words[4]) == {"method": "medusa", "model": "/out dir/it's", "num_speculative_tokens": 3}
    assert serve_command("vllm", "heads", "org/model", 3) == (
        """vllm serve org/model --speculative-config '{"method": "medusa", "model": "heads", "num_speculative_tokens": 3}'"""
    )


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("tgi", "text-generation-launcher --model-id 'o ut' --speculate 3"),
        ("lorax", "lorax-launcher --model-id org/model --adapter-id 'o ut' --adapter-source local"),
        ("fasterdecoding", "python -m medusa.inference.cli --model 'o ut'"),
        ("fasterdecoding-legacy", "python -m medusa.inference.cli --model 'o ut'"),
        ("fasterdecoding-merged", "python -m medusa.inference.cli --model 'o ut'"),
        (
            "rtp-llm",
            "python -m rtp_llm.start_server --checkpoint_path 'o ut' --tokenizer_path 'o ut' --model_type qwen_2 "
            "--start_port 8088",
        ),
    ],
)
def test_command_of_each_server(target, command):
    assert serve_command(target, "o ut", "org/model", 3, "qwen2") == command


def test_rtp_llm_spells_only_some_model_types_otherwise():
    assert "--model_type llama " in serve_command("rtp-llm", "out", "org/model", 3)


def test_tensorrt_llm_command_converts_builds_and_runs():
    convert, build, run = (shlex.split(line) for line in serve_command("tensorrt-llm", "o ut", "m", 3).splitlines())
    assert convert[:2] == ["python", "convert_checkpoint.py"] and build[0] == "trtllm-build"
    options = dict(zip(convert[2::2], convert[3::2], strict=True))
    assert options["--model_dir"] == "m" and options["--medusa_model_dir"] == "o ut"
    assert options["--num_medusa_heads"] == "3"
    assert build[build.index("--checkpoint_dir") + 1] == options["--output_dir"]
    assert run[run.index("--engine_dir") + 1] == build[build.index("--output_dir") + 1]
    assert f"--medusa_choices={CHAIN}" in run


def test_modelopt_command_is_a_program_with_the_exports_place():
    lines = serve_command("modelopt", "/out/it's", "ignored", 3).splitlines()
    assert lines[0] == "python - <<'END'" and lines[-1] == "END"
    program = "\n".join(lines[1:-1])
    compile(program, "card", "exec")
    assert f"medusa_choices={CHAIN}" in program and '''model="/out/it's"''' in program


def test_every_target_has_a_command_and_others_have_none():
    for target in TARGETS:
        assert "out" in serve_command(target, "out", "org/model", 3)
    with pytest.raises(ValueError, match="found the target 'sglang'"):
        serve_command("sglang", "out", "org/model", 3)

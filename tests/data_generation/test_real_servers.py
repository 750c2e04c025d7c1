"""generate.py against real servers with SmolLM2-135M: killed and started again, and in each of its modes."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import __main__ as demo
from demo import model_server
from demo.smollm2 import unpacked
from killed_runs import KilledRun, Moment
from transformers import AutoTokenizer

from parts.conversation_rows import IGNORED_LABEL
from parts.conversations import USER_MAX_TOKENS

PROMPTS = Path(__file__).parents[2] / "data_generation" / "prompts.jsonl"
SEED = 5
START_S = 1.0


@pytest.fixture(scope="module")
def model() -> Path:
    """The model's directory, the same as the demo's."""
    return unpacked(demo.MODEL)


@pytest.fixture(scope="module")
def sampling_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with sampling in its own settings, without which `transformers serve` ignores the temperature."""
    directory = tmp_path_factory.mktemp("model")
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    settings = directory / "generation_config.json"
    content = {**json.loads(settings.read_text(encoding="utf-8")), "do_sample": True}
    settings.unlink()
    settings.write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def transformers_serve(sampling_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = model_server.free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(sampling_model), "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, **model_server.ENVIRONMENT}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            model_server.wait_for_server(process, f"http://localhost:{port}", log)
            yield f"http://localhost:{port}/v1"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with model_server.server("vllm", model, tmp_path_factory.mktemp("server") / "log") as address:
        yield f"{address}/v1"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., KilledRun]:
    """Describes a run; `transformers serve` answers only to the name that it was started with."""
    outputs = (tmp_path / f"out{number}.jsonl" for number in itertools.count())

    def make(url: str, model: Path, *flags: Any) -> KilledRun:
        words = ["--server", url, "--model", str(model), *map(str, flags)]
        return KilledRun(next(outputs), words, timeout_s=60)

    return make


def kill_often(run: KilledRun, kills: int, rows: int) -> None:
    """Kills a run during its start and after a number of rows."""

    def draw_moment(rng: random.Random, most_lines: int) -> Moment:
        if rng.random() < 0.25:
            return run.after_seconds(rng.uniform(0, START_S))
        return run.after_lines(rng.randint(1, most_lines))

    run.kill_often(draw_moment, kills, rows, SEED)


def check_rows(run: KilledRun, model: Path, longest_tokens: int) -> None:
    """Holds that every row is a conversation that ends with an answer, with plausible counts.

    Args:
        run: What wrote the rows.
        model: What the server calls its model.
        longest_tokens: The most that may be generated for one answer and the user turn that led to it.
    """
    for row in run.rows().values():
        roles = [turn["role"] for turn in row["messages"] if turn["role"] != "system"]
        answers = roles.count("assistant")
        assert roles == ["user", "assistant"] * answers
        assert all(turn["content"].strip() for turn in row["messages"])
        assert not any("<|im_" in turn["content"] for turn in row["messages"])
        assert len(row["finish_reasons"]) == answers > 0
        assert set(row["finish_reasons"]) <= {"stop", "length"}
        assert row["usage"]["prompt_tokens"] > answers
        assert answers <= row["usage"]["completion_tokens"] <= longest_tokens * answers
        assert row["model"] == str(model)


@pytest.mark.e2e
def test_kill_against_transformers_serve_gives_the_rows_of_one_run(
    transformers_serve: str, make_run: Callable[..., KilledRun], sampling_model: Path
) -> None:
    flags = ["--data_path", PROMPTS, "--limit", 16, "--chat", "--max_tokens", 8, "--temperature", 0]
    flags += ["--num_threads", 2, "--backoff_s", 0.1]
    run, whole = (make_run(transformers_serve, sampling_model, *flags) for _ in range(2))
    kill_often(run, kills=5, rows=16)
    assert run.run() == 0
    assert len(run.rows()) == run.report()["input_rows"] == 16
    check_rows(run, sampling_model, 8)
    assert whole.run() == 0
    assert run.rows() == whole.rows()


@pytest.fixture
def short_questions(tmp_path: Path) -> Path:
    """Questions that the model answers in a few words."""
    rows = [
        ("sum", ["What is 2 + 2? Answer with one number.", "And 3 + 3?"]),
        ("city", ["Name the capital of France in one word.", "Of Italy?"]),
    ]
    path = tmp_path / "questions.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for name, texts in rows:
            turns = [turn for text in texts for turn in (("user", text), ("assistant", "an old answer"))]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.write(json.dumps({"id": name, "messages": messages}) + "\n")
    return path


@pytest.mark.e2e
def test_chat_against_transformers_serve_answers_the_given_turns(
    transformers_serve: str, make_run: Callable[..., KilledRun], sampling_model: Path, short_questions: Path
) -> None:
    run = make_run(
        transformers_serve,
        sampling_model,
        "--data_path",
        short_questions,
        "--chat",
        "--max_tokens",
        12,
        "--temperature",
        0,
    )
    assert run.run() == 0
    check_rows(run, sampling_model, 12)
    asked = [turn["content"] for turn in run.rows()["sum"]["messages"] if turn["role"] == "user"]
    assert asked == ["What is 2 + 2? Answer with one number.", "And 3 + 3?"]
    assert len(run.rows()) == 2


@pytest.mark.e2e
def test_continuing_against_transformers_serve_lets_the_model_ask(
    transformers_serve: str, make_run: Callable[..., KilledRun], sampling_model: Path, short_questions: Path
) -> None:
    flags = ["--data_path", short_questions, "--max_turns", 2, "--max_tokens", 60, "--temperature", 0]
    run = make_run(transformers_serve, sampling_model, *flags, "--tokenizer", sampling_model, "--num_threads", 1)
    assert run.run() == 0
    check_rows(run, sampling_model, 60 + USER_MAX_TOKENS)
    rows = run.rows()
    assert [rows[name]["messages"][0]["content"] for name in ("sum", "city")] == [
        "What is 2 + 2? Answer with one number.",
        "Name the capital of France in one word.",
    ]
    assert max(len(row["messages"]) for row in rows.values()) == 4
    for row in rows.values():
        assert "And 3 + 3?" not in [turn["content"] for turn in row["messages"]]


@pytest.mark.e2e
def test_from_scratch_against_transformers_serve_needs_no_prompts(
    transformers_serve: str, make_run: Callable[..., KilledRun], sampling_model: Path
) -> None:
    flags = ["--from_scratch", 3, "--max_turns", 1, "--max_tokens", 8, "--user_temperature", 0.8]
    run = make_run(transformers_serve, sampling_model, *flags, "--tokenizer", sampling_model, "--num_threads", 1)
    assert run.run() == 0
    assert len(run.settled) == 3
    check_rows(run, sampling_model, 8 + USER_MAX_TOKENS)
    asked = {row["messages"][0]["content"] for row in run.rows().values()}
    assert len(asked) == len(run.rows()) > 1, "each row has another seed, which has to give other texts"


@pytest.mark.vllm
def test_kill_against_vllm_keeps_the_ids_that_the_server_saw(
    vllm: str, make_run: Callable[..., KilledRun], model: Path
) -> None:
    flags = ["--data_path", PROMPTS, "--limit", 150, "--chat", "--max_tokens", 24, "--temperature", 0]
    run = make_run(vllm, model, *flags, "--num_threads", 16, "--token_ids", "--backoff_s", 0.1)
    kill_often(run, kills=8, rows=150)
    assert run.run() == 0
    assert len(run.rows()) == run.report()["input_rows"] == 150
    check_rows(run, model, 24)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in run.rows().values():
        *prompt, answer = row["messages"]
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(prompt_ids)] == prompt_ids
        assert row["labels"] == [IGNORED_LABEL] * len(prompt_ids) + row["input_ids"][len(prompt_ids) :]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        spoken = tokenizer.decode(row["input_ids"][len(prompt_ids) :])
        assert spoken.removesuffix("<|im_end|>").strip() == answer["content"].strip()

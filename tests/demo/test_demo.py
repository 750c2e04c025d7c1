"""What `make demo` decides: which server, what is done already, what a failed stage says. No stage is really run."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo import __main__ as demo

PLAIN = argparse.Namespace(prompts=None)
REPORT = {"succeeded": 8, "completion_tokens": 900, "wall_s": 30.0}
EVALUATION = {"eval_medusa0_top1": 0.1, "eval_medusa1_top1": 0.05, "eval_medusa_acceptance_length": 1.1}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "WORK", tmp_path / ".demo")
    monkeypatch.setattr(demo, "DATA", tmp_path / ".demo" / "data")
    return tmp_path / ".demo"


def finish(stage: str, **measured: Any) -> None:
    """Leaves a stage's mark as `main` does."""
    demo.mark(stage).parent.mkdir(parents=True, exist_ok=True)
    demo.mark(stage).write_text(json.dumps({**measured, "seconds": 1.0}))


@pytest.mark.parametrize(
    ("fails", "kind"), [("make", "transformers"), ("python", "transformers"), (None, "vllm")], ids=str
)
def test_stage_server_falls_back_where_vllm_is_not_installed_or_does_not_start(fails, kind, monkeypatch, capsys):
    def run(command: list[str | Path], log: Path) -> None:
        if Path(command[0]).name == fails:
            raise demo.StageError(f"{fails} ended with status 2")

    monkeypatch.setattr(demo, "run", run)
    assert demo.stage_server(PLAIN) == {"kind": kind}
    said = capsys.readouterr().out
    assert (f"{fails} ended with status 2" in said and "make demo FROM=server" in said) is (kind == "transformers")


@pytest.mark.parametrize(("prompts", "train"), [(None, {"vllm": 360, "transformers": 24}), (7, {})])
def test_stage_generate_takes_fewer_prompts_after_the_fallback(prompts, train, monkeypatch):
    limits = []

    def generate(address: str, kind: str, prompts: Path, limit: int, output: Path) -> dict[str, Any]:
        limits.append((kind, output.name, limit))
        return REPORT

    monkeypatch.setattr(demo, "server", lambda kind, model, log: contextlib.nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(demo, "generate", generate)
    for kind, heldout in (("vllm", 40), ("transformers", 8)):
        finish("server", kind=kind)
        assert demo.stage_generate(argparse.Namespace(prompts=prompts))["heldout"] == REPORT
        assert limits[-2:] == [(kind, "train.jsonl", train.get(kind, 7)), (kind, "heldout.jsonl", heldout)]


def test_generate_leaves_nothing_of_an_earlier_run(monkeypatch, tmp_path):
    output = tmp_path / "train.jsonl"
    for name in ("train.jsonl", "train.jsonl.failed.jsonl", "train.jsonl.report.json"):
        (tmp_path / name).write_text("old")

    def run(command: list[str | Path], log: Path) -> None:
        assert list(tmp_path.glob("train*")) == []
        Path(f"{output}.report.json").write_text(json.dumps(REPORT))

    monkeypatch.setattr(demo, "run", run)
    assert demo.generate("http://127.0.0.1:1", "transformers", tmp_path / "prompts.jsonl", 3, output) == REPORT


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_stage_summary_has_served_figures_only_where_heads_were_served(kind, work, capsys):
    served = {"acceptance_length": 1.2, "acceptance_per_position": [0.2], "same_answers": 1.0}
    finish("model")
    finish("server", kind=kind)
    finish("generate", train=REPORT, heldout=REPORT)
    finish("train", before=EVALUATION, after=EVALUATION, steps=5)
    finish("serve", **({**served, "report": REPORT} if kind == "vllm" else demo.stage_serve(PLAIN)))
    demo.stage_summary(PLAIN)
    summary = json.loads((work / "summary.json").read_text())
    assert summary["server"] == kind
    assert summary["served"] == (served if kind == "vllm" else {})
    assert summary["tokens_per_s"] == {"plain": 30.0, **({"with_heads": 30.0} if kind == "vllm" else {})}
    said = capsys.readouterr().out
    assert ("counted by vLLM" in said) is (kind == "vllm")
    assert "top-1 of head 1" in said


def test_summary_ends_with_the_speeds_of_serve(work, capsys):
    speed = {"plain": {"1": 16.7, "32": 125.5}, "with_heads": {"1": 18.0, "32": 125.0}}
    finish("model")
    finish("server", kind="vllm")
    finish("generate", train=REPORT, heldout=REPORT)
    finish("train", before=EVALUATION, after=EVALUATION, steps=5)
    finish("serve", acceptance_length=1.2, acceptance_per_position=[0.2], same_answers=1.0, report=REPORT, speed=speed)
    demo.stage_summary(PLAIN)
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.startswith("tokens/s")]
    assert rows == [
        "tokens/s, 1 at a time plain 16.7",
        "tokens/s, 32 at a time plain 125.5",
        "tokens/s, 1 at a time with heads 18.0",
        "tokens/s, 32 at a time with heads 125.0",
    ]
    assert json.loads((work / "summary.json").read_text())["served"]["speed"] == speed


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """Replaces every stage; holds the names of those that ran."""
    ran: list[str] = []

    def fake(stage: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
        def run(_: argparse.Namespace) -> dict[str, Any]:
            """Does nothing."""
            ran.append(stage)
            return {"of": stage}

        return run

    for stage in demo.STAGES:
        monkeypatch.setitem(demo.RUN, stage, fake(stage))
    return ran


def run_demo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    return demo.main()


def test_second_run_repeats_the_summary_only(stages, monkeypatch):
    assert run_demo(monkeypatch) == 0
    assert stages == list(demo.STAGES)
    assert demo.result("train")["of"] == "train" and demo.result("train")["seconds"] >= 0
    stages.clear()
    assert run_demo(monkeypatch) == 0
    assert stages == ["summary"]


def test_from_a_stage_runs_it_and_all_later_ones_again(stages, monkeypatch):
    run_demo(monkeypatch)
    stages.clear()
    assert run_demo(monkeypatch, "--from", "train") == 0
    assert stages == ["train", "serve", "summary"]


def test_failed_stage_says_how_to_run_it_again_and_a_second_run_goes_on_there(stages, monkeypatch, capsys):
    def fail(_: argparse.Namespace) -> dict[str, Any]:
        """Fails."""
        raise demo.StageError("no space left")

    train = demo.RUN["train"]
    monkeypatch.setitem(demo.RUN, "train", fail)
    assert run_demo(monkeypatch) == 1
    assert stages == ["model", "server", "generate"]
    said = capsys.readouterr().err
    assert "Stage train failed: no space left" in said and "make demo FROM=train" in said
    monkeypatch.setitem(demo.RUN, "train", train)
    stages.clear()
    assert run_demo(monkeypatch) == 0
    assert stages == ["train", "serve", "summary"]

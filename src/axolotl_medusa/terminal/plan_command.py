"""What the command `plan` does once its arguments are parsed: measures, writes `plan.json` and a picture, says what to use.

Contract: reads and writes the files that the arguments name, and prints for a user; what is measured lies in `live`.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl_medusa.cpu_instructions import cpu_name
from axolotl_medusa.live.advice import PICTURE, advice, draw_speed_ups
from axolotl_medusa.live.load import Question, check_aiohttp
from axolotl_medusa.live.plan import ADAPTIVE, Measured, Setting, measure
from axolotl_medusa.live.plan_settings import given_settings, started_settings, write_learnt
from axolotl_medusa.measuring.plots import check_plots, save_plot
from axolotl_medusa.model.sources import Source
from axolotl_medusa.serving.chat_templates import chat_template
from axolotl_medusa.serving.draft_plan import read_plan, write_plan
from axolotl_medusa.serving.serve import find_served, most_draft_tokens, prepare
from axolotl_medusa.serving.vllm_install import Vllm, find_vllm
from axolotl_medusa.terminal.prompts import default_prompts, read_prompts, turns_to_answer

_MOST_AT_A_TIME = 4096


def run_plan(options: argparse.Namespace) -> None:
    """Measures serving by load, writes what was found beside the heads, and says what to use."""
    check_aiohttp()
    concurrency = _concurrency(options.concurrency)
    for name in ("max_tokens", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    source = find_served(options.output_dir, options.base_model)
    _check_writable(source.heads_dir)
    questions = _questions(source, options.prompts, options.limit)
    with _ended_by_signals(), _work_dir(options.logs) as work:
        vllm, tokens, settings = _settings(source, options, work)
        measured = measure(
            settings,
            questions,
            concurrency,
            options.max_tokens,
            options.repeats,
            _say,
            lambda name: _learn(source, settings, name, work, tokens),
        )
    lines = advice(measured)
    write_plan(source.heads_dir, measured=_figures(measured), advice=lines, measured_with=_facts(options, vllm, tokens))
    _print_table(measured)
    print("\n".join(lines))
    print(f"written: {source.heads_dir / 'plan.json'}")
    _draw(source.heads_dir / PICTURE, measured)


def _settings(source: Source, options: argparse.Namespace, work: Path) -> tuple[Vllm | None, int, list[Setting]]:
    tokens = most_draft_tokens(source, options.draft_tokens)
    if options.server:
        if options.others:
            raise ValueError(
                f"found {options.others[0]}, expected no options of vLLM where --server names servers that run"
            )
        return None, tokens, given_settings(options.server)
    vllm = find_vllm(options.vllm_python)
    settings = started_settings(source, vllm, tokens, options.others, work)
    prepare(source)
    return vllm, tokens, settings


def _learn(source: Source, settings: Sequence[Setting], name: str, work: Path, tokens: int) -> None:
    """Before the adaptive server starts for the first time: what the servers before it learnt."""
    place = [setting.name for setting in settings].index(name)
    if place + 1 < len(settings) and settings[place + 1].name == ADAPTIVE:
        for file in write_learnt(source.heads_dir, work, tokens, source.config["medusa_num_heads"]):
            _say(f"written: {file}")


def _check_writable(heads_dir: Path) -> None:
    """Refuses what cannot be written, or was written by others, before anything is measured."""
    if not os.access(heads_dir, os.W_OK):
        raise ValueError(
            f"{heads_dir} may not be written, expected a directory that takes plan.json: copy the heads to one"
        )
    read_plan(heads_dir)
    check_plots(heads_dir, [PICTURE])


def _concurrency(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--concurrency is {text!r}, expected whole numbers such as 1,4,16") from error
    if not 1 <= found[0] <= found[-1] <= _MOST_AT_A_TIME:
        raise ValueError(f"--concurrency is {text!r}, expected numbers from 1 to {_MOST_AT_A_TIME}")
    return found


def _questions(source: Source, file: str | None, limit: int | None) -> list[Question]:
    """Chats; single texts to be continued where the model has no chat template."""
    prompts = read_prompts(file, limit) if file else default_prompts(limit)
    tokenizer = source.tokenizer_files()
    if not tokenizer or chat_template(tokenizer[0].parent) is not None:
        return [turns_to_answer(prompt) for prompt in prompts]
    return [turns_to_answer(prompt)[-1]["content"] for prompt in prompts]


@contextmanager
def _work_dir(logs: str | None) -> Iterator[Path]:
    if logs:
        directory = Path(logs).expanduser().resolve()
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="axolotl-medusa-plan-") as name:
        yield Path(name)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets a SIGTERM end the servers too."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        name: {str(requests): found.to_json() for requests, found in figures.items()}
        for name, figures in measured.items()
    }


def _facts(options: argparse.Namespace, vllm: Vllm | None, tokens: int) -> dict[str, Any]:
    return {
        "vllm": vllm.version if vllm else None,
        "vllm_options": list(options.others),
        "servers": list(options.server or ()),
        "draft_tokens": tokens,
        "max_tokens": options.max_tokens,
        "repeats": options.repeats,
        "prompts": str(options.prompts) if options.prompts else "default",
        "machine": cpu_name() or platform.machine(),
        "cpu_cores": os.cpu_count(),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_table(measured: Measured) -> None:
    print("requests  setting      tokens/s  spread  first token  per token  accepted")
    levels = list(next(iter(measured.values())))
    for requests in levels:
        for name, figures in measured.items():
            row = figures[requests].to_json()
            per_token = "-".rjust(9) if row["per_token_s"] is None else f"{row['per_token_s'] * 1000:6.1f} ms"
            accepted = "-" if row["acceptance_length"] is None else f"{row['acceptance_length']:.2f}"
            print(
                f"{requests:8}  {name:11}  {row['tokens_per_s']:8.1f}  {row['spread']:6.1%}  {row['first_token_s'] * 1000:8.0f} ms"
                f"  {per_token}  {accepted:>8}"
            )


def _draw(file: Path, measured: Measured) -> None:
    try:
        print(f"plot: {save_plot(file, draw_speed_ups, measured)}")
    except ImportError:
        _say("note: no picture, since matplotlib is not installed: pip install matplotlib")

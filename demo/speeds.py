"""Tokens per second of the user's own command, with heads and without, for one request and for many at a time.

Knows `axolotl-medusa serve` and where vLLM is installed here; nothing about how the heads were made.
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo.model_server import ENVIRONMENT, ROOT, VLLM_PYTHON, ServerStartError, half_precision

from axolotl_medusa.live.plan import Setting, measure
from axolotl_medusa.live.server import ServerError
from axolotl_medusa.live.server_process import running
from axolotl_medusa.serving.serve import VllmCommand
from axolotl_medusa.terminal.prompts import read_prompts, turns_to_answer

AT_A_TIME = (1, 32)
MAX_TOKENS = 64
METHODS = {"plain": "none", "with_heads": "auto"}
PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"


def serve_command(output_dir: Path, method: str) -> list[str]:
    """The command that serves a run; vLLM's own options come last."""
    command = [sys.executable, "-m", "axolotl_medusa", "serve", str(output_dir), "--vllm-python", str(VLLM_PYTHON)]
    dtype = "bfloat16" if half_precision() else "float32"
    return [*command, "--method", method, "--max-model-len", "2048", "--dtype", dtype]


def speeds(output_dir: Path, logs: Path) -> dict[str, dict[str, float]]:
    """Measures one round of each.

    Args:
        output_dir: What training wrote.
        logs: Directory for what the servers print.

    Returns:
        By `METHODS` and by requests at a time, generated tokens per second.

    Raises:
        ServerStartError: A server did not start or did not answer.
    """
    questions = [turns_to_answer(prompt) for prompt in read_prompts(PROMPTS)]
    settings = [_setting(name, serve_command(output_dir, method), logs) for name, method in METHODS.items()]
    try:
        measured = measure(settings, questions, AT_A_TIME, MAX_TOKENS, 1, lambda line: print(f"  {line}", flush=True))
    except ServerError as error:
        raise ServerStartError(str(error)) from error
    return {
        name: {str(requests): round(found.median_tokens_per_s, 1) for requests, found in figures.items()}
        for name, figures in measured.items()
    }


def _setting(name: str, arguments: list[str], logs: Path) -> Setting:
    command = VllmCommand(arguments, ENVIRONMENT, (), needs_merge=False)
    return Setting(name, lambda: running(command, logs / f"serve-{name}.log"))

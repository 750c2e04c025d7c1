"""Engines of vLLM that answer prompts one after the other, in one process of vLLM's environment (`vllm_answers.py`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from demo.model_server import VLLM_PYTHON

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900


class Runs:
    """Runs to make, and their answers.

    Args:
        directory: Holds `model`, heads directories by name, and perhaps an adapter, `lora`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        asked: list[list[int]],
        sampling: Any,
        heads: str | None = None,
        *,
        builtin: bool = False,
        drafts: int = 3,
        additional: dict[str, Any] | None = None,
        rounds: int = 1,
        lora: bool = False,
        **engine: Any,
    ) -> None:
        """Adds an engine: plain, with the built-in method, or with the drafter."""
        engine = {"model": str(self.directory / "model"), "skip_tokenizer_init": True, "max_num_seqs": 16, **engine}
        engine.setdefault("max_model_len", 256)
        if lora:
            engine |= {"enable_lora": True, "max_lora_rank": 8}
        if heads is not None:
            directory = str(self.directory / heads)
            method = {"method": "medusa", "model": directory} if builtin else {"method": "custom_class"}
            engine["speculative_config"] = {
                "model": "axolotl_medusa.vllm_drafter.MedusaDrafter",
                **method,
                "num_speculative_tokens": drafts,
            }
            if not builtin:
                engine["additional_config"] = {
                    "medusa_heads": directory,
                    "medusa_adaptive": False,
                    **(additional or {}),
                }
        adapter = str(self.directory / "lora") if lora else None
        self.runs[name] = {"engine": engine, "prompts": asked, "sampling": sampling, "rounds": rounds, "lora": adapter}

    def answers(self, **variables: str) -> dict[str, Any]:
        """Makes the runs, with these environment variables."""
        questions, found = self.directory / "runs.json", self.directory / "answers.json"
        questions.write_text(json.dumps(list(self.runs.values())), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
        command = [str(VLLM_PYTHON), str(ROOT / "tests" / "vllm_answers.py"), str(questions), str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return dict(zip(self.runs, json.loads(found.read_text(encoding="utf-8")), strict=True))

"""vLLM's parts that the drafter touches, faked: its modules, a configuration, a model, a runner and its steps."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from drafter_heads import HEADS, HIDDEN, SIZES, VOCAB
from torch import nn

CONTEXT = 100


@dataclasses.dataclass
class SchedulerOutput:
    total_num_scheduled_tokens: int


@dataclasses.dataclass
class SpecDecodeMetadata:
    num_draft_tokens: list[int]


class Target(nn.Module):
    """A served model: its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.calls: list[int] = []

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        self.calls.append(len(hidden_states))
        logits: torch.Tensor = self.lm_head(hidden_states)
        return logits


def fake_vllm(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str] | None = None) -> type:
    """Puts vLLM's modules in place; returns its model runner, whose method has these arguments."""

    class GPUModelRunner:
        drafter: Any

        def propose_draft_token_ids(
            self, scheduler_output: Any, sampled_token_ids: Any, sample_hidden_states: Any, spec_decode_metadata: Any
        ) -> Any:
            return self.drafter.propose(sampled_token_ids, self.input_batch.num_tokens, None, slot_mappings=None)

        def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
            return "plain" if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens

    if arguments is not None:
        code = f"def propose_draft_token_ids(self, {', '.join(arguments)}): pass"
        names: dict[str, Any] = {}
        exec(code, names)
        GPUModelRunner.propose_draft_token_ids = names["propose_draft_token_ids"]  # type: ignore[method-assign]
    places = {
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": GPUModelRunner},
        "vllm.v1.core.sched.output": {"SchedulerOutput": SchedulerOutput},
        "vllm.v1.spec_decode.metadata": {"SpecDecodeMetadata": SpecDecodeMetadata},
    }
    for name, content in places.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:length]))
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
        for key, value in content.items():
            setattr(sys.modules[name], key, value)
    return GPUModelRunner


def vllm_config(heads: Path, drafts: int = HEADS, stages: int = 1, **additional: Any) -> SimpleNamespace:
    """A configuration of vLLM's that serves the heads."""
    model = SimpleNamespace(
        dtype=torch.float32,
        max_model_len=CONTEXT,
        get_hidden_size=lambda: SIZES["hidden_size"],
        get_vocab_size=lambda: SIZES["vocab_size"],
    )
    return SimpleNamespace(
        additional_config={"medusa_heads": str(heads), **additional},
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts),
        model_config=model,
    )


def step(
    runner: Any,
    names: Sequence[str],
    sampled: list[list[int]],
    drafts: list[int],
    states: torch.Tensor,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
) -> list[list[int]]:
    """Ends a step of the runner as vLLM does; returns what was drafted."""
    lengths = [10] * len(sampled) if lengths is None else lengths
    runner.input_batch = SimpleNamespace(req_ids=list(names), num_tokens=lengths)
    output = SchedulerOutput(len(states) if tokens is None else tokens)
    found: list[list[int]] = runner.propose_draft_token_ids(output, sampled, states, SpecDecodeMetadata(drafts))
    return found

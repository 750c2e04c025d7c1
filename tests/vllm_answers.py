"""Runs in vLLM's environment: answers prompts with vLLM's offline engine, one engine after the other in one process.

    python vllm_answers.py RUNS.json ANSWERS.json

A run: `engine` (arguments of `LLM`), `prompts` (lists of token ids), `sampling` (arguments of `SamplingParams`, for all or one
for each), and perhaps `rounds` (how often all are answered; the tokens of the last are written) and `lora` (an adapter
for every second prompt). An answer: `tokens` and `logprobs` of every completion, vLLM's `counters`, `seconds` by round, or
the `error` that the engine ended with.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

DEFAULTS = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False}


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of drafts and accepted tokens, and of preempted requests."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_") or metric.name == "vllm:num_preemptions":
            name = metric.name.removeprefix("vllm:").removeprefix("spec_decode_num_")
            value = getattr(metric, "values", None)
            found[name] = metric.value if value is None else value
    return found


def answer(run: dict[str, Any]) -> dict[str, Any]:
    """Starts an engine and lets it answer."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    def sampling_of(given: dict[str, Any]) -> Any:
        given = dict(given)
        if "structured_outputs" in given:
            given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
        return SamplingParams(**given)

    engine = {**DEFAULTS, **run["engine"]}
    if engine.get("tensor_parallel_size", 1) == engine.get("pipeline_parallel_size", 1) == 1:
        engine.setdefault("distributed_executor_backend", "uni")
    llm = LLM(**engine)
    given, prompts = run["sampling"], [{"prompt_token_ids": ids} for ids in run["prompts"]]
    sampling = [sampling_of(one) for one in given] if isinstance(given, list) else sampling_of(given)
    options: dict[str, Any] = {}
    if run.get("lora"):
        adapter = LoRARequest("lora", 1, run["lora"])
        options["lora_request"] = [adapter if place % 2 else None for place in range(len(prompts))]
    seconds = []
    for _ in range(run.get("rounds", 1)):
        begun = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, **options)
        seconds.append(time.monotonic() - begun)
    found = {
        "tokens": [[list(one.token_ids) for one in output.outputs] for output in outputs],
        "logprobs": [[logprobs_of(one) for one in output.outputs] for output in outputs],
        "counters": counters(llm),
        "seconds": seconds,
    }
    llm.llm_engine.engine_core.shutdown()
    return found


def logprobs_of(completion: Any) -> list[float] | None:
    """Logarithms of the probabilities of the tokens that were chosen."""
    if completion.logprobs is None:
        return None
    return [place[token].logprob for place, token in zip(completion.logprobs, completion.token_ids, strict=True)]


def main(runs_file: str, answers_file: str) -> None:
    """Answers all runs."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    answers = []
    for run in json.loads(Path(runs_file).read_text(encoding="utf-8")):
        try:
            answers.append(answer(run))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
        print("answered", len(answers), answers[-1].get("error", answers[-1].get("counters")), flush=True)
    Path(answers_file).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

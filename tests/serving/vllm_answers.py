"""Runs in vLLM's environment: answers prompts with vLLM's offline engine and writes down tokens, counters and seconds.

    python vllm_answers.py REQUEST.json ANSWER.json

The request: `engine` (arguments of `LLM`), `prompts` (lists of token ids), `sampling` (arguments of `SamplingParams`), one
for all or one each, and `rounds`, how often all prompts are answered (only the last round's tokens are written).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of drafts and accepted tokens."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_"):
            name = metric.name.removeprefix("vllm:spec_decode_num_")
            found[name] = getattr(metric, "values", None) or getattr(metric, "value", None)
    return found


def main(request_file: str, answer_file: str) -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    lora = request.get("lora")
    llm = LLM(disable_log_stats=False, **request["engine"])
    given = request["sampling"]
    sampling = [SamplingParams(**one) for one in given] if isinstance(given, list) else SamplingParams(**given)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    options: dict[str, Any] = {}
    if lora:
        from vllm.lora.request import LoRARequest

        options["lora_request"] = [LoRARequest("lora", 1, lora) if place % 2 else None for place in range(len(prompts))]
    seconds = []
    for _ in range(request.get("rounds", 1)):
        begun = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, **options)
        seconds.append(time.monotonic() - begun)
    tokens = [[list(one.token_ids) for one in output.outputs] for output in outputs]
    text = [[one.text for one in output.outputs] for output in outputs]
    answer = {"tokens": tokens, "text": text, "counters": counters(llm), "seconds": seconds}
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the drafter makes of a server's speed: tokens/s at several loads, in alternation, and what its door costs alone.

    python -m benchmarks.drafter_serving MODEL HEADS [--loads 1 4 16 64] [--rounds 5] [--json FILE]

Engines of vLLM, each in processes of its own that stand still while another one answers, take turns in every round:

- `plain`: without heads; `plain sync`: the same without async scheduling, which vLLM switches off for a drafter of the user's;
- `door`: a drafter that never drafts, in vLLM as it is; `open door`: the same, with what our drafter mends in vLLM's sampling
  of steps without drafts;
- `fixed`: all heads, always; `adaptive`: as many drafts as pay.

All answer the same prompts greedily, as many at once as the load says. What is judged is the median over rounds of an
engine's tokens/s by those of `plain` in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import description, write_result
from demo.model_server import ENVIRONMENT, ROOT, VLLM_PYTHON, half_precision, heads_in

from axolotl_medusa.serving.vllm_interface import sample_plainly

PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"
DRAFTER = "axolotl_medusa.vllm_drafter.MedusaDrafter"
DOORS = {"door": "NeverDrafts", "open door": "NeverDraftsPlainly"}
"""Drafters of this file, by their engine."""
ENGINES = ("plain", "plain sync", *DOORS, "fixed", "adaptive")
LEARNING_ROUNDS = 1
"""Rounds before those that count: engines warm up, and `adaptive` learns its prices."""


class NeverDrafts:
    """A drafter for vLLM that never drafts.

    Args:
        vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    def load_model(self, target: Any) -> None:
        """Loads nothing."""

    def propose(self, sampled_token_ids: list[list[int]], *_args: Any, **_options: Any) -> list[list[int]]:
        """No drafts for any request."""
        return [[] for _ in sampled_token_ids]


class NeverDraftsPlainly(NeverDrafts):
    """The same, and steps without drafts are sampled as they are without a drafter."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        sample_plainly()


def arguments_of(name: str, model: Path, heads: Path, loads: list[int]) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for an engine."""
    engine: dict[str, Any] = {"model": str(model), "max_model_len": 2048, "max_num_seqs": max(loads)}
    engine |= {"dtype": "bfloat16" if half_precision() else "float32", "disable_log_stats": False}
    if name == "plain sync":
        engine["async_scheduling"] = False
    if name in (*DOORS, "fixed", "adaptive"):
        drafter = f"benchmarks.drafter_serving.{DOORS[name]}" if name in DOORS else DRAFTER
        engine["speculative_config"] = {
            "method": "custom_class",
            "model": drafter,
            "num_speculative_tokens": heads_in(heads),
        }
        engine["additional_config"] = (
            {} if name in DOORS else {"medusa_heads": str(heads), "medusa_adaptive": name == "adaptive"}
        )
    return engine


def serve(engine: str) -> None:
    """Runs in vLLM's environment: answers what comes in line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    llm = LLM(**json.loads(engine))
    tokenizer = llm.get_tokenizer()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        chats = [[{"role": "user", "content": prompt}] for prompt in asked["prompts"]]
        ids = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            for chat in chats
        ]
        sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
        begun = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": own} for own in ids], sampling, use_tqdm=False)
        seconds = time.monotonic() - begun
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        metrics = [metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")]
        counted = {metric.name: metric.value for metric in metrics if hasattr(metric, "value")}
        print(json.dumps({"seconds": seconds, "tokens": tokens, "counters": counted}), file=answers, flush=True)


class Engine:
    """An engine in processes of its own, which stand still unless it is asked.

    Args:
        arguments: Of vLLM's `LLM`.
        log: File for its output.
    """

    def __init__(self, arguments: dict[str, Any], log: Path) -> None:
        command = [str(VLLM_PYTHON), "-m", "benchmarks.drafter_serving", "--serve", json.dumps(arguments)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._read()
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: list[str], max_tokens: int) -> dict[str, Any]:
        """Lets it answer prompts at once."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._read())
        self._signal(signal.SIGSTOP)
        return answer

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with status {self._process.wait()}: see {self._log.name}")
        return line

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Ends its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()


def measure(engines: dict[str, Engine], prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Lets all engines answer in turn, load by load."""
    results: dict[str, Any] = {}
    for load in args.loads:
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        counters: dict[str, Any] = {}
        for round_ in range(-LEARNING_ROUNDS, args.rounds):
            texts = {}
            own = [prompts[(round_ * load + place) % len(prompts)] for place in range(load)]
            for name, engine in engines.items():
                answer = engine.ask(own, args.max_tokens)
                texts[name], counters[name] = answer["tokens"], answer["counters"]
                if round_ >= 0:
                    speeds[name].append(load * args.max_tokens / answer["seconds"])
            different = [name for name in texts if texts[name] != texts["plain"]]
            if different and args.same_text:
                raise RuntimeError(f"{different[0]} wrote another text than plain vLLM at {load} requests")
        results[str(load)] = summary(speeds)
        print(
            load, {name: row["to_plain"] for name, row in results[str(load)].items()}, counters["adaptive"], flush=True
        )
    return results


def summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over rounds of an engine's speed by plain vLLM's in the same round."""
    found = {}
    for name, own in speeds.items():
        ratios = [mine / plain for mine, plain in zip(own, speeds["plain"], strict=True)]
        found[name] = {
            "tokens_per_s": round(statistics.median(own), 2),
            "to_plain": round(statistics.median(ratios), 3),
            "rounds": [round(speed, 2) for speed in own],
        }
    return found


def main() -> None:
    """Measures, or serves as one of the engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("heads", type=Path, nargs="?", help="a heads directory")
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--same-text", action="store_true", help="stop where a text differs from plain vLLM's (fp32)")
    parser.add_argument("--logs", type=Path, default=Path())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    engines: dict[str, Engine] = {}
    try:
        for name in args.engines:
            arguments = arguments_of(name, args.model, args.heads, args.loads)
            engines[name] = Engine(arguments, args.logs / f"engine-{name.replace(' ', '-')}.log")
        results = measure(engines, prompts, args)
    finally:
        for engine in engines.values():
            engine.end()
    load = [round(value, 2) for value in os.getloadavg()]
    facts = {"max_tokens": args.max_tokens, "heads": heads_in(args.heads), "load_average_at_the_end": load}
    if args.json:
        write_result(args.json, description("torch") | facts | {"loads": results})


if __name__ == "__main__":
    main()

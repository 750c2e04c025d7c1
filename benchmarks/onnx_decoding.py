"""Decoding in ONNX Runtime against torch: plain and Medusa, in fp32, int8 and int4, in turns, and what trees of every size cost.

    python -m benchmarks.overfitted_heads .demo/smollm2 HEADS        # or any heads of your own
    axolotl-medusa export HEADS --to onnx --out DIR                  # and again with --precision int8 and int4
    python -m benchmarks.onnx_decoding HEADS DIR [DIR ...] [--limit 4] [--json OUT]     # directories by their own names

Every prompt is decoded greedily and past the end of a text by every decoder, each prompt beginning with another one. Of every
directory the tree and the threshold of `adaptive` come from other prompts. `to_plain` is the median over prompts of tokens/s
divided by that of plain decoding of the same runtime and precision.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import description, write_result
from benchmarks.overfitted_heads import PROMPTS

from axolotl_medusa.decoding.load_decoder import load_tokenizer
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.measuring.onnx_tuning import OnnxTunedTree, measure_onnx_steps, tune_onnx_tree
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.onnx_decoding.graph_names import ABOUT_FILE
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "onnxscript")
CALIBRATION_TOKENS = 32
NODES = 16


@dataclass(frozen=True)
class Run:
    """One prompt, decoded once: its tokens, seconds and forwards of the model."""

    tokens: list[int]
    seconds: float
    forwards: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds


Decoder = Callable[[list[int], int], Run]


def torch_decoders(model: MedusaModel) -> dict[str, Decoder]:
    """Plain decoding and Medusa decoding in torch."""

    @torch.no_grad()
    def plain(prompt: list[int], new_tokens: int) -> Run:
        decoding = PlainDecoding(model.base_model, torch.tensor([prompt]), new_tokens)
        begin = time.perf_counter()
        while not decoding.done:
            decoding.step()
        return Run(decoding.tokens, time.perf_counter() - begin, new_tokens)

    @torch.no_grad()
    def medusa(prompt: list[int], new_tokens: int) -> Run:
        decoding = model.greedy_decoding(torch.tensor([prompt]), default_tree(model.heads.num_heads, 8), new_tokens)
        return _run(decoding)

    return {"torch plain": plain, "torch default-8": medusa}


def onnx_decoders(name: str, model: OnnxMedusa, tuned: OnnxTunedTree) -> dict[str, Decoder]:
    """All ways to decode an ONNX directory."""
    trees: dict[str, Any] = {"plain": Tree(), "chain": chain(model.heads.num_heads)}
    trees |= {"default-8": default_tree(model.heads.num_heads, 8), "auto": "auto"}

    def decoder(tree: Any, least: float = 0.0) -> Decoder:
        def decode(prompt: list[int], new_tokens: int) -> Run:
            model.heads.least_probability = least
            return _run(model.decoding([prompt], tree, new_tokens))

        return decode

    adaptive = {f"{name} adaptive": decoder(tuned.tree, tuned.least_probability)}
    return {f"{name} {tree}": decoder(shape) for tree, shape in trees.items()} | adaptive


def _run(decoding: Any) -> Run:
    begin = time.perf_counter()
    while decoding.rows:
        decoding.step()
    return Run(decoding.tokens[0], time.perf_counter() - begin, decoding.stats.batch_forwards)


def measure(
    decoders: dict[str, Decoder], prompts: Sequence[list[int]], new_tokens: int
) -> Iterator[dict[str, list[Run]]]:
    """Decodes prompt after prompt with all decoders, in turns; gives all runs so far after each."""
    runs: dict[str, list[Run]] = {name: [] for name in decoders}
    for decode in decoders.values():
        decode(prompts[0], 8)
    for number, prompt in enumerate(prompts):
        start = number % len(decoders)
        for name in [*decoders, *decoders][start : start + len(decoders)]:
            runs[name].append(decoders[name](prompt, new_tokens))
        yield runs


def summary(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians over prompts of one decoder."""
    own, plain, of_torch = runs[name], runs[f"{name.split()[0]} plain"], runs["torch plain"]

    def ratio(other: Sequence[Run]) -> float:
        return statistics.median(one.tokens_per_s / base.tokens_per_s for one, base in zip(own, other, strict=True))

    return {
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in own), 2),
        "to_plain": round(ratio(plain), 3),
        "to_torch_plain": round(ratio(of_torch), 3),
        "acceptance_length": round(statistics.median(len(run.tokens) / run.forwards for run in own), 3),
        "same_texts": sum(one.tokens == base.tokens for one, base in zip(own, plain, strict=True)),
        "same_texts_as_torch": sum(one.tokens == base.tokens for one, base in zip(own, of_torch, strict=True)),
    }


def main() -> None:
    """Runs the measurement, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path, help="a heads directory, decoded with torch")
    parser.add_argument("directories", type=Path, nargs="+", help="its exports")
    parser.add_argument("--base-model", help="by default what training wrote down")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=4, help="prompts (default: 4)")
    parser.add_argument("--calibration", type=int, default=4, help="prompts that `adaptive` comes from (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.heads, args.base_model)
    rows = read_prompts(args.prompts, args.limit + args.calibration)
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    result = {
        **description(*PACKAGES),
        "load_average_before": round(os.getloadavg()[0], 2),
        "cores": torch.get_num_threads(),
    }
    result |= {"heads": args.heads.name, "prompts": args.limit, "max_new_tokens": args.max_new_tokens}
    decoders = torch_decoders(MedusaModel.from_pretrained(args.heads, args.base_model, torch.float32, "cpu"))
    directories: dict[str, Any] = {}
    for directory in args.directories:
        begin = time.perf_counter()
        model = OnnxMedusa.from_pretrained(directory)
        opened = time.perf_counter() - begin
        name = directory.name
        times = measure_onnx_steps(model, prompts[0], rounds=15)
        tuned = tune_onnx_tree(model, prompts[args.limit :], NODES, CALIBRATION_TOKENS)
        directories[name] = {
            "precision": model.about.precision,
            "heads_precision": read_json(directory / ABOUT_FILE)["heads_precision"],
            "bytes": sum(file.stat().st_size for file in directory.iterdir()),
            "open_s": round(opened, 2),
            "plain_step_ms": round(times.plain_s * 1000, 2),
            "step_ratios": {nodes: round(ratio, 3) for nodes, ratio in times.ratios.items()},
            "head_ratio": round(times.head_ratio, 3),
            "tuned": {
                "nodes": tuned.tree.num_nodes,
                "least_probability": tuned.least_probability,
                "reason": tuned.reason,
            },
        }
        decoders |= onnx_decoders(name, model, tuned)
    result["directories"] = directories
    for runs in measure(decoders, prompts[: args.limit], args.max_new_tokens):
        result |= {"prompts": len(runs["torch plain"]), "decoders": {name: summary(name, runs) for name in runs}}
        if args.json:
            write_result(args.json, result)
    for name, found in directories.items():
        print(name, found)
    print("decoder            tokens/s  to plain  to torch plain  acceptance length  same texts")
    for name, row in result["decoders"].items():
        print(
            f"{name:18} {row['tokens_per_s']:8.2f}  {row['to_plain']:8.3f}  {row['to_torch_plain']:14.3f}  "
            f"{row['acceptance_length']:17.2f}  {row['same_texts']:10}"
        )


if __name__ == "__main__":
    main()

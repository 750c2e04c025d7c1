"""Whether decoding whose tree is chosen on the way (`--tree auto`) is ever slower than plain decoding, and what it gains.

    python -m benchmarks.overfitted_heads .demo/smollm2 HEADS        # or any heads of your own
    python -m benchmarks.auto_tree HEADS [HEADS ...] [--prompts FILE] [--limit 8] [--json OUT]

Every prompt is decoded greedily with every tree, in turns, each prompt beginning with another tree. `auto` knows nothing when a
prompt begins, as in `generate`; `auto again` keeps what it learned from the prompts before, as in `chat`. Both are held to
`plain`, a loop that shares no code with the tree decoder: the median over prompts of tokens/s divided by that of `plain` must be
at least 0.98.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.machine import write_result
from benchmarks.overfitted_heads import PROMPTS

from axolotl_medusa.decoding.load_decoder import DTYPES, load_tokenizer
from axolotl_medusa.decoding.loop import Decoding
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.running_rows import GenerationStats
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.decoding.tree_chooser import AUTO
from axolotl_medusa.measuring.evaluate import Decoded, environment
from axolotl_medusa.measuring.step_times import timed
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

ALLOWED = 0.98
PLAIN, AGAIN = "plain", "auto again"
WARM_UP_TOKENS = 8


def decode(
    model: MedusaModel, prompt: Sequence[int], tree: Tree | Literal["auto"] | None, max_new_tokens: int
) -> Decoded:
    """Decodes a prompt greedily and past the end of a text, so that all answers have one length; None is plain decoding."""
    ids = torch.tensor([list(prompt)])
    if tree is None:
        plain = PlainDecoding(model.base_model, ids, max_new_tokens)
        seconds = timed(lambda: finish(plain), ids)
        return Decoded(plain.tokens, seconds, GenerationStats(len(plain.tokens), len(plain.tokens)))
    decoding = model.greedy_decoding(ids, tree, max_new_tokens)
    seconds = timed(lambda: finish(decoding), ids)
    return Decoded(decoding.tokens[0], seconds, decoding.stats)


def finish(decoding: PlainDecoding | Decoding) -> None:
    """Takes all steps."""
    while not decoding.done if isinstance(decoding, PlainDecoding) else decoding.rows:
        decoding.step()


@torch.no_grad()
def measure(model: MedusaModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> dict[str, Any]:
    """Decodes all prompts with all trees, in turns.

    Returns:
        Figures by tree, and for both ways of choosing what they said after every prompt.
    """
    trees: dict[str, Tree | Literal["auto"] | None] = {PLAIN: None, AUTO: AUTO, AGAIN: AUTO}
    trees |= {name: model.tree(name) for name in ("none", "chain", "default")}
    for tree in trees.values():
        decode(MedusaModel(model.base_model, model.heads), prompts[0], tree, WARM_UP_TOKENS)
    runs: dict[str, list[Decoded]] = {name: [] for name in trees}
    said: dict[str, list[str]] = {AUTO: [], AGAIN: []}
    for number, prompt in enumerate(prompts):
        start = number % len(trees)
        for name in [*trees, *trees][start : start + len(trees)]:
            decoder = MedusaModel(model.base_model, model.heads) if name == AUTO else model
            runs[name].append(decode(decoder, prompt, trees[name], max_new_tokens))
            if name in said:
                said[name].append(decoder.chooser().reason())
    return {"trees": {name: summary(run, runs[PLAIN]) for name, run in runs.items()}, "said": said}


def summary(runs: Sequence[Decoded], plain: Sequence[Decoded]) -> dict[str, Any]:
    """Medians over prompts, and whether the texts are those of plain decoding."""
    ratios = [run.tokens_per_s / base.tokens_per_s for run, base in zip(runs, plain, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs), 3),
        "to_plain": round(statistics.median(ratios), 4),
        "to_plain_of_prompts": [round(ratio, 3) for ratio in ratios],
        "acceptance_length": round(statistics.median(run.stats.acceptance_length for run in runs), 3),
        "same_texts": sum(run.tokens == base.tokens for run, base in zip(runs, plain, strict=True)),
    }


def print_table(heads: str, found: Mapping[str, Any]) -> None:
    """Prints what was measured with some heads."""
    print(f"{heads}\ntree        tokens/s  to plain  acceptance length  same texts")
    for name, row in found["trees"].items():
        print(
            f"{name:10}  {row['tokens_per_s']:8.2f}  {row['to_plain']:8.3f}  {row['acceptance_length']:17.2f}  "
            f"{row['same_texts']:10}"
        )
    for name, lines in found["said"].items():
        print(f"{name}, first and last: {lines[0]} | {lines[-1]}")


def main() -> None:
    """Runs the measurement, prints tables and writes the figures; fails where choosing is slower than plain decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path, nargs="+", help="heads directories, or what training wrote")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=8, help="prompts (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for heads in args.heads:
        tokenizer = load_tokenizer(heads)
        prompts = [prompt_tokens(tokenizer, row) for row in read_prompts(args.prompts, args.limit)]
        model = MedusaModel.from_pretrained(heads, dtype=DTYPES[args.dtype], device="cpu")
        load = round(os.getloadavg()[0], 2)
        facts = {"heads": heads.name, "prompts": len(prompts), "max_new_tokens": args.max_new_tokens}
        found = measure(model, prompts, args.max_new_tokens)
        results.append({**facts, "load_average_before": load, **environment(model), **found})
        print_table(heads.name, found)
    if args.json:
        write_result(args.json, results)
    slow = [
        (row["heads"], name) for row in results for name in (AUTO, AGAIN) if row["trees"][name]["to_plain"] < ALLOWED
    ]
    if slow:
        raise SystemExit(f"slower than {ALLOWED} of plain decoding: {slow}")


if __name__ == "__main__":
    main()

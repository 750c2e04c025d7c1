"""What a decoding step costs beside one plain forward of as many tokens, on the demo's model and heads.

    python -m benchmarks.decoding_step .demo/medusa-1 [--dtype fp32 bf16] [--rounds 40] [--json OUT]

For every size of tree, in turn within every round and in the other order in every second: (a) our whole step, (b) a plain
forward of the backbone and lm_head over as many ordinary tokens and the same cache, whose crop afterwards is not timed,
(c) all heads with their lm_head on one position. A step must cost at most 1.15 b + c; what is judged is the median over
rounds of a / (1.15 b + c).
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import write_result
from torch import Tensor
from transformers import DynamicCache

from axolotl_medusa.decoding.load_decoder import load_tokenizer
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import default_tree
from axolotl_medusa.measuring.evaluate import environment
from axolotl_medusa.measuring.step_times import SIZES, timed
from axolotl_medusa.model.anatomy import backbone
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = 1.15
WARM_UP_ROUNDS = 3


class Size:
    """One size of tree: the decoder that is measured, and a cache of the same text for the plain forward.

    Args:
        model: The model with its heads.
        nodes: Nodes of the tree.
        prompt: The prompt, `[1, prompt]`.
        max_new_tokens: Tokens that the rounds may write.
    """

    def __init__(self, model: MedusaModel, nodes: int, prompt: Tensor, max_new_tokens: int) -> None:
        self.model, self.nodes = model, nodes
        self.decoding = model.greedy_decoding(prompt, default_tree(model.heads.num_heads, nodes), max_new_tokens)
        self.decoding.step()
        self.cache = DynamicCache()
        self.plain(prompt)
        self.hidden = torch.randn(1, model.heads.hidden_size).to(model.heads.dtype)

    def plain(self, tokens: Tensor) -> None:
        """Forwards tokens, `[1, tokens]`, as a causal LM does."""
        hidden = backbone(self.model.base_model)(input_ids=tokens, past_key_values=self.cache, use_cache=True)[0]
        self.model.logits(hidden)

    def round(self, step_first: bool) -> dict[str, float]:
        """Seconds of step, plain forward and heads; then the plain cache gets what the step accepted."""
        written, length = len(self.decoding.tokens[0]), int(self.cache.get_seq_length())
        assert length == self.decoding.target.width, "both caches hold the same text"
        tokens = torch.arange(3, 3 + self.nodes)[None]
        root = torch.tensor([self.decoding.tokens[0][-1:]])
        runs: dict[str, Callable[[], object]] = {
            "step": self.decoding.step,
            "plain": lambda: self.plain(tokens),
            "heads": lambda: self.model.draft_logits(self.hidden, self.model.heads.num_heads),
        }
        order = list(runs)[:: 1 if step_first else -1]
        seconds = {name: timed(runs[name], tokens) for name in order}
        self.cache.crop(-self.nodes)
        new = self.decoding.tokens[0][written:]
        self.plain(torch.cat([root, torch.tensor([new[:-1]], dtype=torch.long)], -1))
        return seconds


@torch.no_grad()
def measure(model: MedusaModel, prompt: list[int], rounds: int) -> list[dict[str, Any]]:
    """Measures every size, in turn, `rounds` times."""
    ids = torch.tensor([prompt])
    room = (rounds + WARM_UP_ROUNDS + 1) * (model.heads.num_heads + 1)
    sizes = [Size(model, nodes, ids, room) for nodes in SIZES]
    found: dict[int, list[dict[str, float]]] = {nodes: [] for nodes in SIZES}
    for number in range(-WARM_UP_ROUNDS, rounds):
        for size in sizes:
            seconds = size.round(step_first=number % 2 == 0)
            if number >= 0:
                found[size.nodes].append(seconds)
    return [{"nodes": nodes, **_summary(all_)} for nodes, all_ in found.items()]


def _summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    def median(ratio: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(map(ratio, rounds)), 4)

    return {
        "plain_ms": median(lambda row: row["plain"] * 1000),
        "step_to_plain": median(lambda row: row["step"] / row["plain"]),
        "heads_to_plain": median(lambda row: row["heads"] / row["plain"]),
        "step_without_heads_to_plain": median(lambda row: (row["step"] - row["heads"]) / row["plain"]),
        "step_to_allowed": median(lambda row: row["step"] / (ALLOWED * row["plain"] + row["heads"])),
    }


def main() -> None:
    """Runs the measurement, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path, help="an output_dir with medusa_heads")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.heads)
    prompt = max((prompt_tokens(tokenizer, row) for row in read_prompts(PROMPTS)), key=len)
    runs = []
    for dtype in args.dtype:
        model = MedusaModel.from_pretrained(args.heads, dtype=DTYPES[dtype], device="cpu")
        load = os.getloadavg()[0]
        rows = measure(model, prompt, args.rounds)
        facts = {"prompt_tokens": len(prompt), "rounds": args.rounds, "load_average_before": round(load, 2)}
        runs.append({**environment(model), **facts, "allowed": f"{ALLOWED} plain + heads", "sizes": rows})
        print(f"{dtype}, {len(prompt)} prompt tokens, {args.rounds} rounds, load {load:.2f} before")
        print("nodes  plain ms  step/plain  heads/plain  (step - heads)/plain  step/allowed")
        for row in rows:
            print(
                f"{row['nodes']:5}  {row['plain_ms']:8.1f}  {row['step_to_plain']:10.3f}  {row['heads_to_plain']:11.3f}  "
                f"{row['step_without_heads_to_plain']:20.3f}  {row['step_to_allowed']:12.3f}"
            )
    if args.json:
        write_result(args.json, runs)


if __name__ == "__main__":
    main()

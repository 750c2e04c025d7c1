"""What the heads' metrics cost: training steps with and without them, in alternation, on SmolLM2-135M.

    python -m benchmarks.metrics_cost MODEL_DIR [--rounds 10] [--seq 1024] [--bf16]

Prints the ratio of the median step times; 1.03 means that metrics cost 3% of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from axolotl_medusa.model.anatomy import embedding_shape, output_embedding
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import Objective, install_objective

HEADS = 3
COUNTED_SHARE = 0.6


def build(directory: Path, logging: bool) -> nn.Module:
    """The model with fresh shared heads, Medusa-1: the cheapest step, in which metrics weigh most."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    model.requires_grad_(False)
    vocab_size, hidden_size = embedding_shape(output_embedding(model))
    heads = MedusaHeads(hidden_size, vocab_size, HEADS, form="shared")
    attach_heads(model, heads)
    install_objective(model, Objective(only_heads=True, logging=logging))
    return model.train()  # only then are accuracies sampled


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    models = {logging: build(args.model, logging) for logging in (True, False)}
    input_ids = torch.randint(3, 40_000, (1, args.seq))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) > COUNTED_SHARE, -100)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.rounds + 1):
        for logging, model in models.items():
            started = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            model.zero_grad()
            if number:  # the first round warms up
                seconds[logging].append(time.perf_counter() - started)
    medians = {logging: statistics.median(values) for logging, values in seconds.items()}
    result = {
        "seconds_with": round(medians[True], 3),
        "seconds_without": round(medians[False], 3),
        "ratio": round(medians[True] / medians[False], 4),
        "rounds": args.rounds,
        "precision": "bf16" if args.bf16 else "fp32",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

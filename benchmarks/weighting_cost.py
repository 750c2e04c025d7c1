"""What `medusa_head_weighting: chain` costs: forward and backward beside decay's, in alternation, on SmolLM2-135M, one thread.

    python -m benchmarks.weighting_cost MODEL_DIR [--rounds 2] [--seq 512] [--batch 1] [--bf16] [--json OUT]

Beside them stands what the same weights would cost by a pass of their own over the logits, before the first gradient.
With `hidden_rows` the backbone is not run, as with `medusa_hidden_cache`: there the heads' loss weighs most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import description, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM

from axolotl_medusa.losses import chunk_plan
from axolotl_medusa.model.anatomy import embedding_shape, output_embedding
from axolotl_medusa.model.head_form import HeadForm
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import HeadLoss, Objective, install_objective

HEADS = 3
COUNTED_SHARE = 0.6
FORMS: tuple[HeadForm, ...] = ("shared", "separate")
LOSSES: tuple[HeadLoss, ...] = ("ce", "lk")


def build(directory: Path, form: HeadForm, objective: Objective) -> Any:
    """The model with fresh heads, Medusa-1: the cheapest step, in which the heads' loss weighs most."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    model.requires_grad_(False)
    layer = output_embedding(model)
    vocab_size, hidden_size = embedding_shape(layer)
    heads = MedusaHeads(hidden_size, vocab_size, HEADS, form=form)
    heads.start_output_layers_from(layer.weight)
    attach_heads(model, heads)
    install_objective(model, objective)
    return model.train()


def train(model: Any, batch: dict[str, Tensor], bf16: bool) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


@torch.no_grad()
def pass_over_logits(model: Any, rows: Tensor, bf16: bool) -> None:
    """What a pass of its own computes of every head: logits of all rows in chunks, and each row's log Σ exp."""
    heads = model.medusa_heads
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for head in range(HEADS):
            layer = heads.output_layer(head) or output_embedding(model)
            for chunk in heads.hidden(head, rows).split(chunk_plan.CHUNK_LOGITS // layer.weight.shape[0]):
                torch.logsumexp(layer(chunk), dim=-1)


def measured(directory: Path, form: HeadForm, head_loss: HeadLoss, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median processor seconds of decay, of chain and of a pass of its own, with the backbone and without.

    Other work on the machine changes them less than it does the time that passes.
    """
    torch.manual_seed(0)
    input_ids = torch.randint(3, 40_000, (args.batch, args.seq))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) > COUNTED_SHARE, -100)
    models = {
        weighting: build(directory, form, Objective(only_heads=True, head_loss=head_loss, head_weighting=weighting))
        for weighting in ("decay", "chain")
    }
    rows = models["decay"](input_ids=input_ids, labels=labels, return_hidden_rows=True).hidden_rows
    found = []
    for cached in (False, True):
        batch = {"input_ids": input_ids, "labels": labels, **({"hidden_rows": rows} if cached else {})}
        works: dict[str, Callable[[], None]] = {
            name: partial(train, model, batch, args.bf16) for name, model in models.items()
        }
        works["pass"] = partial(pass_over_logits, models["decay"], rows, args.bf16)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for number in range(args.rounds + 1):
            for name, work in works.items():
                started = time.process_time()
                work()
                if number:  # the first round warms up
                    seconds[name].append(time.process_time() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = [chain / decay for chain, decay in zip(seconds["chain"], seconds["decay"], strict=True)]
        with_pass = [1 + own / decay for own, decay in zip(seconds["pass"], seconds["decay"], strict=True)]
        found.append(
            {
                "form": form,
                "head_loss": head_loss,
                "hidden_rows": cached,
                "rows": len(rows),
                "seconds": {name: round(value, 3) for name, value in medians.items()},
                "chain_to_decay": round(statistics.median(ratios), 3),
                "with_a_pass_to_decay": round(statistics.median(with_pass), 3),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [each for form, loss in product(FORMS, LOSSES) for each in measured(args.model, form, loss, args)]
    result = {
        **description("torch", "transformers"),
        "precision": "bf16" if args.bf16 else "fp32",
        "heads": HEADS,
        "tokens": args.batch * args.seq,
        "rounds": args.rounds,
        "cases": cases,
    }
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()

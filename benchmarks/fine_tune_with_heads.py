"""What heads cost an ordinary LoRA fine-tune, and what they are worth: the same fine-tune with and without, SmolLM2-135M.

    OMP_WAIT_POLICY=passive python -m benchmarks.fine_tune_with_heads [--minutes 10] [--seeds 0 1 2] [--json FILE]

Three things are measured, each seed by itself, with the same data in the same order:

- plain: the LoRA fine-tune as transformers and peft do it, with the model's own loss.
- with heads: the same number of steps with Medusa-2 beside it (`install_objective`), for each λ. Its held-out loss is the tuned
  model's own, without the heads' losses.
- heads afterwards: Medusa-1 on the plain fine-tune, for the time that the heads cost in the run with them.

The data is an extraction task in a house format: orders as people write them, answered by JSON. It is made here, so that nothing
is downloaded; `--train` and `--heldout` take your own conversations (`messages`). Time is processor seconds of all threads over the
number of threads, the kinds of steps in alternation. A run that is cut off goes on from its JSON; `--minutes` ends it in time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.fine_tune_data import Batch, batches_of, orders, read_conversations, shuffled
from benchmarks.machine import description, write_result
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets
from axolotl_medusa.model.anatomy import backbone, causal_lm, embedding_shape, output_embedding
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import Objective, install_objective

DEMO = Path(__file__).parents[1] / ".demo"
NUM_HEADS = 3
LORA_RANK = 16
LEARNING_RATE, HEADS_MULTIPLIER = 1e-3, 4.0
WARMUP_STEPS = 3
MAX_GRAD_NORM = 1.0
HELDOUT_BATCHES = 12
PLAIN, WITH_HEADS, AFTERWARDS = "plain", "with heads", "heads afterwards"


class FineTune:
    """One model with LoRA, fresh, and what trains beside it."""

    def __init__(self, model_dir: Path, seed: int, steps: int, coefficient: float | None) -> None:
        """`coefficient` is λ, None for the fine-tune without heads."""
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, lora_dropout=0.0, target_modules="all-linear")
        self.model: Any = get_peft_model(base, config)
        adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.coefficient = coefficient
        self.heads: MedusaHeads | None = None
        groups: list[dict[str, Any]] = [{"params": adapters}]
        if coefficient is not None:
            groups.append(
                {"params": list(self.attach(only_heads=False).parameters()), "lr": HEADS_MULTIPLIER * LEARNING_RATE}
            )
        self.start(groups, steps)

    def attach(self, *, only_heads: bool) -> MedusaHeads:
        """Attaches fresh heads and the objective, which replaces the model's own loss."""
        vocab_size, hidden_size = embedding_shape(output_embedding(causal_lm(self.model)))
        self.heads = MedusaHeads(hidden_size, vocab_size, NUM_HEADS, form="shared").train()
        attach_heads(self.model, self.heads, probe=False)
        install_objective(self.model, Objective(only_heads=only_heads, logging=False))
        return self.heads

    def start(self, groups: list[dict[str, Any]], steps: int) -> None:
        """Makes the optimizer and its schedule."""
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, LEARNING_RATE, weight_decay=0.0)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, min(WARMUP_STEPS, steps // 2), steps)
        self.model.train()

    def heads_only(self, steps: int) -> None:
        """Freezes what is tuned and trains fresh heads on it from here on."""
        self.model.requires_grad_(False)
        self.coefficient = 1.0
        heads = self.attach(only_heads=True)
        self.start([{"params": list(heads.parameters()), "lr": HEADS_MULTIPLIER * LEARNING_RATE}], steps)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        weight = {} if self.coefficient is None else {"medusa_coefficient": self.coefficient}
        loss = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **weight
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def reached(self, heldout: Sequence[Batch]) -> dict[str, Any]:
        """The tuned model's own loss on held-out answers and, with heads, the acceptance length of a chain of all."""
        self.model.eval()
        lm = causal_lm(self.model)
        lm_head = output_embedding(lm)
        total = rows = 0.0
        in_a_row = torch.zeros(NUM_HEADS)
        for batch in heldout:
            hidden = backbone(lm)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
            targets = medusa_targets(batch.labels, NUM_HEADS).flatten(0, 1)
            chosen = targets[:, 0] != IGNORE_INDEX
            targets, hidden = targets[chosen], hidden.flatten(0, 1)[chosen]
            total += float(F.cross_entropy(lm_head(hidden), targets[:, 0], reduction="sum"))
            rows += len(targets)
            if self.heads is not None:
                best = [lm_head(self.heads.hidden(head, hidden)).argmax(-1) for head in range(NUM_HEADS)]
                hits = torch.stack([found == targets[:, 1 + head] for head, found in enumerate(best)], dim=1)
                in_a_row += hits.long().cumprod(dim=1).sum(dim=0)
        self.model.train()
        found: dict[str, Any] = {"heldout_loss": round(total / rows, 5)}
        if self.heads is not None:
            found["acceptance_length"] = round(float(1 + in_a_row.sum() / rows), 4)
            found["accepted_up_to_head"] = [round(value, 4) for value in (in_a_row / rows).tolist()]
        return found


def processor_seconds() -> float:
    """Processor time of all threads over their number."""
    return time.process_time() / torch.get_num_threads()


def step_seconds(args: argparse.Namespace, train: Sequence[Batch]) -> dict[str, float]:
    """Medians of an optimizer step of each kind, in alternation; the first round warms up."""
    kinds = {
        name: FineTune(args.model, 0, 2 * args.rounds, weight) for name, weight in ((PLAIN, None), (WITH_HEADS, 1.0))
    }
    kinds[AFTERWARDS] = FineTune(args.model, 0, 2 * args.rounds, None)
    kinds[AFTERWARDS].heads_only(2 * args.rounds)
    seen: dict[str, list[float]] = {name: [] for name in kinds}
    for batch in shuffled(train, args.rounds + 1, seed=0):
        for name, run in kinds.items():
            started = processor_seconds()
            run.step(batch)
            seen[name].append(processor_seconds() - started)
    return {name: round(statistics.median(values[1:]), 4) for name, values in seen.items()}


def trained(args: argparse.Namespace, data: tuple[list[Batch], list[Batch]], seed: int, weight: float | None,
            steps_afterwards: int) -> list[dict[str, Any]]:  # fmt: skip
    """One fine-tune; without heads also the heads that are trained on it afterwards."""
    train, heldout = data
    run = FineTune(args.model, seed, args.steps, weight)
    for batch in shuffled(train, args.steps, seed):
        run.step(batch)
    kind = PLAIN if weight is None else WITH_HEADS
    found = [{"kind": kind, "coefficient": weight, "seed": seed, "steps": args.steps, **run.reached(heldout)}]
    if weight is None:
        run.heads_only(steps_afterwards)
        for batch in shuffled(train, steps_afterwards, seed):
            run.step(batch)
        found.append(
            {"kind": AFTERWARDS, "coefficient": 1.0, "seed": seed, "steps": steps_afterwards, **run.reached(heldout)}
        )
    return found


def started_result(args: argparse.Namespace, heldout: Sequence[Batch]) -> dict[str, Any]:
    """The result without runs, or that of an interrupted run of the same kind.

    Raises:
        ValueError: The file is of another kind of run.
    """
    result: dict[str, Any] = {
        **description("torch", "transformers", "peft", "axolotl-medusa"),
        "torch_threads": torch.get_num_threads(),
        "steps": args.steps,
        "conversations_per_step": args.batch,
        "heldout_answer_tokens": sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in heldout),
    }
    if args.json and args.json.exists():
        found: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8"))
        if not result.items() <= found.items():
            raise ValueError(f"{args.json} is of another run than this one ({result}): name another file")
        return found
    return {**result, "untrained": {}, "step_seconds": {}, "runs": []}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the differences to the plain fine-tune of the same seed, and which λ stay within its noise.

    Noise is the standard deviation of the plain fine-tune's held-out loss over seeds.
    """
    plain = {run["seed"]: run["heldout_loss"] for run in runs if run["kind"] == PLAIN}
    noise = statistics.stdev(plain.values()) if len(plain) > 1 else 0.0
    found: dict[str, Any] = {
        "plain_loss": round(statistics.mean(plain.values()), 5),
        "noise": round(noise, 5),
        "with_heads": {},
    }
    for weight in sorted({run["coefficient"] for run in runs if run["kind"] == WITH_HEADS}):
        same = [
            run for run in runs if (run["kind"], run["coefficient"]) == (WITH_HEADS, weight) and run["seed"] in plain
        ]
        differences = [run["heldout_loss"] - plain[run["seed"]] for run in same]
        found["with_heads"][f"{weight:g}"] = {
            "seeds": len(same),
            "loss_difference": round(statistics.mean(differences), 5),
            "within_noise": statistics.mean(differences) <= noise,
            "acceptance_length": round(statistics.mean(run["acceptance_length"] for run in same), 4),
        }
    after = [run["acceptance_length"] for run in runs if run["kind"] == AFTERWARDS]
    found["afterwards_acceptance_length"] = round(statistics.mean(after), 4)
    return found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "smollm2")
    parser.add_argument("--train", type=Path, help="conversations to tune on, in place of the orders")
    parser.add_argument("--heldout", type=Path, help="others to evaluate on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="conversations in a step")
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.05, 0.2, 1.0], help="λ")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4, help="measured steps of each kind")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no further run after this time")
    parser.add_argument("--json", type=Path, help="the result; a run that was interrupted goes on from it")
    args = parser.parse_args(argv)
    if (args.train is None) != (args.heldout is None):
        parser.error("found one of --train and --heldout, expected both or none")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet and prints each result; returns all."""
    args, started = parsed(argv), time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = read_conversations(args.train) if args.train else orders(args.steps * args.batch, seed=0)
    heldout = read_conversations(args.heldout) if args.heldout else orders(HELDOUT_BATCHES * args.batch, seed=1)
    data = batches_of(train, tokenizer, args.batch), batches_of(heldout, tokenizer, args.batch)
    result = started_result(args, data[1])

    def save() -> None:
        if args.json:
            write_result(args.json, result)

    if not result["step_seconds"]:
        result["untrained"] = FineTune(args.model, 0, 2, None).reached(data[1])
        result["step_seconds"] = step_seconds(args, data[0])
        save()
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}), flush=True)
    extra = result["step_seconds"][WITH_HEADS] - result["step_seconds"][PLAIN]
    steps_afterwards = max(2, round(args.steps * extra / result["step_seconds"][AFTERWARDS]))
    for seed in args.seeds:
        for weight in (None, *args.coefficients):
            done = [(run["kind"], run["coefficient"], run["seed"]) for run in result["runs"]]
            if (AFTERWARDS if weight is None else WITH_HEADS, 1.0 if weight is None else weight, seed) in done:
                continue
            if time.monotonic() - started > 60 * args.minutes:
                print("time is up; run it again to go on")
                return result
            for run in trained(args, data, seed, weight, steps_afterwards):
                result["runs"].append(run)
                print(f"{time.monotonic() - started:5.0f} s  {json.dumps(run)}", flush=True)
            result["summary"] = summary(result["runs"])
            save()
    print(json.dumps(result["summary"], indent=2))
    return result


if __name__ == "__main__":
    main()

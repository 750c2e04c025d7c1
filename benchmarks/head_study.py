"""Which heads are worth their time: acceptance length at equal wall-clock training time, Medusa-1 on SmolLM2-135M.

    OMP_WAIT_POLICY=passive python -m benchmarks.head_study [--budgets-s 60 180] [--seeds 0] [--json FILE]

All of {separate, shared} heads x {ce, kl} head loss x {3, 5} heads, on what `make demo` leaves in `.demo`. Contract: the
training step is the package's own (`install_objective`, batches, schedule and optimizer as in examples/medusa/smollm2.yml,
in the precision asked for); what is left out of it is only the backbone's forward, which never changes in Medusa-1: its
hidden states are computed once and handed to every step.

Equal time means: the whole step, backbone included, is timed for every combination in alternation, and each combination
gets as many optimizer steps as fit into the budget. The time is processor seconds of all threads over the number of
threads, which other work on the machine hardly changes; OMP_WAIT_POLICY=passive keeps waiting threads from counting.

Acceptance length is that of a greedy chain: the mean over the counted positions of held-out answers of 1 + the heads that
are right in a row from head 0. The answers are the model's own greedy ones, so being right is being accepted.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from benchmarks.machine import description, write_result
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from axolotl_medusa.losses.targets import IGNORE_INDEX, medusa_targets
from axolotl_medusa.model.anatomy import embedding_shape, output_embedding
from axolotl_medusa.model.head_form import HeadForm
from axolotl_medusa.model.heads import HEADS_NAME, MedusaHeads
from axolotl_medusa.training.objective import Objective, install_objective

DEMO = Path(__file__).parents[1] / ".demo"
SEQUENCE_TOKENS = 1024
WARMUP_STEPS = 10
LEARNING_RATES = (8e-3, 4e-3, 2e-3, 1e-3, 5e-4)
MAX_GRAD_NORM = 1.0
TIMED_ROUNDS = 5


class Combination(NamedTuple):
    """What is compared."""

    form: HeadForm
    head_loss: Literal["ce", "kl"]
    num_heads: int


COMBINATIONS = [
    Combination(form, head_loss, num_heads)
    for num_heads in (3, 5)
    for form in cast(tuple[HeadForm, ...], ("separate", "shared"))
    for head_loss in cast(tuple[Literal["ce", "kl"], ...], ("ce", "kl"))
]


@dataclass
class Conversation:
    """A tokenised conversation.

    Attributes:
        input_ids: Tokens.
        labels: The same, -100 outside of answers.
        hidden: Post-norm hidden states in bf16, `[tokens, hidden_size]`.
    """

    input_ids: list[int]
    labels: list[int]
    hidden: Tensor | None = None


class Batch(NamedTuple):
    """Packed conversations, `[1, tokens]` each, and their hidden states `[1, tokens, hidden_size]`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    hidden: Tensor


class StoredBackbone(nn.Module):
    """Answers as the backbone does, from hidden states that come with the call."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, *, stored_hidden: Tensor, **_: Any) -> tuple[Tensor]:
        """Returns the given hidden states as the model's last ones."""
        return (stored_hidden,)


def read_conversations(path: Path, tokenizer: Any) -> list[Conversation]:
    """Tokenises chat rows; counted are answers with their end-of-turn token, unless the answer was cut before it."""
    found = []
    for row in map(json.loads, path.read_text().splitlines()):
        input_ids: list[int] = []
        labels: list[int] = []
        text_before, messages = "", row["messages"]
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt[len(text_before) :], add_special_tokens=False).input_ids
            answer_ids = tokenizer(message["content"], add_special_tokens=False).input_ids
            cut = place == len(messages) - 1 and row["finish_reasons"][-1] != "stop"
            answer_ids += [] if cut else [tokenizer.eos_token_id]
            input_ids += prompt_ids + answer_ids
            labels += [IGNORE_INDEX] * len(prompt_ids) + answer_ids
            text_before = prompt + message["content"] + tokenizer.eos_token
        found.append(Conversation(input_ids[:SEQUENCE_TOKENS], labels[:SEQUENCE_TOKENS]))
    return found


@torch.no_grad()
def store_hidden(model: Any, conversations: Sequence[Conversation], autocast: Callable[[], Any]) -> None:
    """Runs the backbone over every conversation and keeps its hidden states."""
    for conversation in conversations:
        with autocast():
            hidden = model.model(input_ids=torch.tensor([conversation.input_ids]), use_cache=False)[0]
        conversation.hidden = hidden[0].to(torch.bfloat16)


def kept_hidden(path: Path | None, conversations: Sequence[Conversation]) -> bool:
    """Takes hidden states from the file of an earlier run, if there is one."""
    if path is None or not path.exists():
        return False
    found = torch.load(path, weights_only=True)
    if [len(hidden) for hidden in found] != [len(each.input_ids) for each in conversations]:
        raise ValueError(f"{path} holds hidden states of other conversations than these: delete it")
    for conversation, hidden in zip(conversations, found, strict=True):
        conversation.hidden = hidden
    return True


def packed(conversations: Sequence[Conversation]) -> list[Batch]:
    """Puts conversations into batches of at most `SEQUENCE_TOKENS`, each into the first that has room."""
    bins: list[list[Conversation]] = []
    for conversation in sorted(conversations, key=lambda each: -len(each.input_ids)):
        used = (sum(len(each.input_ids) for each in each_bin) for each_bin in bins)
        room = (place for place, tokens in enumerate(used) if tokens + len(conversation.input_ids) <= SEQUENCE_TOKENS)
        place = next(room, None)
        if place is None:
            bins.append([conversation])
        else:
            bins[place].append(conversation)
    return [
        Batch(
            torch.tensor([[token for each in each_bin for token in each.input_ids]]),
            torch.tensor([[label for each in each_bin for label in each.labels]]),
            torch.tensor([[position for each in each_bin for position in range(len(each.input_ids))]]),
            torch.cat([cast(Tensor, each.hidden) for each in each_bin])[None],
        )
        for each_bin in bins
    ]


def shuffled(batches: Sequence[Batch], steps: int, seed: int) -> Iterator[Batch]:
    """As many batches as there are steps, every epoch in a new order."""
    order, source = list(range(len(batches))), random.Random(seed)
    for step in range(steps):
        if step % len(order) == 0:
            source.shuffle(order)
        yield batches[order[step % len(order)]]


class Study:
    """The model, its data, and what is done with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        bf16 = args.precision == "bf16"
        self.autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=bf16)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.own_forward = self.model.forward
        self.vocab_size, self.hidden_size = embedding_shape(output_embedding(self.model))
        train, heldout = (read_conversations(path, tokenizer)[: args.limit] for path in (args.train, args.heldout))
        everything = [*train, *heldout]
        if not kept_hidden(args.hidden, everything):
            store_hidden(self.model, everything, self.autocast)
            if args.hidden:
                torch.save([each.hidden for each in everything], args.hidden)
        self.train, self.heldout = packed(train), packed(heldout)
        self.backbone = self.model.model
        self.stored = StoredBackbone(self.backbone.embed_tokens)

    def fresh(self, combination: Combination) -> MedusaHeads:
        """Attaches new heads, in the place of others, and installs their objective."""
        heads = MedusaHeads(self.hidden_size, self.vocab_size, combination.num_heads, form=combination.form)
        heads.start_output_layers_from(output_embedding(self.model).weight)
        self.attach(heads, combination)
        return heads

    def attach(self, heads: MedusaHeads, combination: Combination) -> None:
        """Attaches heads with the objective of a combination."""
        self.model.forward = self.own_forward
        self.model.add_module(HEADS_NAME, heads.train())
        install_objective(self.model, Objective(only_heads=True, head_loss=combination.head_loss, logging_topk=3))

    def step(self, batch: Batch, heads: MedusaHeads, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step; the backbone runs only where the model has its own."""
        with self.autocast():
            stored = {"stored_hidden": batch.hidden.float()} if self.model.model is self.stored else {}
            output = self.model(batch.input_ids, batch.labels, position_ids=batch.position_ids, **stored)
        output.loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def step_seconds(self, rounds: int) -> dict[Combination, dict[str, float]]:
        """Medians of the whole step's seconds, the combinations in alternation; the first round warms up."""
        self.model.model = self.backbone
        kept = {(each.form, each.num_heads): self.fresh(each) for each in COMBINATIONS}
        optimizers = {key: adam(heads, 1e-6) for key, heads in kept.items()}
        seen: dict[Combination, list[tuple[float, float]]] = {each: [] for each in COMBINATIONS}
        for batch in shuffled(self.train, rounds + 1, seed=0):
            for combination in COMBINATIONS:
                key = (combination.form, combination.num_heads)
                self.attach(kept[key], combination)
                wall, processor = time.perf_counter(), time.process_time()
                self.step(batch, kept[key], optimizers[key])
                used = (time.process_time() - processor) / torch.get_num_threads()
                seen[combination].append((used, time.perf_counter() - wall))
        self.model.model = self.stored
        return {
            each: {
                "step_s": round(statistics.median(used for used, _ in values[1:]), 4),
                "step_wall_s": round(statistics.median(wall for _, wall in values[1:]), 4),
            }
            for each, values in seen.items()
        }

    def trained(self, combination: Combination, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
        """Trains new heads for a number of steps; returns what they reach on held-out answers."""
        torch.manual_seed(seed)
        self.model.model = self.stored
        heads = self.fresh(combination)
        optimizer = adam(heads, learning_rate)
        scheduler = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, steps // 2), steps)
        for batch in shuffled(self.train, steps, seed):
            self.step(batch, heads, optimizer)
            scheduler.step()
        return self.reached(heads)

    @torch.no_grad()
    def reached(self, heads: MedusaHeads) -> dict[str, Any]:
        """Acceptance length by number of heads used, and top-1 accuracies; all held-out rows, ties go to the first token."""
        in_a_row = torch.zeros(heads.num_heads)
        right, counted, rows = torch.zeros(heads.num_heads), torch.zeros(heads.num_heads), 0
        for batch in self.heldout:
            targets = medusa_targets(batch.labels, heads.num_heads, batch.position_ids)[0]
            chosen = targets[:, 0] != IGNORE_INDEX
            targets, hidden = targets[chosen, 1:], batch.hidden[0, chosen].float()
            hits = torch.zeros_like(targets, dtype=torch.bool)
            for head in range(heads.num_heads):
                layer = heads.output_layer(head) or output_embedding(self.model)
                with self.autocast():
                    hits[:, head] = layer(heads.hidden(head, hidden)).argmax(-1) == targets[:, head]
            in_a_row += hits.long().cumprod(dim=1).sum(dim=0)
            right += hits.sum(dim=0)
            counted += (targets != IGNORE_INDEX).sum(dim=0)
            rows += len(targets)
        lengths = 1 + (in_a_row / rows).cumsum(dim=0)
        return {
            "acceptance_length": round(float(lengths[-1]), 4),
            "acceptance_length_by_heads_used": [round(value, 4) for value in lengths.tolist()],
            "top1": [round(value, 4) for value in (right / counted).tolist()],
        }

    @torch.no_grad()
    def greedy_share(self) -> float:
        """Share of the held-out answers' tokens that are the model's likeliest ones: near 1 where they are greedy."""
        same = total = 0
        for batch in self.heldout:
            targets = medusa_targets(batch.labels, 1, batch.position_ids)[0, :, 0]
            chosen = targets != IGNORE_INDEX
            with self.autocast():
                best = output_embedding(self.model)(batch.hidden[0, chosen].float()).argmax(-1)
            same, total = same + int((best == targets[chosen]).sum()), total + int(chosen.sum())
        return round(same / total, 4)

    def top1_alone(self, form: HeadForm, steps: int, learning_rate: float) -> float:
        """Top-1 of head 0 trained alone: heads of Medusa-1 share nothing but the norm that their gradients are clipped to."""
        return cast(float, self.trained(Combination(form, "ce", 1), steps, learning_rate, seed=0)["top1"][0])


def adam(heads: MedusaHeads, learning_rate: float) -> torch.optim.Optimizer:
    """The example's optimizer, in torch's fastest implementation."""
    return torch.optim.AdamW(heads.parameters(), learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def started_result(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """The result without runs, or the one of an interrupted study of the same data, precision and machine."""
    result = {
        **description("torch", "transformers", "axolotl-medusa"),
        "torch_threads": torch.get_num_threads(),
        "precision": args.precision,
        "train_tokens": sum(batch.input_ids.numel() for batch in study.train),
        "batches_per_epoch": len(study.train),
        "heldout_rows": sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in study.heldout),
        "heldout_tokens_that_are_greedy": study.greedy_share(),
    }
    if args.json and args.json.exists():
        found: dict[str, Any] = json.loads(args.json.read_text())
        if not result.items() <= found.items():
            raise ValueError(f"{args.json} is of another study than this one ({result}): name another file")
        return found
    return {**result, "step_seconds": {}, "learning_rates": {}, "runs": []}


def save(result: dict[str, Any], path: Path | None) -> None:
    """Writes the result, if it is wanted."""
    if path:
        write_result(path, result)


def name_of(combination: Combination) -> str:
    """A combination as a key of the result."""
    return f"{combination.form} {combination.head_loss} {combination.num_heads}"


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    """Prints the runs of each budget, the longest acceptance length first."""
    print("| budget s | heads | form | loss | step s | steps | acceptance length | first 3 heads | top-1 by head |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda each: (each["budget_s"], -each["acceptance_length"])):
        top1 = " ".join(f"{value:.3f}" for value in run["top1"])
        print(
            f"| {run['budget_s']:g} | {run['num_heads']} | {run['form']} | {run['head_loss']} | {run['step_s']:.2f} | "
            f"{run['steps']} | {run['acceptance_length']:.3f} | {run['acceptance_length_by_heads_used'][2]:.3f} | {top1} |"
        )


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "smollm2")
    parser.add_argument("--train", type=Path, default=DEMO / "data" / "train.jsonl")
    parser.add_argument("--heldout", type=Path, default=DEMO / "data" / "heldout.jsonl")
    parser.add_argument("--budgets-s", type=float, nargs="+", default=[60.0, 180.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=TIMED_ROUNDS, help="measured steps of each combination")
    parser.add_argument("--limit", type=int, help="conversations of each file, for a trial")
    parser.add_argument("--hidden", type=Path, help="keeps the hidden states for another run")
    parser.add_argument("--json", type=Path, help="the result; a study that was interrupted goes on from it")
    args = parser.parse_args()
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {what}", flush=True)

    study = Study(args)
    result = started_result(args, study)
    say(json.dumps({key: value for key, value in result.items() if key != "runs"}))
    if not result["step_seconds"]:
        result["step_seconds"] = {name_of(key): value for key, value in study.step_seconds(args.rounds).items()}
        save(result, args.json)
    step_s = {each: result["step_seconds"][name_of(each)]["step_s"] for each in COMBINATIONS}
    say(json.dumps(result["step_seconds"]))
    for form in ("separate", "shared"):
        steps = max(2, int(min(args.budgets_s) / step_s[Combination(form, "ce", 3)]))
        tried = result["learning_rates"].setdefault(form, {"steps": steps, "top1_of_head_0_alone": {}})
        found = tried["top1_of_head_0_alone"]
        for rate in LEARNING_RATES:
            if f"{rate:g}" not in found:
                found[f"{rate:g}"] = study.top1_alone(form, tried["steps"], rate)
                save(result, args.json)
        tried["used"] = float(max(found, key=lambda rate: found[rate]))
        say(f"{form}: {tried}")
    for seed in args.seeds:
        for budget_s in args.budgets_s:
            for combination in COMBINATIONS:
                run = {**combination._asdict(), "budget_s": budget_s, "seed": seed, "step_s": step_s[combination]}
                if any(run.items() <= done.items() for done in result["runs"]):
                    continue
                steps = max(2, int(budget_s / step_s[combination]))
                rate = result["learning_rates"][combination.form]["used"]
                result["runs"].append({**run, "steps": steps, **study.trained(combination, steps, rate, seed)})
                say(json.dumps(result["runs"][-1]))
                save(result, args.json)
    print_table(result["runs"])


if __name__ == "__main__":
    main()

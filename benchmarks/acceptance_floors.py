"""Holds trained heads to what they once reached, without a server: acceptance per head on answers kept as token ids.

    python -m benchmarks.acceptance_floors answers --base-model DIR          once for a model: its greedy answers
    python -m benchmarks.acceptance_floors record HEADS --base-model DIR     after a training: what these heads reach
    python -m benchmarks.acceptance_floors check HEADS --base-model DIR      ever after; exit code 1 below a floor

Three things are checked. The heads' chat template still gives the recorded prompts, token for token. The share of positions at
which heads 0 to i are all right is at least 95% of what was recorded, for each i. And the tokens of the answers have nearly all
the same rank among each head's best as they had: that shows a small fault, such as a lost bias, which costs less than 5%.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from axolotl_medusa.decoding.load_decoder import load_decoder
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.measuring.calibration import head_ranks
from axolotl_medusa.terminal.prompts import Prompt, prompt_tokens, read_prompts

ROOT = Path(__file__).parents[1]
HELDOUT_PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"
ANSWERS = ROOT / "tests" / "data" / "floors" / "answers.json"
FLOORS = ROOT / "tests" / "data" / "floors" / "floors.json"
EVERY = 3
"""Of the held-out prompts every third is answered, so that all categories are there and the file stays small."""
ANSWER_TOKENS = 64
TOGETHER = 9
"""Prompts that are answered at a time."""
FLOOR = 0.95
"""Of each recorded share; on the same machine and in fp32 the same heads reach all of it."""
SAME_RANKS = 0.98
"""Of all ranks. Ranks of near-ties differ from one processor to the next."""
TOP_K = 5
SYMBOLS = "-0123456789"
"""A rank as a character: no such token, rank 0 to `TOP_K` - 1, or `TOP_K` for further down."""


class Answer(NamedTuple):
    """What a model answered to a held-out prompt.

    Attributes:
        id: The prompt's id.
        prompt: Its tokens in the chat template.
        answer: The answer's tokens.
        ended: Whether it ended by itself.
    """

    id: str
    prompt: list[int]
    answer: list[int]
    ended: bool


def read_answers(file: Path = ANSWERS) -> list[Answer]:
    """Reads the recorded answers."""
    return [Answer(**row) for row in json.loads(file.read_text(encoding="utf-8"))]


def write_rows(file: Path, rows: Sequence[dict[str, Any]] | dict[str, Any]) -> None:
    """Writes JSON with one line for each answer or key."""
    pairs = rows.items() if isinstance(rows, dict) else [(None, row) for row in rows]
    lines = [(f"{json.dumps(key)}: " if key else "") + json.dumps(value) for key, value in pairs]
    start, end = "{}" if isinstance(rows, dict) else "[]"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{start}\n" + ",\n".join(lines) + f"\n{end}\n", encoding="utf-8")


@torch.no_grad()
def answered(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Answer]:
    """Lets a model answer greedily, `TOGETHER` prompts at a time, padded on the left."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for start in range(0, len(prompts), TOGETHER):
        chosen = prompts[start : start + TOGETHER]
        rows = [prompt_tokens(tokenizer, prompt) for prompt in chosen]
        width = max(map(len, rows))
        inputs = torch.tensor([[ends[0]] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        texts = model.generate(
            inputs, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=ends[0]
        )
        for prompt, row, text in zip(chosen, rows, texts[:, width:].tolist(), strict=True):
            length = next((place + 1 for place, token in enumerate(text) if token in ends), len(text))
            found.append(Answer(prompt.id, row, text[:length], text[length - 1] in ends))
    return found


def measured(medusa: MedusaModel, answers: Sequence[Answer]) -> dict[str, Any]:
    """What heads reach on answers.

    Returns:
        `accepted_up_to_head`: for each i the share of positions at which heads 0 to i are all right; `acceptance_length`: 1 and
        their sum, of a chain asked at every position; `ranks`: of each answer a text for each head.
    """
    in_a_row = [0] * medusa.heads.num_heads
    positions, texts = 0, []
    for each in answers:
        ranks = head_ranks(medusa, each.prompt, each.answer, TOP_K)
        for row in ranks if each.ended else [row for row in ranks if -1 not in row]:
            positions += 1
            right = next((head for head, rank in enumerate(row) if rank), len(row))
            in_a_row = [count + (head < right) for head, count in enumerate(in_a_row)]
        texts.append(["".join(SYMBOLS[rank + 1] for rank in column) for column in zip(*ranks, strict=True)])
    if not positions:
        raise ValueError("found no answer of three tokens or more, expected some: record the answers again")
    shares = [count / positions for count in in_a_row]
    return {
        "acceptance_length": round(1 + sum(shares), 4),
        "accepted_up_to_head": [round(share, 4) for share in shares],
        "positions": positions,
        "ranks": texts,
    }


def template_problems(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[str]:
    """Says which prompts the tokenizer's chat template gives other tokens than were recorded."""
    by_id = {prompt.id: prompt for prompt in prompts}
    changed = [each.id for each in answers if prompt_tokens(tokenizer, by_id[each.id]) != each.prompt]
    if not changed:
        return []
    found = f"found other tokens than recorded for {len(changed)} of {len(answers)} prompts, the first {changed[0]}"
    return [f"{found}; expected the chat template and tokenizer that the heads were trained with"]


def acceptance_problems(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Says what is below its floor."""
    shares, floors = found["accepted_up_to_head"], recorded["accepted_up_to_head"]
    if len(shares) != len(floors):
        return [f"found {len(shares)} heads, expected {len(floors)} as recorded; record the floors again"]
    problems = [
        f"heads 0 to {head} are all right at {share:.4f} of the positions, expected {FLOOR} x {recorded_share:.4f} at least"
        for head, (share, recorded_share) in enumerate(zip(shares, floors, strict=True))
        if share < FLOOR * recorded_share
    ]
    for head in range(len(shares)):
        now, then = ("".join(texts[head] for texts in each["ranks"] if texts) for each in (found, recorded))
        same = sum(one == other for one, other in zip(now, then, strict=False)) / max(len(now), len(then))
        if same < SAME_RANKS:
            problems.append(f"head {head} gives {same:.1%} of the tokens the recorded rank, expected {SAME_RANKS:.0%}")
    return problems


def check(medusa: MedusaModel, tokenizer: Any, answers: Sequence[Answer], recorded: dict[str, Any],
          prompts: Sequence[Prompt]) -> list[str]:  # fmt: skip
    """All problems of heads and their tokenizer; none if they are as good as they were."""
    return [
        *template_problems(tokenizer, prompts, answers),
        *acceptance_problems(measured(medusa, answers), recorded),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the three commands; returns 1 where heads are below a floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("answers", "record", "check"))
    parser.add_argument("heads", nargs="?", type=Path, help="a heads directory, for record and check")
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--answers", type=Path, default=ANSWERS)
    parser.add_argument("--floors", type=Path, default=FLOORS)
    parser.add_argument("--prompts", type=Path, default=HELDOUT_PROMPTS)
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts)
    if args.command == "answers":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.float32).eval()
        found = answered(model, AutoTokenizer.from_pretrained(args.base_model), prompts[::EVERY])
        write_rows(args.answers, [each._asdict() for each in found])
        print(f"{args.answers}: {len(found)} answers, {sum(len(each.answer) for each in found)} tokens")
        return 0
    if args.heads is None:
        parser.error(f"found no heads, expected a heads directory after {args.command}")
    medusa, tokenizer = load_decoder(args.heads, args.base_model, dtype="fp32")
    answers = read_answers(args.answers)
    if args.command == "record":
        problems = template_problems(tokenizer, prompts, answers)
        reached = measured(medusa, answers)
        if not problems:
            write_rows(args.floors, reached)
        print({key: value for key, value in reached.items() if key != "ranks"})
    else:
        problems = check(medusa, tokenizer, answers, json.loads(args.floors.read_text(encoding="utf-8")), prompts)
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

"""Data of a small fine-tune: an extraction task that is made here, or conversations of a file, tokenised into batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from axolotl_medusa.losses.targets import IGNORE_INDEX

PEOPLE = ("Maria Svensson", "Ahmed Rahimi", "Julia Novak", "Chiara Conti", "Ravi Menon", "Elena Petrova", "Noah Brandt")
GOODS = (
    "garden chairs",
    "tea cups",
    "desk lamps",
    "picture frames",
    "raincoats",
    "candles",
    "flower pots",
    "bath towels",
)
TOWNS = ("Bergen", "Porto", "Ghent", "Riga", "Graz", "Lyon", "Turku", "Bologna")
ORDERS = (
    "Hello, this is {name} from {town}. I'd like {count} {goods} at {price} euros each, please.",
    "{name} called and wants {count} {goods}, {price} euros a piece, delivered to {town}.",
    "Please send {count} {goods} to {name} in {town}. We agreed on {price} euros each.",
    "Order for {town}: {goods}, {count} of them, {price} euros each. The customer is {name}.",
)


class Batch(NamedTuple):
    """Conversations side by side, `[batch, tokens]` each: padded to the right, -100 where nothing is learnt."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def orders(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Makes conversations of the extraction task."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        values: dict[str, Any] = {
            "name": source.choice(PEOPLE),
            "town": source.choice(TOWNS),
            "goods": source.choice(GOODS),
            "count": source.randrange(2, 60),
            "price": source.randrange(3, 90),
        }
        answer = {
            "customer": values["name"],
            "ship_to": {"town": values["town"]},
            "lines": [{"article": values["goods"], "quantity": values["count"], "unit_price_eur": values["price"]}],
            "total_eur": values["count"] * values["price"],
        }
        question = source.choice(ORDERS).format(**values)
        found.append([{"role": "user", "content": question}, {"role": "assistant", "content": json.dumps(answer)}])
    return found


def read_conversations(path: Path) -> list[list[dict[str, str]]]:
    """Reads the `messages` of a JSONL file.

    Raises:
        ValueError: A row has none, or does not end with an answer.
    """
    found = [json.loads(line).get("messages") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, messages in enumerate(found, 1):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{path} row {number} has no 'messages' that end with an answer, expected both in every row"
            )
    return found


def batches_of(conversations: Sequence[list[dict[str, str]]], tokenizer: Any, size: int) -> list[Batch]:
    """Tokenises conversations, labels on their last answer and its end of turn."""
    rows = []
    for messages in conversations:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = [*tokenizer(messages[-1]["content"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((prompt_ids + answer_ids, [IGNORE_INDEX] * len(prompt_ids) + answer_ids))
    found = []
    for start in range(0, len(rows) - size + 1, size):
        chosen = rows[start : start + size]
        width = max(len(ids) for ids, _ in chosen)
        input_ids = [F.pad(torch.tensor(ids), (0, width - len(ids))) for ids, _ in chosen]
        mask = [F.pad(torch.ones(len(ids), dtype=torch.long), (0, width - len(ids))) for ids, _ in chosen]
        labels = [F.pad(torch.tensor(each), (0, width - len(each)), value=IGNORE_INDEX) for _, each in chosen]
        found.append(Batch(torch.stack(input_ids), torch.stack(mask), torch.stack(labels)))
    return found


def shuffled(batches: Sequence[Batch], steps: int, seed: int) -> Iterator[Batch]:
    """As many batches as there are steps, every epoch in a new order."""
    source, left = random.Random(seed), list[Batch]()
    for _ in range(steps):
        if not left:
            left = list(batches)
            source.shuffle(left)
        yield left.pop()

"""An ONNX directory, run and compared with torch.

Contract: what torch says is written down first, so that the model can leave memory before ONNX Runtime loads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.model.anatomy import backbone, causal_lm, logit_transform, output_embedding
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.onnx_decoding.directory import read_about
from axolotl_medusa.onnx_decoding.graph_names import MODEL_FILE, head_file
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.onnx_decoding.target import Array
from axolotl_medusa.onnx_decoding.tokenizer import LightTokenizer

NEW_TOKENS = 24
TOLERANCE = 1e-3
"""Largest accepted difference of fp32 logits, relative to the largest one: sums are taken in another order."""

_TEXTS = (
    "Name three things that float on water.",
    "The lighthouse keeper looked at the sea and",
    "def fibonacci(n):\n    ",
)
_PLACES = 8
"""Positions of a text whose logits are compared."""


@dataclass(frozen=True)
class Expected:
    """What torch says.

    Attributes:
        prompts: Token ids.
        tokens: Its greedy continuations.
        logits: At the last positions of prompt and continuation, `[places, V]` each.
        eos_token_ids: Tokens that end a text.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Array]
    eos_token_ids: list[int]


@torch.no_grad()
def expected_of(model: nn.Module, heads: MedusaHeads, tokenizer_files: Sequence[Path]) -> Expected:
    """Asks torch.

    Args:
        model: The model in fp32.
        heads: Its heads.
        tokenizer_files: The tokenizer's files; without a `tokenizer.json` the prompts are arbitrary tokens.
    """
    lm = causal_lm(model)
    eos = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    prompts, tokens, logits = _prompts(heads.vocab_size, tokenizer_files), [], []
    transform = logit_transform(lm.config)
    for prompt in prompts:
        plain = PlainDecoding(model, torch.tensor([prompt]), NEW_TOKENS, eos_token_ids)
        while not plain.done:
            plain.step()
        tokens.append(plain.tokens)
        hidden = backbone(model)(input_ids=torch.tensor([prompt + plain.tokens]), use_cache=False)[0]
        logits.append(transform(output_embedding(model)(hidden[0, -_PLACES:])).numpy())
    return Expected(prompts, tokens, logits, eos_token_ids)


def verify_onnx(directory: Path, expected: Expected) -> str:
    """Runs an ONNX directory.

    Returns:
        What was compared, as one line.

    Raises:
        ValueError: A graph is not valid ONNX, or in fp32 logits or tokens are not torch's; or a tree gives other tokens than
            plain decoding.
    """
    about = read_about(directory)
    checker = importlib.import_module("onnx").checker
    for name in (MODEL_FILE, *(head_file(head) for head in range(about.num_heads))):
        try:
            checker.check_model(str(directory / name))
        except checker.ValidationError as error:
            raise ValueError(f"{directory / name} is not valid ONNX: {error}; report it") from error
    model = OnnxMedusa.from_pretrained(directory)
    worst = max(_difference(model, expected, place) for place in range(len(expected.prompts)))
    exact = about.precision == "fp32"
    if exact and not worst <= TOLERANCE:
        raise ValueError(
            f"{directory} gives other logits than torch (they differ by {worst:.2g} of the largest, expected at most {TOLERANCE}): "
            "ONNX Runtime computes another model; do not use it"
        )
    trees = {"plain": Tree(), "a chain": chain(about.num_heads), "a tree": default_tree(about.num_heads, 16)}
    found = {name: _tokens(model, expected, tree) for name, tree in trees.items()}
    for name, tokens in found.items():
        reference = expected.tokens if exact else found["plain"]
        if exact and tokens != reference:
            raise ValueError(
                f"{directory} writes other greedy tokens with {name} than torch: {_first(tokens, reference)}; do not use it"
            )
    same = sum(tokens == other for tokens, other in zip(found["plain"], expected.tokens, strict=True))
    trees_same = sum(found["a tree"][row] == plain for row, plain in enumerate(found["plain"]))
    return (
        f"logits differ from torch's by {worst:.1g} of the largest; greedy text equal to torch's for {same} of "
        f"{len(expected.tokens)} prompts, with a tree equal to plain for {trees_same}"
    )


def _difference(model: OnnxMedusa, expected: Expected, place: int) -> float:
    """Largest difference of the logits, relative to the largest of torch's."""
    text = [*expected.prompts[place], *expected.tokens[place]]
    wanted = expected.logits[place]
    forward = model.forward(text, np.arange(len(text))[-len(wanted) :], all_logits=True)
    return float(np.abs(forward.logits[0] - wanted).max() / max(np.abs(wanted).max(), 1e-6))


def _tokens(model: OnnxMedusa, expected: Expected, tree: Tree) -> list[list[int]]:
    return [
        model.generate([prompt], NEW_TOKENS, tree=tree, eos_token_id=expected.eos_token_ids)[0][0]
        for prompt in expected.prompts
    ]


def _first(found: list[list[int]], expected: list[list[int]]) -> str:
    prompt = next(number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    return f"prompt {prompt}: {found[prompt][:8]}, expected {expected[prompt][:8]}"


def _prompts(vocab_size: int, tokenizer_files: Sequence[Path]) -> list[list[int]]:
    file = next((file for file in tokenizer_files if file.name == "tokenizer.json"), None)
    if file is None:
        return [[(7 * place + start) % vocab_size for place in range(9)] for start in (1, 2, 3)]
    tokenizer = LightTokenizer(file.parent)
    found = [tokenizer(text)["input_ids"] for text in _TEXTS]
    return [[token % vocab_size for token in ids] or [1 % vocab_size] for ids in found]

"""Evaluation of heads: accuracy, acceptance length, and speed against plain greedy decoding in the same run.

Contract: measures and returns a report that `json.dump` can write; reads and writes no files. Decoders take turns prompt
by prompt, each prompt starting with another one, and a speed-up is the median over prompts of the ratio to plain decoding
of that prompt.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from axolotl_medusa.cpu_instructions import cpu_name
from axolotl_medusa.decoding.loop import check_prompts
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.running_rows import GenerationStats
from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree
from axolotl_medusa.measuring.calibration import TOP_K, HeadRanks, head_ranks
from axolotl_medusa.measuring.onnx_runs import decode_onnx, onnx_head_ranks
from axolotl_medusa.measuring.step_times import timed
from axolotl_medusa.model.anatomy import causal_lm
from axolotl_medusa.model.heads_directory import package_version
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa

PLAIN = "plain"
"""The baseline's name among decoders."""

_VERSIONS_OF = ("axolotl-medusa", "transformers", "peft", "bitsandbytes")
_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class PromptTokens:
    """A prompt to evaluate on.

    Attributes:
        id: What errors call it.
        input_ids: Its tokens.
        category: What it is about, None if nobody said.
    """

    id: str
    input_ids: list[int]
    category: str | None = None


@dataclass(frozen=True)
class Decoded:
    """One prompt, decoded once.

    Attributes:
        tokens: New tokens.
        seconds: Wall-clock time, the prompt's forward included.
        stats: Forwards and accepted lengths.
    """

    tokens: list[int]
    seconds: float
    stats: GenerationStats

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds


@dataclass
class _Group:
    """Results of the prompts of one category, or of all; `runs` by decoder, in the prompts' order."""

    ranks: HeadRanks
    runs: dict[str, list[Decoded]] = field(default_factory=dict)


def evaluate(
    model: MedusaModel | OnnxMedusa,
    prompts: Sequence[PromptTokens],
    trees: Mapping[str, Tree],
    max_new_tokens: int = 128,
    compile: bool = False,
) -> dict[str, Any]:
    """Evaluates heads on prompts.

    Args:
        model: The model with its heads.
        prompts: Prompts; each is decoded alone.
        trees: Candidate trees by name; plain decoding is added as `plain`.
        max_new_tokens: Tokens per prompt at most.
        compile: Whether the trees' forwards are compiled; plain decoding never is.

    Returns:
        `overall` and `categories`, each group with `prompts`, `heads` (top-1 to top-5 accuracy on the plain continuations,
        and the positions behind it) and `decoders`: tokens, forwards, acceptance length, how often a step emitted 1, 2, ...
        tokens, tokens/s, speed-up, and agreement with the plain output. `trees` has the choices.

    Raises:
        ValueError: There are no prompts, or one does not fit the model's context.
    """
    check_fits(model, prompts, max_new_tokens)
    top_k = min(DEFAULT_TOP_K, model.heads.vocab_size)
    groups: dict[str | None, _Group] = {}
    for number, prompt in enumerate(prompts):
        runs = decode_in_turn(model, prompt.input_ids, trees, max_new_tokens, first=number, compile=compile)
        plain = runs[PLAIN].tokens
        ranks = (
            onnx_head_ranks(model, prompt.input_ids, plain, top_k)
            if isinstance(model, OnnxMedusa)
            else head_ranks(model, prompt.input_ids, plain, top_k)
        )
        for category in {None, prompt.category}:
            group = groups.setdefault(category, _Group(HeadRanks(model.heads.num_heads, top_k)))
            group.ranks.add(ranks, ended=len(plain) < max_new_tokens)
            for name, run in runs.items():
                group.runs.setdefault(name, []).append(run)
    overall = groups.pop(None)
    return {
        "trees": {name: [list(choice) for choice in tree.choices] for name, tree in trees.items()},
        "max_new_tokens": max_new_tokens,
        "compiled": compile,
        "overall": _summary(overall),
        "categories": {
            str(name): _summary(group) for name, group in sorted(groups.items(), key=lambda item: str(item[0]))
        },
    }


def check_fits(model: MedusaModel | OnnxMedusa, prompts: Sequence[PromptTokens], max_new_tokens: int) -> None:
    """Checks all prompts before the first forward.

    Raises:
        ValueError: There are none, or one is empty or does not fit the model's context; it is named.
    """
    if not prompts:
        raise ValueError("there are 0 prompts, expected at least 1")
    for prompt in prompts:
        input_ids = torch.tensor([prompt.input_ids], dtype=torch.long)
        try:
            check_prompts(input_ids, torch.ones_like(input_ids), max_new_tokens, model.context)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id}: {error}") from error


@torch.no_grad()
def decode_in_turn(
    model: MedusaModel | OnnxMedusa,
    prompt: Sequence[int],
    trees: Mapping[str, Tree],
    max_new_tokens: int,
    first: int = 0,
    compile: bool = False,
) -> dict[str, Decoded]:
    """Decodes one prompt plainly and with every tree, one after the other.

    Args:
        model: The model with its heads.
        prompt: The prompt's tokens.
        trees: Candidate trees by name.
        max_new_tokens: Tokens to write at most.
        first: Which decoder begins, counted round; every one is run shortly before when it is 0, to warm up.
        compile: Whether the trees' forwards are compiled; then every prompt is run shortly before, since a longer one may
            need another compiled forward.
    """
    names = [PLAIN, *trees]

    def run(name: str, steps: int | None = None) -> Decoded:
        return _decode(model, prompt, trees.get(name), max_new_tokens, compile, steps)

    if first == 0 or compile:
        for name in names:
            run(name, _WARM_UP_STEPS)
    start = first % len(names)
    runs = {name: run(name) for name in names[start:] + names[:start]}
    return {name: runs[name] for name in names}


def _decode(
    model: MedusaModel | OnnxMedusa,
    prompt: Sequence[int],
    tree: Tree | None,
    max_new_tokens: int,
    compile: bool,
    steps: int | None,
) -> Decoded:
    """Decodes a prompt greedily, plainly where `tree` is None; `steps` ends it early."""
    if isinstance(model, OnnxMedusa):
        return Decoded(*decode_onnx(model, prompt, tree, max_new_tokens, steps))
    input_ids = torch.tensor([list(prompt)], device=causal_lm(model.base_model).get_input_embeddings().weight.device)
    if tree is None:
        plain = PlainDecoding(model.base_model, input_ids, max_new_tokens, model.eos_token_ids)

        def run_plain() -> None:
            while not plain.done and len(plain.tokens) != steps:
                plain.step()

        seconds = timed(run_plain, input_ids)
        tokens = len(plain.tokens)
        return Decoded(plain.tokens, seconds, GenerationStats(tokens, tokens, tokens, Counter({1: tokens - 1})))
    decoding = model.greedy_decoding(input_ids, tree, max_new_tokens, model.eos_token_ids, compile)

    def run() -> None:
        while decoding.rows and decoding.stats.batch_forwards != steps:
            decoding.step()

    seconds = timed(run, input_ids)
    return Decoded(decoding.tokens[0], seconds, decoding.stats)


def _summary(group: _Group) -> dict[str, Any]:
    plain = group.runs[PLAIN]
    heads = [
        {
            "head": head,
            "positions": group.ranks.positions(head),
            "top": {str(top): group.ranks.accuracy(head, top) for top in range(1, min(TOP_K, group.ranks.top_k) + 1)},
        }
        for head in range(group.ranks.num_heads)
    ]
    decoders = {name: _decoder_summary(runs, plain) for name, runs in group.runs.items()}
    return {"prompts": len(plain), "heads": heads, "decoders": decoders}


def _decoder_summary(runs: Sequence[Decoded], plain: Sequence[Decoded]) -> dict[str, Any]:
    pairs = list(zip(runs, plain, strict=True))
    tokens, forwards = sum(len(run.tokens) for run in runs), sum(run.stats.forward_passes for run in runs)
    lengths = sum((run.stats.acceptance_lengths for run in runs), start=Counter[int]())
    same_tokens = sum(_common_prefix(run.tokens, base.tokens) for run, base in pairs)
    return {
        "tokens": tokens,
        "forward_passes": forwards,
        "acceptance_length": tokens / forwards,
        "step_lengths": {str(length): count for length, count in sorted(lengths.items())},
        "seconds": sum(run.seconds for run in runs),
        "tokens_per_s": tokens / sum(run.seconds for run in runs),
        "speed_up": statistics.median(run.tokens_per_s / base.tokens_per_s for run, base in pairs),
        "agreement": sum(run.tokens == base.tokens for run, base in pairs) / len(pairs),
        "agreement_before_first_difference": same_tokens / sum(len(base.tokens) for base in plain),
    }


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def environment(model: MedusaModel) -> dict[str, Any]:
    """Versions, hardware and types that a measurement depends on."""
    lm = causal_lm(model.base_model)
    weight = lm.get_input_embeddings().weight
    cuda = weight.is_cuda
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
        }
        | {name: package_version(name) for name in _VERSIONS_OF},
        "hardware": {
            "device": torch.cuda.get_device_name(weight.device) if cuda else (cpu_name() or platform.machine()),
            "device_type": weight.device.type,
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "model": {
            "type": type(lm).__name__,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "attention": lm.config.get_text_config()._attn_implementation,
            "quantized": bool(getattr(lm, "is_quantized", False)),
            "parameters": sum(parameter.numel() for parameter in lm.parameters()),
            "num_heads": model.heads.num_heads,
            "heads_form": model.heads.form,
        },
        "seed": torch.initial_seed(),
    }

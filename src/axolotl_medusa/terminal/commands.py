"""What the commands `evaluate`, `tree`, `generate`, `chat` and `demo` do once their arguments are parsed.

Contract: reads and writes the files that the arguments name, calls the package, prints for a user.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any, Literal

import torch

from axolotl_medusa.decoding.load_decoder import find_original, load_decoder, load_original
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import DEFAULT_TOP_K, Tree, chain, default_tree, write_tree
from axolotl_medusa.decoding.tree_chooser import AUTO, PLAIN, why_plain
from axolotl_medusa.measuring.draft_outcomes import Outcomes, outcomes_of
from axolotl_medusa.measuring.evaluate import PromptTokens, check_fits, environment, evaluate
from axolotl_medusa.measuring.plots import PLOTS, check_matplotlib, check_plots, write_plots
from axolotl_medusa.measuring.quality import check_texts, compare_models
from axolotl_medusa.measuring.step_times import SIZES, StepTimes, measure_steps
from axolotl_medusa.measuring.tree_tuning import TunedTree, tune_tree
from axolotl_medusa.model.anatomy import causal_lm
from axolotl_medusa.terminal.chat import Answerer, Chat
from axolotl_medusa.terminal.outputs import check_json_output
from axolotl_medusa.terminal.prompts import Prompt, conversation_tokens, prompt_tokens, read_prompts
from axolotl_medusa.terminal.race import race
from axolotl_medusa.terminal.reports import print_report, write_report


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluates heads on a prompts file, prints a summary, and writes the report and its plots where asked to."""
    if options.plots:
        check_matplotlib()
        check_plots(options.plots, PLOTS)
    if options.json:
        check_json_output(options.json, {"heads", "prompts_file", "overall"}, "--json")
    prompts = read_prompts(options.prompts, options.limit)
    held_out = read_prompts(options.held_out) if options.held_out else []
    if held_out:
        find_original(
            options.heads, options.base_model, options.original
        )  # what is missing is said before all the rest
    model, tokenizer = load_heads(options)
    texts = [conversation_tokens(tokenizer, row) for row in held_out]
    if held_out:
        check_texts(texts)
    if options.compile:
        model.compiled()  # refuses what cannot be compiled before anything is measured
    torch.manual_seed(options.seed)
    tokens = [PromptTokens(row.id, prompt_tokens(tokenizer, row), row.category) for row in prompts]
    trees = {"chain": chain(model.heads.num_heads), "tree": model.tree(options.tree)}
    report = {"heads": str(options.heads), "prompts_file": str(options.prompts), **environment(model)}
    report |= evaluate(model, tokens, trees, options.max_new_tokens, options.compile)
    times = _step_times(model, tokens, options.compile)
    report["steps"] = dataclasses.asdict(times)
    print_report(report, times)
    write_report(report, options.json)
    if options.json:
        print(f"report: {options.json}")
    if held_out:
        device = causal_lm(model.base_model).get_input_embeddings().weight.device
        trust = options.trust_remote_code
        original = load_original(options.heads, options.base_model, options.original, device, trust_remote_code=trust)
        quality = compare_models(model.base_model, original, texts)
        report["quality"] = dataclasses.asdict(quality)
        write_report(report, options.json)
        print(
            f"model on {quality.tokens} held-out tokens: perplexity {quality.perplexity:.3f}, original "
            f"{quality.original_perplexity:.3f}, KL(original || trained) {quality.kl:.5f}"
        )
    for file in write_plots(report, options.plots) if options.plots else ():
        print(f"plot: {file}")


def _step_times(model: MedusaModel, prompts: list[PromptTokens], compile: bool) -> StepTimes:
    """Steps with default trees of all `SIZES` that the heads can fill, after the prompt of median length."""
    top_k = min(DEFAULT_TOP_K, model.heads.vocab_size)
    trees = [default_tree(model.heads.num_heads, nodes, top_k) for nodes in SIZES]
    middle = sorted(prompts, key=lambda prompt: len(prompt.input_ids))[len(prompts) // 2]
    return measure_steps(model, middle.input_ids, trees, compile=compile)


def run_tree(options: argparse.Namespace) -> None:
    """Searches the fastest tree and writes it."""
    check_json_output(options.out, {"choices", "num_nodes", "calibration"}, "--out")
    prompts = read_prompts(options.calibration, options.limit)
    model, tokenizer = load_heads(options)
    tokens = [PromptTokens(row.id, prompt_tokens(tokenizer, row), row.category) for row in prompts]
    tuned = tune_tree(model, tokens, options.nodes, options.max_new_tokens)
    facts = {"heads": str(options.heads), "calibration": str(options.calibration), **environment(model)}
    write_tree(options.out, tuned.tree, **facts, **tuned.facts())
    _print_tuned(tuned)
    print(f"written to {options.out}: {tuned.tree.num_nodes} nodes, depth {tuned.tree.depth}")


def _print_tuned(tuned: TunedTree) -> None:
    print("nodes  expected acceptance length  step / plain step")
    for nodes, length in enumerate(tuned.search.expected_lengths, 1):
        ratio = tuned.times.ratios.get(nodes)
        print(f"{nodes:5}  {length:26.3f}  {'' if ratio is None else f'{ratio:17.3f}'}".rstrip())
    for reason in tuned.reasons:
        print(reason)
    for nodes, speed_up in tuned.speed_ups.items():
        where = f"{len(tuned.checked_on)} held-out prompts (chosen with {tuned.calibrated_on} others)"
        print(f"{nodes} nodes measured: {speed_up:.3f} x plain on {where}")


def measured_outcomes(options: argparse.Namespace) -> tuple[Outcomes, dict[str, Any]]:
    """What becomes of the heads' drafts on greedy answers to the prompts, and what they were measured on."""
    prompts = read_prompts(options.prompts, options.limit)
    model, tokenizer = load_heads(options)
    tokens = [PromptTokens(row.id, prompt_tokens(tokenizer, row), row.category) for row in prompts]
    outcomes = outcomes_of(model, tokens, options.max_new_tokens)
    if not outcomes[0]:
        raise ValueError(f"the answers to {options.prompts} are too short to count drafts in: give other prompts")
    return outcomes, {"prompts_file": str(options.prompts), "prompts": len(prompts), "temperature": 0.0}


def run_generate(options: argparse.Namespace) -> None:
    """Prints an answer while it is written; what it took goes to stderr."""
    model, tokenizer = load_heads(options)
    _, speed = _answerer(options, model, tokenizer).answer([{"role": "user", "content": options.prompt}])
    print(f"[{speed}]", file=sys.stderr)


def run_chat(options: argparse.Namespace) -> None:
    """Talks in the terminal."""
    model, tokenizer = load_heads(options)
    answerer = _answerer(options, model, tokenizer)
    answerer.colour = sys.stdout.isatty()
    Chat(answerer, input).run()


def run_demo(options: argparse.Namespace) -> None:
    """Decodes a prompt plainly and with the heads, beside each other."""
    model, tokenizer = load_heads(options)
    tokens = prompt_tokens(tokenizer, Prompt("given", ({"role": "user", "content": options.prompt},)))
    check_fits(model, [PromptTokens("given", tokens)], options.max_new_tokens)
    tree = _answering_tree(options, model)
    race(model, tokenizer, tokens, tree, options.max_new_tokens, sys.stdout, options.compile)


def _answerer(options: argparse.Namespace, model: MedusaModel, tokenizer: Any) -> Answerer:
    return Answerer(
        model,
        tokenizer,
        _answering_tree(options, model),
        options.temperature,
        options.max_new_tokens,
        sys.stdout,
        compile=options.compile,
    )


def _answering_tree(options: argparse.Namespace, model: MedusaModel) -> Tree | Literal["auto"]:
    """The tree that answers are decoded with."""
    if options.tree != AUTO:
        return model.tree(options.tree)
    if line := why_plain(1, options.compile):
        print(f"[{line}]", file=sys.stderr)
        return PLAIN
    return AUTO


def load_heads(options: argparse.Namespace) -> tuple[MedusaModel, Any]:
    """The model with its heads and its tokenizer, as the options of a command name them."""
    return load_decoder(
        options.heads,
        options.base_model,
        dtype=options.dtype,
        load_in_8bit=options.load_in_8bit,
        load_in_4bit=options.load_in_4bit,
        trust_remote_code=options.trust_remote_code,
    )

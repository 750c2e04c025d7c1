"""What the decoding commands do with an ONNX directory.

Contract: as `terminal.commands`, but imports neither torch nor transformers; `evaluate` does, when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any, Literal

from axolotl_medusa.decoding.running_rows import check_lengths
from axolotl_medusa.decoding.tree import Tree, chain, write_tree
from axolotl_medusa.decoding.tree_chooser import AUTO
from axolotl_medusa.measuring.onnx_tuning import ROUNDS, measure_onnx_steps, tune_onnx_tree
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.onnx_decoding.tokenizer import LightTokenizer
from axolotl_medusa.terminal.chat import Answerer, Chat
from axolotl_medusa.terminal.outputs import check_json_output
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts
from axolotl_medusa.terminal.reports import print_report, write_report

_OF_TORCH = {
    "base_model": "--base-model",
    "load_in_8bit": "--load-in-8bit",
    "load_in_4bit": "--load-in-4bit",
    "trust_remote_code": "--trust-remote-code",
    "compile": "--compile",
}


def run_generate(options: argparse.Namespace) -> None:
    """Prints an answer while it is written; what it took goes to stderr."""
    _, speed = _answerer(options).answer([{"role": "user", "content": options.prompt}])
    print(f"[{speed}]", file=sys.stderr)


def run_chat(options: argparse.Namespace) -> None:
    """Talks in the terminal."""
    answerer = _answerer(options)
    answerer.colour = sys.stdout.isatty()
    Chat(answerer, input).run()


def run_tree(options: argparse.Namespace) -> None:
    """Searches the fastest tree and how sure its drafts must be, and writes both."""
    check_json_output(options.out, {"choices", "num_nodes", "calibration"}, "--out")
    rows = read_prompts(options.calibration, options.limit)
    model, tokenizer = load_onnx(options)
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    check_lengths([len(prompt) for prompt in prompts], options.max_new_tokens, model.context)
    tuned = tune_onnx_tree(model, prompts, options.nodes, options.max_new_tokens)
    facts = {"heads": str(options.heads), "calibration": str(options.calibration), "runtime": model.environment()}
    write_tree(options.out, tuned.tree, **facts, **tuned.facts())
    ratios = ", ".join(f"{nodes}: {ratio:.2f}" for nodes, ratio in tuned.times.ratios.items())
    print(
        f"a step by nodes, in plain steps of {tuned.times.plain_s * 1000:.1f} ms: {ratios}; a head {tuned.times.head_ratio:.3f}"
    )
    print(tuned.reason)
    if tuned.measured_speed_up is not None:
        print(f"measured on held-out prompts: {tuned.measured_speed_up:.3f} x plain")
    print(f"written to {options.out}: {tuned.tree.num_nodes} nodes, depth {tuned.tree.depth}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluates heads on a prompts file, prints a summary, and writes the report where asked to; this needs torch."""
    from axolotl_medusa.measuring.evaluate import PromptTokens, evaluate
    from axolotl_medusa.measuring.step_times import StepTimes

    for flag in ("held_out", "plots", "original"):
        if getattr(options, flag):
            name = f"--{flag.replace('_', '-')}"
            raise ValueError(
                f"{name} with the ONNX directory {options.heads}: give the heads themselves, or leave it out"
            )
    if options.json:
        check_json_output(options.json, {"heads", "prompts_file", "overall"}, "--json")
    rows = read_prompts(options.prompts, options.limit)
    model, tokenizer = load_onnx(options)
    prompts = [PromptTokens(row.id, prompt_tokens(tokenizer, row), row.category) for row in rows]
    trees = {"chain": chain(model.heads.num_heads), "tree": model.tree(options.tree)}
    facts = model.environment()
    report = {
        "heads": str(options.heads),
        "prompts_file": str(options.prompts),
        "versions": {"onnxruntime": facts["onnxruntime"]},
        "hardware": {"device": facts["device"], "cpu_cores": facts["cores"], "threads": facts["cores"]},
        "model": {"type": "ONNX", "dtype": facts["precision"]},
        **evaluate(model, prompts, trees, options.max_new_tokens),
    }
    measured = measure_onnx_steps(
        model, sorted(prompts, key=lambda prompt: len(prompt.input_ids))[len(prompts) // 2].input_ids
    )
    times = StepTimes(measured.plain_s, measured.ratios, len(prompts), ROUNDS)
    report["steps"] = {**dataclasses.asdict(measured), "rounds": ROUNDS}
    print_report(report, times)
    write_report(report, options.json)
    if options.json:
        print(f"report: {options.json}")


def run_demo(options: argparse.Namespace) -> None:
    """Refuses: the race is between decoders of torch.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{options.heads} is an ONNX directory, which demo does not take: use generate, chat or evaluate")


def load_onnx(options: argparse.Namespace) -> tuple[OnnxMedusa, Any]:
    """Opens the directory that the arguments name, and its tokenizer.

    Raises:
        ValueError: It is damaged, or arguments are for torch alone.
    """
    if unfit := next((flag for name, flag in _OF_TORCH.items() if getattr(options, name, None)), None):
        raise ValueError(
            f"{unfit} with the ONNX directory {options.heads}, which holds its own model: leave {unfit} out"
        )
    if options.dtype != "auto":
        raise ValueError(
            f"--dtype {options.dtype} with the ONNX directory {options.heads}, whose type was chosen when it was exported: "
            "leave it out, or export with another --precision"
        )
    model = OnnxMedusa.from_pretrained(options.heads, options.provider or "cpu")
    return model, LightTokenizer(options.heads)


def _answerer(options: argparse.Namespace) -> Answerer:
    model, tokenizer = load_onnx(options)
    tree: Tree | Literal["auto"] = AUTO if options.tree == AUTO else model.tree(options.tree)
    return Answerer(model, tokenizer, tree, options.temperature, options.max_new_tokens, sys.stdout)

"""The `axolotl-medusa` command, which is `axolotl medusa` too where axolotl takes commands of others.

Contract: parses arguments, calls one function of the package, and turns its errors into one line. A command is a
function that adds its arguments and one that runs it, both named in `COMMANDS`; what it needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from axolotl_medusa.model.sources import Source

DEMO_PROMPT = "Write a short story about a salamander that keeps a lighthouse."

ONNX = "onnx"
"""What `export --to` takes beside the servers' formats."""

_PRECISIONS = ("fp32", "int8", "int4")

_MODELS = ("none", "merged")
"""What `export --model` takes, and `--backbone`, its earlier name."""

_NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": " is an Enum subclass "}
"""By logger what is said in every process where torchao is installed, whether it is used or not: its optional kernels for
other GPUs, and its own use of torch."""


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        summary: What it does, for `--help`.
        add_arguments: Adds its arguments to its parser.
        run: Does it with the parsed arguments; ValueError, OSError and RuntimeError are the user's to read.
        passes_on: Whether arguments that its parser does not know are another program's; they are in `others`.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    passes_on: bool = False


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.serving.format_rules import TARGETS

    parser.add_argument("source", metavar="OUTPUT_DIR", help="an output_dir, a checkpoint in it, or a medusa_heads")
    targets = [*TARGETS, ONNX]
    parser.add_argument("--to", required=True, choices=targets, metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; new, empty, or an earlier export")
    parser.add_argument("--base-model", metavar="M", help="directory or Hub name; by default what training wrote down")
    parser.add_argument(
        "--model",
        choices=_MODELS,
        default="none",
        help="merged: also write the model that Medusa-2 trained, with its adapter merged (default: none)",
    )
    parser.add_argument("--backbone", dest="model", choices=_MODELS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--no-verify", action="store_true", help="do not read the export back and compare its logits")
    parser.add_argument("--precision", choices=_PRECISIONS, help="onnx: of the model's matrices (default: fp32)")
    parser.add_argument(
        "--heads-precision",
        choices=_PRECISIONS,
        help="onnx: of the heads' output layers; changes speed, never the text (default: int8, int4 in a quantized model)",
    )


def _export(options: argparse.Namespace) -> None:
    from axolotl_medusa.model.sources import find_source
    from axolotl_medusa.serving.export import export

    source = find_source(options.source, options.base_model)
    if options.to == ONNX:
        _export_onnx(options, source)
        return
    if options.precision or options.heads_precision:
        raise ValueError(
            f"--precision and --heads-precision are for --to {ONNX}: leave them out with --to {options.to}"
        )
    export(source, options.to, options.out, model=options.model, verify=not options.no_verify)
    print(f"written to {options.out}; its README.md has the command that serves it")


def _export_onnx(options: argparse.Namespace, source: Source) -> None:
    from axolotl_medusa.onnx_export.card import try_it
    from axolotl_medusa.onnx_export.export import export_onnx

    found = export_onnx(
        source, options.out, options.precision or "fp32", options.heads_precision, verify=not options.no_verify
    )
    if found:
        print(found)
    print(f"written to {options.out}; try it:\n    {try_it(options.out)}")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DIR", help="heads in the format of FasterDecoding, TGI, LoRAX, vLLM, ...")
    parser.add_argument("--to", required=True, choices=("canonical",), help="canonical: what training writes")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; new, empty, or earlier heads")
    parser.add_argument(
        "--base-model", metavar="M", help="directory or Hub name; by default what the heads' config says"
    )


def _import(options: argparse.Namespace) -> None:
    from axolotl_medusa.serving.import_heads import import_heads

    for note in import_heads(options.source, options.out, options.base_model):
        print(note)
    print(f"written to {options.out}")


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="what `axolotl-medusa export` wrote")
    parser.add_argument("--repo", required=True, metavar="NAME", help="model repository, owner/name")
    parser.add_argument("--private", action="store_true", help="create it as a private one")


def _push(options: argparse.Namespace) -> None:
    from axolotl_medusa.serving.push import push

    print(push(options.directory, options.repo, private=options.private))


def _decoding_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """What all commands that decode have in common."""
    parser.add_argument(
        "heads", metavar="HEADS", help="an output_dir, a checkpoint in it, a medusa_heads, or an ONNX export"
    )
    parser.add_argument("--base-model", metavar="M", help="directory or Hub name; by default what training wrote down")
    parser.add_argument(
        "--provider", choices=("cpu", "cuda", "openvino"), help="of an ONNX export: what runs it (default: cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the model (default: auto, as it is stored, but fp32 for bf16 on a CPU without instructions for it)",
    )
    eight = (
        "hold the model in 8-bit (needs bitsandbytes); without its outlier threshold, whose text depends on the batch"
    )
    parser.add_argument("--load-in-8bit", action="store_true", help=eight)
    parser.add_argument("--load-in-4bit", action="store_true", help="hold the model in 4-bit (needs bitsandbytes)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a model brings (default: no)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"per answer (default: {max_new_tokens})",
    )


def _tree_argument(parser: argparse.ArgumentParser, *, chooses: bool = True) -> None:
    auto = "auto (tries trees now and then and takes what is fastest, plain decoding too), " if chooses else ""
    trees = "none, chain, chain-N, default, default-N, or a file of `axolotl-medusa tree`"
    help_ = f"{auto}{trees} (default: {'auto' if chooses else 'default'})"
    parser.add_argument("--tree", default="auto" if chooses else None, metavar="T", help=help_)


def _compile_argument(parser: argparse.ArgumentParser) -> None:
    help_ = "compile the forward that verifies a tree; begins slowly (needs a C++ compiler; CUDA graphs on a GPU)"
    parser.add_argument("--compile", action="store_true", help=help_)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _decoding_arguments(parser, max_new_tokens=128)
    _tree_argument(parser, chooses=False)
    _compile_argument(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL: id, prompt or messages, category")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")
    parser.add_argument("--json", metavar="OUT", help="write the whole report here")
    parser.add_argument("--plots", metavar="DIR", help="draw PNG files here (needs matplotlib)")
    parser.add_argument(
        "--held-out", metavar="FILE", help="JSONL of conversations: perplexity and KL of the model and the original"
    )
    parser.add_argument(
        "--original", metavar="M", help="the model before Medusa-2; by default what training wrote down"
    )
    parser.add_argument("--seed", type=int, default=0, help="of torch (default: 0); decoding is greedy")


def _evaluate(options: argparse.Namespace) -> None:
    _decoding_commands(options).run_evaluate(options)


def _tree_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.decoding.tree import DEFAULT_NODES

    _decoding_arguments(parser, max_new_tokens=128)
    parser.add_argument("--calibration", required=True, metavar="FILE", help="JSONL: id, prompt or messages")
    parser.add_argument(
        "--nodes", type=int, default=DEFAULT_NODES, metavar="N", help=f"at most (default: {DEFAULT_NODES})"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the tree, for --tree")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")


def _tree(options: argparse.Namespace) -> None:
    _decoding_commands(options).run_tree(options)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    _decoding_arguments(parser, max_new_tokens=128)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL: id, prompt or messages")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")


def _calibrate(options: argparse.Namespace) -> None:
    from axolotl_medusa.model.sources import find_source
    from axolotl_medusa.serving.draft_plan import calibrate, write_plan
    from axolotl_medusa.terminal.commands import measured_outcomes

    outcomes, facts = measured_outcomes(options)
    calibration = calibrate(outcomes, **facts)
    for head, own in enumerate(outcomes):
        accepted = f"{sum(good for _, good in own) / len(own):.3f} accepted" if own else "none"
        print(f"head {head}: {len(own)} drafts after accepted ones, {accepted}")
    for file in write_plan(find_source(options.heads, options.base_model).heads_dir, calibration=calibration):
        print(f"written to {file}")


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    _decoding_arguments(parser, max_new_tokens=512)
    _tree_argument(parser)
    _compile_argument(parser)
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: greedy; above: exact sampling (default: 0)"
    )


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _answer_arguments(parser)
    parser.add_argument("--prompt", required=True, help="a user's turn; text to continue if there is no chat template")


def _generate(options: argparse.Namespace) -> None:
    _decoding_commands(options).run_generate(options)


def _chat(options: argparse.Namespace) -> None:
    _decoding_commands(options).run_chat(options)


def _decoding_commands(options: argparse.Namespace) -> ModuleType:
    """The module that decodes what HEADS is; that of ONNX directories imports no torch."""
    from axolotl_medusa.onnx_decoding.directory import is_onnx_directory

    if is_onnx_directory(options.heads):
        return importlib.import_module("axolotl_medusa.terminal.onnx_commands")
    if options.provider:
        raise ValueError(f"--provider is for ONNX directories, {options.heads} is none: leave it out")
    return importlib.import_module("axolotl_medusa.terminal.commands")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _decoding_arguments(parser, max_new_tokens=128)
    _tree_argument(parser)
    _compile_argument(parser)
    parser.add_argument("--prompt", default=DEMO_PROMPT, help=f"a user's turn (default: {DEMO_PROMPT})")


def _demo(options: argparse.Namespace) -> None:
    _decoding_commands(options).run_demo(options)


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="what training writes to, or a checkpoint in it")
    parser.add_argument("--out", metavar="DIR", help="where to draw PNG files (default: OUTPUT_DIR; needs matplotlib)")


def _plot(options: argparse.Namespace) -> None:
    from axolotl_medusa.measuring.training_plots import write_training_plots

    for file in write_training_plots(options.output_dir, options.out or options.output_dir):
        print(f"plot: {file}")


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.recipes.command import add_arguments

    add_arguments(parser)


def _recipe(options: argparse.Namespace) -> None:
    from axolotl_medusa.recipes.command import run

    run(options)


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "yaml", metavar="X.yml", help="the YAML of a training; its model's config is here or in the Hub's cache"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    parser.add_argument("--engine", metavar="E", help="ddp, zero-1, zero-2, zero-3 or fsdp2 (default: the YAML's)")
    parser.add_argument("--cpu", action="store_true", help="it trains on CPUs, in processes instead of GPUs")
    parser.add_argument(
        "--gpu-gib", type=float, metavar="G", help="memory of a GPU: says what to change if it does not fit"
    )
    parser.add_argument(
        "--tokens-per-s", type=float, metavar="R", help="of one GPU: says how long a million tokens take"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")


def _estimate(options: argparse.Namespace) -> None:
    import json

    from axolotl_medusa.estimating.plan import yaml_of
    from axolotl_medusa.estimating.report import estimate, text_of

    found = estimate(
        yaml_of(options.yaml),
        gpus=options.gpus,
        engine=options.engine,
        device="cpu" if options.cpu else "gpu",
        gpu_gib=options.gpu_gib,
        tokens_per_s=options.tokens_per_s,
    )
    print(json.dumps(found.to_json(), indent=2) if options.json else text_of(found))


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.terminal.server_arguments import serve_arguments

    serve_arguments(parser)


def _serve(options: argparse.Namespace) -> None:
    from axolotl_medusa.terminal.server_commands import run_serve

    run_serve(options)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.terminal.server_arguments import plan_arguments

    plan_arguments(parser)


def _plan(options: argparse.Namespace) -> None:
    from axolotl_medusa.terminal.plan_command import run_plan

    run_plan(options)


def _check_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="address of a vLLM server, with or without /v1; nobody else asks it")
    _decoding_arguments(parser, max_new_tokens=64)
    parser.add_argument("--prompts", metavar="FILE", help="JSONL: id, prompt or messages (default: 16 of our own)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")


def _check_server(options: argparse.Namespace) -> None:
    from axolotl_medusa.terminal.server_commands import run_check_server

    run_check_server(options)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.doctor.command import add_arguments

    add_arguments(parser)


def _doctor(options: argparse.Namespace) -> None:
    from axolotl_medusa.doctor.command import run

    run(options)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.reporting.command import add_arguments

    add_arguments(parser)


def _report(options: argparse.Namespace) -> None:
    from axolotl_medusa.reporting.command import run

    run(options)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    from axolotl_medusa.terminal.completion import SHELLS

    parser.add_argument("shell", choices=SHELLS, help="the shell that shall complete the command; prints its script")


def _completion(options: argparse.Namespace) -> None:
    from axolotl_medusa.terminal.completion import completion_script, described

    commands = {name: described(command.summary, command.add_arguments) for name, command in COMMANDS.items()}
    print(completion_script(options.shell, commands), end="")


COMMANDS = {
    "recipe": Command("write the YAML for a model of yours, and the commands around it", _recipe_arguments, _recipe),
    "estimate": Command(
        "compute memory and time of a training before anything is loaded", _estimate_arguments, _estimate
    ),
    "export": Command("write trained heads in the format of a server", _export_arguments, _export),
    "import": Command("turn published heads into what training writes", _import_arguments, _import),
    "push": Command("upload an export to the Hugging Face Hub", _push_arguments, _push),
    "evaluate": Command("measure accuracy, acceptance length and speed of heads", _evaluate_arguments, _evaluate),
    "tree": Command("find the candidate tree that is fastest on this machine", _tree_arguments, _tree),
    "calibrate": Command(
        "count how often drafts of what probability are accepted, for serving as many as pay",
        _calibrate_arguments,
        _calibrate,
    ),
    "generate": Command("answer a prompt with Medusa decoding", _generate_arguments, _generate),
    "chat": Command("chat in the terminal with Medusa decoding", _answer_arguments, _chat),
    "demo": Command("show plain and Medusa decoding of a prompt beside each other", _demo_arguments, _demo),
    "serve": Command(
        "serve heads with vLLM; options that are not listed here are vLLM's own, such as --port",
        _serve_arguments,
        _serve,
        passes_on=True,
    ),
    "plan": Command(
        "measure a server by load, with and without heads; options that are not listed here are vLLM's own",
        _plan_arguments,
        _plan,
        passes_on=True,
    ),
    "check-server": Command(
        "say why a server accepts less than the heads allow", _check_server_arguments, _check_server
    ),
    "doctor": Command(
        "say what is installed, what is missing for what, and whether heads fit their model", _doctor_arguments, _doctor
    ),
    "plot": Command("draw losses and accuracies of a training run", _plot_arguments, _plot),
    "report": Command(
        "write one HTML page with what a run logged and what was measured with its heads", _report_arguments, _report
    ),
    "completion": Command("print a script that lets a shell complete this command", _completion_arguments, _completion),
}


def main(argv: Sequence[str] | None = None, prog: str = "axolotl-medusa") -> int:
    """Runs the command.

    Args:
        argv: Arguments, by default those of the process.
        prog: What the user typed before them.

    Returns:
        The exit status: 0, 1 after an error, 130 after an interrupt. Wrong usage exits with 2.
    """
    from axolotl_medusa import __version__
    from axolotl_medusa.terminal.help_texts import EXAMPLES, exit_statuses

    description = "Medusa heads: from training to a server."
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=exit_statuses())
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        example = f"example: {prog} {name} {EXAMPLES[name]}" if name in EXAMPLES else None
        command.add_arguments(
            subparsers.add_parser(
                name,
                help=command.summary,
                description=command.summary,
                epilog=example,
                allow_abbrev=not command.passes_on,
            )
        )
    options, others = parser.parse_known_args(argv)
    if COMMANDS[options.command].passes_on:
        options.others = others[1:] if others[:1] == ["--"] else others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("axolotl_medusa").setLevel(logging.INFO)
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)
    try:
        COMMANDS[options.command].run(options)
    except (ValueError, OSError, RuntimeError) as error:
        from axolotl_medusa.model.secrets import without_secrets

        message = without_secrets(" ".join(str(error).split())) or type(error).__name__
        print(f"{prog} {options.command}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def __getattr__(name: str) -> Any:
    """Makes `axolotl_command` when axolotl asks for it: it needs click, which axolotl brings."""
    if name == "axolotl_command":
        return _axolotl_command()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _axolotl_command() -> Any:
    """`axolotl medusa ...`, a click command that hands all of its arguments to `main`."""
    import click

    @click.command(
        "medusa",
        short_help="Medusa heads: from training to a server",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def axolotl_command(context: click.Context, arguments: tuple[str, ...]) -> None:
        context.exit(main(arguments, prog="axolotl medusa"))

    return axolotl_command


def _is_no_noise(record: logging.LogRecord) -> bool:
    return _NOISE[record.name] not in record.getMessage()

"""The command `axolotl-medusa report`.

Contract: reads what the arguments name and writes one HTML file; a model is loaded only for `--prompts`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl_medusa.reporting.coloured_text import Example

FILE_NAME = "report.html"
_MARKED_BYTES = 4096
_EXAMPLES = 3
_TOKENS = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="what training writes to")
    parser.add_argument("--out", metavar="FILE", help=f"where to write the page (default: OUTPUT_DIR/{FILE_NAME})")
    parser.add_argument(
        "--with",
        dest="files",
        action="append",
        default=[],
        metavar="FILE",
        help="a JSON file of evaluate, tree or plan that lies elsewhere; may be repeated",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSONL: also decode some of these prompts and colour the text"
    )
    parser.add_argument(
        "--limit", type=int, default=_EXAMPLES, metavar="N", help=f"prompts to decode (default: {_EXAMPLES})"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=_TOKENS, metavar="N", help=f"of each answer (default: {_TOKENS})"
    )
    parser.add_argument("--base-model", metavar="M", help="directory or Hub name; by default what training wrote down")


def run(options: argparse.Namespace) -> None:
    """Writes the report.

    Raises:
        ValueError: There is nothing to report, or the file is there and is none of ours.
    """
    from axolotl_medusa.reporting.found_files import find_files
    from axolotl_medusa.reporting.page import page

    file = Path(options.out).expanduser() if options.out else Path(options.output_dir).expanduser() / FILE_NAME
    found = find_files(options.output_dir, options.files)
    _check_output(file)
    examples = _decoded(options) if options.prompts else []
    text = page(found, examples)
    file.write_text(text, encoding="utf-8")
    for note in found.notes:
        print(f"not in the report: {note}")
    print(f"written to {file}; open it in a browser")


def _check_output(file: Path) -> None:
    from axolotl_medusa.reporting.page import MARK

    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no directory, expected one to write {file.name} in: make it first")
    if not file.exists():
        return
    if file.is_file():
        with file.open("rb") as stream:
            if MARK.encode() in stream.read(_MARKED_BYTES):
                return
    raise ValueError(f"{file} is there already and is no report of ours, expected a new file: choose another --out")


def _decoded(options: argparse.Namespace) -> Sequence[Example]:
    import torch

    from axolotl_medusa.decoding.load_decoder import load_decoder
    from axolotl_medusa.measuring.evaluate import PromptTokens, check_fits
    from axolotl_medusa.reporting.coloured_text import Example, PieceCollector
    from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

    prompts = read_prompts(options.prompts, options.limit)
    model, tokenizer = load_decoder(options.output_dir, options.base_model)
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    check_fits(
        model,
        [PromptTokens(prompt.id, ids) for prompt, ids in zip(prompts, tokens, strict=True)],
        options.max_new_tokens,
    )
    examples = []
    for prompt, ids in zip(prompts, tokens, strict=True):
        collector = PieceCollector(tokenizer)
        _, stats = model.generate(
            torch.tensor([ids], dtype=torch.long),
            torch.ones(1, len(ids), dtype=torch.long),
            options.max_new_tokens,
            tree=model.tree(None),
            streamer=collector,
            return_stats=True,
        )
        question = prompt.messages[-1]["content"] if prompt.messages else prompt.id
        examples.append(Example(question, collector.pieces, stats.acceptance_length))
    return examples

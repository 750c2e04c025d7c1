"""What the commands that start vLLM take.

Contract: argparse alone; everything that they do not know is an option of vLLM.
"""

from __future__ import annotations

import argparse


def _vllm_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands that start vLLM have in common."""
    parser.add_argument(
        "output_dir",
        metavar="OUTPUT_DIR",
        help="an output_dir, a checkpoint in it, a medusa_heads, or an export for vLLM",
    )
    parser.add_argument("--base-model", metavar="M", help="directory or Hub name; by default what training wrote down")
    parser.add_argument(
        "--vllm-python",
        metavar="PYTHON",
        help="the interpreter that vLLM is installed for (default: this one, else .venv-vllm/bin/python)",
    )
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help="tokens to draft at most (default: as many as there are heads)"
    )


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `serve` takes; vLLM takes the rest."""
    _vllm_arguments(parser)
    parser.add_argument(
        "--method",
        choices=("auto", "drafter", "built-in", "none"),
        default="auto",
        help="drafter: ours, which drafts what pays; built-in: Medusa of vLLM<0.33; none: without heads (default: auto)",
    )
    parser.add_argument("--fixed", action="store_true", help="our drafter always drafts all K tokens")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and neither merge nor run anything")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan` takes; vLLM takes the rest."""
    _vllm_arguments(parser)
    parser.add_argument(
        "--concurrency", default="1,2,4,8,16,32,64", metavar="N,N,...", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSONL: id, prompt or messages (default: 16 of our own)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="per answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds in alternation (default: 3)")
    parser.add_argument(
        "--server",
        action="append",
        metavar="[NAME=]URL",
        help="measure this server instead of starting any; again for each (plain=URL is what others are compared with)",
    )
    parser.add_argument(
        "--logs", metavar="DIR", help="keep what the servers print here (default: a temporary directory)"
    )

"""What the command `serve` does once its arguments are parsed.

Contract: prints for a user; what is decided lies in `serving`.
"""

from __future__ import annotations

import argparse
import os
import sys

from axolotl_medusa.serving.merged_cache import merged_dir
from axolotl_medusa.serving.serve import ServeOptions, find_served, prepare, vllm_command
from axolotl_medusa.serving.vllm_install import find_vllm


def run_serve(options: argparse.Namespace) -> None:
    """Prints the vLLM command that serves heads, and becomes it: signals reach vLLM, and its exit status is this one's."""
    vllm = find_vllm(options.vllm_python)
    source = find_served(options.output_dir, options.base_model)
    asked = ServeOptions(options.method, options.draft_tokens, not options.fixed, tuple(options.others))
    command = vllm_command(source, vllm, asked)
    for note in command.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.dry_run:
        if command.needs_merge:
            print(f"note: the adapter will first be merged into {merged_dir(source)}", file=sys.stderr)
        print(command.shell())
        return
    prepare(source)
    print(command.shell())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})

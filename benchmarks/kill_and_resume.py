"""Interrupts trainings at random times, lets each go on, and checks that it ends, exports and has the heads of one left alone.

    python -m benchmarks.kill_and_resume MODEL_DIR [--sigkills 20] [--sigterms 5] [--seed 0] [--minutes 60] [--steps 8] [--out FILE]

MODEL_DIR is any model with a tokenizer whose data is rendered by ChatML. A training is interrupted between axolotl's
"Starting trainer" and the end of its process, at a time drawn evenly from the seed; before that nothing is there to lose.
Heads must be equal bitwise, since all runs are on one CPU process in fp32. Prints a line for each interruption and ends
with an error if any run failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.machine import description, write_result

from axolotl_medusa.cli import main as axolotl_medusa_command
from axolotl_medusa.model.heads_directory import read_heads

STARTED = "Starting trainer"
POLL_S = 0.01
CHATS = 60
PRELOAD = ["axolotl.cli.train", "axolotl.train", "axolotl.core.builders", "axolotl_medusa.training.plugin"]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Interruption:
    """One interrupted training and what became of it.

    Attributes:
        signal: What it was sent.
        after_s: Seconds after its trainer started.
        exit_status: Of the interrupted process; negative is the signal that ended it.
        left: Folders named `checkpoint-*` at that time.
        went_on_from: The checkpoint that the next start took, None for a start from the beginning.
        passed_over: How many checkpoints that start passed over as unfinished.
        problem: What was wrong in the end; empty where all was right.
    """

    signal: str
    after_s: float
    exit_status: int
    left: list[str]
    went_on_from: str | None
    passed_over: int
    problem: str


def write_chats(file: Path) -> None:
    """Short conversations of different lengths."""
    with file.open("w", encoding="utf-8") as lines:
        for number in range(CHATS):
            answer = " ".join(str(number + k) for k in range(3 + number))
            turns = [
                {"role": "user", "content": f"Count from {number}."},
                {"role": "assistant", "content": answer},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")


def write_yaml(file: Path, model_dir: Path, chats: Path, output_dir: Path, steps: int) -> None:
    """Medusa-2 with LoRA: dropout, schedules and packing leave a run much to remember."""
    config = {
        "base_model": str(model_dir),
        "plugins": ["axolotl_medusa.MedusaPlugin"],
        "medusa_num_heads": 3,
        "medusa_only_heads": False,
        "medusa_self_distillation": True,
        "medusa_lm_head": "shared",
        "medusa_scheduler": "sine_0.5",
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_target_linear": True,
        "chat_template": "chatml",
        "datasets": [{"path": str(chats), "type": "chat_template", "field_messages": "messages"}],
        "val_set_size": 0.0,
        "dataset_prepared_path": str(file.parent / "prepared"),
        "output_dir": str(output_dir),
        "auto_resume_from_checkpoints": True,
        "sequence_len": 128,
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "num_epochs": 100,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "bf16": False,
        "tf32": False,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "seed": 7,
    }
    file.write_text(yaml.safe_dump(config), encoding="utf-8")


def _train(config: str, log: str) -> None:
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["axolotl.cli.train", config]
    runpy.run_module("axolotl.cli.train", run_name="__main__")


def start(config: Path, log: Path) -> BaseProcess:
    """Starts `python -m axolotl.cli.train`, with what it prints in `log`, and returns when its trainer starts or it has ended."""
    log.unlink(missing_ok=True)
    process = _processes.Process(target=_train, args=(str(config), str(log)))
    process.start()
    while process.is_alive() and not (log.exists() and STARTED in log.read_text(encoding="utf-8", errors="replace")):
        time.sleep(POLL_S)
    return process


def run_to_its_end(config: Path, log: Path) -> tuple[int, float]:
    """Exit status of a training and the seconds between its trainer's start and its end."""
    process = start(config, log)
    began = time.monotonic()
    process.join()
    return process.exitcode or 0, time.monotonic() - began


def differences(output_dir: Path, expected: dict[str, torch.Tensor]) -> str:
    """What is wrong with the heads of a run, and with their export; empty where nothing is."""
    target = ["--to", "vllm", "--model", "merged", "--out", str(output_dir / "export")]
    try:
        found = read_heads(output_dir / "medusa_heads").tensors
        status = axolotl_medusa_command(["export", str(output_dir), *target])
    except ValueError as error:
        return str(error)
    if status:
        return f"the export ended with exit status {status}"
    return ", ".join(name for name, tensor in expected.items() if not torch.equal(found[name], tensor))


def interrupt(config: Path, output_dir: Path, sent: signal.Signals, after_s: float, expected: dict[str, Any]) -> Any:
    """Interrupts a new run, lets it go on to its end, and says how that went; None where it had ended before."""
    log = config.parent / "run.log"
    process = start(config, log)
    process.join(after_s)
    if not process.is_alive():
        return None
    os.kill(process.pid or 0, sent)
    process.join()
    exit_status = process.exitcode or 0
    left = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    problem = "" if exit_status else "the interrupted run ended with exit status 0"
    status, _ = run_to_its_end(config, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    taken = [name for name in left if f"Medusa heads loaded from {output_dir / name}" in text]
    if status:
        problem = f"the next start ended with {status}: {text[-500:]}"
    return Interruption(
        sent.name,
        round(after_s, 2),
        exit_status,
        left,
        taken[-1] if taken else None,
        text.count("is passed over, because"),
        problem or differences(output_dir, expected),
    )


def main() -> None:
    """Runs the interruptions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--sigkills", type=int, default=20)
    parser.add_argument("--sigterms", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further interruption begins after these")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="JSON of all interruptions")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    draw = random.Random(options.seed)
    waiting = [signal.SIGKILL] * options.sigkills + [signal.SIGTERM] * options.sigterms
    draw.shuffle(waiting)
    done: list[Interruption] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        chats = directory / "chats.jsonl"
        write_chats(chats)
        for name in ("first", "alone"):  # the first prepares the data, and finds no file in the system's cache
            write_yaml(directory / "run.yml", options.model_dir, chats, directory / name, options.steps)
            status, length_s = run_to_its_end(directory / "run.yml", directory / "alone.log")
            if status:
                raise SystemExit((directory / "alone.log").read_text(encoding="utf-8")[-3000:])
        expected = read_heads(directory / "alone" / "medusa_heads").tensors
        print(
            f"seed {options.seed}; a run of {options.steps} steps left alone takes {length_s:.1f} s once its trainer starts"
        )
        number = 0
        while waiting and time.monotonic() < deadline:
            number += 1
            output_dir = directory / f"run{number}"
            write_yaml(directory / "run.yml", options.model_dir, chats, output_dir, options.steps)
            found = interrupt(directory / "run.yml", output_dir, waiting[-1], draw.uniform(0.0, length_s), expected)
            if found is None:
                continue
            waiting.pop()
            done.append(found)
            print(json.dumps(asdict(found)), flush=True)
            shutil.rmtree(output_dir)  # its export holds a whole model
    failed = [each for each in done if each.problem]
    print(f"{len(done)} interruptions, {len(failed)} of them with a problem; {len(waiting)} were left for lack of time")
    if options.out:
        result = {"seed": options.seed, "steps": options.steps, "interruptions": [asdict(each) for each in done]}
        write_result(options.out, result | description("axolotl", "torch", "transformers", "peft"))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

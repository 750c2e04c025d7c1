"""What goes wrong with several ranks only: who copies, who waits for whom, and who sees the weights."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from test_distributed import COMMON
from test_evaluate import EVALUATED, assert_same_model
from test_train import LORA
from two_processes import torchrun, two_processes

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

ENDS_WITHIN_S = 60
WATCHED = {**COMMON, "plugins": ["watch_ranks.WatchRanksPlugin", *COMMON["plugins"]]}


def divided(zero3: str, engine: str) -> tuple[dict[str, str], dict[str, str]]:
    """Keys of a YAML and environment for DDP or ZeRO-3."""
    return ({"deepspeed": zero3}, {}) if engine == "zero3" else ({}, {"ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_only_the_rank_that_writes_holds_copies_of_the_heads(make_yaml, tmp_path, two_chats, zero3, engine):
    keys, environment = divided(zero3, engine)
    keys |= {"medusa_lm_head": "separate"}
    copies = tmp_path / "copies"
    torchrun(make_yaml(**{**WATCHED, **keys}, datasets=two_chats), **environment, COPIES=str(copies))
    held = [tuple(map(int, line.split())) for line in copies.read_text().splitlines()]
    assert {rank for rank, _ in held} == {0, 1}
    assert all(count >= 3 for rank, count in held if rank == 0), "the spy sees no copies where there are some"
    assert all(count == 0 for rank, count in held if rank == 1), held
    assert len(read_heads(tmp_path / "out" / "medusa_heads").tensors) == 9


@pytest.mark.parametrize("to", ["both", "rank 0"])
def test_an_interrupted_zero3_run_ends_and_names_the_checkpoint_to_resume_from(
    make_yaml, tmp_path, two_chats, zero3, to
):
    out = tmp_path / "out"
    many = {"max_steps": 500, "num_epochs": 500, "save_steps": 2, "save_total_limit": 2}
    config = make_yaml(**{**WATCHED, **LORA, **many}, datasets=two_chats, deepspeed=zero3)
    with two_processes(config) as run:
        before = []
        for line in run.lines():
            before.append(line)
            if found := re.fullmatch(r"rank 0 pid (\d+) finished step 3\n", line):
                break
        else:
            pytest.fail(f"the run ended before step 3: {''.join(before)[-20000:]}")
        if to == "both":
            os.kill(run.process.pid, signal.SIGINT)  # torchrun hands it on to its processes
        else:
            os.kill(int(found[1]), signal.SIGINT)
        output = run.end(ENDS_WITHIN_S)
        assert run.process.exitcode not in (0, None)
    assert f"axolotl-medusa: stopped, and nothing was written to {out}" in output
    checkpoint = Path(re.search(r"resume_from_checkpoint: (\S+) goes on from there", output)[1])
    assert checkpoint.parent == out and (checkpoint / "trainer_state.json").is_file()
    assert read_heads(checkpoint / "medusa_heads").tensors
    assert not [path for path in out.iterdir() if path.name == "medusa_heads" or path.suffix == ".safetensors"]


def test_a_nan_under_zero3_ends_in_one_line_that_names_the_cause(make_yaml, tmp_path, two_chats, zero3):
    config = make_yaml(**{**WATCHED, "learning_rate": 1e30, "max_grad_norm": 1e30}, datasets=two_chats, deepspeed=zero3)
    output = torchrun(config, ok=False)
    lines = [line for line in output.splitlines() if "axolotl-medusa: the loss is " in line]
    assert lines and all("has grown to" in line and "lower learning_rate" in line for line in lines)
    assert not (tmp_path / "out" / "medusa_heads").exists()


@pytest.mark.parametrize("recipe", [LORA, {}], ids=["lora", "full"])
def test_evaluate_under_zero3_measures_the_trained_model(make_yaml, tmp_path, two_chats, zero3, recipe):
    keys = {**COMMON, **recipe, **EVALUATED, "val_set_size": 0.0, "eval_sample_packing": False, "eval_steps": 2}
    config = make_yaml(**{**keys, "learning_rate": 0.5}, datasets=two_chats, test_datasets=two_chats, deepspeed=zero3)
    torchrun(config)
    torchrun(config, "evaluate")
    assert_same_model(tmp_path / "out")

"""Which disks and checkpoints machines share, by the answers that their processes give."""

from __future__ import annotations

import socket

import pytest

from axolotl_medusa.training import machines
from axolotl_medusa.training.machines import (
    checkpoint_problem,
    folder_of_this_machine,
    machines_without,
    own_disks_warning,
)


@pytest.fixture
def answers(monkeypatch):
    """What the other processes say, whatever they are asked next."""
    monkeypatch.setattr(socket, "gethostname", lambda: "first")
    others = []
    monkeypatch.setattr(machines, "of_all_processes", lambda value: [value, *others])
    return others


def test_cache_of_one_machine_is_where_the_yaml_says(answers, tmp_path):
    answers.append("first")
    assert folder_of_this_machine(tmp_path) == tmp_path


def test_cache_of_several_machines_is_one_for_each(answers, tmp_path):
    answers.append("second")
    assert folder_of_this_machine(tmp_path) == tmp_path / "first"


def test_one_process_is_asked_alone(tmp_path):
    out = tmp_path / "new"
    assert machines_without(out) == [] and not list(out.iterdir())
    assert checkpoint_problem(str(tmp_path)) is None and checkpoint_problem(None) is None


def test_machine_with_another_disk_is_named(answers, tmp_path):
    answers.append(("second", False))
    assert machines_without(tmp_path) == ["second"]


def test_warning_says_what_an_engine_that_divides_checkpoints_leaves():
    copied, divided = (own_disks_warning("out", ["second", "third"], is_divided) for is_divided in (False, True))
    assert "not on second, third" in copied and "copy it to every machine" in copied
    assert "no machine has a whole checkpoint" in divided and "copy it" not in divided


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (("second", "checkpoint-4", True), None),
        (("second", "checkpoint-4", False), "first goes on from checkpoint-4, second from a part of checkpoint-4"),
        (("second", "checkpoint-2", True), "first goes on from checkpoint-4, second from checkpoint-2"),
        (("second", None, False), "first goes on from checkpoint-4, second from no checkpoint"),
    ],
)
def test_machines_that_go_on_from_different_checkpoints_are_named(answers, tmp_path, other, problem):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    answers.append(other)
    found = checkpoint_problem(str(checkpoint))
    assert found is None if problem is None else found.startswith(problem)

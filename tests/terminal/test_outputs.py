"""No command writes over a file that it did not write itself, and it says so before it measures anything."""

from __future__ import annotations

import json

import pytest

from axolotl_medusa.cli import main
from axolotl_medusa.terminal import commands
from axolotl_medusa.terminal.outputs import check_json_output

KEYS = {"choices", "num_nodes"}


@pytest.mark.parametrize(
    "content",
    [b"mine", b"{", b'{"choices": []}', b"[]", b'"choices num_nodes"', b"\xff\xfe", b"[" * 100_000],
    ids=["text", "broken", "other-keys", "list", "string", "binary", "deep"],
)
def test_file_that_the_command_did_not_write_is_refused_and_left(content, tmp_path):
    file = tmp_path / "tree.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tree\.json is there already .*choose another --out") as error:
        check_json_output(file, KEYS, "--out")
    assert "\n" not in str(error.value) and file.read_bytes() == content


def test_new_and_empty_files_and_those_of_the_command_may_be_written(tmp_path):
    file = tmp_path / "tree.json"
    check_json_output(file, KEYS, "--out")
    file.touch()
    check_json_output(file, KEYS, "--out")
    file.write_text(json.dumps({"choices": [], "num_nodes": 0, "more": 1}))
    check_json_output(file, KEYS, "--out")
    check_json_output("/dev/null", KEYS, "--out")


def test_place_that_cannot_be_written_is_said_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"none is no directory, expected one to write tree\.json in"):
        check_json_output(tmp_path / "none" / "tree.json", KEYS, "--out")
    with pytest.raises(ValueError, match="is a directory, expected a file"):
        check_json_output(tmp_path, KEYS, "--out")


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["evaluate", "heads", "--prompts", "{mine}", "--json", "{mine}"], "prompts.jsonl"),
        (["tree", "heads", "--calibration", "{mine}", "--out", "{mine}"], "prompts.jsonl"),
        (["evaluate", "heads", "--prompts", "{mine}", "--plots", "{dir}"], "speed_up.png"),
        (["plot", "{dir}"], "training_loss.png"),
    ],
    ids=["evaluate-json", "tree", "evaluate-plots", "plot"],
)
def test_commands_refuse_before_they_load_a_model(arguments, file, tmp_path, capsys, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(commands, "load_heads", load)
    for module in ("measuring.plots", "measuring.training_plots", "terminal.commands"):
        monkeypatch.setattr(f"axolotl_medusa.{module}.check_matplotlib", lambda: None)
    history = [{"step": 1, "medusa0_loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / file).write_text('{"prompt": "mine"}\n')
    names = {"mine": tmp_path / "prompts.jsonl", "dir": tmp_path}
    assert main([argument.format(**names) for argument in arguments]) == 1
    assert f"{tmp_path / file} is there already" in capsys.readouterr().err
    assert (tmp_path / file).read_text() == '{"prompt": "mine"}\n'

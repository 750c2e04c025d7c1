"""The speeds at the end of the demo: the user's own command, both ways, with an interpreter that only looks like vLLM's."""

from __future__ import annotations

import json

import pytest
from demo import speeds
from demo.model_server import ServerStartError
from exports import trained
from fake_vllm_install import SERVER, fake_vllm


@pytest.fixture
def run(tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setattr(speeds, "VLLM_PYTHON", fake_vllm(tmp_path / "vllm", main=SERVER))
    monkeypatch.setenv("FAKE_VLLM_OUT", str(tmp_path / "started.jsonl"))
    monkeypatch.setattr(speeds, "AT_A_TIME", (1, 4))
    return tmp_path


def test_speeds_are_of_the_command_with_and_without_heads(run, capsys):
    found = speeds.speeds(run / "run", run)
    assert {name: list(values) for name, values in found.items()} == {"plain": ["1", "4"], "with_heads": ["1", "4"]}
    assert min(value for values in found.values() for value in values.values()) > 0
    plain, heads = (json.loads(line)[0] for line in (run / "started.jsonl").read_text().splitlines())
    assert plain == {} and heads["method"] == "custom_class"
    assert "axolotl_medusa.vllm_drafter.MedusaDrafter" in (run / "serve-with_heads.log").read_text()
    assert "round 1, plain, 4 at a time" in capsys.readouterr().out


def test_server_that_does_not_start_fails_the_stage(run, monkeypatch):
    monkeypatch.setattr(
        speeds, "serve_command", lambda output_dir, method: [str(speeds.VLLM_PYTHON), "-c", "raise ValueError"]
    )
    with pytest.raises(ServerStartError, match="vLLM ended with status 1 before it answered"):
        speeds.speeds(run / "run", run)

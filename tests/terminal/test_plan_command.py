"""`plan` from end to end with an interpreter that only looks like vLLM's, and what it refuses before it starts anything."""

from __future__ import annotations

import json

import pytest
from exports import trained
from fake_streaming import streaming
from fake_vllm_install import SERVER, fake_vllm

from axolotl_medusa.cli import main
from axolotl_medusa.serving.draft_plan import read_plan
from axolotl_medusa.terminal import plan_command


def plan(directory, *options):
    return main(["plan", str(directory / "run"), *map(str, options)])


def test_plan_measures_writes_and_says_what_to_use(tmp_path, monkeypatch, capsys):
    started = tmp_path / "started.jsonl"
    monkeypatch.setenv("FAKE_VLLM_OUT", str(started))
    trained(tmp_path)
    python = fake_vllm(tmp_path / "vllm", main=SERVER)
    options = [
        "--vllm-python",
        python,
        "--concurrency",
        "2,1",
        "--repeats",
        1,
        "--draft-tokens",
        2,
        "--dtype",
        "float32",
    ]
    status = plan(tmp_path, *options, "--max-tokens", 4)
    said = capsys.readouterr()
    assert status == 0, said.err
    heads = tmp_path / "run" / "medusa_heads"
    content = json.loads((heads / "plan.json").read_text())
    assert list(content["measured"]) == ["plain", "k = 1", "k = 2", "adaptive"]
    assert list(content["measured"]["plain"]) == ["1", "2"]
    assert len(content["measured"]["k = 2"]["1"]["rounds_tokens_per_s"]) == 1
    assert content["measured"]["k = 2"]["1"]["acceptance_length"] == 2.0
    assert content["measured"]["plain"]["1"]["acceptance_length"] is None
    assert content["measured_with"]["vllm"] == "0.32.0" and content["measured_with"]["vllm_options"] == [
        "--dtype",
        "float32",
    ]
    assert content["step_s"] == {"2": 0.1, "3": 0.2, "64": 2.5}
    assert len(read_plan(heads).calibration.heads) == 3
    assert (heads / "plan.png").stat().st_size > 1000
    assert content["advice"] == said.out.splitlines()[-len(content["advice"]) - 2 : -2]
    assert "\nrequests  setting" in f"\n{said.out}" and "1 at a time:" in said.out
    adaptive = [json.loads(line) for line in started.read_text().splitlines()][3]
    assert "medusa_adaptive" not in adaptive[1], (
        "the fourth server is the adaptive one, which read what the others learnt"
    )
    assert said.err.index("round 1, k = 2") < said.err.index("written:") < said.err.index("round 1, adaptive")


def test_servers_that_run_are_measured_as_they_are(tmp_path, capsys):
    trained(tmp_path)
    with streaming(token_s=0.02) as slow, streaming(drafts=1) as fast:
        servers = ["--server", f"plain={slow.url}/v1", "--server", f"mine={fast.url}"]
        assert plan(tmp_path, *servers, "--concurrency", "1", "--repeats", 1) == 0
    content = json.loads((tmp_path / "run" / "medusa_heads" / "plan.json").read_text())
    assert list(content["measured"]) == ["plain", "mine"] and "step_s" not in content
    assert content["advice"][0].startswith("1 at a time: mine is fastest")
    assert "messages" in slow.requests[0][1], "the heads' tokenizer has a chat template"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,x"], "expected whole numbers such as 1,4,16"),
        (["--concurrency", "0"], "expected numbers from 1 to 4096"),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--max-tokens", "0"], "--max-tokens is 0, expected at least 1"),
        (["--limit", "0"], "limit is 0, expected at least 1"),
        (["--server", "http://127.0.0.1:1", "--dtype", "float32"], "expected no options of vLLM where --server"),
        (["--draft-tokens", "9"], "9 draft tokens were asked for, expected 1 to 3"),
    ],
)
def test_wrong_options_are_refused_before_a_server_starts(tmp_path, options, message, capsys):
    trained(tmp_path)
    python = fake_vllm(tmp_path / "vllm", main=SERVER)
    assert plan(tmp_path, *options, "--vllm-python", python) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "medusa_heads" / "plan.json").exists()


def test_files_of_others_are_not_written_over(tmp_path, capsys):
    trained(tmp_path)
    heads = tmp_path / "run" / "medusa_heads"
    (heads / "plan.json").write_text('{"floors": 3}')
    assert plan(tmp_path) == 1
    assert "has format None, expected 1" in capsys.readouterr().err
    (heads / "plan.json").unlink()
    (heads / "plan.png").write_bytes(b"a photograph")
    assert plan(tmp_path) == 1
    assert "was not drawn by axolotl-medusa" in capsys.readouterr().err


def test_directory_that_may_not_be_written_is_refused_first(tmp_path, monkeypatch, capsys):
    trained(tmp_path)
    monkeypatch.setattr(plan_command.os, "access", lambda path, mode: False)
    assert plan(tmp_path) == 1
    assert "medusa_heads may not be written" in capsys.readouterr().err

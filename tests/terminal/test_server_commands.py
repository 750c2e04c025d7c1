"""`serve` as a process: what it prints, what it becomes, how a signal reaches vLLM; and `check-server` from files."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from exports import trained
from fake_vllm_install import fake_vllm
from fake_vllm_server import FakeVllm, serving
from training_outputs import save_base, write_run
from transformers import AutoTokenizer

import axolotl_medusa
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.terminal.default_prompts import DEFAULT_PROMPTS

PACKAGE = Path(axolotl_medusa.__file__).resolve().parent


def serve_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "axolotl_medusa", "serve", *map(str, arguments)]


def test_serve_becomes_vllm_and_a_signal_ends_it(tmp_path):
    trained(tmp_path)
    python, out = fake_vllm(tmp_path / "vllm"), tmp_path / "said.json"
    command = serve_command(tmp_path / "run", "--vllm-python", python, "--port", 8001, "--dtype", "float32")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["FAKE_VLLM_OUT"] = str(out)
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": PACKAGE.parent}
    with subprocess.Popen(command, **options) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.readline()
            assert process.stdout.readline() == "serving\n"
            said = json.loads(out.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 7
            assert process.stdout.read() == "ended by SIGTERM\n"
        finally:
            process.kill()
    assert said["pid"] == process.pid, "it is this very process, so that supervisors see vLLM"
    words = shlex.split(printed)
    assert words[0].startswith("PYTHONPATH=") and words[1] == str(python)
    assert words[words.index("serve") :] == said["arguments"]
    assert said["arguments"][:2] == ["serve", str(tmp_path / "base")]
    assert said["arguments"][-4:] == ["--port", "8001", "--dtype", "float32"]
    assert Path(said["package"]).resolve().parent == PACKAGE
    assert not any("site-packages" in part and str(Path(sys.prefix)) in part for part in said["path"])


def test_dry_run_prints_alone(tmp_path):
    trained(tmp_path, "medusa-2", adapter={"targets": ["q_proj"]})
    python = fake_vllm(tmp_path / "vllm", "0.33.0", medusa=False)
    command = serve_command(tmp_path / "run", "--dry-run", "--vllm-python", python, "--", "--port", 8001)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert '"method": "custom_class"' in line and line.endswith("--port 8001")
    assert f"will first be merged into {tmp_path / 'run-served'}" in done.stderr
    assert not (tmp_path / "run-served").exists()


def test_vllm_that_is_missing_is_one_line(tmp_path, capsys):
    from axolotl_medusa.cli import main

    trained(tmp_path)
    assert main(["serve", str(tmp_path / "run"), "--vllm-python", sys._base_executable]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("install vllm, or name another --vllm-python\n") and "Traceback" not in captured.err


def test_options_of_vllm_are_no_options_of_other_commands(capsys):
    from axolotl_medusa.cli import main

    with pytest.raises(SystemExit):
        main(["plot", "out", "--port", "8001"])
    assert "unrecognized arguments: --port 8001" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_of_chats(tmp_path_factory):
    """A run whose tokenizer has Qwen3's template."""
    directory = tmp_path_factory.mktemp("chats")
    base = save_base(directory / "base", varied_model(**SIZES))
    write_run(directory / "run", varied_model(**SIZES), "medusa-1", base, yaml=SETTINGS)
    tokenizer = make_tokenizer("qwen3")
    for folder in {file.parent for file in directory.rglob("tokenizer.json")}:
        tokenizer.save_pretrained(folder)
    (directory / "prompts.jsonl").write_text('{"id": "1", "prompt": "Hi"}\n{"id": "2", "prompt": "Why?"}\n')
    return directory


SIZES = {"vocab_size": 300, "eos_token_id": None, "max_position_embeddings": 512}
SETTINGS = {"chat_template_kwargs": {"enable_thinking": False}}


def check(capsys, directory, fake, *options):
    from axolotl_medusa.cli import main

    with serving(fake) as address:
        given = [address, directory / "run", "--prompts", directory / "prompts.jsonl", "--max-new-tokens", 8, *options]
        status = main(["check-server", *map(str, given)])
    return status, capsys.readouterr()


def rendered(directory, **settings):
    tokenizer = AutoTokenizer.from_pretrained(directory / "run" / "medusa_heads")

    def chat_ids(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return chat_ids


def heads_of(directory):
    return read_heads(directory / "run" / "medusa_heads").build()


def test_check_server_prints_what_it_compared(run_of_chats, capsys):
    fake = FakeVllm(
        varied_model(**SIZES), heads_of(run_of_chats), chat_ids=rendered(run_of_chats, enable_thinking=False)
    )
    status, said = check(capsys, run_of_chats, fake)
    assert status == 0, said.err
    lines = said.out[said.out.index("server: ") :].splitlines()
    assert lines[0].endswith(", fake, vLLM 0.32.0")
    assert "the tokens of 2 of 2 chats are those" in lines[1]
    assert (
        "of 16 tokens in 2 answers 100.0% are our model's own first choice; log-probabilities moved by 0.0000"
        in lines[2]
    )
    assert lines[3] == "place  predicted  accepted by the server" and len(lines) == 8
    assert lines[-1] == "nothing is wrong: the server accepts what the heads allow"


def test_check_server_knows_the_thinking_mode_that_training_had(run_of_chats, capsys):
    fake = FakeVllm(
        varied_model(**SIZES), heads_of(run_of_chats), chat_ids=rendered(run_of_chats, enable_thinking=True)
    )
    status, said = check(capsys, run_of_chats, fake)
    assert status == 1
    assert "renders chats with enable_thinking: true" in said.err and "nothing is wrong" not in said.out


def test_check_server_asks_its_own_prompts_where_none_are_named(run_of_chats, capsys):
    from axolotl_medusa.cli import main

    fake = FakeVllm(varied_model(**SIZES), None, chat_ids=rendered(run_of_chats, enable_thinking=False))
    with serving(fake) as address:
        status = main(["check-server", address, str(run_of_chats / "run"), "--limit", "3", "--max-new-tokens", "2"])
    assert status == 1
    assert "it does not speculate" in capsys.readouterr().err
    assert [request["messages"][0]["content"] for request in fake.requests[:3]] == list(DEFAULT_PROMPTS[:3])

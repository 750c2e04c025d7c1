"""What the commands use of vLLM's server, looked up in vLLM's own files; `VLLM_FILES` names another vLLM's, as for the drafter."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from axolotl_medusa.live.counters import read_counters

INSTALLED = Path(__file__).parents[2] / ".venv-vllm" / "lib" / "python3.11" / "site-packages"
NAMED = os.environ.get("VLLM_FILES")

COUNTERS = (
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "generation_tokens",
    "iteration_tokens_total",
)
REQUEST = ("return_token_ids", "repetition_penalty", "top_k", "seed", "stream_options", "max_tokens")
OPTIONS = ("--speculative-config", "--additional-config", "--served-model-name", "--dtype", "--max-model-len")


@pytest.fixture(
    params=[
        pytest.param(INSTALLED, marks=pytest.mark.vllm, id="installed"),
        *([pytest.param(Path(NAMED), id="named")] if NAMED else []),
    ]
)
def vllm(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.param / "vllm"
    assert directory.is_dir(), f"{directory} is missing: run `make venv-vllm`, or name a directory that holds vllm/"
    return directory


def text(vllm: Path, *files: str) -> str:
    return "\n".join((vllm / file).read_text(encoding="utf-8") for file in files)


def test_module_that_serves_runs_as_a_program_with_that_command(vllm: Path) -> None:
    main = text(vllm, "entrypoints/cli/main.py")
    assert 'if __name__ == "__main__":\n    main()' in main and "vllm.entrypoints.cli.serve" in main
    assert 'name = "serve"' in text(vllm, "entrypoints/cli/serve.py")


def test_files_that_tell_the_methods_are_those_of_the_methods(vllm: Path) -> None:
    assert (vllm / "v1/spec_decode/custom_class_proposer.py").is_file()
    config = text(vllm, "config/speculative.py")
    assert '"custom_class"' in config
    assert (vllm / "v1/spec_decode/medusa.py").is_file() is bool(re.search(r'"medusa",', config))


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_are_exported_under_the_names_that_are_read(vllm: Path, name: str) -> None:
    assert f'"vllm:{name}"' in text(vllm, "v1/metrics/loggers.py", "v1/spec_decode/metrics.py")
    suffix = "_count" if name == "iteration_tokens_total" else "_total"
    line = f'vllm:{name}{suffix}{{engine="0",position="0"}} 3.0\n'
    assert read_counters(line) != read_counters(""), "the reader knows that name"


@pytest.mark.parametrize("api", ["completion", "chat_completion"])
def test_requests_have_the_fields_that_are_sent(vllm: Path, api: str) -> None:
    protocol = text(vllm, f"entrypoints/openai/{api}/protocol.py")
    assert [name for name in REQUEST if not re.search(rf"(?m)^    {name}: ", protocol)] == []
    assert "prompt_token_ids" in protocol and re.search(r"(?m)^    token_ids: ", protocol)


def test_options_that_are_set_exist(vllm: Path) -> None:
    arguments = text(vllm, "engine/arg_utils.py")
    assert [name for name in OPTIONS if f'"{name}"' not in arguments] == []

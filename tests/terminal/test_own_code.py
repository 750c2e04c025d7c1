"""Models that bring their own code: no command runs it unless the user says so, and each says how to."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from decoding_commands import arguments
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from training_outputs import save_base, write_run

from axolotl_medusa.cli import main
from axolotl_medusa.decoding.load_decoder import load_original
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving.export import export

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path({directory!r}) / "code-was-run").touch()

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A run on a model with code of its own, its files in `base`; transformers' copy of the code goes to this directory."""
    model = varied_model(vocab_size=300, eos_token_id=None)
    base = save_base(tmp_path / "base", model)
    write_run(tmp_path / "run", model, "medusa-1", base)
    for folder in ("base", "run", "run/checkpoint-4", "run/medusa_heads", "run/checkpoint-4/medusa_heads"):
        make_tokenizer("zephyr").save_pretrained(tmp_path / folder)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_own.py").write_text(CODE.format(directory=str(tmp_path)))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "a", "prompt": "abc"}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    return tmp_path


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "evaluate", "tree"])
def test_code_of_a_model_is_not_run_and_the_line_says_how_it_would_be(command, own, capsys):
    assert main(arguments(command, own, 4)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"axolotl-medusa {command}: error: {own / 'base'} brings code of its own, which is run only if you say so: read it, "
        "then add --trust-remote-code (in Python trust_remote_code=True)"
    )
    assert not (own / "code-was-run").exists() and not (own / "modules").exists()


def test_code_of_a_model_is_run_where_the_user_says_so(own, capsys):
    assert main([*arguments("generate", own, 4), "--trust-remote-code", "--tree", "none"]) == 0
    text = capsys.readouterr().out
    assert (own / "code-was-run").exists()
    assert (
        type(MedusaModel.from_pretrained(own / "run", trust_remote_code=True).base_model).__name__ == "OwnForCausalLM"
    )
    shutil.copyfile(own / "run" / "config.json", own / "base" / "config.json")
    assert main([*arguments("generate", own, 4), "--tree", "none"]) == 0
    assert capsys.readouterr().out == text


def test_code_is_not_run_in_python_either(own):
    for load in (
        lambda: MedusaModel.from_pretrained(own / "run"),
        lambda: load_original(own / "run", None, str(own / "base"), torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=r"base brings code of its own.*trust_remote_code=True") as error:
            load()
        assert "\n" not in str(error.value)
    assert not (own / "code-was-run").exists()
    assert load_original(own / "run", None, str(own / "base"), torch.device("cpu"), trust_remote_code=True)


def test_export_and_its_verification_run_no_code(own):
    export(find_source(own / "run"), "rtp-llm", own / "out")
    assert (own / "out" / "modeling_own.py").is_file() and not (own / "code-was-run").exists()


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["src", "data_generation", "demo", "benchmarks"])
def test_no_call_trusts_code_by_itself(folder):
    """Loaders in the package say what they trust: where they do not, transformers asks whoever sits at the terminal."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") != "True", f"{file}:{node.lineno}"
            if folder == "src" and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                assert given.keys() & {"trust_remote_code", None}, f"{file}:{node.lineno}"

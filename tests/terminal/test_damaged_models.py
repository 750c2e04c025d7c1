"""Damaged files of a model, an adapter or a tokenizer, and packages that they need: one line in every command that decodes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import add_lora
from decoding_commands import arguments
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from exports import edit_json
from training_outputs import as_if_trained, save_base, write_run

from axolotl_medusa.cli import main

VOCABULARY = {"vocab_size": 300, "eos_token_id": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Medusa-2 run with an adapter in `run`, its model in `base`, and prompts."""
    directory = tmp_path_factory.mktemp("whole")
    base = save_base(directory / "base", varied_model(**VOCABULARY))
    adapted = add_lora(varied_model(**VOCABULARY), targets=["q_proj", "v_proj"])
    as_if_trained(adapted)
    write_run(directory / "run", adapted, "medusa-2", base)
    for file in directory.rglob("tokenizer.json"):
        make_tokenizer("zephyr").save_pretrained(file.parent)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (directory / "prompts.jsonl").write_text(json.dumps({"id": "a", "messages": turns}))
    return directory


@pytest.fixture
def model(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "damaged")
    edit_json(copy / "run/medusa_heads/config.json", base_model_name_or_path=str(copy / "base"))
    return copy


def error_of(capsys, command, directory):
    assert main(arguments(command, directory, 2)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"axolotl-medusa {command}: error: ")
    return line.partition(": error: ")[2]


def text(content):
    return lambda file: file.write_text(content)


def keys(**changes):
    return lambda file: edit_json(file, **changes)


def without_its_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def without_a_merges_token(file: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["merges"] = [["zz", "qq"]]
    file.write_text(json.dumps(content))


MODEL, ADAPTER, TOKENIZER = "causal language model: ", "no adapter that can be loaded on ", "no tokenizer that can be "
DAMAGE = {
    "adapter cut off": ("run/adapter_model.safetensors", without_its_end, "is not a whole s"),
    "adapter's rank is a text": ("run/adapter_config.json", keys(r="x"), ADAPTER),
    "adapter of another rank": ("run/adapter_config.json", keys(r=3), ADAPTER),
    "adapter's modules are a number": ("run/adapter_config.json", keys(target_modules=3), ADAPTER),
    "adapter of no kind": ("run/adapter_config.json", keys(peft_type="NOPE"), ADAPTER),
    "sizes are texts": ("base/config.json", keys(hidden_size="x"), MODEL),
    "no attention heads": ("base/config.json", keys(num_attention_heads=0), MODEL),
    "no type": ("base/config.json", keys(dtype="nope"), MODEL),
    "code is a number": ("base/config.json", keys(auto_map=3), MODEL),
    "unknown activation": ("base/config.json", keys(hidden_act="nope"), MODEL),
    "padding beyond the vocabulary": ("base/config.json", keys(pad_token_id=10**6), MODEL),
    "generation config is a list": ("base/generation_config.json", text("[1]"), MODEL),
    "end of text is a text": ("base/generation_config.json", text('{"eos_token_id": "x"}'), MODEL),
    "end of text is nested": ("base/generation_config.json", text('{"eos_token_id": [[1]]}'), MODEL),
    "tokenizer config is a list": ("run/medusa_heads/tokenizer_config.json", text("[1]"), TOKENIZER),
    "tokenizer's class is a number": ("run/medusa_heads/tokenizer_config.json", keys(tokenizer_class=5), TOKENIZER),
    "tokenizer's length is a text": ("run/medusa_heads/tokenizer_config.json", keys(model_max_length="x"), TOKENIZER),
    "special tokens are a list": ("run/medusa_heads/special_tokens_map.json", text("[3]"), TOKENIZER),
    "merge of unknown tokens": ("run/medusa_heads/tokenizer.json", without_a_merges_token, TOKENIZER),
    "chat template is broken": ("run/medusa_heads/chat_template.jinja", text("{% for %}"), "rendered by the chat template"),
    "chat template refuses": (
        "run/medusa_heads/chat_template.jinja",
        text("{{ raise_exception('roles must alternate') }}"),
        "cannot be rendered by the chat template: roles must alternate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_one_line_that_names_its_directory(name, model, capsys):
    file, damage, message = DAMAGE[name]
    damage(model / file)
    error = error_of(capsys, "generate", model)
    assert message in error
    assert error.startswith(str((model / file).parent)) or "chat" in name


@pytest.mark.parametrize("command", ["chat", "demo", "evaluate", "tree"])
def test_every_command_that_decodes_says_so(command, model, capsys):
    without_its_end(model / "run/adapter_model.safetensors")
    assert error_of(capsys, command, model).startswith(
        f"{model / 'run' / 'adapter_model.safetensors'} is not a whole s"
    )


def test_damaged_original_is_one_line(model, capsys):
    shutil.copytree(model / "base", model / "original")
    edit_json(model / "original" / "config.json", hidden_size="x")
    given = ["evaluate", model / "run", "--prompts", model / "prompts.jsonl", "--original", model / "original"]
    given += ["--held-out", model / "prompts.jsonl", "--max-new-tokens", 2]
    assert main([*map(str, given)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: the original model {model / 'original'} cannot be loaded: " in line


def test_package_that_a_models_code_needs_is_named(model, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ImportError(
            "This modeling file requires the following packages that were not found in your environment: einops. "
            "Run `pip install einops`"
        )

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    assert error_of(capsys, "generate", model).endswith("; pip install einops")


def test_package_that_an_adapter_needs_is_named(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert error_of(capsys, "generate", model) == f"{model / 'run'} is an adapter, which needs peft: pip install peft"

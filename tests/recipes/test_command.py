"""What `axolotl-medusa recipe` reads, writes and refuses."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from recipe_models import SWITCH, TEMPLATE, write_model

from axolotl_medusa.cli import main

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(capsys, *arguments):
    assert main(["recipe", *arguments]) == 0
    text = capsys.readouterr().out
    return text, yaml.safe_load(text)


def refused(capsys, *arguments):
    assert main(["recipe", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_yaml_goes_to_stdout_or_to_a_new_file(here, capsys):
    write_model(here / "tiny")
    text, _ = made(capsys, "tiny")
    assert "# Run:   accelerate launch -m axolotl.cli.train tiny-medusa1.yml" in text
    assert main(["recipe", "tiny", "--out", "tiny-medusa1.yml"]) == 0
    assert (here / "tiny-medusa1.yml").read_text() == text.replace(
        "# Made by: axolotl-medusa recipe tiny\n", "# Made by: axolotl-medusa recipe tiny --out tiny-medusa1.yml\n"
    )
    capsys.readouterr()
    assert "is there already, expected a new file" in refused(capsys, "tiny", "--out", "tiny-medusa1.yml")
    assert "is no directory, expected one to write x.yml in" in refused(capsys, "tiny", "--out", "none/x.yml")


def test_command_that_the_yaml_names_writes_it_again(here, capsys):
    write_model(here / "tiny", template=SWITCH)
    text, _ = made(
        capsys, "tiny", "--method", "self-distillation", "--gpus", "2", "--gpu-gib", "40", "--thinking", "on"
    )
    (line,) = (line for line in text.splitlines() if line.startswith("# Made by: "))
    again, _ = made(capsys, *shlex.split(line.removeprefix("# Made by: axolotl-medusa recipe ")))
    assert again == text


def test_thinking_mode_is_the_same_in_data_and_server(here, capsys):
    write_model(here / "tiny", template=SWITCH)
    without, _ = made(capsys, "tiny")
    option = """--default-chat-template-kwargs '{"enable_thinking": false}'"""
    assert without.count(option) == 2
    assert "--thinking on makes the other recipe" in without
    thinking, _ = made(capsys, "tiny", "--thinking", "on")
    assert option not in thinking
    assert "--chat --thinking on --split_turns --max_tokens 112" in thinking  # seven eighths of 128 positions


def test_template_of_ones_own_is_in_yaml_data_and_server(here, capsys):
    write_model(here / "tiny", template=None)
    (here / "my template.jinja").write_text(TEMPLATE)
    assert "give the format that it will be asked in with --chat-template FILE.jinja" in refused(capsys, "tiny")
    text, cfg = made(capsys, "tiny", "--chat-template", "my template.jinja")
    assert (cfg["chat_template"], cfg["chat_template_jinja"]) == ("jinja", "my template.jinja")
    assert text.count("--chat-template 'my template.jinja'") == 3  # data, server, and what made it
    assert "is no file of a template" in refused(capsys, "tiny", "--chat-template", "none.jinja")


def test_template_that_refuses_system_turns_says_what_to_do(here, capsys):
    write_model(here / "tiny", "gemma", TEMPLATE + "{{ raise_exception('System role not supported') }}")
    assert "`clean.py --system join`" in made(capsys, "tiny")[0]


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({}, "<unk>"),
        ({"pad_token": {"content": "</s>"}}, "<unk>"),
        ({"pad_token": "<pad>"}, None),
        ({"unk_token": None}, None),
        ({"unk_token": "</s>"}, None),
    ],
    ids=str,
)
def test_padding_is_never_with_the_end_of_an_answer_where_there_is_another(tokens, pad, here, capsys):
    write_model(here / "tiny")
    change(here / "tiny" / "tokenizer_config.json", **tokens)
    assert made(capsys, "tiny")[1].get("special_tokens") == ({"pad_token": pad} if pad else None)


def test_names_that_yaml_or_a_shell_would_read_otherwise_are_quoted(here, capsys):
    name = "a model: no. 1 #2"
    write_model(here / name)
    text, cfg = made(capsys, name, "--data", "my data.jsonl")
    assert cfg["base_model"] == name
    assert cfg["datasets"][0]["path"] == "my data.jsonl"
    assert cfg["output_dir"] == "./outputs/a-model-no.-1-2-medusa1"
    assert f"vllm serve {shlex.quote(name)}" in text and "--output_path 'my data.jsonl'" in text


def test_second_stage_names_the_command_of_the_first(here, capsys):
    write_model(here / "tiny", template=None)
    (here / "t.jinja").write_text(TEMPLATE)
    text, cfg = made(capsys, "tiny", "--method", "medusa-2", "--gpus", "0", "--chat-template", "t.jinja")
    (line,) = (line for line in text.splitlines() if line.startswith("#            axolotl-medusa recipe"))
    _, first = made(capsys, *shlex.split(line.split("axolotl-medusa recipe ")[1]))
    assert cfg["medusa_init_from"] == first["output_dir"]
    for key in ("medusa_num_heads", "medusa_lm_head", "medusa_num_layers"):
        assert cfg[key] == first[key]
    assert f"medusa_num_heads: 3 and medusa_lm_head: {cfg['medusa_lm_head']} as here" in text


def test_name_of_several_lines_is_refused(here, capsys):
    assert "has characters that are not printed" in refused(capsys, "tiny\nplugins: [evil]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is a LlamaForSequenceClassification, expected a causal",
        ),
        ({"vision_config": {"hidden_size": 8}}, "takes more than text (vision_config in its config)"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "is stored quantized (gptq), expected weights of 16 or 32 bits",
        ),
        ({"model_type": "unheard_of"}, "describes no causal language model that transformers can build"),
        ({"model_type": "t5"}, "describes no causal language model that transformers can build"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoConfig": "c.C"}},
            "expected a model that needs no code of its own",
        ),
        ({"model_type": None}, "names no model_type"),
    ],
    ids=str,
)
def test_model_that_is_not_supported_gets_the_reason_in_one_line(changes, message, here, capsys):
    write_model(here / "tiny")
    change(here / "tiny" / "config.json", **changes)
    assert message in refused(capsys, "tiny")


def test_what_is_no_model_gets_the_reason_in_one_line(here, capsys):
    write_model(here / "heads")
    (here / "heads" / "medusa_lm_head.safetensors").touch()
    assert "holds Medusa heads: expected the model that they belong to" in refused(capsys, "heads")
    (here / "empty").mkdir()
    assert "has no config.json" in refused(capsys, "empty")
    assert "does not exist" in refused(capsys, "./none")
    assert "`hf download org/none config.json`" in refused(capsys, "org/none")
    write_model(here / "tiny")
    (here / "tiny" / "tokenizer_config.json").unlink()
    assert "has no tokenizer_config.json here, which says how it is prompted" in refused(capsys, "tiny")


def test_command_needs_no_axolotl(here, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "axolotl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "axolotl", None)  # importing it raises ImportError
    write_model(here / "tiny")
    made(capsys, "tiny", "--method", "self-distillation")

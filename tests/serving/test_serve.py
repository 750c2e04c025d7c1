"""The vLLM command for every recipe and every vLLM, and what is refused or said before it runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from exports import exported, trained
from safetensors.torch import load_file, save_file
from training_outputs import save_base

from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving import merged_cache
from axolotl_medusa.serving.merged_cache import is_merged, merged_dir
from axolotl_medusa.serving.serve import DRAFTER, ServeOptions, find_served, prepare, vllm_command
from axolotl_medusa.serving.vllm_install import Vllm

V32 = Vllm(Path("/v/bin/python"), "0.32.0", takes_classes=True, has_medusa=True, import_path=Path("/ours"))
V33 = Vllm(Path("/v/bin/python"), "0.33.0", takes_classes=True, has_medusa=False, import_path=Path("/ours"))
OLD = Vllm(Path("/v/bin/python"), "0.9.2", takes_classes=False, has_medusa=True, import_path=Path("/ours"))
NONE = Vllm(Path("/v/bin/python"), "0.5.0", takes_classes=False, has_medusa=False, import_path=Path("/ours"))
LORA = {"targets": ["q_proj", "v_proj"]}


def option(command, name):
    """The JSON that follows an option, None where it is not there."""
    words = command.arguments
    return json.loads(words[words.index(name) + 1]) if name in words else None


def served(command):
    return command.arguments[command.arguments.index("serve") + 1]


@pytest.mark.parametrize(("vllm", "method"), [(V32, "custom_class"), (V33, "custom_class"), (OLD, "medusa")])
def test_method_is_what_the_installed_vllm_has(tmp_path, vllm, method):
    source = trained(tmp_path)
    command = vllm_command(source, vllm, ServeOptions())
    assert command.arguments[:4] == ["/v/bin/python", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert served(command) == str(tmp_path / "base")
    speculative = option(command, "--speculative-config")
    assert (speculative["method"], speculative["num_speculative_tokens"]) == (method, 3)
    heads = str(tmp_path / "run" / "medusa_heads")
    if method == "medusa":
        assert speculative["model"] == heads and "--additional-config" not in command.arguments
    else:
        assert speculative["model"] == DRAFTER
        assert option(command, "--additional-config") == {"medusa_heads": heads}
    assert ("PYTHONPATH" in command.environment) is (method == "custom_class")


def test_options_change_the_command_and_vllms_own_follow(tmp_path):
    source = trained(tmp_path)
    given = ("--port", "8001", "--additional-config", '{"a": 1}', "--dtype=float32")
    command = vllm_command(source, V32, ServeOptions("drafter", 2, adaptive=False, vllm_options=given))
    assert option(command, "--speculative-config")["num_speculative_tokens"] == 2
    assert option(command, "--additional-config") == {
        "a": 1,
        "medusa_heads": str(tmp_path / "run" / "medusa_heads"),
        "medusa_adaptive": False,
    }
    assert command.arguments[-3:] == ["--port", "8001", "--dtype=float32"]
    plain = vllm_command(source, NONE, ServeOptions("none", vllm_options=given))
    assert "--speculative-config" not in plain.arguments and option(plain, "--additional-config") == {"a": 1}
    built_in = vllm_command(source, V32, ServeOptions("built-in"))
    assert option(built_in, "--speculative-config")["method"] == "medusa"


def test_printed_command_is_the_one_that_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = vllm_command(trained(tmp_path), V32, ServeOptions(vllm_options=("--chat-template", "it's one")))
    assert shlex.split(command.shell()) == ["PYTHONPATH=/ours", *command.arguments]


def test_printed_command_shows_no_secrets(tmp_path):
    given = ("--api-key", "sk-1", "--hf-token=hf_2", "--port", "1")
    command = vllm_command(trained(tmp_path), V32, ServeOptions(vllm_options=given))
    assert command.shell().endswith("--api-key '***' '--hf-token=***' --port 1")
    assert command.arguments[-5:] == list(given)


@pytest.mark.parametrize(
    "given",
    [
        "--speculative-config {}",
        "--speculative_config={}",
        "-sc {}",
        "--model m",
        "--spec-method ngram",
        "--speculative-config.method ngram",
        "--additional-config.a 1",
    ],
)
def test_options_that_are_set_here_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match="among vLLM's options, expected none that is set here"):
        vllm_command(trained(tmp_path), V32, ServeOptions(vllm_options=tuple(given.split())))


@pytest.mark.parametrize(
    "given", [("--additional-config", "[1]"), ("--additional-config=no",), ("--additional-config",)]
)
def test_additional_config_that_is_no_object_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="--additional-config is"):
        vllm_command(trained(tmp_path), V32, ServeOptions(vllm_options=given))


@pytest.mark.parametrize("tokens", [0, 4])
def test_more_draft_tokens_than_heads_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match=f"{tokens} draft tokens were asked for, expected 1 to 3"):
        vllm_command(trained(tmp_path), V32, ServeOptions(draft_tokens=tokens))


@pytest.mark.parametrize(
    ("vllm", "method", "message"),
    [
        (NONE, "auto", "vLLM 0.5.0 in /v/bin/python has not the method custom_class .* expected vLLM 0.32 or newer"),
        (OLD, "drafter", "has not the method custom_class"),
        (V33, "built-in", "has no Medusa of its own, expected vllm<0.33"),
    ],
)
def test_vllm_that_cannot_do_it_is_named_in_one_line(tmp_path, vllm, method, message):
    with pytest.raises(RuntimeError, match=message) as error:
        vllm_command(trained(tmp_path), vllm, ServeOptions(method))
    assert "\n" not in str(error.value)


def test_other_model_is_refused_before_anything_starts(tmp_path):
    source = trained(tmp_path)
    other = save_base(tmp_path / "other", make_model(seed=1))
    with pytest.raises(ValueError, match="is another than the one that"):
        vllm_command(find_source(source.heads_dir, str(other)), V32, ServeOptions())
    larger = save_base(tmp_path / "larger", make_model(vocab_size=140))
    with pytest.raises(ValueError, match=r"is \[140, 32\], but the heads were trained with one of \[131, 32\]"):
        vllm_command(find_source(source.heads_dir, str(larger)), V32, ServeOptions())


def test_built_in_method_refuses_a_path_that_vllm_reads_as_another_method(tmp_path):
    directory = tmp_path / "my-eagle3-heads"
    directory.mkdir()
    source = trained(directory)
    with pytest.raises(ValueError, match="found 'eagle3' in the path"):
        vllm_command(source, V32, ServeOptions("built-in"))
    assert vllm_command(source, V32, ServeOptions()).notes == ()


def test_full_model_of_medusa_2_is_served_from_the_run(tmp_path):
    source = trained(tmp_path, "medusa-2")
    assert served(vllm_command(source, V32, ServeOptions())) == str(tmp_path / "run")


def test_model_of_the_hub_is_served_from_its_files_under_its_name(tmp_path, monkeypatch):
    source = trained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "base"))
    named = find_source(source.heads_dir, "org/model")
    command = vllm_command(named, V32, ServeOptions())
    assert served(command) == str(tmp_path / "base")
    assert command.arguments[command.arguments.index("--served-model-name") + 1] == "org/model"
    own = vllm_command(named, V32, ServeOptions(vllm_options=("--served-model-name", "mine")))
    assert own.arguments.count("--served-model-name") == 1


@pytest.mark.parametrize("method", ["drafter", "built-in"])
def test_adapter_is_merged_once_beside_the_run(tmp_path, monkeypatch, method):
    source = trained(tmp_path, "medusa-2", adapter=LORA)
    exports = []
    monkeypatch.setattr(
        merged_cache, "export", lambda *args, **options: exports.append(args) or real_export(*args, **options)
    )
    command = vllm_command(source, V32, ServeOptions(method))
    assert command.needs_merge and not merged_dir(source).exists(), "asking for the command writes nothing"
    assert served(command) == str(tmp_path / "run-served" / "merged_model")
    for _ in range(2):
        prepare(source)
        assert not vllm_command(source, V32, ServeOptions(method)).needs_merge
    assert len(exports) == 1
    adapted = load_file(tmp_path / "run-served" / "merged_model" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(adapted[name], base[name])
    heads = str(tmp_path / ("run-served" if method == "built-in" else "run/medusa_heads"))
    config = option(command, "--speculative-config" if method == "built-in" else "--additional-config")
    assert config["model" if method == "built-in" else "medusa_heads"] == heads


real_export = merged_cache.export


def test_merged_model_is_made_again_where_the_adapter_has_changed(tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=LORA)
    prepare(source)
    file = tmp_path / "run" / "adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(1, 1))
    assert not is_merged(source)
    merged = tmp_path / "run-served" / "merged_model" / "model.safetensors"
    before = load_file(merged)["model.layers.0.self_attn.q_proj.weight"].clone()
    prepare(source)
    assert is_merged(source)
    assert not torch.equal(load_file(merged)["model.layers.0.self_attn.q_proj.weight"], before)


def test_merge_that_was_interrupted_is_done_again(tmp_path, monkeypatch):
    source = trained(tmp_path, "medusa-2", adapter=LORA)

    def interrupted(*args, **options):
        real_export(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_cache, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source)
    assert not is_merged(source)
    monkeypatch.setattr(merged_cache, "export", real_export)
    prepare(source)
    assert is_merged(source)


def test_interrupted_merge_of_another_adapter_counts_for_neither(tmp_path, monkeypatch):
    """What lies there is of the second adapter, when the first one is back with its old time."""
    source = trained(tmp_path, "medusa-2", adapter=LORA)
    prepare(source)
    file = tmp_path / "run" / "adapter_model.safetensors"
    content, stat = file.read_bytes(), file.stat()
    os.utime(file, ns=(1, 1))

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_cache, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not is_merged(source)


def test_merge_leaves_what_others_wrote_there(tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=LORA)
    (tmp_path / "run-served").mkdir()
    (tmp_path / "run-served" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="run-served is not empty"):
        prepare(source)
    assert (tmp_path / "run-served" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["shared", "separate"])
def test_export_for_vllm_is_served_too(tmp_path, form):
    _, out = exported(tmp_path, "vllm", form)
    source = find_served(out)
    command = vllm_command(source, V32, ServeOptions())
    assert served(command) == str(tmp_path / "base")
    assert option(command, "--additional-config") == {"medusa_heads": str(out)}
    with pytest.raises(ValueError, match="is another than the one that"):
        other = save_base(tmp_path / "other", make_model(seed=1))
        vllm_command(find_served(out, str(other)), V32, ServeOptions())


def test_export_with_its_merged_model_is_served_wherever_it_is_moved_to(tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=LORA)
    real_export(source, "vllm", tmp_path / "out", model="merged")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    command = vllm_command(find_served(tmp_path / "moved"), V32, ServeOptions())
    assert served(command) == str(tmp_path / "moved" / "merged_model")


def test_damaged_export_is_refused(tmp_path):
    _, out = exported(tmp_path, "vllm")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(ValueError, match="does not fit"):
        find_served(out)


def test_other_chat_template_or_none_is_said(tmp_path):
    source = trained(tmp_path)
    assert vllm_command(source, V32, ServeOptions()).notes == ()
    heads, base = tmp_path / "run" / "medusa_heads", tmp_path / "base"
    (base / "chat_template.jinja").write_text("{{ other }}")
    (note,) = vllm_command(source, V32, ServeOptions()).notes
    assert "brings another" in note and f"add --chat-template {heads / 'chat_template.jinja'}" in note
    (base / "chat_template.jinja").unlink()
    (note,) = vllm_command(source, V32, ServeOptions()).notes
    assert "brings none" in note
    (base / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]}
        )
    )
    assert vllm_command(source, V32, ServeOptions()).notes == ()


def test_other_numbers_of_tokens_are_said(tmp_path):
    source = trained(tmp_path)
    heads, base = tmp_path / "run" / "medusa_heads", tmp_path / "base"
    content = {"model": {"vocab": {"a": 1, "b": 2}}, "added_tokens": [{"content": "<|im_end|>", "id": 3}]}
    (heads / "tokenizer.json").write_text(json.dumps(content))
    (base / "tokenizer.json").write_text(json.dumps({**content, "version": "1.0"}))
    assert vllm_command(source, V32, ServeOptions()).notes == ()
    (base / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    (note,) = vllm_command(source, V32, ServeOptions()).notes
    assert "first difference: '<|im_end|>'" in note

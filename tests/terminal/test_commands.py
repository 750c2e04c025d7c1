"""The commands evaluate, tree, generate and chat, on runs as training leaves them."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import torch
from conftest import add_lora, make_model
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from peft import PeftModel
from training_outputs import as_if_trained, save_base, write_run

from axolotl_medusa.cli import main
from axolotl_medusa.decoding.load_decoder import load_original
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree, read_tree, write_tree
from axolotl_medusa.decoding.tree_chooser import TreeChooser
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving.draft_plan import read_plan
from axolotl_medusa.serving.export import export

VOCABULARY = {"vocab_size": 300, "eos_token_id": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output directories of Medusa-1 and of Medusa-2 with an adapter, of the same base model, and prompts."""
    directory = tmp_path_factory.mktemp("runs")
    base = save_base(directory / "base", varied_model(**VOCABULARY))
    adapted = add_lora(varied_model(**VOCABULARY), targets=["q_proj", "v_proj"])
    as_if_trained(adapted)
    write_run(directory / "medusa-1", varied_model(**VOCABULARY), "medusa-1", base)
    write_run(directory / "medusa-2", adapted, "medusa-2", base)
    tokenizer = make_tokenizer("zephyr")
    for folder in directory.rglob("tokenizer.json"):
        tokenizer.save_pretrained(folder.parent)
    rows = [{"id": str(i), "prompt": "abc"[i:], "category": "xy"[i % 2]} for i in range(3)]
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    (directory / "held_out.jsonl").write_text(json.dumps({"messages": turns}))
    return directory


def run(capsys, *arguments, status=0):
    found = main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert found == status, printed.err
    return printed


def test_evaluate_writes_a_report_and_prints_it(runs, capsys, tmp_path):
    out = run(
        capsys, "evaluate", runs / "medusa-1", "--prompts", runs / "prompts.jsonl", "--max-new-tokens", 8,
        "--limit", 2, "--json", tmp_path / "report.json", "--tree", "default-4", "--seed", 5,
    ).out  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"versions", "hardware", "model", "seed", "trees", "overall", "categories", "steps"} <= report.keys()
    assert (report["seed"], report["max_new_tokens"], report["overall"]["prompts"]) == (5, 8, 2)
    assert list(report["categories"]) == ["x", "y"]
    assert len(report["trees"]["chain"]) == len(report["trees"]["tree"]) == 3
    assert list(report["steps"]["ratios"]) == ["1", "4", "8", "16", "32", "64"]
    assert all(row["agreement"] == 1 for row in report["overall"]["decoders"].values())
    assert "quality" not in report
    assert "\nall prompts (2)\n" in out and "\nx (1)\n" in out
    assert "output equal to plain for 100.0% of prompts" in out and "a step by nodes" in out


@pytest.mark.parametrize("original", [False, True], ids=["adapter off", "original named"])
def test_evaluate_compares_the_model_with_the_original(original, runs, capsys, tmp_path):
    options = ["--original", runs / "base"] if original else []
    out = run(
        capsys, "evaluate", runs / "medusa-2", "--prompts", runs / "prompts.jsonl", "--max-new-tokens", 3, "--limit", 1,
        "--json", tmp_path / "report.json", "--held-out", runs / "held_out.jsonl", *options,
    ).out  # fmt: skip
    quality = json.loads((tmp_path / "report.json").read_text())["quality"]
    assert (
        quality["tokens"] == len(make_tokenizer("zephyr")("<|user|>\nHi</s>\n<|assistant|>\nHello there</s>\n")[0]) - 1
    )
    assert quality["kl"] > 0.001 and quality["perplexity"] != quality["original_perplexity"]
    assert f"model on {quality['tokens']} held-out tokens: perplexity" in out


@pytest.fixture
def held_out_command(runs, tmp_path):
    return [
        "evaluate", runs / "medusa-2", "--prompts", runs / "prompts.jsonl", "--max-new-tokens", 2, "--limit", 1,
        "--json", tmp_path / "report.json", "--held-out",
    ]  # fmt: skip


def test_evaluate_keeps_what_it_measured_where_the_comparison_fails(
    held_out_command, runs, capsys, monkeypatch, tmp_path
):
    def fail(*_):
        raise RuntimeError("far enough")

    monkeypatch.setattr("axolotl_medusa.terminal.commands.compare_models", fail)
    printed = run(capsys, *held_out_command, runs / "held_out.jsonl", status=1)
    assert "\nall prompts (1)\n" in printed.out and printed.err.endswith("error: far enough\n")
    assert json.loads((tmp_path / "report.json").read_text())["overall"]["prompts"] == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ('{"prompt": ""}', [], "held-out text has 0 tokens to predict"),
        (
            '{"prompt": "abc"}',
            ["--original", "org/none"],
            "the original model org/none is neither a directory here nor",
        ),
        ('{"prompt": "abc"}', ["--original", "{runs}"], "config.json is missing"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_measured(
    rows, options, message, held_out_command, runs, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("axolotl_medusa.terminal.commands.evaluate", lambda *_: pytest.fail("it was measured"))
    tokenizer = make_tokenizer("none")
    (tmp_path / "held_out.jsonl").write_text(rows)
    if not options:
        monkeypatch.setattr("axolotl_medusa.decoding.load_decoder.load_tokenizer", lambda *_, **__: tokenizer)
    options = [option.format(runs=runs) for option in options]
    assert message in run(capsys, *held_out_command, tmp_path / "held_out.jsonl", *options, status=1).err


@pytest.fixture(scope="module")
def on_adapter(runs):
    """Runs that began with the adapter of `medusa-2`: one of Medusa-1, one that trained it further, one that merged it."""
    adapter = runs / "medusa-2"
    yaml = {"lora_model_dir": str(adapter), "adapter": "lora"}
    further = add_lora(varied_model(**VOCABULARY), targets=["q_proj", "v_proj"])
    as_if_trained(further)
    as_if_trained(further)
    directory = runs / "on-adapter"
    write_run(directory / "medusa-1", varied_model(**VOCABULARY), "medusa-1", runs / "base", yaml=yaml)
    write_run(directory / "further", further, "medusa-2", runs / "base", yaml=yaml)
    merged = further.merge_and_unload()
    del merged.medusa_heads
    write_run(directory / "merged", merged, "medusa-2", runs / "base", yaml=yaml)
    for folder in directory.rglob("tokenizer.json"):
        make_tokenizer("zephyr").save_pretrained(folder.parent)
    return directory


def test_medusa_1_on_an_adapter_left_the_model_as_it_was(on_adapter, runs, capsys, tmp_path):
    run(
        capsys, "evaluate", on_adapter / "medusa-1", "--prompts", runs / "prompts.jsonl", "--max-new-tokens", 2,
        "--limit", 1, "--json", tmp_path / "report.json", "--held-out", runs / "held_out.jsonl",
    )  # fmt: skip
    quality = json.loads((tmp_path / "report.json").read_text())["quality"]
    assert abs(quality["kl"]) < 1e-6 and quality["perplexity"] == quality["original_perplexity"]


@pytest.mark.parametrize("kind", ["further", "merged"])
def test_original_of_an_adapter_that_was_trained_further_has_the_adapter_before(kind, on_adapter, runs):
    tokens = torch.arange(5, 15)[None]
    found = load_original(on_adapter / kind, None, None, torch.device("cpu"))
    expected = PeftModel.from_pretrained(varied_model(**VOCABULARY), runs / "medusa-2").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits)


def test_original_on_the_hub_is_that_of_the_runs_revision(runs, tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(runs / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    full = varied_model(**VOCABULARY)
    as_if_trained(full)
    write_run(tmp_path / "full", full, "medusa-2", "org/model", yaml={"revision_of_model": "v2"})
    for original in (None, "org/other"):
        assert load_original(tmp_path / "full", None, original, torch.device("cpu")) is not None
    assert asked == [("org/model", "v2"), ("org/other", None)]


def test_original_of_an_export_is_not_the_model_that_it_is_served_with(runs, tmp_path):
    export(find_source(runs / "medusa-2"), "tgi", tmp_path / "out", model="merged")
    tokens = torch.arange(5, 15)[None]
    found = load_original(tmp_path / "out", None, None, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, varied_model(**VOCABULARY).eval()(tokens).logits)


def test_original_of_an_adapter_is_not_loaded_a_second_time(runs):
    assert load_original(runs / "medusa-2", None, None, torch.device("cpu")) is None


def test_original_in_bf16_is_compared_in_fp32_where_a_cpu_is_slow_with_it(runs, tmp_path, monkeypatch):
    """As the trained model is: the divergence of the two would else be that of rounding."""
    varied_model(**VOCABULARY).to(torch.bfloat16).save_pretrained(tmp_path)
    for is_fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("axolotl_medusa.decoding.default_dtype.multiplies_bf16", lambda is_fast=is_fast: is_fast)
        assert load_original(runs / "medusa-1", None, str(tmp_path), torch.device("cpu")).dtype == dtype


def test_evaluate_says_that_matplotlib_is_missing_before_it_measures(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    printed = run(capsys, "evaluate", "nowhere", "--prompts", "none", "--plots", "dir", status=1)
    assert printed.err == (
        "axolotl-medusa evaluate: error: plots need matplotlib, which is not installed: pip install matplotlib\n"
    )


def test_evaluate_hands_its_report_to_the_plots(runs, capsys, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("axolotl_medusa.terminal.commands.check_matplotlib", lambda: None)
    monkeypatch.setattr(
        "axolotl_medusa.terminal.commands.write_plots", lambda report, to: given.append((report, to)) or ["a.png"]
    )
    options = ["--max-new-tokens", 3, "--limit", 1, "--plots", tmp_path]
    out = run(capsys, "evaluate", runs / "medusa-1", "--prompts", runs / "prompts.jsonl", *options).out
    assert out.endswith("plot: a.png\n")
    assert given[0][1] == str(tmp_path) and given[0][0]["overall"]["prompts"] == 1


def test_tree_writes_a_tree_that_evaluate_reads(runs, capsys, tmp_path):
    out = run(
        capsys, "tree", runs / "medusa-1", "--calibration", runs / "prompts.jsonl", "--nodes", 6,
        "--out", tmp_path / "tree.json", "--max-new-tokens", 12,
    ).out  # fmt: skip
    facts = json.loads((tmp_path / "tree.json").read_text())
    tree = read_tree(tmp_path / "tree.json")
    assert facts["num_nodes"] == tree.num_nodes <= 6
    lengths = facts["expected_acceptance_lengths"]
    assert lengths == sorted(lengths) and lengths[0] == 1
    assert facts["expected_acceptance_length"] == lengths[tree.num_nodes - 1]
    assert {"versions", "hardware", "step_ratios", "plain_step_s", "reasons", "calibration"} <= facts.keys()
    table = out.splitlines()
    assert table[0].split() == ["nodes", "expected", "acceptance", "length", "step", "/", "plain", "step"]
    assert [row.split()[0] for row in table[1 : 1 + len(lengths)]] == [str(n) for n in range(1, len(lengths) + 1)]
    assert facts["reasons"][-1] in table
    assert facts["calibrated_on"] == 2 and len(facts["checked_on"]) == bool(facts["measured_speed_ups"])
    for nodes, speed_up in facts["measured_speed_ups"].items():
        assert f"{nodes} nodes measured: {speed_up:.3f} x plain on 1 held-out prompts (chosen with 2 others)" in table
    assert table[-1] == f"written to {tmp_path / 'tree.json'}: {tree.num_nodes} nodes, depth {tree.depth}"
    run(
        capsys, "evaluate", runs / "medusa-1", "--prompts", runs / "prompts.jsonl", "--limit", 1,
        "--tree", tmp_path / "tree.json", "--max-new-tokens", 3,
    )  # fmt: skip


@pytest.mark.parametrize("tree", ["none", "chain-2", "default"])
def test_generate_prints_the_greedy_answer_with_any_tree(tree, runs, capsys):
    tokenizer = make_tokenizer("zephyr")
    prompt = tokenizer("<|user|>\nHi</s>\n", return_tensors="pt").input_ids
    new = varied_model(**VOCABULARY).generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
    printed = run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--tree", tree, "--max-new-tokens", 9)
    assert printed.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert printed.err.splitlines()[-1].startswith("[9 tokens, ")


def test_tree_is_chosen_where_none_is_named_and_the_reason_said(runs, capsys, monkeypatch):
    chosen = []
    begin = TreeChooser.begin
    monkeypatch.setattr(TreeChooser, "begin", lambda self, new: chosen.append(new) or begin(self, new))
    printed = run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--max-new-tokens", 9)
    speed = printed.err.splitlines()[-1]
    assert speed.startswith("[9 tokens, ") and speed.endswith(
        "; plain decoding: too little text to see what a tree would gain]"
    )
    assert (
        printed.out
        == run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--max-new-tokens", 9, "--tree", "none").out
    )
    out = run(capsys, "demo", runs / "medusa-1", "--prompt", "Hi", "--max-new-tokens", 8).out.splitlines()
    assert out[-2].startswith("Medusa: 8 tokens, ") and "; plain decoding: too little text" in out[-2]
    lines = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert "; plain decoding: too little text" in run(capsys, "chat", runs / "medusa-1", "--max-new-tokens", 5).out
    assert chosen == [9, 8, 8, 5], "the demo warms both decoders up"


def test_tree_beside_the_heads_is_considered(runs, capsys, tmp_path, monkeypatch):
    shutil.copytree(runs / "medusa-1", tmp_path / "run")
    tree = Tree(((0,), (1,), (2,)))
    write_tree(tmp_path / "run" / "tree.json", tree, expected_acceptance_length=1.9)
    begun = []
    monkeypatch.setattr(TreeChooser, "begin", lambda chooser, _: begun.append(chooser._lengths[tree].mean))
    run(capsys, "generate", tmp_path / "run", "--prompt", "Hi", "--max-new-tokens", 9)
    assert begun == [pytest.approx(1.9)]


def test_paths_of_a_home_directory_are_those_of_their_owner(runs, capsys, tmp_path, monkeypatch):
    """Shells leave `~` as it is behind `=`, and Python has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "medusa-1", tmp_path / "run")
    for name in ("prompts.jsonl", "held_out.jsonl"):
        shutil.copyfile(runs / name, tmp_path / name)
    tree = Tree(((0,), (1,), (2,)))
    write_tree("~/run/tree.json", tree, expected_acceptance_length=1.9)
    assert MedusaModel.from_pretrained("~/run")._tuned == {tree: 1.9}
    run(
        capsys, "evaluate", "~/run", "--prompts=~/prompts.jsonl", "--limit=1", "--max-new-tokens=2", "--json=~/a.json",
        "--tree=~/run/tree.json", "--held-out=~/held_out.jsonl", f"--original={runs / 'base'}",
    )  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text())["overall"]["prompts"] == 1
    run(capsys, "export", "~/run", "--to=vllm", "--out=~/out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "~").exists()


def test_generate_with_an_adapter_is_the_adapted_models_answer(runs, capsys):
    one, other = (
        run(capsys, "generate", runs / name, "--prompt", "Hi", "--max-new-tokens", 20).out
        for name in ("medusa-1", "medusa-2")
    )
    assert one != other


def test_temperature_reaches_sampling(runs, capsys):
    torch.manual_seed(0)
    command = ["generate", runs / "medusa-1", "--prompt", "Hi", "--max-new-tokens", 9, "--temperature"]
    greedy = run(capsys, *command, 0).out
    assert {run(capsys, *command, 3.0).out for _ in range(2)} != {greedy}
    assert "temperature is -1.0, expected 0" in run(capsys, *command, -1, status=1).err


def test_chat_answers_in_colour_on_a_terminal_only(runs, capsys, monkeypatch):
    coloured = []
    for terminal in (False, True):
        lines = iter(["Hi", "/exit"])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(
            "axolotl_medusa.terminal.commands.Chat.run", lambda self: coloured.append(self.answerer.colour)
        )
        run(capsys, "chat", runs / "medusa-1", "--max-new-tokens", 5)
    assert coloured == [False, True]


def test_chat_reads_the_terminal(runs, capsys, monkeypatch):
    lines = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    out = run(capsys, "chat", runs / "medusa-1", "--max-new-tokens", 5).out
    assert "[5 tokens, " in out and "acceptance length" in out


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("--load-in-8bit", {"threshold": 0.0}), ("--load-in-4bit", {"quant_type": "nf4"})],
)
def test_quantization_reaches_the_loader(option, wanted, runs, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    given = {}

    def refuse(heads, base_model, dtype, device, **options):
        given.update(options, base_model=base_model)
        raise ValueError("far enough")

    monkeypatch.setattr(MedusaModel, "from_pretrained", refuse)
    base = str(runs / "base")
    run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", option, "--base-model", base, status=1)
    config = given["quantization_config"]
    assert given["base_model"] == base
    assert (config.load_in_8bit, config.load_in_4bit) == (option == "--load-in-8bit", option == "--load-in-4bit")
    assert config.llm_int8_threshold == wanted.get("threshold", config.llm_int8_threshold)
    assert config.bnb_4bit_quant_type == wanted.get("quant_type", config.bnb_4bit_quant_type)


def test_8_bit_text_with_outliers_does_not_depend_on_the_tree(runs, capsys):
    """Activations far above bitsandbytes' default threshold of 6, which would take other columns for every tree."""
    pytest.importorskip("bitsandbytes")
    base = varied_model(**VOCABULARY)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.input_layernorm.weight.mul_(8)
            layer.post_attention_layernorm.weight.mul_(8)
    directory = runs / "outliers"
    write_run(directory / "run", base, "medusa-1", save_base(directory / "base", base))
    for folder in ("base", "run", "run/medusa_heads"):
        make_tokenizer("zephyr").save_pretrained(directory / folder)
    command = [
        "generate",
        directory / "run",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        40,
        "--load-in-8bit",
        "--dtype",
        "fp32",
    ]
    texts = {run(capsys, *command, "--tree", tree).out for tree in ("none", "chain", "default")}
    assert len(texts) == 1


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_compile_reaches_the_decoder(command, runs, capsys, monkeypatch):
    compiled = []

    class Compiled:
        def __init__(self, model, backend):
            compiled.append(backend)
            raise RuntimeError("nothing can be compiled")

    monkeypatch.setattr("axolotl_medusa.decoding.medusa_model.CompiledBackbone", Compiled)
    monkeypatch.setattr("builtins.input", lambda _: "Hi")
    options = {"generate": ["--prompt", "Hi"], "evaluate": ["--prompts", runs / "prompts.jsonl"], "chat": []}[command]
    error = run(capsys, command, runs / "medusa-1", *options, "--compile", status=1).err
    assert error.endswith(f"axolotl-medusa {command}: error: nothing can be compiled\n")
    assert compiled == ["inductor"]


def test_compiled_decoding_tries_no_tree_and_says_why(runs, capsys, monkeypatch):
    given = []

    def stop(self, *_, tree, compile, **__):
        given.append((tree.num_nodes, compile))
        raise ValueError("far enough")

    monkeypatch.setattr(MedusaModel, "generate", stop)
    error = run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--compile", status=1).err
    assert "[plain decoding: a compiled forward has one tree for all steps, so none is tried" in error
    run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--compile", "--tree", "default", status=1)
    assert given == [(1, True), (64, True)]


@pytest.mark.parametrize(("option", "dtype"), [("auto", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_dtype_reaches_the_loader(option, dtype, runs, capsys, tmp_path):
    run(
        capsys, "evaluate", runs / "medusa-1", "--prompts", runs / "prompts.jsonl", "--limit", 1, "--max-new-tokens", 2,
        "--dtype", option, "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["model"]["dtype"] == dtype


def test_demo_shows_both_texts_and_the_speed_up(runs, capsys):
    out = run(capsys, "demo", runs / "medusa-1", "--prompt", "Hi", "--max-new-tokens", 8).out.splitlines()
    assert out[0].split() == ["plain", "|", "Medusa"]
    assert out[-3].startswith("plain: 8 tokens, ") and out[-2].startswith("Medusa: 8 tokens, ")
    assert out[-1].startswith("speed-up: ") and out[-1].endswith("x plain decoding, the same text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "{runs}/medusa-1", "--prompt", "x" * 200], "tokens, but the model's context has 128: shorten it"),
        (["generate", "{runs}/none", "--prompt", "Hi"], "is not a directory: expected an output_dir"),
        (["generate", "{runs}/medusa-1", "--prompt", "Hi", "--tree", "oak"], "unknown tree oak: expected none, chain"),
        (["generate", "{runs}/medusa-1", "--prompt", "x" * 200], "tokens, but the model's context has 128: shorten it"),
        (["generate", "{runs}/medusa-1", "--prompt", "Hi", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "{runs}/medusa-1", "--prompt", "Hi", "--base-model", "{runs}/other"], "is another than the one"),
        (["generate", "{runs}/medusa-1", "--prompt", "Hi", "--load-in-8bit", "--load-in-4bit"], "both 8-bit and 4-bit"),
        (["evaluate", "{runs}/medusa-1", "--prompts", "none.jsonl"], "none.jsonl cannot be read"),
        (["tree", "{runs}/medusa-1", "--calibration", "{runs}/prompts.jsonl", "--out", "t", "--nodes", "0"],
         "a tree of 0 nodes was asked for"),
        (["evaluate", "{runs}/medusa-1", "--prompts", "{runs}/prompts.jsonl", "--held-out", "{runs}/held_out.jsonl",
          "--original", "{runs}/none", "--limit", "1", "--max-new-tokens", "2"], "the original model"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(arguments, message, runs, capsys):
    if not (runs / "other").exists():
        save_base(runs / "other", make_model(seed=3, **VOCABULARY))
        make_tokenizer("zephyr").save_pretrained(runs / "other")
    error = run(capsys, *(part.format(runs=runs) for part in arguments), status=1).err.splitlines()[-1]
    assert error.startswith(f"axolotl-medusa {arguments[0]}: error: ")
    assert message in error


def test_missing_bitsandbytes_is_one_line(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    printed = run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--load-in-8bit", status=1)
    assert printed.err.splitlines()[-1].endswith("8-bit and 4-bit models need bitsandbytes: pip install bitsandbytes")


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_missing_package_of_quantized_models_is_one_line(package, runs, capsys, monkeypatch):
    for name in ("bitsandbytes", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None if name == package else types.ModuleType(name))
    printed = run(capsys, "generate", runs / "medusa-1", "--prompt", "Hi", "--load-in-8bit", status=1)
    assert printed.err.splitlines()[-1].endswith(f"8-bit and 4-bit models need {package}: pip install {package}")


@pytest.mark.parametrize("recipe", ["medusa-1", "medusa-2"])
def test_calibrate_writes_what_the_drafter_reads(recipe, runs, capsys):
    arguments = ["--prompts", runs / "prompts.jsonl", "--limit", 2, "--max-new-tokens", 8]
    out = run(capsys, "calibrate", runs / recipe, *arguments).out
    heads_dir = find_source(runs / recipe).heads_dir
    calibration = read_plan(heads_dir).calibration
    assert len(calibration.heads) == find_source(runs / recipe).config["medusa_num_heads"]
    assert sum(calibration.heads[0].drafts) == 2 * 7  # all but the last of 8 tokens have one after them
    assert calibration.facts["prompts"] == 2
    assert "head 0: 14 drafts" in out
    assert f"written to {heads_dir}" in out


def test_calibrate_without_answers_ends_in_one_line(runs, capsys):
    error = run(
        capsys, "calibrate", runs / "medusa-1", "--prompts", runs / "prompts.jsonl", "--max-new-tokens", 1, status=1
    ).err
    assert "too short to count drafts in" in error

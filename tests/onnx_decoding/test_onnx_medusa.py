"""Decoding in ONNX Runtime writes what torch's greedy decoding writes, without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from example_tokenizers import make_tokenizer
from onnx_directories import HEADS, greedy, known_prompts, model_with_heads
from scipy.stats import chisquare

from axolotl_medusa.cli import main
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.measuring.calibration import head_ranks
from axolotl_medusa.measuring.onnx_runs import onnx_head_ranks
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.onnx_decoding.sessions import check_provider, open_session

PROMPTS = [*known_prompts(4), [7]]
PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
TREES = {
    "plain": Tree(),
    "chain": chain(HEADS),
    "8": default_tree(HEADS, 8),
    "64": default_tree(HEADS, 64),
    "auto": "auto",
}


@pytest.fixture(scope="module")
def expected(llama):
    return [greedy(llama[0], prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("tree", TREES)
def test_greedy_tokens_are_torchs(llama, expected, tree):
    found = [llama[1].generate([prompt], 24, tree=TREES[tree])[0][0] for prompt in PROMPTS]
    assert found == expected


def test_trees_accept_drafts(llama):
    _, stats = llama[1].generate([PROMPTS[0]], 24, tree=TREES["8"])
    assert stats.acceptance_length > 1.2
    assert stats.emitted_tokens == 24 and stats.batch_forwards == stats.forward_passes < 24


@pytest.mark.parametrize("tree", ["plain", "chain", "64"])
def test_rows_of_a_batch_are_decoded_as_they_are_alone(llama, expected, tree):
    found, stats = llama[1].generate(PROMPTS, 24, tree=TREES[tree])
    assert found == expected
    assert stats.batch_forwards < stats.forward_passes


def test_rows_stop_at_their_own_end_of_text(llama, expected):
    eos = expected[0][5]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert llama[1].generate(PROMPTS, 24, tree=chain(HEADS), eos_token_id=eos)[0] == cut
    assert len(cut[0]) <= 6


def test_cache_grows_beyond_its_first_columns(llama):
    model, medusa = llama
    prompt = [3 + place % 50 for place in range(60)]
    assert medusa.generate([prompt], 66, tree=default_tree(HEADS, 32))[0][0] == greedy(model, prompt, 66)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_prompts_are_forwarded_in_pieces(llama, expected, monkeypatch, at_once):
    monkeypatch.setattr("axolotl_medusa.onnx_decoding.decoding._TOKENS_AT_ONCE", at_once)
    assert llama[1].generate(PROMPTS, 24, tree=chain(HEADS))[0] == expected


def test_drafts_that_are_unsure_are_not_verified(llama, expected):
    medusa = llama[1]
    sizes = []
    medusa.heads.least_probability = 0.05
    try:
        decoding = medusa.decoding([PROMPTS[0]], default_tree(HEADS, 16), 24)
        while decoding.rows:
            decoding.step()
            sizes.append(decoding.verified.num_nodes)
    finally:
        medusa.heads.least_probability = 0.0
    assert decoding.tokens[0] == expected[0]
    assert max(sizes[1:]) < 16 and min(sizes[1:]) < max(sizes[1:])


def test_text_streams_step_by_step(llama, expected):
    class Streamer:
        def __init__(self):
            self.steps, self.ended = [], 0

        def put(self, value):
            self.steps.append(value.tolist())

        def end(self):
            self.ended += 1

    streamer = Streamer()
    llama[1].generate([PROMPTS[0]], 24, tree=chain(HEADS), streamer=streamer)
    assert streamer.steps[0] == [PROMPTS[0]] and streamer.ended == 1
    assert [token for step in streamer.steps[1:] for token in step] == expected[0]


@pytest.mark.parametrize("number", [0, 1])
def test_code_of_the_page_writes_the_models_text(llama_directory, number, capsys):
    model, directory = llama_directory
    code = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text(encoding="utf-8"))[number]
    exec(code.replace('"DIR', f'"{directory}'), {})
    tokenizer = make_tokenizer("zephyr")
    prompt = tokenizer("The capital of France is")["input_ids"]
    text = greedy(model, prompt, 20)
    whole = f"{tokenizer.decode(text)} " if number == 0 else tokenizer.decode(prompt + text, skip_special_tokens=True)
    assert capsys.readouterr().out.startswith(whole)


FALSE_ALARM = 1e-4
"""Chance that the chi-square test would fail with a correct sampler and another seed."""


def test_sampling_with_a_tree_draws_from_the_models_distribution(llama):
    model, medusa = llama
    prompt = PROMPTS[0]
    drawn = Counter(
        medusa.generate([prompt], 2, tree=chain(HEADS), do_sample=True, temperature=1.5, seed=seed)[0][0][1]
        for seed in range(400)
    )
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 1.5, -1)
        texts = torch.cat([torch.tensor([prompt]).expand(len(first), -1), torch.arange(len(first))[:, None]], -1)
        second = first @ torch.softmax(model(texts).logits[:, -1] / 1.5, -1)
    shares, counts = [0.0], [0]
    for token in second.argsort(descending=True).tolist():  # groups of tokens with a tenth of the draws or more each
        if shares[-1] >= 0.1:
            shares, counts = [*shares, 0.0], [*counts, 0]
        shares[-1] += float(second[token])
        counts[-1] += drawn[token]
    assert len(shares) > 4
    assert chisquare(counts, [400 * share / sum(shares) for share in shares]).pvalue > FALSE_ALARM


def test_typical_acceptance_takes_more_than_greedy_does(llama):
    _, strict = llama[1].generate([PROMPTS[0]], 40, tree=TREES["64"])
    _, typical = llama[1].generate(
        [PROMPTS[0]], 40, tree=TREES["64"], acceptance="typical", temperature=2.0, epsilon=0.01, delta=0.01
    )
    assert typical.acceptance_length > strict.acceptance_length


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[5] * 120], {"max_new_tokens": 20}, "set max_new_tokens to at most 8"),
        ([[5, 300]], {}, "token id 300, expected 0 to 299"),
        ([[5]], {"tree": "chain-3"}, "tree has depth 3, but there are 2 heads"),
        ([[5]], {"do_sample": True, "acceptance": "greedy"}, "sampling takes"),
        ([[5], [6]], {"streamer": object()}, "a streamer takes one prompt"),
    ],
)
def test_what_cannot_be_decoded_is_refused(llama, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        llama[1].generate(prompts, **options)


def test_command_generates_without_torch_and_transformers(llama_directory):
    model, directory = llama_directory
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "axolotl"):
            raise ImportError("No module named " + name)

sys.meta_path.insert(0, Blocker())
from axolotl_medusa.cli import main
sys.exit(main(["generate", {str(directory)!r}, "--prompt", "Hi", "--max-new-tokens", "8"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tokenizer = make_tokenizer("zephyr")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert run.stdout == tokenizer.decode(greedy(model, prompt, 8), skip_special_tokens=True) + "\n"
    assert "8 tokens" in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.fixture
def prompts_file(tmp_path):
    rows = [{"id": str(number), "prompt": text} for number, text in enumerate(("Hi", "No?", "a b c", "Why"))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "prompts.jsonl")


def test_commands_measure_and_tune(llama_directory, prompts_file, tmp_path, capsys):
    directory = str(llama_directory[1])
    report = tmp_path / "report.json"
    options = ["--max-new-tokens", "16", "--limit", "4"]
    assert (
        main(["evaluate", directory, "--prompts", prompts_file, "--json", str(report), "--tree=default-8", *options])
        == 0
    )
    found = json.loads(report.read_text())
    decoders = found["overall"]["decoders"]
    assert [decoders[name]["agreement"] for name in ("plain", "chain", "tree")] == [1.0, 1.0, 1.0]
    assert decoders["plain"]["acceptance_length"] == 1.0 <= decoders["tree"]["acceptance_length"]
    assert [head["positions"] for head in found["overall"]["heads"]] == [60, 56]
    assert found["model"]["dtype"] == "fp32" and found["steps"]["ratios"]["1"] == 1.0
    tree = str(tmp_path / "tree.json")
    assert main(["tree", directory, "--calibration", prompts_file, "--out", tree, "--nodes", "8", *options]) == 0
    assert "written to" in capsys.readouterr().out
    written = json.loads((tmp_path / "tree.json").read_text())
    assert 0 <= written["least_probability"] < 1 and written["step_ratios"]["1"] == 1.0
    assert main(["generate", directory, "--prompt", "Hi", "--tree", tree, "--max-new-tokens", "8"]) == 0
    (tmp_path / "tree.json").write_text(json.dumps({**written, "least_probability": 2}))
    assert main(["generate", directory, "--prompt", "Hi", "--tree", tree]) == 1
    assert "least_probability is 2, expected a number from 0 to 1" in capsys.readouterr().err
    assert main(["demo", directory]) == 1
    assert "is an ONNX directory, which demo does not take" in capsys.readouterr().err


def test_ranks_of_an_answer_are_those_of_torch(llama):
    model, medusa = llama
    _, heads = model_with_heads(tokenizer=True, eos_token_id=None)
    continuation = greedy(model, PROMPTS[0], 20)
    theirs = head_ranks(MedusaModel(model, heads), PROMPTS[0], continuation, 5)
    ours = onnx_head_ranks(medusa, PROMPTS[0], continuation, 5)
    same = [
        one == other for row, others in zip(ours, theirs, strict=True) for one, other in zip(row, others, strict=True)
    ]
    assert ours[-1] == [ours[-1][0], -1] and sum(same) >= len(same) - 2  # the heads' output layers are int8 here
    assert len({rank for row in ours for rank in row}) > 3


@pytest.fixture
def damaged(llama_directory, tmp_path):
    shutil.copytree(llama_directory[1], tmp_path / "out")
    return tmp_path / "out"


def test_damaged_directories_are_one_line(damaged, capsys):
    def line() -> str:
        assert main(["generate", str(damaged), "--prompt", "Hi"]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    whole = {file.name: file.read_bytes() for file in damaged.iterdir()}
    about = json.loads(whole["medusa_onnx.json"])
    for name in ("model.onnx.data", "medusa_head_1.onnx"):
        (damaged / name).unlink()
        assert f"has no {name}" in line()
        (damaged / name).write_bytes(whole[name][:-9])
        assert f"{name} has {len(whole[name]) - 9:,} bytes, expected {len(whole[name]):,}" in line()
        (damaged / name).write_bytes(whole[name])
    (damaged / "model.onnx").write_bytes(bytes(len(whole["model.onnx"])))
    assert "model.onnx cannot be opened by onnxruntime" in line()
    (damaged / "model.onnx").write_bytes(whole["model.onnx"])
    for changes, message in (
        ({"format": 2}, "format is 2, expected 1"),
        ({"model": {**about["model"], "layers": -1}}, "layers is -1, expected a whole number"),
        ({"model": {**about["model"], "precision": "int2"}}, "precision is 'int2', expected one of fp32"),
        ({"files": {"../model.onnx": {"bytes": 1}}}, "expected a file and its bytes"),
        ({"files": []}, "files is \\[\\], expected the files".replace("\\", "")),
    ):
        (damaged / "medusa_onnx.json").write_text(json.dumps({**about, **changes}))
        assert message in line()
    (damaged / "medusa_onnx.json").unlink()
    assert "has no medusa_onnx.json: expected what `axolotl-medusa export --to onnx` writes" in line()
    (damaged / "medusa_onnx.json").write_bytes(whole["medusa_onnx.json"])
    (damaged / "tokenizer.json").write_text("{}")
    assert "is no tokenizer that can be loaded" in line()
    (damaged / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in line()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bf16"], "--dtype bf16 with the ONNX directory"),
        (["--load-in-4bit"], "--load-in-4bit with the ONNX directory"),
        (["--compile"], "--compile with the ONNX directory"),
        (["--provider", "openvino"], "this onnxruntime has no openvino provider (it has cpu"),
        (["--tree", "chain-5"], "tree has depth 5, but there are 2 heads"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(llama_directory, capsys, arguments, message):
    assert main(["generate", str(llama_directory[1]), "--prompt", "Hi", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_provider_is_for_onnx_directories(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "Hi", "--provider", "cpu"]) == 1
    assert "--provider is for ONNX directories" in capsys.readouterr().err


def test_quantized_weights_are_refused_where_there_is_no_operator_for_them():
    with pytest.raises(ValueError, match="the OpenVINO provider has no operator for int4 weights"):
        check_provider("openvino", "int4")


def test_operator_that_the_runtime_lacks_is_one_line(tmp_path):
    from onnx import TensorProto, helper, save

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="com.microsoft")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match="lacks an operator"):
        open_session(tmp_path / "model.onnx")


def test_missing_onnxruntime_says_what_to_install(llama_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"pip install 'axolotl-medusa\[onnx\]'"):
        OnnxMedusa.from_pretrained(llama_directory[1])


def test_heads_rank_known_tokens(llama):
    medusa = llama[1]
    hidden = np.random.default_rng(0).normal(size=(3, 1, 32)).astype(np.float32)
    best = [medusa.heads.best(1, state, 10)[0][0].tolist() for state in hidden]
    tokens = [[0, best[0][0]], [0, best[1][4]], [0, next(t for t in range(300) if t not in best[2])]]
    assert [row[1] for row in medusa.heads.ranks(list(hidden), tokens)] == [0, 4, 10]

"""Exports to ONNX are the model that was trained, and say so themselves."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import onnx
import pytest
from exports import trained
from onnx_directories import exported, greedy, known_prompts

from axolotl_medusa.cli import main
from axolotl_medusa.decoding.load_target import load_source
from axolotl_medusa.decoding.tree import Tree, default_tree
from axolotl_medusa.onnx_decoding.directory import check_digests, read_about
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.onnx_export import verify
from axolotl_medusa.onnx_export.export import export_onnx
from axolotl_medusa.onnx_export.graphs import quantize
from axolotl_medusa.onnx_export.verify import expected_of, verify_onnx
from axolotl_medusa.serving.export_files import replaced_files

FAMILIES = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "mistral-sliding": {"family": "mistral", "sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2-softcap": {"sliding_window": 6},
    "phi-lm-head-bias": {},
    "phi3": {},
    "cohere-logit-scale": {},
    "granite-logits-scaling": {},
    "gpt2": {},
}


def without_tokenizer(source):
    while files := source.tokenizer_files():
        for file in files:
            file.unlink()
    return source


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Medusa-2 with LoRA and heads that share lm_head: the adapter is merged on the way."""
    directory = tmp_path_factory.mktemp("lora")
    source = without_tokenizer(trained(directory, "medusa-2", num_heads=1, adapter={}))
    return source, directory / "out", export_onnx(source, directory / "out")


def test_model_with_its_adapter_is_what_was_trained(lora):
    source, out, line = lora
    assert line.endswith("equal to torch's for 3 of 3 prompts, with a tree equal to plain for 3")
    model = load_source(source).eval()
    prompt = [5, 9, 17, 4]
    assert OnnxMedusa.from_pretrained(out).generate([prompt], 20, eos_token_id=[])[0] == [greedy(model, prompt, 20)]


def test_directory_says_what_it_is(lora):
    source, out, _ = lora
    check_digests(out)
    about, written = read_about(out), json.loads((out / "medusa_onnx.json").read_text())
    assert (about.precision, about.layers, about.num_heads, about.vocab_size) == ("fp32", 2, 1, 131)
    assert written["heads_precision"] == "int8" and written["base_model"] == source.base_model
    assert json.loads((out / "medusa_meta.json").read_text())["export"]["target"] == "onnx"
    assert "axolotl-medusa generate" in (out / "README.md").read_text()
    assert {*replaced_files(out), out / "medusa_meta.json"} == set(out.iterdir())
    assert {file.name for file in out.iterdir()} == {
        *("model.onnx", "model.onnx.data", "medusa_head_0.onnx", "medusa_onnx.json"),
        *("medusa_meta.json", "config.json", "README.md"),
    }


def test_flipped_bit_is_found(lora, tmp_path):
    out = shutil.copytree(lora[1], tmp_path / "out")
    content = bytearray((out / "model.onnx.data").read_bytes())
    content[1000] ^= 1
    (out / "model.onnx.data").write_bytes(content)
    read_about(out)
    with pytest.raises(ValueError, match=r"model.onnx.data is damaged"):
        check_digests(out)


def test_verification_finds_another_model(lora, monkeypatch):
    source, out, _ = lora
    model = load_source(source).eval().merge_and_unload()
    heads = OnnxMedusa.from_pretrained(out)
    expected = expected_of(model, _Sized(heads.about.vocab_size), [])
    verify_onnx(out, expected)
    changed = replace(expected, logits=[*expected.logits[:2], expected.logits[2] + 0.1])
    with pytest.raises(ValueError, match="gives other logits than torch"):
        verify_onnx(out, changed)
    monkeypatch.setattr(verify, "_difference", lambda *_: 0.0)
    changed = replace(expected, tokens=[expected.tokens[0], [7] * 24, expected.tokens[2]])
    with pytest.raises(ValueError, match="writes other greedy tokens with plain than torch: prompt 1"):
        verify_onnx(out, changed)


class _Sized:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_model_writes_the_same_with_and_without_a_tree(lora, tmp_path, bits):
    out = shutil.copytree(lora[1], tmp_path / "out")
    quantize(out / "model.onnx", bits, data_file="model.onnx.data")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    matrices = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(matrices) == 2 * 7 + 1
    assert all(attribute.i == bits for node in matrices for attribute in node.attribute if attribute.name == "bits")
    onnx.checker.check_model(str(out / "model.onnx"))
    about = json.loads((out / "medusa_onnx.json").read_text())
    for name in ("model.onnx", "model.onnx.data"):
        about["files"][name]["bytes"] = (out / name).stat().st_size
    (out / "medusa_onnx.json").write_text(json.dumps(about))
    small, whole = OnnxMedusa.from_pretrained(out), OnnxMedusa.from_pretrained(lora[1])
    texts = [[model.generate([prompt], 12, tree=tree, eos_token_id=[])[0][0] for prompt in known_prompts(3, 131)]
             for model, tree in ((small, Tree()), (small, default_tree(1, 4)), (whole, Tree()))]  # fmt: skip
    assert texts[0] == texts[1]
    assert sum(one[:2] == other[:2] for one, other in zip(texts[0], texts[2], strict=True)) >= (3 if bits == 8 else 1)


def test_what_is_not_to_be_written_is_refused(lora, tmp_path, capsys, monkeypatch):
    source, out, _ = lora
    with pytest.raises(ValueError, match="--precision is fp8, expected one of fp32, int8, int4"):
        export_onnx(source, tmp_path, "fp8")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty, expected a new directory or an earlier export"):
        export_onnx(source, tmp_path, verify=False)
    arguments = ["export", str(source.output_dir), "--out", str(tmp_path / "new"), "--to"]
    assert main([*arguments, "vllm", "--precision", "int8"]) == 1
    assert "--precision and --heads-precision are for --to onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([*arguments, "onnx"]) == 1
    assert "exporting to ONNX needs onnxscript" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_families_write_what_torch_writes(family, tmp_path):
    options = {"family": family, **FAMILIES[family]}
    model, out = exported(tmp_path, verify=True, eos_token_id=None, **options)
    medusa = OnnxMedusa.from_pretrained(out)
    prompts = known_prompts(4, 131)
    expected = [greedy(model, prompt, 40) for prompt in prompts]
    for tree in ("none", "chain", "default-8", "default-16", "default-64", "auto"):
        found = [medusa.generate([prompt], 40, tree=tree) for prompt in prompts]
        assert [tokens for (tokens,), _ in found] == expected, tree
    assert medusa.generate(prompts, 40, tree="default-16")[0] == expected
    assert max(stats.acceptance_length for _, stats in found) >= 1

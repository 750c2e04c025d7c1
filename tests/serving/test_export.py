"""Exports: golden listings, what is refused before anything is written, and where each part of an export lies."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_model
from exports import CASES, FORMS, HEADS, IN_MODEL_FILES, edit_json, exported, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_outputs import as_torch_files, save_base, write_run
from transformers import AutoModelForCausalLM

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import heads_config
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.model.tensor_files import TensorFiles
from axolotl_medusa.serving import export as export_module
from axolotl_medusa.serving.export import export
from axolotl_medusa.serving.format_rules import TARGETS, refusal
from axolotl_medusa.serving.import_heads import import_heads

LISTINGS = Path(__file__).parents[1] / "data" / "export_listings"
LORA = {"targets": "all-linear"}
LORA_ON_HEAD = {"targets": ["q_proj", "lm_head"]}


def listing(directory: Path, root: Path) -> str:
    """Every file of an export, with a line per tensor or config key; paths below `root` are shortened."""
    lines = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        lines.append(f"{file.relative_to(directory)}")
        if file.suffix in {".safetensors", ".pt"}:
            tensors = TensorFiles.open(file)
            lines += [
                f"  {name}  {str(tensors.dtype(name)).removeprefix('torch.')}  {list(tensors.shape(name))}"
                for name in sorted(tensors)
            ]
        elif file.name == "config.json":
            text = file.read_text().replace(str(root.resolve()), "TMP")
            base, config = json.loads((root / "base" / "config.json").read_text()), json.loads(text)
            if config["model_type"] == base["model_type"]:  # the model's own keys are transformers'
                config = {key: value for key, value in config.items() if base.get(key) != value}
            lines += [f"  {key}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(config.items())]
    return "\n".join(lines) + "\n"


LISTED = {
    **{f"{target}-{form}": (target, {"form": form}) for target, form in CASES},
    "tgi-shared-2-blocks": ("tgi", {"num_layers": 2}),
    "vllm-separate-2-blocks": ("vllm", {"form": "separate", "num_layers": 2}),
    "lorax-unmerged": ("lorax", {"recipe": "medusa-2", "adapter": LORA}),
}


@pytest.mark.parametrize("name", LISTED)
def test_export_has_the_files_tensors_and_keys_of_its_listing(name, tmp_path):
    """A difference that is wanted is written with `UPDATE_LISTINGS=1 pytest tests/test_export.py`, and reviewed."""
    target, options = LISTED[name]
    _, out = exported(tmp_path, target, **options)
    found, file = listing(out, tmp_path), LISTINGS / f"{name}.txt"
    if os.environ.get("UPDATE_LISTINGS"):
        file.write_text(found)
    assert found == file.read_text()


@pytest.mark.parametrize("target", FORMS)
def test_heads_of_a_draft_vocabulary_with_output_layers_of_their_own_are_refused(target):
    heads = MedusaHeads(HIDDEN, VOCAB, HEADS.get(target, 3), form="trained", draft_vocab=40)
    served = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN}
    line = refusal(TARGETS[target], heads_config(heads, "org/base"), served, "out", head_has_bias=False)
    assert line.startswith("found heads that choose among 40 tokens, expected the whole vocabulary")


def test_shared_heads_of_a_draft_vocabulary_are_exported_as_choosing_among_all_tokens(tmp_path):
    model, base = make_model(), save_base(tmp_path / "base", make_model())
    run = write_run(tmp_path / "run", model, "medusa-1", base, "shared", draft_vocab=40)
    export(find_source(run), "vllm", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "token_map" not in tensors and len(tensors["lm_heads.0.weight"]) == VOCAB


def test_every_listing_is_of_a_test():
    assert {file.stem for file in LISTINGS.iterdir()} == set(LISTED)


@pytest.mark.parametrize(("target", "form"), CASES)
def test_export_is_verified_and_says_so(target, form, tmp_path, caplog):
    source = trained(tmp_path, form=form, num_heads=HEADS.get(target, 3))
    with caplog.at_level(logging.INFO):
        export(source, target, tmp_path / "out")
    assert f"was read back as {target} does" in caplog.text
    assert {"README.md", "config.json", "medusa_meta.json", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert list((tmp_path / "out").rglob("*.part")) == []


def test_export_that_serves_other_logits_fails_and_stays(tmp_path, monkeypatch):
    names = export_module._head_tensors

    def swapped(source, target):
        tensors = list(names(source, target))
        tensors[0], tensors[2] = tensors[0]._replace(name=tensors[2].name), tensors[2]._replace(name=tensors[0].name)
        return tensors

    source = trained(tmp_path)
    monkeypatch.setattr(export_module, "_head_tensors", swapped)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.layers\.0\.weight differs from the trained one.*nothing was deleted"
    ):
        export(source, "vllm", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    export(source, "vllm", tmp_path / "out", verify=False)
    monkeypatch.undo()
    export(source, "vllm", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", "fasterdecoding-merged"])
def test_export_of_half_heads_keeps_their_type(target, dtype, tmp_path):
    source = trained(tmp_path)
    file = source.heads_dir / "medusa_lm_head.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    export(find_source(tmp_path / "run"), target, tmp_path / "out")
    weights = TensorFiles.open(tmp_path / "out")
    assert {weights.dtype(name) for name in weights if not name.startswith(("model.", "lm_head."))} == {dtype}


# Medusa-2


@pytest.mark.parametrize("target", [target for target in FORMS if target not in IN_MODEL_FILES])
@pytest.mark.parametrize("adapter", [None, LORA, LORA_ON_HEAD], ids=["full", "lora", "lora-on-lm_head"])
def test_merged_model_lies_beside_the_heads_and_has_their_lm_head(adapter, target, tmp_path):
    source = trained(tmp_path, "medusa-2", num_heads=HEADS.get(target, 3), adapter=adapter)
    export(source, target, tmp_path / "out", model="merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / ("run" if adapter is None else "base"))
    if adapter is not None:
        expected = PeftModel.from_pretrained(expected, tmp_path / "run").merge_and_unload()
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "out" / "merged_model").resolve())
    model_config = (tmp_path / "out" / "merged_model" / "config.json").read_text()
    assert "medusa" not in model_config.lower() and (tmp_path / "out" / "merged_model" / "tokenizer.json").is_file()
    if target in {"vllm", "tgi", "lorax"}:
        written = TensorFiles.open(next((tmp_path / "out").glob("*.safetensors"))).load("lm_heads.0.weight")
        torch.testing.assert_close(written, model.lm_head.weight.detach(), rtol=0, atol=0)
        assert torch.equal(written, make_model().lm_head.weight) == (
            adapter == LORA
        )  # peft's all-linear spares lm_head


@pytest.mark.parametrize("target", sorted(IN_MODEL_FILES))
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_heads_inside_the_model_come_with_the_trained_one(adapter, target, tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=adapter)
    export(source, target, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, make_model().model.layers[0].mlp.up_proj.weight)
    assert not (tmp_path / "out" / "merged_model").exists()


def test_full_model_is_served_from_where_training_wrote_it(tmp_path):
    export(trained(tmp_path, "medusa-2"), "tgi", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "run").resolve())


def test_lorax_gets_adapter_and_heads_in_one_directory(tmp_path):
    export(trained(tmp_path, "medusa-2", adapter=LORA), "lorax", tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained_adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert adapter.keys() == trained_adapter.keys() and adapter
    assert all(torch.equal(tensor, trained_adapter[name]) for name, tensor in adapter.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["version"] == "2" and config["base_model_name_or_path"] == str(tmp_path / "base")
    PeftModel.from_pretrained(make_model(), tmp_path / "out")  # adapter_config.json belongs to it


def test_export_for_lorax_is_decoded_and_exported_again_with_its_adapter(tmp_path):
    source, out = trained(tmp_path, "medusa-2", adapter=LORA), tmp_path / "out"
    export(source, "lorax", out)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        own, found = (MedusaModel.from_pretrained(heads).base_model(tokens).logits for heads in (tmp_path / "run", out))
    assert torch.equal(found, own)
    refused(find_source(out), "tgi", tmp_path / "again", "found heads trained with the adapter in .*/out")
    for name, heads in (("expected", source), ("again", find_source(out))):
        export(heads, "lorax", tmp_path / name, model="merged")
    expected, again = (TensorFiles.open(tmp_path / name / "merged_model") for name in ("expected", "again"))
    assert all(torch.equal(expected.load(name), again.load(name)) for name in expected)


def test_tied_embedding_is_the_shared_output_layer(tmp_path):
    export(trained(tmp_path, family="llama-tied"), "vllm", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["lm_heads.0.weight"]
    assert torch.equal(written, make_model("llama-tied").model.embed_tokens.weight)


# Refusals: nothing is written


def refused(source, target, out, message, **options) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")} if out.exists() else None
    with pytest.raises(ValueError, match=message) as error:
        export(source, target, out, **options)
    assert "\n" not in str(error.value)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")} if out.exists() else None
    assert after == before


def test_what_the_target_cannot_express_is_refused(tmp_path):
    source = trained(tmp_path, num_layers=2)
    refused(source, "lorax", tmp_path / "out", "found 2 residual blocks per head, expected 1")
    refused(source, "vllm", tmp_path / "eagle-7b", "found 'eagle-' in the path")
    refused(source, "sglang", tmp_path / "out", "found the target sglang, expected one of vllm, tgi")


@pytest.mark.parametrize("target", [target for target in FORMS if target not in IN_MODEL_FILES | {"lorax"}])
def test_adapter_that_the_server_would_not_apply_is_refused(target, tmp_path):
    source = trained(tmp_path, "medusa-2", num_heads=HEADS.get(target, 3), adapter=LORA)
    refused(source, target, tmp_path / "out", f"{target} does not serve both; add --model merged")


def test_adapter_with_more_than_lora_is_refused_unmerged(tmp_path):
    source = trained(tmp_path, "medusa-2", adapter={"targets": ["q_proj"], "modules_to_save": ["lm_head"]})
    refused(
        source, "lorax", tmp_path / "out", r"found base_model\.model\.lm_head\.weight in .*nothing but LoRA matrices"
    )
    export(source, "lorax", tmp_path / "out", model="merged")


def test_merged_model_of_an_untouched_base_model_is_refused(tmp_path):
    refused(trained(tmp_path), "vllm", tmp_path / "out", "leave it out and serve that model", model="merged")


def other_model(directory: Path, **changes: object) -> Path:
    make_model(seed=1, **changes).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("target", FORMS)
def test_shared_heads_of_another_lm_head_are_refused(target, tmp_path):
    trained(tmp_path, num_heads=HEADS.get(target, 3))
    source = find_source(tmp_path / "run", str(other_model(tmp_path / "other")))
    refused(source, target, tmp_path / "out", "share another lm_head than that of .*/other")


def test_shared_heads_of_an_lm_head_that_differs_in_its_last_bit_are_refused(tmp_path):
    source = trained(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    last = tensors["lm_head.weight"].view(torch.int32)[-1, -1:]
    last += 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused(source, "vllm", tmp_path / "out", "share another lm_head")


HALF = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("loaded", "stored"), HALF)
@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm"])
def test_heads_trained_on_the_model_in_half_precision_are_served_with_its_own_lm_head(target, loaded, stored, tmp_path):
    source = trained(tmp_path)
    file = source.heads_dir / "medusa_lm_head.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    own = make_model().lm_head.weight.detach()
    tensors["lm_heads.0.weight"] = own.to(loaded).to(stored)
    save_file(tensors, file)
    source = find_source(tmp_path / "run")
    export(source, target, tmp_path / "out")
    written = TensorFiles.open(tmp_path / "out")
    name = "lm_heads.0.weight" if target == "vllm" else "2.1.weight"
    assert torch.equal(written.load(name), own.to(stored))


def test_separate_heads_are_exported_for_another_lm_head(tmp_path):
    trained(tmp_path, form="separate")
    export(find_source(tmp_path / "run", str(other_model(tmp_path / "other"))), "vllm", tmp_path / "out")


def test_vocabulary_other_than_the_serving_models_is_refused(tmp_path):
    trained(tmp_path, form="separate")
    source = find_source(tmp_path / "run", str(other_model(tmp_path / "other", vocab_size=VOCAB + 5)))
    refused(source, "vllm", tmp_path / "out", f"found a vocabulary of {VOCAB} in the heads, expected {VOCAB + 5}")


def test_shared_lm_head_with_a_bias_is_refused_where_it_would_be_lost(tmp_path):
    source = trained(tmp_path, family="phi-lm-head-bias")
    refused(source, "vllm", tmp_path / "out", "share an lm_head with a bias")
    export(source, "tgi", tmp_path / "out")


def test_directory_that_is_not_an_export_is_refused(tmp_path):
    source, out = trained(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(source, "tgi", out, "out is not empty, expected a new directory or an earlier export")
    (out / "medusa_meta.json").write_text('{"recipe": "medusa-1"}')
    refused(source, "tgi", out, "out is not empty")
    (tmp_path / "file").touch()
    refused(source, "tgi", tmp_path / "file", "is not empty, expected a new directory")


@pytest.mark.parametrize("inside", ["base", "run", "run/medusa_heads", "."])
def test_directory_that_is_read_is_refused(inside, tmp_path):
    source = trained(tmp_path)
    edit_json(tmp_path / "run" / "medusa_heads" / "medusa_meta.json", export={})
    refused(find_source(tmp_path / "run"), "tgi", tmp_path / inside, "is read; choose another --out")
    assert source.heads_dir.is_dir()


def test_earlier_export_is_replaced_and_other_files_are_left(tmp_path):
    source, out = trained(tmp_path, "medusa-2", adapter=LORA, num_heads=5), tmp_path / "out"
    export(source, "lorax", out)
    (out / "notes.txt").write_text("mine")
    export(source, "fasterdecoding", out, model="merged")
    assert {path.name for path in out.glob("*.safetensors")} == set() and not (out / "adapter_config.json").exists()
    export(source, "rtp-llm", out)
    assert {path.name for path in out.glob("*.pt")} == set() and not list((out / "merged_model").glob("*.safetensors"))
    assert (out / "notes.txt").read_text() == "mine"


def test_interrupted_export_can_be_repeated(tmp_path, monkeypatch):
    source, out = trained(tmp_path), tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_tensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(source, "tgi", out)
    export(source, "tgi", out)
    assert (out / "medusa_lm_head.safetensors").is_file()


def test_what_an_interrupted_export_left_is_taken_away(tmp_path):
    source, out = trained(tmp_path, "medusa-2"), tmp_path / "out"
    export(source, "tgi", out, model="merged")
    left = [
        "model.safetensors.0f3a.part",
        "config.json.part",
        "medusa_meta.json.9e.part",
        "merged_model/config.json.1d.part",
    ]
    mine = ["film.part", "model.safetensors.zz.part", "merged_model/data.0f.part"]
    for name in (*left, *mine):
        (out / name).write_text("half")
    export(source, "tgi", out, model="merged")
    assert {str(path.relative_to(out)) for path in out.rglob("*.part")} == set(mine)


@pytest.mark.parametrize("target", ["vllm", "rtp-llm"])
def test_tokenizer_and_code_of_the_model_before_are_taken_away_and_the_users_are_left(target, tmp_path):
    source, out = trained(tmp_path, "medusa-2"), tmp_path / "out"
    run = tmp_path / "run"
    edit_json(run / "config.json", auto_map={"AutoConfig": "own.modeling.Own"})
    (run / "own").mkdir()
    (run / "own" / "modeling.py").write_text("")
    (run / "generation_config.json").write_text("{}")
    (source.heads_dir / "vocab.txt").write_text("a")
    export(source, target, out, model="merged")
    stale = {"vocab.txt", "generation_config.json", "modeling.py"}
    assert stale <= {path.name for path in out.rglob("*")}
    mine = ["merges.txt", "own.py", "optimizer.pt", "mine.safetensors", "tokenizer_notes.md"]
    for name in mine:
        (out / name).write_text("mine")
    edit_json(run / "config.json", auto_map=None)
    (run / "generation_config.json").unlink()
    (source.heads_dir / "vocab.txt").unlink()
    export(find_source(run), target, out, verify=False)
    assert not stale & {path.name for path in out.rglob("*")}
    assert all((out / name).read_text() == "mine" for name in mine) and (out / "tokenizer.json").is_file()


MEASURE = """
import re, sys
from pathlib import Path
from axolotl_medusa.serving.export import export
from axolotl_medusa.serving.import_heads import import_heads
from axolotl_medusa.model.sources import find_source

def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

export(find_source(sys.argv[1]), "vllm", sys.argv[1] + "-warm")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: imports had one of their own
before = memory("VmRSS")
export(find_source(sys.argv[2]), sys.argv[3], sys.argv[2] + "-out")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux measures a new peak")
@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", "modelopt"])
def test_peak_memory_of_a_verified_export_is_a_few_tensors(target, tmp_path):
    """The largest file has eight output layers of 32 MB; the export may hold three of them at a time."""
    vocab_size, num_heads = 250_000, 8
    small = trained(tmp_path, form="separate").output_dir
    large = tmp_path / "large"
    make_model(vocab_size=vocab_size).save_pretrained(large / "base", max_shard_size="40MB")
    model = make_model(vocab_size=vocab_size)
    write_run(large / "run", model, "medusa-1", large / "base", "separate", num_heads)
    command = [sys.executable, "-c", MEASURE, str(small), str(large / "run"), target]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    output_layer = vocab_size * HIDDEN * 4
    assert int(result.stdout) < 4 * output_layer


def test_secrets_that_earlier_heads_hold_are_in_no_file_of_an_export(tmp_path):
    """Directories from before `heads_meta` left them out; the data's name is in the card."""
    source = trained(tmp_path)
    edit_json(
        source.heads_dir / "medusa_meta.json",
        yaml={"hub_token": "sec-ret", "datasets": [{"path": "https://me:sec-ret@host/data"}]},
    )
    export(find_source(tmp_path / "run"), "vllm", tmp_path / "out")
    import_heads(source.heads_dir, tmp_path / "back")
    files = [path for out in ("out", "back") for path in (tmp_path / out).rglob("*") if path.is_file()]
    assert files and not [file for file in files if b"sec-ret" in file.read_bytes()]
    assert "`https://***@host/data`" in (tmp_path / "out" / "README.md").read_text()


# Models that are stored as torch files alone


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("where", ["local", "hub"])
@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", "rtp-llm"])
def test_model_of_torch_files_is_exported_as_one_of_safetensors(target, where, num_shards, tmp_path, monkeypatch):
    source = trained(tmp_path)
    export(source, target, tmp_path / "expected")
    as_torch_files(tmp_path / "base", num_shards)
    if where == "hub":
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "base"))
        source = find_source(tmp_path / "run", "org/model")
    export(source, target, tmp_path / "out")
    expected, found = TensorFiles.open(tmp_path / "expected"), TensorFiles.open(tmp_path / "out")
    surplus = {"model.layers.0.self_attn.rotary_emb.inv_freq"} if target in IN_MODEL_FILES else set()
    assert set(found) == set(expected) | surplus
    assert all(torch.equal(found.load(name), expected.load(name)) for name in expected)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_adapter_on_a_model_of_torch_files_is_merged(num_shards, tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=LORA_ON_HEAD)
    export(source, "vllm", tmp_path / "expected", model="merged")
    as_torch_files(tmp_path / "base", num_shards)
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    torch.save(load_file(adapter), adapter.with_suffix(".bin"))
    adapter.unlink()
    export(source, "vllm", tmp_path / "out", model="merged")
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out / "merged_model") for out in ("expected", "out")
    )
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_full_model_of_torch_files_is_exported(tmp_path):
    trained(tmp_path, "medusa-2")
    as_torch_files(tmp_path / "run", 2)
    source = find_source(tmp_path / "run")
    assert source.model_kind == "full"
    export(source, "vllm", tmp_path / "out", model="merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged_model")

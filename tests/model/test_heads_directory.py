"""The heads directory: what is written is what is read, servers' traps are kept out, and damage is found."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model, randomize
from safetensors import safe_open
from safetensors.torch import load_file

import axolotl_medusa
from axolotl_medusa.model import heads_directory
from axolotl_medusa.model.anatomy import output_embedding
from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, META_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import (
    HeadsFile,
    acting_output_layer,
    heads_config,
    heads_file,
    heads_meta,
    lm_head_hash,
    load_into,
    open_heads,
    read_heads,
    verify_heads,
    without_heads,
    write_heads,
)

FORMS = ["separate", "shared"]


def build(form="separate", num_heads=3, num_layers=1, dtype=torch.float32, model=None):
    """A model with random heads, and the file made of them."""
    model = make_model().to(dtype) if model is None else model
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, form, dtype=dtype))
    attach_heads(model, heads)
    return model, heads, heads_file(model, heads_config(heads, "org/base"), heads_meta(model, "medusa-1", {"seed": 1}))


def head_logits(heads, output_layer, hidden):
    return torch.stack(
        [(heads.output_layer(i) or output_layer)(heads.hidden(i, hidden)) for i in range(heads.num_heads)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", [*FORMS, "trained"])
def test_heads_written_and_read_have_bitwise_equal_logits(form, num_layers, dtype, tmp_path):
    model, heads, file = build(form, num_layers=num_layers, dtype=dtype)
    write_heads(tmp_path / "new" / "medusa_heads", file)
    read = read_heads(tmp_path / "new" / "medusa_heads")
    assert read.form == form and read.config == file.config and read.meta == file.meta
    rebuilt = read.build()
    assert rebuilt.dtype == dtype
    layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)
    if form == "shared":
        layer.weight.data = read.tensors[SHARED_OUTPUT_LAYER]
    hidden = torch.randn(7, HIDDEN, dtype=dtype)
    assert torch.equal(head_logits(rebuilt, layer, hidden), head_logits(heads, model.lm_head, hidden))
    fresh = MedusaHeads(HIDDEN, VOCAB, 3, num_layers, form, dtype=dtype)
    attach_heads(model, fresh)
    load_into(model, read.tensors)
    assert torch.equal(head_logits(fresh, model.lm_head, hidden), head_logits(heads, model.lm_head, hidden))


def test_config_of_one_trained_output_layer_is_what_vllm_reads_and_names_the_form():
    _, _, file = build("trained", num_layers=2)
    assert {key: file.config[key] for key in ("original_lm_head", "medusa_lm_head", "version")} == {
        "original_lm_head": True,  # one output layer follows all blocks: vLLM finds it as lm_heads.0
        "medusa_lm_head": "trained",
        "version": "1",
    }
    outputs = {name: tuple(tensor.shape) for name, tensor in file.tensors.items() if "linear" not in name}
    assert outputs == {"0.2.weight": (VOCAB, HIDDEN)}


@pytest.mark.parametrize("form", [*FORMS, "trained"])
def test_heads_of_a_draft_vocabulary_are_written_and_read_with_their_tokens(form, tmp_path):
    model = make_model()
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, 2, form=form, draft_vocab=20))
    heads.choose_tokens(torch.arange(VOCAB)[3:123:6])
    attach_heads(model, heads)
    file = heads_file(model, heads_config(heads, "org/base"), heads_meta(model, "medusa-1", {}))
    assert file.config["truncated_vocab_size"] == 20 and file.config["vocab_size"] == VOCAB
    write_heads(tmp_path, file)
    read = read_heads(tmp_path).build()
    assert torch.equal(read.token_map, heads.token_map)
    assert all(torch.equal(tensor, heads.state_dict()[name]) for name, tensor in read.state_dict().items())
    rows = [tuple(layer.weight.shape) for layer in read.output_layers()]
    assert rows == [(20, HIDDEN)] * {"separate": 2, "trained": 1, "shared": 0}[form]
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2, form=form, draft_vocab=20))
    load_into(model, open_heads(tmp_path))
    assert torch.equal(model.medusa_heads.token_map, heads.token_map)


@pytest.mark.parametrize(
    "tokens",
    [[1, 1, 2], [2, 1, 3], [-1, 2, 3], [1, 2, VOCAB], [1, 2]],
    ids=["twice", "not-ascending", "negative", "beyond", "too-few"],
)
def test_token_map_that_is_no_part_of_the_vocabulary_is_refused(tokens, tmp_path):
    """Every index into a vocabulary is taken from it."""
    model = make_model()
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 1, draft_vocab=3))
    heads = model.medusa_heads
    file = heads_file(model, heads_config(heads, "org/base"), heads_meta(model, "medusa-1", {}))
    file.tensors["token_map"] = torch.tensor(tokens)
    write_heads(tmp_path, file)
    with pytest.raises(ValueError, match="token_map"):
        read_heads(tmp_path)
    with pytest.raises(ValueError, match="token_map"):
        load_into(model, file.tensors)


@pytest.mark.parametrize("form", FORMS)
def test_config_has_exactly_the_canonical_keys_and_no_architectures(form, tmp_path):
    _, _, file = build(form, num_heads=3, num_layers=2)
    write_heads(tmp_path, file)
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == {
        "model_type": "medusa",
        "base_model_name_or_path": "org/base",
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "num_medusa_heads": 3,
        "num_medusa_layers": 2,
        "version": "2" if form == "shared" else "1",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "medusa_fc_bias": True,
        "original_lm_head": form == "shared",
    }


@pytest.mark.parametrize("form", FORMS)
def test_weights_file_has_exactly_the_canonical_tensors(form, tmp_path):
    _, heads, file = build(form, num_layers=2)
    write_heads(tmp_path, file)
    names = {f"{i}.{j}.linear.{name}" for i in range(3) for j in range(2) for name in ("weight", "bias")}
    names |= {f"{i}.2.weight" for i in range(3)} if form == "separate" else {SHARED_OUTPUT_LAYER}
    tensors = load_file(tmp_path / HEADS_FILE)
    assert set(tensors) == names
    assert SHARED_OUTPUT_LAYER == "lm_heads.0.weight" and HEADS_FILE == "medusa_lm_head.safetensors"
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    with safe_open(tmp_path / HEADS_FILE, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert {path.name for path in tmp_path.iterdir()} == {HEADS_FILE, CONFIG_FILE, META_FILE}


def test_meta_says_what_the_heads_were_made_by_and_from(tmp_path):
    model, _, _ = build(dtype=torch.bfloat16)
    meta = heads_meta(model, "medusa-2", {"output_dir": tmp_path, "medusa_num_heads": 3, "nested": {"a": [1, None]}})
    assert set(meta) == {"recipe", "lm_head_sha256", "dtype", "versions", "git_commit", "yaml"}
    assert (
        meta["recipe"] == "medusa-2" and meta["dtype"] == "bfloat16" and meta["lm_head_sha256"] == lm_head_hash(model)
    )
    assert meta["yaml"] == {"output_dir": str(tmp_path), "medusa_num_heads": 3, "nested": {"a": [1, None]}}
    assert (
        meta["versions"]["torch"] == importlib.metadata.version("torch")
        and meta["versions"]["axolotl-medusa"] == axolotl_medusa.__version__
    )
    assert set(meta["versions"]) == {"axolotl-medusa", "axolotl", "torch", "transformers", "peft", "python"}
    assert json.loads(json.dumps(meta)) == meta


def test_meta_holds_no_secret_of_the_yaml():
    secrets = {
        "mlflow_tracking_uri": "https://me:pass@host/path",
        "hub_token": "abc",
        "datasets": [{"path": "https://host/data.jsonl?token=abc"}],
        "hf_use_auth_token": True,
    }
    meta = heads_meta(build()[0], "medusa-1", secrets)
    assert meta["yaml"] == {
        "mlflow_tracking_uri": "https://***@host/path",
        "hub_token": "***",
        "datasets": [{"path": "https://host/data.jsonl?token=***"}],
        "hf_use_auth_token": True,
    }


def test_meta_names_the_commit_of_the_checkout():
    root = Path(axolotl_medusa.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("the package is installed without its checkout")
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert heads_meta(build()[0], "medusa-1", {})["git_commit"] == head


def test_heads_file_is_a_copy_that_later_steps_do_not_change():
    model, heads, file = build("shared")
    before = {name: tensor.clone() for name, tensor in file.tensors.items()}
    randomize(heads, seed=99)
    randomize(model.lm_head, seed=98)
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in before.items())
    assert not any(tensor.requires_grad for tensor in file.tensors.values())


def damaged(form="separate", *, tensors=(), without=(), config=(), missing_keys=()) -> HeadsFile:
    file = build(form)[2]
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in without}
    changed = {key: value for key, value in file.config.items() if key not in missing_keys}
    return HeadsFile({**kept, **dict(tensors)}, {**changed, **dict(config)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"without": ["1.0.linear.bias"]}, r"1\.0\.linear\.bias is missing, expected \(32,\) by config\.json"),
        ({"without": ["2.1.weight"]}, r"2\.1\.weight is missing, expected \(131, 32\)"),
        ({"form": "shared", "without": [SHARED_OUTPUT_LAYER]}, r"lm_heads\.0\.weight is missing, expected \(131, 32\)"),
        (
            {"tensors": {"0.0.linear.weight": torch.zeros(32, 31)}},
            r"0\.0\.linear\.weight is \(32, 31\), expected \(32, 32\)",
        ),
        (
            {"form": "shared", "tensors": {SHARED_OUTPUT_LAYER: torch.zeros(130, 32)}},
            r"is \(130, 32\), expected \(131, 32\)",
        ),
        (
            {"tensors": {"lm_head.weight": torch.zeros(131, 32)}},
            r"lm_head\.weight is \(131, 32\), expected no such tensor",
        ),
        (
            {"tensors": {SHARED_OUTPUT_LAYER: torch.zeros(131, 32)}},
            r"lm_heads\.0\.weight is \(131, 32\), expected no such tensor",
        ),
        (
            {"form": "shared", "tensors": {"0.1.weight": torch.zeros(131, 32)}},
            r"0\.1\.weight .* expected no such tensor",
        ),
        ({"config": {"medusa_num_heads": 2}}, r"2\.0\.linear\.bias is \(32,\), expected no such tensor"),
        ({"config": {"medusa_num_heads": 4}}, r"3\.0\.linear\.bias is missing"),
        ({"config": {"medusa_num_layers": 2}}, r"0\.1\.linear\.bias is missing"),
        ({"config": {"vocab_size": 132}}, r"0\.1\.weight is \(131, 32\), expected \(132, 32\)"),
        ({"config": {"original_lm_head": True}}, r"0\.1\.weight is \(131, 32\), expected no such tensor"),
        ({"config": {"hidden_size": 2**31 - 1}}, r"hidden_size is 2147483647"),
        ({"missing_keys": ["vocab_size"]}, r"config\.json lacks vocab_size: expected"),
        ({"missing_keys": ["hidden_size", "original_lm_head"]}, r"lacks hidden_size, original_lm_head: expected"),
        (
            {"missing_keys": ["medusa_num_heads", "medusa_num_layers"]},
            r"lacks medusa_num_heads, medusa_num_layers: expected",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_damaged_heads_are_refused_with_what_was_found_and_expected(damage, message, tmp_path):
    file = damaged(**damage)
    with pytest.raises(ValueError, match=f"^here/.*{message}"):
        verify_heads(file, "here")
    write_heads(tmp_path, file)
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*{message}"):
        read_heads(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, HEADS_FILE])
def test_read_heads_without_a_file_names_it(name, tmp_path):
    write_heads(tmp_path, build()[2])
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} has no {name}: expected a directory that training wrote"):
        read_heads(tmp_path)


def test_read_heads_without_meta_is_possible(tmp_path):
    write_heads(tmp_path, build()[2])
    (tmp_path / META_FILE).unlink()
    assert read_heads(tmp_path).meta == {}


ADAPTERS = {
    "none": {},
    "lora": {"targets": ["lm_head"]},
    "rank-stabilised": {"targets": ["lm_head", "q_proj"], "use_rslora": True},
    "body-only": {"targets": ["q_proj"]},
    "modules-to-save": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable-tokens": {"targets": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_shared_output_layer_is_bitwise_the_lm_head_that_peft_merges(family, adapter, dtype):
    model = make_model(family).to(dtype)
    if adapter != "none":
        model = add_lora(model, **ADAPTERS[adapter])
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():  # as if trained: saved modules and token rows start as plain copies
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    before = copy.deepcopy(model.state_dict())
    _, heads, file = build("shared", dtype=dtype, model=model)
    found = file.tensors[SHARED_OUTPUT_LAYER]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # nothing was merged in place
    merged = model.merge_and_unload() if adapter != "none" else model
    assert found.dtype == dtype and found.shape == (VOCAB, HIDDEN)
    assert torch.equal(found, merged.get_output_embeddings().weight)
    trained = {"lora", "rank-stabilised", "modules-to-save"} | (
        {"trainable-tokens"} if family == "llama-tied" else set()
    )
    assert torch.equal(found, make_model(family).to(dtype).lm_head.weight) == (adapter not in trained)


def test_shared_output_layer_has_the_heads_type():
    model = make_model()
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 1, form="shared", dtype=torch.bfloat16))
    file = heads_file(model, {}, {})
    assert {tensor.dtype for tensor in file.tensors.values()} == {torch.bfloat16}


def test_acting_output_layer_of_dora_on_lm_head_is_refused():
    model = add_lora(make_model(), targets=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="DoRA on lm_head is not supported"), acting_output_layer(model):
        pass


@pytest.mark.parametrize("lora", [False, True])
def test_without_heads_leaves_a_state_dict_that_the_plain_model_loads(lora):
    plain = add_lora(make_model()) if lora else make_model()
    model, _, _ = build(model=copy.deepcopy(plain))
    state = {**model.state_dict(), "model.not_medusa_heads.weight": torch.ones(1)}  # only whole parts of names count
    stripped = without_heads(state)
    assert torch.equal(stripped.pop("model.not_medusa_heads.weight"), torch.ones(1))
    assert len(state) == len(plain.state_dict()) + 1 + 3 * 3
    assert stripped.keys() == plain.state_dict().keys()
    plain.load_state_dict(stripped, strict=True)


@pytest.mark.parametrize(
    ("saved", "attached"),
    [
        ({"num_heads": 2}, {"num_heads": 3}),
        ({"num_heads": 3}, {"num_heads": 2}),
        ({"num_layers": 1, "form": "shared"}, {"num_layers": 2, "form": "shared"}),
        ({"num_layers": 2, "form": "shared"}, {"num_layers": 1, "form": "shared"}),
        ({"num_layers": 1}, {"num_layers": 2}),
        ({"form": "shared"}, {"form": "separate"}),
        ({"form": "separate"}, {"form": "shared"}),
    ],
    ids=lambda value: ",".join(f"{key}={part}" for key, part in value.items()),
)
def test_load_into_other_heads_is_an_error(saved, attached):
    file = build(**saved)[2]
    model, _, _ = build(**attached)
    with pytest.raises(ValueError, match="saved heads do not fit LlamaForCausalLM"):
        load_into(model, file.tensors)


def test_load_into_another_size_is_an_error_with_both_shapes():
    file = build()[2]
    model = make_model(vocab_size=VOCAB + 1)
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB + 1, 3))
    with pytest.raises(ValueError, match=r"0\.1\.weight is \(131, 32\), the model's heads have \(132, 32\)"):
        load_into(model, file.tensors)


def test_load_into_converts_to_the_attached_heads_type():
    file = build(dtype=torch.bfloat16)[2]
    model, heads, _ = build()
    load_into(model, file.tensors)
    assert heads.dtype == torch.float32
    assert all(torch.equal(tensor, file.tensors[name].float()) for name, tensor in heads.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_head_hash_is_the_sha256_of_the_weights_bytes(dtype):
    model = make_model().to(dtype)
    raw = bytes(model.lm_head.weight.detach().contiguous().view(torch.uint8).flatten().tolist())
    assert lm_head_hash(model) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_lm_head_hash_changes_if_and_only_if_lm_head_does(family):
    model = make_model(family)
    first = lm_head_hash(model)
    build(model=model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert lm_head_hash(model) == first
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1.0
    assert (lm_head_hash(model) == first) == (family == "llama")
    before = lm_head_hash(model)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-3
    assert lm_head_hash(model) != before


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "none"])
def test_lm_head_hash_does_not_see_adapters(adapter):
    plain = lm_head_hash(make_model("llama-tied"))
    model = add_lora(make_model("llama-tied"), **ADAPTERS[adapter])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert lm_head_hash(model) == plain
    assert output_embedding(model) is not None


@pytest.mark.parametrize("failing", ["weights", "config", "meta"])
def test_write_heads_crash_leaves_the_old_files_whole(failing, tmp_path, monkeypatch):
    old = build()[2]
    write_heads(tmp_path, old)
    before = {name: (tmp_path / name).read_bytes() for name in (HEADS_FILE, CONFIG_FILE, META_FILE)}
    new = HeadsFile({name: tensor + 1 for name, tensor in old.tensors.items()}, old.config, {"recipe": "medusa-2"})

    def save_half(tensors, path, **_):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    def write_half(path, text, **options):
        broken = path.name.startswith({"config": CONFIG_FILE, "meta": META_FILE}[failing])
        write_text(path, text[:9] if broken else text, **options)
        if broken:
            raise OSError("no space left on device")

    if failing == "weights":
        monkeypatch.setattr(heads_directory, "save_file", save_half)
    else:
        write_text = Path.write_text
        monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        write_heads(tmp_path, new)
    unchanged = {
        "weights": [HEADS_FILE, CONFIG_FILE, META_FILE],
        "config": [CONFIG_FILE, META_FILE],
        "meta": [META_FILE],
    }[failing]
    assert all((tmp_path / name).read_bytes() == before[name] for name in unchanged)
    read_heads(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [HEADS_FILE]  # servers load every such file
    monkeypatch.undo()
    write_heads(tmp_path, HeadsFile(new.tensors, old.config, old.meta))
    assert all(torch.equal(tensor, new.tensors[name]) for name, tensor in read_heads(tmp_path).tensors.items())
    assert {path.name for path in tmp_path.iterdir()} == set(before)

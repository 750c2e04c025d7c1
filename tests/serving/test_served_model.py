"""The served model equals what training had: peft's own merge where peft merges right, the trained logits always."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training_outputs import as_if_trained, save_base, write_run
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_medusa.model.sources import Source, find_source
from axolotl_medusa.model.tensor_files import write_json, write_sharded
from axolotl_medusa.serving import lora
from axolotl_medusa.serving.lora import add_low_rank_
from axolotl_medusa.serving.served_model import (
    lm_head,
    lm_head_bias,
    merged_tensors,
    model_files,
    served_config,
)

TOKENS = torch.tensor([[3, 7, 11, 2, 90, 41]])
LOGIT_TOLERANCE = 1e-4
"""Merged and unmerged differ by the order of fp32 additions; logits of these models are of size 10 to 100."""

LORAS = {
    "all-linear": {},
    "with lm_head": {"targets": ["q_proj", "down_proj", "lm_head"]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "rank-stabilised": {"targets": ["q_proj", "lm_head"], "use_rslora": True},
    "own ranks": {
        "targets": ["q_proj", "v_proj", "lm_head"],
        "rank_pattern": {"lm_head": 7},
        "alpha_pattern": {"lm_head": 3, r"layers\.1\.self_attn\.q_proj": 21},
    },
    "saved lm_head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norm": {"targets": ["q_proj"], "modules_to_save": ["norm"]},
    "token rows": {"targets": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 90]}},
}
CHANGES_ONE_OF_TIED = {"with lm_head", "embedding", "rank-stabilised", "own ranks", "saved lm_head", "saved embeddings"}


def lora_run(tmp_path, options, family="llama", dtype=torch.float32, **sharding):
    base = save_base(tmp_path / "base", make_model(family).to(dtype), **sharding)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), **options)
    as_if_trained(model)
    run = write_run(tmp_path / "out", model, "medusa-2", base)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), run)
    return find_source(run), trained


def write_model(source, directory, **options):
    write_sharded(directory, merged_tensors(source), **options)
    write_json(directory / "config.json", served_config(source))
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)


def loads(source):
    return {tensor.name: tensor.load() for tensor in merged_tensors(source)}


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LORAS)
def test_merge_is_bitwise_pefts_merge_and_unload(name, dtype, tmp_path):
    source, trained = lora_run(tmp_path, LORAS[name], dtype=dtype)
    assert source.model_kind == "adapter"
    expected = trained.merge_and_unload().state_dict()
    found = loads(source)
    assert found.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert found[parameter].dtype == dtype
        if dtype == torch.bfloat16 and name == "embedding" and "embed_tokens" in parameter:
            continue  # peft rounds B A of an embedding to bf16 before the sum: see the test of rounding
        assert torch.equal(found[parameter], tensor.to(dtype)), parameter
    assert torch.equal(lm_head(source).load(), expected["lm_head.weight"].to(dtype))


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_merged_model_loads_in_plain_transformers_with_the_trained_logits(family, name, tmp_path):
    source, trained = lora_run(tmp_path, LORAS[name], family)
    model, info = write_model(source, tmp_path / "merged")
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=LOGIT_TOLERANCE)
    assert torch.equal(lm_head(source).load(), model.get_output_embeddings().weight)
    assert lm_head(source).shape == (VOCAB, HIDDEN)
    tied = family == "llama-tied" and name not in CHANGES_ONE_OF_TIED
    assert model.config.tie_word_embeddings == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"targets": ["q_proj", "embed_tokens"]}])
def test_embeddings_that_were_trained_tied_stay_one_matrix(options, tmp_path):
    source, trained = lora_run(tmp_path, {"targets": ["q_proj"], **options, "ensure_weight_tying": True}, "llama-tied")
    model, info = write_model(source, tmp_path / "merged")
    assert not any(info.values())
    assert model.config.tie_word_embeddings and "lm_head.weight" not in loads(source)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "phi-lm-head-bias", "gemma2-softcap", "phi3"])
def test_merge_of_other_families_has_the_trained_logits(family, tmp_path):
    source, trained = lora_run(tmp_path, {}, family)
    model, info = write_model(source, tmp_path / "merged")
    assert not any(info.values())
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=LOGIT_TOLERANCE)
    assert lm_head_bias(source) == (family == "phi-lm-head-bias")


def test_merge_of_conv1d_is_bitwise_pefts_also_in_files_without_the_models_prefix(tmp_path):
    source, trained = lora_run(tmp_path, {"targets": ["c_attn", "c_proj"]}, "gpt2")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert any(name.startswith("transformer.") for name in names)
    expected = trained.merge_and_unload().state_dict()
    for name, tensor in loads(source).items():
        assert torch.equal(tensor, expected[name]), name
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in loads(source).items():
        assert torch.equal(tensor, expected[f"transformer.{name}"]), name
    assert torch.equal(lm_head(source).load(), expected["lm_head.weight"])


@pytest.mark.parametrize("modules_to_save", [["embed_tokens", "lm_head"], None])
def test_merge_of_resized_embeddings_has_the_new_vocabulary(modules_to_save, tmp_path):
    base = save_base(tmp_path / "base", make_model())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCAB + 5)
    model = add_lora(model, ["q_proj"], modules_to_save=modules_to_save)
    as_if_trained(model)
    expected = logits(model)
    source = find_source(write_run(tmp_path / "out", model, "medusa-2", base))
    assert served_config(source)["vocab_size"] == lm_head(source).shape[0] == VOCAB + 5
    merged, info = write_model(source, tmp_path / "merged")
    assert not any(info.values())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_merge_onto_half_precision_rounds_once(tmp_path):
    """In bf16, rounding B A before the sum would differ from rounding the sum."""
    source, trained = lora_run(tmp_path, LORAS["with lm_head"], dtype=torch.bfloat16)
    layer = trained.get_base_model().lm_head
    weight = layer.base_layer.weight
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2.0
    once = (weight.float() + delta).bfloat16()
    assert not torch.equal(once, weight + delta.bfloat16())
    assert torch.equal(lm_head(source).load(), once)


def test_merge_of_a_half_precision_embedding_is_nowhere_further_from_the_exact_sum_than_pefts(tmp_path):
    source, trained = lora_run(tmp_path, LORAS["embedding"], dtype=torch.bfloat16)
    layer = trained.get_base_model().model.embed_tokens
    matrices = layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()
    exact = layer.base_layer.weight.double() + 2.0 * (matrices[1] @ matrices[0]).T
    pefts = trained.merge_and_unload().model.embed_tokens.weight.double()
    found = loads(source)["model.embed_tokens.weight"].double()
    # fp32's own rounding of the sum, before the one to bf16, is the only slack.
    assert ((found - exact).abs() <= (pefts - exact).abs() + 1e-6 * exact.abs()).all()
    assert not torch.equal(found, pefts)


@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_product_added_in_blocks_equals_the_whole_sum(transposed, monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(8, 70), torch.randn(90, 8)
    product = 0.5 * (b @ a)
    weight = torch.randn(70, 90) if transposed else torch.randn(90, 70)
    expected = weight + (product.T if transposed else product)
    monkeypatch.setattr(lora, "_BLOCK_ELEMENTS", 7 * weight.shape[1])
    add_low_rank_(weight, a, b, 0.5, transposed)
    # A matrix product may order its eight terms by the block's shape: a few units in the last place of fp32.
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_medusa1_model_is_the_base_model_as_it_is(tmp_path):
    base = save_base(tmp_path / "base", make_model("llama-tied"))
    source = find_source(write_run(tmp_path / "out", make_model("llama-tied"), "medusa-1", base))
    expected = load_file(base / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loads(source).items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    head = lm_head(source)
    assert head.name == "lm_head.weight" and torch.equal(head.load(), expected["model.embed_tokens.weight"])
    assert served_config(source) == json.loads((base / "config.json").read_text())


def test_full_model_is_the_trained_one_in_its_own_shards(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    trained = make_model(seed=9)
    run = write_run(tmp_path / "out", trained, "medusa-2", base)
    source = find_source(run)
    assert source.model_kind == "full"
    model, info = write_model(source, tmp_path / "copy", max_shard_bytes=30_000)
    assert not any(info.values())
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(model), logits(trained))
    assert torch.equal(lm_head(source).load(), trained.lm_head.weight)


def test_merge_reads_a_sharded_base_model_in_its_order(tmp_path):
    source, trained = lora_run(tmp_path, {}, max_shard_size="40KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 2
    order = [
        shards.index(next(file for file in shards if tensor.name in load_file(file)))
        for tensor in merged_tensors(source)
    ]
    assert order == sorted(order)
    expected = trained.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loads(source).items())


def test_served_config_and_files_have_nothing_of_medusa(tmp_path):
    source, _ = lora_run(tmp_path, {})
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    medusa = {"medusa_num_heads": 3, "num_medusa_layers": 1, "medusa": {"num_medusa_heads": 3}, "medusa_config": {}}
    (base / "config.json").write_text(json.dumps({**config, **medusa}))
    assert served_config(source) == config
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (base / "modeling_own.py").write_text("from .layers_own import Own")
    for name in ("layers_own.py", "train.py", "tokenizer_of_mine.py"):
        (base / name).write_text("")
    for file in [*(tmp_path / "out").rglob("tokenizer*"), *(tmp_path / "out").rglob("chat_template*")]:
        file.unlink()  # so that the base model's are taken
    names = {*map(str, model_files(source)), *(path.name for path in source.tokenizer_files())}
    assert names == {
        "generation_config.json",
        "modeling_own.py",
        "layers_own.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def adapter_change(run, **settings):
    file = run / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "VERA"}, "peft_type VERA"),
        ({"peft_type": "x" * 5000}, "peft_type x{200}, expected plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    ],
)
def test_adapter_that_is_not_plain_lora_is_refused_with_the_way_out(settings, found, tmp_path):
    source, _ = lora_run(tmp_path, {})
    adapter_change(source.adapter_dir, **settings)
    for function in (merged_tensors, lm_head, served_config):
        with pytest.raises(ValueError, match=rf"{found}.*`axolotl merge-lora`.*--base-model"):
            function(source)


def test_real_dora_is_refused(tmp_path):
    source, _ = lora_run(tmp_path, {"targets": ["q_proj"], "use_dora": True})
    with pytest.raises(ValueError, match="use_dora"):
        merged_tensors(source)
    adapter_change(source.adapter_dir, use_dora=False)  # its tensors are there all the same
    with pytest.raises(ValueError, match="lora_magnitude_vector is not part of plain LoRA"):
        merged_tensors(source)


def test_lora_biases_are_refused(tmp_path):
    source, _ = lora_run(tmp_path, {"targets": ["fc1"], "lora_bias": True}, "phi-lm-head-bias")
    with pytest.raises(ValueError, match=r"lora_B\.bias is not part of plain LoRA"):
        merged_tensors(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vocab_size": VOCAB + 1},
            r"embeddings of different sizes .*'model\.embed_tokens\.weight': 132, 'lm_head\.weight': 131.*--base-model",
        ),
        (
            {"intermediate_size": 48},
            r"down_proj\.weight is \(32, 48\) in the base model but has LoRA matrices A \(4, 64\)",
        ),
        ({"num_hidden_layers": 1}, r"changes model\.layers\.1\..*which the base model does not have"),
    ],
)
def test_adapter_of_another_base_model_is_refused(options, message, tmp_path):
    source, _ = lora_run(tmp_path, LORAS["with lm_head"])
    other = save_base(tmp_path / "other", make_model(**options))
    with pytest.raises(ValueError, match=message):
        merged_tensors(replace(source, base_model=str(other)))


def test_quantized_base_model_is_refused_for_a_merge_only(tmp_path):
    source, _ = lora_run(tmp_path, {})
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match=r"is quantized.*unquantized model as --base-model"):
        merged_tensors(source)
    assert lm_head(replace(source, adapter_dir=None)).shape == (VOCAB, HIDDEN)


@pytest.mark.parametrize("damage", ["no weights", "half a pair"])
def test_damaged_adapter_is_refused(damage, tmp_path):
    source, _ = lora_run(tmp_path, {"targets": ["q_proj"]})
    file = source.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    message = "has no adapter_model.safetensors"
    if damage == "half a pair":
        save_file(
            {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_A" not in name}, file
        )
        message = r"has only lora_B of model\.layers\.1\.self_attn\.q_proj\.weight"
    with pytest.raises(ValueError, match=message):
        merged_tensors(source)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_model_without_a_readable_config_is_refused_in_one_line(content, tmp_path):
    base = save_base(tmp_path / "base", make_model())
    source = find_source(write_run(tmp_path / "out", make_model(), "medusa-1", base))
    (base / "config.json").unlink() if content is None else (base / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{base}/config\.json (is|holds)") as error:
        lm_head(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("lm_head.weight", r"has no lm_head\.weight and its config\.json does not tie the embeddings"),
        (
            "model.embed_tokens.weight",
            r"has no token embedding \(embed_tokens, wte, .*expected the files of a causal language model",
        ),
    ],
)
def test_model_without_an_embedding_is_refused(missing, message, tmp_path):
    base = save_base(tmp_path / "base", make_model())
    source = find_source(write_run(tmp_path / "out", make_model(), "medusa-1", base))
    tensors = load_file(base / "model.safetensors")
    tensors.pop(missing)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        lm_head(source)


NAMES_IN_FILES = {
    "gpt-neox": ({"gpt_neox.embed_in.weight": 1, "embed_out.weight": 2}, {}, 2),
    "internlm2": ({"model.tok_embeddings.weight": 1, "output.weight": 2, "model.layers.0.output.bias": 3}, {}, 2),
    "a layer with embeddings of its own": (
        {"model.deep.layers.0.embed_tokens.weight": 3, "model.embed_tokens.weight": 1}
        | {"deep.layers.0.lm_head.weight": 4, "lm_head.weight": 2},
        {},
        2,
    ),
    "tied, with a copy": (
        {"model.embed_tokens.weight": 1, "lm_head.weight": 2},
        {"tie_word_embeddings": True},
        1,
    ),
    "tied by its class alone": ({"transformer.word_embeddings.weight": 1}, {}, 1),
    "tied inside text_config": (
        {"model.language_model.embed_tokens.weight": 1, "lm_head.weight": 2},
        {"text_config": {"tie_word_embeddings": True}},
        1,
    ),
}


@pytest.mark.parametrize("case", NAMES_IN_FILES)
def test_output_embedding_is_found_by_name(case, tmp_path):
    names, config, expected = NAMES_IN_FILES[case]
    save_file({name: torch.full((4, 2), float(value)) for name, value in names.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config)
    source = Source(tmp_path, {}, {}, str(tmp_path))
    assert torch.equal(lm_head(source).load(), torch.full((4, 2), float(expected)))
    assert not lm_head_bias(source)


@pytest.mark.parametrize("name", ["embedding", "token rows"])
def test_copy_of_the_head_in_files_of_a_tied_model_does_not_outlive_the_merge(name, tmp_path):
    source, trained = lora_run(tmp_path, LORAS[name], "llama-tied")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    model, info = write_model(source, tmp_path / "merged")
    assert not any(info.values())
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=LOGIT_TOLERANCE)


def test_merge_needs_neither_transformers_nor_peft(tmp_path):
    source, _ = lora_run(tmp_path, LORAS["with lm_head"])
    code = f"""
        import sys
        sys.modules["transformers"] = sys.modules["peft"] = None  # importing them raises ImportError
        from axolotl_medusa.serving.served_model import merged_tensors, served_config
        from axolotl_medusa.model.sources import Source, find_source
        source = find_source({str(source.output_dir)!r})
        print(len([tensor.load() for tensor in merged_tensors(source)]), served_config(source)["vocab_size"])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout == f"{len(merged_tensors(source))} {VOCAB}\n"


def test_module_saved_in_fp32_becomes_the_base_models_type(tmp_path):
    source, _ = lora_run(tmp_path, LORAS["saved lm_head"], dtype=torch.bfloat16)
    file, name = source.adapter_dir / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    wide = torch.randn(VOCAB, HIDDEN)
    save_file({**load_file(file), name: wide}, file)
    assert lm_head(source).dtype == torch.bfloat16
    assert torch.equal(lm_head(source).load(), wide.bfloat16())


def test_saved_module_of_another_size_is_refused(tmp_path):
    source, _ = lora_run(tmp_path, LORAS["saved norm"])
    file = source.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(HIDDEN - 1)}, file)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight is \(32,\) in the base model but is \(31,\) in the adapter"
    ):
        merged_tensors(source)


def test_adapter_trained_with_peft_alone_at_zero_changes_nothing(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    source = find_source(write_run(tmp_path / "out", model, "medusa-2", base))
    expected = load_file(base / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loads(source).items())


MEGABYTE = 1 << 20
LARGEST_SHARD, WHOLE_MODEL = 128 * MEGABYTE, 448 * MEGABYTE


def write_wide_model(directory, adapter_dir):
    """A Llama of 0.5 GB in shards of two tensors each of 64 MB, and an adapter on every linear layer; all zeros."""
    wide, layers, vocabulary = 2048, 2, 16384
    config = {
        "model_type": "llama",
        "hidden_size": wide,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": 16384,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            adapter[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(16, module.in_features)
            adapter[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(module.out_features, 16)
    model.save_pretrained(directory, max_shard_size=LARGEST_SHARD)
    adapter_dir.mkdir()
    save_file(adapter, adapter_dir / "adapter_model.safetensors")
    write_json(adapter_dir / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 16})
    return size


def test_merge_needs_less_memory_than_the_largest_shard(tmp_path):
    """Required is a peak below the largest shard + 1 GB; the whole model is less than that, so the bound here is tighter."""
    assert write_wide_model(tmp_path / "base", tmp_path / "adapter") > WHOLE_MODEL
    assert max(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) < LARGEST_SHARD + MEGABYTE
    code = f"""
        from pathlib import Path
        from axolotl_medusa.serving.served_model import lm_head, merged_tensors
        from axolotl_medusa.model.sources import Source
        from axolotl_medusa.model.tensor_files import write_sharded

        def kilobytes(key):
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            return int(lines[key].split()[0])

        here = Path({str(tmp_path)!r})
        source = Source(here, {{}}, {{}}, str(here / "base"), adapter_dir=here / "adapter")
        lm_head(source)
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        write_sharded(here / "merged", merged_tensors(source), max_shard_bytes={LARGEST_SHARD})
        print((kilobytes("VmHWM") - before) * 1024)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    peak = int(run.stdout)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    # A tensor of 64 MB, blocks of 4 MB in fp32, and what the matrix product and the allocator keep.
    assert peak < LARGEST_SHARD + 32 * MEGABYTE, f"{peak / MEGABYTE:.0f} MB"

"""Sabotage: whatever goes wrong in an export, reading it back finds it and names the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import VOCAB
from exports import CASES, FORMS, HEADS, IN_MODEL_FILES, edit_json, exported
from safetensors.torch import load_file, save_file

from axolotl_medusa.serving.served_model import lm_head
from axolotl_medusa.serving.verify import verify_export

OUTPUT_CASES = [(target, form) for target, form in CASES if target != "fasterdecoding-legacy"]
"""Targets that write output layers; in the shared form of TGI and LoRAX nobody reads them."""

OWN_NAMES = {
    "vllm": ("blocks.{i}.layers.0.{kind}", "lm_heads.{i}.weight"),
    "tgi": ("{i}.0.linear.{kind}", "{i}.1.weight"),
    "lorax": ("{i}.0.linear.{kind}", ""),
    "fasterdecoding": ("{i}.0.linear.{kind}", "{i}.1.weight"),
    "fasterdecoding-legacy": ("{i}.0.linear.{kind}", ""),
    "fasterdecoding-merged": ("medusa_head.{i}.0.linear.{kind}", "medusa_head.{i}.1.weight"),
    "tensorrt-llm": ("{i}.0.linear.{kind}", "{i}.1.weight"),
    "rtp-llm": ("medusa_head.{i}.0.linear.{kind}", "medusa_head.{i}.1.weight"),
    "modelopt": ("medusa_heads.{i}.0.linear.{kind}", "medusa_heads.{i}.1.weight"),
}
"""Written out again: the names that each consumer asks for."""


def block(target, head, kind="weight") -> str:
    return OWN_NAMES[target][0].format(i=head, kind=kind)


def verify(source, target, out) -> None:
    heads = {name: tensor.load for name, tensor in source.heads().items() if name != "lm_heads.0.weight"}
    verify_export(target, out, heads, lm_head(source).load)


def change(out, edit) -> None:
    """Edits the tensors of an export's file in place of its writer."""
    file = next(file for pattern in ("*.pt", "*.safetensors") for file in out.glob(pattern))
    tensors = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    torch.save(tensors, file) if file.suffix == ".pt" else save_file(tensors, file, metadata={"format": "pt"})


def found(source, target, out, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        verify(source, target, out)
    assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert any(out.glob("*.safetensors")) or any(out.glob("*.pt"))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("target", "form"), CASES)
def test_export_as_it_was_written_is_right(target, form, num_layers, tmp_path):
    if num_layers > 1 and target not in {"vllm", "tgi", "tensorrt-llm"}:
        return
    source, out = exported(tmp_path, target, form, num_layers=num_layers)
    verify(source, target, out)


@pytest.mark.parametrize("target", FORMS)
def test_one_changed_bias_is_named(target, tmp_path):
    source, out = exported(tmp_path, target)
    name = block(target, 1, "bias")
    change(out, lambda tensors: tensors[name][3].neg_())
    found(source, target, out, rf": {name} differs from the trained one \(logits by ")


@pytest.mark.parametrize("target", FORMS)
def test_one_changed_weight_is_named(target, tmp_path):
    source, out = exported(tmp_path, target)
    name = block(target, 2)
    change(out, lambda tensors: tensors[name][3, 5].add_(0.01))
    found(source, target, out, f": {name} differs from the trained one")


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_missing_tensor_of_a_block_is_named(kind, target, tmp_path):
    source, out = exported(tmp_path, target)
    name = block(target, 1, kind)
    change(out, lambda tensors: tensors.pop(name))
    found(source, target, out, f": {name} is missing")


@pytest.mark.parametrize("target", FORMS)
def test_heads_in_the_wrong_order_are_found(target, tmp_path):
    source, out = exported(tmp_path, target)

    def swap(tensors) -> None:
        for kind in ("weight", "bias"):
            first, second = block(target, 0, kind), block(target, 1, kind)
            tensors[first], tensors[second] = tensors[second], tensors[first]

    change(out, swap)
    found(source, target, out, f": {block(target, 0)} differs from the trained one")


@pytest.mark.parametrize("target", FORMS)
def test_transposed_weights_are_found(target, tmp_path):
    source, out = exported(tmp_path, target)
    name = block(target, 0)
    change(out, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    found(source, target, out, f": {name} differs")


def outputs(target, form) -> list[str]:
    if target == "vllm" and form != "separate":
        return ["lm_heads.0.weight"]
    return [OWN_NAMES[target][1].format(i=head) for head in range(HEADS.get(target, 3))]


READ_OUTPUTS = [case for case in OUTPUT_CASES if case not in {("tgi", "shared"), ("lorax", "shared")}]


@pytest.mark.parametrize(("target", "form"), READ_OUTPUTS)
def test_changed_output_layer_is_named(target, form, tmp_path):
    source, out = exported(tmp_path, target, form)
    name = outputs(target, form)[-1]
    change(out, lambda tensors: tensors[name][VOCAB - 1].mul_(1.01))
    found(source, target, out, f": {name} differs from the trained one")


@pytest.mark.parametrize(("target", "form"), [case for case in READ_OUTPUTS if case[0] != "tgi"])
def test_missing_output_layer_is_named(target, form, tmp_path):
    source, out = exported(tmp_path, target, form)
    name = outputs(target, form)[-1]
    change(out, lambda tensors: tensors.pop(name))
    found(source, target, out, f": {name} is missing")


def test_tgi_without_one_output_layer_would_take_the_heads_for_shared_ones(tmp_path):
    source, out = exported(tmp_path, "tgi", "separate")
    change(out, lambda tensors: tensors.pop("2.1.weight"))
    found(source, "tgi", out, "the head as a whole differs")


@pytest.mark.parametrize(("target", "form"), READ_OUTPUTS)
def test_output_layer_of_another_vocabulary_is_found(target, form, tmp_path):
    source, out = exported(tmp_path, target, form)
    name = outputs(target, form)[0]
    change(out, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    found(source, target, out, rf": {name} is \({VOCAB - 1}, 32\), expected \({VOCAB}, 32\)")


def test_vllm_without_fc_bias_would_drop_the_biases(tmp_path):
    source, out = exported(tmp_path, "vllm")
    edit_json(out / "config.json", medusa_fc_bias=None)
    found(source, "vllm", out, r"the bias of blocks\.0\.layers\.0\.weight is not loaded: it differs")


def test_vllm_without_original_lm_head_would_leave_heads_random(tmp_path):
    source, out = exported(tmp_path, "vllm")
    edit_json(out / "config.json", original_lm_head=None)
    found(source, "vllm", out, r"lm_heads\.1\.weight is missing")


CONFIGS = {
    "vllm-model_type": ("vllm", {"model_type": "llama"}, "model_type is llama, expected medusa"),
    "vllm-architectures": ("vllm", {"architectures": ["LlamaForCausalLM"]}, "architectures is .'LlamaForCausalLM'"),
    "vllm-size": (
        "vllm",
        {"hidden_size": None},
        r"blocks\.0\.layers\.0\.weight is \(32, 32\), expected \(4096, 4096\)",
    ),
    "vllm-heads": ("vllm", {"num_heads": 2}, "has 2 heads when it is loaded as vllm does, expected 3"),
    "vllm-layers": ("vllm", {"num_hidden_layers": 2}, r"blocks\.0\.layers\.1\.weight is missing"),
    "tgi-architectures": ("tgi", {"architectures": ["MedusaModel"]}, "architectures is .'MedusaModel'."),
    "tgi-base": ("tgi", {"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    "tgi-layers": ("tgi", {"medusa_num_layers": 2}, r"0\.2\.weight is missing"),
    "tgi-heads": ("tgi", {"medusa_num_heads": None}, "medusa_num_heads is missing"),
    "lorax-version": ("lorax", {"version": "1"}, "version is 1, expected 2"),
    "lorax-no-version": ("lorax", {"version": None}, "version is None, expected 2"),
    "fasterdecoding-layers": ("fasterdecoding", {"medusa_num_layers": None}, "medusa_num_layers is missing"),
    "legacy-heads": ("fasterdecoding-legacy", {"medusa_num_heads": 2}, "has 2 heads"),
    "merged-heads": ("fasterdecoding-merged", {"medusa_num_heads": 4}, r"medusa_head\.3\.0\.linear\.weight is missing"),
    "tensorrt-spelling": ("tensorrt-llm", {"num_medusa_heads": 2}, "two spellings of the number of heads differ"),
    "rtp-config": ("rtp-llm", {"medusa_config": None}, "medusa_config is missing"),
    "modelopt-config": ("modelopt", {"medusa": {"num_medusa_heads": 3}}, "num_medusa_layers is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_misleads_the_consumer_is_found(case, tmp_path):
    target, changes, message = CONFIGS[case]
    source, out = exported(tmp_path, target)
    verify(source, target, out)
    edit_json(out / "config.json", **changes)
    found(source, target, out, message)


def test_lorax_with_an_output_layer_would_fail_at_its_first_batch(tmp_path):
    source, out = exported(tmp_path, "lorax")
    change(out, lambda tensors: tensors.update({"0.1.weight": torch.zeros(VOCAB, 32)}))
    found(source, "lorax", out, r"0\.1\.weight makes it the first version")


def test_tgi_with_a_tensor_of_the_model_is_found(tmp_path):
    source, out = exported(tmp_path, "tgi")
    change(out, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(VOCAB, 32)}))
    found(source, "tgi", out, r"lm_head\.weight is also a tensor of the model")


def test_lorax_adapter_without_one_of_its_matrices_is_found(tmp_path):
    source, out = exported(tmp_path, "lorax", recipe="medusa-2", adapter={"targets": ["q_proj"]})
    verify(source, "lorax", out)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    found(source, "lorax", out, f": {name} is missing")
    save_file({}, file)
    found(source, "lorax", out, r"lora_A\.weight is missing")


@pytest.mark.parametrize("target", FORMS)
def test_missing_or_damaged_files_are_found(target, tmp_path):
    source, out = exported(tmp_path, target)
    file = next(file for pattern in ("*.pt", "*.safetensors") for file in out.glob(pattern))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"does not serve what was trained when it is loaded as {target} does"):
        verify(source, target, out)
    file.unlink()
    with pytest.raises(ValueError, match=f"does not serve what was trained when it is loaded as {target} does"):
        verify(source, target, out)


@pytest.mark.parametrize("target", sorted(IN_MODEL_FILES))
def test_heads_inside_a_sharded_model_are_read_through_its_index(target, tmp_path):
    source, out = exported(tmp_path, target)
    file = out / "model.safetensors"
    tensors = load_file(file)
    half = len(tensors) // 2
    shards = {"a.safetensors": dict([*tensors.items()][:half]), "b.safetensors": dict([*tensors.items()][half:])}
    for name, shard in shards.items():
        save_file(shard, out / name)
    file.unlink()
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    verify(source, target, out)


def test_other_lm_head_of_the_served_model_is_found(tmp_path):
    source, out = exported(tmp_path, "vllm")
    heads = {name: tensor.load for name, tensor in source.heads().items() if name != "lm_heads.0.weight"}
    other = lm_head(source).load()
    other[5] += 0.1
    with pytest.raises(ValueError, match=r"lm_heads\.0\.weight differs from the trained one"):
        verify_export("vllm", out, heads, lambda: other)


def test_nan_in_a_written_tensor_is_found(tmp_path):
    source, out = exported(tmp_path, "vllm")
    change(out, lambda tensors: tensors["blocks.0.layers.0.bias"][0].fill_(float("nan")))
    found(source, "vllm", out, r"blocks\.0\.layers\.0\.bias differs")


def test_every_target_has_a_loader_that_does_not_use_the_writers_names():
    import axolotl_medusa.serving.verify as module
    from axolotl_medusa.serving.format_rules import TARGETS

    assert set(module._LOADERS) == set(TARGETS) == set(FORMS) == set(OWN_NAMES)
    assert not hasattr(module, "TARGETS")

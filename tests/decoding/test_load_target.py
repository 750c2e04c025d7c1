"""Loading a model with its heads from what training wrote, and refusing heads of another model."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model
from decoding_models import prompts, random_heads, varied_model
from torch.utils._python_dispatch import TorchDispatchMode
from training_outputs import as_torch_files

from axolotl_medusa.decoding import load_target as load_target_module
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model import trained_with
from axolotl_medusa.model.anatomy import causal_lm
from axolotl_medusa.model.heads import attach_heads
from axolotl_medusa.model.heads_directory import (
    heads_config,
    heads_file,
    heads_meta,
    read_heads,
    weight_hash,
    write_heads,
)

NEW = 12


def save(tmp_path, model, recipe="medusa-1", dtype=torch.float32, **changes):
    """What training leaves: the base model, and an output_dir with heads and, under peft, the adapter."""
    base, output = tmp_path / "base", tmp_path / "output"
    heads = random_heads(num_heads=2, **changes)
    attach_heads(model, heads)
    file = heads_file(model, heads_config(heads, str(base)), heads_meta(model, recipe, {}))
    write_heads(output / "medusa_heads", file)
    del causal_lm(model).medusa_heads
    if causal_lm(model) is not model:
        model.save_pretrained(output)
        model.unload()
    causal_lm(model).to(dtype).save_pretrained(base)
    return output


def changed(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 5] += 0.1
    return model


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_find_their_model_and_decode_as_before(tmp_path, form):
    model = varied_model()
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    output = save(tmp_path, model, form=form)
    for heads in (output, output / "medusa_heads"):
        loaded = MedusaModel.from_pretrained(heads, dtype=torch.float32, device="cpu")
        assert torch.equal(loaded.generate(ids, mask, NEW), expected)
    named = MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "base")
    assert torch.equal(named.generate(ids, mask, NEW), expected)
    assert all(torch.equal(a, b) for a, b in zip(named.heads.parameters(), loaded.heads.parameters(), strict=True))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("where", ["local", "hub"])
def test_model_of_torch_files_decodes_as_one_of_safetensors(tmp_path, monkeypatch, where, num_shards):
    model = varied_model()
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    output = save(tmp_path, model)
    as_torch_files(tmp_path / "base", num_shards)
    name = None
    if where == "hub":
        name = "org/model"
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "base"))
    loaded = MedusaModel.from_pretrained(output, name, dtype=torch.float32, device="cpu")
    assert torch.equal(loaded.generate(ids, mask, NEW), expected)


def test_heads_are_put_on_a_model_that_is_loaded_already(tmp_path):
    model = varied_model()
    output = save(tmp_path, model)
    medusa = MedusaModel.from_pretrained(output / "medusa_heads", base_model=model)
    assert medusa.base_model is model
    with pytest.raises(ValueError, match="LlamaForCausalLM is another than the one that"):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=changed(model))


def test_adapter_of_medusa_2_is_loaded_unmerged(tmp_path):
    model = add_lora(varied_model()).eval()
    ids, mask = prompts()
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    output = save(tmp_path, model, recipe="medusa-2")
    medusa = MedusaModel.from_pretrained(output)
    assert hasattr(medusa.base_model, "peft_config")
    assert torch.equal(medusa.generate(ids, mask, NEW), expected)


def test_load_options_reach_transformers(tmp_path):
    output = save(tmp_path, varied_model())
    medusa = MedusaModel.from_pretrained(output, dtype=torch.bfloat16, attn_implementation="eager")
    assert medusa.base_model.dtype == medusa.heads.dtype == torch.bfloat16
    assert medusa.base_model.config._attn_implementation == "eager"


def test_model_stored_in_half_precision_and_trained_in_full_is_recognised(tmp_path):
    """The hash was taken of fp32 bytes that bf16 holds exactly; loading in either type is right."""
    model = varied_model().to(torch.bfloat16).float()
    output = save(tmp_path, model, dtype=torch.bfloat16)
    for dtype in ("auto", torch.float32):
        MedusaModel.from_pretrained(output, dtype=dtype)


@pytest.mark.parametrize("is_fast", [True, False])
def test_model_in_bf16_is_decoded_in_fp32_where_a_cpu_is_slow_with_it(is_fast, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("axolotl_medusa.decoding.default_dtype.multiplies_bf16", lambda: is_fast)
    output = save(tmp_path, varied_model().to(torch.bfloat16), dtype=torch.bfloat16)
    found = MedusaModel.from_pretrained(output)
    assert found.base_model.dtype == found.heads.dtype == (torch.bfloat16 if is_fast else torch.float32)
    assert ("loaded in fp32" in caplog.text) is not is_fast
    assert MedusaModel.from_pretrained(output, dtype=torch.bfloat16).base_model.dtype == torch.bfloat16


def test_model_trained_in_full_precision_may_be_loaded_in_half(tmp_path):
    output = save(tmp_path, varied_model())
    assert MedusaModel.from_pretrained(output, dtype=torch.bfloat16).base_model.dtype == torch.bfloat16


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_model_stored_in_full_precision_and_trained_as_rounded_is_recognised(tmp_path, half):
    """Axolotl loads such a model in half precision and turns the embeddings back into fp32: the hash is of those."""
    output = save(tmp_path, varied_model().to(half).float())
    varied_model().save_pretrained(tmp_path / "stored")
    MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "stored")


def test_heads_of_another_model_are_refused(tmp_path):
    output = save(tmp_path, varied_model())
    changed(varied_model()).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"other is another than the one that .*medusa_heads was trained with \(SHA-256"
    ):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "other")
    make_model("llama", vocab_size=140).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"larger is \[140, 32\], but the heads were trained with one of \[131, 32\]"):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "larger")
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM is \[140, {HIDDEN}\].*one of \[{VOCAB}, {HIDDEN}\]"):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=make_model("llama", vocab_size=140))


def test_merged_model_of_medusa_2_is_taken_with_a_warning(tmp_path, caplog):
    """An adapter may have changed lm_head, so that its hash cannot be that of the merged model."""
    output = save(tmp_path, varied_model(), recipe="medusa-2")
    changed(varied_model()).save_pretrained(tmp_path / "merged")
    with caplog.at_level(logging.WARNING):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "merged")
    assert "cannot tell whether" in caplog.text


def test_heads_without_a_hash_are_checked_by_their_shape_alone(tmp_path):
    output = save(tmp_path, varied_model())
    (output / "medusa_heads" / "medusa_meta.json").unlink()
    changed(varied_model()).save_pretrained(tmp_path / "other")
    MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "other")


def test_directories_without_heads_or_model_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"empty is not a directory"):
        MedusaModel.from_pretrained(tmp_path / "empty")
    output = save(tmp_path, varied_model())
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError) as error:
        MedusaModel.from_pretrained(output, base_model=tmp_path / "nothing")
    assert "nothing" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_heads_are_not_copied_once_they_are_read(tmp_path, monkeypatch, form):
    files = []
    monkeypatch.setattr(load_target_module, "read_heads", lambda path: files.append(read_heads(path)) or files[0])
    medusa = MedusaModel.from_pretrained(save(tmp_path, varied_model(), form=form))
    found = {name: tensor.data_ptr() for name, tensor in medusa.heads.state_dict().items()}
    assert found == {name: tensor.data_ptr() for name, tensor in files[0].head_tensors().items()}
    assert all(parameter.requires_grad for parameter in medusa.heads.parameters())


@pytest.fixture
def hashes(monkeypatch):
    """Types that the output embedding was turned into, one entry for every hash that was taken."""
    taken = []

    def counted(weight, *dtypes):
        taken.append(dtypes)
        return weight_hash(weight, *dtypes)

    monkeypatch.setattr(trained_with, "weight_hash", counted)
    return taken


@pytest.mark.parametrize(
    ("trained", "stored", "taken"),
    [
        (torch.float32, torch.float32, [()]),
        (torch.bfloat16, torch.bfloat16, [()]),
        (torch.float16, torch.float32, [(), (torch.float16,)]),
        (torch.float32, torch.bfloat16, [(), (torch.float32,)]),
    ],
)
def test_hashes_are_taken_until_one_fits_beginning_with_the_likeliest(tmp_path, hashes, trained, stored, taken):
    rounded = varied_model().to(stored)
    heads = random_heads(num_heads=2).to(trained)
    model = rounded.to(trained)
    attach_heads(model, heads)
    write_heads(tmp_path / "heads", heads_file(model, heads_config(heads, "base"), heads_meta(model, "medusa-1", {})))
    del model.medusa_heads
    model.to(stored).save_pretrained(tmp_path / "base")
    MedusaModel.from_pretrained(tmp_path / "heads", base_model=tmp_path / "base")
    assert hashes == taken


@pytest.mark.parametrize(("stored", "tried"), [(torch.float32, 5), (torch.bfloat16, 4), (torch.float16, 4)])
def test_every_type_of_training_is_tried_once_before_heads_are_refused(tmp_path, hashes, stored, tried):
    output = save(tmp_path, varied_model())
    changed(varied_model()).to(stored).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is another than the one"):
        MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "other")
    assert len(set(hashes)) == len(hashes) == tried


class Allocations(TorchDispatchMode):
    """Bytes of the largest result that an operation made anew."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("dtypes", [(), (torch.float32,), (torch.float16, torch.float32)])
@pytest.mark.parametrize("transposed", [False, True], ids=["in order", "transposed"])
def test_hash_of_a_weight_in_any_type_takes_a_fraction_of_its_memory(dtypes, transposed):
    weight = torch.randn(640, 16_384).to(torch.bfloat16)
    weight = weight.T if transposed else weight
    whole = weight
    for dtype in dtypes:
        whole = whole.to(dtype)
    with Allocations() as made:
        found = weight_hash(weight, *dtypes)
    assert found == hashlib.sha256(whole.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert made.largest <= weight.nbytes


def test_heads_without_a_hash_leave_the_output_embedding_unread(tmp_path, hashes):
    output = save(tmp_path, varied_model())
    (output / "medusa_heads" / "medusa_meta.json").unlink()
    MedusaModel.from_pretrained(output / "medusa_heads", base_model=tmp_path / "base")
    assert not hashes

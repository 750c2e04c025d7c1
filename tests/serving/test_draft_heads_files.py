"""Heads as a drafter reads them: a heads directory, an export for vLLM, and directories that are neither."""

from __future__ import annotations

import json

import pytest
import torch
from drafter_heads import HEADS, SIZES, VOCAB, export_for_vllm, stacked, write
from safetensors.torch import load_file, save_file

from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE
from axolotl_medusa.serving.draft_heads_files import Part, read_draft_heads


def read(directory, count=HEADS, **changes):
    options = {"sizes": SIZES, "dtype": torch.float32, "device": torch.device("cpu"), **changes}
    return read_draft_heads(directory, count, **options)


def assert_same(found, expected, count=HEADS):
    for own, other in zip([*found.weights, *found.biases], [*expected.weights, *expected.biases], strict=True):
        assert torch.equal(own, other[:count])
    assert (found.outputs is None) == (expected.outputs is None)
    if found.outputs is not None:
        assert torch.equal(found.outputs, expected.outputs[:count])


@pytest.mark.parametrize("form", ["shared", "separate", "trained"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("count", [1, HEADS])
def test_heads_directory_and_export_hold_the_trained_heads(tmp_path, form, layers, count):
    heads = write(tmp_path / "heads", form, layers)
    assert_same(read(tmp_path / "heads", count), stacked(heads), count)
    exported = export_for_vllm(tmp_path / "heads", tmp_path / "export")
    assert_same(read(exported, count), stacked(heads), count)


def test_heads_take_the_models_type(tmp_path):
    heads = write(tmp_path, "separate")
    found = read(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in (*found.weights, *found.biases, found.outputs)} == {torch.bfloat16}
    assert torch.equal(found.outputs, stacked(heads).outputs.bfloat16())


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_parts_of_the_output_layers_are_the_whole(tmp_path, ranks):
    heads = write(tmp_path, "separate")
    parts = [read(tmp_path, part=Part(rank, ranks)) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.outputs for part in parts], 1), stacked(heads).outputs)
    assert [part.first_row for part in parts] == [Part(rank, ranks).rows(VOCAB).start for rank in range(ranks)]


def test_logits_of_one_trained_layer_are_those_that_the_heads_learnt_with(tmp_path):
    heads, states = write(tmp_path, "trained"), torch.randn(5, SIZES["hidden_size"])
    found = read(tmp_path)
    logits = found.own_logits(found.hidden(states, HEADS))
    for head in range(HEADS):
        expected = heads.output_layer(head)(heads.hidden(head, states))
        torch.testing.assert_close(logits[:, head], expected)


@pytest.mark.parametrize("form", ["separate", "trained"])
def test_output_layers_of_a_draft_vocabulary_are_refused(tmp_path, form):
    write(tmp_path, form, draft_vocab=16)
    with pytest.raises(ValueError, match=r"choose among 16 of the model's tokens, .* without medusa_draft_vocab"):
        read(tmp_path)


def test_more_drafts_than_heads_are_refused(tmp_path):
    write(tmp_path, "shared")
    with pytest.raises(ValueError, match=r"num_speculative_tokens is 4, expected at most 3"):
        read(tmp_path, 4)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_heads_of_another_model_are_refused(tmp_path, key):
    write(tmp_path, "shared")
    with pytest.raises(ValueError, match=f"with {key} {SIZES[key]}, expected 99 as the served model has"):
        read(tmp_path, sizes={**SIZES, key: 99})


def test_directory_without_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json: expected the medusa_heads"):
        read(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(SIZES))
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected at most 0"):
        read(tmp_path)


@pytest.mark.parametrize("lost", ["1.0.linear.weight", "2.0.linear.bias", "1.1.weight"])
def test_missing_tensor_is_named(tmp_path, lost):
    write(tmp_path, "separate")
    tensors = load_file(tmp_path / HEADS_FILE)
    del tensors[lost]
    save_file(tensors, tmp_path / HEADS_FILE)
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        read(tmp_path)

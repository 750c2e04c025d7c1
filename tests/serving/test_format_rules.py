"""Names, configs and refusals of every target, against what each consumer's code asks for."""

from __future__ import annotations

import re

import pytest

from axolotl_medusa.model.file_names import HEADS_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import heads_config
from axolotl_medusa.serving.format_rules import (
    TARGETS,
    form_of,
    plan,
    refusal,
    target_config,
)
from axolotl_medusa.serving.head_names import OUTPUT_LAYER, HeadTensor, parse

HIDDEN, VOCAB = 8, 24
SERVED = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN}


def config(form="shared", num_heads=3, num_layers=1):
    return heads_config(MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, form), "org/base")


def test_targets_are_those_of_the_command():
    assert list(TARGETS) == [
        "vllm",
        "tgi",
        "lorax",
        "fasterdecoding",
        "fasterdecoding-legacy",
        "fasterdecoding-merged",
        "tensorrt-llm",
        "rtp-llm",
        "modelopt",
    ]
    assert all(target.name == name for name, target in TARGETS.items())


def test_canonical_names_are_those_of_the_checkpoint():
    assert SHARED_OUTPUT_LAYER == SHARED_OUTPUT_LAYER and HEADS_FILE == HEADS_FILE
    for form in ("shared", "separate"):
        assert form_of(config(form)) == form


NAMES = {
    "0.0.linear.weight": (0, 0, "linear.weight"),
    "12.3.linear.bias": (12, 3, "linear.bias"),
    "4.1.weight": (4, 1, "weight"),
    "blocks.2.layers.1.weight": (2, 1, "linear.weight"),
    "blocks.2.layers.1.bias": (2, 1, "linear.bias"),
    "lm_heads.3.weight": (3, OUTPUT_LAYER, "weight"),
    "medusa_head.1.0.linear.bias": (1, 0, "linear.bias"),
    "medusa_heads.1.1.weight": (1, 1, "weight"),
    "model.medusa_head.0.0.linear.weight": (0, 0, "linear.weight"),
    "base_model.model.medusa_head.0.0.linear.weight": (0, 0, "linear.weight"),
    "base_model.model.medusa_head.modules_to_save.0.0.linear.weight": (0, 0, "linear.weight"),
    "base_model.model.medusa_head.modules_to_save.default.4.1.weight": (4, 1, "weight"),
}


@pytest.mark.parametrize("name", NAMES)
def test_parse_knows_the_names_of_every_format(name):
    parsed = parse(name)
    assert parsed is not None and tuple(parsed.tensor) == NAMES[name]
    assert parsed.in_model == ("medusa_head" in name)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "0.0.linear",
        "a.0.linear.weight",
        "0.linear.weight",
        "0.0.0.linear.weight",
        "0.0.linear.weight_scale",
        "0.1.bias",
        "lm_heads.0.bias",
        "token_map",
        "medusa_head.original_module.0.0.linear.weight",
        "model.not_medusa_head.0.0.linear.weight",
    ],
)
def test_parse_takes_nothing_else_for_heads(name):
    assert parse(name) is None


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", TARGETS)
def test_parse_undoes_the_names_of_every_target(name, num_layers):
    target = TARGETS[name]
    for head in (0, 11):
        for layer in range(num_layers):
            for kind in ("linear.weight", "linear.bias"):
                parsed = parse(target.name_of(HeadTensor(head, layer, kind)))
                assert parsed.tensor == (head, layer, kind) and parsed.in_model == (target.file is None)
        parsed = parse(target.name_of(HeadTensor(head, num_layers, "weight")))
        assert parsed.tensor in {(head, num_layers, "weight"), (head, OUTPUT_LAYER, "weight")}


@pytest.mark.parametrize(
    ("name", "block", "output"),
    [
        ("vllm", "blocks.1.layers.0.bias", "lm_heads.1.weight"),
        ("tgi", "1.0.linear.bias", "1.1.weight"),
        ("fasterdecoding-merged", "medusa_head.1.0.linear.bias", "medusa_head.1.1.weight"),
        ("rtp-llm", "medusa_head.1.0.linear.bias", "medusa_head.1.1.weight"),
        ("modelopt", "medusa_heads.1.0.linear.bias", "medusa_heads.1.1.weight"),
    ],
)
def test_names_are_the_consumers(name, block, output):
    assert TARGETS[name].name_of(HeadTensor(1, 0, "linear.bias")) == block
    assert TARGETS[name].name_of(HeadTensor(1, 1, "weight")) == output


OUTPUTS = {
    # target: output layers (of the model's lm_head or the heads' own) with shared and with separate heads
    "vllm": ("one", "own"),
    "tgi": ("one", "own"),
    "lorax": ("one", None),
    "fasterdecoding": ("copies", "own"),
    "fasterdecoding-legacy": ("none", None),
    "fasterdecoding-merged": ("copies", "own"),
    "tensorrt-llm": ("copies", "own"),
    "rtp-llm": ("copies", "own"),
    "modelopt": ("copies", "own"),
}


@pytest.mark.parametrize("form", ["shared", "separate"])
@pytest.mark.parametrize("name", TARGETS)
def test_plan_has_every_block_and_the_output_layers_that_the_consumer_needs(name, form):
    expected = OUTPUTS[name][form == "separate"]
    if expected is None:
        return
    planned = list(plan(TARGETS[name], config(form)))
    assert len({name for name, _ in planned}) == len(planned)
    blocks = [source for _, source in planned if "linear" in source]
    assert blocks == [f"{i}.0.linear.{kind}" for i in range(3) for kind in ("weight", "bias")]
    outputs = [source for _, source in planned if "linear" not in source]
    assert outputs == {"one": [SHARED_OUTPUT_LAYER], "own": ["0.1.weight", "1.1.weight", "2.1.weight"], "none": []}.get(
        expected, [SHARED_OUTPUT_LAYER] * 3
    )
    assert not any(name.split(".")[0] in {"lm_head", "model"} for name, _ in planned)


def test_plan_of_several_blocks_numbers_the_output_layer_after_them():
    assert [name for name, _ in plan(TARGETS["tensorrt-llm"], config("separate", 1, 2))] == [
        "0.0.linear.weight",
        "0.0.linear.bias",
        "0.1.linear.weight",
        "0.1.linear.bias",
        "0.2.weight",
    ]


def test_tgi_reads_shared_heads_of_several_blocks_with_copies_of_lm_head():
    shared, target = config("shared", 2, 2), TARGETS["tgi"]
    assert [tuple(planned) for planned in plan(target, shared) if planned.source == SHARED_OUTPUT_LAYER] == [
        ("0.2.weight", SHARED_OUTPUT_LAYER),
        ("1.2.weight", SHARED_OUTPUT_LAYER),
    ]
    written = target_config(target, shared, "org/base")
    assert written["version"] == "1" and written["original_lm_head"] is False


COUNTS = {"medusa_num_heads": 3, "medusa_num_layers": 1}
BOTH = {**COUNTS, "num_medusa_heads": 3, "num_medusa_layers": 1}
BASE = {"model_type": "medusa", "base_model_name_or_path": "org/served"}
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB}
CONFIGS = {
    "vllm": {
        **BASE,
        **SIZES,
        "num_heads": 3,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
    },
    "tgi": {**BASE, **SIZES, **BOTH, "version": "2", "medusa_fc_bias": True, "original_lm_head": True},
    "lorax": {**BASE, **SIZES, **BOTH, "version": "2", "medusa_fc_bias": True, "original_lm_head": True},
    "fasterdecoding": {**BASE, **COUNTS, "version": "1"},
    "fasterdecoding-legacy": {**BASE, **COUNTS, "version": "2"},
    "fasterdecoding-merged": COUNTS,
    "tensorrt-llm": {**BASE, **SIZES, **BOTH, "version": "1"},
    "rtp-llm": {"medusa_config": COUNTS},
    "modelopt": {"medusa": {"num_medusa_heads": 3, "num_medusa_layers": 1}},
}


@pytest.mark.parametrize("name", TARGETS)
def test_config_has_exactly_the_keys_that_the_consumer_reads_and_no_architectures(name):
    assert target_config(TARGETS[name], config(), "org/served") == CONFIGS[name]
    assert "architectures" not in CONFIGS[name]


@pytest.mark.parametrize("name", ["vllm", "tgi"])
def test_config_of_separate_heads_says_so(name):
    written = target_config(TARGETS[name], config("separate"), "org/served")
    assert written["original_lm_head"] is False and written.get("version", "1") == "1"


def why(name, *, form="shared", num_heads=3, num_layers=1, out="/exports/heads", bias=False, **served):
    return refusal(TARGETS[name], config(form, num_heads, num_layers), {**SERVED, **served}, out, head_has_bias=bias)


ONE_BLOCK = {"lorax", "fasterdecoding", "fasterdecoding-legacy", "fasterdecoding-merged", "rtp-llm", "modelopt"}


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_expresses_is_not_refused(name):
    heads = 5 if name == "fasterdecoding" else 3
    assert why(name, num_heads=heads) is None
    assert (why(name, num_heads=heads, form="separate") is None) == (OUTPUTS[name][1] is not None)
    assert (why(name, num_heads=heads, num_layers=2) is None) == (name not in ONE_BLOCK)


REFUSALS = {
    "blocks": (
        {"name": "lorax", "num_layers": 2},
        "found 2 residual blocks per head, expected 1: lorax .*train with medusa_num_layers: 1",
    ),
    "separate-lorax": (
        {"name": "lorax", "form": "separate"},
        "found heads with output layers of their own, expected heads that share lm_head.*medusa_lm_head: shared",
    ),
    "separate-legacy": ({"name": "fasterdecoding-legacy", "form": "separate"}, "output layers of their own"),
    "four-heads": (
        {"name": "fasterdecoding", "num_heads": 4},
        "found 4 heads, expected 5.*medusa_num_heads: 5, or export to fasterdecoding-merged",
    ),
    "six-heads": ({"name": "fasterdecoding", "num_heads": 6}, "found 6 heads, expected 5"),
    "merged_model": (
        {"name": "fasterdecoding-merged", "model_type": "qwen2"},
        "found a qwen2 model, expected llama or mistral",
    ),
    "legacy-model": (
        {"name": "fasterdecoding-legacy", "model_type": "mistral"},
        "found a mistral model, expected llama:",
    ),
    "padded-vocabulary": (
        {"name": "vllm", "vocab_size": 32},
        "found a vocabulary of 24 in the heads, expected 32 as in the config of the model",
    ),
    "nested-vocabulary": (
        {"name": "tgi", "text_config": {"vocab_size": 32, "hidden_size": HIDDEN}},
        "found a vocabulary of 24 in the heads, expected 32",
    ),
    "hidden-size": ({"name": "tgi", "hidden_size": 16}, "found a hidden size of 8 in the heads, expected 16"),
    "bias": (
        {"name": "vllm", "bias": True},
        "found heads that share an lm_head with a bias, expected none.*medusa_lm_head: separate",
    ),
    "bias-copied": ({"name": "tensorrt-llm", "bias": True}, "share an lm_head with a bias"),
    **{
        f"path-{part}": (
            {"name": "vllm", "out": f"/models/{part}7b/heads"},
            f"found '{part.lower()}' in the path /models/{part}7b/heads, expected a path without it",
        )
        for part in ("eagle-", "EAGLE3", "dflash", "dspark")
    },
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_target_cannot_express_is_refused_in_one_line(case):
    arguments, message = REFUSALS[case]
    reason = why(**arguments)
    assert reason is not None and re.search(message, reason) and "\n" not in reason
    assert reason.startswith("found ") and ", expected " in reason and "; " in reason


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "tgi", "bias": True},  # the served lm_head itself follows the heads
        {"name": "vllm", "bias": True, "form": "separate"},
        {"name": "tgi", "out": "/models/eagle-7b/heads"},
        {"name": "vllm", "out": "/models/beagles/heads"},
        {"name": "vllm", "model_type": "qwen2"},
        {"name": "vllm", "text_config": {"vocab_size": VOCAB, "hidden_size": HIDDEN}, "vocab_size": None},
    ],
    ids=str,
)
def test_what_only_looks_like_a_reason_is_not_refused(arguments):
    assert why(**arguments) is None

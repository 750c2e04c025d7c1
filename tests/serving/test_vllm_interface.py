"""What the drafter asks of vLLM and of its user: each thing that is missing ends in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from drafter_heads import HIDDEN, VOCAB, write
from fake_vllm import Target, fake_vllm, vllm_config
from torch import nn

from axolotl_medusa.serving import vllm_interface
from axolotl_medusa.serving.vllm_interface import ARGUMENTS, OutputLayer, check_interface, read_options, watch_steps
from axolotl_medusa.vllm_drafter import MedusaDrafter

KNOWN = r"^MedusaDrafter works with vLLM 0\.32 and 0\.33, and in vLLM \S+.* "


def test_vllm_as_it_is_known_passes(monkeypatch):
    fake_vllm(monkeypatch)
    check_interface()


@pytest.mark.parametrize("lost", ARGUMENTS)
def test_vllm_without_an_argument_ends_in_one_line(monkeypatch, tmp_path, lost):
    fake_vllm(monkeypatch, [name for name in ARGUMENTS if name != lost])
    with pytest.raises(RuntimeError, match=KNOWN + f".*has no argument {lost}: install one of those") as error:
        MedusaDrafter(vllm_config(tmp_path))
    assert "\n" not in str(error.value)


def test_vllm_without_the_method_ends_in_one_line(monkeypatch):
    runner = fake_vllm(monkeypatch)
    del runner.propose_draft_token_ids
    with pytest.raises(RuntimeError, match=KNOWN + "GPUModelRunner has no propose_draft_token_ids"):
        check_interface()


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        ("vllm.v1.core.sched.output", "SchedulerOutput", "total_num_scheduled_tokens"),
        ("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", "num_draft_tokens"),
    ],
)
def test_vllm_without_a_field_ends_in_one_line(monkeypatch, module, kind, name):
    import sys

    fake_vllm(monkeypatch)
    monkeypatch.setattr(sys.modules[module], kind, dataclasses.make_dataclass(kind, ["other"]))
    with pytest.raises(RuntimeError, match=KNOWN + f"{kind} has no {name}"):
        check_interface()


def test_vllm_without_a_module_ends_in_one_line(monkeypatch):
    import sys

    fake_vllm(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm.v1.spec_decode.metadata", None)
    with pytest.raises(RuntimeError, match=KNOWN):
        check_interface()


def test_runner_is_wrapped_once(monkeypatch):
    runner = fake_vllm(monkeypatch)
    watch_steps()
    method = runner.propose_draft_token_ids
    watch_steps()
    assert runner.propose_draft_token_ids is method


def test_other_drafters_of_the_process_are_left_alone(monkeypatch):
    runner = fake_vllm(monkeypatch)
    watch_steps()

    class Other:
        def propose(self, *args, **kwargs):
            return "its own"

    own = runner()
    own.drafter = Other()
    own.input_batch = type("Batch", (), {"num_tokens": [1], "req_ids": ["a"]})
    assert own.propose_draft_token_ids(None, [[1]], torch.zeros(1, 2), None) == "its own"


@pytest.mark.parametrize(
    ("additional", "found"),
    [
        (
            {"medusa_adaptiv": False},
            "found medusa_adaptiv in --additional-config, expected one of medusa_heads, medusa_adaptive",
        ),
        ({"medusa_adaptive": "no"}, "medusa_adaptive in --additional-config is 'no', expected true or false"),
        ({"medusa_heads": 3}, "medusa_heads in --additional-config is 3, expected a directory"),
    ],
)
def test_mistakes_in_the_configuration_end_in_one_line(tmp_path, additional, found):
    config = vllm_config(tmp_path)
    config.additional_config |= additional
    with pytest.raises(ValueError, match=found):
        read_options(config)


def test_missing_heads_are_asked_for(tmp_path):
    config = vllm_config(tmp_path)
    for given in ({}, None, {"other": 1}):
        config.additional_config = given
        with pytest.raises(ValueError, match="found no medusa_heads, expected --additional-config"):
            read_options(config)


def test_keys_of_others_are_left_alone(tmp_path):
    options = read_options(vllm_config(tmp_path, gdn_prefill_backend="x"))
    assert (options.heads, options.adaptive, options.record) == (tmp_path, True, None)


def test_pipeline_parallelism_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found 2 pipeline stages, expected 1 with Medusa heads"):
        read_options(vllm_config(tmp_path, stages=2))


def test_model_without_compute_logits_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="Linear has no compute_logits"):
        OutputLayer(nn.Linear(2, 2))


def test_requests_lora_is_not_added_to_the_heads_logits(monkeypatch):
    """vLLM's layer that adds it looks it up by the rows of the step, and the heads have other rows."""

    class Processor(nn.Module):
        def forward(self, lm_head, hidden):
            return lm_head(hidden)

    class LogitsProcessorWithLoRA(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, lm_head, hidden):
            raise AssertionError("rows of the step are not the heads' rows")

    class Wrapped(Target):
        def __init__(self):
            super().__init__()
            self.logits_processor = LogitsProcessorWithLoRA(Processor())

        def compute_logits(self, hidden_states):
            return self.logits_processor(self.lm_head, hidden_states)

    target, hidden = Wrapped(), torch.randn(5, HIDDEN)
    own = target.logits_processor
    logits = OutputLayer(target)(hidden)
    assert logits.shape == (5, VOCAB)
    assert torch.equal(logits, target.lm_head(hidden))
    assert target.logits_processor is own
    assert LogitsProcessorWithLoRA.__name__ == vllm_interface._LORA_OUTPUT


def test_heads_are_found_below_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "heads", "shared")
    config = vllm_config(tmp_path)
    config.additional_config["medusa_heads"] = "~/heads"
    assert read_options(config).heads == tmp_path / "heads"

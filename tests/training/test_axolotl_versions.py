"""What this package takes from axolotl beyond its documented plugin API is still there; these tests fail where it changes."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from conftest import AXOLOTL_YAML, PLUGIN

from axolotl_medusa.training import axolotl_versions
from axolotl_medusa.training.args import PATH_KEYS
from axolotl_medusa.training.axolotl_versions import missing_fsdp_version, unread_options
from axolotl_medusa.training.interruptions import InterruptibleTrainer
from axolotl_medusa.training.plugin import MedusaPlugin
from axolotl_medusa.training.trainer import MedusaTrainer

ONLY_NEWER = {"post_lora_merge", "reports_token_perplexity"}
"""What axolotl 0.19 does not ask for yet."""

OURS = {
    "setup_medusa",
    "choose_checkpoint",
    "choose_draft_vocab",
    "open_hidden_cache",
    "medusa_trains",
    "medusa_written",
}
"""Public names of our trainer that are not axolotl's."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def refused(own, upstream) -> list[str]:
    """Parameters of the upstream method that ours would not take."""
    mine = inspect.signature(own).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in mine.values()):
        return []
    theirs = inspect.signature(upstream).parameters
    return [name for name, parameter in theirs.items() if parameter.kind not in VARIADIC and name not in mine]


def overridden(ours: type, upstream: type) -> list[str]:
    return [name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(upstream, name)]


@pytest.mark.parametrize(
    ("ours", "upstream", "at_least"),
    [(MedusaPlugin, BasePlugin, 8), (MedusaTrainer, AxolotlTrainer, 8), (InterruptibleTrainer, AxolotlTrainer, 4)],
)
def test_overridden_methods_take_what_axolotl_passes(ours, upstream, at_least):
    names = [name for name in overridden(ours, upstream) if not name.startswith("__")]
    assert len(names) >= at_least
    missing = {name: refused(vars(ours)[name], getattr(upstream, name)) for name in names}
    assert not {name: parameters for name, parameters in missing.items() if parameters}


@pytest.mark.parametrize(("ours", "upstream"), [(MedusaPlugin, BasePlugin), (MedusaTrainer, AxolotlTrainer)])
def test_every_hook_is_one_that_axolotl_calls(ours, upstream):
    public = {name for name in vars(ours) if not name.startswith("_")}
    assert {name for name in public - OURS if not hasattr(upstream, name)} <= ONLY_NEWER


def test_missing_fsdp_version_is_what_axolotl_fills_in(validated):
    cfg = {**AXOLOTL_YAML, "plugins": [], "fsdp_config": {"reshard_after_forward": True}}
    assert validated(cfg).fsdp_version == missing_fsdp_version()


def test_missing_fsdp_version_is_refused_only_where_it_means_1(validated):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, "fsdp_config": {"reshard_after_forward": True}}
    if missing_fsdp_version() == 2:
        assert validated(cfg).fsdp_version == 2
        return
    with pytest.raises(SystemExit, match="fsdp_version is 1"):
        validated(cfg)


def sent_by_telemetry(cfg: dict) -> str:
    """What axolotl's telemetry makes of a YAML before it sends it."""
    from axolotl.telemetry.manager import TelemetryManager

    manager = object.__new__(TelemetryManager)
    manager.whitelist = {"organizations": set()}
    return json.dumps(manager._redact_paths(cfg))


@pytest.mark.parametrize("name", [*PATH_KEYS, *PATH_KEYS.values()])
def test_our_keys_that_hold_paths_are_not_sent_by_telemetry(name, validated, tmp_path):
    """The names with `dir` not even in the event that axolotl sends before it loads a plugin."""
    secret = tmp_path / "my secret plans"
    secret.mkdir()
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_only_heads": True}
    if name in PATH_KEYS:
        assert "secret" not in sent_by_telemetry({**cfg, name: str(secret)})
    key = PATH_KEYS.get(name, name)
    if key == "medusa_hidden_cache":
        processed = validated({**cfg, name: str(secret)})
        assert processed[key] == str(secret) and "secret" not in sent_by_telemetry(processed)
    else:
        with pytest.raises(SystemExit, match="my secret plans"):  # it is looked for, and holds no heads
            validated({**cfg, name: str(secret)})
        assert "secret" not in sent_by_telemetry({**cfg, key: str(secret)})


def test_key_under_both_of_its_names_is_one_line(validated):
    cfg = {**AXOLOTL_YAML, "medusa_num_heads": 3, "medusa_only_heads": True}
    with pytest.raises(SystemExit, match="medusa_hidden_cache_dir and medusa_hidden_cache are two names of one key"):
        validated({**cfg, "medusa_hidden_cache": "a", "medusa_hidden_cache_dir": "b"})


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        (["/usr/bin/axolotl", "train", "x.yml", "--medusa_num_heads", "3"], ["--medusa_num_heads"]),
        (["axolotl", "train", "x.yml", "--medusa-only-heads=true"], ["--medusa-only-heads=true"]),
        (["axolotl", "train", "x.yml", "--learning-rate", "1"], []),
        (["/site-packages/axolotl/cli/train.py", "x.yml", "--medusa_num_heads=3"], []),
        ([], []),
    ],
)
def test_options_that_axolotl_hands_to_the_launcher_are_found(arguments, unread):
    assert unread_options(arguments) == unread


def test_option_for_the_launcher_stops_with_the_command_that_reads_it(validated, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "x.yml", "--launcher", "python", "--medusa_num_heads", "3"])
    with pytest.raises(SystemExit, match=r"accelerate launch -m axolotl.cli.train x.yml --medusa_num_heads=3"):
        validated({**AXOLOTL_YAML, "plugins": [PLUGIN], "medusa_num_heads": 5})


def test_config_validation_still_needs_no_answer_where_axolotl_has_none(monkeypatch):
    import axolotl.utils.schemas.config as schemas

    monkeypatch.setattr(schemas, "AxolotlInputConfig", object)
    assert axolotl_versions.missing_fsdp_version() == 2

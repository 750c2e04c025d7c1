"""Pushing: what the Hub's client is asked to do, and what never leaves the machine."""

from __future__ import annotations

import json
import logging
import re

import httpx
import pytest
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from axolotl_medusa.serving.push import push


class Api:
    """Stands in for `HfApi`; what it was asked is in `asked`."""

    asked: list[tuple]
    error: Exception | None = None

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))
        if self.error is not None:
            raise self.error
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, *, folder_path, repo_id, commit_message, allow_patterns):
        there = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        names = sorted(filter_repo_objects(there, allow_patterns=allow_patterns))
        self.asked.append(("upload", repo_id, names, commit_message))


@pytest.fixture
def hub(monkeypatch):
    Api.asked, Api.error = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return Api


@pytest.fixture
def exported(tmp_path):
    directory = tmp_path / "export"
    directory.mkdir()
    for name in ("README.md", "model.safetensors", "config.json"):
        (directory / name).write_text("{}")
    (directory / "medusa_meta.json").write_text('{"export": {"target": "vllm"}}')
    return directory


@pytest.mark.parametrize("private", [False, True])
def test_push_creates_the_repository_and_uploads_the_directory_with_its_card(private, hub, exported):
    assert push(exported, "me/heads", private=private) == "https://hub.invalid/me/heads"
    assert hub.asked == [
        ("create", "me/heads", private, True),
        (
            "upload",
            "me/heads",
            ["README.md", "config.json", "medusa_meta.json", "model.safetensors"],
            "Medusa heads, exported by axolotl-medusa",
        ),
    ]


def test_push_takes_torch_weights_too(hub, exported):
    (exported / "model.safetensors").rename(exported / "medusa_lm_head.pt")
    push(str(exported), "me/heads")
    assert len(hub.asked) == 2


@pytest.mark.parametrize("missing", ["README.md", "model.safetensors"])
def test_directory_that_is_no_export_is_not_pushed(missing, hub, exported):
    (exported / missing).unlink()
    with pytest.raises(ValueError, match=r"has no README\.md with weights beside it: write an export with"):
        push(exported, "me/heads")
    assert hub.asked == []


@pytest.mark.parametrize("marker", [None, {}, {"recipe": "medusa-1"}, {"export": True}])
def test_heads_and_models_that_no_export_wrote_are_not_pushed(marker, hub, exported):
    (exported / "medusa_meta.json").unlink()
    if marker is not None:
        (exported / "medusa_meta.json").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=r"export is no export, expected a medusa_meta\.json that says so"):
        push(exported, "me/heads")
    assert hub.asked == []


def test_nothing_but_an_exports_own_files_is_uploaded(hub, exported, tmp_path, caplog):
    own = [
        "merged_model/model-00001-of-00002.safetensors",
        "merged_model/tokenizer.json",
        "modeling_own.py",
        "pkg/x[1].py",
    ]
    (exported / "medusa_meta.json").write_text(
        json.dumps(
            {"export": {"files": ["modeling_own.py", "pkg/x[1].py", "../secrets.py", "/etc/hostname", "link.py", 3]}}
        )
    )
    (tmp_path / "secrets.py").write_text("")
    others = [
        ".env",
        "train.log",
        "optimizer.pt",
        "train.py",
        "checkpoint-4/model.safetensors",
        "merged_model/notes.md",
    ]
    for name in [*own, *others, "checkpoint-4/README.md", "wandb/run.json"]:
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("https://me:pass@host" if name in others else "auth_token = None")
    for link in ("link.py", "tokenizer.model"):
        (exported / link).symlink_to(tmp_path / "secrets.py")
    with caplog.at_level(logging.INFO):
        push(exported, "me/heads")
    assert hub.asked[1][2] == sorted(["README.md", "config.json", "medusa_meta.json", "model.safetensors", *own])
    assert "not uploaded, as they are no part of the export: .env, checkpoint-4, link.py, " in caplog.text


def test_missing_directory_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match="none is not a directory: expected one that `axolotl-medusa export` wrote"):
        push(tmp_path / "none", "me/heads")
    assert hub.asked == []


@pytest.mark.parametrize("part", [".part", ".0a1b.part"])
def test_unfinished_export_is_not_pushed(part, hub, exported):
    (exported / "merged_model").mkdir()
    (exported / "film.part").touch()
    push(exported, "me/heads")
    hub.asked.clear()
    (exported / "merged_model" / f"model.safetensors{part}").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors.*\.part is half a file"):
        push(exported, "me/heads")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("key", "value", "is_secret"),
    [
        ("comet_api_key", "abc", True),
        ("hub_token", "abc", True),
        ("hf_use_auth_token", "abc", True),
        ("hf_use_auth_token", True, False),
        ("comet_api_key", "", False),
        ("eos_token", "</s>", False),
        ("token_ids", "1", False),
    ],
)
@pytest.mark.parametrize(
    "nest", [lambda value: value, lambda value: {"list": [{"inner": value}]}], ids=["top", "nested"]
)
def test_secret_of_the_yaml_is_not_published(nest, key, value, is_secret, hub, exported):
    (exported / "medusa_meta.json").write_text(json.dumps({"export": {}, "yaml": nest({key: value})}))
    if not is_secret:
        push(exported, "me/heads")
        return
    with pytest.raises(ValueError, match=f"holds the YAML's {key}, which would be published"):
        push(exported, "me/heads")
    assert hub.asked == []


@pytest.mark.parametrize(
    "value", ["https://me:pass@host/mlflow", "https://host/mlflow?token=abc", "hf_abcdefghijklmnopqrstuvw"]
)
def test_credentials_in_a_value_of_the_yaml_are_not_published(value, hub, exported):
    (exported / "medusa_meta.json").write_text(json.dumps({"export": {}, "yaml": {"mlflow_tracking_uri": value}}))
    with pytest.raises(ValueError, match="holds the YAML's mlflow_tracking_uri, which would be published") as error:
        push(exported, "me/heads")
    assert value not in str(error.value) and hub.asked == []


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        (
            "config.json",
            '{"base_model_name_or_path": "https://me:pass@host/model"}',
            "a credential (base_model_name_or",
        ),
        ("adapter_config.json", '{"nested": {"hub_token": "abc"}}', "a credential (hub_token)"),
        ("merged_model/config.json", '{"auth_token": "abc"}', "a credential (auth_token)"),
        ("README.md", "trained on\n`https://me:pass@host/data`\n", "a credential (line 2)"),
        ("chat_template.jinja", "a: 1\nurl: https://host/?token=abc", "a credential (line 2)"),
        ("vocab.yml", "a: 1\nurl: https://host/?token=abc", "a credential (line 2)"),
        ("modeling_own.py", "a = 1\nf('https://me:pass@host')", "a credential (line 2)"),
        ("modeling_own.py", "a = 1\n# https://me:pass@host", "a credential (line 2)"),
        ("modeling_own.py", "a = (\nhttps://me:pass@host", "a credential (line 2)"),
        ("config.json", "{ broken https://me:pass@host", "a credential (line 1)"),
    ],
)
def test_credentials_in_any_text_file_are_not_published(file, content, what, hub, exported):
    (exported / "merged_model").mkdir()
    (exported / "medusa_meta.json").write_text(json.dumps({"export": {"files": ["modeling_own.py"]}}))
    (exported / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file} holds {re.escape(what)}.*, which would be published") as error:
        push(exported, "me/heads")
    assert "pass@" not in str(error.value) and "abc" not in str(error.value) and hub.asked == []


def test_words_of_a_vocabulary_are_no_secrets(hub, exported):
    (exported / "tokenizer.json").write_text('{"model": {"vocab": {"password": 5, "hub_token": "x"}}}')
    (exported / "vocab.json").write_text('{"secret": 1, "token": 2}')
    (exported / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": {"content": "<unk>"}}')
    push(exported, "me/heads")
    assert len(hub.asked) == 2


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required\n(`token=True`), but no token found."),
        HFValidationError("Repo id must be in the form 'name' or 'owner/name'"),
        httpx.ConnectError("Name or service not known"),
    ],
)
def test_refusal_of_the_hub_is_one_line_with_its_reason(error, hub, exported):
    hub.error = error
    with pytest.raises(
        ValueError, match=r"the Hub refused me/heads: .*log in with `hf auth login` or check the name"
    ) as caught:
        push(exported, "me/heads")
    assert str(error).split()[0] in str(caught.value) and "\n" not in str(caught.value)


def test_refusal_of_the_hub_says_no_credentials(hub, exported):
    hub.error = httpx.ConnectError("cannot connect to https://me:pass@host/api?token=abc")
    with pytest.raises(ValueError, match=r"cannot connect to https://\*\*\*@host/api\?token=\*\*\*"):
        push(exported, "me/heads")

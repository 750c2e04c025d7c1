"""What is a secret, in every place where one stands, and what only looks like one."""

from __future__ import annotations

import time

import pytest

from axolotl_medusa.model.secrets import secrets_in, without_secrets

TEXTS = {
    "https://me:pass@host/mlflow": "https://***@host/mlflow",
    "https://hf_user@host": "https://***@host",
    "http://u:p@ss:w@h:8000/v1 and ftp://a:b@c": "http://***@h:8000/v1 and ftp://***@c",
    "postgres://u:p/w?x#y@db/x and http://h:80/@z": "postgres://***@db/x and http://h:80/@z",
    "postgresql+psycopg2://u:p%40@db/x": "postgresql+psycopg2://***@db/x",
    "https://h/x?token=abc&rows=3": "https://h/x?token=***&rows=3",
    "https://h/x?a=1&access_token=abc#top": "https://h/x?a=1&access_token=***#top",
    "https://h/x?X-Amz-Credential=AK/1&X-Amz-Signature=00ff&X-Amz-Date=1": (
        "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=1"
    ),
    "https://h/x?sig=abc%3D&sv=1": "https://h/x?sig=***&sv=1",
    "AccountName=me;AccountKey=abc==;Suffix=x": "AccountName=me;AccountKey=***;Suffix=x",
    "MYDB_PASSWORD=$ecret": "MYDB_PASSWORD=***",
    "WANDB_API_KEY=0123": "WANDB_API_KEY=***",
    "aws_secret_access_key=abc aws_session_token=d": "aws_secret_access_key=*** aws_session_token=***",
    "sent with Bearer abcdefghijklmnop.q": "sent with Bearer ***",
    "Authorization: Basic bWU6c2VjLXJldDpsb25n": "Authorization: Basic ***",
    "https://hooks.slack.com/services/T0/B0/xyz is called": "https://hooks.slack.com/*** is called",
    "my token is hf_abcdefghijklmnopqrst!": "my token is ***!",
    "sk-proj-abcdefghijklmnopqrstu": "***",
    "AKIAIOSFODNN7EXAMPLE": "***",
}
HARMLESS = [
    "https://host:8000/v1",
    "https://host/@org/model",
    "git+https://host/org/repo@v1.2",
    "https://host/x?tokenizer=a&monkey=b&key_name=c",
    "write to me@host",
    "s3://bucket/a@b.jsonl",
    "org/model-7b",
    "eos_token=</s>",
    "risk-averse-and-very-long-names-of-models",
    "HF_TOKEN=$HF_TOKEN api_key={key} https://host/?token=${TOKEN}",
    "the bearer of good news",
    "0c8d76d0c8d76d0c8d76d0c8d76d0c8d76d0c8d7",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secret_in_a_text_is_hidden_and_the_rest_stays(text):
    assert without_secrets(text) == TEXTS[text]
    assert without_secrets(TEXTS[text]) == TEXTS[text]
    assert list(secrets_in({"a": [{"b": text}]})) == ["b"] and list(secrets_in({"a": [text]})) == ["a"]
    assert list(secrets_in({"a": TEXTS[text]})) == []


@pytest.mark.parametrize("text", HARMLESS)
def test_text_without_a_secret_stays(text):
    assert without_secrets(text) == text and list(secrets_in([text])) == []


@pytest.mark.parametrize(
    "key",
    ["hub_token", "hf_token", "token", "comet_api_key", "WANDB_API_KEY", "apiKey", "api-key", "aws_secret_access_key",
     "aws_access_key_id", "aws_session_token", "mlflow_tracking_password", "client_secret", "hf_use_auth_token",
     "clientSecret", "credentials", "huggingface_token", "HUGGING_FACE_HUB_TOKEN", "swanlab_lark_webhook_url",
     "api_keys", "secrets", "slack_token", "basic_auth", "private_key_pem"],
)  # fmt: skip
def test_value_of_a_secret_key_is_hidden(key):
    content = {"outer": [{key: "abc"}, {key: {"inner": ["x", 5, True, None, ""]}}]}
    assert without_secrets(content) == {"outer": [{key: "***"}, {key: {"inner": ["***", "***", True, None, ""]}}]}
    assert content["outer"][0] == {key: "abc"}, "the original stays"
    assert list(secrets_in(content)) == [key, key]


@pytest.mark.parametrize(
    "key", ["eos_token", "tokens", "token_ids", "special_tokens", "comet_experiment_key", "monkey", "secretary", "keys"]
)
def test_other_keys_keep_their_values(key):
    content = {key: "abc", "nested": {key: ["abc", 1]}}
    assert without_secrets(content) == content and list(secrets_in(content)) == []


def test_yaml_of_a_run_without_credentials_stays_as_it_is():
    yaml = {
        "tokenizer_type": "AutoTokenizer",
        "special_tokens": {"pad_token": "<|pad|>", "eos_token": "</s>", "additional_special_tokens": ["<a>"]},
        "tokens": ["<|im_start|>", "<|im_end|>"],
        "eot_tokens": ["<|im_end|>"],
        "added_tokens_overrides": {"128010": "<tool>"},
        "max_tokens": 512,
        "datasets": [
            {
                "path": "https://huggingface.co/datasets/org/data/resolve/main/a.jsonl?download=true",
                "field_messages": "m",
            },
            {"path": "s3://bucket/key=5/rows.jsonl", "message_property_mappings": {"role": "from"}},
        ],
        "mlflow_tracking_uri": "http://mlflow:5000",
        "hf_use_auth_token": True,
        "hub_model_id": "me/heads",
        "template_thinking_key": "thinking",
        "comet_experiment_key": "run-5",
        "chat_template_jinja": "{% if token == 'x' %}{{ bos_token }}{% set secret='y' %}{% endif %}",
        "wandb_project": "key=value",
        "base_model": "org/model@main",
        "seed": 5,
    }
    assert without_secrets(yaml) == yaml and list(secrets_in(yaml)) == []


@pytest.mark.parametrize("value", [True, False, None, ""])
def test_switches_and_empty_values_are_no_secrets(value):
    assert without_secrets({"hub_token": value}) == {"hub_token": value}
    assert list(secrets_in({"hub_token": value})) == []


@pytest.mark.parametrize("piece", ["a", "://", "://a", "token", "api_key=", "sk-", "hf_", "@", "?key=", "bearer "])
def test_long_texts_take_no_long_time(piece):
    start = time.process_time()
    without_secrets(piece * (1_000_000 // len(piece)))
    assert time.process_time() - start < 5, "a tenth of that was measured for the slowest"

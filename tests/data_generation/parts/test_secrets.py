"""Credentials that are sent and never shown."""

import base64

import pytest

from parts.secrets import split_credentials, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:8000/v1 is set aside", "http://***@host:8000/v1 is set aside"),
        ("http://token@host", "http://***@host"),
        ("http://me:p@ss@host/v1", "http://***@host/v1"),
        ("http://host/v1?api_key=abc&a=1", "http://host/v1?api_key=***&a=1"),
        ("http://host/v1?X-Amz-Security-Token=abc", "http://host/v1?X-Amz-Security-Token=***"),
        ("unrecognized arguments: --api_key abc --x", "unrecognized arguments: --api_key *** --x"),
        ("unrecognized arguments: --api-key=abc --token t", "unrecognized arguments: --api-key=*** --token ***"),
        ("http://host:8000/v1/@x", "http://host:8000/v1/@x"),
        ("--token_ids --api_key_env NAME", "--token_ids --api_key_env NAME"),
        ("--token --chat", "--token --chat"),
        ("found the token 5, expected none", "found the token 5, expected none"),
    ],
)
def test_text_is_shown_without_credentials(text: str, shown: str) -> None:
    assert without_secrets(text) == without_secrets(shown) == shown


def test_credentials_are_taken_out_of_an_address() -> None:
    def basic(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    for url, found in (
        ("http://host:8000/v1", ("http://host:8000/v1", [])),
        ("http://me:pass@host:8000/v1", ("http://host:8000/v1", [basic("me:pass"), "pass", "pass"])),
        ("http://me@host", ("http://host", [basic("me:"), "me", "me"])),
        ("http://me:a%40b@host/x?y#z", ("http://host/x?y#z", [basic("me:a@b"), "a@b", "a%40b"])),
        ("http://host/a@b", ("http://host/a@b", [])),
        ("host:8000", ("host:8000", [])),
    ):
        assert split_credentials(url) == found

"""Credentials in what is written, shown or published: passwords in addresses, tokens in queries, values of secret keys.

Contract: pure functions of texts and JSON values; imports nothing of the package. A secret is known by where it stands
(`user:password@`, `token=`, `hub_token:`) or by its shape (`hf_...`); one that looks like any other word is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
"""Stands where a secret was."""

_NAMES = (
    r"api_?key|access_?key(?:_?id)?|secret_?(?:access_?)?key|(?:private|account|encryption|wandb|license)_?key|"
    r"(?:auth|access|hub|hf|hugging_?face|api|session|refresh|security|sas|tracking|wandb|github|gh|gitlab|oauth|bearer|private|"
    r"personal)_?token|secret|passw(?:or)?d|passphrase|credentials?|authorization|amz_signature|goog_signature|"
    r"(?:slack|discord|telegram|databricks|mlflow|comet|swanlab|npm|pypi)_token|basic_auth|webhook(?:_?ur[il])?"
)
_KEY = re.compile(rf"(?:^|.*[\W_])(?:{_NAMES})(?:s|_pem)?$|^token$|^pwd$", re.IGNORECASE)
"""Names of settings: `hub_token` and `comet_api_key`, not `eos_token` or `tokens`."""

_ANYWHERE = _NAMES.replace("_?", "[_-]?").replace("amz_", "amz-").replace("goog_", "goog-")
_VALUE = r"(?!\*\*\*|\{|\$\{|(?-i:\$[A-Z_]+\b))[^\s&;,#\"'<>]+"
"""Of a parameter; placeholders such as `$TOKEN` are no secrets."""
_IN_TEXT = (
    # The user's part of an address: all up to the last @ before the path.
    (re.compile(r"(?<=://)[^\s/?#\"'<>]+(?=@)"), HIDDEN),
    # The same with marks in the password that should have been quoted; a port and a path that has an @ are none.
    (re.compile(r"(?<=://)[^\s/:@\"'<>]*:(?!\d*[/?#])[^\s\"'<>]*(?=@)"), HIDDEN),
    # A parameter of a query or a connection string; short names only where a query's separator stands before them.
    (re.compile(rf"(?i)((?:{_ANYWHERE})=){_VALUE}"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(?<=[?&;#])((?:token|key|sig|signature|auth|pwd|code)=){_VALUE}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer |authorization: basic )[\w.~+/=-]{16,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(://hooks\.slack\.com/|://discord(?:app)?\.com/api/webhooks/)[\w/-]+"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
            r"glpat-[\w-]{20,}|wandb_v\d_\w{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
        ),
        HIDDEN,
    ),
)


def without_secrets(content: Any) -> Any:
    """A copy of a JSON value, or of a text, in which `***` stands for every secret.

    Args:
        content: A text, or mappings and lists of texts, numbers, booleans and None; other values stay as they are.
    """
    if isinstance(content, str):
        for pattern, replacement in _IN_TEXT:
            content = pattern.sub(replacement, content)
        return content
    if isinstance(content, dict):
        return {
            key: _hidden(value) if is_secret_key(str(key)) else without_secrets(value) for key, value in content.items()
        }
    return [without_secrets(value) for value in content] if isinstance(content, list) else content


def is_secret_key(key: str) -> bool:
    """Whether a setting of this name holds a secret, in any of the spellings `api_key`, `api-key` and `apiKey`."""
    return _KEY.match(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_")) is not None


def secrets_in(content: Any, key: str = "") -> Iterator[str]:
    """Names of the settings in a JSON value that hold a secret; the nearest name where one is in a list."""
    if isinstance(content, dict):
        for name, value in content.items():
            if is_secret_key(str(name)) and any(text not in ("", HIDDEN) for text in _texts(value)):
                yield str(name)
            else:
                yield from secrets_in(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from secrets_in(value, key)
    elif isinstance(content, str) and without_secrets(content) != content:
        yield key


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _hidden(value: Any) -> Any:
    """What stands for the value of a secret key: switches (`hf_use_auth_token: true`) and what is empty stay."""
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner) for inner in value]
    return value if value is None or isinstance(value, bool) or value == "" else HIDDEN

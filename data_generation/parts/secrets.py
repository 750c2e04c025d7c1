"""Credentials in addresses and flags: a server gets them, and nothing that is written or said holds them.

Knows nothing about servers or files.
"""

import base64
import re
from urllib.parse import unquote

HIDDEN = "***"
NAMES = r"(?:api|access|account|secret|private)[_-]?key(?:[_-]?id)?|(?:[a-z0-9]+[_-])*(?:token|secret|password)|key|sig(?:nature)?"
IN_TEXT = (
    (re.compile(r"(?<=://)[^\s/?#\"'<>]+(?=@)"), HIDDEN),  # the user's part: all up to the last @ before the path
    (re.compile(rf"(?i)(?<=[?&;#])((?:{NAMES})=)[^\s&;,#\"'<>]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(--?(?:[a-z]+[_-])?(?:key|token|password|secret)(?:=| +))(?!-)\S+"), rf"\1{HIDDEN}"),
)
WITH_USER = re.compile(r"([^\s/]+://)([^\s/?#]*)@(.*)", re.DOTALL)


def without_secrets(text: str) -> str:
    """Returns a text in which `***` stands for users and passwords of addresses, secret parameters and secret flags."""
    for pattern, replacement in IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def split_credentials(url: str) -> tuple[str, list[str]]:
    """Takes user and password out of an address.

    Returns:
        The address without them; and how a server gets them (as HTTP's basic authentication), the password as it is, and as it
        was written, none of which may show. Nothing if the address has none.
    """
    found = WITH_USER.fullmatch(url)
    if not found:
        return url, []
    scheme, credentials, rest = found.groups()
    user, _, password = credentials.partition(":")
    sent = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    written = password or user
    return scheme + rest, [text for text in (sent, unquote(written), written) if text]

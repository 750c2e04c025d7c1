"""A model's own chat template, rendered as transformers renders it, and read back.

Needs jinja2 where it is rendered; huggingface_hub only where a template is to be fetched from the hub. No torch, no transformers.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from parts.prompt_files import InputError, Turn, parse_json
from parts.raw_rows import check_depth, optional_module
from parts.template_process import TemplateError, TemplateProcess
from parts.turn_markers import TurnMarkers
from parts.turn_reader import SplitText, TurnReader

USER_WORD = "userTurnBeginsHereWord"
LARGEST_TEMPLATE, LARGEST_FILE = 1 << 20, 1 << 28  # bytes
TEMPLATES = TemplateProcess()
Fetch = Callable[[str], Path | None]  # name of a tokenizer's file -> where it is, None if the tokenizer has none


def local_files(directory: Path) -> Fetch:
    """Returns how to find the files of a tokenizer in a directory."""
    return lambda name: directory / name if (directory / name).is_file() else None


def hub_files(name: str) -> Fetch:
    """Returns how to fetch the files of a tokenizer on the hub, from the local cache where they are there already.

    Raises:
        InputError: If the hub, the tokenizer or the library is out of reach.
    """
    advice = "name a directory that holds the tokenizer's files: --tokenizer DIR"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        found = f"found no directory '{name}' and no huggingface_hub to fetch it with ({error})"
        raise InputError(f"{found}, expected one of them; pip install huggingface_hub, or {advice}") from error

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            found = f"found neither a directory '{name}' nor a way to it on the hub ({reason})"
            raise InputError(f"{found}, expected a chat template; {advice}") from error

    if not (fetch("tokenizer_config.json") or fetch("chat_template.jinja")):
        found = f"found no tokenizer '{name}' as a directory, in the local cache or on the hub"
        raise InputError(f"{found}, expected a chat template; {advice}")
    return fetch


def read_bytes(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """Reads a file, or raises InputError if it is too large to be what it should be."""
    if path.stat().st_size > largest:
        raise InputError(f"{path}: found {path.stat().st_size:,} bytes, expected at most {largest:,}")
    return path.read_bytes()


def read_text(path: Path, largest: int = LARGEST_FILE) -> str:
    """Reads a text file, or raises InputError."""
    try:
        return read_bytes(path, largest).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found no text ({error}), expected UTF-8") from error


def read_object(path: Path | None) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no file."""
    if path is None:
        return {}
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {shorten(value)}, expected an object")
    return value


def read_special_tokens(fetch: Fetch) -> dict[str, str]:
    """Returns the special tokens that templates may use: bos_token, eos_token and their like."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_object(fetch(name)).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


def read_template(fetch: Fetch) -> str | None:
    """Returns the text of a tokenizer's default chat template, None if it has none."""
    if path := fetch("chat_template.jinja"):
        return read_text(path, LARGEST_TEMPLATE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_object(fetch(name)).get("chat_template")
        if isinstance(template, list):
            entries = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
            template = next((entry.get("template") for entry in entries), None)
        if isinstance(template, str):
            return template
    return None


def adds_bos(fetch: Fetch, bos: str) -> bool:
    """Returns whether a tokenizer puts BOS before a text by itself: as its files say, True if they do not."""
    added = read_object(fetch("tokenizer_config.json")).get("add_bos_token")
    if isinstance(added, bool):
        return added
    path = fetch("tokenizer.json")
    if path is None:
        return True
    text = read_text(path)
    start = text.find('"post_processor":')  # the file is large, this part of it is small
    if start < 0:
        return False
    try:
        post_processor, _ = json.JSONDecoder().raw_decode(text[start : start + 100_000].partition(":")[2].lstrip())
        check_depth(post_processor, str(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found a damaged post_processor ({error}), expected JSON") from error
    return bos in json.dumps(post_processor, ensure_ascii=False)


class ChatTemplate:
    """A chat template with its special tokens."""

    def __init__(self, template: str, special_tokens: dict[str, str], source: str, strips_bos: bool = True) -> None:
        """Compiles a template.

        Args:
            template: Its text.
            special_tokens: What it sees as bos_token, eos_token and their like.
            source: Where it comes from, for messages.
            strips_bos: Whether the tokenizer adds BOS itself; see `user_prompt`.

        Raises:
            InputError: If the text is no template.
        """
        optional_module("jinja2", source)
        self.template, self.special_tokens, self.source, self.strips_bos = template, special_tokens, source, strips_bos
        self.dates: set[str] = set()  # that the template wrote, which are others on another day
        try:
            TEMPLATES.ask(template, None)
        except TemplateError as error:
            raise InputError(f"{source}: found no valid chat template ({error}), expected jinja2") from error

    @classmethod
    def load(cls, name_or_path: str) -> "ChatTemplate":
        """Loads the default chat template of a tokenizer.

        Args:
            name_or_path: A directory with the tokenizer's files, a template's own file (its special tokens are then
                those of the tokenizer_config.json beside it), or the name of a tokenizer on the hub.

        Raises:
            InputError: If there is no template, or no way to it.
        """
        path = Path(name_or_path).expanduser()
        is_file = path.suffix == ".jinja" and path.is_file()
        looks_local = path.exists() or path.suffix == ".jinja" or name_or_path.startswith((".", "/", "~"))
        if looks_local and not (is_file or path.is_dir()):
            raise InputError(f"found '{name_or_path}', expected a tokenizer's directory or a template's .jinja file")
        fetch = local_files(path.parent if is_file else path) if looks_local else hub_files(name_or_path)
        template = read_text(path, LARGEST_TEMPLATE) if is_file else read_template(fetch)
        if template is None:
            advice = "put a chat_template.jinja beside its files and name that directory: --tokenizer DIR"
            raise InputError(f"{name_or_path}: found no chat template, expected one; {advice}")
        tokens = read_special_tokens(fetch)
        bos = tokens.get("bos_token", "")
        return cls(template, tokens, name_or_path, strips_bos=bool(bos) and adds_bos(fetch, bos))

    def render(self, messages: Sequence[Turn], add_generation_prompt: bool = False, **template_kwargs: Any) -> str:
        """Renders messages; equals the text of transformers' `apply_chat_template(..., tokenize=False)`.

        Args:
            messages: The turns.
            add_generation_prompt: Whether to end with what the assistant's next turn begins with.
            **template_kwargs: What else the template knows, such as enable_thinking.

        Raises:
            InputError: If the template refuses the messages or fails; the text has its reason.
        """
        names: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None, **self.special_tokens}
        names |= {"add_generation_prompt": add_generation_prompt, **template_kwargs}
        try:
            text, dates = TEMPLATES.ask(self.template, names)
        except TemplateError as error:
            expected = "expected it to render these turns"
            if error.undefined and "_token'" in str(error):
                expected = "expected a tokenizer_config.json that defines it, in the template's directory"
            raise InputError(f"{self.source}: the chat template says '{error}', {expected}") from error
        self.dates |= set(dates)
        return text

    def user_prompt(self, messages: Sequence[Turn], strip_bos: bool = True) -> str:
        """Returns the text after which a model writes the next user turn.

        Blanks at its end are left out, since tokenizers join them to the next word. So is BOS at its beginning:
        servers tokenize the prompts of /v1/completions as plain text and put BOS before it, and after two of them
        models write something else. BOS stays where the tokenizer's files say that it adds none, and where it opens
        every turn of the template.

        Args:
            messages: The turns so far; none gives the bare prefix of a user turn, after the system turn that the
                template inserts by itself, if it does.
            strip_bos: False keeps BOS, for servers that add none.

        Raises:
            InputError: If the template refuses a user turn after these messages.
        """
        prompt, found, _ = self.render([*messages, {"role": "user", "content": USER_WORD}]).partition(USER_WORD)
        if not found:
            raise InputError(f"{self.source}: the chat template drops the last user turn, expected its text")
        if strip_bos and self.strips_bos:
            bos = self.special_tokens.get("bos_token", "")
            prompt = prompt.removeprefix(bos) if self.reader.markers.bos else prompt
        return prompt.rstrip(" ")

    @cached_property
    def reader(self) -> TurnReader:
        """What reads texts in this format; raises InputError if the template has no format that can be read."""
        bos, eos = (self.special_tokens.get(name, "") for name in ("bos_token", "eos_token"))
        try:
            return TurnReader(TurnMarkers.learn(self.render, bos, eos, self.dates))
        except InputError as error:
            source = "" if str(error).startswith(self.source) else f"{self.source}: "
            raise InputError(f"{source}{error}") from error

    @property
    def user_stop(self) -> str:
        """The shortest text that shows that a user turn is over: a stop string for user turns written by a model."""
        return self.reader.markers.boundaries["user"].stop

    def split_turns(self, text: str) -> SplitText:
        """Takes a text apart into turns: a prompt and all that a model wrote after it, playing both roles.

        What surrounds the turns is learned from the template. BOS may be there or not, and so may a system turn (one
        that the template inserts by itself is not returned) and the blanks around marks. An EOS token ends a turn.
        Contents are returned as they stand, with their reasoning, but an empty <think></think> that the template puts
        before answers belongs to it. A system text that the template joins to the first user turn without a mark
        stays a part of that turn.

        Args:
            text: The text, with special tokens as text.

        Returns:
            The turns up to the first that is torn or not in its place.

        Raises:
            InputError: If the template has no marks between turns.
        """
        return self.reader.read(text)

"""A model's own chat template, rendered as transformers renders it, and read back.

Needs jinja2; huggingface_hub only where a template is to be fetched from the hub. No torch, no transformers.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from parts.prompt_files import InputError, Turn, parse_json
from parts.turn_markers import TurnMarkers
from parts.turn_reader import SplitText, TurnReader

USER_WORD = "userTurnBeginsHereWord"
# What an expression in a template may raise besides jinja2's own errors, such as None + "text".
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

Fetch = Callable[[str], Path | None]  # name of a tokenizer's file -> where it is, None if the tokenizer has none


class GenerationTag(jinja2.ext.Extension):
    """Lets {% generation %} ... {% endgeneration %}, with which templates mark answers, render as what is inside."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns what is inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """Lets templates refuse messages."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON; jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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


def read_object(path: Path | None) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no file."""
    if path is None:
        return {}
    value = parse_json(path.read_bytes(), str(path))
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
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_object(fetch(name)).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
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
    text = path.read_text(encoding="utf-8")
    start = text.find('"post_processor":')  # the file is large, this part of it is small
    if start < 0:
        return False
    post_processor, _ = json.JSONDecoder().raw_decode(text[start : start + 100_000].partition(":")[2].lstrip())
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
        self.special_tokens, self.source, self.strips_bos = special_tokens, source, strips_bos
        self.dates: set[str] = set()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": self.strftime_now}
        try:
            self.compiled = environment.from_string(template)
        except jinja2.TemplateError as error:
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
        template = path.read_text(encoding="utf-8") if is_file else read_template(fetch)
        if template is None:
            advice = "put a chat_template.jinja beside its files and name that directory: --tokenizer DIR"
            raise InputError(f"{name_or_path}: found no chat template, expected one; {advice}")
        tokens = read_special_tokens(fetch)
        bos = tokens.get("bos_token", "")
        return cls(template, tokens, name_or_path, strips_bos=bool(bos) and adds_bos(fetch, bos))

    def strftime_now(self, form: str) -> str:
        """Gives templates the current date, and keeps what it gave: it is another one on another day."""
        date = datetime.now().strftime(form)
        self.dates.add(date)
        return date

    def render(self, messages: Sequence[Turn], add_generation_prompt: bool = False, **template_kwargs: Any) -> str:
        """Renders messages; equals the text of transformers' `apply_chat_template(..., tokenize=False)`.

        Args:
            messages: The turns.
            add_generation_prompt: Whether to end with what the assistant's next turn begins with.
            **template_kwargs: What else the template knows, such as enable_thinking.

        Raises:
            InputError: If the template refuses the messages or fails; the text has its reason.
        """
        names = {"messages": list(messages), "tools": None, "documents": None, **self.special_tokens}
        try:
            return self.compiled.render(**names, add_generation_prompt=add_generation_prompt, **template_kwargs)
        except TEMPLATE_ERRORS as error:
            expected = "expected it to render these turns"
            if isinstance(error, jinja2.UndefinedError) and "_token'" in str(error):
                expected = "expected a tokenizer_config.json that defines it, in the template's directory"
            raise InputError(f"{self.source}: the chat template says '{error}', {expected}") from error

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

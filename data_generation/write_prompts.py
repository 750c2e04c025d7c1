"""Write prompts.jsonl: the prompts that were written by hand, and thousands more from the grammar beside this file.

The same seed gives the same bytes. What was written by hand comes first, everything else in a mixed order. Prompts that are nearly
the same as a held-out one are left out, and so are those that are there already. Some rows have a system prompt or go on
with further questions. README.md beside this file says how the grammar is written.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.command_line import flag, parse_flags, speaker
from parts.file_command import check_paths, run_command, write_whole
from parts.near_duplicates import NearDuplicates, same_text_key
from parts.prompt_files import InputError, read_rows
from parts.prompt_grammar import ANY, Draws, Family, Grammar, Writer, read_grammar

say = speaker(__file__)
HERE = Path(__file__).parent
TRIES = 40  # for each row that is wanted of a family
SHARE_FOLLOWED, SHARE_SYSTEM, SHARE_CASUAL = 0.16, 0.1, 0.14
MOST_FOLLOWING = 3
CASUAL_CHARACTERS = 110
WRITTEN_AS_TYPED = ("code", "data")  # kinds of talk in which capital letters mean something
OTHER_LANGUAGE = "other"  # a kind of talk that system prompts, which are in English, do not fit


@dataclass(frozen=True)
class Settings:
    """The command's flags."""

    output_path: Path = field(metadata=flag("file of the prompts", type=Path, required=True))
    by_hand: Path = field(metadata=flag("prompts that come first", HERE / "prompts_by_hand.jsonl", type=Path))
    held_out: Path = field(metadata=flag("prompts to stay away from", HERE / "prompts_heldout.jsonl", type=Path))
    grammar: Path = field(metadata=flag("directory of the grammar's files", HERE / "grammar", type=Path))
    seed: int = field(metadata=flag("another seed gives other prompts (default: 0)", 0, type=int))
    no_system: bool = field(
        metadata=flag("no system prompts, for models whose chat template has none", False, action="store_true")
    )
    overwrite: bool = field(metadata=flag("replace an output that is there already", False, action="store_true"))


class Collection:
    """The prompts so far, and what was left out."""

    def __init__(self, held_out: Sequence[str], by_hand: Sequence[str]) -> None:
        """Knows what is there already."""
        self.near_held_out = NearDuplicates(held_out)
        self.known = {same_text_key(text) for text in by_hand}
        self.left_out: Counter[str] = Counter()

    def takes(self, prompt: str) -> bool:
        """Returns whether a prompt is new, and remembers it."""
        key = same_text_key(prompt)
        if key in self.known:
            self.left_out["there already"] += 1
            return False
        self.known.add(key)
        if self.near_held_out.like(prompt) is not None:
            self.left_out["nearly a held-out one"] += 1
            return False
        return True


def as_typed(prompt: str, draws: Draws, talk: str) -> str:
    """Returns some short prompts as people type them in a hurry: in lower case, without the last full stop."""
    short = len(prompt) <= CASUAL_CHARACTERS and "\n" not in prompt and '"' not in prompt
    if talk in WRITTEN_AS_TYPED or not short or not draws.chance(SHARE_CASUAL):
        return prompt
    typed = prompt.lower().rstrip(".")
    return typed.rstrip("?") if draws.chance(0.5) else typed


def family_rows(
    grammar: Grammar, family: Family, settings: Settings, collection: Collection
) -> Iterator[dict[str, Any]]:
    """Streams the rows of one family, without ids.

    Raises:
        InputError: If its templates and lists do not give so many different prompts.
    """
    writer = Writer(grammar, f"{settings.seed}/{family.name}", english=family.talk != OTHER_LANGUAGE)
    draws = Draws(f"{settings.seed}/{family.name}/turns")
    prompts = writer.prompts(family.name, family.templates)
    written = 0
    for _ in range(TRIES * family.rows):
        if written == family.rows:
            return
        prompt = as_typed(next(prompts), draws, family.talk)
        if collection.takes(prompt):
            turns = with_turns(prompt, family.talk, writer, draws)
            if settings.no_system:
                turns = [turn for turn in turns if turn["role"] != "system"]
            yield {"prompt": prompt} if len(turns) == 1 else {"messages": turns}
            written += 1
    if written < family.rows:
        found = f"found {written} different prompts of the family {family.name}"
        raise InputError(f"{found}, expected {family.rows}; add to its lists or lower its rows")


def with_turns(prompt: str, talk: str, writer: Writer, draws: Draws) -> list[dict[str, str]]:
    """Returns the turns of a row: the prompt alone, or with a system prompt before it or questions after it."""
    lists = writer.grammar.lists
    then = lists.get(f"then.{talk}", [])
    system = [*lists.get(f"system.{talk}", []), *lists.get(f"system.{ANY}", [])] if talk != OTHER_LANGUAGE else []
    turns = [{"role": "user", "content": prompt}]
    if then and draws.chance(SHARE_FOLLOWED):
        wanted = 1 + min(draws.below(MOST_FOLLOWING), draws.below(MOST_FOLLOWING))
        following = list(dict.fromkeys(writer.draws.draw(f"then.{talk}", then) for _ in range(wanted)))
        turns += [{"role": "user", "content": writer.written(template)} for template in following]
    if system and draws.chance(SHARE_SYSTEM):
        template = writer.draws.draw(f"system of {talk}", system)
        turns = [{"role": "system", "content": writer.written(template)}, *turns]
    return turns


def user_turns(path: Path) -> list[str]:
    """Returns all user turns of a file of prompts."""
    return [turn["content"] for row in read_rows(str(path)) for turn in row.turns if turn["role"] == "user"]


def write_prompts(settings: Settings) -> int:
    """Writes the file and prints what is in it; returns the exit code.

    Raises:
        InputError: If a file cannot be used, or the grammar does not give enough.
    """
    files = sorted(settings.grammar.glob("*.txt"))
    if not files:
        raise InputError(f"found no .txt in {settings.grammar}, expected the files of a grammar; check --grammar")
    if settings.by_hand.suffix != ".jsonl":
        raise InputError(f"found --by_hand {settings.by_hand}, expected .jsonl, whose lines are copied as they are")
    check_paths([settings.by_hand, settings.held_out], [settings.output_path], settings.overwrite)
    grammar = read_grammar(files)
    collection = Collection(user_turns(settings.held_out), user_turns(settings.by_hand))
    by_hand = settings.by_hand.read_bytes().splitlines()
    rows = {
        json.dumps(row, ensure_ascii=False): row
        for family in grammar.families.values()
        for row in family_rows(grammar, family, settings, collection)
    }
    order = Draws(f"{settings.seed}/order").shuffled(list(rows))
    numbered = enumerate(order, len(by_hand) + 1)
    lines = [json.dumps({"id": f"p{number:05d}", **rows[key]}, ensure_ascii=False) for number, key in numbered]
    write_whole(settings.output_path, (line + b"\n" for line in (*by_hand, *(each.encode() for each in lines))))
    turns = [row.get("messages", []) for row in rows.values()]
    spoken = sum(sum(turn["role"] == "user" for turn in each) > 1 for each in turns)
    with_system = sum(each[:1] != [] and each[0]["role"] == "system" for each in turns)
    print(f"{settings.output_path}: {len(by_hand)} by hand + {len(rows)} from {len(grammar.families)} families")
    print(f"  {spoken} go on with further questions, {with_system} have a system prompt")
    for why, count in sorted(collection.left_out.items()):
        print(f"  {count} left out: {why}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after an error."""
    settings = parse_flags(Settings, __doc__, argv)
    return run_command(lambda: write_prompts(settings), say)


if __name__ == "__main__":
    sys.exit(main())

"""data_generation/write_prompts.py and its grammar: the committed prompts are the program's, new, varied and none is held out."""

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import write_prompts
from parts.near_duplicates import COMMON, NearDuplicates, same_text_key, words_of
from parts.prompt_files import Row, read_rows
from parts.prompt_grammar import InputError, Writer, read_grammar

HERE = Path(write_prompts.__file__).parent
PROMPTS, BY_HAND, HELD_OUT = (HERE / f"prompts{name}.jsonl" for name in ("", "_by_hand", "_heldout"))
GRAMMAR = read_grammar(sorted((HERE / "grammar").glob("*.txt")))


@functools.cache
def rows_of(path: Path) -> list[Row]:
    return list(read_rows(str(path)))


@functools.cache
def first_prompts(path: Path = PROMPTS) -> list[str]:
    return [next(turn["content"] for turn in row.turns if turn["role"] == "user") for row in rows_of(path)]


def test_committed_prompts_are_what_the_program_writes_byte_for_byte(tmp_path: Path) -> None:
    written = tmp_path / "prompts.jsonl"
    assert write_prompts.main(["--output_path", str(written)]) == 0
    assert written.read_bytes() == PROMPTS.read_bytes()


def test_committed_prompts_are_many_distinct_and_small() -> None:
    prompts = first_prompts()
    assert len(prompts) >= 20_000
    assert len({same_text_key(prompt) for prompt in prompts}) == len(prompts)
    assert PROMPTS.stat().st_size < 4_000_000
    assert len({row.id for row in rows_of(PROMPTS)}) == len(prompts)
    assert PROMPTS.read_bytes().startswith(BY_HAND.read_bytes())


def test_committed_prompts_are_varied() -> None:
    prompts = first_prompts()
    openings = Counter(" ".join(words_of(prompt)[:2]) for prompt in prompts)
    assert len(openings) > 2_000
    assert openings.most_common(1)[0][1] < 0.1 * len(prompts)
    lengths = sorted(len(words_of(prompt)) for prompt in prompts)
    assert lengths[len(lengths) // 20] <= 6 < 35 <= lengths[-len(lengths) // 20]
    assert len(set(words_of(" ".join(prompts)))) > 6_000


def test_committed_rows_have_follow_ups_and_system_prompts() -> None:
    roles = [[turn["role"] for turn in row.turns] for row in rows_of(PROMPTS)]
    assert sum(each.count("user") > 1 for each in roles) > 3_000
    assert sum(each[0] == "system" for each in roles) > 2_000
    assert {tuple(each) for each in roles} <= {
        (*("system",) * system, *("user",) * users) for system in (0, 1) for users in range(1, 5)
    }


def test_pages_say_how_many_prompts_there_are() -> None:
    readme = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
    roles = [[turn["role"] for turn in row.turns] for row in rows_of(PROMPTS)]
    assert f"{len(roles):,} prompts to train on" in readme
    assert f"{len(GRAMMAR.families)} families of tasks" in readme
    assert f"{sum(each.count('user') > 1 for each in roles):,} go on with further questions" in readme
    assert f"{sum(each[0] == 'system' for each in roles):,} begin with a system prompt" in readme
    pages = ("docs/training.md", *(f"examples/medusa/{name}.yml" for name in ("qwen3", "mistral_7b_instruct")))
    assert all(f"{len(roles):,}" in (HERE.parent / page).read_text(encoding="utf-8") for page in pages)


def test_committed_prompts_show_nothing_of_the_grammar() -> None:
    names = {*GRAMMAR.lists, *GRAMMAR.families}
    for row in rows_of(PROMPTS):
        for turn in row.turns:
            text = turn["content"]
            assert not re.search("[\ue000-\uf8ff]", text)
            assert not {found.partition("@")[0] for found in re.findall(r"\{\^?([^{}]*)\}", text)} & names
            assert "\\n\\n" not in text


def test_no_committed_prompt_is_nearly_a_held_out_one() -> None:
    held_out = NearDuplicates(first_prompts(HELD_OUT))
    turns = {turn["content"] for row in rows_of(PROMPTS) for turn in row.turns if turn["role"] == "user"}
    assert {text: found for text in turns if (found := held_out.like(text))} == {}


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("compose a SONNET, about a broken vending machine", "Compose a sonnet"),
        ("How do you prove that the square root of 3 is irrational?", "Prove that"),
        ("What's the sum of all multiples of 7 between 1 and 500?", "What's the sum"),
        ("Can you tell me how long opened jars of pesto, mustard and jam keep?", "How long do opened"),
        ("Who is more likely to win if I roll two ordinary dice and you roll one twelve-sided die?", "I roll two"),
    ],
)
def test_near_duplicates_are_told(text: str, start: str) -> None:
    found = NearDuplicates(first_prompts(HELD_OUT)).like(text)
    assert found is not None and found.startswith(start)


def test_texts_on_something_else_are_no_near_duplicates() -> None:
    held_out = NearDuplicates(first_prompts(HELD_OUT))
    for text in (
        "Write a sonnet about rain.",
        "Prove that there are infinitely many primes.",
        "How do I clean a coat?",
    ):
        assert held_out.like(text) is None


def test_near_duplicates_are_those_of_the_definition() -> None:
    """Every pair compared word by word, without an index."""
    held_out = first_prompts(HELD_OUT)

    def content(text: str) -> set[str]:
        return set(words_of(text)) - COMMON

    def runs(text: str) -> set[str]:
        words = words_of(text)
        return {" ".join(words[start : start + 4]) for start in range(len(words) - 3)}

    def near(one: str, other: str) -> bool:
        shared, either = content(one) & content(other), content(one) | content(other)
        fewest = min(len(runs(one)), len(runs(other)))
        return bool(shared) and (
            2 * len(shared) >= len(either) or (fewest > 0 and 3 * len(runs(one) & runs(other)) >= fewest)
        )

    texts = [*first_prompts()[::400], *held_out[::5], *(" ".join(each.split()[3:]) for each in held_out[::7])]
    compared = NearDuplicates(held_out)
    found = [compared.like(text) for text in texts]
    assert found == [next((each for each in held_out if near(text, each)), None) for text in texts]
    assert 16 <= sum(each is not None for each in found) < len(texts)


class Files:
    """Runs the command with a grammar of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.output = directory, directory / "out.jsonl"
        (directory / "grammar").mkdir()
        (directory / "hand.jsonl").write_text('{"id": "a", "prompt": "Say red."}\n')
        (directory / "held.jsonl").write_text('{"id": "h", "prompt": "Tell me about yellow submarines."}\n')

    def run(self, grammar: str, *flags: str) -> int:
        (self.directory / "grammar" / "g.txt").write_text(grammar)
        named = {"by_hand": "hand.jsonl", "held_out": "held.jsonl", "grammar": "grammar", "output_path": "out.jsonl"}
        given = [word for name, file in named.items() for word in (f"--{name}", str(self.directory / file))]
        return write_prompts.main([*given, "--overwrite", *flags])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


COLOURS = "=== say rows={} talk=fact\nSay {{colour}}.\nTell me about {{colour}} submarines.\n--- colour\nred | blue | yellow\n"


def test_known_and_held_out_prompts_are_left_out(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run(COLOURS.format(2), "--seed", "2") == 0
    kept = {same_text_key(row["prompt"]) for row in files.rows()}
    assert len(kept) == 3 and kept <= {"say red", "say blue", "say yellow", "tell me about red submarines"} | {
        "tell me about blue submarines"
    }
    assert [row["id"] for row in files.rows()] == ["a", "p00002", "p00003"]
    assert "1 by hand + 2 from 1 families" in capsys.readouterr().out


def test_a_family_that_cannot_give_so_many_is_an_error(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run(COLOURS.format(7)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "different prompts of the family say, expected 7" in error
    assert not files.output.exists()


def test_seed_decides_over_everything(files: Files) -> None:
    grammar = (
        "=== n rows=30 talk=fact\nSay {100..999}.\n--- then.fact\nAnd {1..99}?\n--- system.any\nBe {kind|brief}.\n"
    )
    written = []
    for seed in ("0", "0", "1"):
        assert files.run(grammar, "--seed", seed) == 0
        written.append(files.output.read_bytes())
    assert written[0] == written[1] != written[2]


def test_no_system_leaves_out_system_prompts_alone(files: Files) -> None:
    grammar = (
        "=== n rows=80 talk=fact\nSay {100..999}.\n--- then.fact\nAnd {1..99}?\n--- system.any\nBe kind. | Be brief.\n"
    )
    assert files.run(grammar) == 0
    everything = files.rows()
    assert files.run(grammar, "--no_system") == 0
    told = [[turn for turn in row.get("messages", ()) if turn["role"] != "system"] for row in everything]
    expected = [
        {"id": row["id"], "messages": turns}
        if len(turns) > 1
        else {"id": row["id"], "prompt": turns[0]["content"]}
        if turns
        else row
        for row, turns in zip(everything, told, strict=True)
    ]
    assert sorted(map(str, files.rows()[1:])) != sorted(map(str, everything[1:]))
    assert {json.dumps({**row, "id": ""}) for row in files.rows()} == {
        json.dumps({**row, "id": ""}) for row in expected
    }


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("Say red.\n", "g.txt:1: found 'Say red.' before any section, expected === or ---"),
        ("=== say rows=2 talk=fact\nSay {color}.\n", "g.txt:2: found {color}, expected the name of a list"),
        ("=== say rows=two talk=fact\nSay.\n", "g.txt:1: found === say rows=two talk=fact, expected"),
        ("--- a\nx\n--- a\ny\n", "g.txt:3: found --- a, expected a new name"),
        ("=== say rows=2 talk=fact\n", "found the section say without lines"),
        ("=== say rows=2 talk=fact\nSay.\n--- then.facts\nAnd?\n", "found the list then.facts, expected then.TALK"),
        ("=== say rows=2 talk=fact\nSay {9..3}.\n", "g.txt:2: found {9..3}, expected numbers upwards"),
        ("=== say rows=2 talk=fact\nSay {1..3:0@n}.\n", "g.txt:2: found {1..3:0@n}, expected"),
        ("=== say rows=2 talk=fact\nSay {1..3:00}.\n", "g.txt:2: found {1..3:00}, expected numbers upwards"),
        ("=== say rows=9 talk=fact\n{a|}\n", "found nothing where '{a|}' was filled in"),
        ("=== say rows=2 talk=fact\n{a}\n--- a\n{b}\n--- b\n{a}\n", "name each other in a circle"),
    ],
)
def test_a_grammar_that_makes_no_sense_is_one_line(
    files: Files, grammar: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run(grammar) == 2
    error = capsys.readouterr().err
    assert error.startswith("write_prompts.py: error: ") and message in error and error.count("\n") == 1


def test_files_that_cannot_be_read_are_one_line(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (files.directory / "grammar" / "a.txt").write_bytes(b"=== a rows=1 talk=fact\n\xff\n")
    assert files.run(COLOURS.format(2)) == 2
    assert "a.txt: found bytes that are no UTF-8" in capsys.readouterr().err
    assert files.run(COLOURS.format(2), "--by_hand", str(files.directory / "hand.txt")) == 2
    assert "hand.txt, expected .jsonl" in capsys.readouterr().err


def test_no_grammar_is_one_line(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run(COLOURS.format(2), "--grammar", str(files.directory)) == 2
    assert "found no .txt in" in capsys.readouterr().err


def writer(tmp_path: Path, text: str, **options: Any) -> Writer:
    (tmp_path / "g.txt").write_text(text)
    return Writer(read_grammar([tmp_path / "g.txt"]), "0", **options)


def test_braces_are_lists_numbers_and_choices(tmp_path: Path) -> None:
    made = writer(tmp_path, "# words\n--- animal\nan ape | a bee\n--- name\nann | bob | cy\n")
    assert {made.written("see {animal}") for _ in range(9)} == {"See an ape", "See a bee"}
    assert {made.written("x{5..9:2}") for _ in range(60)} == {"X5", "X7", "X9"}
    assert {made.written("{a|b|} c") for _ in range(60)} == {"A c", "B c", "C"}
    assert {made.written("x {with {animal}|alone}") for _ in range(60)} == {"X with an ape", "X with a bee", "X alone"}
    for _ in range(20):
        first, other, again, capital = made.written("{name@1} {name@2} {name@1} {^name@2}").split()
        assert first.lower() == again != other and capital == other.capitalize()
    assert len({made.written("{1..9@n}={1..9@n}").partition("=")[0] for _ in range(30)}) > 3
    assert all(len(set(made.written("{1..9@n}={1..9@n}").split("="))) == 1 for _ in range(30))


def test_escapes_and_articles(tmp_path: Path) -> None:
    made = writer(tmp_path, "=== code rows=1 talk=code\nif \\{x \\| y\\}\\n# {list}\n--- list\nC\\# | F\\#\n")
    assert made.written(made.grammar.families["code"].templates[0]) in ("If {x | y}\n# C#", "If {x | y}\n# F#")
    assert made.written("a owl, a unit, a one-line answer, a ukulele and A idea") == (
        "An owl, a unit, a one-line answer, a ukulele and An idea"
    )
    assert writer(tmp_path, "--- a\nb\n", english=False).written("a escola") == "A escola"


def test_all_of_a_list_come_before_one_comes_again(tmp_path: Path) -> None:
    made = writer(tmp_path, "--- digit\n1 | 2 | 3 | 4 | 5\n")
    drawn = [made.written("{digit}") for _ in range(20)]
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5]) == list("12345")


def test_circle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="circle"):
        writer(tmp_path, "--- a\n{a} x\n").written("{a}")

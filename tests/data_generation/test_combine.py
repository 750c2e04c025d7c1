"""data_generation/combine.py: what becomes of every row, and that the counts say so."""

import gzip
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import combine
from parts import weights as weights_part


def row(row_id: str, prompt: str, answer: str = "yes", **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": turns, **extra}


class Files:
    """Runs the command on files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.output = directory, directory / "out.jsonl"

    def write(self, name: str, *rows: dict[str, Any]) -> Path:
        path = self.directory / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def numbered(self, name: str, numbers: range) -> Path:
        return self.write(name, *(row(f"{name}-{number}", f"prompt {number}") for number in numbers))

    def run(self, paths: list[Path], *flags: str) -> int:
        return combine.main(["--data_path", *map(str, paths), "--output_path", str(self.output), *flags])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def prompts(self) -> list[int]:
        return [int(row["messages"][0]["content"].split()[1]) for row in self.rows()]

    def counts(self) -> list[tuple[int, ...]]:
        """(rows, written, duplicates, sampled out) of each input and in all, checked for their sum."""
        report = json.loads(Path(f"{self.output}.report.json").read_text())
        names = ("rows", "written", "duplicates", "sampled_out")
        counts = [tuple(entry[name] for name in names) for entry in (*report["inputs"], report["total"])]
        assert all(entry[0] == sum(entry[1:]) for entry in counts)
        assert counts[-1] == tuple(map(sum, zip(*counts[:-1], strict=True)))
        assert counts[-1][1] == len(self.rows())
        return counts


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_combine_keeps_the_first_of_identical_conversations_in_order(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [files.numbered("a.jsonl", range(10)), files.numbered("b.jsonl", range(5, 20))]
    paths[1].write_text(paths[1].read_text() + "\n" + paths[1].read_text().rstrip())
    assert files.run(paths) == 0
    assert files.prompts() == list(range(20))
    assert files.counts() == [(10, 10, 0, 0), (30, 10, 20, 0), (40, 20, 20, 0)]
    assert files.output.read_text().startswith(paths[0].read_text())
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith("b.jsonl: 30 rows = 10 written + 20 duplicates + 0 sampled out; 0 with a new id")
    assert printed[2].endswith("out.jsonl: 40 rows = 20 written + 20 duplicates + 0 sampled out; 0 with a new id")


def test_combine_copies_lines_byte_for_byte(files: Files) -> None:
    path = files.directory / "a.jsonl"
    path.write_bytes(
        b'{"id":"1" ,"messages":[{"role":"user","content":"\\u00e9\xc3\xa9 1.0"}]}\r\n\n'
        b'{"messages": [{"role": "user", "content": "\\ud83d"}], "id": "2"}'
    )
    assert files.run([path]) == 0
    assert files.output.read_bytes() == path.read_bytes().replace(b"\r\n\n", b"\r\n") + b"\n"


def test_combine_with_keep_duplicates_keeps_all(files: Files) -> None:
    paths = [files.numbered("a.jsonl", range(10)), files.numbered("b.jsonl", range(5, 20))]
    assert files.run(paths, "--keep-duplicates") == 0
    assert files.prompts() == [*range(10), *range(5, 20)]
    assert files.counts()[-1] == (25, 25, 0, 0)


def test_combine_gives_another_conversation_with_a_known_id_a_new_one(files: Files) -> None:
    first = files.write("a.jsonl", row("x", "one"), row("y", "é"))
    second = files.write("b.jsonl", row("x", "two 😀"), row("y", "é"), row("x", "three"))
    assert files.run([first, second]) == 0
    rows = files.rows()
    assert [row["messages"][0]["content"] for row in rows] == ["one", "é", "two 😀", "three"]
    assert [row["id"] for row in rows[:2]] == ["x", "y"]
    new_ids = [row["id"] for row in rows[2:]]
    assert all(new_id.startswith("x-") and len(new_id) == 10 for new_id in new_ids)
    assert len({row["id"] for row in rows}) == 4
    assert "😀" in files.output.read_text()
    assert json.loads(Path(f"{files.output}.report.json").read_text())["total"]["new_ids"] == 2
    third = files.write("c.jsonl", row("x", "three"))
    assert files.run([first, third], "--overwrite") == 0
    assert files.rows()[-1]["id"] == new_ids[1]  # whatever else is combined


def test_combine_of_rows_without_ids_leaves_them_without(files: Files) -> None:
    rows = [{"messages": row("", f"prompt {number}")["messages"]} for number in (1, 2, 1)]
    assert files.run([files.write("a.jsonl", *rows)]) == 0
    assert files.rows() == rows[:2]


def test_combine_samples_what_is_left_after_duplicates(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [files.numbered("a.jsonl", range(100)), files.numbered("b.jsonl", range(50, 150))]
    flags = ("--sample", f"{paths[0]}=25%", f"{paths[1]}=30")
    assert files.run(paths, *flags) == 0
    prompts = files.prompts()
    assert len(set(prompts)) == 55
    first, second = prompts[:25], prompts[25:]
    assert first == sorted(first)
    assert second == sorted(second)
    overlap = len(set(first) & set(range(50, 150)))
    assert files.counts() == [(100, 25, 0, 75), (100, 30, overlap, 70 - overlap), (200, 55, overlap, 145 - overlap)]
    assert files.run(paths, *flags, "--seed", "1", "--overwrite") == 0
    assert files.prompts() != prompts
    capsys.readouterr()
    assert files.run(paths[:1], "--sample", f"{paths[0]}=500", "--overwrite") == 0
    assert "has 100 rows to sample 500 from" in capsys.readouterr().err
    assert files.counts()[0] == (100, 100, 0, 0)


def test_combine_with_shuffle_depends_on_conversations_and_seed_alone(files: Files) -> None:
    numbers = list(range(200))
    path = files.numbered("a.jsonl", range(200))
    sample = ("--sample", f"{path}=100", "--shuffle")
    assert files.run([path], *sample) == 0
    prompts = files.prompts()
    assert len(set(prompts)) == 100
    assert prompts != sorted(prompts)
    random.Random(0).shuffle(numbers)
    files.write("a.jsonl", *(row(f"other-{number}", f"prompt {number}") for number in numbers))
    assert files.run([path], *sample, "--overwrite") == 0
    assert files.prompts() == prompts
    assert files.run([path], *sample, "--overwrite", "--seed", "3") == 0
    assert files.prompts() != prompts


def test_combine_with_shuffle_mixes_what_was_sampled_with_what_was_not(files: Files) -> None:
    paths = [files.numbered("a.jsonl", range(1000)), files.numbered("b.jsonl", range(1000, 1100))]
    assert files.run(paths, "--sample", f"{paths[0]}=100", "--shuffle") == 0
    from_first = sum(number < 1000 for number in files.prompts()[:100])
    assert 30 < from_first < 70  # 50 ± 3.5 if the order does not depend on the draw; the seed is fixed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"id": "b", "conversations": [{"from": "human", "value": "x"}]}, "found 'conversations' without token ids"),
        (row("b", "x", input_ids=[1], labels=[1]), "found 'messages' with token ids"),
        ({"id": "b", "text": "x"}, "found 'text'"),
        (row("b", "x", cut=True), "found other keys (cut)"),
    ],
)
@pytest.mark.parametrize("where", ["a.jsonl:2", "b.jsonl:1"])
def test_combine_refuses_rows_that_do_not_go_together(
    files: Files, other: dict[str, Any], message: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same_file = where.startswith("a")
    paths = [files.write("a.jsonl", row("a", "y"), *[other] * same_file), files.write("b.jsonl", other)]
    assert files.run(paths) == 2
    error = capsys.readouterr().err
    assert error.startswith("combine.py: error: ")
    assert f"{where}: {message}" in error
    assert f"{paths[0]}:1" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in files.directory.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_combine_with_common_keys_leaves_out_the_others(files: Files) -> None:
    paths = [files.write("a.jsonl", row("a", "é", model="m")), files.write("b.jsonl", row("b", "z", cut=True))]
    assert files.run(paths, "--common_keys") == 0
    assert files.rows() == [row("a", "é"), row("b", "z")]
    assert "é" in files.output.read_text()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("other.jsonl=5", "expected PATH=N once for one of --data_path"),
        ("{}", "expected PATH=N once"),
        ("{}=0", "expected a number of rows or 1% to 100%"),
        ("{}=-3", "expected a number of rows"),
        ("{}=150%", "expected a number of rows"),
        ("{}=", "expected a number of rows"),
        ("{}=2.5", "expected a number of rows"),
    ],
)
def test_combine_with_a_sample_that_makes_no_sense_is_an_error(
    files: Files, sample: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.numbered("a.jsonl", range(5))
    assert files.run([path], "--sample", sample.format(path)) == 2
    assert message in capsys.readouterr().err
    assert not files.output.exists()


def test_combine_refuses_files_that_it_cannot_use(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = files.numbered("a.jsonl", range(5))
    packed = files.directory / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    empty = files.write("empty.jsonl")
    for paths, message in (
        ([packed], "unpack it first"),
        ([empty], "found no rows"),
        ([path, path], "named twice"),
        ([files.output], "found no file"),
    ):
        assert files.run(paths) == 2
        assert message in capsys.readouterr().err
        assert not files.output.exists()
    files.output.write_text("precious")
    assert files.run([path]) == 2
    assert "there already" in capsys.readouterr().err
    assert files.output.read_text() == "precious"


def test_combine_replaces_a_report_only_when_it_may(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = files.numbered("a.jsonl", range(5)), Path(f"{files.output}.report.json")
    report.write_text("precious")
    assert files.run([path]) == 2
    assert f"found {report} there already" in capsys.readouterr().err
    assert report.read_text() == "precious" and not files.output.exists()
    assert files.run([path], "--overwrite") == 0
    assert files.counts()[-1][1] == 5
    assert files.run([report]) == 2
    assert "named twice" in capsys.readouterr().err


def test_combine_with_weights_mixes_in_proportion_as_much_as_there_is(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, public, scratch = (
        files.numbered(name, rows)
        for name, rows in (("l.jsonl", range(300)), ("p.jsonl", range(250, 450)), ("s.jsonl", range(450, 1450)))
    )
    flags = ("--weights", f"{logs}=3", f"{public}=1.5", f"{scratch}=0.5")
    assert files.run([logs, public, scratch], *flags) == 0
    assert files.counts() == [(300, 300, 0, 0), (200, 150, 50, 0), (1000, 50, 0, 950), (1500, 500, 50, 950)]
    prompts = files.prompts()
    assert prompts[:450] == list(range(450))
    assert len(set(prompts)) == 500
    assert json.loads(Path(f"{files.output}.report.json").read_text())["weights"] == list(flags[1:])
    assert "s.jsonl: 1000 rows = 50 written + 0 duplicates + 950 sampled out" in capsys.readouterr().out


def test_combine_with_weights_and_rows_is_reproducible_and_exact(files: Files) -> None:
    paths = [files.numbered(f"{name}.jsonl", range(100 * name, 100 * name + 100)) for name in range(3)]
    flags = ("--weights", *(f"{path}=1" for path in paths), "--rows", "100", "--shuffle", "--overwrite")
    written = []
    for seed in ("0", "0", "1"):
        assert files.run(paths, *flags, "--seed", seed) == 0
        assert [entry[1] for entry in files.counts()] == [34, 33, 33, 100]
        written.append(files.output.read_bytes())
    assert written[0] == written[1] != written[2]
    assert files.run(paths[:1], "--sample", f"{paths[0]}=34", "--overwrite") == 0
    drawn = set(files.prompts())
    assert drawn == {int(line.split(b'"prompt ')[1].split(b'"')[0]) for line in written[0].splitlines()} & set(
        range(100)
    )


@pytest.mark.parametrize("total", [1, 2, 7, 10, 99, 100])
def test_shares_add_up_and_none_is_a_row_off(total: int) -> None:
    weights = {Path(name): Fraction(weight) for name, weight in (("a", "5"), ("b", "0.3"), ("c", "2"))}
    rows = weights_part._shares(weights, total)
    assert sum(rows) == total
    for row_count, weight in zip(rows, weights.values(), strict=True):
        assert abs(row_count - total * weight / sum(weights.values())) < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "{a}=1"], "found no weight for {b}, expected one for each of --data_path; add {b}=1"),
        (["--weights", "{a}=1", "{b}=0"], "found --weights {b}=0, expected a number above 0"),
        (["--weights", "{a}=1", "{b}=-2"], "found --weights {b}=-2, expected a number above 0"),
        (["--weights", "{a}=1", "{b}=nan"], "found --weights {b}=nan, expected a number above 0"),
        (["--weights", "{a}=1", "{b}=1/2"], "expected a number above 0"),
        (["--weights", "{a}=1", "{b}="], "expected a number above 0"),
        (["--weights", "{a}=1", "{b}=."], "expected a number above 0"),
        (["--weights", "{a}=1", "{a}=1", "{b}=1"], "found --weights {a}=1, expected PATH=W once"),
        (["--weights", "c.jsonl=1"], "found --weights c.jsonl=1, expected PATH=W once"),
        (["--weights", "{a}=1", "{b}=1", "--rows", "50"], "found 20 different rows in {b}, expected 25 for its weight in 50"),
        (["--weights", "{a}=1", "{b}=999"], "found no row of {a} in a mix of 20"),
        (["--weights", "{a}=1", "{b}=1", "--sample", "{a}=5"], "found --sample with --weights"),
        (["--rows", "5"], "--rows without"),
    ],
)  # fmt: skip
def test_combine_with_weights_that_make_no_sense_is_one_line(
    files: Files, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a": files.numbered("a.jsonl", range(30)), "b": files.numbered("b.jsonl", range(25, 45))}
    names["b"].write_text(names["b"].read_text() + files.numbered("c.jsonl", range(45, 50)).read_text())
    assert files.run([names["a"], names["b"]], *(each.format(**names) for each in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("combine.py: error: ") and message.format(**names) in error and error.count("\n") == 1
    assert not files.output.exists()


def test_combine_makes_messages_of_prompts_where_both_are_mixed(files: Files) -> None:
    prompts = files.write("p.jsonl", {"id": "1", "prompt": "é"}, {"id": "2", "prompt": "two"})
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é"}]
    logs = files.write("l.jsonl", {"id": "3", "messages": turns[1:]}, {"id": "2", "messages": turns})
    assert files.run([prompts, logs]) == 0
    first, second, third = files.rows()
    assert first == {"id": "1", "messages": turns[1:]}
    assert second == {"id": "2", "messages": [{"role": "user", "content": "two"}]}
    assert third["id"].startswith("2-") and third["messages"] == turns
    assert files.counts() == [(2, 2, 0, 0), (2, 1, 1, 0), (4, 3, 1, 0)]
    assert files.run([logs, prompts], "--overwrite") == 0
    assert files.counts()[-1] == (4, 3, 1, 0)
    assert all(set(each) == {"id", "messages"} for each in files.rows())
    assert files.run([prompts], "--overwrite") == 0
    assert files.output.read_bytes() == prompts.read_bytes()


def test_combine_mixes_our_prompts_with_logs_by_weights(files: Files) -> None:
    ours = Path(combine.__file__).with_name("prompts.jsonl")
    logs = files.write(
        "l.jsonl", *({"id": f"l{n}", "messages": [{"role": "user", "content": f"log {n}"}]} for n in range(60))
    )
    flags = ("--weights", f"{ours}=2", f"{logs}=1", "--rows", "90", "--shuffle")
    assert files.run([ours, logs], *flags) == 0
    rows = files.rows()
    assert sum(row["id"].startswith("l") for row in rows) == 30 and len(rows) == 90
    assert all(row["messages"][-1]["role"] == "user" for row in rows)

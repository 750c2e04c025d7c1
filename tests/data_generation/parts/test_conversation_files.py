"""data_generation/conversation_files.py and json_lines.py: what is written stays, wherever a run is killed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parts import conversation_files, json_lines
from parts.conversation_files import OutputFiles, prompt_key
from parts.prompt_files import InputError, id_key


class Run:
    """The files of one output, and what their opening said."""

    def __init__(self, path: Path) -> None:
        self.output = path / "out" / "answers.jsonl"
        self.failed = Path(f"{self.output}.failed.jsonl")
        self.skipped = Path(f"{self.output}.skipped.jsonl")
        self.report = Path(f"{self.output}.report.json")
        self.said: list[str] = []

    def open(self, retry_failed: bool = False, with_prompts: bool = False) -> OutputFiles:
        """Returns the files, not yet entered."""
        return OutputFiles(self.output, retry_failed, with_prompts=with_prompts, say=self.said.append)

    def put(self, path: Path, text: str | bytes) -> None:
        """Writes a file as an earlier run might have left it."""
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """An output that does not exist yet."""
    return Run(tmp_path)


def talk(row_id: str, prompt: str = "one", **fields: Any) -> dict[str, Any]:
    """Returns an output row."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "zwölf"}]
    return {"id": row_id, "messages": messages, "finish_reasons": ["stop"], "model": "m", **fields}


def lines(*records: dict[str, Any]) -> str:
    """Returns records as lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def failure(row_id: str, reason: str = "no") -> dict[str, str]:
    """Returns a line of the failed or skipped rows."""
    return {"id": row_id, "reason": reason}


def records(path: Path) -> list[Any]:
    """Returns what a file holds, which must end with a line break."""
    text = path.read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def keys(*ids: str) -> set[int]:
    """Returns the keys of ids."""
    return {id_key(row_id) for row_id in ids}


# ---- writing and going on ----


def test_what_a_run_wrote_is_known_to_the_next(run: Run) -> None:
    with run.open() as files:
        assert (files.done, files.skipped, files.failed) == (set(), set(), set())
        files.append_conversation(talk("a"))
        files.append_skipped("b", "cut")
        files.append_failed("c", "HTTP 400")
        files.append_conversation(talk("d", model="other"))
        assert files.done == set(), "the sets are what earlier runs left"
    assert records(run.output) == [talk("a"), talk("d", model="other")]
    assert records(run.skipped) == [failure("b", "cut")]
    assert records(run.failed) == [failure("c", "HTTP 400")]
    with run.open() as files:
        assert (files.done, files.skipped, files.failed) == (keys("a", "d"), keys("b"), keys("c"))
        assert files.models == Counter({"m": 1, "other": 1})
        assert (files.failed_path, files.skipped_path) == (run.failed, run.skipped)
    assert run.said == []


def test_files_of_rows_that_there_are_none_of_are_not_made(run: Run) -> None:
    with run.open() as files:
        files.append_conversation(talk("a"))
    assert [path.name for path in run.output.parent.iterdir()] == ["answers.jsonl"]


def test_line_separators_of_other_alphabets_do_not_break_lines(run: Run) -> None:
    record = talk("a", "one\u2028two\x85three\nfour\r")
    with run.open() as files:
        files.append_conversation(record)
    assert run.output.read_bytes().count(b"\n") == 1
    with run.open() as files:
        assert files.done == keys("a")
    assert records(run.output) == [record]


def test_each_append_is_one_write_of_a_whole_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, text: written.append(text) or really_write(descriptor, text))
    with run.open() as files:
        files.append_conversation(talk("a"))
        files.append_failed("b", "no")
        files.append_skipped("c", "no")
    assert [text.decode() for text in written] == [lines(talk("a")), lines(failure("b")), lines(failure("c"))]


@pytest.mark.parametrize(
    "record",
    [
        talk("a", "half of a pair: \ud83d"),
        talk("\ud83d"),
        talk("a", score=float("nan")),
        {"messages": [], "id": "a", "finish_reasons": []},
        {"id": 1, "finish_reasons": []},
        {"id": "a", "messages": []},
        {},
    ],
    ids=range(7),
)
def test_record_that_could_not_be_read_back_is_refused_before_it_is_written(run: Run, record: dict[str, Any]) -> None:
    with run.open() as files:
        files.append_conversation(talk("b"))
        with pytest.raises(ValueError, match=r"^found .*, expected ") as caught:
            files.append_conversation(record)
        assert str(caught.value).encode()
        files.append_conversation(talk("c"))
    assert records(run.output) == [talk("b"), talk("c")]


def test_reason_that_does_not_fit_into_utf8_is_written_all_the_same(run: Run) -> None:
    with run.open() as files:
        files.append_failed("a", "the server said \ud83d")
        files.append_skipped("b", "\udc00")
    assert records(run.failed) == [failure("a", "the server said ?")]
    assert records(run.skipped) == [failure("b", "?")]


def test_conversations_with_one_id_are_reported_and_count_once(run: Run) -> None:
    run.put(run.output, lines(talk("a"), talk("b"), talk("a"), talk("b")))
    with run.open() as files:
        assert files.done == keys("a", "b")
    (said,) = run.said
    assert "found 2 lines with an id of an earlier line, the first 'a' in line 3" in said
    assert len(records(run.output)) == 4


def test_report_replaces_the_earlier_one_or_leaves_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.open() as files:
        files.write_report({"succeeded": 1})
        assert json.loads(run.report.read_text()) == {"succeeded": 1}
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, "fsync", raise_full)
            files.write_report({"succeeded": 2})
        assert json.loads(run.report.read_text()) == {"succeeded": 1}
        files.write_report({"succeeded": 3})
    assert json.loads(run.report.read_text()) == {"succeeded": 3}
    assert {path.name for path in run.output.parent.iterdir()} == {run.output.name, run.report.name}


def raise_full(*_: object) -> None:
    """Stands for a disk without space."""
    raise OSError(errno.ENOSPC, "the disk is full")


# ---- torn lines ----

FILES: dict[str, dict[str, Any]] = {"": talk("b", "\0ü"), ".failed.jsonl": failure("b"), ".skipped.jsonl": failure("b")}


@pytest.mark.parametrize("ending", FILES)
def test_torn_last_line_is_removed_wherever_it_was_cut(run: Run, ending: str) -> None:
    path = Path(f"{run.output}{ending}")
    first, torn = lines(FILES[ending] | {"id": "a"}).encode(), lines(FILES[ending]).encode()
    for kept in range(1, len(torn) - 1):
        for zeros in (b"", b"\0" * 9):  # which file systems may leave after a power failure
            run.put(path, first + torn[:kept] + zeros)
            with run.open() as files:
                assert files.done | files.failed | files.skipped == keys("a")
            assert path.read_bytes() == first
            size = kept + len(zeros)
            assert run.said.pop() == f"removed the torn last line of {path} ({size} bytes)"
    assert run.said == []


@pytest.mark.parametrize("ending", FILES)
def test_last_line_that_lacks_its_break_only_is_kept(run: Run, ending: str) -> None:
    path = Path(f"{run.output}{ending}")
    whole = lines(FILES[ending])
    run.put(path, whole[:-1])
    with run.open() as files:
        assert files.done | files.failed | files.skipped == keys("b")
        files.append_conversation(talk("c"))
    assert path.read_text().startswith(whole)
    assert records(run.output)[-1] == talk("c")
    assert run.said == [f"ended the last line of {path}, of which only the line break was missing"]


def test_short_write_is_an_error_and_nothing_follows_the_torn_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    really_write = os.write
    with run.open() as files:
        files.append_conversation(talk("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, text: really_write(descriptor, text[:20]))
            with pytest.raises(OSError, match=r"only 20 of .* is the disk full"):
                files.append_conversation(talk("b"))
        with pytest.raises(OSError, match="the next run repairs it"):
            files.append_conversation(talk("c"))
        files.append_failed("d", "other files go on")
    assert run.output.read_text() == lines(talk("a")) + lines(talk("b"))[:20]
    with run.open() as files:
        assert (files.done, files.failed) == (keys("a"), keys("d"))
        files.append_conversation(talk("b"))
    assert records(run.output) == [talk("a"), talk("b")]


def test_full_disk_is_an_error_that_names_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.open() as files, monkeypatch.context() as patch:
        patch.setattr(os, "write", raise_full)
        with pytest.raises(OSError, match=f"the disk is full: '{run.output}'"):
            files.append_conversation(talk("a"))


# ---- files that are something else ----


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (lines({"id": "a", "prompt": "x"}) + '{"id": "', ":1: found {'id': 'a', 'prompt': 'x'}, expected an earlier"),
        ("notes\ntail", ":1: found"),
        ("notes", ":1: found"),
        ("{}\n", ":1: found {}, expected an earlier run's line"),
        ("[]", ":1: found []"),
        ('{"id": "a", "prompt": "a file of one row"}', ":1: found"),
        ('{"id": 1, "finish_reasons": [], "reason": ""}\n', ":1: found"),
        ('{"id": "a",\n{}\n', ":1: found"),
        ("\n", ":1: found"),
        (lines(talk("a", reason="")) + "\n", ":2: found"),
        (lines(talk("a", reason="")) + "\xff\xfe", ":2: found"),
        (lines(talk("a", reason="")) + "[" * 100_000 + "\n", ":2: found"),
    ],
    ids=range(12),
)
def test_file_that_is_no_earlier_runs_is_refused_and_all_are_left_alone(
    run: Run, ending: str, content: str, place: str
) -> None:
    torn = {run.output: lines(talk("a"))[:-3], run.failed: '{"id', run.skipped: '{"id'}
    for path, text in (torn | {Path(f"{run.output}{ending}"): content}).items():
        run.put(path, text)
    before = {path: path.read_bytes() for path in torn}
    with pytest.raises(InputError) as caught, run.open():
        pass
    assert str(caught.value).startswith(f"{run.output}{ending}{place}")
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in torn} == before
    assert run.said == []


def test_output_of_another_layout_is_refused(run: Run) -> None:
    sharegpt = {"id": "c", "conversations": [{"from": "human", "value": "one"}], "finish_reasons": ["stop"]}
    for record, layout in [
        (talk("c"), ("messages", False)),
        (talk("c", input_ids=[1], labels=[1]), ("messages", True)),
        (sharegpt, ("sharegpt", False)),
        (sharegpt | {"input_ids": [1]}, ("sharegpt", True)),
    ]:
        run.put(run.output, lines(record))
        with run.open() as files:
            files.expect_layout(*layout)
            for other in {(form, ids) for form in ("messages", "sharegpt") for ids in (False, True)} - {layout}:
                with pytest.raises(InputError, match=rf"^{run.output}:1: found a row in the layout {layout[0]} with"):
                    files.expect_layout(*other)
    run.put(run.output, lines(talk("a"), talk("b"), talk("c", input_ids=[1])))
    with (
        run.open() as files,
        pytest.raises(InputError, match=r":3: found .* messages with token ids, expected messages"),
    ):
        files.expect_layout("messages", False)
    run.put(run.output, "")
    with run.open() as files:
        files.expect_layout("sharegpt", True)


def test_prompts_are_collected_if_wanted_whatever_their_case_and_layout(run: Run) -> None:
    turns = [{"from": "system", "value": "x"}, {"from": "human", "value": "Two\n TWO"}, {"from": "human", "value": "z"}]
    run.put(run.output, lines(talk("a", " One"), {"id": "b", "conversations": turns, "finish_reasons": []}))
    with run.open(with_prompts=True) as files:
        assert files.prompts == {prompt_key("one"), prompt_key("two two")}
        assert prompt_key("onetwo") not in files.prompts
    with run.open() as files:
        assert files.prompts == set()


# ---- one run at a time ----


def test_second_run_on_an_output_is_refused_until_the_first_ends(run: Run) -> None:
    with run.open() as files:
        files.append_conversation(talk("a"))
        with pytest.raises(
            InputError, match=rf"^{run.output}: found another run writing to it, expected one at a time"
        ):
            run.open().__enter__()
        files.append_conversation(talk("b"))
    with run.open() as files:
        assert files.done == keys("a", "b")


def test_output_is_free_again_after_an_error(run: Run) -> None:
    with pytest.raises(KeyError), run.open():
        raise KeyError
    run.put(run.output, "notes\n")
    with pytest.raises(InputError, match="expected JSON"):
        run.open().__enter__()
    run.put(run.output, "")
    with run.open():
        pass


def test_run_that_is_killed_leaves_its_lines_and_no_lock(run: Run) -> None:
    script = (
        "import os, signal, sys, pathlib\nfrom parts import conversation_files\n"
        "files = conversation_files.OutputFiles(pathlib.Path(sys.argv[1]), True).__enter__()\n"
        "files.append_conversation({'id': 'a', 'messages': [], 'finish_reasons': []})\n"
        "files.append_failed('b', 'no')\n"
        "files.append_skipped('c', 'no')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = Path(conversation_files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(run.output)], cwd=folder, check=False)
    assert done.returncode == -signal.SIGKILL
    with run.open() as files:
        assert (files.done, files.failed, files.skipped) == (keys("a"), keys("b"), keys("c"))
    assert run.said == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_file_system_without_locks_is_used_with_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "cannot")

    monkeypatch.setattr(fcntl, "flock", flock)
    if number == errno.EIO:
        with pytest.raises(OSError, match="cannot"):
            run.open().__enter__()
        return
    with run.open() as files:
        files.append_conversation(talk("a"))
    assert f"warning: {run.output} cannot be locked" in run.said[0]


# ---- failed rows ----


def test_failed_row_counts_as_handled_unless_it_is_to_be_retried(run: Run) -> None:
    run.put(run.failed, lines(failure("a"), failure("b")))
    with run.open() as files:
        assert files.failed == keys("a", "b")
    with run.open(retry_failed=True) as files:
        assert files.failed == set()
    assert records(run.failed) == [failure("a"), failure("b")]


def test_retried_rows_stay_failed_until_the_end_and_then_each_once_with_its_latest_reason(run: Run) -> None:
    run.put(run.failed, lines(*(failure(name, "old") for name in "abcd")))
    with run.open(retry_failed=True) as files:
        files.append_conversation(talk("a"))
        files.append_failed("b", "new")
        files.append_skipped("c", "cut")
        files.append_failed("e", "new")
        assert {record["id"] for record in records(run.failed)} == set("abcde"), "a crash here must lose none"
    assert records(run.failed) == [failure("d", "old"), failure("b", "new"), failure("e", "new")]
    assert [record["id"] for record in records(run.output)] == ["a"]
    with run.open() as files:
        assert (files.done, files.skipped, files.failed) == (keys("a"), keys("c"), keys("b", "d", "e"))


def test_file_of_the_failed_goes_when_the_last_row_is_written(run: Run) -> None:
    run.put(run.failed, lines(failure("a"), failure("a")))
    with run.open(retry_failed=True) as files:
        assert records(run.failed) == [failure("a")]
        files.append_conversation(talk("a"))
        assert run.failed.exists()
    assert not run.failed.exists()


@pytest.mark.parametrize("retry_failed", [False, True])
def test_row_that_a_crash_left_in_several_files_counts_where_it_went(run: Run, retry_failed: bool) -> None:
    run.put(run.output, lines(talk("a"), talk("b")))
    run.put(run.skipped, lines(failure("c")))
    run.put(run.failed, lines(*(failure(name) for name in "adbcd")))
    with run.open(retry_failed) as files:
        assert (files.done, files.skipped) == (keys("a", "b"), keys("c"))
        assert files.failed == (set() if retry_failed else keys("d"))
        assert records(run.failed) == [failure("d")]
    assert records(run.failed) == [failure("d")]


def test_drafts_of_killed_runs_are_removed(run: Run) -> None:
    for path in (run.failed, run.report):
        run.put(Path(f"{path}.tmp"), "half a fi")
    with run.open():
        assert [path.name for path in run.output.parent.iterdir()] == [run.output.name]


class Killed(BaseException):
    """Stands for a crash at this moment."""


@pytest.mark.parametrize(
    ("owner", "step"), [(os, "fsync"), (Path, "replace"), (json_lines, "replace_file"), (os, "write")]
)
@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("after", [False, True])
def test_crash_at_any_step_of_a_retry_loses_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, call: int, after: bool
) -> None:
    owner = conversation_files if step == "replace_file" else owner
    run.put(run.failed, lines(*(failure(name, "old") for name in "aabcd")))
    run.put(run.output, lines(talk("d")))
    really: Callable[..., Any] = getattr(owner, step)
    calls = 0

    def crash(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= call:
            return really(*args)
        if after and calls == call + 1:
            really(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        try:
            with run.open(retry_failed=True) as files:
                files.append_conversation(talk("a"))
                files.append_failed("b", "new")
        except Killed:
            pass
    with run.open() as files:
        done, failed = {record["id"] for record in records(run.output)}, [row["id"] for row in records(run.failed)]
        assert done | set(failed) == set("abcd"), "a row was lost"
        assert len(failed) == len(set(failed)), "a row is there twice"
        assert not done & set(failed), "a row failed and succeeded"
        assert (files.done, files.failed) == (keys(*done), keys(*failed))
    assert not list(run.output.parent.glob("*.tmp"))


def test_large_scan_keeps_keys_only(run: Run) -> None:
    run.put(run.output, lines(*(talk(f"row {count}", "x" * 999) for count in range(5000))))
    tracemalloc.start()
    with run.open() as files:
        assert len(files.done) == 5000
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A set of this size takes up to 170 bytes a number while it grows; the rows would take more than 1000.
    assert peak < 5000 * 250

"""The process that renders chat templates: what runs away ends there, and the next request is answered as if nothing was."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parts import template_process
from parts.chat_template import ChatTemplate
from parts.prompt_files import InputError
from parts.template_process import TemplateError, TemplateProcess

ROOT = Path(__file__).parents[3] / "data_generation"
ECHO = "{{ word }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("template", "stage", "reason"),
    [
        (ENDLESS, "run away", r"^it took more than 1 s of computing or 512 MB and was stopped$"),
        ("{{ 'a' * 10**10 }}", "render", ""),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "render", r"^it writes 99,980,001 characters$"),
        ("{{ raise_exception('no\nsuch turn') }}", "render", "^no such turn$"),
        ("{{ ", "compile", "unexpected"),
        ("{{ ''.__class__.__mro__ }}", "render", "unsafe"),
    ],
    ids=["time", "memory", "length", "refusal", "syntax", "sandbox"],
)
def test_template_that_goes_too_far_ends_in_one_line_and_the_next_is_rendered(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch, template: str, stage: str, reason: str
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    with pytest.raises(TemplateError, match=reason) as error:
        process.ask(template, {})
    assert error.value.stage == stage and "\n" not in str(error.value)
    assert process.ask(ECHO, {"word": "next"}) == ("next", [])


def test_limit_of_time_is_one_requests_own(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    busy = "{% for a in range(40) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    process.ask(ECHO, {"word": ""})
    worker = process.process
    used, start = 0.0, time.monotonic()
    while used < 2.5:
        process.ask(busy, {})
        ticks = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()  # type: ignore[union-attr]
        used = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
        assert time.monotonic() - start < 120
    assert process.process is worker


def test_threads_that_share_it_get_their_own_answers(process: TemplateProcess) -> None:
    words = [f"word {number}" * 50 for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda word: process.ask(ECHO, {"word": word})[0], words))
    assert answers == words


def test_interrupted_request_does_not_answer_the_next_one(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    process.ask(ECHO, {"word": "first"})
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            process.ask(ENDLESS, {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert process.ask(ECHO, {"word": "next"}) == ("next", [])


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_it_ends_with_the_command(end: str) -> None:
    code = (
        "import os, signal, sys\nfrom parts.template_process import TemplateProcess\n"
        "process = TemplateProcess()\nprocess.ask('x', {})\nprint(process.process.pid, flush=True)\n"
        + ("os.kill(os.getpid(), signal.SIGKILL)" if end == "kill" else "")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    deadline = time.monotonic() + 30
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline, "the other process outlived the command"
        time.sleep(0.01)


def test_modules_beside_it_do_not_hide_pythons_own(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """`parts/secrets.py` has the name of a module that libraries import."""
    started: list[list[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda line, **options: started.append(line) or popen(line, **options))
    process.ask(ECHO, {"word": ""})
    shown = subprocess.run(
        [*started[0][:-2], "-c", "import secrets; print(secrets.__file__)"],
        cwd=ROOT / "parts",
        capture_output=True,
        text=True,
    )
    assert Path(shown.stdout.strip()).parent != ROOT / "parts"


def test_error_of_a_template_that_runs_away_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    template = ChatTemplate(ENDLESS, {}, "org/model")
    with pytest.raises(InputError, match=r"^org/model: the chat template says 'it took more than 1 s") as error:
        template.render([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(error.value)

"""The report of a run: everything that is there, nothing from outside, and what is missing said."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import make_model
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from training_outputs import save_base, write_run

from axolotl_medusa.cli import main
from axolotl_medusa.decoding.tree import default_tree, write_tree

pytestmark = pytest.mark.usefixtures("no_network")

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "evaluate.json"
HISTORY = [
    {"step": 1, "medusa0_loss": 5.0, "base_loss": 2.0, "medusa0_top1": 0.1, "medusa_scheduler_coefficient": 0.5},
    {"step": 2, "medusa0_loss": 4.0, "base_loss": 2.0, "eval_medusa0_loss": 4.5, "medusa_acceptance_length": 1.25},
]
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that elements end, and collects what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_log(directory, history=HISTORY):
    checkpoint = directory / "checkpoint-4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return directory


def reported(directory, *options):
    assert main(["report", str(directory), *map(str, options)]) == 0
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    directory = write_run(tmp_path / "run", make_model(), "medusa-1", base)
    write_log(directory)
    shutil.copy(MEASURED, directory / "measured.json")
    write_tree(directory / "tree.json", default_tree(3, 8), calibration="prompts.jsonl")
    (directory / "plan.json").write_text(json.dumps({"format": 1, "step_s": {"1": 0.01, "4": 0.0125}, "load": 3}))
    return directory


def test_report_shows_everything_that_is_there(run, capsys):
    text = reported(run)
    assert capsys.readouterr().out == f"written to {run / 'report.html'}; open it in a browser\n"
    page = Page(text)
    assert page.tags.count("svg") == 4 + 2 + 2 + 1  # four of the log, two of the evaluation, its two trees, tree.json
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", text)
    for heading in (
        "Heads",
        "Training",
        "Measured: measured.json",
        "Candidate tree: tree.json, 8 nodes",
        "Server: plan.json",
    ):
        assert heading in headings
    assert "<td>recipe</td><td>medusa-1</td>" in text and "<td>output layers</td><td>shared</td>" in text
    assert "<td>eval_medusa0_loss</td><td>2</td><td>4.5</td>" in text
    assert "<td>4</td><td>12.50</td>" in text and "&quot;load&quot;: 3" in text


def test_figures_are_those_of_the_file(run):
    text = reported(run)
    measured = json.loads(MEASURED.read_text())["overall"]
    for name, row in measured["decoders"].items():
        cells = (name, f"{row['acceptance_length']:.3f}", f"{row['tokens_per_s']:.1f}", f"{row['speed_up']:.2f}")
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    for head in measured["heads"]:
        assert f"<td>{head['head']}</td><td>{head['positions']}</td><td>{head['top']['1']:.1%}</td>" in text


def test_page_loads_nothing_and_runs_nothing(run):
    text = reported(run)
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"<pre>.*?</pre>", "", text, flags=re.S))


def test_what_strangers_files_say_stays_text(tmp_path):
    nasty = "<script>alert(1)</script>"
    run = write_log(tmp_path / "run")
    report = json.loads(MEASURED.read_text())
    report["prompts_file"] = report["hardware"]["device"] = nasty
    report["categories"] = {nasty: report["overall"]}
    (run / "e.json").write_text(json.dumps(report))
    (run / "medusa_heads").mkdir()
    (run / "medusa_heads" / "config.json").write_text(json.dumps({"base_model_name_or_path": nasty}))
    (run / "medusa_heads" / "medusa_meta.json").write_text(json.dumps({"yaml": {"note": nasty}, "recipe": nasty}))
    text = reported(run)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 6
    Page(text)


@pytest.mark.parametrize("damage", [{"overall": {}}, {"overall": None}, {"categories": 3}, {"trees": {"t": 5}}])
def test_file_that_is_not_whole_is_left_out_and_named(damage, tmp_path, capsys):
    run = write_log(tmp_path / "run")
    (run / "e.json").write_text(json.dumps({**json.loads(MEASURED.read_text()), **damage}))
    text = reported(run)
    assert "not in the report: e.json is not whole and was left out" in capsys.readouterr().out
    assert "What is missing" in text and "Measured" not in text
    Page(text)


def test_link_to_nothing_is_passed_over(tmp_path):
    run = write_log(tmp_path / "run")
    (run / "gone.json").symlink_to(tmp_path / "nowhere.json")
    reported(run)


def test_run_without_a_log_is_reported_by_what_was_measured(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    text = reported(tmp_path / "run", "--with", MEASURED)
    assert "Measured: evaluate.json" in text and "<h2>Training</h2>" not in text
    assert "not in the report: " in capsys.readouterr().out


def test_report_is_written_again_but_no_other_file(tmp_path, capsys):
    run = write_log(tmp_path / "run")
    reported(run)
    reported(run)
    (run / "mine.html").write_text("<p>mine</p>")
    assert main(["report", str(run), "--out", str(run / "mine.html")]) == 1
    assert "is no report of ours, expected a new file" in capsys.readouterr().err
    assert (run / "mine.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{run}/none"], "is no directory, expected what training wrote"),
        (["{run}/empty"], "there is nothing to report of"),
        (["{run}", "--with", "{run}/checkpoint-4/trainer_state.json"], "is none of what evaluate, tree and plan write"),
        (["{run}", "--out", "{run}/none/x.html"], "is no directory, expected one to write x.html in"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(options, message, tmp_path, capsys):
    run = write_log(tmp_path / "run")
    (run / "empty").mkdir()
    assert main(["report", *(option.format(run=run) for option in options)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_prompts_are_answered_with_the_heads_marked(tmp_path):
    sizes = {"vocab_size": 300, "eos_token_id": None}
    base = save_base(tmp_path / "base", varied_model(**sizes))
    run = write_run(tmp_path / "run", varied_model(**sizes), "medusa-1", base)
    write_log(run)
    for folder in tmp_path.rglob("tokenizer.json"):
        make_tokenizer("zephyr").save_pretrained(folder.parent)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": str(i), "prompt": f"Is <{i}> so?"}) for i in range(4)))
    text = reported(run, "--prompts", prompts, "--limit", 2, "--max-new-tokens", 8)
    assert "<h3>Is &lt;0&gt; so?</h3>" in text and "&lt;2&gt;" not in text
    assert text.count("tokens a pass.</p>") == 2
    Page(text)

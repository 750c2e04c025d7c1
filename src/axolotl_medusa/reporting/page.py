"""The report as one HTML file that loads nothing: no script, no font, no picture from elsewhere.

Contract: what was found in, text out. Everything that comes from a file is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from axolotl_medusa.measuring.training_plots import TRAINING_PLOTS
from axolotl_medusa.model.head_form import form_of
from axolotl_medusa.reporting.coloured_text import Example
from axolotl_medusa.reporting.found_files import Found
from axolotl_medusa.reporting.svg import bar_chart, line_chart, tree_chart

MARK = '<meta name="generator" content="axolotl-medusa">'
"""In every report, near its beginning: a file without it is not written over."""

_COLOURS = (
    "#3465a4",
    "#c4561d",
    "#2e7d32",
    "#8e44ad",
    "#00796b",
    "#b8336a",
    "#8a6d00",
    "#455a64",
    "#5d4037",
    "#607d8b",
)
_STYLE = (
    """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #6b6b6b; --rule: #d5d5d5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --faint: #a3a3a3; --rule: #3d3d3d } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 60rem; margin: auto; padding: 1rem }
svg { width: 100%; height: auto; font-size: 11px } svg text { fill: var(--faint) }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--rule); padding: .2rem .6rem }
th { text-align: left } td { text-align: right } td:first-child { text-align: left }
pre { overflow-x: auto } .grid, .edge { stroke: var(--rule) } .across { stroke: var(--ink) }
.line { fill: none; stroke-width: 1.6 } .dashed { stroke-dasharray: 5 3; border-top-style: dashed }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem }
.key { display: inline-block; width: 1.6em; border-top: 3px solid; vertical-align: middle; margin-right: .4em }
.said { white-space: pre-wrap; border-left: 3px solid var(--rule); padding-left: .8rem }
.draft { text-decoration: underline } .draft sub { font-size: .6em; text-decoration: none; opacity: .8 }
"""
    + "\n".join(
        f".line.c{number} {{ stroke: {colour} }} .bar.c{number}, .dot.c{number} {{ fill: {colour} }} "
        f".key.c{number} {{ border-color: {colour} }} .draft.c{number} {{ background: {colour}2e }}"
        for number, colour in enumerate(_COLOURS)
    )
    + "\n"
)

_FACTS = {
    "recipe": ("meta", "recipe"),
    "base model": ("config", "base_model_name_or_path"),
    "heads": ("config", "medusa_num_heads"),
    "blocks a head": ("config", "medusa_num_layers"),
    "vocabulary": ("config", "vocab_size"),
    "hidden size": ("config", "hidden_size"),
    "git commit": ("meta", "git_commit"),
}


def page(found: Found, examples: Sequence[Example] = ()) -> str:
    """The whole page."""
    title = html.escape(f"Medusa heads of {found.directory.resolve().name}")
    sections = [_facts(found), _training(found)]
    sections += [_of_file(found, name, one, _evaluation) for name, one in found.evaluations.items()]
    sections += [_of_file(found, name, one, _tree) for name, one in found.trees.items()]
    sections += [_of_file(found, name, one, _plan) for name, one in found.plans.items()]
    sections += [_examples(examples)]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in found.notes)
    sections += [f"<h2>What is missing</h2><ul>{notes}</ul>"] if notes else []
    body = "\n".join(filter(None, sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n<title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n{body}\n</main></body></html>\n"
    )


def _of_file(found: Found, name: str, content: Mapping[str, Any], show: Callable[[str, Mapping[str, Any]], str]) -> str:
    """A file's section; a note where the file is not whole."""
    try:
        return show(name, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.notes.append(f"{name} is not whole and was left out ({type(error).__name__}: {error})")
        return ""


def _table(header: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _facts(found: Found) -> str:
    parts = {"config": found.config, "meta": found.meta}
    rows = [(name, parts[part][key]) for name, (part, key) in _FACTS.items() if parts[part].get(key) is not None]
    if "original_lm_head" in found.config:
        rows.append(("output layers", form_of(found.config)))
    versions = found.meta.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)))
    text = _table(("what", "value"), rows) if rows else ""
    if found.meta.get("yaml"):
        yaml = html.escape(json.dumps(found.meta["yaml"], indent=2))
        text += f"<details><summary>The YAML as it was resolved</summary><pre>{yaml}</pre></details>"
    return f"<h2>Heads</h2>{text}" if text else ""


def _training(found: Found) -> str:
    charts = []
    for name, (_, axis) in TRAINING_PLOTS.items():
        chart = line_chart(f"{axis} over steps", found.series.get(name, {}), "step", axis)
        charts += [f"<h3>{html.escape(axis)}</h3>{chart}"] if chart else []
    if not charts:
        return ""
    last = {metric: points[-1] for series in found.series.values() for metric, points in series.items() if points}
    table = _table(
        ("last value", "step", "value"), [(name, step, f"{value:.4g}") for name, (step, value) in last.items()]
    )
    closed = f"<details><summary>Last values</summary>{table}</details>"
    return "<h2>Training</h2>" + "".join(charts) + closed


def _evaluation(name: str, report: Mapping[str, Any]) -> str:
    groups = {"all prompts": report["overall"], **report["categories"]}
    hardware = report.get("hardware", {})
    head = f"<h2>Measured: {html.escape(name)}</h2><p>Prompts of {html.escape(str(report['prompts_file']))}"
    head += f", on {html.escape(str(hardware.get('device', 'an unknown machine')))}. Decoding is greedy.</p>"
    tops = list(report["overall"]["heads"][0]["top"])
    accuracies = [
        (group, head_["head"], head_["positions"], *(_share(head_["top"][top]) for top in tops))
        for group, content in groups.items()
        for head_ in content["heads"]
    ]
    decoders = [
        (
            group,
            decoder,
            f"{row['acceptance_length']:.3f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['speed_up']:.2f}",
            _share(row["agreement"]),
        )
        for group, content in groups.items()
        for decoder, row in content["decoders"].items()
    ]
    return "".join(
        [
            head,
            "<h3>Tokens for each pass of the model</h3>",
            bar_chart(
                "acceptance length by category", _by_decoder(groups, "acceptance_length"), "tokens a pass", line=1.0
            ),
            "<h3>Speed against plain decoding</h3>",
            bar_chart("speed-up by category", _by_decoder(groups, "speed_up"), "times plain", line=1.0),
            _table(("prompts", "decoder", "acceptance length", "tokens/s", "times plain", "same text"), decoders),
            "<h3>How often each head is right</h3>",
            _table(("prompts", "head", "positions", *(f"top {top}" for top in tops)), accuracies),
            *(_tree(tree, {"choices": choices}, level=3) for tree, choices in report.get("trees", {}).items()),
        ]
    )


def _by_decoder(groups: Mapping[str, Any], value: str) -> dict[str, dict[str, float]]:
    return {
        group: {name: float(row[value]) for name, row in content["decoders"].items() if name != "plain"}
        for group, content in groups.items()
    }


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _tree(name: str, content: Mapping[str, Any], level: int = 2) -> str:
    choices = [[int(rank) for rank in choice] for choice in content["choices"]]
    title = html.escape(f"Candidate tree: {name}, {len(choices) + 1} nodes")
    return f"<h{level}>{title}</h{level}>{tree_chart(f'candidate tree {name}', choices)}"


def _plan(name: str, content: Mapping[str, Any]) -> str:
    times = [(tokens, f"{1000 * seconds:.2f}") for tokens, seconds in content["step_s"].items()]
    rest = {key: value for key, value in content.items() if key not in ("step_s", "format")}
    closed = f"<details><summary>All of it</summary><pre>{html.escape(json.dumps(rest, indent=2))}</pre></details>"
    table = _table(("tokens in a step", "ms"), times)
    return f"<h2>Server: {html.escape(name)}</h2>{table}{closed if rest else ''}"


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    parts = [
        "<h2>What it writes</h2><p>Underlined text was guessed by a head, whose number stands behind it; the model wrote the rest "
        "itself. The words are the model's own in any case.</p>"
    ]
    for example in examples:
        said = "".join(_piece(text, head) for text, head in example.pieces)
        parts.append(f"<h3>{html.escape(example.prompt)}</h3>")
        parts.append(f'<p class="said">{said}</p><p>{example.acceptance_length:.2f} tokens a pass.</p>')
    return "".join(parts)


def _piece(text: str, head: int | None) -> str:
    if head is None:
        return html.escape(text)
    return (
        f'<span class="draft c{head % len(_COLOURS)}" title="head {head}">{html.escape(text)}<sub>{head}</sub></span>'
    )

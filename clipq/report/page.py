"""One HTML page about one or several runs, complete in itself: its images are inside, scripts it has none."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from clipq.report.html import class_, document, example_grid, is_right
from clipq.report.plots import Plot, color
from clipq.report.runs import Run
from clipq.report.stability import Part
from clipq.report.summary import (
    Quantity,
    chance_of,
    compare,
    is_chance,
    is_share,
    metric_label,
    percent,
    planned_steps,
    primary_metrics,
    settings,
)

MOST_EVENTS = 50
"""Events that the page lists of a run."""
_TILES = (
    "final_loss",
    "images_per_second",
    "data_wait",
    "seconds",
    "mfu",
    "memory_gib",
    "parameters",
    "gflops_per_image",
)


def page(runs: Sequence[Run], plots: Sequence[Plot], stability: Sequence[Part] = ()) -> str:
    """The whole document. Every text of the runs is escaped; equal runs and plots give equal pages."""
    title = ", ".join(run.name for run in runs)
    lines = compare(runs)
    body = [_heading(runs)]
    if len(runs) == 1:
        body += [_tiles(runs[0], lines), _results(lines)]
    else:
        body += [_comparison(runs, lines), _differences(runs)]
    body += [
        _plots(plots),
        _stability(stability, several=len(runs) > 1),
        _examples(runs),
        _history(runs),
        _settings(runs),
        _environment(runs),
    ]
    return document(f"{title} · clipq report", [part for part in body if part])


def _heading(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        parts = [f"<h1>{escape(runs[0].name)}</h1>", f'<p class="soft">{escape(_progress(runs[0]))}</p>']
    else:
        parts = [f"<h1>{len(runs)} runs compared</h1>"]
        parts += [
            f"<p>{_chip(index)}<strong>{escape(run.name)}</strong> "
            f'<span class="soft">{escape(_progress(run))}</span></p>'
            for index, run in enumerate(runs)
        ]
    for run in runs:
        parts += [f'<p class="note"><strong>{escape(run.name)}</strong>: {escape(note)}.</p>' for note in run.notes]
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _progress(run: Run) -> str:
    """One line on what the run is and how far it got."""
    model, data = run.config.get("model"), run.config.get("data")
    named = [str(group["name"]) for group in (model, data) if isinstance(group, dict) and group.get("name")]
    what = [" on ".join(named)] if named else []
    planned = planned_steps(run)
    if planned:
        what.append(f"step {run.last_step:,} of {planned:,}, not finished")
    else:
        what.append(f"{run.last_step:,} steps")
    device = run.environment.get("device")
    if isinstance(device, str) and device:
        ranks = run.environment.get("world_size")
        what.append(f"{ranks} x {device}" if isinstance(ranks, int) and ranks > 1 else device)
    return " · ".join(what)


def _chip(index: int) -> str:
    return f'<span class="chip" style="background:{color(index)}"></span>'


def _tiles(run: Run, lines: Sequence[Quantity]) -> str:
    tiles = [_accuracy_tile(task, metric, run) for task in run.evaluations for metric in _headline(run, task)]
    by_key = {line.key: line for line in lines}
    for key in _TILES:
        if key in by_key and by_key[key].values[0] is not None:
            line = by_key[key]
            tiles.append(_tile(line.label, line.text(0), line.detail))
    return '<section class="tiles">\n' + "\n".join(tiles) + "\n</section>"


def _headline(run: Run, task: str) -> list[str]:
    metrics = run.evaluations[task][-1].metrics
    return [metric for metric in primary_metrics(list(metrics)) if metric in metrics]


def _accuracy_tile(task: str, metric: str, run: Run) -> str:
    metrics = run.evaluations[task][-1].metrics
    value, chance = metrics[metric], chance_of(metric, metrics)
    if chance:
        detail = f"{value / chance:.1f}x chance ({percent(chance)})"
    else:
        detail = ", ".join(f"{metrics[m]:,.0f} {m}" for m in ("images", "texts") if m in metrics)
    return _tile(f"{task}: {metric_label(metric)}", percent(value), detail, main=True)


def _tile(name: str, value: str, detail: str, *, main: bool = False) -> str:
    return (
        f'<div class="tile{" main" if main else ""}"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="detail">{escape(detail)}</div></div>'
    )


def _results(lines: Sequence[Quantity]) -> str:
    """The numbers of one run, a small table for each group."""
    tables = []
    for group, members in groupby(lines, key=lambda line: line.group):
        rows = "\n".join(
            f'<tr><th scope="row">{_line_label(line)}</th><td>{escape(line.text(0))}</td></tr>' for line in members
        )
        tables.append(f"<div><h3>{escape(group)}</h3>\n<table><tbody>\n{rows}\n</tbody></table></div>")
    return '<section>\n<h2>Results</h2>\n<div class="groups">\n' + "\n".join(tables) + "\n</div>\n</section>"


def _line_label(line: Quantity) -> str:
    return escape(line.label) + (f' <span class="soft">{escape(line.detail)}</span>' if line.detail else "")


def _comparison(runs: Sequence[Run], lines: Sequence[Quantity]) -> str:
    rows = []
    for group, members in groupby(lines, key=lambda line: line.group):
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}">{escape(group)}</th></tr>')
        for line in members:
            best = line.best()
            cells = "".join(
                f"<td{class_('best' if index in best else '')}>{escape(line.text(index))}</td>"
                for index in range(len(runs))
            )
            rows.append(f'<tr><th scope="row">{_line_label(line)}</th>{cells}</tr>')
    hint = '<p class="soft">The best value of a line is bold where runs differ.</p>'
    return f"<section>\n<h2>Results</h2>\n{_table(runs, rows)}{hint}\n</section>"


def _table(runs: Sequence[Run], rows: Iterable[str], *, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{_chip(i)}{escape(run.name)}</th>' for i, run in enumerate(runs))
    return (
        f'<div class="scroll"><table{class_(kind)}>\n'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _differences(runs: Sequence[Run]) -> str:
    rows = [_setting_row(name, values, differs=False) for name, values, differs in settings(runs) if differs]
    if rows:
        text = _table(runs, rows, kind="left")
    elif any(run.config for run in runs):
        text = '<p class="soft">None: the runs have the same settings.</p>'
    else:
        text = '<p class="soft">Not known: the run folders hold no config.yaml.</p>'
    return f"<section>\n<h2>Settings that differ</h2>\n{text}\n</section>"


def _setting_row(name: str, values: Sequence[str | None], *, differs: bool) -> str:
    cells = "".join(f"<td>{'—' if v is None else f'<code>{escape(v)}</code>'}</td>" for v in values)
    mark = class_("differs" if differs else "")
    return f'<tr{mark}><th scope="row"><code>{escape(name)}</code></th>{cells}</tr>'


def _figure(plot: Plot, *, alt: str) -> str:
    data = base64.b64encode(plot.png).decode("ascii")
    return (
        f'<div class="plot"><h3>{escape(plot.title)}</h3><p class="soft">{escape(plot.caption)}</p>'
        f'<div class="scroll"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div></div>'
    )


def _plots(plots: Sequence[Plot]) -> str:
    figures = []
    for plot in plots:
        figures.append(_figure(plot, alt=f"{plot.title}, by step and by wall time. {plot.caption}"))
    return "<section>\n<h2>Curves</h2>\n" + "\n".join(figures) + "\n</section>"


def _stability(parts: Sequence[Part], *, several: bool) -> str:
    sections = []
    for part in parts:
        whose = f"<strong>{escape(part.run.name)}</strong>: " if several else ""
        sections.append(f"<p>{whose}{escape(part.text)}</p>")
        if part.plot is not None:
            sections.append(_figure(part.plot, alt=f"{part.plot.title}, by step. {part.plot.caption}"))
        if part.lines:
            rows = "\n".join(
                f'<tr><th scope="row">{step:,}</th><td>{escape(kind)}</td><td>{escape(text)}</td></tr>'
                for step, kind, text in part.lines[:MOST_EVENTS]
            )
            more = f'<p class="soft">and {len(part.lines) - MOST_EVENTS:,} more</p>' * (len(part.lines) > MOST_EVENTS)
            sections.append(
                f"<details><summary>Events ({len(part.lines):,})</summary>\n"
                '<div class="scroll"><table class="left"><thead><tr><th scope="col">step</th><th scope="col">event</th>'
                f'<th scope="col"></th></tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{more}\n</details>'
            )
    return "<section>\n<h2>Stability</h2>\n" + "\n".join(sections) + "\n</section>" if sections else ""


def _examples(runs: Sequence[Run]) -> str:
    parts = []
    for index, run in enumerate(runs):
        for examples in run.examples:
            if not examples.examples:
                continue
            right = sum(is_right(example) for example in examples.examples)
            at = f" at step {examples.step:,}" if examples.step is not None else ""
            label = f"{examples.task}{at}: {right} of these {len(examples.examples)} right"
            whose = f"{_chip(index)}{escape(run.name)} · " if len(runs) > 1 else ""
            opened = " open" if index == 0 else ""
            parts.append(
                f"<details{opened}><summary>{whose}{escape(label)}</summary>\n{example_grid(examples.examples)}\n</details>"
            )
    if not parts:
        return ""
    return "<section>\n<h2>Examples</h2>\n<p>Scores are cosine similarities.</p>\n" + "\n".join(parts) + "\n</section>"


def _history(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        for task, evaluations in run.evaluations.items():
            names = [
                m for m in dict.fromkeys(m for e in evaluations for m in e.metrics) if is_share(m) and not is_chance(m)
            ]
            if len(evaluations) < 2 or not names:
                continue
            head = "".join(f'<th scope="col">{escape(metric_label(name))}</th>' for name in names)
            rows = "\n".join(
                f'<tr><th scope="row">{e.step:,}</th>'
                + "".join(f"<td>{escape(percent(e.metrics[n])) if n in e.metrics else '—'}</td>" for n in names)
                + "</tr>"
                for e in evaluations
            )
            parts.append(
                f"<details><summary>{escape(run.name)} · {escape(task)}</summary>\n"
                f'<div class="scroll"><table><thead><tr><th scope="col">step</th>{head}</tr></thead>\n'
                f"<tbody>\n{rows}\n</tbody></table></div>\n</details>"
            )
    return "<section>\n<h2>Every evaluation</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def _settings(runs: Sequence[Run]) -> str:
    rows = settings(runs)
    if not rows:
        return ""
    different = sum(differs for *_, differs in rows)
    marked = f" ({different} that differ are highlighted)" if different else ""
    table = _table(runs, [_setting_row(name, values, differs=differs) for name, values, differs in rows], kind="left")
    return (
        f"<section>\n<h2>Settings</h2>\n<details><summary>All {len(rows)} settings{marked}</summary>\n"
        f"{table}\n</details>\n</section>"
    )


def _environment(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    if not keys:
        return ""
    rows = []
    for key in keys:
        values = [None if (v := run.environment.get(key)) is None else str(v) for run in runs]
        known = {value for value, run in zip(values, runs, strict=True) if run.environment}
        rows.append(_setting_row(key, values, differs=len(known) > 1))
    table = _table(runs, rows, kind="left")
    return (
        "<section>\n<h2>Environment</h2>\n<details><summary>Versions, device, command</summary>\n"
        f"{table}\n</details>\n</section>"
    )

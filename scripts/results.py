"""Keeps measured results in docs/benchmarks/ as JSON, and the tables of the pages as what those files say.

results.py record runs/demo --name demo_cpu --title "Built-in set" --command "clipq-train experiment=demo"
results.py pages            # rewrites the tables of README.md and docs/low_precision.md
results.py pages --check    # fails where they differ
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clipq.report.runs import read_run
from clipq.report.summary import compare, count, duration, percent

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- results of {kind}: made by scripts/results.py -->", "<!-- end of results -->"
PAGES = {
    "README.md": ("run", "step"),
    "docs/data.md": ("loader",),
    "docs/distributed.md": ("loss", "parallel", "save"),
    "docs/low_precision.md": ("step", "linear", "recipes", "gemm"),
    "docs/stability.md": ("spike", "optimizer", "watch"),
}
"""Page -> kinds of tables on it, in the order of the page."""


def record(run: Path, name: str, title: str, command: str, commit: str | None) -> Path:
    """Writes the numbers of a finished run folder to docs/benchmarks/<name>.json.

    Command and commit say what was run; the folder's own configuration stays out, for its paths are of one machine.
    """
    data = read_run(run)
    environment = {**data.environment, "command": command}
    if commit is not None:
        environment["commit"] = commit
    if not environment["commit"] or environment["commit"].endswith("+"):
        raise SystemExit(f"{run}: made from code without a commit; commit first, or name one with --commit")
    values = {line.key: line.values[0] for line in compare([data])}
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "kind": "run", "environment": environment, "values": values}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def run_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of recorded runs."""
    rows = ["| run | device | result | images/s | waiting for data | training time |", "|---|---|---|---|---|---|"]
    for result in results:
        values, environment = result["values"], result["environment"]
        rows.append(
            f"| {result['title']} | {environment['device']} | {_accuracy(values)} | "
            f"{count(values['images_per_second'])} | {percent(values['data_wait'])} | {duration(values['seconds'])} |"
        )
    return "\n".join(rows)


def _accuracy(values: dict[str, float]) -> str:
    shown = {
        "top1": "top-1",
        "top5": "top-5",
        "chance": "chance",
        "image_to_text_r1": "image→text R@1",
        "text_to_image_r1": "text→image R@1",
        "text_to_image_r10": "text→image R@10",
    }
    parts = []
    for key, value in values.items():
        _, _, metric = key.partition("/")
        if not metric or value is None:
            continue
        if metric in shown:
            parts.append(f"{shown[metric]} {percent(value)}")
        elif metric.endswith("_top1"):
            parts.append(f"{metric.removesuffix('_top1').replace('_', ' ')} {percent(value)}")
    return ", ".join(parts)


STEP_NAMES = {
    "bf16": "clipq, bf16",
    "open_clip": "OpenCLIP as shipped, eager",
    "open_clip_compiled": "OpenCLIP as shipped, blocks compiled",
    "torchao_fp8_rowwise": "torchao float8, row-wise",
    "torchao_fp8_rowwise_with_gw_hp": "torchao float8, row-wise with 16-bit weight gradients",
    "torchao_int8_bf16_weights": "torchao int8 mixed precision, bf16 weights",
    "bf16_weights": "clipq, bf16 weights",
}


def step_table(results: list[dict[str, Any]]) -> str:
    """Training steps; each ratio is to the first column of the same run."""
    rows = [
        "| model, device | what | step as a CUDA graph | one by one | its kernels alone | its peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        columns = result["results"]["columns"]
        base = next(iter(columns.values()))
        where = f"{result['results']['settings']['model']}, {result['environment']['device']}"
        for name, column in columns.items():
            what = STEP_NAMES.get(name, f"clipq, `{name}`")
            if "error" in column:
                rows.append(f"| {where} | {what} | does not run: {column['error'].split(':')[0]} | – | – | – |")
                continue
            graph, one_by_one, kernels = (
                f"{column[key]:.0f} ms, ×{base[key] / column[key]:.2f}" if column[key] else "–"
                for key in ("graph_step_ms", "step_ms", "gpu_ms")
            )
            memory = f"{column['peak_gib']:.1f} GiB, {column['peak_gib'] / base['peak_gib'] - 1:+.0%}"
            rows.append(f"| {where} | {what} | {graph} | {one_by_one} | {kernels} | {memory} |")
    return "\n".join(rows)


def linear_table(results: list[dict[str, Any]]) -> str:
    """One layer alone, and the layers of a block with what feeds them."""
    rows = ["| forward and backward of | device, tokens | bf16, compiled | recipe | ratio |", "|---|---|---|---|---|"]
    for result in results:
        found = result["results"]
        recipe, where = found["recipe"], f"{result['environment']['device']}, {found['tokens']:,}"
        for name, times in {**found["alone"], "layers of a block, norms, GELU": found["block"]}.items():
            ratio = f"×{times['ratio']:.2f}"
            rows.append(f"| {name} | {where} | {times['bf16']:.2f} ms | `{recipe}` {times[recipe]:.2f} ms | {ratio} |")
    return "\n".join(rows)


def recipes_table(results: list[dict[str, Any]]) -> str:
    """One short run by every recipe; intervals of 95 % over seeds."""
    rows = ["| recipe | final loss | zero-shot top-1 | seeds |", "|---|---|---|---|"]
    for result in results:
        for recipe, found in result["results"].items():
            (loss, loss_half), (top1, top1_half) = found["loss"], found["top1"]
            loss_half = "" if loss_half is None else f" ± {loss_half:.3f}"
            top1_half = "" if top1_half is None else f" ± {percent(top1_half)}"
            rows.append(f"| `{recipe}` | {loss:.3f}{loss_half} | {percent(top1)}{top1_half} | {found['seeds']} |")
    return "\n".join(rows)


def optimizer_table(results: list[dict[str, Any]]) -> str:
    """One step of each optimizer over the parameters of each model, and the memory that it takes for itself."""
    rows = []
    for result in results:
        models = result["results"]["models"]
        heads = [f"{name}, {m['parameters'] / 1e6:,.1f} M in {m['tensors']}" for name, m in models.items()]
        rows += [f"| {result['environment']['device']} | " + " | ".join(heads) + " |", "|---" * (len(models) + 1) + "|"]
        for name in next(iter(models.values()))["columns"]:
            columns = [m["columns"][name] for m in models.values()]
            cells = [f"{c['ms']:.2f} ms, {c['extra_mib']:,.0f} MiB, {c['launches']:,} launches" for c in columns]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def gemm_table(results: list[dict[str, Any]]) -> str:
    """Products as TOPS and as ratios to cuBLAS bf16, then the kernels over rows as shares of the copy bandwidth."""
    rows = []
    for result in results:
        found, device = result["results"], result["environment"]["device"]
        rows += [f"| tokens × inner × outputs, {device} | bf16 | int8 | fp8 | int8 with a residual |", "|---" * 5 + "|"]
        for shape, p in found["products"].items():
            int8, fp8 = (f"{p[kind]:,.0f}, ×{p[f'{kind}_ratio']:.2f}" for kind in ("int8", "fp8"))
            residual = f"{p['int8_residual']:,.0f}"
            rows.append(f"| {shape.replace('x', ' × ')} | {p['bf16']:,.0f} | {int8} | {fp8} | {residual} |")
        widths = list(found["producers"])
        rows += ["", f"| kernel over rows, {device} | " + " | ".join(f"width {w}" for w in widths) + " |"]
        rows.append("|---" * (len(widths) + 1) + "|")
        for kernel in dict.fromkeys(k for shares in found["producers"].values() for k in shares):
            shares = [found["producers"][w].get(kernel) for w in widths]
            rows.append(f"| {kernel} | " + " | ".join("–" if s is None else f"{s:.2f}" for s in shares) + " |")
    return "\n".join(rows)


def watch_table(results: list[dict[str, Any]]) -> str:
    """What the instruments cost of a step; the guard's gradient norms are in both."""
    rows = ["| step | device | with instruments | without | cost | gradient norms alone |", "|---|---|---|---|---|---|"]
    for result in results:
        found = result["results"]
        for way in (key for key, value in found.items() if isinstance(value, dict)):
            t = found[way]
            rows.append(
                f"| {found['model']}, {found['backend']}, {found['batch']} images, {way} | "
                f"{result['environment']['device']} | {t['watched_ms']:.2f} ms | {t['unwatched_ms']:.2f} ms | "
                f"{t['cost']:.2%} | {t['gradient_norms_ms']:.2f} ms |"
            )
    return "\n".join(rows)


def spike_table(results: list[dict[str, Any]]) -> str:
    """What each optimizer made of the change, a row for each seed."""
    rows = [
        "| optimizer, seed | mean loss before | highest after | highest RMS_t of the patch embedding "
        "| loss spike after | RMS_t before it |",
        "|---" * 6 + "|",
    ]
    for result in results:
        change = result["results"]["change"]
        for name, runs in result["results"]["variants"].items():
            for run in runs:
                after = ", ".join(_steps(s["step"] - change - 1) for s in run["spikes"]) or "none"
                before = ", ".join("–" if s["lead"] is None else _steps(s["lead"]) for s in run["spikes"]) or "–"
                rows.append(
                    f"| {name}, seed {run['seed']} | {run['before']:.2f} | {run['highest']:.2f} | "
                    f"{run['highest_rms']:.1f} | {after} | {before} |"
                )
    return "\n".join(rows)


def _steps(number: int) -> str:
    return f"{number} step" + ("" if number == 1 else "s")


def loader_table(results: list[dict[str, Any]]) -> str:
    """Samples a second of one core."""
    rows = [
        "| shards, images of a batch | clipq | OpenCLIP 3.3.0 | ratio | decoding alone, in memory |",
        "|---" * 5 + "|",
    ]
    for result in results:
        found = result["results"]
        rates = found["samples_per_second"]
        made = f", enlarged to a short side of {found['enlarge']} px" if found["enlarge"] else ""
        rows.append(
            f"| {found['data']}{made} → {found['size']} px | {rates['clipq']:,.0f}/s | {rates['openclip']:,.0f}/s | "
            f"**{rates['clipq'] / rates['openclip']:.1f}×** | {rates['bare']:,.0f}/s |"
        )
    return "\n".join(rows)


def loss_table(results: list[dict[str, Any]]) -> str:
    """Milliseconds and memory of the loss by pairs and tiles."""
    rows = []
    for result in results:
        found = result["results"]
        titles = list(next(iter(found["pairs"].values()))["columns"])
        rows += [f"| {result['environment']['device']} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for pairs, row in found["pairs"].items():
            cells = [
                "out of memory" if c is None else f"{c['ms']:,.1f} ms, {c['extra_mib']:,.0f} MiB"
                for c in row["columns"].values()
            ]
            rows.append(f"| {int(pairs):,} pairs × {found['width']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def parallel_table(results: list[dict[str, Any]]) -> str:
    """Step and memory by what is put around the model; ratios are to nothing."""
    rows = []
    for result in results:
        found = result["results"]
        where = f"{found['model']}, {found['backend']}, {found['batch']} pairs, {result['environment']['device']}"
        rows += [f"| {where} | recorded | one by one | peak memory, one by one |", "|---|---|---|---|"]
        base = found["settings"]["none"]
        for name, row in found["settings"].items():
            recorded, launched = (
                f"{row[key]:.1f} ms, ×{row[key] / base[key]:.2f}" if row[key] else "–"
                for key in ("recorded_ms", "launched_ms")
            )
            rows.append(f"| {name} | {recorded} | {launched} | {row['peak_gib']:.1f} GiB |")
    return "\n".join(rows)


def save_table(results: list[dict[str, Any]]) -> str:
    """How long a checkpoint holds training up: the first, and those after."""
    rows = [
        "| model, device | files | the first holds training up | the next | a step meanwhile | else | written in |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        found = result["results"]
        first, *later = found["held_s"]
        meanwhile, written = max(found["step_while_writing_ms"]), max(found["written_s"])
        rows.append(
            f"| {found['model']}, {result['environment']['device']} | {found['bytes'] / 1e9:.1f} GB | {first:.1f} s | "
            f"{max(later):.2f} s | {meanwhile:.1f} ms | {found['quiet_ms']:.1f} ms | {written:.0f} s |"
        )
    return "\n".join(rows)


TABLES = {
    "loader": loader_table,
    "loss": loss_table,
    "parallel": parallel_table,
    "run": run_table,
    "save": save_table,
    "step": step_table,
    "linear": linear_table,
    "recipes": recipes_table,
    "optimizer": optimizer_table,
    "gemm": gemm_table,
    "watch": watch_table,
    "spike": spike_table,
}
"""Kind of results -> what makes their table."""


def pages(*, check: bool) -> int:
    """Rewrites the tables; with `check` only says (1) that one is not what the results say."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.json"))]
    for result in results:
        if (result["environment"]["commit"] or "+").endswith("+") and "note" not in result:
            raise SystemExit(f"{result['title']}: measured on code without a commit, and no note says which")
    differing = False
    for name, kinds in PAGES.items():
        path = ROOT / name
        text = new = path.read_text(encoding="utf-8")
        for kind in kinds:
            begin = BEGIN.format(kind=kind)
            before, _, rest = new.partition(begin)
            _, end, after = rest.partition(END)
            if not end:
                raise SystemExit(f"{name} has no place for the table of {kind}: {begin} … {END}")
            new = f"{before}{begin}\n{TABLES[kind]([r for r in results if r['kind'] == kind])}\n{END}{after}"
        differing |= new != text
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and differing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("run", type=Path)
    recorder.add_argument("--name", required=True)
    recorder.add_argument("--title", required=True)
    recorder.add_argument("--command", required=True, help="what a reader types to get the same")
    recorder.add_argument("--commit", help="for a run on a machine that had the code without its history")
    commands.add_parser("pages").add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.action == "record":
        print(record(args.run, args.name, args.title, args.command, args.commit))
        return 0
    return pages(check=args.check)


if __name__ == "__main__":
    sys.exit(main())

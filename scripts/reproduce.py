"""Makes a figure of the paper: trains what it needs, and writes it as JSON, image and page.

reproduce.py fig1 scale=small data.root=FOLDER            docs/results/fig1.json, .png, .md
reproduce.py all scale=tiny                               everything in minutes, on a CPU, to no purpose but to run
reproduce.py fig1 scale=paper data.shards='…' eval.root=… launcher=submitit_slurm hydra.launcher.nodes=8 …

The same command again goes on where it stopped: finished runs leave records in runs/reproduce/<scale>/, which may be
taken to another machine, and unfinished ones go on from their checkpoints. Figures share runs where they can.

  scale=small     tiny, small or paper: configs/scale/
  seeds=N         runs of each arm, in place of the figure's own number
  jobs=1          runs at a time on this machine
  minutes=N       stop after so many minutes, with exit code 75
  launcher=NAME   Hydra's launcher: each run is a job of its own, which goes on if this command is stopped
  runs=FOLDER     run folders and records (runs/reproduce)
  run=FOLDER      for fig9: a run of your own, in place of one of figure 1's
  out=FOLDER      figures (docs/results for those of scale=small as they are, else <runs>/<scale>/figures)
  KEY=VALUE       for clipq-train, of every run: data.root=, eval.root=, device=, …; dry_run=true gpus=N prints the
                  plan of each arm, and trains nothing
"""

from __future__ import annotations

import copy
import json
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from paper.figures import FIGURES, Figure
from paper.grid import (
    MISTAKE,
    Grid,
    GridError,
    Options,
    UnfinishedError,
    command_of,
    folder_of,
    is_finished,
    jobs_of,
    run_grid,
    settings_of,
)
from paper.record import made_on
from paper.red_filter import make_shards

from clipq.config.checks import ConfigError
from clipq.config.hydra import explain
from clipq.config.schema import TrainJob
from clipq.data.shards import DataError
from clipq.dist.stop import UNFINISHED
from clipq.log.folder import environment
from clipq.report.figure import FigureError, write_figure

OWN = {"scale": str, "seeds": int, "jobs": int, "minutes": float, "launcher": str, "runs": Path, "run": Path}
SCALES = ("tiny", "small", "paper")
PLACES = ("data.root=", "data.workers=", "data.shards=", "eval.root=", "device=", "hydra.")
"""Overrides that decide where a figure is made, not what it is of."""


def parse(arguments: list[str]) -> tuple[list[str], Options, Path]:
    """Figures, options and the folder for figures.

    Raises:
        SystemExit: a figure or a scale is unknown, or a value cannot be used.
    """
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(__doc__)
        raise SystemExit(0)
    names = [a for a in arguments if "=" not in a]
    names = [*FIGURES] if names == ["all"] else names
    if unknown := [n for n in names if n not in FIGURES]:
        raise SystemExit(f"{unknown[0]}: no such figure: there are {', '.join(FIGURES)}, and all")
    if not names:
        raise SystemExit(f"name a figure: {', '.join(FIGURES)}, or all")
    pairs = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in {*OWN, "out"})
    given: dict[str, Any] = {}
    for key, value in pairs.items():
        if key != "out":
            try:
                given[key] = OWN[key](value)
            except ValueError as error:
                raise SystemExit(f"{key}={value}: expected a number") from error
            if isinstance(given[key], int | float) and given[key] <= 0:
                raise SystemExit(f"{key}={value}: expected more than 0")
    if "run" in pairs and names != ["fig9"]:
        raise SystemExit(f"run={pairs['run']}: fig9 alone takes a run of any kind")
    if "launcher" in pairs and {"minutes", "jobs"} & {*pairs}:
        raise SystemExit("launcher= with minutes= or jobs=: limits of jobs are the launcher's, as in hydra.launcher.…")
    options = Options(**given, overrides=tuple(a for a in arguments if "=" in a and a.partition("=")[0] not in pairs))
    if options.scale not in SCALES:
        raise SystemExit(f"scale={options.scale}: expected one of {', '.join(SCALES)}")
    as_it_is = options.scale == "small" and not {"seeds", "run"} & {*pairs} and not changes_of(options)
    default = Path("docs/results") if as_it_is else options.runs / options.scale / "figures"
    return names, options, Path(pairs.get("out", default))


def changes_of(options: Options) -> list[str]:
    return [o for o in options.overrides if not o.startswith(PLACES)]


def make(name: str, figure: Figure, options: Options, out: Path) -> Path:
    """Writes one figure's JSON, image and page; the path of the page."""
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    settings: dict[str, Any] = {}
    if figure.grid is not None and figure.draw is not None:
        grid = figure.grid
        own = named(grid, options)
        if not is_finished(grid, own):
            prepare(grid, options)
        records = run_grid(grid, own)
        content = figure.draw(records)
        facts |= made_on([r["environment"] for runs in records.values() for r in runs])
        jobs = jobs_of(grid, own)
        settings = {"runs": len(jobs), "arms": grid.arms[options.scale], "first": settings_of(jobs[0])}
    elif figure.measure is not None:
        content = figure.measure(options)
        facts |= content.pop("environment", {})
    else:
        raise AssertionError(f"{name} has nothing to be made of")
    facts["matplotlib"] = version("matplotlib")
    facts.pop("command")
    changed = [*([f"seeds={options.seeds}"] if options.seeds else []), *(["run=runs/RUN"] if options.run else [])]
    command = shlex.join(["scripts/reproduce.py", name, f"scale={options.scale}", *changed, *changes_of(options)])
    differs = out / f"{name}.differs.txt"  # by whoever has looked at these results
    full = {
        "kind": "figure",
        "name": name,
        "title": figure.title,
        "scale": options.scale,
        "command": command if options.run is None else f"{trained_by(options.run)}\n{command}",
        "environment": facts,
        "paper": figure.paper,
        "differs": " ".join(differs.read_text(encoding="utf-8").split()) if differs.exists() else "",
        "settings": settings,
        **content,
    }
    if settings:
        full["here"] = [made_of(settings), *full["here"]]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return write_figure(path)


def trained_by(run: Path) -> str:
    """The command that a run was trained by, without places of a machine."""
    stored = json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"]
    own = [o for o in shlex.split(stored)[1:] if not o.startswith((*PLACES, "runs=", "name="))]
    return shlex.join(["clipq-train", *own, "name=RUN"])


def made_of(settings: dict[str, Any]) -> str:
    """What was trained, in a sentence; arms differ from the first run as they say."""
    first = settings["first"]
    return (
        f"{settings['runs']} runs: {first['steps']:,} steps of {first['batch_size']:,} pairs of {first['data.name']}, "
        f"rate {first['optim.lr']:g} after {first['schedule.warmup']:,} steps, weight decay "
        f"{first['optim.weight_decay']:g}, but for what an arm says."
    )


def plan(name: str, figure: Figure, options: Options) -> int:
    """Prints what `clipq-train` would do for each arm of a figure's grid; the worst exit code."""
    if figure.grid is None:
        print(f"{name} measures, and trains nothing that could be planned")
        return 0
    prepare(figure.grid, options)
    options, codes = named(figure.grid, options), []
    for job in (j for j in jobs_of(figure.grid, options) if j.seed == 0):
        print(f"\n=== {name}: {job.arm}", flush=True)
        codes.append(subprocess.run(command_of(folder_of(figure.grid, options), job)).returncode)
    return max(codes)


def red_filter(options: Options) -> Path:
    return options.runs / options.scale / "red_filter"


def named(grid: Grid, options: Options) -> Options:
    """The options of a grid: those of scale=provoked train on pictures made from those of data.root, and evaluate on
    that."""
    if grid.scales.get(options.scale) != "provoked":
        return options
    given = dict(o.split("=", 1) for o in options.overrides)
    kept = [o for o in options.overrides if not o.startswith("data.root=")]
    new = copy.copy(options)
    root = given.get("data.root", "ROOT")
    new.overrides = (*kept, f"data.root={red_filter(options)}", "eval=tiny_imagenet", f"eval.root={root}")
    return new


def prepare(grid: Grid, options: Options) -> None:
    """Makes the pictures of scale=provoked, once."""
    if grid.scales.get(options.scale) != "provoked":
        return
    given = dict(o.split("=", 1) for o in options.overrides)
    if "data.root" not in given:
        raise SystemExit("data.root is not set: expected the folder of Tiny ImageNet, with train/*.tar.gz")
    source, work = str(Path(given["data.root"]).absolute()), red_filter(options)
    mark = work / "complete"
    if not mark.exists() or mark.read_text(encoding="utf-8") != source:
        print("making pictures through a red filter …", flush=True)
        make_shards(f"{source}/train/*.tar.gz", work)
        mark.write_text(source, encoding="utf-8")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # runs are then asked to save, as by Ctrl-C
        signal.signal(number, lambda *_: sys.exit(UNFINISHED))
    names, options, out = parse(sys.argv[1:])
    planned = any(o.lower() in ("dry_run=true", "dry_run=1", "dry_run=yes", "dry_run=on") for o in options.overrides)
    for name in names:
        try:
            if planned:
                if code := plan(name, FIGURES[name], options):
                    return code
                continue
            print(make(name, FIGURES[name], options, out).resolve())
        except KeyboardInterrupt:
            print("reproduce.py: stopped; the same command goes on", file=sys.stderr)
            return UNFINISHED
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            print(f"reproduce.py: {name}: {explain(error, TrainJob)}", file=sys.stderr)
            return MISTAKE
        except UnfinishedError as error:
            print(f"reproduce.py: {error}", file=sys.stderr)
            return UNFINISHED
        except (GridError, DataError, FigureError, OSError) as error:
            print(f"reproduce.py: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes a figure of the paper: trains what it needs, and writes it as JSON, image and page.

reproduce.py fig1 scale=small data.root=FOLDER            docs/results/fig1.json, .png, .md
reproduce.py all scale=tiny                               everything in seconds, on a CPU, to no purpose but to run
reproduce.py fig1 scale=paper data.shards='…' eval.root=… launcher=submitit_slurm

The same command again goes on where it stopped: finished runs leave records in runs/reproduce/<scale>/, which may be
taken to another machine, and unfinished ones go on from their checkpoints. Figures share runs where they can.

  scale=small     tiny, small or paper: configs/scale/
  seeds=N         runs of each arm, in place of the figure's own number
  jobs=1          runs at a time on this machine
  minutes=N       stop after so many minutes, with exit code 75
  launcher=NAME   Hydra's launcher: each run is a job of its own
  runs=FOLDER     run folders and records (runs/reproduce)
  run=FOLDER      for fig9: a run of your own, in place of one of figure 1's
  out=FOLDER      figures (docs/results; with another scale than small FOLDER/<scale> of the runs)
  KEY=VALUE       for clipq-train, of every run: data.root=, eval.root=, device=, …; dry_run=true gpus=N prints the
                  plan of each arm, and trains nothing
"""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from paper.figures import FIGURES, Figure
from paper.grid import (
    MISTAKE,
    GridError,
    Options,
    UnfinishedError,
    command_of,
    folder_of,
    jobs_of,
    run_grid,
    settings_of,
)
from paper.red_filter import make_shards

from clipq.config.checks import ConfigError
from clipq.config.hydra import explain
from clipq.config.schema import TrainJob
from clipq.dist.stop import UNFINISHED
from clipq.log.folder import environment
from clipq.report.figure import write_figure

OWN = {"scale": str, "seeds": int, "jobs": int, "minutes": float, "launcher": str, "runs": Path, "run": Path}
SCALES = ("tiny", "small", "paper")


def parse(arguments: list[str]) -> tuple[list[str], Options, Path]:
    """Figures, options and the folder for figures.

    Raises:
        SystemExit: a figure or a scale is unknown, or a value cannot be read.
    """
    names = [a for a in arguments if "=" not in a]
    pairs = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in {*OWN, "out"})
    names = [*FIGURES] if names == ["all"] else names
    if "run" in pairs and names != ["fig9"]:
        raise SystemExit(f"run={pairs['run']}: fig9 alone takes a run of any kind")
    if unknown := [n for n in names if n not in FIGURES]:
        raise SystemExit(f"{unknown[0]}: no such figure: there are {', '.join(FIGURES)}, and all")
    if not names:
        raise SystemExit(str(__doc__))
    given: dict[str, Any] = {}
    for key, value in pairs.items():
        if key != "out":
            try:
                given[key] = OWN[key](value)
            except ValueError as error:
                raise SystemExit(f"{key}={value}: expected a number") from error
    rest = tuple(a for a in arguments if "=" in a and a.partition("=")[0] not in pairs)
    options = Options(**given, overrides=rest)
    if options.scale not in SCALES:
        raise SystemExit(f"scale={options.scale}: expected one of {', '.join(SCALES)}")
    default = Path("docs/results") if options.scale == "small" else options.runs / options.scale / "figures"
    return names, options, Path(pairs.get("out", default))


def make(name: str, figure: Figure, options: Options, out: Path) -> Path:
    """Writes one figure's JSON, image and page; the path of the page."""
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    settings: dict[str, Any] = {}
    if figure.grid is not None and figure.draw is not None:
        options = prepared(figure, options)
        records = run_grid(figure.grid, options)
        content = figure.draw(records)
        facts |= made_on([r["environment"] for runs in records.values() for r in runs])
        jobs = jobs_of(figure.grid, options)
        settings = {"runs": len(jobs), "arms": figure.grid.arms[options.scale], "first": settings_of(jobs[0])}
    elif figure.measure is not None:
        content = figure.measure(options)
    else:
        raise AssertionError(f"{name} has nothing to be made of")
    facts["matplotlib"] = matplotlib.__version__
    facts.pop("command")
    full = {
        "kind": "figure",
        "name": name,
        "title": figure.title,
        "scale": options.scale,
        "command": f"scripts/reproduce.py {name} scale={options.scale}{' run=RUN' if options.run else ''}",
        "environment": facts,
        "paper": figure.paper,
        "differs": figure.differs.get(options.scale, ""),
        "settings": settings,
        **content,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return write_figure(path)


def made_on(found: list[dict[str, Any]]) -> dict[str, str]:
    """What the runs ran on: several commits or devices are all named."""
    keys = ("device", "torch", "triton", "commit")
    return {key: ", ".join(sorted({str(facts.get(key)) for facts in found})) for key in keys}


def plan(name: str, figure: Figure, options: Options) -> int:
    """Prints what `clipq-train` would do for each arm of a figure's grid; the worst exit code."""
    if figure.grid is None:
        print(f"{name} measures, and trains nothing that could be planned")
        return 0
    codes = []
    for job in (j for j in jobs_of(figure.grid, options) if j.seed == 0):
        print(f"\n=== {name}: {job.arm}", flush=True)
        codes.append(subprocess.run(command_of(folder_of(figure.grid, options), job)).returncode)
    return max(codes)


def prepared(figure: Figure, options: Options) -> Options:
    """Makes the red shards of scale=provoked from those of data.root, once; the options that name them."""
    assert figure.grid is not None
    if figure.grid.scales.get(options.scale) != "provoked":
        return options
    given = dict(o.split("=", 1) for o in options.overrides)
    if "data.root" not in given:
        raise SystemExit("data.root is not set: expected the folder of Tiny ImageNet, with train/*.tar.gz")
    work = options.runs / options.scale / "red_filter"
    if not (work / "complete").exists():
        print("making pictures through a red filter …", flush=True)
        make_shards(f"{given['data.root']}/train/*.tar.gz", work)
    kept = [o for o in options.overrides if not o.startswith("data.root=")]
    own = (f"data.root={work}", "eval=tiny_imagenet", f"eval.root={given['data.root']}")
    new = copy.copy(options)
    new.overrides = (*kept, *own)
    return new


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))  # runs are then asked to save, as by Ctrl-C
    names, options, out = parse(sys.argv[1:])
    for name in names:
        try:
            if "dry_run=true" in options.overrides:
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
        except GridError as error:
            print(f"reproduce.py: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

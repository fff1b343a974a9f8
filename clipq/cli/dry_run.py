"""`clipq-train … dry_run=true`: what the command would do, what it would take, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from braceexpand import braceexpand

from clipq.build import build_model, freeze_untrained
from clipq.build_backend import AUTOCAST, convert, wants_graph
from clipq.build_data import find_source
from clipq.build_eval import absent, build_evaluator
from clipq.build_parallel import units_of
from clipq.config.checks import ConfigError
from clipq.config.choices import Device, MissingData, Optimizer, Precision, Recipe, Resume, Strategy
from clipq.config.groups import SHARDING
from clipq.config.schema import TrainJob, check_backend, problems
from clipq.data.remote import is_url
from clipq.data.shards import expand
from clipq.data.synthetic import folder_of, is_complete
from clipq.dist.env import (
    DistEnv,
    cuda_capability,
    local_world_size_from_environment,
    world_size_from_environment,
)
from clipq.log.folder import changes
from clipq.log.meters import PEAK_FLOPS, flops_per_pair
from clipq.lowp import get_recipe
from clipq.model.clip import ClipModel
from clipq.train import estimate
from clipq.train.kept import newest
from clipq.watch.rms import choose

PER_NODE = 8
"""GPUs of a node, as far as `gpus` can be shared by such nodes: for hybrid shards, of which each node has a copy."""
TOLD = 10
"""Missing shards that are told one by one."""


class Gpu(NamedTuple):
    """What the estimates are of."""

    name: str
    gib: float
    assumed: bool
    """There is none here."""


def dry_run(job: TrainJob, yaml: str) -> None:
    """Prints the plan of a run, and what is wrong with it on stderr. Trains nothing and writes nothing.

    Raises:
        SystemExit: with 2, if anything is wrong.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    plan = Plan(job, yaml)
    print(yaml)
    print("dry run: nothing is trained, nothing is written; what is estimated is said to be `about`\n")
    for title, text in plan.lines:
        for n, line in enumerate(text.splitlines()):
            print(f"{'' if n else title:12} {line}")
    sys.stdout.flush()
    for problem in plan.problems:
        print(f"{Path(sys.argv[0]).stem}: {problem}", file=sys.stderr, flush=True)
    if plan.problems:
        raise SystemExit(2)


class Plan:
    """The lines that a dry run prints, and all problems that it finds."""

    def __init__(self, job: TrainJob, yaml: str) -> None:
        self.job, self.yaml = job, yaml
        self.lines: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.world, self.local = world_size_from_environment(), local_world_size_from_environment()
        if job.gpus is not None:
            self.world, self.local = job.gpus, max(n for n in range(1, PER_NODE + 1) if job.gpus % n == 0)
        self.gpu = _gpu(job.device)
        self.pairs = job.steps * job.batch_size
        # Of an H100, also where this machine has less: the run is planned for another.
        self.problems += problems(job, world_size=self.world, local_world_size=self.local, capability=(9, 0))
        self.fits = not self.problems
        self._configuration()
        self._data()
        self._evaluation()
        self._tried(self._model)

    def say(self, title: str, text: str) -> None:
        self.lines.append((title, text))

    def _tried(self, function: Callable[[], Any], setting: str = "") -> Any:
        """What a function returns; None where it fails, which is then a problem of a setting."""
        try:
            return function()
        except (OSError, ValueError, ImportError) as error:
            what = str(error) or type(error).__name__
            what = f"{setting}: {what}" if setting and setting not in what else what
            if what not in self.problems:
                self.problems.append(what)
            return None

    # --- what is asked for ------------------------------------------------------------------------------------------

    def _configuration(self) -> None:
        job, o, s = self.job, self.job.optim, self.job.schedule
        folder = Path(job.runs) / job.name
        one, several = ("process", "processes") if job.device is Device.cpu else ("GPU", "GPUs")
        nodes = f" on {self.world // self.local:,} nodes" if self.world > self.local else ""
        where = f"{self.world:,} {one if self.world == 1 else several}{nodes}"
        self.say("run", f"{folder}, {self._place(folder)}; {where}")
        recipe = "" if job.backend.recipe is Recipe.bf16 else f", recipe {job.backend.recipe.value}"
        self.say("arithmetic", f"{job.backend.precision.value}{recipe}, parallel={job.parallel.strategy.value}")
        if not self.gpu.assumed:
            try:
                check_backend(job.backend, device=job.device, capability=cuda_capability())
            except ConfigError as error:
                self.say("", f"not on this machine: {error}")
        clips = f", clip_threshold {o.clip_threshold:g}" if o.name is Optimizer.stable_adamw else ""
        clips += "" if o.clip_norm is None else f", clip_norm {o.clip_norm:g}"
        beta2 = f"{o.beta2:g}" if o.beta2_power is None else f"1 - t^-{o.beta2_power:g}"
        self.say(
            "optimizer",
            f"{o.name.value}, lr {o.lr:g}, betas {o.beta1:g} and {beta2}, weight decay {o.weight_decay:g}{clips}",
        )
        ends = f", the last {s.cooldown:,} of cooldown" if s.cooldown else ""
        self.say("schedule", f"{s.decay.value}, {s.warmup:,} steps of warm-up{ends}, to {s.final_lr:g} of the peak")
        pairs, rest = divmod(job.batch_size, self.world)
        each = "which they cannot share" if rest else f"{pairs:,} on each"
        parts = f" in {job.accumulation} parts" if job.accumulation > 1 else ""
        self.say("batch", f"{job.batch_size:,} pairs a step, {each}{parts}; loss {job.loss.value}")
        self.say("steps", f"{job.steps:,}, {self.pairs:,} pairs")

    def _place(self, folder: Path) -> str:
        """Where the run begins, by its folder."""
        path = newest(folder / "checkpoints")
        if path is None:
            return "from the start"
        if self.job.resume is Resume.never:
            self.problems.append(f"resume=never, but {folder} holds {path.name}: choose another name=, or remove it")
        self._tried(lambda: changes((path / "config.yaml").read_text(encoding="utf-8"), self.yaml))
        return f"goes on from {path.name} (what follows is of the whole run)"

    # --- what there is ----------------------------------------------------------------------------------------------

    def _data(self) -> None:
        config = self.job.data
        total = sum(source.weight for source in config.sources.values())
        for name in config.sources or [None]:
            shards = config.shards if name is None else config.sources[name].shards
            setting = "data.shards" if name is None else f"data.sources.{name}"
            share = 1.0 if name is None else config.sources[name].weight / total
            if self._unrendered(shards):
                text = f"{setting}: the built-in set is not in {folder_of()}: the run would render it first (20 s)"
            elif self._all_there(setting, shards):
                text = self._tried(lambda name=name, share=share: self._source(name, share), setting)
            else:
                text = None
            self.say("data", text or f"{setting}: cannot be used, see below")

    def _source(self, name: str | None, share: float) -> str:
        source = find_source(self.job.data, name, cache=None)  # a cache would be made, on this machine
        source.check()
        remote = sum(map(is_url, source.shards))
        counts = source.counts or []
        if source.tables is not None:
            of, size = "tables", sum(len(table.table) for table in source.tables)
        else:
            of, size = "shards", None if None in counts else sum(count or 0 for count in counts)
        number = len(source.tables or source.shards)
        of = of if number > 1 else of[:-1]
        text = f"{source.setting}: {number:,} {of}{f', {remote:,} at addresses that were not tried' if remote else ''}"
        if name is not None and any(other.passes for other in self.job.data.sources.values()):
            return f"{text}{f', {size:,} pairs' if size else ''}; passes follow from the sources' `passes` and weights"
        if not size:
            return f"{text}; how many pairs is not known: clipq-data index counts them"
        return f"{text}, {size:,} pairs: {share * self.pairs / size:,.3g} passes over them"

    def _evaluation(self) -> None:
        config = self.job.eval
        for name, task in config.tasks.items():
            where = f"eval.tasks.{name}"
            if self._unrendered(vars(task)):
                self.say("evaluation", f"{name}: of the built-in set")
                continue
            if config.missing is MissingData.report and (why := absent(task)) is not None:
                self.say("evaluation", f"{name}: missing, and reported as such: {why}")
                continue
            there = [
                self._all_there(f"{where}.{key}", shards)
                for key, shards in (("shards", task.shards), ("train_shards", task.train_shards))
                if shards is not None
            ]
            if all(there):
                there = [self._tried(lambda n=name, t=task: build_evaluator(n, t, 0).check() or True, where)]
            self.say("evaluation", f"{name}: {'its data are there' if all(there) else 'cannot be used, see below'}")

    def _unrendered(self, value: Any) -> bool:
        folder = folder_of()
        return str(folder) in str(value) and not is_complete(folder)

    def _all_there(self, setting: str, patterns: Any) -> bool:
        """Whether each pattern has a match; each that has none is a problem."""
        missing: list[str] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                names = list(braceexpand(pattern))
            except ValueError:  # which `expand` says too
                names = [pattern]
            for name in names:
                try:
                    expand(name)
                except (OSError, ValueError) as error:
                    missing.append(f"{setting}: {error}")
        self.problems += missing[:TOLD]
        if len(missing) > TOLD:
            self.problems.append(f"{setting}: and {len(missing) - TOLD:,} more")
        return not missing

    # --- what it would take -----------------------------------------------------------------------------------------

    def _model(self) -> None:
        job = self.job
        clip = self._tried(lambda: build_model(job.model, job.loss, meta=True))
        if clip is None:  # maybe for its weights alone
            clip = build_model(dataclasses.replace(job.model, pretrained=None), job.loss, meta=True)
        self._tried(lambda: choose(clip.model, job.watch.rms), f"watch.rms={job.watch.rms}")
        freeze_untrained(clip, job)
        height, width = clip.preprocess.size
        parameters = sum(p.numel() for p in clip.model.parameters())
        trained = sum(p.numel() for p in clip.model.parameters() if p.requires_grad)
        dropout = clip.config["vision_cfg"].get("patch_dropout") or 0
        more = f", patch dropout {dropout:g}" if dropout else ""
        more += ", gradient checkpointing" if job.model.grad_checkpointing else ""
        more += f", weights of {job.model.pretrained}" if job.model.pretrained else ""
        self.say("model", f"{clip.name}, {parameters / 1e6:,.1f} M parameters, {width} × {height} pixels{more}")
        flops = flops_per_pair(clip.model, clip.preprocess.size, clip.context_length)
        self.say(
            "operations", f"{flops / 1e9:,.3f} GFLOP a pair, forward and backward; {flops * self.pairs:.3g} FLOP in all"
        )
        self.say("checkpoints", self._checkpoints(4 * parameters + 8 * trained))
        if not self.fits:
            self.say("memory, time", "are not estimated before the settings fit the processes, see below")
        elif job.device is Device.cpu:
            self.say("memory, time", "are not estimated for a CPU")
        else:
            self._estimates(clip, self._layout(clip), flops)

    def _layout(self, clip: ClipModel) -> estimate.Layout:
        job, sharded = self.job, self.world > 1 and self.job.parallel.strategy in SHARDING
        if sharded:
            units_of(clip, job.parallel)
        return estimate.Layout(
            pairs=job.batch_size // self.world,
            world_size=self.world,
            accumulation=job.accumulation,
            buckets=self.world > 1 and job.parallel.strategy is Strategy.ddp,
            shards=self.world // job.parallel.copies(self.world, self.local) if sharded else 1,
            sharded=sharded,
            reshard=job.parallel.reshard_after_forward,
        )

    def _estimates(self, clip: ClipModel, layout: estimate.Layout, flops: float) -> None:
        convert(clip, self.job.backend, pairs=layout.micro_batch, training=True, device_name=self.gpu.name)
        env = DistEnv(0, self.world, 0, self.local, torch.device("cuda"))
        recorded = wants_graph(self.job, clip, env)
        self.say("memory", self._memory(clip, layout, recorded))
        self.say("time", self._time(clip, layout, flops, recorded))

    def _checkpoints(self, size: float) -> str:
        """Fp32 weights and two moments of each that is trained."""
        c, last = self.job.checkpoint, self.job.steps
        saved = sorted({*(range(c.every, last + 1, c.every) if c.every else ()), last})
        newest_ones = saved[-c.keep_last :]
        for_good = [step for step in saved[: -c.keep_last] if c.keep_every and step % c.keep_every == 0]
        stay = len(newest_ones) + len(for_good)
        by_clock = f", and one whenever the last is {c.minutes:g} minutes old" if c.minutes else ""
        return (
            f"{len(saved):,} of {_bytes(size)}{by_clock}; {stay:,} stay, {_bytes(stay * size)}, and one more is there "
            "while it is written"
        )

    def _memory(self, clip: ClipModel, layout: estimate.Layout, recorded: bool) -> str:
        job = self.job
        height, width = clip.preprocess.size
        features = int(clip.config["embed_dim"])
        loss = estimate.loss_bytes(layout.pairs, job.batch_size, features)
        parts = estimate.units(
            clip.model,
            clip.preprocess.size,
            clip.context_length,
            layout,
            autocast=AUTOCAST[job.backend.precision],
            checkpointing=job.model.grad_checkpointing,
        )
        inputs = layout.pairs * (3 * height * width + 4 * clip.context_length) * (2 if recorded else 1)
        m = estimate.memory(clip.model, parts, layout, inputs=inputs, loss=loss, gathered=_gathered(job))
        much = ", more than it has" if m.peak / 2**30 > self.gpu.gib else ""
        text = (
            f"about {_gib(m.peak)} GiB at the peak, of the {self.gpu.gib:.0f} of a GPU{much}\n"
            f"weights {_gib(m.weights)}, gradients {_gib(m.gradients)}, optimizer {_gib(m.optimizer)}, activations "
            f"{_gib(m.activations)}, loss {_gib(m.loss)}{'' if m.loss else f' ({_gib(loss)} just before)'}\n"
        )
        if m.activations and not m.gradients:
            text += "gradients come as activations go, and take nothing where the backward begins\n"
        text += "torch reserves up to a tenth more, and CUDA and NCCL take their own"
        if clip.report.kept and job.model.grad_checkpointing:
            text += f"\n{', '.join(clip.report.kept)}: counted as without gradient checkpointing"
        return text

    def _time(self, clip: ClipModel, layout: estimate.Layout, flops: float, recorded: bool) -> str:
        b = self.job.backend
        peak = next((peak for key, peak in PEAK_FLOPS.items() if key in self.gpu.name), None)
        unknown = (
            (peak is None, f"the peak of a {self.gpu.name} is not known"),
            (b.precision is Precision.fp32, "no step in fp32 was measured"),
            (b.recipe.value not in estimate.MEASURED, f"no step by {b.recipe.value} was measured"),
            (
                estimate.widest(clip.model) < estimate.WIDTHS[0],
                f"no model was measured whose blocks are narrower than {estimate.WIDTHS[0]}",
            ),
            (
                bool(clip.report.kept),
                f"no model was measured whose {' and '.join(clip.report.kept)} has blocks of its own",
            ),
        )
        for is_so, why in unknown:
            if is_so:
                return f"not predicted: {why}"
        share = estimate.utilization(clip.model, b.recipe.value)
        seconds = estimate.step_seconds(
            flops,
            layout,
            peak=peak or 1,
            utilization=share,
            checkpointing=self.job.model.grad_checkpointing,
            features=int(clip.config["embed_dim"]),
        )
        hours = seconds * self.job.steps / 3600
        text = (
            f"about {_hours(hours)} on {self.world:,} × {self.gpu.name}{' (assumed)' if self.gpu.assumed else ''}, "
            f"{hours * self.world:,.1f} GPU hours\n"
            f"{1e3 * seconds:,.0f} ms a step, {self.job.batch_size / seconds:,.0f} pairs/s: {100 * share:.0f} % of the "
            "16-bit peak, as measured on an H100\n"
            "on top come what GPUs send each other (docs/scaling.md), evaluations, and waits for data"
        )
        if not recorded:
            text += "\nwithout a CUDA graph the host may be the limit: twice as long was seen (docs/distributed.md)"
        return text


def _gpu(device: Device) -> Gpu:
    if device is not Device.cpu and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Gpu(properties.name, properties.total_memory / 2**30, assumed=False)
    return Gpu("NVIDIA H100 80GB HBM3", 79.1, assumed=True)


def _gathered(job: TrainJob) -> int:
    """Bytes of each number of a block's matrix that FSDP keeps while it is whole."""
    if job.backend.recipe is Recipe.bf16:
        autocast = AUTOCAST[job.backend.precision]
        return estimate.FP32 if autocast is None else autocast.itemsize
    travels = get_recipe(job.backend.recipe.value).weight_dtype
    return estimate.FP32 + (0 if travels is None else travels.itemsize)


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}" if size >= 0.1 * 2**30 else f"{size / 2**30:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"

"""How a training step should scale to many GPUs, on paper: what is computed, what is sent, what of it can be hidden.

scaling.py                        rewrites the tables of docs/scaling.md
scaling.py --check                only says whether they are what this computes
scaling.py --model ViT-H-14 --column switchback --strategy hsdp --gpus 64 512 --network 25

The step of one GPU is measured (docs/benchmarks/step_*.json); the rest follows from sizes and from the speeds below.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- {part}: made by scripts/scaling.py -->", "<!-- end -->"
MEASURED = {"ViT-B-16": "step_vit_b_16_h100", "ViT-L-14": "step_vit_l_h100", "ViT-H-14": "step_vit_h_h100"}
COLUMNS, STRATEGIES, GPUS = ("bf16", "switchback"), ("ddp", "fsdp", "hsdp"), (8, 64, 256, 1024)


@dataclass(frozen=True)
class Cluster:
    """Speeds that collectives reach; the defaults are some four fifths of what an H100 node of 8 is sold with."""

    per_node: int = 8
    nvlink: float = 360.0
    """GB/s of a GPU to others of its node, each way."""
    network: float = 40.0
    """GB/s of a GPU to other nodes, each way."""
    latency: float = 30.0
    """Microseconds of a collective within a node; each doubling of nodes adds as much."""

    def bus(self, gpus: int) -> float:
        """Bytes a second at which a ring over all GPUs turns: all GPUs of a node send out side by side."""
        return 1e9 * (self.nvlink if gpus <= self.per_node else min(self.nvlink, self.per_node * self.network))

    def wait(self, gpus: int) -> float:
        """Seconds that a collective takes however little it sends."""
        return 1e-6 * self.latency * (1 + math.log2(max(1, gpus / self.per_node)))


@dataclass(frozen=True)
class Model:
    """Sizes of a CLIP of two transformers."""

    parameters: int
    blocks: int
    features: int
    """Numbers in a feature."""


def model_of(name: str) -> Model:
    """Sizes by OpenCLIP's configuration: 12 w² + 13 w parameters a block, embeddings, norms and projections."""
    config: Any = open_clip.get_model_config(name)
    vision, text, out = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    w, patch, layers = vision["width"], vision["patch_size"], vision["layers"]
    tokens = (vision["image_size"] // patch) ** 2 + 1
    image = 3 * patch**2 * w + w + tokens * w + 4 * w + w * out + layers * (12 * w**2 + 13 * w)
    w, depth = text["width"], text["layers"]
    words = text["vocab_size"] * w + text["context_length"] * w + 2 * w + w * out + depth * (12 * w**2 + 13 * w)
    return Model(image + words + 1, layers + depth, out)


@dataclass(frozen=True)
class Step:
    """Seconds of a step on each of many GPUs."""

    alone: float
    """What one GPU by itself takes."""
    hideable: float
    """Of weights and gradients on their way, while the GPU computes."""
    bare: float
    """Of features on their way, and of the larger loss."""

    @property
    def best(self) -> float:
        """Efficiency where all that can be hidden is: none of it, as long as it takes less than computing."""
        return self.alone / (max(self.alone, self.hideable) + self.bare)

    @property
    def worst(self) -> float:
        return self.alone / (self.alone + self.hideable + self.bare)


def weights_and_gradients(
    model: Model, strategy: str, gpus: int, cluster: Cluster, weight_bytes: float
) -> tuple[float, float]:
    """Bytes that a GPU sends in a step, and seconds: gradients are fp32; weights are gathered forward and backward."""
    share, P = (gpus - 1) / gpus, model.parameters
    if strategy == "ddp" or gpus == 1:
        sent = 2 * share * 4 * P
        return sent, sent / cluster.bus(gpus) + math.ceil(4 * P / 25e6) * cluster.wait(gpus)
    if strategy == "fsdp":
        sent = share * P * (2 * weight_bytes + 4)
        return sent, sent / cluster.bus(gpus) + 3 * model.blocks * cluster.wait(gpus)
    inside, nodes = (cluster.per_node - 1) / cluster.per_node, gpus / cluster.per_node
    sent = inside * P * (2 * weight_bytes + 4)
    out = 2 * (nodes - 1) / nodes * 4 * P / cluster.per_node
    seconds = sent / cluster.bus(cluster.per_node) + out / (1e9 * cluster.network)
    return sent + out, seconds + model.blocks * (3 * cluster.wait(cluster.per_node) + cluster.wait(gpus))


def predict(
    model: Model, strategy: str, gpus: int, pairs: int, alone: float, cluster: Cluster, weight_bytes: float
) -> Step:
    """A step of `pairs` on each GPU, of which one by itself takes `alone` seconds.

    The loss gathers the fp32 features of all texts, and sums their gradients; its four products are of pairs × all
    pairs × features.
    """
    sent = 2 * (gpus - 1) * pairs * model.features * 4
    products = 4 * 2 * pairs * pairs * (gpus - 1) * model.features
    bare = sent / cluster.bus(gpus) + 3 * cluster.wait(gpus) + products / loss_speed()
    return Step(alone, weights_and_gradients(model, strategy, gpus, cluster, weight_bytes)[1], bare)


@functools.cache
def loss_speed() -> float:
    """Operations a second of the loss as measured at most pairs, by its four products alone."""
    results = json.loads((ROOT / "docs" / "benchmarks" / "loss_h100.json").read_text())["results"]
    pairs = max(map(int, results["pairs"]))
    milliseconds = results["pairs"][str(pairs)]["columns"]["tiles of 2^24"]["ms"]
    return 4 * 2 * pairs**2 * results["width"] / (milliseconds / 1e3)


def measured(name: str, column: str) -> tuple[float, int]:
    """Seconds of a step on one GPU, and its pairs."""
    results = json.loads((ROOT / "docs" / "benchmarks" / f"{MEASURED[name]}.json").read_text())["results"]
    found = results["columns"][column]
    return (found["graph_step_ms"] or found["step_ms"]) / 1e3, results["settings"]["batch"]


def weight_bytes(column: str, fp32: bool) -> float:
    """Bytes of a weight on its way: 16 bits in bf16, 8 in low precision, or fp32 where it has a scale for each row."""
    return 4.0 if fp32 else 2.0 if column == "bf16" else 1.0


def row(name: str, column: str, strategy: str, gpus: Sequence[int], cluster: Cluster, fp32: bool) -> str:
    model, (alone, pairs) = model_of(name), measured(name, column)
    size = weight_bytes(column, fp32)
    cells = []
    for n in gpus:
        step = predict(model, strategy, n, pairs, alone, cluster, size)
        cells.append(f"{100 * step.worst:.0f}–{100 * step.best:.0f} %")
    sent = weights_and_gradients(model, strategy, gpus[-1], cluster, size)[0]
    kind = f"{strategy}, fp32 gathers" if fp32 else strategy
    return f"| {name} | {column} | {kind} | {1e3 * alone:.0f} ms | {sent / 1e9:.1f} GB | {' | '.join(cells)} |"


def table(rows: Sequence[tuple[str, str, str, bool]], gpus: Sequence[int], cluster: Cluster) -> str:
    head = "| model | backend | parallel | one GPU | sent a step | " + " | ".join(f"{n} GPUs" for n in gpus) + " |"
    lines = [row(name, column, strategy, gpus, cluster, fp32) for name, column, strategy, fp32 in rows]
    return "\n".join([head, "|---" * (5 + len(gpus)) + "|", *lines])


def page_rows() -> list[tuple[str, str, str, bool]]:
    rows = [(m, c, s, False) for m in MEASURED for c in COLUMNS for s in STRATEGIES if s == "ddp" or m == "ViT-H-14"]
    return rows + [("ViT-H-14", "switchback", s, True) for s in ("fsdp", "hsdp")]


def rewritten(text: str) -> str:
    """The page with its tables as they are computed now."""
    parts = {"fast": Cluster(), "slow": Cluster(network=10.0)}
    for part, cluster in parts.items():
        before, begin, rest = text.partition(BEGIN.format(part=part))
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{PAGE.name} has no place for the table {part!r}")
        text = f"{before}{begin}\n{table(page_rows(), GPUS, cluster)}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", choices=list(MEASURED))
    parser.add_argument("--column", choices=COLUMNS, default="switchback", help="as measured")
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp")
    parser.add_argument("--fp32-gathers", action="store_true", help="low-precision weights have a scale for each row")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--network", type=float, default=40.0, help="GB/s of a GPU to other nodes")
    parser.add_argument("--nvlink", type=float, default=360.0, help="GB/s of a GPU to others of its node")
    args = parser.parse_args()
    if args.model:
        chosen = [(args.model, args.column, args.strategy, args.fp32_gathers)]
        print(table(chosen, args.gpus, Cluster(network=args.network, nvlink=args.nvlink)))
        return 0
    text = PAGE.read_text(encoding="utf-8")
    new = rewritten(text)
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    return int(args.check and new != text)


if __name__ == "__main__":
    raise SystemExit(main())

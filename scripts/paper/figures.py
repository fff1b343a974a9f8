"""Every figure: what it is made of, and what the paper found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paper import noise, precision, speed, spikes
from paper.grid import Grid, Options
from paper.panels import Records


@dataclass(frozen=True)
class Figure:
    """A figure is drawn from the runs of a grid, or measures by itself."""

    title: str
    paper: str
    """What the paper found."""
    grid: Grid | None = None
    draw: Callable[[Records], dict[str, Any]] | None = None
    """From the grid's records: `panels`, `table` and `here` (`clipq.report.figure`)."""
    measure: Callable[[Options], dict[str, Any]] | None = None
    """The same, without a grid."""


FIGURES = {
    "fig1": Figure(
        title="Zero-shot accuracy by recipe and model size",
        paper="SwitchBack stays within 0.1 points of bf16 at ViT-H, in int8 and in fp8. LLM.int8() loses 5.9 points "
        "there, and less with smaller models; fp8 with one scale for each tensor diverges at ViT-H.",
        grid=precision.PRECISION,
        draw=precision.accuracy,
    ),
    "fig2": Figure(
        title="Training loss by recipe",
        paper="The losses of SwitchBack and bf16 lie on each other; that of LLM.int8() lies above, and that of fp8 "
        "with one scale for each tensor leaves them at ViT-H.",
        grid=precision.PRECISION,
        draw=precision.losses,
    ),
    "fig3": Figure(
        title="Time inside one linear layer",
        paper="On an A100 quantizing takes a minor share of a layer's time, and the gain of a layer grows with its "
        "width and with the number of tokens.",
        measure=speed.layer,
    ),
    "fig4": Figure(
        title="Speed of a training step over bf16",
        paper="13 to 25 % end to end on A100s, growing from ViT-B to ViT-H.",
        measure=speed.steps,
    ),
    "fig5": Figure(
        title="What rescues fp8 with one scale a tensor",
        paper="At ViT-H it diverges. Clipping the gradient's norm at 1, or layer norm on queries and keys, does not "
        "rescue it; layer scale from zero does, and keeps the magnitudes of features from growing with depth.",
        grid=precision.RESCUE,
        draw=precision.rescue,
    ),
    "fig6": Figure(
        title="Loss spikes by model size, batch size and learning rate",
        paper="Spikes grow more frequent with each of the three, and less frequent with a lower β2.",
        grid=spikes.FREQUENCY,
        draw=spikes.frequency,
    ),
    "fig7": Figure(
        title="RMS_t rises before the loss does",
        paper="Loss spikes come 1 to 8 steps after RMS_t of the patch embedding has risen; by chance about 1 % of them "
        "would.",
        grid=spikes.LEAD,
        draw=spikes.leads,
    ),
    "fig8": Figure(
        title="Optimizers over β2: accuracy and loss spikes",
        paper="StableAdamW has no spikes, and ends more accurate than AdamW with its gradient clipped or with a lower "
        "β2.",
        grid=spikes.OPTIMIZER,
        draw=spikes.optimizers,
    ),
    "fig9": Figure(
        title="Quantization noise of a product by its inner dimension",
        paper="The variance of a product of quantized vectors grows linearly with their length. That of a weight "
        "gradient is 13 to 51 times the others' in ViT-H, which is why SwitchBack computes it in 16 bits.",
        measure=noise.noise,
    ),
    "fig10": Figure(
        title="Formats and granularities",
        paper="No figure of the paper: real fp8 beside simulated, row-wise beside tensor-wise scales, and the weight "
        "gradient in int8 with stochastic rounding.",
        grid=precision.FORMAT,
        draw=precision.formats,
    ),
    "fig11": Figure(
        title="Accuracy against time and energy",
        paper="No figure of the paper: what a user decides by.",
        grid=precision.PAYING,
        draw=precision.cost,
    ),
}

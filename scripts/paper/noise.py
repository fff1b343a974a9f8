"""The error of a weight gradient whose operands are quantized, against its inner dimension: measured and derived.

One number of dW = Gᵀ X is p = Σ g_k x_k over b rows (images × tokens). Quantization puts g_k + e_k and x_k + d_k in
their places, so that p is off by

    Σ (g_k d_k + x_k e_k + e_k d_k).

Take the data as given. If each error has mean 0 and they are independent, of each other in a row and between rows,
then no two terms are correlated, and the variance of the sum is that of its terms:

    Σ (g_k² D_k + x_k² E_k + E_k D_k),    D_k and E_k: variances of d_k and e_k

which is b · (mean of the bracket): linear in b as long as the scales do not depend on b. With absmax scales the steps
grow with the largest magnitude among b rows, and the variance with their squares.

Let s be the distance of the two representable values around x_k, in x's units: for int8 the scale itself; for fp8 it
doubles from one binade to the next, so it is a value's own. Rounding to nearest leaves an error within ±s/2; taken for
uniform there, its variance is s²/12 (0 for an x_k of exactly 0). That is an assumption, which fails where values do not
spread over several steps: of those within ±s/2 of zero each becomes 0, the error is the value itself, neither of that
size nor independent of the value. Stochastic rounding of a value that is a share f of the way up goes up with
probability f: its error has mean 0 and variance s² f(1 - f), s²/6 on average where f is uniform. Its draws are
independent, so that the line holds for any data.

What is measured over what is derived is therefore the product of two factors that say why they differ:

    size = Σ (g_k² d_k² + x_k² e_k² + e_k² d_k²) / derived    whether errors are as large as derived
    correlation = measured / Σ (g_k² d_k² + …)                whether they are independent

All are means over pairs of a column of G with one of X. Variances are given in units of the mean of g_k² x_k², in which
independent data have Var(p) = b: layers, and data of other magnitudes, can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipq.lowp.products import quantize, quantize_transposed
from clipq.lowp.recipe import Operand
from clipq.train.kept import newest
from paper.grid import Grid, GridError, Options, folder_of, jobs_of, run_grid
from paper.noise_findings import findings
from paper.noise_panels import panels, table
from paper.precision import PRECISION
from paper.rounding import KINDS, Kind, largest, rounded
from paper.rows import Rows, gaussian_rows, training_rows

WEIGHTS = {"paper": "Large, bf16", "small": "S, bf16", "tiny": "Mi, bf16"}
MODEL = Grid(
    experiment=PRECISION.experiment,
    arms={scale: {arm: PRECISION.arms[scale][arm]} for scale, arm in WEIGHTS.items()},
    seeds=dict.fromkeys(WEIGHTS, 1),
)
"""A run of figure 1."""
STUDY: dict[str, dict[str, int]] = {"paper": {}, "small": {}, "tiny": {"rows": 2048, "columns": 16, "stretches": 2}}
CHUNK = 128
"""Blocks of rows that are quantized at a time."""


class Errors(NamedTuple):
    """Of blocks of rows, each with a product of its own."""

    errors: Tensor
    """[blocks, c, c] of Gᵀ X, float64."""
    derived: Tensor
    """[blocks] variance, mean over pairs."""
    squared: Tensor
    """[blocks] the same sum of the errors' own squares."""


def block_products(g_bc: Tensor, x_bc: Tensor, block: int) -> Tensor:
    """Gᵀ X of each block of rows, float64 [blocks, c, c]."""
    g, x = (t.double().unflatten(0, (-1, block)) for t in (g_bc, x_bc))
    return g.mT @ x


def compare(rows: Rows, exact: Tensor, part: slice, kind: Kind, stochastic: bool) -> Errors:
    """Errors of each block of rows in `part`, with the scales of these rows.

    Args:
        exact: of `block_products`, of all rows.
    """
    block, found = len(rows.x_bc) // len(exact), []
    amax = largest(rows.g_bc[part], rows.g_max_b[part], kind.g), largest(rows.x_bc[part], rows.x_max_b[part], kind.x)
    for start in range(part.start, part.stop, CHUNK * block):
        chunk = slice(start, min(start + CHUNK * block, part.stop))
        g, x = rows.g_bc[chunk], rows.x_bc[chunk]
        seeds = torch.randint(2**31, (2,), device=g.device) if stochastic else (None, None)
        g_hat, x_hat = rounded(g, amax[0], kind.g.dtype, seeds[0]), rounded(x, amax[1], kind.x.dtype, seeds[1])
        g, x = g.double(), x.double()
        # Means over pairs of products are products of means over columns.
        squares = [t.square().mean(1) for t in (g, x, g_hat.values - g, x_hat.values - x)]
        sums = [
            (squares[0] * vx + squares[1] * vg + vg * vx).unflatten(0, (-1, block)).sum(1)
            for vg, vx in ((g_hat.variances.mean(1), x_hat.variances.mean(1)), squares[2:])
        ]
        error = block_products(g_hat.values, x_hat.values, block)
        error -= exact[chunk.start // block : chunk.stop // block]
        found.append(Errors(error, *sums))
    return Errors(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def measure(rows: Rows, *, block: int, stretches: int) -> dict[str, Any]:
    """What one layer's rows say, as numbers: of the exact product, and of each kind of quantization.

    Args:
        block: the smallest inner dimension; the others are it doubled, up to all rows.
        stretches: how many disjoint ones are measured, where so many fit, with scales of their own.
    """
    total = len(rows.x_bc)
    sizes = [block << n for n in range((total // block).bit_length()) if total % (block << n) == 0]
    exact = block_products(rows.g_bc, rows.x_bc, block)
    term = float((rows.g_bc.double().square().mean(1) * rows.x_bc.double().square().mean(1)).mean())
    found: dict[str, Any] = {"layer": rows.name, "shape": list(rows.shape), "sizes": sizes, "kinds": {}}
    for name, kind in KINDS.items():
        for stochastic in (False, True):
            own = _own_scales(rows, exact, term, kind, stochastic, sizes, stretches)
            fixed = _fixed_scales(rows, exact, term, kind, stochastic, sizes)
            found["kinds"][f"{name}, {'stochastic' if stochastic else 'nearest'}"] = own | fixed
        found["kinds"][f"{name}, nearest"] |= _lost(rows, kind) | _other_products(rows, kind)
    return found


def _grouped(blocks: Tensor, count: int) -> Tensor:
    """Sums over so many blocks that follow each other."""
    return blocks.unflatten(0, (-1, count)).sum(1)


def _own_scales(
    rows: Rows, exact: Tensor, term: float, kind: Kind, stochastic: bool, sizes: list[int], stretches: int
) -> dict[str, list[list[float]]]:
    """Stretches with the scales of their own rows: for each size, a number for each.

    Where fewer fit than are asked for, stochastic rounding draws anew for the same ones: one draw of a sum in which few
    columns have most of the square is off by a third.

    `relative` is the error's root mean square over the product's; `kept` is how much of the product the quantized one
    has: 1, where errors are not correlated with what they are errors of.
    """
    names = ("measured", "derived", "squared", "relative", "kept")
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    block = sizes[0]
    for size in sizes:
        numbers = []
        fit = len(rows.x_bc) // size
        for n in range(stretches if stochastic else min(stretches, fit)):
            part = slice(n % fit * size, (n % fit + 1) * size)
            errors = compare(rows, exact, part, kind, stochastic)
            error, product = errors.errors.sum(0), exact[part.start // block : part.stop // block].sum(0)
            square, overlap = float(product.square().mean()), float((error * product).mean())
            measured, sums = float(error.square().mean()), [float(t.sum()) / term for t in errors[1:]]
            of_product = ((measured / square) ** 0.5, 1 + overlap / square) if square else (0.0, 1.0)
            numbers.append((measured / term, *sums, *of_product))
        for name, values in zip(names, zip(*numbers, strict=True), strict=True):
            found[name].append(list(values))
    return found


def _fixed_scales(
    rows: Rows, exact: Tensor, term: float, kind: Kind, stochastic: bool, sizes: list[int]
) -> dict[str, list[float]]:
    """With the scales of all rows at every size, over all disjoint stretches of it."""
    total = len(rows.x_bc)
    errors = compare(rows, exact, slice(0, total), kind, stochastic)
    measured = [float(_grouped(errors.errors, size // sizes[0]).square().mean()) / term for size in sizes]
    derived = float(errors.derived.sum()) / total / term
    return {"fixed_measured": measured, "fixed_derived": [size * derived for size in sizes]}


def _lost(rows: Rows, kind: Kind) -> dict[str, list[float]]:
    """Shares of the values of G and of X, other than zeros, that become 0 with the scales of all rows, to nearest."""
    amax = largest(rows.g_bc, rows.g_max_b, kind.g), largest(rows.x_bc, rows.x_max_b, kind.x)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for parts in zip(rows.g_bc.split(2**15), rows.x_bc.split(2**15), strict=True):
        for n, (t, largest_c, operand) in enumerate(zip(parts, amax, (kind.g, kind.x), strict=True)):
            lost = (rounded(t, largest_c, operand.dtype, None).values == 0) & (t != 0)
            counts[n] += torch.tensor([int(lost.sum()), int((t != 0).sum())])
    return {"lost": [int(n) / max(1, int(there)) for n, there in counts]}


def _other_products(rows: Rows, kind: Kind) -> dict[str, float]:
    """Relative errors of Y = X Wᵀ and dX = G W of the same layer, rounded to nearest, of the rows kept whole."""
    assert rows.whole is not None
    assert rows.weight_mn is not None
    (g, x), weight = rows.whole, rows.weight_mn
    of_weight = Operand(kind.x.dtype, kind.x.scales)
    products = {
        "output": (x, weight.T, quantize(x, kind.x), quantize(weight, of_weight)),
        "grad_input": (g, weight, quantize(g, kind.g), quantize_transposed(weight, of_weight)),
    }
    found = {}
    for name, (left, right, q_left, q_right) in products.items():
        exact = left.double() @ right.double()
        l_hat, r_hat = (q.q.double() * q.scale.double().reshape(-1, 1) for q in (q_left, q_right))
        found[name] = float((l_hat @ r_hat.T - exact).norm() / exact.norm())
    return found


def study(
    source: Path | Sequence[str],
    changes: Sequence[str] = (),
    *,
    rows: int = 262144,
    columns: int = 64,
    block: int = 256,
    stretches: int = 4,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the error of dW in layers of a model, and of Gaussian data of the shape of one of them.

    Args:
        source: the folder of a trained run, or settings of clipq-train for a model at its start.
        changes: settings that differ from those of the run, such as `data.root=…`.
        rows: the largest inner dimension.
        columns: of G and of X; all pairs of them are measured.
        block, stretches: as of `measure`.
        seed: decides columns, Gaussian data and stochastic rounding; the run has its own.

    Returns:
        {"panels", "table", "here", "settings", "measured"}: panels to draw, a table, sentences with what was found,
        what it was found with, and the numbers of each layer as of `measure`.
    """
    start, device = time.monotonic(), torch.device(device)
    found, facts = training_rows(source, changes, rows=rows, columns=columns, seed=seed, device=device)
    control = gaussian_rows(rows, found[0].shape, columns, seed, device)
    torch.manual_seed(seed)
    with torch.no_grad():
        # a layer scale of 0 at the start keeps gradients from all that is before it
        real = [measure(layer, block=block, stretches=stretches) for layer in found if layer.g_bc.any()]
        gaussian = measure(control, block=block, stretches=stretches)
    settings = {"rows": rows, "columns": columns, "block": block, "stretches": stretches, "seed": seed, **facts}
    return {
        "panels": panels(real, gaussian),
        "table": table(real, gaussian),
        "here": findings(real, gaussian, settings),
        "settings": settings | {"device": str(device), "seconds": round(time.monotonic() - start, 1)},
        "measured": {"real": real, "gaussian": gaussian},
    }


def noise(options: Options) -> dict[str, Any]:
    """Figure 9: the study of the run that is named, or of one of figure 1, which is trained where it is not there yet.

    Raises:
        GridError: the run has failed, or there is its record only, without weights.
    """
    folder = options.run
    if folder is None:
        run_grid(MODEL, options)
        folder = folder_of(MODEL, options) / jobs_of(MODEL, options)[0].name
    if newest(folder / "checkpoints") is None:
        gone = "" if options.run else ": remove its record, and it is trained again"
        raise GridError(f"{folder} has no checkpoint{gone}")
    changes = options.overrides if options.run else ()
    found = study(folder, changes, device="cuda" if torch.cuda.is_available() else "cpu", **STUDY[options.scale])  # pyright: ignore[reportArgumentType]
    del found["measured"]  # megabytes, of which table and panels are made
    return found

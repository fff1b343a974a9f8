"""Converts the linear layers of any model to a low-precision recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipq.kernels import implementation
from clipq.lowp.block import fuse
from clipq.lowp.linear import LowpLinear
from clipq.lowp.products import quantize_weight
from clipq.lowp.recipe import LinearRecipe, get_recipe


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did."""

    recipe: str
    """Name of the recipe."""
    implementation: str
    """What computes the products: "triton (TMA)", "triton", "reference" (on a CPU) or "simulated"."""
    converted: list[str] = field(default_factory=list)
    """Names of the layers that now follow the recipe."""
    fused: list[str] = field(default_factory=list)
    """Names of the blocks whose norms and activations quantize their own output."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name of a linear layer that was left as it is, or of a block that was not fused -> why."""

    def lines(self) -> list[str]:
        """A summary for a console: counts, and each reason once."""
        counts = f"{len(self.converted)} linear layers, {len(self.fused)} blocks fused"
        lines = [f"{self.recipe}: {counts} ({self.implementation})"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not converted: {names[0]}{more}: {why}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def convert_linears(
    model: nn.Module,
    recipe: str | LinearRecipe,
    *,
    filter: Callable[[str, nn.Linear], bool | str] | None = None,
) -> ConversionReport:
    """Turns the linear layers of a model into low-precision ones, in place; its state dict stays as it is.

    Call it after the model is on its device and before it is compiled or wrapped.

    Args:
        recipe: a name in `clipq.lowp.RECIPES` or a recipe of your own. "bf16" converts nothing.
        filter: gets name and layer, and returns whether to convert it; a text leaves it as it is and says in the report
            why. The paper converts only the layers inside of transformer blocks: leave out heads and embeddings.

    Returns:
        What was converted and what was not, and why.

    Raises:
        ValueError: unknown recipe.
        RuntimeError: the model's device cannot compute with the recipe's types.
    """
    recipe = get_recipe(recipe)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    report = ConversionReport(recipe.name, _implementation(recipe, device))
    if recipe.output is None:
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LowpLinear))
        report.kept.update({name: f"it follows recipe {layer.recipe.name} already" for name, layer in layers})
        return report
    attention = {
        f"{name}.out_proj".lstrip(".") for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    }
    first: dict[nn.Module, str] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, nn.Linear):
            continue
        if first.setdefault(layer, name) != name:
            report.kept[name] = f"it is the same module as {first[layer]}"
            continue
        why = _obstacle(name, layer, attention, filter)
        if why is None:
            report.converted.append(name)
        else:
            report.kept[name] = why
    for name in report.converted:  # after all were asked for: a filter that fails changes nothing
        LowpLinear.from_linear(model.get_submodule(name), recipe)  # pyright: ignore[reportArgumentType]
    for name, block in list(model.named_modules()):
        _leave_fast_path(block)
        if getattr(block, "fused", ...) is None and hasattr(block, "pairs"):  # one of clipq's blocks, not fused yet
            why = fuse(block)
            if why is None:
                report.fused.append(name)
            else:
                report.kept[name] = f"not fused, {why}"
    return report


def _leave_fast_path(module: nn.Module) -> None:
    """Evaluating, torch's encoders would hand weights to a kernel of their own, in 16 bits, and make nested tensors for
    it."""
    if not any(isinstance(m, LowpLinear) for m in module.modules()):
        return
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0


def _implementation(recipe: LinearRecipe, device: torch.device) -> str:
    if recipe.simulated:
        if device.type != "cuda":  # any CUDA GPU multiplies in 16 bits
            implementation(device)
        return "simulated"
    return ", ".join(sorted({implementation(device, dtype) for dtype in recipe.dtypes})) or "16 bits"


def _obstacle(
    name: str, layer: nn.Linear, attention: set[str], filter: Callable[[str, nn.Linear], bool | str] | None
) -> str | None:
    if name in attention:
        return "nn.MultiheadAttention reads the weights itself and never calls the layer"
    if isinstance(layer, LowpLinear):
        return f"it follows recipe {layer.recipe.name} already"
    if "forward" in layer.__dict__:
        return "its forward was replaced by another, which would not know of the recipe"
    if type(layer) is not nn.Linear:
        return f"it is a subclass of nn.Linear ({type(layer).__name__})"
    wanted = True if filter is None else filter(name, layer)
    if isinstance(wanted, str):
        return wanted
    return None if wanted else "the filter leaves it out"


def _replaced(before: Tensor, now: Tensor) -> bool:
    """Whether another parameter is in the place of one, but for shards of FSDP, which come and go."""
    return now is not before and not any(hasattr(p, "full_tensor") for p in (before, now))


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantizes the weights of a model's low-precision layers once for all forwards inside of the block: now, or, of
    layers that FSDP has sharded, in their first forward.

    Put the micro-steps of one optimizer step into it. Without it each forward quantizes its weights, which is always
    right. Inside, weights that `torch.func.functional_call` puts in their place, or that are written through `.data`,
    are not seen.

    Raises:
        RuntimeError: a weight was changed inside of the block, so that later forwards used an old one.
    """
    layers = {
        name: m
        for name, m in model.named_modules()
        # a weight that pruning or weight norm computes in each forward is no parameter, and new each time
        if isinstance(m, LowpLinear) and "weight" in m._parameters
    }
    # FSDP puts a whole weight in place of its shard, and back: what is compared is one and the same tensor
    weights = {name: (layer.weight, layer.weight._version) for name, layer in layers.items()}
    stepped: set[int] = set()  # fused optimizers leave the version as it is
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: stepped.update(
            id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )
    )
    before = {name: (layer._held, layer._holding) for name, layer in layers.items()}
    for layer in layers.values():
        layer._holding = True
        if layer._held is None and not hasattr(layer.weight, "full_tensor"):
            layer._held = quantize_weight(layer.weight.detach(), layer.recipe)
        # what FSDP has sharded is whole in the first forward, and is quantized and held there
    try:
        yield
    finally:
        hook.remove()
        for name, layer in layers.items():
            layer._held, layer._holding = before[name]
    changed = [
        name
        for name, (w, version) in weights.items()
        if w._version != version or id(w) in stepped or _replaced(w, layers[name].weight)
    ]
    if changed:
        raise RuntimeError(
            f"{changed[0]}.weight (and {len(changed) - 1} more) changed inside of quantized_once: end the block before "
            "the optimizer steps"
        )

"""How far each layer in low precision is from the exact product, on a few pairs of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq.lowp.linear import LowpLinear
from clipq.model.block import Block
from clipq.model.surgery import blocks
from clipq.optim.shards import whole

PAIRS = 8


@torch.no_grad()
def quantization_errors(model: nn.Module, image_BCHW: Tensor, text_BL: Tensor) -> dict[str, float]:
    """|y - exact| / |exact| of the output y of every `LowpLinear`, in 2-norms over the first 8 pairs.

    Exact is the float32 product of the layer's own input, which comes from quantized layers before it. To be called
    within autocast as the model is trained; weights, gradients and random generators stay as they are.

    Args:
        model: the bare model; its blocks may be compiled.
        image_BCHW: normalized.
        text_BL: tokens.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowpLinear)}
    if not layers:
        return {}
    weights = {name: layer.weight for name, layer in layers.items()}  # FSDP may give a layer its weight in 8 bits
    errors: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(layer: LowpLinear, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            x = inputs[0]
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = whole(weights[name]).float(), layer.bias
                exact = F.linear(x.float(), weight, None if bias is None else bias.float())
            errors[name] = (y.float() - exact).norm() / exact.norm()

        return hook

    # Fused and compiled blocks go past the layers' own calls, where hooks are.
    changed = [(b, b.fused, b.__dict__.pop("forward", None)) for _, b in blocks(model) if isinstance(b, Block)]
    for block, *_ in changed:
        block.fused = None
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    training = [m for m in model.modules() if m.training]
    model.eval()  # patch dropout would draw random numbers
    try:
        model(image_BCHW[:PAIRS], text_BL[:PAIRS])
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
        for block, fused, forward in changed:
            block.fused = fused
            if forward is not None:
                block.forward = forward
    return dict(zip(errors, torch.stack(list(errors.values())).tolist(), strict=True)) if errors else {}

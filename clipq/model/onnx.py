"""The towers of a model as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tower(nn.Module):
    """[B, 3, H, W] normalised images, or [B, L] tokens -> [B, D] features of unit norm."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(getattr(self.model, self.method)(x), dim=-1)


def export_towers(model: nn.Module, examples: dict[str, Tensor], folder: Path) -> dict[str, float]:
    """Writes `image.onnx` and `text.onnx`, the batch of any size, and runs them.

    Args:
        model: on the CPU, in eval mode.
        examples: "image" and "text" -> some input.

    Returns:
        The largest difference of a feature from torch's, by tower.

    Raises:
        ModuleNotFoundError: onnxscript or onnxruntime is not installed.
    """
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx needs it, and says so less clearly)

    errors = {}
    for name, x in examples.items():
        tower, path = Tower(model, f"encode_{name}").eval(), folder / f"{name}.onnx"
        batch: Any = torch.export.Dim("batch", min=1, max=65536)
        with torch.no_grad():
            torch.onnx.export(
                tower,
                (x,),
                path,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            errors[name] = 0.0
            for some in (x, x[:1]):
                (found,) = session.run(None, {name: some.numpy()})
                errors[name] = max(errors[name], float((torch.from_numpy(found) - tower(some)).abs().max()))
    return errors

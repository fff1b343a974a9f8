"""clipq-export: a checkpoint as a folder that OpenCLIP and the Hugging Face hub know, packed in 8 bits, or as ONNX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipq.cli.arguments import Parser, fail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clipq.model.clip import ClipModel

EXAMPLE = """\
examples:
  clipq-export runs/my_run exported                      for open_clip.create_model("local-dir:exported"), and as
                                                         the Hugging Face hub wants it
  clipq-export runs/my_run small --weights int8          a quarter of the size; clipq-eval checkpoint=small reads it
  clipq-export runs/my_run exported --onnx               image.onnx and text.onnx beside it (pip install "clipq[onnx]")
  clipq-export epoch_32.pt exported --model ViT-B-32     weights of OpenCLIP's trainer

Everything that is written is read again and compared with the model before the command says that it is done.
"""
WEIGHTS = ("fp32", "bf16", "fp16", "int8")
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3, "int8": 1e-1, "onnx": 1e-3}
"""Largest difference of a feature of unit norm after reading again, for random inputs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, and prints what was written.

    Returns:
        The exit status: 0; 1 where what was read back differs; 2 for wrong input (one line on stderr says how).
    """
    arguments = _parser().parse_args(argv)
    try:
        return export(arguments)
    except ModuleNotFoundError as error:
        return fail("clipq-export", f'{error}: --onnx takes pip install "clipq[onnx]"')
    except (OSError, ValueError) as error:
        return fail("clipq-export", str(error))


def export(arguments: argparse.Namespace) -> int:
    import torch

    from clipq.model.clip import create_model
    from clipq.model.packed import packed
    from clipq.model.weights import (
        CONFIG_FILE,
        HUB_FILE,
        PACKED_FILE,
        find_weights,
        preprocess_of,
        to_openclip,
        write_weights,
    )

    weights, out = find_weights(arguments.checkpoint), Path(arguments.output)
    beside = weights.parent / CONFIG_FILE
    if arguments.model is None and not beside.is_file():
        raise ValueError(f"{weights}: its architecture is not known: name it, as in --model ViT-B-32")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there, and not empty: choose another folder, or remove it")
    clip = create_model(arguments.model or str(beside), pretrained=str(weights))
    clip.model.eval()
    state, file = to_openclip(clip.model), HUB_FILE
    if arguments.weights == "int8":
        file = PACKED_FILE
        state = packed(state, matrices(clip.model))
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.weights]
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(clip.openclip_json(), encoding="utf-8")
    write_weights(state, preprocess_of(clip.model), out / file)
    inputs = examples(clip)
    errors = {arguments.weights: _read_back(clip, out, inputs, by_openclip=arguments.weights != "int8")}
    if arguments.onnx:
        from clipq.model.onnx import export_towers

        errors["onnx"] = max(export_towers(clip.model, inputs, out).values())
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size / 2**20:,.1f} MiB")
    for what, error in errors.items():
        print(f"{what}: read again, features differ by {error:.1e} at most")
    bad = [what for what, error in errors.items() if not error <= TOLERANCE[what]]
    if bad:
        print(f"clipq-export: {', '.join(bad)}: more than {TOLERANCE[bad[0]]:g}: do not use it", file=sys.stderr)
    return 1 if bad else 0


def matrices(model: nn.Module) -> set[str]:
    """OpenCLIP's keys of what the blocks multiply with."""
    from clipq.model.surgery import blocks
    from clipq.model.weights import key_map

    names = key_map(model)
    own = [f"{block}.{layer}.weight" for block, b in blocks(model) for layer in b.linears()]
    return {names.get(name, name) for name in own}


def examples(clip: ClipModel) -> dict[str, torch.Tensor]:
    """Random images and some sentences, to compare models by."""
    import torch

    size = clip.preprocess.size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    return {"image": image, "text": clip.tokenizer(["a photo of a cat", "two dogs on a beach", "red", ""])}


def _read_back(clip: ClipModel, folder: Path, inputs: dict[str, torch.Tensor], *, by_openclip: bool) -> float:
    """The largest difference of a feature, of the exported model from the one that was exported."""
    import open_clip
    import torch
    import torch.nn.functional as F

    from clipq.model.clip import create_model
    from clipq.model.weights import CONFIG_FILE

    if by_openclip:
        other = open_clip.create_model(f"local-dir:{folder.resolve()}")
    else:
        other = create_model(str(folder / CONFIG_FILE), pretrained=str(folder)).model
    other.eval()
    worst = 0.0
    with torch.no_grad():
        for name, x in inputs.items():
            ours, theirs = (F.normalize(getattr(m, f"encode_{name}")(x).float(), dim=-1) for m in (clip.model, other))
            worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="clipq-export",
        description="Writes a checkpoint in the form that others read.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, checkpoint folder or weights file")
    parser.add_argument("output", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--model", metavar="NAME", help="OpenCLIP name or JSON file, for weights without one beside them"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32", help="type of the weights (default: fp32)")
    parser.add_argument("--onnx", action="store_true", help="one ONNX file for each tower too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

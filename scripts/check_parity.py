"""Compares clipq's models with OpenCLIP's at full size: same weights, same features, both ways.

    python scripts/check_parity.py ViT-B-32 ViT-B-16 ViT-L-14 ViT-H-14

For each name: OpenCLIP's random weights are loaded into clipq's model and both towers compared; then clipq's
weights, changed, go through a `.safetensors` file into OpenCLIP's model, strictly, for a second comparison.
Holds one model of each kind and their weights once more while they are copied: for ViT-H-14 about 12 GiB of
memory, and 4 GB on the disk. Exits with 1 if features differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipq.model.clip import create_model
from clipq.model.weights import load_openclip, save_weights

TOLERANCE = 1e-5


@torch.inference_mode()
def features(model: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised features of both towers, (B, E) each."""
    out = model.eval()(image, text)
    return out["image_features"], out["text_features"]


def largest_difference(one: nn.Module, other: nn.Module, image: Tensor, text: Tensor) -> tuple[float, float]:
    """Largest absolute difference of the image and of the text features."""
    pairs = zip(features(one, image, text), features(other, image, text), strict=True)
    image_diff, text_diff = ((a - b).abs().max().item() for a, b in pairs)
    return image_diff, text_diff


def check(name: str, batch: int) -> bool:
    """Prints how far a model agrees; returns whether it does, both ways."""
    start = time.monotonic()
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, output_dict=True)
    torch.manual_seed(1)
    bundle = create_model(name)
    ours = bundle.model
    image = torch.randn(batch, 3, *bundle.preprocess.size)
    text = bundle.tokenizer([f"a photo of {n} dogs on a beach" for n in range(batch)])

    load_openclip(ours, theirs.state_dict())
    there = largest_difference(ours, theirs, image, text)

    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.01)
    changed = largest_difference(ours, theirs, image, text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(ours, path)
        theirs.load_state_dict(load_file(path), strict=True)
    back = largest_difference(ours, theirs, image, text)

    good = max(*there, *back) <= TOLERANCE < min(changed)
    count = sum(p.numel() for p in ours.parameters()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {count:.1f} M parameters, {time.monotonic() - start:.0f} s, peak so far {peak:.1f} GiB")
    for what, (image_diff, text_diff) in (
        ("OpenCLIP -> clipq", there),
        ("clipq -> OpenCLIP", back),
        ("different weights", changed),
    ):
        print(f"  {what}: differ by image {image_diff:.1e}, text {text_diff:.1e}")
    print(f"  {'agree' if good else 'DIFFER'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", help="OpenCLIP model names")
    parser.add_argument("--batch", type=int, default=2, help="images and texts to compare")
    args = parser.parse_args()
    results = [check(name, args.batch) for name in args.names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Samples a second from shards to batches of images and tokens: clipq's loader and OpenCLIP's on one CPU core, beside
bare decoding of the same bytes in memory, or both on all cores with several numbers of loader processes.

    python scripts/bench_loader.py --shards '/data/tiny_imagenet/train/*.tar.gz' --size 64 --openclip FOLDER
    python scripts/bench_loader.py --shards '/data/x/*.tar' --enlarge 256 --openclip FOLDER --output loader.json
    python scripts/bench_loader.py --shards '/data/x/*.tar' --enlarge 256 --openclip FOLDER --workers 1 2 4 8 12 16

OpenCLIP 3.3.0's trainer needs webdataset up to 0.2.86, and pandas: FOLDER is where
`pip install --target FOLDER --no-deps webdataset==0.2.86 pandas python-dateutil six pytz` put them. Each loader is
measured in a process of its own, on the same core, in turn, several times.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

BATCH = 256
WARMUP = 12288
"""Samples of one core before the first that count."""
QUALITY = 92
PIECES = 16
"""Shards of which each enlarged one becomes."""


def ours(shards: list[str], size: int, workers: int) -> Iterator[Any]:
    import open_clip

    from clipq.data.decode import Captions, TrainTransform
    from clipq.data.loader import TrainStream, batches
    from clipq.data.order import usual_lanes
    from clipq.data.source import Source

    tokenizer, lanes = open_clip.get_tokenizer("ViT-B-32"), max(usual_lanes(len(shards), 1), workers)
    stream = TrainStream([Source(shards, Captions())], TrainTransform((size, size)), tokenizer, BATCH, lanes)
    return batches(stream, workers=workers)


def openclip(shards: list[str], size: int, workers: int) -> Iterator[Any]:
    import open_clip
    from open_clip_train.data import get_wds_dataset

    transform = open_clip.image_transform(size, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    settings = SimpleNamespace(
        train_data=shards,
        train_num_samples=10**8,
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # else it ends after a pass
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        seed=0,
    )
    loader = get_wds_dataset(settings, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return iter(loader.dataloader)


def bare(shards: list[str], size: int, workers: int) -> Iterator[Any]:
    """Decoding alone: no reading, cropping or tokens. What no loader that decodes whole images can reach."""
    import simplejpeg

    from clipq.data.shards import member, read_shard

    found = (member(sample, "jpg") for shard in shards for sample in read_shard(shard))
    images = list(itertools.islice((data for data in found if data and simplejpeg.is_jpeg(data)), 4096))
    rng = random.Random(0)
    while True:
        for data in rng.choices(images, k=BATCH):
            simplejpeg.decode_jpeg(data, "RGB")
        yield None


LOADERS: dict[str, Callable[[list[str], int, int], Iterator[Any]]] = {"clipq": ours, "openclip": openclip, "bare": bare}


def measure(name: str, shards: list[str], size: int, seconds: float, core: int, workers: int) -> dict[str, float]:
    """In this process, and loader processes of it: samples a second once they run, and the time to the first batch."""
    if workers == 0:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    start = time.perf_counter()
    loader = LOADERS[name](shards, size, workers)
    made = time.perf_counter()
    next(loader)
    first = time.perf_counter()
    # On one core, until buffers of samples to shuffle are full: while they fill, two are read for each one drawn.
    # With loader processes, until what was made ready while the first batch was awaited is used up.
    for _ in range(1 + 3 * workers if workers else WARMUP // BATCH):
        next(loader)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(loader)
        count += BATCH
    rate = count / (time.perf_counter() - begin)
    return {"samples_per_second": rate, "first_batch_seconds": first - made, "setup_seconds": made - start}


def enlarged(shards: list[str], side: int, folder: Path) -> list[str]:
    """Copies whose pictures have a short side of so many pixels, and a caption each. They are softer than real ones."""
    from PIL import Image

    from clipq.data.shards import member, read_shard

    written: list[str] = []
    for number, shard in enumerate(shards):
        samples = list(read_shard(shard))
        for piece in range(PIECES):
            path = folder / f"{number:03d}_{piece}.tar"
            with tarfile.open(path, "w") as tar:
                for sample in samples[piece::PIECES]:
                    image = Image.open(io.BytesIO(member(sample, "jpg;png;webp") or b"")).convert("RGB")
                    scale = side / min(image.size)
                    image = image.resize(
                        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
                    )
                    buffer = io.BytesIO()
                    image.save(buffer, "JPEG", quality=QUALITY)
                    text = f"a picture of thing number {sample['__key__']}".encode()
                    for kind, data in (("jpg", buffer.getvalue()), ("txt", text)):
                        info = tarfile.TarInfo(f"{Path(sample['__key__']).name}.{kind}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            written.append(str(path))
    return written


def in_a_process(name: str, shards: list[str], args: argparse.Namespace, workers: int) -> dict[str, float]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if name == "openclip":
        environment["PYTHONPATH"] = f"{args.openclip}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    job = {"name": name, "shards": shards, "size": args.size, "seconds": args.seconds, "core": args.core}
    command = [sys.executable, __file__, "--job", json.dumps(job | {"workers": workers})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(names: list[str], shards: list[str], args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Loaders in turn, several times; medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            found[name].append(in_a_process(name, shards, args, workers))
    rates = {name: statistics.median(r["samples_per_second"] for r in rounds) for name, rounds in found.items()}
    for name, rate in rates.items():
        first = statistics.median(r["first_batch_seconds"] for r in found[name])
        ratio = f"clipq is {rates['clipq'] / rate:.2f} times that"
        print(f"{workers:2} workers: {name:9} {rate:8.0f} samples/s, first batch {first:.2f} s, {ratio}", flush=True)
    return {"rounds": found, "samples_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="as data.shards")
    parser.add_argument("--size", type=int, default=224, help="pixels of the batches' images")
    parser.add_argument("--enlarge", type=int, help="first make copies of the pictures with such a short side")
    parser.add_argument("--openclip", metavar="FOLDER", help="where the webdataset is that OpenCLIP's trainer needs")
    parser.add_argument("--workers", type=int, nargs="+", help="loader processes, on all cores; without: one core")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(**json.loads(args.job))))
        return
    from bench_common import write

    from clipq.data.shards import expand

    shards = [str(Path(s).absolute()) for s in expand(args.shards)]
    results: dict[str, Any] = {"data": "/".join(Path(args.shards).parts[-3:-1]), "size": args.size}
    results |= {"enlarge": args.enlarge, "cores": len(os.sched_getaffinity(0)) if args.workers else 1}
    names = ["clipq", *(["openclip"] if args.openclip else [])]
    with tempfile.TemporaryDirectory() as folder:
        if args.enlarge:
            shards = enlarged(shards, args.enlarge, Path(folder))
        if args.workers:
            results["workers"] = {}
            for workers in args.workers:
                results["workers"][str(workers)] = compare(names, shards, args, workers)
                if args.output:  # as far as it is: it takes minutes
                    write(args.output, "loader_workers", "Loader", results)
            return
        results |= compare([*names, "bare"], shards, args, 0)
    if args.output:
        write(args.output, "loader", "Loader, one core", results)


if __name__ == "__main__":
    main()

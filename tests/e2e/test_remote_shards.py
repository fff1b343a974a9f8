"""clipq-train on shards behind an HTTP server, which it keeps."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import command, read_metrics
from tests.remote_server import Handler, http_server


def test_the_second_run_reads_from_the_disk(world: Path) -> None:
    with http_server(b"") as address:
        for path in (world / "data").glob("*.tar"):
            Handler.files[f"/good/{path.name}"] = path.read_bytes()
        arguments = [
            *(f"model.name={world}/tiny.json", f"data.shards={address}/good/{{00000..00002}}.tar", "data.shuffle=16"),
            *("data.workers=2", "batch_size=16", "steps=24", "schedule.warmup=5", "backend=fp32", "data.cache=kept"),
        ]
        requests, losses = [], []
        for name in ("one", "two"):
            Handler.requests.clear()
            command("train", *arguments, "data.cache_gb=0.1", f"name={name}", cwd=world)
            requests.append(len(Handler.requests))
            losses.append([row["loss"] for row in read_metrics(world / "runs" / name)])
        assert losses[0] == losses[1]
        assert 3 <= requests[0] <= 6, "three passes over three shards; ends of passes overlap"
        assert requests[1] == 3, "whether each is still the same"
        done = command("train", *arguments, "name=three", cwd=world, check=False)
        assert done.returncode == 2
        assert "data.cache=kept with data.cache_gb=None: expected both or neither" in done.stderr

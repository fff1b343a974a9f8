"""clipq-train on a table of image files."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import COLOURS, command, encode, picture, read_metrics


def test_a_table_is_trained_on_and_resumed(world: Path, tmp_path: Path) -> None:
    lines = ["filepath,title"]
    for n in range(120):
        colour = list(COLOURS)[n // 30]
        (tmp_path / f"{n}.png").write_bytes(encode(picture(colour, n)))
        lines.append(f'{n}.png,"a {colour}\nsquare"')
    lines.insert(50, "none.png,not there")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines))
    arguments = [
        *(f"model.name={world}/tiny.json", "data.shards=t.csv", "data.workers=2", "batch_size=20", "schedule.warmup=2"),
        *("backend=fp32", "checkpoint.every=5", "log.every=5"),
    ]
    command("train", *arguments, "steps=12", "schedule=constant", "name=whole", cwd=tmp_path)
    rows = read_metrics(tmp_path / "runs" / "whole")
    assert 1 <= sum(row.get("lost", 0) for row in rows) <= 4, "none.png comes once a pass"
    command("train", *arguments, "steps=5", "schedule=constant", "name=parts", cwd=tmp_path)
    command("train", *arguments, "steps=12", "schedule=constant", "name=parts", "data.workers=0", cwd=tmp_path)
    assert [r["loss"] for r in read_metrics(tmp_path / "runs" / "parts")] == [r["loss"] for r in rows]

    table.write_text("\n".join([*lines, "1.png,more"]))
    done = command("train", *arguments, "steps=20", "name=parts", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "data.shards: " in done.stderr
    assert "have other names or another order" in done.stderr
    done = command("train", *arguments, "data.table.caption=text", "name=x", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "has no column text: name one of filepath, title with data.table.caption" in done.stderr
    assert "Traceback" not in done.stderr

"""`clipq-data`: statistics, wrong usage, processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipq.cli.data import main
from clipq.data import tar
from clipq.data.index import read_counts
from clipq.data.shards import read_shard
from clipq.data.stats import QUANTILES, quantiles
from tests.data_command import files_of, run, write_tar
from tests.helpers import command, encode, picture


def test_quantiles_against_numpy() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 100, 1001):
        values = rng.integers(0, 300, size)
        expected = np.quantile(values, QUANTILES, method="inverted_cdf")
        assert list(quantiles(Counter(values.tolist())).values()) == expected.tolist()
    assert quantiles(Counter()) == {}


def test_stats_say_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 90, (60, 2))
    for shard in range(3):
        members = []
        for n in range(shard * 20, shard * 20 + 20):
            width, height = sizes[n]
            image = encode(Image.new("RGB", (int(width), int(height)), "red"), ("PNG", "JPEG")[n % 2])
            record = json.dumps({"similarity": n / 100, "n": 10**n, "key": str(n), "none": None, "nan": math.nan})
            # the first caption is empty
            members += [(f"{n}.jpg", image), (f"{n}.txt", b"x" * n), (f"{n}.json", record.encode())]
        write_tar(tmp_path / f"{shard}.tar", [*members, (f"{shard}x.txt", b"no image")])
    outputs = []
    for workers in (1, 2):
        assert run("stats", "*.tar", "--output", f"stats{workers}", workers=workers) == 0
        outputs.append(files_of(tmp_path / f"stats{workers}"))
    assert outputs[0] == outputs[1]
    assert outputs[0].keys() == {"stats.json", "contact_sheet.png"}
    stats = json.loads(outputs[0]["stats.json"])
    assert stats["samples"] == 63
    assert stats["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    assert stats["formats"] == {"PNG": 30, "JPEG": 30}
    assert stats["faults"] == {"bad caption": 1, "no image": 3}
    assert stats["share_of_samples_with_empty_caption"] == 1 / 63
    lengths = [*range(1, 60), 8, 8, 8]
    columns = {"width": sizes[:, 0], "height": sizes[:, 1], "short_side": sizes.min(1)}
    for name, values in {**columns, "caption": lengths}.items():
        got = stats["caption_characters"] if name == "caption" else stats["pixels"][name]
        assert list(got.values()) == np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    aspects = (sizes.max(1) / sizes.min(1)).round(2)
    assert list(stats["aspect"].values()) == np.quantile(aspects, QUANTILES, method="inverted_cdf").tolist()
    assert stats["json"].keys() == {"similarity", "n"}, "numbers alone"
    assert list(stats["json"]["similarity"].values()) == [0.0, 0.0, 0.02, 0.14, 0.29, 0.44, 0.56, 0.59, 0.59]
    shown = capsys.readouterr().out
    assert "json.similarity           0        0     0.02     0.14     0.29" in shown
    sheet = Image.open(tmp_path / "stats1" / "contact_sheet.png")
    assert np.asarray(sheet).std() > 10


def test_stats_count_what_is_passed_over(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBER", 1000)
    write_tar(tmp_path / "0.tar", [("0.png", bytes(2000)), ("0.txt", b"a caption")])
    (tmp_path / "1.tar").write_bytes(b"<html>")
    assert run("stats", tmp_path / "0.tar", tmp_path / "1.tar", "--output", "out") == 0
    assert json.loads(Path("out/stats.json").read_text())["faults"] == {"damaged": 1, "large member": 1, "no image": 1}


@pytest.mark.parametrize(("limit", "looked_at"), [(1, 1), (3, 3), (10, 10), (23, 20), (1000, 73)])
def test_stats_of_a_part(limit: int, looked_at: int, shards: list[str]) -> None:
    assert run("stats", *shards, "--limit", limit) == 0
    assert json.loads(Path("stats/stats.json").read_text())["samples"] == looked_at


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["index"], "SHARDS"),
        (["index", "no.tar"], "clipq-data: no shard matches 'no.tar'"),
        (["index", "s3://b/0.tar"], "s3://b/0.tar is an address"),
        (["index", "f"], "f is a folder: name its shards, as in f/*.tar"),
        (["index", "x", "--workers", "0"], "--workers: expected a whole number of at least 1, not '0'"),
        (["stats", "x", "--limit", "-1"], "--limit"),
        (["verify", "no/*.tar"], "no shard matches"),
        (["verify", "x", "--max-member", "-1"], "--max-member: expected MiB"),
        (["make", "f"], "OUTPUT"),
        (["make", "f", "out"], "f: expected a folder with one sub-folder of images for each class"),
        (
            ["make", "no", "out"],
            "no: expected a folder of class folders, a .csv, .tsv or .parquet that exists, or shards",
        ),
        (["make", "no.csv", "out"], "no.csv: No such file"),
        (["make", "t.csv", "out"], "t.csv has no column filepath: name one of url, caption with --image-column"),
        (["make", "t.csv", "out", "--image-column", "url", "--caption-column", "caption"], "is an address"),
        (["make", "t.csv", "out", "--template", "a {}"], "--classnames and --template are for a folder"),
        (["make", "g", "out", "--template", "a"], "--template 'a' has no {} for the class name"),
        (["make", "g", "g/out"], "g/out lies in g"),
        (["make", "g", "g/../t.csv", "out"], "expected one SOURCE"),
        (["make", "bytes.csv", "out"], "bytes.csv: expected text in UTF-8"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "g" / "c").mkdir(parents=True)
    (tmp_path / "t.csv").write_text("url,caption\nhttps://x/0.jpg,x\n")
    (tmp_path / "bytes.csv").write_bytes(b"filepath,title\n\xff\xfe,x\n")
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    told = capsys.readouterr()
    assert status == 2
    assert says in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert not (tmp_path / "out").exists()


def test_index_tells_damage_by_its_status(shards: list[str], capsys: pytest.CaptureFixture) -> None:
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[:3000])
    assert run("index", *shards) == 1
    told = capsys.readouterr()
    assert f"{shards[1]} is damaged and not in the index: " in told.err
    assert "4 shards with 62 samples are in clipq_index.json beside them; 1 damaged" in told.out


def test_a_killed_worker_is_told(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import clipq.data.index as index

    monkeypatch.setattr(index, "measure", _killed)
    assert run("index", *shards, workers=2) == 1
    assert "try again with fewer --workers" in capsys.readouterr().err


def _killed(shard: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_that_are_not_wanted_end_the_processes() -> None:
    from clipq.data.parallel import over

    begun = time.monotonic()
    with closing(over(time.sleep, [0.01, 60, 60, 60], workers=2)) as results:
        assert next(results) == (0.01, None)
    assert time.monotonic() - begun < 20


def test_help_is_quick_to_import() -> None:
    code = "import sys, clipq.cli.data as d\ntry: d.main(['make', '--help'])\nfinally: print(*sorted(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert "--per-shard" in told
    assert not {"torch", "numpy", "PIL", "webdataset"} & set(told.split("\n")[-2].split())


def test_command_of_its_own(shards: list[str], tmp_path: Path) -> None:
    done = command("data", "index", "data/*.tar", "--workers", "2", cwd=tmp_path)
    assert done.stdout == "5 shards with 73 samples are in clipq_index.json beside them; 0 damaged\n"
    assert read_counts(shards) == [20, 11, 17, 5, 20]


@pytest.mark.slow
def test_ctrl_c_leaves_whole_shards_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "photos" / "red").mkdir(parents=True)
    image = encode(picture("red", 0, size=100))
    for number in range(5000):
        (tmp_path / "photos" / "red" / f"{number}.png").write_bytes(image)
    arguments = [sys.executable, "-m", "clipq.cli.data", "make", "photos", "out", "--per-shard", "10", "--workers", "2"]
    running = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out" / "00000.tar").exists():
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "clipq-data: stopped\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert len(names) < 500
    assert not [n for n in names if n.startswith(".")]
    shards = sorted(str(tmp_path / "out" / n) for n in names if n.endswith(".tar"))
    assert all(len(list(read_shard(shard))) == 10 for shard in shards)

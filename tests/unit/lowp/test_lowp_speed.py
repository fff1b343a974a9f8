"""Tables of where low precision pays, and what is left in 16 bits by them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from clipq.lowp import convert_linears, measure, speed
from clipq.lowp.speed import Speed, SpeedTable, read_table, shipped_table

TABLE = SpeedTable(
    "Some GPU",
    (
        Speed("switchback", 384, 1536, 4096, 0.7),
        Speed("switchback", 384, 1536, 65536, 0.98),
        Speed("switchback", 1280, 5120, 4096, 1.1),
        Speed("switchback_m", 384, 1536, 4096, 1.0),
    ),
)


@pytest.mark.parametrize(
    ("width", "tokens", "ratio"),
    [(384, 4096, 0.7), (384, 40_000, 0.98), (512, 8192, 0.7), (1024, 4096, 1.1), (4096, 1, 1.1), (64, 10**7, 0.98)],
)
def test_nearest_in_ratios(width, tokens, ratio) -> None:
    found = TABLE.nearest("switchback", width, 4 * width, tokens)
    assert found is not None
    assert found.ratio == ratio


def test_only_what_is_slower_has_a_reason() -> None:
    assert TABLE.why_slower("switchback", 1280, 5120, 4096) is None
    assert TABLE.why_slower("switchback_m", 384, 1536, 4096) is None, "as fast is not slower"
    assert TABLE.why_slower("llm_int8", 384, 1536, 4096) is None, "not measured"
    why = TABLE.why_slower("switchback", 400, 1600, 5000)
    assert (
        why == "on Some GPU a block of width 384 and 1536 with 4,096 tokens is ×0.70 as fast by switchback as in bf16"
    )


def test_files(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "some_gpu_80gb.json"
    TABLE.write(path)
    assert read_table(path) == TABLE
    monkeypatch.setattr(speed, "TABLES", tmp_path)
    assert shipped_table("Some GPU (80GB") == TABLE
    assert shipped_table("Another GPU") is None


ZERO = '{"recipe": "switchback", "width": 0, "hidden": 4, "tokens": 1, "ratio": 1.0}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"device": "x"}', '{"device": "x", "speeds": [{"width": 1}]}'),
        f'{{"device": "x", "speeds": [{ZERO}]}}',
    ],
)
def test_what_is_no_table(content, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json: expected a table made by python -m clipq"):
        read_table(path)


def test_shipped_tables_can_be_read() -> None:
    assert shipped_table("NVIDIA H100 80GB HBM3") is not None
    for path in speed.TABLES.glob("*.json"):
        table = read_table(path)
        assert shipped_table(table.device) == table
        assert {s.recipe for s in table.speeds} <= set(measure.MEASURED)


def test_reasons_are_reported() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
    report = convert_linears(model, "switchback", filter=lambda _, layer: layer.out_features == 8 or "small")
    assert report.kept == {"0": "small"}
    assert report.converted == ["1"]
    assert "not converted: 0: small" in str(report)


@pytest.mark.parametrize("recipe", ["bf16", "switchback", "switchback_m", "llm_int8"])
def test_what_is_measured_is_a_block(recipe) -> None:
    """Each recipe computes the same function, fused or not, and gives every parameter a gradient."""
    torch.manual_seed(0)
    block = measure.BlockLinears(32, 64)
    x = torch.randn(50, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block(x).detach()
    convert_linears(block, recipe)
    measure.training_call(block, [*block.parameters()], x)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        off = (block(x) - expected).norm() / expected.norm()
    assert off == 0 if recipe == "bf16" else 1e-4 < off < 0.05
    for name, p in block.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_measuring_needs_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["measure", "x.json"])
    with pytest.raises(SystemExit):
        measure.main()
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_measures(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "gpu.json"
    sizes = ["--widths", "256", "1280", "--tokens", "4096", "--recipes", "switchback", "llm_int8"]
    monkeypatch.setattr(sys, "argv", ["measure", str(path), *sizes])
    measure.main()
    table = read_table(path)
    assert table.device == torch.cuda.get_device_name()
    assert len(table.speeds) == 4
    for found in table.speeds:
        assert 0.05 < found.ratio < 3

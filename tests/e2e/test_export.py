"""clipq-export: what is written loads where it is meant to, with the same features."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipq.cli import export
from clipq.model.clip import create_model
from clipq.model.weights import save_weights


@pytest.fixture
def checkpoint(arch: Path, tmp_path: Path) -> Path:
    """A folder as the trainer writes it, as far as it is read here."""
    torch.manual_seed(1)
    clip = create_model(str(arch))
    folder = tmp_path / "run" / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    save_weights(clip.model, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(clip.openclip_json())
    return folder


def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.normalize(model.eval().encode_image(images).float(), dim=-1)  # pyright: ignore[reportCallIssue]


def test_openclip_loads_it(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export.main([str(tmp_path / "run"), str(out)]) == 0
    assert "fp32: read again, features differ by" in capsys.readouterr().out
    images = torch.randn(3, 3, 16, 16)
    ours = create_model(str(checkpoint / "open_clip_config.json"), pretrained=str(checkpoint)).model
    torch.testing.assert_close(
        features(open_clip.create_model(f"local-dir:{out}"), images), features(ours, images), rtol=0, atol=1e-5
    )
    assert export.main([str(out), str(tmp_path / "again")]) == 0, "an exported one is exported again"
    assert (
        load_file(tmp_path / "again" / "open_clip_model.safetensors").keys()
        == load_file(out / "open_clip_model.safetensors").keys()
    )


@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.55), ("int8", 0.5)])
def test_smaller_ones(weights: str, share: float, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(checkpoint), str(out), "--weights", weights]) == 0
    (file,) = out.glob("*.safetensors")
    assert file.stat().st_size < share * (checkpoint / "model.safetensors").stat().st_size
    images = torch.randn(3, 3, 16, 16)
    small = create_model(str(out / "open_clip_config.json"), pretrained=str(out)).model
    whole = create_model(str(checkpoint / "open_clip_config.json"), pretrained=str(checkpoint)).model
    found, expected = features(small, images), features(whole, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert not torch.equal(found, expected)


def test_onnx(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export.main([str(checkpoint), str(out), "--onnx"]) == 0
    assert "onnx: read again" in capsys.readouterr().out
    model = create_model(str(checkpoint / "open_clip_config.json"), pretrained=str(checkpoint)).model
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        (found,) = onnxruntime.InferenceSession(out / "image.onnx").run(None, {"image": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), features(model, images), rtol=0, atol=1e-3)
    tokens = torch.randint(1, 100, (3, 8))
    (found,) = onnxruntime.InferenceSession(out / "text.onnx").run(None, {"text": tokens.numpy()})
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens), dim=-1)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-3)


def test_a_difference_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", {"bf16": 1e-9})
    assert export.main([str(checkpoint), str(tmp_path / "out"), "--weights", "bf16"]) == 1
    assert "bf16: more than 1e-09: do not use it" in capsys.readouterr().err


def test_mistakes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "open_clip_config.json").rename(tmp_path / "arch.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    other = json.loads((tmp_path / "arch.json").read_text())
    (other.get("model_cfg") or other)["embed_dim"] = 8
    (tmp_path / "other.json").write_text(json.dumps(other))
    cases = (
        ([str(tmp_path / "no"), str(tmp_path / "out")], "there is no such file or folder"),
        ([str(checkpoint), str(tmp_path / "out")], "its architecture is not known: name it, as in --model ViT-B-32"),
        ([str(checkpoint), str(tmp_path / "full"), "--model", str(tmp_path / "arch.json")], "and not empty"),
        ([str(checkpoint), str(tmp_path / "out"), "--model", str(tmp_path / "other.json")], "visual.proj"),
    )
    for arguments, says in cases:
        assert export.main(arguments) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""A step in micro-batches against the step of the whole batch, and against one that keeps the graphs of all of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipq.dist.env import distributed
from clipq.model.surgery import blocks
from clipq.optim.loss_scale import FixedLossScaler
from clipq.train import accumulate
from clipq.train.loop import forward_backward, train
from clipq.train.run import Run
from tests.helpers import read_metrics
from tests.unit.loss.memory import PeakMemory
from tests.unit.lowp.towers import Counted
from tests.unit.train import runs

CONTEXT = 8
TEXT = {"context_length": CONTEXT, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An architecture without a large vocabulary: its gradients are made at once."""
    return write_arch(tmp_path, VIT)


def write_arch(folder: Path, vision: dict[str, Any]) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    return path


def run_of(arch: Path, shards: list[str], *overrides: str, device: str = "cpu") -> Run:
    with distributed(device) as env:
        return runs.run_of(arch, shards, *overrides, env=env)


def in_double(run: Run) -> Run:
    """The run in float64, where nothing hides behind rounding."""
    run.state.model.double()
    normalize = run.normalize
    run.normalize = lambda x: normalize(x).double()  # pyright: ignore
    run.model.train()
    return run


def batch_of(pairs: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8)
    return image, torch.randint(1, 64, (pairs, CONTEXT), generator=g, dtype=torch.int32)


def gradients(run: Run, accumulation: int, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What a step leaves in the parameters, and its numbers."""
    run.accumulation = accumulation
    run.state.optimizer.zero_grad()
    torch.manual_seed(3)
    numbers = forward_backward(run, *batch)
    return {n: p.grad.clone() for n, p in run.state.model.named_parameters() if p.grad is not None}, numbers


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * max(value.norm().item(), 1e-3), name


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
def test_gradients_are_those_of_the_whole_batch(loss: str, small: Path, shards: list[str]) -> None:
    run = in_double(run_of(small, shards, f"loss={loss}"))
    if loss == "siglip":
        run.state.model.get_parameter("logit_bias").data.fill_(-2.0)  # at -10 only the matching pairs would count
    batch = batch_of()
    whole, numbers = gradients(run, 1, batch)
    names = {n for n, _ in run.state.model.named_parameters()}
    assert whole.keys() == names >= {"logit_scale", *(["logit_bias"] if loss == "siglip" else [])}
    assert all(g.norm() > 1e-6 for n, g in whole.items())
    for n in (2, 4, 8):
        found, found_numbers = gradients(run, n, batch)
        assert_same(found, whole)
        torch.testing.assert_close(found_numbers, numbers, rtol=1e-12, atol=0)
    # what would be wrong: the micro-batches' own losses
    apart: dict[str, Tensor] = {}
    for part in zip(*(x.chunk(2) for x in batch), strict=True):
        for name, g in gradients(run, 1, part)[0].items():
            apart[name] = apart.get(name, 0) + g / 2
    assert (apart["visual.proj"] - whole["visual.proj"]).norm() > 0.1 * whole["visual.proj"].norm()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_numbers_are_the_same_both_times(
    device: str, checkpointing: str, small: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a step that keeps the graphs of all micro-batches, with dropout of patches and within both towers."""
    settings = ("model.patch_dropout=0.5", f"model.grad_checkpointing={checkpointing}", "backend.compile=off")
    run = in_double(run_of(small, shards, *settings, device=device))
    for _, block in blocks(run.state.model):
        block.register_forward_hook(lambda module, inputs, y: F.dropout(y, 0.3))
    image, text = batch_of()
    torch.manual_seed(3)
    parts = [run.forward(run.model, *part) for part in zip(image.chunk(4), text.chunk(4), strict=True)]
    drawn = torch.rand(4, device=device)
    run.loss(*(torch.cat([part[i] for part in parts]) for i in range(2)), parts[0][2])[0].backward()
    expected = {n: p.grad.clone() for n, p in run.state.model.named_parameters() if p.grad is not None}

    found, _ = gradients(run, 4, (image, text))
    assert torch.equal(torch.rand(4, device=device), drawn), "the next step would draw what this one has drawn"
    assert_same(found, expected)
    monkeypatch.setattr(accumulate, "_replayed", lambda *_: nullcontext())
    other, _ = gradients(run, 4, (image, text))
    assert (other["visual.proj"] - found["visual.proj"]).norm() > 1e-3 * found["visual.proj"].norm()


@pytest.mark.parametrize("scaler", ["fixed", "dynamic"])
def test_loss_scales(scaler: str, small: Path, shards: list[str]) -> None:
    run = in_double(run_of(small, shards))
    plain, numbers = gradients(run, 1, batch_of())
    run.state.scaler = (
        FixedLossScaler(run.state.model.named_parameters(), 512.0)
        if scaler == "fixed"
        else torch.amp.GradScaler("cpu", init_scale=512.0)
    )
    scaled, scaled_numbers = gradients(run, 4, batch_of())
    assert_same(scaled, {n: 512 * g for n, g in plain.items()})
    torch.testing.assert_close(scaled_numbers, numbers, rtol=1e-12, atol=0)


def test_the_guard_learns_which_features_are_not_finite(small: Path, shards: list[str]) -> None:
    run = in_double(run_of(small, shards))
    image, text = batch_of()
    run.state.model.get_parameter("token_embedding.weight").data[5] = float("nan")
    text[text == 5] = 6
    for row, expected in ((0, 0.0), (7, 0.0), (None, 1.0)):  # of the first micro-batch, of the last, of none
        own = text.clone()
        if row is not None:
            own[row, 2] = 5
        assert gradients(run, 4, (image, own))[1][3:].tolist() == [1.0, expected]


def test_low_precision_weights_are_quantized_once(arch: Path, shards: list[str]) -> None:
    """And anew after the update: rows of activations are quantized for themselves, so training is the same."""
    settings = ("backend=switchback", "backend.precision=fp32", "optim.lr=1e-2", "steps=3", "log.every=1")
    run = run_of(arch, shards, *settings)
    run.model.train()
    with Counted("clipq::quantize_tensor") as counted:
        gradients(run, 4, batch_of())
    assert counted.calls == 12, "a weight is quantized for both its products at once"
    losses = []
    for n in (1, 4):
        torch.manual_seed(0)
        run = run_of(arch, shards, *settings, f"accumulation={n}", f"name=of{n}")
        train(run)
        losses.append([row["loss"] for row in read_metrics(Path("run"))])
        Path("run").rename(f"of{n}")
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert abs(losses[0][2] - losses[0][0]) > 1e-2


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_features_are_watched_once(checkpointing: str, small: Path, shards: list[str]) -> None:
    run = run_of(small, shards, f"model.grad_checkpointing={checkpointing}")
    run.model.train()
    watch = run.watch._features
    assert watch is not None
    outputs: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, inputs, y, name=name: outputs.update({name: y.detach()}))
        for name, block in blocks(run.state.model)
    ]
    run.forward(run.model, *batch_of())
    for hook in hooks:
        hook.remove()
    for _ in range(2):  # the second step begins anew
        run.watch.before_forward(10)
        gradients(run, 4, batch_of())
        expected = [outputs[name][::2].abs().mean().item() for name in watch.names]  # the first of every two pairs
        assert watch.values().tolist() == pytest.approx(expected, rel=1e-5)
    assert outputs[watch.names[0]].abs().mean().item() != pytest.approx(expected[0], rel=1e-3)


def test_batch_norm_counts_each_micro_batch_once(tmp_path: Path, shards: list[str]) -> None:
    arch = write_arch(tmp_path, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None})
    run = in_double(run_of(arch, shards))
    norm = run.state.model.get_submodule("visual.bn1")
    image, text = batch_of(size=64)
    parts = list(zip(image.chunk(4), text.chunk(4), strict=True))
    start = {name: b.clone() for name, b in norm.named_buffers()}
    for part in (parts[-1], *parts[:-1]):  # the last goes through the model before the others go again
        run.forward(run.model, *part)
    expected = {name: b.clone() for name, b in norm.named_buffers()}
    assert expected["num_batches_tracked"] == 4
    norm.load_state_dict(start, strict=False)
    gradients(run, 4, (image, text))
    for name, b in norm.named_buffers():
        torch.testing.assert_close(b, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_blocks(small: Path, shards: list[str]) -> None:
    torch._dynamo.reset()
    run = run_of(small, shards, "backend=switchback", "backend.precision=fp32", "model.grad_checkpointing=true")
    run.model.train()
    expected, _ = gradients(run, 4, batch_of())
    for _, block in blocks(run.state.model):
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    found, _ = gradients(run, 4, batch_of())
    torch._dynamo.reset()
    assert_same(found, expected, 1e-4)


def test_memory_is_that_of_a_micro_batch(tmp_path: Path, shards: list[str]) -> None:
    run = run_of(write_arch(tmp_path, VIT | {"image_size": 32, "layers": 4}), shards)
    run.model.train()
    batch = batch_of(64, 32)
    peaks = {}
    for n in (1, 1, 2, 4, 8):  # the first makes the gradients
        run.accumulation = n
        run.state.optimizer.zero_grad(set_to_none=False)
        with PeakMemory() as memory:
            forward_backward(run, *batch)
        peaks[n] = memory.peak / 2**20
    assert peaks[1] > 20, "MiB: else it is not the activations that are measured"
    for n in (2, 4, 8):
        assert peaks[n] < peaks[1] * (1 / n + 0.05)


def test_a_run_with_accumulation_is_the_same_run(arch: Path, shards: list[str]) -> None:
    rows = []
    for n in (1, 4):
        run = run_of(arch, shards, f"accumulation={n}", "optim.lr=1e-2", "log.every=3", "watch.every=1")
        train(run)
        rows.append(read_metrics(Path("run")))
        Path("run").rename(f"of{n}")
    assert [row["samples"] for row in rows[1]] == [8, 16, 24, 32, 40, 48]
    for one, four in zip(*rows, strict=True):
        assert one.keys() == four.keys()
        for name in ("loss", "grad_norm", "max_logit", "logit_scale"):
            assert four[name] == pytest.approx(one[name], rel=1e-3), name
    assert abs(rows[0][-1]["loss"] - rows[0][0]["loss"]) > 1e-2

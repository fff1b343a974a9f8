"""Converted blocks under torch.compile: one graph, no break, the same numbers, few recompilations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from clipq.lowp import RECIPES, convert_linears, quantized_once
from clipq.model.surgery import blocks
from tests.unit.lowp.towers import (
    FUSABLE,
    NOT_FUSABLE,
    WIDTH,
    assert_equal_runs,
    block_of,
    convert_unfused,
    model_of,
    run,
    tokens,
)

LOWP = [name for name in RECIPES if name != "bf16"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(block: torch.nn.Module, backend: object = "aot_eager") -> torch.nn.Module:
    block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    return block


@pytest.mark.parametrize("recipe", LOWP)
def test_no_graph_break_and_the_same_numbers(recipe, tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, recipe)
    torch.manual_seed(0)
    expected = run(block, tokens(), True)
    torch.manual_seed(0)
    found = run(compiled(block), tokens(), True)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    # random rounding draws its seeds in another order
    assert_equal_runs(found, expected, 0.3 if recipe == "int8_stochastic" else 1e-6)


@pytest.mark.parametrize("kind", ["layer scale", "qk norm", "quick gelu", "norm in the MLP"])
def test_every_kind_of_block(kind, tmp_path) -> None:
    block = block_of(tmp_path, (FUSABLE | NOT_FUSABLE)[kind])
    convert_linears(block, "switchback")
    expected = run(block, tokens())
    assert_equal_runs(run(compiled(block), tokens()), expected, 1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_converted_but_not_fused(tmp_path, monkeypatch) -> None:
    block = block_of(tmp_path)
    convert_unfused(block, "switchback", monkeypatch)
    expected = run(block, tokens())
    assert_equal_runs(run(compiled(block), tokens()), expected, 1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("held", [False, True])
def test_the_blocks_of_a_tower_share_one_graph(held, tmp_path) -> None:
    model = model_of(tmp_path, layers=3).train()
    convert_linears(model, "switchback")
    image = torch.randn(3, 3, 32, 32)
    expected = model.encode_image(image)
    counter = CompileCounterWithBackend("aot_eager")
    for _, block in blocks(model.visual):
        compiled(block, counter)
    if held:
        with quantized_once(model):
            found = model.encode_image(image)
    else:
        found = model.encode_image(image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    found.sum().backward()
    assert all(p.grad is not None for p in blocks(model.visual)[2][1].parameters())


def test_quantized_once_needs_no_other_graph_per_step(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    counter = CompileCounterWithBackend("aot_eager")
    compiled(block, counter)
    for step in range(3):
        with quantized_once(block):
            run(block, tokens())
            run(block, tokens())
        with torch.no_grad():
            block.mlp.c_fc.weight.mul_(1.1)
        assert counter.frame_count == 1, f"step {step}"


@pytest.mark.parametrize("recipe", ["switchback", "switchback_m", "llm_int8", "fp8"])
def test_ragged_batches_compile_twice_at_most(recipe, tmp_path) -> None:
    """For the first size, and once for all others; the numbers of tokens are multiples of 16, of 128, and others."""
    block = block_of(tmp_path)
    convert_linears(block, recipe)
    reference = block_of(tmp_path)
    convert_linears(reference, recipe)
    counter = CompileCounterWithBackend("aot_eager")
    compiled(block, counter)
    for batch in (4, 6, 5, 13, 7, 32, 128):
        x = torch.randn(batch, 5, WIDTH)
        assert_equal_runs(run(block, x), run(reference, x), 1e-6)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["switchback", "switchback_m", "switchback_r"])
def test_inductor(recipe, tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, recipe)
    expected = run(block, tokens(), True)
    assert_equal_runs(run(compiled(block, "inductor"), tokens(), True), expected, 0.02)
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", ["switchback", "switchback_m", "switchback_r", "switchback_fp8", "llm_int8"])
def test_inductor_on_cuda(recipe, tmp_path) -> None:
    if "fp8" in recipe and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    block = block_of(tmp_path).cuda()
    convert_linears(block, recipe)

    def once() -> dict[str, torch.Tensor]:
        block.zero_grad()
        x = tokens(16, 33).cuda().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        y.square().mean().backward()
        return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in block.named_parameters()}

    expected = once()
    compiled(block, "inductor")
    found = once()
    assert_equal_runs(found, expected, 0.02)
    again = once()
    assert all(torch.equal(again[k], found[k]) for k in found), "same inputs, other bits"
    assert counters["stats"]["unique_graphs"] == 1

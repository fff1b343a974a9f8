"""A fused block against the same block converted but not fused; checkpointing, hooks, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from clipq.lowp import convert_linears
from clipq.model.block import Block
from clipq.model.surgery import blocks
from tests.unit.lowp.towers import (
    FUSABLE,
    RECIPES,
    WIDTH,
    assert_equal_runs,
    block_of,
    both,
    convert_unfused,
    model_of,
    run,
    tokens,
)

each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_kind = pytest.mark.parametrize("settings", FUSABLE.values(), ids=FUSABLE)


@each_kind
@each_recipe
def test_fused_equals_its_parts_in_float32(settings, recipe, tmp_path, monkeypatch) -> None:
    fused, unfused = both(block_of(tmp_path, settings), recipe, monkeypatch)
    assert fused.fused is not None
    assert unfused.fused is None
    found, expected = run(fused, tokens()), run(unfused, tokens())
    # sums in the norm differ by their order, which moves a quantized value here and there by one step
    assert_equal_runs(found, expected, 5e-3 if "fp8" in recipe else 1e-3)


@each_kind
@pytest.mark.parametrize("recipe", ["switchback", "switchback_m"])
def test_fused_equals_its_parts_under_autocast(settings, recipe, tmp_path, monkeypatch) -> None:
    """But for the roundings to bfloat16 of what is not written out any more."""
    fused, unfused = both(block_of(tmp_path, settings), recipe, monkeypatch)
    found, expected = run(fused, tokens(), autocast=True), run(unfused, tokens(), autocast=True)
    assert found["y"].dtype is torch.float32
    assert_equal_runs(found, expected, 0.03)


@each_recipe
def test_fused_equals_its_parts_with_16_bit_weights(recipe, tmp_path, monkeypatch) -> None:
    fused, unfused = both(block_of(tmp_path).to(torch.bfloat16), recipe, monkeypatch)
    found, expected = (run(b, tokens().to(torch.bfloat16)) for b in (fused, unfused))
    assert_equal_runs(found, expected, 0.1 if "fp8" in recipe else 0.03)


def test_fused_is_in_low_precision(tmp_path) -> None:
    """An upper bound too: as good as float32 would mean that nothing was quantized."""
    plain = block_of(tmp_path)
    fused = copy.deepcopy(plain)
    convert_linears(fused, "switchback")
    found, expected = run(fused, tokens(16, 50)), run(plain, tokens(16, 50))
    for name in ("y", "dx", "mlp.c_fc.weight", "mlp.c_proj.weight", "attn.in_proj.weight", "ln_2.weight"):
        off = ((found[name] - expected[name]).norm() / expected[name].norm()).item()
        assert 1e-3 < off < 0.05, f"{name}: {off}"


@each_recipe
def test_layer_scale_of_zero(recipe, tmp_path) -> None:
    """The branches get gradients of exactly zero, the block is the identity, and nothing is NaN."""
    block = block_of(tmp_path, {"ls_init_value": 0.0})
    assert convert_linears(block, recipe).fused == [""]
    found = run(block, tokens(), autocast=True)
    assert all(value.isfinite().all() for value in found.values())
    assert torch.equal(found["y"], tokens())
    for name, value in found.items():
        if "." in name and not name.startswith("ls_"):
            assert value.abs().max() == 0, name
    assert found["ls_1.gamma"].abs().max() > 0
    assert found["ls_2.gamma"].abs().max() > 0


def test_masks_and_causal_attention(tmp_path, monkeypatch) -> None:
    model = model_of(tmp_path)
    fused, unfused = model, copy.deepcopy(model)
    convert_linears(fused, "switchback")
    convert_unfused(unfused, "switchback", monkeypatch)
    text = torch.randint(1, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = fused.eval()(image, text), unfused.eval()(image, text)
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)
    block = blocks(fused)[0][1]
    mask = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert not torch.equal(block(tokens()), block(tokens(), attn_mask=mask))
    with pytest.raises(NotImplementedError, match="self-attention only"):
        block(tokens(), tokens(), tokens())


@pytest.mark.parametrize("shape", [(0, 7), (2, 1), (1, 129)])
def test_odd_batches(shape, tmp_path, monkeypatch) -> None:
    fused, unfused = both(block_of(tmp_path), "switchback", monkeypatch)
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(0))
    assert_equal_runs(run(fused, x), run(unfused, x), 1e-3)


def test_strided_and_zero_inputs(tmp_path, monkeypatch) -> None:
    fused, unfused = both(block_of(tmp_path), "switchback", monkeypatch)
    x = tokens(4, 6)
    expected = fused(x)
    # tokens first, as OpenCLIP's towers without batch_first hand them on
    torch.testing.assert_close(fused(x.transpose(0, 1).contiguous().transpose(0, 1)), expected, atol=1e-5, rtol=1e-5)
    x[1] = 0
    assert_equal_runs(run(fused, x), run(unfused, x), 1e-3)
    assert run(fused, torch.zeros(2, 3, WIDTH))["dx"].isfinite().all()


def test_non_finite_tokens_stay_with_their_image(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    clean = block(tokens())
    x = tokens()
    x[1, 2, 3] = torch.nan
    y = block(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not y[1].isfinite().any()
    assert not run(block, x)["mlp.c_fc.weight"].isfinite().any()


@each_recipe
def test_evaluation_without_gradients(recipe, tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, recipe)
    expected = block(tokens()).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(block(tokens()), expected)


def saved_by(block: Block, x: torch.Tensor) -> dict[torch.dtype, int]:
    """Elements of activations that the forward keeps, by type; weights are left out."""
    own = {p.data_ptr() for p in block.parameters()}
    count: dict[torch.dtype, int] = {}
    seen = set()

    def pack(t: torch.Tensor) -> torch.Tensor:
        key = t.untyped_storage().data_ptr()
        if t.ndim and t.shape[0] == x.shape[0] * x.shape[1] and key not in own | seen:
            seen.add(key)
            count[t.dtype] = count.get(t.dtype, 0) + t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        block(x.clone().requires_grad_())
    return count


def test_what_is_kept_for_the_backward(tmp_path) -> None:
    """In rows of WIDTH elements: norm output, norm output, MLP hidden and activation of four widths each, attention."""
    kept = {}
    for recipe in ("switchback", "switchback_m", "switchback_r"):
        block = block_of(tmp_path)
        convert_linears(block, recipe)
        x = tokens(4, 16)
        kept[recipe] = {dtype: n / x.numel() for dtype, n in saved_by(block, x).items()}
    full, quantized, recomputed = (kept[r] for r in ("switchback", "switchback_m", "switchback_r"))
    assert torch.int8 not in full
    assert torch.int8 not in recomputed
    # in_proj's, c_fc's and c_proj's inputs in int8 in place of 16 bits; out_proj's is what attention keeps anyhow
    assert quantized[torch.int8] == 1 + 1 + 4
    assert full[torch.bfloat16] - quantized.get(torch.bfloat16, 0) == 1 + 1 + 4
    # all but out_proj's, which no norm or activation makes
    assert full[torch.bfloat16] - recomputed[torch.bfloat16] == 1 + 1 + 4


@pytest.mark.parametrize(("recipe", "dtype"), [("switchback", torch.bfloat16), ("switchback_m", torch.int8)])
def test_frozen_layers_keep_no_input(recipe, dtype, tmp_path) -> None:
    """In rows of WIDTH elements; the gradients of what is left are the same to the bit."""
    block, x = block_of(tmp_path), tokens(4, 16)
    convert_linears(block, recipe)
    expected, whole = run(block, x, autocast=True), saved_by(block, x)[dtype]
    for frozen, rows in ((["attn.in_proj"], 1), (["mlp.c_fc"], 1), (["mlp.c_proj"], 4), (["attn.in_proj", "mlp"], 6)):
        block.requires_grad_(True)
        for name in frozen:
            block.get_submodule(name).requires_grad_(False)
        assert (whole - saved_by(block, x).get(dtype, 0)) / x.numel() == rows, frozen
        found = run(block, x, autocast=True)
        assert not any(key.startswith(tuple(frozen)) for key in found)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@each_recipe
def test_saved_tensors_may_be_moved(recipe, tmp_path) -> None:
    block = block_of(tmp_path, {"ls_init_value": 0.1})
    convert_linears(block, recipe)
    expected = run(block, tokens())
    # torch.autograd.graph.save_on_cpu does the second: strides are not kept
    for pack in (torch.clone, lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = run(block, tokens())
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@each_recipe
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(recipe, autocast, reentrant, tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, recipe)
    expected = run(block, tokens(), autocast)
    found = run(Checkpointed(block, reentrant), tokens(), autocast)
    for name, value in expected.items():
        key = name if name in ("y", "dx") else f"block.{name}"
        assert torch.equal(found[key], value), name


class Checkpointed(torch.nn.Module):
    def __init__(self, block: Block, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def test_a_tower_with_checkpointing(tmp_path) -> None:
    model = model_of(tmp_path).train()
    convert_linears(model, "switchback")
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.encode_image(image).sum().backward()
        return [p.grad.clone() for p in model.visual.parameters()]

    expected = gradients()
    model.set_grad_checkpointing(True)
    for a, b in zip(gradients(), expected, strict=True):
        assert torch.equal(a, b)


def test_frozen_block(tmp_path) -> None:
    """LiT: a locked tower hands no gradient to its parameters but lets it through."""
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    expected = run(block, tokens())["dx"]
    block.requires_grad_(False)
    found = run(block, tokens())
    assert set(found) == {"y", "dx"}
    assert torch.equal(found["dx"], expected)


def test_copies(tmp_path) -> None:
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    expected = run(block, tokens())
    other = copy.deepcopy(block)
    assert other.fused is block.fused is not None
    found = run(other, tokens())
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    with torch.no_grad():
        other.mlp.c_fc.weight.zero_()
    assert torch.equal(block(tokens()), expected["y"]), "a copy has weights of its own"


def test_pickle(tmp_path) -> None:
    """`torch.save(model)`, spawned processes."""
    block = block_of(tmp_path)
    convert_linears(block, "switchback")
    other = pickle.loads(pickle.dumps(block))
    assert other.fused is not None
    assert torch.equal(other(tokens()), block(tokens()))

"""What the rest of clipq relies on in a block: its pairs, its compilation; and patch dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from clipq.build_backend import compile_blocks
from clipq.config.choices import Switch
from clipq.config.groups import BackendConfig
from clipq.dist.env import DistEnv
from clipq.model.block import PatchDropout
from clipq.model.clip import create_model
from clipq.model.surgery import blocks
from clipq.model.weights import to_openclip

MODELS = {
    "plain": ({}, {}),
    "custom": ({"qk_norm": True, "scale_heads": True}, {"scale_attn_inner": True, "scale_fc": True}),
    "layer scale": ({"ls_init_value": 0.1}, {"ls_init_value": 0.1}),
}


@pytest.fixture(params=MODELS)
def model(request, write_config, tiny):
    return create_model(write_config(tiny(*MODELS[request.param]))).model


def test_every_product_with_a_weight_is_a_plain_linear(model):
    for _, block in blocks(model):
        found = {name for name, module in block.named_modules() if type(module) is nn.Linear}
        assert found == set(block.linears())
        matrices = {name for name, p in block.named_parameters() if p.ndim == 2}
        assert matrices == {f"{name}.weight" for name in block.linears()}


class Packed(nn.Module):
    """Hands its result on in a form that only `Unpacked` reads, as fused quantizing modules will."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"packed": self.inner(x)}


class Unpacked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, x):
        return self.inner(x["packed"])


def test_nothing_touches_what_passes_within_a_pair(model, batch):
    inputs = batch()
    expected = model.eval()(*inputs)
    count = 0
    for _, block in blocks(model):
        for producer, linear, kind in block.pairs():
            old = block.get_submodule(producer)
            assert ("Norm" in type(old).__name__) == (kind == "layer_norm")
            block.set_submodule(producer, Packed(old))
            block.set_submodule(linear, Unpacked(block.get_submodule(linear)))
            count += 1
    assert count >= 3 * len(blocks(model))
    torch.testing.assert_close(model(*inputs), expected)


@pytest.fixture
def fresh_dynamo():
    """Blocks share the code of one `forward`: what earlier tests compiled counts against its recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("text", [{}, {"embed_cls": True}, {"no_causal_mask": True}])
def test_a_tower_compiles_to_one_graph_that_its_blocks_share(text, write_config, tiny, batch, fresh_dynamo):
    config = tiny({"qk_norm": True, "ls_init_value": 0.1, "patch_dropout": 0.5}, text, custom_text=True)
    model = create_model(write_config(config)).model.eval()
    image, tokens = batch()
    expected, keys = model(image, tokens), list(to_openclip(model))
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for _, block in blocks(model):
        block.forward = torch.compile(block.forward, fullgraph=True, backend=count)
    torch.testing.assert_close(model(image, tokens), expected)
    assert len(graphs) == 2
    model.train()(image, tokens)["image_features"].sum().backward()
    assert all(p.grad is not None for p in blocks(model)[0][1].parameters())
    assert list(to_openclip(model)) == keys


@pytest.mark.slow
def test_inductor_compiles_the_blocks(pair, tiny, batch, fresh_dynamo):
    theirs, bundle = pair(tiny({"qk_norm": True}, {}))
    image, text = batch()
    modes: list[bool] = []
    # called at the end of each graph, where inductor is about to choose tiles
    look = {"post_grad_custom_post_pass": lambda graph: modes.append(inductor_config.deterministic)}
    compile_blocks(bundle.model, BackendConfig(compile=Switch.on), DistEnv(0, 1, 0, 1, torch.device("cpu")))
    with inductor_config.patch(look):
        out, expected = bundle.model(image, text), theirs(image, text)
        torch.testing.assert_close(out["text_features"], expected["text_features"], atol=1e-5, rtol=0)
        (out["image_features"].sum() + out["text_features"].sum()).backward()
    assert modes == [True] * 4, "forward and backward of both towers: two runs would choose tiles by time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_the_gpu(model, batch):
    model.cuda()
    drop = PatchDropout(0.5).cuda()
    width = blocks(model)[0][1].ln_1.weight.shape[0]
    x = torch.randn(3, 17, width, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            out = drop(x)
            for name, block in blocks(model):
                out = block(out) if "visual" in name else out
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cross_attention_is_refused(model):
    block = blocks(model)[0][1]
    x = torch.randn(2, 3, 32)
    with pytest.raises(NotImplementedError, match="self-attention only"):
        block(x, x, x)


# --- patch dropout


def tokens_of(images: int, patches: int) -> torch.Tensor:
    """(images, 1 + patches, 1): every token carries its own index, the class token 0."""
    return torch.arange(1 + patches, dtype=torch.float32).expand(images, -1)[..., None].clone()


@pytest.mark.parametrize(
    ("patches", "prob", "kept"), [(16, 0.5, 8), (49, 0.5, 24), (10, 0.99, 1), (10, 0.05, 9), (256, 0.75, 64)]
)
def test_patch_dropout_keeps_a_subset_and_the_class_token(patches, prob, kept):
    out = PatchDropout(prob)(tokens_of(50, patches))[..., 0]
    assert out.shape == (50, 1 + kept)
    assert (out[:, 0] == 0).all()
    for row in out[:, 1:].tolist():
        assert len(set(row)) == kept
        assert set(row) <= set(range(1, patches + 1))
    if 1 < kept < patches - 1:
        assert len({frozenset(row) for row in out.tolist()}) > 40  # each image draws for itself


def test_patch_dropout_is_uniform_over_patches_and_over_pairs_of_them():
    images, patches, kept = 20_000, 8, 4
    out = PatchDropout(0.5)(tokens_of(images, patches))[:, 1:, 0].long() - 1
    hit = torch.zeros(images, patches).scatter_(1, out, 1.0)
    for observed, p in (
        (hit.mean(0), kept / patches),
        ((hit.T @ hit / images)[~torch.eye(patches, dtype=torch.bool)], kept * 3 / (patches * 7)),
    ):
        assert (observed - p).abs().max() < 5 * math.sqrt(p * (1 - p) / images)


def test_patch_dropout_off():
    x = tokens_of(2, 9)
    assert PatchDropout(0.5).eval()(x) is x
    assert PatchDropout(0.0)(x) is x
    with pytest.raises(ValueError, match="expected a share in"):
        PatchDropout(1.0)


def test_patch_dropout_follows_the_seed_and_draws_where_its_input_is():
    drop, x = PatchDropout(0.5), tokens_of(4, 20)
    torch.manual_seed(3)
    first = drop(x)
    assert not torch.equal(drop(x), first)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    state = torch.get_rng_state()
    assert drop(x.to("meta")).shape == (4, 11, 1)
    assert torch.equal(torch.get_rng_state(), state), "an input of another device must not draw on the CPU"


def test_patch_dropout_passes_gradients_to_kept_tokens_only():
    x = tokens_of(3, 8).requires_grad_()
    out = PatchDropout(0.5)(x)
    out.sum().backward()
    assert x.grad is not None
    expected = torch.zeros(3, 9).scatter_(1, out[..., 0].long(), 1.0)
    assert torch.equal(x.grad[..., 0], expected)


def test_model_uses_our_patch_dropout(write_config, tiny, batch):
    model = create_model(write_config(tiny()), patch_dropout=0.5).model
    assert isinstance(model.visual.patch_dropout, PatchDropout)
    image, _ = batch()
    lengths = []
    model.visual.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.encode_image(image)
    model.eval().encode_image(image)
    assert lengths == [1 + 8, 1 + 16]

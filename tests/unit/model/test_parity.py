"""Same weights, same function: clipq's models against OpenCLIP's, features and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, TextTransformer

from clipq.model.block import Block
from clipq.model.clip import create_model
from clipq.model.surgery import BlockReport, _replace_in, blocks, replace_blocks
from clipq.model.weights import load_openclip, to_openclip

CUSTOM = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
VARIANTS: dict[str, tuple[dict, dict, dict]] = {  # vision_cfg, text_cfg, beside them
    "plain": ({}, {}, {}),
    "quickgelu": ({}, {}, {"quick_gelu": True}),
    "tanh gelu": ({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}, {}),
    "norm epsilon": ({"norm_kwargs": {"eps": 0.1}}, {"norm_kwargs": {"eps": 0.1}}, {}),
    "layer scale": ({"ls_init_value": 0.5}, {"ls_init_value": 0.0}, {}),
    "mlp ratio": ({"mlp_ratio": 3.5}, {"mlp_ratio": 2.0}, {}),
    **{f"custom {name}": ({name: True}, {name: True}, {}) for name in CUSTOM},
    "custom, all": (dict.fromkeys(CUSTOM, True), dict.fromkeys(CUSTOM, True), {}),
    "custom block": ({"block_type": "custom"}, {"block_type": "custom", "ls_init_value": 0.1}, {}),
    "patch dropout": ({"patch_dropout": 0.5}, {}, {}),
    "average pool": ({"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {}, {}),
    "sine positions": ({"pos_embed_type": "sin_cos_2d"}, {}, {}),
    "attentional pool": ({"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}, {}, {}),
    "bidirectional text": ({}, {"no_causal_mask": True, "pool_type": "last"}, {}),
    "end token": ({}, {"pool_type": "eos"}, {}),
    "custom text": ({}, {"proj_bias": True}, {"custom_text": True, "init_logit_bias": -10}),
    "class token": ({}, {"embed_cls": True}, {"custom_text": True}),
    "class token, bidirectional": ({}, {"embed_cls": True, "no_causal_mask": True}, {"custom_text": True}),
    "class token, qk norm": ({}, {"embed_cls": True, "qk_norm": True}, {"custom_text": True}),
}


def gradients(model, image, text):
    """Features, and gradients under OpenCLIP's keys."""
    out = model(image, text)
    generator = torch.Generator().manual_seed(7)
    features = [out["image_features"], out["text_features"]]
    loss = sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features)
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return features, to_openclip(model, grads)


@pytest.mark.parametrize("name", VARIANTS)
def test_features_and_gradients_equal_openclip(name, pair, tiny, batch):
    vision, text_cfg, top = VARIANTS[name]
    theirs, bundle = pair(tiny(vision, text_cfg, **top))
    image, text = batch()

    features, grads = gradients(bundle.model, image, text)
    their_features, their_grads = gradients(theirs, image, text)

    assert not bundle.report.kept
    assert len(blocks(bundle.model)) == 4
    for ours, other in zip(features, their_features, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
    assert grads.keys() == their_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("cls_mask", ["none", "legacy", "correct"])
def test_padding_mask_is_read_not_taken_for_causal(cls_mask, openclip_model, tiny, batch):
    theirs = openclip_model(tiny(custom_text=True)).eval()
    options = {"no_causal_mask": True, "use_pad_mask": True}
    if cls_mask != "none":
        options |= {"embed_cls": True, "correct_cls_mask": cls_mask == "correct"}
    theirs.text = TextTransformer(10, 64, width=24, heads=3, layers=2, output_dim=20, **options).eval()
    expected = theirs(*(inputs := batch()))
    replace_blocks(theirs)

    assert isinstance(theirs.text.transformer.resblocks[1], Block)
    torch.testing.assert_close(theirs(*inputs), expected, atol=1e-5, rtol=0)


def test_causal_mask_uses_the_flash_path_and_other_masks_do_not(pair, tiny, batch, monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention

    def record(*args, **kwargs):
        calls.append((kwargs["is_causal"], kwargs["attn_mask"] is not None))
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    for text_cfg, expected in (
        ({}, (True, False)),
        ({"no_causal_mask": True}, (False, False)),
        ({"embed_cls": True}, (False, True)),
    ):
        _, bundle = pair(tiny(text=text_cfg, custom_text=True))
        calls.clear()
        bundle.model(None, batch()[1])
        assert calls == [expected] * 2, text_cfg
        calls.clear()
        bundle.model.encode_image(batch()[0])
        assert calls == [(False, False)] * 2


@pytest.mark.parametrize("kind", [ResidualAttentionBlock, CustomResidualAttentionBlock])
@pytest.mark.parametrize("form", ["additive", "boolean", "each head"])
def test_any_mask_equals_the_original_block(kind, form):
    old = kind(32, 4).eval()
    hidden = torch.rand(6, 6) < 0.4
    hidden.fill_diagonal_(False)
    mask = torch.zeros(6, 6).masked_fill(hidden, -torch.inf)
    if form == "boolean":
        mask = hidden if kind is CustomResidualAttentionBlock else mask
    elif form == "each head":
        mask = torch.stack([mask.roll(i, 0).fill_diagonal_(0) for i in range(8)])  # 2 images × 4 heads
    x = torch.randn(2, 6, 32)
    expected = old(x, attn_mask=mask)
    holder = torch.nn.Module()
    holder.resblocks, holder.batch_first = torch.nn.ModuleList([old]), True
    _replace_in(holder, "t", "text", False, BlockReport())
    new_mask = hidden if form == "boolean" else mask
    torch.testing.assert_close(holder.resblocks[0](x, attn_mask=new_mask), expected, atol=1e-5, rtol=0)


def test_cosine_attention_equals_its_definition(write_config, tiny):
    # OpenCLIP's own code for it multiplies four-dimensional tensors with bmm and cannot run: no reference there.
    bundle = create_model(write_config(tiny({"scaled_cosine_attn": True})))
    attn = blocks(bundle.model)[0][1].attn
    with torch.no_grad():
        attn.logit_scale.copy_(torch.tensor([1.0, 2.0, 3.0, 9.0]).view(4, 1, 1))
    x = torch.randn(2, 5, 32)
    q, k, v = attn.in_proj(x).chunk(3, -1)
    heads = []
    for h, scale in enumerate([1.0, 2.0, 3.0, 4.605170185988092]):  # the last is clamped at log 100
        part = slice(8 * h, 8 * h + 8)
        cosine = F.cosine_similarity(q[:, :, None, part], k[:, None, :, part], dim=-1)
        heads.append((cosine * torch.tensor(scale).exp()).softmax(-1) @ v[..., part])
    torch.testing.assert_close(attn(x), attn.out_proj(torch.cat(heads, -1)), atol=1e-5, rtol=1e-5)


def test_autocast_keeps_openclips_types(pair, tiny, batch):
    for settings in ({}, {"qk_norm": True}, {"ls_init_value": 0.1}):
        theirs, bundle = pair(tiny(settings, settings))
        image, text = batch()
        seen = {}
        for which, model in (("theirs", theirs), ("ours", bundle.model)):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(image, text)
                hidden = model.visual._embeds(image)
                types = [(hidden := block(hidden)).dtype for block in model.visual.transformer.resblocks]
            seen[which] = (out["image_features"].float(), out["text_features"].float(), types)
        assert seen["ours"][2] == seen["theirs"][2]
        for ours, other in zip(seen["ours"][:2], seen["theirs"][:2], strict=True):
            torch.testing.assert_close(ours, other, atol=2e-2, rtol=0)


@pytest.mark.parametrize("custom", [False, True])
def test_gradient_checkpointing_changes_nothing(custom, pair, tiny, batch):
    config = tiny({"qk_norm": custom}, {"qk_norm": custom})
    image, text = batch()
    theirs, plain = pair(config)
    checkpointed = pair(config, grad_checkpointing=True)[1].model
    load_openclip(checkpointed, theirs.state_dict())
    expected, actual = gradients(plain.model, image, text), gradients(checkpointed.train(), image, text)
    assert checkpointed.visual.transformer.grad_checkpointing
    assert checkpointed.transformer.grad_checkpointing
    torch.testing.assert_close(actual, expected)


def test_intermediate_features_equal_openclip(pair, tiny, batch):
    theirs, bundle = pair(tiny())
    image, text = batch()
    expected = theirs.forward_intermediates(image, text, image_indices=[0], stop_early=True, text_indices=2)
    actual = bundle.model.forward_intermediates(image, text, image_indices=[0], stop_early=True, text_indices=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_timm_tower(pair, batch):
    config = {
        "embed_dim": 20,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": {"context_length": 10, "vocab_size": 64, "width": 24, "heads": 3, "layers": 2},
        "custom_text": True,
    }
    theirs, bundle = pair(config)
    image, text = batch(2, image=160)
    features, grads = gradients(bundle.model, image, text)
    their_features, their_grads = gradients(theirs, image, text)
    torch.testing.assert_close(features, their_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads, their_grads, atol=1e-5, rtol=1e-4)
    assert len(bundle.report.replaced["text"]) == 2
    assert "timm" in bundle.report.kept["visual"]

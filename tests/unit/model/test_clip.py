"""Models by name and file: settings, reports of the surgery, and messages about mistakes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from torch import nn

from clipq.model.arch import read_architecture
from clipq.model.clip import create_model
from clipq.model.surgery import blocks, replace_blocks

CONFIGS = Path(__file__).parents[3] / "configs"
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}


@pytest.fixture
def config(tiny):
    """Kind of model -> its configuration."""
    vision = {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 4}
    text = {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 10, "vocab_size": 64, "width": 24, "heads": 3, "layers": 2}
    resnet, timm, plain = tiny(), tiny(), tiny()
    resnet["vision_cfg"], timm["vision_cfg"] = RESNET, TIMM
    convolutional, hugging = tiny(), tiny()
    convolutional["vision_cfg"] = {**TIMM, "timm_model_name": "test_mambaout"}
    hugging["text_cfg"] = {"hf_model_name": "roberta-base"}
    coca = tiny(vision, text, multimodal_cfg=decoder, custom_text=True)
    return {
        "plain": plain,
        "resnet": resnet,
        "timm": timm,
        "timm without patches": convolutional,
        "huggingface": hugging,
        "coca": coca,
    }


# --- what comes out


def test_by_name_is_openclips_model_with_the_same_initial_weights():
    torch.manual_seed(5)
    theirs = open_clip.create_model("RN50")
    torch.manual_seed(5)
    bundle = create_model("RN50")
    ours = bundle.model.state_dict()
    key = "transformer.resblocks.11.attn.in_proj"
    assert torch.equal(ours[f"{key}.weight"], theirs.state_dict()[f"{key}_weight"])
    assert torch.equal(ours["visual.layer4.2.conv1.weight"], theirs.state_dict()["visual.layer4.2.conv1.weight"])
    assert bundle.context_length == 77
    tokens = open_clip.get_tokenizer("RN50")(["a photo of a dog"])
    assert torch.equal(bundle.tokenizer(["a photo of a dog"]), tokens)


def test_json_file(write_config, tiny, batch):
    hub_style = {
        "model_cfg": tiny(),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash", "interpolation": "bilinear"},
    }
    bundle = create_model(write_config(hub_style))
    image, text = batch()
    out = bundle.model(image, text)
    assert out["image_features"].shape == out["text_features"].shape == (3, 20)
    torch.testing.assert_close(out["image_features"].norm(dim=-1), torch.ones(3))
    assert bundle.tokenizer(["two", "texts"]).shape == (2, 10)
    pre = bundle.preprocess
    assert (pre.size, pre.mean, pre.resize_mode) == ((32, 32), (0.1, 0.2, 0.3), "squash")
    assert bundle.model.training


def test_settings_reach_both_towers(write_config, tiny, batch):
    bundle = create_model(write_config(tiny()), image_size=48, layer_scale_init=0.0, patch_dropout=0.25, qk_norm=True)
    model = bundle.model
    for _, block in blocks(model):
        for scale in (block.ls_1.gamma, block.ls_2.gamma):
            assert scale.requires_grad
            assert (scale == 0).all()
        assert isinstance(block.attn.ln_q, nn.LayerNorm)
        x = torch.randn(2, 4, block.ln_1.weight.shape[0])
        assert torch.equal(block(x), x)
    assert len(blocks(model)) == 4
    assert bundle.preprocess.size == (48, 48)
    model(*batch(image=48))
    assert bundle.config["vision_cfg"]["patch_dropout"] == 0.25


def test_a_model_keeps_its_own_settings(write_config, tiny):
    config = tiny({"ls_init_value": 0.3, "patch_dropout": 0.5, "qk_norm": True})
    bundle = create_model(write_config(config))
    assert bundle.model.visual.patch_dropout.prob == 0.5
    for name, block in blocks(bundle.model):
        assert hasattr(block.ls_1, "gamma") == isinstance(block.attn.ln_q, nn.LayerNorm) == ("visual" in name)
    assert create_model(write_config(config), patch_dropout=0.0).model.visual.patch_dropout(1) == 1


def test_layer_scale_in_coca_reaches_the_decoder_too(write_config, config):
    model = create_model(write_config(config["coca"]), layer_scale_init=0.5).model
    gammas = [name for name, p in model.named_parameters() if name.endswith("gamma") and (p == 0.5).all()]
    assert {name.split(".")[0] for name in gammas} == {"visual", "text", "text_decoder"}


def test_timm_tower_takes_size_dropout_and_checkpointing(write_config, config, batch):
    settings = {"image_size": 96, "patch_dropout": 0.5, "grad_checkpointing": True}
    bundle = create_model(write_config(config["timm"]), **settings)
    assert bundle.preprocess.size == (96, 96)
    assert bundle.model.visual.trunk.grad_checkpointing
    bundle.model(*batch(image=96))["image_features"].sum().backward()


def test_timm_tower_takes_the_size_in_the_file(write_config, config, batch):
    config["timm"]["vision_cfg"] = {**TIMM, "image_size": 96}
    bundle = create_model(write_config(config["timm"]))
    assert bundle.preprocess.size == (96, 96)
    bundle.model(*batch(image=96))


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("test_vit", 100, "multiple of its patches of 16, such as 96"),
        ("mixer_s32_224", 160, "expected 224, the only one"),
    ],
)
@pytest.mark.parametrize("where", ["file", "setting"])
def test_timm_tower_of_another_size(write_config, config, name, size, says, where):
    own = {"image_size": size} if where == "file" else {}
    config["timm"]["vision_cfg"] = {**TIMM, "timm_model_name": name, **own}
    with pytest.raises(
        ValueError, match=rf"image size of {size} with the timm model {name}: .*{says}.*model.image_size"
    ):
        create_model(write_config(config["timm"]), image_size=None if where == "file" else size)


def test_openclip_neither_warns_nor_installs_log_handlers(write_config, tiny, caplog):
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters))
    create_model(write_config(tiny()))
    assert not caplog.records
    assert (list(root.handlers), list(root.filters)) == before


# --- the report of the surgery


@pytest.mark.parametrize(
    ("kind", "replaced", "kept"),
    [
        ("plain", {"visual": 2, "text": 2}, {}),
        ("resnet", {"text": 2}, {"visual": "ResNet"}),
        ("timm", {"text": 2}, {"visual": "timm"}),
        ("coca", {}, {"visual": "CoCa", "text": "CoCa", "text_decoder": "CoCa"}),
    ],
)
def test_report(kind, replaced, kept, write_config, config):
    bundle = create_model(write_config(config[kind]))
    assert {tower: len(names) for tower, names in bundle.report.replaced.items()} == replaced
    assert bundle.report.kept.keys() == kept.keys()
    for tower, word in kept.items():
        assert word in bundle.report.kept[tower]
        assert any(line.startswith(f"{tower}: own blocks kept") for line in bundle.report.lines())
    names = [name for names in bundle.report.replaced.values() for name in names]
    assert sorted(names) == sorted(name for name, _ in blocks(bundle.model))


def test_report_of_a_hugging_face_text_tower(openclip_model, tiny):
    model = openclip_model(tiny(custom_text=True))
    model.text = HFTextEncoder.__new__(HFTextEncoder)  # building one takes the package transformers
    nn.Module.__init__(model.text)
    report = replace_blocks(model)
    assert "Hugging Face" in report.kept["text"]
    assert len(report.replaced["visual"]) == 2


def test_report_of_single_blocks_that_stay(openclip_model, tiny, batch):
    model = openclip_model(tiny(custom_text=True)).eval()
    assert isinstance(model, CustomTextCLIP)
    model.text.transformer.resblocks[0].attn.dropout = 0.1
    model.visual.transformer.resblocks[1] = nn.TransformerEncoderLayer(32, 4)
    report = replace_blocks(model)
    assert "dropout" in report.kept["text.transformer.resblocks.0"]
    assert "TransformerEncoderLayer" in report.kept["visual.transformer.resblocks.1"]
    assert report.replaced == {
        "visual": ["visual.transformer.resblocks.0"],
        "text": ["text.transformer.resblocks.1"],
    }
    model.encode_text(batch()[1])


# --- mistakes


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("timm", {"layer_scale_init": 0.0}, r"model.layer_scale_init=0.0 .*timm model test_vit.*=null.*ViT-B-32"),
        ("resnet", {"layer_scale_init": 0.0}, r"model.layer_scale_init=0.0 .*is a ResNet.*ViT-B-32"),
        ("huggingface", {"layer_scale_init": 1.0}, r"Hugging Face model roberta-base"),
        ("timm", {"qk_norm": True}, r"model.qk_norm=true .*timm model test_vit.*model.qk_norm=false"),
        ("resnet", {"qk_norm": True}, r"model.qk_norm=true .*ResNet"),
        ("coca", {"qk_norm": True}, r"model.qk_norm=true .*CoCa"),
        ("resnet", {"patch_dropout": 0.5}, r"model.patch_dropout=0.5 .*ResNet.*no\s+patches"),
        ("timm without patches", {"patch_dropout": 0.5}, r"model.patch_dropout=0.5 .*test_mambaout.*null"),
        ("plain", {"patch_dropout": 1.0}, r"model.patch_dropout=1.0: expected a share in \[0, 1\)"),
        ("resnet", {"grad_checkpointing": True}, r"model.grad_checkpointing=true .*ResNet.*false"),
        ("plain", {"image_size": 50}, r"model.image_size=50 .*multiple of 8, such as 48"),
        ("resnet", {"image_size": 100}, r"model.image_size=100 .*multiple of 32, such as 96"),
        ("plain", {"pretrained": "openai"}, r"model.pretrained=openai .*no tags, only a file"),
        ("huggingface", {}, r"cannot build it"),
    ],
)
def test_settings_that_a_model_cannot_honour(kind, settings, message, write_config, config):
    path = write_config(config[kind])
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        create_model(path, **settings)
    assert "tiny.json" in str(caught.value) or "patch_dropout=1.0" in str(caught.value)


def test_timm_tower_without_gradient_checkpointing(write_config, config, monkeypatch):
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing", None)
    with pytest.raises(ValueError, match=r"model.grad_checkpointing=true .*timm model"):
        create_model(write_config(config["timm"]), grad_checkpointing=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B32", r"'ViT-B32' is neither .*Did you mean ViT-B-32.*list_models"),
        ("vit-h-14", r"Did you mean ViT-H-14"),
        ("qqqq", r"'qqqq' is neither an OpenCLIP model nor a path to a .json file. All names"),
        ("nowhere/tiny.json", r"nowhere/tiny.json: there is no such file"),
        ("local-dir:/nowhere", r"local-dir:/nowhere: OpenCLIP cannot read"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"embed_dim": 8,', r"not valid JSON at line 1, column 17"),
        ("[1, 2]", r"expected a JSON object, got list"),
        ('{"embed_dim": 8, "vision_cfg": {}}', r"text_cfg missing"),
        ('{"model_cfg": 3}', r"embed_dim, vision_cfg, text_cfg missing"),
        ({"quickgelu": True}, r"unknown key quickgelu. Did you mean quick_gelu\?"),
        (
            {"vision_cfg": {"widht": 3}},
            r"unknown key vision_cfg.widht. Did you mean width, .*Known: layers",
        ),
        ({"text_cfg": {"embed_cls": True}}, r'embed_cls needs "custom_text": true'),
        ({"text_cfg": 3}, r"text_cfg must be a JSON object, got int"),
        ({"vision_cfg": {"width": "wide"}}, r"OpenCLIP cannot build it: TypeError"),
        ({"vision_cfg": {"width": 30, "head_width": 4}}, r"OpenCLIP cannot build it: AssertionError: embed_dim"),
        ({"vision_cfg": {"timm_model_name": "vit_none"}}, r"OpenCLIP cannot build it: .*vit_none"),
    ],
)
def test_bad_json(content, message, tiny, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps({**tiny(), **content}))
    with pytest.raises(ValueError, match=message) as caught:
        create_model(str(path))
    assert str(path) in str(caught.value)


def test_tag_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nand much more")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(ValueError, match=r"model.pretrained=cc12m with RN50: the download failed.*") as caught:
        create_model("RN50", pretrained="cc12m")
    assert "give the file: model.pretrained=PATH" in str(caught.value)
    assert "much more" not in str(caught.value)


def test_unknown_tag_lists_the_tags():
    with pytest.raises(ValueError, match=r"model.pretrained=laion with RN50: neither.*openai, yfcc15m"):
        create_model("RN50", pretrained="laion")


def test_tokenizer_out_of_reach(write_config, tiny):
    with pytest.raises(ValueError, match=r"(?s)cannot load its tokenizer no/such/thing: .*Hugging Face hub"):
        create_model(write_config(tiny(text={"hf_tokenizer_name": "no/such/thing"})))


# --- the models that come with clipq


@pytest.mark.parametrize("path", sorted((CONFIGS / "arch").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_architectures_hold_together(path):
    config = read_architecture(str(path)).config
    vision, text = config["vision_cfg"], config["text_cfg"]
    assert vision["width"] % vision.get("head_width", 64) == 0
    assert vision["image_size"] % vision["patch_size"] == 0
    assert text["width"] % text["heads"] == 0
    assert text["vocab_size"] == 49408, "what the tokenizer of OpenCLIP knows"


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_model_settings_name_a_model(path):
    name = next(line for line in path.read_text().splitlines() if line.startswith("name:")).split()[1]
    assert (CONFIGS / "arch" / f"{name}.json").is_file() or name in open_clip.list_models()

"""Weights between clipq and OpenCLIP, through every kind of file; nothing dangerous or half-written."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clipq.model.clip import create_model
from clipq.model.weights import (
    WeightsError,
    load_openclip,
    read_preprocess,
    read_weights,
    save_weights,
    to_openclip,
)

KINDS = {
    "plain": ({}, {}, {}),
    "custom blocks": ({"qk_norm": True, "scale_fc": True}, {"scale_attn": True, "scale_heads": True}, {}),
    "layer scale, custom text": ({"ls_init_value": 0.1}, {"embed_cls": True}, {"custom_text": True}),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, {}, {}),
}


def same(a, b):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


# --- keys


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_openclips_both_ways(kind, write_config, tiny, openclip_model):
    vision, text, top = KINDS[kind]
    if kind == "resnet":
        vision = {**vision, "head_width": 64}
    config = tiny(vision, text, **top)
    theirs, other = openclip_model(config), openclip_model(config)
    ours = create_model(write_config(config)).model
    assert sorted(to_openclip(ours)) == sorted(theirs.state_dict())

    load_openclip(ours, theirs.state_dict())
    same(to_openclip(ours), theirs.state_dict())
    other.load_state_dict(to_openclip(ours), strict=True)
    same(other.state_dict(), theirs.state_dict())


def test_a_gathered_state_dict_is_renamed_like_the_models_own(write_config, tiny):
    model = create_model(write_config(tiny())).model
    gathered = {name: p.grad if p.grad is not None else p + 1 for name, p in model.named_parameters()}
    renamed = to_openclip(model, gathered)
    assert renamed.keys() == to_openclip(model).keys()
    assert not any(t.requires_grad for t in renamed.values())


def test_names_of_other_modules_stay(write_config):
    # timm blocks and OpenCLIP's poolers have projections of their own
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 10, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    model = create_model(write_config(config)).model
    keys = set(to_openclip(model))
    assert {k for k in keys if k.startswith("visual.")} == {k for k in model.state_dict() if "visual." in k}
    assert "text.transformer.resblocks.0.attn.in_proj_weight" in keys


# --- files


@pytest.fixture
def saved(write_config, tiny, tmp_path):
    """(config, model, path of its weights)."""
    config = tiny()
    model = create_model(write_config(config)).model
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    return config, model, path


def test_openclip_loads_our_file(saved, openclip_model):
    config, model, path = saved
    theirs = openclip_model(config)
    open_clip.load_checkpoint(theirs, str(path), strict=True)
    same(theirs.state_dict(), to_openclip(model))


def test_our_file_is_small_independent_and_complete(saved, tiny):
    _, model, path = saved
    size = sum(t.numel() * 4 for t in model.state_dict().values())
    assert size < path.stat().st_size < size + 20_000
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("form", ["bare", "checkpoint", "ddp", "ddp and compile", "legacy pickle", "safetensors"])
def test_openclip_files_load(form, saved, write_config, openclip_model, tmp_path):
    config = saved[0]
    theirs = openclip_model(config)
    state = theirs.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "bare":
        torch.save(state, path)
    elif form == "legacy pickle":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        prefix = {"checkpoint": "", "ddp": "module.", "ddp and compile": "module._orig_mod."}[form]
        optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
        state_dict = {prefix + k: v for k, v in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state_dict, "optimizer": optimizer}, path)
    same(to_openclip(create_model(write_config(config), pretrained=str(path)).model), state)


def test_folders(saved, tmp_path):
    _, model, path = saved
    run = tmp_path / "run"
    for step, scale in (("step_00000009", 1.0), ("step_00000010", 2.0), ("step_00000011.tmp", 3.0)):
        folder = run / "checkpoints" / step
        folder.mkdir(parents=True)
        save_file({"x": torch.full((1,), scale)}, folder / "model.safetensors")
    (run / "checkpoints" / "step_00000012").mkdir()  # being written: no weights yet
    assert read_weights(run)["x"] == 2.0
    assert read_weights(run / "checkpoints" / "step_00000009")["x"] == 1.0
    same(read_weights(path.parent), to_openclip(model))


def test_preprocessing_travels_with_the_weights(write_config, tiny, tmp_path):
    stored = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    first = create_model(write_config({"model_cfg": tiny(), "preprocess_cfg": stored}))
    save_weights(first.model, tmp_path / "a.safetensors")
    second = create_model(write_config(tiny()), pretrained=str(tmp_path / "a.safetensors"), image_size=48)
    assert second.preprocess.mean == (0.5, 0.5, 0.5)
    assert second.preprocess.resize_mode == "squash"
    assert second.preprocess.size == (48, 48)
    assert read_preprocess(tmp_path / "a.safetensors")["size"] == [32, 32]


def test_shared_and_strided_tensors_are_saved_whole(tmp_path):
    model = nn.Module()
    model.register_parameter("a", nn.Parameter(torch.arange(12.0).view(3, 4)))
    model.register_buffer("tied", model.a.detach())
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    model.register_buffer("part", torch.arange(1000.0)[10:12])
    save_weights(model, tmp_path / "m.safetensors")
    same(load_file(tmp_path / "m.safetensors"), dict(model.state_dict()))
    assert (tmp_path / "m.safetensors").stat().st_size < 1000


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    _, model, path = saved
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("clipq.model.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(model, path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*tmp"))


# --- fitting into another model


def test_position_embeddings_are_interpolated_as_openclip_does(write_config, tiny, openclip_model, tmp_path):
    small = openclip_model(tiny())
    large = tiny({"image_size": 48}, {"context_length": 14})
    torch.save(small.state_dict(), tmp_path / "small.pt")
    theirs = openclip_model(large)
    open_clip.load_checkpoint(theirs, str(tmp_path / "small.pt"))
    ours = create_model(write_config(large), pretrained=str(tmp_path / "small.pt")).model
    same(to_openclip(ours), theirs.state_dict())

    half = {k: v.half() for k, v in small.state_dict().items()}
    load_openclip(ours, half)
    assert ours.visual.positional_embedding.dtype == torch.float32


def test_timm_position_embeddings_are_interpolated(write_config, batch, tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 10, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}
    config = write_config({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})
    first = create_model(config).model
    save_weights(first, tmp_path / "w.safetensors")
    second = create_model(config, pretrained=str(tmp_path / "w.safetensors"), image_size=96).model
    first.visual.set_input_size(96)  # timm's own way
    image = batch(image=96)[0]
    torch.testing.assert_close(second.eval().encode_image(image), first.eval().encode_image(image))


def test_old_key_layout_and_vector_logit_scale(write_config, tiny, openclip_model):
    old = openclip_model(tiny()).state_dict()
    old["logit_scale"] = old["logit_scale"].reshape(1)
    model = create_model(write_config(tiny(custom_text=True))).model
    load_openclip(model, old)
    assert torch.equal(model.text.token_embedding.weight, old["token_embedding.weight"])
    assert model.logit_scale.shape == ()


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"layer_scale_init": 0.0}, None, r"8 missing: .*ls_1.gamma.*no layer scale: leave model.layer_scale_init"),
        ({"qk_norm": True}, None, r"16 missing: .*…\n  They have no query-key norm: set model.qk_norm=false"),
        ({}, ("extra.weight", torch.ones(1)), r"1 unexpected: extra.weight"),
        ({}, ("visual.proj", torch.ones(32, 4)), r"1 of another shape: visual.proj: \(32, 4\) .*\(32, 20\)"),
        ({}, ("positional_embedding", torch.ones(10, 5)), r"positional_embedding: \(10, 5\) .*\(10, 24\)"),
        ({}, ("visual.positional_embedding", torch.ones(12, 32)), r"\(12, 32\) where the model has \(17, 32\)"),
    ],
)
def test_what_does_not_fit(settings, change, message, write_config, tiny, openclip_model, tmp_path):
    state = openclip_model(tiny()).state_dict()
    if change:
        state[change[0]] = change[1]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=f"(?s)w.safetensors into .*tiny.json.*{message}"):
        create_model(write_config(tiny()), pretrained=str(tmp_path / "w.safetensors"), **settings)


def test_a_model_is_unchanged_by_weights_that_do_not_fit(write_config, tiny, openclip_model):
    model = create_model(write_config(tiny())).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = openclip_model(tiny()).state_dict()
    del state["logit_scale"]
    with pytest.raises(WeightsError, match="1 missing: logit_scale"):
        load_openclip(model, state)
    same(dict(model.state_dict()), before)


# --- files that are refused


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "raw pickle", "beside good weights"])
def test_a_pickle_that_runs_code_is_refused(form, tmp_path):
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {"weight": torch.ones(2)}, "epoch": Evil(target)}
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(Evil(target), protocol=2))
    else:
        torch.save(content if "good" in form else Evil(target), path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(WeightsError, match=r"evil.pt: refers to posix.system.*clipq refuses"):
        read_weights(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "damaged"),
        ("a.pt", b"not a checkpoint at all", "weights .*a.pt: "),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}", "not a readable safetensors file"),
        ("a.npz", b"x", "expected .safetensors, .pt, .pth or .bin"),
        ("missing.pt", None, "there is no such file or folder"),
        ("folder", None, "neither a clipq checkpoint .model.safetensors. nor a run folder"),
        ("a.pt", [1, 2], "holds no state dict but list"),
        ("a.pt", {}, "holds no state dict"),
        ("a.pt", {"state_dict": {"w": torch.ones(1), "epoch": 3}}, r"a tensor for every key, not so for \['epoch'\]"),
    ],
)
def test_files_that_hold_no_weights(name, content, message, tmp_path):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused(suffix, saved, tmp_path):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(to_openclip(saved[1]), path)
    else:
        path.write_bytes(saved[2].read_bytes())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="cut"):
        read_weights(path)


def test_torchscript_archives_are_explained(tmp_path):
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:  # the members of such an archive
        for member in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"jit/{member}", b"")
    with pytest.raises(WeightsError, match=r"TorchScript archive.*model.pretrained=openai"):
        read_weights(tmp_path / "jit.pt")

"""Weight files: read, written and mapped with OpenCLIP's own keys.

In memory the fused projection of our `Attention` is a linear layer, `….attn.in_proj.weight`, where OpenCLIP
has a bare parameter, `….attn.in_proj_weight`. On disk there are OpenCLIP's keys only. The mapping is a step
of its own, not a state-dict hook: hooks that rename keys break torch.distributed's `get_model_state_dict`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from clipq.model.packed import unpacked
from clipq.model.surgery import blocks
from clipq.optim.shards import laid_out_as

MODEL_FILE = "model.safetensors"
HUB_FILE = "open_clip_model.safetensors"
"""As OpenCLIP looks for it on the Hugging Face hub."""
PACKED_FILE = "packed.safetensors"
"""In 8 bits (packed.py), which OpenCLIP does not read."""
CONFIG_FILE = "open_clip_config.json"
"""Architecture and preprocessing beside weights, as on the Hugging Face hub."""
_PREPROCESS = "preprocess_cfg"
_HINTS = {
    "ls_1.gamma": "layer scale: leave model.layer_scale_init unset, or train without these weights",
    "ln_q.weight": "query-key norm: set model.qk_norm=false, or train without these weights",
}


class WeightsError(ValueError):
    """A weight file cannot be read, or does not fit the model; the message says why and what would."""


# --- keys ---------------------------------------------------------------------


def key_map(model: nn.Module) -> dict[str, str]:
    """Our key -> OpenCLIP's key, for the parameters where the two differ."""
    return {
        f"{name}.attn.in_proj.{leaf}": f"{name}.attn.in_proj_{leaf}"
        for name, block in blocks(model)
        for leaf, _ in block.attn.in_proj.named_parameters(recurse=False)
    }


def to_openclip(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model under OpenCLIP's keys, detached, not copied.

    Args:
        model: not wrapped by DDP; compiled blocks are fine.
        state_dict: take the tensors from here, such as gradients; None for the model's own.
    """
    renamed = key_map(model)
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {renamed.get(key, key): tensor.detach() for key, tensor in state_dict.items()}


def from_openclip(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_openclip`: tensors under the keys of `model.state_dict()`."""
    renamed = {theirs: ours for ours, theirs in key_map(model).items()}
    return {renamed.get(key, key): tensor for key, tensor in state_dict.items()}


# --- into a model -------------------------------------------------------------


def load_openclip(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str = "these weights") -> None:
    """Copies weights with OpenCLIP's keys into a model, every one of them; under FSDP each rank takes its shards.

    Position embeddings of another image size or context length are interpolated as OpenCLIP does. Checkpoints
    from before OpenCLIP moved the text tower to `text.` load too.

    Args:
        source: what the error calls the weights.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape. The model is unchanged then.
    """
    expected = to_openclip(model)
    given = dict(state_dict)
    if "positional_embedding" in given and "positional_embedding" not in expected:
        given = convert_to_custom_text_state_dict(given)
    given.pop("text.transformer.embeddings.position_ids", None)  # transformers 4.31 ceased to store it
    for key in ("logit_scale", "logit_bias"):
        if key in given and key in expected and given[key].numel() == expected[key].numel() == 1:
            given[key] = given[key].reshape(expected[key].shape)
    _resize_positions(model, given, expected)
    problems = _differences(given, expected)
    if problems:
        raise WeightsError(f"{source}: not the weights of this model\n" + "\n".join(problems))
    laid_out = {key: laid_out_as(expected[key], tensor) for key, tensor in given.items()}
    model.load_state_dict(from_openclip(model, laid_out), strict=True)


def _resize_positions(model: nn.Module, given: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Interpolates, in `given`, position embeddings that differ from the model's in their number alone."""
    keys = (
        "visual.positional_embedding",
        "visual.trunk.pos_embed",
        "positional_embedding",
        "text.positional_embedding",
    )
    for key in keys:
        if key not in given or key not in expected or given[key].shape == expected[key].shape:
            continue
        if given[key].ndim != expected[key].ndim or given[key].shape[-1] != expected[key].shape[-1]:
            continue  # another width: reported as a difference
        given[key] = given[key].float()  # bicubic interpolation has no fp16 on the CPU
        old, new = tuple(given[key].shape), tuple(expected[key].shape)
        if key == "visual.positional_embedding":
            if math.isqrt(old[0] - 1) ** 2 == old[0] - 1:
                resize_pos_embed(given, model)
        elif key == "visual.trunk.pos_embed":
            _resize_timm(model, given, key)
        else:
            resize_text_pos_embed(given, model)
        logging.getLogger(__name__).info("%s interpolated from %s to %s", key, old, new)


def _resize_timm(model: nn.Module, given: dict[str, Tensor], key: str) -> None:
    trunk: Any = model.get_submodule("visual.trunk")
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if grid is None or given[key].ndim != 3:
        return
    prefix = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 0)
    given[key] = resample_abs_pos_embed(given[key], new_size=list(grid), num_prefix_tokens=prefix)


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key}: {tuple(given[key].shape)} where the model has {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    problems = [
        f"  {len(items)} {kind}: {'; '.join(items[:6])}{'; …' if len(items) > 6 else ''}"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if items
    ]
    return problems + [f"  They have no {hint}" for hint in advice(missing)]


def advice(missing: Iterable[str]) -> list[str]:
    """What to do about weights that lack these keys."""
    missing = list(missing)
    return [hint for suffix, hint in _HINTS.items() if any(key.endswith(suffix) for key in missing)]


# --- files --------------------------------------------------------------------


def find_weights(path: str | Path) -> Path:
    """The weight file that a path stands for.

    Args:
        path: a file; a folder that is a clipq checkpoint, or that `clipq-export` wrote; or a clipq run folder: its
            newest checkpoint is taken.

    Raises:
        WeightsError: there is nothing of the kind.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"weights {path}: there is no such file or folder")
    for name in (MODEL_FILE, HUB_FILE, PACKED_FILE):
        if (path / name).is_file():
            return path / name
    steps = {}
    for candidate in path.glob(f"checkpoints/step_*/{MODEL_FILE}"):
        digits = candidate.parent.name.removeprefix("step_")
        if digits.isdecimal():  # not one that is being written under another name
            steps[int(digits)] = candidate
    if not steps:
        raise WeightsError(
            f"weights {path}: neither a clipq checkpoint ({MODEL_FILE}) nor a run folder "
            f"(checkpoints/step_*/{MODEL_FILE})"
        )
    return steps[max(steps)]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads weights on the CPU, under the keys of the file. Unpickles nothing but tensors and plain values.

    Args:
        path: `.safetensors`; `.pt`, `.pth` or `.bin` of OpenCLIP (bare weights or a training checkpoint with
            `state_dict`, `module.` prefixes removed); or a folder, see `find_weights`.

    Raises:
        WeightsError: nothing there, damaged, of an unknown kind, or a pickle of anything but tensors.
    """
    file = find_weights(path)
    if file.suffix == ".safetensors":
        try:
            return unpacked(load_file(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"weights {file}: not a readable safetensors file: {error}") from error
    if file.suffix not in (".pt", ".pth", ".bin"):
        raise WeightsError(f"weights {file}: expected .safetensors, .pt, .pth or .bin")
    return _tensors(file, _unpickle(file))


def _unpickle(file: Path) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            scripted = any("/code/" in name for name in archive.namelist())
        if scripted:
            raise WeightsError(
                f"weights {file}: a TorchScript archive, as OpenAI published its models: it holds a "
                "program beside the weights. Use the tag (model.pretrained=openai), or save its state dict"
            )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"refers to {found.group(1)}" if found else "cannot be read as tensors and plain values"
        raise WeightsError(
            f"weights {file}: {what}. Unpickling anything but tensors could run code, so clipq refuses: "
            "where you trust its origin, load it yourself and save its state dict as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"weights {file}: damaged, or no file of torch.save: {error}") from error


def _tensors(file: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"weights {file}: holds no state dict but {type(content).__name__}")
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"weights {file}: expected a tensor for every key, not so for {strange[:4]}")
    tensors = dict(content)
    for prefix in ("module.", "_orig_mod."):  # of DDP, then of torch.compile, as they nest
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def read_preprocess(path: str | Path) -> dict[str, Any]:
    """The image preprocessing stored by `save_weights`; empty for files of other origin."""
    file = find_weights(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return json.loads(metadata.get(_PREPROCESS, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"weights {file}: its metadata cannot be read: {error}") from error


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes a `.safetensors` file with OpenCLIP's keys, whole or not at all.

    `open_clip.create_model(name, pretrained=path)` reads it. Its metadata carry the image preprocessing.

    Args:
        model: not wrapped by DDP.
    """
    write_weights(to_openclip(model), preprocess_of(model), path)


def preprocess_of(model: nn.Module) -> dict[str, Any]:
    """The image preprocessing that `read_preprocess` gives where `write_weights` has got it."""
    return getattr(getattr(model, "visual", None), _PREPROCESS, {})


def write_weights(weights: Mapping[str, Tensor], preprocess: dict[str, Any], path: str | Path) -> None:
    """`save_weights` of what was taken from a model before: its weights under OpenCLIP's keys, its preprocessing."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            _independent(weights),
            beside,
            metadata={"format": "pt", _PREPROCESS: json.dumps(preprocess)},
        )
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def _independent(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none of which shares memory with another: safetensors demands it."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state_dict.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

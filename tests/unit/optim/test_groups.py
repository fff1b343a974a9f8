from __future__ import annotations

from pathlib import Path

from clipq.model.clip import create_model
from clipq.optim.groups import decay_groups


def test_every_parameter_once_and_gains_without_decay(arch: Path) -> None:
    model = create_model(str(arch), layer_scale_init=0.0, qk_norm=True).model
    frozen = model.visual.conv1.weight  # pyright: ignore
    frozen.requires_grad_(False)
    decayed, plain = decay_groups(model, 0.2)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in (decayed, plain):
        assert [names[id(p)] for p in group["params"]] == group["param_names"]
    everything = decayed["param_names"] + plain["param_names"]
    assert sorted(everything) == sorted(set(names.values()) - {"visual.conv1.weight"})
    without = ("bias", "logit_scale", "gamma", "ln_", "class_embedding", "ln_q", "ln_k")
    assert all(any(w in n for w in without) for n in plain["param_names"])
    assert not any(n.endswith("bias") or "gamma" in n for n in decayed["param_names"])


def test_no_empty_group() -> None:
    from torch import nn

    assert len(decay_groups(nn.LayerNorm(4), 0.1)) == 1

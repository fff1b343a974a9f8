"""StableAdamW: AdamW with AdaFactor's update clipping, for any torch program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clipq.kernels.stable_adamw import Hyper, Tensors, foreach, reference
from clipq.optim.shards import all_local, local, local_grad, reducer

FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class StableAdamW(Optimizer):
    """AdamW whose update of a tensor is smaller where its second moment is out of date.

    For each tensor RMS_t = sqrt(mean(g_t² / max(û_t, ε²))) is about 1 while the second moment û_t describes the
    gradients, and large where it underestimates them, as after a sudden change of the learning signal. Learning rate
    and weight decay of a step are divided by max(1, RMS_t / clip_threshold). Source: Wortsman et al., "Stable and
    low-precision training for large-scale vision-language models", https://arxiv.org/abs/2304.13013, algorithm 2; the
    clipping is AdaFactor's (Shazeer and Stern, https://arxiv.org/abs/1804.04235).

    Its defaults are not torch's: eps 1e-6, β2 0.99 and no weight decay. `amsgrad`, `maximize` and `differentiable` are
    not there.

    The state has the names and values of `torch.optim.AdamW`'s, so each loads the other's (torch then takes `foreach`,
    `fused` and `capturable` for not given: set them in its groups again), and is float32 for bf16 and
    fp16 parameters too. Under FSDP2 (DTensor parameters) the mean runs over the whole tensor, with one all-reduce for
    all tensors.

    Args:
        params: parameters, or groups with their own values of what follows.
        lr: a float, or a tensor for CUDA graphs.
        betas: decays of the first and second moment. The paper finds β2 below 0.999 better for large models.
        eps: ε, added to the root of the second moment, and the least that the root of it counts for in RMS_t.
        weight_decay: decoupled, scaled by the clipped rate.
        clip_threshold: RMS_t above which a step is clipped; `math.inf` gives AdamW of the same settings.
        beta2_power: λ of the schedule β2 = 1 - t^(-λ) in place of a constant β2; None for none.
        foreach: torch's operators over lists of tensors.
        fused: two Triton kernels for all tensors; needs CUDA. If neither is given: `fused` where every parameter can
            be, else `foreach`; `foreach=False` goes tensor by tensor.
        capturable: keep the steps on the parameters' device, so that a step can be recorded as a CUDA graph; `fused`
            always does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        beta2_power: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "beta2_power": beta2_power,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check(group)
        self._asked = foreach, fused, capturable
        self._choose_path()
        self._rms: list[tuple[list[Tensor], Tensor]] = []
        self._caches: dict[torch.device, dict[Any, Any]] = {}

    @property
    def rms(self) -> dict[Tensor, Tensor]:
        """RMS_t of the last step that was made, a [] tensor on the device for each parameter that had a gradient.

        A new dictionary at each reading.
        """
        return {p: value for params, rms in self._rms for p, value in zip(params, rms.clone().unbind(), strict=True)}

    def _choose_path(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self._devices = {p.device for p in params}
        foreach, fused, capturable = self._asked
        self._path = _path(params, foreach, fused, capturable)
        self._steps_on_device = capturable or self._path == "fused"
        self._step_supports_amp_scaling = self._path == "fused"  # what torch.amp.GradScaler asks for

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if not hasattr(self, "_path"):
            return
        group = self.param_groups[-1]  # added later
        try:
            _check(group)
            if self._path == "fused":
                _require_fusable(group["params"])
        except ValueError:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {  # pyright: ignore[reportAttributeAccessIssue]
            "_asked": self._asked,
            "_devices": self._devices,
            "_path": self._path,
            "_steps_on_device": self._steps_on_device,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rms, self._caches = [], {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this optimizer or of `torch.optim.AdamW`; settings that it lacks keep their defaults.

        Raises:
            ValueError: it is of another optimizer, of an AdamW with `amsgrad` or `maximize`, or does not fit the
                parameters.
        """
        taken: dict[Tensor, dict[str, Tensor]] = {}
        # the last of the hooks before sees what the others made of the state; of those after, the first is ours
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, state: taken.update(self._fitting(state))),
            self.register_load_state_dict_post_hook(lambda _: self._take(taken), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _fitting(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """State by parameter, as far as a state dict has one, before anything is changed."""
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"StableAdamW: the state is of an optimizer with {name}=True, which it lacks")
            if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
                raise ValueError("StableAdamW: the state is of torch.optim.Adam, whose weight decay is not decoupled")
        for state in state_dict["state"].values():
            missing = {"step", "exp_avg", "exp_avg_sq"} - state.keys()
            if missing:
                raise ValueError(
                    f"StableAdamW: the state is of another optimizer: it has no {', '.join(sorted(missing))}"
                )
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        if len(saved) != len(own):
            return {}  # torch says so
        found = {p: state_dict["state"][i] for i, p in zip(saved, own, strict=True) if i in state_dict["state"]}
        for p, state in found.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    raise ValueError(
                        f"StableAdamW: the state does not fit: {name} of shape {tuple(state[name].shape)} for a "
                        f"parameter of shape {tuple(p.shape)}"
                    )
        return found

    def _take(self, taken: dict[Tensor, dict[str, Tensor]]) -> None:
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for p, values in taken.items():
            state = self.state[p]
            state["step"] = self._new_step(p, values["step"])
            for name in ("exp_avg", "exp_avg_sq"):  # torch casts them to the parameter's type, which may be bf16
                state[name] = torch.zeros_like(p, dtype=_moment_type(p)).copy_(values[name])
        self._caches.clear()

    def _new_step(self, p: Tensor, value: Any = 0.0) -> Tensor:
        """Steps done by a parameter; a tensor of its own."""
        value = value.item() if isinstance(value, Tensor) else float(value)
        return torch.tensor(value, dtype=torch.float32, device=p.device if self._steps_on_device else "cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step. Parameters without a gradient are left alone.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._rms = []
        devices = dict.fromkeys(p.device for group in self.param_groups for p in group["params"])
        if devices.keys() != self._devices and not self.state:  # the model was moved after the optimizer was made
            self._choose_path()
        for device in devices:
            self._step_on(device)
        return loss

    def _step_on(self, device: torch.device) -> None:
        params: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        groups: list[int] = []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None or p.device != device:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        "StableAdamW: a gradient is sparse, which is not supported; use torch.optim.SparseAdam"
                    )
                state = self.state[p]
                if not state:
                    state.update(self._new_state(p))
                elif self._path == "fused":
                    _lay_out(state, p)
                params.append(p)
                states.append(state)
                groups.append(number)
        if not params:
            return
        told = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))  # by torch.amp.GradScaler
        grad_scale, found_inf = (None if t is None else t.to(device, non_blocking=True) for t in told)
        tensors = Tensors(
            params=all_local(params),
            grads=[local_grad(p) for p in params],
            exp_avgs=all_local([s["exp_avg"] for s in states]),
            exp_avg_sqs=all_local([s["exp_avg_sq"] for s in states]),
            steps=[s["step"] for s in states],
            numels=[p.numel() for p in params],  # of a DTensor those of the whole
            groups=groups,
            hypers=[_hyper(group) for group in self.param_groups],
            grad_scale=grad_scale,
            found_inf=found_inf,
            cache=self._caches.setdefault(device, {}),
        )
        self._rms.append((params, _implementation(self._path).step(tensors, reducer(params))))

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(p, dtype=_moment_type(p), memory_format=torch.preserve_format)
        return {"step": self._new_step(p), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _lay_out(state: dict[str, Tensor], p: Tensor) -> None:
    """Lays moments out as the parameter is, which may have changed since they were made: to channels_last, say."""
    if local(state["exp_avg"]).stride() != local(p).stride():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.empty_like(p, dtype=_moment_type(p)).copy_(state[name])


def _moment_type(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def _hyper(group: dict[str, Any]) -> Hyper:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return Hyper(
        lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
        beta1=float(beta1),
        beta2=float(beta2),
        beta2_power=group["beta2_power"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        clip_threshold=group["clip_threshold"],
    )


def _implementation(path: str) -> Any:
    if path != "fused":
        return {"foreach": foreach, "reference": reference}[path]
    from clipq.kernels.stable_adamw import triton  # only where there is a GPU

    return triton


def _path(params: list[Tensor], use_foreach: bool | None, use_fused: bool | None, capturable: bool) -> str:
    if use_foreach and use_fused:
        raise ValueError("StableAdamW: foreach and fused are both True: choose one")
    if use_foreach and capturable:
        raise ValueError(
            "StableAdamW: foreach=True reads the steps on the host, which capturable=True forbids: use fused"
        )
    if use_fused:
        _require_fusable(params)
        return "fused"
    on_cuda = bool(params) and all(p.is_cuda for p in params)
    if use_fused is None and use_foreach is None and on_cuda:
        bad = next((p for p in params if not _fusable(p)), None)
        if bad is None:
            return "fused"
        warnings.warn(
            f"StableAdamW: not fused, since a parameter is {bad.dtype} of shape {tuple(bad.shape)} with strides "
            f"{bad.stride()}: keep it in an optimizer of its own, or give foreach=True if that is as it should be",
            stacklevel=3,
        )
    return "foreach" if use_foreach or (use_foreach is None and not capturable) else "reference"


def _fusable(p: Tensor) -> bool:
    """Whether the kernels, which go through memory in its order, can take the parameter."""
    like = torch.empty_like(local(p), device="meta")  # dense, in the order of the parameter's dimensions
    return p.is_cuda and p.dtype in FUSED_TYPES and like.stride() == local(p).stride()


def _require_fusable(params: list[Tensor]) -> None:
    bad = next((p for p in params if not _fusable(p)), None)
    if bad is not None:
        raise ValueError(
            "StableAdamW: the fused path needs dense float32, bfloat16 or float16 parameters on CUDA, and one is "
            f"{bad.dtype} on {bad.device} with strides {bad.stride()}: keep it in an optimizer of its own, or give the "
            "one for all foreach=True"
        )


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError for a setting that makes no sense, and for complex parameters."""
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("StableAdamW: a parameter is complex, which is not supported: use torch.optim.AdamW for it")
    if not (isinstance(group["betas"], tuple | list) and len(group["betas"]) == 2):
        raise ValueError(f"StableAdamW: betas={group['betas']}: expected two decays in [0, 1)")
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"StableAdamW: lr of shape {tuple(lr.shape)}: expected one rate")
    expected = {
        # one on a GPU is not waited for
        "lr": ((isinstance(lr, Tensor) and lr.device.type != "cpu") or 0 <= lr < math.inf, "a finite rate, 0 or more"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two decays in [0, 1)"),
        "eps": (0 < group["eps"] < math.inf, "a positive, finite number"),
        "weight_decay": (0 <= group["weight_decay"] < math.inf, "a finite number, 0 or more"),
        "clip_threshold": (group["clip_threshold"] > 0, "a positive number, or math.inf for no clipping"),
        "beta2_power": (group["beta2_power"] is None or group["beta2_power"] > 0, "a positive power, or None"),
    }
    for name, (right, what) in expected.items():
        if not right:
            raise ValueError(f"StableAdamW: {name}={group[name]}: expected {what}")

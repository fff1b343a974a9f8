"""Optimizers and loss scaling for any torch program."""

from clipq.optim.loss_scale import FixedLossScaler
from clipq.optim.stable_adamw import StableAdamW

__all__ = ["FixedLossScaler", "StableAdamW"]

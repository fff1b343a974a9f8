"""Optimizers for any torch program."""

from clipq.optim.stable_adamw import StableAdamW

__all__ = ["StableAdamW"]

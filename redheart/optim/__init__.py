"""Optimizers of our own."""

from redheart.optim.adam8bit import CPUAdamW8bit

__all__ = ["CPUAdamW8bit"]

"""Losses of the regret head: strengths in [0, 1], already probabilities."""

from redheart.losses.elementwise import huber

__all__ = ["huber"]

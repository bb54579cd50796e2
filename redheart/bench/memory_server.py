"""Imported by the server that processes of processes.py are forked from: all that a training process imports, kernels loaded."""

import redheart.train.measure  # noqa: F401
from redheart.train.engine import compile_kernels

compile_kernels()

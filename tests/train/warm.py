"""Imported by the server that test processes are forked from: all that a training process imports, its kernels loaded."""

import accelerate  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ZeRO looks at it, and it imports torch's compiler
import tensorboard.backend.event_processing.event_accumulator  # noqa: F401

import redheart.cli
import redheart.train.export
import redheart.train.grow
import redheart.train.start
import redheart.train.validate  # noqa: F401
from redheart.train.engine.machinery import compile_kernels

compile_kernels()

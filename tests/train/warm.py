"""Imported by the server that test processes are forked from: all that a training process imports, its kernels loaded."""

import gc

import accelerate  # noqa: F401
import datasets  # noqa: F401
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ZeRO looks at it, and it imports torch's compiler
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import sklearn.linear_model  # noqa: F401
import tensorboard.backend.event_processing.event_accumulator  # noqa: F401

import redheart.cli
import redheart.closing
import redheart.train.export
import redheart.train.grow
import redheart.train.start
import redheart.train.validate  # noqa: F401
from redheart.train.engine.machinery import compile_kernels

compile_kernels()
gc.freeze()  # what was imported stays: no collection of a process looks through it, and its pages remain shared

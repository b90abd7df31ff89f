# SPDX-License-Identifier: Apache-2.0
"""Weights that processes share out among them, by torch's FSDP2 or DeepSpeed's ZeRO-3: whole again, to read or to save."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, so that each may read as many tokens, and as often, as it likes: `generate`
    takes steps, of which one process needs more than another, and a forward of parts of a model, which gathers nothing.

    Every process has to enter, under FSDP2 after a first forward of the whole model, from which FSDP2 learns its root. Does
    nothing where weights are whole anyway.

    Args:
        model: as `Accelerator.prepare` returned it, which is Trainer's `model_wrapped`.

    Raises:
        RuntimeError: a DeepSpeed too old to make weights whole, or the first version of FSDP.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise RuntimeError("The first version of FSDP is not supported: set fsdp_version: 2 in accelerate's configuration.")
    if _is_zero3(model):
        with _unwrap_zero3()(model):
            yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            # The root stays gathered between forward and backward, as `fully_shard` has it.
            module.set_reshard_after_forward(module is not shards[0], recurse=False)
            module.reshard()


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors of all that is trained, on the CPU, by the names that they have without the wrappers of a launch.

    Every process has to call this.

    Args:
        model: as `Accelerator.prepare` returned it, which is Trainer's `model_wrapped`.
    """
    weights = {}
    for name, parameter in extract_model_from_parallel(model).named_parameters():
        if parameter.requires_grad:
            with _deepspeed().zero.GatheredParameters([parameter]) if _is_zero3(model) else contextlib.nullcontext():
                tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def _is_zero3(model: Any) -> bool:
    """Without an import of DeepSpeed, whose engine says so."""
    return hasattr(model, "zero_optimization_partition_weights") and model.zero_optimization_partition_weights()


def _deepspeed() -> Any:
    """Imported only where it launched this process."""
    return importlib.import_module("deepspeed")


def _unwrap_zero3() -> Any:
    """DeepSpeed's own context, in which its hooks do not share the weights out again behind each module."""
    deepspeed = _deepspeed()
    if not hasattr(deepspeed.zero, "unwrap_model_for_generation"):
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} cannot make the weights of ZeRO-3 whole for an evaluation: update it "
            "(pip install -U deepspeed), evaluate after the training, or train with FSDP2."
        )
    return deepspeed.zero.unwrap_model_for_generation

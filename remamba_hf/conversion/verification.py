# SPDX-License-Identifier: Apache-2.0
"""Proving a conversion by logits before it is kept. Everything is computed in float32 on the CPU.

Two implementations of one formula differ by rounding, which a deep model with large activations amplifies: by 1e-6 of the
largest logit in trained models, by 1e-3 in randomly initialised ones of 48 layers. How much is measured, by shaking the
computation that is the reference in its last bits. A wrong weight makes a difference of about 1e-1.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint_files import CheckpointError
from ..families import ALL_FAMILIES, Family

# Largest difference of two logits, relative to the largest logit, that is always allowed and that is never allowed.
TOLERANCE = 1e-4
_LARGEST_TOLERANCE = 5e-2
_NOISE_FACTOR = 10  # of the measured effect of rounding, in between
_LAST_BIT = 2.0**-23
_PROBE_ROWS, _PROBE_LENGTH = 2, 24
# Of transformers' Mamba-2, which fills up its last chunk, and holds gigabytes for the default of 256; and of MemMamba, whose
# notes can be read behind their chunk only.
_CHUNK = 8


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Random token ids [2, 24], always the same."""
    return torch.randint(vocab_size, (_PROBE_ROWS, _PROBE_LENGTH), generator=torch.Generator().manual_seed(0))


class Reference(NamedTuple):
    """Logits [2, 24, vocabulary] that a conversion has to reproduce, what rounding does to them (relative), and what had
    to be changed in the model that they come from."""

    logits: torch.Tensor
    noise: float
    changed: str = ""

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE, _NOISE_FACTOR * self.noise)

    @property
    def is_decisive(self) -> bool:
        """Whether rounding does so little that a difference would show."""
        return self.tolerance <= _LARGEST_TOLERANCE


def reference(model: nn.Module, logits_of: Callable[[Any], torch.Tensor]) -> Reference:
    """A model's logits, and how far they move when every projection's result is rounded differently."""
    logits = logits_of(model)
    generator = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + _LAST_BIT * torch.randn(output.shape, generator=generator))

    projections = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    handles = [module.register_forward_hook(shake) for module in projections]
    try:
        return Reference(logits, difference(logits_of(model), logits))
    finally:
        for handle in handles:
            handle.remove()


def transformers_reference(family: Family, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Reference:
    """transformers' own model of the architecture with these float32 tensors, which it does not copy."""
    config = family.plain_config_class(**settings)
    if hasattr(config, "chunk_size"):
        config.chunk_size = _CHUNK
    model = assign_weights(family.plain_model_class, config, tensors)
    changed = ""
    if _normalizes_groups_as_one(model):
        for layer in model.backbone.layers:
            layer.mixer.norm = _GroupedNorm(layer.mixer.norm, config.n_groups)
        changed = (
            f"transformers {transformers.__version__} normalises the {config.n_groups} groups of channels as one, which is "
            "wrong, and right from 5.22 on; its norm was replaced"
        )
    return reference(model, transformers_logits)._replace(changed=changed)


class _GroupedNorm(nn.Module):
    """Mamba-2's gated norm with the weight of another: the root mean square norm of x * silu(gate) over each group of
    channels (arXiv 2405.21060, section 7.2).

    It stands in the reference for the norm of transformers before 5.22, which takes all groups as one.
    """

    def __init__(self, norm: Any, groups: int):
        super().__init__()
        self.weight, self.eps, self.groups = norm.weight, norm.variance_epsilon, groups

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        grouped = (hidden_states * nn.functional.silu(gate)).unflatten(-1, (self.groups, -1))
        return self.weight * nn.functional.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)


def _normalizes_groups_as_one(model: PreTrainedModel) -> bool:
    """Whether this is a Mamba-2 of transformers with several groups and the norm that it had before 5.22."""
    norm = getattr(model.backbone.layers[0].mixer, "norm", None)
    return norm is not None and model.config.n_groups > 1 and not hasattr(norm, "group_size")


@torch.inference_mode()
def transformers_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of transformers' model [2, 24, vocabulary]."""
    with _torch_operators(sys.modules[type(model).__module__]):
        return model(probe_ids(model.config.vocab_size), use_cache=False).logits


@torch.inference_mode()
def plain_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of one pass that compresses nothing [2, 24, vocabulary]; what takes notes, takes and reads them."""
    how = {"compress_prompt": False} if _compresses(model) else {}
    with _short_note_chunks(model):
        return model(probe_ids(model.config.vocab_size), use_cache=False, **how).logits


def full_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits [2, 24, vocabulary] of as much as a model can do: of two stages where it compresses prompts."""
    return two_stage_logits(model) if _compresses(model) else plain_logits(model)


def _compresses(model: PreTrainedModel) -> bool:
    return ALL_FAMILIES[model.config.model_type].compresses


@contextlib.contextmanager
def _short_note_chunks(model: PreTrainedModel) -> Iterator[None]:
    """Lets notes be read within the probe: they cannot before the end of their chunk."""
    config = model.config
    if _compresses(model):
        yield
        return
    chunk_size = config.chunk_size
    config.chunk_size = min(chunk_size, _CHUNK)
    try:
        yield
    finally:
        config.chunk_size = chunk_size


@torch.inference_mode()
def two_stage_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the two passes [2, 24, vocabulary] with a whole window kept, so that rounding cannot change what is."""
    return model(
        probe_ids(model.config.vocab_size),
        compress_prompt=True,
        compression_start=0.0,
        compression_span=0.5,
        compression_ratio=1.0,
        use_cache=False,
    ).logits


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value; NaN where either is."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def require_equal(actual: torch.Tensor, expected: Reference, what: str) -> float:
    """The difference; raises a CheckpointError if it is more than rounding explains, or no number."""
    if not expected.logits.isfinite().all():
        raise CheckpointError(f"The source's own logits are not finite ({what}): its weights hold NaN or infinity.")
    error = difference(actual, expected.logits)
    allowed = min(expected.tolerance, _LARGEST_TOLERANCE)
    if not error <= allowed:
        raise CheckpointError(
            f"Verification failed, nothing was written: {what} differ by {error:.1e} of the largest logit, allowed "
            f"are {allowed:.0e}."
        )
    return error


def assign_weights(model_class: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A model in evaluation mode whose parameters are these tensors, not copies; others stay without storage."""
    with torch.device("meta"):
        model = model_class(config)
    unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unknown:
        raise CheckpointError(f"{model_class.__name__} has no place for {unknown[:3]}.")
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def _torch_operators(modeling: Any) -> Iterator[None]:
    """Lets a Mamba of transformers run on the CPU where mamba-ssm is installed, whose kernels it would call there too."""
    functions = {
        name: function
        for name, function in vars(modeling).items()
        if inspect.isfunction(function)
        and inspect.unwrap(function) is not function
        and name.startswith(("mamba_", "mamba2_", "causal_"))
    }
    for name, function in functions.items():
        setattr(modeling, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(modeling, name, function)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, shared ones under each of their names."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}

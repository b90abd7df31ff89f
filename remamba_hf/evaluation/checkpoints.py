# SPDX-License-Identifier: Apache-2.0
"""What evaluations load: checkpoints of every family and of the plain models, read by one set of classes."""

import hashlib
import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import remamba_hf
from remamba_hf.families import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES, Family

CPU_CHUNK_LENGTH = 4096


def family_of(checkpoint: str) -> Family:
    """The family of a folder or Hub id; a plain checkpoint is read by a family that extends it, with the same logits.

    Raises:
        ValueError: another kind of model.
    """
    kind = AutoConfig.from_pretrained(checkpoint).model_type
    family = ALL_FAMILIES.get(kind) or PLAIN_FAMILIES.get(kind)
    if family is None:
        raise ValueError(f"{checkpoint} is a {kind!r} model. Give one of {sorted((*ALL_FAMILIES, *PLAIN_FAMILIES))}.")
    return family


def load_model(checkpoint: str, device: str) -> PreTrainedModel:
    """The model of a checkpoint for inference, in bf16 on a GPU and fp32 elsewhere."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return family_of(checkpoint).model_class.from_pretrained(checkpoint, dtype=dtype).to(device).eval()


def loader(checkpoint: str, device: str, cache: dict[str, PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Loads a model when it is first asked for, and keeps it in `cache`."""

    def load() -> PreTrainedModel:
        if checkpoint not in cache:
            cache[checkpoint] = load_model(checkpoint, device)
        return cache[checkpoint]

    return load


def plain_reading(model: PreTrainedModel) -> dict[str, Any]:
    """What `forward` needs to read a text in one pass: families that compress prompts have to be told not to."""
    compressing = tuple(family.model_class for family in FAMILIES.values())
    return {"compress_prompt": False} if isinstance(model, compressing) else {}


def weights_read(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that a plain pass reads: those for compression, which a plain checkpoint lacks, left out."""
    parts = (".compressor.", ".adaptation.") if plain_reading(model) else ()
    return {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in parts)}


def digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights as they are loaded (so it differs between dtypes), by which a run knows its model again."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(name.encode())
        hashed.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return hashed.hexdigest()


def environment(device: str | None = None) -> dict[str, str]:
    """Versions, and the name of the device (default: the GPU where there is one)."""
    is_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "remamba_hf": remamba_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
    }

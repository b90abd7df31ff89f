# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters of both families: LoRA on projections, embeddings and head, and modules trained in full, under the names of
the authors' code or of this package.

Training adds LoRA to the embeddings and to the head, which share one tensor in the base. The merge therefore either
unties them, and equals the trained model, or adds both to the shared tensor, as the authors' merge does.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..checkpoint_files import CheckpointError, read_json, read_tensors

EMBEDDINGS, HEAD, COMPRESSOR = "backbone.embeddings", "lm_head", "backbone.compressor."
# The authors' names of what ReMamba and ReMamba-2 add to Mamba.
_RENAMED = (
    (re.compile(r"(^|\.)Q_proj\."), r"\1compressor.query."),
    (re.compile(r"(^|\.)K_proj\."), r"\1compressor.key."),
    (re.compile(r"(^|\.)V_proj\."), r"\1compressor.value."),
    (re.compile(r"\.ret_bias\.param$"), ".adaptation.bias"),
)
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
# The options of PEFT's LoRA that change the formula W + scale * B A, with the values that leave it as it is.
_UNSUPPORTED = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "layer_replication": (None,),
}
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")


@dataclass
class LowRankUpdate:
    """What LoRA adds to a weight [out, in]: `scale * left @ right`, left [out, r], right [r, in], float32."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def weight(self) -> torch.Tensor:
        """[out, in]"""
        return self.scale * (self.left @ self.right)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """What a Linear gains: x [..., in] -> [..., out]."""
        return self.scale * (x @ self.right.T @ self.left.T)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What an Embedding gains: ids [...] -> [..., in]."""
        return self.scale * (self.left[ids] @ self.right)


@dataclass
class Adapter:
    """An adapter with this package's names. updates: by module; full: whole parameters, float32."""

    updates: dict[str, LowRankUpdate]
    full: dict[str, torch.Tensor]

    @property
    def has_compressor(self) -> bool:
        return any(name.startswith(COMPRESSOR) for name in self.full)


def read_adapter(folder: Path) -> Adapter:
    """A PEFT adapter: `adapter_config.json` with `adapter_model.safetensors` or `.bin`.

    Raises:
        CheckpointError: no LoRA adapter, options of LoRA that a merge would get wrong, or a half of a pair missing.
    """
    config = read_json(folder / "adapter_config.json")
    scale = _scale(config)
    full: dict[str, torch.Tensor] = {}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(folder, stems=("adapter_model",)).items():
        name = _our_name(key)
        match = _LOW_RANK.fullmatch(name)
        if match is None:
            full[name] = tensor.float()
            continue
        if tensor.dim() != 2:
            raise CheckpointError(
                f"The adapter has LoRA on the convolution {match['module']}, which nobody merges, PEFT neither. Train it in "
                "full (modules_to_save)."
            )
        pair = pairs.setdefault(match["module"], {})
        # PEFT keeps an embedding's pair as A [r, ids], B [size, r], a Linear's as A [r, in], B [out, r].
        embedding = match["embedding"] is not None
        side = "left" if (match["side"] == "A") == embedding else "right"
        pair[side] = tensor.float().T if embedding else tensor.float()
    updates = {}
    for module, pair in pairs.items():
        if len(pair) != 2 or pair["left"].shape[1] != pair["right"].shape[0]:
            raise CheckpointError(f"{folder} has no matching lora_A and lora_B of {module}. Get its files again.")
        updates[module] = LowRankUpdate(pair["left"], pair["right"], scale)
    return Adapter(updates, full)


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a CheckpointError unless everything in the adapter has its place in a model of these parameter shapes.

    Theta is reshaped to the model's where only its shape differs.
    """
    for module, update in adapter.updates.items():
        shape = (update.left.shape[0], update.right.shape[1])
        if shapes.get(f"{module}.weight") != shape:
            raise CheckpointError(
                f"The adapter's LoRA on {module} is for a weight of the shape {shape}, the base has "
                f"{shapes.get(f'{module}.weight', 'none of that name')}. Give the base that the adapter was trained on."
            )
    for name, tensor in adapter.full.items():
        expected = shapes.get(name, ())
        if name.endswith(".adaptation.bias") and tensor.numel() == math.prod(expected):
            adapter.full[name] = tensor = tensor.reshape(expected)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"The adapter's {name} has the shape {tuple(tensor.shape)}, the base has "
                f"{expected or 'none of that name'}. Give the base that the adapter was trained on."
            )
    compressor = {name for name in shapes if name.startswith(COMPRESSOR)}
    lacking = compressor - adapter.full.keys()
    if lacking and lacking != compressor:
        raise CheckpointError(f"The adapter holds only a part of the compressor, it lacks {sorted(lacking)[:3]}.")


def insert_full_weights(tensors: dict[str, torch.Tensor], adapter: Adapter) -> None:
    """Replaces a base's tensors by those that were trained in full. Unties embeddings and head if they then differ."""
    table = tensors[f"{EMBEDDINGS}.weight"]
    tied = f"{HEAD}.weight" not in tensors
    tensors.update(adapter.full)
    if tied:
        head = tensors.setdefault(f"{HEAD}.weight", table)
        if torch.equal(head, tensors[f"{EMBEDDINGS}.weight"]):
            del tensors[f"{HEAD}.weight"]


def merge_updates(tensors: dict[str, torch.Tensor], adapter: Adapter, tied_merge: bool) -> None:
    """Adds the adapter's low-rank updates to float32 tensors, replacing them one by one to save memory.

    Args:
        tensors: by transformers' names, with the adapter's full weights; without `lm_head.weight` where it is tied.
        adapter: checked.
        tied_merge: what embeddings and head gain goes into the one tensor that they share. Otherwise they are untied.
    """
    tied = f"{HEAD}.weight" not in tensors
    if tied_merge and not tied:
        raise CheckpointError("A tied merge needs a base whose embeddings and head are tied. Merge untied.")
    if tied and not tied_merge and not adapter.updates.keys().isdisjoint((EMBEDDINGS, HEAD)):
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDINGS}.weight"].clone()
    for module, update in tqdm(adapter.updates.items(), desc="merging", unit="weight"):
        name = f"{EMBEDDINGS if tied_merge and module == HEAD else module}.weight"
        tensors[name] = tensors[name] + update.weight()


@contextmanager
def unmerged(model: nn.Module, adapter: Adapter, tied_merge: bool) -> Iterator[None]:
    """Lets a model compute with the adapter's low-rank updates beside its weights, as in training.

    The model holds the base's weights and the adapter's full ones. With `tied_merge` embeddings and head both gain the
    updates of both.
    """
    updates: dict[str, list[LowRankUpdate]] = {module: [update] for module, update in adapter.updates.items()}
    if tied_merge:
        shared = updates.get(EMBEDDINGS, []) + updates.get(HEAD, [])
        updates.update({EMBEDDINGS: shared, HEAD: shared})
    handles = [model.get_submodule(module).register_forward_hook(_adding(some)) for module, some in updates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(updates: list[LowRankUpdate]) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for update in updates:
            output = output + (update.look_up if isinstance(module, nn.Embedding) else update.project)(inputs[0])
        return output

    return hook


def _our_name(key: str) -> str:
    """A key of an adapter file without what PEFT adds to names, and with ours instead of the authors'."""
    name = key.removeprefix("base_model.").removeprefix("model.")
    for part in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(part, ".")
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _scale(config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"The adapter is of the type {config.get('peft_type')!r}, only LORA can be merged.")
    for option, harmless in _UNSUPPORTED.items():
        if config.get(option) not in harmless:
            raise CheckpointError(
                f"The adapter sets {option}={config[option]!r}, which this merge does not know. Merge it with PEFT's "
                "merge_and_unload() first, and convert the result."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING_STARTS):
        raise CheckpointError(
            f"The adapter was started with init_lora_weights={start!r}, which changes the base's weights. Save it as "
            "a plain LoRA with PEFT's path_initial_model_for_weight_conversion first."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"adapter_config.json has r={rank!r} and lora_alpha={alpha!r}. Get the file again.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

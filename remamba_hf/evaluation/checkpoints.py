# SPDX-License-Identifier: Apache-2.0
"""What evaluations read texts with: checkpoints of every family, plain models read by the family that extends them, and any
other causal language model as it is. causal_models.py finds and loads them."""

import argparse
import hashlib
import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import remamba_hf
from remamba_hf.checkpoint_files import has_tokenizer
from remamba_hf.families import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES, Family
from remamba_hf.modeling.recurrent_passes import DEFAULT_CHUNK_LENGTH
from remamba_hf.reading import checked_device

from .causal_models import Checkpoint, find_checkpoint, load_causal_model, load_tokenizer

CPU_CHUNK_LENGTH = 4096
_COMPRESSING_PARTS = (".compressor.", ".adaptation.")  # weights that plain checkpoints lack


def default_chunk_length(device: str) -> int:
    """Tokens of a text that this package's models read at once unless told otherwise."""
    return CPU_CHUNK_LENGTH if torch.device(device).type == "cpu" else DEFAULT_CHUNK_LENGTH


def default_batch_tokens(device: str) -> int:
    """Tokens of texts of books that are read at once: what keeps a GPU busy; of a CPU, which more do not make faster, what
    takes seconds and is then on disk."""
    return 16_384 if torch.device(device).type == "cpu" else 262_144


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `open_tokenizer` and `open_checkpoint` go by, and `--device` and `--dtype`."""
    parser.add_argument("--tokenizer", metavar="TOKENIZER", help="folder or Hub id; default: MODEL's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: bfloat16, CPU float32"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def open_device(options: argparse.Namespace) -> str:
    """The device of `add_model_options`; raises a CheckpointError for one that is not there."""
    return checked_device(options.device)


def open_checkpoint(model: str, options: argparse.Namespace) -> Checkpoint:
    """A model of a command with `add_model_options`, found but not loaded; raises a CheckpointError."""
    return find_checkpoint(model, trust_remote_code=options.trust_remote_code)


def open_tokenizer(checkpoint: Checkpoint, options: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer for planted facts and books: with an end of text, which also pads where it has no padding token.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
        ValueError: it has no end of text.
    """
    tokenizer, _ = load_tokenizer(checkpoint, options.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {checkpoint.name} has no end-of-text token (eos_token): set one and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError unless a model can read the tokens of a tokenizer, which may be another model's: its own, if it
    has one, must have the same. Vocabularies may be padded to different sizes."""
    size, needed = checkpoint.config.get_text_config().vocab_size, len(tokenizer)
    if size < needed:
        raise ValueError(
            f"{checkpoint.name} has a vocabulary of {size}, and the tokenizer {needed} tokens: all models must be of one "
            "tokenizer"
        )
    if has_tokenizer(checkpoint.folder) and load_tokenizer(checkpoint)[0].get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{checkpoint.name} has another tokenizer than the texts are read with: all models must be of one tokenizer"
        )


def family_of(checkpoint: str) -> Family:
    """The family of a folder or Hub id; a plain checkpoint is read by a family that extends it, with the same logits.

    Raises:
        ValueError: another kind of model.
    """
    kind = AutoConfig.from_pretrained(checkpoint).model_type
    family = reading_family(kind)
    if family is None:
        raise ValueError(f"{checkpoint} is a {kind!r} model. Give one of {sorted((*ALL_FAMILIES, *PLAIN_FAMILIES))}.")
    return family


def reading_family(model_type: str) -> Family | None:
    """The family whose class reads models of a type; None: transformers' own class, in one piece."""
    return ALL_FAMILIES.get(model_type) or PLAIN_FAMILIES.get(model_type)


def load_model(checkpoint: str | Checkpoint, device: str, dtype: str = "auto") -> PreTrainedModel:
    """The model of a checkpoint for inference: plain Mambas by the family that extends them, which reads them in chunks and
    with the same logits, any other causal language model by its own class.

    Args:
        checkpoint: a folder or Hub id, or what `find_checkpoint` found.
        dtype: "auto": bfloat16 on a GPU and float32 elsewhere.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    found = find_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    family = reading_family(found.config.model_type)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if family is None:
        return load_causal_model(found, device, dtype)
    may_lack = _COMPRESSING_PARTS if found.config.model_type in PLAIN_FAMILIES else ()
    return load_causal_model(found, device, dtype, family.model_class, may_lack)


def loader(
    checkpoint: str | Checkpoint, device: str, cache: dict[str, PreTrainedModel], dtype: str = "auto"
) -> Callable[[], PreTrainedModel]:
    """Loads a model when it is first asked for, and keeps it in `cache`."""
    key = checkpoint if isinstance(checkpoint, str) else checkpoint.source

    def load() -> PreTrainedModel:
        if key not in cache:
            cache[key] = load_model(checkpoint, device, dtype)
        return cache[key]

    return load


def reads_in_chunks(model: PreTrainedModel) -> bool:
    """Whether it is one of this package's, which read texts in chunks and copy the state behind them; others get every
    prompt whole."""
    return isinstance(model, tuple(family.model_class for family in ALL_FAMILIES.values()))


def plain_reading(model: PreTrainedModel) -> dict[str, Any]:
    """What `forward` needs to read a text in one pass: families that compress prompts have to be told not to."""
    compressing = tuple(family.model_class for family in FAMILIES.values())
    return {"compress_prompt": False} if isinstance(model, compressing) else {}


def check_positions(checkpoint: Checkpoint, needed: int, option: str) -> None:
    """Raises a ValueError if a model has fewer positions than `needed`.

    Args:
        option: that would make it fewer, such as "--lengths".
    """
    if checkpoint.positions is not None and needed > checkpoint.positions:
        raise ValueError(
            f"{checkpoint.name} has {checkpoint.positions} positions (max_position_embeddings), and the longest text with "
            f"its answer needs {needed}: give shorter {option}"
        )


def describe_checkpoint(model_type: str, model: PreTrainedModel) -> dict[str, Any]:
    """What names a model in results, and lets a run and a card know it again.

    Args:
        model_type: of its checkpoint; a plain one's model is of the family that reads it.

    Returns:
        `label`, `model_type`, `parameters`, `dtype`, and `weights`: `digest` of those that a plain pass reads.
    """
    weights = weights_read(model)
    return {
        "label": label_of(model_type),
        "model_type": model_type,
        "parameters": sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values()),  # tied ones once
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": digest(weights),
    }


def label_of(model_type: str) -> str:
    """A kind of model for people."""
    if model_type in ALL_FAMILIES:
        return ALL_FAMILIES[model_type].name
    return f"plain {PLAIN_FAMILIES[model_type].plain_name}" if model_type in PLAIN_FAMILIES else model_type


def weights_read(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that a plain pass reads: those for compression, which a plain checkpoint lacks, left out."""
    parts = _COMPRESSING_PARTS if plain_reading(model) else ()
    return {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in parts)}


def compression_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Those that `weights_read` leaves out."""
    read = weights_read(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in read}


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

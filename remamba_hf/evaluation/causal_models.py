# SPDX-License-Identifier: Apache-2.0
"""Any causal language model with its tokenizer: checkpoints of this package's families, and others as baselines."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from remamba_hf.checkpoint_files import (
    TOKENIZER_FILES,
    CheckpointError,
    check_safetensors,
    first_line,
    has_tokenizer,
    locate,
)
from remamba_hf.families import ALL_FAMILIES, FAMILIES

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model that was found, but not loaded.

    Attributes:
        name: the Hub id, or the name of the folder.
        source, revision: what transformers loads it from.
        folder: with its files on this machine.
        config: its configuration.
        trust_remote_code: whether code that comes with it may run.
    """

    name: str
    source: str
    revision: str | None
    folder: Path
    config: Any
    trust_remote_code: bool

    @property
    def compresses(self) -> bool:
        """Whether it reads prompts in two stages."""
        return self.config.model_type in FAMILIES

    @property
    def of_this_package(self) -> bool:
        """Whether `generate` knows this package's arguments."""
        return self.config.model_type in ALL_FAMILIES

    @property
    def positions(self) -> int | None:
        """Tokens that it has positions for; None for models that count none, such as Mamba and those of this package, whose
        `max_position_embeddings` is there for tools that ask for it."""
        if self.of_this_package:
            return None
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def identity(self) -> dict[str, str]:
        """What a run knows it by again: the commit on the Hub, or a digest of configuration and weights."""
        if self.folder.parent.name == "snapshots":
            return {"id": self.name, "revision": self.folder.name}
        names = ["config.json", "generation_config.json", *(["*.py"] if self.trust_remote_code else []), *_WEIGHTS]
        return {"sha256": digest_of_files(path for name in names for path in sorted(self.folder.glob(name)))}


def find_checkpoint(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Finds a model, in a folder or on the Hub, without loading its weights.

    Raises:
        CheckpointError: there is none, it is not whole, or it is of a kind that transformers does not know.
    """
    folder = locate(model, revision)
    is_local = Path(model).expanduser().is_dir()
    # Code is not among the files that `locate` gets: transformers gets it itself.
    source = str(folder) if is_local or not trust_remote_code else model
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model} has no config.json: it is no checkpoint of a model. Give the folder that holds one.")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever the file's content leads to
        advice = "" if trust_remote_code else " If it brings code of its own that you trust, add --trust-remote-code."
        raise CheckpointError(f"The configuration of {model} cannot be read: {_reason(error)}.{advice}") from error
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        check_safetensors(folder)
    name = folder.resolve().name if is_local else model
    return Checkpoint(name, source, revision, folder, config, trust_remote_code)


def load_causal_model(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    model_class: Any = AutoModelForCausalLM,
    may_lack: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model, ready for inference.

    Args:
        device: of `checked_device`.
        dtype: of `resolved_dtype`.
        model_class: that loads it; default: its own.
        may_lack: parts of the names of weights that need not be there.

    Raises:
        CheckpointError: weights that are damaged or do not belong to the configuration; no causal language model.
    """
    try:
        model, info = model_class.from_pretrained(
            checkpoint.source,
            revision=checkpoint.revision,
            dtype=dtype,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
            # transformers' own error for these refers to a report that it logs: they are named below.
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {_reason(error)}.") from error
    mismatched = sorted((name, list(there), list(needed)) for name, there, needed in info["mismatched_keys"])
    if mismatched:
        name, there, needed = mismatched[0]
        raise CheckpointError(
            f"{checkpoint.name} has {len(mismatched)} tensors of other sizes than its config.json says, e.g. {name}: "
            f"{there} instead of {needed}. Get its files again, config.json included."
        )
    missing = [name for name in info["missing_keys"] if not any(part in name for part in may_lack)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.name} lacks {len(missing)} of the model's tensors, e.g. {min(missing)}. Get its files again, or "
            "give a checkpoint of a language model."
        )
    return model.to(device).eval()


def load_tokenizer(checkpoint: Checkpoint, tokenizer: str | None = None) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a checkpoint, or of another folder or Hub id, and a digest of its files.

    Raises:
        CheckpointError: there is none, it cannot be loaded, or it has tokens that the model does not have.
    """
    trust = checkpoint.trust_remote_code
    folder = checkpoint.folder if tokenizer is None else locate(tokenizer)
    if not has_tokenizer(folder) and not trust:
        raise CheckpointError(
            f"{tokenizer or checkpoint.name} has no tokenizer. Give the one that the model was trained with: "
            "--tokenizer FOLDER_OR_ID."
        )
    source, revision = (checkpoint.source, checkpoint.revision) if tokenizer is None else (str(folder), None)
    try:
        loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise CheckpointError(
            f"The tokenizer of {tokenizer or checkpoint.name} cannot be loaded: {_reason(error)}. Get its files again, "
            "or give another: --tokenizer FOLDER_OR_ID."
        ) from error
    _check_vocabulary(checkpoint, loaded, tokenizer or checkpoint.name)
    return loaded, digest_of_files(path for name in TOKENIZER_FILES for path in folder.glob(name))


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Without it, a text with such a token ends in an IndexError of the embedding, on a GPU in a failed assertion."""
    size = getattr(checkpoint.config.get_text_config(), "vocab_size", None)
    # A padding token stands for nothing that is read: whoever pads takes another where the model does not have it.
    beyond = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if size is not None and number >= size and token != tokenizer.pad_token
    }
    if beyond:
        raise CheckpointError(
            f"{checkpoint.name} has a vocabulary of {size}, and the tokenizer of {name} {len(beyond)} tokens beyond it, "
            f"e.g. {beyond[min(beyond)]!r} ({min(beyond)}). Give the tokenizer that the model was trained with (--tokenizer "
            "FOLDER_OR_ID), or resize the model's embeddings."
        )


def _reason(error: BaseException) -> str:
    """To be followed by a full stop."""
    return first_line(error).rstrip(".")


def resolved_dtype(checkpoint: Checkpoint, device: str, dtype: str) -> str:
    """What `auto` means: the checkpoint's own, but float32 on the CPU, where half precision is slow."""
    if dtype != "auto":
        return dtype
    stored = getattr(checkpoint.config, "dtype", None)
    if torch.device(device).type == "cpu" or stored is None:
        return "float32"
    return str(stored).removeprefix("torch.")


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files."""
    parts = "".join(f"{path.name} {digest_of_file(path)}\n" for path in paths)
    return hashlib.sha256(parts.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256, as sha256sum prints it."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            hashed.update(part)
    return hashed.hexdigest()

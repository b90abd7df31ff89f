# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint, in a local folder or on the Hub, and reading its configuration and tensors."""

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MODEL_STEMS, ADAPTER_STEMS = ("model", "pytorch_model"), ("adapter_model",)
# Not every file of that suffix: some repositories hold their weights a second time, in a format of their own.
_SAFETENSORS = [f"{stem}*.safetensors" for stem in (*MODEL_STEMS, *ADAPTER_STEMS)]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read, converted or written as asked; the message names the reason and the fix."""


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: `source` itself, or a download of the Hub repository of that name.

    Raises:
        CheckpointError: there is neither a folder nor a repository of that name, or the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a local folder, which has no revision {revision!r}. Leave it out.")
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file. Give the folder that holds it together with its config.json.")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"There is no folder {source}, and it is not a Hub id (owner/name).")
    try:
        folder = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=["*.json", *_SAFETENSORS, "*.model", "*.txt", "*.jinja"]
            )
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, revision=revision, allow_patterns=["pytorch_model*.bin*", "adapter_model.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"Cannot get {source}{at} from the Hub, and there is no local folder of that name. Check the name, the "
            f"revision and the connection, or give a local folder. ({first_line(error)})"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not a checkpoint's folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}. Get the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Get the file again.")
    return content


def _special_float(content: dict[str, Any]) -> Any:
    """JSON has no infinity: transformers writes it as {"__float__": "Infinity"}, others as the word alone."""
    value = content.get("__float__")
    return float(value) if isinstance(value, str) and len(content) == 1 else content


def read_tensors(folder: Path, stems: tuple[str, ...] = MODEL_STEMS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, on the CPU and mapped from their files where the format allows it.

    Args:
        folder: holds `<stem>.safetensors` or `<stem>.bin`, or shards with an index.
        stems: names that the files may have; safetensors are preferred.

    Raises:
        CheckpointError: no weights, a missing shard, a damaged file, or a `.bin` that holds more than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    files = _weight_files(folder, stems)
    for path in tqdm(files, desc="opening weights", unit="file", disable=len(files) < 2):
        tensors.update(_read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path))
    return tensors


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies the tokenizer's files; False if there are none."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return has_tokenizer(source)


def check_safetensors(folder: Path) -> None:
    """Raises a CheckpointError unless all safetensors of a checkpoint are there and whole, reading their headers only."""
    for path in _weight_files(folder, ("model",), (".safetensors",)):
        with _open_safetensors(path):
            pass


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_VOCABULARIES)


def _weight_files(folder: Path, stems: tuple[str, ...], suffixes: tuple[str, ...] = (".safetensors", ".bin")) -> list[Path]:
    for suffix in suffixes:
        for stem in stems:
            single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
            if single.is_file():
                return [single]
            if index.is_file():
                shards = sorted(set(read_json(index).get("weight_map", {}).values()))
                missing = [name for name in shards if not (folder / name).is_file()]
                if missing or not shards:
                    raise CheckpointError(f"{folder} lacks shards that {index.name} names: {missing}. Get them again.")
                return [folder / name for name in shards]
    names = " or ".join(f"{stem}{suffix}" for stem in stems for suffix in suffixes)
    raise CheckpointError(f"{folder} has no weights: expected {names}, or shards with their index.")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """Opening compares the file's size with its header, so that a file that was cut off is found at once."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off ({first_line(error)}). Get the file again: its size on the Hub tells "
            "whether it is whole."
        ) from error


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Never unpickles anything but tensors: whatever else a `.bin` holds could be code."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # saved before torch 1.6
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, which is refused because it could run code "
            f"({first_line(error)}). Save its state dict with torch.save(model.state_dict(), path), or get it again."
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({first_line(error)}). Get the file again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors). Save model.state_dict() alone.")
    return content


def first_line(error: BaseException) -> str:
    """An error on one line, for messages that explain it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

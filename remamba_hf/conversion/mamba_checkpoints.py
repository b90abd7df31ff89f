# SPDX-License-Identifier: Apache-2.0
"""Plain Mamba-1 and Mamba-2 checkpoints: transformers' format and the original one of state-spaces, brought to one form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files import CheckpointError, read_json, read_tensors
from ..families import ALL_FAMILIES, PLAIN_FAMILIES, Family
from .original_format import is_original, original_settings
from .verification import parameter_shapes

_NOT_ABOUT_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
# By which the two architectures' tensors are told apart.
_TELLTALES = {"mamba": ".mixer.x_proj.weight", "mamba2": ".mixer.dt_bias"}


@dataclass
class PlainMamba:
    """A plain Mamba language model.

    kind: the architecture and the format it came in, in words.
    family: the one that it becomes unless another is asked for.
    settings: arguments of the family's plain configuration, `tie_word_embeddings` among them.
    tensors: by transformers' names, in the dtypes of the source; without `lm_head.weight` where it is tied.
    """

    kind: str
    family: Family
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bulk of the weights."""
        return self.tensors["backbone.layers.0.mixer.in_proj.weight"].dtype


def read_plain_mamba(folder: Path) -> PlainMamba:
    """A Mamba-1 or Mamba-2 checkpoint in either format.

    Raises:
        CheckpointError: another kind of checkpoint, settings that this model has not, missing or foreign tensors.
    """
    config = read_json(folder / "config.json") if not (folder / "adapter_config.json").exists() else _refuse_adapter(folder)
    if config.get("model_type") in PLAIN_FAMILIES:
        family = PLAIN_FAMILIES[config["model_type"]]
        kind = f"{family.plain_name} in transformers' format"
        settings = _transformers_settings(config, family)
        tied = config.get("tie_word_embeddings", family.plain_config_class.tie_word_embeddings)
    elif is_original(config):
        try:
            family, settings = original_settings(config)
        except (AttributeError, TypeError) as error:  # a text where a number or an object is due
            raise CheckpointError(
                f"{folder / 'config.json'} has a value of the wrong type ({error}). Get the file again."
            ) from error
        kind = f"{family.plain_name} in the original state-spaces format"
        tied = config.get("tie_embeddings", config.get("tie_word_embeddings", True))
    else:
        raise CheckpointError(f"{folder} holds {_what_it_is(config)}. Give a Mamba-1 or Mamba-2 checkpoint.")

    tensors = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in read_tensors(folder).items()}
    settings.update(tie_word_embeddings=_untie(folder, tensors, tied), vocab_size=_table(folder, tensors).shape[0])
    _check_tensors(folder, family, settings, tensors)
    return PlainMamba(kind, family, settings, tensors)


def _transformers_settings(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Arguments of a plain configuration, without what a configuration computes from the others."""

    def computed(name: str) -> bool:
        classes = family.plain_config_class, family.config_class
        return any(isinstance(getattr(config_class, name, None), property) for config_class in classes)

    return {name: value for name, value in config.items() if name not in _NOT_ABOUT_THE_MODEL and not computed(name)}


def _table(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    table = tensors.get("backbone.embeddings.weight")
    if table is None or table.dim() != 2:
        raise CheckpointError(f"{folder} has no tensor backbone.embeddings.weight: it is no Mamba language model.")
    return table


def _untie(folder: Path, tensors: dict[str, torch.Tensor], tied: bool) -> bool:
    """Whether head and embeddings are one tensor: what the weights say counts. Leaves out the head where it is tied."""
    table, head = _table(folder, tensors), tensors.get("lm_head.weight")
    if head is None:
        if not tied:
            raise CheckpointError(
                f"{folder} is not tied by its config.json, but has no lm_head.weight. Get its files again."
            )
        return True
    if tied and torch.equal(head, table):
        del tensors["lm_head.weight"]
        return True
    if head.data_ptr() == table.data_ptr():
        tensors["lm_head.weight"] = head.clone()  # a .bin keeps equal tensors as one, saving would drop one of the two
    return False


def _what_it_is(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if kind in ALL_FAMILIES:
        return f"a {ALL_FAMILIES[kind].name} checkpoint already, with nothing to convert: load it with from_pretrained"
    return f"a checkpoint of another kind (model_type {kind!r})" if kind else "no checkpoint that its config.json names"


def _refuse_adapter(folder: Path) -> dict[str, Any]:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    raise CheckpointError(
        f"{folder} is a PEFT adapter. Give the checkpoint that it belongs to as the source, and the adapter besides: "
        f"remamba convert {base} OUTPUT --adapter {folder}"
    )


def _check_tensors(folder: Path, family: Family, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for model_type, telltale in _TELLTALES.items():
        other = PLAIN_FAMILIES[model_type]
        if other is not family and any(name.endswith(telltale) for name in tensors):
            raise CheckpointError(
                f"{folder} is {family.plain_name} by its config.json (model_type, or ssm_cfg.layer), but its tensors are "
                f"those of {other.plain_name}. Get its files again, and all of them from one checkpoint."
            )
    expected = expected_shapes(folder, family, settings)
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or foreign:
        raise CheckpointError(
            f"The tensors of {folder} are not those of its config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}. Get its files again, or check that it is a {family.plain_name} "
            "checkpoint."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{name} in {folder} has the shape {tuple(tensor.shape)}, its config.json implies {expected[name]}."
            )


def expected_shapes(folder: Path, family: Family, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a plain Mamba's tensors, without `lm_head.weight` where it is tied."""
    try:
        with torch.device("meta"):
            model = family.plain_model_class(family.plain_config_class(**settings))
    except Exception as error:  # transformers' checks raise nothing more precise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"config.json in {folder} does not describe a {family.plain_name}: {reason}. Get the file again."
        ) from error
    shapes = parameter_shapes(model)
    if settings["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes

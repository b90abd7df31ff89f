# SPDX-License-Identifier: Apache-2.0
"""Plain Mamba-1 checkpoints: transformers' format and the original one of state-spaces, brought to one form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MambaConfig

from ..checkpoint_files import CheckpointError, read_json, read_tensors

_NOT_ABOUT_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
_SSM_SETTINGS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_SSM_SETTINGS_WITHOUT_EFFECT = ("layer", "use_fast_path", "layer_idx", "device", "dtype")


@dataclass
class PlainMamba:
    """A Mamba-1 language model.

    kind: the format it came in, in words.
    settings: arguments of a `MambaConfig`, `tie_word_embeddings` among them.
    tensors: by transformers' names, in the dtypes of the source; without `lm_head.weight` where it is tied.
    """

    kind: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bulk of the weights."""
        return self.tensors["backbone.layers.0.mixer.in_proj.weight"].dtype


def read_plain_mamba(folder: Path) -> PlainMamba:
    """A Mamba-1 checkpoint in either format.

    Raises:
        CheckpointError: another kind of checkpoint, settings that this model has not, missing or foreign tensors.
    """
    config = read_json(folder / "config.json") if not (folder / "adapter_config.json").exists() else _refuse_adapter(folder)
    if config.get("model_type") == "mamba":
        kind = "Mamba in transformers' format"
        settings = {name: value for name, value in config.items() if name not in _NOT_ABOUT_THE_MODEL}
        tied = config.get("tie_word_embeddings", True)
    elif "model_type" not in config and {"d_model", "n_layer"} <= config.keys():
        kind = "Mamba in the original state-spaces format"
        settings = _original_settings(config)
        tied = config.get("tie_embeddings", config.get("tie_word_embeddings", True))
    else:
        raise CheckpointError(f"{folder} holds {_what_it_is(config)}. Give a Mamba-1 checkpoint.")

    tensors = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in read_tensors(folder).items()}
    table = tensors.get("backbone.embeddings.weight")
    if table is None or table.dim() != 2:
        raise CheckpointError(f"{folder} has no tensor backbone.embeddings.weight: it is no Mamba language model.")
    head = tensors.get("lm_head.weight")
    if tied and head is not None and torch.equal(head, table):
        del tensors["lm_head.weight"]
    elif tied and head is not None:
        tied = False  # what the weights say counts
    elif not tied and head is None:
        raise CheckpointError(f"{folder} is not tied by its config.json, but has no lm_head.weight. Get its files again.")
    if not tied and head is not None and head.data_ptr() == table.data_ptr():
        tensors["lm_head.weight"] = head.clone()  # a .bin keeps equal tensors as one, saving would drop one of the two
    settings.update(tie_word_embeddings=bool(tied), vocab_size=table.shape[0])
    _check_tensors(folder, settings, tensors)
    return PlainMamba(kind, settings, tensors)


def _original_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`MambaConfig` arguments of an original config.json; the vocabulary comes from the padded embedding instead."""
    ssm = config.get("ssm_cfg") or {}
    if str(ssm.get("layer", "Mamba1")) != "Mamba1":
        raise CheckpointError(
            f"This is a {ssm['layer'].replace('Mamba2', 'Mamba-2')} checkpoint (ssm_cfg.layer = {ssm['layer']!r}), "
            "which remamba convert cannot read yet: give a Mamba-1 checkpoint."
        )
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise CheckpointError("This checkpoint mixes Mamba with attention or MLP layers. Give a plain Mamba-1 checkpoint.")
    if not config.get("rms_norm", True):
        raise CheckpointError("This checkpoint uses LayerNorm (rms_norm is false), this model only RMSNorm.")
    unknown = sorted(set(ssm) - set(_SSM_SETTINGS) - set(_SSM_SETTINGS_WITHOUT_EFFECT))
    if unknown:
        raise CheckpointError(f"ssm_cfg has settings that Mamba-1 does not know: {unknown}. Is this another architecture?")
    settings = {ours: ssm[name] for name, ours in _SSM_SETTINGS.items() if name in ssm}
    return {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
        **settings,
    }


def _what_it_is(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if kind == "remamba":
        return "a ReMamba checkpoint already, with nothing to convert: load it with from_pretrained"
    if kind == "mamba2":
        return "a Mamba-2 checkpoint (model_type 'mamba2'), which remamba convert cannot read yet"
    return f"a checkpoint of another kind (model_type {kind!r})" if kind else "no checkpoint that its config.json names"


def _refuse_adapter(folder: Path) -> dict[str, Any]:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    raise CheckpointError(
        f"{folder} is a PEFT adapter. Give the checkpoint that it belongs to as the source, and the adapter besides: "
        f"remamba convert {base} OUTPUT --adapter {folder}"
    )


def _check_tensors(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    expected = expected_shapes(MambaConfig(**settings))
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or foreign:
        raise CheckpointError(
            f"The tensors of {folder} are not those of its config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}. Get its files again, or check that it is a Mamba-1 checkpoint."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{name} in {folder} has the shape {tuple(tensor.shape)}, its config.json implies {expected[name]}."
            )


def expected_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a plain Mamba's tensors, without `lm_head.weight` where it is tied."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.state_size
    rank = int(config.time_step_rank)
    mixer: dict[str, tuple[int, ...]] = {
        "A_log": (inner, size),
        "D": (inner,),
        "conv1d.weight": (inner, 1, config.conv_kernel),
        "in_proj.weight": (2 * inner, hidden),
        "x_proj.weight": (rank + 2 * size, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    if config.use_conv_bias:
        mixer["conv1d.bias"] = (inner,)
    if config.use_bias:
        mixer.update({"in_proj.bias": (2 * inner,), "out_proj.bias": (hidden,)})
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.weight": (config.vocab_size, hidden),
        "backbone.norm_f.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        shapes[f"backbone.layers.{layer}.norm.weight"] = (hidden,)
        shapes.update({f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()})
    return shapes

# SPDX-License-Identifier: Apache-2.0
"""The config.json of the original state-spaces format, in the terms of transformers' configurations.

It names the sizes of the stack and, under `ssm_cfg`, the arguments of the mixer's constructor, `layer` among them, which
says whether that is Mamba-1's or Mamba-2's. What is not named has the constructor's default.
"""

from typing import Any, NamedTuple

from ..checkpoint_files import CheckpointError
from ..families import PLAIN_FAMILIES, Family

_NORM_EPSILON = 1e-5


class _Mixer(NamedTuple):
    """How one mixer's constructor is read.

    model_type: of transformers' architecture with this mixer.
    names: what its arguments are called there.
    defaults: where they are not transformers'.
    only: arguments of which other models know a single value.
    without_effect: on a trained model's computation; d_ssm has none where `_add_heads` lets it pass.
    """

    model_type: str
    names: dict[str, str]
    defaults: dict[str, Any]
    only: dict[str, Any]
    without_effect: frozenset[str]


_NAMES = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_WITHOUT_EFFECT = frozenset(("layer", "layer_idx", "device", "dtype"))
_MIXERS = {
    "Mamba1": _Mixer(
        "mamba",
        _NAMES | {"dt_rank": "time_step_rank", "dt_init": "time_step_init_scheme", "dt_scale": "time_step_scale"},
        defaults={},
        only={},
        without_effect=_WITHOUT_EFFECT | {"use_fast_path"},
    ),
    "Mamba2": _Mixer(
        "mamba2",
        _NAMES | {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit", "chunk_size": "chunk_size"},
        # The ids are those of the tokenizer of all checkpoints in this format, where transformers' Mamba-2 has others.
        defaults={"n_groups": 1, "head_dim": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        only={"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "process_group": None},
        without_effect=_WITHOUT_EFFECT | {"A_init_range", "conv_init", "d_ssm", "use_mem_eff_path", "sequence_parallel"},
    ),
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of the original format."""
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def original_settings(config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family and the arguments of its plain configuration; the vocabulary's size comes from the padded table instead.

    Raises:
        CheckpointError: layers or settings that this model has not.
    """
    ssm = config.get("ssm_cfg") or {}
    layer = ssm.get("layer", "Mamba1")
    if layer not in _MIXERS:
        raise CheckpointError(f"ssm_cfg.layer is {layer!r}, which is none of {sorted(_MIXERS)}. Give a plain Mamba.")
    mixer, family = _MIXERS[layer], PLAIN_FAMILIES[_MIXERS[layer].model_type]
    if config.get("attn_layer_idx") or config.get("d_intermediate"):
        raise CheckpointError(
            "This checkpoint mixes Mamba with attention or MLP layers (attn_layer_idx, d_intermediate). Give a plain "
            f"{family.plain_name} checkpoint."
        )
    if not config.get("rms_norm", True):
        raise CheckpointError("This checkpoint uses LayerNorm (rms_norm is false), this model only RMSNorm.")
    settings = {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "layer_norm_epsilon": config.get("norm_epsilon", _NORM_EPSILON),
        **_mixer_settings(mixer, ssm, family.plain_name),
    }
    if layer == "Mamba2":
        _add_heads(settings, ssm)
    return family, settings


def _mixer_settings(mixer: _Mixer, ssm: dict[str, Any], plain_name: str) -> dict[str, Any]:
    unknown = sorted(ssm.keys() - mixer.names.keys() - mixer.only.keys() - mixer.without_effect)
    if unknown:
        raise CheckpointError(
            f"ssm_cfg has settings that {plain_name} does not know: {unknown}. Is this another architecture?"
        )
    for name, value in mixer.only.items():
        if ssm.get(name, value) != value:
            raise CheckpointError(
                f"ssm_cfg has {name}={ssm[name]!r}, this model computes with {value!r} only: the checkpoint cannot be "
                "converted."
            )
    return mixer.defaults | {theirs: ssm[name] for name, theirs in mixer.names.items() if name in ssm}


def _add_heads(settings: dict[str, Any], ssm: dict[str, Any]) -> None:
    """What the constructor of Mamba-2's mixer computes from its arguments, and checks."""
    inner, channels = settings.get("expand", 2) * settings["hidden_size"], settings["head_dim"]
    if ssm.get("d_ssm") not in (None, inner):
        raise CheckpointError(
            f"ssm_cfg has d_ssm={ssm['d_ssm']!r}: a part of the {inner} channels is a gated MLP, which this model has not."
        )
    if not isinstance(channels, int) or channels < 1 or inner % channels:
        raise CheckpointError(f"ssm_cfg has headdim={channels!r}, which does not divide expand * d_model = {inner}.")
    if settings["layer_norm_epsilon"] != _NORM_EPSILON:
        raise CheckpointError(
            f"norm_epsilon is {settings['layer_norm_epsilon']!r}: the gated norm's stays {_NORM_EPSILON} in this format, "
            "and this model has one for all norms."
        )
    settings["num_heads"] = inner // channels
    if "time_step_limit" in settings:
        settings["time_step_limit"] = [float(bound) for bound in settings["time_step_limit"]]

# SPDX-License-Identifier: Apache-2.0
"""Configuration of MemMamba."""

import math
from typing import Any, ClassVar

from transformers import MambaConfig

from .configuration_recurrent import RecurrentSettings
from .note_pool import POOLINGS, WRITE_RULES

FUSIONS = ("gated", "residual", "elementwise", "conv1d", "weighted")


class MemMambaConfig(RecurrentSettings, MambaConfig):
    r"""Configuration of [`MemMambaForCausalLM`]: transformers' `MambaConfig` and the settings of the memory
    (arXiv 2510.03279, section 3).

    Args:
        note_size (`int`, *optional*, defaults to 64):
            F: size of a note, of which every layer keeps `pool_size`.
        pool_size (`int`, *optional*, defaults to 50):
            K: notes of a layer's pool.
        note_heads (`int`, *optional*, defaults to 4):
            Heads of the attention over notes; a divisor of `note_size`.
        chunk_size (`int`, *optional*, defaults to 64):
            C: notes are committed to the pool, and can be read, where a chunk of so many of a row's own tokens ends. 1 is
            the paper's order, token by token.
        cross_layer_period (`int`, *optional*, defaults to 4):
            p: every p-th layer (not the first) also reads notes of the layers below. 0: none does.
        cross_layer_group (`int`, *optional*, defaults to 4):
            g: of how many layers below.
        write_rule (`str`, *optional*, defaults to `"priority"`):
            Which notes stay: `"priority"` those with the best scores, `"fifo"` the latest, `"periodic"` the latest of the
            first `write_span` in every `write_period` tokens (the paper's Fig. 2).
        recency_weight (`float`, *optional*, defaults to 0.0):
            What every token of age takes from the logarithm of a score under `"priority"`.
        write_threshold (`float`, *optional*, defaults to 0.0):
            tau1: tokens with a write score of at most this leave no note. In [0, 1).
        read_threshold (`float`, *optional*, defaults to 0.0):
            tau2: tokens whose read gate is at most this read nothing. In [0, 1).
        write_period, write_span (`int`, *optional*, default to 200 and 50):
            Of the periodic rule.
        write_cost (`float`, *optional*, defaults to 0.0):
            Weight of what writing costs in the loss of a training step: the mean of -log(1 - score) over tokens and layers.
            Only notes that are read learn from what they are good for; this teaches all others not to be written, so that in
            texts longer than those of the training fewer of them come before the good ones. .05 is a start.
        fusion (`str`, *optional*, defaults to `"gated"`):
            How what was read joins a token (the paper's Table 4): `"gated"` added under a gate of the token's, `"residual"`
            added, `"weighted"` added with a learned weight, `"elementwise"` added times the token, `"conv1d"` added after a
            pointwise convolution over the token and it.
        fusion_position (`str`, *optional*, defaults to `"pre"`):
            `"pre"`: before the mixer, which then sees it; `"post"`: behind it.
        pooling (`str`, *optional*, defaults to `"none"`):
            `"max"` or `"mean"`: a note stands for the last `pooling_window` tokens of its chunk instead of one.
        pooling_window (`int`, *optional*, defaults to 4):
            Tokens that a pooled note stands for.
    """

    model_type = "memmamba"
    plain_model_type = "mamba"
    family = "Mamba-1"
    class_prefix = "MemMamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache_params",
        "past_key_values",
        "hidden_states",
        "note_positions",
        "note_scores",
        "note_reads",
    ]

    note_size: int = 64
    pool_size: int = 50
    note_heads: int = 4
    chunk_size: int = 64
    cross_layer_period: int = 4
    cross_layer_group: int = 4
    write_rule: str = "priority"
    recency_weight: float = 0.0
    write_threshold: float = 0.0
    read_threshold: float = 0.0
    write_period: int = 200
    write_span: int = 50
    write_cost: float = 0.0
    fusion: str = "gated"
    fusion_position: str = "pre"
    pooling: str = "none"
    pooling_window: int = 4

    @property
    def number_of_conv_states(self) -> int:
        """States of a layer in transformers' caches: the mixer's, and the memory's."""
        return 2

    def reads_layers_below(self, layer_idx: int) -> bool:
        """Whether this layer is one that reads notes of the layers below (Eq. 7)."""
        return self.cross_layer_period > 0 and layer_idx > 0 and layer_idx % self.cross_layer_period == 0

    def check(self) -> None:
        super().check()
        for name in ("note_size", "pool_size", "note_heads", "chunk_size", "cross_layer_group", "pooling_window"):
            self._check_count(name, least=1)
        self._check_count("cross_layer_period", least=0)
        self._check_count("write_span", least=1)
        self._check_count("write_period", least=self.write_span)
        if self.note_size % self.note_heads:
            raise ValueError(f"note_size={self.note_size} is no multiple of note_heads={self.note_heads}.")
        choices = {
            "write_rule": WRITE_RULES,
            "fusion": FUSIONS,
            "fusion_position": ("pre", "post"),
            "pooling": POOLINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("write_threshold", "read_threshold"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {getattr(self, name)!r}.")
        for name in ("recency_weight", "write_cost"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)!r}.")

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = ["MemMambaConfig"]

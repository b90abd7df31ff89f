# SPDX-License-Identifier: Apache-2.0
"""Configuration of ReMamba-2."""

import math
from typing import Any

from transformers import Mamba2Config

from .configuration_two_stage import CompressionSettings


class ReMamba2Config(CompressionSettings, Mamba2Config):
    r"""Configuration of [`ReMamba2ForCausalLM`]: transformers' `Mamba2Config` and the settings of selective compression
    (arXiv 2408.15496, section 3), which [`CompressionSettings`] documents. Defaults are the paper's for Mamba-2:
    `compression_span` 0.25, `compression_ratio` 0.05.
    """

    model_type = "remamba2"
    plain_model_type = "mamba2"
    family = "Mamba-2"
    class_prefix = "ReMamba2"

    compression_span: float = 0.25
    compression_ratio: float = 0.05

    def __post_init__(self, **kwargs: Any) -> None:
        inner = kwargs.pop("intermediate_size", self.intermediate_size)  # some checkpoints write what the heads imply
        if inner != self.intermediate_size:
            raise ValueError(f"intermediate_size is {inner}, but num_heads * head_dim is {self.intermediate_size}.")
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if self.expand * self.hidden_size != self.intermediate_size:
            raise ValueError(
                f"num_heads * head_dim is {self.intermediate_size}, expand * hidden_size {self.expand * self.hidden_size}: "
                "they must be equal."
            )
        for name in ("n_groups", "state_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"num_heads={self.num_heads} is no multiple of n_groups={self.n_groups}: every group serves as many heads."
            )
        limit = self.time_step_limit
        if len(limit) != 2 or any(math.isnan(bound) for bound in limit) or not 0 <= limit[0] <= limit[1]:
            raise ValueError(f"time_step_limit must be (low, high) with 0 <= low <= high, got {limit!r}.")

    @property
    def intermediate_size(self) -> int:
        """E: the channels of all heads."""
        return int(self.num_heads * self.head_dim)


__all__ = ["ReMamba2Config"]

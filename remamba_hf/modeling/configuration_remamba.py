# SPDX-License-Identifier: Apache-2.0
"""Configuration of ReMamba."""

from transformers import MambaConfig

from .configuration_two_stage import CompressionSettings


class ReMambaConfig(CompressionSettings, MambaConfig):
    r"""Configuration of [`ReMambaForCausalLM`]: transformers' `MambaConfig` and the settings of selective compression
    (arXiv 2408.15496, section 3), which [`CompressionSettings`] documents. Defaults are the paper's for Mamba-1:
    `compression_span` 0.18, `compression_ratio` 0.009.
    """

    model_type = "remamba"
    plain_model_type = "mamba"
    family = "Mamba-1"
    class_prefix = "ReMamba"


__all__ = ["ReMambaConfig"]

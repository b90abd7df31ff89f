# SPDX-License-Identifier: Apache-2.0
"""Other checkpoints become ReMamba and ReMamba-2 checkpoints: state-spaces' Mamba-1 and Mamba-2 in both of their formats,
the authors' adapter."""

from .convert import ConversionReport, convert_checkpoint

__all__ = ["ConversionReport", "convert_checkpoint"]

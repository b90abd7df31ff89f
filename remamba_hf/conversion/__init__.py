# SPDX-License-Identifier: Apache-2.0
"""Other checkpoints become ReMamba, ReMamba-2 and MemMamba checkpoints: state-spaces' Mamba-1 and Mamba-2 in both of their
formats, and the ReMamba authors' adapter."""

from .convert import ConversionReport, convert_checkpoint

__all__ = ["ConversionReport", "convert_checkpoint"]

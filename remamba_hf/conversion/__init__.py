# SPDX-License-Identifier: Apache-2.0
"""Other checkpoints become ReMamba checkpoints: state-spaces' Mamba in both of its formats, the authors' adapter."""

from .convert import ConversionReport, convert_checkpoint

__all__ = ["ConversionReport", "convert_checkpoint"]

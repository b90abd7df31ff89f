# SPDX-License-Identifier: Apache-2.0
"""Training: data, collator, parameter groups, recipes."""

from .prompt_lengths import WithPromptLengths
from .two_stage_trainer import PromptResponseCollator, TwoStageTrainer, parameter_groups

__all__ = ["PromptResponseCollator", "TwoStageTrainer", "WithPromptLengths", "parameter_groups"]

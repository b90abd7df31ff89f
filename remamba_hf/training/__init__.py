# SPDX-License-Identifier: Apache-2.0
"""Training: data, collator, parameter groups, recipes."""

from .two_stage_trainer import PromptResponseCollator, TwoStageTrainer, parameter_groups

__all__ = ["PromptResponseCollator", "TwoStageTrainer", "parameter_groups"]

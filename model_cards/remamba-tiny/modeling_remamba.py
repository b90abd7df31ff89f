# SPDX-License-Identifier: Apache-2.0
"""ReMamba (arXiv 2408.15496): Mamba that reads a prompt twice, the second time with a window compressed to a few vectors.

The way of a prompt: `TwoStageForCausalLM.forward` and `TwoStageModel.forward` (two_stage_model.py), the two passes
(`TwoStageBackbone.read_rows`, two_stage_generation.py), and in each of them the blocks, whose mixer is here.

Shapes: `B` rows, `L` positions of a pass, `H` hidden size, `E` inner size, `R` rank of the step size.
"""

import torch
from transformers import GenerationMixin

from .configuration_remamba import ReMambaConfig
from .mamba_mixer import MambaMixer
from .recurrent_model import RecurrentPreTrainedModel
from .selective_compression import Adaptation
from .two_stage_model import StepAdaptation, TwoStageBlock, TwoStageForCausalLM, TwoStageModel


class ReMambaMixer(MambaMixer):
    """Mamba's mixer with stage 2's adapted step size.

    alpha scales what goes into `dt_proj` instead of what comes out: it is linear, and its bias stays outside alpha.
    """

    def __init__(self, config: ReMambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.adaptation = StepAdaptation(config.intermediate_size)

    def _step_size(self, step: torch.Tensor, adaptation: Adaptation | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dt = softplus(alpha * (W_dt step) + Theta + b_dt) at kept vectors, softplus(W_dt step + b_dt) elsewhere: here is
        alpha."""
        return super()._step_size(step if adaptation is None else adaptation.scale(step), None)

    def _shift(self, adaptation: Adaptation | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Theta, and where it is added."""
        return None if adaptation is None else self.adaptation(adaptation.where)


class ReMambaBlock(TwoStageBlock):
    mixer_class = ReMambaMixer


class ReMambaPreTrainedModel(RecurrentPreTrainedModel):
    config_class = ReMambaConfig
    _no_split_modules = ["ReMambaBlock"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_proj.bias", "adaptation"]


class ReMambaModel(TwoStageModel, ReMambaPreTrainedModel):
    """ReMamba's backbone."""

    config_class = ReMambaConfig  # transformers gives every class one of its own, which hides what others inherit
    block_class = ReMambaBlock


class ReMambaForCausalLM(TwoStageForCausalLM, ReMambaPreTrainedModel, GenerationMixin):
    """ReMamba with a language modeling head."""

    config_class = ReMambaConfig
    backbone_class = ReMambaModel


__all__ = ["ReMambaForCausalLM", "ReMambaModel", "ReMambaPreTrainedModel"]

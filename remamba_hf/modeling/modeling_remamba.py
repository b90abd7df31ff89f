# SPDX-License-Identifier: Apache-2.0
"""ReMamba (arXiv 2408.15496): Mamba that reads a prompt twice, the second time with a window compressed to a few vectors.

The way of a prompt: `TwoStageForCausalLM.forward` and `TwoStageModel.forward` (two_stage_model.py), the two passes
(`TwoStageBackbone.read_rows`, two_stage_generation.py), and in each of them the blocks, whose mixer is here.

Shapes: `B` rows, `L` positions of a pass, `H` hidden size, `E` inner size, `N` state size, `R` rank of the step size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_remamba import ReMambaConfig
from .precision import at_least_float32
from .selective_compression import Adaptation
from .selective_scan import selective_scan, selective_scan_step
from .two_stage_model import (
    StepAdaptation,
    TwoStageBlock,
    TwoStageForCausalLM,
    TwoStageMixer,
    TwoStageModel,
    TwoStagePreTrainedModel,
    depthwise_convolution,
    without_pads,
)


class StepProjection(nn.Linear):
    """The projection of the step size: its bias stays in float32, whatever the weight's dtype, and so does its result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias


class ReMambaMixer(TwoStageMixer):
    """Mamba's mixer (arXiv 2312.00752, section 3.4) with stage 2's adapted step size.

    alpha scales what goes into `dt_proj` instead of what comes out: it is linear, and its bias stays outside alpha.
    """

    def __init__(self, config: ReMambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, size, rank = config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv1d = depthwise_convolution(config, inner)
        self.x_proj = nn.Linear(inner, rank + 2 * size, bias=False)
        self.dt_proj = StepProjection(rank, inner, bias=True)
        self.adaptation = StepAdaptation(inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, size + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.split_sizes = [rank, size, size]

    def init_steps_and_decay(self) -> None:
        """S4D-real decay rates, step sizes log-uniform in [time_step_min, time_step_max]; arXiv 2312.00752, section 3.6."""
        config = self.config
        rates = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(rates).expand_as(self.A_log).contiguous())
        init.ones_(self.D)
        deviation = int(config.time_step_rank) ** -0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, deviation)
        else:
            init.uniform_(self.dt_proj.weight, -deviation, deviation)
        init.copy_(self.dt_proj.bias, self.initial_step_bias(config.intermediate_size, self.dt_proj.bias.device))

    def forward(
        self,
        hidden_states: torch.Tensor,
        adaptation: Adaptation | None = None,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
    ) -> torch.Tensor:
        """One pass over [B, L, H], from the cached state and back into it.

        Args:
            adaptation: where kept vectors stand, and their alpha; None: nowhere.
            lengths: [B], tokens of each row, pads follow; None: all L.
            cache_params: states to continue and to update.
        """
        conv_state, ssm_state = self.cached_states(cache_params)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if conv_state is not None and ssm_state is not None and self.decodes(hidden_states, lengths, adaptation):
            return self.out_proj(self._step(x[:, 0], z[:, 0], conv_state, ssm_state).unsqueeze(1))

        x, conv_state = self.convolve(x, conv_state, lengths)
        step, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        dt = without_pads(self._step_size(step, adaptation), lengths)
        y, ssm_state = selective_scan(
            x, dt, self._decay_rates(), B, C, self.D, z, ssm_state, return_final_state=cache_params is not None
        )
        self.update_cache(cache_params, conv_state, ssm_state)
        return self.out_proj(y)

    def _step(self, x: torch.Tensor, z: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> torch.Tensor:
        """One token: x, z [B, E] -> [B, E]. The cached states are updated in place."""
        x = self.convolve_token(x, conv_state)
        step, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        dt = self._step_size(step.unsqueeze(1), None)[:, 0]
        return selective_scan_step(x, dt, self._decay_rates(), B, C, self.D, z, ssm_state)

    def _step_size(self, step: torch.Tensor, adaptation: Adaptation | None) -> torch.Tensor:
        """dt = softplus(alpha * (W_dt step) + Theta + b_dt) at kept vectors, softplus(W_dt step + b_dt) elsewhere.

        step [B, L, R] -> [B, L, E], float32 at least.
        """
        if adaptation is None:
            return F.softplus(at_least_float32(self.dt_proj(step)))
        flat = step.flatten(0, 1)
        scaled = flat[adaptation.where] * adaptation.alpha.unsqueeze(-1).to(flat.dtype)
        step = flat.index_copy(0, adaptation.where, scaled).view_as(step)
        return F.softplus(self.adaptation(at_least_float32(self.dt_proj(step)), adaptation.where))

    def _decay_rates(self) -> torch.Tensor:
        """A [E, N], negative."""
        return -torch.exp(at_least_float32(self.A_log))


class ReMambaBlock(TwoStageBlock):
    mixer_class = ReMambaMixer


class ReMambaPreTrainedModel(TwoStagePreTrainedModel):
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

# SPDX-License-Identifier: Apache-2.0
"""ReMamba-2 (arXiv 2408.15496): the two stages of ReMamba on Mamba-2.

The way of a prompt: `TwoStageForCausalLM.forward` and `TwoStageModel.forward` (two_stage_model.py), the two passes
(`TwoStageBackbone.read_rows`, two_stage_generation.py), and in each of them the blocks, whose mixer is here.

Shapes: `B` rows, `L` positions of a pass, `H` hidden size, `E` inner size, `nh` heads of `P` channels, `G` groups of heads,
`N` state size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_remamba2 import ReMamba2Config
from .decode_kernels import FEW_ROWS, Convolution, dual_step, norm_in_one_kernel, norm_linear
from .precision import at_least_float32, with_shift
from .recurrent_model import (
    OwnStart,
    RecurrentMixer,
    RecurrentPreTrainedModel,
    RMSNorm,
    depthwise_convolution,
    without_pads,
)
from .selective_compression import Adaptation
from .state_space_dual import state_space_dual, state_space_dual_step
from .tail_kernels import dual_tail
from .two_stage_model import StepAdaptation, TwoStageBlock, TwoStageForCausalLM, TwoStageModel


class GatedGroupNorm(OwnStart):
    """Root mean square norm of x * silu(gate), over each of `groups` equal parts of the channels; computed in float32 at
    least, returned in the weight's dtype. arXiv 2405.21060, section 7.2."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def init_parameters(self) -> None:
        init.ones_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if (y := norm_in_one_kernel(x, self.weight, self.eps, gate, self.groups)) is not None:
            return y
        x = at_least_float32(x) * F.silu(at_least_float32(gate))
        parts = x.unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * parts.flatten(-2).to(self.weight.dtype)


class ReMamba2Mixer(RecurrentMixer):
    """Mamba-2's mixer (arXiv 2405.21060, section 7) with stage 2's adapted step size, one a head."""

    def __init__(self, config: ReMamba2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, heads, shared = config.intermediate_size, config.num_heads, config.n_groups * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner + 2 * shared + heads, bias=config.use_bias)
        self.conv1d = depthwise_convolution(config, inner + 2 * shared)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.adaptation = StepAdaptation(heads)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, heads + 1)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedGroupNorm(inner, config.n_groups, eps=config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.projected_sizes = [inner, inner + 2 * shared, heads]
        self.convolved_sizes = [inner, shared, shared]

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = self.config
        return (sum(self.convolved_sizes), config.conv_kernel), (config.num_heads, config.head_dim, config.state_size)

    def init_steps_and_decay(self) -> None:
        """Head h decays at the rate h + 1, as transformers initialises Mamba-2; step sizes log-uniform in [time_step_min,
        time_step_max]."""
        heads = self.config.num_heads
        rates = torch.arange(1, heads + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(rates))
        init.ones_(self.D)
        init.copy_(self.dt_bias, self.initial_step_bias(heads, self.dt_bias.device))

    def forward(
        self,
        hidden_states: torch.Tensor,
        adaptation: Adaptation | None = None,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over [B, L, H], from the cached state and back into it.

        Args:
            adaptation: where kept vectors stand, and their alpha; None: nowhere.
            lengths: [B], tokens of each row, pads follow; None: all L.
            cache_params: states to continue and to update.
            onto: see `project`.
        """
        conv_state, ssm_state = self.cached_states(cache_params)
        z, xBC, step = self.in_proj(hidden_states).split(self.projected_sizes, dim=-1)
        if conv_state is not None and ssm_state is not None and adaptation is None and self.decodes(hidden_states, lengths):
            y = self._step(xBC[:, 0], step, conv_state, ssm_state)
            return self.out_proj(self.norm(y, z))

        xBC, conv_state = self.convolve(xBC, conv_state, lengths, cache_params is not None)
        x, B, C = self._heads(xBC)
        y, ssm_state = state_space_dual(
            x,
            without_pads(self._step_size(step, adaptation), lengths),
            self.decay_rates(),
            B,
            C,
            self.D,
            ssm_state,
            return_final_state=cache_params is not None,
            chunk_size=self.config.chunk_size,
        )
        self.update_cache(cache_params, conv_state, ssm_state)
        return self.project(self.norm(y.flatten(2), z), onto)

    def _step(
        self, xBC: torch.Tensor, step: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        """One token: xBC [B, E + 2 G N], step [B, 1, nh] -> [B, 1, E]. The cached states are updated in place."""
        x, B, C = self._heads(self.convolve_token(xBC, conv_state))
        dt = self._step_size(step, None)[:, 0]
        return state_space_dual_step(x, dt, self.decay_rates(), B, C, self.D, ssm_state).flatten(1).unsqueeze(1)

    def _heads(self, xBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., E + 2 G N] -> x [..., nh, P], B and C [..., G, N]."""
        x, B, C = xBC.split(self.convolved_sizes, dim=-1)
        groups = (self.config.n_groups, self.config.state_size)
        return x.unflatten(-1, (self.config.num_heads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def fused_step(
        self,
        hidden_states: torch.Tensor,
        norm: RMSNorm,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        decay_rates: torch.Tensor,
        counters: torch.Tensor,
        residual_in_fp32: bool,
    ) -> torch.Tensor:
        """A block's step in a few kernels; see `MambaMixer.fused_step`."""
        sizes = self.projected_sizes
        kernel = Convolution(sizes[0], self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state)
        projected = norm_linear(
            hidden_states,
            self.in_proj.weight,
            self.in_proj.bias,
            norm.weight,
            norm.eps,
            convolution=kernel,
            counters=counters,
        )
        z, xBC, step = projected.split(sizes, dim=-1)
        states = decay_rates, self.D, ssm_state, self.config.time_step_limit
        gated = self.norm.weight, self.norm.eps, self.norm.groups
        last = self.out_proj.weight, self.out_proj.bias
        if len(hidden_states) <= FEW_ROWS:
            arguments = *states, *gated, *last, hidden_states, residual_in_fp32, counters
            return dual_tail(xBC, z, step, self.dt_bias, *arguments)
        y = dual_step(xBC, step, self.dt_bias, *states)
        weight, eps, groups = gated
        return norm_linear(y, *last, weight, eps, z, groups, hidden_states, residual_in_fp32)

    def _step_size(self, step: torch.Tensor, adaptation: Adaptation | None) -> torch.Tensor:
        """dt = clamp(softplus(alpha * step + Theta + dt_bias)) at kept vectors, without alpha and Theta elsewhere.

        step [B, L, nh] -> [B, L, nh], float32 at least.
        """
        step = at_least_float32(step)
        if adaptation is not None:
            step = with_shift(adaptation.scale(step), self.adaptation(adaptation.where))
        low, high = self.config.time_step_limit
        return F.softplus(step + self.dt_bias).clamp(low, high)

    def decay_rates(self) -> torch.Tensor:
        """A [nh], negative."""
        return -torch.exp(at_least_float32(self.A_log))


class ReMamba2Block(TwoStageBlock):
    mixer_class = ReMamba2Mixer


class ReMamba2PreTrainedModel(RecurrentPreTrainedModel):
    config_class = ReMamba2Config
    _no_split_modules = ["ReMamba2Block"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "adaptation"]


class ReMamba2Model(TwoStageModel, ReMamba2PreTrainedModel):
    """ReMamba-2's backbone."""

    config_class = ReMamba2Config  # transformers gives every class one of its own, which hides what others inherit
    block_class = ReMamba2Block


class ReMamba2ForCausalLM(TwoStageForCausalLM, ReMamba2PreTrainedModel, GenerationMixin):
    """ReMamba-2 with a language modeling head."""

    config_class = ReMamba2Config
    backbone_class = ReMamba2Model


__all__ = ["ReMamba2ForCausalLM", "ReMamba2Model", "ReMamba2PreTrainedModel"]

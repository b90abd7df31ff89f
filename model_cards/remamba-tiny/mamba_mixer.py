# SPDX-License-Identifier: Apache-2.0
"""Mamba's mixer (arXiv 2312.00752, section 3.4).

Shapes: `B` rows, `L` positions of a pass, `H` hidden size, `E` inner size, `N` state size, `R` rank of the step size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .decode_kernels import FEW_ROWS, Convolution, linear_in_parts, norm_linear, selective_update, step_from_parts
from .precision import at_least_float32, state_dtype
from .recurrent_model import RecurrentMixer, RMSNorm, depthwise_convolution, is_unhooked
from .selective_scan import selective_scan, selective_scan_step
from .tail_kernels import selective_tail


class StepProjection(nn.Linear):
    """The projection of the step size: its bias stays in float32, whatever the weight's dtype, and so does its result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias

    @property
    def is_plain(self) -> bool:
        """Whether the sum may be taken later, in float32 at least: the bias has that dtype, and the module is what its
        weights say, not wrapped by an adapter, quantised, offloaded or hooked."""
        return type(self) is StepProjection and self.bias.dtype == state_dtype(self.bias) and is_unhooked(self)


class MambaMixer(RecurrentMixer):
    """Projection, convolution, selective scan, projection, with transformers' names of the weights."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, size, rank = config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv1d = depthwise_convolution(config, inner)
        self.x_proj = nn.Linear(inner, rank + 2 * size, bias=False)
        self.dt_proj = StepProjection(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, size + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.split_sizes = [rank, size, size]

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inner = self.config.intermediate_size
        return (inner, self.config.conv_kernel), (inner, self.config.state_size)

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
        adaptation: Any = None,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over [B, L, H], from the cached state and back into it.

        Args:
            adaptation: what changes the step sizes of this pass, for families that do; None: nothing.
            lengths: [B], tokens of each row, pads follow; None: all L.
            cache_params: states to continue and to update.
            onto: see `project`.
        """
        conv_state, ssm_state = self.cached_states(cache_params)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        if conv_state is not None and ssm_state is not None and adaptation is None and self.decodes(hidden_states, lengths):
            return self.out_proj(self._step(x[:, 0], z[:, 0], conv_state, ssm_state).unsqueeze(1))

        x, conv_state = self.convolve(x, conv_state, lengths, cache_params is not None)
        step, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        dt, dt_bias = self._step_size(step, adaptation)
        y, ssm_state = selective_scan(
            x,
            dt,
            self.decay_rates(),
            B,
            C,
            self.D,
            z,
            ssm_state,
            return_final_state=cache_params is not None,
            dt_bias=dt_bias,
            softplus=True,
            lengths=lengths,
            shift=self._shift(adaptation),
        )
        self.update_cache(cache_params, conv_state, ssm_state)
        return self.project(y, onto)

    def _step(self, x: torch.Tensor, z: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> torch.Tensor:
        """One token: x, z [B, E] -> [B, E]. The cached states are updated in place."""
        x = self.convolve_token(x, conv_state)
        step, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        dt = F.softplus(at_least_float32(self.dt_proj(step)))
        return selective_scan_step(x, dt, self.decay_rates(), B, C, self.D, z, ssm_state)

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
        """A block's step in kernels that read the weights themselves, norm and residual sum included: [B, H], as given.

        For blocks whose layers are what their weights say (`decode_graph.can_be_fused`). States are updated in place. One
        row takes two kernels; for more the norm, the convolution and the products are kernels of their own.

        Args:
            counters: of `new_counters`, for this block alone.
        """
        kernel = Convolution(0, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state)
        xz = norm_linear(
            hidden_states,
            self.in_proj.weight,
            self.in_proj.bias,
            norm.weight,
            norm.eps,
            convolution=kernel,
            counters=counters,
        )
        x, z = xz.chunk(2, dim=-1)
        step_weight, step_bias = self.dt_proj.weight, self.dt_proj.bias
        last = self.out_proj.weight, self.out_proj.bias
        if len(hidden_states) <= FEW_ROWS:
            given = self.x_proj.weight, step_weight, step_bias, decay_rates, self.D, ssm_state
            return selective_tail(x, z, *given, *last, hidden_states, residual_in_fp32, counters)
        step, shared = step_from_parts(linear_in_parts(x, self.x_proj.weight), step_weight)
        y = selective_update(x, z, shared, step, step_bias, decay_rates, self.D, ssm_state)
        return norm_linear(y, *last, residual=hidden_states, residual_in_fp32=residual_in_fp32)

    def _step_size(self, step: torch.Tensor, adaptation: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What dt is softplus of, [B, L, R] -> [B, L, E]: W_dt step + b_dt, or W_dt step and b_dt [E], still to be added."""
        if isinstance(self.dt_proj, StepProjection) and self.dt_proj.is_plain:
            return F.linear(step, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(step), None

    def _shift(self, adaptation: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is added to the step sizes of some tokens; see `selective_scan`."""
        return None

    def decay_rates(self) -> torch.Tensor:
        """A [E, N], negative."""
        return -torch.exp(at_least_float32(self.A_log))

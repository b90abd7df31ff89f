# SPDX-License-Identifier: Apache-2.0
"""ReMamba and ReMamba-2 written out for one row, from the formulas and a state dict, one token after the other. Shares no
code with the package: it is what the package is compared with."""

import math

import torch
import torch.nn.functional as F


def norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def mlp(weights, name, x):
    hidden = F.silu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
    return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]


def mamba_mixer(weights, config, h, alpha, state):
    """h [L, H], alpha: a list with a scalar at kept vectors and None elsewhere. Returns y [L, H] and (conv, ssm) states."""
    size, rank, width = config.state_size, int(config.time_step_rank), config.conv_kernel
    inner = config.intermediate_size
    A = -torch.exp(weights["A_log"])
    conv, ssm = state if state is not None else (h.new_zeros(inner, width), h.new_zeros(inner, size))
    outputs = []
    for t in range(h.shape[0]):
        x, z = (h[t] @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0)).split(inner)
        conv = torch.cat([conv[:, 1:], x[:, None]], dim=1)
        x = F.silu((conv * weights["conv1d.weight"][:, 0]).sum(-1) + weights.get("conv1d.bias", 0))
        low, B, C = (x @ weights["x_proj.weight"].T).split([rank, size, size])
        raw = weights["dt_proj.weight"] @ low
        if alpha[t] is not None:
            raw = alpha[t] * raw + weights["adaptation.bias"]
        dt = F.softplus(raw + weights["dt_proj.bias"])
        ssm = torch.exp(dt[:, None] * A) * ssm + dt[:, None] * B[None] * x[:, None]
        y = ssm @ C + weights["D"] * x
        outputs.append((y * F.silu(z)) @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0))
    return torch.stack(outputs), (conv, ssm)


def mamba2_step_size(weights, config, raw, alpha):
    """dt of all heads at one token, from what in_proj gave for it."""
    if alpha is not None:
        raw = alpha * raw + weights["adaptation.bias"]
    low, high = config.time_step_limit
    return torch.clamp(F.softplus(raw + weights["dt_bias"]), low, high)


def mamba2_mixer(weights, config, h, alpha, state):
    """As `mamba_mixer`; arXiv 2405.21060, section 7: z, x, B, C and dt come from one projection, a head has one decay rate
    and one step, groups of heads share B and C, and the gated norm is taken over each group's channels."""
    heads, channels, size, groups = config.num_heads, config.head_dim, config.state_size, config.n_groups
    inner, shared = heads * channels, groups * size
    convolved = inner + 2 * shared
    group_of_head = [head * groups // heads for head in range(heads)]
    A = -torch.exp(weights["A_log"])
    conv, ssm = (
        state if state is not None else (h.new_zeros(convolved, config.conv_kernel), h.new_zeros(heads, channels, size))
    )
    projected = h @ weights["in_proj.weight"].T + weights.get("in_proj.bias", 0)
    outputs = []
    for t in range(h.shape[0]):
        z, xBC, raw = projected[t].split([inner, convolved, heads])
        conv = torch.cat([conv[:, 1:], xBC[:, None]], dim=1)
        xBC = F.silu((conv * weights["conv1d.weight"][:, 0]).sum(-1) + weights.get("conv1d.bias", 0))
        x = xBC[:inner].view(heads, channels)
        B = xBC[inner : inner + shared].view(groups, size)[group_of_head]
        C = xBC[inner + shared :].view(groups, size)[group_of_head]
        dt = mamba2_step_size(weights, config, raw, alpha[t])[:, None, None]
        ssm = torch.exp(dt * A[:, None, None]) * ssm + dt * x[:, :, None] * B[:, None, :]
        y = (ssm @ C[:, :, None])[:, :, 0] + weights["D"][:, None] * x
        outputs.append(y.flatten() * F.silu(z))
    normed = [norm(part, 1, config.layer_norm_epsilon) for part in torch.stack(outputs).chunk(groups, dim=-1)]
    y = torch.cat(normed, dim=-1) * weights["norm.weight"]
    return y @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0), (conv, ssm)


MIXERS = {"remamba": mamba_mixer, "remamba2": mamba2_mixer}


def under(weights, prefix):
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def one_pass(weights, config, x, alpha=None, states=None):
    """x [L, H] -> states after the final norm [L, H] and every layer's (conv, ssm)."""
    mixer = MIXERS[config.model_type]
    alpha = [None] * x.shape[0] if alpha is None else alpha
    final = []
    for layer in range(config.num_hidden_layers):
        part = under(weights, f"backbone.layers.{layer}.")
        normed = norm(x, part["norm.weight"], config.layer_norm_epsilon)
        y, state = mixer(under(part, "mixer."), config, normed, alpha, None if states is None else states[layer])
        x = x + y
        final.append(state)
    return norm(x, weights["backbone.norm_f.weight"], config.layer_norm_epsilon), final


def window_of(prompt_length, start, span, ratio):
    begin = int(start * prompt_length)
    length = min(max(math.ceil(prompt_length * span), 1), prompt_length - 1 - begin)
    return begin, length, math.ceil(length * ratio)


def chosen_of(selection, scores, kept):
    """Positions in the window, ascending: the best scored (of equal ones the earlier), or evenly spaced ones."""
    length = len(scores)
    if selection == "stride":
        return [i * length // kept for i in range(kept)]
    return sorted(sorted(range(length), key=lambda i: (-scores[i].item(), i))[:kept])


def two_stages(weights, config, ids, prompt_length, start, span, ratio, scale_gradient=False, fixed=None, selection="score"):
    """ids [L] -> logits [L, V], kept positions, scores, states. `fixed` replaces the selection (for gradient checks, and
    for "random", which is random)."""
    embeddings = weights["backbone.embeddings.weight"]
    head = weights.get("lm_head.weight", embeddings)
    begin, length, kept = window_of(prompt_length, start, span, ratio)
    x = embeddings[ids]
    if length <= 0:
        h, states = one_pass(weights, config, x)
        return h @ head.T, [], [], states
    h1, _ = one_pass(weights, config, x[:prompt_length])
    compressor = under(weights, "backbone.compressor.")
    query = mlp(compressor, "query", h1[prompt_length - 1])
    keys = mlp(compressor, "key", h1[begin : begin + length])
    scores = torch.stack([(k @ query) / (k.norm() * query.norm()).clamp(min=1e-8) for k in keys])
    chosen = chosen_of(selection, scores, kept) if fixed is None else fixed
    alpha = F.relu(scores[chosen])
    if scale_gradient:
        alpha = alpha * alpha.detach() + (alpha - alpha * alpha.detach()).detach()
    values = mlp(compressor, "value", h1[begin : begin + length][chosen])
    steps = [None] * begin + list(alpha) + [None] * (x.shape[0] - begin - length)
    if selection == "multiplicative":
        values, steps = values * scores[chosen].softmax(0)[:, None], None
    spliced = torch.cat([x[:begin], values, x[begin + length :]])
    h2, states = one_pass(weights, config, spliced, steps)
    h = torch.cat([h1[: begin + length], h2[begin + kept :]])
    return h @ head.T, [begin + i for i in chosen], [scores[i].item() for i in chosen], states

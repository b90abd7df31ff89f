# SPDX-License-Identifier: Apache-2.0
"""ReMamba written out for one row, from the formulas and a state dict, one token after the other. Shares no code with the
package: it is what the package is compared with."""

import math

import torch
import torch.nn.functional as F


def norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def mlp(weights, name, x):
    hidden = F.silu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
    return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]


def mixer(weights, config, h, alpha, state):
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


def under(weights, prefix):
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def one_pass(weights, config, x, alpha=None, states=None):
    """x [L, H] -> states after the final norm [L, H] and every layer's (conv, ssm)."""
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

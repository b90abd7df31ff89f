# SPDX-License-Identifier: Apache-2.0
"""The losses that teach a small ReMamba from scratch to recall.

With the answer's loss alone the scores learn to find a sentence long before the second stage can copy out of what was
kept. Two auxiliary losses remove that wait: the value of a position is drawn to the embedding of the token it stands
for, so that stage 2 can read kept vectors as it reads text, and the scores are told where the evidence is.

Shape legend: B rows, L tokens of a row, P prompt tokens, M window, H hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms.

    Attributes:
        answer: cross-entropy of the answer's tokens.
        language: cross-entropy of the prompt's tokens, which keeps the model a language model.
        value: relative squared distance of `value(h_t)` to the input embedding of token t.
        evidence: scores of the evidence against those of the rest of the window; of a model that takes notes, the write
            scores of the numbers against those of all else (`note_loss`).
    """

    answer: float = 1.0
    language: float = 0.2
    value: float = 0.5
    evidence: float = 0.3


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of every token but the first, in fp32.

    Args:
        logits: `[B, L, V]`, aligned with the input.
        input_ids: `int64[B, L]`.

    Returns:
        `fp32[B, L - 1]`; entry `t` belongs to token `t + 1`.
    """
    shifted = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(shifted, input_ids[:, 1:].flatten(), reduction="none").view(len(input_ids), -1)


def value_loss(value: nn.Module, states: Tensor, embeddings: Tensor) -> Tensor:
    """Squared distance of `value(states)` to `embeddings`, relative to the embeddings' mean square; a scalar.

    Args:
        value: the compressor's value projection.
        states: stage-1 states `[B, P, H]`.
        embeddings: input embeddings of the same tokens `[B, P, H]`; no gradient flows into them.
    """
    target = embeddings.detach().float()
    return (value(states).float() - target).square().mean() / target.square().mean()


def note_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Draws the write score of every token that a note is wanted of above all others' of the batch together; a scalar.

    In a long text the few best notes stay, so it is the highest score of very many others that decides.

    Args:
        logits: of write scores `[B, L]`.
        wanted: `bool[B, L]`.
    """
    logits = logits.float()
    others = logits.masked_fill(wanted, -math.inf).flatten().logsumexp(0)
    return (F.softplus(others - logits) * wanted).sum() / wanted.sum().clamp_min(1)


def evidence_loss(scores: Tensor, evidence: Tensor, sharpness: float = 20.0) -> Tensor:
    """Draws the cosine of evidence to 1, of all else to 0 or below, and every piece of evidence above all else.

    Args:
        scores: cosine of every window position with the query `[B, M]`.
        evidence: positions of the evidence `int64[B, 2]`: the first, and the one after the last. None counts beyond the
            window.
        sharpness: factor on the cosines inside the softmax over the window.

    Returns:
        Mean over the rows that have evidence in the window (0 when none has); a scalar.
    """
    scores = scores.float()
    position = torch.arange(scores.shape[1], device=scores.device)
    wanted = (position >= evidence[:, :1]) & (position < evidence[:, 1:])
    count = wanted.sum(-1)
    rest = (sharpness * scores).masked_fill(wanted, -math.inf).logsumexp(-1, keepdim=True)
    ranking = F.softplus(rest - sharpness * scores)
    near_one = (ranking + (1 - scores).square()) * wanted
    near_zero = scores.clamp_min(0).square() * ~wanted
    rows = near_one.sum(-1) / count.clamp_min(1) + near_zero.sum(-1) / (~wanted).sum(-1).clamp_min(1)
    present = (count > 0).float()
    return (rows * present).sum() / present.sum().clamp_min(1)

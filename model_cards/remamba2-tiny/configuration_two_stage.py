# SPDX-License-Identifier: Apache-2.0
"""The settings of selective compression that every two-stage configuration has."""

from dataclasses import dataclass
from typing import ClassVar

from .configuration_recurrent import RecurrentSettings
from .selective_compression import check_settings


@dataclass(kw_only=True, repr=False)
class CompressionSettings(RecurrentSettings):
    r"""Settings of selective compression (arXiv 2408.15496, section 3), mixed into a configuration of transformers.

    Args:
        compression_start (`float`, *optional*, defaults to 0.0):
            s: where the window that is compressed begins, as a share of the prompt.
        compression_span (`float`, *optional*, defaults to 0.18, ReMamba-2 0.25):
            p: length of the window as a share of the prompt; `compression_start + compression_span <= 1`.
        compression_ratio (`float`, *optional*, defaults to 0.009, ReMamba-2 0.05):
            rho: share of the window's positions that are kept as vectors.
        compression_max_kept (`int`, *optional*):
            At most this many vectors are kept, however long the prompt: with a wide window, a share of it that suits a short
            prompt keeps thousands of vectors of a long one, which then crowd each other out of the state. A
            ratio given for one call is not bounded. `None`, the paper's rule: no bound.
        compression_min_prompt (`int`, *optional*, defaults to 0):
            Prompts of fewer tokens are read as they are.
        selection (`str`, *optional*, defaults to `"score"`):
            Which positions are kept: `"score"` the best scored; the paper's ablations `"random"`, `"stride"` (evenly
            spaced) and `"multiplicative"` (the best scored, with the softmax of their scores multiplied into the vectors
            instead of adapting the step size).
        scale_score_gradient (`bool`, *optional*, defaults to `True`):
            Multiply the gradient of a kept position's score by that score, as the authors train.
        train_compression_start, train_compression_span, train_compression_ratio (`tuple[float, float]`, *optional*):
            Ranges that a training forward draws s, p and rho from, uniformly and once for its batch, with torch's
            global CPU generator, so that `set_seed` and a resumed `Trainer` reproduce them. `None`: the fixed setting.
        train_compression_tail (`int`, *optional*, defaults to 1500):
            In training, the window leaves at least this many tokens before the prompt's end; prompts no longer than
            this plus 100 get the smallest span of the range instead. 0 turns the rule off.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache_params",
        "past_key_values",
        "hidden_states",
        "compressed_positions",
        "compression_scores",
    ]

    compression_start: float = 0.0
    compression_span: float = 0.18
    compression_ratio: float = 0.009
    compression_max_kept: int | None = None
    compression_min_prompt: int = 0
    selection: str = "score"
    scale_score_gradient: bool = True
    train_compression_start: tuple[float, float] | list[float] | None = None
    train_compression_span: tuple[float, float] | list[float] | None = (0.1, 0.3)
    train_compression_ratio: tuple[float, float] | list[float] | None = (0.05, 0.2)
    train_compression_tail: int = 1500

    def check(self) -> None:
        super().check()
        check_settings(self)


__all__ = ["CompressionSettings"]

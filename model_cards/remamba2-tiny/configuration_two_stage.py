# SPDX-License-Identifier: Apache-2.0
"""The settings of selective compression that every two-stage configuration has."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .selective_compression import check_settings


@dataclass(kw_only=True, repr=False)  # transformers' own shows every setting
class CompressionSettings:
    r"""Settings of selective compression (arXiv 2408.15496, section 3), mixed into a configuration of transformers.

    A family sets `model_type`, `plain_model_type`, whose checkpoints it also reads, and `family`, the name of the plain
    architecture; its files are configuration_X.py and modeling_X.py with X its model type.

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
        max_position_embeddings (`int`, *optional*, defaults to 1048576):
            Not a limit of the model. Evaluation harnesses read it and cut prompts to 2,048 tokens where it is missing.
    """

    model_type: ClassVar[str]
    plain_model_type: ClassVar[str]
    family: ClassVar[str]
    class_prefix: ClassVar[str]
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
    max_position_embeddings: int = 1_048_576

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a checkpoint of another kind is refused instead of loaded with random weights."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind not in (cls.model_type, cls.plain_model_type):
            raise ValueError(
                f"This checkpoint is a {kind!r} model, not {cls.family}. Load it with AutoModelForCausalLM, or give a "
                f"checkpoint of type {cls.plain_model_type!r} or {cls.model_type!r}."
            )
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        check_settings(result[0] if isinstance(result, tuple) else result)  # with what was given for this load
        return result

    def __post_init__(self, **kwargs: Any) -> None:
        modeling, prefix = f"modeling_{self.model_type}", self.class_prefix
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": f"configuration_{self.model_type}.{prefix}Config",
                "AutoModel": f"{modeling}.{prefix}Model",
                "AutoModelForCausalLM": f"{modeling}.{prefix}ForCausalLM",
            },
        )
        super().__post_init__(**kwargs)  # type: ignore[misc]
        check_settings(self)
        if self.hidden_act != "silu":  # type: ignore[attr-defined]
            raise ValueError(
                f"hidden_act={self.hidden_act!r}: Mamba's kernels know only 'silu'. Set hidden_act='silu'."  # type: ignore[attr-defined]
            )


__all__ = ["CompressionSettings"]

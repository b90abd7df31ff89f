# SPDX-License-Identifier: Apache-2.0
"""What the configurations of all families have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(kw_only=True, repr=False)  # transformers' own shows every setting
class RecurrentSettings:
    r"""Mixed into a configuration of transformers. A family sets `model_type`, `plain_model_type`, whose checkpoints it
    also reads, `family`, the name of the plain architecture, and `class_prefix`; its files are configuration_X.py and
    modeling_X.py with X its model type.

    Args:
        max_position_embeddings (`int`, *optional*, defaults to 1048576):
            Not a limit of the model. Evaluation harnesses read it and cut prompts to 2,048 tokens where it is missing.
    """

    model_type: ClassVar[str]
    plain_model_type: ClassVar[str]
    family: ClassVar[str]
    class_prefix: ClassVar[str]

    max_position_embeddings: int = 1_048_576

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a checkpoint of another kind is refused instead of loaded with random weights, and the
        configuration of a plain one becomes this family's, also by its `model_type`, which packages such as PEFT go by."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind not in (cls.model_type, cls.plain_model_type):
            raise ValueError(
                f"This checkpoint is a {kind!r} model, not {cls.family}. Load it with AutoModelForCausalLM, or give a "
                f"checkpoint of type {cls.plain_model_type!r} or {cls.model_type!r}."
            )
        config_dict = {**config_dict, "model_type": cls.model_type}
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        (result[0] if isinstance(result, tuple) else result).check()  # with what was given for this load
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
        self.check()

    def check(self) -> None:
        """Raise a ValueError that names the setting and its range if one cannot be honoured."""
        act = self.hidden_act  # type: ignore[attr-defined]
        if act != "silu":
            raise ValueError(f"hidden_act={act!r}: Mamba's kernels know only 'silu'. Set hidden_act='silu'.")


__all__ = ["RecurrentSettings"]

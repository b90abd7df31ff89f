# SPDX-License-Identifier: Apache-2.0
"""The families of models, and transformers' plain model that each of them extends."""

from typing import Any, NamedTuple

from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from .modeling.configuration_memmamba import MemMambaConfig
from .modeling.configuration_remamba import ReMambaConfig
from .modeling.configuration_remamba2 import ReMamba2Config
from .modeling.modeling_memmamba import MemMambaForCausalLM
from .modeling.modeling_remamba import ReMambaForCausalLM
from .modeling.modeling_remamba2 import ReMamba2ForCausalLM


class Family(NamedTuple):
    """One family.

    name: of the family, as people write it.
    plain_name: of the architecture it extends.
    config_class, model_class: its configuration and language model.
    plain_config_class, plain_model_class: transformers' own, whose checkpoints it loads.
    kernels: the optional kernels (`optional_kernels.KERNELS`) that it uses.
    compresses: whether it reads prompts in two stages, compressing them; otherwise it takes notes.
    """

    name: str
    plain_name: str
    config_class: Any
    model_class: Any
    plain_config_class: Any
    plain_model_class: Any
    kernels: tuple[str, ...]
    compresses: bool

    @property
    def model_type(self) -> str:
        return str(self.config_class.model_type)

    @property
    def plain_type(self) -> str:
        """transformers' model type of the architecture it extends."""
        return str(self.plain_config_class.model_type)


_CONVOLUTION_KERNELS = ("causal_convolution", "causal_convolution_step")
_MAMBA_KERNELS = ("selective_scan", "selective_scan_step", *_CONVOLUTION_KERNELS)
ALL_FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "ReMamba",
            "Mamba-1",
            ReMambaConfig,
            ReMambaForCausalLM,
            MambaConfig,
            MambaForCausalLM,
            _MAMBA_KERNELS,
            compresses=True,
        ),
        Family(
            "ReMamba-2",
            "Mamba-2",
            ReMamba2Config,
            ReMamba2ForCausalLM,
            Mamba2Config,
            Mamba2ForCausalLM,
            ("state_space_dual", "selective_scan_step", *_CONVOLUTION_KERNELS),
            compresses=True,
        ),
        Family(
            "MemMamba",
            "Mamba-1",
            MemMambaConfig,
            MemMambaForCausalLM,
            MambaConfig,
            MambaForCausalLM,
            _MAMBA_KERNELS,
            compresses=False,
        ),
    )
}
# Those that compress prompts, by their own type, and by that of the plain model, which becomes them unless told otherwise.
FAMILIES = {model_type: family for model_type, family in ALL_FAMILIES.items() if family.compresses}
PLAIN_FAMILIES = {family.plain_type: family for family in FAMILIES.values()}

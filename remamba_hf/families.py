# SPDX-License-Identifier: Apache-2.0
"""The two-stage families, and transformers' plain model that each of them extends."""

from typing import Any, NamedTuple

from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from .modeling.configuration_remamba import ReMambaConfig
from .modeling.configuration_remamba2 import ReMamba2Config
from .modeling.modeling_remamba import ReMambaForCausalLM
from .modeling.modeling_remamba2 import ReMamba2ForCausalLM


class Family(NamedTuple):
    """One family.

    name: of the family, as people write it.
    plain_name: of the architecture it extends.
    config_class, model_class: its configuration and language model.
    plain_config_class, plain_model_class: transformers' own, whose checkpoints it loads.
    kernels: the optional kernels (`optional_kernels.KERNELS`) that it uses.
    """

    name: str
    plain_name: str
    config_class: Any
    model_class: Any
    plain_config_class: Any
    plain_model_class: Any
    kernels: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.config_class.model_type)


_CONVOLUTION_KERNELS = ("causal_convolution", "causal_convolution_step")
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "ReMamba",
            "Mamba-1",
            ReMambaConfig,
            ReMambaForCausalLM,
            MambaConfig,
            MambaForCausalLM,
            ("selective_scan", "selective_scan_step", *_CONVOLUTION_KERNELS),
        ),
        Family(
            "ReMamba-2",
            "Mamba-2",
            ReMamba2Config,
            ReMamba2ForCausalLM,
            Mamba2Config,
            Mamba2ForCausalLM,
            ("state_space_dual", "selective_scan_step", *_CONVOLUTION_KERNELS),
        ),
    )
}
PLAIN_FAMILIES = {str(family.plain_config_class.model_type): family for family in FAMILIES.values()}

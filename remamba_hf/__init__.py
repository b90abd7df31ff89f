# SPDX-License-Identifier: Apache-2.0
"""Mamba that reads long documents, for Hugging Face Transformers.

Importing this package registers its models with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so that its
checkpoints load without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling.configuration_memmamba import MemMambaConfig
from .modeling.configuration_remamba import ReMambaConfig
from .modeling.configuration_remamba2 import ReMamba2Config
from .modeling.modeling_memmamba import MemMambaForCausalLM, MemMambaModel, MemMambaPreTrainedModel
from .modeling.modeling_remamba import ReMambaForCausalLM, ReMambaModel, ReMambaPreTrainedModel
from .modeling.modeling_remamba2 import ReMamba2ForCausalLM, ReMamba2Model, ReMamba2PreTrainedModel

__version__ = "0.1.0"
__all__ = [
    "MemMambaConfig",
    "MemMambaForCausalLM",
    "MemMambaModel",
    "MemMambaPreTrainedModel",
    "ReMamba2Config",
    "ReMamba2ForCausalLM",
    "ReMamba2Model",
    "ReMamba2PreTrainedModel",
    "ReMambaConfig",
    "ReMambaForCausalLM",
    "ReMambaModel",
    "ReMambaPreTrainedModel",
]

for _config, _model, _language_model in (
    (ReMambaConfig, ReMambaModel, ReMambaForCausalLM),
    (ReMamba2Config, ReMamba2Model, ReMamba2ForCausalLM),
    (MemMambaConfig, MemMambaModel, MemMambaForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _language_model)
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModel")
    _language_model.register_for_auto_class("AutoModelForCausalLM")

# SPDX-License-Identifier: Apache-2.0
"""Mamba that reads long documents, for Hugging Face Transformers.

Importing this package registers its models with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, so that its
checkpoints load without remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling.configuration_remamba import ReMambaConfig
from .modeling.modeling_remamba import ReMambaForCausalLM, ReMambaModel, ReMambaPreTrainedModel

__version__ = "0.1.0"
__all__ = ["ReMambaConfig", "ReMambaForCausalLM", "ReMambaModel", "ReMambaPreTrainedModel"]

AutoConfig.register(ReMambaConfig.model_type, ReMambaConfig)
AutoModel.register(ReMambaConfig, ReMambaModel)
AutoModelForCausalLM.register(ReMambaConfig, ReMambaForCausalLM)
for _class, _auto in (
    (ReMambaConfig, "AutoConfig"),
    (ReMambaModel, "AutoModel"),
    (ReMambaForCausalLM, "AutoModelForCausalLM"),
):
    _class.register_for_auto_class(_auto)

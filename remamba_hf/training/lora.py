# SPDX-License-Identifier: Apache-2.0
"""The ReMamba paper's fine-tuning: LoRA on what a plain Mamba has, and what a family adds to it trained in full.

Source: arXiv 2408.15496, section 4.1, and the authors' training code for what the paper leaves out (LoRA's alpha).
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedModel

from ..families import ALL_FAMILIES
from .quantised import is_quantised

LORA_TARGETS = ("embeddings", "in_proj", "out_proj", "lm_head")
# What is trained in full, by model type. A Mamba-2 has no dt_proj: its raw step sizes are rows of in_proj, which LoRA
# reaches. Its dt_bias stays as it is: PEFT trains and saves whole modules, low-rank updates of matrices
# (`target_parameters` refuses vectors) and what is named `bias` (`bias="all"`), and dt_bias is none of these.
FULLY_TRAINED = {
    "remamba": ("compressor", "adaptation", "dt_proj"),
    "remamba2": ("compressor", "adaptation"),
    "memmamba": ("memory",),
}
# What the paper trains with besides; for `TrainingArguments`. Its global batch is 128 rows, of 6,000 tokens at most.
PAPER_ARGUMENTS: dict[str, Any] = dict(
    learning_rate=2e-5,
    weight_decay=0.1,
    lr_scheduler_type="cosine",
    warmup_steps=0,
    num_train_epochs=1,
    max_grad_norm=1.0,
)
PAPER_BATCH = 128


def remamba_lora_config(model_or_config: Any, **changes: Any) -> LoraConfig:
    """PEFT's configuration of the paper's recipe for a model of this package.

    LoRA of rank 32 (alpha 8, no dropout) on embeddings, in_proj, out_proj and lm_head; in full the compressor, Theta and
    dt_proj, of MemMamba every layer's memory.

    Args:
        model_or_config: a ReMamba, ReMamba-2 or MemMamba, or its configuration.
        changes: fields of `LoraConfig` to set otherwise, e.g. `r=8` or `target_modules=["in_proj"]`.

    Raises:
        TypeError: `changes` names no field of `LoraConfig`.
        ValueError: the model is of no family of this package, or a changed name fits none of a given model's modules.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    if model_type not in ALL_FAMILIES:
        raise ValueError(
            f"The recipe is for {', '.join(sorted(ALL_FAMILIES))}, got a {model_type or type(model_or_config).__name__}. "
            "Load a plain Mamba with ReMambaForCausalLM.from_pretrained, a Mamba-2 with ReMamba2ForCausalLM.from_pretrained."
        )
    unknown = sorted(set(changes) - set(LoraConfig.__dataclass_fields__))
    if unknown:
        raise TypeError(f"LoraConfig has no fields {unknown}. Check their spelling.")
    recipe: dict[str, Any] = dict(
        r=32,
        lora_alpha=8,
        target_modules=list(LORA_TARGETS),
        modules_to_save=list(FULLY_TRAINED[model_type]),
        task_type="CAUSAL_LM",
    )
    settings = {**recipe, **changes}
    if isinstance(model_or_config, nn.Module):
        for field in ("target_modules", "modules_to_save"):
            _check_names(model_or_config, field, settings[field])
    return LoraConfig(**settings)


def _check_names(model: nn.Module, field: str, names: Any) -> None:
    """PEFT says nothing of a name that fits no module, if another one fits."""
    if names is None or isinstance(names, str):  # an expression, which PEFT itself checks
        return
    modules = [name for name, _ in model.named_modules()]
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
            raise ValueError(f"{field} names {wanted!r}, which is no module of {type(model).__name__}.")


class AdaptedModel(PeftModelForCausalLM):
    """A model with adapters, whose checkpoints and pushes to the Hub hold what is trained and nothing frozen.

    PEFT alone adds the frozen embeddings and head as soon as an adapter acts on the head.
    """

    def save_pretrained(self, save_directory: str | os.PathLike[str], **settings: Any) -> None:
        """As PEFT's, but for its default of `save_embedding_layers`."""
        super().save_pretrained(str(save_directory), **{"save_embedding_layers": _frozen_ends_to_save(self), **settings})


def _frozen_ends_to_save(model: PeftModel) -> bool | str:
    """PEFT's `save_embedding_layers`. Its own rule ("auto") also saves what was resized after loading; an adapter that acts
    on embeddings or head has their size and does not load onto another, so that nothing is lost silently."""
    base = model.get_base_model()
    adapted = (_inmost(module) is not module for module in (base.get_input_embeddings(), base.get_output_embeddings()))
    return False if any(adapted) else "auto"


def add_lora(model: PreTrainedModel, config: LoraConfig | None = None) -> AdaptedModel:
    """The model with adapters, ready for training in mixed precision.

    All that is trained is made float32: PEFT does so for LoRA only, and in bfloat16 a weight of 0.02 does not move by
    less than 6e-5, which is more than a step of the recipe (see also `train_in_float32`). Run the forward under autocast
    where the base is bfloat16.

    A quantised base needs nothing besides. PEFT's `prepare_model_for_kbit_training` would make every frozen weight that is
    not quantised float32, embeddings and head above all. These models compute norms, step sizes, states and the loss in
    float32 anyway.

    Args:
        model: of a family of this package; its own weights are frozen. Quantised: see `quantization_config`.
        config: default: `remamba_lora_config(model)`.

    Raises:
        ValueError: the model has adapters already, or what shall be trained in full is quantised.
    """
    if isinstance(model, PeftModel) or any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("The model has adapters already. Merge them with merge_lora, or load the base again.")
    config = config or remamba_lora_config(model)
    _check_not_quantised(model, config.modules_to_save or ())
    config.base_model_name_or_path = model.name_or_path or None
    with warnings.catch_warnings():  # of tied embeddings, which `merge_lora` unties
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        adapted = AdaptedModel(model, config)
    train_in_float32(adapted)
    return adapted


def train_in_float32(model: nn.Module) -> None:
    """Makes all that is trained float32, but for what is float64. To call again, before training, where others round it:
    TRL's SFTTrainer does, to bfloat16, when it is given a base that bitsandbytes quantised."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float64:
            parameter.data = parameter.data.float()


def _check_not_quantised(model: nn.Module, fully_trained: Any) -> None:
    for name, parameter in model.named_parameters():
        if is_quantised(parameter) and any(f".{part}." in f".{name}" for part in fully_trained):
            raise ValueError(
                f"{name} shall be trained in full, but is quantised. Load the model with quantization_config() of "
                "remamba_hf.training.quantised, which leaves such weights as they are."
            )


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter, all or nothing, without the frozen weights of embeddings and head, which PEFT adds to an adapter
    that acts on the head. Replaces an adapter that is there.

    Raises:
        FileExistsError: `folder` is something other than an adapter.
    """
    target = Path(folder)
    if target.exists() and not (target / "adapter_config.json").is_file():
        raise FileExistsError(f"{target} is no adapter. Give another folder, or remove it.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), save_embedding_layers=_frozen_ends_to_save(model))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def untie_embeddings(model: PreTrainedModel) -> bool:
    """Gives the head a weight of its own, a copy of the embeddings', if it shares theirs; says whether it did.

    Works on a model with adapters too, whose logits do not change.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head, table = (_inmost(module) for module in (inner.get_output_embeddings(), inner.get_input_embeddings()))
    tied = head.weight is table.weight
    if tied:
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=table.weight.requires_grad)
    inner.config.tie_word_embeddings = False
    return tied


def _inmost(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """A model of the same class with the adapter in its weights, which computes what `model` computes.

    Embeddings and head that share one tensor are untied first if the adapter acts on either: merged into the shared tensor,
    each would get the update of the other as well. (The authors' merge does so: `remamba convert --merge tied`.)

    Raises:
        ValueError: the base is quantised, or LoRA acts on a convolution, which PEFT cannot merge.
    """
    base = model.get_base_model()
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "A quantised base cannot take an adapter in exactly. Put the adapter on the base in bfloat16 or float32, or on "
            "the quantised base after its dequantize(), which then computes what was trained, and merge there."
        )
    convolutions = [name for name, module in base.named_modules() if name.endswith("conv1d") and hasattr(module, "lora_A")]
    if convolutions:
        raise ValueError(f"LoRA on {convolutions[0]} cannot be merged: keep the adapter, or train conv1d in full.")
    adapted = [_inmost(module) is not module for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    if any(adapted):
        untie_embeddings(model)
    return model.merge_and_unload()

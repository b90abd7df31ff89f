# SPDX-License-Identifier: Apache-2.0
"""The conversion from finding the source to renaming the folder into place."""

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoint_files import CheckpointError, copy_tokenizer, locate
from ..families import ALL_FAMILIES, FAMILIES, Family
from .lora_adapter import Adapter, check_adapter, insert_full_weights, merge_updates, read_adapter, unmerged
from .mamba_checkpoints import PlainMamba, read_plain_mamba
from .output_folder import output_folder, require_space
from .verification import (
    Reference,
    assign_weights,
    full_logits,
    parameter_shapes,
    plain_logits,
    reference,
    require_equal,
    transformers_reference,
    two_stage_logits,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_SIZE = "5GB"
_UNTRAINED_MEMORY = (
    "The memory is UNTRAINED but harmless: what tokens read of it starts at zero, so the model computes exactly what the "
    "plain Mamba does. Train it before you expect it to remember."
)
_SEED = 0  # of what the source lacks: compressor or memory


@dataclass
class ConversionReport:
    """What was written, and how it was verified.

    output: the folder.
    kind: what the source was, in words.
    parameters: how many, shared ones once.
    dtype: of the weights (decay rates, step bias and Theta are float32 always).
    tied: whether embeddings and head share one tensor.
    checks: what was compared, and the largest difference of two logits relative to the largest logit.
    notes: what the user should know or do.
    """

    output: Path
    kind: str
    parameters: int
    dtype: str
    tied: bool
    checks: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str,
    output: str | Path,
    *,
    to: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    merge: str = "untied",
    initialize_compressor: bool = False,
    dtype: str | None = None,
    tokenizer: str | None = None,
    tokenizer_revision: str | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes a checkpoint of this package made from a plain Mamba-1 or Mamba-2 and, if given, an adapter trained on it.

    The result is verified in float32: before it is written against transformers' Mamba (with an adapter against the
    computation that is not merged), after it is written by loading it. Only then does the folder get its name.

    Args:
        source: local folder or Hub id of a Mamba-1 or Mamba-2, in transformers' or in the original format.
        output: the folder to write; it must not exist.
        to: `"remamba"` or `"memmamba"` for a Mamba-1, `"remamba2"` for a Mamba-2; default: the one that compresses prompts.
        revision, adapter_revision, tokenizer_revision: branch, tag or commit of a Hub repository.
        adapter: local folder or Hub id of a PEFT adapter of ReMamba or ReMamba-2.
        merge: `"untied"` equals the trained model; `"tied"` adds what embeddings and head gained to one shared tensor,
            as the authors' merge does.
        initialize_compressor: start Query, Key and Value from layer 0, as the paper does (for training).
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; default: the source's.
        tokenizer: local folder or Hub id to take the tokenizer from; default: the source.
        settings: `compression_*`, `note_size` and other fields of the family's configuration to set.
        overwrite: replace `output` if it is a checkpoint.

    Raises:
        CheckpointError: nothing has been written then.
        ValueError: settings out of range.
    """
    output = Path(output)
    _check_arguments(
        to, adapter, adapter_revision, merge, initialize_compressor, dtype, tokenizer, tokenizer_revision, settings
    )
    folders = [Path(path) for path in (source, adapter, tokenizer) if path is not None and Path(path).is_dir()]
    with output_folder(output, overwrite, tuple(folders)) as partial:
        source_folder = locate(source, revision)
        adapter_folder = None if adapter is None else locate(adapter, adapter_revision)
        tokenizer_folder = source_folder if tokenizer is None else locate(tokenizer, tokenizer_revision)
        update = None if adapter_folder is None else read_adapter(adapter_folder)
        if initialize_compressor and update is not None and update.has_compressor:
            raise CheckpointError("The adapter brings a trained compressor: leave out --init-compressor.")
        base = read_plain_mamba(source_folder)
        family = base.family if to is None else ALL_FAMILIES[to]
        _check_base(base, family, initialize_compressor)
        _check_settings_of(family, settings or {})
        written_dtype = base.dtype if dtype is None else DTYPES[dtype]
        report = ConversionReport(output, base.kind, 0, str(written_dtype).removeprefix("torch."), tied=False)

        model = _verified_model(base, family, update, merge == "tied", settings or {}, report)
        if family.compresses:
            _start_compressor(model, update, initialize_compressor, report)
        else:
            report.notes.append(_UNTRAINED_MEMORY)
        _set_dtype(model, written_dtype)
        report.parameters = sum(parameter.numel() for parameter in model.parameters())
        report.tied = model.config.tie_word_embeddings
        require_space(partial, sum(parameter.nbytes for parameter in model.parameters()))
        if (source_folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source_folder)
        model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        if not copy_tokenizer(tokenizer_folder, partial):
            report.notes.append(_no_tokenizer_note(tokenizer_folder, base.kind))
        expected = Reference(full_logits(model.float()), noise=0.0)
        silent = _tensors_without_effect(model)
        del model
        gc.collect()
        report.checks["the folder, loaded again"] = _check_written(partial, family.model_class, expected, silent)
    return report


def _check_arguments(
    to: str | None,
    adapter: str | None,
    adapter_revision: str | None,
    merge: str,
    initialize_compressor: bool,
    dtype: str | None,
    tokenizer: str | None,
    tokenizer_revision: str | None,
    settings: dict[str, Any] | None,
) -> None:
    """Everything that can be refused before anything is downloaded or read."""
    if merge not in ("untied", "tied"):
        raise CheckpointError(f"merge must be 'untied' or 'tied', got {merge!r}.")
    if to is not None and to not in ALL_FAMILIES:
        raise CheckpointError(f"to must be one of {sorted(ALL_FAMILIES)}, got {to!r}.")
    if to is not None and not ALL_FAMILIES[to].compresses:
        _check_nothing_to_compress(ALL_FAMILIES[to].name, adapter, initialize_compressor)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}.")
    if adapter is None and (adapter_revision is not None or merge == "tied"):
        raise CheckpointError("An adapter's revision or merge needs an adapter. Name it, or leave these out.")
    if tokenizer is None and tokenizer_revision is not None:
        raise CheckpointError("A tokenizer's revision needs a tokenizer. Name it, or leave the revision out.")
    _check_settings(settings or {}, list(FAMILIES.values()) if to is None else [ALL_FAMILIES[to]])


def _check_nothing_to_compress(name: str, adapter: str | None, initialize_compressor: bool) -> None:
    if initialize_compressor:
        raise CheckpointError(f"{name} has no compressor: leave out --init-compressor.")
    if adapter is not None:
        raise CheckpointError(
            f"Adapters of ReMamba and ReMamba-2 have no place in {name}: leave out --adapter. To make a MemMamba of what "
            "was trained with an adapter on plain Mamba, merge that with PEFT first."
        )


def _check_settings(settings: dict[str, Any], families: list[Family]) -> None:
    """Raises a ValueError unless one of the families can be set so. Their defaults differ."""
    for family in families:
        try:
            _check_settings_of(family, settings)
            return
        except ValueError:
            if family is families[-1]:
                raise


def _check_settings_of(family: Family, settings: dict[str, Any]) -> None:
    known = family.config_class(num_hidden_layers=1)
    foreign = [name for name in settings if not hasattr(known, name)]
    if foreign:
        owners = [other.model_type for other in ALL_FAMILIES.values() if hasattr(other.config_class(), foreign[0])]
        hint = f"Give --to {owners[0]}, or leave them out." if owners else "Check their spelling."
        raise CheckpointError(f"{family.name} has no settings {foreign}. {hint}")
    family.config_class(**{"num_hidden_layers": 1, **settings})


def _check_base(base: PlainMamba, family: Family, initialize_compressor: bool) -> None:
    """Everything that can be refused before any weight is computed with."""
    possible = [other for other in ALL_FAMILIES.values() if other.plain_type == base.family.plain_type]
    if family not in possible:
        names = " or ".join(repr(other.model_type) for other in possible)
        raise CheckpointError(
            f"The source is {base.kind}, which becomes {names}, not {family.model_type!r}. Leave out --to, or give "
            f"a {family.plain_name} checkpoint."
        )
    expand = base.settings.get("expand", base.family.plain_config_class.expand)
    if initialize_compressor and expand != 2:
        raise CheckpointError(f"The paper's start of the compressor needs expand=2, the source has {expand}: leave it out.")


def _verified_model(
    base: PlainMamba,
    family: Family,
    adapter: Adapter | None,
    tied_merge: bool,
    settings: dict[str, Any],
    report: ConversionReport,
) -> PreTrainedModel:
    """The converted model in float32, its logits checked."""
    tensors = {name: tensor.float() for name, tensor in base.tensors.items()}
    base.tensors.clear()
    config_settings = {**base.settings, **settings}
    model = _assemble(family, tensors, config_settings)
    theirs = f"transformers' {family.plain_name}"
    expected = transformers_reference(family, base.settings, tensors)
    if expected.changed:
        report.notes.append(f"{theirs} served as reference after a change: {expected.changed}.")
    report.checks[f"plain logits against {theirs}"] = require_equal(
        plain_logits(model), expected, f"the logits of {theirs} and of the converted model"
    )
    if adapter is None:
        return model
    report.kind += " with an adapter"
    check_adapter(adapter, parameter_shapes(model))
    del model
    return _merged_model(family, tensors, adapter, tied_merge, config_settings, report)


def _merged_model(
    family: Family,
    tensors: dict[str, torch.Tensor],
    adapter: Adapter,
    tied_merge: bool,
    settings: dict[str, Any],
    report: ConversionReport,
) -> PreTrainedModel:
    insert_full_weights(tensors, adapter)
    trained = _assemble(family, tensors, settings)
    with unmerged(trained, adapter, tied_merge):
        expected = {"plain": reference(trained, plain_logits), "two-stage": reference(trained, two_stage_logits)}
    del trained
    merge_updates(tensors, adapter, tied_merge)
    model = _assemble(family, tensors, settings)
    for what, compute in (("plain", plain_logits), ("two-stage", two_stage_logits)):
        if what == "two-stage" and not expected[what].is_decisive:
            report.notes.append(
                f"The two-stage logits were not compared: rounding alone moves them by {expected[what].noise:.0e} of the "
                "largest logit, as in models that are not trained."
            )
            continue
        report.checks[f"{what} logits against the adapter unmerged"] = require_equal(
            compute(model), expected[what], f"the {what} logits of the merged and of the unmerged model"
        )
    return model


def _assemble(family: Family, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> PreTrainedModel:
    """The family's model around the tensors; what they lack of it starts as in a new model, the same at every call."""
    tied = "lm_head.weight" not in tensors
    config = family.config_class(**{**settings, "tie_word_embeddings": tied})
    model: PreTrainedModel = assign_weights(family.model_class, config, tensors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
    return model


def _tensors_without_effect(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters that logits do not show: a memory's, as long as what is read of it counts for nothing."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".memory." in name}


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds the parameters, but for those that the model keeps in float32."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if not any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.to(dtype)


def _check_written(folder: Path, model_class: Any, expected: Reference, tensors: dict[str, torch.Tensor]) -> float:
    """The difference of the logits; raises a CheckpointError if they differ, or a parameter from one of `tensors`."""
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise CheckpointError(f"Verification failed, nothing was written: the written folder loads with {wrong}.")
    changed = [name for name, tensor in tensors.items() if not torch.equal(model.get_parameter(name), tensor)]
    if changed:
        raise CheckpointError(f"Verification failed, nothing was written: {changed[:3]} differ from what was written.")
    return require_equal(full_logits(model.eval()), expected, "the logits before and after writing")


def _start_compressor(model: Any, adapter: Adapter | None, initialize: bool, report: ConversionReport) -> None:
    if adapter is not None and adapter.has_compressor:
        return
    if initialize:
        model.initialize_compressor()
    start = "has the paper's start from layer 0" if initialize else "is random (--init-compressor: the paper's start)"
    report.notes.append(
        f"The compressor {start} and is UNTRAINED: train the model before you compress prompts with it. Until then use "
        "compress_prompt=False, which reads as plain Mamba does."
    )


def _no_tokenizer_note(folder: Path, kind: str) -> str:
    hint = "EleutherAI/gpt-neox-20b" if "original" in kind else "FOLDER_OR_ID"
    return (
        f"{folder.name} has no tokenizer, so none was written. Add it with --tokenizer {hint}, or save it into the "
        "folder with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )

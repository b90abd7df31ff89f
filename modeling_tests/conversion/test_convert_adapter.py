# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters, made by PEFT under the authors' names and under ours, become checkpoints with the logits of the model
that was trained."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.conversion import convert_checkpoint
from remamba_hf.conversion.lora_adapter import read_adapter
from remamba_hf.families import PLAIN_FAMILIES

from .conftest import HIDDEN, PADDED_VOCABULARY, load_mamba, make_mamba, write_original

IDS = torch.randint(PADDED_VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["embeddings", "in_proj", "out_proj", "lm_head"]}
TWO_STAGE = {"compress_prompt": True, "compression_span": 0.5, "compression_ratio": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore:.*save_embedding_layers.*")


# What is trained in full of the mixer beside Theta.
FULL = {"mamba": ["dt_proj"], "mamba2": ["conv1d", "norm"]}


class RetBias(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.param = nn.Parameter(torch.zeros(size))


def with_authors_modules(model):
    steps = model.config.num_heads if model.config.model_type == "mamba2" else model.config.intermediate_size
    model.config.model_type = "authors"  # PEFT refuses LoRA on out_proj of what calls itself mamba
    for name in ("Q_proj", "K_proj", "V_proj"):
        layers = nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN)
        setattr(model.backbone, name, nn.Sequential(*layers))
    for layer in model.backbone.layers:
        layer.mixer.ret_bias = RetBias(steps)
    return model


def trained(model, modules_to_save, **lora):
    """PEFT's model after something like training: nothing of the adapter is zero."""
    model = get_peft_model(model, LoraConfig(**(LORA | lora), modules_to_save=modules_to_save)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def authors(hf_folder, tmp_path, family):
    """(base folder, adapter folder, PEFT's model) with the authors' names."""
    model = with_authors_modules(load_mamba(hf_folder))
    model = trained(model, ["Q_proj", "K_proj", "V_proj", "ret_bias", *(f"mixer.{name}" for name in FULL[family])])
    model.save_pretrained(tmp_path / "adapter")
    return hf_folder, tmp_path / "adapter", model


def close(actual, expected, tolerance=1e-5):
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_untied_merge_is_the_trained_model(authors, tmp_path, kind, family):
    base, adapter, model = authors
    if kind == "bin":  # as older versions of PEFT wrote it: without copies of the base's own tables
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert any("base_layer" in name for name in tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
        torch.save(tensors, adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    report = convert_checkpoint(str(base), tmp_path / "out", adapter=str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not report.tied
    assert type(merged) is PLAIN_FAMILIES[family].model_class
    assert not merged.config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.backbone.embeddings.weight)
    assert close(merged(IDS, compress_prompt=False).logits, model(IDS).logits)
    assert not any("UNTRAINED" in note for note in report.notes)
    assert len(report.checks) == 4

    peft_backbone = model.base_model.model.backbone
    for ours, theirs in (("query", "Q_proj"), ("key", "K_proj"), ("value", "V_proj")):
        for layer in (0, 2):
            expected = getattr(peft_backbone, theirs).modules_to_save["default"][layer]
            actual = getattr(merged.backbone.compressor, ours)[layer]
            assert torch.equal(actual.weight, expected.weight)
            assert torch.equal(actual.bias, expected.bias)
    for ours, theirs in zip(merged.backbone.layers, peft_backbone.layers, strict=True):
        assert torch.equal(ours.mixer.adaptation.bias, theirs.mixer.ret_bias.modules_to_save["default"].param)


@torch.no_grad()
def test_tied_merge_is_the_authors_merge(authors, tmp_path):
    """PEFT's own merge adds the updates of embeddings and head to the tensor that they share."""
    base, adapter, model = authors
    unmerged = model(IDS).logits
    report = convert_checkpoint(str(base), tmp_path / "out", adapter=str(adapter), merge="tied")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.tied
    assert merged.lm_head.weight is merged.backbone.embeddings.weight
    authors_merge = model.merge_and_unload()
    assert close(merged.lm_head.weight, authors_merge.backbone.embeddings.weight)
    actual = merged(IDS, compress_prompt=False).logits
    assert close(actual, authors_merge(IDS).logits)
    assert not close(actual, unmerged, tolerance=1e-3)


@torch.no_grad()
@pytest.mark.smoke
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_of_this_package(tmp_path, mamba, rslora, family):
    """The two-stage logits too, on a base in the original format."""
    folder = write_original(mamba, tmp_path / "original")
    ours = PLAIN_FAMILIES[family]
    computed = ("model_type", "architectures", "layer_types")
    config = ours.config_class(**{k: v for k, v in mamba.config.to_dict().items() if k not in computed})
    model = ours.model_class(config).eval()
    model.load_state_dict(mamba.state_dict(), strict=False)
    model = trained(model, ["compressor", "adaptation", *(f"mixer.{name}" for name in FULL[family])], use_rslora=rslora)
    model.save_pretrained(tmp_path / "adapter")
    convert_checkpoint(str(folder), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for options in (TWO_STAGE, {"compress_prompt": False}):
        actual, expected = merged(IDS, **options), model(IDS, **options)
        assert close(actual.logits, expected.logits)
    plain = merged(IDS, compress_prompt=False).logits
    assert not close(merged(IDS, **TWO_STAGE).logits, plain, tolerance=1e-3)
    scale = read_adapter(tmp_path / "adapter").updates["lm_head"].scale
    assert scale == (8 / math.sqrt(4) if rslora else 2)


@torch.no_grad()
def test_step_bias_saved_in_full(tmp_path):
    """Mamba-2's step bias is a parameter of the mixer itself, which an adapter file can hold under its own name."""
    base = make_mamba(family="mamba2")
    base.save_pretrained(tmp_path / "hf")
    model = trained(with_authors_modules(load_mamba(tmp_path / "hf")), ["ret_bias"])
    bias = torch.randn_like(base.backbone.layers[1].mixer.dt_bias)
    model.base_model.model.backbone.layers[1].mixer.dt_bias.copy_(bias)
    model.save_pretrained(tmp_path / "adapter")
    name = "base_model.model.backbone.layers.1.mixer.dt_bias"
    edit_tensors(lambda tensors: tensors.update({name: bias}))(tmp_path / "adapter")
    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.backbone.layers[1].mixer.dt_bias, bias)
    assert close(merged(IDS, compress_prompt=False).logits, model(IDS).logits)


@torch.no_grad()
def test_untied_base(tmp_path, family):
    base = make_mamba(tied=False, family=family)
    base.save_pretrained(tmp_path / "hf")
    model = trained(with_authors_modules(base), ["Q_proj", "K_proj", "V_proj", "ret_bias"])
    model.save_pretrained(tmp_path / "adapter")
    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert close(merged(IDS, compress_prompt=False).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match="tied merge needs"):
        convert_checkpoint(str(tmp_path / "hf"), tmp_path / "tied", adapter=str(tmp_path / "adapter"), merge="tied")


@torch.no_grad()
def test_plain_lora_keeps_the_head_tied(hf_folder, tmp_path):
    model = trained(load_mamba(hf_folder), None, target_modules=["x_proj", "in_proj"])
    model.save_pretrained(tmp_path / "adapter")
    report = convert_checkpoint(
        str(hf_folder), tmp_path / "out", adapter=str(tmp_path / "adapter"), initialize_compressor=True
    )
    assert report.tied
    assert any("UNTRAINED" in note for note in report.notes)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert close(merged(IDS, compress_prompt=False).logits, model(IDS).logits)


def edit_config(**changes):
    def change(adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_tensors(change):
    def rewrite(adapter):
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return rewrite


LAYER = "base_model.model.backbone.layers.0.mixer."


@pytest.mark.parametrize(
    ("breaking", "options", "message"),
    [
        (edit_config(peft_type="IA3"), {}, "only LORA"),
        (edit_config(use_dora=True), {}, "use_dora.*merge_and_unload"),
        (edit_config(alpha_pattern={"in_proj": 3}), {}, "alpha_pattern"),
        (edit_config(init_lora_weights="pissa"), {}, "pissa"),
        (edit_config(r=None), {}, "r=None"),
        (edit_tensors(lambda t: t.pop(LAYER + "in_proj.lora_A.weight")), {}, "no matching lora_A and lora_B"),
        (edit_tensors(lambda t: t.pop("base_model.model.backbone.Q_proj.0.weight")), {}, "part of the compressor"),
        (edit_tensors(lambda t: t.update({LAYER + "gate.weight": torch.ones(2)})), {}, "gate.weight.*none of that name"),
        (edit_tensors(lambda t: t.update({LAYER + "conv1d.bias": torch.ones(2)})), {}, "conv1d.bias.*shape"),
        (
            edit_tensors(lambda t: t.update({LAYER + "conv1d.lora_A.weight": torch.ones(4, 1, 4)})),
            {},
            "convolution.*in full",
        ),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), {}, "no adapter_config.json"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), {}, "no weights"),
        (lambda adapter: None, {"initialize_compressor": True}, "brings a trained compressor"),
        (lambda adapter: None, {"merge": "both"}, "merge must be"),
    ],
)
def test_broken_adapters(authors, tmp_path, breaking, options, message):
    base, adapter, _ = authors
    breaking(adapter)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(str(base), tmp_path / "out", adapter=str(adapter), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "hf"]


def test_adapter_for_another_base(authors, tmp_path, family):
    """Of another size, or of the other architecture."""
    _, adapter, _ = authors
    make_mamba(expand=1, family=family).save_pretrained(tmp_path / "size")
    make_mamba(family=next(other for other in FULL if other != family)).save_pretrained(tmp_path / "architecture")
    for other in ("size", "architecture"):
        with pytest.raises(CheckpointError, match="Give the base that the adapter was trained on"):
            convert_checkpoint(str(tmp_path / other), tmp_path / "out", adapter=str(adapter))


def test_a_wrong_merge_is_caught(authors, tmp_path, monkeypatch):
    base, adapter, _ = authors
    monkeypatch.setattr("remamba_hf.conversion.lora_adapter.LowRankUpdate.weight", lambda self: self.left @ self.right)
    with pytest.raises(CheckpointError, match="Verification failed"):
        convert_checkpoint(str(base), tmp_path / "out", adapter=str(adapter))
    assert not (tmp_path / "out").exists()

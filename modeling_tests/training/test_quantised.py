# SPDX-License-Identifier: Apache-2.0
"""LoRA on a base in 4 or 8 bits computes, learns, saves and loads as on the base that the codes stand for."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from modeling_tests.modeling.tiny_models import assert_close, random_rows, rms_ratio, tiny_memmamba, tiny_model
from remamba_hf.families import ALL_FAMILIES
from remamba_hf.training.quantised import UNQUANTISED, is_quantised, quantization_config

peft = pytest.importorskip("peft")

from remamba_hf.training.lora import add_lora, merge_lora, remamba_lora_config, save_adapter  # noqa: E402

# Sizes that bitsandbytes' kernels for CPUs take: blocks of 64 columns, rows in multiples of 32.
SIZES = dict(hidden_size=64, num_hidden_layers=2)
HEADS = dict(num_heads=32, head_dim=4, n_groups=1, state_size=16)
IDS = torch.stack(random_rows([40, 40]))
BATCH = dict(input_ids=IDS, labels=torch.where(torch.arange(40) < 32, -100, IDS))
WAYS = [
    pytest.param(
        *(backend, bits),
        id=f"{backend}-{bits}",
        marks=pytest.mark.skipif(importlib.util.find_spec(backend) is None, reason=f"{backend} is not installed"),
    )
    for backend, bits in (("bitsandbytes", 4), ("bitsandbytes", 8), ("torchao", 8))
]
with_each_way = pytest.mark.parametrize(("backend", "bits"), WAYS)
# Without gradients bitsandbytes computes in bfloat16 on CPUs that have instructions for it, and LLM.int8 rounds its inputs.
ROUNDING = {("bitsandbytes", 4): 3e-2, ("bitsandbytes", 8): 1e-2, ("torchao", 8): 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(family):
    if family == "memmamba":
        return tiny_memmamba(torch.float32, **SIZES)
    return tiny_model(torch.float32, family=family, **SIZES, **(HEADS if family == "remamba2" else {}))


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    tiny(family).save_pretrained(path)
    return path


def quantised(folder, backend, bits, **settings):
    config = quantization_config(bits, backend, torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **settings)


def stood_for(weight):
    """The matrix that codes stand for."""
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        return weight.data * weight.SCB[:, None] / 127
    return weight.dequantize()


def codes_of(model):
    weights = [parameter for parameter in model.parameters() if is_quantised(parameter)]
    return [weight.dequantize() if weight.is_floating_point() else weight.data.clone() for weight in weights]


def reference(folder, model):
    """The same model with ordinary layers of the quantised weights."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if is_quantised(parameter):
            weight = stood_for(parameter)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.detach().float()
            plain.set_submodule(name.removesuffix(".weight"), layer)
    return plain


def with_recipe(base):
    """The recipe with LoRA away from its start, the same for every base."""
    model = add_lora(base, remamba_lora_config(base, r=2, lora_alpha=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def training_output(model):
    torch.manual_seed(3)  # for its draws
    return model(**BATCH)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@with_each_way
def test_in_proj_and_out_proj_alone_are_quantised(folder, family, backend, bits):
    model = quantised(folder, backend, bits, dtype=torch.bfloat16)
    codes = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    assert codes == {f"backbone.layers.{n}.mixer.{part}.weight" for n in range(2) for part in ("in_proj", "out_proj")}
    for name, parameter in model.named_parameters():
        if name not in codes:
            kept = any(f".{part}." in f".{name}." for part in model._keep_in_fp32_modules_strict)
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


@with_each_way
def test_it_computes_and_learns_what_the_codes_stand_for(folder, backend, bits):
    """Logits, and gradients of everything that is trained, with and without gradient checkpointing."""
    base = quantised(folder, backend, bits)
    plain = reference(folder, base)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    assert 1e-3 < rms_ratio(base(**BATCH).logits, exact(**BATCH).logits) < 1, "quantised, and not nonsense"
    model, expected = with_recipe(base).train(), with_recipe(plain).train()
    output = training_output(expected)
    output.loss.backward()
    gradients = {name.replace(".base_layer", ""): p.grad for name, p in trained(expected).items()}
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        actual = training_output(model)
        assert_close(actual.logits, output.logits, 1e-5, "logits")
        actual.loss.backward()
        assert trained(model).keys() == trained(expected).keys()
        for name, parameter in trained(model).items():
            assert parameter.dtype == torch.float32, name
            assert parameter.grad.abs().max() > 0, name
            assert_close(parameter.grad, gradients[name.replace(".base_layer", "")], 1e-4, name)


@with_each_way
def test_it_generates_what_it_computes(folder, family, backend, bits):
    model = with_recipe(quantised(folder, backend, bits)).eval()
    settings = dict(do_sample=False, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    output = model.generate(input_ids=IDS, **settings)
    prompt = {} if family == "memmamba" else dict(prompt_lengths=[40, 40])
    with torch.no_grad():
        whole = model(input_ids=output.sequences[:, :-1], **prompt).logits[:, -4:]
    assert_close(torch.stack(output.logits, dim=1), whole, ROUNDING[backend, bits], "steps")


@with_each_way
def test_training_saving_and_loading(folder, tmp_path, backend, bits):
    """The loss falls; the adapter loads onto the codes, the base before, and what the codes stand for, to be merged."""
    model = with_recipe(quantised(folder, backend, bits, dtype=torch.bfloat16)).train()
    before = codes_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(*pair) for pair in zip(before, codes_of(model), strict=True))
    with pytest.raises(ValueError, match=r"dequantize\(\)"):
        merge_lora(model)
    save_adapter(model, tmp_path / "adapter")
    saved = sum(p.numel() * p.element_size() for p in trained(model).values())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < saved + 40_000, "no frozen weights"

    def logits(model):
        return training_output(model.train()).logits

    def loaded(**settings):
        return peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **settings)

    base = quantised(folder, backend, bits)
    with torch.no_grad():
        expected = logits(peft.PeftModel.from_pretrained(reference(folder, base), tmp_path / "adapter"))
        on_codes = loaded(quantization_config=quantization_config(bits, backend, torch.float32))
        assert_close(logits(on_codes), expected, 1e-4, "on codes")
        on_floats = logits(loaded())
        assert 1e-3 < rms_ratio(on_floats, expected) < 1, "on the base before it was quantised"
        assert_close(logits(merge_lora(loaded())), on_floats, 1e-5, "merged")
        if backend == "bitsandbytes":  # transformers does not take torchao's weights back
            merged = merge_lora(peft.PeftModel.from_pretrained(base.dequantize(), tmp_path / "adapter"))
            assert_close(logits(merged.float()), expected, 1e-4, "merged into what the codes stand for")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = IDS[index % 2].roll(index)
        return dict(input_ids=row, labels=torch.where(torch.arange(40) < 32, -100, row))


@with_each_way
@pytest.mark.parametrize("family", ["remamba2"], indirect=True)  # codes are saved and loaded alike in all
def test_trainer_resumes_to_the_bit(folder, tmp_path, backend, bits):
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = with_recipe(quantised(folder, backend, bits))
        Trainer(model, arguments, train_dataset=Rows()).train(resume_from_checkpoint=checkpoint)
        ends.append(trained(model))
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_module_cannot_be_trained_in_full(folder, family):
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    part = "memory" if family == "memmamba" else "compressor"
    with pytest.raises(ValueError, match=rf"{part}.*is quantised. Load the model with quantization_config\(\)"):
        add_lora(model)
    add_lora(model, remamba_lora_config(model, modules_to_save=None))


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantization_config(3)
    with pytest.raises(ValueError, match="bitsandbytes or torchao, got 'gptq'"):
        quantization_config(4, "gptq")
    with pytest.raises(ValueError, match="Take bits=8"):
        quantization_config(4, "torchao")
    monkeypatch.setattr("remamba_hf.training.quantised.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"4 bits need bitsandbytes: pip install bitsandbytes\.$"):
        quantization_config()
    with pytest.raises(ImportError, match="8 bits need torchao: pip install bitsandbytes, or torchao"):
        quantization_config(8)


def test_names_that_stay_exist():
    """Each of the names in some family, so that none is misspelt."""
    names = {name for family in ALL_FAMILIES for name, _ in tiny(family).named_modules()}
    ends = {name.rpartition(".")[2] for name in names}
    assert {pattern.rpartition(".")[2] for pattern in UNQUANTISED} <= ends


def test_ordinary_weights_are_not_quantised():
    model = copy.deepcopy(tiny("remamba"))
    assert not any(is_quantised(parameter) for parameter in model.parameters())

# SPDX-License-Identifier: Apache-2.0
"""A saved folder is all that a process without this package needs, and saving it again keeps it so."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import remamba_hf
from remamba_hf import ReMambaForCausalLM, ReMambaModel

from .conftest import make_model

AUTO_MAP = {
    "AutoConfig": "configuration_remamba.ReMambaConfig",
    "AutoModel": "modeling_remamba.ReMambaModel",
    "AutoModelForCausalLM": "modeling_remamba.ReMambaForCausalLM",
}
CODE = sorted(path.name for path in (Path(remamba_hf.__file__).parent / "modeling").glob("*.py"))
CODE.remove("__init__.py")
FLOAT32 = ("A_log", "D", "dt_proj.bias", "adaptation.bias")
IN_A_CLEAN_PROCESS = """
ids = load_file(IDS)["ids"]
for name, folder in FOLDERS.items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert config.a_key_of_the_user == "kept", config
    for key, value in run(model, ids).items():
        RESULTS[f"{name}.{key}"] = value
    with torch.no_grad():
        RESULTS[f"{name}.hidden"] = backbone(ids, compress_prompt=True).last_hidden_state
    RESULTS[f"{name}.generated"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    RESULTS[f"{name}.sampled_beams"] = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    RESULTS[f"{name}.dtypes"] = {key: str(value.dtype) for key, value in half.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline("text-generation", folder, trust_remote_code=True, dtype=torch.float32)
    text = "It is a truth universally acknowledged"
    RESULTS[f"{name}.text"] = pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    RESULTS[f"{name}.tokens"] = tokenizer(text)["input_ids"]
    if RESAVED:
        model.save_pretrained(f"{RESAVED}/{name}")
        tokenizer.save_pretrained(f"{RESAVED}/{name}")
        backbone.save_pretrained(f"{RESAVED}/{name}-backbone")
"""


@torch.no_grad()
def expected_of(model, tokenizer, ids) -> dict:
    out = model(ids, compress_prompt=True)
    text = "It is a truth universally acknowledged"
    tokens = tokenizer(text)["input_ids"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "logits": out.logits,
        "positions": out.compressed_positions,
        "hidden": model.backbone(ids, compress_prompt=True).last_hidden_state,
        "generated": model.generate(ids, max_new_tokens=6, do_sample=False),
        "sampled_beams": model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False),
        "text": pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "tokens": tokens,
    }


def check(results: dict, name: str, expected: dict) -> None:
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(results[f"{name}.{key}"], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m)
        else:
            assert results[f"{name}.{key}"] == value, key
    for key, dtype in results[f"{name}.dtypes"].items():
        assert dtype == ("torch.float32" if key.endswith(FLOAT32) else "torch.bfloat16"), key


def has_code(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("*.py")) == CODE
    assert AutoConfig.from_pretrained(folder).auto_map == AUTO_MAP


@pytest.mark.smoke
def test_clean_process_loads_saves_and_loads_again(tmp_path, python, tokenizer, input_ids):
    """Tied in one file, and untied in bfloat16 in shards."""
    from safetensors.torch import save_file

    save_file({"ids": input_ids}, tmp_path / "ids.safetensors")
    folders, expected = {}, {}
    for name, options in (("tied", {}), ("untied", {"max_shard_size": "20KB"})):
        model = make_model(tied=name == "tied")
        if name == "untied":
            model.to(torch.bfloat16)
        folder = tmp_path / name
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
        expected[name] = expected_of(model.float(), tokenizer, input_ids)
        has_code(folder)
    assert len(list((tmp_path / "untied").glob("*.safetensors"))) > 2
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")

    given = {"IDS": str(tmp_path / "ids.safetensors")}
    results = python(IN_A_CLEAN_PROCESS, FOLDERS=folders, RESAVED=str(tmp_path / "again"), **given)
    for name, values in expected.items():
        check(results, name, values)
        has_code(tmp_path / "again" / name)
        has_code(tmp_path / "again" / f"{name}-backbone")

    again = {name: str(tmp_path / "again" / name) for name in folders}
    results = python(IN_A_CLEAN_PROCESS, FOLDERS=again, RESAVED="", **given)
    for name, values in expected.items():
        check(results, name, values)


@torch.no_grad()
@pytest.mark.smoke
@pytest.mark.parametrize("flag", [{}, {"trust_remote_code": False}])
def test_installed_package_needs_no_flag(tmp_path, input_ids, flag):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **flag)
    assert type(loaded) is ReMambaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path / "model", **flag)) is ReMambaModel
    assert not any(name.startswith("transformers_modules.model") for name in sys.modules)
    torch.testing.assert_close(
        loaded(input_ids, compress_prompt=True).logits, model(input_ids, compress_prompt=True).logits, rtol=0, atol=0
    )
    loaded.save_pretrained(tmp_path / "again")
    has_code(tmp_path / "again")


@torch.no_grad()
def test_backbone_and_language_model_load_from_each_others_folders(tmp_path, input_ids):
    model = make_model()
    model.save_pretrained(tmp_path / "causal")
    model.backbone.save_pretrained(tmp_path / "backbone")
    has_code(tmp_path / "backbone")
    expected = model(input_ids, compress_prompt=True)
    hidden = model.backbone(input_ids, compress_prompt=True).last_hidden_state
    for folder in ("causal", "backbone"):
        backbone, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(backbone(input_ids, compress_prompt=True).last_hidden_state, hidden, rtol=0, atol=0)
        # A tied head needs nothing but the backbone.
        causal, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(causal(input_ids, compress_prompt=True).logits, expected.logits, rtol=1e-6, atol=1e-6)


def test_half_precision_loads_some_weights_in_float32(tmp_path):
    """From a float32 folder, and bit by bit."""
    model = make_model(tied=False)
    model.save_pretrained(tmp_path)
    half = ReMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.dtype == (torch.float32 if name.endswith(FLOAT32) else torch.bfloat16), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    half.save_pretrained(tmp_path / "half")
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in half.state_dict().items())
    assert ReMambaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16

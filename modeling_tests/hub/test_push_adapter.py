# SPDX-License-Identifier: Apache-2.0
"""An adapter goes to the Hub and comes back by its id, on the commit of the base that it names, without the package."""

import pytest
import torch
from safetensors.torch import save_file

from remamba_hf.families import ALL_FAMILIES

from .conftest import make_model
from .hub_server import TOKEN, HubServer

peft = pytest.importorskip("peft")

BASES = {family: f"somebody/{family}-base" for family in ALL_FAMILIES}
PUSH = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from remamba_hf.families import ALL_FAMILIES
from remamba_hf.training.lora import add_lora, remamba_lora_config
for family, repo in BASES.items():
    load = ALL_FAMILIES[family].model_class.from_pretrained
    base = load(FOLDERS[family]).push_to_hub(repo, token=TOKEN)
    model = load(repo, revision=base.oid)
    model = add_lora(model, remamba_lora_config(model, r=2, revision=base.oid))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        RESULTS[family + ".logits"] = model.eval()(input_ids=load_file(IDS)["ids"]).logits
    model.push_to_hub(repo + "-lora", token=TOKEN)
    newer = load(FOLDERS[family])
    newer.backbone.norm_f.weight.data.fill_(3.0)
    newer.push_to_hub(repo, token=TOKEN)
"""
PULL = """
from peft import AutoPeftModelForCausalLM
ids = load_file(IDS)["ids"]
for family, repo in BASES.items():
    model = AutoPeftModelForCausalLM.from_pretrained(repo + "-lora", trust_remote_code=True).eval()
    assert type(model.get_base_model()).__module__.startswith("transformers_modules")
    with torch.no_grad():
        RESULTS[family + ".logits"] = model(input_ids=ids).logits
"""


def test_push_and_pull_of_an_adapter(tmp_path, python, input_ids):
    folders = {family: str(tmp_path / family) for family in ALL_FAMILIES}
    for family, folder in folders.items():
        make_model(family, tied=family != "remamba2").save_pretrained(folder)
    save_file({"ids": input_ids}, tmp_path / "ids.safetensors")
    values = {"BASES": BASES, "IDS": str(tmp_path / "ids.safetensors")}
    with HubServer() as hub:
        pushed = python(PUSH, endpoint=hub.endpoint, package=True, TOKEN=TOKEN, FOLDERS=folders, **values)
        for repo in BASES.values():
            repository = hub.repositories[f"{repo}-lora"]
            files = repository.commits[repository.branches["main"]]
            assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
            base = hub.repositories[repo]
            whole = base.commits[base.branches["main"]]["model.safetensors"]
            adapter = files["adapter_model.safetensors"]
            assert len(adapter.content) < len(whole.content)
            assert b"embeddings.base_layer" not in adapter.content, "no frozen weights"
        pulled = python(PULL, endpoint=hub.endpoint, **values)
    for family in ALL_FAMILIES:
        name = f"{family}.logits"
        torch.testing.assert_close(pulled[name], pushed[name], rtol=1e-5, atol=1e-5)
        plain = make_model(family, tied=family != "remamba2")
        with torch.no_grad():
            assert (plain(input_ids).logits - pulled[name]).abs().max() > 1e-2

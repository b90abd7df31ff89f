# SPDX-License-Identifier: Apache-2.0
"""push_to_hub and a pull by id and revision, through huggingface_hub, against a server that speaks the Hub's API."""

import hashlib
import io
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM

from .conftest import make_model
from .hub_server import TOKEN, Blob, HubServer

REPO = "somebody/remamba-test"
ORIGINAL = "state-spaces/mamba-test"
PUSH = """
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer
from remamba_hf import ReMambaForCausalLM
from remamba_hf.cli import main
try:
    ReMambaForCausalLM.from_pretrained(FIRST).push_to_hub(REPO, token="hf_of_somebody_else")
except HfHubHTTPError as error:
    assert error.response.status_code == 401
else:
    raise AssertionError("pushed with a wrong token")

AutoTokenizer.from_pretrained(FIRST).push_to_hub(REPO, token=TOKEN)
first = ReMambaForCausalLM.from_pretrained(FIRST).push_to_hub(REPO, token=TOKEN, commit_message="first")
RESULTS["first"] = first.oid
second = ReMambaForCausalLM.from_pretrained(SECOND)
RESULTS["second"] = second.push_to_hub(REPO, token=TOKEN, revision="next").oid
second.push_to_hub(REPO + "-shards", token=TOKEN, max_shard_size="20KB")

prompt = ["--prompt", "a single man", "--max-new-tokens", "3"]
assert main(["generate", "--model", REPO, "--revision", first.oid, *prompt]) == 0
assert main(["generate", "--model", REPO, "--revision", "no-such-branch", *prompt]) == 1
assert main(["generate", "--model", "somebody/else", *prompt]) == 1
assert main(["convert", REPO, "twice", "--revision", "next"]) == 1
assert main(["convert", ORIGINAL, "converted", "--revision", "main"]) == 0
assert ReMambaForCausalLM.from_pretrained("converted").config.vocab_size == 16
"""
PULL = """
ids = load_file(IDS)["ids"]
for name, (repo, revision) in PULLS.items():
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    for key, value in run(model, ids).items():
        RESULTS[f"{name}.{key}"] = value
tokenizer = AutoTokenizer.from_pretrained(REPO)
RESULTS["tokens"] = tokenizer("a single man")["input_ids"]
text = pipeline("text-generation", REPO, trust_remote_code=True)("a single man", max_new_tokens=3, do_sample=False)
RESULTS["text"] = text[0]["generated_text"]
"""


def original_mamba() -> dict[str, Blob]:
    """A Mamba in the original format as it stands on the Hub, with a file that nobody should download."""
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1))
    weights = io.BytesIO()
    torch.save({key.replace("embeddings", "embedding"): value for key, value in model.state_dict().items()}, weights)
    config = json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 15, "ssm_cfg": {}})
    return {
        "config.json": Blob(config.encode(), large=False),
        "pytorch_model.bin": Blob(weights.getvalue(), large=True),
        "optimizer.bin": Blob(b"not a state dict", large=True),
    }


@pytest.mark.smoke
def test_push_and_pull(tmp_path, python, tokenizer, input_ids):
    models = {"first": make_model(seed=1), "second": make_model(tied=False, seed=2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    save_file({"ids": input_ids}, tmp_path / "ids.safetensors")
    folders = {"FIRST": str(tmp_path / "first"), "SECOND": str(tmp_path / "second")}
    with HubServer() as hub:
        hub.add(ORIGINAL, original_mamba())
        pushed = python(PUSH, endpoint=hub.endpoint, package=True, REPO=REPO, ORIGINAL=ORIGINAL, TOKEN=TOKEN, **folders)
        assert not any("optimizer.bin" in path for _, path in hub.requests)
        repository = hub.repositories[REPO]
        assert set(pushed.values()) <= set(repository.commits)
        assert repository.branches["next"] == pushed["second"]
        main = repository.commits[repository.branches["main"]]
        assert {"config.json", "model.safetensors", "modeling_remamba.py", "tokenizer.json"} <= set(main)
        assert main["model.safetensors"].large
        local = hashlib.sha256((tmp_path / "first" / "modeling_remamba.py").read_bytes()).hexdigest()
        assert main["modeling_remamba.py"].sha256 == local

        pulls = {
            "main": (REPO, None),
            "commit": (REPO, pushed["first"]),
            "branch": (REPO, "next"),
            "second commit": (REPO, pushed["second"]),
            "shards": (f"{REPO}-shards", None),
        }
        values = {"REPO": REPO, "PULLS": pulls, "IDS": str(tmp_path / "ids.safetensors")}
        hub.requests.clear()
        results = python(PULL, endpoint=hub.endpoint, **values)
        assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
        expected = {}
        for name, model in models.items():
            with torch.no_grad():
                expected[name] = model(input_ids, compress_prompt=True).logits
        for name in pulls:
            source = "first" if name in ("main", "commit") else "second"
            torch.testing.assert_close(results[f"{name}.logits"], expected[source], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)
        assert results["tokens"] == tokenizer("a single man")["input_ids"]
        assert results["text"].startswith("a single man")

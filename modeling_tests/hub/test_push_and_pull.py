# SPDX-License-Identifier: Apache-2.0
"""push_to_hub and a pull by id and revision, through huggingface_hub, against a server that speaks the Hub's API."""

import hashlib
import io
import json

import torch
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM

from remamba_hf.families import ALL_FAMILIES

from .conftest import EVERYTHING, make_model
from .hub_server import TOKEN, Blob, HubServer

REPOS = {family: f"somebody/{family}-test" for family in ALL_FAMILIES}
ORIGINAL = "state-spaces/mamba-test"
PUSH = """
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer
from remamba_hf import ReMambaForCausalLM
from remamba_hf.cli import main
from remamba_hf.families import ALL_FAMILIES
for family, repo in REPOS.items():
    load = ALL_FAMILIES[family].model_class.from_pretrained
    try:
        load(FOLDERS[family]["first"]).push_to_hub(repo, token="hf_of_somebody_else")
    except HfHubHTTPError as error:
        assert error.response.status_code == 401
    else:
        raise AssertionError("pushed with a wrong token")

    AutoTokenizer.from_pretrained(FOLDERS[family]["first"]).push_to_hub(repo, token=TOKEN)
    first = load(FOLDERS[family]["first"]).push_to_hub(repo, token=TOKEN, commit_message="first")
    second = load(FOLDERS[family]["second"])
    next = second.push_to_hub(repo, token=TOKEN, revision="next")
    second.push_to_hub(repo + "-shards", token=TOKEN, max_shard_size="20KB")
    RESULTS[family] = {"first": first.oid, "second": next.oid}

REPO = REPOS["remamba"]
first_commit = RESULTS["remamba"]["first"]
prompt = ["--prompt", "a single man", "--max-new-tokens", "3"]
assert main(["generate", "--model", REPO, "--revision", first_commit, *prompt]) == 0
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
for family, repo in REPOS.items():
    tokenizer = AutoTokenizer.from_pretrained(repo)
    RESULTS[f"{family}.tokens"] = tokenizer("a single man")["input_ids"]
    text = pipeline("text-generation", repo, trust_remote_code=True)("a single man", max_new_tokens=3, do_sample=False)
    RESULTS[f"{family}.text"] = text[0]["generated_text"]
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


def test_push_and_pull(tmp_path, python, tokenizer, input_ids):
    models = {
        family: {"first": make_model(family, seed=1), "second": make_model(family, tied=False, seed=2)}
        for family in ALL_FAMILIES
    }
    for family, versions in models.items():
        for name, model in versions.items():
            model.save_pretrained(tmp_path / family / name)
            tokenizer.save_pretrained(tmp_path / family / name)
    save_file({"ids": input_ids}, tmp_path / "ids.safetensors")
    folders = {family: {name: str(tmp_path / family / name) for name in models[family]} for family in ALL_FAMILIES}
    with HubServer() as hub:
        hub.add(ORIGINAL, original_mamba())
        values = {"ORIGINAL": ORIGINAL, "TOKEN": TOKEN, "REPOS": REPOS, "FOLDERS": folders}
        pushed = python(PUSH, endpoint=hub.endpoint, package=True, **values)
        assert not any("optimizer.bin" in path for _, path in hub.requests)
        pulls = {}
        for family, repo in REPOS.items():
            repository = hub.repositories[repo]
            assert set(pushed[family].values()) <= set(repository.commits)
            assert repository.branches["next"] == pushed[family]["second"]
            main = repository.commits[repository.branches["main"]]
            code = f"modeling_{family}.py"
            assert {"config.json", "model.safetensors", code, "tokenizer.json"} <= set(main)
            assert main["model.safetensors"].large
            local = hashlib.sha256((tmp_path / family / "first" / code).read_bytes()).hexdigest()
            assert main[code].sha256 == local
            pulls |= {
                f"{family} main": (repo, None),
                f"{family} commit": (repo, pushed[family]["first"]),
                f"{family} branch": (repo, "next"),
                f"{family} second commit": (repo, pushed[family]["second"]),
                f"{family} shards": (f"{repo}-shards", None),
            }

        hub.requests.clear()
        values = {"REPOS": REPOS, "PULLS": pulls, "IDS": str(tmp_path / "ids.safetensors")}
        results = python(PULL, endpoint=hub.endpoint, **values)
        assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    for family, versions in models.items():
        with torch.no_grad():
            expected = {name: model(input_ids, **EVERYTHING[family]).logits for name, model in versions.items()}
        for pull in ("main", "commit", "branch", "second commit", "shards"):
            source = "first" if pull in ("main", "commit") else "second"
            torch.testing.assert_close(results[f"{family} {pull}.logits"], expected[source], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)
        assert results[f"{family}.tokens"] == tokenizer("a single man")["input_ids"]
        assert results[f"{family}.text"].startswith("a single man")

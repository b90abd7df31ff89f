# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints as they stand on the Hub, and processes that have never heard of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remamba_hf.families import ALL_FAMILIES
from remamba_hf.training.book_tokens import train_book_tokenizer

# How a model is made to do all it can: read in two stages, or tell what it noted.
EVERYTHING = {
    "remamba": dict(compress_prompt=True),
    "remamba2": dict(compress_prompt=True),
    "memmamba": dict(output_notes=True),
}
# In a clean process the package is hidden even where it is installed, and no connection can be made but to `ALLOWED` hosts.
PRELUDE = """
import json, socket, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "remamba_hf":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
try:
    import remamba_hf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("this process is not clean")

connect = socket.socket.connect
def guarded(self, address):
    if address[0] not in ALLOWED:
        raise AssertionError(f"a connection to {address}")
    return connect(self, address)
socket.socket.connect = guarded

import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
RESULTS = {}
def run(model, ids):
    with torch.no_grad():
        out = model(ids, **EVERYTHING[model.config.model_type])
    notes = out.get("note_positions")
    return {"logits": out.logits, "positions": out.compressed_positions if notes is None else torch.stack(notes)}
"""


# What a checkpoint has of its own beyond the settings that all families share.
FAMILY_SETTINGS = {
    "remamba": dict(compression_span=0.5, compression_ratio=0.25),
    "remamba2": dict(
        **dict(num_heads=4, head_dim=16, n_groups=2, chunk_size=16, time_step_limit=(0.001, float("inf"))),
        **dict(compression_span=0.5, compression_ratio=0.25),
    ),
    "memmamba": dict(note_size=8, note_heads=2, pool_size=5, chunk_size=4, cross_layer_period=1, fusion="conv1d"),
}
# Parameters that stay in float32 in a half precision model, by the ends of their names.
FLOAT32 = {
    "remamba": ("A_log", "D", "dt_proj.bias", "adaptation.bias"),
    "remamba2": ("A_log", "D", "dt_bias", "adaptation.bias"),
    "memmamba": ("A_log", "D", "dt_proj.bias", "write_score.weight", "write_score.bias", "sink"),
}


def make_model(family: str = "remamba", tied: bool = True, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    shared = dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        tie_word_embeddings=tied,
        a_key_of_the_user="kept",
    )
    config = ALL_FAMILIES[family].config_class(**{**shared, **FAMILY_SETTINGS[family], **settings})
    model = ALL_FAMILIES[family].model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return train_book_tokenizer(["It is a truth universally acknowledged, that a single man must be in want."], 300)


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    return torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def python(tmp_path):
    """Runs code in a new interpreter; returns what it put into RESULTS, tensors under their names."""

    def run(code: str, endpoint: str | None = None, package: bool = False, **values: object) -> dict:
        home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        home.mkdir()
        hidden = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment.update(HOME=str(home), HF_HOME=str(home / "hf"), HF_HUB_DISABLE_XET="1", OMP_NUM_THREADS="1")
        environment.update(HF_ENDPOINT=endpoint) if endpoint else environment.update(HF_HUB_OFFLINE="1")
        given = "".join(
            f"{name} = {value!r}\n"
            for name, value in (
                {"ALLOWED": ["127.0.0.1", "::1"] if endpoint else [], "EVERYTHING": EVERYTHING} | values
            ).items()
        )
        package_folder = str(Path(__file__).parents[2])
        prelude = f"import sys\nsys.path.insert(0, {package_folder!r})\nRESULTS = {{}}\n" if package else PRELUDE
        end = f"""
import json
from safetensors.torch import save_file
tensors = {{k: v.contiguous() for k, v in RESULTS.items() if hasattr(v, "contiguous")}}
save_file(tensors, {str(home / "results.safetensors")!r})
open({str(home / "results.json")!r}, "w").write(json.dumps({{k: v for k, v in RESULTS.items() if k not in tensors}}))
"""
        script = home / "script.py"
        script.write_text(given + prelude + code + end)
        done = subprocess.run(
            [sys.executable, "-I", str(script)], cwd=home, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads((home / "results.json").read_text()) | load_file(home / "results.safetensors")

    return run

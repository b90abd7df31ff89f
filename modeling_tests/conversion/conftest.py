# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of both architectures in every format that can be converted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

VOCABULARY, PADDED_VOCABULARY = 61, 64
HIDDEN, LAYERS, STATE, RANK, HEAD = 32, 2, 6, 5, 4


def make_mamba(
    tied: bool = True, layers: int = LAYERS, hidden_size: int = HIDDEN, family: str = "mamba", **settings: Any
) -> Any:
    """transformers' Mamba-1 or Mamba-2 with weights of which none is zero or one, so that a lost or swapped one shows."""
    common = dict(vocab_size=PADDED_VOCABULARY, hidden_size=hidden_size, num_hidden_layers=layers, state_size=STATE)
    common.update(tie_word_embeddings=tied, **settings)
    if family == "mamba2":
        heads = common.get("expand", 2) * hidden_size // HEAD
        model = Mamba2ForCausalLM(Mamba2Config(**dict(n_groups=2, head_dim=HEAD, num_heads=heads, chunk_size=16) | common))
    else:
        model = MambaForCausalLM(MambaConfig(time_step_rank=RANK, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return with_grouped_norms(model).eval()


def load_mamba(folder: Path) -> Any:
    """transformers' model of a checkpoint in its format."""
    return with_grouped_norms(AutoModelForCausalLM.from_pretrained(folder))


class GroupedNorm(nn.Module):
    """Mamba-2's gated norm, one group after the other."""

    def __init__(self, norm: nn.Module, groups: int):
        super().__init__()
        self.weight, self.groups = norm.weight, groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        parts = (x * gate * torch.sigmoid(gate)).chunk(self.groups, dim=-1)
        return self.weight * torch.cat([part / (part.pow(2).mean(-1, True) + 1e-5).sqrt() for part in parts], dim=-1)


def with_grouped_norms(model: Any) -> Any:
    """The model as it should be: before 5.22, transformers' norm takes the groups of a Mamba-2 as one."""
    if model.config.model_type == "mamba2":
        for layer in model.backbone.layers:
            layer.mixer.norm = GroupedNorm(layer.mixer.norm, model.config.n_groups)
    return model


@pytest.fixture(params=["mamba", "mamba2"])
def family(request) -> str:
    """The model type of the source."""
    return request.param


@pytest.fixture
def mamba(family) -> Any:
    return make_mamba(family=family)


@pytest.fixture
def hf_folder(mamba, tmp_path) -> Path:
    """transformers' format."""
    mamba.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def ssm_settings(model: Any) -> dict[str, Any]:
    """The original name and value of what a model's mixer has not by default."""
    config = model.config
    if config.model_type == "mamba2":
        names = {"headdim": config.head_dim, "ngroups": config.n_groups, "chunk_size": config.chunk_size}
        return {"layer": "Mamba2", "d_state": config.state_size, **names}
    return {"d_state": config.state_size, "dt_rank": config.time_step_rank}


def write_original(model: Any, folder: Path, with_head: bool = True, **config: Any) -> Path:
    """The original state-spaces format: its config.json, and a state dict that names the table `embedding`."""
    folder.mkdir()
    tensors = {
        name.replace("embeddings", "embedding"): tensor
        for name, tensor in model.state_dict().items()
        if with_head or name != "lm_head.weight"
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    written = {
        "d_model": model.config.hidden_size,
        "n_layer": model.config.num_hidden_layers,
        "vocab_size": VOCABULARY,
        "ssm_cfg": ssm_settings(model),
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder

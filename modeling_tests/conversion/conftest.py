# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints in every format that can be converted."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

VOCABULARY, PADDED_VOCABULARY = 61, 64
HIDDEN, LAYERS, STATE, RANK = 24, 2, 6, 5


def make_mamba(tied: bool = True, layers: int = LAYERS, hidden_size: int = HIDDEN, **settings) -> MambaForCausalLM:
    """transformers' Mamba with weights of which none is zero or one, so that a lost or swapped one shows."""
    config = MambaConfig(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        state_size=STATE,
        time_step_rank=RANK,
        tie_word_embeddings=tied,
        **settings,
    )
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def mamba() -> MambaForCausalLM:
    return make_mamba()


@pytest.fixture
def hf_folder(mamba, tmp_path) -> Path:
    """transformers' format."""
    mamba.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def write_original(model: MambaForCausalLM, folder: Path, with_head: bool = True, **config) -> Path:
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
        "ssm_cfg": {"d_state": model.config.state_size, "dt_rank": model.config.time_step_rank},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder

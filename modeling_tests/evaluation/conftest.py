# SPDX-License-Identifier: Apache-2.0
"""Books of a few words and tiny checkpoints that read them."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

from modeling_tests.modeling.tiny_models import tiny_memmamba, tiny_model
from remamba_hf.training.book_tokens import prepare_books

VOCABULARY = 300
TEXT = "".join(
    f"Of the {place} and its people little was {verb}.\nThey went by the old road.\n\n"
    for place in ("river", "house", "garden", "village")
    for verb in ("said", "known", "written", "told", "kept")
)


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder of two books of about 1,500 tokens."""
    folder = tmp_path_factory.mktemp("books")
    for number in range(2):
        (folder / f"{number}.txt").write_text(TEXT * 8)
    return folder


@pytest.fixture(scope="session")
def prepared(books, tmp_path_factory):
    """Tokenizer, and the tokens of all books."""
    return prepare_books(books, tmp_path_factory.mktemp("data"), vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def memmamba_folder(prepared, tmp_path_factory):
    """A MemMamba whose notes and pools are busy, with its tokenizer."""
    tokenizer, _ = prepared
    folder = tmp_path_factory.mktemp("memmamba")
    model = tiny_memmamba(
        torch.float32,
        vocab_size=VOCABULARY,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def remamba_folder(prepared, tmp_path_factory):
    """A ReMamba, with its tokenizer."""
    folder = tmp_path_factory.mktemp("remamba") / "tiny-remamba"
    tiny_model(torch.float32, vocab_size=VOCABULARY).save_pretrained(folder)
    prepared[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def neox_folder(prepared, tmp_path_factory):
    """An attention model of transformers, with the tokenizer, which has no room for more than 512 tokens."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("neox") / "tiny-neox"
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = GPTNeoXConfig(**sizes, max_position_embeddings=512, initializer_range=0.4, bos_token_id=0, eos_token_id=0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    prepared[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    """transformers' Mamba with the same vocabulary."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("plain")
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=1)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder

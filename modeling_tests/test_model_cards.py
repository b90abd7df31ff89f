# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in model_cards/ stand as they would on the Hub: today's code, small weights, and what the card says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import remamba_hf
from model_cards.copy_code import travelling_files
from remamba_hf.reading import load_for_reading, read_and_answer

ROOT = Path(remamba_hf.__file__).parent.parent
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
BOOK = ROOT / "examples" / "books" / "persuasion.txt"

pytestmark = pytest.mark.skipif(not CARDS, reason="needs the repository's model_cards/")


@pytest.fixture(params=CARDS, ids=lambda folder: folder.name)
def card(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_code_that_travels_is_todays(card):
    expected = travelling_files(json.loads((card / "config.json").read_text())["auto_map"])
    assert {file.name for file in card.glob("*.py")} == expected
    for name in expected:
        source = ROOT / "remamba_hf" / "modeling" / name
        assert (card / name).read_text() == source.read_text(), f"{name} differs: run `make cards`"


def test_files_are_those_of_a_small_checkpoint(card):
    names = {file.name for file in card.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (card / "model.safetensors").stat().st_size < 12e6
    assert (card / "README.md").read_text().startswith("---\nlicense:")


def test_states_stay_in_float32(card):
    model = AutoModelForCausalLM.from_pretrained(card)
    assert model.dtype == torch.bfloat16
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    step_bias = {"remamba": "dt_proj.bias", "remamba2": "dt_bias"}[model.config.model_type]
    assert {name.split("mixer.")[-1] for name in kept} == {"A_log", "D", step_bias, "adaptation.bias"}


@pytest.mark.parametrize("depth", [0.1, 0.6, 0.97])
def test_it_recalls_a_number_from_a_book(card, depth):
    """1 prompt of about 3,000 tokens a depth, in and behind the window."""
    model, tokenizer = load_for_reading(str(card), device="cpu")
    lines = BOOK.read_text().splitlines()[200:450]
    lines.insert(int(depth * len(lines)), "The secret number of Elinor Snow is 90174.")
    reading = read_and_answer(
        model, tokenizer, "\n".join(lines), "What is the secret number of Elinor Snow?", max_new_tokens=8, do_sample=False
    )
    assert reading.answer == "90174"
    assert 0 < len(reading.positions) < 0.05 * reading.prompt_tokens


def test_its_tokenizer_makes_one_token_of_every_digit(card):
    tokenizer = AutoTokenizer.from_pretrained(card)
    assert len(tokenizer("48213", add_special_tokens=False)["input_ids"]) == 5

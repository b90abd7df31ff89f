# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in model_cards/ stand as they would on the Hub: today's code, small weights, and what the card says."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import remamba_hf
from model_cards.copy_code import travelling_files
from remamba_hf.evaluation import fidelity, memory, memory_report, recall
from remamba_hf.evaluation.card import BEGIN, END, plan_update
from remamba_hf.reading import Reading, load_for_reading, read_and_answer

ROOT = Path(remamba_hf.__file__).parent.parent
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
BOOK = ROOT / "examples" / "books" / "persuasion.txt"
IN_FLOAT32 = {
    "remamba": {"A_log", "D", "dt_proj.bias", "adaptation.bias"},
    "remamba2": {"A_log", "D", "dt_bias", "adaptation.bias"},
    "memmamba": {
        "A_log",
        "D",
        "dt_proj.bias",
        "write_score.weight",
        "write_score.bias",
        "token_reader.sink",
        "layer_reader.sink",
    },
}

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
    assert {re.sub(r".*(mixer|memory)\.", "", name) for name in kept} == IN_FLOAT32[model.config.model_type]


@pytest.mark.parametrize("depth", [0.1, 0.6, 0.97])
def test_it_recalls_a_number_from_a_book(card, depth):
    """1 prompt of about 4,000 tokens a depth, in and behind the window of those that compress."""
    model, tokenizer = load_for_reading(str(card), device="cpu")
    reading = ask(model, tokenizer, book_with({"Elinor Snow": "90174"}, [depth]), "Elinor Snow")
    assert reading.answer == "90174"
    if reading.notes:
        assert re.search(r"\[.*90174\]", reading.passages[0].text)  # the number's notes are the most read
    else:
        assert 0 < len(reading.positions) < 0.05 * reading.prompt_tokens


@pytest.mark.parametrize("card", [card for card in CARDS if card.name == "memmamba-tiny"], ids=lambda folder: folder.name)
def test_it_tells_people_apart(card):
    """4 people's numbers in one text of about 4,000 tokens: only the name in the question says which one is asked for."""
    people = {"Elinor Snow": "90174", "Harold Marsh": "48213", "Clara Quincy": "70596", "Silas Webb": "33852"}
    model, tokenizer = load_for_reading(str(card), device="cpu")
    book = book_with(people, [0.1, 0.35, 0.6, 0.85])
    assert {person: ask(model, tokenizer, book, person).answer for person in people} == people


def book_with(numbers: dict[str, str], depths: Sequence[float]) -> str:
    """About 4,000 tokens of a book, and in it a sentence at each depth (0 to 1) that gives a person a number."""
    lines = BOOK.read_text().splitlines()[200:450]
    places = [int(depth * len(lines)) for depth in depths]
    for place, (person, number) in sorted(zip(places, numbers.items(), strict=True), reverse=True):
        lines.insert(place, f"The secret number of {person} is {number}.")
    return "\n".join(lines)


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, book: str, person: str) -> Reading:
    question = f"What is the secret number of {person}?"
    return read_and_answer(model, tokenizer, book, question, max_new_tokens=8, do_sample=False)


def test_its_tokenizer_makes_one_token_of_every_digit(card):
    tokenizer = AutoTokenizer.from_pretrained(card)
    assert len(tokenizer("48213", add_special_tokens=False)["input_ids"]) == 5


def result_files(card: Path) -> list[Path]:
    """The files that the numbers of a card are of, in its order."""
    block = (card / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    return list(dict.fromkeys(card / name for name in re.findall(r"^- \[(.+?)\]", block, re.MULTILINE)))


def test_its_numbers_are_those_of_its_results(card):
    """`remamba card` over the files that the card names has nothing to change, and no file of results is left out."""
    files = result_files(card)
    assert {file for file in (card / "evaluation").glob("*.json") if not file.name.startswith("training")} == set(files)
    update = plan_update(card, files)
    assert "".join(change.diff(card) for change in update.changes) == ""
    results = ModelCard.load(card / "README.md").data.eval_results
    shares = [one.metric_value for one in results if one.metric_type == "exact_match"]
    assert 0 < len(shares) < len(results) <= update.scores
    assert all(0 <= share <= 100 for share in shares)


def test_the_hub_can_read_its_front_matter(card):
    data = yaml.safe_load((card / "README.md").read_text().split("---\n")[1])
    (model,) = data["model-index"]
    assert model["name"] == card.name
    for result in model["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert result["task"]["type"] == data["pipeline_tag"]
        assert {"type", "name", "config", "args"} <= set(result["dataset"])
        assert len({metric["name"] for metric in result["metrics"]}) == len(result["metrics"])
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str)
            assert isinstance(metric["value"], float)


def test_rows_of_other_models_are_those_that_the_results_print(card):
    """The tables beside those of `remamba card`, with baselines and other seeds."""
    printed = [row for file in result_files(card) for row in rows_of(tables(json.loads(file.read_text())))]
    before, rest = (card / "README.md").read_text().split(BEGIN)
    rows = rows_of(before) + rows_of(rest.split(END)[1])
    assert rows
    assert [row for row in rows if row not in printed] == []


def tables(results: dict) -> str:
    """As `remamba eval` prints them."""
    if "cells" in results:
        return recall.markdown_table(results)
    return fidelity.markdown_tables(results) if "models" in results else memory_report.markdown_tables(results)


def rows_of(text: str) -> list[tuple[str, ...]]:
    """The cells behind the first of every row of tables about a measure; empty ones at the end are left out."""
    rows, about = [], ""
    for line in text.splitlines():
        if not line.startswith("|"):
            about = ""
        elif not about:
            about = line.strip("| ")
        elif re.match("exact match|perplexity|ETMF|ECLMF", about) and "---" not in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
            while cells and not cells[-1]:
                cells.pop()
            rows.append((re.split("[ ,]", about)[0], *cells))
    return rows


def test_links_lead_to_files(card):
    links = re.findall(r"\]\((?!http)([^)]+)\)", (card / "README.md").read_text())
    assert links
    assert [link for link in links if not (card / link).exists()] == []


def test_commands_have_options_that_are_there(card):
    """Of `remamba eval` and the memory module, as far as the parsers tell."""
    text = (card / "README.md").read_text().split("## Reproduce")[1]
    commands = re.findall(r"^(?:remamba eval (\w+)|python -m remamba_hf\.evaluation\.(\w+)) (.*)$", text, re.MULTILINE)
    assert commands
    parts = {"passkey": ["passkey"], "documents": ["documents"], "memory": None}
    for task, module, written in commands:
        arguments = written.replace("$MODELS", "--model A B --plain-model C --books D").replace("$LENGTHS", "1024").split()
        if (task or module) in parts:
            memory.parse_arguments(arguments, parts=parts[task or module])
        else:
            {"recall": recall, "fidelity": fidelity}[task].parse_arguments(arguments)

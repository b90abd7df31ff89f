# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/cost_of_notes.py`: what it measures and refuses, on small models. No time is ever asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch

import remamba_hf

BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "cost_of_notes.py").exists():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # where their scripts find each other

import cost_of_notes  # noqa: E402

TIMES = {"median_s", "fastest_s", "slowest_s"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(cost_of_notes.SHAPES, "tiny", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 60})


def test_a_run_on_a_cpu_has_everything_but_captured_steps(tmp_path):
    output = tmp_path / "new" / "cost.json"
    sizes = ["--rows", "2", "--length", "16", "--prompt", "70", "--decode-rows", "1", "3", "--steps", "2", "--repeats", "1"]
    cost_of_notes.main(["--shape", "tiny", "--device", "cpu", "--output", str(output), *sizes])
    results = json.loads(output.read_text())
    assert results["parameters"]["memmamba"] > results["parameters"]["plain"]
    assert [entry["rows"] for entry in results["decoding"]] == [1, 3]
    for entry in (results["training_step"], results["reading"], *results["decoding"]):
        assert entry["times_plain"] == entry["memmamba"]["median_s"] / entry["plain"]["median_s"]
    assert "decoding_captured" not in results


def test_steps_of_generate_are_the_difference_of_two_answers(monkeypatch):
    """The captured steps' measurement, without a GPU to capture on."""
    models = {name: model.eval() for name, model in cost_of_notes.build("tiny", "cpu").items()}
    lengths = []
    for model in models.values():
        generate = model.generate

        def counted(*arguments, generate=generate, **settings):
            output = generate(*arguments, **settings)
            lengths.append(output.shape[1] - 256)
            return output

        monkeypatch.setattr(model, "generate", counted)
    result = cost_of_notes.decoding_captured(models, 2, 5, 1, "cpu", cuda_graph=False)
    assert set(lengths) == {cost_of_notes.FEW_TOKENS, cost_of_notes.FEW_TOKENS + 5}
    assert set(result) == {"rows", "steps", "plain", "memmamba", "times_plain"}
    assert set(result["plain"]) == set(result["memmamba"]) == TIMES


def test_captured_steps_are_asked_for():
    if torch.cuda.is_available():
        pytest.skip("here they can be captured")
    models = {name: model.eval() for name, model in cost_of_notes.build("tiny", "cpu").items()}
    with pytest.raises(ValueError, match="cuda_graph=True is not possible"):
        cost_of_notes.decoding_captured(models, 1, 1, 1, "cpu")


def test_a_memory_that_changes_the_logits_is_not_timed():
    models = cost_of_notes.build("tiny", "cpu")
    with torch.no_grad():
        models["memmamba"].backbone.layers[0].memory.token_reader.output.weight.fill_(1.0)
        models["memmamba"].backbone.layers[1].mixer.D.mul_(2.0)
    with pytest.raises(RuntimeError, match="no timing before that is mended"):
        cost_of_notes.check(models, "cpu")


def test_results_of_earlier_runs_are_still_read():
    for path in (BENCHMARKS / "results").glob("cost_of_notes_*.json"):
        results = json.loads(path.read_text())
        assert all(
            set(entry["memmamba"]) >= TIMES for entry in (*results["decoding"], *results.get("decoding_captured", []))
        )

# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/cpu_prefill.py`: what it compares, measures, refuses and keeps, on tiny models. No time is ever asserted but
that of a clock of its own."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import remamba_hf

BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "cpu_prefill.py").exists():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # where their scripts find each other

import cpu_prefill  # noqa: E402

RUNS = ("transformers", "plain", "transformers_compiled", "plain_compiled")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cpu_prefill, "SHAPE_130M", {"hidden_size": 16, "vocab_size": 60, "tie_word_embeddings": True})
    heads = {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1}
    monkeypatch.setattr(cpu_prefill, "MIXERS", {"remamba": {"state_size": 4}, "remamba2": heads})


def run(output, *words):
    """The results that a run leaves."""
    sizes = "--layers 2 --length 16 --repeats 2 --threads 1 --decode-prompt 5 --decode-tokens 3 --backend eager"
    cpu_prefill.main([*sizes.split(), "--output", str(output), *words])
    return json.loads(output.read_text())


@pytest.mark.parametrize("family", ["remamba", "remamba2"])
def test_decoding_beside_transformers(tmp_path, family):
    results = run(tmp_path / "new" / "cpu.json", "--family", family, "--only", "decoding", "--decode-rows", "1", "3")
    assert "speed" not in results
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"]["threads"] == 1
    decoding = results["decoding"]
    assert (decoding["prompt"], decoding["n"], decoding["repeats"]) == (5, 3, 2)
    assert [entry["rows"] for entry in decoding["rows"]] == [1, 3]
    for entry in decoding["rows"]:
        assert 0 < entry["rounding_of_float32"] < 1e-5
        for name in RUNS:
            assert entry[name]["fastest_ms"] <= entry[name]["median_ms"] <= entry[name]["slowest_ms"]
            assert ("compilation_s" in entry[name]) == name.endswith("compiled")
        for name in RUNS[1:]:
            assert entry[name]["beside_transformers"]["largest_relative_logit_difference"] < 1e-5
            assert entry[name]["beside_transformers"]["same_tokens"]


def test_a_part_is_added_to_an_earlier_file_of_the_same_machine_alone(tmp_path):
    """A file from before decoding was measured has neither its results nor their settings."""
    output = tmp_path / "cpu.json"
    earlier = run(output, "--only", "speed")
    assert "decoding" not in earlier
    both = run(output, "--only", "decoding", "--decode-rows", "1")
    assert both["speed"] == earlier["speed"]
    assert both["decoding"]["rows"]
    output.write_text(json.dumps({**both, "versions": {**both["versions"], "torch": "1.0"}}))
    assert "decoding" not in run(output, "--only", "speed")


def test_other_weights_are_not_timed(monkeypatch):
    build = cpu_prefill.build

    def apart(*arguments, **settings):
        ours, theirs = build(*arguments, **settings)
        with torch.no_grad():
            ours.backbone.layers[0].mixer.D.mul_(1.01)
        return ours, theirs

    monkeypatch.setattr(cpu_prefill, "build", apart)
    with pytest.raises(RuntimeError, match="logits that differ by"):
        cpu_prefill.compare_decoding("remamba", [1], 5, 3, 2, 1, "eager")


def answer(tokens, logits):
    """What `generate` returns for a prompt of one token: `tokens` [B, n], whose `logits` are [B, n, V]."""
    tokens = torch.tensor(tokens)
    sequences = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)
    return SimpleNamespace(sequences=sequences, logits=tuple(logits.unbind(1)))


def test_rows_may_part_where_rounding_decides():
    logits = torch.rand(2, 4, 7)
    near = logits + 1e-6
    near[1, 2:] += 5  # behind the token that differs: another text
    expected = answer([[1, 2, 3, 3], [4, 5, 6, 6]], logits)
    found = cpu_prefill.agreement(expected, answer([[1, 2, 3, 3], [4, 0, 6, 6]], near), 1)
    assert found["first_differences"] == [[1, 1]]
    assert not found["same_tokens"]
    assert 0 < found["largest_relative_logit_difference"] < 1e-5
    assert cpu_prefill.agreement(expected, expected, 1)["same_tokens"]


def test_twice_what_float32_rounds_is_allowed():
    logits = torch.rand(1, 2, 7)
    expected, actual = answer([[1, 2]], logits), answer([[1, 2]], logits + 1e-3)
    cpu_prefill.agreement(expected, actual, 1, rounding=1e-3)
    with pytest.raises(RuntimeError, match="logits that differ by"):
        cpu_prefill.agreement(expected, actual, 1, rounding=4e-4)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
@pytest.mark.parametrize("step", [0, 1], ids=["before", "at the first difference"])
def test_rows_may_not_part_for_other_reasons(wrong, step):
    logits = torch.rand(2, 3, 7)
    other = logits.clone()
    other[1, step, 0] += wrong
    with pytest.raises(RuntimeError, match="logits that differ by"):
        cpu_prefill.agreement(answer([[1, 2, 3], [4, 5, 6]], logits), answer([[1, 2, 3], [4, 0, 6]], other), 1)


class TimedModel:
    """Answers at once, but lets a clock go on: seconds for the prompt, for every token, and for the first compilation."""

    def __init__(self, clock, per_token, compiles=True):
        self.clock, self.per_token, self.compiles = clock, per_token, compiles
        self.config = SimpleNamespace(vocab_size=9)

    def generate(self, ids, max_new_tokens, compile_config=None, **settings):
        if compile_config is not None and self.compiles and "_compiled_call" not in vars(self):
            self._compiled_call = True
            self.clock[0] += 30
        self.clock[0] += 5 + self.per_token * max_new_tokens
        new = torch.ones(len(ids), max_new_tokens, dtype=torch.long)
        return SimpleNamespace(sequences=torch.cat([ids, new], dim=1), logits=(torch.ones(len(ids), 9),) * max_new_tokens)


def test_the_prompt_and_the_compilation_cancel_out(monkeypatch):
    monkeypatch.setattr(cpu_prefill, "rounding_of_float32", lambda *answer: 0.0)
    clock = [0.0]
    monkeypatch.setattr(cpu_prefill.time, "perf_counter", lambda: clock[0])
    entry = cpu_prefill.decoding(TimedModel(clock, 0.25), TimedModel(clock, 0.5), 2, 4, 6, 3, "eager")
    for name in RUNS:
        expected = 250 if name.startswith("plain") else 500
        assert entry[name]["median_ms"] == entry[name]["fastest_ms"] == entry[name]["slowest_ms"] == expected
    assert entry["plain_compiled"]["compilation_s"] == entry["transformers_compiled"]["compilation_s"] == 30


def test_a_step_that_was_not_compiled_is_not_called_so():
    clock = [0.0]
    with pytest.raises(RuntimeError, match="compiled no step"):
        cpu_prefill.decoding(TimedModel(clock, 1, compiles=False), TimedModel(clock, 1), 1, 4, 2, 1, "eager")


def test_the_folder_of_compiled_code_is_put_back(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    with cpu_prefill.nothing_compiled_yet():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert folder.is_dir()
        assert not any(folder.iterdir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert not folder.exists()


def test_a_missing_compiler_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no such compiler"))
    monkeypatch.setattr(cpu_prefill, "build", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(SystemExit, match="--backend aot_eager"):
        run(tmp_path / "cpu.json", "--backend", "inductor")
    assert not any(tmp_path.iterdir())

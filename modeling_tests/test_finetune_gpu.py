# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/finetune_gpu.py`: what it measures, records and goes on from, on tiny models. No time is ever asserted."""

import json
import sys
from pathlib import Path

import pytest

import remamba_hf

pytest.importorskip("peft")
BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "finetune_gpu.py").exists():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # where their scripts find each other

import finetune_gpu  # noqa: E402


@pytest.fixture(autouse=True)
def _same_code(monkeypatch):
    monkeypatch.setattr(finetune_gpu, "code_digest", lambda: "as these tests found it")  # whoever edits meanwhile


def run(output, shape="tiny2", tokens="64"):
    finetune_gpu.main(["--device", "cpu", "--shape", shape, "--tokens", tokens, "--output", str(output)])
    return json.loads(output.read_text())["cells"]


def test_every_adapter_of_every_model_has_an_effect(tmp_path):
    output = tmp_path / "new" / "steps.json"
    found = run(output)
    assert [tuple(cell[field] for field in finetune_gpu.Cell._fields) for cell in found] == [
        tuple(cell) for cell in finetune_gpu.cells("tiny2", 1, 64)
    ]
    for cell in found:
        assert "error" not in cell, cell
        # embeddings, head and two layers of in_proj and, but for transformers' model, out_proj
        assert cell["active_adapters"] == cell["adapters"] == (4 if cell["model"] == "transformers" else 6)
        assert cell["fastest_s"] <= cell["median_s"] <= cell["slowest_s"]
    ours, theirs = found[0], found[-1]
    assert ours["trained"] > theirs["trained"] > 0
    lines = output.with_suffix(".md").read_text().splitlines()
    assert len(lines) == 2 + len(found)
    assert "6 of 6" in lines[2]


def test_a_cut_off_run_goes_on_and_failures_are_told(tmp_path, monkeypatch):
    output, measured = tmp_path / "steps.json", finetune_gpu.measure

    def failing(cell, bench):
        if cell.model == "transformers":
            raise RuntimeError("out of memory\nand more")
        if cell.variant == "plain":
            raise KeyboardInterrupt
        return measured(cell, bench)

    with monkeypatch.context() as patched:
        patched.setattr(finetune_gpu, "measure", failing)
        with pytest.raises(KeyboardInterrupt):
            run(output)
    first = json.loads(output.read_text())["cells"]
    assert len(first) == 2

    def later(cell, bench):
        assert cell.variant == "plain", "measured again"
        return failing(cell, bench) if cell.model == "transformers" else measured(cell, bench)

    monkeypatch.setattr(finetune_gpu, "measure", later)
    found = run(output)
    assert found[:2] == first
    assert [cell.get("error") for cell in found[2:]] == [None, None, *["RuntimeError: out of memory"] * 2]
    assert "failed: RuntimeError: out of memory" in output.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="other settings"):
        finetune_gpu.main(["--device", "cpu", "--shape", "tiny2", "--repeats", "6", "--output", str(output)])


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    for words in (["--tokens", "3"], ["--rows", "0"]):
        with pytest.raises(SystemExit):
            finetune_gpu.main(["--device", "cpu", "--shape", "tiny2", "--output", str(tmp_path / "steps.json"), *words])
        assert "at least" in capsys.readouterr().err

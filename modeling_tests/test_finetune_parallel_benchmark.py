# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/finetune_parallel.py`: what it launches, compares and goes on from. No time is ever asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import remamba_hf

pytest.importorskip("peft")
BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "finetune_parallel.py").exists():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # where their scripts find each other

import finetune_parallel  # noqa: E402


def main(tmp_path, *words):
    output = tmp_path / "results" / "parallel.json"
    finetune_parallel.main(["--tiny", "--work", str(tmp_path / "work"), "--output", str(output), *words])
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


class Trainings:
    """Stands for the processes that train: records their commands, and writes what the example would."""

    def __init__(self, losses, failing=()):
        self.losses, self.failing, self.configurations = losses, failing, []

    def __call__(self, words, env, stdout, **_):
        options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        output = Path(options["output"])
        name = output.name
        self.configurations.append(name)
        if name in self.failing:
            stdout.write("Traceback\nRuntimeError: out of memory\nand more\n")
            return subprocess.CompletedProcess(words, 1)
        assert ("accelerate.commands.launch" in words) == (name != "one")
        history = [{"loss": loss, "kept": 1.0} for loss in self.losses[name]] + [{"eval_loss": 2.0}]
        speed = 100.0 if name == "one" else 180.0
        record = dict(processes=1 if name == "one" else 2, launch="X", device="cpu", tokens_per_second=speed)
        record |= dict(step_peak_bytes=[1e9, 2e9], peak_bytes=[3e9, 4e9], versions={"torch": "2"}, history=history)
        (output / "training.json").write_text(json.dumps(record))
        return subprocess.CompletedProcess(words, 0)


def test_runs_are_compared_and_failures_told(tmp_path, monkeypatch):
    losses = {"one": [3.0, 2.0], "ddp": [3.0, 2.25], "fsdp2": [3.5, 2.0]}
    trainings = Trainings(losses, failing=["zero2"])
    monkeypatch.setattr(subprocess, "run", trainings)
    reasons = {"zero3": "deepspeed is not installed"}
    monkeypatch.setattr(finetune_parallel, "why_left_out", reasons.get)
    results, text = main(tmp_path)
    runs = results["runs"]
    assert list(runs) == ["one", "ddp", "fsdp2", "zero2", "zero3"]
    assert [runs[name]["largest_loss_difference"] for name in losses] == [0, 0.25, 0.5]
    assert runs["ddp"]["throughput_ratio"] == 1.8
    assert runs["zero2"] == {"error": "RuntimeError: out of memory"}
    assert "| fsdp2 | 2 | 180 | 1.80 | 3.5000, 2.0000 | 5.0e-01 | 1.0, 2.0 | 3.0, 4.0 |" in text
    assert "| zero2 | failed: RuntimeError: out of memory |" in text
    assert "| zero3 | left out: deepspeed is not installed |" in text
    # The same command runs what is missing, and nothing else.
    trainings.configurations, trainings.failing, trainings.losses["zero2"] = [], (), [3.0, 2.0]
    again, _ = main(tmp_path)
    assert trainings.configurations == ["zero2"]
    assert again["runs"]["zero2"]["largest_loss_difference"] == 0
    assert again["runs"]["ddp"] == runs["ddp"]
    with pytest.raises(SystemExit, match="other settings"):
        main(tmp_path, "--steps", "5")


def test_what_cannot_be_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(tmp_path, "--batch", "6")
    assert "--batch a multiple of --rows x --processes" in capsys.readouterr().err


@pytest.mark.slow
def test_it_trains(tmp_path):
    results, _ = main(tmp_path, "--configurations", "one", "ddp")
    assert results["runs"]["ddp"]["processes"] == 2
    assert len(results["runs"]["ddp"]["loss"]) == 4
    assert results["runs"]["ddp"]["largest_loss_difference"] < 1e-4

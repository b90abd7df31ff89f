# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_lora.py under the configurations of examples/accelerate: two processes train what one trains."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import remamba_hf
from modeling_tests.modeling.tiny_models import tiny_model

pytest.importorskip("peft")
pytest.importorskip("datasets")

from remamba_hf.checkpoint_files import read_tensors
from remamba_hf.training.book_tokens import train_book_tokenizer

ROOT = Path(remamba_hf.__file__).parent.parent
SCRIPT, CONFIGURATIONS = ROOT / "examples" / "finetune_lora.py", ROOT / "examples" / "accelerate"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the repository's examples/"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
]
TEXT = "The secret number of Ada is 12345. Question: What is the secret number of Ben?\nAnswer: That is a secret."
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
# Draws that matter: windows and vectors kept vary widely.
DRAWN = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.05, 0.9))
LEARNING_RATE = 1e-3
SETTINGS = [
    *"--steps 6 --save-steps 3 --batch 4 --rows 2 --rank 4 --logging-steps 1".split(),
    *f"--learning-rate {LEARNING_RATE} --eval-rows 3 --max-new-tokens 3 --workers 1 --max-tokens 128".split(),
]
LOGGED = ("loss", "grad_norm", "kept", "eval_loss", "eval_exact", "num_input_tokens_seen")
SHARDING = ["fsdp2", *(["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])]


def pairs(count: int, start: int) -> str:
    """Prompts of different lengths; JSON lines."""
    texts = (f"The secret number of {number} is {number**5}. " * (2 + number % 4) for number in range(start, start + count))
    return "".join(json.dumps({"prompt": text, "response": f" No {len(text)}."}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folders of what was trained, by the name of the launch."""
    folder = tmp_path_factory.mktemp("parallel")
    model = tiny_model(torch.float32, vocab_size=300, **DRAWN)
    for name, token in IDS.items():
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)
    model.save_pretrained(folder / "base")
    train_book_tokenizer([TEXT], vocab_size=300).save_pretrained(folder / "base")
    # 18 rows are no multiple of a step, and fewer than 6 steps take.
    (folder / "data.jsonl").write_text(pairs(18, 0))
    # A multiple of what two processes read at once: of other numbers Trainer counts some rows of a loss twice.
    (folder / "held_out.jsonl").write_text(pairs(4, 100))

    def launch(name: str, configuration: str | None, *more: str) -> dict:
        paths = [f"--model={folder / 'base'}", f"--data={folder / 'data.jsonl'}", f"--output={folder / name}"]
        return {
            "config": configuration and str(CONFIGURATIONS / f"{configuration}.yaml"),
            "processes": 1 if configuration is None else 2,
            "arguments": [*paths, f"--eval-data={folder / 'held_out.jsonl'}", *SETTINGS, *more],
            "log": str(folder / f"{name}.log"),
        }

    def resumed(configuration: str) -> dict:
        """What is left of a run that was killed after its first checkpoint."""
        checkpoint, output = f"{configuration}/checkpoint-3", f"resumed-{configuration}"
        copy = [str(folder / checkpoint), str(folder / output / "checkpoint-3")]
        return {**launch(output, configuration, "--resume"), "copy": copy}

    configurations = ["ddp", *SHARDING]
    grouped = ("--group-by-length", "--gradient-checkpointing", "--eval-rows=0")
    stream = ("--stream", "--eval-rows=0")
    launches = [
        launch("one", None),
        *(launch(name, name) for name in configurations),
        *(resumed(name) for name in configurations),
        launch("grouped-one", None, *grouped),
        launch("grouped-ddp", "ddp", *grouped),
        launch("stream-one", None, *stream),
        launch("stream-ddp", "ddp", *stream),
    ]
    (folder / "launches.json").write_text(json.dumps(launches))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "modeling_tests.forked_launch", str(SCRIPT), str(folder / "launches.json")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def trained(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[float]], list[dict]]:
    """The adapter, what was logged by its name, and the answers."""
    history = json.loads((output / "training.json").read_text())["history"]
    logged = {name: [entry[name] for entry in history if name in entry] for name in LOGGED}
    answers = output / "answers.jsonl"
    said = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
    return read_tensors(output / "adapter", stems=("adapter_model",)), logged, said


@pytest.mark.parametrize(
    ("several", "one"),
    [*((name, "one") for name in ("ddp", *SHARDING)), ("grouped-ddp", "grouped-one"), ("stream-ddp", "stream-one")],
)
def test_two_processes_train_what_one_trains(outputs, several, one):
    """Losses, what was drawn, weights and answers, beyond the end of an epoch with rows left over."""
    weights, logged, said = trained(outputs / several)
    expected_weights, expected_logged, expected_said = trained(outputs / one)
    assert len(logged["loss"]) == 6
    assert len(set(expected_logged["kept"])) > 3  # else nothing was drawn
    for name in LOGGED:
        assert logged[name] == pytest.approx(expected_logged[name], rel=1e-4), name
    assert weights.keys() == expected_weights.keys()
    # Adam moves a weight by about the learning rate, whatever its gradient: of one that is nearly zero rounding decides.
    for name, tensor in expected_weights.items():
        assert (weights[name] - tensor).abs().max() < LEARNING_RATE / 20, name
    assert said == expected_said
    assert len(said) == (3 if one == "one" else 0)
    record = json.loads((outputs / several / "training.json").read_text())
    assert record["processes"] == 2
    assert record["tokens_per_second"] > 0


def test_the_orders_that_are_compared_differ(outputs):
    losses = [trained(outputs / name)[1]["loss"] for name in ("one", "grouped-one", "stream-one")]
    assert len({tuple(loss) for loss in losses}) == 3


@pytest.mark.parametrize("configuration", ["ddp", *SHARDING])
def test_several_processes_resume_bit_for_bit(outputs, configuration):
    weights, logged, said = trained(outputs / f"resumed-{configuration}")
    whole_weights, whole_logged, whole_said = trained(outputs / configuration)
    for name, tensor in whole_weights.items():
        assert torch.equal(weights[name], tensor), name
    assert logged == whole_logged
    assert said == whole_said


def test_configurations_are_what_they_are_called(outputs):
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    for name in ("ddp", *SHARDING):
        assert json.loads((outputs / name / "training.json").read_text())["launch"] == kinds[name]

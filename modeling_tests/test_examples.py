# SPDX-License-Identifier: Apache-2.0
"""The examples run as their users run them: as scripts, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MambaForCausalLM

import remamba_hf

ROOT = Path(remamba_hf.__file__).parent.parent
BOOK = ROOT / "examples" / "books" / "persuasion.txt"

pytestmark = pytest.mark.skipif(not BOOK.exists(), reason="needs the repository's examples/")


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def test_the_book_example_answers_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    short = tmp_path / "book.txt"
    short.write_text("\n".join(BOOK.read_text().splitlines()[:400]))
    picture = tmp_path / "kept.png"
    printed = run("read_a_book.py", "--book", str(short), "--picture", str(picture), "--depth", "0.3")
    answers = [line.split()[-1] for line in printed.splitlines() if line.split()[-1:] == ["48213"]]
    assert len(answers) == 2, printed
    assert "not compressed" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["remamba2", "memmamba"])
def test_the_training_example_makes_a_checkpoint(tmp_path, family):
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text(BOOK.read_text())
    arguments = ["--smoke", "--max-steps", "2", "--workers", "0", "--exclude", "no such words", "--family", family]
    run("train_recall_tiny.py", "--books", str(books), "--output", str(tmp_path / "run"), *arguments)
    model = tmp_path / "run" / "model"
    assert {"model.safetensors", "config.json", "tokenizer.json", f"modeling_{family}.py"} <= {
        f.name for f in model.iterdir()
    }
    assert json.loads((model / "config.json").read_text())["use_cache"] is True
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 2
    assert not (tmp_path / "run" / "model.partial").exists()


def test_the_training_example_makes_a_plain_checkpoint_of_transformers(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text(BOOK.read_text())
    arguments = ["--smoke", "--max-steps", "2", "--workers", "0", "--exclude", "no such words", "--family", "memmamba"]
    run("train_recall_tiny.py", "--books", str(books), "--output", str(tmp_path / "run"), *arguments, "--plain")
    exact = {"dtype": torch.float32}
    model, loading = MambaForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True, **exact)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ours = remamba_hf.ReMambaForCausalLM.from_pretrained(tmp_path / "run" / "model", **exact)
    ids = torch.randint(2, 1024, (1, 40))
    with torch.no_grad():
        theirs = model(ids).logits
        torch.testing.assert_close(ours(ids, compress_prompt=False).logits, theirs, atol=1e-4, rtol=1e-3)
    assert theirs.std() > 0.1

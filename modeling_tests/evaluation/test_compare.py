# SPDX-License-Identifier: Apache-2.0
"""`remamba eval compare`: files of every task as one table and picture, and files that are none."""

import copy
import json

import pytest

from remamba_hf.cli import main
from remamba_hf.evaluation import compare

pytest.importorskip("matplotlib")
MEMORY_SETTINGS = {"samples": 10, "distractors": 0, "digits": 5, "seed": 1, "keys": 1, "document_length": 200}


def share(right, **place):
    records = [{"depth": (number + 0.5) / 10, "right": number < right} for number in range(10)]
    return {**place, "samples": 10, "right": right, "accuracy": right / 10, "interval": [0.0, 1.0], "records": records}


def memory(label, right=9):
    return {
        "settings": {**MEMORY_SETTINGS, "counted": 50, "windows": 10},
        "description": {"models": {"model": {"label": label}}, "books": ["a.txt"]},
        "environment": {},
        "passkey": [share(right, model="model", length=1024), share(2, model="model", length=1 << 20)],
        "documents": [share(right, model="model", noise=10)],
        "perplexity": [
            {"model": "model", "length": 1024, "perplexity": 12.5},
            {"model": "model", "length": 61_440, "perplexity": None},
        ],
        "decode": [],
    }


def only(results, part):
    return {
        name: [] if name in ("passkey", "documents", "perplexity") and name != part else results[name] for name in results
    }


def recall():
    cells = [share(8, variant="compressed", length=1024), share(3, variant="uncompressed", length=4096)]
    description = {"family": "remamba2", "books": ["a.txt"]}
    return {"settings": MEMORY_SETTINGS, "description": description, "cells": cells, "perplexity": []}


def longbench(model, compression=None):
    summary = {"buckets": {"0-4k": 20.0, "4-8k": None, "8k+": 30.0}, "average": 25.0, "tasks": {}}
    return {"model": model, "settings": {"task": "longbench_e", "compression": compression}, "summary": summary}


def leval(model):
    tasks = {"quality": {"accuracy": 50.0, "samples": 2}, "codeU": {"accuracy": None, "samples": 0}}
    return {"model": model, "settings": {"task": "leval"}, "summary": {"tasks": tasks, "average": 50.0}}


def speed(label, device="cpu"):
    numbers = {"prefill_s": 0.25, "step_s": 0.004, "peak_bytes": None, "state_bytes": 2_000_000}
    place = {"model": label, "way": "", "rows": 1}
    return {
        "settings": {"batch_sizes": [1], "new_tokens": 64},
        "description": {"models": {label: {"label": label}}},
        "environment": {"device": device},
        "speed": [{**place, "length": 1024, **numbers}, {**place, "length": 4096, "error": "out of memory"}],
    }


def measured(value):
    forms = {"paper": {"mean": value}, "corrected": {"mean": value / 2}, "held_out_r2": {"mean": value / 4}}
    return {"etmf": {"0": forms, "8": forms}, "eclmf": {"2": forms, "5": None}}


def fidelity(shorter=None):
    """Files of one length are as they were before there were several."""
    model = {"model_type": "memmamba", "layers": 3, **measured(0.2)}
    settings = {"passages": 8, "length": 2048, "distances": [0, 8], "gaps": [2, 5]}
    if shorter:
        model |= {"label": "MemMamba of now", "shorter": shorter}
        settings["lengths"] = [512, 2048]
    return {"settings": settings, "description": {"books": ["a.txt"]}, "environment": {}, "models": {"model": model}}


FILES = {
    "longbench_e": [longbench("A"), longbench("B", {"compression_span": 0.18})],
    "leval": [leval("A"), leval("B")],
    "passkey": [only(memory("MemMamba"), "passkey"), only(memory("llama", 4), "passkey")],
    "documents": [only(memory("MemMamba"), "documents"), only(memory("llama", 4), "documents")],
    "perplexity": [only(memory("MemMamba"), "perplexity"), only(memory("llama"), "perplexity")],
    "recall": [recall()],
    "fidelity": [fidelity(), fidelity({"512": measured(0.1)})],
    "speed": [speed("A"), speed("B")],
}
ROWS = {
    "longbench_e": ["| score, by words | 0-4k | 8k+ | average |", "| B, compression on | 20.00 | 30.00 | 25.00 |"],
    "leval": ["| exact match, %, by task | quality | average |", "| A | 50.00 | 50.00 |"],
    "passkey": ["| exact match, %, by tokens | 1k | 1024k |", "| llama | 40 (17-69) | 20 (6-51) |"],
    "documents": ["| exact match, %, by documents without the fact | 10 |", "| MemMamba | 90 (60-98) |"],
    "perplexity": ["| perplexity, by tokens of context | 1k | 60k |", "| MemMamba | 12.50 | INF |"],
    "recall": ["| ReMamba-2, compression on | 80 (49-94) |  |", "| ReMamba-2, compression off |  | 30 (11-60) |"],
    "fidelity": [
        "| ETMF and ECLMF, by tokens of a passage | 512 | 2k |",
        "| MemMamba, ETMF, corrected, distance 8 |  | 0.100 |",
        "| MemMamba of now, ECLMF, held-out R^2, gap 2 | 0.025 | 0.050 |",
    ],
    "speed": ["| prefill, s, by tokens | 1k | 4k |", "| B | 4 | out of memory |", "| A | 2 | out of memory |"],
}


def write(folder, several):
    paths = [folder / f"{number}.json" for number in range(len(several))]
    for path, results in zip(paths, several, strict=True):
        path.write_text(json.dumps(results))
    return [str(path) for path in paths]


@pytest.mark.parametrize("task", list(FILES))
def test_table_and_picture_of_every_task(task, tmp_path, capsys):
    output = tmp_path / "new" / "compared.png"
    assert main(["eval", "compare", *write(tmp_path, FILES[task]), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    for row in ROWS[task]:
        assert row in out.splitlines()
    assert "differ" not in out
    assert output.with_suffix(".md").read_text() == out
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.stat().st_size > 10_000


def test_models_of_one_name_are_told_apart_and_differences_told(tmp_path, capsys):
    other = copy.deepcopy(FILES["passkey"][0])
    other["settings"]["seed"] = 2
    other["description"]["books"] = ["b.txt"]
    paths = write(tmp_path, [FILES["passkey"][0], other])
    assert main(["eval", "compare", *paths, "--output", str(tmp_path / "c.svg")]) == 0
    out = capsys.readouterr().out
    assert "| MemMamba (0) |" in out
    assert "| MemMamba (1) |" in out
    assert "The files differ in seed, books" in out
    (tmp_path / "other").mkdir()
    paths = [*write(tmp_path, [FILES["passkey"][0]]), *write(tmp_path / "other", [other])]
    assert main(["eval", "compare", *paths, "--output", str(tmp_path / "c.svg")]) == 0
    assert "| MemMamba (other/0) |" in capsys.readouterr().out
    paths = write(tmp_path, [speed("A"), speed("B", "H100")])
    assert main(["eval", "compare", *paths, "--output", str(tmp_path / "c.svg")]) == 0
    assert "The files differ in device" in capsys.readouterr().out


def test_files_of_several_tasks(tmp_path, capsys):
    paths = write(tmp_path, [memory("A"), memory("B")])
    output = ["--output", str(tmp_path / "c.png")]
    assert main(["eval", "compare", *paths, *output]) == 1
    assert "several tasks (passkey, documents, perplexity): choose one with --task" in capsys.readouterr().err
    assert main(["eval", "compare", *paths, *output, "--task", "perplexity"]) == 0
    assert "| A | 12.50 | INF |" in capsys.readouterr().out
    assert main(["eval", "compare", *paths, *output, "--task", "speed"]) == 1
    assert "none of speed: leave it out" in capsys.readouterr().err


BROKEN = {
    "no file": (None, "cannot be read"),
    "no JSON": ("{", "is not JSON"),
    "a list": ("[]", "holds no results"),
    "something else": ('{"settings": {}, "models": {}}', "holds no results"),
    "nothing measured": (json.dumps({**recall(), "cells": []}), "holds no results"),
    "another task": (json.dumps(leval("A")), "different tasks"),
    "no label": (
        json.dumps({**FILES["passkey"][0], "description": {"models": {"model": {}}}}),
        "not as `remamba eval passkey`",
    ),
    "text for a number": (
        json.dumps({**FILES["passkey"][0], "passkey": [share(3, model="model", length=8) | {"right": "3"}]}),
        "not as `remamba eval passkey`",
    ),
    "another model": (
        json.dumps({**FILES["passkey"][0], "passkey": [share(3, model="other", length=8)]}),
        "no number of passkey",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_files_that_cannot_be_compared(case, tmp_path, capsys):
    content, message = BROKEN[case]
    if content is not None:
        (tmp_path / "broken.json").write_text(content)
    paths = [*write(tmp_path, [FILES["passkey"][1]]), str(tmp_path / "broken.json")]
    assert main(["eval", "compare", *paths, "--output", str(tmp_path / "c.png")]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "broken.json" in err
    assert not (tmp_path / "c.png").exists()


def test_pictures_need_a_known_format(tmp_path, capsys):
    paths = write(tmp_path, FILES["passkey"])
    assert main(["eval", "compare", *paths, "--output", str(tmp_path / "c.doc")]) == 1
    assert ".png" in capsys.readouterr().err


def test_views_are_all_there():
    assert set(FILES) == set(compare.VIEWS)


def test_pictures_that_cannot_be_written_are_told_first(tmp_path, capsys):
    paths = write(tmp_path, FILES["passkey"])
    assert main(["eval", "compare", *paths, "--output", paths[0] + "/c.png"]) == 1
    captured = capsys.readouterr()
    assert "c.png cannot be written" in captured.err
    assert captured.out == ""

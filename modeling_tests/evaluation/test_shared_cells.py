# SPDX-License-Identifier: Apache-2.0
"""Cells that one or several processes measure: nothing is measured twice or lost, and the results are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from remamba_hf.evaluation import fidelity, memory, recall
from remamba_hf.evaluation.generation_eval import Processes
from remamba_hf.evaluation.shared_cells import Cell, measure_cells
from remamba_hf.training.book_tokens import train_book_tokenizer


class Run:
    """Cells of numbers of which each is measured as its square, and what has been measured and saved."""

    def __init__(self, output, totals, at_once=2, about="settings", alone=(), stop_at=None):
        self.output, self.results, self.measured, self.saves = output, {}, [], []
        self.stop_at = stop_at
        self.cells = [self.cell(name, total, at_once, about, name in alone) for name, total in totals.items()]

    def cell(self, name, total, at_once, about, alone):
        def measure(numbers):
            if self.stop_at == (name, numbers.start):
                raise KeyboardInterrupt
            self.measured.append((name, numbers.start, numbers.stop))
            return [number**2 for number in numbers]

        def enter(values):
            self.results[name] = values

        return Cell((name, 7), total, at_once, measure, enter, {"about": about}, alone)

    def go(self, processes=None):
        measure_cells(self.cells, self.output, lambda: self.saves.append(list(self.results)), processes)
        return self


def squares(count):
    return [number**2 for number in range(count)]


def test_cells_are_entered_one_by_one_in_their_order(tmp_path):
    run = Run(tmp_path / "r.json", {"a": 5, "b": 1, "c": 2}, alone=("a",)).go()
    assert run.results == {"a": squares(5), "b": squares(1), "c": squares(2)}
    assert run.saves == [["b"], ["b", "c"], ["b", "c", "a"]]
    assert not list(tmp_path.iterdir()), "no pieces are left"


def test_run_goes_on_behind_its_last_piece(tmp_path):
    output = tmp_path / "r.json"
    totals = {"a": 4, "b": 5}
    with pytest.raises(KeyboardInterrupt):
        Run(output, totals, stop_at=("b", 4)).go()
    assert len(list((tmp_path / "r.json.pieces").iterdir())) == 2, "those of the cell that is not whole"
    again = Run(output, {"b": 5})
    again.go()
    assert again.measured == [("b", 4, 5)]
    assert again.results == {"b": squares(5)}


def test_pieces_of_other_settings_or_sizes(tmp_path):
    output = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        Run(output, {"a": 4}, stop_at=("a", 2)).go()
    with pytest.raises(ValueError, match=r"r\.json\.pieces has pieces of other settings"):
        Run(output, {"a": 4}, about="others").go()
    other = Run(output, {"a": 4}, at_once=3).go()
    assert other.measured == [("a", 0, 3), ("a", 3, 4)]
    assert other.results == {"a": squares(4)}
    assert not (tmp_path / "r.json.pieces").exists()
    with pytest.raises(KeyboardInterrupt):
        Run(output, {"a": 4}, stop_at=("a", 2)).go()
    (piece,) = (tmp_path / "r.json.pieces").iterdir()
    piece.write_text("{")
    with pytest.raises(ValueError, match=r"a-7-0-2\.json is damaged"):
        Run(output, {"a": 4}).go()


def test_processes_need_one_folder(tmp_path):
    with pytest.raises(ValueError, match="all processes have to write into one folder"):
        Run(tmp_path / "r.json", {"a": 4}).go(Processes(0, 2))


def test_processes_take_pieces_by_turns(tmp_path):
    """One after the other, so that what each does can be told apart."""
    output = tmp_path / "r.json"
    totals = {"a": 5, "b": 4, "c": 3}
    second = Run(output, totals, alone=("b",))
    waits = iter([lambda: second.go(Processes(1, 2)), lambda: None])
    first = Run(output, totals, alone=("b",)).go(Processes(0, 2, wait=lambda: next(waits)()))
    assert second.measured == [("a", 2, 4), ("c", 0, 2)]
    assert first.measured == [("a", 0, 2), ("a", 4, 5), ("c", 2, 3), ("b", 0, 2), ("b", 2, 4)]
    assert (second.results, second.saves) == ({}, []), "the first process alone writes"
    assert first.results == {"a": squares(5), "c": squares(3), "b": squares(4)}


def commands(books, memmamba, plain, remamba, folder):
    """Arguments of each task's `main`."""
    common = ["--books", str(books), "--device", "cpu"]
    both = ["--model", str(memmamba), "--plain-model", str(plain), *common]
    texts = [
        "--lengths",
        "192",
        "--samples",
        "5",
        "--digits",
        "3",
        "--document-counts",
        "2",
        "--document-length",
        "60",
    ]
    windows = ["--perplexity-lengths", "64", "--reference-length", "64", "--windows", "3", "--counted", "10"]
    few = ["--parts", "passkey", "documents", "perplexity", "--batch-tokens", "400"]
    own = ["--model", str(remamba), "--plain-model", str(plain), "--lengths", "200", "--samples", "5"]
    return {
        "memory": [*both, *texts, *windows, *few, "--output", str(folder / "memory.json")],
        "recall": [*own, *common, "--batch-tokens", "400", "--output", str(folder / "recall.json")],
        "fidelity": [*both, "--lengths", "40", "64", "--passages", "2", "--output", str(folder / "fidelity.json")],
    }


SCRIPT = """
import dataclasses, importlib, json, sys
from pathlib import Path
from remamba_hf.evaluation import shared_cells

processes = shared_cells.launched_processes("cpu")
shared_cells.launched_processes = lambda device: dataclasses.replace(processes, end=lambda: None)
write, taken = shared_cells._Pieces.write, []

def watched(self, cell, numbers, values):
    taken.append(f"{self.folder.name}-{shared_cells._name(cell)}-{numbers.start}")
    write(self, cell, numbers, values)

shared_cells._Pieces.write = watched
folder = Path(sys.argv[1])
for name, arguments in json.loads((folder / "commands.json").read_text()).items():
    importlib.import_module(f"remamba_hf.evaluation.{name}").main(arguments)
(folder / f"taken-{processes.rank}.json").write_text(json.dumps(taken))
processes.end()
"""


def without_times(folder):
    """The results of all tasks."""
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("memory", "recall", "fidelity")}
    for one in results.values():
        del one["date"]
    return results


def test_two_launched_processes_give_the_results_of_one(
    books, memmamba_folder, plain_folder, remamba_folder, tmp_path, monkeypatch, capfd
):
    pytest.importorskip("accelerate")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    folders = (books, memmamba_folder, plain_folder, remamba_folder)
    for name, arguments in commands(*folders, tmp_path / "one").items():
        {"memory": memory, "recall": recall, "fidelity": fidelity}[name].main(arguments)
    wanted = capfd.readouterr().out
    arguments = commands(*folders, tmp_path / "two")
    with monkeypatch.context() as patch:  # one process begins, two go on
        asked = iter(range(4))  # the first model has three batches
        records = memory.recall_records
        patch.setattr(memory, "recall_records", lambda *given: (next(asked), records(*given))[1])
        with pytest.raises(StopIteration):
            memory.main(arguments["memory"])
    assert list((tmp_path / "two" / "memory.json.pieces").iterdir())
    (tmp_path / "two" / "commands.json").write_text(json.dumps(arguments))
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert without_times(tmp_path / "two") == without_times(tmp_path / "one")
    assert not list((tmp_path / "two").glob("*.pieces"))
    first, second = (json.loads((tmp_path / "two" / f"taken-{rank}.json").read_text()) for rank in (0, 1))
    assert len(set(first) | set(second)) == len(first) + len(second)
    for name in ("memory", "recall", "fidelity"):
        assert any(piece.startswith(name) for piece in second)
    assert done.stdout == wanted, "the first process alone prints"


MODULES = pytest.mark.parametrize(("module", "parts"), [(memory, ["passkey"]), (recall, None), (fidelity, None)])


@MODULES
def test_tokenizers_with_tokens_that_the_model_has_not_are_refused(module, parts, books, memmamba_folder, tmp_path):
    train_book_tokenizer([f"{path.read_text()} some more words" for path in books.iterdir()], 310).save_pretrained(tmp_path)
    common = ["--model", str(memmamba_folder), "--tokenizer", str(tmp_path), "--books", str(books), "--device", "cpu"]
    with pytest.raises(ValueError, match="vocabulary of 300"):
        module.main([*common, "--output", str(tmp_path / "r.json")], *([] if parts is None else [None, parts]))
    assert not (tmp_path / "r.json").exists()


@MODULES
def test_outputs_that_cannot_be_written_are_told_before_any_work(module, parts, books, tmp_path):
    (tmp_path / "file").write_text("")
    common = ["--model", str(tmp_path / "nowhere"), "--books", str(books), "--device", "cpu"]
    more = [] if parts is None else [None, parts]
    with pytest.raises(ValueError, match=r"r\.json cannot be written \(.*file is no folder\)"):
        module.main([*common, "--output", str(tmp_path / "file" / "r.json")], *more)
    with pytest.raises(ValueError, match=r"plot\.png cannot be written"):
        module.main([*common, "--output", str(tmp_path / "r.json"), "--plots", str(tmp_path / "file")], *more)
    with pytest.raises(ValueError, match="cannot be written"):
        module.main([*common, "--output", str(tmp_path)], *more)

# SPDX-License-Identifier: Apache-2.0
"""Cells of results, measured piece by piece, by one process or by several.

A piece is what a model reads at once, such as a batch of texts. What was measured of it goes into a file of its own, in the
folder `RESULTS.json.pieces`: a run that was cut off goes on behind its last piece, with any number of processes. Several
take pieces by turns. As soon as all pieces of a cell are there, the first process enters it into the results, in the order
of one process and with its numbers.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from remamba_hf.reading import check_picture, checked_device
from remamba_hf.training.book_tokens import write_json

from .generation_eval import Processes, launched_processes
from .reporting import check_writable


@dataclass(frozen=True)
class Cell:
    """One entry of the results.

    Attributes:
        key: names it among all cells of the results; letters, digits and underscores.
        total: what it is made of, such as texts; numbered from 0.
        at_once: how many of these are a piece.
        measure: JSON values of the numbers of a piece.
        enter: takes the values of all pieces, one after another, and puts the entry into the results.
        about: what the values depend on, beside key and numbers.
        alone: measured by the first process when the others have come to their end, as times are.
    """

    key: tuple[str | int, ...]
    total: int
    at_once: int
    measure: Callable[[range], list[Any]]
    enter: Callable[[list[Any]], None]
    about: Mapping[str, Any]
    alone: bool = False

    def pieces(self) -> list[range]:
        """The numbers of each."""
        return [range(first, min(first + self.at_once, self.total)) for first in range(0, self.total, self.at_once)]


def measure_cells(cells: Sequence[Cell], output: Path, save: Callable[[], None], processes: Processes | None = None) -> None:
    """Measures what is missing of cells, and enters them in their order, those that are measured alone last.

    Args:
        output: the results' file, which all processes have read.
        save: writes it; the first process calls it after every entry.

    Raises:
        ValueError: pieces on disk that are damaged or of other settings, or that other processes wrote elsewhere.
    """
    processes = processes or Processes()
    is_first = processes.rank == 0
    folder = _Pieces(output)
    cells = sorted(cells, key=lambda cell: cell.alone)
    left = [(cell, numbers) for cell in cells for numbers in cell.pieces() if not folder.has(cell, numbers)]
    # Nobody writes before all have seen what is left: they take it by turns.
    processes.wait()
    shared = [piece for piece in left if not piece[0].alone][processes.rank :: processes.count]
    waiting = list(cells) if is_first else []
    own = [piece for piece in left if piece[0].alone] if is_first else []
    with tqdm(total=len(shared) + len(own), desc="batches", disable=not is_first) as progress:

        def work(pieces: Sequence[tuple[Cell, range]]) -> None:
            folder.enter_whole(waiting, save)
            for cell, numbers in pieces:
                progress.set_postfix_str(" ".join(map(str, cell.key)))
                folder.write(cell, numbers, cell.measure(numbers))
                progress.update()
                folder.enter_whole(waiting, save)

        work(shared)
        processes.wait()
        work(own)
    if waiting:
        raise ValueError(f"{folder.folder} lacks pieces of other processes: all processes have to write into one folder")


class _Pieces:
    """The folder beside an output."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.pieces")

    def has(self, cell: Cell, numbers: range) -> bool:
        """Whether a piece is there; raises a ValueError if it is of other settings."""
        path = self._path(cell, numbers)
        if not path.exists():
            return False
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and it is measured again") from error
        if not isinstance(found, dict) or found.get("about") != _digest(cell.about):
            raise ValueError(f"{self.folder} has pieces of other settings or models: name another --output, or remove it")
        return True

    def write(self, cell: Cell, numbers: range, values: list[Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_json(self._path(cell, numbers), {"about": _digest(cell.about), "values": values})

    def enter_whole(self, waiting: list[Cell], save: Callable[[], None]) -> None:
        """Enters the first of the cells that wait as long as these are whole, and removes their pieces."""
        while waiting and all(self._path(waiting[0], numbers).exists() for numbers in waiting[0].pieces()):
            cell = waiting.pop(0)
            paths = [self._path(cell, numbers) for numbers in cell.pieces()]
            cell.enter([value for path in paths for value in json.loads(path.read_text())["values"]])
            save()
            for path in self.folder.glob(f"{_name(cell)}-*.json"):  # with those of pieces of another size
                path.unlink()
        if not waiting and self.folder.exists():
            with contextlib.suppress(OSError):  # it has pieces of cells that were not asked for
                self.folder.rmdir()

    def _path(self, cell: Cell, numbers: range) -> Path:
        return self.folder / f"{_name(cell)}-{numbers.start}-{numbers.stop}.json"


def _name(cell: Cell) -> str:
    return "-".join(map(str, cell.key))


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def launched(options: argparse.Namespace) -> Iterator[tuple[Processes, str]]:
    """The processes that share out the work, and the device of this one; only the first shows progress in here.

    Args:
        options: with those of `add_model_options`.

    Raises:
        ValueError: accelerate is not installed.
    """
    processes = launched_processes(options.device)
    device = checked_device(processes.device)
    if processes.rank == 0:
        yield processes, device
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield processes, device
    processes.end()


def check_outputs(output: Path, plots: Path | None = None) -> None:
    """Makes the folders of results and pictures; raises a ValueError, before any work, if these cannot be written."""
    check_writable(output)
    if plots is not None:
        picture = plots / "plot.png"
        check_writable(picture)
        check_picture(picture)

# SPDX-License-Identifier: Apache-2.0
"""A run's folders as numbered parts small enough to be carried between machines, and back into folders, bit for bit."""

import hashlib
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from remamba_hf.training.book_tokens import write_json

from .training import COMPLETE

MEBIBYTE = 1 << 20
MANIFEST = "parts.json"


class _Parts:
    """A file that is written as parts of at most `size` bytes each."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.names: list[str] = []
        self._file: BinaryIO | None = None
        self._room = 0

    def write(self, content: bytes) -> int:
        rest = memoryview(content)
        while len(rest):
            if not self._room:
                self.close()
                self.names.append(f"part-{len(self.names):02d}")
                self._file, self._room = (self.folder / self.names[-1]).open("wb"), self.size
            assert self._file is not None
            written = self._file.write(rest[: self._room])
            self._room -= written
            rest = rest[written:]
        return len(content)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def export(run: Path, folders: Sequence[str], target: Path, size: float = 15) -> list[Path]:
    """Packs folders of a run.

    Args:
        folders: names in it, such as `data`, `trunk`, `arms/remamba-0`, `results`.
        target: receives `part-00`, `part-01` and so on, and `parts.json`; nothing else may be there.
        size: of a part, MiB, at most.

    Returns:
        The parts.

    Raises:
        FileNotFoundError: the run has no such folder.
        FileExistsError: `target` is not empty.
    """
    missing = [name for name in folders if not (run / name).exists()]
    if missing:
        raise FileNotFoundError(f"{run} has no {missing[0]}: name what is there")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: give another folder")
    target.mkdir(parents=True, exist_ok=True)
    parts = _Parts(target, int(size * MEBIBYTE))
    stream: Any = parts
    with lzma.LZMAFile(stream, "wb", preset=1) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for file in [file for name in folders for file in _files(run / name)]:
            archive.add(file, str(file.relative_to(run)))
    parts.close()
    files = [target / name for name in parts.names]
    write_json(target / MANIFEST, {"folders": list(folders), "parts": {file.name: _digest(file) for file in files}})
    return files


def import_parts(run: Path, sources: Sequence[Path]) -> list[str]:
    """Unpacks what `export` wrote into a run; files that are there are replaced.

    Args:
        sources: folders with the parts and one `parts.json`: they may have come in several loads.

    Returns:
        The names of the folders.

    Raises:
        FileNotFoundError: a part, or the list of parts, is missing.
        ValueError: a part is damaged.
    """
    manifest = next((source / MANIFEST for source in sources if (source / MANIFEST).is_file()), None)
    if manifest is None:
        raise FileNotFoundError(f"none of {', '.join(map(str, sources))} has {MANIFEST}: it comes with the parts")
    content = json.loads(manifest.read_text())
    files = []
    for name, digest in content["parts"].items():
        file = next((source / name for source in sources if (source / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{name} is missing: it is one of {len(content['parts'])} parts")
        if _digest(file) != digest:
            raise ValueError(f"{file} is damaged: get it again")
        files.append(file)
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=run) as whole:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, whole)
        whole.seek(0)
        with lzma.LZMAFile(whole) as tar, tarfile.open(fileobj=tar, mode="r|") as archive:
            archive.extractall(run, filter="data")
    return list(content["folders"])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # A checkpoint's marker comes last.
    return sorted(filter(Path.is_file, path.rglob("*")), key=lambda file: (file.name == COMPLETE, str(file)))


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.sha256(content.read()).hexdigest()

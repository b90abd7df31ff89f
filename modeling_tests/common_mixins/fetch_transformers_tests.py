# SPDX-License-Identifier: Apache-2.0
"""Unpack the `tests` folder of transformers' source distribution, of the version that is installed.

    python fetch_transformers_tests.py CACHE_FOLDER

leaves `CACHE_FOLDER/transformers-<version>/tests`; nothing is fetched when it is there already.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


def tests_folder(cache: Path) -> Path:
    """Where the tests of the installed transformers lie in `cache`, whether or not they do yet."""
    return cache / f"transformers-{version('transformers')}" / "tests"


def fetch(cache: Path) -> Path:
    """Download the source distribution with pip and unpack its tests. Returns the folder with them."""
    target = tests_folder(cache)
    if (target / "test_modeling_common.py").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        requirement = f"transformers=={version('transformers')}"
        subprocess.run([*download, "--no-deps", "--no-binary=:all:", "--dest", scratch, requirement], check=True)
        archives = list(Path(scratch).glob("transformers-*.tar.gz"))
        if len(archives) != 1:
            raise SystemExit(f"pip left {len(archives)} source archives of {requirement}, expected one")
        unpacked = Path(scratch) / "unpacked"
        _unpack_tests(archives[0], unpacked)
        if not (unpacked / "tests" / "test_modeling_common.py").is_file():
            raise SystemExit(f"the source distribution of {requirement} holds no tests/test_modeling_common.py")
        os.replace(unpacked, target.parent)
    return target


def _unpack_tests(archive: Path, target: Path) -> None:
    """Write the Python files of `tests/`, nothing else: no links, no names that lead out of `target`."""
    with tarfile.open(archive) as contents:
        for member in contents:
            parts = PurePosixPath(member.name).parts[1:]
            if not member.isfile() or parts[:1] != ("tests",) or ".." in parts or not member.name.endswith(".py"):
                continue
            source = contents.extractfile(member)
            if source is not None:
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(fetch(Path(sys.argv[1])))

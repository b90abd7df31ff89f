# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint_files import CheckpointError


@contextlib.contextmanager
def output_folder(output: Path, overwrite: bool = False, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields a temporary folder beside `output`, which takes its name when the block ends without an error.

    Args:
        output: the folder to write.
        overwrite: replace a folder that is there, if it is empty or a checkpoint.
        sources: folders that are read; `output` must not hold any of them.

    Raises:
        CheckpointError: before anything is done, if `output` cannot be written.
    """
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite, sources)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {output.parent}: {error.strerror}. Give another output folder.") from error
    try:
        yield partial
        _open_to_others(partial)
        _move_into_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Usual permissions: temporary folders and safetensors are made for their user alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def require_space(folder: Path, needed: int) -> None:
    """Raise a CheckpointError unless the folder's disk has room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB. Make room, or "
            "give another output folder."
        )


def _check_output(output: Path, overwrite: bool, sources: tuple[Path, ...]) -> None:
    if not output.parent.is_dir():
        raise CheckpointError(f"There is no folder {output.parent} to write {output.name} into. Make it first.")
    if not output.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{output} exists. Give another output folder, or --overwrite to replace it.")
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(output)):
            raise CheckpointError(f"{output} holds the source {source}. Give another output folder.")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise CheckpointError(f"{output} is not a checkpoint's folder, so it is not replaced. Give another output folder.")


def _move_into_place(partial: Path, output: Path) -> None:
    """Renames, after moving away what is replaced; that comes back if the renaming fails."""
    if not output.exists():
        os.replace(partial, output)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".replaced", dir=output.parent))
    try:
        os.replace(output, replaced / output.name)
        try:
            os.replace(partial, output)
        except OSError:
            os.replace(replaced / output.name, output)
            raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)

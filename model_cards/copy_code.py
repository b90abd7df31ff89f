# SPDX-License-Identifier: Apache-2.0
"""Copies today's code into the checkpoints of this folder, as `save_pretrained` would: `make cards`."""

import json
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import remamba_hf

SOURCES = Path(remamba_hf.__file__).parent / "modeling"


def travelling_files(auto_map: dict[str, str]) -> set[str]:
    """Names of the files that a checkpoint with this `auto_map` needs."""
    roots = {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    imported = {Path(path).name for root in roots for path in get_relative_import_files(SOURCES / root)}
    return roots | imported


def main() -> None:
    for config in sorted(Path(__file__).parent.glob("*/config.json")):
        names = travelling_files(json.loads(config.read_text())["auto_map"])
        for stale in config.parent.glob("*.py"):
            if stale.name not in names:
                stale.unlink()
        for name in names:
            (config.parent / name).write_text((SOURCES / name).read_text())


if __name__ == "__main__":
    main()

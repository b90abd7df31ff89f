# SPDX-License-Identifier: Apache-2.0
"""Import transformers' model test mixins from an unpacked `tests` folder, which no wheel contains.

The folder is `REMAMBA_TRANSFORMERS_TESTS` where that is set (the `tests` of a source distribution or of a checkout),
otherwise the one that `make test` leaves under `.cache/transformers-tests`. A source distribution lacks some of the
modules that `test_modeling_common` imports (those of `generation/` and `exporters/`): empty mixins stand in for them.
With a checkout the real `GenerationTesterMixin` runs as well.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from modeling_tests.common_mixins.fetch_transformers_tests import tests_folder

PACKAGE = "transformers_own_tests"
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
# module -> the one name that test_modeling_common takes from it
LEFT_OUT_OF_SOURCE_DISTRIBUTIONS = {
    "generation.test_utils": "GenerationTesterMixin",
    "exporters.test_export": "ExportTesterMixin",
}


@dataclass(frozen=True)
class Mixins:
    """What the tests inherit, and whether generation's is the real one."""

    model: type
    generation: type
    has_generation: bool


def load() -> Mixins:
    """The mixin classes; skips the calling test module where there is no folder with them."""
    folder = Path(os.environ.get("REMAMBA_TRANSFORMERS_TESTS") or tests_folder(DEFAULT_CACHE)).resolve()
    if not (folder / "test_modeling_common.py").is_file():
        pytest.skip(
            f"no transformers tests at {folder}: run `make test` once, or set REMAMBA_TRANSFORMERS_TESTS to the tests "
            "folder of transformers' source distribution",
            allow_module_level=True,
        )
    pytest.importorskip("parameterized", reason="transformers' own tests need the package parameterized")
    if PACKAGE not in sys.modules:
        _add_package(PACKAGE, folder)
        for module, name in LEFT_OUT_OF_SOURCE_DISTRIBUTIONS.items():
            if not (folder / (module.replace(".", "/") + ".py")).is_file():
                _add_stand_in(f"{PACKAGE}.{module}", name, folder)
    common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    has_generation = (folder / "generation" / "test_utils.py").is_file()
    return Mixins(common.ModelTesterMixin, common.GenerationTesterMixin, has_generation)


def _add_package(name: str, folder: Path) -> None:
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _add_stand_in(module_name: str, class_name: str, folder: Path) -> None:
    parent = module_name.rpartition(".")[0]
    if parent not in sys.modules:
        _add_package(parent, folder / parent.rpartition(".")[2])
    module = ModuleType(module_name)
    setattr(module, class_name, type(class_name, (), {}))
    sys.modules[module_name] = module

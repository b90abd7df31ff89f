# SPDX-License-Identifier: Apache-2.0
"""Tests that ask for `family` run once for each of the two-stage families.

Where a test has many combinations of parameters, `@pytest.mark.thinned(n)` runs all of them for the first family and every
n-th for the others. An n without a common divisor with the parameters' counts meets every value of each.
"""

from collections import Counter

import pytest

from remamba_hf.families import FAMILIES

FIRST, *_ = FAMILIES


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The model type: "remamba", then "remamba2"."""
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thinned(n): of all families but the first, only every n-th combination is run")


@pytest.hookimpl(tryfirst=True)  # before anything else is deselected: what is run does not depend on what is asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found: Counter[tuple[str, str]] = Counter()
    dropped = []
    for item in items:
        marker = item.get_closest_marker("thinned")
        if marker is not None and isinstance(item, pytest.Function) and item.callspec.params["family"] != FIRST:
            key = (item.callspec.params["family"], f"{item.path}::{item.originalname}")
            if found[key] % marker.args[0]:
                dropped.append(item)
            found[key] += 1
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)

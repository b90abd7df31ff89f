# SPDX-License-Identifier: Apache-2.0
"""What every test stands on: no network, a cache of its own, one torch thread, a fixed seed, markers that act."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

# Read by huggingface_hub and transformers when they are imported, hence before anything else. The cache is one folder
# per process: remote code is copied into it, and two pytest workers must not write the same files.
_HUB_CACHE = tempfile.TemporaryDirectory(prefix="remamba-tests-")
os.environ.update(
    HF_HOME=_HUB_CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

# pytest-xdist runs one process per core; results then do not depend on how many cores a machine has either.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", help="write every error that the GPU tests measure to this JSON file")
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


class GpuReport:
    """Writes what the GPU tests measure, after every test, so that a run that is cut off leaves what it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name != "measured":
                continue
            measured = json.loads(value)
            errors = self.report.get("rms_ratios", {})
            for what, error in measured["rms_ratios"].items():
                errors[what] = max(error, errors.get(what, 0.0))
            self.report = {**measured, "rms_ratios": dict(sorted(errors.items()))}
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.report, indent=2) + "\n")
            temporary.replace(self.path)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path and not hasattr(config, "workerinput"):  # processes of xdist report to the one that started them
        config.pluginmanager.register(GpuReport(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    too_slow = pytest.mark.skip(reason="slow: run with --run-slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(too_slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, whichever tests ran before it in the process."""
    torch.manual_seed(0)

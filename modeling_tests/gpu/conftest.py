# SPDX-License-Identifier: Apache-2.0
"""What the tests of this folder measure reaches the report, whichever file and process they run in."""

import json
import platform
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch

from modeling_tests.gpu.measured_errors import errors


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hands what a test measured to the process that writes the report (see the folder above), also from one of xdist."""
    errors.clear()
    yield
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    versions |= {package: metadata.version(package) for package in ("transformers", "mamba-ssm", "causal-conv1d", "triton")}
    measured = {"device": torch.cuda.get_device_name(), "versions": versions, "rms_ratios": dict(errors)}
    request.node.user_properties.append(("measured", json.dumps(measured)))

# SPDX-License-Identifier: Apache-2.0
"""The markers that transformers' own tests carry, so that strict markers accept them."""

import pytest

TRANSFORMERS_MARKERS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{name}: set by transformers' own tests")

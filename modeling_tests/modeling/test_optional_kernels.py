# SPDX-License-Identifier: Apache-2.0
"""Which kernels are used: none on the CPU, none that does not really import, and the reason is told."""

import sys
import types

import pytest
import torch

from modeling_tests.modeling.tiny_models import tiny_model
from remamba_hf.families import FAMILIES
from remamba_hf.modeling import optional_kernels
from remamba_hf.modeling.optional_kernels import KERNELS, load_kernel, usable_kernel, without_kernels


@pytest.fixture(autouse=True)
def _forget_what_was_loaded():
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


def install(monkeypatch):
    """Fake kernel packages in which everything imports and every function raises when it is called."""

    def refuse(*args, **kwargs):
        raise AssertionError("a compiled kernel was called with CPU tensors")

    for kernel in KERNELS.values():
        for name in (kernel.extension, kernel.module):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                if path not in sys.modules or not getattr(sys.modules[path], "is_fake", False):
                    fake = types.ModuleType(path)
                    fake.is_fake, fake.__path__ = True, []
                    monkeypatch.setitem(sys.modules, path, fake)
        setattr(sys.modules[kernel.module], kernel.attribute, refuse)


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cpu_forward_touches_no_kernel(monkeypatch, family):
    install(monkeypatch)
    assert all(load_kernel(name)[0] is not None for name in KERNELS)
    model = tiny_model(torch.float32, family=family)
    ids = torch.randint(2, 50, (2, 20))
    model(ids, labels=torch.where(torch.arange(20) < 15, -100, ids)).loss.backward()
    assert model.generate(ids, max_new_tokens=3).shape == (2, 23)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_missing_package_is_told(monkeypatch, name):
    monkeypatch.setitem(sys.modules, KERNELS[name].extension.split(".")[0], None)
    function, reason = load_kernel(name)
    assert function is None
    assert "Error" in reason
    assert KERNELS[name].extension in reason


@pytest.mark.parametrize("error", [OSError, RuntimeError, ImportError, AttributeError, SyntaxError])
@pytest.mark.parametrize("name", ["selective_scan", "state_space_dual", "causal_convolution"])
def test_a_broken_package_is_told(monkeypatch, tmp_path, name, error):
    extension = KERNELS[name].extension
    (tmp_path / f"{extension}.py").write_text(f"raise {error.__name__}('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, extension, raising=False)
    function, reason = load_kernel(name)
    assert function is None
    assert reason.startswith(f"{error.__name__}: ")
    assert "undefined symbol" in reason


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_package_without_the_function_is_told(monkeypatch, name):
    install(monkeypatch)
    kernel = KERNELS[name]
    monkeypatch.delattr(sys.modules[kernel.module], kernel.attribute)
    function, reason = load_kernel(name)
    assert function is None
    assert kernel.attribute in reason


@pytest.mark.parametrize("name", sorted({name for family in FAMILIES.values() for name in family.kernels}))
def test_a_family_names_kernels_that_exist(name):
    assert name in KERNELS


def test_the_cpu_never_asks(monkeypatch):
    monkeypatch.setattr(optional_kernels, "load_kernel", lambda name: pytest.fail("a CPU tensor made a kernel load"))
    assert usable_kernel("selective_scan", torch.zeros(1), None) is None
    assert usable_kernel("selective_scan") is None


def test_kernels_can_be_switched_off(monkeypatch):
    def kernel():
        raise AssertionError

    monkeypatch.setattr(optional_kernels, "load_kernel", lambda name: (kernel, ""))

    class Tensor:
        device = torch.device("cuda:0")

    class Other:
        device = torch.device("cuda:1")

    assert usable_kernel("selective_scan", Tensor, None) is kernel
    assert usable_kernel("selective_scan", Tensor, Other) is None
    with without_kernels():
        assert usable_kernel("selective_scan", Tensor) is None
    assert usable_kernel("selective_scan", Tensor) is kernel

    @without_kernels()
    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert usable_kernel("selective_scan", Tensor) is kernel, "an error inside must not leave them off"

# SPDX-License-Identifier: Apache-2.0
"""Of FSDP2 with one process; test_finetune_parallel.py has several, and ZeRO-3."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from remamba_hf.training.sharded_weights import trained_weights, whole_weights


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def two_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def test_weights_that_are_whole_stay_as_they_are():
    model = two_layers()
    with whole_weights(model):
        assert model[0].weight.shape == (4, 4)
    weights = trained_weights(model)
    assert list(weights) == ["0.weight", "1.weight", "1.bias"]
    before = model[1].weight.detach().clone()
    model[1].weight.data += 1
    assert torch.equal(weights["1.weight"], before)  # a copy


def test_shards_are_whole_inside_and_shared_out_behind(one_process):
    model = two_layers()
    inputs = torch.randn(3, 4)
    expected, weights = model(inputs), {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for module in (model[0], model):
        fully_shard(module, mesh=one_process)
    assert isinstance(model[0].weight, DTensor)
    model(inputs)  # FSDP wants the whole model's forward to come first

    def use_parts():
        with torch.no_grad(), whole_weights(model):
            for _ in range(2):
                assert torch.equal(model[1](model[0](inputs)), expected)
                assert not isinstance(model[0].weight, DTensor)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_parts()
    assert isinstance(model[0].weight, DTensor)
    assert isinstance(model[1].weight, DTensor)
    whole = trained_weights(model)
    assert list(whole) == ["0.weight", "1.weight", "1.bias"]
    for name, weight in whole.items():
        assert not isinstance(weight, DTensor)
        assert torch.equal(weight, weights[name])
    model(inputs).sum().backward()  # trains on
    assert model[0].weight.grad is not None


def test_what_cannot_be_made_whole_is_told(monkeypatch):
    deepspeed = SimpleNamespace(__version__="0.10", zero=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    engine = nn.Linear(2, 2)
    engine.zero_optimization_partition_weights = lambda: True
    with (
        pytest.raises(RuntimeError, match=r"DeepSpeed 0\.10 cannot make the weights of ZeRO-3 whole.*update it"),
        whole_weights(engine),
    ):
        pass
    first_version = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    with pytest.raises(RuntimeError, match="set fsdp_version: 2"), whole_weights(first_version):
        pass

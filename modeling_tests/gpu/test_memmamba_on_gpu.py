# SPDX-License-Identifier: Apache-2.0
"""MemMamba on a CUDA device against itself on the CPU. Choosing notes is discontinuous: in float32 the same notes must be
chosen; in bfloat16 errors are measured with pools that hold every note, and beside them how many notes small pools share."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from modeling_tests.gpu.measured_errors import errors, note, rms_ratio
from remamba_hf import MemMambaConfig, MemMambaForCausalLM
from remamba_hf.modeling.note_pool import best_before_each_chunk, best_before_each_chunk_naive, read_pool
from remamba_hf.modeling.optional_kernels import without_kernels

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "eos_token_id": None,
    "pool_size": 20,
    "chunk_size": 16,
    "cross_layer_period": 2,
    "cross_layer_group": 2,
}
EVERY_NOTE = {"pool_size": 300}


def two_models(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """The same small model, whose readers read something, on the CPU in float32 and on the GPU in `dtype`."""
    torch.manual_seed(0)
    model = MemMambaForCausalLM(MemMambaConfig(**{**SMALL, **settings})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("reader.output.weight", "reader.query.weight", "reader.sink", "write_score.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    on_gpu = copy.deepcopy(model).cuda()
    for name, parameter in on_gpu.named_parameters():
        if not any(f".{kept}." in f".{name}." for kept in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(dtype)
    return model, on_gpu


def ragged_batch() -> dict[str, torch.Tensor]:
    """No token comes twice in a row: equal tokens have equal scores in layer 0 but for rounding, which then orders them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(1024, generator=generator)[:300] for _ in range(3)])
    mask = torch.ones_like(ids)
    mask[0, :70], mask[1, 220:], mask[2, :31] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def on_the_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def states(cache: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Everything in a cache, by name. In the pools zeros for empty slots, which mean nothing, and for positions: of tokens
    that were generated twice, either may have been kept."""
    for number, layer in enumerate(cache.layers):
        pool = layer.recurrent_states[1].clone()
        pool[:, :-1][pool[:, :-1, -3] == 0] = 0
        pool[:, :-1, -2:] = 0
        yield f"convolution inputs of layer {number}", layer.conv_states[0]
        yield f"recurrent state of layer {number}", layer.recurrent_states[0]
        yield f"open chunk of layer {number}", layer.conv_states[1]
        yield f"pool of layer {number}", pool


def note_caches(name: str, actual: Any, expected: Any, allowed: float) -> None:
    for (part, value), (_, reference) in zip(states(actual), states(expected), strict=True):
        note(f"{name}, {part}", value, reference, allowed)


def share_of_other_notes(actual: Any, expected: Any) -> float:
    """How many of the notes that can be read are not those that could be expected, over all layers and rows."""
    shared = total = 0
    for mine, theirs in zip(actual.note_positions, expected.note_positions, strict=True):
        for one, other in zip(mine.tolist(), theirs.tolist(), strict=True):
            shared += len({*one} & {*other} - {-1})
            total += len({*other} - {-1})
    return 1 - shared / total


@pytest.mark.parametrize(("chunk", "size"), [(64, 50), (16, 50), (1, 8), (64, 8)])
def test_the_same_notes_are_chosen_on_ties_too(chunk: int, size: int) -> None:
    for values in (3, 10**6):
        ranks = torch.randint(values, (3, 70, chunk)).double()
        ranks = ranks.masked_fill(torch.rand(ranks.shape) < 0.3, -torch.inf)
        pool = torch.randint(values, (3, size)).double().sort(dim=1, descending=True).values
        index, present = (tensor.cpu() for tensor in best_before_each_chunk(pool.cuda(), ranks.cuda()))
        expected, wanted = best_before_each_chunk_naive(pool, ranks)
        assert torch.equal(present, wanted)
        assert torch.equal(index[present], expected[present])


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_reading_against_float64(dtype: torch.dtype, allowed: float) -> None:
    queries, keys, values = (torch.randn(2, 5, n, 4, 16) for n in (64, 50, 50))
    scores = torch.rand(2, 5, 50) * (torch.arange(50) < torch.tensor([0, 1, 10, 49, 50])[:, None])
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in (queries, keys, values)]
    cast = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in exact]
    sink = torch.randn(4)
    for name, value, reference in zip(
        ("what was read", "weights"),
        read_pool(*cast, scores.cuda(), sink.cuda()),
        read_pool(*exact, scores.double(), sink.double()),
        strict=True,
    ):
        note(f"reading {str(dtype)[6:]}, {name}", value, reference, allowed)
        value.float().sum().backward(retain_graph=True)
        reference.sum().backward(retain_graph=True)
    for name, value, reference in zip(("queries", "keys", "values"), cast, exact, strict=True):
        note(f"reading {str(dtype)[6:]}, gradient of {name}", value.grad, reference.grad, 2 * allowed)


def test_logits_notes_and_gradients_equal_the_cpu_in_float32() -> None:
    cpu, gpu = two_models()
    batch = ragged_batch()
    real = batch["attention_mask"].bool()
    labels = torch.where(real & (real.cumsum(1) > 1), batch["input_ids"], -100)
    expected = cpu(**batch, labels=labels, use_cache=True, output_notes=True)
    found = gpu(**on_the_gpu(batch), labels=labels.cuda(), use_cache=True, output_notes=True)
    for one, other in zip(found.note_positions, expected.note_positions, strict=True):
        torch.testing.assert_close(one.cpu(), other)
    note("memmamba float32, logits", found.logits.cpu()[real], expected.logits[real], 1e-4)
    note_caches("memmamba float32", found.cache_params, expected.cache_params, 1e-4)
    expected.loss.backward()
    found.loss.backward()
    for (name, c), g in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        note(f"memmamba float32, gradient of {name}", g.grad, c.grad, 1e-3)


@torch.no_grad()
def test_pieces_and_steps_equal_the_whole_in_float32() -> None:
    _, gpu = two_models()
    batch = on_the_gpu(ragged_batch())
    real = batch["attention_mask"].bool()
    whole = gpu(**batch, use_cache=True, output_notes=True)
    chunked = gpu(**batch, use_cache=True, output_notes=True, prefill_chunk_length=37)
    for one, other in zip(chunked.note_positions, whole.note_positions, strict=True):
        assert torch.equal(one, other)
    note("memmamba float32 in chunks of 37, logits", chunked.logits[real], whole.logits[real], 1e-4)
    note_caches("memmamba float32 in chunks of 37", chunked.cache_params, whole.cache_params, 1e-4)
    ids = batch["input_ids"]
    expected = gpu(ids, use_cache=True)
    cache = gpu(ids[:, :260], use_cache=True).cache_params
    steps = torch.cat([gpu(ids[:, t : t + 1], cache_params=cache).logits for t in range(260, 300)], dim=1)
    note("memmamba float32 step by step, logits", steps, expected.logits[:, 260:], 1e-4)
    note_caches("memmamba float32 step by step", cache, expected.cache_params, 1e-4)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_torch_does() -> None:
    cpu, gpu = two_models(torch.bfloat16, **EVERY_NOTE)
    exact = copy.deepcopy(cpu)
    for parameter, rounded in zip(exact.parameters(), gpu.parameters(), strict=True):
        parameter.copy_(rounded.float())
    batch = ragged_batch()
    real = batch["attention_mask"].bool()
    expected = exact(**batch).logits[real]
    with without_kernels():
        by_torch = gpu(**on_the_gpu(batch)).logits.cpu()[real]
    errors["memmamba bfloat16 in plain torch, logits"] = rms_ratio(by_torch, expected)
    allowed = min(2 * rms_ratio(by_torch, expected), 0.1)
    note("memmamba bfloat16, logits", gpu(**on_the_gpu(batch)).logits.cpu()[real], expected, allowed)


@pytest.mark.parametrize("kind", ["weights", "autocast"])
@torch.no_grad()
def test_bfloat16_chooses_nearly_the_same_notes(kind: str) -> None:
    cpu, gpu = two_models(torch.bfloat16 if kind == "weights" else torch.float32)
    batch = ragged_batch()
    expected = cpu(**batch, output_notes=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
        found = gpu(**on_the_gpu(batch), output_notes=True)
    assert all(scores.dtype == torch.float32 for scores in found.note_scores)
    share = errors[f"memmamba bfloat16 {kind}, share of other notes"] = share_of_other_notes(found, expected)
    assert share < 0.2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_under_autocast(checkpointing: bool) -> None:
    cpu, gpu = two_models(**EVERY_NOTE)
    batch = ragged_batch()
    expected = cpu(**batch, labels=batch["input_ids"]).loss
    gpu.train()
    if checkpointing:
        gpu.gradient_checkpointing_enable()
    with torch.autocast("cuda", torch.bfloat16):
        loss = gpu(**on_the_gpu(batch), labels=batch["input_ids"].cuda()).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=3e-2)
    for name, parameter in gpu.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0 or name.endswith("reader.sink"), name


def test_generate_equals_the_cpu_and_chunks_change_nothing() -> None:
    cpu, gpu = two_models()
    batch = ragged_batch()
    mode = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    expected = cpu.generate(**batch, **mode)
    for name, extra in (("whole", {}), ("chunks of 37", {"prefill_chunk_length": 37})):
        found = gpu.generate(**on_the_gpu(batch), **mode, **extra)
        assert found.sequences.tolist() == expected.sequences.tolist(), name
        for step, (f, e) in enumerate(zip(found.logits, expected.logits, strict=True)):
            note(f"memmamba generate float32 {name}, logits of step {step}", f, e, 1e-3)
        note_caches(f"memmamba generate float32 {name}", found.past_key_values, expected.past_key_values, 1e-3)


@pytest.mark.parametrize(
    "extra",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_generate_in_bfloat16_runs_with_every_cache(extra: dict[str, Any]) -> None:
    _, gpu = two_models(torch.bfloat16)
    ids = ragged_batch()["input_ids"][:, :50].cuda()
    assert gpu.generate(ids, max_new_tokens=6, pad_token_id=0, **extra).shape[1] == 56


@torch.no_grad()
def test_memory_grows_neither_with_the_prompt_nor_with_steps() -> None:
    _, gpu = two_models(torch.bfloat16)

    def peak_of_reading(length: int) -> int:
        ids = torch.randint(1024, (1, length), device="cuda")
        cache = DynamicCache(config=gpu.config)
        torch.cuda.reset_peak_memory_stats()
        gpu(ids, cache_params=cache, use_cache=True, prefill_chunk_length=2048, logits_to_keep=1)
        return torch.cuda.max_memory_allocated() - ids.numel() * ids.element_size()

    peak_of_reading(4096)
    assert peak_of_reading(65_536) - peak_of_reading(8192) < 2**20 + 57_344 * 16
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    cache = gpu(token, use_cache=True).cache_params
    allocated = []
    for _ in range(100):
        gpu(token, cache_params=cache)
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[50:]) <= max(allocated[:50])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.no_grad()
def test_the_model_runs_on_a_device_that_is_not_current() -> None:
    ids = ragged_batch()["input_ids"]
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        _, gpu = two_models(dtype, **EVERY_NOTE)
        expected = gpu(ids.cuda()).logits
        with torch.cuda.device(0):
            found = gpu.to("cuda:1")(ids.to("cuda:1")).logits
        note(f"memmamba {str(dtype)[6:]} on cuda:1 as on cuda:0, logits", found, expected, allowed)

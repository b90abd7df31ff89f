# SPDX-License-Identifier: Apache-2.0
"""Prompts read through captured passes on a CUDA device against passes as Python runs them: the same logits and states."""

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note
from modeling_tests.gpu.test_decode_graph_on_gpu import small_model
from remamba_hf.modeling import prompt_graph
from remamba_hf.modeling.decode_graph import Survey, kept_for, release_graphs
from remamba_hf.modeling.optional_kernels import load_kernel
from remamba_hf.modeling.prompt_graph import CapturedChunk, PromptGraphs, prompts_through_graphs
from remamba_hf.modeling.recurrent_passes import PackedRows

pytestmark = pytest.mark.gpu

FAMILIES = ["remamba", "remamba2"]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PLAIN: dict[str, Any] = {"compress_prompt": False}
TWO_STAGES: dict[str, Any] = {"compression_span": 0.5, "compression_ratio": 0.1}
ALL_KEPT: dict[str, Any] = {"compression_span": 0.5, "compression_ratio": 1.0}  # what rounds cannot decide what is kept


@pytest.fixture(scope="module", autouse=True)
def _few_compilations() -> None:
    """As in test_on_gpu.py: mamba-ssm reads this when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBA_DETERMINISTIC", "1")
        load_kernel("state_space_dual")


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the graphs that have been replayed."""
    lengths: list[int] = []
    call = CapturedChunk.__call__

    def counted(chunk: CapturedChunk, *arguments: Any) -> torch.Tensor:
        lengths.append(chunk.hidden_states.shape[1])
        return call(chunk, *arguments)

    monkeypatch.setattr(CapturedChunk, "__call__", counted)
    return lengths


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def prompts(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 500, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


def answer(model: Any, given: dict[str, torch.Tensor], cuda_graph: bool | None = None, **settings: Any) -> Any:
    """One token: no step is captured then, unless `cuda_graph` insists."""
    call = dict(max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**call, **settings}, cuda_graph=cuda_graph)


def compare(name: str, actual: Any, expected: Any, limit: float) -> None:
    note(f"{name}, logits", actual.logits[0], expected.logits[0], limit)
    for one, other in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.has_previous_state == other.has_previous_state
        for states, wanted in ((one.conv_states, other.conv_states), (one.recurrent_states, other.recurrent_states)):
            assert states[0].dtype == wanted[0].dtype
            note(f"{name}, states", states[0], wanted[0], limit)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "chunk_length", "expected"),
    [
        ((1,), None, [128]),
        ((128,), None, [128]),
        ((129,), None, [256]),
        ((1030,), None, [2048]),
        ((2048,), None, [2048]),
        ((300, 257, 90), None, [512]),
        ((1024, 700, 3), None, [1024]),
        ((700,), 256, [256, 256, 256]),
        ((500, 430, 90), 200, [200, 200, 128]),
    ],
    ids=str,
)
def test_plain_prompts(family, dtype, lengths, chunk_length, expected, replayed):
    model, given = small_model(family, dtype, residual_in_fp32=True), prompts(*lengths)
    call = {**PLAIN, "prefill_chunk_length": chunk_length}
    eager = answer(model, given, cuda_graph=False, **call)
    answer(model, given, **call)
    assert not kept_for(model, PromptGraphs).graphs, "not for one prompt alone"
    captured, again = answer(model, given, **call), answer(model, given, **call)
    assert replayed == expected * 2
    name = f"prompt in graphs, {family} {str(dtype)[6:]}, {lengths} by {chunk_length}"
    compare(name, captured, eager, LIMITS[dtype])
    assert torch.equal(again.logits[0], captured.logits[0])
    other = prompts(*(max(length - 5, 1) for length in lengths), seed=1)
    found, eager = answer(model, other, **call), answer(model, other, cuda_graph=False, **call)
    compare(f"{name}, another prompt", found, eager, LIMITS[dtype])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "chunk_length"), [((256,), None), ((1300,), None), ((300, 512, 90), None), ((900, 700), 256)], ids=str
)
def test_two_stages(family, dtype, lengths, chunk_length, replayed):
    model, given = small_model(family, dtype, residual_in_fp32=True), prompts(*lengths)
    settings = {**(TWO_STAGES if dtype == torch.float32 else ALL_KEPT), "prefill_chunk_length": chunk_length}
    eager = answer(model, given, cuda_graph=False, **settings)
    answer(model, given, **settings)
    assert not replayed
    captured, again = answer(model, given, **settings), answer(model, given, **settings)
    assert len(replayed) >= 4
    assert {shape.slots > 0 for shape in kept_for(model, PromptGraphs).graphs} == {True, False}
    compare(f"two stages in graphs, {family} {str(dtype)[6:]}, {lengths} by {chunk_length}", captured, eager, LIMITS[dtype])
    assert torch.equal(again.logits[0], captured.logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_are_continued(family, replayed):
    """What is new goes through a graph, or not, wherever the rest went."""
    model, first, second = small_model(family), prompts(200, 170), prompts(90, 90, seed=1)["input_ids"]
    answer(model, first, **PLAIN)
    found = {}
    for ways in ((None, None), (None, False), (False, None), (False, False)):
        cache = answer(model, first, cuda_graph=ways[0], **PLAIN).past_key_values
        found[ways] = answer(model, {"input_ids": second}, cuda_graph=ways[1], cache_params=cache)
    assert replayed == [256, 256, 128]
    for ways, each in found.items():
        compare(f"continued in graphs, {family}, {ways}", each, found[False, False], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_change_are_seen(family, replayed):
    model, given = small_model(family), prompts(300, 310)
    for factor, in_place in ((1.1, True), (0.9, False)):
        for _ in range(3):
            answer(model, given, **PLAIN)
        for name, parameter in model.named_parameters():
            if "compressor" not in name:
                parameter.data = parameter.data.mul_(factor) if in_place else parameter.data * factor
        replayed.clear()
        actual = answer(model, given, **PLAIN)
        assert replayed == [512] * in_place
        compare(f"prompt in graphs, {family}, weights changed", actual, answer(model, given, False, **PLAIN), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_in_inference_mode_serve_outside_of_it(family, replayed):
    """Of prompts and of steps."""
    model, given = small_model(family), prompts(300)
    with torch.inference_mode():
        inside = model.generate(**given, max_new_tokens=20, do_sample=False, cuda_graph=True)
    outside = model.generate(**given, max_new_tokens=20, do_sample=False, cuda_graph=True)
    assert torch.equal(inside, outside)
    assert replayed[: len(replayed) // 2] == replayed[len(replayed) // 2 :]
    assert replayed


def test_without_graphs_nothing_is_captured(replayed):
    model, given = small_model("remamba"), prompts(300)
    for _ in range(3):
        answer(model, given, cuda_graph=False)
        with torch.no_grad():
            model(**given, compress_prompt=True)
    assert not kept_for(model, PromptGraphs).graphs
    assert not replayed


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_wait_for_the_device_once(family):
    """As without graphs: to learn whether the scores are finite, when everything has been launched."""
    model = small_model(family, torch.bfloat16)
    backbone, ids = model.backbone, prompts(400, 400)["input_ids"]

    def read() -> None:
        rows = PackedRows(ids, None, None, backbone.embeddings)
        windows = backbone.plan_windows(rows.lengths, [400, 350], 0.1, 0.5, 0.1)
        with prompts_through_graphs(model, Survey.of(model), insist=True):
            backbone.read_rows(rows, windows, [400, 350], None, columns_to_keep=1, chunk_length=256)

    with torch.no_grad():
        read()
        read()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                read()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def reserved() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_is_bounded_and_given_back(monkeypatch):
    """Graphs of one size share what they compute in; graphs beyond the limits are released."""
    monkeypatch.setattr(prompt_graph, "MOST_GRAPHS", 3)
    model = small_model("remamba")

    def read(*lengths: int) -> int:
        for _ in range(3):
            answer(model, prompts(*lengths), **PLAIN)
        return reserved()

    read(2048)  # cuBLAS keeps a workspace for each stream
    release_graphs(model)
    without = reserved()
    one = read(2048)
    for _ in range(4):
        for length in (2048, 1800, 1500, 1200):
            read(length)
    assert len(kept_for(model, PromptGraphs).graphs) == 1
    assert reserved() - without < 1.2 * (one - without) + (8 << 20)
    kept = [read(*[length] * rows) for rows in (1, 2, 4, 8) * 3 for length in (1000, 500, 120)]
    assert len(kept_for(model, PromptGraphs).graphs) == 3
    assert kept[-1] - kept[11] < (kept[11] - without) / 2
    release_graphs(model)
    assert reserved() - without < (kept[-1] - without) / 4


def test_graphs_go_with_their_model():
    for warm in (False, True):  # cuBLAS keeps a workspace for each stream
        before = reserved()
        model = small_model("remamba2")
        for _ in range(3):
            answer(model, prompts(2000), **TWO_STAGES)
        held = reserved() - before
        assert kept_for(model, PromptGraphs).graphs
        del model
        assert not warm or reserved() - before < held / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_without_enough_memory_does_no_harm(family, monkeypatch, replayed):
    model, given = small_model(family), prompts(300, 280)
    expected = answer(model, given, cuda_graph=False, **PLAIN)
    norm, forward = model.backbone.norm_f, type(model.backbone.norm_f).forward

    def too_large(module: Any, *arguments: Any) -> torch.Tensor:
        if module is norm and torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(module, *arguments)

    stream = torch.cuda.current_stream()
    with monkeypatch.context() as patch:
        patch.setattr(type(norm), "forward", too_large)
        answer(model, given, **PLAIN)
        with pytest.warns(UserWarning, match="could not be captured .*out of memory"):
            found = answer(model, given, **PLAIN)
        compare(f"prompt in graphs, {family}, out of memory", found, expected, 1e-6)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            answer(model, given, **PLAIN)
        assert not [warning for warning in told if "could not be captured" in str(warning.message)]
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert not replayed
    release_graphs(model)
    for _ in range(2):
        found = answer(model, given, **PLAIN)
    assert replayed == [512]
    compare(f"prompt in graphs, {family}, behind a failure", found, expected, 1e-5)

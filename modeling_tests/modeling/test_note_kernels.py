# SPDX-License-Identifier: Apache-2.0
"""The memory's kernels of a decoding step against their references in float64, and a whole step built from them against the
modules.

On a CPU the functions run their references; `test_in_tritons_interpreter` runs this file once more, in a process of its own
in which they run their kernels. The checks are functions of the device, for the GPU tests to use.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, INTERPRETED, Compare, Numbers, assert_near
from modeling_tests.modeling.tiny_models import assert_same_memory, random_rows, tiny_memmamba
from remamba_hf.modeling import note_kernels
from remamba_hf.modeling.decode_graph import EagerStep
from remamba_hf.modeling.decode_kernels import LinearPlan, kernels_can_run
from remamba_hf.modeling.modeling_memmamba import FusedNotesStep, NotesStep
from remamba_hf.modeling.note_kernels import (
    ReadableNotes,
    ReadingPlan,
    StepWeights,
    can_step,
    note_projections,
    note_projections_naive,
    note_reading,
    note_reading_naive,
    note_step,
    note_step_naive,
    readable_notes,
    readers_and_pools,
    reading_plan,
    renew_notes,
    renew_weights,
    step_plan,
    step_weights,
)
from remamba_hf.modeling.note_pool import OpenChunk

ROOT = Path(__file__).parents[2]
BELOW = 7  # notes of the layers below, where a layer reads them


def test_in_tritons_interpreter():
    """Its environment variable acts when triton is imported, on every kernel of the process."""
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--durations=5", __file__],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@contextlib.contextmanager
def kernels_run(device: torch.device, launches: int | None = None) -> Iterator[None]:
    """Fails unless kernels ran inside, where they can run (so many `launches`), and none otherwise."""
    launch, launched = note_kernels._launch, []

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **constants)

    note_kernels._launch = counted
    try:
        yield
    finally:
        note_kernels._launch = launch
    assert bool(launched) == kernels_can_run(device)
    assert launches is None or len(launched) in (0, launches)


class Sizes(NamedTuple):
    rows: int
    hidden: int
    note: int
    heads: int
    pool: int
    chunk: int


class Case:
    """Weights, notes and states of one layer: opened and read stand between rows that are none of a step's business, the
    first row's pools are empty, the others' filled in part, and rows are at different places of their chunks."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        sizes: Sizes,
        readers: int = 1,
        hidden_dtype: torch.dtype = torch.float32,
        write_threshold: float = 0.0,
        read_threshold: float = 0.0,
        score_dtype: torch.dtype = torch.float32,
        below: int = BELOW,
    ):
        rows, hidden, note, heads, pool, chunk = sizes
        numbers = Numbers(device, dtype)
        self.hidden = numbers.view(rows, hidden, dtype=hidden_dtype, scale=2.0)
        self.weights = StepWeights(
            norm=numbers.normal(hidden, scale=0.3, mean=1.0),
            eps=1e-3,
            projection=numbers.normal((1 + readers) * note + readers, hidden, scale=hidden**-0.5),
            gate_bias=numbers.normal(readers),
            score_weight=numbers.normal(hidden, scale=hidden**-0.5, dtype=score_dtype),
            score_bias=numbers.normal(1, dtype=score_dtype),
            outputs=tuple(numbers.normal(hidden, note, scale=3 * note**-0.5) for _ in range(readers)),
            sinks=tuple(numbers.normal(heads, dtype=torch.float32) for _ in range(readers)),
            write_threshold=write_threshold,
            read_threshold=read_threshold,
        )
        self.notes = []
        for count in (pool, below)[:readers]:
            scores = torch.sigmoid(numbers.normal(rows, count, dtype=torch.float32))
            filled = torch.tensor([[row * 3 % (count + 1)] for row in range(rows)], device=device)
            bias = scores.log().masked_fill(torch.arange(count, device=device) >= filled, -torch.inf)
            self.notes.append(ReadableNotes(numbers.normal(rows, count, note), numbers.normal(rows, count, note), bias))
        self.states = numbers.state(rows, note + 1, chunk, dtype=torch.float32)
        counts = torch.arange(rows + 2, device=device) * 5 + (1 << 33)
        self.read = counts[1:-1]

    def copy(self, dtype: torch.dtype | None = None) -> "Case":
        """With states of its own, all in another dtype if one is given."""
        case = object.__new__(Case)
        case.hidden, case.weights, case.notes = self.hidden, self.weights, self.notes
        case.states, case.read = self.states._base.clone()[1:-1], self.read._base.clone()[1:-1]
        if dtype is not None:
            case.hidden, case.states = case.hidden.to(dtype), case.states.to(dtype)
            case.weights = StepWeights(*(_converted(part, dtype) for part in case.weights))
            case.notes = [ReadableNotes(*(part.to(dtype) for part in notes)) for notes in case.notes]
        return case

    @property
    def opened(self) -> OpenChunk:
        return OpenChunk(self.states[:, 1:].transpose(1, 2), self.states[:, 0])

    def assert_written_only_at(self, before: "Case", places: torch.Tensor | None, counted: bool) -> None:
        """Bit for bit: what stands elsewhere is what it was, and the tokens of the rows are counted once."""
        states, earlier = self.states._base.clone(), before.states._base.clone()
        if places is not None:
            for row, place in enumerate(places.tolist()):
                states[row + 1, :, place] = earlier[row + 1, :, place] = 0
        assert torch.equal(states.view(torch.int32), earlier.view(torch.int32)), (
            "a state was touched that is none of its business"
        )
        expected = before.read._base.clone()
        expected[1:-1] += int(counted)
        assert torch.equal(self.read._base, expected), "tokens were not counted once"


def _converted(part: Any, dtype: torch.dtype) -> Any:
    if isinstance(part, tuple):
        return tuple(tensor.to(dtype) for tensor in part)
    return part.to(dtype) if isinstance(part, torch.Tensor) else part


def check_case(case: Case, dtype: torch.dtype, compare: Compare, plans: tuple[Any, Any, Any] = (None, None, None)) -> None:
    """All three functions on one case: results, what they write, and what they leave alone."""
    device, cap = case.hidden.device, CAPS[dtype]
    exact = case.copy(torch.float64)
    places = case.read % case.opened.scores.shape[1]
    at = torch.arange(len(places), device=device), slice(None), places
    projected = note_projections_naive(exact.hidden, exact.weights, exact.opened, exact.read)
    result = note_reading_naive(exact.hidden, projected, exact.weights, exact.notes, exact.read)

    mine = case.copy()
    with kernels_run(device, 1):
        mine_projected = note_projections(mine.hidden, mine.weights, mine.opened, mine.read, plan=plans[0])
    assert mine_projected.dtype == dtype
    compare("note_projections, queries and gates", mine_projected, projected, cap)
    check_written("note_projections", mine, case, exact, at, cap, compare)
    mine.assert_written_only_at(case, places, counted=False)

    mine = case.copy()
    frame = torch.full((len(places), case.hidden.shape[1] + 2), float("nan"), device=device, dtype=result_dtype(case))
    with kernels_run(device, 1):
        note_reading(
            mine.hidden, projected.to(dtype), mine.weights, mine.notes, mine.read, out=frame[:, 1:-1], plan=plans[1]
        )
    assert frame[:, 0].isnan().all()
    assert frame[:, -1].isnan().all()
    compare("note_reading, result", *added_to(case.hidden, frame[:, 1:-1], result), cap)
    mine.assert_written_only_at(case, None, counted=True)

    for plan in (plans[2] or step_plan(case.hidden.shape[1], 1, dtype.itemsize), None):
        mine = case.copy()
        one = plan is not None or len(places) <= note_kernels.FEW_ROWS
        with kernels_run(device, 1 if one else 2):
            actual = note_step(mine.hidden, mine.weights, mine.notes, mine.opened, mine.read, plan=plan)
        assert actual.dtype == result_dtype(case)
        compare("note_step, result", *added_to(case.hidden, actual, result), cap)
        check_written("note_step", mine, case, exact, at, cap, compare)
        mine.assert_written_only_at(case, places, counted=True)


def added_to(hidden: torch.Tensor, *results: torch.Tensor) -> list[torch.Tensor]:
    """What results add to the tokens, or themselves where the sum has been rounded to fewer digits than what is added."""
    return [result - hidden if hidden.dtype == torch.float32 else result for result in results]


def result_dtype(case: Case) -> torch.dtype:
    return torch.promote_types(case.hidden.dtype, case.weights.projection.dtype)


def check_written(name: str, mine: Case, case: Case, exact: Case, at: tuple, cap: float, compare: Compare) -> None:
    """The row of every place: its note, and its write score."""
    compare(f"{name}, note", mine.states[at][:, 1:], exact.states[at][:, 1:], cap)
    compare(f"{name}, write score", mine.states[at][:, 0], exact.states[at][:, 0], cap)


def run_case(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    compare: Compare = assert_near,
    plans: tuple[Any, Any, Any] = (None, None, None),
    **settings: Any,
) -> None:
    check_case(Case(device, dtype, Sizes(*sizes), **settings), dtype, compare, plans)


SIZES = [(1, 20, 8, 2, 5, 4), (2, 16, 32, 4, 5, 1), (5, 36, 64, 4, 50, 64), (1, 48, 64, 1, 50, 64), (2, 40, 24, 3, 5, 4)]


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step(sizes, readers):
    run_case(CPU, torch.float32, sizes, readers=readers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_dtype", ["own", torch.float32], ids=str)
def test_step_of_narrow_weights(dtype, hidden_dtype):
    hidden_dtype = dtype if hidden_dtype == "own" else hidden_dtype
    for rows in (1, 5):
        run_case(CPU, dtype, (rows, 36, 16, 2, 5, 4), readers=2, hidden_dtype=hidden_dtype)
    run_case(CPU, dtype, (2, 36, 16, 4, 5, 4), score_dtype=dtype, hidden_dtype=hidden_dtype)


def test_thresholds_cut_scores_and_gates_off():
    sizes = (6, 20, 8, 2, 5, 4)
    run_case(CPU, torch.float32, sizes, readers=2, write_threshold=0.5, read_threshold=0.5)
    case = Case(CPU, torch.float32, Sizes(*sizes), readers=2, write_threshold=0.5, read_threshold=0.5)
    case.weights.projection[-2:] = 0
    case.weights.gate_bias[:] = torch.tensor([-1.0, 0.0])
    for plan in (None, ReadingPlan(16, 4, 32)):
        few = case.copy()
        result = note_step(few.hidden, few.weights, few.notes, few.opened, few.read, plan=plan)
        assert torch.equal(result, few.hidden), "a gate of a half was not cut off"
        scores = few.opened.scores[torch.arange(6), case.read % 4]
        assert 0 < int((scores == 0).sum()) < 6
        assert ((scores == 0) | (scores > 0.5)).all()


PLANS = [
    (LinearPlan(1, 16, 32, 2), ReadingPlan(16, 4), ReadingPlan(16, 4, 32, 2)),
    (LinearPlan(16, 32, 16, 3), ReadingPlan(64, 8), ReadingPlan(64, 8, 64, 3)),
    (LinearPlan(1, 2, 128, 2), ReadingPlan(32, 4), ReadingPlan(32, 4, 16, 2)),
]


@pytest.mark.parametrize("plans", PLANS, ids=["narrow", "wide", "mixed"])
def test_however_it_is_cut(plans):
    for rows in (1, 3):
        run_case(CPU, torch.float32, (rows, 50, 16, 2, 5, 4), readers=2, plans=plans)


def check_rounding(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Results of kernels are those of the modules but for the order of sums: rounding elsewhere moves every fifth at least.
    The modules' are computed on the CPU, where sums of narrow products are not rounded on their way."""
    case, modules = Case(device, dtype, Sizes(*sizes)), Case(CPU, dtype, Sizes(*sizes))
    kernel = case.copy()
    projected = note_projections_naive(modules.hidden, modules.weights, modules.opened, modules.read)
    mine = note_projections(kernel.hidden, kernel.weights, kernel.opened, kernel.read).cpu()
    assert (mine != projected).float().mean() <= 0.1
    assert_near("write scores", kernel.opened.scores.nan_to_num(), modules.opened.scores.nan_to_num(), 1e-6)
    expected = note_reading_naive(modules.hidden, projected, modules.weights, modules.notes, modules.read) - modules.hidden
    expected, projected = expected.to(device), projected.to(device)
    for plan, limit in ((None, 0.05), (ReadingPlan(64, 8), 0.15)):  # few digits of a query may come out otherwise
        again = case.copy()
        if plan is None:
            value = note_reading(again.hidden, projected, again.weights, again.notes, again.read)
        else:
            value = note_step(again.hidden, again.weights, again.notes, again.opened, again.read, plan=plan)
        moved = ((value - again.hidden) - expected).abs() > 1e-5 * expected.abs().clamp_min(0.1)
        share = moved.float().mean().item()
        assert share <= limit, f"{share:.2f} of the results moved"


def test_results_are_rounded_where_the_modules_round():
    check_rounding(CPU, torch.float16, (9, 64, 32, 2, 20, 4))


def test_a_readers_notes_are_what_it_projects():
    """Together with `note_reading`, what the modules read: also of empty pools, and in the order of the layers below."""
    model = tiny_memmamba(torch.float32, cross_layer_group=1)
    memory = model.backbone.layers[2].memory
    assert can_step(memory)
    for settings in (dict(fusion="residual"), dict(fusion_position="post"), dict(pooling="max")):
        assert not can_step(tiny_memmamba(torch.float32, **settings).backbone.layers[0].memory)
    cache = model(torch.stack(random_rows([9] * 2)), use_cache=True).cache_params
    states = [block.memory.step_state(cache) for block in model.backbone.layers]
    (own, pools), (below, pools_below) = readers_and_pools(memory, states)
    assert own is memory.token_reader
    assert below is memory.layer_reader
    assert [pool.notes.data_ptr() for pool in (*pools, *pools_below)] == [states[i].pool.notes.data_ptr() for i in (2, 1)]
    notes = readable_notes(below, pools_below)
    assert torch.equal(notes.bias.exp(), pools_below[0].scores)
    pools_below[0].scores[:] = 0
    kept = notes.bias
    renew_notes(notes, below, pools_below)
    assert notes.bias is kept
    assert (kept == -torch.inf).all()


class KernelStep(FusedNotesStep):
    """The step as it is, with `note_step` or its reference."""

    def __init__(self, model: Any, cache: Any, step: Callable = note_step):
        super().__init__(model, cache)
        self.step = step


def check_model_steps(
    device: torch.device,
    lengths: tuple[int, ...],
    steps: int,
    step: Callable = note_step,
    compare: Compare = assert_near,
    **settings: Any,
) -> None:
    """Decoding behind prompts of these lengths, over ends of chunks: logits of every step and states behind the last."""
    model = tiny_memmamba(torch.float32, **settings).to(device)
    prompts = random_rows(lengths)
    columns = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (columns - len(row), 0)) for row in prompts]).to(device)
    mask = torch.tensor([[0] * (columns - length) + [1] * length for length in lengths], device=device)
    tokens = torch.stack(random_rows([steps] * len(lengths), seed=5)).to(device)
    with torch.no_grad():
        mine, modules, expected = (model(ids, attention_mask=mask, use_cache=True).cache_params for _ in range(3))
        fused, notes, eager = KernelStep(model, mine, step), NotesStep(model, modules), EagerStep(model, expected)
        fused.begin(model, mine)
        commits = 0
        for at in range(steps):
            logits = fused.run(model, tokens[:, at : at + 1])
            if fused.needs_upkeep():
                fused.upkeep(model)
                commits += 1
            wanted = notes.run(model, tokens[:, at : at + 1])
            if notes.needs_upkeep():
                notes.upkeep(model)
            compare("a model's step, logits", logits, eager(tokens[:, at]), 1e-5)
            compare("a model's step, logits beside those of modules", logits, wanted, 1e-5)
        fused.end(model, mine)
        notes.end(model, modules)
    assert commits >= 2
    assert_same_memory(mine, expected, 1e-5)
    assert_same_memory(mine, modules, 1e-5)


@pytest.mark.parametrize("rule", ["priority", "fifo", "periodic"])
def test_a_model_s_steps_from_the_references(rule):
    if INTERPRETED:
        pytest.skip("no kernel of this file's runs in it")
    settings = dict(write_rule=rule, write_period=6, write_span=4, write_threshold=0.3, read_threshold=0.3)
    check_model_steps(CPU, (1, 6, 11), 14, note_step_naive, **settings)


@pytest.mark.parametrize(("lengths", "settings"), [((7,), {}), ((3, 8), dict(residual_in_fp32=False))])
def test_a_model_s_steps(lengths, settings):
    check_model_steps(CPU, lengths, 4, chunk_size=2, **settings)


def test_a_model_s_steps_in_two_kernels(monkeypatch):
    monkeypatch.setattr(note_kernels, "FEW_ROWS", 0)
    check_model_steps(CPU, (7, 6), 4, chunk_size=2)


def test_weights_that_change_are_taken_again():
    model = tiny_memmamba(torch.float32)
    memory = model.backbone.layers[2].memory
    weights = step_weights(memory)
    places = [tensor.data_ptr() for tensor in (*weights[2:4], *weights.outputs)]
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(1.5)
    renew_weights(weights, memory)
    assert places == [tensor.data_ptr() for tensor in (*weights[2:4], *weights.outputs)]
    for mine, wanted in zip(weights, step_weights(memory), strict=True):
        for one, other in zip(mine, wanted, strict=True) if isinstance(mine, tuple) else [(mine, wanted)]:
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_shapes_that_do_not_fit_are_named():
    case = Case(CPU, torch.float32, Sizes(2, 20, 8, 2, 5, 4))
    with pytest.raises(ValueError, match=r"read has the shape \(1,\), expected \(2,\)"):
        note_projections(case.hidden, case.weights, case.opened, case.read[:1])
    with pytest.raises(ValueError, match=r"projected has the shape \(2, 8\), expected \(2, 9\)"):
        note_reading(case.hidden, torch.ones(2, 8), case.weights, case.notes, case.read)
    with pytest.raises(ValueError, match="1 readers need notes for each, got 2"):
        note_step(case.hidden, case.weights, case.notes * 2, case.opened, case.read)
    with pytest.raises(ValueError, match="gate_bias has the shape"):
        note_step(case.hidden, case.weights._replace(gate_bias=torch.ones(3)), case.notes, case.opened, case.read)


def test_pools_too_large_for_a_program_take_the_reference():
    case = Case(CPU, torch.float32, Sizes(1, 20, 8, 2, note_kernels.MOST_ELEMENTS // 8 + 1, 4))
    again = case.copy()
    result = note_step(case.hidden, case.weights, case.notes, case.opened, case.read)
    assert torch.equal(case.read, again.read + 1)
    assert_near("result", result, note_step_naive(again.hidden, again.weights, again.notes, again.opened, again.read), 1e-5)


def test_plans_keep_within_a_multiprocessor():
    """Of the shapes that there are: programs hold keys and values of a row in registers, 64 numbers a thread at most."""
    for elements in (4096, 8192, 16384, note_kernels.MOST_ELEMENTS):
        for rows in (1, 5, 64):
            plan = reading_plan(rows, 768, elements)
            assert 2 * elements <= 32 * plan.warps * 128
            assert plan.outputs & (plan.outputs - 1) == 0
            assert plan.warps <= 16
    assert step_plan(768, 4096).outputs == 64

# SPDX-License-Identifier: Apache-2.0
"""The memory's kernels of a decoding step against their references in float64, and a whole step built from them against the
modules.

On a CPU the functions run their references; `test_in_tritons_interpreter` runs this file once more, in a process of its own
in which they run their kernels. The checks are functions of the device, for the GPU tests to use.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, Compare, Numbers, assert_near
from modeling_tests.modeling.tiny_models import (
    assert_close,
    assert_same_memory,
    cached_states,
    memory_states,
    random_rows,
    rms_ratio,
    tiny_memmamba,
)
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, kernels_only_on_gpus, run_in_interpreter
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
    notes_by_layer,
    notes_of_layers,
    readable_notes_naive,
    readers_and_sources,
    reading_plan,
    renew_notes,
    renew_weights,
    step_plan,
    step_weights,
)
from remamba_hf.modeling.note_memory import StepState, states_in_one
from remamba_hf.modeling.note_pool import OpenChunk, Pool

BELOW = 7  # notes of the layers below, where a layer reads them


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


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
            self.notes.append(ReadableNotes(numbers.normal(rows, note, count), numbers.normal(rows, note, count), bias))
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

    rows, channels = case.hidden.shape
    chosen = [step_plan(rows, channels, case.weights, notes) for notes in case.notes]
    for plan in (plans[2] or ReadingPlan(64, 8), None):
        mine = case.copy()
        with kernels_run(device, 2 if plan is None and None in chosen else len(case.notes)):
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


SIZES = [(1, 20, 8, 2, 5, 4), (2, 16, 32, 4, 5, 1), (5, 36, 64, 4, 50, 64), (1, 48, 64, 1, 50, 64), (2, 40, 36, 3, 5, 4)]


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
    for plan in (None, ReadingPlan(16, 4, 8)):
        few = case.copy()
        result = note_step(few.hidden, few.weights, few.notes, few.opened, few.read, plan=plan)
        assert torch.equal(result, few.hidden), "a gate of a half was not cut off"
        scores = few.opened.scores[torch.arange(6), case.read % 4]
        assert 0 < int((scores == 0).sum()) < 6
        assert ((scores == 0) | (scores > 0.5)).all()


PLANS = [
    (LinearPlan(1, 16, 32, 2), ReadingPlan(16, 4), ReadingPlan(16, 4, 32)),
    (LinearPlan(16, 32, 16, 3), ReadingPlan(64, 16), ReadingPlan(64, 16, 64)),
    (LinearPlan(1, 2, 128, 2), ReadingPlan(32, 4), ReadingPlan(32, 8, 16)),
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


def filled(lengths: tuple[int, ...], **settings: Any) -> tuple[Any, Any]:
    """A model, and the cache behind prompts of these lengths."""
    model = tiny_memmamba(torch.float32, **settings)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(random_rows(lengths)):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    with torch.no_grad(), kernels_only_on_gpus():
        return model, model(ids, attention_mask=mask, use_cache=True).cache_params


def memories_of(model: Any) -> list[Any]:
    return [block.memory for block in model.backbone.layers]


def test_which_memories_can_step():
    assert can_step(memories_of(tiny_memmamba(torch.float32))[2])
    for settings in (dict(fusion="residual"), dict(fusion_position="post"), dict(pooling="max")):
        assert not can_step(memories_of(tiny_memmamba(torch.float32, **settings))[0])


@pytest.mark.parametrize(
    "settings",
    [
        dict(cross_layer_period=2, cross_layer_group=2),
        dict(cross_layer_period=1, cross_layer_group=2, num_hidden_layers=5),  # readers of one and of two pools
        dict(cross_layer_period=1, cross_layer_group=1),  # as many pools as a layer's own reader, with an embedding
        dict(cross_layer_period=0),
    ],
    ids=str,
)
def test_all_readers_notes_are_what_each_projects(settings):
    """Also of pools that are empty in part, and behind changes of pools and weights."""
    if INTERPRETED:
        pytest.skip("no kernel of this file's runs in it")
    model, cache = filled((9, 1, 6), **settings)
    memories = memories_of(model)
    states = [memory.step_state(cache) for memory in memories]
    pool = states_in_one(states).pool
    with torch.no_grad():
        groups = notes_of_layers(memories, pool)
        notes = notes_by_layer(groups, len(memories))
        for changed in (False, True):
            if changed:
                pool.notes.mul_(0.7)
                pool.scores[:, 0] = 0
                for parameter in model.parameters():
                    parameter.mul_(1.3)
                for group in groups:
                    renew_notes(group, memories, pool)
            for memory, parts in zip(memories, notes, strict=True):
                for (reader, layers), mine in zip(readers_and_sources(memory), parts, strict=True):
                    pools = [Pool(*(part[layer] for part in pool)) for layer in layers]
                    wanted = readable_notes_naive(reader, pools)
                    count = wanted.bias.shape[1]
                    assert torch.equal(mine.bias[:, :count], wanted.bias)
                    assert_close(mine.keys[..., :count], wanted.keys, 1e-6, "keys")
                    assert_close(mine.values[..., :count], wanted.values, 1e-6, "values")
                    assert (mine.bias[:, count:] == -torch.inf).all()
                    assert (mine.values[..., count:] == 0).all()
                    assert all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in mine)
                    assert mine.keys.shape[2] % note_kernels.NOTES_AT_ONCE == 0
            assert (notes[1][0].bias[0] == -torch.inf).all() == changed
    group = settings.get("cross_layer_group", 2)
    assert len(notes[-1]) == 1 + (settings["cross_layer_period"] > 0)
    if len(notes[-1]) == 2:
        last = len(memories) - 1
        assert readers_and_sources(memories[-1])[1] == (memories[-1].layer_reader, [last - 1, last - 2][:group])


RULES = [
    dict(write_rule="priority"),
    dict(write_rule="priority", recency_weight=0.05, write_threshold=0.4),
    dict(write_rule="fifo"),
    dict(write_rule="periodic", write_period=6, write_span=4),
    dict(write_rule="priority", pooling="max", pooling_window=3),
    dict(write_rule="fifo", pooling="mean", pooling_window=2, chunk_size=1),
    dict(write_rule="priority", pool_size=2, note_size=4),
]


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("lengths", [(8, 8), (8, 4, 7), (3, 5, 6)], ids=["all ended", "some ended", "none ended"])
def test_all_layers_commit_as_each_does(lengths, settings):
    """Bit for bit: rows where a chunk has just ended, and rows where none has."""
    if INTERPRETED:
        pytest.skip("no kernel of this file's runs in it")
    model, cache = filled(tuple(length - 1 for length in lengths), **settings)
    step = NotesStep(model, cache)
    with torch.no_grad():
        step.run(model, torch.tensor([[7]] * len(lengths)))
        before = [copied(state) for state in step.memories]
        expected = [copied(state) for state in step.memories]
        step.upkeep(model)
        for memory, state in zip(memories_of(model), expected, strict=True):
            memory.commit_step(state)
    for mine, wanted, earlier in zip(step.memories, expected, before, strict=True):
        for part, other in zip(tensors_of(mine), tensors_of(wanted), strict=True):
            assert torch.equal(part, other)
        for row, length in enumerate(lengths):
            ended = length % model.config.chunk_size == 0
            assert bool((mine.opened.notes[row] == 0).all()) == ended
            assert ended or torch.equal(mine.pool.scores[row], earlier.pool.scores[row])


def tensors_of(state: StepState) -> tuple[torch.Tensor, ...]:
    return *state.pool, *state.opened, state.read


def copied(state: StepState) -> StepState:
    pool, opened, read = state
    return StepState(Pool(*(part.clone() for part in pool)), OpenChunk(*(part.clone() for part in opened)), read.clone())


def test_upkeep_is_as_many_operations_for_many_layers_as_for_few():
    if INTERPRETED:
        pytest.skip("no kernel of this file's runs in it")

    def operations(layers: int) -> int:
        model, cache = filled((7, 6), num_hidden_layers=layers, cross_layer_period=4, cross_layer_group=4)
        with torch.no_grad():
            step = FusedNotesStep(model, cache)
            with Operations() as operations:
                step.upkeep(model)
        return operations.count

    assert 50 < operations(13) == operations(5) < 150


class Operations(TorchDispatchMode):
    """Counts operations of torch inside, some views included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        self.count += function.name().rpartition("::")[2] not in ("select.int", "slice.Tensor", "detach")
        return function(*arguments, **(settings or {}))


def test_rows_that_nobody_reads_ask_for_no_upkeep():
    if INTERPRETED:
        pytest.skip("no kernel of this file's runs in it")
    model, cache = filled((4, 7, 6))
    few = model(torch.stack(random_rows([5] * 2)), use_cache=True).cache_params
    with torch.no_grad():
        step = NotesStep(model, cache)
        step.begin(model, few)
    assert [step.needs_upkeep() for _ in range(8)] == [False, False, True, False] * 2


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
        with kernels_only_on_gpus():
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
            with kernels_only_on_gpus():
                exact = eager(tokens[:, at])
            compare("a model's step, logits", logits, exact, 1e-5)
            compare("a model's step, logits beside those of modules", logits, wanted, 1e-5)
        fused.end(model, mine)
        notes.end(model, modules)
    assert commits >= 2
    assert_same_notes(mine, expected, 1e-5, model.config)
    assert_same_notes(mine, modules, 1e-5, model.config)


def assert_same_notes(actual: Any, expected: Any, limit: float, config: Any) -> None:
    """`assert_same_memory`, but that notes with the same rank up to rounding may stand, or stay, one for the other.

    Equal tokens have equal scores in the first layer. Where kernels other than those of the prompt wrote one of them, these
    differ in their last bit, and so decides rounding which comes first.
    """
    mine, wanted = memory_states(actual), memory_states(expected)
    if config.write_rule == "priority":
        mine = [
            (*one[:3], with_ties_as_in(one[3], other[3], limit, config.recency_weight))
            for one, other in zip(mine, wanted, strict=True)
        ]
    assert_same_memory(mine, wanted, limit)


def with_ties_as_in(pools: torch.Tensor, expected: torch.Tensor, limit: float, recency_weight: float) -> torch.Tensor:
    """pools [B, K + 1, F + 3] of a cache, with tied notes in the order and at the positions they have in `expected`."""
    result = pools.clone()
    for row, (one, other) in enumerate(zip(pools.double().cpu(), expected.double().cpu(), strict=True)):
        places, wanted = (pool[:-1, -2:].tolist() for pool in (one, other))
        ranks, wanted_ranks = (pool[:-1, -3].log() + recency_weight * pool[:-1, -1] for pool in (one, other))
        present = int((other[:-1, -3] > 0).sum())
        left = [slot for slot, place in enumerate(places[:present]) if place not in wanted[:present]]
        for slot, place in enumerate(wanted[:present]):
            known = place in places[:present]
            source = places.index(place) if known else left.pop(0)
            tied = (ranks[[slot, source]] - wanted_ranks[slot]).abs() <= limit
            if (source != slot or not known) and tied.all():
                result[row, slot] = pools[row, source]
                result[row, slot, -2:] = expected[row, slot, -2:].to(result)
    return result


def test_only_ties_may_change_places():
    torch.manual_seed(0)
    pools = torch.randn(1, 5, 7)
    pools[0, :4, -3] = torch.tensor([0.9, 0.5, 0.5, 0.2])
    pools[0, :4, -2:] = torch.tensor([[0.0, position] for position in (3, 1, 8, 5)])
    pools[0, 2, :4] = pools[0, 1, :4]
    for order, same in (([0, 2, 1, 3], True), ([1, 0, 2, 3], False), ([0, 1, 3, 2], False)):
        moved = torch.cat([pools[:, order], pools[:, 4:]], dim=1)
        assert rms_ratio(moved, pools) > 0.01
        assert (rms_ratio(with_ties_as_in(moved, pools, 1e-6, 0.0), pools) == 0) == same
    other = pools.clone()
    other[0, 1, -1] = 7  # another token of the same score stayed
    assert torch.equal(with_ties_as_in(other, pools, 1e-6, 0.0), pools)
    other[0, 1, 0] += 1
    assert not torch.equal(with_ties_as_in(other, pools, 1e-6, 0.0), pools)


def rounding_of_the_modules(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> float:
    """What float32 alone changes: the largest rms ratio of the logits of a model's steps, as its modules take them, and of
    the layers' states behind them, to those of the same model in float64."""
    exact = copy.deepcopy(model).double().cpu()
    caches = [each(ids.to(each.device), use_cache=True).cache_params for each in (model, exact)]
    steps = [EagerStep(each, cache) for each, cache in zip((model, exact), caches, strict=True)]
    columns = tokens.unbind(1)
    logits, exact_logits = (torch.stack([step(column.to(step.model.device)).cpu() for column in columns]) for step in steps)
    pairs = [(logits, exact_logits)]
    for mine, wanted in zip(*(cached_states(cache) for cache in caches), strict=True):
        pairs += zip(mine, wanted, strict=True)
    return max(rms_ratio(one.cpu(), other.cpu()) for one, other in pairs)


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


@pytest.mark.parametrize(("below", "warps"), [(208, 16), (64, 8)])
def test_steps_in_one_kernel_hold_what_they_read_in_half_the_registers(below, warps):
    """Of the 130m model, for which two kernels take several times as long; others have two."""
    narrow = Case(CPU, torch.bfloat16, Sizes(1, 768, 64, 4, 64, 64), readers=2, below=below)
    own, other = (step_plan(1, 768, narrow.weights, notes) for notes in narrow.notes)
    assert own == ReadingPlan(64, 8)
    assert other.warps == warps
    assert step_plan(note_kernels.FEW_ROWS, 768, narrow.weights, narrow.notes[0]).outputs == 128
    assert step_plan(note_kernels.FEW_ROWS + 1, 768, narrow.weights, narrow.notes[0]) is None
    wide = Case(CPU, torch.bfloat16, Sizes(1, 2560, 64, 4, 64, 64))
    assert step_plan(1, 2560, wide.weights, wide.notes[0]) is None

# SPDX-License-Identifier: Apache-2.0
"""The state-space-dual operator: every path against the loop, values and gradients, states in and out, packed rows."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from modeling_tests.modeling.tiny_models import assert_close, rms_ratio
from remamba_hf.modeling import state_space_dual as module
from remamba_hf.modeling.state_space_dual import state_space_dual, state_space_dual_naive, state_space_dual_step

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
SEQUENCES = ("x", "dt", "B", "C")  # what has a token dimension
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 129, 2047, 2049)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(batch, length, heads=4, groups=2, channels=5, size=3, dtype=torch.float64, seed=0, skip=True, state=True):
    """The arguments of the operator, in the order of NAMES; dt like a trained model's, from 1e-3 to a few units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    values = [
        normal(batch, length, heads, channels),
        F.softplus(2 * normal(batch, length, heads) - 3),
        -torch.exp(normal(heads)),
        normal(batch, length, groups, size),
        normal(batch, length, groups, size),
        normal(heads) if skip else None,
        normal(batch, heads, channels, size) if state else None,
    ]
    return [value if value is None else value.to(dtype) for value in values]


def in_float64(arguments):
    return [a if a is None else a.double() for a in arguments]


def values_and_gradients(operator, arguments, seed=1, y_weight=1.0, state_weight=1.0):
    """y, the final state, and the gradients of a random projection of both, by name."""
    arguments = [a if a is None else a.clone().requires_grad_() for a in arguments]
    y, state = operator(*arguments)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for output, weight in ((y, y_weight), (state, state_weight)):
        if weight:
            probe = torch.randn(output.shape, dtype=torch.float64, generator=generator)
            loss = loss + weight * (output.double() * probe).sum()
    present = [(name, a) for name, a in zip(NAMES, arguments, strict=True) if a is not None]
    gradients = torch.autograd.grad(loss, [a for _, a in present], allow_unused=True)
    results = {"y": y, "state": state}
    for (name, argument), gradient in zip(present, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(argument) if gradient is None else gradient
    return results


def assert_results(actual, expected, limit):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], limit, name)


def span_of(arguments, begin, end):
    """The arguments of the tokens in [begin, end)."""
    return [a[:, begin:end] if name in SEQUENCES else a for name, a in zip(NAMES, arguments, strict=True)]


def in_pieces(operator, cuts, *arguments):
    """`operator` on one piece after the other, each from the state that the one before left."""
    *arguments, state = arguments
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, arguments[0].shape[1]], strict=True):
        y, state = operator(*span_of([*arguments, state], begin, end))
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.fixture
def many_segments(monkeypatch):
    """Every chunk is a segment of its own, as with long inputs of a wide model."""
    monkeypatch.setattr(module, "_MASK_ELEMENTS", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_agree_with_the_loop_in_float64(length):
    arguments = inputs(1 + length % 3, length, channels=(5, 8, 7)[length % 3], size=(3, 4, 1)[length % 3])
    expected = values_and_gradients(state_space_dual_naive, arguments)
    assert_results(values_and_gradients(state_space_dual, arguments), expected, 1e-10)


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 17, 130])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_optional_arguments(length, state, skip):
    arguments = inputs(2, length, state=state, skip=skip)
    expected = values_and_gradients(state_space_dual_naive, arguments)
    assert_results(values_and_gradients(state_space_dual, arguments), expected, 1e-10)
    y, none = state_space_dual(*arguments, return_final_state=False)
    assert none is None
    assert_close(y, expected["y"], 1e-10, "y")


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_of_heads(groups):
    arguments = inputs(2, 70, heads=6, groups=groups)
    expected = values_and_gradients(state_space_dual_naive, arguments)
    assert_results(values_and_gradients(state_space_dual, arguments), expected, 1e-10)


def test_a_head_reads_its_own_group():
    """The loop itself: head h reads group h // (heads / groups), written out with one group a head."""
    arguments = inputs(2, 9, heads=6, groups=2)
    spread = [a[:, :, [0, 0, 0, 1, 1, 1]] if name in "BC" else a for name, a in zip(NAMES, arguments, strict=True)]
    for actual, expected in zip(state_space_dual_naive(*arguments), state_space_dual_naive(*spread), strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("groups", [4, 5, 8])
def test_heads_that_cannot_share_groups_are_refused(groups):
    arguments = inputs(1, 5, heads=6, groups=groups)
    with pytest.raises(ValueError, match=f"6 heads are no multiple of {groups} groups"):
        state_space_dual(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [3, 65, 2049])
def test_low_precision_stays_near_float64(dtype, length):
    """The yardstick is float64 on the same rounded inputs; the loop in the same dtype may not be much better."""
    arguments = inputs(2, length, heads=6, channels=8, size=8, dtype=dtype)
    exact = values_and_gradients(state_space_dual_naive, in_float64(arguments))
    loop = values_and_gradients(state_space_dual_naive, arguments)
    fast = values_and_gradients(state_space_dual, arguments)
    assert fast["y"].dtype == dtype
    assert fast["state"].dtype == torch.float32
    for name in exact:
        ratio, loop_ratio = rms_ratio(fast[name], exact[name]), rms_ratio(loop[name], exact[name])
        assert ratio <= LIMITS[dtype], f"{name}: {ratio:.1e}"
        assert ratio <= 2 * loop_ratio + 2e-7, f"{name}: {ratio:.1e}, the loop reaches {loop_ratio:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_long_steps_leave_the_short_ones_exact(dtype):
    """A rate of 16 and steps of 10 sum to thousands within a chunk. In float32 the difference of two such sums is off by
    5e-4, and so would be the decay between the short steps that follow."""
    arguments = inputs(2, 200, dtype=dtype)
    arguments[2] = torch.full((4,), -16.0, dtype=dtype)
    is_long = torch.arange(200) % 64 < 52
    arguments[1] = torch.where(is_long, 10.0, torch.linspace(1e-3, 0.05, 200))[None, :, None].repeat(2, 1, 4).to(dtype)
    exact = values_and_gradients(state_space_dual_naive, in_float64(arguments))
    actual = values_and_gradients(state_space_dual, arguments)
    assert_close(actual["y"][:, ~is_long], exact["y"][:, ~is_long], LIMITS[dtype], "y of short steps")
    assert_results(actual, exact, LIMITS[dtype])


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_decay_gives_no_nan(scale, dtype):
    """exp of positive differences, the classic of chunked scans, overflows here."""
    arguments = inputs(2, 300, dtype=dtype)
    arguments[2] = arguments[2] * scale
    arguments[1][:, 100:140] *= 50
    expected = values_and_gradients(state_space_dual_naive, in_float64(arguments))
    actual = values_and_gradients(state_space_dual, arguments)
    # What flows through decay alone vanishes with it, down to where float32 has no digits.
    for name in ("y", "state", "dx", "dB", "dC", "dD"):
        assert_close(actual[name], expected[name], LIMITS[dtype], name)
    for name, value in actual.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize(("elements", "chunk"), [(1, 1), (1, 4), (300, 3), (600, 16), (5_000, 3), (40_000, 8)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 29), (4, 130), (2, 257)])
def test_every_way_of_cutting_into_chunks_and_segments(monkeypatch, elements, chunk, shape):
    arguments = inputs(*shape)
    expected = values_and_gradients(state_space_dual_naive, arguments)
    monkeypatch.setattr(module, "_MASK_ELEMENTS", {"cpu": elements, "cuda": elements})
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert_results(values_and_gradients(state_space_dual, arguments), expected, 1e-10)


def test_segments_bound_the_masks(monkeypatch):
    """Whatever the length, no segment holds more elements of masks than it may, unless a single chunk does."""
    spans = []
    segment = module._segment

    def watch(x, *rest):
        spans.append(x.shape[1])
        return segment(x, *rest)

    monkeypatch.setattr(module, "_segment", watch)
    monkeypatch.setattr(module, "_MASK_ELEMENTS", {"cpu": 2 * 4 * 64 * 64 * 3, "cuda": 0})
    state_space_dual(*inputs(2, 500))
    assert spans == [192, 192, 116]
    spans.clear()
    state_space_dual(*inputs(7, 130))
    assert spans == [64, 64, 2]


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "_MASK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "_CHUNK", 3)
    arguments = [a.requires_grad_() for a in inputs(2, 7, heads=2, groups=1, channels=2, size=2)]
    assert torch.autograd.gradcheck(state_space_dual, arguments)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_one_argument_alone(wanted):
    arguments = inputs(2, 70)
    expected = values_and_gradients(state_space_dual_naive, arguments)[f"d{wanted}"]
    alone = [a.clone().requires_grad_(name == wanted) for name, a in zip(NAMES, arguments, strict=True)]
    y, state = state_space_dual(*alone)
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum()
    if state.requires_grad:
        loss = loss + (state * torch.randn(state.shape, dtype=y.dtype, generator=generator)).sum()
    else:
        assert wanted in ("C", "D")
    (gradient,) = torch.autograd.grad(loss, alone[NAMES.index(wanted)])
    assert_close(gradient, expected, 1e-10, wanted)


@pytest.mark.parametrize(("y_weight", "state_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_loss_on_one_of_the_two_outputs(y_weight, state_weight):
    arguments = inputs(2, 70)
    weights = dict(y_weight=y_weight, state_weight=state_weight)
    expected = values_and_gradients(state_space_dual_naive, arguments, **weights)
    assert_results(values_and_gradients(state_space_dual, arguments, **weights), expected, 1e-10)


@pytest.mark.parametrize("form", ["strided", "transposed", "expanded", "reversed", "slice"])
def test_strides_do_not_matter(form):
    arguments = inputs(3, 37)

    def reshape(tensor):
        if form == "strided":
            return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1).flatten(-2)[..., ::2]
        if form == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if form == "expanded":
            return tensor[:1].expand_as(tensor)
        if form == "reversed":
            return tensor.flip(0).contiguous().flip(0)
        return F.pad(tensor, (3, 2), value=torch.nan)[..., 3:-2]

    def all_views(*tensors):
        weights = ("A", "D") if form == "expanded" else ()
        return [t if name in weights else reshape(t) for name, t in zip(NAMES, tensors, strict=True)]

    expected = values_and_gradients(
        lambda *a: state_space_dual_naive(*[view.contiguous() for view in all_views(*a)]), arguments
    )
    assert_results(values_and_gradients(lambda *a: state_space_dual(*all_views(*a)), arguments), expected, 1e-10)


def test_views_of_one_projection():
    """x, B and C as a mixer passes them: parts of one tensor, whose gradient collects theirs."""
    arguments = inputs(2, 70, heads=4, groups=2, channels=5, size=3)

    def from_one(operator, x, dt, A, B, C, D, state):
        x, B, C = torch.cat([t.flatten(2) for t in (x, B, C)], dim=-1).split([20, 6, 6], dim=-1)
        return operator(x.unflatten(-1, (4, 5)), dt, A, B.unflatten(-1, (2, 3)), C.unflatten(-1, (2, 3)), D, state)

    expected = values_and_gradients(state_space_dual_naive, arguments)
    assert_results(values_and_gradients(lambda *a: from_one(state_space_dual, *a), arguments), expected, 1e-10)


@pytest.mark.parametrize("where", ["left", "right", "inside", "whole chunks"])
def test_dt_of_zero_passes_a_pad(where):
    """Whatever stands in x, B and C of a pad: outputs of the tokens, the state and gradients do not see it."""
    columns, length = {
        "left": (range(7, 107), 107),
        "right": (range(100), 107),
        "inside": ([*range(4), *range(9, 60), *range(67, 112)], 120),
        "whole chunks": ([*range(30), *range(230, 300)], 330),
    }[where]
    columns = torch.tensor(list(columns))
    arguments = inputs(2, 100)
    expected = values_and_gradients(state_space_dual_naive, arguments)

    def padded(*tokens):
        fills = dict(x=1e3, dt=0.0, B=1e3, C=1e3)
        spread = [
            t.new_full((2, length, *t.shape[2:]), fills[name]).index_copy(1, columns, t) if name in fills else t
            for name, t in zip(NAMES, tokens, strict=True)
        ]
        y, state = state_space_dual(*spread)
        return y[:, columns], state

    assert_results(values_and_gradients(padded, arguments), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 33, 200])
def test_only_pads_leave_the_state_alone(dtype, length):
    arguments = inputs(2, length, dtype=dtype)
    arguments[1].zero_()
    _, final = state_space_dual(*arguments)
    assert torch.equal(final, arguments[-1])


@pytest.mark.parametrize("cuts", [[1], [64], [1, 2, 3], [63, 65], [64, 128], [17, 81, 82, 140], list(range(1, 150))])
def test_pieces_make_the_whole(cuts):
    arguments = inputs(2, 150)
    expected = values_and_gradients(state_space_dual, arguments)
    assert_results(values_and_gradients(lambda *a: in_pieces(state_space_dual, cuts, *a), arguments), expected, 1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_random_pieces_make_the_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(20, 200, (1,), generator=generator))
    cuts = sorted(set(torch.randint(1, length, (4,), generator=generator).tolist()))
    arguments = inputs(2, length, seed=seed, state=False)
    expected = values_and_gradients(state_space_dual, arguments)
    assert_results(values_and_gradients(lambda *a: in_pieces(state_space_dual, cuts, *a), arguments), expected, 1e-10)


# Packed rows: lengths of the sequences of each row. Chunks are 64 long.
PACKINGS = {
    "short": [[3, 1, 5, 1], [10]],
    "ends of chunks": [[64, 64, 10], [63, 1, 74]],
    "a chunk away": [[65, 63, 10], [1, 127, 10]],
    "longer than chunks": [[200, 5, 100], [5, 300]],
    "one token each": [[1] * 70, [69, 1]],
}


def packed(lengths):
    """seq_idx [b, L] of rows of sequences of these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


def each_alone(lengths, *arguments):
    """The loop on every sequence alone; the initial state is the first one's, the final state the last one's."""
    *arguments, state = arguments
    rows = []
    for index, row in enumerate(lengths):
        own = [a[index : index + 1] if name in SEQUENCES else a for name, a in zip(NAMES[:-1], arguments, strict=True)]
        before, begin, outputs = (None if state is None else state[index : index + 1]), 0, []
        for length in row:
            y, after = state_space_dual_naive(*span_of([*own, before], begin, begin + length))
            outputs.append(y)
            before, begin = None, begin + length
        rows.append((torch.cat(outputs, dim=1), after))
    return torch.cat([y for y, _ in rows]), torch.cat([after for _, after in rows])


@pytest.mark.parametrize("segments", [1, 1_000_000])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("operator", [state_space_dual_naive, state_space_dual])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences_do_not_see_each_other(monkeypatch, packing, operator, state, segments):
    lengths = PACKINGS[packing]
    seq_idx = packed(lengths)
    monkeypatch.setattr(module, "_MASK_ELEMENTS", {"cpu": segments, "cuda": segments})
    arguments = inputs(2, seq_idx.shape[1], state=state)
    expected = values_and_gradients(lambda *a: each_alone(lengths, *a), arguments)
    assert_results(values_and_gradients(lambda *a: operator(*a, seq_idx=seq_idx), arguments), expected, 1e-10)


@pytest.mark.parametrize("operator", [state_space_dual_naive, state_space_dual])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [7, 3, 7, 0], [0, 5, 5, 9], [-1, 0, -1, 2]])
def test_any_change_of_seq_idx_begins_anew(many_segments, operator, dtype, labels):
    """The first sequence reads the initial state whatever its number, and a number that comes back is another sequence."""
    sizes = [40, 24, 70, 3]
    seq_idx = torch.repeat_interleave(torch.tensor(labels), torch.tensor(sizes)).to(dtype).repeat(2, 1)
    lengths = [sizes] * 2 if labels[1] != labels[2] else [[40, 94, 3]] * 2
    arguments = inputs(2, sum(sizes))
    expected = values_and_gradients(lambda *a: each_alone(lengths, *a), arguments)
    assert_results(values_and_gradients(lambda *a: operator(*a, seq_idx=seq_idx), arguments), expected, 1e-10)


def test_one_sequence_is_no_packing():
    arguments = inputs(2, 150)
    seq_idx = torch.full((2, 150), 3)
    expected = values_and_gradients(state_space_dual, arguments)
    assert_results(values_and_gradients(lambda *a: state_space_dual(*a, seq_idx=seq_idx), arguments), expected, 1e-12)


def test_a_poisoned_sequence_stays_alone():
    """Large numbers times a mask of zeros are no mask: what another sequence holds must not show at all."""
    arguments = inputs(1, 100, dtype=torch.float32)
    seq_idx = packed([[30, 40, 30]])
    expected, expected_state = state_space_dual(*arguments, seq_idx=seq_idx)
    arguments[0][:, 30:70] = 1e30
    y, state = state_space_dual(*arguments, seq_idx=seq_idx)
    assert torch.equal(y[:, :30], expected[:, :30])
    assert torch.equal(y[:, 70:], expected[:, 70:])
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_make_the_sequence(dtype, skip, groups):
    x, dt, A, B, C, D, state = inputs(3, 30, groups=groups, dtype=dtype, skip=skip)
    expected, expected_state = state_space_dual_naive(*in_float64([x, dt, A, B, C, D, state]))
    state = state.to(torch.promote_types(dtype, torch.float32)).clone()
    address = state.data_ptr()
    steps = [state_space_dual_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(30)]
    assert state.data_ptr() == address
    assert steps[0].dtype == dtype
    assert_close(torch.stack(steps, dim=1), expected, LIMITS[dtype], "y")
    assert_close(state, expected_state, LIMITS[dtype], "state")


def test_a_step_of_a_pad_leaves_the_state_alone():
    x, dt, A, B, C, D, state = inputs(3, 1)
    before = state.clone()
    dt[1] = 0
    state_space_dual_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    assert torch.equal(state[1], before[1])
    assert not torch.equal(state[0], before[0])


@pytest.mark.parametrize("seq_idx", [None, torch.zeros(2, 0, dtype=torch.long)])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("operator", [state_space_dual_naive, state_space_dual])
def test_an_empty_sequence_passes_the_state(operator, state, seq_idx):
    arguments = inputs(2, 0, state=state)
    y, final = operator(*arguments, seq_idx=seq_idx)
    assert y.shape == (2, 0, 4, 5)
    assert torch.equal(final, arguments[-1] if state else torch.zeros(2, 4, 5, 3, dtype=torch.float64))


def test_the_initial_state_is_not_written_to():
    arguments = inputs(2, 70)
    before = arguments[-1].clone()
    state_space_dual(*arguments)
    state_space_dual(*[a.clone().requires_grad_() for a in arguments[:-1]], arguments[-1])[0].sum().backward()
    assert torch.equal(arguments[-1], before)


def test_a_row_is_the_same_in_any_batch():
    arguments = inputs(3, 150, dtype=torch.float32)
    alone = [a[1:2] if name in (*SEQUENCES, "initial_state") else a for name, a in zip(NAMES, arguments, strict=True)]
    for together, single in zip(state_space_dual(*arguments), state_space_dual(*alone), strict=True):
        assert_close(together[1:2], single, 1e-6)


def test_autocast_leaves_the_operator_in_float32():
    """Matrix products are what autocast rounds, and the operator consists of them."""

    def under_autocast(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return state_space_dual(*tensors)

    arguments = inputs(2, 150, heads=6, channels=8, size=8, dtype=torch.float32)
    expected = values_and_gradients(state_space_dual, arguments)
    actual = values_and_gradients(under_autocast, arguments)
    assert actual["y"].dtype == torch.float32
    assert_results(actual, expected, 1e-6)

    x, dt, A, B, C, D, state = arguments
    other = state.clone()
    expected = state_space_dual_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    with torch.autocast("cpu", torch.bfloat16):
        y = state_space_dual_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, other)
    assert torch.equal(y, expected)
    assert torch.equal(other, state)


def test_shapes_and_dtypes_on_meta():
    arguments = [a.to("meta") for a in inputs(2, 150, dtype=torch.bfloat16)]
    y, state = state_space_dual(*arguments, seq_idx=torch.zeros(2, 150, dtype=torch.long, device="meta"))
    assert (y.shape, y.dtype) == ((2, 150, 4, 5), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 4, 5, 3), torch.float32)


def test_float64_goes_through_without_rounding():
    """1e-12 is out of reach if anything passes through float32; weights may be in it all the same."""
    x, dt, A, B, C, D, state = inputs(2, 300)
    A, D = A.float(), D.float()
    y, final = state_space_dual(x, dt, A, B, C, D, state)
    assert y.dtype == final.dtype == torch.float64
    expected, expected_final = state_space_dual_naive(x, dt, A.double(), B, C, D.double(), state)
    assert_close(y, expected, 1e-12, "y")
    assert_close(final, expected_final, 1e-12, "state")


# mamba-ssm's kernel cannot run here. What surrounds it can: a stand-in with its signature, layout and limits.


def fake_kernel(calls):
    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
    ):  # fmt: skip
        """mamba_ssm.ops.triton.ssd_combined: sequences are told apart by number, and what stands in front of the row,
        the initial state, has number 0."""
        assert z is None
        assert dt_bias is None
        assert cu_seqlens is None
        assert not dt_softplus
        assert not return_varlen_states
        assert x.dtype == B.dtype == C.dtype, "the kernel multiplies x, B and C with each other"
        assert dt.dtype == A.dtype == torch.float32
        assert D is None or D.dtype == torch.float32
        assert initial_states is None or initial_states.dtype == torch.float32
        assert chunk_size & (chunk_size - 1) == 0
        assert x.shape[1] > 0
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            assert seq_idx.shape == x.shape[:2]
            if initial_states is not None:
                initial_states = torch.where((seq_idx[:, 0] == 0)[:, None, None, None], initial_states, 0.0)
        calls.append(tuple(x.shape[:2]))
        y, state = state_space_dual_naive(x, dt, A, B, C, D, initial_states, seq_idx)
        return (y, state) if return_final_states else y

    return mamba_chunk_scan_combined


@pytest.fixture
def kernel_calls(monkeypatch):
    """The rows and tokens of every call of the kernel, which takes float32 as well."""
    calls = []
    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: fake_kernel(calls))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield calls
    torch.set_float32_matmul_precision(precision)


def fits_only(monkeypatch, tokens):
    """The kernel's limit, moved to where a test can reach it: rows times tokens."""
    monkeypatch.setattr(
        module, "_overflows", lambda operands, chunk_size: operands.x.shape[0] * operands.x.shape[1] > tokens
    )


@pytest.mark.smoke
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_around_the_cuda_kernel(kernel_calls, state, skip, length):
    arguments = inputs(3, length, dtype=torch.float32, state=state, skip=skip)
    expected = values_and_gradients(state_space_dual_naive, in_float64(arguments))
    assert_results(values_and_gradients(state_space_dual, arguments), expected, 1e-5)
    assert kernel_calls == [(3, length)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_around_the_cuda_kernel(kernel_calls, dtype):
    """As the mixer calls it: dt, A, D and the state are in float32, and B may be in another dtype than x."""
    arguments = inputs(3, 20, dtype=torch.float32)
    arguments = [a.to(dtype) if name in ("x", "C") else a for name, a in zip(NAMES, arguments, strict=True)]
    y, state = state_space_dual(*arguments)
    expected, expected_state = state_space_dual_naive(*in_float64(arguments))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert_close(y, expected, LIMITS[dtype], "y")
    assert_close(state, expected_state, LIMITS[dtype], "state")
    assert state_space_dual(*arguments, return_final_state=False)[1] is None
    assert len(kernel_calls) == 2


def test_dispatch_leaves_what_the_kernel_cannot_do(kernel_calls):
    state_space_dual(*inputs(2, 9))
    state_space_dual(*inputs(2, 0, dtype=torch.float32))
    torch.set_float32_matmul_precision("highest")
    state_space_dual(*inputs(2, 9, dtype=torch.float32))
    assert not kernel_calls
    state_space_dual(*inputs(2, 9, dtype=torch.bfloat16))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [7, 3, 7, 0]])
def test_the_cuda_kernel_is_given_counted_sequences(kernel_calls, labels):
    """Given seq_idx as it is, the kernel would join sequences of one number and drop the initial state of a row that does
    not begin with 0."""
    seq_idx = torch.repeat_interleave(torch.tensor(labels), 10).repeat(2, 1)
    arguments = inputs(2, 40, dtype=torch.float32)
    expected = values_and_gradients(lambda *a: each_alone([[10] * 4] * 2, *a), in_float64(arguments))
    assert_results(values_and_gradients(lambda *a: state_space_dual(*a, seq_idx=seq_idx), arguments), expected, 1e-5)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("fits", [500, 160, 159, 80, 40, 25])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_what_does_not_fit_the_kernel_is_halved(monkeypatch, kernel_calls, batch, fits, state):
    """By rows, then by tokens, with gradients through the states between them."""
    fits_only(monkeypatch, fits)
    arguments = inputs(batch, 40, dtype=torch.float32, state=state)
    expected = values_and_gradients(state_space_dual_naive, in_float64(arguments))
    actual = values_and_gradients(lambda *a: state_space_dual(*a, chunk_size=8), arguments)
    assert_results(actual, expected, 1e-5)
    assert all(rows * tokens <= fits for rows, tokens in kernel_calls)
    assert sum(rows * tokens for rows, tokens in kernel_calls) == batch * 40
    assert len(kernel_calls) == 1 if batch * 40 <= fits else len(kernel_calls) > 1


# Halves of 40 tokens begin at 20, their halves at 10 and 30.
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    "lengths", [[20, 20], [10, 10, 10, 10], [19, 1, 20], [20, 1, 19], [21, 19], [40], [5, 30, 5], [1] * 40, [30, 10]]
)
def test_packed_rows_that_do_not_fit_the_kernel(monkeypatch, kernel_calls, lengths, state):
    """A sequence that begins at a cut must not read the state in front of it; one that goes on must."""
    fits_only(monkeypatch, 10)
    rows = [lengths, [13, 27]]
    seq_idx = packed(rows) + 4
    arguments = inputs(2, 40, dtype=torch.float32, state=state)
    expected = values_and_gradients(lambda *a: each_alone(rows, *a), in_float64(arguments))
    actual = values_and_gradients(lambda *a: state_space_dual(*a, seq_idx=seq_idx, chunk_size=8), arguments)
    assert_results(actual, expected, 1e-5)
    assert kernel_calls == [(1, 10)] * 8


def test_halving_ends_at_a_chunk(monkeypatch, kernel_calls):
    """Strides alone can be too large: a chunk of a row is passed whatever they are."""
    monkeypatch.setattr(module, "_overflows", lambda operands, chunk_size: True)
    arguments = inputs(1, 37, dtype=torch.float32)
    expected, expected_state = state_space_dual_naive(*in_float64(arguments))
    y, state = state_space_dual(*arguments, chunk_size=8)
    assert kernel_calls == [(1, tokens) for tokens in (4, 5, 4, 5, 4, 5, 5, 5)]
    assert_close(y, expected, 1e-5, "y")
    assert_close(state, expected_state, 1e-5, "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_around_the_step_kernel(monkeypatch, dtype, skip, groups):
    calls = []

    def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        """mamba_ssm.ops.triton.selective_state_update: everything but B and C for every channel; with strides of zero
        along the channels it knows that they share what a head has once."""
        rows, heads, channels, size = state.shape
        assert x.shape == dt.shape == (rows, heads, channels)
        assert A.shape == (heads, channels, size)
        assert B.shape == C.shape == (rows, groups, size)
        assert D.shape == dt_bias.shape == (heads, channels)
        assert A.stride()[-2:] == (0, 0)
        assert dt.stride(-1) == dt_bias.stride(-1) == 0
        assert not dt_softplus
        assert not dt_bias.any()
        assert z is None
        calls.append(x.dtype)
        step = dt[..., 0].float()
        B, C = (t.float().repeat_interleave(heads // groups, dim=1) for t in (B, C))
        state.mul_(torch.exp(step[..., None, None] * A))
        state.add_((step.unsqueeze(-1) * x.float()).unsqueeze(-1) * B.unsqueeze(2))
        return ((state * C.unsqueeze(2)).sum(-1) + x * D).to(x.dtype)

    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: selective_state_update)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x, dt, A, B, C, D, state = inputs(3, 1, groups=groups, dtype=torch.float32, skip=skip)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    expected, expected_state = state_space_dual_naive(*in_float64([x, dt, A, B, C, D, state]))
    y = state_space_dual_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    assert calls == [dtype]
    assert_close(y, expected[:, 0], LIMITS[dtype], "y")
    assert_close(state, expected_state, LIMITS[torch.float32], "state")
    x, dt, A, B, C, D, state = inputs(3, 1, groups=groups)
    state_space_dual_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    assert calls == [dtype], "float64 is not for the kernel"


# The limits themselves, at real widths: tensors on the meta device have shapes and strides and take no memory.


def wide_operands(batch, length, stride=5376, heads=80, channels=64, groups=1, size=128):
    """x, B and C as parts of one projection, `stride` elements a token, as mamba2-2.7b has them, and dt apart."""
    parts = [heads * channels, groups * size, groups * size]
    whole = torch.empty(batch, length, stride, dtype=torch.bfloat16, device="meta")
    x, B, C, _ = whole.split([*parts, stride - sum(parts)], dim=-1)
    dt = torch.empty(batch, length, heads, device="meta")
    return x.unflatten(-1, (heads, channels)), dt, B.unflatten(-1, (groups, size)), C.unflatten(-1, (groups, size))


@pytest.mark.parametrize(
    ("shape", "overflows"),
    [
        (dict(batch=1, length=100), False),
        (dict(batch=1, length=395_000), False),
        (dict(batch=1, length=400_000), True),
        (dict(batch=2, length=197_000), False),
        (dict(batch=2, length=200_000), True),
        (dict(batch=64, length=6_000), False),
        (dict(batch=64, length=6_300), True),
        (dict(batch=1, length=200_000, stride=10_576), False),
        (dict(batch=1, length=204_000, stride=10_576), True),
        (dict(batch=8, length=25_500, stride=10_576), True),
        # What the kernel allocates: C B^T of 8 groups and chunks of 256 are 2,048 elements a token.
        (dict(batch=1, length=1_000_000, stride=192, heads=8, channels=8, groups=8, size=8), False),
        (dict(batch=1, length=1_050_000, stride=192, heads=8, channels=8, groups=8, size=8), True),
        # Chunks are whole: 2 rows of 1 token take as much as 2 rows of 256.
        (dict(batch=40_000, length=1, stride=192, heads=8, channels=8, groups=8, size=8), True),
    ],
)
def test_where_the_kernels_offsets_end(shape, overflows):
    x, dt, B, C = wide_operands(**shape)
    assert module._overflows(module._Operands(x, dt, B, C, None, None), 256) == overflows


@pytest.mark.parametrize("packed_row", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 420_000), (1, 1_700_000), (3, 500_000), (128, 8_000)])
def test_long_inputs_reach_the_cuda_kernel_in_pieces(monkeypatch, kernel_calls, batch, length, packed_row):
    """Shapes alone, at mamba2-2.7b's width: every offset of every call fits 32 bits, and every token is passed once."""
    pieces = []

    def kernel(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, return_final_states=False):
        for tensor in (x, dt, B, C):
            assert sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) < 2**31
        assert x.numel() < 2**31
        assert (seq_idx is not None) == packed_row
        pieces.append(tuple(x.shape[:2]))
        return torch.empty_like(x), torch.empty(x.shape[0], 80, 64, 128, device="meta")

    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: kernel)
    x, dt, B, C = wide_operands(batch, length)
    A = torch.empty(80, device="meta")
    seq_idx = torch.zeros(batch, length, dtype=torch.long, device="meta") if packed_row else None
    y, state = state_space_dual(x, dt, A, B, C, A, seq_idx=seq_idx)
    assert y.shape == x.shape
    assert state.shape == (batch, 80, 64, 128)
    assert sum(rows * tokens for rows, tokens in pieces) == batch * length
    assert 2 <= len(pieces) <= 8

# SPDX-License-Identifier: Apache-2.0
"""The operators of MemMamba's memory against loops over plain lists."""

import math

import pytest
import torch

from modeling_tests.modeling.tiny_models import assert_close
from remamba_hf.modeling.note_pool import (
    Clock,
    OpenChunk,
    Pool,
    after_the_last,
    best_before_each_chunk,
    best_before_each_chunk_naive,
    into_chunks,
    out_of_chunks,
    pool_over_window,
    pools_of_chunks,
    positions_of_chunks,
    priorities,
    read_pool,
)

COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31)
SIZES = [(1, 1), (1, 5), (5, 1), (2, 5), (4, 4), (7, 3), (3, 7)]  # of chunk and pool


def random_ranks(batch, chunks, chunk, size, values, written=0.8, filled=None):
    """Ranks of a first pool, descending, and of chunks. `values`: how many different ones there are, so that few means many
    ties; `written`: share of notes that are written; `filled`: slots of the pool in use (None: any number)."""
    generator = torch.Generator().manual_seed(chunks * 100 + chunk * 10 + size)

    def draw(*shape):
        return torch.randint(values, shape, generator=generator).double() - values / 2

    pool = draw(batch, size).sort(dim=1, descending=True).values
    slots = torch.randint(size + 1, (batch, 1), generator=generator) if filled is None else torch.tensor(filled)
    pool = pool.masked_fill(torch.arange(size) >= slots, -torch.inf)
    ranks = draw(batch, chunks, chunk)
    absent = torch.rand(ranks.shape, generator=generator) >= written
    return pool, ranks.masked_fill(absent, -torch.inf)


def best_by_sorting(pool, ranks, chunks):
    """One row's pool before chunk number `chunks`, by plain Python: indices of what is present, the best first."""
    size, chunk = len(pool), ranks.shape[1]
    candidates = [*pool.tolist(), *ranks.flatten().tolist()][: size + chunks * chunk]
    present = [index for index, value in enumerate(candidates) if value > -math.inf]
    return sorted(present, key=lambda index: (-candidates[index], index))[:size]


def assert_chosen(index, present, pool, ranks):
    assert index.shape == present.shape == (ranks.shape[0], ranks.shape[1] + 1, pool.shape[1])
    for row in range(ranks.shape[0]):
        for chunks in range(ranks.shape[1] + 1):
            expected = best_by_sorting(pool[row], ranks[row], chunks)
            assert index[row, chunks][: len(expected)].tolist() == expected
            assert present[row, chunks].tolist() == [True] * len(expected) + [False] * (pool.shape[1] - len(expected))


@pytest.mark.parametrize("values", [2, 5, 10**6])
@pytest.mark.parametrize(("chunk", "size"), SIZES)
def test_the_best_before_each_chunk(chunk, size, values):
    """Ties, notes that are not written, first pools of any filling. Of equal ranks the earlier wins."""
    for chunks in COUNTS:
        pool, ranks = random_ranks(3, chunks, chunk, size, values)
        assert_chosen(*best_before_each_chunk(pool, ranks), pool, ranks)
        naive_index, naive_present = best_before_each_chunk_naive(pool, ranks)
        assert_chosen(naive_index, naive_present, pool, ranks)
        index, present = best_before_each_chunk(pool, ranks)
        assert torch.equal(present, naive_present)
        assert torch.equal(index[present], naive_index[present])


@pytest.mark.parametrize("filled", [0, 2, 4])
@pytest.mark.parametrize("written", [0.0, 0.1, 1.0])
def test_empty_and_full_pools(filled, written):
    for chunks in COUNTS:
        pool, ranks = random_ranks(2, chunks, 3, 4, 4, written, [filled])
        assert_chosen(*best_before_each_chunk(pool, ranks), pool, ranks)


def test_all_ranks_equal():
    """The first K notes stay for ever."""
    index, present = best_before_each_chunk(torch.full((1, 3), -torch.inf), torch.zeros(1, 6, 2, dtype=torch.float64))
    assert present[0, 0].tolist() == [False] * 3
    assert index[0, 2:].tolist() == [[3, 4, 5]] * 5
    assert index[0, 1, :2].tolist() == [3, 4]


def test_an_index_is_within_what_there_is():
    """Also where nothing is present, because it is gathered with."""
    for chunks in COUNTS:
        for chunk, size in SIZES:
            pool, ranks = random_ranks(2, chunks, chunk, size, 5, written=0.1, filled=[0])
            index, _ = best_before_each_chunk(pool, ranks)
            assert index.min() >= 0
            assert index.max() < size + max(chunks * chunk, 0)


@pytest.mark.parametrize(("chunk", "size"), SIZES)
def test_a_pool_carries_over(chunk, size):
    """Reading some chunks, then the others from the pool behind them, is reading all."""
    for cut in (0, 1, 4, 9, 11):
        pool, ranks = random_ranks(2, 11, chunk, size, 4)
        index, present = best_before_each_chunk(pool, ranks)
        first_index, first_present = best_before_each_chunk(pool, ranks[:, :cut])
        known = torch.cat([pool, ranks[:, :cut].flatten(1)], dim=1)
        carried = known.gather(1, first_index[:, -1]).masked_fill(~first_present[:, -1], -torch.inf)
        later_index, later_present = best_before_each_chunk(carried, ranks[:, cut:])
        origin = torch.cat([first_index[:, -1], torch.arange(11 * chunk)[cut * chunk :].expand(2, -1) + size], dim=1)
        later_index = origin.gather(1, later_index.flatten(1)).view_as(later_index)
        assert torch.equal(later_present, present[:, cut:])
        assert torch.equal(later_index[later_present], index[:, cut:][later_present])


# Priorities


def test_priorities_of_every_rule():
    scores, positions = torch.tensor([0.5, 0.0, 0.25, 1.0]), torch.tensor([3, 7, 10, 14])
    absent = -math.inf
    expected = {
        ("priority", 0.0): [math.log(0.5), absent, math.log(0.25), 0.0],
        ("priority", 0.1): [math.log(0.5) + 0.3, absent, math.log(0.25) + 1.0, 1.4],
        ("fifo", 0.1): [3, absent, 10, 14],
        ("periodic", 0.1): [absent, absent, 10, absent],
    }
    for (rule, recency), ranks in expected.items():
        actual = priorities(scores.requires_grad_(), positions, rule, recency, period=5, span=2)
        assert actual.dtype == torch.float64
        assert not actual.requires_grad
        assert actual.tolist() == pytest.approx(ranks)


def test_priorities_tell_close_scores_far_behind_apart():
    """In float32, log(score) + .01 * position would lose the score's last digits at a million tokens."""
    positions = torch.full((2,), 1_000_000)
    ranks = priorities(torch.tensor([0.5, 0.5 + 1e-6]), positions, "priority", 0.01, 1, 1)
    assert ranks[1] > ranks[0]


# Chunks


CLOCKS = {
    "fresh": ([0, 0, 0], [9, 9, 9]),
    "fresh and ragged": ([0, 0, 0], [9, 3, 0]),
    "at borders": ([4, 0, 8], [9, 9, 9]),
    "open": ([1, 2, 3], [9, 9, 9]),
    "open and ragged": ([5, 7, 100], [1, 9, 4]),
    "nothing new in an open chunk": ([3, 4, 6], [0, 0, 0]),
    "ends at a border": ([3, 0, 5], [5, 8, 3]),
    "one token": ([3, 4, 6], [1, 1, 1]),
}


def every_clock():
    for name, (read, lengths) in CLOCKS.items():
        yield name, Clock(read, lengths)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        read, lengths = torch.randint(0, 30, (2, 3), generator=generator).tolist()
        yield f"random {number}", Clock(read, lengths)


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
@pytest.mark.parametrize("with_open", [False, True])
@pytest.mark.parametrize("tail", [(), (2,)])
def test_into_chunks_puts_every_token_in_its_place(chunk, with_open, tail):
    for name, clock in every_clock():
        length = max(*clock.lengths, 1)
        tokens, opened = torch.randn(3, length, *tail), torch.randn(3, chunk, *tail)
        for row, read in enumerate(clock.read):
            opened[row, read % chunk :] = 0
        grid = into_chunks(tokens, clock, chunk, opened if with_open else None)
        assert grid.shape == (3, clock.chunks(chunk), chunk, *tail), name
        for row, (read, count) in enumerate(zip(clock.read, clock.lengths, strict=True)):
            fill = read % chunk
            expected = torch.zeros_like(grid[row].flatten(0, 1))
            expected[fill : fill + count] = tokens[row, :count]
            if with_open:
                expected[:fill] = opened[row, :fill]
            assert torch.equal(grid[row].flatten(0, 1), expected), f"{name}, row {row}"
        back = out_of_chunks(grid, clock, length)
        assert back.shape == tokens.shape
        for row, count in enumerate(clock.lengths):
            assert torch.equal(back[row, :count], tokens[row, :count]), f"{name}, row {row}"


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_positions_of_chunks(chunk):
    for name, clock in every_clock():
        length = max(*clock.lengths, 1)
        tokens = torch.tensor(clock.read)[:, None] + torch.arange(length)
        positions = positions_of_chunks(clock, chunk, torch.device("cpu"))
        back = out_of_chunks(positions, clock, length)
        for row, count in enumerate(clock.lengths):
            assert torch.equal(back[row, :count], tokens[row, :count]), f"{name}, row {row}"


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_there_are_as_many_chunks_as_needed(chunk):
    for _, clock in every_clock():
        touched = [{(read + t) // chunk - read // chunk for t in range(n)} for read, n in zip(*clock, strict=True)]
        assert clock.chunks(chunk) == max(1, *(max(numbers, default=0) + 1 for numbers in touched))
        assert clock.after == [read + n for read, n in zip(*clock, strict=True)]


def test_nan_behind_a_rows_tokens_stays_out():
    tokens = torch.full((2, 5), torch.nan)
    tokens[0], tokens[1, :2] = 1, 2
    assert into_chunks(tokens, Clock([0, 3], [5, 2]), 4).isfinite().all()


def random_pool(batch, size, filled):
    scores = torch.rand(batch, size, dtype=torch.float64) * (torch.arange(size) < filled)
    return Pool(
        torch.randn(batch, size, 3, dtype=torch.float64),
        scores.sort(dim=1, descending=True).values,
        torch.randint(0, 9, (batch, size)),
    )


@pytest.mark.parametrize("filled", [0, 2, 4])
def test_pools_of_chunks_gather_what_was_chosen(filled):
    pool, notes = random_pool(2, 4, filled), Pool(torch.randn(2, 6, 3, 3), torch.rand(2, 6, 3), torch.arange(18).view(6, 3))
    notes = Pool(notes.notes.double(), notes.scores.double(), notes.positions.expand(2, -1, -1) + 9)
    index, present = best_before_each_chunk(
        *(priorities(part.scores, part.positions, "priority", 0.0, 1, 1) for part in (pool, notes))
    )
    pools = pools_of_chunks(pool, notes, index, present)
    for row in range(2):
        everything = [*zip(pool.scores[row].tolist(), pool.notes[row].tolist(), pool.positions[row].tolist(), strict=True)]
        for chunk in range(7):
            best = sorted(filter(lambda entry: entry[0] > 0, everything), key=lambda entry: -entry[0])[:4]
            count = len(best)
            assert pools.scores[row, chunk].tolist() == [score for score, *_ in best] + [0.0] * (4 - count)
            assert pools.notes[row, chunk, :count].tolist() == [note for _, note, _ in best]
            assert pools.positions[row, chunk, :count].tolist() == [position for *_, position in best]
            if chunk < 6:
                parts = (notes.scores[row, chunk], notes.notes[row, chunk], notes.positions[row, chunk])
                everything += [*zip(*(part.tolist() for part in parts), strict=True)]
    last = after_the_last(pools, [6, 2])
    for part, whole in zip(last, pools, strict=True):
        assert torch.equal(part, torch.stack([whole[0, 6], whole[1, 2]]))


# Windows


@pytest.mark.parametrize("pooling", ["none", "max", "mean"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_pooling_against_a_loop(pooling, window, chunk):
    notes = torch.randn(2, 3, chunk, 2, dtype=torch.float64) - 3  # below zero: a maximum must not see what is not there
    pooled = pool_over_window(notes, pooling, window)
    assert pooled.shape == notes.shape
    for place in range(chunk):
        views = notes[:, :, max(0, place - window + 1) : place + 1]
        expected = {"none": views[:, :, -1], "max": views.amax(2), "mean": views.mean(2)}[pooling]
        assert_close(pooled[:, :, place], expected, 1e-14)


# Reading


def reading_inputs(filled=(3, 5, 0), dtype=torch.float64):
    """Two rows, three chunks of four tokens, two heads of three; of each chunk's pool of five notes some slots are empty."""
    queries, keys, values = (torch.randn(2, 3, n, 2, 3).to(dtype) for n in (4, 5, 5))
    scores = torch.rand(2, 3, 5).to(torch.promote_types(dtype, torch.float32)) * 0.9 + 0.05
    scores = scores * (torch.arange(5) < torch.tensor(filled)[:, None])
    return queries, keys, values, scores, torch.randn(2, dtype=scores.dtype)


def test_reading_against_a_loop():
    queries, keys, values, scores, sink = reading_inputs()
    read, weights = read_pool(queries, keys, values, scores, sink)
    assert weights.shape == (2, 3, 2, 4, 5)
    for row, chunk, token, head in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 2))).tolist():
        query = queries[row, chunk, token, head]
        numerators = [
            score * math.exp(query @ key / math.sqrt(3)) if score else 0.0
            for key, score in zip(keys[row, chunk, :, head], scores[row, chunk].tolist(), strict=True)
        ]
        total = sum(numerators) + math.exp(sink[head])
        expected = torch.tensor([numerator / total for numerator in numerators], dtype=torch.float64)
        assert_close(weights[row, chunk, head, token], expected, 1e-13, "weights")
        assert_close(read[row, chunk, token, head], expected @ values[row, chunk, :, head], 1e-13, "what was read")


def test_an_empty_pool_gives_zeros_and_finite_gradients():
    """Whatever stands in its slots, it goes to the sink."""
    inputs = [tensor.requires_grad_() for tensor in reading_inputs(filled=(0, 0, 0))]
    read, weights = read_pool(*inputs)
    assert read.abs().max() == 0
    assert weights.abs().max() == 0
    (read.square().sum() + read.sum() + weights.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


def test_an_empty_slot_gets_and_gives_nothing():
    queries, keys, values, scores, sink = (tensor.requires_grad_() for tensor in reading_inputs())
    empty = (scores == 0)[..., None, None].expand_as(keys)
    read, _ = read_pool(queries, keys, values, scores, sink)
    read.square().sum().backward()
    assert keys.grad[empty].abs().max() == 0
    assert values.grad[empty].abs().max() == 0
    assert all(tensor.grad.isfinite().all() for tensor in (queries, keys, values, scores, sink))
    other = [torch.where(empty, 7.0, tensor) for tensor in (keys, values)]
    assert torch.equal(read_pool(queries, *other, scores, sink)[0], read)


@pytest.mark.parametrize("score", [1e-30, 1e-44])
def test_a_tiny_score_is_not_an_infinite_one(score):
    """Also where its logarithm leaves the normal numbers."""
    queries, keys, values, scores, sink = reading_inputs(filled=(5, 5, 5), dtype=torch.float32)
    scores = (torch.zeros_like(scores) + score).requires_grad_()
    read, weights = read_pool(queries, keys, values, scores, sink)
    assert weights.sum(-1).max() < 1e-25
    read.sum().backward()
    assert scores.grad.isfinite().all()


def test_reading_in_bfloat16_weighs_in_float32():
    inputs = reading_inputs(dtype=torch.bfloat16)
    read, weights = read_pool(*inputs)
    expected, exact = read_pool(*(tensor.double() for tensor in inputs))
    assert read.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert_close(read, expected, 1e-2, "what was read")
    assert_close(weights, exact, 1e-2, "weights")
    assert (weights.sum(-1) < 1).all()


# Gradients


def differentiable(*tensors):
    return [tensor.double().requires_grad_() for tensor in tensors]


def test_gradients_of_reading():
    inputs = reading_inputs()
    scores, sink = inputs[3], inputs[4]
    filled = scores > 0
    queries, keys, values, written, sink = differentiable(*inputs[:3], scores[filled], sink)

    def read(queries, keys, values, written, sink):
        return read_pool(queries, keys, values, torch.zeros_like(scores).masked_scatter(filled, written), sink)

    assert torch.autograd.gradcheck(read, (queries, keys, values, written, sink), atol=1e-7)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_gradients_of_pooling(pooling):
    (notes,) = differentiable(torch.randn(1, 2, 4, 3))
    assert torch.autograd.gradcheck(lambda notes: pool_over_window(notes, pooling, 3), notes, atol=1e-7)


def test_gradients_from_tokens_to_what_is_read():
    """Through the chunks, the choice and the attention: every note that was read, also one of an open chunk of before."""
    clock, chunk, size = Clock([2, 3], [9, 5]), 4, 5
    pool = random_pool(2, size, 2)
    opened = OpenChunk(torch.randn(2, chunk, 3).double(), torch.full((2, chunk), 0.95).double())
    for row, read in enumerate(clock.read):
        opened.notes[row, read % chunk :], opened.scores[row, read % chunk :] = 0, 0
    sink = torch.randn(1, dtype=torch.float64)

    def read(notes, scores, before, earlier):
        grid = into_chunks(notes, clock, chunk, earlier)
        written = into_chunks(scores, clock, chunk, opened.scores)
        positions = positions_of_chunks(clock, chunk, notes.device)
        ranks = [priorities(s, p, "priority", 0.0, 1, 1) for s, p in ((pool.scores, pool.positions), (written, positions))]
        pools = pools_of_chunks(Pool(before, *pool[1:]), Pool(grid, written, positions), *best_before_each_chunk(*ranks))
        queries = into_chunks(notes, clock, chunk).unsqueeze(3)
        found, _ = read_pool(
            queries, *(pools.notes[:, :-1].unsqueeze(3),) * 2, scores=pools.scores[:, :-1].clone(), sink=sink
        )
        return out_of_chunks(found.squeeze(3), clock, notes.shape[1])[:, :5]

    scores = torch.linspace(0.3, 0.9, 18)[torch.randperm(18)].view(2, 9)
    inputs = differentiable(torch.randn(2, 9, 3), scores, pool.notes, opened.notes)
    assert torch.autograd.gradcheck(read, inputs, atol=1e-7)
    gradients = torch.autograd.grad(read(*inputs).sum(), inputs)
    assert all(gradient.abs().max() > 0 for gradient in gradients)

# SPDX-License-Identifier: Apache-2.0
"""Notes about tokens, a pool of the best of them, and attention over it: the memory of MemMamba (arXiv 2510.03279, Eq. 5 to
7). Knows nothing of Mamba.

A row's own tokens are counted from 0 and cut into chunks of `C`. Every token writes a note; where a chunk ends, its notes
are committed: the pool becomes the `K` best of what it was and of them. A token reads the pool as it was when its chunk
began, so all chunks can be computed at once: the pool of a union is the best of the pools, which a prefix scan gives.

Shapes: `B` rows, `T` tokens of a pass, `n` chunks they lie in, `C` tokens of a chunk, `K` notes of a pool, `F` note size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

WRITE_RULES = ("priority", "fifo", "periodic")
POOLINGS = ("none", "max", "mean")


class Pool(NamedTuple):
    """The best notes first.

    notes: [..., K, F].
    scores: [..., K], in (0, 1]; 0 where the slot is empty.
    positions: [..., K] long, of the tokens that wrote them; arbitrary where the slot is empty.
    """

    notes: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor


class OpenChunk(NamedTuple):
    """The tokens since the last commit, in front; zeros behind.

    notes: [B, C, F], as projected, before pooling and norm.
    scores: [B, C].
    """

    notes: torch.Tensor
    scores: torch.Tensor


class Clock(NamedTuple):
    """Where in its own text every row is, on the host: tokens read before this pass, and tokens of this pass."""

    read: list[int]
    lengths: list[int]

    def chunks(self, chunk: int) -> int:
        """n: chunks that the open tokens and those of the longest pass lie in."""
        return max(-(-(read % chunk + length) // chunk) for read, length in zip(self.read, self.lengths, strict=True)) or 1

    @property
    def after(self) -> list[int]:
        return [read + length for read, length in zip(self.read, self.lengths, strict=True)]


def priorities(
    scores: torch.Tensor, positions: torch.Tensor, rule: str, recency_weight: float, period: int, span: int
) -> torch.Tensor:
    """What notes are ranked by, float64 like `scores` in shape; -inf for notes that are not written. No gradient.

    Args:
        scores: [...], 0 where there is no note.
        positions: [...] long.
        rule: `"priority"`: log score + recency_weight * position. `"fifo"`: the latest. `"periodic"`: the latest of those
            with position % period < span (the paper's Fig. 2, with period 200 and span 50).

    A log score counts to float32's precision: in float64 equal tokens, whose scores differ by their rounding, then rank by
    position, however a text is cut into passes.
    """
    scores = scores.detach().double()
    if rule == "priority":
        ranks = scores.log().float().double() + recency_weight * positions
    else:
        ranks = positions.double()
    written = scores > 0
    if rule == "periodic":
        written = written & (positions % period < span)
    return ranks.masked_fill(~written, -torch.inf)


def best_before_each_chunk_naive(ranks: torch.Tensor, chunk_ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `best_before_each_chunk`: everything that came before a chunk, sorted anew for each."""
    size = ranks.shape[1]
    chunks = chunk_ranks.shape[1]
    everything = torch.cat([ranks, chunk_ranks.flatten(1)], dim=1)
    chosen = []
    for chunk in range(chunks + 1):
        order = everything[:, : size + chunk * chunk_ranks.shape[2]].sort(dim=1, descending=True, stable=True).indices
        chosen.append(order[:, :size])
    index = torch.stack(chosen, dim=1)
    return index, everything.gather(1, index.flatten(1)).view_as(index) > -torch.inf


def best_before_each_chunk(ranks: torch.Tensor, chunk_ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool before every chunk and behind the last one, as indices; of equal ranks the earlier wins.

    Args:
        ranks: float64[B, K], of the pool before the first chunk, descending; equal ones in order of position.
        chunk_ranks: float64[B, n, C], of the chunks' notes in order.

    Returns:
        index: long [B, n + 1, K], into the first pool's K slots followed by the n * C notes, in descending rank.
        present: bool [B, n + 1, K], False where there is nothing more to choose and the index is arbitrary.
    """
    size = ranks.shape[1]
    batch, chunks, length = chunk_ranks.shape
    index = torch.arange(chunks * length, device=ranks.device).view(1, chunks, length).expand(batch, -1, -1) + size
    if length < size:
        chunk_ranks = F.pad(chunk_ranks, (0, size - length), value=-torch.inf)
        index = F.pad(index, (0, size - length))
    chunk_ranks, order = chunk_ranks.sort(dim=2, descending=True, stable=True)
    index = index.gather(2, order)
    first = torch.arange(size, device=ranks.device).expand(batch, 1, size)
    ranks = torch.cat([ranks.unsqueeze(1), chunk_ranks[..., :size]], dim=1)
    index = torch.cat([first, index[..., :size]], dim=1)
    reach = 1
    while reach <= chunks:  # each entry holds the best of the `reach` entries up to it; joined, of twice as many
        both = torch.cat([ranks[:, :-reach], ranks[:, reach:]], dim=2)
        candidates = torch.cat([index[:, :-reach], index[:, reach:]], dim=2)
        both, order = both.sort(dim=2, descending=True, stable=True)
        ranks = torch.cat([ranks[:, :reach], both[..., :size]], dim=1)
        index = torch.cat([index[:, :reach], candidates.gather(2, order)[..., :size]], dim=1)
        reach *= 2
    return index, ranks > -torch.inf


def into_chunks(tokens: torch.Tensor, clock: Clock, chunk: int, open_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """tokens [B, T, ...] of a pass -> [B, n, C, ...], every row from where its open chunk ends; zeros where nothing is.

    Args:
        open_tokens: [B, C, ...], what the open chunk holds already (None: zeros).
    """
    chunks = clock.chunks(chunk)
    batch, length = tokens.shape[:2]
    size = chunks * chunk
    tail = tokens.shape[2:]
    if not any(read % chunk for read in clock.read) and min(clock.lengths) == length:
        grid = torch.cat([tokens, tokens.new_zeros(batch, size - length, *tail)], dim=1)
        return grid.unflatten(1, (chunks, chunk))
    column = torch.arange(size)
    fill = torch.tensor([read % chunk for read in clock.read])[:, None]
    lengths = torch.tensor(clock.lengths)[:, None]
    source = column - fill
    present = ((source >= 0) & (source < lengths)).to(tokens.device)
    source = source.clamp(0, max(length - 1, 0)).to(tokens.device)
    spread = (...,) + (None,) * len(tail)
    grid = tokens.gather(1, source[spread].expand(batch, size, *tail)).masked_fill(~present[spread], 0)
    if open_tokens is not None and bool(fill.any()):
        front = F.pad(open_tokens.movedim(1, -1), (0, size - chunk)).movedim(-1, 1).to(tokens.dtype)
        earlier = (column < fill).to(tokens.device)
        grid = torch.where(earlier[spread], front, grid)
    return grid.unflatten(1, (chunks, chunk))


def out_of_chunks(grid: torch.Tensor, clock: Clock, length: int) -> torch.Tensor:
    """[B, n, C, ...] -> [B, T, ...], the inverse of `into_chunks` (arbitrary behind a row's tokens)."""
    chunk = grid.shape[2]
    flat = grid.flatten(1, 2)
    if not any(read % chunk for read in clock.read):
        return flat[:, :length]
    fill = torch.tensor([read % chunk for read in clock.read], device=grid.device)[:, None]
    source = (torch.arange(length, device=grid.device) + fill).clamp(max=flat.shape[1] - 1)
    return flat.gather(1, source[(...,) + (None,) * (flat.dim() - 2)].expand(-1, -1, *flat.shape[2:]))


def positions_of_chunks(clock: Clock, chunk: int, device: torch.device) -> torch.Tensor:
    """long [B, n, C]: the position in its row of every place of `into_chunks`."""
    begins = torch.tensor([read // chunk * chunk for read in clock.read], device=device)
    places = torch.arange(clock.chunks(chunk) * chunk, device=device)
    return (begins[:, None] + places).unflatten(1, (-1, chunk))


def pools_of_chunks(pool: Pool, notes: Pool, index: torch.Tensor, present: torch.Tensor) -> Pool:
    """The pools that `best_before_each_chunk` chose: [B, n + 1, K, ...].

    Args:
        pool: before the first chunk, [B, K, ...].
        notes: of all chunks in order, [B, n, C, ...].
        index, present: [B, n + 1, K].
    """
    parts = []
    for before, new in zip(pool, notes, strict=True):
        everything = torch.cat([before.to(new.dtype), new.flatten(1, 2)], dim=1)
        flat = index.flatten(1)
        if everything.dim() == 3:
            flat = flat.unsqueeze(-1).expand(-1, -1, everything.shape[-1])
        parts.append(everything.gather(1, flat).unflatten(1, index.shape[1:]))
    return Pool(parts[0], parts[1] * present, parts[2])


def after_the_last(pools: Pool, counts: Sequence[int]) -> Pool:
    """Of pools [B, n + 1, K, ...] the one behind each row's last complete chunk: [B, K, ...]; `counts` are those chunks."""
    rows = torch.arange(len(counts), device=pools.scores.device)
    chosen = torch.tensor(list(counts), device=pools.scores.device)
    return Pool(*(part[rows, chosen] for part in pools))


def pool_over_window(notes: torch.Tensor, pooling: str, window: int) -> torch.Tensor:
    """Maximum or mean of each token's note and of those up to `window` - 1 before it in its chunk: [B, n, C, F]."""
    if pooling == "none" or window == 1:
        return notes
    chunk = notes.shape[2]
    empty = -torch.inf if pooling == "max" else 0.0
    front = F.pad(notes, (0, 0, min(window, chunk) - 1, 0), value=empty)
    views = front.unfold(2, min(window, chunk), 1)  # [B, n, C, F, window]
    if pooling == "max":
        return views.amax(-1)
    count = torch.arange(1, chunk + 1, device=notes.device).clamp(max=window).to(notes.dtype)
    return views.sum(-1) / count[:, None]


def read_pool(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over notes, weighted by their scores, with a sink that takes what no note deserves.

    a_i = softmax over { q . k_i / sqrt(d) + log score_i } and `sink`; in float32 at least.

    Args:
        queries: [B, n, T, h, d].
        keys, values: [B, n, K, h, d].
        scores: [B, n, K], 0 where there is no note.
        sink: [h], logits.

    Returns:
        sum_i a_i v_i [B, n, T, h, d] in the queries' dtype, and a [B, n, h, T, K].
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    logits = torch.matmul(queries.movedim(3, 2), keys.movedim(3, 2).transpose(-1, -2)).to(dtype) / queries.shape[-1] ** 0.5
    present = (scores > 0)[:, :, None, None]
    bias = scores.to(dtype).clamp_min(torch.finfo(dtype).tiny).log()[:, :, None, None]
    logits = (logits + bias).masked_fill(~present, -torch.inf)
    nothing = sink.to(dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, nothing], dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values.movedim(3, 2)).movedim(2, 3).to(queries.dtype), weights

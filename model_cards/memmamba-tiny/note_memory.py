# SPDX-License-Identifier: Apache-2.0
"""A layer's memory: what it writes, keeps, reads and adds (arXiv 2510.03279, Eq. 5 to 7 and 12), with its state in a cache.

Shapes: `B` rows, `T` tokens of a pass, `n` chunks of `C` tokens, `H` hidden size, `K` notes of a pool of size `F` each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.cache_utils import Cache

from .note_pool import (
    Clock,
    OpenChunk,
    Pool,
    after_the_last,
    best_before_each_chunk,
    into_chunks,
    out_of_chunks,
    pool_over_window,
    pools_of_chunks,
    positions_of_chunks,
    priorities,
    read_pool,
)
from .precision import at_least_float32, state_dtype, without_autocast
from .recurrent_model import OwnStart, RMSNorm

_SLOT = 1  # of the cache's states of a layer; the mixer's are in slot 0
_COUNTED = 1 << 20  # counts of tokens are kept as two floats, since one stalls at 2^24


class Reading(NamedTuple):
    """What a row's last token of a pass could read, and read.

    positions: [B, K] long, -1 where the slot is empty.
    scores: [B, K].
    weights: [B, K], its attention, a mean over heads; what is missing to 1 went to the sink. All 0 in a row that the pass
        has no token of.
    """

    positions: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor


class StepState(NamedTuple):
    """A layer's memory between decoding steps, on its device alone, where steps change it in place.

    pool: [B, K, ...].
    opened: [B, C, ...], zeros behind the open chunk's tokens.
    read: [B] long, tokens that each row has read.
    """

    pool: Pool
    opened: OpenChunk
    read: torch.Tensor


class NoteReader(OwnStart):
    """Attention of tokens over notes (Eq. 6, 7). What it returns starts at zero, so that a model starts as its plain one.

    Args:
        layers: of how many layers' pools the notes come; each gets an embedding. 0: of this one's alone.
    """

    def __init__(self, config: Any, layers: int = 0):
        super().__init__()
        self.heads = config.note_heads
        self.query = nn.Linear(config.hidden_size, config.note_size, bias=False)
        self.key = nn.Linear(config.note_size, config.note_size, bias=False)
        self.value = nn.Linear(config.note_size, config.note_size, bias=False)
        self.output = ReaderOutput(config.note_size, config.hidden_size)
        self.sink = nn.Parameter(torch.zeros(config.note_heads))
        self.layer_embedding = nn.Parameter(torch.zeros(layers, config.note_size)) if layers else None

    def init_parameters(self) -> None:
        init.zeros_(self.sink)
        if self.layer_embedding is not None:
            init.normal_(self.layer_embedding, std=0.1)

    def forward(self, tokens: torch.Tensor, pools: Sequence[Pool]) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens [B, n, T, H] read of pools [B, n, K, ...] each: [B, n, T, H], and the weights [B, n, h, T, all K]."""
        notes = [pool.notes.to(tokens.dtype) for pool in pools]
        if self.layer_embedding is not None:
            notes = [
                note + embedding.to(note.dtype)
                for note, embedding in zip(notes, self.layer_embedding[: len(notes)], strict=True)
            ]
        joined, scores = torch.cat(notes, dim=2), torch.cat([pool.scores for pool in pools], dim=2)
        queries, keys, values = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in (self.query(tokens), self.key(joined), self.value(joined))
        )
        read, weights = read_pool(queries, keys, values, scores, self.sink)
        return self.output(read.flatten(-2)), weights


class ReaderOutput(nn.Linear, OwnStart):
    """The last projection of a reader, which starts at zero."""

    def __init__(self, note_size: int, hidden_size: int):
        nn.Linear.__init__(self, note_size, hidden_size, bias=False)

    def init_parameters(self) -> None:
        init.zeros_(self.weight)


class FusionConvolution(nn.Conv1d, OwnStart):
    """A pointwise convolution over a token and what it read, which starts by passing on what was read."""

    def __init__(self, hidden_size: int):
        nn.Conv1d.__init__(self, 2 * hidden_size, hidden_size, 1)

    def init_parameters(self) -> None:
        size = self.out_channels
        kernel = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1).unsqueeze(-1)
        init.copy_(self.weight, kernel.to(self.weight))
        if self.bias is not None:
            init.zeros_(self.bias)


class Fusion(OwnStart):
    """How what was read joins a token: the variants of the paper's Table 4. All leave zeros as they are."""

    def __init__(self, config: Any):
        super().__init__()
        self.kind, self.threshold = config.fusion, config.read_threshold
        self.gate = nn.Linear(config.hidden_size, 1) if self.kind == "gated" or self.threshold > 0 else None
        self.weight = nn.Parameter(torch.ones(())) if self.kind == "weighted" else None
        self.mix = FusionConvolution(config.hidden_size) if self.kind == "conv1d" else None

    def init_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, tokens: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Normed tokens and what they read, [B, T, H] both -> what is added to the tokens [B, T, H]."""
        if self.kind == "elementwise":
            read = tokens * read
        if self.weight is not None:
            read = self.weight.to(read.dtype) * read
        if self.mix is not None:
            read = self.mix(torch.cat([tokens, read], dim=-1).transpose(1, 2)).transpose(1, 2)
        if self.gate is not None:
            gate = torch.sigmoid(at_least_float32(self.gate(tokens)))
            read = read * gate.masked_fill(gate <= self.threshold, 0.0).to(read.dtype)
        return read


class WriteScore(nn.Linear):
    """The projection whose sigmoid is a token's write score: in float32 at least, whatever the weight's dtype and autocast,
    because a small error changes which notes stay."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else at_least_float32(self.bias)
        with without_autocast(x):
            return nn.functional.linear(at_least_float32(x), at_least_float32(self.weight), bias)


class NoteMemory(nn.Module):
    """One layer's memory."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.write_score = WriteScore(config.hidden_size, 1)
        self.note = nn.Linear(config.hidden_size, config.note_size, bias=False)
        self.note_norm = RMSNorm(config.note_size, eps=config.layer_norm_epsilon)
        self.token_reader = NoteReader(config)
        self.token_fusion = Fusion(config)
        self.reads_below = config.reads_layers_below(layer_idx)
        if self.reads_below:
            self.layer_reader = NoteReader(config, layers=min(config.cross_layer_group, layer_idx))
            self.layer_fusion = Fusion(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        clock: Clock,
        below: Sequence[Pool],
        cache_params: Cache | None,
        wants_reading: bool = False,
    ) -> tuple[torch.Tensor, Pool, torch.Tensor, Reading | None]:
        """What is added to the tokens of a pass [B, T, H], the pools they read from [B, n, K, ...], the logits of their
        write scores [B, T], and if asked what the last of them read.

        Args:
            clock: where the rows are, and how long their parts of the pass.
            below: such pools of the layers below, the nearest first.
            cache_params: the memory's state to continue and to update.
        """
        tokens = self.norm(hidden_states)
        notes, scores, logits = self._notes(tokens)
        state = self._state(cache_params, len(tokens), notes, scores)
        if hidden_states.shape[1] == 1 and min(clock.lengths) == 1 and not torch.is_grad_enabled():
            added, pools, weights = self._step(tokens, notes, scores, state, below)
            if any(after % self.config.chunk_size == 0 for after in clock.after):
                pools = Pool(*(part.clone() for part in pools))  # the layers above read what was before the commit
                self.commit_step(state)
        else:
            grid = into_chunks(tokens, clock, self.config.chunk_size)
            pools, pool, opened = self._commit_chunks(state.pool, state.opened, notes, scores, clock)
            state = StepState(pool, opened, torch.tensor(clock.after, device=tokens.device))
            added, weights = self._read(tokens, grid, pools, below, clock)
        self.keep(cache_params, state)
        return added, pools, logits, self._last_reading(pools, weights, clock) if wants_reading else None

    def step(self, hidden_states: torch.Tensor, state: StepState, below: Sequence[Pool]) -> tuple[torch.Tensor, Pool]:
        """What is added to one token of every row [B, 1, H], and the pools that it read [B, 1, K, ...]; its note joins the
        open chunk. Asks the device nothing: whoever knows that a chunk has ended calls `commit_step`, before the next step.
        """
        tokens = self.norm(hidden_states)
        notes, scores, _ = self._notes(tokens)
        added, pools, _ = self._step(tokens, notes, scores, state, below)
        return added, pools

    def commit_step(self, state: StepState) -> None:
        """Commit the chunks of the rows where one has just ended."""
        _commit(self.config, state, self._written(state.opened.notes.unsqueeze(1)).squeeze(1))

    def step_state(self, cache_params: Cache) -> StepState:
        """The memory in a filled cache, for steps."""
        layer = cache_params.layers[self.layer_idx]
        packed, opened = layer.recurrent_states[_SLOT].clone(), layer.conv_states[_SLOT].clone()
        size = self.config.note_size
        pool = Pool(packed[:, :-1, :size], packed[:, :-1, size], _count(packed[:, :-1, size + 1 :]))
        return StepState(
            pool, OpenChunk(opened[:, :size].transpose(1, 2), opened[:, size]), _count(packed[:, -1, size + 1 :])
        )

    def _notes(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What normed tokens write: notes as projected, scores, and the scores' logits."""
        logits = at_least_float32(self.write_score(tokens).squeeze(-1))
        scores = torch.sigmoid(logits)
        return self.note(tokens), scores.masked_fill(scores <= self.config.write_threshold, 0.0), logits

    def _step(
        self, tokens: torch.Tensor, notes: torch.Tensor, scores: torch.Tensor, state: StepState, below: Sequence[Pool]
    ) -> tuple[torch.Tensor, Pool, torch.Tensor]:
        """One normed token of every row: what is added to it, and the pools it read with its weights."""
        places = state.read % self.config.chunk_size
        rows = torch.arange(len(tokens), device=tokens.device)
        state.opened.notes.index_put_((rows, places), notes[:, 0].to(state.opened.notes.dtype))
        state.opened.scores.index_put_((rows, places), scores[:, 0].to(state.opened.scores.dtype))
        state.read.add_(1)
        pools = Pool(*(part.unsqueeze(1) for part in state.pool))
        added, weights = self._read(tokens, tokens.unsqueeze(1), pools, below, None)
        return added, pools, weights

    def _read(
        self, tokens: torch.Tensor, grid: torch.Tensor, pools: Pool, below: Sequence[Pool], clock: Clock | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to normed tokens [B, T, H], which stand in the chunks of `grid`, and their weights; no clock: every
        row has one."""

        def placed(read: torch.Tensor) -> torch.Tensor:
            return read.flatten(1, 2) if clock is None else out_of_chunks(read, clock, tokens.shape[1])

        read, weights = self.token_reader(grid, [pools])
        added = self.token_fusion(tokens, placed(read))
        if self.reads_below:
            read, _ = self.layer_reader(grid, below)
            added = added + self.layer_fusion(tokens, placed(read))
        return added, weights

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the cached states without the batch: of the open chunk, and of the pool with the tokens read."""
        config = self.config
        return (config.note_size + 1, config.chunk_size), (config.pool_size + 1, config.note_size + 3)

    def _written(self, notes: torch.Tensor) -> torch.Tensor:
        """Projected notes [B, n, C, F] -> as they are committed."""
        return self.note_norm(pool_over_window(notes, self.config.pooling, self.config.pooling_window))

    def _commit_chunks(
        self, pool: Pool, opened: OpenChunk, notes: torch.Tensor, scores: torch.Tensor, clock: Clock
    ) -> tuple[Pool, Pool, OpenChunk]:
        """The pools [B, n, K, ...] that the chunks of a pass read, and the state behind the pass."""
        chunk = self.config.chunk_size
        raw = into_chunks(notes, clock, chunk, opened.notes)
        written_scores = into_chunks(scores, clock, chunk, opened.scores)
        positions = positions_of_chunks(clock, chunk, notes.device)
        index, present = best_before_each_chunk(
            _ranks(self.config, pool.scores, pool.positions), _ranks(self.config, written_scores, positions)
        )
        written = Pool(self._written(raw).to(notes.dtype), written_scores, positions)
        pools = pools_of_chunks(pool, written, index, present)
        complete = [after // chunk - read // chunk for after, read in zip(clock.after, clock.read, strict=True)]
        rows = torch.arange(len(notes), device=notes.device)
        last = torch.tensor([min(count, raw.shape[1] - 1) for count in complete], device=notes.device)
        # A row whose last chunk is complete has none open: behind its end the grid holds nothing only if there is a chunk.
        none_open = torch.tensor([after % chunk == 0 for after in clock.after], device=notes.device)[:, None]
        opened = OpenChunk(
            raw[rows, last].masked_fill(none_open.unsqueeze(-1), 0), written_scores[rows, last].masked_fill(none_open, 0)
        )
        return Pool(*(part[:, :-1] for part in pools)), after_the_last(pools, complete), opened

    def _state(self, cache_params: Cache | None, rows: int, notes: torch.Tensor, scores: torch.Tensor) -> StepState:
        """The memory before a pass: from the cache, or empty."""
        config = self.config
        if cache_params is not None and cache_params.has_previous_state(self.layer_idx, _SLOT):
            return self.step_state(cache_params)
        size, chunk = (config.pool_size, config.note_size), config.chunk_size
        dtype = state_dtype(notes)
        pool = Pool(
            notes.new_zeros(rows, *size, dtype=dtype),
            scores.new_zeros(rows, size[0]),
            torch.zeros(rows, size[0], dtype=torch.long, device=notes.device),
        )
        opened = OpenChunk(notes.new_zeros(rows, chunk, size[1], dtype=dtype), scores.new_zeros(rows, chunk))
        return StepState(pool, opened, torch.zeros(rows, dtype=torch.long, device=notes.device))

    def keep(self, cache_params: Cache | None, state: StepState) -> None:
        """Leave the state in the cache: the open chunk where convolution inputs stand, and where recurrent states do the
        pool, with the tokens read in its last row. All zeros are an empty memory, so that a cache can be reset."""
        if cache_params is None:
            return
        pool, opened, read = state
        dtype = state_dtype(pool.notes)
        packed = torch.cat(
            [pool.notes.to(dtype), pool.scores.to(dtype).unsqueeze(-1), _as_floats(pool.positions, dtype)], dim=-1
        )
        last_row = nn.functional.pad(_as_floats(read, dtype), (self.config.note_size + 1, 0)).unsqueeze(1)
        pending = torch.cat([opened.notes.to(dtype), opened.scores.to(dtype).unsqueeze(-1)], dim=-1).transpose(1, 2)
        cache_params.update_conv_state(pending, self.layer_idx, state_idx=_SLOT, conv_kernel_size=self.config.chunk_size)
        cache_params.update_recurrent_state(torch.cat([packed, last_row], dim=1), self.layer_idx, state_idx=_SLOT)

    def _last_reading(self, pools: Pool, weights: torch.Tensor, clock: Clock) -> Reading:
        """Of the pools and weights [B, n, h, T, K] of a pass what each row's last token had."""
        chunk = self.config.chunk_size
        rows = torch.arange(len(clock.read), device=weights.device)
        last = [max(read % chunk + length - 1, 0) for read, length in zip(clock.read, clock.lengths, strict=True)]
        # A decoding step has one chunk, with one place in it.
        place = torch.tensor([min(at // chunk, pools.scores.shape[1] - 1) for at in last], device=weights.device)
        column = torch.tensor([min(at % chunk, weights.shape[3] - 1) for at in last], device=weights.device)
        scores = pools.scores[rows, place]
        nothing_read = torch.tensor([length == 0 for length in clock.lengths], device=weights.device)[:, None]
        return Reading(
            pools.positions[rows, place].masked_fill(scores <= 0, -1),
            scores,
            weights[rows, place, :, column].mean(1).masked_fill(nothing_read, 0),
        )


def states_in_one(states: Sequence[StepState]) -> StepState:
    """Copies of the layers' states in one: [layers, B, ...]; `state_of_layer` gives views of it."""
    pools, opened, read = zip(*states, strict=True)
    return StepState(
        Pool(*(torch.stack(parts) for parts in zip(*pools, strict=True))),
        OpenChunk(*(_in_one(parts) for parts in zip(*opened, strict=True))),
        _in_one(read),
    )


def state_of_layer(state: StepState, layer: int) -> StepState:
    """Of states [layers, B, ...] one layer's, which changes with them."""
    pool, opened, read = state
    return StepState(Pool(*(part[layer] for part in pool)), OpenChunk(*(part[layer] for part in opened)), read[layer])


def new_in_one(layers: int, example: torch.Tensor) -> torch.Tensor:
    """[layers, ...] like the example, not filled. Every layer's part begins where 16 bytes do: Triton compiles a kernel anew
    for pointers that do not."""
    size = example.numel()
    return example.new_empty(layers, -(-size // 16) * 16)[:, :size].unflatten(1, example.shape)


def _in_one(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    whole = new_in_one(len(parts), parts[0])
    for mine, part in zip(whole, parts, strict=True):
        mine.copy_(part)
    return whole


def commit_layers(memories: Sequence[NoteMemory], state: StepState) -> None:
    """`NoteMemory.commit_step` of all layers at once, in as many operations as one takes.

    Args:
        memories: of one configuration.
        state: [layers, B, ...].
    """
    config, norm = memories[0].config, memories[0].note_norm
    notes = pool_over_window(state.opened.notes, config.pooling, config.pooling_window)
    weights = torch.stack([memory.note_norm.weight for memory in memories])
    normed = functional_call(norm, {"weight": torch.ones_like(norm.weight)}, (notes,))  # a norm weighs last, so layers can
    _commit(config, state, weights[:, None, None] * normed)


def _commit(config: Any, state: StepState, written: torch.Tensor) -> None:
    """Commit the chunks that have just ended, of rows in any number of dimensions: their notes [..., C, F] as committed."""
    chunk, rows = config.chunk_size, state.read.shape

    def flat(part: torch.Tensor) -> torch.Tensor:
        return part.flatten(0, len(rows) - 1)

    read, pool = flat(state.read), Pool(*(flat(part) for part in state.pool))
    ended = read % chunk == 0
    positions = ((read - chunk)[:, None] + torch.arange(chunk, device=read.device)).unsqueeze(1)
    scores = (flat(state.opened.scores) * ended[:, None]).unsqueeze(1)
    index, present = best_before_each_chunk(_ranks(config, pool.scores, pool.positions), _ranks(config, scores, positions))
    new = Pool(flat(written).unsqueeze(1).to(pool.notes.dtype), scores, positions)
    for part, chosen in zip(state.pool, pools_of_chunks(pool, new, index, present), strict=True):
        part.copy_(chosen[:, 1].unflatten(0, rows))
    ended = ended.unflatten(0, rows)
    state.opened.notes.masked_fill_(ended[..., None, None], 0)
    state.opened.scores.masked_fill_(ended[..., None], 0)


def _ranks(config: Any, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return priorities(scores, positions, config.write_rule, config.recency_weight, config.write_period, config.write_span)


def _as_floats(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """long [...] -> [..., 2], the inverse of `_count`; exact to 2^44."""
    return torch.stack([count // _COUNTED, count % _COUNTED], dim=-1).to(dtype)


def _count(floats: torch.Tensor) -> torch.Tensor:
    return (floats * floats.new_tensor([_COUNTED, 1], dtype=torch.float64)).sum(-1).long()


def tokens_read(cache_params: Cache) -> list[int]:
    """How many of its own tokens every row of a filled cache has read."""
    return _count(cache_params.layers[0].recurrent_states[_SLOT][:, -1, -2:]).tolist()

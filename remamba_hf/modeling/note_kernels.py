# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The memory's part of a decoding step, a token a row, in one or two kernels. Used without gradients, inside CUDA graphs.

    few rows     note_step, a kernel for each reader
    more         note_projections | note_reading

What a token reads changes only where a chunk ends, so keys and values of the notes are kept projected (`readable_notes`),
as are a layer's projections of a token in one matrix (`step_weights`). Both must be made anew when what they come from
changes: behind every commit, for all layers at once, and before steps begin.

As in decode_kernels.py, each function runs its Triton kernel where Triton can, and otherwise the torch reference beside it,
`<name>_naive`. For memories as `can_step` wants them; rounded where `NoteMemory.step` and `MemMambaBlock.mix` round.

Shapes: `B` rows, `H` hidden size, `F` note size, `h` heads of `d` channels, `C` tokens of a chunk, `R` readers of a layer
(1, or 2 if it reads layers below as well), `N` notes that a reader reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .decode_kernels import (
    _INTERPRETED,
    _KERNEL_DTYPES,
    _PROCESSORS,
    LinearPlan,
    _blocks,
    _check_shape,
    _inverse_rms,
    _kernel_takes,
    _launch,
    _normed,
    _power_of_two,
    _product,
    _weight_tile,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    linear_plan,
    tl,
)
from .note_memory import NoteMemory, NoteReader, new_in_one
from .note_pool import OpenChunk, Pool
from .precision import at_least_float32

FEW_ROWS = 8  # for which `note_step` has a kernel a reader, whose programs all project the token themselves
MOST_ELEMENTS = 1 << 15  # of the keys of one reader and row, which a program holds in registers
MOST_BYTES = 192 * 1024  # of what a program of `note_step` holds in registers
NOTES_AT_ONCE = 16  # kept notes are filled up to multiples of so many, which threads load together
_EMPTY = (0.0, 0.0, -torch.inf)  # key, value and bias of an empty slot


class StepWeights(NamedTuple):
    """A layer's weights as steps read them.

    norm: [H]; eps: of that norm.
    projection: [F + R F + R, H]: of the note, of the readers' queries, of their gates.
    gate_bias: [R].
    score_weight, score_bias: [H] and [1], of the write score.
    outputs: R of [H, F], each reader's last projection.
    sinks: R of [h].
    write_threshold, read_threshold: a score or gate of at most that is 0.
    """

    norm: torch.Tensor
    eps: float
    projection: torch.Tensor
    gate_bias: torch.Tensor
    score_weight: torch.Tensor
    score_bias: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    sinks: tuple[torch.Tensor, ...]
    write_threshold: float = 0.0
    read_threshold: float = 0.0


class ReadableNotes(NamedTuple):
    """Notes as one reader's attention takes them.

    keys, values: [B, F, N], projected, contiguous: with notes side by side a warp has all of a head's, and needs no other to
        weigh them.
    bias: [B, N] float32, what is added to logits: log score, -inf where the slot is empty.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class ReadingPlan(NamedTuple):
    """How `note_reading` and `note_step` are cut into programs, each for one row.

    outputs: channels of what is added to the token.
    warps: of 32 threads a program.
    inputs: of `note_step`: channels side by side in a warp, a power of two, while the query is projected.
    """

    outputs: int
    warps: int
    inputs: int = 128


def can_step(memory: NoteMemory) -> bool:
    """Whether the functions below do what a memory does: notes that stand for one token, read under a gate, and added before
    the mixer. That its layers are what their weights say is for the caller to know."""
    config = memory.config
    return config.fusion == "gated" and config.fusion_position == "pre" and config.pooling == "none"


def step_weights(memory: NoteMemory) -> StepWeights:
    """A layer's weights for steps: the projections are copies, the rest is the parameters' own."""
    readers, fusions = [memory.token_reader], [memory.token_fusion]
    if memory.reads_below:
        readers.append(memory.layer_reader)
        fusions.append(memory.layer_fusion)
    gates = [fusion.gate for fusion in fusions if fusion.gate is not None]  # `can_step`: all have one
    parts = [memory.note.weight, *(reader.query.weight for reader in readers), *(gate.weight for gate in gates)]
    return StepWeights(
        memory.norm.weight.detach(),
        memory.norm.eps,
        torch.cat(parts).detach(),
        torch.cat([gate.bias for gate in gates]).detach(),
        memory.write_score.weight[0].detach(),
        memory.write_score.bias.detach(),
        tuple(reader.output.weight.detach() for reader in readers),
        tuple(reader.sink.detach() for reader in readers),
        memory.config.write_threshold,
        memory.config.read_threshold,
    )


def renew_weights(weights: StepWeights, memory: NoteMemory) -> None:
    """Take the parameters' values as they are now; every tensor stays where it is."""
    for mine, theirs in zip(_tensors(weights), _tensors(step_weights(memory)), strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


class NotesOfReaders(NamedTuple):
    """What readers of one kind read in several layers, all equally many pools, so that it can be projected at once.

    readers: (layer, which of its readers) of each, n in all.
    sources: [n, G] long, the layers whose pools a reader reads, the nearest first.
    notes: [n, B, ...], with empty slots up to a multiple of `NOTES_AT_ONCE`.
    """

    readers: list[tuple[int, int]]
    sources: torch.Tensor
    notes: ReadableNotes


def notes_of_layers(memories: Sequence[NoteMemory], pool: Pool) -> list[NotesOfReaders]:
    """What all readers of all layers can read in pools [layers, B, K, ...]."""
    members: dict[tuple[bool, int], list[tuple[int, int, list[int]]]] = {}
    for layer, memory in enumerate(memories):
        for which, (reader, sources) in enumerate(readers_and_sources(memory)):
            kind = reader.layer_embedding is None, len(sources)
            members.setdefault(kind, []).append((layer, which, sources))
    groups = []
    for group in members.values():
        readers = [(layer, which) for layer, which, _ in group]
        sources_of_all = torch.tensor([sources for *_, sources in group], device=pool.scores.device)
        first = readable_notes(_readers(memories, readers[:1]), pool, sources_of_all[:1])
        missing = -first.bias.shape[-1] % NOTES_AT_ONCE
        notes = ReadableNotes(
            *(
                new_in_one(len(readers), F.pad(part[0], (0, missing))).fill_(empty)
                for part, empty in zip(first, _EMPTY, strict=True)
            )
        )
        groups.append(NotesOfReaders(readers, sources_of_all, notes))
        renew_notes(groups[-1], memories, pool)
    return groups


def renew_notes(group: NotesOfReaders, memories: Sequence[NoteMemory], pool: Pool) -> None:
    """Take what the pools hold now, by the weights as they are now; every tensor stays where it is."""
    notes = readable_notes(_readers(memories, group.readers), pool, group.sources)
    for mine, theirs in zip(group.notes, notes, strict=True):
        mine[..., : theirs.shape[-1]].copy_(theirs)


def notes_by_layer(groups: Sequence[NotesOfReaders], layers: int) -> list[list[ReadableNotes]]:
    """For `note_step`: of each layer what its readers read, in the order of its `StepWeights`; views."""
    notes: list[dict[int, ReadableNotes]] = [{} for _ in range(layers)]
    for group in groups:
        for at, (layer, which) in enumerate(group.readers):
            notes[layer][which] = ReadableNotes(*(part[at] for part in group.notes))
    return [[of_layer[which] for which in sorted(of_layer)] for of_layer in notes]


def readers_and_sources(memory: NoteMemory) -> list[tuple[NoteReader, list[int]]]:
    """A layer's readers, in the order of its `StepWeights`, and the layers whose pools each reads, the nearest first."""
    layer, group = memory.layer_idx, memory.config.cross_layer_group
    readers = [(memory.token_reader, [layer])]
    if memory.reads_below:
        readers.append((memory.layer_reader, list(range(layer - 1, max(layer - group, 0) - 1, -1))))
    return readers


def _readers(memories: Sequence[NoteMemory], places: Sequence[tuple[int, int]]) -> list[NoteReader]:
    return [readers_and_sources(memories[layer])[which][0] for layer, which in places]


def readable_notes(readers: Sequence[NoteReader], pool: Pool, sources: torch.Tensor) -> ReadableNotes:
    """What readers take of pools [layers, B, K, ...]: [n, B, F, N] and [n, B, N], N being all the K of a reader together.

    The weights are put together anew each time, a small copy: so there are none to keep and to renew.

    Args:
        readers: n, all with or all without embeddings of layers.
        sources: [n, G] long, the layers whose pools each reads.
    """
    notes = pool.notes.to(readers[0].key.weight.dtype)[sources]  # [n, G, B, K, F]
    embeddings = [reader.layer_embedding for reader in readers if reader.layer_embedding is not None]
    if embeddings:
        stacked = torch.stack([embedding[: sources.shape[1]] for embedding in embeddings])
        notes = notes + stacked.to(notes.dtype)[:, :, None, None]
    joined = notes.transpose(1, 2).flatten(2, 3)
    size = joined.shape[-1]
    weights = torch.stack([layer.weight for reader in readers for layer in (reader.key, reader.value)])
    weights = weights.view(len(readers), 2 * size, size)
    projected = torch.bmm(joined.flatten(1, 2), weights.transpose(1, 2)).unflatten(1, joined.shape[1:3])
    bias = at_least_float32(pool.scores[sources].transpose(1, 2).flatten(2)).log()
    keys, values = projected.transpose(2, 3).split(size, dim=2)
    return ReadableNotes(keys, values, bias)


def readable_notes_naive(reader: NoteReader, pools: Sequence[Pool]) -> ReadableNotes:
    """Reference of `readable_notes`: one reader, by its modules, in the order of `NoteReader.forward`; pools [B, K, ...]."""
    dtype = reader.key.weight.dtype
    notes = [pool.notes.to(dtype) for pool in pools]
    if reader.layer_embedding is not None:
        notes = [note + layer.to(dtype) for note, layer in zip(notes, reader.layer_embedding[: len(notes)], strict=True)]
    joined = torch.cat(notes, dim=1)
    scores = at_least_float32(torch.cat([pool.scores for pool in pools], dim=1))
    bias = scores.clamp_min(torch.finfo(scores.dtype).tiny).log().masked_fill(scores <= 0, -torch.inf)
    return ReadableNotes(reader.key(joined).transpose(1, 2), reader.value(joined).transpose(1, 2), bias)


# Projections of a token


def projections_plan(rows: int, outputs: int, inputs: int, item_size: int = 2) -> LinearPlan:
    """The cut of `note_projections`: a small matrix, which rows may well read again, so that there are many programs."""
    if rows <= FEW_ROWS:
        return linear_plan(1, outputs, inputs, item_size)
    return LinearPlan(16, 16, min(max(_power_of_two(inputs), 16), 128 if item_size == 2 else 32), 4)


def note_projections(
    hidden_states: torch.Tensor,
    weights: StepWeights,
    opened: OpenChunk,
    read: torch.Tensor,
    plan: LinearPlan | None = None,
) -> torch.Tensor:
    """Writes a token's note and write score into the open chunk, and projects it for the readers.

    Args:
        hidden_states: [B, H], not normed, any row stride.
        opened: [B, C, F] and [B, C], any strides; place `read % C` of each row is overwritten.
        read: [B] long, tokens that the rows have read before.
        plan: how to cut the work; None: `projections_plan`'s.

    Returns:
        [B, R F + R] in the projection's dtype: the readers' queries, and their gates before the sigmoid.
    """
    rows, inputs = hidden_states.shape
    size, readers = _check_step(hidden_states, weights, opened, read)
    if not _projected_by_kernel(hidden_states, weights, opened, read):
        return note_projections_naive(hidden_states, weights, opened, read)
    outputs = weights.projection.shape[0]
    if plan is None:
        plan = projections_plan(rows, outputs, inputs, weights.projection.element_size())
    projected = hidden_states.new_empty(rows, outputs - size, dtype=weights.projection.dtype)
    _launch(
        _note_projections_kernel,
        (_blocks(outputs, plan.outputs) + 1, _blocks(rows, plan.rows)),
        plan.warps,
        *(hidden_states, weights.norm, weights.projection, weights.gate_bias, weights.score_weight, weights.score_bias),
        *(*opened, read, projected, rows, hidden_states.stride(0), *opened.notes.stride(), *opened.scores.stride()),
        *(weights.eps, weights.write_threshold),
        INPUTS=inputs,
        NOTE=size,
        READERS=readers,
        CHUNK=opened.scores.shape[1],
        BLOCK_ROWS=plan.rows,
        BLOCK_OUT=plan.outputs,
        BLOCK_IN=plan.inputs,
        BLOCK_NORM=min(_power_of_two(inputs), 4096) if plan.rows == 1 else plan.inputs,
        STAGES=plan.stages,
        INTERPRETED=_INTERPRETED,
    )
    return projected


def note_projections_naive(
    hidden_states: torch.Tensor, weights: StepWeights, opened: OpenChunk, read: torch.Tensor
) -> torch.Tensor:
    """Reference of `note_projections`."""
    size, readers = opened.notes.shape[2], len(weights.gate_bias)
    x = at_least_float32(hidden_states)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weights.eps)
    tokens = weights.norm * x.to(weights.norm.dtype)
    bias = F.pad(weights.gate_bias, (len(weights.projection) - readers, 0))
    projected = F.linear(tokens, weights.projection, bias)
    score = at_least_float32(weights.score_weight).unsqueeze(0), at_least_float32(weights.score_bias)
    scores = torch.sigmoid(F.linear(at_least_float32(tokens), *score))[:, 0]
    rows, places = torch.arange(len(read), device=read.device), read % opened.scores.shape[1]
    opened.notes.index_put_((rows, places), projected[:, :size].to(opened.notes.dtype))
    scores = scores.masked_fill(scores <= weights.write_threshold, 0.0)
    opened.scores.index_put_((rows, places), scores.to(opened.scores.dtype))
    return projected[:, size:].contiguous()


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _products(
    tile,
    x,
    norm_weight,
    weight,
    scale,
    output,
    row,
    rows,
    x_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The normed x times some outputs of a weight, of which `tile` is the first: [rows, outputs] in float32."""
    DOT: tl.constexpr = row.shape[0] > 1
    column = tl.arange(0, BLOCK_IN)
    part = _normed(x, None, norm_weight, row, rows, column, INPUTS, scale, x_stride, 0)
    if DOT:
        total = tl.zeros([output.shape[0], row.shape[0]], tl.float32)
    else:
        total = tl.zeros([output.shape[0], BLOCK_IN], tl.float32)
    total = _product(tile, part, total, DOT, False, INTERPRETED)
    for start in tl.range(BLOCK_IN, INPUTS, BLOCK_IN, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_IN)
        tile = _weight_tile(weight, output, column, INPUTS, INPUTS, OUTPUTS)
        part = _normed(x, None, norm_weight, row, rows, column, INPUTS, scale, x_stride, 0)
        total = _product(tile, part, total, DOT, False, INTERPRETED)
    if DOT:
        y = tl.trans(total)
    else:
        y = tl.sum(total, 1)[None, :]
    return y


@jit
def _dot(vector, x, norm_weight, scale, row, rows, x_stride, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The normed x times one vector: [rows] in float32."""
    total = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        part = _normed(x, None, norm_weight, row, rows, column, INPUTS, scale, x_stride, 0)
        total += part.to(tl.float32) * tl.load(vector + column, mask=column < INPUTS, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@jit
def _write_score(
    x,
    norm_weight,
    score_weight,
    score_bias,
    scores,
    place,
    scale,
    row,
    rows,
    x_stride,
    score_row,
    score_place,
    threshold,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores the token for the place of each row in its chunk."""
    logit = _dot(score_weight, x, norm_weight, scale, row, rows, x_stride, INPUTS, BLOCK)
    score = _sigmoid(logit + tl.load(score_bias).to(tl.float32))
    score = tl.where(score <= threshold, 0.0, score)
    at = scores + row.to(tl.int64) * score_row + place * score_place
    tl.store(at, score.to(scores.dtype.element_ty), mask=row < rows)


@jit
def _note_projections_kernel(
    x,
    norm_weight,
    weight,
    gate_bias,
    score_weight,
    score_bias,
    notes,
    scores,
    read,
    projected,
    rows,
    x_stride,
    note_row,
    note_place,
    note_channel,
    score_row,
    score_place,
    eps,
    write_threshold,
    INPUTS: tl.constexpr,
    NOTE: tl.constexpr,
    READERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    OUTPUTS: tl.constexpr = (1 + READERS) * NOTE + READERS
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_OUT - 1) // BLOCK_OUT
    block = tl.program_id(0)
    output = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = _weight_tile(weight, output, tl.arange(0, BLOCK_IN), INPUTS, INPUTS, OUTPUTS)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.load(read + row, mask=row < rows, other=0) % CHUNK
    scale = _inverse_rms(x, None, row, rows, 0, x_stride, 0, eps, INPUTS, BLOCK_NORM, STAGES)
    if block == BLOCKS:
        _write_score(
            x,
            norm_weight,
            score_weight,
            score_bias,
            scores,
            place,
            scale,
            row,
            rows,
            x_stride,
            score_row,
            score_place,
            write_threshold,
            INPUTS,
            BLOCK_NORM,
        )
    else:
        y = _products(
            tile, x, norm_weight, weight, scale, output, row, rows, x_stride, INPUTS, OUTPUTS, BLOCK_IN, STAGES, INTERPRETED
        )
        gate = output - (OUTPUTS - READERS)
        y += tl.load(gate_bias + gate, mask=(gate >= 0) & (gate < READERS), other=0.0).to(tl.float32)[None, :]
        y = y.to(weight.dtype.element_ty)
        here = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
        at = row.to(tl.int64)[:, None]
        note = notes + at * note_row + place[:, None] * note_place + output.to(tl.int64)[None, :] * note_channel
        tl.store(note, y.to(notes.dtype.element_ty), mask=here & (output < NOTE)[None, :])
        rest = projected + at * (OUTPUTS - NOTE) + (output - NOTE)[None, :]
        tl.store(rest, y, mask=here & (output >= NOTE)[None, :])


# Reading


def reading_plan(rows: int, channels: int, elements: int) -> ReadingPlan:
    """The cut of `note_reading` for readers of up to `elements` numbers in keys: as many channels a program as leave every
    multiprocessor one, since each program computes the attention anew."""
    block = min(max(_power_of_two(channels), 16), 256)
    while block > 32 and rows * _blocks(channels, block) < _PROCESSORS:
        block //= 2
    return ReadingPlan(block, min(max(elements // 1024, 4), 16))


def note_reading(
    hidden_states: torch.Tensor,
    projected: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    read: torch.Tensor,
    out: torch.Tensor | None = None,
    plan: ReadingPlan | None = None,
) -> torch.Tensor:
    """A token and what it reads, behind `note_projections`; arXiv 2510.03279, Eq. 6, 7 and 12.

        hidden + sum over readers of sigmoid(gate) W_o sum_i a_i v_i   a = softmax of { q . k_i / sqrt(d) + bias_i } and sink

    Args:
        hidden_states: [B, H], any row stride.
        projected: [B, R F + R], as `note_projections` returns it.
        notes: what each of the R readers reads.
        read: [B] long; grows by 1.
        out: [B, H], in the dtype of the result; not `hidden_states`. None: a new tensor.
        plan: how to cut the work; None: `reading_plan`'s.

    Returns:
        [B, H] in the dtype of the sum of hidden states and weights.
    """
    rows, channels = hidden_states.shape
    _check_reading(hidden_states, weights, notes, read, out)
    _check_shape("projected", projected, (rows, sum(output.shape[1] + 1 for output in weights.outputs)))
    if not (_read_by_kernel(hidden_states, weights, notes, read, out, projected) and projected.is_contiguous()):
        return note_reading_naive(hidden_states, projected, weights, notes, read, out)
    if plan is None:
        plan = reading_plan(rows, channels, _elements(weights, notes))
    out = _new_result(hidden_states, weights) if out is None else out
    _launch(
        _note_reading_kernel,
        (_blocks(channels, plan.outputs), rows),
        plan.warps,
        *(hidden_states, projected, *_reader_arguments(weights, notes), read, out),
        *(hidden_states.stride(0), out.stride(0), weights.read_threshold),
        CHANNELS=channels,
        **_reader_constants(weights, notes[0], plan.warps),
        BELOW=notes[-1].keys.shape[2],
        BLOCK_BELOW=_power_of_two(notes[-1].keys.shape[2]),
        BLOCK=plan.outputs,
    )
    return out


def note_reading_naive(
    hidden_states: torch.Tensor,
    projected: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    read: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `note_reading`."""
    readers, size = len(notes), weights.outputs[0].shape[1]
    added = []
    for reader, (keys, values, bias) in enumerate(notes):
        heads = len(weights.sinks[reader])
        query = projected[:, reader * size : (reader + 1) * size].unflatten(1, (heads, 1, -1))
        keys, values = (part.unflatten(1, (heads, -1)) for part in (keys, values))
        logits = at_least_float32(query @ keys) / query.shape[-1] ** 0.5 + bias[:, None, None]
        sink = at_least_float32(weights.sinks[reader]).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        attention = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
        taken = F.linear((attention.to(values.dtype) @ values.transpose(2, 3)).flatten(1), weights.outputs[reader])
        gate = torch.sigmoid(at_least_float32(projected[:, readers * size + reader, None]))
        added.append(taken * gate.masked_fill(gate <= weights.read_threshold, 0.0).to(taken.dtype))
    read.add_(1)
    result = hidden_states + (added[0] if readers == 1 else added[0] + added[1])
    return result if out is None else out.copy_(result)


@jit
def _notes(
    keys,
    values,
    bias,
    row,
    NOTES: tl.constexpr,
    BLOCK_NOTES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
):
    """A row's keys and values [heads, size, notes], and bias [notes].

    A warp should have all notes of a head, and few heads: where notes alone fill its threads, the dimension before them is
    the next to be spread over warps, and the first one over what is left.
    """
    note = tl.arange(0, BLOCK_NOTES)
    head = tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_SIZE)
    if not HEADS_FIRST:
        here = (column < SIZE)[:, None, None] & (head < HEADS)[None, :, None] & (note < NOTES)[None, None, :]
        place = ((row * HEADS + head)[None, :, None] * SIZE + column[:, None, None]) * NOTES + note[None, None, :]
        key = tl.permute(tl.load(keys + place, mask=here, other=0.0), (1, 0, 2))
        value = tl.permute(tl.load(values + place, mask=here, other=0.0), (1, 0, 2))
    else:
        here = (head < HEADS)[:, None, None] & (column < SIZE)[None, :, None] & (note < NOTES)[None, None, :]
        place = ((row * HEADS + head)[:, None, None] * SIZE + column[None, :, None]) * NOTES + note[None, None, :]
        key = tl.load(keys + place, mask=here, other=0.0)
        value = tl.load(values + place, mask=here, other=0.0)
    return key, value, tl.load(bias + row * NOTES + note, mask=note < NOTES, other=float("-inf"))


@jit
def _sinks(sink, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    head = tl.arange(0, BLOCK_HEADS)
    return tl.load(sink + head, mask=head < HEADS, other=0.0).to(tl.float32)


@jit
def _padded(HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The channels of a note at the places of [heads, size], both filled up to powers of two, and which places have one."""
    place = tl.arange(0, BLOCK_HEADS * BLOCK_SIZE)
    here = (place // BLOCK_SIZE < HEADS) & (place % BLOCK_SIZE < SIZE)
    return place // BLOCK_SIZE * SIZE + place % BLOCK_SIZE, here


@jit
def _output_tile(
    weight,
    channel,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Of a reader's last projection [channels, heads * size]."""
    part, is_part = _padded(HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
    here = (channel < CHANNELS)[:, None] & is_part[None, :]
    return tl.load(weight + channel[:, None] * (HEADS * SIZE) + part[None, :], mask=here, other=0.0)


@jit
def _added(query, gate, key, value, bias, tile, nothing, threshold, SIZE: tl.constexpr):
    """What a reader adds to some channels, in float32 and rounded: query [heads, size], gate a number before its sigmoid,
    nothing [heads] the sinks."""
    dtype = key.dtype
    logits = tl.sum(key.to(tl.float32) * query.to(tl.float32)[:, :, None], 1).to(dtype).to(tl.float32)
    logits = logits / (SIZE**0.5) + bias[None, :]
    highest = tl.maximum(tl.max(logits, 1), nothing)
    weights = tl.exp(logits - highest[:, None])
    share = 1.0 / (tl.sum(weights, 1) + tl.exp(nothing - highest))
    weights = (weights * share[:, None]).to(dtype).to(tl.float32)
    taken = tl.sum(weights[:, None, :] * value.to(tl.float32), 2).to(dtype).to(tl.float32)
    y = tl.sum(tile.to(tl.float32) * tl.reshape(taken, [tile.shape[1]])[None, :], 1).to(dtype).to(tl.float32)
    gate = _sigmoid(gate.to(dtype).to(tl.float32))
    gate = tl.where(gate <= threshold, 0.0, gate).to(dtype).to(tl.float32)
    return (y * gate).to(dtype).to(tl.float32)


@jit
def _projected_query(
    projected, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """A row's query [heads, size]."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    return tl.load(projected + head * SIZE + column, mask=(head < HEADS) & (column < SIZE), other=0.0)


@jit
def _count_token(read, row):
    count = tl.load(read + row)
    tl.debug_barrier()  # no thread may write what another has yet to read
    tl.store(read + row, count + 1)


@jit
def _note_reading_kernel(
    x,
    projected,
    keys,
    values,
    bias,
    sink,
    output_weight,
    below_keys,
    below_values,
    below_bias,
    below_sink,
    below_output_weight,
    read,
    out,
    x_stride,
    out_stride,
    read_threshold,
    CHANNELS: tl.constexpr,
    NOTES: tl.constexpr,
    BLOCK_NOTES: tl.constexpr,
    BELOW: tl.constexpr,
    BLOCK_BELOW: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    NOTE: tl.constexpr = HEADS * SIZE
    READERS: tl.constexpr = 1 if below_keys is None else 2
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The kernel before writes nothing of this, so that it comes while that kernel runs out.
    key, value, add = _notes(keys, values, bias, row, NOTES, BLOCK_NOTES, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE, HEADS_FIRST)
    tile = _output_tile(output_weight, channel, CHANNELS, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
    nothing = _sinks(sink, HEADS, BLOCK_HEADS)
    if below_keys is not None:
        below_key, below_value, below_add = _notes(
            below_keys, below_values, below_bias, row, BELOW, BLOCK_BELOW, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE, True
        )
        below_tile = _output_tile(below_output_weight, channel, CHANNELS, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
        below_nothing = _sinks(below_sink, HEADS, BLOCK_HEADS)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    known = channel < CHANNELS
    hidden = tl.load(x + row * x_stride + channel, mask=known, other=0.0).to(tl.float32)
    mine = projected + row * (READERS * (NOTE + 1))
    query = _projected_query(mine, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
    gate = tl.load(mine + READERS * NOTE)
    if below_keys is not None:
        below_query = _projected_query(mine + NOTE, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
        below_gate = tl.load(mine + READERS * NOTE + 1)
    added = _added(query, gate, key, value, add, tile, nothing, read_threshold, SIZE)
    if below_keys is not None:
        added += _added(
            below_query,
            below_gate,
            below_key,
            below_value,
            below_add,
            below_tile,
            below_nothing,
            read_threshold,
            SIZE,
        )
        added = added.to(key.dtype).to(tl.float32)
    tl.store(out + row * out_stride + channel, (hidden + added).to(out.dtype.element_ty), mask=known)
    if tl.program_id(0) == 0:
        _count_token(read, row)


# Both


def step_plan(rows: int, channels: int, weights: StepWeights, notes: ReadableNotes) -> ReadingPlan | None:
    """The cut of `note_step`'s kernel for one reader; None: two kernels for all of them are better.

    A program holds everything but the token in registers when that comes: what is left is a chain of sums. One of a layer's
    first reader should leave room for the programs of the kernel before, or it could not start beside them and fetch.
    """
    elements = _elements(weights, [notes])
    held = weights.projection.element_size() * (weights.outputs[0].shape[1] * (channels + 64) + 2 * elements)
    if rows > FEW_ROWS or held > MOST_BYTES:
        return None
    outputs = min(max(_power_of_two(channels), 16), 64 if rows <= 4 else 128)
    return ReadingPlan(outputs, 8 if held <= MOST_BYTES * 3 // 4 else 16)


def note_step(
    hidden_states: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    opened: OpenChunk,
    read: torch.Tensor,
    out: torch.Tensor | None = None,
    plan: ReadingPlan | None = None,
) -> torch.Tensor:
    """A layer's memory in a step: a token and what it reads, its note in the open chunk; see `NoteMemory.step`.

    The same as `note_projections` and `note_reading` one after the other, whose arguments these are. In a kernel for each
    reader if there is a `plan`, or one by `step_plan`.

    Returns:
        [B, H] in the dtype of the sum of hidden states and weights.
    """
    rows, channels = hidden_states.shape
    _check_step(hidden_states, weights, opened, read)
    _check_reading(hidden_states, weights, notes, read, out)
    by_kernel = _projected_by_kernel(hidden_states, weights, opened, read) and _read_by_kernel(
        hidden_states, weights, notes, read, out
    )
    chosen = [plan or step_plan(rows, channels, weights, part) for part in notes]
    plans = [cut for cut in chosen if cut is not None]
    if not by_kernel or len(plans) < len(notes):
        projected = note_projections(hidden_states, weights, opened, read)
        return note_reading(hidden_states, projected, weights, notes, read, out)
    out = _new_result(hidden_states, weights) if out is None else out
    readers, earlier = len(notes), None
    for reader, (part, sink, output, cut) in enumerate(zip(notes, weights.sinks, weights.outputs, plans, strict=True)):
        last = reader == readers - 1
        result = out if last else weights.projection.new_empty(rows, channels)
        _launch(
            _note_step_kernel,
            (_blocks(channels, cut.outputs) + (reader == 0), rows),
            cut.warps,
            *(hidden_states, weights.norm, weights.projection, weights.gate_bias, weights.score_weight, weights.score_bias),
            *(*part, sink, output, *opened, read, earlier, result),
            *(hidden_states.stride(0), *opened.notes.stride(), *opened.scores.stride(), result.stride(0)),
            *(weights.eps, weights.write_threshold, weights.read_threshold),
            CHANNELS=channels,
            CHUNK=opened.scores.shape[1],
            READERS=readers,
            READER=reader,
            **_reader_constants(weights, part, cut.warps),
            BLOCK=cut.outputs,
            BLOCK_IN=min(cut.inputs, _power_of_two(channels)),
            PARTS=_power_of_two(_blocks(channels, cut.inputs)),
        )
        earlier = result
    return out


def note_step_naive(
    hidden_states: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    opened: OpenChunk,
    read: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `note_step`."""
    projected = note_projections_naive(hidden_states, weights, opened, read)
    return note_reading_naive(hidden_states, projected, weights, notes, read, out)


@jit
def _note_step_kernel(
    x,
    norm_weight,
    weight,
    gate_bias,
    score_weight,
    score_bias,
    keys,
    values,
    bias,
    sink,
    output_weight,
    notes,
    scores,
    read,
    earlier,
    out,
    x_stride,
    note_row,
    note_place,
    note_channel,
    score_row,
    score_place,
    out_stride,
    eps,
    write_threshold,
    read_threshold,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    READERS: tl.constexpr,
    READER: tl.constexpr,
    NOTES: tl.constexpr,
    BLOCK_NOTES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One reader's part. The first one's kernel has a program more, which writes the note; the last one's adds to the token.

    There is no loop, and the token's channels are [parts, columns], so that a warp has all channels of the outputs that it
    projects and few threads share each: a sum over warps costs as much as hundreds of products.
    """
    NOTE: tl.constexpr = HEADS * SIZE
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    block = tl.program_id(0)  # the last one of the first reader writes the note
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, PARTS)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    known_column = column < CHANNELS
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < CHANNELS
    part, is_part = _padded(HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)

    # The kernel before writes nothing of this, so that it comes while that kernel runs out.
    first = tl.where(block == BLOCKS, 0, (1 + READER) * NOTE)
    output = tl.minimum(first + part, (1 + READERS) * NOTE - 1)
    weight_tile = tl.load(
        weight + output[:, None, None] * CHANNELS + column[None, :, :], mask=known_column[None, :, :], other=0.0
    )
    key, value, add = _notes(keys, values, bias, row, NOTES, BLOCK_NOTES, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE, HEADS_FIRST)
    tile = _output_tile(output_weight, channel, CHANNELS, HEADS, BLOCK_HEADS, SIZE, BLOCK_SIZE)
    nothing = _sinks(sink, HEADS, BLOCK_HEADS)
    norm = tl.load(norm_weight + column, mask=known_column, other=0.0)
    if READER == 0 and block == BLOCKS:
        vector = tl.load(score_weight + column, mask=known_column, other=0.0).to(tl.float32)
        logit = tl.load(score_bias).to(tl.float32)
    else:
        gates = weight + ((1 + READERS) * NOTE + READER) * CHANNELS
        vector = tl.load(gates + column, mask=known_column, other=0.0).to(tl.float32)
        logit = tl.load(gate_bias + READER).to(tl.float32)
    if DEPENDENT:
        if READER == 0:
            gdc_wait()
        # A later reader's kernel starts when the first one's programs all know the token to be written: it runs beside that
        # kernel, and waits only for what it has to add to. The cache of its multiprocessor may be older, hence ".cg" below.
        gdc_launch_dependents()

    place = x + row * x_stride
    value_of_token = tl.load(place + column, mask=known_column, other=0.0, cache_modifier=".cg").to(tl.float32)
    hidden = tl.load(place + channel, mask=known, other=0.0, cache_modifier=".cg").to(tl.float32)
    scale = tl.rsqrt(tl.sum(value_of_token * value_of_token) / CHANNELS + eps)
    token = (value_of_token * scale).to(norm.dtype).to(tl.float32)
    token = (norm.to(tl.float32) * token).to(norm.dtype).to(tl.float32)
    logit += tl.sum(token * vector)
    # Parts beyond the end are known when this is compiled, and adding -0 to a sum is nothing to be done.
    nought = tl.zeros([1, 1, 1], tl.float32) * -1.0
    products = tl.where(known_column[None, :, :], weight_tile.to(tl.float32) * token[None, :, :], nought)
    y = tl.sum(tl.sum(products, 1), 1).to(weight.dtype.element_ty)

    if READER == 0 and block == BLOCKS:
        count = tl.load(read + row)
        at = count % CHUNK
        note = notes + row * note_row + at * note_place + part.to(tl.int64) * note_channel
        tl.store(note, y.to(notes.dtype.element_ty), mask=is_part)
        score = _sigmoid(logit)
        score = tl.where(score <= write_threshold, 0.0, score)
        tl.store(scores + row * score_row + at * score_place, score.to(scores.dtype.element_ty))
        tl.debug_barrier()  # no thread may write what another has yet to read
        tl.store(read + row, count + 1)
    else:
        query = tl.reshape(y, [BLOCK_HEADS, BLOCK_SIZE])
        added = _added(query, logit, key, value, add, tile, nothing, read_threshold, SIZE)
        if earlier is not None:
            if DEPENDENT:
                gdc_wait()
            before = tl.load(earlier + row * CHANNELS + channel, mask=known, other=0.0).to(tl.float32)
            added = (before + added).to(earlier.dtype.element_ty).to(tl.float32)
        if READER == READERS - 1:
            added += hidden
        tl.store(out + row * out_stride + channel, added.to(out.dtype.element_ty), mask=known)


# What they share


def _check_step(hidden_states: torch.Tensor, weights: StepWeights, opened: OpenChunk, read: torch.Tensor) -> tuple[int, int]:
    """The size of a note, and the number of readers."""
    rows, channels = hidden_states.shape
    size, readers = opened.notes.shape[2], len(weights.outputs)
    _check_shape("norm", weights.norm, (channels,))
    _check_shape("projection", weights.projection, ((1 + readers) * size + readers, channels))
    _check_shape("gate_bias", weights.gate_bias, (readers,))
    _check_shape("score_weight", weights.score_weight, (channels,))
    _check_shape("score_bias", weights.score_bias, (1,))
    _check_shape("opened.notes", opened.notes, (rows, opened.notes.shape[1], size))
    _check_shape("opened.scores", opened.scores, (rows, opened.notes.shape[1]))
    _check_shape("read", read, (rows,))
    return size, readers


def _check_reading(
    hidden_states: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    read: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    rows, channels = hidden_states.shape
    size = weights.outputs[0].shape[1]
    if not len(notes) == len(weights.outputs) == len(weights.sinks):
        raise ValueError(f"{len(weights.outputs)} readers need notes for each, got {len(notes)}.")
    for output, part in zip(weights.outputs, notes, strict=True):
        _check_shape("output", output, (channels, size))
        _check_shape("keys", part.keys, (rows, size, part.keys.shape[2]))
        _check_shape("values", part.values, tuple(part.keys.shape))
        _check_shape("bias", part.bias, (rows, part.keys.shape[2]))
    _check_shape("read", read, (rows,))
    _check_shape("out", out, (rows, channels))


def _projected_by_kernel(hidden_states: torch.Tensor, weights: StepWeights, opened: OpenChunk, read: torch.Tensor) -> bool:
    return (
        _kernel_takes(hidden_states, *_of_projections(weights), opened.scores)
        and opened.notes.dtype in _KERNEL_DTYPES
        and read.dtype == torch.long
        and read.is_contiguous()
        and weights.projection.is_contiguous()
        and weights.gate_bias.dtype == weights.projection.dtype
    )


def _read_by_kernel(
    hidden_states: torch.Tensor,
    weights: StepWeights,
    notes: Sequence[ReadableNotes],
    read: torch.Tensor,
    out: torch.Tensor | None,
    *others: torch.Tensor,
) -> bool:
    parts = [tensor for part in notes for tensor in part]
    return (
        _kernel_takes(hidden_states, *weights.outputs, *weights.sinks, *parts, out, *others)
        and read.dtype == torch.long
        and read.is_contiguous()
        and all(tensor.is_contiguous() for tensor in (*parts, *weights.outputs, *weights.sinks))
        and _elements(weights, notes) <= MOST_ELEMENTS
    )


def _of_projections(weights: StepWeights) -> tuple[torch.Tensor, ...]:
    return weights.norm, weights.projection, weights.gate_bias, weights.score_weight, weights.score_bias


def _tensors(weights: StepWeights) -> tuple[torch.Tensor, ...]:
    return *_of_projections(weights), *weights.outputs, *weights.sinks


def _elements(weights: StepWeights, notes: Sequence[ReadableNotes]) -> int:
    """Numbers in the keys of the reader with most, as a program holds them."""
    heads, size = len(weights.sinks[0]), weights.outputs[0].shape[1]
    return max(_power_of_two(part.keys.shape[2]) for part in notes) * _power_of_two(heads) * _power_of_two(size // heads)


def _new_result(hidden_states: torch.Tensor, weights: StepWeights) -> torch.Tensor:
    dtype = torch.promote_types(hidden_states.dtype, weights.outputs[0].dtype)
    return torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)


def _reader_arguments(weights: StepWeights, notes: Sequence[ReadableNotes]) -> list[torch.Tensor | None]:
    """Keys, values, bias, sink and last projection of both readers; None for the one that is not there."""
    arguments: list[torch.Tensor | None] = []
    for part, sink, output in zip(notes, weights.sinks, weights.outputs, strict=True):
        arguments += [*part, sink, output]
    return arguments + [None] * (10 - len(arguments))


def _reader_constants(weights: StepWeights, notes: ReadableNotes, warps: int) -> dict[str, int]:
    heads, size = len(weights.sinks[0]), weights.outputs[0].shape[1]
    block = _power_of_two(notes.keys.shape[2])
    return {
        "NOTES": notes.keys.shape[2],
        "BLOCK_NOTES": block,
        "HEADS": heads,
        "BLOCK_HEADS": _power_of_two(heads),
        "SIZE": size // heads,
        "BLOCK_SIZE": _power_of_two(size // heads),
        "HEADS_FIRST": warps < 16 or block >= 256,
    }

# SPDX-License-Identifier: Apache-2.0
"""Prompts on a GPU: a pass over a chunk is captured as a CUDA graph, where the device reads faster than Python launches.

What Python needs for a pass depends on the number of layers alone: for 64 of them about as long as an H100 needs to read
6,000 tokens. A graph has one shape. So a chunk is padded to the next of a few lengths, behind its tokens, where pads leave
the states as they are; a chunk that begins a text begins at states of zeros, which are the same as none.

Shapes: `B` rows, `T` tokens of a chunk, `C` tokens of the graph, `H` hidden size.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .decode_graph import (
    CapturedGraphs,
    Survey,
    captured,
    copy_tensors,
    kept_for,
    on_side_stream,
    ordinary_tensors,
    tensors_of,
    zero_tensors,
)
from .precision import sent

MOST_TOKENS = 8192  # of all rows of a chunk; Python is fast enough for more
TAKES_AS_LONG = 6144  # tokens that an H100 reads while Python launches a pass: up to there pads cost nothing
LENGTHS = (128, 256, 512, *range(1024, MOST_TOKENS + 1, 1024))
FEWEST_SLOTS = 64  # for kept vectors
MOST_ROWS = 8
MOST_GRAPHS = 24  # of one model; they share the memory for what is computed on the way
MOST_STATES = 12  # rows whose states all graphs of a model have; those of as many rows share them
_REMEMBERED = 256  # shapes that were wanted once


class ChunkShape(NamedTuple):
    """What a graph is captured for.

    rows, tokens: B and C.
    slots: kept vectors that it has room for; 0: it knows of none.
    dtype: of the hidden states that come in.
    precision: of products in float32, as torch has it set.
    """

    rows: int
    tokens: int
    slots: int
    dtype: torch.dtype
    precision: str

    @property
    def states(self) -> tuple[int, torch.dtype]:
        """Which states it changes."""
        return self.rows, self.dtype


def graph_length(rows: int, tokens: int, chunk_length: int | None = None) -> int | None:
    """C for chunks of `tokens` a row, or None where a graph would not be faster: with many tokens, or too many pads.

    Args:
        chunk_length: the most tokens that are read at a time; lengths beyond are not taken, but itself is one.
    """
    most = MOST_TOKENS // rows
    lengths = set(LENGTHS)
    if chunk_length is not None:
        most = min(most, chunk_length)
        lengths.add(chunk_length)
    fitting = [length for length in lengths if tokens <= length <= most]
    if rows > MOST_ROWS or not fitting:
        return None
    length = min(fitting)
    # Behind that the device is the slower one, and pads cost what tokens do.
    return length if rows * length <= max(TAKES_AS_LONG, rows * tokens * 8 / 7) else None


class CapturedChunk:
    """A captured pass over a chunk, on tensors that stay where they are. It keeps no reference to the backbone.

    Args:
        backbone: in evaluation mode, on one CUDA device.
        hidden_states, output: [B, C, H], what comes in and what is left; other graphs may use them as well.
        states: a filled cache that is continued.
        adaptation: of the kept vectors in [B, C], an example; None: there are none.
        pool: see `captured`.
    """

    def __init__(
        self, backbone: Any, hidden_states: torch.Tensor, output: torch.Tensor, states: Cache, adaptation: Any, pool: Any
    ):
        rows, device = len(hidden_states), hidden_states.device
        self.hidden_states, self.output, self.states = hidden_states, output, states
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.adaptation = None if adaptation is None else type(adaptation)(*(part.clone() for part in adaptation))

        def run() -> None:
            output.copy_(backbone.run_layers(hidden_states, self.lengths, self.adaptation, states, None))

        self.graph = _captured_behind_a_run(run, device, pool)

    def __call__(
        self, hidden_states: torch.Tensor, lengths: list[int], adaptation: Any, cache_params: Cache | None
    ) -> torch.Tensor:
        """`run_layers` of [B, T, H] with `lengths` tokens in each row: [B, T, H], which the next chunk overwrites.

        Args:
            adaptation: as for [B, C], with as many entries as the example.
        """
        width, padded = hidden_states.shape[1], self.hidden_states.shape[1]
        self.hidden_states[:, :width].copy_(hidden_states)
        if width < padded:  # what is there is finite, or the state would not survive it
            self.hidden_states[:, width:].zero_()
        self.lengths.copy_(sent(lengths, self.lengths.device))
        if adaptation is not None and self.adaptation is not None:
            for mine, theirs in zip(self.adaptation, adaptation, strict=True):
                mine.copy_(theirs)
        _begin_at(self.states, cache_params)
        self.graph.replay()
        if cache_params is not None:
            _leave_in(self.states, cache_params)
        return self.output[:, :width]


def _captured_behind_a_run(run: Callable[[], None], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """`run` as a graph, once it has run: kernels are compiled, and workspaces allocated, before the capture."""
    with torch.cuda.device(device):
        with on_side_stream(device):
            run()
        graph, _ = captured(run, device, pool)
    return graph


def _begin_at(states: Cache, cache: Cache | None) -> None:
    mine = list(tensors_of(states))
    if cache is None or not cache.has_previous_state():
        zero_tensors(mine)
    else:
        copy_tensors(mine, list(tensors_of(cache)))


def _leave_in(states: Cache, cache: Cache) -> None:
    """As mixers leave states in a cache, but all at once."""
    if not cache.has_previous_state():
        if not all(map(_is_new, cache.layers, states.layers)):
            for layer_idx, layer in enumerate(states.layers):
                for slot in range(layer.number_of_states):
                    conv = layer.conv_states[slot]
                    cache.update_conv_state(conv, layer_idx, state_idx=slot, conv_kernel_size=conv.shape[-1])
                    cache.update_recurrent_state(layer.recurrent_states[slot], layer_idx, state_idx=slot)
            return
        for layer, mine in zip(cache.layers, states.layers, strict=True):
            # What transformers has noted of a layer that was filled, and room for its states.
            noted = {name: dict(value) if isinstance(value, dict) else value for name, value in mine.__dict__.items()}
            layer.__dict__.update(noted)
            for kind in (layer.conv_states, layer.recurrent_states):
                kind.update({slot: torch.empty_like(state) for slot, state in kind.items()})
    copy_tensors(list(tensors_of(cache)), list(tensors_of(states)))


def _is_new(layer: Any, filled: Any) -> bool:
    """Whether a layer of a cache is one of transformers' that nothing has been written to, and that notes what a filled one
    does; others have places that their owner may know, or record more than the last state."""
    return (
        type(layer) is type(filled)
        and layer.device is None
        and not layer.record_past
        and layer.__dict__.keys() == filled.__dict__.keys()
    )


class PromptGraphs(CapturedGraphs):
    """The captured passes of one model, and the tensors that they share.

    wanted: shapes without a graph, and the call that wanted one last.
    refused: shapes whose capture has failed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[tuple[int, torch.dtype], Cache] = {}
        self.tensors: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self.wanted: dict[ChunkShape, object] = {}
        self.refused: set[ChunkShape] = set()

    def forget(self) -> None:
        super().forget()
        for shared in (self.states, self.tensors, self.wanted, self.refused):
            shared.clear()

    def chunk(self, backbone: Any, shape: ChunkShape, adaptation: Any, call: object, insist: bool) -> CapturedChunk | None:
        """The graph for a shape, or None if it has to be done without: before a second call wants it, since capturing takes
        as long as about three passes (`insist`: at once), and where it fails."""
        if shape in self.refused:
            return None
        if shape not in self.graphs:
            if not insist and self.wanted.setdefault(shape, call) is call:
                if len(self.wanted) > _REMEMBERED:
                    del self.wanted[next(iter(self.wanted))]
                return None
            self.wanted.pop(shape, None)
            self._make_room(shape)
            try:
                self.graphs[shape] = self._capture(backbone, shape, adaptation)
            except RuntimeError as error:
                self.refused.add(shape)
                self._drop_unused()
                warnings.warn(f"Reading without a CUDA graph: the pass could not be captured ({error}).", stacklevel=2)
                return None
        self.graphs.move_to_end(shape)
        chunk: CapturedChunk = self.graphs[shape]
        return chunk

    def _capture(self, backbone: Any, shape: ChunkShape, adaptation: Any) -> CapturedChunk:
        pool = next((chunk.graph.pool() for chunk in self.graphs.values()), None)
        size = backbone.config.hidden_size
        with ordinary_tensors():
            hidden_states = self._shared("hidden_states", shape, size, shape.dtype, backbone.device)
            if shape.states not in self.states:
                states = DynamicCache(config=backbone.config)
                backbone.run_layers(hidden_states, None, None, states, None)  # not a part: kernels may be tuned here
                self.states[shape.states] = states
            output = self._shared("output", shape, size, backbone.norm_f.weight.dtype, backbone.device)
            return CapturedChunk(backbone, hidden_states, output, self.states[shape.states], adaptation, pool)

    def _shared(self, name: str, shape: ChunkShape, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The first [B, C, H] of a tensor that all graphs use."""
        if (name, dtype) not in self.tensors:
            self.tensors[name, dtype] = torch.zeros(MOST_TOKENS * size, dtype=dtype, device=device)
        flat = self.tensors[name, dtype]
        return flat[: shape.rows * shape.tokens * size].view(shape.rows, shape.tokens, size)

    def _make_room(self, shape: ChunkShape) -> None:
        """Release what was used longest ago until one more graph, and its states, are within the limits."""
        last_use = {used.states: place for place, used in enumerate(self.graphs)}
        for states in sorted(self.states, key=lambda states: last_use.get(states, -1)):
            if sum(rows for rows, _ in {*self.states, shape.states}) <= MOST_STATES:
                break
            if states != shape.states:
                for other in [other for other in self.graphs if other.states == states]:
                    del self.graphs[other]
                del self.states[states]
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)
        self._drop_unused()

    def _drop_unused(self) -> None:
        for states in self.states.keys() - {shape.states for shape in self.graphs}:
            del self.states[states]
        if not self.graphs:
            self.tensors.clear()


class PromptReader:
    """Reads the prompt of one call of `generate`, chunk by chunk, through the graphs of a model.

    Args:
        insist: capture what has no graph yet; else only what another call has wanted before.
    """

    def __init__(self, backbone: Any, graphs: PromptGraphs, insist: bool):
        self.backbone = backbone
        self.graphs = graphs
        self.insist = insist
        self.call = object()

    def read(
        self,
        hidden_states: torch.Tensor,
        lengths: list[int],
        adaptation: Any,
        cache_params: Cache | None,
        chunk_length: int | None,
    ) -> torch.Tensor | None:
        """`run_layers` of [B, T, H] with `lengths` tokens in each row, [B, T, H], which the next chunk overwrites; or None
        where the chunk has to be read without a graph.

        Args:
            adaptation: as for [B, T], an `Adaptation` of kept vectors, or None.
            chunk_length: the most tokens that are read at a time.
        """
        rows, width = hidden_states.shape[:2]
        length = graph_length(rows, width, chunk_length)
        if length is None:
            return None
        slots = 0
        if adaptation is not None:
            slots = max(FEWEST_SLOTS, 1 << (len(adaptation.where) - 1).bit_length())
            adaptation = adaptation.in_wider_rows(width, length, slots)
        shape = ChunkShape(rows, length, slots, hidden_states.dtype, torch.get_float32_matmul_precision())
        chunk = self.graphs.chunk(self.backbone, shape, adaptation, self.call, self.insist)
        return None if chunk is None else chunk(hidden_states, lengths, adaptation, cache_params)


_READER: ContextVar[PromptReader | None] = ContextVar("reader", default=None)


@contextlib.contextmanager
def prompts_through_graphs(model: Any, survey: Survey, insist: bool) -> Iterator[None]:
    """Passes of the model's backbone inside go through graphs where `why_not_graphed` has no objection to captured steps.

    Args:
        survey: of the model.
    """
    outer = _READER.set(_reader_for(model, survey, insist))
    try:
        yield
    finally:
        _READER.reset(outer)


def _reader_for(model: Any, survey: Survey, insist: bool) -> PromptReader | None:
    """None unless what a pass does is known beforehand, and depends on nothing but weights and inputs."""
    if not model.backbone.passes_can_be_captured or torch.is_autocast_enabled(model.device.type):
        return None
    graphs = kept_for(model, PromptGraphs)
    return PromptReader(model.backbone, graphs, insist) if graphs.refresh(survey) else None


def prompt_reader(backbone: Any) -> PromptReader | None:
    """Who reads the chunks of a pass of this backbone; None: nobody but its own `run_layers`."""
    if torch.compiler.is_compiling():
        return None
    reader = _READER.get()
    return reader if reader is not None and reader.backbone is backbone and not torch.is_grad_enabled() else None

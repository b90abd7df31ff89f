# SPDX-License-Identifier: Apache-2.0
"""One pass of a recurrent model over a batch: rows, chunks, and what is kept of the states. Shared by every family.

A pass reads rows whose tokens begin at column 0: pads, wherever they were, are moved behind the tokens, where a recurrence
can end early, and results are moved back. So a row's result never depends on its padding or its neighbours.

Shapes: `B` rows, `L` columns of the input, `T` positions of a pass, `H` hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .precision import sent
from .prompt_graph import prompt_reader

DEFAULT_CHUNK_LENGTH = 16_384  # longer inputs are read in chunks of this, unless gradients are needed

Progress = Callable[[int, int], Any]


class PackedRows:
    """A batch whose rows begin at column 0, built from ids or embeddings and a mask of any shape.

    mask: [B, L], 0 at pads, as given; or None.
    lengths: tokens of each row, on the host.
    token_of_column: [B, L] long, the packed position of each input column (pads: of the token before them), or None if
        nothing had to move.
    """

    def __init__(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        embeddings: torch.nn.Module,
    ):
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        self.batch, self.columns = tokens.shape[:2]
        self.device = tokens.device
        self.embeddings = embeddings
        self.mask = attention_mask
        self.lengths = [self.columns] * self.batch
        self.token_of_column: torch.Tensor | None = None
        if attention_mask is not None:
            real = attention_mask.to(self.device).bool()
            lengths = real.sum(1).tolist()
            if lengths != self.lengths:
                self.lengths = lengths
                self.token_of_column = (real.cumsum(1) - 1).clamp(min=0)
                order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
                index = order if input_ids is not None else order.unsqueeze(-1).expand_as(tokens)
                tokens = tokens.gather(1, index)
                if inputs_embeds is not None:  # whatever a buffer holds at pads, NaN included, stays out of the states
                    pads = torch.arange(self.columns, device=self.device) >= real.sum(1, keepdim=True)
                    tokens = tokens.masked_fill(pads.unsqueeze(-1), 0)
        self.tokens = tokens
        self.are_ids = input_ids is not None

    def embed(self, begin: int, end: int) -> torch.Tensor:
        """Embeddings [B, end - begin, H] of packed positions [begin, end)."""
        tokens = self.tokens[:, begin:end]
        return self.embeddings(tokens) if self.are_ids else tokens

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, H] of packed positions [B, T]."""
        if self.are_ids:
            return self.embeddings(self.tokens.gather(1, positions))
        return self.tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1]))

    def tokens_of_last(self, columns: int) -> torch.Tensor:
        """[B, columns] long: the packed positions of the last input columns."""
        if self.token_of_column is not None:
            return self.token_of_column[:, -columns:]
        return torch.arange(self.columns - columns, self.columns, device=self.device).expand(self.batch, -1)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Packed states [B, T, H] -> in the columns of the input, as far as they go."""
        if self.token_of_column is None:
            return states
        return gather_columns(states, self.token_of_column.clamp(max=states.shape[1] - 1))


class StateReader:
    """Takes from a pass, chunk by chunk, only what will be needed: a span of positions, and single points of each row.

    Args:
        span: (begin, end) positions whose states are all kept.
        points: [B, n] long, positions whose states are kept besides, or None.
        with_blocks: also keep every block's output, of all positions.
    """

    def __init__(self, span: tuple[int, int], points: torch.Tensor | None = None, with_blocks: bool = False):
        self.span = span
        self.points = points
        self.blocks: list[list[torch.Tensor]] | None = [] if with_blocks else None
        self._span: torch.Tensor | None = None
        self._points: torch.Tensor | None = None

    def read(self, states: torch.Tensor, begin: int, lent: bool = False) -> None:
        """Take what is wanted of states [B, T, H] of the positions from `begin` on.

        Args:
            lent: something else will stand there soon; what is kept has to be copied.
        """
        end = begin + states.shape[1]
        low, high = max(self.span[0], begin), min(self.span[1], end)
        if low < high:
            inside = states if (low, high) == (begin, end) else states[:, low - begin : high - begin]
            self._read_span(inside, low, lent)
        if self.points is not None:
            local = self.points - begin
            inside = (local >= 0) & (local < end - begin)
            found = gather_columns(states, local.clamp(0, end - begin - 1))
            other = torch.zeros_like(found) if self._points is None else self._points
            self._points = torch.where(inside.unsqueeze(-1), found, other)

    def _read_span(self, states: torch.Tensor, begin: int, lent: bool) -> None:
        """Keep states of the span's positions from `begin` on: as they are where they are all of it, for callers may want to
        retain their gradient; else in one tensor, since pieces and their union would take the room twice."""
        start, stop = self.span
        if states.shape[1] == stop - start:
            self._span = states.clone() if lent else states
            return
        if self._span is None:
            self._span = states.new_empty(states.shape[0], stop - start, states.shape[2])
        self._span[:, begin - start : begin - start + states.shape[1]] = states

    @property
    def span_states(self) -> torch.Tensor:
        """[B, end - begin, H]"""
        assert self._span is not None
        return self._span

    @property
    def point_states(self) -> torch.Tensor:
        """[B, n, H]"""
        assert self._points is not None
        return self._points

    @property
    def block_states(self) -> tuple[torch.Tensor, ...] | None:
        """One [B, L, H] for each block and for the final norm."""
        if self.blocks is None:
            return None
        return tuple(_joined(pieces) for pieces in zip(*self.blocks, strict=True))


class RecurrentBackbone:
    """How a backbone reads rows. Mixed into a `PreTrainedModel` that has

    - `config` and `embeddings`, and
    - `run_layers(hidden_states, lengths, adaptation, cache_params, block_states)`: all blocks and the final norm over
      [B, T, H]; `lengths` [B] or None says how many of the T positions are tokens, the states in `cache_params` are
      continued and updated, and `block_states` (a list or None) receives the blocks' outputs. `adaptation` is what a pass
      has to know besides the embeddings.

    passes_can_be_captured: whether `run_layers` asks the device nothing, and `adaptation` is an `Adaptation`, so that a pass
        can become a CUDA graph.
    """

    passes_can_be_captured = False

    config: Any
    training: bool
    embeddings: torch.nn.Module
    run_layers: Callable[..., torch.Tensor]

    def read_plain(
        self,
        rows: PackedRows,
        cache_params: Cache | None,
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        with_blocks: bool,
        progress: Progress | None,
        adaptation: Any = None,
    ) -> StateReader:
        """The states of all positions, or of `kept_tokens` [B, n] alone, of one pass."""
        length = max(*rows.lengths, 1)
        reader = StateReader((0, length if kept_tokens is None else 0), kept_tokens, with_blocks)

        def embed(begin: int, end: int) -> tuple[torch.Tensor, Any]:
            return rows.embed(begin, end), adaptation

        self.run_pass(embed, rows.lengths, cache_params, chunk_length, reader, progress)
        return reader

    def run_pass(
        self,
        embed: Callable[[int, int], tuple[torch.Tensor, Any]],
        lengths: list[int],
        cache_params: Cache | None,
        chunk_length: int | None,
        reader: StateReader,
        progress: Progress | None,
    ) -> None:
        """One pass over positions [0, max(lengths)), in chunks whose states carry over; while `generate` reads a prompt,
        through graphs where they are faster (prompt_graph.py).

        Args:
            embed: gives the embeddings of positions [begin, end), and what else `run_layers` has to know of them.
            lengths: tokens of each row.
            reader: takes what is wanted of the states.
        """
        spans = list(_chunks(max(*lengths, 1), chunk_length))  # rows of pads alone still get their states
        if len(spans) > 1 and cache_params is None:
            cache_params = DynamicCache(config=self.config)
        graphs = prompt_reader(self) if reader.blocks is None else None
        for begin, end in spans:
            hidden_states, adaptation = embed(begin, end)
            counts = [min(max(length - begin, 0), end - begin) for length in lengths]
            block_states: list[torch.Tensor] = []
            states = None
            if graphs is not None:
                states = graphs.read(hidden_states, counts, adaptation, cache_params, chunk_length)
            lent = states is not None
            if states is None:
                tokens = sent(counts, hidden_states.device) if min(lengths) < end else None
                wanted = block_states if reader.blocks is not None else None
                states = self.run_layers(hidden_states, tokens, adaptation, cache_params, wanted)
            reader.read(states, begin, lent)
            if reader.blocks is not None:
                reader.blocks.append(block_states)
            if progress is not None:
                progress(end, max(lengths))


def check_chunk_length(chunk_length: Any) -> None:
    """Raise a ValueError unless it is a positive integer."""
    if not isinstance(chunk_length, int) or isinstance(chunk_length, bool) or chunk_length < 1:
        raise ValueError(f"prefill_chunk_length must be an integer of at least 1, got {chunk_length!r}.")


def chunk_length_for(length: int, chunk_length: int | None) -> int | None:
    """The chunk length to read `length` positions with: the one given, else a default that bounds long inputs."""
    if chunk_length is not None:
        check_chunk_length(chunk_length)
        if torch.is_grad_enabled() and chunk_length < length:
            raise ValueError(
                "prefill_chunk_length is for inference: states are carried between chunks in place. Run under "
                "torch.no_grad(), or train with gradient_checkpointing_enable() to save memory."
            )
        return chunk_length
    return None if torch.is_grad_enabled() else DEFAULT_CHUNK_LENGTH


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=1)


def gather_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """states [B, T, H] at columns [B, n]: [B, n, H]."""
    return states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _chunks(length: int, chunk_length: int | None) -> Iterator[tuple[int, int]]:
    step = length if chunk_length is None else min(chunk_length, length)
    for begin in range(0, length, max(step, 1)):
        yield begin, min(begin + step, length)


def check_shapes(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, labels: torch.Tensor | None) -> None:
    """Raise a ValueError that says which shape was expected of ids [B, L], embeddings [B, L, H] and labels [B, L]."""
    tokens, dimensions = (input_ids, 2) if input_ids is not None else (inputs_embeds, 3)
    if tokens is None or tokens.dim() != dimensions:
        shape = None if tokens is None else tuple(tokens.shape)
        raise ValueError(
            f"The input has the shape {shape}, expected [batch, length] ids or [batch, length, hidden] embeddings."
        )
    if tokens.shape[1] == 0:
        raise ValueError("The input has no tokens: its length is 0. Give at least one token.")
    if labels is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}, the input {tuple(tokens.shape[:2])}. They must be equal: one "
            "label a token, -100 where it does not count."
        )


def check_no_empty_prompt(lengths: list[int]) -> None:
    """Raise a ValueError that names the rows without a single token."""
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(f"The attention mask of rows {empty} is all zeros: these prompts are empty. Drop these rows.")


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise a ValueError that names the offending ids, before an embedding fails on them."""
    if input_ids.numel():
        low, high = torch.stack(input_ids.aminmax()).tolist()  # the device is waited for once
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids range from {low} to {high}, but the vocabulary has ids 0 to {vocab_size - 1}. "
                "Use the checkpoint's own tokenizer, or resize_token_embeddings() after adding tokens."
            )

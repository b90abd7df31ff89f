# SPDX-License-Identifier: Apache-2.0
"""The two passes over a prompt, and how `generate` runs them. Shared by every family that compresses its prompt.

Stage 1 reads the prompt and the compressor replaces its window by kept vectors; stage 2 reads the shortened prompt with
adapted steps and leaves its state in the cache (arXiv 2408.15496, section 3). Decoding is then plain.

Both passes read rows whose tokens begin at column 0: pads, wherever they were, are moved behind the tokens, where a
recurrence can end early, and results are moved back. So a row's result never depends on its padding or its neighbours.

Shapes: `B` rows, `L` columns of the input, `P` tokens of a row's prompt, `H` hidden size, `K` kept vectors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .selective_compression import (
    Adaptation,
    CompressedPrompt,
    Selection,
    SelectiveCompressor,
    Window,
    as_numbers,
    draw_training_setting,
    settings_for_rows,
    training_window,
    window_of,
)

DEFAULT_CHUNK_LENGTH = 32_768  # longer inputs are read in chunks of this, unless gradients are needed

Progress = Callable[[int, int], Any]


@dataclass
class TwoStageModelOutput(ModelOutput):
    """Output of a two-stage backbone.

    last_hidden_state: [B, L, H], after the final norm, aligned with the input: positions before and inside a compressed
        window come from stage 1, later ones from stage 2, and a pad repeats the token before it. With
        `columns_to_keep=n` only the last n columns.
    cache_params: the states after the last token of each row.
    hidden_states: the blocks' outputs and the final norm's; with compression those of stage 1, over the prompt.
    compressed_positions: [B, K] long, the kept positions of each row (its own tokens counted), -1 where absent.
    compression_scores: [B, K], the cosine similarity of each kept position, 0 where absent.
    """

    last_hidden_state: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    compressed_positions: torch.Tensor | None = None
    compression_scores: torch.Tensor | None = None


@dataclass
class TwoStageCausalLMOutput(ModelOutput):
    """Output of a two-stage language model; see `TwoStageModelOutput` for what is not named here.

    loss: scalar, of the labels that count.
    logits: [B, L, vocabulary], float32, aligned with the input (`logits_to_keep` shortens them).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    compressed_positions: torch.Tensor | None = None
    compression_scores: torch.Tensor | None = None


class PackedRows:
    """A batch whose rows begin at column 0, built from ids or embeddings and a mask of any shape.

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
        return _gather_columns(states, self.token_of_column.clamp(max=states.shape[1] - 1))


class _StateReader:
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
        self._spans: list[torch.Tensor] = []
        self._points: torch.Tensor | None = None

    def read(self, states: torch.Tensor, begin: int) -> None:
        end = begin + states.shape[1]
        low, high = max(self.span[0], begin), min(self.span[1], end)
        if (low, high) == (begin, end):  # the tensor itself, which callers may want to retain a gradient of
            self._spans.append(states)
        elif low < high:
            self._spans.append(states[:, low - begin : high - begin])
        if self.points is not None:
            local = self.points - begin
            inside = (local >= 0) & (local < end - begin)
            found = _gather_columns(states, local.clamp(0, end - begin - 1))
            other = torch.zeros_like(found) if self._points is None else self._points
            self._points = torch.where(inside.unsqueeze(-1), found, other)

    @property
    def span_states(self) -> torch.Tensor:
        """[B, end - begin, H]"""
        return _joined(self._spans)

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


class TwoStageBackbone:
    """What a compressing backbone does besides its layers. Mixed into a `PreTrainedModel` that has

    - `config`, `embeddings` and `compressor` (a `SelectiveCompressor`), and
    - `run_layers(hidden_states, lengths, adaptation, cache_params, block_states)`: all blocks and the final norm over
      [B, T, H]; `lengths` [B] or None says how many of the T positions are tokens, the states in `cache_params` are
      continued and updated, and `block_states` (a list or None) receives the blocks' outputs.
    """

    config: Any
    training: bool
    embeddings: torch.nn.Module
    compressor: SelectiveCompressor
    run_layers: Callable[..., torch.Tensor]

    def read_rows(
        self,
        rows: PackedRows,
        windows: list[Window],
        prompt_lengths: list[int],
        cache_params: Cache | None,
        columns_to_keep: int | None = None,
        chunk_length: int | None = None,
        output_hidden_states: bool = False,
        progress: Progress | None = None,
    ) -> TwoStageModelOutput:
        """One pass over the rows, or two where `windows` says that something is compressed."""
        kept_tokens = None
        if columns_to_keep is not None and columns_to_keep < rows.columns:
            kept_tokens = rows.tokens_of_last(columns_to_keep)
        if not any(window.length for window in windows):
            reader = self._read_plain(rows, cache_params, kept_tokens, chunk_length, output_hidden_states, progress)
            states = rows.unpack(reader.span_states) if kept_tokens is None else reader.point_states
            blocks = reader.block_states
            blocks = blocks if blocks is None else tuple(rows.unpack(block) for block in blocks)
            return TwoStageModelOutput(last_hidden_state=states, cache_params=cache_params, hidden_states=blocks)

        shortened = [length - window.dropped for length, window in zip(rows.lengths, windows, strict=True)]
        report = _progress_over(progress, max(prompt_lengths), max(shortened))
        first = self._read_prompts(rows, windows, prompt_lengths, kept_tokens, chunk_length, output_hidden_states, report(0))
        selection = self._select(first, windows)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not selection.scores.isfinite().all():
            raise ValueError(
                "The scores of the prompt are not finite: the weights hold NaN or inf, or float16 overflowed. Check the "
                "checkpoint, and load it in bfloat16 or float32."
            )
        prompt = CompressedPrompt(windows, selection, shortened)
        second = self._read_compressed(rows, prompt, cache_params, kept_tokens, chunk_length, report(1))
        blocks = first.block_states
        return TwoStageModelOutput(
            last_hidden_state=_align(rows, windows, first, second, kept_tokens),
            cache_params=cache_params,
            hidden_states=blocks if blocks is None else tuple(rows.unpack(block) for block in blocks),
            compressed_positions=selection.positions,
            compression_scores=selection.scores,
        )

    def _read_plain(
        self,
        rows: PackedRows,
        cache_params: Cache | None,
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        with_blocks: bool,
        progress: Progress | None,
    ) -> _StateReader:
        length = max(*rows.lengths, 1)
        reader = _StateReader((0, length if kept_tokens is None else 0), kept_tokens, with_blocks)
        self._run(
            lambda begin, end: (rows.embed(begin, end), None), rows.lengths, cache_params, chunk_length, reader, progress
        )
        return reader

    def _read_prompts(
        self,
        rows: PackedRows,
        windows: list[Window],
        prompt_lengths: list[int],
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        with_blocks: bool,
        progress: Progress | None,
    ) -> _StateReader:
        """Stage 1. Reads the window's states, each query token's, and those that the output takes from this pass."""
        queries = torch.tensor(prompt_lengths, device=rows.device).unsqueeze(1) - 1
        if kept_tokens is None:
            reader = _StateReader((0, max(prompt_lengths)), queries, with_blocks)
        else:
            compressed = [window for window in windows if window.length]
            span = min(window.start for window in compressed), max(window.stop for window in compressed)
            reader = _StateReader(span, torch.cat([queries, kept_tokens], dim=1), with_blocks)
        self._run(lambda begin, end: (rows.embed(begin, end), None), prompt_lengths, None, chunk_length, reader, progress)
        return reader

    def _select(self, first: _StateReader, windows: list[Window]) -> Selection:
        states = first.span_states
        longest = max(window.length for window in windows)
        starts = [window.start - first.span[0] if window.length else 0 for window in windows]
        if all(start == starts[0] for start in starts) and starts[0] + longest <= states.shape[1]:
            window_states = states[:, starts[0] : starts[0] + longest]
        else:
            columns = torch.tensor(starts, device=states.device)[:, None] + torch.arange(longest, device=states.device)
            window_states = _gather_columns(states, columns.clamp(max=states.shape[1] - 1))
        return self.compressor(first.point_states[:, 0], window_states, windows)

    def _read_compressed(
        self,
        rows: PackedRows,
        prompt: CompressedPrompt,
        cache_params: Cache | None,
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        progress: Progress | None,
    ) -> _StateReader:
        """Stage 2: the rows with their windows replaced."""
        sources = prompt.sources(rows.device)
        points = None
        if kept_tokens is not None:
            points = (kept_tokens - _column(prompt.windows, "dropped", rows.device)).clamp(min=0)
        reader = _StateReader((0, sources.shape[1] if kept_tokens is None else 0), points)

        def embed(begin: int, end: int) -> tuple[torch.Tensor, Adaptation | None]:
            return prompt.splice(rows.embed_positions(sources[:, begin:end]), begin)

        self._run(embed, prompt.lengths, cache_params, chunk_length, reader, progress)
        return reader

    def _run(
        self,
        embed: Callable[[int, int], tuple[torch.Tensor, Adaptation | None]],
        lengths: list[int],
        cache_params: Cache | None,
        chunk_length: int | None,
        reader: _StateReader,
        progress: Progress | None,
    ) -> None:
        """One pass over positions [0, max(lengths)), in chunks whose states carry over."""
        spans = list(_chunks(max(*lengths, 1), chunk_length))  # rows of pads alone still get their states
        if len(spans) > 1 and cache_params is None:
            cache_params = DynamicCache(config=self.config)
        for begin, end in spans:
            hidden_states, adaptation = embed(begin, end)
            tokens = None
            if min(lengths) < end:
                tokens = torch.tensor([min(max(length - begin, 0), end - begin) for length in lengths])
                tokens = tokens.to(hidden_states.device)
            block_states: list[torch.Tensor] = []
            wanted = block_states if reader.blocks is not None else None
            states = self.run_layers(hidden_states, tokens, adaptation, cache_params, wanted)
            reader.read(states, begin)
            if reader.blocks is not None:
                reader.blocks.append(block_states)
            if progress is not None:
                progress(end, max(lengths))

    def plan_windows(
        self,
        row_lengths: list[int],
        prompt_lengths: list[int] | None,
        start: Any = None,
        span: Any = None,
        ratio: Any = None,
        trains: bool = False,
    ) -> list[Window]:
        """Each row's window: settings given for the call, the others drawn if the model trains, else the configuration's."""
        config, batch = self.config, len(row_lengths)
        if prompt_lengths is None:
            return [Window(0, 0, 0)] * batch
        given = (start, span, ratio)
        settings = settings_for_rows(config, batch, *(draw_training_setting(config, *given) if trains else given))
        rows = zip(prompt_lengths, settings, strict=True)
        most = config.compression_max_kept if ratio is None else None  # a ratio asked for is a ratio given
        if trains and span is None:
            return [training_window(config, length, setting, most) for length, setting in rows]
        return [window_of(length, setting, config.compression_min_prompt, max_kept=most) for length, setting in rows]


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


def prompts_to_compress(
    rows: PackedRows,
    compress_prompt: bool | None,
    prompt_lengths: Any,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    settings: tuple[Any, Any, Any],
    filled: bool,
) -> list[int] | None:
    """Each row's prompt length if prompts are to be compressed, else None; raises where a request contradicts itself.

    Args:
        settings: s, p and rho as given for the call.
        filled: the cache has read something already.
    """
    if compress_prompt is False:
        return None
    if filled:
        if compress_prompt:
            raise ValueError(COMPRESSION_ON_A_FILLED_CACHE)
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths on a filled cache: what continues it is not compressed. Leave them out.")
        return None
    prompts = row_prompt_lengths(prompt_lengths, labels, rows.lengths, attention_mask)
    if prompts is None and compress_prompt:
        check_no_empty_prompt(rows.lengths)
        return list(rows.lengths)
    if prompts is None and any(setting is not None for setting in settings):
        raise ValueError(
            "Compression settings are given, but nothing says what the prompt is. Give prompt_lengths or labels, or "
            "compress_prompt=True if all of each row is prompt."
        )
    return prompts


def row_prompt_lengths(
    prompt_lengths: Any, labels: torch.Tensor | None, rows_lengths: list[int], attention_mask: torch.Tensor | None
) -> list[int] | None:
    """Each row's prompt length on the host, from what is given, or from where its labels start; None if neither is.

    Raises:
        ValueError: lengths that do not fit the rows, or that reach into the labels.
    """
    started = None if labels is None else _tokens_before_labels(labels, attention_mask)
    if prompt_lengths is None:
        return started
    lengths = as_numbers(prompt_lengths)
    if not isinstance(lengths, list) or len(lengths) != len(rows_lengths):
        raise ValueError(f"prompt_lengths is {lengths!r} for {len(rows_lengths)} rows. Pass one a row.")
    for row, (length, tokens) in enumerate(zip(lengths, rows_lengths, strict=True)):
        if not isinstance(length, int) or not 1 <= length <= tokens:
            raise ValueError(
                f"prompt_lengths[{row}] is {length!r}, but the row has {tokens} tokens (pads excluded). Give a whole "
                "number from 1 to that, or leave prompt_lengths out for a plain pass."
            )
        if started is not None and started[row] < length:
            raise ValueError(
                f"prompt_lengths[{row}] is {length}, but labels begin after {started[row]} tokens of that row. Set the "
                "prompt's labels to -100, or compute a loss on the prompt from the logits."
            )
    return lengths


def _tokens_before_labels(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Tokens before the first label that counts; all of a row's tokens if none does."""
    unlabelled = (labels != -100).cumsum(1) == 0
    if attention_mask is not None:
        unlabelled &= attention_mask.to(labels.device).bool()
    return unlabelled.sum(1).tolist()


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=1)


def _gather_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """states [B, T, H] at columns [B, n]: [B, n, H]."""
    return states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _chunks(length: int, chunk_length: int | None) -> Iterator[tuple[int, int]]:
    step = length if chunk_length is None else min(chunk_length, length)
    for begin in range(0, length, max(step, 1)):
        yield begin, min(begin + step, length)


def _column(windows: list[Window], name: str, device: torch.device) -> torch.Tensor:
    """[B, 1] long: one field of every row's window."""
    return torch.tensor([getattr(window, name) for window in windows], device=device).unsqueeze(1)


def _align(
    rows: PackedRows,
    windows: list[Window],
    first: _StateReader,
    second: _StateReader,
    kept_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """States in the columns of the input: up to the window's end from stage 1, behind it from stage 2."""
    stop = _column(windows, "stop", rows.device)  # 0 where nothing is compressed
    if kept_tokens is not None:
        return torch.where((kept_tokens < stop).unsqueeze(-1), first.point_states[:, 1:], second.point_states)
    tokens = rows.tokens_of_last(rows.columns)
    early, late = first.span_states, second.span_states
    dropped = _column(windows, "dropped", rows.device)
    behind = (tokens - dropped).clamp(0, late.shape[1] - 1) + early.shape[1]
    return _gather_columns(torch.cat([early, late], dim=1), torch.where(tokens < stop, tokens, behind))


def _progress_over(progress: Progress | None, first: int, second: int) -> Callable[[int], Progress | None]:
    """Progress callbacks of the two stages that count as one task of first + second positions."""
    if progress is None:
        return lambda stage: None
    return lambda stage: lambda done, _: progress(done + stage * first, first + second)


class TwoStageGenerationMixin(GenerationMixin):
    """`generate` with compression settings. The two stages run inside `forward`, at the first iteration."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        compress_prompt: bool | None = None,
        compression_start: Any = None,
        compression_span: Any = None,
        compression_ratio: Any = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with the prompt compressed before decoding begins.

        Args:
            inputs, generation_config, *args, **kwargs: as for `GenerationMixin.generate`. A cache returned by an earlier
                call continues with `cache_params=cache` (or `past_key_values=cache`) and the tokens it has not seen:
                the last generated one, which was never fed back, and the new ones.
            compress_prompt (`bool`, *optional*): False reads the prompt as plain Mamba would; True insists, and raises
                on a filled cache. Default: compress, unless a filled cache is continued.
            compression_start, compression_span, compression_ratio (`float`, or one a row, *optional*):
                s, p and rho for this call; default: the configuration's. A ratio given here is not bounded by the
                configuration's `compression_max_kept`. Without effect where nothing is compressed.
            prefill_chunk_length (`int`, *optional*): read the prompt in chunks of this many tokens. Same result, with
                memory for activations bounded by the chunk. Default: chunks of 32,768.
            prefill_progress (`Callable[[int, int], Any]`, *optional*): called after every chunk with the tokens read and
                the tokens to read, both stages counted.

        Returns:
            What `GenerationMixin.generate` returns.

        Raises:
            ValueError: settings out of range, an empty prompt or row, ids outside the vocabulary, compression forced on
                a filled cache, or a generation mode that a recurrent state cannot serve.
        """
        generation_configs = (generation_config, self.generation_config)
        _refuse_modes(generation_configs, args, kwargs)
        if (cache := kwargs.pop("past_key_values", None)) is not None:
            kwargs.setdefault("cache_params", cache)
        cache = kwargs.get("cache_params")
        prompt = _prompt_of(inputs, kwargs)
        settings = [as_numbers(value) for value in (compression_start, compression_span, compression_ratio)]
        if prompt is not None:
            _check_prompt(prompt, kwargs.get("attention_mask"), self.config.vocab_size)
            settings_for_rows(self.config, prompt.shape[0], *settings)
        if prefill_chunk_length is not None:
            check_chunk_length(prefill_chunk_length)
        note, repeated = _continuation(cache, prompt, compress_prompt)
        filled = cache is not None and cache.has_previous_state()
        beams = _first_given("num_beams", kwargs, *generation_configs)
        copies = max(beams, _first_given("num_return_sequences", kwargs, *generation_configs))
        start, span, ratio = (_per_copy(value, copies) for value in settings)
        result = super().generate(
            inputs,
            generation_config,
            *args,
            compress_prompt=compress_prompt,
            compression_start=start,
            compression_span=span,
            compression_ratio=ratio,
            prefill_chunk_length=prefill_chunk_length,
            prefill_progress=prefill_progress,
            prompt_columns=1 if prompt is None else prompt.shape[1],
            prompt_copies=copies,
            columns_read=repeated,
            **kwargs,
        )
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        cache = getattr(result, "past_key_values", cache)
        if cache is not None:
            early = _rows_that_read_pads(sequences, prompt, kwargs, generation_configs)
            cache.refusal = _HOLDS_BEAMS if beams > 1 else _ENDED_EARLY.format(early) if early else None
            cache.note = None if beams > 1 else _note_after(note, filled, repeated, prompt, sequences)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        compress_prompt: bool | None = None,
        compression_start: Any = None,
        compression_span: Any = None,
        compression_ratio: Any = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        prompt_columns: int | None = None,
        prompt_copies: int = 1,
        columns_read: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one `forward`. Whoever reads the prompt, the first iteration or every one without a cache, also gets
        the compression settings and the prompt's length; a decoding step gets its token and the cache, nothing else."""
        filled = cache_params is not None and cache_params.has_previous_state()
        if filled and not is_first_iteration:
            input_ids, attention_mask = input_ids[:, -1:], None
        if is_first_iteration and cache_params is not None:
            cache_params.refusal = _LEFT_IN_THE_MIDDLE  # until the call ends, it is ahead of what its owner was given
        if filled and is_first_iteration and columns_read:  # the whole text came again
            input_ids = input_ids[:, columns_read:]
            inputs_embeds = inputs_embeds if inputs_embeds is None else inputs_embeds[:, columns_read:]
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        model_inputs.setdefault("attention_mask", attention_mask)
        if filled and not is_first_iteration:
            return model_inputs
        model_inputs["prefill_chunk_length"] = prefill_chunk_length
        model_inputs["prefill_progress"] = prefill_progress if is_first_iteration else None
        if filled:
            return model_inputs
        if compress_prompt is not False and prompt_columns is not None:
            tokens = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            mask = attention_mask if attention_mask is not None else tokens.new_ones(tokens.shape[:2], dtype=torch.long)
            model_inputs["prompt_lengths"] = mask[:, :prompt_columns].sum(1)
        model_inputs.update(
            compress_prompt=compress_prompt,
            compression_start=compression_start,
            compression_span=compression_span,
            compression_ratio=compression_ratio,
            prompt_copies=prompt_copies if is_first_iteration else 1,
        )
        return model_inputs

    def forward_one_of_each(self, copies: int, **inputs: Any) -> TwoStageCausalLMOutput:
        """`forward` on every `copies`-th row, its result repeated: beams and return sequences begin as equal rows."""
        batch = next(t.shape[0] for t in (inputs["input_ids"], inputs["inputs_embeds"]) if t is not None)
        if batch % copies:
            raise ValueError(f"prompt_copies={copies} does not divide the batch of {batch} rows.")
        for name, value in inputs.items():
            is_per_row = isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)
            if is_per_row and name != "logits_to_keep":
                inputs[name] = value[::copies]
        output = self(**inputs, return_dict=True)
        for name, value in output.items():
            if isinstance(value, Cache):
                rows = torch.arange(batch // copies, device=output.logits.device)
                value.reorder_cache(rows.repeat_interleave(copies))
            elif isinstance(value, tuple):
                output[name] = tuple(tensor.repeat_interleave(copies, dim=0) for tensor in value)
            elif value.dim() > 0:
                output[name] = value.repeat_interleave(copies, dim=0)
        return output

    def language_modeling_loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """transformers' loss of shifted labels, which would compute in float32 what a float64 model gives it."""
        if logits.dtype != torch.float64:
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted, reduction="sum")
        items = kwargs.get("num_items_in_batch")
        return total / ((shifted != -100).sum() if items is None else items)


def _first_given(name: str, kwargs: dict[str, Any], *generation_configs: Any) -> int:
    """A count of `generate`: what the call leaves open, its configuration decides, then the model's."""
    given = [kwargs.get(name), *(getattr(config, name, None) for config in generation_configs)]
    return next((int(value) for value in given if value is not None), 1)


def _rows_that_read_pads(
    sequences: torch.Tensor,
    prompt: torch.Tensor | None,
    kwargs: dict[str, Any],
    configs: Sequence[Any],
) -> list[int]:
    """Rows of a batch that ended before the others: transformers feeds them pads, which their states have read."""
    given = [kwargs.get("eos_token_id"), *(getattr(config, "eos_token_id", None) for config in configs)]
    ends = next((value for value in given if value is not None), None)
    if ends is None or sequences.shape[0] == 1:
        return []
    new = sequences if prompt is None or prompt.dim() == 3 else sequences[:, prompt.shape[1] :]
    is_end = torch.isin(new, torch.as_tensor(ends, device=new.device))
    pads_read = is_end.cumsum(1)[:, :-2].bool().sum(1)  # behind the first end, and fed: all but the last token is
    return pads_read.gt(0).nonzero().flatten().tolist()


class _Note(NamedTuple):
    """What `generate` leaves on a cache it has moved. A linear cache knows no length, and callers may continue it with the
    whole text or with only what is new: the text is whole if it begins with what was read.

    columns: how many columns were read.
    index, values: prompt[:, index] is `values` for a whole text: all ids, or the prompt's first and last embedding.
    stale: the cache has been moved since, outside of `generate`, by nobody knows how much.
    """

    columns: int
    index: Any
    values: torch.Tensor
    stale: bool = False

    def begins(self, prompt: torch.Tensor) -> bool:
        values = self.values
        if prompt.dim() != values.dim() or prompt.shape[0] != values.shape[0] or prompt.shape[1] <= self.columns:
            return False
        return torch.equal(prompt[:, self.index], values)


def _continuation(
    cache: Cache | None, prompt: torch.Tensor | None, compress_prompt: bool | None
) -> tuple[_Note | None, int]:
    """The note on a filled cache, and how many of the prompt's columns it has read already; raises if it cannot go on."""
    if cache is None or not cache.has_previous_state():
        return None, 0
    if compress_prompt:
        raise ValueError(COMPRESSION_ON_A_FILLED_CACHE)
    if refusal := getattr(cache, "refusal", None):
        raise ValueError(refusal)
    note: _Note | None = getattr(cache, "note", None)
    if note is None or prompt is None or not note.begins(prompt):
        return note, 0
    if note.stale:
        raise ValueError(
            "The whole text was given with a cache that has read more than generate gave it. Give only the tokens that "
            "the cache has not read."
        )
    return note, note.columns


def _note_after(
    note: _Note | None, filled: bool, repeated: int, prompt: torch.Tensor | None, sequences: torch.Tensor
) -> _Note | None:
    """The note after a call that began with `note`: all of `sequences` is read but the last token, never fed back."""
    read = sequences[:, :-1]
    if prompt is not None and prompt.dim() == 3:
        ends = [0, prompt.shape[1] - 1]
        whole = not filled or repeated > 0
        return _Note(prompt.shape[1] + read.shape[1], ends, prompt[:, ends].clone()) if whole else None
    if filled and not repeated:
        if note is None or note.stale or note.values.dim() != 2 or note.values.shape[0] != read.shape[0]:
            return None
        read = torch.cat([note.values, read], dim=1)
    return _Note(read.shape[1], slice(read.shape[1]), read.clone())


COMPRESSION_ON_A_FILLED_CACHE = (
    "compress_prompt=True on a filled cache: what the cache has read cannot be compressed any more. Leave "
    "compress_prompt out to continue, or start without the cache."
)
_LEFT_IN_THE_MIDDLE = (
    "This cache was left in the middle of a call of generate, which was interrupted: it has read tokens that you were not "
    "given. Start again without it."
)
_ENDED_EARLY = (
    "Rows {} of this cache ended before the others, and it has read the pads that filled them up. Start a new call with the "
    "whole text and no cache, or generate row by row."
)
_HOLDS_BEAMS = (
    "This cache comes from beam search: it holds the running beams, not the returned sequences. Start a new call with the "
    "whole text and no cache."
)


def _per_copy(setting: Any, copies: int) -> Any:
    """A list with one value a row follows the rows as they are copied; transformers copies tensors itself."""
    if isinstance(setting, (list, tuple)):
        return [value for value in setting for _ in range(copies)]
    return setting


_REFUSED_MODES = {
    "assistant_model": "assisted decoding rolls its cache back, and a recurrent state cannot be rolled back. "
    "Leave assistant_model out.",
    "prompt_lookup_num_tokens": "prompt lookup rolls its cache back, and a recurrent state cannot be rolled back. "
    "Leave prompt_lookup_num_tokens out.",
    "assistant_early_exit": "self-speculation rolls its cache back, and a recurrent state cannot be rolled back. "
    "Leave assistant_early_exit out.",
    "prefill_chunk_size": "transformers' chunks would each be taken for a prompt. Pass prefill_chunk_length instead.",
}
_KEY_VALUE_CACHES = ("quantized", "paged", "sliding_window", "hybrid")


def _refuse_modes(generation_configs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for what transformers would ignore or break with a recurrent state."""
    if kwargs.get("prompt_lengths") is not None:
        raise ValueError(
            "generate takes no prompt_lengths: all it is given is the prompt. Leave it out, or call the model itself."
        )
    if len(args) > 4 and args[4] is not None:
        raise ValueError(f"assistant_model: {_REFUSED_MODES['assistant_model']}")

    def asked(name: str) -> Any:
        given = [kwargs.get(name), *(getattr(config, name, None) for config in generation_configs)]
        return next((value for value in given if value is not None), None)

    for name, reason in _REFUSED_MODES.items():
        if asked(name) is not None:
            raise ValueError(f"{name} is not supported: {reason}")
    if asked("guidance_scale") not in (None, 1):
        raise ValueError(
            "guidance_scale is not supported: transformers' guidance keeps a second cache of keys and values. Leave it out."
        )
    if asked("cache_implementation") in _KEY_VALUE_CACHES:
        raise ValueError(
            f"cache_implementation={asked('cache_implementation')!r} stores keys and values, which this model has none "
            "of. Its state has a constant size: leave cache_implementation out, or use 'static' or 'offloaded'."
        )


def _prompt_of(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The prompt that `generate` was given: ids [B, L], or embeddings [B, L, H] where there are no ids."""
    ids, embeddings = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if embeddings is None or (ids is not None and ids.dim() == 3):
        return ids
    if ids is None or ids.shape[-1] == 0:
        return embeddings
    if ids.shape[:2] != embeddings.shape[:2]:
        raise ValueError(
            f"input_ids {tuple(ids.shape)} and inputs_embeds {tuple(embeddings.shape)} are of different lengths. Give the "
            "ids that the embeddings stand for, or only one of them."
        )
    return ids


def _check_prompt(prompt: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> None:
    if prompt.dim() < 2 or prompt.shape[0] == 0 or prompt.shape[1] == 0:
        raise ValueError(
            f"The prompt is empty: its shape is {tuple(prompt.shape)}, expected [batch, length]. Give it at least one "
            "token, e.g. the bos token."
        )
    if prompt.dim() == 2:
        check_token_ids(prompt, vocab_size)
    if attention_mask is not None and attention_mask.dim() == 2:
        check_no_empty_prompt(attention_mask.sum(1).tolist())


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
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids range from {low.item()} to {high.item()}, but the vocabulary has ids 0 to {vocab_size - 1}. "
                "Use the checkpoint's own tokenizer, or resize_token_embeddings() after adding tokens."
            )

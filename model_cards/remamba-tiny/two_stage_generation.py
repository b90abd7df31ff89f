# SPDX-License-Identifier: Apache-2.0
"""The two passes over a prompt, and how `generate` runs them. Shared by every family that compresses its prompt.

Stage 1 reads the prompt and the compressor replaces its window by kept vectors; stage 2 reads the shortened prompt with
adapted steps and leaves its state in the cache (arXiv 2408.15496, section 3). Decoding is then plain.

Shapes: `B` rows, `L` columns of the input, `P` tokens of a row's prompt, `H` hidden size, `K` kept vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .precision import sent
from .recurrent_generation import RecurrentGenerationMixin, call_of_generate, prompt_of
from .recurrent_passes import (
    PackedRows,
    Progress,
    RecurrentBackbone,
    StateReader,
    check_no_empty_prompt,
    gather_columns,
)
from .selective_compression import (
    Adaptation,
    CompressedPrompt,
    Selection,
    SelectiveCompressor,
    Window,
    as_numbers,
    settings_for_rows,
    training_settings,
    training_window,
    window_of,
)


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


class TwoStageBackbone(RecurrentBackbone):
    """What a compressing backbone does besides its layers: it has a `compressor` (a `SelectiveCompressor`)."""

    compressor: SelectiveCompressor
    passes_can_be_captured = True

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
            reader = self.read_plain(rows, cache_params, kept_tokens, chunk_length, output_hidden_states, progress)
            states = rows.unpack(reader.span_states) if kept_tokens is None else reader.point_states
            blocks = reader.block_states
            blocks = blocks if blocks is None else tuple(rows.unpack(block) for block in blocks)
            return TwoStageModelOutput(last_hidden_state=states, cache_params=cache_params, hidden_states=blocks)

        shortened = [length - window.dropped for length, window in zip(rows.lengths, windows, strict=True)]
        report = _progress_over(progress, max(prompt_lengths), max(shortened))
        first = self._read_prompts(rows, windows, prompt_lengths, kept_tokens, chunk_length, output_hidden_states, report(0))
        selection = self._select(first, windows)
        finite = selection.scores.isfinite().all()
        prompt = CompressedPrompt(windows, selection, shortened)
        second = self._read_compressed(rows, prompt, cache_params, kept_tokens, chunk_length, report(1))
        # Asked for only now, because to be told the host has to wait for the device.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not finite:
            raise ValueError(
                "The scores of the prompt are not finite: the weights hold NaN or inf, or float16 overflowed. Check the "
                "checkpoint, and load it in bfloat16 or float32."
            )
        blocks = first.block_states
        return TwoStageModelOutput(
            last_hidden_state=_align(rows, windows, first, second, kept_tokens),
            cache_params=cache_params,
            hidden_states=blocks if blocks is None else tuple(rows.unpack(block) for block in blocks),
            compressed_positions=selection.positions,
            compression_scores=selection.scores,
        )

    def _read_prompts(
        self,
        rows: PackedRows,
        windows: list[Window],
        prompt_lengths: list[int],
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        with_blocks: bool,
        progress: Progress | None,
    ) -> StateReader:
        """Stage 1. Reads the window's states, each query token's, and those that the output takes from this pass."""
        queries = sent(prompt_lengths, rows.device).unsqueeze(1) - 1
        if kept_tokens is None:
            reader = StateReader((0, max(prompt_lengths)), queries, with_blocks)
        else:
            compressed = [window for window in windows if window.length]
            span = min(window.start for window in compressed), max(window.stop for window in compressed)
            reader = StateReader(span, torch.cat([queries, kept_tokens], dim=1), with_blocks)
        self.run_pass(
            lambda begin, end: (rows.embed(begin, end), None), prompt_lengths, None, chunk_length, reader, progress
        )
        return reader

    def _select(self, first: StateReader, windows: list[Window]) -> Selection:
        states = first.span_states
        longest = max(window.length for window in windows)
        starts = [window.start - first.span[0] if window.length else 0 for window in windows]
        if all(start == starts[0] for start in starts) and starts[0] + longest <= states.shape[1]:
            window_states = states[:, starts[0] : starts[0] + longest]
        else:
            columns = sent(starts, states.device)[:, None] + torch.arange(longest, device=states.device)
            window_states = gather_columns(states, columns.clamp(max=states.shape[1] - 1))
        return self.compressor(first.point_states[:, 0], window_states, windows, self.config)

    def _read_compressed(
        self,
        rows: PackedRows,
        prompt: CompressedPrompt,
        cache_params: Cache | None,
        kept_tokens: torch.Tensor | None,
        chunk_length: int | None,
        progress: Progress | None,
    ) -> StateReader:
        """Stage 2: the rows with their windows replaced."""
        sources = prompt.sources(rows.device)
        points = None
        if kept_tokens is not None:
            points = (kept_tokens - _column(prompt.windows, "dropped", rows.device)).clamp(min=0)
        reader = StateReader((0, sources.shape[1] if kept_tokens is None else 0), points)

        def embed(begin: int, end: int) -> tuple[torch.Tensor, Adaptation | None]:
            return prompt.splice(rows.embed_positions(sources[:, begin:end]), begin)

        self.run_pass(embed, prompt.lengths, cache_params, chunk_length, reader, progress)
        return reader

    def plan_windows(
        self,
        row_lengths: list[int],
        prompt_lengths: list[int] | None,
        start: Any = None,
        span: Any = None,
        ratio: Any = None,
        trains: bool = False,
        seeds: list[int] | None = None,
    ) -> list[Window]:
        """Each row's window: settings given for the call, the others drawn if the model trains (`seeds`: see
        `training_settings`), else the configuration's."""
        config, batch = self.config, len(row_lengths)
        if prompt_lengths is None:
            return [Window(0, 0, 0)] * batch
        given = (config, batch, start, span, ratio)
        settings = training_settings(*given, seeds) if trains else settings_for_rows(*given)
        rows = zip(prompt_lengths, settings, strict=True)
        most = config.compression_max_kept if ratio is None else None  # a ratio asked for is a ratio given
        if trains and span is None:
            return [training_window(config, length, setting, most) for length, setting in rows]
        return [window_of(length, setting, config.compression_min_prompt, max_kept=most) for length, setting in rows]


def prompts_to_compress(
    rows: PackedRows,
    compress_prompt: bool | None,
    prompt_lengths: Any,
    labels: torch.Tensor | None,
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
    prompts = row_prompt_lengths(prompt_lengths, labels, rows.lengths, rows.mask)
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


def _column(windows: list[Window], name: str, device: torch.device) -> torch.Tensor:
    """[B, 1] long: one field of every row's window."""
    return sent([getattr(window, name) for window in windows], device).unsqueeze(1)


def _align(
    rows: PackedRows,
    windows: list[Window],
    first: StateReader,
    second: StateReader,
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
    return gather_columns(torch.cat([early, late], dim=1), torch.where(tokens < stop, tokens, behind))


def _progress_over(progress: Progress | None, first: int, second: int) -> Callable[[int], Progress | None]:
    """Progress callbacks of the two stages that count as one task of first + second positions."""
    if progress is None:
        return lambda stage: None
    return lambda stage: lambda done, _: progress(done + stage * first, first + second)


class TwoStageGenerationMixin(RecurrentGenerationMixin):
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
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with the prompt compressed before decoding begins.

        Args:
            inputs, generation_config, *args, **kwargs: as for `RecurrentGenerationMixin.generate`, `prefill_chunk_length`
                and `prefill_progress` among them; both stages count as progress.
            compress_prompt (`bool`, *optional*): False reads the prompt as plain Mamba would; True insists, and raises
                on a filled cache. Default: compress, unless a filled cache is continued.
            compression_start, compression_span, compression_ratio (`float`, or one a row, *optional*):
                s, p and rho for this call; default: the configuration's. A ratio given here is not bounded by the
                configuration's `compression_max_kept`. Without effect where nothing is compressed.

        Returns:
            What `GenerationMixin.generate` returns.

        Raises:
            ValueError: settings out of range, compression forced on a filled cache, and what
                `RecurrentGenerationMixin.generate` refuses.
        """
        settings = [as_numbers(value) for value in (compression_start, compression_span, compression_ratio)]
        prompt = prompt_of(inputs, kwargs)
        if prompt is not None and prompt.dim() > 1 and prompt.shape[0]:
            settings_for_rows(self.config, prompt.shape[0], *settings)
        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        self.backbone.check_cache(cache)
        if compress_prompt and cache is not None and cache.has_previous_state():
            raise ValueError(COMPRESSION_ON_A_FILLED_CACHE)
        copies = self.prompt_copies(generation_config, kwargs)
        start, span, ratio = (_per_copy(value, copies) for value in settings)
        return super().generate(
            inputs,
            generation_config,
            *args,
            compress_prompt=compress_prompt,
            compression_start=start,
            compression_span=span,
            compression_ratio=ratio,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        compress_prompt: bool | None = None,
        compression_start: Any = None,
        compression_span: Any = None,
        compression_ratio: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one `forward`. Whoever reads the prompt also gets the compression settings and the prompt's length."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            prefill_chunk_length=prefill_chunk_length,
            prefill_progress=prefill_progress,
            **kwargs,
        )
        if cache_params is not None and cache_params.has_previous_state():
            return model_inputs
        prompt_columns = call_of_generate().prompt_columns
        if compress_prompt is not False and prompt_columns is not None:
            tokens = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            mask = attention_mask if attention_mask is not None else tokens.new_ones(tokens.shape[:2], dtype=torch.long)
            model_inputs["prompt_lengths"] = mask[:, :prompt_columns].sum(1)
        model_inputs.update(
            compress_prompt=compress_prompt,
            compression_start=compression_start,
            compression_span=compression_span,
            compression_ratio=compression_ratio,
        )
        return model_inputs


COMPRESSION_ON_A_FILLED_CACHE = (
    "compress_prompt=True on a filled cache: what the cache has read cannot be compressed any more. Leave "
    "compress_prompt out to continue, or start without the cache."
)


def _per_copy(setting: Any, copies: int) -> Any:
    """A list with one value a row follows the rows as they are copied; transformers copies tensors itself."""
    if isinstance(setting, (list, tuple)):
        return [value for value in setting for _ in range(copies)]
    return setting

# SPDX-License-Identifier: Apache-2.0
"""`generate` for models whose cache is a state of constant size: chunked prefill, exact continuation of a returned cache,
and clear refusal of what such a cache cannot do. Shared by every family.

Shapes: `B` rows, `L` columns of the prompt, `H` hidden size.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.loss.loss_utils import ForCausalLMLoss

from .decode_graph import RUNS_AHEAD, CacheStep, EagerStep, FusedStep, Survey, decode, graphs_of, why_not_graphed
from .prompt_graph import prompts_through_graphs
from .recurrent_passes import Progress, check_chunk_length, check_no_empty_prompt, check_token_ids
from .token_loss import loss_kernels_run, token_loss


class GenerateCall(NamedTuple):
    """What a call of `generate` knows and transformers does not pass on to what runs inside.

    cuda_graph, state_dtype: as given.
    keeps_cache: the caller has the cache, and may continue it.
    prompt_columns: of the prompt as given; None outside of `generate`.
    prompt_copies: how many rows are made of every row of the prompt.
    columns_read: how many columns of the prompt the cache has read already.
    """

    cuda_graph: bool | None = None
    state_dtype: torch.dtype | None = None
    keeps_cache: bool = False
    prompt_columns: int | None = None
    prompt_copies: int = 1
    columns_read: int = 0


_CALL: ContextVar[GenerateCall | None] = ContextVar("call", default=None)


def call_of_generate() -> GenerateCall:
    """The call of `generate` that this runs in."""
    return _CALL.get() or GenerateCall()


class RecurrentGenerationMixin(GenerationMixin):
    """transformers' `generate` on a recurrent state."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        cuda_graph: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, which reads the prompt in chunks and continues caches exactly.

        Args:
            inputs, generation_config, *args, **kwargs: as for `GenerationMixin.generate`. A cache returned by an earlier
                call continues with `cache_params=cache` (or `past_key_values=cache`) and the tokens it has not seen:
                the last generated one, which was never fed back, and the new ones; or with the whole text.
            prefill_chunk_length (`int`, *optional*): read the prompt in chunks of this many tokens. Same result, with
                memory for activations bounded by the chunk. Default: chunks of 16,384.
            prefill_progress (`Callable[[int, int], Any]`, *optional*): called after every chunk with the tokens read and
                the tokens to read.
            cuda_graph (`bool`, *optional*): decode with captured steps (decode_graph.py), and read prompts of a length that
                comes again through captured passes (prompt_graph.py), with the same result but for rounding. Default: on
                CUDA, where it is possible and worth the capture. True captures at once, and raises where steps cannot be
                captured; False captures nothing and leaves decoding to transformers' own loop.
            state_dtype (`torch.dtype`, *optional*): of the recurrent state while captured steps decode, such as
                `torch.bfloat16`: less memory traffic for large batches, and a state that is rounded after every token.
                Default: as the prompt leaves it, in float32. Raises where steps cannot be captured.

        Returns:
            What `GenerationMixin.generate` returns.

        Raises:
            ValueError: an empty prompt or row, ids outside the vocabulary, or a generation mode that a recurrent state
                cannot serve.
        """
        generation_configs = (generation_config, self.generation_config)
        _refuse_virtual_tokens(self)
        _refuse_modes(generation_configs, args, kwargs)
        if (cache := kwargs.pop("past_key_values", None)) is not None:
            kwargs.setdefault("cache_params", cache)
        cache = kwargs.get("cache_params")
        self.backbone.check_cache(cache)
        prompt = prompt_of(inputs, kwargs)
        if prompt is not None:
            _check_prompt(prompt, kwargs.get("attention_mask"), self.config.vocab_size)
        if prefill_chunk_length is not None:
            check_chunk_length(prefill_chunk_length)
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or torch.float16, got {state_dtype!r}.")
        note, repeated = _continuation(cache, prompt)
        filled = cache is not None and cache.has_previous_state()
        beams = _first_given("num_beams", kwargs, *generation_configs)
        call = GenerateCall(
            cuda_graph,
            state_dtype,
            keeps_cache=cache is not None,
            prompt_columns=1 if prompt is None else prompt.shape[1],
            prompt_copies=self.prompt_copies(generation_config, kwargs),
            columns_read=repeated,
        )
        outer = _CALL.set(call)
        try:
            result = super().generate(
                inputs,
                generation_config,
                *args,
                prefill_chunk_length=prefill_chunk_length,
                prefill_progress=prefill_progress,
                **kwargs,
            )
        finally:
            _CALL.reset(outer)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        cache = getattr(result, "past_key_values", cache)
        if cache is not None:
            early = _rows_that_read_pads(sequences, prompt, kwargs, generation_configs)
            cache.refusal = _HOLDS_BEAMS if beams > 1 else _ENDED_EARLY.format(early) if early else None
            cache.note = None if beams > 1 else _note_after(note, filled, repeated, prompt, sequences)
        return result

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: with captured steps where that is possible, else transformers' own loop."""
        call = call_of_generate()
        survey = Survey.of(self)
        reason = why_not_graphed(self, survey, generation_config, stopping_criteria, model_kwargs)
        if synced_gpus:
            reason = "the processes of a sharded model have to keep step"
        if call.cuda_graph and reason:
            raise ValueError(f"cuda_graph=True is not possible: {reason}. Leave it out to decode without.")
        if call.state_dtype is not None and (reason or call.cuda_graph is False):
            reason = reason or "cuda_graph=False was given"
            raise ValueError(f"state_dtype={call.state_dtype} needs captured steps, but {reason}. Leave it out.")
        if reason or call.cuda_graph is False:
            loop = super()._sample
            return loop(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        with prompts_through_graphs(self, survey, insist=bool(call.cuda_graph)):
            output = self._prefill(input_ids, generation_config, model_kwargs)
        cache = output.cache_params
        steps = stopping_criteria.max_length - input_ids.shape[1] - 1
        insist = bool(call.cuda_graph) or call.state_dtype is not None
        step = graphs_of(self).step(self, cache, steps, insist, call.state_dtype, survey) or EagerStep(self, cache)
        keeps_cache = call.keeps_cache or generation_config.return_dict_in_generate
        sequences, scores, logits = decode(
            step,
            output.logits[:, -1],
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            late=0 if keeps_cache else RUNS_AHEAD,
        )
        if keeps_cache:
            step.leave(self, cache)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=scores if generation_config.output_scores else None,
            logits=logits if generation_config.output_logits else None,
            past_key_values=cache,
        )

    def step_to_capture(self, cache: Cache, fused: bool) -> CacheStep:
        """A step on the states in `cache`, in kernels that read the weights themselves if that is possible (`fused`)."""
        return FusedStep(self, cache) if fused else CacheStep(self, cache)

    def prompt_copies(self, generation_config: Any, kwargs: dict[str, Any]) -> int:
        """How many rows `generate` makes of every row of the prompt: beams, or return sequences."""
        names = ("num_beams", "num_return_sequences")
        return max(_first_given(name, kwargs, generation_config, self.generation_config) for name in names)

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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one `forward`. Whoever reads the prompt, the first iteration or every one without a cache, also gets
        what concerns reading; a decoding step gets its token and the cache, nothing else."""
        call = call_of_generate()
        filled = cache_params is not None and cache_params.has_previous_state()
        if filled and not is_first_iteration:
            input_ids, attention_mask = input_ids[:, -1:], None
        if is_first_iteration and cache_params is not None:
            cache_params.refusal = _LEFT_IN_THE_MIDDLE  # until the call ends, it is ahead of what its owner was given
        if filled and is_first_iteration and call.columns_read:  # the whole text came again
            input_ids = input_ids[:, call.columns_read :]
            inputs_embeds = inputs_embeds if inputs_embeds is None else inputs_embeds[:, call.columns_read :]
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
        if not filled:
            model_inputs["prompt_copies"] = call.prompt_copies if is_first_iteration else 1
        return model_inputs

    def forward_one_of_each(self, copies: int, **inputs: Any) -> Any:
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
        """transformers' loss of shifted labels, or whatever `loss_function` was set to.

        transformers' own computes in float32 what a float64 model gives it, and copies narrow logits to float32.
        `token_loss` does neither, and takes its place where that matters.
        """
        asked = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        narrow = logits.dtype in (torch.bfloat16, torch.float16) and loss_kernels_run(logits)
        replaced = self.loss_function is ForCausalLMLoss and asked.keys() <= _LOSS_ARGUMENTS
        if not replaced or not (narrow or logits.dtype == torch.float64):
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        ignored = asked.get("ignore_index", -100)
        shifted = asked.get("shift_labels")
        if shifted is None:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
        shifted = shifted.flatten().to(logits.device)
        total = token_loss(logits.flatten(0, -2), shifted, ignored)
        items = asked.get("num_items_in_batch")
        if items is None:
            return total / (shifted != ignored).sum()
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)


_LOSS_ARGUMENTS = {"num_items_in_batch", "ignore_index", "shift_labels"}  # of transformers' loss, which ignores others


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


def _continuation(cache: Cache | None, prompt: torch.Tensor | None) -> tuple[_Note | None, int]:
    """The note on a filled cache, and how many of the prompt's columns it has read already; raises if it cannot go on."""
    if cache is None or not cache.has_previous_state():
        return None, 0
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


def _refuse_virtual_tokens(model: Any) -> None:
    """Raise for PEFT's prompt learning, which puts its virtual tokens in front of every step of a cache it does not know."""
    wrapper = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "PEFT's prompt learning cannot generate with a recurrent state: its virtual tokens would be read again at every "
            "step. Give them as inputs_embeds to the base model's generate: torch.cat([model.get_prompt(batch), "
            "embeddings(input_ids)], dim=1). LoRA has no such limit."
        )


def prompt_of(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
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

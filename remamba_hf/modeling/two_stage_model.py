# SPDX-License-Identifier: Apache-2.0
"""The model of the families that compress their prompt: blocks with adapted steps, the forward of the backbone and of the
language model. A family brings its configuration and its mixer.

Beyond the weights of a plain model: `backbone.compressor` (Query, Key, Value) and, in every mixer, `adaptation.bias` (Theta,
Eq. 8 of arXiv 2408.15496).

Shapes: `B` rows, `L` columns of the input, `H` hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .precision import is_plain_weight
from .recurrent_model import (
    OwnStart,
    RecurrentForCausalLM,
    RecurrentMixer,
    RecurrentModel,
    RMSNorm,
    add_mixed,
    is_filled,
    is_unhooked,
)
from .recurrent_passes import Progress, chunk_length_for
from .selective_compression import Adaptation, SelectiveCompressor, checked_seeds, settings_for_rows
from .two_stage_generation import (
    TwoStageBackbone,
    TwoStageCausalLMOutput,
    TwoStageGenerationMixin,
    TwoStageModelOutput,
    prompts_to_compress,
)


class StepAdaptation(OwnStart):
    """Theta of Eq. 8: what a kept vector adds to each of the `size` step sizes before softplus. Starts at zero."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The flat positions `where` [n], and Theta [size], which step sizes get there: see `precision.with_shift`."""
        return where, self.bias

    def init_parameters(self) -> None:
        init.zeros_(self.bias)


class TwoStageBlock(GradientCheckpointingLayer):
    """Norm, mixer, residual. A family sets `mixer_class`, called with (hidden_states, adaptation, lengths, cache_params) and
    perhaps `onto`."""

    mixer_class: type[RecurrentMixer]

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.mixer_class(config, layer_idx)

    def state_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of the layer's cached states, slot by slot."""
        return [self.mixer.state_shapes()]

    def forward(
        self,
        hidden_states: torch.Tensor,
        alpha: torch.Tensor | None = None,
        adapted: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        overwrites: bool = False,
    ) -> torch.Tensor:
        """alpha [n] and the flat positions `adapted` [n] make an `Adaptation`. They come apart because a checkpointed
        block passes gradients only to tensors that are its own positional arguments. `overwrites`: see `add_mixed`."""
        adaptation = None if alpha is None or adapted is None else Adaptation(adapted, alpha)
        inputs = adaptation, lengths, cache_params
        return add_mixed(hidden_states, self.norm, self.mixer, inputs, self.residual_in_fp32, overwrites)


class TwoStageModel(TwoStageBackbone, RecurrentModel):
    """The backbone of a plain model, and the compressor between its two passes."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.compressor = SelectiveCompressor(config.hidden_size)
        self.post_init()

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | None,
        adaptation: Adaptation | None,
        cache_params: Cache | None,
        block_states: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """All blocks and the final norm over [B, T, H]; see `TwoStageBackbone`."""
        alpha, adapted = (None, None) if adaptation is None else (adaptation.alpha, adaptation.where)
        overwrites = False  # what came in
        for block in self.layers:
            others = dict(adapted=adapted, lengths=lengths, cache_params=cache_params, overwrites=overwrites)
            hidden_states = block(hidden_states, alpha, **others)
            overwrites = block_states is None and is_unhooked(block)
            if block_states is not None:
                block_states.append(hidden_states)
        hidden_states = self.norm_f(hidden_states)
        if block_states is not None:
            block_states.append(hidden_states)
        return hidden_states

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        labels: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        compress_prompt: bool | None = None,
        compression_start: Any = None,
        compression_span: Any = None,
        compression_ratio: Any = None,
        compression_seeds: Any = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        columns_to_keep: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | TwoStageModelOutput:
        """One pass, or two if the rows' prompts are known and the cache is empty.

        Args:
            input_ids: [B, L] long; or inputs_embeds: [B, L, H].
            attention_mask: [B, L], 0 at pads, which may be anywhere; longer masks are cut to their last L columns.
            cache_params: states to continue and to update.
            labels: [B, L] long, only to tell where each prompt ends: before the first label that is not -100.
            prompt_lengths: [B] long, tokens of each row that are prompt, pads excluded.
            compress_prompt: False: one plain pass. True: compress, all of a row being prompt if nothing says otherwise.
                None: compress where `prompt_lengths` or `labels` tell the prompts.
            compression_start, compression_span, compression_ratio: float or one a row; None: the configuration's, or in
                training mode drawn from its `train_compression_*` ranges.
            compression_seeds: [B] long, seeds of what each row draws, which then depends neither on the other rows nor on
                what was drawn before; None: one draw for all rows, from torch's generator. Without effect where nothing
                is drawn.
            prefill_chunk_length: read that many positions at a time (inference only).
            prefill_progress: called with (positions read, positions to read) after each chunk.
            columns_to_keep: return only the last columns of `last_hidden_state`.
            use_cache: return the states; default: the configuration's, never in training.

        Returns:
            `TwoStageModelOutput`.
        """
        rows, cache_params, use_cache = self.rows_to_read(
            input_ids, inputs_embeds, attention_mask, labels, cache_params, use_cache, kwargs
        )
        settings = (compression_start, compression_span, compression_ratio)
        settings_for_rows(self.config, rows.batch, *settings)  # raises on what is out of range
        seeds = None if compression_seeds is None else checked_seeds(compression_seeds, rows.batch)
        # `generate` reads a prompt without labels and gradients, and never draws, in whichever mode the model is.
        trains = self.training and (labels is not None or torch.is_grad_enabled())
        prompts = prompts_to_compress(rows, compress_prompt, prompt_lengths, labels, settings, is_filled(cache_params))
        output = self.read_rows(
            rows,
            self.plan_windows(rows.lengths, prompts, *settings, trains=trains, seeds=seeds),
            prompts or rows.lengths,
            cache_params,
            columns_to_keep,
            chunk_length_for(max(rows.lengths), prefill_chunk_length),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            prefill_progress,
        )
        return self.finished(output, use_cache, return_dict)

    @torch.no_grad()
    def initialize_compressor(self) -> None:
        """The authors' start from a pretrained backbone: Key and Query from layer 0's in_proj, Value from its out_proj.

        Copies, with zero biases: Key[0], Key[2], Query[0], Query[2] are the first four H-row blocks of in_proj, Value[0]
        and Value[2] the two H-column blocks of out_proj.

        Raises:
            ValueError: `expand` is not 2, so these blocks do not exist, or layer 0 is quantised.
        """
        size = self.config.hidden_size
        if self.config.intermediate_size != 2 * size:
            raise ValueError(f"The compressor's start needs expand=2, this model has expand={self.config.expand}.")
        mixer: Any = self.layers[0].mixer
        if not (is_plain_weight(mixer.in_proj.weight) and is_plain_weight(mixer.out_proj.weight)):
            raise ValueError(
                "Layer 0 is quantised or sharded: the compressor cannot start from its weights. Load the model without "
                "quantization_config, initialize_compressor(), save (or remamba convert --init-compressor), and load that."
            )
        rows = mixer.in_proj.weight.split(size)
        columns = mixer.out_proj.weight.split(size, dim=1)
        compressor: Any = self.compressor
        for projection, first, second in (
            (compressor.key, rows[0], rows[1]),
            (compressor.query, rows[2], rows[3]),
            (compressor.value, columns[0], columns[1]),
        ):
            for linear, weight in ((projection[0], first), (projection[2], second)):
                linear.weight.copy_(weight)
                linear.bias.zero_()


class TwoStageForCausalLM(RecurrentForCausalLM, TwoStageGenerationMixin):
    """A compressing backbone with a language modeling head; `generate` compresses the prompt."""

    output_class = TwoStageCausalLMOutput

    def initialize_compressor(self) -> None:
        """The authors' start of Query, Key and Value from layer 0; see `TwoStageModel.initialize_compressor`."""
        self.backbone.initialize_compressor()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        labels: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        compress_prompt: bool | None = None,
        compression_start: Any = None,
        compression_span: Any = None,
        compression_ratio: Any = None,
        compression_seeds: Any = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        prompt_copies: int = 1,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> tuple | TwoStageCausalLMOutput:
        """Next-token logits aligned with the input, and the loss of the labels.

        Args:
            labels: [B, L] long, shifted inside; -100 does not count. Unless `prompt_lengths` is given, a row's prompt
                ends where its labels start, and is compressed. Labels from the first token on: plain language modeling.
            prompt_copies: rows come in groups of this many equal ones, of which one is read (set by `generate`).
            logits_to_keep: logits of that many last columns, or of the columns in a tensor; 0: of all.
            Everything else as for `TwoStageModel.forward`.

        Returns:
            `TwoStageCausalLMOutput`.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "cache_params": cache_params,
            "prompt_lengths": prompt_lengths,
            "compress_prompt": compress_prompt,
            "compression_start": compression_start,
            "compression_span": compression_span,
            "compression_ratio": compression_ratio,
            "compression_seeds": compression_seeds,
            "prefill_chunk_length": prefill_chunk_length,
            "prefill_progress": prefill_progress,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
        }
        return self.run(inputs, labels, logits_to_keep, prompt_copies, return_dict, kwargs)

# SPDX-License-Identifier: Apache-2.0
"""What every two-stage family shares of its model: norm, block, the mixer's convolution and cached states, the forward of
the backbone and of the language model. A family brings its configuration and its mixer.

Weights have the names of transformers' Mamba, so that its checkpoints load as they are. Beyond them:
`backbone.compressor` (Query, Key, Value) and, in every mixer, `adaptation.bias` (Theta, Eq. 8 of arXiv 2408.15496).

Shapes: `B` rows, `L` positions of a pass, `H` hidden size, `E` channels of the convolution, `W` its width.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_convolution import causal_conv1d, causal_conv1d_step
from .precision import at_least_float32
from .selective_compression import Adaptation, SelectiveCompressor, settings_for_rows
from .two_stage_generation import (
    PackedRows,
    Progress,
    TwoStageBackbone,
    TwoStageCausalLMOutput,
    TwoStageGenerationMixin,
    TwoStageModelOutput,
    check_shapes,
    check_token_ids,
    chunk_length_for,
    prompts_to_compress,
)


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 at least, returned in the weight's dtype."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = at_least_float32(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class StepAdaptation(nn.Module):
    """Theta of Eq. 8: what a kept vector adds to each of the `size` step sizes before softplus. Starts at zero."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, step: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """step [B, L, size] before softplus, with Theta added at the flat positions `index` [n]."""
        theta = self.bias.to(step.dtype).expand(len(index), -1)
        return step.flatten(0, 1).index_add(0, index, theta).view_as(step)


def depthwise_convolution(config: Any, channels: int) -> nn.Conv1d:
    """The mixer's convolution over `channels`, with transformers' names and padding."""
    width, bias = config.conv_kernel, config.use_conv_bias
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias, padding=width - 1)


class TwoStageMixer(nn.Module):
    """The part of a mixer that both of Mamba's generations have: a depthwise convolution and states in a cache.

    Projections are always called as modules, never through their weights, so that adapters, quantised layers and hooks
    act. A family's `forward(hidden_states, adaptation, lengths, cache_params)` makes one pass over [B, L, H].
    It has the modules `conv1d` (see `depthwise_convolution`) and `out_proj`.
    """

    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def init_steps_and_decay(self) -> None:
        """Set what decides how long the state remembers; called for models that are not loaded."""
        raise NotImplementedError

    def initial_step_bias(self, size: int, device: torch.device) -> torch.Tensor:
        """Biases [size] whose softplus is log-uniform in [time_step_min, time_step_max]; arXiv 2312.00752, section 3.6."""
        low, high = math.log(self.config.time_step_min), math.log(self.config.time_step_max)
        uniform = torch.rand(size, dtype=torch.float32, device=device)
        dt = torch.exp(low + uniform * (high - low)).clamp(min=self.config.time_step_floor)
        return dt + torch.log(-torch.expm1(-dt))

    @property
    def convolution_is_plain(self) -> bool:
        """Whether the convolution is what its weights say: not wrapped by an adapter, quantised, offloaded or hooked."""
        module = self.conv1d
        return (
            type(module) is nn.Conv1d
            and not hasattr(module, "_hf_hook")
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )

    def convolve(
        self, x: torch.Tensor, state: torch.Tensor | None, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """silu(conv(x)) [B, L, E] and the state [B, E, W] after each row's `lengths` tokens; see `causal_conv1d`."""
        if self.convolution_is_plain:
            return causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state, lengths)
        width = self.config.conv_kernel
        no_effect = x.new_ones(x.shape[-1], width)
        _, final_state = causal_conv1d(x, no_effect, None, state, lengths)
        past = x.new_zeros(x.shape[0], x.shape[-1], width - 1) if state is None else state[..., 1:].to(x.dtype)
        y = self.conv1d(torch.cat([past, x.transpose(1, 2)], dim=-1))
        return F.silu(y[..., width - 1 : width - 1 + x.shape[1]]).transpose(1, 2), final_state

    def convolve_token(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`convolve` for one token x [B, E]; the cached `state` [B, E, W] is updated in place."""
        if self.convolution_is_plain:
            return causal_conv1d_step(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state)
        y, new_state = self.convolve(x.unsqueeze(1), state, None)
        state.copy_(new_state)
        return y[:, 0]

    def cached_states(self, cache_params: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The layer's convolution inputs [B, E, W] and recurrent state, or None before the first pass."""
        if cache_params is None or not cache_params.has_previous_state(self.layer_idx):
            return None, None
        layer = cache_params.layers[self.layer_idx]
        states = layer.conv_states[0], layer.recurrent_states[0]
        if torch.is_grad_enabled():  # kept for the backward pass, while the cache's own tensors are overwritten
            return states[0].clone(), states[1].clone()
        return states

    def update_cache(self, cache_params: Cache | None, conv_state: torch.Tensor, state: torch.Tensor | None) -> None:
        """Leave the states that a pass ended with in the cache, if there is one."""
        if cache_params is not None:
            cache_params.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=self.config.conv_kernel)
            cache_params.update_recurrent_state(state, self.layer_idx)

    @staticmethod
    def decodes(hidden_states: torch.Tensor, lengths: torch.Tensor | None, adaptation: Adaptation | None) -> bool:
        """Whether a pass that continues a cache is one decoding step: a single token of every row, without gradients."""
        return hidden_states.shape[1] == 1 and lengths is None and adaptation is None and not torch.is_grad_enabled()


def without_pads(dt: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """dt [B, L, .] with 0 at the pads behind each row's `lengths` [B] tokens: a step of 0 leaves the state as it is."""
    if lengths is None:
        return dt
    pads = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]
    return dt.masked_fill(pads.unsqueeze(-1), 0.0)


class TwoStageBlock(GradientCheckpointingLayer):
    """Norm, mixer, residual. A family sets `mixer_class`."""

    mixer_class: type[TwoStageMixer]

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.mixer_class(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        alpha: torch.Tensor | None = None,
        adapted: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
    ) -> torch.Tensor:
        """alpha [n] and the flat positions `adapted` [n] make an `Adaptation`. They come apart because a checkpointed
        block passes gradients only to tensors that are its own positional arguments."""
        adaptation = None if alpha is None or adapted is None else Adaptation(adapted, alpha)
        mixed = self.mixer(self.norm(hidden_states), adaptation, lengths, cache_params)
        return (at_least_float32(hidden_states) if self.residual_in_fp32 else hidden_states) + mixed


class TwoStagePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation. A family sets `config_class`, `_no_split_modules` and what stays in float32."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but damaged weights are named as such.

        Raises:
            OSError: a safetensors file is cut off or damaged.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"A weight file of {pretrained_model_name_or_path} is damaged or cut off ({error}). Get the files again."
            ) from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a file in the folder's place is an error instead of a log line.

        Raises:
            FileExistsError: `save_directory` is a file.
        """
        if Path(save_directory).is_file():
            raise FileExistsError(f"{save_directory} is a file. Give the folder to save the checkpoint in.")
        return super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, StepAdaptation):
            init.zeros_(module.bias)
        elif isinstance(module, TwoStageMixer):
            module.init_steps_and_decay()
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
            if module.conv1d.bias is not None:
                init.zeros_(module.conv1d.bias)
            init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            if self.config.rescale_prenorm_residual:
                init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(self.config.num_hidden_layers))


class TwoStageModel(TwoStageBackbone, TwoStagePreTrainedModel):
    """The backbone: embeddings, blocks, final norm, and the compressor between the two passes.

    A family sets `block_class`.
    """

    block_class: type[TwoStageBlock]

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.block_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.compressor = SelectiveCompressor(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embeddings = new_embeddings

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
        for block in self.layers:
            hidden_states = block(hidden_states, alpha, adapted=adapted, lengths=lengths, cache_params=cache_params)
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
            prefill_chunk_length: read that many positions at a time (inference only).
            prefill_progress: called with (positions read, positions to read) after each chunk.
            columns_to_keep: return only the last columns of `last_hidden_state`.
            use_cache: return the states; default: the configuration's, never in training.

        Returns:
            `TwoStageModelOutput`.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        cache_params = _checked_arguments(kwargs, cache_params)
        check_shapes(input_ids, inputs_embeds, labels)
        if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(input_ids, self.config.vocab_size)
        attention_mask = _checked_mask(attention_mask, tokens)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if _is_filled(cache_params) and torch.is_grad_enabled():
                raise ValueError(
                    "A filled cache cannot be continued under gradient checkpointing: recomputing would find it moved. "
                    "Call gradient_checkpointing_disable(), or start without the cache."
                )
        if not use_cache and not _is_filled(cache_params):
            cache_params = None
        elif cache_params is None:
            cache_params = DynamicCache(config=self.config)
        _check_cache_rows(cache_params, tokens.shape[0])
        note = getattr(cache_params, "note", None)
        if cache_params is not None and note is not None and not note.stale:
            cache_params.note = note._replace(stale=True)

        rows = PackedRows(input_ids, inputs_embeds, attention_mask, self.embeddings)
        settings = (compression_start, compression_span, compression_ratio)
        settings_for_rows(self.config, rows.batch, *settings)  # raises on what is out of range
        # `generate` reads a prompt without labels and gradients, and never draws, in whichever mode the model is.
        trains = self.training and (labels is not None or torch.is_grad_enabled())
        prompts = prompts_to_compress(
            rows, compress_prompt, prompt_lengths, labels, attention_mask, settings, _is_filled(cache_params)
        )
        output = self.read_rows(
            rows,
            self.plan_windows(rows.lengths, prompts, *settings, trains=trains),
            prompts or rows.lengths,
            cache_params,
            columns_to_keep,
            chunk_length_for(max(rows.lengths), prefill_chunk_length),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            prefill_progress,
        )
        if not use_cache:
            output.cache_params = None
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    @torch.no_grad()
    def initialize_compressor(self) -> None:
        """The authors' start from a pretrained backbone: Key and Query from layer 0's in_proj, Value from its out_proj.

        Copies, with zero biases: Key[0], Key[2], Query[0], Query[2] are the first four H-row blocks of in_proj, Value[0]
        and Value[2] the two H-column blocks of out_proj.

        Raises:
            ValueError: `expand` is not 2, so these blocks do not exist.
        """
        size = self.config.hidden_size
        if self.config.intermediate_size != 2 * size:
            raise ValueError(f"The compressor's start needs expand=2, this model has expand={self.config.expand}.")
        mixer: Any = self.layers[0].mixer
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


class TwoStageForCausalLM(TwoStagePreTrainedModel, TwoStageGenerationMixin):
    """A backbone with a language modeling head; `generate` compresses the prompt. A family sets `backbone_class`."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    backbone_class: type[TwoStageModel]

    def __init__(self, config: Any):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.backbone.set_input_embeddings(new_embeddings)

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
        if prompt_copies > 1:
            return self.forward_one_of_each(
                prompt_copies,
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                labels=labels,
                prompt_lengths=prompt_lengths,
                compress_prompt=compress_prompt,
                compression_start=compression_start,
                compression_span=compression_span,
                compression_ratio=compression_ratio,
                prefill_chunk_length=prefill_chunk_length,
                prefill_progress=prefill_progress,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        last_columns = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep and labels is None else None
        output = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            labels=labels,
            prompt_lengths=prompt_lengths,
            compress_prompt=compress_prompt,
            compression_start=compression_start,
            compression_span=compression_span,
            compression_ratio=compression_ratio,
            prefill_chunk_length=prefill_chunk_length,
            prefill_progress=prefill_progress,
            columns_to_keep=last_columns,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = output.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and labels is None:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = at_least_float32(self.lm_head(hidden_states))
        loss = None
        if labels is not None:  # of all columns, whatever is returned of them
            loss = self.language_modeling_loss(logits, labels, **kwargs)
            if isinstance(logits_to_keep, torch.Tensor):
                logits = logits[:, logits_to_keep]
            elif logits_to_keep:
                logits = logits[:, -logits_to_keep:]
        result = TwoStageCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=output.cache_params,
            hidden_states=output.hidden_states,
            compressed_positions=output.compressed_positions,
            compression_scores=output.compression_scores,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()


def _is_filled(cache_params: Cache | None) -> bool:
    return cache_params is not None and cache_params.has_previous_state()


def _check_cache_rows(cache_params: Cache | None, batch: int) -> None:
    if cache_params is not None and _is_filled(cache_params):
        rows = cache_params.layers[0].recurrent_states[0].shape[0]
        if rows != batch:
            raise ValueError(
                f"The cache holds {rows} rows, the input {batch}. Repeat the cache's rows first: "
                "cache.reorder_cache(torch.arange(rows).repeat_interleave(copies))."
            )


def _checked_arguments(kwargs: dict[str, Any], cache_params: Cache | None) -> Cache | None:
    """The cache under either of its names; raises on arguments that this model would have to ignore."""
    misspelt = [name for name in kwargs if name.startswith(("compres", "prefil", "prompt"))]
    if misspelt:
        raise ValueError(f"forward has no arguments {misspelt}. Check their spelling against its docstring.")
    cache = kwargs.pop("past_key_values", None)
    if any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")):
        raise ValueError(
            "Packed rows (seq_idx, cu_seq_lens_*) are not supported: a prompt is compressed row by row. Pad the examples "
            "to a batch instead, e.g. with DataCollatorForSeq2Seq."
        )
    positions = kwargs.pop("position_ids", None)
    if positions is not None and positions.shape[-1] > 1 and (positions.diff(dim=-1) < 0).any():
        raise ValueError(
            "position_ids restart inside a row, which is how packed rows look. They are not supported: pad the examples "
            "to a batch instead."
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: Mamba has no attention maps. Leave it out.")
    return cache if cache_params is None else cache_params


def _checked_mask(attention_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """The mask of the tokens given: [B, L]."""
    if attention_mask is None:
        return None
    batch, length = tokens.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, expected ({batch}, {length}): 1 at tokens, 0 at "
            "pads. Masks of more dimensions are for attention models."
        )
    return attention_mask[:, -length:]

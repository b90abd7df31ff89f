# SPDX-License-Identifier: Apache-2.0
"""What every family shares of its model: norm, the mixer's convolution and cached states, loading and saving, and what the
forward of backbones and language models have in common. A family brings its configuration, its blocks and its outputs.

Weights have the names of transformers' Mamba, so that its checkpoints load as they are.

Shapes: `B` rows, `L` columns of the input, `H` hidden size, `E` channels of the convolution, `W` its width.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from .causal_convolution import causal_conv1d, causal_conv1d_step
from .decode_kernels import norm_in_one_kernel
from .optional_kernels import kernels_enabled
from .precision import at_least_float32, is_plain_weight
from .recurrent_generation import RecurrentGenerationMixin
from .recurrent_passes import PackedRows, RecurrentBackbone, check_shapes, check_token_ids


class OwnStart(nn.Module):
    """A module whose parameters start otherwise than transformers starts linear layers and embeddings. It must have some of
    its own, not only in submodules: transformers asks no others."""

    def init_parameters(self) -> None:
        """Set the start, with the functions of `transformers.initialization`, which leave loaded weights alone."""
        raise NotImplementedError


class RMSNorm(OwnStart):
    """Root mean square norm, computed in float32 at least, returned in the weight's dtype."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (y := norm_in_one_kernel(x, self.weight, self.eps)) is not None:
            return y
        if x.is_cuda and x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # the same, with a backward pass in one kernel
        x = at_least_float32(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)

    def init_parameters(self) -> None:
        init.ones_(self.weight)


def depthwise_convolution(config: Any, channels: int) -> nn.Conv1d:
    """The mixer's convolution over `channels`, with transformers' names and padding."""
    width, bias = config.conv_kernel, config.use_conv_bias
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias, padding=width - 1)


class RecurrentMixer(OwnStart):
    """The part of a mixer that both of Mamba's generations have: a depthwise convolution and states in a cache.

    Projections are always called as modules, never through their weights, so that adapters, quantised layers and hooks
    act. A family has the modules `conv1d` (see `depthwise_convolution`) and `out_proj`, and a `forward` that makes one pass
    over [B, L, H].
    """

    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def init_parameters(self) -> None:
        self.init_steps_and_decay()
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        if self.config.rescale_prenorm_residual:
            init.copy_(self.out_proj.weight, self.out_proj.weight / math.sqrt(self.config.num_hidden_layers))

    def init_steps_and_decay(self) -> None:
        """Set what decides how long the state remembers; called for models that are not loaded."""
        raise NotImplementedError

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the cached states without the batch: of the convolution's inputs [E, W], and of the recurrence."""
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
        return type(module) is nn.Conv1d and is_unhooked(module)

    def convolve(
        self, x: torch.Tensor, state: torch.Tensor | None, lengths: torch.Tensor | None, return_state: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """silu(conv(x)) [B, L, E] and the state [B, E, W] after each row's `lengths` tokens; see `causal_conv1d`."""
        if self.convolution_is_plain:
            return causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state, lengths, return_state)
        width = self.config.conv_kernel
        no_effect = x.new_ones(x.shape[-1], width)
        _, final_state = causal_conv1d(x, no_effect, None, state, lengths, return_state)
        past = x.new_zeros(x.shape[0], x.shape[-1], width - 1) if state is None else state[..., 1:].to(x.dtype)
        y = self.conv1d(torch.cat([past, x.transpose(1, 2)], dim=-1))
        return F.silu(y[..., width - 1 : width - 1 + x.shape[1]]).transpose(1, 2), final_state

    def convolve_token(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`convolve` for one token x [B, E]; the cached `state` [B, E, W] is updated in place."""
        if self.convolution_is_plain:
            return causal_conv1d_step(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state)
        y, new_state = self.convolve(x.unsqueeze(1), state, None)
        assert new_state is not None
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

    def decay_rates(self) -> torch.Tensor:
        """A of the recurrence, negative, in float32 at least."""
        raise NotImplementedError

    def update_cache(self, cache_params: Cache | None, conv_state: torch.Tensor | None, state: torch.Tensor | None) -> None:
        """Leave the states that a pass ended with in the cache, if there is one."""
        if cache_params is not None:
            cache_params.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=self.config.conv_kernel)
            cache_params.update_recurrent_state(state, self.layer_idx)

    def can_add_to(self, residual: torch.Tensor) -> bool:
        """Whether `project` can add to [B, L, H]: in float32 from a narrow product of many tokens, on CUDA, where the
        projection is what its weight says and nobody looks at the mixer's own result."""
        module = self.out_proj
        return (
            residual.is_cuda
            and torch.version.cuda is not None
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"))
            and kernels_enabled()
            and hasattr(torch.ops.aten.addmm, "dtype_out")
            and residual.dtype == torch.float32
            and residual.shape[1] > 1
            and residual.is_contiguous()
            and type(module) is nn.Linear
            and is_plain_weight(module.weight)
            and module.bias is None
            and module.weight.dtype in (torch.bfloat16, torch.float16)
            and is_unhooked(module)
            and is_unhooked(self)
        )

    def project(self, y: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """out_proj of y [B, L, E]; added to `onto` [B, L, H], in place and before any rounding, if that is given."""
        if onto is None:
            result: torch.Tensor = self.out_proj(y)
            return result
        flat, weight = onto.flatten(0, 1), self.out_proj.weight
        torch.ops.aten.addmm.dtype_out(flat, y.flatten(0, 1), weight.t(), torch.float32, out=flat)
        return onto

    @staticmethod
    def decodes(hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> bool:
        """Whether a pass that continues a cache is one decoding step: a single token of every row, without gradients."""
        return hidden_states.shape[1] == 1 and lengths is None and not torch.is_grad_enabled()


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its `forward` and nothing else."""
    of_all = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    return not (of_all or hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks)


def add_mixed(
    hidden_states: torch.Tensor,
    norm: nn.Module,
    mixer: RecurrentMixer,
    inputs: tuple[Any, ...],
    in_fp32: bool,
    overwrites: bool,
) -> torch.Tensor:
    """A block's residual sum, hidden_states + mixer(norm(hidden_states), *inputs), [B, L, H].

    Args:
        in_fp32: sum in float32 at least, whatever the dtypes.
        overwrites: nobody else reads `hidden_states`, so that the sum may take their place. Without gradients the mixer's
            last product then adds to them itself, a pass over the residual less than a sum behind it.
    """
    residual = at_least_float32(hidden_states) if in_fp32 else hidden_states
    normed = norm(hidden_states)
    if (overwrites or residual is not hidden_states) and mixer.can_add_to(residual):
        result: torch.Tensor = mixer(normed, *inputs, onto=residual)
        return result
    return residual + mixer(normed, *inputs)


def without_pads(dt: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """dt [B, L, .] with 0 at the pads behind each row's `lengths` [B] tokens: a step of 0 leaves the state as it is."""
    if lengths is None:
        return dt
    pads = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]
    return dt.masked_fill(pads.unsqueeze(-1), 0.0)


class RecurrentPreTrainedModel(PreTrainedModel):
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
        if isinstance(module, OwnStart):
            module.init_parameters()


class RecurrentModel(RecurrentBackbone, RecurrentPreTrainedModel):
    """A backbone: embeddings, blocks, final norm. A family sets `block_class`, and calls `post_init`."""

    block_class: type[nn.Module]

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.block_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embeddings = new_embeddings

    def rows_to_read(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        cache_params: Cache | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[PackedRows, Cache | None, bool]:
        """What `forward` was given, checked: the rows, the cache to continue and to fill, and whether to return it.

        Args:
            kwargs: whatever else `forward` was given; raises on what would have to be ignored.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        cache_params = _checked_arguments(kwargs, cache_params, attention_mask)
        self.check_cache(cache_params)
        check_shapes(input_ids, inputs_embeds, labels)
        if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(input_ids, self.config.vocab_size)
        attention_mask = _checked_mask(attention_mask, tokens)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if is_filled(cache_params) and torch.is_grad_enabled():
                raise ValueError(
                    "A filled cache cannot be continued under gradient checkpointing: recomputing would find it moved. "
                    "Call gradient_checkpointing_disable(), or start without the cache."
                )
        if not use_cache and not is_filled(cache_params):
            cache_params = None
        elif cache_params is None:
            cache_params = DynamicCache(config=self.config)
        _check_cache_rows(cache_params, tokens.shape[0])
        note = getattr(cache_params, "note", None)
        if cache_params is not None and note is not None and not note.stale:
            cache_params.note = note._replace(stale=True)
        return PackedRows(input_ids, inputs_embeds, attention_mask, self.embeddings), cache_params, bool(use_cache)

    def check_cache(self, cache_params: Cache | None) -> None:
        """Raise a ValueError unless the cache, filled or not, is laid out for this model."""
        if cache_params is None:
            return
        layers = getattr(cache_params, "layers", ())
        blocks: Any = self.layers
        slots = getattr(self.config, "number_of_conv_states", 1)  # transformers' name of it
        if len(layers) != len(blocks) or not all(
            _holds(layer, slots, block) for layer, block in zip(layers, blocks, strict=True)
        ):
            raise ValueError(
                "The cache is one of another model: its layers or states have other shapes. Leave it out, or give an empty "
                "DynamicCache(config=model.config)."
            )

    def finished(self, output: Any, use_cache: bool, return_dict: bool | None) -> Any:
        """The output as it was asked for: with or without the cache, as an object or as a tuple."""
        if not use_cache:
            output.cache_params = None
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


class RecurrentForCausalLM(RecurrentPreTrainedModel, RecurrentGenerationMixin):
    """A backbone with a language modeling head. A family sets `backbone_class` and `output_class`, whose fields are the
    backbone's but for `loss` and `logits` instead of `last_hidden_state`."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    backbone_class: type[RecurrentModel]
    output_class: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.backbone.set_input_embeddings(new_embeddings)

    def run(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        prompt_copies: int,
        return_dict: bool | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """`forward`: the backbone on `inputs`, the logits that were asked for, and the loss of the labels.

        Args:
            kwargs: further arguments of the backbone and of the loss.
        """
        if prompt_copies > 1:
            return self.forward_one_of_each(prompt_copies, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        last_columns = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep and labels is None else None
        output = self.backbone(
            **inputs,
            labels=labels,
            columns_to_keep=last_columns,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = output.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and labels is None:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:  # of all columns, whatever is returned of them
            loss = self.language_modeling_loss(logits, labels, **kwargs)
            if (other := self.other_loss(output)) is not None:
                items = kwargs.get("num_items_in_batch")
                # Of a batch in pieces each gives its part of a sum over all items: so must what does not depend on items.
                loss = loss + (other if items is None else other * (labels[:, 1:] != -100).sum() / items)
            if isinstance(logits_to_keep, torch.Tensor):
                logits = logits[:, logits_to_keep]
            elif logits_to_keep:
                logits = logits[:, -logits_to_keep:]
        if loss is None or not self.training:  # a copy of a batch's logits in float32 would be the largest tensor of a step
            logits = at_least_float32(logits)
        others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        result = self.output_class(loss=loss, logits=logits, **others)
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()

    def other_loss(self, output: Any) -> torch.Tensor | None:
        """What the loss has besides that of the labels, of an `output` of the backbone."""
        return None


def _wants_dict(config: Any, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _holds(layer: Any, slots: int, block: Any) -> bool:
    """Whether a cache's layer has a block's states, in as many slots, or has room for them."""
    if getattr(layer, "number_of_states", 0) != slots:
        return False
    states = [(layer.conv_states[slot], layer.recurrent_states[slot]) for slot in range(slots)]
    if all(state is None for pair in states for state in pair):
        return True  # without asking for shapes, which takes longer, before every prompt
    shapes = block.state_shapes()
    return all(
        state is None or tuple(state.shape[1:]) == shape
        for pair, wanted in zip(states, shapes, strict=True)
        for state, shape in zip(pair, wanted, strict=True)
    )


def is_filled(cache_params: Cache | None) -> bool:
    """Whether the cache has read something."""
    return cache_params is not None and cache_params.has_previous_state()


def _check_cache_rows(cache_params: Cache | None, batch: int) -> None:
    if cache_params is not None and is_filled(cache_params):
        rows = cache_params.layers[0].recurrent_states[0].shape[0]
        if rows != batch:
            raise ValueError(
                f"The cache holds {rows} rows, the input {batch}. Repeat the cache's rows first: "
                "cache.reorder_cache(torch.arange(rows).repeat_interleave(copies))."
            )


def _checked_arguments(
    kwargs: dict[str, Any], cache_params: Cache | None, attention_mask: torch.Tensor | None
) -> Cache | None:
    """The cache under either of its names; raises on arguments that this model would have to ignore."""
    misspelt = [name for name in kwargs if name.startswith(("compres", "prefil", "prompt"))]
    if misspelt:
        raise ValueError(
            f"forward has no arguments {misspelt}. Check their spelling against its docstring. Only the ReMamba families "
            "compress prompts."
        )
    cache = kwargs.pop("past_key_values", None)
    if any(name.startswith(("seq_idx", "cu_seq")) and value is not None for name, value in kwargs.items()):
        raise ValueError(
            "Packed rows (seq_idx, cu_seq_lens_*) are not supported: every row has one text and one state. Pad the examples "
            "to a batch instead, e.g. with DataCollatorForSeq2Seq."
        )
    positions = kwargs.pop("position_ids", None)
    if positions is not None and positions.shape[-1] > 1 and _restart(positions, attention_mask):
        raise ValueError(
            "position_ids restart inside a row, which is how packed rows look. They are not supported: pad the examples "
            "to a batch instead."
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: Mamba has no attention maps. Leave it out.")
    return cache if cache_params is None else cache_params


def _restart(positions: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether a token of a row has no later position [..., L] than one before it; pads, which a mask tells, may have any."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] < positions.shape[-1]:
        return bool((positions.diff(dim=-1) <= 0).any())
    is_token = attention_mask[:, -positions.shape[-1] :].to(positions.device) != 0
    latest = torch.where(is_token, positions, -1).cummax(-1).values
    return bool((is_token[:, 1:] & (positions[..., 1:] <= latest[..., :-1])).any())


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

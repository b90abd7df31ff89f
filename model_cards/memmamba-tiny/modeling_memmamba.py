# SPDX-License-Identifier: Apache-2.0
"""MemMamba (arXiv 2510.03279): Mamba that takes notes. Every layer keeps a pool of notes about tokens and reads it by
attention; some layers also read the pools of the layers below. The state stays of constant size.

The paper names its functions and leaves most of them open. Here a note can be read from the end of its chunk on, which makes
a pass parallel and equal to one token by token (note_pool.py, note_memory.py), and what is read starts at zero, so that a
MemMamba made from a Mamba gives exactly its logits before training.

The way of a prompt: `MemMambaForCausalLM.forward`, `MemMambaModel.forward`, `RecurrentBackbone.read_plain`
(recurrent_passes.py), and in it the blocks, each with its memory (`NoteMemory`) and its mixer (`MambaMixer`).

Shapes: `B` rows, `L` columns of the input, `T` positions of a pass, `H` hidden size, `K` notes of a pool.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_memmamba import MemMambaConfig
from .decode_graph import CacheStep, FusedStep
from .decode_kernels import dependent_launches
from .mamba_mixer import MambaMixer
from .note_kernels import can_step, note_step, notes_by_layer, notes_of_layers, renew_notes, renew_weights, step_weights
from .note_memory import NoteMemory, Reading, StepState, commit_layers, state_of_layer, states_in_one, tokens_read
from .note_pool import Clock, Pool
from .precision import at_least_float32
from .recurrent_model import (
    RecurrentForCausalLM,
    RecurrentModel,
    RecurrentPreTrainedModel,
    RMSNorm,
    add_mixed,
    is_filled,
)
from .recurrent_passes import Progress, chunk_length_for


@dataclass
class MemMambaModelOutput(ModelOutput):
    """Output of MemMamba's backbone.

    last_hidden_state: [B, L, H], after the final norm, aligned with the input; a pad repeats the token before it. With
        `columns_to_keep=n` only the last n columns.
    cache_params: the states after the last token of each row.
    hidden_states: the blocks' outputs and the final norm's.
    note_positions: with `output_notes`: one [B, K] long a layer: whose notes each row's last token could read, by position
        among the row's own tokens, the best first; -1 where there is none.
    note_scores: likewise, the write scores; 0 where there is none.
    note_reads: likewise, how much of its attention each note got (a mean over heads); the rest went to the sink.
    write_loss: in training, what writing cost: the mean of -log(1 - score) over tokens and layers, a scalar.
    write_logits: in training, the logits of every token's write score: one [B, L] a layer.
    """

    last_hidden_state: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    note_positions: tuple[torch.Tensor, ...] | None = None
    note_scores: tuple[torch.Tensor, ...] | None = None
    note_reads: tuple[torch.Tensor, ...] | None = None
    write_loss: torch.Tensor | None = None
    write_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class MemMambaCausalLMOutput(ModelOutput):
    """Output of MemMamba's language model; see `MemMambaModelOutput` for what is not named here.

    loss: scalar, of the labels that count.
    logits: [B, L, vocabulary], float32, aligned with the input (`logits_to_keep` shortens them).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    note_positions: tuple[torch.Tensor, ...] | None = None
    note_scores: tuple[torch.Tensor, ...] | None = None
    note_reads: tuple[torch.Tensor, ...] | None = None
    write_loss: torch.Tensor | None = None
    write_logits: tuple[torch.Tensor, ...] | None = None


class MemMambaBlock(GradientCheckpointingLayer):
    """Memory and mixer, each added to the tokens."""

    def __init__(self, config: MemMambaConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.memory_first = config.fusion_position == "pre"
        self.memory = NoteMemory(config, layer_idx)
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx)

    def state_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of the layer's cached states, slot by slot."""
        return [self.mixer.state_shapes(), self.memory.state_shapes()]

    def forward(
        self,
        hidden_states: torch.Tensor,
        *below: torch.Tensor,
        clock: Clock,
        lengths: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        wants_reading: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """The block's output [B, T, H], the parts of the pools it read, the logits of its write scores, and if asked the
        parts of what its last tokens read.

        Args:
            below: the parts of the pools of the layers below, one after the other: a checkpointed block passes gradients
                only to tensors that are its own positional arguments, and from tensors that are its own results.
            clock, lengths: where the rows are, and how many of their T positions are tokens.
        """
        pools = [Pool(*below[start : start + 3]) for start in range(0, len(below), 3)]
        added, pool, logits, reading = self.memory(hidden_states, clock, pools, cache_params, wants_reading)
        hidden_states = self.mix(hidden_states, added, lengths, cache_params)
        return hidden_states, *pool, logits, *(() if reading is None else reading)

    def mix(
        self,
        hidden_states: torch.Tensor,
        added: torch.Tensor,
        lengths: torch.Tensor | None,
        cache_params: Cache | None,
    ) -> torch.Tensor:
        """The block's output from its input and what its memory adds, [B, T, H] all."""
        if self.memory_first:
            hidden_states = hidden_states + added
        inputs = None, lengths, cache_params
        hidden_states = add_mixed(
            hidden_states, self.norm, self.mixer, inputs, self.residual_in_fp32, overwrites=self.memory_first
        )
        return hidden_states if self.memory_first else hidden_states + added


@dataclass
class NotesOfPass:
    """What a pass tells of its notes besides the states.

    readings: every layer's `Reading` of the last tokens so far; None if nobody wants them.
    write_logits: every layer's logits of write scores [B, T]; empty out of training.
    """

    readings: list[Reading] | None
    write_logits: list[torch.Tensor]


class MemMambaPreTrainedModel(RecurrentPreTrainedModel):
    config_class = MemMambaConfig
    _no_split_modules = ["MemMambaBlock"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_proj.bias", "write_score", "sink"]


class MemMambaModel(RecurrentModel, MemMambaPreTrainedModel):
    """MemMamba's backbone."""

    config_class = MemMambaConfig  # transformers gives every class one of its own, which hides what others inherit
    block_class = MemMambaBlock

    def __init__(self, config: MemMambaConfig):
        super().__init__(config)
        self.post_init()

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | None,
        adaptation: Any,
        cache_params: Cache | None,
        block_states: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """All blocks and the final norm over [B, T, H]; see `RecurrentBackbone`. `adaptation` is a `NotesOfPass` to fill."""
        clock = self._clock(hidden_states, lengths, cache_params)
        wants_reading, trains = adaptation.readings is not None, self.training and torch.is_grad_enabled()
        readings: list[Reading] = []
        below: list[Pool] = []
        for layer_idx, block in enumerate(self.layers):
            parts = [part for pool in below for part in pool] if self.config.reads_layers_below(layer_idx) else []
            hidden_states, *results = block(
                hidden_states,
                *parts,
                clock=clock,
                lengths=lengths,
                cache_params=cache_params,
                wants_reading=wants_reading,
            )
            below = [Pool(*results[:3]), *below][: self.config.cross_layer_group]
            if trains:
                adaptation.write_logits.append(results[3])
            if wants_reading:
                readings.append(Reading(*results[-3:]))
            if block_states is not None:
                block_states.append(hidden_states)
        if wants_reading:
            earlier = adaptation.readings
            adaptation.readings = readings if not earlier else _latest(earlier, readings, clock.lengths)
        hidden_states = self.norm_f(hidden_states)
        if block_states is not None:
            block_states.append(hidden_states)
        return hidden_states

    def _clock(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None, cache_params: Cache | None) -> Clock:
        batch, length = hidden_states.shape[:2]
        read = tokens_read(cache_params) if cache_params is not None and is_filled(cache_params) else [0] * batch
        return Clock(read, [length] * batch if lengths is None else lengths.tolist())

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        labels: torch.LongTensor | None = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        columns_to_keep: int | None = None,
        output_notes: bool = False,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | MemMambaModelOutput:
        """One pass.

        Args:
            input_ids: [B, L] long; or inputs_embeds: [B, L, H].
            attention_mask: [B, L], 0 at pads, which may be anywhere; longer masks are cut to their last L columns.
            cache_params: states to continue and to update.
            prefill_chunk_length: read that many positions at a time (inference only).
            prefill_progress: called with (positions read, positions to read) after each chunk.
            columns_to_keep: return only the last columns of `last_hidden_state`.
            output_notes: return what each row's last token could read, and read.
            use_cache: return the states; default: the configuration's, never in training.

        Returns:
            `MemMambaModelOutput`.
        """
        rows, cache_params, use_cache = self.rows_to_read(
            input_ids, inputs_embeds, attention_mask, labels, cache_params, use_cache, kwargs
        )
        kept = None
        if columns_to_keep is not None and columns_to_keep < rows.columns:
            kept = rows.tokens_of_last(columns_to_keep)
        notes = NotesOfPass([] if output_notes else None, [])
        wants_blocks = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        reader = self.read_plain(
            rows,
            cache_params,
            kept,
            chunk_length_for(max(rows.lengths), prefill_chunk_length),
            wants_blocks,
            prefill_progress,
            notes,
        )
        blocks = reader.block_states
        output = MemMambaModelOutput(
            last_hidden_state=rows.unpack(reader.span_states) if kept is None else reader.point_states,
            cache_params=cache_params,
            hidden_states=blocks if blocks is None else tuple(rows.unpack(block) for block in blocks),
        )
        if notes.readings is not None:
            output.note_positions, output.note_scores, output.note_reads = map(tuple, zip(*notes.readings, strict=True))
        if notes.write_logits:
            output.write_loss = _write_loss(notes.write_logits, rows.lengths)
            output.write_logits = tuple(rows.unpack(logits.unsqueeze(-1)).squeeze(-1) for logits in notes.write_logits)
        return self.finished(output, use_cache, return_dict)


class NotesStep(CacheStep):
    """A decoding step whose memories are outside of the cache, so that a chunk's end, which the host foresees, is the only
    thing that has to be done in between. They lie in one tensor, so that it is done for all layers at once."""

    def __init__(self, model: Any, cache: Cache):
        super().__init__(model, cache)
        self.chunk = model.config.chunk_size
        self.memory = states_in_one([block.memory.step_state(cache) for block in model.backbone.layers])
        self.memories = [state_of_layer(self.memory, layer) for layer in range(len(model.backbone.layers))]
        self.read = tokens_read(cache)

    def begin(self, model: Any, cache: Cache) -> None:
        super().begin(model, cache)
        self.read = tokens_read(cache)  # of rows that nobody reads, chunks need not be committed
        for block, memory in zip(model.backbone.layers, self.memories, strict=True):
            for mine, theirs in zip(_parts(memory), _parts(block.memory.step_state(self.cache)), strict=True):
                mine.copy_(theirs)

    def end(self, model: Any, cache: Cache) -> None:
        for block, memory in zip(model.backbone.layers, self.memories, strict=True):
            block.memory.keep(self.cache, memory)
        super().end(model, cache)

    def run(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        config, backbone = model.config, model.backbone
        hidden_states = backbone.embeddings(tokens)
        below: list[Pool] = []
        for layer_idx, (block, memory) in enumerate(zip(backbone.layers, self.memories, strict=True)):
            pools = below if config.reads_layers_below(layer_idx) else []
            added, pool = block.memory.step(hidden_states, memory, pools)
            hidden_states = block.mix(hidden_states, added, None, self.cache)
            below = [pool, *below][: config.cross_layer_group]
        return at_least_float32(model.lm_head(backbone.norm_f(hidden_states)))[:, -1]

    def needs_upkeep(self) -> bool:
        self.read = [read + 1 for read in self.read]
        return any(read % self.chunk == 0 for read in self.read)

    def upkeep(self, model: Any) -> None:
        commit_layers([block.memory for block in model.backbone.layers], self.memory)


class FusedNotesStep(NotesStep, FusedStep):
    """`NotesStep` in kernels that read the weights themselves, the memories' in note_kernels.py.

    Keys and values of the notes that can be read are projected where a chunk ends, not in every step.
    """

    step = staticmethod(note_step)

    def __init__(self, model: Any, cache: Cache):
        super().__init__(model, cache)
        layers = model.backbone.layers
        self.weights = [step_weights(block.memory) for block in layers]
        self.readable = notes_of_layers([block.memory for block in layers], self.memory.pool)
        self.notes = notes_by_layer(self.readable, len(layers))

    def begin(self, model: Any, cache: Cache) -> None:
        super().begin(model, cache)
        for block, weights in zip(model.backbone.layers, self.weights, strict=True):
            renew_weights(weights, block.memory)
        self.renew(model)

    def upkeep(self, model: Any) -> None:
        super().upkeep(model)
        self.renew(model)

    def renew(self, model: Any) -> None:
        """Project the notes that can be read now."""
        memories = [block.memory for block in model.backbone.layers]
        for group in self.readable:
            renew_notes(group, memories, self.memory.pool)

    def run(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        hidden_states = model.backbone.embeddings(tokens[:, 0])
        with dependent_launches():
            for layer_idx, block in enumerate(model.backbone.layers):
                memory, notes = self.memories[layer_idx], self.notes[layer_idx]
                hidden_states = self.step(hidden_states, self.weights[layer_idx], notes, memory.opened, memory.read)
                hidden_states = self.mix(block, layer_idx, hidden_states)
            return self.head(model, hidden_states)


def _parts(memory: StepState) -> tuple[torch.Tensor, ...]:
    return *memory.pool, *memory.opened, memory.read


class MemMambaForCausalLM(RecurrentForCausalLM, MemMambaPreTrainedModel, GenerationMixin):
    """MemMamba with a language modeling head."""

    config_class = MemMambaConfig
    backbone_class = MemMambaModel
    output_class = MemMambaCausalLMOutput

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        labels: torch.LongTensor | None = None,
        prefill_chunk_length: int | None = None,
        prefill_progress: Progress | None = None,
        prompt_copies: int = 1,
        output_notes: bool = False,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> tuple | MemMambaCausalLMOutput:
        """Next-token logits aligned with the input, and the loss of the labels.

        Args:
            labels: [B, L] long, shifted inside; -100 does not count. In training the loss includes what writing costs,
                `write_cost` times `write_loss`.
            prompt_copies: rows come in groups of this many equal ones, of which one is read (set by `generate`).
            logits_to_keep: logits of that many last columns, or of the columns in a tensor; 0: of all.
            Everything else as for `MemMambaModel.forward`.

        Returns:
            `MemMambaCausalLMOutput`.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "cache_params": cache_params,
            "prefill_chunk_length": prefill_chunk_length,
            "prefill_progress": prefill_progress,
            "output_notes": output_notes,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
        }
        return self.run(inputs, labels, logits_to_keep, prompt_copies, return_dict, kwargs)

    def step_to_capture(self, cache: Cache, fused: bool) -> CacheStep:
        blocks: Any = self.backbone.layers
        fused = fused and all(can_step(block.memory) for block in blocks)
        return FusedNotesStep(self, cache) if fused else NotesStep(self, cache)

    def other_loss(self, output: MemMambaModelOutput) -> torch.Tensor | None:
        return None if output.write_loss is None else self.config.write_cost * output.write_loss


def _write_loss(logits: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """The mean of -log(1 - score) over the rows' own tokens and the layers, from logits [B, T] a layer."""
    costs = torch.stack([torch.nn.functional.softplus(layer.to(logits[0].device)) for layer in logits])
    if min(lengths) == costs.shape[2]:
        return costs.mean()
    tokens = torch.arange(costs.shape[2], device=costs.device) < torch.tensor(lengths, device=costs.device)[:, None]
    return (costs * tokens).sum() / (len(logits) * max(sum(lengths), 1))


def _latest(earlier: list[Reading], later: list[Reading], lengths: list[int]) -> list[Reading]:
    """Of two chunks of a pass each row's reading in the last one that had tokens of it."""
    took = torch.tensor([length > 0 for length in lengths])[:, None]
    return [
        Reading(*(torch.where(took.to(new.device), new, old) for new, old in zip(after, before, strict=True)))
        for after, before in zip(later, earlier, strict=True)
    ]


__all__ = ["MemMambaForCausalLM", "MemMambaModel", "MemMambaPreTrainedModel"]

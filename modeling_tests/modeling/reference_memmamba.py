# SPDX-License-Identifier: Apache-2.0
"""MemMamba (arXiv 2510.03279) written out for one row, from the formulas and a state dict, one token after the other. All
notes that were ever committed stay in a plain list, and the pool is the best of it, sorted anew whenever a chunk ends.
Shares no code with the package: it is what the package is compared with."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from modeling_tests.modeling.reference_two_stages import mamba_mixer, norm, under


@dataclass
class Note:
    raw: torch.Tensor
    score: torch.Tensor
    position: int
    written: torch.Tensor | None = None


@dataclass
class Memory:
    """committed: every note so far, in order. pool: the best of them, the best first. opened: those of the open chunk. read:
    tokens read."""

    mixer: tuple[torch.Tensor, torch.Tensor] | None = None
    committed: list[Note] = field(default_factory=list)
    pool: list[Note] = field(default_factory=list)
    opened: list[Note] = field(default_factory=list)
    read: int = 0


@dataclass
class Reading:
    """What one token could read in one layer, and read: the best note first."""

    positions: list[int]
    scores: list[float]
    weights: list[float]


def rank(config, note):
    """What decides whether a note stays; None if it is not written at all."""
    if note.score.item() <= 0:
        return None
    if config.write_rule == "priority":
        return note.score.log().float().item() + config.recency_weight * note.position
    if config.write_rule == "periodic" and note.position % config.write_period >= config.write_span:
        return None
    return note.position


def best(config, notes):
    """The notes that can be read, the best first; of equal ones the earlier."""
    ranked = [(rank(config, note), note) for note in notes]
    ranked = [(value, note) for value, note in ranked if value is not None]
    return [note for _, note in sorted(ranked, key=lambda pair: (-pair[0], pair[1].position))][: config.pool_size]


def commit(config, weights, memory):
    """The open chunk's notes, pooled over the last tokens of their chunk and normed, join the others."""
    for index, note in enumerate(memory.opened):
        first = max(0, index - config.pooling_window + 1) if config.pooling != "none" else index
        window = torch.stack([other.raw for other in memory.opened[first : index + 1]])
        pooled = window.mean(0) if config.pooling == "mean" else window.amax(0)
        note.written = norm(pooled, weights["note_norm.weight"], config.layer_norm_epsilon)
    memory.committed += memory.opened
    memory.opened = []
    memory.pool = best(config, memory.committed)


def attend(config, weights, token, notes):
    """What the token reads of notes (each a pair of vector and score), and its weights, a mean over heads."""
    heads, size = config.note_heads, config.note_size // config.note_heads
    query = weights["query.weight"] @ token
    keys, values = ([weights[name] @ note for note, _ in notes] for name in ("key.weight", "value.weight"))
    parts, mean = [], torch.zeros(len(notes), dtype=token.dtype)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        logits = [
            query[columns] @ key[columns] / math.sqrt(size) + torch.log(score)
            for key, (_, score) in zip(keys, notes, strict=True)
        ]
        attention = torch.stack([*logits, weights["sink"][head]]).softmax(0)[:-1]
        parts.append(sum((a * v[columns] for a, v in zip(attention, values, strict=True)), torch.zeros_like(query[columns])))
        mean = mean + attention / heads
    return weights["output.weight"] @ torch.cat(parts), mean


def fuse(config, weights, token, read):
    """The variants of the paper's Table 4, and the read threshold tau2."""
    if config.fusion == "elementwise":
        read = token * read
    elif config.fusion == "weighted":
        read = weights["weight"] * read
    elif config.fusion == "conv1d":
        read = weights["mix.weight"][:, :, 0] @ torch.cat([token, read]) + weights["mix.bias"]
    if config.fusion == "gated" or config.read_threshold > 0:
        gate = torch.sigmoid(weights["gate.weight"] @ token + weights["gate.bias"])
        read = read * (gate if gate.item() > config.read_threshold else 0.0)
    return read


def reads_below(config, layer):
    return config.cross_layer_period > 0 and layer > 0 and layer % config.cross_layer_period == 0


def remember(config, weights, layer, token, memories):
    """What layer `layer` adds to a token, from its own pool and perhaps those below, and how it read its own."""
    pool = memories[layer].pool
    reader = under(weights, "token_reader.")
    read, attention = attend(config, reader, token, [(note.written, note.score) for note in pool])
    added = fuse(config, under(weights, "token_fusion."), token, read)
    if reads_below(config, layer):
        reader = under(weights, "layer_reader.")
        notes = []
        for distance in range(1, min(config.cross_layer_group, layer) + 1):
            embedding = reader["layer_embedding"][distance - 1]
            notes += [(note.written + embedding, note.score) for note in memories[layer - distance].pool]
        read, _ = attend(config, reader, token, notes)
        added = added + fuse(config, under(weights, "layer_fusion."), token, read)
    reading = Reading([n.position for n in pool], [n.score.item() for n in pool], attention.tolist())
    return added, reading


def block(config, weights, layer, x, memories):
    """One token through one layer; its note joins the open chunk."""
    memory_weights, memory = under(weights, "memory."), memories[layer]
    token = norm(x, memory_weights["norm.weight"], config.layer_norm_epsilon)
    added, reading = remember(config, memory_weights, layer, token, memories)
    score = torch.sigmoid(memory_weights["write_score.weight"] @ token + memory_weights["write_score.bias"])[0]
    score = score * (score.item() > config.write_threshold)
    memory.opened.append(Note(memory_weights["note.weight"] @ token, score, memory.read))
    memory.read += 1
    if config.fusion_position == "pre":
        x = x + added
    normed = norm(x, weights["norm.weight"], config.layer_norm_epsilon)
    mixed, memory.mixer = mamba_mixer(under(weights, "mixer."), config, normed[None], [None], memory.mixer)
    x = x + mixed[0]
    return (x + added if config.fusion_position == "post" else x), reading


def read(weights, config, ids, memories=None):
    """ids [L] -> logits [L, V], every layer's `Memory`, and the last token's `Reading` of every layer."""
    layers = range(config.num_hidden_layers)
    memories = [Memory() for _ in layers] if memories is None else memories
    parts = [under(weights, f"backbone.layers.{layer}.") for layer in layers]
    embeddings = weights["backbone.embeddings.weight"]
    states, readings = [], []
    for x in embeddings[ids]:
        readings = []
        for layer in layers:
            x, reading = block(config, parts[layer], layer, x, memories)
            readings.append(reading)
        for layer, memory in enumerate(memories):
            if memory.read % config.chunk_size == 0:
                commit(config, under(parts[layer], "memory."), memory)
        states.append(norm(x, weights["backbone.norm_f.weight"], config.layer_norm_epsilon))
    head = weights.get("lm_head.weight", embeddings)
    return torch.stack(states) @ head.T, memories, readings


def packed(config, memory):
    """A layer's states as the cache holds them: the mixer's (conv, ssm), the open chunk [F + 1, C], and the pool
    [K + 1, F + 3] of notes, scores and positions, whose last row is the tokens read; counts are two numbers, of which the
    first stands for 2^20. Zeros where there is nothing."""
    conv, ssm = memory.mixer
    opened = conv.new_zeros(config.note_size + 1, config.chunk_size)
    for column, note in enumerate(memory.opened):
        opened[:, column] = torch.cat([note.raw, note.score[None]])
    pool = conv.new_zeros(config.pool_size + 1, config.note_size + 3)
    for slot, note in enumerate(memory.pool):
        pool[slot] = torch.cat([note.written, note.score[None], conv.new_tensor(divmod(note.position, 2**20))])
    pool[-1, -2:] = conv.new_tensor(divmod(memory.read, 2**20))
    return conv, ssm, opened, pool


def next_logits(weights, config, text, steps):
    """Before each of the last `steps` tokens of `text`: what the model says comes next."""
    return read(weights, config, text[:-1])[0][-steps:]


def loss(weights, config, ids, labels):
    """Mean cross-entropy of the labels of one row, shifted; -100 does not count."""
    logits, *_ = read(weights, config, ids)
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)

# SPDX-License-Identifier: Apache-2.0
"""Selective compression: stage 1 of ReMamba (arXiv 2408.15496, section 3.1). Knows nothing of Mamba.

A window of the prompt is scored against the prompt's last token, its best positions are kept as vectors, and these
vectors stand in the window's place. Their scores `alpha` later adapt the step size of the second pass (section 3.2).

Shapes: `B` rows, `P` tokens of a row's prompt, `M` of its window, `K` kept, `H` hidden size. Every row has its own
P, M and K; arrays are as long as the longest row, and host integers (`Window`) say what counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .precision import sent

SELECTIONS = ("score", "random", "stride", "multiplicative")
_SCORED_AT_ONCE = 16_384  # window positions whose keys are computed together when no gradient is needed
_RANDOM_SELECTION_SEED = 0
_TRAINING_MARGIN = 100  # tokens beyond `train_compression_tail` that a prompt needs for its span to be drawn


class Setting(NamedTuple):
    """One row's s, p and rho."""

    start: float
    span: float
    ratio: float


class Window(NamedTuple):
    """What is compressed of one row: `length` positions from `start` on, of which `kept` stay. No window: length 0."""

    start: int
    length: int
    kept: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def dropped(self) -> int:
        return self.length - self.kept


def check_setting(setting: Setting) -> None:
    """Raise a ValueError that names the setting and its range if s, p or rho cannot be honoured."""
    for name, value in zip(setting._fields, setting, strict=True):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"compression_{name} must be a finite number, got {value!r}.")
    if not 0 <= setting.start < 1:
        raise ValueError(f"compression_start must be in [0, 1), got {setting.start}.")
    if not 0 < setting.span <= 1:
        raise ValueError(
            f"compression_span must be in (0, 1], got {setting.span}. Pass compress_prompt=False for no compression."
        )
    if not 0 < setting.ratio <= 1:
        raise ValueError(
            f"compression_ratio must be in (0, 1], got {setting.ratio}. Pass compress_prompt=False for no compression."
        )
    if setting.start + setting.span > 1 + 1e-9:
        raise ValueError(
            f"compression_start + compression_span must be at most 1, got {setting.start} + {setting.span}: the window "
            "would end behind the prompt. Lower one of the two."
        )


def check_settings(config: Any) -> None:
    """Validate every compression setting of a configuration; raises ValueError."""
    check_setting(Setting(config.compression_start, config.compression_span, config.compression_ratio))
    if config.selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {SELECTIONS}, got {config.selection!r}.")
    for name in ("compression_min_prompt", "train_compression_tail"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
    cap = config.compression_max_kept
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise ValueError(f"compression_max_kept must be None or an integer of at least 1, got {cap!r}.")
    lows, highs = [], []
    for field, fixed in zip(Setting._fields, (config.compression_start, config.compression_span, 1.0), strict=True):
        bounds = getattr(config, f"train_compression_{field}")
        is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
        if bounds is not None and not (is_pair and bounds[0] <= bounds[1]):
            raise ValueError(f"train_compression_{field} must be (low, high) with low <= high, or None; got {bounds!r}.")
        lows.append(fixed if bounds is None else bounds[0])
        highs.append(fixed if bounds is None else bounds[1])
    drawn = [getattr(config, f"train_compression_{field}") for field in Setting._fields]
    if any(bounds is not None for bounds in drawn):
        try:
            check_setting(Setting(*lows))
            check_setting(Setting(*highs))
        except ValueError as error:
            raise ValueError(f"train_compression_*: the drawn settings can leave their range. {error}") from None


def window_of(
    prompt_length: int, setting: Setting, min_prompt: int = 0, tail: int | None = None, max_kept: int | None = None
) -> Window:
    """The window of one prompt of `prompt_length` tokens (pads excluded).

    S0 = int(s P), M = max(ceil(P p), 1), K = ceil(M rho), in these float expressions: published checkpoints depend on
    their rounding. The window never reaches the last token, which is the query; where that shortens M, K follows.

    Args:
        prompt_length: P.
        setting: s, p, rho.
        min_prompt: shorter prompts have no window.
        tail: in training, tokens that must follow the window (None: the query alone).
        max_kept: upper bound of K, whatever the prompt's length.
    """
    start = int(setting.start * prompt_length)
    length = max(math.ceil(prompt_length * setting.span), 1)
    length = min(length, prompt_length - max(1, tail or 0) - start)
    if prompt_length < min_prompt or length <= 0:
        return Window(0, 0, 0)
    kept = min(math.ceil(length * setting.ratio), length)
    return Window(start, length, kept if max_kept is None else min(kept, max_kept))


def settings_for_rows(config: Any, batch: int, start: Any = None, span: Any = None, ratio: Any = None) -> list[Setting]:
    """Every row's setting: a value given for the call, one for all rows or one a row, else the configuration's."""
    columns = []
    for name, value in zip(Setting._fields, (start, span, ratio), strict=True):
        if value is None:
            value = getattr(config, f"compression_{name}")
        value = as_numbers(value)
        column = value if isinstance(value, list) else [value] * batch
        if len(column) != batch:
            raise ValueError(f"compression_{name} has {len(column)} values for {batch} rows. Pass one, or one a row.")
        columns.append(column)
    settings = [Setting(*row) for row in zip(*columns, strict=True)]
    for setting in settings:
        check_setting(setting)
    return settings


def as_numbers(value: Any) -> Any:
    """A setting given as a tensor, an array or a sequence, as a Python number or a list of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def training_settings(
    config: Any, batch: int, start: Any = None, span: Any = None, ratio: Any = None, seeds: list[int] | None = None
) -> list[Setting]:
    """Every row's s, p and rho in one training forward: as given, else uniform in the configured range, else as configured.

    Args:
        seeds: one a row; None: one draw for all rows, from torch's global CPU generator.
    """
    ranges = [getattr(config, f"train_compression_{name}") for name in Setting._fields]
    columns: list[Any] = [start, span, ratio]
    drawn = [index for index, value in enumerate(columns) if value is None and ranges[index] is not None]
    if seeds is None:
        for index in drawn:
            low, high = ranges[index]
            columns[index] = low + (high - low) * torch.rand((), dtype=torch.float64).item() if low < high else low
    else:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        places = [torch.rand(len(columns), dtype=torch.float64, generator=generator).tolist() for generator in generators]
        for index in drawn:
            low, high = ranges[index]
            columns[index] = [low + (high - low) * place[index] for place in places]
    return settings_for_rows(config, batch, *columns)


def checked_seeds(seeds: Any, batch: int) -> list[int]:
    """`compression_seeds` as numbers; raises ValueError."""
    rows = as_numbers(seeds)
    if not isinstance(rows, list) or len(rows) != batch or not all(isinstance(row, int) for row in rows):
        raise ValueError(f"compression_seeds must be {batch} integers, one a row; got {seeds!r}.")
    return rows


def training_window(config: Any, prompt_length: int, drawn: Setting, max_kept: int | None = None) -> Window:
    """The window of one training prompt under the drawn setting, with the authors' rule for the prompt's tail."""
    tail = config.train_compression_tail
    if tail and prompt_length <= tail + _TRAINING_MARGIN:
        spans = config.train_compression_span
        drawn = drawn._replace(span=spans[0] if spans is not None else drawn.span)
        tail = 0
    return window_of(prompt_length, drawn, config.compression_min_prompt, tail, max_kept)


@dataclass
class Selection:
    """What the compressor kept, a row each; only the first `window.kept` entries of a row count.

    values: [B, K, H], the vectors that replace the window, in the order of the text.
    alpha: [B, K] float32, relu of the scores (1 where the step size is not adapted); 0 where absent.
    positions: [B, K] long, positions in the row (pads excluded), ascending; -1 where absent.
    scores: [B, K] float32, cosine similarities; 0 where absent.
    adapts: whether alpha and Theta act in the second pass.
    """

    values: torch.Tensor
    alpha: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    adapts: bool


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by its own value: the authors' rule for the scores."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.saved_tensors[0]


def _projection(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))


class SelectiveCompressor(nn.Module):
    """Scores a window against the query token and turns its best positions into vectors (Eq. 3 to 6).

    It keeps no configuration: PEFT trains a copy of this module, which would have a copy of it, deaf to the model's.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = _projection(hidden_size)
        self.key = _projection(hidden_size)
        self.value = _projection(hidden_size)

    def scores(self, query_state: torch.Tensor, window_states: torch.Tensor) -> torch.Tensor:
        """Cosine similarity of Query(query_state [B, H]) and Key(window_states [B, M, H]): [B, M], float32 or float64."""
        query = self.query(query_state)
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = query.to(dtype).unsqueeze(1)
        step = window_states.shape[1] if torch.is_grad_enabled() else _SCORED_AT_ONCE
        pieces = window_states.split(max(step, 1), dim=1)
        return torch.cat([F.cosine_similarity(self.key(p).to(dtype), query, dim=-1, eps=1e-8) for p in pieces], dim=1)

    def forward(
        self, query_state: torch.Tensor, window_states: torch.Tensor, windows: list[Window], config: Any
    ) -> Selection:
        """Score, select, project.

        Args:
            query_state: [B, H], stage 1's state of each prompt's last token, after the final norm.
            window_states: [B, M, H], states of each row's window from its first position on; the rest is arbitrary.
            windows: the rows' windows.
            config: the model's: `selection`, `scale_score_gradient`.
        """
        scores = self.scores(query_state, window_states)
        kept = max(window.kept for window in windows)
        local = _select(config.selection, scores, windows, kept)
        lengths = torch.tensor([window.kept for window in windows])
        present = sent(torch.arange(kept) < lengths[:, None], scores.device)
        chosen = scores.gather(1, local)
        alpha, adapts = F.relu(chosen), True
        if config.scale_score_gradient:
            alpha = _ScaleGradient.apply(alpha)
        states = window_states.gather(1, local[..., None].expand(-1, -1, window_states.shape[-1]))
        values = self.value(states)
        if config.selection == "multiplicative":
            weights = chosen.masked_fill(~present, -torch.inf).softmax(-1).masked_fill(~present, 0.0)
            values = values * weights.unsqueeze(-1).to(values.dtype)
            alpha, adapts = torch.ones_like(alpha), False
        starts = sent([window.start for window in windows], scores.device)
        return Selection(
            values=values,
            alpha=alpha.masked_fill(~present, 0.0),
            positions=(local + starts[:, None]).masked_fill(~present, -1),
            scores=chosen.masked_fill(~present, 0.0),
            adapts=adapts,
        )


@torch.no_grad()
def _select(selection: str, scores: torch.Tensor, windows: list[Window], kept: int) -> torch.Tensor:
    """Positions in the window [B, K], the present ones ascending. Equal scores: the earlier position wins."""
    if selection in ("random", "stride"):
        return sent(torch.stack([_unscored(selection, window, kept) for window in windows]), scores.device)
    lengths = sent([window.length for window in windows], scores.device)
    size = scores.shape[1]
    outside = torch.arange(size, device=scores.device) >= lengths[:, None]
    ranked = scores.masked_fill(outside, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :kept]
    counts = sent([window.kept for window in windows], scores.device)
    absent = torch.arange(kept, device=scores.device) >= counts[:, None]
    return ranked.masked_fill(absent, size).sort(dim=1).values.clamp(max=size - 1)


def _unscored(selection: str, window: Window, kept: int) -> torch.Tensor:
    """The ablations that ignore the scores: a random subset, the same for the same window, or evenly spaced positions."""
    if selection == "random":
        generator = torch.Generator().manual_seed(_RANDOM_SELECTION_SEED)
        local = torch.randperm(window.length, generator=generator)[: window.kept].sort().values
    else:
        local = torch.arange(window.kept) * window.length // max(window.kept, 1)
    return F.pad(local, (0, kept - window.kept))


class Adaptation(NamedTuple):
    """Where the second pass reads kept vectors: flat indices into [B * L] tokens, and the alpha [n] of each.

    where: [n] long. Mixers scale the step by alpha and add Theta there (Eq. 8), and do nothing elsewhere.
    """

    where: torch.Tensor
    alpha: torch.Tensor

    def scale(self, sequence: torch.Tensor) -> torch.Tensor:
        """sequence [B, L, F] with alpha multiplied in where it acts; a copy."""
        flat = sequence.flatten(0, 1)
        scaled = flat[self.where] * self.alpha.unsqueeze(-1).to(flat.dtype)
        return flat.index_copy(0, self.where, scaled).view_as(sequence)

    def in_wider_rows(self, width: int, wider: int, slots: int) -> "Adaptation":
        """The same where [B, `width`] tokens are padded to [B, `wider`], in `slots` entries: the last one is repeated, which
        changes nothing, since all that uses an entry reads the sequence as it was and writes the same to the same place."""
        where = self.where + self.where // width * (wider - width)
        entries = torch.arange(slots, device=where.device).clamp(max=len(where) - 1)
        return Adaptation(where[entries], self.alpha[entries])


@dataclass
class CompressedPrompt:
    """A batch whose windows are replaced by kept vectors. Rows begin at column 0; `lengths` says where they end.

    windows: what was compressed of each row.
    selection: the vectors and their alpha.
    lengths: tokens of each row after compression.
    """

    windows: list[Window]
    selection: Selection
    lengths: list[int]

    def sources(self, device: torch.device) -> torch.Tensor:
        """[B, max(lengths)] long: the position of the original row that each column reads (arbitrary at kept vectors)."""
        columns = torch.arange(max(self.lengths))
        rows = [columns + window.dropped * (columns >= window.start + window.kept) for window in self.windows]
        lengths = torch.tensor(self.lengths)[:, None]
        dropped = torch.tensor([window.dropped for window in self.windows])[:, None]
        return sent(torch.stack(rows).minimum(lengths + dropped - 1).clamp(min=0), device)

    def inserted(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept vectors in columns [begin, end): flat indices into [B * (end - begin)] and into [B * K]."""
        width, kept = end - begin, self.selection.values.shape[1]
        columns, slots = [], []
        for row, window in enumerate(self.windows):
            first, last = max(window.start, begin), min(window.start + window.kept, end)
            if first < last:
                columns.append(torch.arange(first - begin, last - begin) + row * width)
                slots.append(torch.arange(first - window.start, last - window.start) + row * kept)
        device = self.selection.values.device
        empty = torch.zeros(0, dtype=torch.long)
        return sent(torch.cat([empty, *columns]), device), sent(torch.cat([empty, *slots]), device)

    def splice(self, embeddings: torch.Tensor, begin: int) -> tuple[torch.Tensor, Adaptation | None]:
        """Put the kept vectors into embeddings [B, T, H] of the columns from `begin` on; None: no step is adapted."""
        columns, slots = self.inserted(begin, begin + embeddings.shape[1])
        if not len(columns):
            return embeddings, None
        values = self.selection.values.flatten(0, 1)[slots].to(embeddings.dtype)
        spliced = embeddings.flatten(0, 1).index_copy(0, columns, values).view_as(embeddings)
        alpha = self.selection.alpha.flatten()[slots]
        return spliced, Adaptation(columns, alpha) if self.selection.adapts else None

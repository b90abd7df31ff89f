# SPDX-License-Identifier: Apache-2.0
"""Small models, padded batches and comparisons that the tests share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from remamba_hf import MemMambaConfig, MemMambaForCausalLM
from remamba_hf.families import FAMILIES

VOCABULARY = 50
START, SPAN, RATIO = 0.1, 0.5, 0.3

# Paddings of a row, and how many columns stand before its tokens when `spare` columns are left over.
PADDINGS = {"left": lambda spare: spare, "right": lambda spare: 0, "both": lambda spare: spare // 2}


# What each family's tiny configuration has of its own: Mamba-2's four heads share B and C in two groups, and both limits of
# its step size are met.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "remamba": dict(state_size=4),
    "remamba2": dict(state_size=6, num_heads=4, n_groups=2, chunk_size=16, time_step_limit=(0.02, 1.5)),
}


def tiny_config(family: str = "remamba", **settings: Any) -> Any:
    """Three layers of width 16, s=.1, p=.5, rho=.3, training as in evaluation; `settings` override. Mamba-2's heads divide
    whatever inner size results."""
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=3,
        compression_start=START,
        compression_span=SPAN,
        compression_ratio=RATIO,
        train_compression_span=None,
        train_compression_ratio=None,
        train_compression_tail=0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    merged = {**defaults, **FAMILY_SETTINGS[family], **settings}
    if "num_heads" in merged:
        merged.setdefault("head_dim", merged.get("expand", 2) * merged["hidden_size"] // merged["num_heads"])
    return FAMILIES[family].config_class(**merged)


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, family: str = "remamba", **settings: Any) -> Any:
    """A model whose compressor and Theta are far from their start, so that every part of the two stages shows."""
    torch.manual_seed(seed)
    model = FAMILIES[family].model_class(tiny_config(family, **settings))
    for name, parameter in model.named_parameters():
        if "compressor" in name or "adaptation" in name:
            torch.nn.init.normal_(parameter, std=0.4)
        elif name.endswith(("embeddings.weight", "x_proj.weight", "in_proj.weight", "dt_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith((".bias", "dt_bias")):
            torch.nn.init.normal_(parameter, mean=-1.0 if "dt_" in name else 0.0, std=0.3)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def tiny_memmamba(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> Any:
    """A MemMamba of three layers of width 16, of which the last also reads the two below; pools of five notes, chunks of
    four tokens. Every part of the memory is far from its start, and write scores and gates lie around a half."""
    defaults: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=3,
        note_size=8,
        note_heads=2,
        pool_size=5,
        chunk_size=4,
        cross_layer_period=2,
        cross_layer_group=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = MemMambaForCausalLM(MemMambaConfig(**{**defaults, **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D", "fusion.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, mean=-1.0 if "dt_" in name else 0.0, std=0.3)
        elif ".memory." in name or name.endswith(("embeddings.weight", "x_proj.weight", "in_proj.weight", "dt_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def random_rows(lengths: Iterable[int], seed: int = 1) -> list[torch.Tensor]:
    """Rows of token ids of these lengths; no pad and no bos token among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(
    rows: Sequence[torch.Tensor], padding: str = "left", spare: int = 3, fill: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """ids [B, L], mask [B, L], and the columns of each row's tokens."""
    columns = max(len(row) for row in rows) + spare
    ids = torch.full((len(rows), columns), fill)
    mask = torch.zeros_like(ids)
    places = []
    for index, row in enumerate(rows):
        first = PADDINGS[padding](columns - len(row))
        places.append(slice(first, first + len(row)))
        ids[index, places[-1]] = row
        mask[index, places[-1]] = 1
    return ids, mask, places


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """rms(actual - expected) / rms(expected), in float64; infinite if anything is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if not actual.isfinite().all():
        return float("inf")
    if not actual.numel():
        return 0.0
    difference = (actual - expected).square().mean().sqrt().item()
    return difference / max(expected.square().mean().sqrt().item(), 1e-30) if difference else 0.0


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float, name: str = "value") -> None:
    ratio = rms_ratio(actual, expected)
    assert ratio <= limit, f"{name}: rms ratio {ratio:.2e} is above {limit:.0e}"


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit. Results of equal weights differ in the last bit on some processors, by where the tensors lie."""
    weights, others = expected.state_dict(), actual.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert others[name].dtype == weight.dtype, name
        assert torch.equal(others[name], weight), name


def cached_states(cache: Any, row: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's (convolution inputs, recurrent state), of one row or of all."""
    states = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
    return states if row is None else [(conv[row], recurrent[row]) for conv, recurrent in states]


def assert_same_cache(actual: Any, expected: Any, limit: float, name: str = "cache") -> None:
    """Caches, or lists of (conv, recurrent) a layer."""
    actual, expected = (c if isinstance(c, list) else cached_states(c) for c in (actual, expected))
    assert len(actual) == len(expected)
    for layer, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one[0], other[0], limit, f"{name}, convolution inputs of layer {layer}")
        assert_close(one[1], other[1], limit, f"{name}, state of layer {layer}")


def memory_states(cache: Any, row: int | None = None) -> list[tuple[torch.Tensor, ...]]:
    """MemMamba's (convolution inputs, recurrent state, open chunk, pool) of every layer, of one row or of all; what stands
    in the pool's empty slots means nothing, and is zero here."""
    rows = slice(None) if row is None else row
    states = []
    for layer in cache.layers:
        pool = layer.recurrent_states[1][rows].clone()
        pool[..., :-1, :][pool[..., :-1, -3] == 0] = 0
        states.append((layer.conv_states[0][rows], layer.recurrent_states[0][rows], layer.conv_states[1][rows], pool))
    return states


def assert_same_memory(actual: Any, expected: Any, limit: float, name: str = "cache") -> None:
    """MemMamba's caches, or what `memory_states` makes of them."""
    actual, expected = (c if isinstance(c, list) else memory_states(c) for c in (actual, expected))
    assert len(actual) == len(expected)
    parts = ("convolution inputs", "recurrent state", "open chunk", "pool")
    for layer, (one, other) in enumerate(zip(actual, expected, strict=True)):
        for part, value, wanted in zip(parts, one, other, strict=True):
            assert_close(value, wanted, limit, f"{name}, {part} of layer {layer}")

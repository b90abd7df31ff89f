# SPDX-License-Identifier: Apache-2.0
"""The models that `run_gpu.py` times: this package's, and beside them mamba_ssm's, transformers' and a transformers Llama.

All of a shape but the Llama hold the same random weights, and the same memory where their dtypes agree. Every model is
reached as its users reach it: `generate` of each package, mamba_ssm's with its CUDA graphs.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from remamba_hf.evaluation.checkpoints import plain_reading, weights_read
from remamba_hf.evaluation.memory_tasks import cache_bytes
from remamba_hf.families import ALL_FAMILIES, FAMILIES, Family

STATE_PROMPT = 8  # tokens that are read to see what a state holds


class Shape(NamedTuple):
    """Sizes that models share.

    family: the compressing family of this shape.
    settings: of its configuration.
    models: which contenders there are, the package's own first.
    llama: sizes of the Llama among them.
    """

    family: Family
    settings: dict[str, Any]
    models: tuple[str, ...]
    llama: dict[str, Any] = {}


_MAMBA, _MAMBA2 = FAMILIES["remamba"], FAMILIES["remamba2"]
_PEERS = ("mamba_ssm", "transformers")
_COMMON = {"vocab_size": 50_280, "tie_word_embeddings": True, "eos_token_id": None}
_TINY = {**_COMMON, "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}
# OpenLLaMA-3B's width, depth and vocabulary: 3.43 billion parameters. It has 32 heads of 100 channels; 25 of 128 are as many
# parameters, and a size that attention kernels like better.
_LLAMA_3_4B = {
    "vocab_size": 32_000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 25,
    "num_key_value_heads": 25,
    "max_position_embeddings": 65_536,
}
_LLAMA_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPES = {
    "2.8b": Shape(
        _MAMBA,
        {**_COMMON, "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16},
        ("remamba", *_PEERS, "llama"),
        _LLAMA_3_4B,
    ),
    "2.7b": Shape(
        _MAMBA2,
        {
            **_COMMON,
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "state_size": 128,
            "num_heads": 80,
            "head_dim": 64,
            "n_groups": 1,
        },
        ("remamba2", *_PEERS),
    ),
    "130m": Shape(
        _MAMBA,
        {**_COMMON, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16},
        ("remamba", "memmamba", *_PEERS),
    ),
    "tiny": Shape(_MAMBA, {**_TINY, "state_size": 8}, ("remamba", "memmamba", *_PEERS, "llama"), _LLAMA_TINY),
    "tiny2": Shape(
        _MAMBA2,
        {**_TINY, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
        ("remamba2", *_PEERS),
    ),
}
for _shape in SHAPES.values():
    # About what a projection keeps the size of its input with, whatever the width. The configurations' own, 0.1, makes
    # bfloat16 err by a tenth after four layers of 2560, where no comparison of logits means anything any more.
    _shape.settings["initializer_range"] = _shape.settings["hidden_size"] ** -0.5
OWN = tuple(ALL_FAMILIES)  # this package's models


class Contender:
    """A model of transformers' interface, the package's own among them.

    model: in evaluation mode.
    reading: what its calls need to read a prompt in one pass.
    decoding: what its `generate` needs besides to decode at its best, and to fail where it cannot.
    """

    def __init__(self, model: Any):
        self.model = model
        self.reading: dict[str, Any] = plain_reading(model)
        captures = model.config.model_type in OWN and model.device.type == "cuda"
        self.decoding: dict[str, Any] = {"cuda_graph": True} if captures else {}

    def generate(self, ids: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
        """Greedy: [B, L] -> [B, L + new_tokens], without a token that ends.

        Args:
            options: of the model's `generate`; they override how it reads the prompt.
        """
        decoding = self.decoding if new_tokens > 1 else {}
        return self.model.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, **{**self.reading, **decoding, **options}
        )

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of all positions after one pass: [B, L, vocabulary]."""
        return self.model(ids, use_cache=False, **self.reading).logits

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Of next tokens; labels [B, L], -100 where they do not count."""
        return self.model(ids, labels=labels, use_cache=False, **{**self.reading, **options}).loss

    def state_bytes(self, state_dtype: torch.dtype | None = None) -> int:
        """What one row keeps while decoding, as it lies in memory: read and written with every token.

        Args:
            state_dtype: as for `generate`.
        """
        cache = self._cache()
        for layer in () if state_dtype is None else cache.layers:
            layer.recurrent_states[0] = layer.recurrent_states[0].to(state_dtype)
        return cache_bytes(cache)

    def context_bytes(self) -> int:
        """What one row keeps for every token of its context: read with every token, and none of a recurrent model's."""
        return 0

    @torch.no_grad()
    def _cache(self) -> Any:
        ids = torch.zeros(1, STATE_PROMPT, dtype=torch.long, device=self.model.device)
        output = self.model(ids, use_cache=True, logits_to_keep=1, **self.reading)
        return output["cache_params" if "cache_params" in output else "past_key_values"]


class LlamaContender(Contender):
    """An attention model: keys and values instead of a state."""

    def state_bytes(self, state_dtype: torch.dtype | None = None) -> int:
        return 0

    def context_bytes(self) -> int:
        return cache_bytes(self._cache()) // STATE_PROMPT


class MambaSsmContender(Contender):
    """mamba_ssm's language model, with its own `generate` and the graphs that this captures on a GPU."""

    def __init__(self, model: Any):
        self.model = model
        self.reading = {}
        self.decoding = {}

    def generate(self, ids: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
        graphs = ids.is_cuda and new_tokens > 1  # the prompt is read outside of them
        return self.model.generate(ids, max_length=ids.shape[1] + new_tokens, cg=graphs, **options)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, inference_params=self._empty_state(*ids.shape)).logits  # as its `generate` reads prompts

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self.model(ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    @torch.no_grad()
    def state_bytes(self, state_dtype: torch.dtype | None = None) -> int:
        state = self._empty_state(1, STATE_PROMPT)
        ids = torch.zeros(1, STATE_PROMPT, dtype=torch.long, device=next(self.model.parameters()).device)
        self.model(ids, inference_params=state, num_last_tokens=1)
        return sum(tensor.nbytes for layer in state.key_value_memory_dict.values() for tensor in layer)

    def _empty_state(self, rows: int, tokens: int) -> Any:
        from mamba_ssm.utils.generation import InferenceParams

        return InferenceParams(max_seqlen=tokens + 1, max_batch_size=rows)


def build(shape: str, device: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """This package's model of a shape with random weights, made where it is used.

    Args:
        dtype: of all weights but those that `from_pretrained` keeps in float32.
        layers: default: the shape's.
    """
    family, settings = SHAPES[shape].family, dict(SHAPES[shape].settings)
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    return _initialized(lambda: family.model_class(family.config_class(**settings)), device, dtype)


def build_memmamba(base: PreTrainedModel, device: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """MemMamba with the weights of a Mamba and fresh readers, which change nothing until they are trained.

    Args:
        settings: of its memory; default: the configuration's.
    """
    family = ALL_FAMILIES["memmamba"]
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "tie_word_embeddings", "initializer_range")
    sizes = {name: getattr(base.config, name) for name in shared}
    config = family.config_class(**sizes, eos_token_id=None, **settings)
    model = _initialized(lambda: family.model_class(config), device, dtype)
    _, foreign = model.load_state_dict(weights_read(base), strict=False)
    if foreign:
        raise RuntimeError(f"MemMamba lacks weights of Mamba: {foreign}")
    return model


def build_llama(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' Llama beside a shape, attention by torch's scaled_dot_product_attention."""
    config = LlamaConfig(**SHAPES[shape].llama, tie_word_embeddings=False, eos_token_id=None, attn_implementation="sdpa")
    return _initialized(lambda: LlamaForCausalLM(config), device, dtype)


def _initialized(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = make()
    round_weights(model, dtype)
    # No token ends a text, and none is a pad: every run generates as many as it is asked for.
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """To `dtype`, but for what `from_pretrained` keeps in float32, whose values are rounded all the same: peers that keep
    it in `dtype` then hold the same numbers."""
    for name, parameter in model.named_parameters():
        rounded = parameter.data.to(dtype)
        parameter.data = rounded.float() if _stays_float32(model, name) else rounded


def _stays_float32(model: Any, name: str) -> bool:
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return any(f".{part}." in f".{name}." for part in kept)


def transformers_peer(shape: str, base: PreTrainedModel) -> PreTrainedModel:
    """transformers' plain model with the weights of `base`, in the dtypes that its `from_pretrained` would give them."""
    family, weights = SHAPES[shape].family, weights_read(base)
    settings = {**SHAPES[shape].settings, "num_hidden_layers": base.config.num_hidden_layers}
    with torch.device("meta"):
        model = family.plain_model_class(family.plain_config_class(**settings))
    for name, tensor in weights.items():
        weights[name] = tensor.to(torch.float32 if _stays_float32(model, name) else base.dtype)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return _whole(model)


def mamba_ssm_peer(shape: str, base: PreTrainedModel) -> nn.Module:
    """mamba_ssm's model with the weights of `base`, in the dtypes that its constructor gives them.

    Raises:
        ImportError: the package is missing or broken.
    """
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    settings = SHAPES[shape].settings
    config = MambaConfig(
        d_model=settings["hidden_size"],
        n_layer=base.config.num_hidden_layers,
        vocab_size=settings["vocab_size"],
        ssm_cfg=_mixer_arguments(settings),
        tie_embeddings=settings["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = MambaLMHeadModel(config, dtype=base.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    weights = {name.replace(".embeddings.", ".embedding."): tensor for name, tensor in weights_read(base).items()}
    model.load_state_dict({name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in weights.items()}, assign=True)
    model.tie_weights()
    return _whole(model)


def _mixer_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of mamba_ssm's mixers, from transformers' names."""
    arguments = {"d_state": settings["state_size"]}
    if "num_heads" in settings:
        arguments |= {"layer": "Mamba2", "headdim": settings["head_dim"], "ngroups": settings["n_groups"]}
        arguments |= {"chunk_size": settings["chunk_size"]} if "chunk_size" in settings else {}
    return arguments


def _whole(model: Any) -> Any:
    """The model in evaluation mode; raises if something of it was given no weights."""
    bare = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if bare:
        raise RuntimeError(f"{type(model).__name__} has weights or buffers that the shared model lacks: {bare[:5]}")
    return model.eval()


def bytes_read(model: nn.Module) -> int:
    """Of the weights that one decoding step reads: all but those for compressing, and the embedding only as the head."""
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding)).weight
    is_head = embedding.data_ptr() == model.lm_head.weight.data_ptr()
    return sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if not _for_compressing(name) and (is_head or parameter is not embedding)
    )


def multiplied_weights(model: nn.Module) -> int:
    """Weights of the layers' matrix products, each of which costs every token a multiplication and an addition."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _for_compressing(name) and not name.endswith("lm_head")
    )


def _for_compressing(name: str) -> bool:
    return ".compressor." in name or ".adaptation." in name


class Lineup:
    """Loads the contenders of a shape around one model, whose weights they share.

    base: this package's compressing model.
    """

    def __init__(self, shape: str, device: str, dtype: torch.dtype, layers: int | None = None):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.base = build(shape, device, dtype, layers)

    def load(self, name: str) -> Contender:
        """One of `SHAPES[shape].models`. Raises whatever a peer raises that is missing or broken."""
        if name == self.base.config.model_type:
            return Contender(self.base)
        if name == "memmamba":
            return Contender(build_memmamba(self.base, self.device, self.dtype))
        if name == "llama":
            return LlamaContender(build_llama(self.shape, self.device, self.dtype))
        if name == "mamba_ssm":
            return MambaSsmContender(mamba_ssm_peer(self.shape, self.base))
        return Contender(transformers_peer(self.shape, self.base))


def release(device: str) -> None:
    """Give back what dead models held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()

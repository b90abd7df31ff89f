# SPDX-License-Identifier: Apache-2.0
"""A frozen base in 8 or 4 bits, so that its fine-tuning with LoRA takes less memory (QLoRA, arXiv 2305.14314)."""

from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, TorchAoConfig

# What keeps its dtype, so that of all projections in_proj and out_proj are quantised, nine tenths of a model of 2.8b.
# compressor, memory and dt_proj are trained in full; they, x_proj and lm_head decide which tokens are kept and how long
# the state remembers, where small errors grow. bitsandbytes' 8-bit layers do not take the readers' inputs either.
# Expressions, as bitsandbytes' integration matches names of modules, torchao's those of weights.
UNQUANTISED = ("lm_head", r".*\.x_proj", r".*\.dt_proj", r".*\.compressor", r".*\.memory")
BACKENDS = ("bitsandbytes", "torchao")


def quantization_config(
    bits: int = 4, backend: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | TorchAoConfig:
    """How `from_pretrained(..., quantization_config=quantization_config())` quantises a base for fine-tuning.

    4 bits are QLoRA's: NormalFloat in blocks of 64, whose scales are quantised too. 8 bits are LLM.int8 with bitsandbytes,
    which rounds the inputs of projections as well (except in training on a CPU), and with torchao the weights alone.

    Load a checkpoint whose compressor has its start (`remamba convert --init-compressor`, or trained before):
    `initialize_compressor` copies weights, and here they are codes.

    Args:
        bits: 4 or 8.
        backend: "bitsandbytes" or "torchao"; None: bitsandbytes if it is installed, else torchao.
        dtype: of products with weights of 4 bits, whatever the model's; the others follow their inputs.

    Raises:
        ValueError: another number of bits or backend, or 4 bits with torchao, which PEFT cannot train.
        ImportError: the backend is not installed.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}.")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"The backend must be {' or '.join(BACKENDS)}, got {backend!r}.")
    if backend is None:
        backend = "bitsandbytes" if bits == 4 or find_spec("bitsandbytes") is not None else "torchao"
    if backend == "torchao" and bits == 4:
        raise ValueError("PEFT trains on 8 bits only with torchao. Take bits=8, or install bitsandbytes for 4.")
    if find_spec(backend) is None:
        other = "" if bits == 4 else ", or torchao"
        raise ImportError(f"{bits} bits need {backend}: pip install bitsandbytes{other}.")
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(UNQUANTISED))
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTISED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(UNQUANTISED),
    )


def is_quantised(weight: Tensor) -> bool:
    """Whether a parameter holds codes: integers with bitsandbytes; tensors that claim a floating dtype with torchao."""
    return not weight.is_floating_point() or type(weight).__module__.startswith("torchao")

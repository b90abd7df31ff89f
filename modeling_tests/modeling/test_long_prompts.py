# SPDX-License-Identifier: Apache-2.0
"""Long prompts: read in chunks, memory depends on the chunk and not on the prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_tests.modeling.tiny_models import assert_close, assert_same_cache, random_rows, tiny_model
from remamba_hf.modeling import two_stage_generation

# Runs in a process of its own, whose peak is nobody else's: prints the peak's growth in bytes after each prompt. VmHWM,
# because ru_maxrss begins with what the parent held when it started the process.
PEAKS = """
import json, re, sys, torch
from modeling_tests.modeling.tiny_models import tiny_model
torch.set_num_threads(1)
model = tiny_model(torch.float32, hidden_size=32, num_hidden_layers=2, compression_span=0.18, compression_ratio=0.009)
chunk, lengths = int(sys.argv[1]), [int(length) for length in sys.argv[2:]]
peaks = []
for length in [2048, *lengths]:
    ids = torch.randint(2, 50, (1, length), generator=torch.Generator().manual_seed(0))
    output = model.generate(ids, max_new_tokens=2, prefill_chunk_length=chunk)
    assert output.shape == (1, length + 2)
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
print(json.dumps([peak - peaks[0] for peak in peaks[1:]]))
"""


def growth(chunk, *lengths):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure a peak")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PEAKS, str(chunk), *map(str, lengths)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_memory_is_flat_in_the_length():
    """What must grow with a token: its ids, and the window's states, some 200 bytes; activations would be kilobytes."""
    at_16k, at_64k = growth(1024, 16_384, 65_536)
    assert at_64k - at_16k < 49_152 * 300
    (in_one_piece,) = growth(32_768, 32_768)
    assert in_one_piece > 32_768 * 1000, "the measure must show what is not chunked"


def test_128k_tokens():
    (at_128k,) = growth(2048, 131_072)
    assert at_128k < 131_072 * 300


@pytest.mark.parametrize("chunk", [1000, 4096])
def test_a_long_prompt_in_chunks_is_the_whole(chunk):
    model = tiny_model(hidden_size=8, num_hidden_layers=2, compression_span=0.6, compression_ratio=0.05)
    ids = torch.stack(random_rows([8_192]))
    with torch.no_grad():
        whole = model(ids, compress_prompt=True, use_cache=True)
        pieces = model(ids, compress_prompt=True, use_cache=True, prefill_chunk_length=chunk)
    assert torch.equal(whole.compressed_positions, pieces.compressed_positions)
    assert_close(pieces.logits, whole.logits, 1e-9, "logits")
    assert_same_cache(pieces.cache_params, whole.cache_params, 1e-9)


def test_long_prompts_are_chunked_without_being_asked(monkeypatch):
    monkeypatch.setattr(two_stage_generation, "DEFAULT_CHUNK_LENGTH", 16)
    model = tiny_model()
    ids = torch.stack(random_rows([40]))
    lengths = []
    handle = model.backbone.layers[0].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    with torch.no_grad():
        model(ids)
    assert lengths == [16, 16, 8]
    lengths.clear()
    model(ids)
    assert lengths == [40], "with gradients nothing may be cut"
    handle.remove()

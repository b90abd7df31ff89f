# SPDX-License-Identifier: Apache-2.0
"""Long prompts: read in chunks, memory depends on the chunk and not on the prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_tests.modeling import reference_two_stages as reference
from modeling_tests.modeling.tiny_models import (
    SPAN,
    START,
    assert_close,
    assert_same_cache,
    cached_states,
    padded,
    random_rows,
    tiny_model,
)
from remamba_hf.modeling import recurrent_passes

# Runs in a process of its own, whose peak is nobody else's: prints the peak's growth in bytes after each prompt. VmHWM,
# because ru_maxrss begins with what the parent held when it started the process.
PEAKS = """
import json, re, sys, torch
from modeling_tests.modeling.tiny_models import tiny_model
torch.set_num_threads(1)
settings = dict(hidden_size=32, num_hidden_layers=2, compression_span=0.18, compression_ratio=0.009)
model = tiny_model(torch.float32, family=sys.argv[1], **settings)
chunk, *lengths = map(int, sys.argv[2:])
peaks = []
for length in [2048, *lengths]:
    ids = torch.randint(2, 50, (1, length), generator=torch.Generator().manual_seed(0))
    output = model.generate(ids, max_new_tokens=2, prefill_chunk_length=chunk)
    assert output.shape == (1, length + 2)
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
print(json.dumps([peak - peaks[0] for peak in peaks[1:]]))
"""


def growth(family, chunk, *lengths):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure a peak")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PEAKS, family, str(chunk), *map(str, lengths)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_memory_is_flat_in_the_length(family):
    """What must grow with a token: its ids, and the window's states, some 200 bytes; activations would be kilobytes."""
    at_16k, at_64k = growth(family, 1024, 16_384, 65_536)
    assert at_64k - at_16k < 49_152 * 300


def test_the_measure_shows_what_is_not_chunked():
    (in_one_piece,) = growth("remamba", 32_768, 32_768)
    assert in_one_piece > 32_768 * 1000


def test_128k_tokens():
    (at_128k,) = growth("remamba", 2048, 131_072)
    assert at_128k < 131_072 * 300


@pytest.mark.parametrize("chunk", [1000, 4096])
def test_a_long_prompt_in_chunks_is_the_whole(family, chunk):
    model = tiny_model(family=family, hidden_size=8, num_hidden_layers=2, compression_span=0.6, compression_ratio=0.05)
    ids = torch.stack(random_rows([8_192]))
    with torch.no_grad():
        whole = model(ids, compress_prompt=True, use_cache=True)
        pieces = model(ids, compress_prompt=True, use_cache=True, prefill_chunk_length=chunk)
    assert torch.equal(whole.compressed_positions, pieces.compressed_positions)
    assert_close(pieces.logits, whole.logits, 1e-9, "logits")
    assert_same_cache(pieces.cache_params, whole.cache_params, 1e-9)


@pytest.mark.parametrize("chunk", [None, 50])
def test_ragged_rows_longer_than_the_operators_chunks(family, chunk):
    """Rows end inside, at the end of and right behind a chunk of 64 tokens."""
    model = tiny_model(family=family, num_hidden_layers=2, compression_ratio=0.1)
    prompts, rows = (64, 137, 127, 150), random_rows([66, 140, 128, 193])
    ids, mask, places = padded(rows, "both")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=prompts, use_cache=True, prefill_chunk_length=chunk)
    for row, place in enumerate(places):
        logits, _, _, states = reference.two_stages(
            model.state_dict(), model.config, rows[row], prompts[row], START, SPAN, 0.1
        )
        assert_close(output.logits[row, place], logits, 1e-10, f"logits of row {row}")
        assert_same_cache(cached_states(output.cache_params, row), states, 1e-10, f"cache of row {row}")


def test_long_prompts_are_chunked_without_being_asked(family, monkeypatch):
    monkeypatch.setattr(recurrent_passes, "DEFAULT_CHUNK_LENGTH", 16)
    model = tiny_model(family=family)
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

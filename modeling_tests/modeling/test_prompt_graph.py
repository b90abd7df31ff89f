# SPDX-License-Identifier: Apache-2.0
"""Prompts read through captured passes, against passes as Python runs them: which are captured, what they are given and what
they leave. Here a stand-in for the graph runs what was captured on the tensors it was captured with; real ones are tested in
modeling_tests/gpu."""

import contextlib
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList

from modeling_tests.modeling.test_decode_graph import OnCuda
from modeling_tests.modeling.tiny_models import (
    VOCABULARY,
    assert_close,
    assert_same_cache,
    cached_states,
    random_rows,
    tiny_memmamba,
    tiny_model,
)
from remamba_hf.modeling import decode_graph, prompt_graph, recurrent_generation
from remamba_hf.modeling.decode_graph import DecodeGraphs, EagerStep, Survey, kept_for, release_graphs
from remamba_hf.modeling.prompt_graph import PromptGraphs, graph_length
from remamba_hf.modeling.selective_compression import Adaptation


class Graph:
    """Stands in for a captured pass, and counts."""

    replayed: list[torch.Size] = []
    captured: list["Graph"] = []

    def __init__(self, run, device, pool):
        run()  # to warm up
        run()  # to be captured
        self.run, self.pool_given = run, pool
        Graph.captured.append(self)

    def replay(self):
        found = dict(zip(self.run.__code__.co_freevars, (cell.cell_contents for cell in self.run.__closure__), strict=True))
        Graph.replayed.append(found["hidden_states"].shape[:2])
        self.run()

    def pool(self):
        return self if self.pool_given is None else self.pool_given


@pytest.fixture
def graphs(monkeypatch):
    """Lets `generate` on the CPU do as on a GPU, with shorter graphs."""
    monkeypatch.setattr(recurrent_generation, "why_not_graphed", lambda *arguments: "")
    monkeypatch.setattr(DecodeGraphs, "step", lambda graphs, model, cache, *how: EagerStep(model, cache))
    monkeypatch.setattr(prompt_graph, "_captured_behind_a_run", Graph)
    for name, value in {"LENGTHS": (4, 8, 16, 24, 32), "MOST_TOKENS": 64, "TAKES_AS_LONG": 48, "FEWEST_SLOTS": 4}.items():
        monkeypatch.setattr(prompt_graph, name, value)
    Graph.replayed, Graph.captured = [], []
    return Graph


def prompts(*lengths, seed=1):
    rows, longest = random_rows(lengths, seed), max(lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :], mask[index, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def answer(model, given, cuda_graph=True, **settings):
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**given, **settings, cuda_graph=cuda_graph, return_dict_in_generate=True, output_logits=True)


def assert_same_answer(actual, expected, limit=1e-10):
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits), limit, "logits")
    assert_same_cache(actual.past_key_values, expected.past_key_values, limit)


def lengths_read():
    found, Graph.replayed[:] = [length for _, length in Graph.replayed], []
    return found


@pytest.mark.parametrize(
    ("lengths", "chunk_length", "settings", "expected"),
    [
        ((4,), None, {"compress_prompt": False}, [4]),
        ((5,), None, {"compress_prompt": False}, [8]),
        ((1,), None, {"compress_prompt": False}, [4]),
        ((23,), None, {"compress_prompt": False}, [24]),
        ((23,), 10, {"compress_prompt": False}, [10, 10, 4]),
        ((14,), None, {}, [16, 16]),  # of the window's 7 stay 3
        ((8, 13, 11), None, {"compress_prompt": False}, [16]),
        ((4, 13, 11), 6, {"compress_prompt": False}, [6, 6, 4]),  # nothing is left of the first row behind a chunk
        ((8, 13, 11), None, {}, [16, 16]),
        ((30, 32), None, {}, [32, 24]),
        ((32, 20), 24, {}, [24, 8, 24]),  # windows end before the first chunk does
        ((40,), 8, {}, [8] * 8 + [4]),  # kept vectors in some chunks
        ((31, 28), 10, {"compression_ratio": 1.0}, [10, 10, 10, 4] * 2),
        ((30, 9), None, {"compression_ratio": [1.0, 0.5]}, [32, 32]),
    ],
    ids=str,
)
def test_answers_are_the_same(family, graphs, lengths, chunk_length, settings, expected):
    model = tiny_model(family=family)
    given = prompts(*lengths)
    settings = {"prefill_chunk_length": chunk_length, **settings}
    eager = answer(model, given, cuda_graph=False, **settings)
    assert not graphs.captured
    for _ in range(2):
        assert_same_answer(answer(model, given, **settings), eager)
        assert lengths_read() == expected
    for actual, wanted in zip(
        answer(model, given, **settings).past_key_values.layers, eager.past_key_values.layers, strict=True
    ):
        tensors = ("conv_states", "recurrent_states")
        noted, expected_notes = (
            {name: value for name, value in vars(layer).items() if name not in tensors} for layer in (actual, wanted)
        )
        assert noted == expected_notes  # all that transformers keeps of a layer
        assert actual.conv_states[0].dtype == wanted.conv_states[0].dtype
        assert actual.recurrent_states[0].dtype == wanted.recurrent_states[0].dtype


def test_caches_are_their_owners(family, graphs):
    """Neither a later prompt nor a change of another cache shows in one, and one that was reset keeps its tensors."""
    model = tiny_model(family=family)
    given, settings = prompts(13), dict(compress_prompt=False, max_new_tokens=1)
    first, second = (answer(model, given, **settings).past_key_values for _ in range(2))
    for one, other in zip(first.layers, second.layers, strict=True):
        one.recurrent_states[0].fill_(7.0)
        one.has_previous_state[0] = "mine"
        assert not (other.recurrent_states[0] == 7.0).any()
        assert other.has_previous_state[0] is True
    again = answer(model, given, **settings).past_key_values
    assert_same_cache(again, second, 1e-10)
    again.reset()
    places = [state.data_ptr() for pair in cached_states(again) for state in pair]
    answer(model, given, cache_params=again, **settings)
    assert [state.data_ptr() for pair in cached_states(again) for state in pair] == places
    assert_same_cache(again, second, 1e-10)


def test_one_graph_serves_all_prompts_of_about_a_length(family, graphs):
    model = tiny_model(family=family)
    for seed, lengths in enumerate([(13, 10), (9, 16), (16, 16), (11, 12)]):
        given = prompts(*lengths, seed=seed)
        actual = answer(model, given, compress_prompt=False)
        assert_same_answer(actual, answer(model, given, cuda_graph=False, compress_prompt=False))
    assert len(graphs.captured) == 1
    assert lengths_read() == [16] * 4


def test_graphs_share_memory(graphs):
    model = tiny_model()
    for length in (16, 20, 30):
        answer(model, prompts(length))
    shared = kept_for(model, PromptGraphs)
    pools = {id(graph.pool()) for graph in graphs.captured}
    assert len(graphs.captured) == 5
    assert len(pools) == 1
    assert list(shared.states) == [(1, torch.float64)]
    assert sorted(name for name, _ in shared.tensors) == ["hidden_states", "output"]


def test_what_an_earlier_prompt_left_does_not_act(family, graphs):
    """NaN in its embeddings, its states, and kept vectors."""
    model = tiny_model(family=family)
    broken = torch.full((2, 16, model.config.hidden_size), torch.nan, dtype=torch.float64)
    answer(model, {"inputs_embeds": broken}, compress_prompt=False)
    given = prompts(9, 12)
    expected = answer(model, given, cuda_graph=False, compress_prompt=False)
    assert_same_answer(answer(model, given, compress_prompt=False), expected)
    longer, shorter = prompts(32, 30), prompts(18, 19)
    answer(model, longer, compression_ratio=1.0)
    expected = answer(model, shorter, cuda_graph=False)
    assert_same_answer(answer(model, shorter), expected)


@pytest.mark.parametrize("kept", ["given", "returned"])
@pytest.mark.parametrize("chunk_length", [None, 6])
def test_a_cache_is_continued(family, graphs, kept, chunk_length):
    """With what is new alone; by a graph what Python has read, and the other way round."""
    model = tiny_model(family=family)
    texts = {}
    for ways in [(True, True), (True, False), (False, True), (False, False)]:
        cache = DynamicCache(config=model.config) if kept == "given" else None
        found = answer(model, prompts(13, 11), cuda_graph=ways[0], cache_params=cache, prefill_chunk_length=chunk_length)
        cache = cache or found.past_key_values
        more = torch.cat([found.sequences[:, -1:], *(row.expand(2, -1) for row in random_rows((8,), seed=7))], dim=1)
        lengths_read()
        texts[ways] = answer(
            model, {"input_ids": more}, cuda_graph=ways[1], cache_params=cache, prefill_chunk_length=chunk_length
        )
        assert lengths_read() == ([16] if chunk_length is None else [6, 4]) * ways[1]
        assert cache is texts[ways].past_key_values
        assert_same_answer(texts[ways], texts[True, True])


def test_chunks_that_are_too_long_are_read_between_graphs(family, graphs, monkeypatch):
    model = tiny_model(family=family)
    given = prompts(50)
    monkeypatch.setattr(prompt_graph, "MOST_TOKENS", 8)
    for settings in ({"compress_prompt": False}, {}):
        settings["prefill_chunk_length"] = 14
        actual = answer(model, given, **settings)
        assert_same_answer(actual, answer(model, given, cuda_graph=False, **settings))
        assert lengths_read()[0] == 8
    with torch.no_grad():
        assert len(graphs.captured) >= 1


@pytest.mark.parametrize("lengths", [(20,), (30, 25)])
def test_progress_is_the_same(graphs, lengths):
    model = tiny_model()
    told = {}
    for cuda_graph in (True, False):
        told[cuda_graph] = []
        answer(
            model,
            prompts(*lengths),
            cuda_graph=cuda_graph,
            prefill_chunk_length=8,
            prefill_progress=lambda *counts: told[cuda_graph].append(counts),  # noqa: B023
        )
    assert told[True] == told[False]
    assert len(told[True]) > 4


def test_copies_of_a_prompt_are_read_once(graphs):
    model = tiny_model()
    call = dict(do_sample=True, num_return_sequences=3, max_new_tokens=6)
    found = []
    for cuda_graph in (True, False):
        torch.manual_seed(3)
        found.append(answer(model, prompts(14, 10), cuda_graph=cuda_graph, **call))
    assert_same_answer(*found)
    assert [rows for rows, _ in graphs.replayed] == [2, 2]


def test_captures_in_inference_mode_serve_outside_of_it(graphs):
    model, given = tiny_model(), prompts(13)
    with torch.inference_mode():
        inside = answer(model, given)
    assert_same_answer(answer(model, given), inside)
    assert len(graphs.captured) == 2


def test_the_second_call_that_wants_a_shape_has_it_captured(graphs):
    model = tiny_model()

    def captured(lengths, **settings):
        before = len(graphs.captured)
        answer(model, prompts(*lengths), cuda_graph=None, **settings)
        return len(graphs.captured) - before

    assert captured((14,)) == 0, "stage 1 wants 16, stage 2 wants 16 with kept vectors"
    assert captured((17,)) == 1, "stage 1 wants 24, stage 2 as before"
    assert lengths_read() == [16]
    assert captured((13,)) == 1
    assert captured((13,)) == 0
    assert lengths_read() == [16] * 4
    assert captured((30,), prefill_chunk_length=5, compress_prompt=False) == 0, "one prompt of many chunks"
    assert captured((5,), prefill_chunk_length=5, compress_prompt=False) == 1
    assert captured((13, 13)) == 0, "rows make another shape"
    assert captured((8,), compress_prompt=False) == 0
    assert captured((8,), compress_prompt=False) == 1, "and so does whether there are kept vectors"


def test_what_is_never_captured(graphs, monkeypatch):
    model, given = tiny_model(), prompts(13)

    def stays_eager(model=model, times=3, **settings):
        for _ in range(times):
            model.generate(**given, **{"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **settings})
        return not graphs.captured

    assert stays_eager(cuda_graph=False)
    assert stays_eager(num_beams=2)
    for _ in range(3):
        with torch.no_grad():
            model(**given, compress_prompt=True)
    assert not graphs.captured, "outside of generate"
    assert stays_eager(tiny_memmamba())
    with torch.autocast("cpu", torch.bfloat16):
        assert stays_eager(tiny_model(torch.float32))
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(torch.float32), peft.LoraConfig(target_modules=["in_proj"])).eval()
    assert stays_eager(adapted)
    monkeypatch.setattr(recurrent_generation, "why_not_graphed", lambda *arguments: "hooks")
    assert stays_eager(cuda_graph=None)
    monkeypatch.setattr(recurrent_generation, "why_not_graphed", lambda *arguments: "")
    assert not stays_eager(cuda_graph=None), "everything else being as above"


def test_hidden_states_are_read_without(graphs):
    model, given = tiny_model(), prompts(13)
    with torch.no_grad(), prompt_graph.prompts_through_graphs(model, Survey.of(model), insist=True):
        model(**given)
        assert lengths_read() == [16]
        with_states = model(**given, output_hidden_states=True)
        assert lengths_read() == []
        assert len(with_states.hidden_states) == model.config.num_hidden_layers + 1
        tiny_model(seed=1)(**given)
        assert lengths_read() == [], "another model inside"
        with torch.enable_grad():
            model(**given).logits.sum().backward()
        assert lengths_read() == []
    with torch.no_grad():
        model(**given)
    assert lengths_read() == [], "behind the block"


def test_states_that_are_kept_are_copied(graphs):
    """All positions of a prompt that is one chunk."""
    model = tiny_model()
    with torch.no_grad(), prompt_graph.prompts_through_graphs(model, Survey.of(model), insist=True):
        first = model(**prompts(16, seed=1)).logits
        states = model.backbone(**prompts(16, seed=1)).last_hidden_state
        kept = states.clone()
        second = model(**prompts(16, seed=2)).logits
        assert torch.equal(states, kept)
        assert not torch.equal(first, second)
        assert lengths_read() == [16] * 3


@pytest.mark.parametrize(
    ("rows", "tokens", "chunk_length", "expected"),
    [
        (1, 1, None, 128),
        (1, 128, None, 128),
        (1, 129, None, 256),
        (1, 513, None, 1024),
        (1, 1025, None, 2048),
        (1, 6144, 16_384, 6144),
        (1, 6145, None, None),  # 1023 pads behind as many tokens as Python's time allows
        (1, 6300, None, 7168),
        (1, 7169, None, 8192),
        (1, 8192, None, 8192),
        (1, 8193, None, None),
        (1, 8193, 8193, None),
        (8, 1000, None, 1024),
        (8, 800, None, None),
        (8, 700, None, None),
        (6, 700, None, 1024),
        (8, 1025, None, None),
        (9, 100, None, None),
        (3, 2000, None, 2048),
        (1, 700, 700, 700),
        (1, 600, 700, 700),
        (1, 500, 700, 512),
        (2, 5000, 5000, None),
        (2, 3000, 3000, 3000),
        (1, 1, 1, 1),
    ],
)
def test_the_length_of_a_graph(rows, tokens, chunk_length, expected):
    assert graph_length(rows, tokens, chunk_length) == expected


@pytest.mark.parametrize("kept", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_kept_vectors_in_wider_rows(kept, rows):
    """Entries that stand twice act once."""
    places = torch.stack([torch.randperm(6)[:kept] for _ in range(rows)])
    narrow = Adaptation((places + 6 * torch.arange(rows)[:, None]).flatten(), torch.rand(rows * kept))
    wide = narrow.in_wider_rows(6, 10, slots=16)
    assert [len(part) for part in wide] == [16, 16]
    sequence = torch.randn(rows, 10, 5)
    assert torch.equal(wide.scale(sequence)[:, :6], narrow.scale(sequence[:, :6]))
    assert torch.equal(wide.scale(sequence)[:, 6:], sequence[:, 6:])


@pytest.mark.parametrize(("length", "slots"), [(8, 4), (10, 8), (16, 8), (18, 16)])
def test_slots_for_kept_vectors(graphs, length, slots):
    model = tiny_model(compression_ratio=1.0)
    answer(model, prompts(length))
    found = [shape.slots for shape in kept_for(model, PromptGraphs).graphs]
    assert found == [0, slots]


def test_graphs_and_states_are_bounded(graphs, monkeypatch):
    monkeypatch.setattr(prompt_graph, "MOST_GRAPHS", 4)
    monkeypatch.setattr(prompt_graph, "MOST_STATES", 5)
    model = tiny_model()
    kept = kept_for(model, PromptGraphs)

    def read(rows, length, cuda_graph=True):
        answer(model, prompts(*[length] * rows), cuda_graph=cuda_graph, compress_prompt=False, max_new_tokens=1)
        return [(shape.rows, shape.tokens) for shape in kept.graphs]

    for length in (4, 8, 16):
        read(1, length)
    assert read(2, 4) == [(1, 4), (1, 8), (1, 16), (2, 4)]
    assert read(1, 4) == [(1, 8), (1, 16), (2, 4), (1, 4)]
    assert read(1, 24) == [(1, 16), (2, 4), (1, 4), (1, 24)], "the one used longest ago has gone"
    assert read(3, 4) == [(1, 16), (1, 4), (1, 24), (3, 4)], "six rows of states would be too many"
    assert sorted(rows for rows, _ in kept.states) == [1, 3]
    assert read(4, 4) == [(4, 4)]
    assert read(1, 4) == [(4, 4), (1, 4)]
    assert read(5, 4) == [(5, 4)]
    assert sorted(rows for rows, _ in kept.states) == [5]
    assert read(8, 4) == [(8, 4)], "more than all are allowed, alone"
    before = len(graphs.captured)
    read(1, 4, cuda_graph=None)
    assert len(graphs.captured) == before, "what was released has to be wanted twice again"
    read(1, 4, cuda_graph=None)
    assert len(graphs.captured) == before + 1
    monkeypatch.setattr(prompt_graph, "_REMEMBERED", 3)
    for chunk_length in range(1, 10):
        answer(model, prompts(9), cuda_graph=None, prefill_chunk_length=chunk_length, compress_prompt=False)
    assert len(kept.wanted) <= 3


def test_graphs_are_forgotten_with_their_weights(graphs):
    model, given = tiny_model(), prompts(13)
    answer(model, given)
    assert len(graphs.captured) == 2
    for parameter in model.parameters():
        parameter.data.mul_(1.05)
    assert_same_answer(answer(model, given), answer(model, given, cuda_graph=False))
    assert len(graphs.captured) == 2, "changed in place"
    model.backbone.norm_f.weight.data = model.backbone.norm_f.weight.data * 1.5
    kept = kept_for(model, PromptGraphs)
    answer(model, given, cuda_graph=None)
    assert not kept.graphs
    assert not kept.states
    assert not kept.tensors
    assert_same_answer(answer(model, given), answer(model, given, cuda_graph=False))
    assert len(graphs.captured) == 4
    release_graphs(model)
    assert not kept_for(model, PromptGraphs).graphs
    assert decode_graph.graphs_of(model) is decode_graph.graphs_of(model)


def test_graphs_go_with_their_model(graphs, monkeypatch):
    class Bare:
        def __init__(self, run, device, pool):
            run()

        def replay(self):
            pass

        def pool(self):
            return None

    monkeypatch.setattr(prompt_graph, "_captured_behind_a_run", Bare)
    model = tiny_model()
    answer(model, prompts(14))
    answer(model, prompts(14), cuda_graph=None)
    answer(model, prompts(30), cuda_graph=None)
    assert kept_for(model, PromptGraphs).graphs
    backbone = weakref.ref(model.backbone)
    del model
    gc.collect()
    assert backbone() is None


def test_a_capture_that_fails_is_told_once_and_done_without(graphs, monkeypatch):
    model, given = tiny_model(), prompts(13)
    expected = answer(model, given, cuda_graph=False, compress_prompt=False)
    tried = []

    def fails(run, device, pool):
        tried.append(run())
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prompt_graph, "_captured_behind_a_run", fails)
    with pytest.warns(UserWarning, match="without a CUDA graph: the pass could not be captured .*out of memory"):
        assert_same_answer(answer(model, given, compress_prompt=False), expected)
    kept = kept_for(model, PromptGraphs)
    assert not kept.states
    assert not kept.tensors
    assert_same_answer(answer(model, given, compress_prompt=False), expected)
    assert len(tried) == 1
    monkeypatch.setattr(prompt_graph, "_captured_behind_a_run", Graph)
    release_graphs(model)
    assert_same_answer(answer(model, given, compress_prompt=False), expected)
    assert len(graphs.captured) == 1


def test_precision_of_products_makes_another_graph(graphs):
    model = tiny_model(torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            answer(model, prompts(13), compress_prompt=False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(graphs.captured) == 2


def test_the_real_capture_is_asked_for_on_a_gpu_alone():
    """`why_not_graphed` decides: on the CPU it objects, with a model on a GPU it does not."""
    model = tiny_model()
    with contextlib.suppress(ValueError):
        model.generate(**prompts(13), max_new_tokens=2, cuda_graph=True)
    assert not kept_for(model, PromptGraphs).graphs
    asked = OnCuda(model), Survey.of(model), model.generation_config, StoppingCriteriaList([MaxLengthCriteria(9)]), {}
    assert decode_graph.why_not_graphed(*asked) == ""
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert "hooks" in decode_graph.why_not_graphed(*asked)
    finally:
        handle.remove()


def test_ids_are_within_the_vocabulary():
    assert max(row.max().item() for row in random_rows((30, 32))) < VOCABULARY

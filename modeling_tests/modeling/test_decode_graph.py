# SPDX-License-Identifier: Apache-2.0
"""The decoding loop of captured steps against transformers' own, on the CPU, where its steps are run as they are. Captured
ones are tested in modeling_tests/gpu."""

import contextlib
import copy
import gc
import itertools

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_tests.modeling.tiny_models import (
    VOCABULARY,
    assert_close,
    assert_same_cache,
    assert_same_memory,
    random_rows,
    tiny_memmamba,
    tiny_model,
)
from remamba_hf.modeling import decode_graph, recurrent_generation
from remamba_hf.modeling.decode_graph import (
    AllFinished,
    DecodeGraphs,
    EagerStep,
    FusedStep,
    Survey,
    graphs_of,
    release_graphs,
)
from remamba_hf.modeling.modeling_memmamba import FusedNotesStep, NotesStep
from remamba_hf.modeling.optional_kernels import without_kernels

MODELS = {"remamba": tiny_model, "remamba2": lambda: tiny_model(family="remamba2"), "memmamba": tiny_memmamba}


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class SumIsLarge(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -6:].sum(1) > 150


@pytest.fixture
def own_loop(monkeypatch):
    """Lets `generate` take the loop of captured steps, with steps that are not, and counts them."""
    steps = []

    class Counted(EagerStep):
        def __call__(self, tokens):
            steps.append(len(tokens))
            return super().__call__(tokens)

    monkeypatch.setattr(recurrent_generation, "why_not_graphed", lambda *arguments: "")
    monkeypatch.setattr(recurrent_generation, "prompts_through_graphs", lambda *arguments, **how: contextlib.nullcontext())
    monkeypatch.setattr(DecodeGraphs, "step", lambda graphs, model, cache, *how: Counted(model, cache))
    return steps


def batch(lengths=(9, 14, 11)):
    rows = random_rows(lengths)
    longest = max(lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :], mask[index, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.8, "num_return_sequences": 2},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"eos_token_id": list(range(0, VOCABULARY, 3))},
        {"eos_token_id": list(range(0, VOCABULARY, 5)), "do_sample": True},
        {"stopping_criteria": StoppingCriteriaList([SumIsLarge()])},
        {"max_time": 60.0},
        {"max_new_tokens": 1},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_loop_says_what_transformers_says(family, settings, own_loop):
    model = MODELS[family]()
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    for extra in ({}, {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}):
        results = []
        for cuda_graph in (None, False):
            torch.manual_seed(5)
            heard = Heard() if given.get("num_return_sequences", 1) == 1 else None
            found = model.generate(**batch(), **given, **extra, streamer=heard, cuda_graph=cuda_graph)
            results.append((found, heard))
            taken, own_loop[:] = list(own_loop), []
            if cuda_graph is None:
                columns = (found if not extra else found.sequences).shape[1] - 14
                assert columns - 1 <= len(taken) <= columns + decode_graph.RUNS_AHEAD
                assert not extra or len(taken) == columns - 1, "a cache that is kept has read no token too many"
            else:
                assert not taken
        (mine, my_streamer), (theirs, their_streamer) = results
        if heard is not None:
            assert my_streamer.ended
            said = their_streamer.tokens
            assert my_streamer.tokens[: len(said)] == said
            assert all(set(late) == {0} for late in my_streamer.tokens[len(said) :]) or "eos_token_id" not in settings
        if not extra:
            assert torch.equal(mine, theirs)
            continue
        assert torch.equal(mine.sequences, theirs.sequences)
        for name in ("scores", "logits"):
            assert len(mine[name]) == len(theirs[name]) == mine.sequences.shape[1] - 14
            for one, other in zip(mine[name], theirs[name], strict=True):
                assert torch.equal(one, other)
        for one, other in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
            for state in range(one.number_of_states):
                assert torch.equal(one.recurrent_states[state], other.recurrent_states[state])
                assert torch.equal(one.conv_states[state], other.conv_states[state])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kept", ["returned", "given"])
def test_a_cache_that_is_kept_goes_on_exactly(family, kept, own_loop):
    """With an end that comes while the host might be ahead."""
    model = MODELS[family]()
    ids = random_rows((20,))[0][None]
    free = model.generate(ids, max_new_tokens=12, do_sample=False, cuda_graph=False)
    end = free[0, 25].item()
    texts = []
    for cuda_graph in (None, False):
        cache = DynamicCache(config=model.config)
        call = dict(do_sample=False, pad_token_id=0, cuda_graph=cuda_graph)
        given = {"cache_params": cache} if kept == "given" else {"return_dict_in_generate": True}
        found = model.generate(ids, max_new_tokens=12, eos_token_id=end, **given, **call)
        sequences = found if kept == "given" else found.sequences
        cache = cache if kept == "given" else found.past_key_values
        assert sequences[0, -1] == end
        more = torch.cat([sequences, random_rows((5,), seed=8)[0][None]], dim=1)
        texts.append(model.generate(more, max_new_tokens=6, cache_params=cache, **call))
    assert torch.equal(*texts)


def test_an_end_is_known_late_but_for_what_it_was():
    for late in (0, 1, 3):
        finished = AllFinished(torch.device("cpu"), late)
        flags = [torch.tensor([True, True]), torch.tensor([False, True]), torch.tensor([False, False])]
        known = [finished.at(length, flags[min(length, 2)]) for length in range(2 + late)]
        assert known == [None] * (2 + late)
        assert finished.at(2 + late, flags[2]) == 2
        later = AllFinished(torch.device("cpu"), 5)
        assert [later.at(length, flags[length]) for length in range(3)] == [None] * 3
        assert later.finally_at() == 2
        assert later.finally_at() is None


@pytest.mark.parametrize("wanted", [True, None])
def test_what_cannot_be_captured_says_why_or_decodes_without(wanted):
    model = tiny_model()
    ids = random_rows((8,))[0][None]
    call = dict(max_new_tokens=3, do_sample=False, cuda_graph=wanted)
    if wanted:
        with pytest.raises(ValueError, match="cuda_graph=True is not possible: the model is on 'cpu', not on a CUDA device"):
            model.generate(ids, **call)
    else:
        assert model.generate(ids, **call).shape == (1, 11)


def test_a_narrow_state_needs_captured_steps():
    model, ids = tiny_model(), random_rows((8,))[0][None]
    with pytest.raises(ValueError, match=r"state_dtype=torch\.bfloat16 needs captured steps, but the model is on 'cpu'"):
        model.generate(ids, max_new_tokens=3, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"state_dtype must be .*, got torch\.int8"):
        model.generate(ids, max_new_tokens=3, state_dtype=torch.int8)


class OnCuda:
    """A model as far as `why_not_graphed` looks, said to be on a GPU."""

    def __init__(self, model):
        self.model = model
        self.device = torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self.model, name)

    @property
    def __class__(self):
        return type(self.model)


def reason(model, kwargs=None, **settings):
    config = copy.deepcopy(model.generation_config)
    for name, value in settings.items():
        setattr(config, name, value)

    class Criteria(list):
        max_length = 20

    return decode_graph.why_not_graphed(OnCuda(model), Survey.of(model), config, Criteria(), kwargs or {})


def with_codes(model):
    """An ordinary layer with a weight of a class of its own, which is how torchao quantises."""

    class Codes(torch.nn.Parameter):
        pass

    projection = model.backbone.layers[0].mixer.in_proj
    projection.weight = Codes(projection.weight.detach())
    return model


def test_reasons_not_to_capture():
    assert reason(tiny_model()) == ""
    assert reason(tiny_model(family="remamba2")) == ""
    assert reason(tiny_memmamba()) == ""
    assert "training mode" in reason(tiny_model().train())
    assert "hidden states" in reason(tiny_model(), output_hidden_states=True)
    assert "no state" in reason(tiny_model(), {"use_cache": False})
    hooked = tiny_model()
    hooked.backbone.layers[1].norm.register_forward_hook(lambda *arguments: None)
    assert "forward hooks" in reason(hooked)
    foreign = tiny_model()
    foreign.backbone.layers[0].mixer.in_proj = type("Linear8bit", (torch.nn.Linear,), {})(16, 64)
    assert "['Linear8bit']" in reason(foreign)
    assert "quantised" in reason(with_codes(tiny_model()))
    moved = tiny_model()
    moved.hf_device_map = {"": 0}
    assert "accelerate" in reason(moved)


def test_all_modules_and_weights_are_surveyed(family):
    model = tiny_model(family=family)
    model.backbone.layers[1].mixer.out_proj = model.backbone.layers[0].mixer.out_proj  # shared: once
    model.lm_head.bias = None
    modules, weights = Survey.of(model)
    assert len(modules) == len(list(model.modules()))
    assert set(modules) == set(model.modules())
    assert {id(weight) for weight in weights} == {id(weight) for weight in model.parameters()}


def test_states_are_copied_and_zeroed_whatever_their_dtypes():
    targets = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(5), torch.zeros(2, dtype=torch.float64)]
    sources = [torch.randn(target.shape, dtype=torch.float64).to(target.dtype) for target in targets]
    sources[2] = sources[2].to(torch.bfloat16)  # as states do that were narrowed meanwhile
    decode_graph.copy_tensors(targets, sources)
    assert all(torch.equal(target, source.to(target.dtype)) for target, source in zip(targets, sources, strict=True))
    decode_graph.zero_tensors(targets)
    assert not any(target.any() for target in targets)


def test_adapters_are_captured_but_not_kept():
    peft = pytest.importorskip("peft")
    model = tiny_model(torch.float32)
    assert graphs_of(model).refresh(Survey.of(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "dt_proj"])).base_model.model
    assert reason(adapted.eval()) == ""
    assert not graphs_of(adapted).refresh(Survey.of(adapted))


class FakeGraph:
    made = itertools.count()

    def __init__(self, model, cache, rows, state_dtype):
        self.rows, self.state_dtype, self.number = rows, state_dtype, next(FakeGraph.made)

    def begin_at(self, model, cache):
        self.loaded = cache


def cache_of(model, rows):
    with torch.no_grad():
        return model(torch.ones(rows, 3, dtype=torch.long), use_cache=True).cache_params


def test_graphs_are_reused_bounded_and_forgotten(monkeypatch):
    monkeypatch.setattr(decode_graph, "GraphedStep", FakeGraph)
    model = tiny_model(torch.float32)
    graphs = graphs_of(model)
    assert graphs.step(model, cache_of(model, 1), tokens=3) is None
    assert graphs.step(model, cache_of(model, 1), tokens=3, insist=True) is not None
    first = graphs.step(model, cache_of(model, 1), tokens=100)
    assert graphs.step(model, cache_of(model, 1), tokens=3) is first, "one that is there costs nothing"
    sixteen = graphs.step(model, cache_of(model, 9), tokens=100)
    assert sixteen.rows == 16
    assert graphs.step(model, cache_of(model, 13), tokens=100) is sixteen
    for rows in (2, 3, 4):
        graphs.step(model, cache_of(model, rows), tokens=100)
    assert len(graphs.graphs) == decode_graph.MOST_GRAPHS
    assert graphs.step(model, cache_of(model, 1), tokens=100) is not first, "the one used longest ago has gone"
    kept = graphs.step(model, cache_of(model, 2), tokens=100)
    narrow = graphs.step(model, cache_of(model, 2), 100, state_dtype=torch.bfloat16)
    assert narrow is not kept
    assert narrow.state_dtype == torch.bfloat16, "a state in another dtype is another graph"
    assert graphs.step(model, cache_of(model, 2), tokens=100) is kept
    model.backbone.norm_f.weight.data = model.backbone.norm_f.weight.data.clone()
    assert graphs.step(model, cache_of(model, 2), tokens=100) is not kept, "a weight stands elsewhere"
    assert len(graphs.graphs) == 1
    release_graphs(model)
    assert not graphs_of(model).graphs
    before = len(decode_graph._GRAPHS)
    del model, graphs
    gc.collect()
    assert len(decode_graph._GRAPHS) == before - 1


def test_models_with_graphs_can_be_copied(monkeypatch):
    monkeypatch.setattr(decode_graph, "GraphedStep", FakeGraph)
    model = tiny_model(torch.float32)
    graphs_of(model).step(model, cache_of(model, 1), tokens=100)
    assert not graphs_of(copy.deepcopy(model)).graphs


@pytest.mark.parametrize("family", ["remamba", "remamba2"])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_fused_step_is_the_same(family, residual_in_fp32, biases):
    """With the kernels' references, which the interpreter's tests compare the kernels with."""
    extra = {} if family == "remamba" else {"n_groups": 2, "time_step_limit": (0.01, 0.2)}
    model = tiny_model(family=family, residual_in_fp32=residual_in_fp32, use_bias=biases, use_conv_bias=biases, **extra)
    cache = cache_of(model, 3)
    mine = copy.deepcopy(cache)
    fused, eager = FusedStep(model, mine), EagerStep(model, cache)
    with torch.no_grad():
        for step in range(4):
            if step == 2:
                for block in model.backbone.layers:
                    block.mixer.A_log.add_(0.3)
                fused.begin(model, mine)
            tokens = torch.randint(0, VOCABULARY, (3,), generator=torch.Generator().manual_seed(step))
            assert_close(fused.run(model, tokens.unsqueeze(1)), eager(tokens), 1e-6, f"logits of step {step}")
    assert_same_cache(mine, cache, 1e-6)


def test_what_can_be_fused(monkeypatch):
    monkeypatch.setattr(decode_graph, "kernels_can_run", lambda device: device.type == "cuda")

    def fusable(model, rows=4):
        return decode_graph.can_be_fused(OnCuda(model), rows)

    assert fusable(tiny_model(torch.float32))
    assert fusable(tiny_model(torch.float32, family="remamba2"))
    assert not fusable(tiny_model(torch.float32), rows=65)
    assert not fusable(tiny_model(torch.float64))
    assert not decode_graph.can_be_fused(tiny_model(torch.float32), 4), "on the CPU"
    other = tiny_model(torch.float32)
    other.backbone.layers[0].mixer.out_proj = type("Quantised", (torch.nn.Linear,), {})(32, 16, bias=True)
    assert not fusable(other)
    mixed = tiny_model(torch.float32)
    mixed.lm_head.to(torch.bfloat16)
    assert not fusable(mixed)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(torch.float32), peft.LoraConfig(target_modules=["in_proj"]))
    assert not fusable(adapted.base_model.model)
    monkeypatch.setattr(decode_graph, "kernels_can_run", lambda device: False)
    assert not fusable(tiny_model(torch.float32)), "without Triton"


def test_a_capture_that_fails_is_told_and_done_without(monkeypatch):
    class Fails:
        def __init__(self, *arguments):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "GraphedStep", Fails)
    model = tiny_model(torch.float32)
    graphs = graphs_of(model)
    with pytest.warns(UserWarning, match="without a CUDA graph: .*not permitted"):
        assert graphs.step(model, cache_of(model, 1), tokens=100) is None
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.step(model, cache_of(model, 1), tokens=100, insist=True)


def test_without_kernels_nothing_is_captured():
    with without_kernels():
        assert "switched off" in reason(tiny_model())


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"fusion_position": "post", "cross_layer_period": 1}, {"residual_in_fp32": True}])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_with_notes_are_the_same(chunk_size, settings, fused):
    """Rows whose chunks end at different steps; begun at another cache, and left in one."""
    model = tiny_memmamba(chunk_size=chunk_size, **settings)
    limit = 1e-6 if fused else 1e-10  # kernels and their references compute in float32
    with torch.no_grad():
        given = batch((5, 7, 10))
        cache = model(**given, use_cache=True).cache_params
        other = model(**batch((9, 2, 3)), use_cache=True).cache_params
        step = model.step_to_capture(copy.deepcopy(other), fused=fused)
        assert type(step) is (FusedNotesStep if fused and "fusion_position" not in settings else NotesStep)
        for round in range(2):
            step.begin(model, cache)
            expected = copy.deepcopy(cache)
            eager = EagerStep(model, expected)
            for number in range(9):
                tokens = torch.randint(0, VOCABULARY, (3,), generator=torch.Generator().manual_seed(number))
                assert_close(step.run(model, tokens.unsqueeze(1)), eager(tokens), limit, f"logits of step {number}")
                if step.needs_upkeep():
                    step.upkeep(model)
            left = copy.deepcopy(cache)
            step.end(model, left)
            assert_same_memory(left, expected, limit, f"round {round}")

# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: the step of one token is captured as a CUDA graph and replayed, and the host runs ahead of the device.

A step of a recurrent model is hundreds of small kernels that change a state of constant size in place. Launched one by one
from Python they take ten times as long as the memory they read; as one graph they follow each other at once. `decode` is
transformers' loop of greedy search and sampling around such a step, without its wait for the device after every token.

Shapes: `B` rows, `V` vocabulary.
"""

import contextlib
import copy
import functools
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import Cache

from .decode_kernels import dependent_launches, kernels_can_run, norm_linear
from .optional_kernels import kernels_enabled
from .precision import is_plain_weight
from .tail_kernels import new_counters

MOST_GRAPHS = 4  # of one model, each with a state of its own; the one used longest ago is released for another
WORTH_CAPTURING = 16  # tokens; capturing takes as long as about four steps
MOST_FUSED_ROWS = 64  # beyond, library kernels multiply faster than those that stream a weight once
RUNS_AHEAD = 2  # steps that may be on their way to the device while the host learns whether they were wanted

Step = Callable[[torch.Tensor], torch.Tensor]
_Result = TypeVar("_Result")
_Graphs = TypeVar("_Graphs", bound="CapturedGraphs")


class EagerStep:
    """A step as Python runs it: tokens [B] long -> logits [B, V] float32. The reference of `GraphedStep`."""

    def __init__(self, model: Any, cache: Cache):
        self.model = model
        self.cache = cache

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return _run(self.model, tokens.unsqueeze(1), self.cache)

    def leave(self, model: Any, cache: Cache) -> None:
        """The states are the cache's own."""


class CacheStep:
    """What is captured: a step on states that stay where they are, in a cache, with the model's modules called as they are.

    It keeps no reference to the model, which every method is given.
    """

    def __init__(self, model: Any, cache: Cache):
        self.cache = cache

    def run(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, 1] long -> logits [B, V] float32. Changes the states in place, and asks the device nothing."""
        return _run(model, tokens, self.cache)

    def begin(self, model: Any, cache: Cache) -> None:
        """Take the first rows' states from another cache, and the weights as they are now."""
        theirs = list(tensors_of(cache))
        copy_tensors([mine[: len(theirs[0])] for mine in tensors_of(self.cache)], theirs)

    def end(self, model: Any, cache: Cache) -> None:
        """Leave the first rows' states in another cache."""
        theirs = list(tensors_of(cache))
        copy_tensors(theirs, [mine[: len(theirs[0])] for mine in tensors_of(self.cache)])

    def needs_upkeep(self) -> bool:
        """Whether `upkeep` is due behind the step that has just been run; called once behind each."""
        return False

    def upkeep(self, model: Any) -> None:
        """What is to be done behind some steps; captured as a graph of its own."""


class FusedStep(CacheStep):
    """A step in a few kernels a layer, which read the weights themselves (decode_kernels.py, tail_kernels.py). Decay rates
    are computed once, at the beginning, instead of in every step."""

    def __init__(self, model: Any, cache: Cache):
        super().__init__(model, cache)
        blocks = model.backbone.layers
        self.rates = [block.mixer.decay_rates().detach().clone() for block in blocks]
        rows = len(next(tensors_of(cache)))
        self.counters = [new_counters(rows, self.rates[0].device) for _ in blocks]

    def begin(self, model: Any, cache: Cache) -> None:
        super().begin(model, cache)
        for rates, block in zip(self.rates, model.backbone.layers, strict=True):
            rates.copy_(block.mixer.decay_rates())

    def run(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        hidden_states = model.backbone.embeddings(tokens[:, 0])
        with dependent_launches():
            for layer_idx, block in enumerate(model.backbone.layers):
                hidden_states = self.mix(block, layer_idx, hidden_states)
            return self.head(model, hidden_states)

    def mix(self, block: Any, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """A layer's norm, mixer and residual sum: [B, H] -> [B, H]."""
        layer = self.cache.layers[layer_idx]
        states = layer.conv_states[0], layer.recurrent_states[0]
        step: torch.Tensor = block.mixer.fused_step(
            hidden_states, block.norm, *states, self.rates[layer_idx], self.counters[layer_idx], block.residual_in_fp32
        )
        return step

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits of [B, H], float32."""
        norm, head = model.backbone.norm_f, model.lm_head
        return norm_linear(hidden_states, head.weight, head.bias, norm.weight, norm.eps).float()


class GraphedStep:
    """A captured step with states of its own, for up to `rows` rows; fused where that is possible.

    It keeps no reference to the model, whose weights it reads where they stood when it was captured.

    Args:
        model: in evaluation mode, on one CUDA device.
        cache: filled; its states serve as an example.
        rows: of the graph; more than the cache's, those beyond are copies that nobody reads.
        state_dtype: of the recurrent states meanwhile; None: as they are.

    Raises:
        ValueError: another `state_dtype`, and the step cannot be fused.
    """

    def __init__(self, model: Any, cache: Cache, rows: int, state_dtype: torch.dtype | None = None):
        with ordinary_tensors(), torch.cuda.device(model.device):
            self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
            self.taken = len(next(tensors_of(cache)))
            self.step = self._first_step(model, self._states(cache, rows), state_dtype)
            self.graph, self.logits = captured(lambda: self.step.run(model, self.tokens), model.device)
            self.upkeep: torch.cuda.CUDAGraph | None = None
            if type(self.step).upkeep is not CacheStep.upkeep:
                self.upkeep, _ = captured(lambda: self.step.upkeep(model), model.device)

    def _states(self, cache: Cache, rows: int) -> Cache:
        states = copy.deepcopy(cache)
        states.reorder_cache(torch.arange(rows, device=self.tokens.device).clamp(max=self.taken - 1))
        return states

    def _first_step(self, model: Any, states: Cache, state_dtype: torch.dtype | None) -> CacheStep:
        """The step to capture, once it has run: kernels are compiled, and workspaces allocated, before the capture."""
        rows = len(self.tokens)
        fused = can_be_fused(model, rows)
        if state_dtype is not None:
            if not fused:
                raise ValueError(
                    f"state_dtype={state_dtype} needs a step in fused kernels, which this model's layers or {rows} rows do "
                    "not allow. Leave it out."
                )
            for layer in states.layers:
                layer.recurrent_states[0] = layer.recurrent_states[0].to(state_dtype)
        step: CacheStep = model.step_to_capture(states, fused=fused)
        try:
            self._warm_up(model, step)
        except Exception as error:
            if not isinstance(step, FusedStep) or state_dtype is not None:
                raise
            warnings.warn(f"Decoding without fused kernels: they cannot run here ({error}).", stacklevel=2)
            step = model.step_to_capture(states, fused=False)
            self._warm_up(model, step)
        return step

    def _warm_up(self, model: Any, step: CacheStep) -> None:
        with on_side_stream(model.device):
            for _ in range(2):
                step.run(model, self.tokens)
                step.upkeep(model)

    def begin_at(self, model: Any, cache: Cache) -> None:
        """Begin where a cache is, with the weights as they are now."""
        self.taken = len(next(tensors_of(cache)))
        self.step.begin(model, cache)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B] long -> logits [B, V] float32, which the next step overwrites."""
        self.tokens[: self.taken, 0].copy_(tokens)
        self.graph.replay()
        if self.upkeep is not None and self.step.needs_upkeep():
            self.upkeep.replay()
        return self.logits[: self.taken]

    def leave(self, model: Any, cache: Cache) -> None:
        """Leave the states in a cache."""
        self.step.end(model, cache)


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be changed wherever a graph is replayed, also where the capture ran in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """What is launched inside runs where captures do, behind what was launched before and ahead of what comes after."""
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


def captured(run: Callable[[], _Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A graph of what `run` launches, and its result, which a replay writes again. It must have run before.

    Args:
        pool: memory of other graphs that may be overwritten in a replay; None: memory of its own.
    """
    graph = torch.cuda.CUDAGraph()
    with (  # the stream as it was: a capture that ends in an error may leave its own the current one
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, pool=pool, stream=_side_stream(device)),
    ):
        result = run()
    return graph, result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace of 32 MB for every stream that it ever ran on."""
    return torch.cuda.Stream(device)


class CapturedGraphs:
    """Graphs of one model, the one used longest ago first."""

    def __init__(self) -> None:
        self.weights: tuple[int, ...] = ()
        self.graphs: OrderedDict[Any, Any] = OrderedDict()

    def refresh(self, survey: "Survey") -> bool:
        """Forget what was captured if a weight of the model has another place now, or where adapters may have been
        switched. Whether a graph can be used again: see `Survey.are_ours`."""
        weights = tuple(weight.data_ptr() for weight in survey.weights)
        ours = survey.are_ours
        if weights != self.weights or not ours:
            self.forget()
            self.weights = weights
        return ours

    def forget(self) -> None:
        """Release all graphs."""
        self.graphs.clear()


class DecodeGraphs(CapturedGraphs):
    """The graphs of steps, by number of rows and kind of states."""

    graphs: "OrderedDict[Any, GraphedStep]"

    def step(
        self,
        model: Any,
        cache: Cache,
        tokens: int,
        insist: bool = False,
        state_dtype: torch.dtype | None = None,
        survey: "Survey | None" = None,
    ) -> GraphedStep | None:
        """A step that continues a cache, or None if for so few `tokens` it is not worth its capture (`insist`: it is).

        Args:
            state_dtype: of the recurrent states meanwhile; None: as they are.
            survey: of the model as it is now, if there is one.
        """
        if tokens < 1:
            return None
        self.refresh(survey or Survey.of(model))
        shapes = [tensor.shape[1:] for tensor in tensors_of(cache)]
        rows = _bucket(len(next(tensors_of(cache))))
        key = rows, tuple(tensor.dtype for tensor in tensors_of(cache)), tuple(shapes), state_dtype
        if key not in self.graphs:
            if tokens < WORTH_CAPTURING and not insist:
                return None
            while len(self.graphs) >= MOST_GRAPHS:
                self.graphs.popitem(last=False)
            try:
                self.graphs[key] = GraphedStep(model, cache, rows, state_dtype)
            except RuntimeError as error:
                if insist:
                    raise
                warnings.warn(f"Decoding without a CUDA graph: the step could not be captured ({error}).", stacklevel=2)
                return None
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        graph.begin_at(model, cache)
        return graph


_GRAPHS: "weakref.WeakKeyDictionary[Any, dict[type, CapturedGraphs]]" = weakref.WeakKeyDictionary()


def graphs_of(model: Any) -> DecodeGraphs:
    """The graphs of the model's steps, which go when it goes."""
    return kept_for(model, DecodeGraphs)


def kept_for(model: Any, kind: type[_Graphs]) -> _Graphs:
    """The model's graphs of one kind, which go when it goes."""
    graphs = _GRAPHS.setdefault(model, {}).setdefault(kind, kind())
    assert isinstance(graphs, kind)
    return graphs


def release_graphs(model: Any) -> None:
    """Gives the memory of a model's captured steps and passes back; `generate` captures them again when it needs them."""
    _GRAPHS.pop(model, None)


class Survey(NamedTuple):
    """What decides whether a model's steps can be captured, and whether those that were still hold, from one walk over its
    modules: every call of `generate` waits for it.

    modules: all, in any order.
    weights: their parameters.
    """

    modules: list[nn.Module]
    weights: list[nn.Parameter]

    @classmethod
    def of(cls, model: Any) -> "Survey":
        """In a fifth of the time that `model.modules()` takes."""
        found: dict[int, nn.Module] = {}
        left = [model]
        while left:
            module = left.pop()
            if module is not None and id(module) not in found:
                found[id(module)] = module
                left.extend(module._modules.values())
        modules = list(found.values())
        weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        return cls(modules, weights)

    @property
    def are_ours(self) -> bool:
        """Whether nothing in the model can change what a step does but its weights: adapters are switched in Python."""
        return not any(kind.__module__.startswith("peft.") for kind in {module.__class__ for module in self.modules})


def why_not_graphed(
    model: Any, survey: Survey, generation_config: Any, stopping_criteria: Any, model_kwargs: dict[str, Any]
) -> str:
    """Why the steps of a call of `generate` cannot be captured; empty if they can.

    Args:
        survey: of the model.
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device.type!r}, not on a CUDA device"
    if getattr(model, "hf_device_map", None) or getattr(model, "_hf_hook", None) is not None:
        return "its weights are moved by accelerate"
    modules = survey.modules
    if len({weight.get_device() for weight in survey.weights}) > 1:
        return "its weights are on several devices"
    if not kernels_enabled():
        return "kernels are switched off"
    if model.training:
        return "the model is in training mode: call eval()"
    of_all = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    if of_all or any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "modules have forward hooks, which a graph would not call"
    foreign = sorted(kind.__name__ for kind in {module.__class__ for module in modules} if not _may_be_captured(kind))
    if foreign:
        return f"nothing is known about modules of the types {foreign}"
    if not all(map(is_plain_weight, survey.weights)):
        return "its weights are quantised or sharded, which the kernels cannot read"
    if not model_kwargs.get("use_cache", True):
        return "use_cache=False leaves no state to continue"
    if generation_config.output_hidden_states or generation_config.output_attentions:
        return "hidden states are asked for"
    if getattr(stopping_criteria, "max_length", None) is None:
        return "the length has no bound"
    cache = model_kwargs.get("cache_params")
    if cache is not None and getattr(cache, "offloading", False):
        return "the cache is offloaded"
    return ""


_PLAIN = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.SiLU,
    nn.Dropout,
    nn.Identity,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterDict,
)


def _may_be_captured(kind: type[nn.Module]) -> bool:
    package = kind.__module__
    return kind in _PLAIN or _is_own(package) or package.startswith("peft.tuners.lora")


def can_be_fused(model: Any, rows: int) -> bool:
    """Whether a step of so many rows can run in kernels that read the weights themselves: every layer is what its weight
    says, in one dtype that Triton multiplies."""
    kept = model._keep_in_fp32_modules_strict
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    dtypes = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if not any(f".{part}." in f".{name}." for part in kept)
    }
    return (
        rows <= MOST_FUSED_ROWS
        and kernels_can_run(model.device)
        and Survey.of(model).are_ours
        and all(block.mixer.convolution_is_plain for block in model.backbone.layers)
        and all(type(module) is nn.Linear or _is_own(type(module).__module__) for module in linear)
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    )


def _is_own(package: str) -> bool:
    return package.rpartition(".")[0] == __name__.rpartition(".")[0] or package.startswith("transformers_modules.")


def _bucket(rows: int) -> int:
    """Rows of the graph that serves so many."""
    return rows if rows <= 4 else -(-rows // 8) * 8


def _run(model: Any, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    return model(tokens, cache_params=cache, use_cache=True, logits_to_keep=1, return_dict=True).logits[:, -1]


def tensors_of(cache: Cache) -> Iterator[torch.Tensor]:
    """All states of a filled cache."""
    for layer in cache.layers:
        for slot in range(layer.number_of_states):
            yield layer.conv_states[slot]
            yield layer.recurrent_states[slot]


def zero_tensors(tensors: list[torch.Tensor]) -> None:
    """All of them at once."""
    for (group,) in _of_a_dtype(tensors):
        torch._foreach_zero_(group)


def copy_tensors(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Every source into its target, all at once."""
    for group, others in _of_a_dtype(targets, sources):
        torch._foreach_copy_(group, others)


def _of_a_dtype(first: list[torch.Tensor], *others: list[torch.Tensor]) -> list[list[list[torch.Tensor]]]:
    """Lists of tensors, cut so that those of the first have one dtype: of mixed ones torch launches a kernel each."""
    groups: dict[torch.dtype, list[list[torch.Tensor]]] = {}
    for row in zip(first, *others, strict=True):
        lists = groups.setdefault(row[0].dtype, [[] for _ in row])
        for tensors, tensor in zip(lists, row, strict=True):
            tensors.append(tensor)
    return list(groups.values())


class AllFinished:
    """Whether all rows have ended, known `late` steps late, so that the host need not wait for the device.

    Args:
        late: 0: at once.
    """

    def __init__(self, device: torch.device, late: int):
        self.late = late
        self.on_cuda = device.type == "cuda"
        self.asked: deque[tuple[int, torch.Tensor, Any]] = deque()

    def at(self, length: int, unfinished: torch.Tensor) -> int | None:
        """The length at which all rows had ended, as far as that is known when they have reached `length`, or None."""
        flag = unfinished.any()
        if not self.late:
            return None if flag.item() else length
        answer, event = flag, None
        if self.on_cuda:
            answer, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            answer.copy_(flag, non_blocking=True)
            event.record()
        self.asked.append((length, answer, event))
        return self._oldest() if len(self.asked) > self.late else None

    def finally_at(self) -> int | None:
        """As `at`, of everything that was asked."""
        while self.asked:
            if (length := self._oldest()) is not None:
                return length
        return None

    def _oldest(self) -> int | None:
        length, answer, event = self.asked.popleft()
        if event is not None:
            event.synchronize()
        return None if answer.item() else length


def decode(
    step: Step,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    late: int = RUNS_AHEAD,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """transformers' loop of greedy search and sampling, behind the prefill.

    Args:
        step: gives the logits [B, V] behind tokens [B].
        logits: of the prompt's end, [B, V].
        input_ids: the prompt [B, L] long.
        late: how many steps the host may be ahead when all rows end; their tokens are dropped, but the step has read them.

    Returns:
        The sequences [B, L + new], and the scores and logits of every new token as far as they are asked for.
    """
    config = generation_config
    length, most = input_ids.shape[1], stopping_criteria.max_length
    sequences = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), max(most - length, 1))], dim=1)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    can_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    only_length = not can_end and len(stopping_criteria) == 1
    finished = AllFinished(input_ids.device, late)
    keeps = config.return_dict_in_generate
    all_scores: list[torch.Tensor] = []
    all_logits: list[torch.Tensor] = []
    ended = None
    while ended is None:
        logits = logits.to(dtype=torch.float32, copy=True)
        scores = logits_processor(sequences[:, :length], logits)
        if keeps and config.output_scores:
            all_scores.append(scores)
        if keeps and config.output_logits:
            all_logits.append(logits)
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if can_end:
            tokens = torch.where(unfinished, tokens, config._pad_token_tensor.to(tokens.device))
        sequences[:, length] = tokens
        length += 1
        if streamer is not None:
            streamer.put(tokens.cpu())
        if not only_length:
            unfinished = unfinished & ~stopping_criteria(sequences[:, :length], tuple(all_scores) or None)
            ended = finished.at(length, unfinished)
        if length >= most:
            break
        if ended is None:
            logits = step(tokens)
    last = ended or finished.finally_at() or length
    new = last - input_ids.shape[1]
    if streamer is not None:
        streamer.end()
    return sequences[:, :last], tuple(all_scores[:new]), tuple(all_logits[:new])

# SPDX-License-Identifier: Apache-2.0
"""How much of its tokens and of its lower layers a model's states still tell: ETMF and ECLMF of arXiv 2510.03279, section 2,
and forms of both that correct what these measure besides.

    remamba eval fidelity --model MODEL --books BOOKS --output fidelity.json --lengths 512 2048 8192 --plots DIR

ETMF as the paper defines it compares what a state predicts with the token that the state has just read, so that a model
that copies its input scores best. Here its distance variants compare with the token so many positions back, and the
corrected form subtracts what any two positions would score.

ECLMF as the paper defines it fits and tests on the same positions and divides by the norm of the lower layer, so that
independent noise scores almost 1 once there are as few positions as features, and a layer of larger scale scores better.
The corrected form is the R^2 of positions that the fit has not seen.

Any causal language model can be measured that hands out one hidden state a layer, of the width of its embeddings. Passages
are read whole. BOOKS is a folder of .txt books, or a dataset such as deepmind/pg19. The output file is written after every
model, and a run that was cut off goes on behind the last length that was measured. Several GPUs: accelerate launch
--multi_gpu -m remamba_hf.cli eval fidelity ..., whose processes take models and lengths by turns.

Shapes: `B` rows, `L` positions, `V` vocabulary, `D` hidden size, `N` positions of all rows.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from remamba_hf.command_options import positive

from .books import add_book_options, joined, open_books
from .checkpoints import (
    add_model_options,
    check_positions,
    check_tokenizer,
    describe_checkpoint,
    environment,
    label_of,
    load_model,
    open_checkpoint,
    open_tokenizer,
    plain_reading,
)
from .reporting import (
    new_panels,
    save_figure,
    set_length_ticks,
    short_length,
    start_or_continue,
    table_head,
    table_row,
    write_results,
)
from .shared_cells import Cell, check_outputs, launched, measure_cells

DISTANCES = (0, 8, 16, 32)
GAPS = (2, 5, 10)
PENALTY = 1e-4
_COLOURS = 10  # of lines in a picture, until they repeat


class Form(NamedTuple):
    """One of the measures. key, form: of the results; title: for people; place: what it has a number for each of."""

    key: str
    form: str
    title: str
    place: str


FORMS = (
    Form("etmf", "paper", "ETMF, paper", "distance"),
    Form("etmf", "corrected", "ETMF, corrected", "distance"),
    Form("eclmf", "paper", "ECLMF, paper", "gap"),
    Form("eclmf", "held_out_r2", "ECLMF, held-out R^2", "gap"),
)


def expected_embeddings(logits: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """sum_v softmax(logits)(v) E[v]: the mean embedding of what each position predicts.

    Args:
        logits: [B, L, V], any floating dtype; computed in its own, at least float32.
        embeddings: [V, D], the input embeddings E.

    Returns:
        [B, L, D].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).softmax(-1) @ embeddings.to(dtype)


def token_fidelity(
    expected: torch.Tensor, input_ids: torch.Tensor, embeddings: torch.Tensor, distance: int = 0
) -> torch.Tensor:
    """ETMF (arXiv 2510.03279, section 2): the mean over j of cos(E[x_(j - distance)], expected_j).

    Args:
        expected: [B, L, D], of `expected_embeddings`.
        input_ids: [B, L] long.
        embeddings: [V, D].
        distance: 0 is the definition; the paper's variants have 8, 16 and 32, which it does not spell out: here the token
            that many positions back.

    Returns:
        Scalar in [-1, 1].

    Raises:
        ValueError: no position has a token that far back.
    """
    length = input_ids.shape[1]
    if not 0 <= distance < length:
        raise ValueError(f"distance is {distance}, but there are {length} positions: give 0 to {length - 1}")
    tokens = embeddings[input_ids[:, : length - distance]].to(expected.dtype)
    return torch.cosine_similarity(tokens, expected[:, distance:], dim=-1).mean()


def chance_fidelity(expected: torch.Tensor, input_ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """What `token_fidelity` would be of tokens that have nothing to do with the positions: the mean cosine over all pairs of
    a token and a position of the same row. Embeddings that share a direction score well above 0.

    Arguments and result as for `token_fidelity`.
    """
    tokens = torch.nn.functional.normalize(embeddings[input_ids].to(expected.dtype), dim=-1)
    directions = torch.nn.functional.normalize(expected, dim=-1)
    return (tokens.mean(1) * directions.mean(1)).sum(-1).mean()


def corrected_token_fidelity(
    expected: torch.Tensor, input_ids: torch.Tensor, embeddings: torch.Tensor, distance: int
) -> torch.Tensor:
    """`token_fidelity` of the token `distance` positions back, less `chance_fidelity`: 0 if states tell nothing of it."""
    return token_fidelity(expected, input_ids, embeddings, distance) - chance_fidelity(expected, input_ids, embeddings)


def ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """W [D, D'] that minimises ||y - x W||^2 + penalty ||W||^2, of x [N, D] and y [N, D'] in float64."""
    x, y = x.double(), y.double()
    gram = x.T @ x
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, x.T @ y)


def layer_fidelity(x: torch.Tensor, y: torch.Tensor, penalty: float = PENALTY) -> float:
    """ECLMF_(l -> l+G) (arXiv 2510.03279, section 2): 1 - ||Y - X W||_F / (||X||_F + 1e-6), W by `ridge` on all of X and Y.

    Args:
        x, y: [N, D], the outputs of layers l and l + G.
        penalty: the paper's lambda.
    """
    x, y = x.double(), y.double()
    residual = y - x @ ridge(x, y, penalty)
    return 1 - (residual.norm() / (x.norm() + 1e-6)).item()


def held_out_fidelity(x: torch.Tensor, y: torch.Tensor, fitted: torch.Tensor, penalty: float = PENALTY) -> float:
    """R^2 of a ridge from x to y on positions that it was not fitted on: 1 if these are a linear function of x, 0 if x
    helps no more than the mean of y, below 0 if it misleads. The same for x and y of any scale.

    Args:
        x, y: [N, D], the outputs of layers l and l + G.
        fitted: [N] bool, the positions to fit on.
        penalty: in units of the mean square of x over the fitted positions.

    Raises:
        ValueError: nothing to fit on, or nothing to test on.
    """
    if bool(fitted.all()) or not bool(fitted.any()):
        raise ValueError("held-out fidelity needs positions to fit on and others to test on")
    x, y = x.double(), y.double()
    x_mean, y_mean = x[fitted].mean(0), y[fitted].mean(0)
    inputs = x[fitted] - x_mean
    weights = ridge(inputs, y[fitted] - y_mean, penalty * inputs.square().sum().item() / inputs.shape[1])
    wanted = y[~fitted] - y_mean
    residual = wanted - (x[~fitted] - x_mean) @ weights
    return 1 - (residual.square().sum() / wanted.square().sum()).item()


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    passages: torch.Tensor,
    distances: Sequence[int] = DISTANCES,
    gaps: Sequence[int] = GAPS,
) -> dict[str, Any]:
    """All metrics of a model on passages [P, L] of token ids.

    Layers are numbered from 1, and layer l's output is what goes into layer l + 1, before the final norm. The corrected
    ECLMF fits on the first half of every passage and tests on the second.

    Returns:
        `etmf`, by distance (a string, for JSON): `paper` and `corrected`, each with the standard error over passages;
        `chance`. `eclmf`, by gap: `paper` and `held_out_r2`, by first layer, with their means; None for gaps that the model
        has too few layers for.

    Raises:
        ValueError: passages of less than two tokens; a model without the states that are compared.
    """
    if passages.shape[1] < 2:
        raise ValueError("passages need at least two tokens: half of them are fitted on")
    embeddings = model.get_input_embeddings().weight
    _check_states(model, passages[:1, :2].to(model.device))
    forms = {"paper": token_fidelity, "corrected": corrected_token_fidelity}
    etmf: dict[str, dict[str, list[float]]] = {str(distance): {form: [] for form in forms} for distance in distances}
    chance: list[float] = []
    layers: list[list[torch.Tensor]] = []
    for passage in tqdm(passages, desc="passages", leave=False):
        ids = passage[None].to(model.device)
        output = model(ids, output_hidden_states=True, use_cache=False, **plain_reading(model))
        expected = expected_embeddings(output.logits, embeddings)
        chance.append(chance_fidelity(expected, ids, embeddings).item())
        for distance in distances:
            for form, function in forms.items():
                etmf[str(distance)][form].append(function(expected, ids, embeddings, distance).item())
        layers.append([state[0].float().cpu() for state in output.hidden_states[:-1]])  # the last is the final norm's
    states = [torch.cat(parts) for parts in zip(*layers, strict=True)]
    fitted = (torch.arange(passages.shape[1]) < passages.shape[1] // 2).repeat(len(passages))
    return {
        "etmf": {
            distance: {form: _mean_and_error(values) for form, values in by_form.items()}
            for distance, by_form in etmf.items()
        },
        "chance": _mean_and_error(chance),
        "eclmf": {str(gap): _across_layers(states, fitted, gap, model.device) for gap in gaps},
    }


@torch.no_grad()
def _check_states(model: PreTrainedModel, ids: torch.Tensor) -> None:
    output = model(ids, output_hidden_states=True, use_cache=False, **plain_reading(model))
    states, embeddings = getattr(output, "hidden_states", None) or (), model.get_input_embeddings().weight
    layers = model.config.get_text_config().num_hidden_layers
    shape = (*ids.shape, embeddings.shape[1])
    if len(states) != layers + 1 or any(state.shape != shape for state in states):
        raise ValueError(
            f"{type(model).__name__} hands out {len(states)} hidden states for its {layers} layers and the final norm: ETMF "
            f"and ECLMF need {layers + 1} of the embeddings' width ({embeddings.shape[1]})"
        )
    if output.logits.shape[-1] != embeddings.shape[0]:
        raise ValueError(
            f"{type(model).__name__} has {embeddings.shape[0]} embeddings and logits of {output.logits.shape[-1]} tokens: "
            "ETMF needs one embedding a token"
        )


def _mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def _across_layers(
    states: Sequence[torch.Tensor], fitted: torch.Tensor, gap: int, device: torch.device
) -> dict[str, Any] | None:
    """Both forms of ECLMF from every layer to the one `gap` above it."""
    paper, held_out = [], []
    for below, above in zip(states, states[gap:], strict=False):
        x, y = below.to(device), above.to(device)
        paper.append(layer_fidelity(x, y))
        held_out.append(held_out_fidelity(x, y, fitted.to(device)))
    if not paper:
        return None
    return {
        "paper": {"mean": statistics.fmean(paper), "layers": paper},
        "held_out_r2": {"mean": statistics.fmean(held_out), "layers": held_out},
    }


def spread_passages(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """`count` passages [count, length] long, evenly over the tokens.

    Raises:
        ValueError: fewer tokens than a passage has.
    """
    if length > len(tokens):
        raise ValueError(
            f"the books have {len(tokens)} tokens, fewer than the {length} of a passage: give shorter --lengths"
        )
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return torch.from_numpy(np.stack([np.asarray(tokens[start : start + length], dtype=np.int64) for start in starts]))


def measures_by_length(results: Mapping[str, Any], name: str) -> dict[int, dict[str, Any]]:
    """What `measure` gave of a model, by the passages' length, ascending.

    A file's `models` have that of the longest passages, whose length is its setting `length`, in plain sight. Where there
    are several, the setting `lengths` has all, and `shorter` of a model what was measured of the others.
    """
    model = results["models"][name]
    return {
        **{int(length): found for length, found in model.get("shorter", {}).items()},
        results["settings"]["length"]: model,
    }


def model_labels(results: Mapping[str, Any]) -> dict[str, str]:
    """The models for people, by name; those of one kind with their names."""
    labels = {name: str(one.get("label") or label_of(one["model_type"])) for name, one in results["models"].items()}
    counts = Counter(labels.values())
    return {name: f"{label}, {name}" if counts[label] > 1 else label for name, label in labels.items()}


def lines(results: Mapping[str, Any], form: Form) -> Iterator[tuple[str, str, dict[int, float]]]:
    """The numbers of a measure by length, for every model (named first) and every distance or gap that it has."""
    for name in results["models"]:
        found = measures_by_length(results, name)
        for place in next(iter(found.values()))[form.key]:
            values = {length: one[form.key][place] for length, one in found.items()}
            numbers = {length: float(value[form.form]["mean"]) for length, value in values.items() if value is not None}
            if numbers:
                yield name, place, numbers


def markdown_tables(results: dict[str, Any]) -> str:
    """The results as two Markdown tables, with a row for every length."""
    heads = {"etmf": "ETMF, by distance", "eclmf": "ECLMF, mean over layers, by gap"}
    places = {"etmf": results["settings"]["distances"], "eclmf": results["settings"]["gaps"]}
    several = len(results["settings"].get("lengths", ())) > 1
    tables = []
    for key, head in heads.items():
        text = table_head(head, [str(place) for place in places[key]])
        for name in results["models"]:
            for form in (form for form in FORMS if form.key == key):
                for length, found in measures_by_length(results, name).items():
                    values = [found[key][str(place)] for place in places[key]]
                    shown = ["" if value is None else f"{value[form.form]['mean']:.3f}" for value in values]
                    label = f"{name}, {form.title.removeprefix(key.upper()).removeprefix(', ')}"
                    text += table_row(f"{label}, {short_length(length)}" if several else label, shown)
        tables.append(text)
    return "\n".join(tables)


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Every measure by length, a line for every model and every distance or gap."""
    draw_panels(
        {
            form: [(f"{name}, {form.place} {place}", values) for name, place, values in lines(results, form)]
            for form in FORMS
        },
        path,
    )


def draw_panels(found: Mapping[Form, Sequence[tuple[str, dict[int, float]]]], path: Path) -> None:
    """A panel for every measure, and a line for each of its labels.

    Args:
        found: labels and numbers by length.
    """
    figure, panels = new_panels(len(found), columns=2)
    lengths = sorted({length for lines in found.values() for _, numbers in lines for length in numbers})
    for (form, labelled), axes in zip(found.items(), panels, strict=True):
        for number, (label, numbers) in enumerate(labelled):
            style = ("-", "--", ":", "-.")[number // _COLOURS % 4]
            axes.plot(list(numbers), list(numbers.values()), style, marker="o", label=label)
        axes.set(xlabel="passage, tokens", ylabel=form.title)
        set_length_ticks(axes, lengths)
        if labelled:
            axes.legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, path)


def parse_arguments(arguments: Sequence[str] | None = None, program: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of any causal language model")
    parser.add_argument("--plain-model", help="folder or Hub id of another model of the same tokenizer, to compare with")
    add_book_options(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the results; FILE.pieces beside it until they are whole"
    )
    parser.add_argument("--plots", type=Path, help="folder for the plot by length, fidelity.png")
    parser.add_argument("--passages", type=positive, default=8, help="passages of every length, evenly over the books")
    parser.add_argument("--lengths", "--length", type=positive, nargs="+", default=[2048], help="tokens of a passage")
    parser.add_argument("--distances", type=int, nargs="+", default=list(DISTANCES), help="of ETMF, tokens")
    parser.add_argument("--gaps", type=int, nargs="+", default=list(GAPS), help="of ECLMF, layers")
    add_model_options(parser)
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """As results have them.

    Raises:
        ValueError: distances that no passage has, or gaps that no model has.
    """
    lengths = sorted(set(options.lengths))
    if min(options.gaps) < 1 or min(options.distances) < 0 or max(options.distances) >= lengths[0]:
        raise ValueError("gaps are at least 1, and distances at least 0 and less than the length of a passage")
    settings = {"passages": options.passages, "length": lengths[-1], "distances": options.distances, "gaps": options.gaps}
    return {**settings, "lengths": lengths} if len(lengths) > 1 else settings  # files of one length go on as they are


def model_cell(name: str, model: PreTrainedModel, model_type: str, tokens: np.ndarray, results: dict[str, Any]) -> Cell:
    """How a model is measured: a length at a time."""
    settings = results["settings"]
    lengths = settings.get("lengths", [settings["length"]])
    kind = {
        **describe_checkpoint(model_type, model),
        "layers": model.config.get_text_config().num_hidden_layers,
    }

    def measured(numbers: range) -> list[dict[str, Any]]:
        passages = (spread_passages(tokens, settings["passages"], lengths[number]) for number in numbers)
        return [measure(model, one, settings["distances"], settings["gaps"]) for one in passages]

    def enter(found: list[dict[str, Any]]) -> None:
        shorter = {str(length): one for length, one in zip(lengths[:-1], found[:-1], strict=True)}
        results["models"][name] = {**kind, **found[-1], **({"shorter": shorter} if shorter else {})}

    about = {"settings": settings, "description": results["description"], "model": kind}
    return Cell((name,), len(lengths), 1, measured, enter, about)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    options = parse_arguments(arguments, program)
    settings = settings_of(options)
    check_outputs(options.output, options.plots)
    given = {"model": options.model, "plain": options.plain_model}
    checkpoints = {name: open_checkpoint(model, options) for name, model in given.items() if model}
    for checkpoint in checkpoints.values():
        check_positions(checkpoint, settings["length"], "--lengths")
    tokenizer = open_tokenizer(checkpoints["model"], options)
    for checkpoint in checkpoints.values():
        check_tokenizer(checkpoint, tokenizer)
    with launched(options) as (processes, device):
        books = open_books(options, tokenizer)
        tokens = joined(books.ids, int(tokenizer.eos_token_id))
        spread_passages(tokens, 1, settings["length"])
        header = {"settings": settings, "description": {**books.description(), "tokens": len(tokens)}}
        results = start_or_continue(options.output, header, {"environment": environment(device), "models": {}})
        models = {name: load_model(checkpoint, device, options.dtype) for name, checkpoint in checkpoints.items()}
        cells = [
            model_cell(name, model, checkpoints[name].config.model_type, tokens, results) for name, model in models.items()
        ]
        left = [cell for cell in cells if not _is_there(cell, results, options.output)]
        measure_cells(left, options.output, lambda: write_results(options.output, results), processes)
    if processes.rank > 0:
        return
    print(markdown_tables(results))
    if options.plots:
        draw_plot(results, options.plots / "fidelity.png")


def _is_there(cell: Cell, results: dict[str, Any], output: Path) -> bool:
    """Raises a ValueError if a model of its name is, and is another."""
    (name,), kind = cell.key, cell.about["model"]
    before = results["models"].get(name)
    if before is not None and {key: before.get(key) for key in kind} != kind:
        raise ValueError(f"{output} holds results of another {name}: name another output, or remove it")
    return before is not None


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Reading one long document and answering a question about it, with what it cost and what was kept or noted of it.

`remamba generate` and the book example are made of this.
"""

import contextlib
import functools
import importlib.util
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .checkpoint_files import CheckpointError, check_safetensors, first_line, has_tokenizer, locate, read_json
from .families import ALL_FAMILIES, PLAIN_FAMILIES, Family
from .modeling.selective_compression import Window

_CONTEXT_TOKENS = 12  # shown around a kept passage
_PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
_PASSAGE_GAP = 3  # kept positions this close are one passage


@dataclass
class Passage:
    """Kept or read positions that stand together. start, stop: token positions; score: the best of them; text: in
    [brackets], with what stands around it."""

    start: int
    stop: int
    score: float
    text: str


@dataclass
class LayerNotes:
    """What one layer's pool held when the prompt's last token read it.

    positions: in the prompt, of the tokens that wrote the notes; the best note first.
    scores: their write scores, in (0, 1].
    reads: their shares of the token's attention; what is missing to 1 went to no note.
    """

    positions: list[int]
    scores: list[float]
    reads: list[float]


@dataclass
class Reading:
    """One document read and answered.

    answer: the generated text.
    prompt_tokens: tokens of document and question.
    window: the compressed window in tokens; its length is 0 where nothing was compressed.
    positions, scores: the kept positions in the prompt, ascending, and their cosine scores.
    passages: as text the kept positions, best score first; or the positions of notes, by the largest share of attention
        that a layer gave them.
    notes: of a model that takes them, one entry a layer.
    new_tokens: tokens generated.
    prefill_seconds, decode_seconds: until the first token was known, and from there to the end.
    state_bytes: size of the recurrent state that decoding works with, whatever the document's length.
    device, dtype: where and in what the model computed.
    """

    answer: str
    prompt_tokens: int
    window: Window
    positions: list[int]
    scores: list[float]
    passages: list[Passage] = field(repr=False)
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    state_bytes: int
    device: str
    dtype: str
    notes: list[LayerNotes] = field(default_factory=list, repr=False)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, both passes counted as one."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None if there was only one."""
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9) if self.new_tokens > 1 else None

    @property
    def marked(self) -> tuple[list[int], list[float]]:
        """The kept positions, ascending, and their scores; or those with notes, and the largest share of attention that a
        layer gave each."""
        return _most_read(self.notes) if self.notes else (self.positions, self.scores)

    def report(self) -> str:
        """A few lines for a person."""
        decode = "one token" if self.decode_rate is None else f"{self.decode_rate:,.1f} tokens/s"
        return "\n".join(
            (
                f"prompt   {self.prompt_tokens:,} tokens",
                self._notes_line() if self.notes else self._kept_line(),
                f"prefill  {self.prefill_rate:,.0f} tokens/s ({self.prefill_seconds:.1f} s)",
                f"decode   {decode} ({self.new_tokens} new)",
                f"state    {self.state_bytes / 1e6:.2f} MB",
                f"device   {self.device}, {self.dtype}",
            )
        )

    def _kept_line(self) -> str:
        kept, window = len(self.positions), self.window
        if not window.length:
            return "kept     not compressed"
        read = self.prompt_tokens - window.dropped
        return f"kept     {kept:,} of the {window.length:,} in the window at {window.start:,}; {read:,} read again"

    def _notes_line(self) -> str:
        noted = {position for layer in self.notes for position in layer.positions}
        count = sum(len(layer.positions) for layer in self.notes)
        best = f"; most read: {self.passages[0].score:.2f} of a layer's attention" if noted else ""
        return f"notes    {count:,} in {len(self.notes)} layers, of {len(noted):,} tokens{best}"


def question_prompt(document: str, question: str) -> str:
    """The prompt that the recall checkpoints are trained on: the document, a blank line, the question, `Answer:`."""
    return f"{document.rstrip()}\n\nQuestion: {question.strip()}\nAnswer:"


def family_of(checkpoint: str, revision: str | None = None) -> Family:
    """The family of a checkpoint, by its config.json.

    Args:
        checkpoint: local folder or Hub id.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        CheckpointError: no such checkpoint, or another kind of model.
    """
    model_type = read_json(locate(checkpoint, revision) / "config.json").get("model_type")
    if model_type in ALL_FAMILIES:
        return ALL_FAMILIES[model_type]
    names = " or ".join(family.name for family in ALL_FAMILIES.values())
    plain = model_type is None or model_type in PLAIN_FAMILIES
    fix = f"Convert it first: remamba convert {checkpoint} OUTPUT." if plain else f"Give a {names} checkpoint."
    raise CheckpointError(f"{checkpoint} is no checkpoint of {names}: its model_type is {model_type!r}. {fix}")


def load_for_reading(
    checkpoint: str, revision: str | None = None, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a checkpoint of any family, ready for inference, and its tokenizer.

    Args:
        checkpoint: local folder or Hub id.
        revision: branch, tag or commit of a Hub repository.
        device: default: CUDA where there is a device, else the CPU.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: the checkpoint's, but float32 on the CPU, where
            half precision is slow.

    Raises:
        CheckpointError: no such checkpoint, another kind of model, missing or damaged weights, no tokenizer, no such
            device.
    """
    device = checked_device(device)
    folder = locate(checkpoint, revision)
    model_class = family_of(checkpoint, revision).model_class
    check_safetensors(folder)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{checkpoint} has no tokenizer (tokenizer.json). Save the one that it was trained with into its folder: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    asked = "float32" if dtype == "auto" and device == "cpu" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise CheckpointError(
            f"The tokenizer of {checkpoint} cannot be loaded: {first_line(error)}. Get its files again."
        ) from error
    try:
        model, info = model_class.from_pretrained(folder, dtype=asked, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {first_line(error)}. Get its files again.") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint} lacks {len(info['missing_keys'])} of the model's tensors, e.g. {min(info['missing_keys'])}. "
            "Get its files again."
        )
    return model.to(device).eval(), tokenizer


def read_and_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str | None = None,
    *,
    max_new_tokens: int = 64,
    prefill_progress: Callable[[int, int], Any] | None = None,
    **generate_options: Any,
) -> Reading:
    """Reads a document, generates, and tells what was kept and what it cost.

    Args:
        model: of any family (`ReMambaForCausalLM`, `ReMamba2ForCausalLM`, `MemMambaForCausalLM`).
        tokenizer: its tokenizer.
        document: any text.
        question: put behind the document as in `question_prompt`; None: the document is continued.
        max_new_tokens: the answer ends here at the latest.
        prefill_progress: called with the tokens read and to read.
        **generate_options: of `generate`: `prefill_chunk_length`, sampling, `streamer`, settings of the compression where
            the model compresses prompts, and so on.

    Raises:
        ValueError: an empty document, or options that `generate` refuses.
    """
    prompt = document if question is None else question_prompt(document, question)
    if not document.strip():
        raise ValueError("The document is empty. Give at least a word.")
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    with watch_prefill(model) as prefill:
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # a document may spell out the pad token; it is read all the same
            max_new_tokens=max_new_tokens,
            prefill_progress=prefill_progress,
            **generate_options,
        )
        ended = time.perf_counter()
    positions, scores = prefill.kept(0)
    notes = prefill.notes(0)
    sequence = output if isinstance(output, torch.Tensor) else output.sequences
    new_ids = sequence[0, ids.shape[1] :]
    prompt_ids = ids[0].tolist()
    return Reading(
        answer=tokenizer.decode(new_ids, skip_special_tokens=True).strip(),
        prompt_tokens=len(prompt_ids),
        window=_window(model, len(prompt_ids), positions, generate_options),
        positions=positions,
        scores=scores,
        passages=_passages(prompt_ids, *(_most_read(notes) if notes else (positions, scores)), tokenizer),
        new_tokens=len(new_ids),
        prefill_seconds=prefill.ended - started,
        decode_seconds=ended - prefill.ended,
        state_bytes=prefill.state_bytes,
        device=_device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        notes=notes,
    )


@contextlib.contextmanager
def prefill_bar(description: str = "reading") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a callback for `prefill_progress`."""
    with tqdm(desc=description, unit=" tokens", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:
                bar.close()  # before the answer is streamed

        yield show


def check_picture(path: Path) -> None:
    """Raises a ValueError, before any work, unless a picture can be written to this file."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.absolute().parent} to save the picture in. Make it first.")
    if path.suffix not in _PICTURE_SUFFIXES:
        raise ValueError(f"{path.name} should end in one of {', '.join(_PICTURE_SUFFIXES)}: the picture's format.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('The picture needs matplotlib: pip install "remamba_hf[eval]".')


def plot_kept(reading: Reading, path: str | Path, passages: int = 8) -> None:
    """A picture of what was kept of a prompt: the scores along it, and the best passages as text.

    Args:
        reading: of a compressed prompt.
        path: the file to write; its suffix is the format (png, pdf, svg).
        passages: how many are shown as text.

    Raises:
        ValueError: nothing was compressed, or what `check_picture` refuses.
        OSError: the file cannot be written.
    """
    if not reading.positions:
        raise ValueError("Nothing was compressed in this reading, so there is nothing to draw.")
    path = Path(path)
    check_picture(path)
    from matplotlib.figure import Figure

    shown = reading.passages[:passages]
    figure = Figure(figsize=(10, 3.2 + 0.22 * len(shown)), layout="constrained")
    scores, texts = figure.subplots(2, 1, height_ratios=[3, 0.22 * len(shown) + 0.1])
    window = reading.window
    scores.axvspan(window.start, window.stop, color="0.93", label=f"window: {window.length:,} tokens")
    scores.vlines(reading.positions, min(0.0, *reading.scores), reading.scores, color="tab:blue", linewidth=0.8)
    scores.plot(reading.positions, reading.scores, ".", color="tab:blue", label=f"kept: {len(reading.positions):,}")
    scores.set(xlim=(0, reading.prompt_tokens), xlabel="position in the prompt (tokens)", ylabel="score (cosine)")
    scores.legend(loc="upper left", ncols=2, frameon=False, bbox_to_anchor=(0, 1.18))
    draw_passages(texts, "position, score, [kept]", shown)
    save_picture(figure, path)


def draw_passages(axes: Any, title: str, passages: Sequence[Passage]) -> None:
    """Passages as lines of text: position, score and text."""
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=9)
    for line, passage in enumerate(passages):
        text = textwrap.shorten(passage.text, 125, placeholder=" ...")
        line_text = f"{passage.start:>9,}  {passage.score:5.2f}  {text}"
        axes.text(0, 1 - (line + 0.5) / len(passages), line_text, family="monospace", fontsize=7, parse_math=False)


def save_picture(figure: Any, path: Path) -> None:
    """Write the picture, or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=150)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class PrefillWatch:
    """What the first forward of a `generate` call kept or noted, its state, and when it ended (`time.perf_counter`).

    positions, scores: [B, K] on the CPU as in the model's output, or None where nothing was compressed.
    layer_notes: of a model that takes notes, (positions, scores, reads) of every layer, [B, K] on the CPU as in its output.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        self.state_bytes = 0
        self.positions: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.layer_notes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def take(self, output: Any) -> None:
        """What the first forward returned."""
        if output.logits.is_cuda:
            torch.cuda.synchronize(output.logits.device)
        self.ended = time.perf_counter()
        self.state_bytes = _state_bytes(output.cache_params)
        if getattr(output, "compressed_positions", None) is not None:
            self.positions, self.scores = output.compressed_positions.cpu(), output.compression_scores.cpu()
        if getattr(output, "note_positions", None) is not None:
            layers = zip(output.note_positions, output.note_scores, output.note_reads, strict=True)
            self.layer_notes = [(positions.cpu(), scores.cpu(), reads.cpu()) for positions, scores, reads in layers]

    def kept(self, row: int) -> tuple[list[int], list[float]]:
        """Positions and scores of one row."""
        if self.positions is None or self.scores is None:
            return [], []
        present = self.positions[row] >= 0
        return self.positions[row][present].tolist(), self.scores[row][present].tolist()

    def notes(self, row: int) -> list[LayerNotes]:
        """What one row's last token could read, layer by layer."""
        layers = []
        for parts in self.layer_notes:
            positions, scores, reads = (part[row] for part in parts)
            present = positions >= 0
            layers.append(LayerNotes(*(part[present].tolist() for part in (positions, scores, reads))))
        return layers


@contextlib.contextmanager
def watch_prefill(model: PreTrainedModel) -> Iterator[PrefillWatch]:
    """Watches one `generate` call. It does not hand out what was kept or noted, and this leaves every option of it as it
    is."""
    watch = PrefillWatch()
    family = ALL_FAMILIES.get(model.config.model_type)
    asked = {} if family is None or family.compresses else {"output_notes": True}
    forward, replaced = model.forward, "forward" in vars(model)

    # In place of the method, not as a hook: of what hooks might do in a decoding step a captured one would do nothing, so
    # that `generate` decodes without graphs where there are some.
    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if watch.ended:
            return forward(*args, **kwargs)
        output = forward(*args, **{**kwargs, **asked})
        watch.take(output)
        return output

    vars(model)["forward"] = watched
    try:
        yield watch
    finally:
        if replaced:
            vars(model)["forward"] = forward
        else:
            del vars(model)["forward"]


def _window(model: Any, length: int, positions: list[int], options: dict[str, Any]) -> Window:
    if not positions:
        return Window(0, 0, 0)
    settings = (options.get(f"compression_{name}") for name in ("start", "span", "ratio"))
    return model.backbone.plan_windows([length], [length], *settings)[0]


def _passages(
    prompt_ids: list[int], positions: list[int], scores: list[float], tokenizer: PreTrainedTokenizerBase
) -> list[Passage]:
    """Kept positions that are close together, with some context, best score first."""
    passages: list[Passage] = []
    for position, score in zip(positions, scores, strict=True):
        if passages and position - passages[-1].stop < _PASSAGE_GAP:
            passages[-1].stop = position + 1
            passages[-1].score = max(passages[-1].score, score)
        else:
            passages.append(Passage(position, position + 1, score, ""))
    for passage in passages:
        before, kept, after = (
            tokenizer.decode(prompt_ids[begin:end])
            for begin, end in (
                (max(passage.start - _CONTEXT_TOKENS, 0), passage.start),
                (passage.start, passage.stop),
                (passage.stop, passage.stop + _CONTEXT_TOKENS),
            )
        )
        passage.text = f"{before}[{kept}]{after}"
    return sorted(passages, key=lambda passage: -passage.score)


def _most_read(layers: Sequence[LayerNotes]) -> tuple[list[int], list[float]]:
    """Positions with notes, ascending, and the largest share of attention that a layer gave each."""
    largest: dict[int, float] = {}
    for layer in layers:
        for position, read in zip(layer.positions, layer.reads, strict=True):
            largest[position] = max(read, largest.get(position, 0.0))
    positions = sorted(largest)
    return positions, [largest[position] for position in positions]


def _state_bytes(cache: Cache | None) -> int:
    if cache is None:
        return 0
    states = [s for layer in cache.layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return sum(state.nbytes for state in states)


def checked_device(device: str | None) -> str:
    """The device, or CUDA where there is one for None; raises a CheckpointError for one that is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CheckpointError(f"There is no device {device!r}: {first_line(error)}. Use cpu or cuda.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("This PyTorch sees no CUDA device. Use --device cpu; `remamba doctor` tells what is there.")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

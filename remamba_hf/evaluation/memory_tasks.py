# SPDX-License-Identifier: Apache-2.0
"""What `remamba_hf.evaluation.memory` measures: answers about long texts, losses by length of context, cost of decoding.

All texts are read once, in chunks that bound memory, and every question is put to a copy of the state behind its text.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from remamba_hf.training.recall_data import RecallText

from .checkpoints import plain_reading
from .reporting import wilson_interval


def rows_at_once(length: int, chunk_length: int, batch_tokens: int) -> int:
    """Rows of `length` tokens whose chunks hold at most `batch_tokens`; at least one."""
    return max(batch_tokens // min(length, chunk_length), 1)


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[RecallText], chunk_length: int
) -> list[list[str]]:
    """Answers every question about texts, greedily; the state behind a text is copied for each of its questions.

    Args:
        model: of any family; one that compresses prompts reads them plainly.
        texts: of equally many questions.
        chunk_length: tokens of a row that are read at once.

    Returns:
        The answers up to the end-of-text token, without white space around them, by text and question.
    """
    shared = min(len(text.text_ids) for text in texts)
    questions = [
        np.concatenate([text.text_ids[shared:], fact.question_ids]) for text in texts for fact in text.asked
    ]  # what is left of longer texts is read with their questions, so that only these need pads
    options = {**plain_reading(model), "use_cache": True, "logits_to_keep": 1}
    ids = torch.from_numpy(np.stack([text.text_ids[:shared] for text in texts])).to(model.device)
    cache = model(ids, prefill_chunk_length=chunk_length, **options).cache_params
    copies = torch.arange(len(texts), device=model.device).repeat_interleave(len(texts[0].asked))
    cache.reorder_cache(copies)
    ids, mask = _left_padded(questions, int(tokenizer.pad_token_id), model.device)
    logits = model(ids, attention_mask=mask, cache_params=cache, prefill_chunk_length=chunk_length, **options).logits
    answer = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(len(texts[0].asked[0].answer_ids) - 1):
        logits = model(answer[-1], cache_params=cache, **options).logits
        answer.append(logits[:, -1].argmax(-1, keepdim=True))
    answers = [_decoded(tokenizer, row) for row in torch.cat(answer, dim=1).tolist()]
    keys = len(texts[0].asked)
    return [answers[first : first + keys] for first in range(0, len(answers), keys)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    return str(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)).strip()


def _left_padded(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as `[rows, longest]` on `device`, and their mask: their last tokens stand in the last column."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def recall_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_text: Callable[[int], RecallText],
    samples: int,
    rows: int,
    chunk_length: int,
) -> list[dict[str, Any]]:
    """Makes and asks texts 0 to `samples` - 1, `rows` at once.

    Returns:
        One record per question: `sample`, `depth` (0 to 1), `right`, `number`, `answer`, and `other`: the answer is the
        number of somebody else in the text.
    """
    records: list[dict[str, Any]] = []
    with tqdm(total=samples, desc="texts", leave=False) as progress:
        for first in range(0, samples, rows):
            numbers = range(first, min(first + rows, samples))
            texts = [make_text(number) for number in numbers]
            for number, text, answers in zip(numbers, texts, ask(model, tokenizer, texts, chunk_length), strict=True):
                records += _records(number, text, answers)
            progress.update(len(texts))
    return records


def _records(sample: int, text: RecallText, answers: Sequence[str]) -> list[dict[str, Any]]:
    numbers = {*text.other_numbers, *(fact.number for fact in text.asked)}
    return [
        {
            "sample": sample,
            "depth": round(fact.depth, 4),
            "right": answer == fact.number,
            "number": fact.number,
            "answer": answer,
            "other": answer in numbers - {fact.number},
        }
        for fact, answer in zip(text.asked, answers, strict=True)
    ]


def summarize_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, accuracy with its 95 % interval, and how many answers were somebody else's number.

    The interval takes questions as independent, which several about one text are not quite.
    """
    right = sum(record["right"] for record in records)
    return {
        "samples": len(records),
        "right": right,
        "accuracy": right / len(records),
        "interval": wilson_interval(right, len(records)),
        "other": sum(record["other"] for record in records),
    }


def window_ends(book_length: int, longest: int, windows: int) -> list[int]:
    """Where windows of at most `longest` tokens end in a book: in the middles of equal parts of the places possible, so that
    none is the book's very end, which is often no text."""
    return [int(longest + (book_length - longest) * (number + 0.5) / windows) for number in range(windows)]


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    books: Sequence[np.ndarray],
    ends: Sequence[Sequence[int]],
    length: int,
    counted: int,
    rows: int,
    chunk_length: int,
) -> list[list[float]]:
    """Mean cross-entropy of the last `counted` tokens of windows of `length` tokens (arXiv 2510.03279, section 4).

    Args:
        books: token ids of each.
        ends: where the windows of each end.
        rows, chunk_length: what is read at once.

    Returns:
        Nats per token, by book and window.
    """
    windows = [(book, end) for number, book in enumerate(books) for end in ends[number]]
    losses: list[float] = []
    for first in tqdm(range(0, len(windows), rows), desc="windows", leave=False):
        pieces = [np.asarray(book[end - length : end], dtype=np.int64) for book, end in windows[first : first + rows]]
        ids = torch.from_numpy(np.stack(pieces)).to(model.device)
        logits = model(
            ids,
            logits_to_keep=counted + 1,
            use_cache=False,
            prefill_chunk_length=chunk_length,
            **plain_reading(model),
        ).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, -counted:], reduction="none")
        losses += loss.mean(1).tolist()
    taken = iter(losses)
    return [[next(taken) for _ in book_ends] for book_ends in ends]


def summarize_losses(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Perplexity over all windows (None where it is not finite) and the mean loss of every book."""
    every = [loss for book in losses for loss in book]
    mean = sum(every) / len(every)
    return {
        "windows": len(every),
        "perplexity": math.exp(mean) if mean < 700 else None,  # neither of infinite losses nor of NaN
        "book_losses": [value if math.isfinite(value) else None for value in (sum(book) / len(book) for book in losses)],
    }


def perplexity_ratio(entry: dict[str, Any], reference: dict[str, Any]) -> tuple[float, tuple[float, float] | None] | None:
    """How many times the perplexity of `reference` one is, and the 95 % interval of that.

    The windows of both end at the same places, so each book gives one difference of losses; the interval takes the books
    as independent. None where a loss is not finite; no interval for one book.
    """
    pairs = list(zip(entry["book_losses"], reference["book_losses"], strict=True))
    if any(loss is None for pair in pairs for loss in pair):
        return None
    differences = [one - other for one, other in pairs]
    middle = statistics.fmean(differences)
    if middle > 700:  # no float holds its exponential
        return None
    if len(differences) < 2:
        return math.exp(middle), None
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return math.exp(middle), (math.exp(middle - half), math.exp(min(middle + half, 700)))


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache's layers hold, whatever their names."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [tensor for part in parts for tensor in tensors(part)]

    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(vars(layer)))


@torch.no_grad()
def decoding_cost(
    model: PreTrainedModel, tokens: np.ndarray, length: int, chunk_length: int, steps: int = 16, repeats: int = 5
) -> dict[str, Any]:
    """What one row costs to decode behind a text of `length` tokens (books shorter than that are repeated).

    Returns:
        `state_bytes` behind the text and `state_bytes_after` behind what was decoded; `seconds_per_token`, the median of
        `repeats` means over `steps` steps, with the least and the largest in `seconds_range`; on a GPU, `peak_bytes`
        allocated while decoding, weights included.
    """
    ids = torch.from_numpy(np.resize(np.asarray(tokens), length).astype(np.int64))[None].to(model.device)
    options = {**plain_reading(model), "use_cache": True, "logits_to_keep": 1}
    output = model(ids, prefill_chunk_length=chunk_length, **options)
    cache, token = output.cache_params, output.logits[:, -1].argmax(-1, keepdim=True)
    state_bytes = cache_bytes(cache)
    del output
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = []
    for repeat in range(repeats + 1):  # the first warms up
        if on_gpu:
            torch.cuda.synchronize(model.device)
        started = time.perf_counter()
        for _ in range(steps):
            token = model(token, cache_params=cache, **options).logits[:, -1].argmax(-1, keepdim=True)
        if on_gpu:
            torch.cuda.synchronize(model.device)
        if repeat:
            seconds.append((time.perf_counter() - started) / steps)
    return {
        "state_bytes": state_bytes,
        "state_bytes_after": cache_bytes(cache),
        "seconds_per_token": statistics.median(seconds),
        "seconds_range": (min(seconds), max(seconds)),
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
    }

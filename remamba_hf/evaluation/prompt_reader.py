# SPDX-License-Identifier: Apache-2.0
"""Prompts of a benchmark, cut to a length, and a model that answers them in batches.

Prompts that are too long lose their middle, as in LongBench (arXiv 2308.14508, `pred.py`). Answers are greedy. An answer
with stop texts begins with none of them, as LongBench demands of answers that end with their line: the first token is
neither such a text nor the end of text, and stop texts in the white space at the beginning end nothing.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .answers_file import Record
from .tasks import Sample

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it.

    ids: its tokens.
    whole_tokens: how many it had before its middle was left out.
    """

    sample: Sample
    ids: list[int]
    whole_tokens: int


def truncate_middle(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """Token ids of a prompt, and how many it has uncut.

    Of more than `max_length` tokens the first and the last half of that number are kept, decoded, and encoded together
    again, as in LongBench's `pred.py`; so a few more or fewer may be left.
    """
    ids = _encode([prompt], tokenizer)[0]
    return _middle_left_out(ids, tokenizer, max_length), len(ids)


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose: no warning about texts that are longer than what the tokenizer takes the model for.
    return list(tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])


def _middle_left_out(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    if len(ids) <= max_length:
        return ids
    half = max_length // 2
    halves = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return _encode(["".join(halves)], tokenizer)[0]


def encode_samples(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool = False
) -> list[Prompt]:
    """Prompts of all samples, in their order.

    Raises:
        ValueError: two samples of one identity, or a prompt without tokens.
    """
    prompts: dict[str, Prompt] = {}
    with tqdm(total=len(samples), desc="encoding prompts", unit="sample", disable=quiet) as progress:
        for first in range(0, len(samples), _ENCODED_AT_ONCE):
            part = samples[first : first + _ENCODED_AT_ONCE]
            for sample, whole in zip(part, _encode([sample.prompt for sample in part], tokenizer), strict=True):
                if sample.identity in prompts:
                    raise ValueError(f"two samples are called {sample.identity}: the benchmark's files are mixed up")
                if not whole:
                    raise ValueError(f"sample {sample.identity} has an empty prompt")
                ids = _middle_left_out(whole, tokenizer, max_length)
                prompts[sample.identity] = Prompt(sample, ids, len(whole))
            progress.update(len(part))
    return list(prompts.values())


def plan_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Prompts that are read together: of about one length, with answers of the same kind; the longest first, so that what
    does not fit into memory shows at once."""
    kinds: dict[tuple[Any, ...], list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.ids)):
        kinds.setdefault((prompt.sample.max_new_tokens, prompt.sample.stop), []).append(prompt)
    batches = [kind[first : first + batch_size] for kind in kinds.values() for first in range(0, len(kind), batch_size)]
    return sorted(batches, key=lambda batch: -len(batch[0].ids))


class _StopTexts(StoppingCriteria):
    """Ends every row whose answer has come to a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], prompt_columns: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_columns = prompt_columns
        # A token has at least a byte; the rest is room for one that begins before the text.
        self.tail = max(len(text.encode()) for text in stop) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        rows = input_ids[:, self.prompt_columns :].tolist()
        return torch.tensor([self._ended(row) for row in rows], device=input_ids.device)

    def _ended(self, ids: list[int]) -> bool:
        tail = self.tokenizer.decode(ids[-self.tail :], skip_special_tokens=True)
        if not any(text in tail for text in self.stop):
            return False
        return stop_place(self.tokenizer.decode(ids, skip_special_tokens=True), self.stop) is not None


def stop_place(answer: str, stop: Sequence[str]) -> int | None:
    """Where the first stop text begins that is not in the white space at the answer's beginning; None if there is none."""
    start = len(answer) - len(answer.lstrip())
    places = [place for text in stop if (place := answer.find(text, start)) >= 0]
    return min(places) if places else None


class Reader:
    """A model that answers prompts.

    Args:
        model: any causal language model, ready for inference. Its generation settings but those of special tokens are
            dropped: a checkpoint's own penalties would not be greedy.
        tokenizer: its tokenizer.
        options: further arguments of `generate`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = dict(options)
        self.reads_mask = "attention_mask" in inspect.signature(model.forward).parameters
        self.ends = _ends_of_text(model, tokenizer)
        # Some tokenizers have got a padding token that the model has no embedding of.
        vocabulary = model.get_input_embeddings().weight.shape[0]
        pads = (tokenizer.pad_token_id, *self.ends, 0)
        self.pad = next(token for token in pads if token is not None and token < vocabulary)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=self.ends or None, pad_token_id=self.pad
        )

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> list[Record]:
        """Answers prompts with the same `max_new_tokens` and `stop` together: rows are padded on the left.

        Returns:
            A record each: `identity`, `answer`, `prompt_tokens` as read, `whole_tokens` before its middle was left out, and
            `new_tokens` of the answer, with a stop text and without the end of text.

        Raises:
            ValueError: rows of different lengths, and a model that reads no attention mask.
        """
        sample = prompts[0].sample
        longest = max(len(prompt.ids) for prompt in prompts)
        if len({len(prompt.ids) for prompt in prompts}) > 1 and not self.reads_mask:
            raise ValueError(f"{type(self.model).__name__} cannot tell padding from text: ask it with --batch-size 1")
        ids = [[self.pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts]
        mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        stopping = {}
        if sample.stop:
            criteria = StoppingCriteriaList([_StopTexts(self.tokenizer, sample.stop, longest)])
            stopping = {"stopping_criteria": criteria, "begin_suppress_tokens": self._no_beginning(sample.stop)}
        sequences = self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=sample.max_new_tokens,
            do_sample=False,
            **{name: value for name, value in stopping.items() if value},
            **self.options,
        )
        answers = sequences[:, longest:].tolist()
        return [self._record(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _no_beginning(self, stop: Sequence[str]) -> list[int]:
        last = [self.tokenizer(text, add_special_tokens=False)["input_ids"][-1:] for text in stop]
        return [*self.ends, *(ids[0] for ids, text in zip(last, stop, strict=True) if self.tokenizer.decode(ids) == text)]

    def _record(self, prompt: Prompt, ids: list[int]) -> Record:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        answer = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        stop = stop_place(answer, prompt.sample.stop)
        while stop is not None and ids[end - 1] == self.pad:  # what a row that has stopped gets until the others have
            end -= 1
        return {
            "identity": prompt.sample.identity,
            "answer": answer[:stop],
            "prompt_tokens": len(prompt.ids),
            "whole_tokens": prompt.whole_tokens,
            "new_tokens": end,
        }


def _ends_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text, by the model and by the tokenizer."""
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = given if isinstance(given, (list, tuple)) else [given]
    return [token for token in dict.fromkeys([*ends, tokenizer.eos_token_id]) if token is not None]

# SPDX-License-Identifier: Apache-2.0
"""A model for EleutherAI's evaluation harness (lm-eval) that knows where the prompt ends: `--model remamba`.

The harness's own `--model hf` hands a model context and continuation as one text, so that no loglikelihood is taken behind a
compressed prompt. Here the context is the prompt: it is compressed, and the continuation's logits follow. Answers are
generated behind compressed prompts either way. Whole texts without a context (`loglikelihood_rolling`) are read in one pass.

    python -m remamba_hf.evaluation.lm_eval_model --model remamba --model_args pretrained=FOLDER --tasks hellaswag,piqa

is lm-eval's own command with all its options: that command knows no other packages' models. Several GPUs: `accelerate launch
-m remamba_hf.evaluation.lm_eval_model ...`. In Python: `lm_eval.simple_evaluate(PromptAwareLM(FOLDER), tasks=[...])`.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from remamba_hf.command_options import COMPRESSION_SETTINGS
from remamba_hf.families import FAMILIES
from remamba_hf.modeling.selective_compression import settings_for_rows

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('this needs EleutherAI\'s harness: pip install "remamba_hf[lm-eval]"') from error

# What the harness asks (None of a whole text), and the tokens of context and continuation.
Request = tuple[Any, list[int], list[int]]
# What is read: a context, and a continuation without its last token.
Row = tuple[tuple[int, ...], tuple[int, ...]]

_SETTINGS = tuple(f"compression_{name}" for name, *_ in COMPRESSION_SETTINGS)
# Of a configuration; given among the harness's arguments, they are set for this load as transformers does it.
_FIXED_SETTINGS = ("compression_max_kept", "compression_min_prompt", "selection")


@register_model("remamba")
class PromptAwareLM(HFLM):
    """lm-eval's model of transformers, whose prompts are compressed where the model does that.

    Models that compress no prompts, such as MemMamba or any other causal language model, are read as by `--model hf`.

    Args:
        pretrained: folder, Hub id, or a model.
        compress: None: compress prompts if the model does. True: insist. False: read plainly, as `--model hf` does where
            loglikelihoods are asked for.
        compression_start, compression_span, compression_ratio: s, p and rho; None: the checkpoint's. A ratio given here is
            not bounded by compression_max_kept.
        **harness: as for `--model hf`: batch_size, device, dtype, max_length, peft, trust_remote_code, ..., and what a
            model's `from_pretrained` takes, such as other settings of its configuration (selection, ...).

    Raises:
        ValueError: arguments that nothing knows, settings that are out of range or mean nothing for this model.
    """

    def __init__(
        self,
        pretrained: Any,
        compress: bool | None = None,
        compression_start: float | None = None,
        compression_span: float | None = None,
        compression_ratio: float | None = None,
        **harness: Any,
    ) -> None:
        if compress not in (None, True, False):
            raise ValueError(f"compress is {compress!r}: give True or False, or leave it out to do as the model does.")
        compress = None if compress is None else bool(compress)
        values = (compression_start, compression_span, compression_ratio)
        given = {name: value for name, value in zip(_SETTINGS, values, strict=True) if value is not None}
        if compress is False and given:
            raise ValueError(f"compress=False leaves nothing to set: leave out {', '.join(given)}.")
        unknown = sorted(set(harness) - set(inspect.signature(HFLM).parameters))
        if not isinstance(pretrained, str) and unknown:  # the harness would pass over them
            raise ValueError(f"A model that is loaded already takes no {', '.join(unknown)}.")
        super().__init__(pretrained, **harness)
        can_compress = self.config.model_type in FAMILIES
        if not can_compress and (given or compress):
            meaningless = ", ".join([*(["compress"] if compress else []), *given])
            raise ValueError(f"A {self.config.model_type!r} model compresses no prompts: leave out {meaningless}.")
        if can_compress:
            settings_for_rows(self.model.config, 1, *values)  # raises on what is out of range
        self.compresses = can_compress and compress is not False
        self.reading = {"compress_prompt": self.compresses, **given} if can_compress else {}
        self._longest_text = 0

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model, and how prompts were read: None without compression."""
        settings = None
        if self.compresses:
            names = (*_SETTINGS, *_FIXED_SETTINGS)
            settings = {name: self.reading.get(name, getattr(self.model.config, name)) for name in names}
            if "compression_ratio" in self.reading:
                settings["compression_max_kept"] = None
        return {**super().get_model_info(), "compression": settings}

    def _create_model(self, *arguments: Any, **settings: Any) -> None:
        try:
            super()._create_model(*arguments, **settings)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ValueError(
                f"--model_args: {error}: neither lm-eval nor the model knows it. This package's are compress, "
                f"{', '.join(_SETTINGS)}."
            ) from error

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's; `--batch_size auto` tries texts of the length of the longest prompt."""
        self._measure_texts(requests)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's; `--batch_size auto` tries texts of the length of the longest one."""
        self._measure_texts(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _measure_texts(self, requests: list[Any]) -> None:
        if self.batch_size == "auto":
            self._longest_text = max((len(self.tok_encode(request.args[0])) for request in requests), default=0)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if not requests:  # the harness would try `max_length` tokens, of which these models have a million
            requests, pos = [(None, [0] * max(self._longest_text, 1), [0])], 0
        return super()._detect_batch_size(requests, pos)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **arguments: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **{**self.reading, **arguments})

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, and whether it is what greedy decoding gives."""
        if not self.compresses or any(asked is None for asked, *_ in requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Continuations that differ in their last token alone, such as letters, need one reading. Texts that differ in where
        # the prompt ends need two.
        places: dict[Row, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            context = context or [self.prefix_token_id]  # of nothing but spaces
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"A continuation has {len(continuation)} tokens, but 1 to max_length={self.max_length} can be scored."
                )
            places.setdefault((tuple(context), tuple(continuation[:-1])), []).append(place)
        self.batch_sizes: dict[int, int] = {}  # found for texts of other lengths
        rows = sorted(places, key=lambda row: -len(row[0]) - len(row[1]))
        firsts = [requests[places[row][0]] for row in rows]
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests") as bar:
            begin = 0
            while begin < len(rows):
                size = self._batch_scheduler(begin, firsts) if self.batch_size == "auto" else self.batch_size
                batch = rows[begin : begin + size]
                for row, log_probabilities in zip(batch, self._read_behind_prompts(batch), strict=True):
                    for place in places[row]:
                        asked, _, continuation = requests[place]
                        answers[place] = _answer(log_probabilities, continuation)
                        self.cache_hook.add_partial("loglikelihood", asked, answers[place])
                    bar.update(len(places[row]))
                begin += size
        return [answers[place] for place in range(len(requests))]

    def _read_behind_prompts(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """A [C, vocabulary] for each row: log-probabilities of its continuation's C tokens. Contexts lose their beginning
        where a text is longer than `max_length`, as in lm-eval."""
        texts = [(context + read)[-self.max_length :] for context, read in rows]
        scored = [len(read) + 1 for _, read in rows]
        columns = max(len(text) for text in texts)
        ids = torch.tensor([(0,) * (columns - len(text)) + text for text in texts], device=self.device)
        mask = torch.tensor([[0] * (columns - len(text)) + [1] * len(text) for text in texts], device=self.device)
        prompts = torch.tensor([len(text) - count + 1 for text, count in zip(texts, scored, strict=True)])
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                prompt_lengths=prompts,
                logits_to_keep=max(scored),
                use_cache=False,
                **self.reading,
            ).logits
        log_probabilities = logits.log_softmax(-1, dtype=self.softmax_dtype)
        return [row[-count:] for row, count in zip(log_probabilities, scored, strict=True)]


def _answer(log_probabilities: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of a continuation's log-probabilities, and whether each of its tokens is the likeliest."""
    tokens = torch.tensor(continuation, device=log_probabilities.device)
    total = log_probabilities.gather(1, tokens[:, None]).sum()
    return float(total), bool((log_probabilities.argmax(-1) == tokens).all())


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """lm-eval's command, which knows `--model remamba`.

    Args:
        arguments: those behind the program's name; default: the process's own.
        program: its name.

    Raises:
        ValueError: `--model` is a folder, which is what other commands take.
    """
    own = sys.argv
    given = own[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    model = parser.parse_known_args(given)[0].model
    if model is not None and model not in model_registry and Path(model).is_dir():
        raise ValueError(
            f"--model is lm-eval's name of a kind of model: give --model remamba --model_args pretrained={model}"
        )
    sys.argv = [program or own[0], *given]  # where lm-eval reads them
    try:
        cli_evaluate()
    finally:
        sys.argv = own


if __name__ == "__main__":
    main()

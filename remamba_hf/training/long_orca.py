# SPDX-License-Identifier: Apache-2.0
"""LongOrca, the data that ReMamba was trained on (arXiv 2408.15496, section 4.1): OpenOrca and LongAlpaca in three parts.

    part      source        pairs    prompt tokens   prompt + response
    general   OpenOrca      300,000  any             fewer than 6,000
    long      OpenOrca      200,000  more than 700   fewer than 6,010
    alpaca    LongAlpaca    all      more than 700   prompts are cut to fit 6,000

Prompts are the questions alone, without system prompt and template. The authors' draw of OpenOrca is not known: here its
pairs come in an order that their text decides, the first that fit are `general`, and `long` are others behind them. Neither
do they say which 8.9k of LongAlpaca's 12k pairs they took; those of more than 700 tokens leave out its short third.
Pairs without a question or an answer are left out.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, Features, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .instruction_data import (
    ROW_FEATURES,
    InstructionDataError,
    LengthRule,
    content_digest,
    raised_plainly,
    read_pairs,
    tokenize_batch,
    tokenizer_digest,
)

OPEN_ORCA, LONG_ALPACA = "Open-Orca/OpenOrca", "Yukang/LongAlpaca-12k"
FEATURES = Features({**ROW_FEATURES, "part": Value("string")})
_BATCH = 512


@dataclass(frozen=True)
class LongOrcaRule:
    """How many pairs of which length, in tokens of the tokenizer; pairs count with their end-of-text token.

    general, long: pairs of OpenOrca; fewer are taken where it has no more.
    general_tokens, long_tokens: a pair has fewer.
    long_prompt: a prompt of the parts `long` and `alpaca` has more.
    fit: what becomes of longer pairs of LongAlpaca.
    seed: decides on the order of OpenOrca.
    """

    general: int = 300_000
    long: int = 200_000
    general_tokens: int = 6000
    long_tokens: int = 6010
    long_prompt: int = 700
    fit: LengthRule = LengthRule()  # noqa: RUF009 - frozen
    seed: int = 0


def long_orca(
    tokenizer: PreTrainedTokenizerBase,
    open_orca: str | os.PathLike[str] | None = OPEN_ORCA,
    long_alpaca: str | os.PathLike[str] | None = LONG_ALPACA,
    rule: LongOrcaRule = LongOrcaRule(),
    revisions: Sequence[str | None] = (None, None),
) -> Dataset:
    """Builds LongOrca, or takes it from the cache of `datasets`.

    Args:
        tokenizer: gives the lengths, and the ids.
        open_orca, long_alpaca: files, folders or Hub ids with the columns of these datasets; None leaves one out.
        rule: see `LongOrcaRule`; its `fit` cuts every prompt that is too long, as `tokenize_pairs` does.
        revisions: of the two on the Hub.

    Returns:
        `prompt_ids`, `response_ids`, `cut`, `group`, and `part`: `general`, `long` or `alpaca`. Shuffle before training.

    Raises:
        InstructionDataError: nothing to read, or nothing left; bad records by file and line.
    """
    sources = [
        None if source is None else read_pairs(source, columns=columns, skip_empty=True, revision=revision)
        for source, columns, revision in zip(
            (open_orca, long_alpaca),
            ((("question",), "response"), (("instruction", "[input]"), "output")),
            revisions,
            strict=True,
        )
    ]
    if all(source is None for source in sources):
        raise InstructionDataError("Give OpenOrca, LongAlpaca or both.")
    prints = [None if source is None else source._fingerprint for source in sources]
    digest = content_digest("long_orca", prints, tokenizer_digest(tokenizer), asdict(rule))
    arguments = dict(open_orca=sources[0], long_alpaca=sources[1], tokenizer=tokenizer, rule=rule)
    with raised_plainly():
        return Dataset.from_generator(_rows, gen_kwargs=arguments, features=FEATURES, fingerprint=digest)


def _rows(
    open_orca: Dataset | None, long_alpaca: Dataset | None, tokenizer: PreTrainedTokenizerBase, rule: LongOrcaRule
) -> Iterator[dict[str, Any]]:
    counts = {"general": 0, "long": 0, "alpaca": 0}
    if open_orca is not None:
        for part, row in _open_orca_rows(open_orca, tokenizer, rule):
            counts[part] += 1
            yield {**row, "part": part}
    if long_alpaca is not None:
        for row in _tokenized(long_alpaca, range(len(long_alpaca)), tokenizer, rule.fit, "LongAlpaca"):
            if row["cut"] or len(row["prompt_ids"]) > rule.long_prompt:
                counts["alpaca"] += 1
                yield {**row, "part": "alpaca"}
    if not any(counts.values()):
        raise InstructionDataError(f"No pair meets {rule}. Give more data, or smaller lengths.")


def _open_orca_rows(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, rule: LongOrcaRule
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first pairs that are short enough, then only long ones, until both parts are full."""
    whole = LengthRule(max_tokens=1 << 40)  # nothing is cut
    left = {"general": rule.general, "long": rule.long}
    with tqdm(total=rule.general + rule.long, desc="choosing from OpenOrca", unit="pair") as progress:
        for row in _tokenized(pairs, _order(pairs, rule.seed), tokenizer, whole, "OpenOrca"):
            prompt, total = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["response_ids"])
            if left["general"] and total < rule.general_tokens:
                part = "general"
            elif left["long"] and rule.long_prompt < prompt and total < rule.long_tokens:
                part = "long"
            else:
                continue
            left[part] -= 1
            progress.update()
            yield part, row
            if not any(left.values()):
                return


def _order(pairs: Dataset, seed: int) -> list[int]:
    """Rows by a digest of their text: the same whatever order, or files, they came in."""
    digests = []
    for start in tqdm(range(0, len(pairs), _BATCH), desc="ordering OpenOrca", unit="batch"):
        batch = pairs[start : start + _BATCH]
        for prompt, response in zip(batch["prompt"], batch["response"], strict=True):
            digests.append(hashlib.sha256(f"{seed}\0{prompt}\0{response}".encode()).digest()[:8])
    return sorted(range(len(pairs)), key=digests.__getitem__)


def _tokenized(
    pairs: Dataset, order: Sequence[int], tokenizer: PreTrainedTokenizerBase, rule: LengthRule, name: str
) -> Iterator[dict[str, Any]]:
    for start in tqdm(range(0, len(order), _BATCH), desc=f"tokenizing {name}", unit="batch"):
        columns = tokenize_batch(pairs[list(order[start : start + _BATCH])], tokenizer, rule)
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))

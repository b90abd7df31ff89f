# SPDX-License-Identifier: Apache-2.0
"""Instruction data from files or the Hub to token ids: `{prompt_ids, response_ids}` rows for `PromptResponseCollator`.

    pairs = read_pairs("train.jsonl", tokenizer=tokenizer)          # prompt, response, group; or a Hub id
    rows = tokenize_pairs(pairs, tokenizer, LengthRule(6000))       # cached on disk by `datasets`, or streamed
    training, held_out = split_by_content(rows, 0.02)

Every step is a function of content: a pair is held out because of its text, wherever it stands, and the cache of token ids
is known by the text, the tokenizer and the rule, so that a second run, or a second process, tokenizes nothing.
"""

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

# Columns of prompt and response that are known, in order of preference. Those of a prompt are joined by a blank line; a
# column in brackets may be empty or missing.
COLUMNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt",), "response"),
    (("prompt",), "completion"),
    (("instruction", "[input]"), "output"),
    (("question",), "response"),  # OpenOrca, without its system prompt
    (("context", "query"), "answer"),
    (("question",), "answer"),
)
PAIR_FEATURES = Features({name: Value("large_string") for name in ("prompt", "response", "group")})
ROW_FEATURES = Features(
    {"prompt_ids": [Value("int32")], "response_ids": [Value("int32")], "cut": Value("bool"), "group": Value("large_string")}
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_VERSION = "1"  # of what becomes of a pair: a change makes caches be made anew


class InstructionDataError(ValueError):
    """Data that cannot be used as asked; the message says where, and what to do."""


class EmptyTextError(InstructionDataError):
    """A prompt or response without text."""


@dataclass(frozen=True)
class LengthRule:
    """What becomes of long pairs.

    A prompt for which `max_tokens` have no room beside its response and the end-of-text token loses the tokens right after
    its first `prompt_head` (arXiv 2408.15496: 6,000 and 1,000), or after the half of what room there is, if that is less:
    the question often stands at the end. A response is never cut, for it would teach not to stop: pairs whose response takes
    more than half of `max_tokens` are left out.
    """

    max_tokens: int = 6000
    prompt_head: int = 1000

    def __post_init__(self) -> None:
        if self.max_tokens < 8 or self.prompt_head < 0:
            raise ValueError(f"{self}: max_tokens must be at least 8, prompt_head at least 0.")

    def fit(self, prompt: Sequence[int], response: Sequence[int]) -> list[int] | None:
        """The prompt, cut if need be, beside a response that ends with its end-of-text token; None: leave the pair out."""
        if not prompt or 2 * len(response) > self.max_tokens:
            return None
        room = self.max_tokens - len(response)
        if len(prompt) <= room:
            return list(prompt)
        head = min(self.prompt_head, room // 2)
        return [*prompt[:head], *prompt[len(prompt) - (room - head) :]]


def pair_of(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: tuple[Sequence[str], str] | None = None,
    group: str | None = None,
) -> dict[str, str]:
    """Prompt and response of one record.

    Args:
        record: with `messages` (the last one the assistant's, which is the response; the others and the chat template's
            opening of an answer are the prompt), or with columns of prompt and response.
        tokenizer: whose chat template renders `messages`.
        columns: those of the prompt and the one of the response; default: the first of `COLUMNS` that fits.
        group: column whose content decides about held-out data instead of the prompt's: rows of one document, say.

    Returns:
        `prompt`, `response` and `group`.

    Raises:
        InstructionDataError: columns that are missing, empty or no text; messages in a wrong order; no chat template.
    """
    if columns is None and record.get("messages") is not None:
        prompt, response = _render(record["messages"], tokenizer)
    else:
        names, answer = columns or _fitting_columns(record)
        parts = [_text(record, name) for name in names]
        prompt, response = "\n\n".join(part for part in parts if part), _text(record, answer)
    if group is not None and record.get(group) is None:
        raise InstructionDataError(f"there is no column {group!r} to group by, only {sorted(record)}")
    return {"prompt": prompt, "response": response, "group": prompt if group is None else str(record[group])}


def _fitting_columns(record: Mapping[str, Any]) -> tuple[Sequence[str], str]:
    for names, answer in COLUMNS:
        if record.get(answer) is not None and all(record.get(name) is not None or name[0] == "[" for name in names):
            return names, answer
    known = "; ".join(f"{' + '.join(names)} -> {answer}" for names, answer in COLUMNS)
    raise InstructionDataError(f"the columns {sorted(record)} are none of: messages; {known}. Name yours")


def _text(record: Mapping[str, Any], name: str) -> str:
    optional, name = name.startswith("["), name.strip("[]")
    value = record.get(name)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise InstructionDataError(f"column {name!r} {'is missing' if value is None else 'is no text'}")
    if not optional and not value.strip():
        raise EmptyTextError(f"column {name!r} is empty")
    return value


def _render(messages: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    turns = messages if isinstance(messages, list) else []
    if len(turns) < 2 or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        raise InstructionDataError("messages must be a list of two or more {role, content} with text as content")
    if turns[-1].get("role") != "assistant" or not turns[-1]["content"].strip():
        raise InstructionDataError("the last of messages must be the assistant's, with an answer")
    if tokenizer is None or not tokenizer.chat_template:
        raise InstructionDataError("messages need a tokenizer with a chat template. Set tokenizer.chat_template")
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise InstructionDataError("the chat template does not open an answer as it writes one. Give one that does")
    return prompt, whole[len(prompt) :]


def list_files(source: str | os.PathLike[str]) -> list[Path]:
    """The file `source`, or the data files in the folder `source`, by name.

    Raises:
        InstructionDataError: no such file, or of a kind that cannot be read.
    """
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not files or not files[0].is_file() or not files[0].name.endswith(SUFFIXES):
        raise InstructionDataError(f"{source} is no file or folder of files that end with {', '.join(SUFFIXES)}.")
    return files


def read_records(file: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each record of a file, with where it stands (`file:line`, or `file:row` of a parquet file).

    Raises:
        InstructionDataError: a line that is no JSON object, or a damaged file, by its place.
    """
    path, number = Path(file), 0
    try:
        if path.suffix == ".parquet":
            for number, record in enumerate(_parquet_records(path), start=1):
                yield f"{path}:{number}", record
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line)
    except ValueError as error:
        raise InstructionDataError(f"{path}:{number} cannot be read: {error}. Mend or remove it.") from error
    except (OSError, EOFError) as error:
        raise InstructionDataError(f"{path} cannot be read on after line {number}: {error}. Get the file again.") from error


def _json_object(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def read_pairs(
    source: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: tuple[Sequence[str], str] | None = None,
    group: str | None = None,
    skip_empty: bool = False,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The pairs of a source, with the columns `prompt`, `response` and `group`; see `pair_of`.

    Args:
        source: a file or folder (`list_files`), or the Hub id of a dataset, whose part `train` is read.
        skip_empty: leave out pairs of which a text is empty, instead of raising.
        revision: branch, tag or commit on the Hub.
        streaming: read when asked, without a copy on disk. Otherwise all is read, and checked, now.

    Raises:
        InstructionDataError: a record that cannot be used, by file and line; when streaming, as it is met. Or, but when
            streaming, no pair at all.
    """
    reader = PairReader(tokenizer, columns, group, skip_empty)
    if not Path(source).exists():
        return _hub_pairs(str(source), revision, streaming, reader)
    files = [str(file) for file in list_files(source)]
    arguments = dict(files=files, reader=reader)
    if streaming:
        return IterableDataset.from_generator(_generate_pairs, gen_kwargs=arguments, features=PAIR_FEATURES)
    digest = content_digest("pairs", reader.digest(), *map(_file_digest, files))
    arguments["source"] = str(source)
    with raised_plainly():
        return Dataset.from_generator(_generate_some_pairs, gen_kwargs=arguments, features=PAIR_FEATURES, fingerprint=digest)


@dataclass(frozen=True)
class PairReader:
    """`pair_of` with its arguments, for records of known places."""

    tokenizer: PreTrainedTokenizerBase | None
    columns: tuple[Sequence[str], str] | None
    group: str | None
    skip_empty: bool

    def __call__(self, record: Mapping[str, Any], where: str) -> dict[str, str] | None:
        try:
            return pair_of(record, self.tokenizer, self.columns, self.group)
        except InstructionDataError as error:
            if self.skip_empty and isinstance(error, EmptyTextError):
                return None
            raise InstructionDataError(f"{where}: {error}.") from error

    def digest(self) -> str:
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        return content_digest(template, self.columns, self.group, self.skip_empty)


def _generate_pairs(files: Sequence[str], reader: PairReader) -> Iterator[dict[str, str]]:
    for file in files:
        for where, record in read_records(file):
            if (pair := reader(record, where)) is not None:
                yield pair


def _generate_some_pairs(files: Sequence[str], reader: PairReader, source: str) -> Iterator[dict[str, str]]:
    pair = None
    for pair in _generate_pairs(files, reader):
        yield pair
    if pair is None:
        raise InstructionDataError(f"{source} has no pair of a prompt and a response: give files with some.")


def _hub_pairs(source: str, revision: str | None, streaming: bool, reader: PairReader) -> Dataset | IterableDataset:
    try:
        records = load_dataset(source, revision=revision, split="train", streaming=streaming)
    except (OSError, ValueError) as error:
        raise InstructionDataError(
            f"There is no file or folder {source}, and no dataset of that name could be got from the Hub: {error}"
        ) from error

    def pairs(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[str]]:
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [reader(record, f"{source}, row {row}") for record, row in zip(records, rows, strict=True)]
        return {name: [pair[name] for pair in read if pair is not None] for name in PAIR_FEATURES}

    work = dict(batched=True, with_indices=True, remove_columns=records.column_names, features=PAIR_FEATURES)
    if not streaming:
        work["new_fingerprint"] = content_digest("hub", records._fingerprint, reader.digest())
    return records.map(pairs, **work)


@contextlib.contextmanager
def raised_plainly() -> Iterator[None]:
    """Lets an InstructionDataError out of the error that `datasets` makes of it."""
    try:
        yield
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, InstructionDataError) else error from None


def tokenize_pairs(
    pairs: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, rule: LengthRule = LengthRule(), processes: int = 1
) -> Dataset | IterableDataset:
    """Token ids of pairs: no template, and the end-of-text token behind each response.

    Args:
        pairs: of `read_pairs`.
        tokenizer: adds nothing itself; its `eos_token` ends the responses.
        rule: for long pairs; those that it leaves out are missing in the result.
        processes: that tokenize at a time (not when streaming).

    Returns:
        `prompt_ids` and `response_ids`, lists of int; `cut`, whether the prompt lost tokens; `group`.

    Raises:
        InstructionDataError: the tokenizer has no end-of-text token, or nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise InstructionDataError("The tokenizer has no eos_token to end responses with. Set tokenizer.eos_token.")
    work = dict(batched=True, batch_size=256, remove_columns=list(PAIR_FEATURES), features=ROW_FEATURES)
    arguments = dict(tokenizer=tokenizer, rule=rule)
    if isinstance(pairs, IterableDataset):
        return pairs.map(tokenize_batch, fn_kwargs=arguments, **work)
    # A fingerprint of ours: that of `datasets` changes with the tokenizer's use.
    digest = content_digest("rows", pairs._fingerprint, tokenizer_digest(tokenizer), asdict(rule))
    workers = processes if processes > 1 and len(pairs) > 1000 else None
    rows = pairs.map(
        tokenize_batch, fn_kwargs=arguments, new_fingerprint=digest, num_proc=workers, desc="tokenizing", **work
    )
    if not len(rows):
        raise InstructionDataError(
            f"None of {len(pairs)} pairs is left: give data, or a longer max_tokens than {rule.max_tokens}."
        )
    return rows


def tokenize_batch(batch: dict[str, list[str]], tokenizer: Any, rule: LengthRule) -> dict[str, list[Any]]:
    prompts, responses = (
        tokenizer(batch[name], add_special_tokens=False, verbose=False)["input_ids"] for name in ("prompt", "response")
    )
    end, rows = tokenizer.eos_token_id, []
    for prompt, response, group in zip(prompts, responses, batch["group"], strict=True):
        # A chat template may have ended the response, perhaps with a line break behind the end.
        ended = response if end in response[-2:] else [*response, end]
        if (fitted := rule.fit(prompt, ended)) is not None:
            rows.append((fitted, ended, len(fitted) < len(prompt), group))
    return {name: [row[place] for row in rows] for place, name in enumerate(ROW_FEATURES)}


def split_by_content(rows: Any, held_out: float) -> tuple[Any, Any]:
    """Rows for training and rows held out, about the share `held_out` of all groups. Equal prompts, or rows of one group,
    stay together, wherever they stand and whatever stands beside them.

    Raises:
        InstructionDataError: one of the parts would be empty (not found out when streaming).
    """
    bound = int(held_out * 2**64)

    def chosen(wanted: bool) -> Any:
        where = dict(function=_is_held_out, input_columns="group", fn_kwargs={"bound": bound, "wanted": wanted})
        if isinstance(rows, IterableDataset):
            return rows.filter(**where)
        return rows.filter(**where, new_fingerprint=content_digest("split", rows._fingerprint, bound, wanted))

    parts = chosen(False), chosen(True)
    if not isinstance(rows, IterableDataset) and not all(len(part) for part in parts):
        raise InstructionDataError(
            f"Holding out {held_out:.3g} of {len(rows)} rows leaves {len(parts[0])} and {len(parts[1])}: change the share, "
            "or give held-out data of your own."
        )
    return parts


def _is_held_out(group: str, bound: int, wanted: bool) -> bool:
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return (number < bound) == wanted


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what ids a text gets: vocabulary and rules, not what they were last used for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    content = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
    return content_digest(type(tokenizer).__name__, content, tokenizer.eos_token_id)


def content_digest(*parts: Any) -> str:
    text = json.dumps([_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _file_digest(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Reading for the page of `remamba ui`: one document at a time, with progress, and an end whenever it is asked for."""

import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from .checkpoint_files import first_line
from .families import ALL_FAMILIES
from .reading import Reading, question_prompt, read_and_answer
from .ui_html import Mark, error_html, facts_html, marks_of, passages_html, status_html, strip_html

_MEGABYTE = 2**20  # as Gradio's own message counts
MAX_DOCUMENT_BYTES = 10 * _MEGABYTE  # some two million tokens; more belongs on the command line
SUFFIXES = (".txt", ".md")
_POLL_SECONDS = 0.1


class _Stopped(Exception):
    """Raised between two chunks of a document that nobody waits for any more."""


class _StopOn(StoppingCriteria):
    """Ends decoding once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Answer(TextStreamer):
    """Collects the answer's text as it is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


@dataclass
class Job:
    """One question on its way.

    document, question, options: what is asked, and options of `read_and_answer`.
    answer: as far as it has come.
    two_passes: whether the document is compressed, for which it is read twice.
    stop: set it to end the reading.
    replaced: whether its session has asked again meanwhile, and shows that.
    started: whether its turn has come.
    progress: tokens read and to read.
    prompt, marks, memory: known at the end: the text that was read, what of it was kept or noted, the peak in words.
    """

    document: str
    question: str | None
    options: dict[str, Any]
    answer: _Answer
    two_passes: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    replaced: bool = False
    started: bool = False
    progress: tuple[int, int] = (0, 0)
    prompt: str = ""
    marks: list[Mark] = field(default_factory=list)
    memory: tuple[str, str] = ("", "")


class Reader:
    """Reads documents one at a time, in the order in which they were asked about, each on behalf of a session of the page.

    Args:
        model, tokenizer: as for `read_and_answer`.
        prefill_chunk_length: tokens read at a time; a reading can be stopped between two chunks.

    Raises:
        ValueError: a tokenizer that cannot tell where in a text its tokens stand.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefill_chunk_length: int = 4096) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot tell where in a text its tokens stand, so nothing could be marked. "
                "Save a fast one (tokenizer.json) into the checkpoint's folder, or ask with `remamba generate`."
            )
        self.model, self.tokenizer, self.prefill_chunk_length = model, tokenizer, prefill_chunk_length
        self.family = ALL_FAMILIES[model.config.model_type]
        self._jobs: dict[str, Job] = {}
        self._thread = ThreadPoolExecutor(1, "reading")

    def submit(
        self, session: str, document: str, question: str | None, max_new_tokens: int, **compression: Any
    ) -> tuple[Job, "Future[Reading]"]:
        """Puts a question in line. A session has one at a time: an earlier one is stopped."""
        if (earlier := self._jobs.get(session)) is not None:
            earlier.replaced = True
        self.stop(session)
        options = {"max_new_tokens": max_new_tokens, **compression}
        two_passes = compression.get("compress_prompt", self.family.compresses)
        job = self._jobs[session] = Job(document, question, options, _Answer(self.tokenizer), two_passes)
        return job, self._thread.submit(self._read, job)

    def stop(self, session: str) -> None:
        """Ends the session's reading, if there is one: between two chunks, or after the next tokens."""
        job = self._jobs.pop(session, None)
        if job is not None:
            job.stop.set()

    def release(self, session: str, job: Job) -> None:
        """Ends and forgets this job, but no later one of its session."""
        job.stop.set()
        if self._jobs.get(session) is job:
            del self._jobs[session]

    def close(self) -> None:
        """Ends everything."""
        for session in list(self._jobs):
            self.stop(session)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, job: Job) -> Reading:
        job.started = True
        if job.stop.is_set():
            raise _Stopped
        on_cuda = self.model.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        try:
            reading = self._answer(job)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold the state and what was computed from it
            if on_cuda:
                torch.cuda.empty_cache()
            raise
        job.memory = _peak_memory(self.model.device)
        job.prompt = job.document if job.question is None else question_prompt(job.document, job.question)
        job.marks = marks_of(reading, job.prompt, self.tokenizer)
        return reading

    def _answer(self, job: Job) -> Reading:
        def progress(done: int, total: int) -> None:
            job.progress = (done, total)
            if job.stop.is_set():
                raise _Stopped

        return read_and_answer(
            self.model,
            self.tokenizer,
            job.document,
            job.question,
            do_sample=False,
            prefill_progress=progress,
            prefill_chunk_length=self.prefill_chunk_length,
            streamer=job.answer,
            stopping_criteria=StoppingCriteriaList([_StopOn(job.stop)]),
            **job.options,
        )


def document_of(text: str | None, path: str | Path | None) -> str:
    """The document of a request: the file's text where there is a file, else the text.

    Raises:
        ValueError: nothing there, too much, another kind of file, or no UTF-8; the message tells what to do.
    """
    if path is None:
        name, content = "The document", (text or "").encode("utf-8", "replace")  # half a surrogate pair becomes "?"
        _check_size(name, len(content))
        document = content.decode("utf-8")
    else:
        path = Path(path)
        name = path.name
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{name} is not one of {', '.join(SUFFIXES)}. Save the document as plain text.")
        if not path.is_file():
            raise ValueError(f"The page no longer has {name}. Drop it again.")
        _check_size(name, path.stat().st_size)
        document = _utf8(path)
    if not document.strip():
        raise ValueError(f"{name} is empty. Paste some text or drop a file.")
    return document


def _check_size(name: str, size: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{name} has {size / _MEGABYTE:.1f} MB; this page takes {MAX_DOCUMENT_BYTES // _MEGABYTE} MB. "
            "Read it with `remamba generate --prompt-file`, which has no limit."
        )


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not a text file in UTF-8 (byte {error.start:,} fits no character). Convert it to UTF-8 first."
        ) from None


def _peak_memory(device: torch.device) -> tuple[str, str]:
    """The largest amount of memory, and whose: of a reading on CUDA, of the process since its start on the CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB", "GPU memory, peak of this reading"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown", "memory of the process"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 1e9:.2f} GB", "memory, peak of the process"


def _sentence(error: BaseException) -> str:
    """What the page says about an error; the unexpected is printed on stderr as well."""
    text = str(error)
    lacks_memory = isinstance(error, RuntimeError) and ("out of memory" in text.lower() or "allocate memory" in text)
    if isinstance(error, MemoryError) or lacks_memory:
        fix = "Give a shorter one, or start the page with a smaller --prefill-chunk-length."
        return f"The document is too long for this machine's memory. {fix}"
    if isinstance(error, (ValueError, OSError)):
        return text
    traceback.print_exception(error, file=sys.stderr)
    return f"The reading failed ({first_line(error)}). The terminal shows where."


def answer_events(
    reader: Reader,
    session: str,
    text: str | None,
    path: str | None,
    question: str | None,
    max_new_tokens: float | None,
    compression: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """What the page shows from the question to the end of the answer.

    Args:
        reader: whose model answers.
        session: of the page.
        text, path, question: as the page has them.
        max_new_tokens: the answer ends there at the latest.
        compression: options of `generate`.

    Yields:
        what has changed, by name: "status", "facts", "strip" and "passages" as HTML, "answer" as text, "running".
    """
    yield {"status": status_html("Starting."), "answer": "", "facts": "", "strip": "", "passages": "", "running": True}
    job = None
    try:
        document = document_of(text, path)
        if max_new_tokens is None or max_new_tokens < 1:
            raise ValueError("Give a number of new tokens of at least 1.")
        asked = question if question and question.strip() else None
        job, future = reader.submit(session, document, asked, int(max_new_tokens), **compression)
        yield from _until_done(job, future)
        reading = future.result()
        if job.replaced:
            return
        empty = "" if reading.answer else " The answer is empty."
        yield {
            "status": status_html("Stopped." if job.stop.is_set() else f"Done.{empty}"),
            "answer": reading.answer,
            "facts": facts_html(reading, job.memory),
            "strip": strip_html(reading, job.marks),
            "passages": passages_html(job.prompt, job.marks),
            "running": False,
        }
    except (_Stopped, CancelledError):
        if job is None or not job.replaced:
            yield {"status": status_html("Stopped before the document was read."), "running": False}
    except Exception as error:  # the page says what happened and takes the next question
        yield {"status": error_html(_sentence(error)), "running": False}
    finally:  # also where the page was closed meanwhile
        if job is not None:
            reader.release(session, job)


def _until_done(job: Job, future: "Future[Reading]") -> Iterator[dict[str, Any]]:
    """What changes while a document is read and answered."""
    shown = None
    while not future.done():
        if job.stop.is_set():
            future.cancel()  # where its turn has not come
        now = {"status": _status_of(job), "answer": job.answer.text.lstrip()}
        if now != shown and not job.replaced:
            shown = now
            yield now
        wait([future], _POLL_SECONDS)


def _status_of(job: Job) -> str:
    done, total = job.progress
    if job.stop.is_set():
        return status_html("Stopping.", (0, 0))
    if not job.started:
        return status_html("Waiting for another question to be answered.", (0, 0))
    if not total:
        return status_html("Reading.", (0, 0))
    if done < total:
        passes = " in two passes" if job.two_passes else ""
        return status_html(f"Reading: {done:,} of {total:,} tokens{passes}.", (done, total))
    return status_html("Answering.", (done, total))

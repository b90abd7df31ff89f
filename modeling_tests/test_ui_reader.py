# SPDX-License-Identifier: Apache-2.0
"""What the page does with documents and questions, on every small checkpoint: answers, stops, the line, errors."""

import gc
import html
import re
import types
import weakref
from pathlib import Path

import pytest
import torch

import remamba_hf
from remamba_hf import ui_reader
from remamba_hf.reading import load_for_reading
from remamba_hf.ui_reader import Reader, answer_events, document_of

CARDS = Path(remamba_hf.__file__).parent.parent / "model_cards"
QUESTION = "What is the secret number of Harold Marsh?"
HOSTILE = "<img src=x onerror=alert(1)>{{value}}${value}`'\"\\&amp;"

needs_cards = pytest.mark.skipif(not CARDS.is_dir(), reason="needs the repository's model_cards/")


def document(length: int = 3000) -> str:
    line = "The rain went on over the fields, and nobody came along the road that day.\n"
    lines = [line] * (length // len(line))
    lines.insert(len(lines) // 3, "The secret number of Harold Marsh is 48213.\n")
    return "".join(lines)


@pytest.fixture(scope="module", params=["remamba-tiny", "remamba2-tiny", "memmamba-tiny"])
def reader(request):
    reader = Reader(*load_for_reading(str(CARDS / request.param), device="cpu"), prefill_chunk_length=256)
    yield reader
    reader.close()


def events_of(reader, text, question=QUESTION, path=None, length=8, session="a", **compression):
    return list(answer_events(reader, session, text, path, question, length, compression))


def plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", text))


@needs_cards
def test_answer_marks_and_facts(reader):
    events = events_of(reader, "\ufeff😀 é" + HOSTILE + "\n" + document())
    last = events[-1]
    assert last["answer"] == "48213"
    assert last["running"] is False
    marks = [html.unescape(mark) for mark in re.findall(r"<mark[^>]*>(.*?)</mark>", last["passages"], re.DOTALL)]
    assert any("48213" in mark or "Harold" in mark for mark in marks), marks
    assert HOSTILE in plain(last["passages"])
    assert "<img" not in last["passages"]
    facts = plain(last["facts"])
    for what in ("tokens/s", "MB", "GB", "kept" if reader.family.compresses else "noted"):
        assert what in facts
    assert 0 < last["strip"].count("<line") <= len(marks)
    assert any("Reading" in event.get("status", "") for event in events[:-1])


@needs_cards
def test_the_marks_are_the_kept_tokens(reader):
    job, future = reader.submit("marks", "é 😀 " + document(), QUESTION, 2)
    reading = future.result()
    reader.release("marks", job)
    tokens = reader.tokenizer(job.prompt)["input_ids"]
    assert len(tokens) == reading.prompt_tokens
    marked = [position for mark in job.marks for position in range(mark.tokens[0], mark.tokens[1] + 1)]
    if reading.notes:
        assert marked == sorted({position for layer in reading.notes for position in layer.positions})
    else:
        assert marked == reading.positions
    for mark in job.marks:
        if mark.tokens[0] > 8:  # of the characters before, tokens are parts
            text = reader.tokenizer.decode(tokens[mark.tokens[0] : mark.tokens[1] + 1])
            assert job.prompt[mark.start : mark.stop] == text


@needs_cards
def test_stop_while_reading_then_ask_again(reader):
    events = answer_events(reader, "a", document(400_000), None, QUESTION, 4, {})
    for event in events:
        if re.search(r"Reading: [1-9]", event["status"]):
            break
    reader.stop("another session")
    assert "Stopping" not in next(events)["status"]
    reader.stop("a")
    assert "Stopped before" in list(events)[-1]["status"]
    assert not reader.model._forward_hooks
    assert events_of(reader, document(1500))[-1]["answer"] == "48213"


@needs_cards
def test_stop_while_answering_keeps_what_there_is(reader, monkeypatch):
    monkeypatch.setattr(reader.model.generation_config, "eos_token_id", None)
    events = answer_events(reader, "a", document(1500), None, None, 100_000, {})
    for event in events:
        if event.get("answer"):
            break
    reader.stop("a")
    last = list(events)[-1]
    assert "Stopped." in last["status"]
    assert last["answer"]
    assert "<mark" in last["passages"]


@needs_cards
def test_a_question_that_was_replaced_says_nothing_more(reader):
    first = answer_events(reader, "a", document(400_000), None, QUESTION, 4, {})
    while "Reading: " not in next(first)["status"]:
        pass
    second = answer_events(reader, "a", document(1500), None, QUESTION, 8, {})
    next(second)
    next(second)
    assert list(first) == []
    assert list(second)[-1]["answer"] == "48213"
    assert not reader._jobs


@needs_cards
def test_one_at_a_time_and_a_closed_page_lets_the_next_begin(reader):
    first = answer_events(reader, "a", document(400_000), None, QUESTION, 4, {})
    while "Reading: " not in next(first)["status"]:
        pass
    second = answer_events(reader, "b", document(1500), None, QUESTION, 8, {})
    next(second)
    assert "Waiting" in next(second)["status"]
    third = answer_events(reader, "c", document(1500), None, QUESTION, 8, {})
    next(third)
    assert "Waiting" in next(third)["status"]
    reader.stop("c")
    assert "Stopped before" in list(third)[-1]["status"]  # though its turn has not come
    first.close()
    assert list(second)[-1]["answer"] == "48213"
    assert not reader._jobs


@needs_cards
def test_errors_are_sentences_and_the_page_goes_on(reader, monkeypatch, capsys):
    if reader.family.compresses:
        refused = plain(events_of(reader, "x y", compression_span=2.0)[-1]["status"])
        assert refused.startswith("compression_span")
        assert "not compressed" in events_of(reader, document(500), compress_prompt=False)[-1]["facts"]
    assert plain(events_of(reader, " \n")[-1]["status"]).startswith("The document is empty")
    assert plain(events_of(reader, "text", length=None)[-1]["status"]).startswith("Give a number")

    def failing(error):
        def read(*args, **kwargs):
            raise error

        monkeypatch.setattr(ui_reader, "read_and_answer", read)
        return plain(events_of(reader, "text")[-1]["status"])

    assert "too long for this machine's memory" in failing(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert "too long for this machine's memory" in failing(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert "too long for this machine's memory" in failing(MemoryError())
    assert not capsys.readouterr().err
    assert "(KeyError: '<b>')" in failing(KeyError("<b>"))
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert events_of(reader, document(1500))[-1]["answer"] == "48213"


@needs_cards
def test_a_failed_reading_leaves_nothing_in_memory(reader, monkeypatch):
    class State:
        pass

    held = []

    def read(*args, **kwargs):
        state = State()
        held.append(weakref.ref(state))
        raise MemoryError

    monkeypatch.setattr(ui_reader, "read_and_answer", read)
    gc.collect()
    gc.disable()  # a traceback's cycles would be found some time; the next reading needs the memory at once
    try:
        events_of(reader, "text")
        assert held[0]() is None
    finally:
        gc.enable()


def test_documents(tmp_path):
    good, bad, other, large = (tmp_path / name for name in ("a.md", "b.txt", "c.pdf", "d.txt"))
    good.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xf0\x9f\x98\x80")
    bad.write_bytes(b"abc\xff")
    other.write_bytes(b"%PDF")
    large.write_bytes(b"a" * (ui_reader.MAX_DOCUMENT_BYTES + 1))
    assert document_of("ignored", good) == "one\ntwo 😀"
    assert document_of("pasted", None) == "pasted"
    assert document_of("half a pair \ud83d", None) == "half a pair ?"
    gone = tmp_path / "gone.txt"
    for path, message in ((bad, r"UTF-8 \(byte 3"), (other, "plain text"), (large, "10 MB"), (gone, "Drop it again")):
        with pytest.raises(ValueError, match=message):
            document_of(None, path)
    with pytest.raises(ValueError, match="10 MB"):
        document_of("é" * (ui_reader.MAX_DOCUMENT_BYTES // 2 + 1), None)
    with pytest.raises(ValueError, match="empty"):
        document_of(None, None)


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Reader(None, types.SimpleNamespace(is_fast=False))

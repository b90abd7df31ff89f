# SPDX-License-Identifier: Apache-2.0
"""The page's HTML: marks at the kept tokens and nowhere else, escaping, excerpts of long texts, a strip of bounded size."""

import html
import itertools
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import remamba_hf
from remamba_hf.modeling.selective_compression import Window
from remamba_hf.reading import LayerNotes, Reading
from remamba_hf.ui_html import (
    Mark,
    error_html,
    escaped,
    facts_html,
    marked,
    marks_of,
    passages_html,
    status_html,
    strip_html,
)

CARDS = Path(remamba_hf.__file__).parent.parent / "model_cards"
HOSTILE = "<img src=x onerror=alert(1)>{{value}}${value}`'\"\\&amp;"

needs_cards = pytest.mark.skipif(not CARDS.is_dir(), reason="needs the repository's model_cards/")


def reading(positions=(), scores=(), prompt_tokens=1000, **others) -> Reading:
    window = Window(0, 900, len(positions)) if positions else Window(0, 0, 0)
    fields = dict(answer="", new_tokens=3, prefill_seconds=2.0, decode_seconds=0.5, state_bytes=1_500_000)
    fields |= dict(window=window, positions=list(positions), scores=list(scores), passages=[], device="cpu", dtype="float32")
    return Reading(prompt_tokens=prompt_tokens, **(fields | others))


def plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", text))


@needs_cards
def test_every_token_is_marked_where_its_bytes_are():
    """In a byte-level vocabulary a token's name has a sign for each of its bytes."""
    tokenizer = AutoTokenizer.from_pretrained(CARDS / "remamba-tiny")
    text = "naïve 😀😀 日本語 <|endoftext|>\r\n\te\u0301 \ufeff“x” 48213"
    bytes_before = [0]
    for sign in text:
        bytes_before.append(bytes_before[-1] + len(sign.encode()))
    ids = tokenizer(text)["input_ids"]
    begin = 0
    for position, name in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        end = begin + len(name)
        signs = [i for i in range(len(text)) if bytes_before[i] < end and bytes_before[i + 1] > begin]
        (mark,) = marks_of(reading([position], [1.0]), text, tokenizer)
        assert (mark.start, mark.stop, mark.tokens) == (signs[0], signs[-1] + 1, (position, position)), name
        begin = end
    assert begin == bytes_before[-1]
    every = marks_of(reading(range(len(ids)), [0.0] * len(ids)), text, tokenizer)
    assert [(mark.start, mark.stop) for mark in every] == [(0, len(text))]


@needs_cards
def test_marks_in_a_text_that_the_tokenizer_rewrites():
    tokenizer = AutoTokenizer.from_pretrained(CARDS / "memmamba-tiny")  # accents go, quotes and dashes become ASCII
    text = "“Élan” — ﬁne… straße Æsop ½ 日本 48213."
    seen = []
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])):
        marks = marks_of(reading([position], [1.0]), text, tokenizer)
        seen.append((token, *(text[mark.start : mark.stop] for mark in marks)))
    assert seen[:2] == [('"', "“"), ("E", "É")]
    assert seen[5:8] == [("Ġ--", " —"), ("Ġfine", " ﬁne"), ("...", "…")]
    assert ("?", "日") in seen
    assert [text for _, text in seen[-6:]] == list("48213.")


@needs_cards
def test_tokens_between_kept_ones_stay_unmarked():
    tokenizer = AutoTokenizer.from_pretrained(CARDS / "remamba-tiny")
    text = "7 " * 400
    kept, scores = [4, 5, 8, 10, *range(100, 300)], [0.5, 0.75, 0.25, -0.5, *[0.0] * 200]
    marks = marks_of(reading(kept, scores), text, tokenizer)
    assert [mark.tokens for mark in marks[:3]] == [(4, 5), (8, 8), (10, 10)]
    assert [mark.score for mark in marks[:3]] == [0.75, 0.25, -0.5]
    assert [mark.strength for mark in marks[:3]] == [1.0, 0.6, 0.0]
    runs = [mark.tokens for mark in marks[3:]]
    assert (runs[0][0], runs[-1][1]) == (100, 299)
    assert all(last - first < 64 for first, last in runs)
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(runs))


@needs_cards
def test_notes_are_marked_by_the_largest_read():
    tokenizer = AutoTokenizer.from_pretrained(CARDS / "memmamba-tiny")
    layers = [LayerNotes([7, 3], [0.9, 0.8], [0.1, 0.2]), LayerNotes([3], [0.7], [0.6])]
    noted = reading(notes=layers)
    marks = marks_of(noted, "a b c d e f g h i j", tokenizer)
    assert [(mark.tokens[0], mark.score) for mark in marks] == [(3, 0.6), (7, 0.1)]
    assert "2 tokens noted" in plain(facts_html(noted, ("1 GB", "memory")))
    assert "attention" in strip_html(noted, marks)


def test_marked_text_is_the_text_whatever_the_marks():
    text = HOSTILE * 3
    marks = [Mark(2, 9, (0, 1), 1.0, 1.0), Mark(8, 12, (1, 2), 0.5, 0.5), Mark(40, 900, (3, 4), 0.0, 0.0)]
    assert plain(marked(text, marks)) == text
    assert plain(marked(text, marks, 5, 50)) == text[5:50]


def test_all_text_is_escaped():
    signs = set("<>{}$`\\\"'")
    assert not signs & set(escaped(HOSTILE))
    for page in (status_html(HOSTILE, (1, 2)), error_html(HOSTILE), facts_html(reading(), (HOSTILE, HOSTILE))):
        assert "<img" not in page
        assert not set("{}$`\\") & set(page)
        assert HOSTILE in html.unescape(page)
    long = HOSTILE + " word" * 5000
    for text in (HOSTILE, long):
        page = passages_html(text, [Mark(0, len(HOSTILE), (0, 9), 1.0, 1.0)])
        assert "<img" not in page
        assert HOSTILE in html.unescape(page)


def test_long_texts_become_excerpts():
    text = "".join(f"word{i} " for i in range(200_000))
    marks = [Mark(start, start + 10, (start, start), score, score) for start, score in ((70_000, 0.1), (500_000, 1.0))]
    page = passages_html(text, marks)
    assert len(page) < 3000
    assert page.index(text[500_000:500_010]) < page.index(text[70_000:70_010])
    many = [Mark(start, start + 5, (start, start), 0.5, 0.5) for start in range(0, 1_000_000, 50)]
    page = passages_html(text, many)
    assert len(page) < 200_000
    assert page.count('class="remamba-excerpt"') == 40
    assert "The best 40 of" in page
    assert passages_html(text, []) == ""


def test_the_strip_is_bounded_and_keeps_the_best():
    marks = [Mark(i, i + 1, (i, i), 0.0, 0.0) for i in range(0, 100_000, 2)]
    marks[12_345] = marks[12_345]._replace(score=1.0, strength=1.0)
    strip = strip_html(reading([1], [1.0], prompt_tokens=100_000), marks)
    assert strip.count("<line") == 600
    assert strip.count(f"token {24_690:,}, score 1.00") == 1
    assert strip.rindex("<line") < strip.index("score 1.00")  # drawn last, on top


def test_slow_models_have_a_rate():
    facts = plain(facts_html(reading(decode_seconds=40.0, prefill_seconds=4e5), ("1 GB", "memory")))
    assert "0.05 tokens/s" in facts
    assert "0.0025 tokens/s" in facts
    assert "not compressed" in facts
    assert "1.50 MB" in facts
    assert "one token" in plain(facts_html(reading(new_tokens=1), ("1 GB", "memory")))

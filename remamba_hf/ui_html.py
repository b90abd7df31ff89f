# SPDX-License-Identifier: Apache-2.0
"""What the page of `remamba ui` shows of a reading, as HTML: the marked text, a strip of it, facts and status.

Documents come from anywhere, so all text goes through `escaped`.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .reading import Reading

_WHOLE_TEXT = 20_000  # characters up to which the document is shown whole
_SHOWN_EXCERPTS = 40
_CONTEXT = 160  # characters shown on either side of a mark
_EXCERPT_LENGTH = 600  # marks whose context meets share an excerpt of at most about so many characters
_LONGEST_MARK = 64  # tokens, so that a text kept whole does not become one excerpt
_STRIP_COLUMNS = 600  # of marks closer than that the best is drawn

CSS = """
.html-container { padding: 0 !important; }
.remamba-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; font-size: .92rem; }
.remamba-box { max-height: 32rem; overflow-y: auto; padding-right: .6rem; }
.remamba-text mark { background: rgb(255 150 0 / var(--strength)); color: inherit; border-radius: 3px; padding: .05em 0; }
.remamba-excerpt { border-top: 1px solid var(--border-color-primary); padding: .5rem 0; }
.remamba-where, .remamba-note, .remamba-facts span { opacity: .75; font-size: .8rem; }
.remamba-note { margin: .3rem 0; }
.remamba-strip { display: block; width: 100%; height: 64px; overflow: visible; }
.remamba-strip text { fill: currentColor; opacity: .75; font-size: 11px; }
.remamba-strip .paper { fill: var(--background-fill-secondary); stroke: var(--border-color-primary); }
.remamba-strip .window { fill: rgb(110 140 220 / .22); }
.remamba-strip line { stroke: rgb(225 120 0); }
.remamba-facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; }
.remamba-facts div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .5rem .7rem; }
.remamba-facts b { display: block; font-size: 1.05rem; }
.remamba-facts span { display: block; }
.remamba-status progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
.remamba-status progress:indeterminate { opacity: .4; }
.remamba-status .error { color: #b91c1c; font-weight: 600; overflow-wrap: anywhere; }
.dark .remamba-status .error { color: #fca5a5; }
"""


class Mark(NamedTuple):
    """Kept or noted tokens that follow each other in a text.

    start, stop: their characters.
    tokens: the first and the last of them.
    score: the best of theirs, as in `Reading.marked`.
    strength: from 0 for the least score of the text to 1 for the best.
    """

    start: int
    stop: int
    tokens: tuple[int, int]
    score: float
    strength: float

    def __str__(self) -> str:
        return _described(*self.tokens, self.score)


def marks_of(reading: Reading, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[Mark]:
    """The kept or noted tokens of a reading, and no others, in the characters of its prompt, in the prompt's order.

    A character that is several tokens is marked for any of them; special tokens that stand nowhere in the text are not.
    """
    positions, scores = reading.marked
    if not positions:
        return []
    tokens = tokenizer(prompt, verbose=False)
    least, range_ = min(scores), max(scores) - min(scores)
    marks: list[Mark] = []
    for position, score in zip(positions, scores, strict=True):
        place = tokens.token_to_chars(position)
        if place is None or place.start >= place.end:
            continue
        mark = Mark(place.start, place.end, (position, position), score, (score - least) / range_ if range_ else 1.0)
        last = marks[-1] if marks else None
        if last is not None and last.tokens[1] == position - 1 and position - last.tokens[0] < _LONGEST_MARK:
            marks[-1] = _joined(last, mark)
        else:
            marks.append(mark)
    return marks


def _joined(one: Mark, next_: Mark) -> Mark:
    best = max(one, next_, key=lambda mark: mark.score)
    return Mark(one.start, max(one.stop, next_.stop), (one.tokens[0], next_.tokens[1]), best.score, best.strength)


def escaped(text: str) -> str:
    """Text for HTML that Gradio puts through its templates: their signs are escaped as well."""
    return html.escape(text).translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"})


def marked(text: str, marks: Sequence[Mark], start: int = 0, stop: int | None = None) -> str:
    """A part of the text as HTML, with the marks in it."""
    stop = len(text) if stop is None else stop
    parts, here = [], start
    for mark in marks:
        begin, end = max(mark.start, here), min(mark.stop, stop)  # marks may share a character of several tokens
        if begin >= end:
            continue
        strength = 0.15 + 0.6 * mark.strength
        parts.append(escaped(text[here:begin]))
        parts.append(f'<mark style="--strength: {strength:.2f}" title="{mark}">{escaped(text[begin:end])}</mark>')
        here = end
    return "".join((*parts, escaped(text[here:stop])))


def passages_html(text: str, marks: Sequence[Mark]) -> str:
    """A short text whole; of a long one the best marks with what stands around them."""
    if not marks:
        return ""
    if len(text) <= _WHOLE_TEXT:
        return f'<div class="remamba-text remamba-box">{marked(text, marks)}</div>'
    excerpts = sorted(_excerpts(marks), key=lambda group: -max(mark.score for mark in group))
    shown = excerpts[:_SHOWN_EXCERPTS]
    places = "1 place" if len(excerpts) == 1 else f"{len(excerpts):,} places"
    count = f"The best {len(shown)} of {places}" if len(shown) < len(excerpts) else places
    parts = [f'<div class="remamba-note">{count} in a text of {len(text):,} characters, the best first.</div>']
    parts += [_excerpt_html(text, group) for group in shown]
    return f'<div class="remamba-box">{"".join(parts)}</div>'


def _excerpt_html(text: str, marks: Sequence[Mark]) -> str:
    start, stop = _with_context(text, marks[0].start, marks[-1].stop)
    before, after = "… " if start else "", " …" if stop < len(text) else ""
    best = max(mark.score for mark in marks)
    where = f"{start / len(text):.0%} of the way, {_described(marks[0].tokens[0], marks[-1].tokens[1], best)}"
    passage = f'<div class="remamba-text">{before}{marked(text, marks, start, stop)}{after}</div>'
    return f'<div class="remamba-excerpt"><div class="remamba-where">{where}</div>{passage}</div>'


def _with_context(text: str, start: int, stop: int) -> tuple[int, int]:
    """A passage's bounds with some context, of whole words where the text has words."""
    begin, end = max(start - _CONTEXT, 0), min(stop + _CONTEXT, len(text))
    first, last = text.find(" ", begin, start), text.rfind(" ", stop, end)
    return (first + 1 if begin and first >= 0 else begin), (last if end < len(text) and last >= 0 else end)


def _excerpts(marks: Sequence[Mark]) -> list[list[Mark]]:
    """Marks in groups whose contexts meet, none much longer than an excerpt should be."""
    groups: list[list[Mark]] = []
    for mark in marks:
        near = groups and mark.start - groups[-1][-1].stop < 2 * _CONTEXT
        if near and mark.stop - groups[-1][0].start <= _EXCERPT_LENGTH:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def strip_html(reading: Reading, marks: Sequence[Mark]) -> str:
    """A picture of the prompt as a strip, with a line where marks are, the higher and darker the better their score."""
    if not marks:
        return ""
    length, window = reading.prompt_tokens, reading.window
    shapes = ['<rect class="paper" x="0" y="4" width="100%" height="40" rx="4"/>']
    if window.length:
        begin, width = 100 * window.start / length, 100 * window.length / length
        shapes.append(f'<rect class="window" x="{begin:.3f}%" y="4" width="{width:.3f}%" height="40"/>')
    columns: dict[int, Mark] = {}
    for mark in sorted(marks, key=lambda mark: mark.strength):  # the best is drawn, and on top
        columns.pop(column := mark.tokens[0] * _STRIP_COLUMNS // length, None)
        columns[column] = mark
    shapes += [_line(mark, length) for mark in columns.values()]
    for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
        shapes.append(f'<text x="{share:.0%}" y="60" text-anchor="{anchor}">{share * length:,.0f}</text>')
    if reading.notes:
        text = "height and score: the largest share of a layer's attention that a note of the tokens got; below: tokens"
    else:
        text = "height and score: cosine of the kept tokens; blue: the window that was compressed; below: tokens"
    picture = f'<svg class="remamba-strip" role="img" aria-label="where the marks lie">{"".join(shapes)}</svg>'
    return f'{picture}<div class="remamba-note">{text}</div>'


def _line(mark: Mark, length: int) -> str:
    x, top = 100 * (mark.tokens[0] + 0.5) / length, 40 - 34 * mark.strength
    strength = f'stroke-width="{1 + 1.5 * mark.strength:.1f}" opacity="{0.35 + 0.65 * mark.strength:.2f}"'
    return f'<line x1="{x:.3f}%" x2="{x:.3f}%" y1="44" y2="{top:.1f}" {strength}><title>{mark}</title></line>'


def facts_html(reading: Reading, memory: tuple[str, str]) -> str:
    """What was read and kept, how fast, and in how much memory (a value and what it is of)."""
    rate = reading.decode_rate
    facts = (
        (f"{reading.prompt_tokens:,} tokens", "document and question"),
        (f"{_rate(reading.prefill_rate)} tokens/s", f"reading, {reading.prefill_seconds:.1f} s"),
        (f"{_rate(rate)} tokens/s" if rate is not None else "one token", f"answering, {reading.new_tokens} new"),
        _kept(reading),
        (f"{reading.state_bytes / 1e6:.2f} MB", "state, at any length"),
        memory,
    )
    tiles = (f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for value, name in facts)
    return f'<div class="remamba-facts">{"".join(tiles)}</div>'


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _kept(reading: Reading) -> tuple[str, str]:
    if reading.notes:
        return f"{len(reading.marked[0]):,} tokens noted", f"in {len(reading.notes)} layers"
    if not reading.window.length:
        return "not compressed", "read as plain Mamba does"
    return f"{len(reading.positions):,} kept", f"of {reading.window.length:,} in the window"


def _described(first: int, last: int, score: float) -> str:
    tokens = f"token {first:,}" if first == last else f"tokens {first:,} to {last:,}"
    return f"{tokens}, score {score:.2f}"


def status_html(text: str, progress: tuple[int, int] | None = None) -> str:
    """A line on what is going on. progress: done and to do, as a bar; to do 0: nobody knows."""
    bar = ""
    if progress is not None:
        value = f' value="{progress[0]}" max="{progress[1]}"' if progress[1] else ""
        bar = f'<progress{value} aria-label="progress"></progress>'
    return f'<div class="remamba-status"><div role="status">{escaped(text)}</div>{bar}</div>'


def error_html(text: str) -> str:
    """A line on what went wrong."""
    return f'<div class="remamba-status"><div class="error" role="alert">{escaped(text)}</div></div>'

# SPDX-License-Identifier: Apache-2.0
"""The index rule, the selection and the splice, apart from any model."""

import math
from types import SimpleNamespace

import pytest
import torch

from modeling_tests.modeling import reference_two_stages as reference
from modeling_tests.modeling.tiny_models import assert_close, tiny_config
from remamba_hf.modeling.selective_compression import (
    CompressedPrompt,
    SelectiveCompressor,
    Setting,
    Window,
    settings_for_rows,
    training_settings,
    training_window,
    window_of,
)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("prompt", "start", "span", "ratio", "expected"),
    [
        (5500, 0.0, 0.18, 0.009, (0, 990, 9)),
        (5500, 0.0, 0.25, 0.05, (0, 1375, 69)),
        (100, 0.0, 0.28, 1.0, (0, 29, 29)),  # 100 * 0.28 is a little above 28 in floats
        (50, 0.0, 0.14, 1.0, (0, 8, 8)),
        (10, 0.29, 0.1, 1.0, (2, 1, 1)),  # the start is rounded down
        (100, 0.57, 0.1, 0.5, (56, 10, 5)),  # 0.57 * 100 is a little below 57
        (10, 0.0, 1.0, 1.0, (0, 9, 9)),  # the query is never in the window
        (10, 0.0, 1.0, 0.5, (0, 9, 5)),  # and K follows the shortened window
        (10, 0.5, 0.5, 0.5, (5, 4, 2)),
        (100, 0.0, 1e-9, 1e-9, (0, 1, 1)),
        (2, 0.0, 0.18, 0.009, (0, 1, 1)),
        (3, 0.9, 0.1, 1.0, None),  # the window would begin at the query
        (1, 0.0, 0.5, 0.5, None),
    ],
)
def test_the_index_rule(prompt, start, span, ratio, expected):
    window = window_of(prompt, Setting(start, span, ratio))
    assert window == (Window(0, 0, 0) if expected is None else Window(*expected))


def test_the_index_rule_over_many_prompts():
    generator = torch.Generator().manual_seed(0)
    for start, span, ratio in torch.rand(300, 3, generator=generator, dtype=torch.float64).tolist():
        start = start * (1 - span)
        for prompt in (1, 2, 3, 7, 100, 4097):
            window = window_of(prompt, Setting(start, span, ratio))
            begin, length, kept = reference.window_of(prompt, start, span, ratio)
            assert window == (Window(begin, length, kept) if length > 0 else Window(0, 0, 0))
            if window.length:
                assert 1 <= window.kept <= window.length
                assert window.stop <= prompt - 1


def test_short_prompts_are_left_alone():
    setting = Setting(0.0, 0.5, 0.5)
    assert window_of(1000, setting, max_kept=7) == window_of(1000, setting)._replace(kept=7)
    assert window_of(10, setting, max_kept=100) == window_of(10, setting)
    assert window_of(99, setting, min_prompt=100).length == 0
    assert window_of(100, setting, min_prompt=100).length == 50


@pytest.mark.parametrize("prompt", [100, 1599, 1600, 1601, 1700, 2000, 6000])
@pytest.mark.parametrize("seed", range(5))
def test_the_authors_training_rule(prompt, seed):
    """P > 1600: p ~ U(.1, .3), M = min(ceil(P p), P - 1500); else p = .1; rho ~ U(.05, .2) always; s = 0."""
    config = tiny_config(
        compression_start=0.0,
        train_compression_span=(0.1, 0.3),
        train_compression_ratio=(0.05, 0.2),
        train_compression_tail=1500,
    )
    torch.manual_seed(seed)
    drawn = training_settings(config, 1)[0]
    assert drawn.start == 0.0
    assert 0.1 <= drawn.span <= 0.3
    assert 0.05 <= drawn.ratio <= 0.2
    window = training_window(config, prompt, drawn)
    span = drawn.span if prompt > 1600 else 0.1
    length = math.ceil(prompt * span)
    if prompt > 1600:
        length = min(length, prompt - 1500)
    assert window == Window(0, length, math.ceil(length * drawn.ratio))


def test_training_draws_follow_the_seed_and_fill_their_ranges():
    config = tiny_config(
        train_compression_start=(0.0, 0.4), train_compression_span=(0.1, 0.3), train_compression_ratio=(0.05, 0.2)
    )

    def draws(seed, count):
        torch.manual_seed(seed)
        return [training_settings(config, 1)[0] for _ in range(count)]

    assert draws(3, 20) == draws(3, 20)
    assert draws(3, 20) != draws(4, 20)
    columns = torch.tensor(draws(0, 2000), dtype=torch.float64)
    low, high = torch.tensor([0.0, 0.1, 0.05]), torch.tensor([0.4, 0.3, 0.2])
    assert (columns >= low).all()
    assert (columns <= high).all()
    assert ((columns.mean(0) - (low + high) / 2).abs() < 0.02 * (high - low)).all()
    assert ((columns.amin(0) - low) < 0.01).all()
    assert ((high - columns.amax(0)) < 0.01).all()


def test_seeds_make_a_rows_draw_its_own():
    config = tiny_config(train_compression_start=(0.0, 0.4), train_compression_span=(0.1, 0.3), train_compression_ratio=None)
    before = torch.get_rng_state()
    rows = training_settings(config, 3, seeds=[5, 6, 5])
    assert rows[0] == rows[2] == training_settings(config, 1, seeds=[5])[0]
    assert rows[0].start != rows[1].start
    assert rows[0].span != rows[1].span
    assert {row.ratio for row in rows} == {config.compression_ratio}
    # What is given for the call is not drawn, and leaves the other draws as they were.
    assert training_settings(config, 2, span=[0.2, 0.3], seeds=[5, 6]) == [
        rows[0]._replace(span=0.2),
        rows[1]._replace(span=0.3),
    ]
    assert torch.equal(torch.get_rng_state(), before)
    many = torch.tensor(training_settings(config, 2000, seeds=list(range(2000))), dtype=torch.float64)[:, :2]
    low, high = torch.tensor([0.0, 0.1]), torch.tensor([0.4, 0.3])
    assert ((many.mean(0) - (low + high) / 2).abs() < 0.02 * (high - low)).all()
    assert ((many.amin(0) - low) < 0.01).all()
    assert ((high - many.amax(0)) < 0.01).all()
    assert abs(torch.corrcoef(many.T)[0, 1]) < 0.1


def test_fixed_settings_draw_nothing():
    config = tiny_config()
    before = torch.get_rng_state()
    assert training_settings(config, 1)[0] == Setting(0.1, 0.5, 0.3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "given", [0.25, [0.25, 0.25], (0.25, 0.25), torch.tensor([0.25, 0.25], dtype=torch.float64), torch.tensor(0.25)]
)
def test_a_setting_may_be_one_number_or_one_a_row(given):
    assert settings_for_rows(tiny_config(), 2, span=given) == [Setting(0.1, 0.25, 0.3)] * 2


def compressor_with(scores):
    """A compressor whose scores are given: only what follows them is under test."""
    compressor = SelectiveCompressor(16).double()
    compressor.scores = lambda query, states: scores
    return compressor


def select(scores, windows, selection="score"):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    states = torch.randn(*scores.shape, 16, dtype=torch.float64)
    return compressor_with(scores)(states[:, 0], states, windows, tiny_config(selection=selection)), states


@pytest.mark.smoke
def test_the_best_are_kept_in_the_order_of_the_text():
    chosen, _ = select([[0.1, 0.9, -0.5, 0.8, 0.3]], [Window(7, 5, 3)])
    assert chosen.positions.tolist() == [[8, 10, 11]]
    assert chosen.scores.tolist() == [[0.9, 0.8, 0.3]]


@pytest.mark.parametrize("kept", range(1, 7))
def test_of_equal_scores_the_earlier_position_wins(kept):
    chosen, _ = select([[0.5] * 6], [Window(2, 6, kept)])
    assert chosen.positions.tolist() == [list(range(2, 2 + kept))]
    chosen, _ = select([[0.1, 0.5, 0.5, 0.9, 0.5, 0.5]], [Window(0, 6, kept)])
    assert chosen.positions.tolist() == [sorted([3, 1, 2, 4, 5, 0][:kept])]


def test_many_ties_are_stable():
    """Sorts and top-k of torch need not be stable on long inputs."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (1, 5000), generator=generator).double()
    chosen, _ = select(scores, [Window(0, 5000, 1700)])
    order = sorted(range(5000), key=lambda i: (-scores[0, i].item(), i))
    assert chosen.positions[0].tolist() == sorted(order[:1700])


def test_negative_scores_close_the_step():
    chosen, _ = select([[-0.2, -0.9, 0.4]], [Window(0, 3, 3)])
    assert chosen.alpha.tolist() == [[0.0, 0.0, 0.4]]
    assert chosen.scores.tolist() == [[-0.2, -0.9, 0.4]]


def test_rows_have_their_own_windows():
    """Scores behind a row's own window, here the highest, do not count."""
    scores = [[0.1, 0.2, 0.3, 9.0, 9.0], [0.5, 0.4, 0.3, 0.2, 0.1], [9.0] * 5]
    chosen, _ = select(scores, [Window(4, 3, 1), Window(0, 5, 3), Window(0, 0, 0)])
    assert chosen.positions.tolist() == [[6, -1, -1], [0, 1, 2], [-1, -1, -1]]
    assert chosen.scores.tolist() == [[0.3, 0.0, 0.0], [0.5, 0.4, 0.3], [0.0, 0.0, 0.0]]
    assert chosen.alpha.tolist() == [[0.3, 0.0, 0.0], [0.5, 0.4, 0.3], [0.0, 0.0, 0.0]]


def test_stride_is_evenly_spaced():
    chosen, _ = select(torch.zeros(2, 10), [Window(3, 10, 4), Window(0, 7, 3)], "stride")
    assert chosen.positions.tolist() == [[3, 5, 8, 10], [0, 2, 4, -1]]


def test_random_is_a_fixed_subset_of_the_window():
    scores, windows = torch.zeros(2, 40, dtype=torch.float64), [Window(3, 40, 9), Window(0, 40, 9)]
    compressor, states = compressor_with(scores), torch.randn(2, 40, 16, dtype=torch.float64)
    before = torch.get_rng_state()
    first, second = compressor(states[:, 0], states, windows, tiny_config(selection="random")).positions.tolist()
    assert torch.equal(torch.get_rng_state(), before), "the ablation must not disturb the caller's random numbers"
    assert first == sorted(set(first))
    assert [position - 3 for position in first] == second
    assert first[0] >= 3
    assert first[-1] < 43
    assert second != list(range(9))
    again, _ = select(torch.zeros(1, 40), [Window(3, 40, 9)], "random")
    assert again.positions[0].tolist() == first


def test_multiplicative_puts_the_weights_into_the_values():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    windows = [Window(0, 3, 2), Window(0, 2, 1), Window(0, 0, 0)]
    compressor, states = compressor_with(scores), torch.randn(3, 3, 16, dtype=torch.float64)
    plain = compressor(states[:, 0], states, windows, tiny_config())
    weighted = compressor(states[:, 0], states, windows, tiny_config(selection="multiplicative"))
    assert not weighted.adapts
    assert weighted.positions.tolist() == plain.positions.tolist() == [[0, 2], [1, -1], [-1, -1]]
    weights = torch.tensor([0.9, 0.5], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weighted.values[0], plain.values[0] * weights[:, None])
    torch.testing.assert_close(weighted.values[1, 0], plain.values[1, 0])
    assert weighted.values[1, 1].abs().max() == 0
    weighted.values.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in compressor.parameters())


@pytest.mark.parametrize("scale", [False, True])
def test_the_scores_gradient_is_scaled_by_the_score(scale):
    scores = torch.tensor([[0.9, -0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    states = torch.randn(1, 3, 16, dtype=torch.float64)
    config = tiny_config(scale_score_gradient=scale)
    chosen = compressor_with(scores)(states[:, 0], states, [Window(0, 3, 3)], config)
    (gradient,) = torch.autograd.grad((chosen.alpha * torch.tensor([2.0, 2.0, 3.0])).sum(), scores)
    expected = [[2.0 * 0.9, 0.0, 3.0 * 0.5]] if scale else [[2.0, 0.0, 3.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_scores_in_pieces_are_the_same(monkeypatch):
    from remamba_hf.modeling import selective_compression

    compressor = SelectiveCompressor(16).double()
    query, states = torch.randn(2, 16).double(), torch.randn(2, 23, 16).double()
    whole = compressor.scores(query, states)
    monkeypatch.setattr(selective_compression, "_SCORED_AT_ONCE", 4)
    with torch.no_grad():
        assert_close(compressor.scores(query, states), whole, 1e-14)


def test_scores_of_zero_states_are_zero():
    """A cosine with a zero vector: no NaN, neither forward nor backward."""
    compressor = SelectiveCompressor(16).double()
    for linear in (*compressor.query, *compressor.key):
        if isinstance(linear, torch.nn.Linear):
            torch.nn.init.zeros_(linear.bias)
    query = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
    scores = compressor.scores(query, torch.randn(1, 4, 16, dtype=torch.float64))
    assert scores.tolist() == [[0.0] * 4]
    scores.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("begin_end", [(0, 12), (0, 3), (2, 5), (3, 4), (5, 12), (7, 7)])
def test_splice_in_any_chunk(begin_end):
    """Three rows: a window in the middle, one at the start, none."""
    begin, end = begin_end
    windows = [Window(3, 6, 2), Window(0, 4, 3), Window(0, 0, 0)]
    lengths = [14, 10, 12]
    values = torch.arange(9.0).view(3, 3, 1) + 100
    selection = SimpleNamespace(values=values, alpha=torch.arange(9.0).view(3, 3), adapts=True)
    shortened = [length - window.dropped for length, window in zip(lengths, windows, strict=True)]
    prompt = CompressedPrompt(windows, selection, shortened)
    sources = prompt.sources(torch.device("cpu"))
    assert sources.shape == (3, 12)
    spliced, adaptation = prompt.splice(sources[:, begin:end].unsqueeze(-1).float(), begin)
    rows = [
        [0, 1, 2, 100, 101, 9, 10, 11, 12, 13],
        [103, 104, 105, 4, 5, 6, 7, 8, 9],
        list(range(12)),
    ]
    alphas = {}
    for row, expected in enumerate(rows):
        assert spliced[row, : max(len(expected) - begin, 0), 0].tolist() == expected[begin:end]
        for column in range(begin, min(end, len(expected))):
            if expected[column] >= 100:
                alphas[row * (end - begin) + column - begin] = expected[column] - 100.0
    if adaptation is None:
        assert not alphas
    else:
        assert dict(zip(adaptation[0].tolist(), adaptation.alpha.tolist(), strict=True)) == alphas

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from remamba_hf.training.step_sampler import StepSampler, row_lengths

datasets = pytest.importorskip("datasets")


def steps(sampler):
    return np.array(list(sampler)).reshape(-1, sampler.batch)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_order_of_whole_steps_from_seed_and_epoch(grouped):
    lengths = np.random.default_rng(0).integers(1, 1000, size=103).tolist() if grouped else None
    epoch = 0

    def sampler(seed=0):
        return StepSampler(103, 4, seed, lambda: epoch, lengths)

    first = sampler()
    assert len(first) == 100
    order = list(first)
    assert len(set(order)) == 100
    assert set(order) < set(range(103))
    assert list(first) == list(sampler()) == order  # asked again, or in another process
    assert list(sampler(seed=1)) != order
    epoch = 1
    second = list(first)
    assert second != order
    assert set(second) != set(order)  # other rows are left out
    assert second != list(StepSampler(103, 4, 1, lambda: 0, lengths))


def test_rows_of_like_length_share_steps():
    lengths = np.random.default_rng(0).integers(1, 1000, size=1000)
    mixed, grouped = (steps(StepSampler(1000, 8, 0, lambda: 0, given)) for given in (None, lengths.tolist()))
    pads = [int((lengths[rows].max(1, keepdims=True) - lengths[rows]).sum()) for rows in (mixed, grouped)]
    assert pads[1] < pads[0] / 10
    # Steps are not sorted by length, and their rows differ from epoch to epoch.
    means = lengths[grouped].mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    later = steps(StepSampler(1000, 8, 0, lambda: 1, lengths.tolist()))
    assert {frozenset(rows) for rows in grouped.tolist()}.isdisjoint(frozenset(rows) for rows in later.tolist())


def test_what_gives_no_order_is_refused():
    with pytest.raises(ValueError, match="3 rows do not fill a step of 4: give more data, or a smaller batch"):
        StepSampler(3, 4, 0, lambda: 0)
    with pytest.raises(ValueError, match="2 lengths for 4 rows"):
        StepSampler(4, 4, 0, lambda: 0, [1, 2])


def test_lengths_of_rows():
    rows = datasets.Dataset.from_dict({"prompt_ids": [[1, 2], [3]], "response_ids": [[4], [5, 6, 7]], "cut": [True, False]})
    assert row_lengths(rows) == [3, 4]
    assert row_lengths(rows.select([1])) == [4]

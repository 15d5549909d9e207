"""data's metrics against scikit-learn's and scipy's."""
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

import data

REFERENCES = {
    "accuracy": lambda p, y: metrics.accuracy_score(y, p),
    "f1": lambda p, y: metrics.f1_score(y, p, zero_division=0),
    "matthews": lambda p, y: metrics.matthews_corrcoef(y, p),
    "pearson": lambda p, y: stats.pearsonr(p, y)[0],
    "spearman": lambda p, y: stats.spearmanr(p, y)[0],
}
REALS = ("pearson", "spearman")


def compare(name, predictions, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # theirs warn of what ours returns 0 for
        theirs = REFERENCES[name](predictions, labels)
    expected = 0.0 if np.isnan(theirs) else theirs
    assert data.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_random(name):
    """500 random vectors of 2 to 60 entries, balanced and skewed, with and without ties: each
    metric equals the reference's to 1e-12."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, share = rng.integers(2, 60), rng.uniform()
        if name in REALS:
            labels = rng.uniform(0, 5, n).round(rng.integers(0, 6))
            predictions = (labels * rng.normal() + rng.normal(0, 1, n)).round(rng.integers(0, 6))
        else:
            labels = (rng.random(n) < share).astype(int)
            predictions = np.where(rng.random(n) < 0.7, labels, 1 - labels)
        compare(name, predictions, labels)


@pytest.mark.parametrize("name", REFERENCES)
def test_degenerate(name):
    """All predictions or labels equal, two entries, all wrong: the reference's value, 0 for NaN."""
    for predictions, labels in (
            ([0, 0, 0, 0], [0, 1, 0, 1]), ([1, 1, 1, 1], [0, 1, 0, 1]),
            ([0, 1, 0, 1], [1, 1, 1, 1]), ([0, 0, 0], [0, 0, 0]), ([1, 1, 1], [1, 1, 1]),
            ([1, 1, 1], [0, 0, 0]), ([0, 1], [0, 1]), ([0, 1], [1, 0]), ([1, 0, 0], [0, 1, 1])):
        compare(name, np.array(predictions), np.array(labels))


@pytest.mark.parametrize("name", REALS)
def test_scales(name):
    """Predictions tiny, huge, far from 0 or negated: the reference's value to 1e-6 (at 1e6 ± 1e-6
    float64 itself has no more digits)."""
    labels = np.random.default_rng(1).uniform(0, 5, 50)
    for scale, shift in ((1e-150, 0), (1e150, 0), (1e-6, 1e6), (-1, 0), (3, 7)):
        predictions = labels * scale + shift
        expected = REFERENCES[name](predictions, labels)
        assert data.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-6)


def test_nan():
    """NaN and infinite predictions give what scipy gives: NaN, but for the ranks of an infinite
    one."""
    labels = np.array([1.0, 3.0, 2.0, 5.0])
    for name in REALS:
        for odd in (np.nan, np.inf, -np.inf):
            predictions = np.array([1.0, odd, 2.0, 3.0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = REFERENCES[name](predictions, labels)
            found = data.METRICS[name](predictions, labels)
            assert found == pytest.approx(expected, abs=1e-12, nan_ok=True), (name, odd)
            assert np.isnan(found) or (name == "spearman" and np.isinf(odd))

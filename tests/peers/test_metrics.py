"""data's metrics against scikit-learn's and scipy's."""
from itertools import product

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


def random_pairs(name):
    """Predictions and labels of 2 to 60 entries, balanced and skewed, with and without ties."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, share = rng.integers(2, 60), rng.uniform()
        if name in REALS:
            labels = rng.uniform(0, 5, n).round(rng.integers(0, 6))
            yield (labels * rng.normal() + rng.normal(0, 1, n)).round(rng.integers(0, 6)), labels
        else:
            labels = (rng.random(n) < share).astype(int)
            yield np.where(rng.random(n) < 0.7, labels, 1 - labels), labels


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.filterwarnings("ignore")  # theirs warn of what ours returns 0 for
def test_metric(name):
    """500 random pairs and all pairs of three bits: the reference's value to 1e-12, 0 for NaN."""
    bits = [np.array(bits) for bits in product((0, 1), repeat=3)]
    for predictions, labels in [*random_pairs(name), *product(bits, repeat=2)]:
        theirs = REFERENCES[name](predictions, labels)
        expected = 0.0 if np.isnan(theirs) else theirs
        assert data.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", REALS)
@pytest.mark.filterwarnings("ignore")
def test_scales_and_nan(name):
    """Predictions tiny, huge, far from 0 or negated: the reference's value to 1e-6 (at 1e6 ± 1e-6
    float64 itself has no more digits). If one is NaN or infinite: NaN, but ranks may order it."""
    labels = np.random.default_rng(1).uniform(0, 5, 50)
    odd = labels.copy()
    for scale, shift in ((1e-150, 0), (1e150, 0), (1e-6, 1e6), (-1, 0), (3, 7)):
        predictions = labels * scale + shift
        expected = REFERENCES[name](predictions, labels)
        assert data.METRICS[name](predictions, labels) == pytest.approx(expected, abs=1e-6)
    for odd[1] in (np.nan, np.inf, -np.inf):
        found = data.METRICS[name](odd, labels)
        assert found == pytest.approx(REFERENCES[name](odd, labels), abs=1e-12, nan_ok=True)
        assert np.isnan(found) == (name == "pearson" or np.isnan(odd[1]))

"""data's correlations against scipy's. (Other metrics: test_recordings.py, with scikit-learn.)"""
import numpy as np
import pytest
from scipy import stats

import data

REFERENCES = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.filterwarnings("ignore")  # theirs warn of what they return NaN for
def test_scales_and_nan(name):
    """Predictions tiny, huge, far from 0 or negated: the reference's value to 1e-6 (at 1e6 ± 1e-6
    float64 itself has no more digits). If one is NaN or infinite: NaN, but ranks may order it."""
    ours, theirs = data.METRICS[name], REFERENCES[name]
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 5, 50)
    far = 1e-6 * labels + 1e6
    for predictions in (1e-150 * labels, 1e150 * labels, far, -labels):
        expected, _ = theirs(predictions, labels)
        assert ours(predictions, labels) == pytest.approx(expected, abs=1e-6)
    odd = labels.copy()
    for odd[1] in (np.nan, np.inf, -np.inf):
        found, (expected, _) = ours(odd, labels), theirs(odd, labels)
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert np.isnan(found) == (name == "pearson" or np.isnan(odd[1]))

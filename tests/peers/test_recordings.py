"""The numbers in tests/fixtures, recorded from libraries, against what these compute now."""
import json

import pytest
from fixtures import record
from torch.utils._pytree import tree_flatten


@pytest.mark.parametrize("function", record.NEEDS)
def test_recorded_again(function):
    """Each function returns the texts and numbers that are recorded, to 1e-5."""
    if function in (record.bpe, record.transformers) and not record.MODEL.exists():
        pytest.skip("needs ../shared/models")
    recorded = record.recorded(function.__name__)
    del recorded["versions"]
    again = json.loads(json.dumps(function()))
    (theirs, spec), (ours, other) = tree_flatten(again), tree_flatten(recorded)
    assert spec == other
    for x, y in zip(theirs, ours):
        if isinstance(y, float):
            y = pytest.approx(y, rel=1e-5, abs=1e-6)
        assert x == y

"""The numbers in tests/fixtures, which tests without these libraries compare with, against what the
libraries compute now."""
import json

import pytest
from fixtures import record


def close(a, b, path=""):
    """Assert that two trees of JSON are equal, numbers to 1e-5."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        a, b = [*a.values()], [b[key] for key in a]
    if isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            close(*pair, f"{path}/{i}")
    else:
        assert a == (pytest.approx(b, rel=1e-5, abs=1e-6) if isinstance(b, float) else b), path


@pytest.mark.parametrize("function", record.NEEDS)
def test_recorded_again(function):
    """Each function returns the numbers that are recorded."""
    if function in (record.bpe, record.transformers) and not record.MODEL.exists():
        pytest.skip("needs ../shared/models")
    recorded = json.loads((record.HERE / f"{function.__name__}.json").read_text())
    del recorded["versions"]
    close(json.loads(json.dumps(function())), recorded)

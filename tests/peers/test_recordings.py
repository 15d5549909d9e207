"""The numbers in tests/fixtures, which tests without these libraries compare with, against what the
libraries compute now."""
import importlib.util
import json
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


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


@pytest.mark.parametrize("script", sorted(FIXTURES.glob("record_*.py")), ids=lambda path: path.stem)
def test_recorded_again(script, tmp_path, monkeypatch):
    """Each script, run into another folder, writes the numbers that are recorded."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not getattr(module, "FOLDER", getattr(module, "MODEL", FIXTURES)).exists():
        pytest.skip("needs ../shared/models")
    name = script.stem.removeprefix("record_") + ".json"
    written = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path.name: text}))
    module.main()
    again, recorded = json.loads(written[name]), json.loads((FIXTURES / name).read_text())
    assert again.pop("versions").keys() == recorded.pop("versions").keys()
    close(again, recorded)

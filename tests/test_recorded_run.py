"""A whole run against the weights that the first version of this code left (commit 9e2914a).

The task, the tiny model, the seed and every setting are the same: the defaults of that version,
spelled out. fixtures/run.json holds a few values, the sum and the sum of squares of every tensor of
the saved adapter, the loss of every step, and the ranks.
"""
import json
from pathlib import Path

import pytest
from tiny import lines, run

import data
from dora import read_safetensors

RECORDED = json.loads((Path(__file__).parent / "fixtures/run.json").read_text())
SETTINGS = dict(
    method="dora", rank=2.0, start_rank=3, alpha=8.0, init="zero_b", scale="rank",
    importance="sensitivity", beta1=0.85, beta2=0.85, schedule="fast_first", initial_phase=0.15,
    final_phase=0.5, penalty="dem", eta=0.3, dropout=0.1, dropout_on="components", lr=3e-3,
    weight_decay=0.01, clip=1.0, warmup=0.06, budget_unit="components")


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-9), ("float32", 1e-3)])
def test_the_same_run_leaves_the_same_weights(tmp_path, monkeypatch, dtype, rtol):
    """Losses, ranks and saved weights equal the recorded ones. (Bit for bit on the machine that
    recorded them; kernels of other CPUs add up in another order.)"""
    recorded = RECORDED["runs"][dtype]
    monkeypatch.setattr(data, "TOY_PHRASES", (1, 3))  # the sentences of that version
    found = run(tmp_path / "run", dtype=dtype, **SETTINGS)
    assert found["ranks"] == recorded["ranks"]
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(
        recorded["losses"], rel=rtol)

    tensors = read_safetensors(tmp_path / "run/adapter/adapter_model.safetensors")
    assert sorted(tensors) == sorted(recorded["tensors"])
    for name, tensor in tensors.items():
        expected, flat = recorded["tensors"][name], tensor.double().flatten()
        size = (expected["squares"] / max(1, len(flat))) ** 0.5  # root mean square of an entry
        assert list(tensor.shape) == expected["shape"]
        assert flat[:6].tolist() == pytest.approx(expected["values"], rel=rtol, abs=rtol * size)
        assert flat.square().sum().item() == pytest.approx(expected["squares"], rel=rtol)
        assert flat.sum().item() == pytest.approx(expected["sum"], rel=rtol,
                                                  abs=rtol * size * len(flat))

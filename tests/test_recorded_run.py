"""A whole run against the weights that the first version of this code left (commit 9e2914a).

The task, the tiny model, the seed and every setting are the same: the defaults of that version,
spelled out. fixtures/run.json holds a few values, the sum and the sum of squares of every tensor of
the saved adapter, the loss of every step, and the ranks.
"""
import functools

import pytest
from fixtures.record import recorded
from tiny import lines, run

import data
from dora import read_safetensors

RECORDED = recorded("run")["runs"]
SETTINGS = dict(
    method="dora", rank=2.0, start_rank=3, alpha=8.0,
    init="zero_b", scale="rank", dropout=0.1, dropout_on="components",
    importance="sensitivity", beta1=0.85, beta2=0.85,
    schedule="fast_first",
    initial_phase=0.15, final_phase=0.5,
    budget_unit="components", penalty="dem", eta=0.3,
    lr=3e-3, weight_decay=0.01, clip=1.0, warmup=0.06)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-9), ("float32", 1e-3)])
def test_the_same_run_leaves_the_same_weights(tmp_path, monkeypatch, dtype, rtol):
    """Losses, ranks and saved weights equal the recorded ones. (Bit for bit on the machine that
    recorded them; kernels of other CPUs add up in another order.)"""
    recorded = RECORDED[dtype]
    monkeypatch.setattr(data, "TOY_PHRASES", (1, 3))  # the sentences of that version
    found = run(tmp_path / "run", dtype=dtype, **SETTINGS)
    assert found["ranks"] == recorded["ranks"]
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses == pytest.approx(recorded["losses"], rel=rtol)

    near = functools.partial(pytest.approx, rel=rtol)
    tensors = read_safetensors(tmp_path / "run/adapter/adapter_model.safetensors")
    assert tensors.keys() == recorded["tensors"].keys()
    for name, tensor in tensors.items():
        expected = recorded["tensors"][name]
        assert [*tensor.shape] == expected["shape"]
        flat = tensor.double().flatten()
        squares = expected["squares"]
        small = rtol * (squares / max(1, len(flat))) ** 0.5  # of the root mean square
        assert flat[:6].tolist() == near(expected["values"], abs=small)
        assert flat.square().sum().item() == near(squares)
        total = flat.sum().item()
        assert total == near(expected["sum"], abs=small * len(flat))

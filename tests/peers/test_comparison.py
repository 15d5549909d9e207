"""The comparison with others in benchmarks/README.md: each cell about PEFT, tried with PEFT."""
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from dora import (
    METHODS, DoRAConfig, DoRAError, Pruner, compact_, inject, load_adapter, save_adapter)

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning", "RuntimeWarning", "UserWarning")]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLUMNS = ("here", "authors", "AdaLoRA", "LoRA")
STEPS, KEPT = 12, 4                   # components kept of 4 matrices x 3


@pytest.fixture(scope="module")
def table():
    """{row: {column: what the cell says}}."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    text = text.split("## Comparison with other implementations")[1]
    rows = [line.strip("|").split("|") for line in text.split("\n") if line.startswith("|")][2:]
    return {row[0].strip(): dict(zip(COLUMNS, (cell.strip() for cell in row[1:]), strict=True))
            for row in rows}


class Net(nn.Module):
    """Four matrices in two layers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
                                   for _ in range(2))

    def forward(self, x):
        for layer in self.layer:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def gates(model):
    """PEFT's gates of all components."""
    return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_E" in name])


def train(model, penalty, before, after):
    """A run; before() comes before each optimizer step, after(step) after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(5)
    for step in range(1, STEPS + 1):
        loss = (model(torch.randn(16, 6)) - 1).square().mean() + penalty()
        optimizer.zero_grad()
        loss.backward()
        before()
        optimizer.step()
        after(step)


def adalora(call=True):
    """PEFT's AdaLoRA after a run, with or without the call that each step needs."""
    model = get_peft_model(Net(), AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=["up", "down"]))
    train(model, lambda: 0, lambda: None,
          model.base_model.update_and_allocate if call else lambda step: None)
    return model


def ours(call=True):
    """(model, Pruner) after the same run here."""
    config = DoRAConfig(**{**METHODS["adalora"], "targets": ("up", "down"), "rank": 1.0,
                           "start_rank": 3, "interval": 2, "dropout": 0.0})
    model = Net()
    pruner = Pruner(inject(model, config), config, STEPS)
    train(model, pruner.penalty, pruner.observe if call else lambda: None,
          lambda step: pruner.step())
    return model, pruner


def yes(value):
    return "yes" if value else "no"


def test_what_pruning_does(table):
    """Two runs, and two without the call that each step needs: the ranks that they end with, what
    their states hold, and how many components are left in the model."""
    theirs, (model, pruner) = adalora(), ours()
    row = table["ranks are found in training"]
    lora = get_peft_model(Net(), LoraConfig(r=3, target_modules=["up", "down"]))
    assert {p.shape[0] for name, p in lora.named_parameters() if "lora_A" in name} == {3}
    live = {int(p.ne(0).sum()) for name, p in theirs.named_parameters() if "lora_E" in name}
    assert row["LoRA"].startswith("no") and row["AdaLoRA"] == yes(live != {3}) == "yes"
    assert row["here"] == yes({*pruner.ranks().values()} != {3}) == "yes"

    row = table["an error if the scoring call is forgotten"]
    assert gates(adalora(call=False)).ne(0).all() and row["AdaLoRA"] == "no"
    with pytest.raises(DoRAError, match="observe"):
        ours(call=False)
    assert row["here"] == "yes"

    row = table["moving averages survive a resume"]
    state = {**theirs.state_dict(), **get_peft_model_state_dict(theirs)}
    kept = any("exp_avg" in key or "ipt" in key for key in state)
    assert not hasattr(theirs.base_model.rankallocator, "state_dict")
    assert row["AdaLoRA"] == yes(kept) == "no"
    assert {"I_bar", "U_bar", "mask", "t"} <= set(pruner.state_dict()) and row["here"] == "yes"

    row = table["pruned components are removed while training continues"]
    assert row["AdaLoRA"] == yes(len(gates(theirs)) == KEPT) == "no"
    compact_(model)
    left = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".c"))
    assert row["here"] == yes(left == KEPT) == "yes"


def test_exact_budget_with_ties(table):
    """All scores equal: PEFT's AdaLoRA keeps another number than its budget, this one exactly
    b(T)."""
    model = get_peft_model(Net(), AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=["up", "down"]))
    for step in range(1, STEPS - 4 + 1):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.fill_(1.0)
                p.grad = torch.ones_like(p) / p.numel()
        model.base_model.update_and_allocate(step)
    config = DoRAConfig(targets=("up", "down"), rank=1, start_rank=3, interval=2)
    layers = inject(Net(), config)
    pruner = Pruner(layers, config, STEPS)
    for _ in range(STEPS):
        for layer in layers.values():
            layer.c.data.fill_(1.0)
            layer.c.grad = torch.ones(3)
        pruner.observe()
        pruner.step()
    row = table["exactly b(t) components, even if scores tie"]
    assert row["AdaLoRA"] == yes(int(gates(model).ne(0).sum()) == KEPT) == "no"
    assert row["here"] == yes(sum(pruner.ranks().values()) == KEPT) == "yes"


def test_adapter_files(table, tmp_path):
    """What kind of adapter each writes, that PEFT's LoRA gives our outputs, and who loads an
    adapter on other weights of the same shapes."""
    model, _ = ours()
    save_adapter(model, tmp_path / "here")
    adalora().save_pretrained(tmp_path / "AdaLoRA")
    get_peft_model(Net(), LoraConfig(r=2, target_modules=["up", "down"])).save_pretrained(
        tmp_path / "LoRA")
    kinds = {name: peft.PeftConfig.from_pretrained(tmp_path / name).peft_type.value
             for name in ("here", "AdaLoRA", "LoRA")}
    row = table["its adapter loads as PEFT's LoRA"]
    assert {name: row[name] for name in kinds} == {
        name: yes(kind == "LORA") for name, kind in kinds.items()}
    x = torch.randn(5, 6)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "here").eval()
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-5, atol=1e-6)

    row = table["an adapter for other weights is refused"]
    for kind in ("AdaLoRA", "LoRA"):
        PeftModel.from_pretrained(Net(seed=1), tmp_path / kind)
        assert row[kind] == "no"
    with pytest.raises(DoRAError, match="weight"):
        load_adapter(Net(seed=1), tmp_path / "here")
    assert row["here"] == "yes"


def test_step_times(table):
    """The row of step times against the stored results of benchmarks/step_time.py, with MKL and
    with oneDNN."""
    cases = json.loads((BENCHMARKS / "results/step_time.json").read_text())
    found = [case["rows"] for case in cases
             if case["model"].startswith("MiniLM") and case["width"] == 64]
    row = next(cells for name, cells in table.items() if name.startswith("time of a"))
    names = {"here": ("dora", "floor"), "AdaLoRA": ("PEFT AdaLoRA", "tf"),
             "LoRA": ("PEFT LoRA", "tf")}
    for column, (name, floor) in names.items():  # each over its own framework's frozen model
        low, high = sorted(rows[name][floor] for rows in found)
        assert row[column] == f"{low:.2f} to {high:.2f}"

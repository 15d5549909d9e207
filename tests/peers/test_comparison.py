"""The comparison with others in benchmarks/README.md: each cell about PEFT, tried with PEFT."""
import json
import re
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
README = (Path(__file__).parents[2] / "benchmarks/README.md").read_text(encoding="utf-8")
COLUMNS = ("here", "authors", "AdaLoRA", "LoRA")
STEPS, KEPT = 12, 4                   # components kept of 4 matrices x 3


def table():
    """{first word of a row: {column: "yes" or "no" or what else the cell says}}."""
    text = README.split("## Comparison with other implementations")[1]
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


def adalora(seed=0):
    return get_peft_model(Net(seed), AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=["up", "down"]))


def gates(model):
    """PEFT's gates of all components."""
    return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_E" in name])


def train(model, allocate=True):
    """A run of PEFT's AdaLoRA, with or without the call that each step needs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    torch.manual_seed(5)
    for step in range(1, STEPS + 1):
        loss = (model(torch.randn(16, 6)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if allocate:
            model.base_model.update_and_allocate(step)
    return model


def ours(call=True):
    """The same run here."""
    config = DoRAConfig(**{**METHODS["adalora"], "targets": ("up", "down"), "rank": 1.0,
                           "start_rank": 3, "interval": 2, "dropout": 0.0})
    model = Net()
    pruner = Pruner(inject(model, config), config, STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(5)
    for _ in range(STEPS):
        loss = (model(torch.randn(16, 6)) - 1).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        if call:
            pruner.observe()
        optimizer.step()
        pruner.step()
    return model, pruner


def yes(value):
    return "yes" if value else "no"


def test_exact_budget_with_ties():
    """All scores equal: PEFT's AdaLoRA keeps another number than its budget, this one exactly
    b(T)."""
    model = adalora()
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
    row = table()["exactly b(t) components, even if scores tie"]
    assert row["AdaLoRA"] == yes(int(gates(model).ne(0).sum()) == KEPT) == "no"
    assert row["here"] == yes(sum(pruner.ranks().values()) == KEPT) == "yes"


def test_a_forgotten_call():
    """Without update_and_allocate PEFT trains on, and all components stay; without observe() this
    one stops."""
    model = train(adalora(), allocate=False)
    row = table()["an error if the scoring call is forgotten"]
    assert gates(model).ne(0).all() and row["AdaLoRA"] == "no"
    with pytest.raises(DoRAError, match="without pruner.observe"):
        ours(call=False)
    assert row["here"] == "yes"


def test_scores_in_the_state():
    """Moving averages, looked for in what each has for saving its state."""
    model = adalora()
    state = {**model.state_dict(), **get_peft_model_state_dict(model)}
    allocator = model.base_model.rankallocator
    row = table()["moving averages survive a resume"]
    kept = any("exp_avg" in key or "ipt" in key for key in state)
    assert not hasattr(allocator, "state_dict") and row["AdaLoRA"] == yes(kept) == "no"
    assert {"I_bar", "U_bar", "mask", "t"} <= set(ours()[1].state_dict())
    assert row["here"] == "yes"


def test_pruned_components_leave():
    """After the last pruning: the size of PEFT's gates in the model, still 3 a matrix, against the
    number that it keeps; here compact_ leaves what is live."""
    model = train(adalora())
    row = table()["pruned components are removed while training continues"]
    assert row["AdaLoRA"] == yes(len(gates(model)) == KEPT) == "no"
    mine, pruner = ours()
    compact_(mine)
    left = sum(p.numel() for name, p in mine.named_parameters() if name.endswith(".c"))
    assert row["here"] == yes(left == KEPT) == "yes"


def test_adapter_files(tmp_path):
    """What kind of adapter each writes, and that plain LoRA of PEFT loads only the first."""
    train(adalora()).save_pretrained(tmp_path / "theirs")
    model, _ = ours()
    save_adapter(model, tmp_path / "ours")
    row = table()["its adapter loads as PEFT's LoRA"]
    kinds = [peft.PeftConfig.from_pretrained(tmp_path / name).peft_type.value
             for name in ("ours", "theirs")]
    assert kinds == ["LORA", "ADALORA"]
    assert row["here"] == yes(kinds[0] == "LORA") and row["AdaLoRA"] == yes(kinds[1] == "LORA")
    x = torch.randn(5, 6)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["AdaLoRA", "LoRA"])
def test_another_base_of_the_same_shapes(tmp_path, kind):
    """An adapter loaded on other weights of the same shapes: PEFT takes it, this one refuses."""
    model = train(adalora()) if kind == "AdaLoRA" else get_peft_model(
        Net(), LoraConfig(r=2, target_modules=["up", "down"]))
    model.save_pretrained(tmp_path / "theirs")
    PeftModel.from_pretrained(Net(seed=1), tmp_path / "theirs")
    row = table()["an adapter for other weights is refused"]
    assert row[kind] == "no"
    save_adapter(ours()[0], tmp_path / "ours")
    with pytest.raises(DoRAError, match="other weights"):
        load_adapter(Net(seed=1), tmp_path / "ours")
    assert row["here"] == "yes"


def test_ranks_are_found():
    """PEFT's LoRA keeps the ranks it was given; AdaLoRA and this one end with others."""
    row = table()["ranks are found in training"]
    lora = get_peft_model(Net(), LoraConfig(r=3, target_modules=["up", "down"]))
    ranks = [p.shape[0] for name, p in lora.named_parameters() if "lora_A" in name]
    assert ranks == [3] * 4 and row["LoRA"].startswith("no")
    live = [int(p.ne(0).sum()) for name, p in train(adalora()).named_parameters()
            if "lora_E" in name]
    assert set(live) != {3} and row["AdaLoRA"] == "yes"
    assert [*ours()[1].ranks().values()] != [3] * 4 and row["here"] == "yes"


def test_step_times():
    """The row of step times against the stored results of benchmarks/step_time.py."""
    results = Path(__file__).parents[2] / "benchmarks/results/step_time.json"
    found = json.loads(results.read_text())
    rows = next(f for f in found if f["model"].startswith("MiniLM") and f["width"] == 64)["rows"]
    row = next(cells for name, cells in table().items() if name.startswith("time of a"))
    names = {"here": ("dora", "floor"), "authors": ("paper, naive scores", "floor"),
             "AdaLoRA": ("PEFT AdaLoRA", "tf"), "LoRA": ("PEFT LoRA", "tf")}
    for column, (name, floor) in names.items():  # each over its own framework's frozen model
        assert re.match(r"[\d.]+", row[column])[0] == f"{rows[name][floor]:.2f}"

"""The comparison with others in benchmarks/README.md: each cell about PEFT, tried with PEFT."""
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from small import Training, close, feed, inputs, net_config, plain, refused, trainable

from dora import METHODS, compact_, load_adapter, save_adapter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLUMNS = ("here", "authors", "AdaLoRA", "LoRA")
TARGETS = ("up", "down")
STEPS, KEPT = 12, 4  # components kept of 4 matrices x 3


@pytest.fixture(scope="module")
def table():
    """{row: {column: what the cell says}}."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    text = text.split("## Comparison with other implementations")[1]
    _, _, *lines = [line for line in text.split("\n") if line.startswith("|")]
    rows = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = dict(zip(COLUMNS, cells, strict=True))
    return rows


def says(cells, **found):
    """The row's cells say yes or no, as it was found."""
    for column, value in found.items():
        assert cells[column].startswith("yes" if value else "no"), column


def adalora():
    return get_peft_model(plain(), AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=list(TARGETS)))


def gates(model):
    """PEFT's gates of all components, a tensor per matrix."""
    return [p for name, p in model.named_parameters() if "lora_E" in name]


def open_gates(model):
    """How many of them are not 0."""
    return sum(int(gate.count_nonzero()) for gate in gates(model))


def train(model, after):
    """A run of PEFT's AdaLoRA; after(step) comes after each optimizer step."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = (model(inputs(16, seed=step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        after(step)


def ours():
    """The Training of the same method here."""
    return Training(net_config(**METHODS["adalora"], targets=TARGETS, rank=1, start_rank=3,
                               interval=2), STEPS)


def test_what_pruning_does(table):
    """Two runs, and two without the call that each step needs: the ranks that they end with, what
    their states hold, and how many components are left in the model."""
    theirs, here = adalora(), ours()
    train(theirs, theirs.base_model.update_and_allocate)
    here.step(STEPS)
    ours_ranks = here.pruner.ranks().values()
    says(table["ranks are found in training"], here={*ours_ranks} != {3},
         AdaLoRA=open_gates(theirs) < 12, LoRA=False)

    forgotten = adalora()
    train(forgotten, lambda step: None)
    assert open_gates(forgotten) == 12
    refused("observe", ours().pruner.step)
    says(table["an error if the scoring call is forgotten"], here=True, AdaLoRA=False)

    state = {**theirs.state_dict(), **get_peft_model_state_dict(theirs)}
    kept = any("exp_avg" in key or "ipt" in key for key in state)
    assert not hasattr(theirs.base_model.rankallocator, "state_dict")
    says(table["moving averages survive a resume"], AdaLoRA=kept,
         here={"I_bar", "U_bar", "mask", "t"} <= here.pruner.state_dict().keys())

    compact_(here.model)
    left = sum(len(layer.c) for layer in here.layers.values())
    stored = sum(gate.numel() for gate in gates(theirs))
    says(table["pruned components are removed while training continues"],
         here=left == KEPT, AdaLoRA=stored == KEPT)


def test_exact_budget_with_ties(table):
    """All scores equal: PEFT's AdaLoRA keeps another number than b(T), this one exactly b(T)."""
    theirs, here = adalora(), ours()
    for step in range(1, STEPS - 4 + 1):
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.data.fill_(1.0)
                p.grad = torch.ones_like(p) / p.numel()
        theirs.base_model.update_and_allocate(step)
    for _ in range(STEPS):
        feed(here.pruner, torch.ones(12))
    says(table["exactly b(t) components, even if scores tie"],
         here=here.pruner.live == KEPT, AdaLoRA=open_gates(theirs) == KEPT)


def test_adapter_files(table, tmp_path):
    """What kind of adapter each writes, and who loads one on other weights."""
    here = ours()
    here.step(STEPS)
    save_adapter(here.model, tmp_path / "here")
    adalora().save_pretrained(tmp_path / "AdaLoRA")
    lora = LoraConfig(r=3, target_modules=list(TARGETS))
    get_peft_model(plain(), lora).save_pretrained(tmp_path / "LoRA")
    kinds = {name: peft.PeftConfig.from_pretrained(tmp_path / name).peft_type.value
             for name in ("here", "AdaLoRA", "LoRA")}
    says(table["its adapter loads as PEFT's LoRA"],
         **{name: kind == "LORA" for name, kind in kinds.items()})
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "here").eval()
    close(loaded(inputs()), here.model.eval()(inputs()), 1e-6)

    for kind in ("AdaLoRA", "LoRA"):
        PeftModel.from_pretrained(plain(seed=1), tmp_path / kind)
    refused("weight", load_adapter, plain(seed=1), tmp_path / "here")
    says(table["an adapter for other weights is refused"], here=True, AdaLoRA=False, LoRA=False)


def test_step_times(table):
    """The row of step times against the stored results of benchmarks/step_time.py."""
    cases = json.loads((BENCHMARKS / "results/step_time.json").read_text())
    found = [case["rows"] for case in cases
             if case["model"].startswith("MiniLM") and case["width"] == 64]
    row = next(cells for name, cells in table.items() if name.startswith("time of a"))
    names = {"here": ("dora", "floor"), "AdaLoRA": ("PEFT AdaLoRA", "tf"),
             "LoRA": ("PEFT LoRA", "tf")}
    for column, (name, floor) in names.items():  # each over its own framework's frozen model
        low, high = sorted(rows[name][floor] for rows in found)
        assert row[column] == f"{low:.2f} to {high:.2f}"

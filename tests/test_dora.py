"""dora.py: the layer (Eq. 6), its start, inject, the configuration, METHODS, the rank map."""
import ast
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures.record import recorded
from small import (
    Net, adapted, close, inputs, net_config, plain, randomize, refused, table, untouched)
from tiny import tiny_model
from torch import nn

import dora
from dora import METHODS, DoRAConfig, DoRALinear, inject, rank_map


def layer_of(d_out, d_in, **changes):
    """One DoRALinear in float64 with random A, B and c."""
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out).double()
    layer = DoRALinear(base, net_config(**changes))
    randomize({"": layer})
    return layer


@pytest.mark.parametrize("scale, divisor", [("rank", 2), ("start_rank", 3)])
@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_eq6_is_the_sum_of_outer_products(scale, divisor, dropout_on):
    """The update, the outputs and the gradients equal those of W0 + (alpha / divisor) sum_i c_i b_i
    a_i^T, built component by component; the base gets no gradient."""
    layer = layer_of(4, 6, rank=2, start_rank=3, alpha=5.0, scale=scale, dropout_on=dropout_on)
    A, B, c, base = layer.A, layer.B, layer.c, layer.base
    update = sum(c[i] * torch.outer(B[:, i], A[i]) for i in range(3))
    update = update * 5.0 / divisor
    x = inputs(10, 6).view(2, 5, 6)
    expected = F.linear(x, base.weight + update, base.bias)
    close(layer.delta_weight(), update, 1e-12)
    close(layer(x), expected, 1e-12)

    loss = expected.sin().sum()
    gradients = torch.autograd.grad(loss, [A, B, c])
    layer(x).sin().sum().backward()
    close((A.grad, B.grad, c.grad), gradients, 1e-11)
    assert base.weight.grad is base.bias.grad is None


@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_dropout_acts_where_the_setting_says(dropout_on):
    """Training mode against F.dropout on x, or on the r' numbers a_i . x, drawn alike."""
    layer = layer_of(4, 6, dropout=0.5, dropout_on=dropout_on)
    x = inputs(10, 6)
    torch.manual_seed(5)
    ours = layer.train()(x)
    torch.manual_seed(5)
    if dropout_on == "input":
        h = F.dropout(x, 0.5) @ layer.A.T
    else:
        h = F.dropout(x @ layer.A.T, 0.5)
    y = layer.base(x)
    B = layer.scale * layer.B * layer.c
    close(ours, y + h @ B.T, 1e-12)
    update = layer.delta_weight()
    close(layer.eval()(x), y + x @ update.T, 1e-12)


@pytest.mark.parametrize("dropout_on", ["input", "components"])
@pytest.mark.parametrize("init", ["zero_b", "kaiming", "gaussian"])
def test_step_0_changes_nothing(init, dropout_on):
    """The adapted model's output equals the base's bit for bit, with dropout and without."""
    config = net_config(init=init, dropout_on=dropout_on, dropout=0.3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = inputs(dtype=dtype)
        expected = plain(dtype=dtype)(x)
        model, layers = adapted(config, dtype=dtype)
        assert model.train()(x).equal(expected)
        assert model.eval()(x).equal(expected)
        assert all(layer.A.any() for layer in layers.values())  # and yet it can learn


def test_starts_have_the_stated_distributions():
    """Bounds and deviations of the starts' 200,000 entries against the formulas."""
    d_in, r = 2000, 100
    torch.manual_seed(0)
    start = {}
    for init in ("zero_b", "kaiming", "gaussian"):
        config = net_config(init=init, rank=r, start_rank=r)
        start[init] = DoRALinear(nn.Linear(d_in, 100), config)
    zero_b, kaiming, gaussian = start.values()
    assert not zero_b.B.any() and zero_b.c.eq(1).all()
    assert not kaiming.c.any() and not gaussian.c.any()
    squares = {zero_b.A: 1 / d_in,  # a = √5
               kaiming.A: 6 / d_in,  # a = 0
               kaiming.B: 6 / r}
    for weight, square in squares.items():
        largest, variance = weight.square().max(), weight.var()
        assert largest.item() == pytest.approx(square, rel=2e-3)
        assert variance.item() == pytest.approx(square / 3, rel=0.02)
    for weight in (gaussian.A, gaussian.B):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean()) < 1e-3


@pytest.mark.parametrize("targets, expected", [
    (("attention.output.dense",), ["0.attention.output.dense", "1.attention.output.dense"]),
    (("0.output.dense",), ["0.output.dense"]),
    (("layer.1.attention.self.key",), ["1.attention.self.key"]),
    (("output.dense", "0.intermediate.dense", "1.output.dense"), [
        "0.attention.output.dense", "0.intermediate.dense", "0.output.dense",
        "1.attention.output.dense", "1.output.dense"]),
])
def test_a_target_is_a_whole_dotted_suffix(targets, expected):
    """The names found in a RoBERTa equal the list by hand, in the model's order, each once."""
    model = tiny_model()
    layers = inject(model, DoRAConfig(targets=targets))
    assert list(layers) == ["roberta.encoder.layer." + name for name in expected]
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


def test_a_target_that_is_no_suffix_of_a_linear():
    """Neither a substring nor a container matches, and the model is left as it was. The error for a
    target that matches nothing names every nn.Linear there is."""
    for target in ("put.dense", "output", "query.weight", "0", "Query"):
        config = DoRAConfig(targets=("query", target))
        untouched(repr(target), inject, tiny_model(), config)
    config = DoRAConfig(targets=("q_proj",))
    error = str(refused("q_proj", inject, tiny_model(), config))
    for name in ("self.query", "intermediate.dense", "output.dense", "classifier.out_proj"):
        assert name in error


@pytest.mark.parametrize("changes, expected", [
    (dict(rank=2, start_rank=3), "ABc"), (METHODS["lora"], "AB")])
def test_inject_freezes_the_rest(changes, expected):
    """After inject exactly A, B and c train; lora's gate is held at 1 and does not."""
    model = Net()
    layers = inject(model, net_config(**changes))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{p}" for name in layers for p in expected}
    layer = layers["layer.1.up"]
    r = layer.config.r_prime
    assert layer.A.shape == (r, 5) and layer.B.shape == (8, r)
    assert layer.c.shape == (r,) and len(layers) == 6


BAD_VALUES = dict(
    rank="2", start_rank=0, alpha=math.nan, eps=0, eta=-1,
    dropout=1.0, beta1=1.0, beta2=-1, initial_phase=-0.1,
    final_phase=1.0, interval=0, gate=False, targets="query")
BAD_CHOICES = {"init": "kaiming", "scale": "start_rank", "importance": "sensitivity",
               "schedule": "fast_first", "penalty": "dem", "dropout_on": "components"}
BAD_COMBINATIONS = [  # and what the message names
    (dict(targets=("0", "")), "targets"),
    (dict(rank=4, start_rank=3), "start_rank = 3.*rank = 4"),
    (dict(rank=2, start_rank=3, schedule=None, importance=None), "start_rank = 3"),
    (dict(importance=None), "importance = None.*schedule = fast_first"),
    (dict(schedule=None, start_rank=2), "importance = sensitivity.*schedule = None"),
    (dict(METHODS["lora"], init="kaiming"), "gate = False.*zero_b"),  # c = 0 for ever
    (dict(rank=None), "rank = None"),
    (dict(targets=None), "targets = None"),
    (dict(targets=()), r"targets = \(\)"),
]


def test_a_configuration_that_cannot_work():
    """Bad values, choices, combinations: one line with setting and value, or what there is."""
    for name, value in BAD_VALUES.items():
        refused(re.escape(f"{name} = {value!r}"), DoRAConfig, **{name: value})
    for name, choice in BAD_CHOICES.items():
        refused(f"{name} = 'other'.*{choice}", DoRAConfig, **{name: "other"})
    for changes, names in BAD_COMBINATIONS:
        refused(names, DoRAConfig, **changes)


def test_start_rank_is_half_as_much_again():
    """r' = ceil(1.5 r), the paper's rule, by hand; and rank itself where nothing is pruned."""
    ranks = {8: 12, 3: 5, 2: 3, 1: 2, 0.5: 1, 0.1: 1}
    assert {rank: DoRAConfig(rank=rank).r_prime for rank in ranks} == ranks
    assert DoRAConfig(**METHODS["lora"], rank=3).r_prime == 3


# PEFT's LoRA, the papers' AdaLoRA and DoRA; "dora" is chosen by evidence
METHOD_TABLE = """
    setting      lora    adalora     paper
    init         zero_b  gaussian    kaiming
    gate         False   True        True
    scale        rank    start_rank  start_rank
    penalty      None    orthogonal  dem
    eta          any     0.5         0.3
    importance   None    triplet     norm
    schedule     None    fast_first  slow_first
    budget_unit  any     components  components
    beta1        any     0.85        0.9
    beta2        any     0.85        None
    dropout_on   input   input       input
"""
PAPER = dict(alpha=8, dropout=0.1, initial_phase=0.15, final_phase=0.5)


def test_methods_are_rows_of_one_table():
    """Each method's settings equal the columns above, whatever the defaults become. No code in
    dora.py asks for a method. (What dora.py imports: test_style.py.)"""
    assert [*METHODS] == ["dora", "paper", "lora", "adalora"]
    titles, *rows = table(METHOD_TABLE)
    for method in ("lora", "adalora", "paper"):
        config = DoRAConfig(**METHODS[method])
        for name, *cells in rows:
            expected = cells[titles.index(method) - 1]
            assert expected in ("any", str(getattr(config, name)))
    assert PAPER.items() <= dataclasses.asdict(config).items()
    source = Path(dora.__file__).read_text()
    tree = ast.dump(ast.parse(source))
    assert "='METHODS'" in tree and "='method'" not in tree


def test_rank_map_by_hand():
    """The words of two tables, sums included. A missing matrix is a dot; equal names add up."""
    ranks = {"encoder.layer.0.attention.self.query": 3, "encoder.layer.0.output.dense": 0,
             "encoder.layer.10.attention.self.query": 1, "encoder.layer.10.output.dense": 12}
    assert rank_map(ranks).split() == """
        layer  query  output  total
            0      3       0      3
           10      1      12     13
        total      4      12     16""".split()
    assert rank_map({"a.0.up": 1, "a.0.up.dense": 1, "a.1.down": 1}).split() == """
        layer  up  down  total
            0   2     .      2
            1   .     1      1
        total   2     1      3""".split()


T5 = ("0.SelfAttention.q", "0.SelfAttention.v", "1.EncDecAttention.q")
LLAMA = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
OTHER_MODELS = {  # names as in other people's models
    "T5": [f"{stack}.block.{block}.layer.{name}"
           for stack in ("encoder", "decoder") for block in range(2) for name in T5],
    "Llama": [f"model.layers.{i}.{name}_proj" for i in range(8) for name in LLAMA],
    "mixed": ["embed", "layer.0.q", "layer.1.q", "head.dense", "head.out", "0", "0x.1"]}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_every_matrix_has_its_own_cell(kind):
    """Names of other models: as many cells as matrices, each with its own number; the totals are
    the sums, the columns line up, and no line has more than 80 columns."""
    ranks = {name: i for i, name in enumerate(OTHER_MODELS[kind], 1)}
    cells = []
    for text in rank_map(ranks).split("\n\n"):
        lines = text.splitlines()
        (width,) = {*map(len, lines)}
        assert width <= 80
        _, *columns = zip(*map(str.split, lines))
        for title, *column in columns:
            *found, total = (int(cell) for cell in column if cell != ".")
            assert total == sum(found)
            if title != "total":
                cells += found
    assert sorted(cells) == sorted(ranks.values())
    assert total == sum(cells)


def test_lora_equals_the_recorded_peft():
    """METHODS["lora"] against outputs and gradients of PEFT's LoRA (fixtures/record.py)."""
    peft = recorded("peft")["lora"]
    r, alpha = peft["r"], peft["alpha"]
    weights = {name: torch.tensor(rows) for name, rows in peft["weights"].items()}
    d_out, d_in = weights["W"].shape
    config = net_config(**METHODS["lora"], rank=r, alpha=alpha)
    layer = DoRALinear(nn.Linear(d_in, d_out), config)
    layer.base.weight.data = weights["W"]
    layer.base.bias.data = weights["bias"]
    layer.A.data = weights["A"]
    layer.B.data = weights["B"]
    y = layer(weights["x"])
    y.sin().sum().backward()
    found = {"y": y, "grad_A": layer.A.grad, "grad_B": layer.B.grad}
    for name, tensor in found.items():
        close(tensor, torch.tensor(peft[name]))
    assert layer.c.grad is None

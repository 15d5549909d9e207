"""dora.py: the layer (Eq. 6), its start, inject, the configuration, METHODS, the rank map."""
import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import Net, adapted, inputs, plain, randomize, net_config
from torch import nn

import dora
from dora import METHODS, DoRAConfig, DoRAError, DoRALinear, inject, rank_map

RECORDED = Path(__file__).parent / "fixtures/peft.json"


def layer_of(d_out, d_in, **changes):
    """One DoRALinear in float64 with random A, B and c."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(d_in, d_out).double(), net_config(**changes))
    randomize({"": layer})
    return layer


# ---- Eq. 6 --------------------------------------------------------------------------------------

def test_delta_weight_by_hand():
    """One component and two, alpha / r = 8 / 2: the update equals the matrix worked out on
    paper."""
    layer = layer_of(2, 3, rank=2, start_rank=2, alpha=8.0)
    layer.A.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]).double()
    layer.B.data = torch.tensor([[5.0, 1.0], [7.0, -1.0]]).double()
    layer.c.data = torch.tensor([0.5, 0.0]).double()
    # 4 * 0.5 * [5, 7]^T [1, 2, 3]
    assert layer.delta_weight().tolist() == [[10, 20, 30], [14, 28, 42]]
    layer.c.data[1] = 0.25                      # + 4 * 0.25 * [1, -1]^T [0, 1, 0]
    assert layer.delta_weight().tolist() == [[10, 21, 30], [14, 27, 42]]


@pytest.mark.parametrize("scale, divisor", [("rank", 2), ("start_rank", 3)])
@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_eq6_is_the_sum_of_outer_products(scale, divisor, dropout_on):
    """forward and delta_weight equal W0 + (alpha / divisor) sum_i c_i b_i a_i^T, built component by
    component and entry by entry."""
    layer = layer_of(4, 6, rank=2, start_rank=3, alpha=5.0, scale=scale, dropout_on=dropout_on)
    W = layer.base.weight.detach().clone()
    update = torch.zeros_like(W)
    for i in range(3):
        for o in range(4):
            for k in range(6):
                update[o, k] += 5.0 / divisor * layer.c[i] * layer.B[o, i] * layer.A[i, k]
    x = inputs(10, 6).view(2, 5, 6)
    expected = torch.zeros(2, 5, 4).double()
    for n in range(2):
        for t in range(5):
            for o in range(4):
                expected[n, t, o] = layer.base.bias[o] + sum(
                    (W + update)[o, k] * x[n, t, k] for k in range(6))
    torch.testing.assert_close(layer.delta_weight(), update, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_eq6_gradients():
    """dℓ/da_i, dℓ/db_i and dℓ/dc_i equal those that autograd finds through the explicit sum."""
    layer = layer_of(4, 6, rank=3, start_rank=3)
    A, B, c = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.c))
    x = inputs(10, 6)
    layer(x).sin().sum().backward()
    W = layer.base.weight + layer.scale * sum(c[i] * torch.outer(B[:, i], A[i]) for i in range(3))
    (x @ W.T + layer.base.bias).sin().sum().backward()
    for ours, naive in ((layer.A, A), (layer.B, B), (layer.c, c)):
        torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-10, atol=1e-12)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_dropout_acts_where_the_setting_says(dropout_on):
    """Training mode equals F.dropout on x, or on the r' numbers a_i . x, drawn from the same seed;
    the base's own path is untouched, and eval mode has none."""
    layer = layer_of(4, 6, dropout=0.5, dropout_on=dropout_on)
    x = inputs(10, 6)
    torch.manual_seed(5)
    ours = layer.train()(x)
    torch.manual_seed(5)
    h = F.dropout(x, 0.5) @ layer.A.T if dropout_on == "input" else F.dropout(x @ layer.A.T, 0.5)
    expected = layer.base(x) + h @ (layer.scale * layer.B * layer.c).T
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x @ layer.delta_weight().T)


# ---- the start ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dropout_on", ["input", "components"])
@pytest.mark.parametrize("init", ["zero_b", "kaiming", "gaussian"])
def test_step_0_changes_nothing(init, dropout_on):
    """The adapted model's output equals the base model's bit for bit in three dtypes, with dropout
    and without."""
    config = net_config(init=init, dropout_on=dropout_on, dropout=0.3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = inputs(dtype=dtype)
        expected = plain(dtype=dtype)(x)
        model, layers = adapted(config, dtype=dtype)
        for mode in (model.train(), model.eval()):
            assert torch.equal(mode(x), expected)
        assert all(layer.A.abs().sum() > 0 for layer in layers.values())     # and yet it can learn


def test_starts_have_the_stated_distributions():
    """Bounds of the uniform starts and the deviation of the Gaussian one, on 200,000 entries, equal
    the formulas; and c, B are 0 or 1 where they should be."""
    d_in, d_out, r = 2000, 100, 100

    def start(init):
        torch.manual_seed(0)
        return DoRALinear(nn.Linear(d_in, d_out), net_config(init=init, rank=r, start_rank=r))

    zero_b, kaiming, gaussian = start("zero_b"), start("kaiming"), start("gaussian")
    assert zero_b.A.abs().max().item() == pytest.approx(1 / math.sqrt(d_in), rel=1e-3)    # a = √5
    assert not zero_b.B.any() and zero_b.c.eq(1).all()
    assert kaiming.A.abs().max().item() == pytest.approx(math.sqrt(6 / d_in), rel=1e-3)    # a = 0
    assert kaiming.B.abs().max().item() == pytest.approx(math.sqrt(6 / r), rel=1e-3)
    for weight in (gaussian.A, gaussian.B):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean().item()) < 1e-3
    assert not kaiming.c.any() and not gaussian.c.any()
    assert kaiming.A.mean().abs() < 1e-3 and kaiming.B.std().item() == pytest.approx(
        math.sqrt(2 / r), rel=0.05)


# ---- inject -------------------------------------------------------------------------------------

class Roberta(nn.Module):
    """Two layers' worth of RoBERTa's names."""

    def __init__(self):
        super().__init__()
        def pair(dense):
            return nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(4)})
        self.layer = nn.ModuleList(nn.ModuleDict({
            "attention": nn.ModuleDict({
                "self": nn.ModuleDict({n: nn.Linear(4, 4) for n in ("query", "key", "value")}),
                "output": pair(nn.Linear(4, 4))}),
            "intermediate": pair(nn.Linear(4, 6)), "output": pair(nn.Linear(6, 4))})
            for _ in range(2))
        self.classifier = nn.Linear(4, 2)


@pytest.mark.parametrize("targets, expected", [
    (("output.dense",), ["0.attention.output.dense", "0.output.dense",
                         "1.attention.output.dense", "1.output.dense"]),
    (("attention.output.dense",), ["0.attention.output.dense", "1.attention.output.dense"]),
    (("0.output.dense",), ["0.output.dense"]),
    (("layer.1.attention.self.key",), ["1.attention.self.key"]),
    (("value", "self.query"), ["0.attention.self.query", "0.attention.self.value",
                               "1.attention.self.query", "1.attention.self.value"]),
    (("dense", "output.dense"), [f"{i}.{m}.dense" for i in "01"
                                 for m in ("attention.output", "intermediate", "output")]),
    (DoRAConfig().targets, [f"{i}.{m}" for i in "01" for m in (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense")]),
])
def test_a_target_is_a_whole_dotted_suffix(targets, expected):
    """The names found equal the list by hand, in the model's order, each once."""
    model = Roberta()
    layers = inject(model, DoRAConfig(targets=targets))
    assert list(layers) == ["layer." + name for name in expected]
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


def test_a_target_that_is_no_suffix_of_a_linear():
    """Neither a substring nor a container matches, and the model is left as it was. The error for a
    target that matches nothing names every nn.Linear there is."""
    model = Roberta()
    for target in ("put.dense", "ense", "output", "query.weight", "0", "Query", "q_proj"):
        with pytest.raises(DoRAError, match=repr(target)) as error:
            inject(model, DoRAConfig(targets=("query", target)))
        assert not any(isinstance(m, DoRALinear) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    for name in ("self.query", "intermediate.dense", "output.dense", "classifier"):
        assert name in str(error.value)


def test_inject_freezes_the_rest():
    """After inject exactly A, B and c train; lora's gate is held at 1 and does not."""
    model = Net()
    up = inject(model, net_config(rank=2, start_rank=3))["layer.1.up"]
    assert (up.A.shape, up.B.shape, up.c.shape, up.mask.shape) == ((3, 5), (8, 3), (3,), (3,))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in names} == {"A", "B", "c"} and len(names) == 6 * 3
    layers = inject(model := Net(), net_config(**METHODS["lora"]))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in names} == {"A", "B"}
    assert all(layer.c.eq(1).all() for layer in layers.values())


# ---- configuration ------------------------------------------------------------------------------

CANNOT_WORK = [  # settings, and what the message names
    (dict(rank=0), "rank = 0"), (dict(rank=-1), "rank = -1"), (dict(rank="2"), "rank = '2'"),
    (dict(rank=4, start_rank=3), "start_rank = 3.*rank = 4"), (dict(rank=None), "rank = None"),
    (dict(start_rank=3.5), "start_rank = 3.5"), (dict(rank=0.5, start_rank=0), "start_rank"),
    (dict(rank=2, start_rank=3, schedule=None, importance=None), "start_rank = 3"),
    (dict(importance=None), "importance = None.*schedule = fast_first"),
    (dict(schedule=None, start_rank=2), "importance = sensitivity.*schedule = None"),
    (dict(gate=False), "gate = False"), (dict(gate=1), "gate = 1"),
    (dict(METHODS["lora"], init="kaiming"), "gate = False.*zero_b"),     # c = 0 for ever
    (dict(alpha=0), "alpha = 0"), (dict(alpha=math.nan), "alpha = nan"), (dict(eps=0), "eps = 0"),
    (dict(dropout=1.0), "dropout = 1.0"), (dict(dropout=-0.1), "dropout = -0.1"),
    (dict(beta1=1.0), "beta1 = 1.0"), (dict(beta2=-1), "beta2 = "),
    (dict(initial_phase=-0.1), "initial_phase"), (dict(final_phase=1.0), "final_phase"),
    (dict(interval=0), "interval = 0"), (dict(eta=-1), "eta = -1"),
    (dict(init="xavier"), "init = 'xavier'.*kaiming"), (dict(scale="r"), "scale = 'r'.*start_rank"),
    (dict(importance="magnitude"), "importance = 'magnitude'.*sensitivity"),
    (dict(schedule="linear"), "schedule = 'linear'.*fast_first"),
    (dict(penalty="l2"), "penalty = 'l2'.*dem"),
    (dict(dropout_on="output"), "dropout_on = 'output'.*components"),
    *[(dict(targets=targets), "targets = ") for targets in
      ((), "query", ["0"], ("",), ("0", ""), None)]]


def test_a_configuration_that_cannot_work():
    """Each is an error of one line that names the setting, its value and what would do."""
    for changes, names in CANNOT_WORK:
        with pytest.raises(DoRAError, match=names) as error:
            DoRAConfig(**changes)
        assert "\n" not in str(error.value), changes


def test_start_rank_is_half_as_much_again():
    """r' = ceil(1.5 r), the paper's rule, by hand; and rank itself where nothing is pruned."""
    for rank, expected in ((2, 3), (8, 12), (1, 2), (0.5, 1), (3, 5), (0.1, 1)):
        assert DoRAConfig(rank=rank).r_prime == expected
        if rank >= 1:
            assert DoRAConfig(**METHODS["lora"], rank=rank).r_prime == rank


METHOD_TABLE = {  # PEFT's LoRA, the papers' AdaLoRA and DoRA; "dora" is chosen by evidence
    "lora": dict(init="zero_b", gate=False, scale="rank", penalty=None, importance=None,
                 schedule=None, dropout_on="input"),
    "adalora": dict(init="gaussian", gate=True, scale="start_rank", penalty="orthogonal",
                    importance="triplet", beta1=0.85, beta2=0.85, schedule="fast_first",
                    dropout_on="input"),
    "paper": dict(init="kaiming", gate=True, scale="start_rank", penalty="dem", importance="norm",
                  beta1=0.9, beta2=None, schedule="slow_first", dropout_on="input", alpha=8,
                  dropout=0.1, initial_phase=0.15, final_phase=0.5),
}


def test_methods_are_rows_of_one_table():
    """Each method's settings equal the row above, whatever the defaults become."""
    assert list(METHODS) == ["dora", "paper", "lora", "adalora"]
    for method, row in METHOD_TABLE.items():
        config = DoRAConfig(**METHODS[method])
        assert {k: getattr(config, k) for k in row} == row


def test_methods_differ_by_settings_alone():
    """dora.py's code never asks for a method: the name stands in no expression of it; it imports
    the standard library and torch."""
    tree = ast.parse(Path(dora.__file__).read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "method" not in names
    strings = {n.value for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
               for n in ast.walk(f) if isinstance(n, ast.Constant)}
    assert "paper" not in strings and "METHODS" not in strings
    modules = {(n.module if isinstance(n, ast.ImportFrom) else alias.name).split(".")[0]
               for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
               for alias in n.names}
    assert modules - set(sys.stdlib_module_names) == {"torch"}


# ---- the rank map -------------------------------------------------------------------------------

def test_rank_map_by_hand():
    """The table of two layers of three matrices equals the text below, sums included. A matrix that
    a layer lacks is a dot."""
    ranks = {"encoder.layer.0.attention.self.query": 3, "encoder.layer.0.output.dense": 0,
             "encoder.layer.10.attention.self.query": 1, "encoder.layer.10.output.dense": 12}
    rows = [line.split() for line in rank_map(ranks).splitlines()]
    assert rows == [["layer", "query", "output", "total"], ["0", "3", "0", "3"],
                    ["10", "1", "12", "13"], ["total", "4", "12", "16"]]
    rows = [line.split() for line in rank_map({"a.0.up": 2, "a.1.down": 1}).splitlines()]
    assert rows == [["layer", "up", "down", "total"], ["0", "2", ".", "2"], ["1", ".", "1", "1"],
                    ["total", "2", "1", "3"]]


OTHER_MODELS = {  # names as in other people's models
    "T5": [f"{stack}.block.{b}.layer.{i}.{name}" for stack in ("encoder", "decoder")
           for b in range(2) for i, name in ((0, "SelfAttention.q"), (0, "SelfAttention.v"),
                                             (1, "EncDecAttention.q"), (2, "DenseReluDense.wo"))],
    "Llama": [f"model.layers.{i}.{name}_proj" for i in range(8) for name in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")],
    "Sequential": ["0", "2", "4.0", "4.2", "5.0.1"],
    "two stacks": ["encoder.0.q", "decoder.0.q", "encoder.0.k"],
    "mixed": ["embed", "layer.0.q", "layer.1.q", "head.dense", "head.out", "0", "0x.1"]}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_every_matrix_has_its_own_cell(kind):
    """Names of other models: as many cells as matrices, each with its own number; the totals are
    the sums, the columns line up, and no line has more than 80 columns."""
    ranks = {name: i for i, name in enumerate(OTHER_MODELS[kind], 1)}
    cells = []
    for text in rank_map(ranks).split("\n\n"):
        lines = text.splitlines()
        assert len({*map(len, lines)}) == 1 and len(lines[0]) <= 80
        for title, *column in [*zip(*map(str.split, lines))][1:]:
            *numbers, total = (int(cell) for cell in column if cell != ".")
            assert total == sum(numbers)
            cells += numbers if title != "total" else []
    assert sorted(cells) == sorted(ranks.values()) and total == sum(ranks.values())


# ---- against recorded numbers -------------------------------------------------------------------

def test_lora_equals_the_recorded_peft():
    """METHODS["lora"] gives the outputs and gradients that PEFT's LoRA gave for the same weights
    (fixtures/record_peft.py; live in peers/test_peft.py)."""
    recorded = json.loads(RECORDED.read_text())["lora"]
    weights = {name: torch.tensor(rows) for name, rows in recorded["weights"].items()}
    base = nn.Linear(*weights["W"].shape[::-1])
    config = net_config(**METHODS["lora"], rank=recorded["r"], alpha=recorded["alpha"])
    layer = DoRALinear(base, config)
    with torch.no_grad():
        for p, name in ((base.weight, "W"), (base.bias, "bias"), (layer.A, "A"), (layer.B, "B")):
            p.copy_(weights[name])
    y = layer(weights["x"])
    y.sin().sum().backward()
    torch.testing.assert_close(y, torch.tensor(recorded["y"]))
    torch.testing.assert_close(layer.A.grad, torch.tensor(recorded["grad_A"]))
    torch.testing.assert_close(layer.B.grad, torch.tensor(recorded["grad_B"]))
    assert layer.c.grad is None

"""dora.py on models and in programs that it was not written for: right, or refused in one line.
(Which base an adapter fits: test_bases.py. The same questions with PEFT:
peers/test_other_models.py.)"""
import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated import Device
from small import (
    FLAT, X, Y, cfg, chain, close, fit, loss_of, randomize, refused, reloads, train_step,
    untouched)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import dora
from dora import (
    DoRALinear, Pruner, compact_, inject, load_adapter, merge_, save_adapter, write_safetensors)

ROOT = Path(__file__).parents[1]


def two_matrices():
    return chain(nn.Linear, nn.Tanh, nn.Linear)


# ---- what is shared ------------------------------------------------------------------------------

class Tied(nn.Module):
    """Token ids (N, T) to (N, T, 20), the last matrix tied to the embedding."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.emb, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.proj = nn.Linear(8, 20, bias=False)
        self.proj.weight = self.emb.weight

    def forward(self, ids):
        return self.proj(torch.tanh(self.mid(self.emb(ids))))


IDS = torch.arange(20).view(4, 5)


def test_a_tied_head(tmp_path):
    """An adapter that holds a new matrix for `proj` alone, which is tied to the embedding: the
    loaded model equals the one whose proj was untied by hand, and its embedding is as it was. A
    tied weight that trains is saved under both names."""
    untied = Tied()
    untied.proj.weight = nn.Parameter(torch.randn(20, 8))
    inject(untied, cfg("mid", **FLAT))
    randomize({"mid": untied.mid})
    untied.proj.requires_grad_(True)
    save_adapter(untied, tmp_path / "untied")
    model = Tied()
    load_adapter(model, tmp_path / "untied")
    close(model(IDS), untied(IDS))
    assert torch.equal(model.emb.weight, Tied().emb.weight)

    model = Tied()
    randomize(inject(model, cfg("mid", **FLAT)))
    model.proj.requires_grad_(True)
    nn.init.normal_(model.proj.weight)
    reloads(model, Tied, tmp_path / "tied", lambda model: model(IDS))


def test_an_adapted_matrix_that_is_tied():
    """Adapting the tied matrix and merging it leaves the embedding's weight alone, and so does a
    base that somebody else holds."""
    model = Tied()
    base = model.proj
    randomize(inject(model, cfg("proj", **FLAT)))
    expected = model(IDS)
    close(merge_(model)(IDS), expected)
    assert torch.equal(model.emb.weight, Tied().emb.weight)
    assert model.proj is not base and torch.equal(base.weight, Tied().emb.weight)


def test_a_head_under_two_names(tmp_path):
    """A head that is one module under two names reloads as such."""
    def make():
        model = chain(nn.Linear, nn.Tanh, nn.Linear, nn.Linear)
        model[3] = model[2]
        return model

    model = make()
    randomize(inject(model, cfg("0", **FLAT)))
    model[2].requires_grad_(True)
    nn.init.normal_(model[2].weight)
    reloads(model, make, tmp_path, tolerance=1e-4)


def test_a_matrix_that_is_used_twice():
    """One nn.Linear under two names, in one container, in two, or within a shared block: refused by
    both names."""
    shared = nn.Linear(8, 8)
    block = nn.Sequential(nn.Linear(8, 8))
    for model, target, names in (
            (chain(shared, nn.Tanh, shared), "0", "0 .*2 "),
            (nn.ModuleDict({"a": chain(shared), "b": chain(shared)}), "0", r"a\.0 .*b\.0 "),
            (nn.ModuleList([block, block]), "0.0", r"0\.0 .*1\.0 ")):
        untouched(names, inject, model, cfg(target))


# ---- what trains beside the components -----------------------------------------------------------

def test_what_a_file_has_no_place_for(tmp_path):
    """PEFT's format holds whole modules without adapted matrices. A parameter of the model itself
    that trains, the frozen weight or bias of an adapted matrix, and a model that was frozen before
    saving, so that nothing tells which head trained: refused, and no file is written."""
    model = two_matrices()
    model.gain = nn.Parameter(torch.ones(8))
    randomize(inject(model, cfg("0", **FLAT)))
    model.gain.requires_grad_(True)
    refused("gain", save_adapter, model, tmp_path / "x")

    for name in ("weight", "bias"):
        config = cfg("0", "2", start_rank=2)
        model = two_matrices()
        layers = inject(model, config)
        getattr(model[2].base, name).requires_grad_(True)
        refused("^2: ", Pruner, layers, config, 20)
        getattr(model[2].base, name).requires_grad_(False)
        fit(model, config, layers)
        getattr(model[2].base, name).requires_grad_(True)
        refused("^2: ", save_adapter, model, tmp_path / "x")

    model.requires_grad_(False)
    refused("frozen", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- nothing trains ------------------------------------------------------------------------------

@pytest.mark.parametrize("method", dora.METHODS)
def test_an_optimizer_made_before_inject(tmp_path, method):
    """The optimizer holds the parameters from before inject(): an error at the first pruning, and
    for lora when saving; no file is written."""
    rank = dict(rank=2) if method == "lora" else dict(rank=1, start_rank=2)
    model, config = two_matrices(), cfg("0", **dora.METHODS[method] | rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    layers = inject(model, config)

    def run():
        fit(model, config, layers, optimizers=[optimizer])
        save_adapter(model, tmp_path / "x")

    refused(r"optimizer.*inject\(\)", run)
    assert not (tmp_path / "x").exists()


def test_gates_that_are_not_in_the_optimizer(tmp_path):
    """An optimizer that got the matrices alone: every gate is still 1, so the run did not do what
    its settings say, and cannot be saved."""
    model, config = two_matrices(), cfg("0", "2")
    layers = inject(model, config)
    fit(model, config, layers, optimizers=[torch.optim.AdamW(
        [p for layer in layers.values() for p in (layer.A, layer.B)])])
    refused("gate", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_layers_that_the_model_does_not_use():
    """The penalty gives A and B of a copy's layers a gradient, the loss gives none: only the gates
    count, and observe() refuses. So it does under reentrant checkpointing of a frozen input."""
    model, config = two_matrices(), cfg("0", "2")
    pruner = Pruner(inject(model, config), config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refused(r"gradient.*observe\(\)", train_step, model, copy.deepcopy(pruner), optimizer)
    with pytest.warns(UserWarning, match="None of the inputs"):
        (checkpoint(model, X, use_reentrant=True) + model[0].c.sum() * 0).sum()
    optimizer.zero_grad()
    refused("use_reentrant=False", pruner.observe)


def test_a_run_too_short_to_decide():
    """At B = 0 every score is 0. A run whose first pruning comes before anything moved is refused;
    one that works decides its mask by scores above 0."""
    for steps in range(1, 6):
        model, config = two_matrices(), cfg("0", "2")
        layers = inject(model, config)
        if steps < 4:
            refused("step", fit, model, config, layers, steps)
        else:
            pruner, _ = fit(model, config, layers, steps)
            assert (pruner.scores()[pruner.mask] > 0).all()


def test_a_pruner_of_some_layers():
    """A Pruner of a part of the layers, or with other settings than those of inject(): refused, for
    the budget is the whole model's."""
    layers = inject(two_matrices(), cfg("0", "2"))
    refused("layers", Pruner, {"0": layers["0"]}, cfg("0", "2"), 20)
    refused("^0: ", Pruner, layers, cfg("0", "2", eta=0.4), 20)


def test_a_second_inject():
    """inject() on an adapted model is refused and leaves the first adapter trainable."""
    model = two_matrices()
    layers = inject(model, cfg("0"))
    untouched("already", inject, model, cfg("2"))
    assert layers["0"].A.requires_grad


# ---- what cannot be adapted ----------------------------------------------------------------------

class Conv1D(nn.Module):
    """As GPT-2's, with a weight (d_in, d_out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))


def hooked():
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda m, args, out: out)
    return linear


REFUSED = [
    lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
    lambda: type("Own", (nn.Linear,), {})(8, 8), lambda: nn.Embedding(8, 8), Conv1D, hooked]


@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_adapted():
    """Computed weights, subclasses, other kinds and a matrix with hooks: refused by the target and
    the module's name, and the model is as it was. So is a model in DistributedDataParallel, which
    would not average the gradients of the new parameters."""
    for make in REFUSED:
        model = two_matrices()
        model[0] = make()
        untouched("'0'.* 0 ", inject, model, cfg("0"))
    shared = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(shared)
    shared.module = two_matrices()
    untouched("DistributedDataParallel", inject, shared, cfg("0"))


def test_the_layers_taken_for_the_model():
    """`model = inject(...)`, then a call, a method, a head: each error names inject()."""
    taken = inject(two_matrices(), cfg("0"))
    for use in (lambda: taken(X), lambda: taken.parameters(), lambda: taken.classifier):
        with pytest.raises(AttributeError, match=r"inject\(\)"):
            use()
    assert [*taken] == ["0"]


# ---- wrappers ------------------------------------------------------------------------------------

def compiled(module):
    return torch.compile(module, backend="eager")


def test_compiled_and_wrapped_models(tmp_path):
    """A model in torch.compile, as a whole or in part, or in DataParallel has other names, so each
    function refuses it. Trained through the wrapper, the plain model saves what it computes."""
    def make():
        return chain(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Tanh, nn.Linear)

    def part(model):
        return nn.Sequential(compiled(model[0]), *model[1:])

    for wrap in (compiled, part, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))):
        model, config = make(), cfg("0.0")
        untouched("torch.compile", inject, wrap(model), config)
        layers = inject(model, config)
        model[2].requires_grad_(True)
        fit(wrap(model), config, layers)
        for action in (compact_, merge_, lambda model: save_adapter(model, tmp_path / "no")):
            untouched("torch.compile", action, wrap(model))
        save_adapter(compact_(model), tmp_path)
        untouched("torch.compile", load_adapter, wrap(make()), tmp_path)
        other = make()
        load_adapter(other, tmp_path)
        close(other.eval()(X), model.eval()(X))


# ---- optimizers ----------------------------------------------------------------------------------

def three_optimizers():
    """(model, config, layers, optimizers): Muon's way, one for matrices, one for the gates, one for
    the head."""
    model, config = two_matrices(), cfg("0", start_rank=2)
    layers = inject(model, config)
    model[2].requires_grad_(True)
    layer = layers["0"]
    return model, config, layers, [
        torch.optim.SGD([layer.A, layer.B], lr=0.1, momentum=0.9),
        torch.optim.AdamW([layer.c], lr=1e-2), torch.optim.RMSprop(model[2].parameters(), lr=1e-3)]


def test_several_optimizers_through_compact():
    """compact_ cuts the state of three optimizers: the rest of the run ends at the outputs of the
    masks alone, whatever their order. Given only some of them, it names the layer and changes
    nothing: the others' next step would die, or keep momentum for parameters that are gone."""
    ends = []
    for order in ((), (0, 1, 2), (2, 1, 0)):
        model, config, layers, optimizers = three_optimizers()

        def compact(pruner):
            if order and pruner.t == pruner.last:
                compact_(model, *(optimizers[i] for i in order))

        fit(model, config, layers, 40, optimizers, compact)
        assert len(layers["0"].c) == (1 if order else 2)
        ends.append(model(X))
    close(ends[0], ends[1])
    close(ends[0], ends[2])

    model, config, layers, optimizers = three_optimizers()
    fit(model, config, layers, 40, optimizers)
    for given in ((0,), (1,), (2,), (0, 2), (1, 2)):
        refused("^0: .*optimizer", compact_, model, *(optimizers[i] for i in given))
        assert len(layers["0"].c) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_graph_that_is_still_held(dtype):
    """A graph of an earlier step, which still knows the old shapes, does no harm after compact_;
    hooks on parameters still run."""
    model, config = two_matrices(), cfg("0", start_rank=3)
    layers = inject(model, config)
    _, optimizer = fit(model, config, layers)
    model.to(dtype)
    calls, A = [], layers["0"].A
    A.register_hook(lambda grad: calls.append(grad.shape))
    A.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    held = model(X.to(dtype)).sum()
    compact_(model, optimizer)
    model(X.to(dtype)).sum().backward()
    assert calls == [A.shape] * 2 and len(A) == 1 and A.grad.dtype == dtype
    del held


# ---- code that reads an nn.Linear ----------------------------------------------------------------

class Reader(nn.Module):
    """What other people's code does with an nn.Linear: product, dtype, sizes, bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wo = nn.Linear(8, 6)

    def forward(self, x):
        x = x.to(self.wo.weight.dtype)  # T5
        y = nn.functional.linear(x, self.wo.weight, self.wo.bias)
        z = x @ self.wo.weight.T + self.wo.bias
        assert y.shape[-1] == self.wo.out_features and x.shape[-1] == self.wo.in_features
        return y + z + self.wo(x)


def test_code_that_reads_the_weight():
    """Outputs and gradients of code that uses layer.weight, bias and sizes equal three times those
    of the layer. Over a half-precision base A, B and c are float32, which small updates need, and
    layer.weight and the output have the base's dtype, the sum rounded once."""
    model = Reader()
    layers = inject(model, cfg("wo", rank=2))
    randomize(layers)
    parameters = (model.wo.A, model.wo.B, model.wo.c)
    close(model(X), 3 * model.wo(X))
    ours = torch.autograd.grad(model(X).square().sum(), parameters)
    theirs = torch.autograd.grad((3 * model.wo(X)).square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = Reader().to(dtype)
        layer = inject(model, cfg("wo", rank=2, **FLAT))["wo"]
        randomize({"wo": layer})
        wide = torch.promote_types(dtype, torch.float32)
        assert {p.dtype for p in (layer.A, layer.B, layer.c)} == {wide}
        assert torch.equal(layer.weight, (layer.base.weight.to(wide) + layer.delta_weight()).to(
            dtype))
        assert layer(X.to(dtype)).dtype == dtype
        merged = layer.weight
        assert torch.equal(merge_(model).wo.weight, merged)


# ---- inputs, dtypes, modes -----------------------------------------------------------------------

def test_inputs_of_any_shape():
    """Inputs with 1 to 5 dimensions, empty ones, and views that are transposed, strided or
    overlap: outputs and gradients equal those of W x, and the input stays as it is."""
    layer = inject(chain(nn.Linear), cfg("0", rank=2))["0"]
    randomize({"0": layer})
    base = torch.randn(8, 16)
    views = [base.T, base[:, ::2], base[:, :1].T.expand(5, 8), base.as_strided((4, 8), (1, 2))]
    shapes = ((8,), (3, 8), (2, 3, 8), (0, 8), (2, 0, 8), (1, 1, 1, 1, 8))
    for x in [*map(torch.randn, shapes), *views]:
        before, x = x.clone(), x.detach().requires_grad_(True)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        close(layer(x), expected)
        ours, theirs = (torch.autograd.grad(y.square().sum(), (x, layer.A, layer.B))
                        for y in (layer(x), expected))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-4)
        assert torch.equal(x, before)


def test_outputs_of_one_number(tmp_path):
    """A regression head d -> 1 as a target: a column of one number does not vary, so that its part
    of Eq. 10 is 0; the penalty is finite and the run reloads."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear(8, 1))

    model, config = make(), cfg("0", "2", rank=0.5, start_rank=2)
    layers = inject(model, config)
    penalty = dora.dem_penalty([layers["2"]])
    assert penalty.item() == pytest.approx(layers["2"].A.var(dim=1).mean().item())
    pruner = Pruner(layers, config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (loss_of(model, y=Y[:, :1]) + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    reloads(model, make, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tmp_path, dtype):
    """Autocast on the CPU, with a GradScaler: a run reloads, and autocast outputs equal the float32
    ones to the precision of the dtype."""
    model, config = two_matrices(), cfg("0", "2")
    pruner = Pruner(inject(model, config), config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(20):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model)
        optimizer.zero_grad()
        scaler.scale(loss + pruner.penalty()).backward()
        scaler.unscale_(optimizer)
        pruner.observe()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", dtype):
        low = model.eval()(X)
    assert low.dtype == dtype
    close(low.float(), model(X), 0.05)
    reloads(model, two_matrices, tmp_path)


# ---- other programs ------------------------------------------------------------------------------

def whole_run(model, other, folder, device):
    """Train, resume, compact and save the model; load into the other; return its merged outputs."""
    torch.manual_seed(5)
    config, x, y = cfg("0", "2", rank=0.5, start_rank=2), X.to(device), Y.to(device)
    pruner = Pruner(inject(model, config), config, 20)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(20):
        optimizer.zero_grad()
        (loss_of(model, x, y) + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        if step == 5:
            pruner.load_state_dict(pruner.state_dict())
    compact_(model, optimizer)
    save_adapter(model, folder)
    load_adapter(other, folder)
    return merge_(other)(x).detach().cpu()


def test_another_default_device(tmp_path):
    """A script that called torch.set_default_device: with the model on the CPU (and meta as the
    default) a whole run ends as it does without; with both on a simulated GPU, too."""
    pairs = [(two_matrices(), two_matrices()) for _ in range(3)]
    expected = whole_run(*pairs[0], tmp_path / "cpu", "cpu")
    with torch.device("meta"):
        close(whole_run(*pairs[1], tmp_path / "meta", "cpu"), expected)
    with Device("cuda"):
        on_device = [model.to("cuda") for model in pairs[2]]
        with torch.device("cuda"):
            close(whole_run(*on_device, tmp_path / "cuda", "cuda"), expected)


RUN = """
import torch
from torch import nn
import dora

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

model, config = make(), dora.DoRAConfig(rank=1, targets=("0", "2"))
pruner = dora.Pruner(dora.inject(model, config), config, 20)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    (model(torch.ones(4, 8)).square().mean() + pruner.penalty()).backward()
    pruner.observe()
    optimizer.step()
    pruner.step()
dora.compact_(model, optimizer)
dora.save_adapter(model, FOLDER, {"a": "b"})
other = make()
dora.load_adapter(other, FOLDER)
x = torch.ones(3, 8)
assert torch.allclose(other.eval()(x), model.eval()(x))
assert dora.read_file(FOLDER + "/adapter_model.safetensors")[1]["a"] == "b"
dora.merge_(model)
print(dora.rank_map(pruner.ranks()))
"""
PLAIN = """
import sys
sys.modules["numpy"] = None  # an import of it fails, as after a plain `pip install torch`
import torch, torch._dynamo
for name in ("uint16", "uint32", "uint64", *dir(torch)):
    if name.startswith(("float4", "float8", "uint16", "uint32", "uint64")):
        vars(torch).pop(name, None)
"""


def test_a_plain_torch(tmp_path):
    """A whole run, saved and loaded, in a process that cannot import numpy and whose torch lacks
    the number types that came with 2.3 to 2.8: dora.py needs neither."""
    code = PLAIN + RUN.replace("FOLDER", repr(str(tmp_path)))
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, text=True,
                           capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:2] == ["layer", "live"]


def test_a_module_that_was_reloaded(tmp_path):
    """A notebook that reloads dora.py has two classes of the same name. merge_, compact_ and
    save_adapter of one find no layer of the other's: an error, not a model that stays as it is. So
    they say of a plain model, and of one that was merged before."""
    spec = importlib.util.spec_from_file_location("reloaded_dora", ROOT / "dora.py")
    reloaded = sys.modules["reloaded_dora"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reloaded)
    model = two_matrices()
    randomize(inject(model, cfg("0", **FLAT)))
    merged = merge_(copy.deepcopy(model))
    for other in (model, merged, two_matrices()):
        for call in (reloaded.merge_, reloaded.compact_,
                     lambda model: reloaded.save_adapter(model, tmp_path / "x")):
            with pytest.raises(reloaded.DoRAError, match="DoRALinear"):
                call(other)
    assert isinstance(model[0], DoRALinear) and not (tmp_path / "x").exists()
    for call in (merge_, compact_):
        refused("DoRALinear", call, merged)


def test_going_back_to_earlier_weights(tmp_path):
    """The best epoch's weights, restored at the end of a run. From after the last pruning: saved,
    and they reload. From before it, with their masks, without, or of a compacted model: more
    components than the budget, so save_adapter, merge_ and compact_ refuse and say when to save."""
    config = cfg("0", "2", start_rank=3, interval=1)
    model = two_matrices()
    layers = inject(model, config)
    states = {}
    pruner, _ = fit(model, config, layers, 40, after=lambda pruner: states.update(
        {pruner.t: copy.deepcopy(model.state_dict())}))
    assert pruner.last == 20

    for step in (2, 8):
        for keys in ("all", "trained"):
            state = {key: value for key, value in states[step].items()
                     if keys == "all" or not key.endswith(("mask", "final"))}
            model.load_state_dict(state, strict=False)
            for call in (merge_, compact_, lambda model: save_adapter(model, tmp_path / "x")):
                refused("last pruning", call, model)
    assert not (tmp_path / "x").exists()

    model.load_state_dict(states[25])
    reloads(model, two_matrices, tmp_path / "later")


# ---- to change the method ------------------------------------------------------------------------

def test_an_own_importance(monkeypatch):
    """One function and one row: a run whose score is 0 for the first matrix and 1 for the second
    leaves every component in the second. A score of a wrong shape is refused by the row's name."""
    def last(layers):
        return torch.cat([torch.full_like(layer.c, i / (len(layers) - 1))
                          for i, layer in enumerate(layers)])

    monkeypatch.setitem(dora.IMPORTANCE, "last", (last, "weights", torch.cat))
    monkeypatch.setitem(dora.IMPORTANCE, "short", (lambda _: torch.ones(2), "weights", torch.cat))
    model, config = two_matrices(), cfg("0", "2", importance="last")
    pruner, _ = fit(model, config, inject(model, config))
    assert pruner.ranks() == {"0": 0, "2": 2}
    model, config = two_matrices(), cfg("0", "2", importance="short")
    refused(r"short.*\(4,\).*\(2,\)", fit, model, config, inject(model, config))


def test_an_own_schedule(monkeypatch):
    """A straight line as one function and one row: b(t) at the ends and in the middle of the window
    by hand, and its own budget at the end of a run."""
    monkeypatch.setitem(dora.SCHEDULES, "linear", lambda p, surplus: surplus - int(surplus * p))
    model, config = two_matrices(), cfg("0", "2", schedule="linear", budget_unit="components")
    assert [dora.budget(t, 100, config, 20) for t in (15, 32, 50)] == [40, 31, 20]
    pruner, _ = fit(model, config, inject(model, config))
    assert sum(pruner.ranks().values()) == 2


def test_a_copy_of_the_base_in_the_file(tmp_path):
    """PEFT also stores lm_head.base_layer.weight. Equal to the model's, in any dtype, it is left
    out; another one is refused by name."""
    weight = Tied().proj.weight.detach().clone()
    pair = {"proj.lora_A.weight": torch.ones(2, 8), "proj.lora_B.weight": torch.ones(20, 2)}
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')

    def write(copy_of_base):
        write_safetensors(tmp_path / "adapter_model.safetensors", {
            f"base_model.model.{key}": tensor for key, tensor in
            {**pair, "proj.base_layer.weight": copy_of_base}.items()})

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        write(weight.to(dtype))
        model = Tied()
        load_adapter(model, tmp_path)
        close(model.proj.weight, weight + 2)
    write(weight + 1)
    refused(r"proj\.weight", load_adapter, Tied(), tmp_path)

"""dora.py on models and in programs that it was not written for: right, or refused in one line.
(Which base an adapter fits: test_bases.py. The same with PEFT: peers/test_other_models.py.)"""
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
    FLAT, IDS, X, Y, Tied, adamw, cfg, chain, close, fit, loss_of, randomize, refused, reloads,
    trainable, two_adapted, two_matrices, unfinished, untouched)
from torch import nn
from torch.nn.utils import parametrizations, prune

import dora
from dora import DoRALinear, Pruner, compact_, inject, load_adapter, merge_, save_adapter

TESTS = Path(__file__).parent


def test_a_shared_head(tmp_path):
    """A head that is tied to the embedding trains and reloads as such."""
    model = Tied()
    randomize(inject(model, cfg("mid", **FLAT)))
    nn.init.normal_(model.proj.requires_grad_(True).weight)
    reloads(model, Tied, tmp_path, lambda model: model(IDS), tolerance=1e-4)


def test_an_adapted_matrix_that_is_tied():
    """Adapting and merging a tied matrix leaves the embedding's weight and the old base alone."""
    model = Tied()
    base = model.proj
    randomize(inject(model, cfg("proj", **FLAT)))
    expected = model(IDS)
    close(merge_(model)(IDS), expected)
    assert torch.equal(model.emb.weight, Tied().emb.weight)
    assert model.proj is not base and torch.equal(base.weight, Tied().emb.weight)


NOT_LINEAR = [
    lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
    lambda: type("Own", (nn.Linear,), {})(8, 8),
    lambda: type("Conv1D", (nn.Module,), {})(),
    lambda: nn.Embedding(8, 8),
]


@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_adapted():
    """Hooks, computed weights, subclasses, other kinds are refused by the target and the module's
    name, one nn.Linear under two names by both. So is a model that is adapted already."""
    for make in NOT_LINEAR:
        model = two_matrices()
        model[0] = make()
        untouched("'0'.* 0 ", inject, model, cfg("0"))
    for register in ("register_forward_hook", "register_full_backward_hook"):
        model = two_matrices()
        getattr(model[0], register)(print)
        untouched("'0'.* 0 has hooks", inject, model, cfg("0"))
    shared = nn.Linear(8, 8)
    untouched("0 .*2 ", inject, chain(shared, nn.Tanh, shared), cfg("0"))
    block = nn.Sequential(nn.Linear(8, 8))
    untouched(r"0\.0 .*1\.0 ", inject, nn.ModuleList([block, block]), cfg("0.0"))
    model, _ = two_adapted("0")
    untouched("already", inject, model, cfg("2"))


def test_the_layers_taken_for_the_model():
    """`model = inject(...)`, then a call, a method, a head: each error names inject()."""
    _, taken = two_adapted("0")
    for use in (lambda: taken(X), lambda: taken.parameters(), lambda: taken.classifier):
        with pytest.raises(AttributeError, match=r"inject\(\)"):
            use()
    assert [*taken] == ["0"]


def test_what_a_file_has_no_place_for(tmp_path):
    """A parameter of the model itself that trains, the base of an adapted matrix that does, and a
    model that was frozen before saving are refused, since PEFT's format holds whole modules."""
    model, layers = two_adapted("0", "2")
    fit(model, layers)
    model.gain = nn.Parameter(torch.ones(8))
    refused("gain", save_adapter, model, tmp_path / "x")
    del model.gain
    for frozen in (model[2].base.weight, model[2].base.bias):
        frozen.requires_grad_(True)
        refused("^2: ", Pruner, layers, cfg("0", "2"), 20)
        refused("^2: ", save_adapter, model, tmp_path / "x")
        frozen.requires_grad_(False)
    model.requires_grad_(False)
    refused("frozen", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", dora.METHODS)
def test_an_optimizer_made_before_inject(tmp_path, method):
    """The optimizer holds the parameters from before inject(): an error at the first pruning, and
    for lora when saving. So it is with gates that no optimizer got, although A and B trained."""
    model = two_matrices()
    optimizer = adamw(model)
    layers = inject(model, cfg("0", **dora.METHODS[method]))

    def run():
        fit(model, layers, optimizers=[optimizer])
        save_adapter(model, tmp_path / "x")

    refused("optimizer", run)
    if method == "dora":
        optimizer = torch.optim.AdamW([layers["0"].A, layers["0"].B])
        refused("gate", run)
    assert not (tmp_path / "x").exists()


def test_layers_that_the_model_does_not_use():
    """The loss gives a copy's layers no gradient, although the penalty does: observe() refuses."""
    model = two_matrices()
    layers = inject(copy.deepcopy(model), cfg("0", "2"))
    inject(model, cfg("0", "2"))
    refused("gradient", fit, model, layers)


def test_a_pruner_of_some_layers():
    """A Pruner of a part of the layers, or with other settings than inject() got, is refused."""
    _, layers = two_adapted("0", "2")
    refused("layers", Pruner, {"0": layers["0"]}, cfg("0", "2"), 20)
    refused("^0: ", Pruner, layers, cfg("0", "2", eta=0.4), 20)


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_part(model):
    return nn.Sequential(compiled(model[0]), *model[1:])


@pytest.mark.parametrize("wrap", [compiled, compiled_in_part, nn.DataParallel])
def test_compiled_and_wrapped_models(tmp_path, wrap):
    """A model in torch.compile, as a whole or in part, or in DataParallel has other names, so each
    function refuses it. Trained through the wrapper, the plain model saves what it computes."""
    def make():
        block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        return chain(block, nn.Tanh, nn.Linear)

    model = make()
    untouched("torch.compile", inject, wrap(model), cfg("0.0"))
    layers = inject(model, cfg("0.0"))
    model[2].requires_grad_(True)
    fit(wrap(model), layers)
    unfinished("torch.compile", wrap(model), tmp_path / "no")
    save_adapter(compact_(model), tmp_path / "yes")
    untouched("torch.compile", load_adapter, wrap(make()), tmp_path / "yes")
    reloads(model, make, tmp_path / "yes")


def test_several_optimizers_through_compact():
    """An optimizer for matrices, one for gates, one for the head: compact_ cuts the states, and the
    run ends at the outputs of the masks alone. Some of the optimizers are refused."""
    ends = []
    for compacts in (True, False):
        model, layers = two_adapted("0")
        model[2].requires_grad_(True)
        layer = layers["0"]
        matrices = torch.optim.SGD([layer.A, layer.B], lr=0.1, momentum=0.9)
        gates = torch.optim.AdamW([layer.c], lr=1e-2)
        head = torch.optim.RMSprop(model[2].parameters())

        def compact(pruner):
            if compacts and pruner.t == pruner.last:
                for some in ([matrices], [gates], [head], [matrices, head], [gates, head]):
                    refused("component.*optimizer", compact_, model, *some)
                assert len(layer.c) == 2
                compact_(model, head, gates, matrices)

        fit(model, layers, 40, [matrices, gates, head], compact)
        assert len(layer.c) == (1 if compacts else 2)
        ends.append(model(X))
    close(*ends)


def test_a_graph_that_is_still_held():
    """A graph of an earlier step does no harm after compact_; hooks on parameters still run."""
    model, layers = two_adapted("0", start_rank=3)
    _, optimizer = fit(model, layers)
    model.half()
    calls, A, x = [], layers["0"].A, X.half()
    A.register_hook(lambda grad: calls.append(grad.shape))
    A.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    held = model(x).sum()
    compact_(model, optimizer)
    model(x).sum().backward()
    assert calls == [A.shape] * 2 and len(A) == 1
    del held


def test_inputs_of_any_shape():
    """Inputs with 1 to 5 dimensions, empty ones and odd views: outputs and gradients equal those of
    code that reads weight and bias as of an nn.Linear, and the input stays as it is."""
    layer = inject(chain(nn.Linear), cfg("0", rank=2))["0"]
    assert layer.in_features == layer.out_features == 8
    randomize({"0": layer})
    square = torch.randn(8, 8)
    for x in (square[0], square, square.view(2, 4, 8), square[:0], square.view(1, 1, 1, 8, 8),
              square.T, torch.randn(8, 16)[:, ::2], square[:, :1].T.expand(5, 8)):
        before, x = x.clone(), x.detach().requires_grad_(True)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        close(layer(x), expected)
        of = (x, layer.A, layer.B)
        gradients = torch.autograd.grad(expected.square().sum(), of)
        close(torch.autograd.grad(layer(x).square().sum(), of), gradients, 1e-4)
        assert x.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_in_another_dtype(dtype):
    """Over a half-precision base A, B and c are float32, which small updates need, and layer.weight
    and the output have the base's dtype, the sum rounded once."""
    model = chain(nn.Linear).to(dtype)
    layer = inject(model, cfg("0", rank=2, **FLAT))["0"]
    randomize({"0": layer})
    wide = torch.promote_types(dtype, torch.float32)
    assert layer.A.dtype == layer.B.dtype == layer.c.dtype == wide
    merged = layer.base.weight.to(wide) + layer.delta_weight()
    assert layer.weight.equal(merged.to(dtype))
    assert layer(X.to(dtype)).dtype == dtype
    assert merge_(model)[0].weight.equal(merged.to(dtype))


def test_outputs_of_one_number():
    """A target of one output: its columns do not vary, and the penalty is finite."""
    layer = inject(chain(nn.Linear(8, 1)), cfg("0"))["0"]
    expected = layer.A.var(dim=1).mean()
    assert dora.dem_penalty([layer]).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tmp_path, dtype):
    """A run under autocast reloads, and its outputs equal the float32 ones to that precision."""
    def output(model):
        with torch.autocast("cpu", dtype):
            return model(X)

    model, layers = two_adapted("0", "2")
    fit(model, layers, loss=lambda model: (output(model) - Y).square().mean())
    low = output(model.eval())
    assert low.dtype == dtype
    close(low.float(), model(X), 0.05)
    reloads(model, two_matrices, tmp_path)


def whole_run(model, other, folder, device):
    """Train, compact and save the model; load into the other; return its merged outputs."""
    torch.manual_seed(5)
    layers = inject(model, cfg("0", "2", rank=0.5, start_rank=2))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    x, y = X.to(device), Y.to(device)
    fit(model, layers, optimizers=[optimizer], loss=lambda model: loss_of(model, x, y))
    save_adapter(compact_(model, optimizer), folder)
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


PLAIN = """
import sys
sys.modules["numpy"] = None  # an import of it fails, as after a plain `pip install torch`
import torch, torch._dynamo
for name in ("uint16", "uint32", "uint64", *dir(torch)):
    if name.startswith(("float4", "float8", "uint16", "uint32", "uint64")):
        vars(torch).pop(name, None)

sys.path[:0] = ["..", "."]
from pathlib import Path
import dora
from small import compact_, fit, reloads, two_adapted, two_matrices
model, layers = two_adapted("0", "2")
pruner, optimizer = fit(model, layers)
reloads(compact_(model, optimizer), two_matrices, Path(sys.argv[1]))
print(dora.rank_map(pruner.ranks()))
"""


def test_a_plain_torch(tmp_path):
    """A whole run, saved and loaded, in a process that cannot import numpy and whose torch lacks
    the number types that came with 2.3 to 2.8: dora.py needs neither."""
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, str(tmp_path)]
    found = subprocess.run(command, cwd=TESTS, text=True, capture_output=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:2] == ["layer", "live"]


def test_a_module_that_was_reloaded(tmp_path):
    """A reloaded dora.py finds no layer of the first one's classes: an error, not a model that is
    left as it was. So it is with a plain model, and with one that was merged before."""
    spec = importlib.util.spec_from_file_location("reloaded_dora", TESTS.parent / "dora.py")
    reloaded = sys.modules["reloaded_dora"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reloaded)
    model, layers = two_adapted("0", **FLAT)
    randomize(layers)
    with pytest.raises(reloaded.DoRAError, match="DoRALinear"):
        reloaded.merge_(model)
    assert isinstance(model[0], DoRALinear)
    for other in (merge_(model), two_matrices()):
        unfinished("DoRALinear", other, tmp_path / "x")


def test_going_back_to_earlier_weights(tmp_path):
    """The best epoch's weights, restored at the end of a run, reload if they come after the last
    pruning. From before it, with their masks or without, they are refused."""
    model, layers = two_adapted("0", "2", start_rank=3, interval=1)
    states = {}

    def keep(pruner):
        states[pruner.t] = copy.deepcopy(model.state_dict())

    pruner, _ = fit(model, layers, 40, after=keep)
    assert pruner.last == 20
    for step in (2, 8):
        trained = {key: value for key, value in states[step].items()
                   if not key.endswith(("mask", "final"))}
        for state in (states[step], trained):
            model.load_state_dict(state, strict=False)
            unfinished("last pruning", model, tmp_path / "x")
    model.load_state_dict(states[25])
    reloads(model, two_matrices, tmp_path / "later")


def test_an_own_importance(monkeypatch):
    """A row whose function returns a score of a wrong shape is refused by its name."""
    row = (lambda layers: torch.ones(2), "weights", torch.cat)
    monkeypatch.setitem(dora.IMPORTANCE, "short", row)
    refused(r"short.*\(4,\).*\(2,\)", fit, *two_adapted("0", "2", importance="short"))

"""dora.py on models that it was not written for: right, or refused in one line.

The cases M1 to M23 and A1 to A12 are those of ../shared/cases.md and ../shared/first-use.md, M24 to
M37 came later; tests/README.md maps each to its tests. The same questions with PEFT:
peers/test_other_models.py.
"""
import copy
import gc
import pickle
import re
import time

import pytest
import torch
from small import net_config, randomize, trained
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import dora
from dora import (
    DoRAConfig,
    DoRAError,
    DoRALinear,
    Pruner,
    compact_,
    inject,
    load_adapter,
    merge_,
    rank_map,
    read_safetensors,
    save_adapter,
    write_safetensors,
)

# what torch says of the features that these tests use on purpose
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    "Sparse CSR tensor support is in beta", "None of the inputs have requires_grad=True",
    "The PyTorch API of nested tensors", "enable_nested_tensor is True",
    "Full backward hook is firing", "`torch.jit.")]
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def cfg(*targets, **changes):
    return DoRAConfig(**{"rank": 1, "dropout": 0.0, "targets": targets, **changes})


def chain(*modules, seed=0):
    """nn.Sequential of modules that fit X and Y, with seeded weights."""
    model = nn.Sequential(*(nn.Linear(8, 8) if module is nn.Linear else
                            module() if isinstance(module, type) else module for module in modules))
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters") and not isinstance(module, nn.LazyLinear):
            module.reset_parameters()
    return model


def loss_of(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def fit(model, config, layers, steps=20, lr=1e-2, before_step=None, **options):
    """The README's loop; returns the Pruner and the optimizer."""
    torch.manual_seed(2)
    pruner = Pruner(layers, config, steps)
    make = options.pop("optimizer", torch.optim.AdamW)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    model.train()
    for step in range(steps):
        train_step(model, pruner, optimizer)
        if before_step:
            before_step(step, optimizer)
    return pruner, optimizer


def train_step(model, pruner, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model) + pruner.penalty()
        loss.backward()
        return loss

    closure()
    pruner.observe()
    optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    pruner.step()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def reloads(model, make, folder, call=lambda model: model(X), tolerance=1e-5):
    """Save the model's adapter and load it into make(): the same output as before, and again after
    merge_ of both."""
    expected = call(model.eval())
    save_adapter(model, folder)
    fresh = make().eval()
    different = (call(fresh) - expected).abs().max()
    load_adapter(fresh, folder)
    close(call(fresh.eval()), expected, tolerance)
    assert different > 1e-3  # the adapter does something
    close(call(merge_(fresh)), expected, tolerance)
    close(call(merge_(model)), expected, tolerance)


def refused(says, call, *args, **options):
    """The call raises a DoRAError of one line that matches."""
    with pytest.raises(DoRAError, match=says) as error:
        call(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def untouched(says, model, config):
    """inject() refuses, and the model is as it was: modules, weights, what requires gradients."""
    def state():
        return ([(name, type(m), id(m)) for name, m in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()])

    before = state()
    refused(says, inject, model, config)
    assert state() == before


# ---- M1 to M4: what is shared, and what moves ----------------------------------------------------

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


def test_m1_a_tied_head_gets_its_own_weight(tmp_path):
    """M1: an adapter that holds a new matrix for `proj` alone, which is tied to the embedding. The
    loaded model equals the one whose proj was untied by hand, and the embedding is as it was."""
    untied = Tied()
    untied.proj.weight = nn.Parameter(torch.randn(20, 8))
    config = cfg("mid", importance=None, schedule=None)
    inject(untied, config)
    randomize({"mid": untied.mid})
    untied.proj.requires_grad_(True)
    save_adapter(untied, tmp_path)
    model = Tied()
    load_adapter(model, tmp_path)
    close(model(IDS), untied(IDS))
    assert torch.equal(model.emb.weight, Tied().emb.weight)


def test_m1_a_tied_head_that_trains(tmp_path):
    """M1: training the tied weight saves both modules, and the loaded model gives the outputs."""
    model = Tied()
    config = cfg("mid")
    layers = inject(model, config)
    model.proj.requires_grad_(True)
    pruner = Pruner(layers, config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    reloads(model, Tied, tmp_path, lambda model: model(IDS))


def test_m1_an_adapted_matrix_that_is_tied():
    """M1: adapting the tied matrix and merging it leaves the embedding's weight alone; two tied
    nn.Linear, of which one is adapted, stay two."""
    model = Tied()
    layers = inject(model, cfg("proj", importance=None, schedule=None))
    randomize(layers)
    expected = model(IDS)
    close(merge_(model)(IDS), expected)
    assert torch.equal(model.emb.weight, Tied().emb.weight)

    pair = chain(nn.Linear, nn.Tanh, nn.Linear)
    pair[2].weight = pair[0].weight
    before = pair[2].weight.clone()
    randomize(inject(pair, cfg("0", importance=None, schedule=None)))
    expected = pair(X)
    close(merge_(pair)(X), expected)
    assert torch.equal(pair[2].weight, before)


def test_m1_a_shared_module_in_the_head(tmp_path):
    """M1: a head that is one module under two names reloads as such; a file that holds only one of
    the names, or different values for them, is refused."""
    def make():
        model = chain(nn.Linear, nn.Tanh, nn.Linear, nn.Linear)
        model[3] = model[2]
        return model

    model, config = make(), cfg("0")
    layers = inject(model, config)
    model[2].requires_grad_(True)
    fit(model, config, layers)
    reloads(model, make, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: t.clone() for key, t in read_safetensors(file).items()}
    for edit in (lambda t: t.pop("base_model.model.3.weight"),
                 lambda t: t["base_model.model.3.weight"].zero_()):
        changed = {key: t.clone() for key, t in tensors.items()}
        edit(changed)
        write_safetensors(file, changed)
        refused("used as 2 and 3", load_adapter, make(), tmp_path)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_m2_a_lone_parameter_of_a_head(tmp_path, part):
    """M2, A1: only the weight or only the bias of a module trains: saved with its module, the
    reloaded outputs equal."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    getattr(model[2], part).requires_grad_(True)
    fit(model, config, layers)
    reloads(model, make, tmp_path)


def test_m2_frozen_again_before_saving(tmp_path):
    """M2: a head that trained and was frozen again before saving is saved all the same."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    model[2].requires_grad_(True)
    fit(model, config, layers)
    model.requires_grad_(False)
    reloads(model, make, tmp_path)


def test_m2_a_parameter_of_the_model_itself(tmp_path):
    """M2: a parameter that belongs to the root trains: no module holds it without the adapted
    matrices, so saving is refused and no file is written; frozen and unmoved, it is no matter."""
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.up(x) * self.gain

    model, config = Root(), cfg("up")
    layers = inject(model, config)
    model.gain.requires_grad_(True)
    fit(model, config, layers)
    refused("gain changed since inject.*the model contains adapted", save_adapter, model,
            tmp_path / "x")
    model.gain.requires_grad_(False)
    refused("gain changed", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()

    model = Root()
    layers = inject(model, config)
    fit(model, config, layers)
    reloads(model, Root, tmp_path / "y")


def test_a1_a_target_inside_a_head_that_trains(tmp_path):
    """A1: the head is unfrozen whole, and one of its matrices is adapted: refused when the
    Pruner is made; unfrozen later, when saving."""
    model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", "2")
    layers = inject(model, config)
    model[2].requires_grad_(True)
    refused("2: its frozen weight was set to train", Pruner, layers, config, 20)
    model[2].base.requires_grad_(False)
    fit(model, config, layers)
    model[2].requires_grad_(True)
    refused("2: its frozen weight was set to train", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a1_bitfit_with_dora(tmp_path):
    """A1: all biases unfrozen. Those of the adapted matrices are refused when the Pruner is made;
    without them, the other modules are saved and the outputs equal."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.LayerNorm(8), nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or name.endswith("bias"))
    refused("0: its frozen bias was set to train", Pruner, layers, config, 20)
    model[0].base.bias.requires_grad_(False)
    fit(model, config, layers)
    reloads(model, make, tmp_path)


def test_m3_a_module_that_is_used_twice(tmp_path):
    """M3: one nn.Linear under two names, in one container, in two, or within a shared block:
    refused by both names; loading an adapter of either name is refused, too."""
    shared = nn.Linear(8, 8)
    block = nn.Sequential(nn.Linear(8, 8))
    for model, names in ((chain(shared, nn.Tanh, shared), "0 and 2"),
                         (nn.ModuleDict({"a": chain(shared), "b": chain(shared)}), "a.0 and b.0"),
                         (nn.ModuleList([block, block]), "0.0 and 1.0")):
        target = "0" if names != "0.0 and 1.0" else "0.0"
        untouched(f"{re.escape(names)} are one module", model, cfg(target))
    plain_one = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(plain_one, cfg("2", importance=None, schedule=None))
    randomize(layers)
    save_adapter(plain_one, tmp_path)
    same = chain(shared, nn.Tanh, shared)
    same[0].load_state_dict(plain_one[2].base.state_dict())
    refused("0 and 2 are one module", load_adapter, same, tmp_path)


def test_m3_merge_never_writes_into_a_module():
    """M3: somebody else holds the base: after merge_ its weight is as it was."""
    model = chain(nn.Linear, nn.Tanh)
    base, before = model[0], model[0].weight.clone()
    randomize(inject(model, cfg("0", importance=None, schedule=None)))
    merge_(model)
    assert model[0] is not base and torch.equal(base.weight, before)
    assert not torch.equal(model[0].weight, before)


class Instance(nn.Module):
    """InstanceNorm over the last dimension of (N, 8)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x):
        return self.norm(x[:, None])[:, 0]


NORMS = [lambda: nn.BatchNorm1d(8), lambda: nn.BatchNorm1d(8, affine=False),
         lambda: nn.BatchNorm1d(8, momentum=None), Instance]


@pytest.mark.parametrize("norm", NORMS)
def test_m4_running_statistics(tmp_path, norm):
    """M4: statistics that moved in training, with frozen weights and without any, are saved, and
    the reloaded model equals it; in eval mode nothing moves and nothing is saved."""
    def make():
        return chain(nn.Linear, norm(), nn.Linear)

    model, config = make(), cfg("2")
    layers = inject(model, config)
    fit(model, config, layers)
    reloads(model, make, tmp_path / "moved")

    model = make().eval()
    layers = inject(model, config)
    pruner = Pruner(layers, config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        train_step(model, pruner, optimizer)
    save_adapter(model, tmp_path / "still")
    assert all(".lora_" in key for key in read_safetensors(
        tmp_path / "still" / "adapter_model.safetensors"))


class Counter(nn.Module):
    """A matrix beside a buffer that moves with every forward pass in training."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean += 0.1 * x.mean(0).detach()
        return self.up(x) + self.mean


def test_m4_a_buffer_beside_adapted_matrices(tmp_path):
    """M4: a buffer that moves in the very module that holds an adapted matrix: no module can be
    saved without the matrix, so saving is refused."""
    model, config = chain(Counter(), nn.Linear), cfg("up")
    layers = inject(model, config)
    fit(model, config, layers)
    refused(r"0\.mean changed since inject.*0 contains adapted", save_adapter, model, tmp_path)


def test_m4_buffers_of_any_kind():
    """M4: sparse, complex, empty, integer and meta buffers neither stop inject() nor count as
    moved; a module that is not initialised yet is refused by name."""
    model = chain(nn.Linear, nn.Linear)
    for name, value in (("sparse", torch.eye(3).to_sparse()), ("csr", torch.eye(3).to_sparse_csr()),
                        ("nan", torch.tensor([float("nan"), -float("inf")])),
                        ("complex", torch.ones(3, dtype=torch.complex64)),
                        ("empty", torch.empty(0, 2)), ("meta", torch.empty(2, device="meta")),
                        ("bool", torch.ones(3, dtype=torch.bool)), ("number", torch.tensor(3))):
        model.register_buffer(name, value)
    untouched("1.weight is not initialised", chain(nn.Linear, nn.LazyLinear(3)), cfg("0"))
    layers = inject(model, cfg("0"))
    assert dora.modules_to_save(model, layers) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_m4_another_dtype_has_not_moved(tmp_path, dtype):
    """M4: a model that changes its dtype after inject() has not moved: only the head that
    trained is saved."""
    model, config = chain(nn.Linear, nn.LayerNorm(8), nn.BatchNorm1d(8).eval(), nn.Linear), cfg("0")
    layers = inject(model, config)
    model[3].requires_grad_(True)
    model.to(dtype)
    assert dora.modules_to_save(model, layers) == ["3"]


# ---- M5 to M7: nothing trained; targets ----------------------------------------------------------

@pytest.mark.parametrize("method", ["paper", "lora", "dora"])
def test_m5_reentrant_checkpointing(tmp_path, method):
    """M5: checkpointing with use_reentrant=True over a frozen input gives no gradient. Every method
    stops at the first observe(); without a Pruner (lora) saving is refused."""
    rank = dict(rank=2) if method == "lora" else dict(rank=1, start_rank=2)
    config = cfg("0", **dora.METHODS[method] | rank)
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, config)
    model[2].requires_grad_(True)
    pruner = Pruner(layers, config, 20)
    model[2](checkpoint(model[:2], X, use_reentrant=True)).sum().backward()
    refused("no component has a gradient.*use_reentrant=False", pruner.observe)
    if method == "lora":
        refused("every update is exactly 0", save_adapter, model, tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_m5_checkpointing_that_works(reentrant):
    """M5: checkpointing (reentrant over an input that requires a gradient) gives the gradients of
    the model without it."""
    grads = []
    for use in (False, True):
        model = chain(nn.Linear, nn.Tanh, nn.Linear)
        layers = inject(model, cfg("0", "2"))
        randomize(layers)
        x = X.clone().requires_grad_(True)
        out = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad] + [x.grad])
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("method", dora.METHODS)
def test_m6_an_optimizer_made_before_inject(tmp_path, method):
    """M6: the optimizer holds the parameters from before inject(): an error at the first pruning,
    and for lora when saving; no file is written."""
    rank = dict(rank=2) if method == "lora" else dict(rank=1, start_rank=2)
    config = cfg("0", **dora.METHODS[method] | rank)
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    layers = inject(model, config)
    pruner = Pruner(layers, config, 20)

    def run():
        for _ in range(20):
            train_step(model, pruner, optimizer)
        save_adapter(model, tmp_path / "x")

    refused("make the optimizer after inject", run)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("targets", [("10"), "query", ["0"], (0,), ("",), (), ("0", ""), None])
def test_m7_targets_that_are_no_tuple_of_names(targets):
    """M7, A12: a string (a forgotten comma), a list, numbers, an empty name: refused by value."""
    refused("^targets = ", DoRAConfig, targets=targets)


def test_m7_a_model_that_is_a_matrix():
    """M7: nn.Linear itself as the model, which inject() could not replace, is refused."""
    untouched("target 'x' matches no module; candidates: none", nn.Linear(8, 8), cfg("x"))


# ---- M8, A4: code that reads layer.weight --------------------------------------------------------

def encoder_layer(seed=0):
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_m8_torchs_transformer(norm_first, whole):
    """M8, A4: torch's TransformerEncoder reads linear1.weight in its fast path (eval mode,
    no_grad). Its outputs equal those of the slow path and of the merged model, with a padding
    mask, too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True,
                                       norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2) if whole else layer
    layers = inject(model, cfg("linear1", "linear2", rank=2))
    randomize(layers)
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for mask in (None, padding):
        slow = model.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            fast = model.eval()(x, src_key_padding_mask=mask)
        keep = ~padding if mask is not None else slice(None)
        close(fast[keep], slow[keep], 1e-4)
    with torch.no_grad():
        before = model(x)
        for layer in layers.values():
            layer.mask.fill_(True)
            layer.progress.t = layer.progress.last = layer.progress.total = 0
    assert (before - nn.functional.layer_norm(x, (16,))).abs().max() > 1e-3


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


def test_a4_code_that_reads_the_weight():
    """A4: outputs and gradients of code that uses layer.weight, bias, in_features and out_features
    equal three times those of the layer itself."""
    model = Reader()
    layers = inject(model, cfg("wo", rank=2))
    randomize(layers)
    wo = model.wo
    parameters = (wo.A, wo.B, wo.c)
    expected = 3 * wo(X)
    close(model(X), expected)
    ours = torch.autograd.grad(model(X).square().sum(), parameters)
    theirs = torch.autograd.grad((3 * wo(X)).square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a4_the_weights_dtype_is_the_bases(dtype):
    """A4: over a half-precision base layer.weight has the base's dtype, and equals the float32 sum
    rounded once."""
    model = Reader().to(dtype)
    layers = inject(model, cfg("wo", rank=2))
    randomize(layers)
    layer = layers["wo"]
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, (layer.base.weight.float() + layer.delta_weight()).to(dtype))


# ---- M9: hooks -----------------------------------------------------------------------------------

def test_m9_hooks_of_an_adapted_matrix():
    """M9: forward and backward hooks on a matrix, set before inject(), see what they would on the
    merged model: its inputs and outputs in their own shape, and the gradients of both. Outputs that
    a hook keeps do not change afterwards."""
    seen = {}

    def watch(model, which):
        kept = seen[which] = []
        model[1].register_forward_pre_hook(lambda m, args: kept.append(args[0]))
        model[1].register_forward_hook(lambda m, args, out: kept.append(out))
        model[1].register_full_backward_hook(lambda m, gi, go: kept.extend([gi[0], go[0]]))
        model[1].register_full_backward_pre_hook(lambda m, go: kept.append(go[0]))

    x = X.view(4, 2, 8, 8)
    model = chain(nn.Linear, nn.Linear, nn.Linear)
    watch(model, "ours")
    randomize(inject(model, cfg("0", "1", importance=None, schedule=None)))
    merged = merge_(copy.deepcopy(model))
    for key in dora.HOOKS:
        if isinstance(getattr(merged[1], key), dict):
            getattr(merged[1], key).clear()
    merged.requires_grad_(True)
    watch(merged, "merged")
    for net in (model, merged):
        net(x).square().sum().backward()
    assert len(seen["ours"]) == 5
    for a, b in zip(seen["ours"], seen["merged"], strict=True):
        close(a, b, 1e-4)


def test_m9_a_hook_that_changes_the_output():
    """M9: a hook that doubles a matrix's output doubles all of it, and so after merge_, after
    compact_ of a matrix without components, and after loading; its handle still removes it."""
    model = chain(nn.Linear, nn.Linear)
    handle = model[0].register_forward_hook(lambda m, args, out: 2 * out)
    layers = inject(model, cfg("0", "1", importance=None, schedule=None))
    randomize(layers)
    W, b = model[0].weight, model[0].bias
    expected = nn.functional.linear(2 * nn.functional.linear(X, W, b), model[1].weight,
                                    model[1].bias)
    close(model(X), expected, 1e-4)
    close(merge_(copy.deepcopy(model))(X), expected, 1e-4)
    empty = copy.deepcopy(model)
    empty[0].mask.fill_(False)
    empty[0].c.data.zero_()
    before = empty(X)
    compact_(empty)
    assert type(empty[0]) is nn.Linear
    close(empty(X), before, 1e-4)
    handle.remove()
    assert not torch.allclose(model(X), expected)


@pytest.mark.parametrize("where", ["base", "global"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_m9_whoever_looks_at_the_base(where, kind):
    """M9: hooks set after inject() on the frozen part itself, and hooks on every module: outputs
    and gradients are those without hooks, and an output that was kept equals W0 x + bias."""
    model = chain(nn.Linear, nn.Linear)
    layers = inject(model, cfg("0", "1"))
    randomize(layers)
    loss_of(model).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    kept = []

    def forward(module, args, out):
        if module is model[1].base:
            kept.append((out, nn.functional.linear(args[0], module.weight, module.bias)))

    def backward(module, grad_input, grad_output):
        kept.append(None)

    hooks = nn.modules.module
    if where == "base":
        register = (model[1].base.register_forward_hook if kind == "forward" else
                    model[1].base.register_full_backward_hook)
    else:
        register = (hooks.register_module_forward_hook if kind == "forward" else
                    hooks.register_module_full_backward_hook)
    handle = register(forward if kind == "forward" else backward)
    try:
        loss_of(model).backward()
    finally:
        handle.remove()
    assert kept
    for pair in filter(None, kept):
        close(*pair)
    for a, b in zip(expected, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        close(a, b)


# ---- M10 to M14: unused targets, names, optimizers -----------------------------------------------

class Pooled(nn.Module):
    """A pooler that forward never uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.pooler = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x)


@pytest.mark.parametrize("method", ["dora", "paper"])  # AdaLoRA's penalty moves unused A and B
def test_m10_a_target_that_is_never_used(tmp_path, method):
    """M10: the pooler gets no gradient: the components stay in the other matrix and reload (where
    the budget fits into it)."""
    config = cfg("up", "pooler", **dora.METHODS[method] | dict(rank=0.5, start_rank=2))
    model = Pooled()
    layers = inject(model, config)
    pruner, _ = fit(model, config, layers)
    assert pruner.ranks() == {"up": 1, "pooler": 0}
    reloads(model, Pooled, tmp_path)


def test_m10_more_budget_than_components_that_train():
    """M10, M21: two matrices of which one trains, and a budget of three components where two have a
    score: position would decide, so the last pruning is refused."""
    config = cfg("up", "pooler", rank=1.5, start_rank=2)
    model = Pooled()
    layers = inject(model, config)
    refused("2 components have a score above 0 and the budget keeps 3.*position would decide",
            fit, model, config, layers)


class Named(nn.Module):
    """A matrix and a head at any names: attributes, made of dotted paths."""

    def __init__(self, matrix, head):
        super().__init__()
        torch.manual_seed(0)
        for name in (matrix, head):
            owner, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.add_module(path[-1], nn.Linear(8, 8))
        self.names = matrix, head

    def forward(self, x):
        matrix, head = map(self.get_submodule, self.names)
        return head(torch.tanh(matrix(x)))


NAMES = [("block.out", "out"), ("lora_block.up", "head"), ("lora_A.up", "head"),
         ("x.lora_B", "head"), ("up", "lora_head"), ("a+b(c)[d]|e^$*?\\", "head"),
         ("up", "a+b.(c)|d"), ("default.up", "head"), ("lora_A", "lora_B"), ("up", "base_layer"),
         ("é日本.up", "ñ"), ("m" * 3000 + ".up", "h" * 3000), ("weight.up", "bias"),
         ("x y.up", "z 1"), ("up", "default"), ("up", "lora_dropout"),
         ("up", "lora_magnitude_vector"), ("model.up", "base_model.model")]


@pytest.mark.parametrize("matrix, head", NAMES)
def test_m13_odd_names(tmp_path, matrix, head):
    """M12, M13: names that are PEFT's own words, hold a regular expression's characters, are not
    ASCII or very long: the adapter reloads."""
    def make():
        return Named(matrix, head)

    model, config = make(), cfg(matrix)
    layers = inject(model, config)
    assert list(layers) == [matrix]
    model.get_submodule(head).requires_grad_(True)
    fit(model, config, layers)
    reloads(model, make, tmp_path)


def test_m13_names_that_the_format_cannot_hold(tmp_path):
    """M13: a head whose own weight would be called x.lora_A.weight is refused when saving."""
    model, config = Named("up", "x.lora_A"), cfg("up")
    layers = inject(model, config)
    model.x.lora_A.requires_grad_(True)
    fit(model, config, layers)
    refused(r"x\.lora_A", save_adapter, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


OPTIMIZERS = [
    (torch.optim.SGD, dict(momentum=0.9)), (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    (torch.optim.RMSprop, dict(momentum=0.9, centered=True)), (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}), (torch.optim.Adagrad, {}), (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}), (torch.optim.ASGD, {}), (torch.optim.Rprop, {}),
    (torch.optim.AdamW, dict(foreach=True)), (torch.optim.AdamW, dict(fused=True)),
    (torch.optim.AdamW, dict(amsgrad=True)), (torch.optim.AdamW, dict(fused=True, amsgrad=True)),
    (torch.optim.AdamW, dict(capturable=False, maximize=False, weight_decay=0.5)),
]


@pytest.mark.parametrize("optimizer, options", OPTIMIZERS)
def test_m14_optimizers_through_compact(optimizer, options):
    """M14: 20 steps, compact_ and 20 more end at the outputs of 40 steps with the masks alone."""
    ends = []
    for compact in (False, True):
        model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", "2", rank=0.5, start_rank=2)
        layers = inject(model, config)
        fit(model, config, layers, 40, optimizer=optimizer, before_step=lambda step, opt:
            compact_(model, opt) if compact and step == 20 else None, **options)
        ends.append(model(X))
        assert any(type(m) is nn.Linear for m in model) == compact
    close(*ends)


@pytest.mark.parametrize("optimizer, first", [
    (torch.optim.Adafactor, "layers"), (torch.optim.LBFGS, "layers"), (torch.optim.LBFGS, "head")])
def test_m14_state_that_cannot_be_cut(optimizer, first):
    """M14: the factors of Adafactor, and the flat vectors of LBFGS, which it keeps with whatever
    parameter is its first: compact_ is refused and changes nothing; without the optimizer it
    works."""
    model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", rank=1, start_rank=2)
    layers = inject(model, config)
    model[2].requires_grad_(True)
    parameters = sorted([p for p in model.parameters() if p.requires_grad],
                        key=lambda p: (p is not model[2].weight) if first == "head" else 0)
    opt = optimizer(parameters, lr=1e-2)
    pruner = Pruner(layers, config, 20)
    for _ in range(20):
        train_step(model, pruner, opt)
    expected = model(X)
    refused("not of the shape of its parameter", compact_, model, opt)
    assert len(layers["0"].c) == 2
    close(compact_(model)(X), expected)


def test_m14_hooks_on_parameters_after_compact():
    """M14: hooks on parameters, before and after accumulation, still run after compact_, and a
    graph of an earlier step that is still held does no harm; in half precision, too."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", "2", rank=1, start_rank=3)
        layers = inject(model, config)
        _, optimizer = fit(model, config, layers)
        model.to(dtype)
        calls = []
        layer = layers["0"] if layers["0"].rank else layers["2"]
        layer.A.register_hook(lambda grad, calls=calls: calls.append(grad.shape))
        layer.A.register_post_accumulate_grad_hook(
            lambda p, calls=calls: calls.append(p.grad.shape))
        held = model(X.to(dtype)).sum()
        compact_(model)
        model.zero_grad()
        model(X.to(dtype)).sum().backward()
        assert calls == [layer.A.shape] * 2 and len(layer.A) == layer.rank
        assert layer.A.grad.shape == layer.A.shape and layer.A.grad.dtype == dtype
        del held


# ---- M15, M16: wrappers and reparametrizations ---------------------------------------------------

def test_m15_compiled_models(tmp_path):
    """M15: a model compiled as a whole, or in a part before or after inject(), saves the names of
    the plain one, head and statistics included, and the adapter loads into plain and compiled."""
    def make():
        return chain(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Tanh, nn.Linear)

    def compiled(module):
        return torch.compile(module, backend="eager")

    def part(model, i):
        model[i] = compiled(model[i])
        return model

    folders = []
    for name, before, after in (("plain", None, None), ("whole", None, compiled),
                                ("inner", lambda m: part(m, 0), None),
                                ("later", None, lambda m: part(part(m, 0), 2))):
        model, config = make(), cfg("0.0")
        model = before(model) if before else model
        layers = inject(model, config)
        model[2].requires_grad_(True)
        model = after(model) if after else model
        fit(model, config, layers)
        folders.append(tmp_path / name)
        save_adapter(model, folders[-1])
        expected = model.eval()(X)
        for other in (make(), part(part(make(), 0), 2), compiled(make())):
            load_adapter(other, folders[-1])
            close(other.eval()(X), expected)
    keys = [sorted(read_safetensors(f / "adapter_model.safetensors")) for f in folders]
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert "base_model.model.0.1.running_mean" in keys[0] and "base_model.model.2.weight" in keys[0]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_m15_wrapped_models(tmp_path, wrap):
    """M15: inject, compact_, save, merge_ and load through DataParallel, around it
    torch.compile."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    model, config = wrap(make()), cfg("0")
    layers = inject(model, config)
    assert list(layers) == ["0"]
    inner = dora.unwrapped(model)
    fit(inner, config, layers)
    expected = inner(X)
    compact_(model)
    save_adapter(model, tmp_path)
    other = wrap(make())
    load_adapter(other, tmp_path)
    close(dora.unwrapped(other)(X), expected)
    close(dora.unwrapped(merge_(model) and model)(X), expected)


def test_m15_an_averaged_model(tmp_path):
    """M15: the moving average of an adapted model (AveragedModel) saves the names of the plain one;
    the adapter gives the average's outputs."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    fit(model, config, layers)
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].A.mul_(2)
    average.update_parameters(model)
    reloads(average.module, make, tmp_path / "inner")
    average = torch.optim.swa_utils.AveragedModel(model)
    save_adapter(average, tmp_path / "outer")
    other = make()
    load_adapter(other, tmp_path / "outer")
    close(other(X), average(X))


def test_m15_checkpoint_wrapper(tmp_path):
    """M15, M5: parts wrapped by torch's checkpoint_wrapper, before inject() or after, save the
    names of the plain model and reload into either."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def make(wrap=False):
        model = chain(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Tanh, nn.Linear)
        if wrap:
            model[0], model[2] = checkpoint_wrapper(model[0]), checkpoint_wrapper(model[2])
        return model

    keys = []
    for before, after in ((False, False), (True, False), (False, True)):
        model, config = make(before), cfg("0.0")
        layers = inject(model, config)
        model[2].requires_grad_(True)
        if after:
            model[0], model[2] = checkpoint_wrapper(model[0]), checkpoint_wrapper(model[2])
        fit(model, config, layers)
        folder = tmp_path / f"{before}{after}"
        save_adapter(model, folder)
        keys.append(sorted(read_safetensors(folder / "adapter_model.safetensors")))
        for wrap in (False, True):
            other = make(wrap)
            load_adapter(other, folder)
            close(other.eval()(X), model.eval()(X))
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) == 9


@pytest.mark.parametrize("change", [
    nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm,
    parametrizations.spectral_norm, parametrizations.orthogonal,
    lambda m: prune.l1_unstructured(m, "weight", 0.5),
    lambda m: m.to(torch.complex64),
    lambda m: nn.utils.skip_init(type("Own", (nn.Linear,), {}), 8, 8)])
@pytest.mark.filterwarnings("ignore")
def test_m16_weights_that_are_computed(change):
    """M16: weight_norm, spectral_norm, orthogonal, pruning masks, old and new style, complex
    weights, and subclasses: refused at inject(), which leaves the model as it was."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    model[0] = change(model[0])
    untouched("target '0': ", model, cfg("0"))


def test_m16_integer_weights():
    """M16: an nn.Linear with an int8 weight (quantised by hand) is refused."""
    model = chain(nn.Linear, nn.Tanh)
    model[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    untouched("weight of 0 .*no real numbers", model, cfg("0"))


@pytest.mark.parametrize("head", [
    lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.LayerNorm(8)),
    lambda: nn.Bilinear(8, 8, 8)])
def test_m16_heads_of_many_kinds(tmp_path, head):
    """M16, A1: heads that are parametrized, nested or of another kind reload."""
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.head = nn.Linear(8, 8), head()

        def forward(self, x):
            x = torch.tanh(self.up(x))
            return self.head(x, x) if isinstance(self.head, nn.Bilinear) else self.head(x)

    model, config = Two(), cfg("up")
    layers = inject(model, config)
    model.head.requires_grad_(True)
    fit(model, config, layers)
    reloads(model, Two, tmp_path)


def test_m16_a_recurrent_head(tmp_path):
    """A1: an LSTM as the head, which keeps its weights in a list, too: the reloaded outputs equal
    and it trains on."""
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 8)

        def forward(self, x):
            return self.rnn(self.up(x))[0]

    model, config = Recurrent(), cfg("up")
    layers = inject(model, config)
    model.rnn.requires_grad_(True)
    fit(model, config, layers)
    expected = model(X)
    save_adapter(model, tmp_path)
    other = Recurrent()
    load_adapter(other, tmp_path)
    close(other(X), expected)
    loss_of(other).backward()
    assert other.rnn.weight_ih_l0.grad.any()


class Extra(nn.Linear):
    """A head with state that is neither a parameter nor a buffer."""

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_a1_a_head_with_other_state(tmp_path):
    """A1: a head whose state dict holds more than parameters and buffers is refused by name."""
    model, config = chain(nn.Linear, Extra(8, 8)), cfg("0")
    layers = inject(model, config)
    model[1].requires_grad_(True)
    fit(model, config, layers)
    refused(r"1\._extra_state.*neither a parameter nor a buffer", save_adapter, model,
            tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- M17 to M23 ----------------------------------------------------------------------------------

def test_m17_a_second_inject():
    """M17, A12: inject() on an adapted model is refused and leaves the first adapter trainable."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, cfg("0"))
    untouched("adapted already; name all targets in one inject", model, cfg("2"))
    assert layers["0"].A.requires_grad


def test_m17_a_pruner_of_some_layers():
    """M17: a Pruner of a part of the layers, or of two models' layers, is refused: the budget is
    the whole model's."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, cfg("0", "2"))
    other = inject(chain(nn.Linear), cfg("0"))
    refused("these 1 layers are not those that one inject", Pruner, {"0": layers["0"]},
            cfg("0", "2"), 20)
    mixed = {"0": inject(chain(nn.Linear), cfg("0"))["0"], "1": other["0"]}
    refused("these 2 layers are not those that one inject", Pruner, mixed, cfg("0"), 20)


@pytest.mark.parametrize("penalty", ["dem", "orthogonal"])
def test_m19_matrices_of_one_number(penalty):
    """M19: a single number does not vary: Eq. 10 is 0 over Linear(1, 1), and a run trains
    through it with finite weights."""
    model, config = nn.Sequential(nn.Linear(1, 1)), cfg("0", penalty=penalty, start_rank=2)
    layers = inject(model, config)
    pruner = Pruner(layers, config, 20)
    if penalty == "dem":
        assert pruner.penalty().item() == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        ((model(X[:, :1]) - Y[:, :1]).square().mean() + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["dora", "paper", "adalora"])
def test_m20_layers_on_two_devices(method):
    """M20: scores and penalties of layers on two devices meet on the first. Here the first layer is
    on the meta device, which checks devices as a GPU does, and the second on the CPU."""
    config = cfg("0", "2", **dora.METHODS[method] | dict(rank=1, start_rank=2))
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, config)
    model[0].to("meta")
    state = None
    for _ in range(2):
        pruner = Pruner(layers, config, 20)
        if state:
            pruner.load_state_dict(state)
        assert pruner.penalty().is_meta
        for layer in layers.values():
            for p in (layer.A, layer.B, layer.c):
                p.grad = torch.ones_like(p)
        pruner.observe()
        pruner.step()
        assert pruner.scores().is_meta and pruner.scores().shape == (4,)
        state = pruner.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["dora", "paper", "adalora"])
def test_m20_a_run_on_two_devices(method, tmp_path):
    """M20: the second half of a model on the GPU ends with the ranks and outputs of the CPU."""
    config = cfg("0", "2", **dora.METHODS[method] | dict(rank=1, start_rank=2, dropout=0.0))
    ends = []
    for device in ("cpu", "cuda"):
        model = chain(nn.Linear, nn.Tanh, nn.Linear)
        layers = inject(model, config)
        model[2].to(device)
        model[2].register_forward_pre_hook(lambda m, args, device=device: args[0].to(device))
        model[2].register_forward_hook(lambda m, args, out: out.cpu())
        pruner, _ = fit(model, config, layers)
        ends.append((pruner.ranks(), model(X)))
        save_adapter(compact_(model), tmp_path / device)
    assert ends[0][0] == ends[1][0]
    close(ends[0][1], ends[1][1], 1e-3)


@pytest.mark.parametrize("changes, steps, says", [
    (dict(beta1=0.0), 20, "beta1 = 0"),
    (dict(initial_phase=0.0, interval=1), 20, "first pruning is at step 1"),
    ({}, 1, "leave no step|first pruning is at step 1"), ({}, 2, "first pruning is at step 1"),
    ({}, 3, "first pruning is at step 1"), ({}, 4, None), ({}, 5, None)])
def test_m21_runs_that_cannot_decide(changes, steps, says):
    """M21: scores that are all 0 or all equal when the first pruning is due are refused before
    training; a short run that works decides its mask by scores above 0."""
    def run():
        model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", "2", **changes)
        layers = inject(model, config)
        pruner, _ = fit(model, config, layers, steps)
        kept = pruner.scores()[pruner.mask]
        assert (kept > 0).all()

    if says is None:
        run()
    else:
        refused(says, run)


def test_saving_another_model_than_the_one_of_inject(tmp_path):
    """M24: inject() notes by name what training may change, such as running statistics. Saving the
    model around the one that it was given, or a part of it, would lose them: an error that says
    so."""
    def make():
        return chain(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Tanh, nn.Linear)

    for target, inside, saved, names in (
            ("0", lambda m: m[0], lambda m: m, "0.0 was 0 in"),
            ("0.0", lambda m: m, lambda m: m[0], "0 was 0.0 in"),
            ("0.0", lambda m: m, nn.Sequential, "0.0.0 was 0.0 in")):
        model, config = make(), cfg(target)
        fit(model, config, inject(inside(model), config))
        refused(f"^{names} inject.*save the model", save_adapter, saved(model), tmp_path)
    save_adapter(model, tmp_path)


def two_matrices():
    return chain(nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear)


def test_m28_a_forward_that_was_replaced(tmp_path):
    """M28: a hook of accelerate's kind puts a forward of its own on a module, bound to the old one:
    merge_ refuses, since the merged module would use W0. One that the removed hook left behind is
    not taken along."""
    model, config = two_matrices(), cfg("0", "2")
    layers = inject(model, config)
    fit(model, config, layers)
    expected, base = model.eval()(X), model[0].base
    own = base.forward
    base.forward = lambda x: own(x)
    refused("^0: its forward was replaced.*remove the hooks", merge_, model)
    close(model(X), expected)
    base.forward = own  # as remove_hook_from_submodules leaves it
    close(merge_(model)(X), expected)
    assert "forward" not in vars(model[0])


def test_m29_the_files_of_two_saves(tmp_path):
    """M29: a save that broke off between its two files leaves the tensors of one adapter beside the
    ranks and scales of another: refused."""
    for name, rank in (("one", 1), ("four", 4)):
        model, config = two_matrices(), cfg("0", "2", rank=rank)
        fit(model, config, inject(model, config))
        save_adapter(model, tmp_path / name)
    tensors = (tmp_path / "four" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(tensors)
    refused("the rank of 0 is [12], but [1-6] in adapter_model.*the files are of two saves",
            load_adapter, two_matrices(), tmp_path / "one")


def test_m30_a_base_that_trains_for_a_while():
    """M30: a base that is set to train in the middle of a run, and frozen again before the save,
    changed without a place in the file: the first such step is refused."""
    model, config = two_matrices(), cfg("0", "2")
    layers = inject(model, config)

    def unfreeze(step, optimizer):
        if step == 11:
            layers["0"].base.bias.requires_grad_(True)

    refused("0: its frozen bias was set to train", fit, model, config, layers, before_step=unfreeze)


def test_m31_a_model_in_ddp(tmp_path):
    """M31: DistributedDataParallel averages the gradients of the parameters that it knows, and
    those of a later inject() or load_adapter() would differ from process to process: refused."""
    model, config = two_matrices(), cfg("0", "2")
    shared = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(shared)
    shared.module = two_matrices()
    refused("adapt the model before wrapping it", inject, shared, config)
    fit(model, config, inject(model, config))
    save_adapter(model, tmp_path)
    refused("adapt the model before wrapping it", load_adapter, shared, tmp_path)


@pytest.mark.parametrize("steps", [12.5, 40.0, True])
def test_m32_steps_that_are_no_whole_number(steps):
    """M32: with 12.5 steps the last pruning, at step 6.5, would never come."""
    model, config = two_matrices(), cfg("0", "2")
    refused("total_steps = .*must be of type int", Pruner, inject(model, config), config, steps)


@pytest.mark.parametrize("where", ["optimizer", "bf16"])
def test_m33_gates_that_do_not_train(tmp_path, where):
    """M33: gates that the optimizer did not get, or that a conversion after inject() made so coarse
    that no step moves them from 1: the run cannot be saved, and the message names both causes."""
    model, config = two_matrices(), cfg("0", "2")
    layers = inject(model, config)
    if where == "bf16":
        model.bfloat16()
    pruner = Pruner(layers, config, 20)
    given = [p for p in model.parameters() if p.requires_grad and (where == "bf16" or p.dim() > 1)]
    optimizer = torch.optim.AdamW(given, lr=1e-4)
    dtype = torch.bfloat16 if where == "bf16" else torch.float32
    for _ in range(20):
        optimizer.zero_grad()
        (loss_of(model, X.to(dtype), Y.to(dtype)) + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    refused("no gate c has moved from 1; give the optimizer all.*before inject", save_adapter,
            model, tmp_path)


def test_m34_layers_that_the_model_does_not_use():
    """M34: the penalty gives A and B of a copy's layers a gradient, the loss gives none: only the
    gates count, and observe() refuses."""
    model, config = two_matrices(), cfg("0", "2")
    pruner = Pruner(inject(model, config), config, 20)
    other = copy.deepcopy(pruner)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refused("no component has a gradient", train_step, model, other, optimizer)


@pytest.mark.parametrize("changes", [dict(importance="norm"), dict(alpha=16.0), dict(beta2=None),
                                     dict(initial_phase=0.3), dict(rank=1.2, start_rank=2)])
def test_m35_a_state_of_other_settings(changes):
    """M35: a run that goes on with other settings, of the same shapes, would be neither of the two:
    refused by name. A state of an earlier version, without settings, is taken as it is."""
    model, config = two_matrices(), cfg("0", "2", start_rank=2)
    pruner, _ = fit(model, config, inject(model, config))
    state = pruner.state_dict()
    other = cfg("0", "2", **{"start_rank": 2, **changes})
    new = Pruner(inject(two_matrices(), other), other, 20)
    name = next(iter(changes))
    refused(f"{name} = .*, this Pruner has .*; use the same settings", new.load_state_dict, state)
    del state["settings"]
    new.load_state_dict(state)


def test_m36_two_adapters_in_one_model():
    """M36: two parts of a model, each with its inject() and Pruner: each has its own budget, so
    that both can be compacted and merged together."""
    model = chain(nn.Sequential(nn.Linear(8, 8)), nn.Tanh, nn.Sequential(nn.Linear(8, 8)))
    parts, config = [], cfg("0", start_rank=2)
    for part in (model[0], model[2]):
        parts.append(Pruner(inject(part, config), config, 20))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (loss_of(model) + sum(pruner.penalty() for pruner in parts)).backward()
        for pruner in parts:
            pruner.observe()
        optimizer.step()
        for pruner in parts:
            pruner.step()
    expected = model.eval()(X)
    close(compact_(model)(X), expected)
    close(merge_(model)(X), expected)


def test_m37_back_to_an_earlier_state():
    """M37: after observe() of a bad step, the restored Pruner waits for observe() again."""
    model, config = two_matrices(), cfg("0", "2")
    pruner = Pruner(inject(model, config), config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_step(model, pruner, optimizer)
    state = copy.deepcopy(pruner.state_dict())
    loss_of(model).backward()
    pruner.observe()
    pruner.load_state_dict(state)
    train_step(model, pruner, optimizer)
    assert pruner.t == 2


def test_m22_a_state_dict_in_a_fresh_inject(tmp_path):
    """M22: weights of a finished run in a fresh inject(): saving says that the Pruner's state is
    missing; with it, the saved adapter gives the outputs."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    config = cfg("0")
    model = make()
    layers = inject(model, config)
    pruner, _ = fit(model, config, layers)
    fresh = make()
    new_layers = inject(fresh, config)
    fresh.load_state_dict(model.state_dict())
    refused("no Pruner has run on these layers.*restore the state", save_adapter, fresh, tmp_path)
    resumed = Pruner(new_layers, config, 20)
    refused("at step 0 of 20, before its last pruning at step 10.*restore the Pruner's state",
            save_adapter, fresh, tmp_path)
    resumed.load_state_dict(pruner.state_dict())
    close(fresh.eval()(X), model.eval()(X))
    reloads(fresh, make, tmp_path)


def test_m22_a_state_of_other_settings():
    """M22: a state with another number of steps, of another importance, or after compact_ is
    refused, and the Pruner is as it was."""
    model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", start_rank=2)
    layers = inject(model, config)
    pruner, _ = fit(model, config, layers)
    state = pruner.state_dict()
    for changes, steps, says in (
            ({}, 10, "run of 20 steps, this Pruner has total_steps = 10"),
            (dict(importance="triplet"), 20, "other scores than those of"),
            (dict(importance=None, schedule=None, rank=2), 20, "other scores than those of")):
        other = cfg("0", **{"start_rank": 2, **changes})
        fresh = Pruner(inject(chain(nn.Linear, nn.Tanh, nn.Linear), other), other, steps)
        refused(says, fresh.load_state_dict, state)
        assert fresh.t == 0 and not fresh.I_bar
    refused("not a Pruner's state", pruner.load_state_dict, {"t": 3})
    compact_(model)
    refused("compacted already", pruner.load_state_dict, state)


def handmade(folder, tensors, **config):
    write_safetensors(folder / "adapter_model.safetensors", {
        f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
    (folder / "adapter_config.json").write_text(dora.json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_m23_a_copy_of_the_base_in_the_file(tmp_path, dtype):
    """M23: PEFT also stores lm_head.base_layer.weight. Equal to the model's (in its dtype) it is
    left out; another one, or one of no matrix, is refused."""
    model = Tied()
    pair = {"proj.lora_A.weight": torch.ones(2, 8), "proj.lora_B.weight": torch.ones(20, 2)}
    weight = model.proj.weight.detach().clone()
    handmade(tmp_path, {**pair, "proj.base_layer.weight": weight.to(dtype)})
    load_adapter(model, tmp_path)
    close(model.proj.weight, weight + 2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["proj.A", "proj.B"]
    for bad in ({"proj.base_layer.weight": weight + 1}, {"x.base_layer.weight": weight},
                {"proj.base_layer.bias": weight[:, 0]}):
        handmade(tmp_path, {**pair, **bad})
        refused("differs from the model's", load_adapter, Tied(), tmp_path)


# ---- A5: the map of ranks ------------------------------------------------------------------------

def numbers(text):
    """The cells of a rank map's rows, without totals."""
    lines = text.split("\n")[1:-1]
    return [int(cell) for line in lines for cell in line.split()[1:-1] if cell != "."]


A5 = {
    "T5": [f"{stack}.block.{b}.layer.{i}.{name}" for stack in ("encoder", "decoder")
           for b in range(2) for i, name in ((0, "SelfAttention.q"), (0, "SelfAttention.v"),
                                             (1, "EncDecAttention.q"), (2, "DenseReluDense.wo"))],
    "BART": [f"model.{stack}.layers.{i}.{name}" for stack in ("encoder", "decoder")
             for i in range(3) for name in ("self_attn.q_proj", "encoder_attn.q_proj", "fc1")],
    "MoE": [f"model.layers.{i}.block_sparse_moe.experts.{e}.w{k}" for i in range(2)
            for e in range(4) for k in (1, 2, 3)],
    "Sequential": ["0", "2", "4.0", "4.2", "5.0.1"],
    "one": ["classifier"], "flat": ["up", "down"], "none": [],
    "mixed": ["embed", "layer.0.q", "layer.1.q", "head.dense", "head.out", "0", "0x.1"],
}


@pytest.mark.parametrize("kind", A5)
def test_a5_every_matrix_has_its_own_cell(kind):
    """A5: names of T5, BART, a mixture of experts, nn.Sequential: as many cells as matrices, each
    with its own number, and the totals are the sums."""
    ranks = {name: 2**i for i, name in enumerate(A5[kind])}
    text = rank_map(ranks)
    assert sorted(numbers(text)) == sorted(ranks.values())
    if ranks:
        assert text.split("\n")[-1].split()[-1] == str(sum(ranks.values()))
        assert len({len(line) for line in text.split("\n")}) == 1


# ---- A12: own rows, and messages that are true ---------------------------------------------------

def with_row(monkeypatch, table, name, row):
    monkeypatch.setitem(table, name, row)
    return cfg("0", "2", **{{"IMPORTANCE": "importance", "SCHEDULES": "schedule",
                             "PENALTIES": "penalty"}[next(
                                 key for key in ("IMPORTANCE", "SCHEDULES", "PENALTIES")
                                 if getattr(dora, key) is table)]: name})


def test_a12_an_own_importance(monkeypatch):
    """A12: one function and one row: a run whose score is 0 for the first matrix and 1 for the
    second leaves every component in the second."""
    def last(layers):
        return torch.cat([torch.full_like(layer.c, i / (len(layers) - 1))
                          for i, layer in enumerate(layers)])

    config = with_row(monkeypatch, dora.IMPORTANCE, "last", (last, "weights", torch.cat))
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    pruner, _ = fit(model, config, inject(model, config))
    assert pruner.ranks() == {"0": 0, "2": 2}


def test_a12_an_own_schedule(monkeypatch):
    """A12: a straight line as one function and one row: after each pruning the whole model holds
    what the line says, and its own budget at the end."""
    def linear(p, surplus):
        return surplus - int(surplus * p)

    config = with_row(monkeypatch, dora.SCHEDULES, "linear", linear)
    assert [dora.budget(t, 100, config, 2) for t in (15, 50, 60)] == [4, 2, 2]
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    pruner, _ = fit(model, config, inject(model, config))
    assert sum(pruner.ranks().values()) == 2


@pytest.mark.parametrize("table, row, says", [
    ("IMPORTANCE", (lambda layers: torch.ones(1), "weights", torch.cat), r"shape \(1,\).*\(4,\)"),
    ("IMPORTANCE", (lambda layers: torch.ones(len(layers)), "gradients", torch.cat), r"\(2,\)"),
    ("IMPORTANCE", (lambda layers: [torch.ones(2, 2)] * 2, "weights", torch.cat), r"\(4, 2\)"),
    ("IMPORTANCE", (lambda layers: torch.ones(4), "gradient", torch.cat), "moment is 'gradient'"),
    ("SCHEDULES", lambda p, surplus: surplus * (1 - p), r"leaves 1000.* at progress 0"),
    ("SCHEDULES", lambda p, surplus: surplus, "leaves 1000 at progress 1"),
    ("SCHEDULES", lambda p, surplus: -1, "leaves -1 at progress 0"),
])
def test_a12_rows_that_cannot_work(monkeypatch, table, row, says):
    """A12: a score of the wrong shape, a moment that does not exist, a curve that is no whole
    number or does not end at 0: refused by the row's name, a schedule before any training."""
    config = with_row(monkeypatch, getattr(dora, table), "mine", row)
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    refused(f"= mine.*{says}", fit, model, config, inject(model, config))


@pytest.mark.parametrize("changes, says", [
    (dict(importance="fisher"), "importance = 'fisher': choose one of sensitivity, "),
    (dict(schedule="linear"), "schedule = 'linear': choose one of slow_first, fast_first, none"),
    (dict(rank="2"), "rank = '2': must be of type float"),
    (dict(start_rank=3.5), "start_rank = 3.5: must be of type int or none"),
    (dict(rank=float("inf")), "rank = inf: must be finite"),
    (dict(rank=float("nan")), "rank = nan: must be finite"),
    (dict(rank=True), "rank = True"), (dict(gate=1), "gate = 1: must be of type bool")])
def test_a12_settings(changes, says):
    """A12: settings of a wrong type or without a row are refused by name and value."""
    refused(f"^{re.escape(says)}", DoRAConfig, **changes)


def test_a12_a_pruner_with_another_config():
    """A12: a Pruner must get the config of inject(); the message names the layer."""
    layers = inject(chain(nn.Linear), cfg("0"))
    refused("0: its settings differ from the Pruner's", Pruner, layers, cfg("0", eta=0.4), 20)


def test_a12_in_the_middle_of_a_run(tmp_path):
    """A12: saving, compacting and merging after 30 of 100 steps are refused with the same true
    message."""
    model, config = chain(nn.Linear, nn.Tanh, nn.Linear), cfg("0", "2")
    layers = inject(model, config)
    pruner = Pruner(layers, config, 100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        train_step(model, pruner, optimizer)
    for call in (lambda: save_adapter(model, tmp_path / "x"), lambda: compact_(model),
                 lambda: merge_(model)):
        refused("at step 30 of 100, before its last pruning at step 50", call)
    assert not (tmp_path / "x").exists() and isinstance(model[0], DoRALinear)


def test_a12_an_adapter_on_an_embedding(tmp_path):
    """A12: PEFT's adapter of an embedding is refused by what it is."""
    handmade(tmp_path, {"emb.lora_embedding_A": torch.ones(2, 20),
                        "emb.lora_embedding_B": torch.ones(8, 2)})
    refused("emb.lora_embedding_A' adapts an embedding; only LoRA on nn.Linear", load_adapter,
            Tied(), tmp_path)


def test_a12_what_print_shows():
    """A12: print(model) shows the live components and the scale of every layer."""
    model, _, _ = trained(net_config(rank=1, start_rank=2))
    text = str(model)
    for layer in model.modules():
        if isinstance(layer, DoRALinear):
            assert f"live={layer.rank} of 2, scale=8" in text
    assert text.count("DoRALinear(") == 6


# ---- other neighbours ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8),
                                   (1, 1, 1, 1, 8)])
@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_inputs_of_any_shape(shape, dropout_on):
    """Inputs with 1 to 5 dimensions, and empty ones: outputs and gradients equal those of W x."""
    model = chain(nn.Linear)
    layers = inject(model, cfg("0", rank=2, dropout_on=dropout_on, dropout=0.0))
    randomize(layers)
    x = torch.randn(shape, requires_grad=True)
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    close(model(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, model[0].A, model[0].B))
                    for y in (model(x), expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)


def test_inputs_that_are_not_contiguous():
    """Transposed, expanded, strided and overlapping inputs equal their contiguous copies, and stay
    as they are."""
    model = chain(nn.Linear)
    randomize(inject(model, cfg("0", rank=2, dropout=0.0)))
    base = torch.randn(8, 16)
    for x in (base.T, base[:, ::2], base[:, :1].T.expand(5, 8), base.as_strided((4, 8), (1, 2)),
              base.view(2, 4, 16).transpose(1, 2)[..., :1].expand(2, 16, 8)):
        before = x.clone()
        close(model(x), model(x.contiguous()))
        assert torch.equal(x, before)


@pytest.mark.parametrize("call", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_of_an_adapted_model(tmp_path, call):
    """A deep copy, a pickle, torch.save and a state dict of a trained model give its outputs and
    its adapter; the copy's Pruner is its own."""
    def make():
        return chain(nn.Linear, nn.BatchNorm1d(8), nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    model[2].requires_grad_(True)
    pruner, _ = fit(model, config, layers)
    if call == "deepcopy":
        other = copy.deepcopy(model)
    elif call == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif call == "save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = make()
        Pruner(inject(other, config), config, 20).load_state_dict(pruner.state_dict())
        other.load_state_dict(model.state_dict())
        other[2].requires_grad_(True)
    close(other.eval()(X), model.eval()(X))
    save_adapter(model, tmp_path / "a")
    save_adapter(other, tmp_path / "b")
    a, b = (read_safetensors(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    compact_(other)
    assert len(layers["0"].c) == config.r_prime


def test_a_model_in_eval_mode_stays_so():
    """inject() and load_adapter keep each module's mode, so that dropout is off in eval mode."""
    model = chain(nn.Linear, nn.Linear).eval()
    randomize(inject(model, cfg("0", dropout=0.9)))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(X), model(X))
    half = chain(nn.Linear, nn.Linear)
    half[0].eval()
    inject(half, cfg("0", "1"))
    assert not half[0].dropout.training and half[1].dropout.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_autocast(tmp_path, dtype, scaled):
    """Autocast on the CPU in bfloat16 and float16, with and without a GradScaler: a run reloads,
    and autocast outputs equal the float32 ones to the precision of the dtype."""
    def make():
        return chain(nn.Linear, nn.Tanh, nn.Linear)

    model, config = make(), cfg("0", "2")
    layers = inject(model, config)
    pruner = Pruner(layers, config, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
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
    model.eval()
    with torch.autocast("cpu", dtype):
        low = model(X)
    assert low.dtype == dtype
    close(low.float(), model(X), 0.05)
    reloads(model, make, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_in_another_dtype(tmp_path, dtype):
    """An adapter trained in float32, loaded into a model of another dtype: the outputs to that
    dtype's precision; A and B are float32 or wider, head and statistics have the model's dtype."""
    def make():
        return chain(nn.Linear, nn.BatchNorm1d(8), nn.Linear)

    model, config = make(), cfg("0")
    layers = inject(model, config)
    model[2].requires_grad_(True)
    fit(model, config, layers)
    save_adapter(model, tmp_path)
    other = make().to(dtype).eval()
    load_adapter(other, tmp_path)
    close(other(X.to(dtype)).float(), model.eval()(X), 0.1 if dtype != torch.float64 else 1e-5)
    assert other[0].A.dtype == torch.promote_types(dtype, torch.float32)
    assert other[2].weight.dtype == other[1].running_mean.dtype == dtype
    save_adapter(other, tmp_path / "again")


def test_functional_transforms():
    """vmap of grad over examples (torch.func) gives each example's gradients."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, cfg("0", "2", dropout=0.0))
    randomize(layers)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(params, x, y):
        return (torch.func.functional_call(model, params, (x,)) - y).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, X[:3], Y[:3])
    for i in range(3):
        one = torch.autograd.grad(loss_of(model, X[i], Y[i]) * 8,
                                  [p for p in model.parameters() if p.requires_grad])
        for name, grad in zip(params, one, strict=True):
            close(found[name][i], grad, 1e-4)


def test_an_ensemble_of_adapters():
    """vmap over adapters (torch.func), the input and the base shared: each one's outputs."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    randomize(inject(model, cfg("0", "2")))
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    both = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    found = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (X,)))(both)
    close(found[0], model(X), 1e-4)
    doubled = torch.func.functional_call(model, {n: 2 * p for n, p in params.items()}, (X,))
    close(found[1], doubled, 1e-4)


def test_m9_selective_checkpointing():
    """M9: selective activation checkpointing, which keeps the outputs of products, gives the
    gradients of the model without it."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in kept else
            CheckpointPolicy.PREFER_RECOMPUTE)

    grads = []
    for call in (lambda m: m(X), lambda m: checkpoint(m, X, use_reentrant=False,
                                                      context_fn=contexts)):
        model = chain(nn.Linear, nn.Tanh, nn.Linear)
        randomize(inject(model, cfg("0", "2")))
        call(model).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


def test_a_whole_graph():
    """torch.compile(fullgraph=True), torch.export and jit.trace give the outputs, and the compiled
    model the gradients."""
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    randomize(inject(model, cfg("0", "2")))
    expected = model.eval()(X)
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(X), expected)
    for a, b in zip(torch.autograd.grad(compiled(X).square().sum(), parameters),
                    torch.autograd.grad(model(X).square().sum(), parameters), strict=True):
        close(a, b, 1e-4)
    close(torch.export.export(model, (X,)).module()(X), expected)
    close(torch.jit.trace(model, X)(X), expected)


def test_no_layer_is_kept_alive():
    """merge_ and compact_ leave no reference from the model to what they took out."""
    import weakref
    model = chain(nn.Linear, nn.Tanh, nn.Linear)
    layers = inject(model, cfg("0", importance=None, schedule=None))
    watch = weakref.ref(layers["0"])
    randomize(layers)
    merge_(model)
    del layers
    gc.collect()
    assert watch() is None


def test_inject_costs_little():
    """Samples of 200 modules take less than 50 times as long as copying their weights (3 times).
    Of 64, 4,096, 6,400 and 1,000,000 entries all, all, each second and each 245th is taken."""
    model = chain(*[nn.Linear(64, 64) for _ in range(200)])
    start = time.process_time()
    copy.deepcopy(model.state_dict())
    copying = time.process_time() - start
    start = time.process_time()
    dora.samples(model)
    assert time.process_time() - start < 50 * copying

    found = dora.samples(chain(*[nn.Linear(n, n, bias=False) for n in (8, 64, 80, 1000)]))
    assert [len(sample) for sample in found.values()] == [64, 4096, 3200, 4082]

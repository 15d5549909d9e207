"""Models, data and training loops small enough for a test; no test of its own.

Net and net_config have numbers that can be worked out by hand; chain and cfg put any modules into a
model of width 8, for tests of models that dora.py was not written for.
"""
from itertools import count

import pytest
import torch
from torch import nn

from dora import DoRAConfig, DoRAError, Pruner, inject, load_adapter, merge_, save_adapter

TARGETS = ("query", "up", "down")


class Block(nn.Module):
    """h + down(tanh(up(query(h)))): a square, a tall and a wide matrix."""

    def __init__(self, d):
        super().__init__()
        self.query, self.up, self.down = nn.Linear(d, d), nn.Linear(d, d + 3), nn.Linear(d + 3, d)

    def forward(self, h):
        return h + self.down(torch.tanh(self.up(self.query(h))))


class Net(nn.Module):
    """(N, d) -> (N, 2): matrices layer.0.query, layer.0.up, layer.0.down, layer.1.query, ..."""

    def __init__(self, d=5, blocks=2):
        super().__init__()
        self.layer = nn.ModuleList(Block(d) for _ in range(blocks))
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return self.head(x)


def net_config(**changes):
    """A DoRAConfig for Net: the default method without dropout, its budget in components (numbers
    that can be worked out by hand), but for the changes."""
    return DoRAConfig(**{"targets": TARGETS, "dropout": 0.0, "interval": 3,
                         "budget_unit": "components", **changes})


def plain(seed=0, dtype=torch.float64, **sizes):
    """Net with seeded weights."""
    torch.manual_seed(seed)
    return Net(**sizes).to(dtype)


def adapted(config, seed=0, dtype=torch.float64, **sizes):
    """(model, layers): Net with config's components in it, its head trainable."""
    model = plain(seed, dtype, **sizes)
    layers = inject(model, config)
    model.head.requires_grad_(True)
    return model, layers


def randomize(layers, seed=1):
    """Random A, B and c in place of the start, at which the update is 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            for p in (layer.A, layer.B, layer.c):
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))


def trainer(model, pruner, lr=1e-2, optimizer=torch.optim.AdamW, start=0, **options):
    """(optimizer, step): step() does one training step as the head of dora.py shows it, on a batch
    that depends on the number of the step alone, counted from start."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(params, lr=lr, **options)
    numbers = count(start)

    def step():
        x = inputs(16, model.head.in_features, 1000 + next(numbers), params[0].dtype)
        target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)
        loss = (model(x) - target).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()

    return optimizer, step


def trained(config, steps=40, dtype=torch.float64, seed=0, **options):
    """(model, layers, pruner) after a whole run."""
    model, layers = adapted(config, seed, dtype)
    pruner = Pruner(layers, config, steps)
    _, step = trainer(model, pruner, **options)
    for _ in range(steps):
        step()
    return model, layers, pruner


def feed(pruner, scores, open_gates=True):
    """One step in which `sensitivity` of component i is scores[i]: c = 1 and dℓ/dc = the score.

    With beta1 = 0 and beta2 = None the pruner's score is this number itself.
    """
    parts = torch.as_tensor(scores, dtype=torch.float64).split(
        [len(layer.c) for layer in pruner.layers.values()])
    for layer, part in zip(pruner.layers.values(), parts, strict=True):
        if open_gates:
            layer.c.data.fill_(1.0)
        layer.c.grad = part.to(layer.c.dtype).clone()
    pruner.observe()
    pruner.step()


def gates(layers):
    """c of all matrices, (n,)."""
    return torch.cat([layer.c.detach() for layer in layers.values()])


def inputs(n=7, d=5, seed=3, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype)


# ---- any modules of width 8 ----------------------------------------------------------------------

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


FLAT = dict(importance=None, schedule=None)  # settings with which nothing is pruned


def cfg(*targets, **changes):
    """A DoRAConfig of rank 1 for these targets, but for the changes."""
    return DoRAConfig(**{"rank": 1, "dropout": 0.0, "targets": targets, **changes})


def chain(*modules, seed=0):
    """nn.Sequential of modules (or their classes) that fit X and Y, with seeded weights."""
    model = nn.Sequential(*(nn.Linear(8, 8) if module is nn.Linear else
                            module() if isinstance(module, type) else module for module in modules))
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def loss_of(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def fit(model, config, layers, steps=20, optimizers=(), after=lambda pruner: None):
    """The README's loop, with after(pruner) behind each step; return the Pruner and the (first)
    optimizer, which is AdamW if none is given."""
    torch.manual_seed(2)
    pruner = Pruner(layers, config, steps)
    optimizers = optimizers or [torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2)]
    model.train()
    for _ in range(steps):
        train_step(model, pruner, *optimizers)
        after(pruner)
    return pruner, optimizers[0]


def train_step(model, pruner, *optimizers):
    """One step as the head of dora.py shows it, on X and Y."""
    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model) + pruner.penalty()
        loss.backward()
        return loss

    closure()
    pruner.observe()
    for optimizer in optimizers:
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


def refused(names, call, *args, **options):
    """The call raises a DoRAError of one line that matches."""
    with pytest.raises(DoRAError, match=names) as error:
        call(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def untouched(names, call, model, *args):
    """The call on the model is refused, and the model is as it was: weights, modules, what requires
    a gradient."""
    def state():
        return ([(name, id(module)) for name, module in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()])

    before, weights = state(), {key: t.clone() for key, t in model.state_dict().items()}
    refused(names, call, model, *args)
    assert state() == before
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())

"""Models, data and training loops small enough for a test; no test of its own. Net, net_config and
Training have numbers that can be worked out by hand; chain, cfg and fit take any modules of width
8, in tests of models that dora.py was not written for."""
import pytest
import torch
from torch import nn

from dora import DoRAConfig, DoRAError, Pruner, compact_, inject, load_adapter, merge_, save_adapter

TARGETS = ("query", "up", "down")
EXACT = dict(beta1=0.0, beta2=None)  # no smoothing: the score of a step is that step's number


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
    """A DoRAConfig for Net: the default without dropout, in components, but for the changes."""
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


def numbers(text):
    """A vector "1 2 3" or a matrix "1 2; 3 4" (of one row: "1 2;") in float64."""
    rows = [[*map(float, row.split())] for row in text.strip(";").split(";")]
    return torch.tensor(rows if ";" in text else rows[0], dtype=torch.float64)


def table(text):
    """The rows of a text table, split into words."""
    return [line.split() for line in text.strip().split("\n")]


def trainable(model):
    """The parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def randomize_trainable(model, std=1.0):
    """Random values in all that trains."""
    torch.manual_seed(5)
    for p in trainable(model):
        nn.init.normal_(p, std=std)


def adamw(model):
    """AdamW of all that trains."""
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def train_step(loss, pruner, *optimizers):
    """One step as the head of dora.py shows it, where loss() computes the loss of the task."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    (loss() + pruner.penalty()).backward()
    pruner.observe()
    for optimizer in optimizers:
        optimizer.step()
    pruner.step()


class Training:
    """Net with a config's components, and step() to train it on a batch of the step's own."""

    def __init__(self, config, total=40, optimizer=torch.optim.AdamW, **options):
        self.model, self.layers = adapted(config)
        self.pruner = Pruner(self.layers, config, total)
        self.optimizer = optimizer(trainable(self.model), **{"lr": 1e-2, **options})
        self.t = 0

    def loss(self):
        x = inputs(16, seed=1000 + self.t)
        target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)
        return (self.model(x) - target).square().mean()

    def step(self, count=1):
        for _ in range(count):
            train_step(self.loss, self.pruner, self.optimizer)
            self.t += 1


def trained(config, steps=40):
    """The Training after a whole run."""
    training = Training(config, steps)
    training.step(steps)
    return training


def feed(pruner, scores, open_gates=True):
    """One step in which `sensitivity` of component i is scores[i]: c = 1, dℓ/dc = the score. With
    EXACT settings the Pruner's score is this number itself."""
    parts = torch.as_tensor(scores, dtype=torch.float64).split(
        [len(layer.c) for layer in pruner.layers.values()])
    for layer, part in zip(pruner.layers.values(), parts, strict=True):
        if open_gates:
            layer.c.data.fill_(1.0)
        layer.c.grad = part.to(layer.c.dtype).clone()
    pruner.observe()
    pruner.step()


def prune(layers, config, scores):
    """Random components, of which those with the best of these scores are live; the Pruner."""
    pruner = Pruner(layers, config, 20)
    for _ in range(20):
        feed(pruner, scores)
    randomize(layers)
    for layer in layers.values():
        layer.c.data.mul_(layer.mask)
    return pruner


def masks(layers):
    """The masks of all matrices, (n,)."""
    return torch.cat([layer.mask for layer in layers.values()])


def gates(layers):
    """c of all matrices, (n,)."""
    return torch.cat([layer.c.detach() for layer in layers.values()])


def inputs(n=7, d=5, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


# ---- any modules of width 8 ----------------------------------------------------------------------

X, Y = inputs(64, 8, seed=0, dtype=torch.float32), inputs(64, 8, seed=1, dtype=torch.float32)
IDS = torch.arange(20).view(4, 5)
FLAT = dict(importance=None, schedule=None)  # settings with which nothing is pruned


def cfg(*targets, **changes):
    """A DoRAConfig of rank 1 for these targets, but for the changes."""
    return DoRAConfig(**{"rank": 1, "dropout": 0.0, "targets": targets, **changes})


def chain(*modules, seed=0):
    """nn.Sequential of modules (or their classes) that fit X and Y, with seeded weights."""
    made = [nn.Linear(8, 8) if module is nn.Linear else module() if isinstance(module, type)
            else module for module in modules]
    model = nn.Sequential(*made)
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def two_matrices():
    """Matrices "0" and "2"."""
    return chain(nn.Linear, nn.Tanh, nn.Linear)


def two_adapted(*targets, **changes):
    """(model, layers): the same with components in these targets."""
    model = two_matrices()
    return model, inject(model, cfg(*targets, **changes))


class Tied(nn.Module):
    """Token ids (N, T) to (N, T, 20), the last matrix tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.proj = nn.Linear(8, 20, bias=False)
        self.proj.weight = self.emb.weight

    def forward(self, ids):
        return self.proj(torch.tanh(self.mid(self.emb(ids))))


def loss_of(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def fit(model, layers, steps=20, optimizers=(), after=lambda pruner: None, loss=loss_of):
    """Train the model with loss(model), and call after(pruner) behind each step; return the Pruner
    and the (first) optimizer, which is AdamW if none is given."""
    torch.manual_seed(2)
    pruner = Pruner(layers, next(iter(layers.values())).config, steps)
    optimizers = optimizers or [adamw(model)]
    model.train()
    for _ in range(steps):
        train_step(lambda: loss(model), pruner, *optimizers)
        after(pruner)
    return pruner, optimizers[0]


# ---- what is compared ----------------------------------------------------------------------------

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def reloads(model, make, folder, call=lambda model: model(X), tolerance=1e-5):
    """Save the model's adapter; load it into make(), which is returned: equal, merged too."""
    expected = call(model.eval())
    save_adapter(model, folder)
    fresh = make().eval()
    assert (call(fresh) - expected).abs().max() > 1e-3  # the adapter does something
    load_adapter(fresh, folder)
    close(call(fresh.eval()), expected, tolerance)
    close(call(merge_(fresh)), expected, tolerance)
    close(call(merge_(model)), expected, tolerance)
    return fresh


def refused(names, call, *args, **options):
    """The call raises a DoRAError of one line that matches; return it."""
    with pytest.raises(DoRAError, match=names) as error:
        call(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return error.value


def unfinished(names, model, folder):
    """compact_, merge_ and save_adapter are refused and write nothing; return the last error."""
    error = None
    for call in (compact_, merge_, lambda model: save_adapter(model, folder)):
        error = refused(names, call, model)
    assert not folder.exists()
    return error


def untouched(names, call, model, *args):
    """The call is refused and leaves weights, modules and what requires a gradient as they were."""
    def state():
        return ([(name, id(module)) for name, module in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()])

    before, weights = state(), {key: t.clone() for key, t in model.state_dict().items()}
    refused(names, call, model, *args)
    assert state() == before
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())

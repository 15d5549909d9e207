"""dora.py: which base an adapter fits. A file holds the components and what trained beside them;
everything else is the base's. On the base that it was trained on, in any dtype, an adapter gives
the outputs that it had; on another it is refused, and the message names a tensor that differs."""
import copy

import pytest
import torch
from small import FLAT, cfg, chain, close, randomize, refused
from torch import nn

from dora import DoRAError, inject, load_adapter, merge_, save_adapter

IDS = torch.arange(40).view(8, 5) % 20


class Model(nn.Module):
    """Token ids (N, T) to (N, 3), with each kind of tensor that a base has and a new head."""

    def __init__(self, seed=0, head=0):
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.stats = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.mid = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(()) + 1)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("position", torch.arange(5)[None])
        self.register_buffer("nothing", torch.empty(0, 2))
        self.register_buffer("seen", torch.tensor(0))  # counts the batches of training
        for p in (*self.norm.parameters(), self.stats.weight, self.stats.running_mean):
            nn.init.normal_(p)
        torch.manual_seed(head)  # as a new head: each time another one
        self.head = nn.Sequential(
            nn.Linear(8, 8),
            nn.Linear(8, 3))

    def forward(self, ids):
        x = self.emb(ids)
        x = x + 0.1 * self.position.mT.to(x)
        x = torch.tanh(self.up(self.norm(x))).mean(1)
        x = self.stats(x) * self.gain
        x = torch.tanh(self.mid(x) + self.shift)
        return self.head(x)


def saved(model, folder, unfreeze=()):
    """Save the model with random components and with what is unfrozen moved; return its outputs."""
    randomize(inject(model, cfg("up", **FLAT)))
    for name in unfreeze:
        for p in model.get_submodule(name).parameters():
            p.requires_grad_(True)
            nn.init.normal_(p)
    model.seen += 1
    save_adapter(model.eval(), folder)
    return model(IDS).float()


def loads(model, folder, expected):
    """Load the adapter: the outputs are as expected, and None is returned; or it is refused, the
    model is as it was, and the message is returned."""
    before = copy.deepcopy(model.state_dict())
    try:
        load_adapter(model.eval(), folder)
    except DoRAError as error:
        after = model.state_dict()
        assert before.keys() == after.keys() and "\n" not in str(error)
        assert all(torch.equal(before[key], after[key]) for key in before)
        return str(error)
    half = next(model.parameters()).element_size() == 2
    close(model(IDS).float(), expected, 0.1 if half else 1e-5)
    return None


CHANGES = {
    "order": lambda t: t.flip(0),
    "sign": lambda t: -t,
    "zero": lambda t: 0 * t,
    "noise": lambda t: t + 0.05 * t.std(correction=0) * torch.randn_like(t),
}


@pytest.mark.parametrize("unfreeze", [(), ("head.1",), ("norm", "head")])
def test_every_tensor_of_the_base(tmp_path, unfreeze):
    """One tensor of the base is changed: refused by its name, or held by the file and right."""
    expected = saved(Model(), tmp_path, unfreeze)
    held = tuple(f"{owner}." for owner in (*unfreeze, "stats"))
    torch.manual_seed(9)
    for name, tensor in Model().state_dict().items():
        for kind, change in CHANGES.items():
            if not tensor.is_floating_point() or not tensor.numel() or change(tensor).equal(tensor):
                continue
            model = Model()
            model.state_dict()[name].copy_(change(tensor))
            message = loads(model, tmp_path, expected)
            assert message is None if name.startswith(held) else name in message, (name, kind)


def test_a_head_that_was_never_unfrozen(tmp_path):
    """Training around a new random head, of which the file holds nothing: elsewhere, with another
    random head, the adapter is refused by the head's name. So is one whose head was refrozen."""
    expected = saved(Model(head=1), tmp_path)
    assert "head.0.weight" in loads(Model(head=2), tmp_path, expected)
    assert loads(Model(head=1), tmp_path, expected) is None
    expected = saved(Model(head=1), tmp_path, ["head"])
    assert loads(Model(head=2), tmp_path, expected) is None

    model = Model(head=1)
    saved(model, tmp_path, ["head"])
    model.head.requires_grad_(False)
    save_adapter(model, tmp_path)
    assert "head." in loads(Model(head=1), tmp_path, model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype(tmp_path, dtype):
    """A half-precision copy of the base, one that was rounded and widened again, and float64 are
    the same base, and so they are for an adapter that was made on the copy."""
    expected = saved(Model(), tmp_path / "wide")
    assert loads(Model().to(dtype), tmp_path / "wide", expected) is None
    saved(Model().to(dtype), tmp_path / "narrow")
    rounded = Model().to(dtype).float()
    for model in (Model(), rounded, Model().to(dtype)):
        load_adapter(model, tmp_path / "narrow")


def test_large_bases_in_another_dtype(tmp_path):
    """Matrices of a million entries, some tiny, some huge, and a norm of ones: rounded to half
    precision they are the same base; of another seed they are not."""
    def make(seed=0):
        model = chain(nn.Linear, nn.LayerNorm(64), nn.Linear(1024, 1024),
                      nn.Linear(1024, 8), nn.Embedding(5000, 64), seed=seed)
        model[3].weight.data *= 1e-4
        model[4].weight.data *= 100
        return model

    model = make()
    randomize(inject(model, cfg("0", **FLAT)))
    save_adapter(model, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(make().to(dtype), tmp_path)
    for part in (2, 3, 4):
        other = make()
        other[part] = make(seed=1)[part]
        refused(rf"\b{part}\.weight", load_adapter, other, tmp_path)


def test_a_base_that_was_changed_before(tmp_path):
    """An adapter that was trained on a base into which another had been merged, and one whose base
    trained for a while and was frozen again: refused on the original, fine on the changed one."""
    merged, moved = Model(), Model()
    saved(merged, tmp_path / "first")
    moved.mid.weight.data += torch.randn(8, 8)
    for changed, name in ((merge_(merged), "up.weight"), (moved, "mid.weight")):
        expected = saved(copy.deepcopy(changed), tmp_path / name)
        assert name in loads(Model(), tmp_path / name, expected)
        assert loads(changed, tmp_path / name, expected) is None

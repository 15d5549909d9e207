"""dora.py: which base an adapter fits. A file holds the components and what trained beside them;
everything else is the base's. On the base that it was trained on, in any dtype, an adapter gives
the outputs that it had; on another it is refused, and the message names a tensor that differs."""
import copy

import pytest
import torch
from small import FLAT, cfg, chain, close, fit, randomize, refused
from torch import nn

from dora import (
    DoRAError, inject, load_adapter, merge_, read_safetensors, save_adapter, write_safetensors)

IDS = torch.arange(40).view(8, 5) % 20


class Model(nn.Module):
    """Token ids (N, T) to (N, 3): each kind of tensor that a base has, an adapted matrix and a new
    head."""

    def __init__(self, seed=0, head=0):
        super().__init__()
        torch.manual_seed(seed)
        self.emb, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.up, self.stats = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.mid, self.gain = nn.Linear(8, 8), nn.Parameter(torch.rand(()) + 1)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("position", torch.arange(5)[None])
        self.register_buffer("nothing", torch.empty(0, 2))
        for p in (self.norm.weight, self.norm.bias, self.stats.weight, self.stats.running_mean):
            nn.init.normal_(p)
        torch.manual_seed(head)  # as a new head: each time another one
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, ids):
        x = self.emb(ids)
        x = x + 0.1 * self.position.mT.to(x)
        x = torch.tanh(self.up(self.norm(x))).mean(1)
        return self.head(torch.tanh(self.mid(self.stats(x) * self.gain) + self.shift))


def trained(model=None, unfreeze=(), folder=None):
    """The model in eval mode with random components in `up` and what is unfrozen moved; saved."""
    model = Model() if model is None else model
    randomize(inject(model, cfg("up", **FLAT)))
    for name in unfreeze:
        for p in model.get_submodule(name).parameters():
            p.requires_grad_(True)
            nn.init.normal_(p)
    if folder is not None:
        save_adapter(model, folder)
    return model.eval()


def fits(model, folder, expected):
    """Load the adapter: refused, return the message; otherwise the outputs are as expected."""
    before = copy.deepcopy(model.state_dict())
    try:
        load_adapter(model.eval(), folder)
    except DoRAError as error:
        after = model.state_dict()
        assert before.keys() == after.keys() and "\n" not in str(error)
        assert all(torch.equal(before[key], after[key]) for key in before)
        return str(error)
    close(model(IDS).float(), expected, 0.1 if model.emb.weight.element_size() == 2 else 1e-5)
    return None


@pytest.mark.parametrize("unfreeze", [(), ("head",), ("head.1",), ("norm", "head")])
def test_every_tensor_of_the_base(tmp_path, unfreeze):
    """Each tensor of the model changed alone: in another order of its rows, negated, with 5 % of
    noise, and set to 0. Then the adapter is refused by the tensor's name, or holds the tensor
    itself, and the outputs are right."""
    expected = trained(unfreeze=unfreeze, folder=tmp_path)(IDS)
    torch.manual_seed(9)
    changes = {"order": lambda t: t.flip(0), "sign": lambda t: -t, "zero": lambda t: 0 * t,
               "noise": lambda t: t + 0.05 * t.std(correction=0) * torch.randn_like(t)}
    missed = []
    for name, tensor in Model().state_dict().items():
        for kind, change in changes.items():
            if not tensor.is_floating_point() or tensor.equal(change(tensor)):
                continue
            model = Model()
            model.state_dict()[name].copy_(change(tensor))
            try:
                message = fits(model, tmp_path, expected)
            except AssertionError:
                missed.append((name, kind))
                continue
            held = name.startswith(tuple(f"{owner}." for owner in (*unfreeze, "stats")))
            assert message is None if held else name in message, (name, kind, message)
    assert not missed


def test_a_head_that_was_never_unfrozen(tmp_path):
    """Training around a new random head, of which the file holds nothing: elsewhere, with another
    random head, the adapter is refused by the head's name. So is one whose head was frozen again
    before saving, and one of whose two matrices trained."""
    expected = trained(Model(head=1), folder=tmp_path / "forgotten")(IDS)
    assert "head.0.weight" in fits(Model(head=2), tmp_path / "forgotten", expected)
    assert fits(Model(head=1), tmp_path / "forgotten", expected) is None

    model = trained(Model(head=1), ["head"])
    model.head.requires_grad_(False)
    save_adapter(model, tmp_path / "frozen")
    assert "head." in fits(Model(head=1), tmp_path / "frozen", model(IDS))

    expected = trained(Model(head=1), ["head.1"], tmp_path / "half")(IDS)
    assert "head.0." in fits(Model(head=2), tmp_path / "half", expected)
    expected = trained(Model(head=1), ["head"], tmp_path / "whole")(IDS)
    assert fits(Model(head=2), tmp_path / "whole", expected) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype(tmp_path, dtype):
    """A half-precision copy of the base, one that was rounded and widened again, and float64 are
    the same base, and so they are for an adapter that was made on the copy."""
    def rounded():
        return Model().to(dtype).float()

    expected = trained(folder=tmp_path / "wide")(IDS)
    assert fits(Model().to(dtype), tmp_path / "wide", expected) is None
    other = rounded()
    load_adapter(other, tmp_path / "wide")
    save_adapter(other, tmp_path / "again")
    load_adapter(Model(), tmp_path / "again")
    trained(Model().to(dtype), folder=tmp_path / "narrow")
    for model in (Model(), rounded(), Model().to(dtype)):
        load_adapter(model, tmp_path / "narrow")


def test_large_bases_in_another_dtype(tmp_path):
    """Matrices of a million entries, some tiny, some huge, and a norm of ones: rounded to half
    precision they are the same base; of another seed they are not."""
    def make(seed, dtype=torch.float32):
        model = chain(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(1024, 1024),
                      nn.Linear(1024, 8), nn.Embedding(5000, 64), seed=seed)
        model[3].weight.data *= 1e-4
        model[4].weight.data *= 100
        return model.to(dtype)

    model = make(0)
    randomize(inject(model, cfg("0", **FLAT)))
    save_adapter(model, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(make(0, dtype), tmp_path)
    for part in (2, 3, 4):
        other = make(0)
        other[part] = make(1)[part]
        refused(rf"\b{part}\.weight", load_adapter, other, tmp_path)


def test_a_base_that_was_changed_before(tmp_path):
    """An adapter that was trained on a base into which another had been merged, and one whose base
    trained for a while and was frozen again: refused on the original, fine on the changed one."""
    first = merge_(trained(Model()))
    expected = trained(copy.deepcopy(first), folder=tmp_path / "second")(IDS)
    assert "up.weight" in fits(Model(), tmp_path / "second", expected)
    assert fits(first, tmp_path / "second", expected) is None

    moved = Model()
    moved.mid.weight.data += torch.randn(8, 8)
    trained(copy.deepcopy(moved), folder=tmp_path / "moved")
    refused("mid.weight", load_adapter, Model(), tmp_path / "moved")
    load_adapter(moved, tmp_path / "moved")


def test_tied_weights(tmp_path):
    """A base whose head is tied to its embedding fits itself; one whose two are no longer equal is
    refused."""
    def make(tied=True):
        model = chain(nn.Embedding(20, 8), nn.Linear, nn.Linear(8, 20, bias=False))
        model[2].weight = model[0].weight if tied else nn.Parameter(model[0].weight.flip(0))
        return model

    model = make()
    randomize(inject(model, cfg("1", **FLAT)))
    expected = model(IDS)
    save_adapter(model, tmp_path)
    same = make()
    load_adapter(same, tmp_path)
    close(same(IDS), expected)
    refused("2.weight", load_adapter, make(tied=False), tmp_path)


def test_files_without_a_mark(tmp_path):
    """PEFT's own files say nothing of their base, and those of earlier versions had a checksum
    here: both load."""
    trained(folder=tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
    for metadata in (None, {"base": "0a1b2c3d"}):
        write_safetensors(path, tensors, metadata)
        load_adapter(Model(seed=1), tmp_path)


def test_after_a_whole_run(tmp_path):
    """A model that trained through a whole run: the marks are those of the plain base."""
    model, config = chain(nn.Linear, nn.LayerNorm(8), nn.Linear), cfg("0")
    fit(model, config, inject(model, config))
    save_adapter(model, tmp_path)
    load_adapter(chain(nn.Linear, nn.LayerNorm(8), nn.Linear), tmp_path)
    other = chain(nn.Linear, nn.LayerNorm(8), nn.Linear)
    nn.init.normal_(other[1].weight)
    refused("1.weight", load_adapter, other, tmp_path)

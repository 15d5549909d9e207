"""dora.py: whole runs. Pruner (Algorithm 1), regrowth, the final mask, resuming, compact_."""
import functools
import io

import pytest
import torch
from small import (
    EXACT, Training, adapted, feed, gates, inputs, masks, net_config, numbers, randomize,
    randomize_trainable, refused, trained, unfinished)
from torch import nn

from dora import (
    METHODS, NotFiniteError, Pruner, budget, compact_, dem_penalty, save_adapter)

HALF = dict(rank=1, start_rank=2)  # of twelve components six stay
near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-9)


def pruner_of(total, **changes):
    """(model, layers, Pruner): Net with six adapted matrices."""
    config = net_config(**changes)
    model, layers = adapted(config)
    return model, layers, Pruner(layers, config, total)


def best(scores, k):
    """True for the k best, the first of those that tie."""
    kept = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return [i in kept for i in range(len(scores))]


@pytest.mark.parametrize("schedule", ["slow_first", "fast_first"])
@pytest.mark.parametrize("equal", [False, True])
def test_exactly_b_gates_after_every_prune(schedule, equal):
    """After each step due exactly the b(t) best gates are not 0, if scores are random or equal;
    in the steps between none is closed, and after the last pruning its mask is held."""
    torch.manual_seed(0)
    everything = [True] * 24
    for interval, total in {1: 40, 3: 40, 4: 41, 50: 100, 100: 23}.items():
        _, layers, pruner = pruner_of(total, schedule=schedule, interval=interval,
                                      rank=2, start_rank=4, **EXACT)
        first, last = round(0.15 * total), total - round(0.5 * total)
        due = {*range(first + interval, last, interval), last}
        for t in range(1, total + 1):
            scores = torch.ones(24) if equal else torch.rand(24)
            feed(pruner, scores)  # opens all gates before
            if t in due:
                expected = best(scores.tolist(), budget(t, total, pruner.config, 6))
                assert masks(layers).tolist() == expected
                assert pruner.mask.tolist() == expected
            elif t < last:
                expected = everything
            assert gates(layers).ne(0).tolist() == expected
        ranks = pruner.mask.view(6, 4).sum(1)
        assert [*pruner.ranks().values()] == ranks.tolist()
        assert pruner.live == sum(expected) == 12


def test_a_pruned_component_comes_back_before_the_final_mask():
    """The pair closed by the first prunings is the better one from step 7 on, and comes back. From
    the final mask, of step 8, on nobody does, whatever is written into a score or a gate."""
    _, layers, pruner = pruner_of(16, targets=("query",), **HALF, interval=1,
                                  initial_phase=0.25, **EXACT)
    history = []
    for scores in ["1 2 3 4"] * 6 + ["4 3 2 1"] * 2 + ["0 0 9 9"] * 8:
        feed(pruner, numbers(scores))
        history.append("".join(str(int(gate)) for gate in gates(layers)))
    assert history == ["1111"] * 4 + ["0011"] * 2 + ["1100"] * 10


def test_momentum_reopens_a_gate_until_the_final_mask():
    """In real training with AdamW every closed gate moves off 0 in the steps between two prunings
    and keeps its a and b; from the last pruning on it is 0 after every step."""
    training = Training(net_config(rank=1, start_rank=3, interval=4), 120)
    layers = training.layers
    for t in range(1, 121):
        training.step()
        closed = gates(layers)[~masks(layers)]
        if t >= 60 or t in range(22, 60, 4):
            assert not closed.any()
        else:
            assert closed.all()
    assert masks(layers).sum() == 6
    assert all(layer.A.any(1).all() for layer in layers.values())


def averages(pruner):
    """All that the Pruner has smoothed, in one tensor."""
    return torch.cat([part.flatten() for part in (*pruner.I_bar, *pruner.U_bar)])


def test_observe_once_in_every_step():
    """step() without observe(), in any phase, and a second observe() in a step, which would count a
    micro-batch twice: an error that names the call and the step, and changes no average."""
    _, _, pruner = pruner_of(20)
    refused(r"step 1\b.*observe\(\)", pruner.step)
    for step in range(1, 17):
        feed(pruner, torch.ones(18))
        if step in (1, 14, 16):  # before the first pruning, before the last and after it
            refused(rf"step {step + 1}\b.*observe\(\)", pruner.step)
    pruner.observe()
    before = averages(pruner)
    refused(r"step 17\b.*observe\(\)", pruner.observe)
    assert torch.equal(averages(pruner), before)
    pruner.step()
    assert pruner.t == 17


def backward(model, pruner, factor=1.0):
    """A step without an optimizer."""
    model.zero_grad()
    (model(inputs()).sum() * factor).backward()
    pruner.observe()
    pruner.step()


@pytest.mark.parametrize("importance", ["sensitivity", "triplet", "norm", "frobenius"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_run(importance, bad):
    """One gate is NaN or infinite: the next pruning stops with its step, and changes no mask."""
    model, layers, pruner = pruner_of(40, importance=importance, interval=4)
    randomize(layers)
    layers["layer.1.up"].c.data[0] = bad
    for _ in range(9):
        backward(model, pruner)
    error = refused(r"step 10\b", backward, model, pruner)
    assert isinstance(error, NotFiniteError) and masks(layers).all()


@pytest.mark.parametrize("importance", ["sensitivity", "triplet"])
def test_a_gradient_that_overflowed_is_not_observed(importance):
    """Under a GradScaler some steps have gradients that are not finite, and the optimizer skips
    them. The averages after such steps equal those before them, bit for bit."""
    model, layers, pruner = pruner_of(40, importance=importance)
    randomize(layers)
    backward(model, pruner)
    before = averages(pruner)
    for factor in (float("nan"), float("inf")):
        backward(model, pruner, factor)
        assert torch.equal(averages(pruner), before)
    backward(model, pruner)
    assert not torch.equal(averages(pruner), before) and pruner.scores().isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_continues_bit_for_bit(method):
    """A run cut in any phase, with its states through a file, ends bit for bit as the uncut."""
    config = net_config(**METHODS[method], rank=1)
    whole = trained(config).model
    for stop, weights_first in ((3, True), (11, False), (11, True), (20, True), (27, False)):
        first, second = Training(config), Training(config)
        first.step(stop)
        trains = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
        file = io.BytesIO()
        torch.save([trains, first.optimizer.state_dict(), first.pruner.state_dict()], file)
        file.seek(0)
        weights, moments, memory = torch.load(file, weights_only=True)

        randomize_trainable(second.model)
        if weights_first:
            second.model.load_state_dict(weights, strict=False)
        second.pruner.load_state_dict(memory)
        if not weights_first:
            second.model.load_state_dict(weights, strict=False)
        assert second.pruner.ranks() == first.pruner.ranks()
        assert torch.equal(masks(second.layers), masks(first.layers))

        second.optimizer.load_state_dict(moments)
        second.t = stop
        second.step(40 - stop)
        expected = whole.state_dict()
        for name, tensor in second.model.state_dict().items():
            assert tensor.equal(expected[name])


@pytest.mark.parametrize("changes, steps, blocks, names", [
    (dict(importance="norm"), 40, 2, "importance = sensitivity.*norm"),
    ({}, 10, 2, "total_steps = 40.*10"),
    ({}, 40, 1, "components = 12.* 6")])
def test_a_state_of_other_settings(changes, steps, blocks, names):
    """A run that continues with another number of steps or components or another setting is neither
    of the two runs: refused by the setting and both values, and the Pruner is as it was."""
    state = trained(net_config(**HALF)).pruner.state_dict()
    config = net_config(**HALF | changes)
    other = Pruner(adapted(config, blocks=blocks)[1], config, steps)
    refused(names, other.load_state_dict, state)
    assert other.t == 0 and not other.I_bar


@pytest.mark.parametrize("optimizer, options", [
    (torch.optim.AdamW, dict(amsgrad=True, fused=True)),
    (torch.optim.SGD, dict(momentum=0.9)),
    (torch.optim.RMSprop, dict(centered=True)),
    (torch.optim.Adagrad, {})])
@pytest.mark.parametrize("method", ["dora", "paper"])
def test_compaction_keeps_the_trajectory(optimizer, options, method):
    """Of two equal runs one is compacted at the last pruning: 30 steps later live components, the
    head and the outputs are equal to 1e-9, and matrices of rank 0 became nn.Linear."""
    config = net_config(**METHODS[method] | dict(rank=0.5, start_rank=2, interval=2))
    masked, small = (Training(config, 60, optimizer, **options) for _ in range(2))
    for training in (masked, small):
        training.step(30)
    held = [*small.optimizer.param_groups[0]["params"]]
    compact_(small.model, small.optimizer)
    refused(r"compact_\(\)", Pruner, small.layers, config, 60)
    now = small.optimizer.param_groups[0]["params"]
    assert [*map(id, held)] == [*map(id, now)]
    assert sum(map(len, held)) < 60 and all(small.optimizer.state[p] for p in held)
    for training in (masked, small):
        training.step(30)

    ranks = masked.pruner.ranks()
    assert small.pruner.ranks() == ranks and 0 in ranks.values()
    near(small.model(inputs()), masked.model(inputs()))
    near(small.model.head.weight, masked.model.head.weight)
    for name, layer in masked.layers.items():
        short, live = small.model.get_submodule(name), layer.mask
        if layer.rank:
            near(short.A, layer.A[live])
            near(short.B, layer.B[:, live])
            near(short.c, layer.c[live])
        else:
            assert type(short) is nn.Linear
            assert short.weight.equal(layer.base.weight)


def test_before_the_last_pruning(tmp_path):
    """Without any step, and after 8 of 40, compact_, merge_ and save_adapter are an error that says
    what is missing; the model stays as it is and nothing is written."""
    training = Training(net_config(**HALF))
    for _ in range(2):
        unfinished("last pruning", training.model, tmp_path / "adapter")
        training.step(8)
    assert all(len(layer.c) == 2 for layer in training.layers.values())
    assert training.model.layer[0].up is training.layers["layer.0.up"]


def test_between_an_optimizer_step_and_pruner_step(tmp_path):
    """In the final phase, after optimizer.step() moved a closed gate: an error that names the layer
    and the call, since dropping the component would change the output."""
    training = trained(net_config(**HALF))
    name = next(name for name, layer in training.layers.items() if layer.rank < 2)
    layer = training.layers[name]
    layer.c.data[~layer.mask] = 0.1
    unfinished(rf"{name}.*pruner\.step\(\)", training.model, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_component_that_is_not_finite_after_the_last_pruning(method, tmp_path):
    """The final phase has no pruning that would look at the scores: compact_, merge_ and
    save_adapter, before and after compaction, name the layer and write nothing."""
    training = trained(net_config(**METHODS[method]))
    layer = training.layers["layer.1.up"]
    for bad in (float("nan"), float("inf")):
        value = layer.B.data[0, -1].clone()
        layer.B.data[0, -1] = bad
        error = unfinished(r"layer\.1\.up", training.model, tmp_path / "adapter")
        assert isinstance(error, NotFiniteError)
        layer.B.data[0, -1] = value
        compact_(training.model)
    save_adapter(training.model, tmp_path / "adapter")


class Authors:
    """What the authors' code does after each optimizer step, one component at a time, from the
    facts in their paper and code, with a Pruner's methods. One thing is ours: exactly `number`
    components are closed, the later position first where scores tie (theirs closes all that tie
    with the worst, and one where none is due).

    Their step index counts from 0 and ours from 1, so their index 0 sees the model before training,
    when all scores are 0 and nothing changes. With T = 300 all phases are whole steps.
    """

    def __init__(self, layers, config, total):
        self.layers, self.config, self.T = [*layers.values()], config, total
        self.smoothed, self.closed = {}, []  # by (number of the matrix, of the component)
        self.t = 0
        self.step()

    def penalty(self):
        """As ours, until pruning ends."""
        if self.t > self.T * 0.5:
            return 0.0
        return self.config.eta * dem_penalty(self.layers)

    def observe(self):
        pass

    def step(self):
        p = int(self.t - self.T * 0.15)
        P = int(self.T * (1 - 0.15 - 0.5))
        self.t += 1
        if p <= P:
            self.smooth()
        if 0 <= p <= P and (p % self.config.interval == 0 or p == P):
            r_prime, r = self.config.r_prime, self.config.rank
            share = (r_prime - r) / r_prime
            number = int(len(self.smoothed) * share * (p / P) ** 3)
            worst_first = sorted(reversed(self.smoothed), key=self.smoothed.get)
            self.closed = worst_first[:number]
            self.close()
        if p > P:
            self.close()

    def smooth(self):
        for i, layer in enumerate(self.layers):
            parts = [c * torch.outer(b, a) for a, b, c in zip(layer.A, layer.B.T, layer.c)]
            norm = sum(parts).norm() + 1e-8
            for j, part in enumerate(parts):
                score = (part.norm() / norm).item()
                before = self.smoothed.get((i, j), 0.0)
                self.smoothed[i, j] = 0.9 * before + 0.1 * score

    def close(self):
        for i, j in self.closed:
            self.layers[i].c.data[j] = 0.0


def test_the_papers_form_follows_the_authors_algorithm():
    """300 steps of two equal runs with AdamW, `paper` and the class above: after every step the
    same gates are 0, and at the end all weights are equal to 1e-9."""
    config = net_config(**METHODS["paper"], rank=2, start_rank=3, interval=10,
                        targets=("query", "down"))
    ours, theirs = Training(config, 300), Training(config, 300)
    theirs.pruner = Authors(theirs.layers, config, 300)
    history = []
    for t in range(1, 301):
        ours.step()
        theirs.step()
        now = gates(ours.layers).ne(0)
        assert now.equal(gates(theirs.layers).ne(0)), t
        history.append(now.tolist())
    changes = sum(a != b for a, b in zip(history, history[1:]))
    assert changes > 5 and ours.pruner.live == 8
    near([*ours.model.parameters()], [*theirs.model.parameters()])

"""dora.py: whole runs. Pruner (Algorithm 1), regrowth, the final mask, resuming, compact_."""
import io

import pytest
import torch
from small import adapted, feed, gates, inputs, net_config, randomize, trained, trainer
from torch import nn

from dora import (
    METHODS, DoRAError, DoRALinear, NotFiniteError, Pruner, budget, compact_, dem_penalty, merge_,
    save_adapter)

EXACT = dict(beta1=0.0, beta2=None)        # the score of a step is that step's number


def pruner_of(total, **changes):
    """(layers, pruner) of Net's six matrices."""
    config = net_config(**changes)
    _, layers = adapted(config)
    return layers, Pruner(layers, config, total)


def masks(layers):
    return torch.cat([layer.mask for layer in layers.values()])


# ---- exactly b(t) gates, at the right steps -----------------------------------------------------

@pytest.mark.parametrize("schedule", ["slow_first", "fast_first"])
@pytest.mark.parametrize("equal", [False, True])
def test_exactly_b_gates_after_every_prune(schedule, equal):
    """Through whole runs of several lengths and intervals, with random scores and with all scores
    equal: after every step due exactly b(t) gates are not 0, those of the b(t) best components; in
    the steps between none is closed."""
    g = torch.Generator().manual_seed(0)
    for total, interval in ((40, 3), (40, 1), (41, 4), (100, 7), (100, 50), (23, 100)):
        layers, pruner = pruner_of(total, schedule=schedule, interval=interval,
                                   rank=2, start_rank=4, **EXACT)
        first, last = round(0.15 * total), total - round(0.5 * total)
        for t in range(1, total + 1):
            scores = torch.ones(24) if equal else torch.rand(24, generator=g)
            feed(pruner, scores)
            live = gates(layers).ne(0)
            b = budget(t, total, pruner.config, 6)
            due = first < t < last and (t - first) % interval == 0 or t == last
            if due:
                best = sorted(range(24), key=lambda i: (-scores[i].item(), i))[:b]
                assert live.tolist() == [i in set(best) for i in range(24)]
                assert torch.equal(masks(layers), live)
            if t > last:
                assert live.sum() == 12 and torch.equal(live, masks(layers))
            elif not due:
                assert live.all()                     # feed() opened them all, nobody closed one
        assert sum(pruner.ranks().values()) == 12
        assert [*pruner.ranks().values()] == [int(mask.sum()) for mask in pruner.mask.split(4)]


@pytest.mark.parametrize("method", ["dora", "paper", "adalora"])
def test_real_runs_end_on_budget(method):
    """Whole training runs with AdamW: at every step after a prune, and at every step from the last
    one on, exactly b(t) gates are open (the rest is 0, however much momentum it has)."""
    total = 40
    for rank, start_rank in ((1, 2), (0.5, None), (1.5, 3), (2, 2)):
        config = net_config(**METHODS[method] | dict(
            rank=rank, start_rank=start_rank, dropout=0.0, interval=4))
        model, layers = adapted(config)
        randomize(layers)                              # no gate is 0 by itself
        pruner = Pruner(layers, config, total)
        _, step = trainer(model, pruner)
        for t in range(1, total + 1):
            step()
            if t > 6 and (t - 6) % 4 == 0 and t < 20 or t >= 20:
                assert gates(layers).ne(0).sum() == budget(t, total, config, 6)
        assert sum(layer.rank for layer in layers.values()) == pruner.live == round(rank * 6)


def test_pruning_is_global():
    """The budget is the whole model's: matrices end with differing ranks, some with none."""
    layers, pruner = pruner_of(20, rank=1, start_rank=2, interval=2, **EXACT)
    scores = torch.tensor([0., 0, 9, 8, 7, 1, 0, 0, 6, 5, 4, 1])
    for _ in range(20):
        feed(pruner, scores)
    assert list(pruner.ranks().values()) == [0, 2, 1, 0, 2, 1]
    assert [layer.rank for layer in layers.values()] == [0, 2, 1, 0, 2, 1]


def test_a_method_without_pruning_runs_through_the_same_calls():
    """`lora`: all gates stay open and 1 through a run of observe() and step(), penalty 0."""
    config = net_config(**METHODS["lora"])
    _model, layers, pruner = trained(config)
    assert gates(layers).eq(1).all() and masks(layers).all()
    assert pruner.penalty().item() == 0
    assert sum(pruner.ranks().values()) == 12


# ---- regrowth, and the end of it ----------------------------------------------------------------

def test_a_pruned_component_comes_back_before_the_final_mask():
    """The pair closed by the first prunings is the better one from step 7 on, and comes back in the
    place of the other; from the final mask, of step 8, on nobody comes back, however good it
    becomes and whatever is written into its gate."""
    layers, pruner = pruner_of(16, targets=("query",), rank=1, start_rank=2, interval=1,
                               schedule="fast_first", initial_phase=0.25, final_phase=0.5, **EXACT)
    history = []
    for t in range(1, 17):
        feed(pruner, [1., 2, 3, 4] if t < 7 else [4., 3, 2, 1] if t < 9 else [0., 0, 9, 9])
        history.append(gates(layers).int().tolist())
    assert history == [[1] * 4] * 4 + [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 10


def test_momentum_reopens_a_gate_until_the_final_mask():
    """In real training with AdamW every closed gate moves off 0 in the steps between two prunings
    and keeps its a and b; from the last pruning on it is 0 after every step."""
    config = net_config(rank=1, start_rank=3, interval=4, schedule="fast_first")
    model, layers = adapted(config)
    pruner = Pruner(layers, config, 120)
    _, step = trainer(model, pruner)
    for t in range(1, 121):
        step()
        live, closed = masks(layers), gates(layers)[~masks(layers)]
        pruned_now = t > 18 and (t - 18) % 4 == 0 or t >= 60
        assert (closed == 0).all() if pruned_now else (closed != 0).all()
    assert live.sum() == 6
    assert all((layer.A.abs().sum(1) > 0).all() for layer in layers.values())


# ---- wrong use ----------------------------------------------------------------------------------

def test_observe_once_in_every_step():
    """step() without observe(), at the start, twice in a row, and in the final phase, and a second
    observe() in a step, which would count the first micro-batch of two twice: an error that names
    the call and the step, and changes no average."""
    _layers, pruner = pruner_of(20)
    with pytest.raises(DoRAError, match=r"step 1\b.*observe\(\)"):
        pruner.step()
    for step in range(1, 17):
        feed(pruner, torch.ones(18))
        if step in (1, 14, 16):  # before the first pruning, before the last and after it
            with pytest.raises(DoRAError, match=rf"step {step + 1}\b.*observe\(\)"):
                pruner.step()
    pruner.observe()
    before = [part.clone() for part in (*pruner.I_bar, *pruner.U_bar)]
    with pytest.raises(DoRAError, match=r"step 17\b.*observe\(\)"):
        pruner.observe()
    assert all(map(torch.equal, before, (*pruner.I_bar, *pruner.U_bar)))
    pruner.step()
    assert pruner.t == 17


@pytest.mark.parametrize("importance", ["sensitivity", "triplet", "norm", "frobenius"])
def test_a_score_that_is_not_finite_stops_the_run(importance):
    """One gate that is NaN or infinite: the next pruning stops and names its step, the masks as
    before."""
    for bad in (float("nan"), float("inf")):
        config = net_config(importance=importance, interval=4)
        model, layers = adapted(config)
        randomize(layers)
        pruner = Pruner(layers, config, 40)
        with pytest.raises(NotFiniteError, match=r"step 10\b"):
            for _ in range(40):
                model.zero_grad()
                model(inputs()).sum().backward()
                layers["layer.1.up"].c.data[0] = bad
                pruner.observe()
                pruner.step()
        assert masks(layers).all()


@pytest.mark.parametrize("importance", ["sensitivity", "triplet"])
def test_a_gradient_that_overflowed_is_not_observed(importance):
    """Under a GradScaler some steps have gradients that are not finite, and the optimizer skips
    them. The averages after such steps equal those before them, bit for bit."""
    config = net_config(importance=importance)
    model, layers = adapted(config)
    randomize(layers)
    pruner = Pruner(layers, config, 40)

    def averages_after(factor):
        model.zero_grad()
        model(inputs()).sum().mul(factor).backward()
        pruner.observe()
        pruner.step()
        return torch.cat([part.flatten() for part in (*pruner.I_bar, *pruner.U_bar)])

    before = averages_after(1.0)
    assert torch.equal(averages_after(float("nan")), before)
    assert torch.equal(averages_after(float("inf")), before)
    assert not torch.equal(averages_after(1.0), before) and pruner.scores().isfinite().all()


def test_pruner_counts_optimizer_steps():
    """Under gradient accumulation observe() and step() once a step: four backward passes of a
    quarter of the batch give the scores and masks of one pass."""
    results = []
    for pieces in (1, 4):
        config = net_config(rank=1, start_rank=2)
        model, layers = adapted(config)
        pruner = Pruner(layers, config, 20)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for t in range(20):
            optimizer.zero_grad()
            for x in inputs(16, seed=t).chunk(pieces):
                (model(x).sin().square().sum() / 16).backward()
            pruner.observe()
            optimizer.step()
            pruner.step()
        results.append((masks(layers), gates(layers)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)


# ---- the same run again, and in two parts -------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_state_dict_continues_bit_for_bit(method):
    """A run cut in any phase, its trained weights and states through torch.save and weights_only
    load into a new model, optimizer and Pruner, in either order, ends bit for bit as the uncut
    run does."""
    rank = dict(rank=2) if method == "lora" else dict(rank=1, start_rank=2)
    config = net_config(**METHODS[method] | dict(rank, dropout=0.0))
    whole, _, _ = trained(config)
    for stop, weights_first in ((3, True), (11, False), (11, True), (20, True), (27, False)):
        model, layers = adapted(config)
        pruner = Pruner(layers, config, 40)
        optimizer, step = trainer(model, pruner)
        for _ in range(stop):
            step()
        trains = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        weights, moments, memory = through_a_file(
            [trains, optimizer.state_dict(), pruner.state_dict()])

        second, new_layers = adapted(config)
        for p in second.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        resumed = Pruner(new_layers, config, 40)
        if weights_first:
            second.load_state_dict(weights, strict=False)
            resumed.load_state_dict(memory)
        else:
            resumed.load_state_dict(memory)
            second.load_state_dict(weights, strict=False)
        assert resumed.ranks() == pruner.ranks() and resumed.live == pruner.live
        assert torch.equal(masks(new_layers), masks(layers))

        optimizer, step = trainer(second, resumed, start=stop)
        optimizer.load_state_dict(moments)
        for _ in range(stop, 40):
            step()
        assert all(torch.equal(a, b) for a, b in
                   zip(whole.state_dict().values(), second.state_dict().values(), strict=True))


def through_a_file(state):
    """The same content, saved by torch and loaded with weights_only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("changes, steps, names", [
    (dict(start_rank=4), 40, "start_rank = 2.*4"), ({}, 10, "total_steps = 40.*10"),
    (dict(importance="norm"), 40, "importance = sensitivity.*norm"),
    (dict(alpha=16.0), 40, "alpha = 8.*16"), (dict(rank=0.8, start_rank=2), 40, "rank = 1.*0.8")])
def test_a_state_of_other_settings(changes, steps, names):
    """A run that goes on with another number of components, of steps or another setting is neither
    of the two runs: refused by the setting and both values, and the Pruner is as it was."""
    _, _, pruner = trained(net_config(rank=1, start_rank=2))
    _, other = pruner_of(steps, **{"rank": 1, "start_rank": 2, **changes})
    with pytest.raises(DoRAError, match=names):
        other.load_state_dict(pruner.state_dict())
    assert other.t == 0 and not other.I_bar


def test_a_state_of_another_model():
    """A state with another number of components is refused by both numbers."""
    _, _, pruner = trained(net_config(rank=1, start_rank=2))
    _, layers = adapted(pruner.config, blocks=1)
    with pytest.raises(DoRAError, match="components = 12.* 6"):
        Pruner(layers, pruner.config, 40).load_state_dict(pruner.state_dict())


def test_back_to_an_earlier_state():
    """After observe() of a bad step, the restored Pruner waits for observe() again."""
    config = net_config()
    model, layers = adapted(config)
    pruner = Pruner(layers, config, 20)
    _, step = trainer(model, pruner)
    step()
    state = through_a_file(pruner.state_dict())
    pruner.observe()
    pruner.load_state_dict(state)
    step()
    assert pruner.t == 2


# ---- compaction ---------------------------------------------------------------------------------

OPTIMIZERS = [(torch.optim.AdamW, {}), (torch.optim.AdamW, dict(amsgrad=True, fused=True)),
              (torch.optim.SGD, dict(momentum=0.9)), (torch.optim.RMSprop, dict(centered=True)),
              (torch.optim.Adagrad, {}), (torch.optim.NAdam, {})]


@pytest.mark.parametrize("method", ["dora", "paper"])
@pytest.mark.parametrize("optimizer, options", OPTIMIZERS)
def test_compaction_keeps_the_trajectory(optimizer, options, method):
    """Two equal runs, one compacted at the last pruning: 50 steps later all live components, the
    head and the outputs are those of the masked run to 1e-9; matrices of rank 0 became
    nn.Linear."""
    config = net_config(**METHODS[method] | dict(rank=0.5, start_rank=2, dropout=0.0, interval=2))
    runs = []
    for compact in (False, True):
        model, layers = adapted(config)
        pruner = Pruner(layers, config, 100)
        opt, step = trainer(model, pruner, lr=1e-2, optimizer=optimizer, **options)
        for _ in range(50):
            step()
        if compact:
            compact_(model, opt)
            assert sum(len(p) for p in opt.param_groups[0]["params"]) < 60
            assert all(opt.state[p] for p in opt.param_groups[0]["params"])
        for _ in range(50):
            step()
        runs.append((model, layers, pruner))

    (masked, layers, pruner), (small, _, other) = runs
    assert pruner.ranks() == other.ranks() and 0 in pruner.ranks().values()
    torch.testing.assert_close(small(inputs()), masked(inputs()), rtol=0, atol=1e-9)
    torch.testing.assert_close(small.head.weight, masked.head.weight, rtol=0, atol=1e-9)
    for name, layer in layers.items():
        short = small.get_submodule(name)
        if layer.rank == 0:
            assert type(short) is nn.Linear and torch.equal(short.weight, layer.base.weight)
            continue
        live = layer.mask
        for ours, theirs in ((short.A, layer.A[live]), (short.B, layer.B[:, live]),
                             (short.c, layer.c[live])):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_compaction_keeps_parameter_groups():
    """Several groups with their own settings  keep the same Parameter
    objects; those of emptied matrices hold no numbers and are never stepped."""
    config = net_config(rank=1, start_rank=2, interval=2, **EXACT)
    model, layers = adapted(config)
    pruner = Pruner(layers, config, 20)

    def parts(layers):
        return [[layer.A for layer in layers], [p for layer in layers for p in (layer.B, layer.c)],
                list(model.head.parameters())]
    optimizer = torch.optim.AdamW([
        {"params": params, "lr": lr} for params, lr in zip(parts(layers.values()), (.1, .01, .2))])
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for _ in range(20):
        feed(pruner, [0., 0, 9, 8, 7, 1, 0, 0, 6, 5, 4, 1])
    compact_(model, optimizer)
    left = [layer for layer in model.modules() if isinstance(layer, DoRALinear)]
    groups = optimizer.param_groups
    assert len(left) == 4 and [group["lr"] for group in groups] == [.1, .01, .2]
    assert [[id(p) for p in group["params"]] for group in groups] == before
    for group, params in zip(groups, parts(left), strict=True):
        assert [id(p) for p in group["params"] if p.numel()] == [id(p) for p in params]
    model(inputs()).sum().backward()
    optimizer.step()


def test_before_the_last_pruning(tmp_path):
    """Without any step, and after 8 of 40, compact_, merge_ and save_adapter are an error that says
    what is missing; the model stays as it is and nothing is written."""
    config = net_config(rank=1, start_rank=2)
    model, layers = adapted(config)
    _, step = trainer(model, Pruner(layers, config, 40))
    for _ in range(2):
        for call in (compact_, merge_, lambda model: save_adapter(model, tmp_path / "adapter")):
            with pytest.raises(DoRAError, match="last pruning"):
                call(model)
        for _ in range(8):
            step()
    assert all(len(layer.c) == 2 for layer in layers.values())
    assert model.layer[0].up is layers["layer.0.up"] and not (tmp_path / "adapter").exists()


def test_between_an_optimizer_step_and_pruner_step(tmp_path):
    """In the final phase, after optimizer.step() moved a closed gate: an error that names the layer
    and the call, since dropping the component would change the output."""
    model, layers, _ = trained(net_config(rank=1, start_rank=2))
    name, layer = next((name, layer) for name, layer in layers.items() if layer.rank < 2)
    layer.c.data[~layer.mask] = 0.1
    for call in (compact_, merge_, lambda model: save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(DoRAError, match=rf"{name}.*pruner\.step\(\)"):
            call(model)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_component_that_is_not_finite_after_the_last_pruning(method, tmp_path):
    """The final phase has no pruning that would look at the scores: compact_, merge_ and
    save_adapter, before and after compaction, name the layer and write nothing."""
    model, layers, _ = trained(net_config(rank=2, **METHODS[method] | dict(dropout=0.0)))
    layer = layers["layer.1.up"]
    for compacted in (False, True):
        value = layer.B.data[0, -1].clone()
        for bad in (float("nan"), float("inf")):
            layer.B.data[0, -1] = bad
            for call in (compact_, merge_, lambda model: save_adapter(model, tmp_path / "adapter")):
                with pytest.raises(NotFiniteError, match=r"layer\.1\.up"):
                    call(model)
        layer.B.data[0, -1] = value
        compact_(model)
    assert not (tmp_path / "adapter").exists()
    save_adapter(model, tmp_path / "adapter")


# ---- the paper's own form against its authors' algorithm ----------------------------------------

class Authors:
    """What the authors' code does after each optimizer step, one component at a time, from the
    facts in their paper and code; penalty(), observe() and step() as a Pruner's, for the same
    training loop.

    One thing is ours: exactly `number` components are closed, the later position first where scores
    tie (theirs closes all that tie with the worst, and one where none is due).

    Their step index counts from 0 and ours from 1: their index t is our step t, and their index 0
    sees the model before training. All c are 0 there, so are all scores, and nothing changes. With
    T = 300 all phases are whole steps, and the two agree step by step.
    """

    def __init__(self, layers, config, total):
        self.layers, self.config, self.T = list(layers.values()), config, total
        self.smoothed = [[0.0] * len(layer.c) for layer in self.layers]
        self.mask = [[1.0] * len(layer.c) for layer in self.layers]
        self.t = 0
        self.after_step()

    def penalty(self):                        # until pruning ends, as ours
        return self.config.eta * dem_penalty(self.layers) if self.t <= self.T * 0.5 else 0.0

    def observe(self):
        pass

    def step(self):
        self.after_step()

    def after_step(self):
        p, P = int(self.t - self.T * 0.15), int(self.T * (1 - 0.15 - 0.5))
        self.t += 1
        if p > P:
            for layer, mask in zip(self.layers, self.mask, strict=True):
                for i, keep in enumerate(mask):
                    layer.c.data[i] *= keep
            return
        for layer, smoothed in zip(self.layers, self.smoothed, strict=True):
            parts = [c * torch.outer(layer.B[:, i], layer.A[i]) for i, c in enumerate(layer.c)]
            norm = sum(parts).norm() + 1e-8
            for i, part in enumerate(parts):
                smoothed[i] = 0.9 * smoothed[i] + 0.1 * (part.norm() / norm).item()
        if p >= 0 and (p % self.config.interval == 0 or p == P):
            r_prime, r = len(self.layers[0].c), self.config.rank
            everyone = [(s, -i, -j) for i, smoothed in enumerate(self.smoothed)
                        for j, s in enumerate(smoothed)]
            number = int(len(everyone) * ((r_prime - r) / r_prime) * (p / P) ** 3)
            self.mask = [[1.0] * r_prime for _ in self.layers]
            for _, i, j in sorted(everyone)[:number]:
                self.mask[-i][-j] = 0.0
                self.layers[-i].c.data[-j] = 0.0


def test_the_papers_form_follows_the_authors_algorithm():
    """300 steps of two equal runs with AdamW, `paper` and the class above: after every step the
    same gates are 0, and at the end all weights are equal to 1e-9."""
    config = net_config(**METHODS["paper"] | dict(
        rank=2, start_rank=3, dropout=0.0, interval=10, targets=("query", "down")))
    ours, layers = adapted(config)
    theirs, twins = adapted(config)
    pruner = Pruner(layers, config, 300)
    _, step = trainer(ours, pruner)
    _, their_step = trainer(theirs, Authors(twins, config, 300))
    changes = 0
    before = gates(layers).ne(0)
    for t in range(1, 301):
        step()
        their_step()
        now = gates(layers).ne(0)
        assert torch.equal(now, gates(twins).ne(0)), t
        changes += int((now != before).any())
        before = now
    assert changes > 5 and sum(pruner.ranks().values()) == 8
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

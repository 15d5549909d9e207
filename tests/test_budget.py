"""dora.py: how many components stay (Eq. 9, AdaLoRA's curve) and which (keep_mask)."""
import math
import random
from fractions import Fraction

import pytest
import torch
from small import Training, adapted, net_config, numbers, plain, refused

from dora import Pruner, budget, compact_, cost, inject, keep_mask

SLOW, FAST = "slow_first", "fast_first"


def curve(schedule, rank, start_rank, n_layers, total, **changes):
    """b(0), ..., b(T)."""
    config = net_config(schedule=schedule, rank=rank, start_rank=start_rank, **changes)
    return [budget(t, total, config, n_layers) for t in range(total + 1)]


@pytest.mark.parametrize("schedule, window", [
    # b0 = 24, bT = 12; slow first: 24 - 12 p^3, 12/64 = .19, 12/8 = 1.5, 12 * 27/64 = 5.06
    (SLOW, [24, 23, 19, 12]),
    # fast first: 12 + 12 (1 - p)^3, the same numbers upside down; fractions of a component go
    (FAST, [17, 13, 12, 12])])
def test_eq9_by_hand(schedule, window):
    """T = 16, first quarter initial, last half final: four steps of pruning worked out by hand."""
    b = curve(schedule, 2, 4, 6, 16, initial_phase=0.25, final_phase=0.5)
    assert b[:5] == [24] * 5
    assert b[5:9] == window
    assert b[9:] == [12] * 8


@pytest.mark.parametrize("schedule", [SLOW, FAST])
def test_eq9_against_exact_fractions(schedule):
    """100 random cases: b(t) starts at r'L, never rises, ends at rL, and is the exact cubic rounded
    up (slow first) or down (fast first; where the cubic is whole, floats may add one)."""
    rng = random.Random(0)
    for _ in range(100):
        total, n_layers = rng.randint(20, 300), rng.randint(1, 80)
        rank = rng.choice([0.5, 1, 1.5, 2, 3, 8])
        start_rank = int(rank + 1) + rng.randint(0, 5)
        initial = rng.choice([0, 0.1, 0.15, 0.3])
        final = rng.choice([0, 0.2, 0.5, 0.6])
        b = curve(schedule, rank, start_rank, n_layers, total,
                  initial_phase=initial, final_phase=final)
        b_0, b_T = start_rank * n_layers, round(rank * n_layers)
        first, last = round(initial * total), total - round(final * total)
        assert b == sorted(b, reverse=True)
        assert b[0] == b[first] == b_0
        assert b[last] == b[total] == b_T
        for t in range(first, last + 1):
            p = Fraction(t - first, last - first)
            if schedule == SLOW:
                exact = b_0 - (b_0 - b_T) * p**3
                assert exact <= b[t] <= exact + 1
            else:
                exact = b_T + (b_0 - b_T) * (1 - p)**3
                assert exact - 1 <= b[t] <= exact


@pytest.mark.parametrize("changes, total, names", [
    (dict(initial_phase=0.5), 100, "initial_phase = 0.5.*final_phase = 0.5"),
    (dict(initial_phase=0.8), 100, "initial_phase = 0.8.*final_phase = 0.5"),
    ({}, 0, "total_steps = 0"),
    # a whole number: with 12.5 steps the last pruning, at step 6.5, would never come
    ({}, 12.5, "total_steps = 12.5")])
def test_runs_without_a_step_to_prune_in(changes, total, names):
    """The Pruner, before any training, names both phases, or the number of steps."""
    refused(names, Pruner, {}, net_config(**changes), total)


def test_keep_mask_with_costs_by_hand():
    """Falling scores 9, 8, 7, 6 that cost 5, 4, 3, 1: within 8 the first stays, the second does not
    fit into the 3 that are left, the third does, and nothing is left for the fourth."""
    scores, costs = numbers("7 9 6 8"), numbers("3 5 1 4").long()
    rooms = {8: "1 1 0 0", 9: "0 1 0 1", 0: "0 0 0 0", 13: "1 1 1 1"}
    for room, kept in rooms.items():
        assert keep_mask(scores, costs, room).equal(numbers(kept).bool())


@pytest.mark.parametrize("prices", [[1], [3, 5, 12]])
def test_keep_mask_against_its_definition(prices):
    """200 random vectors with ties: in the order of sorted (score, position) pairs each one stays
    that fits; these are the k best if costs are equal, and otherwise no dropped one would fit."""
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 60)
        values = range(rng.choice([1, 2, 4, 51]))
        scores = rng.choices(values, k=n)
        costs = rng.choices(prices, k=n)
        room = left = rng.randint(0, sum(costs))
        expected = [False] * n
        for i in sorted(range(n), key=lambda i: -scores[i]):  # sorted() is stable
            if costs[i] <= left:
                expected[i] = True
                left -= costs[i]
        mask = keep_mask(torch.tensor(scores).double(), torch.tensor(costs), room)
        assert mask.tolist() == expected
        if prices == [1]:
            assert sum(expected) == room
        dropped = [cost for cost, kept in zip(costs, expected) if not kept]
        assert left < min(dropped, default=math.inf)


def test_a_component_costs_what_the_adapter_file_stores_for_it():
    """One component of a (d_out, d_in) matrix costs d_in + d_out, or 1 in components."""
    linear = torch.nn.Linear(5, 8)
    config = net_config(budget_unit="parameters")
    assert cost(linear, config) == 13
    assert cost(linear, net_config()) == 1
    _, layers = adapted(config)
    pruner = Pruner(layers, config, 100)  # per block: 5 x 5, 8 x 5, 5 x 8
    assert pruner.per_rank == 2 * (10 + 13 + 13)
    assert pruner.costs.tolist() == 2 * (3 * [10] + 6 * [13])


@pytest.mark.parametrize("rank, start_rank", [(0.5, 1), (1.5, 3)])
@pytest.mark.parametrize("schedule", [SLOW, FAST])
def test_a_run_in_parameters_ends_at_the_size_of_lora(rank, start_rank, schedule):
    """A whole run: after every pruning the live components cost at most b(t) and fall short of it
    by less than one; at the end that is LoRA's size, and as many numbers are in the layers."""
    training = Training(net_config(rank=rank, start_rank=start_rank, schedule=schedule, interval=4,
                                   budget_unit="parameters"))
    pruner, spent = training.pruner, None
    for t in range(1, 41):
        training.step()
        if t in (10, 14, 18, 20):
            spent = int(pruner.costs[pruner.mask].sum())
            b_t = budget(t, 40, pruner.config, pruner.per_rank)
            assert b_t - 13 < spent <= b_t
    assert spent <= rank * pruner.per_rank
    compact_(training.model)
    stored = 0
    for layer in training.layers.values():
        stored += layer.A.numel() + layer.B.numel()
    assert spent == stored


@pytest.mark.parametrize("unit", ["parameters", "components"])
def test_a_rank_too_small_for_one_component(unit):
    """rank 0.01 over six matrices: refused by inject, in either unit."""
    refused("rank = 0.01", inject, plain(), net_config(rank=0.01, start_rank=1, budget_unit=unit))


def test_the_scale_of_a_fraction_of_a_rank():
    """alpha / max(1, r): below rank 1, what is left has LoRA's scale at rank 1."""
    for rank, scale in ((0.25, 8), (1, 8), (4, 2)):
        _, layers = adapted(net_config(rank=rank, alpha=8.0))
        assert layers["layer.0.up"].scale == scale

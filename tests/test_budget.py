"""dora.py: how many components stay (Eq. 9, AdaLoRA's curve) and which (keep_mask)."""
import random
from fractions import Fraction

import pytest
import torch
from small import adapted, net_config, trainer

from dora import METHODS, DoRAError, Pruner, budget, compact_, cost, keep_mask

SLOW, FAST = "slow_first", "fast_first"


def curve(schedule, rank, start_rank, n_layers, total, **changes):
    """b(0), ..., b(T)."""
    config = net_config(schedule=schedule, rank=rank, start_rank=start_rank, **changes)
    return [budget(t, total, config, n_layers) for t in range(total + 1)]


def top(scores, k):
    """keep_mask with equal costs and room for k components."""
    return keep_mask(scores, torch.ones(len(scores), dtype=torch.long), k)


# ---- Eq. 9 --------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule, window", [
    # b0 = 24, bT = 12; slow first: 24 - 12 p^3, 12/64 = .19, 12/8 = 1.5, 12 * 27/64 = 5.06
    (SLOW, [24, 23, 19, 12]),
    # fast first: 12 + 12 (1 - p)^3, the same numbers upside down; fractions of a component go
    (FAST, [17, 13, 12, 12])])
def test_eq9_by_hand(schedule, window):
    """T = 16, first quarter initial, last half final: four steps of pruning worked out by hand."""
    b = curve(schedule, 2, 4, 6, 16, initial_phase=0.25, final_phase=0.5)
    assert b == [24] * 5 + window + [12] * 8


@pytest.mark.parametrize("schedule, means", [(SLOW, [11.94, 11.5, 10.3]), (FAST, [9.7, 8.5, 8.06])])
def test_eq9_has_the_papers_numbers(schedule, means):
    """r' 12 -> r 8 over 72 matrices: the mean rank at 1/4, 1/2, 3/4 of the window equals shared
    notes' numbers. The paper's curve prunes late, AdaLoRA's early."""
    b = curve(schedule, 8, 12, 72, 800)                  # the window is 120..400
    assert [b[t] / 72 for t in (190, 260, 330)] == pytest.approx(means, abs=0.02)


@pytest.mark.parametrize("schedule", [SLOW, FAST])
def test_eq9_against_exact_fractions(schedule):
    """100 random cases: every b(t) is the exact cubic, rounded to a whole component (slow first:
    up, fast first: down; where the cubic is whole, floats may add one); it starts at r'L, ends at
    rL, never rises."""
    rng = random.Random(0)
    for _ in range(100):
        total, n_layers = rng.randint(20, 300), rng.randint(1, 80)
        rank = rng.choice([0.5, 1, 1.5, 2, 3, 8])
        start_rank = int(rank + 1) + rng.randint(0, 5)
        initial, final = rng.choice([0, 0.1, 0.15, 0.3]), rng.choice([0, 0.2, 0.5, 0.6])
        b = curve(schedule, rank, start_rank, n_layers, total,
                  initial_phase=initial, final_phase=final)
        b_0, b_T = start_rank * n_layers, round(rank * n_layers)
        first, last = round(initial * total), total - round(final * total)
        assert b[:first + 1] == [b_0] * (first + 1) and b[last:] == [b_T] * (total - last + 1)
        assert b == sorted(b, reverse=True)
        for t in range(first, last + 1):
            p = Fraction(t - first, last - first)
            if schedule == SLOW:
                exact = b_0 - (b_0 - b_T) * p**3
                assert exact <= b[t] < exact + 1 or b[t] == exact + 1
            else:
                exact = b_T + (b_0 - b_T) * (1 - p)**3
                assert exact - 1 < b[t] <= exact or b[t] == exact - 1


def test_a_rank_that_is_not_pruned():
    """Without a schedule, or with start_rank = rank, every b(t) is r L."""
    assert set(curve(None, 2, 2, 6, 50, importance=None)) == {12}
    assert set(curve(SLOW, 2, 2, 6, 50)) == {12}


@pytest.mark.parametrize("changes", [dict(initial_phase=0.5), dict(initial_phase=0.8)])
def test_phases_that_leave_no_step_to_prune_in(changes):
    """The budget and the Pruner, before any training, name both phases."""
    config = net_config(**changes)
    for call in (lambda: budget(1, 100, config, 6), lambda: Pruner({}, config, 100)):
        with pytest.raises(DoRAError, match="initial_phase = .*final_phase = 0.5"):
            call()


@pytest.mark.parametrize("total", [0, -5, 12.5, True])
def test_steps_that_are_not_a_whole_number(total):
    """With 12.5 steps the last pruning, at step 6.5, would never come."""
    with pytest.raises(DoRAError, match=f"total_steps = {total}|{total} steps"):
        Pruner({}, net_config(), total)


# ---- which components ---------------------------------------------------------------------------

def test_keep_mask_by_hand():
    """The k highest stay; of equals the first position; with all equal the first k."""
    scores = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.0])
    assert top(scores, 1).tolist() == [False, True, False, False, False]
    assert top(scores, 2).tolist() == [False, True, False, True, False]
    assert top(scores, 4).tolist() == [True, True, True, True, False]
    assert top(torch.zeros(5), 3).tolist() == [True, True, True, False, False]
    assert top(scores, 0).sum() == 0 and top(scores, 5).all()


def test_keep_mask_keeps_exactly_k():
    """300 random vectors with many ties: k are kept, none lower than a dropped one, and of the tied
    scores at the border the first ones, as sorting (score, position) pairs says."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 60)
        scores = [rng.randint(0, rng.choice([0, 1, 3, 50])) / 4 for _ in range(n)]
        k = rng.randint(0, n)
        best = sorted(range(n), key=lambda i: (-scores[i], i))[:k]
        mask = top(torch.tensor(scores, dtype=torch.float64), k)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [i in set(best) for i in range(n)]


# ---- a budget in parameters ---------------------------------------------------------------------

def test_a_component_costs_what_the_adapter_file_stores_for_it():
    """One component of a (d_out, d_in) matrix costs d_in + d_out, or 1 in components; b(T) is r
    times the cost of one in every matrix, which is the size of LoRA of rank r."""
    parameters, components = net_config(budget_unit="parameters"), net_config()
    linear = torch.nn.Linear(5, 8)
    assert (cost(linear, parameters), cost(linear, components)) == (13, 1)
    _, layers = adapted(parameters)  # per block: 5 x 5, 8 x 5, 5 x 8
    pruner = Pruner(layers, parameters, 100)
    assert pruner.per_rank == 2 * (10 + 13 + 13) and pruner.costs.tolist() == [
        *[10] * 3, *[13] * 6, *[10] * 3, *[13] * 6]
    lora = adapted(net_config(**METHODS["lora"], rank=2))[1]
    assert budget(100, 100, parameters, pruner.per_rank) == sum(
        m.A.numel() + m.B.numel() for m in lora.values())


def test_keep_mask_with_costs_by_hand():
    """Falling scores 9, 8, 7, 6 that cost 5, 4, 3, 1: within 8 the first stays, the second does not
    fit into the 3 that are left, the third does, and nothing is left for the fourth."""
    scores, costs = torch.tensor([7.0, 9.0, 6.0, 8.0]), torch.tensor([3, 5, 1, 4])
    assert keep_mask(scores, costs, 8).tolist() == [True, True, False, False]
    assert keep_mask(scores, costs, 9).tolist() == [False, True, False, True]
    assert keep_mask(scores, costs, 0).tolist() == [False] * 4
    assert keep_mask(scores, costs, 13).all()


def test_keep_mask_fills_the_budget():
    """100 random scores and costs: the sum of what is kept is at most the budget and falls short by
    less than one component; whatever was dropped no longer fitted beside the better ones."""
    rng = random.Random(0)
    for _ in range(100):
        n = rng.randint(1, 40)
        scores = torch.tensor([float(rng.randint(0, 9)) for _ in range(n)])
        costs = torch.tensor([rng.choice([3, 5, 12]) for _ in range(n)])
        room = rng.randint(0, int(costs.sum()) + 3)
        mask = keep_mask(scores, costs, room)
        spent = int(costs[mask].sum())
        assert spent <= room
        if not mask.all():
            assert room - spent < int(costs[~mask].min())
        for i in (~mask).nonzero()[:, 0].tolist():
            better = [j for j in range(n) if mask[j] and (-scores[j], j) < (-scores[i], i)]
            assert room - sum(int(costs[j]) for j in better) < int(costs[i])


@pytest.mark.parametrize("rank, start_rank", [(1, 2), (0.5, 1), (1.5, 3), (2, 3)])
@pytest.mark.parametrize("schedule", [SLOW, FAST])
def test_a_run_in_parameters_ends_at_the_size_of_lora(rank, start_rank, schedule):
    """A whole run: after every pruning the live components cost at most b(t) and fall short of it
    by less than one component; at the end that is LoRA's size, and the adapter file holds as many
    numbers as were counted."""
    config = net_config(rank=rank, start_rank=start_rank, schedule=schedule, interval=4,
                        budget_unit="parameters")
    model, layers = adapted(config)
    pruner, total = Pruner(layers, config, 40), 40
    _, step = trainer(model, pruner)
    for t in range(1, total + 1):
        step()
        if pruner.first < t <= pruner.last and ((t - pruner.first) % 4 == 0 or t == pruner.last):
            spent = int(pruner.costs[pruner.mask].sum())
            b_t = budget(t, total, config, pruner.per_rank)
            assert b_t - 13 < spent <= b_t
    assert spent <= rank * pruner.per_rank
    compact_(model)
    assert spent == sum(m.A.numel() + m.B.numel() for m in layers.values())


@pytest.mark.parametrize("unit", ["parameters", "components"])
def test_a_rank_too_small_for_one_component(unit):
    """rank 0.01 over six matrices: refused by inject, in either unit."""
    with pytest.raises(DoRAError, match="rank = 0.01"):
        adapted(net_config(rank=0.01, start_rank=1, budget_unit=unit))


@pytest.mark.parametrize("rank, scale", [(0.25, 8), (0.5, 8), (1, 8), (2, 4), (4, 2)])
def test_the_scale_of_a_fraction_of_a_rank(rank, scale):
    """alpha / max(1, r): below rank 1, what is left has LoRA's scale at rank 1."""
    _, layers = adapted(net_config(rank=rank, alpha=8.0))
    assert {layer.scale for layer in layers.values()} == {scale}

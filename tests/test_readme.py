"""The README is true: its tables, its list of differences and its code."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import data
import dora
import train_glue

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())  # line breaks may fall anywhere


def blocks(language):
    """The README's blocks, but for the one with transformers, which tests/peers runs."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return [code for code in found if "import GPT2Config" not in code]


def test_length_and_first_command():
    """The page has at most 220 lines, and the first command stands in its first 12."""
    assert len(TEXT.splitlines()) <= 220
    assert TEXT.split("\n").index("python train_glue.py") + 1 <= 12


def test_each_equation_has_its_function_and_its_test():
    """Rows of the table, compared with dora.py and with the text of the test files."""
    table = TEXT.split("| equation | meaning | code | test |\n")[1].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", row.strip("|")) for row in table.strip().split("\n")[1:]]
    assert len(rows) >= 7
    for equation, _, functions, test in rows:
        source = (ROOT / test.strip().strip("`")).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", functions):
            assert name in source, f"{equation}: {test} does not test {name}"
            assert callable(getattr(dora, name))


def test_list_of_differences():
    """Lines that begin `# differs:` in the source, compared with the README's list."""
    found = [match for name in ("dora.py", "train_glue.py", "data.py") for match in re.findall(
        r"# differs: (.*)", (ROOT / name).read_text(encoding="utf-8"))]
    assert len(found) >= 4
    listed = re.findall(r"^- `differs`: (.*)$", TEXT, re.MULTILINE)
    assert listed == found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    """Each Python block of the README, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TASKS", data.TASKS)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        data.TASKS.pop("mine", None)


def test_the_printed_map(tmp_path, monkeypatch, capsys):
    """What the README's own-model block prints, compared with the map below it."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert f"```\n{capsys.readouterr().out}```" in TEXT


def test_shell_blocks_name_what_exists():
    """Flags and files in the shell blocks, compared with --help and the checkout."""
    usage = subprocess.run([sys.executable, "train_glue.py", "--help"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout
    shell = "\n".join(blocks("sh"))
    assert "train_glue.py" in shell
    for flag in re.findall(r"--[a-z-]+", shell.replace("torchrun --nproc_per_node=2", "")):
        assert f"{flag} " in usage, flag
    for name in re.findall(r"\S+\.(?:py|txt)", shell):
        assert (ROOT / name).exists()


def test_own_task_trains(tmp_path):
    """The README's row of TASKS with a TSV of one's own: trained and scored like any other."""
    import train_glue
    exec(blocks("python")[1], {})
    bpe = data.write_toy(tmp_path, tmp_path / "model")
    tiny = train_glue.RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=32)
    train_glue.save_model(train_glue.RobertaForSequenceClassification(tiny, 2), tmp_path / "model")
    (tmp_path / "mine").mkdir()
    for split in ("train", "dev"):
        rows = "".join(f"{i}\tthe king number {i}\t{('bad', 'good')[i % 2]}\n" for i in range(40))
        (tmp_path / "mine" / f"{split}.tsv").write_text("id\treview\tstars\n" + rows)
    try:
        config = train_glue.make_config("mine", data_dir=str(tmp_path), max_len=32, epochs=3,
                                        model_dir=str(tmp_path / "model"), interval=1,
                                        out=str(tmp_path / "run"))
        result = train_glue.train(config)
    finally:
        data.TASKS.pop("mine", None)
    assert result["steps"] == 9 and 0 <= result["best"]["accuracy"] <= 1
    lora = 2 * sum((16 + 16) * 4 + (16 + 32) * 2 for _ in range(2))  # of rank 2, on both layers
    assert lora - 48 < result["adapter_parameters_after_pruning"] <= lora


LOG = (ROOT / "benchmarks/results/budget_curve.jsonl").read_text(encoding="utf-8")
RUNS = sorted(map(json.loads, LOG.splitlines()), key=lambda run: run["seed"])


def on_dev(task, row, lr):
    """Return the recorded runs of a row on dev, by rising seed."""
    return [run for run in RUNS
            if (run["task"], run["split"], run["row"], run["lr"]) == (task, "dev", row, lr)]


def recorded(task, row, lr):
    """Return a row's dev scores by rising seed, and the most that one of its runs stores."""
    found = on_dev(task, row, lr)
    assert [run["seed"] for run in found] == [1, 2, 3], (task, row)
    assert not any(run["collapsed"] for run in found), (task, row)
    return ([run["best"] for run in found],
            max(run["adapter"] or run["trainable"] - run["head"] for run in found))


SCORED = ("stsb", "mrpc", "cola")
RATES = {  # of the table's rows, on STS-B, MRPC and CoLA, as RESULTS.md has them
    "dora 0.5": (2e-3, 2e-3, 1e-3), "dora 1": (2e-3, 5e-4, 5e-4), "lora 1": (4e-3, 2e-3, 5e-4),
    "dora 2": (2e-3, 5e-4, 5e-4), "lora 2": (4e-3, 2e-3, 5e-4), "full": (2e-4, 2e-4, 1e-4)}


def test_table_of_results():
    """Medians and sizes, compared with the recorded runs of three seeds."""
    stsb, mrpc, cola = ({row: recorded(task, row, rates[i]) for row, rates in RATES.items()}
                        for i, task in enumerate(SCORED))
    for title, cells in (
            ("", (row.replace("0.5", "1/2") for row in RATES)),
            ("adapter parameters",
             (f"{max(runs[row][1] for runs in (stsb, mrpc, cola)):,}" for row in RATES)),
            ("STS-B, Pearson", (f"{median(scores):.4f}" for scores, _ in stsb.values())),
            ("MRPC, accuracy", (f"{median(scores):.4f}" for scores, _ in mrpc.values())),
            ("CoLA, Matthews", (f"{median(scores):.4f}" for scores, _ in cola.values()))):
        line = "|".join(["", *(f" {cell} " if cell else " " for cell in (title, *cells)), ""])
        assert line in TEXT.split("\n"), line

    apart, spread = [], {}  # what the text says of dora and LoRA at ranks 1 and 2
    for task, runs in zip(SCORED, (stsb, mrpc, cola)):
        for rank in (1, 2):
            (dora, size), (lora, lora_size) = runs[f"dora {rank}"], runs[f"lora {rank}"]
            lead = median(dora) - median(lora)
            most = max(max(dora) - min(dora), max(lora) - min(lora))
            assert size <= lora_size and lead > 0
            if min(dora) > max(lora):
                apart.append((task, rank))
            else:  # the seeds of a row differ by more than the medians
                assert lead < most
                spread[task] = max(most, spread.get(task, 0))
    assert apart == [("stsb", 2), ("mrpc", 1), ("mrpc", 2)]
    assert "by up to {stsb:.3f} on STS-B and {cola:.3f} on CoLA".format(**spread) in WORDS
    for task, runs in (("stsb", stsb), ("mrpc", mrpc)):
        assert 8 * recorded(task, "dora 0.25", 2e-3)[1] <= runs["lora 2"][1]


def test_scores_in_the_text():
    """The other scores, compared with the recorded runs of three seeds."""
    quarter = recorded("mrpc", "dora 0.25", 2e-3)[0]
    stsb = {name: recorded("stsb", row, rate) for name, row, rate in (
        ("qv", "lora qv 1", 4e-3), ("quarter", "dora 0.25", 2e-3), ("bitfit", "bitfit", 8e-3),
        ("same", "same ranks, fixed from the start, 0.5", 4e-3),
        ("shuffled", "same ranks, shuffled over matrices of one shape, 0.5", 4e-3))}
    middle = {name: f"{median(scores):.4f}" for name, (scores, _) in stsb.items()}
    size = {name: f"{size:,}" for name, (_, size) in stsb.items()}
    pairs = [pair for task, own, other in (("stsb", 2e-3, 4e-3), ("mrpc", 5e-4, 2e-3)) for pair in
             zip(recorded(task, "dora 4", own)[0], recorded(task, "lora 4", other)[0])]
    even = f"{sum(dora > lora for dora, lora in pairs)} of {len(pairs)}"
    dropout = recorded("mrpc", "lora 2 at dora's rate, dropout on A x", 5e-4)[0]
    for words in (
            f"At rank 4 they are even ({even} seeds)",
            f"has {median(quarter):.4f} on MRPC and {middle['quarter']} on STS-B",
            f"LoRA on query and value ({size['qv']} parameters) has {middle['qv']}",
            f"there {size['bitfit']} biases alone (BitFit) reach {middle['bitfit']}",
            f"chose at rank 1/2 has {middle['same']}, in shuffled ones {middle['shuffled']}.",
            f"dropout on A x: LoRA with it has {median(dropout):.4f} at rank 2"):
        assert words in WORDS, words

def test_the_spread_of_a_collapsed_model():
    """The limit of train_glue and the spreads on both sides of it, compared with collapse.py's
    recorded runs."""
    text = " ".join((ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split())
    lines = (ROOT / "benchmarks/results/collapse.jsonl").read_text(encoding="utf-8").splitlines()
    spreads = [json.loads(line)["spread"] for line in lines]
    below = max(spread for spread in spreads if spread < train_glue.COLLAPSED)
    above = min(spread for spread in spreads if spread >= train_glue.COLLAPSED)
    assert (f"is {below:.4f} or less in the runs that collapsed and {above:.4f} or more in all "
            f"others; the limit is {train_glue.COLLAPSED} ") in text


def test_language_model():
    """The losses per token at rank 2, their order with each seed and BLEU, compared with the
    recorded runs."""
    lines = (ROOT / "benchmarks/results/language_model.jsonl").read_text("utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if run["split"] == "test"]
    runs.sort(key=lambda run: run["seed"])
    rows = [[run for run in runs if run["row"] == row] for row in ("dora 2", "lora 2", "adalora 2")]
    assert [[run["seed"] for run in row] for row in rows] == [[1, 2, 3]] * 3
    lora_size = rows[1][0]["parameters"]
    assert all(0.999 * lora_size < run["parameters"] <= lora_size for row in rows for run in row)
    losses = [[run["nll"] for run in row] for row in rows]
    assert all(dora < lora < adalora for dora, lora, adalora in zip(*losses))
    most = max(max(three) - min(three) for three in losses)
    (bleu,) = {f"{median(run['bleu'] for run in row):.0f}" for row in rows}  # one for all
    for words in (
            "per token is {:.3f} (`dora`), {:.3f} (LoRA) and {:.3f} (AdaLoRA)".format(
                *map(median, losses)),
            f"the seeds of one row differ by up to {most:.3f}; BLEU is {bleu} with all"):
        assert words in WORDS, words


def test_the_length_of_the_first_command():
    """Steps of `--task cola`: the train set in batches, times the epochs of Table 8. Hours: times
    the recorded milliseconds of a step of that shape."""
    config = train_glue.make_config("cola")
    steps = math.ceil(8551 / config.batch_size) * config.epochs
    recorded = json.loads((ROOT / "benchmarks/results/step_time.json").read_text(encoding="utf-8"))
    ms = next(case["rows"]["dora"]["ms"] for case in recorded
              if case["model"].startswith("RoBERTa-base") and case["width"] == 16)
    assert f"trains {steps:,} steps: about {steps * ms / 3.6e6:.0f} hours of one CPU core" in WORDS


def test_the_stsb_run_is_on_record():
    """Command, score and size of the README's run on STS-B, compared with its recorded runs: one
    thread and two."""
    record = json.loads((ROOT / "benchmarks/results/readme_stsb.json").read_text(encoding="utf-8"))
    assert record["command"] in WORDS
    first = [run for run in record["runs"] if run["seed"] == 1]
    assert [run["threads"] for run in first] == [1, 2]
    for run in first:
        assert f"reaches Pearson {run['pearson']:.4f} (seed 1, one thread or two)" in WORDS
        assert f"{run['parameters']:,}" in WORDS and not run["collapsed"]


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_to_files(page):
    """Relative links and images of both pages, compared with the checkout."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links or page != "README.md"
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link

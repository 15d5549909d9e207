"""The README: its code runs, its commands exist, and its numbers are those of the logs."""
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from tiny import json_lines

import data
import dora
import train_glue

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
WORDS = " ".join(TEXT.split())  # line breaks may fall anywhere
RESULTS = ROOT / "benchmarks/results"


def blocks(language):
    """The README's blocks of code in one language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_length_and_first_command():
    """The page has at most 220 lines, and the first command is in its first 12."""
    assert len(TEXT.splitlines()) <= 220
    assert TEXT.split("\n").index("python train_glue.py") < 12


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "notebooks/RECIPES.md"])
def test_links_lead_to_files(page):
    """Relative links and images, compared with the checkout."""
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


def test_each_equation_has_its_function_and_its_test():
    """Rows of the table, compared with dora.py and with the text of the test files."""
    table = TEXT.split("| equation | meaning | code | test |\n")[1].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", row.strip("|")) for row in table.split("\n")[1:]]
    assert len(rows) == 7
    for equation, _, function, test in rows:
        name = function.strip(" `")
        assert callable(getattr(dora, name)), equation
        assert name in (ROOT / test.strip()).read_text("utf-8"), equation


def test_list_of_differences():
    """Lines that begin `# differs:` in the source, compared with the README's list."""
    found = [line for name in ("dora.py", "train_glue.py", "data.py") for line in re.findall(
        r"# differs: (.*)", (ROOT / name).read_text("utf-8"))]
    listed = TEXT.split("begins with `# differs:`.\n")[1].split("\n\n")[0]
    assert [line.removeprefix("- ") for line in listed.split("\n")] == found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    """Each Python block, run in an empty folder; what it prints is in the block below it."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    below = TEXT.split(code)[1].removeprefix("```\n\n")
    assert not printed or below.startswith(f"```\n{printed}```")


def test_own_task_trains(tmp_path, monkeypatch):
    """The row of TASKS in RECIPES.md with one's own TSV files: trained and scored."""
    monkeypatch.setitem(data.TASKS, "mine", None)  # removed afterwards
    recipe = (ROOT / "notebooks/RECIPES.md").read_text("utf-8").split("## A task of")[1]
    exec(re.search(r"```python\n(.*?)```", recipe, re.DOTALL)[1], {})
    bpe = data.write_toy(tmp_path, tmp_path / "model")
    tiny = train_glue.RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=32)
    train_glue.save_model(train_glue.RobertaForSequenceClassification(tiny, 2), tmp_path / "model")
    (tmp_path / "mine").mkdir()
    for split in ("train", "dev"):
        rows = "".join(f"{i}\tthe king number {i}\t{('bad', 'good')[i % 2]}\n" for i in range(40))
        (tmp_path / "mine" / f"{split}.tsv").write_text("id\treview\tstars\n" + rows)
    config = train_glue.make_config("mine", data_dir=str(tmp_path), max_len=32, epochs=3,
                                    model_dir=str(tmp_path / "model"), interval=1,
                                    out=str(tmp_path / "run"))
    result = train_glue.train(config)
    assert result["steps"] == 9 and 0 <= result["best"]["accuracy"] <= 1
    layer = 4 * (16 + 16) + 2 * (16 + 32)
    lora = 2 * 2 * layer  # of rank 2, on both layers
    assert lora - 48 < result["adapter_parameters_after_pruning"] <= lora


def test_commands_name_what_exists():
    """Flags anywhere in the text, compared with --help of the commands; files with the checkout."""
    known = set()
    for words in (["train_glue.py"], ["-m", "pytest", "tests"]):
        text = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, text=True, check=True,
                              capture_output=True).stdout
        known |= {*re.findall(r"--[a-z][a-z-]+", text)}
    ours = re.sub(r"(torchrun --nproc_per_node|pip install torch\S+\s--index-url)", "", TEXT)
    assert {*re.findall(r"--[a-z][a-z-]+", ours)} <= known
    names = re.findall(r"(?:python|-r) ([\w/]+\.(?:py|txt))", WORDS)
    assert {"train_glue.py", "requirements.txt", "benchmarks/make_minilm.py",
            "notebooks/plot_run.py", "notebooks/requirements.txt"} <= {*names}
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_toy(tmp_path, monkeypatch, capsys):
    """The first command's table against the README's: the same rows, scores within 0.03."""
    monkeypatch.chdir(tmp_path)
    assert train_glue.main([]) == 0
    rows = re.compile(r"^ +(-?\d\.\d{3})  (\w.*?)  +[\d,]+$", re.MULTILINE)
    printed, shown = rows.findall(capsys.readouterr().out), rows.findall(TEXT)
    assert len(printed) == len(shown) == 5
    for (found, what), (expected, shown_what) in zip(printed, shown):
        assert what == shown_what
        assert float(found) == pytest.approx(float(expected), abs=0.03), what


def cell(name, row, column, behind=""):
    """One cell of the first table in results/ that has this row behind some words, by column."""
    text = (RESULTS / name).read_text("utf-8")
    text = text[text.index(behind):]
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.split("|")] for line in lines]
    at = [cells[0] for cells in rows].index(row)
    head = next(cells for cells in reversed(rows[:at]) if column in cells)
    return rows[at][head.index(column)]


def test_the_table_of_results():
    """The table, its noise and the counts below it against what the benchmarks wrote."""
    assert (RESULTS / "readme_table.md").read_text("utf-8").strip() in TEXT
    text = " ".join((ROOT / "benchmarks/RESULTS.md").read_text("utf-8").split())
    noise = re.search(r"about 0(.\d+) on stsb, 0(.\d+) on mrpc, 0(.\d+) on cola", text)
    ahead = re.search(r"in (\d+ of \d+) runs at ranks 1 and 2 .*? in (\d+ of \d+) at rank 4", text)
    recovery = (ROOT / "benchmarks/README.md").read_text("utf-8")
    table = recovery.split("| Methods (20 seeds) |")[1].split("\n\n")[0]
    rows = [[part.strip() for part in line.split("|")] for line in table.split("\n")[2:]]
    right = {row[1]: row[-2] for row in rows}
    for words in ("{} on STS-B, {} on MRPC and {} on CoLA".format(*noise.groups()),
                  "ahead in {} runs at ranks 1 and 2, and in {} at rank 4".format(*ahead.groups()),
                  f"nothing is misplaced in {right['dora']} runs (AdaLoRA "
                  f"{right['adalora'].split()[0]}, `paper` {right['paper'].split()[0]})"):
        assert words in WORDS, words


def test_places():
    """What the text says of places, compared with the tables of the benchmarks."""
    columns = ("percentile of dora's places", "p", "lead")
    for words, setting in (("the plan", "300 steps, rate 0.004, float32"),
                           ("fresh seeds", "300 steps, rate 0.002, seeds 4 to 8"),
                           ("four epochs", "1440 steps, all lengths, rate 0.002")):
        _, *found = next(line for line in TEXT.split("\n| ") if words in line).split(" | ")
        for n, numbers in zip((3, 6), found, strict=True):
            row = f"STS-B, {n} components, {setting}"
            share, p, lead = (cell("places.md", row, column).lstrip("+0") for column in columns)
            assert numbers.startswith(f"{share} (p = {p}, lead {lead})"), row
    steps = "components, 300 steps, rate"
    others = [cell("places.md", row, columns[0]).removesuffix(" %") for row in (
        f"MRPC, 6 {steps} 0.002", f"MRPC, 18 {steps} 0.002, float32",
        f"SST-2, 6 {steps} 0.004", f"SST-2, 18 {steps} 0.002, float32")]
    for n, rate in itertools.product((3, 6, 12, 18, 36), ("0.002", "0.004")):
        row = f"STS-B, {n} components, 300 steps, rate {rate}, float32"
        spread, share, p, lead = (cell("places.md", row, name) for name in ("spread", *columns))
        assert rate == "0.004" or f"{share} with {n}" in WORDS
        values = {"percentile": f"{share} (p = {p})", "lead": lead, "spread": spread}
        for name, value in values.items():
            assert cell("../RESULTS.md", str(n), f"{name} at {rate}").strip("*") == value
    text = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    quoted = re.findall(r"^\| ((?:STS-B|MRPC|SST-2), .*?) \|", text, re.MULTILINE)
    assert len(quoted) >= 9
    for row, title in itertools.product(quoted, ("spread", *columns)):
        assert cell("../RESULTS.md", row, title) == cell("places.md", row, title), row
    rows = re.findall(r"^\| (\w+), (0.00\d); (0.00\d) \|", text, re.MULTILINE)
    for (method, at, rate), n in itertools.product(rows, (3, 6, 12)):
        arm = f"{method}'s places" if at == rate else f"places of {method} at {at}"
        head = f"| arms: STS-B, {n} components, 300 steps, rate {rate}, float32 |"
        found = cell("../RESULTS.md", f"{method}, {at}; {rate}", f"{n} components")
        assert found == cell("places.md", arm, "percentile", head), head
    assert len(rows) == 6
    mirrored, swapped, renamed, nothing = (
        cell("surgical.md", "its places minus shuffled", shift).split(",")[0].removesuffix(" of 20")
        for shift in ("mirrored", "swapped", "renamed", "placebo"))
    ada, own = (
        cell("surgical.md", arm, "mirrored").split(" ")[0] for arm in ("adalora", "dora"))
    lower = sum(cell("../README.md", f"dora's places 1/7 minus random 1/7 {x}", "nll").count("-")
                for x in "abc")  # the likelihood of a language model
    for words in ("{} and {} % on MRPC, {} and {} % on SST-2".format(*others),
                  f"mirrored, {ada} % against {own} %",
                  f"{mirrored} of 20 seeds on mirrored digits, {swapped} with swapped pixels, "
                  f"{renamed} with renamed classes, {nothing} on unchanged ones",
                  f"they beat {lower} of 9 random"):
        assert words in WORDS, words


def test_speed():
    """Time (with MKL and with oneDNN) and memory over PEFT's LoRA against the recorded runs."""
    cases = json.loads((RESULTS / "step_time.json").read_text("utf-8"))
    times, memory = [], []
    for model in ("MiniLM", "RoBERTa-base"):
        rows = [case["rows"] for case in cases
                if case["model"].startswith(model) and case["width"] == 64]
        low, high = sorted(row["dora"]["lora"] for row in rows)
        times.append(f"{low:.2f}–{high:.2f}")
        (ratio,) = (row["dora"]["memory"] / row["PEFT LoRA"]["memory"] for row in rows
                    if "memory" in row["dora"])
        memory.append(f"{ratio:.2f}")
    for words, cells in (("time of a training step", times),
                         ("memory of a step, without the weights", memory)):
        assert f"| {words} | {' | '.join(cells)} |" in TEXT


def test_the_printed_run_on_stsb():
    """Score and minutes of the printed command, compared with the recorded runs of its settings."""
    command = re.search(r"--task stsb --model-dir minilm (.*)", TEXT)[1]
    assert command == "--epochs 4 --batch-size 32 --lr 2e-3"
    wanted = {"task": "stsb", "split": "dev", "row": "dora 2", "lr": 2e-3}
    log = json_lines(RESULTS / "budget_curve.jsonl")
    runs = {run["seed"]: run for run in log if wanted.items() <= run.items()}
    assert all(len(run["epochs"]) == 4 for run in runs.values())
    one, two, three = (f"{runs[seed]['best']:.3f}" for seed in (1, 2, 3))
    assert (f"in about {runs[1]['seconds'] / 60:.0f} minutes of one core it reaches Pearson {one} "
            f"(with seeds 2 and 3, {two} and {three})") in WORDS


def test_the_length_of_the_first_command():
    """Steps of `--task cola`: the train set in batches, times the epochs of Table 8. Hours: times
    the recorded milliseconds of a step of that shape."""
    config = train_glue.make_config("cola")
    steps = math.ceil(8551 / config.batch_size) * config.epochs
    recorded = json.loads((RESULTS / "step_time.json").read_text("utf-8"))
    ms = median(case["rows"]["dora"]["ms"] for case in recorded
                if case["model"].startswith("RoBERTa-base") and case["width"] == 16)
    assert f"{steps:,} steps" in WORDS
    assert f"about {steps * ms / 3.6e6:.0f} hours of one CPU core" in WORDS

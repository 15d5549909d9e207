"""What else takes time in a run? Tokenising, opening the weights, padding, importing.

    python benchmarks/load_time.py            # about 30 s
    python benchmarks/load_time.py --short    # a small checkpoint and no large file, assertions

Each figure is the CPU time of a fresh process with one thread, the median of five. Files that do
not exist (GLUE in --data-dir, a tokenizer in --model-dir) are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import report  # noqa: E402

SHARED = ROOT.parent / "shared"
RESULTS = report.HERE / "results" / "load_time.json"

# Each program prints one JSON object; {} are its arguments.
PROGRAM = """
import json, sys, time
sys.path.insert(0, {root!r})
clock = time.process_time
"""
IMPORT = """
start = clock(); import torch; middle = clock(); import train_glue; end = clock()
print(json.dumps(dict(torch=middle - start, rest=end - middle)))
"""
TOKENISE = """
import data
start = clock(); bpe = data.BPE({model_dir!r} + "/vocab.json", {model_dir!r} + "/merges.txt")
middle = clock(); examples = data.load_task({task!r}, {data_dir!r}, "train", bpe, 128)
end = clock()
print(json.dumps(dict(tokenizer=middle - start, rows=end - middle, examples=len(examples))))
"""
OPEN = """
import torch, train_glue
from pathlib import Path
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3
before = resident("VmRSS")
start = clock(); model = train_glue.load_roberta({folder!r}, 2); end = clock()
opened = resident("VmHWM") - before
total = sum(float(weight.sum()) for weight in model.parameters())  # reads every page
print(json.dumps(dict(seconds=end - start, opened=opened, read=resident("VmHWM") - before)))
"""


def run(program: str, times: int = 5, **values: Any) -> dict[str, float]:
    """Return the median of each figure over so many processes."""
    source = (PROGRAM + program).format(root=str(ROOT), **values)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = [json.loads(subprocess.run([sys.executable, "-c", source], capture_output=True,
                                       text=True, check=True, env=env).stdout)
             for _ in range(times)]
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def checkpoint(folder: Path, short: bool) -> float:
    """Write random weights of roberta-base's shape (short: a tenth of it). Return the MB."""
    import train_glue
    config = train_glue.RobertaConfig()
    if short:
        config = train_glue.RobertaConfig(hidden_size=384, num_hidden_layers=6,
                                          intermediate_size=1536, vocab_size=8000)
    train_glue.save_model(train_glue.RobertaForSequenceClassification(config, 2), folder)
    return (folder / "model.safetensors").stat().st_size / 1e6


def padding(name: str, data_dir: str, model_dir: str) -> tuple[float, float]:
    """Return the share of pad tokens in an epoch of batches of 16: ours, and in random order."""
    import numpy as np

    import data
    bpe = data.BPE(f"{model_dir}/vocab.json", f"{model_dir}/merges.txt")
    examples = data.load_task(name, data_dir, "train", bpe, 128)
    tokens = sum(len(example.ids) for example in examples)
    ours = sum(batch.ids.numel() for batch in data.batches(examples, 16, 1, 0))
    lengths = np.random.default_rng(1).permutation([len(example.ids) for example in examples])
    mixed = sum(len(part) * max(part) for part in np.split(lengths, range(16, len(lengths), 16)))
    return 1 - tokens / ours, 1 - tokens / mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--data-dir", default=str(SHARED / "data" / "glue"))
    parser.add_argument("--model-dir", default=str(SHARED / "models" / "minilm-l6-roberta"))
    args = parser.parse_args()
    paths = dict(data_dir=args.data_dir, model_dir=args.model_dir)
    rows: list[tuple[str, float, str, float]] = []  # what, value, unit, target

    def add(what: str, value: float, unit: str, target: float, slack: float = 2.0) -> None:
        rows.append((what, value, unit, target))
        print(f"{what:60}{value:8.3f} {unit:10} target {target:g}", flush=True)
        if args.short and unit != "s":  # a busy machine may take any time
            assert value < slack * target, (what, value, target)

    found = run(IMPORT, 3 if args.short else 5)
    add("`import train_glue` over `import torch`", 1 + found["rest"] / found["torch"], "times", 1.2,
        slack=1.5)
    for task in ("cola", "stsb") if args.short else ("cola", "stsb", "sst2"):
        import data
        if not (Path(args.data_dir) / data.TASKS[task].folder / "train.tsv").exists() or \
                not (Path(args.model_dir) / "vocab.json").exists():
            print(f"{task}: no files in {args.data_dir} or no tokenizer, left out")
            continue
        found = run(TOKENISE, 1 if args.short else 5, task=task, **paths)
        add(f"reading the tokenizer's files and {task}'s {found['examples']:,.0f} rows",
            found["tokenizer"] + found["rows"], "s", {"cola": 0.5, "stsb": 1, "sst2": 4}[task])
        if task != "sst2":
            ours, mixed = padding(task, **paths)
            add(f"padding in {task}'s batches of 16 (random order: {mixed:.0%})", 100 * ours,
                "% of tokens", 5)
    if Path("/proc/self/status").exists():
        with tempfile.TemporaryDirectory() as folder:
            size = checkpoint(Path(folder), args.short)
            found = run(OPEN, 1 if args.short else 5, folder=folder)
        add(f"load_roberta of a {size:.0f} MB file", found["seconds"], "s", 2)
        for state in ("opened", "read"):  # beside a small file torch's imports weigh more
            add(f"its peak memory over the file, {'every weight ' * (state == 'read')}{state}",
                found[state] / size, "times", 1.2, slack=4)
    if not args.short:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        cells = [[what, f"{value:.2f} {unit}", f"{target:g}", "yes" if value <= target else "no"]
                 for what, value, unit, target in rows]
        report.write_part("load_time", "\n".join([
            "## load_time.py: the rest of a run's time", "", __doc__.split("\n\n")[2], "",
            report.table(["", "measured", "at most", "met"], cells), "",
            f"`python benchmarks/load_time.py`, {report.machine(1)}."]))


if __name__ == "__main__":
    main()

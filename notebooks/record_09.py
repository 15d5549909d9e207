"""Record the rank maps of 09: `python notebooks/record_09.py DATA MODEL`.

DATA is the folder that holds GLUE's folders, MODEL an encoder in RoBERTa's format. A run has 240
steps of 8 examples of at most 28 tokens and ends when its last component has been pruned, after
120. Appends a line per run to 09_maps.jsonl beside this file and leaves out the runs that are there
already: live components per matrix, in the model's order, and the score on 300 examples of dev.
"""
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from dora import DoRAConfig, Pruner, inject  # noqa: E402
from train_glue import evaluate, load_roberta, task_loss  # noqa: E402

LOG, STEPS, BATCH = HERE / "09_maps.jsonl", 240, 8
ROWS = [("stsb", "true", 2e-3), ("stsb", "shuffled", 2e-3), ("sst2", "true", 2e-3),
        ("sst2", "shuffled", 2e-3), ("cola", "true", 1e-3)]


@functools.cache  # the runs share them
def examples(task, split, glue, encoder):
    return data.load_task(task, glue, split, data.BPE(encoder), 28)


def record(task, labels, lr, seed, *folders):
    """Return the line of one run."""
    train, dev = (examples(task, split, *folders) for split in ("train", "dev"))
    rng = np.random.default_rng(seed)
    chosen = [train[i] for i in rng.permutation(len(train))[:STEPS * BATCH]]
    if labels == "shuffled":  # a permutation per seed, so that no two runs share what they learn
        answers = rng.permutation([example.label for example in chosen]).tolist()
        chosen = [data.Example(example.ids, label) for example, label in zip(chosen, answers)]

    torch.manual_seed(seed)
    model = load_roberta(folders[1], data.TASKS[task].num_labels)
    config = DoRAConfig()
    pruner = Pruner(inject(model, config), config, STEPS)
    model.classifier.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    model.train()
    for batch in data.batches(chosen, BATCH, seed, 0):
        (task_loss(model(batch.ids, batch.mask), batch.labels) + pruner.penalty()).backward()
        pruner.observe()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((pruner.t + 1) / 14, (STEPS - pruner.t) / 226)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        if pruner.t == pruner.last:
            break
    score = next(iter(evaluate(model.eval(), dev[:300], data.TASKS[task]).values()))
    return {"task": task, "labels": labels, "seed": seed, "lr": lr,
            "score": round(score, 4), "ranks": [*pruner.ranks().values()]}


def main(glue, encoder):
    torch.set_num_threads(1)
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    known = {(run["task"], run["labels"], run["seed"]) for run in done}
    for *row, lr, seed in ((*row, seed) for seed in range(1, 11) for row in ROWS):
        if (*row, seed) not in known:
            line = record(*row, lr, seed, glue, encoder)
            with open(LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

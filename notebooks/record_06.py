"""Record the runs of 06 that are too many to make in a notebook: `python notebooks/record_06.py`.

Ten seeds of the toy, each with its own pretrained encoder: dora, also with shuffled labels; LoRA on
query and value; paper; at two rates.
Appends a line per run to 06_runs.jsonl beside this file and leaves out those that are there.
"""
import contextlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import train_glue  # noqa: E402
from train_glue import RobertaConfig, RobertaForSequenceClassification, make_config  # noqa: E402

LOG = HERE / "06_runs.jsonl"


def pretrain(root, seed):
    """Write the toy's files and a tiny RoBERTa that was trained on short sentences."""
    bpe = data.write_toy(root, root / "untrained")
    torch.manual_seed(seed)
    tiny = RobertaConfig(
        vocab_size=len(bpe.vocab), hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    train_glue.save_model(RobertaForSequenceClassification(tiny, 4), root / "untrained")
    train(make_config("toy-pretrain", "full", data_dir=str(root), max_len=48, seed=seed,
                      model_dir=str(root / "untrained"), out=str(root / "pretrain"), lr=1e-3,
                      batch_size=32, epochs=3, deterministic=True))


def shuffle_labels(root, seed):
    """Write the toy's files once more, with the labels of the train set permuted."""
    (root / "shuffled/toy").mkdir(parents=True)
    rows = data.read_tsv(root / "toy/train.tsv")
    labels = random.Random(seed).sample([row[1] for row in rows], len(rows))
    lines = ["\t".join([row[0], label, *row[2:]]) for row, label in zip(rows, labels)]
    (root / "shuffled/toy/train.tsv").write_text("\n".join(lines) + "\n")
    (root / "shuffled/toy/dev.tsv").write_bytes((root / "toy/dev.tsv").read_bytes())


def train(config):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train_glue.train(config)


def arms(lr):
    """Yield (name, settings) of each row."""
    qv = dict(method="lora", rank=1, targets=("query", "value"))
    yield "dora, shuffled labels", dict(method="dora", lr=lr)
    for rate in (lr, lr / 2):
        yield "dora", dict(method="dora", lr=rate)
        yield "lora qv", dict(qv, lr=rate)
        yield "paper", dict(method="paper", lr=rate)


def main(seeds=range(1, 11)):
    torch.set_num_threads(1)
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    known = {(run["seed"], run["arm"], run["lr"]) for run in done}
    for seed in seeds:
        missing = [(name, settings) for name, settings in arms(make_config("toy").lr)
                   if (seed, name, settings["lr"]) not in known]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if missing:
                pretrain(root, seed)
                shuffle_labels(root, seed)
            for k, (name, settings) in enumerate(missing):
                texts = root / "shuffled" if "shuffled" in name else root
                result = train(make_config(
                    "toy", data_dir=str(texts), model_dir=str(root / "pretrain/model"),
                    out=str(root / str(k)), max_len=48, seed=seed,
                    **{"rank": 1 / 6, **settings}))
                line = {"seed": seed, "arm": name, "lr": settings["lr"],
                        "score": round(result["best"]["matthews"], 4),
                        "parameters": result["adapter_parameters_after_pruning"],
                        "ranks": [*result["ranks"].values()]}
                with open(LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""Record what transformers makes of the checkpoint of 11: `python notebooks/record_11.py`.

Writes 11_reference.json beside this file: texts with their token ids by transformers' tokenizer,
the states of <s> after the embeddings and each layer, and the logits. Needs transformers; the
notebook itself needs only write_checkpoint and the recorded numbers.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from train_glue import RobertaConfig, RobertaForSequenceClassification, save_model  # noqa: E402

TEXTS = ["these dogs near the king see a bird", "the old teacher sees some painters",
         "some robots behind a queen with this pilot admire the singers", "a cat", "",
         "I'm 10² naïve", "this  happy\tlawyer </s> thanks <mask>!"]


def write_checkpoint(folder):
    """The toy's vocabulary and a tiny RoBERTa, whose weights numpy's seed makes again anywhere."""
    bpe = data.write_toy(folder / "data", folder)
    config = RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=64, num_hidden_layers=3,
                           num_attention_heads=4, intermediate_size=256,
                           max_position_embeddings=64)
    model = RobertaForSequenceClassification(config, num_labels=2)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for name, weight in sorted(model.state_dict().items()):
            numbers = rng.uniform(-0.3, 0.3, weight.shape) + name.endswith("LayerNorm.weight")
            weight.copy_(torch.from_numpy(numbers))
    save_model(model, folder)
    return bpe


def main():
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # a literal "</s>" in a text is text: the tokenizer splits it like any other
    ids = [tokenizer(text, split_special_tokens=True).input_ids for text in TEXTS]
    width = max(map(len, ids))
    batch = torch.tensor([row + [1] * (width - len(row)) for row in ids])
    with torch.no_grad():
        out = model(input_ids=batch, attention_mask=(batch != 1).long(), output_hidden_states=True)
    states = torch.stack([state[:, 0] for state in out.hidden_states])  # (1 + layers, B, D)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    rows = {"versions": versions, "texts": TEXTS, "ids": ids, "logits": out.logits.tolist(),
            "states of <s>, first text": states[:, 0].tolist()}
    lines = [f' "{name}": {json.dumps(row, ensure_ascii=False)}' for name, row in rows.items()]
    (HERE / "11_reference.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()

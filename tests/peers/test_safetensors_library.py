"""dora.py's safetensors reader and writer against the safetensors library."""
import random
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from dora import DTYPES, DoRAError, read_safetensors, write_safetensors

MINILM = Path(__file__).parents[2] / "../shared/models/minilm-l6-roberta"


def tensors_of(seed):
    """Tensors of all types and many shapes, names with odd characters."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes = [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (2, 3, 4, 5), (1, 1, 129)]
    return {f"{i}.é\n\"日{name}": (torch.randn(rng.choice(shapes)) * 50).to(dtype)
            for i in range(3) for name, dtype in DTYPES.items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert torch.equal(a[name], b[name])


@pytest.mark.parametrize("seed", range(5))
def test_the_library_reads_our_files(tmp_path, seed):
    """Every type, scalars and empty tensors, transposed ones: bit for bit; and the metadata says
    "pt", which transformers asks for."""
    tensors = tensors_of(seed)
    tensors["view"] = torch.randn(4, 6).T
    write_safetensors(tmp_path / "x.safetensors", tensors)
    equal(load_file(tmp_path / "x.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": 'a "b" \n é'}])
def test_we_read_the_librarys_files(tmp_path, seed, metadata):
    """The same the other way round, with and without metadata."""
    tensors = tensors_of(seed)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    equal(read_safetensors(tmp_path / "x.safetensors"), tensors)


@pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared/models")
def test_a_real_checkpoint():
    """The shared encoder's file reads as the library reads it."""
    equal(read_safetensors(MINILM / "model.safetensors"), load_file(MINILM / "model.safetensors"))


@pytest.mark.parametrize("seed", range(3))
def test_no_more_lenient_than_the_library(tmp_path, seed):
    """1,500 mutations of a file: what the library refuses, we refuse, and what both read is
    equal."""
    write_safetensors(tmp_path / "good", {
        "w": torch.arange(6.0).view(2, 3), "h": torch.ones(3).half(), "n": torch.tensor(7),
        "none": torch.empty(0, 4)})
    raw = (tmp_path / "good").read_bytes()
    rng = random.Random(seed)
    path, both = tmp_path / "mutated", 0
    for _ in range(500):
        new = bytearray(raw)
        if rng.random() < 0.7:
            for _ in range(rng.randint(1, 3)):
                byte = rng.choice([*b'0123456789[]{}:,"- ', rng.randrange(256)])
                new[rng.randrange(len(new))] = byte
        else:
            i = rng.randrange(len(new))
            new[i:i + rng.randint(0, 4)] = b""
        path.write_bytes(new)
        try:
            expected = safetensors.torch.load(bytes(new))
        except safetensors.SafetensorError:
            with pytest.raises(DoRAError):
                read_safetensors(path)
            continue
        try:
            found = read_safetensors(path)
        except DoRAError:                           # types we do not know, say
            continue
        both += 1
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name].numpy().tobytes() == expected[name].numpy().tobytes()
    assert both > 20

"""dora.py's safetensors reader and writer against the safetensors library."""
import json
import random

import safetensors
import torch
from safetensors.torch import load_file, save_file
from small import refused
from test_files import bits, file_of
from tiny import MINILM

from dora import DTYPES, read_safetensors, write_safetensors


def tensors_of(seed):
    """Tensors of all types and many shapes, names with odd characters."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes = [(), (0,), (7,), (2, 0, 3), (1, 1, 129)]
    tensors = {}
    for name, dtype in 3 * [*DTYPES.items()]:
        tensor = torch.randn(rng.choice(shapes)).abs() * 50
        tensors[f"{len(tensors)}.é\n\"日{name}"] = tensor.to(dtype)
    return tensors


def equal(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.dtype == y.dtype and x.shape == y.shape
        assert bits(x) == bits(y)


def test_round_trips(tmp_path):
    """The library reads our files and we read its, bit for bit: every type, scalars, empty tensors,
    views, and the shared encoder's. Our metadata says "pt", which transformers asks for."""
    path = tmp_path / "x.safetensors"
    for seed in range(5):
        tensors = {**tensors_of(seed), "view": torch.randn(4, 6).T}
        write_safetensors(path, tensors)
        equal(load_file(path), tensors)
        with safetensors.safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt"}
        tensors = tensors_of(seed)
        save_file(tensors, path, {"format": "pt", "note": 'a "b" \n é'} if seed % 2 else None)
        equal(read_safetensors(path), tensors)
    path = MINILM / "model.safetensors"
    if path.exists():
        equal(read_safetensors(path), load_file(path))


def header_by_chance(rng):
    """(header, size of the data): sizes, shapes, types and places that mostly fit together."""
    odd = [0, 1, 4, 8, -1, -8]
    odd += [2**32, 2**63, None, "4", []]
    sizes = dict(F32=4, U8=1, F64=8, BOOL=1, F16=2, I4=1, F31=4, f32=4)

    def pick(good):
        return good if rng.random() < 0.95 else rng.choice(odd)

    header, end = {}, 0
    for i in range(rng.randint(0, 3)):
        dtype = rng.choice([*sizes])
        shape = rng.choices(range(4), k=rng.randint(0, 3))
        begin, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[i] = {"dtype": pick(dtype),
                     "shape": [*map(pick, shape)],
                     "data_offsets": [pick(begin), pick(end)]}
    return header, max(0, end + rng.choice([0] * 10 + [1, -1]))


def test_no_more_lenient_than_the_library(tmp_path):
    """1,600 random headers: ours refuses what the library refuses; what both read is equal."""
    rng, path, both = random.Random(0), tmp_path / "x.safetensors", 0
    for _ in range(1600):
        header, size = header_by_chance(rng)
        file_of(path, json.dumps(header), bytes(size))
        try:
            expected = load_file(path)
        except Exception:
            refused("", read_safetensors, path)
        else:
            both += 1
            equal(read_safetensors(path), expected)
    assert 240 < both < 1200

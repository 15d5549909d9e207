"""What does a training step cost over a frozen backbone? Time, memory, evaluation, launches.

README.md says what the rows are. Here is how they are measured. Rows take turns in one process, in
random order. A ratio is the median over rounds of (row / other row of the same round), and a time
is the shortest of all rounds. On the CPU it is the process's CPU time, which depends little on
other load, and on a GPU wall-clock time. Memory is measured in one process per row: the largest
resident size (Linux) in three steps, less that of the loaded model.

    python benchmarks/step_time.py                 # all; about an hour on a shared machine
    python benchmarks/step_time.py --shape host    # operations and host time only, a minute
    python benchmarks/step_time.py --device cuda   # a GPU: float32 and bf16
"""

import argparse
import collections
import ctypes
import importlib.util
import itertools
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import report
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_glue
from dora import METHODS, DoRAConfig, Pruner, compact_, inject
from train_glue import RobertaConfig, RobertaForSequenceClassification

SHAPES = {"minilm": RobertaConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
          "base": RobertaConfig(),
          "host": RobertaConfig(hidden_size=48, num_hidden_layers=12, intermediate_size=192)}
WORDS = {"minilm": "MiniLM (6 layers of 384)", "base": "RoBERTa-base's shape, random weights",
         "host": "12 layers of 48, so that kernels are almost free"}
CPU_MODES = ("MKL", "oneDNN")
MODES = ("float32", "bf16")  # on CUDA
RESULTS = report.HERE / "results" / "step_time.json"
FLOOR, TF_FLOOR, OURS, COMPACTED = "our floor", "transformers' floor", "dora", "dora, compacted"
PAPER, FULL = "paper, scores of Eq. 7", "full fine-tuning"
ENTRIES = "adalora, scores of every entry"
LORA, ADALORA = "PEFT LoRA", "PEFT AdaLoRA"
PEERS = (TF_FLOOR, LORA, ADALORA)  # the rows that need transformers and PEFT
EVALUATED = (FLOOR, OURS, COMPACTED, LORA)  # in batches of 64, as train_glue.predict
SHORT = (FLOOR, TF_FLOOR, OURS, COMPACTED, PAPER, LORA)
ALL = (FLOOR, TF_FLOOR, OURS, COMPACTED, PAPER, FULL, LORA, ADALORA)
HOST = (FLOOR, TF_FLOOR, OURS, COMPACTED, PAPER, ENTRIES, LORA, ADALORA)


class Case(NamedTuple):
    """What one table measures."""

    shape: str
    size: int  # examples
    width: int  # tokens
    mode: str
    names: tuple[str, ...]  # rows
    device: str


@dataclass
class Row:
    """A model, how to call it, and what it does besides a plain training step."""

    model: nn.Module
    loss: Callable[..., Tensor]  # of a batch
    pruner: Pruner
    optimizer: torch.optim.Optimizer | None = None  # made in the first step
    after: Callable[[], None] = lambda: None  # after optimizer.step(), gradients still there


def step(row, batch):
    """Do one optimizer step, as in train_glue.train. The model is in training mode."""
    if row.optimizer is None:
        trained = [p for p in row.model.parameters() if p.requires_grad]
        row.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    trained = row.optimizer.param_groups[0]["params"]
    penalty = row.pruner.penalty()
    (row.loss(batch) + penalty).backward()
    row.pruner.observe()
    nn.utils.clip_grad_norm_(trained, 1.0)
    row.optimizer.step()
    row.after()
    row.optimizer.zero_grad()
    row.pruner.step()


def build(name, model):
    """Turn a loaded model, ours or transformers', into the row of this name."""
    config, layers, after = DoRAConfig(**METHODS["lora"]), {}, lambda: None
    ours = isinstance(model, RobertaForSequenceClassification)
    if name in (FLOOR, TF_FLOOR):
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        first = model.roberta.encoder.layer[0].attention.self
        for module in (first.query, first.key, first.value):
            module.register_forward_hook(
                lambda module, args, out: out.requires_grad_() if torch.is_grad_enabled() else None)
    elif name in (LORA, ADALORA):
        model, after = peft_model(name, model)
    elif name != FULL:  # prune from the start, every ten steps
        settings = METHODS[{PAPER: "paper", ENTRIES: "adalora"}.get(name, "dora")]
        config = replace(DoRAConfig(**settings), initial_phase=0.0, interval=10)
        layers = inject(model, config)
        model.classifier.requires_grad_(True)
    pruner = Pruner(layers, config, 4 if name == COMPACTED else 10_000)

    def loss(batch):
        ids, mask, labels = batch
        if ours:
            return train_glue.task_loss(model(ids, mask), labels)
        return model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss

    row = Row(model.train(), loss, pruner, after=after)
    if name == COMPACTED:  # three steps, the second of which prunes for the last time
        for _ in range(3):
            step(row, make_batch(2, 16, next(model.parameters()).device))
        compact_(model, row.optimizer)
    return row


def peft_model(name, model):
    """Return PEFT's model, and what it does after optimizer.step()."""
    import peft
    more = dict(lora_alpha=8, lora_dropout=0.1, target_modules=list(DoRAConfig().targets),
                task_type=peft.TaskType.SEQ_CLS)
    if name == LORA:
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **more)), lambda: None
    model = peft.get_peft_model(model, peft.AdaLoraConfig(
        init_r=3, target_r=2, tinit=1, tfinal=5_000, deltaT=10, total_step=10_000, **more))
    steps = iter(range(1, 10_000))
    return model, lambda: model.base_model.update_and_allocate(next(steps))


def load(case, peer):
    """Load the shared MiniLM if it exists; otherwise make random weights of the shape."""
    if case.device == "cpu":
        set_products(case.mode)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(SHAPES[case.shape], 2)
    if case.shape == "minilm" and report.MINILM.exists():
        model.load_state_dict(train_glue.load_roberta(report.MINILM, 2).state_dict())
    if peer:
        import transformers
        transformers.logging.set_verbosity_error()
        config = transformers.RobertaConfig(**vars(SHAPES[case.shape]), num_labels=2)
        weights = model.state_dict()
        model = transformers.RobertaForSequenceClassification(config)
        model.load_state_dict(weights, strict=False)
    if case.mode == "bf16":  # our head stays float32, as in train_glue
        (model if peer else model.roberta).to(torch.bfloat16)
    return model.to(case.device)


def set_products(mode):
    """Choose who multiplies matrices of float32 on the CPU. The setting's name misleads: without
    AMX oneDNN computes in float32, as train_glue.onednn_is_faster() checks."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if mode == "oneDNN" else "none"


def make_batch(size, width, device="cpu"):
    """Return random ids (B, T) in rows of 90 to 100 % of the width, their mask and labels (B,)."""
    lengths = torch.randint(width - width // 10, width + 1, (size, 1))
    lengths[0] = width
    mask = torch.arange(width) < lengths
    ids = torch.randint(4, 50_000, (size, width)).where(mask, 1)
    return ids.to(device), mask.to(device), torch.randint(0, 2, (size,)).to(device)


# ---- measuring ---------------------------------------------------------------------------------


def timed(run, *args, device):
    """Return the milliseconds of a call: CPU time, or on a GPU wall-clock time."""
    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if device == "cpu" else time.perf_counter()

    start = clock()
    run(*args)
    return 1e3 * (clock() - start)


def method(row):
    """Do all that DoRA adds to ten steps besides its layers; one of them prunes."""
    for _ in range(10):
        row.pruner.penalty().backward()
        row.pruner.observe()
        row.pruner.step()


@torch.no_grad()
def evaluate(row, batch):
    """Do one forward pass without dropout."""
    row.model.eval()
    row.loss(batch)


def keep_memory():
    """Let the process keep the memory that it frees (glibc). Otherwise, with many models in turn,
    the larger rows would pay for pages that they keep when they are alone in a process."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: none


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches, except those that launch no kernel: views, empty
    tensors and marks for the profiler."""

    FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
            "_unsafe_view", "_local_scalar_dense", "_record_function_enter_new",
            "_record_function_exit")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in self.FREE)
        return func(*args, **(kwargs or {}))


def operations(row, batch):
    """Return the operations of a step: forward, backward, observe, clip, optimizer, pruner."""
    step(row, batch)  # the optimizer's state exists from here on
    with Operations() as found:
        for _ in range(10):
            step(row, batch)
    return found.count / 10


def measure(case, seconds, counted=False):
    """Time rounds of all rows in turn, for so many seconds: at least three, or one if operations
    are counted too."""
    keep_memory()
    rows = {name: build(name, load(case, name in PEERS)) for name in case.names}
    result = {"rows": {name: {} for name in rows}}
    for name, row in rows.items():
        batch = make_batch(case.size, case.width, case.device)
        step(row, batch)
        if case.shape == "host" or counted:
            # of our rows the count does not depend on the size of the batch
            result["rows"][name]["operations"] = operations(row, make_batch(2, 8, case.device))
        if counted:
            with FlopCounterMode(display=False) as products_of:
                step(row, batch)
            result["rows"][name]["gflops"] = products_of.get_total_flops() / 1e9

    times, shares = rounds(case, rows, seconds, 1 if counted else 3)
    result.update(rounds=len(shares), method=statistics.median(shares))
    for name, found in result["rows"].items():
        found["ms"] = min(times["", name])
        for kind, (key, other) in itertools.product(("", "eval "), (
                ("floor", FLOOR), ("tf", TF_FLOOR), ("lora", LORA))):
            if (kind, name) in times and (kind, other) in times:
                found[kind + key] = statistics.median(
                    a / b for a, b in zip(times[kind, name], times[kind, other]))
    return result


def rounds(case, rows, seconds, least):
    """Return the milliseconds of every round, of a step ("", row) and of an evaluation ("eval ",
    row), and the share of dora's step that its method's part takes."""
    times = collections.defaultdict(list)
    shares = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(shares) < least:
        batch = make_batch(case.size, case.width, case.device)
        for name in random.sample(list(rows), len(rows)):
            times["", name].append(timed(step, rows[name], batch, device=case.device))

        batch = make_batch(64, case.width, case.device)
        evaluated = [name for name in rows if name in EVALUATED]
        for name in random.sample(evaluated, len(evaluated)):
            times["eval ", name].append(timed(evaluate, rows[name], batch, device=case.device))
            rows[name].model.train()

        ours = rows[OURS]
        ours.loss(batch).backward()  # gradients for observe()
        took = timed(method, ours, device=case.device) / 10
        shares.append(took / times["", OURS][-1])
        ours.optimizer.zero_grad()
    return times, shares


def memory(case, name):
    """Return the MB that three steps need at most, beyond the loaded model. Runs in a process of
    its own."""
    if name in PEERS:
        import peft  # noqa: F401
    model = load(case, name in PEERS)
    if case.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what loading has freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        before = report.resident("VmRSS")
    row = build(name, model)
    for _ in range(3):
        step(row, make_batch(case.size, case.width, case.device))
    if case.device != "cpu":
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return report.resident("VmHWM") - before


def measure_memory(case, name):
    """Return memory() of a fresh process."""
    command = [sys.executable, __file__, "--memory", json.dumps([case, name])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# ---- the report --------------------------------------------------------------------------------


NUMBERS = (("a training step", OURS, "lora"), ("a step after pruning", COMPACTED, "lora"),
           ("evaluation", COMPACTED, "eval lora"), ("memory of a step", OURS, "memory"))


def against_lora(cases):
    """Return the table of four numbers that people ask for: dora over PEFT LoRA."""
    cases = [case for case in cases if case["model"] != WORDS["host"]]
    heads = [f"{case['model'].split(' (')[0].split(',')[0]}, {case['size']}×{case['width']}, "
             f"{case['mode']}" for case in cases]
    body = []
    for words, name, key in NUMBERS:
        values = [case["rows"][name].get(key) for case in cases]
        if key == "memory":
            values = [value and value / case["rows"][LORA]["memory"]
                      for value, case in zip(values, cases)]
        body.append([words, *(f"{value:.2f}" if value else "" for value in values)])
    return report.table(["`dora` over PEFT LoRA, both at rank 2", *heads], body)


COLUMNS = (("operations per step", "operations", "{:,.0f}"), ("ms, at least", "ms", "{:.1f}"),
           ("over our floor", "floor", "{:.2f}"), ("over transformers' floor", "tf", "{:.2f}"),
           ("over PEFT LoRA", "lora", "{:.2f}"), ("evaluation over ours", "eval floor", "{:.2f}"),
           ("over PEFT LoRA", "eval lora", "{:.2f}"), ("MB over the model", "memory", "{:.0f}"))


def table(case):
    """Return a table with the columns that were measured."""
    rows = case["rows"]
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows.values())]
    body = [[name, *(digits.format(row[key]) if key in row else "" for _, key, digits in columns)]
            for name, row in rows.items()]
    return report.table(["", *(head for head, _, _ in columns)], body)


def write(cases):
    """Write results/step_time.json and this script's part of README.md."""
    parts = ["**Speed and memory against PEFT LoRA**", against_lora(cases)]
    for case in cases:
        parts += [f"**{case['model']}, {case['size']}×{case['width']}, {case['mode']}**",
                  table(case), f"{case['rounds']} rounds. Penalty, scores and pruning of dora "
                  f"together: {case['method']:.1%} of its step. `{case['command']}`, "
                  f"{case['machine']}."]
    RESULTS.write_text(json.dumps(cases, indent=1) + "\n")
    report.write_part("step_time", "\n\n".join(parts))


def check(case):
    """Check what does not depend on the machine's load."""
    rows = case["rows"]
    ours, floor = rows[OURS], rows[FLOOR]
    assert ours["gflops"] < 1.02 * floor["gflops"], rows
    assert ours["operations"] < 3.2 * floor["operations"], rows
    assert rows[COMPACTED]["operations"] < 0.9 * ours["operations"], rows
    assert rows[PAPER]["operations"] < 1.3 * ours["operations"], rows
    if LORA in rows:
        assert ours["gflops"] < 0.9 * rows[LORA]["gflops"], rows
    if "memory" in floor:
        assert ours["memory"] < 2 * floor["memory"], rows


def chosen_cases(args):
    """Return the tables to measure."""
    if args.short:
        peft = importlib.util.find_spec("peft")
        names = tuple(name for name in SHORT if peft or name not in PEERS)
        cases = [Case("minilm", 16, width, "MKL", names, "cpu") for width in (16, 64)]
    elif args.device == "cpu":
        cases = [Case(shape, 16, width, mode, ALL, "cpu") for shape in ("minilm", "base")
                 for width in (16, 64) for mode in CPU_MODES]
        cases.append(Case("host", 2, 8, "MKL", HOST, "cpu"))
    else:
        cases = [Case("base", size, width, mode, HOST, args.device)
                 for size, width in ((16, 64), (32, 128)) for mode in MODES]
    return [case for case in cases
            if args.shape in (None, case.shape) and args.width in (None, case.width)]


def run_case(case, seconds, is_short):
    """Measure one table and write it, or with --short check it."""
    found = measure(case, 0 if is_short else seconds, is_short)
    found.update(model=WORDS[case.shape], size=case.size, width=case.width, device=case.device,
                 mode=case.mode, machine=report.machine(case.device),
                 command=f"python benchmarks/step_time.py {' '.join(sys.argv[1:])}".strip())
    measured = EVALUATED if not is_short else () if case.width == 16 else (FLOOR, OURS)
    linux = Path("/proc/self/clear_refs").exists()
    if case.shape != "host" and case.mode != "oneDNN" and (linux or case.device != "cpu"):
        for name in measured:
            found["rows"][name]["memory"] = measure_memory(case, name)

    print(case, table(found), sep="\n", flush=True)
    if is_short:
        check(found)
        return
    same = operator.itemgetter("machine", "model", "size", "width", "mode")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    write([*(other for other in known if same(other) != same(found)), found])


def main():
    """Run the command line."""
    parser = report.parser(str(__doc__))
    parser.add_argument("--shape", choices=SHAPES, help="one shape only")
    parser.add_argument("--width", type=int, help="one width only (tokens)")
    parser.add_argument("--seconds", type=float, default=150, help="of each table (default: 150)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"step_time.py: --device {args.device}: torch finds no CUDA device here")
    torch.set_num_threads(1)
    if args.memory:
        case, name = args.memory
        print(memory(Case(*case), name))
    elif args.report:
        write(json.loads(RESULTS.read_text()))
    else:
        for case in chosen_cases(args):
            run_case(case, args.seconds, args.short)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

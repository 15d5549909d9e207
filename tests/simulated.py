"""A simulated accelerator, so that runs on "cuda" and "mps" can be tested without one; no test of
its own.

    with Device("cuda") as device:
        train(make_config(device="cuda", ...))
    device.waits, device.operations    # Counters

A tensor of the device is a Simulated, which to Python is on cuda:0 or mps:0 and holds a CPU tensor
that does the work. The device refuses what a real one refuses: an operation on its tensors and the
CPU's (but single numbers may join elementwise ones), and float64 on MPS. It counts operations that
launch a kernel and waits for a result: item(), tolist(), a copy to the CPU, sizes that depend on
values. It simulates no rounding, streams, memory or autocast, and to C++ code it is the CPU.
"""
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero")
COPYING = ("copy_", "_to_copy")
FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
        "_unsafe_view", "_local_scalar_dense", "_fused_sdp_choice")  # these launch no kernel


class Simulated(torch.Tensor):
    """A tensor of the device; `inner` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.simulation.device)
    is_cuda = property(lambda self: self.device.type == "cuda")

    @staticmethod
    def __new__(cls, inner, simulation):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype)

    def __init__(self, inner, simulation):
        self.inner, self.simulation = inner, simulation

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_):
        return f"Simulated({self.device}, {self.inner})"

    def __reduce_ex__(self, protocol):  # torch.save writes the values
        return self.inner.detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        simulation = next(t.simulation for t in tensors if isinstance(t, Simulated))
        return simulation.run(func, args, kwargs or {}, tensors)


class Device(TorchFunctionMode):
    """While it is entered, torch has this device: "cuda" or "mps"."""

    def __init__(self, kind):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits, self.operations = Counter(), Counter()
        self.blocking = 0  # copies to the device during which the host stands still

    def __enter__(self):
        self.patches = [
            mock.patch(f"torch.{self.device.type}.get_rng_state", lambda *_: torch.get_rng_state()),
            mock.patch(f"torch.{self.device.type}.set_rng_state", lambda *_: None),
            # from C++, which takes the tensors for the CPU's
            mock.patch("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", self.group),
            mock.patch("torch.cuda.set_device", lambda device: None),
            mock.patch("torch.cuda.is_available", lambda: self.device.type == "cuda"),
            mock.patch("torch.cuda.get_device_name", lambda device=None: "simulated"),
            mock.patch("torch.backends.mps.is_available", lambda: self.device.type == "mps"),
            # which a torch without CUDA refuses to enter
            mock.patch("torch.autocast", lambda kind, dtype: torch.amp.autocast("cpu", dtype))]
        for patch in self.patches:
            patch.start()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # as for a real device
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        for patch in self.patches:
            patch.stop()

    def group(self, tensors):
        assert all(isinstance(t, Simulated) for row in tensors for t in row)
        return {(self.device, torch.float32): (tensors, [])}

    def wrap(self, tensor):
        """Put a CPU tensor on the device."""
        if tensor.dtype in (torch.float64, torch.complex128) and self.device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                            "doesn't support float64")
        return Simulated(tensor, self)

    def claims(self, device):
        """Whether a device, or its name, means this one. Another accelerator is not there."""
        kind = None if device is None else torch.device(device).type
        if kind not in (None, "cpu", "meta", self.device.type):
            raise RuntimeError(f"no {kind} here")
        return kind == self.device.type

    # ---- what Python asks for: new tensors on the device, and moves

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cpu:
            return self.move(args[0], torch.device("cpu"))
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if self.claims(kwargs.get("device")):
            self.operations[func.__name__] += not func.__name__.startswith("empty")
            return self.wrap(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)

    def to(self, tensor, *args, dtype=None, device=None, non_blocking=False, copy=False):
        """Tensor.to(device, dtype), .to(other), ..."""
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, torch.Tensor):
                dtype, device = arg.dtype, arg.device
            elif isinstance(arg, (str, torch.device)):
                device = torch.device(arg)
            elif arg is not None:  # Module.to: (device, dtype, non_blocking)
                non_blocking = arg
        device = tensor.device if device is None else torch.device(device)
        if device.type != tensor.device.type and not (device.type == "meta" or tensor.is_meta):
            moved = self.move(tensor, device, non_blocking)
            return moved if dtype is None else moved.to(dtype)
        if isinstance(tensor, Simulated):
            return torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy)
        return torch.Tensor.to(tensor, device=device, dtype=dtype, copy=copy)

    def move(self, tensor, device, non_blocking=False):
        """Copy a tensor between the CPU and the device."""
        if device.type == tensor.device.type:
            return tensor
        assert not (torch.is_grad_enabled() and tensor.requires_grad), "a move inside the graph"
        if device.type == "cpu":
            self.waits["cpu"] += 1
            return tensor.inner.detach().clone()
        self.claims(device)
        self.blocking += not non_blocking
        self.refuse_a_lost_source(non_blocking)
        return self.wrap(tensor.detach().clone())

    def refuse_a_lost_source(self, non_blocking):
        """MPS may copy later from memory that is not pinned, and that is free by then."""
        if non_blocking and self.device.type == "mps":
            raise RuntimeError("a copy to mps without blocking, from memory that is not pinned")

    # ---- what torch does with tensors of the device, backward included

    def run(self, func, args, kwargs, tensors):
        """Do an operation at least one of whose tensors is on the device."""
        name = func.overloadpacket.__name__
        strangers = [t for t in tensors if not isinstance(t, Simulated)]
        if strangers and name not in COPYING and "index" not in name:
            if any(t.dim() for t in strangers) or torch.Tag.pointwise not in func.tags:
                raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but "
                                   f"found {self.device} and cpu, {[t.shape for t in strangers]}")
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(t is not None and t.dtype == torch.bool for t in indices)
        if name in WAITING or by_mask:
            self.waits[name] += 1
        self.operations[name] += not (func.is_view or name in FREE)
        if name == "copy_" and not isinstance(args[0], Simulated):
            self.waits[name] += 1
            return args[0].copy_(args[1].inner)

        back = {id(t.inner): t for t in tensors if isinstance(t, Simulated)}

        def inner(leaf):
            return leaf.inner if isinstance(leaf, Simulated) else leaf

        def outer(out):
            if not isinstance(out, torch.Tensor):
                return out
            return back[id(out)] if id(out) in back else self.wrap(out)  # known: changed in place

        return tree_map(outer, func(*tree_map(inner, args), **tree_map(inner, kwargs)))

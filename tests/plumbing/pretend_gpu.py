"""A GPU that is not there: tensors that say they are on 'cuda' and are computed on the CPU.

What it finds without a card: tensors of two devices in one operation, a generator of the wrong one,
a wait for the GPU while a graph is recorded, and a graph that freezes what has to change from
replay to replay. What it cannot find: kernels that are missing or wrong, speed, memory, and where
autocast treats the two devices differently.

To Python such a tensor is on cuda:0; to torch's C++ it is a wrapper on the CPU, so that autograd
runs as ever. A graph is a list of the operations between its ends: recording them leaves what was
there before as it was, and a replay repeats them on the same memory.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Indices may lie on the CPU when the rest does not: torch moves them, and waits
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten.is_nonzero.default,
}
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
TREES = (list, tuple, dict)
CAPTURING = "operation not permitted when stream is capturing"


class PretendTensor(torch.Tensor):
    """On cuda:0, for Python; `inner` holds the numbers."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"PretendTensor({self.inner})"

    def tolist(self):  # torch's own refuses subclasses
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a cuda tensor to numpy: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check(func, args, kwargs)
        outer = [t for t in tensors((args, kwargs)) if isinstance(t, PretendTensor)]
        args, kwargs = tree_map(unwrap, (args, kwargs))
        out = Graph.now.record(func, args, kwargs) if Graph.now else func(*args, **kwargs)
        known = {
            id(t.inner): t for t in outer
        }  # an operation in place gives back what it was given
        wrap = {id(t): known.get(id(t)) for t in tensors(out)}
        if func is aten.copy_.default and id(out) not in known:
            return out  # to a tensor on the CPU
        return tree_map(
            lambda x: (
                (wrap[id(x)] if wrap[id(x)] is not None else PretendTensor(x))
                if isinstance(x, torch.Tensor)
                else x
            ),
            out,
        )


def tensors(tree):
    """Those in lists, tuples and dicts. Not torch's own way, which takes half of a test's time."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [x for some in parts for x in tensors(some)] if isinstance(tree, TREES) else []


def tree_map(function, tree):
    """The tree with function(leaf) in place of every leaf."""
    if isinstance(tree, dict):
        return {name: tree_map(function, some) for name, some in tree.items()}
    if not isinstance(tree, TREES):
        return function(tree)
    parts = [tree_map(function, some) for some in tree]
    return parts if type(tree) is list else tuple(parts)


def unwrap(x):
    return x.inner if isinstance(x, PretendTensor) else x


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def check(func, args, kwargs):
    """RuntimeError where a GPU would refuse. A number in a tensor of no dimensions may come from
    the CPU."""
    flat = tensors((args, kwargs))
    apart = [t for t in flat if not isinstance(t, PretendTensor)]
    indices = tensors(args[1]) if func in INDEXING else []
    fine = func is aten.copy_.default or all(
        any(t is i for i in indices) or not t.dim() for t in apart
    )
    if apart and not fine or indices and apart and not isinstance(args[0], PretendTensor):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu"
        )
    waits = func in WAITS or any(
        i.dtype == torch.bool or not isinstance(i, PretendTensor) for i in indices
    )
    if Graph.now and (waits or apart and func is aten.copy_.default):
        raise RuntimeError(f"{func}: {CAPTURING}")


class Device(TorchFunctionMode):
    """Where a function of torch is told a device, or a generator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in MOVES:
            return self.move(func, args, kwargs)
        device, generator = kwargs.get("device"), kwargs.get("generator")
        where = (
            device if device is not None else getattr(args[0], "device", "cpu") if args else "cpu"
        )
        if generator is not None and on_gpu(where) != on_gpu(generator.device):
            raise RuntimeError(f"expected a generator of {where}, found one of {generator.device}")
        if device is None:
            return func(*args, **kwargs)
        if on_gpu(device):
            kwargs["device"] = "cpu"
        made = func(*args, **kwargs)
        if isinstance(made, PretendTensor) == on_gpu(device) or torch.device(device).type == "meta":
            return made
        return PretendTensor(made.clone()) if on_gpu(device) else unwrap(made).clone()

    def move(self, func, args, kwargs):
        tensor, *rest = args
        given = [x for x in (*rest, kwargs.get("device")) if isinstance(x, (str, torch.device))]
        given += [x.device for x in rest if isinstance(x, torch.Tensor)]
        device = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: CUDA}.get(
            func, given[0] if given else tensor.device
        )
        here = isinstance(tensor, PretendTensor)
        if on_gpu(device) == here:  # another type at most
            return (
                tensor
                if func is not torch.Tensor.to
                else func(
                    tensor, *map(on_cpu, rest), **{name: on_cpu(x) for name, x in kwargs.items()}
                )
            )
        if Graph.now:
            raise RuntimeError(f"a copy to {device}: {CAPTURING}")
        assert not (tensor.requires_grad and torch.is_grad_enabled()), (
            "no gradient passes from device to device here"
        )
        requires_grad, tensor = tensor.requires_grad, tensor.detach()
        dtype = kwargs.get("dtype") or next(
            (x for x in rest if isinstance(x, torch.dtype)), tensor.dtype
        )
        moved = (
            unwrap(tensor).to(dtype, copy=True)
            if here
            else PretendTensor(tensor.to(dtype, copy=True))
        )
        return moved.requires_grad_(requires_grad) if requires_grad else moved


def on_cpu(x):
    return "cpu" if isinstance(x, (str, torch.device)) and on_gpu(x) else x


class Generator(torch.Generator):
    """torch.Generator for either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.where = CUDA if on_gpu(device) else torch.device(device)
        return made

    @property
    def device(self):
        return self.where


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Graph:
    """torch.cuda.CUDAGraph."""

    now = None  # the one that is being recorded
    modes = []  # capture_error_mode of all of them

    def __init__(self):
        self.steps, self.before, self.own = [], {}, set()

    def record(self, func, args, kwargs):
        given = {memory(t) for t in tensors((args, kwargs))}
        for tensor in self.written(func, args, kwargs):
            if memory(tensor) not in self.own | set(
                self.before
            ):  # older than the recording: keep its values
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[memory(tensor)] = whole, whole.clone()
        out = func(*args, **kwargs)
        fresh = [memory(t) not in given for t in tensors(out)]
        self.own |= {memory(t) for t, new in zip(tensors(out), fresh) if new}
        self.steps.append((func, args, kwargs, tensors(out), fresh))
        return out

    @staticmethod
    def written(func, args, kwargs):
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        return [
            t
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
            for t in tensors(given.get(a.name))
        ]

    def replay(self):
        with torch.autocast("cpu", enabled=False):  # what was recorded has its casts in it
            for func, args, kwargs, out, fresh in self.steps:
                for was, new, now in zip(out, fresh, tensors(func(*args, **kwargs))):
                    if new:
                        was.copy_(now)


@contextlib.contextmanager
def graph(recorded, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    Graph.modes.append(capture_error_mode)
    Graph.now = recorded
    try:
        yield
    finally:
        Graph.now = None
        for whole, values in recorded.before.values():
            whole.copy_(values)


PRODUCTS = []  # how exact float32 products were asked to be, one entry a time


class Stream:
    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def pretend(monkeypatch):
    """A context in which torch has one GPU, of 24 GB."""
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__(on_cpu(device_type), *args, **kwargs)

        def __enter__(self):
            was = enabled("cpu")
            entered = super().__enter__()
            self.prev = was  # torch asked for the CPU's, which the pretence calls off
            return entered

    for module, name, value in (
        (torch, "autocast", Autocast),
        (torch, "Generator", Generator),
        (torch, "is_autocast_enabled", lambda kind: on_gpu(kind) and enabled("cpu")),
        (torch, "get_autocast_dtype", lambda kind: dtype("cpu")),
        (torch, "set_float32_matmul_precision", PRODUCTS.append),  # the CPU's must stay as they are
        (torch.__future__, "_overwrite_module_params_on_conversion", True),
        *(
            (torch.cuda, name, value)
            for name, value in dict(
                is_available=lambda: True,
                device_count=lambda: 1,
                current_device=lambda: 0,
                get_device_name=lambda *_: "a pretended GPU",
                synchronize=lambda *_: None,
                Stream=Stream,
                current_stream=lambda *_: Stream(),
                stream=lambda _: contextlib.nullcontext(),
                CUDAGraph=Graph,
                graph=graph,
                mem_get_info=lambda *_: (24 * 10**9, 24 * 10**9),
                memory_reserved=lambda *_: 0,
                memory_allocated=lambda *_: 0,
                max_memory_allocated=lambda *_: 0,
                reset_peak_memory_stats=lambda *_: None,
            ).items()
        ),
    ):
        monkeypatch.setattr(module, name, value)
    Graph.modes.clear()
    PRODUCTS.clear()
    with Device():
        yield

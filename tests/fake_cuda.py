"""A GPU that is not there: tensors on CUDA have shape, dtype and device, but no values; those on the CPU are real.

So whole commands run with `--device cuda`: an operation on tensors of two devices is an error as on a real GPU, and
whatever makes the host wait for the GPU is counted, by the line that does it. What comes back from the GPU is ones.
Left out: kernels and autograd, in whose place every parameter gets an empty gradient.
"""

import contextlib
import linecache
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES = 3  # entries of a bincount that names no number


class FakeCuda(TorchDispatchMode):
    """Sends what concerns CUDA to PyTorch's fake tensors.

    waits: how often a line made the host wait, under the names of the project's functions on the way.
    passed: the names on the way to copies that do not wait, and to the optimiser's update.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.waits = Counter()
        self.passed = set()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((arguments, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        named = [x for x in leaves if isinstance(x, torch.device) and x.type == "cuda"]
        if not named and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return function(*arguments, **kwargs)

        name = function._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":                    # item(), bool(), float(), a tensor as an index
            self.wait()
            return True if tensors[0].dtype == torch.bool else 1
        if name == "bincount":                               # its size is known when the largest value is
            self.wait()
            size = [*arguments[2:], kwargs.get("minlength", 0)][0]
            return torch.empty(size or NUM_CLASSES, dtype=torch.int64, device=tensors[0].device)
        if name.startswith("_fused_sgd_"):                   # has no fake form
            devices = {x.device.type for x in tensors if x is not kwargs["lr"]}
            assert devices == {"cuda"}, f"the optimiser's tensors are on {devices}"
            self.passed |= {name for name, _ in calls()}
            return None
        if name == "convolution":                            # asks CUDA for its fastest algorithm
            assert len({(x.device, x.dtype) for x in tensors}) == 1, "a convolution of unlike tensors"
            with unset_fake_temporarily():
                found = function(*tree_map(shadow, arguments))
            return tensors[0].new_empty(found.shape)
        if "generator" in kwargs:                            # a CPU generator stands for CUDA's
            kwargs["generator"] = None
        if name == "copy_":
            return self.copy(*arguments, **kwargs)
        out = function(*tree_map(self.faked, arguments), **tree_map(self.faked, kwargs))
        if name == "_to_copy" and out.device != tensors[0].device:
            self.cross(tensors[0], out.device, kwargs.get("non_blocking"))
            if out.device.type == "cpu":
                with unset_fake_temporarily():
                    return torch.ones(out.shape, dtype=out.dtype)
        return out

    def faked(self, x):
        """A real tensor as a fake one on the CPU; anything else as it is."""
        real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.fake.from_tensor(x) if real else x

    def copy(self, target, source, non_blocking=False):
        """target.copy_(source), one of them on CUDA at least."""
        assert torch.broadcast_shapes(target.shape, source.shape) == target.shape
        if target.device != source.device:
            self.cross(source, target.device, non_blocking)
        if target.device.type == "cpu":
            with unset_fake_temporarily():
                target.fill_(1)
        return target

    def get(self, x, index):
        """x[index] of a tensor on CUDA. The shape is that of the same on the device `meta`."""
        self.set(x, index)
        with unset_fake_temporarily():
            found = shadow(x)[tree_map(shadow, index)]
        return x.new_empty(found.shape)

    def set(self, x, index, value=None):
        """x[index] = value of a tensor on CUDA: index and value cross to its device."""
        for part in (*tree_leaves(index), value):
            if isinstance(part, torch.Tensor) and part.device != x.device:
                self.cross(part, x.device, non_blocking=False)

    def cross(self, source, device, non_blocking):
        """A copy between host and GPU: the host goes on only if it is asked to and the host's memory is pinned."""
        if non_blocking and device.type == "cuda" and hasattr(source, "pinned"):
            self.passed |= {name for name, _ in calls()}
        else:
            self.wait()

    def wait(self):
        """Count a wait for the innermost line of the project, if it comes from there."""
        if found := calls():
            self.waits[tuple(name for name, _ in found), found[0][1]] += 1


def calls():
    """Where the project stands, from the inside out: (name of the function, file and line) for each of its frames."""
    found = []
    for frame, number in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and (path.parent == ROOT or path.is_relative_to(ROOT / "tests")):
            line = linecache.getline(str(path), number).strip()
            found.append((frame.f_code.co_name, f"{path.name}: {line}"))
    return found


def shadow(x):
    """A tensor's shape and dtype on PyTorch's device `meta`; anything else as it is."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def pin_memory(tensor):
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def give_gradients(optimizer):
    """In place of zero_grad, which the backward pass would follow: empty gradients, on their parameters' devices."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)


class HostGenerator(torch.Generator):
    """Random numbers for a GPU come from no generator here."""

    def __new__(cls, *device):
        return super().__new__(cls, "cpu")


def duplicate(tensor, memo):
    """copy.deepcopy of a fake tensor, which looks for its memory otherwise."""
    new = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    return memo.setdefault(id(tensor), new)


@contextlib.contextmanager
def gpu(monkeypatch, capability=(9, 0)):
    """While this is open, the machine seems to have one GPU. Gives the FakeCuda."""
    mode = FakeCuda()
    save = torch.save
    load = torch.load
    tolist = torch.Tensor.tolist

    def to_host(x):
        return torch.ones(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x

    def fake_load(file, map_location, weights_only):
        with unset_fake_temporarily():
            state = load(file, weights_only=weights_only)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, state)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: capability >= (8, 0))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch, "_has_compatible_shallow_copy_type", lambda *_: False)  # Module.to: new parameters
        patch.setattr(torch, "Generator", HostGenerator)
        patch.setattr(torch, "save", lambda state, file: save(tree_map(to_host, state), file))
        patch.setattr(torch, "load", fake_load)
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.Tensor, "backward", lambda loss: None)
        patch.setattr(torch.optim.Optimizer, "zero_grad", give_gradients)
        patch.setattr(FakeTensor, "__deepcopy__", duplicate, raising=False)
        # what asks the CUDA runtime for its current device before it comes to a fake tensor
        patch.setattr(FakeTensor, "copy_", lambda *both, **how: mode.copy(*both, **how), raising=False)
        patch.setattr(FakeTensor, "__getitem__", lambda x, index: mode.get(x, index), raising=False)
        patch.setattr(FakeTensor, "__setitem__", lambda x, index, value: mode.set(x, index, value), raising=False)
        patch.setattr(FakeTensor, "contiguous", lambda x, **options: x.clone(**options), raising=False)
        patch.setattr(torch.Tensor, "tolist", lambda x: tolist(x.cpu() if isinstance(x, FakeTensor) else x))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)              # autocast records gradients for what it keeps
        try:
            with torch.no_grad(), mode.fake, mode:
                yield mode
        finally:
            torch.set_autocast_cache_enabled(cached)

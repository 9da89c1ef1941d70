"""Networks, their moving average, the machine they run on, and their state on disk.

WRN-28-2 (Zagoruyko & Komodakis 2016) as in the authors' code, the paper's network for CIFAR and
STL-10; smaller siblings for quick runs; torchvision's ResNet-50 for ImageNet-127.
"""

import argparse
import copy
import ctypes
import io
import os
import re
import sys
import zipfile

try:
    import fcntl
except ImportError:  # Windows has no flock; a run there is not guarded against a second process
    fcntl = None

import torch
from torch import nn
from torchvision.models import resnet50


def activation(channels, momentum, eps=1e-5):
    """Batch-norm, then LeakyReLU(0.1). Channels: width of the input."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=eps, momentum=momentum),
                         nn.LeakyReLU(0.1, inplace=True))


class Block(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions and a 1x1 shortcut where shapes change.

    Three ways to feed it, as the authors' code does:
      equal shapes                both: x + branch(activate(x))
      new shape, first group      the shortcut, too, takes the activated input
      new shape, groups 2 and 3   raw x into branch and shortcut. In the authors' code the first
                                  batch-norm is computed here and thrown away; the published
                                  numbers come from networks with this quirk, so we keep the path
                                  and leave out the dead batch-norm.
    """

    def __init__(self, inputs, outputs, stride, first_group, momentum):
        super().__init__()
        self.same_shape = inputs == outputs and stride == 1
        self.activate_both = first_group and not self.same_shape
        self.activate1 = (activation(inputs, momentum) if self.same_shape or first_group
                          else nn.Identity())
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.activate2 = activation(outputs, momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (nn.Identity() if self.same_shape
                         else nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):                                       # (N, inputs, H, W)
        activated = self.activate1(x)
        branch = self.conv2(self.activate2(self.conv1(activated)))
        return self.shortcut(activated if self.activate_both else x) + branch


class WideResNet(nn.Module):
    """Wide residual network: 3x3 stem to 16 channels, three groups of 16, 32, 64 times `width`.

    depth: 6 n + 4 for n blocks a group; width: the multiplier, >= 1; num_classes: K; bn_momentum:
    PyTorch's convention, the weight of the new batch (the authors' 0.001 suits 2^18 steps).
    """

    def __init__(self, depth, width, num_classes, bn_momentum=0.001):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1 or num_classes < 1:
            raise ValueError(f"WRN-{depth}-{width} with {num_classes} classes: the depth must be "
                             "6 n + 4, at least 10, the width and the classes positive")
        blocks, channels = (depth - 4) // 6, 16
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=True)
        layers = []
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(Block(channels, outputs, stride, group == 0, bn_momentum))
                channels = outputs
        self.blocks = nn.Sequential(*layers)
        self.activate = activation(channels, bn_momentum, eps=1e-3)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images):                                  # (N, 3, H, W)
        features = self.activate(self.blocks(self.stem(images)))  # (N, 64 width, H/4, W/4)
        return self.linear(features.mean(dim=(2, 3)))           # (N, K)


def wrn_28_2(num_classes):
    """The paper's network for CIFAR and STL-10: 1,467,434 parameters at K = 10."""
    return WideResNet(28, 2, num_classes)


def build(name, num_classes, bn_momentum=0.001):
    """A network by name, `wrn-<depth>-<width>` or `resnet50`: (N, 3, H, W) -> logits (N, K).

    bn_momentum is for the WRNs; ResNet-50 is torchvision's as it stands. Raises ValueError on
    another name.
    """
    if name == "resnet50":
        return resnet50(num_classes=num_classes)
    match = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,3})", name)
    if not match:
        raise ValueError(f"model {name!r} is unknown; it must be resnet50 or wrn-<depth>-<width>, "
                         "wrn-28-2 for example")
    return WideResNet(int(match[1]), int(match[2]), num_classes, bn_momentum)


class EMA:
    """Exponential moving average of a model's parameters, theta' <- decay theta' + (1-decay) theta.

    Buffers (batch-norm statistics) are copied, not averaged, as in the authors' code. `.model` is
    the averaged network, in evaluation mode; it starts as a copy of `model`. decay: in [0, 1).
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        """Take in the parameters that `model` has after an optimiser step."""
        averages, values = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, values, 1 - self.decay)
        torch._foreach_copy_(list(self.model.buffers()), list(model.buffers()))


def parameter_groups(model, weight_decay):
    """For the optimiser: weights with weight decay, batch-norm and biases (1-d) without."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------ the machine

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on standard error, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def choose_device(name, precision):
    """Settle `auto` and prepare the device: its name and "fp32" or "bf16".

    Raises ValueError when the device is absent.
    bf16 is chosen where the hardware multiplies it natively: recent GPUs, CPUs with AVX512-BF16 or
    AMX. Elsewhere it is emulated, many times slower than fp32.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match or name != "cpu" and int(match[1] or 0) >= gpus:
        raise ValueError(f"--device {name} is not here; there are cpu and {gpus} CUDA devices")
    if name != "cpu":
        name = f"cuda:{match[1] or os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()
    if precision == "auto":
        flags = torch.cpu.get_capabilities()
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if name != "cpu"
                  else flags.get("avx512_bf16") or flags.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    return name, precision


def keep_memory():
    """Let glibc keep freed memory for the next step, instead of mapping and zeroing it anew.

    Its limit for that is 32 MB, and the activations of the paper's batch are larger. Another C
    library stays as it is.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)   # M_MMAP_MAX: no block is mapped on its own
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def compiled(function, choice, device):
    """The function through torch.compile for choice "on", or "auto" with CUDA; else as it is.

    Without a working compiler it stays as it is, too, and one line says so.
    """
    if choice == "off" or choice == "auto" and device.type == "cpu":
        return function
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, Triton or header raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"warning: torch.compile does not work here ({reason}); running eagerly",
              file=sys.stderr)
        return function
    return torch.compile(function)


# ---------------------------------------------------------------------------------- state on disk

def write_whole(path, content):
    """Write bytes to a file whole or not at all: temporary file, flush, fsync, rename.

    Raises OSError when it cannot be done; `path` then is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def previous(path):
    """Where the checkpoint before `path` is kept."""
    return path.with_name("previous-" + path.name)


def hold(directory):
    """Lock a run's directory until this process ends, in whatever way. Returns the open lock.

    Raises ValueError while another process holds it.
    """
    lock = open(directory / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{directory} is in use by another process; wait for it, or name another "
                         "--out") from None
    return lock


def save_checkpoint(path, state):
    """Write a checkpoint; the one before it stays as `previous-<name>`. Raises OSError."""
    content, fresh = io.BytesIO(), path.with_name("new-" + path.name)
    torch.save(state, content)
    write_whole(fresh, content.getbuffer())
    if path.exists():
        os.replace(path, previous(path))
    os.replace(fresh, path)


def load_checkpoint(path):
    """Read a checkpoint with its checksums verified: tensors, numbers and strings only, no code.

    Returns None when there is none. Takes the previous one when a kill came between the two renames
    of save_checkpoint. Raises ValueError, with what to do, when it is damaged or not a checkpoint.
    """
    if not path.exists():
        if not previous(path).exists():
            return None
        path = previous(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not verify the checksums
            broken = archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"wrong checksum in {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        offer = (f"go back to the previous one with: mv {previous(path)} {path}"
                 if previous(path).exists() else "there is no previous one")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"checkpoint {path} is damaged or unsafe ({reason}); {offer}; or start "
                         "over with --fresh") from None

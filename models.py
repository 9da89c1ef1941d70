"""Networks and their moving average; the device they run on; files written whole.

WRN-28-2 (Zagoruyko & Komodakis 2016) as in the authors' code, the paper's network for CIFAR and
STL-10; smaller siblings for quick runs; torchvision's ResNet-50 for ImageNet-127.
"""

import copy
import fcntl
import io
import os
import re
import zipfile

import torch
from torch import nn
from torchvision.models import resnet50


def activation(channels, momentum, eps=1e-5):
    """Batch-norm, then LeakyReLU(0.1)."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=eps, momentum=momentum),
                         nn.LeakyReLU(0.1, inplace=True))


class Block(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions and a 1x1 shortcut where shapes change.

    Where shapes change, the first group activates the input of both branches, and groups 2 and 3
    feed it raw to both. In the authors' code the first batch-norm is computed there and thrown
    away; the published numbers come from networks with this quirk: same path, no dead batch-norm.
    """

    def __init__(self, inputs, outputs, stride, first_group, momentum):
        super().__init__()
        self.same_shape = inputs == outputs and stride == 1
        self.activate_both = first_group and not self.same_shape
        raw = not self.same_shape and not first_group
        self.activate1 = nn.Identity() if raw else activation(inputs, momentum)
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

    depth: 6 n + 4 for n blocks a group; bn_momentum: weight of the new batch, PyTorch's convention.
    """

    def __init__(self, depth, width, num_classes, bn_momentum=0.001):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"--model wrn-{depth}-{width}: depth 10, 16, 22 ..., width 1, 2, ...")
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
            if isinstance(module, nn.Conv2d):  # gain sqrt 2, the stem's bias as PyTorch draws it
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images):                                  # (N, 3, H, W)
        features = self.activate(self.blocks(self.stem(images)))  # (N, 64 width, H/4, W/4)
        return self.linear(features.mean(dim=(2, 3)))           # (N, K)


def wrn_28_2(num_classes):
    """The paper's network for CIFAR and STL-10: 1,467,434 parameters at K = 10."""
    return WideResNet(28, 2, num_classes)


def build(name, num_classes, bn_momentum=0.001):
    """A network by name, `wrn-<depth>-<width>` or torchvision's `resnet50`, or ValueError."""
    if name == "resnet50":
        return resnet50(num_classes=num_classes)
    match = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,3})", name)
    if not match:
        raise ValueError(f"--model {name!r} must be resnet50 or wrn-<depth>-<width>, as wrn-28-2")
    return WideResNet(int(match[1]), int(match[2]), num_classes, bn_momentum)


class EMA:
    """Exponential moving average of a model's parameters, theta' <- decay theta' + (1-decay) theta.

    Buffers are copied, not averaged, as in the authors' code. `.model` is the averaged network.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        """Take in the parameters that `model` has after an optimiser step."""
        torch._foreach_lerp_([*self.model.parameters()], [*model.parameters()], 1 - self.decay)
        torch._foreach_copy_([*self.model.buffers()], [*model.buffers()])


def parameter_groups(model, weight_decay):
    """For the optimiser: weights with weight decay, batch-norm and biases (1-d) without."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def choose_device(name, precision):
    """Settle `auto`: a device's name, and bf16 where its hardware has it. ValueError if absent."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = "cuda:0" if name == "cuda" or name == "auto" and gpus else name.replace("auto", "cpu")
    if name not in ["cpu", *gpus]:
        raise ValueError(f"--device {name} is not here; there are {', '.join(['cpu', *gpus])}")
    if name == "cpu":
        flags = torch.cpu.get_capabilities()
        native = flags.get("avx512_bf16") or flags.get("amx_bf16")
    else:
        torch.backends.cudnn.benchmark = True
        native = torch.cuda.get_device_capability(name) >= (8, 0)
    return name, ("bf16" if native else "fp32") if precision == "auto" else precision


def place(sets, device):
    """A data set on the device; unlabeled images beyond half of a GPU's memory stay pinned."""
    moved = {name: part.to(device) for name, part in sets._asdict().items()
             if torch.is_tensor(part) and name != "unlabeled"}
    fits = device.type == "cpu" or sets.unlabeled.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    unlabeled = sets.unlabeled.to(device) if fits else sets.unlabeled.pin_memory()
    return sets._replace(unlabeled=unlabeled, **moved)


def hold(directory):
    """Lock a directory until this process ends. Returns the lock; ValueError while it is held."""
    lock = open(directory / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{directory} is in use by another process; name another --out") from None
    return lock


def write_whole(path, write):
    """Fill a file by write(open file), whole or not at all; what it raises leaves it as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path, device="cpu"):
    """A checkpoint or None, its checksums verified, without running code. ValueError on damage."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not verify the checksums
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in {broken}")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or unsafe ({reason}); see --fresh") from None

"""Networks, their moving average, and the optimiser.

WRN-28-2 (Zagoruyko & Komodakis 2016) as in the authors' code, the paper's network for CIFAR and
STL-10; smaller siblings for quick runs; torchvision's ResNet-50 for ImageNet-127.
"""

import copy
import re

import torch
from torch import nn
from torchvision.models import resnet50


def activation(channels, eps=1e-5):
    """Batch-norm, then LeakyReLU(0.1)."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=eps), nn.LeakyReLU(0.1, inplace=True))


class Block(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions and a shortcut.

        input and output shape    what the branch takes    what the shortcut takes
        equal                     activated input          input, as it is
        differ, first group       activated input          activated input, 1x1 convolution
        differ, groups 2 and 3    input                    input, 1x1 convolution

    The last row is a quirk of the authors' code: it computes the first batch-norm there and throws
    it away. The published numbers come from such networks: same path here, without the dead layer.
    """

    def __init__(self, inputs, outputs, stride, first_group):
        super().__init__()
        differ = inputs != outputs or stride != 1
        self.shortcut_takes_activated = differ and first_group
        quirk = differ and not first_group
        self.activate1 = nn.Identity() if quirk else activation(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.activate2 = activation(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False) if differ
                         else nn.Identity())

    def forward(self, x):                                       # (N, inputs, H, W)
        activated = self.activate1(x)
        branch = self.conv2(self.activate2(self.conv1(activated)))
        if self.shortcut_takes_activated:
            x = activated
        return self.shortcut(x) + branch                        # (N, outputs, H/stride, W/stride)


class WideResNet(nn.Module):
    """Wide residual network: 3x3 stem to 16 channels, three groups of 16, 32, 64 times `width`.

    depth: 6 n + 4 for n blocks a group. Raises ValueError for another depth or a width below 1.
    """

    def __init__(self, depth, width, num_classes):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"no wrn-{depth}-{width}: depth is 10, 16, 22, ..., width 1, 2, ...")
        blocks = []
        channels = 16
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=True)
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range((depth - 4) // 6):
                stride = 2 if group > 0 and place == 0 else 1
                blocks.append(Block(channels, outputs, stride, group == 0))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.activate = activation(channels, eps=1e-3)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # gain sqrt 2, the stem's bias as PyTorch draws it
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images):                                  # (N, 3, H, W)
        features = self.activate(self.blocks(self.stem(images)))  # (N, 64 width, H/4, W/4)
        return self.linear(features.mean(dim=(2, 3)))           # (N, K)


def build(name, num_classes, bn_momentum=0.001):
    """A network by name: `wrn-<depth>-<width>` or torchvision's `resnet50`.

    bn_momentum: of every batch-norm, the weight of the new batch. Raises ValueError.
    """
    match = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,3})", name)
    if match:
        model = WideResNet(int(match[1]), int(match[2]), num_classes)
    elif name == "resnet50":
        model = resnet50(num_classes=num_classes)
    else:
        raise ValueError(f"no model {name!r}: resnet50 or wrn-<depth>-<width>, as wrn-28-2")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = bn_momentum
    return model


class EMA:
    """Exponential moving average of a network's parameters, theta' <- d theta' + (1 - d) theta.

    decay: d in [0, 1). Buffers (batch-norm's statistics) are copied, not averaged, as in the
    authors' code. `.model` is the averaged network, in evaluation mode; its state is the EMA's.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.state_dict = self.model.state_dict
        self.load_state_dict = self.model.load_state_dict

    @torch.no_grad()
    def update(self, model):
        """Take in the parameters and buffers that `model` has after an optimiser step."""
        # a line is a loop over pairs of tensors: average.lerp_(new, 1 - decay), average.copy_(new)
        torch._foreach_lerp_([*self.model.parameters()], [*model.parameters()], 1 - self.decay)
        torch._foreach_copy_([*self.model.buffers()], [*model.buffers()])


def optimizer(model, lr, weight_decay):
    """SGD with Nesterov momentum 0.9; no weight decay on batch-norm and biases, which are 1-d."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others}]
    on_gpu = weights[0].is_cuda
    fast = {"fused": on_gpu, "foreach": not on_gpu}
    sgd = torch.optim.SGD(groups, torch.tensor(lr), momentum=0.9, nesterov=True, **fast)
    # a checkpoint brings the flags of the machine it was written on: those of this one stay
    sgd.register_load_state_dict_post_hook(
        lambda sgd: [group.update(fast) for group in sgd.param_groups])
    return sgd

"""models.py: WRN-28-2 as the paper has it, networks by name, the optimiser's groups."""

import pytest
import torch
from torch import nn

import models


@pytest.fixture(scope="module")
def wrn():
    torch.manual_seed(0)
    return models.build("wrn-28-2", 10)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_wrn_28_2_has_the_papers_parameters_and_its_head_alone_grows_with_the_classes(wrn):
    assert count(wrn) == 1_467_434
    assert count(models.build("wrn-28-2", 100)) == 1_467_434 + 90 * 129


def test_the_layers_are_the_papers(wrn):
    convolutions = [m for m in wrn.modules() if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convolutions] == [True] + [False] * 27
    assert len(wrn.blocks) == 12 and [wrn.blocks[i].conv2.out_channels for i in (0, 4, 8)] == [32, 64, 128]
    assert [c.stride for c in convolutions].count((2, 2)) == 4  # two of the convolutions, two shortcuts
    assert wrn.stem.out_channels == 16 and wrn.linear.in_features == 128
    norms = [m for m in wrn.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {n.momentum for n in norms} == {0.001}
    assert [n.eps for n in norms] == [1e-5] * (len(norms) - 1) + [1e-3]
    assert len(norms) == 12 * 2 - 2 + 1  # two blocks have no first batch-norm: the quirk
    assert {m.negative_slope for m in wrn.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_the_quirk_raw_input_feeds_both_branches_in_groups_two_and_three(wrn):
    """Against the block written out with plain functions, for the three kinds of block."""
    def active(norm_and_relu, x):
        return nn.functional.leaky_relu(norm_and_relu[0](x), 0.1)

    torch.manual_seed(1)
    wrn.eval()
    for index, channels in ((0, 16), (1, 32), (4, 32), (8, 64)):
        block = wrn.blocks[index]
        x = torch.randn(2, channels, 8, 8)
        if index == 0:    # activated before the branches part
            a = active(block.activate1, x)
            expected = block.shortcut(a) + block.conv2(active(block.activate2, block.conv1(a)))
        elif index == 1:  # the ordinary pre-activation block
            expected = x + block.conv2(active(block.activate2, block.conv1(active(block.activate1, x))))
        else:             # raw
            expected = block.shortcut(x) + block.conv2(active(block.activate2, block.conv1(x)))
        torch.testing.assert_close(block(x.clone()), expected)


def test_initialisation(wrn):
    scaled = torch.cat([m.weight.flatten() * (m.out_channels * m.kernel_size[0] ** 2) ** 0.5  # by the fan-out
                        for m in wrn.modules() if isinstance(m, nn.Conv2d)])
    assert scaled.square().mean().item() == pytest.approx(2, rel=0.004)  # the gain of slope 0
    assert wrn.linear.weight.std().item() == pytest.approx((2 / (128 + 10)) ** 0.5, rel=0.1)
    assert wrn.linear.bias.abs().sum() == 0
    bound = (3 * 9) ** -0.5  # PyTorch draws the stem's bias from U(-1 / sqrt fan-in, 1 / sqrt fan-in)
    stems = torch.cat([models.build("wrn-10-1", 2).stem.bias.detach() for _ in range(50)])
    assert stems.abs().max() <= bound and stems.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


@pytest.mark.parametrize("name, K, size", [
    ("wrn-10-1", 7, 16), ("wrn-10-1", 7, 28), ("wrn-16-2", 2, 40), ("wrn-10-1", 1000, 96), ("resnet50", 127, 64)])
def test_a_network_takes_any_size_and_number_of_classes_and_has_the_momentum_asked_for(name, K, size):
    model = models.build(name, K, bn_momentum=0.07)
    assert model(torch.randn(2, 3, size, size)).shape == (2, K)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.07}


@pytest.mark.parametrize("name", ["resnet51", "wrn-28", "wrn-27-2", "wrn-4-1", "wrn-28-0", "", "wrn-28-2x"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(ValueError):
        models.build(name, 10)


def test_weight_decay_spares_batch_norm_and_biases(wrn):
    decayed, spared = models.optimizer(wrn, 0.03, 5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4 and spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 4} and {p.ndim for p in spared["params"]} == {1}
    assert sum(p.numel() for g in (decayed, spared) for p in g["params"]) == count(wrn)


def test_a_checkpoint_of_another_machine_leaves_this_ones_way_to_step():
    """fused is for a GPU; on a CPU it would meet a scaler that it does not take."""
    sgd = models.optimizer(nn.Linear(3, 2), 0.03, 5e-4)
    state = sgd.state_dict()
    for group in state["param_groups"]:
        group.update(fused=True, foreach=False, lr=torch.tensor(0.5))
    sgd.load_state_dict(state)
    assert all((group["fused"], group["foreach"]) == (False, True) for group in sgd.param_groups)
    assert all(group["lr"] == 0.5 for group in sgd.param_groups)

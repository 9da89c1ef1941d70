"""models.py: WRN-28-2 as the paper has it, the moving average, and state on disk."""

import collections
import os
import pickle

import pytest
import torch
from torch import nn

import models


@pytest.fixture(scope="module")
def wrn():
    torch.manual_seed(0)
    return models.wrn_28_2(10)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_wrn_28_2_has_the_papers_parameters(wrn):
    assert count(wrn) == 1_467_434


def test_the_head_alone_grows_with_the_classes(wrn):
    assert count(models.wrn_28_2(100)) - count(wrn) == 90 * 129


def test_the_layers_are_the_papers(wrn):
    convolutions = [m for m in wrn.modules() if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convolutions] == [True] + [False] * 27
    assert len(wrn.blocks) == 12 and [wrn.blocks[i].conv2.out_channels for i in (0, 4, 8)] == [32, 64, 128]
    assert [c.stride for c in convolutions].count((2, 2)) == 4  # two of the convolutions, two shortcuts
    assert wrn.stem.out_channels == 16 and wrn.linear.in_features == 128


def test_batch_norm_and_activation_settings(wrn):
    norms = [m for m in wrn.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [n.eps for n in norms] == [1e-5] * (len(norms) - 1) + [1e-3]
    assert {n.momentum for n in norms} == {0.001}
    assert len(norms) == 12 * 2 - 2 + 1  # two blocks have no first batch-norm: the quirk
    assert {m.negative_slope for m in wrn.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_the_quirk_raw_input_feeds_both_branches_in_groups_two_and_three(wrn):
    """Against the block written out with plain functions, for the three kinds of block."""
    def active(norm_and_relu, x):
        return nn.functional.leaky_relu(norm_and_relu[0](x), 0.1)

    torch.manual_seed(1)
    wrn.eval()
    for index, channels in ((0, 16), (1, 32), (4, 32), (8, 64)):
        block, x = wrn.blocks[index], torch.randn(2, channels, 8, 8)
        if index == 0:    # activated before the branches part
            a = active(block.activate1, x)
            expected = block.shortcut(a) + block.conv2(active(block.activate2, block.conv1(a)))
        elif index == 1:  # the ordinary pre-activation block
            expected = x + block.conv2(active(block.activate2, block.conv1(active(block.activate1, x))))
        else:             # raw
            expected = block.shortcut(x) + block.conv2(active(block.activate2, block.conv1(x)))
        torch.testing.assert_close(block(x.clone()), expected)


def test_initialisation():
    torch.manual_seed(0)
    model = models.wrn_28_2(10)
    scaled = torch.cat([m.weight.flatten() * (m.out_channels * m.kernel_size[0] ** 2) ** 0.5  # by the fan-out
                        for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert scaled.square().mean().item() == pytest.approx(2, rel=0.004)  # the gain of slope 0
    assert model.linear.weight.std().item() == pytest.approx((2 / (128 + 10)) ** 0.5, rel=0.1)
    assert model.linear.bias.abs().sum() == 0
    bound = (3 * 9) ** -0.5  # PyTorch draws the stem's bias from U(-1 / sqrt fan-in, 1 / sqrt fan-in)
    stems = torch.cat([models.build("wrn-10-1", 2).stem.bias.detach() for _ in range(50)])
    assert stems.abs().max() <= bound and stems.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


@pytest.mark.parametrize("size", [16, 28, 32, 64, 96])
def test_images_of_any_size_give_logits(size):
    assert models.build("wrn-10-1", 7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_224_pixels_and_resnet50_and_k_2_and_k_1000():
    assert models.build("wrn-10-1", 1000)(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert models.build("resnet50", 127).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 127)
    assert models.build("wrn-16-2", 2)(torch.randn(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("name", ["resnet51", "wrn-28", "wrn-27-2", "wrn-4-1", "wrn-28-0", "", "wrn-28-2x"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(ValueError):
        models.build(name, 10)


def test_the_average_follows_a_hand_computed_sequence():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    nn.init.constant_(model[0].weight, 1.0)
    average = models.EMA(model, decay=0.9)
    for value, expected in ((2.0, 1.1), (3.0, 1.29), (-1.0, 1.061)):
        nn.init.constant_(model[0].weight, value)
        average.update(model)
        assert average.model[0].weight.item() == pytest.approx(expected)


def test_the_averages_buffers_are_copies():
    model = nn.BatchNorm1d(3)
    average = models.EMA(model, decay=0.9)
    model(torch.randn(20, 3) * 5 + 7)
    average.update(model)
    assert torch.equal(average.model.running_mean, model.running_mean)
    assert average.model.num_batches_tracked == 1 and not average.model.training


def test_weight_decay_spares_batch_norm_and_biases(wrn):
    decayed, spared = models.parameter_groups(wrn, 5e-4)
    assert decayed["weight_decay"] == 5e-4 and spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 4} and {p.ndim for p in spared["params"]} == {1}
    assert sum(p.numel() for g in (decayed, spared) for p in g["params"]) == count(wrn)


# ---------------------------------------------------------------------------------- state on disk

def save(path, state):
    models.write_whole(path, lambda file: torch.save(state, file))


def test_a_checkpoint_comes_back_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert models.load_checkpoint(path) is None
    for step in (1, 2):
        save(path, {"step": step, "tensor": torch.arange(4)})
    assert models.load_checkpoint(path)["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = b""
    elif how == "truncated":
        content = content[:len(content) // 2]
    else:
        content[content.index(b"\x07" * 64) + 5] ^= 1  # inside the tensor's own bytes
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "truncated", "bit-flipped"])
def test_a_damaged_checkpoint_is_refused_by_name_with_what_to_do(tmp_path, how):
    path = tmp_path / "checkpoint.pt"
    save(path, {"tensor": torch.full((1000,), 7, dtype=torch.uint8)})
    damage(path, how)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged.*--fresh") as error:
        models.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "checkpoint.pt"
    torch.save({"step": Evil()}, path)
    with pytest.raises(ValueError, match="damaged or unsafe"):
        models.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged or unsafe"):
        models.load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    models.write_whole(path, lambda file: file.write(b"old"))

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        models.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_a_directory_is_held_by_one_process_at_a_time(tmp_path):
    first = models.hold(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        models.hold(tmp_path)
    first.close()
    models.hold(tmp_path).close()


def test_bf16_is_not_chosen_where_the_processor_emulates_it(monkeypatch):
    for flags, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        assert models.choose_device("cpu", "auto") == ("cpu", expected)
    assert models.choose_device("cpu", "bf16") == ("cpu", "bf16")


def test_what_does_not_fit_half_of_a_gpu_stays_on_the_host(monkeypatch):
    """The meta device stands for a GPU with 1,000 bytes free: a tensor that was moved there cannot be read."""
    parts = dict(labels=torch.zeros(3), unlabeled=torch.zeros(50, dtype=torch.uint8), test=torch.zeros(2))
    Sets = collections.namedtuple("Sets", parts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    assert {p.device.type for p in models.place(Sets(**parts), torch.device("meta"))} == {"meta"}
    large = models.place(Sets(**parts | {"unlabeled": torch.zeros(501, dtype=torch.uint8)}), torch.device("meta"))
    assert [p.device.type for p in large] == ["meta", "cpu", "meta"]


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda:x", ""])
def test_an_absent_device_is_refused(name):
    with pytest.raises(ValueError, match="--device"):
        models.choose_device(name, "fp32")

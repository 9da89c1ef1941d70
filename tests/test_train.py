"""train.py: the family's table, the step, a small run of every method, the command line, precision and devices."""

import math

import pytest
import torch

import data
import fake_cuda
import soak
import train
from conftest import coloured_classes, parse, raises, result_of, rows, small_sets
from losses import METHODS, complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import alpha_schedule, kl_divergence, smooth

Q_HAT = torch.arange(1, 11) / 55
ALPHA = 0.6        # 1 - 0.9 (1000 / 1500)^2
TEMPERATURE = 1.3


# -------------------------------------------------------------------------------------- the family

def a_run(method="adello", *arguments):
    """A run after the warm-up, with a known alpha, Qhat and T, and a batch of it."""
    config = parse("--batch-size", 8, "--method", method, "--steps", 1500, "--warmup-steps", 300, "--device", "cpu",
                   "--precision", "fp32", *arguments)
    run = train.Run(config, small_sets())
    run.t = 1000
    run.estimator.q_hat.copy_(Q_HAT)
    run.estimator.temperature.fill_(TEMPERATURE)
    return run, run.batch()


def gives(run, batch, spread=3.0):
    """Let the network give fixed random logits, large enough that some are confident: (f_x, f_w, f_W)."""
    sizes = [len(batch[1]), len(batch[2]), len(batch[2])]
    logits = spread * torch.randn(sum(sizes), 10, generator=torch.Generator().manual_seed(0))
    run.network = lambda images: logits.clone().requires_grad_()
    return logits.split(sizes)


@pytest.mark.parametrize("method, p_labeled, source, target, soft", [
    ("supervised", None, None, None, None), ("fixmatch", None, None, None, None),
    ("ccr", None, None, None, "rest"), ("udal", "P", "Qhat", "P", None), ("flexda", "P", "Qhat", "Qhat", None),
    ("adello", "P", "Qhat", "Qhat", "rest"), ("kd", "P", "Qhat", "Qhat", "all"), ("oracle", "P", "Qhat", "Q", "rest")])
def test_every_method_is_the_papers_row_of_priors(method, p_labeled, source, target, soft):
    """The table of the paper written out, against the losses that the step returns."""
    run, batch = a_run(method)
    f_x, f_w, f_s = gives(run, batch)
    q = {None: None, "P": run.p_labeled, "Qhat": Q_HAT, "Q": run.q_true}
    q_alpha = smooth(q[target], ALPHA) if target else None
    p = f_w.softmax(1)
    mask = confidence_mask(p)
    expected = {"loss_s": supervised_loss(f_x, batch[1], q[p_labeled], q_alpha), "loss_u": 0, "loss_uc": 0}
    if method != "supervised":
        assert 0 < mask.sum() < len(mask) == 16
        expected["loss_u"] = consistency_loss(f_s, p, mask, q[source], q_alpha)
    if soft:
        of_l_u = mask if soft == "rest" else torch.zeros(16)
        expected["loss_uc"] = complementary_loss(f_s, p, of_l_u, q[source], q_alpha, TEMPERATURE)
    found = run.step(*batch)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(float(value), rel=1e-5), name


# ---------------------------------------------------------------------------------------- the step

def test_the_network_sees_labeled_weak_and_strong_views_normalised_in_this_order():
    run, batch = a_run()
    labeled, _, unlabeled, _, draws = batch
    seen = []
    network = run.network
    run.network = lambda images: seen.append(images) or network(images)
    run.step(*batch)
    views = torch.cat([data.weak(torch.cat([labeled, unlabeled]), draws[:, :3]), data.strong(unlabeled, draws[8:, 3:])])
    torch.testing.assert_close(seen[0].contiguous(), (views / 255 - 0.5) / 0.25)  # the statistics of shapes


def test_a_step_returns_the_share_of_confident_images_and_the_share_of_those_that_are_right():
    run, batch = a_run()
    _, f_w, _ = gives(run, batch)
    hidden = f_w.argmax(1)
    hidden[5:] = (hidden[5:] + 1) % 10  # the first five are right
    mask = f_w.softmax(1).amax(1) >= 0.95
    assert 0 < mask[:5].sum() < 5 and 0 < mask[5:].sum() < 11
    found = run.step(*batch[:3], hidden, batch[4])
    assert found["mask_rate"].item() == mask.sum().item() / 16
    assert found["right_rate"].item() == mask[:5].sum().item() / 16


def test_the_first_ccr_step_has_the_log_ratios_of_the_estimate_before_it_and_the_temperature_after_it():
    run, batch = a_run("adello", "--warmup-steps", "1000", "--prior-momentum", "0.9")
    _, f_w, f_s = gives(run, batch)
    p = f_w.softmax(1)
    after = 0.9 * Q_HAT + 0.1 * p.mean(0)
    temperature = kl_divergence(torch.full((10,), 0.1), after).exp().item()
    found = run.step(*batch)
    assert run.estimator.temperature.item() == pytest.approx(temperature, rel=1e-6)
    expected = complementary_loss(f_s, p, confidence_mask(p), Q_HAT, smooth(Q_HAT, ALPHA), temperature)
    assert found["loss_uc"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_learns_from_no_hidden_label():
    first, batch = a_run()
    second, _ = a_run()
    first.step(*batch)
    second.step(*batch[:3], torch.full((16,), -1), batch[4])
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters()))


def test_the_gradient_is_of_the_sum_of_the_three_losses():
    run, batch = a_run()
    logits = torch.cat(gives(run, batch)).requires_grad_()
    run.network = lambda images: logits
    run.step(*batch)
    leaf = logits.detach().requires_grad_()
    f_x, f_w, f_s = leaf.split([8, 16, 16])
    p = f_w.detach().softmax(1)
    mask = confidence_mask(p)
    q_alpha = smooth(Q_HAT, ALPHA)
    (supervised_loss(f_x, batch[1], run.p_labeled, q_alpha)
     + consistency_loss(f_s, p, mask, Q_HAT, q_alpha)
     + complementary_loss(f_s, p, mask, Q_HAT, q_alpha, TEMPERATURE)).backward()
    torch.testing.assert_close(logits.grad, leaf.grad)
    assert logits.grad[8:24].abs().sum() == 0  # the weak views teach and do not learn


@pytest.mark.parametrize("size, batch", [(100, 10), (103, 10), (7, 20), (1, 3), (20, 20)])
def test_every_image_comes_once_an_epoch(size, batch):
    chain = torch.cat([data.batch_indices(size, batch, step, 0, "labeled") for step in range(4 * size // batch + 2)])
    for epoch in range(len(chain) // size):
        assert sorted(chain[epoch * size:(epoch + 1) * size].tolist()) == list(range(size))


# ---------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_writes_its_files(train_small, tmp_path, method):
    words = "--method", method, "--steps", 2, "--eval-every", 1
    assert train_small(*words, "--out", "run") == 0
    _, last = found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2]
    assert math.isfinite(last["loss_s"]) and last["alpha"] == pytest.approx(0.1)
    assert last["mask_rate"] > 0 or last["loss_u"] == 0
    assert (last["loss_uc"] > 0) == (method in ("ccr", "adello", "kd", "oracle"))
    result = result_of(tmp_path / "run")
    assert sum(result["q_hat"]) == pytest.approx(1, abs=1e-5) and 0 <= result["ece"] <= 1
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files - {".lock"} == {"config.json", "log.csv", "checkpoint.pt", "result.json"}


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_schedule_and_the_frozen_temperature(warmup, train_small, tmp_path):
    """T is 1 before the warm-up, exp KL(uniform || Qhat) at its end, and never changes again."""
    words = "--warmup-steps", warmup, "--lr", 0.05, "--steps", 4, "--eval-every", 1
    assert train_small(*words, "--out", "run") == 0
    found = rows(tmp_path / "run")
    expected = math.exp(found[warmup]["kl_uniform_qhat"])  # Qhat with the first CCR step's p(u)
    assert expected > 1.0001
    after = 4 - warmup
    assert [row["temperature"] for row in found] == pytest.approx([1] * warmup + [expected] * after, rel=1e-5)
    assert [row["loss_uc"] > 0 for row in found] == [False] * warmup + [True] * after
    for row in found:
        assert row["alpha"] == pytest.approx(alpha_schedule(int(row["step"]), 4))
        cosine = math.cos(7 * math.pi * (row["step"] - 1) / 64)
        assert row["lr"] == pytest.approx(0.05 * cosine, rel=1e-5)


def test_a_row_of_the_log_holds_the_means_since_the_row_before(train_small, tmp_path):
    """The steps' own numbers, by a step of one's own; rows are of steps 1 to 4, and 5 and 6."""
    seen = []

    class Watched(train.Run):
        def step(self, *batch):
            seen.append(super().step(*batch))
            return seen[-1]
    assert train_small("--warmup-steps", 2, "--eval-every", 4, "--threshold", 0.3, "--out", "run", kind=Watched) == 0
    first, second = rows(tmp_path / "run")
    assert (first["step"], second["step"]) == (4, 6)
    for name in ("loss_s", "loss_u", "loss_uc", "mask_rate"):
        values = [step[name].item() for step in seen]
        assert first[name] == pytest.approx(sum(values[:4]) / 4, rel=1e-5)
        assert second[name] == pytest.approx(sum(values[4:]) / 2, rel=1e-5)


@pytest.mark.parametrize("mask_rate, right_rate, accuracy", [(0.5, 0.4, 0.8), (0.0, 0.0, math.nan)])
def test_pseudo_label_accuracy_is_the_share_of_right_ones_among_the_confident(mask_rate, right_rate, accuracy):
    told = {"mask_rate": torch.tensor(mask_rate), "right_rate": torch.tensor(right_rate)}
    run = train.Run(parse("--steps", 1, "--device", "cpu"), small_sets())
    run.step = lambda *batch: told
    train.train(run, None)
    assert run.rows[0]["pseudo_label_accuracy"] == pytest.approx(accuracy, nan_ok=True)


def test_a_run_learns_to_tell_the_classes_by_their_colour(train_small, tmp_path):
    """Chance is a third."""
    assert train_small("--steps", 20, "--lr", 0.1, "--eval-every", 10, "--out", "run") == 0
    first, last = rows(tmp_path / "run")
    assert last["loss_s"] < first["loss_s"] and last["balanced_accuracy"] > 0.8


@pytest.mark.parametrize("words", [
    "--steps 1 --image-size 28", "--image-size 64 --batch-size 2 --steps 2",
    "--n1 1 --imb 1 --m1 1 --mu 7 --steps 2", "--batch-size 100 --threshold 1.0 --steps 2 --eval-every 1000"])
def test_edges_that_must_work(words, train_small, tmp_path):
    assert train_small(*words.split(), "--out", "run") == 0
    result = result_of(tmp_path / "run")
    assert math.isfinite(result["nll"]) and sum(result["q_hat"]) == pytest.approx(1, abs=1e-5)
    assert rows(tmp_path / "run")[-1]["step"] == result["step"]


def test_random_settings_train_or_end_in_one_line(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = [soak.check(seed, image_folder, tmp_path) for seed in range(12)]
    assert "trained" in seen and "refused" in seen


def test_a_fraction_of_a_naturally_long_tailed_folder_has_its_priors_and_their_divergence(
        train_small, tmp_path, capsys):
    coloured_classes(tmp_path / "data", {"train": [40, 20, 8], "test": 2})
    words = "--data-dir", "data", "--labeled-fraction", 0.25, "--steps", 2
    assert train_small(*words, split=()) == 0
    assert "17 labeled, 68 unlabeled images" in capsys.readouterr().out
    result = result_of(tmp_path / "runs/folder-adello-natural-s0")
    assert result["p_labeled"] == pytest.approx([10 / 17, 5 / 17, 2 / 17])
    q_true = [40 / 68, 20 / 68, 8 / 68]
    assert result["q_true"] == pytest.approx(q_true)
    kl = sum(q * math.log(q / q_hat) for q, q_hat in zip(q_true, result["q_hat"]))
    assert result["kl_q_qhat"] == pytest.approx(kl, abs=1e-6)


def test_what_is_unknown_is_null_and_the_mean_is_over_the_classes_with_test_images(train_small, tmp_path, capsys):
    """Images of unknown class have no true prior; the bees have no test images."""
    coloured_classes(tmp_path / "data", {"train": 20, "test": [4, 0, 4], "unlabeled": 5})
    words = "--data-dir", "data", "--labeled-fraction", 0.2, "--threshold", 0.34, "--steps", 2
    assert train_small(*words, "--out", "run", split=()) == 0
    assert "nan" not in capsys.readouterr().out
    row = rows(tmp_path / "run")[-1]
    assert math.isnan(row["kl_q_qhat"]) and math.isnan(row["pseudo_label_accuracy"])
    assert row["kl_uniform_qhat"] > 0 and row["mask_rate"] > 0
    result = result_of(tmp_path / "run")
    assert result["kl_q_qhat"] is None and result["q_true"] is None
    ant, bee, cat = result["per_class_accuracy"]
    assert bee is None and result["balanced_accuracy"] == pytest.approx((ant + cat) / 2)


# ---------------------------------------------------------------------------------- the command line

PAPER = dict(n1=1500, m1=3000, shift="consistent", steps=262144, batch_size=64, mu=2, lr=0.03, weight_decay=5e-4,
             ema=0.999, prior_momentum=0.999, warmup_steps=50000, eval_every=1024, alpha_min=0.1, d=2, threshold=0.95,
             model="wrn-28-2", image_size=32)


@pytest.mark.parametrize("words, expected", [
    ("", dict(dataset="shapes", method="adello", shift="reversed", imb=50, out="runs/shapes-adello-reversed-imb50-s0")),
    ("--shift consistent", dict(out="runs/shapes-adello-consistent-imb50-s0")),
    ("--imb-u 10", dict(imb_u=10, shift=None, out="runs/shapes-adello-imbu10-imb50-s0")),
    ("--imb-u 0.02", dict(imb_u=0.02, shift=None, out="runs/shapes-adello-imbu0.02-imb50-s0")),
    ("--dataset cifar10", {**PAPER, "imb": 100}),
    ("--dataset cifar10 --imb 150 --shift uniform --seed 4", dict(out="runs/cifar10-adello-uniform-imb150-s4")),
    ("--dataset cifar10 --steps 2622", dict(warmup_steps=500)),  # a like share
    ("--dataset cifar100", {**PAPER, "n1": 150, "m1": 300, "imb": 50}),
    ("--dataset stl10", {**PAPER, "n1": 150, "m1": None, "imb": 20, "warmup_steps": 0, "shift": None}),
    ("--dataset folder", {**PAPER, "labeled_fraction": 0.1, "n1": None, "m1": None, "imb": None, "shift": None})])
def test_the_presets_are_the_papers_and_a_run_is_named_by_what_it_trains_on(words, expected):
    config = parse(*words.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_was_typed_is_told_from_what_was_not():
    assert set(train.parse(["--seed", "0", "--fresh"])[1]) == {"seed", "fresh"}


# ------------------------------------------------------------------------------- precision and devices

def one_step(precision):
    """The loss of a step, and what it adds to the weights."""
    run, batch = a_run("adello", "--precision", precision)
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    found = run.step(*batch)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return sum(found[name].item() for name in ("loss_s", "loss_u", "loss_uc")), after - before


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_in_half_precision_is_that_of_fp32_but_for_rounding(precision):
    loss, update = one_step(precision)
    exact, wanted = one_step("fp32")
    assert loss == pytest.approx(exact, rel=1e-2)
    assert (update - wanted).norm() < 0.1 * wanted.norm()


def test_bf16_is_not_chosen_where_the_processor_emulates_it(monkeypatch):
    for flags, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                            ({"avx512_bf16": False}, "fp32"), ({"arm_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
        assert parse("--device", "cpu").precision == expected
        assert parse("--device", "cpu", "--precision", "bf16").precision == "bf16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of torch
    assert parse("--device", "cpu").precision == "fp32"


def test_a_gpu_older_than_this_pytorch_is_left_alone_and_refused_where_it_was_asked_for(monkeypatch, capsys):
    error = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: raises(RuntimeError(error)))
    assert parse().device == "cpu"
    note = capsys.readouterr().err
    assert "no kernel image is available" in note and note.count("\n") == 1
    with pytest.raises(ValueError, match="--device cuda.*no kernel image is available"):
        parse("--device", "cuda")


@pytest.mark.parametrize("capability, precision", [
    ((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16"),
    ((12, 0), "bf16")])
def test_auto_takes_the_precision_that_the_gpu_has_tensor_cores_for(capability, precision, monkeypatch):
    with fake_cuda.gpu(monkeypatch, capability):
        for device in ("auto", "cuda", "cuda:0"):
            config = parse("--device", device)
            assert (config.device, config.precision) == ("cuda:0", precision)
        assert parse("--device", "cpu").device == "cpu"

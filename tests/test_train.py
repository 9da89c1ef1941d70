"""train.py: the family's table, the step, the files of a run, the command line."""

import json
import math
import re

import numpy as np
import pytest
import torch

import ablations
import data
import evaluate
import models
import train
from conftest import SMALL, rows
from losses import complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, kl_divergence, smooth
from test_data import cifar_files

# -------------------------------------------------------------------------------------- the family

def a_run(method, step=3):
    """A prepared run on a few shapes, its batch, and the step's own numbers."""
    s = train.parse(["--batch-size", "8", "--n1", "20", "--m1", "40", "--imb", "4", "--method", method,
                     "--precision", "fp32"])
    run = train.prepare(s)
    run.estimator.q_hat.copy_(torch.arange(1, 11) / 55)
    run.alpha.fill_(0.6)
    run.estimator.temperature.fill_(1.3)
    run.estimator.ccr.fill_(True)  # so that T is read already
    run.ccr.fill_(True)
    sets, index, others = run.sets, torch.arange(8) * 3, torch.arange(16) * 5
    draws = torch.from_numpy(np.random.default_rng(step).random((24, 15), np.float32))
    batch = [sets.labeled[index], sets.labels[index], sets.unlabeled[others], sets.hidden_labels[others], draws]
    if method == "supervised":
        batch[2:] = [sets.unlabeled[:0], sets.hidden_labels[:0], draws[:8]]
    return run, batch


@pytest.mark.parametrize("method, p_labeled, source, target, soft", [
    ("supervised", None, None, None, None), ("fixmatch", None, None, None, None),
    ("ccr", None, None, None, "rest"), ("udal", "P", "Qhat", "P", None), ("flexda", "P", "Qhat", "Qhat", None),
    ("adello", "P", "Qhat", "Qhat", "rest"), ("kd", "P", "Qhat", "Qhat", "all"), ("oracle", "P", "Qhat", "Q", "rest")])
def test_every_method_is_the_papers_row_of_priors(method, p_labeled, source, target, soft):
    """The table of the paper written out, against the loss that the step returns."""
    run, batch = a_run(method)
    labeled, labels, unlabeled, _, draws = batch
    views = torch.cat([data.weak(torch.cat([labeled, unlabeled]), draws=draws[:, :3]),
                       data.strong(unlabeled, draws=draws[8:, 3:])])
    logits = run.model(data.normalize(views, run.sets.mean, run.sets.std)).detach()
    f_x, f_w, f_s = logits.split([8, len(unlabeled), len(unlabeled)])
    q = {None: None, "P": run.p_labeled, "Qhat": torch.arange(1, 11) / 55, "Q": run.q_true}
    q_smooth = smooth(q[target], 0.6) if target else None
    expected, threshold = supervised_loss(f_x, labels, q[p_labeled], q_smooth), 0.95
    if method != "supervised":
        p = f_w.softmax(1)
        threshold = p.max(1).values.sort().values[7:9].mean().item()  # half of the sixteen are confident
        mask = confidence_mask(p, threshold)
        assert mask.sum() == 8
        expected += consistency_loss(f_s, p, mask, q[source], q_smooth)
        if soft:
            expected += complementary_loss(f_s, p, mask if soft == "rest" else 0 * mask, q[source], q_smooth, 1.3)
    found = train.train_step(run, train.METHODS[method], threshold, *batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_step_records_its_losses_the_share_of_confident_images_and_the_share_of_those_that_are_right():
    run, batch = a_run("adello")
    logits = 8 * torch.randn(8 + 16 + 16, 10, generator=torch.Generator().manual_seed(0))
    run.forward = lambda images: logits.requires_grad_()
    f_x, f_w, f_s = logits.split([8, 16, 16])
    p, hidden, q, q_smooth = f_w.softmax(1), f_w.argmax(1), torch.arange(1, 11) / 55, smooth(torch.arange(1, 11) / 55, 0.6)
    hidden[5:] = (hidden[5:] + 1) % 10  # the first five are right
    mask = p.max(1).values >= 0.95
    assert 0 < mask[:5].sum() < 5 and 0 < mask[5:].sum() < 11
    train.train_step(run, train.METHODS["adello"], 0.95, *batch[:3], hidden, batch[4])
    losses = [supervised_loss(f_x, batch[1], run.p_labeled, q_smooth), consistency_loss(f_s, p, mask.float(), q, q_smooth),
              complementary_loss(f_s, p, mask.float(), q, q_smooth, 1.3)]
    assert run.record.totals.tolist() == pytest.approx([loss.item() for loss in losses] + [
        mask.float().mean().item(), mask[:5].sum().item() / 16], rel=1e-5)


def test_the_losses_use_qhat_from_before_the_step_and_qhat_follows_the_weak_predictions():
    run, batch = a_run("adello")
    before = run.estimator.q_hat.clone()
    twin, _ = a_run("adello")
    views = torch.cat([data.weak(torch.cat([batch[0], batch[2]]), draws=batch[4][:, :3]),
                       data.strong(batch[2], draws=batch[4][8:, 3:])])
    p = twin.model(data.normalize(views, run.sets.mean, run.sets.std)).detach()[8:24].softmax(1)
    train.train_step(run, train.METHODS["adello"], 0.95, *batch)
    torch.testing.assert_close(run.estimator.q_hat, 0.99 * before + 0.01 * p.mean(0), atol=1e-6, rtol=0)


def test_a_step_learns_from_no_hidden_label():
    first, batch = a_run("adello")
    second, _ = a_run("adello")
    losses = [train.train_step(run, train.METHODS["adello"], 0.95, *batch[:3], hidden, batch[4])
              for run, hidden in ((first, batch[3]), (second, torch.full((16,), -1)))]
    assert torch.equal(*losses)
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters()))


def test_a_step_updates_the_average_from_the_new_parameters():
    run, batch = a_run("fixmatch")
    before = run.ema.model.linear.weight.clone()
    train.train_step(run, train.METHODS["fixmatch"], 0.95, *batch)
    torch.testing.assert_close(run.ema.model.linear.weight, 0.995 * before + 0.005 * run.model.linear.weight)


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_and_writes_its_files(go, tmp_path, method):
    assert go("--method", method, "--out", "run") == 0
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [3, 6]
    assert all(math.isfinite(row["loss_s"]) for row in found)
    assert found[-1]["alpha"] == pytest.approx(0.1) and found[-1]["lr"] < found[0]["lr"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sum(result["q_hat"]) == pytest.approx(1, abs=1e-5) and 0 <= result["ece"] <= 1
    assert (found[-1]["loss_u"] == 0 or found[-1]["mask_rate"] > 0) and (
        (found[-1]["loss_uc"] > 0) == (method in ("ccr", "adello", "kd", "oracle")))
    assert {f.name for f in (tmp_path / "run").iterdir()} >= {"config.json", "log.csv", "checkpoint.pt", "result.json"}


def test_the_schedule_and_the_frozen_temperature(go, tmp_path):
    """T is 1 before the warm-up, exp KL(uniform || Qhat) at its end, and never changes again."""
    assert go("--warmup-steps", 3, "--prior-momentum", 0.5, "--lr", 0.05, "--eval-every", 1, "--out", "run") == 0
    found = rows(tmp_path / "run")
    assert [row["temperature"] for row in found[:3]] == [1, 1, 1]
    expected = math.exp(found[3]["kl_uniform_qhat"])  # of the first CCR step, whose p(u) Qhat has taken in
    assert [row["temperature"] for row in found[3:]] == [pytest.approx(expected, rel=1e-5)] * 3 and expected > 1.0001
    assert [row["loss_uc"] > 0 for row in found] == [False] * 3 + [True] * 3
    for row in found:
        assert row["alpha"] == pytest.approx(alpha_schedule(int(row["step"]), 6))
        assert row["lr"] == pytest.approx(0.05 * math.cos(7 * math.pi * (row["step"] - 1) / 96), rel=1e-5)


def test_a_step_trains_at_the_alpha_and_the_rate_of_its_own_number_from_zero(go, monkeypatch):
    """At t = 0 alpha is 1 and the rate whole, at the last step t is T_max - 1."""
    step, seen = train.train_step, []

    def watched(run, *arguments):
        seen.append((run.alpha.item(), run.optimizer.param_groups[0]["lr"].item()))
        return step(run, *arguments)
    monkeypatch.setattr(train, "train_step", watched)
    assert go("--lr", 0.05, "--out", "run") == 0
    assert [alpha for alpha, _ in seen] == pytest.approx([1 - 0.9 * (t / 6) ** 2 for t in range(6)])
    assert [lr for _, lr in seen] == pytest.approx([0.05 * math.cos(7 * math.pi * t / 96) for t in range(6)])


def test_a_row_of_the_log_holds_the_means_since_the_row_before(go, tmp_path):
    for every, out in ((1, "each"), (4, "four")):  # the second one's rows are of steps 1 to 4, and 5 and 6
        assert go("--warmup-steps", 2, "--eval-every", every, "--out", out) == 0
    each, four = rows(tmp_path / "each"), rows(tmp_path / "four")
    assert [row["step"] for row in four] == [4, 6]
    for name in ("loss_s", "loss_uc"):
        values = [row[name] for row in each]
        assert len(set(values)) > 2 and [row[name] for row in four] == pytest.approx(
            [sum(values[:4]) / 4, sum(values[4:]) / 2], rel=1e-5)


def test_the_first_ccr_step_has_the_log_ratios_of_the_estimate_before_it_and_the_temperature_after_it():
    run, batch = a_run("adello")
    run.estimator.ccr.fill_(False)
    before = run.estimator.q_hat.clone()
    logits = torch.randn(8 + 16 + 16, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    run.forward = lambda images: logits
    p = logits[8:24].detach().softmax(1)
    after = 0.99 * before + 0.01 * p.mean(0)
    temperature = kl_divergence(torch.full((10,), 0.1), after).exp().item()
    loss = train.train_step(run, train.METHODS["adello"], 0.95, *batch).item()
    assert run.estimator.temperature.item() == pytest.approx(temperature, rel=1e-6)
    q_smooth, mask = smooth(before, 0.6), confidence_mask(p)
    expected = (supervised_loss(logits[:8], batch[1], run.p_labeled, q_smooth)
                + consistency_loss(logits[24:], p, mask, before, q_smooth)
                + complementary_loss(logits[24:], p, mask, before, q_smooth, temperature)).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_warm_up_zero_reads_t_from_the_estimate_of_the_first_step(go, tmp_path):
    assert go("--warmup-steps", 0, "--eval-every", 1, "--out", "run") == 0
    found = rows(tmp_path / "run")
    expected = math.exp(found[0]["kl_uniform_qhat"])
    assert [row["temperature"] for row in found] == [pytest.approx(expected, rel=1e-5)] * 6


def test_pseudo_label_accuracy_is_the_share_of_right_ones_among_the_confident():
    run, _ = a_run("adello")
    logits = torch.zeros(len(run.sets.test_labels), 10)
    for mask_rate, right, accuracy in ((0.5, 0.4, 0.8), (0.0, 0.0, math.nan)):
        run.record.step, run.record.totals = 2, 2 * torch.tensor([2.0, 1.0, 0.5, mask_rate, right])
        row = evaluate.log_row(run, logits, 1.0)
        assert row["mask_rate"] == pytest.approx(mask_rate)
        assert row["pseudo_label_accuracy"] == pytest.approx(accuracy, nan_ok=True)


def test_the_recorded_true_prior_counts_labeled_and_unlabeled(go, tmp_path):
    assert go("--out", "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    counts = torch.tensor([20 + 20, 10 + 10, 5 + 5]) / 70.0
    torch.testing.assert_close(torch.tensor(result["q_true"]), counts)
    kl = kl_divergence(counts, torch.tensor(result["q_hat"])).item()
    assert result["kl_q_qhat"] == pytest.approx(kl, abs=1e-6)


def test_cifar_files_in_torchvisions_layout_train(tmp_path, monkeypatch):
    cifar_files(tmp_path / "data", monkeypatch, count=200)
    monkeypatch.chdir(tmp_path)
    assert train.main("--dataset cifar10 --n1 8 --m1 12 --imb 4 --shift reversed --model wrn-10-1 --steps 2 "
                      "--batch-size 4".split()) == 0
    config = json.loads((tmp_path / "runs/cifar10-adello-reversed-imb4-s0/config.json").read_text())
    assert config["n1"] == 8 and config["imb_u"] == 0.25 and config["lr"] == 0.03 and config["warmup_steps"] == 0


@pytest.mark.parametrize("size, batch", [(100, 10), (103, 10), (7, 20), (1, 3), (20, 20)])
def test_every_image_comes_once_an_epoch(size, batch):
    chain = torch.cat([train.batch_indices(size, batch, step, 0, 0) for step in range(4 * size // batch + 2)])
    for epoch in range(len(chain) // size):
        assert sorted(chain[epoch * size:(epoch + 1) * size].tolist()) == list(range(size))


def test_the_order_depends_on_the_seeds_and_nothing_else():
    assert torch.equal(train.batch_indices(50, 8, 3, 1, 0), train.batch_indices(50, 8, 3, 1, 0))
    assert not torch.equal(train.batch_indices(50, 8, 3, 1, 0), train.batch_indices(50, 8, 3, 2, 0))
    assert not torch.equal(train.batch_indices(50, 8, 3, 1, 0), train.batch_indices(50, 8, 3, 1, 1))
    assert len(train.batch_indices(50, 0, 3, 1, 0)) == 0


# ------------------------------------------------------------------------------------------- edges

@pytest.mark.parametrize("arguments", [
    ["--steps", 1], ["--eval-every", 1000], ["--batch-size", 100], ["--threshold", 1.0], ["--n1", 1, "--imb", 1],
    ["--m1", 1], ["--image-size", 28], ["--image-size", 64, "--batch-size", 2, "--steps", 2], ["--mu", 7]])
def test_edges_that_must_work(go, tmp_path, arguments):
    assert go(*arguments, "--out", "run", "--fresh") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert math.isfinite(result["nll"]) and result["q_hat"] == pytest.approx(result["q_hat"])
    assert rows(tmp_path / "run")[-1]["step"] == result["step"]


def test_a_mask_that_is_never_open_leaves_l_u_silent(go, tmp_path):
    assert go("--threshold", 1.0, "--method", "flexda", "--out", "run") == 0
    assert {(row["mask_rate"], row["loss_u"]) for row in rows(tmp_path / "run")} == {(0.0, 0.0)}


def test_a_naturally_long_tailed_folder_trains_by_fraction(go, tmp_path):
    assert go("--labeled-fraction", 0.2, split=()) == 0
    config = json.loads((tmp_path / "runs/folder-adello-natural-s0/config.json").read_text())
    assert config["labeled_fraction"] == 0.2 and config["n1"] is None


def test_images_of_unknown_class_train_without_a_true_prior(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / part).symlink_to(image_folder / part)
    (tmp_path / "data" / "unlabeled").symlink_to(image_folder / "train" / "bee")
    assert train.main(["--dataset", "folder", "--labeled-fraction", "0.2", "--out", "run", *SMALL]) == 0
    row = rows(tmp_path / "run")[-1]
    assert math.isnan(row["kl_q_qhat"]) and math.isnan(row["pseudo_label_accuracy"]) and row["kl_uniform_qhat"] > 0


# ---------------------------------------------------------------------------------- the command line

def test_the_defaults_are_adello_on_shapes_reversed():
    s = train.parse([])
    assert (s.dataset, s.method, s.shift, s.imb_u) == ("shapes", "adello", "reversed", 1 / 50)
    assert s.out == "runs/shapes-adello-reversed-imb50-s0"


def test_the_cifar_preset_is_the_papers():
    s = train.parse("--dataset cifar10 --imb 150 --shift uniform --seed 4".split())
    assert {k: vars(s)[k] for k in ("n1", "m1", "imb", "imb_u", "steps", "batch_size", "mu", "lr", "weight_decay", "ema",
                              "prior_momentum", "warmup_steps", "eval_every", "alpha_min", "d", "threshold", "model")
            } == dict(n1=1500, m1=3000, imb=150, imb_u=1, steps=262144, batch_size=64, mu=2, lr=0.03,
                      weight_decay=5e-4, ema=0.999, prior_momentum=0.999, warmup_steps=50000, eval_every=1024,
                      alpha_min=0.1, d=2, threshold=0.95, model="wrn-28-2")
    assert s.out == "runs/cifar10-adello-uniform-imb150-s4"


def test_a_shorter_run_has_a_shorter_warm_up():
    assert train.parse("--dataset cifar10 --steps 2622".split()).warmup_steps == 500


@pytest.mark.parametrize("imb_u, shift", [("50", "consistent"), ("1", "uniform"), ("0.02", "reversed"), ("10", "imbu10")])
def test_an_imbalance_of_its_own_is_named_like_the_shift_that_it_is(imb_u, shift):
    assert train.parse(["--imb-u", imb_u]).shift == shift


def test_help_names_every_option_and_the_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in (*train.SETTINGS, "fresh"):
        assert (name == "fresh" or train.OPTION[name] in text)
    assert "(default: adello)" in text and re.search(r"preset of stl10: .*'warmup_steps': 0", " ".join(text.split()))


# ---------------------------------------------------------------------------------------- compiled

@pytest.mark.filterwarnings("error:Dynamo detected")
def test_the_compiled_step_equals_the_eager_one_and_compiles_once():
    """The whole step as torch.compile traces and differentiates it, without generating code for it.

    The rate, alpha, T and the start of CCR change from step to step: no second compilation, and no
    warning about what it can only trace on trust. The compiled step has CUDA's fused optimiser.
    """
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run, batch = a_run("adello")
        run.estimator.ccr.fill_(False)
        if compiled:
            run.optimizer = torch.optim.SGD(models.parameter_groups(run.model, 5e-4), torch.tensor(0.05),
                                            momentum=0.9, nesterov=True, fused=True)
        step = torch.compile(train.train_step, backend="aot_eager") if compiled else train.train_step
        found = []
        for i in range(4):
            for group in run.optimizer.param_groups:
                group["lr"].fill_(0.05 / (i + 1))
            run.alpha.fill_(1 - 0.2 * i)
            run.ccr.fill_(i > 1)
            with torch._dynamo.config.patch(error_on_recompile=i > 1):
                found.append(step(run, train.METHODS["adello"], 0.95, *batch).item())
        losses.append(found + run.estimator.q_hat.tolist() + [run.estimator.temperature.item()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---------------------------------------------------------------------------------- the ablations

def test_each_ablation_undoes_its_detail_and_nothing_else(tmp_path, monkeypatch, capsys):
    small = ["--n1", "20", "--m1", "40", "--imb", "4", "--warmup-steps", "2", *SMALL]

    def ended(variant, *method):
        for module, name in ((train, "prepare"), (PriorEstimator, "update"), (data, "load"), (data, "split"),
                             (data, "shapes")):
            monkeypatch.setattr(module, name, getattr(module, name))
        monkeypatch.setitem(train.METHODS, variant, train.METHODS["adello"])
        monkeypatch.setitem(train.SETTINGS, "method", ("adello", list(train.METHODS), ""))
        out = tmp_path / variant
        run = (train.main(["--out", str(out), *small]) if variant == "adello" else
               ablations.main([variant, *method, "--out", str(out), *small]))
        monkeypatch.undo()
        images = int(re.search(r"(\d+) unlabeled images", capsys.readouterr().out)[1])
        assert run == 0
        return images, rows(out)

    whole, plain = ended("adello")
    counts = data.long_tail_counts(20, 4, 10), data.long_tail_counts(40, 1 / 4, 10)
    assert whole == sum(counts[0]) + sum(counts[1])
    images, _ = ended("unlabeled-alone")
    assert images == sum(counts[1])
    images, log = ended("moving-temperature")
    assert images == whole and log[0]["loss_s"] == pytest.approx(plain[0]["loss_s"], rel=0.05)
    assert plain[0]["temperature"] == plain[1]["temperature"] and log[0]["temperature"] != log[1]["temperature"]
    images, log = ended("separate-statistics")
    assert images == whole and log[0]["loss_s"] != plain[0]["loss_s"]
    assert log[1]["temperature"] == log[0]["temperature"]
    images, log = ended("noise0.4", "--method", "fixmatch")
    assert images == whole and log[0]["loss_s"] != plain[0]["loss_s"] and log[1]["loss_uc"] == 0 < plain[1]["loss_uc"]


def test_an_unknown_ablation_is_refused(capsys):
    assert ablations.main(["nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument variant: invalid choice: 'nothing'") and error.count("\n") == 1

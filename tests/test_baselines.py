"""baselines.py: each method's equation, and runs that end like train.py's."""

import json

import pytest
import torch

import baselines
import data
import evaluate
import models
import train
from conftest import SMALL, rows
from priors import kl_divergence

DRAW = torch.Generator().manual_seed(0)


def predictions(counts, sharpness=3.0):
    """Labels of a set with these class counts, and predictions that lean to them: (probs, labels)."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    logits = torch.randn(len(labels), len(counts), generator=DRAW) + sharpness * torch.eye(len(counts))[labels]
    return logits.softmax(1), labels


# -------------------------------------------------------------------------------------------- DARP

@pytest.mark.parametrize("counts", [[100, 60, 40], [10, 50, 140], [66, 67, 67]])
def test_refined_rows_sum_to_one_and_columns_to_the_target_counts(counts):
    refined = baselines.refine(predictions([80, 70, 50])[0], torch.tensor(counts))
    torch.testing.assert_close(refined.sum(1), torch.ones(200), atol=1e-5, rtol=0)
    torch.testing.assert_close(refined.sum(0), torch.tensor(counts).float(), atol=0, rtol=1e-3)


def test_a_matrix_that_fits_already_stays_nearly_as_it_is():
    probs, _ = predictions([80, 70, 50], sharpness=12.0)
    assert (baselines.refine(probs, probs.sum(0)) - probs).abs().max() < 0.02


def test_rows_of_equal_doubt_keep_their_order_within_a_column():
    p = torch.linspace(0.05, 0.45, 40)
    probs = torch.cat([torch.stack([p, 1 - p], 1), torch.stack([1 - p, p], 1)])
    refined = baselines.refine(probs, torch.tensor([50, 30]), alpha=10.0)
    for part, sign in ((refined[:40, 0], 1), (refined[40:, 0], -1)):
        assert (sign * part.diff() >= -1e-6).all()


def test_an_empty_class_and_a_one_hot_matrix_survive():
    probs, _ = predictions([80, 70, 50])
    refined = baselines.refine(probs, torch.tensor([120, 80, 0]))
    assert refined.isfinite().all() and refined[:, 2].sum() < 0.5
    one_hot = torch.eye(3)[torch.arange(90) % 3]
    refined = baselines.refine(one_hot, torch.tensor([30, 30, 30]))
    assert refined.isfinite().all() and torch.equal(refined.argmax(1), torch.arange(90) % 3)


def test_the_true_prior_brings_the_labels_nearer_to_the_truth():
    """Predictions that lean to class 0; the labels are drawn at the true counts."""
    probs, labels = predictions([60, 60, 80], sharpness=1.5)
    biased = probs * torch.tensor([4.0, 1.0, 0.5])
    biased = biased / biased.sum(1, keepdim=True)
    true = torch.bincount(labels) / 200
    refined = baselines.refine(biased, 200 * true)

    def distance(p):
        return kl_divergence(true, (torch.bincount(p.argmax(1), minlength=3) + 1e-3) / (len(p) + 3e-3)).item()
    assert distance(refined) < 0.2 * distance(biased)
    assert (refined.argmax(1) == labels).sum() > (biased.argmax(1) == labels).sum()


# ------------------------------------------------------------------------------------------ CReST+

def test_alignment_at_t_1_gives_the_labeled_prior_and_at_t_0_a_uniform_mean():
    p_labeled = torch.tensor([0.6, 0.3, 0.1])
    probs, running = torch.tensor([[0.2, 0.5, 0.3]]).expand(4, 3), torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(baselines.align(probs, p_labeled, running, 1.0).mean(0), p_labeled, atol=1e-5, rtol=0)
    torch.testing.assert_close(baselines.align(probs, p_labeled, running, 0.0).mean(0), torch.full((3,), 1 / 3),
                               atol=1e-5, rtol=0)


def test_the_rarest_class_gives_all_and_the_largest_gamma_to_the_minus_third():
    rates = baselines.sampling_rates(torch.tensor([30, 100, 1, 10]))
    assert rates[2].item() == pytest.approx(1) and rates[1].item() == pytest.approx(100 ** (-1 / 3))
    assert rates[0].item() == pytest.approx(100 ** (-2 / 9)) and rates[3].item() == pytest.approx(100 ** (-1 / 9))


def test_the_most_confident_of_each_class_are_taken():
    probs = torch.tensor([[.9, .1], [.6, .4], [.7, .3], [.8, .2], [.2, .8], [.4, .6]])
    index, labels = baselines.most_confident(probs, torch.tensor([8, 1]))  # rates 1/2 and 1
    assert index.tolist() == [0, 3, 4, 5] and labels.tolist() == [0, 0, 1, 1]


# ------------------------------------------------------------------------------------- CoSSL and cRT

def test_the_largest_class_is_not_enhanced_labels_stay_and_no_gradient_reaches_the_features():
    features, others = torch.randn(400, 5, generator=DRAW).requires_grad_(), torch.randn(400, 5, generator=DRAW)
    labels, draws = torch.arange(400) % 2, torch.rand(400, 2, generator=DRAW)
    mixed = baselines.enhance(features, labels, others, torch.tensor([100, 20]), draws)
    assert not mixed.requires_grad and torch.equal(mixed[labels == 0], features[labels == 0])
    changed = (mixed != features).any(1)[labels == 1]
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.08)
    lam = ((mixed - others) / (features - others)).mean(1)[labels == 1][changed]
    assert lam.min() >= 0.599 and lam.max() <= 1.001


def test_classes_are_drawn_equally_often():
    """Chi-square with two degrees of freedom: 13.8 has probability 0.001."""
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2)
    drawn = torch.bincount(labels[baselines.balanced(labels, 3000, torch.Generator().manual_seed(1))])
    assert ((drawn - 1000.0) ** 2 / 1000).sum() < 13.8


# ------------------------------------------------------------------------------------------ the runs

CHANGED = [(module, name) for module, names in (
    (train, ("prepare", "batch_indices", "train_step", "consistency_loss", "confidence_mask")),
    (evaluate, ("predict",)), (data, ("load", "split"))) for name in names]


def undone(arguments):
    """baselines.main; what it changes in the modules is put back afterwards."""
    kept = [(module, name, getattr(module, name)) for module, name in CHANGED]
    methods, choices = dict(train.METHODS), list(train.SETTINGS["method"][1])
    try:
        return baselines.main(arguments)
    finally:
        for place in kept:
            setattr(*place)
        train.SETTINGS["method"][1][:] = choices
        train.METHODS.clear()
        train.METHODS.update(methods)


@pytest.fixture
def call(image_folder, tmp_path, monkeypatch):
    """A method on the small folder, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    split = ["--dataset", "folder", "--data-dir", str(image_folder), "--n1", "20", "--m1", "20", "--imb", "4", *SMALL]
    return lambda name, *rest: undone([name, *(split if name in ("darp", "crest", "cossl") else []), *rest])


@pytest.mark.parametrize("name", ["darp", "crest", "cossl"])
def test_each_trains_and_ends_as_a_run_that_the_table_reads(name, call, tmp_path, capsys):
    extra = ["--generations", "2"] if name == "crest" else []
    assert call(name, "--threshold", "0.4", "--out", "run", *extra) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [3, 6]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == name
    capsys.readouterr()
    assert evaluate.main(["run"]) == 0 and "| run | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["darp", "cossl"])
def test_a_stopped_run_goes_on_to_the_same_end(name, call, tmp_path, monkeypatch):
    arguments = [name, "--threshold", "0.4", "--precision", "fp32", "--eval-every", "1"]
    assert call(*arguments, "--out", "whole") == 0
    save = evaluate.save

    def stops(run, directory):
        save(run, directory)
        if run.record.step == 5:
            raise OSError("stopped")
    monkeypatch.setattr(evaluate, "save", stops)
    assert call(*arguments, "--out", "part") == 1
    monkeypatch.setattr(evaluate, "save", save)
    assert call(*arguments, "--out", "part") == 0
    one, two = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("whole", "part"))
    assert one["q_hat"] == two["q_hat"] and one["nll"] == two["nll"]


def test_the_next_generation_holds_the_first_labeled_set_and_confident_images(call, tmp_path, monkeypatch):
    seen, prepare = [], train.prepare
    monkeypatch.setattr(train, "prepare", lambda s: seen.append(prepare(s)) or seen[-1])
    assert call("crest", "--generations", "2", "--out", "run") == 0
    first, second = (run.sets for run in seen)
    assert len(first.labels) == 35 and torch.equal(second.labeled[:35], first.labeled)
    assert torch.equal(second.labels[:35], first.labels) and len(second.labels) > 35
    model = models.build("wrn-10-1", 3).eval()
    model.load_state_dict(models.load_checkpoint(tmp_path / "run/generation0/checkpoint.pt")["ema"])
    probs = evaluate.predict(model, first._replace(test=second.labeled[35:]), "cpu").softmax(1)
    assert torch.equal(probs.argmax(1), second.labels[35:])
    assert len(first.unlabeled) == 35  # U without L


def test_a_stopped_crest_goes_on_from_its_last_generation(call, tmp_path):
    assert call("crest", "--generations", "2", "--precision", "fp32", "--out", "whole") == 0
    assert call("crest", "--generations", "2", "--precision", "fp32", "--out", "part") == 0
    for name in ("result.json", "checkpoint.pt", "config.json", "log.csv"):
        (tmp_path / "part" / name).unlink()  # as after a kill in the last generation
    first = (tmp_path / "part/generation0/checkpoint.pt").stat().st_mtime_ns
    assert call("crest", "--generations", "2", "--precision", "fp32", "--out", "part") == 0
    assert (tmp_path / "part/generation0/checkpoint.pt").stat().st_mtime_ns == first
    one, two = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("whole", "part"))
    assert one["q_hat"] == two["q_hat"] and one["nll"] == two["nll"]


def test_crt_and_la_are_runs_of_their_own_and_leave_the_run_and_its_features_as_they_are(call, go, tmp_path, capsys):
    assert go("--method", "fixmatch", "--out", "runs/fixmatch-s0") == 0
    before = {f.name: f.read_bytes() for f in (tmp_path / "runs/fixmatch-s0").iterdir()}
    assert call("crt", "runs/fixmatch-s0") == 0 and call("la", "runs/fixmatch-s0") == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "runs/fixmatch-s0").iterdir()} == before
    old, new = (models.load_checkpoint(tmp_path / "runs" / name / "checkpoint.pt")["ema"]
                for name in ("fixmatch-s0", "fixmatch+crt-s0"))
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["linear.weight", "linear.bias"]
    capsys.readouterr()
    assert evaluate.main([f"runs/fixmatch{end}-s0" for end in ("", "+crt", "+la")]) == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "| fixmatch", "| fixmatch+crt", "| fixmatch+la"]


def test_the_last_layer_of_torchvisions_network_is_learned_anew_too(call, tmp_path):
    resnet = "--model", "resnet50", "--image-size", "32", "--steps", "5", "--batch-size", "2"
    assert call("cossl", *resnet, "--out", "run") == 0 and call("crt", "run") == 0
    old, new = (models.load_checkpoint(tmp_path / out / "checkpoint.pt")["ema"] for out in ("run", "run+crt"))
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["fc.weight", "fc.bias"]


def test_la_takes_the_prior_that_the_run_was_trained_at_from_the_averaged_networks_logits(call, go, tmp_path):
    assert go("--out", "run") == 0
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"p_labeled": [0.1, 0.2, 0.7]}))
    assert call("la", "run") == 0
    run, state = evaluate.read_run("run"), models.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    model, s = models.build("wrn-10-1", 3).eval(), run.settings
    model.load_state_dict(state["ema"])
    sets = data.load("folder", s["data_dir"], 20, 20, 4.0, s["imb_u"], None, 16)
    likelihood = evaluate.predict(model, sets, "cpu").softmax(1) / torch.tensor([1, 2, 7])
    expected = [(likelihood[sets.test_labels == k].argmax(1) == k).double().mean().item() for k in range(3)]
    assert evaluate.read_run("run+la").result["per_class_accuracy"] == expected


@pytest.mark.parametrize("arguments", [[], ["remixmatch"], ["crt"], ["crt", "absent"], ["darp", "--steps", "0"],
                                       ["crest", "--generations", "0"]])
def test_a_mistake_is_one_line_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert undone(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())

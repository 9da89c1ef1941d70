"""evaluate.py: calibration against hand-computed cases, metrics, and the table."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import evaluate
from evaluate import calibration, metrics, reliability


def two_classes(confidence, correct):
    """Predictions of class 0 at a confidence, right or not. Returns (probs, labels)."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.tensor(correct).long()


def test_perfectly_calibrated():
    probs, labels = two_classes([0.75] * 4 + [1.0] * 2, [1, 1, 1, 0, 1, 1])
    assert calibration(probs, labels) == (pytest.approx(0), pytest.approx(0))


def test_always_wrong_and_certain():
    assert calibration(*two_classes([1.0] * 5, [0] * 5)) == (1, 1)


def test_all_mass_in_one_bin():
    """Ten at 0.7, six right: the gap 0.1 is both errors."""
    ece, mce = calibration(*two_classes([0.7] * 10, [1] * 6 + [0] * 4))
    assert ece == pytest.approx(0.1) and mce == pytest.approx(0.1)


def test_two_bins_are_weighted_by_their_share():
    """3 of 4 at 0.9 (2 right: gap .9 - 2/3), 1 of 4 at 0.6 (right: gap .4)."""
    ece, mce = calibration(*two_classes([0.9, 0.9, 0.9, 0.6], [1, 1, 0, 1]))
    assert ece == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.4)
    assert mce == pytest.approx(0.4)


def test_a_confidence_on_a_bin_edge_belongs_to_the_lower_bin_and_one_to_the_last():
    probs, labels = two_classes([0.6, 0.600001, 1.0], [1, 1, 1])
    share = reliability(probs, labels, num_bins=5)[:, 0]
    assert share.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_a_confidence_above_one_by_rounding_is_in_the_last_bin_and_zero_in_the_first():
    above = torch.tensor([[1.0, 0.0]]).nextafter(torch.tensor(2.0))
    assert above[0, 0] > 1 and reliability(above, torch.tensor([0]))[:, 0].tolist() == [0] * 14 + [1]
    assert reliability(torch.zeros(1, 2), torch.tensor([0]))[:, 0].tolist() == [1] + [0] * 14


def test_gaps_of_opposite_sign_in_one_bin_cancel_and_in_two_do_not():
    probs, labels = two_classes([0.9, 0.9], [1, 0])
    assert calibration(probs, labels)[0] == pytest.approx(0.4)
    probs, labels = two_classes([0.95, 0.55], [1, 0])
    assert calibration(probs, labels)[0] == pytest.approx((0.05 + 0.55) / 2)


def test_one_bin_is_the_difference_of_the_means():
    torch.manual_seed(0)
    probs, labels = torch.rand(50, 4).double().softmax(1), torch.randint(0, 4, (50,))
    gap = ((probs.argmax(1) == labels).double().mean() - probs.amax(1).mean()).abs().item()
    assert calibration(probs, labels, 1) == (pytest.approx(gap), pytest.approx(gap))


def test_metrics_of_a_small_exact_case():
    """Class 0: 3 of 4 right, class 1: 1 of 1; uniform but for the argmax: two logits apart by log 3."""
    up = math.log(3)
    logits = torch.tensor([[up, 0.0], [up, 0], [up, 0], [0, up], [0, up]])
    found = metrics(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert found["accuracy"] == pytest.approx(0.8) and found["balanced_accuracy"] == pytest.approx(0.875)
    assert found["per_class_accuracy"].tolist() == [0.75, 1.0]
    assert found["nll"] == pytest.approx(-(4 * math.log(0.75) + math.log(0.25)) / 5)
    assert found["brier"] == pytest.approx((4 * 2 * 0.25 ** 2 + 2 * 0.75 ** 2) / 5)
    assert found["ece"] == pytest.approx(0.05)


def test_a_class_without_test_images_is_left_out_of_the_mean():
    found = metrics(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 0, 2]))
    assert found["balanced_accuracy"] == 1 and math.isnan(found["per_class_accuracy"][1].item())


@pytest.mark.parametrize("logits, labels, match", [
    (torch.full((2, 3), math.nan), torch.tensor([0, 1]), r"\(2, 3\) from nan to nan must be finite"),
    (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "to inf must be finite"),
    (torch.zeros(0, 3), torch.zeros(0).long(), "N >= 1"),
    (torch.zeros(2, 3), torch.tensor([0]), r"labels \(1,\)"),
    (torch.zeros(2, 3), torch.tensor([0, 3]), r"from 0 to 3 in 0..2"),
    (torch.zeros(2, 3), torch.tensor([-1, 2]), "from -1 to 2 in")])
def test_bad_input_is_refused_with_shape_and_value(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        metrics(logits, labels)


def made_up_run(directory, dataset="shapes", method="adello", seed=0, accuracy=0.5, ece=0.1, **settings):
    """The three files of a run, with known numbers."""
    directory.mkdir(parents=True)
    settings = dict(dataset=dataset, method=method, shift="reversed", imb=50.0, imb_u=0.02, steps=100, seed=seed,
                    out=str(directory), lr=0.1) | settings
    result = dict(balanced_accuracy=accuracy, ece=ece, mce=0.2, kl_q_qhat=0.03, classes=list("abcd"),
                  per_class_accuracy=[0.9, 0.6, 0.4, 0.1], p_labeled=[0.4, 0.3, 0.2, 0.1],
                  reliability=[[1 / 15, 0.5, (k + 0.5) / 15] for k in range(15)])
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "log.csv").write_text("step,alpha,kl_q_qhat,kl_uniform_qhat\n50,0.8,0.2,0.1\n100,0.1,0.03,0.2\n")
    return directory


def test_seeds_become_one_row_with_mean_and_deviation(tmp_path, capsys):
    runs = [made_up_run(tmp_path / f"adello-s{i}", seed=i, accuracy=a) for i, a in enumerate((0.50, 0.60))]
    runs.append(made_up_run(tmp_path / "other", method="fixmatch", accuracy=0.4))
    assert evaluate.main(list(map(str, runs))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("| adello |" in line for line in lines) == 1
    row = next(line for line in lines if "adello" in line)
    assert "| 2 | 55.0 ± 7.1 | 90.0 ± 0.0 | 50.0 ± 0.0 | 10.0 ± 0.0 |" in row


def test_a_setting_that_differs_becomes_a_row_of_its_own(tmp_path, capsys):
    runs = [made_up_run(tmp_path / "a", lr=0.1), made_up_run(tmp_path / "b", lr=0.2),
            made_up_run(tmp_path / "c", lr=0.1, seed=1, device="cuda:0")]
    assert evaluate.main(list(map(str, runs))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| a", "2"], ["| b", "1"]]


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "config.json").unlink(), "is no finished run"),
    (lambda d: (d / "result.json").unlink(), "result.json"),
    (lambda d: (d / "result.json").write_text("{"), "is no finished run")])
def test_what_is_no_finished_run_is_one_line_and_status_2(tmp_path, capsys, spoil, message):
    spoil(made_up_run(tmp_path / "run"))
    assert evaluate.main([str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_a_reader_that_closes_the_pipe_early_is_no_error(tmp_path):
    made_up_run(tmp_path / "a")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path / "a"], stdout=writing,
                          stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")

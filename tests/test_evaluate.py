"""evaluate.py: calibration against cases worked out by hand, metrics, and the table of finished runs."""

import io
import json
import math
import sys

import pytest
import torch

import evaluate
from evaluate import calibration, metrics, reliability


def two_classes(confidence, correct):
    """Predictions of class 0 at a confidence, right or not. Returns (probs, labels)."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.tensor(correct).long()


# ------------------------------------------------------------------------------------- calibration

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


def test_gaps_of_opposite_sign_in_one_bin_cancel_and_in_two_do_not():
    probs, labels = two_classes([0.9, 0.9], [1, 0])
    assert calibration(probs, labels)[0] == pytest.approx(0.4)
    probs, labels = two_classes([0.95, 0.55], [1, 0])
    assert calibration(probs, labels)[0] == pytest.approx((0.05 + 0.55) / 2)


def test_one_bin_is_the_difference_of_the_means():
    torch.manual_seed(0)
    probs = torch.rand(50, 4).double().softmax(1)
    labels = torch.randint(0, 4, (50,))
    gap = ((probs.argmax(1) == labels).double().mean() - probs.amax(1).mean()).abs().item()
    assert calibration(probs, labels, 1) == (pytest.approx(gap), pytest.approx(gap))


def test_a_confidence_above_one_by_rounding_is_in_the_last_bin():
    above = torch.tensor([[1.0, 0.0]]).nextafter(torch.tensor(2.0))
    assert above[0, 0] > 1 and reliability(above, torch.tensor([0]))[:, 0].tolist() == [0] * 14 + [1]


# ----------------------------------------------------------------------------------------- metrics

def test_metrics_of_a_small_exact_case():
    """Class 0: 3 of 4 right, class 1: 1 of 1; uniform but for the argmax: two logits apart by log 3."""
    up = math.log(3)
    logits = torch.tensor([[up, 0.0], [up, 0], [up, 0], [0, up], [0, up]])
    found = metrics(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert found["accuracy"] == pytest.approx(0.8) and found["balanced_accuracy"] == pytest.approx(0.875)
    assert found["per_class_accuracy"] == [0.75, 1.0]
    assert found["nll"] == pytest.approx(-(4 * math.log(0.75) + math.log(0.25)) / 5)
    assert found["ece"] == pytest.approx(0.05)


def test_a_class_without_test_images_is_left_out_of_the_mean():
    found = metrics(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 0, 2]))
    assert found["balanced_accuracy"] == 1 and math.isnan(found["per_class_accuracy"][1])


@pytest.mark.parametrize("logits, labels, match", [
    (torch.full((2, 3), math.nan), torch.tensor([0, 1]), r"\(2, 3\).*finite"),
    (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), r"\(1, 2\).*finite"),
    (torch.zeros(0, 3), torch.zeros(0).long(), r"\(0, 3\)"),
    (torch.zeros(2, 3), torch.tensor([0]), r"\(2, 3\).*\(1,\)"),
    (torch.zeros(2, 3), torch.tensor([0, 3]), r"\(2, 3\).*labels"),
    (torch.zeros(2, 3), torch.tensor([-1, 2]), r"\(2, 3\).*labels")])
def test_bad_input_is_refused_with_its_shape(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        metrics(logits, labels)


def test_predictions_are_the_networks_logits_of_normalised_images_whatever_the_size_of_a_batch():
    """The network here gives a pixel of each channel; black is (0 - 0.5) / 0.25 = -2 there, white 2."""
    images = torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    images[2:, 1] = 255
    half = torch.full((3, 1, 1), 0.5)
    for batch_size in (1, 3, 500):
        logits = evaluate.predict(lambda x: x[:, :, 0, 0], images, half, half / 2, batch_size)
        assert logits.tolist() == [[-2, -2, -2]] * 2 + [[-2, 2, -2]] * 5


# --------------------------------------------------------------------------------------- the table

def made_up_run(directory, accuracy=0.5, result=(), **settings):
    """The three files of a run of four classes, with known numbers."""
    directory.mkdir(parents=True)
    config = dict(dataset="shapes", method="adello", shift="reversed", imb=50.0, steps=100, seed=0, lr=0.1,
                  out=str(directory), device="cpu") | settings
    result = dict(balanced_accuracy=accuracy, ece=0.1, mce=0.2, kl_q_qhat=0.03, classes=list("abcd"),
                  per_class_accuracy=[0.9, 0.6, 0.4, 0.1], p_labeled=[0.4, 0.3, 0.2, 0.1]) | dict(result)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (directory / "log.csv").write_text("step,alpha,kl_q_qhat\n50,0.8,nan\n100,0.1,0.03\n", encoding="utf-8")
    return directory


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """The first table that evaluate.py prints in tmp_path: the cells of each run's row."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert evaluate.main(list(map(str, arguments))) == 0
        text = capsys.readouterr().out.split("\n\n")[0]
        return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]
    return run


def test_seeds_become_one_row_with_mean_and_deviation(tmp_path, table):
    for seed, accuracy in enumerate((0.50, 0.60)):
        made_up_run(tmp_path / f"adello-s{seed}", accuracy, seed=seed)
    made_up_run(tmp_path / "other", method="fixmatch")
    row, other = table("adello-s0", "adello-s1", "other")
    assert row[:3] == ["adello", "2", "55.0 ± 7.1"]
    assert row[3:6] == ["90.0 ± 0.0", "50.0 ± 0.0", "10.0 ± 0.0"]  # head, medium of two classes, tail
    assert row[6:] == ["10.0 ± 0.0", "20.0 ± 0.0", "0.030 ± 0.000"] and other[:2] == ["other", "1"]


def test_a_setting_that_differs_becomes_a_row_of_its_own_and_the_device_does_not(tmp_path, table):
    made_up_run(tmp_path / "a", lr=0.1)
    made_up_run(tmp_path / "b", lr=0.2)
    made_up_run(tmp_path / "c", lr=0.1, seed=1, device="cuda:0")
    assert [row[:2] for row in table("a", "b", "c")] == [["a", "2"], ["b", "1"]]


def test_runs_on_two_folders_are_no_seeds_of_one_and_two_places_of_a_published_set_are(tmp_path, table):
    for name, dataset in (("own", "folder"), ("public", "cifar10")):
        for seed in (0, 1):
            made_up_run(tmp_path / f"{name}{seed}", dataset=dataset, data_dir=f"place{seed}", seed=seed)
    assert [row[:2] for row in table("*")] == [["own0", "1"], ["own1", "1"], ["public0", "2"]]


def test_a_run_given_twice_is_one(tmp_path, table):
    made_up_run(tmp_path / "runs" / "a-s0")
    made_up_run(tmp_path / "runs" / "a-s1", seed=1)
    rows = table("runs/a-s0", "runs/a-s1", "runs/../runs/a-s0", tmp_path / "runs" / "a-s0", "runs/*")
    assert [row[:2] for row in rows] == [["a", "2"]]


def test_the_current_directory_has_a_name(tmp_path, table, monkeypatch):
    monkeypatch.chdir(made_up_run(tmp_path / "mine"))
    assert table(".")[0][0] == "mine"


def test_patterns_are_expanded(tmp_path, table):
    for seed in range(3):
        made_up_run(tmp_path / f"a-s{seed}", seed=seed)
    assert [row[:2] for row in table("a-s[01]")] == [["a", "2"]]


def test_differences_are_taken_between_runs_of_one_seed(tmp_path, table, monkeypatch, capsys):
    """Less 40 and 60: 50 and 64 are ahead by 10 and 4 in a mean of 7; seed 2 has no partner."""
    for seed, accuracy in enumerate((0.4, 0.6)):
        made_up_run(tmp_path / f"a-s{seed}", accuracy, seed=seed)
    for seed, accuracy in enumerate((0.5, 0.64, 0.9)):
        made_up_run(tmp_path / f"b-s{seed}", accuracy, seed=seed, method="fixmatch", result={"ece": 0.09})
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["a-s*", "b-s*"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("| ").split("|")]
    assert cells == ["b", "2", "7.0 ± 4.2", "2", "-1.0 ± 0.0", "2"]


def test_what_is_unknown_is_no_number_in_the_table(tmp_path, table):
    """A class without test images is left out; a third of nothing but such classes has no accuracy."""
    made_up_run(tmp_path / "a", result={"kl_q_qhat": None, "per_class_accuracy": [None, 0.6, None, 0.1]})
    (name, seeds, balanced, head, medium, tail, *_, kl), = table("a")
    assert (medium, tail) == ("60.0", "10.0") and not head.strip("–-? ") and not kl.strip("–-? ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_the_signs_gets_the_table_all_the_same(tmp_path, monkeypatch, encoding):
    for seed in (0, 1):
        made_up_run(tmp_path / f"a-s{seed}", seed=seed)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert evaluate.main([str(tmp_path / "*")]) == 0
    out.flush()
    assert b"| a | 2 | 50.0 " in out.buffer.getvalue()


SPOILED = [(name, content) for name in ("config.json", "result.json")
           for content in (None, b"", b"null", b"[]", b"{}", b'{"seed": 0,', b"\xff\xfe")]


@pytest.mark.parametrize("name, content", SPOILED + [("log.csv", None), ("log.csv", b"step,alpha\n50,0.8\n10")])
def test_what_is_no_finished_run_is_one_line_and_status_2(tmp_path, capsys, name, content):
    path = made_up_run(tmp_path / "run") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert evaluate.main([str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert "is no finished run" in captured.err


def test_a_directory_that_is_not_there_is_one_line_that_names_it(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "absent" in error and error.count("\n") == 1


def test_two_runs_of_one_seed_and_one_setting_are_not_taken_for_two_seeds(tmp_path):
    """As when the code was changed between them: the second stands apart, and with it its difference."""
    runs = [evaluate.read_run(made_up_run(tmp_path / name, accuracy, seed=0)) for name, accuracy in (("a", 0.4), ("b", 0.5))]
    assert [len(members) for members in evaluate.group(runs).values()] == [1, 1]

"""evaluate.py: calibration against cases worked out by hand, metrics, and the table of finished runs."""

import io
import math
import sys

import pytest
import torch

import evaluate
from conftest import made_up_run
from evaluate import calibration, metrics, reliability


def two_classes(confidence, correct):
    """Predictions of class 0 at a confidence, right or not. Returns (probs, labels)."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.tensor(correct).long()


# ------------------------------------------------------------------------------------- calibration

@pytest.mark.parametrize("confidence, correct, ece, mce", [
    ([0.75] * 4 + [1.0] * 2, [1, 1, 1, 0, 1, 1], 0, 0),                          # perfectly calibrated
    ([1.0] * 5, [0] * 5, 1, 1),                                                  # always wrong and certain
    ([0.7] * 10, [1] * 6 + [0] * 4, 0.1, 0.1),                                   # all in one bin
    ([0.9, 0.9, 0.9, 0.6], [1, 1, 0, 1], 0.75 * (0.9 - 2 / 3) + 0.25 * 0.4, 0.4),  # bins are weighted by their share
    ([0.9, 0.9], [1, 0], 0.4, 0.4),                                              # in one bin opposite gaps cancel
    ([0.95, 0.55], [1, 0], (0.05 + 0.55) / 2, 0.55)])                            # and in two they do not
def test_calibration_errors_of_cases_worked_out_by_hand(confidence, correct, ece, mce):
    assert calibration(*two_classes(confidence, correct)) == (pytest.approx(ece), pytest.approx(mce))


@pytest.mark.parametrize("num_bins, ece, mce", [
    (1, 0.0875, 0.0875),                                           # the difference of the means
    (10, 0.5 * 0.035 + 0.5 * 0.14, 0.14),                          # (.5, .6] and (.6, .7] take two samples each
    (15, 0.25 * 0.47 + 0.25 * 0.54 + 0.5 * 0.14, 0.54),            # 8/15 = .533 parts the first two
    (20, 0.5 * 0.035 + 0.25 * 0.38 + 0.25 * 0.66, 0.66)])          # .65 parts the last two
def test_errors_are_of_as_many_bins_as_asked_for_and_of_fifteen_without_a_number(num_bins, ece, mce):
    """Confidence .53 (right), .54 (wrong), .62 (right), .66 (wrong): each number of bins has errors of its own."""
    probs, labels = two_classes([0.53, 0.54, 0.62, 0.66], [1, 0, 1, 0])
    assert calibration(probs, labels, num_bins) == (pytest.approx(ece), pytest.approx(mce))
    found = metrics(probs.log(), labels, num_bins)
    assert (found["ece"], found["mce"]) == (pytest.approx(ece), pytest.approx(mce))
    assert len(found["reliability"]) == len(reliability(probs, labels, num_bins)) == num_bins
    if num_bins == 15:
        assert calibration(probs, labels) == (pytest.approx(ece), pytest.approx(mce))
        assert metrics(probs.log(), labels) == found and reliability(probs, labels).shape == (15, 3)


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


def test_metrics_of_float32_logits_are_exact_to_float64():
    """Two classes, class 0 ahead by 0.7, right in one of three: nll and confidence from 0.7 as float32 has it."""
    logits = torch.tensor([[0.7, 0.0]] * 3)
    ahead = logits[0, 0].item()
    found = metrics(logits, torch.tensor([0, 1, 1]))
    assert found["nll"] == pytest.approx(math.log1p(math.exp(-ahead)) + 2 * ahead / 3, rel=1e-14)
    assert found["ece"] == pytest.approx(1 / (1 + math.exp(-ahead)) - 1 / 3, rel=1e-14)


def test_a_class_without_test_images_is_left_out_of_the_mean():
    found = metrics(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 0, 2]))
    assert found["balanced_accuracy"] == 1 and math.isnan(found["per_class_accuracy"][1])


@pytest.mark.parametrize("logits, labels, match", [
    (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), r"\(1, 2\).*finite"),
    (torch.zeros(2, 3), torch.tensor([0]), r"\(2, 3\).*\(1,\)")])
def test_bad_input_is_refused_with_its_shape(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        metrics(logits, labels)


@pytest.mark.parametrize("size, at_once", [(8, 500), (32, 500), (64, 125), (160, 20), (1024, 1)])
def test_predictions_are_logits_of_normalised_images_fewer_at_once_where_they_are_large(size, at_once):
    """The network here gives a pixel of each channel; black is (0 - 0.5) / 0.25 = -2 there, white 2."""
    seen = []

    def network(x):
        seen.append(len(x))
        return x[:, :, 0, 0]
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(2 * at_once + 1, 3, size, size).clone()
    images[2:, 1] = 255
    half = torch.full((3, 1, 1), 0.5)
    logits = evaluate.predict(network, images, half, half / 2)
    assert logits.tolist() == [[-2, -2, -2]] * 2 + [[-2, 2, -2]] * (2 * at_once - 1)
    assert seen == [at_once, at_once, 1]


# --------------------------------------------------------------------------------------- the table

@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What evaluate.py prints in tmp_path, two tables and a text: each a list of lines, which are lists of cells."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert evaluate.main([str(argument) for argument in arguments]) == 0
        parts = capsys.readouterr().out.strip().split("\n\n")
        return [[[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines()]
                for part in parts]
    return run


@pytest.fixture
def table(printed):
    """The rows of the first table."""
    return lambda *arguments: printed(*arguments)[0][2:]


def test_seeds_become_one_row_with_mean_and_deviation(tmp_path, table):
    for seed, accuracy in enumerate((0.50, 0.60)):
        made_up_run(tmp_path / f"adello-s{seed}", accuracy, seed=seed)
    made_up_run(tmp_path / "other", method="fixmatch")
    row, other = table("adello-s0", "adello-s1", "other")
    assert row[:3] == ["adello", "2", "55.0 ± 7.1"]
    assert row[3:6] == ["90.0 ± 0.0", "50.0 ± 0.0", "10.0 ± 0.0"]  # head, medium of two classes, tail
    assert row[6:] == ["10.0 ± 0.0", "20.0 ± 0.0", "0.030 ± 0.000"] and other[:2] == ["other", "1"]


def test_rows_of_one_name_tell_the_settings_that_differ(tmp_path, table):
    for i, settings in enumerate([dict(precision="fp32"), dict(precision="fp32", seed=1), dict(precision="bf16")]):
        made_up_run(tmp_path / f"{i}/a-s{settings.get('seed', 0)}", **settings)
    made_up_run(tmp_path / "3/a-s0", precision="fp32", lr=0.2)
    made_up_run(tmp_path / "3/b-s0", precision="fp16", lr=0.7)
    assert [row[:2] for row in table("?/*")] == [["a", "2"], ["a, precision bf16", "1"], ["a, lr 0.2", "1"], ["b", "1"]]


def test_runs_on_other_test_images_are_no_seeds_of_one_and_those_on_the_same_in_another_place_are(tmp_path, table):
    for name, checksums in (("own", (1, 2)), ("public", (3, 3))):
        for seed, checksum in enumerate(checksums):
            made_up_run(tmp_path / f"{name}{seed}", dataset="folder", data_dir=f"place{seed}", seed=seed,
                        data={"split": 10 * checksum + seed, "test": checksum})
    assert [row[:2] for row in table("*")] == [["own0", "1"], ["own1", "1"], ["public0", "2"]]


def test_a_run_given_twice_is_one_and_the_current_directory_has_a_name(tmp_path, table, monkeypatch):
    made_up_run(tmp_path / "runs" / "a-s0")
    made_up_run(tmp_path / "runs" / "a-s1", seed=1)
    monkeypatch.chdir(tmp_path / "runs" / "a-s1")
    rows = table("../a-s0", ".", "../../runs/a-s0", tmp_path / "runs" / "a-s0", "../*")
    assert [row[:2] for row in rows] == [["a", "2"]] and table(".")[0][0] == "a"


def test_differences_are_taken_between_runs_of_one_seed(tmp_path, printed):
    """Less 40 and 60: 50 and 64 are ahead by 10 and 4 in a mean of 7; seed 2 has no partner."""
    for seed, accuracy in enumerate((0.4, 0.6)):
        made_up_run(tmp_path / f"a-s{seed}", accuracy, seed=seed)
    for seed, accuracy in enumerate((0.5, 0.64, 0.9)):
        made_up_run(tmp_path / f"b-s{seed}", accuracy, seed=seed, method="fixmatch", result={"ece": 0.09})
    _, (*_, row) = printed("a-s*", "b-s*")  # and no line under it: they differ in the method alone
    assert row == ["b", "2", "7.0 ± 4.2", "2", "-1.0 ± 0.0", "2"]


def test_a_line_under_the_differences_says_in_what_else_the_rows_differ(tmp_path, printed):
    made_up_run(tmp_path / "a", variant="darp")
    made_up_run(tmp_path / "b", method="fixmatch", steps=60, data={"test": 7})
    _, (*_, row), ((line,),) = printed("a", "b")
    assert row[:2] == ["b", "1"] and "steps" in line and "data" in line
    assert not any(word in line for word in ("method", "variant", "seed", "lr", "out"))


def test_without_a_pair_there_is_no_table_of_differences(tmp_path, printed):
    made_up_run(tmp_path / "a")
    made_up_run(tmp_path / "b", method="fixmatch", seed=1)
    assert len(printed("a")) == len(printed("a", "b")) == 1


@pytest.mark.parametrize("result, thirds", [
    (dict(classes=["a", "b"], per_class_accuracy=[0.9, 0.2], p_labeled=[0.3, 0.7]), ["20.0", "–", "90.0"]),
    (dict(per_class_accuracy=[None, 0.6, None, 0.1]), ["–", "60.0", "10.0"])])
def test_a_part_without_classes_or_without_test_images_is_a_dash(result, thirds, tmp_path, table):
    """Two classes have no medium; the mean is over the classes that have test images."""
    made_up_run(tmp_path / "a", result={"kl_q_qhat": None, **result})
    (row,) = table("a")
    assert row[3:6] == thirds and row[-1] == "–"


SPOILED = [(name, content) for name in ("config.json", "result.json")
           for content in (None, b"", b"null", b"[]", b"{}", b'{"seed": 0,', b"\xff\xfe", b"[" * 100_000)]


@pytest.mark.parametrize("name, content", SPOILED)
def test_what_is_no_finished_run_is_one_line_and_status_2(tmp_path, one_line, name, content):
    path = made_up_run(tmp_path / "run") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert evaluate.main([str(tmp_path / "run")]) == 2
    one_line("is no finished run")


def test_what_is_not_finished_is_left_out_by_name_and_an_error_where_nothing_is(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (made_up_run(tmp_path / "begun") / "result.json").unlink()
    pattern = str(tmp_path / "*")
    assert evaluate.main([pattern]) == 2
    out, error = capsys.readouterr()
    assert not out and error.splitlines()[-1].startswith("error: ")
    made_up_run(tmp_path / "finished")
    assert evaluate.main([pattern]) == 0
    out, error = capsys.readouterr()
    assert "| finished | 1 |" in out and "begun" not in out
    for name, line in zip(("begun", "empty"), error.splitlines(), strict=True):
        assert str(tmp_path / name) in line


def test_two_runs_of_one_seed_and_one_setting_are_not_taken_for_two_seeds(tmp_path):
    """As when the code was changed between them: the second stands apart, and with it its difference."""
    runs = [evaluate.read_run(made_up_run(tmp_path / name)) for name in ("a", "b")]
    assert [len(members) for members in evaluate.group(runs).values()] == [1, 1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_the_signs_gets_the_table_all_the_same(tmp_path, monkeypatch, encoding):
    for seed in (0, 1):
        made_up_run(tmp_path / f"a-s{seed}", seed=seed)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert evaluate.main([str(tmp_path / "*")]) == 0
    out.flush()
    assert b"| a | 2 | 50.0 " in out.buffer.getvalue()

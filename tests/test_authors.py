"""Twelve steps of the authors' own training loop, for five methods, in float64; and authors.py.

authors_trajectory.json says how its numbers were made from the authors' public code, and gives start, labels and views
as formulas, which authors.py writes out. Here the project's set-up, step and loop start there and see the same views.
Where ADELLO_AUTHORS names a checkout of the authors' code, that runs, too.
"""

import inspect
import os
import statistics
import textwrap

import pytest
import torch
import torch.nn.functional as F

import authors
import losses
import models
import train

METHODS = list(authors.AUTHORS["methods"])
CHECKOUT = os.environ.get("ADELLO_AUTHORS")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="ADELLO_AUTHORS names no checkout")


def follow(method):
    with authors.float64():
        return authors.ours(authors.Case(method))


# ------------------------------------------------------------------------------ the file's numbers

def test_the_formulas_number_the_parameters_as_the_file_does():
    found = {name: list(p.shape) for name, p in authors.start(authors.Case("adello")).named_parameters()}
    assert list(found.items()) == list(authors.AUTHORS["parameters"].items())


@pytest.mark.parametrize("method", METHODS)
def test_twelve_steps_agree_with_the_authors(method):
    theirs = authors.recorded(method)
    ours, _ = follow(method)
    for name, value in theirs.items():
        assert authors.distance(value, ours[name]) < 1e-10, name


def test_the_loop_evaluates_the_network_that_the_authors_evaluate():
    logits = torch.tensor(authors.recorded("adello")["eval_logits"], dtype=torch.float64)
    _, result = follow("adello")
    assert result["nll"] == pytest.approx(F.cross_entropy(logits, torch.arange(4)).item(), abs=1e-6)


def test_the_distance_is_the_largest_anywhere():
    assert authors.distance({"a": [0.0, [1.0, 2.0]], "b": 1.0}, {"a": [0.0, [4.0, 2.0]], "b": 1.5}) == 3


MUTANTS = {  # name: (where a function stands, its name there, a part of its text, what replaces it)
    "Qhat after the update": (train.Run, "step", "self.estimator.q_hat.clone()", "self.estimator.q_hat"),
    "T a step early": (
        train.Run, "step", "with_ccr and self.t == config.warmup_steps", "self.t == config.warmup_steps - 1"),
    "no 1 - M": (train, "complementary_loss", "losses * (1 - mask)", "losses"),
    "eps 1e-8": (losses, "adjust", "(source + EPS) / (target + EPS)", "(source + 1e-8) / (target + 1e-8)"),
    "mean over unmasked samples": (
        train, "consistency_loss", "(losses * mask).mean()", "(losses * mask).sum() / mask.sum().clamp(min=1)"),
    "EMA averages buffers": (
        models.EMA, "update", "torch._foreach_copy_([*self.model.buffers()], [*model.buffers()])",
        "[old.copy_(self.decay * old + (1 - self.decay) * new)"
        " for old, new in zip(self.model.buffers(), model.buffers())]")}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_catches(mutant, monkeypatch):
    place, name, right, wrong = MUTANTS[mutant]
    function = getattr(place, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{name} has no {right!r} to change"
    names = {}
    exec(source.replace(right, wrong), inspect.unwrap(function).__globals__, names)
    monkeypatch.setattr(place, name, names[name])
    ours, _ = follow("adello")
    assert authors.distance(authors.recorded("adello"), ours) > 1e-10


# -------------------------------------------------------------------------------- with a checkout

@pytest.fixture(scope="module")
def module():
    return authors.imported(CHECKOUT)


@needs_checkout
@pytest.mark.parametrize("method, settings", [
    *((method, settings) for method in (*METHODS, "ccr") for settings in ({}, {"shipped": True})),
    ("adello", {"depth": 16, "width": 2, "seed": 1}), ("ccr", {"seed": 2})])
def test_their_loop_computes_what_the_file_holds_and_what_this_code_does(method, settings, module):
    for name, (in_file, here) in authors.differences(module, authors.Case(method, **settings)).items():
        assert (in_file or 0) <= 1e-12 and here <= 1e-10, name


@needs_checkout
def test_their_shipped_settings_go_another_way(module):
    with authors.float64():
        shipped = authors.theirs(module, authors.Case("adello", shipped=True))
    ours, _ = follow("adello")
    for name in ("lr", "temperature", "loss_uc", "eval_logits"):
        assert authors.distance(shipped[name], ours[name]) > 1e-4


@needs_checkout
@pytest.mark.parametrize("method", ["fixmatch", "adello"])
def test_a_training_of_each_code_leaves_a_run_and_a_row(method, image_folder, tmp_path, monkeypatch, capsys):
    """Three classes in place of ten, whose counts are the same in both splits; and the table of runs or rows."""
    import results
    monkeypatch.setattr(authors, "SPLIT", "--dataset folder --image-size 16 --n1 20 --m1 15 --imb 4".split())
    monkeypatch.setattr(authors, "TRAINING", "--model wrn-10-1 --ema 0.5 --prior-momentum 0.5 --eval-every 2".split())
    words = ["train", CHECKOUT, "--data-dir", str(image_folder), "--methods", method, "--shifts", "reversed", "--steps",
             "4", "--batch-size", "8", "--out", str(tmp_path)]
    assert authors.main(words) == 0
    theirs, ours = (results.logged(tmp_path / f"codes-{side}-{method}-reversed-s0") for side in ("theirs", "ours"))
    for name in ("p_labeled", "q_true"):
        assert theirs.result[name] == pytest.approx(ours.result[name], abs=1e-6)
    assert [row["step"] for row in theirs.log] == [2, 4]
    command = results.command_of(theirs.config, theirs.directory.name)[0]
    assert command.startswith("python tests/authors.py train ") and command.endswith("--steps 4 --batch-size 8")
    assert results.command_of(ours.config, ours.directory.name)[0].startswith("python train.py ")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.collect([theirs.directory, ours.directory])
    capsys.readouterr()
    assert authors.main(["table", str(theirs.directory), str(ours.directory)]) == 0
    printed = capsys.readouterr().out
    assert f"{100 * theirs.result['ece']:.1f} | {100 * ours.result['ece']:.1f}" in printed
    assert results.TABLES["codes"]() == printed.strip()


# ------------------------------------------------------------------------------- without a checkout

@pytest.mark.parametrize("words", [["trajectory", "nowhere"], ["train", "nowhere", "--data-dir", "images"],
                                   ["table", "nowhere"]])
def test_what_is_not_there_is_said_in_one_line(words, capsys):
    assert authors.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere is no " if "table" not in words else "error: ") and error.count("\n") == 1


def test_their_flags_say_what_the_settings_say():
    """By the names in their train.py and in adello.py; the values that the settings of the whole trainings name."""
    words = "--n1 500 --m1 1000 --imb 50 --shift reversed --steps 1600 --ema 0.995 --prior-momentum 0.99 --lr 0.02"
    config, _ = train.parse([*words.split(), "--method", "adello", "--image-size", "16", "--warmup-steps", "300"])
    flags = authors.flags_of(config, 10, "somewhere")
    expected = {"num_labels": 500, "ulb_num_labels": 1000, "lb_imb_ratio": 50, "ulb_imb_ratio": -50, "ema_m": 0.995,
                "num_train_iter": 1600, "adello_ema_p": 0.99, "lr": 0.02, "img_size": 16, "distill_start_iter": 300,
                "use_scheduler": "True", "distill_T": "1.0", "adello_alpha_from_epoch": "False"}
    assert {name: flags[f"--{name}"] for name in expected} == expected


def made_up(side, values, method="adello", shift="reversed"):
    return [{"variant": side, "method": method, "shift": shift, "balanced_accuracy": value / 100, "ece": 0.1}
            for value in values]


def test_the_interval_is_students():
    """Means 30 and 32, pooled variance 2.5, t(8) = 2.306004: 2 -+ 2.306004 sqrt(2.5 (1/5 + 1/5)) = 2 -+ 2.306004."""
    theirs, mine = [28, 29, 30, 31, 32], [30, 31, 32, 33, 34]
    assert statistics.variance(theirs) == statistics.variance(mine) == 2.5
    table = authors.table(made_up("authors", theirs) + made_up(None, mine))
    assert table.splitlines()[2].startswith(
        "| reversed, ADELLO | 30.0 ± 1.6 | 32.0 ± 1.6 | +2.0 [-0.3, +4.3] | 10.0 ± 0.0 | 10.0 ± 0.0 |")


def test_all_groups_weigh_the_same():
    """Differences 2 and -1, each of variance 1, 16 degrees of freedom: 0.5 -+ 2.119905 sqrt(2) / 2 = 0.5 -+ 1.499."""
    rows = made_up("authors", [28, 29, 30, 31, 32]) + made_up("", [30, 31, 32, 33, 34])
    rows += made_up("authors", [8, 9, 10, 11, 12], "udal") + made_up("", [7, 8, 9, 10, 11], "udal")
    assert "| all groups |  |  | +0.5 [-1.0, +2.0] |" in authors.table(rows).splitlines()[-1]

"""Twelve steps of the authors' own training loop, number by number, for five methods, in float64.

authors_trajectory.json says how its numbers were made from the authors' public code, and gives start, labels and views
as formulas, which authors.py writes out. Here the project's set-up, step and loop start there and see the same views.
"""

import functools
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F

import authors
import losses
import models
import train

METHODS = list(authors.AUTHORS["methods"])


@pytest.fixture(autouse=True)
def float64():
    with authors.float64():
        yield


def follow(method):
    return authors.ours(authors.Case(method))


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
    logits = torch.tensor(authors.recorded("adello")["eval_logits"])
    _, result = follow("adello")
    assert result["nll"] == pytest.approx(F.cross_entropy(logits, torch.arange(4)).item(), abs=1e-6)


# ------------------------------------------------------------------------------------- wrong versions

def edited(function, right, wrong):
    """A function of the project with a change in its text."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{function.__name__} has no {right!r} to change"
    names = {}
    exec(source.replace(right, wrong), function.__globals__, names)
    return names[function.__name__]


def average_buffers_too(self, model):
    """EMA.update that treats batch-norm's statistics like parameters."""
    for mean, new in zip(self.model.state_dict().values(), model.state_dict().values()):
        mean.copy_(self.decay * mean + (1 - self.decay) * new)


MUTANTS = {  # name: (where it stands, its name there, what replaces it)
    "Qhat after the update": (train.Run, "step", functools.partial(
        edited, right="self.estimator.q_hat.clone()", wrong="self.estimator.q_hat")),
    "T a step early": (train.Run, "step", functools.partial(
        edited, right="with_ccr and self.t == config.warmup_steps", wrong="self.t == config.warmup_steps - 1")),
    "no 1 - M": (train, "complementary_loss", functools.partial(
        edited, right="losses * (1 - mask)", wrong="losses")),
    "eps 1e-8": (losses, "EPS", lambda eps: 10 * eps),
    "mean over unmasked samples": (train, "consistency_loss", functools.partial(
        edited, right="(losses * mask).mean()", wrong="(losses * mask).sum() / mask.sum().clamp(min=1)")),
    "EMA averages buffers": (models.EMA, "update", lambda _: average_buffers_too),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_catches(mutant, monkeypatch):
    place, name, change = MUTANTS[mutant]
    right = authors.recorded("adello")
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    wrong, _ = follow("adello")
    assert authors.distance(right, wrong) > 1e-10

"""Twelve steps of the authors' own training loop, number by number, for five methods, in float64.

authors_trajectory.json says how its numbers were made from the authors' public code, and gives start, labels and views
as formulas. Here the project's set-up, step and loop start there and see the same views.
"""

import functools
import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import losses
import models
import train

AUTHORS = json.loads((Path(__file__).parent / "authors_trajectory.json").read_text(encoding="utf-8"))
SETTINGS = AUTHORS["settings"]
METHODS = list(AUTHORS["methods"])
COUNTS = AUTHORS["labeled_counts"]
K = SETTINGS["K"]
B = SETTINGS["batch_size"]
U = B * SETTINGS["mu"]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start():
    """The network at the start of the formula `parameters`."""
    model = models.WideResNet(SETTINGS["depth"], SETTINGS["width"], K, SETTINGS["bn_momentum"])
    own = dict(model.named_parameters())
    for p, (name, shape) in enumerate(AUTHORS["parameters"].items()):
        i = np.arange(np.prod(shape))
        u = (31 * i ** 2 + 7919 * i + 104729 * p) % 10007 / 10007 - 0.5
        if len(shape) == 4:
            value = u * np.sqrt(24 / (shape[0] * shape[2] * shape[3]))
        elif len(shape) == 2:
            value = u * np.sqrt(150 / sum(shape))
        elif ".weight" in name:
            value = 1 + 0.2 * u
        else:
            value = 0.2 * u
        own.pop(name).data.copy_(torch.from_numpy(value).view(shape))
    assert not own, f"no formula for {list(own)}"
    return model


def label(n):
    """L(n): classes in a row of 93 places, which labeled_counts divide."""
    return np.searchsorted(np.cumsum(COUNTS), np.asarray(n) % sum(COUNTS), side="right")


def view(classes, numbers, strength, offset):
    """Images of these classes and numbers (N,): (N, 3, 8, 8) uint8; weak is (11, 0), strong is (5, 60)."""
    j = np.arange(3 * SETTINGS["image_size"] ** 2)
    c = np.asarray(classes)[:, None]
    a = np.asarray(numbers)[:, None]
    noise = (37 * j ** 2 + (2 * a + 1) * j + 29 * a) % 127
    wave = (2 * c + 3) * j % 11
    pixels = strength * wave + noise + offset
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 3, 8, 8)


def given(t):
    """Step t of the trajectory: labeled views, labels, weak views, hidden labels, strong views."""
    labels = label(29 * (B * t + np.arange(B)))
    hidden_labels = K - 1 - label(29 * (U * t + np.arange(U)) + 7)
    numbers = (B + 2 * U) * t + np.arange(B + 2 * U)
    x, w, s = np.split(numbers, [B, B + U])
    return (view(labels, x, 11, 0), torch.from_numpy(labels), view(hidden_labels, w, 11, 0),
            torch.from_numpy(hidden_labels), view(hidden_labels, s, 5, 60))


def normalized(images):
    return (images.double() / 255 - 0.5) / 0.25


def fingerprints(model):
    """[norm, sum x_i cos i] of each tensor of a network, in the order of the trajectory."""
    state = model.state_dict()
    values = [state[name].flatten() for name in AUTHORS["state"]]
    return [[x.norm().item(), (x * torch.arange(len(x)).cos()).sum().item()] for x in values]


def follow(method):
    """Train as train.py does on the given views: (record like the trajectory's, the loop's result)."""
    test = view(np.arange(4), 480 + np.arange(4), 11, 0)
    labels = torch.arange(K).repeat_interleave(torch.tensor(COUNTS))
    blank = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    sets = data.Data(blank, labels, blank, labels, test, torch.arange(4), list("abcde"),
                     torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    same = {name: SETTINGS[name] for name in (
        "steps", "batch_size", "mu", "image_size", "lr", "weight_decay", "ema", "bn_momentum", "threshold",
        "prior_momentum", "alpha_min", "d", "warmup_steps")}
    run = train.setup(train.Config(method=method, model="wrn-10-1", device="cpu", precision="fp32", compile="off",
                                   **same), sets, start())
    run.forward = lambda *views: run.network(normalized(torch.cat(views)))
    record = {"fingerprints": {}}

    def step(run, *_):
        labeled, labels, weak, hidden_labels, strong = given(run.step)
        found = train.train_step(run, labeled, labels, weak, hidden_labels, strong)
        in_force = {"mask": found["mask_rate"], "lr": run.optimizer.param_groups[0]["lr"],
                    "alpha": train.alpha_schedule(run.step, run.config.steps, run.config.alpha_min, run.config.d),
                    "q_hat": run.estimator.q_hat.tolist(), "temperature": run.estimator.temperature}
        for name, value in (found | in_force).items():
            record.setdefault(name, []).append(value if isinstance(value, list) else float(value))
        record["fingerprints"][f"after_step_{run.step + 1}"] = {
            "network": fingerprints(run.model), "ema": fingerprints(run.ema.model)}
        return found

    result = train.train(run, None, step)
    record["eval_logits"] = run.evaluated(normalized(test)).tolist()
    return record, result


def distance(theirs, ours):
    """The largest difference of numbers that stand at the same place of two nested records."""
    if theirs is None:  # T before it is computed
        return 0
    if isinstance(theirs, dict):
        return max(distance(value, ours[name]) for name, value in theirs.items())
    if isinstance(theirs, list):
        assert len(theirs) == len(ours)
        return max(map(distance, theirs, ours))
    return abs(theirs - ours)


def trajectory(method):
    """The authors' numbers of a method."""
    return {name: value for name, value in AUTHORS["methods"][method].items() if name != "authors_flags"}


@pytest.mark.parametrize("method", METHODS)
def test_twelve_steps_agree_with_the_authors(method):
    theirs = trajectory(method)
    ours, _ = follow(method)
    for name, value in theirs.items():
        assert distance(value, ours[name]) < 1e-10, name


def test_the_loop_evaluates_the_network_that_the_authors_evaluate():
    logits = torch.tensor(trajectory("adello")["eval_logits"])
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
    "Qhat after the update": (train, "train_step", functools.partial(
        edited, right="run.estimator.q_hat.clone()", wrong="run.estimator.q_hat")),
    "T a step early": (train, "train_step", functools.partial(
        edited, right="first_ccr_step=ccr and run.step == config.warmup_steps",
        wrong="first_ccr_step=run.step == config.warmup_steps - 1")),
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
    right = trajectory("adello")
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    wrong, _ = follow("adello")
    assert distance(right, wrong) > 1e-10

"""The one place where the tests of options, seeds, views and recorded numbers touch the code's interfaces.

A run here is whatever has a config, sets, p_labeled, q_true, model, ema, optimizer, estimator and rows.
"""

import itertools
import types
from dataclasses import asdict

import torch

import data
import train

BATCH = {"batch"}                  # the function that gets a batch, by name: see test_cuda.in_steps
STEP = {"step"}      # those that lead to the optimiser's step


def parse(words, variant=None):
    """The Config that a command line gives, numbers allowed among its words."""
    return train.parse(list(map(str, words)), variant)[0]


def load(config):
    """The Data of a run with this Config."""
    return data.load(config)


def make(config, sets=None, model=None):
    """A run at step 0. sets: ready Data; model: a ready network."""
    return train.Run(config, sets, model)


def set_step(run, t):
    """Let the run be about to do step t."""
    run.t = t


def batch(run):
    """The arguments of its step: labeled, labels, unlabeled, hidden labels, draws."""
    return run.batch()


def step(run, batch):
    """Do it. Returns a dict of named scalars."""
    return run.step(*batch)


def train_to_the_end(run):
    """Do all its steps, write nothing. Returns what result.json would hold; the log is in run.rows."""
    return train.train(run, None)


def train_with(words, **hooks):
    """The command. Returns its exit status."""
    return train.main(list(map(str, words)), **hooks)


def refusal(held, asked):
    """What is said where a directory holds a run of the one Config and the other is asked for; None: it goes on."""
    try:
        train.compare(asdict(held), asdict(asked), {})
    except ValueError as error:
        return str(error)


def clock(monkeypatch, seconds):
    """Let so many seconds pass between two looks that the training takes at its clock."""
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=itertools.count(step=seconds).__next__))


def as_compiled(monkeypatch):
    """Let the views be computed as they are under torch.compile."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

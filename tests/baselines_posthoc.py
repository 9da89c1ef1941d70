"""What is done to a finished run: cRT draws its classifier anew, LA adjusts its logits.

The result is a run of its own beside it, <run>+crt or <run>+la; the run stays as it is.
"""

import argparse
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import train
from baselines_fixmatch import balanced, features, last, with_last


def crt(run):
    """cRT (Kang et al. 2020): the features stay, a new linear layer learns from class-balanced labeled weak views.

    It does so for a fifth of the run's steps, at the run's rate. Returns the EMA network with that layer.
    """
    config = run.config
    sets = run.sets
    first = run.extra.get("first")                     # CReST's labeled set begins with the one that has true labels
    labels = sets.labels[:first.counts.sum()] if first else sets.labels
    choice = labels.cpu()
    counts = torch.bincount(choice, minlength=len(sets.classes))
    random = torch.Generator().manual_seed(config.seed)
    layer = torch.nn.Linear(last(run.model)[1].in_features, len(sets.classes)).to(run.device)
    optimizer = torch.optim.SGD(layer.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    steps = max(1, config.steps // 5)
    for t in range(steps):
        x = train.send(balanced(choice, counts, config.batch_size, random), run.device)
        draws = train.send(torch.rand(len(x), 3, generator=random), run.device)
        optimizer.param_groups[0]["lr"] = config.lr * math.cos(7 * math.pi * t / (16 * steps))
        optimizer.zero_grad()
        logits = layer(features(run.ema.model, sets, data.weak(sets.labeled[x], draws)))
        F.cross_entropy(logits, labels[x]).backward()
        optimizer.step()
    run.ema.model = with_last(run.ema.model, layer.requires_grad_(False))
    return run.ema.model


class Adjusted(torch.nn.Module):
    """A network's logits less log P_L."""

    def __init__(self, network, p_labeled):
        super().__init__()
        self.network = network
        self.p_labeled = p_labeled

    def forward(self, images):
        return self.network(images) - self.p_labeled.log()


def la(run):
    """LA (Menon et al. 2021): f - log P_L, of the network that the run evaluates.

    P_L is that of the set it was trained on last: of CReST+, pseudo-labels included.
    """
    return Adjusted(run.evaluated, run.p_labeled)


METHODS = {"crt": crt, "la": la}


def restored(directory, device, prepare_of):
    """A finished run as it was at its last step, and its result. ValueError where there is none."""
    state = train.read_checkpoint(Path(directory) / "checkpoint.pt")
    if not state or not state["result"]:
        raise ValueError(f"{directory} holds no checkpoint of a finished run")
    config = train.Config(**state["config"])
    prepare = prepare_of(config.variant)
    if not prepare:
        raise ValueError(f"{directory} is a run of {config.variant}; name one that was trained")
    config.out = str(directory)
    config.device = train.parse(["--device", device, "--precision", "fp32"])[0].device
    run = prepare(config)
    train.restore(run, state)
    return run, state["result"]


def place(directory, base, name):
    """<run>+<name>: behind the method's name in the last part of the path, else at its end."""
    directory = Path(directory)
    if directory.name in ("", ".."):
        directory = directory.resolve()
    method = re.compile(rf"(?<![\w.+]){re.escape(base)}(?![\w.+])")
    new = method.sub(lambda found: f"{found[0]}+{name}", directory.name, count=1)
    return directory.with_name(f"{new}+{name}" if new == directory.name else new)


def main(name, arguments, prepare_of):
    """Apply a method to a finished run; prepare_of(variant): the set-up of a run, or None. ValueError, OSError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = train.refuse
    parser.add_argument("directory", nargs="?")
    parser.add_argument("--device", default="auto")
    options, unknown = parser.parse_known_args(arguments)
    if unknown or not options.directory:
        raise ValueError(f"{name} takes the directory of a finished run, and --device")
    run, result = restored(options.directory, options.device, prepare_of)
    config = run.config
    base = config.variant or config.method
    out = place(options.directory, base, name)
    config.variant = f"{base}+{name}"
    config.out = str(out)
    other = train.read_checkpoint(out / "checkpoint.pt")
    if other and other["config"]["variant"] != config.variant:
        raise ValueError(f"{out} holds another run")
    run.evaluated = METHODS[name](run)
    figures = train.strict(train.figures(run))
    row = run.rows[-1]
    row |= {column: value for column, value in figures.items() if column in row}
    lock = train.hold(out)
    try:
        train.save(run, out, result | figures)
    finally:
        lock.release()
    return evaluate.main([str(out)])

"""What is done to a finished run: cRT draws its classifier anew, LA adjusts its logits.

The result is a run of its own beside it, <run>+crt or <run>+la; the run stays as it is.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import train
from methods.fixmatch import balanced, features, last


def crt(run):
    """cRT (Kang et al. 2020): the features stay, a new linear layer learns from class-balanced labeled weak views.

    It does so for a fifth of the run's steps, at the run's rate. Returns the EMA network, whose last it becomes.
    """
    config = run.config
    sets = run.sets
    K = len(sets.classes)
    labels = sets.labels[:getattr(run, "first", None)]  # CReST's labeled set begins with the one that has true labels
    choice = labels.cpu()
    counts = torch.bincount(choice, minlength=K)
    random = torch.Generator().manual_seed(config.seed)
    name, old = last(run.ema.model)
    layer = torch.nn.Linear(old.in_features, K).to(run.device)
    optimizer = torch.optim.SGD(layer.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    steps = max(1, config.steps // 5)
    for t in range(steps):
        x = data.send(balanced(choice, counts, config.batch_size, random), run.device)
        draws = data.send(torch.rand(len(x), 3, generator=random), run.device)
        optimizer.param_groups[0]["lr"] = config.lr * math.cos(7 * math.pi * t / (16 * steps))
        optimizer.zero_grad()
        views = data.normalize(data.weak(sets.labeled[x], draws), sets.mean, sets.std)
        F.cross_entropy(layer(features(run.ema.model, views)), labels[x]).backward()
        optimizer.step()
    setattr(run.ema.model, name, layer.requires_grad_(False))
    return run.ema.model


def la(run):
    """LA (Menon et al. 2021): f - log P_L, of the network that the run evaluates.

    P_L is that of the set it was trained on last: of CReST+, pseudo-labels included.
    """
    evaluated = run.evaluated
    return lambda images: evaluated(images) - run.p_labeled.log()


METHODS = {"crt": crt, "la": la}


def restored(directory, device, kind_of, data_dir=None):
    """A finished run as it was at its last step, and its result; data_dir: where its images are now. ValueError."""
    state = train.read_checkpoint(Path(directory) / "checkpoint.pt")
    if not state or not state["result"]:
        raise ValueError(f"{directory} holds no checkpoint of a finished run")
    try:
        config = train.Config(**state["config"])
    except TypeError as error:
        raise ValueError(f"{directory} holds a run of another code ({error})") from None
    kind = kind_of(config.variant)
    if not kind:
        raise ValueError(f"{directory} is a run of {config.variant}; name one that was trained")
    config.out = str(directory)
    config.data_dir = data_dir or config.data_dir
    config.device = device
    train.choose(config)
    run = kind(config)
    try:
        train.restore(run, state)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"{directory} holds a run of another code ({error})") from None
    return run, state["result"]


def place(directory, base, name):
    """<run>+<name>: behind the method's name in the last part of the path, else at its end."""
    directory = Path(directory)
    if directory.name in ("", ".."):
        directory = directory.resolve()
    method = re.compile(rf"(?<![\w.+]){re.escape(base)}(?![\w.+])")
    new = method.sub(lambda found: f"{found[0]}+{name}", directory.name, count=1)
    return directory.with_name(f"{new}+{name}" if new == directory.name else new)


def main(name, arguments, kind_of):
    """Apply a method to a finished run; kind_of(variant): what makes such a run, or None. ValueError, OSError."""
    parser = train.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("directory", nargs="?")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir")
    options, unknown = parser.parse_known_args(arguments)
    if unknown or not options.directory:
        raise ValueError(f"{name} takes the directory of a finished run, --device and --data-dir")
    run, result = restored(options.directory, options.device, kind_of, options.data_dir)
    config = run.config
    base = config.variant or config.method
    out = place(options.directory, base, name)
    config.variant = f"{base}+{name}"
    config.out = str(out)
    sets = run.sets
    logits = evaluate.predict(METHODS[name](run), sets.test, sets.mean, sets.std)
    text = json.dumps(evaluate.metrics(logits, sets.test_labels))
    found = json.loads(text, parse_constant=lambda nan: None)  # as in train.record
    row = run.rows[-1]
    row |= {column: value for column, value in found.items() if column in row}
    lock = train.hold(out)
    try:
        other = train.read_checkpoint(out / "checkpoint.pt")
        if other and other["config"]["variant"] != config.variant:
            raise ValueError(f"{out} holds another run")
        train.save(run, out, result | found)
    finally:
        lock.release()
    return evaluate.main([str(out)])

"""Evaluation: accuracy and calibration of a network, and the table of finished runs.

    python evaluate.py runs/shapes-*

Calibration as in the paper: softmax confidence of the EMA network, 15 equal-width bins,
ECE = sum_b n_b/N |acc_b - conf_b|, MCE = max_b |acc_b - conf_b| (Guo et al. 2017).
"""

import argparse
import csv
import glob
import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import data


@torch.no_grad()
def predict(model, images, mean, std, batch_size=500):
    """Logits of a network on uint8 images (N, 3, H, W) of its device: (N, K) float32 on the CPU."""
    logits = []
    for part in images.split(batch_size):
        inputs = data.normalize(part, mean, std).contiguous(memory_format=torch.channels_last)
        logits.append(model(inputs).float())
    return torch.cat(logits).cpu()


def check(scores, labels):
    """ValueError unless scores are finite, (N, K), and labels in 0..K-1, (N,), with N >= 1."""
    if labels.shape != scores.shape[:-1] or len(labels) == 0:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must be "
                         "(N, K) and (N,) with N >= 1")
    if not torch.isfinite(scores).all() or labels.min() < 0 or labels.max() >= scores.shape[-1]:
        raise ValueError(f"scores {tuple(scores.shape)} must be finite and labels within 0..K-1")


def reliability(probs, labels, num_bins=15):
    """Equal-width bins of confidence, (lower, upper] each; the first one takes 0, too.

    probs: (N, K); labels: (N,). Returns (num_bins, 3): share of the samples, accuracy, mean
    confidence (the last two 0 in an empty bin). Raises ValueError on bad input.
    """
    check(probs, labels)
    confidence, predicted = probs.max(dim=1)
    correct = (predicted == labels).to(probs.dtype)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=probs.dtype, device=probs.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, num_bins - 1)
    count = torch.bincount(bins, weights=torch.ones_like(confidence), minlength=num_bins)
    accuracy = torch.bincount(bins, weights=correct, minlength=num_bins) / count.clamp(min=1)
    mean = torch.bincount(bins, weights=confidence, minlength=num_bins) / count.clamp(min=1)
    return torch.stack([count / len(labels), accuracy, mean], dim=1)


def calibration(probs, labels, num_bins=15):
    """Expected and maximum calibration error, (ECE, MCE) as fractions; see `reliability`."""
    share, accuracy, confidence = reliability(probs, labels, num_bins).unbind(dim=1)
    gap = (accuracy - confidence).abs()
    return (share * gap).sum().item(), gap.max().item()


def metrics(logits, labels, num_bins=15):
    """Accuracy and calibration of logits (N, K) against labels (N,): a dict of floats and lists.

    accuracy, balanced_accuracy (mean over the classes present), ece, mce, nll; the lists are
    per_class_accuracy, K with NaN for an absent class, and reliability. ValueError on bad input.
    """
    check(logits, labels)
    K = logits.shape[-1]
    logits = logits.double()
    probs = logits.softmax(dim=1)
    ece, mce = calibration(probs, labels, num_bins)
    correct = (logits.argmax(dim=1) == labels).double()
    present = torch.bincount(labels, minlength=K)
    per_class = torch.bincount(labels, weights=correct, minlength=K) / present  # 0 / 0 = NaN
    return {
        "accuracy": correct.mean().item(),
        "balanced_accuracy": per_class[present > 0].mean().item(),
        "ece": ece,
        "mce": mce,
        "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
        "per_class_accuracy": per_class.tolist(),
        "reliability": reliability(probs, labels, num_bins).tolist(),
    }


# ----------------------------------------------------------------------- the table of finished runs

class FinishedRun(NamedTuple):
    """What the files of a finished run hold."""
    directory: Path
    config: dict
    result: dict
    log: list       # of a dict of floats for each row of log.csv


def read_run(directory):
    """A finished run from its files. Raises ValueError where there is none."""
    directory = Path(directory).resolve()  # so that `.` has a name
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        with open(directory / "log.csv", newline="", encoding="utf-8") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        run = FinishedRun(directory, config, result, log)
        table(group([run]))  # what they lack shows here
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{directory} is no finished run ({error}); the command that made it "
                         "completes or mends it") from None
    return run


def identity(config):
    """The settings that make a run what it is, of a dict of all settings.

    Where it is written and on which device it is computed make no other run; nor does the place of
    a published data set, while a folder is known by its place.
    """
    free = {"out", "device", "compile", "made_with"}
    if config["dataset"] != "folder":
        free.add("data_dir")
    return {name: value for name, value in config.items() if name not in free}


def group(runs):
    """Runs that differ in the seed alone together: a dict from a name to a list of runs.

    Of two runs with equal settings and seed the second stands apart: their code must differ.
    """
    groups = {}
    for run in {run.directory: run for run in runs}.values():  # a run given twice is one
        settings = identity(run.config)
        seed = settings.pop("seed")
        key = json.dumps(settings, sort_keys=True)
        while seed in [other.config["seed"] for other in groups.get(key, [])]:
            key += "'"
        groups.setdefault(key, []).append(run)
    named = {}
    for members in groups.values():
        name = re.sub(r"-s\d+$", "", members[0].directory.name)
        while name in named:
            name += "'"
        named[name] = members
    return named


def thirds(result):
    """Mean accuracy of the head, medium and tail classes: a third of them each, by P_L."""
    order = sorted(range(len(result["p_labeled"])), key=lambda k: -result["p_labeled"][k])
    third = max(1, len(order) // 3)
    means = []
    for part in (order[:third], order[third:-third] or order[:1], order[-third:]):
        present = [result["per_class_accuracy"][k] for k in part]
        present = [value for value in present if value is not None]
        means.append(statistics.mean(present) if present else None)
    return means


def spread(values, digits=1, scale=1):
    """Mean and, of several values, sample standard deviation; "–" where one is unknown."""
    if None in values:
        return "–"
    values = [scale * value for value in values]
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def table(groups):
    """A Markdown table, a row for each group of runs."""
    lines = ["| run | seeds | balanced accuracy | head | medium | tail | ECE | MCE | KL(Q‖Q̂) |",
             "|" + " --- |" * 9]
    for name, runs in groups.items():
        results = [run.result for run in runs]
        columns = [[r["balanced_accuracy"] for r in results]]
        columns += zip(*(thirds(r) for r in results))
        columns += [[r["ece"] for r in results], [r["mce"] for r in results]]
        cells = [name, str(len(runs))]
        cells += [spread(column, scale=100) for column in columns]
        cells.append(spread([r["kl_q_qhat"] for r in results], 3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(groups):
    """A Markdown table of differences to the first group, seed by seed, in points.

    A pair of runs with the same seed shares split, start and order, so that its difference scatters
    less than either run.
    """
    (first, reference), *others = groups.items()
    by_seed = {run.config["seed"]: run.result for run in reference}
    lines = [f"| less {first}, by seed | pairs | balanced accuracy | ahead | ECE | lower |",
             "|" + " --- |" * 6]
    for name, runs in others:
        pairs = [(run.result, by_seed[run.config["seed"]])
                 for run in runs if run.config["seed"] in by_seed]
        if pairs:
            accuracy = [a["balanced_accuracy"] - b["balanced_accuracy"] for a, b in pairs]
            ece = [a["ece"] - b["ece"] for a, b in pairs]
            ahead = sum(difference > 0 for difference in accuracy)
            lower = sum(difference < 0 for difference in ece)
            lines.append(f"| {name} | {len(pairs)} | {spread(accuracy, scale=100)} | {ahead} "
                         f"| {spread(ece, scale=100)} | {lower} |")
    return "\n".join(lines)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Tables of finished runs; those that differ in the seed alone become one row, "
                    "mean ± standard deviation. Then the differences to the first row, by seed.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or a pattern")
    if hasattr(sys.stdout, "reconfigure"):  # where ± or Q̂ cannot be printed, a ? is
        sys.stdout.reconfigure(errors="replace")
    try:
        places = []
        for pattern in parser.parse_args(argv).runs:
            found = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
            places += found or [pattern]  # some shells expand no pattern
        groups = group([read_run(place) for place in places])
        print(table(groups))
        if len(groups) > 1:
            print("\n" + paired(groups))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

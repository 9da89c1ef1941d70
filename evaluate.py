"""Evaluation: accuracy and calibration of a network, and the table of finished runs.

    python evaluate.py runs/shapes-*

Calibration as in the paper: softmax confidence of the EMA network, 15 equal-width bins,
ECE = sum_b n_b/N |acc_b - conf_b|, MCE = max_b |acc_b - conf_b| (Guo et al. 2017).
"""

import argparse
import glob
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import data

FREE = ["data_dir", "out", "device", "compile", "made_with"]  # what makes no other run


@torch.no_grad()
def predict(network, images, mean, std):
    """Logits of a network on uint8 images (N, 3, H, W) of its device: (N, K) float32 on the CPU."""
    at_once = min(500, 512_000 // images[0, 0].numel()) or 1  # no more memory than a step
    parts = images.split(at_once)
    logits = [network(data.normalize(part, mean, std)).float() for part in parts]
    return torch.cat(logits).cpu()


def reliability(probs, labels, num_bins=15):
    """Equal-width bins of confidence, (lower, upper] each; the first one takes 0, too.

    probs: (N, K), finite; labels: (N,) in 0..K-1, N >= 1. Returns (num_bins, 3): share of the
    samples, accuracy, mean confidence (the last two 0 in an empty bin). ValueError on other input.
    """
    N, K = probs.shape
    if not (N > 0 and labels.shape == (N,) and torch.isfinite(probs).all()
            and 0 <= labels.min() and labels.max() < K):
        raise ValueError(f"scores {tuple(probs.shape)} and labels {tuple(labels.shape)} must be "
                         "(N, K), finite, and (N,), within 0..K-1, with N >= 1")
    confidence, predicted = probs.max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=probs.dtype, device=probs.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), predicted == labels, confidence], dim=1)
    sums = values.new_zeros(num_bins, 3).index_add(0, bins, values)
    count = sums[:, :1]
    return torch.cat([count / N, sums[:, 1:] / count.clamp(min=1)], dim=1)


def errors(bins):
    """Expected and maximum calibration error, (ECE, MCE) as fractions, of `reliability`'s bins."""
    share, accuracy, confidence = bins.unbind(dim=1)
    gap = (accuracy - confidence).abs()
    return (share * gap).sum().item(), gap.max().item()


def calibration(probs, labels, num_bins=15):
    """(ECE, MCE) of probs (N, K) against labels (N,), as fractions; see `reliability`."""
    return errors(reliability(probs, labels, num_bins))


def metrics(logits, labels, num_bins=15):
    """Accuracy and calibration of logits (N, K) against labels (N,): a dict of floats and lists.

    accuracy, balanced_accuracy (mean over the classes present), ece, mce, nll; the lists are
    per_class_accuracy, K with NaN for an absent class, and reliability. ValueError on bad input.
    """
    logits = logits.double()
    bins = reliability(logits.softmax(dim=-1), labels, num_bins)
    ece, mce = errors(bins)
    correct = (logits.argmax(dim=1) == labels).double()
    present = torch.bincount(labels, minlength=logits.shape[1])
    per_class = torch.bincount(labels, correct, minlength=len(present)) / present  # 0 / 0 = NaN
    return {"accuracy": correct.mean().item(),
            "balanced_accuracy": per_class[present > 0].mean().item(),
            "ece": ece, "mce": mce, "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
            "per_class_accuracy": per_class.tolist(), "reliability": bins.tolist()}


class FinishedRun(NamedTuple):
    """What the files of a finished run hold."""
    directory: Path
    config: dict
    result: dict


def read_run(directory):
    """A finished run from its files. Raises ValueError where there is none."""
    directory = Path(directory).resolve()  # so that `.` has a name
    try:
        run = FinishedRun(directory, *(json.loads((directory / name).read_text(encoding="utf-8"))
                                       for name in ("config.json", "result.json")))
        tables(group([run]))  # what they lack shows here
    except Exception as error:  # whatever a foreign file makes
        raise ValueError(f"{directory} is no finished run ({error}); the command that made it "
                         "completes or mends it") from None
    return run


def unlike(run, other):
    """Names of the settings in which two runs differ; "data": they have other test images."""
    one, two = ({**held.config, "data": held.config["data"]["test"]} for held in (run, other))
    return [name for name in one | two
            if one.get(name) != two.get(name) and name not in FREE]


def group(runs):
    """Runs that differ in the seed alone together: a dict from a name to a list of runs.

    Of two runs with equal settings and seed the second stands apart: their code must differ. Where
    two groups have one name, the second one's says in what it differs.
    """
    groups = {}
    for run in {run.directory: run for run in runs}.values():  # a run given twice is one
        for members in groups.values():
            if all(unlike(run, member) == ["seed"] for member in members):
                members.append(run)
                break
        else:
            name = re.sub(r"-s\d+$", "", run.directory.name)
            differing = unlike(run, groups[name][0]) if name in groups else []
            name += "".join(f", {key} {run.config.get(key)}" for key in differing if key != "seed")
            while name in groups:
                name += "'"
            groups[name] = [run]
    return groups


def thirds(result):
    """Mean accuracy of the head, medium and tail classes: a third of them each, by P_L.

    None where no class of a part has test images, or with two classes, which have no middle.
    """
    accuracy = result["per_class_accuracy"]
    order = sorted(range(len(accuracy)), key=lambda k: -result["p_labeled"][k])
    third = len(order) // 3 or 1
    parts = (order[:third], order[third:-third], order[-third:])
    present = [[accuracy[k] for k in part if accuracy[k] is not None] for part in parts]
    return [statistics.mean(part) if part else None for part in present]


def spread(values, digits=1, scale=1):
    """Mean and, of several values, sample standard deviation; "–" where one is unknown."""
    if None in values:
        return "–"
    values = [scale * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def tables(groups):
    """A Markdown table, a row for each group of runs; then their differences to the first one."""
    lines = ["| run | seeds | balanced accuracy | head | medium | tail | ECE | MCE | KL(Q‖Q̂) |",
             "|" + " --- |" * 9]
    for name, runs in groups.items():
        results = [run.result for run in runs]
        shares = [(r["balanced_accuracy"], *thirds(r), r["ece"], r["mce"]) for r in results]
        columns = " | ".join(spread(values, scale=100) for values in zip(*shares))
        kl = spread([r["kl_q_qhat"] for r in results], digits=3)
        lines.append(f"| {name} | {len(runs)} | {columns} | {kl} |")
    return "\n".join(lines) + paired(groups)


def paired(groups):
    """A Markdown table of differences to the first group by seed, in points; empty without pairs.

    A pair of runs with the same seed shares split, start and order, so that its difference scatters
    less than either run. The last line says in what the rows differ beside the method.
    """
    (first, reference), *others = groups.items()
    seeds = {run.config["seed"]: run for run in reference}
    lines = [f"\n\n| less {first}, by seed | pairs | balanced accuracy | ahead | ECE | lower |",
             "|" + " --- |" * 6]
    differing = {}
    for name, runs in others:
        pairs = [(run, seeds[run.config["seed"]]) for run in runs if run.config["seed"] in seeds]
        if pairs:
            accuracy, ece = ([one.result[key] - other.result[key] for one, other in pairs]
                             for key in ("balanced_accuracy", "ece"))
            lines.append(f"| {name} | {len(pairs)} | {spread(accuracy, scale=100)} "
                         f"| {sum(gain > 0 for gain in accuracy)} | {spread(ece, scale=100)} "
                         f"| {sum(gain < 0 for gain in ece)} |")
            differing |= dict.fromkeys(unlike(*pairs[0]))
    names = ", ".join(name for name in differing if name not in ("method", "variant"))
    if names:
        lines.append(f"\nThe rows differ in {names}, too.")
    return "\n".join(lines) if len(lines) > 2 else ""


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Tables of finished runs, one row for all seeds of the same settings: mean and "
                    "standard deviation, then the differences to the first row by seed.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or a pattern")
    if hasattr(sys.stdout, "reconfigure"):  # where ± or Q̂ cannot be printed, a ? is
        sys.stdout.reconfigure(errors="replace")
    try:
        places = []
        for pattern in parser.parse_args(argv).runs:
            found = [] if Path(pattern).exists() else sorted(glob.glob(pattern))
            places += found or [pattern]  # some shells expand no pattern
        runs = []
        for place in places:
            try:
                runs.append(read_run(place))
            except ValueError as error:
                if place == places[-1] and not runs:
                    raise
                print(f"note: left out: {error}", file=sys.stderr)
        print(tables(group(runs)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

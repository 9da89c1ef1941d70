"""Evaluation: accuracy and calibration, the files of a run, and a table of finished runs.

    python evaluate.py runs/shapes-*

Calibration as in the paper: softmax confidence of the EMA network, 15 equal-width bins,
ECE = sum_b n_b/N |acc_b - conf_b|, MCE = max_b |acc_b - conf_b| (Guo et al. 2017).
"""

import argparse
import csv
import io
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import models
from priors import kl_divergence, uniform


@torch.no_grad()
def predict(model, sets, device, batch_size=500):
    """Logits of a network on the test images, in float32: (N, K) on the CPU."""
    return torch.cat([model(data.normalize(part.to(device), sets.mean, sets.std).contiguous(
        memory_format=torch.channels_last)).float().cpu() for part in sets.test.split(batch_size)])


def reliability(probs, labels, num_bins=15):
    """Equal-width bins of confidence, (lower, upper] each; the first one takes 0, too.

    probs: (N, K); labels: (N,). Returns (num_bins, 3): share of the samples, accuracy, mean
    confidence (the last two 0 in an empty bin). Raises ValueError on an empty set.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels) or num_bins < 1:
        raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must be "
                         f"(N, K) and (N,) with N >= 1, and num_bins {num_bins} at least 1")
    confidence, predicted = probs.max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=probs.dtype, device=probs.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, num_bins - 1)
    columns = torch.ones_like(confidence), (predicted == labels).to(probs.dtype), confidence
    sums = torch.stack([torch.bincount(bins, weights=c, minlength=num_bins) for c in columns])
    return torch.stack([sums[0] / len(labels), *(sums[1:] / sums[0].clamp(min=1))], dim=1)


def calibration(probs, labels, num_bins=15):
    """Expected and maximum calibration error, (ECE, MCE) as fractions; see `reliability`."""
    share, accuracy, confidence = reliability(probs, labels, num_bins).unbind(1)
    gap = (accuracy - confidence).abs()
    return (share * gap).sum().item(), gap.max().item()


def metrics(logits, labels, num_bins=15):
    """Accuracy and calibration of logits (N, K) against labels (N,): a dict of floats.

    accuracy, balanced_accuracy (mean over the classes present), ece, mce, nll, brier; and
    per_class_accuracy (K,), NaN for an absent class. Raises ValueError on bad input.
    """
    logits, labels, K = logits.double(), labels.long(), logits.shape[-1]
    probs = logits.softmax(dim=-1)
    ece, mce = calibration(probs, labels, num_bins)
    if not torch.isfinite(logits).all() or labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"logits {tuple(logits.shape)} from {logits.min():g} to {logits.max():g} "
                         f"must be finite and labels {tuple(labels.shape)} from {labels.min()} to "
                         f"{labels.max()} in 0..{K - 1}")
    correct = (logits.argmax(dim=1) == labels).double()
    present = torch.bincount(labels, minlength=K)
    per_class = torch.bincount(labels, weights=correct, minlength=K) / present  # 0 / 0 = NaN
    one_hot = torch.nn.functional.one_hot(labels, K)
    return {"accuracy": correct.mean().item(),
            "balanced_accuracy": per_class[present > 0].mean().item(), "ece": ece, "mce": mce,
            "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
            "brier": (probs - one_hot).square().sum(dim=1).mean().item(),
            "per_class_accuracy": per_class}


# ------------------------------------------------------------------------------ the files of a run

def log_row(run, logits, alpha):
    """A row of log.csv: a run's state and metrics; losses are means since the row before."""
    found, q_hat = metrics(logits, run.sets.test_labels), run.estimator.q_hat.cpu()
    steps = run.record.step - (run.record.rows[-1]["step"] if run.record.rows else 0)
    loss_s, loss_u, loss_uc, mask, right = (run.record.totals / steps).tolist()
    known = run.q_true is not None
    return {"step": run.record.step, "seconds": run.record.seconds,
            "lr": run.optimizer.param_groups[0]["lr"].item(), "alpha": alpha,
            "loss_s": loss_s, "loss_u": loss_u, "loss_uc": loss_uc, "mask_rate": mask,
            "pseudo_label_accuracy": right / mask if mask and known else math.nan,
            "kl_q_qhat": kl_divergence(run.q_true.cpu(), q_hat).item() if known else math.nan,
            "temperature": run.estimator.temperature.item(),
            "kl_uniform_qhat": kl_divergence(uniform(len(q_hat)), q_hat).item(),
            **{k: found[k] for k in ("accuracy", "balanced_accuracy", "ece", "mce", "nll")}}


def result(run, logits):
    """What result.json holds: final metrics and priors, and what table and pictures need."""
    found, rows = metrics(logits, run.sets.test_labels), run.record.rows
    last = [row["balanced_accuracy"] for row in rows[-min(20, max(1, len(rows) // 5)):]]
    found |= {k: rows[-1][k] for k in ("step", "seconds", "temperature")}
    found |= {k: v for k, v in rows[-1].items() if k.startswith("kl_")}
    found |= {"balanced_accuracy_mean": statistics.mean(last), "evaluations_in_mean": len(last)}
    found |= {"q_hat": run.estimator.q_hat, "p_labeled": run.p_labeled, "q_true": run.q_true}
    found |= {"reliability": reliability(logits.double().softmax(1), run.sets.test_labels),
              "classes": run.sets.classes}
    return {k: v.tolist() if torch.is_tensor(v) else v for k, v in found.items()}


def write_log(path, rows):
    """log.csv from the rows that the checkpoint holds, so that the two never disagree."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    models.write_whole(path, lambda file: file.write(text.getvalue().encode()))


def write_json(path, content):
    """A JSON file, whole or not at all."""
    models.write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def save(run, directory):
    """Checkpoint and log.csv. A full disk is a warning; the old files stay."""
    state = {"record": vars(run.record)}
    state |= {name: part.state_dict() for name, part in run.parts.items()}
    try:
        models.write_whole(directory / "checkpoint.pt", lambda file: torch.save(state, file))
        write_log(directory / "log.csv", run.record.rows)
    except (OSError, RuntimeError) as error:  # PyTorch raises the second
        print(f"warning: step {run.record.step} could not be saved ({error}); training goes on, "
              "the last good checkpoint stays", file=sys.stderr, flush=True)


def read_run(directory):
    """A finished run: .directory, .settings, .result, .log (a list of dicts). Raises ValueError."""
    directory = Path(directory)
    try:
        settings, result = (json.loads((directory / name).read_text())
                            for name in ("config.json", "result.json"))
        with open(directory / "log.csv") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is no finished run ({error}); repeat the command that made "
                         "it") from None
    return SimpleNamespace(directory=directory, settings=settings, result=result, log=log)


def summary(directory):
    """The last lines of a training run."""
    r = read_run(directory).result
    return (f"balanced accuracy {100 * r['balanced_accuracy']:.2f} %, ECE {100 * r['ece']:.2f} %, "
            f"KL(Q || Qhat) {r['kl_q_qhat']:.4f}; {r['seconds']:.0f} s\n"
            f"{directory}/: log.csv, result.json, config.json, checkpoint.pt")


# ----------------------------------------------------------------------------- the table of runs

FREE = {"seed", "out", "fresh", "device", "data_dir", "compile", "made_with"}  # no other experiment


def group(directories):
    """Finished runs, those that differ in the seed (or in FREE) alone together: (name, list)s."""
    groups = {}
    for run in map(read_run, directories):
        key = json.dumps({k: v for k, v in run.settings.items() if k not in FREE}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return [(re.sub(r"-s\d+$", "", runs[0].directory.name), runs) for runs in groups.values()]


def thirds(result):
    """Mean accuracy of the head, medium and tail classes: a third of them each, by P_L."""
    order = sorted(range(len(result["p_labeled"])), key=lambda k: -result["p_labeled"][k])
    third = max(1, len(order) // 3)
    parts = order[:third], order[third:-third] or order[:1], order[-third:]
    return [statistics.mean(result["per_class_accuracy"][k] for k in part) for part in parts]


def spread(values, digits=1):
    """Mean and, of several values, sample standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(groups):
    """A Markdown table, a row for each group of runs."""
    lines = ["| run | seeds | balanced accuracy | head | medium | tail | ECE | MCE | KL(Q‖Q̂) |",
             "|" + " --- |" * 9]
    for name, runs in groups:
        results = [run.result for run in runs]
        columns = zip(*([r["balanced_accuracy"], *thirds(r), r["ece"], r["mce"]] for r in results))
        cells = [name, str(len(runs)), *(spread([100 * v for v in column]) for column in columns),
                 spread([r["kl_q_qhat"] for r in results], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError, for one line on standard error."""

    def error(self, message):
        raise ValueError(message)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = Parser(description="A table of finished runs; those that differ in the seed alone "
                    "become one row, mean ± standard deviation.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    try:
        print(table(group(parser.parse_args(argv).runs)), flush=True)
    except BrokenPipeError:  # whoever reads the table, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

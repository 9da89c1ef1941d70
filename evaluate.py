"""Evaluation: accuracy and calibration, and a table and pictures of finished runs.

    python evaluate.py runs/shapes-*
    python evaluate.py runs/shapes-* --plot picture.png --panels reliability priors

Calibration as in the paper: softmax confidence of the EMA network, 15 equal-width bins,
ECE = sum_b n_b/N |acc_b - conf_b|, MCE = max_b |acc_b - conf_b| (Guo et al. 2017).
"""

import csv
import io
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import models
import priors


@torch.no_grad()
def predict(model, images, mean, std, device="cpu", batch_size=500):
    """Logits of a network, batch by batch, in float32: (N, 3, H, W) uint8 -> (N, K) on the CPU."""
    return torch.cat([model(data.normalize(part.to(device), mean, std).contiguous(
        memory_format=torch.channels_last)).float().cpu() for part in images.split(batch_size)])


def reliability(probs, labels, num_bins=15):
    """Equal-width bins of confidence, (lower, upper] each; the first one takes 0, too.

    probs: (N, K), rows sum to 1; labels: (N,). Returns (num_bins, 3): share of the samples,
    accuracy, mean confidence (the last two 0 in an empty bin). Raises ValueError on an empty set.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must be "
                         "(N, K) and (N,) with N >= 1")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1")
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
    """Accuracy and calibration of logits (N, K) against labels (N,) in 0..K-1.

    Returns a dict of floats: accuracy, balanced_accuracy (mean over the classes present), ece, mce,
    nll, brier; and per_class_accuracy (K,), NaN for an absent class. Raises ValueError, with the
    shape and the value, on an empty set, non-finite logits or labels out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be "
                         "(N, K) and (N,) with N >= 1")
    if not torch.isfinite(logits).all():
        found = logits[~torch.isfinite(logits)][0].item()
        raise ValueError(f"logits {tuple(logits.shape)} hold {found}; they must be finite")
    K = logits.shape[1]
    if labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"labels {tuple(labels.shape)} run from {labels.min().item()} to "
                         f"{labels.max().item()}; they must be in 0..{K - 1}")
    logits, labels = logits.double(), labels.long()
    probs = logits.softmax(dim=1)
    correct = (logits.argmax(dim=1) == labels).double()
    present = torch.bincount(labels, minlength=K)
    per_class = torch.bincount(labels, weights=correct, minlength=K) / present  # 0 / 0 = NaN
    ece, mce = calibration(probs, labels, num_bins)
    one_hot = torch.nn.functional.one_hot(labels, K)
    return {"accuracy": correct.mean().item(),
            "balanced_accuracy": per_class[present > 0].mean().item(), "ece": ece, "mce": mce,
            "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
            "brier": (probs - one_hot).square().sum(dim=1).mean().item(),
            "per_class_accuracy": per_class}

# ------------------------------------------------------------------------------ the files of a run

def log_row(run, logits, alpha, averages):
    """A row of log.csv: the state of a run at a step, and the metrics of its EMA network.

    averages: means since the last row of the three losses, the mask, the right pseudo-labels.
    """
    found, q_hat = metrics(logits, run.sets.test_labels), run.estimator.q_hat.cpu()
    kl_true = math.nan
    if run.q_true is not None:
        kl_true = priors.kl_divergence(run.q_true.cpu(), q_hat).item()
    loss_s, loss_u, loss_uc, mask, right = averages
    return {"step": run.step, "seconds": run.seconds, "lr": run.lr.item(), "alpha": alpha,
            "loss_s": loss_s, "loss_u": loss_u, "loss_uc": loss_uc, "mask_rate": mask,
            "pseudo_label_accuracy": right / mask if mask else math.nan,
            "kl_q_qhat": kl_true, "temperature": run.temperature.item(),
            "kl_uniform_qhat": priors.kl_divergence(priors.uniform(len(q_hat)), q_hat).item(),
            **{k: found[k] for k in ("accuracy", "balanced_accuracy", "ece", "mce", "nll")}}


def write_log(directory, rows):
    """log.csv from the rows that the checkpoint holds, so that the two never disagree."""
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        models.write_whole(directory / "log.csv", text.getvalue().encode())


def write_config(directory, settings):
    """config.json: every setting of the run, and the versions and the machine it ran with."""
    cpu = settings["device"] == "cpu"
    made_with = {"torch": torch.__version__, "python": platform.python_version(),
                 "threads": torch.get_num_threads(),
                 "device": platform.machine() if cpu else torch.cuda.get_device_name()}
    text = json.dumps(settings | {"made_with": made_with}, indent=1)
    models.write_whole(directory / "config.json", text.encode())


def write_result(directory, run, logits):
    """result.json: final metrics and priors, and what the table and the pictures are made from."""
    found = metrics(logits, run.sets.test_labels)
    last = run.rows[-min(20, max(1, len(run.rows) // 5)):]
    result = {**found, "per_class_accuracy": found["per_class_accuracy"].tolist(),
              "balanced_accuracy_mean": statistics.mean(r["balanced_accuracy"] for r in last),
              "evaluations_in_mean": len(last), "step": run.step, "seconds": run.seconds,
              **{k: run.rows[-1][k] for k in ("kl_q_qhat", "kl_uniform_qhat", "temperature")},
              "q_hat": run.estimator.q_hat.tolist(), "p_labeled": run.p_labeled.tolist(),
              "q_true": None if run.q_true is None else run.q_true.tolist(),
              "classes": run.sets.classes,
              "reliability": reliability(logits.double().softmax(1), run.sets.test_labels).tolist()}
    models.write_whole(directory / "result.json", json.dumps(result, indent=1).encode())


def read_json(path):
    """A JSON file. Raises ValueError, with the path, when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


class Finished(NamedTuple):
    """A finished run, from its directory."""
    settings: dict
    result: dict
    log: list        # of rows, each a dict of floats
    directory: Path


def read_run(directory):
    """The Finished run in a directory. Raises ValueError when there is none."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} is not the directory of a run: it has no config.json")
    if not (directory / "result.json").exists():
        kept = "a" if (directory / "checkpoint.pt").exists() else "no"
        raise ValueError(f"{directory} is not finished, it has no result.json and {kept} "
                         "checkpoint.pt; repeat the command that made it")
    with open(directory / "log.csv") as file:
        log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return Finished(read_json(directory / "config.json"), read_json(directory / "result.json"), log,
                    directory)


def summary(directory):
    """The last lines of a training run, from its result.json."""
    r = read_json(directory / "result.json")
    return (f"balanced accuracy {100 * r['balanced_accuracy']:.2f} %, mean of the last "
            f"{r['evaluations_in_mean']} evaluations {100 * r['balanced_accuracy_mean']:.2f} %; "
            f"ECE {100 * r['ece']:.2f} %, MCE {100 * r['mce']:.2f} %; "
            f"KL(Q || Qhat) {r['kl_q_qhat']:.4f}; {r['seconds']:.0f} s\n"
            f"{directory}/: log.csv, result.json, config.json, checkpoint.pt")


# ----------------------------------------------------------------------------- the table of runs

FREE = (  # what does not make another experiment: the seed, and where and how fast it runs
    "seed", "out", "fresh", "device", "data_dir", "compile", "device_memory", "made_with")


def group(runs):
    """Runs that differ in the seed alone (or in FREE), together: lists, in the order given."""
    groups = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.settings.items() if k not in FREE}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def differing(groups):
    """The settings in which groups differ."""
    return [k for k in groups[0][0].settings if k not in FREE
            and len({json.dumps(g[0].settings.get(k)) for g in groups}) > 1]


def name_of(g, groups):
    """What tells a group from the others, in a word or a few."""
    keys = [k for k in differing(groups) if k != "imb_u"] or ["method"]
    return ", ".join(str(g[0].settings.get(k)) for k in keys)


def thirds(result):
    """Mean accuracy of the head, medium and tail classes: a third of them each, by P_L."""
    K, prior = len(result["p_labeled"]), result["p_labeled"]
    order, third = sorted(range(K), key=lambda k: -prior[k]), max(1, K // 3)
    parts = order[:third], order[third:K - third] or order[:1], order[K - third:]
    return [statistics.mean(result["per_class_accuracy"][k] for k in part) for part in parts]


def spread(values, scale=100, digits=1):
    """Mean and, of several values, sample standard deviation."""
    text = f"{scale * statistics.mean(values):.{digits}f}"
    return text + (f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(groups):
    """A Markdown table for each data set, a row for each group of runs."""
    fixed, lines = ["method", "shift", "imb", "imb_u", "steps"], []
    for dataset in dict.fromkeys(g[0].settings["dataset"] for g in groups):
        mine = [g for g in groups if g[0].settings["dataset"] == dataset]
        shown = fixed + [k for k in differing(mine) if k not in fixed]
        header = shown + ["seeds", "balanced accuracy", "head", "medium", "tail", "ECE", "MCE",
                          "KL(Q‖Q̂)"]
        lines += [f"\n**{dataset}** (accuracy and calibration error in %, KL in nats)\n",
                  "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        for g in mine:
            values, results = [g[0].settings.get(k) for k in shown], [run.result for run in g]
            cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
            cells += [str(len(g)), spread([r["balanced_accuracy"] for r in results])]
            cells += [spread(part) for part in zip(*map(thirds, results))]
            cells += [spread([r[k] for r in results]) for k in ("ece", "mce")]
            cells += [spread([r["kl_q_qhat"] for r in results], 1, 3)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def logit_adjusted(run):
    """A run with its classifier replaced by argmax f - log P_L (Menon et al. 2021).

    Raises ValueError when its directory holds no checkpoint to compute f with.
    """
    s, state = run.settings, models.load_checkpoint(run.directory / "checkpoint.pt")
    if state is None:
        raise ValueError(f"{run.directory} has no checkpoint.pt, which --logit-adjust needs")
    sets = data.load(s["dataset"], s["data_dir"], s["n1"], s["m1"], s["imb"], s["imb_u"],
                     s["labeled_fraction"], s["image_size"], s["seed"])
    model = models.build(s["model"], len(sets.classes))
    model.load_state_dict(state["ema"])
    logits = predict(model.eval(), sets.test, sets.mean, sets.std)
    logits = logits - torch.tensor(run.result["p_labeled"]).log()
    found = metrics(logits, sets.test_labels)
    found |= {"per_class_accuracy": found["per_class_accuracy"].tolist(),
              "reliability": reliability(logits.softmax(1), sets.test_labels).tolist()}
    return run._replace(settings=s | {"method": s["method"] + " + LA"}, result=run.result | found)


# ---------------------------------------------------------------------------------- the pictures

STYLES = [  # Okabe and Ito's colours, which the colour-blind tell apart; a marker and a line each
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-."), ("#999999", "*", ":")]


def plot_reliability(axes, g, groups):
    """Accuracy over confidence in 15 bins; a calibrated network lies on the diagonal."""
    bins = np.array([run.result["reliability"] for run in g])          # (runs, bins, 3)
    share = bins[:, :, 0].sum(0)
    accuracy = (bins[:, :, 0] * bins[:, :, 1]).sum(0) / np.maximum(share, 1e-12)
    used, width = share > 0, 1 / len(share)
    axes.bar((np.arange(len(share))[used] + 0.5) * width, accuracy[used], width, color="#56B4E9",
             edgecolor="white", label="accuracy")
    axes.plot([0, 1], [0, 1], "k--", lw=1, label="calibrated")
    axes.set(title=f"{name_of(g, groups)}\nECE {spread([run.result['ece'] for run in g])} %",
             xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))


def plot_priors(axes, g, groups):
    """The paper's Fig. 3: Qhat's distance from the true prior and from uniform, and alpha."""
    curves = {"kl_q_qhat": "KL(Q ‖ Q̂)", "kl_uniform_qhat": "KL(uniform ‖ Q̂)", "alpha": "α"}
    for (key, label), (color, _, line) in zip(curves.items(), STYLES):
        values = np.mean([[row[key] for row in run.log] for run in g], axis=0)
        axes.plot([row["step"] for row in g[0].log], values, line, color=color, label=label)
    axes.set(title=name_of(g, groups), xlabel="step", ylabel="KL in nats; α", ylim=(0, None))


def plot_classes(axes, groups):
    """Accuracy of each class, from the labeled set's largest to its smallest."""
    for g, (color, marker, line) in zip(groups, STYLES * len(groups)):
        order = np.argsort(-np.array(g[0].result["p_labeled"]), kind="stable")
        accuracy = np.mean([run.result["per_class_accuracy"] for run in g], axis=0)[order]
        axes.plot(100 * accuracy, line, marker=marker, ms=4, color=color, label=name_of(g, groups))
    axes.set(xlabel="class, by number of labeled images", ylabel="accuracy in %", ylim=(0, 100))
    if len(order) <= 20:
        axes.set_xticks(range(len(order)), [g[0].result["classes"][k] for k in order], rotation=30)


def plot_sweep(axes, groups):
    """Balanced accuracy over the unlabeled set's imbalance: the robustness to label shift."""
    ratios = sorted({g[0].settings["imb_u"] for g in groups}, reverse=True)
    methods = list(dict.fromkeys(g[0].settings["method"] for g in groups))
    for method, (color, marker, line) in zip(methods, STYLES):
        found = {g[0].settings["imb_u"]: [100 * run.result["balanced_accuracy"] for run in g]
                 for g in groups if g[0].settings["method"] == method}
        x, values = zip(*sorted((ratios.index(ratio), v) for ratio, v in found.items()))
        beside = 0.06 * (methods.index(method) - (len(methods) - 1) / 2)  # bars next to each other
        axes.errorbar(np.add(x, beside), list(map(statistics.mean, values)),
                      [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                      color=color, marker=marker, linestyle=line, capsize=3, label=method)
    axes.set_xticks(range(len(ratios)), [f"{r:g}" if r >= 1 else f"1/{1 / r:g}" for r in ratios])
    axes.set(xlabel="γ_u: as the labeled set (left), uniform (1), reversed (right)",
             ylabel="balanced accuracy in %")


def plot(groups, path, panels):
    """Draw the panels, one below the other, to a file. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    many = {"reliability": plot_reliability, "priors": plot_priors}   # one for each group
    width = max(6.4, 3 * len(groups)) if set(many) & set(panels) else 6.4
    figure = plt.figure(figsize=(width, 3.4 * len(panels)), layout="constrained")
    for part, panel in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels):
        if panel in many:
            row = part.subplots(1, len(groups), squeeze=False, sharey=True)[0]
            for axes, g in zip(row, groups):
                many[panel](axes, g, groups)
                axes.label_outer()
            row[0].legend(fontsize=8)
        else:
            axes = part.subplots()
            {"classes": plot_classes, "sweep": plot_sweep}[panel](axes, groups)
            axes.legend(fontsize=8, ncols=2)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = models.Parser(allow_abbrev=False, description="Table and pictures of finished runs; "
                           "those that differ in the seed alone become one row, mean ± deviation.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--logit-adjust", action="store_true", help="add the post-hoc "
                        "logit-adjusted classifier, argmax f - log P_L (needs the checkpoints)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the panels (needs matplotlib)")
    parser.add_argument("--panels", nargs="+", default=("reliability", "priors", "classes"),
                        choices=("reliability", "priors", "classes", "sweep"),
                        help="reliability diagrams, Fig. 3 and accuracy by class (the default); "
                        "accuracy over gamma_u")
    options = parser.parse_args(argv)
    try:
        runs = [read_run(directory) for directory in options.runs]
        if options.logit_adjust:
            runs = [each for run in runs for each in (run, logit_adjusted(run))]
        groups = group(runs)
        if options.plot:
            plot(groups, options.plot, options.panels)
        print(table(groups) + f"\n\n{options.plot} written" * bool(options.plot), flush=True)
    except BrokenPipeError:  # whoever reads the table, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

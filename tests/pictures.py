"""Pictures of finished runs: yours, or those collected in .github/results. Needs matplotlib.

    python tests/pictures.py reliability picture.png RUN [RUN ...]   # accuracy over confidence
    python tests/pictures.py fig3 picture.png RUN [RUN ...]          # the estimated prior and alpha over the steps
    python tests/pictures.py sweep picture.png RUN [RUN ...]         # what each method gains on FixMatch, over gamma_u
    python tests/pictures.py calibration picture.png RUN [RUN ...]   # error against ECE, beside the paper's plot

A RUN is a directory, or a name in runs.csv in which * stands for anything: 'shapes-adello-*-imb50-s0'. Runs that differ
in the seed alone are one panel or one point. A drawing takes these groups, lists of results.Logged.
"""

import glob
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import evaluate
import results
from losses import METHODS
from results import LABELS, gamma_u, name_of

LIGHT_RED, LIGHT_BLUE = "#F7C9A8", "#B5DAF0"
COLOURS = BLUE, RED, *_ = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
                           "#8C564B", "#000000", "#808000", "#6A3D9A", "#B22222", "#999999")


def figure(rows, columns, width, height, **arguments):
    """A figure with a white ground, legible on light and dark pages, and its axes, (rows, columns)."""
    from matplotlib.figure import Figure
    drawn = Figure(figsize=(width * columns, height), layout="constrained", facecolor="white")
    return drawn, drawn.subplots(rows, columns, squeeze=False, **arguments)


def percent(runs, key):
    return [100 * run.result[key] for run in runs]


def in_order(groups):
    """Groups of runs in the order of the paper's plot; what is not in it comes last."""
    order = list(LABELS)
    return sorted(groups, key=lambda found: (order + [name_of(found[0].config)]).index(name_of(found[0].config)))


def plain(name):
    """A name as text in which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def method_of(config):
    return LABELS.get(name_of(config), plain(name_of(config)))


def ratio(gamma):
    return f"{gamma:g}" if gamma >= 1 else f"1/{1 / gamma:g}"


def shift_of(config):
    """The unlabeled set in words."""
    if config["shift"] in results.SHIFTS:
        return config["shift"]
    return f"γ_u = {ratio(gamma_u(config))}" if gamma_u(config) else "as it is"


def titles(groups, shifts=True):
    """Method and shift of each group; the name of the runs where that does not tell two groups apart."""
    found = [method_of(runs[0].config) + f", {shift_of(runs[0].config)}" * shifts for runs in groups]
    return [plain(re.sub(r"-s\d+$", "", runs[0].directory.name)) if found.count(name) > 1 else name
            for name, runs in zip(found, groups)]


def reliability(groups):
    """Accuracy over confidence: a calibrated network lies on the diagonal. Below, how many samples.

    Of several seeds, the gaps above and below the confidence are averaged apart, so that they do not cancel: weighted
    with the samples, what is shaded is the mean ECE.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    width = max(2.9, 4.2 / len(groups))
    drawn, axes = figure(2, len(groups), width, 4.6, sharex=True, sharey="row", height_ratios=[3, 1])
    groups = in_order(groups)
    for (above, below), name, found in zip(axes.T, titles(groups), groups):
        bins = np.array([run.result["reliability"] for run in found])             # (runs, bins, 3)
        shares, accuracies, confidences = bins.transpose(2, 0, 1)                 # (runs, bins)
        share = shares.mean(axis=0)

        def mean(values):
            return (shares * values).mean(axis=0) / np.maximum(share, 1e-9)
        confidence = mean(confidences)
        over = mean(np.maximum(confidences - accuracies, 0))
        under = mean(np.maximum(accuracies - confidences, 0))
        width = 1 / len(share)                                                    # of a bin
        centres = (np.arange(len(share)) + 0.5) * width
        above.bar(centres, confidence - over, width, color=BLUE, edgecolor="white")
        for gap, bottom, fill, edge in ((over, confidence - over, LIGHT_RED, RED),
                                        (under, confidence, LIGHT_BLUE, BLUE)):
            those = gap > 0
            above.bar(centres[those], gap[those], width, bottom[those], color=fill, edgecolor=edge)
        above.plot([0, 1], [0, 1], "k--", lw=1)
        below.bar(centres, 100 * share, width, color="#999999", edgecolor="white")
        means = share @ mean(accuracies), share @ confidence
        for line, colour in zip(means, (BLUE, RED)):
            above.axvline(line, color=colour, lw=1.5)
            below.axvline(line, color=colour, lw=1.5)
        gaps = [100 * gap for gap in (shares * (confidences - accuracies)).sum(axis=1)]
        seeds = f", {len(found)} seeds" if len(found) > 1 else ""
        above.set(title=f"{name}\nECE {evaluate.spread(percent(found, 'ece'))} %{seeds}", xlim=(0, 1), ylim=(0, 1))
        text = f"confidence\n(mean less accuracy: {statistics.mean(gaps):+.1f} points"
        below.set(xlabel=text + (f",\nof single seeds {min(gaps):+.1f} to {max(gaps):+.1f})" if seeds else ")"))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("samples in %")
    drawn.legend(handles=[
        Patch(facecolor=BLUE, label="accuracy"),
        Patch(facecolor=LIGHT_RED, edgecolor=RED, label="overconfident by"),
        Patch(facecolor=LIGHT_BLUE, edgecolor=BLUE, label="underconfident by"),
        Line2D([], [], color=BLUE, label="mean accuracy"),
        Line2D([], [], color=RED, label="mean confidence"),
        Line2D([], [], color="k", ls="--", lw=1, label="calibrated")],
        loc="outside lower center", ncols={1: 2, 2: 3, 3: 3}.get(len(groups), 6), fontsize=9)
    return drawn


def fig3(groups):
    """The paper's Fig. 3: the distance of Qhat from the true and the uniform prior; alpha in a panel of its own.

    Of several seeds the mean, in a band of one standard deviation.
    """
    moving = {}  # the names of groups by their curve of alpha, if their method has one
    for name, found in zip(titles(groups), groups):
        if METHODS.get(found[0].config["method"], METHODS["fixmatch"]).target:
            curve = tuple((row["step"], row["alpha"]) for row in found[0].log)
            moving.setdefault(curve, []).append(name)
    drawn, (axes,) = figure(1, len(groups) + bool(moving), 2.9, 3.3)
    highest = 0
    for panel, name, found in zip(axes, titles(groups), groups):
        steps = [row["step"] for row in found[0].log]
        for key, text, line in (("kl_q_qhat", "KL(Q ‖ Q̂)", "-"), ("kl_uniform_qhat", "KL(uniform ‖ Q̂)", "--")):
            values = np.array([[row[key] for row in run.log] for run in found])   # (runs, evaluations)
            mean = top = values.mean(axis=0)
            (curve,) = panel.plot(steps, mean, line, label=text, lw=2)
            if len(found) > 1:
                deviation = values.std(axis=0, ddof=1)
                top = mean + deviation
                panel.fill_between(steps, np.maximum(mean - deviation, 0), top, color=curve.get_color(), alpha=0.2,
                                   lw=0)
            highest = max(highest, np.nanmax(top, initial=0))
        panel.set(title=name, xlabel="step")
    for panel in axes[:len(groups)]:
        panel.set_ylim(0, 1.05 * highest or 1)
    axes[0].set_ylabel("nats")
    drawn.legend(handles=axes[0].lines, loc="outside lower center", ncols=2, fontsize=9)
    if moving:
        for curve, names in moving.items():
            axes[-1].plot(*zip(*curve), lw=2, label="\n".join(names))
        axes[-1].set(title="alignment", xlabel="step", ylabel="α", ylim=(0, 1.05))
        if len(moving) > 1:
            axes[-1].legend(fontsize=7)
    return drawn


def sweep(groups):
    """Balanced accuracy over gamma_u, less that of FixMatch with the same seed: a dot per pair, and the means."""
    found = {}
    for run in (run for runs in groups for run in runs):
        method, gamma, seed = place = method_of(run.config), gamma_u(run.config), run.config["seed"]
        if gamma is None:
            raise ValueError(f"{run.directory.name} has no γ_u: its unlabeled images come as they are")
        if place in found:
            raise ValueError(f"{found[place].directory.name} and {run.directory.name} would be one point of the sweep")
        found[place] = run
    gammas = sorted({gamma for _, gamma, _ in found}, reverse=True)
    if len(gammas) < 2:
        raise ValueError(f"a sweep needs runs at two or more γ_u; all of these have γ_u = {ratio(gammas[0])}")
    names = list(dict.fromkeys(method for method, _, _ in found))
    base = "FixMatch" if "FixMatch" in names else "ADELLO"
    others = [name for name in names if name != base]
    if not others:
        raise ValueError(f"a sweep shows what methods differ by; all of these runs are {base}'s")
    gains = {name: {gamma: [] for gamma in gammas} for name in others}
    for (name, gamma, seed), run in found.items():
        if name == base:
            continue
        if (base, gamma, seed) not in found:
            raise ValueError(f"{run.directory.name} has no {base} run of its γ_u and seed to be compared with")
        pair = run, found[base, gamma, seed]
        mine, other = (each.result["balanced_accuracy"] for each in pair)
        gains[name][gamma].append(100 * (mine - other))
    drawn, ((axes,),) = figure(1, 1, 7.5, 3.8)
    axes.axhline(0, color="k", lw=1, label=base)
    for i, (name, of_method) in enumerate(gains.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [x + 0.1 * (i - (len(others) - 1) / 2) for x in range(len(gammas))]
        means = [statistics.mean(values) if values else np.nan for values in of_method.values()]
        for x, values in zip(places, of_method.values()):
            axes.plot([x] * len(values), values, ".", color=colour, alpha=0.5)
        axes.plot(places, means, "os^D"[i % 4] + "-", color=colour, label=name)
    axes.set_xticks(range(len(gammas)), map(ratio, gammas))
    axes.set(xlabel="γ_u: as the labeled set (left), uniform (1), reversed (right)",
             ylabel=f"balanced accuracy less {base}'s,\nsame seed, in points")
    axes.legend(fontsize=8, ncols=4)
    axes.grid(alpha=0.3)
    return drawn


def calibration(groups):
    """Error against calibration error: the paper's CIFAR-10-LT, and these runs, mean and standard deviation."""
    drawn, (panels,) = figure(1, 2, 4.4, 3.9)
    theirs = [(LABELS[row["method"]], [100 - float(row["accuracy"])], [float(row["ece"])])
              for row in results.load("published.csv") if row["dataset"] == "CIFAR-10-LT"]
    shifts = sorted({shift_of(runs[0].config) for runs in groups})
    groups = in_order(groups)
    ours = [(name, [100 - accuracy for accuracy in percent(runs, "balanced_accuracy")], percent(runs, "ece"))
            for name, runs in zip(titles(groups, len(shifts) > 1), groups)]
    order = list(dict.fromkeys(name for name, _, _ in theirs + ours))
    seeds = max(len(runs) for runs in groups)
    spread = f", {seeds} seeds" if seeds > 1 else ""
    headings = "published: CIFAR-10-LT", f"this code: {groups[0][0].config['dataset']}, {', '.join(shifts)}{spread}"
    for panel, heading, points in zip(panels, headings, (theirs, ours)):
        named = []
        for name, errors, eces in points:
            colour = COLOURS[order.index(name) % len(COLOURS)]
            x, y = statistics.mean(errors), statistics.mean(eces)
            if len(errors) > 1:
                panel.errorbar(x, y, statistics.stdev(eces), statistics.stdev(errors), color=colour,
                               elinewidth=1, capsize=2, alpha=0.4)
            panel.plot(x, y, "o", color=colour)
            named.append((y, x, name, colour))
        panel.margins(0.1, 0.15)
        panel.set(title=heading, xlabel="error in %", ylabel="ECE in %")
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
        place = 0
        for y, x, name, colour in sorted(named):  # beside the panel, at its height or above the name before
            place = max(place + 0.06, y / panel.get_ylim()[1])
            panel.annotate(name, (x, y), (1.03, place), textcoords="axes fraction", color=colour, fontsize=9, va="center",
                           arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5})
    return drawn


DRAWINGS = {"reliability": reliability, "fig3": fig3, "sweep": sweep, "calibration": calibration}


def find(names):
    """The runs that are meant. Raises ValueError with the name of one that is not there."""
    found = {}
    for name in names:
        places = [name] if Path(name).is_dir() else sorted(glob.glob(name))  # some shells expand no pattern
        runs = [results.logged(place) for place in places] or results.finished(name)
        if not runs:
            raise ValueError(f"{name} is neither a directory nor the name of a run in {results.RESULTS / 'runs.csv'}")
        found |= {run.directory: run for run in runs}
    return list(found.values())


def main(arguments):
    """The command line. Returns the exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        kind, path, *names = [*arguments, "", ""][:max(3, len(arguments))]
        if kind not in DRAWINGS or not names[0]:
            raise ValueError(f"give {', '.join(DRAWINGS)}, the picture's file and finished runs")
        if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
            raise ValueError(f"{path} stands where the picture's file is due: picture.png, say, and then the runs")
        DRAWINGS[kind]([*evaluate.group(find(names)).values()]).savefig(path, dpi=130)
    except ImportError:
        print("error: pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The pictures and the tables of README.md and .github/results/README.md, from the files of the runs.

    python tests/pictures.py reliability picture.png RUN [RUN ...]   # reliability diagrams, one for each group of runs
    python tests/pictures.py fig3 picture.png RUN [RUN ...]          # KL of Qhat and alpha over the steps, Fig. 3
    python tests/pictures.py sweep picture.png RUN [RUN ...]         # accuracy over gamma_u
    python tests/pictures.py --write                                 # all pictures and tables of the two pages
    python tests/pictures.py --check                                 # do the tables stand there as the files have them?

A table stands between the comments <!-- table NAME --> and <!-- end -->, a figure in a sentence between
<!-- = RUNS KEY --> and <!-- / -->, where RUNS may be A/B, pairs of the same shift and seed. --check finds those
that differ from the files, and figures in sentences without such a mark. Needs matplotlib for the pictures.
"""

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import evaluate

RESULTS = ROOT / ".github" / "results"
PAGES = ROOT / "README.md", RESULTS / "README.md"
BLUE, RED, COLOURS = "#0072B2", "#D55E00", ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
FAMILY = ["supervised", "fixmatch", "ccr", "udal", "flexda", "adello", "kd", "oracle"]
OTHERS = ["darp", "darp+crt", "crest", "crest+la", "cossl", "fixmatch+la"]
FOUR = ["fixmatch", "udal", "flexda", "adello"]
SHIFTS = ["reversed", "uniform", "consistent"]
SWEEP = {"consistent": 50, "imbu20": 20, "imbu10": 10, "uniform": 1, "imbu0.1": 0.1, "imbu0.05": 0.05, "reversed": 0.02}


def runs(pattern, seeds=range(5)):
    """The finished runs in the results whose name fits, by seed."""
    return [evaluate.read_run(d) for seed in seeds for d in sorted(RESULTS.glob(f"{pattern}-s{seed}"))]


def pairs(first, second, seeds=range(5)):
    """Runs of two patterns with the same shift and seed, hence the same split, start and order."""
    others = {(run.settings["shift"], run.settings["seed"]): run for run in runs(second, seeds)}
    found = [(run, others.get((run.settings["shift"], run.settings["seed"]))) for run in runs(first, seeds)]
    return [pair for pair in found if pair[1]]


def percent(found, key):
    return [100 * run.result[key] for run in found]


# -------------------------------------------------------------------------------------------- tables

def cell(pattern, seeds=range(5)):
    """Balanced accuracy and ECE of a group of runs, mean ± deviation."""
    found = runs(pattern, seeds)
    if not found:
        return "–"
    return f"{evaluate.spread(percent(found, 'balanced_accuracy'))}, {evaluate.spread(percent(found, 'ece'))}"


def markdown(header, lines):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines])


def by_shift(pattern, methods, shifts, seeds):
    """A row for each method, a column for each shift."""
    lines = []
    for m in methods:
        names = [pattern.format(m, shift) for shift in shifts]
        held = [str(len(runs(name, seeds))) for name in names]
        held = held[:1] if len(set(held)) == 1 else held
        lines.append([m, ", ".join(held), *(cell(name, seeds) for name in names)])
    return markdown(["balanced accuracy, ECE", "seeds", *shifts], lines)


def gain(found, key):
    """Of pairs of runs: the mean difference of a result in points, in how many the first is better, of how many."""
    differences, sign = [100 * (a.result[key] - b.result[key]) for a, b in found], -1 if key == "ece" else 1
    wins = sum(sign * difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.1f}", f"{wins} of {len(differences)}"


def ahead(found, key):
    return "{} ({})".format(*gain(found, key))


def paired(pattern, methods, shifts, seeds):
    """ADELLO against each of the others: mean difference, and in how many pairs it is the better one."""
    return markdown(["ADELLO less …", *(f"{shift}: {what}" for shift in shifts for what in ("accuracy", "ECE"))], [
        [m, *(ahead(pairs(pattern.format("adello", shift), pattern.format(m, shift), seeds), key)
              for shift in shifts for key in ("balanced_accuracy", "ece"))] for m in methods])


def wrn_28_2():
    found = {m: runs(f"folder-2000-{m}-reversed-imb100") for m in FOUR}
    return markdown(["WRN-28-2, reversed", "seeds", "accuracy, ECE", "KL(Q‖Q̂)"], [
        [m, str(len(r)), cell(f"folder-2000-{m}-reversed-imb100"), f"{r[0].result['kl_q_qhat']:.3f}"]
        for m, r in found.items() if r])


def longer():
    return markdown(["reversed, seeds 0 to 2", "1,500 steps", "4,500 steps"], [
        [m, cell(f"shapes-{m}-reversed-imb50", range(3)), cell(f"shapes-4500-{m}-reversed-imb50")] for m in FOUR])


def noise():
    """How hard `shapes` is, by its noise: the runs that its choice rests on."""
    lines = []
    for deviation in ("0.25", "0.3", "0.35", "0.4"):
        for m in ("fixmatch", "adello"):
            name = m if deviation == "0.35" else f"noise{deviation}" + "-fixmatch" * (m == "fixmatch")
            short = [cell(f"shapes-{name}-{shift}-imb50", (100, 101)) for shift in SHIFTS[::2]]
            lines.append([deviation, m, *short, cell(f"shapes-4500-{name}-reversed-imb50", (100,))])
    return markdown(["noise", "seeds 100, 101", *SHIFTS[::2], "reversed, 4,500 steps, seed 100"], lines)


def sweep_table():
    return markdown(["balanced accuracy at γ_u", *(f"{g:g}" if g >= 1 else f"1/{1 / g:g}" for g in SWEEP.values())], [
        [m, *(evaluate.spread(percent(runs(f"shapes-{m}-{name}-imb50", range(3)), "balanced_accuracy"))
              for name in SWEEP)] for m in FOUR])


def sweep_pairs():
    return markdown(["ADELLO less …, over the sweep", "accuracy (ahead in pairs)"], [
        [m, ahead(pairs("shapes-adello-[ruci]*-imb50", f"shapes-{m}-[ruci]*-imb50", range(3)), "balanced_accuracy")]
        for m in FOUR[:3]])


ABLATIONS = {
    "ADELLO, reversed": ("shapes-adello-reversed-imb50", "python train.py"),
    "batch-norm statistics of labeled, weak and strong images apart": (
        "shapes-separate-statistics-reversed-imb50", "python tests/ablations.py separate-statistics"),
    "U without L": ("shapes-unlabeled-alone-reversed-imb50", "python tests/ablations.py unlabeled-alone"),
    "no EMA": ("shapes-adello-reversed-imb50-ema0", "python train.py --ema 0 --out …"),
    "Q̂ with momentum 0.9": ("shapes-adello-reversed-imb50-momentum0.9",
                            "python train.py --prior-momentum 0.9 --out …"),
    "Q̂ with momentum 0.999": ("shapes-adello-reversed-imb50-momentum0.999",
                              "python train.py --prior-momentum 0.999 --out …"),
    "fp32 in place of bf16": ("shapes-fp32-adello-reversed-imb50", "python train.py --precision fp32 --out …"),
    "ADELLO, consistent": ("shapes-adello-consistent-imb50", "python train.py --shift consistent"),
    "T follows Q̂ at every step, consistent": ("shapes-moving-temperature-consistent-imb50",
                                              "python tests/ablations.py moving-temperature --shift consistent")}


def ablation_table():
    lines = []
    for name, (pattern, command) in ABLATIONS.items():
        found = runs(pattern, range(3))
        scores = [evaluate.spread(percent(found, key)) for key in ("balanced_accuracy", "ece")]
        kl = evaluate.spread([run.result["kl_q_qhat"] for run in found], 3)
        lines.append([name, *scores, kl, f"`{command}`"])
    return markdown(["variant, seeds 0 to 2", "balanced accuracy", "ECE", "KL(Q‖Q̂)", "command"], lines)


def speed():
    """The benchmark's printed figures."""
    text = (RESULTS / "benchmark.txt").read_text()

    def of(pattern):
        return re.search(pattern, text).groups()
    (precision,), (step,), (theirs,) = of("(bf16|fp32)"), of(r"step +(\S+) ms"), of(r"conventional +(\S+) ms")
    ratio, (memory,) = of(r"ratio +(\S+) +from (\S+) to (\S+)"), of("peak memory: (.*)")
    augment = of(r"augmentation +(\S+) ms +against (\S+) ms .*: (\S+) times")
    work, least, traffic, least_too, times = of(r"floor: (.*) = (\S+) ms; (.*) = (\S+) ms; .* takes (\S+) times")
    return markdown(["", "this code", "conventional pipeline", "ratio"], [
        [f"step, {precision}", f"{step} ms", f"{theirs} ms", "{} ({} to {})".format(*ratio)],
        ["augmentation of 192 weak and 128 strong views, one core", *(f"{a} ms" for a in augment[:2]), augment[2]],
        ["forward, backward alone", "{} ms, {} ms".format(*of(r"forward +(\S+) ms\s+backward +(\S+) ms")), "", ""],
        [f"the floor, {work} and {traffic}", f"{least} ms, {least_too} ms", "", f"{times} times the larger"],
        ["memory", memory, "", ""]])


SHAPES, CIFAR = "shapes-{}-{}-imb50", "folder-{}-{}-imb100"
TABLES = {
    "short": lambda: by_shift(SHAPES, FOUR, SHIFTS, range(5)),
    "family": lambda: by_shift(SHAPES, FAMILY, SHIFTS, range(5)),
    "others": lambda: by_shift(SHAPES, ["fixmatch", *OTHERS, "adello"], SHIFTS, range(3)),
    "paired": lambda: paired(SHAPES, ["fixmatch", "udal", "flexda", "kd", "oracle"], SHIFTS, range(5)),
    "cifar": lambda: by_shift(CIFAR, FOUR, SHIFTS[::2], range(3)),
    "cifar-paired": lambda: paired(CIFAR, FOUR[:3], SHIFTS[::2], range(3)), "wrn-28-2": wrn_28_2, "longer": longer,
    "noise": noise, "sweep": sweep_table, "sweep-pairs": sweep_pairs, "ablations": ablation_table, "speed": speed}


def figure_of(pattern, key):
    """A figure of a sentence: the mean over the runs, of RUNS@100 that of seed 100; percent or, of KL, NLL and seconds,
    as it is. Of pairs, A/B: the mean gain in points or, with -wins, in how many of them A is the better one."""
    name, _, seed = pattern.partition("@")
    found = pairs(*name.split("/")) if "/" in name else runs(name, [seed] if seed else range(5))
    if not found:
        raise ValueError(f"no run in {RESULTS} fits {pattern}")
    if "/" in name:
        result, _, wins = key.replace("accuracy", "balanced_accuracy").partition("-")
        return gain(found, result)[bool(wins)]
    of_run = {
        "accuracy": lambda run: 100 * run.result["balanced_accuracy"], "ece": lambda run: 100 * run.result["ece"],
        "tail": lambda run: 100 * evaluate.thirds(run.result)[2],
        "overconfidence": lambda run: 100 * sum(n * (conf - acc) for n, acc, conf in run.result["reliability"]),
        "kl": lambda run: run.result["kl_q_qhat"], "nll": lambda run: run.result["nll"],
        "seconds": lambda run: run.result["seconds"]}[key]
    digits = {"kl": 2, "nll": 2, "seconds": 0}.get(key, 1)
    return f"{statistics.mean(map(of_run, found)):.{digits}f}"


def unmarked(text):
    """Decimal figures, points and per cent in sentences that no mark ties to a file."""
    for marked in (r"<!-- table .*?<!-- end -->", r"<!-- = .*?<!-- / -->", r"```.*?```", r"`[^`]*`", r"^\|.*?$"):
        text = re.sub(marked, "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\b\d+\.\d+\b|\b\d+ (?:points|of \d+|%)", text)
    return [figure for figure in found if figure not in ("2306.04621", "3.10")]  # the paper, Python


def pages(write):
    """Compare the tables of both pages with the files, or write them. Returns the names of those that differ."""
    different = []
    for page in PAGES:
        text = page.read_text()

        def table(match):
            new = TABLES[match[1]]()
            if new != match[2].strip():
                different.append(f"{page.relative_to(ROOT)}: {match[1]}")
            return f"<!-- table {match[1]} -->\n\n{new}\n\n<!-- end -->"

        def number(match):
            new = figure_of(match[1], match[2])
            if new != match[3]:
                different.append(f"{page.relative_to(ROOT)}: {match[1]} {match[2]} is {new}, not {match[3]}")
            return f"<!-- = {match[1]} {match[2]} -->{new}<!-- / -->"
        text = re.sub(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", table, text, flags=re.DOTALL)
        text = re.sub(r"<!-- = (\S+) (\S+) -->(.*?)<!-- / -->", number, text)
        different += [f"{page.relative_to(ROOT)}: {figure} stands in a sentence unmarked" for figure in unmarked(text)]
        if write:
            page.write_text(text)
    return different


# ------------------------------------------------------------------------------------------ pictures

def figure(columns, height=3.3, width=2.9):
    """A figure with a white ground, legible on light and dark pages, and its row of axes."""
    from matplotlib.figure import Figure
    drawn = Figure(figsize=(width * columns, height), layout="constrained", facecolor="white")
    return drawn, drawn.subplots(1, columns, squeeze=False, sharey=True)[0]


def label(name):
    """The method's name from a run's, as the paper writes it."""
    names = {"fixmatch": "FixMatch", "udal": "UDAL", "flexda": "FlexDA", "adello": "ADELLO"}
    return next((names[part] for part in name.split("-") if part in names), name)


def reliability(groups, path):
    """Accuracy over confidence, the gap shaded: a calibrated network lies on the diagonal."""
    from matplotlib.patches import Patch
    drawn, row = figure(len(groups))
    kinds = {"accuracy": (BLUE, "white"), "overconfident by": ("#F7C9A8", RED), "underconfident by": ("#B5DAF0", BLUE)}
    for axes, (name, found) in zip(row, groups):
        bins = np.array([run.result["reliability"] for run in found])                      # (runs, bins, 3)
        share, width = bins[:, :, 0].sum(0), 1 / bins.shape[1]
        accuracy, confidence = ((bins[:, :, 0] * bins[:, :, k]).sum(0) / np.maximum(share, 1e-9) for k in (1, 2))
        centres, used = (np.arange(len(share)) + 0.5) * width, share > 0
        parts = used, used & (confidence >= accuracy), used & (confidence < accuracy)
        for those, (fill, edge), gap in zip(parts, kinds.values(), (False, True, True)):
            height, bottom = (confidence - accuracy, accuracy) if gap else (accuracy, 0 * accuracy)
            axes.bar(centres[those], height[those], width, bottom[those], color=fill, edgecolor=edge)
        axes.plot([0, 1], [0, 1], "k--", lw=1)
        mean = {k: (share * v).sum() / share.sum() for k, v in (("accuracy", accuracy), ("confidence", confidence))}
        axes.axvline(mean["accuracy"], color=BLUE, lw=1.5)
        axes.axvline(mean["confidence"], color=RED, lw=1.5)
        axes.set(title=f"{label(name)}, ECE {statistics.mean(percent(found, 'ece')):.1f} %", xlim=(0, 1), ylim=(0, 1),
                 xlabel=f"confidence, mean {100 * mean['confidence']:.0f} %\n(accuracy {100 * mean['accuracy']:.0f} %)")
    row[0].set_ylabel("accuracy")
    row[0].legend(handles=[Patch(facecolor=fill, edgecolor=edge, label=text) for text, (fill, edge) in kinds.items()],
                  fontsize=8, loc="upper left")
    drawn.savefig(path, dpi=130)


def fig3(groups, path):
    """The paper's Fig. 3: Qhat's distance from the true prior and from uniform, and alpha."""
    drawn, row = figure(len(groups))
    for axes, (name, found) in zip(row, groups):
        for key, text, line in (("kl_q_qhat", "KL(Q ‖ Q̂)", "-"), ("kl_uniform_qhat", "KL(uniform ‖ Q̂)", "--"),
                                ("alpha", "α", ":")):
            axes.plot([r["step"] for r in found[0].log], np.mean([[r[key] for r in run.log] for run in found], axis=0),
                      line, label=text, lw=2)
        axes.set(title=name.split("-")[2] if name.count("-") > 1 else name, xlabel="step", ylim=(0, 1.05))
    row[0].set_ylabel("KL in nats; α")
    row[0].legend(fontsize=8)
    drawn.savefig(path, dpi=130)


def sweep(groups, path):
    """Balanced accuracy over the unlabeled set's imbalance: the robustness to label shift."""
    drawn, (axes,) = figure(1, 3.6, 7)
    ratios = sorted({found[0].settings["imb_u"] for _, found in groups}, reverse=True)
    methods = list(dict.fromkeys(found[0].settings["method"] for _, found in groups))
    for i, method in enumerate(methods):
        points = sorted((ratios.index(found[0].settings["imb_u"]), percent(found, "balanced_accuracy"))
                        for _, found in groups if found[0].settings["method"] == method)
        axes.errorbar([x + 0.06 * (i - 1.5) for x, _ in points], [statistics.mean(v) for _, v in points],
                      [statistics.stdev(v) if len(v) > 1 else 0 for _, v in points], color=COLOURS[i % 4],
                      marker="os^D"[i % 4], capsize=3, label=label(method))
    axes.set_xticks(range(len(ratios)), [f"{r:g}" if r >= 1 else f"1/{1 / r:g}" for r in ratios])
    axes.set(xlabel="γ_u: as the labeled set (left), uniform (1), reversed (right)", ylabel="balanced accuracy in %")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    drawn.savefig(path, dpi=130)


def groups_of(patterns, seeds=range(5)):
    return evaluate.group([run.directory for pattern in patterns for run in runs(pattern, seeds)])


def main(arguments):
    """The command line. Returns the exit status."""
    drawings = {"reliability": reliability, "fig3": fig3, "sweep": sweep}
    try:
        if arguments in (["--check"], ["--write"]):
            if arguments == ["--write"]:
                reliability(groups_of(f"shapes-{m}-reversed-imb50" for m in FOUR), RESULTS.parent / "reliability.png")
                fig3(groups_of(f"shapes-adello-{s}-imb50" for s in SHIFTS[::-1]), RESULTS.parent / "fig3.png")
                sweep(groups_of((f"shapes-{m}-{n}-imb50" for m in FOUR for n in SWEEP), range(3)),
                      RESULTS.parent / "sweep.png")
            different = pages(arguments == ["--write"])
            print("\n".join(different) or "every table and figure stands as the files have it")
            return 1 if different and arguments == ["--check"] else 0
        if len(arguments) < 3 or arguments[0] not in drawings:
            raise ValueError(f"give --write, --check, or {', '.join(drawings)} with a file and runs")
        drawings[arguments[0]](evaluate.group(arguments[2:]), arguments[1])
    except ImportError:
        print("error: pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The evidence: finished runs as a few files in .github/results, and the tables and pictures that are made from them.

    python tests/results.py collect RUN [RUN ...]   # add finished runs; one of the same name is replaced
    python tests/results.py write                   # the tables on both pages and the pictures, from the files
    python tests/results.py check                   # do files, pages and pictures agree?

runs.csv has one row per run: what it is, its figures, the command and the commit. The tables are made from it alone.
settings.csv is config.json, logs.csv.gz is log.csv, classes.csv.gz and reliability.csv.gz hold the vectors of
result.json, numbers as the run wrote them; published.csv holds the paper's. On a page a table stands under
<!-- table: NAME -->; a decimal, an "x ± y" or an "m of n" in a sentence has to stand in a table of the section that it
is in, or of one whose "title" its paragraph names.
"""

import csv
import dataclasses
import fnmatch
import functools
import gzip
import io
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import authors
import evaluate
import train
from evaluate import spread
from priors import kl_divergence, uniform

RESULTS = ROOT / ".github" / "results"
PAGES = ROOT / "README.md", RESULTS / "README.md"
FILES = "runs.csv", "settings.csv", "logs.csv.gz", "classes.csv.gz", "reliability.csv.gz"
CODE = "*.py", "tests/ablations.py", "tests/authors.py", "tests/baselines.py", "tests/methods/*.py"  # what makes a run
VECTORS = "classes", "per_class_accuracy", "q_hat", "p_labeled", "q_true"  # of result.json, one entry per class
BINS = "share", "accuracy", "confidence"
FIGURES = ("accuracy", "balanced_accuracy", "ece", "mce", "nll", "step", "seconds", "temperature", "kl_q_qhat",
           "kl_uniform_qhat", "brier", "balanced_accuracy_mean", "evaluations_in_mean")  # the last three: older runs

LABELS = {  # in the order of the paper's plot, the worst calibrated method first
    "supervised": "supervised", "fixmatch": "FixMatch", "fixmatch+la": "FixMatch + LA", "ccr": "FixMatch + CCR",
    "darp": "DARP", "darp+crt": "DARP + cRT", "debiaspl": "DebiasPL", "crest": "CReST+", "crest+la": "CReST+ + LA",
    "abc": "ABC", "udal": "UDAL", "cossl": "CoSSL", "flexda": "FlexDA", "adello": "ADELLO", "kd": "FlexDA + KD",
    "oracle": "oracle"}
SHIFTS = "reversed", "uniform", "consistent"


# --------------------------------------------------------------------------------------------- files

def load(name):
    """The rows of a file, dicts of text; none where there is no file."""
    path = RESULTS / name
    return parsed(path.read_bytes(), path.suffix == ".gz") if path.exists() else []


@functools.lru_cache(maxsize=16)
def parsed(content, packed):
    text = (gzip.decompress(content) if packed else content).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def store(name, rows):
    """Write a file: the columns of all rows, in the order of their first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    (RESULTS / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


def text_of(value):
    """The text of a cell: floats by repr, null as the empty cell."""
    return value or "" if value is None or isinstance(value, str) else json.dumps(value)


def value_of(text):
    """What `text_of` was given."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def rows_of(name, pattern, seeds=None):
    """The rows of a file whose run fits a pattern, * for anything; with seeds, those called <pattern>-s<seed>."""
    names = [pattern] if seeds is None else [f"{pattern}-s{seed}" for seed in seeds]
    fits = re.compile("|".join(map(fnmatch.translate, names)))
    return [row for row in load(name) if fits.match(row["run"])]


class Logged(NamedTuple):
    """An evaluate.FinishedRun and its log, a dict of floats for each row."""
    directory: Path
    config: dict
    result: dict
    log: list


def log_of(directory):
    """The rows of a run's log.csv as text."""
    with open(directory / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def logged(directory):
    """A finished run from its files. Raises ValueError where there is none."""
    run = evaluate.read_run(directory)
    try:
        return Logged(*run, [{key: float(cell) for key, cell in row.items()} for row in log_of(run.directory)])
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{directory} has no whole log.csv ({error})") from None


def finished(pattern, seeds=None):
    """Collected runs as `logged` gives them, chosen as `rows_of` does."""
    parts = {}
    for name in FILES:
        for row in rows_of(name, pattern, seeds):
            cells = {key: cell for key, cell in row.items() if key != "run"}
            parts.setdefault(row["run"], {}).setdefault(name, []).append(cells)
    found = []
    for run, part in parts.items():
        (row,), (settings,), log, classes, bins = (part[name] for name in FILES)
        config = {key: value_of(cell) for key, cell in settings.items()}
        config["data"] = config["data"] or {"test": None}  # of the first records
        result = {key: value_of(cell) for key, cell in row.items() if key in FIGURES}
        for key in VECTORS:
            values = [value_of(line[key]) for line in classes]
            result[key] = None if values == [None] * len(values) else values
        result["reliability"] = [[float(line[key]) for key in BINS] for line in bins]
        log = [{key: float(cell) for key, cell in line.items() if cell} for line in log]  # "": another method's column
        found.append(Logged(Path(run), config, result, log))
    return found


# ------------------------------------------------------------------------------------------- collect

def name_of(config):
    """The method's name; that of a script's variant is its own."""
    return config.get("variant") or config["method"]


def gamma_u(config):
    """Imbalance of the unlabeled set, below 1 reversed; None where the images come as they are."""
    if config["imb_u"] or not config["imb"]:
        return config["imb_u"]
    return {"consistent": config["imb"], "uniform": 1.0, "reversed": 1 / config["imb"]}.get(config["shift"])


def words(options):
    """Options as a command line has them."""
    return [word for key, value in options.items()
            for word in ("--" + key.replace("_", "-"), str(value).removesuffix(".0"))]


def options_of(config):
    """The options that give these settings, added one by one until train.parse finds no other difference."""
    free = {"out", "variant", "device", "compile", "precision"}
    if config["dataset"] != "folder":
        free.add("data_dir")
    given = {}
    while True:
        reached = dataclasses.asdict(train.parse(words(given), config.get("variant"))[0])
        other = [key for key in reached if key not in free and reached[key] != config[key]]
        wanted = sorted((key for key in other if config[key] is not None and key not in given),
                        key=lambda key: key == "warmup_steps")  # it follows from --steps, mostly
        if not wanted:
            break
        given[wanted[0]] = config[wanted[0]]
    if other:
        raise ValueError(f"{config['out']}: no options lead to its {', '.join(other)}")
    return given


def command_of(config, name):
    """A run's command, and those of its options that change the preset's training."""
    variant = config.get("variant")
    if variant == "authors":
        return authors.command_of(config), ""
    base, _, later = (variant or "").rpartition("+")
    if base:  # made from a finished run
        return f"python tests/baselines.py {later} runs/{name.replace(variant, base)}", ""
    given = options_of(config)
    usual = "dataset", "data_dir", "method", "shift", "imb", "imb_u", "seed"
    changes = words({key: value for key, value in given.items() if key not in usual})
    if Path(train.parse(words(given), variant)[0].out).name != name:
        given["out"] = f"runs/{name}"
    given["precision"] = config["precision"]
    script = "train.py"
    if variant in LABELS:
        script = f"tests/baselines.py {variant}"
        given.pop("method", None)  # the script's own
    elif variant:
        script = f"tests/ablations.py {variant.removesuffix('-' + config['method'])}"
    return " ".join(["python", script, *words(given)]), " ".join(changes)


def commit():
    """The commit that the working tree stands on, with +changes where a module or a script differs from it."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--", *code()))


def code():
    """The files that make a run."""
    return [path.relative_to(ROOT).as_posix() for pattern in CODE for path in sorted(ROOT.glob(pattern))]


def lines_of(run, log, command, changes, commit):
    """A run's rows for each of the files. log: the rows of log.csv as text."""
    config, result = run.config, run.result
    made = config.get("made_with") or {}
    name = run.directory.name
    shift = config["shift"] if config["shift"] in SHIFTS else None
    head, medium, tail = evaluate.thirds(result)
    over = 0.0  # added one by one, since sum rounds otherwise from Python 3.12 on
    for share, accuracy, confidence in result["reliability"]:
        over += share * (confidence - accuracy)
    row = {"run": name, "dataset": config["dataset"], "method": config["method"],
           "variant": config.get("variant"), "shift": shift, "gamma_l": config["imb"],
           "gamma_u": gamma_u(config), "seed": config["seed"],
           **{key: value for key, value in result.items() if key in FIGURES},
           "head": head, "medium": medium, "tail": tail, "overconfidence": over,
           "changes": changes, "command": command, "commit": commit,
           "torch": made.get("torch"), "threads": made.get("threads"), "machine": made.get("device"),
           "device": config["device"], "precision": config["precision"]}
    classes = range(len(result["classes"]))
    return {
        "runs.csv": [row], "settings.csv": [{"run": name} | config],
        "logs.csv.gz": [{"run": name} | line for line in log],
        "classes.csv.gz": [{"run": name} | {key: result[key] and result[key][k] for key in VECTORS} for k in classes],
        "reliability.csv.gz": [{"run": name, "bin": i} | dict(zip(BINS, values, strict=True))
                               for i, values in enumerate(result["reliability"], 1)]}


def collect(directories):
    """Add finished runs, each in the place of one of the same name.

    Raises ValueError where a directory is none, or where its settings and command disagree.
    """
    new = {}
    for directory in directories:
        run = logged(directory)
        name = run.directory.name
        if name in new:
            raise ValueError(f"two of the runs are called {name}")
        new[name] = lines_of(run, log_of(run.directory), *command_of(run.config, name), commit())
    for name in FILES:
        rows = [row for row in load(name) if row["run"] not in new]
        rows += [{key: text_of(value) for key, value in row.items()} for lines in new.values() for row in lines[name]]
        store(name, sorted(rows, key=lambda row: row["run"]))
    print(f"{len(new)} runs collected, {len(load('runs.csv'))} in all")


# -------------------------------------------------------------------------------------------- tables
# A table has rows {label: names to be put into patterns} and columns {title: function of names and seeds}.

SCORES = "balanced_accuracy", "ece"


def figures(rows, *keys):
    """Mean and deviation of figures over rows of runs.csv, in percent, but for KL, NLL and T."""
    cells = []
    for key in keys:
        scale, digits = (1, 2) if key in ("kl_q_qhat", "nll", "temperature") else (100, 1)
        cells.append(spread([scale * float(row[key]) for row in rows], digits))
    return ", ".join(cells)


def mean(pattern, *keys):
    """A column: figures of the runs of a pattern, of which all seeds have to be there, or none."""
    def cell(names, seeds):
        rows = rows_of("runs.csv", pattern.format(*names), seeds)
        if rows and len(rows) != len(seeds):
            held = [int(row["seed"]) for row in rows]
            raise ValueError(f"{pattern.format(*names)} should have the seeds {[*seeds]}, but has {held}")
        return figures(rows, *keys) if rows else "–"
    return cell


STUDENT = 0, 0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # 97.5 % quantile of t, by the number of values


def marked(values):
    """Mean and deviation of differences in points. Bold: the 95 % interval of the mean is free of 0, one is ahead.

    Italic: it lies within one point of 0, the two are level. Else they are not told apart.
    """
    mean = statistics.mean(values)
    text = "+" * (mean >= 0) + spread(values)
    if len(values) > 1:
        half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        mark = "**" if abs(mean) > half else "*" if abs(mean) + half <= 1 else ""
        text = f"{mark}{text}{mark}"
    return text


def gain(first, second, key="balanced_accuracy"):
    """A column: the difference of paired runs in points, and in how many pairs the first is the better one.

    Pairs have the same gamma_u and seed, hence the same split, initial weights and order of the images. A seed is one
    labeled set, so that its pairs count as one value, their mean.
    """
    def cell(names, seeds):
        patterns = first.format(*names), second.format(*names)
        others = {(row["gamma_u"], row["seed"]): row for row in rows_of("runs.csv", patterns[1], seeds)}
        sets = {}
        for row in rows_of("runs.csv", patterns[0], seeds):
            other = others.get((row["gamma_u"], row["seed"]))
            if other:
                sets.setdefault(row["seed"], []).append(100 * (float(row[key]) - float(other[key])))
        if not sets or patterns[0] == patterns[1]:
            return "–"
        differences = [difference for of_one_set in sets.values() for difference in of_one_set]
        better = sum(difference < 0 if key == "ece" else difference > 0 for difference in differences)
        return f"{marked([*map(statistics.mean, sets.values())])} ({better} of {len(differences)})"
    return cell


def extremes(pattern, key):
    """A column: the lowest and the highest of a figure over the seeds, in points."""
    def cell(names, seeds):
        values = [100 * float(row[key]) for row in rows_of("runs.csv", pattern.format(*names), seeds)]
        return f"{min(values):+.1f} to {max(values):+.1f}" if values else "–"
    return cell


def where(pattern):
    """A column: the names of the runs without the seed, as `rows_of` takes them."""
    return lambda names, seeds: f"`{pattern.format(*names)}`"


def table(what, rows, columns, seeds):
    """Markdown. A row of which no run is there is left out."""
    lines = [[what, *columns], ["---"] * (1 + len(columns))]
    for label, names in rows.items():
        names = (names,) if isinstance(names, str) else names
        cells = [column(names, seeds) for column in columns.values()]
        if any(cell.strip("– /") for cell in cells if not cell.startswith("`")):
            lines.append([label, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods(*names):
    return {LABELS[name]: name for name in LABELS if name in names}


def by_shift(pattern, rows, seeds, what="balanced accuracy, ECE", keys=SCORES, shifts=SHIFTS):
    """Figures of each method under each shift."""
    columns = {shift: mean(pattern.format("{}", shift), *keys) for shift in shifts}
    return table(f"{what}; {len(seeds)} seeds", rows, columns | {"runs": where(pattern.format("{}", "*"))}, seeds)


def closer(pattern, rows, seeds):
    """Under reversed shift: thirds of the classes, overconfidence, likelihood."""
    pattern = pattern.format("{}", "reversed")
    return table(f"reversed; {len(seeds)} seeds", rows, {
        **{third: mean(pattern, third) for third in ("head", "medium", "tail")},
        "confidence − accuracy": mean(pattern, "overconfidence"), "NLL": mean(pattern, "nll"),
        "confidence − accuracy, all seeds": extremes(pattern, "overconfidence"), "runs": where(pattern)}, seeds)


def against(pattern, rows, seeds, shifts=SHIFTS, first="adello"):
    """A method against each of the others."""
    columns = {f"{shift}: {what}": gain(pattern.format(first, shift), pattern.format("{}", shift), key)
               for shift in shifts for what, key in zip(("accuracy", "ECE"), SCORES)}
    return table(f"{LABELS[first]} less …", rows, columns, seeds)


def changes(rows, seeds):
    """What a change does, in all pairs of its runs; rows: {change: (runs with it, runs without it)}."""
    return table("change", rows, {
        "accuracy": gain("{0}", "{1}"), "ECE": gain("{0}", "{1}", "ece"),
        "runs with it": where("{0}"), "runs without it": where("{1}")}, seeds)


def bare(command):
    """A command without what may differ between the seeds of one setting."""
    return re.sub(r" --(seed|precision|out) \S+|-s\d+$", "", command)


def published(dataset):
    """The paper's figures / those of our runs with the same command, a dash where there are none."""
    rows = {(row["setting"], row["method"]): row for row in load("published.csv") if row["dataset"] == dataset}
    commands = {}
    for row in load("runs.csv"):
        commands.setdefault(bare(row["command"]), []).append(row)

    def beside(setting, key):
        def cell(names, seeds):
            row = rows.get((setting, *names))
            if not row:
                return "–"
            ours = commands.get(bare(row["command"]))
            kind = key.replace("accuracy", "balanced_accuracy")
            return f"{row[key] or '–'} / {figures(ours, kind) if ours else '–'}"
        return cell
    columns = {f"{setting}: {TITLES[key]}": beside(setting, key)
               for (setting, _), row in rows.items() for key in TITLES if row[key]}
    names = {LABELS.get(method, method): method for _, method in rows}
    return table("published / this code", names, columns, ())


def steps():
    """What a part of the method adds: in the paper on CIFAR-100-LT, and here on shapes."""
    theirs = {(row["setting"], row["method"]): row for row in load("published.csv")}

    def difference(setting, key):
        def cell(names, seeds):
            first, second = (float(theirs[setting, name][key]) for name in names)
            return f"{first - second:+.1f}"
        return cell
    columns = {}
    for setting, shift, key in (("γ_u 50", "consistent", "accuracy"), ("γ_u 1", "uniform", "accuracy"),
                                ("γ_u 1/50", "reversed", "accuracy"), ("γ_u 50", "consistent", "ece")):
        pair = [f"shapes-{{{i}}}-{shift}-imb50" for i in (0, 1)]
        columns[f"{shift}, {TITLES[key]}: published"] = difference(setting, key)
        columns[f"{shift}, {TITLES[key]}: here"] = gain(*pair, key.replace("accuracy", "balanced_accuracy"))
    rows = ("flexda", "fixmatch"), ("ccr", "fixmatch"), ("adello", "fixmatch"), ("adello", "flexda"), ("kd", "adello")
    return table("difference", {f"{LABELS[a]} less {LABELS[b]}": (a, b) for a, b in rows}, columns, PAIRED)


def speed(names=None, file="benchmark.txt"):
    """What tests/benchmark.py printed: a name, a value and what is said of it; of all lines or some."""
    machine, *lines = (RESULTS / file).read_text(encoding="utf-8").splitlines()
    rows = []
    for line in filter(None, lines):
        name, *cells = re.split("  +", line, maxsplit=2) if "  " in line else line.split(": ", 1)
        if cells and (names is None or name in names):
            rows.append(f"| {name} | {' | '.join([*cells, ''][:2])} |")
    return "\n".join([f"| {machine} | | |", "| --- | --- | --- |", *rows])


TITLES = {"accuracy": "accuracy", "ece": "ECE", "mce": "MCE"}
PAIRED = range(10)  # of pairs all that there are, but for the seeds that the noise was chosen by
SHAPES, CIFAR = "shapes-{}-{}-imb50", "folder-{}-{}-imb100"
ALL, SWEPT = SHAPES.format("{}", "[ruc]*"), SHAPES.format("{}", "[ruci]*")  # under three shifts, at seven gamma_u
REVERSED, LONG, WRN = SHAPES.format("{}", "reversed"), "shapes-4500-{}-reversed-imb50", "folder-2000-{}-reversed-imb100"
LONG_CIFAR, SHORT_CIFAR = "folder-12000-{}-reversed-imb100", "folder-short-{}-uniform-imb100"
CODES = "codes-ours-{}-{}"
FOUR = methods("fixmatch", "udal", "flexda", "adello")
FIVE = methods("fixmatch+la", *FOUR.values())
FAMILY = methods("supervised", "ccr", "kd", "oracle", *FIVE.values())
PLOT = methods("fixmatch", "darp", "debiaspl", "crest", "abc", "udal", "cossl", "adello")
OTHERS = methods("fixmatch+la", "darp+crt", "crest+la", "flexda", *PLOT.values())
DRAWN = methods("fixmatch+la", "flexda", *PLOT.values())
SWEEP = {"50": "consistent", "20": "imbu20", "10": "imbu10", "1": "uniform", "1/10": "imbu0.1", "1/20": "imbu0.05",
         "1/50": "reversed"}
NOISES = {f"{noise}, {LABELS[m]}": m if noise == 0.35 else f"noise{noise}" + "-fixmatch" * (m == "fixmatch")
          for noise in (0.25, 0.3, 0.35, 0.4) for m in ("fixmatch", "adello")}
PARTS = {name: (ALL.format(a), ALL.format(b)) for name, a, b in (
    ("ADELLO for FixMatch", "adello", "fixmatch"), ("ADELLO for UDAL", "adello", "udal"),
    ("FlexDA for FixMatch", "flexda", "fixmatch"), ("FlexDA for UDAL: Q̂ for P_L as the target", "flexda", "udal"),
    ("CCR added to FixMatch", "ccr", "fixmatch"), ("CCR added to FlexDA: ADELLO", "adello", "flexda"),
    ("FixMatch + LA for FixMatch", "fixmatch+la", "fixmatch"), ("FixMatch + LA for UDAL", "fixmatch+la", "udal"),
    ("FixMatch + LA for FlexDA", "fixmatch+la", "flexda"), ("ADELLO for FixMatch + LA", "adello", "fixmatch+la"),
    ("KD for ADELLO: every sample distilled", "kd", "adello"),
    ("oracle for ADELLO: the true prior as the target", "oracle", "adello"))}
ADDED = {f"{name}, {shift}": (SHAPES.format(a, shift), SHAPES.format(b, shift)) for name, a, b in (
    ("DARP for FixMatch", "darp", "fixmatch"), ("DebiasPL for FixMatch", "debiaspl", "fixmatch"),
    ("CReST+ for FixMatch", "crest", "fixmatch"), ("ABC for FixMatch", "abc", "fixmatch"),
    ("CoSSL for FixMatch", "cossl", "fixmatch"), ("LA on FixMatch", "fixmatch+la", "fixmatch"),
    ("cRT on DARP", "darp+crt", "darp"), ("LA on CReST+", "crest+la", "crest")) for shift in SHIFTS}
UNDONE = {
    "batch-norm statistics of labeled, weak and strong images apart": "shapes-separate-statistics-reversed-imb50",
    "U without L": "shapes-unlabeled-alone-reversed-imb50",
    "the target stays at Q̂: alpha_min 1": "shapes-adello-reversed-imb50-alphamin1",
    "alpha falls linearly: d 1": "shapes-adello-reversed-imb50-d1",
    "no EMA": "shapes-adello-reversed-imb50-ema0",
    "Q̂ with momentum 0.9": "shapes-adello-reversed-imb50-momentum0.9",
    "Q̂ with momentum 0.999": "shapes-adello-reversed-imb50-momentum0.999",
    "fp32 in place of bf16": "shapes-fp32-adello-reversed-imb50",
    "T follows Q̂ at every step": "shapes-moving-temperature-consistent-imb50"}
AS_SHIPPED = {f"{name}, {shift}": (f"shapes-fp32-{variant}-{shift}-imb50", f"shapes-fp32-adello-{shift}-imb50")
              for name, variant in (("T = 1", "temperature-one"), ("constant rate", "constant-rate"),
                                    ("T = 1 and constant rate", "as-shipped")) for shift in SHIFTS[::2]}
COOLED = {name: tuple(f"shapes-fp32-{run}-consistent-imb50" for run in runs) for name, runs in {  # T = 1, T
    "FixMatch + CCR": ("temperature-one-ccr", "ccr"),
    "ADELLO, CCR from step 700 on": ("warmup700-temperature-one", "warmup700-adello")}.items()}

TABLES = {
    "short": lambda: by_shift(SHAPES, FIVE, range(5)),
    "family": lambda: by_shift(SHAPES, FAMILY, range(5)),
    "parts": lambda: changes(PARTS, PAIRED),
    "against": lambda: against(SHAPES, methods(*LABELS), PAIRED),
    "la": lambda: against(SHAPES, FOUR, PAIRED, first="fixmatch+la"),
    "temperature": lambda: by_shift(SHAPES, methods("ccr", "adello", "kd", "oracle"), range(5), "T", ["temperature"]),
    "cifar-temperature": lambda: by_shift(CIFAR, methods("adello"), range(3), "T", ["temperature"], SHIFTS[::2]),
    "closer": lambda: closer(SHAPES, FAMILY, range(5)),
    "estimate": lambda: by_shift(SHAPES, FOUR, range(5), "KL(Q‖Q̂)", ["kl_q_qhat"]),
    "others": lambda: by_shift(SHAPES, OTHERS, range(3)),
    "added": lambda: changes(ADDED, PAIRED),
    "longer": lambda: table("reversed, 5 seeds", FOUR, {
        "1,500 steps": mean(REVERSED, *SCORES), "4,500 steps": mean(LONG, *SCORES),
        "confidence − accuracy: 1,500": mean(REVERSED, "overconfidence"), "4,500": mean(LONG, "overconfidence"),
        "runs of 4,500": where(LONG)}, range(5)),
    "longer-against": lambda: table("4,500 steps, reversed: ADELLO less …", FOUR, {
        "accuracy": gain(LONG.format("adello"), LONG), "ECE": gain(LONG.format("adello"), LONG, "ece")}, PAIRED),
    "longer-change": lambda: changes({f"4,500 steps for 1,500, {label}": (LONG.format(m), REVERSED.format(m))
                                      for label, m in FOUR.items()}, PAIRED),
    "longer-cifar": lambda: table("CIFAR-10 as JPEG files, reversed, 5 seeds", methods("flexda", "adello"), {
        "12,000 steps": mean(LONG_CIFAR, *SCORES), "confidence − accuracy": mean(LONG_CIFAR, "overconfidence"),
        "runs": where(LONG_CIFAR)}, range(5)),
    "longer-cifar-against": lambda: changes({
        "ADELLO for FlexDA, 4,000 steps": (CIFAR.format("adello", "reversed"), CIFAR.format("flexda", "reversed")),
        "ADELLO for FlexDA, 12,000 steps": (LONG_CIFAR.format("adello"), LONG_CIFAR.format("flexda")),
        "12,000 steps for 4,000, FlexDA": (LONG_CIFAR.format("flexda"), CIFAR.format("flexda", "reversed")),
        "12,000 steps for 4,000, ADELLO": (LONG_CIFAR.format("adello"), CIFAR.format("adello", "reversed"))}, PAIRED),
    "crest-cifar": lambda: table("CIFAR-10 as JPEG files, uniform, 5 seeds", methods("crest", "crest+la", "adello"), {
        "2,000 steps": mean(SHORT_CIFAR, *SCORES), "runs": where(SHORT_CIFAR)}, range(5)),
    "crest-cifar-against": lambda: changes({f"ADELLO for {LABELS[m]}": (
        SHORT_CIFAR.format("adello"), SHORT_CIFAR.format(m)) for m in ("crest", "crest+la")}, PAIRED),
    "sweep": lambda: table("balanced accuracy at γ_u; 3 seeds", FOUR, {
        gamma: mean(SHAPES.format("{}", name), "balanced_accuracy") for gamma, name in SWEEP.items()}, range(3)),
    "swept": lambda: changes({f"ADELLO for {label}": (SWEPT.format("adello"), SWEPT.format(m))
                              for label, m in FOUR.items()}, range(3)),
    "undone": lambda: changes({
        name: (runs, SHAPES.format("adello", *(shift for shift in SHIFTS if shift in runs)))
        for name, runs in UNDONE.items()}, PAIRED),
    "as-shipped": lambda: changes(AS_SHIPPED, PAIRED),
    "noise": lambda: table("noise; seeds 100, 101", NOISES, {
        shift: mean(SHAPES.format("{}", shift), *SCORES) for shift in ("reversed", "consistent")}, (100, 101)),
    "noise-longer": lambda: table("noise; seed 100", NOISES, {
        "reversed, 4,500 steps": mean(LONG, *SCORES), "runs": where(LONG)}, (100,)),
    "cifar-network": lambda: table("ADELLO, reversed; seed 100", {"WRN-10-1, 4,000 steps": CIFAR.format(
        "adello", "reversed"), "WRN-16-1, 2,200 steps": CIFAR.format("wrn-16-1-adello", "reversed")}, {
        "balanced accuracy, ECE": mean("{}", *SCORES), "runs": where("{}")}, (100,)),
    "cifar": lambda: by_shift(CIFAR, FIVE, range(3), shifts=SHIFTS[::2]),
    "cifar-against": lambda: against(CIFAR, FIVE, PAIRED, SHIFTS[::2]),
    "cifar-la": lambda: against(CIFAR, FOUR, PAIRED, SHIFTS[::2], first="fixmatch+la"),
    "cifar-closer": lambda: closer(CIFAR, FIVE, range(3)),
    "cifar-estimate": lambda: by_shift(CIFAR, FOUR, range(3), "KL(Q‖Q̂)", ["kl_q_qhat"], SHIFTS[::2]),
    "wrn-28-2": lambda: table("WRN-28-2, reversed, seed 0", FOUR, {
        "balanced accuracy, ECE": mean(WRN, *SCORES), "KL(Q‖Q̂)": mean(WRN, "kl_q_qhat"), "runs": where(WRN)}, (0,)),
    "codes": lambda: authors.table([row for row in rows_of("runs.csv", "codes-*") if "+" not in row["run"]]),
    "codes-family": lambda: by_shift(CODES, FIVE, range(5), shifts=SHIFTS[::2]),
    "codes-against": lambda: against(CODES, FIVE, PAIRED, SHIFTS[::2]),
    "codes-la": lambda: against(CODES, FOUR, PAIRED, SHIFTS[::2], first="fixmatch+la"),
    "temperature-one": lambda: changes({f"T = 1, {name}": runs for name, runs in COOLED.items()}, PAIRED),
    "temperature-large": lambda: table("consistent; 5 seeds", COOLED, {
        "T": mean("{1}", "temperature"), "balanced accuracy, ECE": mean("{1}", *SCORES), "runs": where("{1}")},
        range(5)),
    "steps": steps,
    "speed": speed, "speed-short": lambda: speed(["step", "ratio"]),
    "speed-fp32": lambda: speed(["step", "conventional", "authors", "ratio", "authors' ratio"], "benchmark-fp32.txt"),
    **{name: functools.partial(published, name)
       for name in ("CIFAR-10-LT", "CIFAR-100-LT", "STL-10-LT", "ImageNet-127")}}

PICTURES = {  # name: the patterns and seeds of its groups of runs
    "reliability": ([SHAPES.format(m, "reversed") for m in FIVE.values()], range(5)),
    "fig3": ([SHAPES.format("adello", shift) for shift in SHIFTS[::-1]], range(5)),
    "sweep": ([SHAPES.format(m, name) for m in FOUR.values() for name in SWEEP.values()], range(3)),
    "calibration": ([SHAPES.format(m, "consistent") for m in DRAWN.values()], range(3))}


# ----------------------------------------------------------------------------------- pages, pictures

NUMBER = r"\d+ of \d+|\d+\.\d+ ± \d+\.\d+|\d+\.\d+"
NO_SENTENCE = r"```.*?```|`[^`]*`|\]\([^)]*\)|(?:arXiv|Python|PyTorch) [\d.]+"


def page_with(text, different):
    """A page with its tables made anew. Appends to `different` what is not as the files have it."""
    def made(match):
        name, old = match[1], (match[2] or "").strip()
        if name not in TABLES:
            raise ValueError(f"no table {name}; there are {', '.join(TABLES)}")
        new = TABLES[name]()
        if new != old:
            different.append(f"table {name} is not as the files have it")
        return f"<!-- table: {name} -->\n\n{new}\n"
    text = re.sub(r"^<!-- table: (\S+) -->\n(?:\n((?:\|.*\n)+))?", made, text, flags=re.MULTILINE)
    different += without_a_table(text)
    return text


def without_a_table(text):
    """What sentences say and no table of their section, or of one named in the same paragraph, bears out; lines."""
    level, title = 0, ""
    sections = [(level, title, [])]
    for line in re.sub(NO_SENTENCE, "", text, flags=re.DOTALL).splitlines():
        if line.startswith("#"):
            marks, _, title = line.partition(" ")
            sections.append((len(marks), title, []))
        else:
            sections[-1][2].append(line)
    tables = {}                                # the numbers of a section and of those below it, but for the page's
    for i, (level, title, _) in enumerate(sections):
        below = itertools.takewhile(lambda section: section[0] > level > 1, sections[i + 1:])
        cells = "\n".join(line for _, _, lines in (sections[i], *below) for line in lines if line.startswith("|"))
        tables[title] = {*re.findall(NUMBER, cells), *re.findall(r"\d+\.\d+", cells)}
    lines = []
    for _, title, of_section in sections:
        prose = "\n".join(line for line in of_section if not line.startswith("|"))
        for paragraph in re.split(r"\n\n+|\n(?=- |\d+\. )", prose):
            paragraph = " ".join(paragraph.split())
            named = re.findall(r'"([^"]+)"', paragraph)
            held = set().union(*(tables.get(name, ()) for name in (title, *named)))
            lines += [f"{number} in a sentence stands in no table of its section ({title})"
                      for number in re.findall(NUMBER, paragraph) if number not in held]
            lines += [f'"{name}" ({title}) is no section of this page'
                      for name in re.findall(r'\("([^"]+)"', paragraph) if name not in tables]
    return lines


def groups_of(name):
    """The groups of runs that a picture shows, and a checksum of what they hold."""
    patterns, seeds = PICTURES[name]
    groups = [group for group in (finished(pattern, seeds) for pattern in patterns) if group]
    held = repr([(run.directory.name, run.result, run.log) for group in groups for run in group])
    return groups, f"runs {zlib.crc32(held.encode()):08x}"


def borne_out(result):
    """Figures of a result that follow from its bins and vectors, to the precision of float32."""
    gaps = [share * abs(accuracy - confidence) for share, accuracy, confidence in result["reliability"]]
    present = [accuracy for accuracy in result["per_class_accuracy"] if accuracy is not None]
    found = {"ece": sum(gaps), "balanced_accuracy": statistics.mean(present)}
    if result["q_hat"]:
        q_hat = torch.tensor(result["q_hat"], dtype=torch.float64)
        found["kl_uniform_qhat"] = kl_divergence(uniform(len(q_hat), dtype=torch.float64), q_hat).item()
        if result["q_true"]:
            found["kl_q_qhat"] = kl_divergence(torch.tensor(result["q_true"], dtype=torch.float64), q_hat).item()
    return found


def disagreements():
    """What files, pages and pictures do not say alike, a line each."""
    different = []
    rows = {row["run"]: row for row in load("runs.csv")}
    for run in finished("*"):
        row = rows[str(run.directory)]
        (made,) = lines_of(run, [], row["command"], row["changes"], row["commit"])["runs.csv"]
        different += [f"{run.directory}: {key} in runs.csv is {cell}, by the other files {text_of(made.get(key))}"
                      for key, cell in row.items() if cell != text_of(made.get(key))]
        different += [f"{run.directory}: {key} in runs.csv is {run.result[key]}, at the end of the log {value}"
                      for key, value in run.log[-1].items() if run.result.get(key, value) not in (value, None)]
        different += [f"{run.directory}: {key} in runs.csv is {run.result[key]}, by its bins and vectors {value}"
                      for key, value in borne_out(run.result).items()
                      if not math.isclose(run.result[key], value, rel_tol=1e-5, abs_tol=1e-6)]
    for name in PICTURES:
        path = RESULTS.parent / f"{name}.png"
        if not path.exists() or groups_of(name)[1].encode() not in path.read_bytes():
            different.append(f"{path.name} was drawn from other runs")
    for page in PAGES:
        found = []
        page_with(page.read_text(encoding="utf-8"), found)
        different += [f"{page.relative_to(ROOT)}: {line}" for line in found]
    return different


def write():
    """Make tables and pictures anew."""
    import pictures
    for name in PICTURES:
        groups, held = groups_of(name)
        drawn = pictures.DRAWINGS[name](groups)
        drawn.savefig(RESULTS.parent / f"{name}.png", dpi=130, metadata={"Description": held})
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := page_with(text, [])) != text:
            page.write_text(new, encoding="utf-8", newline="\n")


def main(arguments):
    """The command line. Returns the exit status."""
    what, *directories = arguments or [""]
    try:
        if what in ("-h", "--help"):
            print(__doc__)
        elif what == "collect" and directories:
            collect(directories)
        elif arguments == ["write"]:
            write()
        elif arguments == ["check"]:
            different = disagreements()
            print("\n".join(different) or "files, pages and pictures agree")
            return int(bool(different))
        else:
            raise ValueError("give collect and finished runs, or write, or check")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

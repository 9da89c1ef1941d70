"""results.py and pictures.py: the evidence is whole, the pages say what it says, pictures show what they are given."""

import csv
import dataclasses
import gzip
import io
import math
import shutil
import subprocess
import sys

import pytest

import conftest
import pictures
import results
import train

SCORES = {"fixmatch": (0.5, 0.2), "udal": (0.55, 0.15), "adello": (0.6, 0.1)}


def made_up_run(directory, variant=None, accuracy=0.6, ece=0.1, **settings):
    """A finished run's three files, two evaluations of three classes; settings as on the command line."""
    config, _ = train.parse(results.words({"method": "adello"} | settings), variant)
    distance = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)  # KL((1/2, 1/4, 1/4) || uniform)
    result = {"accuracy": accuracy, "ece": ece, "mce": ece, "nll": 1 / 3, "step": 1500,
              "seconds": 150.0, "kl_q_qhat": distance, "kl_uniform_qhat": 0.0,
              "classes": ["ant", "bee", "cat"], "q_hat": 3 * [1 / 3], "q_true": [0.5, 0.25, 0.25],
              "p_labeled": [0.2, 0.3, 0.5], "per_class_accuracy": [accuracy + 0.25, None, accuracy - 0.25],
              "reliability": [[0.0, 0.0, 0.0], [0.25, 0.5 - ece, 0.5], [0.75, 0.9 - ece, 0.9]]}
    settings = dataclasses.asdict(config) | {"made_with": {"torch": "2.11.0", "threads": 1}}
    conftest.made_up_run(directory, accuracy, result, **settings)
    (directory / "log.csv").write_text(
        "step,seconds,alpha,kl_q_qhat,kl_uniform_qhat,balanced_accuracy,ece\n"
        f"750,75.0,0.7,1.9,0.0,{accuracy},{ece}\n1500,150.0,0.1,{distance},0.0,{accuracy},{ece}\n")
    return directory


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Files of results of one's own, empty but for the published ones; returns their directory."""
    directory = tmp_path / "results"
    directory.mkdir()
    shutil.copy(results.RESULTS / "published.csv", directory)
    monkeypatch.setattr(results, "RESULTS", directory)
    return directory


@pytest.fixture
def collect(own, tmp_path):
    """Makes and collects a run of shapes, named by its method or variant, shift and seed."""
    def one(method="adello", shift="reversed", seed=0, variant=None, **settings):
        directory = tmp_path / f"shapes-{variant or method}-{shift}-imb50-s{seed}"
        made_up_run(directory, variant, method=method, shift=shift, seed=seed, **settings)
        results.collect([directory])
    return one


@pytest.fixture
def without_pages(monkeypatch):
    monkeypatch.setattr(results, "PAGES", [])
    monkeypatch.setattr(results, "PICTURES", {})


# ------------------------------------------------------------------------------------------ the evidence

def test_files_pages_and_pictures_agree():
    assert results.disagreements() == []


def test_the_evidence_is_a_few_files_that_csv_reads_whole():
    files = [path for path in results.RESULTS.parent.rglob("*") if path.is_file()]
    assert len(files) <= 20 and len(list(results.RESULTS.iterdir())) <= 12
    runs = [row["run"] for row in results.load("runs.csv")]
    assert len(set(runs)) == len(runs) >= 325
    for name in results.FILES:
        content = (results.RESULTS / name).read_bytes()
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
        assert len({len(row) for row in csv.reader(io.StringIO(text, newline=""))}) == 1
        assert {row["run"] for row in results.load(name)} == set(runs)
    assert all(row["command"] and len(row["commit"]) >= 40 and row["torch"] for row in results.load("runs.csv"))


@pytest.mark.parametrize("pattern, shifts, seeds", [
    (results.SHAPES, results.SHIFTS, range(5)), (results.CIFAR, results.SHIFTS[::2], range(3))])
def test_accuracy_and_calibration_have_the_order_of_the_paper(pattern, shifts, seeds):
    """What the page claims first, in the mean over seeds; that FlexDA is ahead of UDAL, the paper does not say."""
    for shift in shifts:
        for key, sign in (("balanced_accuracy", 1), ("ece", -1)):
            column = results.mean(pattern.format("{}", shift), key)
            means = [sign * float(column([name], seeds).split()[0]) for name in results.FOUR.values()]
            assert means == sorted(means)


def test_a_published_command_is_written_as_a_run_of_ours_would_record_it():
    commands = [row["command"] for row in results.load("published.csv")]
    commands = [command for command in commands if command.startswith("python train.py")]
    assert len(commands) > 20
    for command in commands:
        config, _ = train.parse(command.split()[2:])
        options = results.options_of(dataclasses.asdict(config))
        assert results.bare(command).split()[2:] == results.words(options)


# ----------------------------------------------------------------------------------------------- collect

def test_a_collected_run_is_what_its_directory_holds(own, tmp_path):
    directories = [made_up_run(tmp_path / "runs/shapes-adello-reversed-imb50-s0", accuracy=0.1 + 0.2),
                   made_up_run(tmp_path / "runs/shapes-adello-imbu0.1-imb50-s1", imb_u=0.1, seed=1)]
    results.collect(directories)
    for directory in directories:
        (collected,), read = results.finished(directory.name), results.logged(directory)
        assert collected._replace(directory=read.directory) == read
    first, second = results.load("runs.csv")
    assert first["command"].startswith("python train.py --imb-u 0.1 --seed 1 --precision ")
    assert first["gamma_u"] == "0.1" and first["shift"] == ""
    assert second["balanced_accuracy"] == "0.30000000000000004" and second["tail"] == "0.55"
    assert float(second["head"]) == pytest.approx(0.05)
    assert second["commit"][:40].isalnum() and second["torch"] == "2.11.0" and second["variant"] == ""


def test_a_run_collected_again_takes_its_own_place(own, tmp_path):
    for i, accuracy in enumerate((0.5, 0.7)):
        results.collect([made_up_run(tmp_path / f"{i}/shapes-adello-reversed-imb50-s0", accuracy=accuracy)])
    assert [row["accuracy"] for row in results.load("runs.csv")] == ["0.7"]
    assert len(results.load("logs.csv.gz")) == 2 and len(results.load("classes.csv.gz")) == 3


def test_what_is_no_finished_run_or_two_of_one_name_are_refused_and_change_nothing(own, tmp_path, capsys):
    twice = [made_up_run(tmp_path / f"{i}/shapes-adello-reversed-imb50-s0") for i in (0, 1)]
    for runs in ([tmp_path / "none"], twice):
        assert results.main(["collect", *map(str, runs)]) == 2 and not (own / "runs.csv").exists()
        assert capsys.readouterr().err.count("\n") == 1


def test_a_cell_that_the_other_files_do_not_bear_out_is_found(own, collect, without_pages):
    collect(accuracy=0.625)
    assert results.disagreements() == []
    text = (own / "runs.csv").read_text()
    for right, other in (("0.625", "0.626"), (",reversed,", ",uniform,"), (",0.875,", ",0.8,")):
        wrong = text.replace(right, other)
        (own / "runs.csv").write_text(wrong)
        assert wrong != text and results.disagreements()


@pytest.mark.parametrize("name, key, figure", [
    ("classes.csv.gz", "q_true", "kl_q_qhat"), ("classes.csv.gz", "q_hat", "kl_uniform_qhat"),
    ("classes.csv.gz", "per_class_accuracy", "balanced_accuracy"), ("reliability.csv.gz", "accuracy", "ece")])
def test_a_figure_that_the_vectors_and_bins_do_not_bear_out_is_found(name, key, figure, collect, without_pages):
    collect()
    changed = [dict(row) for row in results.load(name)]
    changed[2][key] = str(float(changed[2][key]) - 0.01)
    results.store(name, changed)
    assert f"{figure} in runs.csv is" in "\n".join(results.disagreements())


@pytest.mark.parametrize("arguments", [
    "", "--method fixmatch --shift uniform --seed 3", "--steps 4500 --eval-every 300", "--steps 3000 --warmup-steps 5",
    "--dataset cifar100 --imb 20 --imb-u 0.1", "--dataset folder --data-dir pictures --image-size 64 --ema 0",
    "--dataset folder --data-dir pictures --n1 1500 --shift reversed", "--dataset stl10 --imb 10 --lr 1e-07"])
def test_the_recorded_command_gives_the_settings(arguments):
    config = dataclasses.asdict(train.parse(arguments.split())[0])
    command, changes = results.command_of(config, config["out"].rpartition("/")[2])
    again = dataclasses.asdict(train.parse(command.split()[2:])[0])
    assert {**again, "precision": None, "device": None} == {**config, "precision": None, "device": None}
    assert all(word in arguments for word in changes.split()) and "--out" not in command


def test_the_command_of_a_script_s_run_is_the_script():
    config = dataclasses.asdict(train.parse(["--seed", "2", "--method", "fixmatch"])[0])
    for variant, begins in (("noise0.3-fixmatch", "python tests/ablations.py noise0.3 --method fixmatch --seed 2 "),
                            ("darp", "python tests/baselines.py darp --seed 2 --precision"),
                            ("crest+la", "python tests/baselines.py la runs/shapes-crest-reversed-imb50-s2")):
        command, _ = results.command_of(config | {"variant": variant}, f"shapes-{variant}-reversed-imb50-s2")
        assert command.startswith(begins)


# ------------------------------------------------------------------------------------------------ tables

def test_pairs_have_the_same_gamma_u_and_seed_and_a_lower_ece_wins(collect):
    for method, shift, seed, accuracy, ece in [
            ("adello", "reversed", 0, 0.60, 0.10), ("adello", "uniform", 0, 0.70, 0.20),
            ("adello", "uniform", 1, 0.90, 0.90),
            ("udal", "uniform", 0, 0.61, 0.21), ("udal", "reversed", 0, 0.58, 0.13)]:
        collect(method, shift, seed, accuracy=accuracy, ece=ece)
    ours, theirs, seeds = results.ALL.format("adello"), results.ALL.format("udal"), range(5)
    assert results.gain(ours, theirs)([], seeds) == "+5.5 (2 of 2)"  # one labeled set
    assert results.gain(ours, theirs, "ece")([], seeds) == "-2.0 (2 of 2)"
    assert results.gain(theirs, ours, "ece")([], seeds) == "+2.0 (0 of 2)"
    assert results.gain(ours, "none")([], seeds) == results.gain(ours, ours)([], seeds) == "–"


def test_the_deviation_of_pairs_is_that_of_the_labeled_sets(collect):
    """Gains of 1 and 3 points on one labeled set, 4 and 4 on another: means 2 and 4, deviation sqrt 2."""
    for shift, seed, gain in (("reversed", 0, 0.01), ("uniform", 0, 0.03), ("reversed", 1, 0.04), ("uniform", 1, 0.04)):
        collect("adello", shift, seed, accuracy=0.5 + gain)
        collect("udal", shift, seed, accuracy=0.5)
    cell = results.gain(results.ALL.format("adello"), results.ALL.format("udal"))([], range(5))
    assert cell == f"+3.0 ± {math.sqrt(2):.1f} (4 of 4)"


@pytest.mark.parametrize("values, text", [
    # the 95 % interval of three values is the mean ± 4.303 / sqrt 3 = 2.484 deviations
    ([1.9, 2.9, 3.9], "**+2.9 ± 1.0**"), ([1.1, 2.1, 3.1], "+2.1 ± 1.0"), ([-2.9, -2.5, -2.1], "**-2.5 ± 0.4**"),
    ([-0.2, 0.1, 0.3], "*+0.1 ± 0.3*"), ([-0.4, 0.1, 0.5], "+0.1 ± 0.5"), ([0.5, 0.5, 0.5], "**+0.5 ± 0.0**"),
    ([3.0], "+3.0")])
def test_ahead_level_and_neither_are_told_by_students_interval(values, text):
    assert results.marked(values) == text


def test_a_mean_of_some_of_the_seeds_is_refused_by_name(collect):
    column = results.mean("shapes-{}-uniform-imb50", "ece")
    for seed in (0, 1):
        collect("adello", "uniform", seed)
    assert column(["adello"], (0, 1)) == "10.0 ± 0.0" and column(["udal"], (0, 1)) == "–"
    with pytest.raises(ValueError, match=r"adello-uniform-imb50 should have the seeds \[0, 1, 2\], but has \[0, 1\]"):
        column(["adello"], range(3))


def test_a_table_or_a_number_that_the_files_do_not_have_is_found():
    table = results.TABLES["short"]()
    found = []
    page = results.page_with(f"ADELLO is ahead.\n\n<!-- table: short -->\n\n{table}\n\nmore\n", found)
    assert found == [] and page.count(table) == 1
    assert results.page_with(page.replace("| UDAL | ", "| UDAL | 9"), found) == page and "table short" in found.pop()
    assert results.page_with("<!-- table: short -->\nmore\n", found) == f"<!-- table: short -->\n\n{table}\nmore\n"
    with pytest.raises(ValueError, match="no table absent; there are short, family"):
        results.page_with("<!-- table: absent -->\n", [])


TWO = """# Page
Nothing below bears out 3.3 here.

## One
| a | **+1.1 ± 0.2** (4 of 5) |
{}

## Other
- a first

### Below
| b | 2.2, 3.3 |
"""


@pytest.mark.parametrize("sentence, missing", [
    ("1.1 is, 4 of 5 is, 1.1 ± 0.2 is, and so is 0.2.", []),
    ("2.2 stands elsewhere.", ["2.2"]), ('As ("Other") says, 2.2 stands there.', []),
    ("5 of 5", ["5 of 5"]), ("1.1 ± 0.3", ["1.1 ± 0.3"]), ("+1.1 ± 0.2", []),
    ('It is 2.2\n("Below").', []), ('3.3 ("Other").', []),
    ('("Below")\n\nIt is 2.2.', ["2.2"]), ('("Beneath"): 1.1', ['"Beneath"']),
    ("`--d 99.9`, arXiv 2306.04621, Python 3.10 [x](1.5.md)\n```\n99.9\n# 9.9\n```", [])])
def test_a_number_stands_in_a_table_of_its_section_or_of_one_that_its_paragraph_names(sentence, missing):
    found = results.without_a_table(TWO.format(sentence))
    assert [line.split(" in a sentence")[0].split(" (")[0] for line in found] == ["3.3", *missing]


def test_the_code_that_makes_a_run_is_all_that_its_scripts_import():
    """A method that moves to another file must not leave the list from which `+changes` is told."""
    script = ("import sys; sys.path[:0] = ['.', 'tests']; import ablations, authors, baselines; "
              "print(*(getattr(module, '__file__', None) for module in sys.modules.values()), sep='\\n')")
    loaded = subprocess.run([sys.executable, "-c", script], cwd=results.ROOT, capture_output=True, text=True,
                            check=True).stdout
    files = [*results.ROOT.glob("*.py"), *results.ROOT.glob("tests/**/*.py")]
    here = {path.relative_to(results.ROOT).as_posix() for path in files if f"{path}\n" in loaded}
    assert {"train.py", "tests/ablations.py", "tests/authors.py", "tests/baselines.py"} < here <= set(results.code())


def test_a_run_with_a_published_command_stands_beside_the_published_figure(collect):
    for seed, accuracy in ((0, 0.40), (1, 0.50)):
        collect("fixmatch", "uniform", seed, dataset="cifar100", accuracy=accuracy)
    collect("adello", "uniform", dataset="cifar100", steps=99)
    table = results.published("CIFAR-100-LT")
    assert "48.6 / 45.0 ± 7.1" in table and "57.5 / –" in table


# ---------------------------------------------------------------------------------------------- pictures

@pytest.fixture
def read(tmp_path):
    """Makes a run of a name and reads it."""
    pytest.importorskip("matplotlib")
    return lambda name, **settings: results.logged(made_up_run(tmp_path / name, **settings))


@pytest.fixture
def groups(read):
    """Groups of two seeds of made-up runs, the last method of the paper's order first."""
    def one(method, gamma, seed):
        accuracy, ece = SCORES[method]
        return read(f"shapes-{method}-imbu{gamma}-imb50-s{seed}", method=method, imb_u=gamma, seed=seed,
                    accuracy=accuracy + seed / 10, ece=ece)

    def find(gammas=(10, 0.1), methods=tuple(SCORES)):
        return [[one(method, gamma, seed) for seed in (0, 1)] for method in reversed(methods) for gamma in gammas]
    return find


@pytest.mark.parametrize("kind", pictures.DRAWINGS)
def test_pictures_are_drawn(kind, groups, tmp_path):
    runs = [str(run.directory) for group in groups() for run in group]
    assert pictures.main([kind, str(tmp_path / "x.png"), *runs]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "x.png").stat().st_size > 10_000


def test_panels_are_in_the_paper_s_order_and_show_how_many_samples_a_bar_holds(groups):
    drawn = pictures.reliability(groups(gammas=(10,)))
    assert [axes.get_title().split(",")[0] for axes in drawn.axes[:3]] == ["FixMatch", "UDAL", "ADELLO"]
    assert [bar.get_height() for bar in drawn.axes[3].patches] == [0, 25, 75]
    assert {"mean accuracy", "mean confidence"} <= {text.get_text() for text in drawn.legends[0].get_texts()}


def test_what_is_shaded_in_a_reliability_diagram_is_the_mean_ece_of_its_title(read):
    """Seeds that miss on either side of the confidence: their gaps do not cancel."""
    runs = [read(f"shapes-adello-reversed-imb50-s{seed}", seed=seed) for seed in (0, 1)]
    for row in runs[1].result["reliability"]:
        row[1] = 2 * row[2] - row[1]  # as much above the confidence as it was below
    above, below = pictures.reliability([runs]).axes
    shares = {round(bar.get_x(), 9): bar.get_height() / 100 for bar in below.patches}
    accuracy, over, under = (group.patches for group in above.containers)
    shaded = sum(shares[round(bar.get_x(), 9)] * bar.get_height() for bar in (*over, *under))
    assert shaded == pytest.approx(0.1)
    assert [bar.get_height() for bar in over] == pytest.approx([0.05, 0.05])
    assert [bar.get_y() for bar in under] == pytest.approx([0.5, 0.9])  # on the confidence
    assert above.get_title() == "ADELLO, reversed\nECE 10.0 ± 0.0 %, 2 seeds"
    assert "-10.0 to +10.0" in below.get_xlabel()


def test_fig3_names_method_and_shift_cuts_no_curve_and_shows_alpha_where_there_is_one(groups, read):
    *panels, alpha = pictures.fig3(groups(gammas=(10,), methods=("fixmatch", "adello"))).axes
    assert [axes.get_title() for axes in panels] == ["ADELLO, γ_u = 10", "FixMatch, γ_u = 10"]
    assert all(axes.get_ylim()[1] > 1.9 and len(axes.lines) == 2 for axes in panels)
    assert [line.get_label() for line in alpha.lines] == ["ADELLO, γ_u = 10"]
    assert list(alpha.lines[0].get_ydata()) == [0.7, 0.1]
    assert all(len(axes.collections) == 2 for axes in panels)  # the bands of two seeds
    alone = read("a", method="fixmatch", shift="uniform")
    assert [axes.get_title() for axes in pictures.fig3([[alone]]).axes] == ["FixMatch, uniform"]


def test_the_sweep_shows_differences_of_the_same_seed(groups):
    (axes,) = pictures.sweep(groups()).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["ADELLO"] == pytest.approx([10, 10]) and lines["UDAL"] == pytest.approx([5, 5])


def test_two_settings_of_one_method_are_two_points_with_names_and_colours_of_their_own(read):
    groups = [[read(f"shapes-adello-d{d}-s0", d=d, accuracy=0.5 + d / 10)] for d in (1, 3)]
    _, ours = pictures.calibration(groups).axes
    assert {text.get_text() for text in ours.texts} == {"shapes-adello-d1", "shapes-adello-d3"}
    assert len({text.get_color() for text in ours.texts}) == 2


@pytest.mark.parametrize("arguments, said", [
    ("fig3", "give reliability, fig3, sweep, calibration, the picture's file and finished runs"),
    ("fig3 {run} {run}", "stands where the picture's file is due"),
    ("fig3 {tmp}/x.png {tmp}/none", "none is neither a directory nor the name of a run"),
    ("sweep {tmp}/x.png {run}", "two or more γ_u; all of these have γ_u = 1/50"),
    ("sweep {tmp}/x.png {run} {other}", "all of these runs are ADELLO's")])
def test_mistakes_are_one_line_and_draw_nothing(arguments, said, tmp_path, capsys):
    run, other = (made_up_run(tmp_path / f"shapes-adello-{shift}-imb50-s0", shift=shift)
                  for shift in ("reversed", "uniform"))
    assert pictures.main(arguments.format(run=run, other=other, tmp=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and {*tmp_path.iterdir()} == {run, other}


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = made_up_run(tmp_path / "shapes-adello-reversed-imb50-s0")
    assert pictures.main(["fig3", str(tmp_path / "x.png"), str(run)]) == 2
    assert capsys.readouterr().err == "error: pictures need matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("content", [None, "step,alpha\n50,0.8\n10"])
def test_a_run_without_a_whole_log_is_refused_by_name_and_not_collected(own, tmp_path, content):
    path = made_up_run(tmp_path / "run") / "log.csv"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(ValueError, match="run has no whole log.csv"):
        results.logged(tmp_path / "run")
    with pytest.raises(ValueError, match="run has no whole log.csv"):
        results.collect([tmp_path / "run"])
    assert not (own / "runs.csv").exists()


@pytest.mark.parametrize("script", [results, pictures])
def test_help_is_what_the_script_says_of_itself(script, capsys):
    for word in ("--help", "-h"):
        assert script.main([word]) == 0
        assert capsys.readouterr() == (script.__doc__ + "\n", "")


@pytest.mark.parametrize("kind", ["reliability", "fig3", "calibration"])
def test_a_name_is_no_formula(kind, read, tmp_path):
    runs = [str(read(name, d=d).directory) for name, d in ((r"a$\foo$", 1), ("b", 3))]
    assert pictures.main([kind, str(tmp_path / "x.png"), *runs]) == 0

"""The exercises of a course: hand them out and grade them.

    python tests/exercises.py blank smooth adjust --out homework   # or: blank all
    python tests/exercises.py grade homework smooth adjust         # without names: all

`blank` writes a copy of the project in which these functions raise NotImplementedError; some exercises are answered in
the copy's answers.py. `grade` prints one line per exercise, "passed" or the first property that does not hold. It runs
the tests that stand beside this file, whatever became of those in the directory, each exercise in a process of its own.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODULES = ["priors.py", "losses.py", "data.py", "models.py", "evaluate.py", "train.py"]
COPIED = [*MODULES, "README.md", "requirements.txt", "tests/exercises.py", "tests/test_exercises.py"]
# each exercise is tested in a process of its own; on Linux a server forks it that has imported torch already
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PRELOADED = ["torch", "torchvision.datasets", "torchvision.transforms.v2", "pytest"]

PLACES = {  # exercise: module.function, module.Class.method or module.TABLE, where it is solved
    "alpha_schedule": "priors.alpha_schedule", "smooth": "priors.smooth",
    "imbalance_temperature": "priors.imbalance_temperature",
    "adjust": "losses.adjust", "complementary_loss": "losses.complementary_loss",
    "weak": "data.weak", "reliability": "evaluate.reliability",
    "ema_update": "models.EMA.update", "estimator_update": "priors.PriorEstimator.update",
    "half_life": "answers.half_life", "at_target": "answers.at_target",
    "temperature_of_counts": "answers.temperature_of_counts", "gradient_limit": "answers.gradient_limit",
    "own_method": "losses.METHODS"}
NAMES = list(PLACES)
NEEDS = {"complementary_loss": ["adjust"], "estimator_update": ["imbalance_temperature"]}  # what it calls

ANSWERS = {
    "": '''"""Answers to the exercises that are no function of the paper."""

import math

import torch
''',
    "half_life": '''
def half_life(momentum):
    """After how many steps has Qhat forgotten half of a wrong start?

    Let every batch have the mean prediction Q, and let the estimate start at some other prior. The difference
    between the two shrinks at each update by the same factor.

    momentum: m of PriorEstimator, in (0, 1). Returns the number of updates, as a float or rounded.
    """
    raise NotImplementedError("answers.half_life is yours to write")
''',
    "at_target": '''
def at_target(logits, source, target):
    """The logits, at class prior `target`, of a classifier that was trained where the prior is `source`.

    It was trained with plain cross-entropy, so its softmax is the posterior at `source`. The classes look the same
    everywhere, P(x|y) does not change; only their frequencies do. A sum of two terms is enough; derive it from
    Bayes' rule. Compare with losses.adjust: why is the sign another?

    logits: (N, K); source, target: (K,) priors without zeros. Returns (N, K).
    """
    raise NotImplementedError("answers.at_target is yours to write")
''',
    "temperature_of_counts": '''
def temperature_of_counts(counts):
    """CCR's temperature from class sizes, as the ratio of two kinds of mean of these sizes.

    Insert Q(y) = N_y / sum_j N_j into T: which means are they, and which inequality between them says that T is at
    least 1, and that it is 1 exactly where all classes have one size?

    counts: a list of K positive numbers, K up to thousands. Returns a float.
    """
    raise NotImplementedError("answers.temperature_of_counts is yours to write")
''',
    "gradient_limit": '''
def gradient_limit(logits, probs):
    """How fast does CCR's gradient vanish as T grows?

    Take one sample, not masked and not adjusted. The gradient g(T) of its loss with respect to the logits f(W(u))
    falls like a power of T: T^n g(T) tends to a limit that is neither zero nor infinite. Expand both softmaxes to
    first order in 1/T. (What, then, does a large T do to the weight of L_uc beside L_s?)

    logits: (K,) f(W(u)); probs: (K,) p(u), without zeros. Returns n and the limit (K,), found without autograd.
    """
    raise NotImplementedError("answers.gradient_limit is yours to write")
''',
    "own_method": '''
# own_method: add a row of your own to METHODS in losses.py, a combination that the table does not have yet. Say
# here what you expect of it under reversed shift and why, then run it against its neighbours with the same seeds:
#     python train.py --method <its name> --seed 0
'''}


# ------------------------------------------------------------------------------------------ hand out

def find(tree, path):
    """The node of a function "name" or a method "Class.name" in a module's syntax tree."""
    node = tree
    for name in path.split("."):
        node = next(n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    return node


def empty(source, place):
    """A module's text with one function's body, docstring apart, replaced by NotImplementedError."""
    node, lines = find(ast.parse(source), place.partition(".")[2]), source.splitlines()
    body = node.body[0]
    start = body.end_lineno if ast.get_docstring(node) is not None else body.lineno - 1
    indent = " " * body.col_offset
    lines[start:node.end_lineno] = [f'{indent}raise NotImplementedError("{place} is yours to write")']
    return "\n".join(lines) + "\n"


def blank(names, directory):
    """Write a copy of the project with these exercises open. ValueError where something is."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name another --out")
    (directory / "tests").mkdir(parents=True, exist_ok=True)
    for file in COPIED:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            if name not in ANSWERS and PLACES[name].startswith(file.removesuffix(".py") + "."):
                text = empty(text, PLACES[name])
        (directory / file).write_text(text, encoding="utf-8")
    answers = [ANSWERS[name] for name in names if name in ANSWERS]
    if answers:
        (directory / "answers.py").write_text("\n".join([ANSWERS[""], *answers]), encoding="utf-8")


# --------------------------------------------------------------------------------------------- grade

def attempt(name, directory, scratch, sender):
    """Test an exercise, in a process of its own, and send what `test` returns."""
    os.environ["ADELLO_EXERCISES"] = str(directory)
    os.chdir(scratch)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.path.insert(0, str(HERE))
        import test_exercises
        sender.send_bytes(json.dumps(test_exercises.verdict(name)).encode())


def test(name, directory, timeout):
    """None where an exercise is solved in a directory, else a sentence that says why it is not."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as scratch:
        process = PROCESSES.Process(target=attempt, args=(name, directory, scratch, sender), daemon=True)
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout):
                return f"no end within {timeout:g} seconds: an endless loop?"
            return json.loads(receiver.recv_bytes())
        except EOFError:
            return "Python stopped before the tests had come to their end"
        finally:
            process.kill()
            process.join()


def grade(directory, names, timeout=60):
    """Print a line for each of these exercises in a directory, and a count. Returns the exit status."""
    PROCESSES.set_forkserver_preload(PRELOADED)  # which "spawn" does not heed
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(lambda name: test(name, directory, timeout), names)))
    width = max(map(len, names))
    for name in names:
        reason = found[name]
        first = [other for other in NEEDS.get(name, []) if found.get(other)]
        if reason and first:
            reason = f"first mend {', '.join(first)}, which it uses"
        line = f"{name:{width}}  " + (f"failed: {reason}" if reason else "passed")
        print(" ".join(line.split("\n")).encode("ascii", "replace").decode())  # for any console
    passed = sum(reason is None for reason in found.values())
    print(f"{passed} of {len(names)} passed")
    return 0 if passed == len(names) else 1


# -------------------------------------------------------------------------------------- command line

def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    hand_out = commands.add_parser("blank", help="write a copy of the project with open exercises")
    hand_out.add_argument("names", nargs="+", metavar="NAME", choices=["all", *NAMES],
                          help="all, or some of: " + ", ".join(NAMES))
    hand_out.add_argument("--out", default="exercises", help="the copy's directory (default: %(default)s)")
    graded = commands.add_parser("grade", help="one line per exercise: passed, or the first property that failed")
    graded.add_argument("directory", type=Path, help="a copy")
    graded.add_argument("names", nargs="*", metavar="NAME", choices=["all", *NAMES], default="all",
                        help="what was handed out (default: %(default)s)")
    graded.add_argument("--timeout", type=float, default=60, help="seconds for an exercise (default: %(default)s)")
    options = parser.parse_args(argv)
    names = [name for name in NAMES if name in options.names or "all" in options.names]
    try:
        if options.command == "grade":
            if not (options.directory / "priors.py").exists():
                raise ValueError(f"{options.directory} holds no copy of the project")
            return grade(options.directory.resolve(), names, options.timeout)
        blank(names, Path(options.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {', '.join(names)}")
    print("To test them, in this directory: python -m pytest tests/test_exercises.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())

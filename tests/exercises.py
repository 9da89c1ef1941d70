"""The exercises of a course: hand them out and grade them.

    python tests/exercises.py blank smooth adjust            # or: blank all
    python tests/exercises.py blank all --no-formula --out homework
    python tests/exercises.py grade homework smooth adjust   # without names: all exercises

`blank` writes a copy of the project in which these functions raise NotImplementedError; some exercises are
answered in the copy's answers.py. `grade` prints one line per exercise, "passed" or the first property that
does not hold. It runs the tests that stand beside this file, whatever became of those in the directory, each
exercise in a process of its own.
"""

import argparse
import ast
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODULES = ["priors.py", "losses.py", "data.py", "models.py", "evaluate.py", "train.py"]
COPIED = [*MODULES, "README.md", "requirements.txt", "tests/exercises.py", "tests/test_exercises.py"]
HANDED_OUT = "exercises.txt"  # in a copy: the names of its exercises, for its student's own use
# each exercise is tested in a process of its own; on Linux a server forks it that has imported torch already
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PRELOADED = ["torch", "torchvision.datasets", "torchvision.transforms.v2", "pytest"]


class Exercise(NamedTuple):
    """Its properties in test_exercises.py bear its name, so that `pytest -k <name>` tests them."""
    name: str
    place: str  # module.function, module.Class.method or module.TABLE
    about: str  # the cell in the README's table


EXERCISES = [
    Exercise("alpha_schedule", "priors.alpha_schedule", "the schedule of alpha"),
    Exercise("smooth", "priors.smooth", "the smoothed target prior"),
    Exercise("imbalance_temperature", "priors.imbalance_temperature", "T from a KL divergence: which of the two?"),
    Exercise("adjust", "losses.adjust", "Bayes' rule under label shift"),
    Exercise("complementary_loss", "losses.complementary_loss", "CCR; when is its gradient zero?"),
    Exercise("weak", "data.weak", "pad, crop and flip a whole batch, each image by its own draws"),
    Exercise("reliability", "evaluate.reliability", "the bins behind ECE and MCE (Guo et al. 2017)"),
    Exercise("ema_update", "models.EMA.update", "the moving average of weights; buffers are copied"),
    Exercise("estimator_update", "priors.PriorEstimator.update", "the estimate of the unlabeled prior"),
    Exercise("half_life", "answers.half_life", "how long does that estimate remember a wrong start?"),
    Exercise("at_target", "answers.at_target", "a trained classifier at another prior: derive the log-ratio"),
    Exercise("temperature_of_counts", "answers.temperature_of_counts", "why T is 1 when all classes have one size"),
    Exercise("gradient_limit", "answers.gradient_limit", "what becomes of CCR's gradient as T grows?"),
    Exercise("own_method", "losses.METHODS", "a row of your own in the family of methods"),
]
NAMES = [exercise.name for exercise in EXERCISES]
NEEDS = {"complementary_loss": ["adjust"], "estimator_update": ["imbalance_temperature"]}  # what it calls
PLACES = {exercise.name: exercise.place for exercise in EXERCISES}

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
''',
}


# ------------------------------------------------------------------------------------------ hand out

def find(tree, path):
    """The node of a function "name" or a method "Class.name" in a module's syntax tree."""
    node = tree
    for name in path.split("."):
        node = next(n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    return node


def head(source, path):
    """The lines of a function before its docstring: decorators and signature, as the module has them."""
    node = find(ast.parse(source), path)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1:node.body[0].lineno - 1])


def empty(source, place):
    """A module's text with one function's body, docstring apart, replaced by NotImplementedError."""
    node, lines = find(ast.parse(source), place.partition(".")[2]), source.splitlines()
    body = node.body[0]
    start = body.end_lineno if ast.get_docstring(node) is not None else body.lineno - 1
    indent = " " * body.col_offset
    lines[start:node.end_lineno] = [f'{indent}raise NotImplementedError("{place} is yours to write")']
    return "\n".join(lines) + "\n"


# an assignment, a power, an exponential, a logarithm, or an equation that computes something
FORMULA = re.compile(r"<-|←|Σ|[^\d]\^|\b(exp|log) ?[(A-Z]| = .*(\b(sum|mean|max)_| · |\d [-+/*]|[-+/*] \d)", re.S)


def hide(text):
    """Replace each clause that holds a formula. A clause ends at . , : or ; outside of brackets."""
    depth, start, clauses = 0, 0, []
    for i, character in enumerate(text):
        depth = max(0, depth + (character in "([") - (character in ")]"))
        if character in ".,:;" and depth == 0 and text[i + 1:i + 2] in ("", " ", "\n"):
            clauses += [text[start:i], character]
            start = i + 1
    clauses.append(text[start:])
    for i, clause in enumerate(clauses):
        if FORMULA.search(clause):
            clauses[i] = clause.replace(clause.strip(), "[formula]")
    return "".join(clauses)


def hide_in_paragraph(text, indent):
    """An indented equation vanishes whole; of running text only the clauses that are formulas."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and FORMULA.search(text) and all(line.startswith(" " * (indent + 4)) for line in lines):
        return " " * (indent + 4) + "[formula]"
    return hide(text)


def without_formulas(source):
    """A module's text without the formulas in its docstrings and comments."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "#" + hide(token.string[1:])
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(
        node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None]
    for node in sorted(documented, key=lambda node: -node.body[0].lineno):  # from below, so that line numbers hold
        doc = node.body[0]
        before, text, after = "\n".join(lines[doc.lineno - 1:doc.end_lineno]).split('"""')
        paragraphs = re.split(r"(\n[ \t]*\n)", text)
        text = "".join(hide_in_paragraph(part, doc.col_offset) for part in paragraphs)
        lines[doc.lineno - 1:doc.end_lineno] = f'{before}"""{text}"""{after}'.splitlines()
    return "\n".join(lines) + "\n"


def blank(names, directory, formulas=True):
    """Write a copy of the project in which these exercises are open. ValueError where something is already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name another --out")
    (directory / "tests").mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if name == "README.md" and not formulas:
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if not formulas and name in MODULES:
            text = without_formulas(text)
        for exercise in names:
            place = PLACES[exercise]
            if place.startswith(name.removesuffix(".py") + ".") and exercise not in ANSWERS:
                text = empty(text, place)
        (directory / name).write_text(text, encoding="utf-8")
    answers = [ANSWERS[name] for name in names if name in ANSWERS]
    if answers:
        (directory / "answers.py").write_text("\n".join([ANSWERS[""], *answers]), encoding="utf-8")
    (directory / HANDED_OUT).write_text("\n".join(names) + "\n", encoding="utf-8")


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

def table():
    """The README's table of exercises, Markdown: a row per module."""
    lines = ["| write in | NAME: what it is about |", "| --- | --- |"]
    for module in dict.fromkeys(place.partition(".")[0] for place in PLACES.values()):
        inside = [f"`{name}`: {about}" for name, place, about in EXERCISES if place.startswith(f"{module}.")]
        lines.append(f"| `{module}.py` | {'; '.join(inside)} |")
    return "\n".join(lines)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    hand_out = commands.add_parser("blank", help="write a copy of the project with open exercises")
    hand_out.add_argument("names", nargs="+", metavar="NAME", choices=["all", *NAMES],
                          help="all, or some of: " + ", ".join(NAMES))
    hand_out.add_argument("--no-formula", action="store_true", help="without the README and the formulas in docstrings")
    hand_out.add_argument("--out", default="exercises", help="the copy's directory (default: %(default)s)")
    graded = commands.add_parser("grade", help="one line per exercise: passed, or the first property that failed")
    graded.add_argument("directory", type=Path, help="a copy")
    graded.add_argument("names", nargs="*", metavar="NAME", help="what was handed out (default: all)")
    graded.add_argument("--timeout", type=float, default=60, help="seconds for an exercise (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.command == "grade":
            if not (options.directory / "priors.py").exists():
                raise ValueError(f"{options.directory} holds no copy of the project")
            unknown = [name for name in options.names if name not in NAMES]
            if unknown:
                raise ValueError(f"no exercise {unknown[0]}: {', '.join(NAMES)}")
            return grade(options.directory.resolve(), options.names or NAMES, options.timeout)
        names = [name for name in NAMES if name in options.names or "all" in options.names]
        blank(names, Path(options.out), not options.no_formula)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {', '.join(names)}")
    print("To test them, in this directory: python -m pytest tests/test_exercises.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())

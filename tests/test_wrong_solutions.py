"""The tests of the exercises, tested: each wrong version of a function must fail its own exercise's test, and right
ones that are written otherwise must pass.

A version is a body below the module's own signature, or pairs (old, new, ...), edits of the first right version or of
its signature. The last entry of a wrong version stands in the message that the student gets. What several exercises ask
in the same words is tried in one of them.
"""

import ast
import importlib
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import exercises
import test_exercises
from losses import METHODS, Method

RIGHT = {}  # exercise: [body or (old, new, ...)]
WRONG = {}  # exercise: [(body, part of the message) or (old, new, ..., part of the message)]

RIGHT["alpha_schedule"] = [
    "return 1 - (1 - alpha_min) * (step / total_steps) ** d",
    "return alpha_min + (1 - alpha_min) * (1 - (step / total_steps) ** d)",
    ("step /", "torch.tensor(step, dtype=torch.float64) /")]
WRONG["alpha_schedule"] = [
    ("** d", "** 2", "d is the exponent"),
    ("(1 - alpha_min)", "0.9", "alpha_min is given"),
    ("return max(alpha_min, 1 - (step / total_steps) ** d)", "not cut the curve off"),
    ("1 - (1", "alpha_min + (1", "alpha is 1 at step 0"),
    ("step / total_steps", "int(100 * step / total_steps) / 100", "falls at every step"),
    ("d=2.0", "d=1.0", "the paper's"),
    ("return", "alpha =", "one number")]

RIGHT["smooth"] = [
    "p = q ** alpha\nreturn p / p.sum()",
    "return q ** 0 / len(q) if alpha == 0 else (alpha * q.log()).softmax(0)",
    ("q ** alpha", "torch.empty_like(q)\nfor k in range(len(q)):\n    p[k] = q[k] ** alpha"),
    "powers = [x ** alpha for x in q]\nreturn torch.stack([x / sum(powers) for x in powers])",
    "p = q.cpu().numpy() ** float(alpha)\nreturn torch.from_numpy(p / p.sum()).to(q)",
    ("p / p.sum()", "(p / p.sum())[torch.arange(len(q))]"),  # an index may lie on the CPU
    "p = q.numpy() ** alpha\nreturn torch.from_numpy(p / p.sum())",  # numpy refuses a GPU's itself
]
WRONG["smooth"] = [
    (" / p.sum()", "", "sums to 1"),
    ("return (alpha * q).softmax(0)", "alpha = 1 keeps"),
    ("return (q.log() / max(alpha, 1e-9)).softmax(0)", "alpha = 0 gives"),
    ("return alpha * q + (1 - alpha) / len(q)", "every ratio"),
    ("q ** alpha", "q.pow_(alpha)", "arguments are the same"),
    ("q ** alpha", "(q + 1e-9) ** alpha", "rare class"),
    ("q ** alpha", "q.double() ** alpha", "float32 in"),
    ("q ** alpha", "torch.zeros(len(q), dtype=q.dtype) + q ** alpha", "device"),
    ("p / p.sum()", "torch.tensor((p / p.sum()).tolist(), dtype=q.dtype)", "GPU"),
    ("p / p.sum()", "torch.from_numpy((p / p.sum()).cpu().numpy())", "GPU"),
    ("p / p.sum()", "(p / p.sum()).tolist()", "a tensor of K numbers")]

RIGHT["imbalance_temperature"] = [
    "u = torch.full_like(q_hat, 1 / len(q_hat))\nreturn (u * (u / q_hat).log()).sum().exp()",
    "return (-q_hat.log().mean()).exp() / len(q_hat)",
    "total = sum(math.log(1 / len(q_hat) / q) / len(q_hat) for q in q_hat.tolist())\n"
    "return torch.tensor(math.exp(total), dtype=q_hat.dtype, device=q_hat.device)",
    "return torch.tensor(np.exp(-np.log(q_hat.numpy() * len(q_hat)).mean()), dtype=q_hat.dtype)"]
WRONG["imbalance_temperature"] = [
    ("u * (u / q_hat)", "q_hat * (q_hat / u)", "direction"),
    (".sum().exp()", ".exp().sum()", "T is 1 at a uniform prior"),
    (".exp()", " + 1", "T is 1.25"),
    ("u / q_hat", "q_hat / u", "at least 1"),
    ("return (1 / q_hat).mean() * q_hat.log().mean().exp()", "T is 5/3"),
    ("u / q_hat", "u / q_hat.clamp(min=1e-6)", "rare class"),
    (".exp()", ".exp().item()", "a tensor without dimensions"),
    ("len(q_hat))\n", "len(q_hat), dtype=torch.float32)\n", "dtype")]

RIGHT["adjust"] = [
    """
if source is None:
    return logits
return logits + ((source + 1e-9) / (target + 1e-9)).log()""",
    ("((source + 1e-9) / (target + 1e-9)).log()", "torch.log(source + 1e-9) - torch.log(target + 1e-9)"),
    """
if source is None:
    return logits
priors = zip(source.tolist(), target.tolist())
columns = [logits[:, k] + math.log((s + 1e-9) / (t + 1e-9)) for k, (s, t) in enumerate(priors)]
return torch.stack(columns, dim=1)""",
    ("return logits +", "out = logits.clone()\nout +=", ".log()", ".log()\nreturn out", "1e-9", "EPS")]
WRONG["adjust"] = [
    ("logits + ", "logits - ", "check the sign"),
    (" + 1e-9", "", "stays finite"),
    ("1e-9", "1e-8", "1e-9 is added"),
    ("return logits\n", "return\n", "None"),
    ("return logits\n", "return logits - logits.mean(1, keepdim=True)\n", "without priors, None"),
    ("logits + ", "logits.detach() + ", "detached"),
    ("logits + ", "logits.log_softmax(1) + ", "not normalised"),
    ("(target + 1e-9)", "(target.float() + 1e-9)", "no float32"),
    ("logits + ", "2 * logits - logits.detach() + ", "gradient reaches"),
    ("logits + ", "torch.stack([*logits]) + ", "may be empty")]

LABEL = "F.softmax(probs_weak.detach().log() / temperature, dim=1)"
RIGHT["complementary_loss"] = [
    f"""
p = {LABEL}
q = F.log_softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, dim=1)
return ((1 - mask) * -(p * q).sum(dim=1)).mean()""",
    ("q =", "p = probs_weak.detach() ** (1 / temperature)\np = p / p.sum(1, keepdim=True)\nq ="),
    ("F.log_softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, dim=1)",
     "adjust(logits_strong, q_hat, q_alpha) / temperature",
     "-(p * q).sum(dim=1)", "F.cross_entropy(q, p, reduction='none')"),
    ("return ((1 - mask) * -(p * q).sum(dim=1)).mean()", """
total = 0 * q.sum()
for i in range(len(mask)):
    if mask[i] == 0:
        total = total - (p[i] * q[i]).sum()
return total / len(mask)"""),
    (".log()", ".add(1e-12).log()")]
WRONG["complementary_loss"] = [
    ("p = F", "temperature = int(temperature)\np = F", "whole number"),
    ("adjust(logits_strong, q_hat, q_alpha) / temperature",
     "adjust(logits_strong / temperature, q_hat, q_alpha)", "before the division"),
    (".detach()", "", "detach it"),
    ("adjust(logits_strong,", "adjust(logits_strong.detach(),", "not detached"),
    ("-(p * q)", "(torch.xlogy(p, p) - p * q)", "KL divergence"),
    ("1 - mask", "mask", "masked"),
    (".mean()", ".sum() / (1 - mask).sum().clamp(min=1)", "the whole batch"),
    (".mean()", "", "one number"),
    (LABEL, "probs_weak.detach()", "softened"),
    (LABEL, "probs_weak.detach() ** (1 / temperature)", "normalised"),
    ("(p * q)", "(p * q.exp().log())", "large logits"),
    (".mean()", ".mean() * temperature ** 2", "T squared"),
    ("(p * q)", "(p * q + 0 * probs_weak.log())", "exactly 0"),
    (".detach()", ".detach().clamp(min=1e-6)", "not clamped"),
    ("q_alpha) /", "None if q_hat is None else 0 * q_hat + 0.5) /", "like equal priors"),
    ("adjust(logits_strong,", "adjust(logits_strong.float().to(probs_weak),", "gradient is zero"),
    ("p = F", "temperature = temperature if isinstance(temperature, float) else math.nan\np = F",
     "a tensor without dimensions")]

RIGHT["weak"] = [
    """
size = images.shape[-1]
pad = size // 8
padded = F.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
views = []
for image, draw in zip(padded, draws):
    y = int(draw[0] * (2 * pad + 1))
    x = int(draw[1] * (2 * pad + 1))
    view = image[:, y:y + size, x:x + size]
    if draw[2] < 0.5:
        view = view.flip(2)
    views.append(view)
return torch.stack(views) if views else images.clone()""",
    ("zip(padded, draws)", "zip(padded, draws[:, [1, 0, 2]])"),
    ("< 0.5", ">= 0.5"),
    ("y = ", "y = 2 * pad - "),
    ("size =", "flip = draws[:, 2].view(-1, 1, 1, 1) < 0.5\n"
     "images = torch.where(flip, images.flip(3), images)\nsize =", "draw[2] < 0.5", "False")]
WRONG["weak"] = [
    ("size // 8", "size // 4", "pad"),
    ("size // 8", "-(-size // 8)", "rounded down"),
    (', mode="reflect"', "", "not black"),
    ('F.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)',
     "torch.from_numpy(np.pad(images.numpy(), [(0, 0)] * 2 + [(pad, pad)] * 2, 'symmetric'))",
     "row -1 is row 1"),
    ("* (2 * pad + 1)", "* 2 * pad", "last one included"),
    ("* (2 * pad + 1)", "* 2 * pad + 0.5", "equally"),
    ("draw[1]", "draw[0]", "independently"),
    ("< 0.5", "< 0.25", "half of the draws"),
    ("flip(2)", "flip(0)", "channels together"),
    ("flip(2)", "flip((1, 2))", "it is not turned"),
    ("views = []", "views = []\ndraws = torch.rand(len(images), 3)", "all chance comes from"),
    ("torch.stack(views)", "torch.stack(views).float()", "uint8"),
    ("torch.stack(views)", "torch.stack(views).flip(0)", "view i is image i"),
    ("draw[1]", "(1 - draw[1])", "one beyond"),
    ("draw[1] * (2 * pad + 1)", "(draw[1] + 1e-6) * (2 * pad + 1) % (2 * pad + 1)", "one beyond"),
    (" if views else images.clone()", "", "may be empty")]

RIGHT["reliability"] = [
    """
if not 0 < len(labels) == len(probs) or not probs.isfinite().all():
    raise ValueError
if labels.min() < 0 or labels.max() >= probs.shape[1]:
    raise ValueError
confidence = probs.amax(1)
right = (probs.argmax(1) == labels).double()
table = torch.zeros(num_bins, 3, dtype=torch.float64)
for b in range(num_bins):
    mine = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
    mine |= (b == 0) & (confidence == 0)
    if mine.any():
        columns = mine.double(), right[mine], confidence[mine]
        table[b] = torch.stack([column.mean() for column in columns])
return table""",
    ("""
for b in range(num_bins):
    mine = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
    mine |= (b == 0) & (confidence == 0)
    if mine.any():
        columns = mine.double(), right[mine], confidence[mine]
        table[b] = torch.stack([column.mean() for column in columns])
return table""", """
for p, label in zip(probs.tolist(), labels.tolist()):
    row = table[max(0, math.ceil(max(p) * num_bins) - 1)]
    row += torch.tensor([1, p.index(max(p)) == label, max(p)], dtype=torch.float64)
table[:, 1:] /= table[:, :1].clamp(min=1)
table[:, 0] /= len(labels)
return table""")]
WRONG["reliability"] = [
    ("right[mine], confidence[mine]", "confidence[mine], right[mine]", "the columns are share"),
    ("confidence[mine]\n", "confidence[mine].median() + 0 * confidence[mine]\n", "means over the samples"),
    ("if mine.any():", "if True:", "not NaN"),
    ("(b == 0) & (confidence == 0)", "False", "confidence of 0"),
    ("confidence > b", "confidence >= b", "confidence <=", "confidence <",
     "(b == 0) & (confidence == 0)", "(b + 1 == num_bins) & (confidence == 1)", "(lower, upper]"),
    ("table = ", "num_bins = 15\ntable = ", "row for each bin"),
    ("num_bins=15", "num_bins=10", "15 bins"),
    ("probs.amax(1)", "probs[torch.arange(len(labels)), labels]", "true class"),
    ("probs.argmax(1) == labels", "labels == 0", "a sample is right where"),
    ("3, dtype=torch.float64", "3", "no float32"),
    ("raise ValueError", "pass", "ValueError")]

RIGHT["ema_update"] = [
    """
for a, b in zip(self.model.parameters(), model.parameters()):
    a.mul_(self.decay).add_(b, alpha=1 - self.decay)
for a, b in zip(self.model.buffers(), model.buffers()):
    a.copy_(b)""",
    ("@torch.no_grad()\n", "", "a.mul_", "a.data.mul_", "add_(b,", "add_(b.data,"),
    """
new, own = model.state_dict(), dict(self.model.named_parameters())
for name, a in self.model.state_dict().items():
    a.copy_(self.decay * a + (1 - self.decay) * new[name] if name in own else new[name])""",
    """
new = {name: value.clone() for name, value in model.state_dict().items()}
for name, a in self.model.named_parameters():
    new[name] = self.decay * a + (1 - self.decay) * new[name]
self.model.load_state_dict(new)""",
    ("a.mul_(self.decay).add_(b, alpha=1 - self.decay)", "a.data = self.decay * a.data + (1 - self.decay) * b.data")]
WRONG["ema_update"] = [
    (", alpha=1 - self.decay", "", "keeps `decay` of itself"),
    ("self.decay", "0.9", "given to EMA"),
    ("    a.mul_", "    if a.ndim > 1: a.mul_", "biases"),
    ("    a.mul_", "    if b.requires_grad: a.mul_", "frozen"),
    ("    a.copy_", "    if a.is_floating_point(): a.copy_", "counter"),
    ("""
for name, a in self.model.state_dict().items():
    a.copy_(self.decay * a + (1 - self.decay) * model.state_dict()[name])""", "not averaged"),
    ("a.copy_(b)", "a.data = b.data", "do not share"),
    ("a.copy_(b)", "a.copy_(b)\nfor m in self.model:\n    m.weight = torch.nn.Parameter("
     "m.weight.detach().clone(), requires_grad=False)", "written in place"),
    ("for a, b in zip(self.model.p", "model.eval()\nfor a, b in zip(self.model.p", "training mode"),
    ("a.copy_(b)", "a.copy_(b)\nself.model.train()", "evaluation mode"),
    ("@torch.no_grad()\n", "", "no_grad"),
    ("a.mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "a.data = (self.decay * a + (1 - self.decay) * b).cpu()", "GPU")]

RIGHT["estimator_update"] = [
    """
self.q_hat.mul_(self.momentum).add_(probs.mean(dim=0), alpha=1 - self.momentum)
if first_ccr_step:
    self.temperature.copy_(imbalance_temperature(self.q_hat))""",
    """
self.q_hat = self.momentum * self.q_hat + (1 - self.momentum) * probs.mean(0)
if first_ccr_step:
    self.temperature = imbalance_temperature(self.q_hat)""",
    ("probs.mean(dim=0)", "torch.stack([p.sum() / len(probs) for p in probs.unbind(1)])"),
    ("@torch.no_grad()\n", "", "probs.mean", "probs.detach().mean")]
WRONG["estimator_update"] = [
    (", alpha=1 - self.momentum", "", "a part of the estimate stays"),
    ("self.q_hat.mul_", "sure = probs[probs.amax(1) > 0.59]\nprobs = sure if len(sure) else probs\n"
     "self.q_hat.mul_", "no threshold"),
    ("if first_ccr_step:", "if True:", "not touched"),
    ("if first_ccr_step:", "self.on = getattr(self, 'on', False) or first_ccr_step\nif self.on:", "stays as it is"),
    ("self.q_hat.mul_", "before = self.q_hat.clone()\nself.q_hat.mul_",
     "imbalance_temperature(self.q_hat)", "imbalance_temperature(before)", "after its update"),
    ("self.q_hat.mul_", "if self.temperature != 1:\n    return\nself.q_hat.mul_", "Qhat moves at every step"),
    ("@torch.no_grad()\n", "", "self.q_hat.mul_(", "self.q_hat = self.q_hat.mul(", "no gradient flows"),
    ("if first", "q = self.q_hat\ndel self.q_hat\nself.__dict__['q_hat'] = q\nif first", "buffers"),
    ("if first", "self.q_hat.clamp_(min=1e-6)\nif first", "nothing is clamped"),
    ("(self.q_hat))", "(self.q_hat).clamp(max=2))", "no bound"),
    ("probs.mean(dim=0)", "torch.tensor(probs.mean(dim=0).tolist())", "GPU"),
    ("self.momentum", "min(self.momentum, 0.99)", "given to the estimator")]

RIGHT["half_life"] = [
    "return math.log(0.5) / math.log(momentum)",
    "n = 0\nleft = 1.0\nwhile left > 0.5:\n    left *= momentum\n    n += 1\nreturn n",
    "return round(math.log(0.5) / math.log(momentum), 2)",
    "return torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(momentum))"]
WRONG["half_life"] = [
    ("return 1 / (1 - momentum)", "a third"),
    ("0.5", "2", "is positive"),
    ("return", "n =", "number of updates comes out"),
    ("return round(math.log(2) / (1 - momentum))", "does not leave a half"),
    ("return math.ceil(math.log(0.5) / math.log(momentum)) + 1", "off by one")]

RIGHT["at_target"] = [
    "return logits - (source / target).log()",
    "p = logits.softmax(1) * target / source\nreturn (p / p.sum(1, keepdim=True)).log()",
    "from losses import adjust\nreturn adjust(logits, target, source)"]
WRONG["at_target"] = [
    ("logits - ", "logits + ", "the sign"),
    ("p = logits.softmax(1) * target / source\nreturn p / p.sum(1, keepdim=True)", "logits go in"),
    ("return logits", "square = len(logits) == len(source)\n"
     "return (logits.T - (source / target).log()).T if square else logits", "class k"),
    ("(source / target)", "(source / target).clamp(0.01, 100)", "far apart"),
    ("return logits - ", "logits -= ", ".log()", ".log()\nreturn logits", "in-place"),
    ("logits - ", "logits[0] - ", "(N, K) in")]

RIGHT["temperature_of_counts"] = [
    "geometric = math.exp(sum(math.log(n) for n in counts) / len(counts))\n"
    "return sum(counts) / len(counts) / geometric",
    "n = torch.tensor(counts).double()\nreturn (n.mean() / n.log().mean().exp()).item()"]
WRONG["temperature_of_counts"] = [
    ("/ geometric", "/ math.prod(map(float, counts)) ** (1 / len(counts))", "without it"),
    ("/ geometric", "/ len(counts) * sum(1 / n for n in counts)", "one of the means is 10/3"),
    ("return sum(counts) / len(counts)", "equal means"),
    ("geometric =", "counts.sort()\ngeometric =", "caller's list")]

RIGHT["gradient_limit"] = [
    "d = logits - probs.log()\nreturn 2, (d - d.mean()) / len(d)",
    """
K = len(logits)
d = [f - math.log(p) for f, p in zip(logits.tolist(), probs.tolist())]
return 2, [(x - sum(d) / K) / K for x in d]""",
    "d = (logits - probs.log()).numpy()\nreturn d.dtype.type(2), (d - d.mean()) / d.size"]
WRONG["gradient_limit"] = [
    ("return 2,", "return 1,", "where n is too small"),
    (" - d.mean()", "", "sums to 0"),
    (" / len(d)", "", "not that of"),
    ("(d - d.mean())", "(d.mean() - d)", "the sign"),
    ("T = 1e5\nreturn 2, T * ((logits / T).softmax(0) - (probs.log() / T).softmax(0))", "exact"),
    ("return 2, (d - d.mean()) / len(d)", "return (d - d.mean()) / len(d), 2", "n comes first"),
    ("d = logits - probs.log()", "d = logits\nd -= probs.log()", "arguments")]

# own_method: rows in place of bodies
RIGHT["own_method"] = [
    "{'udal-ccr': Method('p_labeled', 'rest')}",
    "{'oracle-without': Method('q_true', None), 'la': Method('p_labeled', None, unlabeled=False)}"]
WRONG["own_method"] = [
    ("{}", "no row of your own"),
    ("{'mine': Method('q_hat', None)}", "mine is flexda"),
    ("{'mine': Method('q_labeled', 'rest')}", "a prior that a step knows"),
    ("{'mine': Method('p_labeled', True)}", "'rest' or 'all'"),
    ("{'mine': ('p_labeled', 'rest', True)}", "to a Method"),
    ("{'udal': Method('p_labeled', 'rest')}", "unchanged"),
    ("{'mine': Method('q_hat', 'rest', 'yes')}", "True or False"),
    ("{'mine': Method('q_hat', 'rest', False)}", "CCR needs")]


# ------------------------------------------------------------------------------------------ the tests

def signature(place):
    """The lines of a function before its docstring, decorators included."""
    module, _, path = place.partition(".")
    if module == "answers":
        source = exercises.ANSWERS[path]
    else:
        source = (exercises.ROOT / f"{module}.py").read_text(encoding="utf-8")
    node = exercises.find(ast.parse(source), path)
    first = min([node, *node.decorator_list], key=lambda part: part.lineno)
    return textwrap.dedent("\n".join(source.splitlines()[first.lineno - 1:node.body[0].lineno - 1]))


def version(name, *change):
    """What an exercise's tests take as their argument, with a version of the function in it."""
    module, _, path = exercises.PLACES[name].partition(".")
    if name == "own_method":
        return METHODS | eval(*change, {"Method": Method})
    head = signature(exercises.PLACES[name])
    body = RIGHT[name][0]
    if len(change) == 1:
        body = change[0]
    else:
        for old, new in zip(change[::2], change[1::2], strict=True):
            assert old in head or old in body, f"{name}: no {old!r} to edit"
            head = head.replace(old, new)
            body = body.replace(old, new)
    space = {"torch": torch, "math": math, "np": np, "F": torch.nn.functional}
    if module != "answers":
        space |= vars(importlib.import_module(module))
    exec(head + "\n" + textwrap.indent(body, "    "), space)
    owner, _, function = path.rpartition(".")
    if owner:
        return type(owner, (space[owner],), {function: space[function]})
    return space[function]


def first_failure(name, *change):
    """What the first property that does not hold says, or None."""
    subject = version(name, *change)
    return test_exercises.first_failure(test_exercises.PROPERTIES[name], lambda: subject)


@pytest.mark.parametrize("name", exercises.NAMES)
def test_every_wrong_version_is_caught_with_the_sentence_that_it_needs(name):
    for *change, says in WRONG[name]:
        found = first_failure(name, *change)
        assert found is not None, f"{change} passes"
        assert says in found, f"{change}: {found!r} does not say {says!r}"


@pytest.mark.parametrize("name", exercises.NAMES)
def test_right_versions_that_are_written_otherwise_pass(name):
    for change in RIGHT[name]:
        found = first_failure(name, *([change] if isinstance(change, str) else change))
        assert found is None, f"{change}: {found}"


def test_a_name_selects_the_properties_of_its_own_exercise_alone():
    """`pytest -k name` takes every test whose name holds it."""
    assert list(test_exercises.PROPERTIES) == exercises.NAMES
    for name, rows in test_exercises.PROPERTIES.items():
        for sentence, _ in rows:
            assert [other for other in exercises.NAMES if other in f"{name}: {sentence}".lower()] == [name], sentence


def test_the_readme_says_where_each_exercise_is_written():
    readme = (exercises.ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| (`\w+`: .*) \|$", readme, re.MULTILINE)
    found = {name: module for module, cell in rows for name in re.findall(r"`(\w+)`: ", cell)}
    assert found == {name: place.partition(".")[0] for name, place in exercises.PLACES.items()}


# ------------------------------------------------------------------------------------------- the tool

def solve(directory, bodies):
    """Write bodies, by exercise, into the open functions of a copy."""
    for name, body in bodies.items():
        place = exercises.PLACES[name]
        path = directory / f"{place.partition('.')[0]}.py"
        text = path.read_text(encoding="utf-8")
        if name == "own_method":
            text = text.replace("METHODS = {", "METHODS = {\n    " + body.strip("{}") + ",")
        else:
            line = next(line for line in text.splitlines() if f'"{place} is yours to write"' in line)
            text = text.replace(line, textwrap.indent("import torch.nn.functional as F\n" + body,
                                                      line[:len(line) - len(line.lstrip())]))
        path.write_text(text, encoding="utf-8")


def graded(capfd, *arguments):
    """What `grade` prints: {exercise: "passed" or "failed: ..."}, the last line, the exit status."""
    status = exercises.main(["grade", *map(str, arguments)])
    *lines, last = capfd.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines), last, status


def test_a_copy_has_open_exercises_and_no_solutions(tmp_path, capsys):
    """The bodies of its open functions are gone; nothing else differs or is copied."""
    copy = tmp_path / "copy"
    assert exercises.main(["blank", "smooth", "adjust", "--out", str(copy)]) == 0
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*.*")} == {*exercises.COPIED}
    gone = {"priors.py": ["    powered = q ** alpha", "    return powered / powered.sum()"],
            "losses.py": ["    if source is None and target is None:", "        return logits",
                          "    return logits + torch.log((source + EPS) / (target + EPS))"]}
    new = {"priors.py": ['    raise NotImplementedError("priors.smooth is yours to write")'],
           "losses.py": ['    raise NotImplementedError("losses.adjust is yours to write")']}
    for file in exercises.COPIED:
        own, copied = ((root / file).read_text(encoding="utf-8").splitlines() for root in (exercises.ROOT, copy))
        assert [line for line in own if line not in copied] == gone.get(file, [])
        assert [line for line in copied if line not in own] == new.get(file, [])
    assert exercises.main(["blank", "all", "--out", str(copy)]) == 2  # it is not empty any more
    assert "not empty" in capsys.readouterr().err


def test_no_file_that_is_copied_gives_an_answer_away(tmp_path):
    """Outside of its own function an answer stands nowhere: not in a test, a message or a helper."""
    exercises.blank(exercises.NAMES, tmp_path)
    for path in tmp_path.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for answer in ("math.log(m", "log(0.5)", "log(2)", "lerp", "1 - self.decay", "1 - decay", "1.0 - self.momentum",
                       "imbalance_temperature(self", "log(source", "log_softmax(adj", ".detach().log()",
                       "arithmetic mean", "geometric mean", "d.mean()"):
            assert answer not in text, f"{path.name}: {answer}"


def test_a_solved_copy_passes(tmp_path, capfd):
    """An exercise of each module, and own_method."""
    names = ["smooth", "adjust", "weak", "reliability", "ema_update", "half_life", "own_method"]
    exercises.blank(exercises.NAMES, tmp_path)
    solve(tmp_path, {name: RIGHT[name][0] for name in exercises.NAMES})
    found, last, status = graded(capfd, tmp_path, *names)
    assert status == 0 and last == f"{len(names)} of {len(names)} passed", found


def test_the_grader_says_what_was_handed_out_not_the_copy(tmp_path, capfd):
    exercises.blank(["smooth", "adjust", "complementary_loss"], tmp_path)
    solve(tmp_path, {name: RIGHT[name][0] for name in ("smooth", "complementary_loss")})
    found, last, status = graded(capfd, tmp_path, "smooth", "adjust", "complementary_loss")
    assert found == {"smooth": "passed", "adjust": "failed: losses.adjust is yours to write",
                     "complementary_loss": "failed: first mend adjust, which it uses"}
    assert (last, status) == ("1 of 3 passed", 1)
    assert list(graded(capfd, tmp_path)[0]) == exercises.NAMES, "without names, all"


TRICKS = {  # exercise: (a body, what the grade says); none may pass, or stop the others
    "alpha_schedule": ("while True:\n    pass", "no end within 2 seconds"),
    "smooth": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "adjust": ("import os\nos._exit(0)", "Python stopped before"),
    "weak": ("import pytest\npytest.skip('no')", "Skipped: no"),
    "reliability": ("return (", "SyntaxError"),
    "half_life": ("import test_exercises\ntest_exercises.close = lambda *a: True\nreturn momentum * 10",
                  "changes the tests"),
    "at_target": ("import sys\nsys.modules['test_exercises'].PROPERTIES.clear()\nreturn logits", "is the posterior"),
    "temperature_of_counts": ("import test_exercises\ntest_exercises.close.__code__ = (lambda *a: True).__code__\n"
                              "return 1.0", "changes the tests"),
    "gradient_limit": ("torch.Tensor.__le__ = lambda *a: torch.tensor(True)\nreturn 2, 0 * logits",
                       "changes the tests")}


def test_no_trick_passes_or_stops_the_grading(tmp_path, capfd):
    exercises.blank([*TRICKS, "ema_update"], tmp_path)
    solve(tmp_path, {name: body for name, (body, _) in TRICKS.items()})
    solve(tmp_path, {"ema_update": RIGHT["ema_update"][0]})
    found = graded(capfd, tmp_path, "alpha_schedule", "--timeout", 2)[0]
    found |= graded(capfd, tmp_path, *[name for name in TRICKS if name != "alpha_schedule"], "ema_update")[0]
    assert found.pop("ema_update") == "passed"
    for name, (_, says) in TRICKS.items():
        assert found[name].startswith("failed: ") and says in found[name], f"{name}: {found[name]}"


def test_the_summary_of_a_failure_holds_the_whole_sentence(tmp_path):
    exercises.blank(["smooth"], tmp_path)
    solve(tmp_path, {"smooth": "return q ** alpha"})
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_exercises.py", "-k", "smooth"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", "ADELLO_EXERCISES": ""})
    line = next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert "the target prior sums to 1: normalise after the power" in line

"""The exercises of the course, a table of properties each: `python -m pytest tests/test_exercises.py -k smooth`.

A property is a sentence, what a student reads where it does not hold, and a function of what the student wrote that
says whether it does. Expected values were worked out by hand and stand here as numbers, so that no line gives an
answer away. Only the module of the exercise is imported. ADELLO_EXERCISES names another directory whose modules
are tested (see exercises.py).
"""

import functools
import importlib
import math
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(os.environ.get("ADELLO_EXERCISES") or Path(__file__).resolve().parent.parent)
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import exercises

PROPERTIES = {}  # exercise: ((sentence, whether it holds), ...), the first that fails is what the student reads


# ------------------------------------------------------------------------------------------- helpers

def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def numbers(found):
    """What a student may return as numbers, in float64: tensors, arrays, lists, floats of any type; else None."""
    if torch.is_tensor(found):
        return found.detach().double() if type(found) in (torch.Tensor, torch.nn.Parameter) else None
    try:
        return None if found is None or isinstance(found, str) else torch.as_tensor(np.asarray(found, dtype=np.float64))
    except (TypeError, ValueError):
        return None


def close(found, expected, tolerance=1e-6):
    """Same shape, and every number equal up to a tolerance relative to the larger of itself and 1."""
    found = numbers(found)
    expected = numbers(expected)
    if found is None or found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all())


def number(found):
    """A single finite number, or NaN."""
    found = numbers(found)
    return found.item() if found is not None and found.ndim == 0 else math.nan


def tensors(value):
    """All tensors in an argument or a result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in tensors(part)]
    return [value] if torch.is_tensor(value) else []


def on_cpu(tensor):
    return getattr(tensor, "on_cpu", False)


class AnotherDevice(TorchFunctionMode):
    """Inside it tensors are a GPU's, but those made without a device: they mix with no others."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        given = tensors([args, kwargs])
        if name in ("numpy", "__array__") and not on_cpu(args[0]):
            raise TypeError("can't convert a GPU's tensor to numpy")
        found = function(*args, **kwargs)
        if name == "cpu":
            found, cpu = found.clone(), True
        elif "device" in kwargs or name == "tensor" or not given:
            cpu = not isinstance(kwargs.get("device"), torch.device)
        elif name in ("__getitem__", "__setitem__", "copy_"):  # these take the CPU's, too
            cpu = on_cpu(args[0])
        elif name == "__set__":  # x.data = y
            args[0].on_cpu = cpu = on_cpu(given[-1])
        elif name in ("to", "type_as") and (len(given) > 1 or torch.device in map(type, args)):
            cpu = False
        else:
            cpu = all(map(on_cpu, given))
            if not cpu and any(x.ndim and on_cpu(x) for x in given):
                raise RuntimeError("the CPU's tensors and a GPU's meet")
        for x in tensors([found]):
            x.on_cpu = cpu
        return found


def stays(function, *arguments):
    """Whether a call on another device ends there. A number may lie anywhere; numpy says so itself."""
    with AnotherDevice(), mock.patch.object(torch, "from_numpy", torch.as_tensor):  # a mode sees it
        try:
            found = function(*arguments)
        except TypeError as error:
            return "numpy" in str(error)
    return all(not on_cpu(x) or x.ndim == 0 for x in tensors([found]))


def keeps(function, *arguments):
    """Whether a call leaves its arguments as they are: same values, never written to."""
    before = [(x, x.detach().clone(), x._version) for x in arguments if torch.is_tensor(x)]
    function(*arguments)
    return all(torch.equal(x, copy) and x._version == version for x, copy, version in before)


def function_of_tensors(calls, shape, sentence, *rows, as_given=True):
    """The rows of an exercise, before and after them what holds of every function of tensors.

    calls: () to a list of argument tuples, fresh each time, K = 2 and an empty batch among them; shape: arguments to
    the result's, which `sentence` says; as_given: the result has the dtype and the device of the first argument.
    """
    def returns(f, some, dtype):
        for arguments in some:
            arguments = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
            found = f(*arguments)
            if not (type(found) is torch.Tensor and tuple(found.shape) == tuple(shape(arguments))
                    and (found.dtype == arguments[0].dtype or not as_given)):
                return False
        return True
    table = [
        (sentence, lambda f: returns(f, [c for c in calls() if len(c[0])], torch.float64)),
        ("the arguments are the same after the call: no in-place operation on them, no sorting, no clearing",
         lambda f: all(keeps(f, *arguments) for arguments in calls() if len(arguments[0]))),
        *rows]
    if any(len(arguments[0]) == 0 for arguments in calls()):
        table.append(("a batch may be empty, of no images at all: (0, ...) in, (0, ...) out",
                      lambda f: returns(f, calls(), torch.float64)))
    if as_given and calls()[0][0].is_floating_point():
        table.append(("float32 in, float32 out; float64 in, float64 out",
                      lambda f: returns(f, calls()[:1], torch.float32)))
    if as_given:
        table.append(("on a GPU its result is on the GPU: what you make lies on the device of the arguments",
                      lambda f: all(stays(f, *arguments) for arguments in calls())))
    return tuple(table)


# ------------------------------------------------------------------------------------ alpha_schedule

PROPERTIES["alpha_schedule"] = (
    ("alpha is one number", lambda f: not math.isnan(number(f(0, 1000, 0.1, 2.0)))),
    ("alpha is 1 at step 0: the target is Qhat itself",
     lambda f: all(close(f(0, 1000, low, d), 1) for low, d in ((0.1, 2.0), (0.55, 1.5), (0.0, 1.0)))),
    ("alpha is alpha_min, whatever alpha_min is given, when step = total_steps",
     lambda f: all(close(f(1000, 1000, low, 2.0), low) for low in (0.1, 0.55, 0.0, 1.0))),
    ("alpha_min scales the whole fall, it does not cut the curve off",
     lambda f: all(close(f(500, 1000, low, 2.0), alpha) for low, alpha in ((0.6, 0.9), (0.2, 0.8), (1.0, 1.0)))),
    ("alpha_min and d need not be given: the paper's are the defaults, and alpha is 0.775 half way",
     lambda f: close(f(500, 1000), 0.775)),
    ("d is the exponent of the share of the steps that are done, and of nothing else (here alpha_min is 0)",
     lambda f: all(close(f(step, 1000, 0.0, d), alpha)
                   for step, d, alpha in ((500, 1.0, 0.5), (500, 2.0, 0.75), (500, 3.0, 0.875), (250, 0.5, 0.5)))),
    ("alpha falls at every step: it is not rounded and does not move by epochs",
     lambda f: all(float(f(step, 3000, 0.1, 2.0)) > float(f(step + 1, 3000, 0.1, 2.0)) for step in range(3000))))

# -------------------------------------------------------------------------------------------- smooth


def priors():
    return [t(0.5, 0.25, 0.15, 0.1), t(0.2, 0.8), t(0.1, 0.2, 0.3, 0.4)]


PROPERTIES["smooth"] = function_of_tensors(
    lambda: [(q, alpha) for q in priors() for alpha in (0.3, 1.0)], lambda a: a[0].shape,
    "a tensor of K numbers comes out",
    ("the target prior sums to 1: normalise after the power", lambda f: close(f(t(0.64, 0.36), 0.5).sum(), 1)),
    ("alpha = 1 keeps the prior", lambda f: all(close(f(q, 1.0), q, 1e-9) for q in priors())),
    ("alpha = 0 gives the uniform prior, 1/K each, for any number of classes",
     lambda f: all(close(f(q, 0.0), [1 / len(q)] * len(q), 1e-9) for q in [*priors(), t(0.7, 0.2, 0.1)])),
    ("every ratio of two classes becomes its power alpha, and the classes keep their order",
     lambda f: close(f(t(0.64, 0.36), 0.5), [4 / 7, 3 / 7]) and close(f(t(0.2, 0.8), 2.0), [1 / 17, 16 / 17])
     and close(f(t(1 / 1025, 1024 / 1025), 0.1), [1 / 3, 2 / 3])
     and close(f(t(1024 / 1025, 1 / 1025), 0.9), [512 / 513, 1 / 513])
     and close(f(t(16 / 21, 4 / 21, 1 / 21), 0.5), [4 / 7, 2 / 7, 1 / 7])),
    ("a rare class counts like any other: nothing is added to it, and it is not clamped",
     lambda f: close(f(t(1e-20, 1), 0.5)[0] * 1e10, 1) and close(f(t(0, 0.5, 0.5), 0.5), [0, 0.5, 0.5])))

# ----------------------------------------------------------------------------- imbalance_temperature

PROPERTIES["imbalance_temperature"] = function_of_tensors(
    lambda: [(q,) for q in priors()], lambda a: (), "T is one number, a tensor without dimensions",
    ("T is at least 1: the divergence in the exponent is never negative", lambda f: all(f(q) >= 1 for q in priors())),
    ("T is 1 at a uniform prior, for any number of classes",
     lambda f: all(close(f(torch.full((K,), 1 / K).double()), 1) for K in (2, 10, 127))),
    ("the divergence has a direction, and it is the other one", lambda f: not close(f(t(0.8, 0.2)), 1.2125733)),
    ("at Qhat = (0.8, 0.2), T is 1.25", lambda f: close(f(t(0.8, 0.2)), 1.25)),
    ("of class sizes 8, 1, 1, in any order, T is 5/3: every class of the balanced prior has the same weight",
     lambda f: close(f(t(0.8, 0.1, 0.1)), 5 / 3) and close(f(t(0.1, 0.8, 0.1)), 5 / 3)),
    ("a rare class counts with its own Qhat: nothing is clamped or added",
     lambda f: close(f(t(1 - 1e-4, 1e-4)), 50.0025001875) and close(f(t(1 - 1e-8, 1e-8)), 5000.000025)),
    ("the uniform prior is made in the dtype of q_hat: 1/3 in float32 is not 1/3 in float64",
     lambda f: close(f(t(8, 1, 1) / 10), 5 / 3, 1e-12)))

# -------------------------------------------------------------------------------------------- adjust


def logits():
    return t([1, 2, 3], [-4, 0, 9], [5, 5, -5])


def source():
    return t(0.5, 0.25, 0.25)


def target():
    return t(0.25, 0.5, 0.25)


def bayes(adjust, target, joint):
    """One binary x, P(x = 1 | y) = 0.8, 0.3; joint: P(x, y) at the target. The source is (0.9, 0.1)."""
    found = adjust(t(*joint).log(), t(0.9, 0.1), t(*target)).softmax(1)
    return close(found, [[0.72, 0.28], [0.96, 0.04]])


def gradient_of_adjusted(adjust):
    f = logits().requires_grad_()
    found = adjust(f, source(), target())
    if found.requires_grad:
        (found * t([1, 2, 3], [4, 5, 6], [7, 8, 9])).sum().backward()
    return f.grad


PROPERTIES["adjust"] = function_of_tensors(
    lambda: [(logits(), source(), target()), (logits()[:, :2], t(0.9, 0.1), t(0.3, 0.7)),
             (logits()[:0], source(), target()), (logits(), None, None)],
    lambda a: a[0].shape, "(N, K) in, (N, K) out; without priors, None and None, too",
    ("Bayes' classifier at `target` becomes Bayes' classifier at `source`: check the sign, and which prior stands "
     "above the line", lambda f: bayes(f, (0.5, 0.5), ([0.1, 0.35], [0.4, 0.15]))
     and bayes(f, (0.3, 0.7), ([0.06, 0.49], [0.24, 0.21]))),
    ("the log-ratio itself is added, with natural logarithm and factor 1; the sum stays a logit, it is not normalised "
     "or centred", lambda f: close(f(t([0, 0, 0], [0, 0, 0]), source(), target()), [[0.6931472, -0.6931472, 0]] * 2)),
    ("the log-ratio is added to the logits as they are; class k gets entry k in every row",
     lambda f: close(f(logits(), source(), target()) - logits(), [[0.6931472, -0.6931472, 0]] * 3)),
    ("without priors, None and None, the logits come back unchanged",
     lambda f: close(f(logits(), None, None), logits(), 0)),
    ("a class of prior 0, in the source or in the target, stays finite",
     lambda f: bool(f(t([0, 0, 0]), t(0, 1e-9, 1), t(0.25, 0.75, 0)).isfinite().all())),
    ("1e-9 is added to the source and to the target, before they are divided",
     lambda f: close(f(t([0, 0, 0]), t(0, 1e-9, 1), t(0.25, 0.75, 0)), [[-19.3369714, -19.7424366, 20.7232658]])),
    ("the logits keep their gradient: they are not detached", lambda f: gradient_of_adjusted(f) is not None),
    ("the gradient reaches the logits unchanged",
     lambda f: close(gradient_of_adjusted(f), [[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1e-12)),
    ("the computation is as precise as its input: no float32 in between",
     lambda f: close(f(t([0, 0]), t(0.3, 0.7), t(0.6, 0.4)), [[-0.6931471788932785, 0.5596157868639941]], 1e-12)))

# -------------------------------------------------------------------------------- complementary_loss


def soft():
    return t([0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.64, 0.36])


def other():
    """Logits that predict something else."""
    return soft().flip(1).log()


def one(ccr, logits, probs, temperature=2.0, q_hat=None, q_alpha=None):
    """The loss of a single image that is not masked."""
    return ccr(t(logits), t(probs), t(0), q_hat, q_alpha, temperature)


def gradient(ccr, logits, probs, mask, temperature):
    """Of the logits and of the probabilities; None where there is none."""
    f, p = logits.requires_grad_(), probs.requires_grad_()
    loss = ccr(f, p, mask, None, None, temperature)
    if loss.requires_grad:
        loss.backward()
    return f.grad, p.grad


def masked_but(ccr, i):
    """The loss of a batch of 4 in which only image i is not masked, and the loss of that image alone."""
    mask = t(1, 1, 1, 1)
    mask[i] = 0
    return (ccr(other(), soft(), mask, None, None, 1.5), one(ccr, other()[i].tolist(), soft()[i].tolist(), 1.5))


PROPERTIES["complementary_loss"] = function_of_tensors(
    lambda: [(other(), soft(), t(0, 1, 0, 1), t(0.8, 0.2), t(0.4, 0.6), 1.5),
             (other(), soft(), t(0, 1, 0, 1), t(0.8, 0.2), t(0.4, 0.6), torch.tensor(1.5)),
             (other().tile(1, 3), soft().tile(1, 3) / 3, t(0, 1, 0, 0), None, None, 2.0)],
    lambda a: (), "one number comes out, a tensor without dimensions",
    ("None for the priors, like equal priors, leaves the logits alone",
     lambda f: all(close(f(x, soft(), t(0, 0, 0, 0), None, None, 1.5),
                         f(x, soft(), t(0, 0, 0, 0), t(0.8, 0.2), t(0.8, 0.2), 1.5))
                   for x in (soft().log(), logits()[[0, 1, 2, 0], :2]))),
    ("a masked image (M = 1) counts as zero: where all are masked the loss is 0, not NaN",
     lambda f: close(f(soft().log(), soft(), t(1, 1, 1, 1), None, None, 1.5), 0, 0)),
    ("at T = 1, without priors, it is the cross-entropy of the prediction to the soft label p(u): not to its argmax, "
     "not the other way round, and not the KL divergence, from which the label's entropy is subtracted",
     lambda f: close(one(f, [-0.3566749, -1.2039728], [0.9, 0.1], 1.0), 0.4414047)),
    ("the prediction learns: the logits of the strong view are not detached",
     lambda f: gradient(f, t([0, 0]), t([0.9, 0.1]), t(0), 2.0)[0] is not None),
    ("where the prediction is uniform the loss is the entropy of a uniform prior, at every T: the label is normalised "
     "after its power, and the loss has no factor T or T squared",
     lambda f: close(one(f, [0, 0], [0.9, 0.1]), 0.6931472)),
    ("the label is softened by T: at T = 2, p = (0.9, 0.1) becomes (3/4, 1/4)",
     lambda f: close(gradient(f, t([0, 0]), t([0.9, 0.1]), t(0), 2.0)[0], [[-0.125, 0.125]])),
    ("T need not be a whole number, for the label and for the prediction",
     lambda f: close(one(f, [-0.2231436, -1.6094379], [0.8, 0.2], 1.5), 0.5967874)),
    ("the gradient is zero where f(W(u)) predicts p(u), at every T: label and prediction have the same temperature",
     lambda f: all(close(gradient(f, soft().log(), soft(), t(0, 0, 0, 0), T)[0], [[0, 0]] * 4, 1e-9)
                   for T in (1.0, 1.5, 4.0))),
    ("the log-ratio, with q_hat as the source and q_alpha as the target, is added to the logits of the strong view, "
     "before the division by T; the label comes from the raw p(u)",
     lambda f: close(one(f, [-1.1394343, -2.1202635], [0.9, 0.1], 2.0, t(0.8, 0.2), t(0.4, 0.6)), 0.5697171)),
    ("the loss counts where M is 0, and a masked image as zero in a mean over the whole batch",
     lambda f: all(close(masked_but(f, i)[0] * 4, masked_but(f, i)[1]) for i in range(4))),
    ("p(u) is a label: detach it, no gradient flows into the other view",
     lambda f: all(x is None or not x.any() for x in gradient(f, other(), soft(), t(0, 0, 0, 0), 1.5)[1:])),
    ("a probability of exactly 0 stays finite: its power is 0, and 0 times a number is 0",
     lambda f: close(one(f, [0, 0, 0], [1, 0, 0], 1.4), 1.0986123)),
    ("small probabilities are not clamped before they are softened",
     lambda f: close(one(f, [20, -20], [1 - 1e-8, 1e-8]), 0.0019998, 1e-6)),
    ("T may be a number or a tensor without dimensions",
     lambda f: all(close(one(f, [-0.2231436, -1.6094379], [0.8, 0.2], T), 0.5967874)
                   for T in (1.5, torch.tensor(1.5), t(1.5)[0]))),
    ("large logits stay finite: take log_softmax, not the logarithm of a softmax",
     lambda f: close(one(f, [0, 2000], [0.9, 0.1]), 750)))

# ---------------------------------------------------------------------------------------------- weak


def chart(size):
    """(3, H, W) uint8: every pixel tells its row, its column, and its row once more, as 255 - row."""
    rows = torch.arange(size).view(-1, 1).expand(size, size)
    return torch.stack([rows, rows.T, 255 - rows]).to(torch.uint8)


def even_draws(pad):
    """Sixteen draws for each of the (2 pad + 1)^2 crops: half of the last column is below a half."""
    n = 2 * pad + 1
    cells = torch.tensor([(i + part) / n for i in range(n) for part in (0.03, 0.97)])
    return torch.cartesian_prod(cells, cells, torch.tensor([0.01, 0.49, 0.51, 0.99]))


def views_of(weak, size, draws):
    return weak(chart(size).repeat(len(draws), 1, 1, 1), draws)


@functools.lru_cache(maxsize=2)  # several properties look at the same views
def views(weak, size):
    return views_of(weak, size, even_draws(size // 8))


def crops(views):
    """Where each view of the chart was cut out, read from its middle: (N, 3) of dy, dx and 1 where it is mirrored.

    dy and dx count from the image's corner. A third entry of -1: left and right of the middle are no neighbours.
    """
    middle = views.shape[-1] // 2
    dy = views[:, 0, middle, middle].long() - middle
    left = views[:, 1, middle, middle - 1].long()
    right = views[:, 1, middle, middle].long()
    mirrored = torch.where(right - left == 1, 0, torch.where(right - left == -1, 1, -1))
    dx = torch.where(mirrored == 1, left, right) - middle
    return torch.stack([dy, dx, mirrored], dim=1)


def are_windows(views):
    rows, columns = views[:, 0], views[:, 1]
    places, mirrored = crops(views)[:, :2], crops(views)[:, 2]
    return bool((rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all()
                and (places.abs() <= 2).all() and (mirrored >= 0).all())


def reflect(views):
    """Whether rows and columns beyond the border are those of the reflected image: row -1 is row 1."""
    size = views.shape[-1]
    dy, dx, mirrored = crops(views).unbind(1)
    columns = torch.where(mirrored[:, None] == 1, views[:, 1, 0].flip(1), views[:, 1, 0])
    for start, found in ((dy, views[:, 0, :, 0]), (dx, columns)):
        place = (start[:, None] + torch.arange(size)).abs()
        if not torch.equal(found.long(), size - 1 - (size - 1 - place).abs()):
            return False
    return True


def places(weak, size, first, last):
    """dy and dx of the views where both draws of a place are `first`, and where they are `last`."""
    draws = torch.tensor([[first, first, 0.9], [last, last, 0.9]])
    return crops(views_of(weak, size, draws))[:, :2]


def each_by_itself(weak):
    draws = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    images = torch.stack([chart(16), chart(16).flip(1), chart(16).transpose(1, 2)]).repeat(4, 1, 1, 1)
    together = weak(images, draws)
    return all(torch.equal(together[i:i + 1], weak(images[i:i + 1], draws[i:i + 1])) for i in range(12))


def repeats(weak):
    draws, before = even_draws(2)[::50], torch.get_rng_state()
    return torch.equal(views_of(weak, 16, draws), views_of(weak, 16, draws)) and torch.equal(
        before, torch.get_rng_state())


def at_the_ends(weak, size):
    first, last = places(weak, size, 0.0, 1 - 2 ** -24)  # the largest float32 below 1
    return bool((first.abs() == size // 8).all() and (first == -last).all())


def counts(weak, size):
    return crops(views(weak, size)).unique(dim=0, return_counts=True)[1]


SIZES = (16, 24)
PROPERTIES["weak"] = function_of_tensors(
    lambda: [(chart(16).repeat(4, 1, 1, 1), torch.tensor([[0.1, 0.9, 0.2], [0.7, 0.2, 0.8]] * 2)),
             (chart(28)[None], torch.tensor([[0.9, 0.4, 0.1]])), (chart(16)[None][:0], torch.zeros(0, 3))],
    lambda a: a[0].shape, "a view has the image's size, and its pixels stay uint8",
    ("the same draws give the same views: all chance comes from `draws`, no random numbers of your own", repeats),
    ("every pixel of a view is a pixel of the image, its three channels together: the border shows the image "
     "reflected, not black, and nothing is mixed or rounded", lambda f: bool(
         (views(f, 16)[:, :2] < 16).all() and (views(f, 16)[:, 2] == 255 - views(f, 16)[:, 0]).all())),
    ("a view is a window of neighbouring rows and columns, mirrored left to right or not, that begins at most the pad "
     "away from the image's corner; it is not turned", lambda f: are_windows(views(f, 16))),
    ("beyond the border the image is reflected and the edge row itself is not repeated: row -1 is row 1",
     lambda f: all(reflect(views(f, size)) for size in SIZES)),
    ("the pad is an eighth of the image's side, rounded down: 2 of 16, 3 of 28, 4 of 32, 8 of 64 pixels",
     lambda f: all(bool((places(f, size, 0.001, 0.999).abs().amax(0) == pad).all())
                   for size, pad in ((16, 2), (28, 3), (64, 8)))),
    ("half of the draws mirror the view", lambda f: crops(views(f, 16))[:, 2].double().mean() == 0.5),
    ("a crop begins at any of 2 pad + 1 rows and columns, the last one included; row, column and mirror are drawn "
     "independently, each by its own column of the draws",
     lambda f: all(len(counts(f, size)) == (size // 8 * 2 + 1) ** 2 * 2 for size in SIZES)),
    ("every place is equally likely: scale the draw by 2 pad + 1 and round down",
     lambda f: all(bool((counts(f, size) == 8).all()) for size in SIZES)),
    ("view i is image i under row i of the draws, whatever else is in the batch", each_by_itself),
    ("draws of 0 and of just below 1 are the first and the last place, not one beyond",
     lambda f: at_the_ends(f, 16) and at_the_ends(f, 64)))

# --------------------------------------------------------------------------------------- reliability


def certain(confidence, correct):
    """Predictions of class 0 of two, at a confidence, right or not: (probs, labels)."""
    confidence = t(*confidence)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.tensor(correct).long()


def three():
    """Confidence 0.7 three times; labels 0: wrong, right, wrong."""
    return t([0.2, 0.7, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]), torch.tensor([0, 0, 0])


def refuses(reliability, probs, labels):
    try:
        reliability(probs, labels)
    except ValueError:
        return True
    return False


PROPERTIES["reliability"] = function_of_tensors(
    lambda: [(*certain([0.9, 0.6, 0.3], [1, 0, 1]), 5), (*three(), 7)], lambda a: (a[2], 3),
    "(num_bins, 3): a row for each bin",
    ("there are 15 bins unless another number is given", lambda f: tuple(f(*three()).shape) == (15, 3)),
    ("the confidence is the largest probability, not that of the true class",
     lambda f: not close(f(*three(), 2)[:, 0], [2 / 3, 1 / 3])),
    ("the columns are share, accuracy, mean confidence: of four samples at 0.75, one of them right, they are "
     "1, 0.25, 0.75", lambda f: close(f(*certain([0.75] * 4, [1, 0, 0, 0]), 2)[1], [1, 0.25, 0.75])),
    ("a sample is right where the class of the largest probability is its label",
     lambda f: close(f(*three(), 2)[1, :2], [1, 1 / 3])),
    ("accuracy and confidence are means over the samples of a bin: the confidence is not the bin's middle",
     lambda f: close(f(*certain([0.51, 0.53, 0.99], [1, 0, 1]), 4)[2:, 1:], [[0.5, 0.52], [1, 0.99]])),
    ("an empty bin has share, accuracy and confidence 0, not NaN: do not divide by its number of samples",
     lambda f: close(f(*certain([0.9, 0.9], [1, 0]), 10).sum(0), [1, 0.5, 0.9])),
    ("a bin is (lower, upper]: a confidence on an edge belongs to the bin below it, and 1 to the last bin",
     lambda f: close(f(t([0.25] * 4, [0.5, 0.25, 0.25, 0], [0.75, 0.25, 0, 0], [1, 0, 0, 0]), torch.zeros(4).long(), 4),
                     [[0.25, 1, 0.25], [0.25, 1, 0.5], [0.25, 1, 0.75], [0.25, 1, 1]])),
    ("the first bin takes a confidence of 0, too",
     lambda f: close(f(torch.zeros(1, 2).double(), torch.tensor([0]), 4)[:, 0], [1, 0, 0, 0])),
    ("the computation is as precise as its input: no float32 in between",
     lambda f: close(f(*certain([0.9, 0.8, 0.70003], [1, 0, 1]), 1), [[1, 2 / 3, 0.80001]], 1e-12)),
    ("bad input is a ValueError, as the docstring says: no samples, labels of another number or outside of 0..K-1, "
     "scores that are not finite", lambda f: all(refuses(f, *bad) for bad in (
         (torch.zeros(0, 2), torch.zeros(0).long()), (three()[0], torch.tensor([0, 0])),
         (three()[0], torch.tensor([0, 0, 3])), (three()[0], torch.tensor([0, -1, 0])),
         (three()[0] * math.nan, three()[1])))), as_given=False)

# ---------------------------------------------------------------------------------------- ema_update


def student():
    """A linear layer (2, 3) and a batch-norm, all parameters at 1."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
        model[1].running_mean.fill_(10 * value)
        model[1].running_var.fill_(20 * value)
        model[1].num_batches_tracked += 7


def followed(EMA, decay, *values, dtype=torch.float32):
    """A model that takes these values one after the other, and its average after the last."""
    model = student().to(dtype)
    average = EMA(model, decay)
    for value in values:
        fill(model, value)
        average.update(model)
    return model, average


def weight(EMA, decay, *values):
    """One number for all weights of the average; NaN where they differ."""
    found = followed(EMA, decay, *values)[1].model[0].weight
    return found[0, 0].item() if (found == found[0, 0]).all() else math.nan


def every_parameter(EMA):
    model, average = followed(EMA, 0.9)
    fill(model, 2.0)
    model[0].bias.requires_grad_(False)
    average.update(model)
    return all(close(p, torch.full_like(p, 1.1)) for p in average.model.parameters())


def unchanged(network, act):
    """Whether a network's state is the same after `act` is called."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    act()
    return all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def has_its_own_memory(EMA):
    model, average = followed(EMA, 0.9, 2.0)
    return unchanged(average.model, lambda: fill(model, 50.0))


def stays_the_same_network(EMA):
    model, average = followed(EMA, 0.9)
    network, parameters = average.model, [*average.model.parameters()]
    average.update(model)
    return average.model is network and all(a is b for a, b in zip(network.parameters(), parameters))


def leaves_the_model_alone(EMA):
    model, average = followed(EMA, 0.9)
    fill(model, 2.0)
    return (unchanged(model, lambda: average.update(model)) and model.training
            and all(p.requires_grad and p.is_leaf for p in model.parameters()))


def averages_elsewhere(EMA):
    model, average = followed(EMA, 0.9)
    return stays(average.update, model) and not any(
        on_cpu(x) for x in (*average.model.parameters(), *average.model.buffers()))


PROPERTIES["ema_update"] = (
    ("the average keeps `decay` of itself, and the rest comes from the model: 1, then 2, 3, -1 at decay 0.9 makes "
     "1.1, 1.29, 1.061", lambda f: close(weight(f, 0.9, 2.0), 1.1) and close(weight(f, 0.9, 2.0, 3.0), 1.29)
     and close(weight(f, 0.9, 2.0, 3.0, -1.0), 1.061)),
    ("every parameter is averaged: weights, biases, batch-norm's, frozen ones", every_parameter),
    ("the decay is the one given to EMA, from the first update on: no warm-up, no correction of the start",
     lambda f: all(close(weight(f, decay, 3.0), value) for decay, value in ((0.0, 3.0), (0.5, 2.0), (0.75, 1.5)))),
    ("batch-norm's statistics are copied, not averaged",
     lambda f: close(followed(f, 0.9, 2.0)[1].model[1].running_mean, [20.0] * 3)
     and close(followed(f, 0.9, 2.0)[1].model[1].running_var, [40.0] * 3)),
    ("batch-norm's counter is copied, an integer",
     lambda f: repr(followed(f, 0.9, 2.0)[1].model[1].num_batches_tracked) == "tensor(7)"),
    ("what the model learns later does not show in the average before its next update: copy the values, do not share "
     "the tensor", has_its_own_memory),
    ("average.model and its parameters stay the same objects: they are written in place, not replaced or bound to "
     "new ones", stays_the_same_network),
    ("the model that learns is not changed by its average: it stays as it is, in training mode, with gradients",
     leaves_the_model_alone),
    ("the average is not part of a graph: update it under torch.no_grad()",
     lambda f: not any(p.requires_grad or p.grad_fn for p in followed(f, 0.9, 2.0, 3.0)[1].model.parameters())),
    ("the averaged network stays in evaluation mode", lambda f: not followed(f, 0.9, 2.0)[1].model.training),
    ("a model in float64 has an average in float64", lambda f: all(
        p.dtype == torch.float64 and (p - 1.1).abs().max() < 1e-12
        for p in followed(f, 0.9, 2.0, dtype=torch.float64)[1].model.parameters())),
    ("on a GPU the average is on the GPU: what you make lies on the device of the model", averages_elsewhere))

# ---------------------------------------------------------------------------------- estimator_update


def estimate(PriorEstimator, momentum, *batches, K=2, first=None):
    """An estimator that has taken in these batches; first: the number of the first CCR step among them."""
    estimator = PriorEstimator(K, momentum)
    for step, probs in enumerate(batches):
        estimator.update(torch.tensor(probs), first_ccr_step=step == first)
    return estimator


def q_hat(PriorEstimator, momentum, *batches, K=2):
    return estimate(PriorEstimator, momentum, *batches, K=K).q_hat


def temperature(PriorEstimator, steps, first=2):
    """At momentum 0.5 and predictions (0.9, 0.1), Qhat is 0.7, 0.8, 0.85, 0.875 after 1, 2, 3, 4 steps."""
    return estimate(PriorEstimator, 0.5, *[[[0.9, 0.1]]] * steps, first=first).temperature


def keeps_rare(PriorEstimator):
    estimator = PriorEstimator(2, 0.5)
    estimator.q_hat.copy_(t(1, 1e-9))
    estimator.update(torch.tensor([[1.0, 1e-9]]))
    return close(estimator.q_hat[1] * 1e9, 1)


def keeps_predictions(PriorEstimator):
    probs = torch.tensor([[0.9, 0.1]], requires_grad=True)
    estimator = PriorEstimator(2, 0.9)
    estimator.update(probs, first_ccr_step=True)
    return (not estimator.q_hat.requires_grad and not estimator.temperature.requires_grad
            and close(probs, [[0.9, 0.1]]))


def estimates_elsewhere(PriorEstimator):
    estimator = PriorEstimator(2, 0.9)
    return stays(estimator.update, torch.tensor([[0.9, 0.1]]), True) and not on_cpu(estimator.q_hat)


PROPERTIES["estimator_update"] = (
    ("a part of the estimate stays and the rest is the batch's mean prediction: at m = 0.9, (0.5, 0.5) and a mean of "
     "(0.8, 0.2) make (0.53, 0.47)", lambda f: close(q_hat(f, 0.9, [[1.0, 0.0], [0.6, 0.4]]), [0.53, 0.47])),
    ("the momentum is the one given to the estimator, and the size of the batch does not matter",
     lambda f: all(close(q_hat(f, m, [[1.0, 0.0]] * 3)[0], q)
                   for m, q in ((0.0, 1.0), (0.5, 0.75), (0.75, 0.625), (0.999, 0.5005)))),
    ("the mean of the soft predictions comes in, uncertain ones too: no argmax, no threshold",
     lambda f: close(q_hat(f, 0.0, [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], K=3), [0.4, 0.3, 0.3])),
    ("a rare class counts as it is predicted: nothing is clamped or added", keeps_rare),
    ("before the first CCR step T is not touched", lambda f: close(temperature(f, 2), 1)),
    ("T is computed from Qhat at the first CCR step, after its update, and stays as it is in all later ones",
     lambda f: all(close(temperature(f, steps), 1.4002801) for steps in (3, 4, 5))),
    ("T may be large: no bound",
     lambda f: close(estimate(f, 0.0, [[0.9999, 0.0001]], first=0).temperature, 50.0025, 1e-3)),
    ("Qhat moves at every step, before and after T is computed",
     lambda f: close(estimate(f, 0.5, *[[[0.9, 0.1]]] * 5, first=2).q_hat[0], 0.8875)),
    ("no gradient flows through Qhat or T, and the predictions that were given are unchanged", keeps_predictions),
    ("Qhat and T stay buffers: a checkpoint holds them",
     lambda f: {"q_hat", "temperature"} <= set(estimate(f, 0.9, [[0.9, 0.1]], first=0).state_dict())),
    ("on a GPU Qhat is on the GPU: what you make lies on the device of the estimate", estimates_elsewhere))

# ----------------------------------------------------------------------------------------- half_life

HALVES = ((0.999, 692.8005493), (0.99, 68.9675639), (0.9, 6.5788135), (0.8, 3.1062837), (0.75, 2.4094208), (0.5, 1.0))


def takes(half_life, *counts):
    """Whether the counts at these m, by one of these rules throughout, are what the function returns."""
    return any(all(close(half_life(m), rule(n), 3e-3) for m, n in HALVES) for rule in counts)


PROPERTIES["half_life"] = (
    ("a number of updates comes out", lambda f: all(math.isfinite(number(f(m))) for m, _ in HALVES)),
    ("the number of updates is positive, and larger where m is closer to 1",
     lambda f: 0 < float(f(0.5)) < float(f(0.9)) < float(f(0.99)) < float(f(0.999))),
    ("that many updates leave more than a third, not a half: in that time an exponential falls to 1/e",
     lambda f: not close(f(0.99), 100, 1e-2)),
    ("the count is off by one: the first update shrinks the difference already", lambda f: not takes(
        f, lambda n: n + 1, lambda n: n - 1, lambda n: math.ceil(n) + 1, lambda n: math.floor(n) - 1)),
    ("that number of updates, as a float or rounded, does not leave a half of the difference (at m = 0.999 about 693 "
     "do)", lambda f: takes(f, float, round, math.floor, math.ceil)))

# ----------------------------------------------------------------------------------------- at_target


def posterior(at_target, constant=0.0):
    """Of P(x | y) = 0.2, 0.5, 0.3 and 0.6, 0.1, 0.4, moved from prior (0.7, 0.2, 0.1) to (0.1, 0.3, 0.6)."""
    return at_target(t([0.14, 0.1, 0.03], [0.42, 0.02, 0.04]).log() + constant, t(0.7, 0.2, 0.1), t(0.1, 0.3, 0.6))


PROPERTIES["at_target"] = function_of_tensors(
    lambda: [(logits(), source(), target()), (logits()[:1, :2], t(0.9, 0.1), t(0.3, 0.7)),
             (logits()[:0], source(), target())],
    lambda a: a[0].shape, "(N, K) in, (N, K) out",
    ("the sign is the other one: what is frequent at the target should gain", lambda f: not close(
        posterior(f).softmax(1), [[0.931854, 0.0633914, 0.0047544], [0.9932432, 0.0045045, 0.0022523]])),
    ("the softmax of the moved logits is the posterior P(y|x) at the target prior; logits go in, logits come out",
     lambda f: all(close(posterior(f, constant).softmax(1) * t([35], [11]), [[2, 15, 18], [2, 1, 8]], 1e-5)
                   for constant in (0.0, 5.0))),
    ("class k gets entry k of the priors, in every row",
     lambda f: close(f(torch.zeros(3, 3).double(), source(), target()).softmax(1) * 7, [[1, 4, 2]] * 3)),
    ("priors may lie far apart: their ratio is not clamped, and nothing is added to them",
     lambda f: close(f(t([1 - 1e-5, 1e-5]).log(), t(1 - 1e-5, 1e-5), t(1e-5, 1 - 1e-5)).diff(), [[11.512915]], 1e-4)),
    as_given=False)

# ----------------------------------------------------------------------------- temperature_of_counts


def of_counts(temperature_of_counts, *counts):
    return number(temperature_of_counts([*counts]))


def leaves_the_list(temperature_of_counts):
    counts = [1, 1000, 10]
    temperature_of_counts(counts)
    return counts == [1, 1000, 10]


PROPERTIES["temperature_of_counts"] = (
    ("one number comes out", lambda f: not math.isnan(of_counts(f, 8, 1, 1))),
    ("equal sizes have equal means: T is 1", lambda f: close(of_counts(f, 5, 5, 5), 1)),
    ("sizes 8, 1, 1 have T = 5/3: one of the means is 10/3", lambda f: close(of_counts(f, 8, 1, 1), 5 / 3)),
    ("the product of a thousand sizes is no float: find the mean without it",
     lambda f: close(of_counts(f, *[4000, 1000] * 500), 1.25)),
    ("the caller's list is the same after the call: it is not sorted or emptied", leaves_the_list))

# ------------------------------------------------------------------------------------ gradient_limit

LIMITS = (  # f(W(u)), p(u), the limit; the large logits tell it from the gradient at a large but finite T
    ([1, -2, 0.5], [0.7, 0.2, 0.1], [0.0334808, -0.5489316, 0.5154508]),
    ([3, 0], [0.25, 0.75], [1.0246531, -1.0246531]),
    ([0, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [-0.1479452, -0.0760247, 0.0253416, 0.1986284]),
    ([3e6, 0, 0], [1 / 3] * 3, [2e6 / 3, -1e6 / 3, -1e6 / 3]))


def power(gradient_limit):
    return number(gradient_limit(t(3, 0), t(0.25, 0.75))[0])


def limits(gradient_limit, sign=1):
    """Pairs of the found limit, in float64, and the true one."""
    pairs = [(numbers(gradient_limit(t(*f), t(*p))[1]), t(*limit)) for f, p, limit in LIMITS]
    return [(None if found is None else sign * found, limit) for found, limit in pairs]


PROPERTIES["gradient_limit"] = (
    ("two values come out, n and the limit", lambda f: len(f(t(3, 0, 1), t(0.25, 0.7, 0.05))) == 2),
    ("n comes first, a number, then the limit", lambda f: not math.isnan(power(f))),
    ("the power of T times the gradient goes to zero where n is too small, grows without bound where it is too large: "
     "both the factor 1/T and the difference of the two softmaxes shrink", lambda f: power(f) == 2),
    ("the limit sums to 0, as every gradient of a softmax cross-entropy does",
     lambda f: all(abs(x.sum()) < 1e-5 * limit.abs().max().clamp(min=1) for x, limit in limits(f))),
    ("the sign is that of a gradient, which points away from the label",
     lambda f: not all(close(*pair, 1e-5) for pair in limits(f, -1)[:3])),
    ("the limit is not that of the gradient: expand both softmaxes to first order, that of the prediction and that "
     "of the label, which is the softmax of a logarithm", lambda f: all(close(*pair, 1e-3) for pair in limits(f)[:3])),
    ("the limit is exact, not the gradient at some large T", lambda f: all(close(*pair, 1e-5) for pair in limits(f))),
    ("the arguments are the same after the call", lambda f: keeps(f, t(3, 0), t(0.25, 0.75))))

# ---------------------------------------------------------------------------------------- own_method

FAMILY = {  # the paper's rows: target, ccr, unlabeled
    "supervised": (None, None, False), "fixmatch": (None, None, True), "ccr": (None, "rest", True),
    "udal": ("p_labeled", None, True), "flexda": ("q_hat", None, True), "adello": ("q_hat", "rest", True),
    "kd": ("q_hat", "all", True), "oracle": ("q_true", "rest", True)}


def own(METHODS):
    return {name: row for name, row in METHODS.items() if name not in FAMILY}


def are_new(METHODS):
    for name, row in own(METHODS).items():
        for other in METHODS:
            if other != name and METHODS[other] == row:
                raise ValueError(f"{name} is {other}")
    return True


PROPERTIES["own_method"] = (
    ("METHODS stays a dict from a name to a Method", lambda table: isinstance(table, dict) and all(
        isinstance(name, str) and type(row).__name__ == "Method" for name, row in table.items())),
    ("the paper's eight rows are there, unchanged",
     lambda table: {name: tuple(table.get(name, ())) for name in FAMILY} == FAMILY),
    ("METHODS in losses.py has no row of your own yet", own),
    ("the target is None or the name of a prior that a step knows: p_labeled, q_hat, q_true",
     lambda table: all(row.target in (None, "p_labeled", "q_hat", "q_true")
                       and isinstance(row.target, (str, type(None))) for row in own(table).values())),
    ("ccr is None, 'rest' or 'all', unlabeled True or False",
     lambda table: all(row.ccr in (None, "rest", "all") and isinstance(row.ccr, (str, type(None)))
                       and isinstance(row.unlabeled, bool) for row in own(table).values())),
    ("a new row is a new combination, not a row of the table under another name", are_new),
    ("CCR needs unlabeled images: a row with ccr has unlabeled=True",
     lambda table: all(row.unlabeled or row.ccr is None for row in own(table).values())))


# ------------------------------------------------------------------------------------------ the tests

def failure(sentence, holds, subject):
    """None where the property holds; else its sentence, with the error, and where it was raised, if there was one."""
    try:
        return None if holds(subject) else sentence
    except Exception as error:
        if "is yours to write" in str(error):
            return str(error)
        lines = [f", {Path(frame.filename).name} line {frame.lineno}"
                 for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == ROOT]
        return f"{sentence} ({type(error).__name__}: {error}{lines[-1] if lines else ''})"


def written(name):
    """What the student wrote: the function, class or table of an exercise, as it stands in its module."""
    module, _, path = exercises.PLACES[name].partition(".")
    return getattr(importlib.import_module(module), path.partition(".")[0])


def first_failure(rows, subject):
    """What the first of these properties that does not hold says; None where all hold."""
    return next(filter(None, (failure(*row, subject()) for row in rows)), None)


def verdict(name, before=tuple((name, value, getattr(value, "__code__", None)) for name, value in globals().items())):
    """None where an exercise is solved; else the reason, whatever the student's module does."""
    try:
        reason = first_failure(PROPERTIES[name], lambda: written(name))
    except BaseException as error:  # of the import; or SystemExit, KeyboardInterrupt, pytest's own
        return f"{type(error).__name__}: {error}"
    same = all(globals()[name] is value and getattr(value, "__code__", None) is code for name, value, code in before)
    if same and not close(0, 1) and not torch.equal(t(0), t(1)):
        return reason
    return "it changes the tests or PyTorch under them"


def given(name):
    """Whether an exercise is there: those of answers.py only in a copy that asks for them."""
    if name not in exercises.ANSWERS:
        return True
    answers = ROOT / "answers.py"
    return answers.exists() and name in answers.read_text(encoding="utf-8")


@pytest.mark.parametrize("name, row", [pytest.param(name, row, id=f"{name}: {row[0]}")
                                       for name in filter(given, PROPERTIES) for row in PROPERTIES[name]])
def test_exercise(name, row):
    reason = failure(*row, written(name))
    if reason:
        pytest.fail(reason, pytrace=False)

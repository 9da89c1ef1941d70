"""The exercises of the course, a group of tests each: `pytest tests/test_exercises.py -k smooth`.

A test is named test_<exercise>_<property>; its argument is the function as it is written in the module, and what it
says when it fails is the property, in a sentence. Expected values were worked out by hand. Only the module of the
exercise is imported. ADELLO_EXERCISES names another directory whose modules are tested (see exercises.py).
"""

import contextlib
import importlib
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(os.environ.get("ADELLO_EXERCISES") or Path(__file__).resolve().parent.parent)
sys.path.insert(0, str(ROOT))


def written(module, name):
    """The fixture `name`: a function or class as it stands in its module."""
    @pytest.fixture(name=name)
    def load():
        if module == "answers" and not (ROOT / "answers.py").exists():
            pytest.skip("answered in answers.py, which `python tests/exercises.py blank` hands out")
        return getattr(importlib.import_module(module), name)
    return load


alpha_schedule = written("priors", "alpha_schedule")
smooth = written("priors", "smooth")
imbalance_temperature = written("priors", "imbalance_temperature")
PriorEstimator = written("priors", "PriorEstimator")
adjust = written("losses", "adjust")
complementary_loss = written("losses", "complementary_loss")
METHODS = written("losses", "METHODS")
weak = written("data", "weak")
reliability = written("evaluate", "reliability")
EMA = written("models", "EMA")
half_life = written("answers", "half_life")
at_target = written("answers", "at_target")
temperature_of_counts = written("answers", "temperature_of_counts")
gradient_limit = written("answers", "gradient_limit")


def check(holds, sentence):
    """Fail with the sentence alone: no numbers, no pixels."""
    __tracebackhide__ = True
    if not holds:
        raise AssertionError(sentence)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    """Same shape, and every number equal up to a tolerance relative to the larger of itself and 1."""
    if not torch.is_tensor(found) and not isinstance(found, (int, float, list, tuple)):
        return False
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all())


def or_none(function, *arguments):
    """What a function returns; None where it cannot compute with the None among its arguments."""
    try:
        return function(*arguments)
    except (TypeError, AttributeError):
        return None


def is_tensor_of(found, shape, dtype):
    return torch.is_tensor(found) and tuple(found.shape) == tuple(shape) and found.dtype == dtype


def keeps_its_input(function, *arguments):
    """Whether the tensors among the arguments are the same after the call."""
    before = [a.detach().clone() if torch.is_tensor(a) else a for a in arguments]
    function(*arguments)
    return all(torch.equal(a, b) for a, b in zip(arguments, before) if torch.is_tensor(a))


def stays_on_the_device(function, *arguments):
    """Whether a call whose tensors lie on another device makes its own tensors there, too.

    The meta device stands for a GPU. It holds no numbers, so a function that looks at single numbers cannot be
    tried on it; that is no fault.
    """
    moved = [a.to("meta") if torch.is_tensor(a) else a for a in arguments]
    try:
        found = function(*moved)
    except RuntimeError as error:
        check("yours to write" not in str(error), str(error))
        return "expected device" not in str(error) and "same device" not in str(error)
    except TypeError:  # numpy cannot read it
        return True
    return found.ndim == 0 or found.device.type == "meta"


# ------------------------------------------------------------------------------------ alpha_schedule

def test_alpha_schedule_starts_at_one(alpha_schedule):
    for alpha_min, d in ((0.1, 2.0), (0.55, 1.5), (0.0, 1.0)):
        check(close(alpha_schedule(0, 1000, alpha_min, d), 1, 1e-9), "alpha is 1 at step 0: the target is Qhat itself")


def test_alpha_schedule_ends_at_alpha_min(alpha_schedule):
    for alpha_min in (0.1, 0.55, 0.0, 1.0):
        check(close(alpha_schedule(1000, 1000, alpha_min, 2.0), alpha_min, 1e-9),
              "alpha is alpha_min, whatever alpha_min is given, when step = total_steps")


def test_alpha_schedule_scales_the_whole_fall_by_one_minus_alpha_min(alpha_schedule):
    for alpha_min, expected in ((0.6, 0.9), (0.2, 0.8), (1.0, 1.0)):
        check(close(alpha_schedule(500, 1000, alpha_min, 2.0), expected, 1e-9),
              "the curve falls by (1 - alpha_min) in all: alpha_min scales it, it does not cut it off")


def test_alpha_schedule_has_the_papers_defaults(alpha_schedule):
    check(close(alpha_schedule(500, 1000), 0.775, 1e-9),
          "with the paper's alpha_min = 0.1 and d = 2, the defaults, alpha is 0.775 half way")


def test_alpha_schedule_takes_the_power_d_of_the_share_of_steps(alpha_schedule):
    for step, d, expected in ((500, 1.0, 0.5), (500, 2.0, 0.75), (500, 3.0, 0.875), (250, 0.5, 0.5)):
        check(close(alpha_schedule(step, 1000, 0.0, d), expected, 1e-9),
              "d is the exponent of t / T_max and of nothing else (here alpha_min is 0)")


def test_alpha_schedule_falls_at_every_step(alpha_schedule):
    values = [float(alpha_schedule(step, 3000, 0.1, 2.0)) for step in range(3001)]
    check(all(a > b for a, b in zip(values, values[1:])),
          "alpha falls at every step: it is not rounded and does not move by epochs")


def test_alpha_schedule_sees_only_the_share_of_the_steps(alpha_schedule):
    for step, total in ((3, 7), (3000, 7000)):
        check(close(alpha_schedule(step, total, 0.0, 1.0), 4 / 7, 1e-9),
              "alpha depends on step / total_steps alone, a fraction: no integer division, no step more or less")


# -------------------------------------------------------------------------------------------- smooth

def a_prior():
    return t(0.5, 0.25, 0.15, 0.1)


def test_smooth_returns_a_prior(smooth):
    found = smooth(a_prior(), 0.3)
    check(torch.is_tensor(found) and found.shape == (4,), "a tensor of K numbers comes out")
    check(close(found.sum(), 1, 1e-9), "the smoothed prior sums to 1: normalise after the power")


def test_smooth_does_not_write_into_the_prior(smooth):
    check(keeps_its_input(smooth, a_prior(), 0.3), "the prior that was given is unchanged: no in-place operation")


def test_smooth_leaves_the_prior_as_it_is_at_alpha_one(smooth):
    check(close(smooth(a_prior(), 1.0), a_prior(), 1e-9), "alpha = 1 keeps the prior")


def test_smooth_forgets_the_prior_at_alpha_zero(smooth):
    check(close(smooth(a_prior(), 0.0), [0.25] * 4, 1e-9), "alpha = 0 gives the uniform prior")
    check(close(smooth(t(0.7, 0.2, 0.1), 0.0), [1 / 3] * 3, 1e-9), "alpha = 0 gives the uniform prior, 1/K each")


def test_smooth_takes_the_power_of_every_ratio(smooth):
    for alpha in (0.1, 0.5, 0.9, 2.0):
        found = smooth(a_prior(), alpha)
        check(close(found / found[3], (a_prior() / 0.1) ** alpha, 1e-7),
              "every ratio Q(i) / Q(j) becomes its power alpha, and the classes keep their order")


def test_smooth_neither_clamps_nor_lifts_rare_classes(smooth):
    found = smooth(t(1e-12, 0.5, 0.5 - 1e-12), 0.5)
    check(close(1e6 * found[0] / found[1], math.sqrt(2), 1e-6),
          "a rare class is smoothed like any other: nothing is added to it, and it is not clamped")
    check(close(smooth(t(0.0, 0.5, 0.5), 0.5), [0, 0.5, 0.5], 1e-9), "a class without mass stays without mass")


def test_smooth_works_for_any_number_of_classes(smooth):
    for K in (2, 10, 127):
        check(close(smooth(torch.full((K,), 1 / K).double(), 0.4), [1 / K] * K, 1e-9),
              "the uniform prior stays uniform, for any number of classes")


def test_smooth_keeps_the_precision(smooth):
    for dtype in (torch.float32, torch.float64):
        check(smooth(a_prior().to(dtype), 0.3).dtype == dtype, "float32 in, float32 out; float64 in, float64 out")
    check(close(smooth(t(0.8, 0.2), 0.5), [2 / 3, 1 / 3], 1e-12), "the computation is as precise as its input")


def test_smooth_stays_on_the_device(smooth):
    check(stays_on_the_device(smooth, a_prior(), 0.3), "tensors that you make lie on the device of q")


# ----------------------------------------------------------------------------- imbalance_temperature

def test_imbalance_temperature_is_a_scalar_tensor(imbalance_temperature):
    found = imbalance_temperature(a_prior())
    check(torch.is_tensor(found) and found.ndim == 0, "T is one number, a tensor without dimensions")
    check(found >= 1, "T is at least 1: the divergence in the exponent is never negative")


def test_imbalance_temperature_does_not_write_into_the_prior(imbalance_temperature):
    check(keeps_its_input(imbalance_temperature, a_prior()), "the prior that was given is unchanged")


def test_imbalance_temperature_is_one_at_a_uniform_prior(imbalance_temperature):
    for K in (2, 10, 127):
        check(close(imbalance_temperature(torch.full((K,), 1 / K).double()), 1), "T is 1 at a uniform prior")


def test_imbalance_temperature_of_two_classes(imbalance_temperature):
    """KL(P_bal || Q) = log(0.5 / 0.8) / 2 + log(0.5 / 0.2) / 2 = log 1.25; the other way round T is 1.213."""
    found = imbalance_temperature(t(0.8, 0.2))
    check(not close(found, 1.6 ** 0.8 * 0.4 ** 0.2), "KL is taken of P_bal from Qhat, not of Qhat from P_bal")
    check(not close(found, math.log(1.25)), "T is the exponential of the divergence, not the divergence")
    check(close(found, 1.25), "at Qhat = (0.8, 0.2), T is 1.25")


def test_imbalance_temperature_of_three_classes(imbalance_temperature):
    check(close(imbalance_temperature(t(8, 1, 1) / 10), 5 / 3),
          "of class sizes 8, 1, 1, T is 5/3: P_bal gives every class the weight 1/K")
    check(close(imbalance_temperature(t(1, 8, 1) / 10), 5 / 3), "the order of the classes does not matter")


def test_imbalance_temperature_counts_rare_classes_in_full(imbalance_temperature):
    """T = 0.5 / sqrt(q (1 - q))."""
    for q in (1e-4, 1e-8):
        check(close(imbalance_temperature(t(1 - q, q)), 0.5 / math.sqrt(q * (1 - q)), 1e-6),
              "a rare class counts with its own Qhat: nothing is clamped or added")


def test_imbalance_temperature_keeps_the_precision(imbalance_temperature):
    for dtype in (torch.float32, torch.float64):
        check(imbalance_temperature(a_prior().to(dtype)).dtype == dtype, "float32 in, float32 out; float64 in, "
              "float64 out")
    check(close(imbalance_temperature(t(8, 1, 1) / 10), 5 / 3, 1e-12),
          "the uniform prior is made in the dtype of q_hat: 1/3 in float32 is not 1/3 in float64")


def test_imbalance_temperature_stays_on_the_device(imbalance_temperature):
    check(stays_on_the_device(imbalance_temperature, a_prior()), "the uniform prior is made on the device of q_hat")


# -------------------------------------------------------------------------------------------- adjust

def a_source():
    return t(0.5, 0.25, 0.25)


def a_target():
    return t(0.25, 0.5, 0.25)


def some_logits():
    return t([1, 2, 3], [-4, 0, 9], [5, 5, -5])


def test_adjust_returns_logits_of_the_same_shape(adjust):
    check(is_tensor_of(adjust(some_logits(), a_source(), a_target()), (3, 3), torch.float64), "(N, K) in, (N, K) "
          "out, same dtype")
    check(is_tensor_of(adjust(some_logits().float()[:2], a_source().float(), a_target().float()), (2, 3),
                       torch.float32),
          "(N, K) in, (N, K) out, same dtype")


def test_adjust_does_not_write_into_its_arguments(adjust):
    check(keeps_its_input(adjust, some_logits(), a_source(), a_target()),
          "logits and priors that were given are unchanged: no in-place operation")


def test_adjust_moves_the_bayes_classifier_at_the_target_to_the_source(adjust):
    """Two classes, one binary feature x, P(x=1|y) = 0.8, 0.3; everything is exact."""
    likelihood = t([0.2, 0.7], [0.8, 0.3])  # [x, y]
    for source, target in ((t(0.9, 0.1), t(0.5, 0.5)), (t(0.9, 0.1), t(0.3, 0.7))):
        at_the_source = likelihood * source / (likelihood * source).sum(1, keepdim=True)
        found = adjust((likelihood * target).log(), source, target).softmax(1)
        check(close(found, at_the_source, 1e-6), "Bayes' classifier at `target` plus the log-ratio is Bayes' "
              "classifier at `source`: check the sign, and which prior stands above the line")


def test_adjust_adds_the_log_ratio_and_nothing_else(adjust):
    ratio = t(math.log(2), -math.log(2), 0)
    found = adjust(torch.zeros(2, 3).double(), a_source(), a_target())
    check(close(found, torch.stack([ratio, ratio])), "log(source / target) itself is added, with natural logarithm "
          "and factor 1; the sum stays a logit, it is not normalised or centred")
    check(close(adjust(some_logits(), a_source(), a_target()) - some_logits(), ratio.expand(3, 3)),
          "the log-ratio is added to the logits as they are; class k gets entry k in every row")


def test_adjust_takes_none_for_no_change(adjust):
    found = or_none(adjust, some_logits(), None, None)
    check(close(found, some_logits(), 0), "without priors (None, None) the logits come back unchanged")


def test_adjust_by_equal_priors_is_no_change(adjust):
    check(close(adjust(some_logits(), a_source(), a_source()), some_logits(), 1e-7), "equal priors change nothing")


def test_adjust_adds_1e_minus_9_to_both_priors(adjust):
    zero, source, target = torch.zeros(1, 3).double(), t(0, 1e-9, 1), t(0.25, 0.75, 0)
    found = adjust(zero, source, target)
    check(bool(found.isfinite().all()), "a class of prior 0, in the source or in the target, stays finite")
    expected = [math.log(1e-9 / 0.25), math.log(2e-9 / 0.75), math.log(1e9)]
    check(close(found, [expected]), "1e-9 is added to the source and to the target, before they are divided")


def test_adjust_lets_the_gradient_through(adjust):
    logits, weights = some_logits().requires_grad_(), t([1, 2, 3], [4, 5, 6], [7, 8, 9])
    found = adjust(logits, a_source(), a_target())
    check(found.requires_grad, "the logits keep their gradient: they are not detached")
    (found * weights).sum().backward()
    check(close(logits.grad, weights, 1e-12), "the gradient reaches the logits unchanged")


def test_adjust_keeps_the_precision(adjust):
    expected = [math.log(0.3 + 1e-9) - math.log(0.6 + 1e-9), math.log(0.7 + 1e-9) - math.log(0.4 + 1e-9)]
    check(close(adjust(torch.zeros(1, 2).double(), t(0.3, 0.7), t(0.6, 0.4)), [expected], 1e-12),
          "the computation is as precise as its input: no float32 in between")


def test_adjust_stays_on_the_device(adjust):
    check(stays_on_the_device(adjust, some_logits(), a_source(), a_target()), "tensors that you make lie on the "
          "device of the logits")


# -------------------------------------------------------------------------------- complementary_loss

def some_probs():
    return t([0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.64, 0.36])


def none_masked():
    return t(0, 0, 0, 0)


def one(complementary_loss, logits, probs, temperature, q_hat=None, q_alpha=None):
    """The loss of a single sample that is not masked."""
    return complementary_loss(t(logits), t(probs), t(0), q_hat, q_alpha, temperature)


def test_complementary_loss_is_a_scalar(complementary_loss):
    for dtype in (torch.float64, torch.float32):
        arguments = [x.to(dtype) for x in (some_probs().log(), some_probs(), none_masked(), t(0.8, 0.2), t(0.4, 0.6))]
        check(is_tensor_of(complementary_loss(*arguments, 1.5), (), dtype),
              "one number comes out, a tensor without dimensions: float64 where float64 goes in, else float32")


def test_complementary_loss_takes_none_for_no_priors(complementary_loss):
    for logits in (some_probs().log(), some_logits()[:, :2][[0, 1, 2, 0]]):
        found = or_none(complementary_loss, logits, some_probs(), none_masked(), None, None, 1.5)
        equal = complementary_loss(logits, some_probs(), none_masked(), t(0.8, 0.2), t(0.8, 0.2), 1.5)
        check(close(found, equal), "None for the priors, like equal priors, leaves the logits alone")


def test_complementary_loss_does_not_write_into_its_arguments(complementary_loss):
    arguments = [some_probs().flip(1).log(), some_probs(), t(0, 1, 0, 1), t(0.8, 0.2), t(0.4, 0.6), torch.tensor(1.5)]
    check(keeps_its_input(complementary_loss, *arguments), "the tensors that were given are unchanged: no in-place "
          "operation on logits, probabilities, mask or priors")


def test_complementary_loss_of_masked_images_is_zero(complementary_loss):
    logits = some_probs().log().requires_grad_()
    found = complementary_loss(logits, some_probs(), torch.ones(4).double(), None, None, 1.5)
    check(close(found, 0.0, 0), "a masked image (M = 1) counts as zero: where all are masked the loss is 0, not NaN")
    if found.requires_grad:
        found.backward()
        check(close(logits.grad, torch.zeros(4, 2), 0), "a masked image sends no gradient")


def test_complementary_loss_is_the_cross_entropy_to_the_soft_label_at_t_one(complementary_loss):
    found = one(complementary_loss, [math.log(0.7), math.log(0.3)], [0.9, 0.1], 1.0)
    check(not close(found, -math.log(0.7)), "the label is the whole p(u), soft: not its argmax")
    check(not close(found, -0.7 * math.log(0.9) - 0.3 * math.log(0.1)), "p(u) is the label and f(W(u)) the "
          "prediction: not the other way round")
    check(not close(found, 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)),
          "it is the cross-entropy, not the KL divergence: the label's entropy is not subtracted")
    check(close(found, -0.9 * math.log(0.7) - 0.1 * math.log(0.3)),
          "at T = 1, without priors, it is the cross-entropy of the prediction to the label p(u)")


def test_complementary_loss_softens_the_label(complementary_loss):
    """p = (0.9, 0.1), T = 2: p^(1/2) is as 3 to 1, the label (3/4, 1/4). The prediction is (1/2, 1/2)."""
    logits = torch.zeros(1, 2).double().requires_grad_()
    found = complementary_loss(logits, t([0.9, 0.1]), t(0), None, None, 2.0)
    check(found.requires_grad, "the prediction learns: the logits of the strong view are not detached")
    found.backward()
    check(logits.grad is not None and logits.grad[0, 0] < 0, "the gradient draws the prediction towards the label")
    check(close(logits.grad[0, 0] / logits.grad[0, 1], -1, 1e-9), "the label is normalised after the power 1/T")
    check(close(logits.grad[0, 0], -0.25 / 2), "the label is p^(1/T) normalised, and the loss has no factor T or "
          "T^2: at f = (0, 0), p = (0.9, 0.1) and T = 2 the gradient is (1/2 - 3/4) / 2")


def test_complementary_loss_divides_the_prediction_by_t(complementary_loss):
    """f / T = (log 0.8, log 0.2), label (3/4, 1/4)."""
    found = one(complementary_loss, [2 * math.log(0.8), 2 * math.log(0.2)], [0.9, 0.1], 2.0)
    check(close(found, -0.75 * math.log(0.8) - 0.25 * math.log(0.2)),
          "the logits are divided by T, as the label is softened by T")


def test_complementary_loss_works_for_more_classes_than_two(complementary_loss):
    """T = 2, p as 16 : 4 : 1, label as 4 : 2 : 1; prediction (1/4, 1/4, 1/2)."""
    logits = [2 * math.log(0.25), 2 * math.log(0.25), 2 * math.log(0.5)]
    found = one(complementary_loss, logits, [16 / 21, 4 / 21, 1 / 21], 2.0)
    check(close(found, 6 / 7 * math.log(4) + 1 / 7 * math.log(2)), "the loss of a sample is a sum over its classes")


def test_complementary_loss_takes_a_temperature_between_whole_numbers(complementary_loss):
    label = [0.8 ** (2 / 3), 0.2 ** (2 / 3)]  # at T = 1.5, of p = (0.8, 0.2), not normalised
    label = [part / sum(label) for part in label]
    expected = -sum(part * math.log(part) for part in label)  # f = log p, so that prediction and label agree
    found = one(complementary_loss, [math.log(0.8), math.log(0.2)], [0.8, 0.2], 1.5)
    check(close(found, expected, 1e-6), "T need not be a whole number: p^(1/T) against f / T at T = 1.5")


def test_complementary_loss_is_least_where_the_prediction_is_the_label(complementary_loss):
    for temperature in (1.0, 1.5, 4.0):
        logits = some_probs().log().requires_grad_()
        complementary_loss(logits, some_probs(), none_masked(), None, None, temperature).backward()
        check(close(logits.grad, torch.zeros(4, 2), 1e-9), "the gradient is zero where f(W(u)) predicts p(u), at every "
              "T: label and prediction have the same temperature")


def test_complementary_loss_moves_by_the_log_ratio_before_t_divides(complementary_loss):
    """q_hat / q_alpha = (2, 1/3); f + log of it, divided by 2, is (log 0.8, log 0.2)."""
    q_hat, q_alpha = t(0.8, 0.2), t(0.4, 0.6)
    logits = [2 * math.log(0.8) - math.log(2), 2 * math.log(0.2) + math.log(3)]
    found = one(complementary_loss, logits, [0.9, 0.1], 2.0, q_hat, q_alpha)

    def loss_of(prediction):
        return (torch.tensor([-0.75, -0.25]) * torch.tensor(prediction).double().log_softmax(0)).sum()
    halves, ratio = [x / 2 for x in logits], [math.log(2), -math.log(3)]
    check(not close(found, loss_of(halves)), "with priors given, the log-ratio is added to the logits of the strong "
          "view")
    check(not close(found, loss_of([x + r for x, r in zip(halves, ratio)])),
          "the log-ratio is added before the division by T, not after")
    check(not close(found, loss_of([x - r / 2 for x, r in zip(halves, ratio)])),
          "the priors are swapped: q_hat is the source, q_alpha the target")
    check(close(found, loss_of([math.log(0.8), math.log(0.2)])), "only the prediction gets the log-ratio; "
          "the label comes from the raw p(u)")


def test_complementary_loss_speaks_where_the_mask_is_silent(complementary_loss):
    logits, parts = some_probs().flip(1).log(), []
    for i in range(4):
        mask = torch.ones(4).double()
        mask[i] = 0
        parts.append(complementary_loss(logits, some_probs(), mask, None, None, 1.5))
        alone = one(complementary_loss, logits[i].tolist(), some_probs()[i].tolist(), 1.5)
        check(not close(parts[-1], alone), "the mean runs over the whole batch, not over the selected images")
        check(close(parts[-1], alone / 4), "1 - M is the weight of an image: the loss counts where M is 0, and a "
              "masked image as zero in a mean over the whole batch")
    check(close(complementary_loss(logits, some_probs(), none_masked(), None, None, 1.5), sum(parts)),
          "where M is 0 throughout, every image counts, those of high confidence included")


def test_complementary_loss_sends_no_gradient_into_the_label(complementary_loss):
    logits, probs = some_probs().flip(1).log().requires_grad_(), some_probs().requires_grad_()
    complementary_loss(logits, probs, none_masked(), None, None, 1.5).backward()
    check(probs.grad is None or close(probs.grad, torch.zeros(4, 2), 0), "p(u) is a label: detach it, no gradient "
          "flows into the other view")


def test_complementary_loss_of_a_certain_label_is_finite(complementary_loss):
    logits = torch.zeros(1, 3).double().requires_grad_()
    found = complementary_loss(logits, t([1, 0, 0]), t(0), None, None, 1.4)
    check(close(found, math.log(3)), "a probability of exactly 0 stays finite: 0^(1/T) is 0, and 0 times a number is 0")
    found.backward()
    check(bool(logits.grad.isfinite().all()), "a probability of exactly 0 leaves the gradient finite")


def test_complementary_loss_takes_small_probabilities_as_they_are(complementary_loss):
    """T = 2, p = (1 - e, e), e = 1e-8: the label is as 1 to 1e-4."""
    found = one(complementary_loss, [20.0, -20.0], [1 - 1e-8, 1e-8], 2.0)
    check(close(found, 20 * 1e-4, 2e-5), "small probabilities are not clamped before the power 1/T")


def test_complementary_loss_of_large_logits_is_finite(complementary_loss):
    found = one(complementary_loss, [0.0, 2000.0], [0.9, 0.1], 2.0)
    check(close(found, 750.0), "large logits stay finite: take log_softmax, not the logarithm of a softmax")


def test_complementary_loss_takes_t_as_a_number_or_a_tensor(complementary_loss):
    found = [complementary_loss(some_probs().flip(1).log(), some_probs(), none_masked(), None, None, temperature)
             for temperature in (1.5, torch.tensor(1.5), t(1.5)[0])]
    check(all(close(f, found[0], 1e-6) and f.dtype == torch.float64 for f in found),
          "T may be a number or a tensor without dimensions")


def test_complementary_loss_stays_on_the_device(complementary_loss):
    arguments = [some_probs().log(), some_probs(), none_masked(), t(0.8, 0.2), t(0.4, 0.6), 1.5]
    check(stays_on_the_device(complementary_loss, *arguments), "tensors that you make lie on the device of the logits")


# ---------------------------------------------------------------------------------------------- weak

def chart(size):
    """(3, H, W) uint8: every pixel tells its row, its column, and its row once more, as 255 - row."""
    rows = torch.arange(size).view(-1, 1).expand(size, size)
    return torch.stack([rows, rows.T, 255 - rows]).to(torch.uint8)


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


def reflected(start, size):
    """The rows that a window of the reflected image shows: row -1 is row 1, row `size` is row size - 2."""
    rows = start[:, None] + torch.arange(size)
    return size - 1 - (size - 1 - rows.abs()).abs()


def even_draws(pad):
    """Sixteen draws for each of the (2 pad + 1)^2 crops: half of the last column is below a half."""
    n = 2 * pad + 1
    cells = torch.tensor([(i + part) / n for i in range(n) for part in (0.03, 0.97)])
    return torch.cartesian_prod(cells, cells, torch.tensor([0.01, 0.49, 0.51, 0.99]))


def views_of(weak, size, draws):
    return weak(chart(size).expand(len(draws), -1, -1, -1).clone(), draws)


def test_weak_returns_images_like_those_it_got(weak):
    found = views_of(weak, 16, torch.rand(5, 3))
    check(is_tensor_of(found, (5, 3, 16, 16), torch.uint8), "a view has the image's size, and its pixels stay uint8")


def test_weak_does_not_write_into_its_arguments(weak):
    check(keeps_its_input(weak, chart(16).repeat(6, 1, 1, 1), torch.tensor([[0.1, 0.9, 0.2], [0.7, 0.2, 0.8]] * 3)),
          "images and draws that were given are unchanged")


def test_weak_is_a_function_of_its_draws(weak):
    draws, before = torch.rand(8, 3), torch.get_rng_state()
    first = views_of(weak, 16, draws)
    unchanged = torch.equal(before, torch.get_rng_state())
    check(torch.equal(first, views_of(weak, 16, draws)) and unchanged, "the same draws give the same views: all "
          "chance comes from `draws`, no random numbers of your own")


def test_weak_moves_pixels_whole(weak):
    rows, columns, thirds = views_of(weak, 16, even_draws(2)).long().unbind(1)
    check(bool((rows < 16).all() and (columns < 16).all() and (thirds == 255 - rows).all()),
          "every pixel of a view is a pixel of the image, its three channels together: the border shows the image "
          "reflected, not black, and nothing is mixed or rounded")


def test_weak_crops_a_window(weak):
    views = views_of(weak, 16, even_draws(2))
    dy, dx, mirrored = crops(views).unbind(1)
    rows, columns = views[:, 0], views[:, 1]
    check(bool((rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all() and (mirrored >= 0).all()),
          "a view is a window of neighbouring rows and columns, mirrored left to right or not; it is not turned")
    check(bool((dy.abs() <= 2).all() and (dx.abs() <= 2).all()),
          "the window begins at most the pad away from the image's corner")


def test_weak_reflects_at_the_border(weak):
    for size, pad in ((16, 2), (32, 4)):
        views = views_of(weak, size, even_draws(pad)[::5])
        dy, dx, mirrored = crops(views).unbind(1)
        rows, columns = views[:, 0, :, 0].long(), views[:, 1, 0].long()
        columns = torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
        check(torch.equal(rows, reflected(dy, size)) and torch.equal(columns, reflected(dx, size)),
              "beyond the border the image is reflected and the edge row itself is not repeated: row -1 is row 1")


def test_weak_pads_an_eighth_of_the_image(weak):
    steps = torch.linspace(0.001, 0.999, 60)
    for size, pad in ((16, 2), (28, 3), (64, 8)):
        found = crops(views_of(weak, size, torch.stack([steps, steps.flip(0), steps], dim=1))).abs().amax(0)
        check(found[:2].tolist() == [pad, pad],
              "the pad is an eighth of the image's side, rounded down: 2 of 16, 3 of 28, 4 of 32, 8 of 64 pixels")


def test_weak_takes_every_crop_and_its_mirror_image_equally_often(weak):
    for size, pad in ((16, 2), (32, 4)):
        draws, n = even_draws(pad), 2 * pad + 1
        found = crops(views_of(weak, size, draws))
        dy, dx, mirrored = found.unbind(1)
        check(len(dy.unique()) == len(dx.unique()) == n, "a crop begins at any of 2 pad + 1 rows and columns, the last "
              "one included, each by a draw of its own")
        check(len(mirrored.unique()) == 2, "some views are mirrored left to right, some are not")
        check(mirrored.sum() * 2 == len(found), "half of the draws mirror the view")
        counts = found.unique(dim=0, return_counts=True)[1]
        check(len(counts) == n * n * 2, "row, column and mirror are drawn independently, each by its own column of "
              "the draws")
        check(bool((counts == 8).all()), "every place is equally likely: scale the draw by 2 pad + 1 and round down")


def test_weak_gives_each_image_its_own_draws(weak):
    draws = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    images = torch.stack([chart(16), chart(16).flip(1), chart(16).transpose(1, 2)]).repeat(4, 1, 1, 1)
    together = weak(images, draws)
    for i in range(12):
        check(torch.equal(together[i:i + 1], weak(images[i:i + 1], draws[i:i + 1])),
              "view i is image i under row i of the draws, whatever else is in the batch")


def test_weak_holds_at_the_ends_of_the_draws(weak):
    last = 1 - 2 ** -24  # the largest float32 below 1
    for size, pad in ((16, 2), (64, 8)):
        found = crops(views_of(weak, size, torch.tensor([[0.0, 0, 0], [last, last, last]])))[:, :2]
        check(bool((found.abs() == pad).all() and found[0, 0] == -found[1, 0]),
              "draws of 0 and of just below 1 are the first and the last place, not one beyond")


def test_weak_stays_on_the_device(weak):
    check(stays_on_the_device(weak, chart(16).repeat(6, 1, 1, 1), torch.rand(6, 3)),
          "tensors that you make, ranges included, lie on the device of the images")


# --------------------------------------------------------------------------------------- reliability

def certain(confidence, correct):
    """Predictions of class 0 of two, at a confidence, right or not: (probs, labels)."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.tensor(correct).long()


def test_reliability_returns_a_row_for_each_bin(reliability):
    probs, labels = certain([0.9, 0.6], [1, 0])
    check(tuple(reliability(probs, labels, 7).shape) == (7, 3), "(num_bins, 3): a row for each bin")
    check(tuple(reliability(probs, labels).shape) == (15, 3), "there are 15 bins unless another number is given")


def test_reliability_does_not_write_into_its_arguments(reliability):
    check(keeps_its_input(reliability, *certain([0.9, 0.6, 0.3], [1, 0, 1]), 5),
          "probabilities and labels that were given are unchanged")


def test_reliability_bins_by_the_largest_probability(reliability):
    probs = t([0.2, 0.7, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7])
    found = reliability(probs, torch.tensor([0, 0, 0]), 2)
    check(not close(found[:, 0], [2 / 3, 1 / 3]), "the confidence is the largest probability, not that of the true "
          "class")


def test_reliability_has_the_columns_share_accuracy_confidence(reliability):
    row = reliability(*certain([0.75] * 4, [1, 0, 0, 0]), 2)[1]
    check(not close(row, [1, 0.75, 0.25]), "the second column is the accuracy and the third the confidence, "
          "not the other way round")
    check(not close(row[0], 4), "the first column is the share of all samples, not their number")
    check(close(row, [1, 0.25, 0.75]), "the columns are share, accuracy, mean confidence: of four samples at 0.75, one "
          "of them right, they are 1, 0.25, 0.75")


def test_reliability_counts_shares_of_all_samples(reliability):
    found = reliability(*certain([0.9, 0.9, 0.9, 0.55], [1, 1, 0, 1]), 5)
    check(close(found[:, 0], [0, 0, 0.25, 0, 0.75]), "a bin's share is of all samples; bin k ends at (k + 1) / "
          "num_bins")
    check(close(found[4, 1], 2 / 3) and close(found[2, 1], 1), "a bin's accuracy is over its own samples")


def test_reliability_counts_the_class_of_the_largest_probability(reliability):
    probs = t([0.2, 0.7, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7])
    check(close(reliability(probs, torch.tensor([0, 0, 0]), 2)[1, :2], [1, 1 / 3]),
          "a sample is right where the class of the largest probability is its label")


def test_reliability_takes_means_within_a_bin(reliability):
    found = reliability(*certain([0.51, 0.53, 0.99], [1, 0, 1]), 4)
    check(not close(found[2, 2], 0.625), "the confidence of a bin is the mean over its samples, not its middle")
    check(close(found[2:, 1:], [[0.5, 0.52], [1, 0.99]]), "accuracy and confidence are means over the samples of a bin")


def test_reliability_leaves_zeros_in_empty_bins(reliability):
    found = reliability(*certain([0.9, 0.9], [1, 0]), 10)
    check(not bool(found.isnan().any()), "an empty bin is not NaN: do not divide by its number of samples, 0")
    check(close(found.sum(0), [1, 0.5, 0.9]), "an empty bin has share, accuracy and confidence 0")


def test_reliability_puts_an_edge_into_the_lower_bin(reliability):
    """Four classes, four bins; 0.25, 0.5, 0.75 and 1 have no rounding error."""
    probs = t([0.25] * 4, [0.5, 0.25, 0.25, 0], [0.75, 0.25, 0, 0], [1, 0, 0, 0])
    found = reliability(probs, torch.zeros(4).long(), 4)
    check(close(found[:, 2], [0.25, 0.5, 0.75, 1]) and close(found[:, 0], [0.25] * 4),
          "a bin is (lower, upper]: a confidence on an edge belongs to the bin below it, and 1 to the last bin")


def test_reliability_puts_zero_into_the_first_bin(reliability):
    found = reliability(torch.zeros(1, 2).double(), torch.tensor([0]), 4)
    check(close(found[:, 0], [1, 0, 0, 0]), "the first bin takes a confidence of 0, too")


def test_reliability_keeps_the_precision(reliability):
    found = reliability(*certain([0.9, 0.8, 0.7], [1, 0, 1]), 1)
    check(found.dtype == torch.float64 and close(found, [[1, 2 / 3, 0.8]], 1e-12), "float64 in, float64 out, and no "
          "float32 in between")


def test_reliability_loses_no_sample(reliability):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(500, 6, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    labels = torch.randint(0, 6, (500,), generator=generator)
    right = (probs.argmax(1) == labels).double().mean()
    for bins in (1, 7, 15, 100):
        share, accuracy, confidence = reliability(probs, labels, bins).unbind(1)
        check(close(share.sum(), 1, 1e-9), "every sample is in one bin: the shares sum to 1, for any number of bins")
        check(close((share * accuracy).sum(), right, 1e-9)
              and close((share * confidence).sum(), probs.amax(1).mean(), 1e-9),
              "accuracy and confidence of the bins, weighted by share, are those of the whole set")
        inside = share > 0
        upper = torch.arange(1, bins + 1) / bins
        check(bool(((confidence <= upper + 1e-6) & (confidence >= upper - 1 / bins - 1e-6))[inside].all()),
              "the bins have equal width and cover 0 to 1: the mean confidence of bin k is between its edges")


# ---------------------------------------------------------------------------------------- ema_update

def student(value=1.0):
    """A linear layer (2, 3) and a batch-norm, all parameters at one value."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
        model[1].running_mean.fill_(10 * value)
        model[1].running_var.fill_(20 * value)
        model[1].num_batches_tracked += 7


def test_ema_update_follows_a_sequence_worked_out_by_hand(EMA):
    model = student()
    average = EMA(model, 0.9)
    for value, expected in ((2.0, 1.1), (3.0, 1.29), (-1.0, 1.061)):
        fill(model, value)
        average.update(model)
        found = average.model[0].weight
        check(not close(found, torch.full((3, 2), value)), "the weights are averaged, not copied")
        check(close(found, torch.full((3, 2), expected)), "the average keeps `decay` of itself and takes in "
              "1 - decay of the model: 1, then 2, 3, -1 at decay 0.9 makes 1.1, 1.29, 1.061")


def test_ema_update_averages_every_parameter(EMA):
    model = student()
    average = EMA(model, 0.9)
    fill(model, 2.0)
    model[0].bias.requires_grad_(False)
    average.update(model)
    for name, parameter in average.model.named_parameters():
        check(close(parameter, torch.full_like(parameter, 1.1)), "every parameter is averaged: weights, biases, "
              f"batch-norm's, frozen ones (not so: {name})")


def test_ema_update_uses_its_own_decay(EMA):
    for decay, expected in ((0.0, 3.0), (0.5, 2.0), (0.75, 1.5)):
        model = student()
        average = EMA(model, decay)
        fill(model, 3.0)
        average.update(model)
        check(close(average.model[0].weight, torch.full((3, 2), expected)), "the decay is the one given to EMA, from "
              "the first update on: no warm-up, no correction of the start")


def test_ema_update_copies_buffers(EMA):
    model = student()
    average = EMA(model, 0.9)
    fill(model, 2.0)
    average.update(model)
    check(close(average.model[1].running_mean, [20.0] * 3) and close(average.model[1].running_var, [40.0] * 3),
          "batch-norm's statistics are copied, not averaged")
    check(average.model[1].num_batches_tracked.item() == 7 and
          average.model[1].num_batches_tracked.dtype == torch.int64, "batch-norm's counter is copied, an integer")


def test_ema_update_has_memory_of_its_own(EMA):
    model = student()
    average = EMA(model, 0.9)
    fill(model, 2.0)
    average.update(model)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    fill(model, 50.0)
    for name, value in average.model.state_dict().items():
        check(torch.equal(value, before[name]), "what the model learns later does not show in the average before its "
              f"next update: copy the values, do not share the tensor (shared: {name})")


def test_ema_update_changes_the_network_in_place(EMA):
    model = student()
    average = EMA(model, 0.9)
    network, parameters = average.model, [*average.model.parameters()]
    fill(model, 2.0)
    average.update(model)
    check(average.model is network, "average.model stays the same network: it is updated, not replaced")
    check(all(a is b for a, b in zip(average.model.parameters(), parameters)), "the parameters stay the same tensors: "
          "they are written in place, not bound to new ones")


def test_ema_update_leaves_the_model_alone(EMA):
    model = student()
    average = EMA(model, 0.9)
    fill(model, 2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.update(model)
    check(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()),
          "the model that learns is not changed by its average")
    check(model.training and all(p.requires_grad and p.is_leaf for p in model.parameters()),
          "the model that learns stays in training mode, with gradients")


def test_ema_update_builds_no_graph(EMA):
    model = student()
    average = EMA(model, 0.9)
    for value in (2.0, 3.0):
        fill(model, value)
        average.update(model)
    check(not any(p.requires_grad or p.grad_fn for p in average.model.parameters()),
          "the average is not part of a graph: update it under torch.no_grad()")
    check(not average.model.training, "the averaged network stays in evaluation mode")


# ---------------------------------------------------------------------------------- estimator_update

def test_estimator_update_follows_the_recursion(PriorEstimator):
    estimator = PriorEstimator(2, momentum=0.9)
    estimator.update(torch.tensor([[1.0, 0.0], [0.6, 0.4]]))
    check(close(estimator.q_hat, [0.53, 0.47]), "0.9 of the estimate stays and 0.1 of the batch's mean prediction "
          "comes in: (0.5, 0.5) and a mean of (0.8, 0.2) make (0.53, 0.47)")
    estimator.update(torch.tensor([[0.0, 1.0]]))
    check(close(estimator.q_hat, [0.477, 0.523]), "the next update goes on from the estimate, with the same momentum")


def test_estimator_update_uses_its_momentum(PriorEstimator):
    for momentum, expected in ((0.0, 1.0), (0.5, 0.75), (0.75, 0.625)):
        estimator = PriorEstimator(2, momentum)
        estimator.update(torch.tensor([[1.0, 0.0]] * 3))
        check(close(estimator.q_hat[0], expected), "the momentum is the one given to the estimator, and the size of "
              "the batch does not matter")


def test_estimator_update_takes_in_the_probabilities_themselves(PriorEstimator):
    estimator = PriorEstimator(3, 0.0)
    estimator.update(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]))
    check(close(estimator.q_hat, [0.4, 0.3, 0.3]), "the mean of the soft predictions comes in, uncertain ones too: "
          "no argmax, no threshold")


def test_estimator_update_forgets_a_wrong_start_by_halves(PriorEstimator):
    """0.5 ^ (1/10) per update: ten updates halve the distance to what the batches say."""
    estimator, probs = PriorEstimator(2, 0.5 ** 0.1), torch.tensor([[0.9, 0.1]] * 4)
    for expected in (0.4, 0.2, 0.1):
        check(close(0.9 - estimator.q_hat[0], expected, 1e-4), "the distance from a wrong start shrinks by the "
              "factor m at each update")
        for _ in range(10):
            estimator.update(probs)
    check(close(estimator.q_hat.sum(), 1, 1e-5), "the estimate stays a prior: it sums to 1")


def test_estimator_update_computes_t_at_the_first_ccr_step(PriorEstimator):
    estimator, probs = PriorEstimator(2, 0.5), torch.tensor([[0.9, 0.1]])
    before = estimator.temperature.item()
    for step in range(5):
        estimator.update(probs, first_ccr_step=step == 2)
        found = estimator.temperature
        if step < 2:
            check(close(found, before), "before the first CCR step T is not touched")
        else:  # Qhat = 0.9 - 0.4 / 8 = 0.85 after three updates, 0.8 after two
            check(not close(found, 0.5 / math.sqrt(0.8 * 0.2)), "the first CCR step updates Qhat first, then T from it")
            check(close(found, 0.5 / math.sqrt(0.85 * 0.15)),
                  "T is computed from Qhat at the first CCR step, and stays as it is in all later ones")
    check(close(estimator.q_hat[0], 0.9 - 0.4 / 32), "Qhat moves at every step, before and after T is computed")


def test_estimator_update_builds_no_graph(PriorEstimator):
    estimator = PriorEstimator(2, 0.9)
    probs = torch.tensor([[0.9, 0.1]], requires_grad=True)
    estimator.update(probs, first_ccr_step=True)
    check(not estimator.q_hat.requires_grad and not estimator.temperature.requires_grad,
          "the estimate is no part of a graph: no gradient flows through Qhat or T")
    check(close(probs, [[0.9, 0.1]], 1e-6), "the predictions that were given are unchanged")
    check({"q_hat", "temperature"} <= set(estimator.state_dict()), "Qhat and T stay buffers: a checkpoint holds them")


# ----------------------------------------------------------------------------------------- half_life

def test_half_life_halves_what_is_left(half_life):
    for momentum in (0.9, 0.99, 0.999, 0.5):
        exact = math.log(2) / -math.log(momentum)
        check(not close(half_life(momentum), 1 / (1 - momentum)) or momentum == 0.5,
              "after 1 / (1 - m) updates a share 1/e is left, not a half")
        check(any(close(half_life(momentum), n) for n in (exact, math.floor(exact + 1e-9), math.ceil(exact - 1e-9))),
              "n updates leave m^n of the difference: which n makes that a half? (at m = 0.999 it is about 693)")


# ----------------------------------------------------------------------------------------- at_target

def gaussians(prior):
    """log P(x, y) of two classes on a grid of x: Gaussians of deviation 1 at -1 and +1. (N, 2)"""
    x = torch.linspace(-7, 7, 14001, dtype=torch.float64)
    likelihood = torch.stack([-(x + 1) ** 2 / 2, -(x - 1) ** 2 / 2], dim=1).exp() / math.sqrt(2 * math.pi)
    return (likelihood * prior).log()


def accuracy_at(prior, logits):
    """The share of the probability mass, at a prior, whose class has the larger logit."""
    joint = gaussians(prior).exp()
    return (joint * torch.nn.functional.one_hot(logits.argmax(1), 2)).sum().item() * 14 / 14000


def test_at_target_reaches_bayes_accuracy_at_the_target(at_target):
    for source, target in ((t(0.9, 0.1), t(0.5, 0.5)), (t(0.9, 0.1), t(0.2, 0.8)), (t(0.5, 0.5), t(0.95, 0.05))):
        trained = gaussians(source)  # any classifier that is right at the source, up to a constant in each row
        best = accuracy_at(target, gaussians(target))
        found = accuracy_at(target, at_target(trained, source, target))
        check(found > accuracy_at(target, trained) - 1e-9, "at the target prior the moved classifier is worse than the "
              "one you began with: check the sign")
        check(found > best - 1e-4, "at the target prior the moved classifier is not as accurate as Bayes' classifier; "
              "the target need not be uniform")


def test_at_target_gives_the_posterior_at_the_target(at_target):
    source, target = t(0.7, 0.2, 0.1), t(0.1, 0.3, 0.6)
    likelihood = t([0.2, 0.5, 0.3], [0.6, 0.1, 0.4])
    for constant in (0.0, 5.0):
        found = at_target((likelihood * source).log() + constant, source, target)
        check(torch.is_tensor(found) and found.shape == (2, 3), "(N, K) in, (N, K) out, for any number of classes")
        joint = likelihood * target
        check(close(found.softmax(1), joint / joint.sum(1, keepdim=True)), "the softmax of the moved logits is the "
              "posterior P(y|x) at the target prior; logits go in, logits come out")


# ----------------------------------------------------------------------------- temperature_of_counts

def test_temperature_of_counts_is_a_ratio_of_means(temperature_of_counts):
    check(close(float(temperature_of_counts([5, 5, 5])), 1), "equal sizes have equal means: T is 1")
    check(close(float(temperature_of_counts([8, 1, 1])), 5 / 3), "sizes 8, 1, 1 have T = 5/3: one of the means is 10/3")
    check(close(float(temperature_of_counts([4, 1])), 1.25), "sizes 4 and 1 have T = 1.25")


def test_temperature_of_counts_does_not_depend_on_the_unit(temperature_of_counts):
    check(close(float(temperature_of_counts([1, 1000, 10])), float(temperature_of_counts([0.1, 1.0, 100.0]))),
          "neither the order of the classes nor a common factor matters")


def test_temperature_of_counts_holds_for_many_classes(temperature_of_counts):
    try:
        found = float(temperature_of_counts([4000, 1000] * 500))
    except OverflowError:
        found = math.inf
    check(close(found, 1.25), "the product of a thousand sizes is no float: take the mean of logarithms")


# ------------------------------------------------------------------------------------ gradient_limit

def test_gradient_limit_is_the_limit_of_ccrs_gradient(gradient_limit):
    from losses import complementary_loss
    pairs = [(t(1, -2, 0.5), t(0.7, 0.2, 0.1)), (t(3, 0), t(0.25, 0.75)), (t(0, 0, 0, 0), t(0.4, 0.3, 0.2, 0.1))]
    for logits, probs in pairs:
        power, limit = gradient_limit(logits, probs)
        for temperature in (1e4, 1e5):
            f = logits.clone().requires_grad_()
            complementary_loss(f[None], probs[None], t(0), None, None, temperature).backward()
            scaled = float(temperature) ** power * f.grad
            check(bool((scaled.abs() < 100).all()), "T^n times the gradient grows without bound: n is too large")
            check(bool((scaled.abs() > 1e-3).any()), "T^n times the gradient goes to zero: n is too small (both the "
                  "factor 1/T and the difference of the softmaxes shrink)")
            check(close(torch.as_tensor(limit).sum(), 0.0, 1e-9), "the limit sums to 0, as every gradient of a softmax "
                  "cross-entropy does")
            check(close(limit, scaled, 1e-3), "the limit is not that of the gradient: expand both softmaxes to first "
                  "order in 1/T, the one of f / T and the one of log p / T")


# ---------------------------------------------------------------------------------------- own_method

FAMILY = ["supervised", "fixmatch", "ccr", "udal", "flexda", "adello", "kd", "oracle"]


def own_rows(METHODS):
    import losses
    if METHODS is losses.METHODS and set(METHODS) == set(FAMILY) and not (ROOT / "answers.py").exists():
        pytest.skip("METHODS has the paper's rows")
    rows = {name: row for name, row in METHODS.items() if name not in FAMILY}
    check(rows, "METHODS in losses.py has no row of your own yet")
    return rows


def test_own_method_is_a_new_combination(METHODS):
    for name, row in own_rows(METHODS).items():
        check(type(row) is type(METHODS["adello"]), f"{name} is not a Method")
        check(row.target in (None, "p_labeled", "q_hat", "q_true"), f"{name}: the target is None or a prior that a "
              "step knows: p_labeled, q_hat, q_true")
        check(row.ccr in (None, "rest", "all"), f"{name}: ccr is None, 'rest' or 'all'")
        same = [other for other in METHODS if other != name and METHODS[other] == row]
        check(not same, f"{name} is {', '.join(same)} under another name")
    check(set(FAMILY) <= set(METHODS), "the paper's eight rows are still there")


def test_own_method_trains(METHODS):
    import train
    for name in own_rows(METHODS):
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            status = train.main(["--method", name, "--steps", "2", "--eval-every", "2", "--device", "cpu",
                                 "--compile", "off", "--out", str(Path(directory) / "run")])
        check(status == 0, f"python train.py --method {name} does not come to its end")

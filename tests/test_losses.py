"""losses.py and priors.py: the authors' numbers, gradients, and the identities that hold the family together.

What the paper's functions compute, one by one, is tested in test_exercises.py.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from losses import complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, imbalance_temperature, kl_divergence, smooth, uniform

CASES = json.loads((Path(__file__).parent / "reference_losses.json").read_text(encoding="utf-8"))["cases"]


def tensors(case):
    return {k: torch.tensor(v, dtype=torch.int64 if k == "labels" else torch.float64)
            for k, v in case.items() if isinstance(v, list)}


@pytest.fixture
def batch():
    """Strong logits, weak probabilities and their mask: (16, 5), (16, 5), (16,)."""
    torch.manual_seed(0)
    logits_strong = torch.randn(16, 5, dtype=torch.float64) * 3
    probs = (torch.randn(16, 5, dtype=torch.float64) * 4).softmax(1)
    return logits_strong, probs, confidence_mask(probs, 0.8)


def prior(*counts):
    counts = torch.tensor(counts, dtype=torch.float64)
    return counts / counts.sum()


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_authors_code_to_1e_6(case):
    t = tensors(case)
    alpha = alpha_schedule(case["step"], case["total_steps"], case["alpha_min"], case["d"])
    temperature = imbalance_temperature(t["q_hat"])
    q_alpha = smooth(t["q_hat"], alpha)
    probs = t["logits_weak"].softmax(1)
    mask = confidence_mask(probs, case["threshold"])
    estimator = PriorEstimator(len(t["q_hat"])).double()
    estimator.q_hat.copy_(t["q_hat"])
    estimator.update(probs)
    unlabeled = (t["logits_strong"], probs, mask, t["q_hat"], q_alpha)
    found = {"alpha": alpha, "temperature": temperature.item(), "mask": mask.tolist(),
             "supervised": supervised_loss(t["logits_labeled"], t["labels"], t["p_labeled"], q_alpha).item(),
             "consistency": consistency_loss(*unlabeled).item(),
             "complementary": complementary_loss(*unlabeled, temperature).item(),
             "q_hat_next": estimator.q_hat.tolist()}
    for name, value in case["expected"].items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_the_gradients_are_right():
    torch.manual_seed(1)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(6, 4, dtype=torch.float64).softmax(1)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = prior(8, 4, 2, 1), smooth(prior(1, 2, 3, 4), 0.4)
    mask = confidence_mask(probs, 0.4)
    assert torch.autograd.gradcheck(lambda f: supervised_loss(f, labels, p, q), logits)
    assert torch.autograd.gradcheck(lambda f: consistency_loss(f, probs, mask, p, q), logits)
    assert torch.autograd.gradcheck(lambda f: complementary_loss(f, probs, mask, p, q, 1.7), logits)


def test_alpha_one_leaves_fixmatch_unchanged(batch):
    q_hat = prior(5, 4, 3, 2, 1)
    assert torch.equal(consistency_loss(*batch, q_hat, smooth(q_hat, 1.0)), consistency_loss(*batch, None, None))


def test_q_hat_equal_to_p_labeled_turns_flexda_into_udal(batch):
    """UDAL's losses written out: P_L / P_L^alpha is P_L^(1 - alpha), up to a constant that softmax ignores."""
    logits, probs, mask = batch
    labels, p_labeled = torch.arange(16) % 5, prior(50, 20, 10, 5, 1)
    for alpha in (1.0, 0.6, 0.1):
        udal = logits + (1 - alpha) * p_labeled.log()
        q_alpha = smooth(p_labeled, alpha)                     # FlexDA's target, where Qhat is P_L
        for found, expected in (
                (supervised_loss(logits, labels, p_labeled, q_alpha), cross_entropy(udal, labels)),
                (consistency_loss(logits, probs, mask, p_labeled, q_alpha),
                 (mask * cross_entropy(udal, probs.argmax(1), reduction="none")).mean())):
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_uniform_priors_turn_everything_into_fixmatch(batch):
    """FixMatch's losses written out, and CCR's, which has T = 1 then."""
    logits, probs, mask = batch
    flat, labels = uniform(5, dtype=torch.float64), torch.arange(16) % 5
    q_alpha, temperature = smooth(flat, 0.3), imbalance_temperature(flat)
    hard = cross_entropy(logits, probs.argmax(1), reduction="none")
    soft = -(probs * logits.log_softmax(1)).sum(1)
    for found, expected in (
            (supervised_loss(logits, labels, flat, q_alpha), cross_entropy(logits, labels)),
            (consistency_loss(logits, probs, mask, flat, q_alpha), (mask * hard).mean()),
            (complementary_loss(logits, probs, mask, flat, q_alpha, temperature), ((1 - mask) * soft).mean())):
        torch.testing.assert_close(found, expected)


def test_the_labeled_loss_moves_from_p_labeled_to_q_alpha():
    """Training at P_L on f + log(P_L / Q_alpha) is least at the classifier whose raw f holds at Q_alpha.

    One feature of two values, two classes: the loss over the exact joint distribution has no gradient there.
    """
    likelihood = torch.tensor([[0.2, 0.7], [0.8, 0.3]], dtype=torch.float64)  # [x, y]
    p_labeled, q_alpha = prior(9, 1), prior(3, 7)
    f = (likelihood * q_alpha).log().requires_grad_()
    total = sum(likelihood[x, y] * p_labeled[y] * supervised_loss(f[x:x + 1], torch.tensor([y]), p_labeled, q_alpha)
                for x in range(2) for y in range(2))
    total.backward()
    assert f.grad.abs().max() < 1e-8


def test_the_two_masks_partition_the_batch(batch):
    """With T = 1 and one-hot weak predictions, L_u on M and L_uc on 1 - M add up to L_u on all."""
    logits, probs, _ = batch
    one_hot = torch.nn.functional.one_hot(probs.argmax(1), 5).double()
    mask = (torch.arange(16) % 3 == 0).double()
    hard = consistency_loss(logits, one_hot, mask, None, None)
    soft = complementary_loss(logits, one_hot, mask, None, None, 1.0)
    torch.testing.assert_close(hard + soft, consistency_loss(logits, one_hot, torch.ones(16), None, None))


def test_the_mask_takes_the_threshold_itself():
    assert confidence_mask(torch.tensor([[0.95, 0.05], [0.94, 0.06]]), 0.95).tolist() == [1, 0]


def test_kl_of_a_hand_computed_pair_and_of_zeros():
    """0 log 0 is 0; off the support the divergence is infinite."""
    assert kl_divergence(prior(1, 1), prior(1, 3)).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(prior(10, 5, 3, 2), prior(10, 5, 3, 2)).item() == 0
    assert kl_divergence(prior(1, 0), prior(1, 1)).item() == pytest.approx(math.log(2))
    assert kl_divergence(prior(1, 1), prior(1, 0)).item() == math.inf

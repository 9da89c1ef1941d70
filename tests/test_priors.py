"""priors.py: the schedule, the smoothed prior, the estimate and the temperature."""

import math

import pytest
import torch

from priors import (PriorEstimator, alpha_schedule, imbalance_temperature, kl_divergence, smooth, uniform)

Q = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


def test_alpha_runs_from_one_to_alpha_min():
    assert alpha_schedule(0, 1000) == 1
    assert alpha_schedule(1000, 1000, alpha_min=0.1) == pytest.approx(0.1)


def test_alpha_is_the_papers_quadratic():
    assert alpha_schedule(500, 1000, alpha_min=0.1, d=2) == pytest.approx(1 - 0.9 / 4)


def test_alpha_falls_at_every_step():
    values = [alpha_schedule(t, 100, 0.55, 1.5) for t in range(101)]
    assert all(a > b for a, b in zip(values, values[1:]))


def test_smoothing_keeps_the_prior_at_one_and_forgets_it_at_zero():
    torch.testing.assert_close(smooth(Q, 1.0), Q)
    torch.testing.assert_close(smooth(Q, 0.0), uniform(4, dtype=torch.float64))


def test_smoothing_takes_the_power_of_every_ratio():
    smoothed = smooth(Q, 0.3)
    assert smoothed.sum().item() == pytest.approx(1)
    assert (smoothed[0] / smoothed[3]).item() == pytest.approx(5 ** 0.3)


def test_smoothing_never_moves_away_from_uniform():
    distances = [kl_divergence(uniform(4, dtype=torch.float64), smooth(Q, a / 10)).item() for a in range(11)]
    assert distances == sorted(distances)


def test_kl_of_a_hand_computed_pair():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_kl_is_zero_for_equal_priors_counts_zero_log_zero_as_zero_and_is_infinite_off_the_support():
    assert kl_divergence(Q, Q).item() == 0
    assert kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2))
    assert kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item() == math.inf


def test_temperature_is_one_at_a_uniform_prior_and_rises_with_imbalance():
    assert imbalance_temperature(uniform(10)).item() == pytest.approx(1)
    values = []
    for gamma in (1, 2, 10, 100):
        counts = torch.tensor([gamma ** (-k / 9) for k in range(10)], dtype=torch.float64)
        values.append(imbalance_temperature(counts / counts.sum()).item())
    assert values == sorted(values) and values[-1] > values[0] + 0.5


def test_temperature_of_a_long_tail_equals_the_ratio_of_means():
    """exp KL(P_bal || Q) = (1/K) / geometric mean of Q: arithmetic over geometric mean of the counts."""
    counts = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    assert imbalance_temperature(counts / counts.sum()).item() == pytest.approx(37 / 10)


def test_the_estimate_starts_uniform_and_follows_the_recursion():
    estimator = PriorEstimator(2, momentum=0.9)
    assert estimator.q_hat.tolist() == [0.5, 0.5]
    estimator.update(torch.tensor([[1.0, 0.0], [0.6, 0.4]]))
    torch.testing.assert_close(estimator.q_hat, torch.tensor([0.53, 0.47]))
    estimator.update(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(estimator.q_hat, torch.tensor([0.477, 0.523]))


def test_the_estimate_stays_a_prior_and_converges_to_what_it_is_shown():
    estimator, probs = PriorEstimator(4, momentum=0.99), Q.float()[None].expand(8, 4)
    for _ in range(2000):
        estimator.update(probs)
    assert estimator.q_hat.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(estimator.q_hat, Q.float())


def test_the_temperature_is_read_in_the_first_ccr_step_after_its_update_and_never_again():
    estimator, probs = PriorEstimator(2, momentum=0.5), torch.tensor([[0.9, 0.1]])
    for step in range(5):
        estimator.update(probs, torch.tensor(step >= 2))
        if step == 2:  # Qhat_3 = .9 - .4 / 8 = .85
            read = (0.25 / (0.85 * 0.15)) ** 0.5  # exp KL(P_bal || q) = (1/2) / geometric mean
        assert estimator.temperature.item() == pytest.approx(1 if step < 2 else read)
    assert estimator.q_hat[0].item() == pytest.approx(0.9 - 0.4 / 32)


def test_the_estimates_state_travels():
    first, second = PriorEstimator(4, 0.9), PriorEstimator(4, 0.9)
    first.update(torch.eye(4)[:1], True)
    second.load_state_dict(first.state_dict())
    for estimator in (first, second):
        estimator.update(torch.eye(4)[1:2], True)
    assert torch.equal(first.q_hat, second.q_hat) and torch.equal(first.temperature, second.temperature)


def test_a_prior_with_an_entry_near_1e_minus_9_stays_finite():
    q = torch.tensor([1e-9, 0.5, 0.5 - 1e-9])
    assert imbalance_temperature(q).isfinite() and smooth(q, 0.1).isfinite().all()

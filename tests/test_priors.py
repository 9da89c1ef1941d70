"""priors.py: divergence, and the estimate over a training. What the paper's functions compute, one by one, is
tested in test_exercises.py."""

import math

import pytest
import torch

from priors import PriorEstimator, imbalance_temperature, kl_divergence, smooth, uniform

Q = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


def test_smoothing_moves_from_uniform_to_the_prior_with_every_tenth_of_alpha():
    distances = [kl_divergence(uniform(4, dtype=torch.float64), smooth(Q, a / 10)).item() for a in range(11)]
    assert all(nearer < further for nearer, further in zip(distances, distances[1:]))
    assert distances[0] == 0 and distances[10] == pytest.approx(kl_divergence(uniform(4, dtype=torch.float64), Q).item())


def test_kl_of_a_hand_computed_pair():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_kl_is_zero_for_equal_priors_counts_zero_log_zero_as_zero_and_is_infinite_off_the_support():
    assert kl_divergence(Q, Q).item() == 0
    assert kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2))
    assert kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item() == math.inf


def test_temperature_rises_with_imbalance():
    values = []
    for gamma in (1, 2, 10, 100):
        counts = torch.tensor([gamma ** (-k / 9) for k in range(10)], dtype=torch.float64)
        values.append(imbalance_temperature(counts / counts.sum()).item())
    assert values == sorted(values) and values[-1] > values[0] + 0.5


def test_the_estimate_starts_uniform_with_t_at_one():
    estimator = PriorEstimator(2)
    assert estimator.q_hat.tolist() == [0.5, 0.5] and estimator.temperature.item() == 1


def test_the_estimate_stays_a_prior_and_converges_to_what_it_is_shown():
    estimator, probs = PriorEstimator(4, momentum=0.99), Q.float()[None].expand(8, 4)
    for _ in range(2000):
        estimator.update(probs)
    assert estimator.q_hat.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(estimator.q_hat, Q.float())


def test_the_estimates_state_travels():
    first, second = PriorEstimator(4, 0.9), PriorEstimator(4, 0.9)
    first.update(torch.eye(4)[:1], first_ccr_step=True)
    second.load_state_dict(first.state_dict())
    for estimator in (first, second):
        estimator.update(torch.eye(4)[1:2])
    assert torch.equal(first.q_hat, second.q_hat) and torch.equal(first.temperature, second.temperature)


def test_a_prior_with_an_entry_near_1e_minus_9_stays_finite():
    q = torch.tensor([1e-9, 0.5, 0.5 - 1e-9])
    assert imbalance_temperature(q).isfinite() and smooth(q, 0.1).isfinite().all()

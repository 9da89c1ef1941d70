"""Class priors: the schedule, the smoothed target, the estimate and the temperature.

Paper, section 4; how the priors enter the training signal is in losses.py. A prior is a (K,)
tensor that sums to 1; P_bal = 1/K.
"""

import torch


def alpha_schedule(step, total_steps, alpha_min=0.1, d=2.0):
    """How much of Qhat is left in the target, alpha_t = 1 - (1 - alpha_min) (t / T_max)^d.

    step: t, 0 .. total_steps; alpha_min: in [0, 1]; d: > 0, 1 is linear, 2 the paper's quadratic.
    Returns a float in [alpha_min, 1].
    """
    return 1.0 - (1.0 - alpha_min) * (step / total_steps) ** d


def smooth(q, alpha):
    """The smoothed target prior, Q_alpha(y) = Q(y)^alpha / sum_j Q(j)^alpha; in FlexDA, Q is Qhat.

    q: (K,) prior; alpha: 1 keeps q, 0 gives the uniform prior. Returns (K,), sums to 1.
    """
    powered = q ** alpha
    return powered / powered.sum()


def kl_divergence(p, q):
    """Kullback-Leibler divergence KL(p || q) = sum_y p(y) log( p(y) / q(y) ), with 0 log 0 = 0.

    p, q: (K,) priors. Returns a scalar tensor >= 0 in nats, infinite where q = 0 < p.
    """
    # xlogy(0, 0) is 0, where 0 * log(0) is NaN; rounding could end just below 0
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().clamp(min=0)


def uniform(num_classes, device=None, dtype=None):
    """P_bal(y) = 1/K, the prior of the balanced test set. Returns (K,)."""
    return torch.full((num_classes,), 1.0 / num_classes, device=device, dtype=dtype)


def imbalance_temperature(q_hat):
    """CCR's temperature, T = exp( KL(P_bal || Qhat) ): 1 at a uniform Qhat, above it otherwise.

    q_hat: (K,) prior. Returns a scalar tensor >= 1.
    """
    p_balanced = uniform(len(q_hat), q_hat.device, q_hat.dtype)
    return kl_divergence(p_balanced, q_hat).exp()


class PriorEstimator(torch.nn.Module):
    """Running estimate of the unlabeled prior Q from the network's own weak predictions, and T.

        Qhat_0 = 1/K,    Qhat <- m Qhat + (1 - m) mean_u p(u)

    num_classes: K; momentum: m in [0, 1). Buffers, which a checkpoint carries: `.q_hat` (K,) and
    `.temperature`, CCR's T, 1 until it is computed.
    """

    def __init__(self, num_classes, momentum=0.999, device=None):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("q_hat", uniform(num_classes, device))
        self.register_buffer("temperature", torch.ones((), device=device))

    @torch.no_grad()
    def update(self, probs, first_ccr_step=False):
        """Take in a step's weak predictions; in the first CCR step, compute T from the new Qhat.

        probs: (N, K), rows sum to 1; first_ccr_step: True once in a training, so T stays fixed.
        """
        self.q_hat.mul_(self.momentum).add_(probs.mean(dim=0), alpha=1.0 - self.momentum)
        if first_ccr_step:
            self.temperature.copy_(imbalance_temperature(self.q_hat))

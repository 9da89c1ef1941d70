"""Class priors: the schedule, the smoothed target, the estimate and the temperature.

The half of the method (paper, section 4) that never sees an image. K classes, P_bal = 1/K:

    alpha_t    = 1 - (1 - alpha_min) (t / T_max)^d            how much of Qhat is left at step t
    Qhat_a(y)  = Qhat(y)^alpha / sum_j Qhat(j)^alpha          target prior, from Qhat to uniform
    Qhat      <- m Qhat + (1 - m) mean_u p(u)                 estimate of the unlabeled prior Q
    T          = exp( KL(P_bal || Qhat) )                     imbalance-aware temperature

How these enter the training signal is in losses.py. A prior is a (K,) tensor that sums to 1.
"""

import torch


def check_prior(q, name="prior"):
    """Raise ValueError, with the shape and the value, unless q is (K,), finite, >= 0 and sums to 1.

    Looks at tensors on the CPU only: reading a value from an accelerator would stall its queue.
    """
    if q.ndim != 1 or q.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(q.shape)}; it must be (K,) with K >= 1")
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not (q >= 0).all() or abs(q.sum().item() - 1) > 1e-3:  # a NaN fails the first comparison
        raise ValueError(f"{name} of shape {tuple(q.shape)} is {q.tolist()}; "
                         f"its entries must be >= 0 and sum to 1, they sum to {q.sum().item():g}")


def alpha_schedule(step, total_steps, alpha_min=0.1, d=2.0):
    """Share of the estimated prior that is left in the target at a step (paper, eq. for alpha_t).

        alpha_t = 1 - (1 - alpha_min) (t / T_max)^d

    step: 0 .. total_steps; alpha_min: in [0, 1]; d: > 0, 1 is linear, 2 the paper's quadratic.
    Returns a float in [alpha_min, 1]. Raises ValueError outside these ranges.
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step {step} is outside 0..{total_steps}")
    if not 0 <= alpha_min <= 1 or not d > 0:
        raise ValueError(f"alpha_min {alpha_min} must be in [0, 1] and d {d} above 0")
    return 1.0 - (1.0 - alpha_min) * (step / total_steps) ** d


def smooth(q, alpha):
    """FlexDA's target prior, Q_alpha(y) = Q(y)^alpha / sum_j Q(j)^alpha.

    q: (K,) prior; alpha: number or 0-d tensor, 1 keeps q and 0 gives the uniform prior.
    Returns (K,), sums to 1. Raises ValueError when q is no prior.
    """
    check_prior(q, "q")
    powered = q ** alpha
    return powered / powered.sum()


def kl_divergence(p, q):
    """Kullback-Leibler divergence KL(p || q) = sum_y p(y) log( p(y) / q(y) ), with 0 log 0 = 0.

    p, q: (K,) priors. Returns a scalar tensor >= 0 in nats, infinite where q = 0 < p.
    Raises ValueError when one is no prior or the lengths differ.
    """
    check_prior(p, "p")
    check_prior(q, "q")
    if p.shape != q.shape:
        raise ValueError(f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}; they must be equal")
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().clamp(min=0)


def uniform(num_classes, device=None, dtype=None):
    """P_bal(y) = 1/K, the prior of the balanced test set. Returns (K,)."""
    return torch.full((num_classes,), 1.0 / num_classes, device=device, dtype=dtype)


def imbalance_temperature(q_hat):
    """CCR's temperature, T = exp( KL(P_bal || Qhat) ): 1 at a uniform Qhat, above it otherwise.

    q_hat: (K,) prior. Returns a scalar tensor >= 1. The training loop reads it once, at the first
    step that uses complementary consistency, and keeps it from then on.
    Raises ValueError when q_hat is no prior.
    """
    check_prior(q_hat, "q_hat")
    balanced = uniform(q_hat.numel(), q_hat.device, q_hat.dtype)
    return kl_divergence(balanced, q_hat).exp()


class PriorEstimator(torch.nn.Module):
    """Running estimate of the unlabeled prior Q from the network's own weak predictions.

        Qhat_0 = 1/K,    Qhat <- m Qhat + (1 - m) mean_u p(u)

    num_classes: K; momentum: m in [0, 1). `.q_hat` is the (K,) estimate. It is a Module for its
    buffer alone, so that state_dict, device and dtype are PyTorch's.
    """

    def __init__(self, num_classes, momentum=0.999, device=None):
        super().__init__()
        if num_classes < 1 or not 0 <= momentum < 1:
            raise ValueError(f"num_classes {num_classes} must be positive, momentum {momentum} "
                             "in [0, 1)")
        self.momentum = momentum
        self.register_buffer("q_hat", uniform(num_classes, device))

    @torch.no_grad()
    def update(self, probs):
        """Take in a batch of weak predictions; probs: (N, K), rows sum to 1."""
        if probs.ndim != 2 or probs.shape[1] != self.q_hat.numel() or len(probs) == 0:
            raise ValueError(f"probs has shape {tuple(probs.shape)}; it must be "
                             f"(N, {self.q_hat.numel()}) with N >= 1")
        self.q_hat.mul_(self.momentum).add_(probs.mean(0), alpha=1.0 - self.momentum)

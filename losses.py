"""The losses of ADELLO and of its family (paper, section 4).

    L = L_s + L_u + L_uc,  L_uc from the warm-up step on

    L_s  = mean_b          H( y_b,         sigma( f(w(x_b)) + log(P_L / Q_alpha) ) )
    L_u  = mean_u M(u)     H( yhat(u),     sigma( f(W(u)) + log(Qhat / Q_alpha) ) )
    L_uc = mean_u (1-M(u)) H( p(u)^(1/T),  sigma( (f(W(u)) + log(Qhat / Q_alpha)) / T ) )

f = logits, w / W = weak / strong view, sigma = softmax, H = cross-entropy; p(u) = sigma(f(w(u))) is
the weak prediction, yhat(u) its argmax, and p(u)^(1/T) is normalised. Means run over the whole
batch: a sample whose factor M or 1 - M is 0 still counts in the denominator. METHODS says which
prior alpha_t smooths to Q_alpha (`q_alpha`); Qhat and T: priors.py. float64 in, float64 out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

EPS = 1e-9  # the authors' code: log((a + 1e-9) / (b + 1e-9))


class Method(NamedTuple):
    """A row of the family: one formula, other priors. Without a target nothing is adjusted."""
    target: str             # the prior that alpha_t smooths to Q_alpha, or None
    ccr: str                # samples of L_uc: the "rest", where M = 0, "all", or None
    unlabeled: bool = True  # whether it learns from unlabeled images at all


METHODS = {
    "supervised": Method(target=None, ccr=None, unlabeled=False),
    "fixmatch": Method(target=None, ccr=None),       # Sohn et al. 2020
    "ccr": Method(target=None, ccr="rest"),          # FixMatch + CCR
    "udal": Method(target="p_labeled", ccr=None),    # Lazarow et al. 2023
    "flexda": Method(target="q_hat", ccr=None),
    "adello": Method(target="q_hat", ccr="rest"),    # FlexDA + CCR
    "kd": Method(target="q_hat", ccr="all"),         # ablation: distil every sample
    "oracle": Method(target="q_true", ccr="rest"),   # analysis: the true prior as the target
}


def adjust(logits, source, target):
    """Logit adjustment (Menon et al. 2021): f + log( (source + eps) / (target + eps) ).

    f is to be the classifier for class prior `target`, but the batch has prior `source`. By Bayes'
    rule the sum is the same classifier for `source`, so it is the sum that the cross-entropy on
    the batch fits, and f alone ends up at `target`.

    logits: (N, K); source, target: (K,) priors, or both None for no adjustment. Returns (N, K).
    """
    if source is None and target is None:
        return logits
    return logits + torch.log((source + EPS) / (target + EPS))


def confidence_mask(probs, threshold=0.95):
    """M(u) = 1[ max_y p(y|u) >= threshold ]: 1 where the hard pseudo-label counts.

    probs: (N, K), rows sum to 1. Returns (N,) of 0 and 1.
    """
    return (probs.amax(dim=1) >= threshold).to(probs.dtype)


def supervised_loss(logits, labels, p_labeled, q_alpha):
    """FlexDA on labeled data, L_s = mean_b H( y_b, sigma( f(w(x_b)) + log(P_L / Q_alpha) ) ).

    logits: (B, K); labels: (B,) int64; p_labeled, q_alpha: (K,) or both None. Returns a scalar.
    """
    return F.cross_entropy(adjust(logits, p_labeled, q_alpha), labels)


def consistency_loss(logits_strong, probs_weak, mask, q_hat, q_alpha):
    """FlexDA where the network is confident: hard pseudo-labels yhat = argmax p(u).

        L_u = mean_u M(u) H( yhat(u), sigma( f(W(u)) + log(Qhat / Q_alpha) ) )

    logits_strong, probs_weak: (N, K), the latter without gradient; mask: (N,) M; q_hat, q_alpha:
    (K,) priors or both None (FixMatch). Returns a scalar.
    """
    pseudo_labels = probs_weak.detach().argmax(dim=1)
    adjusted = adjust(logits_strong, q_hat, q_alpha)
    losses = F.cross_entropy(adjusted, pseudo_labels, reduction="none")
    return (losses * mask).mean()


def complementary_loss(logits_strong, probs_weak, mask, q_hat, q_alpha, temperature):
    """Complementary consistency (CCR): soft pseudo-labels where M = 0.

        L_uc = mean_u (1 - M(u)) H( p(u)^(1/T) / sum_j p_j(u)^(1/T),
                                    sigma( (f(W(u)) + log(Qhat / Q_alpha)) / T ) )

    logits_strong, probs_weak: (N, K); mask: (N,) M, of which 1 - M is applied here (zeros distil
    every sample, the paper's KD ablation); q_hat, q_alpha: (K,) priors or both None; temperature:
    T > 0, a number or a 0-d tensor. Returns a scalar.
    """
    soft_labels = F.softmax(probs_weak.detach().log() / temperature, dim=1)  # p^(1/T), normalised
    adjusted = adjust(logits_strong, q_hat, q_alpha)
    log_probs = F.log_softmax(adjusted / temperature, dim=1)
    losses = -(soft_labels * log_probs).sum(dim=1)
    return (losses * (1 - mask)).mean()

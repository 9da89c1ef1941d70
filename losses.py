"""The three losses of ADELLO, the logit adjustment under them, and the family (paper, section 4).

f = logits, w / W = weak / strong view, sigma = softmax, H = cross-entropy, p(u) = sigma(f(w(u))):

    L_s, L_u and L_uc below; all means run over the whole batch: a masked sample counts as zero

Where the priors come from is in priors.py, the step in train.py. float64 in, float64 out.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F

EPS = 1e-9  # the authors' code: log((a + 1e-9) / (b + 1e-9))

# One formula, other priors. consistency: whether there is L_u; source: the prior of the unlabeled
# data, numerator in L_u (in L_s it is P_L); target: the prior that alpha_t smooths, denominator in
# L_s and L_u; ccr: soft pseudo-labels, on the "rest" that L_u masks or on "all".
Method = namedtuple("Method", "consistency source target ccr")
METHODS = {
    "supervised": Method(False, None, None, None),
    "fixmatch": Method(True, None, None, None),              # Sohn et al. 2020
    "ccr": Method(True, None, None, "rest"),                 # FixMatch + CCR
    "udal": Method(True, "q_hat", "p_labeled", None),        # Lazarow et al. 2023
    "flexda": Method(True, "q_hat", "q_hat", None),
    "adello": Method(True, "q_hat", "q_hat", "rest"),        # FlexDA + CCR
    "kd": Method(True, "q_hat", "q_hat", "all"),             # ablation: distil on every sample
    "oracle": Method(True, "q_hat", "q_true", "rest")}       # analysis: the true prior as target


def adjust(logits, source, target):
    """Logit adjustment: make logits that were learned at `source` act at `target` in the loss.

        f + log( (source + eps) / (target + eps) ),   eps = 1e-9

    Raw logits then fit prior `target` (Menon et al. 2021). logits: (N, K); source, target: (K,)
    priors, or both None for no adjustment. Returns (N, K).
    """
    if source is None and target is None:
        return logits
    return logits + torch.log((source + EPS) / (target + EPS))


def confidence_mask(probs, threshold=0.95):
    """M(u) = 1[ max_y p(y|u) >= threshold ]. probs: (N, K), rows sum to 1. Returns (N,) of 0, 1."""
    return (probs.amax(dim=1) >= threshold).to(probs.dtype)


def supervised_loss(logits, labels, p_labeled, q_smooth):
    """FlexDA on labeled data, L_s = mean_b H( y_b, sigma( f(w(x_b)) + log P_L / Qhat_a ) ).

    logits: (B, K); labels: (B,) int64; p_labeled, q_smooth: (K,) or both None. Returns a scalar.
    """
    return F.cross_entropy(adjust(logits, p_labeled, q_smooth), labels)


def consistency_loss(logits_strong, probs_weak, mask, q_hat, q_smooth):
    """FlexDA where the network is confident.

        L_u = mean_u M(u) H( yhat, sigma( f(W(u)) + log Qhat / Qhat_a ) ),    yhat = argmax p(u)

    logits_strong, probs_weak: (N, K), the latter without gradient; mask: (N,) M; q_hat, q_smooth:
    (K,) priors or both None (FixMatch). Returns a scalar.
    """
    pseudo_labels = probs_weak.detach().argmax(dim=1)
    loss = F.cross_entropy(adjust(logits_strong, q_hat, q_smooth), pseudo_labels, reduction="none")
    return (loss * mask).mean()


def complementary_loss(logits_strong, probs_weak, mask, q_hat, q_smooth, temperature):
    """Complementary consistency (CCR): soft pseudo-labels where L_u is silent.

        L_uc = mean_u (1 - M(u)) H( p(u)^(1/T) / sum_j p_j(u)^(1/T),
                                    sigma( (f(W(u)) + log Qhat / Qhat_a) / T ) )

    logits_strong, probs_weak: (N, K); mask: (N,) M, of which 1 - M is applied here (all zeros
    distils on every sample, the paper's KD ablation); q_hat, q_smooth: (K,) priors or both None;
    temperature: T, number or 0-d tensor, > 0. Returns a scalar.
    """
    soft_labels = F.softmax(probs_weak.detach().log() / temperature, dim=1)  # p^(1/T), normalised
    log_probs = F.log_softmax(adjust(logits_strong, q_hat, q_smooth) / temperature, dim=1)
    return (-(soft_labels * log_probs).sum(dim=1) * (1 - mask)).mean()

"""DebiasPL (Wang et al. 2022), as the repository of ADELLO's authors runs it: FixMatch with its bias taken off.

    p_hat   <- m p_hat + (1 - m) mean_u p(u)             from 1/K: the estimate Qhat of priors.py
    yhat, M  = argmax and confidence mask of q(u) = sigma( f(w(u)) - tau log p_hat ), with this step's p_hat
    L_u      = mean_u M(u) H( yhat(u), sigma( f(W(u)) + tau' log p_hat ) ), with the p_hat from before this step

The labeled loss and the evaluation are FixMatch's.
"""

import train
from losses import EPS, confidence_mask, consistency_loss, supervised_loss
from methods.fixmatch import figures, forward

TAU = 0.5
TAU_LOSS = 0.4  # tau': the options there say 0.5, but the constructor ignores them


def debias(logits_weak, p_hat):
    """q(u): pseudo-labels move from the classes that are predicted often to the others. (U, K), rows sum to 1."""
    return (logits_weak - TAU * (p_hat + EPS).log()).softmax(dim=1)


def marginal_loss(logits_strong, debiased, mask, p_hat):
    """L_u, with a larger margin for the classes that are predicted often."""
    return consistency_loss(logits_strong + TAU_LOSS * (p_hat + EPS).log(), debiased, mask, None, None)


class DebiasPL(train.Run):
    """p_hat is the run's Qhat."""

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        logits_labeled, logits_weak, logits_strong = forward(self, labeled, unlabeled, draws)
        logits_weak = logits_weak.detach()
        p_hat = self.estimator.q_hat.clone()                          # from before this step
        self.estimator.update(logits_weak.softmax(dim=1))
        debiased = debias(logits_weak, self.estimator.q_hat)
        mask = confidence_mask(debiased, self.config.threshold)

        loss_s = supervised_loss(logits_labeled, labels, None, None)
        loss_u = marginal_loss(logits_strong, debiased, mask, p_hat)
        self.update(loss_s + loss_u)
        return figures(loss_s, loss_u, mask, debiased.argmax(dim=1), hidden_labels)

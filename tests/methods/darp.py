"""DARP (Kim et al. 2020): pseudo-labels refined so that their counts fit a prior, here N P_L.

The last p(u) of every unlabeled image are kept. From two fifths of the steps on (the authors' 200 of 500 epochs),
every 10 steps, they are refined; pseudo-labels come from there, the mask M from the raw p(u), as in the authors' code.
"""

import torch
import torch.nn.functional as F

import data
import train
from losses import confidence_mask, consistency_loss, supervised_loss
from methods.fixmatch import figures, forward


def refine(probs, counts, alpha=2.0, rounds=200):
    """The matrix near probs (N, K) with row sums 1 and column sums counts (K,).

    Of column k the alpha N_k largest entries are kept, scaled to the sum N_k, rows normalised: A, of row entropies h_u.

        A_uk / e X_u exp(-nu_k h_u):    X from the row sums, nu_k by bounded Newton on the log column sum, in turn
    """
    probs = probs.double()
    counts = counts.double().clamp(min=1e-6)
    place = probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)       # 0 = the largest of its column
    kept = torch.where(place < alpha * counts, probs, 0.0)
    A = F.normalize((kept + 1e-6) * (counts + 1e-6) / (kept.sum(0) + 1e-6), p=1, dim=1)
    h = torch.special.entr(A).sum(1, keepdim=True).clamp(min=1e-3)                  # (N, 1)

    log_A = A.log() - 1
    nu = torch.zeros_like(counts)
    for _ in range(rounds):
        log_X = -torch.logsumexp(log_A - nu * h, dim=1, keepdim=True)
        for _ in range(30):
            logs = log_A + log_X - nu * h
            excess = torch.logsumexp(logs, dim=0) - counts.log()
            if excess.abs().max() < 1e-3:
                break
            slope = (logs.softmax(dim=0) * h).sum(0)
            nu = nu + (excess / slope).clamp(-10, 10)
        result = (log_A - nu * h).softmax(dim=1)
        if ((result.sum(0) - counts).abs() / counts.clamp(min=1)).max() < 1e-4:
            break
    return result.float()


class DARP(train.Run):
    """The kept and the refined predictions, (N, K), begin at 1/K; the estimator carries them into the checkpoint."""

    def __init__(self, config):
        super().__init__(config)
        kept = self.estimator.q_hat.repeat(len(self.sets.unlabeled), 1)
        self.estimator.register_buffer("kept", kept)
        self.estimator.register_buffer("refined", kept.clone())

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        """The log's pseudo-label accuracy is that of the raw p(u)."""
        config = self.config
        logits_labeled, logits_weak, logits_strong = forward(self, labeled, unlabeled, draws)
        probs = logits_weak.detach().softmax(dim=1)                   # p(u), (U, K)
        mask = confidence_mask(probs, config.threshold)               # M(u), (U,)
        self.estimator.update(probs)                                  # Qhat, for the log

        # the pseudo-labels of this step's images: raw at first, then out of the refined matrix
        kept = self.estimator.kept
        refined = self.estimator.refined
        index = data.batch_indices(len(kept), len(probs), self.t, config.seed, "unlabeled")
        index = data.send(index, self.device)
        kept[index] = probs
        targets = probs
        late = self.t - config.steps * 2 // 5
        if late >= 0:
            if late % 10 == 0:
                refined.copy_(refine(kept, len(kept) * self.p_labeled))
            targets = refined[index]

        loss_s = supervised_loss(logits_labeled, labels, None, None)
        loss_u = consistency_loss(logits_strong, targets, mask, None, None)
        self.update(loss_s + loss_u)
        return figures(loss_s, loss_u, mask, probs.argmax(dim=1), hidden_labels)

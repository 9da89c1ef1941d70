"""DARP (Kim et al. 2020): pseudo-labels refined so that their counts fit a prior, here N P_L.

The last p(u) of every unlabeled image are kept. From two fifths of the steps on (the authors' 200 of 500 epochs),
every 10 steps, they are refined; pseudo-labels come from there, the mask M from the raw p(u), as in the authors' code.
"""

import torch
import torch.nn.functional as F

import train
from baselines_fixmatch import Buffers, figures, forward
from losses import confidence_mask, consistency_loss, supervised_loss


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


def prepare(config):
    """The FixMatch run, and the kept and the refined predictions, (N, K), from 1/K."""
    run = train.setup(config)
    N = len(run.sets.unlabeled)
    K = len(run.sets.classes)
    uniform = torch.full((N, K), 1 / K, device=run.device)
    run.extra["darp"] = Buffers(probs=uniform, refined=uniform.clone())
    return run


def step(run, labeled, labels, unlabeled, hidden_labels, draws):
    """train_step's arguments. The log's pseudo-label accuracy is that of the raw p(u)."""
    config = run.config
    logits_labeled, logits_weak, logits_strong = forward(run, labeled, unlabeled, draws)
    probs = logits_weak.detach().softmax(dim=1)                       # p(u), (U, K)
    mask = confidence_mask(probs, config.threshold)                   # M(u), (U,)
    run.estimator.update(probs)                                       # Qhat, for the log

    # the pseudo-labels of this step's images: raw at first, then out of the refined matrix
    kept = run.extra["darp"]
    index = train.batch_indices(len(kept.probs), len(probs), run.step, config.seed, 1)
    index = train.send(index, run.device)
    kept.probs[index] = probs
    targets = probs
    late = run.step - config.steps * 2 // 5
    if late >= 0:
        if late % 10 == 0:
            kept.refined.copy_(refine(kept.probs, len(kept.probs) * run.p_labeled))
        targets = kept.refined[index]

    loss_s = supervised_loss(logits_labeled, labels, None, None)
    loss_u = consistency_loss(logits_strong, targets, mask, None, None)
    train.update(run, loss_s + loss_u)
    return figures(loss_s, loss_u, mask, probs.argmax(dim=1), hidden_labels)

"""Evaluation: accuracy and calibration, and a table and pictures of finished runs.

    python evaluate.py RUN [RUN ...] [--logit-adjust] [--plot FILE.png]

Calibration as in the paper: softmax confidence of the EMA network, 15 equal-width bins,
ECE = sum_b n_b/N |acc_b - conf_b|, MCE = max_b |acc_b - conf_b| (Guo et al. 2017).
"""

import torch

import data
import models
import priors


@torch.no_grad()
def predict(model, images, mean, std, device="cpu", batch_size=500):
    """Logits of a network, batch by batch, in float32. images: (N, 3, H, W) uint8. Returns (N, K) on the CPU."""
    return torch.cat([model(data.normalize(part.to(device), mean, std).contiguous(
        memory_format=torch.channels_last)).float().cpu() for part in images.split(batch_size)])


def reliability(probs, labels, num_bins=15):
    """Equal-width bins of confidence, (lower, upper] each; the first one takes 0, too.

    probs: (N, K), rows sum to 1; labels: (N,). Returns (num_bins, 3): share of the samples,
    accuracy, mean confidence (the last two 0 in an empty bin). Raises ValueError on an empty set.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must be (N, K) "
                         "and (N,) with N >= 1")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1")
    confidence, predicted = probs.max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=probs.dtype, device=probs.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, num_bins - 1)
    columns = torch.stack([torch.ones_like(confidence), (predicted == labels).to(probs.dtype), confidence])
    sums = torch.stack([torch.bincount(bins, weights=column, minlength=num_bins) for column in columns])
    return torch.stack([sums[0] / len(labels), *(sums[1:] / sums[0].clamp(min=1))], dim=1)


def calibration(probs, labels, num_bins=15):
    """Expected and maximum calibration error, (ECE, MCE) as fractions; see `reliability`."""
    share, accuracy, confidence = reliability(probs, labels, num_bins).unbind(1)
    gap = (accuracy - confidence).abs()
    return (share * gap).sum().item(), gap.max().item()


def metrics(logits, labels, num_bins=15):
    """Accuracy and calibration of logits (N, K) against labels (N,) in 0..K-1.

    Returns a dict of floats: accuracy, balanced_accuracy (mean over the classes present), ece, mce,
    nll, brier; and per_class_accuracy (K,), NaN for an absent class. Raises ValueError, with the
    shape and the value, on an empty set, non-finite logits or labels out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (N, K) "
                         "and (N,) with N >= 1")
    if not torch.isfinite(logits).all():
        raise ValueError(f"logits {tuple(logits.shape)} hold {logits[~torch.isfinite(logits)][0].item()}")
    K = logits.shape[1]
    if labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"labels {tuple(labels.shape)} run from {labels.min().item()} to "
                         f"{labels.max().item()}; they must be in 0..{K - 1}")
    logits, labels = logits.double(), labels.long()
    probs = logits.softmax(dim=1)
    correct = (logits.argmax(dim=1) == labels).double()
    present = torch.bincount(labels, minlength=K)
    per_class = torch.bincount(labels, weights=correct, minlength=K) / present  # 0 / 0 = NaN
    ece, mce = calibration(probs, labels, num_bins)
    one_hot = torch.nn.functional.one_hot(labels, K)
    return {"accuracy": correct.mean().item(),
            "balanced_accuracy": per_class[present > 0].mean().item(), "ece": ece, "mce": mce,
            "nll": torch.nn.functional.cross_entropy(logits, labels).item(),
            "brier": (probs - one_hot).square().sum(dim=1).mean().item(),
            "per_class_accuracy": per_class}

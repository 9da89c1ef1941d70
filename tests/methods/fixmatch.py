"""What the methods beside this file share: FixMatch's forward pass, a step's figures for the log, the last layer.

Symbols as in losses.py: f = logits, w and W = weak and strong view, p(u) = sigma(f(w(u))), M(u) = the confidence mask.
"""

import copy

import torch
import torch.nn.functional as F


def forward(run, labeled, unlabeled, draws):
    """f of the labeled, weak and strong views in one pass, as in Run.step: (B, K), (U, K), (U, K)."""
    logits = run.forward(labeled, unlabeled, draws)
    return logits.split([len(labeled), len(unlabeled), len(unlabeled)])


def figures(loss_s, loss_u, mask, pseudo_labels, hidden_labels):
    """What a step returns for the log. pseudo_labels: (U,), counted where the mask is 1."""
    right = mask * (pseudo_labels == hidden_labels)
    return {"loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "loss_uc": torch.zeros_like(loss_s),
            "mask_rate": mask.sum() / len(mask), "right_rate": right.sum() / len(mask)}


def last(model):
    """A network's last layer: its name, WideResNet's `linear` or ResNet's `fc`, and the layer."""
    return list(model.named_children())[-1]


def features(model, images):
    """What a network's last layer gets, of normalised images (N, 3, H, W): (N, D)."""
    shared = {id(child): child for child in model.children()}
    headless = copy.deepcopy(model, shared)  # copies the outer module alone
    setattr(headless, last(model)[0], torch.nn.Identity())
    return headless(images)


def counts_of(sets):
    """Labeled images of each class, (K,); not by bincount, which would make the host wait for the largest label."""
    return F.one_hot(sets.labels, len(sets.classes)).sum(dim=0)


def balanced(labels, counts, size, generator):
    """Indices of images, every class equally probable. labels: (N,) on the generator's device; counts: (K,) of them."""
    weights = 1 / counts.double()[labels]
    return torch.multinomial(weights, size, replacement=True, generator=generator)

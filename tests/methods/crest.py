"""CReST+ (Wei et al. 2021): generations of FixMatch, each from new weights, U without L.

Within a generation p(u) is aligned, with t from 1 in the first to 0.5 in the last. After it the network predicts all
of U, and each class gives its most confident images, with that label, to the first labeled set: the next one's.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import models
import train
from losses import confidence_mask, consistency_loss, supervised_loss
from methods.fixmatch import figures, forward

GENERATIONS = 6  # the authors'


def align(probs, p_labeled, running, t):
    """p(u) (P_L^t / sum P_L^t + 1e-6) / (running mean of p + 1e-6), rows normalised. probs: (U, K); priors: (K,)."""
    target = F.normalize(p_labeled ** t, p=1, dim=0)
    return F.normalize(probs * (target + 1e-6) / (running + 1e-6), p=1, dim=1)


def sampling_rates(counts):
    """Share that a class gives, (1/gamma)^((K-1-r)/(K-1)/3), r its place by labeled size counts (K,), 0 = largest."""
    K = len(counts)
    place = counts.argsort(descending=True, stable=True).argsort().double()
    return (counts.min() / counts.max()) ** ((K - 1 - place) / (K - 1) / 3)


def most_confident(probs, counts):
    """Of the images predicted as a class, the most confident share `sampling_rates`: (indices, labels)."""
    confidence, predicted = probs.max(dim=1)
    chosen = []
    for k, rate in enumerate(sampling_rates(counts).tolist()):
        mine = (predicted == k).nonzero().squeeze(1)
        mine = mine[confidence[mine].argsort(descending=True)]
        chosen.append(mine[:math.ceil(rate * len(mine) - 1e-9)])
    chosen = torch.cat(chosen)
    return chosen, predicted[chosen]


def predictions(config, sets, directory):
    """p(u) of all unlabeled images by the EMA network of a finished generation: (N, K)."""
    state = train.read_checkpoint(directory / "checkpoint.pt")
    if not state or not state["result"]:
        raise ValueError(f"{directory} holds no finished generation, which the next one needs")
    model = models.build(config.model, len(sets.classes)).eval()
    model.load_state_dict(state["ema"])
    model = model.to(config.device)
    statistics = sets.mean.to(config.device), sets.std.to(config.device)
    parts = sets.unlabeled.split(5000)
    return torch.cat([evaluate.predict(model, part.to(config.device), *statistics) for part in parts]).softmax(dim=1)


class CReST(train.Run):
    """The run of a generation. before: the directory of the one before, None in the first; power: its t, of P_L^t."""

    def __init__(self, config, before=None, power=1.0):
        sets = data.load(config, unite=False)
        K = len(sets.classes)
        first = sets.labels
        if before:
            probs = predictions(config, sets, before)
            index, labels = most_confident(probs, torch.bincount(first, minlength=K))
            sets = sets._replace(labeled=torch.cat([sets.labeled, sets.unlabeled[index]]),
                                 labels=torch.cat([first, labels]))
        super().__init__(config, sets)
        self.first = len(first)                                       # the first labeled set leads the others
        self.p_first = data.prior(first, K).to(self.device)           # its P_L
        self.power = power

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        """The log's pseudo-label accuracy is that of the raw p(u)."""
        logits_labeled, logits_weak, logits_strong = forward(self, labeled, unlabeled, draws)
        probs = logits_weak.detach().softmax(dim=1)                   # p(u), (U, K)
        aligned = align(probs, self.p_first, self.estimator.q_hat, self.power)
        mask = confidence_mask(aligned, self.config.threshold)
        self.estimator.update(probs)                                  # the running mean of p

        loss_s = supervised_loss(logits_labeled, labels, None, None)
        loss_u = consistency_loss(logits_strong, aligned, mask, None, None)
        self.update(loss_s + loss_u)
        return figures(loss_s, loss_u, mask, probs.argmax(dim=1), hidden_labels)


def directory_of(out, generation):
    """A generation's directory: the last one's is the run's."""
    return out if generation == GENERATIONS - 1 else out / f"generation{generation}"


def last_generation(config):
    """The run of the last generation, of a finished run in config.out."""
    return CReST(config, directory_of(Path(config.out), GENERATIONS - 2))


def main(arguments):
    """Train the generations one after the other, each a run of its own; a finished one is not repeated."""
    out = Path(train.parse(arguments, "crest")[0].out)
    for g in range(GENERATIONS):
        before = directory_of(out, g - 1) if g else None
        generation = functools.partial(CReST, before=before, power=1 - 0.5 * g / (GENERATIONS - 1))
        status = train.main([*arguments, "--out", str(directory_of(out, g))], generation, "crest")
        if status:
            return status
    return 0

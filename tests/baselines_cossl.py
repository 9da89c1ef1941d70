"""CoSSL (Fan et al. 2022): a second last layer learns beside FixMatch and is the one that is evaluated.

From four fifths of the steps on (the authors' 400 of 500 epochs) it learns on features of the EMA network, of labeled
images drawn class by class and mixed with unlabeled ones; the gradient stops at the features. Pseudo-labels stay those
of the first layer, as in the authors' code.
"""

import copy

import torch
import torch.nn.functional as F

import data
import train
from baselines_fixmatch import balanced, counts_of, features, last, with_last


def enhance(x, labels, u, counts, draws):
    """Tail-class feature enhancement: with probability (N_1 - N_k) / N_1 an x of class k becomes lam x + (1 - lam) u.

    x, u: (B, D) features of labeled and unlabeled images; labels: (B,); counts: (K,); draws: (B, 2), lam ~ U(0.6, 1).
    """
    probability = (1 - counts / counts.max())[labels]
    mixed = draws[:, :1] < probability[:, None]
    lam = 0.6 + 0.4 * draws[:, 1:]
    return torch.where(mixed, lam * x + (1 - lam) * u, x).detach()


def prepare(config):
    """The FixMatch run, the second layer with its optimiser, and the EMA network that ends in it."""
    run = train.setup(config)
    layer = copy.deepcopy(last(run.model)[1])
    run.extra["second"] = layer
    run.extra["second_optimizer"] = torch.optim.SGD(layer.parameters(), config.lr, momentum=0.9)
    run.evaluated = with_last(run.ema.model, layer)
    return run


def step(run, labeled, labels, unlabeled, hidden_labels, draws):
    """FixMatch's step, then the second layer's: a copy of the first one until the warm-up is over."""
    found = train.train_step(run, labeled, labels, unlabeled, hidden_labels, draws)
    if run.step < run.config.steps * 4 // 5:
        run.extra["second"].load_state_dict(last(run.model)[1].state_dict())
    else:
        learn(run)
    return found


def learn(run):
    """One step of the second layer, on draws of its own: a function of the seed and of t."""
    sets = run.sets
    B = run.config.batch_size
    random = torch.Generator(run.device).manual_seed(10 ** 7 * run.config.seed + run.step)
    counts = counts_of(sets)
    x = balanced(sets.labels, counts, B, random)
    u = torch.randint(len(sets.unlabeled), (B,), generator=random, device=run.device)
    draws = torch.rand(2 * B, 14, generator=random, device=run.device)

    views = data.strong(torch.cat([sets.labeled[x], sets.unlabeled[u]]), draws[:, :12])
    feature_x, feature_u = features(run.ema.model, sets, views).split(B)
    labels = sets.labels[x]
    mixed = enhance(feature_x, labels, feature_u, counts, draws[:B, 12:])

    optimizer = run.extra["second_optimizer"]
    optimizer.zero_grad()
    F.cross_entropy(run.extra["second"](mixed), labels).backward()
    optimizer.step()

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
from methods.fixmatch import balanced, counts_of, features, last


def enhance(x, labels, u, counts, draws):
    """Tail-class feature enhancement: with probability (N_1 - N_k) / N_1 an x of class k becomes lam x + (1 - lam) u.

    x, u: (B, D) features of labeled and unlabeled images; labels: (B,); counts: (K,); draws: (B, 2), lam ~ U(0.6, 1).
    """
    probability = (1 - counts / counts.max())[labels]
    mixed = draws[:, :1] < probability[:, None]
    lam = 0.6 + 0.4 * draws[:, 1:]
    return torch.where(mixed, lam * x + (1 - lam) * u, x).detach()


class CoSSL(train.Run):
    """The FixMatch run, and the second layer with its optimiser."""

    kept = [*train.Run.kept, "second", "second_optimizer"]

    def __init__(self, config):
        super().__init__(config)
        self.second = copy.deepcopy(last(self.model)[1])
        self.second_optimizer = torch.optim.SGD(self.second.parameters(), config.lr, momentum=0.9)

    def step(self, *batch):
        """FixMatch's step, then the second layer's: a copy of the first one until the warm-up is over."""
        found = super().step(*batch)
        if self.t < self.config.steps * 4 // 5:
            self.second.load_state_dict(last(self.model)[1].state_dict())
        else:
            self.learn()
        return found

    def learn(self):
        """One step of the second layer, on draws of its own: a function of the seed and of t."""
        sets = self.sets
        B = self.config.batch_size
        random = torch.Generator(self.device).manual_seed(10 ** 7 * self.config.seed + self.t)
        counts = counts_of(sets)
        x = balanced(sets.labels, counts, B, random)
        u = torch.randint(len(sets.unlabeled), (B,), generator=random, device=self.device)
        draws = torch.rand(2 * B, 14, generator=random, device=self.device)

        views = data.strong(torch.cat([sets.labeled[x], sets.unlabeled[u]]), draws[:, :12])
        views = data.normalize(views, sets.mean, sets.std)
        feature_x, feature_u = features(self.ema.model, views).split(B)
        labels = sets.labels[x]
        mixed = enhance(feature_x, labels, feature_u, counts, draws[:B, 12:])

        self.second_optimizer.zero_grad()
        F.cross_entropy(self.second(mixed), labels).backward()
        self.second_optimizer.step()

    def evaluated(self, images):
        return self.second(features(self.ema.model, images))

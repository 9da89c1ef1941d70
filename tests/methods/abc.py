"""ABC (Lee et al. 2021), as the repository of ADELLO's authors runs it: an auxiliary balanced classifier.

A second last layer g on the same features, trained beside FixMatch's f and evaluated in its place; Bernoulli draws
give each class the same say. p_g(u) = sigma(g(w(u))), yhat and M its argmax and confidence mask, without gradient.

    L     = L_s + L_u + L_abc                            FixMatch's two, of f
    L_abc = mean_b B_b H( y_b,  sigma(g(w(x_b))) )       P(B_b = 1) = N_min / N_y
          + mean_u B_u M(u) H( yhat(u), sigma(g(W(u))) ) P(B_u = 1) = 1 - (t / T_max) (1 - N_min / N_yhat)
"""

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
import train
from losses import confidence_mask, consistency_loss, supervised_loss
from methods.fixmatch import counts_of, figures, forward, last


def kept(labels, counts, progress, draws):
    """The Bernoulli mask B, P(B = 1) = 1 - progress (1 - N_min / N_y): at progress 1 all classes keep N_min images.

    labels: (N,); counts: (K,) sizes of the labeled classes; progress: in [0, 1]; draws: (N,) in [0, 1). Returns (N,).
    """
    probability = 1 - progress * (1 - counts.min() / counts)
    return (draws < probability[labels]).float()


def auxiliary_loss(g_labeled, g_weak, g_strong, labels, threshold, counts, progress, draws):
    """L_abc of the logits of g, (B, K), (U, K), (U, K). progress: t / T_max; draws: (B + U,); the rest as in `kept`."""
    B = len(labels)
    probs = g_weak.detach().softmax(dim=1)                            # p_g(u), (U, K)
    mask = confidence_mask(probs, threshold)                          # M(u), (U,)
    kept_labeled = kept(labels, counts, 1.0, draws[:B])
    kept_unlabeled = kept(probs.argmax(dim=1), counts, progress, draws[B:])
    losses = F.cross_entropy(g_labeled, labels, reduction="none")
    return (losses * kept_labeled).mean() + consistency_loss(g_strong, probs, mask * kept_unlabeled, None, None)


def build(config, num_classes):
    """The network with a last layer of 2K outputs, f and g. Its f starts as every other method's with this seed."""
    torch.manual_seed(config.seed)
    model = models.build(config.model, num_classes, config.bn_momentum)
    name, f = last(model)
    g = last(models.build(config.model, num_classes))[1]              # drawn as f is
    both = torch.nn.Linear(f.in_features, 2 * num_classes)
    both.load_state_dict({"weight": torch.cat([f.weight, g.weight]), "bias": torch.cat([f.bias, g.bias])})
    setattr(model, name, both)
    return model


class ABC(train.Run):
    """The FixMatch run with both layers; g is evaluated."""

    def __init__(self, config):
        sets = data.load(config)
        super().__init__(config, sets, build(config, len(sets.classes)))

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        """The log's mask and pseudo-labels are f's; L_abc has a column of its own."""
        config = self.config
        (f_labeled, g_labeled), (f_weak, g_weak), (f_strong, g_strong) = (
            logits.chunk(2, dim=1) for logits in forward(self, labeled, unlabeled, draws))

        # FixMatch, of f
        probs = f_weak.detach().softmax(dim=1)                        # p(u), (U, K)
        mask = confidence_mask(probs, config.threshold)               # M(u), (U,)
        self.estimator.update(probs)                                  # Qhat, for the log
        loss_s = supervised_loss(f_labeled, labels, None, None)
        loss_u = consistency_loss(f_strong, probs, mask, None, None)

        # the balanced classifier, of g; its draws are a function of the seed and of t
        chance = np.random.default_rng((config.seed, 3, self.t)).random(len(draws), np.float32)
        chance = data.send(torch.from_numpy(chance), self.device)
        loss_abc = auxiliary_loss(g_labeled, g_weak, g_strong, labels, config.threshold, counts_of(self.sets),
                                  self.t / config.steps, chance)

        self.update(loss_s + loss_u + loss_abc)
        found = figures(loss_s, loss_u, mask, probs.argmax(dim=1), hidden_labels)
        return found | {"loss_abc": loss_abc.detach()}

    def evaluated(self, images):
        return super().evaluated(images).chunk(2, dim=1)[1]

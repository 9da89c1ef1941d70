"""Details that the paper does not argue for, each undone in ADELLO, to see what it decides.

    python tests/ablations.py separate-statistics --seed 0      # further options are train.py's
    python tests/ablations.py unlabeled-alone                   # or moving-temperature
    python tests/ablations.py noise0.3 --method fixmatch        # in another method than ADELLO, on easier data
    python evaluate.py runs/shapes-adello-reversed-* runs/shapes-separate-statistics-*

A variant is another set-up of the run, in a directory of its own name.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import train
from losses import METHODS
from priors import PriorEstimator


def sets_of(config, source=None, unite=True):
    """The Data that train.setup loads, from a Source other than config.dataset's, or with U not united with L."""
    source = source or data.read(config.dataset, config.data_dir, config.image_size)
    labeled, unlabeled = data.cut(source, config.n1, config.m1, config.imb, train.gamma_u(config),
                                  config.labeled_fraction, config.seed)
    if unite:
        unlabeled = torch.cat([labeled, unlabeled]).sort().values
    sets = data.gather(config.dataset, source, labeled, unlabeled)
    if source.extra is not None and not unite:
        sets = sets._replace(unlabeled=source.extra)
    return sets


class Separately(torch.nn.Module):
    """Labeled, weak and strong views of a batch through the network one after the other."""

    def __init__(self, network, sizes):
        super().__init__()
        self.network = network
        self.sizes = sizes

    def forward(self, images):
        return torch.cat([self.network(part) for part in images.split(self.sizes) if len(part)])


def separate_statistics(config):
    """Three forwards, of labeled, weak and strong images: each has batch-norm statistics of its own."""
    run = train.setup(config)
    U = config.batch_size * config.mu if METHODS[config.method].unlabeled else 0
    run.network = Separately(run.model, [config.batch_size, U, U])
    return run


def unlabeled_alone(config):
    """U is trained on without L, so that Qhat estimates the prior of U alone."""
    return train.setup(config, sets_of(config, unite=False))


class MovingTemperature(PriorEstimator):
    """T is computed anew in every CCR step."""

    def __init__(self, run):
        super().__init__(len(run.sets.classes), run.config.prior_momentum, run.device)
        self.run = run

    def update(self, probs, first_ccr_step=False):
        config = self.run.config
        ccr = METHODS[config.method].ccr is not None and self.run.step >= config.warmup_steps
        super().update(probs, first_ccr_step=ccr)


def moving_temperature(config):
    """T follows Qhat at every step instead of being frozen in the first CCR step."""
    run = train.setup(config)
    run.estimator = MovingTemperature(run)
    return run


def noise(config, deviation):
    """`shapes` drawn with other noise: how hard the data is."""
    if config.dataset != "shapes":
        raise ValueError(f"noise{deviation} is a variant of shapes, not of --dataset {config.dataset}")
    source = data.read("shapes", image_size=config.image_size)
    images, _ = data.shapes(1000, 0, config.image_size, noise=deviation)
    test, _ = data.shapes(200, 1, config.image_size, noise=deviation)
    return train.setup(config, sets_of(config, source._replace(images=images, test=test)))


VARIANTS = {"separate-statistics": separate_statistics, "unlabeled-alone": unlabeled_alone,
            "moving-temperature": moving_temperature}
for deviation in (0.25, 0.3, 0.4):
    VARIANTS[f"noise{deviation}"] = functools.partial(noise, deviation=deviation)


def prepare_of(variant):
    """The set-up of a run of this name, in whatever method; None: there is no such variant."""
    for name, prepare in VARIANTS.items():
        if variant in (name, *(f"{name}-{method}" for method in METHODS)):
            return prepare


def main(arguments):
    """The command line. Returns the exit status."""
    name, *rest = arguments or [""]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = train.refuse
    parser.add_argument("--method", default="adello")
    try:
        if name not in VARIANTS:
            raise ValueError(f"no variant {name!r}: name one of {', '.join(VARIANTS)}, then train.py's options")
        method = parser.parse_known_args(rest)[0].method
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    variant = name if method == "adello" else f"{name}-{method}"
    return train.main(rest, variant, VARIANTS[name])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Details that the paper does not argue for, each undone in ADELLO, to see what it decides.

    python tests/ablations.py separate-statistics --seed 0      # further options are train.py's
    python tests/ablations.py unlabeled-alone                   # or moving-temperature
    python tests/ablations.py temperature-one                   # or constant-rate, or both: as-shipped
    python tests/ablations.py noise0.3 --method fixmatch        # in another method than ADELLO, on easier data
    python evaluate.py runs/shapes-adello-reversed-* runs/shapes-separate-statistics-*

A variant is another Run, in a directory of its own name.
"""

import functools
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import train
from losses import METHODS


class SeparateStatistics(train.Run):
    """Three forwards, of labeled, weak and strong images: each has batch-norm statistics of its own."""

    def network(self, images):
        B = self.config.batch_size
        U = (len(images) - B) // 2
        return torch.cat([self.model(part) for part in images.split([B, U, U]) if len(part)])


def unlabeled_alone(config):
    """U is trained on without L, so that Qhat estimates the prior of U alone."""
    return train.Run(config, data.load(config, unite=False))


class MovingTemperature(train.Run):
    """T follows Qhat in every CCR step instead of being frozen in the first one."""

    def __init__(self, config):
        super().__init__(config)
        update = self.estimator.update
        self.estimator.update = lambda probs, first_ccr_step: update(probs, self.follows())

    def follows(self):
        return METHODS[self.config.method].ccr is not None and self.t >= self.config.warmup_steps


class TemperatureOne(MovingTemperature):
    """T stays 1: L_uc's soft labels are p(u), as the authors' shipped settings have it."""

    def follows(self):
        return False


class ConstantRate(train.Run):
    """Every step takes the rate of the first, as the authors' shipped settings have it."""

    def update(self, loss):
        t = self.t
        self.t = 0
        super().update(loss)
        self.t = t


class AsShipped(ConstantRate, TemperatureOne):
    """Both."""


def noise(config, deviation):
    """`shapes` drawn with other noise: how hard the data is."""
    if config.dataset != "shapes":
        raise ValueError(f"noise{deviation} is a variant of shapes, not of --dataset {config.dataset}")
    with mock.patch("data.shapes", functools.partial(data.shapes, noise=deviation)):
        return train.Run(config)


VARIANTS = {
    "separate-statistics": SeparateStatistics, "unlabeled-alone": unlabeled_alone,
    "moving-temperature": MovingTemperature, "temperature-one": TemperatureOne,
    "constant-rate": ConstantRate, "as-shipped": AsShipped,
    **{f"noise{level}": functools.partial(noise, deviation=level) for level in (0.25, 0.3, 0.4)}}


def kind_of(variant):
    """What makes a run of this name, in whatever method; None: there is no such variant."""
    for name, kind in VARIANTS.items():
        if variant in (name, *(f"{name}-{method}" for method in METHODS)):
            return kind


def main(arguments):
    """The command line. Returns the exit status."""
    name, *rest = arguments or [""]
    parser = train.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="adello")
    try:
        if name not in VARIANTS:
            raise ValueError(f"no variant {name!r}: name one of {', '.join(VARIANTS)}, then train.py's options")
        method = parser.parse_known_args(rest)[0].method
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    variant = name if method == "adello" else f"{name}-{method}"
    return train.main(rest, VARIANTS[name], variant)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

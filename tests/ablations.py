"""Details that the paper does not argue for, each undone in ADELLO, to see what it decides.

    python tests/ablations.py separate-statistics --seed 0      # further options are train.py's
    python tests/ablations.py noise0.3 --method fixmatch        # in another method than ADELLO, on easier data
    python evaluate.py runs/shapes-adello-reversed-* runs/shapes-separate-statistics-*

A variant is a method of its own name, so that its run has a directory of its own.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import evaluate
import priors
import train


def separate_statistics():
    """Three forwards, of labeled, weak and strong images: each has batch-norm statistics of its own."""
    prepare = train.prepare

    def changed(s):
        run, U = prepare(s), s.batch_size * s.mu
        run.forward = lambda images: torch.cat([run.model(part) for part in images.split([s.batch_size, U, U])])
        return run
    train.prepare = changed


def unlabeled_alone():
    """U is trained on without L, so that Qhat estimates the prior of U alone."""
    load, split, drawn = data.load, data.split, []

    def remembered(*arguments):
        drawn[:] = split(*arguments)
        return drawn

    def changed(*arguments):
        sets, (labeled, unlabeled) = load(*arguments), drawn
        keep = ~torch.isin(torch.cat([labeled, unlabeled]).sort().values, labeled)
        return sets._replace(unlabeled=sets.unlabeled[keep], hidden_labels=sets.hidden_labels[keep])
    data.split, data.load = remembered, changed


def moving_temperature():
    """T follows Qhat at every step instead of being frozen in the first CCR step."""
    update = priors.PriorEstimator.update

    def changed(self, probs, ccr=False):
        self.ccr.fill_(False)  # so that every CCR step is the first
        update(self, probs, ccr)
    priors.PriorEstimator.update = changed


def noise(deviation):
    """`shapes` drawn with other noise: how hard the data is."""
    data.shapes = functools.partial(data.shapes, noise=deviation)


VARIANTS = {"separate-statistics": separate_statistics, "unlabeled-alone": unlabeled_alone,
            "moving-temperature": moving_temperature,
            **{f"noise{d}": functools.partial(noise, d) for d in (0.25, 0.3, 0.4)}}


def main(arguments):
    parser = evaluate.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--method", choices=list(train.METHODS), default="adello")
    try:
        options, rest = parser.parse_known_args(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = options.variant + f"-{options.method}" * (options.method != "adello")
    train.METHODS[name] = train.METHODS[options.method]
    train.SETTINGS["method"][1].append(name)
    VARIANTS[options.variant]()
    return train.main(["--method", name, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

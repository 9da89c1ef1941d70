"""The other methods of the paper's table, each a change of the FixMatch run.

    python tests/baselines.py darp --seed 0                     # or cossl, debiaspl, abc
    python tests/baselines.py crest --generations 6 --seed 0    # trains six times
    python tests/baselines.py crt runs/shapes-darp-reversed-imb50-s0     # a new classifier on a finished run
    python tests/baselines.py la runs/shapes-fixmatch-reversed-imb50-s0  # argmax f - log P_L

Further options are train.py's, but for --method. A method is a set-up and a step, in baselines_<method>.py; the last
two are in baselines_posthoc.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ablations
import baselines_abc
import baselines_cossl
import baselines_crest
import baselines_darp
import baselines_debiaspl
import baselines_posthoc
import train

TRAINED = {
    "darp": (baselines_darp.prepare, baselines_darp.step),
    "cossl": (baselines_cossl.prepare, baselines_cossl.step),
    "debiaspl": (train.setup, baselines_debiaspl.step),
    "abc": (baselines_abc.prepare, baselines_abc.step)}


def prepare_of(variant):
    """The set-up of a run of this name, None where no script here makes it."""
    if variant is None:
        return train.setup
    if variant in TRAINED:
        return TRAINED[variant][0]
    if variant.startswith("crest") and "+" not in variant:
        return baselines_crest.prepare_last
    return ablations.prepare_of(variant)


def main(arguments):
    """The command line. Returns the exit status."""
    name, *rest = arguments or [""]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = train.refuse
    parser.add_argument("--method")
    try:
        if name in baselines_posthoc.METHODS:
            return baselines_posthoc.main(name, rest, prepare_of)
        if name != "crest" and name not in TRAINED:
            raise ValueError(f"no method {name!r}: name {', '.join(TRAINED)} or crest, then train.py's options, or "
                             f"crt or la, then a finished run")
        if parser.parse_known_args(rest)[0].method:
            raise ValueError(f"--method cannot be used with {name}, which is a method of its own")
        rest = [*rest, "--method", "fixmatch"]
        if name == "crest":
            return baselines_crest.main(rest)
        prepare, step = TRAINED[name]
        return train.main(rest, name, prepare, step)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

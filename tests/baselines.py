"""The other methods of the paper's table, each a change of the FixMatch run.

    python tests/baselines.py darp --seed 0                     # or cossl, debiaspl, abc
    python tests/baselines.py crest --seed 0                    # trains six times
    python tests/baselines.py crt runs/shapes-darp-reversed-imb50-s0     # a new classifier on a finished run
    python tests/baselines.py la runs/shapes-fixmatch-reversed-imb50-s0  # argmax f - log P_L

Further options are train.py's, but for --method. A method is a subclass of train.Run, in methods/<method>.py; the last
two are in methods/posthoc.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ablations
import train
from methods import crest, posthoc
from methods.abc import ABC
from methods.cossl import CoSSL
from methods.darp import DARP
from methods.debiaspl import DebiasPL

TRAINED = {"darp": DARP, "cossl": CoSSL, "debiaspl": DebiasPL, "abc": ABC}


def kind_of(variant):
    """What makes a run of this name, None where no script here does."""
    if variant is None:
        return train.Run
    return {**TRAINED, "crest": crest.last_generation}.get(variant) or ablations.kind_of(variant)


def main(arguments):
    """The command line. Returns the exit status."""
    name, *rest = arguments or [""]
    parser = train.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    try:
        if name in posthoc.METHODS:
            return posthoc.main(name, rest, kind_of)
        if name != "crest" and name not in TRAINED:
            raise ValueError(f"no method {name!r}: name {', '.join(TRAINED)} or crest, then train.py's options, or "
                             f"crt or la, then a finished run")
        if parser.parse_known_args(rest)[0].method:
            raise ValueError(f"--method cannot be used with {name}, which is a method of its own")
        rest = [*rest, "--method", "fixmatch"]
        return crest.main(rest) if name == "crest" else train.main(rest, TRAINED[name], name)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

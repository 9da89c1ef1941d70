"""The authors' public code beside this one: twelve steps to the last digits, and whole trainings.

    git clone https://github.com/emasa/ADELLO-LTSSL && git -C ADELLO-LTSSL checkout b5f6013
    python tests/authors.py trajectory ADELLO-LTSSL                  # authors_trajectory.json, made again
    python tests/authors.py trajectory ADELLO-LTSSL --depth 16 --width 2 --formula-seed 1
    python tests/authors.py trajectory ADELLO-LTSSL --shipped        # as they ship it: constant rate, T = 1
    python tests/authors.py train ADELLO-LTSSL --data-dir cifar10-jpg --seeds 0 1 2 3 4
    python tests/authors.py table runs/codes-*

Their files run unchanged: get_config with flags, get_algorithm or get_imb_algorithm, the loop AlgorithmBase.train with
all its hooks, and their evaluate. Packages that play no part in it are empty modules, so that none has to be installed;
without a GPU, which they require, `cuda()` is the identity. `trajectory` starts both codes in float64 from weights and
views that are given by formulas. In `train` each code has its own split, sampler, views, initial weights, schedule and
evaluation of the same images. Like any other run, a training of theirs leaves config.json, log.csv and result.json
behind, the figures computed from the logits of their evaluate.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import random
import re
import statistics
import sys
import tempfile
import time
import types
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import evaluate
import models
import priors
import train

AUTHORS = json.loads((Path(__file__).parent / "authors_trajectory.json").read_text(encoding="utf-8"))
SETTINGS = AUTHORS["settings"]
COUNTS = AUTHORS["labeled_counts"]
STEPS = SETTINGS["steps"]
K = SETTINGS["K"]
B = SETTINGS["batch_size"]
U = B * SETTINGS["mu"]

UNUSED = """aim progress progress.bar ruamel ruamel.yaml scipy scipy.optimize skimage skimage.util sklearn
sklearn.metrics timm timm.models timm.models.layers timm.models.layers.helpers torch.utils.tensorboard torchaudio
torchmetrics torchmetrics.functional torchmetrics.functional.classification tqdm transformers transformers.data
transformers.file_utils transformers.tokenization_utils_base wandb""".split()


# ------------------------------------------------------------------------------- the authors' code

class Nothing(np.ndarray):
    """What an empty module holds under every name: a class whose calls give 0."""

    def __new__(cls, *_, **__):
        return np.zeros(()).view(cls)


class Empty(types.ModuleType):
    """A module in place of a package that plays no part."""
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


def imported(checkout):
    """Their train.py, as a module, with the package `semilearn` loaded. ValueError where there is none."""
    file = Path(checkout) / "train.py"
    if not (Path(checkout) / "semilearn/core/algorithmbase.py").exists() or not file.exists():
        raise ValueError(f"{checkout} is no checkout of {AUTHORS['source']['repository']}: it lacks train.py or "
                         "semilearn/core/algorithmbase.py")
    spec = importlib.util.spec_from_file_location("authors_train", file)
    module = importlib.util.module_from_spec(spec)
    held = {name: sys.modules.get(name) for name in UNUSED}
    sys.modules.update({name: Empty(name) for name in UNUSED})
    sys.path.append(str(checkout))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(checkout))
        for name in UNUSED:
            del sys.modules[name]
        sys.modules.update({name: package for name, package in held.items() if package})
    return module


@contextlib.contextmanager
def without_gpu():
    """`cuda()` is the identity, the timers of CUDA do nothing."""
    timer = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 0.0)
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor), \
            mock.patch.object(torch.cuda, "Event", lambda **_: timer), \
            mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
        yield


def algorithm(module, flags, network):
    """What main_worker of their train.py builds from flags, a dict, and a function that makes the network."""
    words = [str(word) for pair in flags.items() for word in pair]
    with mock.patch.object(sys, "argv", ["train.py", *words]):
        args = module.get_config()
    args.distributed = False
    make = module.get_imb_algorithm if args.imb_algorithm else module.get_algorithm
    logger = logging.getLogger("authors")
    logger.setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GradScaler, which is not used
        return make(args, lambda **_: network(), None, logger)


def wide_resnet(name, num_classes, bn_momentum):
    """Their network, `wrn-<depth>-<width>`, with another momentum of batch-norm than the 0.001 in their file."""
    depth, width = map(int, name.split("-")[1:])
    network = sys.modules["semilearn.nets.wrn"].WideResNet(1, num_classes, depth, width)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = bn_momentum
    return network


def recorded_flags(method):
    """A method's flags in authors_trajectory.json, a dict; `ccr` is fixmatch_distill alone, whose T is 1."""
    words = AUTHORS["methods"]["adello" if method == "ccr" else method]["authors_flags"].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    if method == "ccr":
        flags = {name: value for name, value in flags.items() if not re.search("adello|imb_algorithm|distill_T", name)}
    return flags


# ---------------------------------------------------------------------------- start and views by formula

class Case(NamedTuple):
    """A trajectory; the file's are those of depth 10, width 1, seed 0, not as shipped."""
    method: str
    depth: int = SETTINGS["depth"]
    width: int = SETTINGS["width"]
    seed: int = 0            # of the formulas: moves parameters, labels and images to other numbers
    shipped: bool = False    # constant rate of the imbalance methods, T = 1; UDAL's alpha by step all the same


def start(case):
    """The network at the start of the formula `parameters`."""
    model = models.build(f"wrn-{case.depth}-{case.width}", K, SETTINGS["bn_momentum"])
    for p, (name, parameter) in enumerate(model.named_parameters(), 101 * case.seed):
        shape = parameter.shape
        i = np.arange(parameter.numel())
        u = (31 * i ** 2 + 7919 * i + 104729 * p) % 10007 / 10007 - 0.5
        if len(shape) == 4:
            value = u * np.sqrt(24 / (shape[0] * shape[2] * shape[3]))
        elif len(shape) == 2:
            value = u * np.sqrt(150 / sum(shape))
        elif ".weight" in name:
            value = 1 + 0.2 * u
        else:
            value = 0.2 * u
        parameter.data.copy_(torch.from_numpy(value).view(shape))
    return model


def label(n):
    """L(n): classes in a row of 93 places, which labeled_counts divide."""
    return np.searchsorted(np.cumsum(COUNTS), np.asarray(n) % sum(COUNTS), side="right")


def view(classes, numbers, strength, offset):
    """Images of these classes and numbers (N,): (N, 3, 8, 8) uint8; weak is (11, 0), strong is (5, 60)."""
    j = np.arange(3 * SETTINGS["image_size"] ** 2)
    c = np.asarray(classes)[:, None]
    a = np.asarray(numbers)[:, None]
    noise = (37 * j ** 2 + (2 * a + 1) * j + 29 * a) % 127
    wave = (2 * c + 3) * j % 11
    pixels = strength * wave + noise + offset
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 3, 8, 8)


def given(case, t):
    """Step t of a trajectory: labeled views, labels, weak views, hidden labels, strong views."""
    labels = label(29 * (B * t + np.arange(B)) + 31 * case.seed)
    hidden_labels = K - 1 - label(29 * (U * t + np.arange(U)) + 7 + 31 * case.seed)
    numbers = (B + 2 * U) * t + np.arange(B + 2 * U) + 1009 * case.seed
    x, w, s = np.split(numbers, [B, B + U])
    return (view(labels, x, 11, 0), torch.from_numpy(labels), view(hidden_labels, w, 11, 0),
            torch.from_numpy(hidden_labels), view(hidden_labels, s, 5, 60))


def tested(case):
    """The four test images."""
    return view(np.arange(4), 480 + np.arange(4) + 1009 * case.seed, 11, 0)


def normalized(images):
    return (images.double() / 255 - 0.5) / 0.25


def fingerprints(state):
    """[norm, sum x_i cos i] of each tensor of a network's state, in this code's names and order."""
    values = [x.flatten() for name, x in state.items() if not name.endswith("num_batches_tracked")]
    return [[x.norm().item(), (x * torch.arange(len(x)).cos()).sum().item()] for x in values]


# --------------------------------------------------------------------------------------- twelve steps

class Ours(train.Run):
    """This code's run on the given views, which keeps a record like the trajectory's."""

    def __init__(self, case):
        labels = torch.arange(K).repeat_interleave(torch.tensor(COUNTS))
        blank = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
        sets = data.Data(blank, labels, blank, labels, tested(case), torch.arange(4), list("abcde"),
                         torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
        same = {name: SETTINGS[name] for name in (
            "steps", "batch_size", "mu", "image_size", "lr", "weight_decay", "ema", "bn_momentum", "threshold",
            "prior_momentum", "alpha_min", "d", "warmup_steps")}
        super().__init__(train.Config(method=case.method, model=f"wrn-{case.depth}-{case.width}", device="cpu",
                                      precision="fp32", compile="off", **same), sets, start(case))
        self.case = case
        self.record = {"fingerprints": {}}
        if case.shipped or case.method == "ccr":  # T stays 1
            update = self.estimator.update
            self.estimator.update = lambda probs, first_ccr_step: update(probs)

    def batch(self):
        return given(self.case, self.t)

    def forward(self, labeled, weak, strong):
        return self.network(normalized(torch.cat([labeled, weak, strong])))

    def update(self, loss):
        t = self.t
        if self.case.shipped and self.case.method not in ("fixmatch", "ccr"):
            self.t = 0  # the rate of the first step, in every one
        super().update(loss)
        self.t = t

    def step(self, *batch):
        found = super().step(*batch)
        in_force = {"mask": found["mask_rate"], "lr": self.optimizer.param_groups[0]["lr"],
                    "alpha": priors.alpha_schedule(self.t, self.config.steps, self.config.alpha_min, self.config.d),
                    "q_hat": self.estimator.q_hat.tolist(), "temperature": self.estimator.temperature}
        for name, value in (found | in_force).items():
            self.record.setdefault(name, []).append(value if isinstance(value, list) else float(value))
        self.record["fingerprints"][f"after_step_{self.t + 1}"] = {
            "network": fingerprints(self.model.state_dict()), "ema": fingerprints(self.ema.model.state_dict())}
        return found


def ours(case):
    """Train as train.py does on the given views: (the record, the loop's result)."""
    run = Ours(case)
    result = train.train(run, None)
    return run.record | {"eval_logits": run.evaluated(normalized(tested(case))).tolist()}, result


class Batches(list):
    """Batches as a data loader gives them; targets: the labels of the set that they are from."""
    targets = ()


def theirs(module, case):
    """Train as the authors' loop does on the same views: a record like the trajectory's."""
    flags = recorded_flags(case.method)
    if case.shipped:
        flags.pop("--distill_T", None)
        flags.pop("--use_scheduler")
    sets = {name: Batches() for name in ("train_lb", "train_ulb", "eval")} | {"test": None}
    for t in range(STEPS):
        x, labels, w, _, s = given(case, t)
        sets["train_lb"].append({"x_lb": normalized(x), "y_lb": labels})
        sets["train_ulb"].append({"x_ulb_w": normalized(w), "x_ulb_s": normalized(s)})
    sets["train_lb"].targets = np.repeat(np.arange(K), COUNTS)
    sets["eval"].append({"x_lb": normalized(tested(case)), "y_lb": torch.arange(4)})
    place = (case.depth - 4) // 6
    at_start = {their_name(name, place): value for name, value in start(case).state_dict().items()}
    names = [name for name in at_start if not name.endswith("num_batches_tracked")]

    def network():
        made = wide_resnet(f"wrn-{case.depth}-{case.width}", K, SETTINGS["bn_momentum"])
        left_out = made.load_state_dict(at_start, strict=False)
        assert not left_out.unexpected_keys
        assert all(re.match("block[23].layer.0.bn1", name) for name in left_out.missing_keys)  # the dead ones
        return made

    record = {"fingerprints": {}}
    base = sys.modules["semilearn.core.algorithmbase"]

    class Reader(base.Hook):
        """One more hook, called last, which only reads."""

        def before_train_step(self, run):
            record.setdefault("lr", []).append(run.optimizer.param_groups[0]["lr"])

        def after_train_step(self, run):
            log = run.log_dict
            step = {"loss_s": log["train/sup_loss"], "loss_u": log["train/unsup_loss"],
                    "loss_uc": log.get("train/distill_loss", 0.0), "mask": log["train/util_ratio"]}
            if hasattr(run, "p_hat"):
                step |= {"alpha": log["train/cte_alpha"], "q_hat": run.p_hat.tolist()}
            if case.method in ("adello", "kd", "ccr"):
                fixed = run._distill_T_fixed  # in float64; the log's is rounded, but 1 where T is unset
                step["temperature"] = fixed.item() if fixed else log.get("train/distill_temperature")
            for name, value in step.items():
                record.setdefault(name, []).append(value)
            states = {"network": run.model.state_dict(), "ema": run.ema_model.state_dict()}
            record["fingerprints"][f"after_step_{run.it + 1}"] = {
                name: fingerprints({key: state[key] for key in names}) for name, state in states.items()}

    with tempfile.TemporaryDirectory() as directory, without_gpu(), mock.patch.multiple(
            base, get_dataset=lambda *_, **__: sets, get_data_loader=lambda args, batches, *_, **__: batches):
        run = algorithm(module, flags | {"--save_dir": directory}, network)
        run.register_hook(Reader(), None, "LOWEST")
        run.train()
        record["eval_logits"] = run.evaluate("eval", return_logits=True)["eval/logits"].tolist()
    return record


def their_name(name, blocks):
    """Where the authors' network has a tensor of ours; blocks: in a group."""
    name = re.sub(r"blocks\.(\d+)", lambda m: f"block{int(m[1]) // blocks + 1}.layer.{int(m[1]) % blocks}", name)
    for mine, other in {"stem": "conv1", "activate1.0": "bn1", "activate2.0": "bn2", "shortcut": "convShortcut",
                        "activate.0": "bn1", "linear": "classifier"}.items():
        name = name.replace(mine, other)
    return name


def distance(theirs, ours):
    """The largest difference of numbers that stand at the same place of two nested records."""
    if theirs is None:  # T before it is computed
        return 0
    if isinstance(theirs, dict):
        return max(distance(value, ours[name]) for name, value in theirs.items())
    if isinstance(theirs, list):
        assert len(theirs) == len(ours)
        return max(map(distance, theirs, ours))
    return abs(theirs - ours)


def recorded(method):
    """The file's numbers of a method."""
    return {name: value for name, value in AUTHORS["methods"][method].items() if name != "authors_flags"}


@contextlib.contextmanager
def float64():
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(held)


def differences(module, case):
    """{quantity: (their loop against the file, None where it has none; their loop against this code)}."""
    with float64():
        made = theirs(module, case)
        mine, _ = ours(case)
    in_file = case == Case(case.method) and case.method in AUTHORS["methods"]
    file = recorded(case.method) if in_file else dict.fromkeys(made)
    return {name: (distance(value, made[name]) if in_file else None, distance(made[name], mine[name]))
            for name, value in file.items()}


def trajectory(options):
    """Print the differences of each method. Returns the exit status."""
    module = imported(options.checkout)
    within = True
    print(f"{'':22} {'their loop and':>16} {'their loop and':>16}\n{'largest difference':22} "
          f"{'the file':>16} {'this code':>16}")
    for method in options.methods:
        case = Case(method, options.depth, options.width, options.formula_seed, options.shipped)
        for name, (in_file, here) in differences(module, case).items():
            print(f"{method:9} {name:12} {'' if in_file is None else f'{in_file:.1e}':>16} {here:16.1e}", flush=True)
            within &= (in_file or 0) <= 1e-12 and here <= 1e-10
    print("within 1e-12 and 1e-10" if within else "beyond 1e-12 or 1e-10")
    return int(not within)


# ------------------------------------------------------------------------------------ whole trainings

METHODS = {"fixmatch": "FixMatch", "udal": "UDAL", "flexda": "FlexDA", "adello": "ADELLO"}
SHIFTS = "reversed", "consistent"
SPLIT = "--dataset folder --image-size 16 --n1 500 --m1 1000 --imb 50".split()
TRAINING = "--model wrn-10-1 --bn-momentum 0.05 --ema 0.995 --prior-momentum 0.99 --eval-every 400".split()


def arguments(options, method, shift, seed, side):
    """The command line of a training of this code's; of theirs, what its config.json says."""
    size = ["--steps", options.steps, "--batch-size", options.batch_size]
    out = Path(options.out) / f"codes-{side}-{method}-{shift}-s{seed}"
    each = ["--method", method, "--shift", shift, "--seed", seed, "--out", out, "--data-dir", options.data_dir]
    return [str(word) for word in (*SPLIT, *TRAINING, *size, *each, "--device", "cpu", "--precision", "fp32")]


def command_of(config):
    """The command that makes a run of theirs, of its config.json."""
    return (f"python tests/authors.py train ADELLO-LTSSL --data-dir {config['data_dir']} --methods {config['method']} "
            f"--shifts {config['shift']} --seeds {config['seed']} --sides theirs --steps {config['steps']} "
            f"--batch-size {config['batch_size']}")


def flags_of(config, num_classes, directory, workers=0):
    """The authors' flags that say what a Config of this code says; directory: where they may write."""
    gamma = int(config.imb)
    gamma_u = -gamma if config.shift == "reversed" else gamma
    flags = recorded_flags(config.method) | {
        "--num_train_iter": config.steps, "--num_eval_iter": config.eval_every, "--batch_size": config.batch_size,
        "--uratio": config.mu, "--num_classes": num_classes, "--ema_m": config.ema, "--lr": config.lr,
        "--weight_decay": config.weight_decay, "--p_cutoff": config.threshold, "--num_labels": config.n1,
        "--ulb_num_labels": config.m1, "--lb_imb_ratio": gamma, "--ulb_imb_ratio": gamma_u,
        "--img_size": config.image_size, "--seed": config.seed, "--num_workers": workers, "--eval_batch_size": 256,
        "--save_dir": directory}
    ccr = {"--distill_start_iter": config.warmup_steps}
    prior = {f"--{name}_{key}": value for name in ("adello", "udal") for key, value in (
        ("ema_p", config.prior_momentum), ("alpha_min", config.alpha_min), ("k", config.d))}
    return flags | {name: value for name, value in (ccr | prior).items() if name in flags}


@contextlib.contextmanager
def in_place_of_cifar10(images, dataset):
    """Their get_cifar finds these images, as of data.folder, and their statistics; the checkout stays as it is."""
    def cifar10(_, train, download):
        pixels, labels = images[:2] if train else images[2:4]
        return types.SimpleNamespace(data=pixels.permute(0, 2, 3, 1).numpy(), targets=labels.tolist())
    cifar = sys.modules["semilearn.datasets.cv_datasets.cifar"]
    mean, std = data.STATISTICS[dataset]
    with tempfile.TemporaryDirectory() as directory, \
            mock.patch.object(cifar, "torchvision", types.SimpleNamespace(datasets=types.SimpleNamespace(
                CIFAR10=cifar10))), \
            mock.patch.dict(cifar.mean, cifar10=mean), mock.patch.dict(cifar.std, cifar10=std), \
            mock.patch.object(sys.modules["semilearn.datasets.utils"], "base_dir", directory):
        yield directory


def train_theirs(module, config, images):
    """A whole training by the authors' code: config.json, log.csv and result.json in config.out."""
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    test_labels, classes = images[3:5]
    rows = []
    vectors = {"classes": classes}
    with without_gpu(), in_place_of_cifar10(images, config.dataset) as directory:
        run = algorithm(module, flags_of(config, len(classes), directory),
                        lambda: wide_resnet(config.model, len(classes), config.bn_momentum))
        for name, part in (("p_labeled", "train_lb"), ("q_true", "train_ulb")):
            vectors[name] = data.prior(torch.as_tensor(run.dataset_dict[part].targets), len(classes)).tolist()
        their_evaluate = run.evaluate
        begun = time.monotonic()

        def evaluate_and_record(*arguments):
            found = their_evaluate(*arguments, return_logits=True)
            scores = evaluate.metrics(torch.from_numpy(found.pop("eval/logits")), test_labels)
            vectors.update({name: scores.pop(name) for name in ("per_class_accuracy", "reliability")})
            row = {"step": run.it + 1, "seconds": round(time.monotonic() - begun, 2)}
            vectors["q_hat"] = None
            if hasattr(run, "p_hat"):
                vectors["q_hat"] = run.p_hat.tolist()
                q_true = torch.tensor(vectors["q_true"])
                row["kl_q_qhat"] = priors.kl_divergence(q_true, run.p_hat).item()
                row["kl_uniform_qhat"] = priors.kl_divergence(priors.uniform(len(classes)), run.p_hat).item()
            rows.append(row | scores)
            print(f"step {run.it + 1}/{config.steps}  balanced_accuracy {scores['balanced_accuracy']:.3f}  "
                  f"ece {scores['ece']:.3f}", flush=True)
            return found

        run.evaluate = evaluate_and_record
        run.train()
    state = {"config": asdict(config), "rows": rows, "result": {"kl_q_qhat": None} | rows[-1] | vectors,
             "made_with": {"torch": str(torch.__version__), "device": "cpu", "threads": torch.get_num_threads()},
             "data": {"test": data.fingerprint(data.load(config))["test"]}}
    directory = Path(config.out)
    directory.mkdir(parents=True, exist_ok=True)
    train.export(state, directory)


def train_codes(options):
    """Train what is asked for and not yet finished. Returns the exit status."""
    module = imported(options.checkout)
    images = None
    for seed, shift, method, side in itertools.product(options.seeds, options.shifts, options.methods,
                                                       options.sides):
        words = arguments(options, method, shift, seed, side)
        config, _ = train.parse(words, "authors" if side == "theirs" else None)
        if (Path(config.out) / "result.json").exists():
            continue
        images = images or data.folder(config.data_dir, config.image_size)
        with mock.patch.object(data, "folder", lambda *_: images):  # decoded once
            print(config.out, flush=True)
            if side == "theirs":
                train_theirs(module, config, images)
            elif status := train.main(words):
                return status
    return 0


# ------------------------------------------------------------------------------------------ the table

KEYS = {"balanced_accuracy": "balanced accuracy", "ece": "ECE"}
SIDES = {"authors": "authors", "": "this code"}  # by the variant of a run


def table(rows):
    """Markdown from rows of runs.csv: means of each group, this code less the authors' with its 95 % interval."""
    head = [f"{title}: {what}" for title in KEYS.values() for what in (*SIDES.values(), "difference [95 %]")]
    lines = [["", *head], ["---"] * 7]
    overall = {key: [] for key in KEYS}
    groups = {(shift, method): {side: [] for side in SIDES} for shift in SHIFTS for method in METHODS}
    for row in rows:
        try:
            groups[row["shift"], row["method"]][row["variant"] or ""].append(row)
        except KeyError:
            raise ValueError(f"{row.get('run', row.get('out'))} is no run of `authors.py train`") from None
    for (shift, method), sides in groups.items():
        cells = [f"{shift}, {METHODS[method]}"]
        if not all(sides.values()):
            continue
        for key in KEYS:
            theirs, mine = ([100 * float(row[key]) for row in side] for side in sides.values())
            overall[key].append(difference(theirs, mine))
            cells += [evaluate.spread(theirs), evaluate.spread(mine), interval(overall[key][-1:])]
        lines.append(cells)
    if len(lines) > 3:
        lines.append(["all groups", *(cell for key in KEYS for cell in ("", "", interval(overall[key])))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(theirs, mine):
    """Of two samples: (difference of their means, its variance from the pooled one, degrees of freedom)."""
    freedom = len(theirs) + len(mine) - 2
    squares = sum((value - statistics.mean(side)) ** 2 for side in (theirs, mine) for value in side)
    variance = squares / max(freedom, 1) * (1 / len(theirs) + 1 / len(mine))
    return statistics.mean(mine) - statistics.mean(theirs), variance, freedom


def interval(differences):
    """The mean of independent differences with its 95 % interval by Student's t, where there is one."""
    means, variances, freedom = zip(*differences)
    mean = statistics.mean(means)
    n = sum(freedom)
    if not n:
        return f"{mean:+.1f}"
    z = statistics.NormalDist().inv_cdf(0.975)
    # the quantile of t from that of the normal distribution, by the series of Cornish and Fisher
    t = (z + (z ** 3 + z) / (4 * n) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * n ** 2)
         + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * n ** 3))
    half = t * math.sqrt(sum(variances)) / len(means)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def collected(options):
    """Print the table of runs. Returns the exit status."""
    runs = [evaluate.read_run(run) for run in options.runs]
    print(table([run.config | run.result for run in runs]))
    return 0


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="trajectory | train | table")
    known = [*AUTHORS["methods"], "ccr"]
    steps = commands.add_parser("trajectory", help="twelve steps of their loop, beside the file and this code")
    steps.set_defaults(command=trajectory)
    steps.add_argument("checkout", metavar="CHECKOUT")
    steps.add_argument("--methods", nargs="+", choices=known, default=known)
    steps.add_argument("--depth", type=int, default=SETTINGS["depth"])
    steps.add_argument("--width", type=int, default=SETTINGS["width"])
    steps.add_argument("--formula-seed", type=int, default=0, help="other weights, labels and images")
    steps.add_argument("--shipped", action="store_true", help="constant rate of the imbalance methods, T = 1")

    whole = commands.add_parser("train", help="whole trainings of both codes")
    whole.set_defaults(command=train_codes)
    whole.add_argument("checkout", metavar="CHECKOUT")
    whole.add_argument("--data-dir", required=True, help="train/<class>/*, test/<class>/*")
    whole.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    whole.add_argument("--shifts", nargs="+", choices=SHIFTS, default=SHIFTS)
    whole.add_argument("--seeds", nargs="+", type=int, default=[0])
    whole.add_argument("--sides", nargs="+", choices=["theirs", "ours"], default=["theirs", "ours"])
    whole.add_argument("--steps", type=int, default=1600)
    whole.add_argument("--batch-size", type=int, default=16)
    whole.add_argument("--out", default="runs", help="where the directories of the runs go")

    means = commands.add_parser("table", help="this code less theirs, of finished runs")
    means.set_defaults(command=collected)
    means.add_argument("runs", nargs="+", metavar="RUN")

    options = parser.parse_args(argv)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

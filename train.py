"""Train ADELLO, or another method of its family.

    python train.py                                                    # ADELLO on embedded data
    python train.py --dataset cifar10 --imb 100 --shift reversed       # the paper's schedule
    python train.py --dataset folder --data-dir my-images              # train/<class>/*, test/...

In reading order: the settings, what a step works on, the step; then how a run is set up, trained,
saved and continued, and the command line.
"""

import argparse
import csv
import datetime
import errno
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import filelock
import numpy as np
import torch

import data
import evaluate
import models
from losses import METHODS, complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, kl_divergence, smooth, uniform


def setting(default, meaning, allowed=None):
    """A field of Config; allowed: a list of choices, or (lowest, highest)."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass
class Config:
    """The settings, an option each, with the paper's values for CIFAR-10-LT. None: not in use."""
    # data
    dataset: str = setting("shapes", "data set", list(data.STATISTICS))
    data_dir: str = setting("data", "where its files are or are downloaded to")
    n1: int = setting(1500, "N1, labeled images of the largest class", (1, 1e9))
    m1: int = setting(3000, "M1, unlabeled images of the largest class", (1, 1e9))
    imb: float = setting(100.0, "gamma of the labeled set, largest / smallest class", (1, 1e9))
    shift: str = setting("consistent", "unlabeled order", ["consistent", "uniform", "reversed"])
    imb_u: float = setting(None, "gamma of the unlabeled set, in place of --shift", (1e-9, 1e9))
    labeled_fraction: float = setting(None, "share to label, in place of the above", (1e-9, 0.999))
    image_size: int = setting(32, "side of the images in pixels", (8, 1024))
    # method
    method: str = setting("adello", "which of the family", list(METHODS))
    alpha_min: float = setting(0.1, "alpha at the last step", (0, 1))
    d: float = setting(2.0, "exponent of the schedule of alpha", (1e-9, 1e9))
    threshold: float = setting(0.95, "confidence of a hard pseudo-label, the mask M", (0, 1))
    warmup_steps: int = setting(50_000, "steps before CCR; default: a share of --steps", (0, 1e12))
    prior_momentum: float = setting(0.999, "m of the estimated prior Qhat", (0, 1 - 1e-9))
    # network and optimiser
    model: str = setting("wrn-28-2", "wrn-<depth>-<width> or resnet50")
    steps: int = setting(2**18, "T_max", (1, 1e12))
    batch_size: int = setting(64, "B, labeled images a step", (1, 1e6))
    mu: int = setting(2, "unlabeled images for each labeled one", (1, 1e3))
    lr: float = setting(0.03, "first rate of the cosine schedule", (1e-15, 1e30))
    weight_decay: float = setting(5e-4, "on weights, not on batch-norm and biases", (0, 1e30))
    ema: float = setting(0.999, "decay of the averaged network that is evaluated", (0, 1 - 1e-9))
    bn_momentum: float = setting(0.001, "of batch-norm, the weight of the new batch", (1e-9, 1))
    # run
    eval_every: int = setting(1024, "steps between evaluations", (1, 1e12))
    seed: int = setting(0, "of split, initialisation, order and views", (0, 2**31))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: str = setting("auto", "of the network", ["auto", "fp32", "bf16", "fp16"])
    compile: str = setting("auto", "torch.compile; auto: on CUDA", ["auto", "on", "off"])
    out: str = setting(None, "directory; else runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>")
    variant: str = None  # the name of another step or set-up; no option, scripts give it


PRESETS = {  # what differs from the values above
    "shapes": dict(n1=150, m1=600, imb=50.0, shift="reversed", image_size=16, warmup_steps=300,
                   prior_momentum=0.99, model="wrn-10-1", steps=1500, batch_size=16, lr=0.05,
                   ema=0.995, bn_momentum=0.05, eval_every=100),  # a short run, so faster averages
    "cifar10": {},
    "cifar100": dict(n1=150, m1=300, imb=50.0),
    "stl10": dict(n1=150, imb=20.0, warmup_steps=0),
    "folder": dict(labeled_fraction=0.1)}  # unless --n1, --m1, --imb, --imb-u or --shift is given


@dataclass
class Run:
    """What a step reads and changes, and what has been recorded."""
    config: Config
    device: torch.device
    sets: data.Data                     # as data.place puts them
    fingerprint: dict                   # of the data
    p_labeled: torch.Tensor             # P_L, (K,)
    q_true: torch.Tensor                # Q, (K,), for analysis and the oracle; None: unknown
    model: torch.nn.Module              # f, which learns
    ema: models.EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler        # of fp16; otherwise it does nothing
    estimator: PriorEstimator           # Qhat and T
    network: torch.nn.Module            # what `forward` calls: the model, or a wrapper of it
    evaluated: torch.nn.Module          # the EMA network, or a variant's
    forward: callable = None            # bytes to logits, compiled or not
    extra: dict = field(default_factory=dict)   # a variant's states: anything with a state_dict
    step: int = 0                       # t, the steps done
    seconds: float = 0.0
    rows: list = field(default_factory=list)    # of log.csv
    totals: dict = field(default_factory=dict)  # sums of a step's scalars since the last row


# ---------------------------------------------------------------------------------------- a step

def train_step(run, labeled, labels, unlabeled, hidden_labels, draws):
    """Step t of the training. Changes what is in `run`, returns named scalars for the log.

    labeled: (B, 3, H, W) uint8; labels: (B,); unlabeled: (U, 3, H, W) uint8; hidden_labels: (U,),
    -1 where unknown, counted and not learned from; draws: (B + U, 15), uniform in [0, 1).
    """
    config = run.config
    method = METHODS[config.method]
    sizes = [len(labels), len(unlabeled), len(unlabeled)]

    # forward: labeled, weak and strong views share batch-norm statistics, as in the authors' code
    logits = run.forward(labeled, unlabeled, draws)                   # f, (B + 2U, K)
    logits_labeled, logits_weak, logits_strong = logits.split(sizes)

    # pseudo-labels: raw weak predictions, no adjustment, no gradient
    probs = logits_weak.detach().softmax(dim=1)                       # p(u), (U, K)
    mask = confidence_mask(probs, config.threshold)                   # M(u), (U,)

    # priors: the losses use Qhat from before this step; T is computed from Qhat after it
    q_hat = run.estimator.q_hat.clone()
    ccr = method.ccr is not None and run.step >= config.warmup_steps
    if method.unlabeled:
        run.estimator.update(probs, first_ccr_step=ccr and run.step == config.warmup_steps)
    p_labeled = q_source = q_alpha = None                             # no adjustment
    if method.target:
        p_labeled = run.p_labeled
        q_source = q_hat
        target = {"p_labeled": p_labeled, "q_hat": q_hat, "q_true": run.q_true}[method.target]
        alpha = alpha_schedule(run.step, config.steps, config.alpha_min, config.d)
        q_alpha = smooth(target, torch.tensor(alpha))                 # in float32

    # losses: L = L_s + L_u + L_uc
    loss_s = supervised_loss(logits_labeled, labels, p_labeled, q_alpha)
    loss_u = loss_uc = torch.zeros_like(loss_s)
    if method.unlabeled:
        loss_u = consistency_loss(logits_strong, probs, mask, q_source, q_alpha)
    if ccr:
        excluded = mask if method.ccr == "rest" else torch.zeros_like(mask)
        loss_uc = complementary_loss(logits_strong, probs, excluded, q_source, q_alpha,
                                     run.estimator.temperature)

    update(run, loss_s + loss_u + loss_uc)
    count = max(len(unlabeled), 1)                                    # supervised takes none
    right = mask * (probs.argmax(dim=1) == hidden_labels)
    return {"loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "loss_uc": loss_uc.detach(),
            "mask_rate": mask.sum() / count, "right_rate": right.sum() / count}


def update(run, loss):
    """SGD at the rate lr cos(7 pi t / (16 T_max)), then the moving average."""
    rate = run.config.lr * math.cos(7 * math.pi * run.step / (16 * run.config.steps))
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(rate)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.ema.update(run.model)


def forward(run, labeled, unlabeled, draws):
    """From bytes to logits, (B + 2U, K) float32: the views, normalised, in one pass."""
    weak = data.weak(torch.cat([labeled, unlabeled]), draws[:, :3])
    strong = data.strong(unlabeled, draws[len(labeled):, 3:])
    images = data.normalize(torch.cat([weak, strong]), run.sets.mean, run.sets.std)
    images = images.contiguous(memory_format=torch.channels_last)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[run.config.precision]
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return run.network(images).float()


@functools.lru_cache(maxsize=8)
def permutation(size, *seeds):
    """A random order of 0..size-1."""
    return np.random.default_rng(seeds).permutation(size)


def batch_indices(size, batch_size, step, *seeds):
    """A step's part of an endless chain of permutations of 0..size-1: (batch_size,) int64."""
    places = range(step * batch_size, (step + 1) * batch_size)
    indices = [permutation(size, *seeds, place // size)[place % size] for place in places]
    return torch.tensor(indices, dtype=torch.int64)


def send(tensor, device):
    """A tensor of the CPU to a device without making the host wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def batch(run):
    """The arguments of step t, on the device: functions of the data, the seed and t alone."""
    B = run.config.batch_size
    U = B * run.config.mu if METHODS[run.config.method].unlabeled else 0
    seed = run.config.seed
    sets = run.sets
    x = send(batch_indices(len(sets.labeled), B, run.step, seed, 0), run.device)
    u = send(batch_indices(len(sets.unlabeled), U, run.step, seed, 1), run.device)
    draws = np.random.default_rng((seed, 2, run.step)).random((B + U, 15), np.float32)
    return (sets.labeled[x], sets.labels[x], sets.unlabeled[u], sets.hidden_labels[u],
            send(torch.from_numpy(draws), run.device))


# --------------------------------------------------------------------------------------- the run

def gamma_u(config):
    """Imbalance of the unlabeled set, below 1 reversed; None where it is not cut."""
    if not config.shift:
        return config.imb_u
    return {"consistent": config.imb, "uniform": 1.0, "reversed": 1 / config.imb}[config.shift]


def setup(config, sets=None, model=None):
    """All that a step needs, at step 0; sets: ready Data, model: a ready network. ValueError."""
    if sets is None:
        sets = data.load(config.dataset, config.data_dir, config.n1, config.m1, config.imb,
                         gamma_u(config), config.labeled_fraction, config.image_size, config.seed)
    K = len(sets.classes)
    device = torch.device(config.device)
    fingerprint = data.fingerprint(sets)
    p_labeled = torch.bincount(sets.labels, minlength=K) / len(sets.labels)
    q_true = None
    if sets.hidden_labels is not None:
        q_true = torch.bincount(sets.hidden_labels, minlength=K) / len(sets.unlabeled)
        q_true = q_true.to(device)
    elif METHODS[config.method].target == "q_true":
        raise ValueError(f"--method {config.method} needs the true prior: labels of all images")
    else:
        sets = sets._replace(hidden_labels=torch.full((len(sets.unlabeled),), -1))

    torch.manual_seed(config.seed)
    if model is None:
        model = models.build(config.model, K, config.bn_momentum)
    model = model.to(device, memory_format=torch.channels_last)
    ema = models.EMA(model, config.ema)
    fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.SGD(models.parameter_groups(model, config.weight_decay),
                                torch.tensor(config.lr), momentum=0.9, nesterov=True, **fast)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    estimator = PriorEstimator(K, config.prior_momentum, device)
    torch.backends.cudnn.benchmark = True
    compiled = torch.compile(forward, fullgraph=True) if config.compile == "on" else forward
    run = Run(config, device, data.place(sets, device), fingerprint, p_labeled.to(device), q_true,
              model, ema, optimizer, scaler, estimator, model, ema.model)
    run.forward = functools.partial(compiled, run)
    return run


def train(run, directory, step=train_step):
    """Steps to the last one, a save at every evaluation and once a minute. Returns the result.

    directory: None writes and prints nothing. Raises FloatingPointError when a loss is not finite,
    OSError when the last save fails; an earlier one that fails is a warning.
    """
    config = run.config
    saved = time.monotonic()
    begun = saved - run.seconds
    result = None
    while run.step < config.steps:
        for name, value in step(run, *batch(run)).items():
            run.totals[name] = run.totals.get(name, 0) + value
        run.step += 1
        now = time.monotonic()
        run.seconds = round(now - begun, 2)
        done = run.step == config.steps
        evaluating = done or run.step % config.eval_every == 0
        if not evaluating and now - saved < 60:
            continue
        saved = now
        if not all(torch.isfinite(total) for total in run.totals.values()):
            raise FloatingPointError("the loss is not finite; try a lower --lr")
        if evaluating:
            result = record(run)
        if not directory:
            continue
        try:
            save(run, directory, result if done else None)
        except OSError as error:
            if done:
                raise
            print(f"warning: not saved, training goes on: {error}", file=sys.stderr, flush=True)
        rate = run.step / (now - begun)
        left = datetime.timedelta(seconds=int((config.steps - run.step) / rate))
        shown = "".join(f"{name} {run.rows[-1][name]:.3f}  "
                        for name in ("loss_s", "balanced_accuracy", "ece") if run.rows)
        print(f"step {run.step}/{config.steps}  {shown}{rate:.1f} steps/s  ETA {left}", flush=True)
    return result


def record(run):
    """Evaluate after t steps: a row of log.csv, whose losses are means since the row before.

    lr is that of the step just done, alpha that of the next.
    Returns what result.json holds at the end: the row, priors, and None for what is unknown.
    """
    config = run.config
    found = figures(run)
    vectors = {name: found.pop(name) for name in ("per_class_accuracy", "reliability")}
    steps = run.step - (run.rows[-1]["step"] if run.rows else 0)
    means = {name: (total / steps).item() for name, total in run.totals.items()}
    right_rate = means.pop("right_rate")
    q_hat = run.estimator.q_hat.cpu()
    kl_q_qhat = math.nan
    pseudo_label_accuracy = math.nan
    if run.q_true is not None:
        kl_q_qhat = kl_divergence(run.q_true.cpu(), q_hat).item()
        if means["mask_rate"]:
            pseudo_label_accuracy = right_rate / means["mask_rate"]
    row = {"step": run.step, "seconds": run.seconds,
           "lr": run.optimizer.param_groups[0]["lr"].item(),
           "alpha": float(alpha_schedule(run.step, config.steps, config.alpha_min, config.d)),
           **means,
           "pseudo_label_accuracy": pseudo_label_accuracy, "kl_q_qhat": kl_q_qhat,
           "temperature": run.estimator.temperature.item(),
           "kl_uniform_qhat": kl_divergence(uniform(len(q_hat)), q_hat).item(), **found}
    run.rows.append(row)
    run.totals = {}
    q_true = None if run.q_true is None else run.q_true.tolist()
    return strict(row | vectors | {
        "classes": run.sets.classes, "p_labeled": run.p_labeled.tolist(),
        "q_hat": q_hat.tolist(), "q_true": q_true})


def figures(run):
    """The metrics of run.evaluated on the test images. FloatingPointError."""
    logits = evaluate.predict(run.evaluated, run.sets.test, run.sets.mean, run.sets.std)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the network's outputs are not finite; try a lower --lr")
    return evaluate.metrics(logits, run.sets.test_labels)


def strict(values):
    """The same with None for NaN and infinities, which JSON does not know."""
    return json.loads(json.dumps(values), parse_constant=lambda nan: None)


# ------------------------------------------------- a run is its directory, its checkpoint the truth

def parts(run):
    """Whatever has a state in a run, by name."""
    return {"model": run.model, "ema": run.ema.model, "optimizer": run.optimizer,
            "scaler": run.scaler, "estimator": run.estimator, **run.extra}


def save(run, directory, result=None):
    """checkpoint.pt, which holds everything, then the files that are made from it. OSError."""
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    made_with = {"torch": str(torch.__version__), "device": name,
                 "threads": torch.get_num_threads()}
    state = {"config": asdict(run.config), "made_with": made_with, "data": run.fingerprint,
             "step": run.step, "seconds": run.seconds, "rows": run.rows, "totals": run.totals,
             "result": result, **{name: part.state_dict() for name, part in parts(run).items()}}
    file = io.BytesIO()
    torch.save(state, file)
    content = file.getvalue()
    write(directory / "checkpoint.pt", content + hashlib.sha256(content).digest())
    export(state, directory)


def export(state, directory):
    """config.json, log.csv and, of a finished run, result.json, from what the checkpoint holds."""
    config = state["config"] | {"made_with": state["made_with"]}
    text = io.StringIO()
    if state["rows"]:
        writer = csv.DictWriter(text, state["rows"][0])
        writer.writeheader()
        writer.writerows(state["rows"])
    write(directory / "config.json", json.dumps(config, indent=1).encode())
    write(directory / "log.csv", text.getvalue().encode())
    if state["result"]:
        write(directory / "result.json", json.dumps(state["result"], indent=1).encode())
    else:
        (directory / "result.json").unlink(missing_ok=True)


def write(path, content):
    """A file of these bytes, whole or not at all. OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, device="cpu"):
    """The state that `save` wrote, without running code from it; None: no file. ValueError."""
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise LookupError
        state = torch.load(io.BytesIO(content[:-32]), map_location=device, weights_only=True)
        return {**state, "config": {**state["config"]}}  # both are dicts, or it is none of ours
    except (LookupError, TypeError, pickle.UnpicklingError):
        raise ValueError(f"{path} is damaged or no run's checkpoint; give another --out or "
                         "--fresh") from None


def restore(run, state):
    """Put a checkpoint's state into a run that was set up alike. ValueError on other data."""
    if state["data"] != run.fingerprint:
        raise ValueError(f"--out {run.config.out} holds a run on other data than what is now in "
                         f"{run.config.data_dir}; give another --out or --fresh")
    for name, part in parts(run).items():
        part.load_state_dict(state[name])
    for name in ("step", "seconds", "rows", "totals"):
        setattr(run, name, state[name])


def compare(held, asked, given):
    """ValueError unless a directory's run is the one asked for; names a typed setting first."""
    held = evaluate.identity(held)
    asked = evaluate.identity(asked)
    for name in sorted(asked, key=lambda name: name not in given):
        if held.get(name) != asked[name]:
            typed = "variant" if name == "variant" else option(name)
            raise ValueError(f"--out holds a run with {typed} {held.get(name)}, not {asked[name]}; "
                             "give another --out or --fresh")


def hold(directory):
    """Make a directory if need be and lock it for this process. Returns the lock. ValueError."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"--out {directory} is in use by another process") from None
    except (OSError, NotImplementedError) as error:
        without_locks = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        if getattr(error, "errno", errno.ENOSYS) not in without_locks:
            raise
        print(f"warning: {directory} cannot be locked; start one process there", file=sys.stderr)
    return lock


# ---------------------------------------------------------------------------------- command line

def option(name):
    """As the user types it."""
    return "--" + name.replace("_", "-")


def refuse(message):
    """For argparse, which would print its usage, too, and exit."""
    raise ValueError(message)


def parse(argv=None, variant=None):
    """The command line: (Config, dict of what was given). Raises ValueError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = refuse
    parser.epilog = "In brackets: the paper's values for CIFAR-10-LT. A data set changes:\n"
    for name, preset in PRESETS.items():
        changes = " ".join(f"{option(key)} {value}" for key, value in preset.items())
        parser.epilog += f"  {name:10}{changes}\n"
    settings = {f.name: f for f in fields(Config) if f.metadata}
    for name, f in settings.items():
        allowed = f.metadata["allowed"]
        choices = allowed if isinstance(allowed, list) else None
        parser.add_argument(option(name), type=f.type, choices=choices,
                            help=f"{f.metadata['meaning']} ({f.default})")
    parser.add_argument("--fresh", action="store_true", help="start over where --out holds a run")
    given = vars(parser.parse_args(argv))
    for name in sorted(settings.keys() & given.keys()):
        allowed = settings[name].metadata["allowed"]
        if isinstance(allowed, tuple) and not allowed[0] <= given[name] <= allowed[1]:
            raise ValueError(f"{option(name)} {given[name]} must be from {allowed[0]:g} to "
                             f"{allowed[1]:g}")

    default = asdict(Config()) | PRESETS[given.get("dataset", "shapes")]
    values = default | {"variant": variant} | given
    values.pop("fresh", None)
    tail = ["n1", "m1", "imb", "imb_u", "shift"]  # of a long-tailed set, cut out of a larger one
    if given.keys() & tail and "labeled_fraction" not in given:
        values["labeled_fraction"] = None
    unused = {"shift": "--imb-u"} if "imb_u" in given else {}
    if values["dataset"] == "stl10":
        unused = dict.fromkeys(["m1", "imb_u", "shift"], "stl10, whose unlabeled images are fixed")
    if values["labeled_fraction"]:
        unused = dict.fromkeys(tail, "--labeled-fraction")
    for name, other in unused.items():
        if name in given:
            raise ValueError(f"{option(name)} cannot be used with {other}")
        values[name] = None
    if "warmup_steps" not in given:
        values["warmup_steps"] = default["warmup_steps"] * values["steps"] // default["steps"]
    config = Config(**values)
    if config.warmup_steps > config.steps:
        raise ValueError(f"--warmup-steps {config.warmup_steps} is beyond --steps {config.steps}")
    try:
        with torch.device("meta"):
            models.build(config.model, 2)  # refused before anything is loaded
    except ValueError as error:
        raise ValueError(f"--model: {error}") from None
    choose(config)
    if not config.out:
        shift = config.shift or (f"imbu{config.imb_u:g}" if config.imb_u else "natural")
        imb = f"-imb{config.imb:g}" if config.imb else ""
        method = variant or config.method
        config.out = f"runs/{config.dataset}-{method}-{shift}{imb}-s{config.seed}"
    return config, given


def choose(config):
    """In place of `auto`, what this machine can do: device, precision, compile. ValueError."""
    device = config.device
    if device in ("auto", "cuda"):
        device = "cuda:0" if device == "cuda" or torch.cuda.device_count() else "cpu"
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ValueError(f"--device {device} must be auto, cpu, cuda or cuda:N")
    try:
        torch.ones(1, device=device).add(1).item()  # the driver may be too old, or the GPU
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        if config.device != "auto":
            raise ValueError(f"--device {device} cannot be used: {reason}") from None
        print(f"note: on the CPU, since the GPU cannot be used: {reason}", file=sys.stderr)
        device = "cpu"
    config.device = device
    if device == "cpu":
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # not before torch 2.11
        native = "bf16" if any(has and "bf16" in flag for flag, has in flags.items()) else "fp32"
    else:
        major, _ = torch.cuda.get_device_capability(device)
        native = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
        if config.precision == "bf16" and native != "bf16":
            raise ValueError(f"--precision bf16 needs a newer GPU than {device}: take {native}")
    if config.precision == "auto":
        config.precision = native
    if config.compile == "auto":  # Triton needs the GPUs that have half precision
        able = device != "cpu" and native != "fp32" and importlib.util.find_spec("triton")
        config.compile = "on" if able else "off"


def advice(error):
    """What to say of a fault after its own words; None: one of the code, to be shown whole."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search("(out of|not enough|allocate) memory", text):
        return "; out of memory: try a smaller --batch-size, --image-size or --model"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "; try --compile off"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return ""


def main(argv=None, variant=None, prepare=setup, step=train_step):
    """The command. Returns its status: 0; 1, a fault; 2, the user's mistake; 130, interrupted.

    variant, prepare(config) and step: for scripts that change the set-up or the step.
    """
    run = None
    lock = None
    if hasattr(sys.stdout, "reconfigure"):  # where a name cannot be printed, a ? is
        sys.stdout.reconfigure(errors="replace")
    try:
        config, given = parse(argv, variant)
        directory = Path(config.out)
        made = [place for place in (directory, *directory.parents) if not place.exists()]
        lock = hold(directory)
        state = None
        if "fresh" not in given:
            state = read_checkpoint(directory / "checkpoint.pt", config.device)
            if not state and (directory / "config.json").exists():
                raise ValueError(f"--out {directory} holds a config.json without a checkpoint.pt; "
                                 "give another --out or --fresh")
        if state:
            compare(state["config"], asdict(config), given)
            export(state, directory)
        if not state or not state["result"]:
            prepared = prepare(config)
            if state:
                restore(prepared, state)
            else:  # with --fresh, what is there goes before the run starts
                for name in ("checkpoint.pt", "config.json", "log.csv", "result.json"):
                    (directory / name).unlink(missing_ok=True)
            run = prepared  # from here on a fault is the training's: status 1, with its step
            sets = run.sets
            print(f"{variant or config.method} on {config.dataset}: {len(sets.classes)} classes, "
                  f"{len(sets.labels)} labeled, {len(sets.unlabeled)} unlabeled images; from step "
                  f"{run.step}; {config.model}, {config.device}, {config.precision}", flush=True)
            train(run, directory, step)
        print(f"{directory}: log.csv, result.json, config.json, checkpoint.pt")
        return evaluate.main(["--", str(directory)])  # its name may begin with a dash
    except KeyboardInterrupt:
        print("\ninterrupted; without --fresh the same command continues from the last save, "
              "if any")
        return 130
    except Exception as error:
        hint = advice(error)
        if hint is None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"step {run.step}: " if run else ""
        print(f"error: {where}{reason}{hint}", file=sys.stderr)
        return 1 if run or "memory" in hint else 2
    finally:
        if lock:
            lock.release()
            if not {*os.listdir(directory)} - {".lock"}:  # it came to nothing
                (directory / ".lock").unlink(missing_ok=True)
                for place in made:
                    if not os.listdir(place):
                        place.rmdir()


if __name__ == "__main__":
    sys.exit(main())

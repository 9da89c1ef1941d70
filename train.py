"""Train ADELLO, or another method of its family.

    python train.py                                                    # ADELLO on embedded data
    python train.py --dataset cifar10 --imb 100 --shift reversed       # the paper's schedule
    python train.py --dataset folder --data-dir my-images              # train/<class>/*, test/<class>/*
    torchrun --nproc-per-node=2 train.py --dataset cifar10             # the same batch on two devices
    python train.py --help

A run is its directory, runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>/. The same command again
continues an unfinished run. All randomness is a function of (seed, step), so that a continued run
equals an uninterrupted one.
"""

import argparse
import csv
import functools
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist

import data
from evaluate import metrics, predict, reliability
from losses import complementary_loss, confidence_mask, consistency_loss, supervised_loss
from models import EMA, build, load_checkpoint, previous, save_checkpoint, write_whole
from priors import PriorEstimator, alpha_schedule, imbalance_temperature, kl_divergence, smooth, uniform


class Method(NamedTuple):
    """A member of the family: which priors stand in the losses, and where soft labels are used."""
    consistency: bool       # L_u or labeled data alone
    source: Optional[str]   # prior of the unlabeled data, numerator in L_u (in L_s it is P_L)
    target: Optional[str]   # prior that alpha_t smooths, denominator in L_s and L_u
    ccr: Optional[str]      # soft pseudo-labels: None, on the "rest" that L_u masks, or on "all"


METHODS = {
    "supervised": Method(False, None, None, None),
    "fixmatch": Method(True, None, None, None),              # Sohn et al. 2020
    "ccr": Method(True, None, None, "rest"),                 # FixMatch + CCR
    "udal": Method(True, "q_hat", "p_labeled", None),        # Lazarow et al. 2023
    "flexda": Method(True, "q_hat", "q_hat", None),
    "adello": Method(True, "q_hat", "q_hat", "rest"),        # FlexDA + CCR
    "kd": Method(True, "q_hat", "q_hat", "all"),             # ablation: distil on every sample
    "oracle": Method(True, "q_true", "q_true", "rest")}      # analysis: the true prior is known

PAPER = dict(  # the settings of the paper's runs (section 5.1 and its supplement)
    n1=1500, m1=3000, imb=100.0, shift="consistent", labeled_fraction=None, alpha_min=0.1, d=2.0,
    threshold=0.95, model="wrn-28-2", image_size=32, steps=2**18, warmup_steps=50_000, batch_size=64,
    mu=2, lr=0.03, weight_decay=5e-4, ema=0.999, prior_momentum=0.999, bn_momentum=0.001,
    eval_every=1024)
PRESETS = {
    "shapes": PAPER | dict(  # short runs need short memories
        n1=150, m1=600, imb=50.0, shift="reversed", model="wrn-10-1", image_size=16, steps=1500,
        warmup_steps=300, batch_size=32, lr=0.1, ema=0.995, prior_momentum=0.99, bn_momentum=0.05,
        eval_every=100),
    "cifar10": PAPER,
    "cifar100": PAPER | dict(n1=150, m1=300, imb=50.0),
    "stl10": PAPER | dict(n1=150, m1=None, imb=20.0, shift="natural", warmup_steps=0),
    "folder": PAPER | dict(n1=None, m1=None, imb=None, shift="natural", labeled_fraction=0.1)}
NOT_COMPARED = {"data_dir", "device", "compile", "device_memory", "out", "fresh"}  # may change on resume


# ---------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line on standard error, exit status 2."""
        self.exit(2, f"error: {message}\n")


def number(kind, low, high=math.inf, low_open=False, high_open=False):
    """An argparse type: an int or float in a range, anything else is refused with the range named."""
    bounds = f"{'above' if low_open else 'at least'} {low:g}" + (
        f" and {'below' if high_open else 'at most'} {high:g}" if high < math.inf else "")

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if low_open else low <= value) or not (
                value < high if high_open else value <= high) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not valid; it must be {'an integer' if kind is int else 'a number'} {bounds}")
        return value
    return convert


def parse(argv):
    """Command line to settings: the data set's preset, overridden by what was given."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Defaults marked (preset) depend on the data set:\n" + "\n".join(
                        f"  {name}: " + ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                                                  for k, v in preset.items() if v is not None)
                        for name, preset in PRESETS.items()))
    size, count = number(int, 1), number(int, 0)
    positive, fraction = number(float, 0, low_open=True), number(float, 0, 1, True, True)
    memory, unit = number(float, 0, 1, high_open=True), number(float, 0, 1)
    for title, rows in {
        "data": [
            ("dataset", dict(choices=PRESETS, default="shapes"), "data set (default: shapes, embedded)"),
            ("data-dir", dict(default="data"), "where the files are or are downloaded to (default: data)"),
            ("n1", dict(type=size), "labeled images of the largest class, N1 (preset)"),
            ("m1", dict(type=size), "unlabeled images of the largest class, M1 (preset)"),
            ("imb", dict(type=number(float, 1)), "imbalance gamma of the labeled set (preset)"),
            ("shift", dict(choices=["consistent", "uniform", "reversed"]),
             "order of the unlabeled class sizes against the labeled ones (preset)"),
            ("imb-u", dict(type=positive), "gamma of the unlabeled set, below 1 = reversed, in place of --shift"),
            ("labeled-fraction", dict(type=fraction),
             "label this share of every class instead of --n1 --m1 --imb --shift (folder: 0.1)"),
            ("image-size", dict(type=number(int, 8)), "side of the square images in pixels (preset)")],
        "method": [
            ("method", dict(choices=METHODS, default="adello"), "member of the family (default: adello)"),
            ("alpha-min", dict(type=unit), "share of the prior left at the end (preset)"),
            ("d", dict(type=positive), "exponent of the alpha schedule (preset)"),
            ("threshold", dict(type=unit), "confidence of the mask M (preset)"),
            ("warmup-steps", dict(type=count), "steps before CCR starts (preset, in proportion to --steps)"),
            ("prior-momentum", dict(type=memory), "m of the prior estimate (preset)")],
        "training": [
            ("model", {}, "wrn-<depth>-<width> or resnet50 (preset)"),
            ("steps", dict(type=size), "T_max (preset)"),
            ("batch-size", dict(type=size), "labeled images a step, B (preset)"),
            ("mu", dict(type=size), "unlabeled images per labeled one (preset)"),
            ("lr", dict(type=positive), "initial learning rate, cosine schedule (preset)"),
            ("weight-decay", dict(type=number(float, 0)), "on weights, not on batch-norm or biases (preset)"),
            ("ema", dict(type=memory), "decay of the averaged parameters (preset)"),
            ("bn-momentum", dict(type=fraction), "batch-norm momentum, PyTorch's convention (preset)"),
            ("seed", dict(type=number(int, 0, 2**31)), "of split, initialisation and order (default: 0)")],
        "machine": [
            ("device", dict(default="auto"), "auto, cpu, cuda or cuda:N (default: auto)"),
            ("precision", dict(choices=["auto", "fp32", "bf16"], default="auto"),
             "bf16 autocast where the hardware has it natively (default: auto)"),
            ("compile", dict(choices=["auto", "on", "off"], default="auto"),
             "torch.compile of the step (default: auto, on with CUDA)"),
            ("device-memory", dict(type=number(float, 0)),
             "GB of images to keep on the GPU, the rest stays in host memory (default: half of what is free)")],
        "run": [
            ("out", {}, "directory of the run (default: runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>)"),
            ("eval-every", dict(type=size), "steps between evaluations and checkpoints (preset)"),
            ("fresh", dict(action="store_true"), "start over in a directory that holds a run")],
    }.items():
        group = parser.add_argument_group(title)
        for name, options, text in rows:
            group.add_argument("--" + name, help=text, **({"default": None} | options))
    parser.set_defaults(seed=0)
    given = vars(parser.parse_args(argv))
    return complete(given)


def complete(given):
    """Fill in the preset and settle what depends on several options. Raises ValueError."""
    def refuse(options, why):
        named = ["--" + name.replace("_", "-") for name in options if given.get(name) is not None]
        if named:
            raise ValueError(f"{', '.join(named)} cannot be used {why}")

    preset = PRESETS[given["dataset"]]
    if given["labeled_fraction"]:
        refuse(("n1", "m1", "imb", "imb_u", "shift"), "with --labeled-fraction")
        preset = preset | dict(n1=None, m1=None, imb=None, shift="natural")
    elif given["dataset"] == "stl10":
        refuse(("m1", "imb_u", "shift"), "with stl10: its unlabeled images are taken as they come")
    elif given["dataset"] == "folder" and (given["n1"] or given["m1"] or given["imb"]):
        if not (given["n1"] and given["m1"]):
            raise ValueError("a long-tailed folder needs both --n1 and --m1")
        preset = preset | dict(imb=100.0, shift="consistent", labeled_fraction=None)
    elif given["dataset"] == "folder":
        refuse(("imb_u", "shift"), "with a folder unless --n1 and --m1 are given")
    settings = given | preset | {k: v for k, v in given.items() if v is not None}
    if settings["shift"] != "natural":
        implied = {"consistent": settings["imb"], "uniform": 1.0, "reversed": 1 / settings["imb"]}
        if given["imb_u"] is None:
            settings["imb_u"] = implied[settings["shift"]]
        elif given["shift"] and not math.isclose(given["imb_u"], implied[given["shift"]], rel_tol=1e-6):
            raise ValueError(f"--imb-u {given['imb_u']:g} contradicts --shift {given['shift']}, which means "
                             f"{implied[given['shift']]:g}; leave one of them out")
        else:
            settings["shift"] = next((name for name, value in implied.items()
                                      if math.isclose(given["imb_u"], value, rel_tol=1e-6)),
                                     f"imbu{given['imb_u']:.4g}")
    if given["warmup_steps"] is None:
        settings["warmup_steps"] = preset["warmup_steps"] * settings["steps"] // preset["steps"]
    if settings["warmup_steps"] > settings["steps"]:
        raise ValueError(f"--warmup-steps {settings['warmup_steps']} is beyond --steps {settings['steps']}")
    imb = "" if settings["imb"] is None else f"-imb{settings['imb']:g}"
    settings["out"] = settings["out"] or ("runs/{dataset}-{method}-{shift}".format(**settings) + imb
                        + f"-s{settings['seed']}")
    return settings


# ---------------------------------------------------------------------------------------- a step

def train_step(run, method, threshold, labeled, labels, unlabeled, hidden, draws):
    """One step: one forward over labeled, weak and strong images, three losses, one update.

    labeled: (B, 3, H, W) uint8; labels: (B,); unlabeled: (U, 3, H, W) uint8, U = mu B; hidden: (U,)
    or None, counted and not learned from; draws: (B + U, 15) uniform. Changes everything in `run`
    and returns the loss. The learning rate, alpha and T are tensors in `run`: nothing recompiles.
    """
    B, U = len(labels), len(unlabeled)
    views = torch.cat([data.weak(torch.cat([labeled, unlabeled]), draws=draws[:, :3]),
                       data.strong(unlabeled, draws=draws[B:, 3:])])             # (B + 2U, 3, H, W)
    images = data.normalize(views, run.mean, run.std).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.bf16):
        logits = run.forward(images)               # shared batch-norm statistics, as the authors have it
    logits_labeled, logits_weak, logits_strong = logits.float().split([B, U, U])
    probs = logits_weak.detach().softmax(dim=1)    # p(u): raw, no adjustment, no gradient
    mask = confidence_mask(probs, threshold)       # M(u)

    q = {"p_labeled": run.p_labeled, "q_hat": run.estimator.q_hat, "q_true": run.q_true}
    source = q[method.source] if method.source else None
    target = smooth(q[method.target], run.alpha) if method.target else None
    p_labeled = run.p_labeled if method.target else None

    loss_s = supervised_loss(logits_labeled, labels, p_labeled, target)
    loss_u = loss_uc = torch.zeros_like(loss_s)
    if method.consistency:
        loss_u = consistency_loss(logits_strong, probs, mask, source, target)
    if method.ccr:
        silent = mask if method.ccr == "rest" else torch.zeros_like(mask)
        loss_uc = run.ccr * complementary_loss(logits_strong, probs, silent, source, target, run.temperature)
    loss = loss_s + loss_u + loss_uc

    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.ema.update(run.model)
    if method.consistency:                         # Qhat changes after the losses have used it
        run.estimator.update(mean_over_ranks(probs.mean(dim=0))[None])
    hits = mask * (probs.argmax(dim=1) == hidden) if hidden is not None else mask * math.nan
    run.totals += torch.stack([loss_s.detach(), loss_u.detach(), loss_uc.detach(), mask.sum() / max(U, 1),
                               hits.sum() / max(U, 1)])
    return loss.detach()


def mean_over_ranks(tensor):
    """The mean of a tensor over all processes; itself in a run of one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


@functools.lru_cache(maxsize=8)
def permutation(size, *seeds):
    return np.random.default_rng(seeds).permutation(size)


def batch_indices(size, batch_size, step, *seeds):
    """Indices of a step's batch: its place in an endless chain of permutations of 0..size-1.

    A function of its arguments alone. Every image comes once an epoch; a batch larger than the set
    goes on into the next permutation. Returns (batch_size,) int64.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    return torch.from_numpy(np.concatenate([
        permutation(size, *seeds, epoch)[max(first - epoch * size, 0):last - epoch * size]
        for epoch in range(first // size, (last - 1) // size + 1)]))


# --------------------------------------------------------------------------------------- the run

def place(images, device, room):
    """Images on the device while `room` (bytes, a list of one) lasts, else in pinned host memory."""
    if device.type == "cpu":
        return images
    if images.numel() <= room[0]:
        room[0] -= images.numel()
        return images.to(device)
    return images.pin_memory()


def gather(tensor, index, device):
    """Rows of a tensor that may live in host memory, on the device."""
    return tensor[index.to(tensor.device)].to(device, non_blocking=True)


def prepare(settings):
    """Load the data, build the network and all that a step changes. Raises ValueError or OSError."""
    s, world = SimpleNamespace(**settings), int(os.environ.get("WORLD_SIZE", 1))
    rank, cuda = int(os.environ.get("RANK", 0)), torch.cuda.is_available()
    name = s.device if s.device != "auto" else "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and (
            (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {s.device} is not here; there are the cpu and "
                         f"{torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if s.precision == "auto":
        flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = (torch.cuda.is_bf16_supported() if device.type == "cuda"
                  else flags.get("avx512_bf16") or flags.get("amx_bf16"))
        s.precision = settings["precision"] = "bf16" if native else "fp32"
    if s.batch_size % world:
        raise ValueError(f"--batch-size {s.batch_size} does not divide over {world} processes")

    sets = data.load(s.dataset, s.data_dir, s.n1, s.m1, s.imb, s.imb_u, s.labeled_fraction,
                     s.image_size, s.seed)
    K = len(sets.classes)
    if METHODS[s.method].source == "q_true" and sets.hidden_labels is None:
        raise ValueError(f"--method {s.method} needs the true prior, and the unlabeled images of "
                         f"{s.dataset} have no labels; choose another --method")
    torch.manual_seed(s.seed)
    model = build(s.model, K, s.bn_momentum).to(device, memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    scalar = functools.partial(torch.tensor, device=device)
    run = SimpleNamespace(
        model=model, forward=model, ema=EMA(model, s.ema), bf16=s.precision == "bf16",
        estimator=PriorEstimator(K, s.prior_momentum, device), lr=scalar(s.lr), alpha=scalar(1.0),
        temperature=scalar(1.0), ccr=scalar(0.0), totals=torch.zeros(5, device=device),
        mean=sets.mean, std=sets.std, device=device, rank=rank, world=world, step=0, rows=[], seconds=0.0)
    run.optimizer = torch.optim.SGD(
        [dict(params=decayed, weight_decay=s.weight_decay), dict(params=others, weight_decay=0.0)],
        lr=run.lr, momentum=0.9, nesterov=True, fused=True if device.type == "cuda" else None,
        foreach=True if device.type == "cpu" else None)
    run.p_labeled = (torch.bincount(sets.labels, minlength=K) / len(sets.labels)).to(device)
    run.q_true = None
    if sets.hidden_labels is not None:
        run.q_true = (torch.bincount(sets.hidden_labels, minlength=K) / len(sets.hidden_labels)).to(device)
    free = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 0
    room = [s.device_memory * 1e9 if s.device_memory is not None else free]
    run.sets = sets._replace(labels=sets.labels.to(device), **{
        name: place(getattr(sets, name), device, room) for name in ("unlabeled", "labeled", "test")})
    return run


def snapshot(run, settings):
    """Everything the next step depends on and the log so far; random states follow from the step."""
    return {"settings": settings, "step": run.step, "model": run.model.state_dict(),
            "ema": run.ema.model.state_dict(), "optimizer": run.optimizer.state_dict(),
            "estimator": run.estimator.state_dict(), "temperature": run.temperature, "ccr": run.ccr,
            "totals": run.totals, "rows": run.rows, "seconds": run.seconds}


def restore(run, state):
    """Put a snapshot back."""
    run.model.load_state_dict(state["model"])
    run.ema.model.load_state_dict(state["ema"])
    run.estimator.load_state_dict(state["estimator"])
    run.optimizer.load_state_dict(state["optimizer"])
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr  # the tensor that the loop fills
    for name in ("temperature", "ccr", "totals"):
        getattr(run, name).copy_(state[name])
    run.step, run.rows, run.seconds = state["step"], state["rows"], state["seconds"]


def evaluation(run, settings, since):
    """Metrics of the EMA network on the test set, and a row of log.csv. Returns (metrics, logits, row)."""
    logits = predict(run.ema.model, run.sets.test, run.mean, run.std, run.device)
    found = metrics(logits, run.sets.test_labels)
    totals = (mean_over_ranks(run.totals.clone()) / (run.step - since)).tolist()
    q_hat, K = run.estimator.q_hat.cpu(), len(run.p_labeled)
    kl_true = kl_divergence(run.q_true.cpu(), q_hat).item() if run.q_true is not None else math.nan
    row = {"step": run.step, "seconds": round(run.seconds, 2), "lr": run.lr.item(),
           "alpha": alpha_schedule(run.step, settings["steps"], settings["alpha_min"], settings["d"]),
           "loss_s": totals[0], "loss_u": totals[1], "loss_uc": totals[2], "mask_rate": totals[3],
           "pseudo_label_accuracy": totals[4] / totals[3] if totals[3] > 0 else math.nan,
           "kl_q_qhat": kl_true, "kl_uniform_qhat": kl_divergence(uniform(K), q_hat).item(),
           "temperature": run.temperature.item()}
    return found, logits, row | {k: v for k, v in found.items() if k not in ("per_class_accuracy", "brier")}


def write_log(directory, rows):
    """log.csv from the rows of the checkpoint, so that the two never disagree."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(directory / "log.csv", text.getvalue().encode())


def save(run, settings, directory):
    """Checkpoint and log; a full disk is a warning, the last good checkpoint stays."""
    if run.rank == 0:
        try:
            save_checkpoint(directory / "checkpoint.pt", snapshot(run, settings))
            if run.rows:
                write_log(directory, run.rows)
        except OSError as error:
            print(f"warning: step {run.step} could not be saved ({error}); training goes on, the last "
                  "good checkpoint stays", file=sys.stderr)


def say(text, live=False):
    """A line on standard output; a live one is overwritten by the next, and only shown on a terminal."""
    terminal = sys.stdout.isatty()
    if not live:
        print(("\r\033[K" if terminal else "") + text, flush=True)
    elif terminal:
        print("\r\033[K" + text, end="", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def train(run, settings, directory):
    """The loop, from run.step to the last step. Returns the exit status, 0 or 128 + signal."""
    s, method, sets = SimpleNamespace(**settings), METHODS[settings["method"]], run.sets
    mu = s.mu if method.consistency else 0
    mine = slice(run.rank, None, run.world)
    step_function = train_step
    if s.compile == "on" or s.compile == "auto" and run.device.type == "cuda":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=run.device))
            step_function = torch.compile(train_step)
        except Exception as error:  # whatever a missing compiler raises
            say(f"no working compiler here ({str(error).splitlines()[0]}), running eagerly")
    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop.append(number))
    first, begun, shown, saved = run.step, time.time(), 0.0, time.time()
    before = run.seconds
    evaluated = run.rows[-1]["step"] if run.rows else 0
    bad = torch.full((), math.inf, device=run.device)

    while run.step < s.steps:
        step = run.step
        run.lr.fill_(s.lr * math.cos(7 * math.pi * step / (16 * s.steps)))
        run.alpha.fill_(alpha_schedule(step, s.steps, s.alpha_min, s.d))
        if method.ccr and step == s.warmup_steps:
            prior = run.q_true if method.source == "q_true" else run.estimator.q_hat
            run.temperature.copy_(imbalance_temperature(prior))  # read once, frozen from here on
            run.ccr.fill_(1.0)
        index = batch_indices(len(sets.labeled), s.batch_size, step, s.seed, 0)[mine]
        others = batch_indices(len(sets.unlabeled), s.batch_size * mu, step, s.seed, 1)[mine]
        draws = np.random.default_rng((s.seed, 2, step)).random((s.batch_size * (1 + mu), 15), np.float32)
        draws = np.concatenate([draws[:s.batch_size][mine], draws[s.batch_size:][mine]])
        loss = step_function(
            run, method, s.threshold, gather(sets.labeled, index, run.device),
            gather(sets.labels, index, run.device), gather(sets.unlabeled, others, run.device),
            None if sets.hidden_labels is None else gather(sets.hidden_labels, others, run.device),
            torch.from_numpy(draws).to(run.device, non_blocking=True))
        bad = torch.where(torch.isfinite(loss) | bad.isfinite(), bad, step)
        run.step += 1
        now = time.time()
        run.seconds = before + now - begun
        due = run.step % s.eval_every == 0 or run.step == s.steps
        stopping = bool(stop) if run.world == 1 else agreed(stop, run)
        if due or stopping or now - shown > 1 or run.device.type == "cpu":
            if bad.isfinite():
                raise FloatingPointError(f"the loss is not finite at step {int(bad)}; the last good "
                                         f"checkpoint stays in {directory}; a lower --lr may help")
        if now - shown > 1:
            rate = (run.step - first) / (now - begun)
            say(f"step {run.step}/{s.steps}  loss {loss.item():.3f}  {rate:.1f} steps/s  "
                f"ETA {clock((s.steps - run.step) / rate)}", live=True)
            shown = now
        if due:
            found, logits, row = evaluation(run, settings, evaluated)
            run.rows.append(row)
            run.totals.zero_()
            evaluated = run.step
            rate = (run.step - first) / (now - begun)
            say(f"step {run.step}/{s.steps}  loss {row['loss_s'] + row['loss_u'] + row['loss_uc']:.3f}  "
                f"mask {row['mask_rate']:.2f}  balanced accuracy {100 * row['balanced_accuracy']:.1f}  "
                f"ECE {100 * row['ece']:.1f}  {rate:.1f} steps/s  ETA {clock((s.steps - run.step) / rate)}")
        if due or stopping or now - saved > 120:
            save(run, settings, directory)
            saved = time.time()
        if stopping:
            say(f"stopped at step {run.step}; the same command continues")
            return 128 + stop[0]
    finish(run, settings, directory, found, logits)
    return 0


def finish(run, settings, directory, found, logits):
    """result.json: the last metrics, the mean of the last 20 evaluations, what the pictures need."""
    last = run.rows[-20:]
    result = found | {k: run.rows[-1][k] for k in ("kl_q_qhat", "kl_uniform_qhat", "temperature", "step")}
    result |= {"per_class_accuracy": found["per_class_accuracy"].tolist(),
               "balanced_accuracy_last20": sum(r["balanced_accuracy"] for r in last) / len(last),
               "reliability": reliability(logits.double().softmax(1), run.sets.test_labels).tolist(),
               "classes": run.sets.classes, "q_hat": run.estimator.q_hat.tolist(),
               "q_true": None if run.q_true is None else run.q_true.tolist(),
               "labeled_counts": torch.bincount(run.sets.labels.cpu()).tolist(),
               "seconds": round(run.seconds, 1)}
    if run.rank == 0:
        write_whole(directory / "result.json", json.dumps(result, indent=1).encode())


def agreed(stop, run):
    raise NotImplementedError


def main(argv=None):
    try:
        settings = parse(argv)
        directory = Path(settings["out"])
        run = prepare(settings)
        directory.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_whole(directory / "config.json", json.dumps(settings, indent=1).encode())
    status = train(run, settings, directory)
    r = json.load(open(directory / "result.json"))
    say(f"bal {100*r['balanced_accuracy']:.1f} last20 {100*r['balanced_accuracy_last20']:.1f} ECE {100*r['ece']:.1f} MCE {100*r['mce']:.1f} KL {r['kl_q_qhat']:.3f} sec {r['seconds']}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Train ADELLO, or another method of its family.

    python train.py                                                    # ADELLO on embedded data
    python train.py --dataset cifar10 --imb 100 --shift reversed       # the paper's schedule
    python train.py --dataset folder --data-dir my-images              # train/<class>/*, test/...
    torchrun --nproc-per-node=2 train.py --dataset cifar10             # one batch on two devices
    python train.py --help

A run is its directory, runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>/. The same command again
continues an unfinished run. All randomness is a function of (seed, step), so that a continued run
equals an uninterrupted one.
"""

import argparse
import atexit
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
import evaluate
import models
from losses import complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, imbalance_temperature, smooth


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
    threshold=0.95, model="wrn-28-2", image_size=32, steps=2**18, warmup_steps=50_000,
    batch_size=64, mu=2, lr=0.03, weight_decay=5e-4, ema=0.999, prior_momentum=0.999,
    bn_momentum=0.001, eval_every=1024)
PRESETS = {
    "shapes": PAPER | dict(  # short runs need short memories
        n1=150, m1=600, imb=50.0, shift="reversed", model="wrn-10-1", image_size=16, steps=1500,
        warmup_steps=300, batch_size=16, lr=0.05, ema=0.995, prior_momentum=0.99, bn_momentum=0.05,
        eval_every=100),
    "cifar10": PAPER,
    "cifar100": PAPER | dict(n1=150, m1=300, imb=50.0),
    "stl10": PAPER | dict(n1=150, m1=None, imb=20.0, shift="natural", warmup_steps=0),
    "folder": PAPER | dict(n1=None, m1=None, imb=None, shift="natural", labeled_fraction=0.1)}
FREE = {*evaluate.FREE} - {"seed"}  # settings that may differ when a run goes on


# ---------------------------------------------------------------------------------- command line

def number(kind, low, high=math.inf, ends="[)"):
    """An argparse type: an int or float in an interval, whose ends say what belongs to it."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if (low < value or value == low and ends[0] == "[") and (
                value < high or value == high and ends[1] == "]"):
            return value
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {name} in {ends[0]}{low:g}, {high:g}{ends[1]}")
    return convert


def parse(argv=None):
    """Command line to settings: the data set's preset, overridden by what is given."""
    table = [["presets:", *PRESETS]] + [
        [name, *("-" if preset[name] is None else str(preset[name]) for preset in PRESETS.values())]
        for name in PAPER]
    lines = ["".join(f"{cell:<18}" for cell in row).rstrip() for row in table]
    parser = models.Parser(description=__doc__.split("\n\n")[0], epilog="\n".join(lines),
                           allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, size, above_0 = number(int, 0), number(int, 1), number(float, 0, ends="()")
    unit, memory, share = (number(float, 0, 1, ends) for ends in ("[]", "[)", "()"))

    add = parser.add_argument_group("data (defaults: the data set's preset, below)").add_argument
    add("--dataset", choices=PRESETS, default="shapes", help="default: shapes, embedded")
    add("--data-dir", default="data", help="where the files are or come to (default: data)")
    add("--n1", type=size, help="labeled images of the largest class, N1")
    add("--m1", type=size, help="unlabeled images of the largest class, M1")
    add("--imb", type=number(float, 1), help="gamma of the labeled set: largest / smallest class")
    add("--shift", choices=("consistent", "uniform", "reversed"),
        help="class sizes of the unlabeled set: as the labeled ones, all equal, or reversed")
    add("--imb-u", type=above_0,
        help="gamma of the unlabeled set, below 1 reversed; not with --shift")
    add("--labeled-fraction", type=share,
        help="label this share of each class; without the five above")
    add("--image-size", type=number(int, 8, 1024, "[]"), help="side of the images in pixels")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="adello", help="which of the family (default: adello)")
    add("--alpha-min", type=unit, help="share of the prior that is left in the target at the end")
    add("--d", type=above_0, help="exponent of the alpha schedule")
    add("--threshold", type=unit, help="confidence of a hard pseudo-label, the mask M")
    add("--warmup-steps", type=count, help="steps before CCR starts (in proportion to --steps)")
    add("--prior-momentum", type=memory, help="m of the estimated prior Qhat")

    add = parser.add_argument_group("training").add_argument
    add("--model", help="wrn-<depth>-<width> or resnet50")
    add("--steps", type=size, help="T_max")
    add("--batch-size", type=size, help="labeled images a step, B")
    add("--mu", type=size, help="unlabeled images for each labeled one")
    add("--lr", type=above_0, help="first learning rate of the cosine schedule")
    add("--weight-decay", type=number(float, 0), help="on weights, not on batch-norm and biases")
    add("--ema", type=memory, help="decay of the averaged parameters that are evaluated")
    add("--bn-momentum", type=number(float, 0, 1, "(]"),
        help="of batch-norm, in PyTorch's convention")
    add("--seed", type=number(int, 0, 2**31, "[]"), default=0,
        help="of split, initialisation, order and views (default: 0)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="bf16 autocast, by default where the hardware has it natively")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="hand the step to torch.compile, by default on CUDA")
    add("--device-memory", type=number(float, 0), help="GB of images kept on the GPU, the rest in "
        "pinned host memory (default: half of what is free)")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="directory (default: runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>)")
    add("--eval-every", type=size, help="steps between evaluations, a checkpoint at each")
    add("--fresh", action="store_true", help="start over where the directory holds a run")
    return complete(vars(parser.parse_args(argv)))


def complete(given):
    """Fill in the preset and settle what depends on several options. Raises ValueError."""
    def refuse(why, *names):
        named = ["--" + name.replace("_", "-") for name in names if given[name] is not None]
        if named:
            raise ValueError(f"{', '.join(named)} cannot be used {why}")

    preset = PRESETS[given["dataset"]]
    if given["labeled_fraction"]:
        refuse("with --labeled-fraction", "n1", "m1", "imb", "imb_u", "shift")
        preset = preset | dict(n1=None, m1=None, imb=None, shift="natural")
    elif given["dataset"] == "stl10":
        refuse("with stl10, whose unlabeled images are taken as they come", "m1", "imb_u", "shift")
    elif given["dataset"] == "folder" and given["n1"] and given["m1"]:
        preset = preset | dict(imb=100.0, shift="consistent", labeled_fraction=None)
    elif given["dataset"] == "folder":
        refuse("with a folder unless both --n1 and --m1 are given", "n1", "m1", "imb", "imb_u",
               "shift")
    s = given | preset | {name: value for name, value in given.items() if value is not None}

    if s["shift"] != "natural":
        implied = {"consistent": s["imb"], "uniform": 1.0, "reversed": 1 / s["imb"]}
        if s["imb_u"] is None:
            s["imb_u"] = implied[s["shift"]]
        like = [k for k, value in implied.items() if math.isclose(s["imb_u"], value, rel_tol=1e-6)]
        if given["shift"] and given["shift"] not in like:
            raise ValueError(f"--imb-u {s['imb_u']:g} contradicts --shift {given['shift']}, which "
                             f"means {implied[given['shift']]:g}; leave one of them out")
        s["shift"] = given["shift"] or (like or [f"imbu{s['imb_u']:.4g}"])[0]
    if given["warmup_steps"] is None:
        s["warmup_steps"] = preset["warmup_steps"] * s["steps"] // preset["steps"]
    if s["warmup_steps"] > s["steps"]:
        raise ValueError(f"--warmup-steps {s['warmup_steps']} is beyond --steps {s['steps']}")
    with torch.device("meta"):
        models.build(s["model"], 2)  # an unknown name is refused before anything is loaded
    s["device"], s["precision"] = models.choose_device(s["device"], s["precision"])
    imbalance = "" if s["imb"] is None else f"-imb{s['imb']:g}"
    s["out"] = s["out"] or f"runs/{s['dataset']}-{s['method']}-{s['shift']}{imbalance}-s{s['seed']}"
    return s


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
    images = data.normalize(views, run.sets.mean, run.sets.std)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.bf16):
        logits = run.forward(images)               # shared batch-norm statistics, as the authors do
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
        loss_uc = run.ccr * complementary_loss(logits_strong, probs, silent, source, target,
                                               run.temperature)
    loss = loss_s + loss_u + loss_uc

    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.ema.update(run.model)
    if method.consistency:                         # Qhat changes after the losses have used it
        run.estimator.update(mean_over_ranks(probs.mean(dim=0))[None])
    hits = mask * (probs.argmax(dim=1) == hidden) if hidden is not None else mask * math.nan
    run.totals.add_(torch.stack([loss_s.detach(), loss_u.detach(), loss_uc.detach(),
                                 mask.sum() / max(U, 1), hits.sum() / max(U, 1)]))
    return loss.detach()


def mean_over_ranks(tensor):
    """Mean of a tensor over all processes, in place; in a run of one, the tensor as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


# --------------------------------------------------------------------------------------- the run

def prepare(s):
    """Load the data and build all that a step needs or changes. Raises ValueError or OSError."""
    device, rank, world = torch.device(s.device), *ranks()
    if s.batch_size % world:
        raise ValueError(f"--batch-size {s.batch_size} does not divide over {world} processes")
    sets = data.load(s.dataset, s.data_dir, s.n1, s.m1, s.imb, s.imb_u, s.labeled_fraction,
                     s.image_size, s.seed)
    K = len(sets.classes)
    if METHODS[s.method].source == "q_true" and sets.hidden_labels is None:
        raise ValueError(f"--method {s.method} needs the true prior, but the unlabeled images have "
                         "no labels")
    p_labeled, q_true = (None if labels is None else
                         (torch.bincount(labels, minlength=K) / len(labels)).to(device)
                         for labels in (sets.labels, sets.hidden_labels))

    torch.manual_seed(s.seed)
    model = models.build(s.model, K, s.bn_momentum)
    forward = model.to(device, memory_format=torch.channels_last)
    if world > 1:
        if device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        forward = torch.nn.parallel.DistributedDataParallel(model)
    lr = torch.tensor(s.lr, device=device)
    fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.SGD(models.parameter_groups(model, s.weight_decay), lr, momentum=0.9,
                                nesterov=True, **fast)
    room = math.inf
    if device.type == "cuda":
        room = (torch.cuda.mem_get_info(device)[0] / 2 if s.device_memory is None
                else s.device_memory * 1e9)
    return SimpleNamespace(
        device=device, rank=rank, world=world, sets=data.place(sets, device, room),
        bf16=s.precision == "bf16", forward=forward, p_labeled=p_labeled, q_true=q_true, lr=lr,
        alpha=torch.ones((), device=device),
        # from here on: what a checkpoint holds
        model=model, ema=models.EMA(model, s.ema), optimizer=optimizer,
        estimator=PriorEstimator(K, s.prior_momentum, device),
        temperature=torch.ones((), device=device), ccr=torch.zeros((), device=device),
        totals=torch.zeros(5, device=device), step=0, seconds=0.0, rows=[])


def snapshot(run, settings):
    """All that the next step depends on, and the log; random numbers follow from the step."""
    return {"settings": settings, "model": run.model.state_dict(),
            "ema": run.ema.model.state_dict(), "optimizer": run.optimizer.state_dict(),
            "estimator": run.estimator.state_dict(), "temperature": run.temperature,
            "ccr": run.ccr, "totals": run.totals, "step": run.step, "seconds": run.seconds,
            "rows": run.rows}


def restore(run, state):
    """Put a snapshot back into a prepared run."""
    for name in ("model", "optimizer", "estimator"):
        getattr(run, name).load_state_dict(state[name])
    run.ema.model.load_state_dict(state["ema"])
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr  # the tensor that the loop fills
    for name in ("temperature", "ccr", "totals"):
        getattr(run, name).copy_(state[name])
    run.step, run.seconds, run.rows = state["step"], state["seconds"], state["rows"]


def save(run, settings, directory):
    """Checkpoint, then log.csv from the same rows. A full disk is a warning; the old files stay."""
    if run.rank == 0:
        try:
            models.save_checkpoint(directory / "checkpoint.pt", snapshot(run, settings))
            evaluate.write_log(directory, run.rows)
        except OSError as error:
            print(f"warning: step {run.step} could not be saved ({error}); training goes on, the "
                  "last good checkpoint stays", file=sys.stderr, flush=True)


def batch(run, s, mu, step):
    """The arguments of train_step: this process's part of the global batch of a step."""
    sets, device, mine = run.sets, run.device, slice(run.rank, None, run.world)
    labeled = data.batch_indices(len(sets.labeled), s.batch_size, step, s.seed, 0)[mine]
    others = data.batch_indices(len(sets.unlabeled), s.batch_size * mu, step, s.seed, 1)[mine]
    shape = s.batch_size * (1 + mu), 15
    draws = np.random.default_rng((s.seed, 2, step)).random(shape, np.float32)
    draws = np.concatenate([draws[:s.batch_size][mine], draws[s.batch_size:][mine]])
    return (data.gather(sets.labeled, labeled, device), data.gather(sets.labels, labeled, device),
            data.gather(sets.unlabeled, others, device),
            data.gather(sets.hidden_labels, others, device),
            torch.from_numpy(draws).to(device, non_blocking=True))


def train(run, settings, directory):
    """The loop, from run.step to the last step. Returns the exit status: 0, or 128 + signal.

    Raises FloatingPointError when a loss is not finite, OSError when the result cannot be written.
    """
    s, method = SimpleNamespace(**settings), METHODS[settings["method"]]
    mu = s.mu if method.consistency else 0
    step_function = models.compiled(train_step, s.compile, run.device)
    stop, bad = [], torch.full((), math.inf, device=run.device)
    for name in (signal.SIGINT, signal.SIGTERM):   # once: finish the step, save; twice: at once
        signal.signal(name, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    advice = f"the last good checkpoint stays in {directory}, a lower --lr may help"
    status, before = Status(run, s.steps), run.seconds
    saved, logits = time.time(), None

    while run.step < s.steps:
        step = run.step
        run.lr.fill_(s.lr * math.cos(7 * math.pi * step / (16 * s.steps)))
        run.alpha.fill_(alpha_schedule(step, s.steps, s.alpha_min, s.d))
        if method.ccr and step == s.warmup_steps:  # T is read once and frozen, as the authors do
            known = run.q_true if method.source == "q_true" else run.estimator.q_hat
            run.temperature.copy_(imbalance_temperature(known))
            run.ccr.fill_(1.0)
        loss = step_function(run, method, s.threshold, *batch(run, s, mu, step))
        bad = torch.where(torch.isfinite(loss) | torch.isfinite(bad), bad, step)
        run.step += 1

        evaluating = run.step % s.eval_every == 0 or run.step == s.steps
        stopping = agreed(stop, run)
        if evaluating or stopping or status.due() or run.device.type == "cpu":  # reading waits
            if torch.isfinite(bad):
                raise FloatingPointError(f"the loss is not finite at step {int(bad)}; {advice}")
        run.seconds = round(before + time.time() - status.begun, 2)
        if status.due():
            status.show()
        if evaluating:
            logits = ema_logits(run)
            if not torch.isfinite(logits).all():
                raise FloatingPointError(f"the logits are not finite at step {run.step}; {advice}")
            averages = mean_over_ranks(run.totals) / (run.step - evaluated(run))
            alpha = alpha_schedule(run.step, s.steps, s.alpha_min, s.d)
            run.rows.append(evaluate.log_row(run, logits, alpha, averages.tolist()))
            run.totals.zero_()
            status.show(end="\n")
        if evaluating or stopping or time.time() - saved > 120:
            save(run, settings, directory)
            saved = time.time()
        if stopping:
            say(f"stopped after step {run.step}; the same command continues")
            return 128 + (stop or [signal.SIGTERM])[0]
    if run.rank == 0:
        evaluate.write_result(directory, run, ema_logits(run) if logits is None else logits)
    return 0


def ema_logits(run):
    """Logits of the EMA network on the test set, (N, K)."""
    return evaluate.predict(run.ema.model, run.sets.test, run.sets.mean, run.sets.std, run.device)


def evaluated(run):
    """The step of the last evaluation; run.totals are sums since then."""
    return run.rows[-1]["step"] if run.rows else 0


def agreed(stop, run):
    """Whether any process was told to stop: all of them must leave the loop after the same step."""
    if run.world == 1 or run.device.type == "cuda" and run.step % 16:
        return bool(stop) and run.world == 1
    return mean_over_ranks(torch.tensor(float(bool(stop)), device=run.device)).item() > 0


class Status:
    """The status line: live on a terminal; elsewhere one a minute and one an evaluation."""

    def __init__(self, run, steps):
        self.run, self.steps, self.first, self.told = run, steps, run.step, False
        self.begun = self.shown = time.time()

    def due(self):
        return time.time() - self.shown > (1 if sys.stdout.isatty() else 60)

    def show(self, end=""):
        run, row = self.run, self.run.rows[-1] if self.run.rows else {}
        rate = (run.step - self.first) / (time.time() - self.begun)
        left, taken = (self.steps - run.step) / rate, run.step - evaluated(run)
        *losses, mask, _ = ((run.totals / taken).tolist() if taken else
                            [row[k] for k in ("loss_s", "loss_u", "loss_uc", "mask_rate")] + [0])
        if not self.told and left > 3600 and run.device.type == "cpu":
            say(f"without a GPU the rest takes about {left / 3600:.1f} hours; --steps "
                f"{int(3600 * rate)} would fit an hour")
        self.told, self.shown = True, time.time()
        say(f"step {run.step}/{self.steps}  loss {sum(losses):.3f}  mask {mask:.2f}  balanced "
            f"accuracy {100 * row.get('balanced_accuracy', math.nan):.1f}  {rate:.2f} steps/s  ETA "
            f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}",
            end if sys.stdout.isatty() else "\n")


def say(text, end="\n"):
    """A line on standard output; on a terminal it replaces the live one."""
    print(("\r\033[K" if sys.stdout.isatty() else "") + text, end=end, flush=True)


def ranks():
    """(rank, number of processes) as torchrun says them, (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------- the command

def found_in(directory, settings):
    """The checkpoint that the directory holds, or None, after --fresh too.

    Raises ValueError when it is a file, a run of other settings (one is named) or damaged.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--out {directory} is a file; name a directory")
    if settings["fresh"] or not directory.exists():
        return None
    state, config = models.load_checkpoint(directory / "checkpoint.pt"), directory / "config.json"
    for found in ([evaluate.read_json(config)] if config.exists() else []) + (
            [state["settings"]] if state else []):
        for name, value in settings.items():
            if name not in FREE and found.get(name) != value:
                raise ValueError(f"{directory} holds a run with --{name.replace('_', '-')} "
                                 f"{found.get(name)}, not {value}; name another --out, or start "
                                 "over with --fresh")
    return state


def main(argv=None):
    """The command. Returns the exit status: 0; 1, a fault; 2, the user's mistake; 128 + signal."""
    rank, world = ranks()
    try:
        settings = parse(argv)
        directory, lock = Path(settings["out"]), None
        if world > 1:
            dist.init_process_group("gloo" if settings["device"] == "cpu" else "nccl")
            atexit.register(dist.destroy_process_group)
            sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
        if rank == 0 and directory.is_dir():
            lock = models.hold(directory)
        state = found_in(directory, settings)
        if (directory / "result.json").exists() and not settings["fresh"]:
            say(evaluate.summary(directory))
            return 0
        run = prepare(SimpleNamespace(**settings))
        if state:
            restore(run, state)
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            lock = lock or models.hold(directory)
            if settings["fresh"]:
                for name in ("checkpoint.pt", "previous-checkpoint.pt", "log.csv", "result.json"):
                    (directory / name).unlink(missing_ok=True)
            evaluate.write_config(directory, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    say(f"{settings['method']} on {settings['dataset']}: {len(run.sets.classes)} classes, "
        f"{len(run.sets.labels)} labeled and {len(run.sets.unlabeled)} unlabeled images, "
        f"{settings['model']} with {sum(p.numel() for p in run.model.parameters()):,} parameters; "
        f"{run.device}, {settings['precision']}" + f", continued at step {run.step}" * bool(state))
    try:
        status = train(run, settings, directory)
    except (FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if world == 1:
            raise
        print(f"error: step {run.step} failed, probably since another process ended "
              f"({str(error).splitlines()[0]}); the same command continues from the last "
              f"checkpoint in {directory}", file=sys.stderr)
        return 1
    if status == 0 and rank == 0:
        say(evaluate.summary(directory))
    return status


if __name__ == "__main__":
    sys.exit(main())

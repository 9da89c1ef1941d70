"""Train ADELLO, or another method of its family.

    python train.py                                                    # ADELLO on embedded data
    python train.py --dataset cifar10 --imb 100 --shift reversed       # the paper's schedule
    python train.py --dataset folder --data-dir my-images              # train/<class>/*, test/...

A run is its directory; the same command again continues it. All randomness is a function of (seed,
step), so that a continued run equals an uninterrupted one.
"""

import argparse
import datetime
import functools
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import evaluate
import models
from losses import METHODS, complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, smooth

INF = math.inf
SETTINGS = {  # name: (the paper's value for CIFAR-10-LT or the default, its range, its meaning)
    "dataset": ("shapes", ["shapes", "cifar10", "cifar100", "stl10", "folder"], "data set"),
    "data_dir": ("data", str, "where its files are or are downloaded to"),
    "n1": (1500, (1, INF), "labeled images of the largest class, N1"),
    "m1": (3000, (1, INF), "unlabeled images of the largest class, M1"),
    "imb": (100.0, (1.0, INF), "gamma of the labeled set, largest / smallest class"),
    "shift": ("consistent", ["consistent", "uniform", "reversed"], "sizes of unlabeled classes"),
    "imb_u": (None, (1e-9, INF), "gamma of the unlabeled set, below 1 reversed; not with --shift"),
    "labeled_fraction": (None, (1e-9, 1 - 1e-9), "share of a class to label; not with the above"),
    "image_size": (32, (8, 1024), "side of the images in pixels"),
    "method": ("adello", list(METHODS), "which of the family"),
    "alpha_min": (0.1, (0.0, 1.0), "share of the prior that is left in the target at the end"),
    "d": (2.0, (1e-9, INF), "exponent of the alpha schedule"),
    "threshold": (0.95, (0.0, 1.0), "confidence of a hard pseudo-label, the mask M"),
    "warmup_steps": (50_000, (0, INF), "steps before CCR; unless given, in proportion to --steps"),
    "prior_momentum": (0.999, (0.0, 1 - 1e-9), "m of the estimated prior Qhat"),
    "model": ("wrn-28-2", str, "wrn-<depth>-<width> or resnet50"),
    "steps": (2**18, (1, INF), "T_max"),
    "batch_size": (64, (1, INF), "labeled images a step, B"),
    "mu": (2, (1, INF), "unlabeled images for each labeled one"),
    "lr": (0.03, (1e-15, 1e30), "first learning rate of the cosine schedule"),
    "weight_decay": (5e-4, (0.0, 1e30), "on weights, not on batch-norm and biases"),
    "ema": (0.999, (0.0, 1 - 1e-9), "decay of the averaged parameters that are evaluated"),
    "bn_momentum": (0.001, (1e-9, 1.0), "of batch-norm, the weight of the new batch"),
    "eval_every": (1024, (1, INF), "steps between evaluations, a checkpoint at each"),
    "seed": (0, (0, 2**31), "of split, initialisation, order and views"),
    "device": ("auto", str, "auto, cpu, cuda or cuda:N"),
    "precision": ("auto", ["auto", "fp32", "bf16"], "bf16 autocast, auto: where it is native"),
    "compile": ("auto", ["auto", "on", "off"], "torch.compile of the step, auto: on CUDA"),
    "out": (None, str, "directory; None: runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>")}
OPTION = {name: "--" + name.replace("_", "-") for name in SETTINGS}
PRESETS = {  # what differs from the paper's values for CIFAR-10-LT
    "shapes": dict(n1=150, m1=600, imb=50.0, shift="reversed", image_size=16, warmup_steps=300,
                   prior_momentum=0.99, model="wrn-10-1", steps=1500, batch_size=16, lr=0.05,
                   ema=0.995, bn_momentum=0.05, eval_every=100),  # a short run, short memories
    "cifar10": {},
    "cifar100": dict(n1=150, m1=300, imb=50.0),
    "stl10": dict(n1=150, imb=20.0, warmup_steps=0),
    "folder": dict(labeled_fraction=0.1)}  # unless --n1, --m1, --imb, --imb-u or --shift is given


def parse(argv=None):
    """Command line to settings: defaults, the data set's preset, what is given. ValueError."""
    presets = "\n".join(f"preset of {name}: {preset}" for name, preset in PRESETS.items())
    parser = evaluate.Parser(description=__doc__, epilog=presets, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter,
                             argument_default=argparse.SUPPRESS)
    for name, (default, kind, meaning) in SETTINGS.items():
        parser.add_argument(OPTION[name], help=f"{meaning} (default: {default})",
                            type=type(kind[0]) if isinstance(kind, tuple) else str,
                            choices=kind if isinstance(kind, list) else None)
    parser.add_argument("--fresh", action="store_true", help="start over where --out holds a run")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        kind = SETTINGS.get(name, (False, bool))[1]
        if isinstance(kind, tuple) and not (kind[0] <= value <= kind[1] and value < INF):
            raise ValueError(f"{OPTION[name]} {value} must be from {kind[0]:g} to {kind[1]:g}")
    preset = {"fresh": False, **{name: default for name, (default, _, _) in SETTINGS.items()}}
    preset |= PRESETS[given.get("dataset", "shapes")]
    s = SimpleNamespace(**preset | given)

    cut = {"n1", "m1", "imb", "imb_u", "shift"}  # for a long-tailed set cut out of a larger one
    if s.dataset == "folder" and cut & given.keys():
        s.labeled_fraction = given.get("labeled_fraction")
    why, unused = "--imb-u", {"shift"} if "imb_u" in given else set()
    if s.labeled_fraction:
        why, unused = "--labeled-fraction", cut
    elif s.dataset == "stl10":
        why, unused = "stl10, whose unlabeled images come as they are", {"m1", "imb_u", "shift"}
    if wrong := sorted(OPTION[name] for name in unused & given.keys()):
        raise ValueError(f"{', '.join(wrong)} cannot be used with {why}")
    if "m1" in unused:
        vars(s).update(dict.fromkeys(unused), shift="natural")
    else:
        like = {"consistent": s.imb, "uniform": 1.0, "reversed": 1 / s.imb}
        near = [name for name in like if math.isclose(like[name], s.imb_u or 0, rel_tol=1e-6)]
        s.shift = s.shift if s.imb_u is None else (near + [f"imbu{s.imb_u:.4g}"])[0]
        s.imb_u = s.imb_u or like[s.shift]
    if "warmup_steps" not in given:
        s.warmup_steps = s.warmup_steps * s.steps // preset["steps"]
    if s.warmup_steps > s.steps:
        raise ValueError(f"--warmup-steps {s.warmup_steps} is beyond --steps {s.steps}")
    with torch.device("meta"):
        models.build(s.model, 2)  # an unknown name is refused before anything is loaded
    s.device, s.precision = models.choose_device(s.device, s.precision)
    imbalance = f"-imb{s.imb:g}" if s.imb else ""
    s.out = s.out or f"runs/{s.dataset}-{s.method}-{s.shift}{imbalance}-s{s.seed}"
    return s


# ---------------------------------------------------------------------------------------- a step

def train_step(run, method, threshold, labeled, labels, unlabeled, hidden, draws):
    """One step: one forward over labeled, weak and strong images, three losses, one update.

    labeled: (B, 3, H, W) uint8; labels: (B,); unlabeled: (U, 3, H, W) uint8; hidden: (U,), -1 where
    unknown, counted and not learned from; draws: (B + U, 15) uniform. Changes the objects in `run`.
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

    q_hat = run.estimator.q_hat.clone()            # Qhat from before this step is in the losses
    if method.consistency:
        run.estimator.update(probs, run.ccr)       # T is read from the Qhat after it
    prior = {"p_labeled": run.p_labeled, "q_hat": q_hat, "q_true": run.q_true}
    source, target, p_labeled = prior.get(method.source), None, None
    if method.target:
        target, p_labeled = smooth(prior[method.target], run.alpha), run.p_labeled

    loss_s = supervised_loss(logits_labeled, labels, p_labeled, target)
    loss_u = loss_uc = torch.zeros_like(loss_s)
    if method.consistency:
        loss_u = consistency_loss(logits_strong, probs, mask, source, target)
    if method.ccr:
        silent = mask if method.ccr == "rest" else torch.zeros_like(mask)
        loss_uc = run.ccr * complementary_loss(logits_strong, probs, silent, source, target,
                                               run.estimator.temperature)
    loss = loss_s + loss_u + loss_uc

    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.ema.update(run.model)
    right = mask * (probs.argmax(dim=1) == hidden)
    run.record.totals.add_(torch.stack([loss_s.detach(), loss_u.detach(), loss_uc.detach(),
                                        mask.sum() / max(U, 1), right.sum() / max(U, 1)]))
    return loss.detach()


@functools.lru_cache(maxsize=8)
def permutation(size, *seeds):
    """A random order of 0..size-1."""
    return np.random.default_rng(seeds).permutation(size)


def batch_indices(size, batch_size, step, *seeds):
    """A step's part of an endless chain of permutations of 0..size-1: (batch_size,) int64."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), size)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        places[mine] = permutation(size, *seeds, int(epoch))[places[mine]]
    return torch.from_numpy(places)


def batch(run, s, step):
    """The arguments of train_step: the batch of a step, on the device."""
    def rows(tensor, index):
        return tensor.index_select(0, index.to(tensor.device)).to(run.device, non_blocking=True)

    sets, U = run.sets, s.batch_size * run.mu
    x = batch_indices(len(sets.labeled), s.batch_size, step, s.seed, 0)
    u = batch_indices(len(sets.unlabeled), U, step, s.seed, 1)
    draws = np.random.default_rng((s.seed, 2, step)).random((s.batch_size + U, 15), np.float32)
    return (rows(sets.labeled, x), rows(sets.labels, x), rows(sets.unlabeled, u),
            rows(sets.hidden_labels, u), torch.from_numpy(draws).to(run.device))


# --------------------------------------------------------------------------------------- the run

def prepare(s):
    """Load the data and build all that a step needs or changes. Raises ValueError or OSError."""
    device, method = torch.device(s.device), METHODS[s.method]
    sets = data.load(s.dataset, s.data_dir, s.n1, s.m1, s.imb, s.imb_u, s.labeled_fraction,
                     s.image_size, s.seed)
    K, q_true = len(sets.classes), None
    if sets.hidden_labels is not None:
        q_true = torch.bincount(sets.hidden_labels, minlength=K).to(device) / len(sets.unlabeled)
    elif method.target == "q_true":
        raise ValueError(f"--method {s.method} needs the true prior: the unlabeled images' labels")
    else:
        sets = sets._replace(hidden_labels=torch.full((len(sets.unlabeled),), -1))

    torch.manual_seed(s.seed)
    model = models.build(s.model, K, s.bn_momentum).to(device, memory_format=torch.channels_last)
    ema, estimator = models.EMA(model, s.ema), PriorEstimator(K, s.prior_momentum, device)
    fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.SGD(models.parameter_groups(model, s.weight_decay), momentum=0.9,
                                lr=torch.tensor(s.lr, device=device), nesterov=True, **fast)
    return SimpleNamespace(
        device=device, bf16=s.precision == "bf16", mu=s.mu if method.consistency else 0,
        sets=models.place(sets, device), q_true=q_true,
        p_labeled=torch.bincount(sets.labels, minlength=K).to(device) / len(sets.labels),
        alpha=torch.ones((), device=device), ccr=torch.tensor(False, device=device),
        model=model, forward=model, ema=ema, optimizer=optimizer, estimator=estimator,
        # what a checkpoint holds: the states of the parts, and the record
        parts={"model": model, "ema": ema.model, "optimizer": optimizer, "estimator": estimator},
        record=SimpleNamespace(step=0, seconds=0.0, rows=[], totals=torch.zeros(5, device=device)))


def train(run, s):
    """The loop, from the record's step to the last. Returns the exit status: 0, or 128 + signal."""
    method, record, stop = METHODS[s.method], run.record, []
    compiled = s.compile == "on" or s.compile == "auto" and run.device.type == "cuda"
    step_function = torch.compile(train_step) if compiled else train_step
    for name in (signal.SIGINT, signal.SIGTERM):  # once: finish the step, save; twice: at once
        signal.signal(name, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    begun = shown = time.time()
    first, before, live, logits = record.step, record.seconds, sys.stdout.isatty(), None

    while record.step < s.steps:
        step = record.step
        for group in run.optimizer.param_groups:
            group["lr"].fill_(s.lr * math.cos(7 * math.pi * step / (16 * s.steps)))
        run.alpha.fill_(alpha_schedule(step, s.steps, s.alpha_min, s.d))
        run.ccr.fill_(bool(method.ccr) and step >= s.warmup_steps)
        step_function(run, method, s.threshold, *batch(run, s, step))
        evaluating = (step + 1) % s.eval_every == 0 or step + 1 == s.steps
        showing = evaluating or time.time() - shown > (1 if live else 60)
        if showing or stop or run.device.type == "cpu":  # else nothing is read back
            if not torch.isfinite(record.totals).all():
                raise FloatingPointError("the loss is not finite")
        record.step, record.seconds = step + 1, round(before + time.time() - begun, 2)
        if evaluating:
            logits = evaluate.predict(run.ema.model, run.sets, run.device)
            alpha = alpha_schedule(record.step, s.steps, s.alpha_min, s.d)
            record.rows.append(evaluate.log_row(run, logits, alpha))
            record.totals.zero_()
        if evaluating or stop:
            evaluate.save(run, Path(s.out))
        if showing:
            rate, shown = (record.step - first) / (time.time() - begun), time.time()
            left = datetime.timedelta(seconds=int((s.steps - record.step) / rate))
            row = "  ".join(f"{name} {record.rows[-1][name]:.3f}" for name in (
                "loss_s", "balanced_accuracy", "ece") if record.rows)
            print(f"step {record.step}/{s.steps}  {row}  {rate:.1f} steps/s  ETA {left}",
                  end="\r" if live and not evaluating else "\n", flush=True)
        if stop:
            print(f"stopped after step {record.step}; the same command continues", flush=True)
            return 128 + stop[0]
    logits = evaluate.predict(run.ema.model, run.sets, run.device) if logits is None else logits
    evaluate.write_json(Path(s.out) / "result.json", evaluate.result(run, logits))
    print(evaluate.summary(Path(s.out)))
    return 0


def main(argv=None):
    """The command. Returns the exit status: 0; 1, a fault; 2, the user's mistake; 128 + signal."""
    try:
        s = parse(argv)
        directory, state, config = Path(s.out), None, Path(s.out) / "config.json"
        if config.exists() and not s.fresh:
            held = json.loads(config.read_text())
            for name in [n for n in SETTINGS if n == "seed" or n not in evaluate.FREE]:
                if held.get(name) != getattr(s, name):
                    raise ValueError(f"{s.out} holds a run with {OPTION[name]} {held.get(name)}, "
                                     f"not {getattr(s, name)}; name another --out, or see --fresh")
            if (directory / "result.json").exists():
                print(evaluate.summary(directory))
                return 0
            state = models.load_checkpoint(directory / "checkpoint.pt", s.device)
        run = prepare(s)
        directory.mkdir(parents=True, exist_ok=True)
        lock = models.hold(directory)  # until this process ends
        for name in ("checkpoint.pt", "log.csv", "result.json") if s.fresh else ():
            (directory / name).unlink(missing_ok=True)
        if state:
            for name, part in run.parts.items():
                part.load_state_dict(state[name])
            vars(run.record).update(state["record"])
        made_with = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        evaluate.write_json(config, vars(s) | {"made_with": made_with})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{s.method} on {s.dataset}: {len(run.sets.classes)} classes, {len(run.sets.labels)} "
          f"labeled and {len(run.sets.unlabeled)} unlabeled images; {s.model}, {s.device}, "
          f"{s.precision}" + f"; continued at step {run.record.step}" * bool(state), flush=True)
    try:
        return train(run, s)
    except (FloatingPointError, ValueError, OSError,
            torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).partition("\n")[0]
        print(f"error: step {run.record.step}: {reason}; the last good checkpoint stays in "
              f"{s.out}; try a lower --lr, or --compile off", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

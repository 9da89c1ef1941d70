"""Train ADELLO, or another method of its family.

    python train.py                                                    # ADELLO on embedded data
    python train.py --dataset cifar10 --imb 100 --shift reversed       # the paper's schedule
    python train.py --dataset folder --data-dir my-images              # train/<class>/*, test/...

In reading order: settings; Run, all that learns; the loop; a run's files; the command line.
"""

import argparse
import datetime
import hashlib
import importlib.util
import io
import json
import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import filelock
import torch

import data
import evaluate
import models
from losses import METHODS, complementary_loss, confidence_mask, consistency_loss, supervised_loss
from priors import PriorEstimator, alpha_schedule, kl_divergence, smooth, uniform

COUNT = (1, 10**9)
POSITIVE = (1e-9, 1e9)
EXPORTS = ["result.json", "config.json", "log.csv"]  # made from checkpoint.pt, in this order
PROGRESS = ["t", "seconds", "rows", "totals"]        # which it holds beside the states of `kept`


def setting(default, meaning, allowed=None):
    """A field of Config; allowed: a list of choices, or the lowest and the highest value."""
    return field(default=default, metadata={"help": meaning, "allowed": allowed})


@dataclass
class Config:
    """The settings, one option each, with the paper's values for CIFAR-10-LT. None: not in use."""
    # data
    dataset: str = setting("shapes", "data set", list(data.STATISTICS))
    data_dir: str = setting("data", "where its files are or are downloaded to")
    n1: int = setting(1500, "N1, labeled images of the largest class", COUNT)
    m1: int = setting(3000, "M1, unlabeled images of the largest class", COUNT)
    imb: float = setting(100.0, "gamma of the labeled set; to reverse, see --shift", COUNT)
    shift: str = setting("consistent", "unlabeled order", ["consistent", "uniform", "reversed"])
    imb_u: float = setting(None, "unlabeled gamma, in place of --shift; reversed below 1", POSITIVE)
    labeled_fraction: float = setting(None, "share labeled, in place of --n1 to --imb-u", (1e-9, 1))
    image_size: int = setting(32, "side of the images in pixels", (8, 1024))
    # method
    method: str = setting("adello", "which of the family", list(METHODS))
    alpha_min: float = setting(0.1, "alpha at the last step", (0, 1))
    d: float = setting(2.0, "exponent of the schedule of alpha", POSITIVE)
    threshold: float = setting(0.95, "confidence of a hard pseudo-label, the mask M", (0, 1))
    warmup_steps: int = setting(50_000, "steps before CCR; by default goes with --steps", (0, 1e9))
    prior_momentum: float = setting(0.999, "m of the estimated prior Qhat", (0, 1))
    # network and optimiser
    model: str = setting("wrn-28-2", "wrn-<depth>-<width> or resnet50")
    steps: int = setting(2**18, "T_max", COUNT)
    batch_size: int = setting(64, "B, labeled images in a step", (1, 1e6))
    mu: int = setting(2, "unlabeled images for each labeled one", (1, 1000))
    lr: float = setting(0.03, "first rate of the cosine schedule", POSITIVE)
    weight_decay: float = setting(5e-4, "on weights, not on batch-norm and biases", (0, 1e9))
    ema: float = setting(0.999, "decay of the averaged network that is evaluated", (0, 1))
    bn_momentum: float = setting(0.001, "of batch-norm, the weight of the new batch", (0, 1))
    # run
    eval_every: int = setting(1024, "steps between evaluations", COUNT)
    seed: int = setting(0, "of split, initialisation, order and views", (0, 1e9))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: str = setting("auto", "of the network", ["auto", "fp32", "bf16", "fp16"])
    compile: str = setting("auto", "torch.compile; auto: on CUDA", ["auto", "on", "off"])
    out: str = setting(None, "directory; else runs/<dataset>-<method>-<shift>-imb<imb>-s<seed>")
    variant: str = None  # name of a subclass of Run; not an option: scripts set it


PRESETS = {  # what differs from the values above; None: of no use with this data set
    "shapes": dict(data_dir=None, n1=150, m1=600, imb=50.0, shift="reversed", image_size=16,
                   model="wrn-10-1", steps=1500, warmup_steps=300, batch_size=16, eval_every=100,
                   lr=0.05, ema=0.995, prior_momentum=0.99, bn_momentum=0.05),  # faster averages
    "cifar10": {},
    "cifar100": dict(n1=150, m1=300, imb=50.0),
    "stl10": dict(n1=150, m1=None, imb=20.0, shift=None, imb_u=None, warmup_steps=0),
    "folder": dict(labeled_fraction=0.1)}  # unless --n1 is given


class Run:
    """A training: what learns, and what has been recorded. A variant overrides what it changes."""
    kept = ["model", "ema", "optimizer", "scaler", "estimator"]  # states that a checkpoint carries

    def __init__(self, config, sets=None, model=None):
        """At step 0. sets: ready data.Data; model: a ready network; else both are made."""
        sets = sets or data.load(config)
        K = len(sets.classes)
        self.config = config
        self.device = device = torch.device(config.device)
        self.fingerprint = data.fingerprint(sets)
        self.p_labeled = data.prior(sets.labels, K).to(device)            # P_L, (K,)
        known = sets.hidden_labels.min() >= 0
        self.q_true = data.prior(sets.hidden_labels, K).to(device) if known else None  # Q, (K,)
        if METHODS[config.method].target == "q_true" and not known:
            raise ValueError(f"--method {config.method} needs the true prior: labels of all images")
        self.sets = data.place(sets, device)
        torch.manual_seed(config.seed)
        model = model or models.build(config.model, K, config.bn_momentum)
        self.model = model.to(device, memory_format=torch.channels_last)  # f
        self.ema = models.EMA(self.model, config.ema)
        self.optimizer = models.optimizer(self.model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.estimator = PriorEstimator(K, config.prior_momentum, device)  # Qhat and T
        self.t = 0                                                        # steps done
        self.seconds = 0.0                                                # over all starts
        self.rows = []                                                    # of log.csv
        self.totals = {}                          # sums of what `step` returns since then
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # so that fp32 is fp32 on every GPU
        if config.compile == "on":
            self.forward = torch.compile(self.forward, fullgraph=True)

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        """Step t of the training. Returns named scalars for the log.

        labeled: (B, 3, H, W) uint8; labels: (B,); unlabeled: (U, 3, H, W) uint8, U = mu B;
        hidden_labels: (U,), -1: unknown, for the log alone; draws: (B + U, 15) from data.draw.
        """
        config = self.config
        method = METHODS[config.method]
        sizes = [len(labels), len(unlabeled), len(unlabeled)]

        # forward: the three kinds of views share batch-norm statistics, as in the authors' code
        logits = self.forward(labeled, unlabeled, draws)                  # f, (B + 2U, K)
        logits_labeled, logits_weak, logits_strong = logits.split(sizes)

        # pseudo-labels: raw weak predictions, no adjustment, no gradient
        probs = logits_weak.detach().softmax(dim=1)                       # p(u), (U, K)
        mask = confidence_mask(probs, config.threshold)                   # M(u), (U,)

        # priors: the losses use Qhat from before this step; T is computed from Qhat after it
        q_hat = self.estimator.q_hat.clone()
        with_ccr = method.ccr and self.t >= config.warmup_steps
        if method.unlabeled:
            self.estimator.update(probs, first_ccr_step=with_ccr and self.t == config.warmup_steps)
        p_labeled = q_source = q_alpha = None                             # no adjustment
        if method.target:
            p_labeled = self.p_labeled
            q_source = q_hat
            target = {"p_labeled": p_labeled, "q_hat": q_hat, "q_true": self.q_true}[method.target]
            alpha = alpha_schedule(self.t, config.steps, config.alpha_min, config.d)
            q_alpha = smooth(target, torch.tensor(alpha))                 # alpha as float32

        # losses: L = L_s + L_u + L_uc
        loss_s = supervised_loss(logits_labeled, labels, p_labeled, q_alpha)
        loss_u = loss_uc = torch.zeros_like(loss_s)
        if method.unlabeled:
            loss_u = consistency_loss(logits_strong, probs, mask, q_source, q_alpha)
        if with_ccr:
            mask_uc = mask if method.ccr == "rest" else torch.zeros_like(mask)
            loss_uc = complementary_loss(logits_strong, probs, mask_uc, q_source, q_alpha,
                                         self.estimator.temperature)
        self.update(loss_s + loss_u + loss_uc)
        count = len(unlabeled) or 1                                       # supervised takes none
        right = mask * (probs.argmax(dim=1) == hidden_labels)
        return {"loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "loss_uc": loss_uc.detach(),
                "mask_rate": mask.sum() / count, "right_rate": right.sum() / count}

    def update(self, loss):
        """SGD at the rate lr cos(7 pi t / (16 T_max)), then the moving average."""
        rate = self.config.lr * math.cos(7 * math.pi * self.t / (16 * self.config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(rate)                              # as float32
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)

    def forward(self, labeled, unlabeled, draws):
        """From bytes to logits, (B + 2U, K) float32: the views, normalised, in one pass."""
        weak = data.weak(torch.cat([labeled, unlabeled]), draws[:, :3])
        strong = data.strong(unlabeled, draws[len(labeled):, 3:])
        images = data.normalize(torch.cat([weak, strong]), self.sets.mean, self.sets.std)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return self.network(images).float()

    def network(self, images):
        """What learns: logits of normalised views (N, 3, H, W)."""
        return self.model(images)

    def evaluated(self, images):
        """What is tested: logits of normalised images (N, 3, H, W)."""
        return self.ema.model(images)

    def batch(self):
        """The arguments of step t, on the device: functions of the data, the seed and t alone."""
        config, sets = self.config, self.sets
        B = config.batch_size
        U = B * config.mu if METHODS[config.method].unlabeled else 0
        x = data.batch_indices(len(sets.labeled), B, self.t, config.seed, "labeled")
        u = data.batch_indices(len(sets.unlabeled), U, self.t, config.seed, "unlabeled")
        draws = data.draw(B + U, self.t, config.seed)
        x, u, draws = (data.send(part, self.device) for part in (x, u, draws))
        return sets.labeled[x], sets.labels[x], sets.unlabeled[u], sets.hidden_labels[u], draws


def train(run, directory):
    """Train to the last step; save at each evaluation and once a minute. Returns the result.

    directory: None writes and prints nothing. OSError; FloatingPointError: a value is not finite.
    """
    config = run.config
    begun = time.monotonic() - run.seconds
    last = result = None  # last: time and step of the last save; at first of the first step
    while run.t < config.steps:
        for name, value in run.step(*run.batch()).items():
            run.totals[name] = run.totals.get(name, 0) + value
        run.t += 1
        now = time.monotonic()
        run.seconds = round(now - begun, 2)
        last = last or (now, run.t)
        evaluating = run.t == config.steps or run.t % config.eval_every == 0
        if not evaluating and now - last[0] < 60:
            continue
        if not all(map(torch.isfinite, run.totals.values())):
            raise FloatingPointError("the loss is not finite; try a lower --lr")
        if evaluating:
            result = record(run)
        if directory:
            save(run, directory, result if run.t == config.steps else None)
            shown = ("loss_s", "balanced_accuracy", "ece") if evaluating else ()
            status = [f"step {run.t}/{config.steps}", *(f"{k} {result[k]:.3f}" for k in shown)]
            if now > last[0]:
                rate = (run.t - last[1]) / (now - last[0])
                left = datetime.timedelta(seconds=int((config.steps - run.t) / rate))
                status += [f"{rate:.1f} steps/s", f"ETA {left}"]
            print("  ".join(status), flush=True)
        last = now, run.t
    return result


def record(run):
    """Evaluate after t steps: a row of log.csv. Returns what result.json holds at the end."""
    sets = run.sets
    logits = evaluate.predict(run.evaluated, sets.test, sets.mean, sets.std)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the network's outputs are not finite; try a lower --lr")
    found = evaluate.metrics(logits, sets.test_labels)
    steps = run.t - (run.rows[-1]["step"] if run.rows else 0)
    means = {name: (total / steps).item() for name, total in run.totals.items()}
    accuracy = means.pop("right_rate") / (means["mask_rate"] or math.nan)      # of the confident
    q_hat, q_true = run.estimator.q_hat, run.q_true
    row = {"step": run.t, "seconds": run.seconds,
           "lr": run.optimizer.param_groups[0]["lr"].item(),                  # of the step done
           "alpha": alpha_schedule(run.t, run.config.steps, run.config.alpha_min, run.config.d),
           **means, "pseudo_label_accuracy": math.nan if q_true is None else accuracy,
           "kl_q_qhat": math.nan if q_true is None else kl_divergence(q_true, q_hat).item(),
           "temperature": run.estimator.temperature.item(),
           "kl_uniform_qhat": kl_divergence(uniform(len(q_hat), q_hat.device), q_hat).item(),
           **{name: value for name, value in found.items() if not isinstance(value, list)}}
    run.rows.append(row)
    run.totals = {}
    result = row | found | {"classes": sets.classes, "p_labeled": run.p_labeled,
                            "q_hat": q_hat, "q_true": q_true}
    text = json.dumps(result, default=torch.Tensor.tolist)
    return json.loads(text, parse_constant=lambda nan: None)  # what is unknown is null


def save(run, directory, result=None):
    """Write checkpoint.pt, whole or not at all, then the files that are made from it. OSError."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    state = {"config": vars(run.config), "data": run.fingerprint, "result": result,
             "made_with": {"torch": str(torch.__version__), "device": device,
                           "threads": torch.get_num_threads()},
             **{name: getattr(run, name) for name in PROGRESS},
             **{name: getattr(run, name).state_dict() for name in run.kept}}
    file = io.BytesIO()
    torch.save(state, file)
    checksum = hashlib.sha256(file.getvalue()).digest()
    temporary = directory / "checkpoint.pt.tmp"
    temporary.write_bytes(file.getvalue() + checksum)
    temporary.replace(directory / "checkpoint.pt")
    export(state, directory)


def export(state, directory):
    """The files that are made from a checkpoint, written where they differ. OSError."""
    lines = [*state["rows"][:1], *(row.values() for row in state["rows"])]  # the keys come first
    log = "".join(",".join(map(str, line)) + "\n" for line in lines)
    config = state["config"] | {"made_with": state["made_with"], "data": state["data"]}
    texts = [json.dumps(part, indent=1) for part in (state["result"], config)] + [log]
    for name, text in zip(EXPORTS, texts):
        path = directory / name
        if text == "null":  # no result yet; an old one goes before the settings that it belongs to
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != text.encode():
            path.write_bytes(text.encode())


def read_checkpoint(path, device="cpu"):
    """The state that `save` wrote, None without a file. Runs no code from it. ValueError."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() == content[-32:]:
        state = torch.load(io.BytesIO(content[:-32]), device, weights_only=True)
        if {"config", "made_with", "data", "result", *PROGRESS, *Run.kept} <= {*state}:
            return state
    raise ValueError(f"{path} is damaged or no run's checkpoint; give another --out or --fresh")


def restore(run, state):
    """Put a checkpoint's state into a run that was set up alike. ValueError on other data."""
    if state["data"] != run.fingerprint:
        raise ValueError(f"--out {run.config.out} holds a run on other data; see --fresh")
    for name in run.kept:
        getattr(run, name).load_state_dict(state[name])
    vars(run).update({name: state[name] for name in PROGRESS})


def compare(held, asked, given):
    """ValueError unless the run held is the one asked for; names the options given first."""
    for name in [*given, *asked]:
        if name not in evaluate.FREE and held.get(name) != asked[name]:
            raise ValueError(f"--out holds a run with {option(name)} {held.get(name)}, not "
                             f"{asked[name]}; give another --out or --fresh")


def hold(directory):
    """Make a directory if need be and lock it for this process. Returns the lock. ValueError."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {path.name for path in directory.iterdir()}
    if "checkpoint.pt" not in files and files & {*EXPORTS}:
        raise ValueError(f"--out {directory} holds results, no checkpoint; give another --out")
    lock = filelock.FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"--out {directory} is in use by another process")
    except (OSError, NotImplementedError) as error:  # no locks here, or nothing can be written
        print(f"warning: {directory} is not locked: {error}", file=sys.stderr)
    return lock


def option(name):
    """A setting's name as the user types it."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A mistake is a ValueError, where argparse would print its usage and exit."""
    def error(self, message):
        raise ValueError(message)


def parse(argv=None, variant=None):
    """The command line: (Config, dict of what was given). ValueError, for idle options, too."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    epilog="In brackets: the values for cifar10; PRESETS holds the others'.")
    settings = [f for f in fields(Config) if f.metadata]
    for f in settings:
        parser.add_argument(option(f.name), type=f.type, help=f"{f.metadata['help']} ({f.default})",
                            choices=f.metadata["allowed"] if f.type is str else None)
    parser.add_argument("--fresh", action="store_true", help="start over where --out holds a run")
    given = vars(parser.parse_args(argv))
    if [] in given.values():  # what argparse makes of --m1=--
        raise ValueError(f"-- is no value: {' '.join(argv or sys.argv[1:])}")
    for f in [f for f in settings if isinstance(given.get(f.name), (int, float))]:
        low, high = f.metadata["allowed"]
        if not low <= given[f.name] <= high:
            raise ValueError(f"{option(f.name)} {given[f.name]} must be in [{low}, {high}]: "
                             f"{f.metadata['help']}")
    preset = PRESETS[given.get("dataset", "shapes")]
    default = vars(Config()) | preset
    values = default | {"variant": variant} | given
    unused = {name: values["dataset"] for name, value in preset.items() if value is None}
    if "n1" in given:
        unused["labeled_fraction"] = "--n1"
    elif values["labeled_fraction"]:
        unused |= dict.fromkeys(["n1", "m1", "imb", "imb_u", "shift"], "--labeled-fraction")
    if "imb_u" in given:
        unused["shift"] = "--imb-u"
    for name, other in unused.items():
        if name in given:
            raise ValueError(f"{option(name)} cannot be used with {other}")
        values[name] = None
    if "warmup_steps" not in given:
        values["warmup_steps"] = default["warmup_steps"] * values["steps"] // default["steps"]
    config = Config(**{name: values[name] for name in default})
    if config.warmup_steps > config.steps:
        raise ValueError(f"--warmup-steps {config.warmup_steps} is beyond --steps {config.steps}")
    choose(config)
    if not config.out:
        shift = config.shift or (f"imbu{config.imb_u:g}" if config.imb_u else "natural")
        imb = f"-imb{config.imb:g}" if config.imb else ""
        config.out = f"runs/{config.dataset}-{variant or config.method}-{shift}{imb}-s{config.seed}"
    return config, given


def choose(config):
    """Replace each `auto` (device, precision, compile) by what this machine can do. ValueError."""
    device = config.device
    if device in ("auto", "cuda"):
        device = "cuda:0" if device == "cuda" or torch.cuda.device_count() else "cpu"
    try:  # the driver or the GPU may be too old; the views need float64, which MPS lacks
        torch.ones(1, device=device, dtype=torch.float64).item()
    except Exception as error:  # whatever PyTorch raises
        reason = str(error).splitlines()[0]
        if config.device != "auto":
            raise ValueError(f"--device {device} cannot be used: {reason}")
        print(f"note: on the CPU, since the GPU cannot be used: {reason}", file=sys.stderr)
        device = "cpu"
    config.device = device = device if device.startswith("cuda") else "cpu"
    if device == "cpu":
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # not before torch 2.11
        native = "bf16" if any(has and "bf16" in flag for flag, has in flags.items()) else "fp32"
    else:
        major, _ = torch.cuda.get_device_capability(device)
        native = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    if config.precision == "auto":
        config.precision = native
    if config.compile == "auto":  # Triton needs the GPUs that have half precision
        able = device != "cpu" and native != "fp32" and importlib.util.find_spec("triton")
        config.compile = "on" if able else "off"


def main(argv=None, kind=Run, variant=None):
    """The command. Returns its status: 0; 1, a fault; 2, the user's mistake; 130, interrupted.

    kind: Run, a subclass, or a function that makes one from a Config; variant: its name.
    """
    run = lock = state = None
    try:
        config, given = parse(argv, variant)
        directory = Path(config.out)
        lock = hold(directory)
        if "fresh" not in given:
            state = read_checkpoint(directory / "checkpoint.pt", config.device)
        if state:
            if given.get("precision", "auto") == "auto":  # that of the machine where it began
                config.precision = state["config"].get("precision")
            compare(state["config"], vars(config), given)
        prepared = kind(config)
        if state:
            restore(prepared, state)
            export(state, directory)
        else:
            save(prepared, directory)
        run = prepared  # from here on a fault is the training's: status 1, with its step
        print(f"{variant or config.method} on {config.dataset}: {len(run.sets.labels)} labeled, "
              f"{len(run.sets.unlabeled)} unlabeled images; from step {run.t}; {config.model}, "
              f"{config.device}, {config.precision}, compile {config.compile}", flush=True)
        for name in ("ema", "prior_momentum"):
            if getattr(config, name) ** config.steps > 0.05:
                print(f"note: {option(name)} is high for {config.steps} steps", file=sys.stderr)
        train(run, directory)
        return evaluate.main(["--", str(directory)])  # its name may begin with a dash
    except KeyboardInterrupt:
        print("\ninterrupted; without --fresh the same command continues from the last save")
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a fault of the code, to be shown whole
        where = f"step {run.t}: " if run else ""
        print(f"error: {where}{' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        return 1 if run else 2
    finally:
        if lock:
            lock.release()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was handled
        sys.exit(130)

"""How fast is a training step, how fast could it be, and how fast is the conventional pipeline?

    python tests/benchmark.py                     # the paper's step: WRN-28-2, 64 + 128 + 128 images
    python tests/benchmark.py --authors ADELLO-LTSSL   # also a step of the authors' code, see authors.py
    python tests/benchmark.py --batch-size 16 --model wrn-10-1 --image-size 16 --steps 20

Prints the step, the floor that this machine's own matrix rate and copy bandwidth set,
and, taking turns with it, each in a process of its own: the same step in fp32; the pipeline of most
published code, which is PIL transforms of single images in DataLoader workers, fp32, default memory
format, eager, EMA in a Python loop; and the authors' own. A ratio is that of their time to ours.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

import authors
import data
import losses
import models
import priors
import train
from pil_operations import PIL_OPERATIONS

REPEATS = 5


def seconds(function, device, repeats=3, calls=1):
    """Median seconds of a call, after one that is not counted."""
    function()
    return statistics.median(timed(function, device, calls) for _ in range(repeats))


def timed(function, device, calls):
    """Seconds of a call, the mean of some."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
    return (time.perf_counter() - start) / calls


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------- ours

def config_of(options, **changes):
    """What is trained: shapes, CCR included."""
    options = vars(options) | changes
    arguments = "--n1 100 --m1 500 --imb 10 --steps 1000000 --warmup-steps 0".split()
    for name in ("batch_size", "model", "image_size", "device", "precision", "compile"):
        arguments += [train.option(name), str(options[name])]
    return train.parse(arguments)[0]


class Ours:
    """Run.step on shapes, as train.py calls it, CCR included."""

    def __init__(self, options, **changes):
        self.config = config_of(options, **changes)
        self.run = train.Run(self.config)
        self.device = self.run.device

    def step(self):
        self.run.step(*self.run.batch())
        self.run.t += 1

    def floor(self):
        """(operations, least bytes) of a step, (operations/s, bytes/s) of this machine."""
        model = self.run.model
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision, torch.float32)
        sizes = []
        hooks = [m.register_forward_hook(lambda m, x, y: sizes.append(y.numel()))
                 for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d))]
        side = self.config.image_size
        images = torch.rand(5 * self.config.batch_size, 3, side, side, device=self.device)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        for hook in hooks:
            hook.remove()
        parameters = sum(p.numel() for p in model.parameters())
        # each convolution's and batch-norm's output is written once, read once forward and once
        # backward, and its gradient written and read; a parameter, its gradient, momentum and average
        # are read and written
        least = 5 * dtype.itemsize * sum(sizes) + 8 * 4 * parameters

        on_gpu = self.device.type == "cuda"
        n = 8192 if on_gpu else 2048
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        block = torch.zeros(2 ** 30 if on_gpu else 2 ** 28, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(block)
        rate = 2 * n ** 3 / seconds(lambda: a @ a, self.device)
        bandwidth = 2 * block.nbytes / seconds(lambda: target.copy_(block), self.device)
        return (counter.get_total_flops(), least), (rate, bandwidth)


# ---------------------------------------------------------------------------------- the conventional

def pil_weak(size):
    return T.Compose([T.RandomHorizontalFlip(), T.RandomCrop(size, size // 8, padding_mode="reflect")])


def pil_strong(image):
    """Three random operations and Cutout on a PIL image."""
    for name, operation in random.choices(list(PIL_OPERATIONS.items()), k=3):
        _, low, high = data.OPERATIONS[name]
        image = operation(image, random.uniform(low, high))
    pixels = np.array(image)
    size = image.size[0]
    side = random.uniform(0, size / 2)
    left, top = (int(max(0, random.uniform(0, size) - side / 2)) for _ in "xy")
    pixels[top:int(top + side) + 1, left:int(left + side) + 1] = (125, 123, 114)
    return Image.fromarray(pixels)


NORMALIZED = T.Compose([T.ToTensor(), T.Normalize(*data.STATISTICS["shapes"])])


def pictures(images):
    """(N, 3, H, W) uint8 as a list of PIL images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


class Pictures(Dataset):
    """PIL images, transformed one by one: a weak view with the label or, without labels, both views."""

    def __init__(self, images, labels=None):
        self.images = pictures(images)
        self.labels = labels
        self.weak = pil_weak(images.shape[-1])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        weak = NORMALIZED(self.weak(image))
        if self.labels is None:
            return weak, NORMALIZED(pil_strong(self.weak(image)))
        return weak, self.labels[i]


def forever(dataset, batch_size):
    sampler = RandomSampler(dataset, replacement=True, num_samples=10 ** 7)
    return iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=os.cpu_count(),
                           prefetch_factor=1, persistent_workers=True))


class Conventional:
    """The same losses and network, in the way of most published code."""

    def __init__(self, options, sets, device):
        self.labeled = forever(Pictures(sets.labeled, sets.labels), options.batch_size)
        self.unlabeled = forever(Pictures(sets.unlabeled), 2 * options.batch_size)
        self.model = models.build(options.model, 10).to(device)
        self.average = models.build(options.model, 10).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9, nesterov=True,
                                         weight_decay=5e-4, foreach=False)
        self.device = device
        self.estimator = priors.PriorEstimator(10, device=device)

    def step(self):
        labeled, labels = next(self.labeled)
        weak, strong = next(self.unlabeled)
        labels = labels.to(self.device)
        logits = self.model(torch.cat([labeled, weak, strong]).to(self.device))
        logits_labeled, logits_weak, logits_strong = logits.split([len(labeled), *2 * [len(weak)]])
        probs = logits_weak.detach().softmax(dim=1)
        mask = losses.confidence_mask(probs)
        q_hat = self.estimator.q_hat
        q_alpha = priors.smooth(q_hat, 0.5)
        loss = (losses.supervised_loss(logits_labeled, labels, q_hat, q_alpha)
                + losses.consistency_loss(logits_strong, probs, mask, q_hat, q_alpha)
                + losses.complementary_loss(logits_strong, probs, mask, q_hat, q_alpha, 1.1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters()):
                mean.copy_(0.999 * mean + 0.001 * value)
            for mean, value in zip(self.average.buffers(), self.model.buffers()):
                mean.copy_(value)
        self.estimator.update(probs)
        loss.item()


class Authors:
    """A step of the authors' code: their data set, transforms, loaders, network, losses and hooks, fp32."""

    def __init__(self, options):
        config = config_of(options, precision="fp32")
        config.steps, config.eval_every = 20_000, 10 ** 9  # they draw the order of all batches at once
        self.device = torch.device(config.device)
        module = authors.imported(options.authors)
        multiprocessing.set_start_method("fork", force=True)  # of their workers, as on the Linux that they use
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True  # as in their main_worker
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            self.patches = contextlib.ExitStack()
            self.patches.enter_context(authors.without_gpu())
        images = *data.shapes(1000, 0, config.image_size), *data.shapes(200, 1, config.image_size), list(data.SHAPES)
        with authors.in_place_of_cifar10(images, config.dataset) as directory:
            flags = authors.flags_of(config, 10, directory, workers=1)  # each loader has two, by their default
            if on_gpu:
                flags["--gpu"] = self.device.index
            run = authors.algorithm(module, flags, lambda: authors.wide_resnet(config.model, 10, config.bn_momentum))
        if on_gpu:
            run.model, run.ema_model = (module.send_model_cuda(run.args, model) for model in (run.model, run.ema_model))
        run.model.train()
        run.epoch = 0
        run.call_hook("before_run")
        run.call_hook("before_train_epoch")
        self.run = run
        self.batches = zip(run.loader_dict["train_lb"], run.loader_dict["train_ulb"])

    def step(self):
        run = self.run
        labeled, unlabeled = next(self.batches)
        run.call_hook("before_train_step")
        run.out_dict, run.log_dict = run.train_step(**run.process_batch(**labeled, **unlabeled))
        run.call_hook("after_train_step")
        run.it += 1


def begin(kind, arguments, changes):
    """Make a pipeline, as the first thing in a process of its own."""
    global pipeline
    pipeline = kind(*arguments, **changes)


def turn(steps):
    """Seconds of a step of the pipeline in this process."""
    return timed(pipeline.step, pipeline.device, steps)


def elsewhere(kind, *arguments, **changes):
    """A pipeline in a process of its own, whose memory ours does not manage."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, begin, (kind, arguments, changes))


def augmentation_alone(sets, size):
    """Seconds on one core for 192 weak and 128 strong views: ours, conventional, and the ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    images = sets.unlabeled[:192]
    images_pil = pictures(images)
    weak = pil_weak(size)

    def ours():
        strong = data.strong(images[:128], torch.rand(128, 12))
        views = torch.cat([data.weak(images, torch.rand(192, 3)), strong])
        return data.normalize(views, sets.mean, sets.std)

    def conventional():
        views = [*map(weak, images_pil), *(pil_strong(weak(image)) for image in images_pil[:128])]
        return [*map(NORMALIZED, views)]

    pairs = [(seconds(ours, cpu, 1, 3), seconds(conventional, cpu, 1)) for _ in range(7)]
    torch.set_num_threads(threads)
    mine, theirs = (statistics.median(pair) for pair in zip(*pairs))
    return mine, theirs, statistics.median(b / a for a, b in pairs)


# --------------------------------------------------------------------------------------- the figures

def in_turns(ours, others, steps):
    """Seconds of a step, a dict for each repetition: "step", ours, and those of pipelines elsewhere."""
    with contextlib.ExitStack() as stack:
        for other in others.values():
            stack.enter_context(other)  # ends with its workers, which would take part in what comes later
        turns = [{"step": timed(ours.step, ours.device, steps)}
                 | {name: other.submit(turn, steps).result() for name, other in others.items()}
                 for _ in range(REPEATS + 1)]
    return turns[1:]  # the first is the warm-up: compilation, worker start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", default="wrn-28-2")
    parser.add_argument("--image-size", type=int, default=32)
    for name in ("--device", "--precision", "--compile"):
        parser.add_argument(name, default="auto")
    parser.add_argument("--steps", type=int, help="steps of a repetition (default: 3 on a CPU, 50 on a GPU)")
    parser.add_argument("--authors", metavar="CHECKOUT", help="also a step of the authors' code")
    options = parser.parse_args()
    ours = Ours(options)
    device = ours.device
    on_gpu = device.type == "cuda"
    steps = options.steps or (50 if on_gpu else 3)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    B = options.batch_size
    compiled = ", compiled" if ours.config.compile == "on" else ""
    print(f"{options.model}, {B} + {2 * B} + {2 * B} images of {options.image_size}x{options.image_size}; {name}, "
          f"{ours.config.precision}{compiled}, torch {torch.__version__}")

    on_host = {k: v.cpu() for k, v in ours.run.sets._asdict().items() if torch.is_tensor(v)}
    sets = ours.run.sets._replace(**on_host)
    others = {}
    if ours.config.precision != "fp32":
        others["step, fp32"] = elsewhere(Ours, options, precision="fp32")
    others["conventional"] = elsewhere(Conventional, options, sets, device)
    if options.authors:
        others["authors"] = elsewhere(Authors, options)
    turns = in_turns(ours, others, steps)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    step = medians["step"]
    remarks = {"step": f"2^18 steps: {2**18 * step / 3600:.1f} h",
               "conventional": f"{os.cpu_count()} workers, fp32", "authors": "their code as they ship it, fp32"}
    print()
    for name, taken in medians.items():
        print(f"{name:22} {1e3 * taken:10.1f} ms   {5 * B / taken:8.0f} images/s   {remarks.get(name, '')}")
    for label, slow in {"ratio": "conventional", "authors' ratio": "authors"}.items():
        for fast in ("step", "step, fp32"):
            if {slow, fast} <= others.keys() | {"step"}:
                ratios = sorted(turn[slow] / turn[fast] for turn in turns)
                print(f"{label + fast.removeprefix('step'):22} {statistics.median(ratios):10.2f}      from "
                      f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {REPEATS} interleaved repetitions of {steps} steps")
    a, b, ratio = augmentation_alone(sets, options.image_size)
    print(f"{'augmentation':22} {1e3 * a:10.1f} ms   against {1e3 * b:.1f} ms by PIL on one core: {ratio:.1f} times")

    (operations, least), (rate, bandwidth) = ours.floor()
    floor = max(operations / rate, least / bandwidth)
    print(f"floor: {operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s = {1e3 * operations / rate:.1f} ms; "
          f"{least / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s = {1e3 * least / bandwidth:.1f} ms; "
          f"the step takes {step / floor:.1f} times the larger")
    if on_gpu:
        print(f"peak memory: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

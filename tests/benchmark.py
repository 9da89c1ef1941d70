"""How fast is a training step, how fast could it be, and how fast is the conventional pipeline?

    python tests/benchmark.py                     # the paper's step: WRN-28-2, 64 + 128 + 128 images
    python tests/benchmark.py --sizes             # and how it grows with batch, image size, images
    python tests/benchmark.py --batch-size 16 --model wrn-10-1 --image-size 16 --steps 20

Prints the step and its parts, the floor that this machine's own matrix rate and copy bandwidth set,
and, taking turns with it in a process of its own, the pipeline of most published code: PIL
transforms of single images in DataLoader workers, fp32, default memory format, eager, EMA in a
Python loop.
"""

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import models
import priors
import train
from test_data import PIL_OPERATIONS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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

class Ours:
    """train.train_step on random pixels, as train.py calls it."""

    def __init__(self, options):
        arguments = ["--n1", "100", "--m1", "500", "--imb", "10", "--batch-size", options.batch_size, "--model",
                     options.model, "--image-size", options.image_size, "--device", options.device,
                     "--precision", options.precision, "--compile", options.compile]
        self.settings = settings = train.parse(list(map(str, arguments)))
        self.run, self.batch_size, self.i = train.prepare(settings), options.batch_size, 0
        self.precision, self.device = settings.precision, self.run.device
        self.run.ccr.fill_(True)
        compiled = settings.compile == "on" or settings.compile == "auto" and self.device.type == "cuda"
        self.step_function = torch.compile(train.train_step) if compiled else train.train_step

    def step(self):
        self.i += 1
        batch = train.batch(self.run, self.settings, self.i)
        self.step_function(self.run, train.METHODS["adello"], 0.95, *batch)

    def parts(self):
        """Seconds of the parts, each on its own and eager."""
        run, B, device = self.run, self.batch_size, self.device
        images, draws = run.sets.unlabeled[:3 * B], torch.rand(3 * B, 15, device=device)

        def augment():
            return torch.cat([data.weak(images, draws=draws[:, :3]), data.strong(images[B:], draws=draws[B:, 3:])])
        inputs = data.normalize(augment(), MEAN, STD).contiguous(memory_format=torch.channels_last)

        def forward():
            with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                return run.model(inputs)

        def both():
            forward().float().logsumexp(1).mean().backward()
        once, probs = seconds(forward, device), torch.full((2 * B, 10), 0.1, device=device)
        return {"augmentation": seconds(augment, device), "forward": once,
                "backward": seconds(both, device) - once,
                "optimiser and EMA": seconds(lambda: (run.optimizer.step(), run.ema.update(run.model)), device),
                "prior": seconds(lambda: run.estimator.update(probs), device)}

    def floor(self):
        """(operations, least bytes) of a step, (operations/s, bytes/s) of this machine."""
        run, B, sizes = self.run, self.batch_size, []
        inputs = torch.rand(5 * B, *run.sets.labeled.shape[1:], device=self.device)
        hooks = [m.register_forward_hook(lambda m, x, y: sizes.append(y.numel())) for m in run.model.modules()
                 if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d))]
        with FlopCounterMode(display=False) as counter:
            run.model(inputs).sum().backward()
        for hook in hooks:
            hook.remove()
        kind, width = (torch.bfloat16, 2) if run.bf16 else (torch.float32, 4)
        parameters = sum(p.numel() for p in run.model.parameters())
        # each convolution's and batch-norm's output is written once, read once forward and once backward, and its
        # gradient written and read; a parameter, its gradient, momentum and average are read and written
        least = 5 * width * sum(sizes) + 8 * 4 * parameters
        n = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(n, n, device=self.device, dtype=kind)
        block = torch.zeros(2 ** 30 if self.device.type == "cuda" else 2 ** 28, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(block)
        return (counter.get_total_flops(), least), (2 * n ** 3 / seconds(lambda: a @ a, self.device),
                                                    2 * block.nbytes / seconds(lambda: target.copy_(block), self.device))


# ---------------------------------------------------------------------------------- the conventional

def pil_weak(size):
    return T.Compose([T.RandomHorizontalFlip(), T.RandomCrop(size, size // 8, padding_mode="reflect")])


def pil_strong(image):
    """Three random operations and Cutout on a PIL image."""
    for name, operation in random.choices(list(PIL_OPERATIONS.items()), k=3):
        _, low, high = (data.OPERATIONS)[name]
        image = operation(image, random.uniform(low, high))
    pixels, size = np.array(image), image.size[0]
    side, x, y = random.uniform(0, size / 2), random.uniform(0, size), random.uniform(0, size)
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    pixels[top:int(top + side) + 1, left:int(left + side) + 1] = (125, 123, 114)
    return Image.fromarray(pixels)


class Pictures(Dataset):
    """PIL images with one or two views each, transformed one by one."""

    def __init__(self, images, labels, two_views):
        self.images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        self.labels, self.two_views, self.weak = labels.tolist(), two_views, pil_weak(images.shape[-1])
        self.tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        if not self.two_views:
            return self.tensor(self.weak(image)), self.labels[i]
        return self.tensor(self.weak(image)), self.tensor(pil_strong(self.weak(image)))


def forever(dataset, batch_size):
    loader = DataLoader(dataset, batch_size, sampler=RandomSampler(dataset, replacement=True, num_samples=10 ** 7),
                        num_workers=os.cpu_count(), prefetch_factor=1, persistent_workers=True)
    return iter(loader)


class Conventional:
    """The same losses and network, in the way of most published code."""

    def __init__(self, options, sets, device):
        cpu = torch.device("cpu")
        self.labeled = forever(Pictures(sets.labeled.to(cpu), sets.labels.to(cpu), False), options.batch_size)
        self.unlabeled = forever(Pictures(sets.unlabeled.to(cpu), sets.hidden_labels.to(cpu), True), 2 * options.batch_size)
        torch.manual_seed(0)
        self.model = models.build(options.model, 10).to(device)
        self.average = models.build(options.model, 10).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9, nesterov=True,
                                         weight_decay=5e-4, foreach=False)
        self.device, self.estimator = device, priors.PriorEstimator(10, device=device)

    def step(self):
        (labeled, labels), (weak, strong) = next(self.labeled), next(self.unlabeled)
        B, U = len(labeled), len(weak)
        logits = self.model(torch.cat([labeled, weak, strong]).to(self.device))
        f_x, f_w, f_s = logits.split([B, U, U])
        probs = f_w.detach().softmax(1)
        mask, q = losses.confidence_mask(probs), self.estimator.q_hat
        q_smooth = q ** 0.5 / (q ** 0.5).sum()
        loss = (losses.supervised_loss(f_x, labels.to(self.device), q, q_smooth)
                + losses.consistency_loss(f_s, probs, mask, q, q_smooth)
                + losses.complementary_loss(f_s, probs, mask, q, q_smooth, 1.1))
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


def serve(pipe, options, sets, device):
    """The conventional pipeline in its own process, whose memory ours does not manage."""
    pipeline = Conventional(options, sets, device)
    for steps in iter(pipe.recv, None):
        pipe.send(timed(pipeline.step, device, steps))


def augmentation_alone(sets, size):
    """Seconds on one core for 192 weak and 128 strong views: (ours, conventional)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = sets.unlabeled[:192].cpu()
    pictures, weak = [Image.fromarray(i) for i in images.permute(0, 2, 3, 1).numpy()], pil_weak(size)
    tensor, cpu = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)]), torch.device("cpu")

    def ours():
        return data.normalize(torch.cat([data.weak(images), data.strong(images[:128])]), MEAN, STD)

    def conventional():
        return [tensor(weak(p)) for p in pictures] + [tensor(pil_strong(weak(p))) for p in pictures[:128]]
    pairs = [(seconds(ours, cpu, 1, 3), seconds(conventional, cpu, 1)) for _ in range(7)]
    torch.set_num_threads(threads)
    return [statistics.median(p[k] for p in pairs) for k in (0, 1)] + [statistics.median(b / a for a, b in pairs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", default="wrn-28-2")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--steps", type=int, help="steps of a repetition (default: 3 on a CPU, 50 on a GPU)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions (default: 5)")
    parser.add_argument("--sizes", action="store_true", help="also other batches, image sizes, numbers of images")
    options = parser.parse_args()
    ours = Ours(options)
    device = ours.device
    steps = options.steps or (50 if device.type == "cuda" else 3)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    B = options.batch_size
    print(f"{options.model}, {B} + {2 * B} + {2 * B} images of {options.image_size}x{options.image_size}; {name}, "
          f"{ours.precision}, torch {torch.__version__}")

    pipe, other_end = multiprocessing.Pipe()
    sets = ours.run.sets._replace(**{k: v.cpu() for k, v in ours.run.sets._asdict().items() if torch.is_tensor(v)})
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(other_end, options, sets, device))
    process.start()
    other_end.close()  # a child that ends is then an EOFError here
    pairs = []
    for _ in range(options.repeats + 1):
        pipe.send(steps)
        theirs = pipe.recv()
        pairs.append((timed(ours.step, device, steps), theirs))
    pipe.send(None)
    process.join()  # or its workers would take part in what is timed from here on
    peak = (f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU" if device.type == "cuda" else
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    pairs = pairs[1:]  # the first is the warm-up: compilation, worker start
    mine, theirs = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    ratios = sorted(b / a for a, b in pairs)
    print(f"\nstep           {1e3 * mine:10.1f} ms   {5 * B / mine:8.0f} images/s   2^18 steps: {2**18 * mine / 3600:.1f} h")
    print(f"conventional   {1e3 * theirs:10.1f} ms   {5 * B / theirs:8.0f} images/s   {os.cpu_count()} workers")
    print(f"ratio          {statistics.median(ratios):10.2f}      from {ratios[0]:.2f} to {ratios[-1]:.2f} over "
          f"{options.repeats} interleaved repetitions of {steps} steps")
    a, b, ratio = augmentation_alone(ours.run.sets, options.image_size)
    print(f"augmentation   {1e3 * a:10.1f} ms   against {1e3 * b:.1f} ms by PIL on one core: {ratio:.1f} times")

    print("\nparts, each alone")
    for part, taken in ours.parts().items():
        print(f"  {part:18} {1e3 * taken:9.1f} ms")
    (operations, least), (rate, bandwidth) = ours.floor()
    floor = max(operations / rate, least / bandwidth)
    print(f"floor: {operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s = {1e3 * operations / rate:.1f} ms; "
          f"{least / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s = {1e3 * least / bandwidth:.1f} ms; "
          f"the step takes {mine / floor:.1f} times the larger")
    print(f"peak memory: {peak}")

    if options.sizes:
        print("\nmedian ms a step by batch size, by image size, by number of images")
        for label, changes in [(f"batch {b}", dict(batch_size=b)) for b in (B // 4, B // 2, B)] + [
                (f"image size {s}", dict(image_size=s, batch_size=B // 4)) for s in (16, 32, 64)]:
            other = Ours(argparse.Namespace(**(vars(options) | changes)))
            print(f"  {label:18} {1e3 * seconds(other.step, device, 3, steps):9.1f}")
        small = Ours(argparse.Namespace(**(vars(options) | dict(batch_size=B // 4))))
        for n in (5_000, 50_000, 500_000):
            many = small.run.sets.unlabeled.repeat(n // len(small.run.sets.unlabeled) + 1, 1, 1, 1)[:n]
            labels = small.run.sets.hidden_labels.repeat(n // len(small.run.sets.hidden_labels) + 1)[:n]
            small.run.sets = small.run.sets._replace(unlabeled=many, hidden_labels=labels)
            print(f"  {f'{n} images':18} {1e3 * seconds(small.step, device, 3, steps):9.1f}")


if __name__ == "__main__":
    main()

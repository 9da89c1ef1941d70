"""train.py over several devices or processes, the same global batch split over them.

    torchrun --nproc-per-node=2 tests/distributed.py --dataset cifar10     # further options are train.py's

Gradients, Qhat and the logged losses are means over all processes; process 0 writes the files. Batch-norm is
synchronised on CUDA, where nothing is compiled for its sake; on CPUs each process normalises its own part. Whatever
ends one process ends all of them, and the same command continues from the last checkpoint. (On PyTorch 2.4.1 it is
torchrun that ends a process which waits for one that is gone; from 2.11 on the process notices it by itself.)

Process 0 runs train.main; the others follow it. What may fail on one alone (set-up, checkpoint, memory) comes before an
agreement of all; in training, a process that fails ends, and the others end where they wait for it.
"""

import dataclasses
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import train
from priors import PriorEstimator


class ProcessEnded(OSError):
    """Another process is gone; its own line says why."""


def mean(tensor):
    """Mean of a tensor over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def told(message=None):
    """Process 0's message, on every process."""
    box = [message]
    dist.broadcast_object_list(box)
    return box[0]


def line_of(error):
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class EstimatorOfAll(PriorEstimator):
    """Qhat from the weak predictions of all processes."""

    def update(self, probs, first_ccr_step=False):
        super().update(mean(probs.mean(dim=0, keepdim=True)), first_ccr_step)


class Part(train.Run):
    """One process's part of a run: the data, the network and the state are those of all."""

    def __init__(self, config):
        if config.batch_size % dist.get_world_size():
            raise ValueError(f"--batch-size {config.batch_size} does not divide over {dist.get_world_size()} processes")
        super().__init__(config)
        if self.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # the parameters stay the same
        self.estimator = EstimatorOfAll(len(self.sets.classes), config.prior_momentum, self.device)

    def step(self, labeled, labels, unlabeled, hidden_labels, draws):
        """On this process's part of the batch; returns means over all processes."""
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        B = len(labels)
        draws = torch.cat([draws[:B][mine], draws[B:][mine]])
        try:
            found = super().step(labeled[mine], labels[mine], unlabeled[mine], hidden_labels[mine], draws)
            return dict(zip(found, mean(torch.stack(list(found.values())))))
        except RuntimeError as error:
            if "gloo" in str(error) or isinstance(error, dist.DistBackendError):
                raise ProcessEnded("another process has ended, or cannot be reached") from None
            raise


def together(config, state, kind):
    """This process's run, at the checkpoint's step. On all processes ValueError where one of them fails."""
    downloads = config.dataset != "folder"
    fault = None
    if downloads and dist.get_rank() > 0:
        dist.barrier()                                # process 0 comes first
    try:
        run = kind(config)
        if state:
            train.restore(run, state)
    except Exception as error:
        fault = error
    if downloads and dist.get_rank() == 0:
        dist.barrier()
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault and line_of(fault))
    if fault:
        raise fault
    for rank, line in enumerate(faults):
        if line:
            raise ValueError(f"process {rank}: {line}")
    run.network = torch.nn.parallel.DistributedDataParallel(run.model)
    return run


def lead(arguments, kind):
    """Process 0: train.main, which tells the others when to begin. Returns the exit status."""
    begun = []

    def begin(config):
        state = None
        if "--fresh" not in arguments:
            state = train.read_checkpoint(Path(config.out) / "checkpoint.pt")
        begun.append(told((config, state)))
        begun.append(together(config, state, kind))
        return begun[-1]

    status = train.main(arguments, begin)
    if not begun:                                     # refused
        told((None, status))
    elif len(begun) > 1 and begun[-1].t == begun[-1].config.steps:
        told(status)                                  # of the last save
    return status


def follow(device, kind):
    """Another process: trains along, writes nothing. Returns the exit status."""
    run = None
    try:
        config, state = told()
        if config is None:
            return state
        run = together(dataclasses.replace(config, device=device), state, kind)
        train.train(run, None)
        return told()
    except KeyboardInterrupt:
        return 130
    except (ProcessEnded, FloatingPointError):        # process 0 says so
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if run is None:                               # and this
            return 2
        print(f"error: process {dist.get_rank()}: step {run.t}: {line_of(error)}", file=sys.stderr)
        return 1


def join(arguments):
    """Join the other processes: on this process's GPU or, without one, on the CPU. Returns the device. ValueError."""
    parser = train.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_known_args(arguments)[0].device
    if "RANK" not in os.environ:
        raise ValueError("start it with torchrun --nproc-per-node=N tests/distributed.py")
    if asked == "cpu" or not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return "cpu"
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return f"cuda:{local}"


def main(arguments, kind=Part):
    """The command line, in each process. Returns the exit status. kind(config): this process's run."""
    try:
        device = join(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 1
    try:
        if dist.get_rank() > 0:
            status = follow(device, kind)
        else:
            status = lead([*arguments, "--device", device, "--compile", "off"], kind)
    finally:
        if status == 0 or device == "cpu":            # NCCL could wait for a process that is gone
            gc.collect()                              # what wraps the network goes before the group that it talks to
            dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

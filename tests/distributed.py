"""train.py over several devices or processes, the same global batch split over them.

    torchrun --nproc-per-node=2 tests/distributed.py --dataset cifar10     # further options are train.py's

Gradients, Qhat and the logged losses are means over all processes, batch-norm is synchronised on CUDA, and
one process writes the files. A signal ends all processes; the last checkpoint continues.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import evaluate
import models
import train
from priors import PriorEstimator

prepare, batch, update, log_row = train.prepare, train.batch, PriorEstimator.update, evaluate.log_row


def mean(tensor):
    """Mean of a tensor over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def prepare_part(s):
    if s.batch_size % dist.get_world_size():
        raise ValueError(f"--batch-size {s.batch_size} does not divide over {dist.get_world_size()} processes")
    run = prepare(s)
    if run.device.type == "cuda":
        run.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(run.model)  # the parameters stay the same
        run.parts["model"] = run.model
    run.forward = torch.nn.parallel.DistributedDataParallel(run.model)
    return run


def batch_part(run, s, step):
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    *parts, draws = batch(run, s, step)
    return *(part[mine] for part in parts), torch.cat([draws[:s.batch_size][mine], draws[s.batch_size:][mine]])


def log_row_of_all(run, *rest):
    mean(run.record.totals)
    return log_row(run, *rest)


def main(argv):
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train.prepare, train.batch, evaluate.log_row = prepare_part, batch_part, log_row_of_all
    PriorEstimator.update = lambda self, probs, ccr: update(self, mean(probs.mean(0, keepdim=True)), ccr)
    train.signal.signal = lambda *_: None
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
        models.hold = models.write_whole = evaluate.summary = lambda *_: None
        sys.stdout.isatty = lambda: False
    status = train.main(argv + (["--device", f"cuda:{os.environ['LOCAL_RANK']}"] if cuda else []))
    dist.barrier()  # until the result is written
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

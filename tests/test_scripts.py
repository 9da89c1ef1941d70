"""ablations.py and distributed.py: each detail is undone and nothing else; two processes are one, and end as one."""

import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import filelock
import pytest
import torch

import ablations
import baselines
import data
import distributed
import evaluate
import results
import train
from conftest import ROOT, SMALL, SPLIT, parse, rows


# ---------------------------------------------------------------------------------- the ablations

def images_of(part):
    return {image.numpy().tobytes() for image in part}


def test_unlabeled_alone_has_every_unlabeled_image_and_no_labeled_one(options):
    sets = ablations.unlabeled_alone(parse(*options, "--shift", "reversed")).sets
    assert torch.bincount(sets.hidden_labels).tolist() == data.long_tail_counts(20, 1 / 4, 3)
    assert images_of(sets.labeled).isdisjoint(images_of(sets.unlabeled))


@pytest.mark.parametrize("kind, shared", [(train.Run, True), (ablations.SeparateStatistics, False)])
def test_labeled_logits_depend_on_the_unlabeled_images_only_where_they_share_statistics(kind, shared, options):
    run = kind(parse(*options))
    labeled, _, unlabeled, _, draws = run.batch()
    logits = run.forward(labeled, unlabeled, draws)[:8]
    others = run.forward(labeled, 255 - unlabeled, draws)[:8]
    assert torch.equal(logits, others) != shared


@pytest.mark.parametrize("name, changes, constant", [
    ("moving-temperature", [1, 1, 1, 1], False), ("constant-rate", [1, 0, 0, 0], True),
    ("temperature-one", [0, 0, 0, 0], False), ("as-shipped", [0, 0, 0, 0], True)])
def test_t_follows_the_estimate_in_each_ccr_step_the_first_or_none_and_the_rate_is_constant_or_the_cosine(
        name, changes, constant, options, tmp_path):
    """T = exp(KL(P_bal || Qhat)) of a step where it is computed; the first CCR step is the third of six."""
    options = [*options, "--eval-every", "1", "--warmup-steps", "2", "--prior-momentum", "0.5", "--lr", "0.02"]
    assert ablations.main([name, *options, "--out", "run"]) == 0
    temperature = 1
    followed = []
    for t, (row, change) in enumerate(zip(rows(tmp_path / "run"), [0, 0, *changes], strict=True)):
        assert row["lr"] == pytest.approx(0.02 if constant else 0.02 * math.cos(7 * math.pi * t / (16 * 6)))
        followed.append(math.exp(row["kl_uniform_qhat"]))
        temperature = followed[-1] if change else temperature
        assert row["temperature"] == pytest.approx(temperature, rel=1e-5)
        assert row["loss_uc"] > 0 or row["step"] < 3
    assert abs(followed[5] - followed[2]) > 1e-4


def test_noise_changes_the_images_and_not_the_split():
    config = parse("--n1", 20, "--m1", 40, "--imb", 4, "--shift", "reversed", "--device", "cpu")
    sets, plain = ablations.noise(config, deviation=0.25).sets, train.Run(config).sets
    assert torch.equal(sets.test, data.shapes(200, 1, 16, noise=0.25)[0])
    assert torch.equal(sets.labels, plain.labels) and not torch.equal(sets.labeled, plain.labeled)
    assert torch.equal(sets.hidden_labels, plain.hidden_labels)


def test_a_variant_has_a_directory_of_its_own_and_its_method(options):
    assert ablations.main(["unlabeled-alone", *options, "--method", "fixmatch", "--warmup-steps", "0"]) == 0
    run = results.logged("runs/folder-unlabeled-alone-fixmatch-consistent-imb4-s0")
    assert run.config["variant"] == "unlabeled-alone-fixmatch" and run.config["method"] == "fixmatch"
    assert run.log[-1]["loss_uc"] == 0


def test_la_applies_to_a_variants_run_on_its_own_data(options):
    assert ablations.main(["unlabeled-alone", *options, "--out", "run"]) == 0
    assert baselines.main(["la", "run", "--device", "cpu"]) == 0
    assert evaluate.read_run("run+la").config["variant"] == "unlabeled-alone+la"


@pytest.mark.parametrize("arguments, reason", [
    ([], "no variant ''"), (["nothing"], "no variant 'nothing'"), (["noise0.3", "--method"], "--method"),
    (["noise0.3", "--method", "kdd"], "kdd"), (["noise0.3", "--dataset", "stl10"], "not of --dataset stl10"),
    (["unlabeled-alone", "--steps", "0"], "--steps 0")])
def test_a_mistake_is_one_line_and_status_2(arguments, reason, tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    assert ablations.main(arguments) == 2
    one_line(reason)


# ------------------------------------------------------------------------------- two processes as one

def fixed(kind, config):
    """A run whose batch-norm takes its running statistics: on CPUs each process normalises its own part."""
    run = kind(config)
    run.model.eval()
    return run


def ending(error, step, ranks):
    """A kind of run that ends with an error in a step, in processes of these ranks."""
    class Ending(distributed.Part):
        def forward(self, *views):
            if self.t == step and distributed.dist.get_rank() in ranks:
                raise error("out of memory")
            return super().forward(*views)
    return Ending


def alone(config):
    """A run that cannot be made in process 1."""
    if distributed.dist.get_rank() == 1:
        raise ValueError("no room")
    return distributed.Part(config)


KINDS = {"alone": alone, "interrupted": ending(KeyboardInterrupt, 5, (0, 1)), "memory": ending(RuntimeError, 3, (1,))}


def process(cases, ports):
    """One of the processes: case after case; what it says, returns and holds into a file."""
    def made(config):
        run = fixed(KINDS.get(name, distributed.Part), config)
        kept.extend([*run.model.parameters(), run.estimator.q_hat])
        return run

    found = {}
    for (name, arguments), port in zip(cases.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        kept = []
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = distributed.main(arguments, made)
        held = b"".join(part.detach().numpy().tobytes() for part in kept)
        found[name] = {"status": status, "held": zlib.crc32(held), "lines": said.getvalue().splitlines()}
    Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def processes(image_folder, tmp_path_factory):
    """Two processes on gloo go through all cases: their directory, exit statuses and lines by case and process."""
    if sys.platform == "win32":
        pytest.skip("PyTorch's store for processes on Windows depends on the build")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("without torchrun a process of PyTorch 2.4.1 waits for one that is gone; 2.11 does not")
    place = tmp_path_factory.mktemp("processes")
    options = ["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL, "--precision", "fp32",
               "--device", "cpu", "--eval-every", "1", "--warmup-steps", "2", "--threshold", "0.4", "--steps", "8"]
    (place / "held").mkdir()
    cases = {"held": ["--out", "held"], "uneven": ["--out", "uneven", "--batch-size", "3"], "alone": ["--out", "alone"],
             "interrupted": ["--out", "run"], "continued": ["--out", "run"], "finished": ["--out", "run"],
             "other": ["--out", "run", "--lr", "1"], "memory": ["--out", "memory"]}
    cases = {name: options + case for name, case in cases.items()}
    script = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_scripts; "
              f"test_scripts.process({cases!r}, {free_ports(len(cases))!r})")
    with filelock.FileLock(place / "held/.lock"):
        started = [subprocess.Popen(
            [sys.executable, "-c", script], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                         "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}) for rank in (0, 1)]
        try:
            said = [each.communicate(timeout=200) for each in started]
        finally:
            for each in started:
                each.kill()
    assert [each.returncode for each in started] == [0, 0], said
    of_ranks = [json.loads((place / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    found = {name: {key: [of_rank[name][key] for of_rank in of_ranks]
                    for key in ("status", "held", "lines")} for name in cases}
    return place, options, found


@pytest.mark.parametrize("case, statuses, reason", [
    ("held", [2, 2], "error: --out held is in use by another process"),
    ("uneven", [2, 2], "error: --batch-size 3 does not divide over 2 processes"), ("other", [2, 2], "--lr"),
    ("alone", [2, 2], "error: process 1: no room"), ("memory", [1, 1], "error: process 1: step 3: out of memory")])
def test_what_one_process_refuses_or_cannot_do_ends_both_with_its_line(case, statuses, reason, processes):
    _, _, found = processes
    assert found[case]["status"] == statuses
    lines = [line for of_rank in found[case]["lines"] for line in of_rank]
    errors = [line for line in lines if line.startswith("error: ") and "another process has" not in line]
    assert len(errors) == 1 and reason in errors[0]
    assert not any("Traceback" in line for line in lines)


def test_two_processes_hold_the_same_parameters_and_estimate(processes):
    _, _, found = processes
    assert found["continued"]["status"] == [0, 0]
    one, two = found["continued"]["held"]
    assert one == two != zlib.crc32(b"")


def test_two_processes_that_were_interrupted_equal_one_that_was_not(processes, tmp_path):
    place, options, found = processes
    assert found["interrupted"]["status"] == [130, 130]
    assert train.main([*options, "--out", str(tmp_path / "one")], lambda config: fixed(train.Run, config)) == 0
    one, two = (train.read_checkpoint(path / "checkpoint.pt") for path in (tmp_path / "one", place / "run"))
    torch.testing.assert_close(two["model"], one["model"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(two["estimator"], one["estimator"], atol=1e-6, rtol=0)
    log = rows(place / "run")
    assert [row["step"] for row in log] == list(range(1, 9))
    for row, expected in zip(log, rows(tmp_path / "one"), strict=True):
        for name in ("loss_s", "loss_u", "loss_uc", "mask_rate", "kl_q_qhat", "temperature", "nll"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_a_finished_run_is_finished_for_both(processes):
    _, _, found = processes
    assert found["finished"]["status"] == [0, 0]
    assert found["finished"]["held"] == found["continued"]["held"]

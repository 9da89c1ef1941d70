"""ablations.py and distributed.py: each detail is undone and nothing else; two processes are one, and end as one."""

import json
import math
import os
import socket
import subprocess
import sys

import filelock
import pytest
import torch

import ablations
import baselines
import data
import evaluate
import train
from conftest import ROOT, SMALL, SPLIT, rows


@pytest.fixture
def options(image_folder, tmp_path, monkeypatch):
    """train.py's options for six steps on the small folder, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return ["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL, "--precision", "fp32",
            "--device", "cpu"]


# ---------------------------------------------------------------------------------- the ablations

@pytest.mark.parametrize("split", [["--shift", "reversed"], ["--imb-u", "0.5"], ["--labeled-fraction", "0.3"]])
def test_the_sets_of_the_scripts_are_train_pys(split, image_folder):
    long_tail = [] if "--labeled-fraction" in split else SPLIT
    config, _ = train.parse(["--dataset", "folder", "--data-dir", str(image_folder), *long_tail, *split, *SMALL,
                             "--device", "cpu"])
    assert data.fingerprint(ablations.sets_of(config)) == train.setup(config).fingerprint


def test_unlabeled_alone_has_every_unlabeled_image_and_no_labeled_one(options):
    config, _ = train.parse([*options, "--shift", "reversed"])
    sets = ablations.unlabeled_alone(config).sets
    assert torch.bincount(sets.hidden_labels).tolist() == data.long_tail_counts(20, 1 / 4, 3)
    labeled = {image.numpy().tobytes() for image in sets.labeled}
    assert labeled.isdisjoint(image.numpy().tobytes() for image in sets.unlabeled)


def test_images_of_unknown_class_are_unlabeled_alone_too(options, image_folder):
    config, _ = train.parse(options)
    source = data.read("folder", image_folder, 16)
    source = source._replace(extra=source.test)
    united = ablations.sets_of(config, source)
    alone = ablations.sets_of(config, source, unite=False)
    assert len(united.unlabeled) == 30 + 120 and torch.equal(alone.unlabeled, source.test)
    assert united.hidden_labels is None and alone.hidden_labels is None


@pytest.mark.parametrize("prepare, shared", [(train.setup, True), (ablations.separate_statistics, False)])
def test_labeled_logits_depend_on_the_unlabeled_images_only_where_they_share_statistics(prepare, shared, options):
    run = prepare(train.parse(options)[0])
    labeled, _, unlabeled, _, draws = train.batch(run)
    logits = run.forward(labeled, unlabeled, draws)[:8]
    others = run.forward(labeled, 255 - unlabeled, draws)[:8]
    assert torch.equal(logits, others) != shared


@pytest.mark.parametrize("prepare, moves", [(train.setup, False), (ablations.moving_temperature, True)])
def test_the_temperature_follows_the_estimate_only_where_it_moves(prepare, moves, options, tmp_path):
    """T = exp(KL(P_bal || Qhat)) in the first CCR step, which is the third; then in every one, or in no other."""
    options = [*options, "--eval-every", "1", "--warmup-steps", "2", "--prior-momentum", "0.5", "--out", "run"]
    assert train.main(options, "moving-temperature", prepare) == 0
    log = rows(tmp_path / "run")
    expected = [math.exp(row["kl_uniform_qhat"]) for row in log]
    found = [row["temperature"] for row in log]
    assert found[:2] == [1, 1]
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert found[3:] == pytest.approx(expected[3:] if moves else [found[2]] * 3, rel=1e-5)
    assert abs(expected[5] - expected[2]) > 1e-3


def test_noise_changes_the_images_and_not_the_split():
    config, _ = train.parse(["--n1", "20", "--m1", "40", "--imb", "4", "--shift", "reversed", "--device", "cpu"])
    sets = ablations.noise(config, deviation=0.25).sets
    assert torch.equal(sets.test, data.shapes(200, 1, 16, noise=0.25)[0])
    labeled = data.long_tail_counts(20, 4, 10)
    unlabeled = data.long_tail_counts(40, 1 / 4, 10)
    assert torch.bincount(sets.labels).tolist() == labeled
    assert torch.bincount(sets.hidden_labels).tolist() == [n + m for n, m in zip(labeled, unlabeled)]


def test_a_variant_has_a_directory_of_its_own_and_its_method(options):
    assert ablations.main(["unlabeled-alone", *options, "--method", "fixmatch", "--warmup-steps", "0"]) == 0
    run = evaluate.read_run("runs/folder-unlabeled-alone-fixmatch-consistent-imb4-s0")
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
def test_a_mistake_is_one_line_and_status_2(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ablations.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


# ------------------------------------------------------------------------------- two processes as one

def fixed(config):
    """A run whose batch-norm takes its running statistics: on CPUs each process normalises its own part."""
    run = train.setup(config)
    run.model.eval()
    return run


# In each process: a case after the other, the exit statuses and what the run holds at the end into a file
CASES = f"""
import hashlib, json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, distributed
from test_scripts import fixed
rank = int(os.environ["RANK"])
cases, ports, results = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {{}}

def ends(error, step, ranks):
    def setup(config):
        run = fixed(config)
        forward = run.forward
        def ending(*views):
            if run.step == step and rank in ranks:
                raise error
            return forward(*views)
        run.forward = ending
        return run
    return setup

def whole(config):
    kept.append(fixed(config))
    return kept[-1]

setups = {{"interrupted": ends(KeyboardInterrupt(), 5, (0, 1)), "memory": ends(RuntimeError("out of memory"), 3, (1,))}}
for (name, arguments), port in zip(cases.items(), ports):
    os.environ["MASTER_PORT"] = str(port)
    kept = []
    print(name, file=sys.stderr, flush=True)
    status = distributed.main(arguments, setups.get(name, whole))
    held = [p.detach().flatten() for run in kept for p in (*run.model.parameters(), run.estimator.q_hat)]
    results[name] = [status, hashlib.sha256(torch.cat(held).numpy().tobytes()).hexdigest() if held else None]
with open(f"rank{{rank}}.json", "w", encoding="utf-8") as file:
    json.dump(results, file)
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def processes(image_folder, tmp_path_factory):
    """Two processes on gloo go through all cases: their directory, exit statuses and lines by case and process."""
    if sys.platform == "win32":
        pytest.skip("PyTorch's store for processes on Windows depends on the build")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("without torchrun a process of PyTorch 2.4.1 waits for one that is gone; 2.11 is the oldest that does not")
    place = tmp_path_factory.mktemp("processes")
    options = ["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL, "--precision", "fp32",
               "--device", "cpu", "--eval-every", "1", "--warmup-steps", "2", "--threshold", "0.4", "--steps", "8"]
    (place / "file").touch()
    (place / "held").mkdir()
    cases = {"held": ["--out", "held"], "file": ["--out", "file"], "uneven": ["--out", "uneven", "--batch-size", "3"],
             "interrupted": ["--out", "run"], "continued": ["--out", "run"], "finished": ["--out", "run"],
             "other": ["--out", "run", "--lr", "1"], "memory": ["--out", "memory"]}
    arguments = [json.dumps({name: options + case for name, case in cases.items()}), json.dumps(free_ports(len(cases)))]
    (place / "cases.py").write_text(CASES, encoding="utf-8")
    with filelock.FileLock(place / "held/.lock"):
        started = [subprocess.Popen(
            [sys.executable, place / "cases.py", *arguments], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                         "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}) for rank in (0, 1)]
        try:
            said = [process.communicate(timeout=200) for process in started]
        finally:
            for process in started:
                process.kill()
    found = {name: {"status": [], "held": [], "lines": []} for name in cases}
    for rank in (0, 1):
        assert started[rank].returncode == 0, said[rank][1]
        results = json.loads((place / f"rank{rank}.json").read_text(encoding="utf-8"))
        for line in said[rank][1].splitlines():
            if line in cases:
                lines = found[line]["lines"]
            else:
                lines.append(line)
        for name, (status, held) in results.items():
            found[name]["status"].append(status)
            found[name]["held"].append(held)
    return place, options, found


@pytest.mark.parametrize("case, statuses, reason", [
    ("held", [2, 2], "error: --out held is in use by another process"), ("file", [2, 2], "file"),
    ("uneven", [2, 2], "error: --batch-size 3 does not divide over 2 processes"), ("other", [2, 2], "--lr"),
    ("memory", [1, 1], "error: process 1: step 3: out of memory")])
def test_what_one_process_refuses_or_cannot_do_ends_both_with_its_line(case, statuses, reason, processes):
    _, _, found = processes
    assert found[case]["status"] == statuses
    errors = [line for line in found[case]["lines"] if line.startswith("error: ") and "another process has" not in line]
    assert len(errors) == 1 and reason in errors[0]
    assert not any("Traceback" in line for line in found[case]["lines"])


def test_two_processes_hold_the_same_parameters_and_estimate(processes):
    _, _, found = processes
    assert found["continued"]["status"] == [0, 0]
    one, two = found["continued"]["held"]
    assert one == two and one is not None


def test_two_processes_that_were_interrupted_equal_one_that_was_not(processes, tmp_path):
    place, options, found = processes
    assert found["interrupted"]["status"] == [130, 130]
    assert train.main([*options, "--out", str(tmp_path / "one")], prepare=fixed) == 0
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
    assert found["finished"]["held"] == [None, None]  # nothing was set up

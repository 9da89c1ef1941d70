"""Commands with `--device cuda` on a GPU that is not there (fake_cuda.py): devices, dtypes and waits, no numbers."""

import pytest
import torch

import baselines
import data
import fake_cuda
import train
from conftest import SMALL, SPLIT, result_of, stopping_after
from losses import METHODS
from methods import crest

CAPABILITIES = {"H100": (9, 0), "T4": (7, 5)}
CUDA = "--device cuda --compile off --steps 2 --eval-every 1 --warmup-steps 1".split()


@pytest.fixture
def command(image_folder, tmp_path):
    """What all commands here have in common; the run is in tmp_path/run."""
    return ["--dataset", "folder", "--data-dir", str(image_folder), *SPLIT, *SMALL, *CUDA,
            "--out", str(tmp_path / "run")]


@pytest.fixture
def cheap_views(monkeypatch):
    """Strong views without the fourteen operations, which are the same for every method and take most of a step."""
    monkeypatch.setattr(data, "strong", lambda images, draws: data.weak(images, draws[:, :3]))


def in_steps(gpu):
    """The waits of the steady state, of getting a batch and of a step, which go by these names."""
    assert gpu.passed >= {"batch", "step"}, "nothing is sent from `batch` or `step`: renamed?"
    return {line: n for (functions, line), n in gpu.waits.items() if {"batch", "step"} & set(functions)}


@pytest.mark.parametrize("method, name", [*((method, "H100") for method in METHODS), ("adello", "T4")])
def test_a_command_is_interrupted_goes_on_and_ends_with_a_result(method, name, command, cheap_views, tmp_path,
                                                                 monkeypatch, capsys):
    command += ["--method", method]
    with fake_cuda.gpu(monkeypatch, CAPABILITIES[name]) as gpu:
        assert train.main(command, stopping_after(1)) == 130
        assert train.main(command) == 0
    assert "from step 1;" in capsys.readouterr().out
    assert result_of(tmp_path / "run")["step"] == 2
    assert in_steps(gpu) == {}


@pytest.mark.parametrize("model, size, name", [
    ("wrn-28-2", 32, "T4"), ("resnet50", 64, "H100")])
def test_the_host_waits_in_no_step_of_a_whole_forward_pass(model, size, name, command, monkeypatch):
    command += ["--model", model, "--image-size", str(size), "--steps", "1", "--warmup-steps", "0"]
    with fake_cuda.gpu(monkeypatch, CAPABILITIES[name]) as gpu:
        run = train.Run(train.parse(command)[0])
        assert train.train(run, None)["step"] == 1
    assert in_steps(gpu) == {}


@pytest.mark.parametrize("name", [*baselines.TRAINED, "crest"])
def test_a_baseline_is_interrupted_goes_on_and_ends_with_a_result(name, command, cheap_views, tmp_path, monkeypatch):
    monkeypatch.setattr(crest, "GENERATIONS", 2)
    command = [name, *command]
    update = train.Run.update

    def interrupted(run, loss):
        update(run, loss)
        if run.t == 1:
            raise KeyboardInterrupt
    with fake_cuda.gpu(monkeypatch) as gpu:
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "update", interrupted)
            assert baselines.main(command) == 130
        assert baselines.main(command) == 0
    assert result_of(tmp_path / "run")["step"] == 2
    assert bool(in_steps(gpu)) == (name == "darp")  # which computes on the CPU


@pytest.mark.parametrize("name", ["crt", "la"])
def test_a_finished_run_gets_another_classifier(name, command, cheap_views, tmp_path, monkeypatch):
    with fake_cuda.gpu(monkeypatch):
        assert train.main([*command, "--method", "fixmatch"]) == 0
        assert baselines.main([name, str(tmp_path / "run"), "--device", "cuda"]) == 0
    assert result_of(tmp_path / f"run+{name}")["step"] == 2


# --------------------------------------------------------------------------------- what the fake GPU sees

WAITING = [
    lambda x: x.sum().item(),
    lambda x: bool(x.any()),
    lambda x: x.cpu(),
    lambda x: x.tolist(),
    lambda x: torch.zeros(3).to(x.device),                        # from memory that is not pinned
    lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    lambda x: torch.tensor([1.0, 2.0], device=x.device),
    lambda x: x.copy_(torch.zeros(3)),
    lambda x: torch.zeros(3).copy_(x)]


def test_every_line_that_waits_in_a_step_is_found(command, cheap_views, monkeypatch):
    class Waiting(train.Run):
        def step(self, *batch):
            for wait in WAITING:
                wait(self.estimator.q_hat)
            return super().step(*batch)
    with fake_cuda.gpu(monkeypatch) as gpu:
        train.train(Waiting(train.parse(command)[0]), None)
    assert len(in_steps(gpu)) == len(WAITING)


def test_tensors_on_two_devices_are_an_error(monkeypatch):
    with fake_cuda.gpu(monkeypatch), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="cuda:0") == torch.zeros(3)

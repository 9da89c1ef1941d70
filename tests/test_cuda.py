"""Commands with `--device cuda` on a GPU that is not there (fake_cuda.py): devices, dtypes and waits, no numbers."""

import contextlib

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
    assert "batch" in gpu.sending, "no batch was sent to the GPU from `batch`: is it called otherwise?"
    assert "step" in gpu.updating, "no optimiser's step came from `step`: is it called otherwise?"
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
    ("wrn-28-2", 32, "H100"), ("wrn-28-2", 32, "T4"), ("resnet50", 64, "H100")])
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
    assert in_steps(gpu) == {} or name == "darp"  # which computes on the CPU


@pytest.mark.parametrize("name", ["crt", "la"])
def test_a_finished_run_gets_another_classifier(name, command, cheap_views, tmp_path, monkeypatch):
    with fake_cuda.gpu(monkeypatch):
        assert train.main([*command, "--method", "fixmatch"]) == 0
        assert baselines.main([name, str(tmp_path / "run"), "--device", "cuda"]) == 0
    assert result_of(tmp_path / f"run+{name}")["step"] == 2


# --------------------------------------------------------------------------------- what the fake GPU sees

def test_labels_on_the_gpu_against_logits_on_the_host_are_a_fault(command, cheap_views, tmp_path, monkeypatch):
    place = data.place

    def everything(sets, device):
        return place(sets, device)._replace(test_labels=sets.test_labels.to(device))
    monkeypatch.setattr(data, "place", everything)
    with fake_cuda.gpu(monkeypatch), contextlib.suppress(RuntimeError):
        assert train.main(command) == 1
    assert not (tmp_path / "run/result.json").exists()


def test_tensors_on_two_devices_are_an_error(monkeypatch):
    with fake_cuda.gpu(monkeypatch), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="cuda:0") == torch.zeros(3)


@pytest.mark.parametrize("waiting", [
    lambda x: x.sum().item(),
    lambda x: bool(x.any()),
    lambda x: x.cpu(),
    lambda x: x.tolist(),
    lambda x: torch.zeros(3).to(x.device),                        # from memory that is not pinned
    lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    lambda x: torch.tensor([1.0, 2.0], device=x.device),
    lambda x: x.copy_(torch.zeros(3)),
    lambda x: torch.zeros(3).copy_(x)])
def test_a_wait_is_counted(waiting, monkeypatch):
    with fake_cuda.gpu(monkeypatch) as gpu:
        x = torch.zeros(3, device="cuda:0")
        assert not gpu.waits
        waiting(x)
    assert gpu.waits


@pytest.mark.parametrize("place, counts", [
    ("train.py", True), ("tests/method.py", True), ("tests/methods/deep/method.py", True),
    (".venv/lib/python3/site-packages/package.py", False), ("../elsewhere/train.py", False)])
def test_a_wait_is_counted_in_whatever_file_of_the_project_it_is(place, counts, monkeypatch):
    """Elsewhere it is this file's, which calls it."""
    names = {}
    exec(compile("def step(x):\n    return float(x.sum())", str(fake_cuda.ROOT / place), "exec"), names)
    with fake_cuda.gpu(monkeypatch) as gpu:
        names["step"](torch.zeros(3, device="cuda:0"))
    (functions, _), = gpu.waits
    assert (functions[0] == "step") == counts


def test_a_step_under_another_name_is_not_taken_for_one_that_does_not_wait(monkeypatch):
    """The list of waits is empty, too, where nothing has been looked at."""
    with fake_cuda.gpu(monkeypatch) as gpu:
        torch.zeros(3, device="cuda:0").sum().item()
    with pytest.raises(AssertionError, match="called otherwise"):
        in_steps(gpu)


def test_what_does_not_wait_is_not_counted(monkeypatch):
    with fake_cuda.gpu(monkeypatch) as gpu:
        x = torch.zeros(3, device="cuda:0")
        x = x + torch.zeros(3).pin_memory().to(x.device, non_blocking=True)
        x = x.index_select(0, torch.zeros(3, dtype=torch.int64, device=x.device)) * torch.tensor(2.0)
    assert not gpu.waits

"""Every option does what its line in --help says: a value other than the default, and what a run then does.

The expected values are worked out by hand on a data set of three classes with 40 and 10 images each. What a step does
is seen on a network of three numbers, its logits, so that rate, decay, average and alpha can be read off exactly.
"""

import contextlib
import dataclasses
import functools
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
import evaluate
import fake_cuda
import train
from conftest import coloured_classes, made_up_run, parse
from train import Config

BASE = ("--dataset folder --data-dir IMAGES --n1 20 --m1 10 --imb 4 --shift consistent --image-size 8 --model wrn-10-1 "
        "--batch-size 4 --steps 100 --device cpu --precision fp32 --compile off").split()
T = 50                                     # half of the steps are done
LOGITS = torch.tensor([0.7, 0.2, 0.1]).log()
RATE = 0.03 * math.cos(7 * math.pi * T / 1600)
PRIOR = torch.tensor([20, 10, 5]) / 35     # P_L


class Logits(torch.nn.Module):
    """A network whose logits are three parameters, whatever it sees; and what the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(LOGITS.clone())
        self.weight = torch.nn.Parameter(torch.ones(1, 1))
        self.register_buffer("buffer", torch.zeros(1))
        self.gradients = []                # of the logits, one for each step; the optimiser changes .grad in place
        self.logits.register_hook(lambda gradient: self.gradients.append(gradient.clone()))

    def forward(self, images):
        return self.logits.expand(len(images), 3) + 0 * self.weight


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What stands for IMAGES and OTHERS: folders of ant, bee, cat and of two of them, read once."""
    root = tmp_path_factory.mktemp("options")
    for name in ("images", "others"):
        coloured_classes(root / name, {"train": 40, "test": 2})
    for part in ("train", "test"):
        shutil.rmtree(root / "others" / part / "cat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "folder", functools.cache(data.folder))
        yield {"IMAGES": str(root / "images"), "OTHERS": str(root / "others")}


# ------------------------------------------------------------------------------------ what can be seen of a run

def run_of(words, **parts):
    return train.Run(parse(*words), **parts)


def unlabeled(words):
    """Images of each class in the unlabeled set, the labeled ones among them, as the true prior has them."""
    run = run_of(words)
    counts = torch.bincount(run.sets.hidden_labels)
    torch.testing.assert_close(run.q_true, counts / counts.sum())
    return counts.tolist()


def seen(words):
    """Height and width of the images that the network takes in a step, and the type of its logits."""
    run = run_of(words)
    found = []
    run.model.register_forward_hook(lambda module, images, logits: found.extend([*images[0].shape[2:], logits.dtype]))
    run.step(*run.batch())
    return found


def step(words, network=None, t=T):
    """A run that has done step t, the step's scalars, and how it moved the network's parameters."""
    run = run_of(words, model=network)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.t = t
    found = run.step(*run.batch())
    return run, found, {name: p.detach() - before[name] for name, p in run.model.named_parameters()}


def losses(words):
    """Which losses a step has in which some images are confident."""
    _, found, _ = step([*words, "--threshold", 0.5, "--warmup-steps", 0])
    return {name for name in ("loss_s", "loss_u", "loss_uc") if found[name] > 0}


def alpha(words):
    """From L_s alone: at logits of zero its gradient is P^(1 - alpha), normalised, less the labels' shares."""
    network = Logits()
    network.logits.data.zero_()
    run = run_of([*words, "--method", "udal", "--threshold", 1], model=network)
    run.t = T
    _, labels, *_ = batch = run.batch()
    run.step(*batch)
    adjusted = network.gradients[0] + torch.bincount(labels, minlength=3) / len(labels)
    return 1 - (torch.log(adjusted[0] / adjusted[2]) / torch.log(PRIOR[0] / PRIOR[2])).item()


def log(words):
    run = run_of([*words, "--steps", 4], model=Logits())
    train.train(run, None)
    return run.rows


def ccr(words):
    """Whether L_uc is there in the steps 49, 50, 51."""
    return [step([*words, "--threshold", 1], Logits(), t)[1]["loss_uc"].item() > 0 for t in (49, 50, 51)]


def network(words):
    """Its 3x3 convolutions and its features."""
    modules = list(run_of(words).model.modules())
    return sum(getattr(m, "kernel_size", None) == (3, 3) for m in modules), modules[-1].in_features


def length(words):
    """How many steps there are; they do nothing here."""
    run = run_of(words, model=Logits())
    steps = []
    run.batch = lambda: ()
    run.step = lambda: steps.append(1) or dict.fromkeys(("mask_rate", "right_rate"), torch.ones(()))
    train.train(run, None)
    return len(steps)


def rate(words):
    """Of the step: the first one of Nesterov's momentum 0.9 is 1.9 gradients long."""
    run, _, moved = step(words, Logits())
    return (-moved["logits"][0] / (1.9 * run.model.gradients[0][0])).item()


def average(words):
    """The share of itself that the averaged network keeps in a step."""
    run, _, moved = step([*words, "--lr", 100], Logits())
    return 1 - ((run.ema.model.logits - LOGITS)[0] / moved["logits"][0]).item()


def device(words):
    """Of the network and of a batch, on a GPU that is not there."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if "cuda" in words:
            stack.enter_context(fake_cuda.gpu(patch))
        run = run_of(words)
        parts = [*run.batch(), *run.model.parameters(), *run.ema.model.parameters(), run.estimator.q_hat]
        return {part.device.type for part in parts}


def compilations(words):
    """How often torch.compile is called for a run."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
        run_of(words)
    return len(calls)


def files(words):
    """Where the command writes, below the current directory."""
    before = {*Path().rglob("*.json")}
    assert train.main([*words, "--steps", "1"]) == 0
    return sorted(path.as_posix() for path in {*Path().rglob("*.json")} - before)


def directory(words):
    *others, last = words
    return parse(*others, variant="mine").out if last == "variant" else parse(*words).out


LOOKS = {  # what can be seen of a run, how, and what is to be seen without an option
    "classes": (lambda words: run_of(words).sets.classes, ["ant", "bee", "cat"]),
    "labeled": (lambda words: torch.bincount(run_of(words).sets.labels).tolist(), [20, 10, 5]),
    "unlabeled": (unlabeled, [30, 15, 7]),
    "seen": (seen, [8, 8, torch.float32]),
    "losses": (losses, {"loss_s", "loss_u", "loss_uc"}),
    "sizes": (lambda words: [len(part) for part in run_of(words).batch()], [4, 4, 8, 8, 12]),
    "alpha": (alpha, 1 - 0.9 / 4),
    "alpha in the log": (lambda words: log([*words, "--eval-every", 2])[0]["alpha"], 1 - 0.9 / 4),
    "evaluations": (lambda words: [row["step"] for row in log(words)], [4]),
    "mask": (lambda words: step(words, Logits())[1]["mask_rate"].item(), 0),  # all have the confidence 0.7
    "ccr": (ccr, [True, True, True]),
    "q_hat": (lambda words: step(words, Logits())[0].estimator.q_hat.tolist(),  # uniform before
              [0.999 / 3 + 0.001 * q for q in (0.7, 0.2, 0.1)]),
    "network": (network, (7, 64)),
    "length": (length, 100),
    "rate": (rate, RATE),
    "decay": (lambda words: step(words, Logits())[2]["weight"].item() / (-1.9 * RATE), 5e-4),  # of a weight of 1
    "average": (average, 0.999),
    "norms": (lambda words: {m.momentum for m in run_of(words).model.modules()
                             if isinstance(m, torch.nn.BatchNorm2d)}, {0.001}),
    "device": (device, {"cpu"}),
    "compilations": (compilations, 0),
    "files": (files, [f"runs/folder-adello-consistent-imb4-s0/{name}.json" for name in ("config", "result")]),
    "directory": (directory, "runs/folder-adello-consistent-imb4-s0")}

ROWS = [  # field, its option, what can be seen of it, the value that is to be seen with it
    ("dataset", "--dataset shapes", "classes",
     "disc ring square frame triangle plus cross diamond crescent bar".split()),
    ("data_dir", "--data-dir OTHERS", "classes", ["ant", "bee"]),
    ("n1", "--n1 8", "labeled", [8, 4, 2]),
    ("m1", "--m1 20", "unlabeled", [20 + 20, 10 + 10, 5 + 5]),
    ("imb", "--imb 2", "labeled", [20, 14, 10]),
    ("imb", "--imb 2", "unlabeled", [20 + 10, 14 + 7, 10 + 5]),
    ("shift", "--shift uniform", "unlabeled", [20 + 10, 10 + 10, 5 + 10]),
    ("shift", "--shift reversed", "unlabeled", [20 + 2, 10 + 5, 5 + 10]),
    ("imb_u", "--imb-u 0.5", "unlabeled", [20 + 5, 10 + 7, 5 + 10]),
    ("labeled_fraction", "--labeled-fraction 0.25", "labeled", [10, 10, 10]),
    ("labeled_fraction", "--labeled-fraction 0.25", "unlabeled", [40, 40, 40]),
    ("image_size", "--image-size 12", "seen", [12, 12, torch.float32]),
    ("method", "--method fixmatch", "losses", {"loss_s", "loss_u"}),
    ("method", "--method supervised", "losses", {"loss_s"}),
    ("method", "--method supervised", "sizes", [4, 4, 0, 0, 4]),
    ("alpha_min", "--alpha-min 0.5", "alpha", 1 - 0.5 / 4),
    ("alpha_min", "--alpha-min 0.5", "alpha in the log", 1 - 0.5 / 4),
    ("d", "--d 1", "alpha", 1 - 0.9 / 2),
    ("d", "--d 1", "alpha in the log", 1 - 0.9 / 2),
    ("threshold", "--threshold 0.65", "mask", 1),
    ("warmup_steps", "--warmup-steps 50", "ccr", [False, True, True]),
    ("prior_momentum", "--prior-momentum 0.5", "q_hat", [(1 / 3 + q) / 2 for q in (0.7, 0.2, 0.1)]),
    ("model", "--model wrn-16-2", "network", (13, 128)),
    ("steps", "--steps 3", "length", 3),
    ("batch_size", "--batch-size 5", "sizes", [5, 5, 10, 10, 15]),
    ("mu", "--mu 3", "sizes", [4, 4, 12, 12, 16]),
    ("lr", "--lr 0.3", "rate", 10 * RATE),
    ("weight_decay", "--weight-decay 0.1", "decay", 0.1),
    ("ema", "--ema 0.75", "average", 0.75),
    ("bn_momentum", "--bn-momentum 0.2", "norms", {0.2}),
    ("eval_every", "--eval-every 2", "evaluations", [2, 4]),
    ("seed", "--seed 1", "directory", "runs/folder-adello-consistent-imb4-s1"),  # see test_seeds.py
    ("device", "--device cuda", "device", {"cuda"}),
    ("precision", "--precision bf16", "seen", [8, 8, torch.bfloat16]),
    ("precision", "--precision fp16", "seen", [8, 8, torch.float16]),
    ("compile", "--compile on", "compilations", 1),
    ("out", "--out here", "files", ["here/config.json", "here/result.json"]),
    ("variant", "variant", "directory", "runs/folder-mine-consistent-imb4-s0")]

IN_PLACE_OF = {"--imb-u": ["--shift"], "--labeled-fraction": ["--shift", "--n1", "--m1", "--imb"],
               "--dataset": ["--shift", "--data-dir"]}


def spoken(option, places):
    """A row's words after those that all rows share."""
    words = option.split()
    gone = IN_PLACE_OF.get(words[0] if words else None, [])
    base = [word for before, word in zip([None, *BASE], BASE) if word not in gone and before not in gone]
    return [places.get(word, word) for word in base + words]


def close(found, expected):
    if isinstance(expected, list) and isinstance(expected[0], float):
        return found == pytest.approx(expected, rel=1e-5)
    number = isinstance(expected, (int, float)) and not isinstance(expected, bool)
    return found == (pytest.approx(expected, rel=2e-3) if number else expected)


def test_every_setting_has_a_row():
    assert {name for name, *_ in ROWS} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_to_be_seen_without_an_option(look, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find, expected = LOOKS[look]
    assert close(find(spoken("", places)), expected)


@pytest.mark.parametrize("name, option, look, expected", ROWS, ids=[f"{row[1]}, {row[2]}" for row in ROWS])
def test_an_option_does_what_it_says(name, option, look, expected, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find, default = LOOKS[look]
    assert not close(expected, default) and close(find(spoken(option, places)), expected)


@pytest.mark.parametrize("name, option", dict((row[:2] for row in ROWS if row[0] != "variant")).items())
def test_an_option_sets_its_own_field_alone(name, option, places):
    """But for what stands in place of another and for what a data set's preset brings."""
    before = dataclasses.asdict(parse(*spoken("", places)))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if "cuda" in option:
            stack.enter_context(fake_cuda.gpu(patch))
        after = dataclasses.asdict(parse(*spoken(option, places)))
    follows = {"dataset": {"data_dir", "shift", "warmup_steps", "prior_momentum", "lr", "ema", "bn_momentum",
                           "eval_every"}, "labeled_fraction": {"n1", "m1", "imb", "shift"}, "imb_u": {"shift"},
               "steps": {"warmup_steps"}}
    differs = {key for key in before if before[key] != after[key]}
    assert name in differs and differs <= {name, "out"} | follows.get(name, set())


def test_the_averaged_network_is_the_one_that_is_tested(places):
    """Negative log-likelihood of three classes with two test images each: the mean of -log p over the classes."""
    run = run_of([*spoken("--lr 0.5 --ema 0.75", places), "--steps", 4], model=Logits())
    result = train.train(run, None)
    learned, averaged = (-network.logits.detach().double().log_softmax(0).mean().item()
                         for network in (run.model, run.ema.model))
    assert result["nll"] == pytest.approx(averaged, abs=1e-6) and abs(averaged - learned) > 0.01


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        if field.name != "variant":
            option = "--" + field.name.replace("_", "-")
            assert re.search(rf" {option} (?!--)[^()]*\({re.escape(str(field.default))}\)", text), option
    assert "--fresh" in text


# ----------------------------------------------------------------------------------------- whose run is this

FREE = {"out", "device", "compile", "data_dir"}  # a published data set's place; a folder's own is tested elsewhere
VALUES = {field.name: "another" if isinstance(field.default, str) else 7 for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", VALUES)
def test_another_value_of_a_setting_is_another_run_unless_it_is_free(name):
    """In both directions: so that a value that is not in use is no value that agrees with all."""
    one = Config()
    other = dataclasses.replace(one, **{name: VALUES[name]})
    for held, asked in ((one, other), (other, one)):
        if name in FREE:
            train.compare(dataclasses.asdict(held), dataclasses.asdict(asked), {})
            continue
        values = f"--{name.replace('_', '-')} {getattr(held, name)}, not {getattr(asked, name)}"
        with pytest.raises(ValueError, match=re.escape(values)):
            train.compare(dataclasses.asdict(held), dataclasses.asdict(asked), {})


@pytest.mark.parametrize("name", VALUES)
def test_runs_that_differ_in_a_setting_are_two_rows_unless_it_is_free(name, tmp_path, capsys):
    """Seeds make one row, and so do runs that differ in what makes no other run."""
    for seed, changes in enumerate(({}, {name: VALUES[name]})):
        made_up_run(tmp_path / f"run-s{seed}", **dataclasses.asdict(Config(seed=seed)) | changes)
    assert evaluate.main([str(tmp_path / "run-s*")]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]
    assert len(table) == (1 if name in FREE | {"seed"} else 2)

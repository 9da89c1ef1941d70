"""Random settings: each either trains two steps to finite numbers or ends in one line."""

import io
import json
import math
import random
from contextlib import redirect_stderr, redirect_stdout

import pytest

import train


def random_arguments(seed, folder):
    """A command line: sensible values, their edges, and one value in twenty beyond them."""
    draw = random.Random(seed)
    options = {  # name: (how often, values, values beyond)
        "--n1": (1, [4, 5, 12, 20], [0, 1, 41]), "--m1": (1, [4, 10, 20], [-1, 1, 60]), "--imb": (1, [1, 1.5, 4], [0.5, 1e6]),
        "--shift": (0.5, ["consistent", "uniform", "reversed"], ["none"]), "--imb-u": (0.1, [0.01, 0.5, 3, 100], [0]),
        "--method": (0.8, [*train.METHODS], ["cosSL"]), "--alpha-min": (0.3, [0, 0.1, 1], [1.1]),
        "--d": (0.3, [0.01, 1, 2, 50], [0]), "--threshold": (0.3, [0, 0.4, 0.95, 1], [2]),
        "--warmup-steps": (0.4, [0, 1, 2], [3]), "--prior-momentum": (0.3, [0, 0.5, 0.999], [1]),
        "--model": (1, ["wrn-10-1", "wrn-10-1", "wrn-16-1"], ["wrn-11-1"]), "--image-size": (1, [8, 9, 13, 16, 20], [7]),
        "--batch-size": (0.8, [1, 2, 7, 16, 50], [0]), "--mu": (0.3, [1, 2, 5], [0]),
        "--lr": (0.6, [1e-12, 0.03, 1, 1e4], [math.nan, 1e30]), "--weight-decay": (0.2, [0, 5e-4, 10], [-1]),
        "--ema": (0.3, [0, 0.9, 0.9999], [1]), "--bn-momentum": (0.3, [1e-6, 0.1, 1], [0]),
        "--seed": (0.3, [0, 1, 2 ** 31], [-1]), "--eval-every": (0.4, [1, 2, 100], [0]),
        "--precision": (0.1, ["auto", "fp32"], ["fp64"])}
    chosen = {name: draw.choice(beyond if draw.random() < 0.05 else values)
              for name, (often, values, beyond) in options.items() if draw.random() < often}
    if draw.random() < 0.15:
        chosen = {k: v for k, v in chosen.items() if k not in ("--n1", "--m1", "--imb", "--shift", "--imb-u")}
        chosen["--labeled-fraction"] = draw.choice([0.01, 0.1, 0.5, 0.99])
    return ["--dataset", "folder", "--data-dir", str(folder), "--steps", "2", "--out", f"run{seed}",
            *(str(part) for pair in chosen.items() for part in pair)]


def check(seed, folder, directory):
    """Run one setting in the current directory. Returns "trained", "refused" or "stopped"."""
    arguments = random_arguments(seed, folder)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = train.main(arguments)
        except SystemExit as stop:
            status = stop.code
    told = err.getvalue().splitlines()
    command = " ".join(arguments)
    if status == 0:
        result = json.loads((directory / f"run{seed}" / "result.json").read_text())
        assert result["step"] == 2 and math.isfinite(result["nll"]) and 0 <= result["ece"] <= 1, command
        assert abs(sum(result["q_hat"]) - 1) < 1e-4 and min(result["q_hat"]) >= 0, command
        return "trained"
    assert status in (1, 2) and len(told) == 1 and told[0].startswith("error: "), (command, told)
    assert status == 2 or "finite" in told[0], (command, told)
    return "refused" if status == 2 else "stopped"


@pytest.mark.parametrize("block", range(8))
def test_random_settings_train_or_end_in_one_line(block, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = [check(seed, image_folder, tmp_path) for seed in range(25 * block, 25 * block + 25)]
    assert "trained" in seen and "refused" in seen

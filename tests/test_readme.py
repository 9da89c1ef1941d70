"""README.md: its program runs as printed, and its commands are understood."""

import re
import shlex

import pytest
import torch

import train
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_lines_that_use_a_network_run_as_printed_and_follow_bayes_rule(tmp_path, monkeypatch):
    """p(y | x) in another world is proportional to the balanced one times that world's frequencies."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--steps", "2", "--eval-every", "2"]) == 0
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(program, names)
    weighted = names["balanced"] * names["world"]
    torch.testing.assert_close(names["probabilities"], weighted / weighted.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert names["probabilities"].shape == (10, 10) and names["world"].sum().item() == pytest.approx(1)


def test_every_training_that_is_printed_is_understood():
    """In a line of a block, up to its comment, or between backticks, where it may go on in the next line."""
    found = re.findall(r"^python train\.py(.*)$", README, re.MULTILINE)
    found += re.findall(r"`[^`]*?python\s+train\.py([^`;]*)[^`]*`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    assert len(found) > 10
    for command in found:
        train.parse(shlex.split(re.sub(r"\$\w+", "1", command), comments=True))

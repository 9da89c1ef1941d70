"""--compile on: what is compiled is one function, from bytes to logits, as one graph, once in a training.

The backend here runs the graph as it was captured. So it is PyTorch's tracing that is tested, which is the same on
CUDA; the kernels that its compiler makes are not.
"""

import functools

import pytest
import torch
import torch._dynamo

import data
import train
from conftest import small_sets

pytestmark = pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile is not made for this")

SETTINGS = dict(dataset="shapes", model="wrn-10-1", image_size=16, batch_size=4, steps=5, warmup_steps=2, eval_every=2,
                device="cpu", precision="bf16", compile="on")


@pytest.fixture
def graphs(monkeypatch):
    """A list that gets every graph that is compiled while the test runs."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["adello", "supervised"])
def test_a_training_compiles_one_graph_in_its_first_step_and_a_second_run_none(method, graphs, monkeypatch):
    """The strong view, which takes long to trace, is a weak one here; the test below has the whole."""
    monkeypatch.setattr(data, "strong", lambda images, draws: data.weak(images, draws[:, :3]))
    compiled = []

    class Counting(train.Run):
        def step(self, *batch):
            found = super().step(*batch)
            compiled.append(len(graphs))
            return found
    for seed in (0, 1):
        train.train(Counting(train.Config(method=method, seed=seed, **SETTINGS), small_sets()), None)
    assert compiled == [1] * 10  # CCR starts in the third step, evaluations come between


def test_the_graph_gives_the_logits_of_the_plain_function(graphs):
    run = train.Run(train.Config(**SETTINGS), small_sets())
    labeled, _, unlabeled, _, draws = run.batch()
    logits = run.forward(labeled, unlabeled, draws)
    assert len(graphs) == 1
    assert torch.equal(logits, train.Run.forward(run, labeled, unlabeled, draws))

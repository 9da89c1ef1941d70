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


@pytest.fixture(scope="module")
def sets():
    images, labels = data.shapes(per_class=2, seed=0)
    statistics = torch.tensor(data.STATISTICS["shapes"]).view(2, 3, 1, 1)
    return data.Data(images, labels, images, labels, images, labels, list(data.SHAPES), *statistics)


@pytest.mark.parametrize("method", ["adello", "fixmatch", "supervised"])
def test_a_training_compiles_one_graph_in_its_first_step_and_none_later(method, sets, graphs):
    run = train.setup(train.Config(method=method, **SETTINGS), sets)
    compiled = []

    def step(run, *batch):
        found = train.train_step(run, *batch)
        compiled.append(len(graphs))
        return found
    train.train(run, None, step)
    assert compiled == [1] * 5  # CCR starts in the third step, evaluations come between


def test_the_graph_gives_the_logits_of_the_plain_function(sets, graphs):
    run = train.setup(train.Config(**SETTINGS), sets)
    labeled, _, unlabeled, _, draws = train.batch(run)
    logits = run.forward(labeled, unlabeled, draws)
    assert len(graphs) == 1
    assert torch.equal(logits, train.forward(run, labeled, unlabeled, draws))

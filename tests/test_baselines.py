"""baselines.py: each method's equations, runs that continue to the bit, what is done to a finished run."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baselines
import data
import evaluate
import models
import results
import train
from conftest import assert_same, contents, saved, sealed, small_run, stopping_after
from methods import abc, cossl, crest, darp, debiaspl, fixmatch, posthoc

DRAW = torch.Generator().manual_seed(0)
WORDS = "--precision fp32 --device cpu --threshold 0.4".split()  # some predictions reach it


@pytest.fixture(scope="module")
def made(image_folder, tmp_path_factory):
    """`fixmatch-s0`, a finished run, and `crest`, a CReST+ run of two generations."""
    root = tmp_path_factory.mktemp("made")
    words = [*small_run(image_folder), *WORDS, "--out"]
    assert train.main([*words, str(root / "fixmatch-s0"), "--method", "fixmatch"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crest, "GENERATIONS", 2)
        assert baselines.main(["crest", *words, str(root / "crest")]) == 0
    return root


@pytest.fixture
def finished(made, tmp_path, monkeypatch):
    """The directory of the FixMatch run."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made / "fixmatch-s0", Path("runs/fixmatch-s0"))


@pytest.fixture
def two_generations(made, tmp_path, monkeypatch):
    """The directory of the CReST+ run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crest, "GENERATIONS", 2)
    return shutil.copytree(made / "crest", tmp_path / "crest")


@pytest.fixture
def options(options):
    return [*options, *WORDS]


def config_of(options):
    return train.parse([*options, "--method", "fixmatch"])[0]


def restored(directory):
    """A finished run."""
    return posthoc.restored(directory, "cpu", baselines.kind_of)[0]


def logits_of(network, sets):
    return evaluate.predict(network, sets.test, sets.mean, sets.std)


def nll_of(logits, sets):
    return pytest.approx(F.cross_entropy(logits, sets.test_labels).item())


def applied(name, directory):
    """Whether crt or la could be applied to a run."""
    return baselines.main([name, str(directory), "--device", "cpu"]) == 0


def network_of(directory):
    """The EMA network of a run's checkpoint."""
    model = models.build("wrn-10-1", 3).eval()
    model.load_state_dict(train.read_checkpoint(Path(directory) / "checkpoint.pt")["ema"])
    return model


# -------------------------------------------------------------------------------------------- DARP

def predictions(counts, sharpness=3.0):
    """Predictions of a set with these class counts that lean to its labels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    logits = torch.randn(len(labels), len(counts), generator=DRAW) + sharpness * torch.eye(len(counts))[labels]
    return logits.softmax(1)


@pytest.mark.parametrize("counts", [[100, 60, 40], [10, 50, 140], [66, 67, 67]])
def test_refined_rows_sum_to_one_and_columns_to_the_target_counts(counts):
    refined = darp.refine(predictions([80, 70, 50]), torch.tensor(counts))
    torch.testing.assert_close(refined.sum(1), torch.ones(200), atol=1e-5, rtol=0)
    torch.testing.assert_close(refined.sum(0), torch.tensor(counts).float(), atol=0, rtol=1e-3)


def test_a_matrix_that_fits_already_stays_nearly_as_it_is():
    probs = predictions([80, 70, 50], sharpness=12.0)
    assert (darp.refine(probs, probs.sum(0)) - probs).abs().max() < 0.02


def test_rows_of_equal_doubt_keep_their_order_within_a_column():
    p = torch.linspace(0.05, 0.45, 40)
    probs = torch.cat([torch.stack([p, 1 - p], 1), torch.stack([1 - p, p], 1)])
    refined = darp.refine(probs, torch.tensor([50, 30]), alpha=10.0)
    assert (refined[:40, 0].diff() >= -1e-6).all()
    assert (refined[40:, 0].diff() <= 1e-6).all()


def test_a_class_without_images_gets_none():
    refined = darp.refine(predictions([80, 70, 50]), torch.tensor([120, 80, 0]))
    assert refined.isfinite().all()
    assert refined[:, 2].sum() < 0.5


def test_darp_keeps_the_last_prediction_of_every_image_of_a_step(options):
    run = darp.DARP(config_of(options))
    kept = run.estimator.kept
    for run.t in range(6):
        before = kept.clone()
        run.step(*run.batch())
        changed = (kept != before).any(dim=1).nonzero().squeeze(1).tolist()
        assert changed == data.batch_indices(70, 16, run.t, 0, "unlabeled").unique().tolist()
    assert len(kept) == 70


# ------------------------------------------------------------------------------------------ CReST+

@pytest.mark.parametrize("t, expected", [(1.0, [0.6, 0.3, 0.1]), (0.0, [1 / 3, 1 / 3, 1 / 3])])
def test_alignment_at_t_1_gives_the_labeled_prior_and_at_t_0_the_uniform_one(t, expected):
    running = torch.tensor([0.2, 0.5, 0.3])
    aligned = crest.align(running.expand(4, 3), torch.tensor([0.6, 0.3, 0.1]), running, t)
    torch.testing.assert_close(aligned.mean(0), torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_rarest_class_gives_all_and_the_largest_gamma_to_the_minus_third():
    rates = crest.sampling_rates(torch.tensor([30, 100, 1, 10])).tolist()
    assert rates == pytest.approx([100 ** (-2 / 9), 100 ** (-1 / 3), 1, 100 ** (-1 / 9)])


def test_the_most_confident_of_each_class_are_taken():
    probs = torch.tensor([[.9, .1], [.6, .4], [.7, .3], [.8, .2], [.2, .8], [.4, .6]])
    index, labels = crest.most_confident(probs, torch.tensor([8, 1]))  # rates 1/2 and 1
    assert index.tolist() == [0, 3, 4, 5]
    assert labels.tolist() == [0, 0, 1, 1]


def test_the_next_generation_holds_the_first_labeled_set_and_confident_images(two_generations, options):
    config = config_of(options)
    first = crest.CReST(config).sets
    second = crest.CReST(config, two_generations / "generation0").sets
    assert len(first.labels) == 35 and len(first.unlabeled) == 35  # U without L
    assert torch.equal(second.labeled[:35], first.labeled)
    assert torch.equal(second.labels[:35], first.labels)
    network = network_of(two_generations / "generation0")
    predicted = evaluate.predict(network, second.labeled[35:], first.mean, first.std)
    assert len(predicted) > 0
    assert torch.equal(predicted.argmax(1), second.labels[35:])


def test_a_stopped_crest_goes_on_from_its_last_generation(two_generations, options):
    whole = train.read_checkpoint(two_generations / "checkpoint.pt")
    for name in ("result.json", "checkpoint.pt", "config.json", "log.csv"):
        (two_generations / name).unlink()  # as after a kill before the first save of the last generation
    first = (two_generations / "generation0/checkpoint.pt").read_bytes()
    assert baselines.main(["crest", *options, "--out", "crest"]) == 0
    assert (two_generations / "generation0/checkpoint.pt").read_bytes() == first
    assert_same(train.read_checkpoint(two_generations / "checkpoint.pt"), whole)


# ------------------------------------------------------------------------------------- CoSSL and cRT

def enhanced():
    """features, their enhancement, labels 0 and 1 in turn, others: class 1 is a fifth of class 0."""
    features = torch.randn(400, 5, generator=DRAW).requires_grad_()
    others = torch.randn(400, 5, generator=DRAW)
    labels = torch.arange(400) % 2
    draws = torch.rand(400, 2, generator=DRAW)
    return features, cossl.enhance(features, labels, others, torch.tensor([100, 20]), draws), labels, others


def test_a_fifth_of_the_largest_class_is_enhanced_in_four_of_five_cases_by_at_most_two_fifths():
    features, mixed, labels, others = enhanced()
    assert not mixed.requires_grad  # no gradient reaches the features
    assert torch.equal(mixed[labels == 0], features[labels == 0])  # the largest
    changed = (mixed != features).any(1)
    assert changed[labels == 1].float().mean().item() == pytest.approx(0.8, abs=0.08)
    lam = ((mixed - others) / (features - others)).mean(1)[changed]
    assert lam.min() >= 0.599 and lam.max() <= 1.001


def test_classes_are_drawn_equally_often():
    """Chi-square with two degrees of freedom: 13.8 has probability 0.001."""
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2)
    index = fixmatch.balanced(labels, torch.bincount(labels), 3000, torch.Generator().manual_seed(1))
    drawn = torch.bincount(labels[index])
    assert ((drawn - 1000.0) ** 2 / 1000).sum() < 13.8


def test_cossl_evaluates_the_second_layer_on_the_features_of_the_ema_network(options):
    run = cossl.CoSSL(config_of(options))
    train.train(run, None)
    assert not torch.equal(run.second.weight, run.model.linear.weight)  # it has learned: 4 of 6 steps are the warm-up
    images = data.normalize(run.sets.test, run.sets.mean, run.sets.std)
    logits = run.second(fixmatch.features(run.ema.model, images)).detach()
    torch.testing.assert_close(logits_of(run.evaluated, run.sets), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, dimension", [("wrn-10-1", 64), ("resnet50", 2048)])
def test_features_are_what_the_last_layer_gets(name, dimension):
    model = models.build(name, 3).eval()
    images = torch.zeros(2, 3, 16, 16)
    features = fixmatch.features(model, images)
    assert features.shape == (2, dimension)
    torch.testing.assert_close(fixmatch.last(model)[1](features), model(images))


# ------------------------------------------------------------------------------------------ DebiasPL

def one_step(kind, config):
    """A run after its first step, and what the step returned."""
    run = kind(config)
    return run, run.step(*run.batch())


def test_debiaspl_at_a_uniform_estimate_is_fixmatch(options):
    config = config_of([*options, "--prior-momentum", str(1 - 1e-9), "--threshold", "0.34"])
    plain, expected = one_step(train.Run, config)
    run, found = one_step(debiaspl.DebiasPL, config)
    assert expected["mask_rate"] > 0
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run.model.state_dict(), plain.model.state_dict())


def test_pseudo_labels_take_the_estimate_with_this_steps_predictions_and_the_loss_the_one_before(options):
    """Momentum 0: uniform before, which leaves the loss without a margin; the mean prediction after."""
    config = config_of([*options, "--prior-momentum", "0"])
    run, found = one_step(debiaspl.DebiasPL, config)
    fresh = train.Run(config)
    labeled, _, unlabeled, _, draws = fresh.batch()
    _, logits_weak, logits_strong = fixmatch.forward(fresh, labeled, unlabeled, draws)
    probs = logits_weak.softmax(1)
    debiased = probs / probs.mean(0).sqrt()
    confidence, pseudo_labels = (debiased / debiased.sum(1, keepdim=True)).max(1)
    losses = F.cross_entropy(logits_strong, pseudo_labels, reduction="none")
    assert found["loss_u"].item() == pytest.approx((losses * (confidence >= 0.4)).mean().item(), rel=1e-4)
    assert found["loss_u"] > 0


def test_the_margin_on_the_strong_view_is_the_estimate_to_the_power_of_two_fifths():
    """Equal logits, pseudo-label 1 of estimate 0.1: its share is 0.1^0.4 of the sum."""
    loss = debiaspl.marginal_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.ones(1),
                                  torch.tensor([0.9, 0.1]))
    assert loss.item() == pytest.approx(-math.log(0.1 ** 0.4 / (0.9 ** 0.4 + 0.1 ** 0.4)), rel=1e-5)


# ----------------------------------------------------------------------------------------------- ABC

@pytest.mark.parametrize("progress, expected", [(0.0, 1.0), (0.5, 0.55), (1.0, 0.1)])
def test_abcs_unlabeled_mask_falls_from_all_to_the_labeled_one(progress, expected):
    """A class ten times the smallest: 1 - t / T_max (1 - 1 / 10) of evenly spread draws are kept."""
    draws = (torch.arange(1000) + 0.5) / 1000
    kept = abc.kept(torch.zeros(1000, dtype=torch.long), torch.tensor([50, 5]), progress, draws)
    assert kept.mean().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pseudo_label, share", [(0, 1 - 0.5 * 0.75), (1, 1 - 0.5 * 0.5), (2, 1.0)])
def test_an_unlabeled_image_is_kept_as_its_pseudo_label_of_the_second_head_says(pseudo_label, share):
    """Halfway, of 20, 10 and 5 labeled images; 1,000 equal strong logits cost log 3 each, the labeled ones nothing."""
    sure = 100 * torch.eye(3)
    draws = torch.cat([torch.zeros(3), (torch.arange(1000) + 0.5) / 1000])
    loss = abc.auxiliary_loss(sure, sure[[pseudo_label] * 1000], torch.zeros(1000, 3), torch.arange(3), 0.95,
                                        torch.tensor([20, 10, 5]), 0.5, draws)
    assert loss.item() == pytest.approx(share * math.log(3), rel=1e-5)


@pytest.mark.parametrize("step, all_kept", [(0, True), (6, False)])
def test_abc_keeps_all_unlabeled_images_in_the_first_step_and_fewer_in_the_last(step, all_kept, options):
    """g says class 0 with probability e^0.2 / (e^0.2 + 2) of every image, the labeled ones add to the loss."""
    run = abc.ABC(config_of([*options, "--threshold", "0.3"]))
    with torch.no_grad():
        run.model.linear.weight[3:] = 0
        run.model.linear.bias[3:] = torch.tensor([0.2, 0.0, 0.0])
    run.t = step
    loss = run.step(*run.batch())["loss_abc"]
    assert (loss >= math.log(1 + 2 * math.exp(-0.2)) - 1e-5) == all_kept


def test_abcs_first_head_starts_as_fixmatch_and_the_seconds_gradient_reaches_the_features(options):
    config = config_of(options)
    plain, expected = one_step(train.Run, config)
    run, found = one_step(abc.ABC, config)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert found["loss_abc"] > 0
    before = train.Run(config).model.stem.weight
    update = plain.model.stem.weight - before
    assert (run.model.stem.weight - before - update).norm() > 0.1 * update.norm()


def test_abcs_loss_without_imbalance_at_the_first_step_is_fixmatchs_of_the_second_head(options):
    """N_min = N_y and t = 0: every image is kept."""
    config = config_of([*options, "--imb", "1"])
    _, found = one_step(abc.ABC, config)
    fresh = abc.ABC(config)
    labeled, labels, unlabeled, _, draws = fresh.batch()
    g_labeled, g_weak, g_strong = (f[:, 3:] for f in fixmatch.forward(fresh, labeled, unlabeled, draws))
    confidence, pseudo_labels = g_weak.softmax(1).max(1)
    losses = F.cross_entropy(g_strong, pseudo_labels, reduction="none") * (confidence >= 0.4)
    expected = F.cross_entropy(g_labeled, labels) + losses.mean()
    assert losses.sum() > 0
    assert found["loss_abc"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_abc_evaluates_the_second_head(options):
    run = abc.ABC(config_of(options))
    bias = run.ema.model.linear.bias.data
    bias[0] = 100.0  # class 0 of f
    bias[3 + 1] = 50.0  # class 1 of g
    logits = logits_of(run.evaluated, run.sets)
    assert logits.shape == (30, 3)
    assert (logits.argmax(1) == 1).all()


# ------------------------------------------------------------------------------------------ the runs

@pytest.mark.parametrize("name", baselines.TRAINED)
def test_a_stopped_run_goes_on_to_the_bit(name, options, tmp_path):
    """DARP refines before the second of four steps, CoSSL's second layer learns in the last."""
    kind = baselines.TRAINED[name]
    options = [*options, "--steps", "4", "--eval-every", "1", "--method", "fixmatch", "--out"]
    assert train.main([*options, "whole"], kind, name) == 0
    assert train.main([*options, "part"], stopping_after(3, kind), name) == 130
    state = train.read_checkpoint(tmp_path / "part/checkpoint.pt")
    assert state["t"] == 3
    assert train.main([*options, "part"], kind, name) == 0
    assert_same(*(train.read_checkpoint(tmp_path / out / "checkpoint.pt") for out in ("part", "whole")))


def test_a_run_has_a_directory_of_its_name_and_the_table_reads_it(options, capsys):
    assert baselines.main(["darp", *options]) == 0
    run = results.logged("runs/folder-darp-consistent-imb4-s0")
    assert (run.config["variant"], run.config["method"]) == ("darp", "fixmatch")
    assert [row["step"] for row in run.log] == [3, 6]
    assert "| folder-darp-consistent-imb4 | 1 |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ on a finished run

def test_crt_leaves_the_run_and_its_features_as_they_are_and_has_the_figures_of_its_network(finished):
    before = contents(finished)
    assert applied("crt", finished)
    assert contents(finished) == before
    old, new = network_of(finished), network_of("runs/fixmatch+crt-s0")
    differing = [name for name, weight in old.state_dict().items() if not torch.equal(weight, new.state_dict()[name])]
    assert differing == ["linear.weight", "linear.bias"]
    sets = restored(finished).sets
    assert evaluate.read_run("runs/fixmatch+crt-s0").result["nll"] == nll_of(logits_of(new, sets), sets)


def test_la_divides_the_likelihood_by_the_labeled_prior(finished):
    assert applied("la", finished)
    sets = restored(finished).sets
    posterior = logits_of(network_of(finished), sets).softmax(1)
    likelihood = posterior / torch.tensor([20, 10, 5])  # of the labeled classes, N1 20 and gamma 4
    expected = [(likelihood[sets.test_labels == k].argmax(1) == k).double().mean().item() for k in range(3)]
    run = results.logged("runs/fixmatch+la-s0")
    assert run.result["per_class_accuracy"] == expected
    assert run.log[-1]["balanced_accuracy"] == pytest.approx(sum(expected) / 3)


def test_each_is_a_row_of_its_own_in_the_table_and_takes_no_further_method(finished, capsys):
    assert applied("crt", finished) and applied("la", finished)
    capsys.readouterr()
    assert evaluate.main(["runs/*"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert [line.split(" | ")[0] for line in lines] == ["| fixmatch+crt", "| fixmatch+la", "| fixmatch"]
    assert not applied("la", "runs/fixmatch+crt-s0")
    assert "is a run of fixmatch+crt" in capsys.readouterr().err


@pytest.mark.parametrize("directory, base, expected", [
    ("runs/shapes-darp-reversed-imb50-s0", "darp", "runs/shapes-darp+la-reversed-imb50-s0"),
    ("kd/kdtree-kd-s0", "kd", "kd/kdtree-kd+la-s0"), ("fixmatch/run/", "fixmatch", "fixmatch/run+la")])
def test_the_new_name_stands_at_the_methods_place_in_the_last_part_of_the_path(directory, base, expected):
    assert posthoc.place(directory, base, "la") == Path(expected)


def test_la_takes_the_network_that_the_method_evaluates(options):
    """ABC: the second head."""
    assert baselines.main(["abc", *options, "--steps", "2", "--out", "abc"]) == 0 and applied("la", "abc")
    run = restored("abc")
    logits = logits_of(run.ema.model, run.sets)[:, 3:] - torch.tensor([20 / 35, 10 / 35, 5 / 35]).log()
    assert evaluate.read_run("abc+la").result["nll"] == nll_of(logits, run.sets)


def test_crt_on_crest_learns_from_true_labels_alone(two_generations):
    run = restored(two_generations)
    assert len(run.sets.labels) > 35
    run.sets.labels[35:] = 99  # no class: a pseudo-label would be an error
    posthoc.crt(run)


def test_la_on_crest_takes_the_prior_of_the_enlarged_labeled_set(two_generations):
    assert applied("la", "crest")
    sets = restored(two_generations).sets
    prior = torch.bincount(sets.labels) / len(sets.labels)
    logits = logits_of(network_of(two_generations), sets) - prior.log()
    assert evaluate.read_run("crest+la").result["nll"] == nll_of(logits, sets)


@pytest.mark.parametrize("arguments, reason", [
    ([], "no method ''"), (["remixmatch"], "no method 'remixmatch'"),
    (["darp", "--method", "adello"], "--method cannot be used with darp"),
    (["crest", "--method=kd"], "--method cannot be used with crest"), (["darp", "--method"], "--method"),
    (["darp", "--steps", "0"], "--steps 0"),
    (["crt"], "the directory of a finished run"), (["crt", "absent"], "absent"), (["la", "a", "b"], "the directory")])
def test_a_mistake_is_one_line_and_status_2(arguments, reason, tmp_path, monkeypatch, one_line):
    monkeypatch.chdir(tmp_path)
    assert baselines.main(arguments) == 2
    one_line(reason)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, reason", [
    ("config.json", "holds results, no checkpoint"), ("checkpoint.pt", "holds another run")])
def test_what_is_in_the_way_is_not_written_over(name, reason, finished, one_line):
    """A file of somebody else, and the checkpoint of another run."""
    place = Path("runs/fixmatch+la-s0")
    place.mkdir()
    shutil.copy(finished / name, place)
    assert not applied("la", finished)
    one_line(reason)
    assert (place / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_whose_images_have_moved_is_told_where(finished, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "moved")
    run, _ = posthoc.restored(finished, "cpu", baselines.kind_of, str(tmp_path / "moved"))
    assert run.config.data_dir == str(tmp_path / "moved")


@pytest.mark.parametrize("change, reason", [
    (lambda state: state["config"].update(unheard_of=1), "another code"),
    (lambda state: state.pop("ema"), "no run's checkpoint"), (lambda state: state["model"].popitem(), "another code"),
    (lambda state: state.pop("rows"), "no run's checkpoint"), (lambda state: state.update(config=5), "another code"),
    (lambda state: state.update(result=None), "no checkpoint of a finished run")])
def test_a_checkpoint_of_another_code_or_of_a_run_that_is_not_finished_is_one_line(change, reason, finished, one_line):
    state = train.read_checkpoint(finished / "checkpoint.pt")
    change(state)
    (finished / "checkpoint.pt").write_bytes(sealed(saved(state)))
    assert not applied("la", finished)
    one_line(reason)

"""The other methods of the paper's table, each as a change of the FixMatch run.

    python tests/baselines.py darp --seed 0       # cossl, or crest with --generations 6; further options are train.py's
    python tests/baselines.py crt runs/shapes-darp-reversed-imb50-s0     # a new classifier on a finished run
    python tests/baselines.py la runs/shapes-fixmatch-reversed-imb50-s0  # argmax f - log P_L
"""

import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import ablations
import data
import evaluate
import models
import train
from losses import confidence_mask, consistency_loss


def refine(probs, counts, alpha=2.0, rounds=200):
    """DARP (Kim et al. 2020): the matrix near probs (N, K) with row sums 1, column sums counts (K,). Of column k the
    alpha N_k largest entries are kept, scaled to the sum N_k, rows normalised: A, of row entropies h_u. Then

        A_uk / e X_u exp(-nu_k h_u):  X from the row sums, nu_k by bounded Newton on the log of the column sum, in turn
    """
    probs, counts = probs.double(), counts.double().clamp(min=1e-6)
    place = probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    kept = torch.where(place < alpha * counts, probs, 0.0)
    A = F.normalize((kept + 1e-6) * (counts + 1e-6) / (kept.sum(0) + 1e-6), p=1, dim=1)
    h = torch.special.entr(A).sum(1, keepdim=True).clamp(min=1e-3)
    log_A, nu = A.log() - 1, torch.zeros_like(counts)
    for _ in range(rounds):
        log_X = -torch.logsumexp(log_A - nu * h, dim=1, keepdim=True)
        for _ in range(30):
            logs = log_A + log_X - nu * h
            excess = torch.logsumexp(logs, dim=0) - counts.log()
            if excess.abs().max() < 1e-3:
                break
            nu = nu + (excess / (logs.softmax(dim=0) * h).sum(0)).clamp(-10, 10)
        result = (log_A - nu * h).softmax(dim=1)
        if ((result.sum(0) - counts).abs() / counts.clamp(min=1)).max() < 1e-4:
            break
    return result.float()


def darp(arguments):
    """From two fifths of the steps on (the authors' 200 of 500 epochs), every 10 steps, the last p(u) of all images are
    refined to the counts N P_L. Pseudo-labels come from there, the mask from p(u)."""
    prepare, kept = train.prepare, SimpleNamespace()
    def prepared(s):
        run, kept.s = prepare(s), s
        N, K = len(run.sets.unlabeled), len(run.sets.classes)
        kept.record, kept.counts = run.record, N * run.p_labeled
        run.record.probs = run.record.refined = torch.full((N, K), 1 / K, device=run.device)
        return run
    def loss(logits_strong, probs_weak, mask, *_):
        s, record, labels = kept.s, kept.record, probs_weak
        index = train.batch_indices(len(record.probs), len(mask), record.step, s.seed, 1).to(mask.device)
        record.probs[index] = probs_weak
        if (late := record.step - s.steps * 2 // 5) >= 0:
            record.refined = record.refined if late % 10 else refine(record.probs, kept.counts)
            labels = record.refined[index]
        return consistency_loss(logits_strong, labels, mask, None, None)
    train.prepare, train.consistency_loss = prepared, loss
    return train.main(arguments)


def align(probs, p_labeled, running, t):
    """CReST+ (Wei et al. 2021): p(u) (P_L^t / sum P_L^t + 1e-6) / (running mean of p + 1e-6), normalised."""
    return F.normalize(probs * (F.normalize(p_labeled ** t, p=1, dim=0) + 1e-6) / (running + 1e-6), p=1, dim=1)


def sampling_rates(counts):
    """Share that a class gives, (1/gamma)^((K-1-r)/(K-1)/3), r its place by labeled size counts (K,), 0 = largest."""
    place, K = counts.argsort(descending=True, stable=True).argsort().double(), len(counts)
    return (counts.min() / counts.max()) ** ((K - 1 - place) / (K - 1) / 3)


def most_confident(probs, counts):
    """Of the images predicted as a class, the most confident share `sampling_rates`: (indices, labels)."""
    (confidence, predicted), chosen = probs.max(1), []
    for k, rate in enumerate(sampling_rates(counts).tolist()):
        mine = (predicted == k).nonzero().squeeze(1)
        chosen.append(mine[confidence[mine].argsort(descending=True)][:math.ceil(rate * len(mine) - 1e-9)])
    return torch.cat(chosen), predicted[torch.cat(chosen)]


def crest(arguments):
    """Generations, each but the last a run of its own in <out>/generation<g>. p(u) is aligned with t from 1 to 0.5;
    generation g + 1 adds `most_confident` to the first labeled set."""
    train.SETTINGS["generations"], train.OPTION["generations"] = (6, (1, 100), "generations"), "--generations"
    ablations.unlabeled_alone()  # U without L
    s, prepare, load, kept = train.parse(arguments), train.prepare, data.load, SimpleNamespace()
    def loaded(*rest):
        sets = load(*rest)
        kept.counts = torch.bincount(sets.labels, minlength=len(sets.classes))
        if kept.g == 0:
            return sets
        model = models.build(s.model, len(sets.classes)).eval()
        model.load_state_dict(models.load_checkpoint(Path(s.out) / f"generation{kept.g - 1}/checkpoint.pt")["ema"])
        probs = evaluate.predict(model, sets._replace(test=sets.unlabeled), "cpu").softmax(1)
        index, labels = most_confident(probs, kept.counts)
        return sets._replace(labeled=torch.cat([sets.labeled, sets.unlabeled[index]]),
                             labels=torch.cat([sets.labels, labels]))
    def prepared(s):
        run, t = prepare(s), 1 - 0.5 * kept.g / max(s.generations - 1, 1)
        p_labeled = kept.counts.to(run.device) / kept.counts.sum().item()
        def mask(probs, threshold):
            kept.aligned = align(probs, p_labeled, run.estimator.q_hat, t)
            return confidence_mask(kept.aligned, threshold)
        train.confidence_mask = mask
        return run
    data.load, train.prepare = loaded, prepared
    train.consistency_loss = lambda logits, _, mask, *__: consistency_loss(logits, kept.aligned, mask, None, None)
    for kept.g in range(s.generations):
        part = [f"--out={s.out}/generation{kept.g}"] if kept.g < s.generations - 1 else []
        if status := train.main(arguments + part):
            return status
    return 0


def balanced(labels, size, generator):
    """Indices of images, every class equally probable."""
    return torch.multinomial(1 / torch.bincount(labels).double()[labels], size, True, generator=generator)


def enhance(features, labels, others, counts, draws):
    """CoSSL's (Fan et al. 2022) tail-class feature enhancement: with probability (N_1 - N_k) / N_1 an x of class k
    becomes lam x + (1 - lam) u, lam ~ U(0.6, 1). features x, others u: (B, D); counts: (K,); draws: (B, 2)."""
    mixed, lam = draws[:, :1] < (1 - counts / counts.max())[labels][:, None], 0.6 + 0.4 * draws[:, 1:]
    return torch.where(mixed, lam * features + (1 - lam) * others, features).detach()


def last(model):
    """A network's last layer: its name, WideResNet's `linear` or ResNet's `fc`, and the layer."""
    return [*model.named_children()][-1]


def with_last(model, layer):
    """A copy of the network with another last layer; with the identity it gives the features, (N, D)."""
    model = copy.deepcopy(model)
    setattr(model, last(model)[0], layer)
    return model


def features_of(model, sets, images):
    return with_last(model, torch.nn.Identity())(data.normalize(images, sets.mean, sets.std))


def cossl(arguments):
    """From four fifths of the steps on (the authors' 400 of 500 epochs) a second linear layer learns on features of the
    EMA network, of balanced labeled and of unlabeled images in strong views, and is what is evaluated."""
    prepare, step, predict, kept = train.prepare, train.train_step, evaluate.predict, SimpleNamespace()
    def prepared(s):
        run, kept.s = prepare(s), s
        layer = kept.layer = torch.nn.Linear(last(run.model)[1].in_features, len(run.sets.classes)).to(run.device)
        kept.optimizer = torch.optim.SGD(layer.parameters(), s.lr, momentum=0.9)
        run.parts |= {"second": layer, "second_optimizer": kept.optimizer}
        return run
    def stepped(run, *rest):
        step(run, *rest)
        if run.record.step < kept.s.steps * 4 // 5:
            return kept.layer.load_state_dict(last(run.model)[1].state_dict())
        sets, B, random = run.sets, kept.s.batch_size, torch.Generator()
        random.manual_seed(10 ** 7 * kept.s.seed + run.record.step)
        x, u = balanced(sets.labels.cpu(), B, random), torch.randint(len(sets.unlabeled), (B,), generator=random)
        draws = torch.rand(2 * B, 14, generator=random).to(run.device)
        images = torch.cat([sets.labeled.cpu()[x], sets.unlabeled.cpu()[u]]).to(run.device)
        features = features_of(run.ema.model, sets, data.strong(images, draws=draws[:, :12]))
        labels = sets.labels[x.to(run.device)]
        mixed = enhance(features[:B], labels, features[B:], torch.bincount(sets.labels), draws[:B, 12:])
        kept.optimizer.zero_grad()
        F.cross_entropy(kept.layer(mixed), labels).backward()
        kept.optimizer.step()
    train.prepare, train.train_step = prepared, stepped
    evaluate.predict = lambda model, *rest: predict(with_last(model, kept.layer), *rest)
    return train.main(arguments)


def retrained(run, s):
    """cRT (Kang et al. 2020): the features stay, the linear layer is drawn anew and learns from class-balanced labeled
    weak views, for a fifth of the run's steps at its rate. Returns logits on the test images."""
    model, sets, steps, random = run.ema.model, run.sets, max(1, s.steps // 5), torch.Generator().manual_seed(s.seed)
    layer = last(model)[1].requires_grad_(True)
    layer.reset_parameters()
    optimizer = torch.optim.SGD(layer.parameters(), s.lr, momentum=0.9, weight_decay=s.weight_decay)
    for t in range(steps):
        x = balanced(sets.labels.cpu(), s.batch_size, random).to(run.device)
        views = data.weak(sets.labeled[x], draws=torch.rand(len(x), 3, generator=random).to(run.device))
        optimizer.param_groups[0]["lr"] = s.lr * math.cos(7 * math.pi * t / (16 * steps))
        optimizer.zero_grad()
        F.cross_entropy(layer(features_of(model, sets, views)), sets.labels[x]).backward()
        optimizer.step()
    return evaluate.predict(model, sets, run.device)


def adjusted(run, s):
    """LA (Menon et al. 2021): f - log P_L."""
    return evaluate.predict(run.ema.model, run.sets, run.device) - run.p_labeled.log()


def post_hoc(name, change, directory):
    """A run of its own, <run>+<name>, from a finished one, which stays as it is."""
    found, state = evaluate.read_run(directory), models.load_checkpoint(Path(directory) / "checkpoint.pt")
    if state is None:
        raise ValueError(f"{directory} has no checkpoint.pt, which {name} needs")
    method, place = found.settings["method"], str(found.directory)
    out = Path(place.replace(method, f"{method}+{name}", 1) if method in place else f"{place}+{name}")
    s = SimpleNamespace(**found.settings | {"method": f"{method}+{name}", "device": "cpu", "out": str(out)})
    train.METHODS[s.method] = train.METHODS["fixmatch"]
    run = train.prepare(s)
    for part, value in run.parts.items():
        value.load_state_dict(state[part])
    vars(run.record).update(state["record"])
    run.p_labeled = torch.tensor(found.result["p_labeled"])  # of the set that it was trained on
    logits, row = change(run, s), run.record.rows[-1]
    row |= {k: v for k, v in evaluate.metrics(logits, run.sets.test_labels).items() if k in row}
    out.mkdir(parents=True, exist_ok=True)
    evaluate.save(run, out)
    evaluate.write_json(out / "config.json", vars(s))
    evaluate.write_json(out / "result.json", evaluate.result(run, logits))
    print(evaluate.summary(out))
    return 0


def main(arguments):
    trained, later = {"darp": darp, "crest": crest, "cossl": cossl}, {"crt": retrained, "la": adjusted}
    name, *rest = arguments or [""]
    try:
        if name in later and len(rest) == 1:
            return post_hoc(name, later[name], rest[0])
        if name not in trained:
            raise ValueError("name darp, crest or cossl with train.py's options, or crt or la with a finished run")
        train.METHODS[name] = train.METHODS["fixmatch"]
        train.SETTINGS["method"][1].append(name)
        return trained[name](["--method", name, *rest])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

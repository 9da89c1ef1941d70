"""The other methods of the paper's table, each as a change of the FixMatch run.

    python tests/baselines.py darp --shift reversed --seed 0       # or cossl; further options are train.py's
    python tests/baselines.py crest --generations 6
    python tests/baselines.py crt runs/shapes-darp-reversed-imb50-s0     # a new classifier on a finished run
    python tests/baselines.py la runs/shapes-fixmatch-reversed-imb50-s0  # argmax f - log P_L

p(u) is the raw weak prediction, N the number of unlabeled images, P_L the labeled prior, K the number of classes.
"""

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

# -------------------------------------------------------------------------------------- DARP (Kim et al. 2020)

def refine(probs, counts, alpha=2.0, rounds=200):
    """DARP's refinement: the matrix near probs (N, K) with row sums 1 and column sums counts (K,). Returns (N, K).

        A: the alpha N_k largest entries of column k, scaled to the sum N_k; rows normalised; h_u: entropy of row u
        A_uk / e X_u exp(-nu_k h_u): X from the row sums, nu_k by Newton on the logarithm of the column sum, in turn

    until the columns fit (the authors: 10 rounds). The logarithm is convex in nu, and the steps are bounded: safe.
    """
    probs, counts = probs.double(), counts.double().clamp(min=1e-6)
    place = probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    kept = torch.where(place < alpha * counts, probs, 0.0)
    A = (kept + 1e-6) * (counts + 1e-6) / (kept.sum(0) + 1e-6)
    A = A / A.sum(1, keepdim=True)
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
    return result.to(torch.get_default_dtype())


def darp(arguments):
    """From two fifths of the steps on (the authors' 200 of 500 epochs), every 10 steps, the last p(u) of all images are
    refined to the counts N P_L. Pseudo-labels come from the refined rows, the mask from p(u)."""
    prepare, indices, kept = train.prepare, train.batch_indices, SimpleNamespace()

    def prepared(s):
        run = kept.run = prepare(s)
        N, K = len(run.sets.unlabeled), len(run.sets.classes)
        kept.state, kept.counts, kept.start = torch.nn.Module(), N * run.p_labeled, s.steps * 2 // 5
        kept.state.register_buffer("probs", torch.full((N, K), 1 / K, device=run.device))
        kept.state.register_buffer("refined", kept.state.probs.clone())
        run.parts["darp"] = kept.state
        return run

    def remembered(size, batch_size, step, seed, which):
        index = indices(size, batch_size, step, seed, which)
        kept.index = index.to(kept.run.device)  # the last call is for the unlabeled images
        return index

    def loss(logits_strong, probs_weak, mask, *_):
        state, late = kept.state, kept.run.record.step - kept.start
        state.probs[kept.index] = probs_weak
        if late >= 0 and late % 10 == 0:
            state.refined.copy_(refine(state.probs, kept.counts))
        labels = state.refined[kept.index] if late >= 0 else probs_weak
        return consistency_loss(logits_strong, labels, mask, None, None)
    train.prepare, train.batch_indices, train.consistency_loss = prepared, remembered, loss
    return train.main(arguments)


# ------------------------------------------------------------------------------------ CReST+ (Wei et al. 2021)

def align(probs, p_labeled, running, t):
    """p(u) (P_L^t / sum P_L^t + 1e-6) / (running mean of p + 1e-6), normalised. probs: (N, K); the rest (K,)."""
    target = p_labeled ** t / (p_labeled ** t).sum()
    aligned = probs * (target + 1e-6) / (running + 1e-6)
    return aligned / aligned.sum(1, keepdim=True)


def sampling_rates(counts):
    """Share that a class gives, (1/gamma)^((K-1-r)/(K-1)/3), r its place by labeled size counts (K,), 0 = largest."""
    place, K = counts.argsort(descending=True, stable=True).argsort().double(), len(counts)
    return (counts.min() / counts.max()) ** ((K - 1 - place) / (K - 1) / 3)


def most_confident(probs, counts):
    """Of the images predicted as a class, the most confident share `sampling_rates`: (indices, labels)."""
    confidence, predicted = probs.max(1)
    chosen = []
    for k, rate in enumerate(sampling_rates(counts).tolist()):
        mine = (predicted == k).nonzero().squeeze(1)
        chosen.append(mine[confidence[mine].argsort(descending=True)][:math.ceil(rate * len(mine) - 1e-9)])
    index = torch.cat(chosen)
    return index, predicted[index]


def crest(arguments):
    """Generations, each a run of its own in <out>/generation<g>; the last one's files are the run's.

    p(u) is aligned with t from 1 to 0.5; generation g + 1 adds `most_confident` to the first labeled set.
    """
    generations = "6"
    if "--generations" in arguments[:-1]:
        i = arguments.index("--generations")
        generations, arguments = arguments[i + 1], arguments[:i] + arguments[i + 2:]
    if not generations.isdigit() or int(generations) < 1:
        raise ValueError(f"--generations {generations} must be at least 1")
    s, G, prepare, kept = train.parse(arguments), int(generations), train.prepare, SimpleNamespace()
    ablations.unlabeled_alone()  # U without L
    load = data.load

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
        run, t = prepare(s), 1 - 0.5 * kept.g / max(G - 1, 1)
        p_labeled = kept.counts.to(run.device) / kept.counts.sum().item()

        def mask(probs, threshold):
            kept.aligned = align(probs, p_labeled, run.estimator.q_hat, t)
            return confidence_mask(kept.aligned, threshold)
        train.confidence_mask = mask
        return run
    data.load, train.prepare = loaded, prepared
    train.consistency_loss = lambda logits, _, mask, *__: consistency_loss(logits, kept.aligned, mask, None, None)
    for g in range(G):
        kept.g = g
        if status := train.main([*arguments, "--out", f"{s.out}/generation{g}"]):
            return status
    for name in ("checkpoint.pt", "log.csv", "config.json", "result.json"):
        models.write_whole(Path(s.out) / name, lambda file: file.write(
            (Path(s.out) / f"generation{G - 1}" / name).read_bytes()))
    return 0


# ------------------------------------------------------------------------------------- CoSSL (Fan et al. 2022)

def balanced(labels, size, generator):
    """Indices of `size` images, every class equally probable."""
    return torch.multinomial(1 / torch.bincount(labels).double()[labels], size, True, generator=generator)


def enhance(features, labels, others, counts, draws):
    """Tail-class feature enhancement: lam x + (1 - lam) u with probability (N_1 - N_k) / N_1, lam ~ U(0.6, 1).

    features x, others u: (B, D), labels: (B,) of x, which stay; counts N_k: (K,); draws: (B, 2) uniform. Returns (B, D).
    """
    mixed, lam = draws[:, :1] < (1 - counts / counts.max())[labels][:, None], 0.6 + 0.4 * draws[:, 1:]
    return torch.where(mixed, lam * features + (1 - lam) * others, features).detach()


def with_layer(model, layer, function, *arguments):
    """function(model, ...) without gradient, with another last layer for the time."""
    kept, model.linear = model.linear, layer
    with torch.no_grad():
        result = function(model, *arguments)
    model.linear = kept
    return result


def features_of(model, sets, images):
    """The input of the last layer, (N, D), without gradient."""
    return with_layer(model, torch.nn.Identity(), lambda m: m(data.normalize(images, sets.mean, sets.std)))


def cossl(arguments):
    """From four fifths of the steps on (the authors' 400 of 500 epochs) a second linear layer learns on features of the
    EMA network: class-balanced labeled images and as many unlabeled ones, strong views. It is what is evaluated."""
    prepare, step, predict, kept = train.prepare, train.train_step, evaluate.predict, SimpleNamespace()

    def prepared(s):
        run, kept.s = prepare(s), s
        layer = kept.layer = torch.nn.Linear(run.model.linear.in_features, len(run.sets.classes)).to(run.device)
        layer.load_state_dict(run.model.linear.state_dict())
        kept.optimizer = torch.optim.SGD(layer.parameters(), s.lr, momentum=0.9)
        run.parts |= {"second": layer, "second_optimizer": kept.optimizer}
        return run

    def stepped(run, *rest):
        step(run, *rest)
        sets, B, random = run.sets, kept.s.batch_size, torch.Generator().manual_seed(10 ** 7 * kept.s.seed + run.record.step)
        if run.record.step < kept.s.steps * 4 // 5:
            kept.layer.load_state_dict(run.model.linear.state_dict())
            return
        x = balanced(sets.labels.cpu(), B, random)
        u = torch.randint(len(sets.unlabeled), (B,), generator=random)
        draws = torch.rand(2 * B, 14, generator=random).to(run.device)
        images = torch.cat([sets.labeled.cpu()[x], sets.unlabeled.cpu()[u]]).to(run.device)
        features = features_of(run.ema.model, sets, data.strong(images, draws=draws[:, :12]))
        labels = sets.labels[x.to(run.device)]
        mixed = enhance(features[:B], labels, features[B:], torch.bincount(sets.labels), draws[:B, 12:])
        kept.optimizer.zero_grad()
        F.cross_entropy(kept.layer(mixed), labels).backward()
        kept.optimizer.step()
    train.prepare, train.train_step = prepared, stepped
    evaluate.predict = lambda model, *rest: with_layer(model, kept.layer, predict, *rest)
    return train.main(arguments)


# -------------------------------------------------- on a finished run: cRT (Kang et al. 2020), LA (Menon et al. 2021)

def retrained(run, s):
    """cRT: the features stay, the linear layer is drawn anew and trained on class-balanced labeled weak views, for a
    fifth of the run's steps at its rate. Returns logits on the test images."""
    model, sets, steps = run.ema.model, run.sets, max(1, s.steps // 5)
    random = torch.Generator().manual_seed(s.seed)
    model.linear.requires_grad_(True).reset_parameters()
    optimizer = torch.optim.SGD(model.linear.parameters(), s.lr, momentum=0.9, weight_decay=s.weight_decay)
    for t in range(steps):
        index = balanced(sets.labels.cpu(), s.batch_size, random).to(run.device)
        draws = torch.rand(s.batch_size, 3, generator=random).to(run.device)
        features = features_of(model, sets, data.weak(sets.labeled[index], draws=draws))
        optimizer.param_groups[0]["lr"] = s.lr * math.cos(7 * math.pi * t / (16 * steps))
        optimizer.zero_grad()
        F.cross_entropy(model.linear(features), sets.labels[index]).backward()
        optimizer.step()
    return evaluate.predict(model, sets, run.device)


def adjusted(run, s):
    """LA: f - log P_L on the network as it is."""
    return evaluate.predict(run.ema.model, run.sets, run.device) - run.p_labeled.cpu().log()


def post_hoc(name, change, directory):
    """A run of its own, <run>+<name>, from a finished one, which stays as it is."""
    found = evaluate.read_run(directory)
    state = models.load_checkpoint(found.directory / "checkpoint.pt")
    if state is None:
        raise ValueError(f"{directory} has no checkpoint.pt, which {name} needs")
    method, place = found.settings["method"], str(found.directory)
    out = Path(place.replace(method, f"{method}+{name}", 1) if method in place else f"{place}+{name}")
    s = SimpleNamespace(**found.settings | {"method": f"{method}+{name}", "device": "cpu", "out": str(out)})
    train.METHODS[s.method] = train.METHODS["fixmatch"]
    torch.manual_seed(s.seed)
    run = train.prepare(s)
    for part, value in run.parts.items():
        value.load_state_dict(state[part])
    vars(run.record).update(state["record"])
    logits = change(run, s)
    found = evaluate.metrics(logits, run.sets.test_labels)
    run.record.rows[-1] |= {k: v for k, v in found.items() if k in run.record.rows[-1]}
    out.mkdir(parents=True, exist_ok=True)
    lock = models.hold(out)  # until the files are written
    evaluate.save(run, out)
    evaluate.write_json(out / "config.json", vars(s))
    evaluate.write_json(out / "result.json", evaluate.result(run, logits))
    print(evaluate.summary(out))
    return lock.close() or 0


def main(arguments):
    """The command line. Returns the exit status."""
    trained, later = {"darp": darp, "crest": crest, "cossl": cossl}, {"crt": retrained, "la": adjusted}
    name, *rest = arguments or [""]
    try:
        if name in trained:
            train.METHODS[name] = train.METHODS["fixmatch"]
            train.SETTINGS["method"][1].append(name)
            return trained[name](["--method", name, *rest])
        if name in later and len(rest) == 1:
            return post_hoc(name, later[name], rest[0])
        raise ValueError("name darp, crest or cossl with train.py's options, or crt or la with a finished run")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

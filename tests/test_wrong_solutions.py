"""The tests of the exercises, tested: each wrong version of a function must fail its own exercise's test, and right
ones that are written otherwise must pass.

A version is the body that a student writes below the module's own signature: an expression or statements. Where it
begins with "def" or "@" it takes the place of the signature, too. The third entry of a wrong version, where there is
one, stands in the message that the student gets. What several exercises ask in the same words is tried in one of them.
"""

import ast
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import exercises
import test_exercises

WRONG = {}  # exercise: [(what is wrong, body[, part of the message])]
RIGHT = {}  # exercise: [(how it is written, body)]

# ------------------------------------------------------------------------------------ alpha_schedule

WRONG["alpha_schedule"] = [
    ("d is always 2", "1 - (1 - alpha_min) * (step / total_steps) ** 2", "d is the exponent"),
    ("alpha_min is always 0.1", "1 - 0.9 * (step / total_steps) ** d", "alpha_min is given"),
    ("alpha_min cuts the curve", "max(alpha_min, 1 - (step / total_steps) ** d)", "not cut the curve off"),
    ("rises", "alpha_min + (1 - alpha_min) * (step / total_steps) ** d", "alpha is 1 at step 0"),
    ("by percent", "1 - (1 - alpha_min) * (int(100 * step / total_steps) / 100) ** d", "falls at every step"),
    ("default d 1", "def alpha_schedule(step, total_steps, alpha_min=0.1, d=1.0):\n"
     "    return 1 - (1 - alpha_min) * (step / total_steps) ** d", "the paper's"),
    ("nothing returned", "alpha = 1 - (1 - alpha_min) * (step / total_steps) ** d\nreturn"),
]
RIGHT["alpha_schedule"] = [
    ("from below", "alpha_min + (1 - alpha_min) * (1 - (step / total_steps) ** d)"),
    ("a tensor", "1 - (1 - alpha_min) * (torch.tensor(step, dtype=torch.float64) / total_steps) ** d"),
]

# -------------------------------------------------------------------------------------------- smooth

WRONG["smooth"] = [
    ("not normalised", "q ** alpha", "sums to 1"),
    ("softmax of alpha q", "(alpha * q).softmax(0)", "alpha = 1 keeps"),
    ("temperature 1 / alpha the wrong way round", "(q.log() / max(alpha, 1e-9)).softmax(0)"),
    ("mixed with the uniform prior", "alpha * q + (1 - alpha) / len(q)", "every ratio"),
    ("writes into the prior", "q.pow_(alpha)\nreturn q / q.sum()", "arguments are the same"),
    ("1e-9 added", "p = (q + 1e-9) ** alpha\nreturn p / p.sum()", "rare class"),
    ("always float64", "p = q.double() ** alpha\nreturn p / p.sum()", "float32 in"),
    ("filled on the CPU", "p = torch.zeros(len(q), dtype=q.dtype)\np += q ** alpha\nreturn p / p.sum()", "device"),
    ("Python floats", "p = [float(x) ** float(alpha) for x in q]\n"
     "return torch.tensor([x / sum(p) for x in p], dtype=q.dtype)", "GPU"),
    ("a list", "total = sum(x ** alpha for x in q.tolist())\nreturn [x ** alpha / total for x in q.tolist()]"),
]
RIGHT["smooth"] = [
    ("softmax of logarithms", "q ** 0 / len(q) if alpha == 0 else (alpha * q.log()).softmax(0)"),
    ("a loop", "p = torch.empty_like(q)\ntotal = 0\nfor k in range(len(q)):\n    p[k] = q[k] ** alpha\n"
     "    total = total + p[k]\nreturn p / total"),
    ("a list", "powers = [x ** alpha for x in q]\nreturn torch.stack([x / sum(powers) for x in powers])"),
    ("numpy, there and back", "p = q.cpu().numpy() ** float(alpha)\nreturn torch.from_numpy(p / p.sum()).to(q)"),
]

# ----------------------------------------------------------------------------- imbalance_temperature

K_U = "u = torch.full_like(q_hat, 1 / len(q_hat))\n"
WRONG["imbalance_temperature"] = [
    ("KL the other way round", K_U + "return (q_hat * (q_hat / u).log()).sum().exp()", "direction"),
    ("exponential of each class", K_U + "return (u * (u / q_hat).log()).exp().sum()"),
    ("1 + KL", K_U + "return 1 + (u * (u / q_hat).log()).sum()", "T is 1.25"),
    ("minus KL", K_U + "return (u * (q_hat / u).log()).sum().exp()", "at least 1"),
    ("geometric over harmonic mean", "(1 / q_hat).mean() * q_hat.log().mean().exp()"),
    ("clamped at 1e-6", "q = q_hat.clamp(min=1e-6)\n" + K_U + "return (u * (u / q).log()).sum().exp()", "rare class"),
    ("a number", K_U + "return (u * (u / q_hat).log()).sum().exp().item()", "a tensor without dimensions"),
    ("uniform prior in float32", "return kl_divergence(uniform(len(q_hat), q_hat.device, torch.float32), q_hat).exp()",
     "dtype"),
]
RIGHT["imbalance_temperature"] = [
    ("by the mean logarithm", "(-q_hat.log().mean()).exp() / len(q_hat)"),
    ("a loop", "import math\ntotal = 0.0\nfor q in q_hat.tolist():\n    total += math.log(1 / len(q_hat) / q) / "
     "len(q_hat)\n"
     "return torch.tensor(math.exp(total), dtype=q_hat.dtype, device=q_hat.device)"),
    ("numpy", "import numpy as np\nreturn torch.tensor(np.exp(-np.log(q_hat.numpy() * len(q_hat)).mean()), "
     "dtype=q_hat.dtype)"),
]

# -------------------------------------------------------------------------------------------- adjust

NONE = "if source is None:\n    return logits\n"
WRONG["adjust"] = [
    ("sign", NONE + "return logits - ((source + 1e-9) / (target + 1e-9)).log()", "check the sign"),
    ("no eps", NONE + "return logits + (source / target).log()", "stays finite"),
    ("eps 1e-8", NONE + "return logits + ((source + 1e-8) / (target + 1e-8)).log()", "1e-9 is added"),
    ("None for None", "if source is not None:\n    return logits + ((source + 1e-9) / (target + 1e-9)).log()", "None"),
    ("None centres", "if source is None:\n    return logits - logits.mean(1, keepdim=True)\n"
     "return logits + ((source + 1e-9) / (target + 1e-9)).log()", "None"),
    ("logits detached", NONE + "return logits.detach() + ((source + 1e-9) / (target + 1e-9)).log()", "detached"),
    ("log-softmax first", NONE + "return logits.log_softmax(1) + ((source + 1e-9) / (target + 1e-9)).log()"),
    ("float32 within", NONE + "return logits + ((source.float() + 1e-9) / (target.float() + 1e-9)).log().double()"),
    ("gradient doubled", NONE + "return 2 * logits - logits.detach() + ((source + 1e-9) / (target + 1e-9)).log()",
     "gradient reaches"),
    ("rows stacked, of which there may be none",
     NONE + "return torch.stack([x + ((source + EPS) / (target + EPS)).log() for x in logits])", "may be empty"),
]
RIGHT["adjust"] = [
    ("difference of logarithms", NONE + "return logits + torch.log(source + 1e-9) - torch.log(target + 1e-9)"),
    ("a loop over classes", NONE + "import math\nreturn torch.stack([logits[:, k] + math.log((s + 1e-9) / (t + 1e-9)) "
     "for k, (s, t) in enumerate(zip(source.tolist(), target.tolist()))], dim=1)"),
    ("clone and add", "if source is None or target is None:\n    return logits.clone()\nout = logits.clone()\n"
     "out += ((source + EPS) / (target + EPS)).log()\nreturn out"),
]

# -------------------------------------------------------------------------------- complementary_loss

LABEL = "p = F.softmax(probs_weak.detach().log() / temperature, dim=1)\n"
LOGQ = "q = F.log_softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, dim=1)\n"
MEAN = "return ((1 - mask) * -(p * q).sum(dim=1)).mean()"


def ccr(label=LABEL, prediction=LOGQ, mean=MEAN):
    return label + prediction + mean


WRONG["complementary_loss"] = [
    ("T cut to a whole number", "temperature = int(temperature)\n" + ccr(), "whole number"),
    ("adjusted after the division by T", ccr(prediction="q = F.log_softmax(adjust(logits_strong / temperature, q_hat, "
     "q_alpha), dim=1)\n"), "before the division"),
    ("label not detached", ccr(LABEL.replace(".detach()", "")), "detach it"),
    ("logits detached", ccr(prediction=LOGQ.replace("logits_strong", "logits_strong.detach()"))),
    ("KL in place of cross-entropy", ccr(mean="return ((1 - mask) * (torch.xlogy(p, p) - p * q).sum(dim=1)).mean()"),
     "KL divergence"),
    ("mask in place of 1 - mask", ccr(mean=MEAN.replace("(1 - mask)", "mask")), "masked"),
    ("mean over the selected images", ccr(mean="w = 1 - mask\nreturn (w * -(p * q).sum(dim=1)).sum() / "
     "w.sum().clamp(min=1)"), "the whole batch"),
    ("one loss for each image", ccr(mean="return (1 - mask) * -(p * q).sum(dim=1)"), "one number"),
    ("label not softened", ccr("p = probs_weak.detach()\n"), "softened"),
    ("label not normalised", ccr("p = probs_weak.detach() ** (1 / temperature)\n"), "normalised"),
    ("logarithm of a softmax", ccr(prediction="q = F.softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, "
     "dim=1).log()\n"), "large logits"),
    ("factor T squared", ccr(mean=MEAN + " * temperature ** 2"), "T squared"),
    ("NaN where p is 0", ccr("p = probs_weak.detach()\n", mean="l = p.log() / temperature\n"
     "p = (l - torch.log((probs_weak.detach() ** (1 / temperature)).sum(1, keepdim=True))).exp()\n"
     "return ((1 - mask) * (-(p * q) + 0 * p * l).sum(dim=1)).mean()"), "exactly 0"),
    ("p clamped at 1e-6", ccr(LABEL.replace("probs_weak", "probs_weak.clamp(min=1e-6)")), "not clamped"),
    ("target prior uniform", ccr(prediction="q = F.log_softmax(adjust(logits_strong, q_hat, None if q_hat is None else "
     "torch.full_like(q_hat, 1 / len(q_hat))) / temperature, dim=1)\n")),
    ("float32 within", "logits_strong = logits_strong.float().to(probs_weak.dtype)\n" + ccr()),
    ("T as a number only", "temperature = float(f'{temperature:.1f}') if isinstance(temperature, float) else "
     "float('nan')\n" + ccr(), "a tensor without dimensions"),
]
RIGHT["complementary_loss"] = [
    ("p ** (1 / T) normalised", ccr("p = probs_weak.detach() ** (1 / temperature)\np = p / p.sum(1, keepdim=True)\n")),
    ("F.cross_entropy", LABEL + "losses = F.cross_entropy(adjust(logits_strong, q_hat, q_alpha) / temperature, p, "
     "reduction='none')\nreturn (losses * (1 - mask)).mean()"),
    ("a loop", "total = 0 * logits_strong.sum()\nadjusted = adjust(logits_strong, q_hat, q_alpha)\n"
     "for i in range(len(mask)):\n    if mask[i] == 0:\n        p = probs_weak[i].detach() ** (1 / temperature)\n"
     "        p = p / p.sum()\n        total = total - (p * (adjusted[i] / temperature).log_softmax(0)).sum()\n"
     "return total / len(mask)"),
    ("1e-12 in the logarithm", ccr(LABEL.replace(".log()", ".add(1e-12).log()"))),
]

# ---------------------------------------------------------------------------------------------- weak


def weak(pad="images.shape[-1] // 8", border="padded = F.pad(images.float(), (pad,) * 4, "
         "mode='reflect').to(torch.uint8)",
         y="int(draws[i, 0] * (2 * pad + 1))", x="int(draws[i, 1] * (2 * pad + 1))", flip="draws[i, 2] < 0.5",
         mirror="view.flip(2)", back="torch.stack(views) if views else images.clone()"):
    """A weak view as a loop over the images, with one of its parts exchanged."""
    return (f"size = images.shape[-1]\npad = {pad}\n{border}\nviews = []\nfor i in range(len(images)):\n"
            f"    y = {y}\n    x = {x}\n    view = padded[i, :, y:y + size, x:x + size]\n    if {flip}:\n"
            f"        view = {mirror}\n    views.append(view)\nreturn {back}")


def padded(mode):
    return ("import numpy as np\nwidths = ((0, 0), (0, 0), (pad, pad), (pad, pad))\n"
            f"padded = torch.from_numpy(np.pad(images.numpy(), widths, {mode}))")


WRONG["weak"] = [
    ("pad a quarter", weak(pad="images.shape[-1] // 4"), "pad"),
    ("pad rounded up", weak(pad="-(-images.shape[-1] // 8)"), "rounded down"),
    ("black border", weak(border=padded("'constant'")), "not black"),
    ("reflection that repeats the edge", weak(border=padded("'symmetric'")), "row -1 is row 1"),
    ("last place left out", weak(y="int(draws[i, 0] * 2 * pad)", x="int(draws[i, 1] * 2 * pad)"), "last one included"),
    ("rounded", weak(y="round(float(draws[i, 0]) * 2 * pad)", x="round(float(draws[i, 1]) * 2 * pad)"), "equally"),
    ("crop along the diagonal", weak(x="y"), "independently"),
    ("a quarter mirrored", weak(flip="draws[i, 2] < 0.25"), "half of the draws"),
    ("channels mirrored", weak(mirror="view.flip(0)"), "channels together"),
    ("random numbers of its own", "draws = torch.rand(len(images), 3)\n" + weak(), "all chance comes from"),
    ("floats out", weak(back="torch.stack(views).float()"), "uint8"),
    ("order of the batch turned", weak(back="torch.stack(views).flip(0)"), "view i is image i"),
    ("from the other end, one too far", weak(x="int((1 - draws[i, 1]) * (2 * pad + 1))"), "one beyond"),
    ("fails on an empty batch", weak(back="torch.stack(views)"), "may be empty"),
]
RIGHT["weak"] = [
    ("a loop", weak()),
    ("columns first", weak(y="int(draws[i, 1] * (2 * pad + 1))", x="int(draws[i, 0] * (2 * pad + 1))")),
    ("mirrored above a half", weak(flip="draws[i, 2] >= 0.5")),
    ("crops from the other end", weak(y="2 * pad - int(draws[i, 0] * (2 * pad + 1))")),
    ("mirrored first", weak(border="images = torch.where(draws[:, 2].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)\n"
     "padded = F.pad(images.float(), (pad,) * 4, mode='reflect').to(torch.uint8)", flip="False")),
]

# --------------------------------------------------------------------------------------- reliability


def bins(columns="len(mine) / len(labels), right[mine].mean(), confidence[mine].mean()", empty="0.0, 0.0, 0.0",
         where="(confidence > b / num_bins) & (confidence <= (b + 1) / num_bins) | (b == 0) & (confidence == 0)",
         confidence="probs.amax(1)", right="(probs.argmax(1) == labels).double()", before="",
         back="torch.tensor(rows, dtype=torch.float64)"):
    """The table as a loop over the bins, with one of its parts exchanged."""
    return (f"{before}\nconfidence = {confidence}\nright = {right}\nrows = []\nfor b in range(num_bins):\n"
            f"    mine = ({where}).nonzero().flatten()\n    if len(mine):\n        rows.append([float(v) for v in "
            f"({columns})])\n"
            f"    else:\n        rows.append([{empty}])\nreturn {back}")


WRONG["reliability"] = [
    ("accuracy and confidence swapped", bins("len(mine) / len(labels), confidence[mine].mean(), right[mine].mean()"),
     "the columns are share"),
    ("median confidence", bins("len(mine) / len(labels), right[mine].mean(), confidence[mine].median()")),
    ("NaN in empty bins", bins(empty="0.0, float('nan'), float('nan')"), "not NaN"),
    ("lower edge included", bins(where="(confidence >= b / num_bins) & (confidence < (b + 1) / num_bins) | "
     "(b == num_bins - 1) & (confidence == 1)"), "(lower, upper]"),
    ("0 lost", bins(where="(confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)"), "confidence of 0"),
    ("always 15 bins", bins(before="num_bins = 15"), "row for each bin"),
    ("10 bins by default", "def reliability(probs, labels, num_bins=10):\n" + textwrap.indent(bins(), "    "),
     "15 bins"),
    ("confidence of the true class", bins(confidence="probs[torch.arange(len(labels)), labels]"), "true class"),
    ("right by label 0", bins(right="(labels == 0).double()")),
    ("float32 out", bins(back="torch.tensor(rows)"), "no float32"),
    ("no ValueError", bins(before=""), "ValueError"),
]
VALID = """if len(labels) != len(probs) or not len(labels) or not probs.isfinite().all():
    raise ValueError
if labels.min() < 0 or labels.max() >= probs.shape[1]:
    raise ValueError
"""
RIGHT["reliability"] = [
    ("a loop over bins", bins(before=VALID)),
    ("a loop over samples", VALID + """import math
rows = [[0.0, 0.0, 0.0] for _ in range(num_bins)]
for p, label in zip(probs.tolist(), labels.tolist()):
    row = rows[max(0, math.ceil(max(p) * num_bins) - 1)]
    row[0] += 1
    row[1] += p.index(max(p)) == label
    row[2] += max(p)
return torch.tensor([[n / len(labels), a / max(n, 1), c / max(n, 1)] for n, a, c in rows], dtype=probs.dtype)"""),
]

# ---------------------------------------------------------------------------------------- ema_update

LERP = "for a, b in zip(self.model.parameters(), model.parameters()):\n" \
       "    a.mul_(self.decay).add_(b, alpha=1 - self.decay)\n"
COPY = "for a, b in zip(self.model.buffers(), model.buffers()):\n    a.copy_(b)\n"
PLAIN = "def update(self, model):\n"
WRONG["ema_update"] = [
    ("new one at full weight", LERP.replace(", alpha=1 - self.decay", "") + COPY),
    ("decay 0.9 always", LERP.replace("self.decay", "0.9") + COPY, "given to EMA"),
    ("weights only", LERP.replace("    a", "    if a.ndim > 1: a") + COPY, "biases"),
    ("frozen parameters skipped", LERP.replace("    a", "    if b.requires_grad: a") + COPY, "frozen"),
    ("counter skipped", LERP + COPY.replace("    a", "    if a.is_floating_point(): a"), "counter"),
    ("everything averaged by state_dict", "new = model.state_dict()\nfor name, a in self.model.state_dict().items():\n"
     "    a.copy_(self.decay * a + (1 - self.decay) * new[name])\n", "not averaged"),
    ("buffers shared by data", LERP + COPY.replace("a.copy_(b)", "a.data = b.data"), "do not share"),
    ("parameters bound to new ones", LERP + COPY + "for m in self.model:\n    m.weight = torch.nn.Parameter("
     "m.weight.detach().clone(), requires_grad=False)\n", "written in place"),
    ("model set to evaluation", "model.eval()\n" + LERP + COPY, "training mode"),
    ("average set to training", LERP + COPY + "self.model.train()", "evaluation mode"),
    ("a graph", PLAIN + textwrap.indent(LERP + COPY, "    "), "no_grad"),
    ("moved to the CPU", LERP.replace("a.mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "a.data = (self.decay * a + (1 - self.decay) * b).cpu()") + COPY, "GPU"),
]
RIGHT["ema_update"] = [
    ("a loop", LERP + COPY),
    ("data, without no_grad", PLAIN + "    for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "        a.data.mul_(self.decay).add_(b.data, alpha=1 - self.decay)\n" + textwrap.indent(COPY, "    ")),
    ("by state_dict", "new, own = model.state_dict(), dict(self.model.named_parameters())\n"
     "for name, a in self.model.state_dict().items():\n"
     "    a.copy_(self.decay * a + (1 - self.decay) * new[name] if name in own else new[name])\n"),
    ("load_state_dict", "new = {k: v.clone() for k, v in model.state_dict().items()}\n"
     "for name, a in self.model.named_parameters():\n    new[name] = self.decay * a + (1 - self.decay) * new[name]\n"
     "self.model.load_state_dict(new)\n"),
    ("assigned data", LERP.replace("a.mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "a.data = self.decay * a.data + (1 - self.decay) * b.data") + COPY),
]

# ---------------------------------------------------------------------------------- estimator_update

MIX = "self.q_hat.mul_(self.momentum).add_(probs.mean(dim=0), alpha=1 - self.momentum)\n"
SET_T = "if first_ccr_step:\n    self.temperature.copy_(imbalance_temperature(self.q_hat))\n"
WRONG["estimator_update"] = [
    ("new mean at full weight", MIX.replace(", alpha=1 - self.momentum", "") + SET_T),
    ("confident images only", "sure = probs[probs.amax(1) > 0.59]\nif len(sure):\n    probs = sure\n" + MIX + SET_T,
     "no threshold"),
    ("T at every step", MIX + SET_T.replace("if first_ccr_step:", "if True:"), "not touched"),
    ("T from the first CCR step on", MIX + "self.on = getattr(self, 'on', False) or first_ccr_step\n"
     + SET_T.replace("first_ccr_step", "self.on"), "stays as it is"),
    ("T before the update", SET_T + MIX, "after its update"),
    ("Qhat frozen with T", "self.done = getattr(self, 'done', False) or first_ccr_step\n"
     "if not self.done or first_ccr_step:\n"
     "    " + MIX + SET_T, "Qhat moves at every step"),
    ("a graph", "def update(self, probs, first_ccr_step=False):\n    self.q_hat = self.momentum * self.q_hat + "
     "(1 - self.momentum) * probs.mean(0)\n" + textwrap.indent(SET_T, "    "), "no gradient flows"),
    ("no buffer any more", MIX + SET_T + "q = self.q_hat\ndel self.q_hat\nself.__dict__['q_hat'] = q", "buffers"),
    ("Qhat clamped at 1e-6", MIX + "self.q_hat.clamp_(min=1e-6)\n" + SET_T, "nothing is clamped"),
    ("T at most 2", MIX + SET_T.replace("(self.q_hat))", "(self.q_hat).clamp(max=2))"), "no bound"),
    ("mean on the CPU", MIX.replace("probs.mean(dim=0)", "torch.tensor(probs.mean(dim=0).tolist())") + SET_T, "GPU"),
    ("momentum at most 0.99", "self.momentum = min(self.momentum, 0.99)\n" + MIX + SET_T, "given to the estimator"),
]
RIGHT["estimator_update"] = [
    ("bound to a new tensor", "self.q_hat = self.momentum * self.q_hat + (1 - self.momentum) * probs.mean(0)\n"
     "if first_ccr_step:\n    self.temperature = imbalance_temperature(self.q_hat)"),
    ("a loop", "for k in range(len(self.q_hat)):\n"
     "    self.q_hat[k] = self.momentum * self.q_hat[k] + (1 - self.momentum) * probs[:, k].sum() / len(probs)\n"
     + SET_T),
    ("detached, without no_grad", "def update(self, probs, first_ccr_step=False):\n"
     "    self.q_hat += (1 - self.momentum) * (probs.detach().mean(0) - self.q_hat)\n"
     + textwrap.indent(SET_T, "    ")),
]

# ------------------------------------------------------------------------------------------- answers

WRONG["half_life"] = [
    ("1 / (1 - m)", "1 / (1 - momentum)", "a third"),
    ("sign", "math.log(2) / math.log(momentum)"),
    ("None", "None", "number of updates comes out"),
    ("linear, rounded", "round(math.log(2) / (1 - momentum))", "does not leave a half"),
    ("one more", "math.ceil(math.log(0.5) / math.log(momentum)) + 1", "off by one"),
]
RIGHT["half_life"] = [
    ("logarithms", "math.log(0.5) / math.log(momentum)"),
    ("counted", "n = 0\nleft = 1.0\nwhile left > 0.5:\n    left *= momentum\n    n += 1\nreturn n"),
    ("two digits", "round(math.log(0.5) / math.log(momentum), 2)"),
    ("float32", "torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(momentum))"),
]

WRONG["at_target"] = [
    ("sign", "logits + (source / target).log()", "the sign"),
    ("posterior in place of logits", "p = logits.softmax(1) * target / source\nreturn p / p.sum(1, keepdim=True)",
     "logits go in"),
    ("along the batch", "if len(logits) == len(source):\n    return (logits.T + (target / source).log()).T\n"
     "return logits + (target / source).log()", "class k"),
    ("ratio clamped", "logits + (target / source).clamp(0.01, 100).log()", "far apart"),
    ("writes into its logits", "logits += (target / source).log()\nreturn logits", "in-place"),
    ("the first row alone", "logits[0] + (target / source).log()", "(N, K) in"),
]
RIGHT["at_target"] = [
    ("log-ratio", "logits - (source / target).log()"),
    ("posterior's logarithm", "p = logits.softmax(1) * target / source\nreturn (p / p.sum(1, keepdim=True)).log()"),
    ("losses.adjust, priors swapped", "from losses import adjust\nreturn adjust(logits, target, source)"),
]

GM = "geometric = math.exp(sum(math.log(n) for n in counts) / len(counts))\n"
WRONG["temperature_of_counts"] = [
    ("product", "product = 1.0\nfor n in counts:\n    product *= n\nreturn sum(counts) / len(counts) / "
     "product ** (1 / len(counts))", "without it"),
    ("arithmetic over harmonic", "return sum(counts) / len(counts) ** 2 * sum(1 / n for n in counts)"),
    ("arithmetic mean", "return sum(counts) / len(counts)"),
    ("sorts the caller's list", "counts.sort()\n" + GM + "return sum(counts) / len(counts) / geometric", "caller's"),
    ("empties the caller's list", "n = [counts.pop() for _ in range(len(counts))]\n"
     + GM.replace("counts", "n") + "return sum(n) / len(n) / geometric", "caller's"),
]
RIGHT["temperature_of_counts"] = [
    ("arithmetic over geometric mean", GM + "return sum(counts) / len(counts) / geometric"),
    ("tensors", "n = torch.tensor(counts, dtype=torch.float64)\nreturn (n.mean() / n.log().mean().exp()).item()"),
]

WRONG["gradient_limit"] = [
    ("power 1", "d = logits - probs.log()\nreturn 1, (d - d.mean()) / len(d)", "where n is too small"),
    ("not centred", "return 2, (logits - probs.log()) / len(probs)", "sums to 0"),
    ("no 1/K", "d = logits - probs.log()\nreturn 2, d - d.mean()", "not that of"),
    ("sign", "d = probs.log() - logits\nreturn 2, (d - d.mean()) / len(d)", "the sign"),
    ("gradient at T = 1e5", "T = 1e5\nreturn 2, T * ((logits / T).softmax(0) - (probs.log() / T).softmax(0))", "exact"),
    ("limit first", "d = logits - probs.log()\nreturn (d - d.mean()) / len(d), 2", "n comes first"),
    ("writes into the logits", "logits -= probs.log()\nreturn 2, (logits - logits.mean()) / len(logits)", "arguments"),
]
RIGHT["gradient_limit"] = [
    ("centred difference", "d = logits - probs.log()\nreturn 2, (d - d.mean()) / len(d)"),
    ("a list", "K = len(logits)\nd = [f - math.log(p) for f, p in zip(logits.tolist(), probs.tolist())]\n"
     "return 2, [(x - sum(d) / K) / K for x in d]"),
    ("numpy", "d = (logits - probs.log()).numpy()\nreturn d.dtype.type(2), (d - d.mean()) / d.size"),
]

# own_method: rows in place of bodies
WRONG["own_method"] = [
    ("no row", "{}", "no row of your own"),
    ("FlexDA again", "{'mine': Method('q_hat', None)}", "mine is flexda"),
    ("an unknown prior", "{'mine': Method('q_labeled', 'rest')}", "a prior that a step knows"),
    ("ccr as a truth value", "{'mine': Method('p_labeled', True)}", "'rest' or 'all'"),
    ("a plain tuple", "{'mine': ('p_labeled', 'rest', True)}", "to a Method"),
    ("a row of the paper changed", "{'udal': Method('p_labeled', 'rest')}", "unchanged"),
    ("ADELLO with another truth value", "{'mine': Method('q_hat', 'rest', 'yes')}", "True or False"),
    ("CCR without unlabeled images", "{'mine': Method('q_hat', 'rest', False)}", "CCR needs"),
]
RIGHT["own_method"] = [
    ("UDAL with CCR", "{'udal-ccr': Method('p_labeled', 'rest')}"),
    ("two rows", "{'oracle-without': Method('q_true', None), 'la': Method('p_labeled', None, unlabeled=False)}"),
]


# ------------------------------------------------------------------------------------------ the tests

def head(exercise):
    """The signature, decorators included, below which a student writes."""
    module, _, path = exercise.place.partition(".")
    if module == "answers":
        source = exercises.ANSWERS[""] + exercises.ANSWERS[exercise.name]
    else:
        source = (exercises.ROOT / f"{module}.py").read_text(encoding="utf-8")
    return textwrap.dedent(exercises.head(source, path))


def is_expression(body):
    try:
        compile(body, "expression", "eval")
    except SyntaxError:
        return False
    return True


def build(exercise, body):
    """What the exercise's tests take as their argument, with a version of the function in it."""
    module, _, path = exercise.place.partition(".")
    space = {"torch": torch, "math": importlib.import_module("math"), "F": torch.nn.functional}
    if module != "answers":
        space.update(vars(importlib.import_module(module)))
    if exercise.name == "own_method":
        return {**space["METHODS"], **eval(body, space)}
    if not body.startswith(("def ", "@")):
        body = head(exercise) + "\n" + textwrap.indent("return " + body if is_expression(body) else body, "    ")
    exec(compile(body, exercise.name, "exec"), space)
    owner, _, name = path.rpartition(".")
    if owner:
        return type(owner, (space[owner],), {name: space[name]})
    return space[name]


def first_failure(exercise, body):
    """What the first property that does not hold says, or None."""
    try:
        subject = build(exercise, body)
    except SyntaxError as error:
        raise ValueError(f"{exercise.name}: {error}\n{body}") from None
    return test_exercises.first_failure(test_exercises.PROPERTIES[exercise.name], lambda: subject)


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=exercises.NAMES)
def test_every_wrong_version_is_caught_with_the_sentence_that_it_needs(exercise):
    for what, body, *says in WRONG[exercise.name]:
        found = first_failure(exercise, body)
        assert found is not None, f"{what}: passes"
        assert not says or says[0] in found, f"{what}: {found!r} does not say {says[0]!r}"


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=exercises.NAMES)
def test_right_versions_that_are_written_otherwise_pass(exercise):
    for how, body in RIGHT[exercise.name]:
        found = first_failure(exercise, body)
        assert found is None, f"{how}: {found}"


def test_a_name_selects_the_properties_of_its_own_exercise_alone():
    """`pytest -k name` takes every test whose name holds it."""
    assert list(test_exercises.PROPERTIES) == exercises.NAMES
    for name, rows in test_exercises.PROPERTIES.items():
        for sentence, _ in rows:
            assert [other for other in exercises.NAMES if other in f"{name}: {sentence}".lower()] == [name], sentence


def test_the_readme_has_the_tools_table():
    assert exercises.table() in (exercises.ROOT / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- the tool

def functions(directory):
    """{place: the text of the function} of the exercises in a copy, answers.py aside."""
    found = {}
    for place in exercises.PLACES.values():
        module, _, path = place.partition(".")
        if module != "answers" and path != "METHODS":
            text = (directory / f"{module}.py").read_text(encoding="utf-8")
            found[place] = ast.unparse(exercises.find(ast.parse(text), path))
    return found


def solve(directory, bodies):
    """Write bodies, by exercise, into the open functions of a copy."""
    for name, body in bodies.items():
        place = exercises.PLACES[name]
        path = directory / f"{place.partition('.')[0]}.py"
        text = path.read_text(encoding="utf-8")
        if name == "own_method":
            text = text.replace("METHODS = {", "METHODS = {\n    " + body.strip("{}") + ",")
        else:
            line = next(line for line in text.splitlines() if f'"{place} is yours to write"' in line)
            body = "import torch.nn.functional as F\n" + ("return " + body if is_expression(body) else body)
            text = text.replace(line, textwrap.indent(body, line[:len(line) - len(line.lstrip())]))
        path.write_text(text, encoding="utf-8")


def right(*names):
    return {name: RIGHT[name][0][1] for name in names}


def graded(capfd, *arguments):
    """What `grade` prints: {exercise: "passed" or "failed: ..."}, the last line, the exit status."""
    status = exercises.main(["grade", *map(str, arguments)])
    *lines, last = capfd.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines), last, status


def test_a_copy_has_open_exercises_and_no_solutions(tmp_path, capsys):
    assert exercises.main(["blank", "smooth", "adjust", "--out", str(tmp_path / "copy")]) == 0
    own, copied = functions(exercises.ROOT), functions(tmp_path / "copy")
    changed = [place for place in own if own[place] != copied[place]]
    assert changed == ["priors.smooth", "losses.adjust"]
    for place in changed:
        doc = own[place][:own[place].rindex('"""') + 3]
        assert copied[place] == doc + f"\n    raise NotImplementedError('{place} is yours to write')"
    files = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    assert files == {*exercises.COPIED, "exercises.txt"}, "nothing that an exercise does not need"
    assert exercises.main(["blank", "all", "--out", str(tmp_path / "copy")]) == 2  # it is not empty any more
    assert "not empty" in capsys.readouterr().err


def test_without_formulas_no_docstring_comment_or_table_shows_one(tmp_path):
    exercises.blank(exercises.NAMES, tmp_path, formulas=False)
    for name in exercises.MODULES:
        text = (tmp_path / name).read_text(encoding="utf-8")
        compile(text, name, "exec")
        documented = [node for node in ast.walk(ast.parse(text)) if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        shown = "\n".join([ast.get_docstring(node) or "" for node in documented] + [
            line.partition("  # ")[2] for line in text.splitlines()])
        for remnant in ("(1 - alpha_min)", "^alpha", "exp(", "+ eps", "+ 1e-9", "^(1/T)", "mean_", "<-", "log P"):
            assert remnant not in shown, f"{name}: {remnant}"
    for place in ("priors.alpha_schedule", "priors.smooth", "priors.imbalance_temperature", "losses.adjust",
                  "losses.complementary_loss"):
        assert "[formula]" in functions(tmp_path)[place], f"{place}: its docstring stays, but for the formula"
    assert not (tmp_path / "README.md").exists()


def test_no_file_that_is_copied_gives_an_answer_away(tmp_path):
    """Outside of its own function an answer stands nowhere: not in a test, a message or a helper."""
    exercises.blank(exercises.NAMES, tmp_path, formulas=False)
    for path in tmp_path.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        for answer in ("math.log(m", "log(0.5)", "log(2)", "lerp", "1 - self.decay", "1 - decay", "<- m", "(1 - m)",
                       "1.0 - self.momentum", "KL(P_bal", "P_bal from", "imbalance_temperature(self", "log(source",
                       "log_softmax(adj", ".detach().log()", "arithmetic mean", "geometric mean", "d.mean()"):
            assert answer not in text, f"{path.name}: {answer}"


def test_the_sentences_of_the_tests_hold_no_formula():
    for rows in test_exercises.PROPERTIES.values():
        for sentence, _ in rows:
            assert not exercises.FORMULA.search(sentence), sentence


def test_a_comment_that_is_a_formula_stays_a_comment():
    assert exercises.without_formulas("x = 1  # p^(1/T), normalised\n") == "x = 1  # [formula], normalised\n"


def test_a_solved_copy_passes(tmp_path, capfd):
    """An exercise of each module, and own_method."""
    names = ["smooth", "adjust", "weak", "reliability", "ema_update", "half_life", "own_method"]
    exercises.blank(exercises.NAMES, tmp_path)
    solve(tmp_path, right(*exercises.NAMES))
    found, last, status = graded(capfd, tmp_path, *names)
    assert status == 0 and last == f"{len(names)} of {len(names)} passed", found


def test_the_grader_says_what_was_handed_out_not_the_copy(tmp_path, capfd):
    exercises.blank(["smooth", "adjust", "complementary_loss"], tmp_path)
    solve(tmp_path, right("smooth", "complementary_loss"))
    (tmp_path / "exercises.txt").write_text("alpha_schedule\n", encoding="utf-8")
    found, last, status = graded(capfd, tmp_path, "smooth", "adjust", "complementary_loss")
    assert found == {"smooth": "passed", "adjust": "failed: losses.adjust is yours to write",
                     "complementary_loss": "failed: first mend adjust, which it uses"}
    assert (last, status) == ("1 of 3 passed", 1)
    assert list(graded(capfd, tmp_path)[0]) == exercises.NAMES, "without names, all"


TRICKS = {  # exercise: (a body, what the grade says); none may pass, or stop the others
    "alpha_schedule": ("while True:\n    pass", "no end within 2 seconds"),
    "smooth": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "adjust": ("import os\nos._exit(0)", "Python stopped before"),
    "weak": ("import pytest\npytest.skip('no')", "Skipped: no"),
    "half_life": ("import test_exercises\ntest_exercises.close = lambda *a: True\nreturn momentum * 10",
                  "changes the tests"),
    "at_target": ("import sys\nsys.modules['test_exercises'].PROPERTIES.clear()\nreturn logits", "is the posterior"),
    "temperature_of_counts": ("import test_exercises\ntest_exercises.close.__code__ = (lambda *a: True).__code__\n"
                              "return 1.0", "changes the tests"),
    "gradient_limit": ("torch.Tensor.__le__ = lambda *a: torch.tensor(True)\nreturn 2, 0 * logits",
                       "changes the tests"),
}


def test_no_trick_passes_or_stops_the_grading(tmp_path, capfd):
    exercises.blank([*TRICKS, "ema_update"], tmp_path)
    solve(tmp_path, {name: body for name, (body, _) in TRICKS.items()} | right("ema_update"))
    found = graded(capfd, tmp_path, "alpha_schedule", "--timeout", 2)[0]
    found |= graded(capfd, tmp_path, *[name for name in TRICKS if name != "alpha_schedule"], "ema_update")[0]
    assert found.pop("ema_update") == "passed"
    for name, (_, says) in TRICKS.items():
        assert found[name].startswith("failed: ") and says in found[name], f"{name}: {found[name]}"


def test_a_module_that_python_cannot_read_is_a_failure_with_the_reason(tmp_path, capfd):
    exercises.blank(["smooth"], tmp_path)
    solve(tmp_path, {"smooth": "return ("})
    assert "SyntaxError" in graded(capfd, tmp_path, "smooth")[0]["smooth"]


def test_the_summary_of_a_failure_holds_the_whole_sentence(tmp_path):
    exercises.blank(["smooth"], tmp_path)
    solve(tmp_path, {"smooth": "q ** alpha"})
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_exercises.py", "-k", "smooth"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", "ADELLO_EXERCISES": ""})
    line = next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert "the target prior sums to 1: normalise after the power" in line

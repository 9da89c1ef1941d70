"""The tests of the exercises, tested: each wrong version of a function must fail its own exercise's test, and right
ones that are written otherwise must pass.

A version is the body that a student writes below the module's own signature: an expression or statements. Where it
begins with "def" or "@" it takes the place of the signature, too. The third entry of a wrong version, where there is
one, stands in the message that the student gets.
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
    ("d is always 1", "1 - (1 - alpha_min) * step / total_steps"),
    ("alpha_min is always 0.1", "1 - 0.9 * (step / total_steps) ** d", "alpha_min is given"),
    ("no alpha_min", "1 - (step / total_steps) ** d", "alpha is alpha_min"),
    ("alpha_min cuts the curve", "max(alpha_min, 1 - (step / total_steps) ** d)", "not cut the curve off"),
    ("division the wrong way round", "1 - (1 - alpha_min) * (total_steps / max(step, 1)) ** d"),
    ("rises", "alpha_min + (1 - alpha_min) * (step / total_steps) ** d", "alpha is 1 at step 0"),
    ("rounded", "round(1 - (1 - alpha_min) * (step / total_steps) ** d, 3)", "falls at every step"),
    ("by percent", "1 - (1 - alpha_min) * (int(100 * step / total_steps) / 100) ** d", "falls at every step"),
    ("default d 1", "def alpha_schedule(step, total_steps, alpha_min=0.1, d=1.0):\n"
     "    return 1 - (1 - alpha_min) * (step / total_steps) ** d", "the paper's"),
    ("default alpha_min 0", "def alpha_schedule(step, total_steps, alpha_min=0.0, d=2.0):\n"
     "    return 1 - (1 - alpha_min) * (step / total_steps) ** d", "the paper's"),
    ("nothing returned", "alpha = 1 - (1 - alpha_min) * (step / total_steps) ** d\nreturn"),
]
RIGHT["alpha_schedule"] = [
    ("from below", "alpha_min + (1 - alpha_min) * (1 - (step / total_steps) ** d)"),
    ("mixed", "share = pow(step / total_steps, d)\nreturn (1 - share) * 1 + share * alpha_min"),
    ("a tensor", "1 - (1 - alpha_min) * (torch.tensor(step, dtype=torch.float64) / total_steps) ** d"),
]

# -------------------------------------------------------------------------------------------- smooth

WRONG["smooth"] = [
    ("not normalised", "q ** alpha", "sums to 1"),
    ("normalised first, then the power", "(q / q.sum()) ** alpha", "sums to 1"),
    ("softmax of alpha q", "(alpha * q).softmax(0)", "alpha = 1 keeps"),
    ("temperature 1 / alpha the wrong way round", "(q.log() / max(alpha, 1e-9)).softmax(0)"),
    ("1 / alpha", "p = q ** (1 / max(alpha, 1e-3))\nreturn p / p.sum()"),
    ("1 - alpha", "p = q ** (1 - alpha)\nreturn p / p.sum()", "alpha = 1 keeps"),
    ("mixed with the uniform prior", "alpha * q + (1 - alpha) / len(q)", "every ratio"),
    ("alpha above 1 is cut", "p = q ** min(alpha, 1)\nreturn p / p.sum()"),
    ("writes into the prior", "q.pow_(alpha)\nreturn q / q.sum()", "arguments are the same"),
    ("writes the sum into the prior", "p = q ** alpha if alpha != 1 else q\np /= p.sum() * (1 + 1e-15)\n"
     "q.copy_(p)\nreturn p", "arguments are the same"),
    ("1e-9 added", "p = (q + 1e-9) ** alpha\nreturn p / p.sum()", "rare class"),
    ("clamped at 1e-6", "p = q.clamp(min=1e-6) ** alpha\nreturn p / p.sum()", "rare class"),
    ("always float64", "p = q.double() ** alpha\nreturn p / p.sum()", "float32 in"),
    ("always float32", "p = q.float() ** alpha\nreturn p / p.sum()"),
    ("filled on the CPU", "p = torch.zeros(len(q), dtype=q.dtype)\np += q ** alpha\nreturn p / p.sum()", "device"),
    ("a list", "total = sum(x ** alpha for x in q.tolist())\nreturn [x ** alpha / total for x in q.tolist()]"),
    ("Python floats, back to the CPU", "p = [x ** alpha for x in q.tolist()]\n"
     "return torch.tensor([x / sum(p) for x in p], dtype=q.dtype)", "GPU"),
]
RIGHT["smooth"] = [
    ("softmax of logarithms", "q ** 0 / len(q) if alpha == 0 else (alpha * q.log()).softmax(0)"),
    ("normalize", "torch.nn.functional.normalize(q ** alpha, p=1, dim=0)"),
    ("a loop", "p = torch.empty_like(q)\ntotal = 0\nfor k in range(len(q)):\n    p[k] = q[k] ** alpha\n"
     "    total = total + p[k]\nreturn p / total"),
    ("a list", "powers = [x ** alpha for x in q]\nreturn torch.stack([x / sum(powers) for x in powers])"),
    ("a copy in place", "p = q.clone().pow_(alpha)\nreturn p.div_(p.sum())"),
    ("numpy, there and back", "p = q.cpu().numpy() ** float(alpha)\nreturn torch.from_numpy(p / p.sum()).to(q)"),
    ("type_as", "p = torch.zeros(len(q)).type_as(q) + q ** alpha\nreturn p / p.sum()"),
]

# ----------------------------------------------------------------------------- imbalance_temperature

K_U = "u = torch.full_like(q_hat, 1 / len(q_hat))\n"
WRONG["imbalance_temperature"] = [
    ("KL the other way round", K_U + "return (q_hat * (q_hat / u).log()).sum().exp()", "direction"),
    ("no exponential", K_U + "return (u * (u / q_hat).log()).sum()"),
    ("exponential of each class", K_U + "return (u * (u / q_hat).log()).exp().sum()"),
    ("1 + KL", K_U + "return 1 + (u * (u / q_hat).log()).sum()", "T is 1.25"),
    ("minus KL", K_U + "return (u * (q_hat / u).log()).sum().exp()", "at least 1"),
    ("base 2 in the logarithm", K_U + "return (u * (u / q_hat).log2()).sum().exp()"),
    ("exponential of the entropy", "(-(q_hat * q_hat.log()).sum()).exp()", "T is 1 at"),
    ("K over the perplexity", "len(q_hat) / (-(q_hat * q_hat.log()).sum()).exp()"),
    ("geometric over harmonic mean", "(1 / q_hat).mean() * q_hat.log().mean().exp()"),
    ("clamped at 1e-3", "q = q_hat.clamp(min=1e-3)\n" + K_U + "return (u * (u / q).log()).sum().exp()", "rare class"),
    ("clamped at 1e-6", "q = q_hat.clamp(min=1e-6)\n" + K_U + "return (u * (u / q).log()).sum().exp()", "rare class"),
    ("a number", K_U + "return (u * (u / q_hat).log()).sum().exp().item()", "a tensor without dimensions"),
    ("one number in a row", K_U + "return (u * (u / q_hat).log()).sum().exp().view(1)", "without dimensions"),
    ("uniform prior in float32", "return kl_divergence(uniform(len(q_hat), q_hat.device, torch.float32), q_hat).exp()",
     "dtype"),
    ("uniform prior in float64", "u = torch.full((len(q_hat),), 1 / len(q_hat), dtype=torch.float64, "
     "device=q_hat.device)\nreturn (u * (u / q_hat).log()).sum().exp()", "float32 in"),
    ("uniform prior on the CPU", "return kl_divergence(torch.full((len(q_hat),), 1 / len(q_hat), dtype=q_hat.dtype), "
     "q_hat).exp()", "device"),
    ("writes into the prior", "return (q_hat.log_().mean().neg() - torch.tensor(float(len(q_hat))).log()).exp()"),
    ("writes into the prior and restores nothing", "t = kl_divergence(uniform(len(q_hat), q_hat.device, q_hat.dtype), "
     "q_hat).exp()\nq_hat.div_(2)\nreturn t", "arguments are the same"),
]
RIGHT["imbalance_temperature"] = [
    ("by the mean logarithm", "(-q_hat.log().mean()).exp() / len(q_hat)"),
    ("F.kl_div", "return torch.nn.functional.kl_div(q_hat.log(), torch.full_like(q_hat, 1 / len(q_hat)), "
     "reduction='sum').exp()"),
    ("a loop", "import math\ntotal = 0.0\nfor q in q_hat.tolist():\n    total += math.log(1 / len(q_hat) / q) / "
     "len(q_hat)\n"
     "return torch.tensor(math.exp(total), dtype=q_hat.dtype, device=q_hat.device)"),
    ("a loop over tensors", "total = 0\nfor q in q_hat:\n    total = total - (q * len(q_hat)).log() / len(q_hat)\n"
     "return total.exp()"),
    ("numpy", "import numpy as np\nreturn torch.tensor(np.exp(-np.log(q_hat.numpy() * len(q_hat)).mean()), "
     "dtype=q_hat.dtype)"),
]

# -------------------------------------------------------------------------------------------- adjust

NONE = "if source is None:\n    return logits\n"
WRONG["adjust"] = [
    ("sign", NONE + "return logits - ((source + 1e-9) / (target + 1e-9)).log()", "check the sign"),
    ("priors swapped", NONE + "return logits + ((target + 1e-9) / (source + 1e-9)).log()", "above the line"),
    ("no eps", NONE + "return logits + (source / target).log()", "stays finite"),
    ("eps inside the ratio", NONE + "return logits + (source / target + 1e-9).log()", "stays finite"),
    ("eps 1e-8", NONE + "return logits + ((source + 1e-8) / (target + 1e-8)).log()", "1e-9 is added"),
    ("eps 1e-12", NONE + "return logits + ((source + 1e-12) / (target + 1e-12)).log()", "1e-9 is added"),
    ("no case for None", "return logits + ((source + 1e-9) / (target + 1e-9)).log()"),
    ("None for None", "if source is not None:\n    return logits + ((source + 1e-9) / (target + 1e-9)).log()", "None"),
    ("None is log-softmax", "if source is None:\n    return logits.log_softmax(1)\n"
     "return logits + ((source + 1e-9) / (target + 1e-9)).log()", "None"),
    ("None centres", "if source is None:\n    return logits - logits.mean(1, keepdim=True)\n"
     "return logits + ((source + 1e-9) / (target + 1e-9)).log()", "None"),
    ("logits detached", NONE + "return logits.detach() + ((source + 1e-9) / (target + 1e-9)).log()", "detached"),
    ("no_grad", NONE + "with torch.no_grad():\n    return logits + ((source + 1e-9) / (target + 1e-9)).log()",
     "detached"),
    ("writes into the logits", NONE + "logits += ((source + 1e-9) / (target + 1e-9)).log()\nreturn logits"),
    ("writes into the logits' data", NONE + "logits.data += ((source + 1e-9) / (target + 1e-9)).log()\nreturn logits"),
    ("log-softmax of the sum", NONE + "return (logits + ((source + 1e-9) / (target + 1e-9)).log()).log_softmax(1)"),
    ("log-softmax first", NONE + "return logits.log_softmax(1) + ((source + 1e-9) / (target + 1e-9)).log()"),
    ("ratio on the CPU", NONE + "r = torch.zeros(len(source), dtype=logits.dtype)\n"
     "return logits + (r + (source + 1e-9).log() - (target + 1e-9).log())", "device"),
    ("float32 within", NONE + "return logits + ((source.float() + 1e-9) / (target.float() + 1e-9)).log().double()"),
    ("float64 out", NONE + "return logits.double() + ((source + 1e-9) / (target + 1e-9)).log()", "float32 in"),
    ("gradient doubled", NONE + "return 2 * logits - logits.detach() + ((source + 1e-9) / (target + 1e-9)).log()",
     "gradient reaches"),
    ("rows stacked, of which there may be none",
     NONE + "return torch.stack([x + ((source + EPS) / (target + EPS)).log() for x in logits])", "may be empty"),
]
RIGHT["adjust"] = [
    ("difference of logarithms", NONE + "return logits + torch.log(source + 1e-9) - torch.log(target + 1e-9)"),
    ("a loop over classes", NONE + "import math\nreturn torch.stack([logits[:, k] + math.log((s + 1e-9) / (t + 1e-9)) "
     "for k, (s, t) in enumerate(zip(source.tolist(), target.tolist()))], dim=1)"),
    ("a loop over rows", NONE + "out = torch.empty_like(logits)\nfor i, row in enumerate(logits):\n"
     "    out[i] = row + ((source + 1e-9) / (target + 1e-9)).log()\nreturn out"),
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
    ("no adjustment", ccr(prediction="q = F.log_softmax(logits_strong / temperature, dim=1)\n"), "log-ratio is added"),
    ("adjusted after the division by T", ccr(prediction="q = F.log_softmax(adjust(logits_strong / temperature, q_hat, "
     "q_alpha), dim=1)\n"), "before the division"),
    ("priors swapped", ccr(prediction=LOGQ.replace("q_hat, q_alpha", "q_alpha, q_hat")), "swapped"),
    ("label adjusted, too", ccr("p = F.softmax(adjust(probs_weak.detach().log(), q_hat, q_alpha) / temperature, "
     "dim=1)\n"), "only the prediction gets the log-ratio"),
    ("only the label adjusted", ccr("p = F.softmax(adjust(probs_weak.detach().log(), q_hat, q_alpha) / temperature, "
     "dim=1)\n", "q = F.log_softmax(logits_strong / temperature, dim=1)\n")),
    ("label not detached", ccr(LABEL.replace(".detach()", "")), "detach it"),
    ("logits detached", ccr(prediction=LOGQ.replace("logits_strong", "logits_strong.detach()"))),
    ("KL in place of cross-entropy", ccr(mean="return ((1 - mask) * (torch.xlogy(p, p) - p * q).sum(dim=1)).mean()"),
     "KL divergence"),
    ("writes into the logits", "logits_strong = logits_strong.data.div_(temperature).mul_(temperature).add_(1) - 1 + "
     "(logits_strong - logits_strong.detach())\n" + ccr(), "arguments are the same"),
    ("writes into the probabilities", ccr("p = probs_weak.detach().pow_(1 / float(temperature))\n"
     "p /= p.sum(1, keepdim=True)\n"), "arguments are the same"),
    ("mask in place of 1 - mask", ccr(mean=MEAN.replace("(1 - mask)", "mask")), "masked"),
    ("no mask", ccr(mean="return -(p * q).sum(dim=1).mean()"), "masked"),
    ("mean over the selected images", ccr(mean="w = 1 - mask\nreturn (w * -(p * q).sum(dim=1)).sum() / "
     "w.sum().clamp(min=1)"), "the whole batch, not"),
    ("sum over the batch", ccr(mean="return ((1 - mask) * -(p * q).sum(dim=1)).sum()")),
    ("mean over images and classes", ccr(mean="return ((1 - mask)[:, None] * -p * q).mean()")),
    ("one loss for each image", ccr(mean="return (1 - mask) * -(p * q).sum(dim=1)"), "one number"),
    ("sign", ccr(mean="return ((1 - mask) * (p * q).sum(dim=1)).mean()")),
    ("hard label", ccr("p = F.one_hot(probs_weak.argmax(1), probs_weak.shape[1]).to(probs_weak.dtype)\n"), "argmax"),
    ("label not softened", ccr("p = probs_weak.detach()\n"), "softened"),
    ("label sharpened, p^T", ccr("p = F.softmax(probs_weak.detach().log() * temperature, dim=1)\n")),
    ("label not normalised", ccr("p = probs_weak.detach() ** (1 / temperature)\n"), "normalised"),
    ("logarithm of a softmax", ccr(prediction="q = F.softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, "
     "dim=1).log()\n"), "large logits"),
    ("factor T squared", ccr(mean=MEAN + " * temperature ** 2"), "T squared"),
    ("label and prediction swapped", ccr(mean="return ((1 - mask) * -(q.exp() * p.log()).sum(dim=1)).mean()"),
     "not the other way round"),
    ("NaN where p is 0", ccr("p = probs_weak.detach()\n", mean="l = p.log() / temperature\n"
     "p = (l - torch.log((probs_weak.detach() ** (1 / temperature)).sum(1, keepdim=True))).exp()\n"
     "return ((1 - mask) * (-(p * q) + 0 * p * l).sum(dim=1)).mean()"), "exactly 0"),
    ("p clamped at 1e-3", ccr(LABEL.replace("probs_weak", "probs_weak.clamp(min=1e-3)")), "not clamped"),
    ("p clamped at 1e-6", ccr(LABEL.replace("probs_weak", "probs_weak.clamp(min=1e-6)")), "not clamped"),
    ("target prior uniform", ccr(prediction="q = F.log_softmax(adjust(logits_strong, q_hat, None if q_hat is None else "
     "torch.full_like(q_hat, 1 / len(q_hat))) / temperature, dim=1)\n")),
    ("float32 within", "logits_strong = logits_strong.float().to(probs_weak.dtype)\n" + ccr()),
    ("T as a number only", "temperature = float(f'{temperature:.1f}') if isinstance(temperature, float) else "
     "float('nan')\n" + ccr(), "a tensor without dimensions"),
    ("weights on the CPU", ccr(mean="w = torch.ones(len(mask), dtype=mask.dtype) - mask\n"
     "return (w * -(p * q).sum(dim=1)).mean()"), "device"),
    ("number out", ccr(mean=MEAN + ".item()"), "one number"),
    ("always float64", ccr(LABEL.replace("probs_weak", "probs_weak.double()")), "float32 in"),
]
RIGHT["complementary_loss"] = [
    ("p ** (1 / T) normalised", ccr("p = probs_weak.detach() ** (1 / temperature)\np = p / p.sum(1, keepdim=True)\n")),
    ("F.cross_entropy", LABEL + "losses = F.cross_entropy(adjust(logits_strong, q_hat, q_alpha) / temperature, p, "
     "reduction='none')\nreturn (losses * (1 - mask)).mean()"),
    ("no_grad", "with torch.no_grad():\n    p = probs_weak ** (1 / temperature)\n    p = p / p.sum(dim=1, "
     "keepdim=True)\n"
     + ccr("")),
    ("sum over N", ccr(mean="return -((1 - mask)[:, None] * p * q).sum() / len(mask)")),
    ("a loop", "total = 0 * logits_strong.sum()\nadjusted = adjust(logits_strong, q_hat, q_alpha)\n"
     "for i in range(len(mask)):\n    if mask[i] == 0:\n        p = probs_weak[i].detach() ** (1 / temperature)\n"
     "        p = p / p.sum()\n        total = total - (p * (adjusted[i] / temperature).log_softmax(0)).sum()\n"
     "return total / len(mask)"),
    ("adjusted by hand", ccr(prediction="f = logits_strong\nif q_hat is not None:\n    f = f + (q_hat + 1e-9).log() - "
     "(q_alpha + 1e-9).log()\nf = f / temperature\nq = f - f.logsumexp(dim=1, keepdim=True)\n")),
    ("1e-12 in the logarithm", ccr(LABEL.replace(".log()", ".add(1e-12).log()"))),
    ("where", ccr(mean="losses = -(p * q).sum(dim=1)\n"
     "return torch.where(mask > 0, torch.zeros_like(losses), losses).mean()")),
]

# ---------------------------------------------------------------------------------------------- weak


def weak(pad="images.shape[-1] // 8", border="padded = F.pad(images.float(), (pad,) * 4, "
         "mode='reflect').to(torch.uint8)",
         y="int(draws[i, 0] * (2 * pad + 1))", x="int(draws[i, 1] * (2 * pad + 1))", flip="draws[i, 2] < 0.5",
         mirror="view.flip(2)", view="padded[i, :, y:y + size, x:x + size]",
         back="torch.stack(views) if views else images.clone()"):
    """A weak view as a loop over the images, with one of its parts exchanged."""
    return (f"size = images.shape[-1]\npad = {pad}\n{border}\nviews = []\nfor i in range(len(images)):\n"
            f"    y = {y}\n    x = {x}\n    view = {view}\n    if {flip}:\n        view = {mirror}\n"
            f"    views.append(view)\nreturn {back}")


def padded(mode):
    return ("import numpy as np\nwidths = ((0, 0), (0, 0), (pad, pad), (pad, pad))\n"
            f"padded = torch.from_numpy(np.pad(images.numpy(), widths, {mode}))")


WRONG["weak"] = [
    ("pad 4 whatever the size", weak(pad="4")),
    ("pad 2 whatever the size", weak(pad="2")),
    ("pad a quarter", weak(pad="images.shape[-1] // 4"), "pad"),
    ("pad rounded up", weak(pad="-(-images.shape[-1] // 8)"), "rounded down"),
    ("black border", weak(border=padded("'constant'")), "not black"),
    ("edge repeated", weak(border=padded("'edge'")), "reflected"),
    ("reflection that repeats the edge", weak(border=padded("'symmetric'")), "row -1 is row 1"),
    ("last place left out", weak(y="int(draws[i, 0] * 2 * pad)", x="int(draws[i, 1] * 2 * pad)"), "last one included"),
    ("rounded", weak(y="round(float(draws[i, 0]) * 2 * pad)", x="round(float(draws[i, 1]) * 2 * pad)"), "equally"),
    ("crop along the diagonal", weak(x="y"), "independently"),
    ("flip with the draw of the row", weak(flip="draws[i, 0] < 0.5"), "mirror"),
    ("columns by the draw of the flip", weak(x="int(draws[i, 2] * (2 * pad + 1))"), "a draw of its own"),
    ("never mirrored", weak(flip="False"), "mirrored"),
    ("always mirrored", weak(flip="True"), "mirrored"),
    ("a quarter mirrored", weak(flip="draws[i, 2] < 0.25"), "half of the draws"),
    ("nearly all mirrored", weak(flip="draws[i, 2] < 0.95"), "half of the draws"),
    ("channels mirrored", weak(mirror="view.flip(0)"), "channels together"),
    ("random numbers of its own", "draws = torch.rand(len(images), 3)\n" + weak(), "all chance comes from"),
    ("random flip of its own", weak(flip="torch.rand(()) < 0.5")),
    ("floats out", weak(back="torch.stack(views).float()"), "uint8"),
    ("between 0 and 1", weak(back="torch.stack(views) / 255"), "uint8"),
    ("order of the batch turned", weak(back="torch.stack(views).flip(0)"), "view i is image i"),
    ("images of the batch mixed", weak(view="padded[i - 1, :, y:y + size, x:x + size]")),
    ("writes into the images", weak(back="images.copy_(torch.stack(views))"), "arguments are the same"),
    ("writes into the draws", "draws.mul_(0.999)\n" + weak(), "arguments are the same"),
    ("ends beyond the last place", weak(y="min(round(float(draws[i, 0]) * (2 * pad + 1)), 2 * pad + 1)", view=
     "padded[i].roll((0,), (0,))[:, min(y, 2 * pad):, x:][:, :size, :size]")),
    ("ranges on the CPU", """size = images.shape[-1]
pad = size // 8
places = (torch.arange(size) + (draws[:, :1] * (2 * pad + 1)).long() - pad).abs()
rows = size - 1 - (size - 1 - places).abs()
places = (torch.arange(size) + (draws[:, 1:2] * (2 * pad + 1)).long() - pad).abs()
columns = size - 1 - (size - 1 - places).abs()
columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
return pick(images, rows[:, None, :, None], columns[:, None, None, :])""", "device"),
    ("from the other end, one too far", weak(x="int((1 - draws[i, 1]) * (2 * pad + 1))"), "one beyond"),
    ("fails on an empty batch", weak(back="torch.stack(views)"), "may be empty"),
    ("the images", "images", "do not come back"),
]
RIGHT["weak"] = [
    ("a loop", weak()),
    ("numpy's padding", weak(border=padded("'reflect'"))),
    ("columns first", weak(y="int(draws[i, 1] * (2 * pad + 1))", x="int(draws[i, 0] * (2 * pad + 1))")),
    ("mirrored above a half", weak(flip="draws[i, 2] >= 0.5")),
    ("crops from the other end", weak(y="2 * pad - int(draws[i, 0] * (2 * pad + 1))")),
    ("mirrored first", weak(border="images = torch.where(draws[:, 2].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)\n"
     "padded = F.pad(images.float(), (pad,) * 4, mode='reflect').to(torch.uint8)", flip="False")),
    ("indexed without a loop", """size = images.shape[-1]
pad = size // 8
large = F.pad(images.float(), (pad,) * 4, mode="reflect").to(images.dtype)
axis = torch.arange(size, device=images.device)
start = (draws[:, :2] * (2 * pad + 1)).floor().long()
rows = (start[:, :1] + axis)[:, :, None]
columns = (start[:, 1:] + axis)[:, None, :]
batch = torch.arange(len(images), device=images.device)[:, None, None]
views = large.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)
return torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), views.flip(3), views)"""),
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
     "second column is the accuracy"),
    ("share last", bins("right[mine].mean(), confidence[mine].mean(), len(mine) / len(labels)")),
    ("numbers in place of shares", bins("len(mine), right[mine].mean(), confidence[mine].mean()"), "not their number"),
    ("share of the bins", bins("len(mine) / num_bins, right[mine].mean(), confidence[mine].mean()")),
    ("share of the right ones", bins("len(mine) / right.sum().clamp(min=1), right[mine].mean(), "
                                     "confidence[mine].mean()")),
    ("means over all samples", bins("len(mine) / len(labels), right[mine].sum() / len(labels), "
     "confidence[mine].sum() / len(labels)")),
    ("middle of the bin", bins("len(mine) / len(labels), right[mine].mean(), (b + 0.5) / num_bins"), "not its middle"),
    ("median confidence", bins("len(mine) / len(labels), right[mine].mean(), confidence[mine].median()")),
    ("NaN in empty bins", bins(empty="0.0, float('nan'), float('nan')"), "not NaN"),
    ("middle in empty bins", bins(empty="0.0, 0.0, (b + 0.5) / num_bins"), "empty bin"),
    ("one in empty bins", bins(empty="0.0, 1.0, 1.0"), "empty bin"),
    ("lower edge included", bins(where="(confidence >= b / num_bins) & (confidence < (b + 1) / num_bins) | "
     "(b == num_bins - 1) & (confidence == 1)"), "(lower, upper]"),
    ("1 lost", bins(where="(confidence >= b / num_bins) & (confidence < (b + 1) / num_bins)"), "(lower, upper]"),
    ("0 lost", bins(where="(confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)"), "confidence of 0"),
    ("bins of equal number", bins(where="(confidence.argsort().argsort() * num_bins // len(labels)) == b")),
    ("always 15 bins", bins(before="num_bins = 15"), "row for each bin"),
    ("10 bins by default", "def reliability(probs, labels, num_bins=10):\n" + textwrap.indent(bins(), "    "),
     "15 bins"),
    ("confidence of the true class", bins(confidence="probs[torch.arange(len(labels)), labels]"), "true class"),
    ("right by label 0", bins(right="(labels == 0).double()")),
    ("a row for each column", bins(back="torch.tensor(rows, dtype=torch.float64).T"), "(num_bins, 3)"),
    ("float32", bins(before="probs = probs.float()")),
    ("float32 out", bins(back="torch.tensor(rows)"), "no float32"),
    ("rounded", bins(back="torch.tensor(rows, dtype=torch.float64).mul(1e3).round() / 1e3")),
    ("writes into the probabilities", "order = probs[:, 0].sort().indices\nprobs.copy_(probs[order])\n"
     "labels.copy_(labels[order])\n" + bins(), "arguments are the same"),
    ("rounded to percents", bins(confidence="probs.amax(1).mul(100).round() / 100"), "precise"),
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
    ("ceil and scatter", VALID + """confidence, predicted = probs.max(1)
index = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
sums = torch.zeros(num_bins, 3, dtype=probs.dtype)
right = (predicted == labels).to(probs.dtype)
sums.index_add_(0, index, torch.stack([torch.ones_like(confidence), right, confidence], 1))
share = sums[:, :1] / len(labels)
return torch.cat([share, sums[:, 1:] / sums[:, :1].clamp(min=1)], 1)"""),
    ("one-hot bins", VALID + """confidence, predicted = probs.max(1)
index = (torch.searchsorted(torch.linspace(0, 1, num_bins + 1, dtype=probs.dtype), confidence) - 1).clamp(0)
member = torch.nn.functional.one_hot(index, num_bins).to(probs.dtype)
n = member.sum(0)
columns = [n / n.sum(), (predicted == labels).to(probs.dtype) @ member / n, confidence @ member / n]
return torch.stack(columns, 1).nan_to_num(0)"""),
]

# ---------------------------------------------------------------------------------------- ema_update

LERP = "for a, b in zip(self.model.parameters(), model.parameters()):\n" \
       "    a.mul_(self.decay).add_(b, alpha=1 - self.decay)\n"
COPY = "for a, b in zip(self.model.buffers(), model.buffers()):\n    a.copy_(b)\n"
PLAIN = "def update(self, model):\n"
WRONG["ema_update"] = [
    ("both with decay", LERP.replace("alpha=1 - self.decay", "alpha=self.decay") + COPY),
    ("new one at full weight", LERP.replace(", alpha=1 - self.decay", "") + COPY),
    ("copied", "self.model.load_state_dict(model.state_dict())", "not copied"),
    ("decay 0.9 always", LERP.replace("self.decay", "0.9") + COPY, "given to EMA"),
    ("start corrected", "self.n = getattr(self, 'n', 0) + 1\nw = (1 - self.decay) / (1 - self.decay ** self.n)\n"
     + LERP.replace("1 - self.decay", "w").replace("self.decay", "1 - w") + COPY),
    ("weights only", LERP.replace("    a", "    if a.ndim > 1: a") + COPY, "biases"),
    ("frozen parameters skipped", LERP.replace("    a", "    if b.requires_grad: a") + COPY, "frozen"),
    ("buffers skipped", LERP, "statistics are copied"),
    ("counter skipped", LERP + COPY.replace("    a", "    if a.is_floating_point(): a"), "counter"),
    ("counter as a float", LERP + COPY + "self.model[1].num_batches_tracked = model[1].num_batches_tracked.float()",
     "counter"),
    ("everything averaged by state_dict", "new = model.state_dict()\nfor name, a in self.model.state_dict().items():\n"
     "    a.copy_(self.decay * a + (1 - self.decay) * new[name])\n", "not averaged"),
    ("counter shared", LERP + COPY +
     "self.model[1].num_batches_tracked = model[1].num_batches_tracked", "do not share"),
    ("buffers shared by data", LERP + COPY.replace("a.copy_(b)", "a.data = b.data"), "do not share"),
    ("parameters bound to new ones", LERP + COPY + "for m in self.model:\n    m.weight = torch.nn.Parameter("
     "m.weight.detach().clone(), requires_grad=False)\n", "written in place"),
    ("network replaced", "old = self.model\nself.model = copy.deepcopy(old)\n" + LERP + COPY, "not replaced"),
    ("model's buffers changed", LERP + COPY + "model[1].num_batches_tracked.zero_()", "not changed"),
    ("model set to evaluation", "model.eval()\n" + LERP + COPY, "training mode"),
    ("average set to training", LERP + COPY + "self.model.train()", "evaluation mode"),
    ("a graph", PLAIN + textwrap.indent(LERP + COPY, "    "), "no_grad"),
    ("gradients switched on", LERP + COPY + "self.model.requires_grad_(True)", "graph"),
    ("nothing written", "for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "    a = self.decay * a + (1 - self.decay) * b\n" + COPY),
    ("nothing done", "pass"),
    ("moved to the CPU", LERP.replace("a.mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "a.data = (self.decay * a + (1 - self.decay) * b).cpu()") + COPY, "GPU"),
]
RIGHT["ema_update"] = [
    ("a loop", LERP + COPY),
    ("lerp_", LERP.replace("mul_(self.decay).add_(b, alpha=1 - self.decay)", "lerp_(b, 1 - self.decay)") + COPY),
    ("copy_ of the sum", LERP.replace("mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "copy_(self.decay * a + (1 - self.decay) * b)") + COPY),
    ("data, without no_grad", PLAIN + "    for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "        a.data.mul_(self.decay).add_(b.data, alpha=1 - self.decay)\n" + textwrap.indent(COPY, "    ")),
    ("by names", "new = dict(model.named_parameters())\nfor name, a in self.model.named_parameters():\n"
     "    a += (1 - self.decay) * (new[name] - a)\nnew = dict(model.named_buffers())\n"
     "for name, a in self.model.named_buffers():\n    a.copy_(new[name])\n"),
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
    ("momentum 0.999 always", MIX.replace("self.momentum", "0.999") + SET_T),
    ("momentum 0.9 always", MIX.replace("self.momentum", "0.9") + SET_T, "given to the estimator"),
    ("confident images only", "sure = probs[probs.amax(1) > 0.59]\nif len(sure):\n    probs = sure\n" + MIX + SET_T,
     "no threshold"),
    ("T never", MIX, "T is computed"),
    ("T at every step", MIX + SET_T.replace("if first_ccr_step:", "if True:"), "not touched"),
    ("T from the first CCR step on", MIX + "self.on = getattr(self, 'on', False) or first_ccr_step\n"
     + SET_T.replace("first_ccr_step", "self.on"), "stays as it is"),
    ("T before the update", SET_T + MIX, "updates Qhat first"),
    ("Qhat frozen with T", "self.done = getattr(self, 'done', False) or first_ccr_step\n"
     "if not self.done or first_ccr_step:\n"
     "    " + MIX + SET_T, "Qhat moves at every step"),
    ("no update in the first CCR step", "if not first_ccr_step:\n    " + MIX + SET_T),
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
    ("lerp_", "self.q_hat.lerp_(probs.mean(0), 1 - self.momentum)\n" + SET_T),
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
    ("half of that", "0.5 / (1 - momentum)"),
    ("upside down", "math.log(momentum) / math.log(0.5)"),
    ("sign", "math.log(2) / math.log(momentum)"),
    ("linear", "math.log(2) / (1 - momentum)"),
    ("base 2 in one logarithm", "math.log2(0.5) / math.log(momentum)"),
    ("None", "None", "number of updates comes out"),
    ("a string", "str(round(math.log(0.5) / math.log(momentum)))", "number of updates comes out"),
    ("linear, rounded", "round(math.log(2) / (1 - momentum))", "does not leave a half"),
    ("one more", "math.ceil(math.log(0.5) / math.log(momentum)) + 1", "off by one"),
]
RIGHT["half_life"] = [
    ("logarithms", "math.log(0.5) / math.log(momentum)"),
    ("base m", "math.log(0.5, momentum)"),
    ("counted", "n = 0\nleft = 1.0\nwhile left > 0.5:\n    left *= momentum\n    n += 1\nreturn n"),
    ("rounded up", "math.ceil(math.log2(0.5) / math.log2(momentum))"),
    ("two digits", "round(math.log(0.5) / math.log(momentum), 2)"),
    ("float32", "torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(momentum))"),
    ("rounded", "round(math.log(0.5) / math.log(momentum))"),
]

WRONG["at_target"] = [
    ("sign", "logits + (source / target).log()", "the sign"),
    ("nothing moved", "logits", "is the posterior"),
    ("only the source taken out", "logits - source.log()", "need not be uniform"),
    ("ratio without logarithm", "logits + target / source"),
    ("probabilities weighted", "logits.softmax(1) * target / source"),
    ("posterior in place of logits", "p = logits.softmax(1) * target / source\nreturn p / p.sum(1, keepdim=True)",
     "logits go in"),
    ("writes into the logits", "logits += (target / source).log()\nreturn logits", "arguments are the same"),
    ("along the batch", "if len(logits) == len(source):\n    return (logits.T + (target / source).log()).T\n"
     "return logits + (target / source).log()", "class k"),
    ("ratio clamped", "logits + (target / source).clamp(0.01, 100).log()", "far apart"),
    ("rows stacked, of which there may be none",
     "return torch.stack([row + (target / source).log() for row in logits])", "may be empty"),
    ("the first row alone", "logits[0] + (target / source).log()", "(N, K) in"),
]
RIGHT["at_target"] = [
    ("log-ratio", "logits - (source / target).log()"),
    ("two steps", "logits.log_softmax(1) - source.log() + target.log()"),
    ("posterior's logarithm", "p = logits.softmax(1) * target / source\nreturn (p / p.sum(1, keepdim=True)).log()"),
    ("losses.adjust, priors swapped", "from losses import adjust\nreturn adjust(logits, target, source)"),
]

GM = "geometric = math.exp(sum(math.log(n) for n in counts) / len(counts))\n"
WRONG["temperature_of_counts"] = [
    ("upside down", GM + "return geometric / (sum(counts) / len(counts))"),
    ("product", "product = 1.0\nfor n in counts:\n    product *= n\nreturn sum(counts) / len(counts) / "
     "product ** (1 / len(counts))", "without it"),
    ("arithmetic over harmonic", "return sum(counts) / len(counts) ** 2 * sum(1 / n for n in counts)"),
    ("arithmetic mean", "return sum(counts) / len(counts)"),
    ("logarithm of the ratio", GM + "return math.log(sum(counts) / len(counts) / geometric)"),
    ("sorts the caller's list", "counts.sort()\n" + GM + "return sum(counts) / len(counts) / geometric", "caller's"),
    ("empties the caller's list", "mean, K, total = sum(counts) / len(counts), len(counts), 0.0\nwhile counts:\n"
     "    total += math.log(counts.pop())\nreturn mean / math.exp(total / K)", "caller's"),
]
RIGHT["temperature_of_counts"] = [
    ("arithmetic over geometric mean", GM + "return sum(counts) / len(counts) / geometric"),
    ("tensors", "n = torch.tensor(counts, dtype=torch.float64)\nreturn (n.mean() / n.log().mean().exp()).item()"),
    ("by roots", "geometric = 1.0\nfor n in counts:\n    geometric *= n ** (1 / len(counts))\n"
     "return sum(counts) / len(counts) / geometric"),
]

WRONG["gradient_limit"] = [
    ("power 1", "d = logits - probs.log()\nreturn 1, (d - d.mean()) / len(d)", "n is too small"),
    ("power 3", "d = logits - probs.log()\nreturn 3, (d - d.mean()) / len(d)", "n is too large"),
    ("power 0", "return 0, logits.softmax(0) - probs"),
    ("power 2 and the gradient at T = 1", "return 2, logits.softmax(0) - probs", "first order"),
    ("not centred", "return 2, (logits - probs.log()) / len(probs)", "sums to 0"),
    ("no 1/K", "d = logits - probs.log()\nreturn 2, d - d.mean()", "not that of"),
    ("sign", "d = probs.log() - logits\nreturn 2, (d - d.mean()) / len(d)", "the sign"),
    ("centred by the label's mean", "d = logits - probs.log()\nreturn 2, (d - (probs * d).sum()) / len(d)"),
    ("gradient at T = 1e5", "T = 1e5\nreturn 2, T * ((logits / T).softmax(0) - (probs.log() / T).softmax(0))", "exact"),
    ("limit first", "d = logits - probs.log()\nreturn (d - d.mean()) / len(d), 2", "n comes first"),
    ("writes into the logits", "logits -= probs.log()\nreturn 2, (logits - logits.mean()) / len(logits)", "arguments"),
]
RIGHT["gradient_limit"] = [
    ("centred difference", "d = logits - probs.log()\nreturn 2, (d - d.mean()) / len(d)"),
    ("each centred", "f, g = logits - logits.mean(), probs.log() - probs.log().mean()\nreturn 2.0, (f - g) / len(f)"),
    ("a list", "K = len(logits)\nd = [f - math.log(p) for f, p in zip(logits.tolist(), probs.tolist())]\n"
     "return 2, [(x - sum(d) / K) / K for x in d]"),
    ("numpy", "d = (logits - probs.log()).numpy()\nreturn d.dtype.type(2), (d - d.mean()) / d.size"),
    ("float32", "d = (logits - probs.log()).float()\nreturn 2, (d - d.mean()) / len(d)"),
]

# own_method: rows in place of bodies
WRONG["own_method"] = [
    ("no row", "{}", "no row of your own"),
    ("FlexDA again", "{'mine': Method('q_hat', None)}", "mine is flexda"),
    ("ADELLO again", "{'mine': METHODS['adello']}", "mine is adello"),
    ("an unknown prior", "{'mine': Method('q_labeled', 'rest')}", "a prior that a step knows"),
    ("the tensor itself", "{'mine': Method(torch.ones(3) / 3, None)}"),
    ("ccr as a truth value", "{'mine': Method('p_labeled', True)}", "'rest' or 'all'"),
    ("a plain tuple", "{'mine': ('p_labeled', 'rest', True)}", "to a Method"),
    ("a row of the paper changed", "{'udal': Method('p_labeled', 'rest')}", "unchanged"),
    ("UDAL changed, and a new row", "{'udal': Method('p_labeled', 'all'), 'mine': Method(None, 'all')}", "unchanged"),
    ("ADELLO with another truth value", "{'mine': Method('q_hat', 'rest', 'yes')}", "True or False"),
    ("CCR without unlabeled images", "{'mine': Method('q_hat', 'rest', False)}", "CCR needs"),
]
RIGHT["own_method"] = [
    ("UDAL with CCR", "{'udal-ccr': Method('p_labeled', 'rest')}"),
    ("FixMatch that distils every image", "{'distil': Method(None, 'all')}"),
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
    """What the first property that does not hold says, or None. Trainings apart: see test_a_solved_copy_passes."""
    try:
        subject = build(exercise, body)
    except SyntaxError as error:
        raise ValueError(f"{exercise.name}: {error}\n{body}") from None
    rows = [row for row in test_exercises.PROPERTIES[exercise.name] if row[1] is not test_exercises.train_all]
    return test_exercises.first_failure(rows, lambda: subject)


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
    readme = (exercises.ROOT / "README.md").read_text(encoding="utf-8")
    if exercises.HEADING in readme:
        assert exercises.table() in readme.partition(exercises.HEADING)[2]


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
    assert exercises.main(["blank", "smooth", "losses.adjust", "--out", str(tmp_path / "copy")]) == 0
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


def test_a_project_that_lacks_a_file_is_not_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercises, "COPIED", ["gone.py"])
    assert exercises.main(["blank", "smooth", "--out", str(tmp_path / "copy")]) == 2
    assert "gone.py" in capsys.readouterr().err


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
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if "](priors.py)" in line or "](losses.py)" in line]
    assert not any(remnant in row for row in rows for remnant in ("^", "log P", "exp KL"))


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
    """An exercise of each module, and own_method, which trains."""
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


def test_a_student_grades_what_the_copy_says(tmp_path, capfd, monkeypatch):
    exercises.blank(["adjust"], tmp_path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    assert list(graded(capfd)[0]) == ["adjust"]


TRICKS = {  # exercise: (a body, what the grade says); none may pass, or stop the others
    "alpha_schedule": ("while True:\n    pass", "no end within 2 seconds"),
    "smooth": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "imbalance_temperature": ("import pytest\npytest.exit('done')", "Exit: done"),
    "adjust": ("import os\nos._exit(0)", "Python stopped before"),
    "weak": ("import pytest\npytest.skip('no')", "Skipped: no"),
    "reliability": ("import sys\nsys.exit()", "SystemExit"),
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


def test_own_method_says_why_a_training_stopped(monkeypatch):
    import train

    def stops(argv):
        print("error: step 1: the loss is not finite", file=sys.stderr)
        return 1

    def raises(argv):
        raise KeyError("prior")
    for main, says in ((stops, "the loss is not finite"), (raises, "KeyError: 'prior'")):
        monkeypatch.setattr(train, "main", main)
        assert says in test_exercises.failure("it trains", test_exercises.train_all, build(
            exercises.EXERCISES[-1], RIGHT["own_method"][0][1]))


def test_the_summary_of_a_failure_holds_the_whole_sentence(tmp_path):
    exercises.blank(["smooth"], tmp_path)
    solve(tmp_path, {"smooth": "q ** alpha"})
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_exercises.py", "-k", "smooth"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", "ADELLO_EXERCISES": ""})
    line = next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert "the target prior sums to 1: normalise after the power" in line

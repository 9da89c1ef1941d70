"""The tests of the exercises, tested: each wrong version of a function must fail its own exercise's test, and right
ones that are written otherwise must pass.

A version is the body that a student writes below the module's own signature: an expression or statements. Where it
begins with "def" or "@" it takes the place of the signature, too. The third entry of a wrong version, where there is
one, stands in the message that the student gets.
"""

import ast
import importlib
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
    ("alpha_min cuts the curve", "max(alpha_min, 1 - (step / total_steps) ** d)", "does not cut it off"),
    ("falls by alpha_min", "1 - alpha_min * (step / total_steps) ** d", "alpha is alpha_min"),
    ("power of one minus the share", "alpha_min + (1 - alpha_min) * (1 - step / total_steps) ** d"),
    ("power of the whole", "(1 - (1 - alpha_min) * step / total_steps) ** d"),
    ("factor inside the power", "1 - ((1 - alpha_min) * step / total_steps) ** d"),
    ("factor d", "1 - (1 - alpha_min) * d * step / total_steps"),
    ("power of the step alone", "1 - (1 - alpha_min) * step ** d / total_steps"),
    ("root in place of the power", "1 - (1 - alpha_min) * (step / total_steps) ** (1 / d)"),
    ("integer division", "1 - (1 - alpha_min) * (step // total_steps) ** d"),
    ("division the wrong way round", "1 - (1 - alpha_min) * (total_steps / max(step, 1)) ** d"),
    ("one step late", "1 - (1 - alpha_min) * (max(step - 1, 0) / total_steps) ** d"),
    ("one step early", "1 - (1 - alpha_min) * ((step + 1) / total_steps) ** d"),
    ("total_steps - 1", "1 - (1 - alpha_min) * (step / (total_steps - 1)) ** d"),
    ("rises", "alpha_min + (1 - alpha_min) * (step / total_steps) ** d", "alpha is 1 at step 0"),
    ("sign", "1 + (1 - alpha_min) * (step / total_steps) ** d"),
    ("brackets forgotten", "1 - 1 - alpha_min * (step / total_steps) ** d"),
    ("cosine", "import math\nreturn alpha_min + (1 - alpha_min) * (1 + math.cos(math.pi * step / total_steps)) / 2"),
    ("exponential", "max(alpha_min, 1e-9) ** ((step / total_steps) ** d)"),
    ("rounded", "round(1 - (1 - alpha_min) * (step / total_steps) ** d, 3)", "falls at every step"),
    ("by epochs of 1024 steps", "1 - (1 - alpha_min) * (step // 1024 * 1024 / total_steps) ** d"),
    ("by percent", "1 - (1 - alpha_min) * (int(100 * step / total_steps) / 100) ** d", "falls at every step"),
    ("stops at 0.99", "1 - (1 - alpha_min) * min(0.99, step / total_steps) ** d"),
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
    ("divided by the largest", "q ** alpha / (q ** alpha).max()", "sums to 1"),
    ("divided by K", "q ** alpha / len(q)"),
    ("divided by the norm", "q ** alpha / (q ** alpha).norm()"),
    ("divided by the mean", "q ** alpha / (q ** alpha).mean()"),
    ("softmax of alpha q", "(alpha * q).softmax(0)", "alpha = 1 keeps"),
    ("softmax of the power", "(q ** alpha).softmax(0)"),
    ("temperature 1 / alpha the wrong way round", "(q.log() / max(alpha, 1e-9)).softmax(0)"),
    ("1 / alpha", "p = q ** (1 / max(alpha, 1e-3))\nreturn p / p.sum()"),
    ("1 - alpha", "p = q ** (1 - alpha)\nreturn p / p.sum()", "alpha = 1 keeps"),
    ("mixed with the uniform prior", "alpha * q + (1 - alpha) / len(q)", "every ratio"),
    ("mixed the other way round", "(1 - alpha) * q + alpha / len(q)"),
    ("scaled", "alpha * q / (alpha * q).sum()"),
    ("always the prior", "q"),
    ("always uniform", "torch.full_like(q, 1 / len(q))"),
    ("square root whatever alpha is", "q.sqrt() / q.sqrt().sum() if 0 < alpha < 1 else (q ** alpha) / (q ** "
     "alpha).sum()"),
    ("alpha above 1 is cut", "p = q ** min(alpha, 1)\nreturn p / p.sum()"),
    ("logarithm returned", "(alpha * q.log()).log_softmax(0)"),
    ("sum of the prior below the line", "q ** alpha / q.sum()"),
    ("power of the sum", "q ** alpha / q.sum() ** alpha"),
    ("writes into the prior", "q.pow_(alpha)\nreturn q / q.sum()", "unchanged"),
    ("writes the sum into the prior", "p = q ** alpha if alpha != 1 else q\np /= p.sum() * (1 + 1e-15)\n"
     "q.copy_(p)\nreturn p", "unchanged"),
    ("1e-9 added", "p = (q + 1e-9) ** alpha\nreturn p / p.sum()", "rare class"),
    ("clamped at 1e-3", "p = q.clamp(min=1e-3) ** alpha\nreturn p / p.sum()", "rare class"),
    ("clamped at 1e-6", "p = q.clamp(min=1e-6) ** alpha\nreturn p / p.sum()", "rare class"),
    ("sorted", "p = q.sort().values ** alpha\nreturn p / p.sum()"),
    ("ten classes", "p = q ** alpha\nreturn p / p.sum() if len(q) > 2 else torch.full_like(q, 1 / 10)"),
    ("float32 within", "p = q.float() ** alpha\nreturn (p / p.sum()).to(q.dtype)"),
    ("always float64", "p = q.double() ** alpha\nreturn p / p.sum()", "float32 in"),
    ("always float32", "p = q.float() ** alpha\nreturn p / p.sum()"),
    ("filled on the CPU", "p = torch.zeros(len(q), dtype=q.dtype)\np += q ** alpha\nreturn p / p.sum()", "device"),
    ("a list", "total = sum(x ** alpha for x in q.tolist())\nreturn [x ** alpha / total for x in q.tolist()]"),
    ("rounded", "p = q ** alpha\nreturn (p / p.sum()).mul(1000).round() / 1000"),
]
RIGHT["smooth"] = [
    ("softmax of logarithms", "q ** 0 / len(q) if alpha == 0 else (alpha * q.log()).softmax(0)"),
    ("normalize", "torch.nn.functional.normalize(q ** alpha, p=1, dim=0)"),
    ("a loop", "p = torch.empty_like(q)\ntotal = 0\nfor k in range(len(q)):\n    p[k] = q[k] ** alpha\n"
     "    total = total + p[k]\nreturn p / total"),
    ("a list", "powers = [x ** alpha for x in q]\nreturn torch.stack([x / sum(powers) for x in powers])"),
    ("a copy in place", "p = q.clone().pow_(alpha)\nreturn p.div_(p.sum())"),
]

# ----------------------------------------------------------------------------- imbalance_temperature

K_U = "u = torch.full_like(q_hat, 1 / len(q_hat))\n"
WRONG["imbalance_temperature"] = [
    ("KL the other way round", K_U + "return (q_hat * (q_hat / u).log()).sum().exp()", "not of Qhat from P_bal"),
    ("no exponential", K_U + "return (u * (u / q_hat).log()).sum()"),
    ("exponential of each class", K_U + "return (u * (u / q_hat).log()).exp().sum()"),
    ("1 + KL", K_U + "return 1 + (u * (u / q_hat).log()).sum()", "T is 1.25"),
    ("minus KL", K_U + "return (u * (q_hat / u).log()).sum().exp()", "at least 1"),
    ("base 2 in the logarithm", K_U + "return (u * (u / q_hat).log2()).sum().exp()"),
    ("base 2 in both", K_U + "return 2 ** (u * (u / q_hat).log()).sum()"),
    ("mean of the terms", K_U + "return (u * (u / q_hat).log()).mean().exp()"),
    ("no weight 1/K", K_U + "return (u / q_hat).log().sum().exp()"),
    ("exponential of the entropy", "(-(q_hat * q_hat.log()).sum()).exp()", "T is 1 at"),
    ("exponential of the cross-entropy", K_U + "return (-(u * q_hat.log()).sum()).exp()"),
    ("K over the perplexity", "len(q_hat) / (-(q_hat * q_hat.log()).sum()).exp()"),
    ("symmetric", K_U + "return (((u - q_hat) * (u / q_hat).log()).sum() / 2).exp()"),
    ("largest over smallest", "q_hat.max() / q_hat.min()"),
    ("largest over uniform", "q_hat.max() * len(q_hat)"),
    ("arithmetic over harmonic mean", "(1 / q_hat).mean() / len(q_hat)"),
    ("geometric over harmonic mean", "(1 / q_hat).mean() * q_hat.log().mean().exp()"),
    ("squared", K_U + "return (u * (u / q_hat).log()).sum().exp() ** 2"),
    ("root", K_U + "return (u * (u / q_hat).log()).sum().exp().sqrt()"),
    ("clamped at 1e-3", "q = q_hat.clamp(min=1e-3)\n" + K_U + "return (u * (u / q).log()).sum().exp()", "rare class"),
    ("clamped at 1e-6", "q = q_hat.clamp(min=1e-6)\n" + K_U + "return (u * (u / q).log()).sum().exp()", "rare class"),
    ("1e-6 added", K_U + "return (u * (u / (q_hat + 1e-6)).log()).sum().exp()"),
    ("1e-9 added", K_U + "return (u * (u / (q_hat + 1e-9)).log()).sum().exp()", "rare class"),
    ("at most 3", K_U + "return (u * (u / q_hat).log()).sum().exp().clamp(max=3)"),
    ("ten classes", "u = 1 / 10\nreturn (u * (u / q_hat).log()).sum().exp()"),
    ("a number", K_U + "return (u * (u / q_hat).log()).sum().exp().item()", "a tensor without dimensions"),
    ("one number in a row", K_U + "return (u * (u / q_hat).log()).sum().exp().view(1)", "without dimensions"),
    ("uniform prior in float32", "return kl_divergence(uniform(len(q_hat), q_hat.device, torch.float32), q_hat).exp()",
     "dtype"),
    ("uniform prior in float64", "u = torch.full((len(q_hat),), 1 / len(q_hat), dtype=torch.float64, "
     "device=q_hat.device)\nreturn (u * (u / q_hat).log()).sum().exp()", "float32 in"),
    ("uniform prior on the CPU", "return kl_divergence(torch.full((len(q_hat),), 1 / len(q_hat), dtype=q_hat.dtype), "
     "q_hat).exp()", "device"),
    ("uniform prior of ones", "return kl_divergence(torch.ones_like(q_hat), q_hat).exp()"),
    ("F.kl_div's arguments", "return torch.nn.functional.kl_div(uniform(len(q_hat)).log(), q_hat, "
     "reduction='sum').exp()"),
    ("F.kl_div without logarithm", "return torch.nn.functional.kl_div(q_hat, uniform(len(q_hat), dtype=q_hat.dtype), "
     "reduction='sum').exp()"),
    ("writes into the prior", "return (q_hat.log_().mean().neg() - torch.tensor(float(len(q_hat))).log()).exp()"),
    ("writes into the prior and restores nothing", "t = kl_divergence(uniform(len(q_hat), q_hat.device, q_hat.dtype), "
     "q_hat).exp()\nq_hat.div_(2)\nreturn t", "unchanged"),
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
]

# -------------------------------------------------------------------------------------------- adjust

NONE = "if source is None:\n    return logits\n"
WRONG["adjust"] = [
    ("sign", NONE + "return logits - ((source + 1e-9) / (target + 1e-9)).log()", "check the sign"),
    ("priors swapped", NONE + "return logits + ((target + 1e-9) / (source + 1e-9)).log()", "above the line"),
    ("only the source", NONE + "return logits + (source + 1e-9).log()"),
    ("only the target", NONE + "return logits - (target + 1e-9).log()"),
    ("no logarithm", NONE + "return logits + (source + 1e-9) / (target + 1e-9)"),
    ("multiplied", NONE + "return logits * ((source + 1e-9) / (target + 1e-9)).log()"),
    ("difference of priors", NONE + "return logits + source - target"),
    ("sum of logarithms", NONE + "return logits + (source + 1e-9).log() + (target + 1e-9).log()"),
    ("base 2", NONE + "return logits + ((source + 1e-9) / (target + 1e-9)).log2()"),
    ("base 10", NONE + "return logits + ((source + 1e-9) / (target + 1e-9)).log10()"),
    ("half the ratio", NONE + "return logits + 0.5 * ((source + 1e-9) / (target + 1e-9)).log()"),
    ("no eps", NONE + "return logits + (source / target).log()", "stays finite"),
    ("eps inside the ratio", NONE + "return logits + (source / target + 1e-9).log()", "stays finite"),
    ("eps inside a ratio that is clamped", NONE + "return logits + (source / target.clamp(min=1e-9) + 1e-9).log()",
     "before they are divided"),
    ("eps in the source only", NONE + "return logits + ((source + 1e-9) / target).log()", "stays finite"),
    ("eps in the target only", NONE + "return logits + (source / (target + 1e-9)).log()", "stays finite"),
    ("eps 1e-8", NONE + "return logits + ((source + 1e-8) / (target + 1e-8)).log()", "1e-9 is added"),
    ("eps 1e-12", NONE + "return logits + ((source + 1e-12) / (target + 1e-12)).log()", "1e-9 is added"),
    ("eps 1e-3", NONE + "return logits + ((source + 1e-3) / (target + 1e-3)).log()"),
    ("clamped in place of eps", NONE + "return logits + (source.clamp(min=1e-9) / target.clamp(min=1e-9)).log()",
     "1e-9 is added"),
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
    ("writes into the source", NONE + "return logits + (source.add_(1e-9) / (target + 1e-9)).log()"),
    ("writes into the target", NONE + "return logits + ((source + 1e-9) / target.add_(1e-9)).log()"),
    ("log-softmax of the sum", NONE + "return (logits + ((source + 1e-9) / (target + 1e-9)).log()).log_softmax(1)"),
    ("softmax of the sum", NONE + "return (logits + ((source + 1e-9) / (target + 1e-9)).log()).softmax(1)"),
    ("log-softmax first", NONE + "return logits.log_softmax(1) + ((source + 1e-9) / (target + 1e-9)).log()"),
    ("ratio centred", NONE + "r = ((source + 1e-9) / (target + 1e-9)).log()\nreturn logits + r - r.mean()"),
    ("along the batch", NONE + "r = ((source + 1e-9) / (target + 1e-9)).log()\n"
     "return logits + (r[:, None] if len(logits) == len(r) else r)"),
    ("first row only", NONE + "out = logits.clone()\nout[0] = out[0] + ((source + 1e-9) / (target + 1e-9)).log()\n"
     "return out"),
    ("ratio on the CPU", NONE + "r = torch.zeros(len(source), dtype=logits.dtype)\n"
     "return logits + (r + (source + 1e-9).log() - (target + 1e-9).log())", "device"),
    ("float32 within", NONE + "return logits + ((source.float() + 1e-9) / (target.float() + 1e-9)).log().double()"),
    ("float64 out", NONE + "return logits.double() + ((source + 1e-9) / (target + 1e-9)).log()", "same dtype"),
    ("gradient doubled", NONE + "return 2 * logits - logits.detach() + ((source + 1e-9) / (target + 1e-9)).log()",
     "gradient reaches"),
]
RIGHT["adjust"] = [
    ("difference of logarithms", NONE + "return logits + torch.log(source + 1e-9) - torch.log(target + 1e-9)"),
    ("a loop over classes", NONE + "import math\nreturn torch.stack([logits[:, k] + math.log((s + 1e-9) / (t + 1e-9)) "
     "for k, (s, t) in enumerate(zip(source.tolist(), target.tolist()))], dim=1)"),
    ("a loop over rows", NONE + "return torch.stack([row + ((source + 1e-9) / (target + 1e-9)).log() for row in "
     "logits])"),
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
    ("T cut to a whole number", "def complementary_loss(logits_strong, probs_weak, mask, q_hat, q_alpha, temperature):\n"
     "    temperature = int(temperature)\n"
     "    p = F.softmax(probs_weak.detach().log() / temperature, dim=1)\n"
     "    q = F.log_softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, dim=1)\n"
     "    return (-(p * q).sum(dim=1) * (1 - mask)).mean()\n", "whole number"),
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
     "(logits_strong - logits_strong.detach())\n" + ccr(), "unchanged"),
    ("writes into the probabilities", ccr("p = probs_weak.detach().pow_(1 / float(temperature))\n"
     "p /= p.sum(1, keepdim=True)\n"), "unchanged"),
    ("writes into the mask", "mask = mask.neg_().add_(1)\n" + ccr(mean=MEAN.replace("(1 - mask)", "mask")),
     "unchanged"),
    ("writes into the prior", "q_hat = None if q_hat is None else q_hat.add_(0.001)\n" + ccr()),
    ("mask in place of 1 - mask", ccr(mean=MEAN.replace("(1 - mask)", "mask")), "masked"),
    ("no mask", ccr(mean="return -(p * q).sum(dim=1).mean()"), "masked"),
    ("mask from its own threshold", ccr(mean=MEAN.replace("(1 - mask)", "(1 - confidence_mask(probs_weak, 0.85))"))),
    ("mean over the selected images", ccr(mean="w = 1 - mask\nreturn (w * -(p * q).sum(dim=1)).sum() / "
     "w.sum().clamp(min=1)"), "the whole batch, not"),
    ("mean over the selected images, by index", ccr(mean="return -(p * q).sum(dim=1)[mask == 0].mean()")),
    ("sum over the batch", ccr(mean="return ((1 - mask) * -(p * q).sum(dim=1)).sum()")),
    ("mean over images and classes", ccr(mean="return ((1 - mask)[:, None] * -p * q).mean()")),
    ("one loss for each image", ccr(mean="return (1 - mask) * -(p * q).sum(dim=1)"), "one number"),
    ("sign", ccr(mean="return ((1 - mask) * (p * q).sum(dim=1)).mean()")),
    ("hard label", ccr("p = F.one_hot(probs_weak.argmax(1), probs_weak.shape[1]).to(probs_weak.dtype)\n"), "argmax"),
    ("label not softened", ccr("p = probs_weak.detach()\n"), "p^(1/T)"),
    ("label sharpened, p^T", ccr("p = F.softmax(probs_weak.detach().log() * temperature, dim=1)\n")),
    ("label not normalised", ccr("p = probs_weak.detach() ** (1 / temperature)\n"), "normalised"),
    ("label divided by T", ccr("p = probs_weak.detach() / temperature\n")),
    ("softmax of the probabilities", ccr("p = F.softmax(probs_weak.detach() / temperature, dim=1)\n")),
    ("softmax over the batch", ccr("p = F.softmax(probs_weak.detach().log() / temperature, dim=0)\n")),
    ("normalised over the batch", ccr("p = probs_weak.detach() ** (1 / temperature)\np = p / p.sum(0)\n")),
    ("prediction not divided by T", ccr(prediction=LOGQ.replace(" / temperature", ""))),
    ("prediction times T", ccr(prediction=LOGQ.replace("/ temperature", "* temperature"))),
    ("log-probabilities divided by T", ccr(prediction="q = F.log_softmax(adjust(logits_strong, q_hat, q_alpha), "
                                           "dim=1) / "
     "temperature\n")),
    ("log-softmax over the batch", ccr(prediction=LOGQ.replace("dim=1", "dim=0"))),
    ("probabilities, not their logarithm", ccr(prediction=LOGQ.replace("log_softmax", "softmax"))),
    ("logarithm of a softmax", ccr(prediction="q = F.softmax(adjust(logits_strong, q_hat, q_alpha) / temperature, "
     "dim=1).log()\n"), "large logits"),
    ("factor T squared", ccr(mean=MEAN + " * temperature ** 2"), "T^2"),
    ("factor T", ccr(mean=MEAN + " * temperature"), "no factor T"),
    ("label and prediction swapped", ccr(mean="return ((1 - mask) * -(q.exp() * p.log()).sum(dim=1)).mean()"),
     "not the other way round"),
    ("squared error", ccr(mean="return ((1 - mask) * (p - q.exp()).square().sum(dim=1)).mean()")),
    ("NaN where p is 0", ccr("p = probs_weak.detach()\n", mean="l = p.log() / temperature\n"
     "p = (l - torch.log((probs_weak.detach() ** (1 / temperature)).sum(1, keepdim=True))).exp()\n"
     "return ((1 - mask) * (-(p * q) + 0 * p * l).sum(dim=1)).mean()"), "exactly 0"),
    ("p clamped at 1e-3", ccr(LABEL.replace("probs_weak", "probs_weak.clamp(min=1e-3)")), "not clamped"),
    ("p clamped at 1e-6", ccr(LABEL.replace("probs_weak", "probs_weak.clamp(min=1e-6)")), "not clamped"),
    ("always adjusted", "if q_hat is None:\n    q_hat = torch.tensor([0.6, 0.4, 0.1])[:logits_strong.shape[1]]\n"
     "    q_alpha = q_hat.flip(0)\n" + ccr()),
    ("no case for None", ccr(prediction="q = F.log_softmax((logits_strong + (q_hat / q_alpha).log()) / temperature, "
     "dim=1)\n")),
    ("target prior uniform", ccr(prediction="q = F.log_softmax(adjust(logits_strong, q_hat, None if q_hat is None else "
     "torch.full_like(q_hat, 1 / len(q_hat))) / temperature, dim=1)\n")),
    ("float32 within", "logits_strong = logits_strong.float().to(probs_weak.dtype)\n" + ccr()),
    ("T as a number only", "temperature = float(f'{temperature:.1f}') if isinstance(temperature, float) else "
     "float('nan')\n" + ccr(), "a tensor without dimensions"),
    ("entropy added", ccr(mean="return ((1 - mask) * -(p * q).sum(dim=1)).mean() + 0.1 * (q.exp() * q).sum()")),
    ("weights on the CPU", ccr(mean="w = torch.ones(len(mask), dtype=mask.dtype) - mask\n"
     "return (w * -(p * q).sum(dim=1)).mean()"), "device"),
    ("number out", ccr(mean=MEAN + ".item()"), "one number"),
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
         mirror="view.flip(2)", view="padded[i, :, y:y + size, x:x + size]", back="torch.stack(views)"):
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
    ("pad a sixteenth", weak(pad="images.shape[-1] // 16")),
    ("pad rounded up", weak(pad="-(-images.shape[-1] // 8)"), "rounded down"),
    ("black border", weak(border=padded("'constant'")), "not black"),
    ("edge repeated", weak(border=padded("'edge'")), "reflected"),
    ("reflection that repeats the edge", weak(border=padded("'symmetric'")), "row -1 is row 1"),
    ("border from the other side", weak(border=padded("'wrap'"))),
    ("rolled", weak(view="images[i].roll((y - pad, x - pad), (1, 2))"), "row -1 is row 1"),
    ("no crop", weak(view="images[i]")),
    ("centre crop", weak(y="pad", x="pad")),
    ("only right and down", weak(y="pad + int(draws[i, 0] * (pad + 1))", x="pad + int(draws[i, 1] * (pad + 1))")),
    ("last place left out", weak(y="int(draws[i, 0] * 2 * pad)", x="int(draws[i, 1] * 2 * pad)"), "last one included"),
    ("rounded", weak(y="round(float(draws[i, 0]) * 2 * pad)", x="round(float(draws[i, 1]) * 2 * pad)"), "equally"),
    ("crop along the diagonal", weak(x="y"), "independently"),
    ("flip with the draw of the row", weak(flip="draws[i, 0] < 0.5"), "mirror"),
    ("columns by the draw of the flip", weak(x="int(draws[i, 2] * (2 * pad + 1))"), "a draw of its own"),
    ("rows only", weak(x="pad")),
    ("columns only", weak(y="pad")),
    ("never mirrored", weak(flip="False"), "mirrored"),
    ("always mirrored", weak(flip="True"), "mirrored"),
    ("a quarter mirrored", weak(flip="draws[i, 2] < 0.25"), "half of the draws"),
    ("nearly all mirrored", weak(flip="draws[i, 2] < 0.95"), "half of the draws"),
    ("mirrored top to bottom", weak(mirror="view.flip(1)")),
    ("mirrored both ways", weak(mirror="view.flip(1, 2)")),
    ("turned", weak(mirror="view.transpose(1, 2)")),
    ("channels mirrored", weak(mirror="view.flip(0)"), "channels together"),
    ("one crop for all images", weak(y="int(draws[0, 0] * (2 * pad + 1))", x="int(draws[0, 1] * (2 * pad + 1))")),
    ("one mirror for all images", weak(flip="draws[0, 2] < 0.5")),
    ("random numbers of its own", "draws = torch.rand(len(images), 3)\n" + weak(), "all chance comes from"),
    ("a generator of its own",
     "draws = torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))\n" + weak()),
    ("random flip of its own", weak(flip="torch.rand(()) < 0.5")),
    ("channels cropped apart", weak(view="torch.stack([padded[i, c, (y + c) % (2 * pad + 1):, x:][:size, :size] "
     "for c in range(3)])"), "channels together"),
    ("floats out", weak(back="torch.stack(views).float()"), "uint8"),
    ("between 0 and 1", weak(back="torch.stack(views) / 255"), "uint8"),
    ("padded size out", weak(view="padded[i]"), "image's size"),
    ("channels last", weak(back="torch.stack(views).permute(0, 2, 3, 1)"), "image's size"),
    ("order of the batch turned", weak(back="torch.stack(views).flip(0)"), "view i is image i"),
    ("images of the batch mixed", weak(view="padded[i - 1, :, y:y + size, x:x + size]")),
    ("writes into the images", weak(back="images.copy_(torch.stack(views))"), "unchanged"),
    ("writes into the draws", "draws.mul_(0.999)\n" + weak(), "unchanged"),
    ("ends beyond the last place", weak(y="min(round(float(draws[i, 0]) * (2 * pad + 1)), 2 * pad + 1)", view=
     "padded[i].roll((0,), (0,))[:, min(y, 2 * pad):, x:][:, :size, :size]")),
    ("interpolated", weak(view="((padded[i, :, y:y + size, x:x + size].int() + padded[i, :, y:y + size, x:x + size]"
     ".int().roll(1, 1)) // 2).to(torch.uint8)")),
    ("smaller steps", weak(y="int(draws[i, 0] * (pad + 1)) * 2", x="int(draws[i, 1] * (pad + 1)) * 2")),
    ("ranges on the CPU", """size = images.shape[-1]
pad = size // 8
places = (torch.arange(size) + (draws[:, :1] * (2 * pad + 1)).long() - pad).abs()
rows = size - 1 - (size - 1 - places).abs()
places = (torch.arange(size) + (draws[:, 1:2] * (2 * pad + 1)).long() - pad).abs()
columns = size - 1 - (size - 1 - places).abs()
columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
return pick(images, rows[:, None, :, None], columns[:, None, None, :])""", "device"),
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
    ("errors in place of accuracy", bins("len(mine) / len(labels), 1 - right[mine].mean(), confidence[mine].mean()")),
    ("sums in place of means", bins("len(mine) / len(labels), right[mine].sum(), confidence[mine].sum()")),
    ("means over all samples", bins("len(mine) / len(labels), right[mine].sum() / len(labels), "
     "confidence[mine].sum() / len(labels)")),
    ("accuracy over all samples", bins("len(mine) / len(labels), right[mine].sum() / len(labels), "
     "confidence[mine].mean()")),
    ("middle of the bin", bins("len(mine) / len(labels), right[mine].mean(), (b + 0.5) / num_bins"), "not its middle"),
    ("upper edge of the bin", bins("len(mine) / len(labels), right[mine].mean(), (b + 1) / num_bins")),
    ("median confidence", bins("len(mine) / len(labels), right[mine].mean(), confidence[mine].median()")),
    ("gap in place of accuracy", bins("len(mine) / len(labels), (right[mine] - confidence[mine]).mean().abs(), "
     "confidence[mine].mean()")),
    ("NaN in empty bins", bins(empty="0.0, float('nan'), float('nan')"), "not NaN"),
    ("middle in empty bins", bins(empty="0.0, 0.0, (b + 0.5) / num_bins"), "empty bin"),
    ("one in empty bins", bins(empty="0.0, 1.0, 1.0"), "empty bin"),
    ("empty bins left out", bins(back="torch.tensor([r for r in rows if r[0] > 0], dtype=torch.float64)"),
     "row for each"),
    ("lower edge included", bins(where="(confidence >= b / num_bins) & (confidence < (b + 1) / num_bins) | "
     "(b == num_bins - 1) & (confidence == 1)"), "(lower, upper]"),
    ("1 lost", bins(where="(confidence >= b / num_bins) & (confidence < (b + 1) / num_bins)"), "(lower, upper]"),
    ("both edges included", bins(where="(confidence >= b / num_bins) & (confidence <= (b + 1) / num_bins)")),
    ("neither edge included", bins(where="(confidence > b / num_bins) & (confidence < (b + 1) / num_bins)")),
    ("0 lost", bins(where="(confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)"), "confidence of 0"),
    ("bins from 1/K on", bins(before="low = 1 / probs.shape[1]",
                              where="(((confidence - low) / (1 - low) * num_bins).ceil() - 1).clamp(min=0) == b")),
    ("bins of equal number", bins(where="(confidence.argsort().argsort() * num_bins // len(labels)) == b")),
    ("always 15 bins", bins(before="num_bins = 15"), "row for each bin"),
    ("10 bins by default", "def reliability(probs, labels, num_bins=10):\n" + textwrap.indent(bins(), "    "),
     "15 bins"),
    ("bins one too far", bins(where="(confidence * num_bins).floor() == b - 1")),
    ("bins turned", bins(back="torch.tensor(rows[::-1], dtype=torch.float64)")),
    ("rounded to the bins", bins(where="(confidence * (num_bins - 1)).round() == b")),
    ("confidence of the true class", bins(confidence="probs[torch.arange(len(labels)), labels]"), "true class"),
    ("least confidence", bins(confidence="probs.amin(1)")),
    ("mean confidence", bins(confidence="probs.mean(1)")),
    ("margin", bins(confidence="probs.topk(2, dim=1).values.diff(dim=1).abs().flatten()")),
    ("confidence of class 0", bins(confidence="probs[:, 0]")),
    ("softmax again", bins(confidence="probs.softmax(1).amax(1)")),
    ("least probable class", bins(right="(probs.argmin(1) == labels).double()")),
    ("right where sure", bins(right="(probs.amax(1) > 0.5).double()")),
    ("right by label 0", bins(right="(labels == 0).double()")),
    ("a row for each column", bins(back="torch.tensor(rows, dtype=torch.float64).T"), "(num_bins, 3)"),
    ("float32", bins(before="probs = probs.float()")),
    ("float32 out", bins(back="torch.tensor(rows)"), "float64 in"),
    ("rounded", bins(back="torch.tensor(rows, dtype=torch.float64).mul(1e3).round() / 1e3")),
    ("writes into the probabilities", "order = probs[:, 0].sort().indices\nprobs.copy_(probs[order])\n"
     "labels.copy_(labels[order])\n" + bins(), "unchanged"),
    ("every sample counted as another bin's, too", bins(where="(confidence > (b - 1) / num_bins) & "
     "(confidence <= (b + 1) / num_bins)")),
]
RIGHT["reliability"] = [
    ("a loop over bins", bins()),
    ("a loop over samples, without validation", """import math
rows = [[0.0, 0.0, 0.0] for _ in range(num_bins)]
for p, label in zip(probs.tolist(), labels.tolist()):
    row = rows[max(0, math.ceil(max(p) * num_bins) - 1)]
    row[0] += 1
    row[1] += p.index(max(p)) == label
    row[2] += max(p)
return torch.tensor([[n / len(labels), a / max(n, 1), c / max(n, 1)] for n, a, c in rows], dtype=probs.dtype)"""),
    ("ceil and scatter", """confidence, predicted = probs.max(1)
index = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
sums = torch.zeros(num_bins, 3, dtype=probs.dtype)
right = (predicted == labels).to(probs.dtype)
sums.index_add_(0, index, torch.stack([torch.ones_like(confidence), right, confidence], 1))
share = sums[:, :1] / len(labels)
return torch.cat([share, sums[:, 1:] / sums[:, :1].clamp(min=1)], 1)"""),
    ("one-hot bins", """confidence, predicted = probs.max(1)
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
    ("decay the wrong way round", LERP.replace("mul_(self.decay)", "mul_(1 - self.decay)").replace("1 - self.decay)\n",
     "self.decay)\n") + COPY),
    ("both with decay", LERP.replace("alpha=1 - self.decay", "alpha=self.decay") + COPY),
    ("new one at full weight", LERP.replace(", alpha=1 - self.decay", "") + COPY),
    ("copied", "self.model.load_state_dict(model.state_dict())", "not copied"),
    ("plain mean", LERP.replace("self.decay", "0.5") + COPY),
    ("decay 0.999 always", LERP.replace("self.decay", "0.999") + COPY),
    ("decay 0.9 always", LERP.replace("self.decay", "0.9") + COPY, "given to EMA"),
    ("decay with a warm-up", "self.n = getattr(self, 'n', 0) + 1\ndecay = min(self.decay, self.n / (self.n + 9))\n"
     + LERP.replace("self.decay", "decay") + COPY),
    ("start corrected", "self.n = getattr(self, 'n', 0) + 1\nw = (1 - self.decay) / (1 - self.decay ** self.n)\n"
     + LERP.replace("1 - self.decay", "w").replace("self.decay", "1 - w") + COPY),
    ("weights only", LERP.replace("    a", "    if a.ndim > 1: a") + COPY, "biases"),
    ("biases skipped", "for (name, a), b in zip(self.model.named_parameters(), model.parameters()):\n"
     "    if not name.endswith('bias'):\n        a.lerp_(b, 1 - self.decay)\n" + COPY, "biases"),
    ("frozen parameters skipped", LERP.replace("    a", "    if b.requires_grad: a") + COPY, "frozen"),
    ("biases copied", LERP + "for a, b in zip(self.model.parameters(), model.parameters()):\n    if a.ndim == 1:\n"
     "        a.copy_(b)\n" + COPY),
    ("first layer only", LERP.replace("model.parameters()", "model[0].parameters()") + COPY, "batch-norm's"),
    ("last batch-norm skipped", LERP.replace("(self.model.parameters(), model.parameters())",
     "([*self.model.parameters()][:2], model.parameters())") + COPY),
    ("buffers skipped", LERP, "statistics are copied"),
    ("buffers averaged", LERP + "for a, b in zip(self.model.buffers(), model.buffers()):\n"
     "    if a.is_floating_point():\n"
     "        a.lerp_(b, 1 - self.decay)\n    else:\n        a.copy_(b)\n", "not averaged"),
    ("counter skipped", LERP + COPY.replace("    a", "    if a.is_floating_point(): a"), "counter"),
    ("counter as a float", LERP + COPY + "self.model[1].num_batches_tracked = model[1].num_batches_tracked.float()",
     "counter"),
    ("variance skipped", LERP + "self.model[1].running_mean.copy_(model[1].running_mean)\n"
     "self.model[1].num_batches_tracked.copy_(model[1].num_batches_tracked)"),
    ("everything averaged by state_dict", "new = model.state_dict()\nfor name, a in self.model.state_dict().items():\n"
     "    a.copy_(self.decay * a + (1 - self.decay) * new[name])\n", "not averaged"),
    ("buffers shared", LERP + "self.model[1].running_mean = model[1].running_mean\n"
     "self.model[1].running_var = model[1].running_var\n"
     "self.model[1].num_batches_tracked.copy_(model[1].num_batches_tracked)", "do not share"),
    ("counter shared", LERP + COPY +
     "self.model[1].num_batches_tracked = model[1].num_batches_tracked", "do not share"),
    ("buffers shared by data", LERP + COPY.replace("a.copy_(b)", "a.data = b.data"), "do not share"),
    ("parameters bound to new ones", LERP + COPY + "for m in self.model:\n    m.weight = torch.nn.Parameter("
     "m.weight.detach().clone(), requires_grad=False)\n", "written in place"),
    ("network replaced", "old = self.model\nself.model = copy.deepcopy(old)\n" + LERP + COPY, "not replaced"),
    ("network replaced by a copy of the model", "old = [p.clone() for p in self.model.parameters()]\n"
     "self.model = copy.deepcopy(model).eval().requires_grad_(False)\nfor a, b in zip(self.model.parameters(), old):\n"
     "    a.lerp_(b, self.decay)\n", "not replaced"),
    ("model changed", "for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "    b.lerp_(a, self.decay)\n    a.copy_(b)\n" + COPY, "not changed by its average"),
    ("model's weights replaced by the average", LERP + COPY + "model.load_state_dict(self.model.state_dict())"),
    ("model scaled in place", "for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "    a.mul_(self.decay).add_(b.mul_(1 - self.decay))\n" + COPY, "not changed"),
    ("model's buffers changed", LERP + COPY + "model[1].num_batches_tracked.zero_()", "not changed"),
    ("model set to evaluation", "model.eval()\n" + LERP + COPY, "training mode"),
    ("model frozen", "model.requires_grad_(False)\n" + LERP + COPY, "with gradients"),
    ("average set to training", LERP + COPY + "self.model.train()", "evaluation mode"),
    ("a graph", PLAIN + textwrap.indent(LERP + COPY, "    "), "no_grad"),
    ("gradients switched on", LERP + COPY + "self.model.requires_grad_(True)", "graph"),
    ("nothing written", "for a, b in zip(self.model.parameters(), model.parameters()):\n"
     "    a = self.decay * a + (1 - self.decay) * b\n" + COPY),
    ("nothing done", "pass"),
    ("wrong order", LERP.replace("zip(self.model.parameters(), model.parameters())",
     "zip(self.model.parameters(), [p * 0 + q for p, q in zip(self.model.parameters(), [*model.parameters()])][::-1])")
     + COPY),
    ("geometric mean", LERP.replace("a.mul_(self.decay).add_(b, alpha=1 - self.decay)",
     "a.copy_(a.abs() ** self.decay * b.abs() ** (1 - self.decay))") + COPY),
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
    ("momentum the wrong way round", "self.q_hat.copy_((1 - self.momentum) * self.q_hat + self.momentum * "
     "probs.mean(0))\n" + SET_T),
    ("new mean at full weight", MIX.replace(", alpha=1 - self.momentum", "") + SET_T),
    ("momentum 0.999 always", MIX.replace("self.momentum", "0.999") + SET_T),
    ("momentum 0.9 always", MIX.replace("self.momentum", "0.9") + SET_T, "given to the estimator"),
    ("the batch's mean alone", "self.q_hat.copy_(probs.mean(0))\n" + SET_T),
    ("sum over the batch", MIX.replace("mean(dim=0)", "sum(dim=0)") + SET_T),
    ("mean over the classes", MIX.replace("probs.mean(dim=0)", "probs.mean(dim=1)[:1].expand_as(self.q_hat)") + SET_T),
    ("mean over everything", MIX.replace("probs.mean(dim=0)", "probs.mean()") + SET_T),
    ("hard labels", MIX.replace("probs.mean(dim=0)", "torch.eye(probs.shape[1])[probs.argmax(1)].mean(0)") + SET_T),
    ("confident images only", "sure = probs[probs.amax(1) > 0.59]\nif len(sure):\n    probs = sure\n" + MIX + SET_T,
     "no threshold"),
    ("softmax again", "probs = probs.softmax(1)\n" + MIX + SET_T),
    ("geometric mean", MIX.replace("probs.mean(dim=0)", "probs.clamp(min=1e-9).log().mean(0).softmax(0)") + SET_T),
    ("first batch taken as the start", "if not hasattr(self, 'seen'):\n    self.seen = True\n"
     "    self.q_hat.copy_(probs.mean(0))\nelse:\n    " + MIX + SET_T),
    ("start corrected", "self.n = getattr(self, 'n', 0) + 1\nw = (1 - self.momentum) / (1 - self.momentum ** self.n)\n"
     "self.q_hat.lerp_(probs.mean(0), w)\n" + SET_T),
    ("plain mean of all steps",
     "self.n = getattr(self, 'n', 0) + 1\nself.q_hat.lerp_(probs.mean(0), 1 / self.n)\n" + SET_T),
    ("momentum by image",
     "for p in probs:\n    self.q_hat.mul_(self.momentum).add_(p, alpha=1 - self.momentum)\n" + SET_T),
    ("T never", MIX, "T is computed"),
    ("T at every step", MIX + SET_T.replace("if first_ccr_step:", "if True:"), "not touched"),
    ("T from the first CCR step on", MIX + "self.on = getattr(self, 'on', False) or first_ccr_step\n"
     + SET_T.replace("first_ccr_step", "self.on"), "stays as it is"),
    ("T before the update", SET_T + MIX, "updates Qhat first"),
    ("T from the batch", MIX + SET_T.replace("self.q_hat)", "probs.mean(0))")),
    ("T is the divergence", MIX + "if first_ccr_step:\n"
     "    self.temperature.copy_(kl_divergence(uniform(2), self.q_hat))\n"),
    ("T the other way round", MIX + "if first_ccr_step:\n"
     "    self.temperature.copy_(kl_divergence(self.q_hat, uniform(2)).exp())\n"),
    ("Qhat frozen with T", "self.done = getattr(self, 'done', False) or first_ccr_step\n"
     "if not self.done or first_ccr_step:\n"
     "    " + MIX + SET_T, "Qhat moves at every step"),
    ("no update in the first CCR step", "if not first_ccr_step:\n    " + MIX + SET_T),
    ("a graph", "def update(self, probs, first_ccr_step=False):\n    self.q_hat = self.momentum * self.q_hat + "
     "(1 - self.momentum) * probs.mean(0)\n" + textwrap.indent(SET_T, "    "), "no part of a graph"),
    ("no buffer any more", MIX + SET_T + "q = self.q_hat\ndel self.q_hat\nself.__dict__['q_hat'] = q", "buffers"),
    ("writes into the predictions", MIX.replace("probs.mean(dim=0)", "probs.detach().mul_(1.01).div_(1.02).mean(dim=0)")
     + SET_T),
    ("nothing done", "pass"),
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
    ("1 / (1 - m)", "1 / (1 - momentum)", "1/e"),
    ("half of that", "0.5 / (1 - momentum)"),
    ("upside down", "math.log(momentum) / math.log(0.5)"),
    ("sign", "math.log(2) / math.log(momentum)"),
    ("of 1 - m", "math.log(0.5) / math.log(1 - momentum)"),
    ("linear", "math.log(2) / (1 - momentum)"),
    ("base 2 in one logarithm", "math.log2(0.5) / math.log(momentum)"),
    ("time constant", "-1 / math.log(momentum)"),
    ("quarter", "math.log(0.25) / math.log(momentum)"),
    ("always 693", "693"),
    ("m^n in place of n", "momentum ** 693"),
]
RIGHT["half_life"] = [
    ("logarithms", "math.log(0.5) / math.log(momentum)"),
    ("base m", "math.log(0.5, momentum)"),
    ("counted", "n = 0\nleft = 1.0\nwhile left > 0.5:\n    left *= momentum\n    n += 1\nreturn n"),
    ("rounded up", "math.ceil(math.log2(0.5) / math.log2(momentum))"),
]

WRONG["at_target"] = [
    ("sign", "logits + (source / target).log()", "check the sign"),
    ("nothing moved", "logits", "not as accurate"),
    ("only the source taken out", "logits - source.log()", "need not be uniform"),
    ("only the target put in", "logits + target.log()"),
    ("ratio without logarithm", "logits + target / source"),
    ("probabilities weighted", "logits.softmax(1) * target / source"),
    ("posterior in place of logits", "p = logits.softmax(1) * target / source\nreturn p / p.sum(1, keepdim=True)",
     "logits go in"),
    ("difference of priors", "logits + target - source"),
    ("half the ratio", "logits + 0.5 * (target / source).log()"),
    ("twice the ratio", "logits + 2 * (target / source).log()"),
    ("base 2", "logits + (target / source).log2()"),
    ("multiplied", "logits * (target / source)"),
    ("two classes", "if logits.shape[1] == 2:\n    return logits + (target / source).log()\nreturn logits"),
    ("centre of the two priors", "logits + ((target + source) / (2 * source)).log()"),
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
     "product ** (1 / len(counts))", "mean of logarithms"),
    ("arithmetic over harmonic", "return sum(counts) / len(counts) ** 2 * sum(1 / n for n in counts)"),
    ("geometric over harmonic", GM + "return geometric * sum(1 / n for n in counts) / len(counts)"),
    ("largest over smallest", "return max(counts) / min(counts)"),
    ("largest over mean", "return max(counts) * len(counts) / sum(counts)"),
    ("root mean square over mean", "return (sum(n * n for n in counts) * len(counts)) ** 0.5 / sum(counts)"),
    ("arithmetic mean", "return sum(counts) / len(counts)"),
    ("logarithm of the ratio", GM + "return math.log(sum(counts) / len(counts) / geometric)"),
    ("1 + logarithm", GM + "return 1 + math.log(sum(counts) / len(counts) / geometric)"),
    ("sum over geometric mean", GM + "return sum(counts) / geometric"),
    ("always 1", "return 1.0"),
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
    ("power 1 and the gradient at T = 1", "return 1, logits.softmax(0) - probs"),
    ("power 2 and the gradient at T = 1", "return 2, logits.softmax(0) - probs", "first order"),
    ("not centred", "return 2, (logits - probs.log()) / len(probs)", "sums to 0"),
    ("no 1/K", "d = logits - probs.log()\nreturn 2, d - d.mean()", "not that of"),
    ("sign", "d = probs.log() - logits\nreturn 2, (d - d.mean()) / len(d)", "not that of"),
    ("no logarithm", "d = logits - probs\nreturn 2, (d - d.mean()) / len(d)"),
    ("label left out", "return 2, (logits - logits.mean()) / len(logits)", "not that of"),
    ("prediction left out", "d = -probs.log()\nreturn 2, (d - d.mean()) / len(d)"),
    ("1/K twice", "d = logits - probs.log()\nreturn 2, (d - d.mean()) / len(d) ** 2"),
    ("centred by the label's mean", "d = logits - probs.log()\nreturn 2, (d - (probs * d).sum()) / len(d)"),
]
RIGHT["gradient_limit"] = [
    ("centred difference", "d = logits - probs.log()\nreturn 2, (d - d.mean()) / len(d)"),
    ("each centred", "f, g = logits - logits.mean(), probs.log() - probs.log().mean()\nreturn 2.0, (f - g) / len(f)"),
    ("a list", "K = len(logits)\nd = [f - math.log(p) for f, p in zip(logits.tolist(), probs.tolist())]\n"
     "return 2, [(x - sum(d) / K) / K for x in d]"),
]

# own_method: rows in place of bodies
WRONG["own_method"] = [
    ("no row", "{}", "no row of your own"),
    ("FlexDA again", "{'mine': Method('q_hat', None)}", "flexda under another name"),
    ("ADELLO again", "{'mine': METHODS['adello']}", "under another name"),
    ("an unknown prior", "{'mine': Method('q_labeled', 'rest')}", "a prior that a step knows"),
    ("the tensor itself", "{'mine': Method(torch.ones(3) / 3, None)}"),
    ("ccr as a truth value", "{'mine': Method('p_labeled', True)}", "'rest' or 'all'"),
    ("a plain tuple", "{'mine': ('p_labeled', 'rest', True)}", "not a Method"),
    ("a row of the paper changed", "{'udal': Method('p_labeled', 'rest')}", "no row of your own"),
    ("twice the same", "{'mine': Method('p_labeled', 'rest'), 'yours': Method('p_labeled', 'rest')}", "another name"),
]
RIGHT["own_method"] = [
    ("UDAL with CCR", "{'udal-ccr': Method('p_labeled', 'rest')}"),
    ("FixMatch that distils every image", "{'distil': Method(None, 'all')}"),
    ("two rows", "{'oracle-without': Method('q_true', None), 'la': Method('p_labeled', None, unlabeled=False)}"),
]
NEEDS_A_RUN = {"test_own_method_trains"}  # in a process of its own: see test_a_solved_copy_passes below


# ------------------------------------------------------------------------------------------ the tests

def group_of(name):
    """The tests of an exercise in the order of their file."""
    return [function for test, function in vars(test_exercises).items()
            if exercises.exercise_of(test) == name and test not in NEEDS_A_RUN]


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
    """The message of the first test that fails, or None."""
    try:
        subject = build(exercise, body)
    except SyntaxError as error:
        raise ValueError(f"{exercise.name}: {error}\n{body}") from None
    for test in group_of(exercise.name):
        try:
            test(subject)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=exercises.NAMES)
def test_every_wrong_version_is_caught_with_the_sentence_that_it_needs(exercise):
    for what, body, *says in WRONG[exercise.name]:
        found = first_failure(exercise, body)
        assert found is not None, f"{what}: passes"
        assert not says or says[0] in found, f"{what}: {found!r} does not say {says[0]!r}"


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=exercises.NAMES)
def test_right_versions_that_are_written_otherwise_pass(exercise):
    for how, body in RIGHT[exercise.name]:
        assert first_failure(exercise, body) is None, how


def test_a_name_selects_the_group_of_its_own_exercise_alone():
    """`pytest -k name` takes every test whose name holds it."""
    tests = [test for test in vars(test_exercises) if test.startswith("test_")]
    assert all(exercises.exercise_of(test) for test in tests)
    for name in exercises.NAMES:
        selected = [test for test in tests if name in test]
        assert selected and {exercises.exercise_of(test) for test in selected} == {name}


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


def solve(directory, names):
    """Write the first right version of each exercise into a copy."""
    for name in names:
        place, body = exercises.PLACES[name], RIGHT[name][0][1]
        path = directory / f"{place.partition('.')[0]}.py"
        text = path.read_text(encoding="utf-8")
        if name == "own_method":
            text = text.replace("METHODS = {", "METHODS = {\n    " + body.strip("{}") + ",")
        else:
            line = next(line for line in text.splitlines() if f'"{place} is yours to write"' in line)
            body = "import torch.nn.functional as F\n" + ("return " + body if is_expression(body) else body)
            text = text.replace(line, textwrap.indent(body, line[:len(line) - len(line.lstrip())]))
        path.write_text(text, encoding="utf-8")


def test_a_copy_has_open_exercises_and_no_solutions(tmp_path, capsys):
    assert exercises.main(["blank", "smooth", "losses.adjust", "--out", str(tmp_path / "copy")]) == 0
    own, copied = functions(exercises.ROOT), functions(tmp_path / "copy")
    changed = [place for place in own if own[place] != copied[place]]
    assert changed == ["priors.smooth", "losses.adjust"]
    for place in changed:
        doc = own[place][:own[place].rindex('"""') + 3]
        assert copied[place] == doc + f"\n    raise NotImplementedError('{place} is yours to write')"
    files = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
    others = {"README.md", "requirements.txt", "tests/exercises.py", "tests/test_exercises.py"}
    assert others | set(exercises.MODULES) <= files
    assert not {"tests/test_wrong_solutions.py", "answers.py"} & files
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
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if "](priors.py)" in line or "](losses.py)" in line]
    assert not any(remnant in row for row in rows for remnant in ("^", "log P", "exp KL"))


def test_a_comment_that_is_a_formula_stays_a_comment():
    assert exercises.without_formulas("x = 1  # p^(1/T), normalised\n") == "x = 1  # [formula], normalised\n"


def test_a_solved_copy_passes(tmp_path, capfd):
    exercises.blank(exercises.NAMES, tmp_path)
    solve(tmp_path, exercises.NAMES)
    status = exercises.main(["grade", str(tmp_path)])
    out = capfd.readouterr().out
    assert status == 0 and out.splitlines()[-1] == f"{len(exercises.NAMES)} of {len(exercises.NAMES)} passed", out


def test_a_copy_that_is_half_done_is_told_what_is_missing(tmp_path, capfd):
    exercises.blank(["smooth", "adjust", "complementary_loss"], tmp_path)
    solve(tmp_path, ["smooth", "complementary_loss"])
    assert exercises.main(["grade", str(tmp_path)]) == 1
    assert capfd.readouterr().out.splitlines() == [
        "smooth              passed", "adjust              failed: losses.adjust is yours to write",
        "complementary_loss  failed: first mend adjust, which it uses", "1 of 3 passed"]


def test_an_endless_loop_is_a_failure(tmp_path, capfd):
    exercises.blank(["smooth"], tmp_path)
    path = tmp_path / "priors.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("raise NotImplementedError", "while True: NotImplementedError"), encoding="utf-8")
    assert exercises.grade(tmp_path, timeout=3) == 1
    assert "failed: no end within 3 seconds" in capfd.readouterr().out


def test_a_module_that_python_cannot_read_is_a_failure_with_the_reason():
    message = 'failed on setup with "  File "/copy/priors.py", line 73\n    def\n       ^\nSyntaxError: invalid syntax"'
    assert exercises.sentence(message) == "SyntaxError: invalid syntax File /copy/priors.py, line 73"

"""Every loss of a pair in Python floats, from the papers."""

import math


def logsig(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sig(x):
    return math.exp(logsig(x))


def score(log_t, config):
    """f'(t) of each divergence, 0 at t = 1, from f-DPO's table 1."""
    t, alpha = math.exp(log_t), config.f_alpha_divergence_coef
    return {
        "reverse_kl": math.log(t),
        "forward_kl": 1 - 1 / t,
        "js_divergence": math.log(2 * t / (1 + t)),
        "alpha_divergence": (t ** (alpha - 1) - 1) / (alpha - 1),
    }[config.f_divergence_type]


def formula(name, k, rows, c):
    """The loss of the k-th pair of a batch.

    A row: chosen, rejected, their reference log-probs, their lengths, score gap, gold log-prob and length.
    """
    w, l, rw, rl, nw, nl, gap, gold, ng = rows[k]  # noqa: E741
    a, b = w - rw, l - rl
    fa, fb = score(a, c), score(b, c)
    x, eps, beta = c.beta * (fa - fb), c.label_smoothing, c.beta
    mean = fa / nw - fb / nl
    goal = c.score_scale * gap
    won = [row[0] - row[2] for row in rows]
    lost = [row[1] - row[3] for row in rows]

    def smooth(z):
        return -(1 - eps) * logsig(z) - eps * logsig(-z)

    def ranked(values):
        return sorted(values)[k]

    def log_odds(mean_logp):
        return math.log(math.exp(mean_logp) / (1 - math.exp(mean_logp)))

    def alpha_reward(mean_logp):
        return (1 - math.exp(mean_logp) ** -c.alphapo_alpha) / c.alphapo_alpha

    def aot():
        policy, reference = [row[0] - row[1] for row in rows], [row[2] - row[3] for row in rows]
        return smooth(beta * (ranked(policy) - ranked(reference)))

    def kto():
        kl_w, kl_l = (max(0, sum(side) / len(side)) for side in (won, lost))
        chosen, rejected = 1 - sig(beta * (a - kl_l)), 1 - sig(beta * (kl_w - b))
        return c.desirable_weight * chosen + c.undesirable_weight * rejected

    return {
        "sigmoid": lambda: -logsig(x),
        "cdpo": lambda: smooth(x),
        "robust": lambda: (-(1 - eps) * logsig(x) + eps * logsig(-x)) / (1 - 2 * eps),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,
        "ipo_sum": lambda: (fa - fb - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -logsig(beta * mean),
        "exo_pair": lambda: sig(x) * math.log(sig(x) / (1 - eps)) + sig(-x) * math.log(sig(-x) / eps),
        "nca_pair": lambda: -logsig(beta * a) - 0.5 * (logsig(-beta * a) + logsig(-beta * b)),
        "bco_pair": lambda: -logsig(beta * a) - logsig(-beta * b),
        "bco": lambda: -logsig(beta * a - 0.3) - logsig(0.3 - beta * b),
        "sppo_hard": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sig(beta * a) + sig(beta * b),
        "apo_down": lambda: sig(beta * a) + 1 - sig(beta * (a - b)),
        "discopop": lambda: (1 - sig(x / c.discopop_tau)) * -logsig(x) + sig(x / c.discopop_tau) * math.exp(-x),
        "dpop": lambda: -logsig(beta * (fa - fb - c.dpop_lambda * max(0.0, rw - w))),
        "odpo": lambda: -logsig(x - goal),
        "rpo": lambda: sig(goal) * math.log(sig(goal) / sig(x)) + sig(-goal) * math.log(sig(-goal) / sig(-x)),
        "aot": aot,
        "aot_unpaired": lambda: smooth(beta * (ranked(won) - ranked(lost))),
        "kto": kto,
        "sft": lambda: -w / nw,
        "sft_tokens": lambda: -sum(row[0] for row in rows) / sum(row[4] for row in rows),
        "cpo": lambda: smooth(beta * (w - l)),
        "slic": lambda: max(0.0, 1 - beta * (w - l)),
        "simpo": lambda: smooth(beta * (w / nw - l / nl) - c.simpo_gamma),
        "alphapo": lambda: smooth(beta * (alpha_reward(w / nw) - alpha_reward(l / nl)) - c.simpo_gamma),
        "odds_ratio": lambda: -beta * logsig(log_odds(w / nw) - log_odds(l / nl)),
        "orpo": lambda: -w / nw - beta * logsig(log_odds(w / nw) - log_odds(l / nl)),
        "tpo": lambda: -logsig(beta * (w - l)) - c.tpo_alpha * gold / ng,
    }[name]()

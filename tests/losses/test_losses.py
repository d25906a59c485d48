"""Losses against hand-written fp64 formulas, and against TRL's and Liger's own code where they have the same loss."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_formulas import formula
from trl_oracle import TRL_LOSSES, trl_token_loss

from dpo_fast.config import LossConfig
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, facts
from dpo_fast.losses.facts import names_with
from dpo_fast.losses.objective import (
    check_loss,
    loss_at_reference,
    needs_reference,
    preference_loss,
    slope_at_reference,
)
from dpo_fast.losses.pairs import PairLogps

PAIRS = 7
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
CONFIGS = [
    LossConfig(beta=0.1, label_smoothing=0.05),
    LossConfig(
        beta=0.5,
        label_smoothing=0.2,
        discopop_tau=0.3,
        dpop_lambda=3.0,
        simpo_gamma=1.5,
        alphapo_alpha=-0.5,
        tpo_alpha=0.3,
        score_scale=0.7,
        desirable_weight=1.3,
        undesirable_weight=0.6,
    ),
]
CONFIG_NAMES = ["beta 0.1", "beta 0.5"]
WITH_DIVERGENCES = [
    (name, divergence)
    for name in sorted(LOSSES)
    for divergence in DIVERGENCES
    if divergence == "reverse_kl" or name in names_with("takes_divergence")
]
SMOOTHED = {name for name in LOSSES if "label_smoothing" in facts.facts_of(name).options}
FAR = [(1e3, 1e3), (1e3, -1e3), (-1e3, 1e3), (-1e3, -1e3), (5.0, -100.0), (-1e4, 0.0)]


@pytest.fixture
def pairs():
    return draw_pairs(torch.float32)


def draw_pairs(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(scale):
        return scale * torch.rand(PAIRS, generator=generator).to(dtype)

    lengths = torch.tensor([1, 2, 3, 5, 8, 13, 400])
    chosen, rejected = -20 - draw(30), -20 - draw(30)
    return PairLogps(
        chosen,
        rejected,
        chosen + draw(16) - 8,
        rejected + draw(16) - 8,
        lengths,
        lengths.flip(0),
        score_gap=draw(3),
        gold=-20 - draw(30),
        gold_len=lengths + 1,
        reward_shift=torch.tensor(0.3, dtype=dtype),
    )


def rows_of(pairs, which):
    """Some pairs, by a slice."""
    values = {name: getattr(pairs, name) for name in PairLogps.__dataclass_fields__}
    return PairLogps(**{k: v if v is None or v.ndim == 0 else v[which] for k, v in values.items()})


def columns(pairs):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    names += ("score_gap", "gold", "gold_len")
    return list(zip(*(getattr(pairs, name).tolist() for name in names), strict=True))


@pytest.mark.parametrize(("name", "divergence"), WITH_DIVERGENCES)
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_loss_is_the_papers_formula(name, config, divergence):
    pairs = draw_pairs(torch.float64)
    config = replace(config, loss_type=name, f_divergence_type=divergence)
    rows = columns(pairs)
    want = torch.tensor([formula(name, k, rows, config) for k in range(PAIRS)], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(pairs, config), want, rtol=1e-7, atol=1e-9)
    single = preference_loss(draw_pairs(torch.float32), config)
    torch.testing.assert_close(single.double(), want, rtol=3e-5, atol=3e-5)


def trl_loss(pairs, config):
    """TRL 1.16's own loss, its model replaced by one that returns the log-probs in one token each."""
    lengths = torch.cat([pairs.chosen_len, pairs.rejected_len])
    logps = torch.zeros(len(lengths), int(lengths.max()))
    logps[:, 0] = torch.cat([pairs.chosen, pairs.rejected])
    return trl_token_loss(logps, lengths, pairs.ref_chosen, pairs.ref_rejected, config)


@pytest.mark.parametrize(("name", "divergence"), [case for case in WITH_DIVERGENCES if case[0] in TRL_LOSSES])
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_loss_is_trls(name, config, divergence, pairs):
    config = replace(config, loss_type=name, f_divergence_type=divergence)
    batches = [rows_of(pairs, slice(i, i + 1)) for i in range(PAIRS)]
    # TRL averages `sft` over tokens, so that only single pairs are the same.
    for batch in batches if name == "sft" else [pairs, *batches]:
        got = preference_loss(batch, config).mean()
        torch.testing.assert_close(got, trl_loss(batch, config), rtol=1e-6, atol=1e-6)
    if name == "sft":
        got = preference_loss(pairs, replace(config, loss_type="sft_tokens")).mean()
        torch.testing.assert_close(got, trl_loss(pairs, config), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"), [("cpo", "sigmoid"), ("slic", "hinge"), ("simpo", "simpo"), ("alphapo", "simpo")]
)
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_loss_without_reference_is_trls(name, theirs, config, pairs):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=config.alphapo_alpha if name == "alphapo" else 0.0,
        beta=config.beta,
        loss_type=theirs,
        simpo_gamma=config.simpo_gamma,
        label_smoothing=config.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    of_mean = name in ("simpo", "alphapo")
    chosen = pairs.chosen_mean if of_mean else pairs.chosen
    rejected = pairs.rejected_mean if of_mean else pairs.rejected
    want, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    got = preference_loss(pairs, replace(config, loss_type=name))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_orpo_is_trls(config, pairs):
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=config.beta, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, pairs.chosen_mean, pairs.rejected_mean)
    got = preference_loss(pairs, replace(config, loss_type="orpo"))
    torch.testing.assert_close(got, -pairs.chosen_mean - ratio, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_loss_is_ligers(name, pairs):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    want = LigerFusedLinearDPOFunction.preference_loss_fn(
        pairs.chosen,
        pairs.rejected,
        torch.ones(2 * PAIRS, 3, dtype=torch.int64),
        ref_chosen_logps=pairs.ref_chosen,
        ref_rejected_logps=pairs.ref_rejected,
        beta=0.3,
        loss_type=name,
    )[0]
    got = preference_loss(pairs, LossConfig(loss_type=name, beta=0.3)).sum() / PAIRS
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_kto_is_ligers_with_the_other_sides_kl(pairs):
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    chosen_kl, rejected_kl = (
        x.mean().clamp(min=0).expand(PAIRS) for x in (pairs.chosen_logratio, pairs.rejected_logratio)
    )
    want, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        torch.cat([pairs.chosen, pairs.rejected]),
        torch.arange(2 * PAIRS) < PAIRS,
        torch.ones(2 * PAIRS, 3, dtype=torch.int64),
        ref_log_prob_chunk=torch.cat([pairs.ref_chosen, pairs.ref_rejected]),
        beta=0.3,
        kl=torch.cat([rejected_kl, chosen_kl]),
    )
    got = preference_loss(pairs, LossConfig(loss_type="kto", beta=0.3)).sum() / (2 * PAIRS)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_losses_add_up_by_their_weights(pairs):
    config = LossConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5])
    want = sum(
        weight * preference_loss(pairs, LossConfig(loss_type=name))
        for name, weight in zip(config.loss_type, config.loss_weights, strict=True)
    )
    torch.testing.assert_close(preference_loss(pairs, config), want)


def test_weights_scale_each_pair(pairs):
    weight = torch.linspace(0, 2, PAIRS)
    config = LossConfig(loss_type=["sigmoid", "sft"])
    weighted = preference_loss(replace(pairs, weight=weight), config)
    torch.testing.assert_close(weighted, weight * preference_loss(pairs, config))
    with pytest.raises(UserError, match="aot: sorts the pairs, so they cannot have weights"):
        preference_loss(replace(pairs, weight=weight), LossConfig(loss_type="aot"))


def test_a_loss_of_ones_own_is_found_by_name(pairs, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def exponential(pairs):\n    return (-pairs.margin).exp()\n\n"
        "def mean(pairs):\n    return pairs.margin.mean()\n\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    got = preference_loss(pairs, LossConfig(loss_type=["my_losses:exponential", "sigmoid"]))
    want = torch.exp(-pairs.margin) + preference_loss(pairs, LossConfig())
    torch.testing.assert_close(got, want)
    assert loss_at_reference(LossConfig(loss_type="my_losses:exponential")) is None
    assert needs_reference(LossConfig(loss_type="my_losses:exponential"))
    for name, message in {
        "my_losses:mean": r"expected one loss per pair, \(7,\); got \(\)",
        "my_losses:number": "expected a function, found int",
        "my_losses:missing": "cannot be imported",
        "no_such_module:f": "No module named 'no_such_module'",
        "nameless": "choose one of .* or name a function of your own",
    }.items():
        with pytest.raises(UserError, match=message):
            preference_loss(pairs, LossConfig(loss_type=name))


@pytest.mark.parametrize("name", ["bco_pair", "apo_zero", "simpo"])
def test_a_divergence_that_has_no_meaning_is_refused(name, pairs):
    with pytest.raises(UserError, match=f"f_divergence_type forward_kl: has no meaning for {name}"):
        preference_loss(pairs, LossConfig(loss_type=name, f_divergence_type="forward_kl"))


@pytest.mark.parametrize(
    ("name", "missing", "cure"),
    [("rpo", "score_gap", "margin_column"), ("odpo", "score_gap", "margin_column"), ("tpo", "gold", "gold_column")],
)
def test_what_a_loss_lacks_is_named(name, missing, cure, pairs):
    with pytest.raises(UserError, match=f"--{cure}"):
        preference_loss(replace(pairs, **{missing: None}), LossConfig(loss_type=name))


def test_loss_at_the_reference_is_known(pairs):
    at_reference = pairs.at_reference()
    assert torch.equal(at_reference.margin, torch.zeros(PAIRS))
    assert loss_at_reference(LossConfig()) == pytest.approx(math.log(2), abs=1e-7)
    for name in names_with("is_known_at_reference"):
        config = LossConfig(loss_type=name, label_smoothing=0.1)
        at_reference = replace(at_reference, reward_shift=None)
        got = preference_loss(at_reference, config)
        torch.testing.assert_close(got, torch.full((PAIRS,), loss_at_reference(config)))
    for name in set(LOSSES) - names_with("is_known_at_reference"):
        assert loss_at_reference(LossConfig(loss_type=["sigmoid", name])) is None


def test_which_losses_need_a_reference(pairs):
    for name in LOSSES:
        config = LossConfig(loss_type=name, label_smoothing=0.1)
        moved = replace(pairs, ref_chosen=pairs.ref_chosen + torch.rand(PAIRS), ref_rejected=pairs.ref_rejected - 1)
        same = torch.equal(preference_loss(pairs, config), preference_loss(moved, config))
        assert same is not needs_reference(config), name
    assert needs_reference(LossConfig(loss_type=["sft", "sigmoid"]))
    assert not needs_reference(LossConfig(loss_type=["sft", "simpo"]))


def test_which_losses_depend_on_the_others_of_a_batch(pairs):
    for name in LOSSES:
        config = LossConfig(loss_type=name, label_smoothing=0.1)
        alone = torch.cat([preference_loss(rows_of(pairs, slice(i, i + 1)), config) for i in range(PAIRS)])
        assert torch.equal(alone, preference_loss(pairs, config)) is (name not in names_with("compares_pairs")), name


def test_gradient_of_sigmoid_is_the_papers_weight(pairs):
    """DPO section 4: d loss / d log pi(w) = -beta sigmoid(-beta Δ)."""
    chosen = pairs.chosen.clone().requires_grad_()
    moved = PairLogps(
        chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_len, pairs.rejected_len
    )
    preference_loss(moved, LossConfig(beta=0.1)).sum().backward()
    torch.testing.assert_close(chosen.grad, -0.1 * torch.sigmoid(-0.1 * pairs.margin))


# Squares of scores that grow as e^(-r): beyond fp32 in truth.
TRULY_INFINITE = {(name, f) for name in ("ipo", "ipo_sum") for f in ("forward_kl", "alpha_divergence")}


@pytest.mark.parametrize(("name", "divergence"), WITH_DIVERGENCES)
@pytest.mark.parametrize(
    "ratios", [(1e3, 1e3), (1e3, -1e3), (-1e3, 1e3), (-1e3, -1e3), (5.0, -100.0), (-1e4, 0.0)], ids=str
)
def test_losses_and_gradients_are_finite_far_from_the_reference(name, divergence, ratios):
    """Log-ratios in nats of answers of one token, whose log-probs are below 0; fp32, forward and backward."""
    logps = [torch.tensor([min(r, 0.0) - 1], requires_grad=True) for r in ratios]
    references = [torch.tensor([-1 - max(r, 0.0)]) for r in ratios]
    one = torch.ones(1, dtype=torch.int64)
    pairs = PairLogps(*logps, *references, one, one, score_gap=one * 5.0, gold=-one * 1.0, gold_len=one)
    smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    loss = preference_loss(pairs, LossConfig(loss_type=name, f_divergence_type=divergence, **smoothing))
    loss.sum().backward()
    gradients = [x.grad for x in logps if x.grad is not None]
    assert not any(x.isnan() for x in (loss, *gradients))
    if (name, divergence) not in TRULY_INFINITE:
        assert all(x.isfinite() for x in (loss, *gradients))


def test_a_far_rejected_answer_has_no_gradient_under_forward_kl():
    """-log sigmoid(0.1 (e^100 - e^-5)): 0, and flat in both log-ratios."""
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (5.0, -100.0))
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1)
    loss = preference_loss(
        PairLogps(chosen, rejected, zero, zero, one, one), LossConfig(f_divergence_type="forward_kl")
    )
    loss.sum().backward()
    assert (loss.item(), chosen.grad.item(), rejected.grad.item()) == (0, 0, 0)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_a_far_chosen_answer_is_pulled_back(divergence):
    """The score falls as e^(-r): its gradient must not vanish where fp32 ends."""
    chosen = torch.tensor([-1e3], requires_grad=True)
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1)
    preference_loss(
        PairLogps(chosen, zero, zero, zero, one, one), LossConfig(f_divergence_type=divergence)
    ).sum().backward()
    assert chosen.grad.item() < -1e20


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
def test_discopop_far_from_the_reference_is_the_papers_formula(tau):
    """Value and derivative in 60 digits, by mpmath."""
    mp = pytest.importorskip("mpmath").mp
    ratios = [-1e3, -300.0, -88.0, -3.0, 0.0, 2.0, 88.0, 1e3]
    chosen = torch.tensor(ratios, requires_grad=True)
    zero, one = torch.zeros(len(ratios)), torch.ones(len(ratios), dtype=torch.int64)
    config = LossConfig(loss_type="discopop", beta=1.0, discopop_tau=tau)
    loss = preference_loss(PairLogps(chosen, zero, zero, zero, one, one), config)
    loss.sum().backward()

    def exact(x):
        m = 1 / (1 + mp.exp(-x / mp.mpf(tau)))
        return (1 - m) * mp.log(1 + mp.exp(-x)) + m * mp.exp(-x)

    with mp.workdps(60):
        assert loss.tolist() == pytest.approx([float(exact(mp.mpf(x))) for x in ratios], rel=1e-5, abs=1e-30)
        slopes = [float(mp.diff(exact, mp.mpf(x), h=mp.mpf(10) ** -20)) for x in ratios]
        assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-30)


def test_orpo_at_both_ends_of_probability():
    """log(1 - e^x) by the plain formula loses all digits for likely answers; compared with fp64's expm1."""
    mean = torch.tensor([-1e-6, -1e-3, -0.5, -0.8, -30.0])
    pairs = PairLogps(mean, mean.flip(0), *[torch.zeros(5)] * 2, *[torch.ones(5, dtype=torch.int64)] * 2)
    w, l = mean.double(), mean.double().flip(0)  # noqa: E741
    odds = w - l - (torch.log(-torch.expm1(w)) - torch.log(-torch.expm1(l)))
    want = -w - 0.1 * torch.nn.functional.logsigmoid(odds)
    torch.testing.assert_close(
        preference_loss(pairs, LossConfig(loss_type="orpo")).double(), want, rtol=1e-5, atol=1e-6
    )


class Watched(LossConfig):
    """A configuration that notes which options are read."""

    def __getattribute__(self, name):
        if name in facts.LOSS_OPTIONS:
            object.__getattribute__(self, "__dict__").setdefault("noted", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_reads_the_options_that_it_declares(name, pairs):
    config = Watched(loss_type=name, label_smoothing=0.1)
    config.noted = set()
    LOSSES[name](pairs, config)
    assert config.noted == set(facts.facts_of(name).options)


def test_every_option_of_some_losses_is_known():
    shared = {"loss_type", "loss_weights", "beta", "f_divergence_type", "ld_alpha", "use_weighting"}
    assert {x.name for x in fields(LossConfig)} - shared - {"f_alpha_divergence_coef"} == set(facts.LOSS_OPTIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing 0.1: not read by --loss_type sigmoid; DPO with label .* cdpo"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing 0.1: not read by --loss_type hinge; .* cdpo"),
        ({"loss_type": "cdpo", "label_smoothing": 2.0}, r"label_smoothing 2.0: expected a number in"),
        ({"loss_type": "cdpo", "label_smoothing": -1.0}, r"label_smoothing -1.0: expected a number in"),
        ({"loss_type": "cpo", "label_smoothing": math.nan}, r"label_smoothing nan: expected a number in"),
        (
            {"loss_type": ["sigmoid", "sft"], "simpo_gamma": 1.0},
            "simpo_gamma 1.0: not read by .*, sft; .* alphapo, simpo",
        ),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef 0.3: .* belongs to --f_divergence_type alpha"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau 0.0: expected a number above 0"),
    ],
)
def test_an_option_out_of_range_or_never_read_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_loss(LossConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "cdpo"], "label_smoothing": 0.1},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        *({"loss_type": name, "label_smoothing": 0.1} for name in sorted(SMOOTHED)),
    ],
)
def test_an_option_that_is_read_is_taken(settings):
    check_loss(LossConfig(**settings))


@pytest.fixture
def invented():
    """A loss that is new, by nothing but its definition."""
    before = dict(LOSSES), dict(facts.FACTS)

    @facts.loss(facts.Facts(compares_pairs=True, sorts_pairs=True, takes_divergence=True, slope=lambda config: 7.0))
    def invented(pairs, config):
        return (1 - config.beta * pairs.margin.sort().values) ** 2

    yield invented
    for mine, theirs in zip((LOSSES, facts.FACTS), before, strict=True):
        mine.clear()
        mine.update(theirs)


def test_a_new_loss_is_known_everywhere_by_its_definition(invented, pairs, capsys):
    from dpo_fast.cli import main

    config = LossConfig(loss_type="invented", f_divergence_type="js_divergence")
    assert torch.equal(preference_loss(pairs, config), invented(pairs, config))
    assert loss_at_reference(config) == 1
    assert slope_at_reference(config) == 7
    with pytest.raises(UserError, match="invented sorts the pairs"):
        preference_loss(pairs, replace(config, use_weighting=True))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert ", invented, ipo" in " ".join(capsys.readouterr().out.split())


def test_every_loss_is_in_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text()
    listed = {name for row in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert listed >= LOSSES.keys()

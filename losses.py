"""Every objective as a pure function of tensors; copy one, and velocity_error, into your own project.

    python losses.py                 a worked example: what each loss says about one pair

THE CONVENTION, EVERYWHERE: t = 0 IS DATA, t = 1 IS NOISE. xt = (1 - t) x0 + t eps, v = d xt / dt = eps - x0.
Sampling integrates t from 1 down to 0. A velocity error is the per-sample MEAN over all elements, and every
beta refers to that mean: for a summed error divide beta by the number of elements. Equations are those of Liu
et al. 2025, "Improving Video Generation with Human Feedback", arXiv:2501.13918.
"""
import torch
import torch.nn.functional as F


# ---- rectified flow ----

def mix(x0, eps, t):
    """xt = (1 - t) x0 + t eps, like x0 (B, ...); t (B,) in [0, 1]. Sec. 4.1."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * eps


def velocity_error(v_pred, v):
    """Mean squared velocity error of each sample, (B,) fp32, from v_pred and v = eps - x0 (B, ...).

    The paper's pseudo-code sums instead; beta = 500 is sensible only for the mean. In fp32, because Flow-DPO
    subtracts two nearly equal errors.
    """
    return (v_pred.float() - v.float()).square().flatten(1).mean(1)


# ---- alignment ----

def flow_sft(err):
    """Flow matching on the preferred videos, (B,): the velocity error itself. Sec. 5.2."""
    return err


def flow_rwr(err, r, tau=1.0, clip=10.0):
    """Flow-RWR, (B,): exp(r / tau) times the velocity error err (B,) of a video with reward r (B,). Eq. 9.

    Departure: the weights are divided by their mean over the batch and then clipped, so that the learning
    rate means the same as for SFT and no single video rules; the paper states neither. No gradient flows
    through r. Pass the r of the whole optimizer batch: normalised over a micro-batch of 1, this is SFT.
    """
    weight = torch.exp((r - r.max()).detach().float() / tau)
    weight = (weight / weight.mean()).clamp(max=clip)
    return weight * err


def flow_dpo(err_w, err_l, err_ref_w, err_ref_l, beta):
    """Flow-DPO of each pair, (B,): -log sigmoid(-beta/2 [(err_w - err_ref_w) - (err_l - err_ref_l)]). Eq. 6.

    err_*: velocity errors (B,) of the preferred (w) and the other (l) video under the model and the
    reference, at the same t and eps. beta: a float or (B,), in units of the mean error. The derivation gives
    beta (1 - t)^2; the paper's method, and its better result, is a constant beta (see beta_schedule).
    """
    return -F.logsigmoid(-0.5 * beta * ((err_w - err_ref_w) - (err_l - err_ref_l)))


def beta_schedule(beta, t, kind):
    """beta at time t (B,), (B,). Sec. 4.2: the KL weight of each time in velocity errors.

    constant   the paper's method
    (1-t)^2    what the derivation gives, as eps's squared error is (1 - t)^2 times v's: little near noise
    t^2        the same argument for the error of x0
    (1-t)/t    the exact weight of the path's KL divergence; t is clamped to 0.05 and more: at most 20 beta
    """
    if kind == "constant":
        return beta * torch.ones_like(t)
    if kind == "(1-t)^2":
        return beta * (1 - t).square()
    if kind == "t^2":
        return beta * t.square()
    if kind == "(1-t)/t":
        return beta * (1 - t) / t.clamp(min=0.05)
    raise ValueError(f"beta schedule {kind!r} is not one of constant, (1-t)^2, t^2, (1-t)/t")


# ---- rewards ----

def bt(d, label):
    """Bradley-Terry negative log-likelihood, elementwise. Sec. 3.2.

    d = r_A - r_B; label +1 where A is preferred, -1 where B is, 0 for a tie, nan where unlabelled. A tie or
    nan gives exactly 0, in value and gradient. Computed in the dtype of d.
    """
    decided = (label == 1) | (label == -1)
    sign = torch.where(decided, label, 0).to(d.dtype)
    return torch.where(decided, -F.logsigmoid(sign * torch.where(decided, d, 0)), 0)


def btt(d, label, tie=5.0):
    """Bradley-Terry with ties (Rao & Kupper 1967), negative log-likelihood, elementwise. Eq. 1 and 2.

        P(A) = sigmoid(d - log tie)    P(B) = sigmoid(-d - log tie)    P(tie) = (tie^2 - 1) P(A) P(B)

    d and label as in bt; nan gives exactly 0. Corrects a misprint: with Eq. 1's first branch as printed the
    three do not sum to 1. tie = 1 leaves no room for ties and is bt.
    """
    tie = torch.as_tensor(tie, dtype=d.dtype, device=d.device)
    labelled = ~label.isnan()
    d = torch.where(labelled, d, 0)
    nll_a, nll_b = -F.logsigmoid(d - tie.log()), -F.logsigmoid(-d - tie.log())
    nll_tie = nll_a + nll_b - (tie.square() - 1).log()
    nll = torch.where(label > 0, nll_a, torch.where(label < 0, nll_b, nll_tie))
    return torch.where(labelled, nll, 0)


def regression(r, score):
    """Squared error to a Likert score, elementwise; nan gives exactly 0, in value and gradient. Sec. 3.2."""
    return torch.where(score.isnan(), 0, r - score.to(r.dtype)).square()


def masked_mean(loss, label):
    """Mean of loss over the entries whose label is not nan, a scalar; 0 where none is.

    The authors' code divides by all entries instead, so that its scale moves with the share of missing
    labels. For bt a tie says nothing: pass its label as nan.
    """
    labelled = ~label.isnan()
    return torch.where(labelled, loss, 0).sum() / labelled.sum().clamp(min=1)


if __name__ == "__main__":
    print("One pair, errors 0.30 and 0.32 under the reference. Flow-DPO with beta 500 on the mean error:")
    ref = torch.tensor([0.30]), torch.tensor([0.32])
    for says, w, l in (("at the reference", .30, .32), ("the winner fits better", .29, .32),
                       ("only the loser fits worse", .30, .33), ("both fit worse", .31, .34),
                       ("the wrong way round", .31, .31)):
        loss = flow_dpo(torch.tensor([w]), torch.tensor([l]), *ref, beta=500.0)
        print(f"  {says:26} err_w {w:.2f}  err_l {l:.2f}  loss {loss.item():.4f}")
    print("Rewards r_A - r_B = 2. Negative log-likelihood of each label:")
    label = torch.tensor([1.0, 0.0, -1.0])
    print("  BTT, tie 5:  A {:.3f}  tie {:.3f}  B {:.3f}".format(*btt(torch.full((3,), 2.0), label).tolist()))
    print("  BT:          A {:.3f}  tie {:.3f}  B {:.3f}".format(*bt(torch.full((3,), 2.0), label).tolist()))
    weights = flow_rwr(torch.ones(4), torch.tensor([-1.0, 0.0, 1.0, 3.0]))
    print("Flow-RWR weights for rewards -1, 0, 1, 3: ", " ".join(f"{w:.2f}" for w in weights.tolist()))

"""Align the video DiT with preferences: Flow-DPO, Flow-RWR or SFT; or pretrain the toy base.

    python train_align.py --loss dpo            pairs, reward labels, Flow-DPO, held-out win rates, a picture
    python train_align.py --loss sft            (or rwr) the paper's baselines on the same videos
    python train_align.py --loss pretrain --compile --out assets/base       make the toy base again

Pairs come from the renderers of Shapes world, not from the model (off-policy, as in the paper), and are
relabelled by the reward. Departures from the paper, which aligns a 1B model with LoRA r 64, Adam 5e-6, batch
64, one epoch of 182k pairs (Table 10): see RECIPES. Flow-RWR's weights are normalised over the optimizer
batch and clipped (losses.flow_rwr).
"""
import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

from data import (DIMS, ORACLE_STD, RENDERERS, check_out, command, draw_noise, embed_text, fail, find,
                  flawed_videos, log, overall, parse_args, render_as, rng, start_run, step_rows, toy_pairs, world_hash)
from losses import beta_schedule, flow_dpo, flow_rwr, flow_sft, mix, velocity_error
from model import PRESETS, VideoDiT, add_lora, lora_disabled, save_lora
from reward import LatentReward, score_clean
from sample import eval_prompts, evaluate, generate, load_model, report

# What unset flags fall to; tried on the validation prompts, at one or two learning rates each.
RECIPES = {
    "dpo":      dict(lr=5e-4, lora_rank=16, steps=100, batch=24, warmup=10, ema=0.0),
    "sft":      dict(lr=1e-3, lora_rank=16, steps=100, batch=24, warmup=10, ema=0.0),
    "rwr":      dict(lr=1e-3, lora_rank=16, steps=100, batch=24, warmup=10, ema=0.0),
    "pretrain": dict(lr=2e-3, lora_rank=0, steps=3000, batch=24, warmup=50, ema=0.998),
}


@dataclass
class Args:
    loss: Literal["dpo", "sft", "rwr", "pretrain"] = "dpo"  # the objective
    model: str = "assets/base"              # run folder of the model to align; it is the reference too
    labels: Literal["reward", "human", "oracle"] = "reward"  # who decides the pairs
    reward: str = "assets/reward"           # run folder of the reward that labels
    dim_w: tuple = (1.0, 1.0, 1.0)          # weights of VQ, MQ, TA in the overall reward; 0,0,1 aligns TA alone
    n_pairs: int = 2400                     # training pairs
    beta: float = 500.0                     # dpo: KL strength, in units of the per-element MEAN error
    beta_schedule: Literal["constant", "(1-t)^2", "t^2", "(1-t)/t"] = "constant"  # dpo: beta over time
    tau: float = 1.0                        # rwr: temperature of the weights exp(r / tau)
    lora_rank: int | None = None            # 0 trains all weights against a frozen copy
    lora_alpha: float | None = None         # unset: twice the rank, as the paper's 128 for 64
    lr: float | None = None                 # constant after the warm-up; pretraining decays it to 0 at the end
    steps: int | None = None                # optimizer steps
    batch: int | None = None                # pairs per step; sft takes the winners of twice as many
    accumulate: int = 1                     # parts in which a step's batch goes through the model
    warmup: int | None = None               # steps of linear warm-up
    max_grad_norm: float = 1.0              # gradient clipping
    ema: float | None = None                # decay of the averaged weights that are saved; 0 is off
    seed: int = 0                           # of pairs, order, t and noise
    compile: bool = False                   # torch.compile the blocks
    eval_n: int = 256                       # held-out draws for the win rates
    eval_steps: int = 16                    # Euler steps of the evaluation, without classifier-free guidance
    split: Literal["eval", "val"] = "eval"  # prompts of the evaluation; val is for tuning
    out: str | None = None                  # run folder; unset: runs/<loss>


def errors(model, x0, text, t, eps):
    """Velocity errors (B, K) of videos x0 (B, K, C, T, H, W), K of them sharing text (B, S, D), t (B,) and eps."""
    B, K = x0.shape[:2]
    t, eps, text = (y.repeat_interleave(K, dim=0) for y in (t, eps, text))
    x0 = x0.flatten(0, 1)
    return velocity_error(model(mix(x0, eps, t), t, text), eps - x0).view(B, K)


def label_pairs(args, pairs, reward):
    """(usable rows, order (n, 2), r (n, 2) or None): A and B as indices, the winner first, and their scalar
    rewards in that order.

    By the reward or the oracle the higher weighted mean of normalised scores wins; by humans the sign of the
    weighted sum of their labels decides, and ties are dropped.
    """
    rows, r = torch.arange(len(pairs.prompts)), None
    if args.labels == "human":
        margin = overall(pairs.label[:, :3].nan_to_num(), args.dim_w)           # an unlabelled dimension says nothing
        rows = rows[margin != 0]
        if not len(rows):
            fail(f"none of the {len(margin)} pairs is decided by its human labels under --dim_w {args.dim_w}")
    else:
        if args.labels == "oracle":
            r = overall(pairs.score / torch.tensor(ORACLE_STD), args.dim_w)
        else:
            scores = [score_clean(reward, pairs.latents(part).flatten(0, 1), pairs.text(part).repeat_interleave(2, 0))
                      for part in rows.split(256)]
            r = overall(torch.cat(scores).view(-1, 2, len(DIMS)), args.dim_w)
        margin = r[:, 0] - r[:, 1]
    b_wins = (margin < 0).long()
    order = torch.stack([b_wins, 1 - b_wins], dim=1)
    a, b = (margin > 0).float().mean(), b_wins.float().mean()
    print(f"{len(rows)} of {len(margin)} pairs labelled by {args.labels}; A wins {a:.0%}, B {b:.0%}")
    return rows, order, None if r is None else r.gather(1, order)


def mixture_batch(n, seed, step):
    """A pretraining batch: flawed videos x0 (n, 1, C, T, H, W), captions (n, S, D), a tenth empty for CFG."""
    g = rng("mixture", seed, step)
    video, prompts, _ = flawed_videos(n, None, g)
    text = embed_text(prompts)
    text[torch.rand(n, generator=g) < 0.1] = 0
    return video.float()[:, None], text


def make_optimizers(args, model):
    """Adam on what is trainable; to pretrain, Muon on the blocks' matrices (10 times lr) and AdamW on the rest."""
    if args.loss != "pretrain":
        return [torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return [torch.optim.Muon(matrices, lr=10 * args.lr), torch.optim.AdamW(rest, lr=args.lr, weight_decay=0)]


def learning_rate_scale(args, step):
    """Linear warm-up, then constant; pretraining also falls linearly to 0 over its last 40 %."""
    fall = (args.steps - step) / (0.4 * args.steps) if args.loss == "pretrain" else 1
    return min(1, (step + 1) / args.warmup) * min(1, fall)


def check(args):
    """Fill unset flags from the recipe and refuse what cannot work, before anything is loaded."""
    for name, value in RECIPES[args.loss].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{args.loss}"
    args.lora_alpha = args.lora_alpha or 2.0 * args.lora_rank
    if args.loss == "rwr" and args.labels == "human":
        fail("--loss rwr weighs videos by their scores and human labels have none: use --labels reward or oracle")
    if len(args.dim_w) != len(DIMS) or not any(args.dim_w):
        fail(f"--dim_w takes {len(DIMS)} numbers, not all zero, for {', '.join(DIMS)}; e.g. --dim_w 0,0,1")
    if args.loss != "pretrain":
        find(args.model, "transformer", "lora.safetensors")
        if args.labels == "reward":
            find(args.reward, "reward.safetensors")
    check_out(args.out)


def main(args):
    """Train, then evaluate on held-out prompts against the start model; returns what eval.json holds."""
    check(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pretrain, reward = args.loss == "pretrain", None
    torch.manual_seed(args.seed)
    if pretrain:
        start, model = None, VideoDiT(PRESETS["toy"]).to(device)
    else:
        start = load_model(args.model).to(device)
        model = copy.deepcopy(start).requires_grad_(True)
        if args.labels == "reward":
            reward = LatentReward.from_pretrained(args.reward).to(device)
    run = start_run(args, device)

    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha)
        reference, as_reference = model, lora_disabled                          # the model itself, its adapters off
    else:
        reference, as_reference = start, nullcontext                            # a frozen copy
    if args.compile:
        model.compile_blocks()
    average = copy.deepcopy(model) if args.ema else None
    optimizers = make_optimizers(args, model)
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if not pretrain:
        pairs = toy_pairs(args.n_pairs, "train", args.seed)
        usable, order, r = label_pairs(args, pairs, reward)
    per_step = args.batch if args.loss in ("dpo", "rwr") else 2 * args.batch    # all see 2 x batch videos a step

    stats, tic = [], time.time()
    for step in (bar := trange(args.steps, desc=args.loss)):
        for optimizer, lr in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_scale(args, step)
        rows = torch.arange(per_step)
        if not pretrain:
            rows = usable[step_rows(len(usable), per_step, args.seed, step)]
        if args.loss == "rwr":                                                  # weights over the whole optimizer batch
            weight = flow_rwr(torch.ones(2 * len(rows)), r[rows].flatten(), args.tau).view(-1, 2).to(device)

        for part in torch.arange(len(rows)).chunk(args.accumulate):
            ids = rows[part]
            if pretrain:
                x0, text = (y[part] for y in mixture_batch(per_step, args.seed, step))
            else:
                x0, text = pairs.latents(ids), pairs.text(ids)                  # (B, 2, C, T, H, W), (B, S, D)
                x0 = x0[torch.arange(len(ids))[:, None], order[ids]]            # the winner first
            t, eps = draw_noise(x0.shape[2:], args.seed, step, ids.tolist(), logit_normal=pretrain)
            x0, text, t, eps = (y.to(device) for y in (x0, text, t, eps))

            if args.loss == "dpo":
                err_w, err_l = errors(model, x0, text, t, eps).unbind(1)        # both share t and eps
                with torch.no_grad(), as_reference(reference):
                    err_ref_w, err_ref_l = errors(reference, x0, text, t, eps).unbind(1)
                beta = beta_schedule(args.beta, t, args.beta_schedule)
                losses = flow_dpo(err_w, err_l, err_ref_w, err_ref_l, beta)
                stats.append(torch.stack([t, losses, err_w - err_ref_w, err_l - err_ref_l], dim=1).detach())
            else:
                if args.loss == "rwr":
                    losses = (weight[part] * errors(model, x0, text, t, eps)).mean(1)
                else:                                             # sft and pretrain: the first video of a row
                    losses = flow_sft(errors(model, x0[:, :1], text, t, eps)).mean(1)
                stats.append(torch.stack([t, losses], dim=1).detach())
            (losses.sum() / len(rows)).backward()

        grad_norm = clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if average:
            decay = min(args.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters()):
                    a.lerp_(p, 1 - decay)
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            event = summary(torch.cat(stats).cpu())
            shown = [k for k in ("loss", "implicit_acc", "gap_w", "gap_l") if k in event]
            bar.set_postfix({k: f"{event[k]:.4f}" for k in shown})
            log(run, step=step + 1, grad_norm=grad_norm.item(), seconds=round(time.time() - tic, 1), **event)
            stats = []

    return finish(args, run, average or model, start, reward)


def summary(stats):
    """What to log of rows (t, loss[, gap_w, gap_l]): means, implicit accuracy, margin, loss in ten bins of t."""
    t, losses = stats[:, 0], stats[:, 1]
    bins = [losses[(t * 10).long().clamp(max=9) == b] for b in range(10)]
    event = {"loss": losses.mean().item(), "loss_by_t": [x.mean().item() if len(x) else None for x in bins]}
    if stats.shape[1] == 4:
        margin = stats[:, 3] - stats[:, 2]                                      # > 0: the pair is ranked as labelled
        event |= {"implicit_acc": (margin > 0).float().mean().item(), "margin": margin.mean().item(),
                  "gap_w": stats[:, 2].mean().item(), "gap_l": stats[:, 3].mean().item()}
    return event


def finish(args, run, model, start, reward):
    """Save the model and evaluate it: against the start model, or, pretrained, against the videos it learnt from."""
    model.eval()
    metadata = {"command": command(args), "seed": str(args.seed), "world": world_hash()}
    if args.lora_rank:
        save_lora(model, run / "lora.safetensors", metadata)
    else:
        model.save_pretrained(run / "transformer", metadata, torch.float16 if args.loss == "pretrain" else None)
    prompts = eval_prompts(args.eval_n, args.split)
    videos = generate(model, prompts, args.seed, args.eval_steps)
    if args.loss == "pretrain":
        g = rng("mixture", args.seed)
        who = torch.randint(len(RENDERERS), (len(prompts),), generator=g)
        start_videos = render_as(who, prompts, g).float()
    else:
        start_videos = generate(start, prompts, args.seed, args.eval_steps)
    result = evaluate(videos, start_videos, prompts, reward)
    report(run, result, prompts, videos, start_videos)
    return result


if __name__ == "__main__":
    main(parse_args(Args, __doc__))

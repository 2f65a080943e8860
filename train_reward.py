"""Train and evaluate a reward model on preference pairs.

    python train_reward.py                      the toy's VideoReward: a reward of clean videos, with ties (BTT)
    python train_reward.py --noisy              the reward of noisy latents that guides sampling (Flow-NRG)
    python train_reward.py --loss regression    on Likert points instead of pairs (bt is the third choice)

Prints the accuracy on held-out prompts with and without ties, and the ceiling that the annotators' own noise
leaves: the accuracy of the oracle itself against the same labels. Differences from the paper: the labeller is
a latent reward too, where the paper trains a vision-language model (Sec. 3); --noisy follows its Table 11
(BT, one noise and t for both of a pair).
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

from data import (DIMS, check_out, command, draw_noise, fail, log, overall, parse_args, start_run, step_rows, toy_pairs,
                  with_overall, world_hash, write_json)
from losses import bt, btt, masked_mean, mix, regression
from reward import LatentReward, accuracies
from sample import load_model


@dataclass
class Args:
    loss: Literal["btt", "bt", "regression"] | None = None  # unset: btt, or bt with --noisy, as Table 11
    noisy: bool = False                     # train on noisy latents at uniform t, for guidance; else on clean ones
    shared_noise: bool = True               # with --noisy: the same noise for both of a pair, as the paper
    model: str = "assets/base"              # run folder whose first blocks the reward grows from
    depth: int = 2                          # how many of them
    n_pairs: int = 24000                    # training pairs
    steps: int = 2000                       # optimizer steps
    batch: int = 32                         # pairs per step
    lr: float = 1e-3                        # Adam, decayed linearly to 0 after 50 steps of warm-up
    tie: float = 5.0                        # btt: the tie parameter theta
    n_eval: int = 2000                      # held-out pairs
    seed: int = 0                           # of pairs, order and noise
    compile: bool = False                   # torch.compile the blocks
    out: str | None = None                  # run folder; unset: runs/reward or runs/noisy


def pair_scores(reward, pairs, rows, t, eps_a, eps_b):
    """Raw scores (B, 2, 3) of A and B, both at time t (B,) and through one forward."""
    device = reward.mean.device
    x0 = pairs.latents(rows)
    xt = torch.stack([mix(x0[:, 0], eps_a, t), mix(x0[:, 1], eps_b, t)], dim=1).flatten(0, 1)
    twice = lambda y: y.repeat_interleave(2, dim=0).to(device)
    return reward(xt.to(device), twice(t), twice(pairs.text(rows))).view(len(rows), 2, len(DIMS))


def pair_noise(args, pairs, rows, step, t=None):
    """(t, eps_a, eps_b) of a batch. t (B,): as given, or uniform for a noisy reward and 0 for a clean one."""
    shape = pairs.videos.shape[2:]
    drawn, eps_a = draw_noise(shape, args.seed, step, rows.tolist())
    eps_b = eps_a if args.shared_noise else draw_noise(shape, args.seed + 1, step, rows.tolist())[1]
    t = drawn if t is None and args.noisy else torch.full_like(drawn, t or 0.0)
    return t, eps_a, eps_b


@torch.no_grad()
def score_pairs(args, reward, pairs, t=None, batch=64):
    """Raw scores (n, 2, 3) of all pairs, at times as in training or all at t."""
    return torch.cat([pair_scores(reward, pairs, rows, *pair_noise(args, pairs, rows, 2**31, t)).cpu()
                      for rows in torch.arange(len(pairs.prompts)).split(batch)])


def main(args):
    """Train, normalise on the validation prompts, evaluate on held-out ones; returns what eval.json holds."""
    args.loss = args.loss or ("bt" if args.noisy else "btt")
    args.out = args.out or ("runs/noisy" if args.noisy else "runs/reward")
    if args.tie <= 1:
        fail(f"--tie {args.tie} leaves no room for ties: it must be above 1 (the paper takes 5)")
    check_out(args.out)
    model = load_model(args.model)
    if not 0 < args.depth <= model.config.num_layers:
        fail(f"--depth {args.depth}: {args.model} has {model.config.num_layers} blocks")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = start_run(args, device)
    torch.manual_seed(args.seed)
    reward = LatentReward.from_base(model, args.depth).to(device)
    if args.compile:
        reward.dit.compile_blocks()
    optimizer = torch.optim.Adam(reward.parameters(), lr=args.lr)
    pairs = toy_pairs(args.n_pairs, "train", args.seed)
    history = []

    for step in (bar := trange(args.steps, desc=f"reward {args.loss}")):
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 50, (args.steps - step) / args.steps)
        rows = step_rows(len(pairs.prompts), args.batch, args.seed, step)
        label = pairs.label[rows, :3].to(device)                                # (B, 3)
        r = pair_scores(reward, pairs, rows, *pair_noise(args, pairs, rows, step))
        d = r[:, 0] - r[:, 1]
        if args.loss == "btt":
            loss = masked_mean(btt(d, label, args.tie), label)
        elif args.loss == "bt":
            label = label.masked_fill(label == 0, float("nan"))                 # to BT a tie says nothing
            loss = masked_mean(bt(d, label), label)
        else:
            score = pairs.mos[rows].to(device) - 3                              # points around the middle of the scale
            loss = masked_mean(regression(r, score), score)
        loss.backward()
        norm = clip_grad_norm_(reward.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            recent = sum(history[-20:]) / len(history[-20:])
            bar.set_postfix(loss=f"{recent:.3f}")
            log(run, step=step + 1, loss=recent, grad_norm=norm.item())

    reward.eval()
    val = score_pairs(args, reward, toy_pairs(args.n_eval, "val", args.seed)).flatten(0, 1)
    reward.mean.copy_(val.mean(0))
    reward.std.copy_(val.std(0))
    metadata = {"command": command(args), "seed": str(args.seed), "world": world_hash()}
    reward.save(run / "reward.safetensors", metadata)
    result = {**evaluate_reward(args, reward), "loss_first": history[0], "loss_last": recent}
    write_json(run / "eval.json", result)
    print_accuracies(result)
    return result


def evaluate_reward(args, reward):
    """Accuracies on held-out prompts at t = 0, and over t for a noisy reward, beside the oracle's on these labels."""
    pairs = toy_pairs(args.n_eval, "eval", args.seed)
    truth = with_overall(pairs.score[:, 0]) - with_overall(pairs.score[:, 1])
    result = {"ceiling": accuracies(pairs.label, truth), "n": args.n_eval, "by_t": {}}
    for t in (0.0, 0.25, 0.5, 0.75, 0.9) if args.noisy else (0.0,):
        r = (score_pairs(args, reward, pairs, t) - reward.mean.cpu()) / reward.std.cpu()
        d = r[:, 0] - r[:, 1]
        result["by_t"][str(t)] = accuracies(pairs.label, torch.cat([d, overall(d)[:, None]], dim=1))
    return result


def print_accuracies(result):
    """Print a Markdown table: accuracy without / with ties, per dimension; the ceiling is the oracle's."""
    names = (*DIMS, "Overall")
    print("| accuracy without / with ties, % | " + " | ".join(names) + " |\n|---|" + "---|" * 4)
    rows = {"ceiling": result["ceiling"]} | {f"reward at t = {t}": row for t, row in result["by_t"].items()}
    for name, row in rows.items():
        cells = [f"{100 * row[dim]['without']:.1f} / {100 * row[dim]['with']:.1f}" for dim in names]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(parse_args(Args, __doc__))

"""Train and evaluate a reward model on preference pairs.

    python train_reward.py                      the toy's VideoReward: a reward of clean videos, with ties (BTT)
    python train_reward.py --noisy              the reward of noisy latents that guides sampling (Flow-NRG)
    python train_reward.py --loss regression    on Likert points instead of pairs (bt is the third choice)
    python train_reward.py --model Qwen/Qwen2-VL-2B-Instruct --pairs prefs.csv      the paper's VideoReward
    python train_reward.py --noisy --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs prefs.csv    guidance for Wan
    python train_reward.py --eval KwaiVGI/VideoReward --template prompt_template.py --pairs videogen-rewardbench.csv

--resume goes on with a run that was stopped, exactly where it was.

Prints the accuracy on held-out prompts with and without ties; for the toy also the ceiling that the annotators'
own noise leaves: the accuracy of the oracle itself against the same labels. Differences from the paper: the toy's
labeller is a latent reward too, where the paper trains a vision-language model (Sec. 3), as --model with a Qwen2-VL
does; --noisy follows its Table 11 (BT, one noise and t for both of a pair).
"""
import csv
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

from data import (DIMS, PROMPTS, WORLD, WanCodec, check_clip_args, check_counts, check_out, command, ctrl_c, draw_noise,
                  encode, fail, launch, load_state, log, read_pairs, report_pairs, rng, save_state, split_of, start_run,
                  step_rows, stop_broken, toy_pairs, user_errors, with_overall, world_hash, write_json)
from losses import bt, btt, masked_mean, mix, regression
from reward import (LatentReward, VideoReward, accuracies, and_overall, check_videos, is_qwen, is_video_reward,
                    load_reward, print_accuracies, score_files)
from sample import load_model, origin

# What unset flags fall to. Of Qwen2-VL and Wan they are the paper's (Table 11), where unset steps make two epochs;
# how many blocks the noisy reward of Wan has, the paper doesn't say.
RECIPES = {
    "toy":  dict(lr=1e-3, batch=32, accumulate=1, steps=2400, depth=2),
    "wan":  dict(lr=5e-6, batch=144, accumulate=144, depth=8),
    "qwen": dict(lr=2e-6, batch=32, accumulate=32),
}
# VideoReward's accuracies in the paper (Table 2). GenAI-Bench has one label, and TA alone was held against it.
PAPER = {"VideoGen-RewardBench": {"VQ": (.7566, .5968), "MQ": (.7470, .6603), "TA": (.7220, .5380),
                                  "Overall": (.7359, .6126)},
         "GenAI-Bench": {"Overall": (.7289, .4941)}}


@dataclass
class Args:
    loss: Literal["btt", "bt", "regression"] | None = None  # unset: btt, or bt with --noisy, as Table 11
    noisy: bool = False                     # train on noisy latents at uniform t, for guidance; else on clean ones
    shared_noise: bool = True               # with --noisy: the same noise for both of a pair, as the paper
    model: str = "assets/base"              # a Qwen2-VL, or the DiT whose first blocks the reward grows from
    depth: int | None = None                # how many of them
    pairs: str | None = None                # CSV or JSONL of labelled pairs of video files; unset: Shapes world
    n_pairs: int = 24000                    # training pairs of Shapes world
    label_noise: float = 1.0                # Shapes world: annotators' noise; 1 is that of the held-out pairs
    eval: str | None = None                 # evaluate this reward instead; --model: its Qwen2-VL, if moved
    template: str | None = None             # the authors' prompt_template.py; their checkpoint needs it
    reward_token: Literal["special", "last", "mean"] = "special"  # where Qwen2-VL is read; last: Table 6, row III
    steps: int | None = None                # optimizer steps
    batch: int | None = None                # pairs per step
    accumulate: int | None = None           # parts in which a step's batch goes through the model
    lr: float | None = None                 # Adam; learning_rate_scale says how it moves
    tie: float = 5.0                        # btt: the tie parameter theta
    n_eval: int = 2000                      # held-out pairs of Shapes world
    frames: int = 81                        # Wan: frames of each video, at 16 per second; 4k + 1
    size: tuple = (480, 832)                # Wan: height and width, multiples of 16
    skip_bad: bool = False                  # Wan: leave out pairs whose videos cannot be used
    cache: str = "runs/cache"               # folder of what is computed once: latents of videos, scores of --eval
    seed: int = 0                           # of pairs, order and noise
    compile: bool = False                   # torch.compile the blocks of a latent reward
    save_every: int = 500                   # steps between the states that --resume starts from
    resume: bool = False                    # go on with the run in --out
    out: str | None = None                  # run folder; unset: runs/reward, runs/noisy or runs/eval


def pair_scores(args, reward, pairs, rows, step, t=None):
    """Raw scores (B, 2, 3) of A and B through one forward; of latents at time t, or as pair_noise draws it."""
    device = reward.mean.device
    if isinstance(reward, VideoReward):
        both = [(path, pairs.prompts[i]) for i in rows.tolist() for path in pairs.paths[i]]
        with user_errors():
            inputs = [x.to(device) for x in reward.inputs(*zip(*both))]
        return reward(*inputs).view(len(rows), 2, len(DIMS))
    x0 = pairs.latents(rows)
    t, eps_a, eps_b = pair_noise(args, x0.shape[2:], rows, step, t)
    xt = torch.stack([mix(x0[:, 0], eps_a, t), mix(x0[:, 1], eps_b, t)], dim=1).flatten(0, 1)
    twice = lambda y: y.repeat_interleave(2, dim=0).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=not reward.of_shapes):         # a Wan is large
        return reward(xt.to(device), twice(t), twice(pairs.text(rows))).float().view(len(rows), 2, len(DIMS))


def pair_noise(args, shape, rows, step, t=None):
    """(t, eps_a, eps_b) of a batch of latents of this shape. t (B,): as given, or uniform for a noisy reward and 0 for
    a clean one.
    """
    drawn, eps_a = draw_noise(shape, args.seed, step, rows.tolist())
    eps_b = eps_a if args.shared_noise else draw_noise(shape, args.seed + 1, step, rows.tolist())[1]
    t = drawn if t is None and args.noisy else torch.full_like(drawn, t or 0.0)
    return t, eps_a, eps_b


@torch.no_grad()
def raw_scores(args, reward, pairs, rows, t=None):
    """Raw scores (len(rows), 2, 3); of latents at times as in training or all at t."""
    batch = 64 if pairs.paths is None else 1                                    # files are large
    return torch.cat([pair_scores(args, reward, pairs, part, 2**31, t).cpu() for part in rows.split(batch)])


def targets(args, pairs):
    """What the loss holds scores against, nan where it says nothing: labels (n, 3), or points (n, 2, 3)."""
    if args.loss == "regression":
        return pairs.mos - 3                                                    # around the middle of the scale
    label = pairs.label[:, :3]
    return label.masked_fill(label == 0, float("nan")) if args.loss == "bt" else label     # to BT a tie says nothing


def pair_loss(args, r, target):
    """Mean loss of raw scores r (B, 2, 3) over what target labels."""
    if args.loss == "regression":
        return masked_mean(regression(r, target), target)
    d = r[:, 0] - r[:, 1]
    return masked_mean(btt(d, target, args.tie) if args.loss == "btt" else bt(d, target), target)


def learning_rate_scale(args, step, kind):
    """Linear warm-up over 5 % of the steps, then constant; of the toy: over 50 steps, then linearly to 0."""
    if kind == "toy":
        return min((step + 1) / 50, (args.steps - step) / args.steps)
    return min(1, (step + 1) / (0.05 * args.steps))


def check(args):
    """(pairs of the file or None, kind of reward): fill unset flags, refuse what can't work before a model loads."""
    args.loss = args.loss or ("bt" if args.noisy else "btt")
    args.out = args.out or ("runs/eval" if args.eval else "runs/noisy" if args.noisy else "runs/reward")
    if args.tie <= 1:
        fail(f"--tie {args.tie} leaves no room for ties: it must be above 1 (the paper takes 5)")
    if args.label_noise <= 0:
        fail(f"--label_noise {args.label_noise}: give a number above 0")
    if WORLD > 1:
        fail("rewards are trained and measured by one process: python train_reward.py, without torchrun")
    check_counts(args, "n_pairs", "steps", "batch", "accumulate", "save_every", "n_eval")
    check_out(args.out)
    with user_errors():
        if args.eval:
            kind = "qwen" if is_video_reward(args.eval) else "toy"
        else:
            kind = "qwen" if is_qwen(args.model) else "toy" if origin(args.model)[1] else "wan"
        if (kind != "toy") != bool(args.pairs):
            fail("Shapes world makes its own pairs: leave --pairs out, or name a Qwen2-VL or Wan with --model"
                 if args.pairs else "this reward learns and is measured on video files: name their CSV with --pairs")
        if kind == "qwen" and args.noisy:
            fail("--noisy trains a reward on latents and a Qwen2-VL reads pixels: leave one of them out")
        pairs = read_pairs(args.pairs) if args.pairs else None
        if kind == "qwen":
            check_videos(path for pair in pairs.paths for path in pair)
    if kind == "wan":
        check_clip_args(args)
    if not args.eval:
        for name, value in RECIPES[kind].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.steps = args.steps or max(1, 2 * len(pairs.prompts) // args.batch)
    if pairs and not args.eval:
        if targets(args, pairs).isnan().all():
            columns = "MOS_A_VQ .. MOS_B_TA" if args.loss == "regression" else "VQ, MQ, TA"
            fail(f"{args.pairs} labels no pair for --loss {args.loss}: it needs columns {columns}")
        split_prompts(args, pairs)                                              # refuses a single prompt
    return pairs, kind


def main(args):
    """Train, normalise on validation prompts, evaluate on held-out ones; returns what eval.json holds."""
    pairs, kind = check(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.eval:
        moved = args.model if kind == "qwen" and args.model != Args.model else None
        return benchmark(args, load_reward(args.eval, moved, args.template).to(device), pairs)
    torch.manual_seed(args.seed)
    if kind == "qwen":
        reward = VideoReward.from_base(args.model, args.reward_token, args.template).trainable(args.seed).to(device)
    else:
        reward = latent_reward(args, kind, device)
    codec = WanCodec(origin(args.model)[0], device) if kind == "wan" else None
    run = start_run(args, device)
    if codec:
        pairs = encode(pairs, codec, args.cache, args.frames, args.size, args.skip_bad)
    if kind == "toy":
        pairs = toy_pairs(args.n_pairs, "train", args.seed, noise=args.label_noise)
        train_rows = torch.arange(args.n_pairs)
    else:
        train_rows, val_rows = split_prompts(args, pairs)
    held_out = [p for p in PROMPTS if split_of(p) == "eval"] if kind == "toy" else [pairs.prompts[i] for i in val_rows]
    report_pairs(pairs.subset(train_rows), held_out)
    metadata = {"command": command(args), "seed": str(args.seed)} | ({"world": world_hash()} if kind == "toy" else {})
    optimizer = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], lr=args.lr, fused=True)
    target, history = targets(args, pairs), []
    state = {"reward": reward, "optimizer": optimizer, "history": history}
    first = load_state(run, state) if args.resume else 0

    with ctrl_c() as stopped:
        for step in (bar := trange(first, args.steps, initial=first, total=args.steps, desc=f"reward {args.loss}")):
            optimizer.param_groups[0]["lr"] = args.lr * learning_rate_scale(args, step, kind)
            rows = train_rows[step_rows(len(train_rows), args.batch, args.seed, step)]
            labelled, loss = (~target[rows].isnan()).sum().clamp(min=1), 0
            for part in rows.chunk(args.accumulate):
                r = pair_scores(args, reward, pairs, part, step)
                share = (~target[part].isnan()).sum() / labelled                # so that parts add up to the whole mean
                part_loss = share.to(device) * pair_loss(args, r, target[part].to(device))
                part_loss.backward()
                loss = loss + part_loss.detach()
            loss, norm = loss.item(), clip_grad_norm_(reward.parameters(), 1.0)
            if not math.isfinite(loss + norm.item()):
                save_state(run, step, state)                                    # no weight has moved yet
                named = [pairs.lines[i] if args.pairs else i for i in rows.tolist()]
                times = None if kind == "qwen" else pair_noise(args, (), rows, step)[0].tolist()
                bar.close()
                stop_broken(run, step=step + 1, grad_norm=norm.item(), rows=named, t=times, loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss)
            if (step + 1) % 20 == 0 or step + 1 == args.steps:
                recent = sum(history[-20:]) / len(history[-20:])
                bar.set_postfix(loss=f"{recent:.3f}")
                log(run, step=step + 1, loss=recent, grad_norm=norm.item())
            if step + 1 < args.steps and ((step + 1) % args.save_every == 0 or stopped()):
                save_state(run, step + 1, state)
                if stopped():
                    bar.close()
                    fail(f"stopped after step {step + 1}: the same command with --resume goes on from there")

    reward.eval()
    val, val_rows = (toy_pairs(args.n_eval, "val", args.seed), torch.arange(args.n_eval)) if kind == "toy" else (
        pairs, val_rows)
    r = raw_scores(args, reward, val, val_rows)
    reward.mean.copy_(r.flatten(0, 1).mean(0))
    reward.std.copy_(r.flatten(0, 1).std(0))
    reward.save(run, metadata)
    if kind == "toy":
        result = evaluate_toy(args, reward)
    else:                                       # measured on the same prompts: the constants only weigh Overall
        r = (r - reward.mean.cpu()) / reward.std.cpu()
        result = {"n": len(val_rows), "reward": pair_accuracies(val.label[val_rows], r)}
        print_accuracies({"reward": [result["reward"]]})
    result |= {"loss_first": history[0], "loss_last": recent}
    write_json(run / "eval.json", result)
    return result


def latent_reward(args, kind, device):
    """A LatentReward to train, grown from the first blocks of args.model."""
    model = load_model(args.model)
    if not 0 < args.depth <= model.config.num_layers:
        fail(f"--depth {args.depth}: {args.model} has {model.config.num_layers} blocks")
    reward = LatentReward.from_base(model, args.depth).to(device)
    for block in reward.dit.blocks:
        block.checkpointing = kind == "wan"
    if args.compile:
        reward.dit.compile_blocks()
    return reward


def split_prompts(args, pairs):
    """(training rows, validation rows): one prompt in twenty, at least one, is kept for validation."""
    prompts = sorted(set(pairs.prompts))
    if len(prompts) < 2:
        fail(f"{args.pairs} has a single prompt: others are needed to normalise and measure the scores on")
    order = torch.randperm(len(prompts), generator=rng("split", args.seed)).tolist()
    kept = {prompts[i] for i in order[:max(1, len(prompts) // 20)]}
    is_kept = torch.tensor([prompt in kept for prompt in pairs.prompts])
    return (~is_kept).nonzero()[:, 0], is_kept.nonzero()[:, 0]


def pair_accuracies(label, r):
    """Accuracies of normalised scores r (n, 2, 3) against labels (n, 4), of the dimensions that have labels."""
    d = r[:, 0] - r[:, 1]
    found = accuracies(label, and_overall(d))
    return {dim: found[dim] for dim, h in zip(found, label.T) if not h.isnan().all()}


def evaluate_toy(args, reward):
    """Accuracies on held-out prompts at t = 0, and over t for a noisy reward, beside the oracle's on these labels;
    and, at t = 0, how far apart the scores of tied and of other pairs are.
    """
    pairs = toy_pairs(args.n_eval, "eval", args.seed)
    truth = with_overall(pairs.score[:, 0]) - with_overall(pairs.score[:, 1])
    result = {"ceiling": accuracies(pairs.label, truth), "n": args.n_eval, "by_t": {}}
    for t in (0.0, 0.25, 0.5, 0.75, 0.9) if args.noisy else (0.0,):
        r = (raw_scores(args, reward, pairs, torch.arange(args.n_eval), t) - reward.mean.cpu()) / reward.std.cpu()
        result["by_t"][str(t)] = pair_accuracies(pairs.label, r)
        if t == 0:
            result["differences"] = differences(pairs.label[:, :3], (r[:, 0] - r[:, 1]).abs())
    rows = {"ceiling": result["ceiling"]} | {f"reward at t = {t}": row for t, row in result["by_t"].items()}
    print_accuracies({name: [row] for name, row in rows.items()})
    return result


def differences(label, gap):
    """{dimension: {"tied", "other": quartiles of the score differences gap (n, 3) of pairs labelled so, "separation":
    how often a tied pair's gap is the smaller one of a tied and another pair's}}. Fig. 3 of the paper in numbers.
    """
    found = {}
    for dim, h, g in zip(DIMS, label.T, gap.T):
        tied, other = g[h == 0], g[h.abs() == 1]
        quartiles = {name: [round(x, 3) for x in y.quantile(torch.tensor([.25, .5, .75])).tolist()]
                     for name, y in (("tied", tied), ("other", other)) if len(y)}
        found[dim] = quartiles | {"separation": (tied[:, None] < other).float().mean().item()}
    return found


def benchmark(args, reward, pairs):
    """Measure a trained reward, on a pairs file beside the paper's row or on the toy; returns what eval.json holds."""
    if isinstance(reward, LatentReward):
        if not reward.of_shapes:
            fail(f"{args.eval} judges latents of Wan: how good it is stands in its eval.json")
        result = evaluate_toy(args, reward)
    else:
        r = score_files(reward, pairs, args.cache)
        result = {"n": len(pairs.prompts), "reward": pair_accuracies(pairs.label, r)}
        rows, table = {"reward": result["reward"]}, "VideoGen-RewardBench"
        if list(result["reward"]) == ["Overall"]:                               # as the paper scores GenAI-Bench
            table = "GenAI-Bench"
            rows["reward, TA alone"] = result["TA alone"] = pair_accuracies(pairs.label, r[..., 2:].expand_as(r))
        paper = {dim: dict(zip(("without", "with"), pair)) for dim, pair in PAPER[table].items()}
        rows[f"the paper's, {table}"] = paper
        print_accuracies({name: [row] for name, row in rows.items()})
    run = start_run(args, reward.mean.device)
    write_json(run / "eval.json", result)
    if pairs:
        write_scores(run / "pairs.csv", pairs, r)
        print(f"scores of every pair: {run / 'pairs.csv'}")
    return result


def write_scores(path, pairs, r):
    """Write a CSV of pairs, one a row: videos, prompt, labels, and the normalised scores r (n, 2, 3) of A and B."""
    names, words = (*DIMS, "Overall"), {1.0: "A", 0.0: "same", -1.0: "B"}
    r = and_overall(r).flatten(1).tolist()
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        scores = [f"score_{side}_{dim}" for side in "AB" for dim in names]
        table.writerow(["path_A", "path_B", "prompt", *names, *scores])
        for pair, prompt, label, scores in zip(pairs.paths, pairs.prompts, pairs.label.tolist(), r):
            table.writerow([*pair, prompt, *(words.get(x, "") for x in label), *(f"{x:.4f}" for x in scores)])


if __name__ == "__main__":
    launch(main, Args, __doc__)

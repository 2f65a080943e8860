"""Train and evaluate a reward model on preference pairs.

    python train_reward.py                      the toy's VideoReward: of clean videos, with ties (BTT)
    python train_reward.py --noisy              the reward of noisy latents that guides sampling (Flow-NRG)
    python train_reward.py --loss regression    on Likert points instead of pairs (bt is the third choice)
    python train_reward.py --model Qwen/Qwen2-VL-2B-Instruct --pairs prefs.csv      the paper's VideoReward
    python train_reward.py --noisy --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs prefs.csv
    python train_reward.py --eval KwaiVGI/VideoReward --template prompt_template.py --pairs rewardbench.csv

--resume goes on with a run that was stopped, exactly where it was.

Prints the accuracy on held-out prompts with and without ties; for the toy also the ceiling that the
annotators' own noise leaves: the accuracy of the oracle itself against the same labels. Differences from the
paper: the toy's labeller is a latent reward too, where the paper trains a vision-language model (Sec. 3), as
--model with a Qwen2-VL does; --noisy follows its Table 11 (BT, one noise and t for both of a pair).
"""
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from data import (DIMS, DTYPES, RANKS, content_hash, without_twins, Count, Numbers, Run, Shapes, command, draw_noise,
                  fill_unset, launch, learning_rate_scale, look_into, micro_batches,
                  normalised, read_pairs, recipes, report_pairs, rng, step_rows, toy_pairs,
                  true_scores, with_overall, world_of, write_json)
from losses import bt, btt, masked_mean, mix, regression
from model import UserError, merge_lora
from reward import LatentReward, VideoReward, accuracies, check_video, is_qwen, load_reward, reads
from sample import load_model, print_accuracies

# What unset flags fall to, by what the reward reads. Of files and Wan they are the paper's (Table 11), where
# unset steps make two epochs; how many blocks the noisy reward of Wan has, the paper doesn't say.
RECIPES = recipes(("shapes", "wan", "files"), {
    "lr":         (1e-3,         5e-6,       2e-6),
    "batch":      (32,           144,        32),
    "accumulate": (1,            144,        32),
    "steps":      (2400,         None,       None),
    "depth":      (2,            8,          None),
})
# VideoReward's accuracies in the paper (Table 2). GenAI-Bench has one label, held against TA alone.
PAPER = {"VideoGen-RewardBench": {"VQ": (.7566, .5968), "MQ": (.7470, .6603), "TA": (.7220, .5380),
                                  "Overall": (.7359, .6126)},
         "GenAI-Bench": {"Overall": (.7289, .4941)}}


@dataclass
class Args:
    loss: Literal["btt", "bt", "regression"] | None = None  # unset: btt, or bt with --noisy, as Table 11
    noisy: bool = False                # train on noisy latents at uniform t, for guidance; else on clean ones
    shared_noise: bool = True               # with --noisy: the same noise for both of a pair, as the paper
    model: str = "assets/base"              # a Qwen2-VL, or the DiT whose first blocks the reward grows from
    depth: Count | None = None              # how many of them
    pairs: str | None = None              # CSV or JSONL of labelled pairs of video files; unset: Shapes world
    n_pairs: Count = 24000                  # training pairs of Shapes world
    label_noise: float = 1.0                # Shapes world: annotators' noise; 1 is that of the held-out pairs
    eval: str | None = None                 # evaluate this reward instead; --model: its Qwen2-VL, if moved
    dtype: Literal["fp32", "bf16"] = "fp32"  # with --eval: of VideoReward's Qwen2-VL
    template: str | None = None             # the authors' prompt_template.py; their checkpoint needs it
    reward_token: Literal["special", "last"] = "special"  # where Qwen2-VL is read; last: Table 6, row III
    steps: Count | None = None              # optimizer steps
    batch: Count | None = None              # pairs per step
    accumulate: Count | None = None         # parts in which a step's batch goes through the model
    lr: float | None = None      # Adam's peak: the toy's falls to 0 after 50 steps, the paper's rises for 5 %
    tie: float = 5.0                        # btt: the tie parameter theta
    n_eval: Count = 2000                    # held-out pairs of Shapes world
    frames: Count = 81                      # Wan: frames of each video, at 16 per second; 4k + 1
    size: Numbers = (480, 832)                 # Wan: height and width, multiples of 16
    skip_bad: bool = False                  # leave out pairs whose videos cannot be used
    cache: str = "runs/cache"           # folder of what is computed once: latents of videos, scores of --eval
    seed: int = 0                          # of pairs, order and noise
    compile: bool = False                   # torch.compile the blocks of a latent reward
    save_every: Count = 500                 # steps between the states that --resume starts from
    resume: bool = False                    # go on with the run in --out
    out: str | None = None                  # run folder; unset: runs/reward, runs/noisy or runs/eval


def check(args):
    """What the reward reads. Fill unset flags from the recipe, and refuse what contradicts itself."""
    if args.eval == "oracle":
        raise UserError("the oracle needs no measuring: it is the ceiling beside every reward of the toy")
    if args.eval:
        kind = reads(args.eval)
    else:
        kind = "files" if is_qwen(args.model) else world_of(args.model).name
        fill_unset(args, RECIPES[kind])
    fill_unset(args, {"loss": "bt" if args.noisy else "btt",
                "out": "runs/eval" if args.eval else "runs/noisy" if args.noisy else "runs/reward"})
    if args.tie <= 1 or args.label_noise <= 0:
        raise UserError(f"--tie {args.tie}, --label_noise {args.label_noise}: give a tie above 1 (the paper "
                        "takes 5; 1 leaves no room for ties), and noise above 0")
    if RANKS > 1:
        raise UserError("rewards are trained and measured by one process: leave torchrun out")
    if kind != "shapes" and not args.pairs:
        raise UserError("this reward learns and is measured on video files: name their CSV with --pairs")
    if kind == "shapes" and args.pairs:
        raise UserError("Shapes world makes its own pairs: leave --pairs out, or --model a Qwen2-VL or Wan")
    if kind == "files" and args.noisy:
        raise UserError("--noisy trains a reward on latents, and a Qwen2-VL reads pixels: leave one out")
    if args.eval and kind == "wan":
        raise UserError(f"{args.eval} judges latents of Wan: how good it is stands in its eval.json")
    return kind


# ---- scores, targets, loss ----

def pair_scores(args, reward, world, pairs, rows, step, samples, t=None):
    """Raw scores (B, 2, 3) of A and B through one forward; of latents at time t or, unset, at the times of
    these samples for a noisy reward and at 0 for a clean one.
    """
    if isinstance(reward, VideoReward):
        paths, prompts = zip(*[(path, pairs.prompts[i]) for i in rows.tolist() for path in pairs.videos[i]])
        inputs = reward.inputs(paths, prompts)
    else:
        x0, text = world.latents(pairs, rows), world.text(pairs, rows)
        drawn, eps_a = draw_noise(x0.shape[2:], args.seed, step, samples)
        eps_b = eps_a if args.shared_noise else draw_noise(x0.shape[2:], args.seed + 1, step, samples)[1]
        t = drawn if t is None and args.noisy else torch.full_like(drawn, t or 0.0)
        t, text = t.repeat_interleave(2), text.repeat_interleave(2, dim=0)      # the same for both
        eps = torch.stack([eps_a, eps_b], dim=1).flatten(0, 1)
        inputs = mix(x0.flatten(0, 1), eps, t), t, text
    return reward(*(x.to(reward.mean.device) for x in inputs)).view(len(rows), 2, len(DIMS))


@torch.no_grad()
def raw_scores(args, reward, world, pairs, rows, t=None):
    """Raw scores (len(rows), 2, 3); of latents at times as in training or all at t."""
    batch = 64 if reward.reads == "shapes" else 1                         # files and latents of Wan are large
    return torch.cat([pair_scores(args, reward, world, pairs, ids, 2**31, ids.tolist(), t).cpu()
                      for ids in rows.split(batch)])


def targets(args, pairs):
    """What the loss holds scores against, nan where it says nothing: labels (n, 3), or points (n, 2, 3)."""
    if args.loss == "regression":
        target, columns = pairs.mos - 3, "MOS_A_VQ .. MOS_B_TA"               # around the middle of the scale
    else:
        target, columns = pairs.label[:, :3], "VQ, MQ, TA"
    if args.loss == "bt":
        target = target.masked_fill(target == 0, float("nan"))                  # to BT a tie says nothing
    if target.isnan().all():
        raise UserError(f"{args.pairs} labels no pair for --loss {args.loss}: it needs columns {columns}")
    return target


def pair_loss(args, r, target):
    """Mean loss of raw scores r (B, 2, 3) over what target labels."""
    if args.loss == "regression":
        return masked_mean(regression(r, target), target)
    d = r[:, 0] - r[:, 1]
    return masked_mean(btt(d, target, args.tie) if args.loss == "btt" else bt(d, target), target)


def read_files(args, world):
    """The Pairs of args.pairs whose videos can be used, all looked into: with a world, by its autoencoder,
    else to their end by a VideoReward. UserError where there is nothing to learn from.
    """
    pairs = read_pairs(args.pairs, args.skip_bad)
    if not args.eval:
        targets(args, pairs)
    if world is None:
        pairs = pairs if args.eval else without_twins(pairs, content_hash)      # measured are all of them
        return look_into(pairs, args.skip_bad, check_video)[0]
    world.latent_shape(args.frames, args.size)
    return world.read(args)


def split_prompts(args, pairs):
    """(training rows, validation rows): one prompt in twenty, at least one, is kept for validation."""
    prompts = sorted(set(pairs.prompts))
    if len(prompts) < 2:
        raise UserError(f"{args.pairs} has a single prompt: others are needed to measure the scores on")
    order = torch.randperm(len(prompts), generator=rng("split", args.seed)).tolist()
    kept = {prompts[i] for i in order[:max(1, len(prompts) // 20)]}
    is_kept = torch.tensor([prompt in kept for prompt in pairs.prompts])
    return (~is_kept).nonzero()[:, 0], is_kept.nonzero()[:, 0]


# ---- training ----

def new_reward(args, kind, device):
    """The reward to train: a VideoReward on a Qwen2-VL, or a LatentReward grown from the first blocks of a
    model.
    """
    torch.manual_seed(args.seed)
    if kind == "files":
        reward = VideoReward.from_base(args.model, args.reward_token, args.template)
        return reward.trainable(args.seed).to(device)
    model = merge_lora(load_model(args.model))
    if args.depth > model.config.num_layers:
        raise UserError(f"--depth {args.depth}: {args.model} has {model.config.num_layers} blocks")
    reward = LatentReward.from_base(model, args.depth).to(device)
    for block in reward.dit.blocks:
        block.checkpointing = kind == "wan"
    if args.compile:
        reward.dit.compile_blocks()
    return reward


def train(args, kind, device):
    """Train, normalise on validation prompts, evaluate on held-out ones; returns what eval.json holds."""
    world = None if kind == "files" else world_of(args.model, device)
    if kind != "shapes":                                                        # files are refused first
        pairs = read_files(args, world)
        split_prompts(args, pairs)
    reward = new_reward(args, kind, device)
    run = Run(args, device)
    if kind == "shapes":
        pairs = toy_pairs(args.n_pairs, "train", args.seed, args.label_noise)
        val = toy_pairs(args.n_eval, "val", args.seed)
        train_rows, val_rows = torch.arange(len(pairs)), torch.arange(len(val))
        held_out = world.prompts("eval")
    else:
        val = pairs = world.encode(pairs, args) if world else pairs
        train_rows, val_rows = split_prompts(args, pairs)                       # without the bad ones
        held_out = [pairs.prompts[i] for i in val_rows]
    report_pairs(pairs.subset(train_rows), held_out)
    target, history = targets(args, pairs), []
    optimizer = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], lr=args.lr, fused=True)
    args.steps = args.steps or max(1, 2 * len(pairs) // args.batch)
    warmup, decay = (50, 1.0) if kind == "shapes" else (0.05 * args.steps, 0.0)

    for step in run.steps(args.steps, reward, optimizer, history=history):
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate_scale(step, args.steps, warmup, decay)
        rows = train_rows[step_rows(len(train_rows), args.batch, args.seed, step)]
        labelled, loss = (~target[rows].isnan()).sum().clamp(min=1), 0
        for ids, samples in micro_batches(rows, args.accumulate):
            r = pair_scores(args, reward, world, pairs, ids, step, samples)
            share = (~target[ids].isnan()).sum() / labelled           # so that parts add up to the whole mean
            part = share.to(device) * pair_loss(args, r, target[ids].to(device))
            part.backward()
            loss = loss + part.detach()
        grad_norm = clip_grad_norm_(reward.parameters(), 1.0)
        run.see(loss=loss[None])
        run.check_finite([pairs.lines[i] for i in rows], grad_norm)             # before a weight moves
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            recent = sum(history[-20:]) / len(history[-20:])
            run.bar.set_postfix(loss=f"{recent:.3f}")
            run.log(loss=recent, grad_norm=grad_norm.item())

    reward.eval()
    r = raw_scores(args, reward, world, val, val_rows)
    reward.mean.copy_(r.flatten(0, 1).mean(0))
    reward.std.copy_(r.flatten(0, 1).std(0))
    metadata = {"command": command(args), "seed": str(args.seed)}
    reward.save(run.folder, metadata | world.metadata if world else metadata)
    if kind == "shapes":
        result = evaluate_toy(args, reward)
    else:                                     # measured on the same prompts: the constants only weigh Overall
        found = pair_accuracies(pairs.label[val_rows], reward.normalised(r))
        result = {"n": len(val_rows), "reward": found}
        print_accuracies({"reward": [found]})
    result |= {"loss_first": history[0], "loss_last": sum(history[-20:]) / len(history[-20:])}
    write_json(run.folder / "eval.json", result)
    return result


# ---- evaluation ----

def pair_accuracies(label, r):
    """Accuracies of normalised scores r (n, 2, 3) against labels (n, 4), of the dimensions that have labels.
    """
    d = r[:, 0] - r[:, 1]
    found = accuracies(label, with_overall(d))
    return {dim: found[dim] for dim, h in zip(found, label.T) if not h.isnan().all()}


def evaluate_toy(args, reward):
    """Accuracies on held-out prompts at t = 0, and over t for a noisy reward, beside the oracle's on these
    labels; and, at t = 0, how far apart the scores of tied and of other pairs are.
    """
    pairs = toy_pairs(args.n_eval, "eval", args.seed)
    truth = with_overall(normalised(true_scores(pairs)))
    truth = truth[:, 0] - truth[:, 1]
    result = {"ceiling": accuracies(pairs.label, truth), "n": args.n_eval, "by_t": {}}
    for t in (0.0, 0.25, 0.5, 0.75, 0.9) if args.noisy else (0.0,):
        r = reward.normalised(raw_scores(args, reward, Shapes(), pairs, torch.arange(args.n_eval), t))
        result["by_t"][str(t)] = pair_accuracies(pairs.label, r)
        if t == 0:
            result["differences"] = differences(pairs.label[:, :3], (r[:, 0] - r[:, 1]).abs())
    rows = {"ceiling": result["ceiling"]} | {f"reward at t = {t}": row for t, row in result["by_t"].items()}
    print_accuracies({name: [row] for name, row in rows.items()})
    return result


def differences(label, gap):
    """{dimension: {"tied", "other": quartiles of the score differences gap (n, 3) of pairs labelled so,
    "separation": how often a tied pair's gap is the smaller one of a tied and another pair's}}. Fig. 3 of the
    paper in numbers.
    """
    found = {}
    for dim, h, g in zip(DIMS, label.T, gap.T):
        tied, other = g[h == 0], g[h.abs() == 1]
        quartiles = {name: [round(x, 3) for x in y.quantile(torch.tensor([.25, .5, .75])).tolist()]
                     for name, y in (("tied", tied), ("other", other)) if len(y)}
        found[dim] = quartiles | {"separation": (tied[:, None] < other).float().mean().item()}
    return found


def benchmark(args, kind, device):
    """Measure a trained reward, on the toy or on a pairs file beside the paper's row; returns what eval.json
    holds.
    """
    if kind == "shapes":
        result = evaluate_toy(args, load_reward(args.eval, device=device))
        write_json(Run(args, device).folder / "eval.json", result)
        return result
    pairs = read_files(args, None)
    moved = args.model if args.model != Args.model else None
    reward = load_reward(args.eval, moved, args.template, DTYPES[args.dtype], device)
    r = reward.score_pairs(None, pairs, args.cache)
    result = {"n": len(pairs), "reward": pair_accuracies(pairs.label, r)}
    rows, table = {"reward": result["reward"]}, "VideoGen-RewardBench"
    if list(result["reward"]) == ["Overall"]:                                # as the paper scores GenAI-Bench
        table = "GenAI-Bench"
        result["TA alone"] = pair_accuracies(pairs.label, r[..., 2:].expand_as(r))
        rows["reward, TA alone"] = result["TA alone"]
    paper = {dim: dict(zip(("without", "with"), pair)) for dim, pair in PAPER[table].items()}
    rows[f"the paper's, {table}"] = paper
    print_accuracies({name: [row] for name, row in rows.items()})
    folder = Run(args, device).folder
    write_json(folder / "eval.json", result)
    write_scores(folder / "pairs.csv", pairs, r)
    return result


def write_scores(path, pairs, r):
    """Write a CSV of pairs, one a row: videos, prompt, labels, and the normalised scores r (n, 2, 3) of A and
    B.
    """
    names, words = (*DIMS, "Overall"), {1.0: "A", 0.0: "same", -1.0: "B"}
    r = with_overall(r).flatten(1).tolist()
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        scores = [f"score_{side}_{dim}" for side in "AB" for dim in names]
        table.writerow(["path_A", "path_B", "prompt", *names, *scores])
        for pair, prompt, label, scores in zip(pairs.videos, pairs.prompts, pairs.label.tolist(), r):
            table.writerow([*pair, prompt, *(words.get(x, "") for x in label), *(f"{x:.4f}" for x in scores)])
    print(f"scores of every pair: {path}")


def main(args):
    """Train a reward, or with args.eval measure one; returns what eval.json holds."""
    kind, device = check(args), "cuda" if torch.cuda.is_available() else "cpu"
    return benchmark(args, kind, device) if args.eval else train(args, kind, device)


if __name__ == "__main__":
    launch(main, Args, __doc__)

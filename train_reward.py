"""Train and evaluate a reward model on preference pairs.

    python train_reward.py                      the toy's labeller: of clean videos, with ties (BTT)
    python train_reward.py --noisy              the reward of noisy latents that guides sampling (Flow-NRG)
    python train_reward.py --loss regression    on Likert points instead of pairs (bt is the third choice)
    python train_reward.py --model Qwen/Qwen2-VL-2B-Instruct --pairs prefs.csv      the paper's VideoReward
    python train_reward.py --noisy --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs prefs.csv
    python train_reward.py --model KwaiVGI/VideoReward --template prompt_template.py --pairs mine.csv
    python train_reward.py --model assets/reward --pairs mine.csv      go on from a reward, on labels of yours
    python train_reward.py --eval KwaiVGI/VideoReward --template prompt_template.py --pairs rewardbench.csv

--resume goes on with a run that was stopped, exactly where it was.

Prints the accuracy on held-out prompts with and without ties; of a reward that it goes on from also the one
before; for the toy's own pairs also the ceiling that the annotators' noise leaves: the accuracy of the oracle
itself against the same labels. Differences from the paper: the toy's labeller is a latent reward too, where
the paper trains a vision-language model (Sec. 3), as --model with a Qwen2-VL does; --noisy follows its Table
11 (BT, one noise and t for both of a pair).
"""
import csv
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from data import (DIMS, RANKS, Count, Numbers, Run, Shapes, command, draw_noise, fill_unset,
                  launch, learning_rate_scale, look_into, micro_batches, normalised, read_pairs, recipes,
                  report_pairs, rng, run_args, step_rows, toy_pairs, true_scores, with_overall, without_twins,
                  world_of, write_json)
from losses import bt, btt, masked_mean, mix, regression
from model import UserError, merge_lora
from reward import (LatentReward, VideoReward, accuracies, check_reward, check_video, is_qwen, kind_of_reward,
                    load_reward, z_scores)
from sample import load_model, print_accuracies

# What unset flags fall to, by what the reward reads; labels: a file of pairs of Shapes world. Of files and
# Wan they are the paper's (Table 11), where unset steps make two epochs, but 100 steps at least.
RECIPES = recipes(("shapes", "labels", "wan", "files"), {
    "lr":         (1e-3,         3e-4,       5e-6,       2e-6),
    "batch":      (32,           16,         144,        32),
    "accumulate": (1,            1,          144,        32),
    "steps":      (2400,         80,         None,       None),
})
DEPTH = {"shapes": 2, "wan": 8}                # blocks of a latent reward; how many, the paper doesn't say
# VideoReward's accuracies in the paper (Table 2). GenAI-Bench has one label, held against TA alone; the paper
# scored it at 256 x 256 (App. H.2), and here it is the checkpoint's 448 x 448.
PAPER = {"VideoGen-RewardBench": {"VQ": (.7566, .5968), "MQ": (.7470, .6603), "TA": (.7220, .5380),
                                  "Overall": (.7359, .6126)},
         "GenAI-Bench at 256 x 256": {"Overall": (.7289, .4941)}}


@dataclass
class Args:
    loss: Literal["btt", "bt", "regression"] | None = None  # unset: btt, or bt with --noisy, as Table 11
    noisy: bool = False                # train on noisy latents at uniform t, for guidance; else on clean ones
    shared_noise: bool = True               # with --noisy: the same noise for both of a pair, as the paper
    model: str = "assets/base"       # where it starts: a reward, a Qwen2-VL, or the first blocks of this DiT
    depth: Count | None = None              # how many of the DiT's blocks; unset: 2 of the toy, 8 of Wan
    pairs: str | None = None       # file of pairs of videos with labels of VQ, MQ, TA; unset: Shapes world
    n_pairs: Count = 24000                  # training pairs of Shapes world
    label_noise: float = 1.0                # Shapes world: annotators' noise; 1 is that of the held-out pairs
    eval: str | None = None                 # evaluate this reward instead
    template: str | None = None             # the authors' prompt_template.py; their checkpoint needs it
    base: str | None = None                 # Qwen2-VL or Wan of the reward, if not where its files say
    steps: Count | None = None              # optimizer steps
    batch: Count | None = None              # pairs per step
    accumulate: Count | None = None         # parts in which a step's batch goes through the model
    lr: float | None = None      # Adam's; the toy's rises 50 steps, then falls to 0; a Qwen2-VL's rises 5 %
    tie: float = 5.0                        # btt: the tie parameter theta
    n_eval: Count = 2000                    # held-out pairs of Shapes world
    frames: Count = 81                      # Wan: frames of each video, at 16 per second; 4k + 1
    size: Numbers = (480, 832)              # Wan: height and width, multiples of 16
    skip_bad: bool = False                  # leave out pairs whose videos cannot be used
    cache: str = "runs/cache"           # folder of what is computed once: latents of videos, scores of --eval
    seed: int = 0                           # of pairs, order and noise
    compile: bool = False                   # torch.compile the blocks of a latent reward
    save_every: Count = 500                 # steps between the states that --resume starts from
    resume: bool = False                    # go on with the run in --out
    out: str | None = None                  # run folder; unset: runs/reward, runs/noisy or runs/eval


def check_args(args):
    """What the reward reads. Fill unset flags from the recipe, and refuse what contradicts itself."""
    if args.eval:
        check_reward(args.eval, Shapes(), ("shapes", "files"), args.template)
    from_reward = kind_of_reward(args.eval or args.model)                       # None: --model is no reward
    kind = from_reward or ("files" if is_qwen(args.model) else world_of(args.model).name)
    if from_reward and (args.depth or run_args(args.model).get("noisy", False) != args.noisy):
        raise UserError(f"{args.model} is a reward and goes on as it is: no --depth, and --noisy as it was")
    if not args.pairs and (from_reward or kind != "shapes"):
        raise UserError("this reward learns and is measured on video files: name their CSV with --pairs")
    if kind == "files" and args.noisy:
        raise UserError("--noisy trains a reward on latents, and a Qwen2-VL reads pixels: leave one out")
    fill_unset(args, RECIPES["labels" if kind == "shapes" and args.pairs else kind])
    fill_unset(args, {"loss": "bt" if args.noisy else "btt",
                      "out": "runs/eval" if args.eval else "runs/noisy" if args.noisy else "runs/reward"})
    if args.tie <= 1 or args.label_noise <= 0:
        raise UserError(f"--tie {args.tie} must be above 1, and --label_noise {args.label_noise} above 0")
    if RANKS > 1:
        raise UserError("rewards are trained and measured by one process: leave torchrun out")
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
    reward.eval()
    # one at a time of what is large: files, and latents of Wan
    return torch.cat([pair_scores(args, reward, world, pairs, ids, 2**31, ids.tolist(), t).cpu()
                      for ids in rows.split(64 if reward.reads == "shapes" else 1)])


def targets(args, pairs):
    """What the loss holds scores against, nan where it says nothing: labels (n, 3), or points (n, 2, 3)."""
    target, columns = pairs.label[:, :3], "VQ, MQ, TA (Overall alone teaches none of them)"
    if args.loss == "regression":
        target, columns = pairs.mos - 3, "MOS_A_VQ .. MOS_B_TA"               # around the middle of the scale
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


# ---- pairs ----

def read_files(args, world):
    """The Pairs of args.pairs whose videos can be used: those of a world as it reads them, others are looked
    into to their end. UserError where there is nothing to learn from.
    """
    if world is None:
        pairs = read_pairs(args.pairs, args.skip_bad)
        pairs = pairs if args.eval else without_twins(pairs)      # measured are all of them
        pairs, _ = look_into(pairs, args.skip_bad, check_video)
    else:
        pairs = world.read(args)
    if not args.eval:
        targets(args, pairs.subset(split_prompts(args, pairs)[0].tolist()))
    return pairs


def split_prompts(args, pairs):
    """(training rows, validation rows): kept for validation is one prompt in twenty, and more until they hold
    20 pairs or a fifth of the file, two at least.
    """
    count = Counter(pairs.prompts)
    prompts, least = sorted(count), max(2, min(20, len(pairs) // 5))
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=rng("split", args.seed))]
    held = torch.tensor([count[prompt] for prompt in prompts]).cumsum(0)         # pairs of the first 1, 2, ..
    n = max(len(prompts) // 20, 1 + (held < least).sum().item())
    kept = set(prompts[:n]) if n < len(prompts) else {max(prompts, key=count.get)}
    is_kept = torch.tensor([prompt in kept for prompt in pairs.prompts])
    if is_kept.all() or is_kept.sum() < 2:
        raise UserError(f"{args.pairs} has no two pairs to keep for validation: label pairs of more prompts")
    return (~is_kept).nonzero()[:, 0], is_kept.nonzero()[:, 0]


# ---- training ----

def new_reward(args, kind, device):
    """The reward to train: the one to go on from, its LoRA merged, a VideoReward on a Qwen2-VL, or a
    LatentReward grown from the first blocks of a model.
    """
    torch.manual_seed(args.seed)
    if kind_of_reward(args.model):
        reward = load_reward(args.model, args.base, args.template)
    elif kind == "files":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32           # of what is not trained
        reward = VideoReward.from_base(args.model, args.template, dtype)
    else:
        model, depth = merge_lora(load_model(args.model)), args.depth or DEPTH[kind]
        if depth > model.config.num_layers:
            raise UserError(f"--depth {depth}: {args.model} has {model.config.num_layers} blocks")
        reward = LatentReward.from_base(model, depth)
    if kind == "files":
        return reward.trainable(args.seed).to(device)
    for block in reward.dit.blocks:
        block.checkpointing = kind == "wan"
    if args.compile:
        reward.dit.compile_blocks()
    return reward.requires_grad_(True).to(device)


def train(args, kind, run, device):
    """Train, normalise on validation prompts, evaluate on held-out ones; returns what eval.json holds."""
    world = None if kind == "files" else world_of(args.model, device, args.base)
    if kind == "wan":
        world.latent_shape(args.frames, args.size)
    pairs = read_files(args, world) if args.pairs else None                     # files are refused first
    reward = new_reward(args, kind, device)
    if args.pairs:
        val = pairs = world.encode(pairs, args) if world else pairs
        train_rows, val_rows = split_prompts(args, pairs)                       # without the bad ones
    else:
        pairs = toy_pairs(args.n_pairs, "train", args.seed, args.label_noise)
        val = toy_pairs(args.n_eval, "val", args.seed)
        train_rows, val_rows = torch.arange(len(pairs)), torch.arange(len(val))
    report_pairs(pairs.subset(train_rows.tolist()), [val.prompts[i] for i in val_rows])
    target, history, result = targets(args, pairs), [], {}
    if kind_of_reward(args.model):
        r = raw_scores(args, reward, world, val, val_rows)
        result["before"] = accuracies(val.label[val_rows], z_scores(reward, r))
    optimizer = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], lr=args.lr, fused=True)
    args.steps = args.steps or max(100, 2 * len(pairs) // args.batch)
    # Table 11 has no warm-up; the authors' script has one of 5 % for the vision-language model
    warmup, decay = {"shapes": (50, 1.0), "wan": (0, 0.0), "files": (0.05 * args.steps, 0.0)}[kind]

    reward.train()
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
            run.log(loss=sum(history[-20:]) / len(history[-20:]), grad_norm=grad_norm.item())

    r = raw_scores(args, reward, world, val, val_rows)
    normalise(reward, r)
    reward.save(run.folder, {"command": command(args), "seed": str(args.seed)})
    if args.pairs:                           # measured on the same prompts: the constants only weigh Overall
        result["reward"] = accuracies(val.label[val_rows], z_scores(reward, r))
        print_accuracies({name: [row] for name, row in result.items()})
        result["n"] = len(val_rows)
    else:
        result = evaluate_toy(args, reward)
    result |= {"loss_first": history[0], "loss_last": sum(history[-20:]) / len(history[-20:])}
    write_json(run.folder / "eval.json", result)
    return result


def normalise(reward, r):
    """Make mean and deviation of raw scores r (n, 2, 3) its constants. UserError where they don't vary."""
    mean, std = r.flatten(0, 1).mean(0), r.flatten(0, 1).std(0)
    if not (std.isfinite() & (std > 1e-5 * mean.abs())).all():
        raise UserError("scores of the validation videos do not differ or are not finite: label other videos")
    reward.mean.copy_(mean)
    reward.std.copy_(std)


# ---- evaluation ----

def evaluate_toy(args, reward):
    """Accuracies on held-out prompts at t = 0, of a noisy reward over t, beside the oracle's: the ceiling."""
    pairs = toy_pairs(args.n_eval, "eval", args.seed)
    rows = {"ceiling": accuracies(pairs.label, normalised(true_scores(pairs)))}
    result = {**rows, "n": args.n_eval, "by_t": {}}
    for t in (0.0, 0.25, 0.5, 0.75, 0.9) if args.noisy else (0.0,):
        r = z_scores(reward, raw_scores(args, reward, Shapes(), pairs, torch.arange(args.n_eval), t))
        rows[f"reward at t = {t}"] = result["by_t"][str(t)] = accuracies(pairs.label, r)
    print_accuracies({name: [row] for name, row in rows.items()})
    return result


def benchmark(args, kind, run, device):
    """Measure a reward on a pairs file, VideoReward beside the paper's row; returns what eval.json holds."""
    world = Shapes() if kind == "shapes" else None
    pairs = world.encode(read_files(args, world), args) if world else read_files(args, None)
    r = load_reward(args.eval, args.base, args.template, device).score_pairs(world, pairs, args.cache)
    result, table = {"reward": accuracies(pairs.label, r)}, "VideoGen-RewardBench"
    if list(result["reward"]) == ["Overall"]:                                # as the paper scores GenAI-Bench
        table = "GenAI-Bench at 256 x 256"
        result["TA alone"] = accuracies(pairs.label, r[..., 2:].expand_as(r))
    paper = {dim: dict(zip(("without", "with"), pair)) for dim, pair in PAPER[table].items()}
    rows = result if world else {**result, f"the paper's, {table}": paper}
    print_accuracies({name: [row] for name, row in rows.items()})
    write_json(run.folder / "eval.json", {"n": len(pairs), **result})
    if not world:                                                               # the toy's are in memory
        write_scores(run.folder / "pairs.csv", pairs, r)
    return result


def write_scores(path, pairs, r):
    """Write a CSV of pairs, one a row: videos, prompt, labels and the z-scores r (n, 2, 3) of A and B."""
    names, words = (*DIMS, "Overall"), {1.0: "A", 0.0: "same", -1.0: "B"}
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        scores = [f"score_{side}_{dim}" for side in "AB" for dim in names]
        table.writerow(["path_A", "path_B", "prompt", *names, *scores])
        for pair, prompt, label, x in zip(pairs.videos, pairs.prompts, pairs.label.tolist(), with_overall(r)):
            scores = [f"{score:.4f}" for score in x.flatten().tolist()]
            table.writerow([*pair, prompt, *(words.get(x, "") for x in label), *scores])
    print(f"scores of every pair: {path}")


def main(args):
    """Train a reward, or with args.eval measure one; returns what eval.json holds."""
    kind, device = check_args(args), "cuda" if torch.cuda.is_available() else "cpu"
    with Run(args, device) as run:
        return benchmark(args, kind, run, device) if args.eval else train(args, kind, run, device)


if __name__ == "__main__":
    launch(main, Args, __doc__)

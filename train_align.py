"""Align the video DiT with preferences: Flow-DPO, Flow-RWR or SFT; or pretrain the toy base.

    python train_align.py --loss dpo            pairs, reward labels, Flow-DPO, held-out win rates, a picture
    python train_align.py --loss sft            (or rwr) the paper's baselines on the same videos
    python train_align.py --loss pretrain --compile --out assets/base       make the toy base again
    python train_align.py --loss dpo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs pairs.csv      align Wan 2.1

Without --pairs the model is the toy of Shapes world: pairs come from its renderers, not from the model
(off-policy, as in the paper), or with --pairs generate from the model itself, and are relabelled by the reward. With
--pairs FILE it is a Wan: videos and prompts are encoded once into --cache, and the file's own labels decide unless
--labels reward asks a reward. RECIPES holds what differs from the paper; SYMPTOMS, what is printed when a run goes
wrong. --resume goes on with a run that was stopped, exactly where it was. Under `torchrun --nproc_per_node 8` each
process takes its share of every step's rows, and the losses are the same.
"""
import copy
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm, trange

from data import (DIMS, ORACLE_STD, RANK, RENDERERS, WORLD, Pairs, WanCodec, add_gradients, check_clip_args,
                  check_counts, check_out, collect, command, ctrl_c, draw_noise, embed_text, encode, fail,
                  flawed_videos, gather, launch, load_state, log, on_rank_0, oracle, prefetch, read_log, read_pairs,
                  render_as, report_pairs, rng, save_state, shard, start_ranks, start_run, step_rows, stop_broken,
                  to_uint8, toy_pairs, world_hash)
from losses import beta_schedule, flow_dpo, flow_rwr, flow_sft, mix, velocity_error
from model import PRESETS, VideoDiT, add_lora, lora_disabled, merge_lora, save_lora, whole
from reward import VideoReward, check_reward, load_reward, overall, score_clean, score_files
from sample import check_not_model, eval_prompts, evaluate, load_model, origin, report, start_of, toy_videos

# What unset flags fall to. The second column is the paper's Table 10, which has one recipe for all three losses;
# the first was tuned on validation prompts.
RECIPES = {
    #                toy                                    Wan
    "lr":           ({"dpo": 3e-4, "sft": 1e-3, "rwr": 1e-3}, 5e-6),
    "lora_rank":    (16,                                    64),
    "lora_alpha":   (32.0,                                  128.0),
    "steps":        (100,                                   None),              # None: one epoch
    "batch":        (24,                                    64),
    "accumulate":   (1,                                     64),
    "warmup":       (10,                                    0),
    "ema":          (0.0,                                   0.0),
    "dtype":        ("fp32",                                "bf16"),
    "labels":       ("reward",                              "human"),
    "save_every":   (50,                                    100),
}
PRETRAIN = dict(lr=2e-3, lora_rank=0, lora_alpha=0.0, steps=3000, warmup=50, ema=0.998, save_every=500)


@dataclass
class Args:
    loss: Literal["dpo", "sft", "rwr", "pretrain"] = "dpo"  # the objective
    model: str = "assets/base"              # the model to align: a run folder, or a Wan folder or hub repository
    pairs: str = ""                         # CSV or JSONL for a Wan; generate: the toy's own videos; unset: renderers'
    labels: Literal["reward", "human", "oracle"] | None = None  # who decides the pairs; human: the file's own labels
    reward: str = "assets/reward"           # the reward that labels: a run folder, or a VideoReward for files
    template: str = ""                      # for the released VideoReward: the authors' prompt_template.py
    dim_w: tuple = (1.0, 1.0, 1.0)          # weights of VQ, MQ, TA in the overall reward; 0,0,1 aligns TA alone
    n_pairs: int = 2400                     # pairs of Shapes world
    samples: int = 4                        # --pairs generate: videos per prompt, the best and the worst make a pair
    beta: float = 500.0                     # dpo: KL strength, in units of the per-element MEAN error; the paper's
    beta_schedule: Literal["constant", "(1-t)^2", "t^2", "(1-t)/t"] = "constant"  # dpo: beta over time
    tau: float = 1.0                        # rwr: temperature of the weights exp(r / tau)
    lora_rank: int | None = None            # 0 trains all weights against a frozen copy
    lora_alpha: float | None = None         # adapters count alpha / rank
    lr: float | None = None                 # constant after the warm-up; pretraining decays it to 0 at the end
    steps: int | None = None                # optimizer steps
    batch: int | None = None                # pairs per step; sft takes the winners of twice as many
    accumulate: int | None = None           # parts in which a step's batch goes through the model
    warmup: int | None = None               # steps of linear warm-up
    max_grad_norm: float = 1.0              # gradient clipping
    ema: float | None = None                # decay of the averaged weights that are saved; 0 is off
    dtype: Literal["fp32", "bf16"] | None = None  # of the linear maps; norms, time, head and adapters are fp32
    checkpointing: bool | None = None       # activation checkpointing; unset: for a Wan
    together: bool | None = None            # both videos of a pair in one pass; unset: where they fit in memory
    compile: bool | None = None             # torch.compile the blocks; unset: for a Wan on CUDA
    shard: bool = False                     # torchrun: split the weights over the GPUs (FSDP2), for what does not fit
    frames: int = 81                        # Wan: frames of each video, at 16 per second; 4k + 1
    size: tuple = (480, 832)                # Wan: height and width, multiples of 16
    cache: str = "runs/cache"               # Wan: folder of the encoded videos and prompts
    skip_bad: bool = False                  # leave out pairs whose videos cannot be used
    seed: int = 0                           # of pairs, order, t and noise
    eval_n: int = 256                       # toy: held-out draws for the win rates
    eval_steps: int = 16                    # toy: Euler steps of what the model draws, without CFG
    split: Literal["eval", "val"] = "eval"  # toy: prompts of the evaluation; val is for tuning
    save_every: int | None = None           # steps between the states that --resume starts from
    resume: bool = False                    # go on with the run in --out
    out: str | None = None                  # run folder; unset: runs/<loss>


def errors(model, x0, text, t, eps, together=True):
    """Velocity errors (B, K) of videos x0 (B, K, C, T, H, W), K of them sharing text (B, S, D), t (B,) and eps; in one
    forward pass, or one after the other, which holds less memory at a time.
    """
    if not together:
        return torch.cat([errors(model, x, text, t, eps) for x in x0.split(1, dim=1)], dim=1)
    B, K = x0.shape[:2]
    t, eps, text = (y.repeat_interleave(K, dim=0) for y in (t, eps, text))
    x0 = x0.flatten(0, 1)
    return velocity_error(model(mix(x0, eps, t), t, text), eps - x0).view(B, K)


def objective(args, model, reference, x0, text, t, eps, weight):
    """(loss of each sample (B,), what to log of it (B, 2 or 5): t, loss[, gap of the winner, of the loser, error of
    the reference on the winner]).

    x0 (B, K, C, T, H, W): the winner first; both share t and eps. weight (B, 2): Flow-RWR's. reference: a context
    manager that gives the frozen model.
    """
    if args.loss == "dpo":
        err_w, err_l = errors(model, x0, text, t, eps, args.together).unbind(1)
        with torch.no_grad(), reference() as frozen:
            err_ref_w, err_ref_l = errors(frozen, x0, text, t, eps, args.together).unbind(1)
        loss = flow_dpo(err_w, err_l, err_ref_w, err_ref_l, beta_schedule(args.beta, t, args.beta_schedule))
        return loss, torch.stack([t, loss, err_w - err_ref_w, err_l - err_ref_l, err_ref_w], dim=1).detach()
    if args.loss == "rwr":
        loss = (weight * errors(model, x0, text, t, eps, args.together)).mean(1)
    else:                                                                       # sft and pretrain: the first video
        loss = flow_sft(errors(model, x0[:, :1], text, t, eps)).mean(1)
    return loss, torch.stack([t, loss], dim=1).detach()


def generated_pairs(args, reward):
    """On-policy Pairs of Shapes world: of args.samples videos that the start model draws of each prompt, the best is A
    and the worst is B, as the reward judges, or without one the oracle.
    """
    model = load_model(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    prompts, n, K = eval_prompts(args.n_pairs, "train"), args.n_pairs, args.samples
    each = [prompt for prompt in prompts for _ in range(K)]
    videos = toy_videos(model, each, f"on-policy {args.seed}", args.eval_steps)
    truth = torch.full((n * K, 3), torch.nan) if reward else oracle(videos, each)
    score = score_clean(reward, videos, embed_text(each)) if reward else truth / torch.tensor(ORACLE_STD)
    r = overall(score, args.dim_w).view(n, K)
    chosen = torch.stack([r.argmax(1), r.argmin(1)], dim=1) + K * torch.arange(n)[:, None]      # (n, 2) of n * K
    unlabelled = torch.full((n, 4), torch.nan), torch.full((n, 2, 3), torch.nan)
    return Pairs(prompts, *unlabelled, to_uint8(videos[chosen]), truth[chosen])


def score_pairs(args, pairs, reward):
    """Normalised scores (n, 2, 3) of A and B: of their latents at t = 0, or of their files by a VideoReward."""
    if isinstance(reward, VideoReward):
        return on_rank_0(score_files)(reward, pairs, args.cache)
    parts = torch.arange(len(pairs.prompts)).split(256 if pairs.files is None else 1)
    scores = [score_clean(reward, pairs.latents(part).flatten(0, 1), pairs.text(part).repeat_interleave(2, 0))
              for part in tqdm(parts[RANK::WORLD], desc="scoring", leave=False)]
    return torch.cat(collect(scores)).view(-1, 2, len(DIMS))


def label_pairs(args, pairs, reward):
    """(usable rows, order (n, 2), r (n, 2) or None): A and B as indices, the winner first, and their scalar
    rewards in that order.

    By the reward or the oracle the higher weighted mean of normalised scores wins; by humans the sign of the
    weighted sum of their labels decides, or their Overall where no dimension has one, and ties are dropped.
    """
    rows, r = torch.arange(len(pairs.prompts)), None
    if args.labels == "human":
        dims = pairs.label[:, :3]
        margin = overall(dims.nan_to_num(), args.dim_w)                         # an unlabelled dimension says nothing
        margin = torch.where(dims.isnan().all(1), pairs.label[:, 3].nan_to_num(), margin)
        rows = rows[margin != 0]
        if not len(rows):
            fail(f"none of the {len(margin)} pairs is decided by its labels under --dim_w {args.dim_w}")
    else:
        score = pairs.score / torch.tensor(ORACLE_STD) if args.labels == "oracle" else score_pairs(args, pairs, reward)
        r = overall(score, args.dim_w)
        margin = r[:, 0] - r[:, 1]
    b_wins = (margin < 0).long()
    order = torch.stack([b_wins, 1 - b_wins], dim=1)
    low, median, high = margin[rows].abs().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{len(rows)} of {len(margin)} pairs labelled by {args.labels}; A wins {(margin > 0).float().mean():.0%}, "
          f"B {b_wins.float().mean():.0%}; margin {median:.2f}, of the middle 80 % {low:.2f} to {high:.2f}")
    return rows, order, None if r is None else r.gather(1, order)


def pair_batch(args, pairs, order, step, ids):
    """A micro-batch of pairs: x0 (B, 2, C, T, H, W), the winner first, text (B, S, D), t (B,), eps."""
    x0 = pairs.latents(ids)[torch.arange(len(ids))[:, None], order[ids]]
    return x0, pairs.text(ids), *draw_noise(x0.shape[2:], args.seed, step, ids.tolist())


def mixture_batch(args, step, ids):
    """A micro-batch for pretraining: flawed videos x0 (B, 1, C, T, H, W), captions, a tenth of them empty for CFG,
    t logit-normal, eps.
    """
    g = rng("mixture", args.seed, step)
    video, prompts = flawed_videos(2 * args.batch, None, g)
    text = embed_text(prompts)
    text[torch.rand(len(text), generator=g) < 0.1] = 0
    x0 = video.float()[ids, None]
    return x0, text[ids], *draw_noise(x0.shape[2:], args.seed, step, ids.tolist(), logit_normal=True)


def make_optimizers(args, model):
    """Adam on what is trainable; to pretrain, Muon on the blocks' matrices (10 times lr) and AdamW on the rest."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if args.loss == "pretrain":
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        rest = [p for p in trainable if all(p is not q for q in matrices)]
        optimizers = [torch.optim.Muon(matrices, lr=10 * args.lr),
                      torch.optim.AdamW(rest, lr=args.lr, weight_decay=0, fused=True)]
    else:
        optimizers = [torch.optim.Adam(trainable, lr=args.lr, fused=True)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return optimizers


def learning_rate_scale(args, step):
    """Linear warm-up, then constant; pretraining also falls linearly to 0 over its last 40 %."""
    fall = (args.steps - step) / (0.4 * args.steps) if args.loss == "pretrain" else 1
    return min(1, (step + 1) / max(args.warmup, 1)) * min(1, fall)


def of_files(args):
    """Whether the pairs are a file's, and the model a Wan."""
    return args.pairs not in ("", "generate")


def check(args):
    """The Pairs of the file, if there is one. Fill unset flags from the recipe and refuse what cannot work, before the
    run folder is made.
    """
    pretrain, wan = args.loss == "pretrain", of_files(args)
    recipe = {name: columns[wan] for name, columns in RECIPES.items()} | (PRETRAIN if pretrain else {})
    recipe |= dict(checkpointing=wan, together=None if wan else True, compile=wan and torch.cuda.is_available(),
                   out=f"runs/{args.loss}")
    if args.lora_rank == 0:                                                     # steps of all weights vanish in bf16
        recipe["dtype"] = "fp32"
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.loss] if isinstance(value, dict) else value)
    if not args.lora_rank and args.dtype == "bf16":
        fail("--dtype bf16 is too coarse for the steps of all weights: give --lora_rank a number above 0")
    if args.batch % WORLD:
        fail(f"--batch {args.batch} cannot be shared out evenly: take a multiple of the {WORLD} processes")
    if args.shard and (WORLD == 1 or not wan or not args.lora_rank or args.ema or args.resume):
        fail("--shard is for LoRA on a Wan under torchrun, and works without --ema and --resume")
    check_counts(args, "n_pairs", "samples", "steps", "batch", "accumulate", "save_every", "eval_n", "eval_steps")
    if len(args.dim_w) != len(DIMS) or not any(args.dim_w):
        fail(f"--dim_w takes {len(DIMS)} numbers, not all zero, for {', '.join(DIMS)}; e.g. --dim_w 0,0,1")
    if args.lora_rank < 0 or args.tau <= 0:
        fail(f"--lora_rank {args.lora_rank} and --tau {args.tau} must not be negative, and --tau not 0")
    if args.loss == "rwr" and args.labels == "human":
        fail("--loss rwr weighs videos by their scores and human labels have none: use --labels reward or oracle")
    if pretrain and args.lora_rank:
        fail("--loss pretrain trains all weights: leave --lora_rank out")
    if args.pairs == "generate" and (pretrain or args.labels == "human" or args.samples < 2):
        fail("--pairs generate takes --loss dpo, rwr or sft, --labels reward or oracle and at least --samples 2")
    if wan:
        check_clip_args(args)
        if pretrain:
            fail("--loss pretrain makes the toy base from Shapes world: leave --pairs out")
        if args.labels == "oracle":
            fail("--labels oracle knows Shapes world alone: with --pairs use human, the file's labels, or reward")
    if not pretrain:
        check_not_model(args.out, args.model)
        if not wan:                                                             # small: refuse what does not fit now
            if not origin(args.model)[1]:
                fail(f"{args.model} is no toy of Shapes world: --pairs takes a file of pairs, and sample.py "
                     "--n_per_prompt 4 --reward RUN makes one of its own videos")
            load_model(args.model)
        if args.labels == "reward":
            check_reward(args.reward, not wan)
    check_out(args.out)
    return read_pairs(args.pairs) if wan else None


def policy_and_reference(args, device):
    """(model to train, context manager that gives the frozen reference; None to pretrain).

    A model that was trained with LoRA first has its adapters folded in. With LoRA the reference is the model with its
    new adapters off; without, a frozen copy.
    """
    if args.loss == "pretrain":
        return VideoDiT(PRESETS["toy"]).to(device), None
    start = load_model(args.model, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    start = start if args.shard else start.to(device)                           # sharding moves it, block by block
    if args.lora_rank:
        add_lora(merge_lora(start), args.lora_rank, args.lora_alpha, seed=args.seed)
        return start, lambda: lora_disabled(start)
    merge_lora(start)
    return copy.deepcopy(start).requires_grad_(True), lambda: nullcontext(start)


@torch.no_grad()
def distance(model, reference, videos, prompts, seed):
    """Mean squared difference of the velocities of model and reference at noisy versions, t uniform, of the model's own
    videos (n, 3, T, H, W): up to a factor that depends on t, the KL divergence that DPO holds down. App. B.
    """
    found = []
    for part in torch.arange(len(videos)).split(64):
        x0, text = videos[part], embed_text([prompts[i] for i in part])
        t, eps = draw_noise(x0.shape[1:], seed, 2**31, part.tolist())
        inputs = [y.to(next(model.parameters()).device) for y in (mix(x0, eps, t), t, text)]
        v = model(*inputs)
        with reference() as frozen:
            found.append(velocity_error(v, frozen(*inputs)))
    return torch.cat(found).mean().item()


def labelled_pairs(args, pairs, codec, device):
    """(pairs, reward or None, what label_pairs returns): a file's pairs, encoded, or pairs that renderers or the model
    draw; and what decided them.
    """
    reward = None
    if codec:
        report_pairs(pairs)
        pairs = encode(pairs, codec, args.cache, args.frames, args.size, args.skip_bad)
    elif not args.pairs:
        pairs = toy_pairs(args.n_pairs, "train", args.seed, judge=args.labels != "reward")
        report_pairs(pairs, eval_prompts(args.eval_n, args.split))
    if args.labels == "reward":
        reward = load_reward(args.reward, template=args.template).to(device)
    if args.pairs == "generate":
        pairs = generated_pairs(args, reward)
    return pairs, reward, *label_pairs(args, pairs, reward)


def main(args):
    """Train, then evaluate the toy on held-out prompts against the start model; returns what eval.json holds."""
    start_ranks()
    pairs, reward = check(args), None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pretrain, wan = args.loss == "pretrain", of_files(args)
    codec = WanCodec(origin(args.model)[0], device) if wan else None
    torch.manual_seed(args.seed)
    run = start_run(args, device)
    if pretrain:
        load, per_step = partial(mixture_batch, args), 2 * args.batch
        usable = torch.arange(per_step)
    else:
        pairs, reward, usable, order, r = labelled_pairs(args, pairs, codec, device)
        reward = None if wan else reward                                        # a Wan needs its memory
        load = partial(pair_batch, args, pairs, order)
        per_step = 2 * args.batch if args.loss == "sft" else args.batch         # all see 2 x batch videos a step
        args.steps = args.steps or -(-len(usable) // per_step)                  # one epoch

    model, reference = policy_and_reference(args, device)
    for block in model.blocks:
        block.checkpointing = args.checkpointing
    if args.shard:
        shard(model)
    if args.compile:
        model.compile_blocks()
    average = copy.deepcopy(model) if args.ema else None
    optimizers = make_optimizers(args, model)
    stats = []                                                                  # of the steps since the last log
    state = {"model": model, "average": average, "stats": stats}
    state |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    first = load_state(run, state) if args.resume else 0

    def rows(step):
        """The rows of a step, of all ranks."""
        return usable if pretrain else usable[step_rows(len(usable), per_step, args.seed, step)]

    def parts(values):
        """This rank's share of a step's rows, or of their weights, in the parts that go through the model in turn."""
        return values[RANK::WORLD].split(-(-per_step // args.accumulate))

    if wan:
        tune(args, model, pairs)
    if args.loss == "dpo":
        print(beta_elsewhere(args.beta, pairs.latents([0])[0, 0].numel()))
    batches = prefetch(load, ((step, ids) for step in range(first, args.steps) for ids in parts(rows(step))))
    events, tic = read_log(run), time.time()
    with ctrl_c() as stopped:
        for step in (bar := trange(first, args.steps, initial=first, total=args.steps, desc=args.loss)):
            done = step + 1
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * learning_rate_scale(args, step)
            weights = torch.ones(per_step, 2)
            if args.loss == "rwr":                                              # over the whole optimizer batch
                weights = flow_rwr(weights.flatten(), r[rows(step)].flatten(), args.tau).view(-1, 2)

            now = []
            for weight in parts(weights):
                x0, text, t, eps, weight = (y.to(device) for y in (*next(batches), weight))
                loss, stat = objective(args, model, reference, x0, text, t, eps, weight)
                (loss.sum() / per_step * (WORLD if args.shard else 1)).backward()
                now.append(stat)
            if not args.shard:                                                  # else they are in place, as a mean
                add_gradients(model.parameters())
            grad_norm = whole(clip_grad_norm_(model.parameters(), args.max_grad_norm))
            stats.append(torch.tensor(collect(torch.cat(now).tolist())))        # in the order of rows(step)
            t, loss = stats[-1][:, :2].T
            if not (loss.isfinite().all() and grad_norm.isfinite()):
                stats.pop()
                if not args.shard:
                    save_state(run, step, state)                                # no weight has moved yet
                named = [pairs.lines[i] if wan else i for i in rows(step).tolist()]
                bar.close()
                stop_broken(run, step=done, grad_norm=grad_norm.item(), rows=named, t=t.tolist(), loss=loss.tolist())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if average:
                update_average(average, model, min(args.ema, (step + 1) / (step + 10)))

            if wan and done - first == 5:
                seconds = (time.time() - tic) / 5
                bar.write(f"{seconds:.1f} s a step: {(args.steps - done) * seconds / 3600:.1f} hours to go")
            if done % 10 == 0 or done == args.steps:
                events.append({"step": done, "grad_norm": grad_norm.item(), "seconds": round(time.time() - tic, 1),
                               **summary(torch.cat(stats))})
                log(run, **events[-1])
                tell(bar, events)
                stats.clear()
            halt = any(gather(stopped()))                                       # Ctrl-C reaches each rank when it likes
            if done < args.steps and (done % args.save_every == 0 or halt):
                if not args.shard:
                    save_state(run, done, state)
                if halt:
                    bar.close()
                    fail(f"stopped after step {done}: " + ("with --shard no state is kept" if args.shard else
                                                           "the same command with --resume goes on from there"))
    return finish(args, run, average or model, reference, reward)


@torch.no_grad()
def update_average(average, model, decay):
    """Move the averaged weights towards the model's: decay of the old and the rest of the new."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)


def tune(args, model, pairs):
    """Print about how much memory training will take: weights, optimizer, activations. Where that is more than a GPU
    has left, and checkpointing makes it help, the two videos of a pair go through it one after the other.
    """
    c, bytes_of = model.config, lambda ps, extra=0: sum(p.numel() * (p.element_size() + extra) for p in ps)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = bytes_of(model.parameters()) * (1 if args.lora_rank else 2)       # the frozen copy
    optimizer = bytes_of(trained, 8 if not args.ema else 12)                    # gradient, two moments, average
    if args.shard:
        weights, optimizer = weights / WORLD, optimizer / WORLD
    tokens = math.prod(n // p for n, p in zip(pairs.latents([0]).shape[3:], c.patch_size))
    at_once = 2 * min(args.batch // WORLD, -(-args.batch // args.accumulate)) * tokens
    width = 2 if args.dtype == "bf16" else 4
    block = at_once * (16 * c.dim + 2 * c.ffn_dim) * width                      # what one block keeps for its backward
    kept = at_once * 3 * c.dim * width                                          # its input and both attentions' outputs
    activations = block + c.num_layers * kept if args.checkpointing else c.num_layers * block
    total, device = weights + optimizer + activations, next(model.parameters()).device
    if args.together is None:
        torch.cuda.empty_cache()                                                # of what encoded and labelled the pairs
        more = device.type == "cuda" and total - torch.cuda.memory_allocated() > 0.9 * torch.cuda.mem_get_info()[0]
        args.together = not (args.checkpointing and args.loss != "sft" and any(gather(more)))   # ranks do the same
    if not args.together and args.checkpointing:                                # one block at work on one of the two
        total, activations = total - block / 2, activations - block / 2
    print(f"expecting about {total / 1e9:.1f} GB: weights {weights / 1e9:.1f}, gradients and optimizer "
          f"{optimizer / 1e9:.1f}, activations {activations / 1e9:.1f}, "
          f"the videos of a pair {'together' if args.together else 'one after the other'}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()                                    # the peak at the end is training's


def summary(stats):
    """What to log of rows (t, loss[, gap_w, gap_l, err_ref_w]): means, loss in ten bins of t; of DPO also the implicit
    accuracy, the margin, the size of the loss's logit and its gradient factor, both as the loss itself tells them.
    """
    t, losses = stats[:, 0], stats[:, 1]
    bins = [losses[(t * 10).long().clamp(max=9) == b] for b in range(10)]
    event = {"loss": losses.mean().item(), "loss_by_t": [x.mean().item() if len(x) else None for x in bins]}
    if stats.shape[1] > 2:                      # logit = beta / 2 (gap_l - gap_w), loss = -log sigmoid(logit), and so
        margin = stats[:, 3] - stats[:, 2]                                      # > 0: the pair is ranked as labelled
        factor = -torch.expm1(-losses.clamp(min=1e-30))                         # sigmoid(-logit), 1/2 at the start
        event |= {"implicit_acc": (margin > 0).float().mean().item(), "margin": margin.mean().item(),
                  "logit": (losses + factor.log()).abs().mean().item(), "grad_factor": factor.mean().item()}
        event |= dict(zip(("gap_w", "gap_l", "err_ref_w"), stats[:, 2:].mean(0).tolist()))
    return event


# ---- the doctor ----

# (condition, sentence), of an event and of the run's first. Healthy runs are silent: when the toy's DPO works, the
# size of its logits passes 0.1 within 50 steps, its gradient factor stays above 0.3, and the winner's error rises to
# no more than 1.3 times the reference's, the loser's a little further.
SYMPTOMS = (
    (lambda e, first: e["step"] >= 50 and e["logit"] < 0.02,
     "the loss is still log 2, with logits of {logit:.4f}: nothing is learnt; raise --beta or --lr"),
    (lambda e, first: e["grad_factor"] < 0.01,
     "saturated: the gradient has {grad_factor:.2%} of its strength left; lower --beta"),
    (lambda e, first: e["margin"] > 0 and e["gap_w"] > 0.5 * e["err_ref_w"],
     "the margin grows by a worse loser alone: the winner's error is {gap_w:.4f} above the reference's "
     "{err_ref_w:.4f}; lower --lr or raise --beta"),
    (lambda e, first: e["gap_w"] > 2 * e["err_ref_w"] or ("gap_w" not in e and e["loss"] > 2 * first["loss"]),
     "errors explode: look at loss, gap_w and gap_l in log.jsonl; lower --lr"),
    (lambda e, first: "logit" in e and e["loss"] > 2 * first["loss"],
     "the loss has doubled, to {loss:.2f}, with logits of {logit:.1f}: pairs are pushed too hard; lower --beta or "
     "--lr"),
)


def tell(bar, events):
    """Show the last of a run's events on its progress bar, and print what the doctor says of it."""
    event = events[-1]
    bar.set_postfix({k: f"{event[k]:.4f}" for k in ("loss", "implicit_acc", "gap_w", "gap_l") if k in event})
    for verdict in diagnose(events):
        bar.write(f"step {event['step']}: {verdict}")


class Event(dict):
    """A logged event, in which what was not logged is nan and so compares as false."""

    def __missing__(self, key):
        return math.nan


def diagnose(events):
    """The sentences of SYMPTOMS that are true of the last of a run's events and were not of an earlier one."""
    events = [Event(e) for e in events]
    return [sentence.format_map(events[-1]) for true, sentence in SYMPTOMS
            if true(events[-1], events[0]) and not any(true(e, events[0]) for e in events[:-1])]


def beta_elsewhere(beta, size):
    """A line that says what other repositories call this beta, for videos of size numbers."""
    return (f"beta {beta:g} is of mean errors, with a 1/2 before it; elsewhere it is {beta / 2:g} without the 1/2, "
            f"{beta / size:.3g} with errors summed over a video's {size:,} numbers, {beta / size / 2:.3g} with neither")


def finish(args, run, model, reference, reward):
    """Save the model; evaluate a toy: against the start model, or, pretrained, against the videos it learnt from."""
    model.eval()
    metadata = {"command": command(args), "seed": str(args.seed)} | ({} if of_files(args) else {"world": world_hash()})
    if args.lora_rank:
        metadata["start"] = start_of(args.model)
        save_lora(model, run / "lora.safetensors", metadata)
    else:
        dtype = torch.float16 if args.loss == "pretrain" else None
        on_rank_0(model.save_pretrained)(run / "transformer", metadata, dtype)
    if of_files(args):
        peak = torch.cuda.max_memory_allocated() if next(model.parameters()).is_cuda else None
        print("" if peak is None else f"peak memory {peak / 1e9:.1f} GB; ", end="")
        start = "base" if args.lora_rank else args.model
        print(f"wrote {run}; see and judge it: python sample.py --ckpt {run} --prompts prompts.csv --against {start}")
        return None
    prompts = eval_prompts(args.eval_n, args.split)
    videos = toy_videos(model, prompts, args.seed, args.eval_steps)
    if args.loss == "pretrain":
        g = rng("mixture", args.seed)
        who = torch.randint(len(RENDERERS), (len(prompts),), generator=g)
        start_videos = render_as(who, prompts, g).float()
    else:
        with reference() as start:
            start_videos = toy_videos(start, prompts, args.seed, args.eval_steps)
    result = evaluate(videos, start_videos, prompts, reward)
    if reference:
        result["distance"] = distance(model, reference, videos, prompts, args.seed)
    report(run, result, prompts, videos, start_videos)
    return result


if __name__ == "__main__":
    launch(main, Args, __doc__)

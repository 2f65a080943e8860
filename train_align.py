"""Align the video DiT with preferences: Flow-DPO, Flow-RWR or SFT; or pretrain the toy base.

    python train_align.py --loss dpo            pairs, reward labels, Flow-DPO, held-out win rates, a picture
    python train_align.py --loss sft            (or rwr) the paper's baselines on the same videos
    python train_align.py --loss sft --best 0.04 --n_pairs 12000    on the pairs with the best winners alone
    python train_align.py --loss pretrain --compile --out assets/base       make the toy base again
    python train_align.py --loss dpo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs pairs.csv     align Wan

The model says which world it is of. Without --pairs, pairs of Shapes world come from its renderers, not from
the model (off-policy, as in the paper), and are relabelled by the reward. With --pairs FILE, in either world,
the file's own labels decide unless --labels asks a reward. RECIPES stands beside the paper's Table 10;
SYMPTOMS, what is printed when a run goes wrong. --resume goes on with a run that was stopped, exactly where
it was. Under `torchrun --nproc_per_node 8` each process takes its share of every step's rows, and the losses
are the same.
"""
import copy
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from data import (DTYPES, FRAMES, RANKS, RENDERERS, SIZE, Count, Numbers, Run, Shapes, add_gradients,
                  all_gather, cached_file, check_dim_w, clean_videos, command, draw_noise, fill_unset,
                  flawed_videos, is_cached, launch, learning_rate_scale, load_cached, micro_batches, overall,
                  recipes, render_as, report_pairs, rng, save_cached, shard, start_ranks, step_rows, to_uint8,
                  world_of)
from losses import beta_schedule, flow_dpo, flow_rwr, flow_sft, mix, velocity_error
from model import PRESETS, UserError, VideoDiT, add_lora, lora_disabled, merge_lora, save_lora, unshard
from reward import check_reward, load_reward
from sample import evaluate, expert_of, load_model, report, toy_videos

# What unset flags fall to. The second column is the paper's Table 10, but for frames and size, which it
# doesn't give, and for SFT, whose batch is 64 videos there: here it takes the winners of twice as many pairs.
# The first column was tuned on validation prompts; the third makes the toy's base.
RECIPES = recipes(("shapes", "wan", "pretrain"), {                              # Wan 2.2: carried over
    "lr":            (3e-4,         5e-6,       2e-3),
    "lora_rank":     (16,           64,         0),
    "lora_alpha":    (32.0,         128.0,      0.0),
    "steps":         (100,          None,       3000),                          # None: one epoch
    "batch":         (24,           64,         24),
    "accumulate":    (1,            64,         1),
    "warmup":        (10,           0,          50),
    "save_every":    (50,           100,        500),
    "frames":        (FRAMES,       81,         FRAMES),
    "size":          ((SIZE, SIZE), (480, 832), (SIZE, SIZE)),
    "dtype":         ("fp32",       "bf16",     "fp32"),
    "checkpointing": (False,        True,       False),
    "decoupled":     (False,        True,       False),
    "compile":       (False,        torch.cuda.is_available(), False),
})
TOY_LR = {"sft": 2e-3, "rwr": 1e-3}                                             # where it is not Flow-DPO's
ONLY = {"beta": "dpo", "beta_schedule": "dpo", "anchor": "dpo", "tau": "rwr"}  # others ignore these flags


@dataclass
class Args:
    loss: Literal["dpo", "sft", "rwr", "pretrain"] = "dpo"  # the objective
    model: str = "assets/base"           # the model to align: a run folder, or Wan's folder or hub repository
    expert: Literal["high", "low"] | None = None  # Wan 2.2 A14B: which of its two; high is of t from 0.875 up
    pairs: str = ""                         # CSV or JSONL of pairs; unset: Shapes world's renderers make them
    labels: Literal["reward", "human", "oracle", "flawless"] | None = None  # unset: a file's, else the reward
    reward: str = "assets/reward"           # the reward that labels: a run folder, or a VideoReward for files
    template: str = ""                      # for the released VideoReward: the authors' prompt_template.py
    dim_w: Numbers = (1.0, 1.0, 1.0)      # weights of VQ, MQ, TA in the overall reward; 0,0,1 aligns TA alone
    n_pairs: Count = 2400                   # pairs of Shapes world
    best: float = 1.0          # train on this share of the pairs: those with the best winners by the reward
    beta: float = 500.0                # dpo: KL strength, in units of the per-element MEAN error; the paper's
    beta_schedule: Literal["constant", "(1-t)^2", "t^2", "(1-t)/t"] = "constant"  # dpo: beta over time
    anchor: float = 0.0                     # dpo: weight of (beta / 2) (err_w - err_ref_w) beside Flow-DPO
    tau: float = 1.0                        # rwr: temperature of the weights exp(r / tau)
    lora_rank: int | None = None            # 0 trains all weights, in fp32, against a frozen copy
    lora_alpha: float | None = None         # adapters count alpha / rank
    lr: float | None = None                # constant after the warm-up; pretraining decays it to 0 at the end
    steps: Count | None = None              # optimizer steps
    batch: Count | None = None              # pairs per step; sft takes the winners of twice as many
    accumulate: Count | None = None         # parts in which a step's batch goes through the model
    warmup: int | None = None               # steps of linear warm-up
    dtype: Literal["fp32", "bf16"] | None = None  # of linear maps; norms, head, all that is trained: fp32
    checkpointing: bool | None = None       # activation checkpointing; unset: for Wan
    decoupled: bool | None = None           # one video of a pair at a time; unset: for Wan
    compile: bool | None = None             # torch.compile the blocks; unset: for Wan on CUDA
    shard: bool = False           # torchrun: split Wan's weights over the GPUs (FSDP2), for what does not fit
    frames: Count | None = None             # Wan: frames of each video, 4k + 1, at 16 per second (2.2 5B: 24)
    size: Numbers | None = None             # Wan: height and width, multiples of 16 (2.2 5B: 32)
    cache: str = "runs/cache"               # folder of encoded videos and prompts; toy: the start's draws
    skip_bad: bool = False                  # leave out pairs whose videos cannot be used
    seed: int = 0                           # of pairs, order, t and noise
    eval_n: Count = 128                     # toy: held-out draws for the win rates, by the default sampler
    eval_steps: Count = 16                  # toy: Euler steps of these draws
    split: Literal["eval", "val"] = "eval"  # toy: prompts of the evaluation; val is for tuning
    save_every: Count | None = None         # steps between the states that --resume starts from
    resume: bool = False                    # go on with the run in --out
    out: str | None = None                  # run folder; unset: runs/<loss>


def check_args(args, world):
    """Fill unset flags from the recipe, and refuse what contradicts itself, before any work is done."""
    pretrains = args.loss == "pretrain"
    toy_lr = TOY_LR.get(args.loss) if world.name == "shapes" else None
    fill_unset(args, {"lr": toy_lr, "out": f"runs/{args.loss}", "labels": "human" if args.pairs else "reward",
                      "expert": None if pretrains else expert_of(args.model)})
    fill_unset(args, RECIPES["pretrain" if pretrains else world.name])
    world.latent_shape(args.frames, args.size)                                  # these refuse what cannot be
    world.t_range(args.expert)
    check_dim_w(args.dim_w)
    for name, loss in ONLY.items():
        if args.loss != loss and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name} says nothing to --loss {args.loss}: it is of {loss}")
    if args.expert and expert_of(args.model) not in (None, args.expert):
        raise UserError(f"--expert {args.expert}: {args.model} is a run of the other one: leave --expert out")
    if args.lora_rank < 0 or args.tau <= 0 or not 0 < args.best <= 1:
        raise UserError("--lora_rank is 0 or more, --tau above 0, --best above 0 and at most 1")
    if args.batch % RANKS:
        raise UserError(f"--batch {args.batch} cannot be shared out evenly: take a multiple of {RANKS}")
    if args.shard and (RANKS == 1 or world.name == "shapes" or not args.lora_rank):
        raise UserError("--shard is for LoRA on Wan under torchrun: leave it out")
    if pretrains and (args.lora_rank or args.pairs or args.best < 1):
        raise UserError("--loss pretrain trains all weights of a toy: leave --lora_rank, --pairs, --best out")
    if (args.loss == "rwr" or args.best < 1) and args.labels not in ("reward", "oracle"):
        raise UserError("--loss rwr and --best go by scores, and these labels have none: use --labels reward")
    if args.labels == "flawless" and (args.loss != "sft" or args.pairs or world.name != "shapes"):
        raise UserError("--labels flawless is the ceiling of --loss sft on Shapes world: leave --pairs out")
    if not pretrains and args.labels not in ("human", "flawless"):
        check_reward("oracle" if args.labels == "oracle" else args.reward, world, template=args.template)


# ---- the policy, the reference, the labels ----

def policy_and_reference(args, device):
    """(model to train, context manager that gives the frozen reference).

    With LoRA the reference is the model with its new adapters off: those of earlier rounds stay on. Without,
    it is a frozen copy. Both are compiled alike, so that they round alike.
    """
    start = load_model(args.model, DTYPES[args.dtype] if args.lora_rank else torch.float32, args.expert)
    start.compute_dtype = DTYPES[args.dtype]
    start.to("cpu" if args.shard else device)                              # sharding moves it, block by block
    if args.lora_rank:
        model = add_lora(start, args.lora_rank, args.lora_alpha, seed=args.seed)
        reference = partial(lora_disabled, model)
    else:
        model, reference = copy.deepcopy(merge_lora(start)).requires_grad_(True), partial(nullcontext, start)
    for block in model.blocks:
        block.checkpointing = args.checkpointing
    if args.shard:
        shard(model)
    for m in {model, start} if args.compile else ():
        m.compile_blocks()
    return model, reference


def label_pairs(args, world, pairs, device):
    """(pairs with the winner as A, their usable rows, r (n, 2) or None: the scalar rewards of winner and
    loser).

    By a reward or the oracle the higher weighted mean of normalised scores wins; by humans the sign of the
    weighted sum of their labels decides, or their Overall where no dimension has one, and ties are dropped.
    Of those that a reward or the oracle labels, args.best is the share whose winners score best, and it alone
    is usable. Flawless puts a flawless video of the prompt in the place of both, the best that SFT can see.
    """
    usable, r = torch.arange(len(pairs)), None
    if args.labels == "flawless":
        videos = to_uint8(clean_videos(pairs.prompts, rng("flawless", args.seed)))
        return replace(pairs, videos=torch.stack([videos, videos], dim=1)), usable, None
    if args.labels == "human":
        dims = pairs.label[:, :3]
        margin = overall(dims.nan_to_num(), args.dim_w)                 # an unlabelled dimension says nothing
        margin = torch.where(dims.isnan().all(1), pairs.label[:, 3].nan_to_num(), margin)
        usable = usable[margin != 0]
        if not len(usable):
            raise UserError(f"none of the {len(pairs)} pairs is decided by labels under --dim_w {args.dim_w}")
    else:
        path = "oracle" if args.labels == "oracle" else args.reward
        reward = load_reward(path, template=args.template, device=device)
        r = overall(reward.score_pairs(world, pairs, args.cache), args.dim_w)
        margin = r[:, 0] - r[:, 1]
        usable = r.amax(1).topk(math.ceil(args.best * len(r))).indices.sort().values
    low, median, high = margin[usable].abs().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    a, b = ((margin * sign > 0).float().mean() for sign in (1, -1))
    print(f"{len(usable)} of {len(pairs)} pairs, of {len({pairs.prompts[i] for i in usable})} prompts, "
          f"labelled by {args.labels}; A wins {a:.0%}, B {b:.0%}; margin {median:.2f}, of the middle 80 % "
          f"{low:.2f} to {high:.2f}")
    order = torch.stack([margin < 0, margin >= 0], dim=1).long()                # (n, 2): the winner first
    return pairs.winner_first(order), usable, None if r is None else r.gather(1, order)


def velocity_errors(model, x0, text, t, eps):
    """Velocity errors (B, K) of videos x0 (B, K, C, T, H, W), K of them sharing text (B, S, D), t (B,) and
    eps, in one forward pass.
    """
    B, K = x0.shape[:2]
    t, eps, text = (y.repeat_interleave(K, dim=0) for y in (t, eps, text))
    x0 = x0.flatten(0, 1)
    return velocity_error(model(mix(x0, eps, t), t, text), eps - x0).view(B, K)


def error_pairs(model, x0, text, t, eps):
    """Yield (err_w, err_l), (B,) each, of winner and loser x0 (B, 2, C, T, H, W) twice, each time with a
    graph of one video alone: calling backward on a loss of each adds up to the full gradient.

    The gradient of a function of two arguments is the sum of its partial ones. This way half the activations
    are held, for one more forward of one video.
    """
    with torch.no_grad():
        value_l = velocity_errors(model, x0[:, 1:], text, t, eps)[:, 0]
    err_w = velocity_errors(model, x0[:, :1], text, t, eps)[:, 0]
    yield err_w, value_l
    yield err_w.detach(), velocity_errors(model, x0[:, 1:], text, t, eps)[:, 0]


def rehearse(args, world, model, reference, steps, device):
    """Take a micro-batch of ones through policy, reference and backward, before any video is encoded, and
    print the hours and the memory that training will take; no weight moves.
    """
    batches = micro_batches(torch.arange(args.batch), args.accumulate)
    b, shape = len(batches[0][0]), world.latent_shape(args.frames, args.size)
    sizes = (b, 2, *shape), (b, world.text_len, model.config.text_dim), (b,), (b, *shape)
    batch = [torch.ones(size, device=device) for size in sizes]                 # x0, text, t, eps
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()                                   # from here on it is training's
    before, total = memory(device)
    apart = args.decoupled and args.loss != "sft"                               # which takes winners alone
    for _ in range(2):                                                          # the first compiles
        tic = time.time()
        if args.loss == "dpo":
            with torch.no_grad(), reference() as frozen:
                velocity_errors(frozen, *batch)
        for errors in error_pairs(model, *batch) if apart else [velocity_errors(model, *batch)]:
            sum(errors).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    spent, peak = time.time() - tic, memory(device)[0]
    model.zero_grad()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 8 * trained / (RANKS if args.shard else 1)                           # Adam's moments
    hours = spent * len(batches) * steps / 3600
    took = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.1f} minutes"
    needs = f" and {(peak + held) / 1e9:.1f} of {total / 1e9:.0f} GB" if total else ""
    print(f"{spent:.2f} s a micro-batch; {steps} steps take about {took}{needs}")
    if apart and before + held + 2 * (peak - before) < 0.9 * total:
        print("both videos of a pair would fit at once: --no-decoupled is faster")


def memory(device):
    """(the most bytes that this process held so far, all there are); zeros on Windows, where Python can't
    tell of a CPU.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    if sys.platform == "win32":
        return 0, 0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024                              # a Mac counts bytes
    return (unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# ---- alignment ----

def align(args, world, run, device):
    """Align a model with preferences; returns what eval.json holds."""
    pairs = world.read(args, labelled=args.labels == "human")                   # bad files are refused first
    model, reference = policy_and_reference(args, device)     # 1. the policy, and what it must stay near
    report_pairs(pairs, () if args.pairs else world.prompts(args.split))
    n_rows = 2 * args.batch if args.loss == "sft" else args.batch  # a step: sft takes winners alone
    rehearse(args, world, model, reference, args.steps or math.ceil(args.best * len(pairs) / n_rows), device)
    model.to(device if args.shard else "cpu")               # encoders need the memory; what is sharded stays
    pairs, usable, r = label_pairs(args, world, world.encode(pairs, args), device)  # 2. A is now the winner
    model.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr, fused=True)
    steps = args.steps = args.steps or math.ceil(len(usable) / n_rows)
    print(f"{len(usable)} pairs / {n_rows} a step: {steps} steps, {steps * n_rows / len(usable):.2g} epochs")
    if args.loss == "dpo":
        print(beta_elsewhere(args.beta, math.prod(world.latent_shape(args.frames, args.size))))
    t_range, weights = world.t_range(args.expert), torch.zeros(len(pairs), 2)

    for step in run.steps(steps, model, optimizer):                             # 3. saved, resumed
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate_scale(step, steps, args.warmup)
        rows, details = usable[step_rows(len(usable), n_rows, args.seed, step)], {}
        if args.loss == "rwr":                     # of the whole step, not a part: what comes of errors of 1
            weights[rows] = flow_rwr(torch.ones(2 * n_rows), r[rows].flatten(), args.tau).view(-1, 2)
        for ids, samples in micro_batches(rows, args.accumulate):               # this rank's share, in turn
            # x0 (b, 2, C, T, H, W), winner first; t and eps are the same for winner and loser
            x0, text = world.latents(pairs, ids).to(device), world.text(pairs, ids).to(device)
            t, eps = draw_noise(x0.shape[2:], args.seed, step, samples, t_range=t_range)
            t, eps = t.to(device), eps.to(device)
            if args.loss == "dpo":
                with torch.no_grad(), reference() as frozen:
                    ref_w, ref_l = velocity_errors(frozen, x0, text, t, eps).unbind(1)
                beta = beta_schedule(args.beta, t, args.beta_schedule)

                def objective(err_w, err_l):
                    anchor = args.anchor * beta / 2 * (err_w - ref_w)           # 0 unless asked for
                    return flow_dpo(err_w, err_l, ref_w, ref_l, beta) + anchor
                if args.decoupled:
                    for err_w, err_l in error_pairs(model, x0, text, t, eps):
                        (objective(err_w, err_l).sum() / n_rows).backward()
                else:
                    err_w, err_l = velocity_errors(model, x0, text, t, eps).unbind(1)
                    (objective(err_w, err_l).sum() / n_rows).backward()
                loss, gap_w, gap_l = objective(err_w, err_l), err_w - ref_w, err_l - ref_l
                # Flow-DPO is -log sigmoid(logit)
                details = dict(gap_w=gap_w, gap_l=gap_l, err_ref_w=ref_w, logit=beta / 2 * (gap_l - gap_w))
            elif args.loss == "rwr":
                n, loss = 1 if args.decoupled else 2, 0                       # its two videos are independent
                for x, weight in zip(x0.split(n, dim=1), weights[ids].to(device).split(n, dim=1)):
                    part = (weight * velocity_errors(model, x, text, t, eps)).sum(1) / 2
                    (part.sum() / n_rows).backward()
                    loss = loss + part.detach()
            else:
                loss = flow_sft(velocity_errors(model, x0[:, :1], text, t, eps)[:, 0])
                (loss.sum() / n_rows).backward()
            run.see(t=t, loss=loss, **details)                                  # one value a sample
        add_gradients(model.parameters())
        grad_norm = unshard(clip_grad_norm_(model.parameters(), 1.0))
        run.check_finite([pairs.lines[i] for i in rows], grad_norm)             # before a weight moves
        optimizer.step()
        optimizer.zero_grad()
        log_and_warn(run, grad_norm)
    save(args, world, run, model)
    return judge(args, world, run, model, reference)


def pretrain(args, run, device):
    """Make the toy base: flow matching on flawed videos with flawed captions, a tenth of them empty for CFG,
    t logit-normal; Muon on the blocks' matrices at 10 times the rate and AdamW on the rest. Saved is the
    average of the weights, judged against videos such as it learnt from. Returns what eval.json holds.
    """
    world, B = Shapes(), 2 * args.batch
    torch.manual_seed(args.seed)
    model = VideoDiT(PRESETS["toy"]).to(device)
    if args.compile:
        model.compile_blocks()
    average = [p.detach().cpu().clone() for p in model.parameters()]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    muon = torch.optim.Muon(matrices, lr=10 * args.lr)
    adamw = torch.optim.AdamW(rest, lr=args.lr, weight_decay=0, fused=True)
    for step in run.steps(args.steps, model, [muon, adamw], average=average):
        scale = learning_rate_scale(step, args.steps, args.warmup, decay=0.4)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 10 * args.lr * scale, args.lr * scale
        g = rng("mixture", args.seed, step)
        videos, prompts = flawed_videos(B, None, g)
        text = world.embed(prompts)
        text[torch.rand(B, generator=g) < 0.1] = 0
        for ids, samples in micro_batches(torch.arange(B), args.accumulate):
            x0 = videos[ids].float()
            t, eps = draw_noise(x0.shape[1:], args.seed, step, samples, logit_normal=True)
            batch = [y.to(device) for y in (x0[:, None], text[ids], t, eps)]
            loss = flow_sft(velocity_errors(model, *batch)[:, 0])
            (loss.sum() / B).backward()
            run.see(t=batch[2], loss=loss)
        add_gradients(model.parameters())
        grad_norm = clip_grad_norm_(model.parameters(), 1.0)
        run.check_finite(list(range(B)), grad_norm)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        for a, p in zip(average, model.parameters()):                           # by more in the first steps
            a.lerp_(p.detach().cpu(), 1 - min(0.998, (step + 1) / (step + 10)))
        log_and_warn(run, grad_norm)

    for p, a in zip(model.parameters(), average):
        p.data.copy_(a)
    save(args, world, run, model, torch.float16)                                # the base ships in 16 bit
    prompts, g = world.prompts(args.split, args.eval_n), rng("mixture", args.seed)
    start_videos = render_as(torch.randint(len(RENDERERS), (len(prompts),), generator=g), prompts, g).float()
    videos = toy_videos(model, prompts, args.seed, args.eval_steps)
    result = evaluate(videos, start_videos, prompts)
    report(run.folder, result, prompts, videos, start_videos)
    return result


# ---- what a run says ----

# (condition of an event, sentence). Healthy runs are silent: when the toy's DPO works, its logits pass 0.1 in
# size within 50 steps, its gradient factor stays above 0.3, and the winner's error rises to no more than 1.3
# times the reference's, the loser's a little further.
SYMPTOMS = (
    (lambda e: e["late"] and e["logit"] < 0.03,  # bf16 compiled rounds to up to 0.013 of nothing
     "the loss is still log 2, with logits of {logit:.4f}: nothing is learnt; raise --beta or --lr"),
    (lambda e: e["grad_factor"] < 0.01,
     "saturated: the gradient has {grad_factor:.2%} of its strength left; lower --beta"),
    (lambda e: e["margin"] > 0 and e["gap_w"] > 0.5 * e["err_ref_w"],
     "the margin grows by a worse loser alone: the winner's error is {gap_w:.4f} above the reference's "
     "{err_ref_w:.4f}; lower --lr or raise --beta"),
    (lambda e: e["gap_w"] > 2 * e["err_ref_w"] or (e["doubled"] and math.isnan(e["gap_w"])),
     "errors explode: look at loss, gap_w and gap_l in log.jsonl; lower --lr"),
    (lambda e: e["doubled"] and e["logit"] > 0,
     "the loss has doubled, to {loss:.2f}, with logits of {logit:.1f}: pairs are pushed too hard; lower "
     "--beta or --lr"),
)
UNKNOWN = dict.fromkeys(("logit", "grad_factor", "margin", "gap_w", "err_ref_w"), math.nan)


def diagnose(events, steps=50):
    """The sentences of SYMPTOMS that are true of the last of a run's events and were not of an earlier one;
    late is from step 50 on, or the last of fewer steps. What was not logged is nan, and compares as false.
    """
    late, large = min(50, steps), 2 * events[0]["loss"]
    events = [UNKNOWN | e | {"late": e["step"] >= late, "doubled": e["loss"] > large} for e in events]
    return [sentence.format_map(events[-1]) for true, sentence in SYMPTOMS
            if true(events[-1]) and not any(true(e) for e in events[:-1])]


def summary(names, seen):
    """What to log of samples seen (n, columns): means, loss in ten bins of t; of a preference loss also the
    implicit accuracy and the margin, and of one that has a logit its mean size and the gradient factor
    sigmoid(-logit).
    """
    columns = dict(zip(names, seen.T))
    if "gap_w" in columns:
        columns["margin"] = columns["gap_l"] - columns["gap_w"]          # > 0: the pair is ranked as labelled
        columns["implicit_acc"] = (columns["margin"] > 0).float()
    if "logit" in columns:
        columns["grad_factor"] = torch.sigmoid(-columns["logit"])
        columns["logit"] = columns["logit"].abs()
    bins = (columns.pop("t") * 10).long().clamp(max=9)
    by_t = [columns["loss"][bins == b] for b in range(10)]
    means = {name: x.mean().item() for name, x in columns.items()}
    return means | {"loss_by_t": [x.mean().item() if len(x) else None for x in by_t]}


def log_and_warn(run, grad_norm):
    """Every ten steps, or ten times in a short run, and at the end: log what was seen, show it on the bar,
    and print what the doctor says of it.
    """
    if (run.step + 1) % min(10, -(-run.args.steps // 10)) and run.step + 1 < run.args.steps:
        return
    event = summary(run.names, torch.cat(run.seen))
    run.log(grad_norm=grad_norm.item(), seconds=round(time.time() - run.started, 1), **event)
    run.bar.set_postfix(loss=f"{event['loss']:.4f}")
    for verdict in diagnose(run.events, run.args.steps):
        run.bar.write(f"step {run.step + 1}: {verdict}")


def beta_elsewhere(beta, size):
    """A line that says what other repositories call this beta, for videos of size numbers."""
    sums = f"{beta / size:.3g} with errors summed over a video's {size:,} numbers"
    return (f"beta {beta:g} is of mean errors, with a 1/2 before it; elsewhere it is {beta / 2:g} without "
            f"the 1/2, {sums}, {beta / size / 2:.3g} with neither")


@torch.no_grad()
def distance(model, reference, videos, prompts, seed):
    """Mean squared difference of the velocities of model and reference at noisy versions, t uniform, of the
    model's own videos (n, 3, T, H, W): up to a factor that depends on t, the KL divergence that DPO holds
    down. App. B.
    """
    found = []
    for ids in torch.arange(len(videos)).split(64):
        x0, text = videos[ids], Shapes().embed([prompts[i] for i in ids])
        t, eps = draw_noise(x0.shape[1:], seed, 2**31, ids.tolist())
        inputs = [y.to(next(model.parameters()).device) for y in (mix(x0, eps, t), t, text)]
        v = model(*inputs)
        with reference() as frozen:
            found.append(velocity_error(v, frozen(*inputs)))
    return torch.cat(found).mean().item()


def save(args, world, run, model, dtype=None):
    """Write the adapters or, where all weights were trained, the model, in dtype if one is given."""
    metadata = {"command": command(args), "seed": str(args.seed), **world.metadata}
    if args.lora_rank:
        save_lora(model, run.folder / "lora.safetensors", metadata | {"start": run.facts["start"]})
    else:
        model.save_pretrained(run.folder / "transformer", metadata, dtype)


def judge(args, world, run, model, reference):
    """Draw held-out prompts of Shapes world as the model is used, by the default sampler, and compare them
    with the start model's, which are drawn once and kept; of Wan say how to judge it. Returns what eval.json
    holds, if any.
    """
    if world.oracle is None:
        print(f"wrote {run.folder}; see and judge it: python sample.py --ckpt {run.folder} "
              f"--prompts prompts.csv --against {'base' if args.lora_rank else args.model}")
        return None
    prompts, settings = world.prompts(args.split, args.eval_n), (args.seed, args.eval_steps)
    videos = toy_videos(model, prompts, *settings)
    # whole weights, adapters and device: what decides the bits of the start's draws
    start = run.facts["start"], run.facts["model"], str(next(model.parameters()).device)
    file = cached_file(args.cache, "start", start, prompts, settings, args.dtype)
    with reference() as frozen:
        if not all(all_gather(is_cached(file))):                                # drawing takes all ranks
            save_cached(toy_videos(frozen, prompts, *settings), file)
    start_videos = load_cached(file)
    reward = load_reward(args.reward) if args.labels == "reward" else None
    result = evaluate(videos, start_videos, prompts, reward)
    result["distance"] = distance(model, reference, videos, prompts, args.seed)
    report(run.folder, result, prompts, videos, start_videos)
    return result


def main(args):
    """Align or pretrain; returns what eval.json holds."""
    start_ranks()
    device, pretrains = "cuda" if torch.cuda.is_available() else "cpu", args.loss == "pretrain"
    world = Shapes() if pretrains else world_of(args.model, device)
    check_args(args, world)
    with Run(args, device, longer=not pretrains) as run:  # aligning has a constant rate: it may grow
        return pretrain(args, run, device) if pretrains else align(args, world, run, device)


if __name__ == "__main__":
    launch(main, Args, __doc__)

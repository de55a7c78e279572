"""GEPO (OORL, arXiv 2505.12723): preferences between groups of equivalent and inequivalent LLVM IR of one C function.

    python gepo.py build --src ../shared/data/transcoder_gfg/gfg.jsonl.gz --out .data/gepo/groups.jsonl     make the groups (ir_groups.py)
    python train.py --task translate --lang lua,racket --gepo 0.01                                          train on them between RL steps

Loss of one group, with r(y) = beta * log(pi(y | x) / pi_ref(y | x)) of winners w and losers l (eq. 9):

    L = -log sigmoid(mean_i r(w_i) - mean_j r(l_j)) + lam * Var_i r(w_i)

and the step's loss is 1.0 * RL + 0.01 * mean over the step's groups. What the paper leaves open is an option here: beta (0.1, DPO's), n and m (2 and
2, the size of SLTrans's groups), summed log-probs as in DPO (length_norm off), population variance with beta inside. pi_ref is the policy the
run starts from; its log-probs are computed once per member and kept.
"""

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from batches import Sequence, accumulate, accumulate_parts, score
from kernels.logprob import token_logprobs
from runtime import distributed
from tasks import ir_groups
from tasks.data import in_passes, read_jsonl

# ---- the loss ----


def gepo_loss(rewards, winners, lam=1.0, unbiased=False):
    """Loss of each group. rewards [..., n + m]: r = beta * log(pi / pi_ref) of whole members, the n = `winners` equivalent ones first -> [...].

    Log-probs -10, -12 of winners and -14, -11 of losers under the policy, -10 each under the reference, beta 0.1: r = 0, -0.2, -0.4, -0.1; the
    difference of means is 0.15, -log sigmoid(0.15) = 0.6210; Var(0, -0.2) = 0.01 (unbiased 0.02); lam 1: 0.6310. n = m = 1, lam 0 is DPO.
    """
    wins, losses = rewards[..., :winners], rewards[..., winners:]
    loss = -F.logsigmoid(wins.mean(-1) - losses.mean(-1))
    return loss + lam * wins.var(-1, unbiased=unbiased) if winners > 1 else loss


def member_rewards(logprobs, batch, beta, length_norm):
    """Per-token log-probs [N] of a packed batch -> beta * log(pi / pi_ref) of each sequence [S]: summed over its tokens, or their mean."""
    count = int(batch.sequence.max()) + 1
    ratio = logprobs.new_zeros(count).index_add(0, batch.sequence, logprobs - batch.ref_logprobs)
    if length_norm:
        ratio = ratio / torch.bincount(batch.sequence, minlength=count)
    return beta * ratio


# ---- groups ----


@dataclass
class IRGroup:
    """One prompt with n winners, then m losers, and the log-prob of each under the reference (also as Sequence.ref_logprobs, per token)."""

    id: str
    members: list[Sequence]
    reference: list[float] = field(default_factory=list)
    kinds: tuple = ()  # of edit, of the losers

    @property
    def tokens(self):
        return sum(map(len, self.members))


def ir_messages(c):
    """The prompt C -> IR."""
    return [
        {
            "role": "user",
            "content": f"Compile this C code to LLVM IR. Answer with one ```llvm code block.\n\n```c\n{c.strip()}\n```",
        }
    ]


def load_groups(s, tokenizer, report=print):
    """Groups of --gepo_data for these settings -> (list to train on, list held out). Every tenth function by id is held out.

    Says how many groups have too few winners or losers, or are too long; SystemExit when none is left.
    """
    try:
        rows = read_jsonl(
            s.gepo_data,
            lambda _, row: (
                row["id"],
                row["c"],
                row["winners"],
                row["losers"] + (row["cheap"] if s.gepo_cheap else []),
            ),
        )
    except ValueError as problem:
        raise SystemExit(
            f"{problem}; make groups by python gepo.py build --out {s.gepo_data}, or leave --gepo out"
        ) from None
    few_winners = [r for r in rows if len(r[2]) < s.gepo_winners]
    few_losers = [r for r in rows if len(r[2]) >= s.gepo_winners and len(r[3]) < s.gepo_losers]
    groups = [
        make_group(r, s, tokenizer)
        for r in rows
        if len(r[2]) >= s.gepo_winners and len(r[3]) >= s.gepo_losers
    ]
    short = [g for g in groups if max(map(len, g.members)) <= s.gepo_max_tokens]
    report(
        f"GEPO: {len(short)} of {len(rows)} groups; {len(few_winners)} have fewer than {s.gepo_winners} winners, {len(few_losers)} fewer than "
        f"{s.gepo_losers} losers, {len(groups) - len(short)} are longer than --gepo_max_tokens {s.gepo_max_tokens}"
    )
    kinds = Counter(kind for g in short for kind in g.kinds)
    report(
        "GEPO's losers: "
        + ", ".join(f"{kind} {count / kinds.total():.0%}" for kind, count in kinds.most_common())
    )
    held_out = [g for g in short if random.Random(g.id).random() < 0.1]
    train = [g for g in short if random.Random(g.id).random() >= 0.1]
    if not train or not held_out:
        raise SystemExit(
            f"{s.gepo_data} leaves {len(train)} groups to train on and {len(held_out)} held out: build more, or raise --gepo_max_tokens"
        )
    return train, held_out[: s.gepo_eval]


def make_group(row, s, tokenizer):
    """n winners and m losers of a row, drawn by seed and id, as sequences."""
    id, c, winners, losers = row
    draw = random.Random(f"{s.seed}/{id}")
    prompt = tokenizer.encode_chat(ir_messages(c))
    equivalent, different = draw.sample(winners, s.gepo_winners), draw.sample(losers, s.gepo_losers)
    answer = lambda ir: [*tokenizer.encode(f"```llvm\n{ir}```"), tokenizer.stop_ids[0]]
    members = [Sequence(prompt, answer(x["ir"])) for x in equivalent + different]
    return IRGroup(id, members, kinds=tuple(x["kind"] for x in different))


def cache_reference(groups, model, s, device, folder):
    """Give every member its log-prob under the policy the run starts from, and keep them in `folder`, so that a resumed run reads them.

    Call it on every rank before the first update, with all groups; each rank computes its share.
    """
    path = Path(folder) / "gepo_reference.json"
    known = distributed.broadcast(
        json.loads(path.read_text()) if distributed.rank() == 0 and path.exists() else None
    )
    if known is None:
        mine = distributed.share(groups)
        rows = iter(score(model, [q for g in mine for q in g.members], s.token_budget, device))
        known = dict(
            distributed.gather(
                [(g.id, [[len(q.tokens), sum(next(rows))] for q in g.members]) for g in mine]
            )
        )
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(known))
            path.with_suffix(".tmp").replace(path)
    for g in groups:
        if [len(q.tokens) for q in g.members] != [n for n, _ in known.get(g.id, ())]:
            raise SystemExit(
                f"{path} does not fit {s.gepo_data}: the groups or a --gepo setting changed since the run began; start a new run"
            )
        g.reference = [total for _, total in known[g.id]]
        for q, total in zip(g.members, g.reference):
            q.ref_logprobs = total / len(q.tokens)


# ---- training ----


@dataclass
class Gepo:
    """The groups of a run."""

    train: list[IRGroup]
    held_out: list[IRGroup]


def prepare(s, tokenizer, model, device, folder, report=print):
    """Load the groups and their reference log-probs -> Gepo."""
    gepo = Gepo(*load_groups(s, tokenizer, report))
    cache_reference(gepo.train + gepo.held_out, model, s, device, folder)
    return gepo


def step_groups(gepo, s, step):
    """The groups of step 1, 2, ... over all ranks: each pass over the data in a new order that depends on seed and pass alone."""
    return in_passes(
        gepo.train, range((step - 1) * s.gepo_batch, step * s.gepo_batch), f"{s.seed}/gepo"
    )


def add_gradient(model, groups, s, device):
    """Add s.gepo * mean over `groups` (the same list on every rank) of their GEPO loss to the gradient -> metrics of all ranks.

    Packed: one forward holds all members of a group, several groups as the token budget allows. When a group does not fit (on any rank),
    members go one by one: dL/dr is taken from a pass without gradient, then each member's log-prob is weighted with it. Same gradient.
    """
    mine = distributed.share(groups)
    packed = max(g.tokens for g in groups) <= s.token_budget
    rewards = (packed_groups if packed else serial_groups)(model, mine, len(groups), s, device)
    rewards = torch.tensor(distributed.gather(rewards))
    losses = gepo_loss(rewards, s.gepo_winners, s.gepo_lam, s.gepo_unbiased)
    return {
        "gepo/loss": float(losses.mean()),
        "gepo/packed": float(packed),
        **spread(rewards, s.gepo_winners),
    }


def packed_groups(model, groups, total, s, device):
    """Whole groups in one forward -> rewards [n + m] of each group of this rank."""
    parts, used = [], s.token_budget
    for g in sorted(groups, key=lambda g: (g.tokens, g.id)):
        if used + g.tokens > s.token_budget:
            parts.append([])
            used = 0
        parts[-1] += g.members
        used += g.tokens
    size = s.gepo_winners + s.gepo_losers

    def loss_of(batch):
        rewards = member_rewards(forward(model, batch), batch, s.gepo_beta, s.gepo_length_norm)
        if len(rewards) % size:  # the empty pass of a rank that has no group left
            return rewards.sum() * 0.0, []
        rewards = rewards.view(-1, size)
        return s.gepo * gepo_loss(
            rewards, s.gepo_winners, s.gepo_lam, s.gepo_unbiased
        ).sum() / total, rewards.tolist()

    return [
        row
        for _, rows in accumulate_parts(model, parts, loss_of, device, s.share_prompts)
        for row in rows
    ]


def serial_groups(model, groups, total, s, device):
    """Members by themselves, in two passes -> rewards [n + m] of each group of this rank."""
    members = [q for g in groups for q in g.members]
    lengths = [len(q.tokens) if s.gepo_length_norm else 1 for q in members]
    logprobs = score(model, members, s.token_budget, device)
    ratios = [
        (sum(new) - old) / n
        for new, old, n in zip(logprobs, [x for g in groups for x in g.reference], lengths)
    ]
    rewards = (
        (s.gepo_beta * torch.tensor(ratios, dtype=torch.float64))
        .view(len(groups), s.gepo_winners + s.gepo_losers)
        .requires_grad_()
    )
    (
        s.gepo * gepo_loss(rewards, s.gepo_winners, s.gepo_lam, s.gepo_unbiased).sum() / total
    ).backward()
    for q, slope, n in zip(members, rewards.grad.flatten().tolist(), lengths):
        q.weight = slope * s.gepo_beta / n
    accumulate(
        model,
        members,
        lambda batch: ((batch.weights * forward(model, batch)).sum(), None),
        s.token_budget,
        device,
        s.share_prompts,
    )
    return rewards.tolist()


def forward(model, batch):
    """Log-probs of the completion tokens [N], at temperature 1."""
    head = lambda hidden, weight: token_logprobs(hidden[batch.predict], weight, batch.targets)[0]
    return model(batch.tokens, batch.positions, batch.cu_seqlens, batch.parents, head)


# ---- does it teach what it says? ----


def ranking(scores, winners, tie=0.0):
    """Share of (winner, loser) pairs in which the winner's score is higher; a gap up to `tie` is half. scores [groups, n + m]."""
    gap = scores[:, :winners, None] - scores[:, None, winners:]
    return float(((gap > tie).float() + 0.5 * (gap.abs() <= tie).float()).mean())


def spread(rewards, winners):
    """How well winners are told from losers, and how far they are from each other."""
    wins, losses = rewards[:, :winners], rewards[:, winners:]
    return {
        "gepo/rank_accuracy": ranking(
            rewards, winners, tie=1e-3
        ),  # the same log-probs in another micro-batch differ by up to 1e-4
        "gepo/margin": float((wins.mean(1) - losses.mean(1)).mean()),
        "gepo/winner_std": float(wins.std(1, unbiased=False).mean()),
    }


def held_out_metrics(gepo, model, s, device):
    """On held-out groups: spread() of the rewards (before training all are 0: accuracy 0.5, no spread), and the same of the log-probs per token."""
    mine = distributed.share(gepo.held_out)
    rows = iter(score(model, [q for g in mine for q in g.members], s.token_budget, device))
    rewards, means = [], []
    for g in mine:
        scored = [next(rows) for _ in g.members]
        norm = lambda row: len(row) if s.gepo_length_norm else 1
        rewards.append(
            [s.gepo_beta * (sum(row) - old) / norm(row) for row, old in zip(scored, g.reference)]
        )
        means.append([sum(row) / len(row) for row in scored])
    rewards, means = (
        torch.tensor(distributed.gather(rewards)),
        torch.tensor(distributed.gather(means)),
    )
    logprobs = {
        "gepo/logprob_rank_accuracy": ranking(means, s.gepo_winners),
        "gepo/winner_logprob_std": float(means[:, : s.gepo_winners].std(1, unbiased=False).mean()),
    }
    return {**spread(rewards, s.gepo_winners), **logprobs}


# ---- python gepo.py build ----


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command", choices=["build"], help="make groups of LLVM IR from C functions"
    )
    parser.add_argument(
        "--src",
        nargs="+",
        required=True,
        help="C files, folders of them, or JSON lines with c_unit (transcoder_gfg) or example (Exercism)",
    )
    parser.add_argument("--out", required=True, help="groups.jsonl to write, or to go on with")
    parser.add_argument("--workers", type=int, help="functions at the same time [cores]")
    parser.add_argument("--limit", type=int, help="only the first so many functions")
    parser.add_argument(
        "--vectorize",
        action="store_true",
        help="let clang vectorise and unroll: three to five times as long",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the edits")
    given = parser.parse_args(arguments)
    ir_groups.build(given.src, given.out, given.workers, given.limit, given.vectorize, given.seed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on where it was")
    except (ValueError, OSError) as problem:
        sys.exit(f"gepo.py: {problem}")

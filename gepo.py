"""GEPO (OORL, arXiv 2505.12723): preferences between groups of equivalent and inequivalent LLVM IR.

    python gepo.py build --src ../shared/data/transcoder_gfg/gfg.jsonl.gz --out .data/gepo/groups.jsonl
    python train.py --task translate --lang lua,racket --gepo 0.01

The first makes the groups of one C function each (tasks/ir_groups.py), the second trains on them
between RL steps. Loss of one group, with r(y) = beta * log(pi(y | x) / pi_ref(y | x)) of winners w
and losers l (eq. 9):

    L = -log sigmoid(mean_i r(w_i) - mean_j r(l_j)) + lam * relu(Var_i r(w_i) - eps)

and the step's loss is 1.0 * RL + 0.01 * mean over the step's groups. eps 0 is the paper's eq. 9;
its constrained form (Var <= eps) has eps 0.01 to 0.1. What the paper leaves open is an option here:
beta (0.1, DPO's), n and m (2 and 2, the size of SLTrans's groups), summed log-probs as in DPO
(length_norm off), population variance with beta inside. pi_ref is the policy that the run starts
from; its log-probs are computed once per member and kept.
"""

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batches import Sequence, backward, micro_batches, packed_batches, score
from runtime import distributed
from tasks import ir_groups
from tasks.c_functions import LANGUAGES
from tasks.data import in_passes, read_jsonl, without_variant
from tasks.ir_exclusions import Exclusions
from tasks.ir_mutations import CHEAP, KINDS

HELD_OUT = 64  # held-out groups of an evaluation

# ---- the loss ----


def gepo_loss(rewards, winners, lam=1.0, unbiased=False, eps=0.0):
    """Loss of each group, [...].

    rewards: [..., n + m], r = beta * log(pi / pi_ref) of whole members, the n = `winners`
    equivalent ones first. lam: weight of the variance above eps. unbiased: sample variance instead
    of population variance.

    Log-probs -10, -12 of winners and -14, -11 of losers under the policy, -10 each under the
    reference, beta 0.1: r = 0, -0.2, -0.4, -0.1; the difference of means is 0.15, -log
    sigmoid(0.15) = 0.6210; Var(0, -0.2) = 0.01 (unbiased 0.02); lam 1: 0.6310, with eps 0.004
    0.6270. n = m = 1, lam 0 is DPO.
    """
    wins, losses = rewards[..., :winners], rewards[..., winners:]
    loss = -F.logsigmoid(wins.mean(-1) - losses.mean(-1))
    if winners > 1:
        loss = loss + lam * F.relu(wins.var(-1, unbiased=unbiased) - eps)
    return loss


def losses_of(rewards, settings):
    """gepo_loss with the settings of a run."""
    return gepo_loss(
        rewards,
        settings.gepo_winners,
        settings.gepo_lam,
        settings.gepo_unbiased,
        settings.gepo_eps,
    )


def member_rewards(logprobs, batch, beta, length_norm):
    """beta * log(pi / pi_ref) of each sequence of a packed batch, [S].

    logprobs: [N] of its tokens. length_norm: the mean over a sequence's tokens instead of their
    sum.
    """
    ratio = logprobs.new_zeros(batch.count)
    ratio = ratio.index_add(0, batch.sequence, logprobs - batch.ref_logprobs)
    if length_norm:
        ratio = ratio / torch.bincount(batch.sequence, minlength=batch.count)
    return beta * ratio


# ---- groups ----


@dataclass
class IRGroup:
    """One prompt with n winners, then m losers."""

    id: str
    members: list[Sequence]
    family: str = ""
    kinds: tuple = ()  # of edit, of the losers
    texts: frozenset = frozenset()  # of all winners of the function
    # Log-prob of each member under the reference (per token also in Sequence.ref_logprobs).
    reference: list[float] = field(default_factory=list)

    def cut(self, winners, losers, had):
        """Keep the first n of the `had` winners and the first m losers."""
        self.members = self.members[:winners] + self.members[had : had + losers]
        self.kinds = self.kinds[:losers]

    @property
    def tokens(self):
        return sum(map(len, self.members))


@dataclass
class Gepo:
    """The groups of a run."""

    train: list[IRGroup]
    held_out: list[IRGroup]


def prepare(settings, tokenizer, model, device, folder, report=print):
    """Load the groups and their reference log-probs."""
    gepo = Gepo(*load_groups(settings, tokenizer, report))
    groups = gepo.train + gepo.held_out
    tokens = sum(group.tokens for group in groups)
    report(f"GEPO: log-probs of {tokens:,} tokens under the starting policy, once in a run")
    cache_reference(groups, model, settings, device, folder)
    return gepo


def load_groups(settings, tokenizer, report=print):
    """Groups of --gepo_data: (list to train on, list held out, every tenth family of functions).

    Says how many groups fall to what; SystemExit when none is left.
    """
    path = settings.gepo_data
    kinds = chosen_kinds(settings.gepo_kinds)
    try:
        rows = read_jsonl(path, lambda _, row: Candidates.of(row, kinds))
    except ValueError as problem:
        raise SystemExit(
            f"{problem}; make groups with python gepo.py build --out {path}, or leave --gepo out"
        ) from None

    groups = admitted(fair_rows(rows, settings, report), settings, tokenizer, report)
    counts = Counter(kind for group in groups for kind in group.kinds)
    shares = [f"{kind} {count / counts.total():.0%}" for kind, count in counts.most_common()]
    report("GEPO's losers: " + ", ".join(shares))

    train, held_out = split(groups)
    known = {text for group in held_out for text in group.texts}
    told_apart = [group for group in train if known.isdisjoint(group.texts)]
    if len(told_apart) < len(train):
        report(
            f"GEPO: {len(train) - len(told_apart)} groups not trained on, a held-out group has the "
            "same IR"
        )
    if not told_apart or not held_out:
        raise SystemExit(
            f"{path} leaves {len(told_apart)} groups to train on and {len(held_out)} held out: "
            "build more, with gepo.py build's --winners and --losers, or raise --gepo_max_tokens"
        )
    return told_apart, held_out[:HELD_OUT]


def fair_rows(rows, settings, report):
    """Rows without what translation holds out and MultiPL-E tests (tasks/ir_exclusions.py)."""
    exclusions = Exclusions(settings.data or None, settings.translate_data)
    if not exclusions.is_complete():
        report("GEPO: MultiPL-E is not at hand: groups that overlap it stay in")
    reasons = [exclusions.reason(row.family, row.entry, row.source) for row in rows]
    for reason, count in Counter(filter(None, reasons)).items():
        report(f"GEPO: {count} groups left out, {reason}")
    return [row for row, reason in zip(rows, reasons) if not reason]


def admitted(rows, settings, tokenizer, report):
    """Groups of what has max(n, --gepo_admit_winners) winners, as many losers likewise, none long.

    So arms with smaller n and m train on the same groups, and on some of the same members.
    """
    limit = settings.gepo_max_tokens
    winners = max(settings.gepo_winners, settings.gepo_admit_winners)
    losers = max(settings.gepo_losers, settings.gepo_admit_losers)
    enough_winners = [row for row in rows if len(row.winners) >= winners]
    enough = [row for row in enough_winners if len(row.losers) >= losers]
    groups = [make_group(row, settings, tokenizer, winners, losers) for row in enough]
    short = [group for group in groups if max(map(len, group.members)) <= limit]
    for group in short:
        group.cut(settings.gepo_winners, settings.gepo_losers, winners)
    report(
        f"GEPO: {len(short)} of {len(rows)} groups; {len(rows) - len(enough_winners)} have fewer "
        f"than {winners} winners, {len(enough_winners) - len(enough)} fewer than {losers} losers, "
        f"{len(groups) - len(short)} are longer than --gepo_max_tokens {limit}"
    )
    return short


def split(groups):
    """(groups to train on, groups held out): one family, one file or function, is on one side."""
    train, held_out = [], []
    for group in groups:
        chance = random.Random(without_variant(group.family)).random()
        (held_out if chance < 0.1 else train).append(group)
    return train, held_out


def chosen_kinds(text):
    """--gepo_kinds as a set: names of edits, run (all that a run confirms), cheap (the paper's)."""
    sets = {"run": set(KINDS), "cheap": set(CHEAP)}
    chosen = set()
    for name in text.split(","):
        if name not in sets and name not in KINDS and name not in CHEAP:
            known = ", ".join([*sets, *KINDS, *CHEAP])
            raise SystemExit(f"--gepo_kinds {text}: {name!r} is no kind of edit; choose of {known}")
        chosen |= sets.get(name, {name})
    return chosen


@dataclass
class Candidates:
    """A row of groups.jsonl: a function with all winners and losers that were found."""

    id: str
    family: str
    language: str
    source: str
    entry: str
    winners: list[dict]
    losers: list[dict]

    @classmethod
    def of(cls, row, kinds):
        """kinds: of the losers to keep."""
        losers = [loser for loser in row["losers"] + row["cheap"] if loser["kind"] in kinds]
        names = ("id", "family", "language", "source", "entry", "winners")
        return cls(*(row[name] for name in names), losers)


def make_group(row, settings, tokenizer, winners, losers):
    """`winners` and `losers` of a row, drawn by seed and id, as sequences.

    Optimisation levels go before other winners: SLTrans has two of them a function. Fewer are the
    first of more, so that DPO's pair is one of GEPO's.
    """
    draw = random.Random(f"{settings.seed}/{row.id}")
    prompt = tokenizer.encode_chat(ir_messages(row))
    equivalent = draw.sample(row.winners, len(row.winners))
    equivalent.sort(key=lambda winner: not winner["level"].startswith("O"))  # stable
    different = draw.sample(row.losers, len(row.losers))

    members = []
    for member in equivalent[:winners] + different[:losers]:
        answer = tokenizer.encode(f"```llvm\n{member['ir']}```")
        members.append(Sequence(prompt, [*answer, tokenizer.stop_ids[0]]))
    kinds = tuple(member["kind"] for member in different[:losers])
    texts = frozenset(winner["ir"] for winner in row.winners)
    return IRGroup(row.id, members, row.family, kinds, texts)


def ir_messages(row):
    """The prompt source -> IR. It names the function: one file may have several."""
    title = LANGUAGES[row.language]
    request = (
        f"Compile the function `{row.entry}` of this {title} code to LLVM IR. "
        "Answer with one ```llvm code block."
    )
    fenced = f"```{row.language}\n{row.source.strip()}\n```"
    return [{"role": "user", "content": f"{request}\n\n{fenced}"}]


def cache_reference(groups, model, settings, device, folder):
    """Give every member its log-prob under the policy that the run starts from.

    They are kept in `folder`, so that a resumed run reads them. Call it on every rank before the
    first update, with all groups; each rank computes its share.
    """
    path = Path(folder) / "gepo_reference.json"
    known = None
    if distributed.rank() == 0 and path.exists():
        known = json.loads(path.read_text())
    known = distributed.broadcast(known)

    if known is None:
        found = []  # (group id, [[tokens, log-prob] of each member])
        mine = distributed.share(groups)
        rows = iter(score(model, members_of(mine), settings.token_budget, device))
        for group in mine:
            found.append((group.id, [[len(x.tokens), sum(next(rows))] for x in group.members]))
        known = dict(distributed.gather(found))
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(known))
            path.with_suffix(".tmp").replace(path)

    for group in groups:
        kept = known.get(group.id, ())
        if [len(x.tokens) for x in group.members] != [tokens for tokens, _ in kept]:
            raise SystemExit(
                f"{path} does not fit {settings.gepo_data}: the groups or a --gepo setting changed "
                "since the run began; start a new run"
            )
        group.reference = [logprob for _, logprob in kept]
        for member, logprob in zip(group.members, group.reference):
            member.ref_logprobs = logprob / len(member.tokens)


def members_of(groups):
    return [member for group in groups for member in group.members]


# ---- training ----


def step_groups(gepo, settings, step):
    """The groups of step 1, 2, ... over all ranks.

    Each pass over the data has a new order that depends on seed and pass alone.
    """
    numbers = range((step - 1) * settings.gepo_batch, step * settings.gepo_batch)
    return in_passes(gepo.train, numbers, f"{settings.seed}/gepo")


def in_turn(groups, sequences, settings):
    """The groups that an update takes: none where the rollout's sequences have no signal.

    AdamW divides a gradient by its own size, so a step on GEPO alone is as long whatever its weight
    (0.01, 0.1 and 1 at lr 5e-7: 5.08e-4, 5.11e-4, 5.11e-4). The paper's sum read literally takes
    it: --gepo_alone.
    """
    if not groups or settings.gepo_alone:
        return groups
    signal = any(np.any(sequence.advantage) for sequence in sequences)
    return groups if distributed.largest(signal) else []


def not_taken(settings):
    """Metrics of a step in which no update took GEPO."""
    return {"gepo/taken": 0.0} if settings.gepo else {}


def add_gradient(model, groups, settings, device):
    """Add settings.gepo * mean over `groups` of their GEPO loss to the gradient; metrics of all
    ranks.

    groups: the same list on every rank. Packed: one forward holds all members of a group, several
    groups as the token budget allows. Serial: members go one by one: dL/dr is taken from a pass
    without gradient, then each member's log-prob is weighted with it. Same gradient.
    --gepo_members auto packs where every group fits. RL's gradient is held aside meanwhile, so that
    each part's norm is known (memory of the gradient once more).
    """
    mine = distributed.share(groups)
    reinforced = take_gradients(model)
    fits = max(group.tokens for group in groups) <= settings.token_budget
    packed = settings.gepo_members == "packed" or (settings.gepo_members == "auto" and fits)
    if packed:
        rewards = packed_groups(model, mine, len(groups), settings, device)
    else:
        rewards = serial_groups(model, mine, len(groups), settings, device)
    norms = {
        "gepo/grad_norm": gradient_norm(model),
        "gepo/rl_grad_norm": put_back(model, reinforced),
    }

    rewards = torch.tensor(distributed.gather(rewards))
    kinds = distributed.gather([group.kinds for group in mine])
    return {
        "gepo/taken": 1.0,
        "gepo/loss": float(losses_of(rewards, settings).mean()),
        "gepo/packed": float(packed),
        **norms,
        **spread(rewards, settings.gepo_winners, kinds),
    }


def take_gradients(model):
    """The gradients of all parameters, which are cleared."""
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def gradient_norm(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(distributed.full(torch.nn.utils.get_total_norm(gradients)))


def put_back(model, gradients):
    """Add gradients that take_gradients() took; returns their norm (0.0 where there was none)."""
    held = [gradient for gradient in gradients if gradient is not None]
    norm = float(distributed.full(torch.nn.utils.get_total_norm(held))) if held else 0.0
    for parameter, gradient in zip(model.parameters(), gradients):
        if gradient is not None and parameter.grad is not None:
            parameter.grad += gradient
        elif gradient is not None:
            parameter.grad = gradient
    return norm


def packed_groups(model, groups, total, settings, device):
    """Whole groups in one forward; rewards [n + m] of each group of this rank, shortest first.

    total: groups of all ranks.
    """
    parts = []
    used = settings.token_budget
    for group in sorted(groups, key=lambda group: (group.tokens, group.id)):
        if used + group.tokens > settings.token_budget:
            parts.append([])
            used = 0
        parts[-1] += group.members
        used += group.tokens

    found = []
    size = settings.gepo_winners + settings.gepo_losers
    for batch in packed_batches(parts, device, settings.share_prompts):
        logprobs, _ = model(batch)
        rewards = member_rewards(logprobs, batch, settings.gepo_beta, settings.gepo_length_norm)
        if batch.filler:
            backward(rewards.sum() * 0.0)
            continue
        rewards = rewards.view(-1, size)
        backward(settings.gepo * losses_of(rewards, settings).sum() / total)
        found.append(rewards.detach())
    return torch.cat(found).tolist() if found else []


def serial_groups(model, groups, total, settings, device):
    """Members apart, in two passes; rewards [n + m] of each group of this rank.

    serial: one member a micro-batch, the least memory. auto: as many as --token_budget allows.
    """
    members = members_of(groups)
    budget = 1 if settings.gepo_members == "serial" else settings.token_budget
    lengths = [len(x.tokens) if settings.gepo_length_norm else 1 for x in members]
    reference = [logprob for group in groups for logprob in group.reference]

    # First pass, without gradient: the rewards, and the slope of the loss by each.
    logprobs = score(model, members, budget, device)
    ratios = []
    for new, old, length in zip(logprobs, reference, lengths):
        ratios.append((sum(new) - old) / length)
    rewards = settings.gepo_beta * torch.tensor(ratios, dtype=torch.float64)
    rewards = rewards.view(len(groups), settings.gepo_winners + settings.gepo_losers)
    rewards.requires_grad_()
    (settings.gepo * losses_of(rewards, settings).sum() / total).backward()

    # Second pass: each member's log-probs times its slope.
    for member, slope, length in zip(members, rewards.grad.flatten().tolist(), lengths):
        member.weight = slope * settings.gepo_beta / length
    parts = micro_batches(members, budget, settings.share_prompts)
    for batch in packed_batches(parts, device, settings.share_prompts):
        logprobs, _ = model(batch)
        backward((batch.weights * logprobs).sum())
    return rewards.tolist()


# ---- does it teach what it says? ----


def ranking(scores, winners, tie=0.0):
    """Share of (winner, loser) pairs in which the winner's score is higher.

    scores: [groups, n + m]. A gap up to `tie` is half a pair. Scores 2, 0 of winners and 1 of a
    loser: 0.5.
    """
    gap = scores[:, :winners, None] - scores[:, None, winners:]
    higher = (gap > tie).float()
    tied = (gap.abs() <= tie).float()
    return float((higher + 0.5 * tied).mean())


def by_kind(name, scores, winners, kinds, tie=0.0):
    """{name/KIND: ranking of all winners against the losers of one kind of edit}.

    kinds: [groups][m], of the losers. A kind that few losers have is uncertain: 16 pairs, 0.12.
    """
    gap = scores[:, :winners, None] - scores[:, None, winners:]
    right = ((gap > tie).float() + 0.5 * (gap.abs() <= tie).float()).mean(1)  # [groups, m]
    found = {}
    for row, names in zip(right.tolist(), kinds):
        for share, kind in zip(row, names):
            found.setdefault(kind, []).append(share)
    return {f"{name}/{kind}": sum(shares) / len(shares) for kind, shares in sorted(found.items())}


def spread(rewards, winners, kinds):
    """How well winners are told from losers, and how far winners are from each other."""
    wins, losses = rewards[:, :winners], rewards[:, winners:]
    return {
        # The same log-probs in another micro-batch differ by up to 1e-4.
        "gepo/rank_accuracy": ranking(rewards, winners, tie=1e-3),
        "gepo/margin": float((wins.mean(1) - losses.mean(1)).mean()),
        "gepo/winner_std": float(wins.std(1, unbiased=False).mean()),
        **by_kind("gepo/rank_accuracy", rewards, winners, kinds, tie=1e-3),
    }


def held_out_metrics(gepo, model, settings, device):
    """spread() of held-out groups, and the ranking by plain log-probs per token.

    Before training all rewards are 0: accuracy 0.5, no spread.
    """
    mine = distributed.share(gepo.held_out)
    scored = iter(score(model, members_of(mine), settings.token_budget, device))
    rewards = []
    means = []
    for group in mine:
        rows = [next(scored) for _ in group.members]
        ratios = []
        for row, old in zip(rows, group.reference):
            length = len(row) if settings.gepo_length_norm else 1
            ratios.append(settings.gepo_beta * (sum(row) - old) / length)
        rewards.append(ratios)
        means.append([sum(row) / len(row) for row in rows])

    rewards = torch.tensor(distributed.gather(rewards))
    means = torch.tensor(distributed.gather(means))
    kinds = distributed.gather([group.kinds for group in mine])
    winners = settings.gepo_winners
    return {
        **spread(rewards, winners, kinds),
        "gepo/logprob_rank_accuracy": ranking(means, winners),
        "gepo/winner_logprob_std": float(means[:, :winners].std(1, unbiased=False).mean()),
        **by_kind("gepo/logprob_rank_accuracy", means, winners, kinds),
    }


# ---- python gepo.py build ----


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=["build"], help="make groups of LLVM IR from functions")
    add(
        "--src",
        nargs="+",
        required=True,
        help="C files, folders of them, or JSON lines with functions (transcoder_gfg) or "
        "example (Exercism)",
    )
    add("--out", required=True, help="groups.jsonl to write, or to continue")
    add(
        "--languages",
        default="c",
        help="of c, cpp, rust; transcoder_gfg has the same functions in all [c]",
    )
    add("--winners", type=int, default=2, help="look for more where the levels give fewer [2]")
    add("--losers", type=int, default=8, help="most of a function [8]")
    add("--data", help="folder with data sets, for what is left out (as train.py's)")
    add("--workers", type=int, help="functions at the same time [cores]")
    add("--limit", type=int, help="only the first so many functions")
    add(
        "--vectorize",
        action="store_true",
        help="let clang vectorise and unroll: three to five times as long",
    )
    add("--seed", type=int, default=0, help="decides the edits")
    given = parser.parse_args(arguments)
    languages = tuple(given.languages.split(","))
    if unknown := set(languages) - set(LANGUAGES):
        known = ", ".join(LANGUAGES)
        raise SystemExit(f"--languages {given.languages}: {unknown.pop()!r} is not one of {known}")
    how = ir_groups.Build(given.winners, given.losers, given.vectorize, given.seed)
    ir_groups.build(given.src, given.out, how, languages, given.workers, given.limit, given.data)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command continues where it was")
    except (ValueError, OSError) as problem:
        sys.exit(f"gepo.py: {problem}")

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
import sys

import torch
import torch.nn.functional as F

import ir_groups


def gepo_loss(logprobs, reference, winner, beta=0.1, lam=1.0, unbiased=False):
    """Loss of one group, a scalar. logprobs, reference [n + m]: log-prob of each whole member; winner [n + m] bool.

    Winners -10, -12 and losers -14, -11 under the policy, -10 each under the reference, beta 0.1: r = 0, -0.2, -0.4, -0.1; the difference of
    means is -0.1 + 0.25 = 0.15, -log sigmoid(0.15) = 0.6210; Var(0, -0.2) = 0.01 (unbiased 0.02); lam 1: 0.6310. n = m = 1, lam 0 is DPO.
    """
    rewards = beta * (logprobs - reference)
    wins, losses = rewards[winner], rewards[~winner]
    variance = wins.var(unbiased=unbiased) if len(wins) > 1 else wins.new_zeros(())
    return -F.logsigmoid(wins.mean() - losses.mean()) + lam * variance


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=["build"], help="make groups of LLVM IR from C functions")
    parser.add_argument("--src", nargs="+", required=True, help="C files, folders of them, or JSON lines with c_unit (transcoder_gfg) or example (Exercism)")
    parser.add_argument("--out", required=True, help="groups.jsonl to write, or to go on with")
    parser.add_argument("--workers", type=int, help="functions at the same time [cores]")
    parser.add_argument("--limit", type=int, help="only the first so many functions")
    parser.add_argument("--vectorize", action="store_true", help="let clang vectorise and unroll: three to five times as long")
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

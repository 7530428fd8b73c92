"""flash-linear-attention's naive delta rule and RWKV-6 recurrence as references of our ops, every implementation a case of its own.

Needs `pip install fla-core` (extra `third-party`). `fla.ops` imports triton, so the naive files are loaded alone. They compute in float32
whatever they are given; on float64 inputs `.float()` and new zeros keep that precision here, and the rest is their code as it is.
"""
from importlib import util
from importlib.metadata import files

from parity_tests import specs_ops
from parity_tests.harness import Case


def delta_rule():
    rule = naive("fla/ops/delta_rule/naive.py").delta_rule_recurrence
    return specs_ops.widened(lambda q, k, v, beta, state=None: rule(q * q.shape[-1] ** 0.5, k, v, beta, state))  # it scales q by d^-1/2


def rwkv6():
    rule = naive("fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6

    def op(r, k, v, w, u, state=None):
        r, k, v = (x.transpose(1, 2) for x in (r, k, v))
        y, state = rule(r, k, v, w.log()[None, :, None].expand_as(k), u, scale=1.0, initial_state=state, output_final_state=True)
        return y.transpose(1, 2), state
    return specs_ops.widened(op)


def naive(path):
    spec = util.spec_from_file_location("fla_naive", next(file for file in files("fla-core") if str(file) == path).locate())
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = [Case(f"fla {name}, {impl}", reference, candidate, **specs_ops.SETTINGS[op]) for op, name, reference in (
    ("delta_rule", "delta rule", delta_rule), ("wkv", "RWKV-6", rwkv6)) for impl, candidate in specs_ops.implementations(op).items()]
delta, rwkv = CASES[0], CASES[5]

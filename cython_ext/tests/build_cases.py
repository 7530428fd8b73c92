"""Every kernel and every engine on small awkward sizes, as calls that another process can make on another build.

A case is (module, class and arguments of a construction or None, calls): each call a name, positional and named arguments. `run` gives the arrays
of every case. Nothing but `cython_ext` is needed to run what `drawn` has made.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

import cython_ext
from cython_ext.mamba_block import Sizes as MambaSizes
from cython_ext.packing import pack
from cython_ext.tests import test_dense, test_lam_engine, test_mamba_engine, test_wavecore_engine
from cython_ext.tests.examples import (
    DELTA_SHAPES,
    PLAIN_SHAPES,
    SHAPES,
    WKV_SHAPES,
    arguments,
    cotangent,
    delta_arguments,
    plain_arguments,
    plain_cotangents,
    wkv_arguments,
    wkv_cotangents,
)
from cython_ext.tests.test_wavecore_backward import ways_back, ways_there
from cython_ext.wavecore_layout import Sizes as CoreSizes

SMALL = [shape for shape in SHAPES if shape[1] * shape[2] < 4000]
SMALL_DELTA = [shape for shape in DELTA_SHAPES if shape[2] * shape[3] < 4000]
SMALL_PLAIN = [shape for shape in PLAIN_SHAPES if shape[2] * shape[3] < 7000]
SMALL_CMS = [(1, 1, 1, 1), (3, 9, 33, 5), (2, 5, 17, 16)]
SMALL_WKV = [shape for shape in WKV_SHAPES if shape[1] * shape[3] < 4000]
# Rows on both sides of a tile, columns below, at and above a block; one channel.
SMALL_DENSE = [((1, 1), 1), ((1, 3), 63), ((2, 15), 17), ((3, 5), 100)]

# Runs as a script with two files, the pickled cases and where the results go. An error of a check inside a loop cannot be raised there, only be
# reported, so the hook for reports ends the process.
SCRIPT = """
import importlib, os, pickle, sys
from pathlib import Path

def stop(report):
    print("inside a kernel:", repr(report.exc_value), file=sys.stderr, flush=True)
    os._exit(3)

def arrays(value):
    if isinstance(value, dict):
        value = value.values()
    return [value] if value is None or hasattr(value, "tobytes") else [array for part in value for array in arrays(part)]

sys.unraisablehook = stop
results, files = {}, set()
for case, (module, construction, calls) in pickle.loads(Path(sys.argv[1]).read_bytes()).items():
    room = importlib.import_module(module)
    files.add(room.__file__)
    if construction is not None:
        name, given, named = construction
        room = getattr(room, name)(*given, **named)
    results[case] = []
    for name, given, named in calls:
        outputs = getattr(room, name)(*given, **named)
        results[case] += arrays(given if outputs is None else outputs)  # a write changes what it is given
Path(sys.argv[2]).write_bytes(pickle.dumps((files, results)))
"""


def drawn():
    """{name: case} of every kernel and engine, in float32 and float64."""
    cases = {}
    for dtype in ("float32", "float64"):
        cases |= kernels(dtype) | engines(dtype)
    return cases


def kernels(dtype):
    cases = {}

    def put(module, shape, *calls):
        cases[f"{module} {calls[0][0]} {shape} {dtype}"] = f"cython_ext.{module}", None, calls

    for case, shape in enumerate(SMALL):
        given = list(arguments(shape, dtype, dt_b=case % 2 == 0, initial_state=case % 3 > 0).values())
        states = cython_ext.selective_scan.forward(*given, 1e-5)
        put("selective_scan", shape, ("forward", (*given, 1e-5), {}), ("backward", (cotangent(shape, dtype), *given, states, 1e-5), {}))
    for case, shape in enumerate(SMALL_DELTA):
        given = delta_arguments(shape, dtype, case % 2 == 0)
        put("delta_rule", shape, *(("hierarchical_forward", (), {**given, "transform": transform}) for transform in ("lam", "exact")))
    for case, shape in enumerate(SMALL_PLAIN):
        given = list(plain_arguments(shape, dtype, case % 2 == 0).values())
        put("delta_rule", shape, ("forward", given, {}), ("backward", (*plain_cotangents(shape, dtype), *given), {}))
    for case, shape in enumerate(SMALL_WKV):
        given = *wkv_arguments(shape, dtype, case % 2 == 0, "direct").values(), ("bonus", "gain")[case % 3 % 2]
        put("wkv", shape, ("forward", given, {}), ("backward", (*wkv_cotangents(shape, dtype), *given), {}))
    for shape in SMALL_CMS:
        for module, name, given, options in (*ways_there(shape, dtype), *ways_back(shape, dtype)):
            put(module, shape, (name, tuple(given.values()), options))
    for rows, width in SMALL_DENSE:
        calls = test_dense.calls(dtype, rows, width)
        put("dense", (*rows, width), *((name, (), given) for name, given in calls.items()))
        for storage in {dtype, "bfloat16" if dtype == "float32" else dtype}:
            packed = pack(calls["linear"]["weight"], storage)
            put("dense", f"{(*rows, width)} {storage} in blocks", ("linear", (calls["linear"]["x"], packed), {"activation": "silu"}))
    return cases


def engines(dtype):
    cases = {}
    for storage in (None, "bfloat16") if dtype == "float32" else (None,):
        for changes, lengths in test_lam_engine.CONFIGS[:3]:
            config, weights = test_lam_engine.made(changes)
            options = {name: getattr(config, name) for name in test_lam_engine.SIZES} | {"dtype": dtype, "weights": storage}
            construction = "LamEngine", (weights,), options
            calls = [("__call__", test_lam_engine.sentences(config, lengths), {}), ("__call__", (np.zeros((1, 1), np.int64),), {})]
            cases[f"lam_engine {changes} {dtype} {storage}"] = "cython_ext.lam_engine", construction, calls
        for config in (test_mamba_engine.TINY, test_mamba_engine.GroundedMambaConfig.groundthink(vocab_size=17, dim=33, ssm_dim=4, rwkv_heads=3)):
            weights = test_mamba_engine.weights_of(config, dtype=dtype)
            construction = "GroundedMambaEngine", (weights, MambaSizes(**{name: getattr(config, name) for name in MambaSizes._fields}), storage), {}
            ids = test_mamba_engine.ids_of(config, 3, 37)
            calls = [("__call__", (ids,), {}), ("prefill", (ids[:1, :2],), {}), ("generate", (ids[:, :5], 3), {"temperature": 0.0})]
            cases[f"mamba_engine {config.dim} {dtype} {storage}"] = "cython_ext.mamba_engine", construction, calls
        for changes in test_wavecore_engine.CONFIGS[:5]:
            config, weights = test_wavecore_engine.made(changes)
            sizes = {field.name: getattr(config, field.name) for field in fields(CoreSizes)}
            for batch in (None, 3):
                construction = "WaveCoreEngine", (weights, sizes, dtype, storage), {"batch": batch}
                inputs = test_wavecore_engine.observed(6, batch, dtype)
                calls = [("rollout", inputs, {}), ("step", [value[0] for value in inputs], {}), ("state_arrays", (), {})]
                cases[f"wavecore_engine {changes} {dtype} {storage} {batch}"] = "cython_ext.wavecore_engine", construction, calls
    return cases

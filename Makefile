# Every target sets up what it needs: on a fresh Debian or Ubuntu with python3, python3-venv, make
# and git, `make demo` and `make test` are all there is to type.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# The Triton that PyTorch's CUDA builds of that version bring; its CPU build brings none.
TRITON ?= triton==3.7.1
OUT    ?= out
# How many episodes per task and method `make demo` runs; empty is the command's own default.
EPISODES ?=
# More options of pytest, for `make test`.
PYTEST ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
EMULATOR := $(VENV)/.emulator
GPU := $(VENV)/.gpu

# Two threads at most; that idle ones sleep is the package's own doing (openmp.py).
export OMP_NUM_THREADS ?= 2
export LP_NUM_THREADS  ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup gpu demo test test-emulated check slow test-scale test-lerobot golden-lerobot test-openpi golden-openpi lint quick-lint types docs format bench bench-gpu soak fuzz train clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.12 setup"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "python3-venv is missing; run: apt-get install -y python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The published client of openpi, for the tests.  It asks for numpy < 2, which would take away the
# numpy that everything else runs with, and works with 2 all the same: so it comes without its
# dependencies, and `serve` and `dev` bring those the tests need.
OPENPI_CLIENT := openpi-client==0.1.2

# torch first and alone: resolved with the rest, pip may pick another build and fetch gigabytes.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*) tools/rendering.sh | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[sim,report,hub,openpi,data,serve,bench,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(OPENPI_CLIENT)"
	sh tools/rendering.sh $(BIN)/python
	@touch $@

# Runs the Arm kernels where there is no Arm.
$(EMULATOR): tools/emulator.sh | $(BIN)/python
	sh tools/emulator.sh
	@touch $@

# 200 MB to fetch and 700 MB on disk, so not part of `setup`.  No GPU is needed to interpret the
# kernels, nor to compile them.
gpu: $(GPU)

$(GPU): $(STAMP)
	$(BIN)/python -m pip install --quiet "$(TRITON)"
	@touch $@

demo: $(STAMP)
	$(BIN)/omega-qvla demo --out $(OUT)/demo $(if $(EPISODES),--episodes $(EPISODES))

# Two files at a time, one thread each; tests of threads ask for theirs by number.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TWO_WORKERS) $(PYTEST)

# What the GPUs and processors compute that are not here: interpreted, emulated, or stood in for.
test-emulated: $(STAMP) $(EMULATOR) $(GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TWO_WORKERS) -m "emulated and not slow" $(PYTEST)

# For a developer at work: lint, and the tests of files that are not marked long.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TWO_WORKERS) \
	  -m "not long and not emulated and not slow and not scale and not lerobot and not openpi"

# Ray is 80 MB to fetch, 240 MB installed, and slow to start: its tests are not part of `make test`.
test-scale: $(STAMP)
	$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/python -m pip install --quiet -e ".[scale]"
	$(BIN)/python -m pytest -q -m scale tests/evaluation/execution/test_ray.py

# LeRobot itself beside ours on what it writes: 5 GB in an environment of its own, then a quarter
# of an hour.  LEROBOT=DIR names an environment that is there already (docs/design-notes/2026-11-parity.md).
LEROBOT ?=
LEROBOT_VENV := .venv-lerobot
LEROBOT_PYTHON = $(abspath $(or $(LEROBOT),$(LEROBOT_VENV)))/bin/python
# LeRobot writes all checkpoints before the first test ends: that takes minutes and is no hang.
LEROBOT_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m lerobot tests/lerobot \
  -o faulthandler_timeout=0 \
  --lerobot $(LEROBOT_PYTHON) --lerobot-out $(OUT)/lerobot

# LeRobot's modules as TorchPolicy need both in one environment; the rest keeps them apart.
test-lerobot: $(STAMP) $(if $(LEROBOT),,$(LEROBOT_VENV)/.installed)
	@mkdir -p $(OUT)
	$(LEROBOT_TESTS)
	$(LEROBOT_PYTHON) -m pip install --quiet pytest ".[sim]"
	$(LEROBOT_PYTHON) -m pip install --quiet ./integrations/lerobot
	$(LEROBOT_PYTHON) -m pip check
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LEROBOT_PYTHON) -m pytest -q \
	  tests/lerobot/test_torch_policies.py tests/lerobot/test_bridge.py tests/lerobot/test_plugin.py

# Replaces the records that `test` compares with by what LeRobot computes now.
golden-lerobot: $(STAMP) $(if $(LEROBOT),,$(LEROBOT_VENV)/.installed)
	@mkdir -p $(OUT)
	$(LEROBOT_TESTS) --write-golden

$(LEROBOT_VENV)/.installed:
	@for python in "$(PYTHON312)" python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python3.12; do \
	  "$$python" -m venv $(LEROBOT_VENV) 2>/dev/null && exit 0; done; \
	  echo "Python 3.12 is needed for LeRobot; name one with: make PYTHON312=PATH test-lerobot"; exit 2
	$(LEROBOT_VENV)/bin/python -m pip install --quiet "torch==2.11.0"
	$(LEROBOT_VENV)/bin/python -m pip install --quiet \
	  "lerobot[pi,smolvla,groot,xvla,diffusion,peft]==0.6.1" peft==0.21.2 \
	  imageio pyserial deepdiff sentencepiece
	@touch $@

# openpi itself beside ours, in JAX and in PyTorch, on what its trainer saves: 2 GB in an environment
# of its own, then some minutes.  OPENPI=DIR names a clone of openpi that is there already, and
# OPENPI_PYTHON=PATH the Python of an environment for it (docs/parity.md says with what).
OPENPI ?= .venv-openpi/openpi
OPENPI_PYTHON ?= .venv-openpi/bin/python
OPENPI_COMMIT := 15a9616a00943ada6c20a0f158e3adb39df2ccac
# JAX saves and computes every case before the first test ends: that takes minutes and is no hang.
OPENPI_TESTS = OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m openpi \
  tests/openpi -o faulthandler_timeout=0 --openpi $(OPENPI) --openpi-python $(OPENPI_PYTHON) \
  --openpi-out $(OUT)/openpi

test-openpi: $(STAMP) $(OPENPI_PYTHON)
	@mkdir -p $(OUT)
	$(OPENPI_TESTS)

# Replaces the checkpoints and records that `test` reads by what openpi saves and computes now.
golden-openpi: $(STAMP) $(OPENPI_PYTHON)
	@mkdir -p $(OUT)
	$(OPENPI_TESTS) --write-openpi

# Versions are those of openpi's lock file, but torch.  Its PyTorch model needs files of openpi in
# the place of some of transformers'.
.venv-openpi/bin/python:
	@for python in "$(PYTHON311)" python3.11 "$$HOME"/.pyenv/versions/3.11*/bin/python3.11; do \
	  "$$python" -m venv .venv-openpi.partial 2>/dev/null && exit 0; done; \
	  echo "Python 3.11 is needed for openpi; name one with: make PYTHON311=PATH test-openpi"; exit 2
	.venv-openpi.partial/bin/python -m pip install --quiet "$(TORCH)"
	.venv-openpi.partial/bin/python -m pip install --quiet jax==0.5.3 flax==0.10.2 \
	  orbax-checkpoint==0.11.13 tensorstore==0.1.74 ml-dtypes==0.4.1 numpy==1.26.4 \
	  transformers==4.53.2 optax==0.2.4 chex==0.1.90 equinox==0.12.2 ml_collections==1.0.0 \
	  beartype==0.19.0 jaxtyping==0.2.36 augmax einops numpydantic sentencepiece pillow \
	  "fsspec[gcs]" filelock tqdm-loggable treescope dm-tree flatbuffers msgpack tyro safetensors
	git clone --quiet https://github.com/Physical-Intelligence/openpi .venv-openpi.partial/openpi
	git -C .venv-openpi.partial/openpi checkout --quiet $(OPENPI_COMMIT)
	cp -r .venv-openpi.partial/openpi/src/openpi/models_pytorch/transformers_replace/* \
	  .venv-openpi.partial/lib/python3.11/site-packages/transformers/
	mv .venv-openpi.partial .venv-openpi

# What `test` does a little of, done at length.
slow: $(STAMP) $(EMULATOR) $(GPU)
	$(BIN)/python -m pytest -q -m slow

lint: quick-lint types

# Seconds; what pre-commit runs before a commit.
quick-lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/forbidden_calls.py src
	$(BIN)/python tools/results_table.py --check
	$(BIN)/python tools/speed_table.py --check
	$(BIN)/python tools/readme_figure.py --check
	$(BIN)/python tools/json_page.py --check
	$(BIN)/python tools/artifact_table.py --check
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/pyright

# The documentation's site, into $(OUT)/site; a dead link or anchor is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(abspath $(OUT))/site

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread, every layer shape; about ten minutes on an idle machine.
bench: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/omega-qvla bench kernels --threads 1 --overwrite --json $(OUT)/kernels.json --figure $(OUT)/kernels.png

# A server under load: overload, slow clients, and REQUESTS requests; hours, on an idle machine.
REQUESTS ?= 1000000
soak: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/python benchmarks/soak_serving.py --requests $(REQUESTS) --out $(OUT)/serving-soak.json

# Damaged artifacts and malformed requests; hours.  COUNT and MESSAGES say how many.
COUNT ?= 1000000
MESSAGES ?= 5000000
fuzz: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/python benchmarks/fuzz_artifact.py --count $(COUNT) --out $(OUT)/fuzz-artifact.json
	$(BIN)/python benchmarks/fuzz_wire.py --count $(MESSAGES) --out $(OUT)/fuzz-wire.json

# On the GPU at hand, ten minutes at most; exit status 3 where there is none.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

train: $(STAMP)
	$(BIN)/omega-qvla train tiny-pi05 --out $(OUT)/tiny-pi05

# Results in $(OUT) and the environment stay; remove $(VENV) by hand to start over.
clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

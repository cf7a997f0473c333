# Each target sets up what it needs, from a fresh clone on; wanted beforehand: Python >= 3.10, a C++20 compiler, make.
#   make test    all tests            make demo    SGD and SAM side by side, with a picture
#   make check   ruff, mypy           make bench   the benchmarks
#   make fuzz    what users do, in any order, against plain PyTorch: random calls for an hour, or FASTSAM_FUZZ_MINUTES
#   make docs    the pages, into site/   make bench-accuracy   test accuracy of the demo's methods on two data sets
#   make newest-check        the tests with the newest torch, torchvision and timm, in an environment of its own (5.5 GB)
#   make clean   back to the sources
#   make gpu-check           on a machine with a CUDA GPU: tests/gpu/check.py, all parts, in the environment $(GPU_PYTHON)
#   make composer-check      installs MosaicML Composer in an environment of its own and trains in its Trainer (5.4 GB)
#   make cuda-build-check    builds the CUDA library, with nvcc but without a GPU, and imports it (downloads 4.7 GB)
#   make arm-check           compiles the CPU kernels for 64-bit Arm; wants aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)
#   make dist                the sdist and wheels of a release, each installed into a fresh environment
# Variables: PYTHON (the interpreter of the virtual environment), VENV (its folder), TORCH (as torch==2.10.0, for a VENV of its
# own), and those of setup.py: CXX, MAX_JOBS.

RECENT := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH := torch==2.13.0
TRITON := triton==3.7.1; platform_system == 'Linux'
SETUPTOOLS := setuptools>=77,<82

PIP := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)

CUDA_TORCH := torch==2.11.0
COMPOSER := mosaicml==0.32.1

# An interpreter whose torch is built for CUDA, with fastsam's test and dev extras, triton and rich: make installs nothing here.
GPU_PYTHON ?= python3

FASTSAM_FUZZ_MINUTES ?= 60

.PHONY: help test fuzz demo bench bench-accuracy check docs arm-check newest-check composer-check gpu-check \
	cuda-build-check dist setup clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# A file to a process, which keeps its ranks and wheels; in the order of tests/conftest.py, the slow ones first.
test: setup
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

fuzz: setup
	FASTSAM_FUZZ_MINUTES=$(FASTSAM_FUZZ_MINUTES) $(VENV)/bin/python -m pytest -q -p no:xdist tests/optimizer/test_meetings.py

demo: setup
	$(VENV)/bin/python -m fastsam.demo

bench: setup
	$(VENV)/bin/python -m bench && $(VENV)/bin/python -m bench plot

bench-accuracy: setup
	$(PIP) install "mlxtend>=0.23"
	$(VENV)/bin/python -m bench.accuracy

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup $(VENV)/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --clean
	@echo "the pages are in site/; to search in them: $(VENV)/bin/python -m http.server -d site, and http://localhost:8000"

arm-check: setup
	CI=true $(VENV)/bin/python -m pytest tests/package/test_arm.py && command -v aarch64-linux-gnu-g++

gpu-check:
	$(GPU_PYTHON) tests/gpu/check.py first --out build/gpu-check; passed=$$?; \
	$(GPU_PYTHON) tests/gpu/check.py second --out build/gpu-check-2 --again build/gpu-check/summary.json && exit $$passed

cuda-build-check: setup $(VENV)/cuda.stamp
	@echo "== building the wheel with both native libraries"
	@rm -rf dist/cuda
	@PATH="$(CURDIR)/$(VENV)/cuda/bin:$$PATH" $(VENV)/cuda/bin/python -m pip -q --disable-pip-version-check wheel . \
		--no-build-isolation --no-deps -w dist/cuda
	@$(VENV)/cuda/bin/python -m zipfile -l dist/cuda/*.whl | grep -o 'fastsam/_C_cuda.*' \
		|| { echo "the CUDA library was not built: is there an nvcc of the CUDA of $(CUDA_TORCH)?"; exit 1; }
	$(VENV)/cuda/bin/python tests/package/cuda_build_check.py dist/cuda/*.whl
	$(VENV)/bin/python tests/package/cuda_build_check.py dist/cuda/*.whl

# The wheels are built from the sdist, which therefore holds all that they need.
dist: setup
	@$(PIP) install build twine
	@rm -rf dist/*.tar.gz dist/*.whl
	@FASTSAM_BUILD_NATIVE=0 $(VENV)/bin/python -m build -q --no-isolation --sdist
	@FASTSAM_BUILD_NATIVE=0 $(PIP) wheel --no-build-isolation --no-deps -w dist dist/*.tar.gz
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w dist dist/*.tar.gz
	@$(VENV)/bin/twine check --strict dist/*.tar.gz dist/*.whl
	$(VENV)/bin/python tests/package/dist_check.py "$(TORCH)" "$(SETUPTOOLS)" dist/*.tar.gz dist/*.whl

# Without pins: what somebody who installs torch today gets.
newest-check: $(VENV)/newest.stamp
	@PATH="$(CURDIR)/$(VENV)/newest/bin:$$PATH" $(VENV)/newest/bin/python setup.py -q build_ext --inplace
	$(VENV)/newest/bin/python -m fastsam
	$(VENV)/newest/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# With torch 2.7 there is no native library: foreach serves, and Triton 3.3 for GPUs, whose kernels are interpreted and compiled.
composer-check: $(VENV)/composer.stamp
	@$(VENV)/composer/bin/python -m pip -q --disable-pip-version-check install --no-build-isolation --no-deps \
		--force-reinstall .
	cd $(VENV)/composer && bin/python -m fastsam && bin/python $(CURDIR)/examples/train_composer.py
	$(VENV)/composer/bin/python -m pytest tests/frameworks/test_composer.py tests/frameworks/test_composer_trainer.py \
		tests/kernels/test_triton.py tests/package/test_triton_compile.py

setup: $(VENV)/native.stamp

$(VENV)/newest.stamp: Makefile pyproject.toml
	@echo "== installing the newest torch, torchvision and timm into $(VENV)/newest (5.5 GB)"
	@$(PYTHON) -m venv $(VENV)/newest
	@$(VENV)/newest/bin/python -m pip -qq --disable-pip-version-check install --upgrade torch torchvision timm ninja
	@FASTSAM_BUILD_NATIVE=0 $(VENV)/newest/bin/python -m pip -qq --disable-pip-version-check install --upgrade \
		--no-build-isolation -e ".[demo,test]"
	@touch $@

$(VENV)/composer.stamp: Makefile
	@echo "== installing $(COMPOSER) and the torch that it needs into $(VENV)/composer (5.4 GB)"
	@$(PYTHON) -m venv $(VENV)/composer
	@$(VENV)/composer/bin/python -m pip -qq --disable-pip-version-check install "$(COMPOSER)" numpy scikit-learn hypothesis \
		pytest ninja "$(SETUPTOOLS)"
	@touch $@

$(VENV)/cuda.stamp: $(VENV)/torch.stamp
	@echo "== installing $(CUDA_TORCH) with CUDA's libraries into $(VENV)/cuda (4.7 GB)"
	@$(PYTHON) -m venv $(VENV)/cuda
	@$(VENV)/cuda/bin/python -m pip -qq --disable-pip-version-check install "$(CUDA_TORCH)" numpy ninja "$(SETUPTOOLS)"
	@touch $@

# torch comes first and pinned: whatever else asks for torch then takes this one.
$(VENV)/torch.stamp: Makefile
	@test -n "$(PYTHON)" || { echo "Python >= 3.10 is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON), installing $(TORCH) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install "$(TRITON)"
	@touch $@

# Editable: what is edited is what is tested. The native library is left to the next rule, which rebuilds it alone.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py fastsam/_version.py
	@echo "== installing fastsam (editable) and what its tests, demo and checks use"
	@$(PIP) install "$(SETUPTOOLS)" ninja
	@$(PIP) uninstall -y fastsam # what fused-sam was called before
	@FASTSAM_BUILD_NATIVE=0 $(PIP) install --no-build-isolation -e ".[demo,dev,test]"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/package.stamp
	@$(PIP) install "mkdocs-material==9.*" "mkdocstrings[python]==1.*"
	@touch $@

$(VENV)/native.stamp: $(VENV)/package.stamp $(NATIVE_SOURCES)
	@echo "== building the native library"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python setup.py -q build_ext --inplace >$(VENV)/native.log 2>&1 \
		|| { cat $(VENV)/native.log; exit 1; }
	@grep '^fastsam:' $(VENV)/native.log || true
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info fastsam/*.so .*_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

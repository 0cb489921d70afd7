# make test    every test          make demo    build, check, ask and profile the embedded model
# make quick   the quick tests     make clean   remove what these made (not .venv)
# make lint    style and types     make serve-demo    the page and the API on the embedded model
# make fuzz    damaged inputs by the thousand, with counts by outcome
# make docs     the documentation site, in site/
# make report   docs/report.html and its pictures: nano profiled on this machine, which should be idle
# make test-gpu    what ONNX Runtime does on a GPU, counted on a CUDA that computes nothing
# make browser    Chromium for the tests of pages, where it can be had; without it they are skipped
# Each makes .venv when it is missing; afterwards nothing is installed again until pyproject.toml changes.

PYTHON ?= python3
EXTRAS ?= export,dev
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
UHD := $(BIN)/uhd-export
BUNDLE := demo/nano
IMAGE := examples/cards-1.png
# The wheel of the extra [cuda], and the headers of its CUDA.
GPU_WHEELS := onnxruntime-gpu==1.31.1 nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37
QUESTION := What is the code on the red card?

.PHONY: help test quick test-gpu fuzz demo serve-demo lint docs report clean browser
.DEFAULT_GOAL := help

help:
	@sed -n '/^# Each/q; s/^# //p' Makefile

$(READY): pyproject.toml
	@echo "==> virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> PyTorch, CPU build where the index has one"
	@$(PIP) install torch==2.13.0
	@echo "==> uhd-export[$(EXTRAS)] and what it needs, a few minutes the first time"
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

# The oldest assembler that our kernels must pass; its wheel would shadow the namespace of other NVIDIA wheels in .venv.
OLD_PTXAS := $(VENV)/cuda-12.0

$(OLD_PTXAS): | $(READY)
	@echo "==> ptxas of CUDA 12.0 in $(OLD_PTXAS)"
	@$(PIP) install --no-deps --target $(OLD_PTXAS) nvidia-cuda-nvcc-cu12==12.0.140 || \
		echo "    no wheel for this machine: the test that needs it is skipped"

.PHONY: cuda-12.0
cuda-12.0: $(OLD_PTXAS)

test: $(READY) $(OLD_PTXAS)
	@echo "==> tests"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations=15 --durations-min=1

quick: $(READY)
	@echo "==> tests that are quick"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

# Root may install Debian's; else Playwright brings its own, where its host is reached.
browser: $(READY)
	@echo "==> Chromium"
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && timeout 600 sh -c \
		'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium' \
		>/dev/null 2>&1; } || timeout 300 $(BIN)/python -m playwright install chromium-headless-shell >/dev/null 2>&1 \
		|| echo "not to be had here: the tests of pages are skipped"

# The GPU wheel writes over the CPU's in one environment: it has one of its own, which finds the rest in .venv.
GPU_VENV := .venv-gpu
GPU_READY := $(GPU_VENV)/.ready

$(GPU_READY): $(READY)
	@echo "==> virtual environment in $(GPU_VENV), with onnxruntime-gpu"
	@test -x $(GPU_VENV)/bin/python || $(BIN)/python -m venv --without-pip $(GPU_VENV)
	@$(PIP) --python $(GPU_VENV)/bin/python install --no-deps $(GPU_WHEELS)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@touch $@

test-gpu: $(GPU_READY)
	@echo "==> tests of the CUDA provider, on a CUDA that computes nothing"
	@$(GPU_VENV)/bin/python -m pytest tests/gpu -q --durations=5 --durations-min=1

# What is installed as one package lies in several folders here: links show it to the type checker as one.
LINKS := .mypy_links
lint: $(READY)
	@echo "==> ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "==> mypy"
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/uhd_export
	@ln -s $(CURDIR)/uhd_export/* $(CURDIR)/runtime $(CURDIR)/plugins $(CURDIR)/calibration $(LINKS)/uhd_export
	@cd $(LINKS) && $(CURDIR)/$(BIN)/mypy --cache-dir $(CURDIR)/.mypy_cache --config-file $(CURDIR)/pyproject.toml --python-executable $(CURDIR)/$(BIN)/python

# Longer than the campaign among the tests: SEED chooses the cases, KIND one kind of input.
fuzz: $(READY)
	@echo "==> damaged inputs by the thousand, counted by outcome"
	@cd tests && $(CURDIR)/$(BIN)/python -m fuzz $(or $(SEED),1) $(KIND)

# API pages are read from sources as they are installed, under one name.
DOCS_LINKS := .docs_links
docs: $(READY)
	@echo "==> site/"
	@rm -rf $(DOCS_LINKS) && mkdir -p $(DOCS_LINKS)/uhd_export
	@ln -s $(CURDIR)/uhd_export/* $(CURDIR)/runtime $(CURDIR)/plugins $(CURDIR)/calibration $(DOCS_LINKS)/uhd_export
	@# Pages show what a notebook prints, and nobody needs its warnings there.
	@NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore $(BIN)/python -m mkdocs build --quiet
	@rm -rf $(DOCS_LINKS)

report: $(READY)
	@echo "==> docs/report.html, docs/report.png, docs/report-dark.png"
	@$(BIN)/python benchmarks/report.py

demo: $(READY)
	@echo "==> build: nano, a small LLaVA-UHD v2 checkpoint in this package, into $(BUNDLE)"
	@rm -rf $(BUNDLE)
	@$(UHD) build nano -o $(BUNDLE)
	@echo "==> check: file hashes, and each part against PyTorch"
	@$(UHD) check $(BUNDLE)
	@echo "==> run: $(IMAGE), \"$(QUESTION)\""
	@$(UHD) run $(BUNDLE) $(IMAGE) "$(QUESTION)"
	@echo "==> profile: a 1008x672 image"
	@$(UHD) profile $(BUNDLE) --size 1008x672

serve-demo: $(READY)
	@test -f $(BUNDLE)/manifest.json || $(UHD) build nano -o $(BUNDLE) --no-verify
	@UHD=$(UHD) examples/serve/demo.sh $(BUNDLE) $(IMAGE) "$(QUESTION)"

clean:
	@rm -rf demo site build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache $(LINKS)

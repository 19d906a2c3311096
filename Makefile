# Needs python3 (3.10 or newer), python3-venv and make. Everything else is installed into .venv, from the pins in
# constraints.txt, and again only when pyproject.toml, constraints.txt or this file changed.

PYTHON ?= python3
# PyPI's torch for Linux is the CUDA build, several GB; the "+cpu" build is on PyTorch's own index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= torch==$(TORCH_VERSION)$(if $(filter Linux,$(shell uname -s)),+cpu)

VENV := .venv
BUNDLE := build/tiny-bundle
RUN := $(VENV)/bin/python -m
INSTALL := $(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt Makefile

# Debian packages with the real servers that tests talk to, and the compiler that makes GPU kernels run on the CPU;
# without them those tests are skipped, with CI=true they fail.
SERVICES := python3-gst-1.0 gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good \
	gstreamer1.0-plugins-bad mosquitto chromium openssl glib-networking g++
# A surveillance clip out of a Debian package; too big to install for one file, and not ours to ship.
VTEST := usr/share/doc/opencv-doc/examples/data/vtest.avi

# An environment of its own without constraints, and what is tried in it. torch is the pinned one: each of its releases
# is gigabytes, or of another index.
TRIED = build/$@/venv/bin/python
define try
	rm -rf build/$@
	$(call make_venv,build/$@/venv)
	$(TRIED) -m pip install --quiet --disable-pip-version-check --upgrade 'setuptools>=77'
	$(call install_torch,$(TRIED) -m pip install --quiet --disable-pip-version-check)
	$(TRIED) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[export]' pytest $(1)
	$(TRIED) -m dycoke_edge doctor
	$(TRIED) -m dycoke_edge export tiny build/$@/bundle
	$(TRIED) -m dycoke_edge run build/$@/bundle --video examples/scene.mp4 --prompt 'How many objects are there?'
	$(TRIED) -m pytest -o cache_dir=build/$@/cache tests/test_parity.py
endef

.DELETE_ON_ERROR:
.PHONY: help demo test lint services wheel newest oldest clean

help: ## this list (default)
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.demo ## export a tiny model and let it answer questions about a clip
	$(RUN) examples.demo

test: $(VENV)/.test services lint ## lint, types, tests
	$(RUN) pytest -n 2

lint: $(VENV)/.test ## ruff and mypy
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

services: $(VENV)/$(notdir $(VTEST)) ## what tests need from Debian: servers and a real clip
	@missing=; for package in $(SERVICES); do \
		dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q '^install ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing >/dev/null; then exit 0; fi; \
	echo "some tests will be skipped: sudo apt install --no-install-recommends$$missing" >&2

# A machine without apt goes on without the clip.
$(VENV)/$(notdir $(VTEST)): | $(VENV)/bin/pip
	@if [ -f /$(VTEST) ]; then cp /$(VTEST) $@; exit; fi; \
	if ! command -v apt-get >/dev/null; then echo "some tests will be skipped: no apt to fetch $(notdir $@)" >&2; exit 0; fi; \
	mkdir -p $(VENV)/debs; cd $(VENV)/debs; \
	if [ "$$(id -u)" = 0 ]; then apt-get update -qq; fi; \
	if apt-get download -qq opencv-doc 2>/dev/null && \
		dpkg-deb --fsys-tarfile opencv-doc_*.deb | tar -xO ./$(VTEST) > ../$(notdir $@).part; then \
		mv ../$(notdir $@).part ../$(notdir $@); \
	else \
		echo "some tests will be skipped: sudo apt install opencv-doc" >&2; \
	fi; cd ..; rm -rf debs $(notdir $@).part

wheel: $(VENV)/.demo $(BUNDLE)/dycoke_edge.json ## build dist/*.whl, with a bundle for `dycoke-edge demo` in it
	rm -rf build/lib build/bdist.*
	$(RUN) pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

# dycoke_edge/shipped leads here; `make demo` makes it too.
$(BUNDLE)/dycoke_edge.json: $(wildcard export/tiny/*) | $(VENV)/.demo
	rm -rf $(BUNDLE)
	$(RUN) dycoke_edge export tiny $(BUNDLE)

newest: ## export, parity and an answer with the newest packages that pyproject.toml allows; no part of `make test`
	$(call try,)

oldest: ## the same with the oldest (Python 3.11 or newer)
	$(call try,$$($(TRIED) -m tests.floors export))

clean: ## remove all that make and the tools wrote, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv writes, so a half-made .venv is made again.
define make_venv
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found: sudo apt install python3 python3-venv, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
		sys.exit(0 if sys.version_info >= (3, 10) else "$(PYTHON) is Python " + v + ", too old: make PYTHON=python3.10 (or newer)")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module: sudo apt install" \
		"python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(VENV)/bin/pip:
	$(call make_venv,$(VENV))

# torch first and alone: once the CPU build is there, nothing asks for another. pip's own configuration goes first, so
# a machine with a mirror never waits for PyTorch's index; on plain PyPI that try ends at once, for "+cpu" is not there.
define install_torch
	@$(1) --no-deps "$(TORCH)" 2>/dev/null || \
		$(1) --no-deps --retries 1 --timeout 15 --extra-index-url "$(TORCH_INDEX)" "$(TORCH)" || \
		{ echo "cannot install $(TORCH): set TORCH_INDEX to a package index that has it, or" \
		"TORCH=torch==$(TORCH_VERSION) to take the CUDA build" >&2; exit 1; }
endef

$(VENV)/.demo: $(VENV)/bin/pip $(PINS)
	$(INSTALL) setuptools
	$(call install_torch,$(INSTALL))
	$(INSTALL) --no-build-isolation --editable '.[export]'
	@touch $@

# torchvision stands apart, for the one test that needs it: PyPI's is built for CUDA, and in site-packages beside a
# CPU torch it would break `import transformers`.
$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --no-build-isolation --editable '.[export,serve,test,dev]'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/torchvision torchvision
	@touch $@

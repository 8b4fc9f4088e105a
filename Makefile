# `make demo` and `make test` do all the set-up themselves. PYTHON must be 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
# Processes that run tests; each uses about one core.
JOBS   ?= 2
THIN   := .venv-thin
TRITON := .venv-triton
KSERVE := .venv-kserve
DOCS   := .venv-docs
RELEASE := .venv-release
BIN    := $(VENV)/bin
PIP    := python -m pip install --disable-pip-version-check -q
INSTALL := requirements/install.sh
OURS   := --no-deps --no-build-isolation
SOURCES := pyproject.toml $(shell find export runtime calibration -type f -not -name '*.pyc')
BUNDLE := build/shapes
SMALL  := build/samples/super-resolution
MASKED := build/samples/inpainting
PROMPT := a small red circle left of a large blue square on a yellow background

.PHONY: demo test lint browser strace docs release bench fuzz kill model text-model image-models lock clean

demo: $(VENV)/.demo
	$(BIN)/ldm-export build -o $(BUNDLE)
	$(BIN)/ldm-export generate $(BUNDLE) "$(PROMPT)" --images-per-prompt 4 --seed 42 -o build/demo.png
	$(BIN)/python -m ldm_export_demo.samples build/samples
	$(BIN)/ldm-export build --demo super-resolution -o build/super-resolution
	$(BIN)/ldm-export generate build/super-resolution --image $(SMALL)/0.png $(SMALL)/1.png --seed 42 --each \
		-o build/enlarged.png
	$(BIN)/python -m ldm_export_demo.row $(SMALL) build/enlarged-0.png build/enlarged-1.png \
		-o build/demo-super-resolution.png
	$(BIN)/ldm-export build --demo inpainting -o build/inpainting
	$(BIN)/ldm-export generate build/inpainting --image $(MASKED)/0.png $(MASKED)/1.png \
		--mask $(MASKED)/0_mask.png $(MASKED)/1_mask.png --eta 1 --seed 1 --each \
		-o build/redrawn.png
	$(BIN)/python -m ldm_export_demo.row $(MASKED) build/redrawn-0.png build/redrawn-1.png -o build/demo-inpainting.png
	@echo "The images are in $(CURDIR)/build: demo.png, demo-super-resolution.png and demo-inpainting.png"
	@echo "To draw more in a browser: $(BIN)/ldm-export serve $(BUNDLE) build/super-resolution build/inpainting"

test: $(VENV)/.dev $(THIN)/.thin $(THIN)-numpy1/.thin $(TRITON)/.triton $(KSERVE)/.types lint browser strace
	$(BIN)/pytest -n $(JOBS) --max-worker-restart=0 -m "not slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests open pages in a real browser. Without one, Debian's Chromium is installed if this runs as root.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core && exit; fi; \
	echo "No Chromium here, and it cannot be installed: tests that look at pages will fail"

# The tests trace network calls; in a container they need the permission to do so (docker run --cap-add=SYS_PTRACE).
strace:
	@command -v strace >/dev/null && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends strace && exit; fi; \
	echo "No strace here, and it cannot be installed: tests that trace network calls will fail"

# The documentation site in build/site; a broken link, an unknown anchor or an unknown name is an error.
docs: $(DOCS)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet
	@echo "The documentation is in $(CURDIR)/build/site/index.html"

# Source archive and wheel in dist/, built twice to see that both are equal, with their digests.
release: $(RELEASE)/.release
	$(RELEASE)/bin/python release/build.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/same_image.py --bundle $(BUNDLE)

# Tries 105,000 inputs that are changed at random, about 40 minutes; a campaign that was interrupted continues.
fuzz: $(VENV)/.dev $(TRITON)/.triton
	$(BIN)/python -m tests.fuzz.campaign --json benchmarks/results/fuzz.json

# Kills the commands that write bundles, repositories and images at each of their 750 changes of files, about 15 minutes.
kill: $(VENV)/.dev
	$(BIN)/python -m tests.kill.campaign --json benchmarks/results/kill.json

# Trains the demo models from a fixed seed; an interrupted run continues where it stopped.
model: text-model image-models

text-model: $(VENV)/.dev
	$(BIN)/python demo/training/train_autoencoder.py
	$(BIN)/python demo/training/train_decoder.py
	$(BIN)/python demo/training/train_text.py
	$(BIN)/python demo/training/train_diffusion.py
	$(BIN)/python demo/training/train_finish.py
	$(BIN)/python demo/training/assemble.py
	$(BIN)/python demo/training/evaluate.py demo/ldm_export_demo/checkpoint \
		--json demo/figures/accuracy.json --grid demo/figures/samples.png

image-models: $(VENV)/.dev
	$(BIN)/python demo/training/train_quantized.py
	$(BIN)/python demo/training/train_quantized_decoder.py
	$(BIN)/python demo/training/train_super_resolution.py
	$(BIN)/python demo/training/train_inpainting.py
	$(BIN)/python demo/training/assemble_inputs.py super-resolution inpainting
	$(BIN)/ldm-export build --demo super-resolution -o build/super-resolution
	$(BIN)/python demo/training/evaluate_inputs.py super-resolution build/super-resolution \
		--json demo/figures/super-resolution.json
	$(BIN)/ldm-export build --demo inpainting -o build/inpainting
	$(BIN)/python demo/training/evaluate_inputs.py inpainting build/inpainting --count 240 --eta 1 \
		--json demo/figures/inpainting.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The backend that builds the packages of this repository, so that pip installs nothing without a hash.
$(VENV)/.backend: requirements/build.txt | $(VENV)/bin/python
	$(INSTALL) $(BIN)/python build
	touch $@

# The exporter and the demo model.
$(VENV)/.demo: pyproject.toml demo/pyproject.toml requirements/export.txt | $(VENV)/.backend
	$(INSTALL) $(BIN)/python export
	$(BIN)/$(PIP) $(OURS) -e . -e ./demo
	touch $@

$(VENV)/.dev: pyproject.toml demo/pyproject.toml requirements/dev.txt requirements/clip-vocabulary.txt | $(VENV)/.backend
	$(INSTALL) $(BIN)/python dev
	$(INSTALL) $(BIN)/python trained-unet
	$(INSTALL) $(BIN)/python clip-vocabulary
	$(BIN)/$(PIP) $(OURS) -e . -e ./demo
	touch $@ $(VENV)/.demo

build/wheel/.wheel: $(SOURCES) | $(VENV)/.backend
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check -q $(OURS) --wheel-dir build/wheel .
	touch $@

# Environments of an inference server: the wheel without torch, diffusers, transformers and onnx; NumPy 2 and 1.26.
$(THIN)/.thin: requirements/serve.txt build/wheel/.wheel
	$(PYTHON) -m venv --clear $(THIN)
	$(INSTALL) $(THIN)/bin/python serve
	$(THIN)/bin/$(PIP) --no-deps build/wheel/*.whl
	touch $@

$(THIN)-numpy1/.thin: requirements/serve-numpy1.txt build/wheel/.wheel
	$(PYTHON) -m venv --clear $(THIN)-numpy1
	$(INSTALL) $(THIN)-numpy1/bin/python serve-numpy1
	$(THIN)-numpy1/bin/$(PIP) --no-deps build/wheel/*.whl
	touch $@

# A Triton server with its Python backend, and the wheel in the environment of the backend. NumPy is 1.26, because with
# NumPy 2 the backend delivers empty tensors. The server looks for the stub of its Python version next to the backend.
$(TRITON)/.triton: requirements/triton.txt build/wheel/.wheel
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(INSTALL) $(TRITON)/bin/python triton
	$(TRITON)/bin/$(PIP) --no-deps --force-reinstall build/wheel/*.whl
	set -e; cd $(TRITON)/lib/python3*/site-packages/pytriton/tritonserver; \
		version=$$($(CURDIR)/$(TRITON)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		cp python_backend_stubs/$$version/triton_python_backend_stub backends/python/
	touch $@

# KServe's types, to validate the manifest; without the SDK's other dependencies.
$(KSERVE)/.types: requirements/kserve.txt | $(VENV)/bin/python
	$(INSTALL) $(BIN)/python kserve --upgrade --target $(KSERVE)
	touch $@

$(DOCS)/.docs: pyproject.toml requirements/docs.txt requirements/build.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(INSTALL) $(DOCS)/bin/python build
	$(INSTALL) $(DOCS)/bin/python docs
	$(DOCS)/bin/$(PIP) $(OURS) -e .
	touch $@

$(RELEASE)/.release: requirements/release.txt requirements/build.txt
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(INSTALL) $(RELEASE)/bin/python build
	$(INSTALL) $(RELEASE)/bin/python release
	touch $@

# Writes the lock files of requirements/ anew, with the versions of constraints.txt.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/$(PIP) uv==0.13.9
	.venv-lock/bin/python requirements/lock.py

clean:
	rm -rf build $(VENV) $(THIN) $(THIN)-numpy1 $(TRITON) $(KSERVE) $(DOCS) $(RELEASE) .venv-lock

# `make demo` and `make test` do all the set-up themselves. PYTHON must be 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
# Processes that run tests; each uses about one core.
JOBS   ?= 2
THIN   := .venv-thin
TRITON := .venv-triton
KSERVE := .venv-kserve
BIN    := $(VENV)/bin
PIP    := python -m pip install --disable-pip-version-check -q
SOURCES := pyproject.toml constraints.txt $(shell find export runtime calibration -type f -not -name '*.pyc')
BUNDLE := build/shapes
PROMPT := a small red circle left of a large blue square on a yellow background

.PHONY: demo test lint browser bench model clean

demo: $(VENV)/.demo
	$(BIN)/ldm-export build -o $(BUNDLE)
	$(BIN)/ldm-export generate $(BUNDLE) "$(PROMPT)" --images-per-prompt 4 --seed 42 -o build/demo.png
	@echo "The image is in $(CURDIR)/build/demo.png"

test: $(VENV)/.dev $(THIN)/.thin $(THIN)-numpy1/.thin $(TRITON)/.triton $(KSERVE)/.types lint browser
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -m "not slow and not gpu"

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

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/same_image.py --bundle $(BUNDLE)

# Trains the demo model from a fixed seed; an interrupted run continues where it stopped.
model: $(VENV)/.dev
	$(BIN)/python demo/training/train_autoencoder.py
	$(BIN)/python demo/training/train_decoder.py
	$(BIN)/python demo/training/train_text.py
	$(BIN)/python demo/training/train_diffusion.py
	$(BIN)/python demo/training/train_finish.py
	$(BIN)/python demo/training/assemble.py
	$(BIN)/python demo/training/evaluate.py demo/ldm_export_demo/checkpoint \
		--json demo/figures/accuracy.json --grid demo/figures/samples.png

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The exporter and the demo model.
$(VENV)/.demo: pyproject.toml demo/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/$(PIP) -c constraints.txt -e ".[export]" -e ./demo
	touch $@

# Dependency groups need pip 25.1. The package with a trained UNet asks for onnxruntime-gpu, which would replace onnxruntime.
$(VENV)/.dev: pyproject.toml demo/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/$(PIP) --upgrade "pip>=25.1"
	$(BIN)/$(PIP) -c constraints.txt --group dev -e ".[export,openvino,tensorrt-rtx,tensorrt-lean,polygraphy,client]" -e ./demo
	$(BIN)/$(PIP) --no-deps adaptive-terrain-diffusion==0.4.2
	touch $@ $(VENV)/.demo

# Environments of an inference server: the wheel without torch, diffusers, transformers and onnx; NumPy 2 and 1.26.
$(THIN)/.thin: $(SOURCES) | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(THIN)
	$(THIN)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt ".[onnxruntime]"
	touch $@

$(THIN)-numpy1/.thin: $(SOURCES) | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(THIN)-numpy1
	sed 's/^numpy==.*/numpy==1.26.4/' constraints.txt > $(THIN)-numpy1/constraints.txt
	$(THIN)-numpy1/bin/python -m pip install --disable-pip-version-check -q -c $(THIN)-numpy1/constraints.txt ".[onnxruntime]"
	touch $@

# A Triton server with its Python backend, and the wheel in the environment of the backend. NumPy is 1.26, because with
# NumPy 2 the backend delivers empty tensors. The server looks for the stub of its Python version next to the backend.
$(TRITON)/.triton: $(SOURCES) | $(VENV)/bin/python
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	sed 's/^numpy==.*/numpy==1.26.4/' constraints.txt > $(TRITON)/constraints.txt
	$(TRITON)/bin/python -m pip install --disable-pip-version-check -q -c $(TRITON)/constraints.txt ".[onnxruntime]" nvidia-pytriton
	$(TRITON)/bin/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall .
	set -e; cd $(TRITON)/lib/python3*/site-packages/pytriton/tritonserver; \
		version=$$($(CURDIR)/$(TRITON)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		cp python_backend_stubs/$$version/triton_python_backend_stub backends/python/
	touch $@

# KServe's types, to validate the manifest; without the SDK's other dependencies.
$(KSERVE)/.types: | $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(KSERVE) kserve==0.21.0
	touch $@

clean:
	rm -rf build $(VENV) $(THIN) $(THIN)-numpy1 $(TRITON) $(KSERVE)

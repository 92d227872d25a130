# make demo and make test set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := onnx,bench,data,dev

# A machine whose Python already has a CUDA torch keeps it; elsewhere the tested set is installed.
CUDA_TORCH := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null)
ifeq ($(CUDA_TORCH),1)
VENV_FLAGS := --system-site-packages
else
CONSTRAINTS := -c constraints.txt
endif

.PHONY: demo test lint preflight gpu

demo: .venv/installed
	$(BIN)/sbldm-fast demo -o demo

test: .venv/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/lint .
	PYTHONSAFEPATH=1 MYPYPATH=build/lint $(BIN)/mypy -p sbldm_fast # as installed: mypy does not follow package-dir

preflight: .venv/installed
	$(BIN)/python -m sbldm_fast.kernels.preflight --sm 75

# On any CUDA machine with torch >= 2.8: the Python that is there, nothing downloaded, nothing changed outside build/.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu needs a CUDA device, and this PyTorch sees none')" || exit 2
	$(GPU_PYTHON) -m pip install -q --no-deps --no-build-isolation --upgrade --target build/gpu .
	PYTHONSAFEPATH=1 PYTHONPATH=build/gpu $(GPU_PYTHON) -m pytest -q -m gpu -p no:cacheprovider tests
	PYTHONSAFEPATH=1 PYTHONPATH=build/gpu $(GPU_PYTHON) -m sbldm_fast.benchmarks.gpu benchmarks/results

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

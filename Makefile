# make demo and make test set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= onnx,bench,data,train,eval,dev

# A machine whose Python already has a CUDA torch keeps it; elsewhere the tested set is installed.
CUDA_SITE := $(shell $(PYTHON) -c "import pathlib, torch; assert torch.cuda.is_available(); print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null)
ifeq ($(CUDA_SITE),)
CONSTRAINTS := -c constraints.txt
endif

.PHONY: demo test lint docs preflight gate gpu results weights build/tree

demo: .venv/installed
	$(BIN)/sbldm-fast demo -o demo

test: .venv/installed
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 8

lint: .venv/installed build/tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONSAFEPATH=1 MYPYPATH=build/tree $(BIN)/mypy -p sbldm_fast

# The API reference of the public names, from their docstrings, to build/docs/index.html.
PUBLIC := sbldm_fast sbldm_fast.kernels sbldm_fast.data sbldm_fast.training sbldm_fast.evaluation sbldm_fast.export sbldm_fast.images sbldm_fast.errors
docs: .venv/installed build/tree
	cd build && PYTHONSAFEPATH=1 PYTHONPATH=tree $(abspath $(BIN))/pdoc --docformat google --no-search -t ../docs/reference -o docs $(PUBLIC)

# Compiles the kernels that benchmarks/gate.jsonl does not prove; `make gate` writes their rows there.
preflight: .venv/installed
	$(BIN)/python -m sbldm_fast.kernels.preflight --worst --changed

gate: .venv/installed
	mkdir -p build
	$(BIN)/python -m sbldm_fast.kernels.preflight --worst --changed --json > build/gate.jsonl
	mv build/gate.jsonl benchmarks/gate.jsonl

# On any CUDA machine with torch >= 2.8: the Python that is there, nothing downloaded. Nine minutes; run again it goes on.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: build/tree
	@PYTHONSAFEPATH=1 PYTHONPATH=build/tree $(GPU_PYTHON) -m sbldm_fast.benchmarks.gpu -o gpu

# Rows from any machine into benchmarks/results, and the pages that are rendered from them.
results: .venv/installed
	test -f "$(ROWS)" || { echo "make results needs ROWS=file with the rows, such as gpu/rows.jsonl" >&2; exit 2; }
	$(BIN)/python -m sbldm_fast.benchmarks.rows "$(ROWS)" benchmarks/results
	$(BIN)/python -m sbldm_fast.benchmarks.pages README.md docs/benchmarks.md docs/sampling.md docs/rows.md docs/ablations.md benchmarks/GPU.md

# The bundled weights again, from the folders ms/ and dicom_t1_axial/ in SCANS; about four hours on two cores. Cut off, it goes on.
PROCESSES ?= 2
weights: .venv/installed
	test -d "$(SCANS)/ms" || { echo "make weights needs SCANS=folder with the scans that the model card names" >&2; exit 2; }
	$(BIN)/sbldm-fast prepare $(SCANS)/ms $(SCANS)/dicom_t1_axial mni152 synthetic:168 --seed 0 --covariates $(SCANS)/ms/patient_info.csv -o weights/data
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=$(PROCESSES) -m sbldm_fast train weights/run --data weights/data --preset demo \
		--vae-steps 2400 --vae-batch-size 16 --vae-lr 1e-3 --recon l1 \
		--steps 12500 --batch-size 64 --lr 7e-4 --ema-decay 0.999 --prediction-type v_prediction --warmup 500 --views 5 --amp bf16 \
		--condition age,sex,ventricle_volume,modality,position --resume
	$(BIN)/sbldm-fast train-volume weights/run/pipeline --data weights/data --amp bf16 --resume -o weights/volume
	$(BIN)/sbldm-fast distill weights/run/pipeline --data weights/data --steps 4 --train-steps 4500 --views 5 --amp bf16 --resume -o weights/student
	$(BIN)/sbldm-fast evaluate weights/volume/pipeline --data weights/data -o weights/evaluation

# The four folders as the one package that an install makes of them, for tools that do not follow package-dir.
build/tree:
	rm -rf $@ && mkdir -p $@ && cp -r sbldm_fast $@/ && cp -r kernels export benchmarks $@/sbldm_fast/

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -z "$(CUDA_SITE)" || echo "$(CUDA_SITE)" > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/cuda-torch.pth
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

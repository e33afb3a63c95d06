# `make demo` and `make test` need only python3 (>= 3.10) with venv and pip, and make: they set up .venv first.
#   PYTHON           the interpreter that .venv is made with
#   TORCH_INDEX_URL  a wheel index of pytorch.org to take torch from, e.g. for CPU-only wheels
#                    make test TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   CONSTRAINTS      the versions to install; /dev/null means the newest that setup.cfg allows
PYTHON ?= python3
TORCH_INDEX_URL ?=
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

BUNDLE := bundles/brats_fusionunet_passion/configs
# MONAI's warning that a configuration is code would come before every step.
BUNDLE_RUN := PYTHONWARNINGS='ignore:parsing config_file' $(BIN)/python -m monai.bundle run
DEMO_OUTPUT := demo_output
# Small enough for the CPU of a laptop; a real training takes the values in the configuration.
DEMO := --output_dir $(DEMO_OUTPUT) --spacing '[3.0,3.0,3.0]' --num_workers 0 --network_def::width 8 \
	--phantom::shape '[64,64,64]' --phantom::spacing '[3.0,3.0,3.0]'
DEMO_TRAINING := --overwrite True --roi_size '[32,32,32]' --foreground_crops 0.5 --epochs 75 --val_interval 25 \
	--learning_rate 3.0e-3 --batch_size 2

# One file at a time on each of two cores: small tensors gain nothing from more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo experiments install fix lint type test test-all docs bundles check-bundles weights weights-real dist-bundles check clean .no-dataset-dir

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train, evaluate, predict and draw figures on a phantom cohort
	$(BUNDLE_RUN) training --config_file $(BUNDLE)/train.yaml $(DEMO) $(DEMO_TRAINING)
	$(BUNDLE_RUN) --config_file $(BUNDLE)/evaluate.yaml $(DEMO) --keep_cases 2
	$(BUNDLE_RUN) --config_file $(BUNDLE)/inference.yaml $(DEMO) --ckpt_path $(DEMO_OUTPUT)/models/model.pt
	$(BIN)/python -m passion_monai.evaluation.figures $(DEMO_OUTPUT) > $(DEMO_OUTPUT)/figures.txt
	$(BIN)/python experiments/patients_figure.py $(DEMO_OUTPUT) --output $(DEMO_OUTPUT)/patients >> $(DEMO_OUTPUT)/figures.txt
	$(BIN)/python -m passion_monai.report PASSION=$(DEMO_OUTPUT) --output $(DEMO_OUTPUT)/report >> $(DEMO_OUTPUT)/figures.txt
	@echo
	@echo "Done, on a phantom cohort: simulated brains, not patients. Look at"
	@echo "Patients:     $(DEMO_OUTPUT)/patients/      segmented from one sequence, two, and all four"
	@echo "Report:       $(DEMO_OUTPUT)/report/index.html"
	@echo "Training:     $(DEMO_OUTPUT)/figures/training.png"
	@echo "Predictions:  $(DEMO_OUTPUT)/predictions/"

experiments: $(VENV)/.demo $(VENV)-snakemake/.done  ## Make the paper's tables at small scale, on phantoms; hours on two cores
	OMP_NUM_THREADS=1 $(VENV)-snakemake/bin/snakemake -s experiments/Snakefile --cores 2

install: $(VENV)/.dev  ## Set up .venv for development, with the commit hooks
	$(BIN)/pre-commit install

fix: $(VENV)/.dev  ## Repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.dev  ## Check style, format and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

type: $(VENV)/.dev  ## Check types
	$(BIN)/mypy passion_monai bundles benchmarks

test: $(VENV)/.dev  ## Run the tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev  ## Run all tests
	$(PYTEST)

docs: $(VENV)/.docs  ## Build the documentation site, into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build
	@echo "Look at docs/_build/index.html"

bundles: $(VENV)/.dev  ## Rebuild the bundles' configs from their fragments
	$(BIN)/python bundles/build.py

check-bundles: $(VENV)/.dev  ## Check that the bundles' configs match their fragments
	$(BIN)/python bundles/build.py --check

weights: $(VENV)/.dev  ## Train the bundles' small weights on the phantom, into dist/
	$(BIN)/python bundles/pack.py weights
	$(BIN)/python bundles/build.py

weights-real: $(if $(DATASET_DIR),,.no-dataset-dir) $(VENV)/.demo $(VENV)-snakemake/.done  ## Train and cross-validate weights on the cases in DATASET_DIR; a night on a CPU
	OMP_NUM_THREADS=1 $(VENV)-snakemake/bin/snakemake -s experiments/Snakefile --cores 1 \
		--config scale=real "dataset_dir=$(DATASET_DIR)" -- weights
	$(BIN)/python bundles/build.py
	$(BIN)/python bundles/pack.py hub brats_rfnet_passion

.no-dataset-dir:
	@echo "Say where the cases are: make weights-real DATASET_DIR=/data/cases" >&2; exit 2

dist-bundles: $(VENV)/.dev  ## Zip the bundles that have weights, into dist/
	$(BIN)/python bundles/pack.py zip

check: lint type check-bundles test  ## All that a change must pass

clean:  ## Remove .venv, caches and the demo's output
	rm -rf $(VENV) $(VENV)-snakemake $(DEMO_OUTPUT) build dist docs/_build docs/jupyter_execute docs/reference/api *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch comes first and pinned: as a mere dependency, pip would take the newest build, with several GB of GPU libraries.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit('Python >= 3.10 is needed: make ... PYTHON=python3.12' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch setup.cfg
	$(PIP_INSTALL) -e ".[demo,export,tracking,dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# Apart, since snakemake and nilearn want different releases of `packaging`.
$(VENV)-snakemake/.done: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-snakemake
	$(VENV)-snakemake/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) snakemake
	@touch $@

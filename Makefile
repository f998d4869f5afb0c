# Every target sets up what it needs in .venv. PYTHON chooses the interpreter, EXTRAS adds
# packages, as in: make demo EXTRAS="jax[cuda12]"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: sample demo demo-latent test agreement reliability notebooks docs lint format bench clean
.DELETE_ON_ERROR:

# Install, and draw six colour pictures of each of ten classes in 25 steps from a model that ships.
sample: $(VENV)/.installed
	$(BIN)/python sample.py --workdir=shipped-cifar --guidance_scale=3 --steps=25 --num=60

# Install, train the digits, and draw 64 of them in 25 steps.
demo: $(VENV)/.installed
	$(BIN)/python train.py
	$(BIN)/python sample.py --steps=25

# The same in latent space: train an autoencoder of the digits, a model with classes of its latents, and draw its digits.
demo-latent: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/digits_autoencoder.py
	$(BIN)/python train.py --config=configs/digits_latent.py
	$(BIN)/python sample.py --workdir=runs/digits_latent --guidance_scale=2 --num=80

# A process for each core, up to four; files in the order of their names, which begins with the long ones.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# Every table beside diffusers' scheduler, and Inception beside pytorch-fid's.
agreement: $(VENV)/.installed-torch
	$(BIN)/python -m pytest tests/agreement

# Kills, full disks, damages, hostile files, values, streams, processes and devices, with counts; about an hour.
reliability: $(VENV)/.installed-test
	$(BIN)/python -m pytest -rA --no-header -m "" tests/test_reliability.py tests/test_endurance.py \
		tests/test_batches.py tests/test_checkpoints.py tests/test_loop.py tests/test_files.py \
		tests/test_run_folder.py tests/test_process.py tests/test_strangers.py tests/test_students.py \
		tests/test_mean_flow.py tests/test_guided_students.py

# Runs the notebooks that have changed, or all where the library has; the results are pages of the site.
NOTEBOOKS := $(patsubst notebooks/%.py,docs/notebooks/%.ipynb,$(wildcard notebooks/*.py))

notebooks: $(NOTEBOOKS)

docs/notebooks/%.ipynb: notebooks/%.py $(wildcard *.py configs/*.py diffusion/*.py diffusion/*/*.py) \
		| $(VENV)/.installed-notebooks
	$(BIN)/jupytext --quiet --to ipynb --output $@ $<
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 --overwrite $@

# The site, in site/. Broken links, anchors and references are errors.
docs: $(NOTEBOOKS) $(VENV)/.installed-docs
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going docs site
	@echo "wrote site/index.html"

# Style, the layers of the library, and the sizes of functions and modules.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/sizes.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Network call, training step and sampling beside torch, and the first picture from a cold and a warm cache; the tables
# of docs/speed.md are written anew. It wants a machine that does nothing else, for some hours.
bench: $(VENV)/.installed-torch
	$(BIN)/python benchmarks/first_picture.py --out=docs/speed.md
	$(BIN)/python benchmarks/against_torch.py --out=docs/speed.md

clean:
	rm -rf $(VENV) build dist site jupyter_execute .import_linter_cache docs/notebooks/*.ipynb *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . $(EXTRAS)
	@touch $@

# The CPU build of torch comes first, and what needs torch comes without its dependencies, or pip brings gigabytes of CUDA.
$(VENV)/.installed-torch: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 pytorch-fid==0.3.0 \
		k-diffusion==0.1.1.post1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,reference]" $(EXTRAS)
	@touch $@

# Kept: make would delete a mark that only a pattern asks for, and install once more the next time.
.PRECIOUS: $(VENV)/.installed-%

$(VENV)/.installed-%: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]" $(EXTRAS)
	@touch $@

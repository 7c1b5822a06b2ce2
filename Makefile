# make demo: a real report from nothing. make test: every test. The other verbs need the same environment.
PY = .venv/bin/python
CLI = .venv/bin/lowrank-distill
export PLOTLY_RENDERER = plotly_mimetype
export OMP_NUM_THREADS ?= 1

demo: .venv/ready
	OMP_NUM_THREADS=2 $(CLI) run tour
	@echo "go on: 'make lab' opens the notebooks, '$(CLI) list' names the methods"

test: .venv/ready
	$(PY) -m pytest -n 2 -q --durations=10

check: .venv/ready
	HYPOTHESIS_PROFILE=check $(PY) -m pytest -n 2 -q tests/test_conform.py tests/test_adapter.py tests/test_recording.py

lab: .venv/ready
	.venv/bin/jupyter lab nbs

docs: .venv/ready
	$(PY) tools/build_docs.py

evidence: .venv/ready
	$(CLI) evidence

bench: .venv/ready
	$(PY) tools/bench.py

clean:
	rm -rf docs _proc runs build dist

# the stamp lives inside .venv: a half-made environment is made again, a changed pin updates it
.venv/ready: constraints.txt settings.ini pyproject.toml setup.py
	@echo "making the environment (two to three minutes)"
	python3 -m venv .venv
	.venv/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test check lab docs evidence bench clean
